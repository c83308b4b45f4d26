//! Cases of the single kernels: tails of every tile, odd head counts, both storages.

use std::ops::Range;

use super::compare::{Comparison, HALF_ROUNDOFF, Tolerance, UNIT_ROUNDOFF};
use super::guarded::Guarded;
use super::random::Random;
use super::view::{Reading, View};
use super::{Case, Lab, Words, every_tuning, not_run, skipped};
use crate::adapter::{AdapterClass, Cooperative, Tuning};
use crate::attention::groups::{Groups, Layout as ListLayout, NO_ROW, Patch};
use crate::config::{Activation, GateNorm, RopeConfig, RopeScaling};
use crate::error::Result;
use crate::kernels::attention_decode::{DecodeSequence, SPLIT};
use crate::kernels::attention_grouped::{GroupedSequence, SEQUENCE_WORDS, Tiling};
use crate::kernels::attention_prefill::QueryTile;
use crate::kernels::attention_prefill::{QUERY_TILES, tile_q};
use crate::kernels::cache_read::SequenceRow;
use crate::kernels::matmul::Layout;
use crate::kernels::{
    AttentionAbsorbed, AttentionDecode, AttentionGrouped, AttentionPrefill, CacheAppend, Gate, Matmul, Norm,
    RooflineCooperative, attention_absorbed, attention_combine, attention_decode, attention_grouped, attention_prefill,
    cache_append, cache_copy, cache_read, gate, gate_project, gate_statistics, gather, group_ids, matmul, norm,
    residual_add, roofline_cooperative, roofline_copy, roofline_fma, rope, swiglu, word_scatter,
};
use crate::op::{Op as _, Variant};
use crate::reference;
use crate::storage::Storage;

/// Seed of every case's inputs: cases differ by their sizes.
const SEED: u64 = 20;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    matrix_products(&mut cases);
    norms(&mut cases);
    gates(&mut cases);
    ropes(&mut cases);
    elementwise(&mut cases);
    rooflines(&mut cases);
    gathers(&mut cases);
    caches(&mut cases);
    prefills(&mut cases);
    decodes(&mut cases);
    combines(&mut cases);
    grouped(&mut cases);
    gate_row_cases(&mut cases);
    lists(&mut cases);
    cases
}

fn matrix_products(cases: &mut Vec<Case>) {
    // One row, then tile − 1, tile, tile + 1 of the larger tiles, and inner lengths around the staged ones.
    let many = [
        (1, 1, 1),
        (9, 16, 31),
        (31, 15, 33),
        (32, 33, 32),
        (63, 17, 65),
        (64, 32, 64),
        (65, 100, 63),
        (129, 8, 130),
        (33, 1, 127),
        (70, 257, 48),
    ];
    let few = [(1, 1, 1), (1, 64, 7), (2, 65, 8), (3, 31, 9), (4, 129, 63), (5, 100, 65), (8, 257, 33), (1, 1024, 130)];
    let many_in_vec4 = [
        (1, 8, 1),
        (7, 16, 31),
        (8, 24, 32),
        (9, 16, 33),
        (63, 8, 65),
        (64, 32, 64),
        (65, 104, 63),
        (127, 16, 129),
        (129, 40, 127),
        (33, 512, 5),
    ];
    let few_in_vec4 = [
        (1, 8, 1),
        (1, 64, 7),
        (2, 72, 8),
        (3, 32, 9),
        (4, 128, 63),
        (5, 104, 65),
        (8, 264, 33),
        (1, 1024, 130),
        (1, 2056, 31),
    ];
    for storage in Storage::ALL {
        for (index, &(rows, inner, cols)) in many.iter().enumerate() {
            let problem = matmul::Matmul::linear(rows, inner, cols, index % 2 == 1, storage);
            cases.push(product_case(format!("{rows}x{inner}x{cols}"), problem, &matmul::TILES));
        }
        for (index, &(rows, inner, cols)) in few.iter().enumerate() {
            let problem = matmul::Matmul::linear(rows, inner, cols, index % 2 == 1, storage);
            cases.push(product_case(format!("{rows}x{inner}x{cols}"), problem, &matmul::GEMV));
        }
        for (rows, product) in [(3, &matmul::GEMV), (34, &matmul::TILES)] {
            for n_head in [1, 3] {
                cases.push(product_case(format!("absorb_{rows}x{n_head}"), absorb(rows, n_head, storage), product));
                cases.push(product_case(format!("fold_{rows}x{n_head}"), fold(rows, n_head, storage), product));
            }
        }
        // The same neighbourhoods with rows of whole 16-byte loads, around the 16 k of a staged tile.
        for (index, &(rows, inner, cols)) in many_in_vec4.iter().enumerate() {
            for product in [&matmul::VEC4, &matmul::SUBGROUP] {
                let problem = matmul::Matmul::linear(rows, inner, cols, index % 2 == 1, storage);
                cases.push(product_case(format!("{rows}x{inner}x{cols}"), problem, product));
            }
        }
        for (index, &(rows, inner, cols)) in few_in_vec4.iter().enumerate() {
            for product in [&matmul::GEMV_VEC4, &matmul::GEMV_SUBGROUP] {
                let problem = matmul::Matmul::linear(rows, inner, cols, index % 2 == 1, storage);
                cases.push(product_case(format!("{rows}x{inner}x{cols}"), problem, product));
            }
        }
        for (rows, products) in
            [(3, [&matmul::GEMV_VEC4, &matmul::GEMV_SUBGROUP]), (34, [&matmul::VEC4, &matmul::SUBGROUP])]
        {
            for product in products {
                cases.push(product_case(format!("apart_{rows}"), apart(rows, storage), product));
            }
        }
    }
    // Around tiles of 32, 64 and 128 and around the 16 to 64 k that are staged at once.
    let by_matrices = [
        (1, 8, 1),
        (9, 16, 31),
        (31, 24, 33),
        (33, 32, 32),
        (63, 40, 65),
        (65, 64, 63),
        (127, 72, 129),
        (129, 128, 127),
        (257, 8, 17),
        (5, 1024, 130),
    ];
    for product in [&matmul::COOPERATIVE, &matmul::COOPERATIVE_8] {
        for (index, &(rows, inner, cols)) in by_matrices.iter().enumerate() {
            let problem = matmul::Matmul::linear(rows, inner, cols, index % 2 == 1, Storage::F16);
            cases.push(product_case(format!("{rows}x{inner}x{cols}"), problem, product));
        }
        for rows in [3, 34] {
            cases.push(product_case(format!("apart_{rows}"), apart(rows, Storage::F16), product));
        }
    }
}

/// The products of the absorbed path: heads side by side in a row, a block of kv_b_proj each, here 10 + 6 rows of 12.
fn absorb(rows: u32, n_head: u32, storage: Storage) -> matmul::Matmul {
    matmul::Matmul {
        rows,
        inner: 10,
        cols: 12,
        batch: n_head,
        x: Layout { offset: 0, row: n_head * 14, inner: 1, batch: 14 },
        w: Layout { offset: 0, row: 1, inner: 12, batch: 16 * 12 },
        y: Layout { offset: 0, row: n_head * 12, inner: 1, batch: 12 },
        bias: false,
        storage,
    }
}

fn fold(rows: u32, n_head: u32, storage: Storage) -> matmul::Matmul {
    matmul::Matmul {
        rows,
        inner: 12,
        cols: 6,
        batch: n_head,
        x: Layout { offset: 0, row: n_head * 12, inner: 1, batch: 12 },
        w: Layout { offset: 10 * 12, row: 12, inner: 1, batch: 16 * 12 },
        y: Layout { offset: 3, row: n_head * 6, inner: 1, batch: 6 },
        bias: false,
        storage,
    }
}

/// Aligned operands that stand apart, three matrices of them.
fn apart(rows: u32, storage: Storage) -> matmul::Matmul {
    matmul::Matmul {
        rows,
        inner: 24,
        cols: 37,
        batch: 3,
        x: Layout { offset: 4, row: 3 * 28, inner: 1, batch: 28 },
        w: Layout { offset: 8, row: 32, inner: 1, batch: 40 * 32 },
        y: Layout { offset: 3, row: 3 * 40, inner: 1, batch: 40 },
        bias: true,
        storage,
    }
}

/// `(x, w, bias, rows, inner, cols)` to `y`.
type Definition = fn(&[f64], &[f64], Option<&[f64]>, usize, usize, usize) -> Vec<f64>;

fn product_case(sizes: String, problem: matmul::Matmul, variant: &'static Variant<Matmul>) -> Case {
    let reference: Definition = match variant.spec.cooperative {
        Cooperative::NONE => reference::matmul,
        _ => reference::matmul_of_halves,
    };
    let bias = if problem.bias { "/bias" } else { "" };
    let id = format!("{sizes}/{}{bias}", problem.storage.name());
    Case::new(variant.spec.name, id, move |lab| {
        if let Some(outcomes) = skipped(&variant.spec, lab.kernels) {
            return Ok(outcomes);
        }
        let p = problem;
        let (rows, inner, cols) = (p.rows as usize, p.inner as usize, p.cols as usize);
        let end = |layout: Layout, rows: u32, inner: u32| {
            layout.offset + (rows - 1) * layout.row + (inner - 1) * layout.inner + (p.batch - 1) * layout.batch + 1
        };
        let tolerance = Tolerance::sums(&[inner]);
        every_tuning(variant.spec.tunings, tolerance, |tuning| {
            let mut random = Random::new(SEED);
            let x_values = random.values(end(p.x, p.rows, p.inner) as usize, 1.0);
            let w_values = random.values(end(p.w, p.cols, p.inner) as usize, 1.0);
            let x = lab.floats(&x_values)?;
            let (w, w_kept) = lab.stored(&w_values, p.storage)?;
            let (bias, bias_kept) = lab.stored(&random.values(cols, 1.0), p.storage)?;
            let y = lab.output(end(p.y, p.rows, p.cols) as usize)?;
            let args = matmul::Args { x: &x.region, w: &w.region, bias: &bias.region, y: &y.region };
            lab.launch(|recording| recording.add_variant(variant, &p, args, tuning))?;
            let got = lab.read(&y)?;
            // Nothing else was written: neither before the offset nor between the rows.
            let elements = [f64::from(p.batch) * (rows * cols) as f64];
            let written = View::all(Reading::Written, got.words.len());
            let count = lab.compare_views(&[(&got, written)], &elements, Tolerance::EXACT);
            std::iter::once(Ok(count))
                .chain((0..p.batch).map(|b| {
                    let pick = |values: &[f64], layout: Layout, rows: u32, inner: u32| -> Vec<f64> {
                        let at = |m, k| layout.offset + b * layout.batch + m * layout.row + k * layout.inner;
                        (0..rows).flat_map(|m| (0..inner).map(move |k| at(m, k))).map(|i| values[i as usize]).collect()
                    };
                    let x = pick(&widen(&x_values), p.x, p.rows, p.inner);
                    let w = pick(&w_kept, p.w, p.cols, p.inner);
                    let bias = p.bias.then_some(&bias_kept[..]);
                    let expected = reference(&x, &w, bias, rows, inner, cols);
                    let y = View {
                        reading: Reading::F32,
                        first: (p.y.offset + b * p.y.batch) as usize,
                        counts: [rows, cols],
                        strides: [p.y.row as usize, p.y.inner as usize],
                    };
                    Ok(lab.compare_views(&[(&got, y)], &expected, tolerance))
                }))
                .collect()
        })
    })
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

fn norms(cases: &mut Vec<Case>) {
    let any = [(1, 1, 0), (3, 31, 7), (2, 63, 0), (5, 64, 8), (1, 65, 0), (7, 257, 3), (300, 24, 0)];
    let whole = [(1, 8, 0), (9, 32, 8), (2, 64, 0), (5, 1000, 264), (17, 264, 1032), (300, 24, 0), (3, 4096, 0)];
    for storage in Storage::ALL {
        for kind in [norm::Kind::Rms, norm::Kind::Layer] {
            for (index, sizes) in any.into_iter().enumerate() {
                // Odd cases read columns out of wider rows.
                let (offset, pitch) = if index % 2 == 1 { (3, 5) } else { (0, 0) };
                cases.push(norm_case(&norm::ROWS, sizes, (offset, pitch), kind, storage));
            }
            for (index, sizes) in whole.into_iter().enumerate() {
                let (offset, pitch) = if index % 2 == 1 { (8, 12) } else { (0, 0) };
                cases.push(norm_case(&norm::VEC4, sizes, (offset, pitch), kind, storage));
            }
        }
    }
}

fn norm_case(
    variant: &'static Variant<Norm>,
    (rows, width, second): (u32, u32, u32),
    (offset, more): (u32, u32),
    kind: norm::Kind,
    storage: Storage,
) -> Case {
    let whole = width + second;
    let pitch = whole + more;
    let problem = norm::Norm {
        rows,
        width,
        second,
        x_offset: offset,
        x_row: pitch,
        eps: 1e-6,
        kind,
        bias: kind == norm::Kind::Layer,
        storage,
    };
    let behind = if second > 0 { format!("+{second}") } else { String::new() };
    let id = format!("{kind:?}_{rows}x{width}{behind}/{}", storage.name());
    Case::new(variant.spec.name, id, move |lab| {
        let tolerance = Tolerance::sums(&[width.max(second) as usize]);
        every_tuning(variant.spec.tunings, tolerance, |tuning| {
            let mut random = Random::new(SEED);
            let mut values = random.values((offset + rows * pitch) as usize, 1.0);
            // A mean far from 0: E[x²] − mean² would lose digits here.
            values.iter_mut().for_each(|value| *value += 3.0);
            let x = lab.floats(&values)?;
            let (weight, w) = lab.stored(&random.values(whole as usize, 1.0), storage)?;
            let (bias, b) = lab.stored(&random.values(whole as usize, 1.0), storage)?;
            let y = lab.output((rows * whole) as usize)?;
            let args = norm::Args { x: &x.region, weight: &weight.region, bias: &bias.region, y: &y.region };
            lab.launch(|recording| recording.add_variant(variant, &problem, args, tuning))?;
            let mut expected = Vec::new();
            for row in 0..rows {
                for (first, width) in [(0, width as usize), (width as usize, second as usize)] {
                    let segment = &values[(offset + row * pitch) as usize + first..][..width];
                    let (dense, part) = (widen(segment), first..first + width);
                    expected.extend(match kind {
                        _ if width == 0 => Vec::new(),
                        norm::Kind::Rms => reference::rms_norm(&dense, Some(&w[part]), width, 1e-6),
                        norm::Kind::Layer => {
                            reference::layer_norm(&dense, Some(&w[part.clone()]), Some(&b[part]), width, 1e-6)
                        }
                    });
                }
            }
            Ok(vec![lab.compare(&y, &expected, tolerance)?])
        })
    })
}

fn gates(cases: &mut Vec<Case>) {
    let every = |rows, width| {
        let norms = move |activation| GateNorm::ALL.map(|norm| (activation, norm, rows, width));
        Activation::ALL.into_iter().flat_map(norms)
    };
    let normed = |(rows, width)| (Activation::Sigmoid, GateNorm::LayerNorm, rows, width);
    let any = [(1, 1), (3, 63), (2, 64), (1, 65), (4, 257), (130, 24)].map(normed);
    // The last has rows enough for several an invocation, and a rest.
    let whole = [(1, 8), (3, 64), (33, 1000), (4, 2056), (130, 24), (541, 16)].map(normed);
    for storage in Storage::ALL {
        for sizes in every(5, 33).chain(any) {
            cases.push(gate_case(&gate::ROWS, sizes, (2, 3), storage));
        }
        for sizes in every(35, 40).chain(whole) {
            cases.push(gate_case(&gate::VEC4, sizes, (4, 12), storage));
        }
    }
}

fn gate_case(
    variant: &'static Variant<Gate>,
    (activation, norm, rows, width): (Activation, GateNorm, u32, u32),
    (offset, more): (u32, u32),
    storage: Storage,
) -> Case {
    let id = format!("{activation:?}_{norm:?}_{rows}x{width}/{}", storage.name());
    Case::new(variant.spec.name, id, move |lab| {
        let tolerance = Tolerance::sums(&[width as usize, width as usize]);
        every_tuning(variant.spec.tunings, tolerance, |tuning| {
            let mut random = Random::new(SEED);
            let pitch = width + more;
            let x_values = random.values((offset + rows * pitch) as usize, 1.0);
            let mut g_values = random.values((rows * width) as usize, 1.0);
            // Where exponentials overflow and tanh saturates.
            let ends = [95.0, -95.0].into_iter().cycle();
            g_values.iter_mut().step_by(11).zip(ends).for_each(|(value, end)| *value = end);
            let (x, g) = (lab.floats(&x_values)?, lab.floats(&g_values)?);
            let (weight, w) = lab.stored(&random.values(width as usize, 1.0), storage)?;
            let (bias, b) = lab.stored(&random.values(width as usize, 1.0), storage)?;
            // Statistics land backwards and one row apart; the last row has none.
            let statistics_rows = rows + 2;
            let slot = |row: u32| if row + 1 == rows { u32::MAX } else { rows - row };
            let slots = lab.words(&(0..rows).map(slot).collect::<Vec<_>>())?;
            let y = lab.output((rows * width) as usize)?;
            let statistics = lab.output(2 * statistics_rows as usize)?;
            let problem = gate::Gate {
                rows,
                width,
                x_offset: offset,
                x_row: pitch,
                eps: 1e-5,
                activation,
                norm,
                statistics_rows,
                storage,
            };
            let args = gate::Args {
                x: &x.region,
                g: &g.region,
                weight: &weight.region,
                bias: &bias.region,
                slots: &slots.region,
                y: &y.region,
                statistics: &statistics.region,
            };
            lab.launch(|recording| recording.add_variant(variant, &problem, args, tuning))?;
            let row_of = |row: u32| &x_values[(offset + row * pitch) as usize..][..width as usize];
            let dense = widen(&(0..rows).flat_map(row_of).copied().collect::<Vec<_>>());
            let (weight, bias) = match norm {
                GateNorm::LayerNorm => (Some(&w[..]), Some(&b[..])),
                GateNorm::RmsNorm => (Some(&w[..]), None),
                GateNorm::None => (None, None),
            };
            let g = widen(&g_values);
            let expected = reference::gate(&dense, &g, activation, norm, weight, bias, width as usize, 1e-5);
            let mut all = vec![f64::NAN; 2 * statistics_rows as usize];
            for row in 0..rows.saturating_sub(1) {
                let at = 2 * slot(row) as usize;
                all[at..at + 2].copy_from_slice(&expected.statistics[row as usize]);
            }
            Ok(vec![lab.compare(&y, &expected.values, tolerance)?, lab.compare(&statistics, &all, tolerance)?])
        })
    })
}

fn ropes(cases: &mut Vec<Case>) {
    let yarn = RopeScaling::Yarn {
        factor: 40.0,
        original_max_position_embeddings: 64.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: Some(1.0),
        mscale_all_dim: Some(0.7),
        attention_factor: None,
    };
    let scalings = [("none", RopeScaling::None), ("linear", RopeScaling::Linear { factor: 4.0 }), ("yarn", yarn)];
    for (name, scaling) in scalings {
        for interleave in [true, false] {
            for (n_head, d_nope, d_rope) in [(1, 5, 2), (3, 0, 6), (9, 16, 64), (63, 1, 4)] {
                let id = format!("{name}_{}_h{n_head}_{d_nope}+{d_rope}", if interleave { "pairs" } else { "halves" });
                cases.push(Case::new("rope", id, move |lab| {
                    // cos and sin are given; the kernel's own error is that of two products and a sum.
                    let tolerance = Tolerance::sums(&[2]);
                    every_tuning(rope::PAIRS.spec.tunings, tolerance, |tuning| {
                        let mut random = Random::new(SEED);
                        // Position 0 hides a wrong pair layout; 70 and on are past the original length.
                        let positions = [0, 1, 7, 63, 64, 70, 4095];
                        let tokens = positions.len();
                        let d_head = d_nope + d_rope;
                        let values = random.values(tokens * n_head * d_head, 1.0);
                        let config = RopeConfig { theta: 10000.0, interleave, scaling };
                        let turns = reference::rotations(&config, d_rope, &positions);
                        let single: Vec<f32> = turns.iter().flatten().map(|&value| value as f32).collect();
                        let rotations = lab.floats(&single)?;
                        let out = lab.floats(&values)?;
                        let problem = rope::Rope {
                            tokens: tokens as u32,
                            n_head: n_head as u32,
                            d_rope: d_rope as u32,
                            offset: d_nope as u32,
                            token_stride: (n_head * d_head) as u32,
                            head_stride: d_head as u32,
                            interleave,
                        };
                        let args = rope::Args { rotations: &rotations.region, values: &out.region };
                        lab.launch(|recording| recording.add_variant(&rope::PAIRS, &problem, args, tuning))?;
                        let mut expected = widen(&values);
                        reference::rope(&mut expected, &turns, n_head, d_head, d_rope, interleave);
                        Ok(vec![lab.compare(&out, &expected, tolerance)?])
                    })
                }));
            }
        }
    }
}

fn elementwise(cases: &mut Vec<Case>) {
    for elements in [1, 63, 64, 65, 255, 257, 5000] {
        cases.push(Case::new("swiglu", elements, move |lab| {
            let tolerance = Tolerance::sums(&[1]);
            every_tuning(swiglu::ELEMENTS.spec.tunings, tolerance, |tuning| {
                let mut random = Random::new(SEED);
                let (a, b) = (random.values(elements, 3.0), random.values(elements, 1.0));
                let (gate, up, y) = (lab.floats(&a)?, lab.floats(&b)?, lab.output(elements)?);
                let args = swiglu::Args { gate: &gate.region, up: &up.region, y: &y.region };
                let problem = swiglu::Swiglu { elements: elements as u32 };
                lab.launch(|recording| recording.add_variant(&swiglu::ELEMENTS, &problem, args, tuning))?;
                Ok(vec![lab.compare(&y, &reference::swiglu(&widen(&a), &widen(&b)), tolerance)?])
            })
        }));
        cases.push(Case::new("residual_add", elements, move |lab| {
            let tolerance = Tolerance::sums(&[1]);
            every_tuning(residual_add::ELEMENTS.spec.tunings, tolerance, |tuning| {
                let mut random = Random::new(SEED);
                let (a, b) = (random.values(elements, 1.0), random.values(elements, 1.0));
                let (stream, delta) = (lab.floats(&a)?, lab.floats(&b)?);
                let args = residual_add::Args { delta: &delta.region, stream: &stream.region };
                let problem = residual_add::ResidualAdd { elements: elements as u32 };
                lab.launch(|recording| recording.add_variant(&residual_add::ELEMENTS, &problem, args, tuning))?;
                Ok(vec![lab.compare(&stream, &reference::residual_add(&widen(&a), &widen(&b)), tolerance)?])
            })
        }));
    }
}

/// Either kernel that multiplies matrices in registers.
fn products(
    lab: &Lab<'_>,
    variant: &'static Variant<RooflineCooperative>,
    groups: u32,
    iterations: u32,
) -> Result<Vec<super::Outcome>> {
    if let Some(outcomes) = skipped(&variant.spec, lab.kernels) {
        return Ok(outcomes);
    }
    let side = if variant.spec.cooperative == Cooperative::BY_16 { 16 } else { 8 };
    let problem = RooflineCooperative { groups, iterations, side };
    let (side, iterations) = (side as usize, iterations as usize);
    let tolerance = Tolerance::sums(&[iterations * side]);
    every_tuning(variant.spec.tunings, tolerance, |tuning| {
        let values = Random::new(SEED).values(roofline_cooperative::FACTORS as usize * side * side, 1.0);
        let written = groups as usize * roofline_cooperative::PRODUCTS as usize * side * side;
        let (x, y) = (lab.floats(&values)?, lab.output(written)?);
        let args = roofline_cooperative::Args { x: &x.region, y: &y.region };
        lab.launch(|recording| recording.add_variant(variant, &problem, args, tuning))?;
        let expected = reference::roofline_cooperative(&widen(&values), side, iterations);
        Ok(vec![lab.compare(&y, &expected.repeat(groups as usize), tolerance)?])
    })
}

fn rooflines(cases: &mut Vec<Case>) {
    // Vectors of four around the workgroups' 256 and 1024.
    for vectors in [1, 63, 255, 256, 257, 1023, 1025, 5000] {
        cases.push(Case::new("roofline_copy", 4 * vectors, move |lab| {
            every_tuning(roofline_copy::VECTORS.spec.tunings, Tolerance::EXACT, |tuning| {
                let values = Random::new(SEED).values(4 * vectors, 1.0);
                let (x, y) = (lab.floats(&values)?, lab.output(4 * vectors)?);
                let args = roofline_copy::Args { x: &x.region, y: &y.region };
                let problem = roofline_copy::RooflineCopy { words: 4 * vectors as u32 };
                lab.launch(|recording| recording.add_variant(&roofline_copy::VECTORS, &problem, args, tuning))?;
                Ok(vec![lab.compare(&y, &reference::roofline_copy(&widen(&values)), Tolerance::EXACT)?])
            })
        }));
    }
    for (groups, iterations) in [(1, 0), (1, 1), (3, 100), (70, 7)] {
        for variant in [&roofline_cooperative::BY_16, &roofline_cooperative::BY_8] {
            let id = format!("{groups}x{iterations}");
            cases.push(Case::new(variant.spec.name, id, move |lab| products(lab, variant, groups, iterations)));
        }
    }
    for (elements, iterations) in [(1, 0), (63, 1), (64, 2), (65, 3), (255, 100), (257, 7)] {
        cases.push(Case::new("roofline_fma", format!("{elements}x{iterations}"), move |lab| {
            // Steps shrink what came before by `a`, so rounding errors do not add up beyond a dozen terms.
            let tolerance = Tolerance::sums(&[12]);
            every_tuning(roofline_fma::ELEMENTS.spec.tunings, tolerance, |tuning| {
                let values = Random::new(SEED).values(elements, 1.0);
                let (x, y) = (lab.floats(&values)?, lab.output(elements)?);
                let args = roofline_fma::Args { x: &x.region, y: &y.region };
                let (a, b) = (0.75, 0.5);
                let problem = roofline_fma::RooflineFma { elements: elements as u32, iterations, a, b };
                lab.launch(|recording| recording.add_variant(&roofline_fma::ELEMENTS, &problem, args, tuning))?;
                let expected = reference::roofline_fma(&widen(&values), iterations as usize, a.into(), b.into());
                Ok(vec![lab.compare(&y, &expected, tolerance)?])
            })
        }));
    }
}

fn gathers(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (rows, width) in [(1, 1), (3, 7), (5, 64), (65, 33), (2, 257)] {
            cases.push(Case::new("gather", format!("{rows}x{width}/{}", storage.name()), move |lab| {
                every_tuning(gather::ELEMENTS.spec.tunings, Tolerance::EXACT, |tuning| {
                    let mut random = Random::new(SEED);
                    let vocab_size = 19;
                    let (table, mut kept) = lab.stored(&random.values((vocab_size * width) as usize, 1.0), storage)?;
                    let mut id_values = random.ids(rows as usize, vocab_size);
                    // The last row of the table, where an odd f16 count leaves half a word, and a row of zeros.
                    id_values[0] = vocab_size - 1;
                    if rows > 1 {
                        id_values[1] = u32::MAX;
                    }
                    let ids = lab.words(&id_values)?;
                    let y = lab.output((rows * width) as usize)?;
                    let problem = gather::Gather { rows, width, table_row: width, vocab_size, storage };
                    let args = gather::Args { table: &table.region, ids: &ids.region, y: &y.region };
                    lab.launch(|recording| recording.add_variant(&gather::ELEMENTS, &problem, args, tuning))?;
                    kept.resize(kept.len() + width as usize, 0.0);
                    let known: Vec<u32> = id_values.iter().map(|&id| id.min(vocab_size)).collect();
                    let expected = reference::gather(&kept, width as usize, &known);
                    Ok(vec![lab.compare(&y, &expected, Tolerance::EXACT)?])
                })
            }));
        }
    }
}

/// What stands behind the last element of a cache row here. `cache_append` writes zeros there; that nothing but zeros of a query
/// or of a weight meets them, whatever finite number they are, is what the kernels promise.
const HOSTILE_PADDING: f32 = 65_504.0;

/// Rows of a cache, spread to their pitch, as the device stores them; the padding is hostile, other rows are NaN.
fn cache_rows(values: &[f32], width: u32, rows: &[u32], cache_rows: u32, storage: Storage) -> Vec<u32> {
    let row_words = row_words(width, storage);
    let poison = match storage {
        Storage::F32 => super::guarded::POISON,
        Storage::F16 => 0x7ead_7ead,
    };
    let mut words = vec![poison; cache_rows as usize * row_words];
    for (index, &row) in rows.iter().enumerate() {
        let mut padded = values[index * width as usize..][..width as usize].to_vec();
        padded.resize(storage.row_pitch(width) as usize, HOSTILE_PADDING);
        words[row as usize * row_words..][..row_words].copy_from_slice(&super::pack(&padded, storage).0);
    }
    words
}

fn row_words(width: u32, storage: Storage) -> usize {
    (u64::from(storage.row_pitch(width)) * storage.bytes() / 4) as usize
}

/// Rows of a cache as they lie on the device from a word on: padding left out.
fn unpack(first_word: usize, rows: u32, width: u32, storage: Storage) -> View {
    let reading = match storage {
        Storage::F32 => Reading::F32,
        Storage::F16 => Reading::F16,
    };
    View {
        reading,
        first: first_word * 4 / storage.bytes() as usize,
        counts: [rows as usize, width as usize],
        strides: [storage.row_pitch(width) as usize, 1],
    }
}

fn caches(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (d_latent, d_rope, with_ids) in [(1, 0, true), (5, 2, false), (32, 16, true), (63, 6, true), (8, 64, false)]
        {
            let id = format!("{d_latent}+{d_rope}/{}", storage.name());
            // Odd widths as they are, the others rotated in the one way or the other.
            let interleave = if d_rope % 2 == 1 { None } else { Some(d_latent % 2 == 1) };
            let sizes = (d_latent, d_rope, 1);
            cases.push(Case::new("cache_append", id.clone(), move |lab| {
                append(lab, &cache_append::ELEMENTS, sizes, interleave, storage)
            }));
            cases.push(Case::new("cache_read", id, move |lab| read(lab, d_latent, with_ids, storage)));
        }
    }
    for storage in Storage::ALL {
        for (d_latent, d_rope, interleave) in [
            (8, 0, Some(true)),
            (16, 8, None),
            (8, 16, Some(false)),
            (72, 24, Some(true)),
            (512, 64, Some(true)),
            (32, 80, Some(false)),
        ] {
            let pairs = match interleave {
                None => "as_they_are",
                Some(true) => "neighbours",
                Some(false) => "halves",
            };
            let (id, sizes) = (format!("{d_latent}+{d_rope}_{pairs}/{}", storage.name()), (d_latent, d_rope, 4));
            cases.push(Case::new("cache_append_vec4", id, move |lab| {
                append(lab, &cache_append::VEC4, sizes, interleave, storage)
            }));
        }
    }
    for variant in [&cache_append::ELEMENTS, &cache_append::VEC4] {
        cases.push(Case::new(variant.spec.name, "rounding/f16", move |lab| halves(lab, variant)));
    }
    for (words, from_word, to_word) in [(1, 0, 1), (64, 100, 0), (257, 3, 300), (0, 5, 5)] {
        cases.push(Case::new("cache_copy", format!("{words}_{from_word}_to_{to_word}"), move |lab| {
            every_tuning(cache_copy::ELEMENTS.spec.tunings, Tolerance::EXACT, |tuning| {
                let values = Random::new(SEED).values(600, 1.0);
                let cache = lab.floats(&values)?;
                let problem = cache_copy::CacheCopy { words, from_word, to_word };
                lab.launch(|recording| {
                    recording.add_variant(
                        &cache_copy::ELEMENTS,
                        &problem,
                        cache_copy::Args { cache: &cache.region },
                        tuning,
                    )
                })?;
                let mut expected = widen(&values);
                reference::cache_copy(&mut expected, 1, from_word as usize, to_word as usize, words as usize);
                Ok(vec![lab.compare(&cache, &expected, Tolerance::EXACT)?])
            })
        }));
    }
}

/// `step` elements stand between rows, and words before the rotary keys of the cache.
fn append(
    lab: &Lab<'_>,
    variant: &'static Variant<CacheAppend>,
    (d_latent, d_rope, step): (u32, u32, u32),
    interleave: Option<bool>,
    storage: Storage,
) -> Result<Vec<super::Outcome>> {
    // WGSL does not say how pack2x16float rounds: a unit in the last place of f16 is 2^-10.
    // The rotation's own error in f32 is that of two products and a sum.
    let tolerance = match storage {
        Storage::F32 => Tolerance::sums(&[2]),
        Storage::F16 => Tolerance { relative: 2f64.powi(-10) },
    };
    every_tuning(variant.spec.tunings, tolerance, |tuning| {
        let mut random = Random::new(SEED);
        let slots = [4, 0, 6, 1, 9];
        let tokens = slots.len() as u32;
        let cached = 11;
        let row = d_latent + d_rope + step;
        let mut values = random.values((tokens * row) as usize, 1.0);
        // Beyond f16: stored as its largest value.
        values[0] = 1e6;
        // What is not a number stays so: a clamp would hide it.
        values[((tokens - 1) * row) as usize] = f32::NAN;
        let source = lab.floats(&values)?;
        let slot_words = lab.words(&slots)?;
        let turns = reference::rotations(&RopeConfig::default(), d_rope as usize, &[3, 0, 70, 1, 4000]);
        // Some more where there is none: a binding holds something.
        let turns_f32 = turns.iter().flatten().map(|&value| value as f32).chain([0.0; 4]);
        let rotations = lab.floats(&turns_f32.collect::<Vec<_>>())?;
        // Heads of queries, each behind a content part, in rows that stand apart.
        let (n_head, d_nope) = (3, 2 * step);
        let queries = cache_append::Queries {
            n_head,
            offset: step + d_nope,
            row: n_head * (d_nope + d_rope) + step,
            head: d_nope + d_rope,
        };
        let q_values = random.values((step + tokens * queries.row) as usize, 1.0);
        let q = lab.floats(&q_values)?;
        // The rotary keys begin a little behind the latents.
        let [latent_words, rope_words] = [d_latent, d_rope].map(|width| cached as usize * row_words(width, storage));
        let rope_word = latent_words + 4 - step as usize % 4;
        let cache = Guarded::poisoned_as(lab.kernels, "cache", rope_word + rope_words, storage)?;
        let problem = cache_append::CacheAppend {
            tokens,
            cache_rows: cached,
            d_latent,
            latent_offset: 0,
            latent_row: row,
            d_rope,
            rope_offset: d_latent,
            rope_row: row,
            interleave,
            queries,
            rope_byte: 4 * rope_word as u64,
            storage,
        };
        let args = cache_append::Args {
            latent: &source.region,
            rope_key: &source.region,
            rotations: &rotations.region,
            slots: &slot_words.region,
            cache: &cache.region,
            q: &q.region,
        };
        lab.launch(|recording| recording.add_variant(variant, &problem, args, tuning))?;
        let mut comparisons = Vec::new();
        let words = lab.read(&cache)?;
        for (first_word, first, width) in [(0, 0, d_latent), (rope_word, d_latent, d_rope)] {
            let got = unpack(first_word, cached, width, storage);
            let largest = match storage {
                Storage::F32 => f32::MAX,
                Storage::F16 => 65504.0,
            };
            let mut new: Vec<f64> = (0..tokens)
                .flat_map(|token| values[(token * row + first) as usize..][..width as usize].to_vec())
                .map(|value| value.clamp(-largest, largest).into())
                .collect();
            if let (Some(interleave), true) = (interleave, first > 0) {
                reference::rope(&mut new, &turns, 1, d_rope as usize, d_rope as usize, interleave);
            }
            let mut expected = vec![f64::NAN; (cached * width) as usize];
            reference::cache_append(&mut expected, &new, width as usize, &slots);
            comparisons.push(lab.compare_views(&[(&words, got)], &expected, tolerance));
            // What kernels multiply by zero must be a number: it was none before.
            let padding = padding_of(first_word, cached, width, storage);
            let [_, elements] = padding.counts;
            if elements > 0 {
                let mut zeros = vec![f64::NAN; cached as usize * elements];
                reference::cache_append(&mut zeros, &vec![0.0; slots.len() * elements], elements, &slots);
                comparisons.push(lab.compare_views(&[(&words, padding)], &zeros, Tolerance::EXACT));
            }
        }
        let mut expected = widen(&q_values);
        if let Some(interleave) = interleave {
            for (token, turn) in turns.chunks((d_rope as usize / 2).max(1)).enumerate().take(tokens as usize) {
                for head in 0..n_head as usize {
                    let at = queries.offset as usize + token * queries.row as usize + head * queries.head as usize;
                    let part = &mut expected[at..at + d_rope as usize];
                    reference::rope(part, turn, 1, d_rope as usize, d_rope as usize, interleave);
                }
            }
        }
        // Without anything to rotate the queries are not bound.
        if problem.bytes().q > 0 {
            comparisons.push(lab.compare(&q, &expected, Tolerance::sums(&[2]))?);
        }
        Ok(comparisons)
    })
}

/// How latents become halves: where a value lies between two, one of them is right. Integers round as IEEE 754 does, to the
/// nearest and of two to the even one; `pack2x16float` rounds as the driver does, and may take numbers below 2^-14 for 0.
fn halves(lab: &Lab<'_>, variant: &'static Variant<CacheAppend>) -> Result<Vec<super::Outcome>> {
    if lab.capture.is_some() {
        return Ok(vec![not_run("two answers are right, which a table of expected values does not say".to_owned())]);
    }
    let integers =
        variant.spec.name == cache_append::VEC4.spec.name && lab.kernels.context().class == AdapterClass::Software;
    let mut values = Vec::new();
    // Both neighbours, the tie and what lies beside it, in every binade from the smallest half to the largest.
    for exponent in -25..16 {
        let place = 2f32.powi((exponent - 10).max(-24));
        for step in [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 1022.5, 1023.5] {
            values.extend([1.0, -1.0].map(|sign| sign * (2f32.powi(exponent) + step * place)));
        }
    }
    // 65519.996 is the last that IEEE 754 rounds to 65504; what is beyond is stored so all the same.
    let ends = [0.0, -0.0, f32::MIN_POSITIVE, 1e-40, 65_504.0, 65_519.996, 65_520.0, 1e6, f32::MAX];
    values.extend(ends.iter().flat_map(|&end| [end, -end]));
    values.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN]);
    values.resize(values.len().next_multiple_of(8), 0.0);
    every_tuning(variant.spec.tunings, Tolerance::EXACT, |tuning| {
        let width = values.len() as u32;
        let source = lab.floats(&values)?;
        let (slots, nothing) = (lab.words(&[0])?, lab.floats(&[0.0; 4])?);
        let cache = Guarded::poisoned_as(lab.kernels, "cache", values.len() / 2 + 4, Storage::F16)?;
        let problem = cache_append::CacheAppend {
            tokens: 1,
            cache_rows: 1,
            d_latent: width,
            latent_offset: 0,
            latent_row: width,
            d_rope: 0,
            rope_offset: 0,
            rope_row: 4,
            interleave: None,
            queries: cache_append::Queries::default(),
            rope_byte: 2 * u64::from(width),
            storage: Storage::F16,
        };
        let args = cache_append::Args {
            latent: &source.region,
            rope_key: &nothing.region,
            rotations: &nothing.region,
            slots: &slots.region,
            cache: &cache.region,
            q: &lab.floats(&[0.0; 4])?.region,
        };
        lab.launch(|recording| recording.add_variant(variant, &problem, args, tuning))?;
        let got = unpack(0, 1, width, Storage::F16).apply(&lab.read(&cache)?.words);
        let right = |(&value, &got): (&f32, &f32)| {
            let bounded = if value.is_finite() { value.clamp(-65_504.0, 65_504.0) } else { value };
            let nearest = half::f16::from_f32(bounded);
            if integers || !value.is_finite() {
                return nearest.to_f32() == got && value.is_sign_negative() == got.is_sign_negative()
                    || value.is_nan() && got.is_nan();
            }
            // One of the two halves around it.
            let place = 2f32.powi((bounded.abs().log2().floor() as i32).saturating_sub(10).max(-24));
            (got - bounded).abs() < place || bounded.abs() < 2f32.powi(-14) && got == 0.0
        };
        let wrong: Vec<_> = values.iter().zip(&got).filter(|&pair| !right(pair)).collect();
        let verdict = match wrong.first() {
            None => Ok(()),
            Some((value, got)) => Err(format!("{value:e} became {got:e} ({} such)", wrong.len())),
        };
        Ok(vec![Comparison { relative_error: 0.0, verdict }])
    })
}

/// What stands behind the last element of each row.
fn padding_of(first_word: usize, rows: u32, width: u32, storage: Storage) -> View {
    let values = unpack(first_word, rows, width, storage);
    let padding = values.strides[0] - width as usize;
    View { first: values.first + width as usize, counts: [rows as usize, padding], ..values }
}

fn read(lab: &Lab<'_>, d_latent: u32, with_ids: bool, storage: Storage) -> Result<Vec<super::Outcome>> {
    every_tuning(cache_read::ELEMENTS.spec.tunings, Tolerance::EXACT, |tuning| {
        let mut random = Random::new(SEED);
        let batch = Batch::new(&[(0, 3), (0, 1), (0, SPLIT + 2)], 40);
        let slots = batch.slots();
        let (rounded, kept) = {
            let values = random.values(slots.len() * d_latent as usize, 1.0);
            (values.clone(), super::pack(&values, storage).1)
        };
        let latent_cache = lab.words(&cache_rows(&rounded, d_latent, &slots, batch.cache_rows, storage))?;
        // In the other storage, rows padded.
        let (d_gate, vocab) = (5, 40);
        let table_storage = if storage == Storage::F32 { Storage::F16 } else { Storage::F32 };
        let embeddings = random.values((vocab * d_gate) as usize, 1.0);
        let every: Vec<u32> = (0..vocab).collect();
        let gate_embedding = lab.words(&cache_rows(&embeddings, d_gate, &every, vocab, table_storage))?;
        let embeddings = super::pack(&embeddings, table_storage).1;
        let ids = random.ids(batch.cache_rows as usize, vocab);
        let id_cache = lab.words(&ids)?;
        let sequences = lab.words(bytemuck::cast_slice(&batch.sequences))?;
        // A tile that begins inside the first sequence's padding and ends inside the last's.
        let (first_row, rows) = (2, batch.rows - 5);
        let latent = lab.output((rows * d_latent) as usize)?;
        let (embedding, slot_out) = (lab.output((rows * d_gate) as usize)?, lab.output(rows as usize)?);
        let problem = cache_read::CacheRead {
            first_row,
            rows,
            cache_rows: batch.cache_rows,
            d_latent,
            n_sequence: batch.sequences.len() as u32,
            table: with_ids.then_some(cache_read::Table { d_gate, vocab_size: vocab, storage: table_storage }),
            storage,
        };
        let args = cache_read::Args {
            latent_cache: &latent_cache.region,
            id_cache: &id_cache.region,
            sequences: &sequences.region,
            gate_embedding: &gate_embedding.region,
            latent: &latent.region,
            embedding: &embedding.region,
            slots: &slot_out.region,
        };
        lab.launch(|recording| recording.add_variant(&cache_read::ELEMENTS, &problem, args, tuning))?;
        // Every row of the tile: its place among the valid rows, if it is one.
        let place: Vec<Option<usize>> = (first_row..first_row + rows).map(|row| batch.place(row)).collect();
        let row_slots: Vec<u32> = place.iter().map(|place| place.map_or(u32::MAX, |place| slots[place])).collect();
        let expected: Vec<f64> = place
            .iter()
            .flat_map(|place| match place {
                Some(place) => reference::cache_read(&kept, d_latent as usize, &[*place as u32]),
                None => vec![0.0; d_latent as usize],
            })
            .collect();
        let mut comparisons =
            vec![lab.compare(&latent, &expected, Tolerance::EXACT)?, compare_numbers(lab, &slot_out, &row_slots)?];
        if with_ids {
            let embedding_of = |&slot: &u32| match slot {
                u32::MAX => vec![0.0; d_gate as usize],
                slot => reference::gather(&embeddings, d_gate as usize, &[ids[slot as usize]]),
            };
            let expected: Vec<f64> = row_slots.iter().flat_map(embedding_of).collect();
            comparisons.push(lab.compare(&embedding, &expected, Tolerance::EXACT)?);
        }
        Ok(comparisons)
    })
}

/// Whole numbers, rounded to f32 on both sides.
fn compare_numbers(lab: &Lab<'_>, got: &Guarded, expected: &[u32]) -> Result<Comparison> {
    let got = lab.read(got)?;
    let expected: Vec<f64> = expected.iter().map(|&word| f64::from(word as f32)).collect();
    Ok(lab.compare_views(&[(&got, View::all(Reading::U32, got.words.len()))], &expected, Tolerance::EXACT))
}

/// Sequences of (cached before, new) tokens, in the step's row numbering.
struct Batch {
    sequences: Vec<SequenceRow>,
    counts: Vec<u32>,
    cache_rows: u32,
    rows: u32,
    tokens: u32,
}

impl Batch {
    /// `slack` cache rows stay unused after each sequence.
    fn new(lengths: &[(u32, u32)], slack: u32) -> Self {
        let (mut first_row, mut first_slot, mut token) = (0, slack, 0);
        let mut sequences = Vec::new();
        for &(before, new) in lengths {
            let length = before + new;
            sequences.push(SequenceRow { first_row, first_slot, length, token });
            first_row += length.next_multiple_of(SPLIT);
            first_slot += length + slack;
            token += new;
        }
        let counts = lengths.iter().map(|&(_, new)| new).collect();
        Batch { sequences, counts, cache_rows: first_slot, rows: first_row, tokens: token }
    }

    /// Cache rows of all valid positions, sequence after sequence.
    fn slots(&self) -> Vec<u32> {
        self.sequences.iter().flat_map(|s| s.first_slot..s.first_slot + s.length).collect()
    }

    /// Places of a sequence's positions in the list of valid rows.
    fn places(&self, sequence: usize) -> Range<usize> {
        let before: u32 = self.sequences[..sequence].iter().map(|s| s.length).sum();
        before as usize..(before + self.sequences[sequence].length) as usize
    }

    /// Place of a row of the step's numbering in the list of valid rows.
    fn place(&self, row: u32) -> Option<usize> {
        (0..self.sequences.len()).find_map(|index| {
            let sequence = &self.sequences[index];
            let position = row.checked_sub(sequence.first_row).filter(|&position| position < sequence.length)?;
            Some(self.places(index).start + position as usize)
        })
    }

    /// What each new token attends to, as places.
    fn visible(&self) -> Vec<Range<usize>> {
        (0..self.sequences.len())
            .flat_map(|index| {
                let places = self.places(index);
                let first = places.end - self.counts[index] as usize;
                (first..places.end).map(move |own| places.start..own + 1)
            })
            .collect()
    }

    fn query_tiles(&self, tile_q: u32) -> Vec<QueryTile> {
        (0..self.sequences.len())
            .flat_map(|index| {
                let (sequence, count) = (self.sequences[index], self.counts[index]);
                (0..count).step_by(tile_q as usize).map(move |start| QueryTile {
                    first_token: sequence.token + start,
                    count: tile_q.min(count - start),
                    position: sequence.length - count + start,
                    sequence: index as u32,
                })
            })
            .collect()
    }

    /// Rows [first, first + rows) of a tile of width `width`, from values of the valid rows; padding rows are NaN.
    fn tile(&self, values: &[f32], width: usize, first: u32, rows: u32) -> Vec<f32> {
        (first..first + rows)
            .flat_map(|row| match self.place(row) {
                Some(place) => values[place * width..][..width].to_vec(),
                None => vec![f32::NAN; width],
            })
            .collect()
    }
}

/// Heads, content, rotary and value widths.
type Widths = (usize, usize, usize, usize);

fn prefills(cases: &mut Vec<Case>) {
    const SEQUENCES: [(&str, &[(u32, u32)]); 6] = [
        ("t1", &[(0, 1)]),
        ("t33", &[(0, 33)]),
        ("ragged", &[(0, 1), (0, 31), (0, 17), (0, 65)]),
        ("chunk", &[(40, 9), (0, 5), (300, 18)]),
        ("t300", &[(0, 300)]),
        ("tiles", &[(0, 7), (0, 8), (0, 15), (0, 16), (3, 32), (0, 63), (1, 64)]),
    ];
    let mut add =
        |variant: &'static Variant<AttentionPrefill>, names: &[&str], widths: Widths, storages: &[Storage]| {
            let (n_head, d_nope, d_rope, d_value) = widths;
            for (name, lengths) in SEQUENCES.into_iter().filter(|(name, _)| names.contains(name)) {
                for &storage in storages {
                    let id = format!("{name}_h{n_head}_{d_nope}+{d_rope}_v{d_value}/{}", storage.name());
                    cases.push(Case::new(variant.spec.name, id, move |lab| {
                        prefill(lab, variant, lengths, widths, storage, Extreme::Plain, false)
                    }));
                }
            }
        };
    let every = SEQUENCES.map(|(name, _)| name);
    for variant in [&attention_prefill::TILES, &attention_prefill::SUBGROUP] {
        // Every width meets the chunk, every sequence the plain width; the rest would repeat both.
        add(variant, &every, (3, 16, 8, 16), &Storage::ALL);
        for widths in [(1, 8, 4, 8), (9, 4, 12, 32), (2, 0, 8, 16), (63, 4, 4, 4)] {
            add(variant, &["chunk"], widths, &Storage::ALL);
        }
        // Two to eight fours of value columns a lane, then a second slice; rows longer than a chunk.
        for widths in [(1, 36, 0, 36), (2, 64, 32, 80), (1, 128, 64, 128), (3, 8, 4, 132)] {
            add(variant, &["chunk", "ragged"], widths, &[Storage::F32]);
        }
    }
    add(&attention_prefill::ROWS, &["chunk"], (9, 5, 2, 7), &Storage::ALL);
    add(&attention_prefill::ROWS, &every, (3, 5, 6, 7), &Storage::ALL);
    for widths in [(1, 8, 4, 8), (1, 16, 0, 33), (2, 0, 6, 16), (63, 3, 2, 1), (2, 3, 2, 129)] {
        add(&attention_prefill::ROWS, &["chunk"], widths, &Storage::ALL);
    }
    for variant in [&attention_prefill::COOPERATIVE, &attention_prefill::COOPERATIVE_8] {
        // Wide values and narrow ones, one and several chunks of queries and keys, a second slice.
        add(variant, &every, (3, 16, 8, 16), &[Storage::F16]);
        for widths in [(9, 4, 12, 32), (2, 0, 8, 68), (1, 60, 0, 64), (1, 128, 64, 128), (3, 8, 4, 132)] {
            add(variant, &["chunk", "ragged"], widths, &[Storage::F16]);
        }
    }
    for (variant, widths, storage) in [
        (&attention_prefill::TILES, (2, 16, 8, 16), Storage::F32),
        (&attention_prefill::ROWS, (2, 15, 6, 15), Storage::F32),
        (&attention_prefill::SUBGROUP, (2, 16, 8, 16), Storage::F32),
        (&attention_prefill::COOPERATIVE, (2, 16, 8, 16), Storage::F16),
        (&attention_prefill::COOPERATIVE_8, (2, 16, 8, 16), Storage::F16),
    ] {
        let id = |what: &str| format!("{what}/{}", storage.name());
        for extreme in Extreme::ALL {
            // Queries are scaled before they are halves, where these are 0 or have few digits left.
            let halves = variant.spec.cooperative != Cooperative::NONE;
            if halves && matches!(extreme, Extreme::Denormals | Extreme::Largest) {
                continue;
            }
            cases.push(Case::new(variant.spec.name, id(extreme.name()), move |lab| {
                prefill(lab, variant, &[(0, 40), (70, 1)], widths, storage, extreme, false)
            }));
        }
        cases.push(Case::new(variant.spec.name, id("first_has_no_keys"), move |lab| {
            prefill(lab, variant, &[(0, 5), (0, 9)], widths, storage, Extreme::Plain, true)
        }));
    }
}

/// Inputs at the ends of what attention may meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extreme {
    /// None of it.
    Plain,
    /// Scores of ±1e4 before the softmax: one key takes everything, nothing overflows.
    HugeScores,
    /// Every score is 0: every key has the same weight.
    EqualScores,
    /// One key's score is a thousand times the others'.
    OneKey,
    /// Queries below the smallest normal f32, every other element of the keys below the smallest normal number of the storage.
    Denormals,
    /// Every element of keys and values is ±65504.
    Largest,
}

impl Extreme {
    const ALL: [Extreme; 5] =
        [Extreme::HugeScores, Extreme::EqualScores, Extreme::OneKey, Extreme::Denormals, Extreme::Largest];

    fn name(self) -> &'static str {
        match self {
            Extreme::Plain => "plain",
            Extreme::HugeScores => "huge_scores",
            Extreme::EqualScores => "equal_scores",
            Extreme::OneKey => "one_key",
            Extreme::Denormals => "denormals",
            Extreme::Largest => "f16_largest",
        }
    }

    /// Size of the scores, for the tolerance.
    fn spread(self) -> f64 {
        match self {
            Extreme::HugeScores => 1e4,
            Extreme::OneKey => 1e3,
            Extreme::Plain | Extreme::EqualScores | Extreme::Denormals | Extreme::Largest => 1.0,
        }
    }

    fn of_queries(self, values: &mut [f32]) {
        let scale = |values: &mut [f32], by: f32| values.iter_mut().for_each(|value| *value *= by);
        match self {
            Extreme::Plain | Extreme::OneKey => {}
            Extreme::HugeScores => scale(values, 1e4),
            Extreme::EqualScores => values.fill(0.0),
            // No score reaches the smallest normal number, so 0 is right wherever queries are flushed.
            Extreme::Denormals => scale(values, 8e-40),
            // Against keys of this size scores of order 1.
            Extreme::Largest => scale(values, 1.0 / 65_504.0),
        }
    }

    /// `width` values a row.
    fn of_keys(self, values: &mut [f32], width: usize, storage: Storage) {
        match self {
            Extreme::Plain | Extreme::HugeScores | Extreme::EqualScores => {}
            Extreme::OneKey => {
                let middle = values.len() / width.max(1) / 2 * width;
                values[middle..].iter_mut().take(width).for_each(|value| *value *= 1e3);
            }
            Extreme::Denormals => {
                // A tenth of the smallest normal number.
                let tiny = match storage {
                    Storage::F32 => f32::MIN_POSITIVE / 10.0,
                    Storage::F16 => 6e-6,
                };
                values.iter_mut().step_by(2).for_each(|value| *value *= tiny);
            }
            Extreme::Largest => values.iter_mut().for_each(|value| *value = 65_504f32.copysign(*value)),
        }
    }
}

/// Scores of size `spread` carry absolute errors of spread · u · √d: those are relative errors of their exponentials.
fn attention_tolerance(d_query: usize, keys: usize, spread: f64) -> Tolerance {
    let plain = Tolerance::sums(&[d_query, keys]);
    if spread <= 1.0 {
        return plain;
    }
    Tolerance { relative: plain.relative + 4.0 * UNIT_ROUNDOFF * spread * ((d_query as f64).sqrt() + 8.0) }
}

fn prefill(
    lab: &Lab<'_>,
    variant: &'static Variant<AttentionPrefill>,
    lengths: &[(u32, u32)],
    (n_head, d_nope, d_rope, d_value): Widths,
    storage: Storage,
    extreme: Extreme,
    first_has_no_keys: bool,
) -> Result<Vec<super::Outcome>> {
    if let Some(outcomes) = skipped(&variant.spec, lab.kernels) {
        return Ok(outcomes);
    }
    let batch = Batch::new(lengths, 3);
    let slots = batch.slots();
    let (mut table, mut visible) = (batch.sequences.clone(), batch.visible());
    if first_has_no_keys {
        table[0].length = 0;
        visible[..batch.counts[0] as usize].fill(0..0);
    }
    let (d_query, d_kv) = (d_nope + d_rope, n_head * (d_nope + d_value));
    let of_scores = attention_tolerance(d_query, slots.len(), extreme.spread());
    // The reference rounds what the kernel rounds, but for the weights: each is off by at most 2⁻¹¹ of itself, and so are,
    // as errors of random signs, their sums. The scores alone make lse.
    let halves = variant.spec.cooperative != Cooperative::NONE;
    let tolerance = if halves { Tolerance { relative: of_scores.relative + HALF_ROUNDOFF } } else { of_scores };
    let auto = tile_q(lab.kernels.context());
    // Settings go by the query tile, but for the kernel that has settings of its own.
    let by_tile = variant.spec.name != attention_prefill::SUBGROUP.spec.name;
    let settings = if by_tile { QUERY_TILES.len() } else { variant.spec.tunings };
    every_tuning(settings, tolerance, |setting| {
        let (tile_q, tuning) = match setting {
            Tuning::Forced(index) if by_tile => (QUERY_TILES[index], Tuning::Auto),
            other => (auto, other),
        };
        let mut random = Random::new(SEED);
        let mut q_values = random.values(batch.tokens as usize * n_head * d_query, 1.0);
        let mut kv_values = random.values(slots.len() * d_kv, 1.0);
        let mut rope_values = random.values(slots.len() * d_rope, 1.0);
        extreme.of_queries(&mut q_values);
        extreme.of_keys(&mut kv_values, d_kv, Storage::F32);
        extreme.of_keys(&mut rope_values, d_rope, storage);
        let rope_kept = super::pack(&rope_values, storage).1;
        let q = lab.floats(&q_values)?;
        let rope_words = cache_rows(&rope_values, d_rope as u32, &slots, batch.cache_rows, storage);
        // A binding holds 16 bytes, also without a rotary part.
        let rope_cache = lab.words(&[&rope_words[..], &[0; 4]].concat())?;
        let sequences = lab.words(bytemuck::cast_slice(&table))?;
        let tiles = batch.query_tiles(tile_q);
        let queries = lab.words(bytemuck::cast_slice(&tiles))?;
        let slices = attention_prefill::slices(d_value as u32) as usize;
        let values = lab.output(batch.tokens as usize * n_head * d_value)?;
        let softmax = lab.output(batch.tokens as usize * n_head * slices * 2)?;
        let scale = (d_query as f32).sqrt().recip();
        // Key tiles of 1.5 splits: the last one is shorter.
        let tile_rows = SPLIT + SPLIT / 2;
        let kv_tiles = (0..batch.rows)
            .step_by(tile_rows as usize)
            .map(|first| {
                let rows = tile_rows.min(batch.rows - first);
                Ok((first, rows, lab.floats(&batch.tile(&kv_values, d_kv, first, rows))?))
            })
            .collect::<Result<Vec<_>>>()?;
        lab.launch(|recording| {
            for (first, rows, kv) in &kv_tiles {
                let problem = attention_prefill::AttentionPrefill {
                    tokens: batch.tokens,
                    query_tiles: tiles.len() as u32,
                    tile_q,
                    n_sequence: batch.sequences.len() as u32,
                    n_head: n_head as u32,
                    d_nope: d_nope as u32,
                    d_rope: d_rope as u32,
                    d_value: d_value as u32,
                    kv_first: *first,
                    kv_rows: *rows,
                    cache_rows: batch.cache_rows,
                    first: *first == 0,
                    last: first + rows == batch.rows,
                    scale,
                    weights: storage,
                    storage,
                };
                let args = attention_prefill::Args {
                    q: &q.region,
                    kv: &kv.region,
                    rope_cache: &rope_cache.region,
                    queries: &queries.region,
                    sequences: &sequences.region,
                    values: &values.region,
                    softmax: &softmax.region,
                };
                recording.add_variant(variant, &problem, args, tuning)?;
            }
            Ok(())
        })?;
        let heads = reference::Heads { n_head, d_nope, d_rope, d_value };
        let attend = if halves { reference::attention_prefill_of_halves } else { reference::attention_prefill };
        let expected = attend(&widen(&q_values), &widen(&kv_values), &rope_kept, &visible, heads, scale.into());
        let state = lab.read(&softmax)?;
        let counts = [batch.tokens as usize * n_head, 1];
        let lse = View { reading: Reading::LogSumExp, first: 0, counts, strides: [2 * slices, 1] };
        let values = lab.compare(&values, &expected.values, tolerance)?;
        Ok(vec![values, lab.compare_views(&[(&state, lse)], &expected.lse, of_scores)])
    })
}

const DECODE: [&Variant<AttentionDecode>; 2] = [&attention_decode::PLAIN, &attention_decode::VEC4];

const ABSORBED: [&Variant<AttentionAbsorbed>; 3] =
    [&attention_absorbed::PLAIN, &attention_absorbed::STREAM, &attention_absorbed::SUBGROUP];

fn decodes(cases: &mut Vec<Case>) {
    let lengths: [(&str, &[u32]); 4] =
        [("t1", &[1]), ("t257", &[257]), ("ragged", &[255, 1, 256, 300]), ("t1030", &[1030])];
    let widths: [Widths; 6] =
        [(1, 8, 4, 8), (3, 16, 8, 16), (9, 5, 2, 7), (2, 64, 32, 80), (5, 16, 0, 33), (63, 3, 2, 1)];
    for storage in Storage::ALL {
        for (index, &widths) in widths.iter().enumerate() {
            for (name, lengths) in lengths {
                if index != 1 && name != "ragged" {
                    continue;
                }
                let (n_head, d_nope, d_rope, d_value) = widths;
                let id = format!("{name}_h{n_head}_{d_nope}+{d_rope}_v{d_value}/{}", storage.name());
                for variant in DECODE {
                    // Rebuilt keys and values are f32, cached ones either.
                    for kv_storage in Storage::ALL {
                        if decode_takes(variant, widths, storage, kv_storage) {
                            let id = format!("{id}_kv_{}", kv_storage.name());
                            cases.push(Case::new(variant.spec.name, id, move |lab| {
                                decode(lab, variant, lengths, 1, widths, (storage, kv_storage), Extreme::Plain)
                            }));
                        }
                    }
                }
                let id = format!("{name}_h{n_head}_r{d_value}+{d_rope}/{}", storage.name());
                for variant in ABSORBED.into_iter().filter(|variant| absorbed_takes(variant, widths)) {
                    let run = move |lab: &Lab<'_>| absorbed(lab, variant, lengths, 1, widths, storage, Extreme::Plain);
                    cases.push(Case::new(variant.spec.name, id.clone(), run));
                }
            }
        }
        // Speculative decoding: candidates that see each other, across the border of a split.
        let (lengths, widths) = (&[258, 1, 40, 511], (3, 16, 8, 16));
        for most in [2, 16] {
            let id = format!("q{most}/{}", storage.name());
            for variant in DECODE {
                cases.push(Case::new(variant.spec.name, id.clone(), move |lab| {
                    decode(lab, variant, lengths, most, widths, (storage, storage), Extreme::Plain)
                }));
            }
            for variant in ABSORBED {
                let run = move |lab: &Lab<'_>| absorbed(lab, variant, lengths, most, widths, storage, Extreme::Plain);
                cases.push(Case::new(variant.spec.name, id.clone(), run));
            }
        }
    }
    for variant in ABSORBED {
        cases.push(Case::new(variant.spec.name, "t32768_h3_r20+8/f16", move |lab| {
            absorbed(lab, variant, &[32_768], 1, (3, 12, 8, 20), Storage::F16, Extreme::Plain)
        }));
    }
    for extreme in Extreme::ALL {
        for storage in Storage::ALL {
            let (lengths, widths, id) =
                (&[300, 1, 255], (3, 16, 8, 16), format!("{}/{}", extreme.name(), storage.name()));
            for variant in DECODE {
                cases.push(Case::new(variant.spec.name, id.clone(), move |lab| {
                    decode(lab, variant, lengths, 1, widths, (storage, storage), extreme)
                }));
            }
            for variant in ABSORBED {
                let run = move |lab: &Lab<'_>| absorbed(lab, variant, lengths, 1, widths, storage, extreme);
                cases.push(Case::new(variant.spec.name, id.clone(), run));
            }
        }
    }
    // DeepSeek-V3's widths: the query is staged in several chunks.
    for variant in ABSORBED.into_iter().filter(|variant| absorbed_takes(variant, (5, 128, 64, 512))) {
        cases.push(Case::new(variant.spec.name, "t300_h5_r512+64/f16", move |lab| {
            absorbed(lab, variant, &[300], 1, (5, 128, 64, 512), Storage::F16, Extreme::Plain)
        }));
    }
    // Latents of one load to several a lane, of half a load more, of none left for the last lanes; without a rotary key.
    for widths in [(1, 4, 0, 4), (9, 8, 4, 100), (17, 4, 12, 64), (5, 16, 64, 128), (2, 64, 64, 256)] {
        for (variant, storage) in
            ABSORBED.into_iter().flat_map(|variant| Storage::ALL.map(|storage| (variant, storage)))
        {
            if !absorbed_takes(variant, widths) {
                continue;
            }
            let (n_head, _, d_rope, d_latent) = widths;
            let id = format!("wide_h{n_head}_r{d_latent}+{d_rope}/{}", storage.name());
            let run = move |lab: &Lab<'_>| absorbed(lab, variant, &[70, 3, 257], 2, widths, storage, Extreme::Plain);
            cases.push(Case::new(variant.spec.name, id, run));
        }
    }
}

/// Up to `most` new tokens a sequence, and a split behind the last one that holds no row at all.
fn few_new(lengths: &[u32], most: u32) -> Batch {
    let counts = (0..).zip(lengths).map(|(index, &length)| (length, (most - index % 2).clamp(1, length)));
    let mut batch = Batch::new(&counts.map(|(length, new)| (length - new, new)).collect::<Vec<_>>(), 3);
    batch.rows += SPLIT;
    batch
}

/// The sequence table of a decode step.
fn decoding(batch: &Batch) -> Vec<DecodeSequence> {
    let mut partial = 0;
    batch
        .sequences
        .iter()
        .zip(&batch.counts)
        .map(|(sequence, &tokens)| {
            let SequenceRow { first_row, first_slot, length, token } = *sequence;
            let splits = length.div_ceil(SPLIT);
            let line = DecodeSequence { first_row, first_slot, length, token, tokens, partial, splits, unused: 0 };
            partial += tokens * splits;
            line
        })
        .collect()
}

/// Partial results of a batch in their order: the query's token and the places it covers.
fn splits(batch: &Batch) -> Vec<(usize, Range<usize>)> {
    let visible = batch.visible();
    (0..batch.sequences.len())
        .flat_map(|index| {
            let (first, places) = (batch.sequences[index].token as usize, batch.places(index));
            let ends: Vec<usize> =
                visible[first..][..batch.counts[index] as usize].iter().map(|seen| seen.end).collect();
            ends.into_iter().enumerate().flat_map(move |(query, end)| {
                let starts = places.clone().step_by(SPLIT as usize);
                starts.map(move |start| (first + query, start..end.min(start + SPLIT as usize).max(start)))
            })
        })
        .collect()
}

/// Whether a kernel over keys and values of few queries takes these widths.
fn decode_takes(
    variant: &'static Variant<AttentionDecode>,
    (_, d_nope, d_rope, d_value): Widths,
    storage: Storage,
    kv_storage: Storage,
) -> bool {
    let whole = |width: usize, storage: Storage| width.is_multiple_of(16 / storage.bytes() as usize);
    let any = variant.spec.name == attention_decode::PLAIN.spec.name;
    any || whole(d_nope, kv_storage) && whole(d_value, kv_storage) && whole(d_rope, storage)
}

fn decode(
    lab: &Lab<'_>,
    variant: &'static Variant<AttentionDecode>,
    lengths: &[u32],
    most: u32,
    (n_head, d_nope, d_rope, d_value): Widths,
    (storage, kv_storage): (Storage, Storage),
    extreme: Extreme,
) -> Result<Vec<super::Outcome>> {
    let batch = few_new(lengths, most);
    let slots = batch.slots();
    let (d_query, d_kv) = (d_nope + d_rope, n_head * (d_nope + d_value));
    let tolerance = attention_tolerance(d_query, SPLIT as usize, extreme.spread());
    every_tuning(variant.spec.tunings, tolerance, |tuning| {
        let mut random = Random::new(SEED);
        let mut q_values = random.values(batch.tokens as usize * n_head * d_query, 1.0);
        let mut kv_values = random.values(slots.len() * d_kv, 1.0);
        let mut rope_values = random.values(slots.len() * d_rope, 1.0);
        extreme.of_queries(&mut q_values);
        extreme.of_keys(&mut kv_values, d_kv, kv_storage);
        extreme.of_keys(&mut rope_values, d_rope, storage);
        let rope_kept = super::pack(&rope_values, storage).1;
        let q = lab.floats(&q_values)?;
        let rope_words = cache_rows(&rope_values, d_rope as u32, &slots, batch.cache_rows, storage);
        // A binding holds 16 bytes, also without a rotary part.
        let rope_cache = lab.words(&[&rope_words[..], &[0; 4]].concat())?;
        let sequences = lab.words(bytemuck::cast_slice(&decoding(&batch)))?;
        let partials = splits(&batch).len() * n_head;
        let (values, softmax) = (lab.output(partials * d_value)?, lab.output(partials * 2)?);
        let scale = (d_query as f32).sqrt().recip();
        let tile_rows = 2 * SPLIT;
        let kv_tiles = (0..batch.rows)
            .step_by(tile_rows as usize)
            .map(|first| {
                let rows = tile_rows.min(batch.rows - first);
                Ok((first, rows, lab.stored(&batch.tile(&kv_values, d_kv, first, rows), kv_storage)?.0))
            })
            .collect::<Result<Vec<_>>>()?;
        lab.launch(|recording| {
            for (first, rows, kv) in &kv_tiles {
                let problem = attention_decode::AttentionDecode {
                    tokens: batch.tokens,
                    most_tokens: most,
                    partials: splits(&batch).len() as u32,
                    n_sequence: batch.sequences.len() as u32,
                    n_head: n_head as u32,
                    d_nope: d_nope as u32,
                    d_rope: d_rope as u32,
                    d_value: d_value as u32,
                    kv_first: *first,
                    kv_rows: *rows,
                    cache_rows: batch.cache_rows,
                    scale,
                    storage,
                    kv_storage,
                };
                let args = attention_decode::Args {
                    q: &q.region,
                    kv: &kv.region,
                    rope_cache: &rope_cache.region,
                    sequences: &sequences.region,
                    partial_values: &values.region,
                    partial_softmax: &softmax.region,
                };
                recording.add_variant(variant, &problem, args, tuning)?;
            }
            Ok(())
        })?;
        let heads = reference::Heads { n_head, d_nope, d_rope, d_value };
        let (q, kv) = (widen(&q_values), super::pack(&kv_values, kv_storage).1);
        let expected = reference::attention_decode(&q, &kv, &rope_kept, &splits(&batch), heads, scale.into());
        compare_partials(lab, &values, &softmax, &expected, tolerance)
    })
}

/// The kernels' mark of no key as −∞, as [`Reading::Marked`] reads it.
fn marked(value: f64) -> f64 {
    if value == f64::from(f32::MIN) { f64::NEG_INFINITY } else { value }
}

fn compare_partials(
    lab: &Lab<'_>,
    values: &Guarded,
    softmax: &Guarded,
    expected: &reference::Partial,
    tolerance: Tolerance,
) -> Result<Vec<Comparison>> {
    let values = lab.compare(values, &expected.values, tolerance)?;
    let state = lab.read(softmax)?;
    Ok(std::iter::once(values).chain(compare_softmax(lab, (&state, 0), expected, tolerance)).collect())
}

/// (m, l) pairs, from a word to the end.
fn compare_softmax(
    lab: &Lab<'_>,
    (state, first): (&Words, usize),
    expected: &reference::Partial,
    tolerance: Tolerance,
) -> [Comparison; 2] {
    let counts = [(state.words.len() - first) / 2, 1];
    let max = View { reading: Reading::Marked, first, counts, strides: [2, 1] };
    let sum = View { reading: Reading::F32, first: first + 1, ..max };
    let expected_max: Vec<f64> = expected.max.iter().copied().map(marked).collect();
    let compare = |view, expected: &[f64]| lab.compare_views(&[(state, view)], expected, tolerance);
    [compare(max, &expected_max), compare(sum, &expected.sum)]
}

/// Whether a kernel over the latents takes these widths: all but one need rows that begin on 16-byte boundaries.
fn absorbed_takes(variant: &'static Variant<AttentionAbsorbed>, (_, d_nope, d_rope, d_latent): Widths) -> bool {
    let aligned = [d_nope, d_rope, d_latent].iter().all(|width| width.is_multiple_of(4));
    aligned || variant.spec.name == attention_absorbed::PLAIN.spec.name
}

fn absorbed(
    lab: &Lab<'_>,
    variant: &'static Variant<AttentionAbsorbed>,
    lengths: &[u32],
    most: u32,
    (n_head, d_nope, d_rope, d_latent): Widths,
    storage: Storage,
    extreme: Extreme,
) -> Result<Vec<super::Outcome>> {
    if let Some(outcomes) = skipped(&variant.spec, lab.kernels) {
        return Ok(outcomes);
    }
    let batch = few_new(lengths, most);
    let slots = batch.slots();
    let scale = ((d_latent + d_rope) as f32).sqrt().recip();
    let problem = attention_absorbed::AttentionAbsorbed {
        tokens: batch.tokens,
        most_tokens: most,
        n_sequence: batch.sequences.len() as u32,
        splits: batch.rows / SPLIT,
        partials: splits(&batch).len() as u32,
        n_head: n_head as u32,
        d_latent: d_latent as u32,
        d_nope: d_nope as u32,
        d_rope: d_rope as u32,
        cache_rows: batch.cache_rows,
        scale,
        storage,
    };
    // The lanes of a small subgroup hold short rows only: said, and not passed over.
    if variant.spec.name == attention_absorbed::STREAM.spec.name
        && let Err(error) = variant.plan(&problem, lab.kernels.context(), Tuning::Auto)
    {
        return Ok(vec![not_run(error.to_string())]);
    }
    let tolerance = attention_tolerance(d_latent + d_rope, SPLIT as usize, extreme.spread());
    every_tuning(variant.spec.tunings, tolerance, |tuning| {
        let mut random = Random::new(SEED);
        let tokens = batch.tokens as usize;
        let mut a_values = random.values(tokens * n_head * d_latent, 1.0);
        let mut q_values = random.values(tokens * n_head * (d_nope + d_rope), 1.0);
        let mut latent_values = random.values(slots.len() * d_latent, 1.0);
        let mut rope_values = random.values(slots.len() * d_rope, 1.0);
        extreme.of_queries(&mut a_values);
        extreme.of_queries(&mut q_values);
        extreme.of_keys(&mut latent_values, d_latent, storage);
        extreme.of_keys(&mut rope_values, d_rope, storage);
        let (latent_kept, rope_kept) = (super::pack(&latent_values, storage).1, super::pack(&rope_values, storage).1);
        let (a, q) = (lab.floats(&a_values)?, lab.floats(&q_values)?);
        let latent_words = cache_rows(&latent_values, d_latent as u32, &slots, batch.cache_rows, storage);
        let rope_words = cache_rows(&rope_values, d_rope as u32, &slots, batch.cache_rows, storage);
        let latent_cache = lab.words(&latent_words)?;
        let rope_cache = lab.words(&[&rope_words[..], &[0; 4]].concat())?;
        let sequences = lab.words(bytemuck::cast_slice(&decoding(&batch)))?;
        let partials = splits(&batch).len() * n_head;
        let (values, softmax) = (lab.output(partials * d_latent)?, lab.output(partials * 2)?);
        let args = attention_absorbed::Args {
            absorbed: &a.region,
            q: &q.region,
            latent_cache: &latent_cache.region,
            rope_cache: &rope_cache.region,
            sequences: &sequences.region,
            partial_values: &values.region,
            partial_softmax: &softmax.region,
        };
        lab.launch(|recording| recording.add_variant(variant, &problem, args, tuning))?;
        let q_rope: Vec<f64> = q_values.chunks(d_nope + d_rope).flat_map(|head| widen(&head[d_nope..])).collect();
        let expected = reference::attention_absorbed(
            &widen(&a_values),
            &q_rope,
            &latent_kept,
            &rope_kept,
            &splits(&batch),
            n_head,
            d_latent,
            d_rope,
            scale.into(),
        );
        compare_partials(lab, &values, &softmax, &expected, tolerance)
    })
}

fn combines(cases: &mut Vec<Case>) {
    // Maxima of a few, then of ±1e4: one split takes everything. Values of the largest f16 over few positions, and over many.
    let sizes = [(1, 1), (3, 16), (9, 65), (2, 130)].map(|(n_head, width)| (n_head, width, 3.0, 1.0));
    for (n_head, width, spread, size) in
        sizes.into_iter().chain([(3, 16, 1e4, 1.0), (3, 16, 3.0, 65_504.0), (3, 16, 0.0, 1e-39)])
    {
        let plain = spread == 3.0 && size == 1.0;
        let extreme = if plain { String::new() } else { format!("_maxima_{spread:e}_values_{size:e}") };
        cases.push(Case::new("attention_combine", format!("h{n_head}_{width}{extreme}"), move |lab| {
            let tolerance = Tolerance::sums(&[8]);
            every_tuning(attention_combine::ROWS.spec.tunings, tolerance, |tuning| {
                let mut random = Random::new(SEED);
                // One split, several, none, and a token whose splits are all empty.
                let ranges = [0..1, 1..6, 6..6, 6..8];
                let splits = 8;
                let mut values = random.values(splits * n_head * width, size);
                // Below the smallest normal number an adapter may take 0 for every second value, as for all of them.
                if size < f32::MIN_POSITIVE {
                    values.iter_mut().step_by(2).for_each(|value| *value /= size);
                }
                let mut partial = reference::Partial {
                    values: widen(&values),
                    max: widen(&random.values(splits * n_head, spread)),
                    sum: random.values(splits * n_head, 1.0).iter().map(|value| f64::from(value.abs() + 1.0)).collect(),
                };
                let empty = 6 * n_head;
                partial.values[empty * width..].fill(0.0);
                partial.max[empty..].fill(f32::MIN.into());
                partial.sum[empty..].fill(0.0);
                let state: Vec<f32> =
                    partial.max.iter().zip(&partial.sum).flat_map(|(&max, &sum)| [max as f32, sum as f32]).collect();
                let single: Vec<f32> = partial.values.iter().map(|&value| value as f32).collect();
                let (partial_values, partial_softmax) = (lab.floats(&single)?, lab.floats(&state)?);
                let lines: Vec<u32> =
                    ranges.iter().flat_map(|range| [range.start as u32, range.len() as u32]).collect();
                let range_table = lab.words(&lines)?;
                let out = lab.output(ranges.len() * n_head * width)?;
                let lse = lab.output(ranges.len() * n_head)?;
                let problem = attention_combine::AttentionCombine {
                    tokens: ranges.len() as u32,
                    n_head: n_head as u32,
                    width: width as u32,
                    splits: splits as u32,
                };
                let args = attention_combine::Args {
                    partial_values: &partial_values.region,
                    partial_softmax: &partial_softmax.region,
                    ranges: &range_table.region,
                    values: &out.region,
                    lse: &lse.region,
                };
                lab.launch(|recording| recording.add_variant(&attention_combine::ROWS, &problem, args, tuning))?;
                let expected = reference::attention_combine(&partial, &ranges, n_head, width);
                // The kernel writes the lowest f32 where the reference says −∞.
                let got = lab.read(&lse)?;
                let marked = View::all(Reading::Marked, got.words.len());
                Ok(vec![
                    lab.compare(&out, &expected.values, tolerance)?,
                    lab.compare_views(&[(&got, marked)], &expected.lse, tolerance),
                ])
            })
        }));
    }
}

/// Token ids of a sequence.
#[derive(Debug, Clone, Copy)]
enum Ids {
    Equal,
    Distinct,
    /// A third of the cache holds one id, a few ids recur, most are alone.
    Skewed,
    /// Few ids often, many now and then.
    Text,
}

impl Ids {
    fn id(self, position: u32) -> u32 {
        match self {
            Ids::Equal => 3,
            Ids::Distinct => position,
            Ids::Skewed if position % 3 == 1 => 5,
            Ids::Skewed if position % 3 == 2 => position % 11,
            Ids::Skewed => 20 + position,
            // Half of the positions hold a few ids, the other half one of a thousand.
            Ids::Text if position.is_multiple_of(2) => (position / 2) % 7,
            Ids::Text => 10 + position.wrapping_mul(2_654_435_761) % 1000,
        }
    }
}

/// A step of the grouped decode: lists as the host would have written them, and the same for the reference.
struct GroupedBatch {
    words: Vec<u32>,
    table: u32,
    entries: u32,
    partials: u32,
    groups: u32,
    /// Items in the order of their partial results; a group's gate row is its row in the step's numbering.
    expected: Vec<reference::GroupedItem>,
    /// Gate rows in the step's numbering, with the id, `None` where there is no group.
    ids: Vec<Option<u32>>,
    cache_rows: u32,
    tokens: u32,
}

impl GroupedBatch {
    /// `sequences` are lengths, the last `queries` tokens of each are new; resident rows stand at their id.
    fn new(sequences: &[(u32, Ids)], (queries, passes): (u32, u32), tiling: Tiling, sources: Sources) -> Option<Self> {
        let capacity = sequences.iter().map(|(length, _)| *length).max()? + 1;
        let layout = ListLayout::new(capacity)?;
        let table = 5;
        let first = table + sequences.len() as u32 * SEQUENCE_WORDS;
        let total = first + sequences.len() as u32 * layout.words;
        let mut batch = GroupedBatch {
            words: vec![super::guarded::POISON; total as usize],
            table,
            entries: 0,
            partials: 0,
            groups: 0,
            expected: Vec::new(),
            ids: Vec::new(),
            cache_rows: capacity * sequences.len() as u32,
            tokens: 0,
        };
        let mut of_pass: Vec<(Range<usize>, u32)> = Vec::new();
        for (line, &(length, ids)) in (0..).zip(sequences) {
            let base = first + line * layout.words;
            let mut groups = Groups::new(layout);
            let mut patches: Vec<Patch> = Vec::new();
            let mut lists: Vec<(u32, Vec<usize>)> = Vec::new();
            for position in 0..length {
                let id = ids.id(position);
                let row = || if sources.resident(id) { id } else { NO_ROW };
                let group = groups.append(id, row, base, &mut patches);
                patches.extend(groups.count_patch(group, base));
                if group as usize == lists.len() {
                    lists.push((id, Vec::new()));
                }
                lists[group as usize].1.push((line * capacity + position) as usize);
            }
            let tokens = queries.min(length);
            let tiles = groups.groups().div_ceil(tiling.groups);
            let (tile_entries, chunk_entries) = (tiles.div_ceil(tiling.span), groups.chunks().div_ceil(tiling.span));
            let entry = GroupedSequence {
                first_entry: batch.entries,
                tiles,
                groups: groups.groups(),
                base,
                first_slot: line * capacity,
                position: length - tokens,
                token: batch.tokens,
                tokens,
                partial: batch.partials,
                tile_entries,
                first_group: batch.groups,
                chunks: groups.chunks(),
                chunk_word: layout.chunks,
                chunk_entries,
                unused: [0; 2],
            };
            let entry: [u32; SEQUENCE_WORDS as usize] = bytemuck::cast(entry);
            batch.words[(table + line * SEQUENCE_WORDS) as usize..][..entry.len()].copy_from_slice(&entry);
            patches.iter().for_each(|&[word, value]| batch.words[word as usize] = value);

            // Tiles hold the first 64 positions of a group, chunks the next ones in the order in which they came.
            let mut chunks: Vec<(usize, Vec<usize>)> = Vec::new();
            for (group, (_, rows)) in lists.iter().enumerate() {
                chunks.extend(rows.get(64..).unwrap_or_default().chunks(256).map(|rows| (group, rows.to_vec())));
            }
            chunks.sort_by_key(|(_, rows)| rows[0]);
            let groups_of_tiles: Vec<_> = lists
                .iter()
                .enumerate()
                .map(|(group, (_, rows))| (group, rows[..rows.len().min(64)].to_vec()))
                .collect();
            let in_items = |groups: &[(usize, Vec<usize>)], each: u32| -> Vec<Vec<(usize, Vec<usize>)>> {
                groups.chunks(each as usize).map(<[_]>::to_vec).collect()
            };
            for query in 0..tokens {
                let last = (line * capacity + length - tokens + query) as usize;
                // Tiles belong to one pass; the chunks of an item have a partial result of every pass.
                let items = in_items(&groups_of_tiles, tiling.groups * tiling.span);
                let first = batch.expected.len() + items.len();
                let of_chunks = in_items(&chunks, tiling.span);
                for pass in 0..passes {
                    let items = first + pass as usize * of_chunks.len()..first + (pass as usize + 1) * of_chunks.len();
                    of_pass.push((items, pass));
                }
                let every_pass = (0..passes).flat_map(|_| of_chunks.clone());
                for item in items.into_iter().chain(every_pass) {
                    let seen = item.into_iter().map(|(group, rows)| {
                        let rows = rows.into_iter().filter(|&row| row <= last).collect();
                        (batch.groups as usize + group, rows)
                    });
                    let token = (batch.tokens + query) as usize;
                    batch.expected.push(reference::GroupedItem { token, groups: seen.collect() });
                }
            }
            let padded = groups.groups().next_multiple_of(tiling.groups * tiling.span);
            batch.ids.extend((0..padded as usize).map(|group| lists.get(group).map(|(id, _)| *id)));
            batch.entries += tile_entries + chunk_entries;
            batch.partials += tokens * (tile_entries + passes * chunk_entries);
            batch.groups += padded;
            batch.tokens += tokens;
        }
        let pass_rows = batch.groups.div_ceil(passes).next_multiple_of(tiling.groups * tiling.span).max(1);
        for (items, pass) in of_pass {
            let own = |group: usize| group as u32 / pass_rows == pass;
            batch.expected[items].iter_mut().for_each(|item| item.groups.retain(|(group, _)| own(*group)));
        }
        Some(batch)
    }
}

/// One case of the grouped attention.
#[derive(Debug, Clone, Copy)]
struct GroupedSizes {
    sequences: &'static [(u32, Ids)],
    queries: u32,
    n_head: u32,
    widths: attention_grouped::Widths,
    activation: Activation,
    norm: GateNorm,
    storage: Storage,
    cache_storage: Storage,
    extreme: Extreme,
    /// Passes over the gate rows, each with the rows of its own groups.
    passes: u32,
    sources: Sources,
}

/// Where gate rows are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sources {
    /// Those of odd ids are resident.
    Both,
    Resident,
    Further,
}

impl Sources {
    fn resident(self, id: u32) -> bool {
        match self {
            Sources::Both => id % 2 == 1,
            Sources::Resident => true,
            Sources::Further => false,
        }
    }
}

impl GroupedSizes {
    /// The cases at the ends of what attention may meet: chunks, tiles, a sequence of one token.
    fn extremes(self) -> Vec<(String, GroupedSizes)> {
        let sequences = &[(330, Ids::Skewed), (1, Ids::Equal), (340, Ids::Equal)];
        Extreme::ALL
            .into_iter()
            .flat_map(|extreme| {
                Storage::ALL.map(|cache_storage| {
                    let name = format!("{}_{}_cache", extreme.name(), cache_storage.name());
                    (name, GroupedSizes { sequences, cache_storage, extreme, ..self })
                })
            })
            .collect()
    }
}

fn grouped(cases: &mut Vec<Case>) {
    let widths = |d_latent, d_nope, d_rope, d_value| attention_grouped::Widths { d_latent, d_nope, d_rope, d_value };
    let plain = GroupedSizes {
        sequences: &[(90, Ids::Skewed)],
        queries: 1,
        n_head: 3,
        widths: widths(20, 12, 8, 10),
        activation: Activation::Tanh,
        norm: GateNorm::LayerNorm,
        storage: Storage::F32,
        cache_storage: Storage::F32,
        extreme: Extreme::Plain,
        passes: 1,
        sources: Sources::Both,
    };
    let mixed = |storage, cache_storage| GroupedSizes { storage, cache_storage, ..plain };
    // Groups of several passes, chunks that belong to both, a sequence that the second pass alone has.
    let twice: &[(u32, Ids)] = &[(1000, Ids::Skewed), (400, Ids::Equal), (99, Ids::Distinct)];
    let all = [
        ("t1", GroupedSizes { sequences: &[(1, Ids::Distinct)], ..plain }),
        ("equal", GroupedSizes { sequences: &[(700, Ids::Equal)], ..plain }),
        ("equal_64", GroupedSizes { sequences: &[(64, Ids::Equal), (65, Ids::Equal), (320, Ids::Equal)], ..plain }),
        ("distinct", GroupedSizes { sequences: &[(99, Ids::Distinct)], ..plain }),
        ("ragged", GroupedSizes { sequences: &[(1000, Ids::Skewed), (1, Ids::Equal), (17, Ids::Distinct)], ..plain }),
        (
            "q5",
            GroupedSizes { sequences: &[(70, Ids::Equal), (9, Ids::Distinct), (3, Ids::Skewed)], queries: 5, ..plain },
        ),
        ("f16", mixed(Storage::F16, Storage::F16)),
        ("f16_cache", mixed(Storage::F32, Storage::F16)),
        ("h1_no_rope", GroupedSizes { n_head: 1, widths: widths(16, 8, 0, 8), ..plain }),
        ("h9_odd", GroupedSizes { n_head: 9, widths: widths(13, 7, 2, 11), norm: GateNorm::RmsNorm, ..plain }),
        ("h5_no_nope", GroupedSizes { n_head: 5, widths: widths(8, 0, 4, 3), activation: Activation::Silu, ..plain }),
        ("no_norm", GroupedSizes { norm: GateNorm::None, activation: Activation::OnePlus, ..plain }),
        ("t32768", GroupedSizes { sequences: &[(32_768, Ids::Text)], ..mixed(Storage::F32, Storage::F16) }),
        ("paper", GroupedSizes { n_head: 4, widths: widths(64, 64, 64, 64), ..mixed(Storage::F16, Storage::F16) }),
        ("wide", GroupedSizes { n_head: 2, widths: widths(512, 128, 64, 128), ..mixed(Storage::F16, Storage::F16) }),
        ("resident", GroupedSizes { sources: Sources::Resident, ..mixed(Storage::F16, Storage::F16) }),
        ("projected", GroupedSizes { sources: Sources::Further, sequences: twice, passes: 2, ..plain }),
        ("two_passes", GroupedSizes { sequences: twice, queries: 3, passes: 2, ..plain }),
        ("five_passes", GroupedSizes { sequences: twice, queries: 2, passes: 5, ..mixed(Storage::F16, Storage::F16) }),
    ];
    for (name, sizes) in all.map(|(name, sizes)| (name.to_owned(), sizes)).into_iter().chain(plain.extremes()) {
        cases.push(Case::new(attention_grouped::WORKGROUP.spec.name, name, move |lab| {
            let tiling = attention_grouped::tiling_in_workgroup(lab.kernels.context(), sizes.widths)?;
            attend_groups(lab, sizes, tiling, &attention_grouped::WORKGROUP)
        }));
    }

    // Slots are filled, half filled and overfull; latents and rotary keys end within a block of 8 and within the eighth.
    let plain = GroupedSizes { widths: widths(20, 16, 8, 24), ..plain };
    let mixed = |storage, cache_storage| GroupedSizes { storage, cache_storage, ..plain };
    let in_registers = [
        ("t1", GroupedSizes { sequences: &[(1, Ids::Distinct)], ..plain }),
        ("equal", GroupedSizes { sequences: &[(1700, Ids::Equal)], ..plain }),
        ("equal_64", GroupedSizes { sequences: &[(64, Ids::Equal), (65, Ids::Equal), (320, Ids::Equal)], ..plain }),
        (
            "distinct",
            GroupedSizes { sequences: &[(7, Ids::Distinct), (8, Ids::Distinct), (99, Ids::Distinct)], ..plain },
        ),
        ("ragged", GroupedSizes { sequences: &[(1000, Ids::Skewed), (1, Ids::Equal), (17, Ids::Distinct)], ..plain }),
        (
            "q5",
            GroupedSizes { sequences: &[(70, Ids::Equal), (9, Ids::Distinct), (3, Ids::Skewed)], queries: 5, ..plain },
        ),
        ("q16", GroupedSizes { sequences: &[(330, Ids::Equal), (40, Ids::Skewed)], queries: 16, ..plain }),
        ("f16", mixed(Storage::F16, Storage::F16)),
        ("f16_cache", mixed(Storage::F32, Storage::F16)),
        ("f16_weights", mixed(Storage::F16, Storage::F32)),
        ("h1_no_rope", GroupedSizes { n_head: 1, widths: widths(16, 8, 0, 8), ..plain }),
        ("h9_odd", GroupedSizes { n_head: 9, widths: widths(13, 8, 2, 8), norm: GateNorm::RmsNorm, ..plain }),
        ("h5_no_nope", GroupedSizes { n_head: 5, widths: widths(8, 0, 4, 8), activation: Activation::Silu, ..plain }),
        ("no_norm", GroupedSizes { norm: GateNorm::None, activation: Activation::OnePlus, ..plain }),
        ("t32768", GroupedSizes { sequences: &[(32_768, Ids::Text)], ..mixed(Storage::F32, Storage::F16) }),
        ("paper", GroupedSizes { n_head: 4, widths: widths(64, 64, 64, 64), ..mixed(Storage::F16, Storage::F16) }),
        ("r57", GroupedSizes { n_head: 2, widths: widths(57, 72, 62, 80), ..mixed(Storage::F16, Storage::F16) }),
        ("heads_of_128", GroupedSizes { widths: widths(64, 128, 64, 128), ..mixed(Storage::F32, Storage::F32) }),
        ("resident", GroupedSizes { sources: Sources::Resident, ..mixed(Storage::F16, Storage::F16) }),
        ("projected", GroupedSizes { sources: Sources::Further, sequences: twice, passes: 2, ..plain }),
        ("two_passes", GroupedSizes { sequences: twice, queries: 3, passes: 2, ..plain }),
        ("five_passes", GroupedSizes { sequences: twice, queries: 2, passes: 5, ..mixed(Storage::F16, Storage::F16) }),
    ];
    for (name, sizes) in in_registers.map(|(name, sizes)| (name.to_owned(), sizes)).into_iter().chain(plain.extremes())
    {
        let variant = &attention_grouped::SUBGROUP;
        cases.push(Case::new(variant.spec.name, name, move |lab| match skipped(&variant.spec, lab.kernels) {
            Some(skipped) => Ok(skipped),
            None => {
                // No tiling, no outcome: a case that another kernel would pass in its place fails.
                let tiling = attention_grouped::tiling_in_registers(lab.kernels.context(), sizes.widths);
                tiling.map_or(Ok(Vec::new()), |tiling| attend_groups(lab, sizes, tiling, variant))
            }
        }));
    }
}

fn attend_groups(
    lab: &Lab<'_>,
    sizes: GroupedSizes,
    tiling: Tiling,
    variant: &'static Variant<AttentionGrouped>,
) -> Result<Vec<super::Outcome>> {
    let GroupedSizes { sequences, queries, n_head, widths, activation, norm, storage, cache_storage, .. } = sizes;
    let (extreme, passes) = (sizes.extreme, sizes.passes);
    let attention_grouped::Widths { d_latent, d_nope, d_rope, d_value } = widths;
    let d_kv = n_head * (d_nope + d_value);
    let longest = sequences.iter().map(|(length, _)| *length as usize).max().unwrap_or(0);
    let plain = Tolerance::sums(&[d_nope as usize, d_latent as usize, d_kv as usize, longest]);
    // Scores of size s carry absolute errors of s · u · √d: those are relative errors of their exponentials.
    let of_scores = attention_tolerance((d_nope + d_rope + d_latent) as usize, longest, extreme.spread());
    let tolerance = if extreme.spread() > 1.0 { of_scores } else { plain };
    every_tuning(variant.spec.tunings, tolerance, |tuning| {
        let mut random = Random::new(SEED);
        // Resident rows come from `gates`, at their id, and the others from `gates_more`, at their group.
        let Some(batch) = GroupedBatch::new(sequences, (queries, passes), tiling, sizes.sources) else {
            return Ok(Vec::new());
        };
        let rows = batch.cache_rows as usize;
        let resident = match sizes.sources {
            Sources::Further => 0,
            Sources::Both | Sources::Resident => batch.ids.iter().flatten().max().map_or(1, |id| id + 1),
        };
        let mut q_values = random.values((batch.tokens * n_head * (d_nope + d_rope)) as usize, 1.0);
        let w_values = random.values((d_kv * d_latent) as usize, 1.0);
        let affine_values = [random.values(d_kv as usize, 1.0), random.values(d_kv as usize, 1.0)];
        let gate_values = random.values((resident * d_kv) as usize, 1.0);
        let more_values = random.values((batch.groups * d_kv) as usize, 1.0);
        let mut latent_values = random.values(rows * d_latent as usize, 1.0);
        let mut rope_values = random.values(rows * d_rope as usize, 1.0);
        extreme.of_queries(&mut q_values);
        extreme.of_keys(&mut latent_values, d_latent as usize, cache_storage);
        extreme.of_keys(&mut rope_values, d_rope as usize, cache_storage);
        let statistics: Vec<f32> = random.values(2 * rows, 1.0).iter().map(|value| value.abs() + 0.1).collect();
        // The padding of weights and gate rows is zero, that of the cache is hostile.
        let rows_of = |values: &[f32], width: u32, storage: Storage, padding: f32| -> Vec<u32> {
            let pitch = storage.row_pitch(width) as usize;
            let row = |row: &[f32]| [row, &vec![padding; pitch - row.len()]].concat();
            let rows: Vec<f32> = values.chunks(width.max(1) as usize).flat_map(row).collect();
            super::pack(&rows, storage).0
        };
        let padded = |values: &[f32], width: u32, storage: Storage| rows_of(values, width, storage, 0.0);
        let kept = |values: &[f32], storage: Storage| super::pack(values, storage).1;

        // Latents, rotary keys and statistics one after another, 16 bytes between them.
        let mut cache_words = rows_of(&latent_values, d_latent, cache_storage, HOSTILE_PADDING);
        cache_words.extend([0; 4]);
        let rope_byte = 4 * cache_words.len() as u64;
        cache_words.extend(rows_of(&rope_values, d_rope, cache_storage, HOSTILE_PADDING));
        cache_words.extend([0; 4]);
        let statistics_byte = 4 * cache_words.len() as u64;
        cache_words.extend(statistics.iter().map(|value| value.to_bits()));
        cache_words.resize(cache_words.len().next_multiple_of(4), 0);
        let beta = attention_grouped::beta_element(d_kv) as usize;
        let mut affine = affine_values[0].clone();
        affine.resize(beta, 0.0);
        affine.extend(&affine_values[1]);

        let (q, cache, lists) = (lab.floats(&q_values)?, lab.words(&cache_words)?, lab.words(&batch.words)?);
        let w = lab.words(&padded(&w_values, d_latent, storage))?;
        let affine = lab.words(&super::pack(&affine, storage).0)?;
        let gates = lab.words(&padded(&gate_values, d_kv, cache_storage))?;
        // Whole entries a pass, as the plan of a step divides them.
        let entry_groups = tiling.groups * tiling.span;
        let pass_groups = batch.groups.div_ceil(passes).next_multiple_of(entry_groups);
        let more = (0..passes)
            .map(|pass| {
                let rows = [pass, pass + 1].map(|pass| (pass * pass_groups).min(batch.groups) as usize * d_kv as usize);
                lab.words(&padded(&more_values[rows[0]..rows[1]], d_kv, Storage::F32))
            })
            .collect::<Result<Vec<_>>>()?;
        let softmax_word = attention_grouped::softmax_word(batch.partials, n_head, d_value) as usize;
        let partials = (batch.partials * n_head) as usize;
        let partial = lab.output(softmax_word + 2 * partials)?;
        let scale = ((d_nope + d_rope) as f32).sqrt().recip();
        let problem = attention_grouped::AttentionGrouped {
            tokens: batch.tokens,
            most_tokens: queries,
            n_sequence: sequences.len() as u32,
            entries: batch.entries,
            partials: batch.partials,
            n_head,
            widths,
            tiling,
            table: batch.table,
            list_words: batch.words.len() as u32,
            cache_rows: batch.cache_rows,
            rope_byte,
            statistics_byte,
            resident,
            gates_storage: cache_storage,
            more: batch.groups,
            more_storage: Storage::F32,
            first_group: 0,
            groups: batch.groups,
            pass_index: 0,
            passes,
            activation,
            norm,
            scale,
            expected_groups: 0,
            expected_positions: 0,
            cache_storage,
            storage,
        };
        let absent = lab.kernels.absent();
        lab.launch(|recording| {
            for (pass_index, more) in (0..).zip(&more) {
                let first_group = pass_index * pass_groups;
                // Of more passes than there are entries the last have nothing to do.
                let groups = pass_groups.min(batch.groups.saturating_sub(first_group));
                let further = if sizes.sources == Sources::Resident { 0 } else { groups };
                let problem =
                    attention_grouped::AttentionGrouped { first_group, groups, more: further, pass_index, ..problem };
                let args = attention_grouped::Args {
                    q: &q.region,
                    kv_b_proj: &w.region,
                    affine: &affine.region,
                    gates: if resident == 0 { &absent } else { &gates.region },
                    gates_more: if further == 0 { &absent } else { &more.region },
                    cache: &cache.region,
                    lists: &lists.region,
                    partial: &partial.region,
                };
                recording.add_variant(variant, &problem, args, tuning)?;
            }
            Ok(())
        })?;

        let (gates_kept, more_kept) = (kept(&gate_values, cache_storage), widen(&more_values));
        let gate_row = |(row, id): (usize, &Option<u32>)| match id {
            Some(id) if sizes.sources.resident(*id) => gates_kept[(id * d_kv) as usize..][..d_kv as usize].to_vec(),
            _ => more_kept[row * d_kv as usize..][..d_kv as usize].to_vec(),
        };
        let before: Vec<f64> = batch.ids.iter().enumerate().flat_map(gate_row).collect();
        let affine_kept = affine_values.each_ref().map(|values| kept(values, storage));
        let statistics: Vec<[f64; 2]> = statistics
            .chunks(2)
            .map(|pair| match norm {
                GateNorm::None => [0.0, 1.0],
                GateNorm::RmsNorm => [0.0, pair[1].into()],
                GateNorm::LayerNorm => [pair[0].into(), pair[1].into()],
            })
            .collect();
        let input = reference::Grouped {
            q: &widen(&q_values),
            kv_b_proj: &kept(&w_values, storage),
            gamma: &if norm == GateNorm::None { vec![1.0; d_kv as usize] } else { affine_kept[0].clone() },
            beta: &if norm == GateNorm::LayerNorm { affine_kept[1].clone() } else { vec![0.0; d_kv as usize] },
            gates: &before.iter().map(|&g| reference::activate(activation, g)).collect::<Vec<_>>(),
            latent: &kept(&latent_values, cache_storage),
            k_rope: &kept(&rope_values, cache_storage),
            statistics: &statistics,
        };
        let heads = reference::Heads {
            n_head: n_head as usize,
            d_nope: d_nope as usize,
            d_rope: d_rope as usize,
            d_value: d_value as usize,
        };
        let expected = reference::attention_grouped(&input, &batch.expected, heads, d_latent as usize, scale.into());
        let got = lab.read(&partial)?;
        let values = View::all(Reading::F32, partials * d_value as usize);
        Ok(std::iter::once(lab.compare_views(&[(&got, values)], &expected.values, tolerance))
            .chain(compare_softmax(lab, (&got, softmax_word), &expected, tolerance))
            .collect())
    })
}

fn gate_row_cases(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (rows, width, d_gate, ids, targets) in [
            (1, 1, 1, true, false),
            (3, 7, 5, true, true),
            (4, 64, 8, false, false),
            (9, 130, 33, true, true),
            (6, 33, 64, false, true),
            (38, 5, 6, true, false),
        ] {
            let lists = if ids { "ids" } else { "all" };
            let id = format!("{rows}x{width}x{d_gate}_{lists}/{}", storage.name());
            cases.push(Case::new("gate_project", id, move |lab| {
                gate_rows_case(lab, (rows, width, d_gate), ids, targets, storage)
            }));
            let id = format!("{rows}x{width}/{}", storage.name());
            cases.push(Case::new("gate_statistics", id, move |lab| gate_statistics_case(lab, rows, width, storage)));
        }
    }
}

fn gate_rows_case(
    lab: &Lab<'_>,
    (rows, width, d_gate): (u32, u32, u32),
    with_ids: bool,
    with_targets: bool,
    storage: Storage,
) -> Result<Vec<super::Outcome>> {
    let (vocab_size, first_id, y_rows) = (23, 4, rows + 3);
    // The other storage for the result: a pool is stored like the cache, not like the weights.
    let y_storage = if storage == Storage::F32 { Storage::F16 } else { Storage::F32 };
    let tolerance = match y_storage {
        Storage::F32 => Tolerance::sums(&[d_gate as usize]),
        Storage::F16 => Tolerance { relative: 2f64.powi(-10) },
    };
    every_tuning(gate_project::ROWS.spec.tunings, tolerance, |tuning| {
        let mut random = Random::new(SEED);
        let padded = |values: &[f32], width: u32| {
            let pitch = storage.row_pitch(width) as usize;
            let rows: Vec<f32> =
                values.chunks(width as usize).flat_map(|row| [row, &vec![0.0; pitch - row.len()]].concat()).collect();
            super::pack(&rows, storage).0
        };
        let table = random.values((vocab_size * d_gate) as usize, 1.0);
        let b_proj = random.values((width * d_gate) as usize, 1.0);
        let mut ids = random.ids(rows as usize, vocab_size);
        ids[0] = vocab_size - 1;
        // The second row is left out.
        if rows > 1 {
            ids[1] = NO_ROW;
        }
        let targets: Vec<u32> = (0..rows).map(|row| (row * 2 + 1) % y_rows).collect();
        let unique = targets.iter().collect::<std::collections::HashSet<_>>().len() == targets.len();
        let targets = if unique { targets } else { (0..rows).rev().collect() };
        let embedding = lab.words(&padded(&table, d_gate))?;
        let projection = lab.words(&padded(&b_proj, d_gate))?;
        let (id_list, target_list) = (lab.words(&ids)?, lab.words(&targets)?);
        let y_words = row_words(width, y_storage);
        let y = Guarded::poisoned_as(lab.kernels, "y", y_rows as usize * y_words, y_storage)?;
        let problem = gate_project::GateProject {
            rows,
            width,
            d_gate,
            vocab_size,
            first_id,
            ids: with_ids,
            targets: with_targets,
            y_rows,
            storage,
            y_storage,
        };
        let args = gate_project::Args {
            gate_embedding: &embedding.region,
            gate_b_proj: &projection.region,
            ids: &id_list.region,
            targets: &target_list.region,
            y: &y.region,
        };
        lab.launch(|recording| recording.add_variant(&gate_project::ROWS, &problem, args, tuning))?;
        let kept = |values: &[f32]| super::pack(values, storage).1;
        let mut expected = vec![f64::NAN; (y_rows * width) as usize];
        for row in 0..rows {
            let id = if with_ids { ids[row as usize] } else { first_id + row };
            let to = if with_targets { targets[row as usize] } else { row };
            if id != NO_ROW {
                let values = reference::gate_project(&kept(&table), &kept(&b_proj), &[id], d_gate as usize);
                expected[(to * width) as usize..][..width as usize].copy_from_slice(&values);
            }
        }
        let got = lab.read(&y)?;
        Ok(vec![lab.compare_views(&[(&got, unpack(0, y_rows, width, y_storage))], &expected, tolerance)])
    })
}

fn gate_statistics_case(lab: &Lab<'_>, tokens: u32, width: u32, storage: Storage) -> Result<Vec<super::Outcome>> {
    let tolerance = Tolerance::sums(&[width as usize]);
    every_tuning(gate_statistics::ROWS.spec.tunings, tolerance, |tuning| {
        let mut comparisons = Vec::new();
        // Rows of both tables, of the further one alone, of the resident one alone.
        for (norm, activation, resident, further) in [
            (GateNorm::LayerNorm, Activation::Sigmoid, 5, true),
            (GateNorm::RmsNorm, Activation::OnePlus, 0, true),
            (GateNorm::LayerNorm, Activation::Silu, 5, false),
        ] {
            let mut random = Random::new(SEED);
            let (more_first, cached) = (2, tokens + 2);
            let kv_values = random.values((tokens * width) as usize, 1.0);
            let pitched = |values: &[f32], storage: Storage| {
                let pitch = storage.row_pitch(width) as usize;
                let rows: Vec<f32> = values
                    .chunks(width as usize)
                    .flat_map(|row| [row, &vec![0.0; pitch - row.len()]].concat())
                    .collect();
                super::pack(&rows, storage)
            };
            let gate_values = random.values((resident * width) as usize, 1.0);
            let more_rows = if further { more_first + tokens } else { 0 };
            let more_values = random.values((more_rows * width) as usize, 1.0);
            let gates = lab.words(&pitched(&gate_values, storage).0)?;
            let more = lab.words(&pitched(&more_values, Storage::F32).0)?;
            let (kv, kept) = (lab.floats(&kv_values)?, super::pack(&gate_values, storage).1);
            // A resident row, then one of `gates_more` by number, then one by token.
            let row_of = |token: u32| match (resident, further) {
                (_, false) => token % resident,
                (0, true) => [1, NO_ROW][token as usize % 2],
                (_, true) => [token % resident, resident + 1, NO_ROW][token as usize % 3],
            };
            let rows: Vec<u32> = (0..tokens).map(row_of).collect();
            let slots: Vec<u32> = (0..tokens).map(|token| tokens + 1 - token).collect();
            let (row_list, slot_list) = (lab.words(&rows)?, lab.words(&slots)?);
            let (statistics, absent) = (lab.output(2 * cached as usize)?, lab.kernels.absent());
            let problem = gate_statistics::GateStatistics {
                tokens,
                width,
                resident,
                more: more_rows,
                more_first,
                cache_rows: cached,
                eps: 1e-5,
                activation,
                norm,
                storage,
                more_storage: Storage::F32,
            };
            let args = gate_statistics::Args {
                kv: &kv.region,
                gates: if resident == 0 { &absent } else { &gates.region },
                gates_more: if further { &more.region } else { &absent },
                rows: &row_list.region,
                slots: &slot_list.region,
                statistics: &statistics.region,
            };
            lab.launch(|recording| recording.add_variant(&gate_statistics::ROWS, &problem, args, tuning))?;
            let more_values = widen(&more_values);
            let w = width as usize;
            let gate_of = |(token, &row): (usize, &u32)| match row {
                NO_ROW => more_values[(more_first as usize + token) * w..][..w].to_vec(),
                row if row < resident => kept[row as usize * w..][..w].to_vec(),
                row => more_values[(row - resident) as usize * w..][..w].to_vec(),
            };
            let g: Vec<f64> = rows.iter().enumerate().flat_map(gate_of).collect();
            let measured = reference::gate_statistics(&widen(&kv_values), &g, activation, norm, w, 1e-5);
            let mut expected = vec![f64::NAN; 2 * cached as usize];
            for (&slot, pair) in slots.iter().zip(measured) {
                expected[2 * slot as usize..][..2].copy_from_slice(&pair);
            }
            comparisons.push(lab.compare(&statistics, &expected, tolerance)?);
        }
        Ok(comparisons)
    })
}

fn lists(cases: &mut Vec<Case>) {
    for count in [0, 1, 63, 300] {
        cases.push(Case::new("word_scatter", count.to_string(), move |lab| {
            every_tuning(word_scatter::ELEMENTS.spec.tunings, Tolerance::EXACT, |tuning| {
                let values = Random::new(SEED).values(700, 1.0);
                let words = lab.floats(&values)?;
                let patches: Vec<[u32; 2]> = (0..count).map(|i| [(i * 37) % 700, (i as f32).to_bits()]).collect();
                let list = lab.words(bytemuck::cast_slice(&[&patches[..], &[[0; 2]]].concat()))?;
                let problem = word_scatter::WordScatter { count, words: 700 };
                let args = word_scatter::Args { patches: &list.region, words: &words.region };
                lab.launch(|recording| recording.add_variant(&word_scatter::ELEMENTS, &problem, args, tuning))?;
                let mut expected: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
                reference::word_scatter(&mut expected, &patches);
                let expected: Vec<f64> = expected.into_iter().map(|bits| f32::from_bits(bits).into()).collect();
                Ok(vec![lab.compare(&words, &expected, Tolerance::EXACT)?])
            })
        }));
    }
    for (name, first_group, longest) in [("whole", 0, 30), ("second_pass", 16, 30), ("long", 0, 300)] {
        cases.push(Case::new("group_ids", name, move |lab| {
            every_tuning(group_ids::ELEMENTS.spec.tunings, Tolerance::EXACT, |tuning| {
                let tiling = Tiling { groups: 4, span: 2 };
                let sequences = [(longest, Ids::Skewed), (1, Ids::Equal), (21, Ids::Distinct)];
                let Some(batch) = GroupedBatch::new(&sequences, (1, 1), tiling, Sources::Both) else {
                    return Ok(Vec::new());
                };
                let groups = batch.groups - first_group;
                let (token_ids, token_rows) = ([7, 8, 9], [7, NO_ROW, 9]);
                let lists = lab.words(&batch.words)?;
                let (id_list, row_list) = (lab.words(&token_ids)?, lab.words(&token_rows)?);
                let ids = lab.output((groups + 3) as usize)?;
                let problem = group_ids::GroupIds {
                    tokens: 3,
                    first_group,
                    groups,
                    n_sequence: 3,
                    table: batch.table,
                    list_words: batch.words.len() as u32,
                };
                let args = group_ids::Args {
                    token_ids: &id_list.region,
                    token_rows: &row_list.region,
                    lists: &lists.region,
                    ids: &ids.region,
                };
                lab.launch(|recording| recording.add_variant(&group_ids::ELEMENTS, &problem, args, tuning))?;
                let listed = batch.ids[first_group as usize..].iter().map(|id| id.map(|id| (id, id % 2 == 1)));
                let tokens = token_ids.iter().zip(token_rows).map(|(&id, row)| Some((id, row != NO_ROW)));
                let expected = reference::group_ids(&listed.chain(tokens).collect::<Vec<_>>());
                Ok(vec![compare_numbers(lab, &ids, &expected)?])
            })
        }));
    }
}

#[cfg(test)]
mod tests {
    /// The table would be worthless if two cases shared a name or a kernel had none.
    #[test]
    fn ids_are_unique_and_every_kernel_has_cases() {
        let cases = crate::check::cases();
        let mut ids: Vec<_> = cases.iter().map(|case| case.id().to_owned()).collect();
        ids.sort();
        let before = ids.len();
        ids.dedup();
        assert_eq!(ids.len(), before);
        for spec in crate::kernels::shaders() {
            assert!(cases.iter().any(|case| case.kernel() == spec.name), "{} has no case", spec.name);
        }
    }
}

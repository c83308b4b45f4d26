//! Cases of the single kernels: tails of every tile, odd head counts, both storages.

use std::ops::Range;

use super::compare::{Comparison, Tolerance, UNIT_ROUNDOFF};
use super::guarded::Guarded;
use super::random::Random;
use super::{Case, Lab, every_tuning, skipped};
use crate::config::{Activation, GateNorm, RopeConfig, RopeScaling};
use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::kernels::attention_decode::SPLIT;
use crate::kernels::attention_prefill::QueryTile;
use crate::kernels::cache_read::SequenceRow;
use crate::kernels::matmul::Layout;
use crate::kernels::{
    attention_absorbed, attention_decode, attention_merge, attention_prefill, cache_append, cache_copy, cache_read,
    gate, gather, matmul, matmul_cooperative, matmul_subgroup, matmul_vec4, matvec, matvec_subgroup, matvec_vec4, norm,
    residual_add, rope, swiglu,
};
use crate::plan::{Storage, Tuning};
use crate::reference;

/// Seed of every case's inputs: cases differ by their sizes.
const SEED: u64 = 20;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    matrix_products(&mut cases);
    norms(&mut cases);
    gates(&mut cases);
    ropes(&mut cases);
    elementwise(&mut cases);
    gathers(&mut cases);
    caches(&mut cases);
    prefills(&mut cases);
    decodes(&mut cases);
    merges(&mut cases);
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
            let problem = matmul::Problem::linear(rows, inner, cols, index % 2 == 1, storage);
            cases.push(product_case(format!("{rows}x{inner}x{cols}"), problem, &MATMUL));
        }
        for (index, &(rows, inner, cols)) in few.iter().enumerate() {
            let problem = matmul::Problem::linear(rows, inner, cols, index % 2 == 1, storage);
            cases.push(product_case(format!("{rows}x{inner}x{cols}"), problem, &MATVEC));
        }
        for (rows, product) in [(3, &MATVEC), (34, &MATMUL)] {
            for n_head in [1, 3] {
                cases.push(product_case(format!("absorb_{rows}x{n_head}"), absorb(rows, n_head, storage), product));
                cases.push(product_case(format!("fold_{rows}x{n_head}"), fold(rows, n_head, storage), product));
            }
        }
        // The same neighbourhoods with rows of whole 16-byte loads, around the 16 k of a staged tile.
        for (index, &(rows, inner, cols)) in many_in_vec4.iter().enumerate() {
            for product in [&MATMUL_VEC4, &MATMUL_SUBGROUP] {
                let problem = matmul::Problem::linear(rows, inner, cols, index % 2 == 1, storage);
                cases.push(product_case(format!("{rows}x{inner}x{cols}"), problem, product));
            }
        }
        for (index, &(rows, inner, cols)) in few_in_vec4.iter().enumerate() {
            for product in [&MATVEC_VEC4, &MATVEC_SUBGROUP] {
                let problem = matmul::Problem::linear(rows, inner, cols, index % 2 == 1, storage);
                cases.push(product_case(format!("{rows}x{inner}x{cols}"), problem, product));
            }
        }
        for (rows, products) in [(3, [&MATVEC_VEC4, &MATVEC_SUBGROUP]), (34, [&MATMUL_VEC4, &MATMUL_SUBGROUP])] {
            for product in products {
                cases.push(product_case(format!("apart_{rows}"), apart(rows, storage), product));
            }
        }
    }
    for (index, (rows, inner, cols)) in [(1, 16, 16), (15, 32, 48), (17, 16, 64), (33, 80, 80)].into_iter().enumerate()
    {
        let problem = matmul::Problem::linear(rows, inner, cols, index % 2 == 1, Storage::F16);
        cases.push(product_case(format!("{rows}x{inner}x{cols}"), problem, &MATMUL_COOPERATIVE));
    }
}

/// The products of the absorbed path: heads side by side in a row, a block of kv_b_proj each, here 10 + 6 rows of 12.
fn absorb(rows: u32, n_head: u32, storage: Storage) -> matmul::Problem {
    matmul::Problem {
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

fn fold(rows: u32, n_head: u32, storage: Storage) -> matmul::Problem {
    matmul::Problem {
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
fn apart(rows: u32, storage: Storage) -> matmul::Problem {
    matmul::Problem {
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

/// One of the kernels of the matrix product.
struct Product {
    spec: &'static KernelSpec,
    encode: fn(&mut Recording, matmul::Problem, matmul::Args<'_>, Tuning) -> Result<()>,
    reference: Definition,
}

/// `(x, w, bias, rows, inner, cols)` to `y`.
type Definition = fn(&[f64], &[f64], Option<&[f64]>, usize, usize, usize) -> Vec<f64>;

const MATMUL: Product = Product {
    spec: &matmul::SPEC,
    encode: |recording, problem, args, tuning| matmul::encode(recording, &problem, args, tuning),
    reference: reference::matmul,
};

const MATMUL_COOPERATIVE: Product = Product {
    spec: &matmul_cooperative::SPEC,
    encode: |recording, problem, args, tuning| {
        matmul_cooperative::encode(recording, &matmul_cooperative::Problem(problem), args, tuning)
    },
    reference: reference::matmul_cooperative,
};

const MATMUL_SUBGROUP: Product = Product {
    spec: &matmul_subgroup::SPEC,
    encode: |recording, problem, args, tuning| {
        matmul_subgroup::encode(recording, &matmul_subgroup::Problem(problem), args, tuning)
    },
    reference: reference::matmul_subgroup,
};

const MATMUL_VEC4: Product = Product {
    spec: &matmul_vec4::SPEC,
    encode: |recording, problem, args, tuning| {
        matmul_vec4::encode(recording, &matmul_vec4::Problem(problem), args, tuning)
    },
    reference: reference::matmul_vec4,
};

const MATVEC: Product = Product {
    spec: &matvec::SPEC,
    encode: |recording, problem, args, tuning| matvec::encode(recording, &matvec::Problem(problem), args, tuning),
    reference: reference::matvec,
};

const MATVEC_SUBGROUP: Product = Product {
    spec: &matvec_subgroup::SPEC,
    encode: |recording, problem, args, tuning| {
        matvec_subgroup::encode(recording, &matvec_subgroup::Problem(problem), args, tuning)
    },
    reference: reference::matvec_subgroup,
};

const MATVEC_VEC4: Product = Product {
    spec: &matvec_vec4::SPEC,
    encode: |recording, problem, args, tuning| {
        matvec_vec4::encode(recording, &matvec_vec4::Problem(problem), args, tuning)
    },
    reference: reference::matvec_vec4,
};

fn product_case(sizes: String, problem: matmul::Problem, product: &'static Product) -> Case {
    let bias = if problem.bias { "/bias" } else { "" };
    let id = format!("{sizes}/{}{bias}", problem.storage.name());
    Case::new(product.spec.name, id, move |lab| {
        if let Some(outcomes) = skipped(product.spec, lab.kernels) {
            return Ok(outcomes);
        }
        let p = problem;
        let (rows, inner, cols) = (p.rows as usize, p.inner as usize, p.cols as usize);
        let end = |layout: Layout, rows: u32, inner: u32| {
            layout.offset + (rows - 1) * layout.row + (inner - 1) * layout.inner + (p.batch - 1) * layout.batch + 1
        };
        let tolerance = Tolerance::sums(&[inner]);
        every_tuning(product.spec.tunings, tolerance, |tuning| {
            let mut random = Random::new(SEED);
            let x_values = random.values(end(p.x, p.rows, p.inner) as usize, 1.0);
            let w_values = random.values(end(p.w, p.cols, p.inner) as usize, 1.0);
            let x = lab.floats(&x_values)?;
            let (w, w_kept) = lab.stored(&w_values, p.storage)?;
            let (bias, bias_kept) = lab.stored(&random.values(cols, 1.0), p.storage)?;
            let y = lab.output(end(p.y, p.rows, p.cols) as usize)?;
            let args = matmul::Args { x: &x.region, w: &w.region, bias: &bias.region, y: &y.region };
            lab.launch(|recording| (product.encode)(recording, p, args, tuning))?;
            let got = y.read_f32(lab.kernels, lab.queue)?;
            // Nothing else was written: neither before the offset nor between the rows.
            let written = got.iter().filter(|value| value.to_bits() != super::guarded::POISON).count();
            let elements = [f64::from(p.batch) * (rows * cols) as f64];
            let count = super::compare(&[written as f32], &elements, Tolerance::EXACT);
            std::iter::once(Ok(count))
                .chain((0..p.batch).map(|b| {
                    let pick = |values: &[f64], layout: Layout, rows: u32, inner: u32| -> Vec<f64> {
                        let at = |m, k| layout.offset + b * layout.batch + m * layout.row + k * layout.inner;
                        (0..rows).flat_map(|m| (0..inner).map(move |k| at(m, k))).map(|i| values[i as usize]).collect()
                    };
                    let x = pick(&widen(&x_values), p.x, p.rows, p.inner);
                    let w = pick(&w_kept, p.w, p.cols, p.inner);
                    let bias = p.bias.then_some(&bias_kept[..]);
                    let expected = (product.reference)(&x, &w, bias, rows, inner, cols);
                    let got = pick(&widen(&got), p.y, p.rows, p.cols);
                    let got: Vec<f32> = got.iter().map(|&value| value as f32).collect();
                    Ok(super::compare(&got, &expected, tolerance))
                }))
                .collect()
        })
    })
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

fn norms(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for kind in [norm::Kind::Rms, norm::Kind::Layer] {
            for (index, (rows, width)) in
                [(1, 1), (3, 31), (2, 63), (5, 64), (1, 65), (7, 257), (300, 24)].into_iter().enumerate()
            {
                // Odd cases read columns out of wider rows.
                let (offset, pitch) = if index % 2 == 1 { (3, width + 5) } else { (0, width) };
                let problem = norm::Problem {
                    rows,
                    width,
                    x_offset: offset,
                    x_row: pitch,
                    eps: 1e-6,
                    kind,
                    bias: kind == norm::Kind::Layer,
                    storage,
                };
                cases.push(Case::new("norm", format!("{kind:?}_{rows}x{width}/{}", storage.name()), move |lab| {
                    let tolerance = Tolerance::sums(&[width as usize]);
                    every_tuning(norm::SPEC.tunings, tolerance, |tuning| {
                        let mut random = Random::new(SEED);
                        let mut values = random.values((offset + rows * pitch) as usize, 1.0);
                        // A mean far from 0: E[x²] − mean² would lose digits here.
                        values.iter_mut().for_each(|value| *value += 3.0);
                        let x = lab.floats(&values)?;
                        let (weight, w) = lab.stored(&random.values(width as usize, 1.0), storage)?;
                        let (bias, b) = lab.stored(&random.values(width as usize, 1.0), storage)?;
                        let y = lab.output((rows * width) as usize)?;
                        let args =
                            norm::Args { x: &x.region, weight: &weight.region, bias: &bias.region, y: &y.region };
                        lab.launch(|recording| norm::encode(recording, &problem, args, tuning))?;
                        let rows_of = |row: u32| &values[(offset + row * pitch) as usize..][..width as usize];
                        let dense = widen(&(0..rows).flat_map(rows_of).copied().collect::<Vec<_>>());
                        let expected = match kind {
                            norm::Kind::Rms => reference::rms_norm(&dense, Some(&w), width as usize, 1e-6),
                            norm::Kind::Layer => {
                                reference::layer_norm(&dense, Some(&w), Some(&b), width as usize, 1e-6)
                            }
                        };
                        Ok(vec![lab.compare(&y, &expected, tolerance)?])
                    })
                }));
            }
        }
    }
}

fn gates(cases: &mut Vec<Case>) {
    let every = Activation::ALL.into_iter().flat_map(|activation| GateNorm::ALL.map(|norm| (activation, norm, 5, 33)));
    let sizes = [(1, 1), (3, 63), (2, 64), (1, 65), (4, 257), (130, 24)]
        .map(|(rows, width)| (Activation::Sigmoid, GateNorm::LayerNorm, rows, width));
    for storage in Storage::ALL {
        for (activation, norm, rows, width) in every.clone().chain(sizes) {
            let id = format!("{activation:?}_{norm:?}_{rows}x{width}/{}", storage.name());
            cases.push(Case::new("gate", id, move |lab| {
                let tolerance = Tolerance::sums(&[width as usize, width as usize]);
                every_tuning(gate::SPEC.tunings, tolerance, |tuning| {
                    let mut random = Random::new(SEED);
                    let pitch = width + 3;
                    let x_values = random.values((2 + rows * pitch) as usize, 1.0);
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
                    let problem = gate::Problem {
                        rows,
                        width,
                        x_offset: 2,
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
                    lab.launch(|recording| gate::encode(recording, &problem, args, tuning))?;
                    let row_of = |row: u32| &x_values[(2 + row * pitch) as usize..][..width as usize];
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
            }));
        }
    }
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
                    every_tuning(rope::SPEC.tunings, tolerance, |tuning| {
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
                        let problem = rope::Problem {
                            tokens: tokens as u32,
                            n_head: n_head as u32,
                            d_rope: d_rope as u32,
                            offset: d_nope as u32,
                            token_stride: (n_head * d_head) as u32,
                            head_stride: d_head as u32,
                            interleave,
                        };
                        let args = rope::Args { rotations: &rotations.region, values: &out.region };
                        lab.launch(|recording| rope::encode(recording, &problem, args, tuning))?;
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
            every_tuning(swiglu::SPEC.tunings, tolerance, |tuning| {
                let mut random = Random::new(SEED);
                let (a, b) = (random.values(elements, 3.0), random.values(elements, 1.0));
                let (gate, up, y) = (lab.floats(&a)?, lab.floats(&b)?, lab.output(elements)?);
                let args = swiglu::Args { gate: &gate.region, up: &up.region, y: &y.region };
                let problem = swiglu::Problem { elements: elements as u32 };
                lab.launch(|recording| swiglu::encode(recording, &problem, args, tuning))?;
                Ok(vec![lab.compare(&y, &reference::swiglu(&widen(&a), &widen(&b)), tolerance)?])
            })
        }));
        cases.push(Case::new("residual_add", elements, move |lab| {
            let tolerance = Tolerance::sums(&[1]);
            every_tuning(residual_add::SPEC.tunings, tolerance, |tuning| {
                let mut random = Random::new(SEED);
                let (a, b) = (random.values(elements, 1.0), random.values(elements, 1.0));
                let (stream, delta) = (lab.floats(&a)?, lab.floats(&b)?);
                let args = residual_add::Args { delta: &delta.region, stream: &stream.region };
                let problem = residual_add::Problem { elements: elements as u32 };
                lab.launch(|recording| residual_add::encode(recording, &problem, args, tuning))?;
                Ok(vec![lab.compare(&stream, &reference::residual_add(&widen(&a), &widen(&b)), tolerance)?])
            })
        }));
    }
}

fn gathers(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (rows, width) in [(1, 1), (3, 7), (5, 64), (65, 33), (2, 257)] {
            cases.push(Case::new("gather", format!("{rows}x{width}/{}", storage.name()), move |lab| {
                every_tuning(gather::SPEC.tunings, Tolerance::EXACT, |tuning| {
                    let mut random = Random::new(SEED);
                    let vocab_size = 19;
                    let (table, kept) = lab.stored(&random.values((vocab_size * width) as usize, 1.0), storage)?;
                    let mut id_values = random.ids(rows as usize, vocab_size);
                    // The last row of the table, where an odd f16 count leaves half a word.
                    id_values[0] = vocab_size - 1;
                    let ids = lab.words(&id_values)?;
                    let y = lab.output((rows * width) as usize)?;
                    let problem = gather::Problem { rows, width, vocab_size, storage };
                    let args = gather::Args { table: &table.region, ids: &ids.region, y: &y.region };
                    lab.launch(|recording| gather::encode(recording, &problem, args, tuning))?;
                    Ok(vec![lab.compare(
                        &y,
                        &reference::gather(&kept, width as usize, &id_values),
                        Tolerance::EXACT,
                    )?])
                })
            }));
        }
    }
}

/// Rows of a cache, spread to their pitch, as the device stores them; the padding is zero, other rows are NaN.
fn cache_rows(values: &[f32], width: u32, rows: &[u32], cache_rows: u32, storage: Storage) -> Vec<u32> {
    let row_words = row_words(width, storage);
    let poison = match storage {
        Storage::F32 => super::guarded::POISON,
        Storage::F16 => 0x7ead_7ead,
    };
    let mut words = vec![poison; cache_rows as usize * row_words];
    for (index, &row) in rows.iter().enumerate() {
        let mut padded = values[index * width as usize..][..width as usize].to_vec();
        padded.resize(storage.row_pitch(width) as usize, 0.0);
        words[row as usize * row_words..][..row_words].copy_from_slice(&super::pack(&padded, storage).0);
    }
    words
}

fn row_words(width: u32, storage: Storage) -> usize {
    (u64::from(storage.row_pitch(width)) * storage.bytes() / 4) as usize
}

/// A cache as it lies on the device, as values: padding left out.
fn unpack(words: &[u32], width: u32, storage: Storage) -> Vec<f32> {
    let row_words = row_words(width, storage);
    if row_words == 0 {
        return Vec::new();
    }
    words
        .chunks(row_words)
        .flat_map(|row| -> Vec<f32> {
            match storage {
                Storage::F32 => row.iter().map(|&word| f32::from_bits(word)).take(width as usize).collect(),
                Storage::F16 => {
                    let half = |bits: u32| half::f16::from_bits(bits as u16).to_f32();
                    row.iter().flat_map(|&word| [half(word), half(word >> 16)]).take(width as usize).collect()
                }
            }
        })
        .collect()
}

fn caches(cases: &mut Vec<Case>) {
    for storage in Storage::ALL {
        for (d_latent, d_rope, with_ids) in [(1, 0, true), (5, 2, false), (32, 16, true), (63, 6, true), (8, 64, false)]
        {
            let id = format!("{d_latent}+{d_rope}/{}", storage.name());
            cases.push(Case::new("cache_append", id.clone(), move |lab| {
                append(lab, d_latent, d_rope, with_ids, storage)
            }));
            cases.push(Case::new("cache_read", id, move |lab| read(lab, d_latent, with_ids, storage)));
        }
    }
    for (words, from_word, to_word) in [(1, 0, 1), (64, 100, 0), (257, 3, 300), (0, 5, 5)] {
        cases.push(Case::new("cache_copy", format!("{words}_{from_word}_to_{to_word}"), move |lab| {
            every_tuning(cache_copy::SPEC.tunings, Tolerance::EXACT, |tuning| {
                let values = Random::new(SEED).values(600, 1.0);
                let cache = lab.floats(&values)?;
                let problem = cache_copy::Problem { words, from_word, to_word };
                lab.launch(|recording| cache_copy::encode(recording, &problem, &cache.region, tuning))?;
                let mut expected = widen(&values);
                reference::cache_copy(&mut expected, 1, from_word as usize, to_word as usize, words as usize);
                Ok(vec![lab.compare(&cache, &expected, Tolerance::EXACT)?])
            })
        }));
    }
}

fn append(lab: &Lab<'_>, d_latent: u32, d_rope: u32, with_ids: bool, storage: Storage) -> Result<Vec<super::Outcome>> {
    // WGSL does not say how pack2x16float rounds: a unit in the last place of f16 is 2^-10.
    let tolerance = match storage {
        Storage::F32 => Tolerance::EXACT,
        Storage::F16 => Tolerance { relative: 2f64.powi(-10) },
    };
    every_tuning(cache_append::SPEC.tunings, tolerance, |tuning| {
        let mut random = Random::new(SEED);
        let slots = [4, 0, 6, 1, 9];
        let tokens = slots.len() as u32;
        let cached = 11;
        let row = d_latent + d_rope + 1;
        let mut values = random.values((tokens * row) as usize, 1.0);
        // Beyond f16: stored as its largest value.
        values[0] = 1e6;
        // What is not a number stays so: a clamp would hide it.
        values[((tokens - 1) * row) as usize] = f32::NAN;
        let source = lab.floats(&values)?;
        let ids = random.ids(tokens as usize, 1000);
        let id_source = lab.words(&ids)?;
        let slot_words = lab.words(&slots)?;
        let outputs = |width| {
            Guarded::poisoned_as(lab.kernels, "cache", cached as usize * row_words(width, storage).max(1), storage)
        };
        let (latent_cache, rope_cache) = (outputs(d_latent)?, outputs(d_rope)?);
        let id_cache = lab.output(cached as usize)?;
        let problem = cache_append::Problem {
            tokens,
            cache_rows: cached,
            d_latent,
            latent_offset: 0,
            latent_row: row,
            d_rope,
            rope_offset: d_latent,
            rope_row: row,
            with_ids,
            storage,
        };
        let args = cache_append::Args {
            latent: &source.region,
            rope_key: &source.region,
            ids: &id_source.region,
            slots: &slot_words.region,
            latent_cache: &latent_cache.region,
            rope_cache: &rope_cache.region,
            id_cache: &id_cache.region,
        };
        lab.launch(|recording| cache_append::encode(recording, &problem, args, tuning))?;
        let mut comparisons = Vec::new();
        for (cache, first, width) in [(&latent_cache, 0, d_latent), (&rope_cache, d_latent, d_rope)] {
            let words = cache.read(lab.kernels, lab.queue)?;
            let got = if width == 0 { Vec::new() } else { unpack(&words, width, storage) };
            let largest = match storage {
                Storage::F32 => f32::MAX,
                Storage::F16 => 65504.0,
            };
            let new: Vec<f64> = (0..tokens)
                .flat_map(|token| values[(token * row + first) as usize..][..width as usize].to_vec())
                .map(|value| value.clamp(-largest, largest).into())
                .collect();
            let mut expected = vec![f64::NAN; (cached * width) as usize];
            reference::cache_append(&mut expected, &new, width as usize, &slots);
            comparisons.push(super::compare(&got, &expected, tolerance));
        }
        let mut expected = vec![f64::NAN; cached as usize];
        if with_ids {
            let ids: Vec<f64> = ids.iter().map(|&id| id.into()).collect();
            reference::cache_append(&mut expected, &ids, 1, &slots);
        }
        let got: Vec<f32> = id_cache
            .read(lab.kernels, lab.queue)?
            .into_iter()
            .map(|id| if id == super::guarded::POISON { f32::NAN } else { id as f32 })
            .collect();
        comparisons.push(super::compare(&got, &expected, Tolerance::EXACT));
        Ok(comparisons)
    })
}

fn read(lab: &Lab<'_>, d_latent: u32, with_ids: bool, storage: Storage) -> Result<Vec<super::Outcome>> {
    every_tuning(cache_read::SPEC.tunings, Tolerance::EXACT, |tuning| {
        let mut random = Random::new(SEED);
        let batch = Batch::new(&[(0, 3), (0, 1), (0, SPLIT + 2)], 40);
        let slots = batch.slots();
        let (rounded, kept) = {
            let values = random.values(slots.len() * d_latent as usize, 1.0);
            (values.clone(), super::pack(&values, storage).1)
        };
        let latent_cache = lab.words(&cache_rows(&rounded, d_latent, &slots, batch.cache_rows, storage))?;
        let ids = random.ids(batch.cache_rows as usize, 1000);
        let id_cache = lab.words(&ids)?;
        let sequences = lab.words(bytemuck::cast_slice(&batch.sequences))?;
        // A tile that begins inside the first sequence's padding and ends inside the last's.
        let (first_row, rows) = (2, batch.rows - 5);
        let latent = lab.output((rows * d_latent) as usize)?;
        let (id_out, slot_out) = (lab.output(rows as usize)?, lab.output(rows as usize)?);
        let problem = cache_read::Problem {
            first_row,
            rows,
            cache_rows: batch.cache_rows,
            d_latent,
            n_sequence: batch.sequences.len() as u32,
            with_ids,
            storage,
        };
        let args = cache_read::Args {
            latent_cache: &latent_cache.region,
            id_cache: &id_cache.region,
            sequences: &sequences.region,
            latent: &latent.region,
            ids: &id_out.region,
            slots: &slot_out.region,
        };
        lab.launch(|recording| cache_read::encode(recording, &problem, args, tuning))?;
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
        let as_floats = |words: Vec<u32>| -> Vec<f32> { words.into_iter().map(|word| word as f32).collect() };
        let exact = |got: Vec<u32>, expected: Vec<u32>| {
            let expected: Vec<f64> = expected.into_iter().map(|word| f64::from(word as f32)).collect();
            super::compare(&as_floats(got), &expected, Tolerance::EXACT)
        };
        let mut comparisons = vec![
            lab.compare(&latent, &expected, Tolerance::EXACT)?,
            exact(slot_out.read(lab.kernels, lab.queue)?, row_slots.clone()),
        ];
        if with_ids {
            let id_of = |&slot: &u32| if slot == u32::MAX { 0 } else { ids[slot as usize] };
            let expected = row_slots.iter().map(id_of).collect();
            comparisons.push(exact(id_out.read(lab.kernels, lab.queue)?, expected));
        }
        Ok(comparisons)
    })
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
    let lengths: [(&str, &[(u32, u32)]); 5] = [
        ("t1", &[(0, 1)]),
        ("t33", &[(0, 33)]),
        ("ragged", &[(0, 1), (0, 31), (0, 17), (0, 65)]),
        ("chunk", &[(40, 9), (0, 5), (300, 18)]),
        ("t300", &[(0, 300)]),
    ];
    let widths: [Widths; 7] =
        [(1, 8, 4, 8), (3, 16, 8, 16), (9, 5, 2, 7), (2, 64, 32, 80), (1, 16, 0, 33), (2, 0, 8, 16), (63, 3, 2, 1)];
    for storage in Storage::ALL {
        for (index, &(n_head, d_nope, d_rope, d_value)) in widths.iter().enumerate() {
            for (which, (name, lengths)) in lengths.into_iter().enumerate() {
                // Every width meets the chunk, every length the plain width; the rest would repeat both.
                if index != 1 && which != 3 && !(index == 3 && which == 2) {
                    continue;
                }
                let id = format!("{name}_h{n_head}_{d_nope}+{d_rope}_v{d_value}/{}", storage.name());
                cases.push(Case::new("attention_prefill", id, move |lab| {
                    prefill(lab, lengths, (n_head, d_nope, d_rope, d_value), storage, 1.0, false)
                }));
            }
        }
    }
    // Logits of ±1e4 before the softmax: one key takes everything, nothing overflows.
    cases.push(Case::new("attention_prefill", "huge_logits/f32", |lab| {
        prefill(lab, &[(0, 40)], (2, 16, 8, 16), Storage::F32, 1e4, false)
    }));
    cases.push(Case::new("attention_prefill", "first_has_no_keys/f32", |lab| {
        prefill(lab, &[(0, 5), (0, 9)], (3, 16, 8, 16), Storage::F32, 1.0, true)
    }));
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
    lengths: &[(u32, u32)],
    (n_head, d_nope, d_rope, d_value): Widths,
    storage: Storage,
    spread: f32,
    first_has_no_keys: bool,
) -> Result<Vec<super::Outcome>> {
    let batch = Batch::new(lengths, 3);
    let slots = batch.slots();
    let (mut table, mut visible) = (batch.sequences.clone(), batch.visible());
    if first_has_no_keys {
        table[0].length = 0;
        visible[..batch.counts[0] as usize].fill(0..0);
    }
    let (d_query, d_kv) = (d_nope + d_rope, n_head * (d_nope + d_value));
    let tolerance = attention_tolerance(d_query, slots.len(), spread.into());
    let context = lab.kernels.context().clone();
    every_tuning(attention_prefill::SPEC.tunings, tolerance, |tuning| {
        let mut random = Random::new(SEED);
        let q_values = random.values(batch.tokens as usize * n_head * d_query, spread);
        let kv_values = random.values(slots.len() * d_kv, 1.0);
        let rope_values = random.values(slots.len() * d_rope, 1.0);
        let rope_kept = super::pack(&rope_values, storage).1;
        let q = lab.floats(&q_values)?;
        let rope_words = cache_rows(&rope_values, d_rope as u32, &slots, batch.cache_rows, storage);
        let rope_cache = lab.words(&[&rope_words[..], &[0]].concat())?;
        let sequences = lab.words(bytemuck::cast_slice(&table))?;
        let tiles = batch.query_tiles(attention_prefill::tile_q(&context, tuning)?);
        let queries = lab.words(bytemuck::cast_slice(&tiles))?;
        let slices = attention_prefill::slices(&context, tuning, d_value as u32)? as usize;
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
                let problem = attention_prefill::Problem {
                    tokens: batch.tokens,
                    query_tiles: tiles.len() as u32,
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
                attention_prefill::encode(recording, &problem, args, tuning)?;
            }
            Ok(())
        })?;
        let heads = reference::Heads { n_head, d_nope, d_rope, d_value };
        let expected = reference::attention_prefill(
            &widen(&q_values),
            &widen(&kv_values),
            &rope_kept,
            &visible,
            heads,
            scale.into(),
        );
        let state = softmax.read_f32(lab.kernels, lab.queue)?;
        let lse: Vec<f32> = state.chunks(2 * slices).map(|slices| slices[0] + slices[1].ln()).collect();
        Ok(vec![lab.compare(&values, &expected.values, tolerance)?, super::compare(&lse, &expected.lse, tolerance)])
    })
}

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
                cases.push(Case::new("attention_decode", id, move |lab| decode(lab, lengths, widths, storage)));
                let id = format!("{name}_h{n_head}_r{d_value}+{d_rope}/{}", storage.name());
                cases.push(Case::new("attention_absorbed", id, move |lab| absorbed(lab, lengths, widths, storage)));
            }
        }
    }
    // DeepSeek-V3's widths: the query is staged in several chunks.
    cases.push(Case::new("attention_absorbed", "t300_h5_r512+64/f16", |lab| {
        absorbed(lab, &[300], (5, 128, 64, 512), Storage::F16)
    }));
}

/// One new token a sequence, and a split behind the last one that holds no row at all.
fn one_new(lengths: &[u32]) -> Batch {
    let mut batch = Batch::new(&lengths.iter().map(|&length| (length - 1, 1)).collect::<Vec<_>>(), 3);
    batch.rows += SPLIT;
    batch
}

/// Splits of a batch in the order of their numbers: the query's token and the places it covers.
fn splits(batch: &Batch) -> Vec<(usize, Range<usize>)> {
    (0..batch.sequences.len())
        .flat_map(|index| {
            let places = batch.places(index);
            places
                .clone()
                .step_by(SPLIT as usize)
                .map(move |start| (index, start..places.end.min(start + SPLIT as usize)))
        })
        .chain([(batch.sequences.len() - 1, 0..0)])
        .collect()
}

fn decode(
    lab: &Lab<'_>,
    lengths: &[u32],
    (n_head, d_nope, d_rope, d_value): Widths,
    storage: Storage,
) -> Result<Vec<super::Outcome>> {
    let batch = one_new(lengths);
    let slots = batch.slots();
    let (d_query, d_kv) = (d_nope + d_rope, n_head * (d_nope + d_value));
    let tolerance = Tolerance::sums(&[d_query, SPLIT as usize]);
    every_tuning(attention_decode::SPEC.tunings, tolerance, |tuning| {
        let mut random = Random::new(SEED);
        let q_values = random.values(batch.tokens as usize * n_head * d_query, 1.0);
        let kv_values = random.values(slots.len() * d_kv, 1.0);
        let rope_values = random.values(slots.len() * d_rope, 1.0);
        let rope_kept = super::pack(&rope_values, storage).1;
        let q = lab.floats(&q_values)?;
        let rope_words = cache_rows(&rope_values, d_rope as u32, &slots, batch.cache_rows, storage);
        let rope_cache = lab.words(&[&rope_words[..], &[0]].concat())?;
        let sequences = lab.words(bytemuck::cast_slice(&batch.sequences))?;
        let partials = (batch.rows / SPLIT) as usize * n_head;
        let (values, softmax) = (lab.output(partials * d_value)?, lab.output(partials * 2)?);
        let scale = (d_query as f32).sqrt().recip();
        let tile_rows = 2 * SPLIT;
        let kv_tiles = (0..batch.rows)
            .step_by(tile_rows as usize)
            .map(|first| {
                let rows = tile_rows.min(batch.rows - first);
                Ok((first, rows, lab.floats(&batch.tile(&kv_values, d_kv, first, rows))?))
            })
            .collect::<Result<Vec<_>>>()?;
        lab.launch(|recording| {
            for (first, rows, kv) in &kv_tiles {
                let problem = attention_decode::Problem {
                    tokens: batch.tokens,
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
                };
                let args = attention_decode::Args {
                    q: &q.region,
                    kv: &kv.region,
                    rope_cache: &rope_cache.region,
                    sequences: &sequences.region,
                    partial_values: &values.region,
                    partial_softmax: &softmax.region,
                };
                attention_decode::encode(recording, &problem, args, tuning)?;
            }
            Ok(())
        })?;
        let heads = reference::Heads { n_head, d_nope, d_rope, d_value };
        let (q, kv) = (widen(&q_values), widen(&kv_values));
        let expected = reference::attention_decode(&q, &kv, &rope_kept, &splits(&batch), heads, scale.into());
        compare_partials(lab, &values, &softmax, &expected, tolerance)
    })
}

/// The kernels' mark of no key, the lowest f32, as −∞: as a number it would drown all others in the norm.
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
    let state = softmax.read_f32(lab.kernels, lab.queue)?;
    let (max, sum): (Vec<f32>, Vec<f32>) = state.chunks(2).map(|pair| (marked(pair[0].into()) as f32, pair[1])).unzip();
    let expected_max: Vec<f64> = expected.max.iter().copied().map(marked).collect();
    Ok(vec![
        lab.compare(values, &expected.values, tolerance)?,
        super::compare(&max, &expected_max, tolerance),
        super::compare(&sum, &expected.sum, tolerance),
    ])
}

fn absorbed(
    lab: &Lab<'_>,
    lengths: &[u32],
    (n_head, d_nope, d_rope, d_latent): Widths,
    storage: Storage,
) -> Result<Vec<super::Outcome>> {
    let batch = one_new(lengths);
    let slots = batch.slots();
    let tolerance = Tolerance::sums(&[d_latent + d_rope, SPLIT as usize]);
    every_tuning(attention_absorbed::SPEC.tunings, tolerance, |tuning| {
        let mut random = Random::new(SEED);
        let tokens = batch.tokens as usize;
        let a_values = random.values(tokens * n_head * d_latent, 1.0);
        let q_values = random.values(tokens * n_head * (d_nope + d_rope), 1.0);
        let latent_values = random.values(slots.len() * d_latent, 1.0);
        let rope_values = random.values(slots.len() * d_rope, 1.0);
        let (latent_kept, rope_kept) = (super::pack(&latent_values, storage).1, super::pack(&rope_values, storage).1);
        let (a, q) = (lab.floats(&a_values)?, lab.floats(&q_values)?);
        let latent_words = cache_rows(&latent_values, d_latent as u32, &slots, batch.cache_rows, storage);
        let rope_words = cache_rows(&rope_values, d_rope as u32, &slots, batch.cache_rows, storage);
        let latent_cache = lab.words(&latent_words)?;
        let rope_cache = lab.words(&[&rope_words[..], &[0]].concat())?;
        let sequences = lab.words(bytemuck::cast_slice(&batch.sequences))?;
        let splits_count = batch.rows / SPLIT;
        let partials = splits_count as usize * n_head;
        let (values, softmax) = (lab.output(partials * d_latent)?, lab.output(partials * 2)?);
        let scale = ((d_latent + d_rope) as f32).sqrt().recip();
        let problem = attention_absorbed::Problem {
            tokens: batch.tokens,
            n_sequence: batch.sequences.len() as u32,
            splits: splits_count,
            n_head: n_head as u32,
            d_latent: d_latent as u32,
            d_nope: d_nope as u32,
            d_rope: d_rope as u32,
            cache_rows: batch.cache_rows,
            scale,
            storage,
        };
        let args = attention_absorbed::Args {
            absorbed: &a.region,
            q: &q.region,
            latent_cache: &latent_cache.region,
            rope_cache: &rope_cache.region,
            sequences: &sequences.region,
            partial_values: &values.region,
            partial_softmax: &softmax.region,
        };
        lab.launch(|recording| attention_absorbed::encode(recording, &problem, args, tuning))?;
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

fn merges(cases: &mut Vec<Case>) {
    for (n_head, width) in [(1, 1), (3, 16), (9, 65), (2, 130)] {
        cases.push(Case::new("attention_merge", format!("h{n_head}_{width}"), move |lab| {
            let tolerance = Tolerance::sums(&[8]);
            every_tuning(attention_merge::SPEC.tunings, tolerance, |tuning| {
                let mut random = Random::new(SEED);
                // One split, several, none, and a token whose splits are all empty.
                let ranges = [0..1, 1..6, 6..6, 6..8];
                let splits = 8;
                let values = random.values(splits * n_head * width, 1.0);
                let mut partial = reference::Partial {
                    values: widen(&values),
                    max: widen(&random.values(splits * n_head, 3.0)),
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
                let problem = attention_merge::Problem {
                    tokens: ranges.len() as u32,
                    n_head: n_head as u32,
                    width: width as u32,
                    splits: splits as u32,
                };
                let args = attention_merge::Args {
                    partial_values: &partial_values.region,
                    partial_softmax: &partial_softmax.region,
                    ranges: &range_table.region,
                    values: &out.region,
                    lse: &lse.region,
                };
                lab.launch(|recording| attention_merge::encode(recording, &problem, args, tuning))?;
                let expected = reference::attention_merge(&partial, &ranges, n_head, width);
                // The kernel writes the lowest f32 where the reference says −∞.
                let got: Vec<f32> = lse
                    .read_f32(lab.kernels, lab.queue)?
                    .into_iter()
                    .map(|value| marked(value.into()) as f32)
                    .collect();
                Ok(vec![
                    lab.compare(&out, &expected.values, tolerance)?,
                    super::compare(&got, &expected.lse, tolerance),
                ])
            })
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table would be worthless if two cases shared a name or a kernel had none.
    #[test]
    fn ids_are_unique_and_every_kernel_has_cases() {
        let cases = crate::check::cases();
        let mut ids: Vec<_> = cases.iter().map(|case| case.id().to_owned()).collect();
        ids.sort();
        let before = ids.len();
        ids.dedup();
        assert_eq!(ids.len(), before);
        for spec in crate::kernels::REGISTRY {
            assert!(cases.iter().any(|case| case.kernel() == spec.name), "{} has no case", spec.name);
        }
    }

    #[test]
    fn a_forced_tuning_that_does_not_exist_is_refused() {
        let context = crate::plan::PlanContext::webgpu_defaults(crate::plan::AdapterClass::Discrete);
        assert!(attention_prefill::tile_q(&context, Tuning::Forced(99)).is_err());
    }
}

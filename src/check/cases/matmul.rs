//! Cases of `matmul`: tails of every tile, the layouts of the absorbed path, and operands with gaps.

use super::{SEED, each_variant};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::check::view::{Reading, View};
use crate::kernels::matmul;
use crate::kernels::matmul::Layout;
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

pub(super) fn cases(cases: &mut Vec<Case>) {
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
    let mut problems: Vec<(String, matmul::Matmul)> = Vec::new();
    for storage in Storage::ALL {
        // Neighbourhoods of any rows, then of rows of whole 16-byte loads, around the 16 k of a staged tile.
        for list in [&many[..], &few, &many_in_vec4, &few_in_vec4, &by_matrices] {
            problems.extend(list.iter().enumerate().map(|(index, &(rows, inner, cols))| {
                let op = matmul::Matmul::linear(rows, inner, cols, index % 2 == 1, storage);
                (format!("{rows}x{inner}x{cols}"), op)
            }));
        }
        for rows in [3, 34] {
            for n_head in [1, 3] {
                problems.push((format!("absorb_{rows}x{n_head}"), absorb(rows, n_head, storage)));
                problems.push((format!("fold_{rows}x{n_head}"), fold(rows, n_head, storage)));
            }
            problems.push((format!("apart_{rows}"), apart(rows, storage)));
        }
    }
    // x and y in f16; y a word of two columns at a time.
    for storage in Storage::ALL {
        for (index, (rows, inner, cols)) in
            [(1, 8, 2), (33, 24, 30), (65, 64, 62), (129, 40, 258)].into_iter().enumerate()
        {
            let op = matmul::Matmul::linear(rows, inner, cols, index % 2 == 1, storage);
            problems.push((format!("{rows}x{inner}x{cols}/y_f16"), in_halves(op)));
            let both = matmul::Matmul { x_storage: Storage::F16, ..in_halves(op) };
            problems.push((format!("{rows}x{inner}x{cols}/x_f16/y_f16"), both));
        }
        let (op, offset) = (apart(34, storage), 6);
        let op = matmul::Matmul { cols: 38, y: Layout { offset, ..op.y }, ..op };
        problems.push(("apart_34/y_f16".to_owned(), in_halves(op)));
        let x = Layout { offset: 8, row: 3 * 40, batch: 40, ..op.x };
        problems.push(("apart_34/x_f16".to_owned(), matmul::Matmul { x, x_storage: Storage::F16, ..op }));
    }
    for (index, (sizes, op)) in problems.iter().enumerate() {
        // Lists share some of their problems.
        if problems[..index].iter().all(|(_, other)| other != op) {
            product_cases(cases, sizes, *op, 1.0);
        }
    }
    // Sums on both sides of the largest half.
    for storage in Storage::ALL {
        let op = in_halves(matmul::Matmul::linear(40, 64, 48, true, storage));
        product_cases(cases, "beyond_40x64x48/y_f16", op, 1e4);
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
        x_storage: Storage::F32,
        y_storage: Storage::F32,
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
        x_storage: Storage::F32,
        y_storage: Storage::F32,
    }
}

fn in_halves(op: matmul::Matmul) -> matmul::Matmul {
    matmul::Matmul { y_storage: Storage::F16, ..op }
}

/// Aligned operands with gaps, three matrices each.
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
        x_storage: Storage::F32,
        y_storage: Storage::F32,
    }
}

/// `(x, w, bias, rows, inner, cols)` to `y`.
type Definition = fn(&[f64], &[f64], Option<&[f64]>, usize, usize, usize) -> Vec<f64>;

/// Values of x are `scale` wide.
fn product_cases(cases: &mut Vec<Case>, sizes: &str, p: matmul::Matmul, scale: f32) {
    let bias = if p.bias { "/bias" } else { "" };
    let id = format!("{sizes}/{}{bias}", p.storage.name());
    let (rows, inner, cols) = (p.rows as usize, p.inner as usize, p.cols as usize);
    let end = move |layout: Layout, rows: u32, inner: u32| {
        layout.offset + (rows - 1) * layout.row + (inner - 1) * layout.inner + (p.batch - 1) * layout.batch + 1
    };
    let halves = p.y_storage == Storage::F16;
    // WGSL does not say how pack2x16float rounds: a unit in the last place of f16 is 2^-10.
    let of_halves = if halves { 2f64.powi(-10) } else { 0.0 };
    let tolerance = Tolerance { relative: Tolerance::sums(&[inner]).relative + of_halves };
    let words = move |elements: usize| if halves { elements.div_ceil(2) } else { elements };
    each_variant(cases, id, p, move |lab, launch| {
        let reference: Definition = if launch.of_halves() { reference::matmul_of_halves } else { reference::matmul };
        let mut random = Random::new(SEED);
        let x_values = random.values(end(p.x, p.rows, p.inner) as usize, scale);
        let w_values = random.values(end(p.w, p.cols, p.inner) as usize, 1.0);
        let (x, x_kept) = lab.stored(&x_values, p.x_storage)?;
        let (w, w_kept) = lab.stored(&w_values, p.storage)?;
        let (bias, bias_kept) = lab.stored(&random.values(cols, 1.0), p.storage)?;
        let y = lab.output(words(end(p.y, p.rows, p.cols) as usize))?;
        let args = matmul::Args { x: &x.region, w: &w.region, bias: &bias.region, y: &y.region };
        launch.run(lab, args)?;
        let got = lab.read(&y)?;
        // Nothing else was written: neither before the offset nor between the rows.
        let elements = [f64::from(p.batch) * words(rows * cols) as f64];
        let written = View::all(Reading::Written, got.words.len());
        let count = lab.compare_views(&[(&got, written)], &elements, Tolerance::EXACT);
        std::iter::once(Ok(count))
            .chain((0..p.batch).map(|b| {
                let pick = |values: &[f64], layout: Layout, rows: u32, inner: u32| -> Vec<f64> {
                    let at = |m, k| layout.offset + b * layout.batch + m * layout.row + k * layout.inner;
                    (0..rows).flat_map(|m| (0..inner).map(move |k| at(m, k))).map(|i| values[i as usize]).collect()
                };
                let x = pick(&x_kept, p.x, p.rows, p.inner);
                let w = pick(&w_kept, p.w, p.cols, p.inner);
                let bias = p.bias.then_some(&bias_kept[..]);
                let mut expected = reference(&x, &w, bias, rows, inner, cols);
                if halves {
                    expected.iter_mut().for_each(|sum| *sum = sum.clamp(-65504.0, 65504.0));
                }
                let y = View {
                    reading: if halves { Reading::F16 } else { Reading::F32 },
                    first: (p.y.offset + b * p.y.batch) as usize,
                    counts: [rows, cols],
                    strides: [p.y.row as usize, p.y.inner as usize],
                };
                Ok(lab.compare_views(&[(&got, y)], &expected, tolerance))
            }))
            .collect()
    });
}

//! Products in f32 on the CPU: of several rows in tiles, by `matrixmultiply`; of one row by dot products in SIMD, which read each
//! weight once. Both are shared among threads where there is enough to do.

use ndarray::linalg::general_mat_mul;
use ndarray::parallel::prelude::*;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, ShapeBuilder as _};
use pulp::{Arch, Simd, WithSimd};
use rayon::slice::ParallelSliceMut as _;

use crate::weights::HostTensor;

/// Multiply-adds that are worth a thread: to wake one takes as long as some hundred thousand.
const SHARE: usize = 1 << 18;

/// Rows from which a product in tiles is faster, although it copies its factors.
const TILED: usize = 4;

/// Threads for so many multiply-adds.
fn threads(operations: usize) -> usize {
    rayon::current_num_threads().min(operations / SHARE).max(1)
}

/// Calls `each` with the number and the elements of every part of `length` elements, on several threads where all of them take
/// so many multiply-adds.
pub(super) fn for_each_part(
    out: &mut [f32],
    length: usize,
    operations: usize,
    each: impl Fn(usize, &mut [f32]) + Sync,
) {
    if threads(operations) < 2 {
        out.chunks_mut(length).enumerate().for_each(|(number, part)| each(number, part));
    } else {
        out.par_chunks_mut(length).enumerate().for_each(|(number, part)| each(number, part));
    }
}

/// Parts of `count` things for the threads that so many multiply-adds are worth.
pub(super) fn share(count: usize, operations: usize) -> usize {
    count.div_ceil(threads(operations)).max(1)
}

/// Rows of a slice, one every `stride` elements.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    /// Ends with the last row.
    data: &'a [f32],
    count: usize,
    width: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// `count` rows of `width`, one every `stride` elements, which are at least as many.
    pub fn strided(data: &'a [f32], count: usize, width: usize, stride: usize) -> Self {
        let end = if count == 0 { 0 } else { (count - 1) * stride + width };
        Rows { data: &data[..end], count, width, stride }
    }

    /// Rows of `width`, one behind the other.
    pub fn dense(data: &'a [f32], width: usize) -> Self {
        Rows::strided(data, data.len().checked_div(width).unwrap_or(0), width, width)
    }

    pub fn row(self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.width]
    }

    fn view(self) -> ArrayView2<'a, f32> {
        #[expect(clippy::expect_used, reason = "`strided` has cut the slice behind the last row")]
        ArrayView2::from_shape((self.count, self.width).strides((self.stride, 1)), self.data).expect("rows of a slice")
    }
}

/// A whole slice as rows of `width`.
fn view_mut(data: &mut [f32], width: usize) -> ArrayViewMut2<'_, f32> {
    let rows = data.len().checked_div(width).unwrap_or(0);
    #[expect(clippy::expect_used, reason = "so many rows are no longer than the slice")]
    ArrayViewMut2::from_shape((rows, width), data).expect("whole rows")
}

/// A linear layer: `y = x wᵀ + bias`.
#[derive(Debug)]
pub(super) struct Linear {
    /// `[cols, inner]`, as checkpoints have it.
    w: Vec<f32>,
    /// `[cols]`
    bias: Option<Vec<f32>>,
    inner: usize,
}

impl Linear {
    pub fn new(w: HostTensor, bias: Option<HostTensor>) -> Self {
        let inner = w.shape.last().copied().unwrap_or(1).max(1);
        Linear { w: w.data, bias: bias.map(|bias| bias.data), inner }
    }

    /// Rows of the weights.
    pub fn rows(&self, first: usize, count: usize) -> Rows<'_> {
        Rows::dense(&self.w[first * self.inner..][..count * self.inner], self.inner)
    }

    /// Width of an output.
    pub fn cols(&self) -> usize {
        self.w.len() / self.inner
    }

    /// `x` `[rows, inner]`; returns `[rows, cols]`.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let (x, cols) = (Rows::dense(x, self.inner), self.cols());
        let w = self.rows(0, cols);
        let mut y = vec![0.0; x.count * cols];
        if x.count < TILED {
            let part = share(cols, self.w.len());
            for (i, y) in y.chunks_exact_mut(cols).enumerate() {
                for_each_part(y, part, self.w.len(), |number, y| {
                    dot_products(x.row(i), self.rows(number * part, y.len()), y);
                });
            }
        } else {
            in_tiles(x, w, &mut y);
        }
        if let Some(bias) = &self.bias {
            for y in y.chunks_exact_mut(cols) {
                y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
        y
    }
}

/// `y = x wᵀ`, shared among threads by rows or by columns, whichever are more.
fn in_tiles(x: Rows<'_>, w: Rows<'_>, y: &mut [f32]) {
    let (x, w, mut y) = (x.view(), w.view(), view_mut(y, w.count));
    let product = |x: ArrayView2<'_, f32>, w: ArrayView2<'_, f32>, mut y: ArrayViewMut2<'_, f32>| {
        general_mat_mul(1.0, &x, &w.t(), 0.0, &mut y);
    };
    let operations = x.len().saturating_mul(w.nrows());
    if threads(operations) < 2 {
        product(x, w, y);
    } else if x.nrows() > w.nrows() {
        let part = share(x.nrows(), operations);
        let parts = y.axis_chunks_iter_mut(Axis(0), part).into_par_iter().zip(x.axis_chunks_iter(Axis(0), part));
        parts.for_each(|(y, x)| product(x, w, y));
    } else {
        let part = share(w.nrows(), operations);
        let parts = y.axis_chunks_iter_mut(Axis(1), part).into_par_iter().zip(w.axis_chunks_iter(Axis(0), part));
        parts.for_each(|(y, w)| product(x, w, y));
    }
}

/// Queries of one head or of several, and what they attend to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attending<'a> {
    /// Content part `[queries, d]`, times the scale of the scores.
    pub q: Rows<'a>,
    /// Rotary part `[queries, d_rope]`, times that scale.
    pub q_rope: Rows<'a>,
    /// `[rows, d]`
    pub keys: Rows<'a>,
    /// `[rows, d_rope]`
    pub k_rope: Rows<'a>,
    /// `[rows, d_value]`
    pub values: Rows<'a>,
}

impl Attending<'_> {
    /// `o = Σ_j softmax(q · k_j)_j v_j` over the first `visible(i)` rows of query i, at least 1 and growing with i; into `out`
    /// `[queries, d_value]`.
    pub fn attend(&self, visible: impl Fn(usize) -> usize, out: &mut [f32]) {
        let (queries, rows) = (self.q.count, self.keys.count);
        let factors = [(self.q, self.keys), (self.q_rope, self.k_rope)];
        // Tiles multiply what a query does not see by 0, which is NaN where that is not finite.
        let all_finite = || (visible(0)..rows).all(|row| self.values.row(row).iter().all(|value| value.is_finite()));
        let tiled = queries >= TILED && all_finite();
        let mut scores = vec![0.0; queries * rows];
        if tiled {
            for (q, keys) in factors.into_iter().filter(|(q, _)| q.width > 0) {
                general_mat_mul(1.0, &q.view(), &keys.view().t(), 1.0, &mut view_mut(&mut scores, rows));
            }
        }
        for (i, (scores, out)) in scores.chunks_exact_mut(rows).zip(out.chunks_exact_mut(self.values.width)).enumerate()
        {
            let (seen, unseen) = scores.split_at_mut(visible(i));
            if !tiled {
                for (q, keys) in factors {
                    add_dot_products(q.row(i), keys, seen);
                }
            }
            softmax(seen);
            unseen.fill(0.0);
            if !tiled {
                out.fill(0.0);
                add_weighted(seen, self.values, out);
            }
        }
        if tiled {
            let (scores, mut out) = (Rows::dense(&scores, rows), view_mut(out, self.values.width));
            general_mat_mul(1.0, &scores.view(), &self.values.view(), 0.0, &mut out);
        }
    }
}

/// Scores to weights of sum 1.
fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += f64::from(*score);
    }
    let factor = (1.0 / sum) as f32;
    scores.iter_mut().for_each(|weight| *weight *= factor);
}

/// `y[n] = x · w[n]`.
fn dot_products(x: &[f32], w: Rows<'_>, y: &mut [f32]) {
    y.fill(0.0);
    add_dot_products(x, w, y);
}

/// `y[n] += x · w[n]`, of the first rows where there are more than in `y`.
pub(super) fn add_dot_products(x: &[f32], w: Rows<'_>, y: &mut [f32]) {
    struct DotProducts<'a>(&'a [f32], Rows<'a>, &'a mut [f32]);
    impl WithSimd for DotProducts<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let DotProducts(x, w, y) = self;
            let (x_head, x_tail) = S::as_simd_f32s(x);
            for (n, y) in y.iter_mut().enumerate() {
                let (w_head, w_tail) = S::as_simd_f32s(w.row(n));
                // Four sums: a multiply-add waits for the one before it in its sum.
                let mut sums = [simd.splat_f32s(0.0); 4];
                let (x_blocks, x_rest) = x_head.as_chunks::<4>();
                let (w_blocks, w_rest) = w_head.as_chunks::<4>();
                for (x, w) in x_blocks.iter().zip(w_blocks) {
                    for (sum, (x, w)) in sums.iter_mut().zip(x.iter().zip(w)) {
                        *sum = simd.mul_add_f32s(*x, *w, *sum);
                    }
                }
                for (sum, (x, w)) in sums.iter_mut().zip(x_rest.iter().zip(w_rest)) {
                    *sum = simd.mul_add_f32s(*x, *w, *sum);
                }
                let sum = simd.add_f32s(simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3]));
                let tail: f32 = x_tail.iter().zip(w_tail).map(|(x, w)| x * w).sum();
                *y += simd.reduce_sum_f32s(sum) + tail;
            }
        }
    }
    Arch::new().dispatch(DotProducts(x, w, y));
}

/// `out += Σ_j weights[j] · rows[j]`.
pub(super) fn add_weighted(weights: &[f32], rows: Rows<'_>, out: &mut [f32]) {
    struct Weighted<'a>(&'a [f32], Rows<'a>, &'a mut [f32]);
    impl WithSimd for Weighted<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Weighted(weights, rows, out) = self;
            let (out_head, out_tail) = S::as_mut_simd_f32s(out);
            // Four rows for each load and store of the sums.
            let (blocks, rest) = weights.as_chunks::<4>();
            for (block, weights) in blocks.iter().enumerate() {
                let [a, b, c, d] = [0, 1, 2, 3].map(|i| S::as_simd_f32s(rows.row(4 * block + i)));
                let [wa, wb, wc, wd] = weights.map(|weight| simd.splat_f32s(weight));
                for ((((sum, a), b), c), d) in out_head.iter_mut().zip(a.0).zip(b.0).zip(c.0).zip(d.0) {
                    let ab = simd.mul_add_f32s(wb, *b, simd.mul_add_f32s(wa, *a, *sum));
                    *sum = simd.mul_add_f32s(wd, *d, simd.mul_add_f32s(wc, *c, ab));
                }
                for ((((sum, a), b), c), d) in out_tail.iter_mut().zip(a.1).zip(b.1).zip(c.1).zip(d.1) {
                    *sum += weights[0] * a + weights[1] * b + weights[2] * c + weights[3] * d;
                }
            }
            for (j, &weight) in (4 * blocks.len()..).zip(rest) {
                let (head, tail) = S::as_simd_f32s(rows.row(j));
                let of_all = simd.splat_f32s(weight);
                out_head.iter_mut().zip(head).for_each(|(sum, x)| *sum = simd.mul_add_f32s(of_all, *x, *sum));
                out_tail.iter_mut().zip(tail).for_each(|(sum, x)| *sum += weight * x);
            }
        }
    }
    Arch::new().dispatch(Weighted(weights, rows, out));
}

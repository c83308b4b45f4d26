//! Products in f32 on the CPU: of several rows in tiles, by `matrixmultiply`; of one row by dot products in SIMD, which read each
//! weight once. Both are shared among threads where there is enough to do. Weights may be halves: dot products widen them in
//! registers, tiles a panel at a time.

use ndarray::linalg::general_mat_mul;
use ndarray::parallel::prelude::*;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, ShapeBuilder as _};
use pulp::{Arch, Simd, WithSimd};
use rayon::slice::ParallelSliceMut as _;

use super::matrix::{BLOCK, Block, Matrix};
use crate::weights::HostTensor;

/// Multiply-adds that are worth a thread: to wake one takes as long as some hundred thousand.
const SHARE: usize = 1 << 18;

/// Rows from which a product in tiles is faster, although it copies its factors.
const TILED: usize = 4;

/// Elements of weights that a thread widens for its tiles at once, or [`PANEL_ROWS`] where those are more.
const PANEL: usize = 1 << 17;

/// Fewest rows of such a panel: tiles copy the other factor for each.
const PANEL_ROWS: usize = 16;

/// Bytes of the panels of all threads, of matrices with at most so many columns.
pub(super) fn panel_bytes(widest: u64) -> u64 {
    let panel = (PANEL as u64).max(widest.saturating_mul(PANEL_ROWS as u64));
    panel.saturating_mul(4 * rayon::current_num_threads() as u64)
}

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

/// Rows of a matrix, in whatever form it is in memory.
trait Weights: Copy + Send + Sync {
    type Block: Block;

    fn count(self) -> usize;

    fn width(self) -> usize;

    /// Rows `first..first + count`.
    fn part(self, first: usize, count: usize) -> Self;

    /// Whole blocks of a row, and the last one where that is filled up.
    fn blocks(&self, row: usize) -> &[Self::Block];

    /// What comes behind so many whole blocks of a row, filled up with zeros.
    fn rest(&self, row: usize, whole: usize) -> [f32; BLOCK];

    /// Rows that are widened at once.
    fn panel(self) -> usize;

    /// All rows in f32, from `buffer` where they are not.
    fn widened<'a>(&'a self, buffer: &'a mut Vec<f32>) -> Rows<'a>;
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

impl Weights for Rows<'_> {
    type Block = [f32; BLOCK];

    fn count(self) -> usize {
        self.count
    }

    fn width(self) -> usize {
        self.width
    }

    fn part(self, first: usize, count: usize) -> Self {
        Rows::strided(&self.data[first * self.stride..], count, self.width, self.stride)
    }

    #[inline(always)]
    fn blocks(&self, row: usize) -> &[[f32; BLOCK]] {
        self.row(row).as_chunks().0
    }

    fn rest(&self, row: usize, whole: usize) -> [f32; BLOCK] {
        padded(&self.row(row)[whole * BLOCK..])
    }

    fn panel(self) -> usize {
        self.count.max(1)
    }

    fn widened<'a>(&'a self, _: &'a mut Vec<f32>) -> Rows<'a> {
        *self
    }
}

/// Rows of blocks, one behind the other.
#[derive(Debug, Clone, Copy)]
struct Blocks<'a, B> {
    data: &'a [B],
    width: usize,
}

impl<B> Blocks<'_, B> {
    /// Blocks of a row.
    fn of_row(self) -> usize {
        self.width.div_ceil(BLOCK)
    }
}

impl<B: Block> Weights for Blocks<'_, B> {
    type Block = B;

    fn count(self) -> usize {
        self.data.len() / self.of_row()
    }

    fn width(self) -> usize {
        self.width
    }

    fn part(self, first: usize, count: usize) -> Self {
        Blocks { data: &self.data[first * self.of_row()..][..count * self.of_row()], ..self }
    }

    #[inline(always)]
    fn blocks(&self, row: usize) -> &[B] {
        &self.data[row * self.of_row()..][..self.of_row()]
    }

    fn rest(&self, row: usize, whole: usize) -> [f32; BLOCK] {
        self.blocks(row)[whole].wide()
    }

    fn panel(self) -> usize {
        (PANEL / self.width).max(PANEL_ROWS)
    }

    fn widened<'a>(&'a self, buffer: &'a mut Vec<f32>) -> Rows<'a> {
        buffer.resize(self.count() * self.width, 0.0);
        for (row, blocks) in buffer.chunks_exact_mut(self.width).zip(self.data.chunks_exact(self.of_row())) {
            for (elements, block) in row.chunks_mut(BLOCK).zip(blocks) {
                elements.copy_from_slice(&block.wide()[..elements.len()]);
            }
        }
        Rows::dense(buffer, self.width)
    }
}

/// A whole slice as rows of `width`.
fn view_mut(data: &mut [f32], width: usize) -> ArrayViewMut2<'_, f32> {
    let rows = data.len().checked_div(width).unwrap_or(0);
    #[expect(clippy::expect_used, reason = "so many rows are no longer than the slice")]
    ArrayViewMut2::from_shape((rows, width), data).expect("whole rows")
}

/// Calls a generic function with the rows of a linear layer, of whatever type their elements are.
macro_rules! with_rows {
    ($linear:expr, |$rows:ident| $call:expr) => {
        match (&$linear.w, $linear.inner) {
            (Matrix::F32(data), width) => {
                let $rows = Rows::dense(data, width);
                $call
            }
            (Matrix::F16(data), width) => {
                let $rows = Blocks { data, width };
                $call
            }
            (Matrix::Bf16(data), width) => {
                let $rows = Blocks { data, width };
                $call
            }
        }
    };
}

/// A linear layer: `y = x wᵀ + bias`.
#[derive(Debug)]
pub(super) struct Linear {
    /// `[cols, inner]`, as checkpoints have it.
    w: Matrix,
    /// `[cols]`
    bias: Option<Vec<f32>>,
    inner: usize,
}

impl Linear {
    pub fn new(w: HostTensor, bias: Option<HostTensor>) -> Self {
        let inner = w.shape.last().copied().unwrap_or(1).max(1);
        Linear { w: Matrix::new(w.data, inner), bias: bias.map(|bias| bias.data), inner }
    }

    /// Rows of the weights, one behind the other.
    pub fn gather(&self, rows: &[u32]) -> Vec<f32> {
        fn gather(w: impl Weights, rows: &[u32]) -> Vec<f32> {
            let mut buffer = Vec::new();
            rows.iter().flat_map(|&row| w.part(row as usize, 1).widened(&mut buffer).row(0).to_vec()).collect()
        }
        with_rows!(self, |w| gather(w, rows))
    }

    /// `out += Σ_j x[j] · w[first + j]`.
    pub fn add_weighted(&self, x: &[f32], first: usize, out: &mut [f32]) {
        with_rows!(self, |w| add_weighted(x, w.part(first, x.len()), out));
    }

    /// `y[n] += x · w[first + n]`.
    pub fn add_dot_products(&self, x: &[f32], first: usize, y: &mut [f32]) {
        with_rows!(self, |w| add_dot_products(x, w.part(first, y.len()), y));
    }

    /// Width of an output.
    pub fn cols(&self) -> usize {
        with_rows!(self, |w| w.count())
    }

    /// `x` `[rows, inner]`; returns `[rows, cols]`.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let (x, cols) = (Rows::dense(x, self.inner), self.cols());
        let mut y = vec![0.0; x.count * cols];
        with_rows!(self, |w| product(x, w, &mut y));
        if let Some(bias) = &self.bias {
            for y in y.chunks_exact_mut(cols) {
                y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
        y
    }
}

/// `y = x wᵀ`, for y of zeros.
fn product(x: Rows<'_>, w: impl Weights, y: &mut [f32]) {
    if x.count >= TILED {
        return in_tiles(x, w, y);
    }
    let operations = w.count() * w.width();
    let share = share(w.count(), operations);
    for (i, y) in y.chunks_exact_mut(w.count()).enumerate() {
        for_each_part(y, share, operations, |number, y| {
            add_dot_products(x.row(i), w.part(number * share, y.len()), y);
        });
    }
}

/// The same in tiles, shared among threads by rows or by columns, whichever are more.
fn in_tiles<W: Weights>(x: Rows<'_>, w: W, y: &mut [f32]) {
    let (x, mut y) = (x.view(), view_mut(y, w.count()));
    let product = |x: ArrayView2<'_, f32>, w: W, mut y: ArrayViewMut2<'_, f32>| {
        let (mut buffer, panel) = (Vec::new(), w.panel());
        for (number, mut y) in y.axis_chunks_iter_mut(Axis(1), panel).enumerate() {
            let w = w.part(number * panel, y.ncols());
            general_mat_mul(1.0, &x, &w.widened(&mut buffer).view().t(), 0.0, &mut y);
        }
    };
    let operations = x.len().saturating_mul(w.count());
    if threads(operations) < 2 {
        product(x, w, y);
    } else if x.nrows() > w.count() {
        let share = share(x.nrows(), operations);
        let parts = y.axis_chunks_iter_mut(Axis(0), share).into_par_iter().zip(x.axis_chunks_iter(Axis(0), share));
        parts.for_each(|(y, x)| product(x, w, y));
    } else {
        let share = share(w.count(), operations);
        y.axis_chunks_iter_mut(Axis(1), share).into_par_iter().enumerate().for_each(|(number, y)| {
            product(x, w.part(number * share, y.ncols()), y);
        });
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

/// Fewer elements than a block, and zeros.
fn padded(elements: &[f32]) -> [f32; BLOCK] {
    let mut block = [0.0; BLOCK];
    block[..elements.len()].copy_from_slice(elements);
    block
}

/// `y[n] += x · w[n]`, of the first rows where there are more than in `y`.
fn add_dot_products<W: Weights>(x: &[f32], w: W, y: &mut [f32]) {
    struct DotProducts<'a, W>(&'a [f32], W, &'a mut [f32]);
    impl<W: Weights> WithSimd for DotProducts<'_, W> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let DotProducts(x, w, y) = self;
            let (blocks, rest) = x.as_chunks::<BLOCK>();
            let whole = blocks.len();
            // Two sums of a row: a multiply-add waits for the one before it in its sum.
            let zero = [simd.splat_f32s(0.0); 2];
            let last = y.len().saturating_sub(1);
            // Four rows for each load of x, and as many streams from memory; the last again where there are fewer.
            for (number, y) in y.chunks_mut(4).enumerate() {
                let row = |i: usize| (4 * number + i).min(last);
                let [a, b, c, d] = [row(0), row(1), row(2), row(3)];
                let (mut of_a, mut of_b, mut of_c, mut of_d) = (zero, zero, zero, zero);
                let [w_a, w_b] = [&w.blocks(a)[..whole], &w.blocks(b)[..whole]];
                let [w_c, w_d] = [&w.blocks(c)[..whole], &w.blocks(d)[..whole]];
                for (i, x) in blocks.iter().enumerate() {
                    add_products(simd, x, &w_a[i], &mut of_a);
                    add_products(simd, x, &w_b[i], &mut of_b);
                    add_products(simd, x, &w_c[i], &mut of_c);
                    add_products(simd, x, &w_d[i], &mut of_d);
                }
                if !rest.is_empty() {
                    let x = padded(rest);
                    add_products(simd, &x, &w.rest(a, whole), &mut of_a);
                    add_products(simd, &x, &w.rest(b, whole), &mut of_b);
                    add_products(simd, &x, &w.rest(c, whole), &mut of_c);
                    add_products(simd, &x, &w.rest(d, whole), &mut of_d);
                }
                for (y, [first, second]) in y.iter_mut().zip([of_a, of_b, of_c, of_d]) {
                    *y += simd.reduce_sum_f32s(simd.add_f32s(first, second));
                }
            }
        }
    }
    Arch::new().dispatch(DotProducts(x, w, y));
}

/// Adds products of a block, to a sum of its first half and one of its second.
#[inline(always)]
fn add_products<S: Simd>(simd: S, x: &[f32; BLOCK], w: &impl Block, sums: &mut [S::f32s; 2]) {
    for i in 0..BLOCK / 2 / S::F32_LANES {
        let ([x, y], [w, v]) = (x.vectors(simd, i), w.vectors(simd, i));
        *sums = [simd.mul_add_f32s(x, w, sums[0]), simd.mul_add_f32s(y, v, sums[1])];
    }
}

/// `out += Σ_j weights[j] · rows[j]`.
fn add_weighted<W: Weights>(weights: &[f32], rows: W, out: &mut [f32]) {
    struct Weighted<'a, W>(&'a [f32], W, &'a mut [f32]);
    impl<W: Weights> WithSimd for Weighted<'_, W> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Weighted(weights, rows, out) = self;
            let (blocks, rest) = out.as_chunks_mut::<BLOCK>();
            let whole = blocks.len();
            // Four rows for each load and store of the sums.
            let (quads, single) = weights.as_chunks::<4>();
            for (number, &[a, b, c, d]) in quads.iter().enumerate() {
                let row = |i: usize| &rows.blocks(4 * number + i)[..whole];
                let [of_a, of_b, of_c, of_d] = [row(0), row(1), row(2), row(3)];
                for (i, sums) in blocks.iter_mut().enumerate() {
                    add_times(simd, a, &of_a[i], sums);
                    add_times(simd, b, &of_b[i], sums);
                    add_times(simd, c, &of_c[i], sums);
                    add_times(simd, d, &of_d[i], sums);
                }
            }
            for (row, &weight) in (4 * quads.len()..).zip(single) {
                let elements = &rows.blocks(row)[..whole];
                for (i, sums) in blocks.iter_mut().enumerate() {
                    add_times(simd, weight, &elements[i], sums);
                }
            }
            if !rest.is_empty() {
                let mut sums = padded(rest);
                for (row, &weight) in weights.iter().enumerate() {
                    add_times(simd, weight, &rows.rest(row, whole), &mut sums);
                }
                rest.copy_from_slice(&sums[..rest.len()]);
            }
        }
    }
    Arch::new().dispatch(Weighted(weights, rows, out));
}

/// Adds a block times a factor.
#[inline(always)]
fn add_times<S: Simd>(simd: S, factor: f32, elements: &impl Block, sums: &mut [f32; BLOCK]) {
    let factor = simd.splat_f32s(factor);
    let sums = S::as_mut_simd_f32s(sums).0;
    let half = BLOCK / 2 / S::F32_LANES;
    for i in 0..half {
        let [first, second] = elements.vectors(simd, i);
        sums[i] = simd.mul_add_f32s(factor, first, sums[i]);
        sums[half + i] = simd.mul_add_f32s(factor, second, sums[half + i]);
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::random::Random;

    /// Sizes of blocks, of their rests, of several panels, and of enough for two threads.
    const SIZES: [[usize; 2]; 8] = [[1, 1], [3, 7], [5, 31], [4, 33], [9, 100], [2, 576], [40, 9000], [1025, 513]];

    #[test]
    fn halves_give_the_sums_of_f32_bit_by_bit() {
        let mut random = Random::new(1);
        for [cols, inner] in SIZES {
            for round in [|value| f16::from_f32(value).to_f32(), |value| bf16::from_f32(value).to_f32()] {
                let w: Vec<f32> = random.values(cols * inner, 1.0).into_iter().map(round).collect();
                let halves = Linear { w: Matrix::new(w.clone(), inner), bias: None, inner };
                assert!(!matches!(halves.w, Matrix::F32(_)));
                let wide = Linear { w: Matrix::F32(w), bias: None, inner };
                let same = |of: &dyn Fn(&Linear) -> Vec<f32>| {
                    let bits = |linear| of(linear).into_iter().map(f32::to_bits).collect::<Vec<_>>();
                    assert_eq!(bits(&halves), bits(&wide), "{cols} x {inner}");
                };
                for rows in [1, 3, TILED, 12] {
                    let x = random.values(rows * inner, 1.0);
                    same(&|linear| linear.apply(&x));
                }
                let (x, first) = (random.values(cols.max(inner), 1.0), cols / 2);
                let added = |width: usize, add: &dyn Fn(&mut [f32])| {
                    let mut sums = vec![0.5; width];
                    add(&mut sums);
                    sums
                };
                same(&|linear| linear.gather(&[0, first as u32]));
                same(&|linear| added(inner, &|sums| linear.add_weighted(&x[..cols - first], first, sums)));
                same(&|linear| added(cols - first, &|sums| linear.add_dot_products(&x[..inner], first, sums)));
            }
        }
    }
}

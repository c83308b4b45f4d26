//! Row-major matrices in f64: products and eigenvectors, of nalgebra.

use std::num::NonZero;

use nalgebra::{DMatrix, DMatrixView, DMatrixViewMut, Dyn, SymmetricEigen};

use crate::error::{DataError, Error, Result};

/// A matrix `[rows, cols]`, row-major.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// `rows · cols` elements.
    pub data: Vec<f64>,
}

/// A matrix as it is, or transposed.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    rows: usize,
    cols: usize,
    /// Elements from one row to the next, and from one column to the next.
    strides: (usize, usize),
    data: &'a [f64],
}

impl<'a> View<'a> {
    /// Rows of `cols` elements.
    pub fn new(data: &'a [f64], cols: usize) -> Self {
        View { rows: data.len() / cols.max(1), cols, strides: (cols, 1), data }
    }

    /// Transposed.
    pub fn t(self) -> Self {
        View { rows: self.cols, cols: self.rows, strides: (self.strides.1, self.strides.0), data: self.data }
    }

    fn at(&self, row: usize, col: usize) -> f64 {
        self.data[row * self.strides.0 + col * self.strides.1]
    }

    fn rows(self, first: usize, rows: usize) -> Self {
        View { rows, data: &self.data[first * self.strides.0..], ..self }
    }

    /// Its transpose as nalgebra has matrices, column by column.
    fn transposed(&self) -> DMatrixView<'a, f64, Dyn, Dyn> {
        DMatrixView::from_slice_with_strides(self.data, self.cols, self.rows, self.strides.1, self.strides.0)
    }
}

impl Matrix {
    /// Zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Matrix { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Rows of `cols` elements.
    pub fn of(data: Vec<f64>, cols: usize) -> Self {
        Matrix { rows: data.len() / cols.max(1), cols, data }
    }

    /// As it is.
    pub fn view(&self) -> View<'_> {
        View::new(&self.data, self.cols)
    }

    /// Transposed.
    pub fn t(&self) -> View<'_> {
        self.view().t()
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f64] {
        &self.data[row * self.cols..][..self.cols]
    }

    /// One row, to write to.
    pub fn row_mut(&mut self, row: usize) -> &mut [f64] {
        &mut self.data[row * self.cols..][..self.cols]
    }

    /// Multiplies each row by its factor.
    pub fn scale_rows(&mut self, factors: &[f64]) {
        for (row, factor) in self.data.chunks_exact_mut(self.cols.max(1)).zip(factors) {
            row.iter_mut().for_each(|value| *value *= factor);
        }
    }

    /// Multiplies each column by its factor.
    pub fn scale_cols(&mut self, factors: &[f64]) {
        for row in self.data.chunks_exact_mut(self.cols.max(1)) {
            row.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
        }
    }

    /// Sum of the squares.
    pub fn energy(&self) -> f64 {
        self.data.iter().map(|value| value * value).sum()
    }

    /// Rows as columns.
    pub fn transposed(&self) -> Matrix {
        let column = |col: usize| self.data.iter().skip(col).step_by(self.cols.max(1)).copied();
        Matrix::of((0..self.cols).flat_map(column).collect(), self.rows)
    }

    /// The first `cols` columns.
    pub fn first_cols(&self, cols: usize) -> Matrix {
        Matrix::of(self.data.chunks_exact(self.cols).flat_map(|row| &row[..cols]).copied().collect(), cols)
    }
}

/// Adds a bias to every row.
pub(super) fn add_bias(rows: &mut Matrix, bias: &Option<Vec<f64>>) {
    if let Some(bias) = bias {
        for row in rows.data.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
        }
    }
}

/// `a · b`, its rows shared among threads where there is enough to do. The number of threads changes no sum's order.
pub fn product(a: View<'_>, b: View<'_>) -> Matrix {
    /// Multiply-adds that are worth a thread.
    const SHARE: usize = 1 << 20;
    /// Of an extent up to it the plain sum serves.
    const FEW: usize = 8;
    let (rows, inner, cols) = (a.rows, a.cols, b.cols);
    let mut out = Matrix::zeros(rows, cols);
    if rows == 0 || inner == 0 || cols == 0 {
        return out;
    }
    if rows.min(inner).min(cols) <= FEW {
        for (row, out) in out.data.chunks_exact_mut(cols).enumerate() {
            for (col, out) in out.iter_mut().enumerate() {
                *out = (0..inner).map(|at| a.at(row, at) * b.at(at, col)).sum();
            }
        }
        return out;
    }
    // cᵀ = bᵀ aᵀ: what is row-major is the transpose of what nalgebra takes.
    let part = |a: View<'_>, out: &mut [f64]| {
        DMatrixViewMut::from_slice(out, cols, a.rows).gemm(1.0, &b.transposed(), &a.transposed(), 0.0);
    };
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = threads.min(rows.saturating_mul(inner).saturating_mul(cols) / SHARE).min(rows / FEW);
    if threads < 2 {
        part(a, &mut out.data);
        return out;
    }
    let share = rows.div_ceil(threads);
    std::thread::scope(|scope| {
        for (at, out) in out.data.chunks_mut(share * cols).enumerate() {
            let a = a.rows(at * share, out.len() / cols);
            scope.spawn(move || part(a, out));
        }
    });
    out
}

/// Eigenvalues of a symmetric matrix, largest first, and its eigenvectors as columns in their order.
///
/// # Errors
/// `DataError::Input` for a matrix of numbers that are not finite.
pub fn eigen(symmetric: &Matrix) -> Result<(Vec<f64>, Matrix)> {
    let n = symmetric.rows;
    let failed =
        || Error::Data(DataError::Input("activations are not finite: the model cannot be converted".to_owned()));
    if symmetric.data.iter().any(|value| !value.is_finite()) {
        return Err(failed());
    }
    let matrix = DMatrix::from_column_slice(n, n, &symmetric.data);
    let found = SymmetricEigen::try_new(matrix, f64::EPSILON, 1000 * n.max(1)).ok_or_else(failed)?;
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| found.eigenvalues[b].total_cmp(&found.eigenvalues[a]));
    let mut vectors = Matrix::zeros(n, n);
    for (to, &from) in order.iter().enumerate() {
        for row in 0..n {
            vectors.data[row * n + to] = found.eigenvectors[(row, from)];
        }
    }
    Ok((order.iter().map(|&from| found.eigenvalues[from]).collect(), vectors))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::reference::matmul;

    fn values(n: usize, seed: u64) -> Vec<f64> {
        let mut random = fastrand::Rng::with_seed(seed);
        (0..n).map(|_| random.f64() - 0.5).collect()
    }

    #[test]
    fn products_are_those_of_the_definition() {
        for (m, k, n) in [(1, 3, 2), (7, 5, 9), (160, 130, 170), (300, 70, 65), (2, 0, 3)] {
            let (x, w) = (Matrix::of(values(m * k, 1), k), Matrix::of(values(n * k, 2), k));
            let expected = if k == 0 { vec![0.0; m * n] } else { matmul(&x.data, &w.data, None, m, k, n) };
            let w = Matrix { rows: n, ..w };
            let x = Matrix { rows: m, ..x };
            let (w_view, x_view) = (View { rows: n, ..w.view() }, View { rows: m, ..x.view() });
            let found = product(x_view, w_view.t());
            assert_eq!((found.rows, found.cols), (m, n));
            for (found, expected) in found.data.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-12);
            }
        }
        // Transposed on the left.
        let x = Matrix::of(values(30 * 7, 3), 7);
        let gram = product(x.t(), x.view());
        let expected: f64 = (0..30).map(|row| x.row(row)[2] * x.row(row)[5]).sum();
        assert!((gram.row(2)[5] - expected).abs() < 1e-12);
    }

    #[test]
    fn eigenvectors_rebuild_the_matrix() {
        let x = Matrix::of(values(40 * 12, 4), 12);
        let gram = product(x.t(), x.view());
        let (values, vectors) = eigen(&gram).unwrap();
        assert!(values.windows(2).all(|pair| pair[0] >= pair[1]));
        let mut scaled = vectors.clone();
        scaled.scale_cols(&values);
        let rebuilt = product(scaled.view(), vectors.t());
        assert!(rebuilt.data.iter().zip(&gram.data).all(|(a, b)| (a - b).abs() < 1e-12));
        assert!(eigen(&Matrix::of(vec![f64::NAN; 4], 2)).is_err());
    }
}

//! Copies cache rows from one cache to another.

/// `sink[to + i] = source[from + i]` for `i < rows`: both `[capacity, width]`.
pub fn cache_move(source: &[f64], sink: &mut [f64], width: usize, from: usize, to: usize, rows: usize) {
    sink[to * width..(to + rows) * width].copy_from_slice(&source[from * width..(from + rows) * width]);
}

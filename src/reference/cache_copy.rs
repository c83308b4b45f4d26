//! Copies cache rows within a cache.

/// `cache[to + i] = cache[from + i]` for `i < rows`, as if read whole before it is written: `cache` `[capacity, width]`.
pub fn cache_copy(cache: &mut [f64], width: usize, from: usize, to: usize, rows: usize) {
    cache.copy_within(from * width..(from + rows) * width, to * width);
}

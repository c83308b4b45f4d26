//! Reads cache rows.

/// `y[i] = cache[slots[i]]`: `cache` `[capacity, width]`, `slots` `[rows]`; returns `[rows, width]`.
pub fn cache_read(cache: &[f64], width: usize, slots: &[u32]) -> Vec<f64> {
    slots.iter().flat_map(|&slot| &cache[slot as usize * width..][..width]).copied().collect()
}

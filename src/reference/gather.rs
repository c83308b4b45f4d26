//! Looks embeddings up by id.

/// `y[i] = table[ids[i]]`: `table` `[vocab, width]`, `ids` `[tokens]`; returns `[tokens, width]`.
pub fn gather(table: &[f64], width: usize, ids: &[u32]) -> Vec<f64> {
    ids.iter().flat_map(|&id| &table[id as usize * width..][..width]).copied().collect()
}

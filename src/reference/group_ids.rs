//! Lists ids without a resident gate row.

/// The ids of `entries` (an id and whether its row is resident; `None` is padding), `u32::MAX` where nothing is to do.
pub fn group_ids(entries: &[Option<(u32, bool)>]) -> Vec<u32> {
    entries.iter().map(|entry| entry.filter(|(_, resident)| !resident).map_or(u32::MAX, |(id, _)| id)).collect()
}

//! A step of the grouped decode: token ids, their gate rows, and the lists that the host writes.

use std::ops::Range;

use crate::attention::groups::{Groups, Layout, NO_ROW, Patch};
use crate::check::guarded::POISON;
use crate::kernels::attention_grouped::{GroupedSequence, SEQUENCE_WORDS, Tiling};
use crate::reference;

/// Token ids of a sequence.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ids {
    Equal,
    Distinct,
    /// A third of the cache holds one id, a few ids recur, most are alone.
    Skewed,
    /// Few ids often, many now and then.
    Text,
}

impl Ids {
    fn id(self, position: u32) -> u32 {
        match self {
            Ids::Equal => 3,
            Ids::Distinct => position,
            Ids::Skewed if position % 3 == 1 => 5,
            Ids::Skewed if position % 3 == 2 => position % 11,
            Ids::Skewed => 20 + position,
            // Half of the positions hold a few ids, the other half one of a thousand.
            Ids::Text if position.is_multiple_of(2) => (position / 2) % 7,
            Ids::Text => 10 + position.wrapping_mul(2_654_435_761) % 1000,
        }
    }
}

/// Sources of gate rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sources {
    /// Those of odd ids are resident.
    Both,
    Resident,
    Further,
}

impl Sources {
    pub(super) fn resident(self, id: u32) -> bool {
        match self {
            Sources::Both => id % 2 == 1,
            Sources::Resident => true,
            Sources::Further => false,
        }
    }
}

/// A step of the grouped decode: lists as the host would have written them, and the same for the reference.
pub(super) struct GroupedBatch {
    pub(super) words: Vec<u32>,
    pub(super) table: u32,
    pub(super) entries: u32,
    pub(super) partials: u32,
    pub(super) groups: u32,
    /// Items in the order of their partial results; a group's gate row is its row in the step's numbering.
    pub(super) expected: Vec<reference::GroupedItem>,
    /// Gate rows in the step's numbering, with the id, `None` where there is no group.
    pub(super) ids: Vec<Option<u32>>,
    pub(super) cache_rows: u32,
    pub(super) tokens: u32,
}

impl GroupedBatch {
    /// `sequences` are lengths; the last `queries` tokens of each are new; a resident gate row has the number of its id.
    pub(super) fn new(
        sequences: &[(u32, Ids)],
        (queries, passes): (u32, u32),
        tiling: Tiling,
        sources: Sources,
    ) -> Option<Self> {
        let capacity = sequences.iter().map(|(length, _)| *length).max()? + 1;
        let layout = Layout::new(capacity)?;
        let table = 5;
        let first = table + sequences.len() as u32 * SEQUENCE_WORDS;
        let total = first + sequences.len() as u32 * layout.words;
        let mut batch = GroupedBatch {
            words: vec![POISON; total as usize],
            table,
            entries: 0,
            partials: 0,
            groups: 0,
            expected: Vec::new(),
            ids: Vec::new(),
            cache_rows: capacity * sequences.len() as u32,
            tokens: 0,
        };
        let mut of_pass: Vec<(Range<usize>, u32)> = Vec::new();
        for (line, &(length, ids)) in (0..).zip(sequences) {
            let base = first + line * layout.words;
            let mut groups = Groups::new(layout);
            let mut patches: Vec<Patch> = Vec::new();
            let mut lists: Vec<(u32, Vec<usize>)> = Vec::new();
            for position in 0..length {
                let id = ids.id(position);
                let row = || if sources.resident(id) { id } else { NO_ROW };
                let group = groups.append(id, row, base, &mut patches);
                patches.extend(groups.count_patch(group, base));
                if group as usize == lists.len() {
                    lists.push((id, Vec::new()));
                }
                lists[group as usize].1.push((line * capacity + position) as usize);
            }
            let tokens = queries.min(length);
            let tiles = groups.groups().div_ceil(tiling.groups);
            let (tile_entries, chunk_entries) = (tiles.div_ceil(tiling.span), groups.chunks().div_ceil(tiling.span));
            let entry = GroupedSequence {
                first_entry: batch.entries,
                tiles,
                groups: groups.groups(),
                base,
                first_slot: line * capacity,
                position: length - tokens,
                token: batch.tokens,
                tokens,
                partial: batch.partials,
                tile_entries,
                first_group: batch.groups,
                chunks: groups.chunks(),
                chunk_word: layout.chunks,
                chunk_entries,
                unused: [0; 2],
            };
            let entry: [u32; SEQUENCE_WORDS as usize] = bytemuck::cast(entry);
            batch.words[(table + line * SEQUENCE_WORDS) as usize..][..entry.len()].copy_from_slice(&entry);
            patches.iter().for_each(|&[word, value]| batch.words[word as usize] = value);

            // Tiles hold the first 64 positions of a group, chunks the next ones in the order in which they came.
            let mut chunks: Vec<(usize, Vec<usize>)> = Vec::new();
            for (group, (_, rows)) in lists.iter().enumerate() {
                chunks.extend(rows.get(64..).unwrap_or_default().chunks(256).map(|rows| (group, rows.to_vec())));
            }
            chunks.sort_by_key(|(_, rows)| rows[0]);
            let groups_of_tiles: Vec<_> = lists
                .iter()
                .enumerate()
                .map(|(group, (_, rows))| (group, rows[..rows.len().min(64)].to_vec()))
                .collect();
            let in_items = |groups: &[(usize, Vec<usize>)], each: u32| -> Vec<Vec<(usize, Vec<usize>)>> {
                groups.chunks(each as usize).map(<[_]>::to_vec).collect()
            };
            for query in 0..tokens {
                let last = (line * capacity + length - tokens + query) as usize;
                // Tiles belong to one pass; the chunks of an item have a partial result of every pass.
                let items = in_items(&groups_of_tiles, tiling.groups * tiling.span);
                let first = batch.expected.len() + items.len();
                let of_chunks = in_items(&chunks, tiling.span);
                for pass in 0..passes {
                    let items = first + pass as usize * of_chunks.len()..first + (pass as usize + 1) * of_chunks.len();
                    of_pass.push((items, pass));
                }
                let every_pass = (0..passes).flat_map(|_| of_chunks.clone());
                for item in items.into_iter().chain(every_pass) {
                    let seen = item.into_iter().map(|(group, rows)| {
                        let rows = rows.into_iter().filter(|&row| row <= last).collect();
                        (batch.groups as usize + group, rows)
                    });
                    let token = (batch.tokens + query) as usize;
                    batch.expected.push(reference::GroupedItem { token, groups: seen.collect() });
                }
            }
            let padded = groups.groups().next_multiple_of(tiling.groups * tiling.span);
            batch.ids.extend((0..padded as usize).map(|group| lists.get(group).map(|(id, _)| *id)));
            batch.entries += tile_entries + chunk_entries;
            batch.partials += tokens * (tile_entries + passes * chunk_entries);
            batch.groups += padded;
            batch.tokens += tokens;
        }
        let pass_rows = batch.groups.div_ceil(passes).next_multiple_of(tiling.groups * tiling.span).max(1);
        for (items, pass) in of_pass {
            let own = |group: usize| group as u32 / pass_rows == pass;
            batch.expected[items].iter_mut().for_each(|item| item.groups.retain(|(group, _)| own(*group)));
        }
        Some(batch)
    }
}

//! Cached positions by token id, updated per token: the lists that the grouped decode walks over.
//!
//! The gate of EG-MLA depends on the token id alone, so positions of one id share their absorbed query. The lists are in device
//! memory, one region of words per sequence:
//!
//! ```text
//! headers   [capacity][8]   id, count, gate row, word of tier 1, word of tier 2, positions 0 … 2 of the group
//! tiers     [4 · capacity]  13 words for positions 3 … 15 of a group, 48 words for positions 16 … 63
//! chunks    [capacity / 65][4 + 256]  group, index of its first position, 2 unused; then positions 64 … of a group, 256 per chunk
//! ```
//!
//! An appended position changes a few words, whatever the length: the host keeps the same lists without the positions, and a
//! step uploads (word, value) pairs. Allocation is first in, last out: a roll back frees exactly what its tokens took.

use std::collections::HashMap;
use std::mem::offset_of;

use crate::kernels::attention_grouped::{
    CHUNK_LENGTH, CHUNK_WORDS, GroupChunk, GroupHeader, HEADER_WORDS, INLINE_LENGTH, TIER_1_LENGTH, TIER_2_LENGTH,
    TILE_LENGTH, word,
};

const HEADER_ID: u32 = word(offset_of!(GroupHeader, id));
const HEADER_COUNT: u32 = word(offset_of!(GroupHeader, count));
const HEADER_GATE_ROW: u32 = word(offset_of!(GroupHeader, gate_row));
const HEADER_TIER_1: u32 = word(offset_of!(GroupHeader, tier_1));
const HEADER_TIER_2: u32 = word(offset_of!(GroupHeader, tier_2));
const HEADER_POSITIONS: u32 = word(offset_of!(GroupHeader, positions));
const CHUNK_GROUP: u32 = word(offset_of!(GroupChunk, group));
const CHUNK_FIRST: u32 = word(offset_of!(GroupChunk, first));
const CHUNK_POSITIONS: u32 = word(offset_of!(GroupChunk, positions));
/// Positions that come before those of the second tier.
const BEFORE_TIER_2: u32 = INLINE_LENGTH + TIER_1_LENGTH;
/// Words of tiers that a position may take.
const TIER_WORDS: u32 = 4;

/// Stands where a group has no row of its own among the resident gate rows.
pub(crate) const NO_ROW: u32 = u32::MAX;

/// A word of the lists and its new value.
pub(crate) type Patch = [u32; 2];

/// Words of one sequence's region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    pub tiers: u32,
    pub chunks: u32,
    pub words: u32,
}

impl Layout {
    /// `None` when the words do not fit 32 bits.
    pub fn new(capacity: u32) -> Option<Self> {
        let tiers = capacity.checked_mul(HEADER_WORDS)?;
        // A group of n positions has taken 13 words from n = 4 on and 61 from n = 17 on: below 4 a position.
        let chunks = tiers.checked_add(capacity.checked_mul(TIER_WORDS)?)?;
        // A group of n positions has a chunk from n = 65 on, and one more every 256.
        let words = chunks.checked_add((capacity / (TILE_LENGTH + 1)).checked_mul(CHUNK_WORDS)?)?;
        Some(Layout { tiers, chunks, words })
    }

    /// Most chunks.
    pub fn most_chunks(&self) -> u32 {
        (self.words - self.chunks) / CHUNK_WORDS
    }

    fn chunk(&self, index: u32) -> u32 {
        self.chunks + index * CHUNK_WORDS
    }
}

#[derive(Debug, Clone, Copy)]
struct Group {
    count: u32,
    gate_row: u32,
    tier_1: u32,
    tier_2: u32,
    /// Chunk of its last position.
    chunk: u32,
}

/// The group lists of one sequence on the host.
#[derive(Debug, Clone)]
pub(crate) struct Groups {
    layout: Layout,
    of_id: HashMap<u32, u32>,
    groups: Vec<Group>,
    /// Token id of every position, for roll back.
    ids: Vec<u32>,
    /// Words of the tiers that are taken.
    tiers: u32,
    /// Previous chunk of each chunk's group.
    chunks: Vec<u32>,
}

/// Changes of rolling one position back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Popped {
    pub group: u32,
    /// Gate row of the group, if the group ended with this position.
    pub gone: Option<u32>,
}

impl Groups {
    pub fn new(layout: Layout) -> Self {
        let (of_id, groups, ids, chunks) = Default::default();
        Groups { layout, of_id, groups, ids, tiers: 0, chunks }
    }

    /// Token id of every position.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Positions held.
    pub fn len(&self) -> u32 {
        self.ids.len() as u32
    }

    /// Distinct ids.
    pub fn groups(&self) -> u32 {
        self.groups.len() as u32
    }

    /// Chunks of groups that hold more than a tile takes.
    pub fn chunks(&self) -> u32 {
        self.chunks.len() as u32
    }

    pub fn gate_row(&self, group: u32) -> u32 {
        self.groups[group as usize].gate_row
    }

    /// Adds the next position. A new id asks for its `gate_row`. Changed words go to `patches`, counted from `base`, except the
    /// group's count, which is due once per step ([`Groups::count_patch`]).
    pub fn append(&mut self, id: u32, gate_row: impl FnOnce() -> u32, base: u32, patches: &mut Vec<Patch>) -> u32 {
        let position = self.len();
        self.ids.push(id);
        let next = self.groups.len() as u32;
        let index = *self.of_id.entry(id).or_insert(next);
        let new = index == next;
        let header = base + index * HEADER_WORDS;
        if new {
            let gate_row = gate_row();
            self.groups.push(Group { count: 0, gate_row, tier_1: 0, tier_2: 0, chunk: 0 });
            patches.push([header + HEADER_ID, id]);
            patches.push([header + HEADER_GATE_ROW, gate_row]);
        }
        let group = &mut self.groups[index as usize];
        let i = group.count;
        group.count += 1;
        let word = if i < INLINE_LENGTH {
            header + HEADER_POSITIONS + i
        } else if i < BEFORE_TIER_2 {
            if i == INLINE_LENGTH {
                group.tier_1 = self.layout.tiers + self.tiers;
                self.tiers += TIER_1_LENGTH;
                patches.push([header + HEADER_TIER_1, group.tier_1]);
            }
            base + group.tier_1 + i - INLINE_LENGTH
        } else if i < TILE_LENGTH {
            if i == BEFORE_TIER_2 {
                group.tier_2 = self.layout.tiers + self.tiers;
                self.tiers += TIER_2_LENGTH;
                patches.push([header + HEADER_TIER_2, group.tier_2]);
            }
            base + group.tier_2 + i - BEFORE_TIER_2
        } else {
            let within = (i - TILE_LENGTH) % CHUNK_LENGTH;
            if within == 0 {
                let chunk = self.chunks.len() as u32;
                self.chunks.push(group.chunk);
                group.chunk = chunk;
                let words = base + self.layout.chunk(chunk);
                patches.push([words + CHUNK_GROUP, index]);
                patches.push([words + CHUNK_FIRST, i]);
            }
            base + self.layout.chunk(group.chunk) + CHUNK_POSITIONS + within
        };
        patches.push([word, position]);
        index
    }

    /// Rolls the last position back.
    pub fn pop(&mut self) -> Option<Popped> {
        let id = self.ids.pop()?;
        let index = *self.of_id.get(&id)?;
        let group = self.groups.get_mut(index as usize)?;
        group.count -= 1;
        let i = group.count;
        if i == INLINE_LENGTH {
            self.tiers -= TIER_1_LENGTH;
        } else if i == BEFORE_TIER_2 {
            self.tiers -= TIER_2_LENGTH;
        } else if i >= TILE_LENGTH && (i - TILE_LENGTH).is_multiple_of(CHUNK_LENGTH) {
            group.chunk = self.chunks.pop().unwrap_or_default();
        }
        if i > 0 {
            return Some(Popped { group: index, gone: None });
        }
        // The newest group ends first: its first position was the last position.
        self.of_id.remove(&id);
        Some(Popped { group: index, gone: self.groups.pop().map(|group| group.gate_row) })
    }

    /// The patch with the host's count of a group.
    pub fn count_patch(&self, group: u32, base: u32) -> Option<Patch> {
        let known = self.groups.get(group as usize)?;
        Some([base + group * HEADER_WORDS + HEADER_COUNT, known.count])
    }

    /// Used ranges of words within the region.
    pub fn used(&self) -> [(u32, u32); 3] {
        let chunks = self.chunks.len() as u32 * CHUNK_WORDS;
        [(0, self.groups.len() as u32 * HEADER_WORDS), (self.layout.tiers, self.tiers), (self.layout.chunks, chunks)]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    const CAPACITY: u32 = 1500;
    const BASE: u32 = 7;

    /// The lists as a shader reads them: id and positions of every group, out of the words alone.
    fn read(words: &[u32], groups: u32, chunks: u32) -> Vec<(u32, Vec<u32>)> {
        let layout = Layout::new(CAPACITY).unwrap();
        let mut lists: Vec<(u32, Vec<u32>)> = (0..groups)
            .map(|group| {
                let header = BASE + group * HEADER_WORDS;
                let of_header = |field: u32| words[(header + field) as usize];
                let position = |i: u32| {
                    let word = match i {
                        0..INLINE_LENGTH => header + HEADER_POSITIONS + i,
                        INLINE_LENGTH..BEFORE_TIER_2 => BASE + of_header(HEADER_TIER_1) + i - INLINE_LENGTH,
                        _ => BASE + of_header(HEADER_TIER_2) + i - BEFORE_TIER_2,
                    };
                    words[word as usize]
                };
                (of_header(HEADER_ID), (0..of_header(HEADER_COUNT).min(TILE_LENGTH)).map(position).collect())
            })
            .collect();
        for chunk in 0..chunks {
            let first = BASE + layout.chunk(chunk);
            let of_chunk = |field: u32| words[(first + field) as usize];
            let (group, from) = (of_chunk(CHUNK_GROUP) as usize, of_chunk(CHUNK_FIRST));
            let count = words[(BASE + group as u32 * HEADER_WORDS + HEADER_COUNT) as usize] - from;
            let positions = &words[(first + CHUNK_POSITIONS) as usize..][..count.min(CHUNK_LENGTH) as usize];
            assert_eq!(lists[group].1.len() as u32, from, "chunks of a group come in order");
            lists[group].1.extend(positions);
        }
        lists
    }

    fn naive(ids: &[u32]) -> Vec<(u32, Vec<u32>)> {
        let mut lists: Vec<(u32, Vec<u32>)> = Vec::new();
        for (position, &id) in (0..).zip(ids) {
            match lists.iter_mut().find(|(known, _)| *known == id) {
                Some((_, positions)) => positions.push(position),
                None => lists.push((id, vec![position])),
            }
        }
        lists
    }

    fn check(steps: &[(u32, u32, u32)]) {
        let layout = Layout::new(CAPACITY).unwrap();
        let mut words = vec![0xdead_beef_u32; (BASE + layout.words) as usize];
        let mut groups = Groups::new(layout);
        let mut ids: Vec<u32> = Vec::new();
        let mut random = fastrand::Rng::with_seed(3);
        for &(take, add, spread) in steps {
            let mut dirty = Vec::new();
            for _ in 0..take.min(ids.len() as u32) {
                ids.pop();
                dirty.push(groups.pop().unwrap().group);
            }
            let mut patches: Vec<Patch> = Vec::new();
            for _ in 0..add.min(CAPACITY - ids.len() as u32) {
                // Skewed: half of all positions hold one id.
                let id = if random.bool() { 5 } else { random.u32(0..spread.max(1)) };
                ids.push(id);
                let before = patches.len();
                dirty.push(groups.append(id, || id + 100, BASE, &mut patches));
                assert!(patches.len() - before <= 4, "an append changes a few words");
            }
            patches.extend(dirty.iter().filter_map(|&group| groups.count_patch(group, BASE)));
            for [word, value] in patches {
                words[word as usize] = value;
            }
            assert_eq!(read(&words, groups.groups(), groups.chunks()), naive(&ids));
        }
    }

    #[test]
    fn all_equal_and_all_distinct_fill_the_cache() {
        let layout = Layout::new(CAPACITY).unwrap();
        for spread in [1, CAPACITY] {
            let mut groups = Groups::new(layout);
            let mut words = vec![0; (BASE + layout.words) as usize];
            let mut patches = Vec::new();
            let ids: Vec<u32> = (0..CAPACITY).map(|position| position % spread).collect();
            for &id in &ids {
                let group = groups.append(id, || 0, BASE, &mut patches);
                patches.extend(groups.count_patch(group, BASE));
            }
            patches.iter().for_each(|&[word, value]| words[word as usize] = value);
            assert_eq!(read(&words, groups.groups(), groups.chunks()), naive(&ids));
            while groups.pop().is_some() {}
            assert_eq!((groups.groups(), groups.chunks(), groups.tiers), (0, 0, 0));
        }
    }

    /// Worst case of each part of the region.
    #[test]
    fn every_part_holds_its_worst_case() {
        let layout = Layout::new(CAPACITY).unwrap();
        for size in [1, 3, 4, 5, 16, 17, 18, 64, 65, 66, 320, 321] {
            let mut groups = Groups::new(layout);
            for position in 0..CAPACITY {
                groups.append(position / size, || 0, 0, &mut Vec::new());
            }
            let [(_, headers), (tiers, taken), (chunks, chunk_words)] = groups.used();
            assert!(headers <= tiers && taken <= chunks - tiers && chunks + chunk_words <= layout.words, "{size}");
        }
    }

    proptest! {
        #[test]
        fn words_and_patches_say_what_a_plain_grouping_says(
            steps in prop::collection::vec((0u32..200, 0u32..400, 1u32..600), 1..12)
        ) {
            check(&steps);
        }
    }
}

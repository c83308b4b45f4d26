//! Group lists of a cache in device memory, and the resident gate rows.

use std::collections::{BTreeSet, HashMap};

use bytemuck::cast;
use serde::{Deserialize, Serialize};

use super::groups::{Groups, NO_ROW, Patch};
use super::layout::ListLayout;
use crate::device::{Kernels, Region};
use crate::error::Result;
use crate::kernels::attention_grouped::{GroupedSequence, SEQUENCE_WORDS, Tiling};
use crate::storage::words;

/// Source of gate rows in the absorbed decode of the gate at `up_projected`: memory for time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateRows {
    /// Projected from the gate table at every step, for every distinct id of the cached tokens: no memory beside the
    /// workspace, `d_kv · d_gate` multiply-adds per distinct id and step.
    #[default]
    Recompute,
    /// The gate rows of up to `rows` ids stay on the device, for every layer. An id that no sequence holds leaves when its place
    /// is needed, the least recently used first. Ids without a place are projected at every step.
    Pool {
        /// Gate rows per layer.
        rows: u32,
    },
    /// A gate row per id of the vocabulary, projected by the first step that is recorded.
    Table,
}

/// Rows of the pool by id.
#[derive(Debug, Clone, Default)]
struct Pool {
    limit: usize,
    of_id: HashMap<u32, u32>,
    rows: Vec<PoolRow>,
    /// Rows that no committed step has projected.
    unfilled: BTreeSet<u32>,
    clock: u64,
}

#[derive(Debug, Clone)]
struct PoolRow {
    id: u32,
    /// Sequences that hold the id.
    references: u32,
    last_used: u64,
}

impl Pool {
    /// The row of an id that a sequence begins to hold.
    fn acquire(&mut self, id: u32) -> u32 {
        if let Some(&row) = self.of_id.get(&id) {
            self.rows[row as usize].references += 1;
            return row;
        }
        let entry = PoolRow { id, references: 1, last_used: self.clock };
        let row = if self.rows.len() < self.limit {
            self.rows.push(entry);
            self.rows.len() - 1
        } else {
            let unused = self.rows.iter().enumerate().filter(|(_, row)| row.references == 0);
            let Some((row, _)) = unused.min_by_key(|(_, row)| row.last_used) else { return NO_ROW };
            self.of_id.remove(&self.rows[row].id);
            self.rows[row] = entry;
            row
        };
        self.of_id.insert(id, row as u32);
        self.unfilled.insert(row as u32);
        row as u32
    }

    /// Ids of some sequence whose gate rows no committed step has projected, and those rows.
    fn due(&self) -> (Vec<u32>, Vec<u32>) {
        let held =
            |row: &u32| Some(&self.rows[*row as usize]).filter(|entry| entry.references > 0).map(|of| (of.id, *row));
        self.unfilled.iter().filter_map(held).unzip()
    }

    fn release(&mut self, row: u32) {
        if let Some(entry) = self.rows.get_mut(row as usize) {
            entry.references -= 1;
            self.clock += 1;
            entry.last_used = self.clock;
        }
    }
}

/// The group lists of a cache.
#[derive(Debug, Clone)]
pub(super) struct Lists {
    pub buffer: wgpu::Buffer,
    pub layout: ListLayout,
    sequences: Vec<Groups>,
    pool: Pool,
    /// Groups, over all sequences, without a resident row.
    projected: u64,
    /// Groups (sequence, group) whose count on the device may differ from the host's, after a roll back or a step that was never
    /// committed. Ordered, so that equal tokens record equal bytes.
    dirty: BTreeSet<(u32, u32)>,
    /// Tokens of each sequence that a step has appended and not committed, and the distinct ids before.
    pending: Option<(Vec<u32>, Vec<u32>)>,
}

/// Changes of a step to the lists, and what it reads from them.
#[derive(Debug, Default)]
pub(super) struct ListStep {
    pub patches: Vec<Patch>,
    /// Resident gate row of every new token, or `NO_ROW`.
    pub token_rows: Vec<u32>,
    /// Ids whose pool rows are to be projected, and those rows.
    pub fills: (Vec<u32>, Vec<u32>),
    pub grouped: Option<Grouped>,
}

/// The absorbed decode of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Grouped {
    pub tiling: Tiling,
    pub entries: u32,
    pub partials: u32,
    /// Groups in the step's numbering, padding included.
    pub groups: u32,
    /// Some group has no resident gate row.
    pub projected: bool,
    pub passes: u32,
    pub expected_groups: u64,
    pub expected_positions: u64,
    /// (first partial result, partial results) of every query token.
    pub ranges: Vec<[u32; 2]>,
}

impl Lists {
    pub fn new(kernels: &Kernels, layout: ListLayout) -> Result<Self> {
        let pool = match layout.mode {
            GateRows::Pool { rows } => Pool { limit: rows as usize, ..Pool::default() },
            _ => Pool::default(),
        };
        Ok(Lists {
            buffer: kernels.allocate("egmla.cache.lists", words(layout.words.into()))?,
            layout,
            sequences: vec![Groups::new(layout.region); layout.batch as usize],
            pool,
            projected: 0,
            dirty: BTreeSet::new(),
            pending: None,
        })
    }

    /// Token ids of all cache rows.
    pub fn ids(&self) -> Region {
        Region::new(&self.buffer, 0, words(self.layout.table.into()))
    }

    fn append(&mut self, sequence: u32, id: u32, patches: &mut Vec<Patch>) -> u32 {
        let base = self.layout.base(sequence);
        let Lists { layout, sequences, pool, projected, .. } = self;
        let gate_row = || {
            let row = match layout.mode {
                GateRows::Recompute => NO_ROW,
                GateRows::Pool { .. } => pool.acquire(id),
                GateRows::Table => id,
            };
            *projected += u64::from(row == NO_ROW);
            row
        };
        sequences[sequence as usize].append(id, gate_row, base, patches)
    }

    /// Rolls a sequence back by its last tokens.
    fn pop(&mut self, sequence: u32, tokens: u32) {
        for _ in 0..tokens {
            let Some(popped) = self.sequences[sequence as usize].pop() else { return };
            match popped.gone {
                Some(NO_ROW) => self.projected -= 1,
                Some(row) if matches!(self.layout.mode, GateRows::Pool { .. }) => self.pool.release(row),
                _ => {}
            }
            self.dirty.insert((sequence, popped.group));
        }
    }

    /// Rolls back the tokens of a step that was not committed.
    pub fn settle(&mut self) {
        if let Some((counts, _)) = self.pending.take() {
            for (sequence, count) in (0..).zip(counts) {
                self.pop(sequence, count);
            }
        }
    }

    /// Appends new tokens, pending until [`Lists::commit`]. `counts` and `ids` have been checked; `decode` also makes the
    /// sequence table.
    pub fn prepare(&mut self, counts: &[u32], ids: &[u32], decode: bool) -> ListStep {
        self.settle();
        let before = self.distinct();
        let mut step = ListStep::default();
        let mut next = ids.iter();
        for (sequence, &count) in (0..).zip(counts) {
            for &id in next.by_ref().take(count as usize) {
                let position = self.sequences[sequence as usize].len();
                step.patches.push([sequence * self.layout.capacity + position, id]);
                let group = self.append(sequence, id, &mut step.patches);
                self.dirty.insert((sequence, group));
                step.token_rows.push(self.sequences[sequence as usize].gate_row(group));
            }
        }
        step.fills = self.pool.due();
        self.pending = Some((counts.to_vec(), before));
        let count_of = |&(sequence, group): &(u32, u32)| {
            self.sequences[sequence as usize].count_patch(group, self.layout.base(sequence))
        };
        step.patches.extend(self.dirty.iter().filter_map(count_of));
        step.grouped = if decode { self.grouped(counts, &mut step.patches) } else { None };
        step
    }

    /// The sequence table of a step whose tokens are in the lists.
    fn grouped(&self, counts: &[u32], patches: &mut Vec<Patch>) -> Option<Grouped> {
        let tiling = self.layout.tiling?;
        let active = || (0..).zip(counts).filter(|(_, count)| **count > 0);
        let groups_of = |sequence: u32| &self.sequences[sequence as usize];
        let padded = |sequence| groups_of(sequence).groups().next_multiple_of(tiling.entry_groups());
        let rows = active().map(|(sequence, _)| padded(sequence)).sum::<u32>();
        let projected = self.projected > 0;
        let passes = if projected { rows.div_ceil(self.layout.pass_groups) } else { 1 };
        let mut step = Grouped {
            tiling,
            entries: 0,
            partials: 0,
            groups: rows,
            projected,
            passes,
            expected_groups: 0,
            expected_positions: 0,
            ranges: Vec::new(),
        };
        let (mut first_group, mut token) = (0, 0);
        for (line, (sequence, &count)) in active().enumerate() {
            let groups = groups_of(sequence);
            let tiles = groups.groups().div_ceil(tiling.groups);
            let (tile_entries, chunk_entries) = (tiles.div_ceil(tiling.span), groups.chunks().div_ceil(tiling.span));
            let position = groups.len() - count;
            let of_token = tile_entries + passes * chunk_entries;
            let entry = GroupedSequence {
                first_entry: step.entries,
                tiles,
                groups: groups.groups(),
                base: self.layout.base(sequence),
                first_slot: sequence * self.layout.capacity,
                position,
                token,
                tokens: count,
                partial: step.partials,
                tile_entries,
                first_group,
                chunks: groups.chunks(),
                chunk_word: self.layout.region.chunks,
                chunk_entries,
                unused: [0; 2],
            };
            let words: [u32; SEQUENCE_WORDS as usize] = cast(entry);
            let first_word = self.layout.table + line as u32 * SEQUENCE_WORDS;
            patches.extend((first_word..).zip(words).map(|(word, value)| [word, value]));
            for query in 0..count {
                step.ranges.push([step.partials + query * of_token, of_token]);
                step.expected_positions += u64::from(position + query + 1);
            }
            step.expected_groups += u64::from(count) * u64::from(groups.groups());
            step.entries += tile_entries + chunk_entries;
            step.partials += count * of_token;
            first_group += padded(sequence);
            token += count;
        }
        Some(step)
    }

    /// Keeps the tokens that a step appended. Nothing is dirty after it: the step's patches repeat every dirty count.
    pub fn commit(&mut self, step: &ListStep) {
        for row in &step.fills.1 {
            self.pool.unfilled.remove(row);
        }
        self.dirty.clear();
        self.pending = None;
    }

    /// Fills the one sequence of an empty cache, rows of the pool left zero: for [`super::LatentCache::fill`].
    #[cfg(feature = "check")]
    pub fn fill(&mut self, kernels: &Kernels, ids: &[u32]) -> Result<()> {
        let step = self.prepare(&[ids.len() as u32], ids, false);
        let mut words = vec![0u32; self.layout.words as usize];
        step.patches.iter().for_each(|&[word, value]| words[word as usize] = value);
        self.buffer = kernels.upload("egmla.cache.lists", bytemuck::cast_slice(&words))?;
        self.commit(&step);
        Ok(())
    }

    pub fn truncate(&mut self, sequence: u32, length: u32) {
        let tokens = self.sequences[sequence as usize].len().saturating_sub(length);
        self.pop(sequence, tokens);
    }

    pub fn reset(&mut self) {
        for sequence in 0..self.layout.batch {
            self.truncate(sequence, 0);
        }
        self.dirty.clear();
    }

    /// Ranges of words (from, to, words) that make the lists of one sequence those of another, `length` tokens long.
    pub fn copies(&self, from: u32, to: u32, length: u32) -> Vec<(u32, u32, u32)> {
        let region = self.sequences[from as usize].used();
        let region = region.map(|(first, words)| (self.layout.base(from) + first, self.layout.base(to) + first, words));
        let ids = (from * self.layout.capacity, to * self.layout.capacity, length);
        std::iter::once(ids).chain(region).filter(|(_, _, words)| *words > 0).collect()
    }

    /// Follows [`Lists::copies`].
    pub fn copy(&mut self, from: u32, to: u32) {
        self.truncate(to, 0);
        let copied = self.sequences[from as usize].clone();
        for group in 0..copied.groups() {
            let row = copied.gate_row(group);
            if row == NO_ROW {
                self.projected += 1;
            } else if matches!(self.layout.mode, GateRows::Pool { .. }) {
                self.pool.rows[row as usize].references += 1;
            }
        }
        self.sequences[to as usize] = copied;
        // The copy is dirty exactly where its source is.
        self.dirty.retain(|(sequence, _)| *sequence != to);
        let doubts: Vec<u32> = self.dirty.iter().filter(|key| key.0 == from).map(|key| key.1).collect();
        self.dirty.extend(doubts.into_iter().map(|group| (to, group)));
    }

    /// Ids of a sequence's committed tokens.
    pub fn ids_of(&self, sequence: usize, length: u32) -> &[u32] {
        &self.sequences[sequence].ids()[..length as usize]
    }

    /// Gives a sequence other tokens, and returns the words of its lists. The next step projects the gate rows that it needs.
    pub fn replace(&mut self, sequence: u32, ids: &[u32]) -> Vec<Patch> {
        self.truncate(sequence, 0);
        let (first_slot, base) = (sequence * self.layout.capacity, self.layout.base(sequence));
        let mut patches = Vec::new();
        for (position, &id) in (0..).zip(ids) {
            patches.push([first_slot + position, id]);
            self.append(sequence, id, &mut patches);
        }
        let groups = &self.sequences[sequence as usize];
        patches.extend((0..groups.groups()).filter_map(|group| groups.count_patch(group, base)));
        // All of its counts are among the patches.
        self.dirty.retain(|(of, _)| *of != sequence);
        patches
    }

    /// Distinct ids of every sequence, committed tokens only.
    pub fn distinct(&self) -> Vec<u32> {
        match &self.pending {
            Some((_, before)) => before.clone(),
            None => self.sequences.iter().map(Groups::groups).collect(),
        }
    }
}

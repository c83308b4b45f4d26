//! Group lists of a cache in device memory, and which gate rows are resident.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytemuck::cast;
use serde::{Deserialize, Serialize};

use super::groups::{Groups, Layout, NO_ROW, Patch};
use super::widths::Widths;
use crate::device::{Kernels, Region};
use crate::error::{Error, Result};
use crate::kernels::attention_grouped::{GroupedSequence, SEQUENCE_WORDS, Tiling, tiling};
use crate::storage::product;

/// Where the absorbed decode of the gate at `up_projected` takes gate rows from: memory for time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateRows {
    /// Projected from the gate table at every step, for every distinct id of the cached tokens: no memory beside the
    /// workspace, `d_kv · d_gate` multiply-adds a distinct id and step.
    #[default]
    Recompute,
    /// The rows of up to `rows` ids stay on the device, for every layer; an id that no sequence holds any more leaves when
    /// its row is needed, the least recently used first. Ids that find no row are projected at every step.
    Pool {
        /// Rows a layer.
        rows: u32,
    },
    /// A row for every id of the vocabulary, projected once by [`super::Attention::load_gate_table`].
    Table,
}

/// Rows of the pool by id.
#[derive(Debug, Default)]
struct Pool {
    limit: usize,
    of_id: HashMap<u32, u32>,
    rows: Vec<PoolRow>,
    clock: u64,
    /// Counts rows that changed hands.
    changes: u64,
}

#[derive(Debug)]
struct PoolRow {
    id: u32,
    /// Sequences that hold the id.
    references: u32,
    last_used: u64,
    /// A committed step has projected it.
    filled: bool,
}

impl Pool {
    /// The row of an id that a sequence begins to hold.
    fn acquire(&mut self, id: u32) -> u32 {
        if let Some(&row) = self.of_id.get(&id) {
            self.rows[row as usize].references += 1;
            return row;
        }
        let entry = PoolRow { id, references: 1, last_used: self.clock, filled: false };
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
        self.changes += 1;
        self.of_id.insert(id, row as u32);
        row as u32
    }

    fn release(&mut self, row: u32) {
        if let Some(entry) = self.rows.get_mut(row as usize) {
            entry.references -= 1;
            self.clock += 1;
            entry.last_used = self.clock;
        }
    }
}

#[derive(Debug)]
struct State {
    sequences: Vec<Groups>,
    pool: Pool,
    /// Groups, over all sequences, without a resident row.
    projected: u64,
    /// Groups (sequence, group) whose count on the device may differ from the host's: taken back, or changed by a step that was
    /// never committed. With the last step that repeats it.
    doubtful: HashMap<(u32, u32), u64>,
    plans: u64,
}

impl State {
    fn append(&mut self, mode: GateRows, sequence: u32, id: u32, base: u32, patches: &mut Vec<Patch>) -> u32 {
        let State { sequences, pool, projected, .. } = self;
        let gate_row = || {
            let row = match mode {
                GateRows::Recompute => NO_ROW,
                GateRows::Pool { .. } => pool.acquire(id),
                GateRows::Table => id,
            };
            *projected += u64::from(row == NO_ROW);
            row
        };
        sequences[sequence as usize].append(id, gate_row, base, patches)
    }

    /// Takes the last token of a sequence back. Returns its group.
    fn pop(&mut self, mode: GateRows, sequence: u32) -> Option<u32> {
        let groups = &mut self.sequences[sequence as usize];
        let popped = groups.pop()?;
        if let Some(row) = popped.gone {
            self.forget(mode, row);
        }
        Some(popped.group)
    }

    fn forget(&mut self, mode: GateRows, row: u32) {
        if row == NO_ROW {
            self.projected -= 1;
        } else if matches!(mode, GateRows::Pool { .. }) {
            self.pool.release(row);
        }
    }
}

/// The group lists of a cache.
#[derive(Debug)]
pub(super) struct Lists {
    pub buffer: wgpu::Buffer,
    pub mode: GateRows,
    /// First word of the sequence table: token ids of all cache rows stand before it.
    pub table: u32,
    pub words: u32,
    /// Most groups whose rows are projected at once.
    pub pass_groups: u32,
    tiling: Option<Tiling>,
    layout: Layout,
    batch: u32,
    capacity: u32,
    state: Mutex<State>,
}

/// What a step changes in the lists, and what it takes from them.
#[derive(Debug, Default)]
pub(super) struct ListStep {
    pub patches: Vec<Patch>,
    /// Resident gate row of every new token, or `NO_ROW`.
    pub token_rows: Vec<u32>,
    /// Ids whose pool rows are to be projected, and those rows.
    pub fills: (Vec<u32>, Vec<u32>),
    pub grouped: Option<Grouped>,
    plan: u64,
    pool_changes: u64,
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
    pub fn new(
        kernels: &Kernels,
        widths: &Widths,
        mode: GateRows,
        (batch, capacity): (u32, u32),
        vocab_size: u32,
    ) -> Result<Self> {
        let tiling = tiling(kernels.context(), widths.grouped()).ok();
        let ids = product(&[batch, capacity]).next_multiple_of(64);
        let table_words = product(&[batch, SEQUENCE_WORDS]).next_multiple_of(64);
        let region = Layout::new(capacity);
        let words = region
            .map_or(u64::MAX, |layout| ids.saturating_add(table_words).saturating_add(product(&[batch, layout.words])));
        let (needed, allowed) = (words.saturating_mul(4), kernels.context().largest_binding());
        let (Some(layout), true) = (region, needed <= allowed) else {
            let what = format!("group lists of {batch} sequences × {capacity} tokens");
            return Err(Error::Limit { what, needed, allowed, limit: "max_storage_buffer_binding_size" });
        };
        if matches!(mode, GateRows::Pool { rows: 0 }) {
            return Err(Error::Empty { what: "the pool of gate rows" });
        }
        let entry_groups = tiling.map_or(1, |tiling| tiling.entry_groups());
        // Distinct ids are bounded by the vocabulary; a sequence's groups fill whole entries.
        let most = product(&[batch, capacity.min(vocab_size).next_multiple_of(entry_groups)]);
        let row_bytes = product(&[widths.d_kv(), 4]);
        let room = (allowed / row_bytes.max(1)).min(4096).min(most);
        let state = State {
            sequences: vec![Groups::new(layout); batch as usize],
            pool: match mode {
                GateRows::Pool { rows } => Pool { limit: rows as usize, ..Pool::default() },
                _ => Pool::default(),
            },
            projected: 0,
            doubtful: HashMap::new(),
            plans: 0,
        };
        Ok(Lists {
            buffer: kernels.allocate("egmla.cache.lists", needed)?,
            mode,
            table: ids as u32,
            words: words as u32,
            pass_groups: (room as u32 / entry_groups * entry_groups).max(entry_groups),
            tiling,
            layout,
            batch,
            capacity,
            state: Mutex::new(state),
        })
    }

    /// Token ids of all cache rows.
    pub fn ids(&self) -> Region {
        Region::new(&self.buffer, 0, u64::from(self.table) * 4)
    }

    /// Most partial results of a step of `tokens` query tokens a sequence.
    pub fn most_partials(&self, vocab_size: u32, tokens: u32) -> u64 {
        let Some(tiling) = self.tiling else { return 0 };
        let groups = self.capacity.min(vocab_size);
        let tiles = groups.div_ceil(tiling.entry_groups());
        let chunks = (self.layout.words - self.layout.chunks) / (4 + 256);
        let rows = product(&[self.batch, groups.next_multiple_of(tiling.entry_groups())]);
        let passes = if self.mode == GateRows::Table { 1 } else { rows.div_ceil(self.pass_groups.into()).max(1) };
        let entries = u64::from(tiles) + passes * u64::from(chunks.div_ceil(tiling.span));
        product(&[self.batch, tokens]).saturating_mul(entries)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn base(&self, sequence: u32) -> u32 {
        self.words - (self.batch - sequence) * self.layout.words
    }

    /// Plans the append of new tokens. `counts` and `ids` have been checked; with `decode`, the sequence table too.
    pub fn plan(&self, counts: &[u32], ids: &[u32], decode: bool) -> ListStep {
        let mut state = self.state();
        state.plans += 1;
        let mut step = ListStep { plan: state.plans, ..ListStep::default() };
        // In order, so that the same tokens are recorded as the same bytes.
        let mut touched: BTreeSet<(u32, u32)> = BTreeSet::new();
        let mut filled = HashSet::new();
        let mut next = ids.iter();
        for (sequence, &count) in (0..).zip(counts) {
            let base = self.base(sequence);
            for &id in next.by_ref().take(count as usize) {
                let position = state.sequences[sequence as usize].len();
                step.patches.push([sequence * self.capacity + position, id]);
                let group = state.append(self.mode, sequence, id, base, &mut step.patches);
                touched.insert((sequence, group));
                let row = state.sequences[sequence as usize].gate_row(group);
                step.token_rows.push(row);
                let pooled = matches!(self.mode, GateRows::Pool { .. });
                let entry = state.pool.rows.get(row as usize).filter(|_| pooled);
                if entry.is_some_and(|entry| !entry.filled) && filled.insert(row) {
                    step.fills.0.push(id);
                    step.fills.1.push(row);
                }
            }
        }
        let plan = step.plan;
        touched.extend(state.doubtful.keys());
        for &(sequence, group) in &touched {
            let patch = state.sequences[sequence as usize].count_patch(group, self.base(sequence));
            step.patches.extend(patch);
            state.doubtful.insert((sequence, group), plan);
        }
        step.grouped = if decode { self.grouped(&state, counts, &mut step.patches) } else { None };
        for (sequence, &count) in (0..).zip(counts) {
            for _ in 0..count {
                state.pop(self.mode, sequence);
            }
        }
        step.pool_changes = state.pool.changes;
        step
    }

    /// The sequence table of a step whose tokens are in the lists.
    fn grouped(&self, state: &State, counts: &[u32], patches: &mut Vec<Patch>) -> Option<Grouped> {
        let tiling = self.tiling?;
        let active = || (0..).zip(counts).filter(|(_, count)| **count > 0);
        let groups_of = |sequence: u32| &state.sequences[sequence as usize];
        let padded = |sequence| groups_of(sequence).groups().next_multiple_of(tiling.entry_groups());
        let rows = active().map(|(sequence, _)| padded(sequence)).sum::<u32>();
        let projected = state.projected > 0;
        let passes = if projected { rows.div_ceil(self.pass_groups) } else { 1 };
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
                base: self.base(sequence),
                first_slot: sequence * self.capacity,
                position,
                token,
                tokens: count,
                partial: step.partials,
                tile_entries,
                first_group,
                chunks: groups.chunks(),
                chunk_word: self.layout.chunks,
                chunk_entries,
                unused: [0; 2],
            };
            let words: [u32; SEQUENCE_WORDS as usize] = cast(entry);
            let first_word = self.table + line as u32 * SEQUENCE_WORDS;
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

    /// Whether the pool is as the step left it: another step may have given its rows away.
    pub fn holds(&self, step: &ListStep) -> bool {
        self.state().pool.changes == step.pool_changes
    }

    pub fn commit(&self, step: &ListStep, counts: &[u32], ids: &[u32]) {
        let mut state = self.state();
        let mut next = ids.iter();
        for (sequence, &count) in (0..).zip(counts) {
            for &id in next.by_ref().take(count as usize) {
                state.append(self.mode, sequence, id, 0, &mut Vec::new());
            }
        }
        for &row in &step.fills.1 {
            state.pool.rows[row as usize].filled = true;
        }
        state.doubtful.retain(|_, plan| *plan != step.plan);
    }

    /// Fills the one sequence of an empty cache, rows of the pool left zero: for [`super::LatentCache::fill`].
    pub fn fill(&mut self, kernels: &Kernels, ids: &[u32]) -> Result<()> {
        let counts = [ids.len() as u32];
        let step = self.plan(&counts, ids, false);
        let mut words = vec![0u32; self.words as usize];
        step.patches.iter().for_each(|&[word, value]| words[word as usize] = value);
        self.buffer = kernels.upload("egmla.cache.lists", bytemuck::cast_slice(&words))?;
        self.commit(&step, &counts, ids);
        Ok(())
    }

    pub fn truncate(&self, sequence: u32, length: u32) {
        let mut state = self.state();
        while state.sequences[sequence as usize].len() > length {
            let Some(group) = state.pop(self.mode, sequence) else { return };
            state.doubtful.insert((sequence, group), 0);
        }
    }

    pub fn reset(&self) {
        for sequence in 0..self.batch {
            self.truncate(sequence, 0);
        }
        self.state().doubtful.clear();
    }

    /// Ranges of words (from, to, words) that make the lists of one sequence those of another, `length` tokens long.
    pub fn copies(&self, from: u32, to: u32, length: u32) -> Vec<(u32, u32, u32)> {
        let state = self.state();
        let region = state.sequences[from as usize].used();
        let region = region.map(|(first, words)| (self.base(from) + first, self.base(to) + first, words));
        let ids = (from * self.capacity, to * self.capacity, length);
        std::iter::once(ids).chain(region).filter(|(_, _, words)| *words > 0).collect()
    }

    /// Follows [`Lists::copies`].
    pub fn copy(&self, from: u32, to: u32) {
        self.truncate(to, 0);
        let mut state = self.state();
        let copied = state.sequences[from as usize].clone();
        for group in 0..copied.groups() {
            let row = copied.gate_row(group);
            if row == NO_ROW {
                state.projected += 1;
            } else if matches!(self.mode, GateRows::Pool { .. }) {
                state.pool.rows[row as usize].references += 1;
            }
        }
        state.sequences[to as usize] = copied;
        // What the host doubts of one it doubts of the copy, and of nothing else there.
        state.doubtful.retain(|(sequence, _), _| *sequence != to);
        let doubts: Vec<u32> = state.doubtful.keys().filter(|key| key.0 == from).map(|key| key.1).collect();
        state.doubtful.extend(doubts.into_iter().map(|group| ((to, group), 0)));
    }

    /// Distinct ids of every sequence.
    pub fn distinct(&self) -> Vec<u32> {
        self.state().sequences.iter().map(Groups::groups).collect()
    }

    pub fn bytes(&self) -> u64 {
        self.buffer.size()
    }
}

//! New tokens of a batch, checked, with the tables that every layer needs.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::cast_slice;

use super::batch::{Batch, Numbering};
use super::cache::LatentCache;
use super::kv_cache::KvCache;
use super::layer::DecodePath;
use super::lists::{Grouped, ListStep};
use super::parts::{PartTables, StepPart, cut};
use crate::adapter::PlanContext;
use crate::config::GateConfig;
use crate::device::{Kernels, Region};
use crate::error::{ArgumentError, Error, Result};
use crate::kernels::attention_decode::{DecodeSequence, SPLIT, split_length};
use crate::kernels::attention_prefill::{QueryTile, tile_q};
use crate::kernels::cache_read::SequenceRow;
use crate::kernels::rope;
use crate::plan::MAX_ITERATIONS;
use crate::recording::Recording;

/// Which attention kernels a step runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Any number of new tokens per sequence.
    Prefill,
    /// Up to [`MOST_DECODED`] new tokens per sequence: one, or the candidates of speculative decoding. Each token sees those
    /// before it.
    Decode,
}

/// Most new tokens per sequence in a decode step.
pub const MOST_DECODED: u32 = 16;

/// New tokens of a step: those of sequence 0, then of sequence 1, and so on.
#[derive(Debug, Clone, Copy)]
pub struct StepTokens<'a> {
    /// New tokens of each sequence of the cache; 0 leaves a sequence out.
    pub counts: &'a [u32],
    /// Their ids; needed with a gate, and by the decoder's embedding.
    pub ids: Option<&'a [u32]>,
}

/// Tables of a step in memory order: those whose size changes from step to step come last, but for those of further
/// [`Step::parts`].
#[derive(Debug, Clone, Copy)]
pub(super) enum Table {
    /// `[tokens]` u32: cache rows.
    Slots,
    /// `[tokens, d_rope / 2, 2]` f32: cos and sin.
    Rotations,
    /// `[tokens, 2]` f32: factors on queries, each beside 0; empty where the layers have none.
    QueryFactors,
    /// `[n_sequence]` [`SequenceRow`]
    Sequences,
    /// `[n_sequence]` [`DecodeSequence`]
    Decoding,
    /// `[query_tiles]` [`QueryTile`]
    Queries,
    /// `[tokens, 2]` u32: first partial result, partial results.
    Ranges,
    /// `[tokens]` u32
    Ids,
    /// `[tokens]` u32: resident gate rows.
    GateRows,
    /// `[tokens, 2]` u32: as `Ranges`, of the grouped attention.
    GroupedRanges,
    /// `[fills]` u32: ids whose gate rows enter the pool.
    FillIds,
    /// `[fills]` u32: and their rows.
    FillRows,
    /// `[patches, 2]` u32: words of the lists.
    Patches,
}

const TABLES: usize = Table::Patches as usize + 1;

/// Tables that each part of the cache has, as [`PartTables::bytes`] has them: those of the first part are the step's.
#[derive(Debug, Clone, Copy)]
pub(super) enum PartTable {
    Slots,
    Sequences,
    Decoding,
}

impl PartTable {
    const COUNT: usize = PartTable::Decoding as usize + 1;

    fn of_first(self) -> Table {
        match self {
            PartTable::Slots => Table::Slots,
            PartTable::Sequences => Table::Sequences,
            PartTable::Decoding => Table::Decoding,
        }
    }
}

/// The tables of a step, one after another, each where a storage binding may begin.
#[derive(Debug, Default)]
struct Tables {
    bytes: Vec<u8>,
    /// Offset and size.
    places: [(u64, u64); TABLES],
    /// Of the parts of the cache after the first.
    more: Vec<(u64, u64)>,
}

impl Tables {
    /// `more` stand behind the others.
    fn new(tables: [&[u8]; TABLES], more: &[&[u8]], alignment: u32) -> Self {
        let mut end = 0;
        let mut place = |table: &[u8]| {
            // Sizes are powers of two: the next step's tables get the same offsets and bindings.
            let (offset, size) = (end, table.len().max(16).next_power_of_two());
            end = (offset + size).next_multiple_of(alignment as usize);
            (offset as u64, size as u64)
        };
        let places = tables.map(&mut place);
        let more_places: Vec<_> = more.iter().map(|table| place(table)).collect();
        let mut bytes = vec![0; end];
        for ((offset, _), table) in places.iter().chain(&more_places).zip(tables.iter().chain(more)) {
            bytes[*offset as usize..][..table.len()].copy_from_slice(table);
        }
        Tables { bytes, places, more: more_places }
    }
}

/// The part of a step that all layers share. `prepare` of a cache makes it, `commit` consumes it.
#[derive(Debug)]
pub struct Step {
    pub(super) mode: Mode,
    /// The path of a decode step.
    pub(super) path: DecodePath,
    pub(super) tokens: u32,
    /// Rows of the step's numbering: every sequence padded to a multiple of the split length.
    pub(super) rows: u32,
    /// Rows up to the end of the last sequence; only padding follows.
    pub(super) used_rows: u32,
    pub(super) n_sequence: u32,
    pub(super) query_tiles: u32,
    /// Most queries of a tile.
    pub(super) tile_q: u32,
    /// Most new tokens of a sequence.
    pub(super) most_tokens: u32,
    /// Partial results of the kernels that split the cache by rows.
    pub(super) partials: u32,
    /// Cache rows of each, as these kernels split them.
    pub(super) split: u32,
    /// A factor on queries is not 1.
    scales_queries: bool,
    /// Pairs of query and position, for the choice of a path.
    pub(super) expected_positions: u64,
    /// Cache rows of the new tokens of each sequence that has some.
    pub(super) appended: Vec<Range<u32>>,
    /// Parts of the cache that hold its rows, first to last.
    pub(super) parts: Vec<StepPart>,
    pub(super) lists: ListStep,
    tables: Tables,
    has_ids: bool,
    identity: u64,
    pub(super) lengths_after: Vec<u32>,
    /// The cache and its state.
    pub(super) stamp: (u64, u64),
}

/// A number that no other step or transfer has.
pub(super) fn identity() -> u64 {
    static IDENTITIES: AtomicU64 = AtomicU64::new(0);
    IDENTITIES.fetch_add(1, Ordering::Relaxed)
}

impl LatentCache {
    /// Checks new tokens and makes the tables that every layer needs. The ids enter the cache's lists: [`LatentCache::commit`]
    /// keeps them, and a second `prepare` rolls them back and makes the first step stale.
    ///
    /// # Errors
    /// [`Error::CacheFull`], `ArgumentError::TokenId`, a wrong number of counts or ids, no new token at all, more of them than
    /// `max_tokens` or `decode_tokens`, or a decode path that the device cannot run. The cache is then unchanged.
    pub fn prepare(&mut self, mode: Mode, tokens: StepTokens<'_>) -> Result<Step> {
        let StepTokens { counts, ids } = tokens;
        let rows = Rows::checked(&self.batch, self.kernels.context(), (mode, counts))?;
        check_ids(self.config.gate.as_ref(), ids, rows.slots.len() as u32)?;
        self.settle();
        let decode = mode == Mode::Decode;
        let lists = match (self.lists_mut(), ids) {
            (Some(lists), Some(ids)) => lists.prepare(counts, ids, decode),
            _ => ListStep::default(),
        };
        let ranges = check_ranges(&rows.ranges);
        let mut step = Step::new(rows, mode, ids, lists, (&self.kernels, &self.batch));
        let checked = ranges
            .and_then(|()| step.grouped().map_or(Ok(()), |grouped| check_ranges(&grouped.ranges)))
            .and_then(|()| if decode { self.path_of(&step) } else { Ok(DecodePath::Expanded) });
        match checked {
            Ok(path) => step.path = path,
            Err(error) => {
                self.settle();
                return Err(error);
            }
        }
        Ok(step)
    }
}

impl KvCache {
    /// Checks new tokens and makes the tables that every layer needs. A second `prepare` makes the first step stale.
    ///
    /// # Errors
    /// [`Error::CacheFull`], a wrong number of counts or ids, no new token at all, or more of them than `max_tokens` or
    /// `decode_tokens`. The cache is then unchanged.
    pub fn prepare(&mut self, mode: Mode, tokens: StepTokens<'_>) -> Result<Step> {
        let StepTokens { counts, ids } = tokens;
        let rows = Rows::checked(&self.batch, self.kernels.context(), (mode, counts))?;
        check_ids(None, ids, rows.slots.len() as u32)?;
        check_ranges(&rows.ranges)?;
        self.batch.settle();
        Ok(Step::new(rows, mode, ids, ListStep::default(), (&self.kernels, &self.batch)))
    }
}

/// The step's numbering of cache rows, and the tables in that numbering.
#[derive(Default)]
struct Rows {
    slots: Vec<u32>,
    rotations: Vec<[f32; 2]>,
    query_factors: Vec<[f32; 2]>,
    sequences: Vec<SequenceRow>,
    decoding: Vec<DecodeSequence>,
    queries: Vec<QueryTile>,
    ranges: Vec<[u32; 2]>,
    end: u32,
    used: u32,
    tile_q: u32,
    partials: u32,
    split: u32,
    expected_positions: u64,
    /// Lengths of the sequences after the step.
    lengths: Vec<u32>,
    most_tokens: u32,
}

impl Rows {
    /// # Errors
    /// Counts that the cache does not take, or more rows than 32 bits number.
    fn checked(batch: &Batch, context: &PlanContext, (mode, counts): (Mode, &[u32])) -> Result<Self> {
        let lengths = batch.check_counts(mode, counts)?;
        let most_tokens = counts.iter().copied().max().unwrap_or(0);
        let rows = Rows::new(batch, context, (mode, counts), &lengths)?;
        Ok(Rows { lengths, most_tokens, ..rows })
    }

    fn new(batch: &Batch, context: &PlanContext, (mode, counts): (Mode, &[u32]), lengths: &[u32]) -> Result<Self> {
        let tile_q = tile_q(context);
        let met = counts.iter().zip(lengths).map(|(&count, &length)| u64::from(count) * u64::from(length)).sum();
        let split = split_length(context, met, batch.groups);
        let mut all = Rows { tile_q, split, ..Rows::default() };
        let mut end = 0u64;
        for (sequence, (&count, &length)) in (0..).zip(counts.iter().zip(lengths)) {
            if count == 0 {
                continue;
            }
            let before = length - count;
            let token = all.slots.len() as u32;
            let first_slot = sequence * batch.pitch;
            for position in before..length {
                all.slots.push(first_slot + position);
                batch.rotate(position, &mut all.rotations);
                batch.scale_query(position, &mut all.query_factors);
            }
            if batch.numbering == Numbering::InPlace {
                end = first_slot.into();
            }
            let first_row = end as u32;
            let line = all.sequences.len() as u32;
            let splits = length.div_ceil(split);
            all.sequences.push(SequenceRow { first_row, first_slot, length, token });
            let partial = all.partials;
            let tokens = count;
            all.decoding.push(DecodeSequence {
                first_row,
                first_slot,
                length,
                token,
                tokens,
                partial,
                splits,
                unused: 0,
            });
            all.queries.extend((0..count).step_by(tile_q as usize).map(|start| QueryTile {
                first_token: token + start,
                count: tile_q.min(count - start),
                position: before + start,
                sequence: line,
            }));
            if mode == Mode::Decode {
                all.ranges.extend((0..count).map(|query| [partial + query * splits, splits]));
                all.expected_positions += (before + 1..=length).map(u64::from).sum::<u64>();
                all.partials =
                    partial.checked_add(count * splits).ok_or(Error::Argument(ArgumentError::OutOfRange {
                        what: "partial results of a step",
                        found: u64::from(partial) + u64::from(count * splits),
                        limit: u32::MAX.into(),
                    }))?;
            }
            all.used = (end + u64::from(length)).min(u32::MAX.into()) as u32;
            end += u64::from(length.next_multiple_of(SPLIT));
        }
        if end >= 1 << 31 {
            let limit = (1 << 31) - 1;
            return Err(Error::Argument(ArgumentError::OutOfRange {
                what: "cached tokens of a step, padded to splits",
                found: end,
                limit,
            }));
        }
        all.end = end as u32;
        Ok(all)
    }
}

impl Step {
    /// The step of rows that have been checked.
    fn new(rows: Rows, mode: Mode, ids: Option<&[u32]>, lists: ListStep, (kernels, batch): (&Kernels, &Batch)) -> Self {
        let decoding = if mode == Mode::Decode { &rows.decoding[..] } else { &[] };
        let parts = cut(batch.part_rows, &rows.slots, &rows.sequences, decoding, rows.end);
        let [slots, sequences, of_decoding] = parts.first().map(PartTables::bytes).unwrap_or_default();
        let grouped_ranges = lists.grouped.as_ref().map_or(&[][..], |grouped| &grouped.ranges);
        let tables = [
            slots,
            cast_slice(&rows.rotations),
            cast_slice(&rows.query_factors),
            sequences,
            of_decoding,
            cast_slice(&rows.queries),
            cast_slice(&rows.ranges),
            cast_slice(ids.unwrap_or_default()),
            cast_slice(&lists.token_rows),
            cast_slice(grouped_ranges),
            cast_slice(&lists.fills.0),
            cast_slice(&lists.fills.1),
            cast_slice(&lists.patches),
        ];
        let more: Vec<&[u8]> = parts.iter().skip(1).flat_map(PartTables::bytes).collect();
        let tables = Tables::new(tables, &more, kernels.context().limits.min_storage_buffer_offset_alignment);
        // Each count is within the capacity, so the sum is within the cache's rows.
        let tokens = rows.slots.len() as u32;
        let new = rows.sequences.iter().zip(rows.sequences.iter().skip(1).map(|next| next.token).chain([tokens]));
        Step {
            mode,
            path: DecodePath::Expanded,
            tokens,
            rows: rows.end,
            used_rows: rows.used,
            n_sequence: rows.sequences.len() as u32,
            query_tiles: rows.queries.len() as u32,
            tile_q: rows.tile_q,
            most_tokens: rows.most_tokens,
            partials: rows.partials,
            split: rows.split,
            scales_queries: rows.query_factors.iter().any(|[factor, _]| *factor != 1.0),
            expected_positions: rows.expected_positions,
            appended: new
                .map(|(of, end)| {
                    let after = of.first_slot + of.length;
                    after - (end - of.token)..after
                })
                .collect(),
            parts: parts.into_iter().map(|tables| tables.part).collect(),
            lists,
            tables,
            has_ids: ids.is_some(),
            identity: identity(),
            lengths_after: rows.lengths,
            stamp: batch.stamp(),
        }
    }

    /// New tokens of all sequences.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// The path of the step; [`DecodePath::Expanded`] for a prefill.
    pub fn path(&self) -> DecodePath {
        self.path
    }

    /// Length of each sequence once the step is committed.
    pub fn lengths_after(&self) -> &[u32] {
        &self.lengths_after
    }

    /// Bytes that a recording of the step uploads; those of a decode step do not depend on the cached tokens, but for three small
    /// tables per further part of the cache that has rows of the step.
    pub fn uploaded_bytes(&self) -> u64 {
        self.tables.bytes.len() as u64
    }

    /// Identifies the step.
    pub(crate) fn identity(&self) -> u64 {
        self.identity
    }

    /// A table's region within `whole`, the region of all tables.
    pub(super) fn table(&self, whole: &Region, table: Table) -> Region {
        Self::table_at(whole, self.tables.places[table as usize])
    }

    /// The region of a table that every part has.
    pub(super) fn table_of(&self, part: &StepPart, whole: &Region, table: PartTable) -> Region {
        match part.number {
            0 => self.table(whole, table.of_first()),
            number => Self::table_at(whole, self.tables.more[(number - 1) * PartTable::COUNT + table as usize]),
        }
    }

    fn table_at(whole: &Region, (offset, size): (u64, u64)) -> Region {
        Region::new(&whole.buffer, whole.offset + offset, size)
    }

    /// The tables in a recording's buffer.
    ///
    /// # Errors
    /// No memory left for them, or a lost device.
    pub(super) fn tables(&self, recording: &mut Recording) -> Result<Region> {
        recording.table((self.identity, 0), &self.tables.bytes)
    }

    /// `[tokens]` u32: ids of the new tokens in device memory, for other operations of the recording to read. Whoever writes into
    /// this buffer changes tables that shaders take indices from without a check.
    ///
    /// # Errors
    /// `ArgumentError::Empty` when the step was prepared without ids; no memory left, or a lost device.
    pub fn token_ids(&self, recording: &mut Recording) -> Result<Region> {
        if !self.has_ids {
            return Err(Error::Argument(ArgumentError::Empty { what: "the list of token ids" }));
        }
        Ok(self.table(&self.tables(recording)?, Table::Ids))
    }

    /// Multiplies queries `[tokens, width]` by the factors of their positions, within `tables`; nothing where all of them are 1, as
    /// up to the length of the original training.
    pub(super) fn scale_queries(
        &self,
        recording: &mut Recording,
        tables: &Region,
        q: &Region,
        width: u32,
    ) -> Result<()> {
        if !self.scales_queries {
            return Ok(());
        }
        // Every two neighbours are a pair that is turned by no angle.
        let op = rope::Rope {
            tokens: self.tokens,
            n_head: width / 2,
            d_rope: 2,
            offset: 0,
            token_stride: width,
            head_stride: 2,
            interleave: true,
        };
        let factors = self.table(tables, Table::QueryFactors);
        recording.add_own(&op, rope::Args { rotations: &factors, values: q })
    }

    pub(super) fn grouped(&self) -> Option<&Grouped> {
        self.lists.grouped.as_ref()
    }
}

/// Partial results of each query token as (first, count), in combining order.
fn check_ranges(ranges: &[[u32; 2]]) -> Result<()> {
    match ranges.iter().map(|[_, count]| *count).max() {
        Some(most) if most > MAX_ITERATIONS => Err(Error::Argument(ArgumentError::OutOfRange {
            what: "partial results of a query token (64 to 256 cached tokens each)",
            found: most.into(),
            limit: MAX_ITERATIONS.into(),
        })),
        _ => Ok(()),
    }
}

fn check_ids(gate: Option<&GateConfig>, token_ids: Option<&[u32]>, tokens: u32) -> Result<()> {
    let Some(ids) = token_ids else {
        return match gate {
            None => Ok(()),
            Some(_) => {
                Err(Error::Argument(ArgumentError::Empty { what: "the list of token ids, which the gate needs," }))
            }
        };
    };
    if ids.len() != tokens as usize {
        return Err(Error::Argument(ArgumentError::Count {
            what: "token ids",
            expected: tokens.into(),
            found: ids.len() as u64,
        }));
    }
    let Some(gate) = gate else { return Ok(()) };
    match ids.iter().position(|&id| id >= gate.vocab_size) {
        None => Ok(()),
        Some(index) => {
            Err(Error::Argument(ArgumentError::TokenId { index, id: ids[index].into(), vocab_size: gate.vocab_size }))
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::{TABLES, Tables, check_ranges};

    #[test]
    fn what_a_combination_would_not_come_to_the_end_of_is_refused() {
        check_ranges(&[]).unwrap();
        check_ranges(&[[0, 65_534], [65_534, 1]]).unwrap();
        let error = check_ranges(&[[0, 1], [1, 65_535]]).unwrap_err();
        assert!(error.to_string().ends_with("is 65535, must be at most 65534"), "{error}");
    }

    #[test]
    fn tables_of_a_shape_stand_at_the_same_places() {
        let [a, b] = [(4, 40), (16, 33)].map(|(short, long)| {
            let (short, long) = (vec![1; short], vec![2; long]);
            let mut tables = [&short[..]; TABLES];
            tables[TABLES - 1] = &long;
            Tables::new(tables, &[], 32)
        });
        assert_eq!(a.places, b.places);
        assert!(a.places.iter().all(|(offset, size)| offset % 32 == 0 && size.is_power_of_two()));
        let end = 32 * (TABLES - 1);
        assert_eq!(a.places[TABLES - 1], (end as u64, 64));
        assert_eq!(a.bytes[end..][..41], [[2; 40].as_slice(), &[0]].concat());
    }
}

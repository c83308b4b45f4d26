//! New tokens of a batch, checked, with what every layer needs to know of them on the device.

use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::cast_slice;

use super::cache::LatentCache;
use super::lists::{Grouped, ListStep, Lists};
use crate::device::Region;
use crate::error::{Error, Result};
use crate::kernels::attention_decode::{DecodeSequence, SPLIT};
use crate::kernels::attention_prefill::{QueryTile, tile_q};
use crate::kernels::cache_read::SequenceRow;
use crate::plan::MAX_ITERATIONS;

/// Which attention kernels a step runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Any number of new tokens a sequence.
    Prefill,
    /// Up to [`MOST_DECODED`] new tokens a sequence: one, or the candidates of speculative decoding. Each sees those before
    /// it.
    Decode,
}

/// Most new tokens of a sequence in a decode step.
pub const MOST_DECODED: u32 = 16;

/// New tokens: sequence 0's, then sequence 1's, and so on.
#[derive(Debug, Clone, Copy)]
pub struct StepInput<'a> {
    /// Which kernels.
    pub mode: Mode,
    /// New tokens of each sequence of the cache; 0 leaves a sequence out.
    pub counts: &'a [u32],
    /// Their ids; needed with a gate, and by the decoder's embedding.
    pub token_ids: Option<&'a [u32]>,
}

/// What all layers of a model share of one step. Planned by [`LatentCache::plan_step`].
#[derive(Debug)]
pub struct Step {
    pub(super) mode: Mode,
    pub(super) tokens: u32,
    /// Rows of the step's numbering: every sequence padded to a multiple of the split length.
    pub(super) rows: u32,
    /// Rows up to the last sequence's end: past it there is nothing but padding.
    pub(super) used_rows: u32,
    pub(super) n_sequence: u32,
    pub(super) query_tiles: u32,
    /// Most queries of a tile.
    pub(super) tile_q: u32,
    /// Most new tokens of a sequence.
    pub(super) most_tokens: u32,
    /// Partial results of the kernels that split the cache by rows.
    pub(super) partials: u32,
    /// Query-position pairs, for the choice of a path.
    pub(super) expected_positions: u64,
    pub(super) slots: Region,
    ids: Option<Region>,
    pub(super) rotations: Region,
    pub(super) sequences: Region,
    pub(super) decoding: Region,
    pub(super) queries: Region,
    pub(super) ranges: Region,
    pub(super) patches: Region,
    pub(super) token_rows: Region,
    pub(super) fill_ids: Region,
    pub(super) fill_rows: Region,
    pub(super) grouped_ranges: Region,
    pub(super) lists: ListStep,
    identity: u64,
    counts: Vec<u32>,
    token_ids: Vec<u32>,
    lengths_after: Vec<u32>,
    stamp: (u64, u64),
    uploaded: u64,
}

static IDENTITIES: AtomicU64 = AtomicU64::new(0);

impl Step {
    pub(super) fn plan(cache: &LatentCache, input: StepInput<'_>) -> Result<Self> {
        let StepInput { mode, counts, token_ids } = input;
        let options = cache.options();
        if counts.len() != options.batch as usize {
            let expected = options.batch.into();
            return Err(Error::Count { what: "counts of new tokens", expected, found: counts.len() as u64 });
        }
        let tokens: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        if tokens == 0 {
            return Err(Error::Empty { what: "the step (no sequence has a new token)" });
        }
        let mut lengths_after = cache.lengths().to_vec();
        for (sequence, (length, &count)) in lengths_after.iter_mut().zip(counts).enumerate() {
            if mode == Mode::Decode && count > MOST_DECODED {
                return Err(Error::OutOfRange {
                    what: "new tokens of a sequence in a decode step",
                    found: count.into(),
                    limit: MOST_DECODED.into(),
                });
            }
            match length.checked_add(count) {
                Some(after) if after <= options.capacity => *length = after,
                _ => {
                    let (length, added, capacity) = (*length, count.into(), options.capacity);
                    return Err(Error::CacheFull { sequence, length, added, capacity });
                }
            }
        }
        // Each count is within the capacity, so the sum is within the cache's rows.
        let tokens = tokens as u32;
        check_ids(cache, token_ids, tokens)?;

        let context = cache.kernels().context();
        let tile_q = tile_q(context);
        let frequencies = cache.config().rope.frequencies(cache.config().d_rope);
        let pairs = cache.widths().d_rope as usize / 2;
        let amplitude = cache.config().rope.amplitude();
        let mut slots = Vec::with_capacity(tokens as usize);
        let mut rotations: Vec<[f32; 2]> = Vec::with_capacity(tokens as usize * pairs);
        let mut sequences = Vec::new();
        let mut decoding = Vec::new();
        let mut queries = Vec::new();
        let mut ranges = Vec::new();
        let (mut rows, mut used_rows, mut partials, mut expected_positions) = (0u64, 0u64, 0u32, 0u64);
        for (sequence, &count) in counts.iter().enumerate() {
            if count == 0 {
                continue;
            }
            let length = lengths_after[sequence];
            let before = length - count;
            let first_token = slots.len() as u32;
            let first_slot = sequence as u32 * options.capacity;
            for position in before..length {
                slots.push(first_slot + position);
                rotations.extend(frequencies.iter().map(|frequency| {
                    let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                    [(cos * amplitude) as f32, (sin * amplitude) as f32]
                }));
                // The padding stays as it is.
                rotations.resize(rotations.len().next_multiple_of(pairs.max(1)), [1.0, 0.0]);
            }
            let line = sequences.len() as u32;
            let splits = length.div_ceil(SPLIT);
            sequences.push(SequenceRow { first_row: rows as u32, first_slot, length, token: first_token });
            decoding.push(DecodeSequence {
                first_row: rows as u32,
                first_slot,
                length,
                token: first_token,
                tokens: count,
                partial: partials,
                splits,
                unused: 0,
            });
            queries.extend((0..count).step_by(tile_q as usize).map(|start| QueryTile {
                first_token: first_token + start,
                count: tile_q.min(count - start),
                position: before + start,
                sequence: line,
            }));
            if mode == Mode::Decode {
                ranges.extend((0..count).map(|query| [partials + query * splits, splits]));
                expected_positions += (before + 1..=length).map(u64::from).sum::<u64>();
                partials = partials.checked_add(count * splits).ok_or(Error::OutOfRange {
                    what: "partial results of a step",
                    found: u64::from(partials) + u64::from(count * splits),
                    limit: u32::MAX.into(),
                })?;
            }
            used_rows = rows + u64::from(length);
            rows += u64::from(length.next_multiple_of(SPLIT));
        }
        if rows >= 1 << 31 {
            let limit = (1 << 31) - 1;
            return Err(Error::OutOfRange { what: "cached tokens of a step, padded to splits", found: rows, limit });
        }

        let lists = match (cache.lists(), token_ids) {
            (Some(lists), Some(ids)) => lists.plan(counts, ids, mode == Mode::Decode),
            _ => ListStep::default(),
        };
        check_ranges(&ranges)?;
        lists.grouped.as_ref().map_or(Ok(()), |grouped| check_ranges(&grouped.ranges))?;
        let grouped_ranges = lists.grouped.as_ref().map_or(&[][..], |grouped| &grouped.ranges);

        let mut upload = Upload::new(context.limits.min_storage_buffer_offset_alignment);
        let parts = [
            upload.add(cast_slice(&slots)),
            upload.add(cast_slice(&rotations)),
            upload.add(cast_slice(&sequences)),
            upload.add(cast_slice(if mode == Mode::Decode { &decoding[..] } else { &[] })),
            upload.add(cast_slice(&queries)),
            upload.add(cast_slice(&ranges)),
            upload.add(cast_slice(token_ids.unwrap_or_default())),
            upload.add(cast_slice(&lists.patches)),
            upload.add(cast_slice(&lists.token_rows)),
            upload.add(cast_slice(&lists.fills.0)),
            upload.add(cast_slice(&lists.fills.1)),
            upload.add(cast_slice(grouped_ranges)),
        ];
        let buffer = cache.kernels().upload("egmla.step", &upload.bytes)?;
        let [
            slots,
            rotations,
            sequence_table,
            decode_table,
            query_table,
            ranges,
            ids,
            patches,
            token_rows,
            fill_ids,
            fill_rows,
            grouped_ranges,
        ] = parts.map(|(offset, size)| Region::new(&buffer, offset, size));
        Ok(Step {
            mode,
            tokens,
            rows: rows as u32,
            used_rows: used_rows as u32,
            n_sequence: sequences.len() as u32,
            query_tiles: queries.len() as u32,
            tile_q,
            most_tokens: counts.iter().copied().max().unwrap_or(0),
            partials,
            expected_positions,
            slots,
            ids: token_ids.map(|_| ids),
            rotations,
            sequences: sequence_table,
            decoding: decode_table,
            queries: query_table,
            ranges,
            patches,
            token_rows,
            fill_ids,
            fill_rows,
            grouped_ranges,
            lists,
            identity: IDENTITIES.fetch_add(1, Ordering::Relaxed),
            counts: counts.to_vec(),
            token_ids: token_ids.unwrap_or_default().to_vec(),
            lengths_after,
            stamp: cache.stamp(),
            uploaded: upload.bytes.len() as u64,
        })
    }

    /// New tokens of all sequences: rows of the step's activations.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// `[tokens]` u32 ids on the device, when they were given.
    pub fn token_ids(&self) -> Option<&Region> {
        self.ids.as_ref()
    }

    /// Length of each sequence once the step is committed.
    pub fn lengths_after(&self) -> &[u32] {
        &self.lengths_after
    }

    /// Bytes that the step uploaded; in decode they do not depend on how much is cached.
    pub fn uploaded_bytes(&self) -> u64 {
        self.uploaded
    }

    /// Tells steps apart.
    pub(super) fn identity(&self) -> u64 {
        self.identity
    }

    pub(super) fn grouped(&self) -> Option<&Grouped> {
        self.lists.grouped.as_ref()
    }

    pub(super) fn holds(&self, lists: Option<&Lists>) -> bool {
        lists.is_none_or(|lists| lists.holds(&self.lists))
    }

    pub(super) fn commit(&self, lists: Option<&Lists>) {
        if let Some(lists) = lists {
            lists.commit(&self.lists, &self.counts, &self.token_ids);
        }
    }

    pub(super) fn stamp(&self) -> (u64, u64) {
        self.stamp
    }
}

/// The partial results of a query token, (first, count), are combined one after another.
fn check_ranges(ranges: &[[u32; 2]]) -> Result<()> {
    match ranges.iter().map(|[_, count]| *count).max() {
        Some(most) if most > MAX_ITERATIONS => Err(Error::OutOfRange {
            what: "partial results of a query token (256 cached tokens or so each)",
            found: most.into(),
            limit: MAX_ITERATIONS.into(),
        }),
        _ => Ok(()),
    }
}

fn check_ids(cache: &LatentCache, token_ids: Option<&[u32]>, tokens: u32) -> Result<()> {
    let gate = cache.config().gate.as_ref();
    let Some(ids) = token_ids else {
        return match gate {
            None => Ok(()),
            Some(_) => Err(Error::Empty { what: "the list of token ids, which the gate needs," }),
        };
    };
    if ids.len() != tokens as usize {
        return Err(Error::Count { what: "token ids", expected: tokens.into(), found: ids.len() as u64 });
    }
    let Some(gate) = gate else { return Ok(()) };
    match ids.iter().position(|&id| id >= gate.vocab_size) {
        None => Ok(()),
        Some(index) => Err(Error::TokenId { index, id: ids[index].into(), vocab_size: gate.vocab_size }),
    }
}

/// Tables laid one after another, each where a storage binding may begin.
struct Upload {
    alignment: usize,
    bytes: Vec<u8>,
}

impl Upload {
    fn new(alignment: u32) -> Self {
        Upload { alignment: alignment as usize, bytes: Vec::new() }
    }

    /// Offset and size of the table that was added; never empty, since a binding cannot be.
    fn add(&mut self, table: &[u8]) -> (u64, u64) {
        let offset = self.bytes.len().next_multiple_of(self.alignment);
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(table);
        self.bytes.resize(offset + table.len().max(16), 0);
        (offset as u64, table.len().max(16) as u64)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::check_ranges;

    #[test]
    fn what_a_combination_would_not_come_to_the_end_of_is_refused() {
        check_ranges(&[]).unwrap();
        check_ranges(&[[0, 65_534], [65_534, 1]]).unwrap();
        let error = check_ranges(&[[0, 1], [1, 65_535]]).unwrap_err();
        assert!(error.to_string().ends_with("is 65535, must be at most 65534"), "{error}");
    }
}

//! The sequences of a cache: their lengths on the host, and what identifies its state.

use std::sync::atomic::{AtomicU64, Ordering};

use super::step::{MOST_DECODED, Mode, Step};
use crate::config::{QueryScaling, RopeConfig};
use crate::error::{ArgumentError, Error, Result};
use crate::kernels::attention_decode::SPLIT;
use crate::storage::padded_width;

/// How a step numbers cache rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Numbering {
    /// Sequences that have new tokens one after another, each padded to whole splits.
    Dense,
    /// By the cache's own rows: those of a sequence begin at whole splits.
    InPlace,
}

/// Sequences of up to `capacity` tokens.
#[derive(Debug)]
pub(super) struct Batch {
    pub capacity: u32,
    /// Cache rows from one sequence to the next.
    pub pitch: u32,
    /// Cache rows of a part: see [`super::parts`].
    pub part_rows: u32,
    pub numbering: Numbering,
    /// Most new tokens of a step.
    pub max_tokens: u32,
    /// And of a sequence in a decode step.
    pub decode_tokens: u32,
    /// Workgroups of the decode attention per split.
    pub groups: u32,
    /// Tokens of each sequence.
    pub lengths: Vec<u32>,
    /// Angle per position of every rotary pair, and the factor on cos and sin.
    frequencies: Vec<f64>,
    amplitude: f64,
    /// Factor on queries by their position.
    query_scaling: Option<QueryScaling>,
    /// Rotary pairs, those of the padding among them.
    pairs: usize,
    /// Identifies the cache: it refuses a step of another.
    identity: u64,
    /// Counts changes of the state: a step made before a change is stale.
    generation: u64,
}

/// Extents of a [`Batch`].
pub(super) struct Extents {
    pub batch: u32,
    pub capacity: u32,
    pub pitch: u32,
    pub part_rows: u32,
    pub numbering: Numbering,
    pub max_tokens: u32,
    pub decode_tokens: u32,
    pub groups: u32,
}

impl Batch {
    /// Empty sequences whose keys have `d_rope` rotary elements.
    pub fn new(extents: Extents, rope: &RopeConfig, d_rope: u32) -> Self {
        static IDENTITIES: AtomicU64 = AtomicU64::new(0);
        let Extents { batch, capacity, pitch, part_rows, numbering, max_tokens, decode_tokens, groups } = extents;
        Batch {
            capacity,
            pitch,
            part_rows,
            numbering,
            max_tokens,
            decode_tokens,
            groups,
            lengths: vec![0; batch as usize],
            frequencies: rope.frequencies(d_rope),
            amplitude: rope.amplitude(),
            query_scaling: rope.query_scaling,
            pairs: padded_width(d_rope) as usize / 2,
            identity: IDENTITIES.fetch_add(1, Ordering::Relaxed),
            generation: 0,
        }
    }

    pub fn stamp(&self) -> (u64, u64) {
        (self.identity, self.generation)
    }

    /// Marks a change of the state: steps made before it are stale.
    pub fn settle(&mut self) {
        self.generation += 1;
    }

    /// cos and sin of every rotary pair at a position.
    pub fn rotate(&self, position: u32, rotations: &mut Vec<[f32; 2]>) {
        let end = rotations.len() + self.pairs;
        rotations.extend(self.frequencies.iter().map(|frequency| {
            let (sin, cos) = (f64::from(position) * frequency).sin_cos();
            [(cos * self.amplitude) as f32, (sin * self.amplitude) as f32]
        }));
        // The padding stays as it is.
        rotations.resize(end, [1.0, 0.0]);
    }

    /// The factor on the queries of a position as a rotation of a pair, by no angle; of a layer without such factors none.
    pub fn scale_query(&self, position: u32, factors: &mut Vec<[f32; 2]>) {
        factors.extend(self.query_scaling.map(|scaling| [scaling.factor(position) as f32, 0.0]));
    }

    /// Refuses a step of another cache, or one made before a change.
    pub fn check_stamp(&self, step: &Step) -> Result<()> {
        if step.stamp == self.stamp() { Ok(()) } else { Err(Error::StaleStep) }
    }

    /// Takes over the lengths of a step that has been checked.
    pub fn commit(&mut self, step: Step) {
        self.lengths = step.lengths_after;
        self.settle();
    }

    pub fn check_sequence(&self, sequence: usize) -> Result<()> {
        if sequence >= self.lengths.len() {
            let limit = self.lengths.len() as u64 - 1;
            return Err(Error::Argument(ArgumentError::OutOfRange {
                what: "sequence of the cache",
                found: sequence as u64,
                limit,
            }));
        }
        Ok(())
    }

    /// Refuses to truncate a sequence that does not exist or is shorter.
    pub fn check_truncation(&self, sequence: usize, length: u32) -> Result<()> {
        self.check_sequence(sequence)?;
        let limit = self.lengths[sequence];
        if length > limit {
            let found = length.into();
            return Err(Error::Argument(ArgumentError::OutOfRange {
                what: "length to truncate to",
                found,
                limit: limit.into(),
            }));
        }
        Ok(())
    }

    /// Lengths of the sequences after the step.
    pub fn check_counts(&self, mode: Mode, counts: &[u32]) -> Result<Vec<u32>> {
        if counts.len() != self.lengths.len() {
            let expected = self.lengths.len() as u64;
            return Err(Error::Argument(ArgumentError::Count {
                what: "counts of new tokens",
                expected,
                found: counts.len() as u64,
            }));
        }
        let tokens: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        if tokens == 0 {
            return Err(Error::Argument(ArgumentError::Empty { what: "the step (no sequence has a new token)" }));
        }
        let mut lengths = self.lengths.clone();
        for (sequence, (length, &count)) in lengths.iter_mut().zip(counts).enumerate() {
            if mode == Mode::Decode && count > MOST_DECODED {
                return Err(Error::Argument(ArgumentError::OutOfRange {
                    what: "new tokens of a sequence in a decode step",
                    found: count.into(),
                    limit: MOST_DECODED.into(),
                }));
            }
            match length.checked_add(count) {
                Some(after) if after <= self.capacity => *length = after,
                _ => {
                    let (length, added, capacity) = (*length, count.into(), self.capacity);
                    return Err(Error::CacheFull { sequence, length, added, capacity });
                }
            }
        }
        let most = counts.iter().copied().max().unwrap_or(0);
        let of_sequence = if mode == Mode::Decode { most } else { 0 };
        for (what, found, limit) in [
            ("new tokens of a step (the cache's max_tokens)", tokens, self.max_tokens),
            (
                "new tokens of a sequence in a decode step (the cache's decode_tokens)",
                of_sequence.into(),
                self.decode_tokens,
            ),
        ] {
            if found > limit.into() {
                return Err(Error::Argument(ArgumentError::OutOfRange { what, found, limit: limit.into() }));
            }
        }
        Ok(lengths)
    }
}

/// Cache rows from one sequence to the next.
pub(super) fn pitch(capacity: u32, numbering: Numbering) -> u32 {
    match numbering {
        Numbering::Dense => capacity,
        // Overflow → u32::MAX, which the check of the extents refuses.
        Numbering::InPlace => capacity.checked_next_multiple_of(SPLIT).unwrap_or(u32::MAX),
    }
}

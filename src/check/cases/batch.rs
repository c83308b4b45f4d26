//! Sequences of a step in its row numbering: their cache rows, the keys that their queries see, and their partial results.

use std::ops::Range;

use crate::check::compare::{Comparison, Tolerance};
use crate::check::guarded::{Guarded, POISON};
use crate::check::view::{Reading, View};
use crate::check::{Lab, Words, pack};
use crate::error::Result;
use crate::kernels::attention_decode::{DecodeSequence, SPLIT};
use crate::kernels::attention_prefill::QueryTile;
use crate::kernels::cache_read::SequenceRow;
use crate::reference;
use crate::storage::Storage;

/// Sequences of (cached before, new) tokens, in the step's row numbering.
#[derive(Clone)]
pub(super) struct Batch {
    pub(super) sequences: Vec<SequenceRow>,
    pub(super) counts: Vec<u32>,
    pub(super) cache_rows: u32,
    pub(super) rows: u32,
    pub(super) tokens: u32,
}

impl Batch {
    /// `slack` cache rows stay unused after each sequence.
    pub(super) fn new(lengths: &[(u32, u32)], slack: u32) -> Self {
        let (mut first_row, mut first_slot, mut token) = (0, slack, 0);
        let mut sequences = Vec::new();
        for &(before, new) in lengths {
            let length = before + new;
            sequences.push(SequenceRow { first_row, first_slot, length, token });
            first_row += length.next_multiple_of(SPLIT);
            first_slot += length + slack;
            token += new;
        }
        let counts = lengths.iter().map(|&(_, new)| new).collect();
        Batch { sequences, counts, cache_rows: first_slot, rows: first_row, tokens: token }
    }

    /// Cache rows of all valid positions, sequence after sequence.
    pub(super) fn slots(&self) -> Vec<u32> {
        self.sequences.iter().flat_map(|s| s.first_slot..s.first_slot + s.length).collect()
    }

    /// Places of a sequence's positions in the list of valid rows.
    pub(super) fn places(&self, sequence: usize) -> Range<usize> {
        let before: u32 = self.sequences[..sequence].iter().map(|s| s.length).sum();
        before as usize..(before + self.sequences[sequence].length) as usize
    }

    /// Place of a row of the step's numbering in the list of valid rows.
    pub(super) fn place(&self, row: u32) -> Option<usize> {
        (0..self.sequences.len()).find_map(|index| {
            let sequence = &self.sequences[index];
            let position = row.checked_sub(sequence.first_row).filter(|&position| position < sequence.length)?;
            Some(self.places(index).start + position as usize)
        })
    }

    /// Places that each new token attends to.
    pub(super) fn visible(&self) -> Vec<Range<usize>> {
        (0..self.sequences.len())
            .flat_map(|index| {
                let places = self.places(index);
                let first = places.end - self.counts[index] as usize;
                (first..places.end).map(move |own| places.start..own + 1)
            })
            .collect()
    }

    pub(super) fn query_tiles(&self, tile_q: u32) -> Vec<QueryTile> {
        (0..self.sequences.len())
            .flat_map(|index| {
                let (sequence, count) = (self.sequences[index], self.counts[index]);
                (0..count).step_by(tile_q as usize).map(move |start| QueryTile {
                    first_token: sequence.token + start,
                    count: tile_q.min(count - start),
                    position: sequence.length - count + start,
                    sequence: index as u32,
                })
            })
            .collect()
    }

    /// Rows [first, first + rows) of a tile of width `width`, from values of the valid rows; padding rows are NaN.
    pub(super) fn tile(&self, values: &[f32], width: usize, first: u32, rows: u32) -> Vec<f32> {
        (first..first + rows)
            .flat_map(|row| match self.place(row) {
                Some(place) => values[place * width..][..width].to_vec(),
                None => vec![f32::NAN; width],
            })
            .collect()
    }
}

/// Heads, content, rotary and value widths.
pub(super) type Widths = (usize, usize, usize, usize);

/// Up to `most` new tokens per sequence, and a last split that holds no cache row.
pub(super) fn few_new(lengths: &[u32], most: u32) -> Batch {
    let counts = (0..).zip(lengths).map(|(index, &length)| (length, (most - index % 2).clamp(1, length)));
    let mut batch = Batch::new(&counts.map(|(length, new)| (length - new, new)).collect::<Vec<_>>(), 3);
    batch.rows += SPLIT;
    batch
}

/// The sequence table of a decode step.
pub(super) fn decoding(batch: &Batch, split: u32) -> Vec<DecodeSequence> {
    let mut partial = 0;
    batch
        .sequences
        .iter()
        .zip(&batch.counts)
        .map(|(sequence, &tokens)| {
            let SequenceRow { first_row, first_slot, length, token } = *sequence;
            let splits = length.div_ceil(split);
            let line = DecodeSequence { first_row, first_slot, length, token, tokens, partial, splits, unused: 0 };
            partial += tokens * splits;
            line
        })
        .collect()
}

/// Partial results of a batch in their order: the query's token and the places it covers.
pub(super) fn splits(batch: &Batch, split: u32) -> Vec<(usize, Range<usize>)> {
    let split = split as usize;
    let visible = batch.visible();
    (0..batch.sequences.len())
        .flat_map(|index| {
            let (first, places) = (batch.sequences[index].token as usize, batch.places(index));
            let ends: Vec<usize> =
                visible[first..][..batch.counts[index] as usize].iter().map(|seen| seen.end).collect();
            ends.into_iter().enumerate().flat_map(move |(query, end)| {
                let starts = places.clone().step_by(split);
                starts.map(move |start| (first + query, start..end.min(start + split).max(start)))
            })
        })
        .collect()
}

/// Lengths and widths for the kernels over few queries: every width with the ragged batch, every batch with the plain width.
pub(super) fn few_sizes() -> impl Iterator<Item = (&'static str, &'static [u32], Widths)> {
    let lengths: [(&str, &[u32]); 4] =
        [("t1", &[1]), ("t257", &[257]), ("ragged", &[255, 1, 256, 300]), ("t1030", &[1030])];
    let widths: [Widths; 6] =
        [(1, 8, 4, 8), (3, 16, 8, 16), (9, 5, 2, 7), (2, 64, 32, 80), (5, 16, 0, 33), (63, 3, 2, 1)];
    widths.into_iter().enumerate().flat_map(move |(index, widths)| {
        let of_width = lengths.into_iter().filter(move |&(name, _)| index == 1 || name == "ragged");
        of_width.map(move |(name, lengths)| (name, lengths, widths))
    })
}

/// Padding of cache rows in these cases. `cache_append` pads with zeros; kernels promise right results with any finite padding,
/// because the padding of queries and weights is zero and the products vanish.
pub(super) const HOSTILE_PADDING: f32 = 65_504.0;

/// Rows of a cache, spread to their pitch, as the device stores them; the padding is hostile, other rows are NaN.
pub(super) fn cache_rows(values: &[f32], width: u32, rows: &[u32], cache_rows: u32, storage: Storage) -> Vec<u32> {
    let row_words = row_words(width, storage);
    let poison = match storage {
        Storage::F32 => POISON,
        Storage::F16 => 0x7ead_7ead,
    };
    let mut words = vec![poison; cache_rows as usize * row_words];
    for (index, &row) in rows.iter().enumerate() {
        let mut padded = values[index * width as usize..][..width as usize].to_vec();
        padded.resize(storage.row_pitch(width) as usize, HOSTILE_PADDING);
        words[row as usize * row_words..][..row_words].copy_from_slice(&pack(&padded, storage).0);
    }
    words
}

pub(super) fn row_words(width: u32, storage: Storage) -> usize {
    (u64::from(storage.row_pitch(width)) * storage.bytes() / 4) as usize
}

/// Cache rows in device memory from a word on, without their padding.
pub(super) fn unpack(first_word: usize, rows: u32, width: u32, storage: Storage) -> View {
    let reading = match storage {
        Storage::F32 => Reading::F32,
        Storage::F16 => Reading::F16,
    };
    View {
        reading,
        first: first_word * 4 / storage.bytes() as usize,
        counts: [rows as usize, width as usize],
        strides: [storage.row_pitch(width) as usize, 1],
    }
}

/// The kernels' mark of no key as −∞, as [`Reading::Marked`] reads it.
fn marked(value: f64) -> f64 {
    if value == f64::from(f32::MIN) { f64::NEG_INFINITY } else { value }
}

pub(super) fn compare_partials(
    lab: &Lab<'_>,
    values: &Guarded,
    softmax: &Guarded,
    expected: &reference::Partial,
    tolerance: Tolerance,
) -> Result<Vec<Comparison>> {
    let values = lab.compare(values, &expected.values, tolerance)?;
    let state = lab.read(softmax)?;
    Ok(std::iter::once(values).chain(compare_softmax(lab, (&state, 0), expected, tolerance)).collect())
}

/// (m, l) pairs, from a word on.
pub(super) fn compare_softmax(
    lab: &Lab<'_>,
    (state, first): (&Words, usize),
    expected: &reference::Partial,
    tolerance: Tolerance,
) -> [Comparison; 2] {
    let counts = [expected.max.len(), 1];
    let max = View { reading: Reading::Marked, first, counts, strides: [2, 1] };
    let sum = View { reading: Reading::F32, first: first + 1, ..max };
    let expected_max: Vec<f64> = expected.max.iter().copied().map(marked).collect();
    let compare = |view, expected: &[f64]| lab.compare_views(&[(state, view)], expected, tolerance);
    [compare(max, &expected_max), compare(sum, &expected.sum)]
}

/// Whole numbers, rounded to f32 on both sides.
pub(super) fn compare_numbers(lab: &Lab<'_>, got: &Guarded, expected: &[u32]) -> Result<Comparison> {
    let got = lab.read(got)?;
    let expected: Vec<f64> = expected.iter().map(|&word| f64::from(word as f32)).collect();
    Ok(lab.compare_views(&[(&got, View::all(Reading::U32, got.words.len()))], &expected, Tolerance::EXACT))
}

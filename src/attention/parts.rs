//! A latent cache over one binding, cut into parts.
//!
//! A cache that one binding holds has one part, its rows back to back, and nothing here changes a step. Otherwise:
//!
//! - Every part is a buffer of its own, of `part_rows` rows but for the last: as many whole splits of [`SPLIT`] rows as a binding
//!   holds. Row r of a layer is row `r % part_rows` of part `r / part_rows`.
//! - Sequences begin at multiples of [`SPLIT`] rows, which rounds the capacity up. So a border between parts is a border between
//!   splits of one sequence, or between sequences: no split has rows of two parts, whatever the split length of a step.
//! - A step numbers rows as always. Sequences stand in the order of their rows, so a part's rows are one range of whole splits
//!   in the step's numbering, and the new tokens that it takes are one range of the step's tokens.
//! - Kernels know one binding. Each part has its own tables, whose cache rows count from the part's first one, modulo 2^32: a sum
//!   of first row and position is right for every row of the part. The decoding table counts the step's rows from the part's
//!   first one, too, and begins with the line that has it: `sequence_of` takes line 0 whatever row that begins at.
//! - The append goes to every part that takes new tokens (other tokens have no row there), the absorbed attention to every
//!   part, each part filling its splits' partial results. Tiles of rebuilt keys and values end where a part ends.

use std::borrow::Cow;
use std::ops::Range;

use bytemuck::cast_slice;

use crate::kernels::attention_decode::{DecodeSequence, SPLIT};
use crate::kernels::cache_append::NO_SLOT;
use crate::kernels::cache_read::SequenceRow;

/// A part of the cache that has rows of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StepPart {
    /// Its number among the step's parts, as their tables stand.
    pub number: usize,
    /// Its place in the cache.
    pub index: usize,
    /// Its rows in the step's numbering.
    pub rows: Range<u32>,
    /// Lines of its decoding table.
    pub n_sequence: u32,
    /// It takes new tokens.
    pub appended: bool,
}

/// The tables of a part.
#[derive(Debug)]
pub(super) struct PartTables<'a> {
    pub part: StepPart,
    /// `[tokens]`: cache rows, [`NO_SLOT`] for those of other parts.
    pub slots: Cow<'a, [u32]>,
    pub sequences: Cow<'a, [SequenceRow]>,
    pub decoding: Cow<'a, [DecodeSequence]>,
}

impl PartTables<'_> {
    /// Slots, sequences and decoding sequences as they are uploaded.
    pub fn bytes(&self) -> [&[u8]; 3] {
        [cast_slice(&self.slots), cast_slice(&self.sequences), cast_slice(&self.decoding)]
    }
}

/// A step's tables for every part of `part_rows` rows that has rows of the step, which are `end` in all.
pub(super) fn cut<'a>(
    part_rows: u32,
    slots: &'a [u32],
    sequences: &'a [SequenceRow],
    decoding: &'a [DecodeSequence],
    end: u32,
) -> Vec<PartTables<'a>> {
    if part_rows == u32::MAX {
        // One part, whatever the numbering.
        let part = StepPart { number: 0, index: 0, rows: 0..end, n_sequence: sequences.len() as u32, appended: true };
        return vec![PartTables { part, slots: slots.into(), sequences: sequences.into(), decoding: decoding.into() }];
    }
    // Rows in the step's numbering, and lines.
    let mut parts: Vec<(u32, Range<u32>, Range<usize>)> = Vec::new();
    for (line, sequence) in sequences.iter().enumerate() {
        let rows = sequence.length.next_multiple_of(SPLIT);
        for Segment { part, rows, .. } in segments(sequence.first_slot, rows, part_rows) {
            let after = sequence.first_row + rows.end;
            match parts.last_mut() {
                Some((last, of_part, lines)) if *last == part => (of_part.end, lines.end) = (after, line + 1),
                _ => parts.push((part, sequence.first_row + rows.start..after, line..line + 1)),
            }
        }
    }
    let tables = |(number, (index, rows, lines)): (usize, (u32, Range<u32>, Range<usize>))| {
        let first = index.saturating_mul(part_rows);
        let slot = |slot: u32| if slot / part_rows == index { slot - first } else { NO_SLOT };
        let slots: Vec<u32> = slots.iter().copied().map(slot).collect();
        let appended = slots.iter().any(|&slot| slot != NO_SLOT);
        let moved = |of: &SequenceRow| SequenceRow { first_slot: of.first_slot.wrapping_sub(first), ..*of };
        let counted = |of: &DecodeSequence| DecodeSequence {
            first_row: of.first_row.wrapping_sub(rows.start),
            first_slot: of.first_slot.wrapping_sub(first),
            ..*of
        };
        PartTables {
            slots: slots.into(),
            sequences: sequences.iter().map(moved).collect(),
            decoding: decoding.get(lines.clone()).unwrap_or_default().iter().map(counted).collect(),
            part: StepPart { number, index: index as usize, n_sequence: lines.len() as u32, rows, appended },
        }
    };
    parts.into_iter().enumerate().map(tables).collect()
}

/// Rows that stand together in one part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    pub part: u32,
    /// Row of the part.
    pub first_row: u32,
    /// Of all rows, counted from the first.
    pub rows: Range<u32>,
}

/// `rows` rows of a layer from `first_row` on, part by part.
pub(super) fn segments(first_row: u32, rows: u32, part_rows: u32) -> impl Iterator<Item = Segment> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let first = first_row + done;
        let (part, first_row) = (first / part_rows, first % part_rows);
        let taken = (part_rows - first_row).min(rows - done);
        let rows = done..done + taken;
        done += taken;
        (taken > 0).then_some(Segment { part, first_row, rows })
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use super::*;

    const FIRST: SequenceRow = SequenceRow { first_row: 0, first_slot: 512, length: 600, token: 0 };
    const SECOND: SequenceRow = SequenceRow { first_row: 768, first_slot: 1536, length: 3, token: 2 };

    fn decoding(of: SequenceRow, tokens: u32) -> DecodeSequence {
        let SequenceRow { first_row, first_slot, length, token } = of;
        DecodeSequence { first_row, first_slot, length, token, tokens, partial: 7 * token, splits: 3, unused: 0 }
    }

    #[test]
    fn one_part_has_the_steps_own_tables() {
        let slots = vec![1110, 1111, 1538];
        let (rows, lines) = ([FIRST, SECOND], [decoding(FIRST, 2), decoding(SECOND, 1)]);
        let mut parts = cut(u32::MAX, &slots, &rows, &lines, 1024);
        let only = parts.pop().unwrap();
        assert!(parts.is_empty());
        assert_eq!(only.part, StepPart { number: 0, index: 0, rows: 0..1024, n_sequence: 2, appended: true });
        assert_eq!((&only.slots[..], &only.sequences[..]), (&slots[..], &[FIRST, SECOND][..]));
        assert_eq!(only.decoding[..], lines);
    }

    /// A border within the first sequence, 512 rows from its first, then a part without a row of the step.
    #[test]
    fn tables_count_from_the_first_row_of_a_part() {
        let (rows, lines) = ([FIRST, SECOND], [decoding(FIRST, 2), decoding(SECOND, 1)]);
        let parts = cut(1024, &[1023, 1024, 1538], &rows, &lines, 1024);
        let [first, second] = &parts[..] else { panic!("{parts:?}") };
        assert_eq!(first.part, StepPart { number: 0, index: 0, rows: 0..512, n_sequence: 1, appended: true });
        assert_eq!(first.slots[..], [1023, NO_SLOT, NO_SLOT]);
        assert_eq!(first.decoding[..], lines[..1]);
        assert_eq!(second.part, StepPart { number: 1, index: 1, rows: 512..1024, n_sequence: 2, appended: true });
        assert_eq!(second.slots[..], [NO_SLOT, 0, 514]);
        // Position 512 of the first sequence, and the first of the second.
        let [a, b] = &second.decoding[..] else { panic!("{second:?}") };
        assert_eq!([a.first_row.wrapping_add(512), a.first_slot.wrapping_add(512)], [0, 0]);
        assert_eq!([b.first_row, b.first_slot], [256, 512]);
        assert_eq!([second.sequences[0].first_row, second.sequences[1].first_row], [0, 768]);
        assert_eq!([second.sequences[0].first_slot.wrapping_add(512), second.sequences[1].first_slot], [0, 512]);
        let far = SequenceRow { first_slot: 4096, ..SECOND };
        let sequences = [FIRST, far];
        let parts = cut(1024, &[1023, 1111, 4098], &sequences, &[], 1024);
        let rows: Vec<_> = parts.iter().map(|of| (of.part.index, of.part.rows.clone())).collect();
        assert_eq!(rows, [(0, 0..512), (1, 512..768), (4, 768..1024)]);
    }

    #[test]
    fn segments_end_where_parts_end() {
        let all: Vec<_> = segments(500, 1300, 512).map(|of| (of.part, of.first_row, of.rows)).collect();
        assert_eq!(all, [(0, 500, 0..12), (1, 0, 12..524), (2, 0, 524..1036), (3, 0, 1036..1300)]);
        assert_eq!(segments(512, 0, 512).count(), 0);
    }
}

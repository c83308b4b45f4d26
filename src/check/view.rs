//! The compared elements of a region, as data: another host reads the same elements in the same way.

use serde::Serialize;

use super::guarded::POISON;

/// Decoding of an element from the region's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reading {
    /// A word as f32.
    F32,
    /// A half of a word as f16; the low half first, and elements count halves.
    F16,
    /// A word as a whole number, rounded to f32.
    U32,
    /// A word as f32, the lowest f32 as −∞: the kernels' mark of no key would drown all other numbers in the norm.
    Marked,
    /// Of two words (m, l) as f32, m + ln l, rounded to f32: the logarithm of a sum of exponentials.
    LogSumExp,
    /// One element for the whole region: how many of its words hold no [`POISON`] any more.
    Written,
}

/// A table of elements in a region: element (i, j) begins at `first + i · strides[0] + j · strides[1]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct View {
    /// Decoding of an element.
    pub reading: Reading,
    /// The first element: in halves for f16, else in words.
    pub first: usize,
    /// Rows, and elements of a row.
    pub counts: [usize; 2],
    /// Elements from a row to the next, and from an element to the next.
    pub strides: [usize; 2],
}

impl View {
    /// The first `count` elements, one after another.
    pub fn all(reading: Reading, count: usize) -> Self {
        View { reading, first: 0, counts: [1, count], strides: [count, 1] }
    }

    /// The elements, row by row; NaN where the region ends before them.
    pub fn apply(&self, words: &[u32]) -> Vec<f32> {
        if self.reading == Reading::Written {
            return vec![words.iter().filter(|&&word| word != POISON).count() as f32];
        }
        let float = |at: usize| words.get(at).map_or(f32::NAN, |&word| f32::from_bits(word));
        let element = |at: usize| match self.reading {
            Reading::F32 => float(at),
            Reading::F16 => words
                .get(at / 2)
                .map_or(f32::NAN, |word| half::f16::from_bits((word >> (16 * (at % 2))) as u16).to_f32()),
            Reading::U32 => words.get(at).map_or(f32::NAN, |&word| word as f32),
            Reading::Marked if float(at) == f32::MIN => f32::NEG_INFINITY,
            Reading::Marked => float(at),
            Reading::LogSumExp => float(at) + float(at + 1).ln(),
            Reading::Written => f32::NAN,
        };
        let row =
            |row: usize| (0..self.counts[1]).map(move |j| self.first + row * self.strides[0] + j * self.strides[1]);
        (0..self.counts[0]).flat_map(row).map(element).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{POISON, Reading, View};

    #[test]
    fn elements_are_read_by_row_and_missing_ones_are_nan() {
        let words: Vec<u32> = (0..6).map(|i| (i as f32).to_bits()).collect();
        let view = View { reading: Reading::F32, first: 1, counts: [2, 2], strides: [3, 2] };
        let got = view.apply(&words);
        assert_eq!(got[..3], [1.0, 3.0, 4.0]);
        assert!(got[3].is_nan());
    }

    #[test]
    fn each_reading() {
        let read = |reading, words: &[u32], count| View::all(reading, count).apply(words);
        assert_eq!(read(Reading::F16, &[0x4000_3c00, 0xbc00], 3), [1.0, 2.0, -1.0]);
        assert_eq!(read(Reading::U32, &[7, u32::MAX], 2), [7.0, u32::MAX as f32]);
        assert_eq!(read(Reading::Marked, &[f32::MIN.to_bits(), 0], 2), [f32::NEG_INFINITY, 0.0]);
        assert_eq!(read(Reading::LogSumExp, &[2f32.to_bits(), 1f32.to_bits()], 1), [2.0]);
        assert_eq!(read(Reading::Written, &[POISON, 0, POISON, 1], 99), [2.0]);
    }
}

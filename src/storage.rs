//! Storage types of the device, and saturating arithmetic of sizes: no size wraps around.

use serde::{Deserialize, Serialize};

/// Storage of weights and caches on the device, and of the weights of a model on the CPU. Activations, accumulators, maxima and
/// sums are always f32; cooperative matrices round the factors of a product to f16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit floats, two in a word, decoded with `unpack2x16float`: no shader feature is needed.
    F16,
}

impl Storage {
    /// Both, in the order of their number in the shaders.
    pub const ALL: [Storage; 2] = [Storage::F32, Storage::F16];

    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Storage::F32 => 4,
            Storage::F16 => 2,
        }
    }

    /// Value of the shaders' `STORAGE_F16` override.
    pub(crate) fn constant(self) -> f64 {
        f64::from(u8::from(self == Storage::F16))
    }

    /// Bytes of `elements` elements.
    pub(crate) fn sized(self, elements: u64) -> u64 {
        elements.saturating_mul(self.bytes())
    }

    /// Bytes of a densely packed tensor, rounded up to whole words.
    pub fn tensor_bytes(self, elements: u64) -> u64 {
        padded(self.sized(elements), 4)
    }

    /// Elements from one cache row to the next: rows begin on 16-byte boundaries, so that a row is read in whole
    /// 16-byte loads and two rows never share a word.
    pub fn row_pitch(self, width: u32) -> u32 {
        // Overflow → u32::MAX, which the limit check refuses.
        width.checked_next_multiple_of(self.of_load()).unwrap_or(u32::MAX)
    }

    /// Elements of a 16-byte load.
    pub(crate) fn of_load(self) -> u32 {
        16 / self.bytes() as u32
    }

    /// 16-byte loads from one cache row to the next.
    pub(crate) fn row_loads(self, width: u32) -> u32 {
        self.row_pitch(width) / self.of_load()
    }

    /// A short name: `f32` or `f16`.
    pub fn name(self) -> &'static str {
        match self {
            Storage::F32 => "f32",
            Storage::F16 => "f16",
        }
    }
}

/// Elements that the widths of weights and caches are padded to, with zeros: whole 16-byte loads in either storage.
pub const UNIT: u32 = 8;

/// A width with its padding; overflow gives `u32::MAX`, which the limit check refuses.
pub fn padded_width(width: u32) -> u32 {
    width.checked_next_multiple_of(UNIT).unwrap_or(u32::MAX)
}

/// `count` times two parts, as keys and values of every head, each padded with zeros to [`UNIT`] elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segments {
    /// Repeats of the two parts.
    pub count: u32,
    /// Elements of the first part and of the second, without padding.
    pub parts: [u32; 2],
}

impl Segments {
    /// One part, once.
    pub fn one(width: u32) -> Self {
        Segments { count: 1, parts: [width, 0] }
    }

    /// Elements without padding.
    pub fn used(&self) -> u32 {
        saturated(product(&[self.count, self.parts[0].saturating_add(self.parts[1])]))
    }

    /// Elements of the first part, then of both, with their padding.
    pub(crate) fn padded_parts(&self) -> [u32; 2] {
        let [first, second] = self.parts.map(padded_width);
        [first, first.saturating_add(second)]
    }

    /// Elements of all parts with their padding.
    pub fn width(&self) -> u32 {
        saturated(product(&[self.count, self.padded_parts()[1]]))
    }

    /// Whether a part has padding.
    pub(crate) fn is_padded(&self) -> bool {
        self.parts.iter().any(|part| !part.is_multiple_of(UNIT))
    }
}

crate::vary!(Segments { count, parts });

fn saturated(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Bytes or elements, rounded up. Overflow saturates and fails every later comparison with a limit; a wrapped number would pass.
pub(crate) fn padded(count: u64, to: u64) -> u64 {
    count.checked_next_multiple_of(to).unwrap_or(u64::MAX)
}

/// Bytes of `count` words.
pub(crate) fn words(count: u64) -> u64 {
    count.saturating_mul(4)
}

/// Product of extents in 64 bits; saturates, so that every later comparison with a limit fails.
pub(crate) fn product(extents: &[u32]) -> u64 {
    extents.iter().fold(1, |total: u64, &extent| total.saturating_mul(extent.into()))
}

/// End, in elements, of rows of `width` that begin at `offset`, `pitch` apart.
pub(crate) fn rows_end(offset: u32, rows: u32, pitch: u32, width: u32) -> u64 {
    u64::from(offset) + product(&[rows.saturating_sub(1), pitch]) + u64::from(width)
}

#[cfg(test)]
mod tests {
    use super::{Storage, padded};

    #[test]
    fn what_does_not_fit_a_number_does_not_come_out_small() {
        assert_eq!((padded(5, 4), padded(8, 4)), (8, 8));
        assert_eq!((padded(u64::MAX, 4), padded(u64::MAX - 1, 16)), (u64::MAX, u64::MAX));
        for storage in Storage::ALL {
            assert_eq!(storage.tensor_bytes(u64::MAX), u64::MAX);
            assert_eq!(storage.row_pitch(u32::MAX), u32::MAX);
            assert_eq!((storage.row_loads(0), storage.row_loads(9)), (0, if storage == Storage::F32 { 3 } else { 2 }));
            assert!(storage.row_loads(u32::MAX) > 1 << 28);
        }
    }
}

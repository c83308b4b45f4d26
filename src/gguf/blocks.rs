//! Element types of GGUF tensors, and their values in f32.
//!
//! A quantised tensor is a row of blocks, each of a few scales and of small integers. With `d` and `m` in f16:
//!
//! | type | elements of a block | value |
//! |---|---|---|
//! | Q8_0 | 32 | d · n, n in −128..128 |
//! | Q4_0, Q5_0 | 32 | d · (n − 8), d · (n − 16) |
//! | Q4_1, Q5_1 | 32 | d · n + m |
//! | Q4_K, Q5_K | 8 · 32 | (d · s) · n − (m · t), s and t of 6 bits for each 32 |
//! | Q6_K | 16 · 16 | (d · s) · (n − 32), s of 8 bits for each 16 |
//!
//! Source: the definitions of the format's own library, ggml, and the numbers and sizes of its Python package.

use half::{bf16, f16};

/// Appends the values of one block to a list.
type Widen = fn(&[u8], &mut Vec<f32>);

/// An element type.
#[derive(Debug)]
pub(super) struct Kind {
    /// Its number in a file.
    number: u32,
    /// Its name, as the format has it.
    pub name: &'static str,
    /// Elements of a block, along the innermost extent.
    pub elements: usize,
    /// Bytes of a block.
    pub bytes: usize,
    /// How a block is read; `None` where it is not.
    pub widen: Option<Widen>,
}

/// The names of all types that are read.
pub(super) const READ: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K";

const fn read(number: u32, name: &'static str, elements: usize, bytes: usize, widen: Widen) -> Kind {
    Kind { number, name, elements, bytes, widen: Some(widen) }
}

const fn unread(number: u32, name: &'static str, elements: usize, bytes: usize) -> Kind {
    Kind { number, name, elements, bytes, widen: None }
}

const KINDS: &[Kind] = &[
    read(0, "F32", 1, 4, |b, out| out.push(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
    read(1, "F16", 1, 2, |b, out| out.push(half(b, 0))),
    read(2, "Q4_0", 32, 18, |b, out| {
        let d = half(b, 0);
        out.extend((0..32).map(|i| d * (nibble(&b[2..], i) - 8) as f32));
    }),
    read(3, "Q4_1", 32, 20, |b, out| {
        let (d, m) = (half(b, 0), half(b, 2));
        out.extend((0..32).map(|i| d * nibble(&b[4..], i) as f32 + m));
    }),
    read(6, "Q5_0", 32, 22, |b, out| {
        let d = half(b, 0);
        out.extend((0..32).map(|i| d * (nibble(&b[6..], i) + fifth(&b[2..], i) - 16) as f32));
    }),
    read(7, "Q5_1", 32, 24, |b, out| {
        let (d, m) = (half(b, 0), half(b, 2));
        out.extend((0..32).map(|i| d * (nibble(&b[8..], i) + fifth(&b[4..], i)) as f32 + m));
    }),
    read(8, "Q8_0", 32, 34, |b, out| {
        let d = half(b, 0);
        out.extend(b[2..34].iter().map(|&n| d * f32::from(n as i8)));
    }),
    unread(9, "Q8_1", 32, 40),
    unread(10, "Q2_K", 256, 84),
    unread(11, "Q3_K", 256, 110),
    read(12, "Q4_K", 256, 144, |b, out| {
        let (d, m) = (half(b, 0), half(b, 2));
        for group in 0..8 {
            let (s, t) = scales(&b[4..16], group);
            let (d, m) = (d * s, m * t);
            // Two groups share 32 bytes: their lower halves are the first one's.
            let bytes = &b[16 + group / 2 * 32..][..32];
            out.extend(bytes.iter().map(|byte| d * f32::from(byte >> (group % 2 * 4) & 15) - m));
        }
    }),
    read(13, "Q5_K", 256, 176, |b, out| {
        let (d, m) = (half(b, 0), half(b, 2));
        for group in 0..8 {
            let (s, t) = scales(&b[4..16], group);
            let (d, m) = (d * s, m * t);
            let bytes = b[48 + group / 2 * 32..][..32].iter().zip(&b[16..48]);
            out.extend(bytes.map(|(byte, fifth)| {
                let n = byte >> (group % 2 * 4) & 15 | (fifth >> group & 1) << 4;
                d * f32::from(n) - m
            }));
        }
    }),
    read(14, "Q6_K", 256, 210, |b, out| {
        let d = half(b, 208);
        for i in 0..256 {
            // In each half of the block: four times 32 elements, of which the first two quarters take the lower halves of 64
            // bytes, the last two the upper ones, and all four two bits each of 32 bytes.
            let (part, quarter, lane) = (i / 128, i / 32 % 4, i % 32);
            let low = b[part * 64 + quarter % 2 * 32 + lane] >> (quarter / 2 * 4) & 15;
            let high = b[128 + part * 32 + lane] >> (quarter * 2) & 3;
            let scale = d * f32::from(b[192 + i / 16] as i8);
            out.push(scale * f32::from((low | high << 4) as i8 - 32));
        }
    }),
    unread(15, "Q8_K", 256, 292),
    unread(16, "IQ2_XXS", 256, 66),
    unread(17, "IQ2_XS", 256, 74),
    unread(18, "IQ3_XXS", 256, 98),
    unread(19, "IQ1_S", 256, 50),
    unread(20, "IQ4_NL", 32, 18),
    unread(21, "IQ3_S", 256, 110),
    unread(22, "IQ2_S", 256, 82),
    unread(23, "IQ4_XS", 256, 136),
    unread(24, "I8", 1, 1),
    unread(25, "I16", 1, 2),
    unread(26, "I32", 1, 4),
    unread(27, "I64", 1, 8),
    unread(28, "F64", 1, 8),
    unread(29, "IQ1_M", 256, 56),
    read(30, "BF16", 1, 2, |b, out| out.push(bf16::from_le_bytes([b[0], b[1]]).to_f32())),
    unread(34, "TQ1_0", 256, 54),
    unread(35, "TQ2_0", 256, 66),
    unread(39, "MXFP4", 32, 17),
    unread(40, "NVFP4", 64, 36),
    unread(41, "Q1_0", 128, 18),
];

impl Kind {
    /// The type of a number, where it is known.
    pub(super) fn of(number: u32) -> Option<&'static Kind> {
        KINDS.iter().find(|kind| kind.number == number)
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Element `i` of 32 in 16 bytes: the lower halves hold the first 16, the upper ones the last.
fn nibble(bytes: &[u8], i: usize) -> i32 {
    i32::from(bytes[i % 16] >> (i / 16 * 4) & 15)
}

/// The fifth bit of element `i`, of 32 in 4 bytes.
fn fifth(bytes: &[u8], i: usize) -> i32 {
    i32::from(bytes[i / 8] >> (i % 8) & 1) << 4
}

/// Factor and subtrahend of one of 8 groups, of 6 bits each in 12 bytes: those of groups 0 to 3 in the lower six bits of bytes 0
/// to 3 and 4 to 7; those of groups 4 to 7 in the two halves of bytes 8 to 11, with their upper two bits in the bytes before.
fn scales(bytes: &[u8], group: usize) -> (f32, f32) {
    let (s, t) = match group {
        0..4 => (bytes[group] & 63, bytes[group + 4] & 63),
        _ => (bytes[group + 4] & 15 | bytes[group - 4] >> 6 << 4, bytes[group + 4] >> 4 | bytes[group] >> 6 << 4),
    };
    (f32::from(s), f32::from(t))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// A block as a string of bits, the lowest first.
    struct Bits<'a>(&'a [u8]);

    impl Bits<'_> {
        /// `count` bits from bit `at` on.
        fn take(&self, at: usize, count: usize) -> i64 {
            (0..count).map(|i| i64::from(self.0[(at + i) / 8] >> ((at + i) % 8) & 1) << i).sum()
        }

        /// The f16 at a byte, by its definition.
        fn half(&self, byte: usize) -> f64 {
            let bits = self.take(byte * 8, 16);
            let (fraction, exponent) = (bits & 0x3ff, bits >> 10 & 31);
            let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
            match exponent {
                0 => sign * fraction as f64 * 2f64.powi(-24),
                _ => sign * (1.0 + fraction as f64 / 1024.0) * 2f64.powi(exponent as i32 - 15),
            }
        }
    }

    /// Element `i` of a block by where its bits stand, in f64.
    fn defined(name: &str, block: &[u8], i: usize) -> f64 {
        let bits = Bits(block);
        // Which bit of a byte row an element's nibble begins at: rows of `width` bytes hold twice as many elements.
        let nibble = |from: usize, width: usize| {
            let (row, column) = (i / (2 * width), i % (2 * width));
            bits.take(8 * (from + row * width + column % width) + if column < width { 0 } else { 4 }, 4)
        };
        // Bytes 0 to 11 of a K block's scales: `AAAAAA EE` and so on.
        let six = |group: usize, upper: usize| match group {
            0..4 => bits.take(8 * (4 + 4 * upper + group), 6),
            _ => {
                bits.take(8 * (12 + group - 4) + 4 * upper, 4) + 16 * bits.take(8 * (4 + 4 * upper + group - 4) + 6, 2)
            }
        };
        match name {
            "F16" => bits.half(0),
            "F32" => f64::from(f32::from_bits(bits.take(0, 32) as u32)),
            "BF16" => f64::from(f32::from_bits((bits.take(0, 16) as u32) << 16)),
            "Q8_0" => {
                let n = bits.take(8 * (2 + i), 8);
                bits.half(0) * (if n < 128 { n } else { n - 256 }) as f64
            }
            "Q4_0" => bits.half(0) * (nibble(2, 16) - 8) as f64,
            "Q4_1" => bits.half(0) * nibble(4, 16) as f64 + bits.half(2),
            "Q5_0" => bits.half(0) * (nibble(6, 16) + 16 * bits.take(16 + i, 1) - 16) as f64,
            "Q5_1" => bits.half(0) * (nibble(8, 16) + 16 * bits.take(32 + i, 1)) as f64 + bits.half(2),
            "Q4_K" => {
                let n = nibble(16, 32) as f64;
                bits.half(0) * six(i / 32, 0) as f64 * n - bits.half(2) * six(i / 32, 1) as f64
            }
            "Q5_K" => {
                let n = nibble(48, 32) + 16 * bits.take(8 * (16 + i % 32) + i / 32, 1);
                bits.half(0) * (six(i / 32, 0) * n) as f64 - bits.half(2) * six(i / 32, 1) as f64
            }
            "Q6_K" => {
                let n = nibble(0, 64) + 16 * bits.take(8 * (128 + i / 128 * 32 + i % 32) + 2 * (i % 128 / 32), 2) - 32;
                let scale = bits.take(8 * (192 + i / 16), 8);
                bits.half(208) * ((if scale < 128 { scale } else { scale - 256 }) * n) as f64
            }
            other => unreachable!("{other}"),
        }
    }

    /// Blocks of random bits, whose halves are finite.
    fn blocks(kind: &Kind, count: usize) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(u64::from(kind.number) + 1);
        let mut bytes: Vec<u8> = (0..count * kind.bytes).map(|_| random.u8(..)).collect();
        for block in bytes.chunks_exact_mut(kind.bytes) {
            let halves: &[usize] = match kind.name {
                "F32" | "BF16" => &[],
                "Q6_K" => &[208],
                "F16" | "Q8_0" | "Q4_0" | "Q5_0" => &[0],
                _ => &[0, 2],
            };
            for &at in halves {
                // Exponents 4 to 19: no NaN, and every sum exact in f64.
                let exponent = random.u8(4..20);
                block[at + 1] = block[at + 1] & 0x83 | exponent << 2;
            }
            if let "F32" | "BF16" = kind.name {
                // Not all ones.
                let last = block.len() - 2;
                block[last] &= 0x7f;
            }
        }
        bytes
    }

    #[test]
    fn values_are_those_of_the_definition() {
        let mut read = Vec::new();
        for kind in KINDS {
            let Some(widen) = kind.widen else { continue };
            read.push(kind.name);
            let bytes = blocks(kind, 200);
            for block in bytes.chunks_exact(kind.bytes) {
                let mut values = Vec::new();
                widen(block, &mut values);
                assert_eq!(values.len(), kind.elements);
                for (i, &value) in values.iter().enumerate() {
                    let expected = defined(kind.name, block, i);
                    // All products have at most 24 bits, so they are exact in f32; a sum is rounded once.
                    assert_eq!(value, expected as f32, "{} {i}", kind.name);
                }
            }
        }
        read.sort_unstable();
        let mut named: Vec<_> = READ.split([',', ' ']).filter(|word| !word.is_empty() && *word != "or").collect();
        named.sort_unstable();
        assert_eq!(read, named);
    }

    #[test]
    fn a_type_has_one_number_and_one_name() {
        for kind in KINDS {
            assert_eq!(Kind::of(kind.number).unwrap().name, kind.name);
            assert_eq!(KINDS.iter().filter(|other| other.name == kind.name).count(), 1);
        }
        assert!(Kind::of(4).is_none(), "a type that was removed from the format");
    }
}

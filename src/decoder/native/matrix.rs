//! Matrices of weights in memory: as halves where every element is one, else in f32. Products widen halves in registers, so that a
//! decode step reads half the bytes and computes what it computes in f32, bit by bit.

use half::{bf16, f16};
use pulp::Simd;

/// Elements that a product takes at once: two vectors at least, of every instruction set.
pub(super) const BLOCK: usize = 32;

/// Words of a block of halves. The low half of each is an element, the high half the one that comes `WORDS` later: so vectors of
/// words become vectors of neighbours by shifts and masks alone, which every instruction set has.
const WORDS: usize = BLOCK / 2;

/// A block of a row in memory.
pub(super) trait Block: Copy + Send + Sync + 'static {
    /// Vector number `i` of the first half of the block, and of the second.
    fn vectors<S: Simd>(&self, simd: S, i: usize) -> [S::f32s; 2];

    /// All of it.
    fn wide(&self) -> [f32; BLOCK];
}

impl Block for [f32; BLOCK] {
    #[inline(always)]
    fn vectors<S: Simd>(&self, _: S, i: usize) -> [S::f32s; 2] {
        let vectors = S::as_simd_f32s(self).0;
        [vectors[i], vectors[WORDS / S::F32_LANES + i]]
    }

    fn wide(&self) -> [f32; BLOCK] {
        *self
    }
}

/// bf16 in words.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bf16s([u32; WORDS]);

impl Block for Bf16s {
    /// A bf16 is the high half of its f32.
    #[inline(always)]
    fn vectors<S: Simd>(&self, simd: S, i: usize) -> [S::f32s; 2] {
        let words = S::as_simd_u32s(&self.0).0[i];
        let low = simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16));
        let high = simd.and_u32s(words, simd.splat_u32s(0xffff_0000));
        [simd.transmute_f32s_u32s(low), simd.transmute_f32s_u32s(high)]
    }

    fn wide(&self) -> [f32; BLOCK] {
        halves(&self.0, |half| f32::from_bits(u32::from(half) << 16))
    }
}

/// Finite f16 in words.
#[derive(Debug, Clone, Copy)]
pub(super) struct F16s([u32; WORDS]);

impl F16s {
    /// 2¹²⁷⁻¹⁵
    const BIAS: f32 = f32::from_bits((127 + 127 - 15) << 23);

    /// High halves of words as f32: exponent and fraction go where f32 has them; the product makes up for the other bias of the
    /// exponent, also of subnormals.
    #[inline(always)]
    fn high<S: Simd>(simd: S, words: S::u32s) -> S::f32s {
        let sign = simd.and_u32s(words, simd.splat_u32s(0x8000_0000));
        let shifted = simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(3));
        let bits = simd.or_u32s(sign, simd.and_u32s(shifted, simd.splat_u32s(0x0fff_e000)));
        simd.mul_f32s(simd.transmute_f32s_u32s(bits), simd.splat_f32s(Self::BIAS))
    }
}

impl Block for F16s {
    #[inline(always)]
    fn vectors<S: Simd>(&self, simd: S, i: usize) -> [S::f32s; 2] {
        let words = S::as_simd_u32s(&self.0).0[i];
        let low = simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16));
        [Self::high(simd, low), Self::high(simd, words)]
    }

    fn wide(&self) -> [f32; BLOCK] {
        halves(&self.0, |half| {
            let half = u32::from(half);
            f32::from_bits((half & 0x8000) << 16 | (half & 0x7fff) << 13) * Self::BIAS
        })
    }
}

fn halves(words: &[u32; WORDS], wide: impl Fn(u16) -> f32) -> [f32; BLOCK] {
    let mut elements = [0.0; BLOCK];
    let (first, second) = elements.split_at_mut(WORDS);
    for ((&word, first), second) in words.iter().zip(first).zip(second) {
        *first = wide(word as u16);
        *second = wide((word >> 16) as u16);
    }
    elements
}

/// Rows of `width` as blocks, the last of each filled up with zeros.
fn in_blocks<B>(rows: &[f32], width: usize, half: impl Fn(f32) -> u16, block: impl Fn([u32; WORDS]) -> B) -> Vec<B> {
    let blocks = rows.chunks(width).flat_map(|row| row.chunks(BLOCK));
    blocks
        .map(|elements| {
            let half = |i: usize| u32::from(elements.get(i).map_or(0, |&element| half(element)));
            block(std::array::from_fn(|i| half(i) | half(i + WORDS) << 16))
        })
        .collect()
}

/// Elements of a matrix, row by row; of halves whole blocks.
#[derive(Debug)]
pub(super) enum Matrix {
    F32(Vec<f32>),
    F16(Vec<F16s>),
    Bf16(Vec<Bf16s>),
}

impl Matrix {
    /// Keeps every value: as bf16 or f16 where that type has all of them.
    pub fn new(rows: Vec<f32>, width: usize) -> Self {
        if rows.iter().all(|value| value.to_bits().trailing_zeros() >= 16) {
            return Matrix::Bf16(in_blocks(&rows, width, |value| bf16::from_f32(value).to_bits(), Bf16s));
        }
        if rows.iter().all(|&value| is_half(value)) {
            return Matrix::F16(in_blocks(&rows, width, |value| f16::from_f32(value).to_bits(), F16s));
        }
        Matrix::F32(rows)
    }
}

/// Whether a value is one of f16's, and finite: of its exponents with 10 bits behind the point, or below them a multiple of 2⁻²⁴.
fn is_half(value: f32) -> bool {
    let magnitude = value.abs();
    if magnitude < f16::MIN_POSITIVE.to_f32_const() {
        let multiple = magnitude * f32::from_bits((127 + 24) << 23);
        return multiple == f32::from(multiple as u16);
    }
    magnitude <= f16::MAX.to_f32_const() && value.to_bits().trailing_zeros() >= 13
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wide(matrix: &Matrix) -> Vec<f32> {
        match matrix {
            Matrix::F32(values) => values.clone(),
            Matrix::F16(blocks) => blocks.iter().flat_map(Block::wide).collect(),
            Matrix::Bf16(blocks) => blocks.iter().flat_map(Block::wide).collect(),
        }
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn halves_widen_to_their_own_values() {
        let all = |value: &dyn Fn(u16) -> f32| (0..=u16::MAX).map(value).filter(|x| !x.is_nan()).collect::<Vec<_>>();
        let brains = all(&|bits| bf16::from_bits(bits).to_f32());
        let matrix = Matrix::new(brains.clone(), 1 << 16);
        assert!(matches!(matrix, Matrix::Bf16(_)));
        assert_eq!(bits(&wide(&matrix)[..brains.len()]), bits(&brains));
        let finite: Vec<_> = all(&|bits| f16::from_bits(bits).to_f32()).into_iter().filter(|x| x.is_finite()).collect();
        let matrix = Matrix::new(finite.clone(), 1 << 16);
        assert!(matches!(matrix, Matrix::F16(_)));
        assert_eq!(bits(&wide(&matrix)[..finite.len()]), bits(&finite));
    }

    #[test]
    fn halves_are_told_from_their_neighbours() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            assert_eq!(is_half(half.to_f32()), half.is_finite(), "{bits:#x}");
            let next = f32::from_bits(half.to_f32().to_bits() + 1);
            assert!(!is_half(next), "{bits:#x}");
        }
    }

    #[test]
    fn a_matrix_takes_the_form_that_keeps_every_value() {
        // 2⁻²⁴ is the smallest of f16, 1 + 2⁻¹⁰ is not one of bf16.
        let fine = 1.0 + 2f32.powi(-10);
        assert!(matches!(Matrix::new(vec![2f32.powi(100), -0.0, f32::INFINITY, f32::NAN], 2), Matrix::Bf16(_)));
        assert!(matches!(Matrix::new(vec![fine, -2f32.powi(-24), -0.0, 65504.0], 2), Matrix::F16(_)));
        for value in [2f32.powi(-25) * 1.5, 65520.0, 0.1, 1e-45, f32::INFINITY, f32::NAN] {
            assert!(matches!(Matrix::new(vec![fine, value], 2), Matrix::F32(_)), "{value}");
        }
    }

    #[test]
    fn rows_are_filled_up_with_zeros() {
        let rows: Vec<f32> = (0..3 * 35).map(|i| i as f32).collect();
        let matrix = wide(&Matrix::new(rows.clone(), 35));
        for (found, row) in matrix.chunks(64).zip(rows.chunks(35)) {
            assert_eq!((&found[..35], found[35..].iter().all(|&x| x == 0.0)), (row, true));
        }
    }
}

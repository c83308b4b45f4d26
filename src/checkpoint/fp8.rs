//! Weights in 8-bit floats with scales, as DeepSeek-V3 has them: `NAME` in e4m3 and `NAME_scale_inv`, one factor for each block of
//! rows and columns or for the whole tensor. A weight is its code's value times its factor.

use crate::error::{Error, Result, TensorError};

/// The element type's name in safetensors.
pub(super) const NAME: &str = "F8_E4M3";

/// Behind a weight's name, the name of its factors.
pub(super) const SCALE: &str = "_scale_inv";

/// Rows and columns of a block where a configuration gives none.
pub(super) const BLOCK: [usize; 2] = [128, 128];

/// The value of a code: sign, 4 bits of exponent with bias 7, 3 of fraction. There are no infinities; both codes whose other bits are
/// all ones are NaN (Micikevicius et al., arXiv 2209.05433).
pub(super) fn value(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        // Without the leading one: multiples of 2^-9.
        (0, _) => fraction * 2f32.powi(-9),
        _ => (8.0 + fraction) * 2f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The shape of the factors of a tensor: `found` where it is that of one factor, else that of its blocks.
///
/// # Errors
/// `TensorError::Type` for a tensor that has blocks but no rows and columns.
pub(super) fn scale_shape(name: &str, shape: &[usize], found: &[usize], block: [usize; 2]) -> Result<Vec<usize>> {
    match (found, shape) {
        ([] | [1], _) => Ok(found.to_vec()),
        (_, &[rows, columns]) => Ok(vec![rows.div_ceil(block[0]), columns.div_ceil(block[1])]),
        _ => Err(Error::Tensor(TensorError::Type {
            name: name.to_owned(),
            expected: "F32, F16 or BF16, or rows and columns",
            found: format!("{NAME} with a factor a block"),
        })),
    }
}

/// Multiplies every element by its factor; `scales` has the shape of [`scale_shape`].
pub(super) fn scale(values: &mut [f32], shape: &[usize], scales: &[f32], block: [usize; 2]) {
    match (scales, shape) {
        (&[scale], _) => values.iter_mut().for_each(|value| *value *= scale),
        (_, &[_, columns]) => {
            let across = columns.div_ceil(block[1]).max(1);
            for (row, values) in values.chunks_exact_mut(columns.max(1)).enumerate() {
                let scales = &scales[row / block[0] * across..][..across];
                for (values, scale) in values.chunks_mut(block[1]).zip(scales) {
                    values.iter_mut().for_each(|value| *value *= scale);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::{scale, scale_shape, value};

    /// Every code by the definition, in double precision: (-1)^s · 2^(e-7) · (1 + f/8), or (-1)^s · 2^-6 · f/8.
    #[test]
    fn all_256_codes_are_their_values() {
        for code in 0..=255u8 {
            let (s, e, f) = (code >> 7, code >> 3 & 0b1111, f64::from(code & 0b111));
            let found = value(code);
            if code == 0x7f || code == 0xff {
                assert!(found.is_nan(), "{code:#x}");
                continue;
            }
            let size = if e == 0 { f / 8.0 / 64.0 } else { (1.0 + f / 8.0) * 2f64.powi(i32::from(e) - 7) };
            let expected = if s == 1 { -size } else { size };
            assert_eq!(f64::from(found).to_bits(), expected.to_bits(), "{code:#x}");
        }
        // By hand: 1, the largest, the smallest normal, the smallest and largest denormal, minus zero.
        let known = [(0x38, 1.0), (0x7e, 448.0), (0x08, 2f32.powi(-6)), (0x01, 2f32.powi(-9)), (0x07, 7.0 / 512.0)];
        assert!(known.iter().all(|&(code, expected)| value(code) == expected && value(code | 0x80) == -expected));
        assert!(value(0x80) == 0.0 && value(0x80).is_sign_negative());
    }

    #[test]
    fn ragged_blocks_have_their_own_factors() {
        // Blocks of 2 × 3 in a tensor of 5 × 7: three down, the last of one row; three across, the last of one column.
        let (shape, block) = ([5, 7], [2, 3]);
        assert_eq!(scale_shape("w", &shape, &[9, 9], block).ok(), Some(vec![3, 3]));
        let scales: Vec<f32> = (1..=9).map(|i| i as f32).collect();
        let mut values = vec![1.0; 35];
        scale(&mut values, &shape, &scales, block);
        let rows: Vec<&[f32]> = values.chunks(7).collect();
        assert_eq!(rows[0], [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0]);
        assert_eq!(rows[1], rows[0]);
        assert_eq!(rows[2], [4.0, 4.0, 4.0, 5.0, 5.0, 5.0, 6.0]);
        assert_eq!(rows[4], [7.0, 7.0, 7.0, 8.0, 8.0, 8.0, 9.0]);
        // The shape of kv_a_proj_with_mqa in DeepSeek-V3: 4.5 blocks of 128 rows.
        assert_eq!(scale_shape("w", &[576, 7168], &[5, 56], [128, 128]).ok(), Some(vec![5, 56]));
        // One factor.
        for found in [&[][..], &[1]] {
            assert_eq!(scale_shape("w", &[5], found, block).ok(), Some(found.to_vec()));
        }
        let mut values = [1.0, 2.0];
        scale(&mut values, &[2], &[0.5], block);
        assert_eq!(values, [0.5, 1.0]);
        assert!(scale_shape("w", &[5], &[3], block).is_err());
        // Nothing to multiply.
        scale(&mut [], &[0, 7], &[], block);
        scale(&mut [], &[7, 0], &[], block);
    }
}

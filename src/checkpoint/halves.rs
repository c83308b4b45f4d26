//! Matrices that are kept as halves.

use half::f16;

use crate::error::{Error, Result, TensorError};

/// Rounds elements to f16 where they are not all bf16; warns of those that become 0.
///
/// # Errors
/// `TensorError::OutOfF16Range` for a finite element that f16 would make infinite.
pub(super) fn round(name: &str, elements: &mut [f32]) -> Result<()> {
    if elements.iter().all(|element| element.to_bits().trailing_zeros() >= 16) {
        return Ok(());
    }
    let mut zeros = 0;
    for (index, element) in elements.iter_mut().enumerate() {
        let half = f16::from_f32(*element);
        if element.is_finite() && !half.is_finite() {
            return Err(Error::Tensor(TensorError::OutOfF16Range { name: name.to_owned(), index, value: *element }));
        }
        zeros += usize::from(*element != 0.0 && half.to_bits() << 1 == 0);
        *element = half.to_f32();
    }
    if zeros > 0 {
        let of = elements.len();
        tracing::warn!("tensor `{name}`: {zeros} of {of} weights are too small for f16 storage and become 0");
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn what_is_bf16_stays_and_the_rest_is_rounded_to_f16() {
        let rounded = |elements: &[f32]| {
            let mut elements = elements.to_vec();
            round("w", &mut elements).map(|()| elements)
        };
        // Beyond f16 on both sides, but all of it is bf16.
        assert_eq!(rounded(&[2f32.powi(100), 2f32.powi(-100)]).unwrap(), [2f32.powi(100), 2f32.powi(-100)]);
        // Ties to even; subnormal; half of the smallest.
        let tie = 1.0 + 2f32.powi(-11);
        assert_eq!(rounded(&[tie, -0.1, 2f32.powi(-24) * 1.25, 2f32.powi(-25)]).unwrap()[..2], [1.0, -0.099_975_586]);
        assert_eq!(rounded(&[tie, 2f32.powi(-24) * 1.25, 2f32.powi(-25)]).unwrap()[1..], [2f32.powi(-24), 0.0]);
        let error = rounded(&[tie, 1.0, -65520.0]).unwrap_err();
        assert!(matches!(error, Error::Tensor(TensorError::OutOfF16Range { index: 2, .. })), "{error}");
        assert_eq!(rounded(&[tie, f32::INFINITY]).unwrap()[1], f32::INFINITY);
    }
}

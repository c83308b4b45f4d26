//! `--expected`: the output beside another program's.

use std::path::PathBuf;

use clap::Args;
use egmla::check::compare::{F16_LIMIT, F32_LIMIT, Tolerance, compare};
use egmla::error::DataError;
use egmla::files::read_safetensors;
use egmla::{Error, Storage};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::console;
use crate::failure::Failure;

/// The largest relative error against a file in bf16, which has three bits fewer than f16.
const BF16_LIMIT: f64 = 8.0 * F16_LIMIT;

/// The comparison.
#[derive(Args, Debug)]
pub struct ExpectedOptions {
    /// Compare the output with `hidden_states` of this file (f64, f32, f16 or bf16); exit status 1 beyond --tolerance
    #[arg(long, value_name = "FILE")]
    pub expected: Option<PathBuf>,
    /// Largest relative error, ‖output − expected‖₂ / ‖expected‖₂; by itself 2e-5, where storage or the expected file is f16
    /// 5e-3, where the file is bf16 4e-2
    #[arg(long, value_name = "E", requires = "expected", allow_negative_numbers = true, value_parser = tolerance)]
    pub tolerance: Option<f64>,
}

/// `--tolerance`
fn tolerance(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "expected a number from 0 on".to_owned())
}

/// What the output should be.
pub struct Expected {
    values: Vec<f64>,
    /// Largest relative error.
    limit: f64,
}

impl ExpectedOptions {
    /// Reads the file.
    ///
    /// # Errors
    /// Bad input, where the file has no `hidden_states` of this shape.
    pub fn read(&self, tokens: usize, width: usize, storage: Storage) -> Result<Option<Expected>, Failure> {
        let Some(path) = &self.expected else { return Ok(None) };
        let refused = |problem: String| Error::Data(DataError::Input(problem)).in_file(path);
        let bytes = read_safetensors(path)?;
        let invalid = |error| Error::Data(DataError::Safetensors(format!("{error}"))).in_file(path);
        let tensors = SafeTensors::deserialize(&bytes).map_err(invalid)?;
        let Ok(view) = tensors.tensor("hidden_states") else {
            return Err(
                refused(format!("tensor `hidden_states` is missing (expected shape [{tokens}, {width}])")).into()
            );
        };
        if view.shape() != [tokens, width] && view.shape() != [1, tokens, width] {
            let found = view.shape();
            return Err(
                refused(format!("tensor `hidden_states` has shape {found:?}, expected [{tokens}, {width}]")).into()
            );
        }
        let data = view.data();
        let (values, of_file): (Vec<f64>, f64) = match view.dtype() {
            Dtype::F64 => {
                let value = |b: &[u8]| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
                (data.chunks_exact(8).map(value).collect(), F32_LIMIT)
            }
            Dtype::F32 => {
                let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).into();
                (data.chunks_exact(4).map(value).collect(), F32_LIMIT)
            }
            Dtype::F16 => (data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).into()).collect(), F16_LIMIT),
            Dtype::BF16 => {
                (data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).into()).collect(), BF16_LIMIT)
            }
            other => {
                let problem =
                    format!("tensor `hidden_states` has element type {other:?}, expected F64, F32, F16 or BF16");
                return Err(refused(problem).into());
            }
        };
        let of_storage = if storage == Storage::F16 { F16_LIMIT } else { F32_LIMIT };
        Ok(Some(Expected { values, limit: self.tolerance.unwrap_or(of_file.max(of_storage)) }))
    }
}

impl Expected {
    /// Says how far the output is from it.
    ///
    /// # Errors
    /// A failed run beyond the limit.
    pub fn check(&self, hidden: &[f32]) -> Result<(), Failure> {
        let differences = hidden.iter().zip(&self.values).map(|(&got, expected)| (f64::from(got) - expected).abs());
        let (index, largest) = differences.enumerate().fold((0, 0.0), |worst, found| {
            // What is no number is worse than any.
            if found.1 > worst.1 || (found.1.is_nan() && !f64::is_nan(worst.1)) { found } else { worst }
        });
        let compared = compare(hidden, &self.values, Tolerance { relative: self.limit });
        let (error, limit) = (compared.relative_error, self.limit);
        console::note(format_args!(
            "expected: largest absolute error {largest:.3e} (element {index}), relative error {error:.3e}, at most {limit:e}"
        ));
        if error > limit {
            return Err(Failure::run(format!("--expected: the relative error is {error:.3e}, at most {limit:e}")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Expected;

    #[test]
    fn errors_beyond_the_limit_fail_the_run() {
        let expected = Expected { values: vec![3.0, -4.0], limit: 1e-3 };
        assert!(expected.check(&[3.0, -4.0]).is_ok());
        assert!(expected.check(&[3.0, -4.004]).is_ok());
        assert!(expected.check(&[3.0, -4.006]).is_err());
        for wrong in [[3.0, f32::NAN], [f32::INFINITY, -4.0], [3.0, 4.0]] {
            assert!(expected.check(&wrong).is_err(), "{wrong:?}");
        }
        let nothing = Expected { values: vec![0.0], limit: 1e-3 };
        assert!(nothing.check(&[0.0]).is_ok() && nothing.check(&[1e-9]).is_err());
    }
}

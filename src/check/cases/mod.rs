//! Cases of the single kernels: tails of every tile, odd head counts, both storages.
//!
//! One file per operation, named like it; `batch`, `grouped_batch` and `extreme` hold shared parts.

mod batch;
mod extreme;
mod grouped_batch;

use super::Case;
use crate::storage::padded_width;

/// Seed of every case's inputs: cases differ by their sizes.
const SEED: u64 = 20;

macro_rules! declare {
    ($($stem:ident: $op:ident),* $(,)?) => {
        $(mod $stem;)*

        pub(super) fn cases() -> Vec<Case> {
            let mut cases = Vec::new();
            $($stem::cases(&mut cases);)*
            cases
        }
    };
}
crate::for_each_operation!(declare);

/// Rows of parts, one after another, with every part padded to whole loads; `filling` gives the padding.
fn spread<T: Copy>(rows: &[T], parts: &[u32], mut filling: impl FnMut() -> T) -> Vec<T> {
    let mut rest = rows;
    let mut spread = Vec::new();
    for &part in parts.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (own, behind) = rest.split_at(part as usize);
        rest = behind;
        spread.extend_from_slice(own);
        spread.extend((part..padded_width(part)).map(|_| filling()));
    }
    spread
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

#[cfg(test)]
mod tests {
    /// The table would be worthless if two cases shared a name or a kernel had none.
    #[test]
    fn ids_are_unique_and_every_kernel_has_cases() {
        let cases = crate::check::cases();
        let mut ids: Vec<_> = cases.iter().map(|case| case.id().to_owned()).collect();
        ids.sort();
        let before = ids.len();
        ids.dedup();
        assert_eq!(ids.len(), before);
        for spec in crate::kernels::shaders() {
            assert!(cases.iter().any(|case| case.kernel() == spec.name), "{} has no case", spec.name);
        }
    }
}

//! FLOPs and bytes of every kernel, for benches and reports; [`crate::attention::cost`] sums those of a layer.

use std::iter::Sum;
use std::ops::Add;

use crate::storage::product;

/// Work of a dispatch, or of several.
///
/// Counting rules:
///
/// - A multiply-add is 2 FLOPs; any other addition, multiplication, division, comparison, root, exponential, logarithm or
///   tanh is 1; a change of sign is none. The count is that of the formula in the shader's header, without what a schedule
///   computes twice.
/// - Attention counts the multiply-adds of its two products, as the literature does: its softmax is not counted.
/// - Bytes are compulsory traffic: each input element in use is read once, each output element is written once, and an element
///   changed in place counts as both. Weights and caches count at their storage size, everything else at 4 bytes.
/// - A cached latent counts once: MLA's values are a part of its keys.
/// - An [`Op`](crate::low_level::Op) that does not know the part of its input in use counts the bound of its sizes:
///   `attention_prefill` knows neither positions nor lengths, so it counts every query with every key of the tile (one sequence
///   without a past computes about half of that, a ragged batch less); `cache_read`, `attention_decode` and
///   `attention_absorbed` count the padded cache rows of a step, but never more than the cache has; `gather` counts an embedding
///   per id, but never more than the table has.
/// - Counts saturate instead of overflowing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes of compulsory memory traffic.
    pub bytes: u64,
}

impl Cost {
    /// The sums of both.
    pub fn of(flops: &[u64], bytes: &[u64]) -> Cost {
        let sum = |terms: &[u64]| terms.iter().fold(0, |total: u64, &term| total.saturating_add(term));
        Cost { flops: sum(flops), bytes: sum(bytes) }
    }
}

impl Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        Cost { flops: self.flops.saturating_add(other.flops), bytes: self.bytes.saturating_add(other.bytes) }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::default(), Add::add)
    }
}

/// `factor` for every element of these extents.
pub fn times(factor: u64, extents: &[u32]) -> u64 {
    product(extents).saturating_mul(factor)
}

/// Zero where something is switched off.
pub fn when(on: bool, count: u64) -> u64 {
    if on { count } else { 0 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::{Activation, GateNorm};
    use crate::kernels::attention_grouped::{Tiling, Widths};
    use crate::kernels::cache_read::Table;
    use crate::kernels::matmul::Layout;
    use crate::kernels::{AttentionGrouped, CacheRead, Gate, GateProject, Matmul, REGISTRY};
    use crate::op::Op as _;
    use crate::storage::{Segments, Storage};

    #[test]
    fn every_operation_costs_what_is_counted_by_hand() {
        for operation in REGISTRY {
            let counted = operation.counted();
            assert!(!counted.is_empty(), "{}", operation.name());
            for (problem, cost) in counted {
                assert_eq!(problem.cost(), cost, "{problem:?}");
            }
        }
    }

    #[test]
    fn switches_change_the_count() {
        let gate = |activation, norm, statistics_rows| {
            let (segments, x_offset, x_row, storage) = (Segments::one(10), 0, 16, Storage::F32);
            let (rows, eps, y_storage) = (1, 1e-5, storage);
            Gate { rows, segments, x_offset, x_row, eps, activation, norm, statistics_rows, storage, y_storage }.cost()
        };
        assert_eq!(gate(Activation::Identity, GateNorm::None, 0), Cost { flops: 10, bytes: 120 });
        assert_eq!(gate(Activation::OnePlus, GateNorm::None, 0).flops, 20);
        assert_eq!(gate(Activation::Silu, GateNorm::RmsNorm, 0), Cost { flops: 10 * 8 + 3, bytes: 160 });
        assert_eq!(gate(Activation::Identity, GateNorm::RmsNorm, 1).bytes, 172);
        let dense = Matmul::linear(4, 8, 16, false, Storage::F32);
        let f16 = Matmul { storage: Storage::F16, ..dense };
        assert_eq!(dense.cost().bytes - f16.cost().bytes, 8 * 16 * 2);
        // A batch with shared weights reads them once.
        let shared = Matmul { batch: 3, x: Layout { batch: 32, ..dense.x }, ..dense };
        assert_eq!(shared.cost(), Cost { flops: 3 * 1024, bytes: 3 * 128 + 512 + 3 * 256 });
        let empty = Matmul::linear(0, 8, 16, true, Storage::F32);
        assert_eq!(empty.cost().flops, 0);
    }

    #[test]
    fn costs_add_and_saturate() {
        let one = Cost { flops: 1, bytes: 2 };
        assert_eq!([one, one, one].into_iter().sum::<Cost>(), Cost { flops: 3, bytes: 6 });
        let most = Cost { flops: u64::MAX, bytes: u64::MAX };
        assert_eq!(most + one, most);
        let huge = Matmul::linear(u32::MAX, u32::MAX, u32::MAX, true, Storage::F32);
        assert_eq!(huge.cost().flops, u64::MAX);
    }

    #[test]
    fn counts_of_sizes_that_no_device_holds_saturate() {
        let most = u32::MAX;
        let table = Table { d_gate: most, vocab_size: most, storage: Storage::F32 };
        let read = CacheRead {
            first_row: 0,
            rows: most,
            cache_rows: most,
            d_latent: most,
            n_sequence: most,
            table: Some(table),
            storage: Storage::F32,
        };
        assert_eq!(read.cost().bytes, u64::MAX);
        let widths = Widths { d_latent: most, d_nope: most, d_rope: most, d_value: most };
        let grouped = AttentionGrouped {
            tokens: most,
            most_tokens: most,
            n_sequence: most,
            entries: most,
            partials: most,
            most_partials: most,
            n_head: most,
            widths,
            tiling: Tiling { groups: most, span: most },
            table: most,
            list_words: most,
            cache_rows: most,
            rope_byte: u64::MAX,
            statistics_byte: u64::MAX,
            resident: most,
            gates_storage: Storage::F32,
            more: most,
            more_storage: Storage::F32,
            first_group: most,
            groups: most,
            pass_index: most,
            passes: most,
            activation: Activation::Identity,
            norm: GateNorm::LayerNorm,
            scale: 1.0,
            expected_groups: u64::MAX,
            expected_positions: u64::MAX,
            cache_storage: Storage::F32,
            storage: Storage::F32,
        };
        assert_eq!(grouped.cost(), Cost { flops: u64::MAX, bytes: u64::MAX });
        assert_eq!(grouped.tiling.entry_groups(), u32::MAX);
        let gate = GateProject {
            rows: most,
            width: most,
            d_gate: most,
            vocab_size: most,
            first_id: 0,
            ids: true,
            targets: true,
            y_rows: most,
            storage: Storage::F16,
            y_storage: Storage::F16,
        };
        assert_eq!(gate.cost().bytes, u64::MAX);
    }
}

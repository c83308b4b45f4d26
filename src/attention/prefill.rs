//! Which kernel attends to a tile of rebuilt keys and values.

use super::product::runs;
use crate::error::Result;
use crate::kernel::Recording;
use crate::kernels::{attention_prefill, attention_prefill_cooperative, attention_prefill_cooperative_8};
use crate::plan::{AdapterClass, PlanContext, Storage, Tuning};

/// Fewest queries of a tile, on average, for cooperative matrices: they take 32 at a time.
const COOPERATIVE_QUERIES: u32 = 16;

/// Records the attention over one key tile with the kernel that suits its widths, the storage of the layer's weights and of
/// its cache, and the device. Every kernel has the same query tiles and state.
///
/// # Errors
/// What the kernel refuses.
pub(super) fn prefill_of(
    recording: &mut Recording,
    problem: attention_prefill::Problem,
    weights: Storage,
    args: attention_prefill::Args<'_>,
) -> Result<()> {
    let auto = Tuning::Auto;
    match Kernel::of(&problem, weights, recording.kernels().context()) {
        Kernel::Prefill => attention_prefill::encode(recording, &problem, args, auto),
        Kernel::Cooperative => {
            let problem = attention_prefill_cooperative::Problem(problem);
            attention_prefill_cooperative::encode(recording, &problem, args, auto)
        }
        Kernel::Cooperative8 => {
            let problem = attention_prefill_cooperative_8::Problem(problem);
            attention_prefill_cooperative_8::encode(recording, &problem, args, auto)
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// Or the one for odd widths, which it hands them to.
    Prefill,
    Cooperative,
    Cooperative8,
}

impl Kernel {
    fn of(problem: &attention_prefill::Problem, weights: Storage, context: &PlanContext) -> Self {
        // They round queries, keys and values: only where weights and cache are rounded, too.
        let halves = weights == Storage::F16 && problem.storage == Storage::F16;
        let many = problem.tokens >= problem.query_tiles.saturating_mul(COOPERATIVE_QUERIES);
        if halves && many && context.class != AdapterClass::Software {
            if runs(&attention_prefill_cooperative::Problem(*problem), context) {
                return Kernel::Cooperative;
            }
            if runs(&attention_prefill_cooperative_8::Problem(*problem), context) {
                return Kernel::Cooperative8;
            }
        }
        Kernel::Prefill
    }
}

#[cfg(test)]
mod tests {
    use super::Kernel;
    use crate::kernels::{COOPERATIVE_FEATURES, attention_prefill};
    use crate::plan::{AdapterClass, Cooperative, PlanContext, Storage};

    #[test]
    fn cooperative_matrices_attend_to_halves_where_they_are_offered() {
        let problem = attention_prefill::Problem {
            tokens: 64,
            query_tiles: 4,
            n_sequence: 1,
            n_head: 3,
            d_nope: 16,
            d_rope: 8,
            d_value: 16,
            kv_first: 0,
            kv_rows: 64,
            cache_rows: 64,
            first: true,
            last: true,
            scale: 0.2,
            storage: Storage::F16,
        };
        let context = |class, cooperative| PlanContext {
            features: COOPERATIVE_FEATURES,
            cooperative,
            ..PlanContext::webgpu_defaults(class)
        };
        let both = Cooperative { by_16: true, by_8: true };
        for class in [AdapterClass::Integrated, AdapterClass::Discrete, AdapterClass::Apple] {
            for (cooperative, kernel) in [
                (Cooperative::NONE, Kernel::Prefill),
                (Cooperative::BY_8, Kernel::Cooperative8),
                (Cooperative::BY_16, Kernel::Cooperative),
                (both, Kernel::Cooperative),
            ] {
                let context = context(class, cooperative);
                assert_eq!(Kernel::of(&problem, Storage::F16, &context), kernel);
                // Never where weights or cache are f32, nor on a device opened without the features.
                assert_eq!(Kernel::of(&problem, Storage::F32, &context), Kernel::Prefill);
                let wide = attention_prefill::Problem { storage: Storage::F32, ..problem };
                assert_eq!(Kernel::of(&wide, Storage::F16, &context), Kernel::Prefill);
                let plain = PlanContext { features: wgpu::Features::SHADER_F16, ..context.clone() };
                assert_eq!(Kernel::of(&problem, Storage::F16, &plain), Kernel::Prefill);
                // Nor for odd widths, nor for tiles of few queries.
                let odd = attention_prefill::Problem { d_value: 10, ..problem };
                assert_eq!(Kernel::of(&odd, Storage::F16, &context), Kernel::Prefill);
                let few = attention_prefill::Problem { query_tiles: 5, ..problem };
                assert_eq!(Kernel::of(&few, Storage::F16, &context), Kernel::Prefill);
            }
        }
        let software = context(AdapterClass::Software, both);
        assert_eq!(Kernel::of(&problem, Storage::F16, &software), Kernel::Prefill);
    }
}

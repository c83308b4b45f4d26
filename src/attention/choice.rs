//! Which kernel attends.

use super::product::runs;
use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::kernels::{
    attention_absorbed, attention_absorbed_stream, attention_absorbed_subgroup, attention_decode,
    attention_decode_vec4, attention_prefill, attention_prefill_cooperative, attention_prefill_cooperative_8,
    attention_prefill_subgroup,
};
use crate::plan::{AdapterClass, PlanContext, Storage, Tuning};

/// Fewest queries of a tile, on average, for cooperative matrices: they take 32 at a time.
const COOPERATIVE_QUERIES: u32 = 16;

/// Records the attention of many queries over a key tile with the kernel that suits its widths, the storage of the layer's
/// weights and of its cache, and the device. Every kernel has the same query tiles and state.
///
/// # Errors
/// What the kernel refuses.
pub fn prefill_of(
    recording: &mut Recording,
    problem: attention_prefill::Problem,
    weights: Storage,
    args: attention_prefill::Args<'_>,
) -> Result<()> {
    let auto = Tuning::Auto;
    match Prefill::of(&problem, weights, recording.kernels().context()) {
        Prefill::Plain => attention_prefill::encode(recording, &problem, args, auto),
        Prefill::Cooperative => {
            let problem = attention_prefill_cooperative::Problem(problem);
            attention_prefill_cooperative::encode(recording, &problem, args, auto)
        }
        Prefill::Cooperative8 => {
            let problem = attention_prefill_cooperative_8::Problem(problem);
            attention_prefill_cooperative_8::encode(recording, &problem, args, auto)
        }
        Prefill::Subgroup => {
            let problem = attention_prefill_subgroup::Problem(problem);
            attention_prefill_subgroup::encode(recording, &problem, args, auto)
        }
    }
}

/// Records the attention of few queries over a key tile with the kernel that suits its widths and the device.
///
/// # Errors
/// What the kernel refuses.
pub fn decode_of(
    recording: &mut Recording,
    problem: attention_decode::Problem,
    args: attention_decode::Args<'_>,
) -> Result<()> {
    match Decode::of(&problem, recording.kernels().context()) {
        Decode::Plain => attention_decode::encode(recording, &problem, args, Tuning::Auto),
        Decode::Vec4 => {
            let problem = attention_decode_vec4::Problem(problem);
            attention_decode_vec4::encode(recording, &problem, args, Tuning::Auto)
        }
    }
}

/// Records the attention over the latents with the kernel that suits its widths and the device.
///
/// # Errors
/// What the kernel refuses.
pub fn absorbed_of(
    recording: &mut Recording,
    problem: attention_absorbed::Problem,
    args: attention_absorbed::Args<'_>,
) -> Result<()> {
    let auto = Tuning::Auto;
    match Absorbed::of(&problem, recording.kernels().context()) {
        Absorbed::Plain => attention_absorbed::encode(recording, &problem, args, auto),
        Absorbed::Stream => {
            let problem = attention_absorbed_stream::Problem(problem);
            attention_absorbed_stream::encode(recording, &problem, args, auto)
        }
        Absorbed::Subgroup => {
            let problem = attention_absorbed_subgroup::Problem(problem);
            attention_absorbed_subgroup::encode(recording, &problem, args, auto)
        }
    }
}

/// Whether a device offers what a variant needs. In software, subgroups of 4 leave more to loads than shuffles save.
fn offered(spec: &KernelSpec, context: &PlanContext) -> bool {
    let wide = context.class != AdapterClass::Software || context.subgroup_min_size >= 8;
    wide && spec.missing(context).is_none()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prefill {
    /// `attention_prefill`, which hands odd widths to `attention_prefill_rows`.
    Plain,
    Cooperative,
    Cooperative8,
    Subgroup,
}

impl Prefill {
    fn of(problem: &attention_prefill::Problem, weights: Storage, context: &PlanContext) -> Self {
        // Cooperative matrices round queries, keys and values: only where weights and cache are rounded, too.
        let halves = weights == Storage::F16 && problem.storage == Storage::F16;
        let many = problem.tokens >= problem.query_tiles.saturating_mul(COOPERATIVE_QUERIES);
        if halves && many && context.class != AdapterClass::Software {
            if runs(&attention_prefill_cooperative::Problem(*problem), context) {
                return Prefill::Cooperative;
            }
            if runs(&attention_prefill_cooperative_8::Problem(*problem), context) {
                return Prefill::Cooperative8;
            }
        }
        // Its workgroups may be larger than a device allows.
        let subgroup = attention_prefill_subgroup::Problem(*problem);
        if problem.aligned() && offered(&attention_prefill_subgroup::SPEC, context) && runs(&subgroup, context) {
            return Prefill::Subgroup;
        }
        Prefill::Plain
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decode {
    Plain,
    Vec4,
}

impl Decode {
    fn of(problem: &attention_decode::Problem, context: &PlanContext) -> Self {
        // Its workgroups may be larger than a device allows.
        if problem.in_vec4() && runs(&attention_decode_vec4::Problem(*problem), context) {
            Decode::Vec4
        } else {
            Decode::Plain
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Absorbed {
    Plain,
    Stream,
    Subgroup,
}

impl Absorbed {
    fn of(problem: &attention_absorbed::Problem, context: &PlanContext) -> Self {
        // It keeps a row in the registers of a subgroup, of which small ones do not hold long rows.
        let fits = || runs(&attention_absorbed_stream::Problem(*problem), context);
        let software = context.class == AdapterClass::Software;
        if !problem.aligned() {
            Absorbed::Plain
        } else if software && offered(&attention_absorbed_subgroup::SPEC, context) {
            Absorbed::Subgroup
        } else if !software && offered(&attention_absorbed_stream::SPEC, context) && fits() {
            Absorbed::Stream
        } else {
            Absorbed::Plain
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Absorbed, Decode, Prefill};
    use crate::kernels::{COOPERATIVE_FEATURES, attention_absorbed, attention_decode, attention_prefill};
    use crate::plan::{AdapterClass, Cooperative, PlanContext, Storage};

    const NONE: wgpu::Features = wgpu::Features::empty();
    const SUBGROUP: wgpu::Features = wgpu::Features::SUBGROUP;

    fn context(class: AdapterClass, features: wgpu::Features, subgroup_min_size: u32) -> PlanContext {
        PlanContext { features, subgroup_min_size, ..PlanContext::webgpu_defaults(class) }
    }

    fn prefill(context: &PlanContext, query_tiles: u32, d_rope: u32) -> Prefill {
        let problem = attention_prefill::Problem {
            tokens: 9,
            query_tiles,
            n_sequence: 1,
            n_head: 1,
            d_nope: 8,
            d_rope,
            d_value: 8,
            kv_first: 0,
            kv_rows: 9,
            cache_rows: 9,
            first: true,
            last: true,
            scale: 1.0,
            storage: Storage::F16,
        };
        Prefill::of(&problem, Storage::F32, context)
    }

    fn absorbed(context: &PlanContext, d_latent: u32) -> Absorbed {
        let problem = attention_absorbed::Problem {
            tokens: 1,
            most_tokens: 1,
            n_sequence: 1,
            splits: 1,
            partials: 1,
            n_head: 1,
            d_latent,
            d_nope: 8,
            d_rope: 8,
            cache_rows: 256,
            scale: 1.0,
            storage: Storage::F16,
        };
        Absorbed::of(&problem, context)
    }

    #[test]
    fn whole_loads_decode_in_16_bytes() {
        let of = |widths: [u32; 3], storage, kv_storage, context: &PlanContext| {
            let [d_nope, d_rope, d_value] = widths;
            let problem = attention_decode::Problem {
                tokens: 1,
                most_tokens: 1,
                partials: 1,
                n_sequence: 1,
                n_head: 1,
                d_nope,
                d_rope,
                d_value,
                kv_first: 0,
                kv_rows: 256,
                cache_rows: 256,
                scale: 1.0,
                storage,
                kv_storage,
            };
            Decode::of(&problem, context)
        };
        let (f32, f16) = (Storage::F32, Storage::F16);
        for class in AdapterClass::ALL {
            let context = context(class, NONE, 4);
            assert_eq!(of([12, 4, 4], f32, f32, &context), Decode::Vec4);
            assert_eq!(of([12, 8, 4], f16, f32, &context), Decode::Vec4);
            assert_eq!(of([8, 0, 16], f32, f16, &context), Decode::Vec4);
            for (widths, storage, kv_storage) in [
                ([12, 4, 4], f16, f32),
                ([12, 8, 8], f32, f16),
                ([8, 8, 12], f32, f16),
                ([6, 4, 4], f32, f32),
                ([4, 4, 6], f32, f32),
            ] {
                assert_eq!(of(widths, storage, kv_storage, &context), Decode::Plain, "{widths:?}");
            }
        }
        let mut small = context(AdapterClass::Discrete, NONE, 4);
        small.limits.max_compute_invocations_per_workgroup = 64;
        assert_eq!(of([8, 8, 8], f16, f16, &small), Decode::Plain);
    }

    #[test]
    fn subgroups_share_the_work_where_they_are_offered_and_wide_enough() {
        for class in AdapterClass::ALL {
            for size in [4, 8, 32] {
                let without = context(class, NONE, size);
                assert_eq!((prefill(&without, 1, 4), absorbed(&without, 64)), (Prefill::Plain, Absorbed::Plain));
                let with = context(class, SUBGROUP, size);
                let narrow = class == AdapterClass::Software && size < 8;
                let expected = if narrow { Prefill::Plain } else { Prefill::Subgroup };
                assert_eq!(prefill(&with, 1, 4), expected, "{class:?} {size}");
                // No whole number of 16-byte loads.
                assert_eq!((prefill(&with, 1, 2), absorbed(&with, 30)), (Prefill::Plain, Absorbed::Plain));
            }
        }
        let software = context(AdapterClass::Software, SUBGROUP, 8);
        // It cuts a tile into four workgroups there: more of them than one dimension holds fold.
        assert_eq!(prefill(&software, 16_384, 4), Prefill::Subgroup);
        // More than a workgroup index holds.
        assert_eq!(prefill(&software, 1 << 30, 4), Prefill::Plain);
        let mut small = context(AdapterClass::Discrete, SUBGROUP, 32);
        small.limits.max_compute_invocations_per_workgroup = 64;
        assert_eq!(prefill(&small, 1, 4), Prefill::Plain);
        assert_eq!(absorbed(&software, 64), Absorbed::Subgroup);
        assert_eq!(absorbed(&context(AdapterClass::Software, SUBGROUP, 4), 64), Absorbed::Plain);
        let discrete = |size, d_latent| absorbed(&context(AdapterClass::Discrete, SUBGROUP, size), d_latent);
        assert_eq!([discrete(32, 512), discrete(8, 64), discrete(4, 128)], [Absorbed::Stream; 3]);
        assert_eq!([discrete(8, 512), discrete(4, 136)], [Absorbed::Plain; 2]);
    }

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
                (Cooperative::NONE, Prefill::Subgroup),
                (Cooperative::BY_8, Prefill::Cooperative8),
                (Cooperative::BY_16, Prefill::Cooperative),
                (both, Prefill::Cooperative),
            ] {
                let context = context(class, cooperative);
                assert_eq!(Prefill::of(&problem, Storage::F16, &context), kernel);
                // Never where weights or cache are f32, nor on a device opened without the features.
                assert_eq!(Prefill::of(&problem, Storage::F32, &context), Prefill::Subgroup);
                let wide = attention_prefill::Problem { storage: Storage::F32, ..problem };
                assert_eq!(Prefill::of(&wide, Storage::F16, &context), Prefill::Subgroup);
                let plain = PlanContext { features: wgpu::Features::SHADER_F16, ..context.clone() };
                assert_eq!(Prefill::of(&problem, Storage::F16, &plain), Prefill::Plain);
                // Nor for odd widths, nor for tiles of few queries.
                let odd = attention_prefill::Problem { d_value: 10, ..problem };
                assert_eq!(Prefill::of(&odd, Storage::F16, &context), Prefill::Plain);
                let few = attention_prefill::Problem { query_tiles: 5, ..problem };
                assert_eq!(Prefill::of(&few, Storage::F16, &context), Prefill::Subgroup);
            }
        }
        let software = context(AdapterClass::Software, both);
        assert_eq!(Prefill::of(&problem, Storage::F16, &software), Prefill::Plain);
    }
}

//! Which kernel attends.

use crate::error::Result;
use crate::kernel::{KernelSpec, Recording};
use crate::kernels::{
    Problem as _, attention_absorbed, attention_absorbed_stream, attention_absorbed_subgroup, attention_prefill,
    attention_prefill_subgroup,
};
use crate::plan::{AdapterClass, PlanContext, Tuning};

/// Records the attention of many queries over a key tile with the kernel that suits its widths and the device.
///
/// # Errors
/// What the kernel refuses.
pub fn prefill_of(
    recording: &mut Recording,
    problem: attention_prefill::Problem,
    args: attention_prefill::Args<'_>,
) -> Result<()> {
    let auto = Tuning::Auto;
    match Prefill::of(&problem, recording.kernels().context()) {
        Prefill::Plain => attention_prefill::encode(recording, &problem, args, auto),
        Prefill::Subgroup => {
            let problem = attention_prefill_subgroup::Problem(problem);
            attention_prefill_subgroup::encode(recording, &problem, args, auto)
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
    wide && spec.missing(context.features).is_none()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prefill {
    /// `attention_prefill`, which hands odd widths to `attention_prefill_rows`.
    Plain,
    Subgroup,
}

impl Prefill {
    fn of(problem: &attention_prefill::Problem, context: &PlanContext) -> Self {
        // It cuts a tile into several workgroups, of which one dimension may not hold as many.
        let fits = || attention_prefill_subgroup::Problem(*problem).plan(context, Tuning::Auto).is_ok();
        if problem.aligned() && offered(&attention_prefill_subgroup::SPEC, context) && fits() {
            return Prefill::Subgroup;
        }
        Prefill::Plain
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
        let fits = || attention_absorbed_stream::Problem(*problem).plan(context, Tuning::Auto).is_ok();
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
    use super::{Absorbed, Prefill};
    use crate::kernels::{attention_absorbed, attention_prefill};
    use crate::plan::{AdapterClass, PlanContext, Storage};

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
        Prefill::of(&problem, context)
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
    fn subgroups_share_the_work_where_they_are_offered_and_wide_enough() {
        for class in AdapterClass::ALL {
            for size in [4, 8, 32] {
                let without = context(class, NONE, size);
                assert_eq!((prefill(&without, 1, 4), absorbed(&without, 64)), (Prefill::Plain, Absorbed::Plain));
                let with = context(class, SUBGROUP, size);
                let narrow = class == AdapterClass::Software && size < 8;
                let expected = if narrow { Prefill::Plain } else { Prefill::Subgroup };
                assert_eq!(prefill(&with, 1, 4), expected, "{class:?} {size}");
                // No whole number of 16-byte loads, too many workgroups.
                assert_eq!((prefill(&with, 1, 2), absorbed(&with, 30)), (Prefill::Plain, Absorbed::Plain));
            }
        }
        let software = context(AdapterClass::Software, SUBGROUP, 8);
        assert_eq!([prefill(&software, 16_383, 4), prefill(&software, 16_384, 4)], [Prefill::Subgroup, Prefill::Plain]);
        assert_eq!(absorbed(&software, 64), Absorbed::Subgroup);
        assert_eq!(absorbed(&context(AdapterClass::Software, SUBGROUP, 4), 64), Absorbed::Plain);
        let discrete = |size, d_latent| absorbed(&context(AdapterClass::Discrete, SUBGROUP, size), d_latent);
        assert_eq!([discrete(32, 512), discrete(8, 64), discrete(4, 128)], [Absorbed::Stream; 3]);
        assert_eq!([discrete(8, 512), discrete(4, 136)], [Absorbed::Plain; 2]);
    }
}

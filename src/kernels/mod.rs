//! The kernels: one line of the registry each, one module each.
//!
//! Every module has a `Problem` (the sizes), `Args` (the buffers) and `encode(recording, problem, args, tuning)`. The
//! shader of the same name documents the formula and every binding's shape; `reference` holds its definition in f64.
//! Activations are f32 in memory. `storage` says how weights and caches are stored.

pub mod attention_absorbed;
pub mod attention_absorbed_stream;
pub mod attention_absorbed_subgroup;
pub mod attention_decode;
pub mod attention_decode_vec4;
pub mod attention_grouped;
pub mod attention_grouped_subgroup;
pub mod attention_merge;
pub mod attention_prefill;
pub mod attention_prefill_cooperative;
pub mod attention_prefill_cooperative_8;
pub mod attention_prefill_rows;
pub mod attention_prefill_subgroup;
pub mod cache_append;
pub mod cache_append_vec4;
pub mod cache_copy;
pub mod cache_read;
pub mod gate;
pub mod gate_rows;
pub mod gate_statistics;
pub mod gate_vec4;
pub mod gather;
pub mod group_ids;
pub mod matmul;
pub mod matmul_cooperative;
pub mod matmul_cooperative_8;
pub mod matmul_subgroup;
pub mod matmul_vec4;
pub mod matvec;
pub mod matvec_subgroup;
pub mod matvec_vec4;
pub mod norm;
pub mod norm_vec4;
pub mod residual_add;
pub mod roofline_cooperative;
pub mod roofline_cooperative_8;
pub mod roofline_copy;
pub mod roofline_fma;
pub mod rope;
pub mod swiglu;
pub mod word_scatter;

use crate::error::{Error, Result};
use crate::kernel::{Bound, KernelSpec, Region};
use crate::plan::{Plan, PlanContext, Tuning};

/// Every kernel.
pub const REGISTRY: &[&KernelSpec] = &[
    &attention_absorbed::SPEC,
    &attention_absorbed_stream::SPEC,
    &attention_absorbed_subgroup::SPEC,
    &attention_decode::SPEC,
    &attention_decode_vec4::SPEC,
    &attention_grouped::SPEC,
    &attention_grouped_subgroup::SPEC,
    &attention_merge::SPEC,
    &attention_prefill::SPEC,
    &attention_prefill_cooperative::SPEC,
    &attention_prefill_cooperative_8::SPEC,
    &attention_prefill_rows::SPEC,
    &attention_prefill_subgroup::SPEC,
    &cache_append::SPEC,
    &cache_append_vec4::SPEC,
    &cache_copy::SPEC,
    &cache_read::SPEC,
    &gate::SPEC,
    &gate_rows::SPEC,
    &gate_statistics::SPEC,
    &gate_vec4::SPEC,
    &gather::SPEC,
    &group_ids::SPEC,
    &matmul::SPEC,
    &matmul_cooperative::SPEC,
    &matmul_cooperative_8::SPEC,
    &matmul_subgroup::SPEC,
    &matmul_vec4::SPEC,
    &matvec::SPEC,
    &matvec_subgroup::SPEC,
    &matvec_vec4::SPEC,
    &norm::SPEC,
    &norm_vec4::SPEC,
    &residual_add::SPEC,
    &roofline_cooperative::SPEC,
    &roofline_cooperative_8::SPEC,
    &roofline_copy::SPEC,
    &roofline_fma::SPEC,
    &rope::SPEC,
    &swiglu::SPEC,
    &word_scatter::SPEC,
];

/// What the kernels that multiply cooperative matrices need of a device. wgpu hands the first out to those only who accept its
/// experiments (`wgpu::ExperimentalFeatures`); [`Kernels::with_cooperative`](crate::kernel::Kernels::with_cooperative) takes
/// the sizes.
pub const COOPERATIVE_FEATURES: wgpu::Features =
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SHADER_F16).union(wgpu::Features::SUBGROUP);

/// Every feature that some variant of a kernel makes use of, beside experimental ones: what to ask of an adapter that has
/// them. A device without them runs the other variants.
pub fn optional_features() -> wgpu::Features {
    let experimental = wgpu::Features::all_experimental_mask();
    let needed = REGISTRY.iter().map(|spec| spec.features).filter(|features| !features.intersects(experimental));
    needed.fold(wgpu::Features::empty(), wgpu::Features::union)
}

/// The sizes of one dispatch: from them follow the plan ([`Problem::plan`]) and the cost ([`crate::cost`]).
pub trait Problem {
    /// The kernel's registry line.
    const SPEC: &'static KernelSpec;

    /// Grid, overrides and workgroup memory on a device of the given limits. Pure.
    ///
    /// # Errors
    /// What the shader cannot do, or [`Error::Limit`].
    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan>;
}

/// Product of extents in 64 bits; saturates, so that every later comparison with a limit fails.
pub(crate) fn product(extents: &[u32]) -> u64 {
    extents.iter().fold(1, |total: u64, &extent| total.saturating_mul(extent.into()))
}

/// A region of f32 or u32 elements.
pub(crate) fn words(region: &Region, elements: u64) -> Bound<'_> {
    Bound { region, bytes: elements.saturating_mul(4) }
}

/// Refuses extents that must not be zero.
pub(crate) fn nonzero(kernel: &'static str, extents: &[(&'static str, u32)]) -> Result<()> {
    match extents.iter().find(|(_, extent)| *extent == 0) {
        Some((name, _)) => Err(Error::problem(kernel, format!("{name} is 0"))),
        None => Ok(()),
    }
}

/// The most trips of a loop whose end is not known when a shader is compiled: an older software driver ends it there, without a
/// word.
pub(crate) const MOST_TRIPS: u32 = 65_534;

/// Refuses widths that a shader may walk one by one; their sums and pitches fit 32 bits.
pub(crate) fn narrow(kernel: &'static str, widths: &[(&'static str, u32)]) -> Result<()> {
    widths.iter().try_for_each(|&(name, width)| trips(kernel, name, width, 1))
}

/// Refuses an extent that a shader's loop would walk, `each` at a time, in more trips than any driver is sure to make.
pub(crate) fn trips(kernel: &'static str, name: &str, extent: u32, each: u32) -> Result<()> {
    if extent.div_ceil(each.max(1)) > MOST_TRIPS {
        let most = u64::from(MOST_TRIPS) * u64::from(each);
        return Err(Error::problem(
            kernel,
            format!("{name} is {extent}, must be at most {most}: a loop over it is too long"),
        ));
    }
    Ok(())
}

/// 1.0 for an override that switches something on.
pub(crate) fn flag(on: bool) -> f64 {
    if on { 1.0 } else { 0.0 }
}

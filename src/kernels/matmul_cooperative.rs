//! Matrix product by cooperative matrices, f16 weights and f32 sums: where the caller's device has them.
//!
//! Not run on any adapter so far. Nothing in this crate chooses it: wgpu opens devices with this feature through an unsafe
//! token only, and a device does not tell which shapes of matrices it has. A caller whose adapter's
//! `cooperative_matrix_properties` list 16 × 16 × 16 of f16 with f32 sums may.

use super::{Problem as _, flag, matmul};
use crate::error::{Error, Result};
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{Plan, PlanContext, Storage, Tuning};

pub use super::matmul::{Args, Layout, Params};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "matmul_cooperative",
    source: include_str!("../../shaders/matmul_cooperative.wgsl"),
    bindings: matmul::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
        .union(wgpu::Features::SHADER_F16)
        .union(wgpu::Features::SUBGROUP),
    subgroup: 0,
};

/// Rows and columns of a workgroup.
const TUNINGS: &[(u32, u32)] = &[(16, 64)];

/// The same sizes as `matmul`'s, with f16 storage, `inner` and `cols` multiples of 16, and rows of `w` without gaps between
/// their elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem(pub matmul::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.0.validate(SPEC.name)?;
        let matmul::Problem { rows, inner, cols, batch, w, bias, storage, .. } = self.0;
        if storage != Storage::F16 || w.inner != 1 {
            return Err(Error::problem(SPEC.name, "w must be f16 with inner stride 1"));
        }
        for (name, size) in [("inner", inner), ("cols", cols)] {
            if !size.is_multiple_of(16) {
                return Err(Error::problem(SPEC.name, format!("{name} is {size}, not a multiple of 16")));
            }
        }
        let (tile_m, tile_n) = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, 0))?];
        Plan {
            overrides: vec![("HAS_BIAS", flag(bias))],
            grid: [cols.div_ceil(tile_n), rows.div_ceil(tile_m), batch],
            workgroup_size: 64,
            // A tile of x in f16, four of y in f32.
            workgroup_bytes: 2 * 16 * 16 + 4 * tile_m * tile_n,
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Adds one product to a recording.
///
/// # Errors
/// As [`matmul::encode`], sizes that are not multiples of 16, f32 storage, or a device without the features.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.0.params(), &problem.0.bound(&args))
}

//! RMSNorm and LayerNorm of rows.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, flag, nonzero, product, words};
use crate::error::Result;
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, Plan, PlanContext, Storage, Tuning, fold_grid};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "norm",
    source: include_str!("../../shaders/norm.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("x"),
        Binding::read("weight"),
        Binding::read("bias"),
        Binding::write("y"),
    ],
    params_size: size_of::<Params>(),
    tunings: ROW_WORKGROUPS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// Workgroup sizes of the kernels that give a workgroup to a row; powers of two, as the reduction needs.
pub(super) const ROW_WORKGROUPS: &[u32] = &[64, 256, 32];

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    rows: u32,
    width: u32,
    x_offset: u32,
    x_row: u32,
    eps: f32,
}

/// Which norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `x / √(mean(x²) + eps) · weight`
    Rms,
    /// `(x − mean) / √(var + eps) · weight`, plus the bias
    Layer,
}

/// Rows to normalise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    /// Rows.
    pub rows: u32,
    /// Elements that a norm spans.
    pub width: u32,
    /// First element of `x`.
    pub x_offset: u32,
    /// From one row of `x` to the next.
    pub x_row: u32,
    /// Added to the mean square or variance.
    pub eps: f32,
    /// RMSNorm or LayerNorm.
    pub kind: Kind,
    /// A bias is added.
    pub bias: bool,
    /// How weight and bias are stored.
    pub storage: Storage,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        nonzero(SPEC.name, &[("width", self.width)])?;
        let workgroup_size =
            ROW_WORKGROUPS[tuning.choose(SPEC.name, ROW_WORKGROUPS.len(), context.auto(SPEC.name, 0))?];
        Plan {
            overrides: vec![
                ("STORAGE_F16", self.storage.constant()),
                ("CENTER", flag(self.kind == Kind::Layer)),
                ("HAS_BIAS", flag(self.bias)),
                ("WORKGROUP", workgroup_size.into()),
            ],
            grid: fold_grid(SPEC.name, self.rows.into(), &context.limits)?,
            workgroup_size,
            workgroup_bytes: 4 * workgroup_size,
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// f32, rows as in [`Problem`].
    pub x: &'a Region,
    /// `[width]` in `storage`.
    pub weight: &'a Region,
    /// `[width]` in `storage`; `Kernels::absent` without a bias.
    pub bias: &'a Region,
    /// `[rows, width]` f32, written.
    pub y: &'a Region,
}

/// Adds one norm to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also the output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let Problem { rows, width, x_offset, x_row, eps, .. } = *problem;
    let x_end = u64::from(x_offset) + product(&[rows.saturating_sub(1), x_row]) + u64::from(width);
    let stored = |region, elements: u32| Bound { region, bytes: u64::from(elements) * problem.storage.bytes() };
    recording.push(
        &SPEC,
        &plan,
        &Params { rows, width, x_offset, x_row, eps },
        &[
            words(args.x, x_end),
            stored(args.weight, width),
            stored(args.bias, if problem.bias { width } else { 0 }),
            words(args.y, product(&[rows, width])),
        ],
    )
}

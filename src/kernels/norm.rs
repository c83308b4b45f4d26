//! RMSNorm and LayerNorm of rows.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, flag, nonzero, norm_vec4, product, trips, words};
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
    second: u32,
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
    /// Elements of a second segment, right behind the first, with a norm of its own; 0 for none.
    pub second: u32,
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

impl Problem {
    /// Whether every segment of every tensor is a whole number of 16-byte loads that begin on 16-byte boundaries.
    pub fn in_vec4(&self) -> bool {
        [self.x_offset, self.x_row].iter().all(|step| step.is_multiple_of(4))
            && [self.width, self.second].iter().all(|width| width.is_multiple_of(16 / self.storage.bytes() as u32))
    }

    pub(super) fn validate(&self, kernel: &'static str) -> Result<()> {
        // The smaller of the two workgroups walks a row.
        [("width", self.width), ("second", self.second)]
            .into_iter()
            .try_for_each(|(name, width)| trips(kernel, name, width, 64))?;
        nonzero(kernel, &[("width", self.width)])
    }

    /// Segments of all rows.
    pub(super) fn segments(&self) -> u64 {
        product(&[self.rows, if self.second > 0 { 2 } else { 1 }])
    }

    pub(super) fn switches(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("STORAGE_F16", self.storage.constant()),
            ("CENTER", flag(self.kind == Kind::Layer)),
            ("HAS_BIAS", flag(self.bias)),
        ]
    }

    pub(super) fn params(&self) -> Params {
        let Problem { rows, width, second, x_offset, x_row, eps, .. } = *self;
        Params { rows, width, second, x_offset, x_row, eps }
    }

    pub(super) fn bound<'a>(&self, args: &Args<'a>) -> [Bound<'a>; 4] {
        let whole = self.width + self.second;
        let x_end = u64::from(self.x_offset) + product(&[self.rows.saturating_sub(1), self.x_row]) + u64::from(whole);
        let stored = |region, elements: u32| Bound { region, bytes: u64::from(elements) * self.storage.bytes() };
        // A binding of 16-byte elements holds one at least, be it unused.
        let least = if self.in_vec4() { 16 / self.storage.bytes() as u32 } else { 0 };
        [
            words(args.x, x_end),
            stored(args.weight, whole),
            stored(args.bias, if self.bias { whole } else { least }),
            words(args.y, product(&[self.rows, whole])),
        ]
    }
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.validate(SPEC.name)?;
        let workgroup_size =
            ROW_WORKGROUPS[tuning.choose(SPEC.name, ROW_WORKGROUPS.len(), context.auto(SPEC.name, 0))?];
        let mut overrides = self.switches();
        overrides.push(("WORKGROUP", workgroup_size.into()));
        Plan {
            overrides,
            grid: fold_grid(SPEC.name, self.segments(), &context.limits)?,
            tiles: [0; 3],
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
    /// `[width + second]` in `storage`.
    pub weight: &'a Region,
    /// `[width + second]` in `storage`; `Kernels::absent` without a bias.
    pub bias: &'a Region,
    /// `[rows, width + second]` f32, written.
    pub y: &'a Region,
}

/// Adds one norm to a recording: with [`norm_vec4`] where the operands are [`Problem::in_vec4`] and no setting of this kernel is
/// forced.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also the output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    if tuning == Tuning::Auto && problem.in_vec4() {
        return norm_vec4::encode(recording, &norm_vec4::Problem(*problem), args, tuning);
    }
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.params(), &problem.bound(&args))
}

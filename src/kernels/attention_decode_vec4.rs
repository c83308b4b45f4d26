//! [`super::attention_decode`] in 16-byte loads.

use super::Problem as _;
use super::attention_decode::{self, Args, Params, SPLIT};
use crate::error::{Error, Result};
use crate::kernel::{KernelSpec, Recording};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Storage, Tuning};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_decode_vec4",
    source: include_str!("../../shaders/attention_decode_vec4.wgsl"),
    bindings: attention_decode::SPEC.bindings,
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// (WORKGROUP, LANES, COLUMNS): LANES invocations share the scores of a row, COLUMNS its values. In software whole rows.
const TUNINGS: &[(u32, u32, u32)] = &[(64, 1, 8), (128, 8, 8), (256, 8, 8), (128, 4, 16)];

/// Rows that an invocation takes at a time.
const QUAD: u32 = 4;

/// The same sizes as `attention_decode`'s, of widths that are [`attention_decode::Problem::in_vec4`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem(pub attention_decode::Problem);

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        let attention_decode::Problem { d_nope, d_rope, d_value, storage, kv_storage, .. } = self.0;
        self.0.validate(SPEC.name)?;
        if !self.0.in_vec4() {
            let widths = format!("d_nope {d_nope}, d_rope {d_rope} and d_value {d_value} must be whole 16-byte loads");
            return Err(Error::problem(SPEC.name, widths));
        }
        let auto = if context.class == AdapterClass::Software { 0 } else { 1 };
        let (workgroup_size, most_lanes, most_columns) =
            TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        // No more invocations than a row has loads; teams of fewer than four would find no rows.
        let loads = |width: u32, storage: Storage| width / (16 / storage.bytes() as u32);
        let key_loads = loads(d_nope, kv_storage).max(loads(d_rope, storage));
        let lanes = most_lanes.min(key_loads.next_power_of_two());
        let columns = most_columns.min(loads(d_value, kv_storage).next_power_of_two().max(4));
        let quads = SPLIT / QUAD;
        let vectors = if kv_storage == Storage::F16 { 2 } else { 1 };
        let shared = (quads * lanes).max(workgroup_size * vectors);
        Plan {
            overrides: vec![
                ("STORAGE_F16", storage.constant()),
                ("KV_F16", kv_storage.constant()),
                ("WORKGROUP", workgroup_size.into()),
                ("LANES", lanes.into()),
                ("COLUMNS", columns.into()),
                ("EACH", (quads * lanes).div_ceil(workgroup_size).into()),
                ("SPLIT", SPLIT.into()),
            ],
            grid: [self.0.kv_rows / SPLIT, self.0.n_head, self.0.most_tokens],
            tiles: [0; 3],
            workgroup_size,
            workgroup_bytes: 16 * (shared + quads) + 8 * (workgroup_size / columns),
        }
        .tiled(SPEC.name, &context.limits)
    }
}

/// Adds the attention over one key tile to a recording.
///
/// # Errors
/// As [`attention_decode::encode`], and widths that are no whole 16-byte loads.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    // A binding of 16-byte elements holds one at least, be it unused.
    recording.push(&SPEC, &plan, &problem.0.params(&plan), &problem.0.bound(&args, 16))
}

//! [`super::attention_grouped`] in registers and subgroup shuffles: the same problem, arguments, lists and partial results, for
//! latents of up to 64 columns.

use bytemuck::{Pod, Zeroable};

use super::attention_grouped::{Args, Tiling, Widths, beta_element, softmax_word};
use super::{Problem as _, attention_grouped};
use crate::error::{Error, Result};
use crate::kernel::{Binding, KernelSpec, Recording};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Tuning};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_grouped_subgroup",
    source: include_str!("../../shaders/attention_grouped_subgroup.wgsl"),
    bindings: &[
        Binding::PARAMS,
        Binding::read("q"),
        Binding::read("kv_b_proj"),
        Binding::read("affine"),
        Binding::read("gates"),
        Binding::read("gates_more"),
        Binding::read("cache"),
        Binding::read("lists"),
        Binding::write("partial"),
    ],
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::SUBGROUP,
    subgroup: GROUPS,
    cooperative: Cooperative::NONE,
};

/// (HEADS, AHEAD): heads of a workgroup, eight invocations each, and positions whose rows are asked for at once. AHEAD divides 8.
///
/// A GPU waits for memory at every position that it did not ask for ahead; a software adapter does not wait, it compiles.
const TUNINGS: &[(u32, u32)] = &[(1, 1), (4, 4), (8, 4), (4, 2)];

/// Groups of a tile, and invocations of a head.
pub const GROUPS: u32 = 8;

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    n_head: u32,
    d_latent: u32,
    d_nope: u32,
    d_rope: u32,
    d_value: u32,
    n_sequence: u32,
    items: u32,
    table: u32,
    latent: u32,
    latent_pitch: u32,
    rope: u32,
    rope_pitch: u32,
    statistics: u32,
    weight_pitch: u32,
    gate_pitch: u32,
    more_pitch: u32,
    resident: u32,
    first_row: u32,
    rows: u32,
    pass_index: u32,
    passes: u32,
    beta: u32,
    softmax: u32,
    scale: f32,
}

/// The same problem, with a tiling of [`tiling`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem(pub attention_grouped::Problem);

/// The tiling for these widths on a device; `None` where another kernel is needed: without subgroups of 8 and more, for wider
/// latents or rotary keys than 64, wider values than 128, or heads that are no whole blocks of 8.
pub fn tiling(context: &PlanContext, widths: Widths) -> Option<Tiling> {
    let run = match context.class {
        AdapterClass::Software => 2,
        AdapterClass::Integrated | AdapterClass::Discrete | AdapterClass::Apple => 1,
    };
    let offered = SPEC.missing(context).is_none();
    (offered && suits(widths)).then_some(Tiling { groups: GROUPS, run })
}

fn suits(Widths { d_latent, d_nope, d_rope, d_value }: Widths) -> bool {
    let whole = d_nope.is_multiple_of(8) && d_value.is_multiple_of(8);
    whole && d_latent <= 64 && d_rope <= 64 && d_value <= 128
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        let (widths, Tiling { groups, run }) = (self.0.widths, self.0.tiling);
        self.0.validate(SPEC.name)?;
        if !suits(widths) {
            let Widths { d_latent, d_nope, d_rope, d_value } = widths;
            let found = format!("d_latent {d_latent}, d_nope {d_nope}, d_rope {d_rope}, d_value {d_value}");
            let what =
                format!("{found}: latents and rotary keys go up to 64, values to 128, heads are whole blocks of 8");
            return Err(Error::problem(SPEC.name, what));
        }
        if groups != GROUPS || run > GROUPS {
            return Err(Error::problem(SPEC.name, format!("tiles of {groups} groups, {run} of them an item")));
        }
        let auto = match context.class {
            AdapterClass::Software => 0,
            AdapterClass::Integrated | AdapterClass::Discrete | AdapterClass::Apple => 1,
        };
        let (heads, ahead) = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        let mut overrides = self.0.switches();
        overrides.extend([("HEADS", heads.into()), ("RUN", run.into()), ("AHEAD", ahead.into())]);
        Plan {
            overrides,
            grid: self.0.grid(SPEC.name, heads, context)?,
            tiles: [0; 3],
            workgroup_size: heads * GROUPS,
            workgroup_bytes: 0,
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Adds the attention of one pass to a recording.
///
/// # Errors
/// As [`attention_grouped::encode`], widths or a tiling that this kernel does not have, or a device without its subgroups.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let p = problem.0;
    let Widths { d_latent, d_nope, d_rope, d_value } = p.widths;
    let params = Params {
        n_head: p.n_head,
        d_latent,
        d_nope,
        d_rope,
        d_value,
        n_sequence: p.n_sequence,
        items: p.items,
        table: p.table,
        latent: 0,
        latent_pitch: p.cache_storage.row_loads(d_latent),
        // Every buffer is within a binding of less than 2^32 bytes: its words and vec4s are counted in 32 bits.
        rope: (p.rope_byte / 16) as u32,
        rope_pitch: p.cache_storage.row_loads(d_rope),
        statistics: (p.statistics_byte / 16) as u32,
        weight_pitch: p.storage.row_loads(d_latent),
        gate_pitch: p.gates_storage.row_loads(p.d_kv()),
        more_pitch: p.more_storage.row_loads(p.d_kv()),
        resident: p.resident,
        first_row: p.first_row,
        rows: p.rows,
        pass_index: p.pass_index,
        passes: p.passes,
        beta: beta_element(p.d_kv()),
        softmax: softmax_word(p.partials, p.n_head, d_value) as u32,
        scale: p.scale,
    };
    recording.push(&SPEC, &plan, &params, &p.bound(&args))
}

//! Attention over the cached latents with one absorbed query per distinct token id: decode for the gate at `up_projected`.
//!
//! The step's tables are made for a [`Tiling`], and with it for a kernel: [`encode`] hands tilings of eight groups to
//! [`super::attention_grouped_subgroup`], which has the same meaning, lists and partial results.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, attention_grouped_subgroup, narrow, nonzero, product, words};
use crate::config::{Activation, GateNorm};
use crate::error::{Error, Result};
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Storage, Tuning, padded};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "attention_grouped",
    source: include_str!("../../shaders/attention_grouped.wgsl"),
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
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// Words of a group's header.
pub const HEADER_WORDS: u32 = 8;
/// Positions that stand in the header itself.
pub const INLINE_POSITIONS: u32 = 3;
/// Positions of a group's first tier.
pub const TIER_1: u32 = 13;
/// Positions of its second.
pub const TIER_2: u32 = 48;
/// Positions of a group that a tile takes; further ones come in chunks.
pub const TILE_POSITIONS: u32 = INLINE_POSITIONS + TIER_1 + TIER_2;
/// Words before the positions of a chunk.
pub const CHUNK_HEADER: u32 = 4;
/// Positions of a chunk.
pub const CHUNK_POSITIONS: u32 = 256;
/// Words of a line of the sequence table.
pub const SEQUENCE_WORDS: u32 = 16;

/// (HEADS, LANES): heads of a workgroup and invocations of a head.
const TUNINGS: &[(u32, u32)] = &[(1, 8), (4, 8), (1, 16)];

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    n_head: u32,
    d_rope: u32,
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

/// One line of the sequence table, at word [`Problem::table`] of `lists`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable, Default)]
pub struct GroupedSequence {
    /// First item of the sequence in the step's numbering.
    pub first_item: u32,
    /// Tiles of groups.
    pub tiles: u32,
    /// Groups.
    pub groups: u32,
    /// Word of `lists` where the sequence's lists begin.
    pub base: u32,
    /// Cache row of position 0.
    pub first_slot: u32,
    /// Position of the first query token.
    pub position: u32,
    /// Row of the first query token in the step's activations.
    pub token: u32,
    /// Query tokens.
    pub tokens: u32,
    /// First partial result of the sequence.
    pub partial: u32,
    /// Items of tiles.
    pub tile_items: u32,
    /// First group in the step's numbering, which counts whole tiles.
    pub first_group: u32,
    /// Chunks.
    pub chunks: u32,
    /// Word of the first chunk, from `base`.
    pub chunk_word: u32,
    /// Items of chunks.
    pub chunk_items: u32,
    /// Fills the line up.
    pub unused: [u32; 2],
}

/// How many groups share a tile, and how many tiles an item: what the step's tables are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Groups of a tile.
    pub groups: u32,
    /// Tiles of an item.
    pub run: u32,
}

impl Tiling {
    /// Groups of an item: sequences begin at multiples of it in the step's numbering, and so do passes.
    pub fn item_groups(&self) -> u32 {
        self.groups.saturating_mul(self.run)
    }
}

/// Widths of a head and of the latent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Widths {
    /// Width of a latent.
    pub d_latent: u32,
    /// Content part of a query.
    pub d_nope: u32,
    /// Rotary part.
    pub d_rope: u32,
    /// Width of a value.
    pub d_value: u32,
}

/// Where gate rows are found, as the shaders' SOURCES count it: what is never read is not compiled either.
pub(super) fn sources(resident: u32, more: u32) -> f64 {
    match (resident, more) {
        (0, _) => 2.0,
        (_, 0) => 1.0,
        _ => 0.0,
    }
}

/// vec4s of `width` elements, an even number, so that one 16-byte load of f16 is two of them.
fn pairs_of_four(width: u32) -> u32 {
    width.div_ceil(8) * 2
}

/// Vectors that hold a head's gated query, and after it the gate of its values.
fn room(d_nope: u32, d_value: u32) -> u32 {
    d_nope.max(d_value).checked_next_multiple_of(4).unwrap_or(u32::MAX)
}

/// Workgroup memory in bytes, as the shader declares it.
fn workgroup_bytes(widths: Widths, groups: u32, heads: u32) -> u64 {
    let Widths { d_latent, d_nope, d_rope, d_value } = widths;
    let vectors = [
        product(&[heads, room(d_nope, d_value)]),
        product(&[heads, pairs_of_four(d_rope).max(2)]),
        product(&[groups, heads, pairs_of_four(d_latent)]),
        product(&[heads, d_value.div_ceil(4)]),
    ];
    let vectors = vectors.into_iter().fold(0, u64::saturating_add).saturating_mul(16);
    vectors.saturating_add(4 * (product(&[heads, d_nope]) + 1) + 4 * (u64::from(heads) + 3) * 256)
}

/// The tiling for these widths on a device, and with it the kernel: that of [`attention_grouped_subgroup`] where it is offered
/// and suits them, else as many groups as workgroup memory holds.
///
/// # Errors
/// [`Error::Limit`] when one head of one group does not fit.
pub fn tiling(context: &PlanContext, widths: Widths) -> Result<Tiling> {
    match attention_grouped_subgroup::tiling(context, widths) {
        Some(tiling) => Ok(tiling),
        None => tiling_in_workgroup(context, widths),
    }
}

/// The tiling of the kernel that keeps a tile in workgroup memory.
///
/// # Errors
/// [`Error::Limit`] when one head of one group does not fit.
pub fn tiling_in_workgroup(context: &PlanContext, widths: Widths) -> Result<Tiling> {
    let allowed = context.limits.max_compute_workgroup_storage_size;
    let bytes = |groups| workgroup_bytes(widths, groups, 1);
    let run = match context.class {
        AdapterClass::Software => 4,
        _ => 2,
    };
    match [4, 2, 1].into_iter().find(|&groups| bytes(groups) <= allowed.into()) {
        Some(groups) => Ok(Tiling { groups, run }),
        None => Err(Error::Limit {
            what: format!("{}: workgroup memory in bytes", SPEC.name),
            needed: bytes(1),
            allowed: allowed.into(),
            limit: "max_compute_workgroup_storage_size",
        }),
    }
}

/// Attention of one pass: the groups `first_row … first_row + rows` of the step's numbering.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    /// Rows of `q`.
    pub tokens: u32,
    /// Most query tokens of a sequence.
    pub most_tokens: u32,
    /// Lines of the sequence table.
    pub n_sequence: u32,
    /// Items of all sequences.
    pub items: u32,
    /// Partial results of all passes.
    pub partials: u32,
    /// Query heads.
    pub n_head: u32,
    /// Widths of a head and of the latent.
    pub widths: Widths,
    /// How the step's tables were made.
    pub tiling: Tiling,
    /// Word of the sequence table in `lists`.
    pub table: u32,
    /// Words of `lists`.
    pub list_words: u32,
    /// Rows of the cache.
    pub cache_rows: u32,
    /// Byte in the layer's cache where the rotary keys begin; the latents begin at 0.
    pub rope_byte: u64,
    /// Byte where the statistics begin.
    pub statistics_byte: u64,
    /// Rows of `gates`; further rows are those of `gates_more`.
    pub resident: u32,
    /// How `gates` is stored.
    pub gates_storage: Storage,
    /// Rows of `gates_more` that are bound.
    pub more: u32,
    /// How `gates_more` is stored.
    pub more_storage: Storage,
    /// First group of the pass.
    pub first_row: u32,
    /// Groups of the pass.
    pub rows: u32,
    /// Which pass.
    pub pass_index: u32,
    /// Passes of the step.
    pub passes: u32,
    /// Applied to the gate rows.
    pub activation: Activation,
    /// Norm after the gate.
    pub norm: GateNorm,
    /// Factor on the scores, `AttentionConfig::scale`.
    pub scale: f32,
    /// Groups that the pass meets, summed over the query tokens; for the cost alone.
    pub met_groups: u64,
    /// Positions that it meets, likewise.
    pub met_positions: u64,
    /// How the cache is stored.
    pub cache_storage: Storage,
    /// How weights are stored.
    pub storage: Storage,
}

impl Problem {
    /// Width of all keys and values.
    pub(super) fn d_kv(&self) -> u32 {
        self.n_head * (self.widths.d_nope + self.widths.d_value)
    }

    pub(super) fn validate(&self, kernel: &'static str) -> Result<()> {
        let Widths { d_latent, d_nope, d_rope, d_value } = self.widths;
        narrow(kernel, &[("d_nope", d_nope), ("d_rope", d_rope), ("d_latent", d_latent), ("d_value", d_value)])?;
        nonzero(
            kernel,
            &[("n_head", self.n_head), ("d_latent", d_latent), ("d_value", d_value), ("n_sequence", self.n_sequence)],
        )?;
        nonzero(kernel, &[("groups of a tile", self.tiling.groups), ("tiles of an item", self.tiling.run)])?;
        if product(&[self.n_head, d_nope + d_value]) >= 1 << 31 {
            return Err(Error::problem(kernel, format!("{} heads of {d_nope} + {d_value}", self.n_head)));
        }
        Ok(())
    }

    pub(super) fn switches(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("CACHE_F16", self.cache_storage.constant()),
            ("WEIGHTS_F16", self.storage.constant()),
            ("GATES_F16", self.gates_storage.constant()),
            ("MORE_F16", self.more_storage.constant()),
            ("SOURCES", sources(self.resident, self.more)),
            ("ACTIVATION", f64::from(self.activation as u32)),
            ("NORM", f64::from(self.norm as u32)),
        ]
    }

    /// Workgroups of `heads` heads, items folded into y and z.
    pub(super) fn grid(&self, kernel: &'static str, heads: u32, context: &PlanContext) -> Result<[u32; 3]> {
        let [y, z, _] = crate::plan::fold_grid(kernel, self.items.into(), &context.limits)?;
        Ok([self.n_head.div_ceil(heads).saturating_mul(self.most_tokens), y, z])
    }

    pub(super) fn bound<'a>(&self, args: &Args<'a>) -> [Bound<'a>; 8] {
        let Widths { d_latent, d_nope, d_rope, d_value } = self.widths;
        let d_kv = self.d_kv();
        let stored =
            |region, extents: &[u32]| Bound { region, bytes: product(extents).saturating_mul(self.storage.bytes()) };
        let rows = |region, rows: u32, storage: Storage| Bound {
            region,
            bytes: product(&[rows, storage.row_pitch(d_kv)]).saturating_mul(storage.bytes()),
        };
        let affine = match self.norm {
            GateNorm::None => 0,
            GateNorm::RmsNorm => d_kv,
            GateNorm::LayerNorm => beta_element(d_kv) + d_kv,
        };
        let cache = if self.norm == GateNorm::None {
            let rope_loads = d_rope.div_ceil(16 / self.cache_storage.bytes() as u32);
            self.rope_byte.saturating_add(product(&[self.cache_rows, rope_loads, 16]))
        } else {
            self.statistics_byte.saturating_add(product(&[self.cache_rows, 8]).next_multiple_of(16))
        };
        let softmax = softmax_word(self.partials, self.n_head, d_value);
        [
            words(args.q, product(&[self.tokens, self.n_head, d_nope + d_rope])),
            stored(args.kv_b_proj, &[d_kv, self.storage.row_pitch(d_latent)]),
            stored(args.affine, &[affine]),
            rows(args.gates, self.resident, self.gates_storage),
            rows(args.gates_more, self.more, self.more_storage),
            Bound { region: args.cache, bytes: cache },
            words(args.lists, self.list_words.into()),
            words(args.partial, softmax.saturating_add(product(&[self.partials, self.n_head, 2]))),
        ]
    }
}

/// Word of the (m, l) pairs in the partial results: a binding may begin there.
pub fn softmax_word(partials: u32, n_head: u32, d_value: u32) -> u64 {
    padded(product(&[partials, n_head, d_value]), 64)
}

/// First element of β in `affine`: a binding may begin there in either storage.
pub fn beta_element(d_kv: u32) -> u32 {
    d_kv.next_multiple_of(128)
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.validate(SPEC.name)?;
        let Widths { d_latent, d_nope, d_rope, d_value } = self.widths;
        let Tiling { groups, run } = self.tiling;
        let auto = match context.class {
            AdapterClass::Software => 0,
            _ => 1,
        };
        let (mut heads, lanes) = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        // Fewer heads where the widths leave no room for more in what every device offers.
        while heads > 1 && workgroup_bytes(self.widths, groups, heads) > 16384 {
            heads /= 2;
        }
        let bytes = workgroup_bytes(self.widths, groups, heads);
        let mut overrides = self.switches();
        overrides.extend([
            ("HEADS", heads.into()),
            ("LANES", lanes.into()),
            ("GROUPS", groups.into()),
            ("RUN", run.into()),
            ("D_NOPE", d_nope.into()),
            ("D_VALUE", d_value.into()),
            ("LATENT4", pairs_of_four(d_latent).into()),
            ("ROPE4", pairs_of_four(d_rope).max(2).into()),
            ("VALUE4", d_value.div_ceil(4).into()),
            ("ROOM", room(d_nope, d_value).into()),
        ]);
        Plan {
            overrides,
            grid: self.grid(SPEC.name, heads, context)?,
            tiles: [0; 3],
            workgroup_size: heads * lanes,
            workgroup_bytes: u32::try_from(bytes).unwrap_or(u32::MAX),
        }
        .checked(SPEC.name, &context.limits)
    }
}

/// Buffers of one dispatch.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// `[tokens, n_head, d_nope + d_rope]` f32, rotated.
    pub q: &'a Region,
    /// `[n_head · (d_nope + d_value), pitch of d_latent]` in `storage`, padded with zeros.
    pub kv_b_proj: &'a Region,
    /// γ `[d_kv]`, then at [`beta_element`] β `[d_kv]`, in `storage`; `Kernels::absent` without a norm.
    pub affine: &'a Region,
    /// `[resident, pitch of d_kv]` in `gates_storage`: gate rows before their activation.
    pub gates: &'a Region,
    /// `[more, pitch of d_kv]` in `more_storage`.
    pub gates_more: &'a Region,
    /// The layer's cache: latents, rotary keys, statistics.
    pub cache: &'a Region,
    /// Group lists and sequence table.
    pub lists: &'a Region,
    /// `[partials, n_head, d_value]` f32, then at [`softmax_word`] `[partials, n_head, 2]` (m, l); written.
    pub partial: &'a Region,
}

/// Adds the attention of one pass to a recording, by the kernel that the problem's tiling belongs to.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also an output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    if problem.tiling.groups == attention_grouped_subgroup::GROUPS {
        let problem = attention_grouped_subgroup::Problem(*problem);
        return attention_grouped_subgroup::encode(recording, &problem, args, tuning);
    }
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let p = *problem;
    let Widths { d_latent, d_rope, d_value, .. } = p.widths;
    let params = Params {
        n_head: p.n_head,
        d_rope,
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
        gate_pitch: p.gates_storage.row_pitch(p.d_kv()),
        more_pitch: p.more_storage.row_pitch(p.d_kv()),
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn widths_and_tilings_that_no_device_holds_are_refused() {
        let context = PlanContext::webgpu_defaults(AdapterClass::Software);
        let most = u32::MAX;
        let wide = Widths { d_latent: most, d_nope: most, d_rope: most, d_value: most };
        assert!(matches!(tiling(&context, wide), Err(Error::Limit { .. })));
        assert_eq!(softmax_word(most, most, most), u64::MAX);
        let problem = |groups, run| Problem {
            tokens: 1,
            most_tokens: 1,
            n_sequence: 1,
            items: 1,
            partials: 1,
            n_head: 1,
            widths: Widths { d_latent: 8, d_nope: 8, d_rope: 8, d_value: 8 },
            tiling: Tiling { groups, run },
            table: 0,
            list_words: 16,
            cache_rows: 1,
            rope_byte: 0,
            statistics_byte: 0,
            resident: 1,
            gates_storage: Storage::F32,
            more: 0,
            more_storage: Storage::F32,
            first_row: 0,
            rows: 1,
            pass_index: 0,
            passes: 1,
            activation: Activation::Identity,
            norm: GateNorm::None,
            scale: 1.0,
            met_groups: 1,
            met_positions: 1,
            cache_storage: Storage::F32,
            storage: Storage::F32,
        };
        let plan = |groups, run| super::super::Problem::plan(&problem(groups, run), &context, Tuning::Auto);
        plan(4, 4).unwrap();
        for (groups, run) in [(0, 1), (1, 0)] {
            assert!(matches!(plan(groups, run), Err(Error::Problem { .. })), "{groups} {run}");
        }
        assert!(matches!(plan(most, most), Err(Error::Limit { .. })));
    }
}

//! Attention over the cached latents with one absorbed query per distinct token id: decode for the gate at `up_projected`.
//!
//! A [`Tiling`] shapes the step's tables and selects the variant: all have the same meaning, lists and partial results.

use bytemuck::{Pod, Zeroable};

use crate::adapter::{AdapterClass, Cooperative, PlanContext};
use crate::config::{Activation, GateNorm};
use crate::cost::{Cost, times};
use crate::error::{Error, Result};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_nonzero};
use crate::storage::{Storage, padded, product, words};

/// Positions that stand in a group's header.
pub const INLINE_LENGTH: u32 = 3;
/// Positions of a group's first tier.
pub const TIER_1_LENGTH: u32 = 13;
/// Positions of its second.
pub const TIER_2_LENGTH: u32 = 48;
/// Positions of a group that a tile takes; further ones come in chunks.
pub const TILE_LENGTH: u32 = INLINE_LENGTH + TIER_1_LENGTH + TIER_2_LENGTH;
/// Positions of a chunk.
pub const CHUNK_LENGTH: u32 = 256;
/// Words of a [`GroupHeader`].
pub const HEADER_WORDS: u32 = word(size_of::<GroupHeader>());
/// Words of a [`GroupChunk`].
pub const CHUNK_WORDS: u32 = word(size_of::<GroupChunk>());
/// Words of a [`GroupedSequence`].
pub const SEQUENCE_WORDS: u32 = word(size_of::<GroupedSequence>());

/// The word that begins at a byte.
pub(crate) const fn word(byte: usize) -> u32 {
    (byte / 4) as u32
}

crate::params! {
    /// Uniform parameters, as in the shaders.
    pub struct Params {
        n_head: u32, d_latent: u32, d_nope: u32, d_rope: u32, d_value: u32, n_sequence: u32, entries: u32, table: u32,
        latent: u32, latent_pitch: u32, rope: u32, rope_pitch: u32, statistics: u32, weight_pitch: u32,
        gate_pitch: u32, more_pitch: u32, resident: u32, first_group: u32, groups: u32, pass_index: u32, passes: u32,
        beta: u32, softmax: u32, scale: f32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[tokens, n_head, d_nope + d_rope]` f32, rotated.
        q: Read,
        /// `[n_head · (d_nope + d_value), pitch of d_latent]` in `storage`, padded with zeros.
        kv_b_proj: Read,
        /// γ `[d_kv]`, then at [`beta_element`] β `[d_kv]`, in `storage`; not bound without a norm.
        affine: Read,
        /// `[resident, pitch of d_kv]` in `gates_storage`: gate rows before their activation.
        gates: Read,
        /// `[more, pitch of d_kv]` in `more_storage`.
        gates_more: Read,
        /// The layer's cache: latents, rotary keys, statistics.
        cache: Read,
        /// Group lists and sequence table.
        lists: Read,
        /// `[most_partials, n_head, d_value]` f32, then at [`softmax_word`] `[most_partials, n_head, 2]` (m, l); written.
        partial: Write,
    }
}

/// Header of a group in the lists of its sequence.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupHeader {
    /// Token id.
    pub id: u32,
    /// Positions of the group.
    pub count: u32,
    /// Resident gate row; `u32::MAX` for none.
    pub gate_row: u32,
    /// First word of the first tier, from the sequence's `base`.
    pub tier_1: u32,
    /// First word of the second tier, likewise.
    pub tier_2: u32,
    /// The first positions.
    pub positions: [u32; INLINE_LENGTH as usize],
}

/// Positions of a group that its tile does not take.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupChunk {
    /// The group.
    pub group: u32,
    /// Index, within the group, of the first position here.
    pub first: u32,
    /// Fills the words before the positions up.
    pub unused: [u32; 2],
    /// The positions; those past the group's last are not written.
    pub positions: [u32; CHUNK_LENGTH as usize],
}

/// One line of the sequence table, at word [`AttentionGrouped::table`] of `lists`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable, Default)]
pub struct GroupedSequence {
    /// First entry of the sequence in the step's numbering.
    pub first_entry: u32,
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
    /// First query token, in the step's numbering of new tokens.
    pub token: u32,
    /// Query tokens.
    pub tokens: u32,
    /// First partial result of the sequence.
    pub partial: u32,
    /// Entries of tiles.
    pub tile_entries: u32,
    /// First group in the step's numbering, which counts whole tiles.
    pub first_group: u32,
    /// Chunks.
    pub chunks: u32,
    /// Word of the first chunk, from `base`.
    pub chunk_word: u32,
    /// Entries of chunks.
    pub chunk_entries: u32,
    /// Padding.
    pub unused: [u32; 2],
}

/// Groups per tile and tiles per entry: the shape of the step's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Groups per tile.
    pub groups: u32,
    /// Tiles per entry.
    pub span: u32,
}

impl Tiling {
    /// Groups per entry: sequences and passes begin at multiples of it in the step's numbering.
    pub fn entry_groups(&self) -> u32 {
        self.groups.saturating_mul(self.span)
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

/// Sources of gate rows, as the shaders' SOURCES counts them: a source that is never read is not compiled.
pub(super) fn sources(resident: u32, more: u32) -> f64 {
    match (resident, more) {
        (0, _) => 2.0,
        (_, 0) => 1.0,
        _ => 0.0,
    }
}

/// The tiling for these widths on a device, and with it the variant: in registers if the device and the widths allow it, else
/// with as many groups as workgroup memory holds.
///
/// # Errors
/// [`Error::Limit`] when one head of one group does not fit.
pub fn tiling(context: &PlanContext, widths: Widths) -> Result<Tiling> {
    match tiling_in_registers(context, widths) {
        Some(tiling) => Ok(tiling),
        None => tiling_in_workgroup(context, widths),
    }
}

/// The tiling of the variant that keeps a tile in registers. `None` without subgroups of 8 and more, for latents or rotary keys
/// over 64 wide, values over 128, or head widths that are no multiples of 8.
pub fn tiling_in_registers(context: &PlanContext, widths: Widths) -> Option<Tiling> {
    let span = match context.class {
        AdapterClass::Software => 2,
        AdapterClass::Integrated | AdapterClass::Discrete | AdapterClass::Apple => 1,
    };
    let offered = SUBGROUP.spec.offered(context);
    (offered && suit_registers(widths)).then_some(Tiling { groups: SUBGROUP_GROUPS, span })
}

/// The tiling of the variant that keeps a tile in workgroup memory.
///
/// # Errors
/// [`Error::Limit`] when one head of one group does not fit.
pub fn tiling_in_workgroup(context: &PlanContext, widths: Widths) -> Result<Tiling> {
    let allowed = context.limits.max_compute_workgroup_storage_size;
    let bytes = |groups| workgroup_bytes(widths, groups, 1);
    let span = match context.class {
        AdapterClass::Software => 4,
        _ => 2,
    };
    match [WORKGROUP_GROUPS, 2, 1].into_iter().find(|&groups| bytes(groups) <= allowed.into()) {
        Some(groups) => Ok(Tiling { groups, span }),
        None => Err(Error::Limit {
            what: format!("{}: workgroup memory in bytes", AttentionGrouped::NAME),
            needed: bytes(1),
            allowed: allowed.into(),
            limit: "max_compute_workgroup_storage_size",
        }),
    }
}

/// Attention of one pass: the groups `first_group … first_group + groups` of the step's numbering.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionGrouped {
    /// Query tokens.
    pub tokens: u32,
    /// Most query tokens per sequence.
    pub most_tokens: u32,
    /// Entries of the sequence table.
    pub n_sequence: u32,
    /// Entries of all sequences.
    pub entries: u32,
    /// Partial results of all passes.
    pub partials: u32,
    /// Most partial results of `partial`.
    pub most_partials: u32,
    /// Query heads.
    pub n_head: u32,
    /// Widths of a head and of the latent.
    pub widths: Widths,
    /// The shape of the step's tables.
    pub tiling: Tiling,
    /// Word of the sequence table in `lists`.
    pub table: u32,
    /// Words of `lists`.
    pub list_words: u32,
    /// Cache rows.
    pub cache_rows: u32,
    /// Byte in the layer's cache where the rotary keys begin; the latents begin at 0.
    pub rope_byte: u64,
    /// Byte where the statistics begin.
    pub statistics_byte: u64,
    /// Gate rows of `gates`; higher numbers are those of `gates_more`.
    pub resident: u32,
    /// Storage of `gates`.
    pub gates_storage: Storage,
    /// Bound gate rows of `gates_more`.
    pub more: u32,
    /// Storage of `gates_more`.
    pub more_storage: Storage,
    /// First group of the pass.
    pub first_group: u32,
    /// Groups of the pass.
    pub groups: u32,
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
    /// Expected groups of the pass, summed over the query tokens; for the cost alone.
    pub expected_groups: u64,
    /// Expected positions, likewise.
    pub expected_positions: u64,
    /// Storage of the cache.
    pub cache_storage: Storage,
    /// Storage of weights.
    pub storage: Storage,
}

impl AttentionGrouped {
    /// Width of all keys and values.
    fn d_kv(&self) -> u32 {
        self.n_head * (self.widths.d_nope + self.widths.d_value)
    }

    /// A draft with `heads` heads per workgroup and `lanes` invocations per head.
    fn draft(&self, heads: u32, lanes: u32) -> Draft {
        self.draft_of(heads * lanes, heads)
            .with([("CACHE_F16", self.cache_storage.constant())])
            .with([("HEADS", heads), ("SPAN", self.tiling.span)])
    }

    /// A draft with `heads` heads per workgroup, entries folded into y and z.
    fn draft_of(&self, workgroup_size: u32, heads: u32) -> Draft {
        let x = self.n_head.div_ceil(heads).saturating_mul(self.most_tokens);
        Draft::new(workgroup_size, Grid::Columns { x, rows: self.entries }).with([
            ("STORAGE_F16", self.storage.constant()),
            ("GATES_F16", self.gates_storage.constant()),
            ("MORE_F16", self.more_storage.constant()),
            ("SOURCES", sources(self.resident, self.more)),
            ("ACTIVATION", f64::from(self.activation as u32)),
            ("NORM", f64::from(self.norm as u32)),
        ])
    }
}

/// Word of the (m, l) pairs in the partial results, at a binding's alignment.
pub fn softmax_word(partials: u32, n_head: u32, d_value: u32) -> u64 {
    padded(product(&[partials, n_head, d_value]), 64)
}

/// First element of β in `affine`, at a binding's alignment in either storage.
pub fn beta_element(d_kv: u32) -> u32 {
    d_kv.next_multiple_of(128)
}

impl Op for AttentionGrouped {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "attention_grouped";
    const VARIANTS: &'static [Variant<Self>] = &[COOPERATIVE, COOPERATIVE_8, SUBGROUP, WORKGROUP];

    fn widths(&self) -> [(&'static str, u32); 4] {
        let Widths { d_latent, d_nope, d_rope, d_value } = self.widths;
        [("d_nope", d_nope), ("d_rope", d_rope), ("d_latent", d_latent), ("d_value", d_value)]
    }

    fn validate(&self) -> Result<(), String> {
        let Widths { d_latent, d_nope, d_value, .. } = self.widths;
        check_nonzero(&[
            ("n_head", self.n_head),
            ("d_latent", d_latent),
            ("d_value", d_value),
            ("n_sequence", self.n_sequence),
            ("groups of a tile", self.tiling.groups),
            ("tiles of an entry", self.tiling.span),
        ])?;
        if self.partials > self.most_partials {
            return Err(format!("{} partial results, room for {}", self.partials, self.most_partials));
        }
        if product(&[self.n_head, d_nope + d_value]) >= 1 << 31 {
            return Err(format!("{} heads of {d_nope} + {d_value}", self.n_head));
        }
        Ok(())
    }

    fn params(&self, _: &Plan) -> Params {
        let Widths { d_latent, d_nope, d_rope, d_value } = self.widths;
        Params {
            n_head: self.n_head,
            d_latent,
            d_nope,
            d_rope,
            d_value,
            n_sequence: self.n_sequence,
            entries: self.entries,
            table: self.table,
            latent: 0,
            latent_pitch: self.cache_storage.row_loads(d_latent),
            // Every buffer is within a binding of less than 2^32 bytes: its words and vec4s are counted in 32 bits.
            rope: (self.rope_byte / 16) as u32,
            rope_pitch: self.cache_storage.row_loads(d_rope),
            statistics: (self.statistics_byte / 16) as u32,
            weight_pitch: self.storage.row_loads(d_latent),
            gate_pitch: self.gates_storage.row_pitch(self.d_kv()),
            more_pitch: self.more_storage.row_pitch(self.d_kv()),
            resident: self.resident,
            first_group: self.first_group,
            groups: self.groups,
            pass_index: self.pass_index,
            passes: self.passes,
            beta: beta_element(self.d_kv()),
            softmax: softmax_word(self.most_partials, self.n_head, d_value) as u32,
            scale: self.scale,
        }
    }

    fn bytes(&self) -> Args<u64> {
        let Widths { d_latent, d_nope, d_rope, d_value } = self.widths;
        let d_kv = self.d_kv();
        let rows = |rows: u32, storage: Storage| storage.sized(product(&[rows, storage.row_pitch(d_kv)]));
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
        let softmax = softmax_word(self.most_partials, self.n_head, d_value);
        Args {
            q: words(product(&[self.tokens, self.n_head, d_nope + d_rope])),
            kv_b_proj: self.storage.sized(product(&[d_kv, self.storage.row_pitch(d_latent)])),
            affine: self.storage.sized(affine.into()),
            gates: rows(self.resident, self.gates_storage),
            gates_more: rows(self.more, self.more_storage),
            cache,
            lists: words(self.list_words.into()),
            partial: words(softmax.saturating_add(product(&[self.most_partials, self.n_head, 2]))),
        }
    }

    fn cost(&self) -> Cost {
        let AttentionGrouped { tokens, n_head, widths, expected_groups, expected_positions, .. } = *self;
        let Widths { d_latent, d_nope, d_rope, d_value } = widths;
        let of_head = |width: u32, other: u32| u64::from(width) + u64::from(other);
        let kv = |factor: u64| times(factor, &[n_head]).saturating_mul(of_head(d_nope, d_value));
        let d_kv = kv(1);
        // The caller's count of groups and positions, per query token; the bytes are those of one token's.
        let once = |met: u64| met / u64::from(tokens.max(1));
        let row = u64::from(d_latent) + u64::from(d_rope);
        let statistics = if self.norm == GateNorm::None { 0 } else { 8 };
        let gate_bytes = if self.resident > 0 { self.gates_storage } else { self.more_storage }.bytes();
        let affine = match self.norm {
            GateNorm::None => 0,
            GateNorm::RmsNorm => d_kv,
            GateNorm::LayerNorm => kv(2),
        };
        let each = |count: u64, size: u64| count.saturating_mul(size);
        Cost::of(
            &[
                // Absorption of keys and values per group, score and sum per position.
                each(expected_groups, kv(2).saturating_mul(d_latent.into())),
                each(expected_positions, times(4, &[n_head, d_latent]).saturating_add(times(2, &[n_head, d_rope]))),
            ],
            &[
                times(4, &[tokens, n_head]).saturating_mul(of_head(d_nope, d_rope)),
                kv(self.storage.bytes()).saturating_mul(d_latent.into()),
                each(affine, self.storage.bytes()),
                each(once(expected_groups), d_kv.saturating_mul(gate_bytes)),
                // A header of every group, a position of every row, the row itself and its statistics.
                each(once(expected_groups), size_of::<GroupHeader>() as u64),
                each(once(expected_positions), 4 + statistics + row * self.cache_storage.bytes()),
                times(4, &[self.partials, n_head, d_value]),
                times(8, &[self.partials, n_head]),
            ],
        )
    }
}

/// vec4s of `width` elements, an even number: one 16-byte load of f16 is two of them.
fn pairs_of_four(width: u32) -> u32 {
    width.div_ceil(8) * 2
}

/// Vectors of a head's gated query, later of the gate of its values.
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
    vectors.saturating_add(4 * (product(&[heads, d_nope]) + 1) + 4 * (u64::from(heads) + 3) * u64::from(CHUNK_LENGTH))
}

/// A tile in workgroup memory, any widths. (HEADS, LANES): heads per workgroup and invocations per head.
pub(crate) const WORKGROUP: Variant<AttentionGrouped> = {
    const TUNINGS: &[(u32, u32)] = &[(1, 8), (4, 8), (1, 16)];
    Variant::<AttentionGrouped>::new(
        ("attention_grouped", include_str!("../../shaders/attention_grouped.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            let Widths { d_latent, d_nope, d_rope, d_value } = op.widths;
            let groups = op.tiling.groups;
            if groups > WORKGROUP_GROUPS {
                return Err(format!("tiles of {groups} groups, up to {WORKGROUP_GROUPS} fit"));
            }
            let (mut heads, lanes) = TUNINGS[setting];
            // As many heads as fit WebGPU's default workgroup memory at these widths.
            while heads > 1 && workgroup_bytes(op.widths, groups, heads) > 16384 {
                heads /= 2;
            }
            Ok(op
                .draft(heads, lanes)
                .with([
                    ("LANES", lanes),
                    ("GROUPS", groups),
                    ("D_NOPE", d_nope),
                    ("D_VALUE", d_value),
                    ("LATENT4", pairs_of_four(d_latent)),
                    ("ROPE4", pairs_of_four(d_rope).max(2)),
                    ("VALUE4", d_value.div_ceil(4)),
                    ("ROOM", room(d_nope, d_value)),
                ])
                .bytes(workgroup_bytes(op.widths, groups, heads)))
        },
        |_, _, plan| hold(&[(plan.value("GROUPS") <= 4, "the groups of a tile are the elements of a vector")]),
    )
    .auto(|_, context| usize::from(context.class != AdapterClass::Software))
    .preferred(|op, _| op.tiling.groups <= WORKGROUP_GROUPS)
};

/// Most groups per tile of the variant in workgroup memory.
const WORKGROUP_GROUPS: u32 = 4;

/// Groups of a tile, and invocations of a head, of the variant in registers.
pub const SUBGROUP_GROUPS: u32 = 8;

fn suit_registers(Widths { d_latent, d_nope, d_rope, d_value }: Widths) -> bool {
    let whole = d_nope.is_multiple_of(8) && d_value.is_multiple_of(8);
    whole && d_latent <= 64 && d_rope <= 64 && d_value <= 128
}

/// A tile in registers and subgroup shuffles, for latents of up to 64 columns. (HEADS, AHEAD): heads per workgroup, eight
/// invocations each, and positions whose cache rows are loaded ahead. AHEAD divides 8.
///
/// A GPU waits for memory at every position that was not loaded ahead; a software adapter only compiles longer.
pub(crate) const SUBGROUP: Variant<AttentionGrouped> = {
    const TUNINGS: &[(u32, u32)] = &[(1, 1), (4, 4), (8, 4), (4, 2)];
    Variant::<AttentionGrouped>::new(
        ("attention_grouped_subgroup", include_str!("../../shaders/attention_grouped_subgroup.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            let (widths, Tiling { groups, span }) = (op.widths, op.tiling);
            if !suit_registers(widths) {
                let Widths { d_latent, d_nope, d_rope, d_value } = widths;
                return Err(format!(
                    "d_latent {d_latent}, d_nope {d_nope}, d_rope {d_rope}, d_value {d_value}: latents and rotary keys go \
                     up to 64, values to 128, heads are whole blocks of 8"
                ));
            }
            if groups != SUBGROUP_GROUPS || span > SUBGROUP_GROUPS {
                return Err(format!("tiles of {groups} groups, {span} of them an entry"));
            }
            let (heads, ahead) = TUNINGS[setting];
            Ok(op.draft(heads, SUBGROUP_GROUPS).with([("AHEAD", ahead)]))
        },
        |_, _, plan| {
            hold(&[
                (plan.value("HEADS") * 8 == u64::from(plan.workgroup_size), "a head has eight invocations"),
                ([1, 2, 4].contains(&plan.value("AHEAD")), "one, two or four rows are asked for at once"),
            ])
        },
    )
    .subgroups(SUBGROUP_GROUPS)
    .auto(|_, context| usize::from(context.class != AdapterClass::Software))
    .preferred(|op, _| op.tiling.groups == SUBGROUP_GROUPS)
};

/// By cooperative matrices of 16 × 16: for weights and caches of halves, entries of one tile.
///
/// Gated and absorbed queries, rotary queries, weights of positions and sums of latents are rounded to f16, each row in units of a
/// power of two; other sums and the softmax are f32. A score is off by about 2⁻¹¹ of its terms, a sum by 2⁻¹¹ of itself.
pub(crate) const COOPERATIVE: Variant<AttentionGrouped> = Variant::<AttentionGrouped>::new(
    ("attention_grouped_cooperative", include_str!("../../shaders/attention_grouped_cooperative.wgsl")),
    1,
    |op, context, _| by_matrices(op, 16, context),
    |_, context, plan| whole_matrices(16, context, plan),
)
.subgroups(8)
.cooperative(Cooperative::BY_16)
.preferred(|op, context| halves_in_tiles(op, 16, context));

/// The same with matrices of 8 × 8: Apple's GPUs have these.
pub(crate) const COOPERATIVE_8: Variant<AttentionGrouped> = Variant::<AttentionGrouped>::new(
    ("attention_grouped_cooperative_8", include_str!("../../shaders/attention_grouped_cooperative_8.wgsl")),
    1,
    |op, context, _| by_matrices(op, 8, context),
    |_, context, plan| whole_matrices(8, context, plan),
)
.subgroups(8)
.cooperative(Cooperative::BY_8)
.preferred(|op, context| halves_in_tiles(op, 8, context));

/// Places of a workgroup of matrices, and its subgroups.
const PLACES: u32 = SUBGROUP_GROUPS;

/// Wherever they hold the layer: software gains nothing by matrices.
fn halves_in_tiles(op: &AttentionGrouped, side: u32, context: &PlanContext) -> bool {
    check_matrices(op, side).is_ok() && context.class != AdapterClass::Software
}

/// Refuses what matrices of this side do not hold.
fn check_matrices(op: &AttentionGrouped, side: u32) -> Result<(), String> {
    let Widths { d_latent, d_nope, d_rope, d_value } = op.widths;
    if op.storage != Storage::F16 || op.cache_storage != Storage::F16 {
        return Err("weights and cache must be stored in f16".to_owned());
    }
    let Tiling { groups, span } = op.tiling;
    if groups != PLACES || span != 1 {
        return Err(format!("tiles of {groups} groups, {span} of them an entry"));
    }
    let whole = d_nope.is_multiple_of(side) && d_value.is_multiple_of(side);
    let most_nope = 1024 / side;
    if !whole || d_latent > 64 || d_rope > 64 || d_nope > most_nope {
        return Err(format!(
            "d_latent {d_latent}, d_nope {d_nope}, d_rope {d_rope}, d_value {d_value}: latents and rotary keys go up to 64, \
             contents of queries to {most_nope}, heads are whole blocks of {side}"
        ));
    }
    Ok(())
}

fn by_matrices(op: &AttentionGrouped, side: u32, context: &PlanContext) -> Result<Draft, String> {
    check_matrices(op, side)?;
    let Widths { d_latent, d_nope, d_rope, .. } = op.widths;
    let [columns, rotary] = [d_latent, d_rope].map(|width| width.div_ceil(side));
    // Four lanes per gated query at least, eight columns of a matrix row per invocation at most.
    let workgroup = PLACES * context.widest_subgroup().max(32);
    let lanes = context.lanes(workgroup / (PLACES * PLACES));
    let width = side * columns.max(rotary);
    let tile = PLACES * side * (width + 8);
    let kept = (side + side / 8 - 1) * PLACES * ((side * columns).max(d_nope) + 8);
    Ok(op
        .draft_of(workgroup, side)
        .with([("WORKGROUP", workgroup), ("LANES", lanes), ("NOPE", d_nope), ("WIDTH", width)])
        .with([("COLUMNS", columns), ("SHARE", columns.next_power_of_two()), ("ROTARY", rotary)])
        // Rows of halves, matrices of sums; what is known of positions, places and heads; 32 bytes more.
        .bytes(2 * (tile + kept) + 4 * PLACES * side * side + 20 * PLACES * side + 16 * PLACES + 8 * side + 32))
}

fn whole_matrices(side: u64, context: &PlanContext, plan: &Plan) -> Result<(), &'static str> {
    let [workgroup, lanes, columns, rotary, width] =
        ["WORKGROUP", "LANES", "COLUMNS", "ROTARY", "WIDTH"].map(|name| plan.value(name));
    hold(&[
        (workgroup >= 8 * u64::from(context.widest_subgroup()), "a workgroup has a whole subgroup for every place"),
        (workgroup >= 256 && lanes * 64 <= workgroup, "every gated query and every eight columns have their lanes"),
        (lanes == u64::from(context.lanes(lanes as u32)), "the lanes of a gated query are of one subgroup"),
        ((1..=8).contains(&columns) && rotary <= 8, "one to eight matrices of columns are named"),
        (width.is_multiple_of(side), "staged rows are whole matrices"),
        (
            (columns..=8).contains(&plan.value("SHARE")) && plan.value("SHARE").is_power_of_two(),
            "the matrices of a head's absorbed queries each have a subgroup, all heads of a turn as many",
        ),
        (plan.value("NOPE") <= 32 * lanes, "a lane has up to four blocks of a gated query"),
        (
            columns.max(rotary) * side * side <= side / 4 * workgroup,
            "an invocation has up to four loads of a turn's rows, two with matrices of 8 × 8",
        ),
    ])
}

crate::vary!(Widths { d_latent, d_nope, d_rope, d_value });
crate::vary!(Tiling { groups, span });
crate::vary!(AttentionGrouped {
    tokens,
    most_tokens,
    n_sequence,
    entries,
    partials,
    most_partials,
    n_head,
    widths,
    tiling,
    table,
    list_words,
    cache_rows,
    rope_byte,
    statistics_byte,
    resident,
    gates_storage,
    more,
    more_storage,
    first_group,
    groups,
    pass_index,
    passes,
    activation,
    norm,
    scale,
    expected_groups,
    expected_positions,
    cache_storage,
    storage
});

#[cfg(feature = "check")]
impl crate::sample::Sampled for AttentionGrouped {
    fn samples() -> Vec<Self> {
        let (f32, f16) = (Storage::F32, Storage::F16);
        let of = |n_head, (d_latent, d_nope, d_rope, d_value), (groups, span)| AttentionGrouped {
            tokens: 6,
            most_tokens: 3,
            n_sequence: 2,
            entries: 5,
            partials: 5,
            most_partials: 9,
            n_head,
            widths: Widths { d_latent, d_nope, d_rope, d_value },
            tiling: Tiling { groups, span },
            table: 0,
            list_words: 32,
            cache_rows: 9,
            rope_byte: 1024,
            statistics_byte: 2048,
            resident: 4,
            gates_storage: f16,
            more: 4,
            more_storage: f32,
            first_group: 0,
            groups: 4,
            pass_index: 0,
            passes: 1,
            activation: Activation::Silu,
            norm: GateNorm::LayerNorm,
            scale: 1.0,
            expected_groups: 0,
            expected_positions: 0,
            cache_storage: f16,
            storage: f16,
        };
        // In workgroup memory from one group per tile to four, then in registers, then by matrices.
        let shapes = [
            ((64, 64, 64, 64), (4, 2)),
            ((13, 0, 0, 11), (4, 4)),
            ((512, 128, 64, 128), (1, 2)),
            ((57, 0, 62, 128), (8, 1)),
            ((64, 64, 64, 64), (8, 2)),
            ((20, 0, 0, 8), (8, 1)),
            ((64, 64, 64, 64), (8, 1)),
        ];
        let mut all = Vec::new();
        for (n_head, (widths, tiling)) in
            crate::sample::HEADS.into_iter().flat_map(|n_head| shapes.map(|shape| (n_head, shape)))
        {
            for (norm, cache_storage) in
                GateNorm::ALL.into_iter().flat_map(|norm| [f32, f16].map(|cache| (norm, cache)))
            {
                for (resident, more) in [(4, 4), (0, 4), (4, 0)] {
                    let op = of(n_head, widths, tiling);
                    all.push(AttentionGrouped { norm, cache_storage, resident, more, ..op });
                    all.push(AttentionGrouped { norm, cache_storage, resident, more, storage: f32, entries: 1, ..op });
                }
            }
        }
        // Every switch: activations under every norm, then each pairing of storages. Both spans that a class of adapter has.
        let activations =
            Activation::ALL.into_iter().flat_map(|activation| GateNorm::ALL.map(|norm| (activation, norm)));
        let switched = activations.map(|(activation, norm)| (activation, norm, [f16; 4]));
        let stored = (0..16).map(|bits| {
            let storages = [0, 1, 2, 3].map(|bit| if bits >> bit & 1 == 1 { f16 } else { f32 });
            (Activation::Sigmoid, GateNorm::RmsNorm, storages)
        });
        for (activation, norm, [storage, cache_storage, gates_storage, more_storage]) in switched.chain(stored) {
            all.extend([(4, 2), (4, 4), (8, 1), (8, 2)].map(|tiling| AttentionGrouped {
                activation,
                norm,
                storage,
                cache_storage,
                gates_storage,
                more_storage,
                ..of(3, (64, 64, 64, 64), tiling)
            }));
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let op = AttentionGrouped {
            tokens: 2,
            most_tokens: 2,
            n_sequence: 1,
            entries: 2,
            partials: 4,
            most_partials: 4,
            n_head: 3,
            widths: Widths { d_latent: 8, d_nope: 6, d_rope: 4, d_value: 7 },
            tiling: Tiling { groups: 4, span: 1 },
            table: 0,
            list_words: 99,
            cache_rows: 20,
            rope_byte: 320,
            statistics_byte: 640,
            resident: 0,
            gates_storage: Storage::F16,
            more: 5,
            more_storage: Storage::F32,
            first_group: 0,
            groups: 5,
            pass_index: 0,
            passes: 1,
            activation: Activation::Identity,
            norm: GateNorm::LayerNorm,
            scale: 1.0,
            expected_groups: 10,
            expected_positions: 40,
            cache_storage: Storage::F16,
            storage: Storage::F16,
        };
        // 2 query tokens that meet 5 groups and 20 positions each: 10 · 3 · (6 + 7) · 8 and 40 · 3 · (2·8 + 4).
        // In: q 2·3·10·4, W 39·8·2, γ and β 2·39·2, 5 gate rows 39·4, 5 headers 32, 20 rows of 12·2 + 8 + 4.
        // Out: 4·3·(7·4 + 8).
        let bytes = 240 + 624 + 156 + 5 * 156 + 160 + 20 * 36 + 432;
        vec![(op, Cost { flops: 2 * (10 * 3 * 13 * 8 + 40 * 3 * 20), bytes })]
    }
}

#[cfg(all(test, feature = "check"))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::adapter::Tuning;
    use crate::error::KernelError;
    use crate::sample::Sampled as _;

    #[test]
    fn widths_and_tilings_that_no_device_holds_are_refused() {
        let context = PlanContext::webgpu_defaults(AdapterClass::Software);
        let most = u32::MAX;
        let wide = Widths { d_latent: most, d_nope: most, d_rope: most, d_value: most };
        assert!(matches!(tiling(&context, wide), Err(Error::Limit { .. })));
        assert_eq!(softmax_word(most, most, most), u64::MAX);
        let of = |groups, span| AttentionGrouped { tiling: Tiling { groups, span }, ..AttentionGrouped::samples()[0] };
        let plan = |groups, span| WORKGROUP.plan(&of(groups, span), &context, Tuning::Auto);
        plan(4, 4).unwrap();
        for (groups, span) in [(0, 1), (1, 0), (5, 1), (most, most)] {
            assert!(matches!(plan(groups, span), Err(Error::Kernel(KernelError::Problem { .. }))), "{groups} {span}");
        }
    }
}

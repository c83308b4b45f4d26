//! Attention of up to 16 queries per sequence over the cached latents themselves, split over the cache.

use super::attention_decode::check_split;
#[cfg(feature = "check")]
use super::attention_decode::{SPLIT, SPLITS};
use crate::adapter::{AdapterClass, Cooperative, PlanContext};
use crate::cost::{Cost, times};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_nonzero};
use crate::storage::{Storage, product, words};

crate::params! {
    /// Uniform parameters, as in the shaders.
    pub struct Params {
        n_head: u32, d_latent: u32, d_nope: u32, d_rope: u32, n_sequence: u32, latent_loads: u32, rope_loads: u32,
        scale: f32, tiles_x: u32, tiles_y: u32, tiles_z: u32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[tokens, n_head, d_latent]` f32: `W_K[h]ᵀ q_C[h]`.
        absorbed: Read,
        /// `[tokens, n_head, d_nope + d_rope]` f32, rotated.
        q: Read,
        /// `[cache_rows, pitch of d_latent]` in `storage`.
        latent_cache: Read,
        /// `[cache_rows, pitch of d_rope]` in `storage`; not bound without a rotary key.
        rope_cache: Read,
        /// `[n_sequence]` [`super::attention_decode::DecodeSequence`].
        sequences: Read,
        /// `[partials, n_head, d_latent]` f32, written.
        partial_values: Write,
        /// `[partials, n_head, 2]` f32 (m, l), written.
        partial_softmax: Write,
    }
}

/// Attention over the whole cache of every sequence of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionAbsorbed {
    /// Query tokens.
    pub tokens: u32,
    /// Entries of the sequence table.
    pub n_sequence: u32,
    /// Most query tokens per sequence.
    pub most_tokens: u32,
    /// Cache rows per workgroup, one of [`super::attention_decode::SPLITS`].
    pub split: u32,
    /// Splits of all sequences: the step's cache rows, padding included, over `split`.
    pub splits: u32,
    /// Partial results: splits times query tokens, summed over the sequences.
    pub partials: u32,
    /// Query heads.
    pub n_head: u32,
    /// Width of a latent.
    pub d_latent: u32,
    /// Width of the content part of `q`; the rotary part follows it.
    pub d_nope: u32,
    /// Width of the rotary part.
    pub d_rope: u32,
    /// Cache rows.
    pub cache_rows: u32,
    /// Factor on the scores, `AttentionConfig::scale`.
    pub scale: f32,
    /// Storage of the layer's weights: matrices of halves are for layers of halves alone.
    pub weights: Storage,
    /// Storage of the cache.
    pub storage: Storage,
}

/// Workgroups per split, for [`split_length`](super::attention_decode::split_length): every four heads have one, some variants
/// and settings let more heads share it.
pub fn workgroups(n_head: u32) -> u32 {
    n_head.div_ceil(4)
}

impl AttentionAbsorbed {
    /// Whether queries begin on 16-byte boundaries, as cache rows do.
    pub fn aligned(&self) -> bool {
        [self.d_latent, self.d_nope, self.d_rope].iter().all(|width| width.is_multiple_of(4))
    }

    fn check_aligned(&self) -> Result<(), String> {
        if self.aligned() {
            return Ok(());
        }
        let AttentionAbsorbed { d_latent, d_nope, d_rope, .. } = self;
        Err(format!("d_latent {d_latent}, d_nope {d_nope} and d_rope {d_rope} must be multiples of 4"))
    }

    /// A draft with `heads` heads per workgroup.
    fn draft(&self, workgroup_size: u32, heads: u32) -> Draft {
        let grid = Grid::Tiled { size: [self.splits, self.n_head, self.most_tokens], tile: [1, heads, 1] };
        Draft::new(workgroup_size, grid).with([("STORAGE_F16", self.storage.constant())]).with([("SPLIT", self.split)])
    }
}

impl Op for AttentionAbsorbed {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "attention_absorbed";
    const VARIANTS: &'static [Variant<Self>] = &[COOPERATIVE, COOPERATIVE_8, SUBGROUP, STREAM, PLAIN];

    fn widths(&self) -> [(&'static str, u32); 4] {
        [("d_nope", self.d_nope), ("d_rope", self.d_rope), ("d_latent", self.d_latent), ("", 0)]
    }

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("n_head", self.n_head), ("d_latent", self.d_latent), ("n_sequence", self.n_sequence)])?;
        check_split(self.split)
    }

    fn params(&self, plan: &Plan) -> Params {
        let [tiles_x, tiles_y, tiles_z] = plan.tiles;
        Params {
            n_head: self.n_head,
            d_latent: self.d_latent,
            d_nope: self.d_nope,
            d_rope: self.d_rope,
            n_sequence: self.n_sequence,
            latent_loads: self.storage.row_loads(self.d_latent),
            rope_loads: self.storage.row_loads(self.d_rope),
            scale: self.scale,
            tiles_x,
            tiles_y,
            tiles_z,
        }
    }

    fn bytes(&self) -> Args<u64> {
        let cache = |width: u32| self.storage.sized(product(&[self.cache_rows, self.storage.row_pitch(width)]));
        Args {
            absorbed: words(product(&[self.tokens, self.n_head, self.d_latent])),
            q: words(product(&[self.tokens, self.n_head, self.d_nope + self.d_rope])),
            latent_cache: cache(self.d_latent),
            rope_cache: cache(self.d_rope),
            sequences: words(product(&[self.n_sequence, 8])),
            partial_values: words(product(&[self.partials, self.n_head, self.d_latent])),
            partial_softmax: words(product(&[self.partials, self.n_head, 2])),
        }
    }

    fn cost(&self) -> Cost {
        let AttentionAbsorbed { tokens, splits, n_head, d_latent, d_rope, storage, .. } = *self;
        let rows = splits.saturating_mul(self.split).min(self.cache_rows);
        let met = rows.saturating_mul(self.most_tokens);
        Cost::of(
            &[times(4, &[met, n_head, d_latent]), times(2, &[met, n_head, d_rope])],
            &[
                times(4, &[tokens, n_head, d_latent]),
                times(4, &[tokens, n_head, d_rope]),
                times(storage.bytes(), &[rows, d_latent]),
                times(storage.bytes(), &[rows, d_rope]),
                times(32, &[self.n_sequence]),
                times(4, &[self.partials, n_head, d_latent]),
                times(8, &[self.partials, n_head]),
            ],
        )
    }
}

/// Through workgroup memory, any widths. HEADS: heads per workgroup.
pub(crate) const PLAIN: Variant<AttentionAbsorbed> = {
    const TUNINGS: &[u32] = &[4, 8];
    /// 16-byte loads per key whose query elements are staged at once.
    const CHUNK: u32 = 8;
    Variant::<AttentionAbsorbed>::new(
        ("attention_absorbed", include_str!("../../shaders/attention_absorbed.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            let (heads, workgroup) = (TUNINGS[setting], op.split / 4);
            Ok(op
                .draft(workgroup, heads)
                .with([("HEADS", heads), ("CHUNK", CHUNK)])
                .bytes(4 * heads * (8 * CHUNK + op.split + workgroup)))
        },
        |_, _, plan| hold(&[(plan.tile() == [1, plan.value("HEADS"), 1], "a workgroup has a split of HEADS heads")]),
    )
    // Eight heads per workgroup halve the reads of a cache row, unless most of them are past the last head.
    .auto(|op, _| usize::from((op.n_head - 1) % 8 >= 4))
};

/// One subgroup per workgroup, no barriers: for adapters without fast workgroup memory. Tuning: most lanes per workgroup.
pub(crate) const SUBGROUP: Variant<AttentionAbsorbed> = {
    const TUNINGS: &[u32] = &[16, 8];
    /// Heads per workgroup.
    const HEADS: u32 = 8;
    Variant::<AttentionAbsorbed>::new(
        ("attention_absorbed_subgroup", include_str!("../../shaders/attention_absorbed_subgroup.wgsl")),
        TUNINGS.len(),
        |op, context, setting| {
            op.check_aligned()?;
            let lanes = context.lanes(TUNINGS[setting]);
            Ok(op.draft(lanes, HEADS).with([("LANES", lanes)]).bytes(4 * HEADS * op.split))
        },
        |_, _, plan| {
            hold(&[
                (plan.value("LANES").is_power_of_two(), "lanes are a power of two"),
                (plan.tile() == [1, 8, 1], "a workgroup has a split of 8 heads"),
            ])
        },
    )
    .subgroups(4)
    .preferred(|op, context| op.aligned() && context.class == AdapterClass::Software && wide_enough(context))
};

/// In software, shuffles in subgroups of 4 save less than their loads cost.
pub(super) fn wide_enough(context: &PlanContext) -> bool {
    context.class != AdapterClass::Software || context.subgroup_min_size >= 8
}

/// Heads per team of [`STREAM`].
const STREAM_HEADS: u32 = 4;

/// In registers, each cache row read once: for GPUs with subgroups. Tuning: most teams per workgroup; a team shares a cache row.
pub(crate) const STREAM: Variant<AttentionAbsorbed> = {
    const TUNINGS: &[u32] = &[4, 1, 8];
    /// Most lanes per team.
    const MOST_LANES: u32 = 32;
    /// Part of a cache row that a lane holds: 16-byte loads of the latent, words of the rotary key.
    const MOST_LOADS: u32 = 4;
    const MOST_WORDS: u32 = 16;
    /// Below this many teams, one team per workgroup: larger workgroups would leave cores of a GPU idle.
    const FEW: u32 = 512;
    Variant::<AttentionAbsorbed>::new(
        ("attention_absorbed_stream", include_str!("../../shaders/attention_absorbed_stream.wgsl")),
        TUNINGS.len(),
        |op, context, setting| {
            op.check_aligned()?;
            let AttentionAbsorbed { d_latent, d_rope, storage, .. } = *op;
            let teams = TUNINGS[setting].min(op.n_head.div_ceil(STREAM_HEADS));
            // No more lanes than a cache row has loads.
            let row_loads = storage.row_loads(d_latent);
            let lanes = context.lanes(MOST_LANES).min(row_loads.next_power_of_two().max(4));
            let loads = row_loads.div_ceil(lanes);
            let rope_words = (d_rope / if storage == Storage::F16 { 2 } else { 1 }).div_ceil(lanes);
            // Three loads of halves on 32 lanes are more than AMD's compiler keeps in registers.
            let spilled = lanes == MOST_LANES && storage == Storage::F16 && loads > MOST_LOADS / 2;
            if spilled || loads > MOST_LOADS || rope_words > MOST_WORDS {
                return Err(format!("{lanes} lanes do not hold a row of d_latent {d_latent} and d_rope {d_rope}"));
            }
            Ok(op.draft(lanes * teams, STREAM_HEADS * teams).with([
                ("LANES", lanes),
                ("TEAMS", teams),
                ("LOADS", loads),
                ("ROPE", rope_words),
            ]))
        },
        |_, _, plan| {
            let lanes = plan.value("LANES");
            hold(&[
                (lanes.is_power_of_two() && lanes >= 4, "a team is a power of two of four lanes and more"),
                ((1..=4).contains(&plan.value("LOADS")), "a lane keeps one to four loads of a latent"),
                (plan.value("ROPE") <= 16, "a lane keeps up to 16 words of a rotary key"),
                (plan.tile() == [1, 4 * plan.value("TEAMS"), 1], "a team has a split of 4 heads"),
            ])
        },
    )
    .subgroups(4)
    .auto(|op, _| {
        let groups = op.splits.saturating_mul(op.most_tokens).saturating_mul(op.n_head.div_ceil(STREAM_HEADS));
        usize::from(groups < FEW)
    })
    .preferred(|op, context| op.aligned() && context.class != AdapterClass::Software)
};

/// By cooperative matrices of 16 × 16: for layers of halves, more heads than a team of [`STREAM`] has.
///
/// Queries and weights are rounded to f16, sums and the softmax are f32. A score is off by about 2⁻¹¹ of its terms, a weight by
/// 2⁻¹¹ of itself. Tuning: (matrices of heads, of cache rows at a time, subgroups).
pub(crate) const COOPERATIVE: Variant<AttentionAbsorbed> = Variant::<AttentionAbsorbed>::new(
    ("attention_absorbed_cooperative", include_str!("../../shaders/attention_absorbed_cooperative.wgsl")),
    NARROW,
    |op, context, setting| by_matrices(op, 16, context, setting),
    |_, context, plan| whole_matrices(16, context, plan),
)
.cooperative(Cooperative::BY_16)
.preferred(halves_of_many_heads);

/// The same with matrices of 8 × 8: Apple's GPUs have these. Two of heads share a workgroup where there are as many.
pub(crate) const COOPERATIVE_8: Variant<AttentionAbsorbed> = Variant::<AttentionAbsorbed>::new(
    ("attention_absorbed_cooperative_8", include_str!("../../shaders/attention_absorbed_cooperative_8.wgsl")),
    MATRICES.len(),
    |op, context, setting| by_matrices(op, 8, context, setting),
    |_, context, plan| whole_matrices(8, context, plan),
)
.cooperative(Cooperative::BY_8)
.auto(|op, _| if op.n_head > 8 { NARROW } else { 0 })
.preferred(halves_of_many_heads);

/// (matrices of heads, of cache rows at a time, subgroups). The last two hold the widest rows.
const MATRICES: &[(u32, u32, u32)] = &[(1, 2, 8), (1, 2, 4), (1, 1, 4), (1, 1, 8), (2, 2, 16)];

/// From this setting on they are for matrices of 8 × 8 alone: 32 heads of 512 + 64 would take 79 KiB.
const NARROW: usize = 4;

/// Most matrices of queries that a subgroup keeps in registers: of 16 × 16, AMD's compiler spills more than five.
const fn most_kept(side: u32) -> u32 {
    if side == 16 { 5 } else { 9 }
}

/// Most matrices of value columns.
const MOST_COLUMNS: u32 = 8;

/// The draft of a setting, or of the first behind it that holds the widths.
fn by_matrices(op: &AttentionAbsorbed, side: u32, context: &PlanContext, setting: usize) -> Result<Draft, String> {
    op.check_aligned()?;
    if op.storage != Storage::F16 {
        return Err("the cache must be stored in f16".to_owned());
    }
    let [latent, rope] = [op.d_latent, op.d_rope].map(|width| width.next_multiple_of(side));
    // Matrices of queries that a subgroup keeps, and of columns.
    let held = |(of_heads, blocks, teams): (u32, u32, u32)| {
        ((latent + rope).div_ceil(side).div_ceil(teams / blocks), (latent / side).div_ceil(teams / of_heads))
    };
    let holds = |&of: &(u32, u32, u32)| held(of).0 <= most_kept(side) && held(of).1 <= MOST_COLUMNS;
    let settings = if side == 16 { &MATRICES[..NARROW] } else { MATRICES };
    let Some(&(of_heads, blocks, teams)) = settings[setting..].iter().find(|of| holds(of)) else {
        let AttentionAbsorbed { d_latent, d_rope, .. } = op;
        return Err(format!("8 subgroups do not hold a row of d_latent {d_latent} and d_rope {d_rope}"));
    };
    let (heads, tile, shares) = (of_heads * side, blocks * side, teams / blocks);
    let (kept, columns) = held((of_heads, blocks, teams));
    // Four lanes per head at least.
    let workgroup = (teams * context.widest_subgroup()).max(4 * heads);
    let lanes = context.lanes(tile.min(workgroup / heads));
    let pitch = shares * kept * side + 8;
    let grid = Grid::Tiled { size: [op.splits, op.n_head, op.most_tokens], tile: [1, heads, 1] };
    Ok(Draft::new(workgroup, grid)
        .with([("WORKGROUP", workgroup), ("HEADS", heads), ("TEAMS", teams), ("TILE", tile), ("LANES", lanes)])
        .with([("LATENT", latent), ("ROPE", rope), ("KEPT", kept), ("COLUMNS", columns), ("SPLIT", op.split)])
        // A tile, scores, weights and factors, 32 bytes more.
        .bytes(2 * tile * pitch + 4 * shares * heads * (tile + 4) + 2 * heads * (tile + 8) + 4 * heads + 32))
}

fn whole_matrices(side: u64, context: &PlanContext, plan: &Plan) -> Result<(), &'static str> {
    let [workgroup, heads, teams, tile, lanes, latent, rope, kept, columns] =
        ["WORKGROUP", "HEADS", "TEAMS", "TILE", "LANES", "LATENT", "ROPE", "KEPT", "COLUMNS"]
            .map(|name| plan.value(name));
    let (shares, owners) = (teams * side / tile, teams * side / heads);
    hold(&[
        (plan.tile() == [1, heads, 1], "a workgroup has a split of its heads"),
        (
            heads.is_multiple_of(side) && tile.is_multiple_of(heads) && teams.is_multiple_of(heads / side),
            "heads are whole matrices, of as many subgroups each, and their queries are staged as rows",
        ),
        (workgroup >= teams * u64::from(context.widest_subgroup()), "a workgroup has a whole subgroup for every team"),
        (
            tile.is_multiple_of(side) && teams.is_multiple_of(tile / side),
            "the teams of a block of rows share its scores",
        ),
        (plan.value("SPLIT").is_multiple_of(tile), "a split is whole tiles"),
        (lanes.is_power_of_two() && lanes * heads <= workgroup, "every head has its lanes"),
        (lanes == u64::from(context.lanes(lanes as u32)), "the lanes of a head are of one subgroup"),
        (latent.is_multiple_of(side) && rope.is_multiple_of(side), "widths are whole matrices"),
        (
            (1..=u64::from(most_kept(side as u32))).contains(&kept),
            "a subgroup keeps one to five or nine matrices of queries",
        ),
        (shares * kept * side >= latent + rope, "the queries of all shares are whole"),
        ((1..=8).contains(&columns) && owners * columns * side >= latent, "one to eight matrices of columns are owned"),
    ])
}

/// Matrices round queries and weights: for f16 weights and caches. Software gains nothing by them.
fn halves_of_many_heads(op: &AttentionAbsorbed, context: &PlanContext) -> bool {
    let halves = op.weights == Storage::F16 && op.storage == Storage::F16;
    halves && op.aligned() && op.n_head > STREAM_HEADS && context.class != AdapterClass::Software
}

crate::vary!(AttentionAbsorbed {
    tokens,
    n_sequence,
    most_tokens,
    split,
    splits,
    partials,
    n_head,
    d_latent,
    d_nope,
    d_rope,
    cache_rows,
    scale,
    weights,
    storage
});

#[cfg(feature = "check")]
impl crate::sample::Sampled for AttentionAbsorbed {
    fn samples() -> Vec<Self> {
        let mut all = Vec::new();
        let widths =
            [(7, 3, 2), (4, 8, 0), (32, 8, 32), (36, 8, 4), (64, 8, 64), (512, 8, 64), (576, 8, 0), (264, 8, 24)];
        for (n_head, splits) in
            crate::sample::HEADS.into_iter().flat_map(|n_head| [0, 1, 3].map(|splits| (n_head, splits)))
        {
            for storage in Storage::ALL {
                let split = SPLITS[n_head as usize % SPLITS.len()];
                let splits = splits * (SPLIT / split);
                all.extend(widths.map(|(d_latent, d_nope, d_rope)| AttentionAbsorbed {
                    tokens: 1,
                    n_sequence: 1,
                    most_tokens: 1,
                    split,
                    splits,
                    partials: splits,
                    n_head,
                    d_latent,
                    d_nope,
                    d_rope,
                    cache_rows: splits * split,
                    scale: 1.0,
                    weights: storage,
                    storage,
                }));
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let op = AttentionAbsorbed {
            tokens: 1,
            n_sequence: 1,
            most_tokens: 1,
            split: 256,
            splits: 2,
            partials: 2,
            n_head: 3,
            d_latent: 8,
            d_nope: 6,
            d_rope: 4,
            cache_rows: 300,
            scale: 1.0,
            weights: Storage::F16,
            storage: Storage::F16,
        };
        // 2 splits of 256 rows, but only 300 rows of cache: 300 · 3 heads · (2·8 + 4) multiply-adds.
        // In: absorbed 3·8·4, q_R 3·4·4, latents 300·8·2, keys 300·4·2, table 32. Out: 2·3·(8·4 + 8).
        vec![(op, Cost { flops: 2 * 300 * 3 * 20, bytes: 96 + 48 + 4800 + 2400 + 32 + 240 })]
    }
}

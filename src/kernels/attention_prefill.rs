//! Causal attention of many queries over a tile of rebuilt keys and values, with a running softmax.
//!
//! Every variant has the same meaning, query tiles and state.

use bytemuck::{Pod, Zeroable};

use super::attention_absorbed::wide_enough;
use super::attention_decode::check_groups;
use crate::adapter::{AdapterClass, Cooperative, PlanContext};
use crate::cost::{Cost, times};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_multiples, check_nonzero, flag};
use crate::storage::{Storage, product, words};

/// (ROWS, CHUNK, VALUE_ROWS) of the kernel that stages tiles: 8 lanes share 4 queries, ROWS times, which is the query tile.
const TUNINGS: &[(u32, u32, u32)] = &[(8, 8, 16), (16, 4, 8), (4, 8, 8)];

/// Lanes that share a row of 4 queries there.
const LANES: u32 = 8;

/// Most queries of a [`QueryTile`], for each setting of the kernel that stages tiles.
pub const QUERY_TILES: [u32; 3] = [32, 64, 16];

/// Fewest keys per iteration of any variant.
const LEAST_KEYS: u32 = 16;

/// Value columns per workgroup.
const SLICE: u32 = 128;

crate::params! {
    /// Uniform parameters, as in the shaders.
    pub struct Params {
        n_head: u32, n_kv_head: u32, d_nope: u32, d_rope: u32, d_value: u32, kv_first: u32, kv_rows: u32, rope_pitch: u32,
        scale: f32, first: u32, last: u32, tiles_x: u32, tiles_y: u32, tiles_z: u32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[tokens, n_head, d_nope + d_rope]` f32, rotated.
        q: Read,
        /// `[kv_rows, n_kv_head, d_nope + d_value]` in `kv`: gated and normed where the model says so.
        kv: Read,
        /// `[cache_rows, pitch of d_rope]` in `storage`; not bound without a rotary key.
        rope_cache: Read,
        /// `[query_tiles]` [`QueryTile`].
        queries: Read,
        /// `[n_sequence]` [`super::cache_read::SequenceRow`].
        sequences: Read,
        /// `[tokens, n_head, d_value]` f32: the running sums, normalised by the last tile.
        values: Write,
        /// `[tokens, n_head, slices, 2]` f32, of [`slices`]: running maximum and sum. lse = m + ln l.
        softmax: Write,
    }
}

/// Consecutive queries of one sequence, at most [`AttentionPrefill::tile_q`] of them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct QueryTile {
    /// First query, in the step's numbering of new tokens.
    pub first_token: u32,
    /// Queries; at least 1.
    pub count: u32,
    /// Position of the first query in its sequence.
    pub position: u32,
    /// Entry of the sequence table.
    pub sequence: u32,
}

/// Attention of every query over one key tile.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionPrefill {
    /// Query tokens.
    pub tokens: u32,
    /// Entries of the query table.
    pub query_tiles: u32,
    /// Most queries per entry, one of [`QUERY_TILES`]: [`tile_q`] for a step.
    pub tile_q: u32,
    /// Entries of the sequence table.
    pub n_sequence: u32,
    /// Query heads.
    pub n_head: u32,
    /// Heads of keys and values; divides `n_head`. Query head h reads head `h / (n_head / n_kv_head)`.
    pub n_kv_head: u32,
    /// Content part of query and key; a multiple of 4, as `d_rope` and `d_value`.
    pub d_nope: u32,
    /// Rotary part.
    pub d_rope: u32,
    /// Value width.
    pub d_value: u32,
    /// First row of the key tile in the step's numbering.
    pub kv_first: u32,
    /// Rows of the key tile.
    pub kv_rows: u32,
    /// Cache rows of the rope cache.
    pub cache_rows: u32,
    /// Start from the empty state: the first key tile.
    pub first: bool,
    /// Normalise: the last key tile.
    pub last: bool,
    /// Factor on the scores, `AttentionConfig::scale`.
    pub scale: f32,
    /// Storage of the layer's weights: cooperative matrices round keys and values, so they need f16 weights.
    pub weights: Storage,
    /// Storage of the rope cache.
    pub storage: Storage,
    /// Storage of keys and values; of halves `d_nope` and `d_value` are multiples of 8, so that heads begin at whole 16-byte
    /// loads.
    pub kv: Storage,
}

/// Most queries of a [`QueryTile`] on a device.
pub fn tile_q(context: &PlanContext) -> u32 {
    let wide = TUNINGS[1].0 * LANES <= context.limits.max_compute_invocations_per_workgroup;
    let auto = usize::from(context.class == AdapterClass::Discrete && wide);
    // Planning refuses a measured setting that does not exist.
    QUERY_TILES.get(context.auto("attention_prefill", auto)).copied().unwrap_or(QUERY_TILES[auto])
}

/// Slices of the value width, each with its own (m, l) in the softmax state.
pub fn slices(d_value: u32) -> u32 {
    d_value.div_ceil(SLICE)
}

impl AttentionPrefill {
    /// A draft with `parts` workgroups per query tile.
    fn draft(&self, workgroup_size: u32, parts: u32) -> Draft {
        let size = [self.query_tiles.saturating_mul(parts), self.n_head, self.d_value];
        Draft::new(workgroup_size, Grid::Tiled { size, tile: [1, 1, SLICE] }).walks("kv_rows", self.kv_rows, LEAST_KEYS)
    }
}

impl Op for AttentionPrefill {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "attention_prefill";
    const VARIANTS: &'static [Variant<Self>] = &[COOPERATIVE, COOPERATIVE_8, SUBGROUP, TILES];

    fn widths(&self) -> [(&'static str, u32); 4] {
        [("d_nope", self.d_nope), ("d_rope", self.d_rope), ("d_value", self.d_value), ("", 0)]
    }

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("n_head", self.n_head), ("d_value", self.d_value), ("n_sequence", self.n_sequence)])?;
        check_groups(self.n_head, self.n_kv_head)?;
        check_multiples(4, &[("d_rope", self.d_rope)])?;
        check_multiples(self.kv.of_load(), &[("d_nope", self.d_nope), ("d_value", self.d_value)])?;
        if self.d_nope == 0 && self.d_rope == 0 {
            return Err("d_nope and d_rope are both 0".to_owned());
        }
        if !QUERY_TILES.contains(&self.tile_q) {
            return Err(format!("tile_q is {}, must be one of {QUERY_TILES:?}", self.tile_q));
        }
        Ok(())
    }

    fn params(&self, plan: &Plan) -> Params {
        let [tiles_x, tiles_y, tiles_z] = plan.tiles;
        Params {
            n_head: self.n_head,
            n_kv_head: self.n_kv_head,
            d_nope: self.d_nope,
            d_rope: self.d_rope,
            d_value: self.d_value,
            kv_first: self.kv_first,
            kv_rows: self.kv_rows,
            rope_pitch: self.storage.row_pitch(self.d_rope),
            scale: self.scale,
            first: self.first.into(),
            last: self.last.into(),
            tiles_x,
            tiles_y,
            tiles_z,
        }
    }

    fn bytes(&self) -> Args<u64> {
        let rope = product(&[self.cache_rows, self.storage.row_pitch(self.d_rope)]);
        Args {
            q: words(product(&[self.tokens, self.n_head, self.d_nope + self.d_rope])),
            kv: self.kv.sized(product(&[self.kv_rows, self.n_kv_head, self.d_nope + self.d_value])),
            rope_cache: self.storage.sized(rope),
            queries: words(product(&[self.query_tiles, 4])),
            sequences: words(product(&[self.n_sequence, 4])),
            values: words(product(&[self.tokens, self.n_head, self.d_value])),
            softmax: words(product(&[self.tokens, self.n_head, slices(self.d_value), 2])),
        }
    }

    fn cost(&self) -> Cost {
        let AttentionPrefill { tokens, n_head, n_kv_head, d_nope, d_rope, d_value, kv_rows, storage, kv, .. } = *self;
        // Every tile writes the state, and all but the first read it. One (m, l) per query and head: a schedule that splits
        // the value width keeps more.
        let state = if self.first { 1 } else { 2 };
        Cost::of(
            &[
                times(2, &[tokens, kv_rows, n_head, d_nope]),
                times(2, &[tokens, kv_rows, n_head, d_rope]),
                times(2, &[tokens, kv_rows, n_head, d_value]),
            ],
            &[
                times(4, &[tokens, n_head, d_nope]),
                times(4, &[tokens, n_head, d_rope]),
                times(kv.bytes(), &[kv_rows, n_kv_head, d_nope]),
                times(kv.bytes(), &[kv_rows, n_kv_head, d_value]),
                times(storage.bytes(), &[kv_rows.min(self.cache_rows), d_rope]),
                times(16, &[self.query_tiles]),
                times(16, &[self.n_sequence]),
                times(4 * state, &[tokens, n_head, d_value]),
                times(8 * state, &[tokens, n_head]),
            ],
        )
    }
}

/// Tiles of queries and keys through workgroup memory, 16 bytes at a time.
pub(crate) const TILES: Variant<AttentionPrefill> = {
    /// Keys per block.
    const TILE_KV: u32 = 32;
    Variant::<AttentionPrefill>::new(
        ("attention_prefill", include_str!("../../shaders/attention_prefill.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            let (rows, chunk, value_rows) = TUNINGS[setting];
            if op.tile_q != QUERY_TILES[setting] {
                return Err(format!("this setting has query tiles of {}, not of {}", QUERY_TILES[setting], op.tile_q));
            }
            let columns = op.d_value.min(SLICE).div_ceil(LANES * 4);
            let staged = (rows * 4 + TILE_KV) * (chunk + 1) + TILE_KV * (rows + 1);
            Ok(op
                .draft(rows * LANES, 1)
                .with([("STORAGE_F16", op.storage.constant()), ("KV_F16", op.kv.constant())])
                .with([("ROWS", rows), ("CHUNK", chunk), ("VALUE_ROWS", value_rows), ("COLUMNS", columns)])
                .bytes(16 * staged))
        },
        |op, _, plan| {
            let [rows, chunk, value_rows, columns] =
                ["ROWS", "CHUNK", "VALUE_ROWS", "COLUMNS"].map(|name| plan.value(name));
            let stage = (4 * rows + 32) * (chunk + 1);
            hold(&[
                (4 * rows == u64::from(op.tile_q), "a workgroup has a whole query tile"),
                ((1..=4).contains(&columns), "a lane has one to four vectors of value columns"),
                (32u64.is_multiple_of(value_rows), "a block of keys is whole runs of values"),
                (value_rows * 8 * columns <= stage, "values are staged where queries and keys were"),
            ])
        },
    )
    .auto(|op, _| QUERY_TILES.iter().position(|&tile| tile == op.tile_q).unwrap_or(0))
};

/// Teams of lanes within subgroups. (whether queries and keys go through workgroup memory, most teams per workgroup).
pub(crate) const SUBGROUP: Variant<AttentionPrefill> = {
    const TUNINGS: &[(bool, u32)] = &[(false, 1), (true, 8), (true, 4)];
    /// Queries per team.
    const QUERIES: u32 = 8;
    /// vec4s staged at once.
    const CHUNK: u32 = 4;
    /// Most lanes per team: with 16, 128 value columns are two vec4s per lane.
    const MOST_LANES: u32 = 16;
    Variant::<AttentionPrefill>::new(
        ("attention_prefill_subgroup", include_str!("../../shaders/attention_prefill_subgroup.wgsl")),
        TUNINGS.len(),
        |op, context, setting| {
            if op.kv != Storage::F32 {
                return Err("keys and values must be stored in f32".to_owned());
            }
            let (staged, most_teams) = TUNINGS[setting];
            let lanes = context.lanes(MOST_LANES);
            let tile_teams = op.tile_q.div_ceil(QUERIES);
            let teams = most_teams.min(tile_teams);
            let parts = tile_teams.div_ceil(teams);
            let stage = if staged { (QUERIES * teams + 4 * lanes) * (CHUNK + 1) } else { 1 };
            let columns = op.d_value.min(SLICE).div_ceil(4 * lanes);
            Ok(op
                .draft(lanes * teams, parts)
                .with([("STORAGE_F16", op.storage.constant()), ("STAGED", flag(staged))])
                .with([("LANES", lanes), ("TEAMS", teams), ("PARTS", parts), ("COLUMNS", columns), ("CHUNK", CHUNK)])
                .bytes(16 * stage))
        },
        |op, _, plan| {
            let [lanes, teams, parts, columns] = ["LANES", "TEAMS", "PARTS", "COLUMNS"].map(|name| plan.value(name));
            hold(&[
                (lanes.is_power_of_two() && (4..=32).contains(&lanes), "a team is a power of two of 4 to 32 lanes"),
                ((1..=8).contains(&columns), "a lane has one to eight vectors of value columns"),
                (8 * teams * parts == u64::from(op.tile_q), "the teams of a tile have its queries"),
            ])
        },
    )
    .subgroups(4)
    .auto(|_, context| usize::from(context.class != AdapterClass::Software))
    .preferred(|_, context| wide_enough(context))
};

/// Fewest queries per tile, on average, for cooperative matrices.
const COOPERATIVE_QUERIES: u32 = 16;

/// By cooperative matrices of 16 × 16.
///
/// Queries, keys, values and weights are rounded to f16, sums and the softmax are f32: for f16 caches only, whose rounding is
/// as coarse. A score is off by about 2⁻¹¹ of its terms, a weight by 2⁻¹¹ of itself. Queries, keys and values beyond
/// ±65 504 become infinite, as in any f16. Tuning: (matrices of queries of a workgroup, keys at a time).
pub(crate) const COOPERATIVE: Variant<AttentionPrefill> = Variant::<AttentionPrefill>::new(
    ("attention_prefill_cooperative", include_str!("../../shaders/attention_prefill_cooperative.wgsl")),
    MATRICES.len(),
    |op, context, setting| by_matrices(op, 16, context, setting),
    |op, context, plan| whole_matrices(op, 16, context, plan),
)
.cooperative(Cooperative::BY_16)
.preferred(rounds_as_weights_do);

/// The same with matrices of 8 × 8: Apple's GPUs have these.
pub(crate) const COOPERATIVE_8: Variant<AttentionPrefill> = Variant::<AttentionPrefill>::new(
    ("attention_prefill_cooperative_8", include_str!("../../shaders/attention_prefill_cooperative_8.wgsl")),
    MATRICES.len(),
    |op, context, setting| by_matrices(op, 8, context, setting),
    |op, context, plan| whole_matrices(op, 8, context, plan),
)
.cooperative(Cooperative::BY_8)
.preferred(rounds_as_weights_do);

/// (most matrices of queries of a workgroup, keys at a time).
const MATRICES: &[(u32, u32)] = &[(4, 32), (4, 16), (2, 32), (2, 16)];

/// Most matrices of queries that a subgroup keeps in registers.
const MOST_KEPT: u32 = 8;

/// The draft of a setting.
fn by_matrices(op: &AttentionPrefill, side: u32, context: &PlanContext, setting: usize) -> Result<Draft, String> {
    if op.storage != Storage::F16 {
        return Err("the cache must be stored in f16".to_owned());
    }
    let (most, tile) = MATRICES[setting];
    // Pairs of matrices share the values that they meet; each share of a matrix's scores has a matrix of keys at least.
    let queries = op.tile_q.clamp(2 * side, most * side);
    let shares = (tile / side).min(2);
    let teams = queries / side * shares;
    let workgroup = (teams * context.widest_subgroup()).max(queries);
    let lanes = context.lanes(32).min(workgroup / queries).min(tile / 4);
    let nope = op.d_nope.next_multiple_of(8);
    let width = (nope + op.d_rope).next_multiple_of(side.max(16));
    let kept = (width / side).min(MOST_KEPT);
    let columns = op.d_value.min(SLICE).div_ceil(2 * shares * side);
    // Rows of halves: of keys and values, of weights, of queries that are not kept, of queries that will be.
    let keys = tile * (width + 8 + 2 * shares * side * columns + 8);
    let weights = queries * (tile + 8);
    let rest = width - kept * side;
    let rests = if rest == 0 { 0 } else { queries * (rest + 8) };
    let staged = (keys + weights).max(queries * (4 * side + 8)) + rests;
    Ok(op
        .draft(workgroup, op.tile_q.div_ceil(queries))
        .with([("WORKGROUP", workgroup), ("PARTS", op.tile_q.div_ceil(queries)), ("QUERIES", queries), ("TILE", tile)])
        .with([("SHARES", shares), ("LANES", lanes), ("NOPE", nope), ("WIDTH", width), ("KEPT", kept)])
        .with([("COLUMNS", f64::from(columns)), ("KV_F16", op.kv.constant())])
        // Staged halves, scores, factors and marks, 16 bytes more.
        .bytes(2 * staged + 4 * queries * (tile + 4) + 4 * (queries + tile + 4)))
}

fn whole_matrices(op: &AttentionPrefill, side: u64, context: &PlanContext, plan: &Plan) -> Result<(), &'static str> {
    let [workgroup, parts, queries, tile, shares, lanes, nope, width, kept, columns] =
        ["WORKGROUP", "PARTS", "QUERIES", "TILE", "SHARES", "LANES", "NOPE", "WIDTH", "KEPT", "COLUMNS"]
            .map(|name| plan.value(name));
    let [d_nope, d_rope, d_value] = [op.d_nope, op.d_rope, op.d_value].map(u64::from);
    hold(&[
        (plan.tile() == [1, 1, 128], "a workgroup has a slice of the value columns"),
        ((queries * parts).abs_diff(op.tile_q.into()) < queries, "the parts of a tile have its queries"),
        (queries.is_multiple_of(2 * side), "queries are whole pairs of matrices"),
        (shares > 0 && tile.is_multiple_of(shares * side), "every share has whole matrices of keys"),
        (
            workgroup >= queries / side * shares * u64::from(context.widest_subgroup()),
            "a workgroup has a whole subgroup for every team",
        ),
        (lanes.is_power_of_two() && lanes * queries <= workgroup, "every query has its lanes"),
        (lanes <= u64::from(context.lanes(32)), "the lanes of a query are of one subgroup"),
        ((4 * lanes..=32).contains(&tile), "a block has four keys for every lane"),
        (nope.is_multiple_of(8) && (d_nope..d_nope + 8).contains(&nope), "the rotary part begins at an eight"),
        (width.is_multiple_of(side) && width >= nope + d_rope, "queries and keys are whole matrices"),
        ((1..=8).contains(&kept) && kept * side <= width, "a subgroup keeps one to eight matrices of queries"),
        (
            (1..=4).contains(&columns) && 2 * shares * side * columns >= d_value.min(128),
            "one to four matrices of columns are owned",
        ),
    ])
}

fn rounds_as_weights_do(op: &AttentionPrefill, context: &PlanContext) -> bool {
    // Cooperative matrices round queries, keys and values: only for f16 weights and caches.
    let halves = op.weights == Storage::F16 && op.storage == Storage::F16;
    let many = op.tokens >= op.query_tiles.saturating_mul(COOPERATIVE_QUERIES);
    halves && many && context.class != AdapterClass::Software
}

crate::vary!(AttentionPrefill {
    tokens,
    query_tiles,
    tile_q,
    n_sequence,
    n_head,
    n_kv_head,
    d_nope,
    d_rope,
    d_value,
    kv_first,
    kv_rows,
    cache_rows,
    first,
    last,
    scale,
    weights,
    storage,
    kv
});

#[cfg(feature = "check")]
impl crate::sample::Sampled for AttentionPrefill {
    fn samples() -> Vec<Self> {
        let mut all = Vec::new();
        // Every number of value columns per lane and of slices per workgroup.
        let widths = [4, 28, 32, 36, 64, 68, 96, 100, 124, 128, 132, 256, 260].map(|d_value| (4, 8, d_value));
        for (n_head, query_tiles) in
            crate::sample::HEADS.into_iter().flat_map(|n_head| [0, 1, 5].map(|tiles| (n_head, tiles)))
        {
            for (storage, tile_q) in Storage::ALL.into_iter().flat_map(|s| QUERY_TILES.map(|tile_q| (s, tile_q))) {
                all.extend(widths.map(|(d_nope, d_rope, d_value)| AttentionPrefill {
                    tokens: query_tiles,
                    query_tiles,
                    tile_q,
                    n_sequence: 1,
                    n_head,
                    // All query heads share one, or each has its own.
                    n_kv_head: if query_tiles == 5 { 1 } else { n_head },
                    d_nope,
                    d_rope,
                    d_value,
                    kv_first: 0,
                    kv_rows: 9,
                    cache_rows: 9,
                    first: true,
                    last: true,
                    scale: 1.0,
                    weights: storage,
                    storage,
                    kv: Storage::F32,
                }));
            }
        }
        // As many matrices of queries and columns as a subgroup keeps, and more, in both storages of keys and values.
        let widths = [(16, 8, 32), (56, 24, 48), (64, 64, 128), (128, 0, 64), (128, 64, 128)];
        let alike = all.iter().filter(|op| op.storage == Storage::F16 && op.query_tiles == 5 && op.n_head == 3);
        let alike: Vec<_> = alike.filter(|op| op.d_value == 4).copied().collect();
        for kv in Storage::ALL {
            for (d_nope, d_rope, d_value) in widths {
                all.extend(alike.iter().map(|op| AttentionPrefill { d_nope, d_rope, d_value, kv, ..*op }));
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let of = |n_head, kv| AttentionPrefill {
            tokens: 4,
            query_tiles: 1,
            tile_q: QUERY_TILES[0],
            n_sequence: 1,
            n_head,
            n_kv_head: 2,
            d_nope: 3,
            d_rope: 2,
            d_value: 5,
            kv_first: 7,
            kv_rows: 7,
            cache_rows: 20,
            first: false,
            last: true,
            scale: 1.0,
            weights: Storage::F16,
            storage: Storage::F16,
            kv,
        };
        // The bound: 4 queries · 7 keys · 2 heads · (3 + 2 + 5) multiply-adds. A second tile reads its state.
        // In: q 4·2·5·4, kv 7·2·8·4, keys 7·2·2, tables 16 + 16, state 4·2·(5·4 + 8). Out: the state again.
        let flops = 2 * 4 * 7 * 2 * 10;
        vec![
            (of(2, Storage::F32), Cost { flops, bytes: 160 + 448 + 28 + 32 + 224 + 224 }),
            (of(2, Storage::F16), Cost { flops, bytes: 160 + 224 + 28 + 32 + 224 + 224 }),
            // Three times the query heads over the same keys and values.
            (of(6, Storage::F32), Cost { flops: 3 * flops, bytes: 3 * 160 + 448 + 28 + 32 + 3 * (224 + 224) }),
        ]
    }
}

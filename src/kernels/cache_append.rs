//! Writes latents and rotary keys of new tokens to their cache rows: normed, gated and rotated on the way. And makes their queries:
//! copied and rotated, or projected of a low rank.

use super::matmul::FEW_ROWS;
use crate::adapter::{AdapterClass, PlanContext};
use crate::config::{Activation, GateNorm};
use crate::cost::{Cost, times, when};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_multiples, check_nonzero, flag};
use crate::storage::{Storage, product, words};

crate::params! {
    /// Uniform parameters, as in the shaders.
    pub struct Params {
        tokens: u32, row: u32, d_latent: u32, latent_used: u32, latent_offset: u32,
        d_rope: u32, rope_offset: u32, rope_cache: u32,
        q_heads: u32, q_offset: u32, d_nope: u32,
        gamma: u32, beta: u32, kept: u32, kv_columns: u32, eps: f32, gate_eps: f32,
        rank: u32, rank_used: u32, q_gamma: u32, q_eps: f32, row_groups: u32, kv_groups: u32,
        column_tiles: u32, kv_tiles: u32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[tokens, row]` f32: latents, 0 in their padding; rotary keys; queries or their latents, likewise.
        x: Read,
        /// `[d_latent]` in `weights` each, padded with zeros: of the norm, then γ and β of the gate's norm, those that there are.
        /// `[rank]` likewise where [`LowRank`] says: of the norm of the queries' latents.
        weight: Read,
        /// `[tokens, d_latent]` f32: the projected gate before its activation. Or `[columns, d_latent]` in `weights`: `kv_b_proj`, where
        /// keys and values are [`Kept`]. Not bound without either.
        g: Read,
        /// `[tokens, d_rope / 2, 2]` f32: cos and sin of each pair; not bound where nothing is rotated.
        rotations: Read,
        /// `[tokens]` u32 cache rows, all different; [`NO_SLOT`] for tokens that are not appended here.
        slots: Read,
        /// `[n_head · (d_nope + d_rope), rank]` in `weights`, padded with zeros; bound for queries of a low rank alone.
        w: Read,
        /// `[cache_rows, pitch of d_latent]`, then at `rope_byte` `[cache_rows, pitch of d_rope]`, in `storage`, written.
        cache: Write,
        /// `[tokens, n_head, d_nope + d_rope]` f32, and what is [`Kept`]; written. Not bound without either.
        q: Write,
    }
}

/// The cache row of a token that another dispatch appends, to another part of the cache.
pub const NO_SLOT: u32 = u32::MAX;

/// Query heads to copy, or to project, and to rotate.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Queries {
    /// Heads per token, one after another; 0 for none.
    pub n_head: u32,
    /// First element of a token's row, or of its query's latent.
    pub offset: u32,
    /// Elements of a head before its rotary part.
    pub d_nope: u32,
    /// They are products with their latents.
    pub low_rank: Option<LowRank>,
}

/// Latents of queries: normed, then projected.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LowRank {
    /// Width of a query's latent, whole 16-byte loads in the weights' storage.
    pub rank: u32,
    /// Its elements without padding: those that the norm counts.
    pub used: u32,
    /// Element of `weight` where the norm's begin; a whole load.
    pub weight: u32,
    /// Added to the mean square.
    pub eps: f32,
}

/// The gate of a latent: `c ← Norm(c ⊙ act(g))`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LatentGate {
    /// Applied to `g`.
    pub activation: Activation,
    /// Applied to the product.
    pub norm: GateNorm,
    /// Added to its mean square or variance.
    pub eps: f32,
}

/// What is left of the latents as the cache has them, so rounded where it is f16: of those that no gate changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Kept {
    /// Element of `q` where it begins, behind the queries; a multiple of 4.
    pub first: u32,
    /// Width of the keys and values `[tokens, columns]` of the latents, a multiple of 4; 0 to keep the latents `[tokens, d_latent]`.
    pub columns: u32,
}

/// Most elements of the latents of four tokens, or of one, that a workgroup of keys and values stages: within WebGPU's default limit.
const MOST_STAGED: u32 = 2048;

/// Whether keys and values of the latents can be kept, and so few of them are not faster as a product of their own.
pub fn keeps_values(tokens: u32, d_latent: u32) -> bool {
    tokens <= FEW_ROWS && staged(tokens, d_latent) <= MOST_STAGED
}

/// Elements that a workgroup of keys and values stages.
fn staged(tokens: u32, d_latent: u32) -> u32 {
    d_latent.saturating_mul(if tokens == 1 { 1 } else { 4 })
}

/// Tokens to append.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CacheAppend {
    /// New tokens.
    pub tokens: u32,
    /// Cache rows; the caller has checked that every slot is below it.
    pub cache_rows: u32,
    /// Elements of `x` from one token to the next. Widths, offsets and this are multiples of 4; the widths of latent and rotary
    /// key of 8 for an f16 cache.
    pub row: u32,
    /// First element of a token's latent.
    pub latent_offset: u32,
    /// Width of a latent.
    pub d_latent: u32,
    /// Elements of a latent without its padding: those that norms count.
    pub latent_used: u32,
    /// First element of a token's rotary key.
    pub rope_offset: u32,
    /// Width of the rotary key; may be 0.
    pub d_rope: u32,
    /// Rotates the pairs (2i, 2i+1) of keys and queries.
    pub rotate: bool,
    /// Queries beside latent and rotary key.
    pub queries: Queries,
    /// Latents are RMS-normed, with this added to the mean square.
    pub norm: Option<f32>,
    /// Then gated.
    pub gate: Option<LatentGate>,
    /// Something is left of the latents.
    pub kept: Option<Kept>,
    /// Byte of `cache` where the rotary keys begin, after the latents.
    pub rope_byte: u64,
    /// Storage of the norms' weights.
    pub weights: Storage,
    /// Storage of the cache.
    pub storage: Storage,
}

impl CacheAppend {
    /// Bytes of a cache row.
    fn row_bytes(&self, width: u32) -> u64 {
        self.storage.sized(self.storage.row_pitch(width).into())
    }

    /// Elements of the keys and values of a token that are kept.
    fn kv_columns(&self) -> u32 {
        self.kept.map_or(0, |kept| kept.columns)
    }

    /// Elements of the queries of a token.
    fn columns(&self) -> u64 {
        product(&[self.queries.n_head, self.head()])
    }

    /// Where `kept` begins, or the queries end.
    fn after_queries(&self) -> u64 {
        product(&[self.tokens]).saturating_mul(self.columns())
    }

    fn rotated(&self) -> bool {
        self.rotate && self.d_rope > 0
    }

    /// Workgroups of the tokens and of the heads that are copied, of the queries of 4 tokens that are projected, and of their keys and
    /// values, in workgroups of WORKGROUP, LANES and COLUMN_LANES.
    fn groups(&self, [workgroup, lanes, column_lanes]: [u64; 3]) -> [u64; 3] {
        let [rows, fours] = [lanes, column_lanes].map(|lanes| (workgroup / lanes.max(1)).max(1));
        let (copied, projected) = match self.queries.low_rank {
            Some(_) => (0, self.columns()),
            None => (product(&[self.tokens, self.queries.n_head]), 0),
        };
        let items = copied.saturating_add(self.tokens.into());
        [items.div_ceil(rows), projected.div_ceil(4 * fours), u64::from(self.kv_columns()).div_ceil(4 * fours)]
    }

    fn head(&self) -> u32 {
        self.queries.d_nope.saturating_add(self.d_rope)
    }

    /// Vectors of `d_latent` weights before γ and before β of the gate's norm, and all of them.
    fn weight_vectors(&self) -> [u32; 3] {
        let gamma = u32::from(self.norm.is_some());
        let [affine, beta] = match self.gate.map(|gate| gate.norm) {
            Some(GateNorm::LayerNorm) => [2, 1],
            Some(GateNorm::RmsNorm) => [1, 1],
            Some(GateNorm::None) | None => [0, 0],
        };
        [gamma, gamma + beta, gamma + affine]
    }
}

impl Op for CacheAppend {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "cache_append";
    const VARIANTS: &'static [Variant<Self>] = &[ROWS];

    fn widths(&self) -> [(&'static str, u32); 4] {
        let d_nope = if self.queries.n_head > 0 { self.queries.d_nope } else { 0 };
        [("d_latent", self.d_latent), ("d_rope", self.d_rope), ("d_nope", d_nope), ("", 0)]
    }

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("d_latent", self.d_latent), ("latent_used", self.latent_used)])?;
        let of_load = self.storage.of_load();
        check_multiples(of_load, &[("d_latent", self.d_latent), ("d_rope", self.d_rope)])?;
        check_multiples(4, &[("row", self.row), ("latent_offset", self.latent_offset)])?;
        check_multiples(4, &[("rope_offset", self.rope_offset), ("offset of q", self.queries.offset)])?;
        check_multiples(4, &[("d_nope", self.queries.d_nope)])?;
        if let Some(LowRank { rank, used, weight, .. }) = self.queries.low_rank {
            check_nonzero(&[("rank", rank), ("used", used)])?;
            check_multiples(self.weights.of_load(), &[("rank", rank), ("weight", weight)])?;
            if used > rank {
                return Err(format!("{used} of {rank} elements of a query's latent"));
            }
            if !(4..1 << 31).contains(&self.columns()) {
                return Err(format!("{} columns, must be at least 4 and below 2^31", self.columns()));
            }
        }
        if let Some(Kept { first, columns }) = self.kept {
            check_multiples(4, &[("first", first), ("columns", columns)])?;
            if u64::from(first) < self.after_queries() {
                return Err(format!("latents are kept from element {first} on, queries take {}", self.after_queries()));
            }
            let staged = staged(self.tokens, self.d_latent);
            if columns > 0 && (self.gate.is_some() || staged > MOST_STAGED) {
                return Err(format!("no keys and values of gated latents, or of {staged} elements over {MOST_STAGED}"));
            }
        }
        if self.latent_used > self.d_latent {
            return Err(format!("latent_used is {}, d_latent {}", self.latent_used, self.d_latent));
        }
        // A vector of weights begins at a load.
        let of_weights = if self.weight_vectors()[2] > 0 || self.kv_columns() > 0 { self.weights.of_load() } else { 4 };
        check_multiples(of_weights, &[("d_latent", self.d_latent)])?;
        let latents = product(&[self.cache_rows]).saturating_mul(self.row_bytes(self.d_latent));
        if self.rope_byte < latents || !self.rope_byte.is_multiple_of(16) {
            return Err(format!("rotary keys begin at byte {}, latents take {latents}", self.rope_byte));
        }
        Ok(())
    }

    fn params(&self, plan: &Plan) -> Params {
        let [gamma, beta, _] = self.weight_vectors();
        let settings = ["WORKGROUP", "LANES", "COLUMN_LANES"].map(|name| plan.value(name));
        let [row_groups, column_tiles, kv_tiles] = self.groups(settings);
        let of_queries = column_tiles.saturating_mul(self.tokens.div_ceil(4).into());
        let low_rank = self.queries.low_rank.unwrap_or_default();
        Params {
            tokens: self.tokens,
            row: self.row,
            d_latent: self.d_latent,
            latent_used: self.latent_used,
            latent_offset: self.latent_offset,
            d_rope: self.d_rope,
            rope_offset: self.rope_offset,
            // Within a binding, so 32 bits count the loads.
            rope_cache: (self.rope_byte / 16) as u32,
            q_heads: self.queries.n_head,
            q_offset: self.queries.offset,
            d_nope: self.queries.d_nope,
            gamma: gamma * self.d_latent,
            beta: beta * self.d_latent,
            kept: self.kept.map_or(0, |kept| kept.first),
            kv_columns: self.kv_columns(),
            eps: self.norm.unwrap_or(0.0),
            gate_eps: self.gate.map_or(0.0, |gate| gate.eps),
            rank: low_rank.rank,
            rank_used: low_rank.used,
            q_gamma: low_rank.weight,
            q_eps: low_rank.eps,
            // Of a plan, so all fit.
            row_groups: row_groups as u32,
            kv_groups: row_groups.saturating_add(of_queries) as u32,
            column_tiles: column_tiles as u32,
            kv_tiles: kv_tiles as u32,
        }
    }

    fn bytes(&self) -> Args<u64> {
        let Queries { offset, low_rank, .. } = self.queries;
        let end = |offset: u32, width: u64| {
            let before = product(&[self.tokens.saturating_sub(1), self.row]).saturating_add(offset.into());
            if self.tokens == 0 || width == 0 { 0 } else { before.saturating_add(width) }
        };
        let heads = low_rank.map_or(self.columns(), |low_rank| low_rank.rank.into());
        let x = [(self.latent_offset, self.d_latent.into()), (self.rope_offset, self.d_rope.into()), (offset, heads)];
        let x = x.map(|(offset, width)| end(offset, width)).into_iter().max().unwrap_or(0);
        let latents = |on: bool| words(if on { product(&[self.tokens, self.d_latent]) } else { 0 });
        let keys = product(&[self.cache_rows]).saturating_mul(self.row_bytes(self.d_rope));
        let norms = product(&[self.weight_vectors()[2], self.d_latent]);
        let of_queries = low_rank.map_or(0, |low_rank| u64::from(low_rank.weight) + u64::from(low_rank.rank));
        let kept = self.kept.map_or(0, |Kept { first, columns }| {
            let width = if columns > 0 { columns } else { self.d_latent };
            u64::from(first).saturating_add(product(&[self.tokens, width]))
        });
        let kv_b_proj = self.weights.sized(product(&[self.kv_columns(), self.d_latent]));
        let projection = low_rank.map_or(0, |low_rank| self.columns().saturating_mul(low_rank.rank.into()));
        Args {
            x: words(x),
            weight: self.weights.sized(norms.max(of_queries)),
            g: latents(self.gate.is_some()).max(kv_b_proj),
            rotations: words(if self.rotated() { product(&[self.tokens, self.d_rope]) } else { 0 }),
            slots: words(self.tokens.into()),
            w: self.weights.sized(projection),
            cache: self.rope_byte.saturating_add(keys),
            q: words(kept.max(self.after_queries())),
        }
    }

    fn cost(&self) -> Cost {
        let CacheAppend { tokens, d_latent, d_rope, queries, storage, .. } = *self;
        let rotated = if self.rotate { d_rope } else { 0 };
        // As in `norm` and `gate`.
        let (gated, of_token) = self.gate.map_or((0, 0), |LatentGate { activation, norm, .. }| {
            let (element, row) = match norm {
                GateNorm::LayerNorm => (7, 4),
                GateNorm::RmsNorm => (4, 3),
                GateNorm::None => (0, 0),
            };
            (activation.flops() + 1 + element, row)
        });
        let (normed, of_norm) = self.norm.map_or((0, 0), |_| (4, 3));
        let head = self.head();
        // Queries or their latents in; of a low rank, the norm of these and the product.
        let (latents, weights, read) = match queries.low_rank {
            Some(LowRank { rank, .. }) => (
                times(2, &[tokens, rank, queries.n_head, head])
                    .saturating_add(times(4, &[tokens, rank]))
                    .saturating_add(times(3, &[tokens])),
                times(self.weights.bytes(), &[rank])
                    .saturating_add(times(self.weights.bytes(), &[rank, queries.n_head, head])),
                times(4, &[tokens, rank]),
            ),
            None => (0, 0, times(4, &[tokens, queries.n_head, head])),
        };
        // The padding of a cache row is written too.
        let written = [d_latent, d_rope].map(|width| times(storage.bytes(), &[tokens, storage.row_pitch(width)]));
        Cost::of(
            &[
                times(3, &[tokens, rotated]),
                times(3, &[tokens, queries.n_head, rotated]),
                times(normed + gated, &[tokens, d_latent]),
                times(of_norm + of_token, &[tokens]),
                latents,
                times(2, &[tokens, d_latent, self.kv_columns()]),
            ],
            &[
                times(4, &[tokens, rotated]),
                times(4, &[tokens, queries.n_head, head]),
                read,
                weights,
                times(4, &[tokens, d_latent]),
                times(4, &[tokens, d_rope]),
                times(4, &[tokens]),
                times(self.weights.bytes(), &[self.weight_vectors()[2], d_latent]),
                when(self.gate.is_some(), times(4, &[tokens, d_latent])),
                match self.kept {
                    None => 0,
                    Some(Kept { columns: 0, .. }) => times(4, &[tokens, d_latent]),
                    Some(Kept { columns, .. }) => {
                        times(4, &[tokens, columns]).saturating_add(times(self.weights.bytes(), &[columns, d_latent]))
                    }
                },
                written[0],
                written[1],
            ],
        )
    }
}

/// (WORKGROUP, LANES, COLUMN_LANES): LANES invocations share a latent, or a head; COLUMN_LANES four columns of the queries.
const TUNINGS: &[(u32, u32, u32)] = &[(8, 1, 1), (64, 16, 16), (64, 64, 32)];

/// In 16-byte loads and stores.
pub(crate) const ROWS: Variant<CacheAppend> = Variant::<CacheAppend>::new(
    ("cache_append", include_str!("../../shaders/cache_append.wgsl")),
    TUNINGS.len(),
    |op, context, setting| {
        let (workgroup, lanes, column_lanes) = TUNINGS[setting];
        let rank = op.queries.low_rank.map(|low_rank| low_rank.rank);
        let (has_products, single) = (rank.is_some() || op.kv_columns() > 0, op.tokens == 1);
        let [rows, columns, kv] = op.groups([workgroup, lanes, column_lanes].map(u64::from));
        let products = columns.saturating_add(kv).saturating_mul(op.tokens.div_ceil(4).into());
        let grid = Grid::Folded { items: rows.saturating_add(products), each: 1 };
        let moments = if lanes == 1 { 1 } else { workgroup };
        let sums = if has_products && column_lanes > 1 { workgroup * if single { 2 } else { 5 } } else { 1 };
        let staged = if op.kv_columns() > 0 { staged(op.tokens, op.d_latent) / 4 } else { 1 };
        let kept = op.kept.map_or(0, |kept| if kept.columns > 0 { 2 } else { 1 });
        let gate = op.gate.unwrap_or(LatentGate { norm: GateNorm::None, ..LatentGate::default() });
        let draft = Draft::new(workgroup, grid)
            .with([("STORAGE_F16", op.weights.constant()), ("CACHE_F16", op.storage.constant())])
            .with([("RMS", flag(op.norm.is_some())), ("GATED", flag(op.gate.is_some()))])
            .with([("ACTIVATION", gate.activation as u32), ("NORM", gate.norm as u32)])
            .with([("PADDED", flag(op.latent_used < op.d_latent)), ("ROTATE", flag(op.rotate))])
            .with([("KEPT", f64::from(kept)), ("INTEGERS", flag(context.class == AdapterClass::Software))])
            .with([("LOW_RANK", flag(rank.is_some())), ("SINGLE", flag(has_products && single))])
            .with([("WORKGROUP", workgroup), ("LANES", lanes), ("COLUMN_LANES", column_lanes), ("STAGED", staged)])
            .bytes(16 * (moments + sums + staged));
        Ok(match rank {
            Some(rank) => draft.walks("rank", rank, 4 * column_lanes),
            None => draft,
        })
    },
    |_, _, plan| {
        let [workgroup, lanes, column_lanes] = ["WORKGROUP", "LANES", "COLUMN_LANES"].map(|name| plan.value(name));
        hold(&[
            (lanes.is_power_of_two() && column_lanes.is_power_of_two(), "lanes join in pairs"),
            (workgroup.is_multiple_of(lanes.max(1)), "a workgroup has whole rows"),
            (workgroup.is_multiple_of(column_lanes.max(1)), "a workgroup has whole columns"),
        ])
    },
)
.auto(setting);

/// On a CPU one invocation per row and column, without sums; on a GPU a few loads per invocation.
fn setting(op: &CacheAppend, context: &PlanContext) -> usize {
    if context.class == AdapterClass::Software {
        return 0;
    }
    let measured = op.norm.is_some() || op.gate.is_some();
    let wide_query = op.queries.low_rank.is_some_and(|low_rank| low_rank.rank >= 512);
    if measured && op.d_latent >= 256 || wide_query { 2 } else { 1 }
}

crate::vary!(Queries { n_head, offset, d_nope, low_rank });
crate::vary!(LowRank { rank, used, weight, eps });
crate::vary!(Kept { first, columns });
crate::vary!(LatentGate { activation, norm, eps });
crate::vary!(CacheAppend {
    tokens,
    cache_rows,
    row,
    latent_offset,
    d_latent,
    latent_used,
    rope_offset,
    d_rope,
    rotate,
    queries,
    norm,
    gate,
    kept,
    rope_byte,
    weights,
    storage
});

#[cfg(feature = "check")]
impl crate::sample::Sampled for CacheAppend {
    fn samples() -> Vec<Self> {
        // Without a rotary key and with one, with heads of queries and without.
        let of = |tokens: u32, (d_latent, d_rope): (u32, u32), n_head, storage: Storage| CacheAppend {
            tokens,
            cache_rows: tokens,
            row: n_head * (8 + d_rope) + d_latent + d_rope,
            latent_offset: n_head * (8 + d_rope),
            d_latent,
            latent_used: d_latent,
            rope_offset: n_head * (8 + d_rope) + d_latent,
            d_rope,
            rotate: tokens % 2 == 1,
            queries: Queries { n_head, offset: 0, d_nope: 8, low_rank: None },
            norm: None,
            gate: None,
            kept: None,
            rope_byte: u64::from(tokens) * u64::from(storage.row_pitch(d_latent)) * storage.bytes(),
            weights: Storage::F32,
            storage,
        };
        let sizes = [((8, 0), 0), ((8, 8), 0), ((8, 8), 3), ((24, 16), 0), ((24, 16), 3)];
        let stored =
            |tokens| Storage::ALL.into_iter().flat_map(move |s| sizes.map(|(w, n_head)| of(tokens, w, n_head, s)));
        let mut all: Vec<_> =
            crate::sample::ELEMENTS.into_iter().filter(|&tokens| tokens < 1 << 20).flat_map(stored).collect();
        let gates = Activation::ALL
            .into_iter()
            .flat_map(|activation| GateNorm::ALL.map(|norm| Some(LatentGate { activation, norm, eps: 1e-5 })));
        for gate in gates.chain([None]) {
            for (d_latent, norm) in [8, 256, 4096].into_iter().flat_map(|d| [(d, None), (d, Some(1e-6))]) {
                for (weights, kept) in
                    Storage::ALL.into_iter().flat_map(|s| [(s, None), (s, Some(Kept { first: 192, columns: 0 }))])
                {
                    let latent_used = if kept.is_some() { d_latent - 3 } else { d_latent };
                    let plain = of(3, (d_latent, 8), 3, weights);
                    all.push(CacheAppend { latent_used, norm, gate, kept, weights, ..plain });
                }
            }
        }
        for (tokens, weights) in [0, 1, 3, 4, 5, 8, 9].iter().flat_map(|&n| Storage::ALL.map(|storage| (n, storage))) {
            for (rank, n_head, d_nope, d_rope) in [(8, 1, 8, 0), (8, 3, 0, 8), (24, 9, 16, 8), (1536, 5, 128, 64)] {
                let low_rank = Some(LowRank { rank, used: rank - 3, weight: 256, eps: 1e-6 });
                let queries = Queries { n_head, offset: 0, d_nope, low_rank };
                let plain = of(tokens, (32, d_rope), 0, weights);
                let row = rank + 32 + d_rope;
                let (latent_offset, rope_offset, norm) = (rank, rank + 32, Some(1e-6));
                let first = tokens * n_head * (d_nope + d_rope);
                for kept in [None, Some(Kept { first, columns: 84 })] {
                    all.push(CacheAppend {
                        row,
                        latent_offset,
                        rope_offset,
                        norm,
                        rotate: true,
                        queries,
                        kept,
                        ..plain
                    });
                }
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let of = |(d_latent, d_rope), queries| CacheAppend {
            tokens: 3,
            cache_rows: 9,
            row: 24,
            latent_offset: 0,
            d_latent,
            latent_used: d_latent,
            rope_offset: 0,
            d_rope,
            rotate: true,
            queries,
            norm: None,
            gate: None,
            kept: None,
            rope_byte: 144,
            weights: Storage::F16,
            storage: Storage::F16,
        };
        let gate = LatentGate { activation: Activation::Sigmoid, norm: GateNorm::LayerNorm, eps: 1e-5 };
        let heads = Queries { n_head: 2, offset: 0, d_nope: 4, low_rank: None };
        let low_rank = Some(LowRank { rank: 8, used: 7, weight: 0, eps: 1e-6 });
        vec![
            // 3 pairs of 6. In: 3·(5 + 2)·4, cos and sin 3·2·4, slots 3·4. Out: rows of 8 and 8 halves.
            (of((5, 2), Queries::default()), Cost { flops: 18, bytes: 24 + 84 + 12 + 3 * 32 }),
            // One more pair for 2 heads per token: 6 FLOPs per pair; heads of 12 read and written.
            (of((8, 8), heads), Cost { flops: 3 * 4 * 6 + 6 * 4 * 6, bytes: 3 * (32 + 32 + 32 + 4 + 32) + 6 * 96 }),
            // RMSNorm 4 per element and 3 per token; sigmoid 3, product 1, layer_norm 7 and 4. Weights 3·8·2, g and what is kept 3·8·4.
            (
                CacheAppend {
                    norm: Some(1e-6),
                    gate: Some(gate),
                    kept: Some(Kept::default()),
                    ..of((8, 0), Queries::default())
                },
                Cost { flops: 3 * (8 * 15 + 7), bytes: 3 * (32 + 4 + 16) + 48 + 2 * 96 },
            ),
            // Heads as above, of latents of 8: 3·8·24 multiply-adds, their norm 3·(8·4 + 3). In: 3·8·4, weights 8·2 and 24·8·2.
            (
                of((8, 8), Queries { low_rank, ..heads }),
                Cost {
                    flops: 10 * 4 * 6 - 24 + 1152 + 105,
                    bytes: 3 * (32 + 32 + 32 + 4 + 32) + 6 * 48 + 96 + 16 + 384,
                },
            ),
        ]
    }
}

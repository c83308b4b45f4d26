//! Writes latents and rotary keys of new tokens to their cache rows: normed, gated and rotated on the way, and the queries beside
//! them.

use super::norm::{ROW_LANES, row_lanes, whole_rows};
use crate::adapter::AdapterClass;
use crate::config::{Activation, GateNorm};
use crate::cost::{Cost, times, when};
use crate::op::{Op, Variant};
use crate::plan::{Draft, Grid, Plan, check_multiples, check_nonzero, flag};
use crate::storage::{Storage, product, words};

crate::params! {
    /// Uniform parameters, as in the shaders.
    pub struct Params {
        tokens: u32, row: u32, d_latent: u32, latent_used: u32, latent_offset: u32,
        d_rope: u32, rope_offset: u32, rope_cache: u32,
        q_heads: u32, q_offset: u32, d_nope: u32,
        gamma: u32, beta: u32, eps: f32, gate_eps: f32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[tokens, row]` f32: latents, 0 in their padding; rotary keys; queries.
        x: Read,
        /// `[d_latent]` in `weights` each, padded with zeros: of the norm, then γ and β of the gate's norm, those that there are.
        weight: Read,
        /// `[tokens, d_latent]` f32: the projected gate before its activation; not bound without a gate.
        g: Read,
        /// `[tokens, d_rope / 2, 2]` f32: cos and sin of each pair; not bound where nothing is rotated.
        rotations: Read,
        /// `[tokens]` u32 cache rows, all different.
        slots: Read,
        /// `[cache_rows, pitch of d_latent]`, then at `rope_byte` `[cache_rows, pitch of d_rope]`, in `storage`, written.
        cache: Write,
        /// `[tokens, n_head, d_nope + d_rope]` f32, written; not bound without queries.
        q: Write,
        /// `[tokens, d_latent]` f32: the latents as cached, written; not bound unless they are kept.
        kept: Write,
    }
}

/// Query heads to copy and rotate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Queries {
    /// Heads per token, one after another; 0 for none.
    pub n_head: u32,
    /// First element of a token's row.
    pub offset: u32,
    /// Elements of a head before its rotary part.
    pub d_nope: u32,
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
    /// Latents are kept as the cache has them, so rounded where it is f16.
    pub kept: bool,
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

    fn rotated(&self) -> bool {
        self.rotate && self.d_rope > 0
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
        if self.latent_used > self.d_latent {
            return Err(format!("latent_used is {}, d_latent {}", self.latent_used, self.d_latent));
        }
        // A vector of weights begins at a load.
        let of_weights = if self.weight_vectors()[2] > 0 { self.weights.of_load() } else { 4 };
        check_multiples(of_weights, &[("d_latent", self.d_latent)])?;
        let latents = product(&[self.cache_rows]).saturating_mul(self.row_bytes(self.d_latent));
        if self.rope_byte < latents || !self.rope_byte.is_multiple_of(16) {
            return Err(format!("rotary keys begin at byte {}, latents take {latents}", self.rope_byte));
        }
        Ok(())
    }

    fn params(&self, _: &Plan) -> Params {
        let [gamma, beta, _] = self.weight_vectors();
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
            eps: self.norm.unwrap_or(0.0),
            gate_eps: self.gate.map_or(0.0, |gate| gate.eps),
        }
    }

    fn bytes(&self) -> Args<u64> {
        let Queries { n_head, offset, .. } = self.queries;
        let end = |offset: u32, width: u64| {
            let before = product(&[self.tokens.saturating_sub(1), self.row]).saturating_add(offset.into());
            if self.tokens == 0 || width == 0 { 0 } else { before.saturating_add(width) }
        };
        let heads = product(&[n_head, self.head()]);
        let x = [(self.latent_offset, self.d_latent.into()), (self.rope_offset, self.d_rope.into()), (offset, heads)];
        let x = x.map(|(offset, width)| end(offset, width)).into_iter().max().unwrap_or(0);
        let latents = |on: bool| words(if on { product(&[self.tokens, self.d_latent]) } else { 0 });
        let keys = product(&[self.cache_rows]).saturating_mul(self.row_bytes(self.d_rope));
        Args {
            x: words(x),
            weight: self.weights.sized(product(&[self.weight_vectors()[2], self.d_latent])),
            g: latents(self.gate.is_some()),
            rotations: words(if self.rotated() { product(&[self.tokens, self.d_rope]) } else { 0 }),
            slots: words(self.tokens.into()),
            cache: self.rope_byte.saturating_add(keys),
            q: words(product(&[self.tokens, n_head, self.head()])),
            kept: latents(self.kept),
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
        // The padding of a cache row is written too.
        let written = [d_latent, d_rope].map(|width| times(storage.bytes(), &[tokens, storage.row_pitch(width)]));
        Cost::of(
            &[
                times(3, &[tokens, rotated]),
                times(3, &[tokens, queries.n_head, rotated]),
                times(normed + gated, &[tokens, d_latent]),
                times(of_norm + of_token, &[tokens]),
            ],
            &[
                times(4, &[tokens, rotated]),
                times(8, &[tokens, queries.n_head, self.head()]),
                times(4, &[tokens, d_latent]),
                times(4, &[tokens, d_rope]),
                times(4, &[tokens]),
                times(self.weights.bytes(), &[self.weight_vectors()[2], d_latent]),
                when(self.gate.is_some(), times(4, &[tokens, d_latent])),
                when(self.kept, times(4, &[tokens, d_latent])),
                written[0],
                written[1],
            ],
        )
    }
}

/// In 16-byte loads and stores, at the settings of `norm`: LANES invocations share a latent, or a head.
pub(crate) const ROWS: Variant<CacheAppend> = Variant::<CacheAppend>::new(
    ("cache_append", include_str!("../../shaders/cache_append.wgsl")),
    ROW_LANES.len(),
    |op, context, setting| {
        let (workgroup, lanes) = ROW_LANES[setting];
        // Tokens, then heads of tokens.
        let rows = u64::from(op.tokens).saturating_add(product(&[op.tokens, op.queries.n_head]));
        let gate = op.gate.unwrap_or(LatentGate { norm: GateNorm::None, ..LatentGate::default() });
        Ok(Draft::new(workgroup, Grid::Folded { items: rows, each: workgroup / lanes })
            .with([("STORAGE_F16", op.weights.constant()), ("CACHE_F16", op.storage.constant())])
            .with([("RMS", flag(op.norm.is_some())), ("GATED", flag(op.gate.is_some()))])
            .with([("ACTIVATION", gate.activation as u32), ("NORM", gate.norm as u32)])
            .with([("PADDED", flag(op.latent_used < op.d_latent)), ("ROTATE", flag(op.rotate))])
            .with([("KEPT", flag(op.kept)), ("INTEGERS", flag(context.class == AdapterClass::Software))])
            .with([("WORKGROUP", workgroup), ("LANES", lanes)])
            .bytes(16 * if lanes == 1 { 1 } else { workgroup }))
    },
    whole_rows,
)
.auto(|op, context| {
    let measured = op.norm.is_some() || op.gate.is_some();
    row_lanes(context, if measured { op.d_latent } else { 0 })
});

crate::vary!(Queries { n_head, offset, d_nope });
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
            queries: Queries { n_head, offset: 0, d_nope: 8 },
            norm: None,
            gate: None,
            kept: false,
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
                for (weights, kept) in Storage::ALL.into_iter().flat_map(|s| [(s, false), (s, true)]) {
                    let latent_used = if kept { d_latent - 3 } else { d_latent };
                    let plain = of(3, (d_latent, 8), 3, weights);
                    all.push(CacheAppend { latent_used, norm, gate, kept, weights, ..plain });
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
            kept: false,
            rope_byte: 144,
            weights: Storage::F16,
            storage: Storage::F16,
        };
        let gate = LatentGate { activation: Activation::Sigmoid, norm: GateNorm::LayerNorm, eps: 1e-5 };
        let heads = Queries { n_head: 2, offset: 0, d_nope: 4 };
        vec![
            // 3 pairs of 6. In: 3·(5 + 2)·4, cos and sin 3·2·4, slots 3·4. Out: rows of 8 and 8 halves.
            (of((5, 2), Queries::default()), Cost { flops: 18, bytes: 24 + 84 + 12 + 3 * 32 }),
            // One more pair for 2 heads per token: 6 FLOPs per pair; heads of 12 read and written.
            (of((8, 8), heads), Cost { flops: 3 * 4 * 6 + 6 * 4 * 6, bytes: 3 * (32 + 32 + 32 + 4 + 32) + 6 * 96 }),
            // RMSNorm 4 per element and 3 per token; sigmoid 3, product 1, layer_norm 7 and 4. Weights 3·8·2, g and what is kept 3·8·4.
            (
                CacheAppend { norm: Some(1e-6), gate: Some(gate), kept: true, ..of((8, 0), Queries::default()) },
                Cost { flops: 3 * (8 * 15 + 7), bytes: 3 * (32 + 4 + 16) + 48 + 2 * 96 },
            ),
        ]
    }
}

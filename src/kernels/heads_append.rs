//! Rotates queries and keys of new tokens, and writes keys and values to their cache rows.

use crate::adapter::AdapterClass;
use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, LINEAR_WORKGROUPS, Plan, check_multiples, check_nonzero, flag};
use crate::storage::{Storage, UNIT, product, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params {
        tokens: u32, n_head: u32, n_kv_head: u32, head_dim: u32, first_slot: u32, cache_rows: u32, used: u32, eps: f32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[tokens, n_head + 2 · n_kv_head, head_dim]` f32: queries, keys, values.
        x: Read,
        /// `[tokens, head_dim / 2, 2]` f32: cos and sin of each pair, YaRN's amplitude included.
        rotations: Read,
        /// `[tokens]` u32: cache row of each.
        slots: Read,
        /// `[2, head_dim]` f32: weights of the norms of queries and of keys.
        norms: Read,
        /// `[tokens, n_head, head_dim]` f32, written: rotated queries.
        q: Write,
        /// `[cache_rows, n_kv_head, key | value]` in `storage`, the rows `slots` written: rotated keys and values.
        cache: Write,
    }
}

/// RMSNorm of every head of queries and keys, before they are turned.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct HeadsNorm {
    /// Elements of a head without its padding.
    pub used: u32,
    /// `eps` of the norm.
    pub eps: f32,
}

/// New tokens of a cache of keys and values per head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadsAppend {
    /// New tokens.
    pub tokens: u32,
    /// Query heads.
    pub n_head: u32,
    /// Heads of keys and values.
    pub n_kv_head: u32,
    /// Width of a head with its padding; a multiple of [`UNIT`]. Pairs of the rotation are (2i, 2i+1).
    pub head_dim: u32,
    /// Cache row that `cache` begins with.
    pub first_slot: u32,
    /// Rows of `cache`: keys and values of other rows are left out, queries are not.
    pub cache_rows: u32,
    /// The norm of heads, where there is one.
    pub norm: Option<HeadsNorm>,
    /// Storage of the cache.
    pub storage: Storage,
}

impl HeadsAppend {
    fn heads(&self) -> u32 {
        self.n_head.saturating_add(self.n_kv_head.saturating_mul(2))
    }
}

impl Op for HeadsAppend {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "heads_append";
    const VARIANTS: &'static [Variant<Self>] = &[UNITS];

    fn widths(&self) -> [(&'static str, u32); 4] {
        [("head_dim", self.head_dim), ("", 0), ("", 0), ("", 0)]
    }

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("n_head", self.n_head), ("n_kv_head", self.n_kv_head), ("head_dim", self.head_dim)])?;
        check_multiples(UNIT, &[("head_dim", self.head_dim)])?;
        match self.norm {
            Some(HeadsNorm { used, .. }) if used == 0 || used > self.head_dim => {
                Err(format!("norm of {used} elements of a head, which has {}", self.head_dim))
            }
            _ => Ok(()),
        }
    }

    fn params(&self, _: &Plan) -> Params {
        let HeadsAppend { tokens, n_head, n_kv_head, head_dim, first_slot, cache_rows, .. } = *self;
        let HeadsNorm { used, eps } = self.norm.unwrap_or_default();
        Params { tokens, n_head, n_kv_head, head_dim, first_slot, cache_rows, used, eps }
    }

    fn bytes(&self) -> Args<u64> {
        let HeadsAppend { tokens, n_head, n_kv_head, head_dim, cache_rows, storage, .. } = *self;
        Args {
            x: words(product(&[tokens, self.heads(), head_dim])),
            rotations: words(product(&[tokens, head_dim])),
            slots: words(tokens.into()),
            norms: words(if self.norm.is_some() { product(&[2, head_dim]) } else { 0 }),
            q: words(product(&[tokens, n_head, head_dim])),
            cache: storage.sized(product(&[2, cache_rows, n_kv_head, head_dim])),
        }
    }

    fn cost(&self) -> Cost {
        let HeadsAppend { tokens, n_head, n_kv_head, head_dim, storage, .. } = *self;
        let (turned, normed) = (n_head.saturating_add(n_kv_head), u32::from(self.norm.is_some()));
        // Four products and two sums per pair. cos and sin are read once per token, whatever the heads. Of a norm square and sum,
        // scale and weight, and three operations per head.
        Cost::of(
            &[
                times(3, &[tokens, turned, head_dim]),
                times(4, &[normed, tokens, turned, head_dim]),
                times(3, &[normed, tokens, turned]),
            ],
            &[
                times(4, &[tokens, self.heads(), head_dim]),
                times(4, &[tokens, head_dim]),
                times(4, &[tokens]),
                times(8, &[normed, head_dim]),
                times(4, &[tokens, n_head, head_dim]),
                times(2 * storage.bytes(), &[tokens, n_kv_head, head_dim]),
            ],
        )
    }
}

/// Eight elements an invocation.
pub(crate) const UNITS: Variant<HeadsAppend> = Variant::<HeadsAppend>::new(
    ("heads_append", include_str!("../../shaders/heads_append.wgsl")),
    LINEAR_WORKGROUPS.len(),
    |op, context, setting| {
        let units = product(&[op.tokens, op.heads(), op.head_dim / UNIT]);
        Ok(Draft::elements(LINEAR_WORKGROUPS[setting], units)
            .with([("CACHE_F16", op.storage.constant())])
            .with([("NORM", flag(op.norm.is_some()))])
            .with([("INTEGERS", flag(context.class == AdapterClass::Software))])
            .walks("head_dim", if op.norm.is_some() { op.head_dim } else { 0 }, 4))
    },
    anything,
);

crate::vary!(HeadsNorm { used, eps });
crate::vary!(HeadsAppend { tokens, n_head, n_kv_head, head_dim, first_slot, cache_rows, norm, storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for HeadsAppend {
    fn samples() -> Vec<Self> {
        let of = |tokens, (n_head, n_kv_head, head_dim, norm), storage| HeadsAppend {
            tokens,
            n_head,
            n_kv_head,
            head_dim,
            first_slot: 0,
            cache_rows: tokens,
            norm,
            storage,
        };
        let norm = |used| Some(HeadsNorm { used, eps: 1e-6 });
        let shapes =
            [(1, 1, 8, None), (3, 1, 8, norm(5)), (9, 3, 64, None), (32, 8, 128, None), (16, 8, 128, norm(128))];
        let sizes = crate::sample::ELEMENTS.into_iter().filter(|&tokens| tokens < 1 << 20);
        let stored = |tokens| Storage::ALL.into_iter().flat_map(move |s| shapes.map(|shape| of(tokens, shape, s)));
        sizes.flat_map(stored).collect()
    }

    fn counted() -> Vec<(Self, Cost)> {
        let of = |storage, norm| HeadsAppend {
            tokens: 2,
            n_head: 6,
            n_kv_head: 3,
            head_dim: 8,
            first_slot: 0,
            cache_rows: 9,
            norm,
            storage,
        };
        // 2·9·4 pairs of 6. In: 2·12·8·4, cos and sin 2·8·4, slots 2·4. Out: queries 2·6·8·4, keys and values 2·6·8.
        vec![
            (of(Storage::F32, None), Cost { flops: 432, bytes: 768 + 64 + 8 + 384 + 384 }),
            (of(Storage::F16, None), Cost { flops: 432, bytes: 768 + 64 + 8 + 384 + 192 }),
            // And 4·2·9·8 of elements, 3·2·9 of heads, two weights of 8.
            (
                of(Storage::F16, Some(HeadsNorm { used: 7, eps: 1e-6 })),
                Cost { flops: 432 + 576 + 54, bytes: 768 + 64 + 8 + 384 + 192 + 64 },
            ),
        ]
    }
}

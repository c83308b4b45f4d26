//! Rotates queries and keys of new tokens, and writes keys and values to their cache rows.

use crate::adapter::AdapterClass;
use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, LINEAR_WORKGROUPS, Plan, check_multiples, check_nonzero, flag};
use crate::storage::{Storage, UNIT, product, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params {
        tokens: u32, n_head: u32, n_kv_head: u32, head_dim: u32, first_slot: u32, cache_rows: u32,
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
        /// `[tokens, n_head, head_dim]` f32, written: rotated queries.
        q: Write,
        /// `[cache_rows, n_kv_head, key | value]` in `storage`, the rows `slots` written: rotated keys and values.
        cache: Write,
    }
}

/// New tokens of a cache of keys and values per head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
        check_multiples(UNIT, &[("head_dim", self.head_dim)])
    }

    fn params(&self, _: &Plan) -> Params {
        let HeadsAppend { tokens, n_head, n_kv_head, head_dim, first_slot, cache_rows, .. } = *self;
        Params { tokens, n_head, n_kv_head, head_dim, first_slot, cache_rows }
    }

    fn bytes(&self) -> Args<u64> {
        let HeadsAppend { tokens, n_head, n_kv_head, head_dim, cache_rows, storage, .. } = *self;
        Args {
            x: words(product(&[tokens, self.heads(), head_dim])),
            rotations: words(product(&[tokens, head_dim])),
            slots: words(tokens.into()),
            q: words(product(&[tokens, n_head, head_dim])),
            cache: storage.sized(product(&[2, cache_rows, n_kv_head, head_dim])),
        }
    }

    fn cost(&self) -> Cost {
        let HeadsAppend { tokens, n_head, n_kv_head, head_dim, storage, .. } = *self;
        // Four products and two sums per pair. cos and sin are read once per token, whatever the heads.
        Cost::of(
            &[times(3, &[tokens, n_head.saturating_add(n_kv_head), head_dim])],
            &[
                times(4, &[tokens, self.heads(), head_dim]),
                times(4, &[tokens, head_dim]),
                times(4, &[tokens]),
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
            .with([("INTEGERS", flag(context.class == AdapterClass::Software))]))
    },
    anything,
);

crate::vary!(HeadsAppend { tokens, n_head, n_kv_head, head_dim, first_slot, cache_rows, storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for HeadsAppend {
    fn samples() -> Vec<Self> {
        let of = |tokens, (n_head, n_kv_head, head_dim), storage| HeadsAppend {
            tokens,
            n_head,
            n_kv_head,
            head_dim,
            first_slot: 0,
            cache_rows: tokens,
            storage,
        };
        let shapes = [(1, 1, 8), (9, 3, 64), (32, 8, 128)];
        let sizes = crate::sample::ELEMENTS.into_iter().filter(|&tokens| tokens < 1 << 20);
        let stored = |tokens| Storage::ALL.into_iter().flat_map(move |s| shapes.map(|shape| of(tokens, shape, s)));
        sizes.flat_map(stored).collect()
    }

    fn counted() -> Vec<(Self, Cost)> {
        let of = |storage| HeadsAppend {
            tokens: 2,
            n_head: 6,
            n_kv_head: 3,
            head_dim: 8,
            first_slot: 0,
            cache_rows: 9,
            storage,
        };
        // 2·9·4 pairs of 6. In: 2·12·8·4, cos and sin 2·8·4, slots 2·4. Out: queries 2·6·8·4, keys and values 2·6·8.
        vec![
            (of(Storage::F32), Cost { flops: 432, bytes: 768 + 64 + 8 + 384 + 384 }),
            (of(Storage::F16), Cost { flops: 432, bytes: 768 + 64 + 8 + 384 + 192 }),
        ]
    }
}

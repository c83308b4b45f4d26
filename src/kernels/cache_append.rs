//! Writes latents and rotary keys of new tokens to their cache rows, and rotates keys and queries.

use crate::adapter::AdapterClass;
use crate::cost::{Cost, times};
use crate::op::{Op, Variant};
use crate::plan::{Draft, Grid, Plan, check_multiples, check_nonzero, flag};
use crate::storage::{Storage, product, rows_end, words};

use super::norm::whole_rows;

crate::params! {
    /// Uniform parameters, as in the shaders.
    pub struct Params {
        tokens: u32, d_latent: u32, latent_offset: u32, latent_row: u32, latent_words: u32,
        d_rope: u32, rope_offset: u32, rope_row: u32, rope_words: u32, rope_cache: u32,
        q_heads: u32, q_offset: u32, q_row: u32, q_head: u32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// f32, rows as in [`CacheAppend`].
        latent: Read,
        /// f32, rows as in [`CacheAppend`]; not bound without a rotary key.
        rope_key: Read,
        /// `[tokens, d_rope / 2, 2]` f32: cos and sin of each pair; not bound where nothing is rotated.
        rotations: Read,
        /// `[tokens]` u32 cache rows, all different.
        slots: Read,
        /// `[cache_rows, pitch of d_latent]`, then at `rope_byte` `[cache_rows, pitch of d_rope]`, in `storage`, written.
        cache: Write,
        /// f32, heads as in [`Queries`], rotated in place; not bound without.
        q: Write,
    }
}

/// Query heads that are rotated in place, in elements of `q`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Queries {
    /// Heads per token; 0 for none.
    pub n_head: u32,
    /// First element that is rotated.
    pub offset: u32,
    /// From one token to the next.
    pub row: u32,
    /// From one head to the next.
    pub head: u32,
}

/// Tokens to append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheAppend {
    /// New tokens.
    pub tokens: u32,
    /// Cache rows; the caller has checked that every slot is below it.
    pub cache_rows: u32,
    /// Width of a latent. Widths, offsets and pitches are multiples of 4; the two widths of 8 for an f16 cache.
    pub d_latent: u32,
    /// First element of `latent`.
    pub latent_offset: u32,
    /// From one token of `latent` to the next.
    pub latent_row: u32,
    /// Width of the rotary key; may be 0.
    pub d_rope: u32,
    /// First element of `rope_key`.
    pub rope_offset: u32,
    /// From one token of `rope_key` to the next.
    pub rope_row: u32,
    /// Rotates the pairs (2i, 2i+1) of keys and queries.
    pub rotate: bool,
    /// Queries to rotate.
    pub queries: Queries,
    /// Byte of `cache` where the rotary keys begin, after the latents.
    pub rope_byte: u64,
    /// Storage of the cache.
    pub storage: Storage,
}

impl CacheAppend {
    fn row_words(&self, width: u32) -> u32 {
        (u64::from(self.storage.row_pitch(width)) * self.storage.bytes() / 4) as u32
    }

    /// Heads that are rotated.
    fn rotated_heads(&self) -> u32 {
        if self.rotate && self.d_rope > 0 { self.queries.n_head } else { 0 }
    }
}

impl Op for CacheAppend {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "cache_append";
    const VARIANTS: &'static [Variant<Self>] = &[ROWS];

    fn widths(&self) -> [(&'static str, u32); 4] {
        [("d_latent", self.d_latent), ("d_rope", self.d_rope), ("", 0), ("", 0)]
    }

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("d_latent", self.d_latent)])?;
        let of_load = self.storage.of_load();
        check_multiples(of_load, &[("d_latent", self.d_latent), ("d_rope", self.d_rope)])?;
        let Queries { offset, row, head, .. } = self.queries;
        check_multiples(4, &[("latent_offset", self.latent_offset), ("latent_row", self.latent_row)])?;
        check_multiples(4, &[("rope_offset", self.rope_offset), ("rope_row", self.rope_row)])?;
        check_multiples(4, &[("offset of q", offset), ("row of q", row), ("head of q", head)])?;
        let latents = product(&[self.cache_rows, self.row_words(self.d_latent), 4]);
        if self.rope_byte < latents || !self.rope_byte.is_multiple_of(16) {
            return Err(format!("rotary keys begin at byte {}, latents take {latents}", self.rope_byte));
        }
        Ok(())
    }

    fn params(&self, _: &Plan) -> Params {
        Params {
            tokens: self.tokens,
            d_latent: self.d_latent,
            latent_offset: self.latent_offset,
            latent_row: self.latent_row,
            latent_words: self.row_words(self.d_latent),
            d_rope: self.d_rope,
            rope_offset: self.rope_offset,
            rope_row: self.rope_row,
            rope_words: self.row_words(self.d_rope),
            // Within a binding, so 32 bits count the words.
            rope_cache: (self.rope_byte / 4) as u32,
            q_heads: self.rotated_heads(),
            q_offset: self.queries.offset,
            q_row: self.queries.row,
            q_head: self.queries.head,
        }
    }

    fn bytes(&self) -> Args<u64> {
        let Queries { offset, row, head, .. } = self.queries;
        let heads = self.rotated_heads();
        let q =
            rows_end(offset, self.tokens, row, self.d_rope).saturating_add(product(&[heads.saturating_sub(1), head]));
        let cache = product(&[self.cache_rows, self.row_words(self.d_rope), 4]);
        let rotated = self.rotate && self.d_rope > 0;
        let used = |used: bool, elements: u64| words(if used { elements } else { 0 });
        Args {
            latent: words(rows_end(self.latent_offset, self.tokens, self.latent_row, self.d_latent)),
            rope_key: used(self.d_rope > 0, rows_end(self.rope_offset, self.tokens, self.rope_row, self.d_rope)),
            rotations: used(rotated, product(&[self.tokens, self.d_rope])),
            slots: words(self.tokens.into()),
            cache: self.rope_byte.saturating_add(cache),
            q: used(heads > 0, q),
        }
    }

    fn cost(&self) -> Cost {
        let CacheAppend { tokens, d_latent, d_rope, rotate, queries, storage, .. } = *self;
        let rotated = if rotate { d_rope } else { 0 };
        // The padding of a cache row is written too.
        let written = [d_latent, d_rope].map(|width| times(storage.bytes(), &[tokens, storage.row_pitch(width)]));
        Cost::of(
            &[times(3, &[tokens, rotated]), times(3, &[tokens, queries.n_head, rotated])],
            &[
                times(4, &[tokens, rotated]),
                times(8, &[tokens, queries.n_head, rotated]),
                times(4, &[tokens, d_latent]),
                times(4, &[tokens, d_rope]),
                times(4, &[tokens]),
                written[0],
                written[1],
            ],
        )
    }
}

/// In 16-byte loads and stores. (WORKGROUP, LANES): LANES invocations share a cache row.
pub(crate) const ROWS: Variant<CacheAppend> = {
    const TUNINGS: &[(u32, u32)] = &[(8, 1), (64, 16), (256, 16)];
    Variant::<CacheAppend>::new(
        ("cache_append", include_str!("../../shaders/cache_append.wgsl")),
        TUNINGS.len(),
        |op, context, setting| {
            let (workgroup, lanes) = TUNINGS[setting];
            // Tokens, then heads of tokens.
            let rows = u64::from(op.tokens).saturating_add(product(&[op.tokens, op.rotated_heads()]));
            Ok(Draft::new(workgroup, Grid::Folded { items: rows, each: workgroup / lanes })
                .with([("STORAGE_F16", op.storage.constant()), ("ROTATE", flag(op.rotate))])
                .with([("INTEGERS", flag(context.class == AdapterClass::Software))])
                .with([("WORKGROUP", workgroup), ("LANES", lanes)]))
        },
        whole_rows,
    )
    .auto(|_, context| usize::from(context.class != AdapterClass::Software))
};

crate::vary!(Queries { n_head, offset, row, head });
crate::vary!(CacheAppend {
    tokens,
    cache_rows,
    d_latent,
    latent_offset,
    latent_row,
    d_rope,
    rope_offset,
    rope_row,
    rotate,
    queries,
    rope_byte,
    storage
});

#[cfg(feature = "check")]
impl crate::sample::Sampled for CacheAppend {
    fn samples() -> Vec<Self> {
        // Without a rotary key and with one, with heads of queries and without.
        let of = |tokens: u32, (d_latent, d_rope, row): (u32, u32, u32), n_head, storage: Storage| CacheAppend {
            tokens,
            cache_rows: tokens,
            d_latent,
            latent_offset: 0,
            latent_row: row,
            d_rope,
            rope_offset: if row > d_latent { d_latent } else { 0 },
            rope_row: row,
            rotate: tokens % 2 == 1,
            queries: Queries { n_head, offset: 8, row: 24 * n_head, head: 24 },
            rope_byte: u64::from(tokens) * u64::from(storage.row_pitch(d_latent)) * storage.bytes(),
            storage,
        };
        let sizes = [((8, 0, 8), 0), ((8, 8, 16), 0), ((8, 8, 16), 3), ((24, 16, 40), 0), ((24, 16, 40), 3)];
        let stored =
            |tokens| Storage::ALL.into_iter().flat_map(move |s| sizes.map(|(w, n_head)| of(tokens, w, n_head, s)));
        crate::sample::ELEMENTS.into_iter().filter(|&tokens| tokens < 1 << 20).flat_map(stored).collect()
    }

    fn counted() -> Vec<(Self, Cost)> {
        let of = |(d_latent, d_rope), queries| CacheAppend {
            tokens: 3,
            cache_rows: 9,
            d_latent,
            latent_offset: 0,
            latent_row: d_latent,
            d_rope,
            rope_offset: 0,
            rope_row: d_rope,
            rotate: true,
            queries,
            rope_byte: 144,
            storage: Storage::F16,
        };
        vec![
            // 3 pairs of 6. In: 3·(5 + 2)·4, cos and sin 3·2·4, slots 3·4. Out: rows of 8 and 8 halves.
            (of((5, 2), Queries::default()), Cost { flops: 18, bytes: 24 + 84 + 12 + 3 * 32 }),
            // One more pair for 2 heads per token: 6 FLOPs per pair, read and written.
            (
                of((8, 8), Queries { n_head: 2, offset: 0, row: 16, head: 8 }),
                Cost { flops: 3 * 4 * 6 + 6 * 4 * 6, bytes: 3 * (32 + 32 + 32 + 4 + 32) + 6 * 64 },
            ),
        ]
    }
}

//! Rotary position embedding, in place.

use crate::cost::{Cost, times};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, LINEAR_WORKGROUPS, Plan, flag};
use crate::storage::{product, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { tokens: u32, n_head: u32, d_rope: u32, offset: u32, token_stride: u32, head_stride: u32 }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[tokens, d_rope / 2, 2]` f32: cos and sin of each pair, YaRN's amplitude included.
        rotations: Read,
        /// f32, rotated in place.
        values: Write,
    }
}

/// The elements of `values` to rotate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rope {
    /// Tokens.
    pub tokens: u32,
    /// Heads per token; 1 for the shared key.
    pub n_head: u32,
    /// Rotated elements per head; even, may be 0.
    pub d_rope: u32,
    /// First element that is rotated.
    pub offset: u32,
    /// From one token to the next.
    pub token_stride: u32,
    /// From one head to the next.
    pub head_stride: u32,
    /// Pairs (2i, 2i+1) when true, (i, i + d_rope/2) when false.
    pub interleave: bool,
}

impl Op for Rope {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "rope";
    const VARIANTS: &'static [Variant<Self>] = &[PAIRS];

    fn validate(&self) -> Result<(), String> {
        if !self.d_rope.is_multiple_of(2) {
            return Err(format!("d_rope is {}, must be even", self.d_rope));
        }
        Ok(())
    }

    fn params(&self, _: &Plan) -> Params {
        let Rope { tokens, n_head, d_rope, offset, token_stride, head_stride, .. } = *self;
        Params { tokens, n_head, d_rope, offset, token_stride, head_stride }
    }

    fn bytes(&self) -> Args<u64> {
        let Rope { tokens, n_head, d_rope, offset, token_stride, head_stride, .. } = *self;
        let end = u64::from(offset)
            .saturating_add(product(&[tokens.saturating_sub(1), token_stride]))
            .saturating_add(product(&[n_head.saturating_sub(1), head_stride]))
            .saturating_add(d_rope.into());
        Args { rotations: words(product(&[tokens, d_rope])), values: words(end) }
    }

    fn cost(&self) -> Cost {
        let Rope { tokens, n_head, d_rope, .. } = *self;
        // Four products and two sums per pair. cos and sin are read once per token, whatever the heads.
        Cost::of(
            &[times(3, &[tokens, n_head, d_rope])],
            &[times(4, &[tokens, d_rope]), times(8, &[tokens, n_head, d_rope])],
        )
    }
}

pub(crate) const PAIRS: Variant<Rope> = Variant::<Rope>::new(
    ("rope", include_str!("../../shaders/rope.wgsl")),
    LINEAR_WORKGROUPS.len(),
    |op, _, setting| {
        let pairs = product(&[op.tokens, op.n_head, op.d_rope / 2]);
        Ok(Draft::elements(LINEAR_WORKGROUPS[setting], pairs).with([("INTERLEAVE", flag(op.interleave))]))
    },
    anything,
);

crate::vary!(Rope { tokens, n_head, d_rope, offset, token_stride, head_stride, interleave });

#[cfg(feature = "check")]
impl crate::sample::Sampled for Rope {
    fn samples() -> Vec<Self> {
        let of = |tokens, d_rope, interleave| Rope {
            tokens,
            n_head: 1,
            d_rope,
            offset: 0,
            token_stride: d_rope,
            head_stride: d_rope,
            interleave,
        };
        let kinds = [(2, false), (2, true), (0, false), (0, true)];
        let sizes = crate::sample::ELEMENTS.into_iter();
        sizes.flat_map(|tokens| kinds.map(|(d_rope, interleave)| of(tokens, d_rope, interleave))).collect()
    }

    fn counted() -> Vec<(Self, Cost)> {
        let (n_head, d_rope, offset, token_stride, head_stride, interleave) = (3, 4, 0, 12, 4, true);
        let op = Rope { tokens: 2, n_head, d_rope, offset, token_stride, head_stride, interleave };
        // 2·3·2 pairs of 6. Rotations 2·4·4, values 2·3·4 read and written.
        vec![(op, Cost { flops: 72, bytes: 32 + 192 })]
    }
}

//! Combines the partial results of every query, one per split.

use crate::adapter::AdapterClass;
use crate::cost::{Cost, times};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_multiples, check_nonzero};
use crate::storage::{product, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { tokens: u32, n_head: u32, width: u32 }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[splits, n_head, width]` f32.
        partial_values: Read,
        /// `[splits, n_head, 2]` f32 (m, l).
        partial_softmax: Read,
        /// `[tokens, 2]` u32: first split and splits of each query.
        ranges: Read,
        /// `[tokens, n_head, width]` f32, written; 0 for a query without any key.
        values: Write,
        /// `[tokens, n_head]` f32, natural log of the sum of exponentials; the lowest f32 for a query without any key.
        lse: Write,
    }
}

/// Splits to combine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionCombine {
    /// Queries.
    pub tokens: u32,
    /// Query heads.
    pub n_head: u32,
    /// Value width, or latent width of the absorbed path; a multiple of 4.
    pub width: u32,
    /// Splits of all queries.
    pub splits: u32,
}

impl Op for AttentionCombine {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "attention_combine";
    const VARIANTS: &'static [Variant<Self>] = &[ROWS];

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("n_head", self.n_head), ("width", self.width)])?;
        check_multiples(4, &[("width", self.width)])
    }

    fn params(&self, _: &Plan) -> Params {
        Params { tokens: self.tokens, n_head: self.n_head, width: self.width }
    }

    fn bytes(&self) -> Args<u64> {
        let AttentionCombine { tokens, n_head, width, splits } = *self;
        Args {
            partial_values: words(product(&[splits, n_head, width])),
            partial_softmax: words(product(&[splits, n_head, 2])),
            ranges: words(product(&[tokens, 2])),
            values: words(product(&[tokens, n_head, width])),
            lse: words(product(&[tokens, n_head])),
        }
    }

    fn cost(&self) -> Cost {
        let AttentionCombine { tokens, n_head, width, splits } = *self;
        Cost::of(
            &[
                // A split: the maximum, its weight e^(m_s − m), its part of l, its part of the values.
                times(2, &[splits, n_head, width]),
                times(5, &[splits, n_head]),
                // A query: times 1 / l; lse.
                times(1, &[tokens, n_head, width]),
                times(3, &[tokens, n_head]),
            ],
            &[
                times(4, &[splits, n_head, width]),
                times(8, &[splits, n_head]),
                times(8, &[tokens]),
                times(4, &[tokens, n_head, width]),
                times(4, &[tokens, n_head]),
            ],
        )
    }
}

/// Lanes of a team, each with four columns, and teams of a workgroup, each with its share of the splits.
const TEAMS: &[[u32; 2]] = &[[16, 16], [64, 1], [64, 4], [8, 32]];

pub(crate) const ROWS: Variant<AttentionCombine> = Variant::<AttentionCombine>::new(
    ("attention_combine", include_str!("../../shaders/attention_combine.wgsl")),
    TEAMS.len(),
    |op, _, setting| {
        let [lanes, teams] = TEAMS[setting];
        let workgroup = lanes * teams;
        let items = product(&[op.tokens, op.n_head, op.width.div_ceil(4 * lanes)]);
        // Values, maximum and sum of every invocation, unless one team has all splits.
        let shared = if teams == 1 { 1 } else { workgroup };
        Ok(Draft::new(workgroup, Grid::Folded { items, each: 1 })
            .with([("LANES", lanes), ("TEAMS", teams)])
            .bytes(24 * shared))
    },
    |_, _, plan| {
        let [lanes, teams] = ["LANES", "TEAMS"].map(|name| plan.value(name) as u32);
        hold(&[
            (teams.is_power_of_two(), "teams join in pairs"),
            (lanes * teams == plan.workgroup_size, "a workgroup has whole teams"),
        ])
    },
)
// Barriers are slow in software, and few splits need few teams. The rounding of one running sum over many splits grows with their
// number: four teams halve it.
.auto(|op, context| match context.class {
    AdapterClass::Software if op.splits < op.tokens.saturating_mul(128) => 1,
    AdapterClass::Software => 2,
    _ if op.splits < op.tokens.saturating_mul(4) => 1,
    _ if op.splits < op.tokens.saturating_mul(16) => 2,
    _ => 0,
});

crate::vary!(AttentionCombine { tokens, n_head, width, splits });

#[cfg(feature = "check")]
impl crate::sample::Sampled for AttentionCombine {
    fn samples() -> Vec<Self> {
        crate::sample::ROWS.map(|tokens| AttentionCombine { tokens, n_head: 3, width: 68, splits: 9 * tokens }).to_vec()
    }

    fn counted() -> Vec<(Self, Cost)> {
        // 4 splits · 3 heads · (2·12 + 5) + 2 queries · 3 heads · (12 + 3).
        // In: 12·(48 + 8) + 2·8. Out: 6·(48 + 4).
        let op = AttentionCombine { tokens: 2, n_head: 3, width: 12, splits: 4 };
        vec![(op, Cost { flops: 348 + 90, bytes: 672 + 16 + 312 })]
    }
}

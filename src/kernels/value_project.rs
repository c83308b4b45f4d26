//! Combines the partial results of the absorbed path and projects them to values, in one.

use super::matmul::FEW_ROWS;
use crate::adapter::{AdapterClass, PlanContext};
use crate::cost::{Cost, times};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_multiples, check_nonzero};
use crate::storage::{Storage, product, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params {
        tokens: u32, n_head: u32, d_value: u32, w_offset: u32, w_head: u32, tiles_x: u32, tiles_y: u32, tiles_z: u32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[splits, n_head, d_latent]` f32.
        partial_values: Read,
        /// `[splits, n_head, 2]` f32 (m, l).
        partial_softmax: Read,
        /// `[tokens, 2]` u32: first split and splits of each query.
        ranges: Read,
        /// `[d_value, d_latent]` of each head in `storage`, as in [`ValueProject`].
        w: Read,
        /// `[tokens, n_head, d_value]` f32, written; 0 for a query without any key.
        values: Write,
    }
}

/// Splits to combine and to project.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ValueProject {
    /// Queries.
    pub tokens: u32,
    /// Query heads.
    pub n_head: u32,
    /// Latent width, at most [`MOST_LATENT`]: whole 16-byte loads in `storage`.
    pub d_latent: u32,
    /// Value width.
    pub d_value: u32,
    /// Splits of all queries.
    pub splits: u32,
    /// Elements of `w` before the projection of the first head; whole loads.
    pub w_offset: u32,
    /// Elements of `w` from one head to the next; whole loads.
    pub w_head: u32,
    /// Storage of `w`.
    pub storage: Storage,
}

/// Widest latent: a combined one stays in workgroup memory, within WebGPU's default limit.
pub const MOST_LATENT: u32 = 2048;

/// Most splits per query that every tile of columns may combine anew.
const FEW_SPLITS: u32 = 64;

/// Whether to combine and project in one dispatch. Every tile of columns reads the partial results and every query the weights anew:
/// with many of either, two dispatches read less.
pub(crate) fn pays(tokens: u32, splits: u32, d_latent: u32) -> bool {
    tokens <= FEW_ROWS && splits <= tokens * FEW_SPLITS && d_latent <= MOST_LATENT
}

impl Op for ValueProject {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "value_project";
    const VARIANTS: &'static [Variant<Self>] = &[TILES];

    fn validate(&self) -> Result<(), String> {
        let ValueProject { n_head, d_latent, d_value, w_offset, w_head, .. } = *self;
        check_nonzero(&[("n_head", n_head), ("d_latent", d_latent), ("d_value", d_value)])?;
        let of_load = self.storage.of_load();
        check_multiples(of_load, &[("d_latent", d_latent), ("w_offset", w_offset), ("w_head", w_head)])?;
        if d_latent > MOST_LATENT {
            return Err(format!("d_latent is {d_latent}, must be at most {MOST_LATENT}"));
        }
        Ok(())
    }

    fn params(&self, plan: &Plan) -> Params {
        let [tiles_x, tiles_y, tiles_z] = plan.tiles;
        let ValueProject { tokens, n_head, d_value, w_offset, w_head, .. } = *self;
        Params { tokens, n_head, d_value, w_offset, w_head, tiles_x, tiles_y, tiles_z }
    }

    fn bytes(&self) -> Args<u64> {
        let ValueProject { tokens, n_head, d_latent, d_value, splits, .. } = *self;
        let w = product(&[n_head.saturating_sub(1), self.w_head]).saturating_add(product(&[d_value, d_latent]));
        Args {
            partial_values: words(product(&[splits, n_head, d_latent])),
            partial_softmax: words(product(&[splits, n_head, 2])),
            ranges: words(product(&[tokens, 2])),
            w: self.storage.sized(w.saturating_add(self.w_offset.into())),
            values: words(product(&[tokens, n_head, d_value])),
        }
    }

    fn cost(&self) -> Cost {
        let ValueProject { tokens, n_head, d_latent, d_value, splits, storage, .. } = *self;
        Cost::of(
            &[
                // As in `attention_combine`, without lse.
                times(2, &[splits, n_head, d_latent]),
                times(5, &[splits, n_head]),
                times(1, &[tokens, n_head, d_latent]),
                times(1, &[tokens, n_head]),
                times(2, &[tokens, n_head, d_latent, d_value]),
            ],
            &[
                times(4, &[splits, n_head, d_latent]),
                times(8, &[splits, n_head]),
                times(8, &[tokens]),
                times(storage.bytes(), &[n_head, d_latent, d_value]),
                times(4, &[tokens, n_head, d_value]),
            ],
        )
    }
}

/// (TEAM, TEAMS, LANES): lanes of a team, each with four columns of a latent; teams, each with its share of the splits; invocations that
/// share a column of values.
pub(crate) const TILES: Variant<ValueProject> = {
    const TUNINGS: &[(u32, u32, u32)] = &[(64, 1, 1), (16, 16, 8), (64, 4, 8), (128, 2, 8), (64, 4, 16)];
    Variant::<ValueProject>::new(
        ("value_project", include_str!("../../shaders/value_project.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            let (team, teams, lanes) = TUNINGS[setting];
            let workgroup = team * teams;
            let grid = Grid::Tiled { size: [op.d_value, op.n_head, op.tokens], tile: [workgroup / lanes, 1, 1] };
            let joined = if teams == 1 { 1 } else { workgroup };
            let sums = if lanes == 1 { 1 } else { workgroup };
            Ok(Draft::new(workgroup, grid)
                .with([("STORAGE_F16", op.storage.constant())])
                .with([("FOURS", op.d_latent / 4), ("TEAM", team), ("TEAMS", teams), ("LANES", lanes)])
                .bytes(4 * op.d_latent + 24 * joined + 4 * sums))
        },
        |_, _, plan| {
            let [team, teams, lanes] = ["TEAM", "TEAMS", "LANES"].map(|name| plan.value(name));
            hold(&[
                (teams.is_power_of_two() && lanes.is_power_of_two(), "teams and lanes join in pairs"),
                (team * teams == u64::from(plan.workgroup_size), "a workgroup has whole teams"),
                (plan.tile() == [team * teams / lanes.max(1), 1, 1], "a workgroup has whole columns"),
            ])
        },
    )
    .auto(by_width)
};

fn by_width(op: &ValueProject, context: &PlanContext) -> usize {
    match (context.class, op.d_latent) {
        // Barriers are slow in software.
        (AdapterClass::Software, _) => 0,
        (_, 0..=64) => 1,
        // Few splits are soon combined again: fewer columns a workgroup fill a device better.
        _ if op.splits <= op.tokens.saturating_mul(8) => 4,
        (_, 65..=256) => 2,
        _ => 3,
    }
}

crate::vary!(ValueProject { tokens, n_head, d_latent, d_value, splits, w_offset, w_head, storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for ValueProject {
    fn samples() -> Vec<Self> {
        let mut all = Vec::new();
        for (tokens, storage) in [0, 1, 3, 8].iter().flat_map(|&n| Storage::ALL.map(|storage| (n, storage))) {
            for (n_head, d_latent, d_value) in [(1, 8, 8), (3, 72, 5), (9, 264, 64), (16, 512, 128), (2, 2048, 24)] {
                for each in [4, 64] {
                    let (splits, w_offset, w_head) = (each * tokens, 8 * d_latent, (8 + d_value) * d_latent);
                    all.push(ValueProject { tokens, n_head, d_latent, d_value, splits, w_offset, w_head, storage });
                }
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let (tokens, n_head, d_latent, d_value, splits, w_offset, w_head) = (2, 3, 8, 5, 4, 0, 40);
        let storage = Storage::F16;
        let op = ValueProject { tokens, n_head, d_latent, d_value, splits, w_offset, w_head, storage };
        // 4 splits · 3 heads · (2·8 + 5), 2 queries · 3 heads · (8 + 1), 2·3·8·5 multiply-adds.
        // In: 12·(32 + 8), 2·8, weights 3·8·5·2. Out: 6·5·4.
        vec![(op, Cost { flops: 252 + 54 + 480, bytes: 480 + 16 + 240 + 120 })]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One query of a long cache, a few queries, and many: on both sides of each bound.
    #[test]
    fn one_dispatch_pays_while_little_is_read_anew() {
        assert!(pays(1, 64, 512) && !pays(1, 65, 512));
        assert!(pays(8, 8 * 64, 512) && !pays(9, 9, 512));
        assert!(pays(1, 1, MOST_LATENT) && !pays(1, 1, MOST_LATENT + 8));
    }
}

//! Queries of a low rank for few tokens: norm, product and rotation in one.

use crate::adapter::AdapterClass;
use crate::cost::{Cost, times};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_multiples, check_nonzero};
use crate::storage::{Storage, product, rows_end, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params {
        tokens: u32, rank: u32, used: u32, x_row: u32, columns: u32, d_nope: u32, d_rope: u32, eps: f32,
        tiles_x: u32, tiles_y: u32, tiles_z: u32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[tokens, x_row]` f32: the latents of the queries come first in a row; 0 in their padding.
        x: Read,
        /// `[rank]` in `storage`, padded with zeros: of the norm.
        weight: Read,
        /// `[n_head · (d_nope + d_rope), rank]` in `storage`, padded with zeros.
        w: Read,
        /// `[tokens, d_rope / 2, 2]` f32: cos and sin of each pair; not bound without rotary parts.
        rotations: Read,
        /// `[tokens, n_head, d_nope + d_rope]` f32, written.
        q: Write,
    }
}

/// Queries to project.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueryProject {
    /// Tokens.
    pub tokens: u32,
    /// Width of a query's latent, whole 16-byte loads in `storage`.
    pub rank: u32,
    /// Its elements without padding: those that the norm counts.
    pub rank_used: u32,
    /// Elements of `x` from one token to the next; a multiple of 4.
    pub x_row: u32,
    /// Query heads.
    pub n_head: u32,
    /// Elements of a head before its rotary part; a multiple of 4.
    pub d_nope: u32,
    /// Rotary elements of a head, the pairs (2i, 2i+1) rotated; a multiple of 4, may be 0.
    pub d_rope: u32,
    /// Added to the mean square.
    pub eps: f32,
    /// Storage of the weights.
    pub storage: Storage,
}

impl QueryProject {
    fn columns(&self) -> u64 {
        product(&[self.n_head]).saturating_mul(u64::from(self.d_nope) + u64::from(self.d_rope))
    }
}

impl Op for QueryProject {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "query_project";
    const VARIANTS: &'static [Variant<Self>] = &[COLUMNS];

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("rank", self.rank), ("rank_used", self.rank_used)])?;
        check_multiples(self.storage.of_load(), &[("rank", self.rank)])?;
        check_multiples(4, &[("x_row", self.x_row), ("d_nope", self.d_nope), ("d_rope", self.d_rope)])?;
        if self.rank_used > self.rank || self.rank > self.x_row {
            return Err(format!("{} of {} elements, in rows of {}", self.rank_used, self.rank, self.x_row));
        }
        if !(4..1 << 31).contains(&self.columns()) {
            return Err(format!("{} columns, must be at least 4 and below 2^31", self.columns()));
        }
        Ok(())
    }

    fn params(&self, plan: &Plan) -> Params {
        let [tiles_x, tiles_y, tiles_z] = plan.tiles;
        Params {
            tokens: self.tokens,
            rank: self.rank,
            used: self.rank_used,
            x_row: self.x_row,
            // Checked to fit.
            columns: self.columns() as u32,
            d_nope: self.d_nope,
            d_rope: self.d_rope,
            eps: self.eps,
            tiles_x,
            tiles_y,
            tiles_z,
        }
    }

    fn bytes(&self) -> Args<u64> {
        let rows = |elements: u64| words(if self.tokens == 0 { 0 } else { elements });
        Args {
            x: rows(rows_end(0, self.tokens, self.x_row, self.rank)),
            weight: self.storage.sized(self.rank.into()),
            w: self.storage.sized(self.columns().saturating_mul(self.rank.into())),
            rotations: words(product(&[self.tokens, self.d_rope])),
            q: words(product(&[self.tokens]).saturating_mul(self.columns())),
        }
    }

    fn cost(&self) -> Cost {
        let QueryProject { tokens, rank, n_head, d_nope, d_rope, storage, .. } = *self;
        let head = d_nope.saturating_add(d_rope);
        Cost::of(
            &[
                times(2, &[tokens, rank, n_head, head]),
                // As in `norm` and `rope`.
                times(4, &[tokens, rank]),
                times(3, &[tokens]),
                times(3, &[tokens, n_head, d_rope]),
            ],
            &[
                times(4, &[tokens, rank]),
                times(storage.bytes(), &[rank]),
                times(storage.bytes(), &[rank, n_head, head]),
                times(4, &[tokens, d_rope]),
                times(4, &[tokens, n_head, head]),
            ],
        )
    }
}

/// In 16-byte loads. (WORKGROUP, LANES): LANES invocations share four columns of up to four tokens.
pub(crate) const COLUMNS: Variant<QueryProject> = {
    const TUNINGS: &[(u32, u32)] = &[(8, 1), (64, 16), (64, 32)];
    Variant::<QueryProject>::new(
        ("query_project", include_str!("../../shaders/query_project.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            let (workgroup, lanes) = TUNINGS[setting];
            let single = op.tokens == 1;
            let sums = if lanes == 1 { 1 } else { workgroup * if single { 2 } else { 5 } };
            // Checked to fit.
            let columns = op.columns() as u32;
            let grid = Grid::Tiled { size: [columns, op.tokens, 1], tile: [4 * workgroup / lanes, 4, 1] };
            Ok(Draft::new(workgroup, grid)
                .with([("STORAGE_F16", op.storage.constant())])
                .with([("WORKGROUP", workgroup), ("LANES", lanes), ("SINGLE", u32::from(single))])
                .bytes(16 * sums)
                .walks("rank", op.rank, 4 * lanes))
        },
        |_, _, plan| {
            let (workgroup, lanes) = (plan.value("WORKGROUP"), plan.value("LANES"));
            hold(&[
                (lanes.is_power_of_two(), "lanes join in pairs"),
                (plan.tile() == [4 * workgroup / lanes.max(1), 4, 1], "a workgroup has four tokens of its columns"),
            ])
        },
    )
    .auto(|op, context| match context.class {
        AdapterClass::Software => 0,
        _ if op.rank < 512 => 1,
        _ => 2,
    })
};

crate::vary!(QueryProject { tokens, rank, rank_used, x_row, n_head, d_nope, d_rope, eps, storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for QueryProject {
    fn samples() -> Vec<Self> {
        let mut all = Vec::new();
        for (tokens, storage) in [0, 1, 3, 4, 5, 8, 9].iter().flat_map(|&n| Storage::ALL.map(|storage| (n, storage))) {
            for (rank, n_head, d_nope, d_rope) in [(8, 1, 8, 0), (8, 3, 0, 8), (24, 9, 16, 8), (1536, 5, 128, 64)] {
                let (rank_used, x_row, eps) = (rank - 3, rank + 16, 1e-6);
                all.push(QueryProject { tokens, rank, rank_used, x_row, n_head, d_nope, d_rope, eps, storage });
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let (tokens, rank, rank_used, x_row, n_head, d_nope, d_rope, eps) = (3, 8, 7, 12, 2, 8, 4, 1e-6);
        let op = QueryProject { tokens, rank, rank_used, x_row, n_head, d_nope, d_rope, eps, storage: Storage::F16 };
        // 3·8·24 multiply-adds, the norm 3·(8·4 + 3), 3·2·2 pairs of 6. In: 3·8·4, weights 8·2 and 24·8·2, cos and sin 3·4·4.
        // Out: 3·24·4.
        vec![(op, Cost { flops: 1152 + 105 + 72, bytes: 96 + 16 + 384 + 48 + 288 })]
    }
}

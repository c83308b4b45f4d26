//! Combines the partial results of a query and projects its values to the layer's output, in one.

use super::matmul::FEW_ROWS;
use crate::adapter::AdapterClass;
use crate::cost::{Cost, times, when};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_multiples, check_nonzero, flag};
use crate::storage::{Storage, product, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { tokens: u32, n_head: u32, columns: u32, tiles_x: u32, tiles_y: u32, tiles_z: u32 }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[splits, n_head, d_value]` f32.
        partial_values: Read,
        /// `[splits, n_head, 2]` f32 (m, l).
        partial_softmax: Read,
        /// `[tokens, 2]` u32: first split and splits of each query.
        ranges: Read,
        /// `[columns, n_head · d_value]` in `storage`.
        w: Read,
        /// `[columns]` in `storage`; not bound without a bias.
        bias: Read,
        /// `[tokens, columns]` f32, written; the bias for a query without any key.
        y: Write,
    }
}

/// Splits to combine and to project.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutputProject {
    /// Queries.
    pub tokens: u32,
    /// Query heads.
    pub n_head: u32,
    /// Value width; whole 16-byte loads in `storage`. At most [`MOST_VALUES`] for all heads.
    pub d_value: u32,
    /// Width of the output.
    pub columns: u32,
    /// Splits of all queries.
    pub splits: u32,
    /// A bias of `columns` elements is added.
    pub bias: bool,
    /// Storage of `w` and `bias`.
    pub storage: Storage,
}

/// Most values of all heads: combined ones stay in workgroup memory, within WebGPU's default limit.
pub const MOST_VALUES: u32 = 2048;

/// Most splits per query: one running sum over more would lose digits.
const FEW_SPLITS: u32 = 64;

/// Most partial values of a query that every tile of columns may combine anew, and most products that may read the weights of every
/// query anew.
const FEW_VALUES: u64 = 1 << 15;
const FEW_PRODUCTS: u64 = 1 << 22;

impl OutputProject {
    /// Whether to combine and project in one dispatch. Every tile of columns reads the partial results and every query the weights anew:
    /// with many of either, two dispatches read less.
    pub(crate) fn pays(&self) -> bool {
        let OutputProject { tokens, n_head, d_value, columns, splits, .. } = *self;
        let width = product(&[n_head, d_value]);
        tokens <= FEW_ROWS
            && width <= MOST_VALUES.into()
            && splits <= tokens.saturating_mul(FEW_SPLITS)
            && product(&[splits]).saturating_mul(width) <= FEW_VALUES.saturating_mul(tokens.into())
            && product(&[tokens, columns]).saturating_mul(width) <= FEW_PRODUCTS
    }
}

impl Op for OutputProject {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "output_project";
    const VARIANTS: &'static [Variant<Self>] = &[TILES];

    fn validate(&self) -> Result<(), String> {
        let OutputProject { n_head, d_value, columns, .. } = *self;
        check_nonzero(&[("n_head", n_head), ("d_value", d_value), ("columns", columns)])?;
        check_multiples(self.storage.of_load(), &[("d_value", d_value)])?;
        let width = product(&[n_head, d_value]);
        if width > MOST_VALUES.into() {
            return Err(format!("{width} values of all heads, must be at most {MOST_VALUES}"));
        }
        Ok(())
    }

    fn params(&self, plan: &Plan) -> Params {
        let [tiles_x, tiles_y, tiles_z] = plan.tiles;
        let OutputProject { tokens, n_head, columns, .. } = *self;
        Params { tokens, n_head, columns, tiles_x, tiles_y, tiles_z }
    }

    fn bytes(&self) -> Args<u64> {
        let OutputProject { tokens, n_head, d_value, columns, splits, bias, storage } = *self;
        Args {
            partial_values: words(product(&[splits, n_head, d_value])),
            partial_softmax: words(product(&[splits, n_head, 2])),
            ranges: words(product(&[tokens, 2])),
            w: storage.sized(product(&[columns, n_head, d_value])),
            bias: storage.sized(if bias { columns.into() } else { 0 }),
            y: words(product(&[tokens, columns])),
        }
    }

    fn cost(&self) -> Cost {
        let OutputProject { tokens, n_head, d_value, columns, splits, bias, storage } = *self;
        Cost::of(
            &[
                // As in `attention_combine`, without lse, and in `matmul`.
                times(2, &[splits, n_head, d_value]),
                times(5, &[splits, n_head]),
                times(1, &[tokens, n_head, d_value]),
                times(1, &[tokens, n_head]),
                times(2, &[tokens, n_head, d_value, columns]),
                when(bias, times(1, &[tokens, columns])),
            ],
            &[
                times(4, &[splits, n_head, d_value]),
                times(8, &[splits, n_head]),
                times(8, &[tokens]),
                times(storage.bytes(), &[columns, n_head, d_value]),
                when(bias, times(storage.bytes(), &[columns])),
                times(4, &[tokens, columns]),
            ],
        )
    }
}

/// (WORKGROUP, LANES): LANES invocations share a column.
pub(crate) const TILES: Variant<OutputProject> = {
    const TUNINGS: &[(u32, u32)] = &[(128, 1), (256, 16), (256, 32)];
    Variant::<OutputProject>::new(
        ("output_project", include_str!("../../shaders/output_project.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            let (workgroup, lanes) = TUNINGS[setting];
            let grid = Grid::Tiled { size: [op.columns, op.tokens, 1], tile: [workgroup / lanes, 1, 1] };
            let sums = if lanes == 1 { 1 } else { workgroup };
            // Checked to be few.
            let values = op.n_head * op.d_value;
            Ok(Draft::new(workgroup, grid)
                .with([("STORAGE_F16", op.storage.constant())])
                .with([("HAS_BIAS", flag(op.bias))])
                .with([("FOURS", values / 4), ("WORKGROUP", workgroup), ("LANES", lanes)])
                .bytes(4 * values + 4 * sums)
                .walks("splits", op.splits, 1))
        },
        |_, _, plan| {
            let [workgroup, lanes] = ["WORKGROUP", "LANES"].map(|name| plan.value(name));
            hold(&[
                (lanes.is_power_of_two(), "lanes join in pairs"),
                (plan.tile() == [workgroup / lanes.max(1), 1, 1], "a workgroup has whole columns"),
            ])
        },
    )
    // Barriers are slow in software.
    .auto(|op, context| match context.class {
        AdapterClass::Software => 0,
        _ if op.n_head * op.d_value < 1024 => 1,
        _ => 2,
    })
};

crate::vary!(OutputProject { tokens, n_head, d_value, columns, splits, bias, storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for OutputProject {
    fn samples() -> Vec<Self> {
        let mut all = Vec::new();
        for (tokens, storage) in [0, 1, 3, 8].iter().flat_map(|&n| Storage::ALL.map(|storage| (n, storage))) {
            for (n_head, d_value, columns) in [(1, 8, 5), (3, 24, 72), (12, 64, 768), (16, 128, 2048)] {
                for (each, bias) in [(4, false), (64, true)] {
                    let splits = each * tokens;
                    all.push(OutputProject { tokens, n_head, d_value, columns, splits, bias, storage });
                }
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let (tokens, n_head, d_value, columns, splits, bias, storage) = (2, 3, 8, 5, 4, true, Storage::F16);
        let op = OutputProject { tokens, n_head, d_value, columns, splits, bias, storage };
        // 4 splits · 3 heads · (2·8 + 5), 2 queries · 3 heads · (8 + 1), 2·24·5 multiply-adds, 2·5 additions.
        // In: 12·(32 + 8), 2·8, weights 5·24·2, bias 5·2. Out: 2·5·4.
        vec![(op, Cost { flops: 252 + 54 + 480 + 10, bytes: 480 + 16 + 240 + 10 + 40 })]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The paper's 120M layer and wider ones, one query and more: on both sides of each bound.
    #[test]
    fn one_dispatch_pays_while_little_is_read_anew() {
        let op = OutputProject {
            tokens: 1,
            n_head: 12,
            d_value: 64,
            columns: 768,
            splits: 42,
            bias: false,
            storage: Storage::F16,
        };
        assert!(op.pays() && !OutputProject { splits: 43, ..op }.pays());
        assert!(OutputProject { tokens: 7, splits: 7 * 42, ..op }.pays() && !OutputProject { tokens: 8, ..op }.pays());
        let wide = OutputProject { n_head: 16, d_value: 128, columns: 2048, splits: 16, ..op };
        assert!(wide.pays() && !OutputProject { columns: 2056, ..wide }.pays());
        assert!(!OutputProject { n_head: 17, columns: 8, splits: 1, ..wide }.pays());
        let narrow = OutputProject { n_head: 1, splits: 64, ..op };
        assert!(!OutputProject { tokens: 9, splits: 9, ..narrow }.pays());
        assert!(narrow.pays() && !OutputProject { splits: 65, ..narrow }.pays());
    }
}

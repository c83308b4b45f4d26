//! Products of cooperative matrices in registers: the adapter's f16 rate.

use crate::adapter::{Cooperative, PlanContext};
use crate::cost::{Cost, times};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan};
use crate::storage::{product, words};

/// Matrices of `x`: two left factors, four right ones.
pub const FACTORS: u32 = 6;

/// Matrices of `y` per workgroup, and products per iteration.
pub const PRODUCTS: u32 = 8;

crate::params! {
    /// Uniform parameters, as in the shaders.
    pub struct Params { groups: u32, iterations: u32 }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[6, side, side]` f32, rounded to f16.
        x: Read,
        /// `[groups, 8, side, side]` f32, written.
        y: Write,
    }
}

/// Eight sums of `iterations` equal products, `groups` times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RooflineCooperative {
    /// Workgroups of one subgroup each.
    pub groups: u32,
    /// Iterations of the loop.
    pub iterations: u32,
    /// Rows and columns of a matrix: 16 or 8.
    pub side: u32,
}

impl Op for RooflineCooperative {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "roofline_cooperative";
    const VARIANTS: &'static [Variant<Self>] = &[BY_16, BY_8];

    fn params(&self, _: &Plan) -> Params {
        Params { groups: self.groups, iterations: self.iterations }
    }

    fn bytes(&self) -> Args<u64> {
        let matrices = |count: u32| words(product(&[count, self.side, self.side]));
        Args { x: matrices(FACTORS), y: matrices(self.groups.saturating_mul(PRODUCTS)) }
    }

    fn cost(&self) -> Cost {
        let RooflineCooperative { groups, iterations, side } = *self;
        Cost::of(
            &[times(2, &[groups, iterations, PRODUCTS, side, side, side])],
            &[times(4, &[FACTORS, side, side]), times(4, &[groups, PRODUCTS, side, side])],
        )
    }
}

pub(crate) const BY_16: Variant<RooflineCooperative> = Variant::<RooflineCooperative>::new(
    ("roofline_cooperative", include_str!("../../shaders/roofline_cooperative.wgsl")),
    1,
    |op, context, _| by_matrices(op, 16, context),
    whole_subgroup,
)
.cooperative(Cooperative::BY_16)
.preferred(|op, _| op.side == 16);

pub(crate) const BY_8: Variant<RooflineCooperative> = Variant::<RooflineCooperative>::new(
    ("roofline_cooperative_8", include_str!("../../shaders/roofline_cooperative_8.wgsl")),
    1,
    |op, context, _| by_matrices(op, 8, context),
    whole_subgroup,
)
.cooperative(Cooperative::BY_8)
.preferred(|op, _| op.side == 8);

fn by_matrices(op: &RooflineCooperative, side: u32, context: &PlanContext) -> Result<Draft, String> {
    if op.side != side {
        return Err(format!("matrices of {0} × {0}, not of {1} × {1}", side, op.side));
    }
    let workgroup = context.widest_subgroup();
    Ok(Draft::new(workgroup, Grid::Folded { items: op.groups.into(), each: 1 })
        .with([("WORKGROUP", workgroup)])
        .bytes((2 * FACTORS + 4 * PRODUCTS) * side * side)
        .walks("iterations", op.iterations, 1))
}

fn whole_subgroup(_: &RooflineCooperative, context: &PlanContext, plan: &Plan) -> Result<(), &'static str> {
    hold(&[(plan.workgroup_size == context.widest_subgroup(), "a workgroup is a whole subgroup")])
}

crate::vary!(RooflineCooperative { groups, iterations, side });

#[cfg(feature = "check")]
impl crate::sample::Sampled for RooflineCooperative {
    fn samples() -> Vec<Self> {
        let sides = |groups| [16, 8].map(|side| RooflineCooperative { groups, iterations: 3, side });
        crate::sample::ROWS.into_iter().flat_map(sides).collect()
    }

    fn counted() -> Vec<(Self, Cost)> {
        // 3 groups · 5 iterations · 8 products of 16 · 16 · 16 multiply-adds. x 6·16·16·4, y 3·8·16·16·4; then with 8 for 16.
        let of = |side, multiply_adds: u64, bytes| {
            (
                RooflineCooperative { groups: 3, iterations: 5, side },
                Cost { flops: 2 * 3 * 5 * 8 * multiply_adds, bytes },
            )
        };
        vec![of(16, 4096, 6144 + 24576), of(8, 512, 1536 + 6144)]
    }
}

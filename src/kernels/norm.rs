//! RMSNorm and LayerNorm of vectors.

use crate::adapter::{AdapterClass, PlanContext};
use crate::cost::{Cost, times};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_multiples, check_nonzero, flag};
use crate::storage::{Storage, UNIT, padded_width, product, rows_end, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params {
        rows: u32, width: u32, used: u32, x_offset: u32, x_row: u32, eps: f32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// f32, rows as in [`Norm`].
        x: Read,
        /// `[width]`, padded with zeros to [`UNIT`] elements, in `storage`.
        weight: Read,
        /// The same; not bound without a bias.
        bias: Read,
        /// `[rows, width]` f32, padded likewise; written.
        y: Write,
    }
}

/// Which norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `x / √(mean(x²) + eps) · weight`
    Rms,
    /// `(x − mean) / √(var + eps) · weight`, plus the bias
    Layer,
}

/// Vectors to normalise, one per row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Rows.
    pub rows: u32,
    /// Elements that a norm spans.
    pub width: u32,
    /// First element of `x`; a multiple of 4.
    pub x_offset: u32,
    /// From one row of `x` to the next; a multiple of 4.
    pub x_row: u32,
    /// Added to the mean square or variance.
    pub eps: f32,
    /// RMSNorm or LayerNorm.
    pub kind: Kind,
    /// A bias is added.
    pub bias: bool,
    /// Storage of weight and bias.
    pub storage: Storage,
}

impl Op for Norm {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "norm";
    const VARIANTS: &'static [Variant<Self>] = &[ROWS];

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("width", self.width)])?;
        check_multiples(4, &[("x_offset", self.x_offset), ("x_row", self.x_row)])
    }

    fn params(&self, _: &Plan) -> Params {
        let Norm { rows, width: used, x_offset, x_row, eps, .. } = *self;
        Params { rows, width: padded_width(used), used, x_offset, x_row, eps }
    }

    fn bytes(&self) -> Args<u64> {
        let whole = padded_width(self.width);
        let stored = |elements: u32| self.storage.sized(elements.into());
        Args {
            x: words(rows_end(self.x_offset, self.rows, self.x_row, whole)),
            weight: stored(whole),
            bias: stored(if self.bias { whole } else { 0 }),
            y: words(product(&[self.rows, whole])),
        }
    }

    fn cost(&self) -> Cost {
        let Norm { rows, width, kind, bias, storage, .. } = *self;
        // Square and sum, scale, weight; LayerNorm also sums and centres.
        let (element, row) = match kind {
            Kind::Rms => (4, 3),
            Kind::Layer => (6, 4),
        };
        Cost::of(
            &[times(element + u64::from(bias), &[rows, width]), times(row, &[rows])],
            &[times(8, &[rows, width]), times(storage.bytes() * (1 + u64::from(bias)), &[width])],
        )
    }
}

/// (WORKGROUP, LANES) of the kernels whose LANES invocations share a vector in 16-byte loads; powers of two, as the reduction
/// needs.
pub(super) const ROW_LANES: &[(u32, u32)] = &[(8, 1), (64, 16), (64, 64), (256, 256)];

/// Index into [`ROW_LANES`]: on a CPU one invocation per vector, without a reduction; on a GPU a few loads per invocation.
pub(super) fn row_lanes(context: &PlanContext, width: u32) -> usize {
    match (context.class, width) {
        (AdapterClass::Software, _) => 0,
        (_, 0..256) => 1,
        (_, 256..2048) => 2,
        (_, 2048..) => 3,
    }
}

/// Assumptions of the kernels of [`ROW_LANES`].
pub(super) fn whole_rows<O>(_: &O, _: &PlanContext, plan: &Plan) -> Result<(), &'static str> {
    let lanes = plan.value("LANES");
    hold(&[
        (lanes.is_power_of_two(), "the lanes of a row are a power of two"),
        (plan.value("WORKGROUP").is_multiple_of(lanes.max(1)), "a workgroup has whole rows"),
    ])
}

/// In 16-byte loads and stores.
pub(crate) const ROWS: Variant<Norm> = Variant::<Norm>::new(
    ("norm", include_str!("../../shaders/norm.wgsl")),
    ROW_LANES.len(),
    |op, _, setting| {
        let (workgroup, lanes) = ROW_LANES[setting];
        let step = (4 * lanes).min(64);
        Ok(Draft::new(workgroup, Grid::Folded { items: op.rows.into(), each: workgroup / lanes })
            .with([
                ("STORAGE_F16", op.storage.constant()),
                ("CENTER", flag(op.kind == Kind::Layer)),
                ("HAS_BIAS", flag(op.bias)),
                ("PADDED", flag(!op.width.is_multiple_of(UNIT))),
            ])
            .with([("WORKGROUP", workgroup), ("LANES", lanes)])
            .bytes(16 * if lanes == 1 { 1 } else { workgroup })
            .walks("width", op.width, step))
    },
    whole_rows,
)
.auto(|op, context| row_lanes(context, op.width));

crate::vary!(Norm { rows, width, x_offset, x_row, eps, kind, bias, storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for Norm {
    fn samples() -> Vec<Self> {
        // Odd widths, then widths for one to many lanes.
        let widths = [3, 8, 24, 1024, 4096];
        let switches = [(Kind::Rms, false), (Kind::Rms, true), (Kind::Layer, false), (Kind::Layer, true)];
        let mut all = Vec::new();
        for (rows, storage) in
            crate::sample::ROWS.into_iter().flat_map(|rows| Storage::ALL.map(|storage| (rows, storage)))
        {
            for ((kind, bias), width) in switches.into_iter().flat_map(|s| widths.map(|width| (s, width))) {
                let (x_offset, x_row, eps) = (0, padded_width(width), 1e-6);
                all.push(Norm { rows, width, x_offset, x_row, eps, kind, bias, storage });
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let of = |width, kind, bias| {
            let (rows, x_offset, x_row, eps, storage) = (2, 0, width, 1e-5, Storage::F16);
            Norm { rows, width, x_offset, x_row, eps, kind, bias, storage }
        };
        vec![
            // LayerNorm with bias: 2·5·7 + 2·4. In and out 2·5·8, weight and bias 5·4.
            (of(5, Kind::Layer, true), Cost { flops: 70 + 8, bytes: 80 + 20 }),
            // RMSNorm: 2·24·4 + 2·3. In and out 2·24·8, weights 24·2.
            (of(24, Kind::Rms, false), Cost { flops: 192 + 6, bytes: 384 + 48 }),
        ]
    }
}

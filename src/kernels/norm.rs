//! RMSNorm and LayerNorm of vectors.

use crate::adapter::{AdapterClass, PlanContext};
use crate::cost::{Cost, times};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_multiples, check_nonzero, flag};
use crate::storage::{Storage, UNIT, padded_width, product, rows_end, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params {
        rows: u32, width: u32, second: u32, width_used: u32, second_used: u32, x_offset: u32, x_row: u32, eps: f32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// f32, rows as in [`Norm`].
        x: Read,
        /// `[width + second]`, each padded with zeros to [`UNIT`] elements, in `storage`.
        weight: Read,
        /// The same; not bound without a bias.
        bias: Read,
        /// `[rows, width + second]` f32, padded likewise; written.
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
    /// Elements of a second segment with its own norm, after the first and its padding; 0 for none.
    pub second: u32,
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

impl Norm {
    /// Elements of both segments in memory.
    fn whole(&self) -> u32 {
        padded_width(self.width).saturating_add(padded_width(self.second))
    }

    /// Segments of all rows.
    fn segments(&self) -> u64 {
        product(&[self.rows, if self.second > 0 { 2 } else { 1 }])
    }
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
        let Norm { rows, width, second, x_offset, x_row, eps, .. } = *self;
        let (width_used, second_used) = (width, second);
        let [width, second] = [width, second].map(padded_width);
        Params { rows, width, second, width_used, second_used, x_offset, x_row, eps }
    }

    fn bytes(&self) -> Args<u64> {
        let whole = self.whole();
        let stored = |elements: u32| self.storage.sized(elements.into());
        Args {
            x: words(rows_end(self.x_offset, self.rows, self.x_row, whole)),
            weight: stored(whole),
            bias: stored(if self.bias { whole } else { 0 }),
            y: words(product(&[self.rows, whole])),
        }
    }

    fn cost(&self) -> Cost {
        let Norm { rows, width, second, kind, bias, storage, .. } = *self;
        let (whole, segments) = (width.saturating_add(second), if second > 0 { 2 } else { 1 });
        // Square and sum, scale, weight; LayerNorm also sums and centres.
        let (element, row) = match kind {
            Kind::Rms => (4, 3),
            Kind::Layer => (6, 4),
        };
        Cost::of(
            &[times(element + u64::from(bias), &[rows, whole]), times(row, &[rows, segments])],
            &[times(8, &[rows, whole]), times(storage.bytes() * (1 + u64::from(bias)), &[whole])],
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
        let padded = [op.width, op.second].iter().any(|width| !width.is_multiple_of(UNIT));
        let step = (4 * lanes).min(64);
        Ok(Draft::new(workgroup, Grid::Folded { items: op.segments(), each: workgroup / lanes })
            .with([
                ("STORAGE_F16", op.storage.constant()),
                ("CENTER", flag(op.kind == Kind::Layer)),
                ("HAS_BIAS", flag(op.bias)),
                ("PADDED", flag(padded)),
            ])
            .with([("WORKGROUP", workgroup), ("LANES", lanes)])
            .bytes(16 * if lanes == 1 { 1 } else { workgroup })
            .walks("width", op.width, step)
            .walks("second", op.second, step))
    },
    whole_rows,
)
.auto(|op, context| row_lanes(context, op.width.max(op.second)));

crate::vary!(Norm { rows, width, second, x_offset, x_row, eps, kind, bias, storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for Norm {
    fn samples() -> Vec<Self> {
        // Odd widths, then widths for one to many lanes; with a second segment.
        let widths = [(3, 0), (3, 5), (8, 0), (1024, 0), (24, 4096)];
        let switches = [(Kind::Rms, false), (Kind::Rms, true), (Kind::Layer, false), (Kind::Layer, true)];
        let mut all = Vec::new();
        for (rows, storage) in
            crate::sample::ROWS.into_iter().flat_map(|rows| Storage::ALL.map(|storage| (rows, storage)))
        {
            for ((kind, bias), (width, second)) in switches.into_iter().flat_map(|s| widths.map(|width| (s, width))) {
                let (x_offset, x_row, eps) = (0, padded_width(width) + padded_width(second), 1e-6);
                all.push(Norm { rows, width, second, x_offset, x_row, eps, kind, bias, storage });
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let of = |(width, second), kind, bias| {
            let (rows, x_offset, x_row, eps, storage) = (2, 0, width + second, 1e-5, Storage::F16);
            Norm { rows, width, second, x_offset, x_row, eps, kind, bias, storage }
        };
        vec![
            // LayerNorm with bias: 2·5·7 + 2·4. In and out 2·5·8, weight and bias 5·4.
            (of((5, 0), Kind::Layer, true), Cost { flops: 70 + 8, bytes: 80 + 20 }),
            // RMSNorm of two segments: 2·(8 + 16)·4 + 2·2·3. In and out 2·24·8, weights 24·2.
            (of((8, 16), Kind::Rms, false), Cost { flops: 192 + 12, bytes: 384 + 48 }),
        ]
    }
}

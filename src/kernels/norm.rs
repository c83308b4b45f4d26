//! RMSNorm and LayerNorm of rows.

use crate::adapter::{AdapterClass, PlanContext};
use crate::cost::{Cost, times};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_nonzero, flag};
use crate::storage::{Storage, product, rows_end, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { rows: u32, width: u32, second: u32, x_offset: u32, x_row: u32, eps: f32 }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// f32, rows as in [`Norm`].
        x: Read,
        /// `[width + second]` in `storage`.
        weight: Read,
        /// `[width + second]` in `storage`; not bound without a bias.
        bias: Read,
        /// `[rows, width + second]` f32, written.
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

/// Rows to normalise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Rows.
    pub rows: u32,
    /// Elements that a norm spans.
    pub width: u32,
    /// Elements of a second segment, right behind the first, with a norm of its own; 0 for none.
    pub second: u32,
    /// First element of `x`.
    pub x_offset: u32,
    /// From one row of `x` to the next.
    pub x_row: u32,
    /// Added to the mean square or variance.
    pub eps: f32,
    /// RMSNorm or LayerNorm.
    pub kind: Kind,
    /// A bias is added.
    pub bias: bool,
    /// How weight and bias are stored.
    pub storage: Storage,
}

impl Norm {
    /// Whether every segment of every tensor is a whole number of 16-byte loads that begin on 16-byte boundaries.
    pub fn in_vec4(&self) -> bool {
        [self.x_offset, self.x_row].iter().all(|step| step.is_multiple_of(4))
            && [self.width, self.second].iter().all(|width| width.is_multiple_of(16 / self.storage.bytes() as u32))
    }

    /// Segments of all rows.
    fn segments(&self) -> u64 {
        product(&[self.rows, if self.second > 0 { 2 } else { 1 }])
    }

    /// A draft with `each` segments a workgroup, whose widths are walked `step` elements at a time.
    fn draft(&self, workgroup_size: u32, each: u32, step: u32) -> Draft {
        Draft::new(workgroup_size, Grid::Folded { items: self.segments(), each })
            .with([
                ("STORAGE_F16", self.storage.constant()),
                ("CENTER", flag(self.kind == Kind::Layer)),
                ("HAS_BIAS", flag(self.bias)),
            ])
            .with([("WORKGROUP", workgroup_size)])
            .walks("width", self.width, step)
            .walks("second", self.second, step)
    }
}

impl Op for Norm {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "norm";
    const VARIANTS: &'static [Variant<Self>] = &[VEC4, ROWS];

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("width", self.width)])
    }

    fn params(&self, _: &Plan) -> Params {
        let Norm { rows, width, second, x_offset, x_row, eps, .. } = *self;
        Params { rows, width, second, x_offset, x_row, eps }
    }

    fn bytes(&self) -> Args<u64> {
        let whole = self.width.saturating_add(self.second);
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

/// Workgroup sizes of the kernels that give a workgroup to a row; powers of two, as the reduction needs.
pub(super) const ROW_WORKGROUPS: &[u32] = &[64, 256, 32];

/// (WORKGROUP, LANES) of the kernels whose invocations share a row in 16-byte loads; powers of two, as putting the parts of a
/// row together needs.
pub(super) const ROW_LANES: &[(u32, u32)] = &[(8, 1), (64, 16), (64, 64), (256, 256)];

/// Index into [`ROW_LANES`]: on a CPU every lane of a vector has a row of its own and nothing is put together; on a GPU
/// an invocation has a few loads.
pub(super) fn row_lanes(context: &PlanContext, width: u32) -> usize {
    match (context.class, width) {
        (AdapterClass::Software, _) => 0,
        (_, 0..256) => 1,
        (_, 256..2048) => 2,
        (_, 2048..) => 3,
    }
}

/// What the kernels of [`ROW_LANES`] take for granted.
pub(super) fn whole_rows<O>(_: &O, _: &PlanContext, plan: &Plan) -> Result<(), &'static str> {
    let lanes = plan.value("LANES");
    hold(&[
        (lanes.is_power_of_two(), "the lanes of a row are a power of two"),
        (plan.value("WORKGROUP").is_multiple_of(lanes.max(1)), "a workgroup has whole rows"),
    ])
}

/// A power of two, for reductions that halve.
pub(super) fn halving<O>(_: &O, _: &PlanContext, plan: &Plan) -> Result<(), &'static str> {
    hold(&[(plan.workgroup_size.is_power_of_two(), "reductions halve: a workgroup is a power of two")])
}

/// Any widths: a workgroup a row.
pub(crate) const ROWS: Variant<Norm> = Variant::<Norm>::new(
    ("norm", include_str!("../../shaders/norm.wgsl")),
    ROW_WORKGROUPS.len(),
    |op, _, setting| {
        let workgroup = ROW_WORKGROUPS[setting];
        Ok(op.draft(workgroup, 1, workgroup.min(64)).bytes(4 * workgroup))
    },
    halving,
);

/// In 16-byte loads and stores.
pub(crate) const VEC4: Variant<Norm> = Variant::<Norm>::new(
    ("norm_vec4", include_str!("../../shaders/norm_vec4.wgsl")),
    ROW_LANES.len(),
    |op, _, setting| {
        if !op.in_vec4() {
            return Err("segments must be whole 16-byte loads on 16-byte boundaries".to_owned());
        }
        let (workgroup, lanes) = ROW_LANES[setting];
        Ok(op
            .draft(workgroup, workgroup / lanes, (4 * lanes).min(64))
            .with([("LANES", lanes)])
            .bytes(16 * if lanes == 1 { 1 } else { workgroup }))
    },
    whole_rows,
)
.auto(|op, context| row_lanes(context, op.width.max(op.second)))
.preferred(|op, _| op.in_vec4());

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
                let (x_offset, x_row, eps) = (0, width + second, 1e-6);
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

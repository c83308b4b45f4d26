//! The embedding gate of EG-MLA: activation, modulation, norm, and the norm's statistics.

use super::norm::{ROW_WORKGROUPS, halving, row_lanes, whole_rows};
use crate::adapter::AdapterClass;
use crate::config::{Activation, GateNorm};
use crate::cost::{Cost, times, when};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_nonzero, flag};
use crate::storage::{Storage, product, rows_end, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { rows: u32, width: u32, x_offset: u32, x_row: u32, eps: f32 }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// f32, rows as in [`Gate`]: keys and values, or latents.
        x: Read,
        /// `[rows, width]` f32: the projected gate before its activation.
        g: Read,
        /// `[width]` in `storage`; not bound without a norm.
        weight: Read,
        /// `[width]` in `storage`; bound for `layer_norm` alone.
        bias: Read,
        /// `[rows]` u32: the statistics row of each row, `u32::MAX` for none; not bound without statistics.
        slots: Read,
        /// `[rows, width]` f32, written.
        y: Write,
        /// `[statistics_rows, 2]` f32 (μ, ρ), written at the slots; not bound without statistics.
        statistics: Write,
    }
}

/// Rows to gate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gate {
    /// Rows.
    pub rows: u32,
    /// Elements that the gate and its norm span.
    pub width: u32,
    /// First element of `x`.
    pub x_offset: u32,
    /// From one row of `x` to the next.
    pub x_row: u32,
    /// Added to the mean square or variance.
    pub eps: f32,
    /// Applied to `g`.
    pub activation: Activation,
    /// Applied to the product.
    pub norm: GateNorm,
    /// Rows of the statistics buffer; 0 when none are written.
    pub statistics_rows: u32,
    /// How weight and bias are stored.
    pub storage: Storage,
}

impl Gate {
    /// Whether every row of every tensor is a whole number of 16-byte loads that begin on 16-byte boundaries.
    pub fn in_vec4(&self) -> bool {
        [self.x_offset, self.x_row].iter().all(|step| step.is_multiple_of(4))
            && self.width.is_multiple_of(16 / self.storage.bytes() as u32)
    }

    fn draft(&self, workgroup_size: u32, each: u32, step: u32) -> Draft {
        Draft::new(workgroup_size, Grid::Folded { items: self.rows.into(), each })
            .with([
                ("STORAGE_F16", self.storage.constant()),
                ("ACTIVATION", f64::from(self.activation as u32)),
                ("NORM", f64::from(self.norm as u32)),
                ("WRITE_STATISTICS", flag(self.statistics_rows > 0)),
            ])
            .with([("WORKGROUP", workgroup_size)])
            .walks("width", self.width, step)
    }
}

impl Op for Gate {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "gate";
    const VARIANTS: &'static [Variant<Self>] = &[VEC4, ROWS];

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("width", self.width)])
    }

    fn params(&self, _: &Plan) -> Params {
        let Gate { rows, width, x_offset, x_row, eps, .. } = *self;
        Params { rows, width, x_offset, x_row, eps }
    }

    fn bytes(&self) -> Args<u64> {
        let Gate { rows, width, norm, statistics_rows, storage, .. } = *self;
        let stored = |on: bool| storage.sized(if on { width.into() } else { 0 });
        let all = words(product(&[rows, width]));
        Args {
            x: words(rows_end(self.x_offset, rows, self.x_row, width)),
            g: all,
            weight: stored(norm != GateNorm::None),
            bias: stored(norm == GateNorm::LayerNorm),
            slots: words(if statistics_rows > 0 { rows.into() } else { 0 }),
            y: all,
            statistics: words(2 * u64::from(statistics_rows)),
        }
    }

    fn cost(&self) -> Cost {
        let Gate { rows, width, activation, norm, statistics_rows, storage, .. } = *self;
        // As in `norm`; the affine part of layer_norm has a bias.
        let (element, row, affine) = match norm {
            GateNorm::LayerNorm => (7, 4, 2),
            GateNorm::RmsNorm => (4, 3, 1),
            GateNorm::None => (0, 0, 0),
        };
        Cost::of(
            &[times(activation.flops() + 1 + element, &[rows, width]), times(row, &[rows])],
            &[
                times(12, &[rows, width]),
                times(affine * storage.bytes(), &[width]),
                // A slot read and (μ, ρ) written.
                when(statistics_rows > 0, times(12, &[rows])),
            ],
        )
    }
}

/// Any widths: a workgroup a row.
pub(crate) const ROWS: Variant<Gate> = Variant::<Gate>::new(
    ("gate", include_str!("../../shaders/gate.wgsl")),
    ROW_WORKGROUPS.len(),
    |op, _, setting| {
        let workgroup = ROW_WORKGROUPS[setting];
        Ok(op.draft(workgroup, 1, workgroup).bytes(4 * workgroup))
    },
    halving,
);

/// From this many rows on an invocation takes several: enough workgroups are left for every core.
const MANY_ROWS: u32 = 512;

/// In 16-byte loads and stores. (WORKGROUP, LANES, ROWS): those of `norm_vec4`, then several rows an invocation.
pub(crate) const VEC4: Variant<Gate> = {
    const TUNINGS: &[(u32, u32, u32)] = &[(8, 1, 1), (64, 16, 1), (64, 64, 1), (256, 256, 1), (8, 1, 4)];
    Variant::<Gate>::new(
        ("gate_vec4", include_str!("../../shaders/gate_vec4.wgsl")),
        TUNINGS.len(),
        |op, context, setting| {
            if !op.in_vec4() {
                return Err("rows must be whole 16-byte loads on 16-byte boundaries".to_owned());
            }
            let (workgroup, lanes, rows) = TUNINGS[setting];
            // A GPU has the row in its cache and arithmetic to spare.
            let stash = u32::from(context.class == AdapterClass::Software);
            Ok(op
                .draft(workgroup, workgroup / lanes * rows, 4 * lanes)
                .with([("LANES", lanes), ("ROWS", rows), ("STASH", stash)])
                .bytes(16 * if lanes == 1 { 1 } else { workgroup }))
        },
        |op, context, plan| {
            whole_rows(op, context, plan)?;
            hold(&[([1, 4].contains(&plan.value("ROWS")), "rows of an invocation are unrolled by 1 or 4")])
        },
    )
    .auto(|op, context| {
        let software = context.class == AdapterClass::Software;
        if software && op.rows >= MANY_ROWS { 4 } else { row_lanes(context, op.width) }
    })
    .preferred(|op, _| op.in_vec4())
};

crate::vary!(Gate { rows, width, x_offset, x_row, eps, activation, norm, statistics_rows, storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for Gate {
    fn samples() -> Vec<Self> {
        let mut all = Vec::new();
        for (rows, storage) in
            crate::sample::ROWS.into_iter().flat_map(|rows| Storage::ALL.map(|storage| (rows, storage)))
        {
            for (activation, norm) in Activation::ALL.into_iter().flat_map(|a| GateNorm::ALL.map(|norm| (a, norm))) {
                for (width, statistics_rows) in [3, 8, 1024, 4096].into_iter().flat_map(|w| [0, 1].map(|s| (w, s))) {
                    let (x_offset, x_row, eps) = (0, width, 1e-5);
                    all.push(Gate { rows, width, x_offset, x_row, eps, activation, norm, statistics_rows, storage });
                }
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let of = |width, activation, norm, statistics_rows| {
            let (rows, x_offset, x_row, eps, storage) = (3, 0, width, 1e-5, Storage::F16);
            Gate { rows, width, x_offset, x_row, eps, activation, norm, statistics_rows, storage }
        };
        vec![
            // 3·7 · (sigmoid 3 + product 1 + layer_norm 7) + 3·4. Bytes: 3·7·(4 + 4 + 4), 2·7·2, 3·(4 + 8).
            (of(7, Activation::Sigmoid, GateNorm::LayerNorm, 9), Cost { flops: 231 + 12, bytes: 252 + 28 + 36 }),
            // A product an element; x, g and y.
            (of(8, Activation::Identity, GateNorm::None, 0), Cost { flops: 24, bytes: 288 }),
        ]
    }
}

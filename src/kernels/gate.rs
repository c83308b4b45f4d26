//! The embedding gate of EG-MLA: activation, modulation, norm, and the norm's statistics.

use super::norm::{row_lanes, whole_rows};
use crate::adapter::AdapterClass;
use crate::config::{Activation, GateNorm};
use crate::cost::{Cost, times, when};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, check_multiples, check_nonzero, flag};
use crate::storage::{Segments, Storage, product, rows_end, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params {
        rows: u32, width: u32, used: u32, first: u32, block: u32, first_used: u32, second_used: u32, x_offset: u32,
        x_row: u32, eps: f32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// f32, rows as in [`Gate`]: keys and values, or latents; 0 in the padding.
        x: Read,
        /// `[rows, width]` f32, `width` with its padding: the projected gate before its activation.
        g: Read,
        /// `[width]` in `storage`, padded with zeros; not bound without a norm.
        weight: Read,
        /// The same; bound for `layer_norm` alone.
        bias: Read,
        /// `[rows]` u32: the statistics row of each row, `u32::MAX` for none; not bound without statistics.
        slots: Read,
        /// `[rows, width]` in `y_storage`, written.
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
    /// Segments that the gate and its norm span.
    pub segments: Segments,
    /// First element of `x`; a multiple of 4.
    pub x_offset: u32,
    /// From one row of `x` to the next; a multiple of 4.
    pub x_row: u32,
    /// Added to the mean square or variance.
    pub eps: f32,
    /// Applied to `g`.
    pub activation: Activation,
    /// Applied to the product.
    pub norm: GateNorm,
    /// Rows of the statistics buffer; 0 when none are written.
    pub statistics_rows: u32,
    /// Storage of weight and bias.
    pub storage: Storage,
    /// Storage of `y`. As halves, finite values beyond ±65 504 become the largest half with their sign; infinities and NaN stay.
    pub y_storage: Storage,
}

impl Op for Gate {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "gate";
    const VARIANTS: &'static [Variant<Self>] = &[ROWS];

    fn validate(&self) -> Result<(), String> {
        check_nonzero(&[("count", self.segments.count), ("width", self.segments.width())])?;
        check_multiples(4, &[("x_offset", self.x_offset), ("x_row", self.x_row)])
    }

    fn params(&self, _: &Plan) -> Params {
        let Gate { rows, segments, x_offset, x_row, eps, .. } = *self;
        let ([first, block], [first_used, second_used]) = (segments.padded_parts(), segments.parts);
        let (width, used) = (segments.width(), segments.used());
        Params { rows, width, used, first, block, first_used, second_used, x_offset, x_row, eps }
    }

    fn bytes(&self) -> Args<u64> {
        let Gate { rows, norm, statistics_rows, storage, y_storage, .. } = *self;
        let width = self.segments.width();
        let stored = |on: bool| storage.sized(if on { width.into() } else { 0 });
        let all = product(&[rows, width]);
        Args {
            x: words(rows_end(self.x_offset, rows, self.x_row, width)),
            g: words(all),
            weight: stored(norm != GateNorm::None),
            bias: stored(norm == GateNorm::LayerNorm),
            slots: words(if statistics_rows > 0 { rows.into() } else { 0 }),
            y: y_storage.sized(all),
            statistics: words(2 * u64::from(statistics_rows)),
        }
    }

    fn cost(&self) -> Cost {
        let Gate { rows, activation, norm, statistics_rows, storage, y_storage, .. } = *self;
        let width = self.segments.used();
        // As in `norm`; the affine part of layer_norm has a bias.
        let (element, row, affine) = match norm {
            GateNorm::LayerNorm => (7, 4, 2),
            GateNorm::RmsNorm => (4, 3, 1),
            GateNorm::None => (0, 0, 0),
        };
        Cost::of(
            &[times(activation.flops() + 1 + element, &[rows, width]), times(row, &[rows])],
            &[
                times(8 + y_storage.bytes(), &[rows, width]),
                times(affine * storage.bytes(), &[width]),
                // A slot read and (μ, ρ) written.
                when(statistics_rows > 0, times(12, &[rows])),
            ],
        )
    }
}

/// From this many tokens on, several per invocation: workgroups still outnumber the cores.
const MANY_ROWS: u32 = 512;

/// In 16-byte loads and stores. (WORKGROUP, LANES, ROWS): settings of `norm`, then several tokens per invocation.
pub(crate) const ROWS: Variant<Gate> = {
    const TUNINGS: &[(u32, u32, u32)] = &[(8, 1, 1), (64, 16, 1), (64, 64, 1), (256, 256, 1), (8, 1, 4)];
    Variant::<Gate>::new(
        ("gate", include_str!("../../shaders/gate.wgsl")),
        TUNINGS.len(),
        |op, context, setting| {
            let (workgroup, lanes, rows) = TUNINGS[setting];
            // A GPU has the token's elements in its cache and arithmetic to spare.
            let stash = context.class == AdapterClass::Software && op.y_storage == Storage::F32;
            Ok(Draft::new(workgroup, Grid::Folded { items: op.rows.into(), each: workgroup / lanes * rows })
                .with([
                    ("STORAGE_F16", op.storage.constant()),
                    ("Y_F16", op.y_storage.constant()),
                    ("ACTIVATION", f64::from(op.activation as u32)),
                    ("NORM", f64::from(op.norm as u32)),
                    ("WRITE_STATISTICS", flag(op.statistics_rows > 0)),
                    ("PADDED", flag(op.segments.is_padded())),
                    ("STASH", flag(stash)),
                ])
                .with([("WORKGROUP", workgroup), ("LANES", lanes), ("ROWS", rows)])
                .bytes(16 * if lanes == 1 { 1 } else { workgroup })
                .walks("width", op.segments.width(), 4 * lanes))
        },
        |op, context, plan| {
            whole_rows(op, context, plan)?;
            hold(&[
                ([1, 4].contains(&plan.value("ROWS")), "rows of an invocation are unrolled by 1 or 4"),
                (plan.value("STASH") * plan.value("Y_F16") == 0, "y holds z in f32 alone"),
            ])
        },
    )
    .auto(|op, context| {
        let software = context.class == AdapterClass::Software;
        if software && op.rows >= MANY_ROWS { 4 } else { row_lanes(context, op.segments.width()) }
    })
};

crate::vary!(Gate { rows, segments, x_offset, x_row, eps, activation, norm, statistics_rows, storage, y_storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for Gate {
    fn samples() -> Vec<Self> {
        let mut all = Vec::new();
        let stored = [(Storage::F32, Storage::F32), (Storage::F16, Storage::F32), (Storage::F16, Storage::F16)];
        for (rows, (storage, y_storage)) in
            crate::sample::ROWS.into_iter().flat_map(|rows| stored.map(|stored| (rows, stored)))
        {
            for (activation, norm) in Activation::ALL.into_iter().flat_map(|a| GateNorm::ALL.map(|norm| (a, norm))) {
                let of = |(count, parts)| Segments { count, parts };
                let widths = [(1, [3, 0]), (3, [5, 9]), (1, [8, 0]), (8, [64, 64]), (1, [4096, 0])].map(of);
                for (segments, statistics_rows) in widths.into_iter().flat_map(|w| [0, 1].map(|s| (w, s))) {
                    let (x_offset, x_row, eps) = (0, segments.width(), 1e-5);
                    all.push(Gate {
                        rows,
                        segments,
                        x_offset,
                        x_row,
                        eps,
                        activation,
                        norm,
                        statistics_rows,
                        storage,
                        y_storage,
                    });
                }
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let of = |width, activation, norm, statistics_rows| {
            let (rows, segments, x_offset, eps, storage) = (3, Segments::one(width), 0, 1e-5, Storage::F16);
            let (x_row, y_storage) = (segments.width(), Storage::F32);
            Gate { rows, segments, x_offset, x_row, eps, activation, norm, statistics_rows, storage, y_storage }
        };
        vec![
            // 3·7 · (sigmoid 3 + product 1 + layer_norm 7) + 3·4. Bytes: 3·7·(4 + 4 + 4), 2·7·2, 3·(4 + 8).
            (of(7, Activation::Sigmoid, GateNorm::LayerNorm, 9), Cost { flops: 231 + 12, bytes: 252 + 28 + 36 }),
            // One product per element; x, g and y.
            (of(8, Activation::Identity, GateNorm::None, 0), Cost { flops: 24, bytes: 288 }),
            // y in halves.
            (
                Gate { y_storage: Storage::F16, ..of(8, Activation::Identity, GateNorm::None, 0) },
                Cost { flops: 24, bytes: 240 },
            ),
        ]
    }
}

//! Statistics of the gate's norm for new tokens, which the grouped decode needs.

use super::attention_grouped::sources;
use super::norm::{ROW_LANES, row_lanes, whole_rows};
use crate::config::{Activation, GateNorm};
use crate::cost::{Cost, times};
use crate::op::{Op, Variant};
use crate::plan::{Draft, Grid, MAX_ITERATIONS, Plan, check_nonzero, flag};
use crate::storage::{Segments, Storage, product, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params {
        tokens: u32, width: u32, used: u32, first: u32, block: u32, first_used: u32, second_used: u32, gate_pitch: u32, more_pitch: u32, resident: u32, more_first: u32, eps: f32,
    }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[tokens, width]` f32: keys and values before the gate.
        kv: Read,
        /// `[resident, pitch of width]` in `storage`: gate rows before their activation.
        gates: Read,
        /// `[more, pitch of width]` in `more_storage`.
        gates_more: Read,
        /// `[tokens]` u32 gate rows; `u32::MAX` for gate row `more_first + t` of `gates_more`.
        rows: Read,
        /// `[tokens]` u32 cache rows.
        slots: Read,
        /// `[cache_rows, 2]` f32 (μ, ρ), written at the slots.
        statistics: Write,
    }
}

/// Tokens to measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateStatistics {
    /// New tokens.
    pub tokens: u32,
    /// Segments that the norm spans.
    pub segments: Segments,
    /// Gate rows of `gates`; higher numbers are those of `gates_more`.
    pub resident: u32,
    /// Bound gate rows of `gates_more`.
    pub more: u32,
    /// Gate row of `gates_more` of the first token.
    pub more_first: u32,
    /// Cache rows.
    pub cache_rows: u32,
    /// Added to the mean square or variance.
    pub eps: f32,
    /// Applied to the gate rows.
    pub activation: Activation,
    /// `layer_norm` or `rms_norm`: without a norm there are no statistics.
    pub norm: GateNorm,
    /// Storage of `gates`.
    pub storage: Storage,
    /// Storage of `gates_more`.
    pub more_storage: Storage,
}

impl Op for GateStatistics {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "gate_statistics";
    const VARIANTS: &'static [Variant<Self>] = &[ROWS];

    fn validate(&self) -> Result<(), String> {
        if self.norm == GateNorm::None {
            return Err("there are no statistics without a norm".to_owned());
        }
        check_nonzero(&[("count", self.segments.count), ("width", self.segments.width())])
    }

    fn params(&self, _: &Plan) -> Params {
        let GateStatistics { tokens, segments, resident, more_first, eps, storage, more_storage, .. } = *self;
        let ([first, block], [first_used, second_used]) = (segments.padded_parts(), segments.parts);
        let (width, used) = (segments.width(), segments.used());
        let (gate_pitch, more_pitch) = (storage.row_pitch(width), more_storage.row_pitch(width));
        Params {
            tokens,
            width,
            used,
            first,
            block,
            first_used,
            second_used,
            gate_pitch,
            more_pitch,
            resident,
            more_first,
            eps,
        }
    }

    fn bytes(&self) -> Args<u64> {
        let width = self.segments.width();
        let rows = |rows: u32, storage: Storage| storage.sized(product(&[rows, storage.row_pitch(width)]));
        Args {
            kv: words(product(&[self.tokens, width])),
            gates: rows(self.resident, self.storage),
            gates_more: rows(self.more, self.more_storage),
            rows: words(self.tokens.into()),
            slots: words(self.tokens.into()),
            statistics: words(product(&[self.cache_rows, 2])),
        }
    }

    fn cost(&self) -> Cost {
        let GateStatistics { tokens, activation, norm, storage, .. } = *self;
        let width = self.segments.used();
        // Product, then mean and variance, or the mean square alone.
        let (element, row) = match norm {
            GateNorm::LayerNorm => (5, 4),
            _ => (3, 3),
        };
        Cost::of(
            &[times(activation.flops() + element, &[tokens, width]), times(row, &[tokens])],
            &[times(4 + storage.bytes(), &[tokens, width]), times(16, &[tokens])],
        )
    }
}

/// Index into [`ROW_LANES`]: 64 invocations per token.
const WIDE: usize = 2;

pub(crate) const ROWS: Variant<GateStatistics> = Variant::<GateStatistics>::new(
    ("gate_statistics", include_str!("../../shaders/gate_statistics.wgsl")),
    ROW_LANES.len(),
    |op, _, setting| {
        let (workgroup, lanes) = ROW_LANES[setting];
        Ok(Draft::new(workgroup, Grid::Folded { items: op.tokens.into(), each: workgroup / lanes })
            .with([
                ("GATES_F16", op.storage.constant()),
                ("MORE_F16", op.more_storage.constant()),
                ("SOURCES", sources(op.resident, op.more)),
                ("ACTIVATION", f64::from(op.activation as u32)),
                ("NORM", f64::from(op.norm as u32)),
                ("PADDED", flag(op.segments.is_padded())),
            ])
            .with([("WORKGROUP", workgroup), ("LANES", lanes)])
            .bytes(16 * if lanes == 1 { 1 } else { workgroup })
            .walks("width", op.segments.width(), lanes))
    },
    whole_rows,
)
// One invocation per token where that is fast, unless its loop would be too long.
.auto(|op, context| match row_lanes(context, op.segments.width()) {
    0 if op.segments.width() > MAX_ITERATIONS => WIDE,
    other => other,
});

crate::vary!(GateStatistics {
    tokens,
    segments,
    resident,
    more,
    more_first,
    cache_rows,
    eps,
    activation,
    norm,
    storage,
    more_storage
});

#[cfg(feature = "check")]
impl crate::sample::Sampled for GateStatistics {
    fn samples() -> Vec<Self> {
        let mut all = Vec::new();
        for tokens in crate::sample::ROWS {
            for (storage, more_storage) in Storage::ALL.into_iter().flat_map(|s| Storage::ALL.map(|more| (s, more))) {
                for activation in Activation::ALL {
                    for norm in [GateNorm::LayerNorm, GateNorm::RmsNorm] {
                        for (resident, more) in [(2, tokens), (0, tokens), (2, 0)] {
                            let segments = Segments { count: 3, parts: [5, 8] };
                            let (more_first, cache_rows, eps) = (0, tokens, 1e-5);
                            all.push(GateStatistics {
                                tokens,
                                segments,
                                resident,
                                more,
                                more_first,
                                cache_rows,
                                eps,
                                activation,
                                norm,
                                storage,
                                more_storage,
                            });
                        }
                    }
                }
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let op = GateStatistics {
            tokens: 3,
            segments: Segments::one(7),
            resident: 4,
            more: 0,
            more_first: 0,
            cache_rows: 9,
            eps: 1e-5,
            activation: Activation::Sigmoid,
            norm: GateNorm::LayerNorm,
            storage: Storage::F16,
            more_storage: Storage::F16,
        };
        // 3·7 · (sigmoid 3 + product, sums and squares 5) + 3·4. In: 3·7·(4 + 2), rows and slots 3·8. Out: 3·8.
        vec![(op, Cost { flops: 168 + 12, bytes: 126 + 48 })]
    }
}

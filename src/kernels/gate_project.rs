//! Projects gate rows by token id, to be kept: in a pool of recent ids, or in a table of the whole vocabulary.

use crate::adapter::AdapterClass;
use crate::cost::{Cost, times, when};
use crate::op::{Op, Variant, anything};
use crate::plan::{Draft, Grid, Plan, check_nonzero, flag};
use crate::storage::{Storage, product, words};

crate::params! {
    /// Uniform parameters, as in the shader.
    pub struct Params { rows: u32, width: u32, gate_pitch: u32, y_words: u32, first_id: u32 }
}

crate::args! {
    /// Buffers of one dispatch.
    pub struct Args {
        /// `[vocab_size, pitch of d_gate]` in `storage`, padded with zeros.
        gate_embedding: Read,
        /// `[width, pitch of d_gate]` in `storage`, padded with zeros.
        gate_b_proj: Read,
        /// `[rows]` u32, `u32::MAX` to leave a row out; not bound without.
        ids: Read,
        /// `[rows]` u32; not bound without.
        targets: Read,
        /// `[y_rows, pitch of width]` in `y_storage`, written.
        y: Write,
    }
}

/// Rows to project.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateProject {
    /// Rows.
    pub rows: u32,
    /// Elements of a gate row.
    pub width: u32,
    /// Elements of a table row.
    pub d_gate: u32,
    /// Rows of the table; the caller has checked that every id is below it.
    pub vocab_size: u32,
    /// Id of the first row, where no list of ids is given.
    pub first_id: u32,
    /// A list of ids is given.
    pub ids: bool,
    /// A list of target rows is given.
    pub targets: bool,
    /// Rows of `y`; the caller has checked that every target is below it.
    pub y_rows: u32,
    /// Storage of table and projection.
    pub storage: Storage,
    /// Storage of `y`.
    pub y_storage: Storage,
}

impl Op for GateProject {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "gate_project";
    const VARIANTS: &'static [Variant<Self>] = &[ROWS];

    fn validate(&self) -> Result<(), String> {
        let GateProject { rows, first_id, vocab_size, y_rows, .. } = *self;
        check_nonzero(&[("width", self.width), ("d_gate", self.d_gate)])?;
        if !self.ids && u64::from(first_id) + u64::from(rows) > u64::from(vocab_size) {
            return Err(format!("{rows} ids from {first_id} on, in a vocabulary of {vocab_size}"));
        }
        if !self.targets && rows > y_rows {
            return Err(format!("{rows} rows into {y_rows}"));
        }
        Ok(())
    }

    fn params(&self, _: &Plan) -> Params {
        let y_pitch = self.y_storage.row_pitch(self.width);
        Params {
            rows: self.rows,
            width: self.width,
            gate_pitch: self.storage.row_loads(self.d_gate),
            y_words: y_pitch / (4 / self.y_storage.bytes() as u32),
            first_id: self.first_id,
        }
    }

    fn bytes(&self) -> Args<u64> {
        let pitch = self.storage.row_pitch(self.d_gate);
        let stored = |rows: u32| self.storage.sized(product(&[rows, pitch]));
        let list = |on: bool| words(if on { self.rows.into() } else { 0 });
        Args {
            gate_embedding: stored(self.vocab_size),
            gate_b_proj: stored(self.width),
            ids: list(self.ids),
            targets: list(self.targets),
            y: self.y_storage.sized(product(&[self.y_rows, self.y_storage.row_pitch(self.width)])),
        }
    }

    fn cost(&self) -> Cost {
        let GateProject { rows, width, d_gate, vocab_size, ids, targets, storage, y_storage, .. } = *self;
        Cost::of(
            &[times(2, &[rows, width, d_gate])],
            &[
                times(storage.bytes(), &[rows.min(vocab_size), d_gate]),
                times(storage.bytes(), &[width, d_gate]),
                when(ids, times(4, &[rows])),
                when(targets, times(4, &[rows])),
                times(y_storage.bytes(), &[rows, y_storage.row_pitch(width)]),
            ],
        )
    }
}

/// WORKGROUP: four columns of four gate rows per invocation.
pub(crate) const ROWS: Variant<GateProject> = {
    const TUNINGS: &[u32] = &[64, 32, 8];
    Variant::<GateProject>::new(
        ("gate_project", include_str!("../../shaders/gate_project.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            let workgroup = TUNINGS[setting];
            let columns = op.y_storage.row_pitch(op.width).div_ceil(4 * workgroup);
            Ok(Draft::new(workgroup, Grid::Columns { x: columns, rows: op.rows.div_ceil(4) })
                .with([
                    ("STORAGE_F16", op.storage.constant()),
                    ("Y_F16", op.y_storage.constant()),
                    ("HAS_IDS", flag(op.ids)),
                    ("HAS_TARGETS", flag(op.targets)),
                ])
                .with([("WORKGROUP", workgroup)])
                .walks("d_gate", op.d_gate, 4))
        },
        anything,
    )
    .auto(|_, context| match context.class {
        AdapterClass::Software => 2,
        _ => 0,
    })
};

crate::vary!(GateProject { rows, width, d_gate, vocab_size, first_id, ids, targets, y_rows, storage, y_storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for GateProject {
    fn samples() -> Vec<Self> {
        let mut all = Vec::new();
        for (rows, width) in [0, 1, 3, 4, 5, 9].iter().flat_map(|&m| [1, 31, 32, 33, 256, 257].map(|n| (m, n))) {
            for (storage, y_storage) in Storage::ALL.into_iter().flat_map(|s| Storage::ALL.map(|y| (s, y))) {
                for (ids, targets) in [(false, false), (true, false), (false, true), (true, true)] {
                    let (d_gate, vocab_size, first_id, y_rows) = (5, 100, 0, rows);
                    all.push(GateProject {
                        rows,
                        width,
                        d_gate,
                        vocab_size,
                        first_id,
                        ids,
                        targets,
                        y_rows,
                        storage,
                        y_storage,
                    });
                }
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        let op = GateProject {
            rows: 4,
            width: 7,
            d_gate: 5,
            vocab_size: 50,
            first_id: 0,
            ids: true,
            targets: true,
            y_rows: 9,
            storage: Storage::F16,
            y_storage: Storage::F32,
        };
        // 4·7·5 multiply-adds. Table rows 4·5·2, projection 7·5·2, ids and targets 4·4 each; out 4 rows of 8 floats.
        vec![(op, Cost { flops: 280, bytes: 40 + 70 + 32 + 128 })]
    }
}

//! Matrix product: in tiles for many rows of `x`, per column (GEMV) for few.

use crate::adapter::{AdapterClass, Cooperative, PlanContext};
use crate::cost::{Cost, times, when};
use crate::op::{Op, Variant, hold};
use crate::plan::{Draft, Grid, Plan, flag};
use crate::storage::{Storage, product};

crate::params! {
    /// Uniform parameters, as in the shaders.
    pub struct Params {
        rows: u32, inner: u32, cols: u32,
        x_offset: u32, x_row: u32, x_batch: u32,
        w_offset: u32, w_col: u32, w_inner: u32, w_batch: u32,
        y_offset: u32, y_row: u32, y_batch: u32,
        tiles_x: u32, tiles_y: u32, tiles_z: u32,
    }
}

crate::args! {
    /// Buffers of one dispatch; shapes and strides as in [`Matmul`].
    pub struct Args {
        /// In `x_storage`.
        x: Read,
        /// Weights in `storage`.
        w: Read,
        /// `[cols]` in `storage`; not bound without a bias.
        bias: Read,
        /// In `y_storage`, written.
        y: Write,
    }
}

/// Layout of an operand, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layout {
    /// First element.
    pub offset: u32,
    /// From one row (of `w`: one column of the result) to the next.
    pub row: u32,
    /// From one inner element to the next; only `w` may differ from 1.
    pub inner: u32,
    /// From one matrix of the batch to the next.
    pub batch: u32,
}

impl Layout {
    /// Rows of `width` elements, one after another; no batch.
    pub fn dense(width: u32) -> Self {
        Layout { offset: 0, row: width, inner: 1, batch: 0 }
    }

    /// One past the last element that `rows` × `inner` × `batch` touches.
    fn end(&self, rows: u32, inner: u32, batch: u32) -> u64 {
        if rows == 0 || inner == 0 || batch == 0 {
            return 0;
        }
        let last = |count: u32, stride: u32| product(&[count - 1, stride]);
        u64::from(self.offset)
            .saturating_add(last(rows, self.row))
            .saturating_add(last(inner, self.inner))
            .saturating_add(last(batch, self.batch))
            .saturating_add(1)
    }
}

/// `y[b,m,n] = Σ_k x[b,m,k] · w[b,n,k] + bias[n]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matmul {
    /// Rows of `x` and `y`.
    pub rows: u32,
    /// Length of the sums.
    pub inner: u32,
    /// Columns of `y`, rows of `w` in checkpoint layout.
    pub cols: u32,
    /// Independent products.
    pub batch: u32,
    /// Layout of `x`.
    pub x: Layout,
    /// Layout of `w`.
    pub w: Layout,
    /// Layout of `y`.
    pub y: Layout,
    /// A bias of `cols` elements is added.
    pub bias: bool,
    /// Storage of `w` and `bias`.
    pub storage: Storage,
    /// Storage of `x`. In f16, rows of `x` and `w` must be whole 16-byte loads ([`Matmul::in_vec4`]).
    pub x_storage: Storage,
    /// Storage of `y`. In f16, so must they, and rows of `y` whole words. Sums are f32: as halves, finite ones beyond ±65 504 become
    /// the largest half with their sign; infinities and NaN stay.
    pub y_storage: Storage,
}

/// Most rows of `x` that the GEMV variants are preferred for.
pub(crate) const FEW_ROWS: u32 = 8;

/// Fewest rows of `x` for cooperative matrices: half their smallest tile on most adapters.
const COOPERATIVE_ROWS: u32 = 32;

impl Matmul {
    /// `y [rows, cols] = x [rows, inner] · wᵀ`, everything dense, `w` `[cols, inner]` as in checkpoints.
    pub fn linear(rows: u32, inner: u32, cols: u32, bias: bool, storage: Storage) -> Self {
        Matmul {
            rows,
            inner,
            cols,
            batch: 1,
            x: Layout::dense(inner),
            w: Layout::dense(inner),
            y: Layout::dense(cols),
            bias,
            storage,
            x_storage: Storage::F32,
            y_storage: Storage::F32,
        }
    }

    /// Whether rows of `x` and of `w` are whole 16-byte loads on 16-byte boundaries.
    pub fn in_vec4(&self) -> bool {
        let whole = |layout: Layout, elements: u32| {
            layout.inner == 1
                && [layout.offset, layout.row, layout.batch, self.inner]
                    .iter()
                    .all(|step| step.is_multiple_of(elements))
        };
        // With no inner element, a binding would be smaller than one load.
        self.inner > 0 && whole(self.x, self.x_storage.of_load()) && whole(self.w, self.storage.of_load())
    }

    fn check_vec4(&self) -> Result<(), String> {
        if !self.in_vec4() {
            return Err("rows of x and w must be whole 16-byte loads on 16-byte boundaries".to_owned());
        }
        Ok(())
    }

    fn check_f32(&self) -> Result<(), String> {
        if [self.x_storage, self.y_storage] != [Storage::F32; 2] {
            return Err("x and y must be stored in f32".to_owned());
        }
        Ok(())
    }

    /// Whether tiles of these columns and rows are workgroups enough to fill a GPU: on each of its processors the four subgroups that
    /// it runs at once. Below it, smaller tiles make more workgroups.
    fn fills(&self, context: &PlanContext, [cols, rows]: [u32; 2]) -> bool {
        let tiles = product(&[self.cols.div_ceil(cols), self.rows.div_ceil(rows), self.batch]);
        tiles.saturating_mul(4) >= context.class.full().into()
    }

    fn few(&self) -> bool {
        self.rows <= FEW_ROWS
    }

    fn tiled(&self, workgroup_size: u32, [cols, rows]: [u32; 2]) -> Draft {
        let grid = Grid::Tiled { size: [self.cols, self.rows, self.batch], tile: [cols, rows, 1] };
        Draft::new(workgroup_size, grid).with([("STORAGE_F16", self.storage.constant()), ("HAS_BIAS", flag(self.bias))])
    }
}

impl Op for Matmul {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "matmul";
    const VARIANTS: &'static [Variant<Self>] =
        &[COOPERATIVE, COOPERATIVE_8, SUBGROUP, GEMV_SUBGROUP, GEMV_VEC4, VEC4, GEMV, TILES];

    fn validate(&self) -> Result<(), String> {
        if self.x.inner != 1 || self.y.inner != 1 {
            return Err("rows of x and y must be contiguous (inner stride 1)".to_owned());
        }
        if [self.x_storage, self.y_storage].contains(&Storage::F16) {
            self.check_vec4()?;
        }
        let of_y = [self.cols, self.y.offset, self.y.row, self.y.batch];
        if self.y_storage == Storage::F16 && !of_y.iter().all(|step| step.is_multiple_of(2)) {
            return Err("rows of y in f16 must be whole words".to_owned());
        }
        Ok(())
    }

    fn params(&self, plan: &Plan) -> Params {
        let [tiles_x, tiles_y, tiles_z] = plan.tiles;
        Params {
            rows: self.rows,
            inner: self.inner,
            cols: self.cols,
            x_offset: self.x.offset,
            x_row: self.x.row,
            x_batch: self.x.batch,
            w_offset: self.w.offset,
            w_col: self.w.row,
            w_inner: self.w.inner,
            w_batch: self.w.batch,
            y_offset: self.y.offset,
            y_row: self.y.row,
            y_batch: self.y.batch,
            tiles_x,
            tiles_y,
            tiles_z,
        }
    }

    fn bytes(&self) -> Args<u64> {
        Args {
            x: self.x_storage.sized(self.x.end(self.rows, self.inner, self.batch)),
            w: self.storage.sized(self.w.end(self.cols, self.inner, self.batch)),
            bias: self.storage.sized(if self.bias { self.cols.into() } else { 0 }),
            y: self.y_storage.sized(self.y.end(self.rows, self.cols, self.batch)),
        }
    }

    fn cost(&self) -> Cost {
        let Matmul { rows, inner, cols, batch, bias, storage, x_storage, y_storage, .. } = *self;
        // A stride of 0: every product of the batch reads the same operand.
        let matrices = |layout: Layout| if layout.batch == 0 { batch.min(1) } else { batch };
        Cost::of(
            &[times(2, &[rows, inner, cols, batch]), when(bias, times(1, &[rows, cols, batch]))],
            &[
                times(x_storage.bytes(), &[rows, inner, matrices(self.x)]),
                times(storage.bytes(), &[cols, inner, matrices(self.w)]),
                when(bias, times(storage.bytes(), &[cols])),
                times(y_storage.bytes(), &[rows, cols, batch]),
            ],
        )
    }
}

/// Many rows, any strides: a tile of the result per workgroup. (WG_X, WG_Y, TILE_K): 4 × 4 results per invocation.
pub(crate) const TILES: Variant<Matmul> = {
    const TUNINGS: &[(u32, u32, u32)] = &[(16, 16, 16), (16, 8, 16), (8, 8, 32), (32, 4, 8)];
    Variant::<Matmul>::new(
        ("matmul", include_str!("../../shaders/matmul.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            op.check_f32()?;
            let (wg_x, wg_y, tile_k) = TUNINGS[setting];
            Ok(op
                .tiled(wg_x * wg_y, [wg_x * 4, wg_y * 4])
                .with([("WG_X", wg_x), ("WG_Y", wg_y), ("TILE_K", tile_k)])
                .bytes(4 * tile_k * (4 * wg_y + 1 + 4 * wg_x + 1))
                .walks("inner", op.inner, tile_k))
        },
        |_, _, plan| {
            let tile = [4 * plan.value("WG_X"), 4 * plan.value("WG_Y"), 1];
            hold(&[(plan.tile() == tile, "an invocation owns 4 × 4 results")])
        },
    )
    .auto(|_, context| match context.class {
        AdapterClass::Software | AdapterClass::Discrete => 0,
        AdapterClass::Integrated | AdapterClass::Apple => 2,
    })
};

/// Many rows in 16-byte loads. (WG_X, WG_Y, PARTS, TILE_K): 8 × 8 results per invocation, each summed in PARTS.
pub(crate) const VEC4: Variant<Matmul> = {
    const TUNINGS: &[(u32, u32, u32, u32)] = &[(8, 8, 1, 16), (16, 16, 1, 16), (8, 8, 4, 32)];
    Variant::<Matmul>::new(
        ("matmul_vec4", include_str!("../../shaders/matmul_vec4.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            op.check_vec4()?;
            let (wg_x, wg_y, parts, tile_k) = TUNINGS[setting];
            Ok(op
                .tiled(wg_x * wg_y * parts, [8 * wg_x, 8 * wg_y])
                .with([("X_F16", op.x_storage.constant()), ("Y_F16", op.y_storage.constant())])
                .with([("WG_X", wg_x), ("WG_Y", wg_y), ("PARTS", parts), ("TILE_K", tile_k)])
                .bytes(4 * tile_k * (8 * wg_x + 8 * wg_y))
                .walks("inner", op.inner, tile_k))
        },
        |_, _, plan| {
            let [wg_x, wg_y, parts, tile_k] = ["WG_X", "WG_Y", "PARTS", "TILE_K"].map(|name| plan.value(name));
            let sides = [wg_x, wg_y];
            let whole = sides.iter().all(|side| (4 * side).is_multiple_of(tile_k));
            hold(&[
                (whole, "quads move about within groups of TILE_K / 2, and a workgroup has twice its sides"),
                (tile_k.is_multiple_of(8 * parts), "a step is whole loads of f16, and whole parts"),
                (tile_k * (wg_x + wg_y) <= 4 * wg_x * wg_y * parts, "a step has two blocks per invocation at most"),
                (
                    parts == 1 || sides.iter().all(|side| tile_k * 2 * side >= 8 * wg_x * wg_y),
                    "a part's sums fit a step",
                ),
                (plan.tile() == [8 * wg_x, 8 * wg_y, 1], "an invocation owns 8 × 8 results"),
            ])
        },
    )
    .auto(|op, context| match context.class {
        AdapterClass::Software => 1,
        AdapterClass::Integrated | AdapterClass::Apple => 0,
        AdapterClass::Discrete => {
            let (wg_x, wg_y, ..) = TUNINGS[1];
            if op.fills(context, [8 * wg_x, 8 * wg_y]) { 1 } else { 2 }
        }
    })
    .preferred(|op, _| op.in_vec4())
};

/// Many rows in registers alone, with `x` shared by subgroup shuffles: for adapters without fast workgroup memory.
pub(crate) const SUBGROUP: Variant<Matmul> = Variant::<Matmul>::new(
    ("matmul_subgroup", include_str!("../../shaders/matmul_subgroup.wgsl")),
    1,
    |op, context, _| {
        op.check_vec4()?;
        op.check_f32()?;
        // Rows of y along the grid's x: neighbouring workgroups read the same weights. Eight rows and 32 columns each.
        let grid = Grid::Tiled { size: [op.rows, op.cols, op.batch], tile: [8, 32, 1] };
        Ok(Draft { grid, ..op.tiled(8, [8, 32]) }
            .with([("SPREAD", if context.subgroup_min_size >= 8 { 8 } else { 4 })])
            .walks("inner", op.inner, 4))
    },
    |_, _, plan| {
        hold(&[
            ([4, 8].contains(&plan.value("SPREAD")), "rows are spread over 4 or 8 lanes"),
            (plan.tile() == [8, 32, 1], "a workgroup has 8 rows and 32 columns"),
        ])
    },
)
.subgroups(4)
// On lavapipe the shuffles pay from the second row on.
.preferred(|op, context| op.in_vec4() && context.class == AdapterClass::Software && op.rows > 1);

/// Many rows by cooperative matrices of 16 × 16, f16 weights and f32 sums.
///
/// `x` is rounded to f16 where it is f32, so this needs f16 weights, whose rounding is as coarse. Values of `x` beyond ±65 504 become
/// infinite, as in any f16.
pub(crate) const COOPERATIVE: Variant<Matmul> = Variant::<Matmul>::new(
    ("matmul_cooperative", include_str!("../../shaders/matmul_cooperative.wgsl")),
    TILES_OF_MATRICES.len(),
    |op, context, setting| by_matrices(op, 16, context, setting),
    |_, context, plan| whole_subgroups(16, context, plan),
)
.cooperative(Cooperative::BY_16)
.auto(|op, context| largest_that_fills(op, 16, context))
.preferred(rounds_as_weights_do);

/// The same with matrices of 8 × 8: Apple's GPUs have these.
pub(crate) const COOPERATIVE_8: Variant<Matmul> = Variant::<Matmul>::new(
    ("matmul_cooperative_8", include_str!("../../shaders/matmul_cooperative_8.wgsl")),
    TILES_OF_MATRICES.len(),
    |op, context, setting| by_matrices(op, 8, context, setting),
    |_, context, plan| whole_subgroups(8, context, plan),
)
.cooperative(Cooperative::BY_8)
.auto(|op, context| largest_that_fills(op, 8, context))
.preferred(rounds_as_weights_do);

/// A tile of cooperative matrices: `2 · across` subgroups of `fragments · fragments` matrices.
struct MatrixTile {
    fragments: u32,
    across: u32,
    /// Elements of the sums that are staged at once.
    tile_k: u32,
    /// Two: the next ones are staged while these are multiplied.
    stages: u32,
}

/// The largest first. One that the device's workgroup memory does not hold is planned as the first behind it that it holds: of
/// 16 × 16 the first takes 45 056 bytes, the second 28 672, the fourth 24 576, and the third and the last the 16 384 that WebGPU
/// grants everywhere.
const TILES_OF_MATRICES: &[MatrixTile] = &[
    MatrixTile { fragments: 4, across: 4, tile_k: 16, stages: 2 },
    MatrixTile { fragments: 4, across: 2, tile_k: 16, stages: 2 },
    MatrixTile { fragments: 4, across: 2, tile_k: 16, stages: 1 },
    MatrixTile { fragments: 2, across: 2, tile_k: 32, stages: 2 },
    MatrixTile { fragments: 2, across: 2, tile_k: 16, stages: 2 },
];

impl MatrixTile {
    /// Columns and rows, of matrices of `side`.
    fn extents(&self, side: u32) -> [u32; 2] {
        [self.across * self.fragments * side, 2 * self.fragments * side]
    }

    /// Workgroup memory: staged halves with eight behind each row, and a matrix of sums per subgroup.
    fn bytes(&self, side: u32) -> u32 {
        let rows: u32 = self.extents(side).iter().sum();
        2 * self.stages * rows * (self.tile_k + 8) + 4 * 2 * self.across * side * side
    }
}

/// The first tile that fills the device, or the smaller one.
fn largest_that_fills(op: &Matmul, side: u32, context: &PlanContext) -> usize {
    let fills = |tile: &MatrixTile| tile.fragments == 2 || op.fills(context, tile.extents(side));
    TILES_OF_MATRICES.iter().position(fills).unwrap_or(0)
}

fn by_matrices(op: &Matmul, side: u32, context: &PlanContext, setting: usize) -> Result<Draft, String> {
    op.check_vec4()?;
    if op.storage != Storage::F16 {
        return Err("weights must be stored in f16".to_owned());
    }
    let holds = |tile: &&MatrixTile| tile.bytes(side) <= context.limits.max_compute_workgroup_storage_size;
    let held = TILES_OF_MATRICES[setting..].iter().find(holds);
    let tile = held.unwrap_or(&TILES_OF_MATRICES[setting]);
    let MatrixTile { fragments, across, tile_k, stages } = *tile;
    let [cols, rows] = tile.extents(side);
    let grid = Grid::Tiled { size: [op.cols, op.rows, op.batch], tile: [cols, rows, 1] };
    let workgroup_size = 2 * across * context.widest_subgroup();
    Ok(Draft::new(workgroup_size, grid)
        .with([("HAS_BIAS", flag(op.bias))])
        .with([("X_F16", op.x_storage.constant()), ("Y_F16", op.y_storage.constant())])
        .with([("WORKGROUP", workgroup_size), ("FRAGMENTS", fragments), ("ACROSS", across)])
        .with([("TILE_K", tile_k), ("STAGES", stages)])
        .bytes(tile.bytes(side))
        .walks("inner", op.inner, tile_k))
}

fn whole_subgroups(side: u64, context: &PlanContext, plan: &Plan) -> Result<(), &'static str> {
    let [fragments, across, tile_k, stages] = ["FRAGMENTS", "ACROSS", "TILE_K", "STAGES"].map(|name| plan.value(name));
    let subgroups = 2 * across * u64::from(context.widest_subgroup());
    hold(&[
        ([2, 4].contains(&fragments), "fragments are unrolled by 2 or 4"),
        (
            plan.tile() == [across * fragments * side, 2 * fragments * side, 1],
            "2 × ACROSS subgroups have FRAGMENTS × FRAGMENTS matrices each",
        ),
        (tile_k.is_multiple_of(16), "a step is whole matrices, and rows of 16 bytes with the eight halves behind them"),
        ([1, 2].contains(&stages), "there are one or two stages"),
        (plan.workgroup_size.is_multiple_of(subgroups as u32), "a workgroup is all its subgroups, whole"),
    ])
}

/// Software adapters gain nothing by cooperative matrices.
fn rounds_as_weights_do(op: &Matmul, context: &PlanContext) -> bool {
    op.storage == Storage::F16 && op.rows >= COOPERATIVE_ROWS && context.class != AdapterClass::Software
}

/// Few rows, any strides: each weight is read once per four rows of `x`. (WORKGROUP, LANES): LANES invocations share a column.
pub(crate) const GEMV: Variant<Matmul> = {
    const TUNINGS: &[(u32, u32)] = &[(64, 8), (64, 1), (128, 32), (256, 16)];
    Variant::<Matmul>::new(
        ("matmul_gemv", include_str!("../../shaders/matmul_gemv.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            op.check_f32()?;
            let (workgroup, lanes) = TUNINGS[setting];
            Ok(op
                .tiled(workgroup, [workgroup / lanes, 4])
                .with([("WORKGROUP", workgroup), ("LANES", lanes)])
                .bytes(16 * workgroup)
                .walks("inner", op.inner, lanes))
        },
        |_, _, plan| whole_columns(1, plan),
    )
    .auto(|op, context| match context.class {
        AdapterClass::Software => 1,
        // Neighbouring columns are adjacent in memory: neighbouring lanes read them.
        _ if op.w.row == 1 => 1,
        AdapterClass::Integrated | AdapterClass::Apple => 0,
        AdapterClass::Discrete => 2,
    })
    .preferred(|op, _| op.few())
};

/// Few rows in 16-byte loads. (WORKGROUP, LANES): LANES invocations share four columns.
pub(crate) const GEMV_VEC4: Variant<Matmul> = {
    const TUNINGS: &[(u32, u32)] = &[(8, 1), (64, 16), (128, 32)];
    Variant::<Matmul>::new(
        ("matmul_gemv_vec4", include_str!("../../shaders/matmul_gemv_vec4.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            op.check_vec4()?;
            op.check_f32()?;
            let (workgroup, lanes) = TUNINGS[setting];
            Ok(op
                .tiled(workgroup, [4 * workgroup / lanes, 4])
                .with([("WORKGROUP", workgroup), ("LANES", lanes), ("SINGLE", u32::from(op.rows == 1))])
                .bytes(16 * if lanes == 1 { 1 } else { 4 * workgroup })
                .walks("inner", op.inner, 4 * lanes))
        },
        |_, _, plan| whole_columns(4, plan),
    )
    .auto(|_, context| match context.class {
        AdapterClass::Software => 0,
        AdapterClass::Integrated | AdapterClass::Apple => 1,
        AdapterClass::Discrete => 2,
    })
    .preferred(|op, _| op.in_vec4() && op.few())
};

/// `each` columns per LANES invocations.
fn whole_columns(each: u64, plan: &Plan) -> Result<(), &'static str> {
    let (workgroup, lanes) = (plan.value("WORKGROUP"), plan.value("LANES"));
    hold(&[
        (workgroup.is_multiple_of(lanes), "a workgroup has whole columns"),
        (plan.tile() == [each * workgroup / lanes, 4, 1], "a workgroup has four rows of its columns"),
    ])
}

/// Few rows in 16-byte loads, summed by subgroup operations. WORKGROUP invocations share four columns.
pub(crate) const GEMV_SUBGROUP: Variant<Matmul> = {
    const TUNINGS: &[u32] = &[64, 32, 128];
    Variant::<Matmul>::new(
        ("matmul_gemv_subgroup", include_str!("../../shaders/matmul_gemv_subgroup.wgsl")),
        TUNINGS.len(),
        |op, _, setting| {
            op.check_vec4()?;
            op.check_f32()?;
            let workgroup = TUNINGS[setting];
            Ok(op.tiled(workgroup, [4, 4]).with([("WORKGROUP", workgroup)]).bytes(16 * workgroup).walks(
                "inner",
                op.inner,
                4 * workgroup,
            ))
        },
        |_, _, plan| hold(&[(plan.tile() == [4, 4, 1], "a workgroup has four rows of four columns")]),
    )
    .subgroups(4)
    .auto(|op, context| match context.class {
        AdapterClass::Software | AdapterClass::Apple => 1,
        AdapterClass::Integrated => 0,
        // Long enough for several loads per invocation.
        AdapterClass::Discrete => {
            if op.inner >= 4096 {
                2
            } else {
                0
            }
        }
    })
    .preferred(|op, context| op.in_vec4() && op.few() && context.class != AdapterClass::Software)
};

crate::vary!(Layout { offset, row, inner, batch });
crate::vary!(Matmul { rows, inner, cols, batch, x, w, y, bias, storage, x_storage, y_storage });

#[cfg(feature = "check")]
impl crate::sample::Sampled for Matmul {
    fn samples() -> Vec<Self> {
        let rows = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65];
        let cols = [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129];
        let mut all = Vec::new();
        // Enough for the larger tiles, last.
        let large = [(1600, 1600), (4096, 4096)];
        for (m, n) in rows.iter().flat_map(|&m| cols.map(|n| (m, n))).chain(large) {
            for (storage, bias) in Storage::ALL.into_iter().flat_map(|s| [false, true].map(|bias| (s, bias))) {
                // Odd lengths, whole loads, and weights that are read across.
                let of = |inner| Matmul { batch: 3, ..Matmul::linear(m, inner, n, bias, storage) };
                let across = Layout { offset: 0, row: 1, inner: n, batch: 5 * n };
                all.extend([of(5), of(24), Matmul { w: across, ..of(5) }]);
                all.push(Matmul { x_storage: Storage::F16, ..of(24) });
                if n % 2 == 0 {
                    all.push(Matmul { y_storage: Storage::F16, ..of(24) });
                    all.push(Matmul { x_storage: Storage::F16, y_storage: Storage::F16, ..of(24) });
                }
            }
        }
        all
    }

    fn counted() -> Vec<(Self, Cost)> {
        // 2·3·5 multiply-adds and 2·5 additions. x 2·3·4, w 5·3·2, bias 5·2, y 2·5·4.
        let op = Matmul::linear(2, 3, 5, true, Storage::F16);
        let cost = Cost { flops: 60 + 10, bytes: 24 + 30 + 10 + 40 };
        // x in f16: 2·3·2, y: 2·5·2.
        vec![
            (op, cost),
            (Matmul { x_storage: Storage::F16, ..op }, Cost { bytes: cost.bytes - 12, ..cost }),
            (Matmul { y_storage: Storage::F16, ..op }, Cost { bytes: cost.bytes - 20, ..cost }),
        ]
    }
}

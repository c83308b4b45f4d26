//! Matrix product with a tile of the result per workgroup, for many rows: any strides.
//!
//! The other products share its `Problem`, `Params` and `Args`. Those that read 16 bytes at a time want
//! [`Problem::in_vec4`].

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, flag, product, trips, words};
use crate::error::{Error, Result};
use crate::kernel::{Binding, Bound, KernelSpec, Recording, Region};
use crate::plan::{AdapterClass, Cooperative, Plan, PlanContext, Storage, Tuning};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "matmul",
    source: include_str!("../../shaders/matmul.wgsl"),
    bindings: &[Binding::PARAMS, Binding::read("x"), Binding::read("w"), Binding::read("bias"), Binding::write("y")],
    params_size: size_of::<Params>(),
    tunings: TUNINGS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// (WG_X, WG_Y, TILE_K): an invocation owns 4 × 4 results.
const TUNINGS: &[(u32, u32, u32)] = &[(16, 16, 16), (16, 8, 16), (8, 8, 32), (32, 4, 8)];

/// Uniform parameters, as in the shader; every matrix product has the same.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    pub(super) rows: u32,
    pub(super) inner: u32,
    pub(super) cols: u32,
    pub(super) x_offset: u32,
    pub(super) x_row: u32,
    pub(super) x_batch: u32,
    pub(super) w_offset: u32,
    pub(super) w_col: u32,
    pub(super) w_inner: u32,
    pub(super) w_batch: u32,
    pub(super) y_offset: u32,
    pub(super) y_row: u32,
    pub(super) y_batch: u32,
    pub(super) tiles_x: u32,
    pub(super) tiles_y: u32,
    pub(super) tiles_z: u32,
}

/// Where the elements of an operand stand, in elements.
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
pub struct Problem {
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
    /// How `w` and `bias` are stored.
    pub storage: Storage,
}

impl Problem {
    /// `y [rows, cols] = x [rows, inner] · wᵀ`, everything dense, `w` `[cols, inner]` as in checkpoints.
    pub fn linear(rows: u32, inner: u32, cols: u32, bias: bool, storage: Storage) -> Self {
        Problem {
            rows,
            inner,
            cols,
            batch: 1,
            x: Layout::dense(inner),
            w: Layout::dense(inner),
            y: Layout::dense(cols),
            bias,
            storage,
        }
    }

    /// Whether every row of `x` and of `w` is a whole number of 16-byte loads that begin on 16-byte boundaries.
    pub fn in_vec4(&self) -> bool {
        let whole = |layout: Layout, elements: u32| {
            layout.inner == 1
                && [layout.offset, layout.row, layout.batch, self.inner]
                    .iter()
                    .all(|step| step.is_multiple_of(elements))
        };
        // An empty row would bind less than one load.
        self.inner > 0 && whole(self.x, 4) && whole(self.w, 16 / self.storage.bytes() as u32)
    }

    pub(super) fn validate_vec4(&self, kernel: &'static str) -> Result<()> {
        self.validate(kernel)?;
        if !self.in_vec4() {
            return Err(Error::problem(kernel, "rows of x and w must be whole 16-byte loads on 16-byte boundaries"));
        }
        Ok(())
    }

    pub(super) fn params(&self, plan: &Plan) -> Params {
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

    pub(super) fn validate(&self, kernel: &'static str) -> Result<()> {
        if self.x.inner != 1 || self.y.inner != 1 {
            return Err(Error::problem(kernel, "rows of x and y must be contiguous (inner stride 1)"));
        }
        Ok(())
    }

    pub(super) fn bound<'a>(&self, args: &Args<'a>) -> [Bound<'a>; 4] {
        let stored = |region, elements: u64| Bound { region, bytes: elements.saturating_mul(self.storage.bytes()) };
        [
            words(args.x, self.x.end(self.rows, self.inner, self.batch)),
            stored(args.w, self.w.end(self.cols, self.inner, self.batch)),
            stored(args.bias, if self.bias { self.cols.into() } else { 0 }),
            words(args.y, self.y.end(self.rows, self.cols, self.batch)),
        ]
    }

    pub(super) fn switches(&self) -> Vec<(&'static str, f64)> {
        vec![("STORAGE_F16", self.storage.constant()), ("HAS_BIAS", flag(self.bias))]
    }
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        self.validate(SPEC.name)?;
        let auto = match context.class {
            AdapterClass::Software | AdapterClass::Discrete => 0,
            AdapterClass::Integrated | AdapterClass::Apple => 2,
        };
        let (wg_x, wg_y, tile_k) = TUNINGS[tuning.choose(SPEC.name, TUNINGS.len(), context.auto(SPEC.name, auto))?];
        trips(SPEC.name, "inner", self.inner, tile_k)?;
        let mut overrides = self.switches();
        overrides.extend([("WG_X", wg_x.into()), ("WG_Y", wg_y.into()), ("TILE_K", tile_k.into())]);
        let (tile_m, tile_n) = (wg_y * 4, wg_x * 4);
        Plan {
            overrides,
            grid: [self.cols.div_ceil(tile_n), self.rows.div_ceil(tile_m), self.batch],
            tiles: [0; 3],
            workgroup_size: wg_x * wg_y,
            workgroup_bytes: 4 * tile_k * (tile_m + 1 + tile_n + 1),
        }
        .tiled(SPEC.name, &context.limits)
    }
}

/// Buffers of one dispatch; shapes and strides as in [`Problem`].
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    /// f32.
    pub x: &'a Region,
    /// Weights in `storage`.
    pub w: &'a Region,
    /// `[cols]` in `storage`; `Kernels::absent` without a bias.
    pub bias: &'a Region,
    /// f32, written.
    pub y: &'a Region,
}

/// Adds one product to a recording.
///
/// # Errors
/// What the plan refuses, a region that is too small, or an input that is also the output.
pub fn encode(recording: &mut Recording, problem: &Problem, args: Args<'_>, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    recording.push(&SPEC, &plan, &problem.params(&plan), &problem.bound(&args))
}

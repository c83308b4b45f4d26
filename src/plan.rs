//! From a problem and a device's limits to a dispatch: pure functions, tested without a GPU.
//!
//! A variant drafts a dispatch from the sizes of its operation; [`Draft::checked`] holds the draft against the device's
//! limits, folds a grid over one dimension's limit, and refuses loops that some driver would cut short.

use crate::error::{Error, Result};
use crate::storage::product;

/// Most iterations of a loop whose end is unknown at compile time: an older software driver ends such loops after 65 535
/// iterations and reports nothing.
pub const MAX_ITERATIONS: u32 = 65_534;

/// Indices have 32 bits and a folded grid overshoots: below this bound no index wraps around.
const MAX_INDEX: u64 = 1 << 31;

/// The grid of a dispatch: extents, and elements per workgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grid {
    /// `items` in workgroups of `each`, folded into x and y: the shader's workgroup is `y · num_workgroups.x + x`, and it
    /// ignores indices past the end.
    Folded {
        /// Elements to cover.
        items: u64,
        /// Elements per workgroup.
        each: u32,
    },
    /// Extents in x, y and z, cut into tiles. Tiles over a dimension's limit fold: the shader finds the tile of
    /// workgroup `i = y · num_workgroups.x + x` at `(i mod tiles.x, i / tiles.x mod tiles.y, i / (tiles.x · tiles.y))`.
    Tiled {
        /// Extents to cover.
        size: [u32; 3],
        /// Tile of one workgroup.
        tile: [u32; 3],
    },
    /// `rows` lines of `x` workgroups: the lines fold into y and z.
    Columns {
        /// Workgroups per line.
        x: u32,
        /// Lines.
        rows: u32,
    },
}

/// A loop of the shader that a parameter bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loop {
    /// Name of the extent, for the error.
    pub name: &'static str,
    /// Elements that the loop covers.
    pub extent: u32,
    /// Elements per iteration.
    pub step: u32,
}

/// A variant's dispatch for a problem, before the device's limits are checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Draft {
    /// Values of the shader's `override` constants.
    pub overrides: Vec<(&'static str, f64)>,
    /// Its grid.
    pub grid: Grid,
    /// Invocations of a workgroup.
    pub workgroup_size: u32,
    /// Workgroup memory in bytes.
    pub workgroup_bytes: u64,
    /// Loops that parameters bound.
    pub loops: Vec<Loop>,
}

impl Draft {
    /// A draft without workgroup memory and loops.
    pub fn new(workgroup_size: u32, grid: Grid) -> Self {
        Draft { overrides: Vec::new(), grid, workgroup_size, workgroup_bytes: 0, loops: Vec::new() }
    }

    /// One invocation per element.
    pub fn elements(workgroup_size: u32, elements: u64) -> Self {
        Draft::new(workgroup_size, Grid::Folded { items: elements, each: workgroup_size })
            .with([("WORKGROUP", workgroup_size)])
    }

    /// The same with further overrides.
    pub fn with<V: Into<f64>, const N: usize>(mut self, overrides: [(&'static str, V); N]) -> Self {
        self.overrides.extend(overrides.map(|(name, value)| (name, value.into())));
        self
    }

    /// The same with workgroup memory.
    pub fn bytes(mut self, workgroup_bytes: impl Into<u64>) -> Self {
        self.workgroup_bytes = workgroup_bytes.into();
        self
    }

    /// The same with a loop over `extent`, `step` elements per iteration.
    pub fn walks(mut self, name: &'static str, extent: u32, step: u32) -> Self {
        self.loops.push(Loop { name, extent, step });
        self
    }

    /// Checks the draft of a kernel against the device's limits.
    ///
    /// # Errors
    /// [`Error::Limit`] with the number needed and the number allowed; `KernelError::Problem` for a loop that is too long, or for
    /// more elements than 32 bits index.
    pub fn checked(self, kernel: &'static str, limits: &wgpu::Limits) -> Result<Plan> {
        for &Loop { name, extent, step } in &self.loops {
            check_iterations(name, extent, step).map_err(|problem| Error::problem(kernel, problem))?;
        }
        let (grid, tiles) = self.grid.folded(kernel, limits)?;
        let limit = |what: &str, needed: u64, allowed: u32, limit: &'static str| {
            if needed > u64::from(allowed) {
                Err(Error::Limit { what: format!("{kernel}: {what}"), needed, allowed: allowed.into(), limit })
            } else {
                Ok(())
            }
        };
        // wgpu 30 does not check this limit, so we do.
        limit(
            "workgroup memory in bytes",
            self.workgroup_bytes,
            limits.max_compute_workgroup_storage_size,
            "max_compute_workgroup_storage_size",
        )?;
        limit(
            "invocations of a workgroup",
            self.workgroup_size.into(),
            limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x),
            "max_compute_invocations_per_workgroup",
        )?;
        for groups in grid {
            limit(
                "workgroups of one dimension",
                groups.into(),
                limits.max_compute_workgroups_per_dimension,
                "max_compute_workgroups_per_dimension",
            )?;
        }
        Ok(Plan {
            overrides: self.overrides,
            grid,
            tiles,
            workgroup_size: self.workgroup_size,
            // Within the limit, which has 32 bits.
            workgroup_bytes: self.workgroup_bytes as u32,
            covers: self.grid,
            loops: self.loops,
        })
    }
}

impl Grid {
    /// Workgroups in x, y and z, and the tiles before they were folded.
    fn folded(self, kernel: &'static str, limits: &wgpu::Limits) -> Result<([u32; 3], [u32; 3])> {
        match self {
            Grid::Folded { items, each } => {
                check_index(kernel, items, "elements")?;
                Ok((fold(kernel, items.div_ceil(u64::from(each.max(1))), limits)?, [0; 3]))
            }
            Grid::Tiled { size, tile } => {
                let [x, y, z] = [0, 1, 2].map(|axis| size[axis].div_ceil(tile[axis].max(1)));
                let tiles = [x, y, z];
                if tiles.iter().all(|&groups| groups <= limits.max_compute_workgroups_per_dimension) {
                    return Ok((tiles, tiles));
                }
                let groups = product(&tiles);
                check_index(kernel, groups, "workgroups")?;
                Ok((fold(kernel, groups, limits)?, tiles))
            }
            Grid::Columns { x, rows } => {
                let [y, z, _] = fold(kernel, rows.into(), limits)?;
                Ok(([x, y, z], [0; 3]))
            }
        }
    }
}

/// Everything a dispatch needs beside its buffers.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Values of the shader's `override` constants.
    pub overrides: Vec<(&'static str, f64)>,
    /// Workgroups in x, y and z; a zero means an empty dispatch.
    pub grid: [u32; 3],
    /// Tiles before folding, which the shader's parameters carry; zeros unless the grid is [`Grid::Tiled`].
    pub tiles: [u32; 3],
    /// Invocations of a workgroup.
    pub workgroup_size: u32,
    /// Workgroup memory in bytes.
    pub workgroup_bytes: u32,
    /// The grid before folding.
    pub covers: Grid,
    /// Loops that parameters bound.
    pub loops: Vec<Loop>,
}

impl Plan {
    /// Extents of a workgroup's tile; zeros for the kernels without.
    pub fn tile(&self) -> [u64; 3] {
        match self.covers {
            Grid::Tiled { tile, .. } => tile.map(u64::from),
            Grid::Folded { .. } | Grid::Columns { .. } => [0; 3],
        }
    }

    /// Value of an override, a whole number; 0 if the plan does not set it.
    pub fn value(&self, name: &str) -> u64 {
        self.overrides.iter().find(|(found, _)| *found == name).map_or(0, |(_, value)| *value as u64)
    }
}

/// Folds `groups` workgroups into x and y: one dimension holds 65 535 at most.
///
/// # Errors
/// [`Error::Limit`] when x and y together do not hold them.
fn fold(kernel: &'static str, groups: u64, limits: &wgpu::Limits) -> Result<[u32; 3]> {
    let most = u64::from(limits.max_compute_workgroups_per_dimension.max(1));
    if groups > most * most {
        return Err(Error::Limit {
            what: format!("{kernel}: workgroups"),
            needed: groups,
            allowed: most * most,
            limit: "max_compute_workgroups_per_dimension",
        });
    }
    let y = groups.div_ceil(most).max(1);
    Ok([groups.div_ceil(y) as u32, y as u32, 1])
}

fn check_index(kernel: &'static str, count: u64, what: &str) -> Result<()> {
    if count >= MAX_INDEX {
        return Err(Error::problem(kernel, format!("{count} {what}, must be below 2^31")));
    }
    Ok(())
}

/// Refuses an extent whose loop, `step` elements per iteration, takes more than [`MAX_ITERATIONS`].
fn check_iterations(name: &str, extent: u32, step: u32) -> Result<(), String> {
    if extent.div_ceil(step.max(1)) > MAX_ITERATIONS {
        let most = u64::from(MAX_ITERATIONS) * u64::from(step);
        return Err(format!("{name} is {extent}, must be at most {most}: a loop over it is too long"));
    }
    Ok(())
}

/// Refuses widths over the longest loop of a shader: narrower ones have sums and pitches of 32 bits.
pub(crate) fn check_widths(widths: &[(&'static str, u32)]) -> Result<(), String> {
    widths.iter().try_for_each(|&(name, width)| check_iterations(name, width, 1))
}

/// Refuses extents that must not be zero.
pub fn check_nonzero(extents: &[(&'static str, u32)]) -> Result<(), String> {
    match extents.iter().find(|(_, extent)| *extent == 0) {
        Some((name, _)) => Err(format!("{name} is 0")),
        None => Ok(()),
    }
}

/// Refuses extents and offsets that are no multiples of `of`: shaders read whole 16-byte loads.
///
/// # Errors
/// The first such extent.
pub fn check_multiples(of: u32, extents: &[(&'static str, u32)]) -> Result<(), String> {
    match extents.iter().find(|(_, extent)| !extent.is_multiple_of(of)) {
        Some((name, extent)) => Err(format!("{name} is {extent}, must be a multiple of {of}")),
        None => Ok(()),
    }
}

/// 1.0 for an override that switches something on.
pub fn flag(on: bool) -> f64 {
    if on { 1.0 } else { 0.0 }
}

/// Workgroup sizes of the kernels with one invocation an element.
pub const LINEAR_WORKGROUPS: &[u32] = &[256, 64];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::{Draft, Error, Grid, MAX_ITERATIONS};
    use wgpu::Limits;

    #[test]
    fn a_loop_ends_where_every_driver_ends_it() {
        for step in [1, 3, 64] {
            let most = MAX_ITERATIONS * step;
            let draft =
                |extent| Draft::elements(64, 1).walks("width", extent, step).checked("kernel", &Limits::default());
            draft(most).unwrap();
            let expected = format!("kernel: width is {}, must be at most {most}: a loop over it is too long", most + 1);
            assert_eq!(draft(most + 1).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn grids_fold_where_a_dimension_does_not_hold_them() {
        let limits = Limits { max_compute_workgroups_per_dimension: 4, ..Limits::default() };
        let plan = |grid| Draft::new(64, grid).checked("kernel", &limits);
        let folded = |items| plan(Grid::Folded { items, each: 64 });
        assert_eq!(folded(16 * 64).unwrap().grid, [4, 4, 1]);
        assert!(matches!(folded(16 * 64 + 1), Err(Error::Limit { needed: 17, allowed: 16, .. })));
        let tiled = |n| plan(Grid::Tiled { size: [8, n, 1], tile: [8, 2, 1] }).map(|plan| (plan.grid, plan.tiles));
        assert_eq!(tiled(8).unwrap(), ([1, 4, 1], [1, 4, 1]));
        assert_eq!(tiled(9).unwrap(), ([3, 2, 1], [1, 5, 1]));
        assert_eq!(tiled(32).unwrap(), ([4, 4, 1], [1, 16, 1]));
        assert!(matches!(tiled(33), Err(Error::Limit { needed: 17, allowed: 16, .. })));
        assert_eq!(plan(Grid::Columns { x: 3, rows: 9 }).unwrap().grid, [3, 3, 3]);
        assert!(matches!(plan(Grid::Columns { x: 5, rows: 1 }), Err(Error::Limit { needed: 5, allowed: 4, .. })));
    }

    #[test]
    fn what_no_index_holds_is_refused() {
        for grid in [
            Grid::Folded { items: 1 << 31, each: 1 },
            Grid::Tiled { size: [u32::MAX, 1, 1], tile: [1; 3] },
            Grid::Tiled { size: [u32::MAX; 3], tile: [1; 3] },
        ] {
            let error = Draft::new(64, grid).checked("kernel", &Limits::default()).unwrap_err();
            assert!(error.to_string().contains("2^31"), "{error}");
        }
    }
}

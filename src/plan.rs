//! From a problem and a device's limits to what is dispatched: pure, tested without a GPU.
//!
//! Every kernel module has a `Problem` with `plan(&self, &PlanContext, Tuning) -> Result<Plan>`; this module holds what they share.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::kernels::product;

/// How weights and caches are stored on the device. Activations, accumulators, maxima and sums are always f32; kernels by
/// cooperative matrices round the factors of a product to f16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Storage {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit floats, two in a word, decoded with `unpack2x16float`: no shader feature is needed.
    F16,
}

impl Storage {
    /// Both, in the order of their number in the shaders.
    pub const ALL: [Storage; 2] = [Storage::F32, Storage::F16];

    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Storage::F32 => 4,
            Storage::F16 => 2,
        }
    }

    /// Value of the shaders' `STORAGE_F16` override.
    pub(crate) fn constant(self) -> f64 {
        match self {
            Storage::F32 => 0.0,
            Storage::F16 => 1.0,
        }
    }

    /// Bytes of a densely packed tensor, rounded up to whole words.
    pub fn tensor_bytes(self, elements: u64) -> u64 {
        padded(elements.saturating_mul(self.bytes()), 4)
    }

    /// Elements from one cache row to the next: rows begin on 16-byte boundaries, so that a row is read in whole
    /// 16-byte loads and two rows never share a word.
    pub fn row_pitch(self, width: u32) -> u32 {
        // A width without a pitch is beyond every device: what follows from it is refused.
        width.checked_next_multiple_of(16 / self.bytes() as u32).unwrap_or(u32::MAX)
    }

    /// 16-byte loads from one cache row to the next.
    pub(crate) fn row_loads(self, width: u32) -> u32 {
        self.row_pitch(width) / (16 / self.bytes() as u32)
    }

    /// A short name: `f32` or `f16`.
    pub fn name(self) -> &'static str {
        match self {
            Storage::F32 => "f32",
            Storage::F16 => "f16",
        }
    }
}

/// What kind of machine the tile sizes are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterClass {
    /// Shaders run on the CPU: barriers and workgroup memory cost, few wide workgroups win.
    Software,
    /// Shares memory with the CPU.
    Integrated,
    /// Has its own memory.
    Discrete,
    /// Shares memory with the CPU, has simdgroups of 32 and more room a workgroup than others that share it.
    Apple,
}

/// Apple's PCI vendor id.
const APPLE_VENDOR: u32 = 0x106b;

impl AdapterClass {
    /// Every class.
    pub const ALL: [AdapterClass; 4] =
        [AdapterClass::Software, AdapterClass::Integrated, AdapterClass::Discrete, AdapterClass::Apple];

    /// Reads the class off what wgpu tells of an adapter.
    pub fn of(info: &wgpu::AdapterInfo) -> Self {
        // Metal also drives the AMD and Intel GPUs of older machines; Apple's own are reached through Vulkan, too.
        if info.vendor == APPLE_VENDOR || info.backend == wgpu::Backend::Metal && info.name.starts_with("Apple") {
            return AdapterClass::Apple;
        }
        match info.device_type {
            wgpu::DeviceType::Cpu => AdapterClass::Software,
            wgpu::DeviceType::IntegratedGpu => AdapterClass::Integrated,
            // A browser or a virtual machine does not say: plan for the common case of a real GPU behind it.
            wgpu::DeviceType::DiscreteGpu | wgpu::DeviceType::VirtualGpu | wgpu::DeviceType::Other => {
                AdapterClass::Discrete
            }
        }
    }
}

/// Of WebGPU: no subgroup has fewer invocations.
const SMALLEST_SUBGROUP: u32 = 4;

/// Of the GPUs with cooperative matrices.
const LARGEST_SUBGROUP: u32 = 64;

/// Square cooperative matrices, by their size: f16 factors, f32 sums.
///
/// A device does not tell which it has. Its adapter does: [`Cooperative::of`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cooperative {
    /// 16 × 16 × 16.
    pub by_16: bool,
    /// 8 × 8 × 8.
    pub by_8: bool,
}

impl Cooperative {
    /// None.
    pub const NONE: Cooperative = Cooperative { by_16: false, by_8: false };

    /// 16 × 16 × 16 alone.
    pub const BY_16: Cooperative = Cooperative { by_16: true, by_8: false };

    /// 8 × 8 × 8 alone.
    pub const BY_8: Cooperative = Cooperative { by_16: false, by_8: true };

    /// Those among an adapter's `cooperative_matrix_properties`.
    pub fn of(properties: &[wgpu::CooperativeMatrixProperties]) -> Self {
        let has = |size| {
            properties.iter().any(|shape| {
                [shape.m_size, shape.n_size, shape.k_size] == [size; 3]
                    && shape.ab_type == wgpu::CooperativeScalarType::F16
                    && shape.cr_type == wgpu::CooperativeScalarType::F32
                    && !shape.saturating_accumulation
            })
        };
        Cooperative { by_16: has(16), by_8: has(8) }
    }

    /// Their names.
    pub fn names(self) -> Vec<&'static str> {
        let named = [(self.by_16, "16×16×16 f16"), (self.by_8, "8×8×8 f16")];
        named.into_iter().filter_map(|(has, name)| has.then_some(name)).collect()
    }

    /// What is here and not in `offered`.
    pub(crate) fn without(self, offered: Self) -> Self {
        Cooperative { by_16: self.by_16 && !offered.by_16, by_8: self.by_8 && !offered.by_8 }
    }
}

/// What a plan may know of the device.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanContext {
    /// The device's limits.
    pub limits: wgpu::Limits,
    /// The class that `Tuning::Auto` chooses for.
    pub class: AdapterClass,
    /// What the device was opened with.
    pub features: wgpu::Features,
    /// The smallest subgroup that a shader may run in.
    pub subgroup_min_size: u32,
    /// The largest.
    pub subgroup_max_size: u32,
    /// Cooperative matrices that the caller knows the adapter to have.
    pub cooperative: Cooperative,
    /// What `Tuning::Auto` takes instead, where it was measured.
    pub tunings: Tunings,
}

/// Measured choices: by kernel, the number of the tile settings that `Tuning::Auto` takes instead of those for the
/// adapter's class. Nothing here measures: `egmla tune` does when it is asked, and applications may.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tunings(pub BTreeMap<String, usize>);

impl PlanContext {
    /// WebGPU's default limits, on a class of adapter: what every device offers.
    pub fn webgpu_defaults(class: AdapterClass) -> Self {
        PlanContext::new(wgpu::Limits::default(), class)
    }

    /// Limits and a class of adapter, no features, nothing measured.
    pub fn new(limits: wgpu::Limits, class: AdapterClass) -> Self {
        PlanContext {
            limits,
            class,
            features: wgpu::Features::empty(),
            subgroup_min_size: SMALLEST_SUBGROUP,
            subgroup_max_size: LARGEST_SUBGROUP,
            cooperative: Cooperative::NONE,
            tunings: Tunings::default(),
        }
    }

    /// The largest subgroup, within what wgpu promises: a context may be of a caller's own making.
    pub(crate) fn widest_subgroup(&self) -> u32 {
        self.subgroup_max_size.clamp(SMALLEST_SUBGROUP, wgpu::MAXIMUM_SUBGROUP_MAX_SIZE)
    }

    /// The most lanes, a power of two up to `most`, that are sure to lie in one subgroup.
    pub(crate) fn team(&self, most: u32) -> u32 {
        1 << self.subgroup_min_size.clamp(SMALLEST_SUBGROUP, most).ilog2()
    }

    /// The setting of a kernel that was measured, else the one for the class.
    pub(crate) fn auto(&self, kernel: &str, of_class: usize) -> usize {
        self.tunings.0.get(kernel).copied().unwrap_or(of_class)
    }
}

/// Which of a kernel's tile settings to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tuning {
    /// The one that was measured ([`Tunings`]), else the one for the adapter's class.
    #[default]
    Auto,
    /// The i-th of the kernel's `TUNINGS`; an error when the device does not offer what it needs.
    Forced(usize),
}

impl Tuning {
    /// The index into a kernel's list of `count` settings.
    pub(crate) fn choose(self, kernel: &'static str, count: usize, auto: usize) -> Result<usize> {
        match self {
            // A measured choice may be of another version, or of a caller's own making.
            Tuning::Auto if auto < count => Ok(auto),
            Tuning::Forced(index) if index < count => Ok(index),
            Tuning::Auto => Err(no_tuning(kernel, auto, count)),
            Tuning::Forced(index) => Err(no_tuning(kernel, index, count)),
        }
    }
}

fn no_tuning(kernel: &'static str, index: usize, count: usize) -> Error {
    Error::problem(kernel, format!("tuning {index} does not exist, there are {count}"))
}

/// Bytes or elements, rounded up; saturates, so that every later comparison with a limit fails: a number that wrapped around
/// would pass them all.
pub(crate) fn padded(count: u64, to: u64) -> u64 {
    count.checked_next_multiple_of(to).unwrap_or(u64::MAX)
}

/// Everything a dispatch needs beside its buffers.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Values of the shader's `override` constants.
    pub overrides: Vec<(&'static str, f64)>,
    /// Workgroups in x, y and z; a zero anywhere means that there is nothing to do.
    pub grid: [u32; 3],
    /// The same before it was folded, for a kernel of tiles; its parameters carry it. Zeros for the other kernels.
    pub tiles: [u32; 3],
    /// Invocations of a workgroup.
    pub workgroup_size: u32,
    /// Workgroup memory in bytes: wgpu 30 does not check this limit, so we do.
    pub workgroup_bytes: u32,
}

impl Plan {
    /// Checks the plan of a kernel of tiles, whose grid is folded where a dimension does not hold it: the shader finds the tile of
    /// workgroup `i = y · num_workgroups.x + x` at `(i mod tiles.x, i / tiles.x mod tiles.y, i / (tiles.x · tiles.y))`.
    ///
    /// # Errors
    /// [`Error::Limit`] with the number needed and the number allowed; a grid that folds and has 2^31 workgroups or more.
    pub(crate) fn tiled(mut self, kernel: &'static str, limits: &wgpu::Limits) -> Result<Self> {
        self.tiles = self.grid;
        if self.grid.iter().any(|&groups| groups > limits.max_compute_workgroups_per_dimension) {
            let groups = product(&self.tiles);
            check_index(kernel, groups, "workgroups")?;
            self.grid = fold_grid(kernel, groups, limits)?;
        }
        self.checked(kernel, limits)
    }

    /// Checks a plan against the limits.
    ///
    /// # Errors
    /// [`Error::Limit`] with the number needed and the number allowed.
    pub(crate) fn checked(self, kernel: &'static str, limits: &wgpu::Limits) -> Result<Self> {
        let limit = |what: &str, needed: u64, allowed: u32, limit: &'static str| {
            if needed > u64::from(allowed) {
                Err(Error::Limit { what: format!("{kernel}: {what}"), needed, allowed: allowed.into(), limit })
            } else {
                Ok(())
            }
        };
        limit(
            "workgroup memory in bytes",
            self.workgroup_bytes.into(),
            limits.max_compute_workgroup_storage_size,
            "max_compute_workgroup_storage_size",
        )?;
        limit(
            "invocations of a workgroup",
            self.workgroup_size.into(),
            limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x),
            "max_compute_invocations_per_workgroup",
        )?;
        for groups in self.grid {
            limit(
                "workgroups of one dimension",
                groups.into(),
                limits.max_compute_workgroups_per_dimension,
                "max_compute_workgroups_per_dimension",
            )?;
        }
        Ok(self)
    }
}

/// Lays `groups` workgroups out over x and y, since one dimension holds 65 535 at most. The shader recovers the index
/// as `y · num_workgroups.x + x` and ignores those past the end.
///
/// # Errors
/// [`Error::Limit`] when x and y together do not hold them.
pub(crate) fn fold_grid(kernel: &'static str, groups: u64, limits: &wgpu::Limits) -> Result<[u32; 3]> {
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

/// Refuses more than a shader can number: indices have 32 bits, and a folded grid overshoots. Below 2^31 it cannot wrap around to
/// the first elements.
fn check_index(kernel: &'static str, count: u64, what: &str) -> Result<()> {
    if count >= 1 << 31 {
        return Err(Error::problem(kernel, format!("{count} {what}, must be below 2^31")));
    }
    Ok(())
}

/// The size of the one-dimensional kernels' workgroups, per tuning.
pub(crate) const LINEAR_WORKGROUPS: &[u32] = &[256, 64];

/// Plan of a kernel with one invocation an element and no workgroup memory.
pub(crate) fn linear_plan(
    kernel: &'static str,
    elements: u64,
    mut overrides: Vec<(&'static str, f64)>,
    context: &PlanContext,
    tuning: Tuning,
) -> Result<Plan> {
    check_index(kernel, elements, "elements")?;
    let workgroup_size = LINEAR_WORKGROUPS[tuning.choose(kernel, LINEAR_WORKGROUPS.len(), context.auto(kernel, 0))?];
    overrides.push(("WORKGROUP", workgroup_size.into()));
    let grid = fold_grid(kernel, elements.div_ceil(workgroup_size.into()), &context.limits)?;
    Plan { overrides, grid, tiles: [0; 3], workgroup_size, workgroup_bytes: 0 }.checked(kernel, &context.limits)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::{AdapterClass, PlanContext, Storage, Tuning, Tunings, padded};
    use crate::kernels::matmul::Problem as Matmul;
    use crate::kernels::matvec::Problem as Matvec;
    use crate::kernels::{Problem, REGISTRY, attention_prefill_cooperative, roofline_cooperative};

    #[test]
    fn what_does_not_fit_a_number_does_not_come_out_small() {
        assert_eq!((padded(5, 4), padded(8, 4)), (8, 8));
        assert_eq!((padded(u64::MAX, 4), padded(u64::MAX - 1, 16)), (u64::MAX, u64::MAX));
        for storage in Storage::ALL {
            assert_eq!(storage.tensor_bytes(u64::MAX), u64::MAX);
            assert_eq!(storage.row_pitch(u32::MAX), u32::MAX);
            assert_eq!((storage.row_loads(0), storage.row_loads(9)), (0, if storage == Storage::F32 { 3 } else { 2 }));
            assert!(storage.row_loads(u32::MAX) > 1 << 28);
        }
    }

    #[test]
    fn a_measured_setting_that_does_not_exist_is_an_error() {
        let mut context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
        context.tunings = Tunings(REGISTRY.iter().map(|spec| (spec.name.to_owned(), 9)).collect());
        let problem = Matmul::linear(8, 8, 8, false, Storage::F32);
        let words = "tuning 9 does not exist, there are 4";
        assert!(problem.plan(&context, Tuning::Auto).unwrap_err().to_string().ends_with(words));
        assert!(Matvec(problem).plan(&context, Tuning::Auto).is_err());
        assert!(problem.plan(&context, Tuning::Forced(9)).unwrap_err().to_string().ends_with(words));
    }

    #[test]
    fn subgroups_that_no_device_has_do_not_overflow() {
        for size in [0, 1, u32::MAX] {
            let mut context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
            (context.subgroup_min_size, context.subgroup_max_size) = (size, size);
            context.limits.max_compute_invocations_per_workgroup = 1024;
            context.limits.max_compute_workgroup_size_x = 1024;
            context.limits.max_compute_workgroup_storage_size = 1 << 16;
            let plan = roofline_cooperative::Problem { groups: 1, trips: 1 }.plan(&context, Tuning::Auto).unwrap();
            assert!((4..=128).contains(&plan.workgroup_size), "{plan:?}");
            let problem = crate::kernels::attention_prefill::Problem {
                tokens: 16,
                query_tiles: 1,
                n_sequence: 1,
                n_head: 1,
                d_nope: 8,
                d_rope: 8,
                d_value: 8,
                kv_first: 0,
                kv_rows: 16,
                cache_rows: 16,
                first: true,
                last: true,
                scale: 1.0,
                storage: Storage::F16,
            };
            attention_prefill_cooperative::Problem(problem).plan(&context, Tuning::Auto).unwrap();
        }
    }
}

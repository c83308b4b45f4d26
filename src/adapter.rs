//! What plans depend on: a device's limits, class and features, and the settings measured on it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The kind of machine that tile sizes are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterClass {
    /// Shaders run on the CPU: barriers and workgroup memory are slow, few wide workgroups are fast.
    Software,
    /// Shares memory with the CPU.
    Integrated,
    /// Has its own memory.
    Discrete,
    /// Shares memory with the CPU, with simdgroups of 32 and more workgroup memory than other such GPUs.
    Apple,
}

/// Apple's PCI vendor id.
const APPLE_VENDOR: u32 = 0x106b;

impl AdapterClass {
    /// Every class.
    pub const ALL: [AdapterClass; 4] =
        [AdapterClass::Software, AdapterClass::Integrated, AdapterClass::Discrete, AdapterClass::Apple];

    /// Subgroups that keep a GPU of the class busy, one or two for each of its multiprocessors' schedulers: work is cut into so many
    /// parts where it can be. One in software, which gains nothing from more parts than it has threads.
    pub fn full(self) -> u32 {
        match self {
            AdapterClass::Software => 1,
            AdapterClass::Integrated => 64,
            AdapterClass::Apple => 256,
            AdapterClass::Discrete => 512,
        }
    }

    /// The class of an adapter, from wgpu's description of it.
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
/// wgpu reports them for an adapter ([`Cooperative::of`]), not for a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cooperative {
    /// 16 × 16 × 16.
    pub by_16: bool,
    /// 8 × 8 × 8.
    pub by_8: bool,
}

/// Features that a device must have for cooperative matrices. wgpu grants the first only with
/// `wgpu::ExperimentalFeatures`; [`Kernels::with_cooperative`](crate::device::Kernels::with_cooperative) takes the sizes.
pub const COOPERATIVE_FEATURES: wgpu::Features =
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SHADER_F16).union(wgpu::Features::SUBGROUP);

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

    /// Sizes of `self` that `offered` lacks.
    pub(crate) fn without(self, offered: Self) -> Self {
        Cooperative { by_16: self.by_16 && !offered.by_16, by_8: self.by_8 && !offered.by_8 }
    }
}

/// What plans depend on.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanContext {
    /// The device's limits.
    pub limits: wgpu::Limits,
    /// The class that `Tuning::Auto` chooses for.
    pub class: AdapterClass,
    /// The device's features.
    pub features: wgpu::Features,
    /// The smallest subgroup that a shader may run in.
    pub subgroup_min_size: u32,
    /// The largest.
    pub subgroup_max_size: u32,
    /// Cooperative matrices of the adapter, as the caller says.
    pub cooperative: Cooperative,
    /// Measured settings, which `Tuning::Auto` prefers.
    pub tunings: Tunings,
    /// Kernels that were wrong on the device.
    pub left_out: LeftOut,
}

/// Kernels that are not to run on a device, by their stems.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeftOut(pub BTreeMap<String, WhyLeftOut>);

/// Why a kernel is not to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhyLeftOut {
    /// It computed something else, or was refused: in one line.
    Wrong(String),
    /// It took the device or its process along, or did not end: not even checks run it again.
    Fatal(String),
}

impl std::fmt::Display for WhyLeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (WhyLeftOut::Wrong(why) | WhyLeftOut::Fatal(why)) = self;
        f.write_str(why)
    }
}

/// Measured tile settings by kernel: `Tuning::Auto` takes them instead of those for the adapter's class. The library measures
/// nothing unasked: `egmla tune` does, and applications may.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tunings(pub BTreeMap<String, usize>);

impl PlanContext {
    /// Most bytes of a binding: shaders index elements with 32 bits, and drivers want multiples of 256.
    pub(crate) const MOST_BINDING: u64 = (1 << 32) - 256;

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
            left_out: LeftOut::default(),
        }
    }

    /// WebGPU's default limits with the least sizes of buffers that `plan` accepts. What is planned adapts to the binding where it
    /// can: each refusal names the least that it cannot do without.
    ///
    /// # Errors
    /// Other refusals; [`Error::Limit`] for what no device holds, since shaders reach 4 GiB of a binding.
    pub(crate) fn least_limits(plan: impl Fn(&PlanContext) -> Result<()>) -> Result<wgpu::Limits> {
        let mut context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
        loop {
            let error = match plan(&context) {
                Ok(()) => return Ok(context.limits),
                Err(error) => error,
            };
            let limits = &mut context.limits;
            match error {
                Error::Limit { needed, limit: "max_buffer_size", .. } if needed > limits.max_buffer_size => {
                    limits.max_buffer_size = needed;
                }
                Error::Limit { needed, allowed, limit: "max_storage_buffer_binding_size", .. }
                    if needed > allowed && needed <= PlanContext::MOST_BINDING =>
                {
                    limits.max_storage_buffer_binding_size = needed.max(limits.max_storage_buffer_binding_size);
                    limits.max_buffer_size = needed.max(limits.max_buffer_size);
                }
                error => return Err(error),
            }
        }
    }

    /// Bytes of the largest storage buffer that one binding holds.
    pub(crate) fn largest_binding(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size.min(self.limits.max_buffer_size)
    }

    /// Refuses a buffer that one binding does not hold.
    ///
    /// # Errors
    /// [`Error::Limit`] with the bytes needed and the bytes allowed.
    pub(crate) fn check_binding(&self, needed: u64, what: impl FnOnce() -> String) -> Result<()> {
        let allowed = self.largest_binding();
        if needed > allowed {
            return Err(Error::Limit { what: what(), needed, allowed, limit: "max_storage_buffer_binding_size" });
        }
        Ok(())
    }

    /// The largest subgroup, a power of two as WGSL has them, within wgpu's bounds: a caller may have built the context.
    pub(crate) fn widest_subgroup(&self) -> u32 {
        self.subgroup_max_size.clamp(SMALLEST_SUBGROUP, wgpu::MAXIMUM_SUBGROUP_MAX_SIZE).next_power_of_two()
    }

    /// The most lanes, a power of two up to `most`, that every subgroup has.
    pub(crate) fn lanes(&self, most: u32) -> u32 {
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
            // A measured choice may come from another version, or from the caller.
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

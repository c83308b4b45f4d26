//! Chooses an adapter and opens the program's device; no other module does.

use clap::{Args, ValueEnum};
use egmla::fault::Faults;
use egmla::files::read;
use egmla::low_level::Tunings;
use egmla::low_level::kernels::optional_features;
use egmla::{Kernels, wgpu};

use crate::cache_folder;
use crate::console::{self, one_line};
use crate::failure::Failure;
use crate::prove;
use crate::unchecked::{self, Pipelines};

/// `--adapter`, shared by every command that computes.
#[derive(Args, Debug, Clone)]
pub struct AdapterOption {
    /// `auto` (a GPU, else the CPU; check, bench, tune and export take a software adapter, too), `cpu`, `reference` (the CPU in
    /// f64), or part of an adapter's name or backend
    #[arg(long, value_name = "A", default_value = "auto")]
    pub adapter: String,
    /// Run every shader with wgpu's checks of loops and indices, as browsers do; without them kernels are faster, results the same
    #[arg(long)]
    pub shader_checks: bool,
}

/// `--limits`
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LimitsOption {
    /// WebGPU's default limits, no feature, every check of shaders
    Default,
    /// Buffers as large as the adapter has them, and the features that kernels use
    #[default]
    Adapter,
}

/// The backend that computes.
pub enum Backend {
    /// The CPU.
    Cpu {
        /// In f64, by the kernels' definitions; else in f32, for speed.
        reference: bool,
        /// Why, in words: asked for, or no adapter.
        reason: String,
    },
    /// The kernels on a device of wgpu.
    Gpu(Box<Gpu>),
}

/// An open device.
pub struct Gpu {
    /// wgpu's description of the adapter.
    pub info: wgpu::AdapterInfo,
    /// The kernels, with their device.
    pub kernels: Kernels,
    /// The driver's cache of compiled pipelines, and what it began with.
    pipelines: Option<(wgpu::PipelineCache, Option<Pipelines>)>,
    /// Faults of the device between calls; the program must stop after one.
    faults: Faults,
}

impl Backend {
    /// One line for the user: name, backend, driver.
    pub fn describe(&self) -> String {
        match self {
            Backend::Cpu { reference: true, reason } => format!("CPU reference in f64 ({reason})"),
            Backend::Cpu { reference: false, reason } => format!("CPU in f32 ({reason})"),
            Backend::Gpu(gpu) => describe(&gpu.info),
        }
    }
}

impl Gpu {
    /// Says which measured tile settings are in force.
    pub fn note_tunings(&self) {
        let tunings = &self.kernels.context().tunings.0;
        if !tunings.is_empty() {
            let choices: Vec<_> = tunings.iter().map(|(kernel, choice)| format!("{kernel} {choice}")).collect();
            console::note(format_args!("tuned: {} (egmla tune --forget drops them)", choices.join(", ")));
        }
    }

    /// The same without the kernels that are wrong on this adapter, whose number is given.
    fn proven(mut self, number: usize) -> Self {
        self.kernels = prove::proven(self.kernels.clone(), &self.info, number);
        self
    }

    /// Fails when the device was lost, or reported an error since the last call.
    pub fn check(&self) -> Result<(), Failure> {
        Ok(self.faults.check()?)
    }
}

/// Keeps compiled pipelines for the next run. If that fails, the next run compiles again.
impl Drop for Gpu {
    fn drop(&mut self) {
        let Some((cache, before)) = &self.pipelines else { return };
        let (Some(file), Some(data)) = (cache_folder::pipelines_file(&self.info), Pipelines::of(cache)) else { return };
        if before.as_ref() == Some(&data) {
            return;
        }
        if let Err(error) = cache_folder::write(&file, &data.seal()) {
            tracing::debug!("{}: {error}", file.display());
        }
    }
}

/// Most bytes of a kept cache of pipelines that are read.
const MOST_PIPELINES: u64 = 256 << 20;

/// Most bytes of kept tile settings that are read.
const MOST_TUNINGS: u64 = 1 << 20;

/// The driver's cache, with what an earlier run kept of this adapter.
fn pipeline_cache(device: &wgpu::Device, info: &wgpu::AdapterInfo) -> Option<(wgpu::PipelineCache, Option<Pipelines>)> {
    if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
        return None;
    }
    let kept = read(&cache_folder::pipelines_file(info)?, MOST_PIPELINES).ok();
    let kept = kept.as_deref().and_then(Pipelines::unseal);
    let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let cache = unchecked::pipeline_cache(device, kept.as_ref());
    pollster::block_on(scope.pop()).is_none().then_some((cache, kept))
}

/// Measured tile settings of this adapter and driver, when `egmla tune` kept some.
pub fn tunings(info: &wgpu::AdapterInfo) -> Tunings {
    let Some(file) = cache_folder::tunings_file(info) else { return Tunings::default() };
    let Ok(bytes) = read(&file, MOST_TUNINGS) else { return Tunings::default() };
    serde_json::from_slice(&bytes).unwrap_or_else(|error| {
        tracing::warn!("{}: {error}; run `egmla tune` again", file.display());
        Tunings::default()
    })
}

/// One line: name, backend, driver, and that it is software where it is.
pub fn describe(info: &wgpu::AdapterInfo) -> String {
    let software = if info.device_type == wgpu::DeviceType::Cpu { ", software" } else { "" };
    let driver = match (info.driver.as_str(), info.driver_info.as_str()) {
        ("", "") => String::new(),
        (driver, details) => format!(", {}", [driver, details].join(" ").trim()),
    };
    format!("{} ({:?}{driver}{software})", info.name, info.backend)
}

/// Every adapter of the machine that `WGPU_BACKEND` allows, real GPUs first.
///
/// # Errors
/// Bad usage when that variable names no backend: wgpu would find no adapter, and not say why.
pub fn adapters() -> Result<Vec<wgpu::Adapter>, Failure> {
    let asked = std::env::var_os("WGPU_BACKEND");
    let asked = asked.as_ref().map(|asked| asked.to_string_lossy());
    if let Some(name) =
        asked.iter().flat_map(|names| names.split(',')).find(|name| wgpu::Backends::from_comma_list(name).is_empty())
    {
        return Err(Failure::usage(format!(
            "WGPU_BACKEND holds `{name}`, which is no backend; unset it, or name some of vulkan, metal, dx12, gl"
        )));
    }
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let backends = wgpu::Backends::from_env().unwrap_or(wgpu::Backends::all());
    let mut adapters = pollster::block_on(instance.enumerate_adapters(backends));
    adapters.sort_by_key(|adapter| rank(&adapter.get_info()));
    Ok(adapters)
}

fn rank(info: &wgpu::AdapterInfo) -> (u8, u8) {
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    };
    // Beside Vulkan, Metal and DX12, GL offers the least.
    (kind, u8::from(info.backend == wgpu::Backend::Gl))
}

/// Opens what `--adapter` asks for, to compute with: `auto` is a GPU, else the CPU, which is faster than a software adapter on it.
pub fn open(option: &AdapterOption) -> Result<Backend, Failure> {
    open_among(option, LimitsOption::Adapter, |info| info.device_type != wgpu::DeviceType::Cpu)
}

/// The same to measure or to check an adapter, with the limits and features of `--limits`: `auto` takes software, too.
pub fn open_with(option: &AdapterOption, limits: LimitsOption) -> Result<Backend, Failure> {
    open_among(option, limits, |_| true)
}

/// The same; `auto` takes the first adapter that is `fit`.
fn open_among(
    option: &AdapterOption,
    limits: LimitsOption,
    fit: impl Fn(&wgpu::AdapterInfo) -> bool,
) -> Result<Backend, Failure> {
    let wanted = option.adapter.trim().to_lowercase();
    if wanted.is_empty() {
        let words = "give auto, cpu, reference, or part of an adapter's name or backend";
        return Err(Failure::usage(format!("--adapter is empty; {words}")));
    }
    if wanted == "cpu" || wanted == "reference" {
        return Ok(Backend::Cpu { reference: wanted == "reference", reason: "asked for".to_owned() });
    }
    let found = adapters()?;
    if wanted == "auto" {
        for (number, adapter) in found.iter().enumerate().filter(|(_, adapter)| fit(&adapter.get_info())) {
            match open_device(adapter, option.shader_checks, limits).map(|gpu| gpu.proven(number)) {
                Ok(gpu) => return Ok(Backend::Gpu(Box::new(gpu))),
                Err(problem) => tracing::warn!("{}: {}", adapter.get_info().name, problem.message()),
            }
        }
        // One that is fit was tried, and warned of.
        let left = found.iter().map(wgpu::Adapter::get_info).find(|info| !fit(info));
        let left = left.map_or_else(String::new, |info| {
            let name = info.name.split_whitespace().next().unwrap_or_default();
            format!("; --adapter {name} takes the software adapter")
        });
        return Ok(Backend::Cpu { reference: false, reason: format!("no usable GPU on this machine{left}") });
    }
    let matches = |(_, adapter): &(usize, &wgpu::Adapter)| {
        let info = adapter.get_info();
        info.name.to_lowercase().contains(&wanted) || format!("{:?}", info.backend).to_lowercase().contains(&wanted)
    };
    match found.iter().enumerate().find(matches) {
        Some((number, adapter)) => {
            open_device(adapter, option.shader_checks, limits).map(|gpu| Backend::Gpu(Box::new(gpu.proven(number))))
        }
        None => {
            let names: Vec<_> = found.iter().map(|adapter| describe(&adapter.get_info())).collect();
            let there = if names.is_empty() { "none".to_owned() } else { names.join("; ") };
            Err(Failure::usage(format!("no adapter matches `{}`; there are: cpu; reference; {there}", option.adapter)))
        }
    }
}

/// WebGPU's default limits, with all of the adapter's buffer sizes, since a checkpoint's largest tensor decides what is needed, and
/// all of its workgroups' invocations and memory, which the kernels on cooperative matrices use.
/// An adapter below the defaults gives its own limits: plans check those they depend on.
pub fn limits(adapter: &wgpu::Adapter) -> wgpu::Limits {
    let offered = adapter.limits();
    wgpu::Limits {
        max_buffer_size: offered.max_buffer_size,
        max_storage_buffer_binding_size: offered.max_storage_buffer_binding_size,
        max_compute_workgroup_storage_size: offered.max_compute_workgroup_storage_size,
        max_compute_invocations_per_workgroup: offered.max_compute_invocations_per_workgroup,
        max_compute_workgroup_size_x: offered.max_compute_workgroup_size_x,
        ..wgpu::Limits::default().or_worse_values_from(&offered)
    }
}

/// Features of the adapter that some variant uses.
pub fn features(adapter: &wgpu::Adapter) -> wgpu::Features {
    adapter.features() & optional_features()
}

/// Opens an adapter by its number, with every kernel: to prove them.
pub fn open_unproven(number: usize, shader_checks: bool) -> Result<Backend, Failure> {
    match adapters()?.get(number) {
        Some(adapter) => {
            open_device(adapter, shader_checks, LimitsOption::Adapter).map(|gpu| Backend::Gpu(Box::new(gpu)))
        }
        None => Ok(Backend::Cpu { reference: false, reason: "there is no such adapter".to_owned() }),
    }
}

fn open_device(adapter: &wgpu::Adapter, shader_checks: bool, offer: LimitsOption) -> Result<Gpu, Failure> {
    // Neither changes a result: one measures, the other makes a second start quicker.
    let wanted = features(adapter) | wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::PIPELINE_CACHE;
    let (required_limits, wanted, (cooperative, experimental_features, matrices)) = match offer {
        LimitsOption::Adapter => (limits(adapter), wanted, unchecked::cooperative(adapter)),
        LimitsOption::Default => (wgpu::Limits::default(), wgpu::Features::empty(), unchecked::none()),
    };
    let request = adapter.request_device(&wgpu::DeviceDescriptor {
        label: Some("egmla"),
        required_features: adapter.features() & wanted | cooperative,
        required_limits,
        experimental_features,
        ..Default::default()
    });
    let (device, queue) = pollster::block_on(request).map_err(|error| Failure::run(one_line(&error.to_string())))?;
    let kernels = Kernels::new(&device, &queue)?;
    let faults = Faults::watch(&kernels);
    let info = adapter.get_info();
    let pipelines = pipeline_cache(&device, &info);
    let mut kernels =
        kernels.with_cooperative(matrices).with_shader_checks(shader_checks || offer == LimitsOption::Default);
    if let Some((cache, _)) = &pipelines {
        kernels = kernels.with_pipeline_cache(cache.clone());
    }
    // Settings of an older version may not exist any more.
    match kernels.with_tunings(tunings(&info)) {
        Ok(tuned) => kernels = tuned,
        Err(error) => tracing::warn!("measured tile settings are not used: {error}; run `egmla tune` again"),
    }
    Ok(Gpu { info, kernels, pipelines, faults })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// Kernels on matrices want more than WebGPU's 16 KiB and 256 invocations.
    #[test]
    fn a_device_has_the_workgroups_of_its_adapter() {
        let adapter = adapters().unwrap().into_iter().next().unwrap();
        let of = |limits: wgpu::Limits| {
            let largest = (limits.max_storage_buffer_binding_size, limits.max_buffer_size);
            let invocations = (limits.max_compute_invocations_per_workgroup, limits.max_compute_workgroup_size_x);
            (limits.max_compute_workgroup_storage_size, invocations, largest)
        };
        let opened = |offer| of(open_device(&adapter, false, offer).unwrap().kernels.device().limits());
        assert_eq!(opened(LimitsOption::Adapter), of(adapter.limits()));
        assert_eq!(opened(LimitsOption::Default), of(wgpu::Limits::default()));
        // Of the software adapters that run this, all offer more.
        assert_ne!(of(adapter.limits()), of(wgpu::Limits::default()));
    }
}

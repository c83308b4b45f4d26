//! The device of the GPU tests.

#[allow(dead_code, reason = "the tests that take this need a part of it")]
#[path = "../../cli/src/unchecked.rs"]
pub mod unchecked;

use egmla::attention::AttentionOptions;
use egmla::config::{Activation, AttentionConfig, GateConfig, GateNorm, GateSite};
use egmla::fault::Faults;
use egmla::{Kernels, Storage, wgpu};

/// Of [`config`].
#[allow(dead_code, reason = "the tests that take this need a part of it")]
pub const HIDDEN: usize = 24;
/// Of [`config`].
#[allow(dead_code, reason = "the tests that take this need a part of it")]
pub const VOCAB: u32 = 17;

/// A small layer of odd widths, with a gate or without.
#[allow(dead_code, reason = "the tests that take this need a part of it")]
pub fn config(site: Option<GateSite>) -> AttentionConfig {
    let gate = |site| GateConfig {
        vocab_size: VOCAB,
        d_gate: 5,
        tied: false,
        site,
        activation: Activation::OnePlus,
        norm: GateNorm::LayerNorm,
        norm_eps: 1e-5,
    };
    AttentionConfig {
        hidden_size: HIDDEN as u32,
        n_head: 3,
        d_latent: 12,
        d_nope: 8,
        d_rope: 4,
        d_value: 10,
        gate: site.map(gate),
        ..AttentionConfig::default()
    }
}

pub struct Gpu {
    pub kernels: Kernels,
    pub faults: Faults,
}

/// What the environment variable `EGMLA_LIMITS` opens devices with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Offer {
    /// `default`: WebGPU's default limits, no feature at all and every check of shaders, as in a browser on the least that it may
    /// run on.
    Default,
    /// Unset: the same limits, and the features that variants of the kernels use, where the adapter has them.
    Features,
    /// `adapter`: those features, and every limit that the adapter offers.
    Adapter,
}

impl Offer {
    fn from_env() -> Self {
        match std::env::var("EGMLA_LIMITS").as_deref() {
            Err(_) | Ok("") => Offer::Features,
            Ok("default") => Offer::Default,
            Ok("adapter") => Offer::Adapter,
            Ok(other) => panic!("EGMLA_LIMITS is `{other}`, must be `default` or `adapter`"),
        }
    }
}

/// The first adapter, GL last. No adapter is a failure: a test that compared nothing must not pass.
pub fn adapter(mut descriptor: wgpu::InstanceDescriptor) -> wgpu::Adapter {
    descriptor.backends = wgpu::Backends::from_env().unwrap_or(wgpu::Backends::all());
    let backends = descriptor.backends;
    let instance = wgpu::Instance::new(descriptor);
    let mut adapters = pollster::block_on(instance.enumerate_adapters(backends));
    adapters.sort_by_key(|adapter| adapter.get_info().backend == wgpu::Backend::Gl);
    let none = "no GPU adapter: run `sh scripts/setup.sh`, which installs a software Vulkan driver (Mesa lavapipe)";
    assert!(!adapters.is_empty(), "{none}");
    adapters.remove(0)
}

/// Opens the first adapter: with WebGPU's default limits, so that nothing passes here that fails in a browser, unless
/// `EGMLA_LIMITS` says otherwise.
pub fn gpu() -> Gpu {
    match Offer::from_env() {
        Offer::Default | Offer::Features => gpu_with(wgpu::Limits::default()),
        Offer::Adapter => {
            let adapter = adapter(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
            open(&adapter, adapter.limits())
        }
    }
}

/// A device that computes nothing, with these limits.
#[allow(dead_code, reason = "the tests that take this need a part of it")]
pub fn noop(required_limits: wgpu::Limits) -> Kernels {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::NOOP;
    descriptor.backend_options.noop = wgpu::NoopBackendOptions { enable: true, ..Default::default() };
    let instance = wgpu::Instance::new(descriptor);
    let adapter = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::NOOP)).remove(0);
    let descriptor = wgpu::DeviceDescriptor { required_limits, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
    Kernels::new(&device, &queue).unwrap()
}

/// The same with other limits.
pub fn gpu_with(required_limits: wgpu::Limits) -> Gpu {
    open(&adapter(wgpu::InstanceDescriptor::new_without_display_handle_from_env()), required_limits)
}

/// Opens a device of an adapter.
fn open(adapter: &wgpu::Adapter, required_limits: wgpu::Limits) -> Gpu {
    let (cooperative, experimental_features, matrices) = match Offer::from_env() {
        Offer::Default => unchecked::none(),
        Offer::Features | Offer::Adapter => unchecked::cooperative(adapter),
    };
    let required_features = match Offer::from_env() {
        Offer::Default => wgpu::Features::empty(),
        Offer::Features | Offer::Adapter => {
            adapter.features() & egmla::low_level::kernels::optional_features() | cooperative
        }
    };
    let descriptor =
        wgpu::DeviceDescriptor { required_features, required_limits, experimental_features, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).expect("a device");
    println!("adapter: {:?}, {:?}, EGMLA_LIMITS: {:?}", adapter.get_info(), device.features(), Offer::from_env());
    let kernels = Kernels::new(&device, &queue).expect("kernels").with_cooperative(matrices);
    let faults = Faults::watch(&kernels);
    // A browser checks loops and indices of every shader.
    Gpu { kernels: kernels.with_shader_checks(Offer::from_env() == Offer::Default), faults }
}

#[allow(dead_code, reason = "the tests that take this need a part of it")]
/// Weights in a storage; gate rows are projected as they are needed.
pub fn stored(storage: Storage) -> AttentionOptions {
    AttentionOptions { storage, ..AttentionOptions::default() }
}

impl Gpu {
    pub fn assert_no_errors(&self) {
        self.faults.check().unwrap();
    }
}

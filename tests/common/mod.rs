//! The device of the GPU tests.

#[allow(dead_code, reason = "the tests that take this need a part of it")]
#[path = "../../src/bin/egmla/unchecked.rs"]
pub mod unchecked;

use std::sync::{Arc, Mutex};

use egmla::kernel::Kernels;
use egmla::wgpu;

pub struct Gpu {
    pub kernels: Kernels,
    pub queue: wgpu::Queue,
    errors: Arc<Mutex<Vec<String>>>,
}

/// Opens the first adapter with WebGPU's default limits, so that nothing passes here that fails in a browser, and with the
/// features that variants of the kernels use, where it has them. No adapter is a failure: a test that compared nothing must
/// not pass.
pub fn gpu() -> Gpu {
    gpu_with(wgpu::Limits::default())
}

/// The same with other limits.
pub fn gpu_with(required_limits: wgpu::Limits) -> Gpu {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let backends = wgpu::Backends::from_env().unwrap_or(wgpu::Backends::all());
    let mut adapters = pollster::block_on(instance.enumerate_adapters(backends));
    adapters.sort_by_key(|adapter| adapter.get_info().backend == wgpu::Backend::Gl);
    let adapter = adapters
        .first()
        .expect("no GPU adapter: run `sh scripts/setup.sh`, which installs a software Vulkan driver (Mesa lavapipe)");
    let (cooperative, experimental_features, matrices) = unchecked::cooperative(adapter);
    let required_features = adapter.features() & egmla::kernels::optional_features() | cooperative;
    let descriptor =
        wgpu::DeviceDescriptor { required_features, required_limits, experimental_features, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).expect("a device");
    let errors = Arc::new(Mutex::new(Vec::new()));
    let log = errors.clone();
    device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| log.lock().unwrap().push(error.to_string())));
    println!("adapter: {:?}", adapter.get_info());
    Gpu { kernels: Kernels::new(&device).expect("kernels").with_cooperative(matrices), queue, errors }
}

impl Gpu {
    pub fn assert_no_errors(&self) {
        let errors = self.errors.lock().unwrap();
        assert!(errors.is_empty(), "wgpu reported: {}", errors.join("; "));
    }
}

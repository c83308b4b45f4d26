//! A fault that wgpu lets through and Vulkan forbids, for `scripts/verify validation`: the layers must be heard before their
//! silence over every case counts.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use egmla::wgpu;

/// Asserts that wgpu says nothing: were it to refuse the fault, the layers could not be heard by it.
#[test]
#[ignore = "needs Vulkan's validation layers, which only scripts/verify brings"]
fn a_planted_fault_reaches_the_driver() {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter =
        pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default())).expect("an adapter");
    let (device, _) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default())).expect("a device");
    // Four times what the adapter offers to a workgroup.
    let words = adapter.limits().max_compute_workgroup_storage_size;
    let source = format!(
        "@group(0) @binding(0) var<storage, read_write> y: array<u32>;\n\
         var<workgroup> sh_words: array<u32, {words}>;\n\
         @compute @workgroup_size(64) fn main(@builtin(local_invocation_index) lane: u32) {{\n\
             sh_words[lane * 7u] = lane; workgroupBarrier(); y[lane] = sh_words[lane * 5u];\n\
         }}"
    );
    let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some("too much workgroup memory"),
        source: wgpu::ShaderSource::Wgsl(source.into()),
    });
    let _pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some("too much workgroup memory"),
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    });
    let refused = pollster::block_on(scope.pop());
    assert!(refused.is_none(), "wgpu refuses the fault itself: {refused:?}");
}

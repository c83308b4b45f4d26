//! What the fuzz targets share: a count of what is allocated, numbers that overflow, files that are almost whole, and a
//! device that computes nothing.

use std::sync::LazyLock;

use arbitrary::{Result, Unstructured};
use egmla::config::{Activation, AttentionConfig, GateNorm};
use egmla::low_level::AdapterClass;
use egmla::{Kernels, Storage};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Bytes that a reader may hold for every byte of its input.
const EACH: usize = 64;

/// Bytes that it may hold beside.
const FIXED: usize = 1 << 20;

/// Runs a reader over `input` bytes and fails where it allocates far more than they justify.
pub fn bounded<T>(input: usize, read: impl FnOnce() -> T) -> T {
    bounded_beside(FIXED, input, read)
}

/// The same, with another number of bytes beside.
pub fn bounded_beside<T>(fixed: usize, input: usize, read: impl FnOnce() -> T) -> T {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = read();
    let peak = ALLOCATOR.peak_usage().saturating_sub(before);
    let allowed = EACH * input + fixed;
    assert!(peak <= allowed, "{peak} bytes allocated for {input} of input, at most {allowed}");
    result
}

/// A number that is small, beside a power of two, beside the largest, or any.
pub fn number(u: &mut Unstructured<'_>) -> Result<u32> {
    let power = |u: &mut Unstructured<'_>| -> Result<u32> { Ok(1u32 << u.int_in_range(0..=31)?) };
    Ok(match u.int_in_range(0..=7u8)? {
        0..=2 => u.int_in_range(0..=20)?,
        3 => power(u)?,
        4 => power(u)?.wrapping_sub(u.int_in_range(1..=4)?),
        5 => power(u)?.saturating_add(u.int_in_range(1..=4)?),
        6 => u32::MAX - u.int_in_range(0..=16)?,
        _ => u.arbitrary()?,
    })
}

/// The same in 64 bits.
pub fn wide(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=3u8)? {
        0 | 1 => number(u)?.into(),
        2 => u64::MAX - u64::from(number(u)?),
        _ => u.arbitrary()?,
    })
}

/// f32 or f16.
pub fn storage(u: &mut Unstructured<'_>) -> Result<Storage> {
    u.choose(&Storage::ALL).copied()
}

/// A class of adapter.
pub fn class(u: &mut Unstructured<'_>) -> Result<AdapterClass> {
    u.choose(&AdapterClass::ALL).copied()
}

/// An activation of the gate.
pub fn activation(u: &mut Unstructured<'_>) -> Result<Activation> {
    u.choose(&Activation::ALL).copied()
}

/// A norm after it.
pub fn norm(u: &mut Unstructured<'_>) -> Result<GateNorm> {
    u.choose(&GateNorm::ALL).copied()
}

/// A safetensors file in the making: bytes as they come, or a header whose length is told right, so that mutation goes on
/// behind it. The first byte chooses.
pub fn tensors_file(data: &[u8]) -> Vec<u8> {
    let Some((kind, rest)) = data.split_first() else { return Vec::new() };
    if kind % 2 == 0 {
        return rest.to_vec();
    }
    // Two bytes tell how much of the rest is header.
    let Some((length, rest)) = rest.split_first_chunk::<2>() else { return Vec::new() };
    let header = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    let mut file = (header as u64).to_le_bytes().to_vec();
    file.extend_from_slice(rest);
    file
}

/// Layers to read files for: MLA, EG-MLA with the gate at either site or tied, low-rank queries with biases.
pub static LAYERS: LazyLock<Vec<AttentionConfig>> = LazyLock::new(|| {
    let shape = r#""hidden_size":2,"num_attention_heads":1,"kv_lora_rank":1,"qk_nope_head_dim":1,"v_head_dim":1"#;
    let layers = [
        r#""qk_rope_head_dim":0"#,
        r#""qk_rope_head_dim":2,"embedding_gate":{"vocab_size":4,"embed_dim":1}"#,
        r#""qk_rope_head_dim":2,"embedding_gate":{"vocab_size":4,"embed_dim":1,"site":"latent","norm":"none"}"#,
        r#""qk_rope_head_dim":2,"q_lora_rank":1,"attention_bias":true"#,
        r#""qk_rope_head_dim":2,"embedding_gate":{"vocab_size":4,"tied":true}"#,
    ];
    let read =
        |rest: &&str| AttentionConfig::from_json(&format!("{{{shape},{rest}}}")).expect("a layer of the fuzz crate");
    layers.iter().map(read).collect()
});

/// wgpu's device without a driver, as a kind of adapter would be opened.
pub fn device(limits: wgpu::Limits, features: wgpu::Features, subgroups: (u32, u32)) -> (wgpu::Device, wgpu::Queue) {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::NOOP;
    descriptor.backend_options.noop = wgpu::NoopBackendOptions {
        enable: true,
        limits: Some(limits.clone()),
        features: Some(features),
        device_type: Some(wgpu::DeviceType::Cpu),
        subgroup_min_size: Some(subgroups.0),
        subgroup_max_size: Some(subgroups.1),
    };
    let instance = wgpu::Instance::new(descriptor);
    let adapters = wait(instance.enumerate_adapters(wgpu::Backends::NOOP));
    let adapter = adapters.first().expect("wgpu's adapter without a driver");
    let descriptor =
        wgpu::DeviceDescriptor { required_limits: limits, required_features: features, ..Default::default() };
    wait(adapter.request_device(&descriptor)).expect("wgpu's device without a driver")
}

/// Kernels on devices of very different limits. None lets a buffer be large, since the device keeps it in this process.
pub static DEVICES: LazyLock<Vec<Kernels>> = LazyLock::new(|| {
    let small = |limits: wgpu::Limits| wgpu::Limits {
        max_buffer_size: 1 << 20,
        max_storage_buffer_binding_size: 1 << 20,
        ..limits
    };
    let poor = wgpu::Limits {
        max_storage_buffer_binding_size: 1 << 14,
        max_buffer_size: 1 << 14,
        max_compute_workgroup_storage_size: 4096,
        max_compute_invocations_per_workgroup: 64,
        max_compute_workgroups_per_dimension: 16,
        ..wgpu::Limits::downlevel_defaults()
    };
    let poor = wgpu::Limits { max_storage_buffers_per_shader_stage: 8, ..poor };
    let rich = wgpu::Limits {
        max_compute_workgroup_storage_size: 1 << 16,
        max_compute_invocations_per_workgroup: 1024,
        max_compute_workgroup_size_x: 1024,
        min_storage_buffer_offset_alignment: 32,
        ..wgpu::Limits::default()
    };
    let subgroups = egmla::low_level::kernels::optional_features();
    let open = |(limits, features, sizes): (wgpu::Limits, wgpu::Features, (u32, u32))| {
        let (device, queue) = device(limits, features, sizes);
        AdapterClass::ALL.map(|class| Kernels::with_class(&device, &queue, class).expect("kernels"))
    };
    [
        (small(wgpu::Limits::default()), wgpu::Features::empty(), (4, 64)),
        (poor, wgpu::Features::empty(), (4, 4)),
        (small(rich.clone()), subgroups, (8, 8)),
        (small(rich), subgroups, (32, 64)),
    ]
    .into_iter()
    .flat_map(open)
    .collect()
});

/// Waits for a future that is ready at once, as those of a device without a driver are.
fn wait<F: Future>(future: F) -> F::Output {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(future).poll(&mut context) {
        std::task::Poll::Ready(output) => output,
        std::task::Poll::Pending => panic!("a device without a driver has nothing to wait for"),
    }
}

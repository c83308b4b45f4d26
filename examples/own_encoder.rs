//! Attention in an application's own encoder: computed before a render pass that draws what it wrote, submitted once, on the
//! application's device.

use egmla::random::{Random, attention_weights};
use egmla::{
    Attention, AttentionConfig, CacheOptions, Kernels, LatentCache, Recording, Region, Tokens, readback, wgpu,
};

const TOKENS: u32 = 16;
const HIDDEN: u32 = 64;

/// Draws one pixel for each number of `out`: the brighter, the larger.
const SHOW: &str = "
@group(0) @binding(0) var<storage, read> numbers: array<f32>;
@vertex fn corner(@builtin(vertex_index) i: u32) -> @builtin(position) vec4f {
    return vec4f(f32(i & 1u) * 4.0 - 1.0, f32(i >> 1u) * 4.0 - 1.0, 0.0, 1.0);
}
@fragment fn pixel(@builtin(position) at: vec4f) -> @location(0) vec4f {
    return vec4f(abs(numbers[u32(at.y) * 64u + u32(at.x)]));
}";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // What the application has: a device, a target that it draws to, a pipeline that draws.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?;
    let format = wgpu::TextureFormat::Rgba8Unorm;
    let target = device.create_texture(&wgpu::TextureDescriptor {
        label: Some("screen"),
        size: wgpu::Extent3d { width: HIDDEN, height: TOKENS, depth_or_array_layers: 1 },
        mip_level_count: 1,
        sample_count: 1,
        dimension: wgpu::TextureDimension::D2,
        format,
        usage: wgpu::TextureUsages::RENDER_ATTACHMENT,
        view_formats: &[],
    });
    let screen = target.create_view(&Default::default());
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: Some("show"),
        source: wgpu::ShaderSource::Wgsl(SHOW.into()),
    });
    let options = || wgpu::PipelineCompilationOptions::default();
    let targets = &[Some(format.into())];
    let fragment = wgpu::FragmentState { module: &module, entry_point: None, compilation_options: options(), targets };
    let show = device.create_render_pipeline(&wgpu::RenderPipelineDescriptor {
        label: Some("show"),
        layout: None,
        vertex: wgpu::VertexState { module: &module, entry_point: None, compilation_options: options(), buffers: &[] },
        fragment: Some(fragment),
        primitive: Default::default(),
        depth_stencil: None,
        multisample: Default::default(),
        multiview_mask: None,
        cache: None,
    });

    // The layer, with weights that a checkpoint would bring.
    let config = AttentionConfig::from_json(
        r#"{"hidden_size": 64, "num_attention_heads": 4, "q_lora_rank": null, "kv_lora_rank": 16,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}"#,
    )?;
    let kernels = Kernels::new(&device, &queue)?;
    let attention = Attention::new(&kernels, &config, &attention_weights(&config, true, 0)?, Default::default())?;
    let mut cache = LatentCache::new(&attention, CacheOptions::default())?;
    let mut recording = Recording::new(&kernels);
    let hidden = Random::new(1).values((TOKENS * HIDDEN) as usize, 1.0);
    let hidden = Region::from(&kernels.upload("hidden", bytemuck::cast_slice(&hidden))?);
    let out = Region::from(&kernels.allocate("out", u64::from(TOKENS * HIDDEN) * 4)?);
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some("show"),
        layout: &show.get_bind_group_layout(0),
        entries: &[wgpu::BindGroupEntry { binding: 0, resource: out.buffer.as_entire_binding() }],
    });

    // One frame: the layer, then a render pass that reads what the layer wrote; one submission.
    let mut encoder = device.create_command_encoder(&Default::default());
    let tokens = Tokens { counts: &[TOKENS], ids: None, hidden, out: out.clone() };
    attention.prefill(&mut recording, &mut cache, tokens)?;
    recording.encode(&mut encoder)?;
    let ops = Default::default();
    let drawn = wgpu::RenderPassColorAttachment { view: &screen, depth_slice: None, resolve_target: None, ops };
    let descriptor = wgpu::RenderPassDescriptor { color_attachments: &[Some(drawn)], ..Default::default() };
    let mut pass = encoder.begin_render_pass(&descriptor);
    pass.set_pipeline(&show);
    pass.set_bind_group(0, &group, &[]);
    pass.draw(0..3, 0..1);
    drop(pass);
    queue.submit([encoder.finish()]);

    let numbers = readback::wait(readback::read_f32(&kernels, &[&out]))?.remove(0);
    println!(
        "{} dispatches and a render pass, one submission; out[0][..4] = {:.3?}",
        recording.dispatches(),
        &numbers[..4]
    );
    Ok(())
}

//! GPU time of a decode step: timestamps around a compute pass of your own, which the recording is written into.

use egmla::random::{Random, attention_weights};
use egmla::{
    Attention, AttentionConfig, CacheOptions, Kernels, LatentCache, Recording, Region, Tokens, readback, wgpu,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    if !adapter.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
        println!("{} has no timestamps", adapter.get_info().name);
        return Ok(());
    }
    // Subgroups, where the adapter has them: some kernels are faster with them.
    let optional = adapter.features() & egmla::low_level::kernels::optional_features();
    let descriptor =
        wgpu::DeviceDescriptor { required_features: wgpu::Features::TIMESTAMP_QUERY | optional, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))?;
    let kernels = Kernels::new(&device, &queue)?;

    let config = AttentionConfig::from_json(
        r#"{"hidden_size": 768, "num_attention_heads": 12, "q_lora_rank": null, "kv_lora_rank": 256,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}"#,
    )?;
    let attention = Attention::new(&kernels, &config, &attention_weights(&config, true, 0)?, Default::default())?;
    let mut cache = LatentCache::new(&attention, CacheOptions { capacity: 1024, ..Default::default() })?;
    let mut random = Random::new(1);
    let mut region = |tokens: u64| -> egmla::Result<(Region, Region)> {
        let hidden = random.values(768 * tokens as usize, 1.0);
        let hidden = kernels.upload("hidden", bytemuck::cast_slice(&hidden))?;
        Ok((Region::from(&hidden), Region::from(&kernels.allocate("out", 4 * 768 * tokens)?)))
    };
    let mut recording = Recording::new(&kernels);
    let (hidden, out) = region(500)?;
    attention.prefill(&mut recording, &mut cache, Tokens { counts: &[500], ids: None, hidden, out })?;
    readback::submit(&mut recording)?;

    let queries = device.create_query_set(&wgpu::QuerySetDescriptor {
        label: Some("time"),
        ty: wgpu::QueryType::Timestamp,
        count: 2,
    });
    let buffer = |usage| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("time"),
            size: 16,
            usage,
            mapped_at_creation: false,
        })
    };
    let times = Region::from(&buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC));
    let (hidden, out) = region(1)?;
    for step in 0..5 {
        recording.clear();
        let tokens = Tokens { counts: &[1], ids: None, hidden: hidden.clone(), out: out.clone() };
        attention.decode(&mut recording, &mut cache, tokens)?;
        let mut encoder = device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("decode"),
            timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                query_set: &queries,
                beginning_of_pass_write_index: Some(0),
                end_of_pass_write_index: Some(1),
            }),
        });
        recording.record(&mut pass)?;
        drop(pass);
        encoder.resolve_query_set(&queries, 0..2, &times.buffer, 0);
        queue.submit([encoder.finish()]);
        let ticks = readback::wait(readback::read(&kernels, &[&times]))?.remove(0);
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&ticks);
        let micros = (ticks[1] - ticks[0]) as f64 * f64::from(queue.get_timestamp_period()) / 1e3;
        println!("step {step}: {} dispatches, {micros:.0} µs on {}", recording.dispatches(), adapter.get_info().name);
    }
    Ok(())
}

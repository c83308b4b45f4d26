//! A conversation that outlives the process: the cache of a sequence goes to a file, and a new process goes on from there.

use std::path::Path;
use std::process::Command;

use egmla::random::{Random, attention_weights};
use egmla::{
    Attention, AttentionConfig, CacheOptions, Kernels, LatentCache, Recording, Region, Tokens, readback, wgpu,
};

struct Layer {
    kernels: Kernels,
    attention: Attention,
    cache: LatentCache,
}

impl Layer {
    /// A layer with an empty cache of so many tokens; the same weights in every process.
    fn new(capacity: u32) -> Result<Self, Box<dyn std::error::Error>> {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
        let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?;
        let config = AttentionConfig::from_json(
            r#"{"hidden_size": 64, "num_attention_heads": 4, "q_lora_rank": null, "kv_lora_rank": 16,
                "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
                "embedding_gate": {"vocab_size": 100, "embed_dim": 8}}"#,
        )?;
        let kernels = Kernels::new(&device, &queue)?;
        let attention = Attention::new(&kernels, &config, &attention_weights(&config, true, 0)?, Default::default())?;
        let cache = LatentCache::new(&attention, CacheOptions { capacity, ..Default::default() })?;
        Ok(Layer { kernels, attention, cache })
    }

    /// Feeds tokens, with numbers that follow from their ids for hidden states; the output of the last one.
    fn feed(&mut self, ids: &[u32]) -> egmla::Result<Vec<f32>> {
        let hidden: Vec<f32> = ids.iter().flat_map(|&id| Random::new(id.into()).values(64, 1.0)).collect();
        let hidden = Region::from(&self.kernels.upload("hidden", bytemuck::cast_slice(&hidden))?);
        let out = Region::from(&self.kernels.allocate("out", 256 * ids.len() as u64)?);
        let tokens = Tokens { counts: &[ids.len() as u32], ids: Some(ids), hidden, out: out.clone() };
        let mut recording = Recording::new(&self.kernels);
        self.attention.prefill(&mut recording, &mut self.cache, tokens)?;
        readback::submit(&mut recording)?;
        let all = readback::wait(readback::read_f32(&self.kernels, &[&out]))?.remove(0);
        Ok(all[64 * (ids.len() - 1)..].to_vec())
    }
}

/// The second process.
fn go_on(file: &Path) -> Result<(), Box<dyn std::error::Error>> {
    // Twice the capacity: a saved sequence fits any cache that has room for it.
    let mut layer = Layer::new(128)?;
    let mut recording = Recording::new(&layer.kernels);
    layer.cache.restore_sequence(&mut recording, 0, &std::fs::read(file)?)?;
    readback::submit(&mut recording)?;
    println!("restored {} tokens", layer.cache.lengths()[0]);
    println!("next: {:.6?}", &layer.feed(&[42])?[..4]);
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Some(file) = std::env::args_os().nth(1) {
        return go_on(Path::new(&file));
    }
    let mut layer = Layer::new(64)?;
    layer.feed(&[7, 1, 99, 7, 7, 3])?;
    let bytes = readback::wait(readback::save_sequence(&layer.cache, 0))?;
    let file = std::env::temp_dir().join(format!("egmla-{}.safetensors", std::process::id()));
    std::fs::write(&file, &bytes)?;
    println!("saved {} tokens in {} bytes", layer.cache.lengths()[0], bytes.len());
    let next = format!("next: {:.6?}", &layer.feed(&[42])?[..4]);
    println!("{next}");

    let output = Command::new(std::env::current_exe()?).arg(&file).output()?;
    std::fs::remove_file(&file)?;
    let said = String::from_utf8(output.stdout)?;
    print!("a new process: {said}{}", String::from_utf8(output.stderr)?);
    // Same adapter, same bits.
    if output.status.success() && said.lines().any(|line| line == next) {
        Ok(())
    } else {
        Err("the new process goes on otherwise".into())
    }
}

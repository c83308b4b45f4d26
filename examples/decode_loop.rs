//! A decode loop: three layers, two sequences of different lengths, candidates of speculative decoding, and roll back.

use egmla::low_level::kernels::{ResidualAdd, residual_add};
use egmla::random::{Random, attention_weights};
use egmla::{
    Attention, AttentionConfig, CacheOptions, Kernels, LatentCache, Mode, Recording, Region, StepTokens, readback, wgpu,
};

const LAYERS: u32 = 3;
const HIDDEN: u32 = 64;

struct Model {
    kernels: Kernels,
    layers: Vec<Attention>,
    cache: LatentCache,
    recording: Recording,
    random: Random,
}

impl Model {
    /// One step of all layers, each added to the stream, in one submission: the stream of every new token.
    fn step(&mut self, mode: Mode, counts: &[u32]) -> egmla::Result<Vec<f32>> {
        let elements = counts.iter().sum::<u32>() * HIDDEN;
        // Embeddings in a model; numbers here.
        let stream = self.random.values(elements as usize, 1.0);
        let stream = Region::from(&self.kernels.upload("stream", bytemuck::cast_slice(&stream))?);
        let delta = Region::from(&self.kernels.allocate("delta", 4 * u64::from(elements))?);

        self.recording.clear();
        let step = self.cache.prepare(mode, StepTokens { counts, ids: None })?;
        for (index, layer) in self.layers.iter().enumerate() {
            layer.forward(&mut self.recording, &self.cache, &step, index, &stream, &delta)?;
            self.recording
                .add(&ResidualAdd { elements, factor: 1.0 }, residual_add::Args { delta: &delta, stream: &stream })?;
        }
        readback::submit(&mut self.recording)?;
        // Consumes the step: the tokens are part of the cache, once.
        self.cache.commit(step)?;
        println!("{mode:?} {counts:?}: {} dispatches, lengths {:?}", self.recording.dispatches(), self.cache.lengths());
        Ok(readback::wait(readback::read_f32(&self.kernels, &[&stream]))?.remove(0))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?;
    let kernels = Kernels::new(&device, &queue)?;
    let config = AttentionConfig::from_json(
        r#"{"hidden_size": 64, "num_attention_heads": 4, "q_lora_rank": null, "kv_lora_rank": 16,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}"#,
    )?;
    let layers = (0..LAYERS)
        .map(|seed| {
            let weights = attention_weights(&config, true, seed.into())?;
            Attention::new(&kernels, &config, &weights, Default::default())
        })
        .collect::<egmla::Result<Vec<_>>>()?;
    let options = CacheOptions { n_layer: LAYERS, batch: 2, capacity: 64, decode_tokens: 4, ..Default::default() };
    let cache = LatentCache::new(&layers[0], options)?;
    let (recording, random) = (Recording::new(&kernels), Random::new(7));
    let mut model = Model { kernels, layers, cache, recording, random };

    // Prompts of five and nine tokens; then one token of each per step. From the second step of a shape on the host makes
    // no object of the device.
    model.step(Mode::Prefill, &[5, 9])?;
    for _ in 0..3 {
        model.step(Mode::Decode, &[1, 1])?;
    }

    // Four candidates for the first sequence, one token for the second. Two candidates turn out right: back to those.
    let length = model.cache.lengths()[0];
    model.step(Mode::Decode, &[4, 1])?;
    model.cache.truncate(0, length + 2)?;
    // The second sequence has ended: it takes no part.
    let last = model.step(Mode::Decode, &[1, 0])?;
    println!("lengths {:?}, stream of the last token {:.3?} …", model.cache.lengths(), &last[..4]);
    Ok(())
}

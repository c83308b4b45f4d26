//! A case on the device, and the same in f64.

use super::{Event, Ids, LayerCase, Shape};
use crate::attention::{Attention, AttentionOptions, CacheOptions, DecodePath, LatentCache, Mode, StepTokens};
use crate::check::compare::{Comparison, compare};
use crate::check::guarded::{Guarded, POISON};
use crate::config::AttentionConfig;
use crate::device::Kernels;
use crate::error::Result;
use crate::random::{Random, attention_weights};
use crate::readback;
use crate::recording::Recording;
use crate::reference::{History, Layer};
use crate::weights::AttentionWeights;

/// A layer: its weights, for the device, and what they mean in f64.
pub struct Prepared {
    config: AttentionConfig,
    weights: AttentionWeights,
    reference: Layer,
}

impl Prepared {
    /// The layer of a shape, with random weights.
    ///
    /// # Errors
    /// A shape that contradicts itself.
    pub fn new(shape: &Shape) -> Result<Self> {
        let config = shape.config();
        let weights = attention_weights(&config, shape.kv_a_norm, shape.seed)?;
        Self::of(config, weights)
    }

    /// A layer of any weights.
    ///
    /// # Errors
    /// As [`AttentionWeights::check`].
    pub fn of(config: AttentionConfig, weights: AttentionWeights) -> Result<Self> {
        Ok(Prepared { reference: Layer::new(config.clone(), &weights)?, config, weights })
    }
}

/// New tokens of a step: hidden states, sequence after sequence, and ids.
struct Tokens {
    hidden: Vec<f32>,
    ids: Vec<u32>,
}

impl LayerCase {
    /// A token's hidden state and id follow from the seed, its sequence and its position alone: tokens of one seed are the same
    /// however they are cut into steps, and those that shrinking keeps stay what they were.
    fn tokens(&self, counts: &[u32], lengths: &[u32], seed: u64) -> Tokens {
        let vocab = self.shape.vocab();
        let (mut hidden, mut ids) = (Vec::new(), Vec::new());
        for (sequence, (&length, &count)) in (0u64..).zip(lengths.iter().zip(counts)) {
            for position in length..length + count {
                let of_token = seed << 40 ^ sequence << 32 ^ u64::from(position);
                let mut random = Random::new(of_token.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                hidden.extend(random.values(self.shape.hidden_size as usize, 1.0));
                let any = random.ids(1, vocab)[0];
                ids.push(match self.ids {
                    Ids::Any => any,
                    Ids::Equal => vocab / 2,
                    Ids::Skewed if position % 3 == 1 => 0,
                    Ids::Skewed => any,
                    Ids::Distinct => position % vocab,
                    Ids::Reversed => vocab - 1 - position % vocab,
                });
            }
        }
        Tokens { hidden, ids }
    }

    /// Runs the case and compares every new token's output with the reference's, and the cache's lengths with those that follow
    /// from the events.
    ///
    /// # Errors
    /// A case that the library wrongly refuses, or a lost device.
    pub fn run(&self, kernels: &Kernels) -> Result<Comparison> {
        self.run_on(kernels, &Prepared::new(&self.shape)?)
    }

    /// The same with the layer at hand.
    ///
    /// # Errors
    /// As [`LayerCase::run`].
    pub fn run_on(&self, kernels: &Kernels, layer: &Prepared) -> Result<Comparison> {
        let (got, lengths, distinct) = self.on_device(kernels, layer)?;
        // After the GPU, so that nothing of it can leak into a result.
        let (expected, held) = self.in_f64(&layer.reference);
        let own: Vec<u32> = held.iter().map(|ids| ids.len() as u32).collect();
        let wrong = |problem| Comparison { relative_error: f64::INFINITY, tolerance: 0.0, verdict: Err(problem) };
        if lengths != own {
            return Ok(wrong(format!("the cache has lengths {lengths:?}, expected {own:?}")));
        }
        if self.shape.config().up_projected_gate().is_some() {
            let ids = |ids: &Vec<u32>| ids.iter().collect::<std::collections::HashSet<_>>().len() as u32;
            let own: Vec<u32> = held.iter().map(ids).collect();
            if distinct != own {
                return Ok(wrong(format!("the cache has {distinct:?} distinct ids, expected {own:?}")));
            }
        }
        Ok(compare(&got, &expected, self.shape.tolerance()))
    }

    /// Outputs of every step, one after another.
    ///
    /// # Errors
    /// As [`LayerCase::run`].
    pub fn outputs(&self, kernels: &Kernels, layer: &Prepared) -> Result<Vec<f32>> {
        self.on_device(kernels, layer).map(|(got, ..)| got)
    }

    /// Outputs of every step, one after another, then lengths and distinct ids.
    fn on_device(&self, kernels: &Kernels, layer: &Prepared) -> Result<(Vec<f32>, Vec<u32>, Vec<u32>)> {
        let Prepared { config, weights, .. } = layer;
        let LayerCase { batch, capacity, tile_rows, .. } = *self;
        let storage = self.shape.storage;
        let options = AttentionOptions { storage, gate_rows: self.gate_rows };
        let attention = Attention::new(kernels, config, weights, options)?;
        // No larger than the case needs.
        let counts = || self.events.iter().filter_map(Event::counts);
        let max_tokens = counts().map(|(_, counts)| counts.iter().sum()).max().unwrap_or(1);
        let decoded = counts().filter(|(mode, _)| *mode == Mode::Decode).flat_map(|(_, counts)| counts);
        let decode_tokens = decoded.copied().max().unwrap_or(1);
        let (n_layer, decode_path) = (1, DecodePath::Auto);
        let options =
            CacheOptions { n_layer, batch, capacity, storage, max_tokens, decode_tokens, tile_rows, decode_path };
        let mut cache = LatentCache::new(&attention, options)?;
        for buffer in cache.buffers() {
            let poison = vec![POISON; buffer.size() as usize / 4];
            kernels.queue().write_buffer(buffer, 0, bytemuck::cast_slice(&poison));
        }
        let mut got = Vec::new();
        for event in &self.events {
            let mut recording = Recording::new(kernels);
            match event {
                Event::TakeBack { sequence, tokens } => {
                    let length = cache.lengths()[*sequence] - tokens;
                    cache.truncate(*sequence, length)?;
                }
                Event::Copy { from, to } => {
                    cache.copy_sequence(&mut recording, *from, *to)?;
                    readback::submit(&mut recording)?;
                }
                Event::Reset => cache.reset(),
                Event::Prefill { counts, seed }
                | Event::Decode { counts, seed, .. }
                | Event::GiveUp { counts, seed, .. } => {
                    let (mode, path) = match event {
                        Event::Decode { path, .. } | Event::GiveUp { path, .. } => (Mode::Decode, *path),
                        _ => (Mode::Prefill, DecodePath::Auto),
                    };
                    let new = self.tokens(counts, cache.lengths(), *seed);
                    let ids = config.gate.is_some().then_some(&new.ids[..]);
                    cache.set_decode_path(path);
                    let step = cache.prepare(mode, StepTokens { counts, ids })?;
                    let input = Guarded::filled(kernels, "hidden", bytemuck::cast_slice(&new.hidden))?;
                    let out = Guarded::poisoned(kernels, "out", new.hidden.len())?;
                    let (hidden, to) = (&input.region, &out.region);
                    attention.forward(&mut recording, &cache, &step, 0, hidden, to)?;
                    if !matches!(event, Event::GiveUp { .. }) {
                        cache.commit(step)?;
                    }
                    readback::submit(&mut recording)?;
                    got.extend(out.read_f32(kernels)?);
                }
            }
        }
        Ok((got, cache.lengths().to_vec(), cache.distinct_ids()))
    }

    /// The outputs by definition, and the final ids of each sequence.
    fn in_f64(&self, reference: &Layer) -> (Vec<f64>, Vec<Vec<u32>>) {
        let mut held: Vec<(History, Vec<u32>)> = vec![Default::default(); self.batch as usize];
        let mut expected = Vec::new();
        let width = self.shape.hidden_size as usize;
        for event in &self.events {
            match event {
                Event::TakeBack { sequence, tokens } => {
                    let (history, ids) = &mut held[*sequence];
                    let length = ids.len() - *tokens as usize;
                    history.truncate(length);
                    ids.truncate(length);
                }
                Event::Copy { from, to } => held[*to] = held[*from].clone(),
                Event::Reset => held.fill(Default::default()),
                Event::Prefill { counts, seed }
                | Event::Decode { counts, seed, .. }
                | Event::GiveUp { counts, seed, .. } => {
                    let lengths: Vec<u32> = held.iter().map(|(_, ids)| ids.len() as u32).collect();
                    let new = self.tokens(counts, &lengths, *seed);
                    let mut first = 0;
                    for ((history, ids), &count) in held.iter_mut().zip(counts) {
                        let rows = first..first + count as usize;
                        first = rows.end;
                        let hidden = &new.hidden[rows.start * width..rows.end * width];
                        let wide: Vec<f64> = hidden.iter().map(|&value| value.into()).collect();
                        let own = &new.ids[rows];
                        let kept = history.len();
                        expected.extend(reference.forward(&wide, own, history));
                        match event {
                            Event::GiveUp { .. } => history.truncate(kept),
                            _ => ids.extend(own),
                        }
                    }
                }
            }
        }
        (expected, held.into_iter().map(|(_, ids)| ids).collect())
    }
}

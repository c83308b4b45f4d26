//! Either kind of attention of a decoder on the device: latents, or keys and values per head.

use super::cpu::other_kind;
use super::folder::DecoderAttentionWeights;
use crate::adapter::PlanContext;
use crate::attention::{
    Attention, AttentionOptions, CacheOptions, DecodePath, GqaAttention, Hidden, KvCache, LatentCache, MemoryReport,
    Mode, Step, StepTokens, TiedEmbedding, check_gqa_weights, check_weights,
};
use crate::config::DecoderAttention;
use crate::device::{Kernels, Region};
use crate::error::{Error, Result};
use crate::recording::Recording;
use crate::storage::Storage;

/// The attention of one layer.
#[derive(Debug)]
pub(super) enum DeviceAttention {
    Latent(Box<Attention>),
    Heads(Box<GqaAttention>),
}

impl DeviceAttention {
    /// Checks every tensor against a device's limits, before any is allocated.
    ///
    /// # Errors
    /// Weights of the other kind; [`Error::Limit`] of the first tensor over a limit.
    pub fn check(
        context: &PlanContext,
        config: &DecoderAttention,
        weights: &DecoderAttentionWeights,
        storage: Storage,
    ) -> Result<()> {
        match (config, weights) {
            (DecoderAttention::Latent(config), DecoderAttentionWeights::Latent(weights)) => {
                check_weights(context, config, weights, storage)
            }
            (DecoderAttention::Heads(config), DecoderAttentionWeights::Heads(weights)) => {
                check_gqa_weights(context, config, weights, storage)
            }
            _ => Err(other_kind()),
        }
    }

    /// Uploads a layer's weights; `tied` is the embedding of a tied gate.
    ///
    /// # Errors
    /// As [`Attention::new`] and [`GqaAttention::new`]; weights of the other kind.
    pub fn new(
        kernels: &Kernels,
        config: &DecoderAttention,
        weights: &DecoderAttentionWeights,
        tied: Option<&TiedEmbedding>,
        options: AttentionOptions,
    ) -> Result<Self> {
        match (config, weights) {
            (DecoderAttention::Latent(config), DecoderAttentionWeights::Latent(weights)) => {
                let layer = match tied {
                    None => Attention::new(kernels, config, weights, options)?,
                    Some(tied) => Attention::with_tied_embedding(kernels, config, weights, tied, options)?,
                };
                Ok(DeviceAttention::Latent(Box::new(layer)))
            }
            (DecoderAttention::Heads(config), DecoderAttentionWeights::Heads(weights)) => {
                let layer = GqaAttention::new(kernels, config, weights, options.storage)?;
                Ok(DeviceAttention::Heads(Box::new(layer)))
            }
            _ => Err(other_kind()),
        }
    }

    pub fn gate_table_bytes(&self) -> u64 {
        match self {
            DeviceAttention::Latent(layer) => layer.gate_table_bytes(),
            DeviceAttention::Heads(_) => 0,
        }
    }

    pub fn cache(&self, options: CacheOptions) -> Result<DecoderCache> {
        match self {
            DeviceAttention::Latent(layer) => Ok(DecoderCache::Latent(LatentCache::new(layer, options)?)),
            DeviceAttention::Heads(layer) => Ok(DecoderCache::Heads(KvCache::new(layer, options)?)),
        }
    }

    /// Records layer number `layer` of a step.
    pub fn forward(
        &self,
        recording: &mut Recording,
        cache: &DecoderCache,
        step: &Step,
        layer: usize,
        (hidden, out): (Hidden<'_>, Hidden<'_>),
    ) -> Result<()> {
        match (self, cache) {
            (DeviceAttention::Latent(attention), DecoderCache::Latent(cache)) => {
                attention.forward_rows(recording, cache, step, layer, hidden, out)
            }
            (DeviceAttention::Heads(attention), DecoderCache::Heads(cache)) => {
                attention.forward_rows(recording, cache, step, layer, hidden, out)
            }
            _ => Err(Error::config("(attention)", "the cache is of another kind of attention than the decoder")),
        }
    }
}

/// The cache of a decoder, of the kind of its attention. Made by [`Decoder::cache`](super::Decoder::cache).
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one a model")]
pub enum DecoderCache {
    /// Of latents: MLA or EG-MLA.
    Latent(LatentCache),
    /// Of keys and values per head.
    Heads(KvCache),
}

macro_rules! either {
    ($self:expr, $cache:ident => $call:expr) => {
        match $self {
            DecoderCache::Latent($cache) => $call,
            DecoderCache::Heads($cache) => $call,
        }
    };
}

impl DecoderCache {
    /// The extents.
    pub fn options(&self) -> CacheOptions {
        either!(self, cache => cache.options())
    }

    /// The kernels of its device.
    pub fn kernels(&self) -> &Kernels {
        either!(self, cache => cache.kernels())
    }

    /// Tokens that each sequence holds.
    pub fn lengths(&self) -> &[u32] {
        either!(self, cache => cache.lengths())
    }

    /// Most new tokens of a step.
    pub fn max_tokens(&self) -> u32 {
        either!(self, cache => cache.max_tokens())
    }

    /// Sets the path of decode steps over latents, from the next step on; keys and values per head have one path.
    pub fn set_decode_path(&mut self, path: DecodePath) {
        if let DecoderCache::Latent(cache) = self {
            cache.set_decode_path(path);
        }
    }

    /// Checks new tokens and makes the tables that every layer needs.
    ///
    /// # Errors
    /// As [`LatentCache::prepare`] and [`KvCache::prepare`].
    pub fn prepare(&mut self, mode: Mode, tokens: StepTokens<'_>) -> Result<Step> {
        either!(self, cache => cache.prepare(mode, tokens))
    }

    /// Makes the tokens of a step part of the cache. Call it once all layers are recorded.
    ///
    /// # Errors
    /// [`Error::StaleStep`] for a step of another cache, or after a change of the cache.
    pub fn commit(&mut self, step: Step) -> Result<()> {
        either!(self, cache => cache.commit(step))
    }

    /// Rolls a sequence back to its first `length` tokens.
    ///
    /// # Errors
    /// `ArgumentError::OutOfRange` for a sequence that does not exist or is shorter.
    pub fn truncate(&mut self, sequence: usize, length: u32) -> Result<()> {
        either!(self, cache => cache.truncate(sequence, length))
    }

    /// Records the copy of one sequence over another.
    ///
    /// # Errors
    /// As [`LatentCache::copy_sequence`].
    pub fn copy_sequence(&mut self, recording: &mut Recording, from: usize, to: usize) -> Result<()> {
        either!(self, cache => cache.copy_sequence(recording, from, to))
    }

    /// Records the copy of a sequence of another cache over one of this.
    ///
    /// # Errors
    /// As [`LatentCache::copy_sequence_from`]; a cache of the other kind of attention.
    pub fn copy_sequence_from(
        &mut self,
        recording: &mut Recording,
        to: usize,
        source: &DecoderCache,
        from: usize,
    ) -> Result<()> {
        match (self, source) {
            (DecoderCache::Latent(cache), DecoderCache::Latent(source)) => {
                cache.copy_sequence_from(recording, to, source, from)
            }
            (DecoderCache::Heads(cache), DecoderCache::Heads(source)) => {
                cache.copy_sequence_from(recording, to, source, from)
            }
            _ => Err(Error::config("(attention)", "the cache to copy from is of another kind of attention")),
        }
    }

    /// Makes room for `capacity` tokens of each sequence.
    ///
    /// # Errors
    /// As [`LatentCache::grow`].
    pub fn grow(&mut self, recording: &mut Recording, capacity: u32) -> Result<()> {
        either!(self, cache => cache.grow(recording, capacity))
    }

    /// Where the rows of a sequence stand.
    ///
    /// # Errors
    /// As [`LatentCache::sequence_regions`].
    pub fn sequence_regions(&self, sequence: usize) -> Result<Vec<Region>> {
        either!(self, cache => cache.sequence_regions(sequence))
    }

    /// A sequence as the bytes of a safetensors file, from the content of [`DecoderCache::sequence_regions`].
    ///
    /// # Errors
    /// As [`LatentCache::save_sequence`].
    pub fn save_sequence(&self, sequence: usize, rows: &[Vec<u8>]) -> Result<Vec<u8>> {
        either!(self, cache => cache.save_sequence(sequence, rows))
    }

    /// Records what makes a sequence one that was saved.
    ///
    /// # Errors
    /// As [`LatentCache::restore_sequence`].
    pub fn restore_sequence(&mut self, recording: &mut Recording, sequence: usize, bytes: &[u8]) -> Result<()> {
        either!(self, cache => cache.restore_sequence(recording, sequence, bytes))
    }

    /// Empties every sequence.
    pub fn reset(&mut self) {
        either!(self, cache => cache.reset())
    }

    /// Bytes allocated on the device, by purpose.
    pub fn memory(&self) -> MemoryReport {
        either!(self, cache => cache.memory())
    }
}

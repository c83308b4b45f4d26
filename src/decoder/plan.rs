//! What a decoder allocates beside its attention: its weights, as they are placed on the device, and the buffers of its steps.

use super::attention::DeviceAttention;
use super::folder::{DecoderLayerWeights, DecoderWeights};
use crate::adapter::PlanContext;
use crate::attention::{AttentionOptions, Axis, CacheOptions, Shard, Upload};
use crate::config::{DecoderAttention, DecoderConfig};
use crate::error::Result;
use crate::storage::{Storage, padded_width, product, words};
use crate::weights::HostTensor;

/// Rows of a matrix in as few bindings as hold them.
pub(super) type Matrix<T> = Vec<Shard<T>>;

/// Tensors of a layer beside its attention.
pub(super) struct LayerUploads<'a> {
    pub input_norm: Upload<'a>,
    pub post_attention_norm: Upload<'a>,
    pub gate_proj: Matrix<Upload<'a>>,
    pub up_proj: Matrix<Upload<'a>>,
    pub down_proj: Matrix<Upload<'a>>,
}

/// A decoder with weights in `storage`, within a device's limits.
pub(super) struct Plan<'a> {
    pub context: &'a PlanContext,
    pub config: &'a DecoderConfig,
    pub storage: Storage,
}

impl Plan<'_> {
    /// Checks every tensor, before any is read.
    ///
    /// # Errors
    /// A configuration that contradicts itself; a vector, or eight rows of a matrix, over the binding limit.
    pub fn check_weights(&self) -> Result<()> {
        let outline = DecoderWeights::outline(self.config)?;
        let check = |upload: &Upload<'_>| upload.check(self.context, self.storage);
        let check_all = |shards: Matrix<Upload<'_>>| shards.iter().try_for_each(|shard| check(&shard.proj));
        [Some(&outline.embedding), outline.lm_head.as_ref()]
            .into_iter()
            .flatten()
            .try_for_each(|tensor| check_all(self.of_vocabulary(tensor)))?;
        check(&self.of_norm(&outline.norm))?;
        outline.layers.iter().try_for_each(|layer| {
            let LayerUploads { input_norm, post_attention_norm, gate_proj, up_proj, down_proj } = self.of_layer(layer);
            [input_norm, post_attention_norm].iter().try_for_each(check)?;
            [gate_proj, up_proj, down_proj].into_iter().try_for_each(check_all)?;
            DeviceAttention::check(self.context, &self.config.attention, &layer.attention, self.storage)
        })
    }

    fn hidden(&self) -> Axis {
        Axis::padded(self.config.attention.hidden_size())
    }

    fn matrix<'b>(&self, tensor: &'b HostTensor, rows: Axis, cols: Axis) -> Matrix<Upload<'b>> {
        Shard::all(self.context, self.storage, 0, (tensor, None), [rows, cols])
    }

    /// `[vocab, hidden]`: the embedding, or the head.
    pub fn of_vocabulary<'b>(&self, tensor: &'b HostTensor) -> Matrix<Upload<'b>> {
        self.matrix(tensor, Axis::whole(self.config.vocab_size), self.hidden())
    }

    /// `[hidden]`: the last norm, with the factor on logits.
    pub fn of_norm<'b>(&self, tensor: &'b HostTensor) -> Upload<'b> {
        Upload::vector(tensor, self.hidden()).times(self.config.scales.logits)
    }

    /// Norms `[hidden]`, projections `[intermediate, hidden]` and back.
    pub fn of_layer<'b>(&self, layer: &'b DecoderLayerWeights) -> LayerUploads<'b> {
        let inner = || Axis::padded(self.config.intermediate_size);
        LayerUploads {
            input_norm: Upload::vector(&layer.input_norm, self.hidden()),
            post_attention_norm: Upload::vector(&layer.post_attention_norm, self.hidden()),
            gate_proj: self.matrix(&layer.gate_proj, inner(), self.hidden()),
            up_proj: self.matrix(&layer.up_proj, inner(), self.hidden()),
            down_proj: self.matrix(&layer.down_proj, self.hidden(), inner()),
        }
    }

    /// Buffers for the intermediate results of steps of up to `tokens` tokens, by name, with their bytes.
    ///
    /// # Errors
    /// A buffer over the binding limit.
    pub fn state(&self, tokens: u32, logit_rows: u32) -> Result<[(&'static str, u64); 7]> {
        let hidden = padded_width(self.config.attention.hidden_size());
        let inner = padded_width(self.config.intermediate_size);
        let buffers = [
            ("stream", [tokens, hidden]),
            ("normed", [tokens, hidden]),
            ("delta", [tokens, hidden]),
            ("gate", [tokens, inner]),
            ("up", [tokens, inner]),
            ("inner", [tokens, inner]),
            ("logits", [logit_rows, self.config.vocab_size]),
        ];
        for (what, extents) in buffers {
            let named = || format!("decoder's `{what}` of {extents:?} words");
            self.context.check_binding(words(product(&extents)), named)?;
        }
        Ok(buffers.map(|(what, extents)| (what, words(product(&extents)))))
    }
}

/// Rows of logits of a step: of every new token, or of each sequence.
pub(super) fn logit_rows(tokens: u32, batch: u32, all_logits: bool) -> u32 {
    if all_logits { tokens } else { tokens.min(batch) }
}

impl DecoderConfig {
    /// The limits to open a device with (`DeviceDescriptor::required_limits`) for a model, its cache and the state of its steps, the
    /// arguments of [`Decoder::new`](super::Decoder::new), [`Decoder::cache`](super::Decoder::cache) and
    /// [`Decoder::state`](super::Decoder::state): WebGPU's defaults, with the sizes of buffers that the largest of them needs.
    ///
    /// # Errors
    /// As [`AttentionConfig::required_limits`](crate::AttentionConfig::required_limits).
    pub fn required_limits(
        &self,
        attention: AttentionOptions,
        cache: &CacheOptions,
        all_logits: bool,
    ) -> Result<wgpu::Limits> {
        PlanContext::least_limits(|context| {
            let plan = Plan { context, config: self, storage: attention.storage };
            plan.check_weights()?;
            match &self.attention {
                DecoderAttention::Latent(config) => config.plan_cache(context, attention, cache)?,
                DecoderAttention::Heads(config) => cache.memory_of_heads(context, config).map(drop)?,
            }
            let tokens = cache.new_tokens();
            plan.state(tokens, logit_rows(tokens, cache.batch, all_logits)).map(drop)
        })
    }
}

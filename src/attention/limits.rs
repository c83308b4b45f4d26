//! The limits that a device must be opened with for a layer and its cache.

use super::cache::CacheOptions;
use super::gqa::HeadsWeights;
use super::layer::AttentionOptions;
use super::layout::CacheLayout;
use super::lists::GateRows;
use super::table::GateTable;
use super::weights::LayerWeights;
use super::widths::Widths;
use crate::adapter::PlanContext;
use crate::config::{AttentionConfig, GqaConfig};
use crate::error::Result;
use crate::storage::{Storage, product, words};
use crate::weights::{AttentionWeights, GqaWeights, HostTensor};

impl AttentionConfig {
    /// The limits to open a device with (`DeviceDescriptor::required_limits`) for a layer and its cache: WebGPU's defaults,
    /// with the buffer sizes that the largest tensor, gate table, cache or intermediate result needs.
    ///
    /// ```
    /// # let config = egmla::AttentionConfig::from_json(r#"{"hidden_size": 7168, "num_attention_heads": 128,
    /// #     "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}"#)?;
    /// // DeepSeek-V3 fits WebGPU's defaults: a matrix that one binding does not hold, as its `o_proj`, is kept in shards, and so
    /// // are the latents and rotary keys of 128k tokens.
    /// let options = egmla::CacheOptions { capacity: 131_072, ..Default::default() };
    /// let limits = config.required_limits(Default::default(), &options)?;
    /// assert_eq!(limits, wgpu::Limits::default());
    /// // A prefill of 8192 tokens has more than 128 MiB of queries at once.
    /// let options = egmla::CacheOptions { capacity: 8192, max_tokens: 8192, ..Default::default() };
    /// let limits = config.required_limits(Default::default(), &options)?;
    /// assert!(limits.max_storage_buffer_binding_size >= 8192 * 128 * (128 + 64) * 4);
    /// # Ok::<(), egmla::Error>(())
    /// ```
    ///
    /// # Errors
    /// A configuration that contradicts itself; extents of 0 or over 2^31 rows; [`Error::Limit`](crate::Error::Limit) for what no
    /// device holds, since shaders reach 4 GiB of a binding.
    pub fn required_limits(&self, attention: AttentionOptions, cache: &CacheOptions) -> Result<wgpu::Limits> {
        self.validate()?;
        PlanContext::least_limits(|context| {
            let weights = AttentionWeights::build(self, true, HostTensor::outline)?;
            let weights = weights.with_token_embedding(self, HostTensor::outline)?;
            LayerWeights::plan(context, self, &weights, None, attention.storage)?;
            self.plan_cache(context, attention, cache)?;
            check_hidden(context, self.hidden_size, cache)
        })
    }

    /// Refuses what a layer's gate table or its cache cannot allocate.
    pub(crate) fn plan_cache(
        &self,
        context: &PlanContext,
        attention: AttentionOptions,
        cache: &CacheOptions,
    ) -> Result<()> {
        let AttentionOptions { storage, gate_rows } = attention;
        let widths = Widths::of(self)?;
        if let (Some(gate), GateRows::Table) = (self.up_projected_gate(), gate_rows) {
            GateTable::plan(context, gate, &widths, storage)?;
        }
        let gate_rows = if self.up_projected_gate().is_some() { gate_rows } else { GateRows::Recompute };
        CacheLayout::new(context, self, &widths, cache, gate_rows).map(drop)
    }
}

impl GqaConfig {
    /// The same for a layer with keys and values per head in `storage`, and its cache.
    ///
    /// # Errors
    /// As [`AttentionConfig::required_limits`]; a capacity beyond
    /// [`RopeConfig::check_length`](crate::config::RopeConfig::check_length).
    pub fn required_limits(&self, storage: Storage, cache: &CacheOptions) -> Result<wgpu::Limits> {
        self.validate()?;
        PlanContext::least_limits(|context| {
            let weights = GqaWeights::build(self, HostTensor::outline)?;
            HeadsWeights::plan(context, self, &weights, storage)?;
            cache.memory_of_heads(context, self)?;
            check_hidden(context, self.hidden_size, cache)
        })
    }
}

/// Refuses hidden states of a step that a binding does not hold.
fn check_hidden(context: &PlanContext, width: u32, cache: &CacheOptions) -> Result<()> {
    let tokens = cache.new_tokens();
    context.check_binding(words(product(&[tokens, width])), || format!("hidden states of {tokens} tokens"))
}

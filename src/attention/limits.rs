//! The limits that a device must be opened with for a layer and its cache.

use super::cache::CacheOptions;
use super::layer::AttentionOptions;
use super::layout::CacheLayout;
use super::lists::GateRows;
use super::table::GateTable;
use super::weights::LayerWeights;
use super::widths::Widths;
use crate::adapter::{AdapterClass, PlanContext};
use crate::config::AttentionConfig;
use crate::error::{Error, Result};
use crate::storage::{product, words};
use crate::weights::{AttentionWeights, HostTensor};

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
    /// A configuration that contradicts itself; extents of 0 or over 2^31 rows; [`Error::Limit`] for what no device holds,
    /// since shaders reach 4 GiB of a binding.
    pub fn required_limits(&self, attention: AttentionOptions, cache: &CacheOptions) -> Result<wgpu::Limits> {
        self.validate()?;
        let mut context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
        // What is planned adapts to the binding where it can: the first refusal names the least that it cannot do without.
        loop {
            match self.plan_all(&context, attention, cache) {
                Ok(()) => return Ok(context.limits),
                Err(Error::Limit { needed, allowed, .. })
                    if needed > allowed && needed <= PlanContext::MOST_BINDING =>
                {
                    let limits = &mut context.limits;
                    limits.max_storage_buffer_binding_size = needed.max(limits.max_storage_buffer_binding_size);
                    limits.max_buffer_size = needed.max(limits.max_buffer_size);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Everything that a layer and its cache allocate.
    fn plan_all(&self, context: &PlanContext, attention: AttentionOptions, cache: &CacheOptions) -> Result<()> {
        let AttentionOptions { storage, gate_rows } = attention;
        let widths = Widths::of(self)?;
        let make = |name: &str, shape: &[u32]| {
            let shape = shape.iter().map(|&extent| extent as usize).collect();
            Ok(HostTensor { name: name.to_owned(), shape, data: Vec::new() })
        };
        let weights = AttentionWeights::build(self, true, make)?.with_token_embedding(self, make)?;
        LayerWeights::plan(context, self, &weights, None, storage)?;
        if let (Some(gate), GateRows::Table) = (self.up_projected_gate(), gate_rows) {
            GateTable::plan(context, gate, &widths, storage)?;
        }
        let gate_rows = if self.up_projected_gate().is_some() { gate_rows } else { GateRows::Recompute };
        CacheLayout::new(context, self, &widths, cache, gate_rows)?;
        let tokens = u64::from(cache.max_tokens).min(product(&[cache.batch, cache.capacity]));
        let hidden = words(tokens.saturating_mul(self.hidden_size.into()));
        context.check_binding(hidden, || format!("hidden states of {tokens} tokens"))
    }
}

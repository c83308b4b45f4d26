//! The decoder on the device: every layer of a step in one recording.

use super::attention::{DecoderCache, DeviceAttention};
use super::cpu::check_layers;
use super::folder::{DecoderLayerWeights, DecoderWeights, Part};
use super::plan::{Matrix, Plan, logit_rows};
use crate::attention::{
    AttentionOptions, CacheOptions, Hidden, MemoryReport, Mode, Shard, Step, StepTokens, TiedEmbedding, Upload,
};
use crate::config::{DecoderAttention, DecoderConfig};
use crate::device::{Kernels, Region};
use crate::error::{ArgumentError, Error, Result};
use crate::kernels::{gather, matmul, norm, residual_add, swiglu};
use crate::op::Op as _;
use crate::readback;
use crate::recording::Recording;
use crate::storage::{Storage, padded_width, product};
use crate::weights::{Checkpoint, HostTensor};

/// Which logits a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// None: the tokens only go into the cache.
    None,
    /// Those of the last new token of each sequence that has new tokens.
    Last,
    /// Those of every new token.
    All,
}

/// Refuses an empty list and ids beyond the vocabulary.
pub(super) fn check_ids(token_ids: &[u32], vocab_size: u32) -> Result<()> {
    if token_ids.is_empty() {
        return Err(Error::Argument(ArgumentError::Empty { what: "the list of token ids" }));
    }
    match token_ids.iter().position(|&id| id >= vocab_size) {
        None => Ok(()),
        Some(index) => Err(Error::Argument(ArgumentError::TokenId { index, id: token_ids[index].into(), vocab_size })),
    }
}

/// A decoder: configuration and weights in device memory.
#[derive(Debug)]
pub struct Decoder {
    kernels: Kernels,
    config: DecoderConfig,
    /// `hidden_size`, padded.
    hidden: u32,
    /// `intermediate_size`, padded.
    inner: u32,
    /// `eps` of the norms of the residual stream, as it is kept.
    eps: f32,
    /// Factor on what is added to it.
    residual: f32,
    storage: Storage,
    embedding: Matrix<Region>,
    layers: Vec<DeviceLayer>,
    norm: Region,
    lm_head: Option<Matrix<Region>>,
}

#[derive(Debug)]
struct DeviceLayer {
    input_norm: Region,
    attention: DeviceAttention,
    post_attention_norm: Region,
    gate_proj: Matrix<Region>,
    up_proj: Matrix<Region>,
    down_proj: Matrix<Region>,
}

/// Buffers for the intermediate results of a step beside those that the cache has for the attention; shared by the layers.
#[derive(Debug)]
pub struct DecoderState {
    max_tokens: u32,
    /// `[tokens, hidden]`, padded as the weights are: the residual stream, over the factor on embeddings.
    stream: Region,
    /// `[tokens, hidden]`
    normed: Region,
    /// `[tokens, hidden]`: summand of the residual stream.
    delta: Region,
    /// `[tokens, intermediate]`
    gate: Region,
    /// `[tokens, intermediate]`
    up: Region,
    /// `[tokens, intermediate]`
    inner: Region,
    /// `[logit_rows, vocab]`
    logits: Region,
    logit_rows: u32,
    bytes: u64,
}

/// A step whose token ids the decoder has checked. Made by [`Decoder::prepare`].
#[derive(Debug)]
pub struct DecoderStep {
    step: Step,
    vocab_size: u32,
    /// Last new token of each sequence, in the step's numbering.
    last_rows: Vec<u32>,
}

impl DecoderStep {
    /// The step of the attention.
    pub fn step(&self) -> &Step {
        &self.step
    }

    /// The same, for the cache to commit.
    pub fn into_step(self) -> Step {
        self.step
    }

    /// Number of logit vectors of `logits` in this step.
    pub fn logit_rows(&self, logits: Logits) -> u32 {
        match logits {
            Logits::None => 0,
            Logits::Last => self.last_rows.len() as u32,
            Logits::All => self.step.tokens(),
        }
    }
}

/// A decoder whose weights arrive part by part.
struct Parts<'a> {
    kernels: &'a Kernels,
    plan: Plan<'a>,
    options: AttentionOptions,
    embedding: Option<Matrix<Region>>,
    /// The same as tied gates read it; each layer has a handle.
    tied: Option<TiedEmbedding>,
    layers: Vec<DeviceLayer>,
    norm: Option<Region>,
    lm_head: Option<Matrix<Region>>,
}

impl<'a> Parts<'a> {
    /// # Errors
    /// A configuration that contradicts itself; a vector, or eight rows of a matrix, over the device's binding limit.
    fn new(kernels: &'a Kernels, config: &'a DecoderConfig, options: AttentionOptions) -> Result<Self> {
        let plan = Plan { context: kernels.context(), config, storage: options.storage };
        plan.check_weights()?;
        let (embedding, tied, layers, norm, lm_head) = (None, None, Vec::new(), None, None);
        Ok(Parts { kernels, plan, options, embedding, tied, layers, norm, lm_head })
    }

    fn upload(&self, upload: &Upload<'_>) -> Result<Region> {
        upload.upload(self.kernels, self.options.storage)
    }

    fn upload_all(&self, shards: &Matrix<Upload<'_>>) -> Result<Matrix<Region>> {
        shards.iter().map(|shard| shard.map(|upload| self.upload(upload))).collect()
    }

    fn embedding(&mut self, tensor: &HostTensor) -> Result<()> {
        self.embedding = Some(self.upload_all(&self.plan.of_vocabulary(tensor))?);
        Ok(())
    }

    /// The embedding once more, as tied gates read it.
    fn tied(&mut self, tensor: &HostTensor) -> Result<()> {
        if let DecoderAttention::Latent(config) = &self.plan.config.attention
            && config.gate.as_ref().is_some_and(|gate| gate.tied)
        {
            self.tied = Some(TiedEmbedding::new(self.kernels, config, tensor, self.options.storage)?);
        }
        Ok(())
    }

    fn norm(&mut self, tensor: &HostTensor) -> Result<()> {
        self.norm = Some(self.upload(&self.plan.of_norm(tensor))?);
        Ok(())
    }

    fn head(&mut self, tensor: Option<&HostTensor>) -> Result<()> {
        self.lm_head = tensor.map(|tensor| self.upload_all(&self.plan.of_vocabulary(tensor))).transpose()?;
        Ok(())
    }

    fn layer(&mut self, layer: &DecoderLayerWeights) -> Result<()> {
        let uploads = self.plan.of_layer(layer);
        let (attention, tied) = (&self.plan.config.attention, self.tied.as_ref());
        let uploaded = DeviceLayer {
            input_norm: self.upload(&uploads.input_norm)?,
            attention: DeviceAttention::new(self.kernels, attention, &layer.attention, tied, self.options)?,
            post_attention_norm: self.upload(&uploads.post_attention_norm)?,
            gate_proj: self.upload_all(&uploads.gate_proj)?,
            up_proj: self.upload_all(&uploads.up_proj)?,
            down_proj: self.upload_all(&uploads.down_proj)?,
        };
        self.layers.push(uploaded);
        Ok(())
    }

    fn finish(self) -> Result<Decoder> {
        let absent = || Error::Argument(ArgumentError::Empty { what: "the list of weights" });
        let Parts { kernels, plan: Plan { config, .. }, options, embedding, layers, norm, lm_head, .. } = self;
        Ok(Decoder {
            kernels: kernels.clone(),
            config: config.clone(),
            hidden: padded_width(config.attention.hidden_size()),
            inner: padded_width(config.intermediate_size),
            eps: config.stream_eps() as f32,
            residual: config.stream_factor() as f32,
            storage: options.storage,
            embedding: embedding.ok_or_else(absent)?,
            layers,
            norm: norm.ok_or_else(absent)?,
            lm_head,
        })
    }
}

impl Decoder {
    /// Uploads a decoder's weights, which must have been loaded with the same `config`.
    ///
    /// # Errors
    /// A configuration that contradicts itself, or weights of another kind of attention; a vector or eight rows of a matrix over the
    /// device's binding limit, or a whole one of the attention that is not kept in shards, before anything is allocated; a weight
    /// beyond f16's range with f16 storage; no memory left, or a lost device.
    pub fn new(
        kernels: &Kernels,
        config: &DecoderConfig,
        weights: &DecoderWeights,
        options: AttentionOptions,
    ) -> Result<Self> {
        let mut parts = Parts::new(kernels, config, options)?;
        check_layers(config, weights)?;
        parts.embedding(&weights.embedding)?;
        parts.tied(&weights.embedding)?;
        weights.layers.iter().try_for_each(|layer| parts.layer(layer))?;
        parts.norm(&weights.norm)?;
        parts.head(weights.lm_head.as_ref())?;
        parts.finish()
    }

    /// The same from a checkpoint that holds nothing else: each layer's weights, and the embeddings, leave the host's memory before
    /// the next are read. For that it submits their copies, and waits for them.
    ///
    /// # Errors
    /// As [`DecoderWeights::load`] and [`Decoder::new`].
    pub fn load(
        kernels: &Kernels,
        config: &DecoderConfig,
        checkpoint: &Checkpoint<'_>,
        options: AttentionOptions,
    ) -> Result<Self> {
        let mut parts = Parts::new(kernels, config, options)?;
        DecoderWeights::visit(checkpoint, config, |part| {
            match part {
                Part::Embedding(tensor) => {
                    parts.embedding(&tensor)?;
                    readback::finish_uploads(kernels)?;
                    parts.tied(&tensor)
                }
                Part::Layer(layer) => parts.layer(&layer),
                Part::Norm(tensor) => parts.norm(&tensor),
                Part::Head(tensor) => parts.head(tensor.as_ref()),
            }?;
            readback::finish_uploads(kernels)
        })?;
        parts.finish()
    }

    /// The configuration that it was built with.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Storage of its weights.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Allocates a cache for the model; its layers are the model's, whatever `options` says.
    ///
    /// # Errors
    /// As [`LatentCache::new`](crate::LatentCache::new) and [`KvCache::new`](crate::KvCache::new).
    pub fn cache(&self, options: CacheOptions) -> Result<DecoderCache> {
        let first = self.layers.first().ok_or(Error::Argument(ArgumentError::Empty { what: "the list of layers" }))?;
        first.attention.cache(CacheOptions { n_layer: self.config.n_layer, ..options })
    }

    /// Bytes of the gate tables of all layers.
    pub fn gate_table_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.attention.gate_table_bytes()).sum()
    }

    /// Allocates the buffers for steps on `cache`. `all_logits` makes room for logits of every new token of a step
    /// ([`Logits::All`]), not just of every sequence.
    ///
    /// # Errors
    /// A buffer over the device's limits, before any is allocated; no memory left, or a lost device.
    pub fn state(&self, cache: &DecoderCache, all_logits: bool) -> Result<DecoderState> {
        let tokens = cache.max_tokens();
        let logit_rows = logit_rows(tokens, cache.options().batch, all_logits);
        let plan = Plan { context: self.kernels.context(), config: &self.config, storage: self.storage };
        let buffers = plan.state(tokens, logit_rows)?;
        let mut bytes = 0;
        let [stream, normed, delta, gate, up, inner, logits] = buffers.map(|(what, size)| -> Result<Region> {
            let buffer = self.kernels.allocate(&format!("egmla.decoder.{what}"), size)?;
            bytes += buffer.size();
            Ok(Region::from(&buffer))
        });
        Ok(DecoderState {
            stream: stream?,
            normed: normed?,
            delta: delta?,
            gate: gate?,
            up: up?,
            inner: inner?,
            logits: logits?,
            logit_rows,
            bytes,
            max_tokens: tokens,
        })
    }

    /// Checks new tokens and makes the tables that every layer needs.
    ///
    /// # Errors
    /// No token ids, ids beyond the vocabulary (also of a model without a gate), or what [`DecoderCache::prepare`] refuses.
    pub fn prepare(&self, cache: &mut DecoderCache, mode: Mode, tokens: StepTokens<'_>) -> Result<DecoderStep> {
        check_ids(tokens.ids.unwrap_or_default(), self.config.vocab_size)?;
        let step = cache.prepare(mode, tokens)?;
        let mut end = 0;
        let with_tokens = tokens.counts.iter().filter(|&&count| count > 0);
        let last_rows = with_tokens.map(|count| {
            end += count;
            end - 1
        });
        Ok(DecoderStep { step, vocab_size: self.config.vocab_size, last_rows: last_rows.collect() })
    }

    /// Records and commits new tokens; returns the region of their logits, as [`Decoder::forward`].
    ///
    /// # Errors
    /// As [`Decoder::prepare`] and [`Decoder::forward`]; recording and cache are then unchanged.
    pub fn advance(
        &self,
        recording: &mut Recording,
        cache: &mut DecoderCache,
        state: &DecoderState,
        (mode, tokens): (Mode, StepTokens<'_>),
        logits: Logits,
    ) -> Result<Region> {
        let step = self.prepare(cache, mode, tokens)?;
        let region = self.forward(recording, cache, &step, state, logits)?;
        cache.commit(step.into_step())?;
        Ok(region)
    }

    /// Records a step through all layers. The cache's lengths change with [`DecoderCache::commit`].
    ///
    /// Returns the region of the logits: `[step.logit_rows(logits), vocab]` f32, in a buffer of `state` that the next step
    /// overwrites.
    ///
    /// # Errors
    /// A step of another cache or vocabulary, a cache of another model, more tokens or logits than `state` holds, or a kernel
    /// that cannot run. The recording is then unchanged.
    pub fn forward(
        &self,
        recording: &mut Recording,
        cache: &DecoderCache,
        step: &DecoderStep,
        state: &DecoderState,
        logits: Logits,
    ) -> Result<Region> {
        recording.kernels().same_device(&self.kernels, "the decoder", "recording")?;
        if step.vocab_size != self.config.vocab_size {
            let (expected, found) = (self.config.vocab_size.into(), step.vocab_size.into());
            return Err(Error::Argument(ArgumentError::Count {
                what: "vocabulary that the step was checked against",
                expected,
                found,
            }));
        }
        let layers = cache.options().n_layer;
        if layers != self.config.n_layer {
            let (expected, found) = (self.config.n_layer.into(), layers.into());
            return Err(Error::Argument(ArgumentError::Count { what: "layers of the cache", expected, found }));
        }
        if step.step.tokens() > state.max_tokens {
            return Err(Error::Argument(ArgumentError::OutOfRange {
                what: "new tokens of a step (the max_tokens of the cache that the decoder state was made for)",
                found: step.step.tokens().into(),
                limit: state.max_tokens.into(),
            }));
        }
        let rows = step.logit_rows(logits);
        if rows > state.logit_rows {
            return Err(Error::Argument(ArgumentError::OutOfRange {
                what: "rows of logits of a step (the decoder state's all_logits)",
                found: rows.into(),
                limit: state.logit_rows.into(),
            }));
        }
        let mark = recording.mark();
        let recorded = self.record(recording, cache, step, state, logits);
        if recorded.is_err() {
            recording.rewind(mark);
        }
        recorded?;
        Ok(Region { size: product(&[rows, self.config.vocab_size]) * 4, ..state.logits.clone() })
    }

    fn record(
        &self,
        recording: &mut Recording,
        cache: &DecoderCache,
        decoder_step: &DecoderStep,
        state: &DecoderState,
        logits: Logits,
    ) -> Result<()> {
        let step = decoder_step.step();
        let tokens = step.tokens();
        let (hidden, inner) = (self.hidden, self.inner);
        let rows_of = |region| Hidden { region, width: hidden };
        let DecoderState { stream, normed, delta, gate, up, .. } = state;
        let ids = step.token_ids(recording)?;
        for Shard { first, columns, proj, .. } in &self.embedding {
            self.look_up(recording, tokens, (*first, *columns, self.storage), (proj, &ids, stream))?;
        }
        for (number, layer) in self.layers.iter().enumerate() {
            self.norm(recording, tokens, stream, &layer.input_norm, normed)?;
            let (of, to) = (rows_of(normed), rows_of(delta));
            layer.attention.forward(recording, cache, step, number, (of, to))?;
            self.add(recording, tokens, delta, stream)?;
            self.norm(recording, tokens, stream, &layer.post_attention_norm, normed)?;
            self.linear(recording, (tokens, hidden, inner), normed, &layer.gate_proj, gate)?;
            self.linear(recording, (tokens, hidden, inner), normed, &layer.up_proj, up)?;
            let problem = swiglu::Swiglu { elements: elements(swiglu::Swiglu::NAME, tokens, inner)? };
            recording.add_own(&problem, swiglu::Args { gate, up, y: &state.inner })?;
            self.linear(recording, (tokens, inner, hidden), &state.inner, &layer.down_proj, delta)?;
            self.add(recording, tokens, delta, stream)?;
        }
        let rows = decoder_step.logit_rows(logits);
        if logits == Logits::None {
            return Ok(());
        }
        let mut last = stream;
        if rows < tokens {
            let last_rows = recording.table((step.identity(), 2), bytemuck::cast_slice(&decoder_step.last_rows))?;
            self.look_up(recording, rows, (0, tokens, Storage::F32), (stream, &last_rows, delta))?;
            last = delta;
        }
        self.norm(recording, rows, last, &self.norm, normed)?;
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        self.linear(recording, (rows, hidden, self.config.vocab_size), normed, head, &state.logits)
    }

    /// `y [rows, hidden] = table[ids - first_id]`, where the table has `vocab_size` rows; other ids' rows stay as they are.
    fn look_up(
        &self,
        recording: &mut Recording,
        rows: u32,
        (first_id, vocab_size, storage): (u32, u32, Storage),
        (table, ids, y): (&Region, &Region, &Region),
    ) -> Result<()> {
        let width = self.hidden;
        let problem = gather::Gather { rows, width, table_row: width, first_id, vocab_size, storage };
        recording.add_own(&problem, gather::Args { table, ids, y })
    }

    fn norm(&self, recording: &mut Recording, rows: u32, x: &Region, weight: &Region, y: &Region) -> Result<()> {
        let problem = norm::Norm {
            rows,
            width: self.config.attention.hidden_size(),
            x_offset: 0,
            x_row: self.hidden,
            eps: self.eps,
            kind: norm::Kind::Rms,
            bias: false,
            storage: self.storage,
        };
        let bias = self.kernels.absent();
        recording.add_own(&problem, norm::Args { x, weight, bias: &bias, y })
    }

    /// `y [rows, cols] = x [rows, inner] · wᵀ`.
    fn linear(
        &self,
        recording: &mut Recording,
        (rows, inner, cols): (u32, u32, u32),
        x: &Region,
        w: &[Shard<Region>],
        y: &Region,
    ) -> Result<()> {
        let problem = matmul::Matmul::linear(rows, inner, cols, false, self.storage);
        Shard::product(w, recording, &problem, x, y)
    }

    /// `stream += residual · delta`, both `[tokens, hidden]`.
    fn add(&self, recording: &mut Recording, tokens: u32, delta: &Region, stream: &Region) -> Result<()> {
        let elements = elements(residual_add::ResidualAdd::NAME, tokens, self.hidden)?;
        let problem = residual_add::ResidualAdd { elements, factor: self.residual };
        recording.add_own(&problem, residual_add::Args { delta, stream })
    }
}

fn elements(kernel: &'static str, rows: u32, width: u32) -> Result<u32> {
    rows.checked_mul(width)
        .ok_or_else(|| Error::problem(kernel, format!("{rows} rows of {width} are 2^32 elements or more")))
}

impl DecoderState {
    /// Bytes allocated on the device for `cache` and this state, by purpose; the decoder's own buffers count as workspace.
    pub fn memory(&self, cache: &DecoderCache) -> MemoryReport {
        let mut report = cache.memory();
        report.workspace += self.bytes;
        report
    }
}

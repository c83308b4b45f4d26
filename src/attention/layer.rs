//! One attention layer on the device.

use half::f16;

use super::cache::LatentCache;
use super::product::product_of;
use super::step::{Mode, Step, StepInput};
use super::workspace::Workspace;
use crate::config::{AttentionConfig, GateConfig, LOW_RANK_NORM_EPS};
use crate::error::{Error, Result};
use crate::kernel::{Kernels, Recording, Region};
use crate::kernels::matmul::Layout;
use crate::kernels::{
    attention_absorbed, attention_decode, attention_merge, attention_prefill, cache_append, cache_read, gate, gather,
    matmul, norm, rope,
};
use crate::plan::{Storage, Tuning};
use crate::weights::{AttentionWeights, HostTensor, QueryWeights};

/// How a decode step attends to the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DecodePath {
    /// `Absorbed` where it is supported, else `Expanded`.
    #[default]
    Auto,
    /// Keys and values are rebuilt from the cache, tile by tile: every configuration.
    Expanded,
    /// The query is taken through the key projection and meets the latents themselves: MLA, and the gate at `latent`.
    Absorbed,
}

/// Weights in device memory; absent ones hold `Kernels::absent`.
#[derive(Debug)]
struct DeviceWeights {
    query: DeviceQuery,
    kv_a_proj: Region,
    kv_a_bias: Option<Region>,
    kv_a_norm: Option<Region>,
    kv_b_proj: Region,
    o_proj: Region,
    o_bias: Option<Region>,
    gate: Option<DeviceGate>,
}

#[derive(Debug)]
enum DeviceQuery {
    Full(Region),
    LowRank { a_proj: Region, a_bias: Option<Region>, a_norm: Region, b_proj: Region },
}

#[derive(Debug)]
struct DeviceGate {
    embedding: Region,
    b_proj: Region,
    norm_weight: Region,
    norm_bias: Region,
}

/// Uploads a tensor as f32 or f16.
///
/// # Errors
/// [`Error::OutOfF16Range`] when f16 would turn a finite weight into infinity; [`Error::Limit`] over one binding; what the
/// allocation refuses.
pub(crate) fn upload_tensor(kernels: &Kernels, tensor: &HostTensor, storage: Storage) -> Result<Region> {
    let needed = storage.tensor_bytes(tensor.data.len() as u64);
    let allowed = kernels.context().limits.max_storage_buffer_binding_size;
    if needed > allowed {
        let what = format!("tensor `{}` in {}", tensor.name, storage.name());
        return Err(Error::Limit { what, needed, allowed, limit: "max_storage_buffer_binding_size" });
    }
    let buffer = match storage {
        Storage::F32 => kernels.upload(&tensor.name, bytemuck::cast_slice(&tensor.data))?,
        Storage::F16 => {
            let narrow = |(index, &value): (usize, &f32)| {
                let half = f16::from_f32(value);
                if value.is_finite() && !half.is_finite() {
                    return Err(Error::OutOfF16Range { name: tensor.name.clone(), index, value });
                }
                Ok(half)
            };
            let halves = tensor.data.iter().enumerate().map(narrow).collect::<Result<Vec<f16>>>()?;
            kernels.upload(&tensor.name, bytemuck::cast_slice(&halves))?
        }
    };
    Ok(Region::from(&buffer))
}

/// `prefill` and `decode` commit a step after one layer: on a cache of several, the others would never see its tokens.
fn one_layer(cache: &LatentCache) -> Result<()> {
    let what = "layers of the cache (with several, use plan_step, forward and commit)";
    match cache.options().n_layer {
        1 => Ok(()),
        found => Err(Error::Count { what, expected: 1, found: found.into() }),
    }
}

/// One attention layer: configuration and weights in device memory.
#[derive(Debug)]
pub struct Attention {
    kernels: Kernels,
    config: AttentionConfig,
    storage: Storage,
    weights: DeviceWeights,
}

impl Attention {
    /// Uploads a layer's weights.
    ///
    /// # Errors
    /// A configuration that contradicts itself or the weights, a weight beyond f16's range with f16 storage, a tensor over
    /// the device's binding limit, or no memory left.
    pub fn new(
        kernels: &Kernels,
        config: &AttentionConfig,
        weights: &AttentionWeights,
        storage: Storage,
    ) -> Result<Self> {
        weights.check(config)?;
        let upload = |tensor: &HostTensor| upload_tensor(kernels, tensor, storage);
        let optional = |tensor: &Option<HostTensor>| tensor.as_ref().map(upload).transpose();
        let weights = DeviceWeights {
            query: match &weights.query {
                QueryWeights::Full { proj } => DeviceQuery::Full(upload(proj)?),
                QueryWeights::LowRank { a_proj, a_bias, a_norm, b_proj } => DeviceQuery::LowRank {
                    a_proj: upload(a_proj)?,
                    a_bias: optional(a_bias)?,
                    a_norm: upload(a_norm)?,
                    b_proj: upload(b_proj)?,
                },
            },
            kv_a_proj: upload(&weights.kv_a_proj)?,
            kv_a_bias: optional(&weights.kv_a_bias)?,
            kv_a_norm: optional(&weights.kv_a_norm)?,
            kv_b_proj: upload(&weights.kv_b_proj)?,
            o_proj: upload(&weights.o_proj)?,
            o_bias: optional(&weights.o_bias)?,
            gate: match &weights.gate {
                None => None,
                Some(gate) => Some(DeviceGate {
                    embedding: upload(&gate.embedding)?,
                    b_proj: upload(&gate.b_proj)?,
                    norm_weight: optional(&gate.norm_weight)?.unwrap_or_else(|| kernels.absent()),
                    norm_bias: optional(&gate.norm_bias)?.unwrap_or_else(|| kernels.absent()),
                }),
            },
        };
        Ok(Attention { kernels: kernels.clone(), config: config.clone(), storage, weights })
    }

    /// The layer's configuration.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// The decode path that `path` stands for in this configuration.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for `Absorbed` with the gate at `up_projected`: gate and norm stand between latent and key.
    pub fn decode_path(&self, path: DecodePath) -> Result<DecodePath> {
        let absorbable = self.config.up_projected_gate().is_none();
        match path {
            DecodePath::Expanded => Ok(DecodePath::Expanded),
            DecodePath::Auto if absorbable => Ok(DecodePath::Absorbed),
            DecodePath::Auto => Ok(DecodePath::Expanded),
            DecodePath::Absorbed if absorbable => Ok(DecodePath::Absorbed),
            DecodePath::Absorbed => Err(Error::Unsupported {
                what: "decode path `absorbed` with gate site `up_projected`".to_owned(),
                instead: "use `expanded` or `auto`",
            }),
        }
    }

    /// Plans, records and commits new tokens of a cache of one layer; any number a sequence.
    ///
    /// The tokens count as cached from here on: a caller whose submission fails later takes them back with
    /// [`LatentCache::truncate`].
    ///
    /// `hidden` and `out` are `[tokens, hidden_size]` f32: sequence 0's new tokens, then sequence 1's, and so on.
    ///
    /// # Errors
    /// What [`LatentCache::plan_step`] and [`Attention::forward`] refuse; recording and cache are then unchanged.
    #[expect(clippy::too_many_arguments, reason = "the buffers and the tokens are what a step is")]
    pub fn prefill(
        &self,
        recording: &mut Recording,
        cache: &mut LatentCache,
        workspace: &Workspace,
        counts: &[u32],
        token_ids: Option<&[u32]>,
        hidden: &Region,
        out: &Region,
    ) -> Result<()> {
        one_layer(cache)?;
        let step = cache.plan_step(StepInput { mode: Mode::Prefill, counts, token_ids })?;
        self.forward(recording, cache, 0, &step, workspace, DecodePath::Auto, hidden, out)?;
        cache.commit(&step)
    }

    /// Plans, records and commits one new token of each sequence with a count of 1, on a cache of one layer.
    ///
    /// `hidden` and `out` are `[tokens, hidden_size]` f32.
    ///
    /// # Errors
    /// As [`Attention::prefill`].
    #[expect(clippy::too_many_arguments, reason = "the buffers, the tokens and the path are what a step is")]
    pub fn decode(
        &self,
        recording: &mut Recording,
        cache: &mut LatentCache,
        workspace: &Workspace,
        counts: &[u32],
        token_ids: Option<&[u32]>,
        path: DecodePath,
        hidden: &Region,
        out: &Region,
    ) -> Result<()> {
        one_layer(cache)?;
        let step = cache.plan_step(StepInput { mode: Mode::Decode, counts, token_ids })?;
        self.forward(recording, cache, 0, &step, workspace, path, hidden, out)?;
        cache.commit(&step)
    }

    /// Records this layer's part of a step: appends the new tokens to layer `layer` of the cache's buffers and writes the
    /// attention's output. The cache's lengths change with [`LatentCache::commit`].
    ///
    /// `hidden` and `out` are `[step.tokens(), hidden_size]` f32, in different buffers.
    ///
    /// # Errors
    /// A step of another cache, more tokens than the workspace holds, a path that is not supported, or what a kernel
    /// refuses. The recording is then as it was.
    #[expect(clippy::too_many_arguments, reason = "the buffers, the step and the path are what a layer needs")]
    pub fn forward(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        layer: usize,
        step: &Step,
        workspace: &Workspace,
        path: DecodePath,
        hidden: &Region,
        out: &Region,
    ) -> Result<()> {
        if step.stamp() != cache.stamp() {
            return Err(Error::StaleStep);
        }
        if cache.config() != &self.config {
            return Err(Error::config("(attention)", "the cache was made for another configuration"));
        }
        if step.tokens > workspace.max_tokens {
            return Err(Error::OutOfRange {
                what: "new tokens of a step (the workspace's max_tokens)",
                found: step.tokens.into(),
                limit: workspace.max_tokens.into(),
            });
        }
        // No dispatch binds both, but a caller who passes one buffer twice would lose the input.
        if hidden.buffer == out.buffer {
            return Err(Error::Aliased { kernel: "attention", first: "hidden", second: "out" });
        }
        let path = self.decode_path(path)?;
        let mark = recording.mark();
        let recorded = self.record(recording, cache, layer, step, workspace, path, hidden, out);
        if recorded.is_err() {
            recording.rewind(mark);
        }
        recorded
    }

    #[expect(clippy::too_many_arguments, reason = "as forward, which it serves")]
    fn record(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        layer: usize,
        step: &Step,
        workspace: &Workspace,
        path: DecodePath,
        hidden: &Region,
        out: &Region,
    ) -> Result<()> {
        self.query(recording, step, workspace, hidden)?;
        self.append(recording, cache, layer, step, workspace, hidden)?;
        match (step.mode, path) {
            (Mode::Decode, DecodePath::Absorbed) => self.attend_absorbed(recording, cache, layer, step, workspace)?,
            _ => self.attend_expanded(recording, cache, layer, step, workspace)?,
        }
        let c = &self.config;
        let width = c.n_head * c.d_value;
        self.linear(
            recording,
            step.tokens,
            (width, c.hidden_size),
            &workspace.values,
            &self.weights.o_proj,
            self.weights.o_bias.as_ref(),
            out,
        )
    }

    /// Dense `y [rows, cols] = x [rows, inner] · wᵀ + bias`.
    #[expect(clippy::too_many_arguments, reason = "sizes and operands of a matrix product")]
    fn linear(
        &self,
        recording: &mut Recording,
        rows: u32,
        (inner, cols): (u32, u32),
        x: &Region,
        w: &Region,
        bias: Option<&Region>,
        y: &Region,
    ) -> Result<()> {
        let problem = matmul::Problem::linear(rows, inner, cols, bias.is_some(), self.storage);
        let absent = self.kernels.absent();
        product_of(recording, problem, matmul::Args { x, w, bias: bias.unwrap_or(&absent), y })
    }

    fn low_rank_norm(
        &self,
        recording: &mut Recording,
        (rows, width, x_row): (u32, u32, u32),
        x: &Region,
        weight: &Region,
        y: &Region,
    ) -> Result<()> {
        let problem = norm::Problem {
            rows,
            width,
            x_offset: 0,
            x_row,
            eps: LOW_RANK_NORM_EPS as f32,
            kind: norm::Kind::Rms,
            bias: false,
            storage: self.storage,
        };
        let bias = self.kernels.absent();
        norm::encode(recording, &problem, norm::Args { x, weight, bias: &bias, y }, Tuning::Auto)
    }

    /// `q [tokens, n_head, d_nope + d_rope]`, rotated.
    fn query(&self, recording: &mut Recording, step: &Step, workspace: &Workspace, hidden: &Region) -> Result<()> {
        let c = &self.config;
        let width = c.n_head * c.d_query();
        match &self.weights.query {
            DeviceQuery::Full(proj) => {
                self.linear(recording, step.tokens, (c.hidden_size, width), hidden, proj, None, &workspace.q)?;
            }
            DeviceQuery::LowRank { a_proj, a_bias, a_norm, b_proj } => {
                let rank = c.d_q_latent.unwrap_or_default();
                let (latent, normed) = (&workspace.q_latent, &workspace.q_latent_normed);
                self.linear(recording, step.tokens, (c.hidden_size, rank), hidden, a_proj, a_bias.as_ref(), latent)?;
                self.low_rank_norm(recording, (step.tokens, rank, rank), latent, a_norm, normed)?;
                self.linear(recording, step.tokens, (rank, width), normed, b_proj, None, &workspace.q)?;
            }
        }
        self.rotate(recording, step, (c.n_head, c.d_nope, c.d_query()), &workspace.q)
    }

    /// Rotates the last `d_rope` elements of every head of `[tokens, n_head, d_head]`.
    fn rotate(
        &self,
        recording: &mut Recording,
        step: &Step,
        (n_head, offset, d_head): (u32, u32, u32),
        values: &Region,
    ) -> Result<()> {
        let problem = rope::Problem {
            tokens: step.tokens,
            n_head,
            d_rope: self.config.d_rope,
            offset,
            token_stride: n_head * d_head,
            head_stride: d_head,
            interleave: self.config.rope.interleave,
        };
        rope::encode(recording, &problem, rope::Args { rotations: &step.rotations, values }, Tuning::Auto)
    }

    /// Latents and rotary keys of the new tokens, into the cache.
    fn append(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        layer: usize,
        step: &Step,
        workspace: &Workspace,
        hidden: &Region,
    ) -> Result<()> {
        let c = &self.config;
        let d_kv_a = c.d_latent + c.d_rope;
        let bias = self.weights.kv_a_bias.as_ref();
        let kv_a = &workspace.kv_a;
        self.linear(recording, step.tokens, (c.hidden_size, d_kv_a), hidden, &self.weights.kv_a_proj, bias, kv_a)?;
        self.rotate(recording, step, (1, c.d_latent, d_kv_a), kv_a)?;
        let mut latent = (kv_a, d_kv_a);
        if let Some(weight) = &self.weights.kv_a_norm {
            self.low_rank_norm(recording, (step.tokens, c.d_latent, d_kv_a), kv_a, weight, &workspace.latent)?;
            latent = (&workspace.latent, c.d_latent);
        }
        if let Some(gate) = c.latent_gate() {
            let ids = self.ids_of(step)?;
            self.gate_projection(recording, gate, step.tokens, c.d_latent, ids, workspace)?;
            let absent = self.kernels.absent();
            let sink = self.kernels.sink();
            let (x, y) = (latent, &workspace.latent_gated);
            self.apply_gate(recording, gate, (step.tokens, c.d_latent, x.1), x.0, workspace, (&absent, &sink, 0), y)?;
            latent = (&workspace.latent_gated, c.d_latent);
        }
        let cached = cache.layer(layer)?;
        let with_ids = cache.ids().is_some();
        let ids = if with_ids { self.ids_of(step)?.clone() } else { self.kernels.absent() };
        let problem = cache_append::Problem {
            tokens: step.tokens,
            cache_rows: cache.rows(),
            d_latent: c.d_latent,
            latent_offset: 0,
            latent_row: latent.1,
            d_rope: c.d_rope,
            rope_offset: c.d_latent,
            rope_row: d_kv_a,
            with_ids,
            storage: cache.options().storage,
        };
        cache_append::encode(
            recording,
            &problem,
            cache_append::Args {
                latent: latent.0,
                rope_key: kv_a,
                ids: &ids,
                slots: &step.slots,
                latent_cache: &Region::from(&cached.latent),
                rope_cache: &Region::from(&cached.rope_key),
                id_cache: &cache.ids().unwrap_or_else(|| self.kernels.sink()),
            },
            Tuning::Auto,
        )
    }

    fn ids_of<'a>(&self, step: &'a Step) -> Result<&'a Region> {
        step.token_ids().ok_or(Error::Empty { what: "the list of token ids, which the gate needs," })
    }

    /// [`Attention::new`] has checked that a gate in the configuration has its weights.
    fn gate_weights(&self) -> Result<&DeviceGate> {
        self.weights.gate.as_ref().ok_or(Error::Empty { what: "the gate's weights" })
    }

    /// `gate [rows, width] = gate_b_proj · gate_embedding[ids]`, before its activation.
    fn gate_projection(
        &self,
        recording: &mut Recording,
        config: &GateConfig,
        rows: u32,
        width: u32,
        ids: &Region,
        workspace: &Workspace,
    ) -> Result<()> {
        let weights = self.gate_weights()?;
        let problem =
            gather::Problem { rows, width: config.d_gate, vocab_size: config.vocab_size, storage: self.storage };
        let args = gather::Args { table: &weights.embedding, ids, y: &workspace.gate_rows };
        gather::encode(recording, &problem, args, Tuning::Auto)?;
        let (x, y) = (&workspace.gate_rows, &workspace.gate);
        self.linear(recording, rows, (config.d_gate, width), x, &weights.b_proj, None, y)
    }

    /// `y = Norm(x ⊙ act(gate))`, statistics into `(slots, statistics, rows of it)`.
    #[expect(clippy::too_many_arguments, reason = "sizes and operands of the gate")]
    fn apply_gate(
        &self,
        recording: &mut Recording,
        config: &GateConfig,
        (rows, width, x_row): (u32, u32, u32),
        x: &Region,
        workspace: &Workspace,
        (slots, statistics, statistics_rows): (&Region, &Region, u32),
        y: &Region,
    ) -> Result<()> {
        let weights = self.gate_weights()?;
        let problem = gate::Problem {
            rows,
            width,
            x_offset: 0,
            x_row,
            eps: config.norm_eps as f32,
            activation: config.activation,
            norm: config.norm,
            statistics_rows,
            storage: self.storage,
        };
        let (weight, bias) = (&weights.norm_weight, &weights.norm_bias);
        let args = gate::Args { x, g: &workspace.gate, weight, bias, slots, y, statistics };
        gate::encode(recording, &problem, args, Tuning::Auto)
    }

    /// Attention over keys and values that are rebuilt from the cache, a tile of rows at a time.
    fn attend_expanded(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        layer: usize,
        step: &Step,
        workspace: &Workspace,
    ) -> Result<()> {
        let c = &self.config;
        let rope_cache = Region::from(&cache.layer(layer)?.rope_key);
        let storage = cache.options().storage;
        let mut first = 0;
        while first < step.rows {
            let rows = workspace.tile_rows.min(step.rows - first);
            // The padding behind the last sequence is never read.
            let used = rows.min(step.used_rows - first);
            let kv = self.rebuild(recording, cache, layer, step, workspace, (first, used))?;
            match step.mode {
                Mode::Prefill => {
                    let problem = attention_prefill::Problem {
                        tokens: step.tokens,
                        query_tiles: step.query_tiles,
                        n_sequence: step.n_sequence,
                        n_head: c.n_head,
                        d_nope: c.d_nope,
                        d_rope: c.d_rope,
                        d_value: c.d_value,
                        kv_first: first,
                        kv_rows: rows,
                        cache_rows: cache.rows(),
                        first: first == 0,
                        last: first + rows == step.rows,
                        scale: c.scale() as f32,
                        storage,
                    };
                    let args = attention_prefill::Args {
                        q: &workspace.q,
                        kv,
                        rope_cache: &rope_cache,
                        queries: &step.queries,
                        sequences: &step.sequences,
                        values: &workspace.values,
                        softmax: &workspace.softmax,
                    };
                    attention_prefill::encode(recording, &problem, args, Tuning::Auto)?;
                }
                Mode::Decode => {
                    let problem = attention_decode::Problem {
                        tokens: step.tokens,
                        n_sequence: step.n_sequence,
                        n_head: c.n_head,
                        d_nope: c.d_nope,
                        d_rope: c.d_rope,
                        d_value: c.d_value,
                        kv_first: first,
                        kv_rows: rows,
                        cache_rows: cache.rows(),
                        scale: c.scale() as f32,
                        storage,
                    };
                    let args = attention_decode::Args {
                        q: &workspace.q,
                        kv,
                        rope_cache: &rope_cache,
                        sequences: &step.sequences,
                        partial_values: &workspace.partial_values,
                        partial_softmax: &workspace.partial_softmax,
                    };
                    attention_decode::encode(recording, &problem, args, Tuning::Auto)?;
                }
            }
            first += rows;
        }
        match step.mode {
            Mode::Prefill => Ok(()),
            Mode::Decode => self.merge(recording, step, workspace, c.d_value, &workspace.values),
        }
    }

    /// Keys and values `[rows, n_head, d_nope + d_value]` of a tile, gated and normed where the configuration says so.
    fn rebuild<'w>(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        layer: usize,
        step: &Step,
        workspace: &'w Workspace,
        (first_row, rows): (u32, u32),
    ) -> Result<&'w Region> {
        let c = &self.config;
        let cached = cache.layer(layer)?;
        let with_ids = cache.ids().is_some();
        let problem = cache_read::Problem {
            first_row,
            rows,
            cache_rows: cache.rows(),
            d_latent: c.d_latent,
            n_sequence: step.n_sequence,
            with_ids,
            storage: cache.options().storage,
        };
        cache_read::encode(
            recording,
            &problem,
            cache_read::Args {
                latent_cache: &Region::from(&cached.latent),
                id_cache: &cache.ids().unwrap_or_else(|| self.kernels.absent()),
                sequences: &step.sequences,
                latent: &workspace.tile_latent,
                ids: &workspace.tile_ids,
                slots: &workspace.tile_slots,
            },
            Tuning::Auto,
        )?;
        let (x, w, y) = (&workspace.tile_latent, &self.weights.kv_b_proj, &workspace.kv);
        self.linear(recording, rows, (c.d_latent, c.d_kv()), x, w, None, y)?;
        let Some(gate) = c.up_projected_gate() else { return Ok(&workspace.kv) };
        self.gate_projection(recording, gate, rows, c.d_kv(), &workspace.tile_ids, workspace)?;
        let (statistics, statistics_rows) = match &cached.statistics {
            Some(buffer) => (Region::from(buffer), cache.rows()),
            None => (self.kernels.sink(), 0),
        };
        let to = (&workspace.tile_slots, &statistics, statistics_rows);
        self.apply_gate(
            recording,
            gate,
            (rows, c.d_kv(), c.d_kv()),
            &workspace.kv,
            workspace,
            to,
            &workspace.kv_gated,
        )?;
        Ok(&workspace.kv_gated)
    }

    /// Attention over the latents themselves.
    fn attend_absorbed(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        layer: usize,
        step: &Step,
        workspace: &Workspace,
    ) -> Result<()> {
        let c = &self.config;
        let cached = cache.layer(layer)?;
        let absent = self.kernels.absent();
        // Rows of kv_b_proj that belong to one head.
        let head_weights = (c.d_nope + c.d_value) * c.d_latent;
        let latents = Layout { offset: 0, row: c.n_head * c.d_latent, inner: 1, batch: c.d_latent };

        // a[h] = W_K[h]ᵀ q_C[h]
        let absorb = matmul::Problem {
            rows: step.tokens,
            inner: c.d_nope,
            cols: c.d_latent,
            batch: c.n_head,
            x: Layout { offset: 0, row: c.n_head * c.d_query(), inner: 1, batch: c.d_query() },
            w: Layout { offset: 0, row: 1, inner: c.d_latent, batch: head_weights },
            y: latents,
            bias: false,
            storage: self.storage,
        };
        let (w, bias) = (&self.weights.kv_b_proj, &absent);
        product_of(recording, absorb, matmul::Args { x: &workspace.q, w, bias, y: &workspace.absorbed })?;

        let problem = attention_absorbed::Problem {
            tokens: step.tokens,
            n_sequence: step.n_sequence,
            splits: step.rows / attention_decode::SPLIT,
            n_head: c.n_head,
            d_latent: c.d_latent,
            d_nope: c.d_nope,
            d_rope: c.d_rope,
            cache_rows: cache.rows(),
            scale: c.scale() as f32,
            storage: cache.options().storage,
        };
        let args = attention_absorbed::Args {
            absorbed: &workspace.absorbed,
            q: &workspace.q,
            latent_cache: &Region::from(&cached.latent),
            rope_cache: &Region::from(&cached.rope_key),
            sequences: &step.sequences,
            partial_values: &workspace.partial_values,
            partial_softmax: &workspace.partial_softmax,
        };
        attention_absorbed::encode(recording, &problem, args, Tuning::Auto)?;
        self.merge(recording, step, workspace, c.d_latent, &workspace.merged)?;

        // o[h] = W_V[h] S[h]
        let fold = matmul::Problem {
            rows: step.tokens,
            inner: c.d_latent,
            cols: c.d_value,
            batch: c.n_head,
            x: latents,
            w: Layout { offset: c.d_nope * c.d_latent, row: c.d_latent, inner: 1, batch: head_weights },
            y: Layout { offset: 0, row: c.n_head * c.d_value, inner: 1, batch: c.d_value },
            bias: false,
            storage: self.storage,
        };
        product_of(recording, fold, matmul::Args { x: &workspace.merged, w, bias, y: &workspace.values })
    }

    fn merge(
        &self,
        recording: &mut Recording,
        step: &Step,
        workspace: &Workspace,
        width: u32,
        values: &Region,
    ) -> Result<()> {
        let splits = step.rows / attention_decode::SPLIT;
        let problem = attention_merge::Problem { tokens: step.tokens, n_head: self.config.n_head, width, splits };
        let args = attention_merge::Args {
            partial_values: &workspace.partial_values,
            partial_softmax: &workspace.partial_softmax,
            ranges: &step.ranges,
            values,
            lse: &workspace.lse,
        };
        attention_merge::encode(recording, &problem, args, Tuning::Auto)
    }
}

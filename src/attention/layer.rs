//! One attention layer on the device.

use half::f16;
use serde::{Deserialize, Serialize};

use super::cache::LatentCache;
use super::cost;
use super::lists::{GateRows, Grouped, Lists, widths};
use super::step::{Mode, Step, StepInput};
use super::workspace::Workspace;
use crate::config::{AttentionConfig, GateConfig, GateNorm, LOW_RANK_NORM_EPS};
use crate::device::{Kernels, Region};
use crate::error::{Error, Result};
use crate::kernels::matmul::Layout;
use crate::kernels::{
    attention_absorbed, attention_combine, attention_decode, attention_grouped, attention_prefill, cache_append,
    cache_read, gate, gate_project, gate_statistics, gather, group_ids, matmul, norm, word_scatter,
};
use crate::recording::Recording;
use crate::storage::Storage;
use crate::weights::{AttentionWeights, HostTensor, QueryWeights};

/// How a decode step attends to the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecodePath {
    /// Whichever of the two does less work for the step at hand, by [`crate::attention::cost`].
    #[default]
    Auto,
    /// Keys and values are rebuilt from the cache, tile by tile: every configuration.
    Expanded,
    /// The query is taken through the key projection and meets the latents themselves: once for MLA and the gate at `latent`,
    /// once per distinct token id for the gate at `up_projected`.
    Absorbed,
}

/// Weights in device memory; absent ones hold `Kernels::absent`.
#[derive(Debug)]
struct DeviceWeights {
    query: DeviceQuery,
    /// `q_a_proj`, with a low-rank query, and `kv_a_proj_with_mqa`: one behind the other where a binding holds both.
    down: Vec<DownProjection>,
    /// `q_a_layernorm`, with a low-rank query, then `kv_a_layernorm`, where there is one.
    down_norm: Option<Region>,
    has_kv_a_norm: bool,
    kv_b_proj: Region,
    o_proj: Region,
    o_bias: Option<Region>,
    gate: Option<DeviceGate>,
}

#[derive(Debug)]
enum DeviceQuery {
    Full(Region),
    LowRank { b_proj: Region },
}

/// Columns of `[q latent, latent, rotary key]` of every new token.
#[derive(Debug)]
struct DownProjection {
    first: u32,
    columns: u32,
    proj: Region,
    bias: Option<Region>,
}

/// Rows of latents: where they stand.
#[derive(Clone, Copy)]
struct Latents<'a> {
    region: &'a Region,
    /// First element.
    offset: u32,
    /// From one to the next.
    row: u32,
}

#[derive(Debug)]
struct DeviceGate {
    /// Rows padded to 16 bytes, like those of `b_proj`.
    embedding: Region,
    b_proj: Region,
    /// γ, then β where a binding may begin: the two regions below and, for the grouped attention, one.
    affine: Region,
    norm_weight: Region,
    norm_bias: Region,
    table: Option<GateTable>,
}

/// Gate rows of the whole vocabulary, before their activation, in one shard or two.
#[derive(Debug)]
struct GateTable {
    rows: u32,
    low: Region,
    high: Option<Region>,
}

impl GateTable {
    fn bytes(&self) -> u64 {
        self.low.size + self.high.as_ref().map_or(0, |high| high.size)
    }
}

/// Gate rows as the grouped kernels bind them: resident ones, then others.
struct GateSource {
    gates: Region,
    resident: u32,
    storage: Storage,
    more: Region,
    more_storage: Storage,
}

/// Refuses what one binding, or one buffer, does not hold.
///
/// # Errors
/// [`Error::Limit`] with the bytes needed and the bytes allowed.
fn fits(kernels: &Kernels, what: &str, storage: Storage, needed: u64) -> Result<()> {
    let limits = &kernels.context().limits;
    let allowed = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
    if needed > allowed {
        let what = format!("{what} in {}", storage.name());
        return Err(Error::Limit { what, needed, allowed, limit: "max_storage_buffer_binding_size" });
    }
    Ok(())
}

/// Bytes of a matrix whose rows, `width` elements each, are padded to 16 bytes.
fn bytes_of_rows(tensor: &HostTensor, storage: Storage, width: u32) -> u64 {
    let rows = tensor.data.len() as u64 / u64::from(width.max(1));
    storage.tensor_bytes(rows * u64::from(storage.row_pitch(width)))
}

/// Bytes of γ and β of the gate's norm, and where β begins.
fn bytes_of_affine(weight: &HostTensor, bias: Option<&HostTensor>, storage: Storage) -> (u64, u64) {
    let beta = u64::from(attention_grouped::beta_element(weight.data.len() as u32)) * storage.bytes();
    let part = storage.tensor_bytes(weight.data.len() as u64);
    (if bias.is_some() { beta + part } else { part }, beta)
}

/// Refuses a tensor that [`upload_tensor`] would.
pub(crate) fn check_tensor(kernels: &Kernels, tensor: &HostTensor, storage: Storage) -> Result<()> {
    fits(kernels, &format!("tensor `{}`", tensor.name), storage, storage.tensor_bytes(tensor.data.len() as u64))
}

/// Refuses weights of which a tensor does not fit: before any of them takes memory.
///
/// # Errors
/// [`Error::Limit`] of the first such tensor.
pub(crate) fn check_weights(
    kernels: &Kernels,
    config: &AttentionConfig,
    weights: &AttentionWeights,
    storage: Storage,
) -> Result<()> {
    let check = |tensor: &HostTensor| check_tensor(kernels, tensor, storage);
    let rows = |tensor: &HostTensor, width: u32| {
        fits(kernels, &format!("tensor `{}`", tensor.name), storage, bytes_of_rows(tensor, storage, width))
    };
    match &weights.query {
        QueryWeights::Full { proj } => check(proj)?,
        QueryWeights::LowRank { a_proj, a_bias, a_norm, b_proj } => {
            [a_proj, a_norm, b_proj].into_iter().chain(a_bias).try_for_each(check)?;
        }
    }
    let optional = [&weights.kv_a_bias, &weights.kv_a_norm, &weights.o_bias].into_iter().flatten();
    [&weights.kv_a_proj, &weights.o_proj].into_iter().chain(optional).try_for_each(check)?;
    rows(&weights.kv_b_proj, config.d_latent)?;
    let (Some(gate), Some(gate_config)) = (&weights.gate, &config.gate) else { return Ok(()) };
    rows(&gate.embedding, gate_config.d_gate)?;
    rows(&gate.b_proj, gate_config.d_gate)?;
    let Some(weight) = &gate.norm_weight else { return Ok(()) };
    let (needed, _) = bytes_of_affine(weight, gate.norm_bias.as_ref(), storage);
    fits(kernels, &format!("tensor `{}`", weight.name), storage, needed)
}

/// Uploads a tensor as f32 or f16.
///
/// # Errors
/// [`Error::OutOfF16Range`] when f16 would turn a finite weight into infinity; [`Error::Limit`] over one binding; what the
/// allocation refuses.
pub(crate) fn upload_tensor(kernels: &Kernels, tensor: &HostTensor, storage: Storage) -> Result<Region> {
    let elements = tensor.data.len();
    upload_parts(kernels, tensor, storage, elements, elements, elements)
}

/// Uploads a matrix, `width` elements a row, with every row padded with zeros to 16 bytes.
///
/// # Errors
/// As [`upload_tensor`].
fn upload_rows(kernels: &Kernels, tensor: &HostTensor, storage: Storage, width: u32) -> Result<Region> {
    let elements = bytes_of_rows(tensor, storage, width) / storage.bytes();
    let (width, pitch) = (width as usize, storage.row_pitch(width) as usize);
    upload_parts(kernels, tensor, storage, width, pitch, elements as usize)
}

/// Uploads `width` elements of the tensor every `pitch` elements of the device's.
fn upload_parts(
    kernels: &Kernels,
    tensor: &HostTensor,
    storage: Storage,
    width: usize,
    pitch: usize,
    elements: usize,
) -> Result<Region> {
    let needed = storage.tensor_bytes(elements as u64);
    fits(kernels, &format!("tensor `{}`", tensor.name), storage, needed)?;
    let mut stored = vec![0u8; needed as usize];
    stored_rows(tensor, storage, width, pitch, &mut stored)?;
    Ok(Region::from(&kernels.upload(&tensor.name, &stored)?))
}

/// Bytes of tensors that stand one behind the other.
fn bytes_together(tensors: &[&HostTensor], storage: Storage) -> u64 {
    storage.tensor_bytes(tensors.iter().map(|tensor| tensor.data.len() as u64).sum())
}

/// Uploads tensors one behind the other.
///
/// # Errors
/// As [`upload_tensor`].
fn upload_together(kernels: &Kernels, tensors: &[&HostTensor], storage: Storage) -> Result<Region> {
    let needed = bytes_together(tensors, storage);
    let names = tensors.iter().map(|tensor| format!("`{}`", tensor.name)).collect::<Vec<_>>().join(", ");
    fits(kernels, &format!("tensors {names}"), storage, needed)?;
    let mut stored = vec![0u8; needed as usize];
    let mut at = 0;
    for tensor in tensors {
        let width = tensor.data.len();
        stored_rows(tensor, storage, width, width, &mut stored[at..])?;
        at += width * storage.bytes() as usize;
    }
    Ok(Region::from(&kernels.upload(&names, &stored)?))
}

/// The projections down to the latents: one product where they fit one binding, one for each where not.
fn upload_down(kernels: &Kernels, weights: &AttentionWeights, storage: Storage) -> Result<Vec<DownProjection>> {
    let query = match &weights.query {
        QueryWeights::Full { .. } => None,
        QueryWeights::LowRank { a_proj, a_bias, .. } => Some((a_proj, a_bias)),
    };
    let parts: Vec<_> = query.into_iter().chain([(&weights.kv_a_proj, &weights.kv_a_bias)]).collect();
    let columns = |proj: &HostTensor| proj.shape.first().copied().unwrap_or(0) as u32;
    let projections: Vec<_> = parts.iter().map(|(proj, _)| *proj).collect();
    let biases: Option<Vec<_>> = parts.iter().map(|(_, bias)| bias.as_ref()).collect();
    if bytes_together(&projections, storage) <= kernels.context().limits.max_storage_buffer_binding_size {
        let proj = upload_together(kernels, &projections, storage)?;
        let bias = biases.map(|biases| upload_together(kernels, &biases, storage)).transpose()?;
        let columns = parts.iter().map(|(proj, _)| columns(proj)).sum();
        return Ok(vec![DownProjection { first: 0, columns, proj, bias }]);
    }
    let mut first = 0;
    let mut down = Vec::new();
    for (proj, bias) in parts {
        let columns = columns(proj);
        let bias = bias.as_ref().map(|bias| upload_tensor(kernels, bias, storage)).transpose()?;
        down.push(DownProjection { first, columns, proj: upload_tensor(kernels, proj, storage)?, bias });
        first += columns;
    }
    Ok(down)
}

/// Writes a tensor's rows as they are stored on the device.
fn stored_rows(tensor: &HostTensor, storage: Storage, width: usize, pitch: usize, to: &mut [u8]) -> Result<()> {
    let bytes = storage.bytes() as usize;
    let rows = tensor.data.chunks(width.max(1)).zip(to.chunks_mut((pitch * bytes).max(1)));
    for (row, (values, to)) in rows.enumerate() {
        match storage {
            Storage::F32 => to[..4 * values.len()].copy_from_slice(bytemuck::cast_slice(values)),
            Storage::F16 => {
                for (index, (&value, to)) in values.iter().zip(to.chunks_exact_mut(2)).enumerate() {
                    let half = f16::from_f32(value);
                    if value.is_finite() && !half.is_finite() {
                        let index = row * width + index;
                        return Err(Error::OutOfF16Range { name: tensor.name.clone(), index, value });
                    }
                    to.copy_from_slice(&half.to_le_bytes());
                }
            }
        }
    }
    Ok(())
}

/// γ and β of the gate's norm in one buffer: as a whole, and each by itself.
fn upload_affine(
    kernels: &Kernels,
    storage: Storage,
    weight: Option<&HostTensor>,
    bias: Option<&HostTensor>,
) -> Result<(Region, Region, Region)> {
    let absent = kernels.absent();
    let Some(weight) = weight else { return Ok((absent.clone(), absent.clone(), absent)) };
    let width = weight.data.len();
    let (needed, beta) = bytes_of_affine(weight, bias, storage);
    let (beta, part) = (beta as usize, storage.tensor_bytes(width as u64) as usize);
    let mut stored = vec![0u8; needed as usize];
    stored_rows(weight, storage, width, width, &mut stored)?;
    if let Some(bias) = bias {
        stored_rows(bias, storage, width, width, &mut stored[beta..])?;
    }
    let buffer = kernels.upload(&weight.name, &stored)?;
    let norm_bias = bias.map_or(absent, |_| Region::new(&buffer, beta as u64, part as u64));
    Ok((Region::from(&buffer), Region::new(&buffer, 0, part as u64), norm_bias))
}

/// Rows of the gate table that a dispatch projects, so that none runs for long: any number of tiles begins where a binding may.
const TABLE_TILE: u32 = 4096;

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
    /// A configuration that contradicts itself or the weights; a tensor over the device's binding limit, before anything is
    /// allocated; a weight beyond f16's range with f16 storage; no memory left, or a lost device.
    pub fn new(
        kernels: &Kernels,
        config: &AttentionConfig,
        weights: &AttentionWeights,
        storage: Storage,
    ) -> Result<Self> {
        weights.check(config)?;
        check_weights(kernels, config, weights, storage)?;
        let upload = |tensor: &HostTensor| upload_tensor(kernels, tensor, storage);
        let optional = |tensor: &Option<HostTensor>| tensor.as_ref().map(upload).transpose();
        let query_norm = match &weights.query {
            QueryWeights::Full { .. } => None,
            QueryWeights::LowRank { a_norm, .. } => Some(a_norm),
        };
        let norms: Vec<_> = query_norm.into_iter().chain(&weights.kv_a_norm).collect();
        let weights = DeviceWeights {
            query: match &weights.query {
                QueryWeights::Full { proj } => DeviceQuery::Full(upload(proj)?),
                QueryWeights::LowRank { b_proj, .. } => DeviceQuery::LowRank { b_proj: upload(b_proj)? },
            },
            down: upload_down(kernels, weights, storage)?,
            down_norm: (!norms.is_empty()).then(|| upload_together(kernels, &norms, storage)).transpose()?,
            has_kv_a_norm: weights.kv_a_norm.is_some(),
            kv_b_proj: upload_rows(kernels, &weights.kv_b_proj, storage, config.d_latent)?,
            o_proj: upload(&weights.o_proj)?,
            o_bias: optional(&weights.o_bias)?,
            gate: match &weights.gate {
                None => None,
                Some(gate) => {
                    let (weight, bias) = (gate.norm_weight.as_ref(), gate.norm_bias.as_ref());
                    let (affine, norm_weight, norm_bias) = upload_affine(kernels, storage, weight, bias)?;
                    let d_gate = config.gate.as_ref().map_or(1, |gate| gate.d_gate);
                    Some(DeviceGate {
                        embedding: upload_rows(kernels, &gate.embedding, storage, d_gate)?,
                        b_proj: upload_rows(kernels, &gate.b_proj, storage, d_gate)?,
                        affine,
                        norm_weight,
                        norm_bias,
                        table: None,
                    })
                }
            },
        };
        Ok(Attention { kernels: kernels.clone(), config: config.clone(), storage, weights })
    }

    /// The layer's configuration.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// Records the projection of every id's gate row, for caches with [`GateRows::Table`]; the gate at `up_projected` alone.
    /// The dispatches must run before the first decode step does.
    ///
    /// # Errors
    /// No gate at `up_projected`; a table over two bindings, with both numbers, before anything is allocated; no memory left; a
    /// recording of another device. The recording and the layer are then as they were.
    pub fn load_gate_table(&mut self, recording: &mut Recording) -> Result<()> {
        recording.kernels().same_device(&self.kernels, "the layer", "recording")?;
        self.reserve_gate_table()?;
        let recorded = self.project_gate_table(recording);
        if let (Err(_), Some(gate)) = (&recorded, &mut self.weights.gate) {
            gate.table = None;
        }
        recorded
    }

    /// Allocates the gate table, all zeros.
    pub(crate) fn reserve_gate_table(&mut self) -> Result<()> {
        let Some(config) = self.config.up_projected_gate() else {
            return Err(Error::Unsupported {
                what: "a gate table without a gate at `up_projected`".to_owned(),
                instead: "use `GateRows::Recompute`, which asks for nothing",
            });
        };
        let (vocab, width) = (config.vocab_size, self.config.d_kv());
        let row_bytes = u64::from(self.storage.row_pitch(width)) * self.storage.bytes();
        let limits = &self.kernels.context().limits;
        let allowed = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        // Each shard holds whole rows: two may hold less than two bindings.
        let shard = (allowed / row_bytes.max(1)).min(vocab.into()) as u32;
        let allowed = 2 * row_bytes * u64::from(shard);
        let needed = row_bytes.saturating_mul(vocab.into());
        if needed > allowed {
            let what = format!("a gate table of {vocab} rows of {row_bytes} bytes, in two bindings");
            return Err(Error::Limit { what, needed, allowed, limit: "max_storage_buffer_binding_size" });
        }
        let allocate = |rows: u32| {
            let bytes = row_bytes * u64::from(rows);
            self.kernels.allocate("egmla.gate_table", bytes).map(|buffer| Region::from(&buffer))
        };
        let low = allocate(shard)?;
        let high = (shard < vocab).then(|| allocate(vocab - shard)).transpose()?;
        if let Some(gate) = &mut self.weights.gate {
            gate.table = Some(GateTable { rows: shard, low, high });
        }
        Ok(())
    }

    fn project_gate_table(&self, recording: &mut Recording) -> Result<()> {
        let weights = self.gate_weights()?;
        let (Some(config), Some(table)) = (self.config.up_projected_gate(), &weights.table) else { return Ok(()) };
        let (vocab, width) = (config.vocab_size, self.config.d_kv());
        let row_bytes = u64::from(self.storage.row_pitch(width)) * self.storage.bytes();
        let absent = self.kernels.absent();
        let mark = recording.mark();
        let mut first = 0;
        while first < vocab {
            let (to, from, end) = match &table.high {
                Some(high) if first >= table.rows => (high, table.rows, vocab),
                _ => (&table.low, 0, table.rows),
            };
            let rows = TABLE_TILE.min(end - first);
            let y = Region::new(&to.buffer, row_bytes * u64::from(first - from), row_bytes * u64::from(rows));
            let problem = gate_project::GateProject {
                rows,
                width,
                d_gate: config.d_gate,
                vocab_size: vocab,
                first_id: first,
                ids: false,
                targets: false,
                y_rows: rows,
                storage: self.storage,
                y_storage: self.storage,
            };
            let (gate_embedding, gate_b_proj) = (&weights.embedding, &weights.b_proj);
            let args = gate_project::Args { gate_embedding, gate_b_proj, ids: &absent, targets: &absent, y: &y };
            if let Err(error) = recording.add(&problem, args) {
                recording.rewind(mark);
                return Err(error);
            }
            first += rows;
        }
        Ok(())
    }

    /// Bytes of the gate table; 0 before [`Attention::load_gate_table`].
    pub fn gate_table_bytes(&self) -> u64 {
        let table = self.weights.gate.as_ref().and_then(|gate| gate.table.as_ref());
        table.map_or(0, GateTable::bytes)
    }

    /// The decode path that `path` stands for in a step on a cache: `Auto` is the one with fewer FLOPs by [`crate::attention::cost`].
    ///
    /// # Errors
    /// `Absorbed` where the device's workgroup memory holds no head of these widths, or where the cache wants gate rows from a
    /// table that was not loaded.
    pub fn decode_path(&self, path: DecodePath, cache: &LatentCache, step: &Step) -> Result<DecodePath> {
        let possible = || -> Result<()> {
            let Some(lists) = cache.lists() else { return Ok(()) };
            attention_grouped::tiling(self.kernels.context(), widths(&self.config))?;
            if lists.mode == GateRows::Table && self.gate_table_bytes() == 0 {
                return Err(Error::Unsupported {
                    what: "gate rows from a table that was not loaded".to_owned(),
                    instead: "record `Attention::load_gate_table` first",
                });
            }
            Ok(())
        };
        match path {
            DecodePath::Expanded => Ok(DecodePath::Expanded),
            DecodePath::Absorbed => possible().map(|()| DecodePath::Absorbed),
            DecodePath::Auto if possible().is_err() => Ok(DecodePath::Expanded),
            DecodePath::Auto => {
                let work = self.work(cache, step);
                let absorbed = cost::attend_absorbed(&self.config, &work, self.storage).flops;
                let expanded = cost::attend_expanded(&self.config, &work, self.storage).flops;
                Ok(if absorbed <= expanded { DecodePath::Absorbed } else { DecodePath::Expanded })
            }
        }
    }

    /// What a decode step attends to.
    fn work(&self, cache: &LatentCache, step: &Step) -> cost::DecodeWork {
        let grouped = step.grouped();
        cost::DecodeWork {
            tokens: step.tokens,
            rows: step.used_rows,
            positions: step.expected_positions,
            groups: grouped.map_or(0, |grouped| grouped.expected_groups),
            projected: match grouped {
                Some(grouped) if grouped.projected => grouped.groups,
                _ => 0,
            },
            cache_storage: cache.options().storage,
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

    /// Plans, records and commits up to [`MOST_DECODED`](super::MOST_DECODED) new tokens of each sequence, on a cache of one layer.
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
    /// Objects of another device, a step of another cache, more tokens than the workspace holds, a path that is not supported,
    /// or what a kernel refuses. The recording is then as it was.
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
        recording.kernels().same_device(&self.kernels, "the layer", "recording")?;
        recording.kernels().same_device(cache.kernels(), "the cache", "recording")?;
        recording.kernels().same_device(&workspace.kernels, "the workspace", "recording")?;
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
        if step.mode == Mode::Decode && step.most_tokens > workspace.decode_tokens {
            return Err(Error::OutOfRange {
                what: "new tokens of a sequence (the workspace's decode_tokens)",
                found: step.most_tokens.into(),
                limit: workspace.decode_tokens.into(),
            });
        }
        let path = match step.mode {
            Mode::Prefill => DecodePath::Expanded,
            Mode::Decode => self.decode_path(path, cache, step)?,
        };
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
        self.begin(recording, cache, layer, step)?;
        let latents = self.project(recording, step, workspace, hidden)?;
        let latents = self.append(recording, cache, layer, step, workspace, latents)?;
        match (path, step.grouped()) {
            (DecodePath::Absorbed, Some(grouped)) => {
                self.attend_grouped(recording, cache, layer, step, workspace, latents, grouped)?;
            }
            (DecodePath::Absorbed, None) => self.attend_absorbed(recording, cache, layer, step, workspace)?,
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

    /// What a step changes in the lists of the cache, once for all layers, and the rows that it adds to this layer's pool.
    fn begin(&self, recording: &mut Recording, cache: &LatentCache, layer: usize, step: &Step) -> Result<()> {
        let Some(lists) = cache.lists() else { return Ok(()) };
        if recording.once((step.identity(), 0)) {
            let problem = word_scatter::WordScatter { count: step.lists.patches.len() as u32, words: lists.words };
            let args = word_scatter::Args { patches: &step.patches, words: &Region::from(&lists.buffer) };
            recording.add(&problem, args)?;
        }
        let rows = step.lists.fills.0.len() as u32;
        let (Some(pool), Some(config)) = (&cache.layer(layer)?.pool, self.config.up_projected_gate()) else {
            return Ok(());
        };
        let weights = self.gate_weights()?;
        let y_storage = cache.options().storage;
        let pitch = u64::from(y_storage.row_pitch(self.config.d_kv())) * y_storage.bytes();
        let problem = gate_project::GateProject {
            rows,
            width: self.config.d_kv(),
            d_gate: config.d_gate,
            vocab_size: config.vocab_size,
            first_id: 0,
            ids: true,
            targets: true,
            y_rows: (pool.size / pitch) as u32,
            storage: self.storage,
            y_storage,
        };
        let args = gate_project::Args {
            gate_embedding: &weights.embedding,
            gate_b_proj: &weights.b_proj,
            ids: &step.fill_ids,
            targets: &step.fill_rows,
            y: pool,
        };
        recording.add(&problem, args)
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
        let problem = matmul::Matmul::linear(rows, inner, cols, bias.is_some(), self.storage);
        let absent = self.kernels.absent();
        recording.add(&problem, matmul::Args { x, w, bias: bias.unwrap_or(&absent), y })
    }

    /// `q [tokens, n_head, d_nope + d_rope]`, not rotated yet, and the latents and rotary keys of the new tokens, normed. Returns
    /// the latents.
    fn project<'w>(
        &self,
        recording: &mut Recording,
        step: &Step,
        workspace: &'w Workspace,
        hidden: &Region,
    ) -> Result<Latents<'w>> {
        let (c, tokens) = (&self.config, step.tokens);
        let (rank, width) = (c.d_q_latent.unwrap_or(0), c.n_head * c.d_query());
        let down_row = rank + c.d_latent + c.d_rope;
        for DownProjection { first, columns, proj, bias } in &self.weights.down {
            let y = Layout { offset: *first, row: down_row, ..Layout::dense(*columns) };
            let dense = matmul::Matmul::linear(tokens, c.hidden_size, *columns, bias.is_some(), self.storage);
            let absent = self.kernels.absent();
            let bias = bias.as_ref().unwrap_or(&absent);
            let args = matmul::Args { x: hidden, w: proj, bias, y: &workspace.down };
            recording.add(&matmul::Matmul { y, ..dense }, args)?;
        }
        // Segments that are normed, from the row's begin.
        let normed_latent = if self.weights.has_kv_a_norm { c.d_latent } else { 0 };
        if let Some(weight) = &self.weights.down_norm {
            let (width, second) = if rank == 0 { (normed_latent, 0) } else { (rank, normed_latent) };
            let problem = norm::Norm {
                rows: tokens,
                width,
                second,
                x_offset: 0,
                x_row: down_row,
                eps: LOW_RANK_NORM_EPS as f32,
                kind: norm::Kind::Rms,
                bias: false,
                storage: self.storage,
            };
            let bias = self.kernels.absent();
            let args = norm::Args { x: &workspace.down, weight, bias: &bias, y: &workspace.normed };
            recording.add(&problem, args)?;
        }
        let normed_row = rank + normed_latent;
        match &self.weights.query {
            DeviceQuery::Full(proj) => {
                self.linear(recording, tokens, (c.hidden_size, width), hidden, proj, None, &workspace.q)?;
            }
            DeviceQuery::LowRank { b_proj } => {
                let x = Layout { row: normed_row, ..Layout::dense(rank) };
                let dense = matmul::Matmul::linear(tokens, rank, width, false, self.storage);
                let bias = self.kernels.absent();
                let args = matmul::Args { x: &workspace.normed, w: b_proj, bias: &bias, y: &workspace.q };
                recording.add(&matmul::Matmul { x, ..dense }, args)?;
            }
        }
        Ok(match normed_latent {
            0 => Latents { region: &workspace.down, offset: rank, row: down_row },
            _ => Latents { region: &workspace.normed, offset: rank, row: normed_row },
        })
    }

    /// Latents, gated where the configuration says so, and rotary keys of the new tokens into the cache; the queries are rotated
    /// on the way. Returns those latents, before an f16 cache rounds them: [`Attention::as_cached`] has them after.
    fn append<'w>(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        layer: usize,
        step: &Step,
        workspace: &'w Workspace,
        mut latents: Latents<'w>,
    ) -> Result<Latents<'w>> {
        let c = &self.config;
        let rank = c.d_q_latent.unwrap_or(0);
        if let Some(gate) = c.latent_gate() {
            let args = gather::Args {
                table: &self.gate_weights()?.embedding,
                ids: self.ids_of(step)?,
                y: &workspace.gate_rows,
            };
            recording.add(&self.embeddings(gate, step.tokens), args)?;
            self.gate_projection(recording, gate, step.tokens, c.d_latent, workspace)?;
            let none = (&self.kernels.absent(), &self.kernels.absent(), 0);
            let y = &workspace.latent_gated;
            self.apply_gate(recording, gate, (step.tokens, c.d_latent), latents, workspace, none, y)?;
            latents = Latents { region: y, offset: 0, row: c.d_latent };
        }
        let cached = cache.layer(layer)?;
        let problem = cache_append::CacheAppend {
            tokens: step.tokens,
            cache_rows: cache.rows(),
            d_latent: c.d_latent,
            latent_offset: latents.offset,
            latent_row: latents.row,
            d_rope: c.d_rope,
            rope_offset: rank + c.d_latent,
            rope_row: rank + c.d_latent + c.d_rope,
            interleave: Some(c.rope.interleave),
            queries: cache_append::Queries {
                n_head: c.n_head,
                offset: c.d_nope,
                row: c.n_head * c.d_query(),
                head: c.d_query(),
            },
            rope_byte: cached.rope_key.offset,
            storage: cache.options().storage,
        };
        let args = cache_append::Args {
            latent: latents.region,
            rope_key: &workspace.down,
            rotations: &step.rotations,
            slots: &step.slots,
            cache: &cached.whole,
            q: &workspace.q,
        };
        recording.add(&problem, args)?;
        Ok(latents)
    }

    fn ids_of<'a>(&self, step: &'a Step) -> Result<&'a Region> {
        step.token_ids().ok_or(Error::Empty { what: "the list of token ids, which the gate needs," })
    }

    /// [`Attention::new`] has checked that a gate in the configuration has its weights.
    fn gate_weights(&self) -> Result<&DeviceGate> {
        self.weights.gate.as_ref().ok_or(Error::Empty { what: "the gate's weights" })
    }

    /// `gate [rows, width] = gate_b_proj · gate_rows`, the embeddings in the workspace; before its activation.
    fn gate_projection(
        &self,
        recording: &mut Recording,
        config: &GateConfig,
        rows: u32,
        width: u32,
        workspace: &Workspace,
    ) -> Result<()> {
        let weights = self.gate_weights()?;
        let absent = self.kernels.absent();
        let problem = self.padded(rows, config.d_gate, width);
        let args = matmul::Args { x: &workspace.gate_rows, w: &weights.b_proj, bias: &absent, y: &workspace.gate };
        recording.add(&problem, args)
    }

    /// Rows of the gate table.
    fn embeddings(&self, config: &GateConfig, rows: u32) -> gather::Gather {
        gather::Gather {
            rows,
            width: config.d_gate,
            table_row: self.storage.row_pitch(config.d_gate),
            vocab_size: config.vocab_size,
            storage: self.storage,
        }
    }

    /// A product with weights whose rows are padded to 16 bytes.
    fn padded(&self, rows: u32, inner: u32, cols: u32) -> matmul::Matmul {
        let w = Layout { row: self.storage.row_pitch(inner), ..Layout::dense(inner) };
        matmul::Matmul { w, ..matmul::Matmul::linear(rows, inner, cols, false, self.storage) }
    }

    /// `y = Norm(x ⊙ act(gate))`, statistics into `(slots, statistics, rows of it)`.
    #[expect(clippy::too_many_arguments, reason = "sizes and operands of the gate")]
    fn apply_gate(
        &self,
        recording: &mut Recording,
        config: &GateConfig,
        (rows, width): (u32, u32),
        x: Latents<'_>,
        workspace: &Workspace,
        (slots, statistics, statistics_rows): (&Region, &Region, u32),
        y: &Region,
    ) -> Result<()> {
        let weights = self.gate_weights()?;
        let problem = gate::Gate {
            rows,
            width,
            x_offset: x.offset,
            x_row: x.row,
            eps: config.norm_eps as f32,
            activation: config.activation,
            norm: config.norm,
            statistics_rows,
            storage: self.storage,
        };
        let (weight, bias) = (&weights.norm_weight, &weights.norm_bias);
        let args = gate::Args { x: x.region, g: &workspace.gate, weight, bias, slots, y, statistics };
        recording.add(&problem, args)
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
        let rope_cache = &cache.layer(layer)?.rope_key;
        let storage = cache.options().storage;
        let mut first = 0;
        while first < step.rows {
            let rows = workspace.tile_rows.min(step.rows - first);
            // The padding behind the last sequence is never read.
            let used = rows.min(step.used_rows - first);
            let kv = self.rebuild(recording, cache, layer, step, workspace, (first, used))?;
            match step.mode {
                Mode::Prefill => {
                    let problem = attention_prefill::AttentionPrefill {
                        tokens: step.tokens,
                        query_tiles: step.query_tiles,
                        tile_q: step.tile_q,
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
                        weights: self.storage,
                        storage,
                    };
                    let args = attention_prefill::Args {
                        q: &workspace.q,
                        kv,
                        rope_cache,
                        queries: &step.queries,
                        sequences: &step.sequences,
                        values: &workspace.values,
                        softmax: &workspace.softmax,
                    };
                    recording.add(&problem, args)?;
                }
                Mode::Decode => {
                    let problem = attention_decode::AttentionDecode {
                        tokens: step.tokens,
                        most_tokens: step.most_tokens,
                        partials: step.partials,
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
                        kv_storage: Storage::F32,
                    };
                    let args = attention_decode::Args {
                        q: &workspace.q,
                        kv,
                        rope_cache,
                        sequences: &step.decoding,
                        partial_values: &workspace.partial_values,
                        partial_softmax: &workspace.partial_softmax,
                    };
                    recording.add(&problem, args)?;
                }
            }
            first += rows;
        }
        match step.mode {
            Mode::Prefill => Ok(()),
            Mode::Decode => self.combine(recording, step, workspace, c.d_value, &workspace.values),
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
        let absent = self.kernels.absent();
        let gate = c.up_projected_gate();
        let embedding = match gate {
            Some(_) => &self.gate_weights()?.embedding,
            None => &absent,
        };
        let problem = cache_read::CacheRead {
            first_row,
            rows,
            cache_rows: cache.rows(),
            d_latent: c.d_latent,
            n_sequence: step.n_sequence,
            table: gate.map(|gate| cache_read::Table {
                d_gate: gate.d_gate,
                vocab_size: gate.vocab_size,
                storage: self.storage,
            }),
            storage: cache.options().storage,
        };
        recording.add(
            &problem,
            cache_read::Args {
                latent_cache: &cached.latent,
                id_cache: &cache.ids().unwrap_or_else(|| self.kernels.absent()),
                sequences: &step.sequences,
                gate_embedding: embedding,
                latent: &workspace.tile_latent,
                embedding: &workspace.gate_rows,
                slots: &workspace.tile_slots,
            },
        )?;
        let (x, w, y) = (&workspace.tile_latent, &self.weights.kv_b_proj, &workspace.kv);
        recording.add(&self.padded(rows, c.d_latent, c.d_kv()), matmul::Args { x, w, bias: &absent, y })?;
        let Some(gate) = gate else { return Ok(&workspace.kv) };
        self.gate_projection(recording, gate, rows, c.d_kv(), workspace)?;
        let (statistics, statistics_rows) = match &cached.statistics {
            Some(statistics) => (statistics.clone(), cache.rows()),
            None => (self.kernels.absent(), 0),
        };
        let to = (&workspace.tile_slots, &statistics, statistics_rows);
        self.apply_gate(
            recording,
            gate,
            (rows, c.d_kv()),
            Latents { region: &workspace.kv, offset: 0, row: c.d_kv() },
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
        let pitch = self.storage.row_pitch(c.d_latent);
        let head_weights = (c.d_nope + c.d_value) * pitch;
        let latents = Layout { offset: 0, row: c.n_head * c.d_latent, inner: 1, batch: c.d_latent };

        // a[h] = W_K[h]ᵀ q_C[h]
        let absorb = matmul::Matmul {
            rows: step.tokens,
            inner: c.d_nope,
            cols: c.d_latent,
            batch: c.n_head,
            x: Layout { offset: 0, row: c.n_head * c.d_query(), inner: 1, batch: c.d_query() },
            w: Layout { offset: 0, row: 1, inner: pitch, batch: head_weights },
            y: latents,
            bias: false,
            storage: self.storage,
        };
        let (w, bias) = (&self.weights.kv_b_proj, &absent);
        recording.add(&absorb, matmul::Args { x: &workspace.q, w, bias, y: &workspace.absorbed })?;

        let problem = attention_absorbed::AttentionAbsorbed {
            tokens: step.tokens,
            most_tokens: step.most_tokens,
            partials: step.partials,
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
            latent_cache: &cached.latent,
            rope_cache: &cached.rope_key,
            sequences: &step.decoding,
            partial_values: &workspace.partial_values,
            partial_softmax: &workspace.partial_softmax,
        };
        recording.add(&problem, args)?;
        self.combine(recording, step, workspace, c.d_latent, &workspace.combined)?;

        // o[h] = W_V[h] S[h]
        let fold = matmul::Matmul {
            rows: step.tokens,
            inner: c.d_latent,
            cols: c.d_value,
            batch: c.n_head,
            x: latents,
            w: Layout { offset: c.d_nope * pitch, row: pitch, inner: 1, batch: head_weights },
            y: Layout { offset: 0, row: c.n_head * c.d_value, inner: 1, batch: c.d_value },
            bias: false,
            storage: self.storage,
        };
        recording.add(&fold, matmul::Args { x: &workspace.combined, w, bias, y: &workspace.values })
    }

    /// Where the grouped kernels find gate rows, those of the first pass where they are projected.
    fn gate_source(
        &self,
        cache: &LatentCache,
        layer: usize,
        lists: &Lists,
        workspace: &Workspace,
    ) -> Result<GateSource> {
        let storage = cache.options().storage;
        let more = workspace.group_gates.clone();
        let source = match (lists.mode, &self.gate_weights()?.table, &cache.layer(layer)?.pool) {
            (GateRows::Pool { rows }, _, Some(pool)) => {
                GateSource { gates: pool.clone(), resident: rows, storage, more, more_storage: storage }
            }
            (GateRows::Table, Some(table), _) => GateSource {
                gates: table.low.clone(),
                resident: table.rows,
                storage: self.storage,
                more: table.high.clone().unwrap_or_else(|| self.kernels.absent()),
                more_storage: self.storage,
            },
            _ => {
                let gates = self.kernels.absent();
                GateSource { gates, resident: 0, storage, more, more_storage: Storage::F32 }
            }
        };
        Ok(source)
    }

    /// The latents `[tokens, d_latent]` of a step's new tokens with the values that the cache holds, which an f16 cache has rounded:
    /// the statistics of a norm must be those of the keys and values that the latents stand for, as a prefill leaves them.
    fn as_cached<'w>(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        layer: usize,
        step: &Step,
        workspace: &'w Workspace,
        latents: Latents<'w>,
    ) -> Result<Latents<'w>> {
        let (width, storage) = (self.config.d_latent, cache.options().storage);
        if storage == Storage::F32 {
            return Ok(latents);
        }
        let y = &workspace.tile_latent;
        let problem = gather::Gather {
            rows: step.tokens,
            width,
            table_row: storage.row_pitch(width),
            vocab_size: cache.rows(),
            storage,
        };
        let args = gather::Args { table: &cache.layer(layer)?.latent, ids: &step.slots, y };
        recording.add(&problem, args)?;
        Ok(Latents { region: y, offset: 0, row: width })
    }

    /// Attention over the latents with one absorbed query per distinct token id.
    #[expect(clippy::too_many_arguments, reason = "as forward, and what append and the step's plan found")]
    fn attend_grouped(
        &self,
        recording: &mut Recording,
        cache: &LatentCache,
        layer: usize,
        step: &Step,
        workspace: &Workspace,
        latents: Latents<'_>,
        grouped: &Grouped,
    ) -> Result<()> {
        let c = &self.config;
        let (Some(lists), Some(gate)) = (cache.lists(), c.up_projected_gate()) else { return Ok(()) };
        let (cached, table) = (cache.layer(layer)?, Region::from(&lists.buffer));
        let absent = self.kernels.absent();
        let source = self.gate_source(cache, layer, lists, workspace)?;
        let pass_groups = if grouped.projected { lists.pass_groups.min(grouped.groups) } else { grouped.groups };
        let more_rows = |rows: u32| match (lists.mode, grouped.projected) {
            (GateRows::Table, _) => gate.vocab_size - source.resident,
            (_, true) => rows + step.tokens,
            // A row that is not read, so that a pool has one pipeline, whether a step needs others or not.
            (_, false) => 1,
        };
        for pass_index in 0..grouped.passes {
            let first_group = pass_index * pass_groups;
            let groups = pass_groups.min(grouped.groups - first_group);
            if grouped.projected {
                let listed = group_ids::GroupIds {
                    tokens: step.tokens,
                    first_group,
                    groups,
                    n_sequence: step.n_sequence,
                    table: lists.table,
                    list_words: lists.words,
                };
                let args = group_ids::Args {
                    token_ids: self.ids_of(step)?,
                    token_rows: &step.token_rows,
                    lists: &table,
                    ids: &workspace.group_ids,
                };
                // With one pass the list is the same for every layer.
                if grouped.passes > 1 || recording.once((step.identity(), workspace.identity())) {
                    recording.add(&listed, args)?;
                }
                self.project_rows(recording, gate, groups + step.tokens, &source, workspace)?;
            }
            if pass_index == 0 && gate.norm != GateNorm::None {
                let latents = self.as_cached(recording, cache, layer, step, workspace, latents)?;
                let problem = matmul::Matmul {
                    x: Layout { offset: latents.offset, row: latents.row, ..Layout::dense(c.d_latent) },
                    ..self.padded(step.tokens, c.d_latent, c.d_kv())
                };
                let args =
                    matmul::Args { x: latents.region, w: &self.weights.kv_b_proj, bias: &absent, y: &workspace.kv };
                recording.add(&problem, args)?;
                let problem = gate_statistics::GateStatistics {
                    tokens: step.tokens,
                    width: c.d_kv(),
                    resident: source.resident,
                    more: more_rows(groups),
                    more_first: groups,
                    cache_rows: cache.rows(),
                    eps: gate.norm_eps as f32,
                    activation: gate.activation,
                    norm: gate.norm,
                    storage: source.storage,
                    more_storage: source.more_storage,
                };
                let args = gate_statistics::Args {
                    kv: &workspace.kv,
                    gates: &source.gates,
                    gates_more: &source.more,
                    rows: &step.token_rows,
                    slots: &step.slots,
                    statistics: cached.statistics.as_ref().unwrap_or(&absent),
                };
                recording.add(&problem, args)?;
            }
            let problem = attention_grouped::AttentionGrouped {
                tokens: step.tokens,
                most_tokens: step.most_tokens,
                n_sequence: step.n_sequence,
                entries: grouped.entries,
                partials: grouped.partials,
                n_head: c.n_head,
                widths: widths(c),
                tiling: grouped.tiling,
                table: lists.table,
                list_words: lists.words,
                cache_rows: cache.rows(),
                rope_byte: cached.rope_key.offset,
                statistics_byte: cached.statistics.as_ref().map_or(0, |statistics| statistics.offset),
                resident: source.resident,
                gates_storage: source.storage,
                more: more_rows(groups),
                more_storage: source.more_storage,
                first_group,
                groups,
                pass_index,
                passes: grouped.passes,
                activation: gate.activation,
                norm: gate.norm,
                scale: c.scale() as f32,
                expected_groups: grouped.expected_groups,
                expected_positions: step.expected_positions,
                cache_storage: cache.options().storage,
                storage: self.storage,
            };
            let args = attention_grouped::Args {
                q: &workspace.q,
                kv_b_proj: &self.weights.kv_b_proj,
                affine: &self.gate_weights()?.affine,
                gates: &source.gates,
                gates_more: &source.more,
                cache: &cached.whole,
                lists: &table,
                partial: &workspace.grouped,
            };
            recording.add(&problem, args)?;
        }
        let softmax = 4 * attention_grouped::softmax_word(grouped.partials, c.n_head, c.d_value);
        let partial = &workspace.grouped;
        let problem = attention_combine::AttentionCombine {
            tokens: step.tokens,
            n_head: c.n_head,
            width: c.d_value,
            splits: grouped.partials,
        };
        let args = attention_combine::Args {
            partial_values: &Region::new(&partial.buffer, 0, softmax),
            partial_softmax: &Region::new(&partial.buffer, softmax, partial.size.saturating_sub(softmax)),
            ranges: &step.grouped_ranges,
            values: &workspace.values,
            lse: &workspace.lse,
        };
        recording.add(&problem, args)
    }

    /// Gate rows of the ids that a pass has listed, into the workspace.
    fn project_rows(
        &self,
        recording: &mut Recording,
        gate: &GateConfig,
        rows: u32,
        source: &GateSource,
        workspace: &Workspace,
    ) -> Result<()> {
        let weights = self.gate_weights()?;
        let absent = self.kernels.absent();
        let d_kv = self.config.d_kv();
        if source.resident == 0 {
            // All of them: the matrix product is the faster one.
            let args =
                gather::Args { table: &weights.embedding, ids: &workspace.group_ids, y: &workspace.group_embeddings };
            recording.add(&self.embeddings(gate, rows), args)?;
            let y = Layout { row: source.more_storage.row_pitch(d_kv), ..Layout::dense(d_kv) };
            let problem = matmul::Matmul { y, ..self.padded(rows, gate.d_gate, d_kv) };
            let args = matmul::Args {
                x: &workspace.group_embeddings,
                w: &weights.b_proj,
                bias: &absent,
                y: &workspace.group_gates,
            };
            return recording.add(&problem, args);
        }
        let problem = gate_project::GateProject {
            rows,
            width: d_kv,
            d_gate: gate.d_gate,
            vocab_size: gate.vocab_size,
            first_id: 0,
            ids: true,
            targets: false,
            y_rows: rows,
            storage: self.storage,
            y_storage: source.more_storage,
        };
        let args = gate_project::Args {
            gate_embedding: &weights.embedding,
            gate_b_proj: &weights.b_proj,
            ids: &workspace.group_ids,
            targets: &absent,
            y: &workspace.group_gates,
        };
        recording.add(&problem, args)
    }

    fn combine(
        &self,
        recording: &mut Recording,
        step: &Step,
        workspace: &Workspace,
        width: u32,
        values: &Region,
    ) -> Result<()> {
        let (tokens, n_head) = (step.tokens, self.config.n_head);
        let problem = attention_combine::AttentionCombine { tokens, n_head, width, splits: step.partials };
        let args = attention_combine::Args {
            partial_values: &workspace.partial_values,
            partial_softmax: &workspace.partial_softmax,
            ranges: &step.ranges,
            values,
            lse: &workspace.lse,
        };
        recording.add(&problem, args)
    }
}

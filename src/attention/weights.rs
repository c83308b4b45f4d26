//! Weights in device memory: every width padded with zeros, rotary pairs side by side.

use half::f16;

use super::widths::{Widths, gated_segments};
use crate::adapter::PlanContext;
use crate::config::{AttentionConfig, GateConfig, GateSite, TIED_NORM_EPS};
use crate::device::{Kernels, Region};
use crate::error::{Error, Result, TensorError};
use crate::kernels::attention_grouped::beta_element;
use crate::kernels::matmul::{self, Layout, Matmul};
use crate::recording::Recording;
use crate::storage::{Storage, UNIT, padded_width, product};
use crate::weights::{AttentionWeights, HostTensor, QueryWeights, TOKEN_EMBEDDING, same_tensors};

/// Elements of a tensor that stay together in device memory.
#[derive(Debug, Clone, Copy)]
struct Run {
    to: u32,
    from: u32,
    len: u32,
}

/// Placement of a tensor's weight rows, or of its columns, in device memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Axis {
    runs: Vec<Run>,
    /// Extent of the tensor.
    from: u32,
    /// Extent in device memory.
    to: u32,
}

impl Axis {
    /// All of them, one after another, without padding.
    pub fn whole(extent: u32) -> Self {
        Axis { runs: vec![Run { to: 0, from: 0, len: extent }], from: extent, to: extent }
    }

    /// One padded part.
    pub fn padded(extent: u32) -> Self {
        Axis::default().part(extent)
    }

    /// A further padded part.
    pub fn part(mut self, extent: u32) -> Self {
        self.runs.push(Run { to: self.to, from: self.from, len: extent });
        self.end_part(extent)
    }

    /// A further padded part of rotary elements. Shaders rotate the pairs (2i, 2i+1): pairs half a part apart are moved
    /// together.
    pub fn rotary(mut self, extent: u32, interleave: bool) -> Self {
        if interleave {
            return self.part(extent);
        }
        let half = extent / 2;
        let pairs = (0..half).flat_map(|pair| [(2 * pair, pair), (2 * pair + 1, half + pair)]);
        self.runs.extend(pairs.map(|(to, from)| Run { to: self.to + to, from: self.from + from, len: 1 }));
        self.end_part(extent)
    }

    fn end_part(mut self, extent: u32) -> Self {
        self.from += extent;
        self.to += padded_width(extent);
        self
    }

    /// The parts of every head.
    pub fn heads(n_head: u32, part: impl Fn(Self) -> Self) -> Self {
        (0..n_head).fold(Axis::default(), |axis, _| part(axis))
    }

    /// Those of `count` elements of device memory from `first` on.
    fn range(&self, first: u32, count: u32) -> Self {
        let within = |run: &Run| {
            let begin = run.to.max(first);
            let end = (run.to + run.len).min(first + count);
            (begin < end).then(|| Run { to: begin - first, from: run.from + (begin - run.to), len: end - begin })
        };
        Axis { runs: self.runs.iter().filter_map(within).collect(), from: self.from, to: count }
    }

    /// Target and source of each element.
    fn elements(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.runs.iter().flat_map(|run| (0..run.len).map(|i| (run.to + i, run.from + i)))
    }
}

/// A tensor and its placement: `[rows, cols]`; a vector is `[1, cols]`.
#[derive(Debug)]
struct Placed<'a> {
    tensor: &'a HostTensor,
    rows: Axis,
    cols: Axis,
    scale: Scale,
}

/// What the elements of a tensor are multiplied by, in f64 before they are rounded to the storage.
#[derive(Debug, Clone, Copy)]
enum Scale {
    /// One number.
    By(f64),
    /// Each row by the reciprocal of its root mean square, as the rows of a token embedding that a tied gate reads.
    Normed,
}

impl Scale {
    /// The factor of a row of the tensor.
    fn of(self, row: &[f32]) -> f64 {
        match self {
            Scale::By(factor) => factor,
            Scale::Normed => {
                let squares: f64 = row.iter().map(|&value| f64::from(value).powi(2)).sum();
                (squares / row.len().max(1) as f64 + TIED_NORM_EPS).sqrt().recip()
            }
        }
    }
}

impl Placed<'_> {
    fn elements(&self) -> u64 {
        product(&[self.rows.to, self.cols.to])
    }

    /// Hands each row on as it is stored, with its first byte; warns of weights that f16 makes zero.
    fn write(&self, storage: Storage, mut row_at: impl FnMut(usize, &[u8])) -> Result<()> {
        let Placed { tensor, rows, cols, scale } = self;
        let mut zeros = 0;
        let size = storage.bytes() as usize;
        // The padding of every row is in the same place.
        let mut row = vec![0; cols.to as usize * size];
        let width = cols.from as usize;
        for (to_row, from_row) in rows.elements() {
            let factor = scale.of(&tensor.data[from_row as usize * width..][..width]);
            for run in &cols.runs {
                let from = from_row as usize * width + run.from as usize;
                let to = &mut row[run.to as usize * size..][..run.len as usize * size];
                zeros += write_elements(tensor, (from, run.len as usize), factor, storage, to)?;
            }
            row_at(to_row as usize * row.len(), &row);
        }
        if zeros > 0 {
            let (name, of) = (&tensor.name, tensor.data.len());
            tracing::warn!("tensor `{name}`: {zeros} of {of} weights are too small for f16 storage and become 0");
        }
        Ok(())
    }
}

/// Writes so many elements of a tensor, from one on, times a factor; counts those that become 0.
fn write_elements(
    tensor: &HostTensor,
    (from, count): (usize, usize),
    factor: f64,
    storage: Storage,
    to: &mut [u8],
) -> Result<usize> {
    let values = &tensor.data[from..][..count];
    let scaled = |value: f32| factor * f64::from(value);
    let mut zeros = 0;
    match storage {
        Storage::F32 if factor == 1.0 => to.copy_from_slice(bytemuck::cast_slice(values)),
        Storage::F32 => {
            for (&value, to) in values.iter().zip(to.chunks_exact_mut(4)) {
                to.copy_from_slice(&(scaled(value) as f32).to_le_bytes());
            }
        }
        Storage::F16 => {
            for (index, (&value, to)) in values.iter().zip(to.chunks_exact_mut(2)).enumerate() {
                // The first is the faster one.
                let half = if factor == 1.0 { f16::from_f32(value) } else { f16::from_f64(scaled(value)) };
                if value.is_finite() && !half.is_finite() {
                    return Err(Error::Tensor(TensorError::OutOfF16Range {
                        name: tensor.name.clone(),
                        index: from + index,
                        value: scaled(value) as f32,
                    }));
                }
                zeros += usize::from(value != 0.0 && half == f16::ZERO);
                to.copy_from_slice(&half.to_le_bytes());
            }
        }
    }
    Ok(zeros)
}

/// Tensors in one buffer.
#[derive(Debug)]
pub(crate) struct Upload<'a> {
    /// Each with its first element.
    parts: Vec<(u64, Placed<'a>)>,
    elements: u64,
    /// Where they are on the device already.
    done: Option<Region>,
}

impl<'a> Upload<'a> {
    /// `[rows, cols]`
    pub fn matrix(tensor: &'a HostTensor, rows: Axis, cols: Axis) -> Self {
        let placed = Placed { tensor, rows, cols, scale: Scale::By(1.0) };
        Upload { elements: placed.elements(), parts: vec![(0, placed)], done: None }
    }

    /// `[vocab, hidden]`, the token embedding as tied gates read it: each row over its root mean square.
    fn tied_embedding(tensor: &'a HostTensor, gate: &GateConfig) -> Self {
        let mut upload = Upload::matrix(tensor, Axis::whole(gate.vocab_size), Axis::padded(gate.d_gate));
        upload.parts.iter_mut().for_each(|(_, placed)| placed.scale = Scale::Normed);
        upload
    }

    /// `[cols]`
    pub fn vector(tensor: &'a HostTensor, cols: Axis) -> Self {
        Upload::matrix(tensor, Axis::whole(1), cols)
    }

    /// The same with every element times a factor.
    pub fn times(mut self, factor: f64) -> Self {
        self.parts.iter_mut().for_each(|(_, placed)| placed.scale = Scale::By(factor));
        self
    }

    /// Elements that no tensor fills: zeros.
    fn blank(elements: u32) -> Self {
        Upload { elements: elements.into(), parts: Vec::new(), done: None }
    }

    /// A buffer that was uploaded before.
    fn done(region: &Region) -> Self {
        Upload { elements: 0, parts: Vec::new(), done: Some(region.clone()) }
    }

    /// The same with further tensors behind these.
    pub fn and(self, next: Self) -> Self {
        let at = self.elements;
        self.and_at(at, next)
    }

    /// The same with further tensors from an element on.
    fn and_at(mut self, at: u64, next: Self) -> Self {
        self.elements = at + next.elements;
        self.parts.extend(next.parts.into_iter().map(|(first, placed)| (at + first, placed)));
        self
    }

    fn names(&self) -> String {
        self.parts.iter().map(|(_, placed)| format!("`{}`", placed.tensor.name)).collect::<Vec<_>>().join(", ")
    }

    /// Refuses a buffer over the limit of one binding.
    ///
    /// # Errors
    /// [`Error::Limit`] with the bytes needed and the bytes allowed.
    pub fn check(&self, context: &PlanContext, storage: Storage) -> Result<()> {
        context.check_binding(storage.tensor_bytes(self.elements), || {
            let tensors = if self.parts.len() == 1 { "tensor" } else { "tensors" };
            format!("{tensors} {} in {}", self.names(), storage.name())
        })
    }

    /// Uploads them as f32 or f16.
    ///
    /// # Errors
    /// `TensorError::OutOfF16Range` when f16 would turn a finite weight into infinity; [`Error::Limit`] over one binding; what the
    /// allocation refuses.
    pub fn upload(&self, kernels: &Kernels, storage: Storage) -> Result<Region> {
        if let Some(region) = &self.done {
            return Ok(region.clone());
        }
        self.check(kernels.context(), storage)?;
        let bytes = storage.tensor_bytes(self.elements);
        Ok(Region::from(&kernels.upload_parts(&self.names(), bytes, |write| self.write(storage, write))?))
    }

    /// Hands the buffer on row by row, each with its first byte; all between is 0.
    fn write(&self, storage: Storage, row_at: &mut dyn FnMut(usize, &[u8])) -> Result<()> {
        for (first, placed) in &self.parts {
            let first = storage.sized(*first) as usize;
            placed.write(storage, |at, row| row_at(first + at, row))?;
        }
        Ok(())
    }

    /// The bytes of the buffer.
    ///
    /// # Errors
    /// `TensorError::OutOfF16Range` when f16 would turn a finite element into infinity.
    #[cfg(any(test, feature = "check"))]
    pub fn stored(&self, storage: Storage) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; storage.tensor_bytes(self.elements) as usize];
        self.write(storage, &mut |at, row| bytes[at..][..row.len()].copy_from_slice(row))?;
        Ok(bytes)
    }
}

/// Rows of a matrix that one binding holds: columns `[first, first + columns)` of its product.
#[derive(Debug, Clone)]
pub(crate) struct Shard<T> {
    pub first: u32,
    pub columns: u32,
    pub proj: T,
    pub bias: Option<T>,
}

impl<T> Shard<T> {
    /// The same rows with every tensor mapped.
    pub fn map<U>(&self, of: impl Fn(&T) -> Result<U>) -> Result<Shard<U>> {
        let bias = self.bias.as_ref().map(&of).transpose()?;
        Ok(Shard { first: self.first, columns: self.columns, proj: of(&self.proj)?, bias })
    }
}

impl Shard<Region> {
    /// The product of rows with a whole matrix: `op` is that of all its columns.
    ///
    /// # Errors
    /// As [`Recording::add_own`].
    pub fn product(shards: &[Self], recording: &mut Recording, op: &Matmul, x: &Region, y: &Region) -> Result<()> {
        let absent = recording.kernels().absent();
        for Shard { first, columns, proj, bias } in shards {
            // The caller's rows may end before the padding.
            let cols = (*columns).min(op.cols.saturating_sub(*first));
            let to = Layout { offset: op.y.offset + first, ..op.y };
            let op = Matmul { cols, y: to, bias: bias.is_some(), ..*op };
            recording.add_own(&op, matmul::Args { x, w: proj, bias: bias.as_ref().unwrap_or(&absent), y })?;
        }
        Ok(())
    }

    /// The only shard of a matrix that one binding holds.
    pub fn sole(shards: &[Self]) -> Option<&Self> {
        match shards {
            [whole] => Some(whole),
            _ => None,
        }
    }
}

impl<'a> Shard<Upload<'a>> {
    /// A matrix with its bias in the fewest shards; its product's columns begin at `first`.
    pub fn all(
        context: &PlanContext,
        storage: Storage,
        first: u32,
        (proj, bias): (&'a HostTensor, Option<&'a HostTensor>),
        [rows, cols]: [Axis; 2],
    ) -> Vec<Self> {
        let most = context.largest_binding() / storage.tensor_bytes(cols.to.into()).max(1);
        // Whole loads of the product between shards; a row over the limit is refused when it is checked.
        let most = if most >= rows.to.into() { rows.to } else { most as u32 / UNIT * UNIT }.max(UNIT);
        let shards = (0..rows.to).step_by(most as usize).map(|at| {
            let rows = rows.range(at, most.min(rows.to - at));
            Shard {
                first: first + at,
                columns: rows.to,
                bias: bias.map(|bias| Upload::vector(bias, rows.clone())),
                proj: Upload::matrix(proj, rows, cols.clone()),
            }
        });
        shards.collect()
    }

    /// Products of the same rows: as one, where a binding holds all their weights.
    pub fn fused(context: &PlanContext, storage: Storage, all: Vec<Self>) -> Vec<Self> {
        let elements = all.iter().map(|shard| shard.proj.elements).sum();
        let fits = storage.tensor_bytes(elements) <= context.largest_binding();
        if fits { all.into_iter().reduce(Shard::and).into_iter().collect() } else { all }
    }

    /// This one and the next as one product.
    fn and(self, next: Self) -> Self {
        let biased = self.bias.is_some() || next.bias.is_some();
        let bias = self.bias.unwrap_or_else(|| Upload::blank(self.columns));
        let bias = bias.and(next.bias.unwrap_or_else(|| Upload::blank(next.columns)));
        Shard {
            first: self.first,
            columns: self.columns + next.columns,
            proj: self.proj.and(next.proj),
            bias: biased.then_some(bias),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct GateWeights<T> {
    pub embedding: T,
    pub b_proj: T,
    /// γ of the norm of a gate at `up_projected`, then at [`beta_element`] its β, where there is one.
    pub affine: Option<T>,
}

/// From the latent of a query to its heads.
#[derive(Debug, Clone)]
pub(super) struct LowRank<T> {
    /// First element of `q_a_layernorm` in the norms, at a binding's alignment in either storage.
    pub norm: u32,
    /// `q_b_proj`
    pub proj: Vec<Shard<T>>,
}

/// The weights of a layer: uploads to make, then regions of device memory.
#[derive(Debug, Clone)]
pub(super) struct LayerWeights<T> {
    /// To `[queries or their latent, latent, rotary key]` of every new token: `q_proj`, or `q_a_proj` of a low-rank query, and
    /// `kv_a_proj_with_mqa`, fused if one binding holds both.
    pub down: Vec<Shard<T>>,
    /// Of a low-rank query.
    pub query: Option<LowRank<T>>,
    /// `kv_a_layernorm`, then γ and β of the norm of a gate at `latent`, then `q_a_layernorm`, those that there are.
    pub norms: Option<T>,
    pub has_kv_a_norm: bool,
    pub kv_b_proj: T,
    pub o_proj: Vec<Shard<T>>,
    pub gate: Option<GateWeights<T>>,
}

impl<T> LayerWeights<T> {
    /// The same layer with every tensor mapped.
    fn map<U>(&self, of: impl Fn(&T) -> Result<U>) -> Result<LayerWeights<U>> {
        let optional = |part: &Option<T>| part.as_ref().map(&of).transpose();
        let shards = |all: &[Shard<T>]| all.iter().map(|shard| shard.map(&of)).collect::<Result<Vec<_>>>();
        let gate = self.gate.as_ref().map(|GateWeights { embedding, b_proj, affine }| -> Result<_> {
            Ok(GateWeights { embedding: of(embedding)?, b_proj: of(b_proj)?, affine: optional(affine)? })
        });
        let query = self
            .query
            .as_ref()
            .map(|LowRank { norm, proj }| -> Result<_> { Ok(LowRank { norm: *norm, proj: shards(proj)? }) });
        Ok(LayerWeights {
            down: shards(&self.down)?,
            query: query.transpose()?,
            norms: optional(&self.norms)?,
            has_kv_a_norm: self.has_kv_a_norm,
            kv_b_proj: of(&self.kv_b_proj)?,
            o_proj: shards(&self.o_proj)?,
            gate: gate.transpose()?,
        })
    }
}

impl<'a> LayerWeights<Upload<'a>> {
    /// Placement of each tensor; the weights have been checked against the configuration. `tied`: the embedding of a tied gate, where
    /// the weights are without it.
    ///
    /// # Errors
    /// [`Error::Limit`] of the first tensor over the limit of a binding; `TensorError::Missing` for the embedding of a tied gate.
    pub fn plan(
        context: &PlanContext,
        config: &AttentionConfig,
        weights: &'a AttentionWeights,
        tied: Option<&Region>,
        storage: Storage,
    ) -> Result<Self> {
        let widths = Widths::of(config)?;
        let (n_head, interleave) = (config.n_head, config.rope.interleave);
        let hidden = || Axis::padded(config.hidden_size);
        let rank = || Axis::padded(config.d_q_latent.unwrap_or(0));
        let latent = || Axis::padded(config.d_latent);
        let kv_a = || latent().rotary(config.d_rope, interleave);
        let queries = Axis::heads(n_head, |axis| axis.part(config.d_nope).rotary(config.d_rope, interleave));
        let keys_and_values = Axis::heads(n_head, |axis| axis.part(config.d_nope).part(config.d_value));
        let (matrix, vector) = (Upload::matrix, Upload::vector);
        let shards = |first: u32, proj, bias: &'a Option<HostTensor>, axes| {
            Shard::all(context, storage, first, (proj, bias.as_ref()), axes)
        };
        let of_gate = weights.gate.as_ref().filter(|_| config.latent_gate().is_some());
        let affine = of_gate.map(|gate| [&gate.norm_weight, &gate.norm_bias]);
        let kv_a_norm = weights.kv_a_norm.iter().map(|norm| vector(norm, latent()).times(config.latent_factor));
        let affine = affine.into_iter().flatten().flatten().map(|norm| vector(norm, latent()));
        let mut norms = kv_a_norm.chain(affine).reduce(Upload::and);
        let (mut down, query) = match &weights.query {
            QueryWeights::Full { proj, bias } => (shards(0, proj, bias, [queries, hidden()]), None),
            QueryWeights::LowRank { a_proj, a_bias, a_norm, b_proj } => {
                // Up to three of the latent, whose width is below 2^29.
                let norm = beta_element(norms.as_ref().map_or(0, |norms| norms.elements as u32));
                let before = norms.take().unwrap_or_else(|| Upload::blank(0));
                norms = Some(before.and_at(norm.into(), vector(a_norm, rank())));
                let query = LowRank { norm, proj: shards(0, b_proj, &None, [queries, rank()]) };
                (shards(0, a_proj, a_bias, [rank(), hidden()]), Some(query))
            }
        };
        down.extend(shards(widths.query_down(), &weights.kv_a_proj, &weights.kv_a_bias, [kv_a(), hidden()]));
        let gate = weights.gate.as_ref().zip(config.gate.as_ref()).map(|(gate, of)| -> Result<_> {
            let segments = gated_segments(config, of);
            let [first, second] = segments.parts;
            let width = || Axis::heads(segments.count, |axis| axis.part(first).part(second));
            let beta = beta_element(segments.width());
            let up_projected = gate.norm_weight.as_ref().filter(|_| of.site == GateSite::UpProjected);
            let affine = up_projected.map(|weight| match &gate.norm_bias {
                None => vector(weight, width()),
                Some(bias) => vector(weight, width()).and_at(beta.into(), vector(bias, width())),
            });
            let embedding = match (tied, &gate.embedding) {
                (Some(region), _) => Upload::done(region),
                (None, Some(embedding)) if of.tied => Upload::tied_embedding(embedding, of),
                (None, Some(embedding)) => matrix(embedding, Axis::whole(of.vocab_size), Axis::padded(of.d_gate)),
                (None, None) => {
                    let expected = [of.vocab_size, of.d_gate].map(|extent| extent as usize).to_vec();
                    return Err(Error::Tensor(TensorError::Missing { name: TOKEN_EMBEDDING.to_owned(), expected }));
                }
            };
            Ok(GateWeights { embedding, b_proj: matrix(&gate.b_proj, width(), Axis::padded(of.d_gate)), affine })
        });
        let values = Axis::heads(n_head, |axis| axis.part(config.d_value));
        let planned = LayerWeights {
            down: Shard::fused(context, storage, down),
            query,
            norms,
            has_kv_a_norm: weights.kv_a_norm.is_some(),
            kv_b_proj: matrix(&weights.kv_b_proj, keys_and_values, latent()),
            o_proj: shards(0, &weights.o_proj, &weights.o_bias, [hidden(), values]),
            gate: gate.transpose()?,
        };
        planned.map(|upload| upload.check(context, storage)).map(|_| planned)
    }
}

/// Checks every tensor against a device's limits, before any is allocated.
///
/// # Errors
/// [`Error::Limit`] of the first tensor over a limit.
#[cfg(feature = "decoder")]
pub(crate) fn check_weights(
    context: &PlanContext,
    config: &AttentionConfig,
    weights: &AttentionWeights,
    storage: Storage,
) -> Result<()> {
    LayerWeights::plan(context, config, weights, None, storage).map(drop)
}

impl LayerWeights<Region> {
    /// Uploads a layer's weights, which have been checked against the configuration.
    ///
    /// # Errors
    /// As [`LayerWeights::plan`], before anything is allocated; a weight beyond f16; what the allocation refuses.
    pub fn upload(
        kernels: &Kernels,
        config: &AttentionConfig,
        weights: &AttentionWeights,
        tied: Option<&Region>,
        storage: Storage,
    ) -> Result<Self> {
        let planned = LayerWeights::plan(kernels.context(), config, weights, tied, storage)?;
        planned.map(|upload| upload.upload(kernels, storage))
    }
}

/// A model's token embedding as tied gates read it, in device memory: every row over its root mean square. Every layer of a model
/// takes the same one; cloning clones a handle, not the memory.
#[derive(Debug, Clone)]
pub struct TiedEmbedding {
    kernels: Kernels,
    region: Region,
    /// Vocabulary and width.
    extents: [u32; 2],
    storage: Storage,
}

impl TiedEmbedding {
    /// Uploads the embedding `[vocab, hidden]` of a model whose layers have this configuration. Rows are normed in f64, and rounded
    /// once to `storage`, which is the layers'.
    ///
    /// # Errors
    /// A configuration that contradicts itself or has no tied gate; an embedding of another shape; [`Error::Limit`] for one that
    /// no binding holds; no memory left, or a lost device.
    pub fn new(kernels: &Kernels, config: &AttentionConfig, embedding: &HostTensor, storage: Storage) -> Result<Self> {
        config.validate()?;
        let gate = config.gate.as_ref().filter(|gate| gate.tied);
        let gate = gate.ok_or_else(|| Error::config("embedding_gate", "is not tied to the token embedding"))?;
        let extents = [gate.vocab_size, gate.d_gate];
        same_tensors(&[Some(embedding)], &[Some(&HostTensor::outline(TOKEN_EMBEDDING, &extents)?)])?;
        let region = Upload::tied_embedding(embedding, gate).upload(kernels, storage)?;
        Ok(TiedEmbedding { kernels: kernels.clone(), region, extents, storage })
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.region.size
    }

    /// The region, for a layer that it fits.
    ///
    /// # Errors
    /// A layer of another device, without a tied gate, of another vocabulary or width, or in another storage.
    pub(super) fn of_layer(&self, kernels: &Kernels, config: &AttentionConfig, storage: Storage) -> Result<&Region> {
        kernels.same_device(&self.kernels, "the tied embedding", "layer")?;
        let fits = |gate: &GateConfig| gate.tied && [gate.vocab_size, gate.d_gate] == self.extents;
        if !config.gate.as_ref().is_some_and(fits) || storage != self.storage {
            let ([vocab, width], name) = (self.extents, self.storage.name());
            let problem = format!("does not fit the tied embedding of {vocab} rows of {width} in {name}");
            return Err(Error::config("embedding_gate", problem));
        }
        Ok(&self.region)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn weights_that_f16_makes_zero_are_counted() {
        let tensor = HostTensor { name: "w".to_owned(), shape: vec![5], data: vec![] };
        // Half of the smallest number of f16, 2^-24, rounds to 0; a bit more does not.
        let values = [0.0, -0.0, 2f32.powi(-25), -1e-20, 2f32.powi(-25) * 1.001];
        let tensor = HostTensor { data: values.to_vec(), ..tensor };
        assert_eq!(write_elements(&tensor, (0, 5), 1.0, Storage::F16, &mut [0; 10]).unwrap(), 2);
        assert_eq!(write_elements(&tensor, (0, 5), 1.0, Storage::F32, &mut [0; 20]).unwrap(), 0);
    }

    fn placed(rows: Axis, cols: Axis, storage: Storage) -> Result<Vec<u8>> {
        let shape = vec![rows.from as usize, cols.from as usize];
        let data = (1..=shape.iter().product::<usize>()).map(|i| i as f32).collect();
        let tensor = HostTensor { name: "w".to_owned(), shape, data };
        Upload::matrix(&tensor, rows, cols).stored(storage)
    }

    #[test]
    fn every_part_is_padded_and_rotary_pairs_come_together() -> Result<()> {
        let heads = Axis::heads(2, |axis| axis.part(3).rotary(4, false));
        let bytes = placed(heads, Axis::padded(1), Storage::F32)?;
        let rows: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
        let column: Vec<f32> = rows.chunks(8).map(|row| row[0]).collect();
        assert!(rows.iter().enumerate().all(|(i, &value)| i % 8 == 0 || value == 0.0));
        // Three content rows, five of padding; pairs (4, 6) and (5, 7), four of padding; then the second head.
        let head = |first: f32| {
            let [a, b, c] = [first, first + 1.0, first + 2.0];
            [a, b, c, 0.0, 0.0, 0.0, 0.0, 0.0, first + 3.0, first + 5.0, first + 4.0, first + 6.0, 0.0, 0.0, 0.0, 0.0]
        };
        assert_eq!(column, [head(1.0), head(8.0)].concat());
        // Neighbouring pairs stay where they are.
        let bytes = placed(Axis::default().rotary(4, true), Axis::whole(1), Storage::F16)?;
        let halves: Vec<f32> = bytes.chunks(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
        assert_eq!(halves, [1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]);
        Ok(())
    }

    #[test]
    fn what_f16_does_not_hold_is_named_by_its_place_in_the_checkpoint() {
        let mut data = vec![0.0; 6];
        data[4] = 1e6;
        let tensor = HostTensor { name: "w".to_owned(), shape: vec![2, 3], data };
        let error = Upload::matrix(&tensor, Axis::whole(2), Axis::padded(3)).stored(Storage::F16).unwrap_err();
        assert!(matches!(error, Error::Tensor(TensorError::OutOfF16Range { index: 4, .. })), "{error}");
    }
}

//! The bench rows: ids, sizes, buffers and recordings.

use std::collections::HashSet;
use std::rc::Rc;

use super::{Prepared, Row, Suite, tokens};
use crate::attention::{
    Attention, AttentionOptions, CacheOptions, DecodePath, GateRows, LatentCache, Mode, StepTokens, cost,
};
use crate::check::pack;
use crate::config::{Activation, AttentionConfig, GateConfig, GateNorm, GateSite, RopeConfig};
use crate::cost::Cost;
use crate::device::{Kernels, Region};
use crate::error::{ArgumentError, Error, Result};
use crate::kernels::attention_decode::{DecodeSequence, SPLIT, split_length};
use crate::kernels::attention_prefill::{QueryTile, slices, tile_q};
use crate::kernels::cache_read::SequenceRow;
use crate::kernels::{
    attention_absorbed, attention_combine, attention_decode, attention_prefill, cache_append, gate, matmul, norm, rope,
};
use crate::op::Op as _;
use crate::random::{Random, attention_weights};
use crate::recording::Recording;
use crate::reference::{self, Heads};
use crate::storage::{Segments, Storage};

/// Seed of every row's inputs.
const SEED: u64 = 20;

/// The work of a bench row.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Work {
    /// A dense product.
    Matmul { rows: u32, inner: u32, cols: u32, storage: Storage },
    /// RMSNorm of rows.
    Norm { rows: u32, width: u32 },
    /// Gate and LayerNorm of rows.
    Gate { rows: u32, width: u32 },
    /// Latents, rotary keys and ids into a cache.
    Append { tokens: u32, d_latent: u32, d_rope: u32 },
    /// Causal attention alone, keys and values as they come.
    PrefillAttention { tokens: u32, n_head: u32, d_head: u32, storage: Storage },
    /// Absorbed attention alone, one query token of each sequence.
    AbsorbedAttention { batch: u32, cached: u32, n_head: u32, d_latent: u32, d_rope: u32, storage: Storage },
    /// Attention of one query token alone, groups of query heads over the same keys and values, in f16.
    GroupedHeads { cached: u32, n_head: u32, n_kv_head: u32, d_head: u32 },
    /// The partial results of one query token of each sequence, combined.
    Combine { batch: u32, each: u32, n_head: u32, width: u32 },
    /// A layer's prefill without a past.
    PrefillLayer { config: AttentionConfig, tokens: u32 },
    /// One new token through a layer of multi-head attention.
    DecodeHeads { cached: u32, n_head: u32, d_head: u32 },
    /// One new token through a layer.
    DecodeLayer { config: AttentionConfig, cached: u32, path: LayerPath },
    /// A row of tests, whose results are no numbers.
    #[cfg(test)]
    Wrong,
}

/// The decode path of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LayerPath {
    /// Keys and values rebuilt.
    Expanded,
    /// Over the latents, no gate between them and the keys.
    Absorbed,
    /// Over the latents, grouped by token id.
    Grouped(GateRows),
}

/// The 120M layer of arXiv 2509.16686: 12 heads, 64 + 64 + 64 (content, rotary, value), with the gate's table of 256 over
/// 50 304 ids where it is gated.
pub fn paper_120m(d_latent: u32, gated: bool) -> AttentionConfig {
    layer(12, d_latent, gated)
}

fn layer(n_head: u32, d_latent: u32, gated: bool) -> AttentionConfig {
    let gate = GateConfig {
        vocab_size: tokens::VOCABULARY,
        d_gate: 256,
        tied: false,
        site: GateSite::UpProjected,
        activation: Activation::default(),
        norm: GateNorm::default(),
        norm_eps: 1e-5,
    };
    AttentionConfig {
        hidden_size: 64 * n_head,
        n_head,
        d_latent,
        d_nope: 64,
        d_rope: 64,
        d_value: 64,
        gate: gated.then_some(gate),
        ..AttentionConfig::default()
    }
}

/// Every row.
pub fn rows() -> Vec<Row> {
    let mut all = Vec::new();
    let mut add = |id: String, path, storage, suite, work| all.push(Row { id, path, storage, suite, work });
    let quick = Suite::Quick;
    let square = |size, storage| Work::Matmul { rows: size, inner: size, cols: size, storage };
    add("matmul/1024".to_owned(), "product, as in layers", "f32", quick, square(1024, Storage::F32));
    // Seconds in software; what cooperative matrices are for.
    add("matmul_f16/4096".to_owned(), "product, as in layers", "f16 weights", Suite::Full, square(4096, Storage::F16));
    // A few rows, as batches of a decode step have them.
    for rows in [16, 64] {
        let work = Work::Matmul { rows, inner: 4096, cols: 4096, storage: Storage::F16 };
        add(format!("matmul_f16/{rows}x4096"), "product, as in layers", "f16 weights", Suite::Full, work);
    }
    let (rows, width) = (8192, 1024);
    add(format!("norm/rms_{rows}x{width}"), "norm", "f32", quick, Work::Norm { rows, width });
    let (rows, width) = (4096, 1536);
    add(format!("gate/layer_norm_{rows}x{width}"), "gate", "f32", quick, Work::Gate { rows, width });
    let (d_latent, d_rope, tokens) = (64, 64, 65_536);
    let work = Work::Append { tokens, d_latent, d_rope };
    add(format!("append/r{d_latent}_{tokens}"), "cache_append", "f16 cache", quick, work);
    let (n_head, d_head) = (16, 128);
    for (tokens, name, label, storage, suite) in [
        (512, "", "f32", Storage::F32, quick),
        (512, "_f16", "f16", Storage::F16, Suite::Full),
        (2048, "_f16", "f16", Storage::F16, Suite::Full),
    ] {
        let work = Work::PrefillAttention { tokens, n_head, d_head, storage };
        add(format!("prefill/mha_{n_head}x{d_head}{name}/t{tokens}"), "attention_prefill", label, suite, work);
    }
    for cached in [1024, 8192, 32_768] {
        let suite = if cached <= 8192 { Suite::Quick } else { Suite::Full };
        let work = Work::DecodeHeads { cached, n_head: 12, d_head: 64 };
        add(format!("decode/mha_120m/t{cached}"), "layer, heads", "f16", suite, work);
        let work = Work::DecodeLayer { config: paper_120m(256, false), cached, path: LayerPath::Absorbed };
        add(format!("decode/mla_120m_r256/t{cached}"), "layer, absorbed", "f16", suite, work);
        for (name, path, label) in GATED_PATHS {
            let work = Work::DecodeLayer { config: paper_120m(64, true), cached, path };
            add(format!("decode/egmla_120m_r64/{name}/t{cached}"), label, "f16", suite, work);
        }
    }
    // SmolLM's heads and Llama's.
    for ((n_head, n_kv_head, d_head), cached) in
        [(9, 3, 64), (32, 8, 128)].into_iter().flat_map(|heads| [4096, 8192].map(|cached| (heads, cached)))
    {
        let work = Work::GroupedHeads { cached, n_head, n_kv_head, d_head };
        let id = format!("decode/gqa_{n_head}_{n_kv_head}x{d_head}/t{cached}");
        add(id, "attention_decode, combine", "f16 cache", quick, work);
    }
    let (d_latent, d_rope) = (512, 64);
    for (n_head, name, label, storage, batch, cached, suite) in [
        (16, "", "f16 cache", Storage::F16, 1, 4096, quick),
        (16, "_f32", "f32 cache", Storage::F32, 1, 4096, quick),
        (16, "", "f16 cache", Storage::F16, 1, 32_768, Suite::Full),
        (128, "", "f16 cache", Storage::F16, 1, 8192, Suite::Full),
        // 302 MB of cache: beyond the bindings of most software adapters, and of WebGPU's defaults.
        (16, "_b32", "f16 cache", Storage::F16, 32, 8192, Suite::Full),
    ] {
        let work = Work::AbsorbedAttention { batch, cached, n_head, d_latent, d_rope, storage };
        let id = format!("decode/mla_dsv3_{n_head}h{name}/t{cached}");
        add(id, "attention_absorbed, combine", label, suite, work);
    }
    let (batch, each, n_head, width) = (1, 64, 16, 512);
    let work = Work::Combine { batch, each, n_head, width };
    add(format!("combine/{n_head}h_{width}/s{each}"), "attention_combine", "f32", quick, work);
    // Neighbours in size: what is fast only where the sizes are round shows here.
    let (config, cached) = (layer(10, 48, true), 7000);
    for (name, path, label) in GATED_PATHS {
        if matches!(path, LayerPath::Expanded | LayerPath::Grouped(GateRows::Table)) {
            let work = Work::DecodeLayer { config: config.clone(), cached, path };
            add(format!("decode/egmla_10h_r48/{name}/t{cached}"), label, "f16", quick, work);
        }
    }
    // Last: where the time is limited and the adapter slow, every other row was measured.
    let (config, tokens) = (paper_120m(64, true), 2048);
    add(
        format!("prefill/egmla_120m/t{tokens}"),
        "layer, expanded",
        "f16",
        quick,
        Work::PrefillLayer { config, tokens },
    );
    all
}

const GATED_PATHS: [(&str, LayerPath, &str); 4] = [
    ("expanded", LayerPath::Expanded, "layer, expanded"),
    ("absorbed_recompute", LayerPath::Grouped(GateRows::Recompute), "layer, absorbed by id"),
    ("absorbed_pool", LayerPath::Grouped(GateRows::Pool { rows: POOL_ROWS }), "layer, absorbed by id"),
    ("absorbed_table", LayerPath::Grouped(GateRows::Table), "layer, absorbed by id"),
];

/// Layers that are set up already: rows of one layer share its weights.
#[derive(Debug, Default)]
pub struct Stock {
    layers: Vec<(AttentionConfig, GateRows, Attention)>,
    references: Vec<(AttentionConfig, Rc<reference::Layer>)>,
}

impl Stock {
    /// The layer with random weights in f16, and the decode path that goes with it.
    fn layer(
        &mut self,
        kernels: &Kernels,
        config: &AttentionConfig,
        path: LayerPath,
    ) -> Result<(Attention, DecodePath)> {
        let (decode, gate_rows) = match path {
            LayerPath::Expanded => (DecodePath::Expanded, GateRows::Recompute),
            LayerPath::Absorbed => (DecodePath::Absorbed, GateRows::Recompute),
            LayerPath::Grouped(gate_rows) => (DecodePath::Absorbed, gate_rows),
        };
        if let Some((.., attention)) = self.layers.iter().find(|(known, rows, _)| known == config && *rows == gate_rows)
        {
            return Ok((attention.with_kernels(kernels), decode));
        }
        let weights = attention_weights(config, true, SEED)?;
        let options = AttentionOptions { storage: Storage::F16, gate_rows };
        let attention = Attention::new(kernels, config, &weights, options)?;
        attention.assume_table();
        self.layers.push((config.clone(), gate_rows, attention.clone()));
        Ok((attention, decode))
    }

    /// The same layer in f64.
    fn reference(&mut self, config: &AttentionConfig) -> Result<Rc<reference::Layer>> {
        if let Some((_, layer)) = self.references.iter().find(|(known, _)| known == config) {
            return Ok(layer.clone());
        }
        let layer = Rc::new(reference::Layer::new(config.clone(), &attention_weights(config, true, SEED)?)?);
        self.references.push((config.clone(), layer.clone()));
        Ok(layer)
    }
}

pub(super) fn prepare(work: &Work, kernels: &Kernels, stock: &mut Stock) -> Result<Prepared> {
    match *work {
        Work::Matmul { rows, inner, cols, storage } => product(kernels, (rows, inner, cols), storage),
        Work::Norm { rows, width } => norm_rows(kernels, rows, width),
        Work::Gate { rows, width } => gate_rows(kernels, rows, width),
        Work::Append { tokens, d_latent, d_rope } => append(kernels, tokens, d_latent, d_rope),
        Work::PrefillAttention { tokens, n_head, d_head, storage } => {
            prefill_attention(kernels, tokens, n_head, d_head, storage)
        }
        Work::Combine { batch, each, n_head, width } => combined(kernels, batch, each, n_head, width),
        Work::AbsorbedAttention { batch, cached, n_head, d_latent, d_rope, storage } => {
            absorbed_attention(kernels, (batch, cached), n_head, (d_latent, d_rope), storage)
        }
        Work::GroupedHeads { cached, n_head, n_kv_head, d_head } => {
            grouped_heads(kernels, cached, (n_head, n_kv_head, d_head))
        }
        Work::PrefillLayer { ref config, tokens } => prefill_layer(kernels, stock, config, tokens),
        Work::DecodeHeads { cached, n_head, d_head } => decode_heads(kernels, cached, n_head, d_head),
        Work::DecodeLayer { ref config, cached, path } => decode_layer(kernels, stock, config, cached, path),
        #[cfg(test)]
        Work::Wrong => {
            let wrong = Region::from(&kernels.upload("wrong", bytemuck::cast_slice(&[0.0, f32::NAN]))?);
            norm_rows(kernels, 4, 8).map(|right| Prepared { output: wrong, ..right })
        }
    }
}

/// Uploads normal values. They repeat after a while, which no kernel notices and no clock waits for.
struct Inputs<'a> {
    kernels: &'a Kernels,
    values: Vec<f32>,
}

impl<'a> Inputs<'a> {
    fn new(kernels: &'a Kernels) -> Self {
        // Prime, so that rows differ.
        Inputs { kernels, values: Random::new(SEED).values(65_537, 1.0) }
    }

    fn of(&self, n: usize, deviation: f32) -> Vec<f32> {
        self.values.iter().cycle().take(n).map(|value| deviation * value).collect()
    }

    fn stored(&self, n: usize, deviation: f32, storage: Storage) -> Result<Region> {
        let (needed, allowed) =
            (n as u64 * storage.bytes(), self.kernels.context().limits.max_storage_buffer_binding_size);
        if needed > allowed {
            let (what, limit) = ("input of a bench row: bytes".to_owned(), "max_storage_buffer_binding_size");
            return Err(Error::Limit { what, needed, allowed, limit });
        }
        let (words, _) = pack(&self.of(n, deviation), storage);
        Ok(Region::from(&self.kernels.upload("egmla.bench.input", bytemuck::cast_slice(&words))?))
    }

    fn floats(&self, n: usize) -> Result<Region> {
        self.stored(n, 1.0, Storage::F32)
    }

    fn table<T: bytemuck::Pod>(&self, rows: &[T]) -> Result<Region> {
        Ok(Region::from(&self.kernels.upload("egmla.bench.table", bytemuck::cast_slice(rows))?))
    }

    fn output(&self, words: usize) -> Result<Region> {
        Ok(Region::from(&self.kernels.allocate("egmla.bench.output", 4 * words as u64)?))
    }
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

/// Products of longer sums than this are seconds for the f64 reference.
const REFERENCE_MULTIPLY_ADDS: usize = 1 << 31;

fn product(kernels: &Kernels, (rows, inner, cols): (u32, u32, u32), storage: Storage) -> Result<Prepared> {
    let inputs = Inputs::new(kernels);
    let (m, k, n) = (rows as usize, inner as usize, cols as usize);
    let (x, w, y) = (inputs.floats(m * k)?, inputs.stored(n * k, 1.0, storage)?, inputs.output(m * n)?);
    let problem = matmul::Matmul::linear(rows, inner, cols, false, storage);
    let mut recording = Recording::new(kernels);
    let args = matmul::Args { x: &x, w: &w, bias: &kernels.absent(), y: &y };
    recording.add_own(&problem, args)?;
    let reference = (m * k * n <= REFERENCE_MULTIPLY_ADDS).then(|| {
        let (x, w) = (widen(&inputs.of(m * k, 1.0)), widen(&inputs.of(n * k, 1.0)));
        Box::new(move || {
            std::hint::black_box(reference::matmul(&x, &w, None, m, k, n));
        }) as Box<dyn Fn()>
    });
    Ok(Prepared { recording, cost: problem.cost(), output: y, reference })
}

fn norm_rows(kernels: &Kernels, rows: u32, width: u32) -> Result<Prepared> {
    let inputs = Inputs::new(kernels);
    let elements = (rows * width) as usize;
    let (x, weight, y) = (inputs.floats(elements)?, inputs.floats(width as usize)?, inputs.output(elements)?);
    let (kind, bias) = (norm::Kind::Rms, false);
    let (x_offset, x_row, eps, storage) = (0, width, 1e-6, Storage::F32);
    let problem = norm::Norm { rows, width, x_offset, x_row, eps, kind, bias, storage };
    let mut recording = Recording::new(kernels);
    let args = norm::Args { x: &x, weight: &weight, bias: &kernels.absent(), y: &y };
    recording.add_own(&problem, args)?;
    let (x, weight) = (widen(&inputs.of(elements, 1.0)), widen(&inputs.of(width as usize, 1.0)));
    let reference = Box::new(move || {
        std::hint::black_box(reference::rms_norm(&x, Some(&weight), width as usize, 1e-6));
    });
    Ok(Prepared { recording, cost: problem.cost(), output: y, reference: Some(reference) })
}

fn gate_rows(kernels: &Kernels, rows: u32, width: u32) -> Result<Prepared> {
    let inputs = Inputs::new(kernels);
    let elements = (rows * width) as usize;
    let (x, g, y) = (inputs.floats(elements)?, inputs.floats(elements)?, inputs.output(elements)?);
    let affine = inputs.floats(width as usize)?;
    let (activation, norm) = (Activation::Sigmoid, GateNorm::LayerNorm);
    let problem = gate::Gate {
        rows,
        segments: Segments::one(width),
        x_offset: 0,
        x_row: width,
        eps: 1e-5,
        activation,
        norm,
        statistics_rows: 0,
        storage: Storage::F32,
        y_storage: Storage::F32,
    };
    let mut recording = Recording::new(kernels);
    let absent = kernels.absent();
    let args = gate::Args { x: &x, g: &g, weight: &affine, bias: &affine, slots: &absent, y: &y, statistics: &absent };
    recording.add_own(&problem, args)?;
    let (x, affine) = (widen(&inputs.of(elements, 1.0)), widen(&inputs.of(width as usize, 1.0)));
    let reference = Box::new(move || {
        let (weight, bias) = (Some(&affine[..]), Some(&affine[..]));
        std::hint::black_box(reference::gate(&x, &x, activation, norm, weight, bias, width as usize, 1e-5));
    });
    Ok(Prepared { recording, cost: problem.cost(), output: y, reference: Some(reference) })
}

fn append(kernels: &Kernels, tokens: u32, d_latent: u32, d_rope: u32) -> Result<Prepared> {
    let inputs = Inputs::new(kernels);
    let row = d_latent + d_rope;
    let values = inputs.floats((tokens * row) as usize)?;
    let slots = inputs.table(&(0..tokens).collect::<Vec<_>>())?;
    let storage = Storage::F16;
    let words = |width: u32| (u64::from(storage.row_pitch(width)) * storage.bytes() / 4) as usize * tokens as usize;
    let cache = inputs.output(words(d_latent) + words(d_rope))?;
    let problem = cache_append::CacheAppend {
        tokens,
        cache_rows: tokens,
        row,
        latent_offset: 0,
        d_latent,
        latent_used: d_latent,
        rope_offset: d_latent,
        d_rope,
        rotate: false,
        queries: cache_append::Queries::default(),
        norm: None,
        gate: None,
        kept: None,
        rope_byte: 4 * words(d_latent) as u64,
        weights: storage,
        storage,
    };
    let absent = &kernels.absent();
    let (x, slots) = (&values, &slots);
    let args = cache_append::Args {
        x,
        weight: absent,
        g: absent,
        rotations: absent,
        slots,
        cache: &cache,
        q: absent,
        w: absent,
    };
    let mut recording = Recording::new(kernels);
    recording.add_own(&problem, args)?;
    let (n, d, r) = (tokens as usize, d_latent as usize, d_rope as usize);
    let (latents, keys) = (widen(&inputs.of(n * d, 1.0)), widen(&inputs.of(n * r, 1.0)));
    let of_token: Vec<u32> = (0..tokens).collect();
    let reference = Box::new(move || {
        let (mut first, mut second) = (vec![0.0; n * d], vec![0.0; n * r]);
        reference::cache_append(&mut first, &latents, d, &of_token);
        reference::cache_append(&mut second, &keys, r, &of_token);
        std::hint::black_box((first, second));
    });
    // Halves of a normal distribution, two by two, are finite as f32 too.
    Ok(Prepared { recording, cost: problem.cost(), output: cache, reference: Some(reference) })
}

fn prefill_attention(kernels: &Kernels, tokens: u32, n_head: u32, d_head: u32, storage: Storage) -> Result<Prepared> {
    let inputs = Inputs::new(kernels);
    let width = (tokens * n_head * d_head) as usize;
    let (q, kv, values) = (inputs.floats(width)?, inputs.stored(2 * width, 1.0, storage)?, inputs.output(width)?);
    let tile = tile_q(kernels.context());
    let slices = slices(d_head);
    let softmax = inputs.output((tokens * n_head * slices * 2) as usize)?;
    let tiles: Vec<_> = (0..tokens)
        .step_by(tile as usize)
        .map(|first| QueryTile { first_token: first, count: tile.min(tokens - first), position: first, sequence: 0 })
        .collect();
    let queries = inputs.table(&tiles)?;
    let sequences = inputs.table(&[SequenceRow { first_row: 0, first_slot: 0, length: tokens, token: 0 }])?;
    let scale = f64::from(d_head).sqrt().recip();
    let problem = attention_prefill::AttentionPrefill {
        tokens,
        query_tiles: tiles.len() as u32,
        tile_q: tile,
        n_sequence: 1,
        n_head,
        n_kv_head: n_head,
        d_nope: d_head,
        d_rope: 0,
        d_value: d_head,
        kv_first: 0,
        kv_rows: tokens,
        cache_rows: tokens,
        first: true,
        last: true,
        scale: scale as f32,
        weights: storage,
        storage,
        kv: storage,
    };
    let args = attention_prefill::Args {
        q: &q,
        kv: &kv,
        rope_cache: &kernels.absent(),
        queries: &queries,
        sequences: &sequences,
        values: &values,
        softmax: &softmax,
    };
    let mut recording = Recording::new(kernels);
    recording.add_own(&problem, args)?;
    let (q, kv) = (widen(&inputs.of(width, 1.0)), widen(&inputs.of(2 * width, 1.0)));
    let reference = Box::new(move || {
        let d = d_head as usize;
        let heads = Heads { n_head: n_head as usize, n_kv_head: n_head as usize, d_nope: d, d_rope: 0, d_value: d };
        let visible: Vec<_> = (0..tokens as usize).map(|token| 0..token + 1).collect();
        std::hint::black_box(reference::attention_prefill(&q, &kv, &[], &visible, heads, scale));
    });
    Ok(Prepared { recording, cost: cost::causal(&problem), output: values, reference: Some(reference) })
}

fn absorbed_attention(
    kernels: &Kernels,
    (batch, cached): (u32, u32),
    n_head: u32,
    (d_latent, d_rope): (u32, u32),
    storage: Storage,
) -> Result<Prepared> {
    let inputs = Inputs::new(kernels);
    let split =
        split_length(kernels.context(), u64::from(batch) * u64::from(cached), attention_absorbed::workgroups(n_head));
    let (each, d_nope) = (cached.div_ceil(split), 128);
    let (splits, partials, cache_rows) = (batch * cached.next_multiple_of(SPLIT) / split, batch * each, batch * cached);
    let problem = attention_absorbed::AttentionAbsorbed {
        tokens: batch,
        most_tokens: 1,
        partials,
        n_sequence: batch,
        split,
        splits,
        n_head,
        d_latent,
        d_nope,
        d_rope,
        cache_rows,
        scale: 0.135_234,
        weights: storage,
        storage,
    };
    let stored = |width: u32| inputs.stored((cache_rows * storage.row_pitch(width)) as usize, 1.0, storage);
    let (latents, keys) = (stored(d_latent)?, stored(d_rope)?);
    // Absorbed queries this small spread the softmax over many cache rows.
    let absorbed = inputs.stored((batch * n_head * d_latent) as usize, 0.1, Storage::F32)?;
    let q = inputs.stored((batch * n_head * (d_nope + d_rope)) as usize, 0.1, Storage::F32)?;
    let line = |token: u32| DecodeSequence {
        first_row: token * cached.next_multiple_of(SPLIT),
        first_slot: token * cached,
        length: cached,
        token,
        tokens: 1,
        partial: token * each,
        splits: each,
        unused: 0,
    };
    let sequences = inputs.table(&(0..batch).map(line).collect::<Vec<_>>())?;
    let partial_values = inputs.output((partials * n_head * d_latent) as usize)?;
    let partial_softmax = inputs.output((splits * n_head * 2) as usize)?;
    let mut recording = Recording::new(kernels);
    let args = attention_absorbed::Args {
        absorbed: &absorbed,
        q: &q,
        latent_cache: &latents,
        rope_cache: &keys,
        sequences: &sequences,
        partial_values: &partial_values,
        partial_softmax: &partial_softmax,
    };
    recording.add_own(&problem, args)?;
    let output = inputs.output((batch * n_head * d_latent) as usize)?;
    let partial = (&partial_values, &partial_softmax);
    let combined = combine(&mut recording, &inputs, (batch, n_head), d_latent, each, partial, &output)?;

    let (n, d, r, heads) = (cached as usize, d_latent as usize, d_rope as usize, n_head as usize);
    let reference = (batch == 1).then(|| {
        let (a, q) = (widen(&inputs.of(heads * d, 0.1)), widen(&inputs.of(heads * r, 0.1)));
        let (latents, keys) = (widen(&inputs.of(n * d, 1.0)), widen(&inputs.of(n * r, 1.0)));
        Box::new(move || {
            let one = [(0, 0..n)];
            std::hint::black_box(reference::attention_absorbed(&a, &q, &latents, &keys, &one, heads, d, r, 0.135_234));
        }) as Box<dyn Fn()>
    });
    Ok(Prepared { recording, cost: problem.cost() + combined, output, reference })
}

fn combined(kernels: &Kernels, batch: u32, each: u32, n_head: u32, width: u32) -> Result<Prepared> {
    let inputs = Inputs::new(kernels);
    let values = inputs.floats((batch * each * n_head * width) as usize)?;
    // Maxima of a few, sums of one and more.
    let of = |(index, value): (usize, f32)| if index % 2 == 0 { value } else { 1.0 + value.abs() };
    let state: Vec<f32> =
        inputs.of((batch * each * n_head * 2) as usize, 1.0).into_iter().enumerate().map(of).collect();
    let (softmax, output) = (inputs.table(&state)?, inputs.output((batch * n_head * width) as usize)?);
    let mut recording = Recording::new(kernels);
    let cost = combine(&mut recording, &inputs, (batch, n_head), width, each, (&values, &softmax), &output)?;
    Ok(Prepared { recording, cost, output, reference: None })
}

/// Combines the splits of each query token, `each` of them.
fn combine(
    recording: &mut Recording,
    inputs: &Inputs<'_>,
    (tokens, n_head): (u32, u32),
    width: u32,
    each: u32,
    (partial_values, partial_softmax): (&Region, &Region),
    values: &Region,
) -> Result<Cost> {
    let problem = attention_combine::AttentionCombine { tokens, n_head, width, splits: tokens * each };
    let ranges = inputs.table(&(0..tokens).map(|token| [token * each, each]).collect::<Vec<_>>())?;
    let lse = inputs.output((tokens * n_head) as usize)?;
    let args = attention_combine::Args { partial_values, partial_softmax, ranges: &ranges, values, lse: &lse };
    recording.add_own(&problem, args)?;
    Ok(problem.cost())
}

/// Gate rows of the pool: more than the longest cache has distinct ids.
const POOL_ROWS: u32 = 8192;

/// Room for one sequence of `capacity` tokens in f16, `max_tokens` of them new.
fn one_sequence(capacity: u32, max_tokens: u32, decode_path: DecodePath) -> CacheOptions {
    CacheOptions { capacity, max_tokens, decode_path, storage: Storage::F16, ..CacheOptions::default() }
}

fn prefill_layer(kernels: &Kernels, stock: &mut Stock, config: &AttentionConfig, tokens: u32) -> Result<Prepared> {
    let (attention, path) = stock.layer(kernels, config, LayerPath::Expanded)?;
    let mut cache = LatentCache::new(&attention, one_sequence(tokens, tokens, path))?;
    let ids = tokens::text_like(tokens as usize, SEED);
    let cost = cost::prefill(config, tokens, Storage::F16);
    let new = StepTokens { counts: &[tokens], ids: Some(&ids) };
    let prepared = layer_step(kernels, &attention, &mut cache, (Mode::Prefill, new), cost)?;
    let layer = stock.reference(config)?;
    let hidden = widen(&Inputs::new(kernels).of((tokens * config.hidden_size) as usize, 1.0));
    let reference = Box::new(move || {
        std::hint::black_box(layer.forward(&hidden, &ids, &mut reference::History::default()));
    });
    Ok(Prepared { reference: Some(reference), ..prepared })
}

fn decode_layer(
    kernels: &Kernels,
    stock: &mut Stock,
    config: &AttentionConfig,
    cached: u32,
    path: LayerPath,
) -> Result<Prepared> {
    let (attention, decode) = stock.layer(kernels, config, path)?;
    let mut cache = LatentCache::new(&attention, one_sequence(cached, 1, decode))?;
    let ids = tokens::text_like(cached as usize, SEED);
    let (new, past) =
        ids.split_last().ok_or(Error::Argument(ArgumentError::Empty { what: "the cache of a bench row" }))?;
    let mut random = Random::new(SEED);
    cache.fill(past, || random.normal())?;
    let distinct = ids.iter().collect::<HashSet<_>>().len() as u32;
    let projected = if path == LayerPath::Grouped(GateRows::Recompute) { distinct } else { 0 };
    let cost = match decode {
        DecodePath::Absorbed => cost::decode_absorbed(config, cached, distinct, projected, Storage::F16),
        DecodePath::Auto | DecodePath::Expanded => cost::decode_expanded(config, cached, Storage::F16),
    };
    let tokens = StepTokens { counts: &[1], ids: Some(&[*new]) };
    let prepared = layer_step(kernels, &attention, &mut cache, (Mode::Decode, tokens), cost)?;

    // The same path in f64, over other numbers.
    let (layer, inputs, rows) = (stock.reference(config)?, Inputs::new(kernels), past.len());
    let hidden = widen(&inputs.of(config.hidden_size as usize, 1.0));
    let latents = reference::Latents {
        latent: widen(&inputs.of(rows * config.d_latent as usize, 1.0)),
        k_rope: widen(&inputs.of(rows * config.d_rope as usize, 1.0)),
        statistics: vec![[0.5, 1.0]; rows],
    };
    let (new, past) = ([*new], past.to_vec());
    let reference = Box::new(move || {
        std::hint::black_box(match decode {
            DecodePath::Absorbed => layer.decode_absorbed(&hidden, &new, &latents, &past),
            DecodePath::Auto | DecodePath::Expanded => layer.decode_expanded(&hidden, &new, &latents, &past),
        });
    });
    Ok(Prepared { reference: Some(reference), ..prepared })
}

/// Records one step of a layer. The step is not committed, so each submission does the same again.
fn layer_step(
    kernels: &Kernels,
    attention: &Attention,
    cache: &mut LatentCache,
    (mode, tokens): (Mode, StepTokens<'_>),
    cost: Cost,
) -> Result<Prepared> {
    let inputs = Inputs::new(kernels);
    let step = cache.prepare(mode, tokens)?;
    let elements = (step.tokens() * attention.config().hidden_size) as usize;
    let (hidden, out) = (inputs.floats(elements)?, inputs.output(elements)?);
    let mut recording = Recording::new(kernels);
    attention.forward(&mut recording, cache, &step, 0, &hidden, &out)?;
    Ok(Prepared { recording, cost, output: out, reference: None })
}

/// Rows of keys and values in one buffer: within every device's storage binding.
const HEADS_TILE: u32 = 8192;

/// Query heads, heads of keys and values, and the width of each.
type HeadCounts = (u32, u32, u32);

/// Keys and values of `cached` tokens in f16, each tile with its first row.
fn head_tiles(inputs: &Inputs<'_>, cached: u32, (_, n_kv_head, d_head): HeadCounts) -> Result<Vec<(u32, Region)>> {
    let tile = |first| {
        let elements = (HEADS_TILE.min(cached - first) * 2 * n_kv_head * d_head) as usize;
        Ok((first, inputs.stored(elements, 1.0, Storage::F16)?))
    };
    (0..cached).step_by(HEADS_TILE as usize).map(tile).collect()
}

/// Attention of one query token over these tiles, its partial results combined.
fn attend_heads(
    recording: &mut Recording,
    inputs: &Inputs<'_>,
    cached: u32,
    (n_head, n_kv_head, d_head): HeadCounts,
    tiles: &[(u32, Region)],
    (q, values): (&Region, &Region),
) -> Result<Cost> {
    let context = inputs.kernels.context();
    let split = split_length(context, cached.into(), attention_decode::workgroups(context, n_head, n_kv_head));
    let splits = cached.div_ceil(split);
    let sequences = inputs.table(&[DecodeSequence {
        first_row: 0,
        first_slot: 0,
        length: cached,
        token: 0,
        tokens: 1,
        partial: 0,
        splits,
        unused: 0,
    }])?;
    let partial_values = inputs.output((splits * n_head * d_head) as usize)?;
    let partial_softmax = inputs.output((splits * n_head * 2) as usize)?;
    let mut cost = Cost::default();
    for (first, tile) in tiles {
        let problem = attention_decode::AttentionDecode {
            tokens: 1,
            most_tokens: 1,
            partials: splits,
            split,
            n_sequence: 1,
            n_head,
            n_kv_head,
            d_nope: d_head,
            d_rope: 0,
            d_value: d_head,
            kv_first: *first,
            kv_rows: HEADS_TILE.min(cached - first),
            kv_pitch: 2 * n_kv_head * d_head,
            cache_rows: cached,
            scale: f64::from(d_head).sqrt().recip() as f32,
            storage: Storage::F16,
            kv_storage: Storage::F16,
        };
        let args = attention_decode::Args {
            q,
            kv: tile,
            rope_cache: &inputs.kernels.absent(),
            sequences: &sequences,
            partial_values: &partial_values,
            partial_softmax: &partial_softmax,
        };
        recording.add_own(&problem, args)?;
        cost = cost + problem.cost();
    }
    let partial = (&partial_values, &partial_softmax);
    Ok(cost + combine(recording, inputs, (1, n_head), d_head, splits, partial, values)?)
}

fn grouped_heads(kernels: &Kernels, cached: u32, heads: HeadCounts) -> Result<Prepared> {
    let (inputs, mut recording) = (Inputs::new(kernels), Recording::new(kernels));
    let (n_head, n_kv_head, d_head) = heads;
    let width = (n_head * d_head) as usize;
    let (q, values) = (inputs.floats(width)?, inputs.output(width)?);
    let tiles = head_tiles(&inputs, cached, heads)?;
    let cost = attend_heads(&mut recording, &inputs, cached, heads, &tiles, (&q, &values))?;
    let (n, n_head, n_kv_head, d) = (cached as usize, n_head as usize, n_kv_head as usize, d_head as usize);
    let (q, kv) = (widen(&inputs.of(width, 1.0)), widen(&inputs.of(n * 2 * n_kv_head * d, 1.0)));
    let reference = Box::new(move || {
        let heads = Heads { n_head, n_kv_head, d_nope: d, d_rope: 0, d_value: d };
        std::hint::black_box(reference::attention_decode(&q, &kv, &[], &[(0, 0..n)], heads, (d as f64).sqrt().recip()));
    });
    Ok(Prepared { recording, cost, output: values, reference: Some(reference) })
}

/// A layer of multi-head attention from the library's kernels, what MLA and EG-MLA are set against: keys and values of
/// every head are cached, rotated, in f16.
fn decode_heads(kernels: &Kernels, cached: u32, n_head: u32, d_head: u32) -> Result<Prepared> {
    let inputs = Inputs::new(kernels);
    let (width, heads) = (n_head * d_head, (n_head, n_head, d_head));
    let deviation = f64::from(width).sqrt().recip() as f32;
    let weights = |cols: u32| inputs.stored((width * cols) as usize, deviation, Storage::F16);
    let (q_proj, kv_proj, o_proj) = (weights(width)?, weights(2 * width)?, weights(width)?);
    let hidden = inputs.floats(width as usize)?;
    let (q, values, out) =
        (inputs.output(width as usize)?, inputs.output(width as usize)?, inputs.output(width as usize)?);
    let tiles = head_tiles(&inputs, cached, heads)?;
    let rotations = RopeConfig::default().frequencies(d_head).into_iter().map(|frequency| {
        let (sin, cos) = (f64::from(cached - 1) * frequency).sin_cos();
        [cos as f32, sin as f32]
    });
    let rotations = inputs.table(&rotations.collect::<Vec<_>>())?;
    let absent = kernels.absent();

    let mut recording = Recording::new(kernels);
    let mut cost = Cost::default();
    let linear = |recording: &mut Recording, cols: u32, x: &Region, w: &Region, y: &Region| {
        let problem = matmul::Matmul::linear(1, width, cols, false, Storage::F16);
        recording.add_own(&problem, matmul::Args { x, w, bias: &absent, y })?;
        Ok::<_, Error>(problem.cost())
    };
    let rotate = |recording: &mut Recording, head_stride: u32, values: &Region| {
        let offset = 0;
        let (tokens, d_rope, token_stride) = (1, d_head, n_head * head_stride);
        let problem = rope::Rope { tokens, n_head, d_rope, offset, token_stride, head_stride, interleave: true };
        recording.add_own(&problem, rope::Args { rotations: &rotations, values })?;
        Ok::<_, Error>(problem.cost())
    };
    cost = cost + linear(&mut recording, width, &hidden, &q_proj, &q)?;
    cost = cost + rotate(&mut recording, d_head, &q)?;
    let kv = inputs.output(2 * width as usize)?;
    cost = cost + linear(&mut recording, 2 * width, &hidden, &kv_proj, &kv)?;
    cost = cost + rotate(&mut recording, 2 * d_head, &kv)?;
    // The new token's cache row is the last of the last tile.
    if let Some((first, tile)) = tiles.last() {
        let row = 2 * width;
        let problem = cache_append::CacheAppend {
            tokens: 1,
            cache_rows: cached - first,
            row,
            latent_offset: 0,
            d_latent: row,
            latent_used: row,
            rope_offset: 0,
            d_rope: 0,
            rotate: false,
            queries: cache_append::Queries::default(),
            norm: None,
            gate: None,
            kept: None,
            rope_byte: tile.size,
            weights: Storage::F16,
            storage: Storage::F16,
        };
        let slots = inputs.table(&[cached - 1 - first])?;
        let (x, absent) = (&kv, &absent);
        let args = cache_append::Args {
            x,
            weight: absent,
            g: absent,
            rotations: absent,
            slots: &slots,
            cache: tile,
            q: absent,
            w: absent,
        };
        recording.add_own(&problem, args)?;
        cost = cost + problem.cost();
    }
    cost = cost + attend_heads(&mut recording, &inputs, cached, heads, &tiles, (&q, &values))?;
    cost = cost + linear(&mut recording, width, &values, &o_proj, &out)?;

    // Three projections and the attention; the rotations of one token are too few to count.
    let (n, d, heads) = (cached as usize, width as usize, n_head as usize);
    let (x, w) = (widen(&inputs.of(d, 1.0)), widen(&inputs.of(d * 2 * d, deviation)));
    let kv = widen(&inputs.of(n * 2 * d, 1.0));
    let reference = Box::new(move || {
        let q = reference::matmul(&x, &w, None, 1, d, d);
        std::hint::black_box(reference::matmul(&x, &w, None, 1, d, 2 * d));
        let heads = Heads { n_head: heads, n_kv_head: heads, d_nope: d / heads, d_rope: 0, d_value: d / heads };
        let scale = ((d / heads.n_head) as f64).sqrt().recip();
        let attended = reference::attention_decode(&q, &kv, &[], &[(0, 0..n)], heads, scale);
        std::hint::black_box(reference::matmul(&attended.values, &w, None, 1, d, d));
    });
    Ok(Prepared { recording, cost, output: out, reference: Some(reference) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Rows of the full suite beside the longest caches.
    const FULL: [&str; 8] = [
        "matmul_f16/4096",
        "matmul_f16/16x4096",
        "matmul_f16/64x4096",
        "prefill/mha_16x128_f16/t512",
        "prefill/mha_16x128_f16/t2048",
        "decode/mla_dsv3_16h/t32768",
        "decode/mla_dsv3_128h/t8192",
        "decode/mla_dsv3_16h_b32/t8192",
    ];

    #[test]
    fn the_promised_rows_are_there_once() {
        let all = rows();
        let ids: Vec<&str> = all.iter().map(Row::id).collect();
        let mut promised: Vec<String> =
            ["matmul/1024", "prefill/mha_16x128/t512", "prefill/egmla_120m/t2048", "decode/mla_dsv3_16h/t4096"]
                .map(str::to_owned)
                .to_vec();
        promised.push("decode/mla_dsv3_16h_f32/t4096".to_owned());
        for t in [1024, 8192, 32_768] {
            promised.extend([format!("decode/mha_120m/t{t}"), format!("decode/mla_120m_r256/t{t}")]);
            for path in ["expanded", "absorbed_recompute", "absorbed_pool", "absorbed_table"] {
                promised.push(format!("decode/egmla_120m_r64/{path}/t{t}"));
            }
        }
        for heads in ["9_3x64", "32_8x128"] {
            promised.extend([4096, 8192].map(|t| format!("decode/gqa_{heads}/t{t}")));
        }
        promised.extend(FULL.map(str::to_owned));
        promised.extend(["expanded", "absorbed_table"].map(|path| format!("decode/egmla_10h_r48/{path}/t7000")));
        for id in &promised {
            assert_eq!(ids.iter().filter(|found| *found == id).count(), 1, "{id}");
        }
        for family in ["norm/", "gate/", "append/", "combine/"] {
            assert!(ids.iter().any(|id| id.starts_with(family)), "{family}");
        }
        assert_eq!(ids.len(), promised.len() + 4);
        let long: Vec<_> = all.iter().filter(|row| !row.is_in(Suite::Quick)).map(Row::id).collect();
        let other = |id: &&&str| FULL.contains(id);
        assert_eq!(long.iter().filter(other).count(), FULL.len());
        let of_32k = |id: &&str| id.ends_with("/t32768") && !FULL.contains(id);
        assert!(long.iter().all(|id| of_32k(id) || other(&id)), "{long:?}");
        assert_eq!(long.len(), 6 + FULL.len());
        assert!(all.iter().all(|row| row.is_in(Suite::Full)));
    }

    #[test]
    fn the_120m_layer_caches_what_the_paper_prints() {
        assert_eq!(12 * paper_120m(64, true).cache_elements(), 1536);
        assert_eq!(12 * paper_120m(256, false).cache_elements(), 3840);
        assert_eq!(12 * paper_120m(64, true).mha_cache_elements(), 18_432);
    }
}

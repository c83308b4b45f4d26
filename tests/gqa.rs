//! The layer with keys and values per head and its cache: against the reference, against the formulas of transformers, and what it
//! asks of a device.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Gpu, gpu, gpu_with};
use egmla::attention::{CacheOptions, GqaAttention, KvCache, Mode, StepTokens, Tokens};
use egmla::check::compare::{F16_LIMIT, F32_LIMIT, Tolerance, compare};
use egmla::config::{GqaConfig, QueryScaling, RopeConfig, RopeScaling};
use egmla::error::{ArgumentError, TensorError};
use egmla::random::{Random, gqa_weights};
use egmla::readback;
use egmla::reference::{GqaLayer, History};
use egmla::weights::GqaWeights;
use egmla::{Error, Recording, Region, Storage, wgpu};

const HIDDEN: usize = 20;

const SCALED_QUERIES: QueryScaling = QueryScaling { beta: 0.4, original_max_position_embeddings: 5.0 };

fn halves() -> RopeConfig {
    RopeConfig { interleave: false, ..RopeConfig::default() }
}

fn config(n_head: u32, n_kv_head: u32, head_dim: u32) -> GqaConfig {
    GqaConfig {
        hidden_size: HIDDEN as u32,
        n_head,
        n_kv_head,
        head_dim,
        qkv_bias: false,
        o_bias: false,
        qk_norm_eps: None,
        rope: halves(),
    }
}

/// One head of keys and values, three, one for every query head; widths that end within a load; biases; pairs and scalings.
fn configs() -> Vec<GqaConfig> {
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 16.0,
    };
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: 16.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: None,
        mscale_all_dim: Some(0.5),
        attention_factor: None,
        truncate: true,
    };
    vec![
        config(4, 1, 20),
        GqaConfig { qkv_bias: true, ..config(9, 3, 64) },
        GqaConfig { qkv_bias: true, o_bias: true, rope: RopeConfig { scaling: llama3, ..halves() }, ..config(3, 3, 6) },
        GqaConfig { rope: RopeConfig { scaling: yarn, ..RopeConfig::default() }, ..config(8, 2, 136) },
        config(1, 1, 2),
        GqaConfig { qk_norm_eps: Some(1e-6), ..config(4, 2, 20) },
        GqaConfig { qk_norm_eps: Some(1e-2), qkv_bias: true, rope: RopeConfig::default(), ..config(6, 2, 64) },
        GqaConfig { rope: RopeConfig { query_scaling: Some(SCALED_QUERIES), ..halves() }, ..config(4, 2, 12) },
    ]
}

/// A layer with its cache, fed through the public API.
struct Rig {
    gpu: Gpu,
    attention: GqaAttention,
    cache: KvCache,
    reference: GqaLayer,
}

impl Rig {
    fn new(config: &GqaConfig, batch: u32, capacity: u32, storage: Storage) -> Self {
        Self::on(gpu(), config, batch, capacity, storage)
    }

    fn on(gpu: Gpu, config: &GqaConfig, batch: u32, capacity: u32, storage: Storage) -> Self {
        let weights = gqa_weights(config, 1).unwrap();
        let attention = GqaAttention::new(&gpu.kernels, config, &weights, storage).unwrap();
        let max_tokens = batch * capacity;
        let options =
            CacheOptions { batch, capacity, storage, max_tokens, decode_tokens: 16, ..CacheOptions::default() };
        let mut rig = Rig {
            cache: KvCache::new(&attention, options).unwrap(),
            reference: GqaLayer::new(config.clone(), &weights).unwrap(),
            gpu,
            attention,
        };
        // What a buffer holds before it is written must not matter: NaN in every row, and in all that a step computes.
        let hidden = vec![f32::NAN; (batch * capacity * config.hidden_size) as usize];
        for mode in [Mode::Prefill, Mode::Decode] {
            let new = if mode == Mode::Prefill { capacity } else { capacity.min(16) };
            let counts = vec![new; batch as usize];
            rig.cache.reset();
            rig.step(mode, &counts, &hidden[..(batch * new * config.hidden_size) as usize]);
        }
        rig.cache.reset();
        rig
    }

    fn upload(&self, hidden: &[f32]) -> (Region, Region) {
        let input = self.gpu.kernels.upload("hidden", bytemuck::cast_slice(hidden)).unwrap();
        let output = self.gpu.kernels.allocate("out", 4 * hidden.len() as u64).unwrap();
        (Region::from(&input), Region::from(&output))
    }

    /// The output of new tokens, and the kernels that computed it.
    fn traced(&mut self, mode: Mode, counts: &[u32], hidden: &[f32]) -> (Vec<f32>, Vec<&'static str>) {
        let (input, out) = self.upload(hidden);
        let mut recording = Recording::new(&self.gpu.kernels);
        let tokens = Tokens { counts, ids: None, hidden: input, out: out.clone() };
        match mode {
            Mode::Prefill => self.attention.prefill(&mut recording, &mut self.cache, tokens).unwrap(),
            Mode::Decode => self.attention.decode(&mut recording, &mut self.cache, tokens).unwrap(),
        }
        let names = recording.kernel_names().collect();
        readback::submit(&mut recording).unwrap();
        let values = readback::wait(readback::read_f32(&self.gpu.kernels, &[&out])).unwrap().remove(0);
        self.gpu.assert_no_errors();
        (values[..hidden.len()].to_vec(), names)
    }

    fn step(&mut self, mode: Mode, counts: &[u32], hidden: &[f32]) -> Vec<f32> {
        self.traced(mode, counts, hidden).0
    }

    fn expected(&self, hidden: &[f32]) -> Vec<f64> {
        self.reference.forward(&widen(hidden), &mut History::default())
    }
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

#[track_caller]
fn assert_close(got: &[f32], expected: &[f64], limit: f64) {
    compare(got, expected, Tolerance { relative: limit }).verdict.unwrap();
}

fn limit(storage: Storage) -> f64 {
    if storage == Storage::F32 { F32_LIMIT } else { F16_LIMIT }
}

/// A prefill in parts, then decode steps of one and of several tokens: each as the whole text at once.
#[test]
fn the_device_gives_what_the_reference_gives() {
    for config in configs() {
        for storage in Storage::ALL {
            let mut rig = Rig::new(&config, 1, 330, storage);
            let hidden = Random::new(2).values(330 * HIDDEN, 1.0);
            let expected = rig.expected(&hidden);
            let whole = rig.step(Mode::Prefill, &[330], &hidden);
            assert_close(&whole, &expected, limit(storage));
            rig.cache.reset();
            let mut first = 0;
            let parts = [(Mode::Prefill, 11), (Mode::Prefill, 1), (Mode::Decode, 1), (Mode::Decode, 3)];
            let more = [(Mode::Prefill, 238), (Mode::Decode, 1), (Mode::Decode, 16), (Mode::Decode, 1)];
            for (mode, count) in parts.into_iter().chain(more) {
                let rows = first * HIDDEN..(first + count) * HIDDEN;
                let got = rig.step(mode, &[count as u32], &hidden[rows.clone()]);
                assert_close(&got, &expected[rows], limit(storage));
                first += count;
            }
            assert_eq!(rig.cache.lengths(), [272]);
        }
    }
}

#[test]
fn a_ragged_batch_is_each_sequence_alone() {
    for (config, storage) in configs().into_iter().zip(Storage::ALL.into_iter().cycle()) {
        let mut rig = Rig::new(&config, 4, 300, storage);
        let mut random = Random::new(3);
        let mut histories = vec![History::default(); 4];
        let steps: [(Mode, [u32; 4]); 6] = [
            (Mode::Prefill, [5, 0, 280, 40]),
            (Mode::Prefill, [1, 270, 0, 7]),
            (Mode::Decode, [1, 1, 1, 1]),
            (Mode::Decode, [0, 1, 0, 3]),
            (Mode::Decode, [0, 0, 2, 0]),
            (Mode::Prefill, [0, 0, 0, 3]),
        ];
        for (mode, counts) in steps {
            let tokens = counts.iter().sum::<u32>() as usize;
            let hidden = random.values(tokens * HIDDEN, 1.0);
            let got = rig.step(mode, &counts, &hidden);
            let (mut expected, mut first) = (Vec::new(), 0);
            for (history, count) in histories.iter_mut().zip(counts).filter(|(_, count)| *count > 0) {
                let end = first + count as usize;
                expected.extend(rig.reference.forward(&widen(&hidden[first * HIDDEN..end * HIDDEN]), history));
                first = end;
            }
            assert_close(&got, &expected, limit(storage));
        }
        let lengths: Vec<_> = histories.iter().map(|history| history.len() as u32).collect();
        assert_eq!(rig.cache.lengths(), lengths);
    }
}

/// A cache over one binding is walked part by part: by prefill, by decode, and by what appends, where the new tokens lie on both
/// sides of a border.
#[test]
fn a_cache_over_one_binding_is_walked_in_parts() {
    for (storage, bindings) in [(Storage::F32, 1), (Storage::F32, 2), (Storage::F16, 1)] {
        let config = config(2, 1, 16);
        // 256 rows of 2 · 16 elements.
        let binding = bindings * 256 * 32 * storage.bytes();
        let limits = wgpu::Limits { max_storage_buffer_binding_size: binding.max(16 << 10), ..wgpu::Limits::default() };
        let weights = gqa_weights(&config, 1).unwrap();
        let gpu = gpu_with(limits);
        let attention = GqaAttention::new(&gpu.kernels, &config, &weights, storage).unwrap();
        let options = CacheOptions {
            batch: 2,
            capacity: 700,
            storage,
            max_tokens: 64,
            decode_tokens: 2,
            ..CacheOptions::default()
        };
        let cache = KvCache::new(&attention, options).unwrap();
        let reference = GqaLayer::new(config.clone(), &weights).unwrap();
        let mut rig = Rig { gpu, attention, cache, reference };
        let (mut random, mut histories) = (Random::new(4), vec![History::default(); 2]);
        let mut walked = 0;
        let mut steps = vec![(Mode::Prefill, [30, 34]); 20];
        steps.extend([(Mode::Decode, [1, 2]), (Mode::Decode, [2, 0]), (Mode::Decode, [0, 2])]);
        // Rolled back, the border is crossed once more.
        steps.extend([(Mode::Prefill, [0, 64]), (Mode::Decode, [1, 1])]);
        for (number, (mode, counts)) in steps.into_iter().enumerate() {
            if number == 23 {
                rig.cache.truncate(1, 490).unwrap();
                histories[1].truncate(490);
            }
            let tokens = counts.iter().sum::<u32>() as usize;
            let hidden = random.values(tokens * HIDDEN, 1.0);
            let (got, names) = rig.traced(mode, &counts, &hidden);
            walked = walked.max(names.iter().filter(|name| name.starts_with("attention_")).count());
            let (mut expected, mut first) = (Vec::new(), 0);
            for (history, count) in histories.iter_mut().zip(counts).filter(|(_, count)| *count > 0) {
                let end = first + count as usize;
                expected.extend(rig.reference.forward(&widen(&hidden[first * HIDDEN..end * HIDDEN]), history));
                first = end;
            }
            assert_close(&got, &expected, limit(storage));
        }
        // Two sequences of 3 · 256 rows.
        assert_eq!(walked, if bindings == 1 { 6 } else { 3 }, "{storage:?}");
    }
}

/// `LlamaAttention` of transformers 5.23, line by line, on weights as they are in a checkpoint.
fn transformers(config: &GqaConfig, weights: &GqaWeights, hidden: &[f64]) -> Vec<f64> {
    let [heads, kv_heads, dim] = [config.n_head, config.n_kv_head, config.head_dim].map(|extent| extent as usize);
    let tokens = hidden.len() / HIDDEN;
    // F.linear
    let linear = |x: &[f64], weight: &[f32], bias: Option<&[f32]>| -> Vec<Vec<f64>> {
        let inner = x.len() / tokens;
        let of = |t: usize, n: usize| {
            let products = (0..inner).map(|k| x[t * inner + k] * f64::from(weight[n * inner + k]));
            products.sum::<f64>() + bias.map_or(0.0, |bias| f64::from(bias[n]))
        };
        (0..tokens).map(|t| (0..weight.len() / inner).map(|n| of(t, n)).collect()).collect()
    };
    // inv_freq = 1 / base^(arange(0, dim, 2) / dim); emb = cat(freqs, freqs)
    let angle = |t: usize, i: usize| t as f64 / config.rope.theta.powf((2 * (i % (dim / 2))) as f64 / dim as f64);
    // q * cos + rotate_half(q) * sin,  rotate_half = cat(-x2, x1)
    let rotary = |x: &[f64], t: usize| -> Vec<f64> {
        let rotate_half = |i: usize| if i < dim / 2 { -x[i + dim / 2] } else { x[i - dim / 2] };
        (0..dim).map(|i| x[i] * angle(t, i).cos() + rotate_half(i) * angle(t, i).sin()).collect()
    };
    let bias = |tensor: &Option<egmla::weights::HostTensor>| tensor.as_ref().map(|tensor| tensor.data.clone());
    let [q_bias, k_bias, v_bias] = [&weights.q_bias, &weights.k_bias, &weights.v_bias].map(bias);
    let q = linear(hidden, &weights.q_proj.data, q_bias.as_deref());
    let k = linear(hidden, &weights.k_proj.data, k_bias.as_deref());
    let v = linear(hidden, &weights.v_proj.data, v_bias.as_deref());
    // Qwen3RMSNorm over head_dim: weight * (x * rsqrt(mean(x ** 2) + eps))
    let norm = |x: &[f64], weight: &Option<egmla::weights::HostTensor>| -> Vec<f64> {
        let Some((weight, eps)) = weight.as_ref().zip(config.qk_norm_eps) else { return x.to_vec() };
        let mean = x.iter().map(|x| x * x).sum::<f64>() / dim as f64;
        x.iter().zip(&weight.data).map(|(x, w)| f64::from(*w) * (x / (mean + eps).sqrt())).collect()
    };
    let mut attended = vec![0.0; tokens * heads * dim];
    for t in 0..tokens {
        for head in 0..heads {
            // repeat_kv: each head of keys and values n_rep times, one after another
            let kv_head = head / (heads / kv_heads);
            let mut query = rotary(&norm(&q[t][head * dim..][..dim], &weights.q_norm), t);
            if let Some(QueryScaling { beta, original_max_position_embeddings: length }) = config.rope.query_scaling {
                // Ministral 3: 1 + beta * log(1 + floor(positions / max_position_embeddings))
                query.iter_mut().for_each(|q| *q *= 1.0 + beta * (1.0 + (t as f64 / length).floor()).ln());
            }
            let score = |j: usize| {
                let key = rotary(&norm(&k[j][kv_head * dim..][..dim], &weights.k_norm), j);
                query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() * (dim as f64).powf(-0.5)
            };
            let shares: Vec<f64> = (0..=t).map(|j| score(j).exp()).collect();
            let sum: f64 = shares.iter().sum();
            for i in 0..dim {
                let values = shares.iter().enumerate().map(|(j, share)| share / sum * v[j][kv_head * dim + i]);
                attended[(t * heads + head) * dim + i] = values.sum();
            }
        }
    }
    let o_bias = bias(&weights.o_bias);
    linear(&attended, &weights.o_proj.data, o_bias.as_deref()).concat()
}

#[test]
fn the_reference_is_transformers() {
    let scaled = RopeConfig { query_scaling: Some(SCALED_QUERIES), ..halves() };
    for config in [
        config(4, 2, 6),
        GqaConfig { qkv_bias: true, o_bias: true, ..config(3, 1, 8) },
        config(2, 2, 2),
        GqaConfig { rope: scaled, ..config(4, 2, 6) },
        GqaConfig { qk_norm_eps: Some(0.1), ..config(4, 2, 6) },
    ] {
        let weights = gqa_weights(&config, 5).unwrap();
        let hidden = widen(&Random::new(6).values(9 * HIDDEN, 1.0));
        let expected = transformers(&config, &weights, &hidden);
        let (layer, mut history) = (GqaLayer::new(config.clone(), &weights).unwrap(), History::default());
        let mut got = layer.forward(&hidden[..4 * HIDDEN], &mut history);
        got.extend(layer.forward(&hidden[4 * HIDDEN..], &mut history));
        let most = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(most < 1e-12, "{config:?}: {most:e}");
        // Control: pairs that are neighbours are something else.
        let other = GqaConfig { rope: RopeConfig::default(), qk_norm_eps: None, ..config.clone() };
        let plain = GqaWeights { q_norm: None, k_norm: None, ..weights.clone() };
        let other = GqaLayer::new(other, &plain).unwrap().forward(&hidden, &mut History::default());
        let apart = other.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(apart > 1e-3 || config.head_dim == 2, "{apart:e}");
    }
}

/// Beyond the length of the original training queries take a factor, by a dispatch more; up to it there is none.
#[test]
fn scaled_queries_take_a_dispatch_where_a_factor_is_not_one() {
    let config = configs().pop().unwrap();
    let mut rig = Rig::new(&config, 1, 30, Storage::F32);
    let hidden = Random::new(7).values(7 * HIDDEN, 1.0);
    let mut got = Vec::new();
    for (mode, tokens, more) in
        [(Mode::Prefill, 0..4, 0), (Mode::Decode, 4..5, 0), (Mode::Decode, 5..6, 1), (Mode::Prefill, 6..7, 1)]
    {
        let rows = tokens.start * HIDDEN..tokens.end * HIDDEN;
        let (out, names) = rig.traced(mode, &[tokens.len() as u32], &hidden[rows]);
        assert_eq!(names.len(), 4 + more, "{names:?}");
        got.extend(out);
    }
    assert_close(&got, &rig.expected(&hidden), F32_LIMIT);
    // Control: the reference without the factors.
    let plain = GqaConfig { rope: halves(), ..config.clone() };
    let plain = GqaLayer::new(plain, &gqa_weights(&config, 1).unwrap())
        .unwrap()
        .forward(&widen(&hidden), &mut History::default());
    compare(&got, &plain, Tolerance { relative: 1e-3 }).verdict.unwrap_err();
}

/// Four dispatches of a decode step, whatever the heads, the biases and the norms; a prefill has one more product.
#[test]
fn a_layer_takes_four_dispatches() {
    for config in configs().into_iter().take(7) {
        let mut rig = Rig::new(&config, 1, 30, Storage::F16);
        let hidden = Random::new(7).values(5 * HIDDEN, 1.0);
        let (_, names) = rig.traced(Mode::Prefill, &[4], &hidden[..4 * HIDDEN]);
        assert_eq!(names.len(), 4, "{names:?}");
        let (_, names) = rig.traced(Mode::Decode, &[1], &hidden[4 * HIDDEN..]);
        assert_eq!(names.len(), 4, "{names:?}");
        assert!(names[1].starts_with("heads_append") && names[3].starts_with("output_project"), "{names:?}");
    }
}

#[test]
fn projections_that_do_not_fit_one_binding_together_stay_apart() {
    let config = GqaConfig { hidden_size: 600, qkv_bias: true, ..config(4, 1, 8) };
    let hidden = Random::new(9).values(5 * 600, 1.0);
    // 4 · 8 rows of queries, 8 of keys and 8 of values, of 600 elements.
    for (binding, dispatches) in [(48 * 2400, 4), (48 * 2400 - 4, 6)] {
        let limits = wgpu::Limits { max_storage_buffer_binding_size: binding, ..Default::default() };
        let rig = &mut Rig::on(gpu_with(limits), &config, 1, 8, Storage::F32);
        let mut got = rig.step(Mode::Prefill, &[4], &hidden[..4 * 600]);
        let (one, names) = rig.traced(Mode::Decode, &[1], &hidden[4 * 600..]);
        got.extend(one);
        assert_eq!(names.len(), dispatches, "{binding}: {names:?}");
        assert_close(&got, &rig.expected(&hidden), F32_LIMIT);
    }
}

#[test]
fn what_a_cache_cannot_take_changes_nothing() {
    let config = config(4, 2, 10);
    let mut rig = Rig::new(&config, 2, 8, Storage::F32);
    let hidden = Random::new(8).values(9 * HIDDEN, 1.0);
    rig.step(Mode::Prefill, &[7, 1], &hidden[..8 * HIDDEN]);
    let prepare = |cache: &mut KvCache, mode, counts: &[u32], ids| {
        cache.prepare(mode, StepTokens { counts, ids }).map(drop).unwrap_err()
    };
    let full = prepare(&mut rig.cache, Mode::Prefill, &[2, 0], None);
    assert!(matches!(full, Error::CacheFull { sequence: 0, length: 7, added: 2, capacity: 8 }), "{full}");
    let none = prepare(&mut rig.cache, Mode::Decode, &[0, 0], None);
    assert!(matches!(none, Error::Argument(ArgumentError::Empty { .. })), "{none}");
    let few = prepare(&mut rig.cache, Mode::Decode, &[1], None);
    assert!(matches!(few, Error::Argument(ArgumentError::Count { expected: 2, found: 1, .. })), "{few}");
    let many = prepare(&mut rig.cache, Mode::Decode, &[0, 17], None);
    assert!(matches!(many, Error::Argument(ArgumentError::OutOfRange { found: 17, .. })), "{many}");
    let ids = prepare(&mut rig.cache, Mode::Decode, &[1, 0], Some(&[1, 2][..]));
    assert!(matches!(ids, Error::Argument(ArgumentError::Count { expected: 1, found: 2, .. })), "{ids}");
    let long = rig.cache.truncate(1, 2).unwrap_err();
    assert!(matches!(long, Error::Argument(ArgumentError::OutOfRange { found: 2, limit: 1, .. })), "{long}");
    assert!(rig.cache.truncate(2, 0).is_err());
    assert_eq!(rig.cache.lengths(), [7, 1]);

    // A step is of one state of one cache.
    let (input, out) = rig.upload(&hidden[..HIDDEN]);
    let mut recording = Recording::new(&rig.gpu.kernels);
    let one = StepTokens { counts: &[1, 0], ids: None };
    let stale = rig.cache.prepare(Mode::Decode, one).unwrap();
    let step = rig.cache.prepare(Mode::Decode, one).unwrap();
    let mut other = KvCache::new(&rig.attention, rig.cache.options()).unwrap();
    for (cache, step) in [(&rig.cache, &stale), (&other, &step)] {
        let error = rig.attention.forward(&mut recording, cache, step, 0, &input, &out).unwrap_err();
        assert!(matches!(error, Error::StaleStep), "{error}");
    }
    let error = rig.attention.forward(&mut recording, &rig.cache, &step, 1, &input, &out).unwrap_err();
    assert!(matches!(error, Error::Argument(ArgumentError::OutOfRange { found: 1, limit: 0, .. })), "{error}");
    let error = rig.attention.forward(&mut recording, &rig.cache, &step, 0, &input, &input).unwrap_err();
    assert!(matches!(error, Error::Buffer(_)), "{error}");
    assert_eq!(recording.dispatches(), 0);
    assert!(matches!(other.commit(step).unwrap_err(), Error::StaleStep));
    assert!(matches!(rig.cache.commit(stale).unwrap_err(), Error::StaleStep));
    assert_eq!(rig.cache.lengths(), [7, 1]);

    // Weights and configuration fit each other.
    let weights = gqa_weights(&config, 1).unwrap();
    let new = |config: &GqaConfig| GqaAttention::new(&rig.gpu.kernels, config, &weights, Storage::F32).map(drop);
    let missing = new(&GqaConfig { qkv_bias: true, ..config.clone() }).unwrap_err();
    assert!(matches!(&missing, Error::Tensor(TensorError::Missing { name, .. }) if name == "q_proj.bias"), "{missing}");
    let shape = new(&GqaConfig { n_kv_head: 1, ..config.clone() }).unwrap_err();
    assert!(matches!(&shape, Error::Tensor(TensorError::Shape { name, .. }) if name == "k_proj.weight"), "{shape}");
    let other = GqaConfig { rope: RopeConfig { theta: 9.0, ..halves() }, ..config.clone() };
    let other = GqaAttention::new(&rig.gpu.kernels, &other, &weights, Storage::F32).unwrap();
    let step = rig.cache.prepare(Mode::Decode, one).unwrap();
    let error = other.forward(&mut recording, &rig.cache, &step, 0, &input, &out).unwrap_err();
    assert!(error.to_string().contains("another configuration"), "{error}");
    rig.gpu.assert_no_errors();
}

#[test]
fn limits_are_named_before_anything_is_allocated() {
    let gpu = gpu();
    let config = config(2, 2, 64);
    let weights = gqa_weights(&config, 1).unwrap();
    let attention = GqaAttention::new(&gpu.kernels, &config, &weights, Storage::F32).unwrap();
    let new = |options| KvCache::new(&attention, options).map(drop).unwrap_err();
    // 2^20 rows of 256 elements of 4 bytes are parts of 128 MiB; 256 rows of a MiB are no part.
    let context = gpu.kernels.context();
    let long = CacheOptions { capacity: 1 << 20, ..CacheOptions::default() };
    assert_eq!(long.memory_of_heads(context, &config).unwrap().keys_and_values, 1 << 30);
    let wide = GqaConfig { n_head: 512, n_kv_head: 512, head_dim: 256, ..config.clone() };
    let error = CacheOptions::default().memory_of_heads(context, &wide).unwrap_err();
    assert!(
        matches!(error, Error::Limit { needed: 268_435_456, limit: "max_storage_buffer_binding_size", .. }),
        "{error}"
    );
    let error = new(CacheOptions { capacity: u32::MAX, ..CacheOptions::default() });
    assert!(matches!(error, Error::Argument(ArgumentError::OutOfRange { .. })), "{error}");
    for options in [
        CacheOptions { batch: 0, ..CacheOptions::default() },
        CacheOptions { capacity: 0, ..CacheOptions::default() },
        CacheOptions { n_layer: 0, ..CacheOptions::default() },
        CacheOptions { max_tokens: 0, ..CacheOptions::default() },
    ] {
        assert!(matches!(new(options), Error::Argument(ArgumentError::Empty { .. })), "{options:?}");
    }
    // What is said of the memory is what is allocated: whole splits of rows.
    let options = CacheOptions { n_layer: 3, batch: 2, capacity: 257, ..CacheOptions::default() };
    let memory = options.memory_of_heads(gpu.kernels.context(), &config).unwrap();
    assert_eq!(memory.keys_and_values, 3 * 2 * 512 * 2 * 2 * 64 * 4);
    assert_eq!(KvCache::new(&attention, options).unwrap().memory(), memory);
    gpu.assert_no_errors();
}

/// Nothing of the device is made in a step of a shape that was recorded before, and nothing grows with the steps.
#[test]
fn a_step_of_a_known_shape_allocates_a_little_and_never_more() {
    let gpu = gpu();
    let config = config(4, 2, 16);
    let weights = gqa_weights(&config, 1).unwrap();
    let attention = GqaAttention::new(&gpu.kernels, &config, &weights, Storage::F16).unwrap();
    let (n_layer, capacity) = (4, 1300);
    let options = CacheOptions { n_layer, capacity, storage: Storage::F16, ..CacheOptions::default() };
    let mut cache = KvCache::new(&attention, options).unwrap();
    let hidden = Region::from(&gpu.kernels.upload("hidden", &[0; HIDDEN * 4]).unwrap());
    let out = Region::from(&gpu.kernels.allocate("out", HIDDEN as u64 * 4).unwrap());
    let mut recording = Recording::new(&gpu.kernels);
    let mut step = || {
        let device = gpu.kernels.device();
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        let used = allocation_counter::measure(|| {
            recording.clear();
            let step = cache.prepare(Mode::Decode, StepTokens { counts: &[1], ids: None }).unwrap();
            for index in 0..n_layer {
                attention.forward(&mut recording, &cache, &step, index as usize, &hidden, &out).unwrap();
            }
            recording.record(&mut pass).unwrap();
            cache.commit(step).unwrap();
        });
        drop(pass);
        gpu.kernels.queue().submit([encoder.finish()]);
        device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
        used.count_total
    };
    let first = step();
    assert!(first > 500, "{first}: was anything counted?");
    step();
    let all: Vec<u64> = (0..1200).map(|_| step()).collect();
    let most = all.iter().max().unwrap();
    println!("{first}, then {:?} to {most}", all.iter().min().unwrap());
    // A bind group alone takes more than a dozen. A step that begins a split of 64 rows or more plans two dispatches of each layer
    // anew, and binds them as before.
    let anew = all.iter().filter(|&&step| step > 50).count();
    assert!(*most <= 120 && anew <= 1200 / 64 + 1, "{most}, {anew} steps");
    let (early, late): (u64, u64) = (all[..300].iter().sum(), all[900..].iter().sum());
    assert!(late * 10 <= early * 11, "{early} became {late}");
    assert_eq!(recording.checked_kernels().count(), 0, "the library vouches for what it adds itself");
    gpu.assert_no_errors();
}

/// What `required_limits` says is enough for a layer and its cache, and four bytes less are not.
#[test]
fn required_limits_are_the_least_that_a_layer_needs() {
    let config = config(4, 2, 8);
    let options = CacheOptions { capacity: 600_000, max_tokens: 600_000, ..CacheOptions::default() };
    let limits = config.required_limits(Storage::F32, &options).unwrap();
    // Queries, keys and values of all tokens.
    let needed = 600_000 * (4 + 2 * 2) * 8 * 4;
    assert_eq!(limits, wgpu::Limits { max_storage_buffer_binding_size: needed, ..wgpu::Limits::default() });
    let few = CacheOptions { max_tokens: 512, ..options };
    assert_eq!(config.required_limits(Storage::F32, &few).unwrap(), wgpu::Limits::default());
    let weights = gqa_weights(&config, 1).unwrap();
    for (max_storage_buffer_binding_size, enough) in [(needed, true), (needed - 4, false)] {
        let kernels = common::noop(wgpu::Limits { max_storage_buffer_binding_size, ..limits.clone() });
        let attention = GqaAttention::new(&kernels, &config, &weights, Storage::F32).unwrap();
        assert_eq!(KvCache::new(&attention, options).is_ok(), enough);
    }
}

/// Copied, grown, saved and restored, in one part and in several: each sequence goes on as if nothing had happened.
#[test]
fn sequences_move() {
    for (storage, parted) in [(Storage::F32, false), (Storage::F32, true), (Storage::F16, true)] {
        let config = config(2, 1, 16);
        let binding = if parted { (256 * 32 * storage.bytes()).max(16 << 10) } else { 128 << 20 };
        let limits = wgpu::Limits { max_storage_buffer_binding_size: binding, ..wgpu::Limits::default() };
        let weights = gqa_weights(&config, 1).unwrap();
        let gpu = gpu_with(limits);
        let attention = GqaAttention::new(&gpu.kernels, &config, &weights, storage).unwrap();
        let options = |batch, capacity| CacheOptions { batch, capacity, storage, max_tokens: 64, ..Default::default() };
        let cache = KvCache::new(&attention, options(3, 600)).unwrap();
        let reference = GqaLayer::new(config.clone(), &weights).unwrap();
        let mut rig = Rig { gpu, attention, cache, reference };
        let (mut random, mut histories) = (Random::new(4), vec![History::default(); 3]);
        let mut go_on = |rig: &mut Rig, histories: &mut Vec<History>, mode: Mode, counts: &[u32]| {
            let hidden = random.values(counts.iter().sum::<u32>() as usize * HIDDEN, 1.0);
            let got = rig.step(mode, counts, &hidden);
            let (mut expected, mut first) = (Vec::new(), 0);
            for (history, &count) in histories.iter_mut().zip(counts).filter(|(_, count)| **count > 0) {
                let end = first + count as usize;
                expected.extend(rig.reference.forward(&widen(&hidden[first * HIDDEN..end * HIDDEN]), history));
                first = end;
            }
            assert_close(&got, &expected, limit(storage));
        };
        for _ in 0..9 {
            go_on(&mut rig, &mut histories, Mode::Prefill, &[60, 4, 0]);
        }
        // Over another sequence, whose rows lie in other parts.
        let mut recording = Recording::new(&rig.gpu.kernels);
        rig.cache.copy_sequence(&mut recording, 0, 2).unwrap();
        readback::submit(&mut recording).unwrap();
        histories[2] = histories[0].clone();
        go_on(&mut rig, &mut histories, Mode::Decode, &[1, 1, 1]);
        // Into a larger cache, where sequences begin at other rows.
        let mut recording = Recording::new(&rig.gpu.kernels);
        rig.cache.grow(&mut recording, 900).unwrap();
        readback::submit(&mut recording).unwrap();
        assert_eq!((rig.cache.options().capacity, rig.cache.lengths()), (900, &[541, 37, 541][..]));
        go_on(&mut rig, &mut histories, Mode::Decode, &[1, 1, 1]);
        go_on(&mut rig, &mut histories, Mode::Prefill, &[60, 4, 0]);
        // Into bytes, and from them into another cache.
        let regions = rig.cache.sequence_regions(0).unwrap();
        assert_eq!(regions.len(), if parted { 3 } else { 1 });
        let regions: Vec<_> = regions.iter().collect();
        let rows = readback::wait(readback::read(&rig.gpu.kernels, &regions)).unwrap();
        let saved = rig.cache.save_sequence(0, &rows).unwrap();
        let mut other = KvCache::new(&rig.attention, options(2, 700)).unwrap();
        let mut recording = Recording::new(&rig.gpu.kernels);
        other.restore_sequence(&mut recording, 1, &saved).unwrap();
        readback::submit(&mut recording).unwrap();
        assert_eq!(other.lengths(), [0, 602]);
        // And from that one back, over the third sequence.
        let mut recording = Recording::new(&rig.gpu.kernels);
        rig.cache.copy_sequence_from(&mut recording, 2, &other, 1).unwrap();
        readback::submit(&mut recording).unwrap();
        histories[2] = histories[0].clone();
        go_on(&mut rig, &mut histories, Mode::Decode, &[1, 0, 1]);
        std::mem::swap(&mut rig.cache, &mut other);
        let mut restored = vec![History::default(), histories[0].clone()];
        restored[1].truncate(602);
        go_on(&mut rig, &mut restored, Mode::Decode, &[0, 1]);
        // What does not fit is refused, and nothing changes.
        let mut recording = Recording::new(&rig.gpu.kernels);
        let mut refuses = |cache: &mut KvCache, bytes: &[u8], why: &str| {
            let lengths = cache.lengths().to_vec();
            let refused = cache.restore_sequence(&mut recording, 0, bytes).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
            assert_eq!((cache.lengths(), recording.dispatches()), (&lengths[..], 0));
        };
        let mut changed = saved.clone();
        *changed.last_mut().unwrap() ^= 1;
        refuses(&mut rig.cache, &changed, "checksum");
        refuses(&mut KvCache::new(&rig.attention, options(1, 601)).unwrap(), &saved, "602");
        let theta = GqaConfig { rope: RopeConfig { theta: 9.0, ..halves() }, ..config.clone() };
        let theta = GqaAttention::new(&rig.gpu.kernels, &theta, &weights, storage).unwrap();
        let mut theta = KvCache::new(&theta, options(2, 700)).unwrap();
        refuses(&mut theta, &saved, "rope");
        let mut recording = Recording::new(&rig.gpu.kernels);
        let error = theta.copy_sequence_from(&mut recording, 0, &rig.cache, 1).unwrap_err().to_string();
        assert!(error.contains("another configuration") && theta.lengths() == [0, 0], "{error}");
        rig.gpu.assert_no_errors();
    }
}

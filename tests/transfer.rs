//! Sequences on the move: into a cache that grew, into another cache, into bytes and back; and what is refused of them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Gpu, HIDDEN, VOCAB, gpu};
use egmla::check::compare::{F16_LIMIT, F32_LIMIT, Tolerance, compare};
use egmla::config::{GateConfig, GateSite, RopeConfig};
use egmla::error::{ArgumentError, DataError};
use egmla::random::{Random, attention_weights};
use egmla::readback;
use egmla::reference::{History, Layer};
use egmla::{
    Attention, AttentionConfig, AttentionOptions, AttentionWeights, CacheOptions, DecodePath, Error, GateRows,
    LatentCache, Mode, Recording, Region, StepTokens, Storage, Tokens, wgpu,
};

const LAYERS: usize = 2;

/// Rotary pairs half a part apart: the cache holds them side by side.
fn config(site: Option<GateSite>) -> AttentionConfig {
    AttentionConfig { rope: RopeConfig { interleave: false, ..RopeConfig::default() }, ..common::config(site) }
}

/// Two layers side by side, each fed with the same hidden states.
struct Model {
    config: AttentionConfig,
    weights: Vec<AttentionWeights>,
    layers: Vec<Attention>,
    storage: Storage,
}

/// Tokens of one sequence.
#[derive(Clone)]
struct Text {
    hidden: Vec<f32>,
    ids: Vec<u32>,
}

impl Text {
    fn new(seed: u64, tokens: usize) -> Self {
        let mut random = Random::new(seed);
        Text { hidden: random.values(tokens * HIDDEN, 1.0), ids: random.ids(tokens, VOCAB) }
    }

    fn part(&self, range: std::ops::Range<usize>) -> Text {
        let hidden = self.hidden[range.start * HIDDEN..range.end * HIDDEN].to_vec();
        Text { hidden, ids: self.ids[range].to_vec() }
    }
}

impl Model {
    fn new(gpu: &Gpu, config: AttentionConfig, storage: Storage, gate_rows: GateRows) -> Self {
        let weights: Vec<_> = (0..LAYERS).map(|seed| attention_weights(&config, true, seed as u64).unwrap()).collect();
        let options = AttentionOptions { storage, gate_rows };
        let layer = |weights| Attention::new(&gpu.kernels, &config, weights, options).unwrap();
        let layers = weights.iter().map(layer).collect();
        Model { config, weights, layers, storage }
    }

    fn cache(&self, batch: u32, capacity: u32) -> LatentCache {
        let options = CacheOptions {
            n_layer: LAYERS as u32,
            batch,
            capacity,
            storage: self.storage,
            decode_path: DecodePath::Absorbed,
            ..CacheOptions::default()
        };
        LatentCache::new(&self.layers[0], options).unwrap()
    }

    /// Feeds one sequence; the outputs of both layers.
    fn feed(&self, gpu: &Gpu, cache: &mut LatentCache, sequence: usize, mode: Mode, text: &Text) -> Vec<Vec<f32>> {
        let mut counts = vec![0; cache.options().batch as usize];
        counts[sequence] = text.ids.len() as u32;
        let ids = self.config.gate.is_some().then_some(&text.ids[..]);
        let hidden = Region::from(&gpu.kernels.upload("hidden", bytemuck::cast_slice(&text.hidden)).unwrap());
        let out = || Region::from(&gpu.kernels.allocate("out", 4 * text.hidden.len() as u64).unwrap());
        let outs = [out(), out()];
        let mut recording = Recording::new(&gpu.kernels);
        let step = cache.prepare(mode, StepTokens { counts: &counts, ids }).unwrap();
        for (index, (layer, out)) in self.layers.iter().zip(&outs).enumerate() {
            layer.forward(&mut recording, cache, &step, index, &hidden, out).unwrap();
        }
        cache.commit(step).unwrap();
        readback::submit(&mut recording).unwrap();
        let regions: Vec<_> = outs.iter().collect();
        let values = readback::wait(readback::read_f32(&gpu.kernels, &regions)).unwrap();
        gpu.assert_no_errors();
        values.into_iter().map(|values| values[..text.hidden.len()].to_vec()).collect()
    }

    /// Feeds the tokens of a text from the `first`-th on, one by one, and compares them with f64 over the whole text.
    fn goes_on(&self, gpu: &Gpu, cache: &mut LatentCache, sequence: usize, text: &Text, first: usize) {
        let limit = if self.storage == Storage::F32 { F32_LIMIT } else { F16_LIMIT };
        let wide: Vec<f64> = text.hidden.iter().map(|&value| value.into()).collect();
        let ids = if self.config.gate.is_some() { &text.ids[..] } else { &[] };
        let expected: Vec<Vec<f64>> = self
            .weights
            .iter()
            .map(|weights| {
                Layer::new(self.config.clone(), weights).unwrap().forward(&wide, ids, &mut History::default())
            })
            .collect();
        for token in first..text.ids.len() {
            let got = self.feed(gpu, cache, sequence, Mode::Decode, &text.part(token..token + 1));
            for (got, expected) in got.iter().zip(&expected) {
                let expected = &expected[token * HIDDEN..][..HIDDEN];
                compare(got, expected, Tolerance { relative: limit }).verdict.unwrap();
            }
        }
    }
}

/// Every configuration, both storages, every place that gate rows come from.
fn models(gpu: &Gpu) -> Vec<Model> {
    let gated = || config(Some(GateSite::UpProjected));
    vec![
        Model::new(gpu, config(None), Storage::F16, GateRows::Recompute),
        Model::new(gpu, config(Some(GateSite::Latent)), Storage::F32, GateRows::Recompute),
        Model::new(gpu, gated(), Storage::F32, GateRows::Recompute),
        Model::new(gpu, gated(), Storage::F16, GateRows::Pool { rows: 40 }),
        Model::new(gpu, gated(), Storage::F32, GateRows::Pool { rows: 4 }),
        Model::new(gpu, gated(), Storage::F16, GateRows::Table),
    ]
}

fn submit(gpu: &Gpu, mut recording: Recording) {
    readback::submit(&mut recording).unwrap();
    gpu.assert_no_errors();
}

#[test]
fn a_cache_grows_and_its_sequences_go_on() {
    let gpu = gpu();
    for model in models(&gpu) {
        let mut cache = model.cache(3, 9);
        let texts = [Text::new(1, 12), Text::new(2, 14)];
        model.feed(&gpu, &mut cache, 0, Mode::Prefill, &texts[0].part(0..9));
        model.feed(&gpu, &mut cache, 2, Mode::Prefill, &texts[1].part(0..4));
        let ids = model.config.gate.is_some().then_some(&[3][..]);
        let full = cache.prepare(Mode::Decode, StepTokens { counts: &[1, 0, 0], ids });
        assert!(matches!(full, Err(Error::CacheFull { sequence: 0, length: 9, added: 1, capacity: 9 })));
        let stale = cache.prepare(Mode::Decode, StepTokens { counts: &[0, 0, 1], ids }).unwrap();
        let before = cache.memory();
        let mut recording = Recording::new(&gpu.kernels);
        cache.grow(&mut recording, 20).unwrap();
        submit(&gpu, recording);
        assert_eq!((cache.lengths(), cache.options().capacity), (&[9, 0, 4][..], 20));
        assert!(cache.memory().latent > 2 * before.latent);
        assert!(matches!(cache.commit(stale), Err(Error::StaleStep)));
        model.goes_on(&gpu, &mut cache, 0, &texts[0], 9);
        model.goes_on(&gpu, &mut cache, 2, &texts[1], 4);
        let mut recording = Recording::new(&gpu.kernels);
        let refused = cache.grow(&mut recording, 19);
        assert!(matches!(refused, Err(Error::Argument(ArgumentError::OutOfRange { found: 20, limit: 19, .. }))));
    }
}

#[test]
fn a_sequence_moves_to_another_cache_and_both_go_on() {
    let gpu = gpu();
    for model in models(&gpu) {
        let (mut from, mut to) = (model.cache(2, 13), model.cache(3, 16));
        let (text, other) = (Text::new(3, 13), Text::new(4, 10));
        model.feed(&gpu, &mut from, 1, Mode::Prefill, &text.part(0..11));
        // What stood there before, and what stands beside it.
        model.feed(&gpu, &mut to, 2, Mode::Prefill, &Text::new(5, 16));
        model.feed(&gpu, &mut to, 0, Mode::Prefill, &other.part(0..8));
        let mut recording = Recording::new(&gpu.kernels);
        to.copy_sequence_from(&mut recording, 2, &from, 1).unwrap();
        submit(&gpu, recording);
        assert_eq!(to.lengths(), [8, 0, 11]);
        model.goes_on(&gpu, &mut to, 2, &text, 11);
        model.goes_on(&gpu, &mut from, 1, &text, 11);
        model.goes_on(&gpu, &mut to, 0, &other, 8);
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let gpu = gpu();
    let model = Model::new(&gpu, config(None), Storage::F32, GateRows::Recompute);
    let mut from = model.cache(1, 13);
    model.feed(&gpu, &mut from, 0, Mode::Prefill, &Text::new(3, 13));
    let mut recording = Recording::new(&gpu.kernels);
    let mut small = model.cache(2, 12);
    let full = small.copy_sequence_from(&mut recording, 1, &from, 0);
    assert!(matches!(full, Err(Error::CacheFull { sequence: 1, length: 0, added: 13, capacity: 12 })), "{full:?}");
    for (to, of) in [(2, 0), (0, 1)] {
        let refused = small.copy_sequence_from(&mut recording, to, &from, of);
        assert!(matches!(refused, Err(Error::Argument(ArgumentError::OutOfRange { .. }))), "{refused:?}");
    }
    let other = Model::new(&gpu, config(Some(GateSite::Latent)), Storage::F32, GateRows::Recompute);
    let refused = other.cache(1, 20).copy_sequence_from(&mut recording, 0, &from, 0);
    assert!(matches!(refused, Err(Error::Config { .. })), "{refused:?}");
    let halves = Model::new(&gpu, config(None), Storage::F16, GateRows::Recompute);
    let refused = halves.cache(1, 20).copy_sequence_from(&mut recording, 0, &from, 0);
    assert!(matches!(refused, Err(Error::Config { .. })), "{refused:?}");
    assert_eq!((small.lengths(), recording.dispatches()), (&[0, 0][..], 0));
}

fn save(cache: &LatentCache, sequence: usize) -> Vec<u8> {
    readback::wait(readback::save_sequence(cache, sequence)).unwrap()
}

#[test]
fn a_saved_sequence_goes_on_in_a_cache_of_another_device() {
    for index in 0..models(&gpu()).len() {
        let text = Text::new(6, 12);
        let (bytes, again) = {
            let gpu = gpu();
            let model = &models(&gpu)[index];
            let mut cache = model.cache(2, 10);
            model.feed(&gpu, &mut cache, 1, Mode::Prefill, &text.part(0..9));
            // Taken back, and a step that is never committed: neither is part of what is saved.
            model.feed(&gpu, &mut cache, 1, Mode::Decode, &Text::new(7, 1));
            cache.truncate(1, 9).unwrap();
            let ids = model.config.gate.is_some().then_some(&[5][..]);
            let bytes = save(&cache, 1);
            let _step = cache.prepare(Mode::Decode, StepTokens { counts: &[0, 1], ids }).unwrap();
            (bytes, save(&cache, 1))
        };
        assert_eq!(bytes, again);
        let gpu = gpu();
        let model = &models(&gpu)[index];
        let mut cache = model.cache(3, 15);
        let mut recording = Recording::new(&gpu.kernels);
        cache.restore_sequence(&mut recording, 2, &bytes).unwrap();
        submit(&gpu, recording);
        assert_eq!(cache.lengths(), [0, 0, 9]);
        assert_eq!(save(&cache, 2), bytes);
        model.goes_on(&gpu, &mut cache, 2, &text, 9);
        // An empty one, too.
        let empty = save(&cache, 0);
        let mut recording = Recording::new(&gpu.kernels);
        cache.restore_sequence(&mut recording, 2, &empty).unwrap();
        submit(&gpu, recording);
        assert_eq!(cache.lengths(), [0, 0, 0]);
        model.goes_on(&gpu, &mut cache, 2, &text.part(0..2), 0);
    }
}

/// Bytes that were cut or changed anywhere are refused, whichever byte it is.
#[test]
fn damaged_bytes_are_refused_and_change_nothing() {
    let gpu = gpu();
    let model = Model::new(&gpu, config(Some(GateSite::UpProjected)), Storage::F16, GateRows::Pool { rows: 40 });
    let mut cache = model.cache(1, 5);
    model.feed(&gpu, &mut cache, 0, Mode::Prefill, &Text::new(8, 3));
    let bytes = save(&cache, 0);
    let mut into = model.cache(1, 8);
    let mut recording = Recording::new(&gpu.kernels);
    let mut refused = |bytes: &[u8]| {
        let error = into.restore_sequence(&mut recording, 0, bytes).expect_err("damage");
        assert!(!error.to_string().contains('\n') && into.lengths() == [0] && recording.dispatches() == 0, "{error}");
        error
    };
    for length in 0..bytes.len() {
        refused(&bytes[..length]);
    }
    for index in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[index] ^= 1;
        // White space of the header may turn into other white space: nothing is damaged then.
        if !(damaged[index] as char).is_ascii_whitespace() {
            refused(&damaged);
        }
    }
    let changed = |from: &str, to: &str| {
        let at = bytes.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
        [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat()
    };
    for (from, to, says) in [
        (r#"\"version\":1"#, r#"\"version\":2"#, "version 2, this release reads 1"),
        (r#"\"n_head\":3"#, r#"\"n_head\":4"#, "`n_head` is 4, the cache has 3"),
        (r#"\"n_layer\":2"#, r#"\"n_layer\":3"#, "3 layers in f16, the cache has 2 layers in f16"),
    ] {
        let error = refused(&changed(from, to));
        assert!(matches!(error, Error::Data(DataError::Input(_))) && error.to_string().contains(says), "{error}");
    }
    let mut small = model.cache(1, 2);
    let full = small.restore_sequence(&mut Recording::new(&gpu.kernels), 0, &bytes);
    assert!(matches!(full, Err(Error::CacheFull { sequence: 0, length: 0, added: 3, capacity: 2 })), "{full:?}");
    gpu.assert_no_errors();
}

/// What `required_limits` says is enough to build a layer and its cache and to record a step, and four bytes less are not.
#[test]
fn required_limits_are_the_least_that_a_layer_needs() {
    // `kv_b_proj`, which no shards hold, has 64 · (8 + 256) · 2048 elements: 138 MB, over the 134 MB of WebGPU's default.
    let config = AttentionConfig { n_head: 64, d_nope: 8, d_value: 256, d_latent: 2048, ..config(None) };
    let needed = 64 * (8 + 256) * 2048 * 4;
    let cache = CacheOptions { capacity: 64, max_tokens: 8, ..CacheOptions::default() };
    let limits = config.required_limits(AttentionOptions::default(), &cache).unwrap();
    assert_eq!(limits.max_storage_buffer_binding_size, needed);
    let weights = attention_weights(&config, true, 0).unwrap();
    let kernels = common::noop(limits.clone());
    let attention = Attention::new(&kernels, &config, &weights, AttentionOptions::default()).unwrap();
    let mut cache = LatentCache::new(&attention, cache).unwrap();
    let region = || Region::from(&kernels.allocate("hidden", 8 * 4 * u64::from(config.hidden_size)).unwrap());
    let mut recording = Recording::new(&kernels);
    let tokens = Tokens { counts: &[8], ids: None, hidden: region(), out: region() };
    attention.prefill(&mut recording, &mut cache, tokens).unwrap();
    assert!(recording.dispatches() > 0);
    let max_storage_buffer_binding_size = limits.max_storage_buffer_binding_size - 4;
    let less = common::noop(wgpu::Limits { max_storage_buffer_binding_size, ..limits });
    let refused = Attention::new(&less, &config, &weights, AttentionOptions::default());
    assert!(matches!(refused, Err(Error::Limit { needed: of, .. }) if of == needed), "{refused:?}");
    // Where the defaults do, they stay; what no device holds is refused; a table needs a half in each of two bindings.
    let small = self::config(Some(GateSite::UpProjected));
    let table = AttentionOptions { gate_rows: GateRows::Table, ..AttentionOptions::default() };
    let limits = small.required_limits(table, &CacheOptions::default()).unwrap();
    assert_eq!(limits, wgpu::Limits::default());
    let gate = small.gate.clone().map(|gate| GateConfig { vocab_size: 2_000_001, ..gate });
    let wide = AttentionConfig { gate, ..small.clone() };
    let limits = wide.required_limits(table, &CacheOptions::default()).unwrap();
    assert_eq!(limits.max_storage_buffer_binding_size, 1_000_001 * 3 * (8 + 16) * 4);
    let huge = CacheOptions { capacity: 1 << 30, ..CacheOptions::default() };
    assert!(matches!(small.required_limits(table, &huge), Err(Error::Limit { .. })));
}

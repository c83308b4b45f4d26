//! The layer and its cache beyond the case table: roll back, copies, several layers, memory, faults that change nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;

use common::{Gpu, HIDDEN, config, gpu, gpu_with, stored};
use egmla::attention::{
    Attention, AttentionOptions, CacheOptions, DecodePath, GateRows, LatentCache, Mode, Step, StepTokens, Tokens,
};
use egmla::check::compare::{F16_LIMIT, F32_LIMIT, Tolerance, compare};
use egmla::config::{Activation, AttentionConfig, GateNorm, GateSite};
use egmla::error::ArgumentError;
use egmla::low_level::kernels::{Matmul, attention_decode, cache_append, matmul};
use egmla::low_level::{AdapterClass, Op, PlanContext, Tuning, choose};
use egmla::random::{Random, attention_weights};
use egmla::readback;
use egmla::reference::{History, Layer};
use egmla::weights::{AttentionWeights, Checkpoint};
use egmla::{Error, Kernels, Recording, Region, Storage, wgpu};

fn mla() -> AttentionConfig {
    config(None)
}

fn gated(site: GateSite) -> AttentionConfig {
    config(Some(site))
}

/// A layer with its cache, fed through the public API.
struct Rig {
    gpu: Gpu,
    attention: Attention,
    cache: LatentCache,
    reference: Layer,
}

impl Rig {
    fn new(config: &AttentionConfig, batch: u32, capacity: u32, storage: Storage) -> Self {
        Self::with(config, batch, capacity, storage, GateRows::Recompute)
    }

    fn with(config: &AttentionConfig, batch: u32, capacity: u32, storage: Storage, gate_rows: GateRows) -> Self {
        Self::on(gpu(), config, batch, capacity, storage, gate_rows)
    }

    fn on(
        gpu: Gpu,
        config: &AttentionConfig,
        batch: u32,
        capacity: u32,
        storage: Storage,
        gate_rows: GateRows,
    ) -> Self {
        let weights = attention_weights(config, true, 1).unwrap();
        let options = AttentionOptions { storage, gate_rows };
        let attention = Attention::new(&gpu.kernels, config, &weights, options).unwrap();
        let max_tokens = batch * capacity;
        let options =
            CacheOptions { batch, capacity, storage, max_tokens, decode_tokens: 4, ..CacheOptions::default() };
        let cache = LatentCache::new(&attention, options).unwrap();
        let reference = Layer::new(config.clone(), &weights).unwrap();
        Rig { gpu, attention, cache, reference }
    }

    fn upload(&self, hidden: &[f32]) -> (Region, Region) {
        let input = self.gpu.kernels.upload("hidden", bytemuck::cast_slice(hidden)).unwrap();
        let output = self.gpu.kernels.allocate("out", 4 * hidden.len() as u64).unwrap();
        (Region::from(&input), Region::from(&output))
    }

    fn finish(&self, recording: &mut Recording, out: &Region) -> Vec<f32> {
        readback::submit(recording).unwrap();
        let values = readback::wait(readback::read_f32(&self.gpu.kernels, &[out])).unwrap().remove(0);
        self.gpu.assert_no_errors();
        values
    }

    fn prefill(&mut self, counts: &[u32], hidden: &[f32], ids: &[u32]) -> Vec<f32> {
        let (input, out) = self.upload(hidden);
        let mut recording = Recording::new(&self.gpu.kernels);
        let ids = self.attention.config().gate.is_some().then_some(ids);
        let tokens = Tokens { counts, ids, hidden: input, out: out.clone() };
        self.attention.prefill(&mut recording, &mut self.cache, tokens).unwrap();
        self.finish(&mut recording, &out)[..hidden.len()].to_vec()
    }

    fn decode(&mut self, counts: &[u32], hidden: &[f32], ids: &[u32], path: DecodePath) -> Vec<f32> {
        let (input, out) = self.upload(hidden);
        let mut recording = Recording::new(&self.gpu.kernels);
        let ids = self.attention.config().gate.is_some().then_some(ids);
        let tokens = Tokens { counts, ids, hidden: input, out: out.clone() };
        self.cache.set_decode_path(path);
        self.attention.decode(&mut recording, &mut self.cache, tokens).unwrap();
        self.finish(&mut recording, &out)[..hidden.len()].to_vec()
    }

    /// Prepares one new token.
    fn one(&mut self, id: u32) -> Step {
        let id = [id];
        let ids = self.attention.config().gate.is_some().then_some(&id[..]);
        self.cache.prepare(Mode::Decode, StepTokens { counts: &[1], ids }).unwrap()
    }

    fn expected(&self, hidden: &[f32], ids: &[u32]) -> Vec<f64> {
        let wide: Vec<f64> = hidden.iter().map(|&value| value.into()).collect();
        let ids = if self.attention.config().gate.is_some() { ids } else { &[] };
        self.reference.forward(&wide, ids, &mut History::default())
    }
}

fn rows(hidden: &[f32], range: std::ops::Range<usize>) -> &[f32] {
    &hidden[range.start * HIDDEN..range.end * HIDDEN]
}

fn assert_close(got: &[f32], expected: &[f64], limit: f64) {
    compare(got, expected, Tolerance { relative: limit }).verdict.unwrap();
}

#[test]
fn matrices_over_a_binding_are_computed_in_shards() {
    // Keys and values of a tile of 256 rows fill a binding; every projection but that of the latents is larger.
    let full = AttentionConfig {
        hidden_size: 700,
        n_head: 1,
        d_latent: 12,
        d_nope: 8,
        d_rope: 8,
        d_value: 24,
        attention_bias: true,
        ..AttentionConfig::default()
    };
    let low = AttentionConfig { d_q_latent: Some(600), ..full.clone() };
    let binding = 256 * (8 + 24) * 4;
    for (config, storage) in [(&full, Storage::F32), (&low, Storage::F32), (&low, Storage::F16)] {
        let gpu = gpu_with(wgpu::Limits { max_storage_buffer_binding_size: binding, ..wgpu::Limits::default() });
        let mut rig = Rig::on(gpu, config, 1, 8, storage, GateRows::Recompute);
        let hidden = Random::new(5).values(8 * 700, 1.0);
        let [prompt, first, second] = [0..5, 5..6, 6..8].map(|tokens| &hidden[700 * tokens.start..700 * tokens.end]);
        let mut got = rig.prefill(&[5], prompt, &[]);
        got.extend(rig.decode(&[1], first, &[], DecodePath::Absorbed));
        got.extend(rig.decode(&[2], second, &[], DecodePath::Expanded));
        let expected = rig.expected(&hidden, &[]);
        assert_close(&got, &expected, if storage == Storage::F32 { F32_LIMIT } else { F16_LIMIT });
    }
}

#[test]
fn rolling_back_and_going_on_otherwise_is_as_if_it_never_happened() {
    for config in [mla(), gated(GateSite::UpProjected), gated(GateSite::Latent)] {
        let mut rig = Rig::new(&config, 1, 16, Storage::F32);
        let mut random = Random::new(2);
        let (hidden, ids) = (random.values(10 * HIDDEN, 1.0), random.ids(10, 17));
        rig.prefill(&[6], rows(&hidden, 0..6), &ids[..6]);
        // Three tokens of another continuation, then back to four.
        let (other, other_ids) = (random.values(3 * HIDDEN, 1.0), random.ids(3, 17));
        rig.prefill(&[3], &other, &other_ids);
        assert_eq!(rig.cache.lengths(), [9]);
        rig.cache.truncate(0, 4).unwrap();
        let mut got = rig.prefill(&[4], rows(&hidden, 4..8), &ids[4..8]);
        got.extend(rig.decode(&[1], rows(&hidden, 8..9), &ids[8..9], DecodePath::Auto));
        got.extend(rig.decode(&[1], rows(&hidden, 9..10), &ids[9..10], DecodePath::Expanded));
        let expected = rig.expected(&hidden, &ids);
        assert_close(&got, &expected[4 * HIDDEN..], F32_LIMIT);
        rig.cache.reset();
        assert_eq!(rig.cache.lengths(), [0]);
        let again = rig.prefill(&[10], &hidden, &ids);
        assert_close(&again, &expected, F32_LIMIT);
    }
}

#[test]
fn a_copied_sequence_goes_its_own_way() {
    for (config, storage, limit) in
        [(gated(GateSite::UpProjected), Storage::F16, F16_LIMIT), (mla(), Storage::F32, F32_LIMIT)]
    {
        let mut rig = Rig::new(&config, 3, 12, storage);
        let mut random = Random::new(4);
        let (hidden, ids) = (random.values(7 * HIDDEN, 1.0), random.ids(7, 17));
        rig.prefill(&[0, 5, 0], rows(&hidden, 0..5), &ids[..5]);
        let mut recording = Recording::new(&rig.gpu.kernels);
        rig.cache.copy_sequence(&mut recording, 1, 2).unwrap();
        readback::submit(&mut recording).unwrap();
        assert_eq!(rig.cache.lengths(), [0, 5, 5]);
        // The two go on with different tokens; each must be as if it were alone.
        let tails: Vec<(Vec<f32>, Vec<u32>)> =
            (0..2).map(|_| (random.values(2 * HIDDEN, 1.0), random.ids(2, 17))).collect();
        let both: Vec<f32> = tails.iter().flat_map(|(hidden, _)| hidden.clone()).collect();
        let both_ids: Vec<u32> = tails.iter().flat_map(|(_, ids)| ids.clone()).collect();
        let got = rig.prefill(&[0, 2, 2], &both, &both_ids);
        for (index, (tail, tail_ids)) in tails.iter().enumerate() {
            let whole = [rows(&hidden, 0..5), tail].concat();
            let whole_ids = [&ids[..5], tail_ids].concat();
            let expected = rig.expected(&whole, &whole_ids);
            assert_close(rows(&got, 2 * index..2 * index + 2), &expected[5 * HIDDEN..], limit);
        }
    }
}

#[test]
fn a_full_cache_is_an_error_that_changes_nothing() {
    let config = gated(GateSite::UpProjected);
    let mut rig = Rig::new(&config, 2, 8, Storage::F32);
    let mut random = Random::new(6);
    let (hidden, ids) = (random.values(9 * HIDDEN, 1.0), random.ids(9, 17));
    rig.prefill(&[7, 1], rows(&hidden, 0..8), &ids[..8]);
    let (input, out) = rig.upload(rows(&hidden, 0..3));
    let mut recording = Recording::new(&rig.gpu.kernels);
    let tokens = Tokens { counts: &[2, 1], ids: Some(&ids[..3]), hidden: input, out };
    let error = rig.attention.prefill(&mut recording, &mut rig.cache, tokens).unwrap_err();
    assert!(matches!(error, Error::CacheFull { sequence: 0, length: 7, added: 2, capacity: 8 }), "{error}");
    assert_eq!(recording.dispatches(), 0);
    assert_eq!(rig.cache.lengths(), [7, 1]);
    // And it still decodes its last free row.
    let last = rows(&hidden, 8..9);
    let got = rig.decode(&[1, 0], last, &ids[8..9], DecodePath::Auto);
    let whole = [rows(&hidden, 0..7), last].concat();
    let expected = rig.expected(&whole, &[&ids[..7], &ids[8..9]].concat());
    assert_close(&got, &expected[7 * HIDDEN..], F32_LIMIT);
}

#[test]
fn wrong_arguments_are_errors_with_the_number() {
    let config = gated(GateSite::Latent);
    let mut rig = Rig::new(&config, 2, 8, Storage::F32);
    let mut plan = |counts: &[u32], ids: Option<&[u32]>, mode| {
        rig.cache.prepare(mode, StepTokens { counts, ids }).unwrap_err().to_string()
    };
    let cases = [
        (plan(&[1], Some(&[0]), Mode::Prefill), "counts of new tokens: expected 2, found 1"),
        (plan(&[0, 0], Some(&[]), Mode::Prefill), "is empty"),
        (plan(&[1, 1], None, Mode::Prefill), "token ids"),
        (plan(&[1, 1], Some(&[3]), Mode::Prefill), "token ids: expected 2, found 1"),
        (plan(&[1, 1], Some(&[3, 17]), Mode::Prefill), "token id 17 at position 1 is outside of the vocabulary of 17"),
        (plan(&[17, 0], Some(&[3; 17]), Mode::Decode), "is 17, must be at most 16"),
        (plan(&[5, 0], Some(&[3; 5]), Mode::Decode), "(the cache's decode_tokens) is 5, must be at most 4"),
        (plan(&[u32::MAX, 1], Some(&[3]), Mode::Prefill), "cache full"),
    ];
    for (found, wanted) in cases {
        assert!(found.contains(wanted), "{found} does not say {wanted}");
        assert!(!found.contains('\n'));
    }
    assert!(matches!(
        rig.cache.truncate(0, 1),
        Err(Error::Argument(ArgumentError::OutOfRange { found: 1, limit: 0, .. }))
    ));
    assert!(matches!(
        rig.cache.truncate(2, 0),
        Err(Error::Argument(ArgumentError::OutOfRange { found: 2, limit: 1, .. }))
    ));
    let mut recording = Recording::new(&rig.gpu.kernels);
    assert!(matches!(
        rig.cache.copy_sequence(&mut recording, 0, 5),
        Err(Error::Argument(ArgumentError::OutOfRange { found: 5, .. }))
    ));
    // More new tokens than the cache has buffers for.
    let options = CacheOptions { max_tokens: 1, ..rig.cache.options() };
    let mut small = LatentCache::new(&rig.attention, options).unwrap();
    let (hidden, out) = rig.upload(&[0.0; 2 * HIDDEN]);
    let tokens = Tokens { counts: &[2, 0], ids: Some(&[1, 2]), hidden, out };
    let error = rig.attention.prefill(&mut recording, &mut small, tokens);
    assert!(matches!(error, Err(Error::Argument(ArgumentError::OutOfRange { found: 2, limit: 1, .. }))));
    for (extents, what) in [((0, 1, 1), "layers"), ((1, 0, 1), "sequences"), ((1, 1, 0), "capacity")] {
        let (n_layer, batch, capacity) = extents;
        let options = CacheOptions { n_layer, batch, capacity, ..CacheOptions::default() };
        let error = LatentCache::new(&rig.attention, options).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
    // Partial results over one binding: refused with both numbers, before anything is allocated.
    let options = CacheOptions { batch: 1000, capacity: 100_000, ..rig.cache.options() };
    let error = LatentCache::new(&rig.attention, options).unwrap_err();
    assert!(matches!(error, Error::Limit { needed, .. } if needed == 1_564_000 * 3 * 16 * 4), "{error}");
}

#[test]
fn a_step_of_another_cache_or_of_an_earlier_state_is_refused() {
    let mut rig = Rig::new(&gated(GateSite::UpProjected), 1, 8, Storage::F32);
    let mut other = LatentCache::new(&rig.attention, rig.cache.options()).unwrap();
    let step = rig.one(3);
    assert!(matches!(other.commit(step), Err(Error::StaleStep)));
    assert_eq!((rig.cache.lengths(), other.lengths()), (&[0][..], &[0][..]));
    // Whatever changes the cache, and be it another step, makes a step stale, for layers as for the cache.
    let changes: [fn(&mut Rig); 4] = [
        |rig| drop(rig.one(4)),
        |rig| {
            let step = rig.one(5);
            rig.cache.commit(step).unwrap();
        },
        |rig| rig.cache.truncate(0, 0).unwrap(),
        |rig| rig.cache.reset(),
    ];
    for change in changes {
        let step = rig.one(3);
        change(&mut rig);
        let (input, out) = rig.upload(&[0.5; HIDDEN]);
        let mut recording = Recording::new(&rig.gpu.kernels);
        let error = rig.attention.forward(&mut recording, &rig.cache, &step, 0, &input, &out);
        assert!(matches!(error, Err(Error::StaleStep)), "{error:?}");
        let (lengths, distinct) = (rig.cache.lengths().to_vec(), rig.cache.distinct_ids());
        assert!(matches!(rig.cache.commit(step), Err(Error::StaleStep)));
        assert_eq!((rig.cache.lengths(), rig.cache.distinct_ids()), (&lengths[..], distinct));
    }
    // What was prepared and given up has left nothing behind.
    let hidden = Random::new(3).values(3 * HIDDEN, 1.0);
    let mut got = rig.prefill(&[2], rows(&hidden, 0..2), &[1, 2]);
    drop(rig.one(9));
    got.extend(rig.decode(&[1], rows(&hidden, 2..3), &[2], DecodePath::Absorbed));
    assert_close(&got, &rig.expected(&hidden, &[1, 2, 2]), F32_LIMIT);
    assert_eq!(rig.cache.distinct_ids(), [2]);
}

#[test]
fn layers_of_one_cache_do_not_touch_each_other() {
    let config = gated(GateSite::UpProjected);
    let gpu = gpu();
    let layers: Vec<_> = (0..3)
        .map(|seed| {
            let weights = attention_weights(&config, true, seed).unwrap();
            let attention = Attention::new(&gpu.kernels, &config, &weights, stored(Storage::F32)).unwrap();
            (attention, Layer::new(config.clone(), &weights).unwrap())
        })
        .collect();
    let options = CacheOptions { n_layer: 3, capacity: 10, ..CacheOptions::default() };
    let mut cache = LatentCache::new(&layers[0].0, options).unwrap();
    let mut random = Random::new(8);
    let (hidden, ids) = (random.values(7 * HIDDEN, 1.0), random.ids(7, 17));
    let mut got = vec![Vec::new(); 3];
    // Four tokens, then three decoded; every layer in one recording and one submission a step.
    for (mode, range) in [(Mode::Prefill, 0..4), (Mode::Decode, 4..5), (Mode::Decode, 5..6), (Mode::Decode, 6..7)] {
        let count = [range.len() as u32];
        let ids = Some(&ids[range.clone()]);
        let step = cache.prepare(mode, StepTokens { counts: &count, ids }).unwrap();
        let input = gpu.kernels.upload("hidden", bytemuck::cast_slice(rows(&hidden, range.clone()))).unwrap();
        let mut recording = Recording::new(&gpu.kernels);
        let outs: Vec<Region> = layers
            .iter()
            .enumerate()
            .map(|(index, (attention, _))| {
                let out = Region::from(&gpu.kernels.allocate("out", (4 * HIDDEN * range.len()) as u64).unwrap());
                attention.forward(&mut recording, &cache, &step, index, &Region::from(&input), &out).unwrap();
                out
            })
            .collect();
        cache.commit(step).unwrap();
        readback::submit(&mut recording).unwrap();
        let read = readback::wait(readback::read_f32(&gpu.kernels, &outs.iter().collect::<Vec<_>>()));
        for (all, new) in got.iter_mut().zip(read.unwrap()) {
            all.extend(new);
        }
    }
    gpu.assert_no_errors();
    let wide: Vec<f64> = hidden.iter().map(|&value| value.into()).collect();
    for (got, (_, reference)) in got.iter().zip(&layers) {
        assert_close(got, &reference.forward(&wide, &ids, &mut History::default()), F32_LIMIT);
    }
}

#[test]
fn a_ragged_batch_is_each_sequence_alone_and_repeats_to_the_bit() {
    let config = gated(GateSite::UpProjected);
    let mut random = Random::new(9);
    let lengths = [5u32, 1, 9];
    let parts: Vec<(Vec<f32>, Vec<u32>)> =
        lengths.iter().map(|&n| (random.values(n as usize * HIDDEN, 1.0), random.ids(n as usize, 17))).collect();
    let all: Vec<f32> = parts.iter().flat_map(|(hidden, _)| hidden.clone()).collect();
    let ids: Vec<u32> = parts.iter().flat_map(|(_, ids)| ids.clone()).collect();
    let together = Rig::new(&config, 3, 10, Storage::F32).prefill(&lengths, &all, &ids);
    let again = Rig::new(&config, 3, 10, Storage::F32).prefill(&lengths, &all, &ids);
    assert_eq!(together, again, "the same input gives the same bits");
    let alone: Vec<f32> = parts
        .iter()
        .enumerate()
        .flat_map(|(index, (hidden, ids))| {
            let mut counts = [0; 3];
            counts[index] = lengths[index];
            Rig::new(&config, 3, 10, Storage::F32).prefill(&counts, hidden, ids)
        })
        .collect();
    let wide: Vec<f64> = alone.iter().map(|&value| value.into()).collect();
    assert_close(&together, &wide, 1e-6);
}

#[test]
fn the_memory_report_is_what_is_allocated() {
    let gpu = gpu();
    let (rows, n_layer, tokens) = (3 * 20u64, 2u64, 8u64);
    for (config, storage) in [(gated(GateSite::UpProjected), Storage::F16), (mla(), Storage::F32)] {
        let weights = attention_weights(&config, true, 1).unwrap();
        let options = AttentionOptions { storage, gate_rows: GateRows::Pool { rows: 5 } };
        let attention = Attention::new(&gpu.kernels, &config, &weights, options).unwrap();
        let (batch, capacity, max_tokens) = (3, 20, tokens as u32);
        let options = CacheOptions { n_layer: 2, batch, capacity, storage, max_tokens, ..CacheOptions::default() };
        let report = LatentCache::new(&attention, options).unwrap().memory();
        // Rows of 12 and 4 elements, padded to 16 and 8.
        let (latent, rope) = (16 * storage.bytes(), 8 * storage.bytes());
        assert_eq!(report.latent, n_layer * rows * latent);
        assert_eq!(report.rope_key, n_layer * rows * rope);
        let gated = config.gate.is_some();
        // Ids of 60 rows and a line of 16 words for each of three sequences, both on 256 bytes; headers and tiers of 20
        // tokens, 12 words each.
        assert_eq!(report.lists, if gated { 4 * (64 + 64 + 3 * 20 * 12) } else { 0 });
        assert_eq!(report.statistics, if gated { n_layer * rows * 8 } else { 0 });
        // Five rows of 3 heads, 8 and 10 elements padded to 8 and 16, in f16.
        assert_eq!(report.gate_rows, if gated { n_layer * 5 * 72 * 2 } else { 0 });
        let lines = report.lines().map(|(_, bytes)| bytes);
        assert_eq!(report.total(), lines.iter().sum::<u64>());
        assert_eq!(lines.iter().filter(|bytes| **bytes > 0).count(), if gated { 6 } else { 3 });
        if gated {
            continue;
        }
        // Every buffer by hand, in words: three sequences padded to a split are 768 rows. Widths are
        // padded: latents to 16, content parts and rotary parts to 8, values to 16.
        let words = [
            8 * 3 * 16, // q
            8 * 72,     // down: queries, latent, rotary key
            768 * 16,   // tile_latent
            768,        // tile_slots
            768 * 72,   // kv
            8 * 3 * 2,  // softmax: one slice of values
            8 * 48,     // values
            3 * 3 * 16, // absorbed
            3 * 3 * 16, // partial_values
            3 * 3 * 2,  // partial_softmax
            3 * 3 * 16, // combined
            3 * 3,      // lse
        ];
        // The gate's: absent here, and no buffer is smaller than 16 bytes.
        let absent = 8 * 16;
        assert_eq!(report.workspace, 4 * words.iter().sum::<u64>() + absent);
    }
}

const GATE_ROWS: [GateRows; 4] =
    [GateRows::Recompute, GateRows::Pool { rows: 3 }, GateRows::Pool { rows: 17 }, GateRows::Table];

#[test]
fn what_a_decode_step_uploads_does_not_grow_with_the_cache() {
    let low_rank = |config| AttentionConfig { d_q_latent: Some(6), ..config };
    let cases = [(mla(), GateRows::Recompute), (low_rank(mla()), GateRows::Recompute)]
        .into_iter()
        .chain(GATE_ROWS.map(|gate_rows| (low_rank(gated(GateSite::UpProjected)), gate_rows)));
    for (config, gate_rows) in cases {
        let rig = &mut Rig::with(&config, 1, 2000, Storage::F32, gate_rows);
        let mut uploads = Vec::new();
        let mut dispatches = Vec::new();
        for length in [20u32, 700, 1200] {
            let before = rig.cache.lengths()[0];
            let hidden = vec![0.1; (length - before) as usize * HIDDEN];
            // Every id has come up, each many times.
            let ids: Vec<u32> = (before..length).map(|position| position % 17).collect();
            rig.prefill(&[length - before], &hidden, &ids);
            rig.cache.set_decode_path(DecodePath::Absorbed);
            let step = rig.one(3);
            uploads.push(step.uploaded_bytes());
            let (input, out) = rig.upload(&[0.1; HIDDEN]);
            let mut recording = Recording::new(&rig.gpu.kernels);
            rig.attention.forward(&mut recording, &rig.cache, &step, 0, &input, &out).unwrap();
            dispatches.push(recording.dispatches());
        }
        // An append may begin a tier or a chunk: two words more, but not with the length.
        let (least, most) = (uploads.iter().min().unwrap(), uploads.iter().max().unwrap());
        assert!(most - least <= 256 && *most < 8192, "{gate_rows:?}: {uploads:?}");
        assert!(dispatches.iter().all(|&count| count == dispatches[0]), "{gate_rows:?}: {dispatches:?}");
        println!("{gate_rows:?}: {} dispatches, {most} bytes", dispatches[0]);
    }
}

/// Of one layer's decode step, whatever the configuration, where the workspace holds what it attends to at once.
const MOST_DISPATCHES: usize = 9;

/// Every configuration: kind of query, site, gate rows and norm of the gate, path.
#[test]
fn a_layer_takes_nine_dispatches_a_decode_step_at_most() {
    let mut configs = vec![(mla(), GateRows::Recompute)];
    for norm in GateNorm::ALL {
        for (site, modes) in [(GateSite::Latent, &GATE_ROWS[..1]), (GateSite::UpProjected, &GATE_ROWS[..])] {
            let mut config = gated(site);
            config.gate.as_mut().unwrap().norm = norm;
            configs.extend(modes.iter().map(|&gate_rows| (config.clone(), gate_rows)));
        }
    }
    let mut most = 0;
    for (config, gate_rows) in configs {
        for (d_q_latent, storage) in [(None, Storage::F32), (Some(6), Storage::F32), (Some(6), Storage::F16)] {
            let config = AttentionConfig { d_q_latent, attention_bias: true, ..config.clone() };
            let rig = &mut Rig::with(&config, 1, 40, storage, gate_rows);
            let ids: Vec<u32> = (0..30).map(|position| position % 16).collect();
            rig.prefill(&[30], &vec![0.1; 30 * HIDDEN], &ids);
            for path in [DecodePath::Expanded, DecodePath::Absorbed] {
                rig.cache.set_decode_path(path);
                // An id that never came up: a pool takes its row in.
                let step = rig.one(16);
                let (input, out) = rig.upload(&[0.1; HIDDEN]);
                let mut recording = Recording::new(&rig.gpu.kernels);
                rig.attention.forward(&mut recording, &rig.cache, &step, 0, &input, &out).unwrap();
                // The lists and their ids are brought up to date once for all layers.
                let own: Vec<_> =
                    recording.kernel_names().filter(|name| !["word_scatter", "group_ids"].contains(name)).collect();
                let gate = config.gate.as_ref().map(|gate| (gate.site, gate.norm));
                let what = format!("{gate:?} {gate_rows:?} rank {d_q_latent:?} {storage:?} {path:?}");
                assert!(own.len() <= MOST_DISPATCHES, "{what}: {} {own:?}", own.len());
                // The configurations that the documentation names.
                let named = match (gate, path) {
                    (Some((GateSite::UpProjected, norm)), DecodePath::Absorbed) => {
                        let measured = usize::from(norm != GateNorm::None);
                        let projected = match gate_rows {
                            GateRows::Table => 0,
                            GateRows::Pool { .. } => 1,
                            GateRows::Recompute => 2,
                        };
                        4 + measured + projected
                    }
                    (None, _) => 6,
                    (Some((GateSite::Latent, _)), _) => 7,
                    (Some((GateSite::UpProjected, _)), _) => {
                        // A pool takes a row in, whatever the path.
                        8 + usize::from(gate_rows == GateRows::Pool { rows: 17 })
                    }
                };
                assert_eq!(own.len(), named, "{what}: {own:?}");
                println!("{what}: {}", own.len());
                most = most.max(own.len());
            }
        }
    }
    // What the documentation says is reached.
    assert_eq!(most, MOST_DISPATCHES);
}

/// `q_proj` or `q_a_proj` and `kv_a_proj_with_mqa` stand in one tensor on the device, unless that is too large for a binding.
#[test]
fn projections_that_do_not_fit_one_binding_together_stay_apart() {
    let (hidden, ids) = (Random::new(7).values(5 * 600, 1.0), [0; 5]);
    // 20, or 3 · (8 + 4), and 12 + 4 rows of 2400 bytes, padded to 24, 3 · (8 + 8) and 16 + 8.
    for (d_q_latent, binding, dispatches) in [
        (Some(20), (24 + 24) * 2400, 6),
        (Some(20), 64 << 10, 7),
        (None, (48 + 24) * 2400, 6),
        (None, (48 + 24) * 2400 - 4, 7),
    ] {
        let config = AttentionConfig { hidden_size: 600, d_q_latent, d_value: 8, attention_bias: true, ..mla() };
        let limits = wgpu::Limits { max_storage_buffer_binding_size: binding, ..Default::default() };
        let rig = &mut Rig::on(gpu_with(limits), &config, 1, 8, Storage::F32, GateRows::Recompute);
        let mut got = rig.prefill(&[4], &hidden[..4 * 600], &ids);
        let (input, out) = rig.upload(&hidden[4 * 600..]);
        let mut recording = Recording::new(&rig.gpu.kernels);
        rig.cache.set_decode_path(DecodePath::Absorbed);
        let tokens = Tokens { counts: &[1], ids: None, hidden: input, out: out.clone() };
        rig.attention.decode(&mut recording, &mut rig.cache, tokens).unwrap();
        let names: Vec<_> = recording.kernel_names().collect();
        assert_eq!(recording.dispatches(), dispatches, "{d_q_latent:?} {binding}: {names:?}");
        got.extend(rig.finish(&mut recording, &out));
        assert_close(&got, &rig.expected(&hidden, &ids), F32_LIMIT);
    }
}

/// Cached tokens come and go, and the absorbed path follows: against the reference and with every kind of gate rows.
#[test]
fn group_lists_follow_every_change_of_the_cache() {
    let config = gated(GateSite::UpProjected);
    for gate_rows in GATE_ROWS {
        let mut rig = Rig::with(&config, 3, 400, Storage::F32, gate_rows);
        let mut random = Random::new(8);
        let mut held: Vec<(Vec<f32>, Vec<u32>)> = vec![Default::default(); 3];
        // (sequence, tokens to take back, tokens to prefill), then a decode step of 1, 3 and 2 tokens.
        let rounds = [(0, 0, 90), (1, 0, 20), (0, 40, 0), (1, 19, 3), (2, 0, 350), (2, 300, 7), (0, 1, 1)];
        for (round, &(sequence, take, add)) in rounds.iter().enumerate() {
            let (hidden, ids) = &mut held[sequence];
            let length = ids.len() - take;
            rig.cache.truncate(sequence, length as u32).unwrap();
            hidden.truncate(length * HIDDEN);
            ids.truncate(length);
            if add > 0 {
                let mut counts = [0; 3];
                counts[sequence] = add as u32;
                // One id holds most of the cache.
                let new_ids: Vec<u32> =
                    random.ids(add, 17).into_iter().map(|id| if id % 2 == 0 { 4 } else { id }).collect();
                let new = random.values(add * HIDDEN, 1.0);
                hidden.extend(&new);
                ids.extend(&new_ids);
                rig.prefill(&counts, &new, &new_ids);
            }
            if round == 4 {
                let mut recording = Recording::new(&rig.gpu.kernels);
                rig.cache.copy_sequence(&mut recording, 0, 1).unwrap();
                readback::submit(&mut recording).unwrap();
                held[1] = held[0].clone();
            }
            if round == 5 {
                // A step that runs and is never committed: the device has its tokens, the cache does not.
                let (input, out) = rig.upload(&[0.3; 4 * HIDDEN]);
                let tokens = StepTokens { counts: &[2, 1, 1], ids: Some(&[16, 4, 16, 15]) };
                rig.cache.set_decode_path(DecodePath::Absorbed);
                let step = rig.cache.prepare(Mode::Decode, tokens).unwrap();
                let mut recording = Recording::new(&rig.gpu.kernels);
                rig.attention.forward(&mut recording, &rig.cache, &step, 0, &input, &out).unwrap();
                rig.finish(&mut recording, &out);
            }
            let active: Vec<usize> = (0..3).filter(|&s| !held[s].1.is_empty()).collect();
            let mut counts = [0; 3];
            let (mut hidden, mut ids) = (Vec::new(), Vec::new());
            for &s in &active {
                let count = [1, 3, 2][s];
                counts[s] = count as u32;
                let (new, new_ids) = (random.values(count * HIDDEN, 1.0), random.ids(count, 17));
                held[s].0.extend(&new);
                held[s].1.extend(&new_ids);
                hidden.extend(new);
                ids.extend(new_ids);
            }
            let got = rig.decode(&counts, &hidden, &ids, DecodePath::Absorbed);
            let mut first = 0;
            for &s in &active {
                let expected = rig.expected(&held[s].0, &held[s].1);
                let count = counts[s] as usize;
                let of_new = &expected[(held[s].1.len() - count) * HIDDEN..];
                assert_close(rows(&got, first..first + count), of_new, F32_LIMIT);
                first += count;
            }
        }
        let distinct = |ids: &[u32]| ids.iter().collect::<std::collections::HashSet<_>>().len() as u32;
        let expected: Vec<u32> = held.iter().map(|(_, ids)| distinct(ids)).collect();
        assert_eq!(rig.cache.distinct_ids(), expected);
        rig.cache.reset();
        assert_eq!(rig.cache.distinct_ids(), [0, 0, 0]);
        let (hidden, ids) = (random.values(2 * HIDDEN, 1.0), random.ids(2, 17));
        let mut got = rig.decode(&[0, 1, 0], rows(&hidden, 0..1), &ids[..1], DecodePath::Absorbed);
        got.extend(rig.decode(&[0, 1, 0], rows(&hidden, 1..2), &ids[1..], DecodePath::Absorbed));
        assert_close(&got, &rig.expected(&hidden, &ids), F32_LIMIT);
    }
}

/// Plain absorption, as MLA does it, is wrong where a gate stands between latent and key: the control of the grouped path.
#[test]
fn absorption_without_the_gate_is_wrong() {
    let config = gated(GateSite::UpProjected);
    let mut random = Random::new(12);
    let (hidden, ids) = (random.values(40 * HIDDEN, 1.0), random.ids(40, 17));
    let mut grouped = Rig::new(&config, 1, 40, Storage::F32);
    let expected = grouped.expected(&hidden, &ids);
    let last = &expected[39 * HIDDEN..];
    grouped.prefill(&[39], rows(&hidden, 0..39), &ids[..39]);
    let got = grouped.decode(&[1], rows(&hidden, 39..40), &ids[39..], DecodePath::Absorbed);
    assert_close(&got, last, F32_LIMIT);

    let mut weights = attention_weights(&config, true, 1).unwrap();
    weights.gate = None;
    let mut plain = Rig::new(&mla(), 1, 40, Storage::F32);
    plain.attention = Attention::new(&plain.gpu.kernels, &mla(), &weights, stored(Storage::F32)).unwrap();
    plain.prefill(&[39], rows(&hidden, 0..39), &[]);
    let got = plain.decode(&[1], rows(&hidden, 39..40), &[], DecodePath::Absorbed);
    let error = compare(&got, last, Tolerance { relative: 1e-2 });
    assert!(error.verdict.is_err() && error.relative_error > 1e-2, "{}", error.relative_error);
}

/// An f16 cache rounds the latents. The statistics of the gate's norm are those of the rounded ones, whichever path wrote them, so
/// that the paths agree as closely as with an f32 cache, in the step that writes them and in those that follow. Here all of them
/// project the gate rows; those that a pool or a table keeps in f16 are rounded themselves.
#[test]
fn what_a_step_leaves_in_an_f16_cache_does_not_depend_on_its_path() {
    for norm in [GateNorm::LayerNorm, GateNorm::RmsNorm] {
        for d_value in [8, 10] {
            let mut config = AttentionConfig { d_value, ..gated(GateSite::UpProjected) };
            config.gate.as_mut().unwrap().norm = norm;
            let mut random = Random::new(14);
            let (hidden, ids) = (random.values(12 * HIDDEN, 1.0), random.ids(12, 17));
            let mut rig = Rig::new(&config, 1, 16, Storage::F16);
            rig.prefill(&[4], rows(&hidden, 0..4), &ids[..4]);
            // As many tokens at once as are decoded at once, so that their latents are the same bits.
            let mut of_path = |path| {
                rig.cache.truncate(0, 4).unwrap();
                let mut got = rig.decode(&[4], rows(&hidden, 4..8), &ids[4..8], path);
                got.extend(rig.decode(&[4], rows(&hidden, 8..12), &ids[8..12], DecodePath::Absorbed));
                got
            };
            let (absorbed, expanded) = (of_path(DecodePath::Absorbed), of_path(DecodePath::Expanded));
            let expanded: Vec<f64> = expanded.into_iter().map(f64::from).collect();
            assert_close(&absorbed[..4 * HIDDEN], &expanded[..4 * HIDDEN], F32_LIMIT);
            assert_close(&absorbed[4 * HIDDEN..], &expanded[4 * HIDDEN..], F32_LIMIT);
        }
    }
}

/// Ids as in text: a few are most of the tokens, most appear once.
fn text_ids(random: &mut Random, tokens: usize, vocab: u32) -> Vec<u32> {
    let id = |value: f32| f64::from(vocab).powf(f64::from(value.abs() / 3.0).min(1.0)) as u32 - 1;
    random.values(tokens, 1.0).into_iter().map(id).collect()
}

#[test]
fn absorbed_decode_keeps_its_tolerance_over_32768_tokens() {
    const TOKENS: usize = 32_768;
    const NEW: usize = 4;
    let one_head = |config: AttentionConfig| AttentionConfig { n_head: 1, ..config };
    let many_ids = |mut config: AttentionConfig| {
        config.gate.as_mut().unwrap().vocab_size = 5000;
        config
    };
    let up_projected = one_head(many_ids(gated(GateSite::UpProjected)));
    // Of whole blocks of 8, for the kernel that wants them.
    let blocks = AttentionConfig { d_value: 8, ..up_projected.clone() };
    for (config, storage) in [
        (blocks.clone(), Storage::F32),
        (blocks, Storage::F16),
        (up_projected, Storage::F16),
        (one_head(many_ids(gated(GateSite::Latent))), Storage::F16),
        (one_head(mla()), Storage::F16),
    ] {
        let mut rig = Rig::new(&config, 1, TOKENS as u32, storage);
        let mut random = Random::new(3);
        let (hidden, ids) = (random.values(TOKENS * HIDDEN, 1.0), text_ids(&mut random, TOKENS, 5000));
        let distinct = ids.iter().collect::<std::collections::HashSet<_>>().len();
        assert!((500..5000).contains(&distinct), "{distinct}");
        let past = TOKENS - NEW;
        rig.prefill(&[past as u32], rows(&hidden, 0..past), &ids[..past]);
        let got = rig.decode(&[NEW as u32], rows(&hidden, past..TOKENS), &ids[past..], DecodePath::Absorbed);
        let wide: Vec<f64> = hidden.iter().map(|&value| value.into()).collect();
        let (before, new) = wide.split_at(past * HIDDEN);
        let latents = rig.reference.latents(before, &ids[..past], 0);
        let expected = rig.reference.decode_absorbed(new, &ids[past..], &latents, &ids[..past]);
        assert_close(&got, &expected, if storage == Storage::F32 { F32_LIMIT } else { F16_LIMIT });
        // The ids matter: with those of the past turned round, another answer would be right.
        if config.up_projected_gate().is_some() {
            let turned: Vec<u32> = ids[..past].iter().rev().copied().collect();
            let wrong = rig.reference.decode_absorbed(new, &ids[past..], &latents, &turned);
            compare(&got, &wrong, Tolerance { relative: 1e-2 }).verdict.unwrap_err();
        }
    }
}

#[test]
fn auto_takes_the_faster_path() {
    // A wide latent: absorbing once per id pays only where ids recur. Narrow heads would be launches and little else.
    let mut config = AttentionConfig {
        n_head: 8,
        d_latent: 128,
        d_nope: 32,
        d_rope: 4,
        d_value: 32,
        ..gated(GateSite::UpProjected)
    };
    config.gate.as_mut().unwrap().vocab_size = 100;
    let path_of = |ids: &[u32], gate_rows| {
        let mut rig = Rig::with(&config, 1, 64, Storage::F32, gate_rows);
        let (tokens, last) = ids.split_at(ids.len() - 1);
        rig.prefill(&[tokens.len() as u32], &vec![0.5; tokens.len() * HIDDEN], tokens);
        rig.one(last[0]).path()
    };
    let (distinct, equal): (Vec<u32>, Vec<u32>) = ((0..60).collect(), vec![7; 60]);
    assert_eq!(path_of(&distinct, GateRows::Recompute), DecodePath::Expanded);
    assert_eq!(path_of(&equal, GateRows::Recompute), DecodePath::Absorbed);
    // Both paths of MLA take six dispatches: a few rows are rebuilt, many are not.
    let mut rig = Rig::new(&mla(), 1, 2000, Storage::F32);
    assert_eq!(rig.one(0).path(), DecodePath::Expanded);
    rig.prefill(&[1900], &vec![0.5; 1900 * HIDDEN], &[]);
    assert_eq!(rig.one(0).path(), DecodePath::Absorbed);
}

#[test]
fn a_gate_table_over_one_binding_is_sharded_and_over_two_refused() {
    let mut config = gated(GateSite::UpProjected);
    let gate = config.gate.as_mut().unwrap();
    // Rows of 54 floats, padded to 72: 173 MB, then 576 MB, in bindings of 128 MiB.
    (gate.vocab_size, gate.d_gate) = (600_000, 1);
    let mut rig = Rig::with(&config, 1, 8, Storage::F32, GateRows::Table);
    let allowed = rig.gpu.kernels.context().limits.max_storage_buffer_binding_size;
    assert_eq!(rig.attention.gate_table_bytes(), 600_000 * 288);
    assert!(rig.attention.gate_table_bytes() > allowed, "one binding holds it: nothing was sharded");
    let hidden = Random::new(5).values(4 * HIDDEN, 1.0);
    // The first row, the last of the first shard, the first of the second, the last.
    let shard = (allowed / 288) as u32;
    let ids = [0, shard - 1, shard, 599_999];
    let mut got = rig.prefill(&[2], rows(&hidden, 0..2), &ids[..2]);
    for index in 2..4 {
        let new = rows(&hidden, index..index + 1);
        got.extend(rig.decode(&[1], new, &ids[index..=index], DecodePath::Absorbed));
    }
    assert_close(&got, &rig.expected(&hidden, &ids), F32_LIMIT);

    config.gate.as_mut().unwrap().vocab_size = 2_000_000;
    let weights = attention_weights(&config, true, 1).unwrap();
    let options = AttentionOptions { storage: Storage::F32, gate_rows: GateRows::Table };
    let error = Attention::new(&rig.gpu.kernels, &config, &weights, options).unwrap_err();
    assert!(matches!(error, Error::Limit { needed: 288_000_000, allowed: found, .. } if found == allowed), "{error}");
}

#[test]
fn a_weight_beyond_f16_is_refused_by_name() {
    let gpu = gpu();
    let mut weights = attention_weights(&mla(), true, 1).unwrap();
    weights.o_proj.data[7] = 7e4;
    let error = Attention::new(&gpu.kernels, &mla(), &weights, stored(Storage::F16)).unwrap_err();
    assert!(error.to_string().contains("o_proj.weight") && error.to_string().contains("70000"), "{error}");
    Attention::new(&gpu.kernels, &mla(), &weights, stored(Storage::F32)).unwrap();
}

#[test]
fn weights_that_do_not_match_the_configuration_are_refused_by_name() {
    let gpu = gpu();
    let full = |config: &AttentionConfig| attention_weights(config, true, 1).unwrap();
    let up = gated(GateSite::UpProjected);
    let low_rank = AttentionConfig { d_q_latent: Some(6), ..mla() };
    let biased = AttentionConfig { attention_bias: true, ..mla() };
    let wide = AttentionConfig { d_latent: 16, ..mla() };
    let mut no_norm = up.clone();
    no_norm.gate.as_mut().unwrap().norm = GateNorm::None;
    let mut short = full(&mla());
    short.o_proj.data.pop();
    let cases = [
        (up.clone(), full(&mla()), "gate_embedding.weight"),
        (mla(), full(&up), "gate_embedding.weight"),
        (no_norm, full(&up), "gate_norm.weight"),
        (low_rank.clone(), full(&mla()), "proj.weight"),
        (mla(), full(&low_rank), "proj.weight"),
        (biased.clone(), full(&mla()), "kv_a_proj_with_mqa.bias"),
        (mla(), full(&biased), "kv_a_proj_with_mqa.bias"),
        (mla(), full(&wide), "kv_a_proj_with_mqa.weight"),
        (mla(), short, "o_proj.weight"),
    ];
    for (config, weights, name) in cases {
        let error = Attention::new(&gpu.kernels, &config, &weights, stored(Storage::F32)).unwrap_err().to_string();
        assert!(error.contains(name), "`{error}` does not name {name}");
    }
}

#[test]
fn prefill_and_decode_refuse_a_cache_of_several_layers() {
    let mut rig = Rig::new(&mla(), 1, 8, Storage::F32);
    let options = CacheOptions { n_layer: 2, ..rig.cache.options() };
    rig.cache = LatentCache::new(&rig.attention, options).unwrap();
    let (hidden, out) = rig.upload(&[0.0; HIDDEN]);
    let mut recording = Recording::new(&rig.gpu.kernels);
    let Rig { attention, cache, .. } = &mut rig;
    let tokens = Tokens { counts: &[1], ids: None, hidden, out };
    let error = attention.prefill(&mut recording, cache, tokens.clone());
    assert!(matches!(error, Err(Error::Argument(ArgumentError::Count { expected: 1, found: 2, .. }))));
    let error = attention.decode(&mut recording, cache, tokens);
    assert!(matches!(error, Err(Error::Argument(ArgumentError::Count { expected: 1, found: 2, .. }))));
    assert_eq!((recording.dispatches(), cache.lengths()), (0, &[0][..]));
}

#[test]
fn a_cleared_recording_does_not_replay_the_step_before() {
    let mut rig = Rig::new(&mla(), 1, 8, Storage::F32);
    let hidden = Random::new(3).values(5 * HIDDEN, 1.0);
    let mut recording = Recording::new(&rig.gpu.kernels);
    let mut got = Vec::new();
    for range in [0..4, 4..5] {
        recording.clear();
        let (input, out) = rig.upload(rows(&hidden, range.clone()));
        let tokens = Tokens { counts: &[range.len() as u32], ids: None, hidden: input, out: out.clone() };
        rig.attention.prefill(&mut recording, &mut rig.cache, tokens).unwrap();
        got.extend(rig.finish(&mut recording, &out));
    }
    assert_close(&got, &rig.expected(&hidden, &[]), F32_LIMIT);
}

#[test]
fn a_weight_that_is_not_a_number_shows_in_the_output() {
    for storage in Storage::ALL {
        let gpu = gpu();
        let mut config = gated(GateSite::UpProjected);
        config.gate.as_mut().unwrap().activation = Activation::Tanh;
        for broken in ["kv_a_proj", "gate_embedding"] {
            let mut weights = attention_weights(&config, false, 1).unwrap();
            match broken {
                "kv_a_proj" => weights.kv_a_proj.data[3] = f32::NAN,
                _ => weights.gate.as_mut().unwrap().embedding.as_mut().unwrap().data.fill(f32::NAN),
            }
            let attention = Attention::new(&gpu.kernels, &config, &weights, stored(storage)).unwrap();
            let options = CacheOptions { capacity: 4, storage, ..CacheOptions::default() };
            let mut cache = LatentCache::new(&attention, options).unwrap();
            let hidden =
                Region::from(&gpu.kernels.upload("hidden", bytemuck::cast_slice(&[0.5f32; 2 * HIDDEN])).unwrap());
            let out = Region::from(&gpu.kernels.allocate("out", 8 * HIDDEN as u64).unwrap());
            let mut recording = Recording::new(&gpu.kernels);
            let ids = Some(&[1, 2][..]);
            let tokens = Tokens { counts: &[2], ids, hidden, out: out.clone() };
            attention.prefill(&mut recording, &mut cache, tokens).unwrap();
            readback::submit(&mut recording).unwrap();
            let got = readback::wait(readback::read_f32(&gpu.kernels, &[&out])).unwrap().remove(0);
            assert!(got.iter().all(|value| value.is_nan()), "{broken} {storage:?}: {got:?}");
        }
    }
}

#[test]
fn the_plans_of_every_class_of_adapter_are_right_here() {
    let gpu = gpu();
    let filter = [
        "layer/mla/f32",
        "layer/mla_whole_widths/f16",
        "layer/mla_low_rank_bias_yarn/f16",
        "layer/long_up_projected/f32",
        "layer/long_up_projected/f16",
    ];
    for class in AdapterClass::ALL {
        let kernels = Kernels::with_class(gpu.kernels.device(), gpu.kernels.queue(), class).unwrap();
        let kernels = kernels.with_cooperative(gpu.kernels.context().cooperative);
        let cases = egmla::check::cases();
        let mut compared = 0;
        for case in cases.iter().filter(|case| filter.contains(&case.id())) {
            for outcome in case.run(&kernels).unwrap() {
                outcome
                    .verdict
                    .unwrap_or_else(|problem| panic!("{class:?} {} {}: {problem}", case.id(), outcome.tuning));
                compared += 1;
            }
        }
        assert!(compared >= 9, "{compared}");
    }
}

/// Right to their tolerance, and a hidden state that is not a number shows in the results of its token and those after it, in no
/// other, also of the same tile of queries.
#[test]
fn layers_of_halves_use_the_adapters_cooperative_matrices_and_others_never_do() {
    let gpu = gpu();
    let offered = gpu.kernels.context().cooperative;
    let kernels = Kernels::with_class(gpu.kernels.device(), gpu.kernels.queue(), AdapterClass::Discrete).unwrap();
    let kernels = kernels.with_cooperative(offered);
    let plain = Kernels::with_class(gpu.kernels.device(), gpu.kernels.queue(), AdapterClass::Discrete).unwrap();
    let bytes = |recording: &Recording| -> [u64; 2] {
        ["attention_prefill", "gate"].map(|name| {
            recording.costs().filter(|(kernel, ..)| kernel.starts_with(name)).map(|(.., cost)| cost.bytes).sum()
        })
    };
    let size = match (offered.by_16, offered.by_8) {
        (true, _) => Some(""),
        (false, true) => Some("_8"),
        (false, false) => None,
    };
    let named = |of: &[&str], storage| match size {
        Some(size) if storage == Storage::F16 => of.iter().map(|of| format!("{of}_cooperative{size}")).collect(),
        _ => Vec::new(),
    };
    let used = |recording: &Recording| -> Vec<String> {
        let names: BTreeSet<_> = recording.kernel_names().filter(|name| name.contains("cooperative")).collect();
        names.into_iter().map(str::to_owned).collect()
    };
    println!("cooperative matrices: {offered:?}");
    // Decode takes matrices for more than four heads; by groups where they fit workgroup memory.
    let whole = |config| AttentionConfig { n_head: 5, d_latent: 24, d_nope: 16, d_rope: 8, d_value: 16, ..config };
    let grouped = AttentionConfig { d_latent: 32, ..whole(gated(GateSite::UpProjected)) };
    let held = kernels.context().limits.max_compute_workgroup_storage_size >= 32 << 10;
    let by_groups: &[&str] = if offered.by_8 || held { &["attention_grouped"] } else { &[] };
    let (tokens, decoded) = (71, 2);
    let all = Random::new(5).values((tokens + decoded) * HIDDEN, 1.0);
    let (hidden, further) = all.split_at(tokens * HIDDEN);
    let ids: Vec<u32> =
        (0..(tokens + decoded) as u32).map(|token| if token % 2 == 0 { 3 } else { token % 17 }).collect();
    let layers = [(whole(mla()), &["attention_absorbed"][..]), (grouped, by_groups)];
    let stores = [(Storage::F32, F32_LIMIT), (Storage::F16, F16_LIMIT)];
    for ((config, decodes), (storage, limit)) in
        layers.into_iter().flat_map(|layer| stores.map(|store| (layer.clone(), store)))
    {
        let weights = attention_weights(&config, true, 1).unwrap();
        let layer = Layer::new(config.clone(), &weights).unwrap();
        let ids = if config.gate.is_some() { &ids[..] } else { &[] };
        let of = |range: std::ops::Range<usize>| config.gate.is_some().then(|| &ids[range]);
        let attention = Attention::new(&kernels, &config, &weights, stored(storage)).unwrap();
        let without = {
            let attention = Attention::new(&plain, &config, &weights, stored(storage)).unwrap();
            let options = CacheOptions { capacity: 80, storage, ..CacheOptions::default() };
            let mut cache = LatentCache::new(&attention, options).unwrap();
            let room = || Region::from(&plain.allocate("room", 4 * hidden.len() as u64).unwrap());
            let new = Tokens { counts: &[tokens as u32], ids: of(0..tokens), hidden: room(), out: room() };
            let mut recording = Recording::new(&plain);
            attention.prefill(&mut recording, &mut cache, new).unwrap();
            bytes(&recording)
        };
        for broken in [None, Some(37)] {
            let decode_path = DecodePath::Absorbed;
            let options =
                CacheOptions { capacity: 80, storage, decode_path, decode_tokens: 2, ..CacheOptions::default() };
            let mut cache = LatentCache::new(&attention, options).unwrap();
            let mut input = hidden.to_vec();
            if let Some(token) = broken {
                input[token * HIDDEN] = f32::NAN;
            }
            let input = Region::from(&kernels.upload("hidden", bytemuck::cast_slice(&input)).unwrap());
            let out = Region::from(&kernels.allocate("out", 4 * hidden.len() as u64).unwrap());
            let mut recording = Recording::new(&kernels);
            let counts = [tokens as u32];
            let new = Tokens { counts: &counts, ids: of(0..tokens), hidden: input, out: out.clone() };
            attention.prefill(&mut recording, &mut cache, new).unwrap();
            assert_eq!(used(&recording), named(&["attention_prefill", "matmul"], storage), "{storage:?}");
            // Keys and values, gated or not, are halves where matrices attend to them; a cache is read in whole splits.
            let halves = size.is_some() && storage == Storage::F16;
            let saved = |rows: usize| if halves { 2 * (rows * 5 * (16 + 16)) as u64 } else { 0 };
            let read = saved(tokens.next_multiple_of(attention_decode::SPLIT as usize));
            let made = if config.gate.is_some() { saved(tokens) } else { 0 };
            let less: [u64; 2] = std::array::from_fn(|kernel| without[kernel] - bytes(&recording)[kernel]);
            assert_eq!(less, [read, made], "{storage:?}");
            readback::submit(&mut recording).unwrap();
            let got = readback::wait(readback::read_f32(&kernels, &[&out])).unwrap().remove(0);
            let whole = broken.unwrap_or(tokens) * HIDDEN;
            let wide: Vec<f64> = hidden[..whole].iter().map(|&value| value.into()).collect();
            let mut history = History::default();
            let known = if ids.is_empty() { ids } else { &ids[..whole / HIDDEN] };
            let reference = layer.forward(&wide, known, &mut history);
            compare(&got[..whole], &reference, Tolerance { relative: limit }).verdict.unwrap();
            assert!(got[whole..].iter().all(|value| value.is_nan()), "{storage:?}");

            let input = Region::from(&kernels.upload("further", bytemuck::cast_slice(further)).unwrap());
            let new = Tokens { counts: &[decoded as u32], ids: of(tokens..ids.len()), hidden: input, out: out.clone() };
            let mut recording = Recording::new(&kernels);
            attention.decode(&mut recording, &mut cache, new).unwrap();
            assert_eq!(used(&recording), named(decodes, storage), "{storage:?}");
            readback::submit(&mut recording).unwrap();
            let got = readback::wait(readback::read_f32(&kernels, &[&out])).unwrap().remove(0);
            let got = &got[..decoded * HIDDEN];
            if broken.is_none() {
                let wide: Vec<f64> = further.iter().map(|&value| value.into()).collect();
                let known = if ids.is_empty() { ids } else { &ids[tokens..] };
                let expected = layer.forward(&wide, known, &mut history);
                compare(got, &expected, Tolerance { relative: limit }).verdict.unwrap();
            } else {
                assert!(got.iter().all(|value| value.is_nan()), "{storage:?}");
            }
        }
    }
    gpu.assert_no_errors();
}

#[test]
fn no_rows_are_no_dispatch_and_a_wide_result_fits_every_class() {
    let gpu = gpu();
    let buffer = Region::from(&gpu.kernels.allocate("x", 4096).unwrap());
    let out = Region::from(&gpu.kernels.allocate("y", 4096).unwrap());
    let absent = gpu.kernels.absent();
    let mut recording = Recording::new(&gpu.kernels);
    let args = matmul::Args { x: &buffer, w: &buffer, bias: &absent, y: &out };
    let none = matmul::Matmul::linear(0, 8, 8, false, Storage::F32);
    recording.add(&none, args).unwrap();
    let few = Matmul::VARIANTS.iter().find(|variant| variant.spec.name == "matmul_gemv").unwrap();
    recording.add_variant(few, &none, args, Tuning::Auto).unwrap();
    assert_eq!(recording.dispatches(), 0);
    for class in AdapterClass::ALL {
        let wide = Matmul::linear(1, 64, 262_144, false, Storage::F32);
        few.plan(&wide, &PlanContext::webgpu_defaults(class), Tuning::Auto).unwrap();
    }
}

#[test]
fn a_tensor_over_one_binding_is_refused_when_the_layer_is_made() {
    let gpu = gpu();
    let (rows, width) = (9_000_000u32, 5);
    let mut config = gated(GateSite::UpProjected);
    let mut weights = attention_weights(&config, true, 1).unwrap();
    config.gate.as_mut().unwrap().vocab_size = rows;
    let embedding = weights.gate.as_mut().unwrap().embedding.as_mut().unwrap();
    embedding.shape = vec![rows as usize, width];
    embedding.data = vec![0.0; rows as usize * width];
    let error = Attention::new(&gpu.kernels, &config, &weights, stored(Storage::F32)).unwrap_err();
    // Rows of 5 floats, padded to 8.
    let (bytes, binding) = (rows as u64 * 8 * 4, 128 << 20);
    assert!(matches!(error, Error::Limit { needed, allowed, .. } if (needed, allowed) == (bytes, binding)), "{error}");
    assert!(error.to_string().contains("gate_embedding.weight"), "{error}");
}

#[test]
fn widths_that_overflow_are_errors_and_not_panics() {
    let context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
    for width in [u32::MAX, 1 << 30] {
        let append = cache_append::CacheAppend {
            tokens: 1,
            cache_rows: 1,
            row: 8,
            latent_offset: 0,
            d_latent: width,
            latent_used: 8,
            rope_offset: 0,
            d_rope: 0,
            rotate: false,
            queries: cache_append::Queries::default(),
            norm: None,
            gate: None,
            kept: None,
            rope_byte: 0,
            weights: Storage::F16,
            storage: Storage::F16,
        };
        let attend = attention_decode::AttentionDecode {
            split: 256,
            tokens: 1,
            most_tokens: 1,
            partials: 1,
            n_sequence: 1,
            n_head: 1,
            n_kv_head: 1,
            d_nope: width,
            d_rope: width,
            d_value: 8,
            kv_first: 0,
            kv_rows: 256,
            kv_pitch: width,
            cache_rows: 1,
            scale: 1.0,
            storage: Storage::F32,
            kv_storage: Storage::F32,
        };
        for refused in [choose(&append, &context).err(), choose(&attend, &context).err()] {
            let error = refused.unwrap().to_string();
            assert!(error.contains(&format!("{width}, must be at most 65534")), "{error}");
        }
    }
    // A configuration that nobody validated, on its way to a checkpoint.
    let bytes = [&8u64.to_le_bytes()[..], b"{}      "].concat();
    let wide = AttentionConfig { n_head: 1 << 20, d_nope: 1 << 20, ..mla() };
    let error = AttentionWeights::load(&Checkpoint::new(&bytes).unwrap(), "", &wide).unwrap_err();
    assert!(matches!(error, Error::Config { .. }), "{error}");
}

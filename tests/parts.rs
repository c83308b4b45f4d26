//! Latent caches over one binding: cut into parts, they compute what whole ones compute.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Gpu, HIDDEN, VOCAB, config, gpu, gpu_with};
use egmla::attention::cost::{DecodeWork, decode_time};
use egmla::check::compare::{F16_LIMIT, F32_LIMIT, Tolerance, compare};
use egmla::config::{AttentionConfig, GateSite};
use egmla::low_level::{AdapterClass, PlanContext};
use egmla::random::{Random, attention_weights};
use egmla::reference::{History, Layer};
use egmla::{
    Attention, AttentionOptions, CacheOptions, DecodePath, Error, GateRows, LatentCache, Mode, Recording, Region,
    StepTokens, Storage, readback, wgpu,
};

/// Two splits of 256 rows, of 64 + 8 elements each, and not a third.
const ROW: u64 = 64 + 8;
const PART_ROWS: u32 = 512;

/// A device on which such a part is the largest.
fn narrow(storage: Storage) -> Gpu {
    let most = 3 * 256 * ROW * storage.bytes() - 256;
    // Keys and values of a tile of 256 rows.
    let binding = most.max(256 * 3 * (8 + 16) * 4);
    gpu_with(wgpu::Limits { max_storage_buffer_binding_size: binding, ..wgpu::Limits::default() })
}

fn wide(site: Option<GateSite>) -> AttentionConfig {
    AttentionConfig { d_latent: 60, ..config(site) }
}

/// Tokens of every sequence.
struct Texts(Vec<(Vec<f32>, Vec<u32>)>);

impl Texts {
    fn new(seed: u64, lengths: &[usize]) -> Self {
        let mut random = Random::new(seed);
        Texts(lengths.iter().map(|&n| (random.values(n * HIDDEN, 1.0), random.ids(n, VOCAB))).collect())
    }

    /// Hidden states that no sum survives.
    fn poison(lengths: &[usize]) -> Self {
        Texts(lengths.iter().map(|&n| (vec![f32::NAN; n * HIDDEN], vec![0; n])).collect())
    }
}

/// A layer on a device, with the f64 layer beside it.
struct Rig {
    gpu: Gpu,
    attention: Attention,
    reference: Layer,
    storage: Storage,
}

impl Rig {
    fn new(gpu: Gpu, config: &AttentionConfig, storage: Storage) -> Self {
        let weights = attention_weights(config, true, 1).unwrap();
        let options = AttentionOptions { storage, gate_rows: GateRows::Recompute };
        let attention = Attention::new(&gpu.kernels, config, &weights, options).unwrap();
        Rig { gpu, attention, reference: Layer::new(config.clone(), &weights).unwrap(), storage }
    }

    fn cache(&self, batch: u32, capacity: u32) -> LatentCache {
        let options = CacheOptions {
            batch,
            capacity,
            storage: self.storage,
            max_tokens: 150,
            decode_tokens: 4,
            tile_rows: 256,
            ..CacheOptions::default()
        };
        LatentCache::new(&self.attention, options).unwrap()
    }

    /// Feeds the next tokens of every sequence of a text, from where the cache stands; their outputs, and the dispatches.
    fn feed(
        &self,
        cache: &mut LatentCache,
        path: Option<DecodePath>,
        counts: &[u32],
        texts: &Texts,
    ) -> (Vec<f32>, usize) {
        let (mut hidden, mut ids) = (Vec::<f32>::new(), Vec::<u32>::new());
        for ((&count, &length), (states, of_text)) in counts.iter().zip(cache.lengths()).zip(&texts.0) {
            let range = length as usize..(length + count) as usize;
            hidden.extend(&states[range.start * HIDDEN..range.end * HIDDEN]);
            ids.extend(&of_text[range]);
        }
        let input = Region::from(&self.gpu.kernels.upload("hidden", bytemuck::cast_slice(&hidden)).unwrap());
        let out = Region::from(&self.gpu.kernels.allocate("out", 4 * hidden.len() as u64).unwrap());
        let mut recording = Recording::new(&self.gpu.kernels);
        let ids = self.attention.config().gate.is_some().then_some(&ids[..]);
        let mode = if path.is_some() { Mode::Decode } else { Mode::Prefill };
        cache.set_decode_path(path.unwrap_or_default());
        let step = cache.prepare(mode, StepTokens { counts, ids }).unwrap();
        self.attention.forward(&mut recording, cache, &step, 0, &input, &out).unwrap();
        cache.commit(step).unwrap();
        let dispatches = recording.dispatches();
        self.submit(&mut recording);
        let values = readback::wait(readback::read_f32(&self.gpu.kernels, &[&out])).unwrap().remove(0);
        (values[..hidden.len()].to_vec(), dispatches)
    }

    fn submit(&self, recording: &mut Recording) {
        readback::submit(recording).unwrap();
        self.gpu.assert_no_errors();
    }

    /// Outputs of every token of every sequence, in f64.
    fn expected(&self, texts: &Texts) -> Vec<Vec<f64>> {
        let forward = |(hidden, ids): &(Vec<f32>, Vec<u32>)| {
            let hidden: Vec<f64> = hidden.iter().map(|&value| value.into()).collect();
            let ids = if self.attention.config().gate.is_some() { &ids[..] } else { &[] };
            self.reference.forward(&hidden, ids, &mut History::default())
        };
        texts.0.iter().map(forward).collect()
    }

    fn limit(&self) -> f64 {
        if self.storage == Storage::F32 { F32_LIMIT } else { F16_LIMIT }
    }

    /// Feeds, and compares with f64.
    fn goes_on(
        &self,
        cache: &mut LatentCache,
        path: Option<DecodePath>,
        counts: &[u32],
        (texts, expected): (&Texts, &[Vec<f64>]),
    ) -> (Vec<f32>, usize) {
        let before = cache.lengths().to_vec();
        let (got, dispatches) = self.feed(cache, path, counts, texts);
        let of_step: Vec<f64> = counts
            .iter()
            .zip(before)
            .zip(expected)
            .flat_map(|((&count, length), all)| {
                all[length as usize * HIDDEN..(length + count) as usize * HIDDEN].to_vec()
            })
            .collect();
        let compared = compare(&got, &of_step, Tolerance { relative: self.limit() });
        assert!(compared.verdict.is_ok(), "{path:?} {counts:?}: {:?}", compared.verdict);
        (got, dispatches)
    }
}

/// Sequences of a cache with room for 700 tokens are 768 rows apart: rows 512 and 1024 are within the first and the second, row
/// 1536 is the first of the third.
const CAPACITY: u32 = 700;

#[test]
fn chunks_and_decode_steps_over_a_border_are_those_of_a_whole_cache() {
    let [absorbed, expanded] = [Some(DecodePath::Absorbed), Some(DecodePath::Expanded)];
    for (site, storage) in [(None, Storage::F16), (None, Storage::F32), (Some(GateSite::Latent), Storage::F32)] {
        let config = wide(site);
        let (rig, other) = (Rig::new(narrow(storage), &config, storage), Rig::new(gpu(), &config, storage));
        let (mut cache, mut whole) = (rig.cache(3, CAPACITY), other.cache(3, CAPACITY));
        let texts = Texts::new(2, &[530, 300, 40]);
        let of_texts = (&texts, &rig.expected(&texts)[..]);
        let nan = Texts::poison(&[530, 300, 40]);
        for (rig, cache) in [(&rig, &mut cache), (&other, &mut whole)] {
            // The neighbour in the second part, and in the third, holds NaN.
            for counts in [[0, 150, 0], [0, 150, 0]] {
                let (poisoned, _) = rig.feed(cache, None, &counts, &nan);
                assert!(poisoned.iter().all(|value| value.is_nan()), "a NaN got lost: the control");
            }
            for counts in [[150, 0, 0], [150, 0, 0], [150, 0, 0], [60, 0, 30]] {
                rig.goes_on(cache, None, &counts, of_texts);
            }
            // So do the rows over the border, for a while.
            rig.feed(cache, None, &[10, 0, 3], &nan);
            assert_eq!(cache.lengths(), [520, 300, 33]);
            cache.truncate(0, 510).unwrap();
            cache.truncate(2, 30).unwrap();
            rig.goes_on(cache, absorbed, &[1, 0, 1], of_texts);
            cache.truncate(0, 510).unwrap();
            rig.goes_on(cache, None, &[10, 0, 1], of_texts);
            cache.truncate(0, 509).unwrap();
            cache.truncate(1, 0).unwrap();
            for counts in [[0, 150, 0], [0, 90, 0]] {
                rig.goes_on(cache, None, &counts, of_texts);
            }
            // A chunk that goes on in two parts at once.
            rig.goes_on(cache, None, &[5, 30, 2], of_texts);
            assert_eq!(cache.lengths(), [514, 270, 34]);
        }
        for (to, path, counts, parts) in [
            // Candidates on both sides of both borders, then behind one of them.
            ([510, 254, 30], absorbed, [4, 4, 4], [4, 4]),
            ([510, 254, 30], expanded, [4, 4, 4], [4, 4]),
            ([511, 255, 30], absorbed, [1, 1, 1], [3, 3]),
            ([511, 255, 30], expanded, [3, 2, 1], [4, 4]),
            ([514, 257, 20], absorbed, [1, 0, 2], [3, 2]),
            ([514, 256, 20], absorbed, [0, 1, 0], [2, 1]),
            ([514, 257, 20], Some(DecodePath::Auto), [1, 1, 1], [4, 3]),
        ] {
            let step = [(&rig, &mut cache), (&other, &mut whole)].map(|(rig, cache)| {
                for (sequence, length) in to.into_iter().enumerate() {
                    cache.truncate(sequence, length).unwrap();
                }
                rig.goes_on(cache, path, &counts, of_texts)
            });
            let [(got, dispatches), (expected, of_whole)] = step;
            if path == absorbed {
                assert_eq!(got, expected, "{site:?} {counts:?}: the same partial results, wherever their rows are");
                let [attended, appended] = parts;
                assert_eq!(dispatches - of_whole, attended - 1 + appended - 1, "{to:?} {counts:?}");
            }
        }
    }
}

#[test]
fn sequences_move_between_caches_with_other_parts() {
    for (site, storage) in [(None, Storage::F16), (Some(GateSite::Latent), Storage::F32)] {
        let config = wide(site);
        let rig = Rig::new(narrow(storage), &config, storage);
        let texts = Texts::new(3, &[530, 280, 40]);
        let expected = rig.expected(&texts);
        let mut cache = rig.cache(3, CAPACITY);
        for counts in [[150, 0, 0], [150, 0, 0], [150, 0, 0], [66, 80, 0], [0, 150, 0], [0, 40, 30]] {
            rig.feed(&mut cache, None, &counts, &texts);
        }
        assert_eq!(cache.lengths(), [516, 270, 30]);
        // The tokens of one sequence of the text, in the place of another.
        let placed = |places: &[usize]| {
            let text = Texts(places.iter().map(|&place| texts.0[place].clone()).collect());
            (text, places.iter().map(|&place| expected[place].clone()).collect::<Vec<_>>())
        };
        // Within a cache, over a border: the third sequence becomes the first.
        let mut recording = Recording::new(&rig.gpu.kernels);
        cache.copy_sequence(&mut recording, 0, 2).unwrap();
        rig.submit(&mut recording);
        let (text, outputs) = placed(&[0, 1, 0]);
        for path in [DecodePath::Absorbed, DecodePath::Expanded] {
            rig.goes_on(&mut cache, Some(path), &[1, 1, 2], (&text, &outputs));
        }
        assert_eq!(cache.lengths(), [518, 272, 520]);
        // Into a cache with one part, which then grows into several.
        let mut small = rig.cache(1, 290);
        let mut recording = Recording::new(&rig.gpu.kernels);
        small.copy_sequence_from(&mut recording, 0, &cache, 1).unwrap();
        rig.submit(&mut recording);
        let (text, outputs) = placed(&[1]);
        rig.goes_on(&mut small, Some(DecodePath::Absorbed), &[1], (&text, &outputs));
        let one_part = small.sequence_regions(0).unwrap().len();
        let mut recording = Recording::new(&rig.gpu.kernels);
        small.grow(&mut recording, 1200).unwrap();
        rig.submit(&mut recording);
        assert_eq!((small.lengths(), small.sequence_regions(0).unwrap().len()), (&[273][..], one_part));
        rig.goes_on(&mut small, Some(DecodePath::Absorbed), &[2], (&text, &outputs));
        // Into one whose borders are elsewhere, and back into the place of another sequence.
        let mut elsewhere = rig.cache(2, 1025);
        let mut recording = Recording::new(&rig.gpu.kernels);
        elsewhere.copy_sequence_from(&mut recording, 1, &cache, 0).unwrap();
        cache.copy_sequence_from(&mut recording, 1, &elsewhere, 1).unwrap();
        rig.submit(&mut recording);
        let (text, outputs) = placed(&[0, 0, 0]);
        rig.goes_on(&mut cache, Some(DecodePath::Absorbed), &[1, 1, 1], (&text, &outputs));
        rig.goes_on(&mut elsewhere, Some(DecodePath::Expanded), &[0, 1], (&text, &outputs));
        // As bytes, which know nothing of parts, into a whole cache of another device and back.
        let save = |cache: &LatentCache, sequence| readback::wait(readback::save_sequence(cache, sequence)).unwrap();
        assert!(elsewhere.sequence_regions(1).unwrap().len() > one_part, "no border within what is saved");
        let bytes = save(&elsewhere, 1);
        let other = Rig::new(gpu(), &config, storage);
        let mut whole = other.cache(1, 600);
        let mut recording = Recording::new(&other.gpu.kernels);
        whole.restore_sequence(&mut recording, 0, &bytes).unwrap();
        other.submit(&mut recording);
        assert_eq!(save(&whole, 0), bytes);
        other.goes_on(&mut whole, Some(DecodePath::Absorbed), &[1], (&text, &outputs));
        let mut recording = Recording::new(&rig.gpu.kernels);
        cache.restore_sequence(&mut recording, 1, &save(&whole, 0)).unwrap();
        rig.submit(&mut recording);
        assert_eq!(cache.lengths(), [519, 520, 521]);
        assert_eq!(save(&cache, 1), save(&whole, 0));
        rig.goes_on(&mut cache, Some(DecodePath::Expanded), &[1, 1, 1], (&text, &outputs));
    }
}

/// The model of time counts the dispatches that a step over several parts records.
#[test]
fn a_dispatch_per_part_is_counted() {
    let (config, storage) = (wide(None), Storage::F32);
    let rig = Rig::new(narrow(storage), &config, storage);
    let mut cache = rig.cache(1, 1200);
    let texts = Texts::new(4, &[1100]);
    for (cached, parts) in [(500, 1), (700, 2), (1024, 3)] {
        while cache.lengths()[0] < cached {
            let count = 150.min(cached - cache.lengths()[0]);
            rig.feed(&mut cache, None, &[count], &texts);
        }
        for path in [DecodePath::Absorbed, DecodePath::Expanded] {
            cache.truncate(0, cached).unwrap();
            let (_, recorded) = rig.feed(&mut cache, Some(path), &[1], &texts);
            let work = DecodeWork { parts, ..DecodeWork::one(cached + 1, 0, 0, storage) };
            let time = decode_time(rig.gpu.kernels.context(), &config, &work, path, 256, storage);
            assert_eq!(recorded, time.dispatches as usize, "{path:?}, {cached}");
        }
    }
}

#[test]
fn the_parts_of_a_cache_add_up() {
    for storage in Storage::ALL {
        let rig = Rig::new(narrow(storage), &wide(None), storage);
        // Three sequences of 768 rows: four parts of 512 rows, and half of one.
        let report = rig.cache(3, CAPACITY).memory();
        assert_eq!((report.latent, report.rope_key), (2304 * 64 * storage.bytes(), 2304 * 8 * storage.bytes()));
        // One part: as many rows as tokens.
        let report = rig.cache(1, PART_ROWS - 3).memory();
        assert_eq!((report.latent, report.rope_key), (509 * 64 * storage.bytes(), 509 * 8 * storage.bytes()));
    }
}

/// 128k tokens of DeepSeek-V3's layers need no more than what every browser offers; with the gate at `up_projected` they do.
#[test]
fn the_longest_contexts_run_on_webgpus_default_limits() {
    let config = AttentionConfig::from_json(
        r#"{"hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}"#,
    )
    .unwrap();
    for class in [AdapterClass::Discrete, AdapterClass::Integrated, AdapterClass::Software] {
        let context = PlanContext::webgpu_defaults(class);
        for (storage, bytes) in [(Storage::F16, 2), (Storage::F32, 4)] {
            let options = CacheOptions { n_layer: 61, capacity: 131_072, storage, ..CacheOptions::default() };
            let report = options.memory(&context, &config, GateRows::Recompute).unwrap();
            assert_eq!(report.latent, 61 * 131_072 * 512 * bytes);
            assert_eq!(report.rope_key, 61 * 131_072 * 64 * bytes);
            let limits = config.required_limits(AttentionOptions::default(), &options).unwrap();
            assert_eq!(limits, wgpu::Limits::default());
            let gate = common::config(Some(GateSite::UpProjected)).gate;
            let gated = AttentionConfig { gate, ..config.clone() };
            let refused = options.memory(&context, &gated, GateRows::Recompute).unwrap_err();
            let rows = 131_072 * ((512 + 64) * bytes + 8);
            assert!(
                matches!(&refused, Error::Limit { needed, allowed: 134_217_728, .. } if *needed == rows),
                "{refused}"
            );
        }
    }
    // One split is not cut.
    let context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
    let vast = AttentionConfig { n_head: 1, d_latent: 131_072, ..config };
    let options = CacheOptions { capacity: 257, tile_rows: 1, ..CacheOptions::default() };
    let refused = options.memory(&context, &vast, GateRows::Recompute).unwrap_err();
    assert!(refused.to_string().contains("latents and rotary keys of 256 cache rows"), "{refused}");
}

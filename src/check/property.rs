//! Random layer cases: a configuration and a history of prefills, decode steps, roll backs, copies and abandoned steps, against
//! the f64 reference. A case is one line of JSON that runs again anywhere, and shrinks to a smaller one that still fails.
//!
//! Pipelines are keyed by override constants, and compiling one takes far longer than running a case. So configurations come as a
//! [`family`], with many histories each; shrinking may leave the family.
//!
//! ```no_run
//! # fn run(device: &egmla::wgpu::Device, queue: &egmla::wgpu::Queue) -> egmla::Result<()> {
//! use egmla::check::property;
//! let kernels = egmla::Kernels::new(device, queue)?;
//! let report = property::search(&kernels, queue, property::Search { seed: 1, configurations: 8, cases: 100 })?;
//! if let Some(failure) = report.failure {
//!     println!("{}\n{}", failure.problem, failure.case.to_json());
//! }
//! # Ok(()) }
//! ```

use serde::{Deserialize, Serialize};

use super::compare::{Comparison, F16_LIMIT, F32_LIMIT, Tolerance, compare};
use super::guarded::{Guarded, POISON};
use crate::attention::{
    Attention, AttentionOptions, CacheOptions, DecodePath, GateRows, LatentCache, MOST_DECODED, Mode, StepTokens,
};
use crate::config::{Activation, AttentionConfig, GateConfig, GateNorm, GateSite, RopeConfig, RopeScaling};
use crate::device::Kernels;
use crate::error::{ArgumentError, DeviceError, Error, Result};
use crate::random::{Random, attention_weights};
use crate::readback;
use crate::recording::Recording;
use crate::reference::{History, Layer};
use crate::storage::Storage;
use crate::weights::AttentionWeights;

/// How positions rotate queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rope {
    /// Pairs (2i, 2i+1).
    Neighbours,
    /// Pairs (i, i + d_rope/2).
    Halves,
    /// Neighbours, frequencies divided by 4.
    Linear,
    /// Neighbours, YaRN past 24 positions.
    Yarn,
}

/// A layer: the fields of [`AttentionConfig`] and of its gate, and the seed of its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the names of AttentionConfig, documented there")]
pub struct Shape {
    pub hidden_size: u32,
    pub n_head: u32,
    pub d_latent: u32,
    pub d_q_latent: Option<u32>,
    pub d_nope: u32,
    pub d_rope: u32,
    pub d_value: u32,
    pub attention_bias: bool,
    /// Whether there is a `kv_a_layernorm`.
    pub kv_a_norm: bool,
    pub rope: Rope,
    pub gate: Option<GateConfig>,
    /// Of weights and cache.
    pub storage: Storage,
    /// Of the weights.
    pub seed: u64,
}

/// An event of the cache's history.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// New tokens of each sequence, any number.
    Prefill {
        /// Tokens of each sequence.
        counts: Vec<u32>,
        /// Seed of their hidden states and ids.
        seed: u64,
    },
    /// New tokens of each sequence, up to [`MOST_DECODED`].
    Decode {
        /// Tokens of each sequence.
        counts: Vec<u32>,
        /// By which kernels.
        path: DecodePath,
        /// Seed of their hidden states and ids.
        seed: u64,
    },
    /// A decode step that runs and is never committed: the device has its tokens, the cache does not.
    GiveUp {
        /// Tokens of each sequence.
        counts: Vec<u32>,
        /// By which kernels.
        path: DecodePath,
        /// Seed of their hidden states and ids.
        seed: u64,
    },
    /// A sequence loses its last tokens.
    TakeBack {
        /// The sequence.
        sequence: usize,
        /// Number of tokens.
        tokens: u32,
    },
    /// One sequence becomes a copy of another.
    Copy {
        /// The one that is copied.
        from: usize,
        /// The one that it replaces.
        to: usize,
    },
    /// Every sequence loses every token.
    Reset,
}

/// Token ids of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ids {
    /// Any of the vocabulary.
    Any,
    /// One id is every token.
    Equal,
    /// One id is a third of the tokens.
    Skewed,
    /// As many ids as the vocabulary has.
    Distinct,
    /// The same, the last id first.
    Reversed,
}

/// Most elements of a tensor of a case that is read; what is drawn stays far below.
const MOST_ELEMENTS: u64 = 1 << 24;

/// A layer and what happens to its cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerCase {
    /// The layer.
    pub shape: Shape,
    /// Sequences of the cache.
    pub batch: u32,
    /// Tokens of each sequence.
    pub capacity: u32,
    /// Cache rows whose keys and values are rebuilt at once.
    pub tile_rows: u32,
    /// Source of gate rows.
    pub gate_rows: GateRows,
    /// The law of the token ids.
    pub ids: Ids,
    /// In this order.
    pub events: Vec<Event>,
}

impl Shape {
    /// As the layer takes it.
    pub fn config(&self) -> AttentionConfig {
        let scaling = match self.rope {
            Rope::Neighbours | Rope::Halves => RopeScaling::None,
            Rope::Linear => RopeScaling::Linear { factor: 4.0 },
            Rope::Yarn => RopeScaling::Yarn {
                factor: 8.0,
                original_max_position_embeddings: 24.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                mscale: Some(1.0),
                mscale_all_dim: Some(0.7),
                attention_factor: None,
            },
        };
        AttentionConfig {
            hidden_size: self.hidden_size,
            n_head: self.n_head,
            d_latent: self.d_latent,
            d_q_latent: self.d_q_latent,
            d_nope: self.d_nope,
            d_rope: self.d_rope,
            d_value: self.d_value,
            attention_bias: self.attention_bias,
            gate: self.gate.clone(),
            rope: RopeConfig { theta: 10000.0, interleave: self.rope != Rope::Halves, scaling },
        }
    }

    /// Refuses cases that would take too much memory.
    fn check_size(&self, batch: u32, capacity: u32) -> Result<()> {
        let Shape { hidden_size, n_head, d_latent, d_q_latent, d_nope, d_rope, d_value, .. } = *self;
        let product = |extents: &[u32]| extents.iter().fold(1, |all: u64, &extent| all.saturating_mul(extent.into()));
        let heads = n_head.saturating_mul(d_nope.saturating_add(d_rope.max(d_value)));
        let low = d_latent.saturating_add(d_rope).saturating_add(d_q_latent.unwrap_or(0));
        let (vocab, d_gate) = self.gate.as_ref().map_or((0, 1), |gate| (gate.vocab_size, gate.d_gate));
        let row = hidden_size.max(heads).max(low);
        for (what, found) in [
            ("shape: elements of its largest weight", product(&[row, hidden_size.max(low).max(d_gate)])),
            ("shape: elements of its gate table", product(&[vocab, d_gate.max(heads)])),
            ("batch × capacity × the widest row", product(&[batch, capacity, row])),
        ] {
            if found > MOST_ELEMENTS {
                return Err(Error::Argument(ArgumentError::OutOfRange { what, found, limit: MOST_ELEMENTS }));
            }
        }
        Ok(())
    }

    /// Relative error that its results may show.
    pub fn tolerance(&self) -> Tolerance {
        let relative = match self.storage {
            Storage::F32 => F32_LIMIT,
            Storage::F16 => F16_LIMIT,
        };
        Tolerance { relative }
    }

    fn vocab(&self) -> u32 {
        self.gate.as_ref().map_or(1, |gate| gate.vocab_size)
    }

    fn draw(random: &mut Random, index: usize) -> Shape {
        // Every third configuration has whole 16-byte loads in every row, which is what many kernels ask for.
        let aligned = index.is_multiple_of(3);
        let mut one_of = |of: &[u32]| of[random.ids(1, of.len() as u32)[0] as usize];
        let width = |of: [&'static [u32]; 2]| of[usize::from(aligned)];
        let (hidden_size, n_head) = (one_of(&[17, 24, 37, 40]), one_of(&[1, 2, 3, 5, 9]));
        let d_latent = one_of(width([&[7, 13, 20, 33], &[8, 24, 32, 64]]));
        let d_nope = one_of(width([&[0, 5, 7, 12], &[8, 16, 24]]));
        let d_rope = one_of(width([&[0, 2, 6, 8], &[0, 8, 16]]));
        // Queries of some width.
        let d_rope = if d_nope == 0 { d_rope.max(4) } else { d_rope };
        let d_value = one_of(width([&[3, 7, 10, 33], &[8, 16, 24]]));
        let d_q_latent = Some(one_of(&[0, 6, 14])).filter(|&rank| rank > 0);
        // A third each: plain MLA, the gate at the keys and values (half of all), the gate at the latent.
        let gate = match one_of(&[0, 1, 2, 2]) {
            0 => None,
            site => Some(GateConfig {
                vocab_size: one_of(&[1, 5, 23, 97]),
                d_gate: one_of(&[1, 3, 6, 16]),
                site: if site == 1 { GateSite::Latent } else { GateSite::UpProjected },
                activation: Activation::ALL[one_of(&[0, 1, 2, 3, 4]) as usize],
                norm: GateNorm::ALL[one_of(&[0, 1, 2]) as usize],
                norm_eps: 1e-5,
            }),
        };
        let rope = [Rope::Neighbours, Rope::Halves, Rope::Linear, Rope::Yarn][one_of(&[0, 1, 2, 3]) as usize];
        let [attention_bias, kv_a_norm] = [one_of(&[0, 1]) == 1, one_of(&[0, 1, 1]) == 1];
        Shape {
            hidden_size,
            n_head,
            d_latent,
            d_q_latent,
            d_nope,
            d_rope,
            d_value,
            attention_bias,
            kv_a_norm,
            rope,
            gate,
            // In turns, not by chance: few configurations have both, and both with and without whole loads.
            storage: if index % 2 == 1 { Storage::F16 } else { Storage::F32 },
            seed: index as u64,
        }
    }
}

/// Configurations of a seed, each drawn when it is asked for.
pub fn family(seed: u64, configurations: usize) -> impl Iterator<Item = Shape> {
    let mut random = Random::new(seed);
    (0..configurations).map(move |index| Shape::draw(&mut random, index))
}

/// A layer: its weights, for the device, and what they mean in f64.
pub struct Prepared {
    config: AttentionConfig,
    weights: AttentionWeights,
    reference: Layer,
}

impl Prepared {
    /// The layer of a shape, with random weights.
    ///
    /// # Errors
    /// A shape that contradicts itself.
    pub fn new(shape: &Shape) -> Result<Self> {
        let config = shape.config();
        let weights = attention_weights(&config, shape.kv_a_norm, shape.seed)?;
        Ok(Self::of(config, weights))
    }

    /// A layer of any weights.
    pub fn of(config: AttentionConfig, weights: AttentionWeights) -> Self {
        Prepared { reference: Layer::new(config.clone(), &weights), config, weights }
    }
}

/// New tokens of a step: hidden states, sequence after sequence, and ids.
struct Tokens {
    hidden: Vec<f32>,
    ids: Vec<u32>,
}

impl LayerCase {
    /// A history for a layer: ragged and chunked, with roll backs, copies and abandoned steps.
    pub fn draw(shape: Shape, random: &mut Random) -> LayerCase {
        let mut below = |limit: u32| random.ids(1, limit.max(1))[0];
        let batch = 1 + below(4);
        // Mostly shorter than a split of 256 cache rows, now and then two or three splits.
        let capacity = if below(12) == 0 { 250 + below(400) } else { 1 + below(48) };
        let gate_rows = match below(4) {
            0 => GateRows::Table,
            1 => GateRows::Pool { rows: 1 + below(shape.vocab() + 2) },
            _ => GateRows::Recompute,
        };
        let ids = [Ids::Any, Ids::Any, Ids::Equal, Ids::Skewed, Ids::Distinct][below(5) as usize];
        let tile_rows = [1, 256, 512][below(3) as usize];
        let mut lengths = vec![0u32; batch as usize];
        let mut events = Vec::new();
        for _ in 0..1 + below(7) {
            let event = match below(12) {
                0 => Event::TakeBack { sequence: below(batch) as usize, tokens: below(capacity) },
                1 => Event::Copy { from: below(batch) as usize, to: below(batch) as usize },
                2 if below(4) == 0 => Event::Reset,
                kind => {
                    let decode = kind > 6;
                    let most = if decode { MOST_DECODED } else { capacity };
                    let count = |&length: &u32| {
                        let room = (capacity - length).min(most);
                        match below(4) {
                            0 => 0,
                            1 => room.min(1),
                            // One token or all that fit as often as any number between.
                            2 => room,
                            _ => below(room + 1),
                        }
                    };
                    let counts: Vec<u32> = lengths.iter().map(count).collect();
                    let path = [DecodePath::Auto, DecodePath::Expanded, DecodePath::Absorbed, DecodePath::Absorbed]
                        [below(4) as usize];
                    let seed = below(1 << 20).into();
                    match (decode, below(8)) {
                        (false, _) => Event::Prefill { counts, seed },
                        (true, 0) => Event::GiveUp { counts, path, seed },
                        (true, _) => Event::Decode { counts, path, seed },
                    }
                }
            };
            // Events without effect, as a step without tokens, are left out.
            if let Some(after) = event.applied(&lengths, capacity) {
                lengths = after;
                events.push(event);
            }
        }
        LayerCase { shape, batch, capacity, tile_rows, gate_rows, ids, events }
    }

    /// One line that [`LayerCase::from_json`] reads.
    pub fn to_json(&self) -> String {
        // Plain structs of numbers and names: serialising cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads a case.
    ///
    /// # Errors
    /// `DataError::Json` for another text, [`Error::Config`] for an impossible case, `ArgumentError::OutOfRange` for one that is
    /// too large.
    pub fn from_json(text: &str) -> Result<LayerCase> {
        let case: LayerCase = serde_json::from_str(text)?;
        case.shape.config().validate()?;
        case.shape.check_size(case.batch, case.capacity)?;
        if !case.possible() {
            return Err(Error::config("events", "do not fit the cache, or hold no new token"));
        }
        Ok(case)
    }

    /// Whether every event fits the cache, and one at least has tokens to compare.
    fn possible(&self) -> bool {
        let mut lengths = vec![0; self.batch as usize];
        for event in &self.events {
            match event.applied(&lengths, self.capacity) {
                Some(after) => lengths = after,
                None => return false,
            }
        }
        self.shape.config().validate().is_ok() && self.events.iter().any(|event| event.tokens() > 0)
    }

    /// A token's hidden state and id follow from the seed, its sequence and its position alone: tokens of one seed are the same
    /// however they are cut into steps, and those that shrinking keeps stay what they were.
    fn tokens(&self, counts: &[u32], lengths: &[u32], seed: u64) -> Tokens {
        let vocab = self.shape.vocab();
        let (mut hidden, mut ids) = (Vec::new(), Vec::new());
        for (sequence, (&length, &count)) in (0u64..).zip(lengths.iter().zip(counts)) {
            for position in length..length + count {
                let of_token = seed << 40 ^ sequence << 32 ^ u64::from(position);
                let mut random = Random::new(of_token.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                hidden.extend(random.values(self.shape.hidden_size as usize, 1.0));
                let any = random.ids(1, vocab)[0];
                ids.push(match self.ids {
                    Ids::Any => any,
                    Ids::Equal => vocab / 2,
                    Ids::Skewed if position % 3 == 1 => 0,
                    Ids::Skewed => any,
                    Ids::Distinct => position % vocab,
                    Ids::Reversed => vocab - 1 - position % vocab,
                });
            }
        }
        Tokens { hidden, ids }
    }

    /// Runs the case and compares every new token's output with the reference's, and the cache's lengths with those that follow
    /// from the events.
    ///
    /// # Errors
    /// A case that the library wrongly refuses, or a lost device.
    pub fn run(&self, kernels: &Kernels) -> Result<Comparison> {
        self.run_on(kernels, &Prepared::new(&self.shape)?)
    }

    /// The same with the layer at hand.
    ///
    /// # Errors
    /// As [`LayerCase::run`].
    pub fn run_on(&self, kernels: &Kernels, layer: &Prepared) -> Result<Comparison> {
        let (got, lengths, distinct) = self.on_device(kernels, layer)?;
        // After the GPU, so that nothing of it can leak into a result.
        let (expected, held) = self.in_f64(&layer.reference);
        let own: Vec<u32> = held.iter().map(|ids| ids.len() as u32).collect();
        let wrong = |problem| Comparison { relative_error: f64::INFINITY, verdict: Err(problem) };
        if lengths != own {
            return Ok(wrong(format!("the cache has lengths {lengths:?}, expected {own:?}")));
        }
        if self.shape.config().up_projected_gate().is_some() {
            let ids = |ids: &Vec<u32>| ids.iter().collect::<std::collections::HashSet<_>>().len() as u32;
            let own: Vec<u32> = held.iter().map(ids).collect();
            if distinct != own {
                return Ok(wrong(format!("the cache has {distinct:?} distinct ids, expected {own:?}")));
            }
        }
        Ok(compare(&got, &expected, self.shape.tolerance()))
    }

    /// Outputs of every step, one after another.
    ///
    /// # Errors
    /// As [`LayerCase::run`].
    pub fn outputs(&self, kernels: &Kernels, layer: &Prepared) -> Result<Vec<f32>> {
        self.on_device(kernels, layer).map(|(got, ..)| got)
    }

    /// Outputs of every step, one after another, then lengths and distinct ids.
    fn on_device(&self, kernels: &Kernels, layer: &Prepared) -> Result<(Vec<f32>, Vec<u32>, Vec<u32>)> {
        let Prepared { config, weights, .. } = layer;
        let LayerCase { batch, capacity, tile_rows, .. } = *self;
        let storage = self.shape.storage;
        let options = AttentionOptions { storage, gate_rows: self.gate_rows };
        let attention = Attention::new(kernels, config, weights, options)?;
        // No larger than the case needs.
        let counts = || self.events.iter().filter_map(Event::counts);
        let max_tokens = counts().map(|(_, counts)| counts.iter().sum()).max().unwrap_or(1);
        let decoded = counts().filter(|(mode, _)| *mode == Mode::Decode).flat_map(|(_, counts)| counts);
        let decode_tokens = decoded.copied().max().unwrap_or(1);
        let (n_layer, decode_path) = (1, DecodePath::Auto);
        let options =
            CacheOptions { n_layer, batch, capacity, storage, max_tokens, decode_tokens, tile_rows, decode_path };
        let mut cache = LatentCache::new(&attention, options)?;
        for buffer in cache.buffers() {
            let poison = vec![POISON; buffer.size() as usize / 4];
            kernels.queue().write_buffer(buffer, 0, bytemuck::cast_slice(&poison));
        }
        let mut got = Vec::new();
        for event in &self.events {
            let mut recording = Recording::new(kernels);
            match event {
                Event::TakeBack { sequence, tokens } => {
                    let length = cache.lengths()[*sequence] - tokens;
                    cache.truncate(*sequence, length)?;
                }
                Event::Copy { from, to } => {
                    cache.copy_sequence(&mut recording, *from, *to)?;
                    readback::submit(&mut recording)?;
                }
                Event::Reset => cache.reset(),
                Event::Prefill { counts, seed }
                | Event::Decode { counts, seed, .. }
                | Event::GiveUp { counts, seed, .. } => {
                    let (mode, path) = match event {
                        Event::Decode { path, .. } | Event::GiveUp { path, .. } => (Mode::Decode, *path),
                        _ => (Mode::Prefill, DecodePath::Auto),
                    };
                    let new = self.tokens(counts, cache.lengths(), *seed);
                    let ids = config.gate.is_some().then_some(&new.ids[..]);
                    cache.set_decode_path(path);
                    let step = cache.prepare(mode, StepTokens { counts, ids })?;
                    let input = Guarded::filled(kernels, "hidden", bytemuck::cast_slice(&new.hidden))?;
                    let out = Guarded::poisoned(kernels, "out", new.hidden.len())?;
                    let (hidden, to) = (&input.region, &out.region);
                    attention.forward(&mut recording, &cache, &step, 0, hidden, to)?;
                    if !matches!(event, Event::GiveUp { .. }) {
                        cache.commit(step)?;
                    }
                    readback::submit(&mut recording)?;
                    got.extend(out.read_f32(kernels)?);
                }
            }
        }
        Ok((got, cache.lengths().to_vec(), cache.distinct_ids()))
    }

    /// The outputs by definition, and the final ids of each sequence.
    fn in_f64(&self, reference: &Layer) -> (Vec<f64>, Vec<Vec<u32>>) {
        let mut held: Vec<(History, Vec<u32>)> = vec![Default::default(); self.batch as usize];
        let mut expected = Vec::new();
        let width = self.shape.hidden_size as usize;
        for event in &self.events {
            match event {
                Event::TakeBack { sequence, tokens } => {
                    let (history, ids) = &mut held[*sequence];
                    let length = ids.len() - *tokens as usize;
                    history.truncate(length);
                    ids.truncate(length);
                }
                Event::Copy { from, to } => held[*to] = held[*from].clone(),
                Event::Reset => held.fill(Default::default()),
                Event::Prefill { counts, seed }
                | Event::Decode { counts, seed, .. }
                | Event::GiveUp { counts, seed, .. } => {
                    let lengths: Vec<u32> = held.iter().map(|(_, ids)| ids.len() as u32).collect();
                    let new = self.tokens(counts, &lengths, *seed);
                    let mut first = 0;
                    for ((history, ids), &count) in held.iter_mut().zip(counts) {
                        let rows = first..first + count as usize;
                        first = rows.end;
                        let hidden = &new.hidden[rows.start * width..rows.end * width];
                        let wide: Vec<f64> = hidden.iter().map(|&value| value.into()).collect();
                        let own = &new.ids[rows];
                        let kept = history.len();
                        expected.extend(reference.forward(&wide, own, history));
                        match event {
                            Event::GiveUp { .. } => history.truncate(kept),
                            _ => ids.extend(own),
                        }
                    }
                }
            }
        }
        (expected, held.into_iter().map(|(_, ids)| ids).collect())
    }

    /// Cases that are a little smaller, the boldest steps first.
    fn smaller(&self) -> Vec<LayerCase> {
        let mut all = Vec::new();
        // Without its later half, without one event.
        for keep in [self.events.len() / 2, self.events.len().saturating_sub(1)] {
            all.push(LayerCase { events: self.events[..keep].to_vec(), ..self.clone() });
        }
        for index in 0..self.events.len() {
            let mut case = self.clone();
            case.events.remove(index);
            all.push(case);
        }
        // Without a sequence.
        for gone in (0..self.batch as usize).filter(|_| self.batch > 1) {
            let events = self.events.iter().filter_map(|event| event.without(gone)).collect();
            all.push(LayerCase { batch: self.batch - 1, events, ..self.clone() });
        }
        // With fewer tokens.
        for index in 0..self.events.len() {
            for event in self.events[index].with_fewer() {
                let mut case = self.clone();
                case.events[index] = event;
                all.push(case);
            }
        }
        // With a smaller cache, plainer options and narrower rows.
        for capacity in [self.capacity / 2, self.capacity - 1] {
            all.push(LayerCase { capacity, ..self.clone() });
        }
        all.push(LayerCase { gate_rows: GateRows::Recompute, ..self.clone() });
        all.push(LayerCase { ids: Ids::Equal, ..self.clone() });
        all.push(LayerCase { tile_rows: 1, ..self.clone() });
        all.extend(self.shape.simpler().into_iter().map(|shape| LayerCase { shape, ..self.clone() }));
        all.retain(|case| case != self && case.possible());
        all
    }
}

impl Shape {
    fn simpler(&self) -> Vec<Shape> {
        let with = |change: &dyn Fn(&mut Shape)| {
            let mut shape = self.clone();
            change(&mut shape);
            shape
        };
        let mut all = vec![
            with(&|shape| shape.gate = None),
            with(&|shape| shape.storage = Storage::F32),
            with(&|shape| shape.d_q_latent = None),
            with(&|shape| shape.attention_bias = false),
            with(&|shape| shape.kv_a_norm = false),
            with(&|shape| shape.rope = Rope::Neighbours),
        ];
        let gated = |change: &dyn Fn(&mut GateConfig)| with(&|shape| shape.gate.iter_mut().for_each(change));
        all.push(gated(&|gate| gate.activation = Activation::Identity));
        all.push(gated(&|gate| gate.norm = GateNorm::None));
        // From 1 up to a half: a width that matters is met whatever it is.
        let less = |value: u32| [1, value / 2, value.saturating_sub(1)].into_iter().filter(move |&less| less < value);
        all.extend(less(self.n_head).map(|n| with(&|shape| shape.n_head = n)));
        all.extend(less(self.hidden_size).map(|n| with(&|shape| shape.hidden_size = n)));
        all.extend(less(self.d_latent).map(|n| with(&|shape| shape.d_latent = n)));
        all.extend(less(self.d_nope).map(|n| with(&|shape| shape.d_nope = n)));
        all.extend([0, self.d_rope / 4 * 2].map(|n| with(&|shape| shape.d_rope = n)));
        all.extend(less(self.d_value).map(|n| with(&|shape| shape.d_value = n)));
        for n in [1, 2, 4] {
            all.push(gated(&|gate| gate.vocab_size = gate.vocab_size.min(n)));
            all.push(gated(&|gate| gate.d_gate = gate.d_gate.min(n)));
        }
        all
    }
}

impl Event {
    fn counts(&self) -> Option<(Mode, &Vec<u32>)> {
        match self {
            Event::Prefill { counts, .. } => Some((Mode::Prefill, counts)),
            Event::Decode { counts, .. } | Event::GiveUp { counts, .. } => Some((Mode::Decode, counts)),
            _ => None,
        }
    }

    fn tokens(&self) -> u32 {
        self.counts().map_or(0, |(_, counts)| counts.iter().fold(0, |all, &count| all.saturating_add(count)))
    }

    /// Lengths after it, `None` where it cannot happen or says nothing.
    fn applied(&self, lengths: &[u32], capacity: u32) -> Option<Vec<u32>> {
        let mut after = lengths.to_vec();
        match self {
            Event::TakeBack { sequence, tokens } => {
                let length = after.get_mut(*sequence)?;
                *length = length.checked_sub(*tokens).filter(|_| *tokens > 0)?;
            }
            Event::Copy { from, to } => *after.get_mut(*to)? = *lengths.get(*from).filter(|_| from != to)?,
            Event::Reset => after.fill(0),
            _ => {
                let (mode, counts) = self.counts()?;
                let most = if mode == Mode::Decode { MOST_DECODED } else { capacity };
                if counts.len() != lengths.len() || self.tokens() == 0 || counts.iter().any(|&count| count > most) {
                    return None;
                }
                for (length, count) in after.iter_mut().zip(counts) {
                    *length = length.checked_add(*count).filter(|&length| length <= capacity)?;
                }
                if matches!(self, Event::GiveUp { .. }) {
                    return Some(lengths.to_vec());
                }
            }
        }
        Some(after)
    }

    /// The same where a sequence is not there; `None` where nothing is left of it.
    fn without(&self, gone: usize) -> Option<Event> {
        let at = |sequence: usize| if sequence > gone { sequence - 1 } else { sequence };
        let mut event = self.clone();
        match &mut event {
            Event::Prefill { counts, .. } | Event::Decode { counts, .. } | Event::GiveUp { counts, .. } => {
                counts.remove(gone);
                return (event.tokens() > 0).then_some(event);
            }
            Event::TakeBack { sequence, .. } if *sequence == gone => return None,
            Event::TakeBack { sequence, .. } => *sequence = at(*sequence),
            Event::Copy { from, to } if *from == gone || *to == gone => return None,
            Event::Copy { from, to } => (*from, *to) = (at(*from), at(*to)),
            Event::Reset => {}
        }
        Some(event)
    }

    fn with_fewer(&self) -> Vec<Event> {
        let mut all = Vec::new();
        let places = self.counts().map_or(0, |(_, counts)| counts.len());
        for place in 0..places {
            for less in [|_: u32| 0, |count: u32| count / 2, |count: u32| count.saturating_sub(1)] {
                let mut event = self.clone();
                if let Event::Prefill { counts, .. } | Event::Decode { counts, .. } | Event::GiveUp { counts, .. } =
                    &mut event
                {
                    counts[place] = less(counts[place]);
                }
                all.push(event);
            }
        }
        if let Event::TakeBack { sequence, tokens } = *self {
            all.extend([tokens / 2, tokens - 1].map(|tokens| Event::TakeBack { sequence, tokens }));
        }
        all.retain(|event| event != self);
        all
    }
}

/// Extent of a search.
#[derive(Debug, Clone, Copy)]
pub struct Search {
    /// Of the configurations and histories: equal seeds, equal cases.
    pub seed: u64,
    /// Configurations of the family.
    pub configurations: usize,
    /// Cases, spread evenly over the configurations.
    pub cases: usize,
}

/// The result of a search.
#[derive(Debug, Default)]
pub struct SearchReport {
    /// Cases that were run and compared.
    pub compared: usize,
    /// New tokens in them.
    pub tokens: u64,
    /// The largest error over its tolerance, and its case.
    pub worst: Option<(f64, LayerCase)>,
    /// The first case that failed, shrunk. The search ends with it.
    pub failure: Option<Failure>,
}

/// A case that is wrong.
#[derive(Debug, Clone)]
pub struct Failure {
    /// As small as it became.
    pub case: LayerCase,
    /// Its defect, in words.
    pub problem: String,
    /// As it was drawn.
    pub drawn: LayerCase,
}

/// Draws cases, runs them, and shrinks the first that fails.
///
/// # Errors
/// A lost device. A case that the library refuses is a [`Failure`].
pub fn search(kernels: &Kernels, search: Search) -> Result<SearchReport> {
    let mut report = SearchReport::default();
    let configurations = search.configurations.max(1);
    for (index, shape) in family(search.seed, configurations).enumerate() {
        let layer = Prepared::new(&shape)?;
        let mut random = Random::new(search.seed.wrapping_mul(1_000_003).wrapping_add(index as u64));
        // The first configurations take what does not divide.
        let cases = search.cases / configurations + usize::from(index < search.cases % configurations);
        for _ in 0..cases {
            let case = loop {
                let case = LayerCase::draw(shape.clone(), &mut random);
                if case.possible() {
                    break case;
                }
            };
            let result = case.run_on(kernels, &layer);
            if let Some(problem) = problem_of(&result)? {
                let (small, problem) = shrink(case.clone(), problem, |case| problem_of(&case.run(kernels)))?;
                report.failure = Some(Failure { case: small, problem, drawn: case });
                return Ok(report);
            }
            if let Ok(comparison) = result {
                let part = comparison.relative_error / shape.tolerance().relative;
                report.compared += 1;
                report.tokens += case.events.iter().map(|event| u64::from(event.tokens())).sum::<u64>();
                if report.worst.as_ref().is_none_or(|(worst, _)| part > *worst) {
                    report.worst = Some((part, case));
                }
            }
        }
    }
    Ok(report)
}

/// The defect of a result; a lost device is an error, not a defect.
fn problem_of(result: &Result<Comparison>) -> Result<Option<String>> {
    match result {
        Ok(comparison) => Ok(comparison.verdict.clone().err()),
        Err(Error::Device(DeviceError::Driver { what, message })) => {
            Err(Error::Device(DeviceError::Driver { what: what.clone(), message: message.clone() }))
        }
        Err(error) => Ok(Some(error.to_string())),
    }
}

/// Most runs that shrinking takes: widths that nothing has compiled for cost seconds each.
const SHRINKING_RUNS: usize = 400;

/// The smallest case that still fails, by greedy steps; `problem` says what is wrong with a case.
///
/// # Errors
/// Those of `problem`.
pub fn shrink(
    mut case: LayerCase,
    mut found: String,
    mut problem: impl FnMut(&LayerCase) -> Result<Option<String>>,
) -> Result<(LayerCase, String)> {
    let mut runs = 0;
    'smaller: loop {
        for candidate in case.smaller() {
            if runs == SHRINKING_RUNS {
                return Ok((case, found));
            }
            runs += 1;
            if let Some(problem) = problem(&candidate)? {
                (case, found) = (candidate, problem);
                continue 'smaller;
            }
        }
        return Ok((case, found));
    }
}

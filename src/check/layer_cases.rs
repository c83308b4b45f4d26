//! Cases of the whole layer: every option, prefill = prefill + decode = reference, ragged batches, both decode paths.

use std::rc::Rc;

use super::compare::{F16_LIMIT, F32_LIMIT, Tolerance};
use super::guarded::POISON;
use super::view::{Reading, View};
use super::{Case, Lab, Outcome, Words, outcome};
use crate::attention::{Attention, AttentionOptions, CacheOptions, DecodePath, GateRows, LatentCache, Tokens};
use crate::config::{
    Activation, AttentionConfig, GateConfig, GateNorm, GateSite, QueryScaling, RopeConfig, RopeScaling,
};
use crate::error::Result;
use crate::random::{Random, attention_weights};
use crate::recording::Recording;
use crate::reference::{History, Layer};
use crate::storage::Storage;
use crate::weights::{AttentionWeights, QueryWeights};

/// How the tokens of a sequence enter the cache.
#[derive(Debug, Clone, Copy)]
struct Schedule {
    name: &'static str,
    /// Tokens of each sequence that are prefilled.
    prefill: u32,
    /// Most tokens of a sequence in one prefill.
    chunk: u32,
    path: DecodePath,
    /// New tokens per sequence in a decode step.
    decode: u32,
    gate_rows: GateRows,
}

fn base() -> AttentionConfig {
    AttentionConfig {
        hidden_size: 40,
        n_head: 3,
        d_latent: 20,
        d_nope: 12,
        d_rope: 8,
        d_value: 10,
        ..AttentionConfig::default()
    }
}

fn gate(site: GateSite, activation: Activation, norm: GateNorm) -> Option<GateConfig> {
    Some(GateConfig { vocab_size: 23, d_gate: 6, tied: false, site, activation, norm, norm_eps: 1e-5 })
}

/// A gate that reads the token embedding.
fn tied(site: GateSite, activation: Activation, norm: GateNorm) -> Option<GateConfig> {
    gate(site, activation, norm).map(|gate| GateConfig { d_gate: base().hidden_size, tied: true, ..gate })
}

/// Configurations by name, and whether there is a `kv_a_layernorm`.
fn configurations() -> Vec<(String, AttentionConfig, bool)> {
    let yarn = RopeScaling::Yarn {
        factor: 8.0,
        original_max_position_embeddings: 24.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: Some(1.0),
        mscale_all_dim: Some(0.7),
        attention_factor: None,
        truncate: true,
    };
    let rope = |interleave, scaling| RopeConfig { interleave, scaling, ..RopeConfig::default() };
    let mut all = vec![
        ("mla".to_owned(), base(), true),
        ("mla_no_norm".to_owned(), base(), false),
        (
            "mla_no_norm_all_biases".to_owned(),
            AttentionConfig { attention_bias: true, q_proj_bias: true, ..base() },
            false,
        ),
        (
            "mla_low_rank_bias_yarn".to_owned(),
            AttentionConfig { d_q_latent: Some(14), attention_bias: true, rope: rope(true, yarn), ..base() },
            true,
        ),
        (
            "mla_halves_linear_h5".to_owned(),
            AttentionConfig { n_head: 5, rope: rope(false, RopeScaling::Linear { factor: 4.0 }), ..base() },
            true,
        ),
        (
            "mla_scaled_low_rank".to_owned(),
            AttentionConfig {
                d_q_latent: Some(14),
                query_factor: 1.7,
                latent_factor: 1.4,
                low_rank_norm_eps: 1e-3,
                ..base()
            },
            true,
        ),
        (
            "mla_unturned".to_owned(),
            AttentionConfig { rope: RopeConfig { rotate: false, ..RopeConfig::default() }, ..base() },
            true,
        ),
        (
            "mla_low_rank_scaled_queries".to_owned(),
            AttentionConfig {
                d_q_latent: Some(14),
                rope: RopeConfig {
                    query_scaling: Some(QueryScaling { beta: 0.7, original_max_position_embeddings: 5.0 }),
                    ..RopeConfig::default()
                },
                ..base()
            },
            true,
        ),
        ("mla_no_rope_h1".to_owned(), AttentionConfig { n_head: 1, d_rope: 0, ..base() }, true),
        ("mla_no_nope_h9".to_owned(), AttentionConfig { n_head: 9, d_nope: 0, ..base() }, true),
        (
            "mla_odd_widths".to_owned(),
            AttentionConfig { hidden_size: 37, d_latent: 13, d_nope: 7, d_rope: 2, d_value: 11, ..base() },
            true,
        ),
        (
            "mla_whole_widths".to_owned(),
            AttentionConfig { d_latent: 24, d_nope: 16, d_rope: 8, d_value: 16, ..base() },
            true,
        ),
        ("mla_wide_values".to_owned(), AttentionConfig { n_head: 2, d_value: 90, d_nope: 64, ..base() }, true),
    ];
    for norm in GateNorm::ALL {
        for activation in Activation::ALL {
            let config = AttentionConfig { gate: gate(GateSite::UpProjected, activation, norm), ..base() };
            all.push((format!("up_projected_{activation:?}_{norm:?}").to_lowercase(), config, true));
        }
        let config = AttentionConfig { gate: gate(GateSite::Latent, Activation::Sigmoid, norm), ..base() };
        all.push((format!("latent_sigmoid_{norm:?}").to_lowercase(), config, true));
    }
    for (name, gate) in [
        ("up_projected_tied", tied(GateSite::UpProjected, Activation::OnePlus, GateNorm::None)),
        ("latent_tied", tied(GateSite::Latent, Activation::Identity, GateNorm::LayerNorm)),
    ] {
        all.push((name.to_owned(), AttentionConfig { gate, ..base() }, true));
    }
    all.push((
        "up_projected_h9_low_rank_no_rope".to_owned(),
        AttentionConfig {
            n_head: 9,
            d_rope: 0,
            d_q_latent: Some(16),
            gate: gate(GateSite::UpProjected, Activation::Silu, GateNorm::LayerNorm),
            ..base()
        },
        false,
    ));
    all
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for storage in Storage::ALL {
        for (name, config, kv_a_norm) in configurations() {
            let id = format!("{name}/{}", storage.name());
            cases.push(Case::new("layer", id, move |lab| layer(lab, &config, kv_a_norm, storage, &[7, 1, 33, 0], 16)));
        }
        // Longer than a split and than a tile of rebuilt cache rows, in one sequence and in several.
        for (name, config) in [
            ("long_mla", base()),
            (
                "long_up_projected",
                AttentionConfig { gate: gate(GateSite::UpProjected, Activation::Tanh, GateNorm::LayerNorm), ..base() },
            ),
        ] {
            let id = format!("{name}/{}", storage.name());
            cases.push(Case::new("layer", id, move |lab| layer(lab, &config, true, storage, &[300, 20, 530], 256)));
        }
        let sites = [
            ("mla", None),
            ("latent", gate(GateSite::Latent, Activation::Sigmoid, GateNorm::LayerNorm)),
            ("up_projected", gate(GateSite::UpProjected, Activation::Tanh, GateNorm::LayerNorm)),
        ];
        for (name, gate) in sites {
            let config = AttentionConfig { gate, ..base() };
            for extreme in Extreme::ALL {
                let (id, config) = (format!("{name}_{}/{}", extreme.name(), storage.name()), config.clone());
                let sizes = Sizes { lengths: &[7, 1, 33, 0], tile_rows: 16, law: Ids::Any, extreme: Some(extreme) };
                let run =
                    move |lab: &Lab<'_>| compared(lab, &config, !extreme.unnormed(), storage, sizes, &ends_of(33));
                cases.push(Case::new("layer", id, run));
            }
            // Heads on both sides of what a workgroup or a matrix has, and many.
            for n_head in [16, 63, 128] {
                let (id, config) =
                    (format!("{name}_h{n_head}/{}", storage.name()), AttentionConfig { n_head, ..config.clone() });
                let sizes = Sizes { lengths: &[7, 1, 33, 0], tile_rows: 16, law: Ids::Any, extreme: None };
                let run = move |lab: &Lab<'_>| compared(lab, &config, true, storage, sizes, &ends_of(33));
                cases.push(Case::new("layer", id, run));
            }
            // The most candidates per step, from an empty cache: 16, 16, then the rest.
            let (id, config) = (format!("{name}_16_tokens/{}", storage.name()), config.clone());
            let sizes = Sizes { lengths: &[40, 16, 270, 1], tile_rows: 256, law: Ids::Any, extreme: None };
            let run = move |lab: &Lab<'_>| compared(lab, &config, true, storage, sizes, &sixteen());
            cases.push(Case::new("layer", id, run));
        }
        // Caches of one id, of as many ids as tokens, and of an id that is every third token: whole chunks of it.
        for law in [Ids::Equal, Ids::Distinct, Ids::Third] {
            let mut config =
                AttentionConfig { gate: gate(GateSite::UpProjected, Activation::Tanh, GateNorm::LayerNorm), ..base() };
            config.gate.iter_mut().for_each(|gate| gate.vocab_size = 1100);
            let id = format!("ids_{law:?}/{}", storage.name()).to_lowercase();
            let sizes = Sizes { lengths: &[300, 1, 1090], tile_rows: 512, law, extreme: None };
            let run = move |lab: &Lab<'_>| compared(lab, &config, true, storage, sizes, &skewed(1090));
            cases.push(Case::new("layer", id, run));
        }
    }
    cases
}

/// Token ids of the new tokens, by position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ids {
    Any,
    Equal,
    Distinct,
    Third,
}

/// Layer and input of a case.
#[derive(Clone, Copy)]
struct Sizes {
    lengths: &'static [u32],
    tile_rows: u32,
    law: Ids,
    extreme: Option<Extreme>,
}

/// Layers with extreme inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extreme {
    /// Scores of ±1e4.
    HugeScores,
    /// Every score is 0.
    EqualScores,
    /// The third token's latent and rotary key are a thousand times the others'.
    OneKey,
    /// Every other token's hidden state is below the smallest normal f32.
    Denormals,
    /// Latents of up to a half of the largest f16, against queries that leave scores of order 1.
    Large,
}

impl Extreme {
    const ALL: [Extreme; 5] =
        [Extreme::HugeScores, Extreme::EqualScores, Extreme::OneKey, Extreme::Denormals, Extreme::Large];

    fn name(self) -> &'static str {
        match self {
            Extreme::HugeScores => "huge_scores",
            Extreme::EqualScores => "equal_scores",
            Extreme::OneKey => "one_key",
            Extreme::Denormals => "denormals",
            Extreme::Large => "f16_large",
        }
    }

    /// Whether latents must keep their size: there is no `kv_a_layernorm`.
    fn unnormed(self) -> bool {
        matches!(self, Extreme::OneKey | Extreme::Large)
    }

    fn of_weights(self, weights: &mut AttentionWeights) {
        let scale = |data: &mut [f32], by: f32| data.iter_mut().for_each(|value| *value *= by);
        let by = match self {
            Extreme::HugeScores => 1e4,
            Extreme::EqualScores => 0.0,
            Extreme::OneKey | Extreme::Denormals => 1.0,
            Extreme::Large => {
                scale(&mut weights.kv_a_proj.data, 1e4);
                1e-4
            }
        };
        if let QueryWeights::Full { proj, .. } = &mut weights.query {
            scale(&mut proj.data, by);
        }
    }

    /// Hidden states of one sequence, `width` values per token.
    fn of_hidden(self, hidden: &mut [f32], width: usize) {
        let scale = |rows: &mut [f32], by: f32| rows.iter_mut().for_each(|value| *value *= by);
        match self {
            Extreme::HugeScores | Extreme::EqualScores | Extreme::Large => {}
            Extreme::OneKey => hidden.chunks_mut(width).skip(2).take(1).for_each(|row| scale(row, 1e3)),
            Extreme::Denormals => hidden.chunks_mut(width).step_by(2).for_each(|row| scale(row, 1e-39)),
        }
    }
}

/// Prefill, and decode by either path.
fn ends_of(longest: u32) -> Vec<Schedule> {
    let plain = Schedule {
        name: "prefill",
        prefill: longest,
        chunk: longest,
        path: DecodePath::Auto,
        decode: 1,
        gate_rows: GateRows::Recompute,
    };
    let decoded = Schedule { prefill: 28, chunk: 100, ..plain };
    vec![
        plain,
        Schedule { name: "expanded", path: DecodePath::Expanded, ..decoded },
        Schedule { name: "absorbed", path: DecodePath::Absorbed, ..decoded },
    ]
}

/// Sixteen tokens per step from the first one on.
fn sixteen() -> Vec<Schedule> {
    [("expanded", DecodePath::Expanded), ("absorbed", DecodePath::Absorbed)]
        .map(|(name, path)| Schedule { name, prefill: 0, chunk: 0, path, decode: 16, gate_rows: GateRows::Recompute })
        .into()
}

/// A few decode steps with every source of gate rows, and by rebuilding.
fn skewed(longest: u32) -> Vec<Schedule> {
    [
        ("expanded", DecodePath::Expanded, GateRows::Recompute),
        ("absorbed", DecodePath::Absorbed, GateRows::Recompute),
        ("pool", DecodePath::Absorbed, GateRows::Pool { rows: 50 }),
        ("table", DecodePath::Absorbed, GateRows::Table),
    ]
    .map(|(name, path, gate_rows)| Schedule { name, prefill: longest - 4, chunk: longest, path, decode: 2, gate_rows })
    .into()
}

fn layer(
    lab: &Lab<'_>,
    config: &AttentionConfig,
    kv_a_norm: bool,
    storage: Storage,
    lengths: &'static [u32],
    tile_rows: u32,
) -> Result<Vec<Outcome>> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let plain = Schedule {
        name: "prefill",
        prefill: longest,
        chunk: longest,
        path: DecodePath::Auto,
        decode: 1,
        gate_rows: GateRows::Recompute,
    };
    let decoded = Schedule { prefill: longest - 5, chunk: 100, ..plain };
    let absorbed = Schedule { name: "absorbed", path: DecodePath::Absorbed, ..decoded };
    let mut schedules = vec![
        plain,
        Schedule { name: "chunked", chunk: longest.div_ceil(3), ..plain },
        Schedule { name: "expanded", path: DecodePath::Expanded, ..decoded },
        absorbed,
        Schedule { name: "candidates", decode: 3, ..absorbed },
        Schedule { name: "candidates_expanded", decode: 3, path: DecodePath::Expanded, ..decoded },
    ];
    // The source of the gate rows is the same to every activation; each costs pipelines.
    if config.up_projected_gate().is_some_and(|gate| gate.activation == Activation::Tanh) {
        // Fewer rows than there are ids, and one for every id.
        schedules.push(Schedule { name: "pool", gate_rows: GateRows::Pool { rows: 7 }, decode: 2, ..absorbed });
        schedules.push(Schedule { name: "large_pool", gate_rows: GateRows::Pool { rows: 99 }, ..absorbed });
        schedules.push(Schedule { name: "table", gate_rows: GateRows::Table, ..absorbed });
    }
    if longest < 100 {
        schedules.push(Schedule { name: "decode_from_0", prefill: 0, path: DecodePath::Absorbed, ..decoded });
    }
    let sizes = Sizes { lengths, tile_rows, law: Ids::Any, extreme: None };
    compared(lab, config, kv_a_norm, storage, sizes, &schedules)
}

/// Runs every schedule on the device, then the reference once.
fn compared(
    lab: &Lab<'_>,
    config: &AttentionConfig,
    kv_a_norm: bool,
    storage: Storage,
    sizes: Sizes,
    schedules: &[Schedule],
) -> Result<Vec<Outcome>> {
    let Sizes { lengths, tile_rows, law, extreme } = sizes;
    let mut weights = attention_weights(config, kv_a_norm, 7)?;
    extreme.iter().for_each(|extreme| extreme.of_weights(&mut weights));
    let mut layers: Vec<(GateRows, Attention)> = Vec::new();
    for &Schedule { gate_rows, .. } in schedules {
        if layers.iter().all(|(known, _)| *known != gate_rows) {
            let options = AttentionOptions { storage, gate_rows };
            layers.push((gate_rows, Attention::new(lab.kernels, config, &weights, options)?));
        }
    }
    let mut random = Random::new(11);
    let tokens: u32 = lengths.iter().sum();
    let width = config.hidden_size as usize;
    let mut hidden = random.values(tokens as usize * width, 1.0);
    let vocab = config.gate.as_ref().map_or(1, |gate| gate.vocab_size);
    let any = random.ids(tokens as usize, vocab);
    let positions = || lengths.iter().flat_map(|&length| 0..length);
    let law = |(position, any): (u32, u32)| match law {
        Ids::Any => any,
        Ids::Equal => vocab / 2,
        Ids::Distinct => position % vocab,
        Ids::Third if position % 3 == 1 => 5,
        Ids::Third => any,
    };
    let ids: Vec<u32> = positions().zip(any).map(law).collect();
    let mut rest = &mut hidden[..];
    for &length in lengths {
        let (own, behind) = rest.split_at_mut(length as usize * width);
        extreme.iter().for_each(|extreme| extreme.of_hidden(own, width));
        rest = behind;
    }

    let tolerance = Tolerance {
        relative: match storage {
            Storage::F32 => F32_LIMIT,
            Storage::F16 => F16_LIMIT,
        },
    };
    let mut results = Vec::new();
    for &schedule in schedules {
        let Some((_, attention)) = layers.iter().find(|(gate_rows, _)| *gate_rows == schedule.gate_rows) else {
            continue;
        };
        results.push((schedule, run(lab, attention, storage, lengths, tile_rows, schedule, &hidden, &ids)?));
    }
    // After the GPU, so that nothing of it can leak into a result.
    let reference = Layer::new(config.clone(), &weights)?;
    let mut expected = Vec::new();
    let mut first = 0;
    for &length in lengths {
        let rows = first..first + length as usize;
        let wide: Vec<f64> = hidden[rows.start * width..rows.end * width].iter().map(|&value| value.into()).collect();
        let own_ids = if config.gate.is_some() { &ids[rows.clone()] } else { &[] };
        expected.extend(reference.forward(&wide, own_ids, &mut History::default()));
        first = rows.end;
    }
    Ok(results
        .into_iter()
        .map(|(schedule, parts)| {
            let parts: Vec<_> = parts.iter().map(|(words, view)| (&**words, *view)).collect();
            let comparison = lab.compare_views(&parts, &expected, tolerance);
            outcome(schedule.name.to_owned(), vec![comparison])
        })
        .collect())
}

/// Readings of the steps and their views: together the output of every token, in the order of the input.
#[expect(clippy::too_many_arguments, reason = "a schedule and what it is run on")]
fn run(
    lab: &Lab<'_>,
    attention: &Attention,
    storage: Storage,
    lengths: &[u32],
    tile_rows: u32,
    schedule: Schedule,
    hidden: &[f32],
    ids: &[u32],
) -> Result<Vec<(Rc<Words>, View)>> {
    let config = attention.config();
    let width = config.hidden_size as usize;
    let longest = lengths.iter().copied().max().unwrap_or(0);
    // One spare cache row, so that sequences do not touch.
    let options = CacheOptions {
        n_layer: 1,
        batch: lengths.len() as u32,
        capacity: longest + 1,
        storage,
        max_tokens: hidden.len() as u32 / config.hidden_size,
        decode_tokens: schedule.decode,
        tile_rows,
        decode_path: schedule.path,
    };
    let mut cache = LatentCache::new(attention, options)?;
    for buffer in cache.buffers() {
        let poison = vec![POISON; buffer.size() as usize / 4];
        lab.kernels.queue().write_buffer(buffer, 0, bytemuck::cast_slice(&poison));
    }

    let first_of: Vec<u32> = lengths
        .iter()
        .scan(0, |first, &length| {
            let own = *first;
            *first += length;
            Some(own)
        })
        .collect();
    let mut parts = Vec::new();
    while cache.lengths() != lengths {
        let done = cache.lengths().to_vec();
        let prefilling = done.iter().zip(lengths).any(|(&done, &length)| done < length.min(schedule.prefill));
        let counts: Vec<u32> = done
            .iter()
            .zip(lengths)
            .map(|(&done, &length)| match prefilling {
                true => length.min(schedule.prefill).saturating_sub(done).min(schedule.chunk),
                false => length.saturating_sub(done).min(schedule.decode),
            })
            .collect();
        let rows: Vec<usize> = (0..lengths.len())
            .flat_map(|s| (first_of[s] + done[s]..first_of[s] + done[s] + counts[s]).map(|row| row as usize))
            .collect();
        let step_hidden: Vec<f32> = rows.iter().flat_map(|&row| hidden[row * width..][..width].to_vec()).collect();
        let step_ids: Vec<u32> = rows.iter().map(|&row| ids[row]).collect();
        let step_ids = config.gate.is_some().then_some(&step_ids[..]);
        let (input, output) = (lab.floats(&step_hidden)?, lab.output(step_hidden.len())?);
        let mut recording = Recording::new(lab.kernels);
        let (hidden, out) = (input.region.clone(), output.region.clone());
        let tokens = Tokens { counts: &counts, ids: step_ids, hidden, out };
        if prefilling {
            attention.prefill(&mut recording, &mut cache, tokens)?;
        } else {
            attention.decode(&mut recording, &mut cache, tokens)?;
        }
        lab.submit(&mut recording)?;
        if lab.capture.is_some() {
            attention.assume_table();
        }
        let got = Rc::new(lab.read(&output)?);
        let mut first = 0;
        for (s, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let counts = [count as usize, width];
            let view = View { reading: Reading::F32, first, counts, strides: [width, 1] };
            parts.push((first_of[s] + done[s], Rc::clone(&got), view));
            first += count as usize * width;
        }
    }
    parts.sort_by_key(|(row, ..)| *row);
    Ok(parts.into_iter().map(|(_, words, view)| (words, view)).collect())
}

//! Cases of the whole layer: every option, prefill = prefill + decode = reference, ragged batches, both decode paths.

use std::rc::Rc;

use super::compare::{F16_LIMIT, F32_LIMIT, Tolerance};
use super::guarded::POISON;
use super::random::{Random, attention_weights};
use super::view::{Reading, View};
use super::{Case, Lab, Outcome, Words, outcome};
use crate::attention::{Attention, CacheOptions, DecodePath, GateRows, LatentCache, Workspace, WorkspaceOptions};
use crate::config::{Activation, AttentionConfig, GateConfig, GateNorm, GateSite, RopeConfig, RopeScaling};
use crate::error::Result;
use crate::kernel::{Recording, Region};
use crate::plan::Storage;
use crate::reference::{History, Layer};

/// How the tokens of a sequence reach the cache.
#[derive(Debug, Clone, Copy)]
struct Schedule {
    name: &'static str,
    /// Tokens of each sequence that are prefilled.
    prefill: u32,
    /// Most tokens of a sequence in one prefill.
    chunk: u32,
    path: DecodePath,
    /// New tokens of a sequence in a decode step.
    decode: u32,
    gate_rows: GateRows,
}

fn base() -> AttentionConfig {
    AttentionConfig {
        hidden_size: 40,
        n_head: 3,
        d_latent: 20,
        d_q_latent: None,
        d_nope: 12,
        d_rope: 8,
        d_value: 10,
        attention_bias: false,
        gate: None,
        rope: RopeConfig::default(),
    }
}

fn gate(site: GateSite, activation: Activation, norm: GateNorm) -> Option<GateConfig> {
    Some(GateConfig { vocab_size: 23, d_gate: 6, site, activation, norm, norm_eps: 1e-5 })
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
    };
    let rope = |interleave, scaling| RopeConfig { theta: 10000.0, interleave, scaling };
    let mut all = vec![
        ("mla".to_owned(), base(), true),
        ("mla_no_norm".to_owned(), base(), false),
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
        // Longer than a split and than a tile of rebuilt rows, in one sequence and in several.
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
    }
    cases
}

fn layer(
    lab: &Lab<'_>,
    config: &AttentionConfig,
    kv_a_norm: bool,
    storage: Storage,
    lengths: &[u32],
    tile_rows: u32,
) -> Result<Vec<Outcome>> {
    let weights = attention_weights(config, kv_a_norm, 7)?;
    let mut attention = Attention::new(lab.kernels, config, &weights, storage)?;
    if config.up_projected_gate().is_some() {
        lab.launch(|recording| attention.load_gate_table(recording))?;
    }
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
    let mut random = Random::new(11);
    let tokens: u32 = lengths.iter().sum();
    let width = config.hidden_size as usize;
    let hidden = random.values(tokens as usize * width, 1.0);
    let vocab = config.gate.as_ref().map_or(1, |gate| gate.vocab_size);
    let ids = random.ids(tokens as usize, vocab);

    let tolerance = Tolerance {
        relative: match storage {
            Storage::F32 => F32_LIMIT,
            Storage::F16 => F16_LIMIT,
        },
    };
    let mut results = Vec::new();
    for schedule in schedules {
        results.push((schedule, run(lab, &attention, storage, lengths, tile_rows, schedule, &hidden, &ids)?));
    }
    // After the GPU, so that nothing of it can leak into a result.
    let reference = Layer::new(config.clone(), &weights);
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
            outcome(schedule.name.to_owned(), tolerance, vec![comparison])
        })
        .collect())
}

/// What the steps read back, and where: together the output of every token, in the order of the input.
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
    // A row to spare, so that sequences do not touch.
    let (n_layer, batch, gate_rows) = (1, lengths.len() as u32, schedule.gate_rows);
    let options = CacheOptions { n_layer, batch, capacity: longest + 1, storage, gate_rows };
    let mut cache = LatentCache::new(lab.kernels, config, options)?;
    let max_tokens = hidden.len() as u32 / config.hidden_size;
    let workspace_options = WorkspaceOptions { max_tokens, tile_rows, decode_tokens: schedule.decode };
    let workspace = Workspace::new(&cache, workspace_options)?;
    for buffer in cache.buffers().chain(workspace.buffers()) {
        let poison = vec![POISON; buffer.size() as usize / 4];
        lab.queue.write_buffer(buffer, 0, bytemuck::cast_slice(&poison));
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
        let (input, to): (&Region, &Region) = (&input.region, &output.region);
        if prefilling {
            attention.prefill(&mut recording, &mut cache, &workspace, &counts, step_ids, input, to)?;
        } else {
            let path = schedule.path;
            attention.decode(&mut recording, &mut cache, &workspace, &counts, step_ids, path, input, to)?;
        }
        lab.submit(&recording)?;
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

//! Host time of a decode step: time of the application's thread before the device has anything to do.
//!
//! A bench row is one token through 12 layers after 4 096 others, from preparing the step to the end of the compute pass and the
//! commit; the time that wgpu takes to finish the encoder is reported beside it. Nothing is submitted, so no GPU is needed.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::report::median;
use super::{paper_120m, tokens};
use crate::attention::{
    Attention, AttentionOptions, CacheOptions, DecodePath, GateRows, LatentCache, Mode, StepTokens,
};
use crate::config::AttentionConfig;
use crate::device::{Kernels, Region};
use crate::error::{ArgumentError, Error, Result};
use crate::random::{Random, attention_weights};
use crate::recording::Recording;
use crate::storage::Storage;

/// Layers of a step.
const LAYERS: u32 = 12;

/// Tokens that the first step finds in the cache.
const CACHED: u32 = 4096;

/// Steps that are timed, after [`WARM`] that are not.
const STEPS: usize = 200;

/// Steps before the clock counts: pipelines are compiled and tables grow.
const WARM: usize = 8;

const SEED: u64 = 20;

/// One row, measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostRow {
    /// `host/mla_120m_12l`
    pub id: String,
    /// Median microseconds of a step on the host.
    pub host_us: f64,
    /// Fastest step.
    pub min_us: f64,
    /// Median microseconds that wgpu then takes to finish the encoder, which checks every command.
    #[serde(default)]
    pub finish_us: f64,
    /// Dispatches of a step.
    pub dispatches: usize,
    /// Steps that were timed.
    pub steps: usize,
}

/// Ids of every row.
pub const IDS: [&str; 2] = ["host/mla_120m_12l", "host/egmla_120m_12l_table"];

/// Measures the rows whose id contains `filter`, in turns: a step of one, then of the next.
///
/// # Errors
/// An object that the device refuses.
pub fn measure(kernels: &Kernels, filter: &str) -> Result<Vec<HostRow>> {
    let mut models = IDS
        .into_iter()
        .filter(|id| id.contains(filter))
        .map(|id| {
            let gated = id == IDS[1];
            let config = paper_120m(if gated { 64 } else { 256 }, gated);
            Ok((id, Model::new(kernels, &config, gated)?, [Vec::new(), Vec::new()]))
        })
        .collect::<Result<Vec<_>>>()?;
    for step in 0..WARM + STEPS {
        for (_, model, times) in &mut models {
            let [recorded, finished] = model.step()?;
            if step >= WARM {
                times[0].push(recorded);
                times[1].push(finished);
            }
        }
    }
    Ok(models
        .into_iter()
        .map(|(id, model, mut times)| {
            times.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
            let [recorded, finished] = times;
            HostRow {
                id: id.to_owned(),
                host_us: median(&recorded),
                min_us: recorded.first().copied().unwrap_or_default(),
                finish_us: median(&finished),
                dispatches: model.recording.dispatches(),
                steps: recorded.len(),
            }
        })
        .collect())
}

/// Twelve layers and their cache.
struct Model {
    layers: Vec<Attention>,
    cache: LatentCache,
    recording: Recording,
    hidden: Region,
    out: Region,
    ids: std::iter::Cycle<std::vec::IntoIter<u32>>,
    gated: bool,
}

impl Model {
    fn new(kernels: &Kernels, config: &AttentionConfig, gated: bool) -> Result<Self> {
        let gate_rows = if gated { GateRows::Table } else { GateRows::Recompute };
        let weights = attention_weights(config, true, SEED)?;
        let options = AttentionOptions { storage: Storage::F16, gate_rows };
        let layers = (0..LAYERS)
            .map(|_| Attention::new(kernels, config, &weights, options).inspect(Attention::assume_table))
            .collect::<Result<Vec<_>>>()?;
        let first = layers.first().ok_or(Error::Argument(ArgumentError::Empty { what: "the list of layers" }))?;
        let options = CacheOptions {
            n_layer: LAYERS,
            capacity: CACHED + 512,
            storage: Storage::F16,
            decode_path: DecodePath::Absorbed,
            ..CacheOptions::default()
        };
        let mut cache = LatentCache::new(first, options)?;
        // Past tokens are prepared and committed, never computed: the cache's content does not matter to the host.
        let past = tokens::text_like(CACHED as usize, SEED);
        for chunk in past.chunks(256) {
            let counts = [chunk.len() as u32];
            let step = cache.prepare(Mode::Prefill, StepTokens { counts: &counts, ids: Some(chunk) })?;
            cache.commit(step)?;
        }
        let bytes = u64::from(config.hidden_size) * 4;
        Ok(Model {
            layers,
            recording: Recording::new(kernels),
            hidden: Region::from(&kernels.upload(
                "egmla.bench.hidden",
                bytemuck::cast_slice(&Random::new(SEED).values(config.hidden_size as usize, 1.0)),
            )?),
            out: Region::from(&kernels.allocate("egmla.bench.out", bytes)?),
            ids: tokens::text_like(512, SEED + 1).into_iter().cycle(),
            cache,
            gated,
        })
    }

    /// Microseconds of one step, and of wgpu's end of the encoder.
    fn step(&mut self) -> Result<[f64; 2]> {
        let device = self.recording.kernels().device().clone();
        let token = self.ids.next().map(|id| [id]);
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("egmla.host") });
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        let start = Instant::now();
        self.recording.clear();
        let ids = token.as_ref().filter(|_| self.gated).map(|id| &id[..]);
        let step = self.cache.prepare(Mode::Decode, StepTokens { counts: &[1], ids })?;
        for (index, layer) in self.layers.iter().enumerate() {
            layer.forward(&mut self.recording, &self.cache, &step, index, &self.hidden, &self.out)?;
        }
        self.recording.record(&mut pass)?;
        drop(pass);
        self.cache.commit(step)?;
        let recorded = start.elapsed();
        drop(encoder.finish());
        Ok([recorded, start.elapsed() - recorded].map(|time| time.as_secs_f64() * 1e6))
    }
}

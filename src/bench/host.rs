//! Host time of a decode step: what an app's thread spends before the device has anything to do.
//!
//! A row is one token through 12 layers behind 4 096 others, from the begin of the step (planning it) to the end of
//! the compute pass and the commit. Nothing is submitted, so the device's speed does not matter and no GPU is needed.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::report::median;
use super::{paper_120m, tokens};
use crate::attention::{
    Attention, CacheOptions, DecodePath, GateRows, LatentCache, Mode, StepInput, Workspace, WorkspaceOptions,
};
use crate::check::random::{Random, attention_weights};
use crate::config::AttentionConfig;
use crate::device::{Kernels, Region};
use crate::error::Result;
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
/// What the device refuses.
pub fn measure(kernels: &Kernels, filter: &str) -> Result<Vec<HostRow>> {
    let mut models = IDS
        .into_iter()
        .filter(|id| id.contains(filter))
        .map(|id| {
            let gated = id == IDS[1];
            let config = paper_120m(if gated { 64 } else { 256 }, gated);
            Ok((id, Model::new(kernels, &config, gated)?, Vec::new()))
        })
        .collect::<Result<Vec<_>>>()?;
    for step in 0..WARM + STEPS {
        for (_, model, times) in &mut models {
            let time = model.step()?;
            if step >= WARM {
                times.push(time);
            }
        }
    }
    Ok(models
        .into_iter()
        .map(|(id, model, mut times)| {
            times.sort_by(f64::total_cmp);
            HostRow {
                id: id.to_owned(),
                host_us: median(&times),
                min_us: times.first().copied().unwrap_or_default(),
                dispatches: model.recording.dispatches(),
                steps: times.len(),
            }
        })
        .collect())
}

/// Twelve layers and their cache.
struct Model {
    layers: Vec<Attention>,
    cache: LatentCache,
    workspace: Workspace,
    recording: Recording,
    hidden: Region,
    out: Region,
    ids: std::iter::Cycle<std::vec::IntoIter<u32>>,
    gated: bool,
}

impl Model {
    fn new(kernels: &Kernels, config: &AttentionConfig, gated: bool) -> Result<Self> {
        let gate_rows = if gated { GateRows::Table } else { GateRows::Recompute };
        let options =
            CacheOptions { n_layer: LAYERS, batch: 1, capacity: CACHED + 512, storage: Storage::F16, gate_rows };
        let mut cache = LatentCache::new(kernels, config, options)?;
        let workspace = Workspace::new(&cache, WorkspaceOptions::new(256))?;
        let weights = attention_weights(config, true, SEED)?;
        let layers = (0..LAYERS)
            .map(|_| {
                let mut layer = Attention::new(kernels, config, &weights, Storage::F16)?;
                if gated {
                    layer.reserve_gate_table()?;
                }
                Ok(layer)
            })
            .collect::<Result<Vec<_>>>()?;
        // The past is planned and committed, and never computed: what stands in the cache does not matter to the host.
        let past = tokens::text_like(CACHED as usize, SEED);
        for chunk in past.chunks(256) {
            let counts = [chunk.len() as u32];
            let step = cache.plan_step(StepInput { mode: Mode::Prefill, counts: &counts, token_ids: Some(chunk) })?;
            cache.commit(&step)?;
        }
        let bytes = u64::from(config.hidden_size) * 4;
        Ok(Model {
            layers,
            workspace,
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

    /// Microseconds of one step.
    fn step(&mut self) -> Result<f64> {
        let device = self.recording.kernels().device().clone();
        let token = self.ids.next().map(|id| [id]);
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("egmla.host") });
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        let start = Instant::now();
        self.recording.clear();
        let token_ids = token.as_ref().filter(|_| self.gated).map(|id| &id[..]);
        let step = self.cache.plan_step(StepInput { mode: Mode::Decode, counts: &[1], token_ids })?;
        for (index, layer) in self.layers.iter().enumerate() {
            let path = DecodePath::Absorbed;
            let (hidden, out) = (&self.hidden, &self.out);
            layer.forward(&mut self.recording, &self.cache, index, &step, &self.workspace, path, hidden, out)?;
        }
        self.recording.record(&mut pass)?;
        drop(pass);
        self.cache.commit(&step)?;
        Ok(start.elapsed().as_secs_f64() * 1e6)
    }
}

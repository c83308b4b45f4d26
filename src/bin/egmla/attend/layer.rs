//! The layer over a schedule, on a device or with the reference.

use std::time::Instant;

use egmla::attention::{
    Attention, CacheOptions, DecodePath, GateRows, LatentCache, Mode, StepInput, Workspace, WorkspaceOptions,
};
use egmla::config::AttentionConfig;
use egmla::device::{Kernels, Region};
use egmla::readback;
use egmla::recording::Recording;
use egmla::reference::layer::{History, Layer};
use egmla::sequences::Sequences;
use egmla::storage::Storage;
use egmla::weights::AttentionWeights;

use super::schedule::{Planned, Schedule};
use super::{Phase, Summary};
use crate::adapter::Gpu;
use crate::engine::check_memory;
use crate::failure::Failure;
use crate::interrupt;
use crate::options::PathOptions;

/// Steps whose outputs wait on the device before they are read back together.
const STEPS_A_READ: usize = 64;

/// Runs the kernels. Steps are submitted one by one, so that no submission grows with the input.
pub fn on_gpu(
    gpu: &Gpu,
    config: &AttentionConfig,
    weights: &AttentionWeights,
    input: &Sequences,
    mut schedule: Schedule,
    options: &PathOptions,
) -> Result<(Vec<f32>, Summary), Failure> {
    let kernels = &gpu.kernels;
    let (storage, path) = (Storage::from(options.storage), DecodePath::from(options.decode));
    let mut attention = Attention::new(kernels, config, weights, storage)?;
    if options.gate_rows == GateRows::Table && config.up_projected_gate().is_some() {
        let mut recording = Recording::new(kernels);
        attention.load_gate_table(&mut recording)?;
        readback::submit(&recording, &gpu.queue)?;
    }
    let capacity = input.lengths.iter().copied().max().unwrap_or(0);
    let (n_layer, batch, gate_rows) = (1, input.lengths.len() as u32, options.gate_rows);
    let cache_options = CacheOptions { n_layer, batch, capacity, storage, gate_rows };
    let mut cache = LatentCache::new(kernels, config, cache_options)?;
    let workspace = match Workspace::new(&cache, WorkspaceOptions::new(schedule.most_tokens())) {
        Err(error @ egmla::Error::Limit { .. }) => {
            return Err(Failure::usage(format!("{error}; prefill fewer tokens at once with --chunk")));
        }
        other => other?,
    };
    gpu.check()?;

    let mut hidden = vec![0f32; input.hidden.len()];
    let (mut prefill, mut decode) = (Phase::default(), Phase::default());
    for (mode, phase) in [(Mode::Prefill, &mut prefill), (Mode::Decode, &mut decode)] {
        let start = Instant::now();
        loop {
            let steps: Vec<_> = std::iter::from_fn(|| schedule.next_if(mode)).take(STEPS_A_READ).collect();
            if steps.is_empty() {
                break;
            }
            interrupt::check()?;
            let outputs = {
                let mut layer =
                    DeviceLayer { kernels, attention: &attention, cache: &mut cache, workspace: &workspace };
                steps.iter().map(|step| layer.submit(gpu, input, step, path)).collect::<Result<Vec<_>, _>>()?
            };
            let regions: Vec<_> = outputs.iter().collect();
            let read = readback::wait(readback::read_f32(kernels, &gpu.queue, &regions))?;
            gpu.check()?;
            for (step, rows) in steps.iter().zip(&read) {
                scatter(rows, &step.rows, input.width, &mut hidden);
                phase.tokens += step.rows.len() as u64;
            }
        }
        phase.seconds = start.elapsed().as_secs_f64();
    }
    let mut memory = cache.memory(&workspace);
    memory.gate_rows += attention.gate_table_bytes();
    Ok((hidden, Summary { prefill, decode, memory: Some(memory) }))
}

struct DeviceLayer<'a> {
    kernels: &'a Kernels,
    attention: &'a Attention,
    cache: &'a mut LatentCache,
    workspace: &'a Workspace,
}

impl DeviceLayer<'_> {
    /// Submits one step; its output can be read once the queue has come to it.
    fn submit(&mut self, gpu: &Gpu, input: &Sequences, step: &Planned, path: DecodePath) -> egmla::Result<Region> {
        let rows = gather(&input.hidden, &step.rows, input.width);
        let hidden = Region::from(&self.kernels.upload("egmla.attend.input", bytemuck::cast_slice(&rows))?);
        let bytes = size_of_val(rows.as_slice()) as u64;
        let out = Region::new(&self.kernels.allocate("egmla.attend.output", bytes)?, 0, bytes);
        let ids: Option<Vec<u32>> = input.token_ids.as_ref().map(|ids| step.rows.iter().map(|&row| ids[row]).collect());
        let input = StepInput { mode: step.mode, counts: &step.counts, token_ids: ids.as_deref() };
        let planned = self.cache.plan_step(input)?;
        let mut recording = Recording::new(self.kernels);
        self.attention.forward(&mut recording, self.cache, 0, &planned, self.workspace, path, &hidden, &out)?;
        readback::submit(&recording, &gpu.queue)?;
        self.cache.commit(&planned)?;
        Ok(out)
    }
}

/// Runs the f64 reference. It keeps keys and values themselves, so storage and decode path say nothing to it.
pub fn on_cpu(
    config: AttentionConfig,
    weights: &AttentionWeights,
    input: &Sequences,
    schedule: Schedule,
    options: &PathOptions,
) -> Result<(Vec<f32>, Summary), Failure> {
    options.storage.tell_on_cpu();
    let (tokens, most) = (input.tokens() as u64, u64::from(schedule.most_tokens()));
    check_memory(&format!("an input of {tokens} tokens, {most} at once,"), Layer::bytes(&config, tokens, most))?;
    let layer = Layer::new(config, weights);
    let mut histories = vec![History::default(); input.lengths.len()];
    let mut hidden = vec![0f32; input.hidden.len()];
    let (mut prefill, mut decode) = (Phase::default(), Phase::default());
    for step in schedule {
        interrupt::check()?;
        let start = Instant::now();
        let mut rest = step.rows.as_slice();
        for (history, &count) in histories.iter_mut().zip(&step.counts) {
            let (rows, after) = rest.split_at(count as usize);
            rest = after;
            if rows.is_empty() {
                continue;
            }
            let x: Vec<f64> = gather(&input.hidden, rows, input.width).into_iter().map(f64::from).collect();
            let ids: Vec<u32> =
                input.token_ids.as_ref().map_or_else(Vec::new, |ids| rows.iter().map(|&row| ids[row]).collect());
            let y: Vec<f32> = layer.forward(&x, &ids, history).into_iter().map(|value| value as f32).collect();
            scatter(&y, rows, input.width, &mut hidden);
        }
        let phase = if step.mode == Mode::Prefill { &mut prefill } else { &mut decode };
        phase.tokens += step.rows.len() as u64;
        phase.seconds += start.elapsed().as_secs_f64();
    }
    Ok((hidden, Summary { prefill, decode, memory: None }))
}

fn gather(all: &[f32], rows: &[usize], width: usize) -> Vec<f32> {
    rows.iter().flat_map(|row| &all[row * width..][..width]).copied().collect()
}

fn scatter(from: &[f32], rows: &[usize], width: usize, all: &mut [f32]) {
    for (row, values) in rows.iter().zip(from.chunks_exact(width)) {
        all[row * width..][..width].copy_from_slice(values);
    }
}

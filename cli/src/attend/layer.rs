//! The layer over a schedule, on a device or on the CPU.

use std::time::Instant;

use egmla::attention::{Attention, AttentionOptions, CacheOptions, DecodePath, LatentCache, Mode, StepTokens};
use egmla::config::AttentionConfig;
use egmla::decoder::NativeLayer;
use egmla::readback;
use egmla::reference::layer::{History, Layer};
use egmla::sequences::Sequences;
use egmla::weights::AttentionWeights;
use egmla::{Recording, Region, Storage};

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
    let started = Instant::now();
    let kernels = &gpu.kernels;
    let (storage, decode_path) = (Storage::from(options.storage), DecodePath::from(options.decode));
    let attention =
        Attention::new(kernels, config, weights, AttentionOptions { storage, gate_rows: options.gate_rows })?;
    let cache_options = CacheOptions {
        batch: input.lengths.len() as u32,
        capacity: input.lengths.iter().copied().max().unwrap_or(0),
        storage,
        max_tokens: schedule.most_tokens(),
        decode_path,
        ..CacheOptions::default()
    };
    let cache = match LatentCache::new(&attention, cache_options) {
        Err(ref error @ egmla::Error::Limit { ref what, .. }) if what.starts_with("workspace") => {
            return Err(Failure::usage(format!("{error}; prefill fewer tokens at once with --chunk")));
        }
        other => other?,
    };
    let mut layer = DeviceLayer { attention: &attention, cache, recording: Recording::new(kernels) };
    // So that compiling the kernels does not count as speed.
    for step in schedule.warm_up() {
        let output = layer.submit(input, &step)?;
        readback::wait(readback::read_f32(kernels, &[&output]))?;
    }
    layer.cache.reset();
    gpu.check()?;
    let first_use = Some(started.elapsed().as_secs_f64());

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
            let submitted = steps.iter().map(|step| layer.submit(input, step));
            let outputs = submitted.collect::<Result<Vec<_>, _>>()?;
            let regions: Vec<_> = outputs.iter().collect();
            let read = readback::wait(readback::read_f32(kernels, &regions))?;
            gpu.check()?;
            for (step, rows) in steps.iter().zip(&read) {
                scatter(rows, &step.rows, input.width, &mut hidden);
                phase.tokens += step.rows.len() as u64;
            }
        }
        phase.seconds = start.elapsed().as_secs_f64();
    }
    let mut memory = layer.cache.memory();
    memory.gate_rows += attention.gate_table_bytes();
    Ok((hidden, Summary { first_use, prefill, decode, memory: Some(memory) }))
}

struct DeviceLayer<'a> {
    attention: &'a Attention,
    cache: LatentCache,
    recording: Recording,
}

impl DeviceLayer<'_> {
    /// Submits one step; its output can be read once the queue has come to it.
    fn submit(&mut self, input: &Sequences, step: &Planned) -> egmla::Result<Region> {
        let kernels = self.recording.kernels();
        let rows = gather(&input.hidden, &step.rows, input.width);
        let hidden = Region::from(&kernels.upload("egmla.attend.input", bytemuck::cast_slice(&rows))?);
        let bytes = size_of_val(rows.as_slice()) as u64;
        let out = Region::new(&kernels.allocate("egmla.attend.output", bytes)?, 0, bytes);
        let ids: Option<Vec<u32>> = input.token_ids.as_ref().map(|ids| step.rows.iter().map(|&row| ids[row]).collect());
        let tokens = StepTokens { counts: &step.counts, ids: ids.as_deref() };
        let prepared = self.cache.prepare(step.mode, tokens)?;
        self.recording.clear();
        self.attention.forward(&mut self.recording, &self.cache, &prepared, 0, &hidden, &out)?;
        readback::submit(&mut self.recording)?;
        self.cache.commit(prepared)?;
        Ok(out)
    }
}

/// The layer on new tokens of a sequence, by its number: hidden states and ids.
type Forward = Box<dyn FnMut(usize, &[f32], &[u32]) -> Vec<f32>>;

/// Runs on the CPU, in f32, or in f64 by the reference. Storage and decode path do not apply.
pub fn on_cpu(
    reference: bool,
    config: AttentionConfig,
    weights: &AttentionWeights,
    input: &Sequences,
    schedule: Schedule,
    options: &PathOptions,
) -> Result<(Vec<f32>, Summary), Failure> {
    options.storage.tell_on_cpu();
    let (tokens, most) = (input.tokens() as u64, u64::from(schedule.most_tokens()));
    let bytes = if reference { Layer::bytes } else { NativeLayer::bytes };
    check_memory(&format!("an input of {tokens} tokens, {most} at once,"), bytes(&config, tokens, most))?;
    let mut forward: Forward = if reference {
        let layer = Layer::new(config, weights)?;
        let mut histories = vec![History::default(); input.lengths.len()];
        Box::new(move |sequence, x, ids| {
            let x: Vec<f64> = x.iter().copied().map(f64::from).collect();
            layer.forward(&x, ids, &mut histories[sequence]).into_iter().map(|value| value as f32).collect()
        })
    } else {
        let layer = NativeLayer::new(&config, weights.clone())?;
        let mut histories: Vec<_> = input.lengths.iter().map(|&length| layer.history(length as usize)).collect();
        Box::new(move |sequence, x, ids| layer.forward(x, ids, &mut histories[sequence]))
    };
    let mut hidden = vec![0f32; input.hidden.len()];
    let (mut prefill, mut decode) = (Phase::default(), Phase::default());
    for step in schedule {
        interrupt::check()?;
        let start = Instant::now();
        let mut rest = step.rows.as_slice();
        for (sequence, &count) in step.counts.iter().enumerate() {
            let (rows, after) = rest.split_at(count as usize);
            rest = after;
            if rows.is_empty() {
                continue;
            }
            let x = gather(&input.hidden, rows, input.width);
            let ids: Vec<u32> =
                input.token_ids.as_ref().map_or_else(Vec::new, |ids| rows.iter().map(|&row| ids[row]).collect());
            scatter(&forward(sequence, &x, &ids), rows, input.width, &mut hidden);
        }
        let phase = if step.mode == Mode::Prefill { &mut prefill } else { &mut decode };
        phase.tokens += step.rows.len() as u64;
        phase.seconds += start.elapsed().as_secs_f64();
    }
    Ok((hidden, Summary { first_use: None, prefill, decode, memory: None }))
}

fn gather(all: &[f32], rows: &[usize], width: usize) -> Vec<f32> {
    rows.iter().flat_map(|row| &all[row * width..][..width]).copied().collect()
}

fn scatter(from: &[f32], rows: &[usize], width: usize, all: &mut [f32]) {
    for (row, values) in rows.iter().zip(from.chunks_exact(width)) {
        all[row * width..][..width].copy_from_slice(values);
    }
}

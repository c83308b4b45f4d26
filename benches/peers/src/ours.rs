//! Our side: the only file that calls into egmla.

use bytemuck::cast_slice;
use egmla::low_level::kernels::attention_decode::{DecodeSequence, SPLIT, split_length};
use egmla::low_level::kernels::attention_prefill::QueryTile;
use egmla::low_level::kernels::cache_read::SequenceRow;
use egmla::low_level::kernels::{attention_absorbed, attention_combine, attention_prefill, matmul};
use egmla::readback;
use egmla::{Kernels, Recording, Region, Storage, wgpu};

use crate::problem::{Matmul, MlaDecode, Prefill, side_by_side, swap_axes};
use crate::{Failure, Side};

/// Adds a case's dispatches to a recording.
type Encode = Box<dyn Fn(&mut Recording) -> egmla::Result<()>>;

/// A case with its inputs on the device.
pub struct Ours {
    kernels: Kernels,
    /// Kept: from the second run on nothing of the device is made anew.
    recording: Recording,
    encode: Encode,
    output: Region,
    /// From the kernel's order of results to the problem's.
    reorder: Box<dyn Fn(Vec<f32>) -> Vec<f32>>,
}

impl Side for Ours {
    fn run(&mut self) -> Result<(), Failure> {
        self.recording.clear();
        (self.encode)(&mut self.recording)?;
        readback::submit(&mut self.recording)?;
        finish(&self.kernels)
    }

    fn result(&self) -> Result<Vec<f32>, Failure> {
        let read = readback::wait(readback::read_f32(&self.kernels, &[&self.output]))?;
        Ok((self.reorder)(read.concat()))
    }
}

fn finish(kernels: &Kernels) -> Result<(), Failure> {
    kernels.device().poll(wgpu::PollType::wait_indefinitely())?;
    Ok(())
}

/// Kernels without a compiled pipeline, and the buffers of one case.
struct Bench {
    kernels: Kernels,
}

impl Bench {
    fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> egmla::Result<Self> {
        Ok(Bench { kernels: Kernels::new(device, queue)? })
    }

    fn floats(&self, values: &[f32]) -> egmla::Result<Region> {
        self.words(cast_slice(values))
    }

    fn words(&self, words: &[u32]) -> egmla::Result<Region> {
        Ok(Region::from(&self.kernels.upload("input", cast_slice(words))?))
    }

    fn output(&self, elements: usize) -> egmla::Result<Region> {
        Ok(Region::from(&self.kernels.allocate("output", 4 * elements as u64)?))
    }

    fn ready(
        self,
        output: &Region,
        encode: impl Fn(&mut Recording) -> egmla::Result<()> + 'static,
        reorder: impl Fn(Vec<f32>) -> Vec<f32> + 'static,
    ) -> Result<Box<dyn Side>, Failure> {
        let Bench { kernels } = self;
        // Uploads travel with the next submission: not with the first that is timed.
        kernels.queue().submit([]);
        finish(&kernels)?;
        let (recording, encode, reorder) = (Recording::new(&kernels), Box::new(encode), Box::new(reorder));
        Ok(Box::new(Ours { kernels, recording, encode, output: output.clone(), reorder }))
    }
}

pub fn matmul(device: &wgpu::Device, queue: &wgpu::Queue, inputs: &Matmul) -> Result<Box<dyn Side>, Failure> {
    let bench = Bench::new(device, queue)?;
    let (x, w) = (bench.floats(&inputs.x)?, bench.floats(&inputs.w)?);
    let y = bench.output(inputs.rows * inputs.cols)?;
    let bias = bench.kernels.absent();
    let (rows, inner, cols) = (inputs.rows as u32, inputs.inner as u32, inputs.cols as u32);
    let problem = matmul::Matmul::linear(rows, inner, cols, false, Storage::F32);
    let output = y.clone();
    let encode =
        move |recording: &mut Recording| recording.add(&problem, matmul::Args { x: &x, w: &w, bias: &bias, y: &y });
    bench.ready(&output, encode, |values| values)
}

pub fn prefill(device: &wgpu::Device, queue: &wgpu::Queue, inputs: &Prefill) -> Result<Box<dyn Side>, Failure> {
    let bench = Bench::new(device, queue)?;
    let &Prefill { heads, tokens, width, .. } = inputs;
    let by_token = |values: &[f32]| swap_axes(values, tokens, width);
    let q = bench.floats(&by_token(&inputs.q))?;
    let kv = bench.floats(&side_by_side(&by_token(&inputs.k), width, &by_token(&inputs.v), width))?;
    let rope_cache = bench.kernels.absent();
    let tile_q = attention_prefill::tile_q(bench.kernels.context());
    let slices = attention_prefill::slices(width as u32);
    let count = tokens as u32;
    let tiles: Vec<QueryTile> = (0..count)
        .step_by(tile_q as usize)
        .map(|first| QueryTile { first_token: first, count: tile_q.min(count - first), position: first, sequence: 0 })
        .collect();
    let queries = bench.words(cast_slice(&tiles))?;
    let sequence = SequenceRow { first_row: 0, first_slot: 0, length: count, token: 0 };
    let sequences = bench.words(cast_slice(&[sequence]))?;
    let values = bench.output(tokens * heads * width)?;
    let softmax = bench.output(tokens * heads * slices as usize * 2)?;
    let problem = attention_prefill::AttentionPrefill {
        tokens: count,
        query_tiles: tiles.len() as u32,
        tile_q,
        n_sequence: 1,
        n_head: heads as u32,
        n_kv_head: heads as u32,
        d_nope: width as u32,
        d_rope: 0,
        d_value: width as u32,
        kv_first: 0,
        kv_rows: count,
        cache_rows: count,
        first: true,
        last: true,
        scale: inputs.scale(),
        weights: Storage::F32,
        storage: Storage::F32,
        kv: Storage::F32,
    };
    let output = values.clone();
    let encode = move |recording: &mut Recording| {
        let args = attention_prefill::Args {
            q: &q,
            kv: &kv,
            rope_cache: &rope_cache,
            queries: &queries,
            sequences: &sequences,
            values: &values,
            softmax: &softmax,
        };
        recording.add(&problem, args)
    };
    bench.ready(&output, encode, move |values| swap_axes(&values, heads, width))
}

pub fn mla_decode(device: &wgpu::Device, queue: &wgpu::Queue, inputs: &MlaDecode) -> Result<Box<dyn Side>, Failure> {
    let bench = Bench::new(device, queue)?;
    let &MlaDecode { heads, latent, rope, cached, .. } = inputs;
    let (absorbed, q) = (bench.floats(&inputs.q_latent)?, bench.floats(&inputs.q_rope)?);
    let (latent_cache, rope_cache) = (bench.floats(&inputs.latents)?, bench.floats(&inputs.ropes)?);
    let length = cached as u32;
    let split = split_length(bench.kernels.context(), length.into(), attention_absorbed::workgroups(heads as u32));
    let splits = length.div_ceil(split);
    let sequence =
        DecodeSequence { first_row: 0, first_slot: 0, length, token: 0, tokens: 1, partial: 0, splits, unused: 0 };
    let sequences = bench.words(cast_slice(&[sequence]))?;
    let ranges = bench.words(&[0, splits])?;
    let partials = splits as usize * heads;
    let (partial_values, partial_softmax) = (bench.output(partials * latent)?, bench.output(partials * 2)?);
    let (values, lse) = (bench.output(heads * latent)?, bench.output(heads)?);
    let attend = attention_absorbed::AttentionAbsorbed {
        tokens: 1,
        n_sequence: 1,
        most_tokens: 1,
        split,
        splits: length.next_multiple_of(SPLIT) / split,
        partials: splits,
        n_head: heads as u32,
        d_latent: latent as u32,
        d_nope: 0,
        d_rope: rope as u32,
        cache_rows: length,
        scale: inputs.scale(),
        weights: Storage::F32,
        storage: Storage::F32,
    };
    let combine = attention_combine::AttentionCombine { tokens: 1, n_head: heads as u32, width: latent as u32, splits };
    let output = values.clone();
    let encode = move |recording: &mut Recording| {
        let args = attention_absorbed::Args {
            absorbed: &absorbed,
            q: &q,
            latent_cache: &latent_cache,
            rope_cache: &rope_cache,
            sequences: &sequences,
            partial_values: &partial_values,
            partial_softmax: &partial_softmax,
        };
        recording.add(&attend, args)?;
        let args = attention_combine::Args {
            partial_values: &partial_values,
            partial_softmax: &partial_softmax,
            ranges: &ranges,
            values: &values,
            lse: &lse,
        };
        recording.add(&combine, args)
    };
    bench.ready(&output, encode, |values| values)
}

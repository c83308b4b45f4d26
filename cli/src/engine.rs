//! A language model on whatever `--adapter` chose: kernels on a device, or the CPU, in f32 or as the reference in f64.

use std::time::Instant;

use egmla::attention::{AttentionOptions, CacheOptions, DecodePath, GateRows, MemoryReport, Mode, StepTokens};
use egmla::decoder::{
    CpuDecoder, CpuState, Decoder, DecoderCache, DecoderState, Logits, ModelFolder, NativeDecoder, NativeState,
};
use egmla::readback;
use egmla::{Recording, Storage};

use crate::adapter::{Backend, Gpu};
use crate::failure::Failure;
use crate::interrupt;
use crate::profile::Profile;

/// Most tokens of one prefill step: longer texts go in chunks.
const CHUNK: u32 = 512;

/// Most tokens of a step whose logits are all wanted: one binding holds them.
fn scored_at_once(binding: u64, vocab_size: u32) -> u32 {
    let rows = binding / (4 * u64::from(vocab_size)).max(1);
    rows.clamp(1, CHUNK.into()) as u32
}

/// Most bytes that computing on the CPU may take beside the weights: a small file can ask for any number.
const MOST_MEMORY: u64 = 8 << 30;

/// Fails where the CPU would need more memory than it may take, or than can be had.
pub fn check_memory(what: &str, needed: u64) -> Result<(), Failure> {
    let mut room: Vec<u8> = Vec::new();
    let had = usize::try_from(needed).is_ok_and(|bytes| room.try_reserve_exact(bytes).is_ok());
    // A compiler may leave out a reservation that nobody uses.
    std::hint::black_box(&room);
    if needed <= MOST_MEMORY && had {
        return Ok(());
    }
    let most = if needed > MOST_MEMORY {
        format!("at most {MOST_MEMORY} are taken")
    } else {
        "which cannot be had".to_owned()
    };
    Err(Failure::usage(format!(
        "{what} needs {needed} bytes on the CPU, {most}: take a GPU adapter, or fewer tokens at once"
    )))
}

/// One sequence of a language model.
pub enum Engine<'a> {
    /// On the CPU, in f32.
    Cpu {
        /// The model.
        decoder: Box<NativeDecoder>,
        /// Its past.
        state: NativeState,
        /// Storage of its weights.
        storage: Storage,
        /// Most tokens of a sequence.
        capacity: u32,
    },
    /// On the CPU, in f64.
    Reference {
        /// The model.
        decoder: Box<CpuDecoder>,
        /// Its past.
        state: CpuState,
        /// Most tokens of a sequence.
        capacity: u32,
    },
    /// On a device.
    Gpu {
        /// The device.
        gpu: &'a Gpu,
        /// The model.
        decoder: Box<Decoder>,
        /// Its past.
        cache: Box<DecoderCache>,
        /// Buffers of a step.
        state: Box<DecoderState>,
        /// The recording of the steps.
        recording: Box<Recording>,
        /// Path of the last decode step.
        used: DecodePath,
        /// Times of the decode steps, if they are wanted.
        profile: Option<Box<Profile>>,
    },
}

/// Options of the engine.
pub struct EngineOptions {
    /// Storage on a device; of the weights on the CPU.
    pub storage: Storage,
    /// Decode path on a device.
    pub decode: DecodePath,
    /// Gate rows on a device.
    pub gate_rows: GateRows,
    /// Most tokens of a sequence.
    pub capacity: u32,
    /// Most tokens that are fed at once.
    pub max_tokens: u32,
    /// Logits of every fed token are wanted, not just of the last.
    pub all_logits: bool,
    /// Decode steps are timed, on a device.
    pub profile: bool,
}

impl<'a> Engine<'a> {
    /// Puts a model's weights where they compute.
    pub fn new(backend: &'a Backend, folder: &ModelFolder, options: &EngineOptions) -> Result<Self, Failure> {
        match backend {
            Backend::Cpu { reference, .. } => {
                let config = folder.config();
                let new = options.max_tokens.min(CHUNK).into();
                let rows = if options.all_logits { new } else { 1 };
                let capacity = options.capacity;
                let bytes = if *reference { CpuDecoder::bytes } else { NativeDecoder::bytes };
                let needed = bytes(config, capacity.into(), new, rows);
                check_memory(&format!("a text of {capacity} tokens, {new} at once,"), needed)?;
                if *reference {
                    if options.storage != Storage::F32 {
                        tracing::warn!("--storage f16 changes nothing for the reference, which computes in f64");
                    }
                    let decoder = Box::new(CpuDecoder::new(config, &folder.weights()?)?);
                    return Ok(Engine::Reference { state: decoder.state(), decoder, capacity });
                }
                let storage = options.storage;
                let decoder = Box::new(folder.native_decoder(storage)?);
                Ok(Engine::Cpu { state: decoder.state(capacity as usize), decoder, storage, capacity })
            }
            Backend::Gpu(gpu) => {
                let (storage, gate_rows) = (options.storage, options.gate_rows);
                let decoder = folder.decoder(&gpu.kernels, AttentionOptions { storage, gate_rows })?;
                let mut max_tokens = options.max_tokens.min(CHUNK);
                if options.all_logits {
                    let binding = gpu.kernels.device().limits().max_storage_buffer_binding_size;
                    max_tokens = max_tokens.min(scored_at_once(binding, decoder.config().vocab_size));
                }
                let cache = decoder.cache(CacheOptions {
                    capacity: options.capacity,
                    storage,
                    max_tokens,
                    decode_path: options.decode,
                    ..CacheOptions::default()
                })?;
                let state = decoder.state(&cache, options.all_logits)?;
                let profile = options.profile.then(|| Profile::new(&gpu.kernels).map(Box::new)).transpose()?;
                gpu.check()?;
                Ok(Engine::Gpu {
                    gpu,
                    decoder: Box::new(decoder),
                    cache: Box::new(cache),
                    state: Box::new(state),
                    recording: Box::new(Recording::new(&gpu.kernels)),
                    used: DecodePath::Expanded,
                    profile,
                })
            }
        }
    }

    /// Name of the storage in effect.
    pub fn storage(&self) -> &'static str {
        match self {
            Engine::Cpu { storage, .. } => storage.name(),
            Engine::Reference { .. } => "f64",
            Engine::Gpu { decoder, .. } => decoder.storage().name(),
        }
    }

    /// Storage of the cache; the reference's is counted as f32.
    pub fn cache_storage(&self) -> Storage {
        match self {
            Engine::Cpu { .. } | Engine::Reference { .. } => Storage::F32,
            Engine::Gpu { decoder, .. } => decoder.storage(),
        }
    }

    /// Name of the path that the last decode step took; the expanded one before any on a device.
    pub fn decode(&self) -> &'static str {
        match self {
            Engine::Gpu { used: DecodePath::Absorbed, .. } => "absorbed",
            Engine::Cpu { decoder, .. } if decoder.keeps_latents() => "absorbed",
            Engine::Cpu { .. } | Engine::Reference { .. } | Engine::Gpu { .. } => "expanded",
        }
    }

    /// Bytes on the device.
    pub fn memory(&self) -> Option<MemoryReport> {
        match self {
            Engine::Cpu { .. } | Engine::Reference { .. } => None,
            Engine::Gpu { decoder, cache, state, .. } => {
                let mut memory = state.memory(cache);
                memory.gate_rows += decoder.gate_table_bytes();
                Some(memory)
            }
        }
    }

    /// Times of the decode steps, if they were wanted and there is a device.
    pub fn profile(&self) -> Option<&Profile> {
        match self {
            Engine::Cpu { .. } | Engine::Reference { .. } => None,
            Engine::Gpu { profile, .. } => profile.as_deref(),
        }
    }

    /// Forgets every token, and the times of those before.
    pub fn reset(&mut self) {
        match self {
            Engine::Cpu { state, .. } => state.truncate(0),
            Engine::Reference { state, .. } => state.truncate(0),
            Engine::Gpu { cache, profile, .. } => {
                cache.reset();
                profile.iter_mut().for_each(|profile| profile.clear());
            }
        }
    }

    /// Feeds tokens of a text, in chunks, and returns the logits of the last.
    pub fn prefill(&mut self, ids: &[u32]) -> Result<Vec<f32>, Failure> {
        let chunks = ids.chunks(self.chunk());
        let last = chunks.len().saturating_sub(1);
        let mut logits = Vec::new();
        for (number, chunk) in chunks.enumerate() {
            let wanted = if number == last { Logits::Last } else { Logits::None };
            logits = self.feed(chunk, Mode::Prefill, wanted)?;
        }
        Ok(logits)
    }

    /// Feeds one token and returns its logits.
    pub fn step(&mut self, id: u32) -> Result<Vec<f32>, Failure> {
        self.feed(&[id], Mode::Decode, Logits::Last)
    }

    /// Feeds tokens of a text, in chunks, and hands the logits from row `first` on to `score`, with the row that each
    /// part begins at.
    pub fn score(
        &mut self,
        ids: &[u32],
        first: usize,
        mut score: impl FnMut(usize, &[f32]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let (vocab, most) = (self.vocab_size(), self.chunk());
        for (number, chunk) in ids.chunks(most).enumerate() {
            let start = number * most;
            if start + chunk.len() <= first {
                self.feed(chunk, Mode::Prefill, Logits::None)?;
                continue;
            }
            let logits = self.feed(chunk, Mode::Prefill, Logits::All)?;
            let skipped = first.saturating_sub(start);
            score(start + skipped, &logits[skipped * vocab..])?;
        }
        Ok(())
    }

    /// Most tokens that are fed at once.
    fn chunk(&self) -> usize {
        match self {
            Engine::Cpu { .. } | Engine::Reference { .. } => CHUNK as usize,
            Engine::Gpu { cache, .. } => cache.max_tokens() as usize,
        }
    }

    fn vocab_size(&self) -> usize {
        match self {
            Engine::Cpu { decoder, .. } => decoder.config().vocab_size as usize,
            Engine::Reference { decoder, .. } => decoder.config().vocab_size as usize,
            Engine::Gpu { decoder, .. } => decoder.config().vocab_size as usize,
        }
    }

    fn feed(&mut self, ids: &[u32], mode: Mode, logits: Logits) -> Result<Vec<f32>, Failure> {
        interrupt::check()?;
        match self {
            Engine::Cpu { decoder, state, capacity, .. } => {
                room_for(ids.len(), state.len(), *capacity)?;
                Ok(decoder.forward(ids, state, logits)?)
            }
            Engine::Reference { decoder, state, capacity } => {
                room_for(ids.len(), state.len(), *capacity)?;
                Ok(decoder.forward(ids, state, logits)?.into_iter().map(|logit| logit as f32).collect())
            }
            Engine::Gpu { gpu, decoder, cache, state, recording, used, profile } => {
                let begun = Instant::now();
                let tokens = StepTokens { counts: &[ids.len() as u32], ids: Some(ids) };
                let step = decoder.prepare(cache, mode, tokens)?;
                if mode == Mode::Decode {
                    *used = step.step().path();
                }
                recording.clear();
                let region = decoder.forward(recording, cache, &step, state, logits)?;
                let mut profile = profile.as_mut().filter(|_| mode == Mode::Decode);
                match &mut profile {
                    None => readback::submit(recording)?,
                    Some(profile) => profile.run(recording, begun)?,
                }
                cache.commit(step.into_step())?;
                let asked = Instant::now();
                let read = readback::wait(readback::read_f32(&gpu.kernels, &[&region]));
                profile.into_iter().for_each(|profile| profile.read(asked));
                gpu.check()?;
                Ok(read?.into_iter().next().unwrap_or_default())
            }
        }
    }
}

/// Refuses more tokens than the text was said to have.
fn room_for(added: usize, length: usize, capacity: u32) -> Result<(), Failure> {
    if length + added <= capacity as usize {
        return Ok(());
    }
    let (length, added) = (length as u32, added as u64);
    Err(egmla::Error::CacheFull { sequence: 0, length, added, capacity }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vocabulary_over_a_binding_is_scored_in_smaller_steps() {
        let default = wgpu::Limits::default().max_storage_buffer_binding_size;
        assert_eq!(scored_at_once(default, 128_256), 261);
        assert_eq!(scored_at_once(default, 256), CHUNK);
        assert_eq!(scored_at_once(1024, 128_256), 1);
        assert_eq!(scored_at_once(u64::MAX, 0), CHUNK);
    }
}

//! A model's first layer as data: for every length of a text up to a limit, the recordings that prefill all tokens but the last
//! and decode that one, by either path.
//!
//! A recording depends on the number of tokens and on their ids. Each number has its own recording. Ids are data in the uploaded
//! words, and the export finds their places: it records three times, with ids that all differ, and requires that exactly the
//! words of ids differ. Group lists are then those of distinct ids. With repeated ids two groups have the same id: twice the
//! work, the same sum.

use std::path::Path;

use egmla::attention::{AttentionOptions, CacheOptions, DecodePath, GateRows, Mode, StepTokens};
use egmla::check::capture::{Action, Blob, BufferData, Capture, Captured, ToleranceData};
use egmla::check::compare::{F16_LIMIT, F32_LIMIT, Tolerance};
use egmla::check::export::webgpu;
use egmla::config::DecoderConfig;
use egmla::decoder::{CpuDecoder, Decoder, DecoderCache, DecoderState, DecoderWeights, Logits, ModelFolder};
use egmla::{Recording, Storage};
use serde::Serialize;

use super::{write as write_files, write_json};
use crate::adapter::Gpu;
use crate::failure::Failure;
use crate::generate::CacheBytes;

/// Most tokens of a text.
const MOST_TOKENS: usize = 48;

/// Texts whose ids by the program's tokenizer the page's own must agree with.
const TEXTS: &[&str] = &[
    "ROMEO:\nO, she doth teach the torches to burn bright!",
    "To be, or not to be: that is the question",
    "  two spaces,\ttabs\n\n\nlines  and trailing blanks   ",
    "don't can't I'll we've you're he'd I'm 'tis 'Twas",
    "3rd of May 1597; £20, naïve café, Ægir, 日本語, 🎭 and e\u{301}",
    "a",
    " ",
    "\u{a0}\u{2003}no-break and em spaces\r\n",
    "ALL CAPITALS? (brackets) [more] {and} <less> #1 @x *** --- ...",
];

/// `layer.json`.
#[derive(Debug, Serialize)]
struct LayerData {
    most_tokens: usize,
    hidden_size: u32,
    buffers: Vec<BufferData>,
    variants: Vec<VariantData>,
    /// Ids that the page's tokenizer must reproduce.
    tokenizer: Vec<TextData>,
    /// Logits that the page's f64 must reproduce.
    reference: ReferenceData,
}

/// A cache storage and a decode path; `layer/<file>.json` holds its recordings, by number of tokens less one.
#[derive(Debug, Serialize)]
struct VariantData {
    storage: &'static str,
    path: &'static str,
    file: String,
    tolerance: ToleranceData,
    /// Bytes of a token in the cache of this layer, and of others of the same heads.
    cache: CacheBytes,
    /// Bytes on the device for `most_tokens`, by purpose.
    memory: Vec<(&'static str, u64)>,
}

#[derive(Debug, Serialize)]
struct TextData {
    text: &'static str,
    ids: Vec<u32>,
}

/// Logits of the model cut down to its first layer, `[tokens, vocab]` in f64.
#[derive(Debug, Serialize)]
struct ReferenceData {
    ids: Vec<u32>,
    logits: Blob,
}

/// A text of one length.
#[derive(Debug, Serialize)]
struct Program {
    /// Every reading is the stream behind the layer, `[tokens, hidden]`: of the prefilled tokens, where there are some, then
    /// of the last.
    actions: Vec<Action>,
    /// Places of the ids: index of the buffer, word, token.
    ids: Vec<(usize, usize, usize)>,
}

/// The model cut down to its first layer.
struct Model<'a> {
    decoder: &'a Decoder,
    cache: DecoderCache,
    state: DecoderState,
}

impl Model<'_> {
    /// Records a text: all tokens but the last prefilled, then that one decoded.
    fn record(&mut self, capture: &Capture, ids: &[u32]) -> Result<Vec<Action>, Failure> {
        let width = self.decoder.config().attention.hidden_size() as usize;
        self.cache.reset();
        let (first, last) = ids.split_at(ids.len() - 1);
        for (mode, ids) in [(Mode::Prefill, first), (Mode::Decode, last)] {
            if ids.is_empty() {
                continue;
            }
            let mut recording = Recording::new(self.cache.kernels());
            let tokens = StepTokens { counts: &[ids.len() as u32], ids: Some(ids) };
            let Model { decoder, cache, state } = self;
            decoder.advance(&mut recording, cache, state, (mode, tokens), Logits::None)?;
            capture.submit(&mut recording)?;
            capture.read_last(ids.len() * width)?;
        }
        Ok(capture.take_actions())
    }

    /// Records texts of one length, and finds the places of their ids.
    fn program(&mut self, (capture, probe): (&Capture, &Capture), tokens: usize) -> Result<Program, Failure> {
        let vocab = self.decoder.config().vocab_size;
        let text = |first: u32, step: u32| (0..tokens as u32).map(|i| (first + i * step) % vocab).collect::<Vec<_>>();
        let own = text(1000, 3);
        let actions = self.record(capture, &own)?;
        let mut places: Option<Vec<_>> = None;
        for other in [text(201, 5), text(640, 7)] {
            let others = self.record(probe, &other)?;
            let differences = capture.differences(&actions, probe, &others)?;
            let found = differences.iter().map(|word| {
                let token = own.iter().zip(&other).position(|ids| ids == (&word.here, &word.there));
                let token =
                    token.ok_or_else(|| Failure::run(format!("{word:?} is no token id of the recorded texts")))?;
                Ok((word.buffer, word.word, token))
            });
            let found = found.collect::<Result<Vec<_>, Failure>>()?;
            if places.as_ref().is_some_and(|places| *places != found) {
                return Err(Failure::run("token ids stand in different places of recordings of one length"));
            }
            places = Some(found);
        }
        Ok(Program { actions, ids: places.unwrap_or_default() })
    }
}

/// A model whose first layer can be exported.
pub struct Source {
    model: ModelFolder,
    /// Of one layer.
    config: DecoderConfig,
    weights: DecoderWeights,
}

impl Source {
    pub fn open(folder: &Path) -> Result<Self, Failure> {
        let model = ModelFolder::open(folder)?;
        let mut weights = model.weights()?;
        weights.layers.truncate(1);
        let config = DecoderConfig { n_layer: 1, ..model.config().clone() };
        if config.attention.gate().is_none() || (config.vocab_size as usize) < 1024 {
            return Err(Failure::usage(format!("{}: a gate and a vocabulary of 1024 are needed", folder.display())));
        }
        Ok(Source { model, config, weights })
    }
}

/// Writes `layer.json`, `layer.bin` and the recordings; returns their bytes.
pub fn write(gpu: &Gpu, source: Source, out: &Path) -> Result<u64, Failure> {
    let Source { model, config, weights } = source;
    let capture = Capture::new(&gpu.kernels, webgpu(None));
    let options = AttentionOptions { storage: Storage::F16, gate_rows: GateRows::Recompute };
    let decoder = Decoder::new(capture.kernels(), &config, &weights, options)?;
    // Takes the recordings that only locate the ids.
    let probe = Capture::new(&gpu.kernels, webgpu(None));
    let programs = out.join("layer");
    std::fs::create_dir_all(&programs).map_err(|error| Failure::run(format!("{}: {error}", programs.display())))?;

    let mut total = 0;
    let mut variants = Vec::new();
    let capacity = MOST_TOKENS as u32;
    for (storage, relative) in [(Storage::F32, F32_LIMIT), (Storage::F16, F16_LIMIT)] {
        for (name, decode_path) in [("expanded", DecodePath::Expanded), ("absorbed", DecodePath::Absorbed)] {
            let options =
                CacheOptions { capacity, storage, max_tokens: capacity, decode_path, ..CacheOptions::default() };
            let cache = decoder.cache(options)?;
            let state = decoder.state(&cache, false)?;
            let memory = state.memory(&cache).lines().into();
            let mut of_path = Model { decoder: &decoder, cache, state };
            let lengths = (1..=MOST_TOKENS).map(|tokens| of_path.program((&capture, &probe), tokens));
            let file = format!("{}_{name}", storage.name());
            total += write_json(&programs, &file, &lengths.collect::<Result<Vec<_>, _>>()?)?;
            let (tolerance, cache) = (Tolerance { relative }.into(), CacheBytes::of(&config.attention, 1, storage));
            variants.push(VariantData { storage: storage.name(), path: name, file, tolerance, cache, memory });
        }
    }
    let encode = |&text: &&'static str| Ok(TextData { text, ids: model.tokenizer().encode(text)? });
    let tokenizer = TEXTS.iter().map(encode).collect::<Result<Vec<_>, Failure>>()?;
    let ids = tokenizer[0].ids.clone();
    let reference = CpuDecoder::new(&config, &weights)?;
    let logits = reference.forward(&ids, &mut reference.state(), Logits::All)?;
    let Captured { buffers, mut blobs, .. } = capture.finish();
    let logits = blobs.add(bytemuck::cast_slice(&logits));
    let data = LayerData {
        most_tokens: MOST_TOKENS,
        hidden_size: config.attention.hidden_size(),
        buffers,
        variants,
        tokenizer,
        reference: ReferenceData { ids, logits },
    };
    Ok(total + write_files(out, "layer", &data, &blobs)?)
}

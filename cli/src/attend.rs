//! `egmla attend`: one attention layer on a file.

mod expected;
mod layer;
mod schedule;

use std::path::{Path, PathBuf};

use clap::Args;
use egmla::config::{AttentionConfig, weight_block_size};
use egmla::files::read_safetensors;
use egmla::gguf::{is_gguf, read_config};
use egmla::sequences::Sequences;
use egmla::weights::{AttentionWeights, Checkpoint, LayerNumber, model_folder};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::adapter::{self, AdapterOption, Backend};
use crate::console;
use crate::failure::Failure;
use crate::interrupt;
use crate::options::PathOptions;
use crate::output::Output;
use expected::ExpectedOptions;
use schedule::{Prefill, Schedule};

/// Options of `egmla attend`.
#[derive(Args, Debug)]
pub struct AttendArgs {
    /// The layer's dimensions: a checkpoint's `config.json`
    #[arg(long, value_name = "FILE", required_unless_present = "model")]
    config: Option<PathBuf>,
    /// By the rules of this type, in place of the configuration's `model_type`
    #[arg(long, value_name = "TYPE")]
    model_type: Option<String>,
    /// The layer's weights (f32, f16, bf16 or fp8): a safetensors file, an index of shards or a folder with one layer of attention
    #[arg(long, value_name = "FILE", required_unless_present = "model")]
    weights: Option<PathBuf>,
    /// In place of --config and --weights: a folder with config.json and weights in safetensors, a GGUF file, or a model's name
    /// in Hugging Face's cache (org/name). Only the tensors of --layer are read
    #[arg(long, value_name = "DIR|FILE|NAME", conflicts_with_all = ["config", "weights"], requires = "layer")]
    model: Option<PathBuf>,
    /// The layer of --model, from 0 on; N.0 and N.1 where a layer has two attentions (LongCat-Flash)
    #[arg(long, value_name = "N")]
    layer: Option<LayerNumber>,
    /// `hidden_states` [tokens, hidden] f32, `token_ids` [tokens] u32 or i64, `sequence_lengths` [batch] (optional)
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Where `hidden_states` [tokens, hidden] f32 is written; `-` is stdout
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Tokens of each sequence to prefill; the rest is decoded one at a time from the cache
    #[arg(long, value_name = "all|N", default_value = "all", value_parser = Prefill::parse)]
    prefill: Prefill,
    /// Most tokens of a sequence in one prefill step
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunk: Option<u32>,
    #[command(flatten)]
    expected: ExpectedOptions,
    #[command(flatten)]
    adapter: AdapterOption,
    #[command(flatten)]
    path: PathOptions,
}

/// The report of a run.
struct Summary {
    /// Seconds in which weights and pipelines were made ready, on a device.
    first_use: Option<f64>,
    prefill: Phase,
    decode: Phase,
    /// Device memory by purpose; none on the CPU.
    memory: Option<egmla::attention::MemoryReport>,
}

/// Tokens and seconds of one kind of step.
#[derive(Default)]
struct Phase {
    tokens: u64,
    seconds: f64,
}

impl Phase {
    fn describe(&self, what: &str) -> String {
        if self.tokens == 0 {
            return format!("{what}: no tokens");
        }
        let rate = self.tokens as f64 / self.seconds.max(1e-9);
        format!("{what}: {} tokens in {:.3} s ({rate:.1} tokens/s)", self.tokens, self.seconds)
    }
}

/// Runs the layer.
pub fn run(args: AttendArgs) -> Result<(), Failure> {
    let source = LayerSource::of(&args)?;
    let text = read_config(&source.config)?;
    let read = || {
        let block = weight_block_size(&text)?;
        Ok((AttentionConfig::from_json_as(&text, args.model_type.as_deref())?, block))
    };
    let (config, block) = read().map_err(|error: egmla::Error| error.in_file(&source.config))?;
    let (weights, files) = source.weights(&config, block)?;
    let bytes = read_safetensors(&args.input)?;
    let input = Sequences::from_safetensors(&bytes, &config).map_err(|error| error.in_file(&args.input))?;
    drop(bytes);
    let longest = input.lengths.iter().copied().max().unwrap_or(0);
    config.rope.check_length(longest as usize).map_err(|error| error.in_file(&source.config))?;
    interrupt::watch();
    let output = Output::check(&args.output)?;
    let option = if args.model.is_some() { "model" } else { "weights" };
    files.iter().try_for_each(|file| output.refuse_input(option, file))?;
    for (option, path) in [("config", &source.config), ("input", &args.input)] {
        output.refuse_input(option, path)?;
    }
    if let Some(path) = &args.expected.expected {
        output.refuse_input("expected", path)?;
    }
    let expected = args.expected.read(input.tokens(), input.width, args.path.storage.into())?;
    let schedule = Schedule::new(&input.lengths, args.prefill, args.chunk);

    let backend = adapter::open(&args.adapter)?;
    let (hidden, summary) = match &backend {
        Backend::Cpu { reference, .. } => layer::on_cpu(*reference, config, &weights, &input, schedule, &args.path)?,
        Backend::Gpu(gpu) => layer::on_gpu(gpu, &config, &weights, &input, schedule, &args.path)?,
    };
    output.write(&tensor(&hidden, input.width)?)?;

    console::note(format_args!("adapter: {}", backend.describe()));
    let sequences = input.lengths.len();
    console::note(format_args!("tokens: {} in {sequences} sequence{}", input.tokens(), plural(sequences)));
    if let Some(seconds) = summary.first_use {
        console::note(format_args!("first use: {seconds:.2} s (weights and pipelines made ready)"));
    }
    console::note(summary.prefill.describe("prefill"));
    console::note(summary.decode.describe("decode"));
    if let Some(memory) = summary.memory {
        for (name, bytes) in memory.lines() {
            console::note(format_args!("memory, {name}: {}", console::bytes(bytes)));
        }
    }
    expected.map_or(Ok(()), |expected| expected.check(&hidden))
}

/// Where a layer's configuration and weights are.
struct LayerSource {
    config: PathBuf,
    weights: PathBuf,
    /// The layer of a whole model.
    layer: Option<LayerNumber>,
}

impl LayerSource {
    fn of(args: &AttendArgs) -> Result<Self, Failure> {
        if let (Some(config), Some(weights)) = (&args.config, &args.weights) {
            if args.layer.is_some() {
                return Err(Failure::usage("--layer is a layer of --model: --weights has its own (see egmla --help)"));
            }
            return Ok(LayerSource { config: config.clone(), weights: weights.clone(), layer: None });
        }
        let weights = model_folder(args.model.as_deref().unwrap_or(Path::new("")))?;
        if is_gguf(&weights) {
            return Ok(LayerSource { config: weights.clone(), weights, layer: args.layer });
        }
        // A file of weights stands beside its configuration.
        let folder = if weights.is_dir() { &weights } else { weights.parent().unwrap_or(Path::new("")) };
        Ok(LayerSource { config: folder.join("config.json"), weights, layer: args.layer })
    }

    /// The layer's weights, and the files of the checkpoint.
    fn weights(
        &self,
        config: &AttentionConfig,
        block: Option<[u32; 2]>,
    ) -> Result<(AttentionWeights, Vec<PathBuf>), Failure> {
        let mut checkpoint = Checkpoint::open(&self.weights)?;
        if let Some(block) = block {
            checkpoint = checkpoint.with_block_size(block);
        }
        let prefix = match self.layer {
            None => checkpoint.only_attention_prefix()?,
            Some(layer) => checkpoint.attention_prefix(layer)?,
        };
        let weights = AttentionWeights::load(&checkpoint, &prefix, config)?;
        Ok((weights, checkpoint.files().into_iter().map(Path::to_owned).collect()))
    }
}

/// A safetensors file of `hidden_states` `[tokens, width]`.
fn tensor(hidden: &[f32], width: usize) -> Result<Vec<u8>, Failure> {
    let bytes: Vec<u8> = hidden.iter().flat_map(|value| value.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, vec![hidden.len() / width, width], &bytes).map_err(Failure::run)?;
    safetensors::serialize([("hidden_states", view)], None).map_err(Failure::run)
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

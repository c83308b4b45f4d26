//! `egmla attend`: one attention layer on a file.

mod layer;
mod schedule;

use std::path::PathBuf;

use clap::Args;
use egmla::config::AttentionConfig;
use egmla::files::{MOST_CONFIG, read_safetensors, read_text};
use egmla::sequences::Sequences;
use egmla::weights::{AttentionWeights, Checkpoint};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::adapter::{self, AdapterOption, Backend};
use crate::console;
use crate::failure::Failure;
use crate::interrupt;
use crate::options::PathOptions;
use crate::output::Output;
use schedule::{Prefill, Schedule};

/// Options of `egmla attend`.
#[derive(Args, Debug)]
pub struct AttendArgs {
    /// The layer's dimensions: a checkpoint's `config.json`
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// By the rules of this type, in place of the configuration's `model_type`
    #[arg(long, value_name = "TYPE")]
    model_type: Option<String>,
    /// The layer's weights, named without prefix (f32, f16 or bf16)
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    /// `hidden_states` [tokens, hidden] f32, `token_ids` [tokens] u32 or i64, `sequence_lengths` [batch] (optional)
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Where `hidden_states` [tokens, hidden] f32 is written
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Tokens of each sequence to prefill; the rest is decoded one at a time from the cache
    #[arg(long, value_name = "all|N", default_value = "all", value_parser = Prefill::parse)]
    prefill: Prefill,
    /// Most tokens of a sequence in one prefill step
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunk: Option<u32>,
    #[command(flatten)]
    adapter: AdapterOption,
    #[command(flatten)]
    path: PathOptions,
}

/// The report of a run.
struct Summary {
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
    let config = read_text(&args.config, MOST_CONFIG)?;
    let config = AttentionConfig::from_json_as(&config, args.model_type.as_deref());
    let config = config.map_err(|error| error.in_file(&args.config))?;
    let bytes = read_safetensors(&args.weights)?;
    let weights = Checkpoint::new(&bytes)
        .and_then(|checkpoint| AttentionWeights::load(&checkpoint, "", &config))
        .map_err(|error| error.in_file(&args.weights))?;
    drop(bytes);
    let bytes = read_safetensors(&args.input)?;
    let input = Sequences::from_safetensors(&bytes, &config).map_err(|error| error.in_file(&args.input))?;
    drop(bytes);
    interrupt::watch();
    let output = Output::check(&args.output)?;
    for (option, path) in [("config", &args.config), ("weights", &args.weights), ("input", &args.input)] {
        output.refuse_input(option, path)?;
    }
    let schedule = Schedule::new(&input.lengths, args.prefill, args.chunk);

    let backend = adapter::open(&args.adapter)?;
    let (hidden, summary) = match &backend {
        Backend::Cpu { .. } => layer::on_cpu(config, &weights, &input, schedule, &args.path)?,
        Backend::Gpu(gpu) => layer::on_gpu(gpu, &config, &weights, &input, schedule, &args.path)?,
    };
    output.write(&tensor(&hidden, input.width)?)?;

    console::note(format_args!("adapter: {}", backend.describe()));
    let sequences = input.lengths.len();
    console::note(format_args!("tokens: {} in {sequences} sequence{}", input.tokens(), plural(sequences)));
    console::note(summary.prefill.describe("prefill"));
    console::note(summary.decode.describe("decode"));
    if let Some(memory) = summary.memory {
        for (name, bytes) in memory.lines() {
            console::note(format_args!("memory, {name}: {}", console::bytes(bytes)));
        }
    }
    Ok(())
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

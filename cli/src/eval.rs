//! `egmla eval`: how well a model predicts a text.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use egmla::attention::{DecodePath, GateRows};
use egmla::decoder::{ModelFolder, Score, Windows, scored_characters};
use egmla::files;
use indicatif::{ProgressBar, ProgressStyle};

use crate::adapter::{self, AdapterOption};
use crate::console;
use crate::engine::{Engine, EngineOptions};
use crate::failure::Failure;
use crate::interrupt;
use crate::options::{ModelOption, StorageOption};

/// Measures bits per character of a text under a language model.
#[derive(Args, Debug)]
pub struct EvalArgs {
    /// The text, in UTF-8
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    #[command(flatten)]
    pub model: ModelOption,
    #[command(flatten)]
    pub adapter: AdapterOption,
    /// How weights and cache are stored on the device, and matrices on the CPU
    #[arg(long, value_name = "TYPE", value_enum, default_value_t)]
    pub storage: StorageOption,
    /// Write one JSON object to stdout
    #[arg(long)]
    pub json: bool,
}

/// The output of `--json`.
#[derive(serde::Serialize)]
struct Report {
    bits_per_character: f64,
    loss: f64,
    tokens: u64,
    characters: u64,
    tokens_per_s: f64,
    adapter: String,
    storage: &'static str,
}

/// Runs the command.
pub fn run(args: EvalArgs) -> Result<(), Failure> {
    interrupt::watch();
    let text = read(&args.text)?;
    let folder = ModelFolder::open(&args.model.folder()?)?;
    let ids = folder.encode(&text)?;
    if ids.len() < 2 {
        let path = args.text.display();
        return Err(Failure::usage(format!(
            "{path}: number of tokens is {}, at least 2 are needed: the first is context",
            ids.len()
        )));
    }
    let characters = scored_characters(folder.tokenizer(), &text, &ids)?;
    if characters == 0 {
        return Err(Failure::usage(format!("{}: no character is left after the first token", args.text.display())));
    }

    let backend = adapter::open(&args.adapter)?;
    let width = u64::from(folder.config().max_position_embeddings).min(ids.len() as u64 - 1) as u32;
    let mut engine = Engine::new(
        &backend,
        &folder,
        &EngineOptions {
            storage: args.storage.into(),
            decode: DecodePath::Auto,
            gate_rows: GateRows::Recompute,
            capacity: width,
            max_tokens: width,
            all_logits: true,
            profile: false,
        },
    )?;
    console::note(format_args!("adapter: {}", backend.describe()));
    let bar = progress(ids.len() as u64 - 1);
    let shown = bar.clone();
    interrupt::undo(move || shown.finish_and_clear());
    let started = Instant::now();
    let mut score = Score::default();
    let mut windows = Windows::new(ids.len(), folder.config().max_position_embeddings as usize);
    let scored: Result<(), Failure> = windows.try_for_each(|window| {
        engine.reset();
        let inputs = window.inputs.clone();
        engine.score(&ids[inputs.clone()], window.scored_rows().start, |row, logits| {
            // Row r of the window predicts the token after its own.
            let rows = logits.len() / folder.config().vocab_size as usize;
            let target = inputs.start + row + 1;
            let added = score.add(logits, &ids[target..target + rows], folder.config().vocab_size);
            added.map_err(|error| Failure::run(format!("tokens from {target} on: {error}")))
        })?;
        bar.set_position(score.tokens());
        Ok(())
    });
    // A run that ends early leaves no half bar behind.
    bar.finish_and_clear();
    scored?;
    let report = Report {
        bits_per_character: score.bits_per_character(characters),
        loss: score.loss(),
        tokens: score.tokens(),
        characters,
        tokens_per_s: score.tokens() as f64 / started.elapsed().as_secs_f64().max(1e-9),
        adapter: backend.describe(),
        storage: engine.storage(),
    };
    if args.json {
        return console::print(&(serde_json::to_string(&report).map_err(Failure::run)? + "\n"));
    }
    console::print(&format!(
        "bits per character: {:.4}\nloss: {:.4} nats per token\nscored: {} tokens, {} characters\n\
         speed: {:.1} scored tokens/s\n",
        report.bits_per_character, report.loss, report.tokens, report.characters, report.tokens_per_s
    ))
}

fn read(path: &Path) -> Result<String, Failure> {
    // A text is the user's own: it may be as long as memory is.
    let text = files::read_text(path, u64::MAX)?;
    if text.is_empty() {
        return Err(Failure::usage(format!("{}: the file is empty", path.display())));
    }
    Ok(text)
}

/// A bar on stderr when that is a terminal.
fn progress(tokens: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {percent:>3} % {pos}/{len} tokens, {per_sec}, {eta} left");
    ProgressBar::new(tokens).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

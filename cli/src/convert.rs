//! `egmla convert`: a model with keys and values per head becomes one of latents.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use clap::{Args, ValueEnum};
use egmla::convert::{Calibration, Conversion, GateKind, LayerOptions, Progress, heads};
use egmla::decoder::{ModelFolder, TextRules, TextTokenizer};
use egmla::files;
use serde_json::{Value, json};

use crate::console;
use crate::failure::Failure;
use crate::interrupt;

/// `--to`
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Latents by principal axes (TransMLA)
    Mla,
    /// Latents, and a gate per token id in closed form
    EgMla,
}

/// `--gate`
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// A table of gate rows for each layer
    Table,
    /// The model's own token embedding, without tables
    Tied,
}

/// Width of gate rows without `--embed-dim`.
const EMBED_DIM: u32 = 128;

/// Makes a model with keys and values per head (GQA, as Llama) into one of latents, without training.
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// Folder with config.json, weights and tokenizer.json, a GGUF file, or a model's name in Hugging Face's cache (org/name)
    #[arg(long, value_name = "DIR|FILE|NAME")]
    pub model: PathBuf,
    /// What it becomes
    #[arg(long, value_name = "KIND", value_enum)]
    pub to: Target,
    /// Width of the cached latent, kv_lora_rank
    #[arg(long, value_name = "R")]
    pub rank: u32,
    /// Calibration text in UTF-8, as much like what the model is for as can be had
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Folder to write; one that a stopped conversion left is gone on with
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Most tokens of the text that are run, in sequences taken evenly from it
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(2..))]
    pub tokens: u32,
    /// What gates read, with --to eg-mla; `table` without this option
    #[arg(long, value_name = "KIND", value_enum)]
    pub gate: Option<Gate>,
    /// Width of gate rows, with --gate table; 128 without this option
    #[arg(long, value_name = "E")]
    pub embed_dim: Option<u32>,
    /// Slices of the keys that keep their rotation; each adds a head's width to the cache
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub rope_slices: u32,
    /// Weight of first positions, which every head leans on, over that of all other tokens
    #[arg(long, value_name = "W", default_value_t = 10.0, value_parser = weight)]
    pub sink_weight: f64,
}

impl ConvertArgs {
    fn gate(&self) -> Result<Option<GateKind>, Failure> {
        match (self.to, self.gate, self.embed_dim) {
            (Target::Mla, None, None) => Ok(None),
            (Target::Mla, Some(_), _) => Err(Failure::usage("--gate is of --to eg-mla")),
            (Target::Mla, None, Some(_)) => Err(Failure::usage("--embed-dim is of --to eg-mla")),
            (Target::EgMla, Some(Gate::Tied), None) => Ok(Some(GateKind::Tied)),
            (Target::EgMla, Some(Gate::Tied), Some(_)) => {
                Err(Failure::usage("--embed-dim is of --gate table: rows of tied gates are token embeddings"))
            }
            (Target::EgMla, Some(Gate::Table) | None, width) => {
                Ok(Some(GateKind::Table { embed_dim: width.unwrap_or(EMBED_DIM) }))
            }
        }
    }
}

fn weight(text: &str) -> Result<f64, String> {
    let weight = text.parse().ok().filter(|weight: &f64| (0.0..=1e9).contains(weight));
    weight.ok_or_else(|| "expected a number from 0 to 1e9".to_owned())
}

/// Tokens of a calibration sequence: each begins at position 0.
const SEQUENCE: usize = 512;

/// Runs the command.
pub fn run(args: ConvertArgs) -> Result<(), Failure> {
    interrupt::watch();
    let gate = args.gate()?;
    let text = files::read_text(&args.text, u64::MAX)?;
    let folder = ModelFolder::open(&args.model)?;
    let in_config = |error: egmla::Error| Failure::from(error.in_file(folder.path()));
    heads(folder.config()).map_err(in_config)?;
    let ids = folder.encode(&text)?;
    if ids.len() < 2 {
        let found = ids.len();
        return Err(Failure::usage(format!(
            "{}: number of tokens is {found}, at least 2 are needed",
            args.text.display()
        )));
    }
    let mut prefix = folder.encode("")?;
    let mut tokenizer = folder.tokenizer_json()?;
    if args.to == Target::EgMla && prefix.is_empty() {
        // Every head leans on the first position, and a gate changes it by its token: it must be a token that calibration met there.
        match first_token(folder.rules(), folder.tokenizer()) {
            Some((token, id)) => {
                tokenizer = begun_with(&tokenizer, token, id)?;
                prefix = vec![id];
                console::note(format_args!("texts of the result begin with {token}, as its tokenizer writes"));
            }
            None => tracing::warn!(
                "the tokenizer has no bos_token: texts that begin with another token than the calibration's sequences lose much"
            ),
        }
    }
    let length = SEQUENCE.min(folder.config().max_position_embeddings as usize);
    let calibration = Calibration::new(&ids, &prefix, args.tokens as usize, length, folder.config().vocab_size)
        .map_err(|error| Failure::from(error.in_file(&args.text)))?;
    if calibration.ids().len() < args.tokens as usize {
        let (found, wanted) = (calibration.ids().len(), args.tokens);
        tracing::warn!("{}: {found} tokens, fewer than the {wanted} of --tokens", args.text.display());
    }
    let checkpoint = folder.checkpoint()?;
    let conversion = Conversion {
        config: folder.config(),
        checkpoint: &checkpoint,
        calibration: &calibration,
        options: LayerOptions {
            rank: args.rank as usize,
            rope_slices: args.rope_slices as usize,
            sink_weight: args.sink_weight,
        },
        gate,
        tokenizer: &tokenizer,
        origin: json!({
            "model": args.model.to_string_lossy(),
            "weights": stamp(folder.path()),
            "text": args.text.to_string_lossy(),
        }),
        rules: folder.rules(),
    };
    let layers = folder.config().n_layer;
    let bar = console::interruptible(layers.into(), "layers");
    let made = conversion.run(&args.output, |progress| {
        match progress {
            Progress::Layers(done, None) if done > 0 => {
                console::note(format_args!("goes on behind layer {done} of {layers}"));
                bar.set_position(done.into());
            }
            Progress::Layers(done, lost) => {
                bar.set_position(done.into());
                if let Some(lost) = lost {
                    let percent = |fraction: f64| 100.0 * fraction;
                    let line = format!(
                        "layer {}: {:.2} % of the energy lost ({:.4} % of first positions'), output off by {:.1} %",
                        done - 1,
                        percent(lost.lost),
                        percent(lost.lost_of_first),
                        percent(lost.output)
                    );
                    if bar.is_hidden() { console::note(line) } else { bar.println(line) }
                }
            }
            Progress::Writing => bar.set_message("writing"),
        }
        !interrupt::asked()
    });
    bar.finish_and_clear();
    let Some(made) = made? else { return Err(Failure::Interrupted) };
    let (before, after) = (folder.config().attention.cache_elements(), made.config.attention.cache_elements());
    console::print(&format!(
        "{}: cache elements per token and layer {before} -> {after}; {} layers\n",
        args.output.display(),
        made.errors.len()
    ))
}

/// The special token that begins a text.
fn first_token<'a>(rules: &'a TextRules, tokenizer: &TextTokenizer) -> Option<(&'a str, u32)> {
    let token = rules.special_tokens.get("bos_token")?;
    Some((token, tokenizer.token_id(token)?))
}

/// A tokenizer that puts a token before every text, after what it does already.
fn begun_with(tokenizer: &[u8], token: &str, id: u32) -> Result<Vec<u8>, Failure> {
    let mut json: Value = serde_json::from_slice(tokenizer).map_err(Failure::run)?;
    let part = |kind: &str, id: &str| json!({kind: {"id": id, "type_id": 0}});
    let begin = json!({
        "type": "TemplateProcessing",
        "single": [part("SpecialToken", token), part("Sequence", "A")],
        "pair": [part("SpecialToken", token), part("Sequence", "A"), part("Sequence", "B")],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    });
    let before = json["post_processor"].take();
    json["post_processor"] = match before {
        Value::Null => begin,
        before => json!({"type": "Sequence", "processors": [before, begin]}),
    };
    Ok(json.to_string().into_bytes())
}

/// Length and time of a model's weights: a conversion of other ones does not go on.
fn stamp(model: &Path) -> Value {
    let files = ["model.safetensors", "model.safetensors.index.json"].map(|name| model.join(name));
    let found = std::iter::once(model.to_owned()).chain(files).find(|path| path.is_file());
    let found = found.and_then(|path| fs::metadata(path).ok());
    let modified = found.as_ref().and_then(|found| found.modified().ok());
    let seconds = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map(|time| time.as_secs_f64());
    json!({"bytes": found.map(|found| found.len()), "modified": seconds})
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::{TextTokenizer, begun_with};

    #[test]
    fn a_token_is_put_before_texts_whatever_the_tokenizer_did_before() {
        for before in
            ["null", r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":false,"use_regex":false}"#]
        {
            let text = format!(
                r#"{{"model":{{"type":"WordLevel","vocab":{{"a":0,"<s>":5}},"unk_token":"a"}},"post_processor":{before}}}"#
            );
            assert_eq!(TextTokenizer::from_bytes(text.as_bytes()).unwrap().encode("a").unwrap(), [0]);
            let begun = begun_with(text.as_bytes(), "<s>", 5).unwrap();
            let tokenizer = TextTokenizer::from_bytes(&begun).unwrap();
            assert_eq!(tokenizer.encode("a").unwrap(), [5, 0], "{before}");
            assert_eq!(tokenizer.encode("").unwrap(), [5], "{before}");
            assert_eq!(tokenizer.encode_written("a").unwrap(), [0], "{before}");
        }
    }
}

//! Options that several commands share.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use egmla::Storage;
use egmla::attention::{DecodePath, GateRows};

use crate::failure::Failure;

/// `--storage`
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StorageOption {
    /// 32-bit floats
    #[default]
    F32,
    /// 16-bit floats, 32-bit sums
    F16,
}

impl From<StorageOption> for Storage {
    fn from(option: StorageOption) -> Self {
        match option {
            StorageOption::F32 => Storage::F32,
            StorageOption::F16 => Storage::F16,
        }
    }
}

/// `--decode`
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DecodeOption {
    /// The one with less work, step by step
    #[default]
    Auto,
    /// Keys and values rebuilt from the cache
    Expanded,
    /// Queries taken to the latents, once per distinct token id with the gate at `up_projected`
    Absorbed,
}

impl From<DecodeOption> for DecodePath {
    fn from(option: DecodeOption) -> Self {
        match option {
            DecodeOption::Auto => DecodePath::Auto,
            DecodeOption::Expanded => DecodePath::Expanded,
            DecodeOption::Absorbed => DecodePath::Absorbed,
        }
    }
}

/// Storage, path and gate rows of a decode step.
#[derive(Args, Debug, Clone, Copy)]
pub struct PathOptions {
    /// How weights and cache are stored on the device, and a model's matrices on the CPU
    #[arg(long, value_name = "TYPE", value_enum, default_value_t)]
    pub storage: StorageOption,
    /// How a decode step attends to the cache
    #[arg(long, value_name = "PATH", value_enum, default_value_t)]
    pub decode: DecodeOption,
    /// Where the absorbed decode takes gate rows from, with the gate at `up_projected`: recompute, table (the whole vocabulary)
    /// or pool:N (N gate rows per layer)
    #[arg(long, value_name = "ROWS", default_value = "recompute", value_parser = gate_rows)]
    pub gate_rows: GateRows,
}

/// `--gate-rows`
fn gate_rows(text: &str) -> Result<GateRows, String> {
    let rows = |count: &str| count.parse().ok().filter(|rows| *rows > 0).map(|rows| GateRows::Pool { rows });
    match text {
        "recompute" => Ok(GateRows::Recompute),
        "table" => Ok(GateRows::Table),
        _ => text
            .strip_prefix("pool:")
            .and_then(rows)
            .ok_or_else(|| "expected recompute, table or pool:N with N from 1 on".to_owned()),
    }
}

impl StorageOption {
    /// Says that the option has no effect on a single layer on the CPU.
    pub fn tell_on_cpu(self) {
        if self != StorageOption::F32 {
            tracing::warn!(
                "--storage f16 changes nothing for a layer on the CPU, which computes in f32, or in f64 as the reference"
            );
        }
    }
}

/// `--model`, shared by the commands that run a language model.
#[derive(Args, Debug, Clone)]
pub struct ModelOption {
    /// Folder with config.json, model.safetensors or its shards, and tokenizer.json, a GGUF file, or a model's name in Hugging Face's
    /// cache (org/name); without it, the model of the project's own repository
    #[arg(long, value_name = "DIR|FILE|NAME")]
    pub model: Option<PathBuf>,
}

/// Folder of the repository's model.
const COMMITTED: &str = "models/shakespeare";

impl ModelOption {
    /// The folder that was given, else the committed model: under the current folder, beside the program, or where the
    /// program was built.
    ///
    /// # Errors
    /// Bad usage when there is none.
    pub fn folder(&self) -> Result<PathBuf, Failure> {
        if let Some(folder) = &self.model {
            return Ok(folder.clone());
        }
        let program = std::env::current_exe().unwrap_or_default();
        let built = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/shakespeare")).to_owned();
        std::iter::once(PathBuf::from(COMMITTED))
            .chain(program.ancestors().skip(1).map(|folder| folder.join(COMMITTED)))
            .chain([built])
            .find(|folder| folder.join("config.json").is_file())
            .ok_or_else(|| {
                let needed = "pass --model DIR, a folder with config.json, model.safetensors and tokenizer.json";
                Failure::usage(format!("no model at {COMMITTED}: {needed}"))
            })
    }
}

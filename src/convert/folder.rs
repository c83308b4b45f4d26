//! The written folder, and the work files by which a conversion that was stopped goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::gates::{GateKind, Gates};
use super::layer::{LatentLayer, LayerError, LayerOptions, convert_layer, latent_config};
use super::matrix::Matrix;
use super::source::{Calibration, embedded, heads, relative_error, run_layer};
use crate::config::{DecoderAttention, DecoderConfig, DecoderScales, GateConfig, RopeConfig, RopeScaling};
use crate::decoder::{ModelFolder, TextRules};
use crate::error::{DataError, Error, Result, TensorError};
use crate::files;
use crate::weights::{AttentionWeights, Checkpoint, GqaWeights, HostTensor, TOKEN_EMBEDDING};

/// Folder of the work files, in the output folder.
const WORK: &str = "conversion-work";

/// The name of the work file that says of which conversion they are.
const FINGERPRINT: &str = "fingerprint.json";

/// What is written, in this order: a folder without the configuration is not taken for a model.
const FILES: [&str; 6] = [MODEL, TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, CONVERSION, CONFIG];
const MODEL: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";
const CONVERSION: &str = "conversion.json";
const CONFIG: &str = "config.json";

/// A conversion of a model into a folder.
pub struct Conversion<'a> {
    /// The source's configuration, with keys and values per head.
    pub config: &'a DecoderConfig,
    /// The source's tensors; each is read when its layer is converted.
    pub checkpoint: &'a Checkpoint<'a>,
    /// The calibration text.
    pub calibration: &'a Calibration,
    /// Rank, rotated slices, weight of first positions.
    pub options: LayerOptions,
    /// The gates of EG-MLA. `None` makes MLA.
    pub gate: Option<GateKind>,
    /// Content of `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// What names the source and the text: written to `conversion.json`. A conversion goes on only where it is the same.
    pub origin: Value,
    /// When a text ends, and how a conversation is written.
    pub rules: &'a TextRules,
}

/// How far a conversion is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Progress {
    /// So many layers are done, some of them perhaps by an earlier run; what the last one lost.
    Layers(u32, Option<LayerError>),
    /// The folder is being written.
    Writing,
}

/// What a conversion has made.
#[derive(Debug, Clone, PartialEq)]
pub struct Made {
    /// The configuration that the folder has.
    pub config: DecoderConfig,
    /// What each layer lost.
    pub errors: Vec<LayerError>,
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |source| Error::from(DataError::Io(source)).in_file(path)
}

fn refused(path: &Path, problem: impl Into<String>) -> Error {
    Error::Data(DataError::Input(problem.into())).in_file(path)
}

fn damaged(path: &Path) -> Error {
    refused(path, format!("is damaged: remove the folder {WORK} to begin anew"))
}

/// Names of a folder's entries.
fn names_in(folder: &Path) -> Result<BTreeSet<OsString>> {
    let entries = fs::read_dir(folder).map_err(io_at(folder))?;
    entries.map(|entry| Ok(entry.map_err(io_at(folder))?.file_name())).collect()
}

/// Whether a work file may have that name.
fn is_of_work(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
    let number = stem.strip_prefix("layer-").or_else(|| stem.strip_prefix("stream-"));
    let of_layer = number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()));
    (of_layer || stem == "fingerprint") && ["", "json", "partial", "safetensors"].contains(&extension)
}

/// CRC-32 of a file, a mebibyte at a time.
fn checksum(path: &Path) -> Result<u32> {
    let (mut file, _) = files::open(path)?;
    let (mut sum, mut part) = (crc32fast::Hasher::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut part).map_err(io_at(path))? {
            0 => return Ok(sum.finalize()),
            read => sum.update(&part[..read]),
        }
    }
}

/// Writes a file that is whole or not there.
fn write_whole(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let partial = path.with_extension("partial");
    let mut file = BufWriter::new(File::create(&partial).map_err(io_at(&partial))?);
    write(&mut file)?;
    let file = file.into_inner().map_err(|error| io_at(&partial)(error.into_error()))?;
    file.sync_all().map_err(io_at(&partial))?;
    fs::rename(&partial, path).map_err(io_at(path))
}

fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_whole(path, |file| file.write_all(bytes).map_err(io_at(path)))
}

/// Writes f32 tensors one after another: names and shapes first, each tensor when its turn comes.
fn write_tensors(
    path: &Path,
    tensors: &[(String, Vec<usize>)],
    mut data: impl FnMut(&str, &[usize]) -> Result<HostTensor>,
) -> Result<()> {
    let mut header = Map::new();
    let mut end = 0u64;
    for (name, shape) in tensors {
        let begin = end;
        end += 4 * shape.iter().product::<usize>() as u64;
        header.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}));
    }
    let mut header = Value::Object(header).to_string();
    // Tensors begin at whole words.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    write_whole(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io_at(path))?;
        file.write_all(header.as_bytes()).map_err(io_at(path))?;
        for (name, shape) in tensors {
            for value in data(name, shape)?.data {
                file.write_all(&value.to_le_bytes()).map_err(io_at(path))?;
            }
        }
        Ok(())
    })
}

impl Conversion<'_> {
    /// Converts into the folder `output`, or goes on where a conversion of the same source, text and options was stopped. `progress`
    /// is called after each layer; where it returns false the work files stay and `None` is returned.
    ///
    /// # Errors
    /// A source that is not converted, or has tensors without a place; options out of range; a folder with other content; activations
    /// that are not finite; files that cannot be read or written.
    pub fn run(&self, output: &Path, mut progress: impl FnMut(Progress) -> bool) -> Result<Option<Made>> {
        let source = heads(self.config)?;
        if self.config.scales != DecoderScales::default() {
            return Err(Error::config("scale_emb", "scales embeddings, residuals or logits, which is not converted"));
        }
        self.check_tensors()?;
        let gates_of = |kind: GateKind| -> Result<Gates> {
            Gates::new(&self.embedding()?, kind, self.calibration.ids(), self.calibration.starts())
        };
        let gate = self.gate_config();
        if gate.is_some() && self.calibration.starts().len() == self.calibration.ids().len() {
            let problem = "every token of the calibration text is a first position, which gates leave out";
            return Err(Error::Data(DataError::Input(problem.to_owned())));
        }
        // The same refusals before the first layer as in it.
        latent_config(source, &self.options, gate)?;

        let work = self.open_work(output)?;
        let layer_path = |number: u32, what: &str| work.join(format!("layer-{number:04}.{what}"));
        let stream_path = |number: u32| work.join(format!("stream-{number:04}"));
        let (mut errors, mut stream) = (Vec::new(), None);
        // The last layer whose work files are whole.
        for number in (1..=self.config.n_layer).rev() {
            let path = stream_path(number);
            if path.exists() {
                stream = Some(self.read_stream(&path)?);
                for layer in 0..number {
                    let made = read_made(&layer_path(layer, "json"))?;
                    let path = layer_path(layer, "safetensors");
                    if checksum(&path)? != made.checksum {
                        return Err(damaged(&path));
                    }
                    errors.push(made.lost);
                }
                break;
            }
        }
        let mut stream = match stream {
            Some(stream) => stream,
            None => embedded(self.config, &self.embedding()?, self.calibration)?,
        };
        if !progress(Progress::Layers(errors.len() as u32, None)) {
            return Ok(None);
        }
        let first = errors.len() as u32;
        let gates = match self.gate {
            Some(kind) if first < self.config.n_layer => Some(gates_of(kind)?),
            _ => None,
        };
        for number in first..self.config.n_layer {
            let pass = run_layer(self.config, self.checkpoint, number, self.calibration, &mut stream)?;
            let (layer, mut error) =
                convert_layer(source, &pass.attention, &pass.activations, &self.options, gates.as_ref())
                    .map_err(|error| in_layer(number, error))?;
            let [hidden, output] = &pass.first;
            error.output = relative_error(&layer.forward(hidden, self.calibration.ids()), output);
            let path = layer_path(number, "safetensors");
            write_layer(&path, &layer, number)?;
            let made = MadeLayer { lost: error, checksum: checksum(&path)? };
            let path = layer_path(number, "json");
            write_bytes(&path, json!(made).to_string().as_bytes())?;
            // Last: what it stands for is whole.
            write_stream(&stream_path(number + 1), &stream)?;
            let _ = fs::remove_file(stream_path(number));
            // As a run that goes on reads it: digits that the text does not keep are in no result.
            errors.push(read_made(&path)?.lost);
            if !progress(Progress::Layers(number + 1, Some(error))) {
                return Ok(None);
            }
        }
        drop((stream, gates));
        if !progress(Progress::Writing) {
            return Ok(None);
        }
        let config = self.write(output, |number| layer_path(number, "safetensors"), &errors)?;
        fs::remove_dir_all(&work).map_err(io_at(&work))?;
        Ok(Some(Made { config, errors }))
    }

    fn gate_config(&self) -> Option<GateConfig> {
        self.gate.map(|kind| kind.config(self.config.vocab_size, self.config.attention.hidden_size()))
    }

    fn embedding(&self) -> Result<HostTensor> {
        let shape = [self.config.vocab_size as usize, self.config.attention.hidden_size() as usize];
        self.checkpoint.take(TOKEN_EMBEDDING, &shape)
    }

    /// Tensors of the source beside those of its attention, by name.
    fn kept(&self) -> BTreeMap<String, Vec<usize>> {
        let vocab = self.config.vocab_size as usize;
        let hidden = self.config.attention.hidden_size() as usize;
        let inner = self.config.intermediate_size as usize;
        let mut kept = BTreeMap::from([
            (TOKEN_EMBEDDING.to_owned(), vec![vocab, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ]);
        // Beside a tied one, too: readers take it where it differs.
        if !self.config.tie_word_embeddings || self.checkpoint.contains("lm_head.weight") {
            kept.insert("lm_head.weight".to_owned(), vec![vocab, hidden]);
        }
        for layer in 0..self.config.n_layer {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("mlp.gate_proj", vec![inner, hidden]),
                ("mlp.up_proj", vec![inner, hidden]),
                ("mlp.down_proj", vec![hidden, inner]),
            ] {
                kept.insert(format!("model.layers.{layer}.{name}.weight"), shape);
            }
        }
        kept
    }

    /// Refuses a source that lacks a tensor or has one without a place, before the first layer. What readers pass over is passed over.
    fn check_tensors(&self) -> Result<()> {
        let mut expected = self.kept();
        for layer in 0..self.config.n_layer {
            GqaWeights::build(heads(self.config)?, |name, shape| {
                let tensor = HostTensor::outline(name, shape)?;
                expected.insert(format!("model.layers.{layer}.self_attn.{name}"), tensor.shape.clone());
                Ok(tensor)
            })?;
        }
        expected.iter().try_for_each(|(name, shape)| self.checkpoint.claim(name, shape))?;
        self.checkpoint.refuse_rest("")
    }

    /// What makes two conversions the same.
    fn fingerprint(&self) -> Value {
        let ids: Vec<u8> = self.calibration.ids().iter().flat_map(|id| id.to_le_bytes()).collect();
        let starts: Vec<u8> = self.calibration.starts().iter().flat_map(|&at| (at as u64).to_le_bytes()).collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "origin": self.origin,
            "source": format!("{:?}", self.config),
            "rank": self.options.rank,
            "rope_slices": self.options.rope_slices,
            "sink_weight": self.options.sink_weight,
            "gate": self.gate.map(GateKind::name),
            "embed_dim": self.gate.and_then(GateKind::embed_dim),
            "tokens": self.calibration.ids().len(),
            "token_ids": [crc32fast::hash(&ids), crc32fast::hash(&starts)],
            "tokenizer": crc32fast::hash(self.tokenizer),
        })
    }

    /// The folder of the work files: a new one in a folder without content, or that of the same conversion.
    fn open_work(&self, output: &Path) -> Result<PathBuf> {
        let work = output.join(WORK);
        let path = work.join(FINGERPRINT);
        let fingerprint = self.fingerprint().to_string();
        if output.exists() && !output.is_dir() {
            return Err(refused(output, "is a file: choose a folder of its own"));
        }
        fs::create_dir_all(output).map_err(io_at(output))?;
        let mut names = names_in(output)?;
        let ours = names.remove(OsStr::new(WORK));
        if ours {
            self.check_work(&work, &fingerprint)?;
        }
        let known = |name: &OsString| {
            let stem = |file: &str| Path::new(file).with_extension("partial");
            ours && FILES.iter().any(|file| *name == **file || stem(file).as_os_str() == name)
        };
        if let Some(name) = names.iter().find(|name| !known(name)) {
            let problem = format!("holds other content (`{}`): choose a folder of its own", name.display());
            return Err(refused(output, problem));
        }
        fs::create_dir_all(&work).map_err(io_at(&work))?;
        write_bytes(&path, fingerprint.as_bytes())?;
        Ok(work)
    }

    /// Refuses work files of another conversion, and what is none: the folder is removed in the end.
    fn check_work(&self, work: &Path, fingerprint: &str) -> Result<()> {
        let mut names = names_in(work)?;
        if let Some(name) = names.iter().find(|name| !is_of_work(name)) {
            return Err(refused(work, format!("holds other content (`{}`): remove that", name.display())));
        }
        let path = work.join(FINGERPRINT);
        if names.contains(OsStr::new(FINGERPRINT)) {
            let text = files::read_text(&path, files::MOST_CONFIG)?;
            if text == fingerprint {
                return Ok(());
            }
            let [found, wanted] = [&text, fingerprint].map(serde_json::from_str::<Map<String, Value>>);
            let (found, wanted) = found.and_then(|found| Ok((found, wanted?))).map_err(|_| damaged(&path))?;
            let mut keys = wanted.keys().chain(found.keys());
            let key = keys.find(|key| found.get(*key) != wanted.get(*key)).map_or("its text", String::as_str);
            let problem = format!("is of a conversion of another source, text or options (`{key}`)");
            return Err(refused(work, problem + ": remove it or choose another folder"));
        }
        // A run that was stopped before it had written its fingerprint has written nothing else.
        names.remove(OsStr::new("fingerprint.partial"));
        if names.is_empty() { Ok(()) } else { Err(damaged(&path)) }
    }

    fn read_stream(&self, path: &Path) -> Result<Matrix> {
        let hidden = self.config.attention.hidden_size() as usize;
        let expected = self.calibration.ids().len() * hidden * 8 + 4;
        let bytes = files::read(path, expected as u64)?;
        let whole = bytes.len() == expected
            && bytes
                .last_chunk()
                .is_some_and(|sum| crc32fast::hash(&bytes[..expected - 4]) == u32::from_le_bytes(*sum));
        if !whole {
            return Err(damaged(path));
        }
        let values = bytes[..expected - 4].as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes));
        Ok(Matrix::of(values.collect(), hidden))
    }

    /// Writes the model's files, and reads back what they say.
    fn write(
        &self,
        output: &Path,
        layer_path: impl Fn(u32) -> PathBuf,
        errors: &[LayerError],
    ) -> Result<DecoderConfig> {
        let source = heads(self.config)?;
        let wanted = DecoderConfig {
            attention: DecoderAttention::Latent(latent_config(source, &self.options, self.gate_config())?),
            ..self.config.clone()
        };
        let text = serde_json::to_string_pretty(&config_json(&wanted, &self.rules.eos_token_ids)?)? + "\n";
        let config = DecoderConfig::from_json(&text)?;
        check_same(&config, &wanted)?;

        let kept = self.kept();
        let mut tensors: Vec<_> = kept.clone().into_iter().collect();
        let DecoderAttention::Latent(latent) = &wanted.attention else {
            return Err(Error::config("model_type", "is not of a model of latents"));
        };
        let mut of_layer = BTreeMap::new();
        for layer in 0..self.config.n_layer {
            AttentionWeights::build(latent, false, |name, shape| {
                let tensor = HostTensor::outline(&format!("model.layers.{layer}.self_attn.{name}"), shape)?;
                tensors.push((tensor.name.clone(), tensor.shape.clone()));
                of_layer.insert(tensor.name.clone(), layer);
                Ok(tensor)
            })?;
        }
        write_tensors(&output.join(MODEL), &tensors, |name, shape| match of_layer.get(name) {
            None => self.checkpoint.take(name, shape),
            Some(&layer) => Checkpoint::open(&layer_path(layer))?.take(name, shape),
        })?;
        write_bytes(&output.join(TOKENIZER), self.tokenizer)?;
        if !self.rules.special_tokens.is_empty() {
            let text = json!(self.rules.special_tokens).to_string() + "\n";
            write_bytes(&output.join(TOKENIZER_CONFIG), text.as_bytes())?;
        }
        if let Some(template) = &self.rules.chat_template {
            write_bytes(&output.join(CHAT_TEMPLATE), template.as_bytes())?;
        }
        let made = json!({
            "method": if self.gate.is_some() { "EG-MLA, offset gates" } else { "TransMLA" },
            "program": format!("egmla {}", env!("CARGO_PKG_VERSION")),
            "origin": self.origin,
            "rank": self.options.rank,
            "gate": self.gate.map(GateKind::name),
            "embed_dim": self.gate.and_then(GateKind::embed_dim),
            "rope_slices": self.options.rope_slices,
            "sink_weight": self.options.sink_weight,
            "calibration_tokens": self.calibration.ids().len(),
            "calibration_sequences": self.calibration.starts().len(),
            "layers": errors,
        });
        write_bytes(&output.join(CONVERSION), (serde_json::to_string_pretty(&made)? + "\n").as_bytes())?;
        write_bytes(&output.join(CONFIG), text.as_bytes())?;
        let read = ModelFolder::open(output)?;
        check_same(read.config(), &wanted)?;
        Ok(config)
    }
}

/// What the work files say of a layer beside its tensors.
#[derive(serde::Serialize, serde::Deserialize)]
struct MadeLayer {
    lost: LayerError,
    /// Of the file of its tensors.
    checksum: u32,
}

fn read_made(path: &Path) -> Result<MadeLayer> {
    let text = files::read_text(path, files::MOST_CONFIG)?;
    serde_json::from_str(&text).map_err(|_| damaged(path))
}

/// Names the layer whose activations or weights are at fault.
fn in_layer(number: u32, error: Error) -> Error {
    match error {
        Error::Data(DataError::Input(problem)) => Error::Data(DataError::Input(format!("layer {number}: {problem}"))),
        error => error,
    }
}

fn write_layer(path: &Path, layer: &LatentLayer, number: u32) -> Result<()> {
    let weights = layer.weights();
    weights.check_own(&layer.config)?;
    let mut tensors = BTreeMap::new();
    for tensor in weights.into_tensors() {
        if let Some(at) = tensor.data.iter().position(|value| !value.is_finite()) {
            let problem = format!("layer {number}: element {at} of `{}` is not finite in f32", tensor.name);
            return Err(Error::Data(DataError::Input(problem)));
        }
        tensors.insert(format!("model.layers.{number}.self_attn.{}", tensor.name), tensor);
    }
    let shapes: Vec<_> = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shape.clone())).collect();
    write_tensors(path, &shapes, |name, shape| {
        tensors
            .remove(name)
            .ok_or_else(|| Error::Tensor(TensorError::Missing { name: name.to_owned(), expected: shape.to_vec() }))
    })
}

fn write_stream(path: &Path, stream: &Matrix) -> Result<()> {
    write_whole(path, |file| {
        let mut sum = crc32fast::Hasher::new();
        for value in &stream.data {
            let bytes = value.to_le_bytes();
            sum.update(&bytes);
            file.write_all(&bytes).map_err(io_at(path))?;
        }
        file.write_all(&sum.finalize().to_le_bytes()).map_err(io_at(path))
    })
}

/// A configuration as it is written.
fn config_json(config: &DecoderConfig, eos_token_ids: &[u32]) -> Result<Value> {
    let DecoderAttention::Latent(attention) = &config.attention else {
        return Err(Error::config("model_type", "is not of a model of latents"));
    };
    Ok(json!({
        "architectures": ["EgmlaForCausalLM"],
        // Not a type that norms latents whatever the checkpoint holds.
        "model_type": "egmla",
        "vocab_size": config.vocab_size,
        "hidden_size": attention.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": attention.n_head,
        "num_key_value_heads": attention.n_head,
        "q_lora_rank": Value::Null,
        "kv_lora_rank": attention.d_latent,
        "qk_nope_head_dim": attention.d_nope,
        "qk_rope_head_dim": attention.d_rope,
        "v_head_dim": attention.d_value,
        "attention_bias": attention.attention_bias,
        "q_proj_bias": attention.q_proj_bias,
        "embedding_gate": attention.gate,
        "eos_token_id": eos_token_ids,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": attention.rope.theta,
        "rope_interleave": attention.rope.interleave,
        "rope_scaling": rope_json(&attention.rope, config.max_position_embeddings),
    }))
}

/// A scaling as `rope_scaling` has it.
fn rope_json(rope: &RopeConfig, longest: u32) -> Value {
    match &rope.scaling {
        // The second is refused before.
        RopeScaling::None | RopeScaling::Dynamic { .. } => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": whole(*original_max_position_embeddings),
        }),
        RopeScaling::LongRope { short_factor, attention_factor } => json!({
            "rope_type": "longrope", "short_factor": short_factor, "long_factor": short_factor, "factor": 1.0,
            "attention_factor": attention_factor, "original_max_position_embeddings": longest,
        }),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            attention_factor,
            truncate,
        } => {
            let mut map = Map::new();
            map.insert("original_max_position_embeddings".to_owned(), whole(*original_max_position_embeddings));
            for (key, value) in [
                ("factor", Some(factor)),
                ("beta_fast", Some(beta_fast)),
                ("beta_slow", Some(beta_slow)),
                ("mscale", mscale.as_ref()),
                ("mscale_all_dim", mscale_all_dim.as_ref()),
                ("attention_factor", attention_factor.as_ref()),
            ] {
                if let Some(value) = value {
                    map.insert(key.to_owned(), json!(value));
                }
            }
            map.insert("rope_type".to_owned(), json!("yarn"));
            map.insert("truncate".to_owned(), json!(truncate));
            Value::Object(map)
        }
    }
}

/// A number of positions: transformers warns of one with a decimal point.
fn whole(positions: f64) -> Value {
    match positions.fract() == 0.0 && positions < 2f64.powi(53) {
        true => json!(positions as u64),
        false => json!(positions),
    }
}

/// Refuses a configuration that reads back as another. Numbers of a text may differ in the last digit.
fn check_same(read: &DecoderConfig, wanted: &DecoderConfig) -> Result<()> {
    let other = |key: &str| Error::config(key, "reads back as another value than was converted: this is a defect");
    let (DecoderAttention::Latent(found), DecoderAttention::Latent(expected)) = (&read.attention, &wanted.attention)
    else {
        return Err(other("model_type"));
    };
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * b.abs();
    let [f, e] = [found, expected].map(|config| config.rope.frequencies(config.d_rope));
    let same_rope = f.len() == e.len()
        && f.iter().zip(&e).all(|(&a, &b)| near(a, b))
        && near(found.rope.amplitude(), expected.rope.amplitude())
        && near(found.scale(), expected.scale());
    if !same_rope {
        return Err(other("rope_scaling"));
    }
    if !near(read.rms_norm_eps, wanted.rms_norm_eps) {
        return Err(other("rms_norm_eps"));
    }
    let mut found = found.clone();
    found.rope.theta = expected.rope.theta;
    found.rope.scaling = expected.rope.scaling.clone();
    let mut read = read.clone();
    read.rms_norm_eps = wanted.rms_norm_eps;
    read.attention = DecoderAttention::Latent(found);
    if read != *wanted { Err(other("(configuration)")) } else { Ok(()) }
}

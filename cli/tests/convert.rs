//! `egmla convert` as it is misused: one `error:` line that says what to change, nothing half-written that passes for a model, and
//! a conversion that goes on where it was stopped.

#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// A small Llama in `source`, whose tokens are the characters from A on, and a text of 100 of them.
struct Job {
    folder: tempfile::TempDir,
}

impl Job {
    fn new() -> Self {
        let job = Job { folder: tempfile::tempdir().unwrap() };
        let model = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/transformers/llama"));
        fs::create_dir(job.path("source")).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(model.join(name), job.path("source").join(name)).unwrap();
        }
        let vocab: serde_json::Map<_, _> =
            (0..32).map(|id: u8| (char::from(b'A' + id).to_string(), json!(id))).collect();
        let model = json!({"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "A"});
        fs::write(job.path("source/tokenizer.json"), json!({"added_tokens": [], "model": model}).to_string()).unwrap();
        let text: String = (0..100u32).map(|at| char::from(b'A' + (at * at % 31) as u8)).collect();
        fs::write(job.path("text"), text).unwrap();
        job
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program with these options beside or in place of `--model source --to mla --rank 12 --text text --output out`; `limit` in
    /// half kibibytes is that of a file, a larger one cannot be written.
    fn run(&self, options: &[&str], limit: Option<u32>) -> Output {
        let mut command = Command::new("sh");
        let limit = limit.map_or(String::new(), |limit| format!("trap '' XFSZ; ulimit -f {limit}; "));
        command.args(["-c", &format!("{limit}exec \"$@\""), "sh", env!("CARGO_BIN_EXE_egmla"), "convert"]);
        let defaults =
            [("--model", "source"), ("--to", "mla"), ("--rank", "12"), ("--text", "text"), ("--output", "out")];
        for (name, value) in defaults {
            if !options.contains(&name) {
                command.args([name, value]);
            }
        }
        command.args(options).current_dir(self.folder.path()).stdin(Stdio::null()).env_remove("RUST_LOG");
        command.output().unwrap()
    }

    /// Exit 2 and one error, which says each of `parts`.
    #[track_caller]
    fn refused(&self, options: &[&str], parts: &[&str]) {
        refused(&self.run(options, None), parts);
    }

    /// As `refused`, and nothing was written.
    #[track_caller]
    fn refused_at_once(&self, options: &[&str], parts: &[&str]) {
        self.refused(options, parts);
        assert!(!self.path("out").exists(), "{options:?}");
    }

    /// Changes the source's configuration.
    fn with(self, key: &str, value: Value) -> Self {
        let path = self.path("source/config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(path, config.to_string()).unwrap();
        self
    }

    /// Makes an element of a source's tensor, one of bf16, infinite.
    fn with_infinite(self, tensor: &str) -> Self {
        let path = self.path("source/model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let at = {
            let (length, header) = SafeTensors::read_metadata(&bytes).unwrap();
            8 + length + header.info(tensor).unwrap().data_offsets.0
        };
        bytes[at..at + 2].copy_from_slice(&[0x80, 0x7f]);
        fs::write(path, bytes).unwrap();
        self
    }
}

#[track_caller]
fn refused(output: &Output, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{stderr}");
    let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    assert_eq!(stderr.lines().last(), errors.first().copied(), "{stderr}");
    for part in parts {
        assert!(errors[0].contains(part), "`{part}` is not in {stderr}");
    }
}

#[test]
fn options_out_of_range_are_refused_before_anything_is_written() {
    let job = Job::new();
    job.refused_at_once(&["--rank", "0"], &["rank is 0, must be 1 to 24"]);
    job.refused_at_once(&["--rank", "25"], &["rank is 25, must be 1 to 24"]);
    job.refused_at_once(&["--rank", "4294967295"], &["rank is 4294967295"]);
    job.refused_at_once(&["--rope-slices", "0"], &["rope-slices is 0, must be 1 to 2"]);
    job.refused_at_once(&["--rope-slices", "3"], &["rope-slices is 3, must be 1 to 2"]);
    job.refused_at_once(&["--to", "eg-mla", "--rank", "1"], &["rank is 1, must be 2 to 25"]);
    job.refused_at_once(&["--to", "eg-mla", "--embed-dim", "0"], &["embed-dim is 0, must be 1 to 24"]);
    job.refused_at_once(&["--to", "eg-mla", "--embed-dim", "25"], &["embed-dim is 25, must be 1 to 24"]);
    job.refused_at_once(&["--embed-dim", "8"], &["--embed-dim", "--to eg-mla"]);
    job.refused_at_once(&["--tokens", "1"], &["--tokens"]);
    for weight in ["-1", "nan", "inf", "1e300", "x"] {
        let option = format!("--sink-weight={weight}");
        job.refused_at_once(&[&option], &["--sink-weight", "a number from 0 to 1e9"]);
    }
}

#[test]
fn texts_that_are_none_are_refused_before_anything_is_written() {
    let job = Job::new();
    for (text, part) in [
        (&b""[..], "text: number of tokens is 0, at least 2 are needed"),
        (b"A", "text: number of tokens is 1, at least 2 are needed"),
        (b"AB\xff", "text: not UTF-8 text (byte 2)"),
    ] {
        fs::write(job.path("text"), text).unwrap();
        job.refused_at_once(&[], &[part]);
    }
    job.refused_at_once(&["--text", "none"], &["none: No such file"]);
    job.refused_at_once(&["--text", "source"], &["source: is a directory"]);
    job.refused_at_once(&["--text", "/dev/zero"], &["/dev/zero: is not a regular file"]);
    // Gates are of tokens behind first positions: two single tokens have none.
    let single = Job::new().with("max_position_embeddings", json!(1));
    single.refused_at_once(&["--to", "eg-mla"], &["every token of the calibration text is a first position"]);
}

#[test]
fn sources_of_another_kind_are_refused_before_anything_is_written() {
    let latents = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/shakespeare");
    Job::new().refused_at_once(&["--model", latents], &["config key `model_type`", "cache latents already"]);
    Job::new()
        .with("model_type", json!("mixtral"))
        .refused_at_once(&[], &["source/config.json", "`mixtral` is not known"]);
    let experts = Job::new().with("num_local_experts", json!(8));
    experts.refused_at_once(&[], &["source/config.json", "`num_local_experts`", "mixture of experts"]);
    let quantised = Job::new().with("quantization_config", json!({"quant_method": "awq"}));
    quantised.refused_at_once(&[], &["source/config.json", "`quantization_config.quant_method`", "awq"]);
    let dynamic = Job::new().with("rope_parameters", json!({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}));
    dynamic.refused_at_once(&[], &["`rope_scaling.type`", "dynamic"]);
    let wider = Job::new().with("intermediate_size", json!(33));
    wider.refused_at_once(&[], &["source/model.safetensors", "mlp.down_proj.weight", "[32, 32]", "[32, 33]"]);
    let longer = Job::new().with("num_hidden_layers", json!(3));
    longer.refused_at_once(&[], &["source/model.safetensors", "layers.2.", "is missing"]);
    let shorter = Job::new().with("num_hidden_layers", json!(1));
    shorter.refused_at_once(&[], &["source/model.safetensors", "layers.1.", "is not expected"]);
}

#[test]
fn what_changes_no_result_is_passed_over_as_by_every_reader() {
    let job = Job::new();
    let path = job.path("source/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let model = SafeTensors::deserialize(&bytes).unwrap();
    let frequencies = TensorView::new(Dtype::F32, vec![4], &[0; 16]).unwrap();
    let mut tensors = model.tensors();
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), frequencies));
    fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    let output = job.run(&[], None);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("passed over: tensor `model.layers.0.self_attn.rotary_emb.inv_freq`"), "{stderr}");
}

#[test]
fn outputs_with_other_content_are_left_as_they_are() {
    let job = Job::new();
    let source = fs::read(job.path("source/model.safetensors")).unwrap();
    job.refused(&["--output", "source"], &["source: holds other content (`config.json`)"]);
    assert!(fs::read(job.path("source/model.safetensors")).unwrap() == source);
    assert_eq!(fs::read_dir(job.path("source")).unwrap().count(), 3);

    job.refused(&["--output", "text"], &["text: is a file"]);
    assert_eq!(fs::read(job.path("text")).unwrap().len(), 100);
    fs::create_dir(job.path("out")).unwrap();
    fs::write(job.path("out/mine"), "mine").unwrap();
    job.refused(&[], &["out: holds other content (`mine`)"]);
    assert_eq!(fs::read_dir(job.path("out")).unwrap().count(), 1);

    job.refused(&["--output", &"x".repeat(300)], &["File name too long"]);
    job.refused(&["--output", "/proc/none/out"], &["/proc/none/out: "]);
}

#[test]
fn a_source_that_is_not_finite_is_named_by_its_layer() {
    for (tensor, part) in [
        ("model.layers.1.mlp.down_proj.weight", "activations behind layer 1 are not finite"),
        ("model.layers.0.self_attn.q_proj.weight", "activations behind layer 0 are not finite"),
        ("model.embed_tokens.weight", "rows of `model.embed_tokens.weight` are not finite"),
    ] {
        let job = Job::new().with_infinite(tensor);
        job.refused(&[], &[part]);
        assert!(!job.path("out/config.json").exists());
    }
}

/// Where the disk is full, here by a limit below the model's size, there is no model; damaged work files are told; with room it
/// goes on, and all files are those of a run in one go.
#[test]
fn a_full_disk_leaves_no_model_and_the_conversion_goes_on() {
    let whole = Job::new();
    assert_eq!(whole.run(&[], None).status.code(), Some(0));

    let job = Job::new();
    refused(&job.run(&[], Some(96)), &["out/model.safetensors", "File too large"]);
    assert!(!job.path("out/config.json").exists() && !job.path("out/model.safetensors").exists());
    let work = job.path("out/conversion-work");
    let other =
        |options: &[&str], key: &str| job.refused(options, &["conversion-work: is of a conversion of another", key]);
    other(&["--rank", "11"], "`rank`");
    other(&["--rope-slices", "2"], "`rope_slices`");
    other(&["--to", "eg-mla", "--embed-dim", "8"], "`embed_dim`");

    let spoilt = |name: &str, bytes: &dyn Fn(&[u8]) -> Vec<u8>, part: &str| {
        let path = work.join(name);
        let before = fs::read(&path).unwrap();
        fs::write(&path, bytes(&before)).unwrap();
        job.refused(&[], &[name, part]);
        fs::write(path, before).unwrap();
    };
    let cut = |bytes: &[u8]| bytes[..bytes.len() / 2].to_vec();
    let flipped = |bytes: &[u8]| [&bytes[..bytes.len() - 1], &[bytes[bytes.len() - 1] ^ 1]].concat();
    for name in ["stream-0002", "layer-0000.safetensors", "layer-0001.json", "fingerprint.json"] {
        spoilt(name, &cut, "is damaged: remove the folder conversion-work");
    }
    for name in ["stream-0002", "layer-0001.safetensors"] {
        spoilt(name, &flipped, "is damaged: remove the folder conversion-work");
    }
    let older = |bytes: &[u8]| {
        let mut fingerprint: Value = serde_json::from_slice(bytes).unwrap();
        fingerprint["version"] = json!("0.0.1");
        fingerprint.to_string().into_bytes()
    };
    let path = work.join("fingerprint.json");
    let before = fs::read(&path).unwrap();
    fs::write(&path, older(&before)).unwrap();
    other(&[], "`version`");
    fs::remove_file(&path).unwrap();
    job.refused(&[], &["fingerprint.json: is damaged"]);
    fs::write(&path, before).unwrap();
    // The folder is removed in the end: nobody else's file may be in it.
    fs::write(work.join("mine"), "mine").unwrap();
    job.refused(&[], &["conversion-work: holds other content (`mine`)"]);
    fs::remove_file(work.join("mine")).unwrap();

    let output = job.run(&[], None);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("goes on behind layer 2 of 2"), "{stderr}");
    assert!(!work.exists());
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let [found, wanted] = [&job, &whole].map(|job| fs::read(job.path("out").join(name)).unwrap());
        assert!(found == wanted, "{name}");
    }
    job.refused(&[], &["out: holds other content"]);
}

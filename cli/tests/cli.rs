//! The program's contract: exit codes, one line an error, nothing half-written, and the golden cases through `attend`.
//!
//! Tests that need an adapter fail where there is none: install a driver, for instance Mesa's software Vulkan.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// How a run ended.
#[derive(Debug)]
struct Finished {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Finished {
    fn line(&self, prefix: &str) -> &str {
        let mut lines = self.stderr.lines().filter(|line| line.starts_with(prefix));
        let line = lines.next().unwrap_or_else(|| panic!("no line `{prefix}` in {self:?}"));
        assert_eq!(lines.next(), None, "{self:?}");
        line
    }

    #[track_caller]
    fn done(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert!(!self.stderr.contains("error:"), "{self:?}");
        self
    }

    /// Exit `code`, one error line, with each of `parts` in it.
    #[track_caller]
    fn refused(self, code: i32, parts: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        let line = self.line("error:");
        for part in parts {
            assert!(line.contains(part), "`{part}` is not in `{line}`");
        }
        assert!(!line.contains("internal error"), "{self:?}");
        assert_eq!(self.stderr.lines().last(), Some(line), "the error is the last line: {self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        self
    }
}

fn command(arguments: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_egmla"));
    // What the program keeps between runs does not go to the user's own folder.
    let cache = env!("CARGO_TARGET_TMPDIR");
    command.args(arguments).env_remove("RUST_LOG").env("XDG_CACHE_HOME", cache).stdin(Stdio::null());
    command
}

fn finish(mut command: Command) -> Finished {
    let output = command.output().unwrap();
    Finished {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn egmla(arguments: &[&str]) -> Finished {
    finish(command(arguments))
}

/// A machine without adapters.
fn without_adapters(arguments: &[impl AsRef<OsStr>]) -> Finished {
    let mut command = command(arguments);
    command.env("WGPU_BACKEND", if cfg!(target_os = "macos") { "dx12" } else { "metal" });
    finish(command)
}

/// A tensor of a file that a test writes.
#[derive(Debug, Clone)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    fn f32(shape: &[usize], value: impl Fn(usize) -> f32) -> Self {
        let bytes = (0..shape.iter().product()).flat_map(|index| value(index).to_le_bytes()).collect();
        Tensor { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    fn u32(values: &[u32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor { dtype: Dtype::U32, shape: vec![values.len()], bytes }
    }

    fn i64(values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor { dtype: Dtype::I64, shape: vec![values.len()], bytes }
    }
}

type Tensors = BTreeMap<String, Tensor>;

fn write_tensors(path: &Path, tensors: &Tensors) {
    let views =
        tensors.iter().map(|(name, t)| (name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// `hidden_states` of a file, widened to f64, and its shape.
fn read_hidden(path: &Path) -> (Vec<usize>, Vec<f64>) {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.names(), ["hidden_states"]);
    let view = tensors.tensor("hidden_states").unwrap();
    let values = match view.dtype() {
        Dtype::F32 => view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
        Dtype::F64 => view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        other => panic!("{other:?}"),
    };
    (view.shape().to_vec(), values)
}

/// A small gated layer and an input, to be spoilt in one place by each test.
struct Job {
    folder: tempfile::TempDir,
    config: Value,
    weights: Tensors,
    input: Tensors,
    options: Vec<OsString>,
}

impl Job {
    fn new() -> Self {
        let config = json!({
            "hidden_size": 8, "num_attention_heads": 2, "q_lora_rank": null, "kv_lora_rank": 4, "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 2, "v_head_dim": 3, "embedding_gate": {"vocab_size": 5, "embed_dim": 3},
        });
        let wave = |index: usize| ((index * 7 + 3) % 11) as f32 * 0.1 - 0.5;
        let shapes: [(&str, &[usize]); 9] = [
            ("q_proj.weight", &[12, 8]),
            ("kv_a_proj_with_mqa.weight", &[6, 8]),
            ("kv_a_layernorm.weight", &[4]),
            ("kv_b_proj.weight", &[14, 4]),
            ("o_proj.weight", &[8, 6]),
            ("gate_embedding.weight", &[5, 3]),
            ("gate_b_proj.weight", &[14, 3]),
            ("gate_norm.weight", &[14]),
            ("gate_norm.bias", &[14]),
        ];
        let weights = shapes.iter().map(|(name, shape)| ((*name).to_owned(), Tensor::f32(shape, wave))).collect();
        let input = [
            ("hidden_states".to_owned(), Tensor::f32(&[6, 8], wave)),
            ("token_ids".to_owned(), Tensor::i64(&[0, 4, 1, 1, 3, 2])),
        ];
        Job {
            folder: tempfile::tempdir().unwrap(),
            config,
            weights,
            input: input.into(),
            options: ["--adapter", "cpu"].map(OsString::from).to_vec(),
        }
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes the files.
    fn prepare(self) -> Self {
        fs::write(self.path("c.json"), self.config.to_string()).unwrap();
        write_tensors(&self.path("w.safetensors"), &self.weights);
        write_tensors(&self.path("x.safetensors"), &self.input);
        self
    }

    fn arguments(&self) -> Vec<OsString> {
        let mut arguments = vec![OsString::from("attend")];
        for (option, name) in
            [("--config", "c.json"), ("--weights", "w.safetensors"), ("--input", "x.safetensors"), ("--output", "y")]
        {
            if !self.options.iter().any(|given| given == option) {
                arguments.extend([option.into(), self.path(name).into()]);
            }
        }
        arguments.extend(self.options.iter().cloned());
        arguments
    }

    /// Runs over the files that are there.
    fn run(&self) -> Finished {
        finish(command(&self.arguments()))
    }

    fn files(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Runs, is refused as bad input, and leaves a stale output and the folder as they were.
    #[track_caller]
    fn refused(self, parts: &[&str]) {
        let job = self.prepare();
        job.run().refused(2, parts);
        assert_eq!(job.files(), ["c.json", "w.safetensors", "x.safetensors"]);
        fs::write(job.path("y"), "stale").unwrap();
        job.run().refused(2, parts);
        assert_eq!(job.files(), ["c.json", "w.safetensors", "x.safetensors", "y"]);
        assert_eq!(fs::read_to_string(job.path("y")).unwrap(), "stale");
    }

    fn config_refused(key: &str, value: Value, parts: &[&str]) {
        Job::new().with(|job| job.config[key] = value).refused(&[&["c.json"], parts].concat());
    }

    fn options_refused(options: &[&str], parts: &[&str]) {
        Job::new().with(|job| job.options.extend(options.iter().map(OsString::from))).refused(parts);
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    let help = egmla(&["--help"]).done();
    for word in ["Usage: egmla", "attend", "info", "check"] {
        assert!(help.stdout.contains(word), "{help:?}");
    }
    assert_eq!(help.stderr, "");
    let help = egmla(&["attend", "--help"]).done();
    let of_files = ["--config", "--weights", "--model", "--layer", "--input", "--output", "--expected", "--tolerance"];
    for option in of_files.into_iter().chain(["--prefill", "--chunk", "--adapter", "--storage", "--decode"]) {
        assert!(help.stdout.contains(option), "{option}: {help:?}");
    }
    let version = egmla(&["--version"]).done();
    assert_eq!(version.stdout, format!("egmla {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_is_one_line_and_exit_2() {
    let hint = "(see egmla --help)";
    egmla(&[]).refused(2, &["subcommand", hint]);
    egmla(&["atend"]).refused(2, &["atend", hint]);
    egmla(&["attend"]).refused(2, &["--config", "--weights", "--input", "--output", hint]);
    egmla(&["info", "--jsn"]).refused(2, &["--jsn", hint]);
    let wrong = egmla(&["attend", "--wrong\nline"]).refused(2, &["--wrong line"]);
    assert_eq!(wrong.stderr.lines().count(), 1, "{wrong:?}");
    assert_eq!(wrong.stdout, "");
}

#[test]
fn options_out_of_their_range_are_refused() {
    Job::options_refused(&["--prefill", "some"], &["--prefill", "`all`", "'some'"]);
    Job::options_refused(&["--prefill", "1.5"], &["--prefill", "'1.5'"]);
    Job::options_refused(&["--chunk", "0"], &["--chunk", "'0'"]);
    Job::options_refused(&["--chunk", "three"], &["--chunk", "'three'"]);
    Job::options_refused(&["--storage", "f64"], &["--storage", "'f64'", "f16"]);
    Job::options_refused(&["--decode", "fast"], &["--decode", "'fast'", "absorbed"]);
    for rows in ["pool", "pool:0", "pool:-1", "tables"] {
        Job::options_refused(&["--gate-rows", rows], &["--gate-rows", "pool:N"]);
    }
}

#[test]
fn options_of_gates_are_refused_where_they_say_nothing() {
    let convert = |options: &[&str]| {
        egmla(&[&["convert", "--model", "m", "--rank", "8", "--text", "t", "--output", "o"], options].concat())
    };
    convert(&["--to", "mla", "--gate", "tied"]).refused(2, &["--gate is of --to eg-mla"]);
    convert(&["--to", "mla", "--embed-dim", "8"]).refused(2, &["--embed-dim is of --to eg-mla"]);
    let tied = ["--to", "eg-mla", "--gate", "tied", "--embed-dim", "8"];
    convert(&tied).refused(2, &["--embed-dim is of --gate table"]);
}

#[test]
fn configs_that_contradict_themselves_or_overflow_are_refused() {
    for key in ["hidden_size", "num_attention_heads", "kv_lora_rank", "q_lora_rank", "v_head_dim"] {
        Job::config_refused(key, json!(0), &[key, "is 0"]);
    }
    Job::config_refused("qk_rope_head_dim", json!(3), &["qk_rope_head_dim", "3", "even"]);
    Job::config_refused("hidden_size", json!(4294967295u32), &["2^31"]);
    Job::config_refused("hidden_size", json!(4294967296u64), &["hidden_size", "4294967296"]);
    Job::config_refused("hidden_size", json!(-8), &["hidden_size", "-8"]);
    Job::config_refused("hidden_size", Value::Null, &["hidden_size", "missing"]);
    Job::config_refused("kv_lora_rang", json!(4), &["kv_lora_rang", "not known"]);
    Job::config_refused("embedding_gate", json!({"vocab_size": 0, "embed_dim": 3}), &["vocab_size", "is 0"]);
    Job::config_refused("embedding_gate", json!({"vocab_size": 5, "embed_dim": 3, "nrom": 1}), &["nrom"]);

    let job = Job::new().prepare();
    fs::write(job.path("c.json"), "{").unwrap();
    job.run().refused(2, &["c.json", "config is not valid"]);
    fs::write(job.path("c.json"), b"\xff\xfe").unwrap();
    job.run().refused(2, &["c.json", "UTF-8"]);
    assert!(!job.path("y").exists());
}

#[test]
fn configs_that_contradict_the_weights_are_refused() {
    Job::config_refused_by_weights("kv_lora_rank", json!(5), &["kv_a_proj_with_mqa.weight", "[6, 8]", "[7, 8]"]);
    Job::config_refused_by_weights("embedding_gate", Value::Null, &["gate_b_proj.weight", "[14, 3]", "not expected"]);
    Job::config_refused_by_weights("q_lora_rank", json!(3), &["q_a_proj.weight", "missing", "[3, 8]"]);
    Job::config_refused_by_weights("attention_bias", json!(true), &["kv_a_proj_with_mqa.bias", "missing", "[6]"]);
}

impl Job {
    fn config_refused_by_weights(key: &str, value: Value, parts: &[&str]) {
        Job::new().with(|job| job.config[key] = value).refused(&[&["w.safetensors"], parts].concat());
    }
}

#[test]
fn wrong_weights_are_named() {
    let spoilt = |change: fn(&mut Tensors)| Job::new().with(|job| change(&mut job.weights));
    spoilt(|w| drop(w.remove("o_proj.weight"))).refused(&["w.safetensors", "`o_proj.weight`", "missing", "[8, 6]"]);
    spoilt(|w| drop(w.insert("o_proj.weight".into(), Tensor::f32(&[6, 8], |_| 0.0)))).refused(&[
        "w.safetensors",
        "`o_proj.weight`",
        "[6, 8]",
        "[8, 6]",
    ]);
    spoilt(|w| drop(w.insert("k_proj.weight".into(), Tensor::f32(&[2, 2], |_| 0.0)))).refused(&[
        "w.safetensors",
        "`k_proj.weight`",
        "[2, 2]",
        "not expected",
    ]);
    spoilt(|w| drop(w.insert("gate_norm.bias".into(), Tensor::i64(&[0; 14])))).refused(&[
        "w.safetensors",
        "`gate_norm.bias`",
        "I64",
        "F32, F16, BF16 or F8_E4M3",
    ]);
}

/// A layer whose gate reads the token embedding: beside the layer's weights, or in the model's folder.
#[test]
fn a_layer_with_a_tied_gate_reads_its_models_embedding() {
    let tied = || {
        Job::new().with(|job| {
            job.config["vocab_size"] = json!(5);
            job.config["embedding_gate"] = json!({"tied": true, "activation": "one_plus"});
            job.weights.remove("gate_embedding.weight");
            let own = |index: usize| (index % 5) as f32 * 0.3 - 0.5;
            job.weights.insert("gate_b_proj.weight".to_owned(), Tensor::f32(&[14, 8], own));
        })
    };
    let row = |index: usize| ((index * 5 + 2) % 7) as f32 * 0.2 - 0.7;
    let embedding = Tensor::f32(&[5, 8], row);
    tied().refused(&["w.safetensors: ", "the gate is tied", "embed_tokens.weight", "--model", "--layer"]);
    let stale = ("gate_embedding.weight".to_owned(), embedding.clone());
    let named = ("embed_tokens.weight".to_owned(), embedding.clone());
    tied()
        .with(|job| job.weights.extend([named.clone(), stale]))
        .refused(&["w.safetensors: ", "`gate_embedding.weight` of shape [5, 8] is not expected"]);
    tied()
        .with(|job| {
            job.config["embedding_gate"]["embed_dim"] = json!(3);
            job.weights.extend([named.clone()]);
        })
        .refused(&["c.json", "embedding_gate.embed_dim", "is 3", "hidden_size is 8"]);

    let job = tied().with(|job| job.weights.extend([named])).prepare();
    job.run().done();
    let beside = read_hidden(&job.path("y")).1;
    // The same values as a table of normed rows.
    let normed = |index: usize| {
        let squares: f32 = (0..8).map(|at| row(index / 8 * 8 + at).powi(2)).sum();
        row(index) / (squares / 8.0 + 1e-6).sqrt()
    };
    let as_table = tied().with(|job| {
        job.config["embedding_gate"] = json!({"vocab_size": 5, "embed_dim": 8, "activation": "one_plus"});
        job.weights.insert("gate_embedding.weight".to_owned(), Tensor::f32(&[5, 8], normed));
    });
    let as_table = as_table.prepare();
    as_table.run().done();
    let expected = read_hidden(&as_table.path("y")).1;
    assert!(beside.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{beside:?}, not {expected:?}");

    let model = tied().prepare();
    let folder = model.path("model");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("config.json"), model.config.to_string()).unwrap();
    let of_layer = |(name, tensor): (&String, &Tensor)| (format!("lm.layers.2.self_attn.{name}"), tensor.clone());
    let mut weights: Tensors = model.weights.iter().map(of_layer).collect();
    let model = model.with(|job| {
        let options = ["--model", folder.to_str().unwrap(), "--layer", "2", "--adapter", "cpu"];
        job.options = options.map(OsString::from).to_vec();
    });
    let run = |weights: &Tensors| {
        write_tensors(&folder.join("model.safetensors"), weights);
        let mut arguments = vec![OsString::from("attend")];
        for (option, name) in [("--input", "x.safetensors"), ("--output", "y")] {
            arguments.extend([option.into(), model.path(name).into()]);
        }
        arguments.extend(model.options.iter().cloned());
        finish(command(&arguments))
    };
    run(&weights).refused(2, &["model.safetensors: ", "the gate is tied", "`lm.embed_tokens.weight` is not there"]);
    weights.insert("lm.embed_tokens.weight".to_owned(), embedding);
    run(&weights).done();
    assert_eq!(read_hidden(&model.path("y")).1, beside);
}

#[test]
fn broken_files_are_named() {
    for name in ["c.json", "w.safetensors", "x.safetensors"] {
        let job = Job::new().prepare();
        fs::remove_file(job.path(name)).unwrap();
        job.run().refused(2, &[name]);
        assert!(!job.path("y").exists());
    }
    for name in ["w.safetensors", "x.safetensors"] {
        let job = Job::new().prepare();
        let bytes = fs::read(job.path(name)).unwrap();
        for length in [0, 7, 20, bytes.len() - 1] {
            fs::write(job.path(name), &bytes[..length]).unwrap();
            job.run().refused(2, &[name, "not a valid safetensors file"]);
        }
        assert!(!job.path("y").exists());
    }
}

#[test]
fn wrong_inputs_are_named() {
    let given =
        |name: &'static str, tensor: Tensor| Job::new().with(|job| drop(job.input.insert(name.to_owned(), tensor)));
    given("token_ids", Tensor::u32(&[0, 1, 2, 3, 5, 0])).refused(&[
        "x.safetensors",
        "token id 5",
        "position 4",
        "of 5",
    ]);
    given("token_ids", Tensor::i64(&[0, 1, -2, 3, 4, 0])).refused(&["x.safetensors", "token id -2", "position 2"]);
    given("token_ids", Tensor::i64(&[0, 1])).refused(&["`token_ids`", "[2]", "[6]"]);
    given("token_ids", Tensor::f32(&[6], |_| 0.0)).refused(&["`token_ids`", "F32", "U32, I32 or I64"]);
    given("hidden_states", Tensor::f32(&[0, 8], |_| 0.0)).refused(&["`hidden_states`", "empty"]);
    given("hidden_states", Tensor::f32(&[6, 7], |_| 0.0)).refused(&["`hidden_states`", "[6, 7]", "[tokens, 8]"]);
    given("hidden_states", Tensor { dtype: Dtype::I16, shape: vec![6, 8], bytes: vec![0; 96] }).refused(&[
        "`hidden_states`",
        "I16",
        "F32",
    ]);
    given("sequence_lengths", Tensor::u32(&[4, 3])).refused(&["`sequence_lengths`", "7", "6 tokens"]);
    given("sequence_lengths", Tensor::i64(&[7, -1])).refused(&["`sequence_lengths`", "-1"]);
    given("positions", Tensor::u32(&[0])).refused(&["`positions`", "not expected"]);
    Job::new().with(|job| drop(job.input.remove("token_ids"))).refused(&["`token_ids`", "missing", "gate"]);
    Job::new().with(|job| drop(job.input.remove("hidden_states"))).refused(&["`hidden_states`", "missing"]);
}

#[test]
fn an_output_that_cannot_be_written_is_refused_before_anything_is_computed() {
    let at = |output: &dyn Fn(&Job) -> PathBuf| {
        let job = Job::new().prepare();
        let output = output(&job);
        job.with(|job| job.options.extend(["--output".into(), output.into()]))
    };
    let refused = |job: Job, parts: &[&str]| {
        let before = job.files();
        let finished = job.run().refused(2, parts);
        assert!(!finished.stderr.contains("adapter:"), "{finished:?}");
        assert_eq!(job.files(), before);
    };
    refused(at(&|job| job.folder.path().to_owned()), &["is a directory"]);
    refused(at(&|job| job.path("none/y")), &["none", "cannot be written"]);
    refused(at(&|job| job.path("c.json").join("y")), &["c.json", "cannot be written"]);
    refused(at(&|job| job.path("..")), &["not the name of a file"]);
    refused(at(&|job| job.path("y/")), &["not the name of a file"]);
    // A run must not replace what it reads.
    refused(at(&|job| job.path("c.json")), &["is the --config file"]);
    refused(at(&|job| job.path("w.safetensors")), &["is the --weights file"]);
    refused(at(&|job| job.path("x.safetensors")), &["is the --input file"]);
    #[cfg(unix)]
    {
        refused(
            at(&|job| {
                fs::hard_link(job.path("w.safetensors"), job.path("same")).unwrap();
                job.path("same")
            }),
            &["is the --weights file"],
        );
        refused(
            at(&|job| {
                std::os::unix::fs::symlink("nowhere", job.path("link")).unwrap();
                job.path("link")
            }),
            &["is a link to nothing"],
        );
    }
    let read_only = at(&|job| job.path("kept"));
    fs::write(read_only.path("kept"), "stale").unwrap();
    let mut permissions = fs::metadata(read_only.path("kept")).unwrap().permissions();
    permissions.set_readonly(true);
    fs::set_permissions(read_only.path("kept"), permissions).unwrap();
    refused(read_only, &["kept", "read-only"]);
}

#[test]
fn weights_and_inputs_that_are_not_finite_are_warned_of() {
    for value in [f32::NAN, f32::INFINITY] {
        let job = Job::new().with(|job| {
            let tensor = Tensor::f32(&[8, 6], |index| if index == 3 { value } else { 0.1 });
            job.weights.insert("o_proj.weight".to_owned(), tensor);
        });
        let job = job.prepare();
        let finished = job.run().done();
        assert_eq!(
            finished.line("warning:"),
            "warning: tensor `o_proj.weight` holds 1 NaN or infinite values of 48",
            "{finished:?}"
        );
        let (_, hidden) = read_hidden(&job.path("y"));
        assert!(!hidden[0].is_finite() && hidden[1].is_finite(), "{hidden:?}");
    }
    let job = Job::new().with(|job| {
        job.input
            .insert("hidden_states".to_owned(), Tensor::f32(&[6, 8], |index| if index == 47 { f32::NAN } else { 0.5 }));
    });
    let finished = job.prepare().run().done();
    assert!(finished.line("warning:").contains("`hidden_states` holds 1 NaN"), "{finished:?}");
}

#[test]
fn an_adapter_that_is_not_there_is_refused_with_those_that_are() {
    let options = ["--adapter", "no-such-adapter"].map(OsString::from).to_vec();
    let job = Job::new().with(|job| job.options = options).prepare();
    job.run().refused(2, &["`no-such-adapter`", "there are: cpu; reference; "]);
    without_adapters(&job.arguments()).refused(2, &["there are: cpu; reference; none"]);
    let empty = Job::new().with(|job| job.options = ["--adapter", ""].map(OsString::from).to_vec());
    empty.prepare().run().refused(2, &["--adapter"]);
}

#[test]
fn without_an_adapter_the_cpu_computes_and_says_so() {
    let job = Job::new().with(|job| job.options.clear()).prepare();
    let finished = without_adapters(&job.arguments()).done();
    assert!(finished.line("adapter:").contains("CPU in f32 (no usable GPU on this machine)"), "{finished:?}");
    assert_eq!(read_hidden(&job.path("y")).0, [6, 8]);
    without_adapters(&["check", "--filter", "residual_add"]).refused(1, &["no usable adapter", "install"]);
    let info = without_adapters(&["info"]).done();
    assert!(info.stdout.contains("No adapter"), "{info:?}");
}

#[test]
fn a_run_tells_its_adapter_tokens_and_times_and_replaces_the_output() {
    let options = ["--adapter", "cpu", "--prefill", "2", "--chunk", "1"].map(OsString::from).to_vec();
    let job = Job::new().with(|job| {
        job.options = options;
        job.input.insert("sequence_lengths".to_owned(), Tensor::i64(&[5, 0, 1]));
    });
    let job = job.prepare();
    fs::write(job.path("y"), "stale").unwrap();
    let finished = job.run().done();
    assert!(finished.line("adapter:").contains("CPU in f32 (asked for)"), "{finished:?}");
    assert_eq!(finished.line("tokens:"), "tokens: 6 in 3 sequences");
    assert!(finished.line("prefill:").contains(" 3 tokens in "), "{finished:?}");
    assert!(finished.line("decode:").contains(" 3 tokens in "), "{finished:?}");
    assert_eq!(finished.stdout, "");
    assert_eq!(job.files(), ["c.json", "w.safetensors", "x.safetensors", "y"]);
    assert_eq!(read_hidden(&job.path("y")).0, [6, 8]);
}

#[test]
fn an_output_may_be_stdout() {
    let job = Job::new().with(|job| job.options.extend(["--output", "-"].map(OsString::from))).prepare();
    let output = command(&job.arguments()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(job.files(), ["c.json", "w.safetensors", "x.safetensors"]);
    let written = job.path("stdout");
    fs::write(&written, output.stdout).unwrap();
    assert_eq!(read_hidden(&written).0, [6, 8]);
}

/// A folder that cannot be written to is known before anything is measured for it.
#[cfg(unix)]
#[test]
fn tune_finds_out_first_that_it_cannot_keep_anything() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("egmla"), "a file").unwrap();
    let mut tune = command(&["tune", "--time-limit", "600"]);
    tune.env("XDG_CACHE_HOME", folder.path());
    let start = std::time::Instant::now();
    finish(tune).refused(1, &["egmla/tunings-"]);
    assert!(start.elapsed() < std::time::Duration::from_secs(100));
}

#[cfg(unix)]
#[test]
fn paths_need_not_be_utf_8() {
    use std::os::unix::ffi::OsStrExt;
    let strange = OsStr::from_bytes(b"\xff\xfe.safetensors");
    let job = Job::new().prepare();
    let missing = job.folder.path().join(strange);
    let job = job.with(|job| job.options.extend(["--weights".into(), missing.into()]));
    job.run().refused(2, &[".safetensors"]);
    let job = Job::new().prepare();
    let output = job.folder.path().join(strange);
    let job = job.with(|job| job.options.extend(["--output".into(), output.clone().into()]));
    job.run().done();
    assert_eq!(read_hidden(&output).0, [6, 8]);
    finish(command(&[OsStr::new("attend"), OsStr::new("--storage"), strange])).refused(2, &["--storage"]);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    for arguments in [&["--help"][..], &["info"], &["info", "--json"]] {
        let mut child = command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {stderr}");
        assert!(!stderr.contains("panicked") && !stderr.contains("error:"), "{stderr}");
    }
}

#[test]
fn a_backend_that_does_not_exist_is_said() {
    for (asked, name) in [("", "``"), ("vulcan", "`vulcan`"), ("vulkan,,gl", "``"), ("gl, dx13", "` dx13`")] {
        for arguments in [&["info"][..], &["generate", "--prompt", "x"], &["check", "--filter", "norm"]] {
            let mut command = command(arguments);
            command.env("WGPU_BACKEND", asked);
            finish(command).refused(2, &["WGPU_BACKEND", name]);
        }
    }
    egmla(&["check", "--filter", "norm", "--svg", "plots"]).refused(2, &["--svg", "--long"]);
}

#[test]
fn info_shows_a_model_that_is_not_computed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sparse.json");
    let config = r#"{"model_type": "deepseek_v32", "hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_hidden_layers": 61,
        "n_routed_experts": 256, "index_topk": 2048, "vocab_size": 129280, "intermediate_size": 18432,
        "max_position_embeddings": 163840}"#;
    std::fs::write(&file, config).unwrap();
    let file = file.to_str().unwrap();
    let shown = egmla(&["info", "--model", file]).done().stdout;
    // 61 · 576 elements a token; 128k tokens of 2 bytes each; 8 heads of 256.
    for text in [
        "deepseek_v32",
        "187107328",
        "35136",
        "8.58 GiB",
        "124928",
        "GQA 8 heads",
        "attend, one layer: no",
        "index_topk",
    ] {
        assert!(shown.contains(text), "{text} is not in\n{shown}");
    }
    let report: Value = serde_json::from_str(&egmla(&["info", "--json", "--model", file]).done().stdout).unwrap();
    assert!(report["commands"]["generate"].as_str().unwrap().contains("n_routed_experts"), "{report}");
}

#[test]
fn info_knows_the_papers_cache_sizes_and_an_adapter() {
    let report: Value = serde_json::from_str(&egmla(&["info", "--json"]).done().stdout).unwrap();
    let caches = report["caches"].as_array().unwrap();
    let paper = caches.iter().find(|cache| cache["title"].as_str().unwrap().starts_with("paper, 120M")).unwrap();
    let rows: Vec<_> = paper["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (row["attention"].as_str(), row["elements"].as_u64()))
        .collect();
    let expected = [("MHA", 18432), ("MLA r=256", 3840), ("EG-MLA r=64", 1536), ("EG-MLA r=16", 960)];
    assert_eq!(rows, expected.map(|(name, elements)| (Some(name), Some(elements))));
    let percent = |row: usize, of: &str| paper["rows"][row][of].as_f64().unwrap();
    assert!((percent(2, "below_mha") - 91.67).abs() < 0.01);
    assert!((percent(2, "below_mla") - 60.0).abs() < 0.01);

    let adapters = report["adapters"].as_array().unwrap();
    assert!(!adapters.is_empty(), "no adapter: install a driver, for instance Mesa's software Vulkan");
    for adapter in adapters {
        assert!(adapter["max_storage_buffers_per_shader_stage"].as_u64().unwrap() > 0);
        let kernels: Vec<_> =
            adapter["variants"].as_array().unwrap().iter().map(|variant| variant["kernel"].as_str().unwrap()).collect();
        for kernel in ["matmul", "matmul_gemv", "attention_prefill", "attention_decode", "attention_absorbed"] {
            assert!(kernels.contains(&kernel), "{kernels:?}");
        }
        let tiles =
            adapter["variants"].as_array().unwrap().iter().find(|variant| variant["kernel"] == "matmul").unwrap();
        assert!(tiles["overrides"]["TILE_K"].as_f64().unwrap() > 0.0);
    }

    let table = egmla(&["info"]).done().stdout;
    for text in ["18432", "3840", "1536", "960", "91.67 %", "60.00 %", "attention_prefill", "shader-f16"] {
        assert!(table.contains(text), "{text} is not in\n{table}");
    }
    egmla(&["info", "--model", "no/such/folder"]).refused(2, &["no/such/folder"]);
}

#[test]
fn check_draws_layers_and_runs_one_again() {
    let found = egmla(&["check", "--random", "6", "--seed", "3"]).done();
    assert!(found.stdout.contains("6 cases of 4 configurations") && found.stdout.contains("all right"), "{found:?}");
    egmla(&["check", "--random", "0"]).refused(2, &["--random 0", "nothing to compare"]);
    egmla(&["check", "--replay", "{}"]).refused(2, &["--replay", "missing field"]);
    let case = |n_head: u32| {
        format!(
            r#"{{"shape":{{"hidden_size":9,"n_head":{n_head},"d_latent":8,"d_q_latent":null,"d_nope":4,"d_rope":2,"d_value":5,
            "attention_bias":false,"kv_a_norm":true,"rope":"halves","gate":null,"storage":"f32","seed":1}},"batch":1,
            "capacity":5,"tile_rows":1,"gate_rows":"recompute","ids":"any","events":[{{"prefill":{{"counts":[4],"seed":1}}}},
            {{"decode":{{"counts":[1],"path":"absorbed","seed":1}}}}]}}"#
        )
    };
    let found = egmla(&["check", "--replay", &case(2)]).done();
    assert!(found.stdout.contains("right, with a relative error of"), "{found:?}");
    egmla(&["check", "--replay", &case(0)]).refused(2, &["num_attention_heads", "is 0"]);
    // Cases that would take gigabytes, or whose tokens fit no number.
    for (from, to, part) in [
        ("\"batch\":1,", "\"batch\":4294967295,", "batch × capacity"),
        ("\"n_head\":2,", "\"n_head\":2000000,", "largest weight"),
        ("\"counts\":[4]", "\"counts\":[4294967295,1]", "events"),
    ] {
        let spoilt = case(2).replace(from, to);
        assert_ne!(spoilt, case(2));
        egmla(&["check", "--replay", &spoilt]).refused(2, &["--replay", part]);
    }
    egmla(&["check", "--svg", "plots"]).refused(2, &["--long"]);
}

#[test]
fn check_compares_with_the_reference_or_says_why_not() {
    egmla(&["check", "--filter", "no-such-case"]).refused(2, &["`no-such-case`", "--filter"]);
    egmla(&["check", "--adapter", "cpu"]).refused(2, &["--adapter cpu", "nothing to compare"]);
    // Of the one kernel, whatever other shaders of the operation there are.
    let table = egmla(&["check", "--filter", "residual_add/"]).done();
    // A line for the kernel and one for all; with --verbose, one for each comparison.
    let (kernel, all) = (table.stdout.lines().next().unwrap(), table.stdout.lines().last().unwrap());
    assert!(kernel.starts_with("residual_add  ok, ") && all.contains(" passed, 0 failed"), "{table:?}");
    assert_eq!(table.stdout.lines().count(), 2, "{table:?}");
    let verbose = egmla(&["check", "--filter", "residual_add/", "--verbose"]).done().stdout;
    assert!(verbose.matches("residual_add/5000").count() > 1 && verbose.ends_with(&format!("{all}\n")), "{verbose}");
    let report: Value =
        serde_json::from_str(&egmla(&["check", "--filter", "residual_add", "--json"]).done().stdout).unwrap();
    assert_eq!(report["failed"], 0);
    assert!(report["passed"].as_u64().unwrap() > 0);
    for row in report["rows"].as_array().unwrap() {
        assert!(row["id"].as_str().unwrap().contains("residual_add"), "{row}");
        assert!(row["error"].as_f64().unwrap() <= row["tolerance"].as_f64().unwrap(), "{row}");
    }
}

#[test]
fn export_writes_cases_and_a_layer_that_a_page_can_read() {
    egmla(&["export", "--out", "x", "--filter", "no-such-case"]).refused(2, &["`no-such-case`", "--filter"]);
    egmla(&["export", "--out", "x", "--subgroups", "8:4"]).refused(2, &["--subgroups", "8:32"]);
    egmla(&["export", "--out", "x", "--adapter", "cpu"]).refused(1, &["an adapter is needed"]);
    let work = tempfile::tempdir().unwrap();
    let out = work.path().join("data");
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/shakespeare");
    egmla(&["export", "--out", out.to_str().unwrap(), "--filter", "residual_add", "--model", model]).done();
    let json = |name: &str| -> Value { serde_json::from_slice(&fs::read(out.join(name)).unwrap()).unwrap() };
    let index = json("index.json");
    let cases = index["cases"].as_array().unwrap();
    assert!(cases.len() > 3 && index["layer"] == true, "{index}");
    for case in cases {
        let file = format!("cases/{}.json", case["file"].as_str().unwrap());
        assert_eq!(json(&file)["id"], case["id"]);
    }
    let layer = json("layer.json");
    let most = layer["most_tokens"].as_u64().unwrap() as usize;
    let variants = layer["variants"].as_array().unwrap();
    assert_eq!(variants.len(), 4);
    for variant in variants {
        let programs = json(&format!("layer/{}.json", variant["file"].as_str().unwrap()));
        let programs = programs.as_array().unwrap();
        assert_eq!(programs.len(), most);
        for (tokens, program) in (1..).zip(programs) {
            // Every token's id stands somewhere, and of each part of the text the stream is read.
            let ids = program["ids"].as_array().unwrap();
            assert!((0..tokens).all(|token| ids.iter().any(|place| place[2] == token)), "{variant}: {tokens} tokens");
            let actions = program["actions"].as_array().unwrap();
            assert_eq!(actions.iter().filter(|action| action["do"] == "read").count(), tokens.min(2), "{variant}");
        }
    }
    // A model that is none is refused before anything is written.
    let arguments = ["export", "--out", out.to_str().unwrap(), "--filter", "residual_add", "--model", "no such folder"];
    egmla(&arguments).refused(2, &["no such folder"]);
    assert_eq!(json("index.json"), index);
    // Where a list stands, the rest is whole: one that breaks off leaves none.
    fs::remove_file(out.join("cases/0001.json")).unwrap();
    fs::create_dir(out.join("cases/0001.json")).unwrap();
    egmla(&arguments[..5]).refused(1, &["0001.json"]);
    assert!(!out.join("index.json").exists());
    // A folder that cannot be made.
    let taken = work.path().join("file");
    fs::write(&taken, "").unwrap();
    egmla(&["export", "--out", taken.to_str().unwrap()]).refused(2, &["file"]);
}

/// The golden case on `adapter`, for every way to run it; `bound` by storage.
/// WebGPU's default limits and no feature: kernels that need one are not run, and the others are.
#[test]
fn check_opens_a_device_with_webgpus_limits_when_asked() {
    let check = |limits: &[&str], filter: &str| egmla(&[&["check", "--filter", filter], limits].concat());
    check(&["--limits", "default"], "swiglu").done();
    let without = check(&["--limits", "default"], "matmul_subgroup/").refused(1, &["nothing was compared", "subgroup"]);
    assert!(without.stdout.contains(" 0 failed"), "{without:?}");
    check(&["--limits", "none"], "swiglu").refused(2, &["--limits", "default", "adapter"]);
}

fn golden(case: &str, adapter: &str, decode: &[&str], storages: &[(&str, f64)]) {
    golden_with(case, adapter, decode, "recompute", storages);
}

fn golden_with(case: &str, adapter: &str, decode: &[&str], gate_rows: &str, storages: &[(&str, f64)]) {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("tests/golden").join(case);
    let (shape, expected) = read_hidden(&folder.join("expected.safetensors"));
    let norm = expected.iter().map(|value| value * value).sum::<f64>().sqrt();
    assert!(norm > 0.0);
    let work = tempfile::tempdir().unwrap();
    let output = work.path().join("y.safetensors");
    let mut ways = vec![(vec!["--prefill", "all"], decode[0])];
    for prefill in [&["--prefill", "0"][..], &["--prefill", "7"], &["--prefill", "7", "--chunk", "3"]] {
        ways.extend(decode.iter().map(|path| (prefill.to_vec(), *path)));
    }
    for (prefill, path) in ways {
        for &(storage, bound) in storages {
            let mut arguments = vec![OsString::from("attend")];
            for (option, name) in
                [("--config", "config.json"), ("--weights", "weights.safetensors"), ("--input", "input.safetensors")]
            {
                arguments.extend([option.into(), folder.join(name).into()]);
            }
            arguments.extend(["--output".into(), output.clone().into()]);
            let options = [
                &["--adapter", adapter, "--storage", storage, "--decode", path, "--gate-rows", gate_rows],
                &prefill[..],
            ]
            .concat();
            arguments.extend(options.iter().map(OsString::from));
            let finished = finish(command(&arguments)).done();
            let on_cpu = finished.line("adapter:").contains("adapter: CPU ");
            assert_eq!(
                on_cpu,
                ["cpu", "reference"].contains(&adapter),
                "no adapter: install a driver, for instance Mesa's software Vulkan"
            );
            let (found_shape, found) = read_hidden(&output);
            fs::remove_file(&output).unwrap();
            assert_eq!(found_shape, shape);
            let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
            let error = difference / norm;
            assert!(error <= bound, "{case} {options:?}: relative error {error:.2e}, at most {bound:.0e}");
        }
    }
}

const ON_DEVICE: &[(&str, f64)] = &[("f32", 2e-5), ("f16", 5e-3)];
const ON_CPU: &[(&str, f64)] = &[("f32", 2e-5)];
const BY_REFERENCE: &[(&str, f64)] = &[("f32", 1e-6)];

/// `--adapter` for the machine's adapter, which may be software: `auto` would take the CPU.
fn device() -> String {
    let default = if cfg!(target_os = "macos") { "metal" } else { "vulkan" };
    let asked = std::env::var("WGPU_BACKEND").unwrap_or_default();
    asked.split(',').next().filter(|name| !name.is_empty()).unwrap_or(default).to_owned()
}

#[test]
fn golden_mla_yarn() {
    golden("mla_yarn", &device(), &["expanded", "absorbed"], ON_DEVICE);
}

#[test]
fn golden_egmla_latent() {
    golden("egmla_latent", &device(), &["expanded", "absorbed"], ON_DEVICE);
}

#[test]
fn golden_egmla_up_projected() {
    for gate_rows in ["recompute", "pool:4", "table"] {
        golden_with("egmla_up_projected", &device(), &["absorbed", "expanded"], gate_rows, ON_DEVICE);
    }
}

#[test]
fn golden_cases_on_the_cpu() {
    golden("mla_yarn", "cpu", &["expanded", "absorbed"], ON_CPU);
    golden("egmla_latent", "cpu", &["expanded", "absorbed"], ON_CPU);
    golden("egmla_up_projected", "cpu", &["expanded", "absorbed"], ON_CPU);
    for case in ["mla_yarn", "egmla_latent", "egmla_up_projected"] {
        golden(case, "reference", &["expanded"], BY_REFERENCE);
    }
}

const PROMPT: &str = "JULIET:\nO Romeo, Romeo!";

#[test]
fn generate_writes_the_same_text_on_the_cpu_and_on_the_adapter() {
    let text = |adapter: &str| {
        let options = ["--temperature", "0", "--max-new-tokens", "64", "--adapter", adapter];
        let finished = egmla(&[&["generate", "--prompt", PROMPT][..], &options].concat()).done();
        for line in ["adapter:", "prompt:", "decode:", "cache of", "  MHA", "  MLA"] {
            finished.line(line);
        }
        finished.stdout
    };
    let on_cpu = text("cpu");
    assert!(on_cpu.starts_with(PROMPT) && on_cpu.len() > PROMPT.len() + 100, "{on_cpu}");
    assert_eq!(on_cpu, text("reference"));
    assert_eq!(on_cpu, text(&device()));
}

#[test]
fn generate_tells_where_the_time_of_a_token_goes() {
    let run = |adapter: &str, more: &[&str]| {
        let options = ["--temperature", "0", "--max-new-tokens", "9", "--adapter", adapter];
        egmla(&[&["generate", "--prompt", PROMPT][..], &options, more].concat()).done()
    };
    let (plain, profiled) = (run(&device(), &[]), run(&device(), &["--profile"]));
    assert_eq!(plain.stdout, profiled.stdout);
    // The first new token comes out of the prompt's own step.
    assert!(profiled.line("profile of").contains("8 decode steps"), "{profiled:?}");
    for part in ["  host", "  device", "  wait", "  readback"] {
        let line = profiled.line(part);
        assert!(line.contains("not measured") || line.contains("µs a token in the median"), "{line}");
    }
    assert!(profiled.line("bottleneck:").contains("% of the time"), "{profiled:?}");
    assert!(!plain.stderr.contains("bottleneck"), "{plain:?}");
    run("cpu", &["--profile"]).line("no profile");
}

#[test]
fn generate_repeats_with_its_seed_and_tells_its_figures_as_json() {
    let run = |seed: &str, more: &[&str]| {
        let options = ["--max-new-tokens", "24", "--seed", seed, "--adapter", "cpu"];
        egmla(&[&["generate", "--prompt", PROMPT][..], &options, more].concat()).done().stdout
    };
    assert_eq!(run("7", &[]), run("7", &[]));
    assert_ne!(run("7", &[]), run("8", &[]));
    let report: Value = serde_json::from_str(&run("7", &["--json"])).unwrap();
    assert_eq!(format!("{PROMPT}{}\n", report["text"].as_str().unwrap()), run("7", &[]));
    assert_eq!((report["new_tokens"].as_u64(), report["token_ids"].as_array().unwrap().len()), (Some(24), 24));
    assert_eq!(report["cache_bytes_per_token"]["mha"].as_u64(), Some(4 * 4 * 128 * 4));
    assert_eq!(report["cache_bytes_per_token"]["this"].as_u64(), Some(4 * (32 + 32) * 4));
    // The model is in f16: there is nothing to round. The cache stays in f32.
    let halves: Value = serde_json::from_str(&run("7", &["--json", "--storage", "f16"])).unwrap();
    assert_eq!(report["storage"], "f32");
    assert_eq!(halves["storage"], "f16");
    for field in ["token_ids", "cache_bytes_per_token"] {
        assert_eq!(halves[field], report[field]);
    }
    let options = ["--max-new-tokens", "1", "--adapter", "reference", "--storage", "f16"];
    let reference = egmla(&[&["generate", "--prompt", PROMPT][..], &options].concat()).done();
    assert!(reference.line("warning:").contains("changes nothing for the reference"), "{reference:?}");
}

#[test]
fn generate_refuses_what_has_no_meaning() {
    for (options, parts) in [
        (&["--prompt", ""][..], &["--prompt"][..]),
        (&["--prompt", "a", "--temperature", "-1"], &["--temperature", "-1"]),
        (&["--prompt", "a", "--temperature", "nan"], &["--temperature"]),
        (&["--prompt", "a", "--top-p", "1.5"], &["--top-p", "1.5"]),
        (&["--prompt", "a", "--top-k", "0"], &["--top-k", "0"]),
        (&["--prompt", "a", "--max-new-tokens", "0"], &["--max-new-tokens", "0"]),
        (&["--prompt", "a", "--max-new-tokens", "300"], &["longer than the cache", "300", "256"]),
        (&["--prompt", "a", "--gate-rows", "pool:none"], &["--gate-rows", "pool:N"]),
        (&["--prompt", "a", "--model", "no-such-folder"], &["no-such-folder"]),
        (&["--prompt", "a", "--adapter", "no-such-adapter"], &["no-such-adapter", "cpu"]),
    ] {
        let finished = egmla(&[&["generate"][..], options].concat()).refused(2, parts);
        assert_eq!((finished.stderr.lines().count(), finished.stdout.as_str()), (1, ""), "{finished:?}");
    }
    // A long prompt leaves less room than the default of 128, which nobody asked for.
    let long = "To be, or not to be: that is the question. ".repeat(8);
    egmla(&["generate", "--prompt", &long, "--temperature", "0", "--adapter", "cpu"]).done();
    egmla(&["generate", "--prompt", &long.repeat(9)]).refused(2, &["longer than the cache", "256"]);
    // The whole room may be used: the last token is written, not fed.
    let fits = ["generate", "--prompt", "a", "--max-new-tokens", "256", "--temperature", "0", "--adapter", "cpu"];
    egmla(&fits).done();
}

#[test]
fn eval_scores_a_text_alike_on_the_cpu_and_on_the_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text");
    // Longer than a window of 256 tokens, so that windows overlap.
    fs::write(&path, "ROMEO:\nBut soft, what light through yonder window breaks?\n".repeat(24)).unwrap();
    let bits = |adapter: &str| {
        let path = path.to_str().unwrap();
        let finished = egmla(&["eval", "--text", path, "--adapter", adapter, "--json"]).done();
        let report: Value = serde_json::from_str(&finished.stdout).unwrap();
        (report["bits_per_character"].as_f64().unwrap(), report["tokens"].as_u64().unwrap())
    };
    let ((on_cpu, tokens), (on_adapter, same)) = (bits("cpu"), bits(&device()));
    assert!(tokens > 300 && tokens == same, "{tokens} {same}");
    assert!((on_cpu / on_adapter - 1.0).abs() < 1e-5, "{on_cpu} {on_adapter}");
    assert!(on_cpu > 0.1 && on_cpu < 3.0, "{on_cpu}");
}

#[test]
fn eval_refuses_texts_that_cannot_be_scored() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text");
    for (content, parts) in [
        (&b""[..], &["text", "is empty"][..]),
        (b"a", &["text", "number of tokens is 1"]),
        (b"abc\xff", &["text", "not UTF-8", "byte 3"]),
    ] {
        fs::write(&path, content).unwrap();
        let finished = egmla(&["eval", "--text", path.to_str().unwrap()]).refused(2, parts);
        assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
    }
    egmla(&["eval", "--text", folder.path().to_str().unwrap()]).refused(2, &[]);
    egmla(&["eval", "--text", "no-such-text"]).refused(2, &["no-such-text"]);
}

#[test]
fn a_model_folder_that_is_spoilt_is_refused_before_an_adapter_is_opened() {
    let committed = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("models/shakespeare");
    let spoilt = |change: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            fs::copy(committed.join(name), folder.path().join(name)).unwrap();
        }
        change(folder.path());
        let model = folder.path().to_str().unwrap();
        let options = ["--prompt", "a", "--max-new-tokens", "2", "--adapter", "cpu", "--model", model];
        (egmla(&[&["generate"][..], &options].concat()), folder)
    };
    let config = |folder: &Path, change: &dyn Fn(&mut Value)| {
        let path = folder.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        fs::write(path, config.to_string()).unwrap();
    };
    let refused = |change: &dyn Fn(&Path), parts: &[&str]| {
        let finished = spoilt(change).0.refused(2, parts);
        assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
    };
    spoilt(&|_| {}).0.done();
    refused(&|folder| fs::remove_file(folder.join("tokenizer.json")).unwrap(), &["tokenizer.json"]);
    refused(&|folder| fs::write(folder.join("model.safetensors"), [0; 100]).unwrap(), &["model.safetensors"]);
    refused(&|folder| config(folder, &|c| c["n_routed_experts"] = json!(8)), &["n_routed_experts"]);
    refused(&|folder| config(folder, &|c| c["num_hidden_layers"] = json!(5)), &["model.layers.4.", "is missing"]);
    refused(&|folder| config(folder, &|c| c["num_hidden_layers"] = json!(3)), &["model.layers.3.", "not expected"]);
    refused(&|folder| config(folder, &|c| c["v_head_dim"] = json!(32)), &["expected [384, 32]", "[512, 32]"]);
}

#[test]
fn generate_and_eval_survive_readers_that_go_away() {
    let text = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("LICENSE-MIT");
    let eval = ["eval", "--adapter", "cpu", "--text", text.to_str().unwrap()];
    let generate = ["generate", "--adapter", "cpu", "--max-new-tokens", "3", "--prompt", PROMPT];
    for arguments in [&eval[..], &generate] {
        for both in [false, true] {
            let mut child = command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            drop(child.stdout.take());
            if both {
                drop(child.stderr.take());
            }
            let output = child.wait_with_output().unwrap();
            let stderr = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(0), "{arguments:?}: {stderr}");
            assert!(!stderr.contains("panicked") && !stderr.contains("error:"), "{stderr}");
        }
    }
}

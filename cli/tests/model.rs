//! `egmla attend` on whole checkpoints, on what other programs write, and beside their results.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize};
use serde_json::{Value, json};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Type, shape and bytes of a tensor.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let whole =
        |(name, view): (String, TensorView<'_>)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
    tensors.tensors().into_iter().map(whole).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let view = |(dtype, shape, data)| TensorView::new(dtype, shape, data).unwrap();
    let views = tensors.iter().map(|(name, (dtype, shape, data))| (name, view((*dtype, shape.clone(), data))));
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

fn shakespeare(name: &str) -> PathBuf {
    Path::new(ROOT).join("models/shakespeare").join(name)
}

fn golden(name: &str) -> PathBuf {
    Path::new(ROOT).join("tests/golden/egmla_up_projected").join(name)
}

/// A folder to write to, with an input of the committed model's layers as torch writes one: a batch of one, bf16, int32.
struct Job(tempfile::TempDir);

impl Job {
    fn new() -> Self {
        let job = Job(tempfile::tempdir().unwrap());
        let hidden =
            (0..5 * 256).flat_map(|i| half::bf16::from_f32((i % 17) as f32 * 0.25 - 2.0).to_le_bytes()).collect();
        let ids = [7i32, 900, 0, 1, 7].iter().flat_map(|id| id.to_le_bytes()).collect();
        let input = [
            ("hidden_states".to_owned(), (Dtype::BF16, vec![1, 5, 256], hidden)),
            ("token_ids".to_owned(), (Dtype::I32, vec![1, 5], ids)),
        ];
        write(&job.path("x"), &input.into());
        job
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn attend(&self, options: &[(&str, &Path)]) -> Output {
        self.attend_with(options, |command| command)
    }

    fn attend_with(&self, options: &[(&str, &Path)], with: impl FnOnce(&mut Command) -> &mut Command) -> Output {
        let mut arguments: Vec<OsString> = vec!["attend".into()];
        let own = [("--adapter", PathBuf::from("cpu")), ("--input", self.path("x")), ("--output", self.path("y"))];
        let given = |option: &str| options.iter().any(|(given, _)| *given == option);
        let own = own.iter().filter(|(option, _)| !given(option)).map(|(option, value)| (*option, value.as_path()));
        for (option, value) in own.chain(options.iter().copied()) {
            arguments.extend([option.into(), value.into()]);
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_egmla"));
        with(command.args(arguments).env_remove("RUST_LOG")).output().unwrap()
    }
}

#[track_caller]
fn done(output: Output) -> String {
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    stderr
}

/// One line, after notes where the run failed.
#[track_caller]
fn failed(output: Output, code: i32, parts: &[&str]) -> String {
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    let last = stderr.lines().last().unwrap().to_owned();
    assert!(last.starts_with("error: ") && (code == 1 || stderr.lines().count() == 1), "{stderr}");
    for part in parts {
        assert!(last.contains(part), "`{part}` is not in {last}");
    }
    stderr
}

#[test]
fn a_layer_of_a_model_is_the_layer_by_itself() {
    let job = Job::new();
    let model = read(&shakespeare("model.safetensors"));
    let config = shakespeare("config.json");
    let prefix = "model.layers.2.self_attn.";
    let of_layer = || model.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)));
    done(job.attend(&[("--model", &shakespeare("")), ("--layer", Path::new("2"))]));
    let expected = fs::read(job.path("y")).unwrap();
    // The same by its file or by name in the cache, and by the layer's tensors alone, under no name, the model's or torch's own.
    done(job.attend(&[("--model", &shakespeare("model.safetensors")), ("--layer", Path::new("2"))]));
    assert_eq!(fs::read(job.path("y")).unwrap(), expected);
    let snapshot = job.path("home/hub/models--org--model/snapshots/abc");
    fs::create_dir_all(&snapshot).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(shakespeare(name), snapshot.join(name)).unwrap();
    }
    let by_name = [("--model", Path::new("org/model")), ("--layer", Path::new("2"))];
    let home = job.path("home");
    done(job.attend_with(&by_name, |command| command.env("HF_HOME", &home).env_remove("HF_HUB_CACHE")));
    assert_eq!(fs::read(job.path("y")).unwrap(), expected);
    for under in ["", "model.layers.0.self_attn.", "module.self_attn."] {
        let mut tensors: Tensors =
            of_layer().map(|(name, tensor)| (format!("{under}{name}"), tensor.clone())).collect();
        if !under.is_empty() {
            let beside = model["model.layers.2.input_layernorm.weight"].clone();
            tensors.insert("model.layers.0.input_layernorm.weight".to_owned(), beside);
        }
        write(&job.path("w"), &tensors);
        done(job.attend(&[("--config", &config), ("--weights", &job.path("w"))]));
        assert_eq!(fs::read(job.path("y")).unwrap(), expected, "{under}");
    }
    // Another layer is another.
    done(job.attend(&[("--model", &shakespeare("")), ("--layer", Path::new("1"))]));
    assert_ne!(fs::read(job.path("y")).unwrap(), expected);
}

#[test]
fn only_the_tensors_of_the_layer_are_read() {
    let job = Job::new();
    fs::create_dir(job.path("m")).unwrap();
    fs::copy(shakespeare("config.json"), job.path("m/config.json")).unwrap();
    let mut model = read(&shakespeare("model.safetensors"));
    // Of a type that is not read.
    for (name, tensor) in &mut model {
        if !name.starts_with("model.layers.3.self_attn.") {
            tensor.0 = Dtype::I16;
        }
    }
    write(&job.path("m/model.safetensors"), &model);
    let layer = |layer: &str| job.attend(&[("--model", &job.path("m")), ("--layer", Path::new(layer))]);
    done(layer("3"));
    failed(layer("2"), 2, &["model.safetensors", "model.layers.2.self_attn.", "element type I16"]);
    failed(layer("4"), 2, &["model.safetensors", "no layer 4: there are 4, from 0 to 3"]);
    failed(layer("x"), 2, &["--layer", "3.1"]);
    failed(layer("3.1"), 2, &["layer 3 has no attention 1", "model.layers.3.self_attn."]);
    let whole = [("--config", shakespeare("config.json")), ("--weights", shakespeare("model.safetensors"))];
    let whole = whole.each_ref().map(|(option, path)| (*option, path.as_path()));
    failed(job.attend(&whole), 2, &["4 layers of attention", "--model", "--layer"]);
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let job = Job::new();
    let (model, file) = (shakespeare(""), shakespeare("config.json"));
    failed(job.attend(&[("--model", &model)]), 2, &["--layer"]);
    failed(job.attend(&[("--model", &model), ("--layer", Path::new("0")), ("--config", &file)]), 2, &["--config"]);
    failed(job.attend(&[("--model", &model), ("--layer", Path::new("0")), ("--weights", &file)]), 2, &["--weights"]);
    failed(job.attend(&[("--config", &file)]), 2, &["--weights"]);
    failed(job.attend(&[("--config", &file), ("--weights", &file), ("--layer", Path::new("0"))]), 2, &["--model"]);
    failed(
        job.attend(&[("--model", &model), ("--layer", Path::new("0")), ("--tolerance", Path::new("1"))]),
        2,
        &["--expected"],
    );
    // What the run reads is not replaced.
    fs::create_dir(job.path("m")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(shakespeare(name), job.path("m").join(name)).unwrap();
    }
    for name in ["m/config.json", "m/model.safetensors"] {
        let output = job.path(name);
        let options = [("--model", job.path("m")), ("--layer", PathBuf::from("0")), ("--output", output)];
        failed(
            job.attend(&options.each_ref().map(|(option, path)| (*option, path.as_path()))),
            2,
            &["choose another output"],
        );
    }
}

#[test]
fn the_output_is_compared_with_what_is_expected() {
    let job = Job::new();
    let run = |expected: &Path, tolerance: Option<&str>| {
        let [config, weights, input] = ["config.json", "weights.safetensors", "input.safetensors"].map(golden);
        fs::copy(input, job.path("x")).unwrap();
        let mut options = vec![("--config", config.as_path()), ("--weights", &weights), ("--expected", expected)];
        options.extend(tolerance.map(|tolerance| ("--tolerance", Path::new(tolerance))));
        job.attend(&options)
    };
    let right = golden("expected.safetensors");
    let stderr = done(run(&right, None));
    let line = stderr.lines().find(|line| line.starts_with("expected: ")).unwrap();
    assert!(
        line.contains("largest absolute error ") && line.contains("relative error ") && line.contains("2e-5"),
        "{line}"
    );
    failed(run(&right, Some("0")), 1, &["--expected", "the relative error is", "at most 0"]);
    // One element that is wrong.
    let mut tensors = read(&right);
    let (_, shape, data) = tensors.get_mut("hidden_states").unwrap();
    let count: usize = shape.iter().product();
    let changed = f64::from_le_bytes(data[16..24].try_into().unwrap()) + 0.1;
    data[16..24].copy_from_slice(&changed.to_le_bytes());
    write(&job.path("wrong"), &tensors);
    let stderr = failed(run(&job.path("wrong"), None), 1, &["the relative error is"]);
    assert!(stderr.contains("element 2"), "{stderr}");
    assert!(job.path("y").exists(), "the output is there to look at");
    done(run(&job.path("wrong"), Some("1")));
    // Other types, a leading batch, and what does not fit.
    let (_, shape, data) = &read(&right)["hidden_states"];
    let values: Vec<f64> = data.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
    let batch: Vec<usize> = [1].into_iter().chain(shape.iter().copied()).collect();
    let f32s = values.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect();
    let bf16s: Vec<u8> = values.iter().flat_map(|&value| half::bf16::from_f64(value).to_le_bytes()).collect();
    for (tensor, limit) in [((Dtype::F32, batch, f32s), "2e-5"), ((Dtype::BF16, shape.clone(), bf16s.clone()), "4e-2")]
    {
        write(&job.path("other"), &[("hidden_states".to_owned(), tensor)].into());
        assert!(done(run(&job.path("other"), None)).contains(limit));
    }
    write(&job.path("other"), &[("hidden_states".to_owned(), (Dtype::BF16, vec![count], bf16s.clone()))].into());
    failed(run(&job.path("other"), None), 2, &["other", "`hidden_states` has shape"]);
    write(&job.path("other"), &[("y".to_owned(), (Dtype::BF16, vec![count], bf16s))].into());
    failed(run(&job.path("other"), None), 2, &["other", "`hidden_states` is missing"]);
    failed(run(&job.path("none"), None), 2, &["none"]);
    failed(run(&right, Some("-1")), 2, &["--tolerance"]);
}

#[test]
fn notes_say_what_is_passed_over_and_what_f16_loses() {
    let job = Job::new();
    let golden_weights = read(&golden("weights.safetensors"));
    let run = |tensors: &Tensors, storage: &str, adapter: &str| {
        write(&job.path("w"), tensors);
        fs::copy(golden("input.safetensors"), job.path("x")).unwrap();
        let options = [
            ("--config", golden("config.json")),
            ("--weights", job.path("w")),
            ("--storage", storage.into()),
            ("--adapter", adapter.into()),
        ];
        done(job.attend(&options.each_ref().map(|(option, path)| (*option, path.as_path()))))
    };
    let mut tensors = golden_weights.clone();
    for name in ["rotary_emb.inv_freq", "k_scale", "x.k_scale"] {
        tensors.insert(name.to_owned(), (Dtype::F32, vec![1], vec![0; 4]));
    }
    tensors.remove("k_scale");
    let stderr = run(&tensors, "f32", "cpu");
    let notes: Vec<_> = stderr.lines().filter(|line| line.starts_with("warning: ")).collect();
    assert_eq!(notes, ["warning: passed over: 2 tensors, `rotary_emb.inv_freq` the first, without effect here"]);
    let mut tensors = golden_weights;
    let data = &mut tensors.get_mut("o_proj.weight").unwrap().2;
    data[..4].copy_from_slice(&1e-9f32.to_le_bytes());
    data[8..12].copy_from_slice(&(-1e-30f32).to_le_bytes());
    let of = data.len() / 4;
    let device = std::env::var("WGPU_BACKEND").unwrap_or_else(|_| "vulkan".to_owned());
    let stderr = run(&tensors, "f16", device.split(',').next().unwrap_or_default());
    let warning =
        format!("warning: tensor `o_proj.weight`: 2 of {of} weights are too small for f16 storage and become 0");
    assert!(stderr.lines().any(|line| line == warning), "{stderr}");
}

#[test]
fn a_model_in_fp8_shards_is_read_layer_by_layer() {
    let job = Job::new();
    fs::create_dir(job.path("m")).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(shakespeare("config.json")).unwrap()).unwrap();
    config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [64, 100]});
    fs::write(job.path("m/config.json"), config.to_string()).unwrap();
    // The output projection in codes of 1.5 · 2^n, with the factors in another file; the same in f32.
    let name = "model.layers.1.self_attn.o_proj.weight";
    let code = |i: usize| (0x3c + (i % 5) * 8) as u8;
    let factor = |i: usize| (i + 1) as f32 * 0.01;
    let mut model = read(&shakespeare("model.safetensors"));
    let plain = (0..256 * 256).map(|i| 1.5 * 2f32.powi((i % 5) as i32) * factor(i / 256 / 64 * 3 + i % 256 / 100));
    model.insert(name.to_owned(), (Dtype::F32, vec![256, 256], plain.flat_map(f32::to_le_bytes).collect()));
    write(&job.path("m/model.safetensors"), &model);
    let run = || {
        done(job.attend(&[("--model", &job.path("m")), ("--layer", Path::new("1"))]));
        fs::read(job.path("y")).unwrap()
    };
    let expected = run();
    model.insert(name.to_owned(), (Dtype::F8_E4M3, vec![256, 256], (0..256 * 256).map(code).collect()));
    let factors = (0..4 * 3).flat_map(|i| factor(i).to_le_bytes()).collect();
    let factors: Tensors = [(format!("{name}_scale_inv"), (Dtype::F32, vec![4, 3], factors))].into();
    write(&job.path("m/a.safetensors"), &model);
    write(&job.path("m/b.safetensors"), &factors);
    let file =
        |(names, file): (&Tensors, &str)| names.keys().map(|name| (name.clone(), json!(file))).collect::<Vec<_>>();
    let map: serde_json::Map<_, _> =
        [(&model, "a.safetensors"), (&factors, "b.safetensors")].into_iter().flat_map(file).collect();
    fs::write(job.path("m/model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    fs::remove_file(job.path("m/model.safetensors")).unwrap();
    assert_eq!(run(), expected);
}

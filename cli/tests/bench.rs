//! Measuring: rows, tuning, compiled pipelines that are kept, and the table of `docs/speed.md`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../tests/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use egmla::bench::report::Report;
use egmla::bench::{Row, Stock, rows};
use egmla::check::cases;
use egmla::low_level::kernels::Matmul;
use egmla::low_level::{Op, Tuning, Tunings};
use egmla::readback;
use egmla::{Error, Kernels, Storage, wgpu};
use serde_json::Value;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Runs the program in a folder, which is also its cache folder.
fn egmla(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_egmla"));
    command.args(arguments).current_dir(folder).env("XDG_CACHE_HOME", folder).env_remove("RUST_LOG");
    command.stdin(Stdio::null()).output().unwrap()
}

#[track_caller]
fn done(output: Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn row(id: &str) -> Row {
    rows().into_iter().find(|row| row.id() == id).unwrap_or_else(|| panic!("no row {id}"))
}

/// Results that are kept in the repository, sorted; what other libraries came to is not among them.
fn results() -> Vec<String> {
    let mut files: Vec<_> = std::fs::read_dir(root().join("benches/results"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".json") && !name.starts_with("peers-"))
        .map(|name| format!("benches/results/{name}"))
        .collect();
    files.sort();
    files
}

/// The page that holds the table.
const PAGE: &str = "docs/speed.md";

fn copy_page(folder: &Path) {
    std::fs::create_dir(folder.join("docs")).unwrap();
    std::fs::copy(root().join(PAGE), folder.join(PAGE)).unwrap();
}

#[test]
fn the_page_and_its_plots_are_what_the_kept_results_say() {
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("benches/results");
    std::fs::create_dir_all(&kept).unwrap();
    for entry in std::fs::read_dir(root().join("benches/results")).unwrap() {
        let file = entry.unwrap().path();
        if file.extension().is_some_and(|extension| extension == "json") {
            std::fs::copy(&file, kept.join(file.file_name().unwrap())).unwrap();
        }
    }
    copy_page(folder.path());
    let files = results();
    assert!(!files.is_empty());
    let arguments: Vec<_> = ["bench", "--page"].into_iter().chain(files.iter().map(String::as_str)).collect();
    done(egmla(folder.path(), &arguments));
    let again = "run `cargo run --release -- bench --page benches/results/*.json`";
    let read = |base: &Path, name: &str| std::fs::read_to_string(base.join(name)).unwrap();
    assert!(read(folder.path(), PAGE) == read(root(), PAGE), "{PAGE}: {again}");
    let mut plots = 0;
    for entry in std::fs::read_dir(&kept).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".svg") {
            let (fresh, committed) = (read(&kept, &name), read(&root().join("benches/results"), &name));
            assert!(fresh == committed, "{name}: {again}");
            plots += 1;
        }
    }
    assert_eq!(plots, 2 * files.len() + 1);
    // The file's name is that of its adapter.
    for file in &files {
        let report: Report = serde_json::from_str(&read(root(), file)).unwrap();
        assert_eq!(*file, format!("benches/results/{}.json", report.slug()));
    }
}

#[test]
fn a_page_without_the_block_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("docs")).unwrap();
    std::fs::write(folder.path().join(PAGE), "text").unwrap();
    let kept = root().join(&results()[0]);
    let file = folder.path().join("results.json");
    std::fs::copy(kept, &file).unwrap();
    let output = egmla(folder.path(), &["bench", "--page", "results.json"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no block from"));
    assert_eq!(std::fs::read_to_string(folder.path().join(PAGE)).unwrap(), "text");
}

/// A file of results may hold any number.
#[test]
fn results_of_any_size_are_drawn() {
    let folder = tempfile::tempdir().unwrap();
    copy_page(folder.path());
    let mut report: Value = serde_json::from_slice(&std::fs::read(root().join(&results()[0])).unwrap()).unwrap();
    for (key, value) in [("gflop_s", 1.5e308), ("median_us", 1e-320)] {
        report["rows"].as_array_mut().unwrap().iter_mut().for_each(|row| row[key] = value.into());
        std::fs::write(folder.path().join("results.json"), report.to_string()).unwrap();
        done(egmla(folder.path(), &["bench", "--page", "results.json"]));
    }
}

#[test]
fn bench_measures_and_writes_what_it_promises() {
    let folder = tempfile::tempdir().unwrap();
    // What cannot be written is refused before anything is measured.
    std::fs::write(folder.path().join("file"), "").unwrap();
    for arguments in [["--json", "."], ["--json", "file/results.json"], ["--svg", "file"]] {
        let refused = egmla(folder.path(), &[&["bench"], &arguments[..]].concat());
        let errors = String::from_utf8_lossy(&refused.stderr);
        assert_eq!((refused.status.code(), errors.lines().count()), (Some(2), 1), "{arguments:?}: {errors}");
    }
    let arguments = ["bench", "--filter", "norm/", "--json", "out/results.json", "--svg", "out/plots"];
    let table = done(egmla(folder.path(), &arguments));
    assert!(table.contains("roofline: copy") && table.contains("norm/rms_8192x1024"), "{table}");
    let text = std::fs::read_to_string(folder.path().join("out/results.json")).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    assert!(value["adapter"].is_string());
    for ceiling in ["copy_gb_s", "fma_gflop_s", "submit_wait_us"] {
        assert!(value["roofline"][ceiling].as_f64().unwrap() > 0.0, "{ceiling}: {text}");
    }
    let rows = value["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 1);
    for number in [
        "runs",
        "first_us",
        "min_us",
        "median_us",
        "bytes",
        "flops",
        "gb_s",
        "gflop_s",
        "pct_copy",
        "pct_fma",
        "dispatches",
        "cpu_reference_us",
    ] {
        assert!(rows[0][number].as_f64().unwrap() > 0.0, "{number}: {text}");
    }
    assert!(rows[0]["min_us"].as_f64() <= rows[0]["median_us"].as_f64());
    assert_eq!(rows[0]["storage"], "f32");
    let plots: Vec<_> = std::fs::read_dir(folder.path().join("out/plots")).unwrap().collect();
    assert_eq!(plots.len(), 3, "decode time, roofline, cache");
    for entry in plots {
        let svg = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    }
    let nothing = egmla(folder.path(), &["bench", "--filter", "no such row"]);
    assert_eq!(nothing.status.code(), Some(2));
}

#[test]
fn tune_keeps_its_choice_and_info_shows_it() {
    let folder = tempfile::tempdir().unwrap();
    done(egmla(folder.path(), &["tune", "--time-limit", "1"]));
    let kept: Vec<PathBuf> = std::fs::read_dir(folder.path().join("egmla"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|file| file.file_name().unwrap().to_str().unwrap().starts_with("tunings-"))
        .collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    std::fs::write(&kept[0], r#"{"norm": 2}"#).unwrap();
    let info: Value = serde_json::from_str(&done(egmla(folder.path(), &["info", "--json"]))).unwrap();
    let adapters = info["adapters"].as_array().unwrap();
    assert!(adapters.iter().any(|adapter| adapter["tunings"]["norm"] == 2), "{info}");
    // What does not exist is passed over with a warning.
    std::fs::write(&kept[0], r#"{"norm": 99}"#).unwrap();
    let output = egmla(folder.path(), &["bench", "--filter", "norm/"]);
    let warned = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && warned.contains("run `egmla tune` again"), "{warned}");
    done(egmla(folder.path(), &["tune", "--forget"]));
    assert!(!kept[0].exists());
}

#[test]
fn measured_settings_replace_those_of_the_class() {
    let gpu = common::gpu();
    let tunings = |kernel: &str, choice| Tunings(BTreeMap::from([(kernel.to_owned(), choice)]));
    let problem = Matmul::linear(64, 64, 64, false, Storage::F32);
    let variant = Matmul::VARIANTS.iter().find(|variant| variant.spec.name == "matmul").unwrap();
    for choice in 0..variant.spec.tunings {
        let tuned = gpu.kernels.with_tunings(tunings("matmul", choice)).unwrap();
        let plan = |tuning| variant.plan(&problem, tuned.context(), tuning).unwrap();
        assert_eq!(plan(Tuning::Auto), plan(Tuning::Forced(choice)));
    }
    for (kernel, choice) in [("matmul", variant.spec.tunings), ("no_such_kernel", 0)] {
        let refused = gpu.kernels.with_tunings(tunings(kernel, choice));
        assert!(matches!(refused, Err(Error::Config { key, .. }) if key == kernel));
    }
    gpu.assert_no_errors();
}

#[test]
fn a_decode_row_is_one_step_that_can_run_again() {
    let gpu = common::gpu();
    let mut stock = Stock::default();
    let row = row("decode/mla_120m_r256/t1024");
    let mut prepared = row.prepare(&gpu.kernels, &mut stock).unwrap();
    // Nothing is compiled before it is needed, and compiling ahead changes nothing.
    prepared.recording.compile().unwrap();
    let mut results = Vec::new();
    for _ in 0..2 {
        readback::submit(&mut prepared.recording).unwrap();
        prepared.verify().unwrap();
        results.push(readback::wait(readback::read(&gpu.kernels, &[&prepared.output])).unwrap());
    }
    assert_eq!(results[0], results[1]);
    assert!(results[0][0].iter().any(|&byte| byte != 0));
    assert!(prepared.cost.flops > 0 && prepared.cost.bytes > 0);
    gpu.assert_no_errors();
}

#[test]
fn a_pipeline_cache_of_another_device_does_no_harm() {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    let Some(adapter) = adapters.iter().find(|adapter| adapter.features().contains(wgpu::Features::PIPELINE_CACHE))
    else {
        println!("not run: no adapter with a pipeline cache");
        return;
    };
    let required_features = wgpu::Features::PIPELINE_CACHE;
    let open = || {
        let descriptor = wgpu::DeviceDescriptor { required_features, ..Default::default() };
        pollster::block_on(adapter.request_device(&descriptor)).unwrap()
    };
    let (device, queue) = open();
    let (other, _) = open();
    let make = |device: &wgpu::Device| common::unchecked::pipeline_cache(device, None);
    let case = cases().into_iter().find(|case| case.kernel() == "swiglu").unwrap();
    for cache in [make(&device), make(&other)] {
        let kernels = Kernels::new(&device, &queue).unwrap().with_pipeline_cache(cache);
        for outcome in case.run(&kernels).unwrap() {
            outcome.verdict.unwrap();
        }
    }
    assert!(make(&device).get_data().is_some());
}

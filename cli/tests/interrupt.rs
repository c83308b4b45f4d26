//! Ctrl-C in the program: the text so far and what was measured stay, the terminal and the files are as they were, and the exit
//! status is 130. A signal that the tests' own process ignores is ignored by the program until it has its handler: none is sent before.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// The cache folder of the tests, where proofs of an adapter are kept.
fn cache() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// By the reference on the CPU: there nothing is compiled, and steps are slow.
fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_egmla"));
    command.args(arguments).args(["--adapter", "reference"]).env_remove("RUST_LOG");
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits until the process has its handler: before, a signal ends it as it ends any other.
fn wait_for_handler(child: &mut Child) {
    let start = Instant::now();
    loop {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        if caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 2 != 0) {
            return;
        }
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was interrupted");
        assert!(start.elapsed() < Duration::from_secs(60), "no handler for SIGINT");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn interrupt(child: &Child) {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

#[track_caller]
fn interrupted(output: &Output) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{:?} {stderr}", output.status);
    assert_eq!(stderr.lines().last(), Some("error: interrupted"), "{stderr}");
}

#[test]
fn an_interrupted_generate_keeps_the_text_so_far() {
    let arguments = ["generate", "--prompt", "ROMEO:", "--max-new-tokens", "250", "--temperature", "0"];
    let mut child = command(&arguments).spawn().unwrap();
    let mut text = vec![0; 24];
    child.stdout.as_mut().unwrap().read_exact(&mut text).unwrap();
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    interrupted(&output);
    text.extend(&output.stdout);
    let text = String::from_utf8(text).unwrap();
    assert!(text.starts_with("ROMEO:") && text.ends_with('\n'), "{text:?}");
    let whole = command(&arguments).output().unwrap().stdout;
    let whole = String::from_utf8(whole).unwrap();
    let part = text.strip_suffix('\n').unwrap();
    assert!(whole.starts_with(part) && part.len() + 1 < whole.len(), "{text:?} of {whole:?}");
}

/// A list of cases stands only where all of them are whole: that of the export before is gone, too.
#[test]
fn an_interrupted_export_leaves_no_list() {
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("index.json");
    fs::write(&list, "older").unwrap();
    let mut export = Command::new(env!("CARGO_BIN_EXE_egmla"));
    export.args(["export", "--out", folder.path().to_str().unwrap()]).env_remove("RUST_LOG");
    export.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null());
    let mut child = export.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_handler(&mut child);
    let start = Instant::now();
    while !folder.path().join("cases/0000.json").exists() {
        assert!(
            child.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_secs(120),
            "no case is written"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    interrupt(&child);
    interrupted(&child.wait_with_output().unwrap());
    assert!(!list.exists());
}

/// The layer at hand is finished, and the same command goes on behind it: all files are those of a run in one go.
#[test]
fn an_interrupted_conversion_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text"));
    let golden = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/transformers/llama"));
    fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(name), model.join(name)).unwrap();
    }
    let tokenizer =
        r#"{"added_tokens":[],"model":{"type":"BPE","vocab":{"a":0,"b":1,"c":2},"merges":[],"unk_token":"a"}}"#;
    fs::write(model.join("tokenizer.json"), tokenizer).unwrap();
    // Two layers, each of which takes many times as long as a signal does.
    fs::write(&text, "abacbc".repeat(5_000)).unwrap();
    let convert = |output: &str| {
        let mut convert = Command::new(env!("CARGO_BIN_EXE_egmla"));
        convert.args(["convert", "--to", "mla", "--rank", "12", "--tokens", "30000", "--model"]).arg(&model);
        convert.arg("--text").arg(&text).arg("--output").arg(folder.path().join(output)).env_remove("RUST_LOG");
        convert.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        convert
    };
    assert!(convert("whole").status().unwrap().success());

    let mut child = convert("stopped").spawn().unwrap();
    let start = Instant::now();
    while !folder.path().join("stopped/conversion-work/stream-0001").exists() {
        let running = child.try_wait().unwrap().is_none();
        assert!(running && start.elapsed() < Duration::from_secs(120), "no layer is done");
        std::thread::sleep(Duration::from_millis(1));
    }
    interrupt(&child);
    interrupted(&child.wait_with_output().unwrap());
    assert!(!folder.path().join("stopped/config.json").exists());
    let output = convert("stopped").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.contains("goes on behind layer"), "{stderr}");
    for name in ["config.json", "conversion.json", "model.safetensors", "tokenizer.json"] {
        let [found, wanted] = ["stopped", "whole"].map(|made| fs::read(folder.path().join(made).join(name)).unwrap());
        assert!(found == wanted, "{name}");
    }
}

/// Runs the program under a terminal of its own, `script`'s, where Ctrl-C is a key, and presses it once the terminal shows what is
/// waited for. Returns the exit status and all that the terminal showed.
fn on_terminal(cache: &Path, arguments: &str, waited_for: impl Fn(&str) -> bool) -> (Option<i32>, String) {
    let line = format!("'{}' {arguments}", env!("CARGO_BIN_EXE_egmla"));
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--flush", "--command", &line, "/dev/null"]).env("TERM", "xterm");
    script.env("XDG_CACHE_HOME", cache).env_remove("RUST_LOG");
    script.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = script.spawn().expect("`script` (package bsdutils)");
    let mut keyboard = child.stdin.take().unwrap();
    let mut screen = child.stdout.take().unwrap();
    let mut shown = Vec::new();
    let mut part = [0; 256];
    while !waited_for(&String::from_utf8_lossy(&shown)) {
        let count = screen.read(&mut part).unwrap();
        assert!(count > 0, "it ended before: {}", String::from_utf8_lossy(&shown));
        shown.extend(&part[..count]);
    }
    keyboard.write_all(b"\x03").unwrap();
    screen.read_to_end(&mut shown).unwrap();
    (child.wait().unwrap().code(), String::from_utf8_lossy(&shown).into_owned())
}

/// Whether a bar has shown that some of `what` are done.
fn some_are_done(shown: &str, what: &str) -> bool {
    let bars = shown.split(what).map(|before| before.rsplit(' ').next().unwrap_or_default());
    bars.filter_map(|bar| bar.split_once('/')).any(|(done, _)| done.parse().is_ok_and(|done: u32| done > 0))
}

#[test]
fn an_interrupted_eval_leaves_the_terminal_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text");
    fs::write(&text, "But soft, what light through yonder window breaks?\n".repeat(4000)).unwrap();
    let arguments = format!("eval --adapter reference --text '{}'", text.display());
    let (status, shown) = on_terminal(cache(), &arguments, |shown| shown.contains(" tokens, "));
    assert_eq!(status, Some(130), "{shown}");
    // The bar's line is wiped (ESC [2K) after it was last drawn, and what follows is the one line of the error.
    let (_, after) = shown.rsplit_once(" tokens, ").unwrap();
    let (_, rest) = after.rsplit_once("\x1b[2K").unwrap_or_else(|| panic!("the bar is still there: {shown:?}"));
    // A bar of two lines leaves the cursor on the first.
    assert_eq!(rest.replace("\x1b[1A", "").trim(), "error: interrupted", "{shown:?}");
    // Whoever hides the cursor shows it again.
    assert!(shown.rfind("\x1b[?25l") <= shown.rfind("\x1b[?25h"), "{shown:?}");
}

/// The terminal's last line is that of the error.
#[track_caller]
fn interrupted_on_terminal(status: Option<i32>, shown: &str) {
    assert_eq!(status, Some(130), "{shown}");
    assert_eq!(shown.lines().last().map(str::trim), Some("error: interrupted"), "{shown}");
}

#[test]
fn an_interrupted_tune_keeps_what_it_has_found() {
    let folder = tempfile::tempdir().unwrap();
    let started = |shown: &str| some_are_done(shown, " kernels, ");
    let (status, shown) = on_terminal(folder.path(), "tune", started);
    interrupted_on_terminal(status, &shown);
    assert!(shown.contains("setting of the class"), "{shown}");
    let line = shown.lines().find_map(|line| line.split_once("kept in ")).expect("where it is kept").1;
    let kept: serde_json::Value = serde_json::from_slice(&fs::read(line.trim()).unwrap()).unwrap();
    assert!(kept.is_object(), "{kept}");
}

#[test]
fn an_interrupted_bench_keeps_the_rows_that_it_has_measured() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("rows.json");
    let arguments = format!("bench --filter t1024 --json '{}'", json.display());
    let (status, shown) = on_terminal(cache(), &arguments, |shown| some_are_done(shown, " rows, "));
    interrupted_on_terminal(status, &shown);
    assert!(shown.contains("INTERRUPTED: ") && shown.contains("roofline: "), "{shown}");
    let report: egmla::bench::report::Report = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert!(report.interrupted && !report.rows.is_empty());
    assert!(report.rows.iter().all(|row| row.runs >= 5 && shown.contains(&row.id)), "{:?}", report.rows);
    assert!(report.skipped.iter().all(|row| row.why == "interrupted"), "{:?}", report.skipped);
    // Such rows are no results to publish.
    fs::create_dir(folder.path().join("docs")).unwrap();
    fs::write(folder.path().join("docs/speed.md"), "text").unwrap();
    let mut page = Command::new(env!("CARGO_BIN_EXE_egmla"));
    let refused = page.args(["bench", "--page", "rows.json"]).current_dir(folder.path()).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("interrupted"), "{refused:?}");
}

#[test]
fn an_interrupted_check_tells_what_it_has_compared() {
    let mut check = Command::new(env!("CARGO_BIN_EXE_egmla"));
    // One small kernel, which is soon done, then layers.
    check.args(["check", "--filter", "ids"]).env("XDG_CACHE_HOME", cache()).env_remove("RUST_LOG");
    let mut child = check.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = vec![0];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    interrupted(&output);
    let stdout = String::from_utf8([first, output.stdout].concat()).unwrap();
    let last = stdout.lines().last().unwrap();
    assert!(last.contains(" 0 failed, ") && last.ends_with(" cases, interrupted"), "{stdout}");
    let (before, of) = last.strip_suffix(" cases, interrupted").unwrap().rsplit_once(" of ").unwrap();
    let run: u32 = before.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(run > 0 && run < of.parse().unwrap(), "{last}");
    assert!(stdout.lines().count() > 1 && stdout.contains("ok, "), "{stdout}");
}

#[test]
fn an_interrupted_search_and_long_contexts_tell_what_they_have_compared() {
    let started = |shown: &str| some_are_done(shown, " cases");
    let (status, shown) = on_terminal(cache(), "check --random 100000", started);
    interrupted_on_terminal(status, &shown);
    let line = shown.lines().find(|line| line.contains(" of 100000 cases of ")).unwrap_or_else(|| panic!("{shown}"));
    assert!(line.trim().ends_with(" of its tolerance, interrupted"), "{line}");

    let started = |shown: &str| some_are_done(shown, " configurations");
    let (status, shown) = on_terminal(cache(), "check --long --json", started);
    interrupted_on_terminal(status, &shown);
    assert!(shown.contains("\"interrupted\": true") && shown.contains("\"configuration\": \"MLA\""), "{shown}");
}

/// Results that are not there yet are not waited for twice.
#[test]
fn a_second_ctrl_c_ends_a_measurement_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("rows.json");
    let mut bench = Command::new(env!("CARGO_BIN_EXE_egmla"));
    bench.args(["bench", "--json", json.to_str().unwrap()]).env("XDG_CACHE_HOME", cache()).env_remove("RUST_LOG");
    let mut child = bench.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_handler(&mut child);
    interrupt(&child);
    interrupt(&child);
    let start = Instant::now();
    interrupted(&child.wait_with_output().unwrap());
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert!(!json.exists());
}

/// A layer over many tokens, in a folder with an older output.
struct Job {
    folder: tempfile::TempDir,
}

impl Job {
    fn new(tokens: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = r#"{"hidden_size": 8, "num_attention_heads": 2, "kv_lora_rank": 4, "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 2, "v_head_dim": 4}"#;
        fs::write(folder.path().join("config.json"), config).unwrap();
        let shapes: [(&str, [usize; 2]); 4] = [
            ("q_proj.weight", [12, 8]),
            ("kv_a_proj_with_mqa.weight", [6, 8]),
            ("kv_b_proj.weight", [16, 4]),
            ("o_proj.weight", [8, 8]),
        ];
        let write = |name: &str, tensors: &[(&str, [usize; 2])]| {
            let data: Vec<_> = tensors.iter().map(|(_, [rows, width])| vec![0u8; 4 * rows * width]).collect();
            let views = tensors
                .iter()
                .zip(&data)
                .map(|((name, shape), data)| (*name, TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap()));
            fs::write(folder.path().join(name), safetensors::serialize(views, None).unwrap()).unwrap();
        };
        write("weights.safetensors", &shapes);
        write("input.safetensors", &[("hidden_states", [tokens, 8])]);
        fs::write(folder.path().join("out.safetensors"), "older").unwrap();
        Job { folder }
    }

    fn command(&self, prefill: &str) -> Command {
        let path = |name: &str| self.folder.path().join(name).to_str().unwrap().to_owned();
        let (config, weights) = (path("config.json"), path("weights.safetensors"));
        let (input, output) = (path("input.safetensors"), path("out.safetensors"));
        let files = ["--config", &config, "--weights", &weights, "--input", &input, "--output", &output];
        command(&[&["attend"][..], &files, &["--prefill", prefill]].concat())
    }

    /// Interrupts a run in its middle; how long it went on.
    fn interrupted(&self, prefill: &str) -> Duration {
        let mut child = self.command(prefill).spawn().unwrap();
        wait_for_handler(&mut child);
        std::thread::sleep(Duration::from_millis(500));
        assert!(child.try_wait().unwrap().is_none(), "it was done before it could be interrupted");
        interrupt(&child);
        let start = Instant::now();
        let output = child.wait_with_output().unwrap();
        let took = start.elapsed();
        interrupted(&output);
        took
    }

    /// The older output stands, and nothing new is beside it.
    fn assert_untouched(&self) {
        let path: &Path = self.folder.path();
        assert_eq!(fs::read_to_string(path.join("out.safetensors")).unwrap(), "older");
        let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["config.json", "input.safetensors", "out.safetensors", "weights.safetensors"]);
    }
}

#[test]
fn an_interrupted_attend_keeps_the_older_output_and_leaves_nothing_beside_it() {
    let job = Job::new(40_000);
    job.interrupted("0");
    job.assert_untouched();
}

/// One step that takes minutes is not waited for.
#[test]
fn a_step_that_does_not_end_is_ended() {
    let job = Job::new(60_000);
    let took = job.interrupted("all");
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(60), "{took:?}");
    job.assert_untouched();
}

#[test]
fn a_second_ctrl_c_ends_it_at_once() {
    let job = Job::new(60_000);
    let mut child = job.command("all").spawn().unwrap();
    wait_for_handler(&mut child);
    std::thread::sleep(Duration::from_millis(300));
    interrupt(&child);
    std::thread::sleep(Duration::from_millis(300));
    interrupt(&child);
    interrupted(&child.wait_with_output().unwrap());
    job.assert_untouched();
}

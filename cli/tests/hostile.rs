//! Files made to do harm, through every command that reads them: one `error:` line that names the file, exit 2, and no more
//! memory or time than the file is worth. Nothing here needs an adapter: files are refused before one is opened.

#![cfg(unix)]
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Most kibibytes of address space of a run: many times what a refusal takes, and far below what the files ask for.
const MEMORY: u64 = 2 << 20;

/// Longest that a run may take.
const TIME: Duration = Duration::from_secs(60);

/// How a run ended.
#[derive(Debug)]
struct Finished {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Finished {
    /// Exit 2 and one line, which names the file and says each of `parts`.
    #[track_caller]
    fn refused(&self, file: &str, parts: &[&str]) {
        assert_eq!(self.code, Some(2), "{self:?}");
        assert_eq!((self.stderr.lines().count(), self.stdout.as_str()), (1, ""), "{self:?}");
        assert!(self.stderr.starts_with("error: "), "{self:?}");
        for part in [&[file], parts].concat() {
            assert!(self.stderr.contains(part), "`{part}` is not in {self:?}");
        }
    }
}

/// Runs the program with little memory and little time.
#[track_caller]
fn egmla(arguments: &[OsString]) -> Finished {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -v {MEMORY} && exec \"$@\""), "sh", env!("CARGO_BIN_EXE_egmla")]);
    command.args(arguments).env_remove("RUST_LOG").env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if start.elapsed() > TIME => {
                child.kill().unwrap();
                panic!("{arguments:?} did not end");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let read = |pipe: &mut dyn Read| {
        let mut text = String::new();
        pipe.read_to_string(&mut text).unwrap();
        text
    };
    let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    Finished { code: status.code(), stdout: read(&mut stdout), stderr: read(&mut stderr) }
}

/// A file, and the option that reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reader {
    command: &'static str,
    file: &'static str,
}

const fn reader(command: &'static str, file: &'static str) -> Reader {
    Reader { command, file }
}

/// One layer of the whole model.
const LAYER: &str = "attend --layer";

const CONFIGS: [Reader; 5] = [
    reader("attend", "c.json"),
    reader(LAYER, "config.json"),
    reader("generate", "config.json"),
    reader("eval", "config.json"),
    reader("info", "config.json"),
];
const TENSORS: [Reader; 5] = [
    reader("attend", "w.safetensors"),
    reader(LAYER, "model.safetensors"),
    reader("attend", "x.safetensors"),
    reader("generate", "model.safetensors"),
    reader("eval", "model.safetensors"),
];
const TOKENIZERS: [Reader; 2] = [reader("generate", "tokenizer.json"), reader("eval", "tokenizer.json")];
const TEXT: Reader = reader("eval", "text");

fn all() -> impl Iterator<Item = Reader> {
    CONFIGS.into_iter().chain(TENSORS).chain(TOKENIZERS).chain([TEXT])
}

/// A folder in which every file is right, to be spoilt in one place.
struct Job {
    folder: tempfile::TempDir,
}

impl Job {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        let copy = |from: &str, to: &str| fs::copy(root.join(from), folder.path().join(to)).unwrap();
        for (from, to) in [
            ("config.json", "c.json"),
            ("weights.safetensors", "w.safetensors"),
            ("input.safetensors", "x.safetensors"),
        ] {
            copy(&format!("tests/golden/egmla_latent/{from}"), to);
        }
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            copy(&format!("models/shakespeare/{name}"), name);
        }
        // Two tokens for the model's layers.
        let header =
            [tensor("hidden_states", "F32", "[2,256]", "[0,2048]"), tensor("token_ids", "I32", "[2]", "[2048,2056]")];
        fs::write(folder.path().join("h.safetensors"), tensors(&format!("{{{}}}", header.join(",")), 2056)).unwrap();
        fs::write(folder.path().join("text"), "To be, or not to be").unwrap();
        Job { folder }
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Self {
        // A link is not followed.
        let _ = fs::remove_file(self.path(name));
        fs::write(self.path(name), bytes).unwrap();
        self
    }

    /// Puts a link in place of a file.
    fn link(&self, name: &str, target: &str) -> &Self {
        fs::remove_file(self.path(name)).unwrap();
        symlink(target, self.path(name)).unwrap();
        self
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    fn run(&self, command: &str) -> Finished {
        let mut arguments: Vec<OsString> = command.split(' ').map(OsString::from).collect();
        let mut option = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        match command {
            "attend" => {
                for (name, file) in [
                    ("--config", "c.json"),
                    ("--weights", "w.safetensors"),
                    ("--input", "x.safetensors"),
                    ("--output", "y"),
                ] {
                    option(name, self.path(file).into());
                }
            }
            LAYER => {
                arguments.push("0".into());
                let mut option = |name: &str, value: PathBuf| arguments.extend([name.into(), value.into()]);
                option("--model", self.folder.path().into());
                option("--input", self.path("h.safetensors"));
                option("--output", self.path("y"));
            }
            _ => option("--model", self.folder.path().into()),
        }
        let mut option = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        match command {
            "generate" => {
                option("--prompt", "a".into());
                option("--max-new-tokens", "1".into());
            }
            "eval" => option("--text", self.path("text").into()),
            _ => {}
        }
        if command != "info" {
            arguments.extend(["--adapter".into(), "cpu".into()]);
        }
        egmla(&arguments)
    }

    #[track_caller]
    fn refused(&self, reader: Reader, parts: &[&str]) {
        self.run(reader.command).refused(reader.file, parts);
        assert!(!self.path("y").exists(), "{reader:?}");
    }
}

/// A safetensors file of this header and as many bytes behind it.
fn tensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn tensor(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

#[test]
fn files_that_are_right_are_read_within_the_same_bounds() {
    let job = Job::new();
    for command in ["attend", LAYER, "generate", "eval"] {
        let finished = job.run(command);
        assert_eq!(finished.code, Some(0), "{command}: {finished:?}");
    }
}

#[test]
fn empty_files_and_noise_are_refused() {
    for reader in all() {
        Job::new().write(reader.file, b"").refused(reader, &[]);
        Job::new().write(reader.file, [0xff; 4096]).refused(reader, &[]);
    }
    for reader in TENSORS {
        Job::new().write(reader.file, b"").refused(reader, &["not a valid safetensors file", "0 bytes"]);
        Job::new().write(reader.file, [0xff; 4096]).refused(reader, &["header of 18446744073709551615 bytes"]);
    }
}

#[test]
fn truncated_files_are_refused() {
    for reader in all().filter(|reader| *reader != TEXT) {
        let job = Job::new();
        let whole = job.read(reader.file);
        for length in [1, 7, 8, 9, whole.len() / 2, whole.len() - 1] {
            // Without its last line break a JSON file is whole.
            if length + 1 == whole.len() && whole.ends_with(b"}\n") {
                continue;
            }
            job.write(reader.file, &whole[..length]).refused(reader, &[]);
        }
    }
}

#[test]
fn what_is_no_regular_file_is_refused_without_waiting() {
    for reader in all() {
        let of = |target: &str, part: &str| Job::new().link(reader.file, target).refused(reader, &[part]);
        of("nowhere", "No such file");
        of(reader.file, "symbolic link");
        of("/", "is a directory");
        of("/dev/zero", "is not a regular file");
        of("/dev/null", "is not a regular file");
        // A pipe that nobody writes to.
        let job = Job::new();
        assert!(Command::new("mkfifo").arg(job.path("pipe")).status().unwrap().success());
        job.link(reader.file, "pipe").refused(reader, &["is not a regular file"]);
        // A link to a file is that file.
        let job = Job::new();
        fs::rename(job.path(reader.file), job.path("elsewhere")).unwrap();
        symlink("elsewhere", job.path(reader.file)).unwrap();
        assert_eq!(job.run(reader.command).code, Some(0), "{reader:?}");
    }
    let endless = Job::new();
    endless.link(TEXT.file, "/proc/self/mem").refused(TEXT, &[]);
}

#[test]
fn headers_are_checked_before_they_are_believed() {
    let each = (1u64 << 61) - 1;
    let huge: Vec<_> = (0..8)
        .map(|i| tensor(&format!("w{i}"), "U8", &format!("[{each}]"), &format!("[{},{}]", i * each, (i + 1) * each)))
        .chain([tensor("w8", "U8", "[0]", &format!("[{},{}]", 8 * each, 8 * each))])
        .collect();
    let a = tensor("a", "F32", "[1]", "[0,4]");
    let cases = [
        // The header's length.
        (u64::MAX.to_le_bytes().to_vec(), "a header of 18446744073709551615 bytes"),
        ((1u64 << 40).to_le_bytes().to_vec(), "a header of 1099511627776 bytes"),
        (100_000_001u64.to_le_bytes().to_vec(), "a header of 100000001 bytes"),
        (99_999_999u64.to_le_bytes().to_vec(), "a header of 99999999 bytes in a file of 8"),
        // Where tensors stand.
        (tensors(&format!("{{{a}}}"), 3), "tells of 4 bytes of tensors, the file has 3"),
        (tensors(&format!("{{{a}}}"), 5), "tells of 4 bytes of tensors, the file has 5"),
        (tensors(&format!("{{{}}}", tensor("a", "F32", "[1]", "[4,0]")), 4), "begins at byte 4 and ends at 0"),
        (tensors(&format!("{{{a},{}}}", tensor("b", "F32", "[1]", "[2,6]")), 6), "not a valid safetensors file"),
        (tensors(&format!("{{{a},{}}}", tensor("b", "F32", "[1]", "[8,12]")), 12), "not a valid safetensors file"),
        (
            tensors(&format!("{{{}}}", tensor("a", "F32", "[1]", "[0,18446744073709551615]")), 4),
            "18446744073709551615 bytes",
        ),
        (tensors(&format!("{{{}}}", tensor("a", "F32", "[1]", "[0,18446744073709551616]")), 4), "the header: "),
        (tensors(&format!("{{{}}}", huge.join(",")), 0), "bytes of tensors, the file has 0"),
        // Shapes.
        (
            tensors(&format!("{{{}}}", tensor("a", "F32", "[1152921504606846976]", "[0,4]")), 4),
            "not a valid safetensors file",
        ),
        (
            tensors(&format!("{{{}}}", tensor("a", "F32", "[1152921504606846976,1152921504606846976]", "[0,4]")), 4),
            "not a valid safetensors file",
        ),
        (tensors(&format!("{{{}}}", tensor("a", "F32", "[-1]", "[0,4]")), 4), "not a valid safetensors file"),
        (tensors(&format!("{{{}}}", tensor("a", "F32", "[2]", "[0,4]")), 4), "not a valid safetensors file"),
        // Types and names.
        (tensors(&format!("{{{}}}", tensor("a", "F7", "[1]", "[0,4]")), 4), "not a valid safetensors file"),
        (tensors(&format!("{{{a},{a}}}"), 4), "`a` is given twice"),
        (
            tensors(&format!("{{{}}}", tensor("a\\n\\u001b[31m", "F32", "[1]", "[0,3]")), 3),
            "not a valid safetensors file",
        ),
        // Nesting and the rest of JSON.
        (tensors(&r#"{"a":"#.repeat(1 << 20), 0), "the header: "),
        (tensors(&"[".repeat(1 << 20), 0), "the header: "),
        (tensors("{}", 0), ""),
        (tensors("", 0), "the header: "),
        (tensors("\u{0}", 0), "the header: "),
    ];
    for reader in TENSORS {
        for (bytes, part) in &cases {
            Job::new().write(reader.file, bytes).refused(reader, &[part]);
        }
    }
}

#[test]
fn a_file_of_holes_takes_no_memory() {
    // A terabyte that is not there, behind a header that is wrong about it.
    for reader in all().filter(|reader| *reader != TEXT) {
        let job = Job::new();
        let bytes = tensors(&format!("{{{}}}", tensor("a", "U8", "[4]", "[0,4]")), 4);
        job.write(reader.file, bytes);
        fs::File::options().write(true).open(job.path(reader.file)).unwrap().set_len(1 << 40).unwrap();
        job.refused(reader, &[]);
    }
}

/// A model in shards.
const SHARDED: [Reader; 3] = [
    reader(LAYER, "model.safetensors.index.json"),
    reader("generate", "model.safetensors.index.json"),
    reader("eval", "model.safetensors.index.json"),
];

/// The model's tensors in one shard, with an index.
fn sharded() -> Job {
    let job = Job::new();
    fs::rename(job.path("model.safetensors"), job.path("shard")).unwrap();
    let bytes = job.read("shard");
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let names = header.as_object().unwrap().keys().filter(|name| *name != "__metadata__");
    let map: serde_json::Map<_, _> = names.map(|name| (name.clone(), json!("shard"))).collect();
    job.write(SHARDED[0].file, json!({"weight_map": map}).to_string());
    job
}

#[test]
fn indexes_of_shards_lead_nowhere_else_and_take_no_time() {
    for reader in SHARDED {
        let job = sharded();
        let whole = String::from_utf8(job.read(reader.file)).unwrap();
        assert_eq!(sharded().run(reader.command).code, Some(0), "{reader:?}");
        let entry = |name: &str| {
            whole.replacen("{", &format!(r#"{{"weight_map":{{"a":"{name}"}},"#), 1).replacen(
                &format!(r#""weight_map":{{"a":"{name}"}},"weight_map":{{"#),
                &format!(r#""weight_map":{{"a":"{name}","#),
                1,
            )
        };
        for name in ["../w.safetensors", "/dev/zero", "/etc/passwd", "..", "", "a/b", "shard/", "a\\\\b", "a\\b"] {
            job.write(reader.file, entry(name)).refused(reader, &["`a`", "is not the name of a file"]);
        }
        job.write(reader.file, entry("none")).refused(reader, &["none", "is not there"]);
        job.write(reader.file, entry("shard")).refused(reader, &["`a` is listed in shard"]);
        for text in ["", "[]", "{}", "null", &"[".repeat(1 << 20), &r#"{"weight_map":"#.repeat(1 << 18), "\u{ff}"] {
            job.write(reader.file, text).refused(reader, &["index of shards: "]);
        }
        job.write(reader.file, [0xff; 4096]).refused(reader, &["index of shards: "]);
        for target in ["/dev/zero", "/", "nowhere"] {
            job.link(reader.file, target).refused(reader, &[]);
        }
        job.write(reader.file, " ".repeat(1 + (64 << 20))).refused(reader, &["67108865", "67108864"]);
        job.write(reader.file, &whole);
        // The shard itself.
        for target in ["/dev/zero", "/", "nowhere"] {
            let job = sharded();
            job.link("shard", target).run(reader.command).refused("shard", &[]);
        }
        for bytes in [&b""[..], &[0xff; 4096], b"version https://git-lfs.github.com/spec/v1\n"] {
            job.write("shard", bytes).run(reader.command).refused("shard", &["not a valid safetensors file"]);
        }
    }
}

/// As long as an index may be, of as many tensors as there is room for.
#[test]
fn a_long_index_takes_no_more_memory_than_it_is_worth() {
    let mut long = String::from(r#"{"weight_map":{"#);
    for tensor in 0..4_000_000 {
        long.push_str(&format!(r#""{tensor:x}":"s","#));
    }
    let end = r#""z":"s"}}"#;
    assert!(long.len() + end.len() < 64 << 20);
    sharded().write(SHARDED[0].file, long + end).refused(SHARDED[0], &["the file s, which is not there"]);
}

#[test]
fn a_cache_of_models_leads_nowhere_else() {
    for (main, part) in [
        (&b"../../../etc"[..], "refs/main"),
        (b"/etc", "refs/main"),
        (b"", "refs/main"),
        (b"0123", "refs/main"),
        (b"\xff", "not UTF-8"),
        (&[b'a'; 5000], "size of the file"),
    ] {
        let job = Job::new();
        for folder in ["refs", "snapshots/none"] {
            fs::create_dir_all(job.path(folder)).unwrap();
        }
        fs::remove_file(job.path("config.json")).unwrap();
        job.write("refs/main", main);
        for command in [LAYER, "generate", "eval", "info"] {
            job.run(command).refused("", &[part]);
        }
        job.link("refs/main", "/dev/zero").run(LAYER).refused("main", &["is not a regular file"]);
    }
}

#[test]
fn factors_of_fp8_weights_are_checked() {
    let of = |factors: &[String], data: usize| {
        let job = Job::new();
        let config: Value = json!({
            "hidden_size": 256, "num_attention_heads": 1, "kv_lora_rank": 1, "qk_nope_head_dim": 1, "qk_rope_head_dim": 0,
            "v_head_dim": 1,
        });
        job.write("config.json", config.to_string());
        let mut entries = factors.to_vec();
        entries.push(tensor(
            "layers.0.kv_a_proj_with_mqa.weight",
            "F8_E4M3",
            "[1,256]",
            &format!("[{data},{}]", data + 256),
        ));
        entries.push(tensor(
            "layers.0.q_proj.weight",
            "F8_E4M3",
            "[1,256]",
            &format!("[{},{}]", data + 256, data + 512),
        ));
        job.write("model.safetensors", tensors(&format!("{{{}}}", entries.join(",")), data + 512));
        job
    };
    let name = "layers.0.q_proj.weight_scale_inv";
    let reader = reader(LAYER, "model.safetensors");
    of(&[], 0).refused(reader, &[name, "is missing", "[1, 2]"]);
    of(&[tensor(name, "F32", "[2,1]", "[0,8]")], 8).refused(reader, &[name, "[2, 1]", "[1, 2]"]);
    of(&[tensor(name, "F32", "[0,9]", "[0,0]")], 0).refused(reader, &[name, "[0, 9]", "[1, 2]"]);
    of(&[tensor(name, "I32", "[1,2]", "[0,8]")], 8).refused(reader, &[name, "element type I32"]);
    let job = of(&[tensor(name, "F32", "[1,2]", "[0,8]")], 8);
    for block in ["[0, 1]", "[-1, 1]", "[4294967296, 1]", "1", "[]", "{}"] {
        let config = String::from_utf8(job.read("config.json")).unwrap();
        let with = format!(r#"{{"quantization_config":{{"weight_block_size":{block}}},{}"#, &config[1..]);
        job.write("config.json", with);
        job.run(LAYER).refused("config.json", &["quantization_config.weight_block_size"]);
        job.write("config.json", config);
    }
}

#[test]
fn gguf_files_are_checked_as_folders_are() {
    let seeds = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds/gguf"));
    let whole = fs::read(seeds.join("llama_gpt2")).unwrap();
    let layer = fs::read(seeds.join("deepseek2")).unwrap();
    let readers = ["generate", "eval", "info", "attend"].map(|command| reader(command, "m.gguf"));
    let run = |job: &Job, command: &str| {
        let mut arguments: Vec<OsString> = vec![command.into(), "--model".into(), job.path("m.gguf").into()];
        match command {
            "generate" => arguments.extend(["--prompt", "a", "--max-new-tokens", "1"].map(OsString::from)),
            "eval" => arguments.extend(["--text".into(), job.path("text").into()]),
            "attend" => {
                let (input, output) = (job.path("x.safetensors"), job.path("y"));
                arguments.extend(["--layer".into(), "1".into(), "--input".into(), input.into()]);
                arguments.extend(["--output".into(), output.into()]);
            }
            _ => {}
        }
        if command != "info" {
            arguments.extend(["--adapter".into(), "cpu".into()]);
        }
        egmla(&arguments)
    };
    for reader in readers {
        let job = Job::new();
        let whole = if reader.command == "attend" { &layer } else { &whole };
        // Two tokens of the layer's width.
        job.write("x.safetensors", tensors(&format!("{{{}}}", tensor("hidden_states", "F32", "[2,8]", "[0,64]")), 64));
        let with = |bytes: &[u8], parts: &[&str]| {
            job.write("m.gguf", bytes);
            run(&job, reader.command).refused(reader.file, parts);
        };
        job.write("text", "abab").write("m.gguf", whole);
        assert_eq!(run(&job, reader.command).code, Some(0), "{reader:?}");

        with(b"", &["not a valid GGUF file", "a file of 0 bytes"]);
        with(&[0xff; 4096], &["not GGUF"]);
        for length in [3, 20, 24, 100, 600, whole.len() - 1] {
            with(&whole[..length], &["not a valid GGUF file", &format!("file of {length}")]);
        }
        for (at, count) in [(8, "tensors"), (16, "keys")] {
            let mut bytes = whole.clone();
            bytes[at..at + 8].fill(0xff);
            with(&bytes, &[&format!("18446744073709551615 {count}")]);
        }
        with(&fs::read(seeds.join("split")).unwrap(), &["number 1 of 3", "llama-gguf-split --merge"]);
        with(&fs::read(seeds.join("metadata")).unwrap(), &["general.architecture"]);

        for (target, part) in [("nowhere", "No such file"), ("/dev/zero", "is not a regular file")] {
            job.link("m.gguf", target);
            run(&job, reader.command).refused(reader.file, &[part]);
        }
        assert!(Command::new("mkfifo").arg(job.path("pipe")).status().unwrap().success());
        job.link("m.gguf", "pipe");
        run(&job, reader.command).refused(reader.file, &["is not a regular file"]);

        // A terabyte that is not there, behind a text and a list that could reach into it.
        for value in [&[8, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0][..], &[9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0]] {
            let header = [&b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0a"[..], value];
            job.write("m.gguf", header.concat());
            fs::File::options().write(true).open(job.path("m.gguf")).unwrap().set_len(1 << 40).unwrap();
            run(&job, reader.command).refused(reader.file, &[]);
        }
    }
}

#[test]
fn wrong_types_are_named() {
    for reader in TENSORS {
        let job = Job::new();
        let bytes = job.read(reader.file);
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut text: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
        let name = if reader.file == "x.safetensors" { "hidden_states" } else { "kv_a_layernorm.weight" };
        let found = text.as_object_mut().unwrap().iter_mut().find(|(key, _)| key.ends_with(name)).unwrap().1;
        // As many bytes of another kind.
        found["dtype"] = match found["dtype"].as_str().unwrap() {
            "F32" => json!("I32"),
            _ => json!("I16"),
        };
        let mut changed = tensors(&text.to_string(), 0);
        changed.extend_from_slice(&bytes[header..]);
        job.write(reader.file, changed).refused(reader, &[name, "has element type I"]);
    }
}

#[test]
fn numbers_of_a_config_are_checked() {
    for reader in CONFIGS {
        let job = Job::new();
        let config: Value = serde_json::from_slice(&job.read(reader.file)).unwrap();
        let with = |key: &str, value: &str, parts: &[&str]| {
            let mut text = config.clone();
            text[key] = json!("HERE");
            let text = text.to_string().replace("\"HERE\"", value);
            job.write(reader.file, text).refused(reader, parts);
        };
        for key in ["hidden_size", "num_attention_heads", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim"] {
            for value in
                ["-1", "-9223372036854775808", "4294967296", "18446744073709551616", "1e300", "1.5", "\"8\"", "[]"]
            {
                with(key, value, &[key]);
            }
            for value in ["1e999", "-", "0x10"] {
                with(key, value, &["config is not valid"]);
            }
            // What Python's writer makes of them.
            for value in ["NaN", "Infinity", "-Infinity"] {
                with(key, value, &[key, value]);
            }
        }
        with("num_attention_heads", "4294967295", &["2^31"]);
        with("hidden_size", "4294967295", &["2^31"]);
        for value in ["0", "1", "-1", "1e400", "\"x\""] {
            with("rope_theta", value, &[]);
        }
        for factor in ["0", "-1", "1e-320", "1e308"] {
            with("rope_scaling", &format!(r#"{{"type":"linear","factor":{factor}}}"#), &["rope_scaling.factor"]);
        }
        let yarn = |rest: &str, key: &str| {
            let text = format!(r#"{{"type":"yarn","factor":4,"original_max_position_embeddings":64,{rest}}}"#);
            with("rope_scaling", &text, &[key]);
        };
        yarn(r#""mscale_all_dim":1e300"#, "mscale");
        yarn(r#""attention_factor":1e300"#, "attention_factor");
        yarn(r#""beta_slow":1e-320"#, "beta_slow");
        with("rope_scaling", &r#"{"a":"#.repeat(1 << 18), &["config is not valid"]);
        with("hidden_act", &"[".repeat(1 << 18), &["config is not valid"]);
        // Twice, the second time right.
        let twice = format!(r#"{{"hidden_size":1,{}"#, config.to_string().trim_start_matches('{'));
        job.write(reader.file, twice).refused(reader, &["`hidden_size` is given twice"]);
        let large = format!("{}{}", " ".repeat(4 << 20), config);
        job.write(reader.file, large).refused(reader, &["size of the file", "4194304"]);
    }
}

#[test]
fn info_counts_the_cache_of_any_config() {
    let job = Job::new();
    let mut config: Value = serde_json::from_slice(&job.read("config.json")).unwrap();
    let sizes = [
        ("num_hidden_layers", json!(u32::MAX)),
        ("num_attention_heads", json!(1 << 28)),
        ("hidden_size", json!(1)),
        ("kv_lora_rank", json!(1)),
        ("qk_nope_head_dim", json!(3)),
        ("qk_rope_head_dim", json!(0)),
        ("v_head_dim", json!(4)),
        ("embedding_gate", Value::Null),
    ];
    sizes.into_iter().for_each(|(key, value)| config[key] = value);
    job.write("config.json", config.to_string());
    let finished = job.run("info");
    assert_eq!(finished.code, Some(0), "{finished:?}");
    // 7 · 2^28 elements of 2^32 - 1 layers, and their bytes, which fit no number.
    for part in ["8070450530368880640", "18446744073709551615"] {
        assert!(finished.stdout.contains(part), "{part} is not in {finished:?}");
    }
    // With a gate the table has MLA of four times the latent's width, whose elements fit no number: as many as a number holds.
    for (key, value) in [
        ("num_attention_heads", 1),
        ("qk_nope_head_dim", 0),
        ("v_head_dim", 1),
        ("kv_lora_rank", (1 << 30) - 1),
        ("qk_rope_head_dim", (1 << 30) - 2),
    ] {
        config[key] = json!(value);
    }
    config["embedding_gate"] = json!({ "vocab_size": config["vocab_size"], "embed_dim": 1, "site": "latent" });
    job.write("config.json", config.to_string());
    let finished = job.run("info");
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let mla = finished.stdout.lines().find(|line| line.contains("MLA r=4294967292"));
    assert!(mla.is_some_and(|line| line.contains("18446744073709551615")), "{finished:?}");
}

/// Five megabytes of files that ask for eighty gigabytes of keys and values.
#[test]
fn computing_that_takes_too_much_memory_is_refused() {
    const TOKENS: usize = 20_000;
    const WIDTH: usize = 500_000;
    let config = json!({
        "hidden_size": 1, "num_attention_heads": 1, "kv_lora_rank": 1, "q_lora_rank": null,
        "qk_nope_head_dim": 1, "qk_rope_head_dim": 0, "v_head_dim": WIDTH,
    });
    let file = |shapes: &[(&str, [usize; 2])]| {
        let mut end = 0;
        let entries: Vec<_> = shapes
            .iter()
            .map(|&(name, shape)| {
                let begin = end;
                end += 4 * shape[0] * shape[1];
                tensor(name, "F32", &format!("{shape:?}"), &format!("[{begin},{end}]"))
            })
            .collect();
        tensors(&format!("{{{}}}", entries.join(",")), end)
    };
    let job = Job::new();
    job.write("c.json", config.to_string());
    job.write(
        "w.safetensors",
        file(&[
            ("q_proj.weight", [1, 1]),
            ("kv_a_proj_with_mqa.weight", [1, 1]),
            ("kv_b_proj.weight", [WIDTH + 1, 1]),
            ("o_proj.weight", [1, WIDTH]),
        ]),
    );
    job.write("x.safetensors", file(&[("hidden_states", [TOKENS, 1])]));
    job.run("attend").refused("an input of 20000 tokens", &["bytes on the CPU, at most 8589934592"]);
    assert!(!job.path("y").exists());
    // As much as may be taken, where it cannot be had: this run's address space has two gibibytes.
    job.write("x.safetensors", file(&[("hidden_states", [300, 1])]));
    job.run("attend").refused("an input of 300 tokens", &["bytes on the CPU, which cannot be had"]);
    // And a few tokens are computed.
    job.write("x.safetensors", file(&[("hidden_states", [3, 1])]));
    assert_eq!(job.run("attend").code, Some(0));
    assert!(job.path("y").exists());
}

#[test]
fn tokenizers_are_refused_or_read() {
    for reader in TOKENIZERS {
        for text in ["{", "[]", "{}", "null", &"[".repeat(1 << 20), &r#"{"a":"#.repeat(1 << 20)] {
            Job::new().write(reader.file, text).refused(reader, &["tokenizer: "]);
        }
    }
}

#[test]
fn paths_need_not_be_text_and_are_shown_on_one_line() {
    for name in [&b"\xff\xfe"[..], b"a\nb", b"\x1b[31m", b"-", b"--x"] {
        let job = Job::new();
        let name = OsStr::from_bytes(name);
        let folder = job.path(name);
        // Read where it is right.
        fs::create_dir(&folder).unwrap();
        for file in ["config.json", "model.safetensors", "tokenizer.json"] {
            fs::rename(job.path(file), folder.join(file)).unwrap();
        }
        let arguments = ["eval", "--adapter", "cpu", "--model"].map(OsString::from).to_vec();
        let arguments = [arguments, vec![folder.clone().into(), "--text".into(), job.path("text").into()]].concat();
        assert_eq!(egmla(&arguments).code, Some(0), "{name:?}");
        // One line where it is not, without what would drive a terminal.
        fs::write(folder.join("config.json"), "{").unwrap();
        let finished = egmla(&arguments);
        finished.refused("config.json", &["config is not valid"]);
        assert!(!finished.stderr.contains('\u{1b}'), "{finished:?}");
    }
}

#[test]
fn weights_that_are_not_finite_are_warned_of_and_their_results_are_theirs() {
    let job = Job::new();
    let mut bytes = job.read("w.safetensors");
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    job.write("w.safetensors", bytes);
    let finished = job.run("attend");
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let warning = finished.stderr.lines().find(|line| line.starts_with("warning: tensor `")).unwrap();
    assert!(warning.contains("holds 1 NaN or infinite values of"), "{warning}");
}

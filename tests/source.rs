//! What the sources must not hold: `unsafe` outside of the modules that vouch for it; in shaders, variables of functions
//! without an initial value, and a kernel whose header does not name its floor, its results and its static figures.
//!
//! `EGMLA_BLESS=1 cargo test --test source` brings the static figures up to date with `tests/verified/radv.json`.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// The modules, one of the library and one of the program, and how often each says the word.
const VOUCHED: [(&str, usize); 2] = [("cli/src/unchecked.rs", 2), ("src/vouched.rs", 1)];

/// Rust files below a folder, without what is built.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "target") {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Lines that use `word` as a word of its own, outside of comments.
fn uses<'a>(text: &'a str, word: &str) -> Vec<&'a str> {
    let of_name = |c: char| c.is_alphanumeric() || c == '_';
    let code = |line: &'a str| line.split("//").next().unwrap_or_default();
    text.lines().filter(|line| code(line).split(|c| !of_name(c)).any(|found| found == word)).collect()
}

#[test]
fn unsafe_stands_in_two_modules() {
    // This file says the word, too.
    let word = ["un", "safe"].concat();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "cli", "tests", "examples", "benches", "fuzz"] {
        sources(&root.join(folder), &mut files);
    }
    assert!(files.len() > 100, "{files:?}");
    let mut vouched = Vec::new();
    for path in files {
        let name = path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/");
        let text = fs::read_to_string(&path).unwrap();
        let found = uses(&text, &word);
        if let Some((module, _)) = VOUCHED.into_iter().find(|(module, _)| *module == name) {
            vouched.push((module, found.len()));
            // Every one with its argument above it.
            assert_eq!(text.matches("// SAFETY: ").count(), found.len(), "{name}");
        } else {
            assert!(found.is_empty(), "{name}: {found:?}; it belongs behind a safe function of {VOUCHED:?}");
        }
    }
    vouched.sort();
    assert_eq!(vouched, VOUCHED);
    let library = fs::read_to_string(root.join("src/lib.rs")).unwrap();
    assert!(library.lines().any(|line| line == format!("#![deny({word}_code)]")), "the library denies it elsewhere");
}

#[test]
fn words_are_found_in_code_and_not_in_comments() {
    assert_eq!(uses("a { b }\n// b\nb_c\n  (b) // c", "b"), ["a { b }", "  (b) // c"]);
}

/// Variables of functions that a shader declares without an initial value. WGSL makes them 0 whenever the declaration is
/// reached, but in Chromium 156 on SwiftShader one within a loop kept what the turn before had left in it.
fn uninitialised(text: &str) -> Vec<&str> {
    let of_function = |line: &&str| line.starts_with(' ') && line.trim_start().starts_with("var ");
    text.lines().filter(of_function).filter(|line| !line.contains('=')).collect()
}

fn header(text: &str) -> Vec<&str> {
    text.lines().take_while(|line| line.starts_with("//")).collect()
}

/// Whether the header of a shader says what bounds its time from below.
fn names_floor(text: &str) -> bool {
    header(text).iter().any(|line| line.split(' ').any(|word| word.starts_with("Floor")))
}

/// Whether it says what was measured, if only that nothing was.
fn names_results(text: &str) -> bool {
    let header = header(text).join(" ").replace("// ", "");
    ["Results", "on a GPU", "On a GPU", "10d32d5"].iter().any(|words| header.contains(words))
}

/// Twins of 8 × 8 say what differs from their other text; rooflines measure floors.
fn is_of_its_own(name: &str) -> bool {
    !name.ends_with("_8") && !name.starts_with("roofline")
}

#[test]
fn shaders_name_their_floor_and_results_and_initialise_their_variables() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let (mut declared, mut floors) = (0, 0);
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let found = uninitialised(&text);
        assert!(found.is_empty(), "{}: {found:?}", path.display());
        let name = path.file_stem().unwrap().to_string_lossy();
        if is_of_its_own(&name) {
            assert!(names_floor(&text), "{name}: the header names no floor: bytes, operations, or the dispatch");
            assert!(names_results(&text), "{name}: the header names no results, nor that there are none on a GPU");
            floors += 1;
        }
        declared += text.lines().filter(|line| line.trim_start().starts_with("var ")).count();
    }
    assert!(declared > 100 && floors > 30, "{declared} {floors}");
    let planted =
        "fn f() {\n    for (var i = 0u; i < 2u; i++) {\n        var s: array<f32, 2>;\n        var t = 0.0;\n    }\n}";
    assert_eq!(uninitialised(planted), ["        var s: array<f32, 2>;"]);
    assert!(!names_floor("// y = x\nconst Floor = 1;") && names_floor("// y = x\n// Floor: 8 bytes per element"));
    assert!(!names_results("// y = x\nconst Results = 1;") && names_results("// y = x. Not run on a\n// GPU yet."));
}

/// What AMD's compiler makes of a shader, of all its settings the most.
fn static_line(figures: &Value) -> String {
    let of = |name: &str| figures[name].as_u64().unwrap();
    let memory = match of("lds") {
        0 => "no workgroup memory".to_owned(),
        bytes if bytes < 1000 => format!("{bytes} bytes of workgroup memory"),
        bytes => format!("{} {:03} bytes of workgroup memory", bytes / 1000, bytes % 1000),
    };
    // A shader that spills fails where the figures are made.
    format!("// Static (RDNA3, Mesa 25), at most: {} registers, {memory}, nothing spilled.", of("vgprs"))
}

#[test]
fn headers_have_the_static_figures_of_the_record() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let record: Value = serde_json::from_slice(&fs::read(root.join("tests/verified/radv.json")).unwrap()).unwrap();
    assert!(record["version"].as_str().unwrap().starts_with("Mesa 25."), "headers name the version");
    let figures = record["figures"]["RDNA3"].as_object().unwrap();
    let mut named = 0;
    for entry in fs::read_dir(root.join("shaders")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if !is_of_its_own(&name) {
            continue;
        }
        let line = static_line(figures.get(&name).unwrap_or_else(|| panic!("{name}: not in the record")));
        let text = fs::read_to_string(&path).unwrap();
        let found: Vec<_> = header(&text).into_iter().filter(|line| line.starts_with("// Static ")).collect();
        if std::env::var_os("EGMLA_BLESS").is_some() && found.len() == 1 {
            fs::write(&path, text.replacen(found[0], &line, 1)).unwrap();
        } else {
            assert_eq!(found, [line.as_str()], "{name}");
        }
        named += 1;
    }
    assert!(named > 30, "{named}");
}

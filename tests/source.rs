//! What the sources must not hold: `unsafe` outside of the one module that vouches for it.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};

/// The module, and how often it says the word.
const VOUCHED: (&str, usize) = ("cli/src/unchecked.rs", 2);

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
fn unsafe_stands_in_one_module() {
    // This file says the word, too.
    let word = ["un", "safe"].concat();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "cli", "tests", "examples", "benches", "fuzz"] {
        sources(&root.join(folder), &mut files);
    }
    assert!(files.len() > 100, "{files:?}");
    let mut vouched = 0;
    for path in files {
        let name = path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/");
        let text = fs::read_to_string(&path).unwrap();
        let found = uses(&text, &word);
        if name == VOUCHED.0 {
            vouched = found.len();
            // Every one with its argument above it.
            assert_eq!(text.matches("// SAFETY: ").count(), vouched, "{name}");
        } else {
            assert!(found.is_empty(), "{name}: {found:?}; it belongs behind a safe function of {}", VOUCHED.0);
        }
    }
    assert_eq!(vouched, VOUCHED.1, "{}", VOUCHED.0);
    let library = fs::read_to_string(root.join("src/lib.rs")).unwrap();
    assert!(library.lines().any(|line| line == format!("#![forbid({word}_code)]")), "the library forbids it");
}

#[test]
fn words_are_found_in_code_and_not_in_comments() {
    assert_eq!(uses("a { b }\n// b\nb_c\n  (b) // c", "b"), ["a { b }", "  (b) // c"]);
}

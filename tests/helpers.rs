//! Functions and structs that several shaders repeat are one text each, without a GPU.
//!
//! `EGMLA_BLESS=<stem of a shader> cargo test --test helpers` rewrites the copies of that shader's helpers in all others.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod shaders;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use egmla::low_level::kernels::shaders;
use shaders::path;

/// A top-level function or struct, but for the entry and `Params`, which are each shader's own.
struct Helper {
    name: String,
    /// Its lines and those of the comment above it.
    lines: Range<usize>,
    text: String,
}

impl Helper {
    /// Its code alone, under no name, whatever the side of its matrices.
    fn code(&self) -> String {
        let lines = self.text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let code = lines.collect::<Vec<_>>().join("\n");
        code.replacen(&self.name, "_", 1).replace("16x16", "8x8")
    }
}

fn helpers(source: &str) -> Vec<Helper> {
    let lines: Vec<&str> = source.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let Some(rest) = line.strip_prefix("fn ").or_else(|| line.strip_prefix("struct ")) else { continue };
        let name = rest.split(['(', ' ']).next().unwrap();
        if ["main", "Params"].contains(&name) {
            continue;
        }
        let end = start + lines[start..].iter().position(|line| *line == "}").unwrap();
        let comments = lines[..start].iter().rev().take_while(|line| line.starts_with("//")).count();
        let lines_of = start - comments..end + 1;
        found.push(Helper { name: name.to_owned(), text: lines[lines_of.clone()].join("\n"), lines: lines_of });
    }
    found
}

/// `alias` lines of a shader: each name, and the type that it stands for.
fn aliases(source: &str) -> Vec<(&str, &str)> {
    let lines = source.lines().filter_map(|line| line.strip_prefix("alias ")?.split(';').next());
    lines.map(|line| line.split_once(" = ").unwrap()).collect()
}

type Sources = BTreeMap<String, String>;

fn sources() -> Sources {
    shaders().map(|spec| (spec.name.to_owned(), spec.source.to_owned())).collect()
}

/// A shader with the helpers that it shares with another as they are there.
fn blessed(source: &str, from: &str) -> String {
    let mut lines: Vec<&str> = source.lines().collect();
    let canonical = helpers(from);
    for helper in helpers(source).into_iter().rev() {
        if let Some(text) = canonical.iter().find(|other| other.name == helper.name) {
            lines.splice(helper.lines, text.text.lines());
        }
    }
    lines.join("\n") + "\n"
}

/// Helpers of one name that are not one text, and of two names that are one.
fn differences(sources: &Sources) -> Vec<String> {
    let mut texts: BTreeMap<String, (&str, String)> = BTreeMap::new();
    let mut names: BTreeMap<String, (&str, String)> = BTreeMap::new();
    let mut differences = Vec::new();
    for (shader, source) in sources {
        for helper in helpers(source) {
            let (first, known) = names.entry(helper.code()).or_insert((shader, helper.name.clone()));
            if *known != helper.name {
                differences.push(format!("`{known}` of {first} is `{}` of {shader}: one name is enough", helper.name));
            }
            let (first, text) = texts.entry(helper.name.clone()).or_insert((shader, helper.text.clone()));
            if *text != helper.text {
                differences.push(format!(
                    "`{}` differs between {first} and {shader}. Where only a type differs, name it by `alias`; else \
                     `EGMLA_BLESS={first} cargo test --test helpers`, or {shader} for {first}, rewrites the copies in all \
                     other shaders from the one that is named",
                    helper.name
                ));
            }
        }
    }
    differences
}

#[test]
fn helpers_of_one_name_are_one_text() {
    let mut sources = sources();
    if let Ok(from) = std::env::var("EGMLA_BLESS") {
        let canonical = sources.get(&from).unwrap_or_else(|| panic!("EGMLA_BLESS={from}: no such shader")).clone();
        for (shader, source) in &mut sources {
            let new = blessed(source, &canonical);
            if new != *source {
                std::fs::write(path(&format!("shaders/{shader}.wgsl")), &new).unwrap();
                *source = new;
            }
        }
    }
    assert_eq!(differences(&sources), Vec::<String>::new());
    let shared = sources.values().filter(|source| helpers(source).iter().any(|helper| helper.name == "decode"));
    assert!(shared.count() > 1, "no shared helper was found");
}

#[test]
fn a_changed_copy_is_seen_and_blessed() {
    let right = sources();
    let mut wrong = right.clone();
    wrong.insert("gather".to_owned(), right["gather"].replace("-> f32 {", "-> f32 {\n    // A fault."));
    assert!(!differences(&wrong).is_empty());
    assert_eq!(blessed(&wrong["gather"], &right["gather"]), right["gather"]);

    let mut renamed = right.clone();
    renamed.insert("gather".to_owned(), right["gather"].replace("index_of(", "index_at("));
    assert!(!differences(&renamed).is_empty(), "the same body under a second name");
}

/// An alias is there for a type that differs between shaders, and then the type is spelled out nowhere else.
#[test]
fn aliases_name_the_types_that_differ() {
    let sources = sources();
    let mut types: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (shader, source) in &sources {
        for (name, of) in aliases(source) {
            types.entry(name).or_default().insert(of);
            assert_eq!(source.matches(of).count(), 1, "{shader}: {of} is {name}");
            assert!(source.matches(name).count() > 1, "{shader}: {name} is not used");
        }
    }
    for (name, of) in types {
        assert!(of.len() > 1, "{name} is {of:?} wherever it is: no alias is needed");
    }
}

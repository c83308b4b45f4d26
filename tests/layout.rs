//! Shaders and host modules held against each other, without a GPU: naga reads what wgpu will run.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod shaders;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use egmla::low_level::Access;
use egmla::low_level::kernels::{REGISTRY, attention_prefill, cache_read, shaders};
use shaders::{parse, path, read, webgpu_limits};

/// Stems of the files of a folder that end in `.extension`.
fn stems(folder: &str, extension: &str) -> BTreeSet<String> {
    std::fs::read_dir(path(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|file| file.extension().is_some_and(|found| found == extension))
        .map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect()
}

#[test]
fn registry_names_every_file_and_every_file_is_in_the_registry() {
    let operations: Vec<_> = REGISTRY.iter().map(|operation| operation.name()).collect();
    assert!(operations.is_sorted_by(|a, b| a < b), "the registry is sorted, without doubles: {operations:?}");
    let operations: BTreeSet<String> = operations.into_iter().map(str::to_owned).collect();
    let names: Vec<_> = shaders().map(|spec| spec.name.to_owned()).collect();
    let registered: BTreeSet<String> = names.iter().cloned().collect();
    assert_eq!(registered.len(), names.len(), "a shader is listed twice: {names:?}");
    assert_eq!(stems("shaders", "wgsl"), registered);
    // A host module, a reference and a file of cases for each operation, and nothing else.
    for (folder, others) in [
        ("src/kernels", &["mod"][..]),
        ("src/reference", &["mod", "layer"]),
        ("src/check/cases", &["mod", "batch", "extreme", "grouped_batch"]),
    ] {
        let others = others.iter().map(|&other| other.to_owned());
        assert_eq!(stems(folder, "rs"), operations.iter().cloned().chain(others).collect(), "{folder}");
    }
    for spec in shaders() {
        assert_eq!(spec.source, read(&format!("shaders/{}.wgsl", spec.name)), "{}", spec.name);
        let (module, _) = parse(spec);
        let entries: Vec<_> = module.entry_points.iter().map(|entry| (entry.stage, entry.name.as_str())).collect();
        assert_eq!(entries, [(naga::ShaderStage::Compute, "main")], "{}", spec.name);
    }
}

#[test]
fn bindings_are_those_of_the_shader() {
    for (operation, spec) in
        REGISTRY.iter().flat_map(|operation| operation.shaders().into_iter().map(move |spec| (operation, spec)))
    {
        let (module, _) = parse(spec);
        let mut found: Vec<(u32, String, Option<Access>)> = Vec::new();
        for (_, variable) in module.global_variables.iter() {
            let Some(binding) = &variable.binding else { continue };
            assert_eq!(binding.group, 0, "{}", spec.name);
            let access = match variable.space {
                naga::AddressSpace::Uniform => None,
                naga::AddressSpace::Storage { access } if access == naga::StorageAccess::LOAD => Some(Access::Read),
                naga::AddressSpace::Storage { .. } => Some(Access::Write),
                other => panic!("{}: a binding in {other:?}", spec.name),
            };
            found.push((binding.binding, variable.name.clone().unwrap(), access));
        }
        found.sort_by_key(|(number, ..)| *number);
        // Params, then what is read, then what is written.
        let params = (0, "params".to_owned(), None);
        let storage = (1..).zip(operation.bindings());
        let storage = storage.map(|(number, binding)| (number, binding.name.to_owned(), Some(binding.access)));
        assert_eq!(found, std::iter::once(params).chain(storage).collect::<Vec<_>>(), "{}", spec.name);
        let order: Vec<_> = operation.bindings().iter().map(|binding| binding.access as u32).collect();
        assert!(order.is_sorted() && order.contains(&(Access::Write as u32)), "{}: {order:?}", spec.name);
        let storage = order.len();
        assert!(storage <= webgpu_limits().max_storage_buffers_per_shader_stage as usize, "{}: {storage}", spec.name);
        assert!(storage <= 8, "{}: {storage} storage buffers", spec.name);
    }
}

#[test]
fn params_have_the_layout_that_naga_computes() {
    for (operation, spec) in
        REGISTRY.iter().flat_map(|operation| operation.shaders().into_iter().map(move |spec| (operation, spec)))
    {
        let (module, _) = parse(spec);
        let (_, variable) = module
            .global_variables
            .iter()
            .find(|(_, variable)| variable.space == naga::AddressSpace::Uniform)
            .unwrap_or_else(|| panic!("{}: no uniform", spec.name));
        let naga::TypeInner::Struct { members, span } = &module.types[variable.ty].inner else {
            panic!("{}: params is not a struct", spec.name);
        };
        let found: Vec<_> = members
            .iter()
            .enumerate()
            .map(|(index, member)| {
                assert_eq!(member.offset as usize, 4 * index, "{}: {:?}", spec.name, member.name);
                let kind = match module.types[member.ty].inner {
                    naga::TypeInner::Scalar(naga::Scalar::U32) => "u32",
                    naga::TypeInner::Scalar(naga::Scalar::F32) => "f32",
                    ref other => panic!("{}: {:?} is {other:?}", spec.name, member.name),
                };
                (member.name.as_deref().unwrap(), kind)
            })
            .collect();
        assert_eq!(found, operation.params(), "{}", spec.name);
        assert_eq!(4 * found.len(), *span as usize, "{}: no padding", spec.name);
    }
    // Lines of the tables are one vec4<u32>.
    assert_eq!(size_of::<cache_read::SequenceRow>(), 16);
    assert_eq!(size_of::<attention_prefill::QueryTile>(), 16);
}

/// Top-level functions other than the entry: name, and text with the comment above it.
fn functions(source: &str) -> Vec<(String, String)> {
    let lines: Vec<&str> = source.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let Some(rest) = line.strip_prefix("fn ") else { continue };
        let name = rest.split('(').next().unwrap();
        if name == "main" {
            continue;
        }
        let end = start + lines[start..].iter().position(|line| *line == "}").unwrap();
        let comments = lines[..start].iter().rev().take_while(|line| line.starts_with("//")).count();
        found.push((name.to_owned(), lines[start - comments..=end].join("\n")));
    }
    found
}

#[test]
fn functions_of_one_name_are_the_same_text() {
    let mut known: BTreeMap<String, (&str, String)> = BTreeMap::new();
    let mut shared = 0;
    for spec in shaders() {
        for (name, text) in functions(spec.source) {
            match known.get(&name) {
                None => {
                    known.insert(name, (spec.name, text));
                }
                Some((first, same)) => {
                    assert_eq!(&text, same, "`{name}` differs between {first} and {}", spec.name);
                    shared += 1;
                }
            }
        }
    }
    assert!(shared > 0 && known.contains_key("decode"), "no shared function was found: {known:?}");
}

/// The parts of a shader, in the order of `docs/kernels.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Header,
    Extension,
    Override,
    Constant,
    Params,
    Binding,
    Workgroup,
    Function,
    Entry,
}

#[test]
fn shaders_are_in_the_one_order() {
    for spec in shaders() {
        let name = spec.name;
        let mut at = Part::Header;
        let header: Vec<_> = spec.source.lines().take_while(|line| line.starts_with("//")).collect();
        assert!(header.len() >= 2, "{name}: no header");
        let grids = header.iter().filter(|line| line.starts_with("// grid: ")).count();
        assert_eq!(grids, 1, "{name}: the header has one line that begins with `// grid: `");
        assert!(spec.source.ends_with("}\n") && !spec.source.contains('\t') && !spec.source.contains('\r'), "{name}");
        for (number, line) in (1..).zip(spec.source.lines()) {
            let here = format!("{name}.wgsl:{number}: {line}");
            assert!(!line.trim_start().starts_with('#'), "{here}: a preprocessor?");
            assert!(!line.ends_with(' '), "{here}: trailing space");
            let part = if line.starts_with("enable ") {
                Part::Extension
            } else if line.starts_with("override ") {
                assert!(line.contains(" = "), "{here}: no default");
                Part::Override
            } else if line.starts_with("const ") {
                Part::Constant
            } else if line.starts_with("struct ") {
                // Any other is a helper's.
                if line == "struct Params {" { Part::Params } else { Part::Function }
            } else if line.starts_with("@group(0) @binding(") {
                let shape = line.split_once("; ").map_or("", |(_, comment)| comment.trim());
                let params = line.contains("var<uniform>");
                assert!(params || shape.strip_prefix("// ").is_some_and(|shape| !shape.is_empty()), "{here}: no shape");
                Part::Binding
            } else if let Some(declared) = line.strip_prefix("var<workgroup> ") {
                assert!(declared.starts_with("sh_"), "{here}: not named sh_");
                Part::Workgroup
            } else if line.starts_with("fn main(") || line.starts_with("@compute ") {
                Part::Entry
            } else if line.starts_with("fn ") {
                Part::Function
            } else {
                let inside = line.is_empty() || line.starts_with("//") || line.starts_with([' ', ')', '}']);
                assert!(inside, "{here}: what is this?");
                continue;
            };
            assert!(part >= at, "{here}: {part:?} after {at:?}");
            at = part;
        }
        assert_eq!(at, Part::Entry, "{name}");
    }
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let file = entry.unwrap().path();
        if file.is_dir() {
            rust_files(&file, files);
        } else if file.extension().is_some_and(|extension| extension == "rs") {
            files.push(file);
        }
    }
}

#[test]
fn the_library_owns_no_device() {
    let mut files = Vec::new();
    rust_files(&path("src"), &mut files);
    let outside = [path("src/check"), path("src/bench"), path("src/readback.rs")];
    files.retain(|file| !outside.iter().any(|folder| file.starts_with(folder)));
    assert!(files.len() > REGISTRY.len());
    // `.poll(` alone is a future's.
    let forbidden =
        [".submit(", "device.poll(", "device().poll(", "PollType", "map_async", "request_device", "request_adapter"];
    for file in files {
        let source = std::fs::read_to_string(&file).unwrap();
        for (number, line) in (1..).zip(source.lines()) {
            let code = line.split("//").next().unwrap();
            for word in forbidden {
                assert!(!code.contains(word), "{}:{number}: {word}", file.display());
            }
        }
    }
}

//! Shaders and host modules held against each other, without a GPU: naga reads what wgpu will run.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod shaders;

use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;
use std::path::{Path, PathBuf};

use egmla::low_level::Access;
use egmla::low_level::kernels::attention_decode::DecodeSequence;
use egmla::low_level::kernels::attention_grouped::{self, GroupChunk, GroupHeader, GroupedSequence};
use egmla::low_level::kernels::attention_prefill::QueryTile;
use egmla::low_level::kernels::cache_read::SequenceRow;
use egmla::low_level::kernels::{REGISTRY, shaders};
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
        ("src/reference", &["mod", "layer", "gqa"]),
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
}

/// A host table: its name, its bytes, and the name, offset and bytes of each field.
struct Table {
    name: &'static str,
    size: usize,
    fields: Vec<(&'static str, usize, usize)>,
}

fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// The table of a `repr(C)` struct; a field that is left out does not compile.
macro_rules! table {
    ($type:ident { $($field:ident),* $(,)? }) => {{
        let _ = |$type { $($field: _),* }: $type| {};
        Table {
            name: stringify!($type),
            size: size_of::<$type>(),
            fields: vec![$((
                stringify!($field),
                offset_of!($type, $field),
                size_of_field(|table: &$type| &table.$field),
            )),*],
        }
    }};
}

/// Tables with a binding of their own: a struct of the shader, one line after another.
fn bound_tables() -> [Table; 3] {
    [
        table!(SequenceRow { first_row, first_slot, length, token }),
        table!(DecodeSequence { first_row, first_slot, length, token, tokens, partial, splits, unused }),
        table!(QueryTile { first_token, count, position, sequence }),
    ]
}

/// Parts of `lists`, which is one binding of words: constants of the shader by their prefix.
fn word_tables() -> [(&'static str, Table); 3] {
    [
        ("HEADER", table!(GroupHeader { id, count, gate_row, tier_1, tier_2, positions })),
        ("CHUNK", table!(GroupChunk { group, first, unused, positions })),
        (
            "SEQUENCE",
            table!(GroupedSequence {
                first_entry,
                tiles,
                groups,
                base,
                first_slot,
                position,
                token,
                tokens,
                partial,
                tile_entries,
                first_group,
                chunks,
                chunk_word,
                chunk_entries,
                unused,
            }),
        ),
    ]
}

/// The bindings that hold tables of the host.
const TABLES: [&str; 3] = ["lists", "queries", "sequences"];

/// What a shader's structs say otherwise than the host's; `met` are the tables that it binds.
fn struct_differences(module: &naga::Module, met: &mut BTreeSet<&'static str>) -> Vec<String> {
    let mut differences = Vec::new();
    for (_, variable) in module.global_variables.iter() {
        let naga::AddressSpace::Storage { .. } = variable.space else { continue };
        let name = variable.name.as_deref().unwrap();
        let naga::TypeInner::Array { base, stride, .. } = module.types[variable.ty].inner else {
            differences.push(format!("{name} is no array"));
            continue;
        };
        let line = &module.types[base];
        let naga::TypeInner::Struct { members, span } = &line.inner else {
            if ["queries", "sequences"].contains(&name) {
                differences.push(format!("{name} is no array of structs"));
            }
            continue;
        };
        let tables = bound_tables();
        let Some(table) = tables.iter().find(|table| Some(table.name) == line.name.as_deref()) else {
            differences.push(format!("{name}: the host has no {:?}", line.name));
            continue;
        };
        met.insert(table.name);
        let found: Vec<_> = members
            .iter()
            .map(|member| {
                let size = module.types[member.ty].inner.size(module.to_ctx());
                (member.name.as_deref().unwrap(), member.offset as usize, size as usize)
            })
            .collect();
        if found != table.fields || [*span, stride] != [table.size as u32; 2] {
            differences.push(format!("{}: {found:?}, {span} bytes; the host has {:?}", table.name, table.fields));
        }
    }
    differences
}

/// What the host knows a constant of this name to be.
fn host_constants() -> BTreeMap<String, naga::Literal> {
    let mut known: BTreeMap<String, u32> = BTreeMap::new();
    for (prefix, table) in word_tables() {
        known.insert(format!("{prefix}_WORDS"), table.size as u32 / 4);
        for (field, offset, _) in table.fields {
            known.insert(format!("{prefix}_{}", field.to_uppercase()), offset as u32 / 4);
        }
    }
    for (name, value) in [
        ("INLINE_LENGTH", attention_grouped::INLINE_LENGTH),
        ("TIER_1_LENGTH", attention_grouped::TIER_1_LENGTH),
        ("TIER_2_LENGTH", attention_grouped::TIER_2_LENGTH),
        ("TILE_LENGTH", attention_grouped::TILE_LENGTH),
        ("CHUNK_LENGTH", attention_grouped::CHUNK_LENGTH),
        ("GROUPS", attention_grouped::SUBGROUP_GROUPS),
        ("NO_ROW", u32::MAX),
    ] {
        assert_eq!(known.insert(name.to_owned(), value), None, "{name} is a field and a length");
    }
    let known = known.into_iter().map(|(name, value)| (name, naga::Literal::U32(value)));
    known.chain([("LOWEST".to_owned(), naga::Literal::F32(f32::MIN))]).collect()
}

/// The constants of a shader, as naga evaluates them, that are not what the host knows; of a shader that reads `lists`, those
/// that the host does not know, too.
fn constant_differences(module: &naga::Module) -> Vec<String> {
    let known = host_constants();
    let reads_lists = module.global_variables.iter().any(|(_, variable)| variable.name.as_deref() == Some("lists"));
    let mut differences = Vec::new();
    for (_, constant) in module.constants.iter() {
        let Some(name) = constant.name.as_deref() else { continue };
        let value = &module.global_expressions[constant.init];
        match known.get(name) {
            Some(&host) if *value == naga::Expression::Literal(host) => {}
            Some(host) => differences.push(format!("{name} is {value:?}, the host has {host:?}")),
            None if reads_lists => differences.push(format!("{name}: the host has no constant of that name")),
            None => {}
        }
    }
    differences
}

#[test]
fn tables_have_the_layout_that_naga_computes() {
    let mut met = BTreeSet::new();
    let mut constants = BTreeSet::new();
    for spec in shaders() {
        let (module, _) = parse(spec);
        let differences = [struct_differences(&module, &mut met), constant_differences(&module)].concat();
        assert!(differences.is_empty(), "{}: {differences:?}", spec.name);
        let named = module.constants.iter().filter_map(|(_, constant)| constant.name.clone());
        let named: BTreeSet<_> = named.collect();
        let declared = spec.source.lines().filter_map(|line| line.strip_prefix("const ")?.split(':').next());
        assert_eq!(named, declared.map(str::to_owned).collect(), "{}: a constant that naga leaves out", spec.name);
        constants.extend(named);
    }
    assert_eq!(met, bound_tables().iter().map(|table| table.name).collect(), "a table that no shader binds");
    // One field of each table at least, and what no struct says.
    for name in ["HEADER_COUNT", "CHUNK_FIRST", "SEQUENCE_FIRST_GROUP", "TIER_1_LENGTH", "CHUNK_LENGTH", "NO_ROW"] {
        assert!(constants.contains(name), "{name}");
    }
}

/// The text of a shader with a fault in it.
fn planted(name: &str, old: &str, new: &str) -> naga::Module {
    let spec = shaders().find(|spec| spec.name == name).unwrap();
    assert_eq!(spec.source.matches(old).count(), 1, "{name}: {old}");
    naga::front::wgsl::parse_str(&spec.source.replace(old, new)).unwrap()
}

#[test]
fn a_swapped_field_is_seen() {
    let group_ids = planted("group_ids", "SEQUENCE_GROUPS: u32 = 2u", "SEQUENCE_GROUPS: u32 = 1u");
    assert_eq!(constant_differences(&group_ids).len(), 1);
    let unknown = planted("group_ids", "const NO_ROW", "const NONE: u32 = 1u;\nconst NO_ROW");
    assert_eq!(constant_differences(&unknown).len(), 1);
    for (name, line, swapped) in [
        ("cache_read", "    token: u32,        // first new token", "    first_token: u32,"),
        ("attention_prefill", "    count: u32,\n    position: u32,", "    position: u32,\n    count: u32,"),
        ("attention_decode", "    splits: u32,\n    unused: u32,", "    unused: u32,\n    splits: u32,"),
        ("attention_absorbed", "    unused: u32,\n", ""),
    ] {
        let module = planted(name, line, swapped);
        assert_eq!(struct_differences(&module, &mut BTreeSet::new()).len(), 1, "{name}: {line}");
    }
}

/// Bare numbers in the indices of tables, whether they stand in the brackets, in a `let` before them or in a call of the
/// function that has them: what is added, subtracted or multiplied there has a name.
fn bare_numbers(module: &naga::Module) -> Vec<String> {
    use naga::{Expression, Function, Handle, Statement};

    let functions: Vec<(Option<Handle<Function>>, &Function)> = module
        .functions
        .iter()
        .map(|(handle, function)| (Some(handle), function))
        .chain(module.entry_points.iter().map(|entry| (None, &entry.function)))
        .collect();
    let mut found = BTreeSet::new();
    // Arguments that are part of an index.
    let mut arguments: BTreeSet<(Handle<Function>, u32)> = BTreeSet::new();
    let mut look = |(handle, function): (Option<Handle<Function>>, &Function), index, arguments: &mut BTreeSet<_>| {
        let name = function.name.as_deref().unwrap_or("main");
        let mut terms = vec![(index, true)];
        while let Some((term, is_sum)) = terms.pop() {
            match function.expressions[term] {
                Expression::Binary { op: naga::BinaryOperator::Add | naga::BinaryOperator::Subtract, left, right }
                    if is_sum =>
                {
                    terms.extend([(left, true), (right, true)]);
                }
                Expression::Binary { op: naga::BinaryOperator::Multiply, left, right } if is_sum => {
                    terms.extend([(left, false), (right, false)]);
                }
                Expression::Literal(literal) => {
                    found.insert(format!("{name}: {literal:?}"));
                }
                Expression::FunctionArgument(argument) => {
                    arguments.extend(handle.map(|handle| (handle, argument)));
                }
                _ => {}
            }
        }
    };
    let is_table = |function: &Function, base: Handle<Expression>| {
        let Expression::GlobalVariable(variable) = function.expressions[base] else { return false };
        module.global_variables[variable].name.as_deref().is_some_and(|name| TABLES.contains(&name))
    };
    for &(handle, function) in &functions {
        for (_, expression) in function.expressions.iter() {
            match *expression {
                Expression::Access { base, index } if is_table(function, base) => {
                    look((handle, function), index, &mut arguments);
                }
                Expression::AccessIndex { base, index } if is_table(function, base) => {
                    return vec![format!("{:?}: [{index}]", function.name)];
                }
                _ => {}
            }
        }
    }
    // Calls of functions whose arguments are part of an index, until there is no further argument.
    loop {
        let before = arguments.len();
        for &(handle, function) in &functions {
            let mut blocks = vec![&function.body];
            while let Some(block) = blocks.pop() {
                for statement in block {
                    match statement {
                        Statement::Block(inner) => blocks.push(inner),
                        Statement::If { accept, reject, .. } => blocks.extend([accept, reject]),
                        Statement::Switch { cases, .. } => blocks.extend(cases.iter().map(|case| &case.body)),
                        Statement::Loop { body, continuing, .. } => blocks.extend([body, continuing]),
                        Statement::Call { function: called, arguments: given, .. } => {
                            for (number, &index) in (0..).zip(given) {
                                if arguments.contains(&(*called, number)) {
                                    look((handle, function), index, &mut arguments);
                                }
                            }
                        }
                        _ => {}
                    }
                }
            }
        }
        if arguments.len() == before {
            return found.into_iter().collect();
        }
    }
}

#[test]
fn indices_of_tables_have_no_bare_numbers() {
    let mut tables = BTreeSet::new();
    for spec in shaders() {
        let (module, _) = parse(spec);
        assert_eq!(bare_numbers(&module), Vec::<String>::new(), "{}: name them, as host_constants does", spec.name);
        let bound = module.global_variables.iter().filter_map(|(_, variable)| variable.name.clone());
        tables.extend(bound.filter(|name| TABLES.contains(&name.as_str())));
    }
    assert_eq!(tables.len(), TABLES.len(), "{tables:?}");
    for (name, old, new) in [
        ("group_ids", "lists[line + SEQUENCE_GROUPS]", "lists[line + 2u]"),
        ("group_ids", "lists[line + SEQUENCE_GROUPS]", "lists[2u]"),
        (
            "group_ids",
            "lists[line + SEQUENCE_BASE] + group * HEADER_WORDS;",
            "lists[line + SEQUENCE_BASE] + group * 8u;",
        ),
        ("group_ids", "line_of(SEQUENCE_FIRST_GROUP, number);", "line_of(10u, number);"),
        ("group_ids", "line_of(SEQUENCE_FIRST_GROUP, number);", "line_of(SEQUENCE_FIRST_GROUP, number) + 1u;"),
        ("cache_read", "sequences[middle].first_row", "sequences[2u * middle].first_row"),
        ("attention_grouped", "lists[chunk + CHUNK_POSITIONS + e]", "lists[chunk + 4u + e]"),
        ("attention_prefill", "sequences[tile.sequence]", "sequences[tile.sequence + 1u]"),
    ] {
        assert_ne!(bare_numbers(&planted(name, old, new)), Vec::<String>::new(), "{name}: {new}");
    }
}

/// The parts of a shader, in the order that the README's "Add a kernel" gives them.
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
            } else if line.starts_with("const ") || line.starts_with("alias ") {
                Part::Constant
            } else if line.starts_with("struct ") {
                // Those of tables stand before the bindings, those of helpers among the functions.
                if at <= Part::Params { Part::Params } else { Part::Function }
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

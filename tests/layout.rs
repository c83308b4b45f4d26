//! Shaders, host modules and plans held against each other, without a GPU: naga reads what wgpu will run.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod translation;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use egmla::Error;
use egmla::config::{Activation, GateNorm};
use egmla::kernel::{Access, KernelSpec};
use egmla::kernels::attention_decode::SPLIT;
use egmla::kernels::attention_grouped::{Tiling, Widths};
use egmla::kernels::matmul::Layout;
use egmla::kernels::{
    COOPERATIVE_FEATURES, Problem, REGISTRY, attention_absorbed, attention_absorbed_stream,
    attention_absorbed_subgroup, attention_decode, attention_decode_vec4, attention_grouped,
    attention_grouped_subgroup, attention_merge, attention_prefill, attention_prefill_cooperative,
    attention_prefill_cooperative_8, attention_prefill_rows, attention_prefill_subgroup, cache_append,
    cache_append_vec4, cache_copy, cache_read, gate, gate_rows, gate_statistics, gate_vec4, gather, group_ids, matmul,
    matmul_cooperative, matmul_cooperative_8, matmul_subgroup, matmul_vec4, matvec, matvec_subgroup, matvec_vec4, norm,
    norm_vec4, residual_add, roofline_cooperative, roofline_cooperative_8, roofline_copy, roofline_fma, rope, swiglu,
    word_scatter,
};
use egmla::plan::{AdapterClass, Cooperative, Plan, PlanContext, Storage, Tuning};
use egmla::wgpu::{CooperativeMatrixProperties, CooperativeScalarType, Features, Limits};
use naga::proc::Layouter;
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

const CLASSES: [AdapterClass; 4] = AdapterClass::ALL;

fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

fn read(relative: &str) -> String {
    std::fs::read_to_string(path(relative)).unwrap_or_else(|error| panic!("{relative}: {error}"))
}

/// Stems of the files of a folder that end in `.extension`.
fn stems(folder: &str, extension: &str) -> BTreeSet<String> {
    std::fs::read_dir(path(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|file| file.extension().is_some_and(|found| found == extension))
        .map(|file| file.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect()
}

fn webgpu_limits() -> Limits {
    Limits::default()
}

fn parse(spec: &KernelSpec) -> (naga::Module, ModuleInfo) {
    let module = naga::front::wgsl::parse_str(spec.source)
        .unwrap_or_else(|error| panic!("{}: {}", spec.name, error.emit_to_string(spec.source)));
    let info = validate(spec.name, &module);
    (module, info)
}

/// With no capability beyond those of every WebGPU device (packing and unpacking halves is the one that we use) and those
/// of the features that the kernel asks for. `kernel` begins with its name.
fn validate(kernel: &str, module: &naga::Module) -> ModuleInfo {
    let spec = REGISTRY.iter().find(|spec| kernel.split(' ').next() == Some(spec.name)).unwrap();
    validator(spec.features).validate(module).unwrap_or_else(|error| panic!("{kernel}: {error:?}"))
}

fn validator(features: Features) -> Validator {
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    for (feature, capability) in [
        (Features::SUBGROUP, Capabilities::SUBGROUP),
        (Features::SHADER_F16, Capabilities::SHADER_FLOAT16),
        (Features::EXPERIMENTAL_COOPERATIVE_MATRIX, Capabilities::COOPERATIVE_MATRIX),
    ] {
        capabilities.set(capability, features.contains(feature));
    }
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    validator
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all());
    validator
}

#[test]
fn registry_names_every_file_and_every_file_is_in_the_registry() {
    let names: Vec<_> = REGISTRY.iter().map(|spec| spec.name).collect();
    assert!(names.is_sorted_by(|a, b| a < b), "the registry is sorted, without doubles: {names:?}");
    let registered: BTreeSet<String> = names.iter().map(|&name| name.to_owned()).collect();
    assert_eq!(stems("shaders", "wgsl"), registered);
    let mut modules = stems("src/kernels", "rs");
    assert!(modules.remove("mod"));
    assert_eq!(modules, registered);
    let references = stems("src/reference", "rs");
    for spec in REGISTRY {
        assert!(references.contains(spec.name), "src/reference/{}.rs is missing", spec.name);
        assert_eq!(spec.source, read(&format!("shaders/{}.wgsl", spec.name)), "{}", spec.name);
        let (module, _) = parse(spec);
        let entries: Vec<_> = module.entry_points.iter().map(|entry| (entry.stage, entry.name.as_str())).collect();
        assert_eq!(entries, [(naga::ShaderStage::Compute, "main")], "{}", spec.name);
    }
}

#[test]
fn bindings_are_those_of_the_shader() {
    for spec in REGISTRY {
        let (module, _) = parse(spec);
        let mut found: Vec<(u32, String, Access)> = Vec::new();
        for (_, variable) in module.global_variables.iter() {
            let Some(binding) = &variable.binding else { continue };
            assert_eq!(binding.group, 0, "{}", spec.name);
            let access = match variable.space {
                naga::AddressSpace::Uniform => Access::Params,
                naga::AddressSpace::Storage { access } if access == naga::StorageAccess::LOAD => Access::Read,
                naga::AddressSpace::Storage { .. } => Access::ReadWrite,
                other => panic!("{}: a binding in {other:?}", spec.name),
            };
            found.push((binding.binding, variable.name.clone().unwrap(), access));
        }
        found.sort_by_key(|(number, ..)| *number);
        let expected: Vec<_> =
            (0..).zip(spec.bindings).map(|(number, given)| (number, given.name.to_owned(), given.access)).collect();
        assert_eq!(found, expected, "{}", spec.name);

        // Params, then what is read, then what is written.
        let order: Vec<_> = spec.bindings.iter().map(|binding| binding.access as u32).collect();
        assert!(order.is_sorted(), "{}: {:?}", spec.name, spec.bindings);
        let params = spec.bindings.iter().filter(|binding| binding.access == Access::Params).count();
        let written = spec.bindings.iter().filter(|binding| binding.access == Access::ReadWrite).count();
        assert!(params == 1 && written >= 1, "{}", spec.name);
        let storage = spec.bindings.len() - params;
        assert!(storage <= webgpu_limits().max_storage_buffers_per_shader_stage as usize, "{}: {storage}", spec.name);
        assert!(storage <= 8, "{}: {storage} storage buffers", spec.name);
    }
}

/// Fields of `#[repr(C)] pub struct Params` in a kernel's source: name and type.
fn rust_params(kernel: &str) -> Vec<(String, String)> {
    // The modules that take another's.
    let file = match kernel {
        _ if kernel.starts_with("attention_prefill_") => "attention_prefill",
        _ if kernel.starts_with("roofline_cooperative") => "roofline_cooperative",
        "attention_decode_vec4" => "attention_decode",
        "cache_append_vec4" => "cache_append",
        "gate_vec4" => "gate",
        "norm_vec4" => "norm",
        _ if kernel.starts_with("attention_absorbed_") => "attention_absorbed",
        _ if kernel.starts_with("matmul_") || kernel.starts_with("matvec") => "matmul",
        other => other,
    };
    let source = read(&format!("src/kernels/{file}.rs"));
    let (before, after) = source.split_once("pub struct Params {").unwrap_or_else(|| panic!("{file}.rs: no Params"));
    assert!(before.rsplit("\n\n").next().unwrap().contains("#[repr(C)]"), "{file}.rs: Params is not repr(C)");
    let (body, _) = after.split_once("\n}").unwrap();
    body.lines()
        .map(|line| line.split("//").next().unwrap().trim().trim_end_matches(','))
        .filter(|line| !line.is_empty())
        .map(|line| {
            let (name, kind) = line.split_once(": ").unwrap();
            (name.rsplit(' ').next().unwrap().to_owned(), kind.to_owned())
        })
        .collect()
}

#[test]
fn params_have_the_layout_that_naga_computes() {
    for spec in REGISTRY {
        let (module, _) = parse(spec);
        let (_, variable) = module
            .global_variables
            .iter()
            .find(|(_, variable)| variable.space == naga::AddressSpace::Uniform)
            .unwrap_or_else(|| panic!("{}: no uniform", spec.name));
        let naga::TypeInner::Struct { members, span } = &module.types[variable.ty].inner else {
            panic!("{}: params is not a struct", spec.name);
        };
        assert_eq!(*span as usize, spec.params_size, "{}", spec.name);
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
                (member.name.clone().unwrap(), kind.to_owned())
            })
            .collect();
        assert_eq!(found, rust_params(spec.name), "{}", spec.name);
        assert_eq!(4 * found.len(), spec.params_size, "{}: no padding", spec.name);
    }
    // Lines of the tables are one vec4<u32>.
    assert_eq!(size_of::<cache_read::SequenceRow>(), 16);
    assert_eq!(size_of::<attention_prefill::QueryTile>(), 16);
}

/// What a grid has to cover.
#[derive(Debug, Clone, Copy)]
enum Cover {
    /// `items`, `each` of them a workgroup, folded into x and y.
    Folded { items: u64, each: u64 },
    /// Extents in x, y and z, and those of a workgroup's tile.
    Tiled { size: [u64; 3], tile: [u64; 3] },
}

struct Case {
    spec: &'static KernelSpec,
    what: String,
    context: PlanContext,
    plan: Plan,
    cover: Cover,
}

/// Value of an override in a plan.
fn value(plan: &Plan, name: &str) -> u64 {
    plan.overrides.iter().find(|(found, _)| *found == name).unwrap_or_else(|| panic!("no override {name}")).1 as u64
}

fn tunings(spec: &KernelSpec) -> impl Iterator<Item = Tuning> + use<> {
    std::iter::once(Tuning::Auto).chain((0..spec.tunings).map(Tuning::Forced))
}

/// Smallest and largest subgroups of the devices that a kernel tells apart.
fn subgroups(spec: &KernelSpec) -> &'static [(u32, u32)] {
    match spec {
        // Whole subgroups, whatever the smallest.
        _ if spec.cooperative != Cooperative::NONE => &[(4, 4), (4, 8), (4, 16), (4, 32), (4, 64)],
        _ if spec.features.contains(Features::SUBGROUP) => {
            &[(4, 64), (8, 64), (16, 64), (32, 64), (64, 64), (128, 128)]
        }
        _ => &[(4, 64)],
    }
}

/// Every plan of a problem: each class of adapter, each size of its subgroups where they matter, each tuning, WebGPU's default
/// limits. Where a device offers more, plans are the same: see `larger_limits_change_no_plan`.
fn add<P: Problem + std::fmt::Debug>(cases: &mut Vec<Case>, problem: P, cover: impl Fn(&Plan) -> Cover) {
    let subgroups = subgroups(P::SPEC);
    for (class, &(subgroup_min_size, subgroup_max_size)) in
        CLASSES.into_iter().flat_map(|class| subgroups.iter().map(move |sizes| (class, sizes)))
    {
        let context = PlanContext { subgroup_min_size, subgroup_max_size, ..PlanContext::webgpu_defaults(class) };
        for tuning in tunings(P::SPEC) {
            let subgroups = [subgroup_min_size, subgroup_max_size];
            let what = format!("{} {class:?} {subgroups:?} {tuning:?} {problem:?}", P::SPEC.name);
            let plan = problem.plan(&context, tuning).unwrap_or_else(|error| panic!("{what}: {error}"));
            let cover = cover(&plan);
            cases.push(Case { spec: P::SPEC, what, context: context.clone(), plan, cover });
        }
    }
}

/// One invocation an element.
fn elements(items: u64) -> impl Fn(&Plan) -> Cover {
    move |plan| Cover::Folded { items, each: plan.workgroup_size.into() }
}

/// One workgroup a row.
fn rows(items: u64) -> impl Fn(&Plan) -> Cover {
    move |_| Cover::Folded { items, each: 1 }
}

fn tiles(size: [u32; 3], tile: impl Fn(&Plan) -> [u64; 3]) -> impl Fn(&Plan) -> Cover {
    move |plan| Cover::Tiled { size: size.map(u64::from), tile: tile(plan) }
}

/// Nothing, one, and the neighbourhood of every workgroup size; then more than one dimension of workgroups holds.
const ELEMENTS: [u32; 10] = [0, 1, 63, 64, 65, 255, 256, 257, 65_536 * 64, 65_536 * 256 + 1];
const ROWS: [u32; 7] = [0, 1, 2, 65_535, 65_536, 131_071, 10_000_000];
const HEADS: [u32; 6] = [1, 3, 4, 5, 9, 63];

fn norm_problem(rows: u32, kind: norm::Kind, bias: bool, storage: Storage) -> norm::Problem {
    norm::Problem { rows, width: 3, second: 0, x_offset: 0, x_row: 3, eps: 1e-6, kind, bias, storage }
}

/// A norm of rows that suit 16-byte loads.
fn whole_norm_problem(norm: norm::Problem, width: u32, second: u32) -> norm_vec4::Problem {
    norm_vec4::Problem(norm::Problem { width, second, x_row: width + second, ..norm })
}

/// A gate of rows that suit 16-byte loads.
fn whole_gate_problem(gate: gate::Problem, width: u32) -> gate_vec4::Problem {
    gate_vec4::Problem(gate::Problem { width, x_row: width, ..gate })
}

fn gate_problem(rows: u32, activation: Activation, norm: GateNorm, statistics_rows: u32) -> gate::Problem {
    let (x_offset, x_row, storage) = (0, 3, Storage::F32);
    gate::Problem { rows, width: 3, x_offset, x_row, eps: 1e-5, activation, norm, statistics_rows, storage }
}

fn append_problem(tokens: u32, d_rope: u32, storage: Storage) -> cache_append::Problem {
    let rope_byte = u64::from(tokens) * u64::from(storage.row_pitch(5)) * storage.bytes();
    cache_append::Problem {
        tokens,
        cache_rows: tokens,
        d_latent: 5,
        latent_offset: 0,
        latent_row: 5,
        d_rope,
        rope_offset: 0,
        rope_row: d_rope,
        interleave: [None, Some(true), Some(false)][tokens as usize % 3],
        queries: cache_append::Queries::default(),
        rope_byte,
        storage,
    }
}

/// The same for rows that suit 16-byte loads, with heads of queries.
fn whole_append_problem(tokens: u32, n_head: u32, storage: Storage) -> cache_append_vec4::Problem {
    cache_append_vec4::Problem(cache_append::Problem {
        d_latent: 24,
        latent_row: 40,
        d_rope: 16,
        rope_offset: 24,
        rope_row: 40,
        queries: cache_append::Queries { n_head, offset: 8, row: 24 * n_head, head: 24 },
        rope_byte: u64::from(tokens) * 24 * storage.bytes(),
        ..append_problem(tokens, 16, storage)
    })
}

fn read_problem(rows: u32, table: Option<Storage>, storage: Storage) -> cache_read::Problem {
    let table = table.map(|storage| cache_read::Table { d_gate: 2, vocab_size: 7, storage });
    cache_read::Problem { first_row: 0, rows, cache_rows: rows, d_latent: 3, n_sequence: 1, table, storage }
}

fn statistics_problem(
    tokens: u32,
    activation: Activation,
    norm: GateNorm,
    (storage, more_storage): (Storage, Storage),
) -> gate_statistics::Problem {
    let (width, resident, more, more_first, cache_rows, eps) = (3, 2, tokens, 0, tokens, 1e-5);
    gate_statistics::Problem {
        tokens,
        width,
        resident,
        more,
        more_first,
        cache_rows,
        eps,
        activation,
        norm,
        storage,
        more_storage,
    }
}

fn gate_rows_problem(rows: u32, width: u32, lists: bool, storage: Storage, y_storage: Storage) -> gate_rows::Problem {
    let (d_gate, vocab_size, first_id, y_rows) = (5, 100, 0, rows);
    gate_rows::Problem {
        rows,
        width,
        d_gate,
        vocab_size,
        first_id,
        ids: lists,
        targets: lists,
        y_rows,
        storage,
        y_storage,
    }
}

fn grouped_problem(items: u32, n_head: u32, widths: Widths, norm: GateNorm) -> attention_grouped::Problem {
    let context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
    attention_grouped::Problem {
        tokens: 6,
        most_tokens: 3,
        n_sequence: 2,
        items,
        partials: items,
        n_head,
        widths,
        tiling: attention_grouped::tiling(&context, widths).unwrap(),
        table: 0,
        list_words: 32,
        cache_rows: 9,
        rope_byte: 1024,
        statistics_byte: 2048,
        resident: 4,
        gates_storage: Storage::F16,
        more: 4,
        more_storage: Storage::F32,
        first_row: 0,
        rows: 4,
        pass_index: 0,
        passes: 1,
        activation: Activation::Silu,
        norm,
        scale: 1.0,
        met_groups: 0,
        met_positions: 0,
        cache_storage: Storage::F16,
        storage: Storage::F16,
    }
}

/// The same for the kernel that keeps a tile in registers.
fn grouped_in_registers(
    items: u32,
    n_head: u32,
    widths: Widths,
    norm: GateNorm,
) -> attention_grouped_subgroup::Problem {
    let mut context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
    context.features = attention_grouped_subgroup::SPEC.features;
    context.subgroup_min_size = attention_grouped_subgroup::SPEC.subgroup;
    let tiling = attention_grouped::tiling(&context, widths).unwrap();
    let problem = grouped_problem(items, n_head, widths, norm);
    attention_grouped_subgroup::Problem(attention_grouped::Problem { tiling, ..problem })
}

fn rope_problem(tokens: u32, d_rope: u32, interleave: bool) -> rope::Problem {
    rope::Problem { tokens, n_head: 1, d_rope, offset: 0, token_stride: d_rope, head_stride: d_rope, interleave }
}

fn prefill_problem(query_tiles: u32, n_head: u32, d_value: u32) -> attention_prefill::Problem {
    attention_prefill::Problem {
        tokens: query_tiles,
        query_tiles,
        n_sequence: 1,
        n_head,
        d_nope: 4,
        d_rope: 8,
        d_value,
        kv_first: 0,
        kv_rows: 9,
        cache_rows: 9,
        first: true,
        last: true,
        scale: 1.0,
        storage: Storage::F32,
    }
}

fn decode_problem(kv_rows: u32, n_head: u32, storage: Storage) -> attention_decode::Problem {
    attention_decode::Problem {
        tokens: 1,
        most_tokens: 1,
        partials: kv_rows / SPLIT,
        n_sequence: 1,
        n_head,
        d_nope: 3,
        d_rope: 2,
        d_value: 5,
        kv_first: 0,
        kv_rows,
        cache_rows: kv_rows,
        scale: 1.0,
        storage,
        kv_storage: storage,
    }
}

fn absorbed_problem(splits: u32, n_head: u32, storage: Storage) -> attention_absorbed::Problem {
    attention_absorbed::Problem {
        tokens: 1,
        most_tokens: 1,
        partials: splits,
        n_sequence: 1,
        splits,
        n_head,
        d_latent: 7,
        d_nope: 3,
        d_rope: 2,
        cache_rows: splits * SPLIT,
        scale: 1.0,
        storage,
    }
}

/// Every plan that a kernel can choose, at every size that a tile may get wrong.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let all = &mut cases;
    for n in ELEMENTS {
        add(all, swiglu::Problem { elements: n }, elements(n.into()));
        add(all, residual_add::Problem { elements: n }, elements(n.into()));
        add(all, cache_copy::Problem { words: n, from_word: 0, to_word: n }, elements(n.into()));
        add(all, word_scatter::Problem { count: n, words: n }, elements(n.into()));
        let (tokens, first_row, n_sequence, table, list_words) = (2, 5, 1, 0, 16);
        let listed = group_ids::Problem { tokens, first_row, rows: n, n_sequence, table, list_words };
        add(all, listed, elements(u64::from(n) + 2));
        let fma = roofline_fma::Problem { elements: n, trips: 2, a: 0.5, b: 0.5 };
        add(all, fma, elements(n.into()));
        let whole = n.next_multiple_of(4);
        add(all, roofline_copy::Problem { words: whole }, |plan| Cover::Folded {
            items: u64::from(whole) / 4,
            each: value(plan, "WORKGROUP") * value(plan, "EACH"),
        });
        for interleave in [false, true] {
            add(all, rope_problem(n, 2, interleave), elements(n.into()));
            add(all, rope_problem(n, 0, interleave), elements(0));
        }
        for storage in Storage::ALL {
            let table = gather::Problem { rows: n, width: 3, table_row: 3, vocab_size: 7, storage };
            add(all, table, elements(3 * u64::from(n)));
            add(all, read_problem(n, None, storage), elements(3 * u64::from(n)));
            for table in Storage::ALL {
                add(all, read_problem(n, Some(table), storage), elements(5 * u64::from(n)));
            }
            for d_rope in [0, 2] {
                let words = |width| u64::from(storage.row_pitch(width)) * storage.bytes() / 4;
                let words = words(5) + words(d_rope);
                add(all, append_problem(n, d_rope, storage), elements(words * u64::from(n)));
                if n < 1 << 20 {
                    let queries = cache_append::Queries { n_head: 3, offset: 0, row: 3 * d_rope, head: d_rope };
                    let problem = cache_append::Problem { queries, ..append_problem(n, d_rope, storage) };
                    let pairs = if problem.interleave.is_some() { 3 * u64::from(d_rope) / 2 } else { 0 };
                    add(all, problem, elements((words + pairs) * u64::from(n)));
                }
            }
            for n_head in [0, 3] {
                let problem = whole_append_problem(n, n_head, storage);
                let heads = if problem.0.interleave.is_some() { n_head } else { 0 };
                add(all, problem, |plan| Cover::Folded {
                    items: u64::from(n) * u64::from(1 + heads),
                    each: value(plan, "WORKGROUP") / value(plan, "LANES"),
                });
            }
        }
    }
    for n in ROWS {
        for storage in Storage::ALL {
            for kind in [norm::Kind::Rms, norm::Kind::Layer] {
                for bias in [false, true] {
                    let problem = norm_problem(n, kind, bias, storage);
                    add(all, problem, rows(n.into()));
                    add(all, norm::Problem { second: 5, x_row: 8, ..problem }, rows(2 * u64::from(n)));
                    for (width, second) in [(8, 0), (1024, 0), (24, 4096)] {
                        let segments = if second > 0 { 2 } else { 1 };
                        add(all, whole_norm_problem(problem, width, second), |plan| Cover::Folded {
                            items: segments * u64::from(n),
                            each: value(plan, "WORKGROUP") / value(plan, "LANES"),
                        });
                    }
                }
            }
            for more_storage in Storage::ALL {
                for activation in Activation::ALL {
                    for norm in [GateNorm::LayerNorm, GateNorm::RmsNorm] {
                        for (resident, more) in [(2, n), (0, n), (2, 0)] {
                            let problem = statistics_problem(n, activation, norm, (storage, more_storage));
                            let problem = gate_statistics::Problem { resident, more, ..problem };
                            add(all, problem, |plan| Cover::Folded {
                                items: n.into(),
                                each: value(plan, "WORKGROUP") / value(plan, "LANES"),
                            });
                        }
                    }
                }
            }
            for activation in Activation::ALL {
                for norm in GateNorm::ALL {
                    for statistics_rows in [0, 1] {
                        let problem = gate_problem(n, activation, norm, statistics_rows);
                        let problem = gate::Problem { storage, ..problem };
                        add(all, problem, rows(n.into()));
                        for width in [8, 1024, 4096] {
                            add(all, whole_gate_problem(problem, width), |plan| Cover::Folded {
                                items: n.into(),
                                each: value(plan, "WORKGROUP") / value(plan, "LANES") * value(plan, "ROWS"),
                            });
                        }
                    }
                }
            }
        }
        let by_matrices = roofline_cooperative::Problem { groups: n.min(65_535), trips: 3 };
        add(all, by_matrices, tiles([by_matrices.groups, 1, 1], |_| [1; 3]));
        add(all, roofline_cooperative_8::Problem(by_matrices), tiles([by_matrices.groups, 1, 1], |_| [1; 3]));
        let merge = attention_merge::Problem { tokens: n, n_head: 3, width: 5, splits: n };
        add(all, merge, rows(3 * u64::from(n)));
    }
    for storage in Storage::ALL {
        for bias in [false, true] {
            for (m, n) in [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65].iter().flat_map(|&m| {
                [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129].map(|n| (m, n))
            }) {
                let product = matmul::Problem { batch: 3, ..matmul::Problem::linear(m, 5, n, bias, storage) };
                let tile = |plan: &Plan| [4 * value(plan, "WG_X"), 4 * value(plan, "WG_Y"), 1];
                add(all, product, tiles([n, m, 3], tile));
                let tile = |plan: &Plan| [value(plan, "WORKGROUP") / value(plan, "LANES"), 4, 1];
                add(all, matvec::Problem(product), tiles([n, m, 3], tile));
                let whole = matmul::Problem { batch: 3, ..matmul::Problem::linear(m, 24, n, bias, storage) };
                let tile = |plan: &Plan| [8 * value(plan, "WG_X"), 8 * value(plan, "WG_Y"), 1];
                add(all, matmul_vec4::Problem(whole), tiles([n, m, 3], tile));
                if storage == Storage::F16 {
                    let tile = |plan: &Plan| [32 * value(plan, "FRAGMENTS"), 32 * value(plan, "FRAGMENTS"), 1];
                    add(all, matmul_cooperative::Problem(whole), tiles([n, m, 3], tile));
                    let tile = |plan: &Plan| [16 * value(plan, "FRAGMENTS"), 16 * value(plan, "FRAGMENTS"), 1];
                    add(all, matmul_cooperative_8::Problem(whole), tiles([n, m, 3], tile));
                }
                add(all, matmul_subgroup::Problem(whole), tiles([m, n, 3], |_| [8, 32, 1]));
                let tile = |plan: &Plan| [4 * value(plan, "WORKGROUP") / value(plan, "LANES"), 4, 1];
                add(all, matvec_vec4::Problem(whole), tiles([n, m, 3], tile));
                add(all, matvec_subgroup::Problem(whole), tiles([n, m, 3], |_| [4, 4, 1]));
            }
        }
        for y_storage in Storage::ALL {
            for lists in [false, true] {
                for (m, n) in [0, 1, 3, 4, 5, 9].iter().flat_map(|&m| [1, 31, 32, 33, 256, 257].map(|n| (m, n))) {
                    let problem = gate_rows_problem(m, n, lists, storage, y_storage);
                    let tile = |plan: &Plan| [4 * value(plan, "WORKGROUP"), 4, 1];
                    add(all, problem, tiles([y_storage.row_pitch(n), m, 1], tile));
                }
            }
        }
        for n_head in HEADS {
            for norm in GateNorm::ALL {
                for cache_storage in Storage::ALL {
                    let widths = Widths { d_latent: 57, d_nope: 0, d_rope: 62, d_value: 128 };
                    let mut problem = grouped_in_registers(5, n_head, widths, norm);
                    let blocks = |plan: &Plan| u64::from(n_head).div_ceil(value(plan, "HEADS"));
                    for (resident, more) in [(4, 4), (0, 4), (4, 0)] {
                        problem.0 = attention_grouped::Problem { storage, cache_storage, resident, more, ..problem.0 };
                        add(all, problem, |plan| Cover::Tiled { size: [3 * blocks(plan), 5, 1], tile: [1; 3] });
                    }
                }
            }
            for items in [1, 5] {
                for (d_latent, d_nope, d_rope, d_value) in [(64, 64, 64, 64), (13, 0, 0, 11), (512, 128, 64, 128)] {
                    for norm in GateNorm::ALL {
                        let widths = Widths { d_latent, d_nope, d_rope, d_value };
                        let problem = grouped_problem(items, n_head, widths, norm);
                        for (cache_storage, (resident, more)) in Storage::ALL
                            .into_iter()
                            .flat_map(|storage| [(4, 4), (0, 4), (4, 0)].map(|sources| (storage, sources)))
                        {
                            let problem =
                                attention_grouped::Problem { storage, cache_storage, resident, more, ..problem };
                            // Heads fill workgroups for one query token, then for the next.
                            let blocks = |plan: &Plan| u64::from(n_head).div_ceil(value(plan, "HEADS"));
                            add(all, problem, |plan| Cover::Tiled {
                                size: [3 * blocks(plan), items.into(), 1],
                                tile: [1; 3],
                            });
                        }
                    }
                }
            }
            for splits in [0, 1, 3] {
                let tile = |plan: &Plan| [value(plan, "SPLIT"), 1, 1];
                add(all, decode_problem(splits * SPLIT, n_head, storage), tiles([splits * SPLIT, n_head, 1], tile));
                for (d_nope, d_rope, d_value) in [(8, 0, 8), (16, 8, 32), (64, 64, 72), (0, 128, 256)] {
                    let problem = decode_problem(splits * SPLIT, n_head, storage);
                    let problem = attention_decode::Problem { d_nope, d_rope, d_value, ..problem };
                    add(all, attention_decode_vec4::Problem(problem), tiles([splits * SPLIT, n_head, 1], tile));
                }
                let tile = |plan: &Plan| [value(plan, "SPLIT"), value(plan, "HEADS"), 1];
                add(all, absorbed_problem(splits, n_head, storage), tiles([splits * SPLIT, n_head, 1], tile));
                for (d_latent, d_rope) in [(4, 0), (64, 64), (512, 64)] {
                    let problem = absorbed_problem(splits, n_head, storage);
                    let problem = attention_absorbed::Problem { d_latent, d_nope: 8, d_rope, ..problem };
                    let size = [splits * SPLIT, n_head, 1];
                    let tile = |plan: &Plan| [value(plan, "SPLIT"), 8, 1];
                    add(all, attention_absorbed_subgroup::Problem(problem), tiles(size, tile));
                }
                for (d_latent, d_rope) in [(4, 0), (32, 32), (36, 4), (64, 64)] {
                    let problem = absorbed_problem(splits, n_head, storage);
                    let problem = attention_absorbed::Problem { d_latent, d_nope: 8, d_rope, ..problem };
                    let size = [splits * SPLIT, n_head, 1];
                    let tile = |plan: &Plan| [value(plan, "SPLIT"), 4 * value(plan, "TEAMS"), 1];
                    add(all, attention_absorbed_stream::Problem(problem), tiles(size, tile));
                }
            }
            for query_tiles in [0, 1, 5] {
                for d_value in [4, 28, 32, 36, 64, 68, 96, 100, 124, 128, 132, 256, 260] {
                    let problem = prefill_problem(query_tiles, n_head, d_value);
                    let problem = attention_prefill::Problem { storage, ..problem };
                    add(all, problem, tiles([query_tiles, n_head, d_value], |_| [1, 1, 128]));
                    if storage == Storage::F16 {
                        let parts = |plan: &Plan| Cover::Tiled {
                            size: [u64::from(query_tiles) * value(plan, "PARTS"), n_head.into(), d_value.into()],
                            tile: [1, 1, 128],
                        };
                        add(all, attention_prefill_cooperative::Problem(problem), parts);
                        add(all, attention_prefill_cooperative_8::Problem(problem), parts);
                    }
                    // Workgroups share a tile.
                    add(all, attention_prefill_subgroup::Problem(problem), |plan| Cover::Tiled {
                        size: [u64::from(query_tiles) * value(plan, "PARTS"), n_head.into(), d_value.into()],
                        tile: [1, 1, 128],
                    });
                }
                for d_value in [1, 3, 127, 128, 129, 256, 257] {
                    let problem = prefill_problem(query_tiles, n_head, d_value);
                    let problem = attention_prefill::Problem { d_nope: 3, d_rope: 2, storage, ..problem };
                    let tile = |plan: &Plan| [1, 1, value(plan, "SLICE")];
                    add(all, attention_prefill_rows::Problem(problem), tiles([query_tiles, n_head, d_value], tile));
                }
            }
        }
    }
    add_grouped(all);
    cases
}

/// Grouped decode with every switch: activations under every norm, then each pairing of storages. Both items that a class of
/// adapter may cut.
fn add_grouped(all: &mut Vec<Case>) {
    let widths = Widths { d_latent: 64, d_nope: 64, d_rope: 64, d_value: 64 };
    let (f32, f16) = (Storage::F32, Storage::F16);
    let activations = Activation::ALL.into_iter().flat_map(|activation| GateNorm::ALL.map(|norm| (activation, norm)));
    let switched = activations.map(|(activation, norm)| (activation, norm, [f16; 4]));
    let stored = (0..16).map(|bits| {
        let storages = [0, 1, 2, 3].map(|bit| if bits >> bit & 1 == 1 { f16 } else { f32 });
        (Activation::Sigmoid, GateNorm::RmsNorm, storages)
    });
    for (activation, norm, [storage, cache_storage, gates_storage, more_storage]) in switched.chain(stored) {
        let given = |problem: attention_grouped::Problem, run| attention_grouped::Problem {
            activation,
            storage,
            cache_storage,
            gates_storage,
            more_storage,
            tiling: Tiling { run, ..problem.tiling },
            ..problem
        };
        let cover = |plan: &Plan| {
            let blocks = 3u64.div_ceil(value(plan, "HEADS"));
            Cover::Tiled { size: [3 * blocks, 5, 1], tile: [1; 3] }
        };
        for run in [2, 4] {
            add(all, given(grouped_problem(5, 3, widths, norm), run), cover);
        }
        for run in [1, 2] {
            let problem = given(grouped_in_registers(5, 3, widths, norm).0, run);
            add(all, attention_grouped_subgroup::Problem(problem), cover);
        }
    }
}

/// What naga makes of a shader with these overrides: invocations of a workgroup, bytes of workgroup memory as they are,
/// and as WebGPU counts them against the limit, each variable rounded up to 16.
fn specialise(
    kernel: &str,
    (module, info): &(naga::Module, ModuleInfo),
    overrides: &[(&'static str, f64)],
) -> (u32, u32, u32) {
    let constants = overrides.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
    let entry = Some((naga::ShaderStage::Compute, "main"));
    let (module, _) = naga::back::pipeline_constants::process_overrides(module, info, entry, &constants)
        .unwrap_or_else(|error| panic!("{kernel} with {overrides:?}: {error}"));
    validate(kernel, &module);
    let mut layouter = Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    let sizes: Vec<u32> = module
        .global_variables
        .iter()
        .filter(|(_, variable)| variable.space == naga::AddressSpace::WorkGroup)
        .map(|(_, variable)| layouter[variable.ty].size)
        .collect();
    let counted = sizes.iter().map(|size| size.next_multiple_of(16)).sum();
    (module.entry_points[0].workgroup_size.iter().product(), sizes.iter().sum(), counted)
}

#[test]
fn every_plan_specialises_its_shader_within_webgpus_limits() {
    let limits = webgpu_limits();
    let modules: BTreeMap<_, _> = REGISTRY.iter().map(|spec| (spec.name, parse(spec))).collect();
    let mut done: BTreeMap<String, (u32, u32)> = BTreeMap::new();
    for Case { spec, what, plan, .. } in cases() {
        let key = format!("{} {:?}", spec.name, plan.overrides);
        let planned = (plan.workgroup_size, plan.workgroup_bytes);
        if let Some(before) = done.get(&key) {
            // The same shader, whatever the sizes.
            assert_eq!(*before, planned, "{what}");
            continue;
        }
        let (module, _) = &modules[spec.name];
        for (name, value) in &plan.overrides {
            let known = module.overrides.iter().any(|(_, found)| found.name.as_deref() == Some(name));
            assert!(known, "{what}: the shader has no override {name}");
            assert!(*value >= 0.0 && value.fract() == 0.0, "{what}: {name} = {value}");
        }
        let (invocations, bytes, counted) = specialise(&what, &modules[spec.name], &plan.overrides);
        assert_eq!((invocations, bytes), planned, "{what}");
        assert!(counted <= limits.max_compute_workgroup_storage_size && counted <= 16384, "{what}: {counted} bytes");
        assert!(invocations <= limits.max_compute_invocations_per_workgroup && invocations <= 256, "{what}");
        done.insert(key, planned);
    }
    // Every tuning of every kernel was among them.
    for spec in REGISTRY {
        let variants = done.keys().filter(|key| key.split(' ').next() == Some(spec.name)).count();
        assert!(variants >= spec.tunings, "{}: {variants} variants of {} tunings", spec.name, spec.tunings);
    }
    println!("{} variants of {} shaders", done.len(), REGISTRY.len());
}

#[test]
fn defaults_of_the_shaders_fit_webgpus_limits() {
    for spec in REGISTRY {
        let (invocations, _, counted) = specialise(spec.name, &parse(spec), &[]);
        assert!(invocations <= 256 && counted <= 16384, "{}: {invocations} invocations, {counted} bytes", spec.name);
    }
}

#[test]
fn every_grid_covers_its_problem_and_no_more() {
    for Case { what, plan, cover, .. } in cases() {
        let grid = plan.grid.map(u64::from);
        assert!(grid.iter().all(|&groups| groups <= 65535), "{what}: {grid:?}");
        match cover {
            Cover::Folded { items, each } => {
                let needed = items.div_ceil(each);
                let groups = grid[0] * grid[1];
                assert!(groups >= needed, "{what}: {grid:?} does not hold {needed}");
                assert!(groups - needed < grid[1], "{what}: {grid:?} for {needed}");
                assert_eq!(grid[2], 1, "{what}");
            }
            Cover::Tiled { size, tile } => {
                for axis in 0..3 {
                    assert_eq!(grid[axis], size[axis].div_ceil(tile[axis]), "{what}: axis {axis}");
                }
                // Kernels with a dimension of their own beside folded items have no tiles.
                assert!(plan.tiles == plan.grid || plan.tiles == [0; 3], "{what}: {plan:?}");
            }
        }
    }
}

#[test]
fn plans_keep_what_their_shaders_assume() {
    let mut seen = BTreeSet::new();
    for Case { spec, what, context, plan, .. } in cases() {
        seen.insert(spec.name);
        match spec.name {
            // Halving reductions.
            "norm" | "gate" | "attention_decode" => {
                assert!(plan.workgroup_size.is_power_of_two(), "{what}");
            }
            "attention_decode_vec4" => {
                let value = |name| value(&plan, name);
                for share in [value("LANES"), value("COLUMNS")] {
                    assert!(share.is_power_of_two() && value("WORKGROUP").is_multiple_of(share), "{what}");
                }
                assert!((1..=4).contains(&value("EACH")), "{what}");
                assert!(4 * value("EACH") * value("WORKGROUP") >= u64::from(SPLIT) * value("LANES"), "{what}");
            }
            "norm_vec4" | "gate_vec4" | "gate_statistics" | "cache_append_vec4" => {
                let (workgroup, lanes) = (value(&plan, "WORKGROUP"), value(&plan, "LANES"));
                assert!(lanes.is_power_of_two() && workgroup.is_multiple_of(lanes), "{what}");
                if spec.name == "gate_vec4" {
                    assert!([1, 4].contains(&value(&plan, "ROWS")), "{what}");
                }
            }
            // The shader moves quads about within groups of 8.
            "matmul_vec4" => {
                assert!([value(&plan, "WG_X"), value(&plan, "WG_Y")].iter().all(|side| side % 4 == 0), "{what}");
            }
            "matmul_subgroup" => assert!([4, 8].contains(&value(&plan, "SPREAD")), "{what}"),
            "attention_grouped_subgroup" => {
                assert_eq!(value(&plan, "HEADS") * 8, u64::from(plan.workgroup_size), "{what}")
            }
            "matvec" | "matvec_vec4" => assert_eq!(value(&plan, "WORKGROUP") % value(&plan, "LANES"), 0, "{what}"),
            "attention_absorbed_stream" => {
                let value = |name| value(&plan, name);
                assert!(value("LANES").is_power_of_two() && value("LANES") >= 4, "{what}");
                // The shader's arrays hold 4 loads and 16 words.
                assert!((1..=4).contains(&value("LOADS")) && value("ROPE") <= 16, "{what}");
            }
            "attention_absorbed_subgroup" => assert!(value(&plan, "LANES").is_power_of_two(), "{what}"),
            "attention_prefill_subgroup" => {
                let lanes = value(&plan, "LANES");
                assert!(lanes.is_power_of_two() && (4..=32).contains(&lanes), "{what}");
                // The shader's arrays hold 8 vectors of columns.
                assert!((1..=8).contains(&value(&plan, "COLUMNS")), "{what}");
            }
            "attention_prefill" => {
                let value = |name| value(&plan, name);
                let columns = value("COLUMNS");
                assert!((1..=4).contains(&columns), "{what}");
                assert_eq!(32 % value("VALUE_ROWS"), 0, "{what}");
                // Values are staged where queries and keys were.
                let stage = (4 * value("ROWS") + 32) * (value("CHUNK") + 1);
                assert!(value("VALUE_ROWS") * 8 * columns <= stage, "{what}");
            }
            "matmul_cooperative" | "matmul_cooperative_8" => {
                assert!([2, 4].contains(&value(&plan, "FRAGMENTS")), "{what}");
            }
            "attention_prefill_cooperative" | "attention_prefill_cooperative_8" => {
                assert!([16, 32].contains(&value(&plan, "COLUMNS")), "{what}");
                // Rows of 32 queries are shared by 1 to 8 lanes.
                assert!([32, 64, 128, 256].contains(&value(&plan, "WORKGROUP")), "{what}");
            }
            _ => {}
        }
        // Four subgroups at least, and whole ones.
        if spec.cooperative != Cooperative::NONE && !spec.name.starts_with("roofline") {
            let four = 4 * context.subgroup_max_size;
            assert!(plan.workgroup_size >= four && plan.workgroup_size.is_multiple_of(four), "{what}");
        }
        if spec.name == "attention_decode" {
            assert_eq!(u64::from(SPLIT) % value(&plan, "WORKGROUP"), 0, "{what}");
        }
        if spec.name.starts_with("attention_") && plan.overrides.iter().any(|(name, _)| *name == "SPLIT") {
            assert_eq!(value(&plan, "SPLIT"), u64::from(SPLIT), "{what}");
        }
    }
    assert_eq!(seen.len(), REGISTRY.len());
    // What the step is cut into is what the kernel's plan expects.
    for class in CLASSES {
        let context = PlanContext::webgpu_defaults(class);
        for tuning in tunings(&attention_prefill::SPEC) {
            let problem = prefill_problem(1, 1, 132);
            let plan = problem.plan(&context, tuning).unwrap();
            let tile_q = attention_prefill::tile_q(&context, tuning).unwrap();
            assert_eq!(u64::from(tile_q), 4 * value(&plan, "ROWS"));
            assert_eq!(attention_prefill::slices(&context, tuning, 132).unwrap(), plan.grid[2]);
            let plan = attention_prefill_rows::Problem(problem).plan(&context, tuning).unwrap();
            assert_eq!(tile_q, 8 * plan.workgroup_size);
            assert_eq!(attention_prefill::slices(&context, tuning, 132).unwrap(), plan.grid[2]);
            let halves = attention_prefill::Problem { d_nope: 4, d_rope: 4, storage: Storage::F16, ..problem };
            for size in [4, 8, 16, 32, 64] {
                let context = PlanContext { subgroup_max_size: size, ..context.clone() };
                let plan = attention_prefill_cooperative::Problem(halves).plan(&context, tuning).unwrap();
                assert!((32 * value(&plan, "PARTS")).abs_diff(tile_q.into()) < 32);
                assert!(plan.workgroup_size >= 4 * size && [32, 64, 128, 256].contains(&plan.workgroup_size));
                assert_eq!(attention_prefill::slices(&context, tuning, 132).unwrap(), plan.grid[2]);
            }
        }
        for tuning in tunings(&attention_prefill_subgroup::SPEC) {
            let plan = attention_prefill_subgroup::Problem(prefill_problem(1, 1, 132)).plan(&context, tuning).unwrap();
            let tile_q = attention_prefill::tile_q(&context, Tuning::Auto).unwrap();
            assert_eq!(u64::from(tile_q), 8 * value(&plan, "TEAMS") * value(&plan, "PARTS"));
            assert_eq!(attention_prefill::slices(&context, Tuning::Auto, 132).unwrap(), plan.grid[2]);
        }
    }
}

/// A problem of every kernel, as something that plans.
type Planner = Box<dyn Fn(&PlanContext, Tuning) -> egmla::Result<Plan>>;

fn planners() -> Vec<(&'static KernelSpec, Planner)> {
    fn planner<P: Problem + 'static>(problem: P) -> (&'static KernelSpec, Planner) {
        (P::SPEC, Box::new(move |context, tuning| problem.plan(context, tuning)))
    }
    let product = matmul::Problem::linear(100, 104, 100, true, Storage::F16);
    let by_matrices = roofline_cooperative::Problem { groups: 40, trips: 3 };
    let halves = attention_prefill::Problem { storage: Storage::F16, ..prefill_problem(5, 9, 128) };
    let plain = absorbed_problem(3, 9, Storage::F16);
    let absorbed = attention_absorbed::Problem { d_latent: 64, d_nope: 64, d_rope: 64, ..plain };
    vec![
        planner(absorbed_problem(3, 9, Storage::F16)),
        planner(attention_absorbed_stream::Problem(absorbed)),
        planner(attention_absorbed_subgroup::Problem(absorbed)),
        planner(decode_problem(3 * SPLIT, 9, Storage::F16)),
        planner(attention_decode_vec4::Problem(attention_decode::Problem {
            d_nope: 64,
            d_rope: 64,
            d_value: 64,
            ..decode_problem(3 * SPLIT, 9, Storage::F16)
        })),
        planner(grouped_problem(
            5,
            9,
            Widths { d_latent: 64, d_nope: 64, d_rope: 64, d_value: 64 },
            GateNorm::LayerNorm,
        )),
        planner(grouped_in_registers(
            5,
            9,
            Widths { d_latent: 64, d_nope: 64, d_rope: 64, d_value: 64 },
            GateNorm::LayerNorm,
        )),
        planner(attention_merge::Problem { tokens: 100, n_head: 9, width: 64, splits: 300 }),
        planner(prefill_problem(5, 9, 132)),
        planner(attention_prefill_cooperative::Problem(halves)),
        planner(attention_prefill_cooperative_8::Problem(halves)),
        planner(attention_prefill_rows::Problem(prefill_problem(5, 9, 129))),
        planner(attention_prefill_subgroup::Problem(prefill_problem(5, 9, 132))),
        planner(append_problem(1000, 8, Storage::F16)),
        planner(whole_append_problem(1000, 3, Storage::F16)),
        planner(cache_copy::Problem { words: 1000, from_word: 0, to_word: 1000 }),
        planner(read_problem(1000, Some(Storage::F32), Storage::F16)),
        planner(gate_problem(1000, Activation::Silu, GateNorm::LayerNorm, 1000)),
        planner(gate_rows_problem(1000, 64, true, Storage::F16, Storage::F16)),
        planner(statistics_problem(1000, Activation::Silu, GateNorm::LayerNorm, (Storage::F16, Storage::F32))),
        planner(whole_gate_problem(gate_problem(1000, Activation::Silu, GateNorm::LayerNorm, 1000), 64)),
        planner(gather::Problem { rows: 1000, width: 64, table_row: 64, vocab_size: 7, storage: Storage::F16 }),
        planner(group_ids::Problem { tokens: 1, first_row: 0, rows: 999, n_sequence: 1, table: 0, list_words: 16 }),
        planner(product),
        planner(matmul_cooperative::Problem(matmul::Problem::linear(100, 112, 96, true, Storage::F16))),
        planner(matmul_cooperative_8::Problem(matmul::Problem::linear(100, 112, 96, true, Storage::F16))),
        planner(matmul_subgroup::Problem(product)),
        planner(matmul_vec4::Problem(product)),
        planner(matvec::Problem(product)),
        planner(matvec_subgroup::Problem(product)),
        planner(matvec_vec4::Problem(product)),
        planner(norm_problem(1000, norm::Kind::Layer, true, Storage::F16)),
        planner(whole_norm_problem(norm_problem(1000, norm::Kind::Layer, true, Storage::F16), 512, 64)),
        planner(residual_add::Problem { elements: 1000 }),
        planner(by_matrices),
        planner(roofline_cooperative_8::Problem(by_matrices)),
        planner(roofline_copy::Problem { words: 1000 }),
        planner(roofline_fma::Problem { elements: 1000, trips: 2, a: 0.5, b: 0.5 }),
        planner(rope_problem(1000, 8, true)),
        planner(swiglu::Problem { elements: 1000 }),
        planner(word_scatter::Problem { count: 1000, words: 1000 }),
    ]
}

#[test]
fn plan_refuses_a_tuning_that_does_not_exist() {
    let planners = planners();
    assert_eq!(planners.len(), REGISTRY.len());
    for ((spec, plan), registered) in planners.iter().zip(REGISTRY) {
        assert_eq!(spec.name, registered.name);
        for index in [spec.tunings, usize::MAX] {
            let context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
            match plan(&context, Tuning::Forced(index)) {
                Err(Error::Problem { kernel, problem }) => {
                    assert_eq!(kernel, spec.name);
                    assert!(problem.contains(&index.to_string()), "{problem}");
                    assert!(problem.contains(&spec.tunings.to_string()), "{problem}");
                }
                other => panic!("{}: {other:?}", spec.name),
            }
        }
    }
}

/// Plans every kernel under smaller limits: what does not fit is refused with `needed` of the plan, the rest is unchanged.
fn refused(shrink: impl Fn(&mut Limits) -> u32, limit: &str, needed: impl Fn(&Plan) -> u32) -> usize {
    let mut refusals = 0;
    for (spec, plan) in planners() {
        for class in CLASSES {
            let full = PlanContext::webgpu_defaults(class);
            let mut small = full.clone();
            let allowed = shrink(&mut small.limits);
            for tuning in tunings(spec) {
                let whole = plan(&full, tuning).unwrap();
                let needed = needed(&whole);
                match plan(&small, tuning) {
                    Ok(same) => {
                        assert!(needed <= allowed, "{}: {needed} was not refused", spec.name);
                        assert_eq!(same, whole);
                    }
                    Err(Error::Limit { what, needed: said, allowed: found, limit: name }) => {
                        assert_eq!((said, found, name), (u64::from(needed), u64::from(allowed), limit), "{what}");
                        assert!(needed > allowed, "{what}");
                        assert!(what.starts_with(spec.name), "{what}");
                        refusals += 1;
                    }
                    Err(other) => panic!("{}: {other}", spec.name),
                }
            }
        }
    }
    refusals
}

/// Limits of an adapter well above WebGPU's.
fn large_limits() -> Limits {
    Limits {
        max_compute_workgroup_storage_size: 1 << 16,
        max_compute_invocations_per_workgroup: 1024,
        max_compute_workgroup_size_x: 1024,
        max_compute_workgroup_size_y: 1024,
        max_storage_buffers_per_shader_stage: 64,
        max_storage_buffer_binding_size: 1 << 32,
        max_buffer_size: 1 << 32,
        ..Limits::default()
    }
}

#[test]
fn larger_limits_change_no_plan() {
    for (spec, plan) in planners() {
        for class in CLASSES {
            for tuning in tunings(spec) {
                let small = plan(&PlanContext::webgpu_defaults(class), tuning).unwrap();
                assert_eq!(plan(&PlanContext::new(large_limits(), class), tuning).unwrap(), small, "{}", spec.name);
            }
        }
    }
}

#[test]
fn plan_refuses_limits_that_are_too_small() {
    let storage = refused(
        |limits| {
            limits.max_compute_workgroup_storage_size = 1024;
            1024
        },
        "max_compute_workgroup_storage_size",
        |plan| plan.workgroup_bytes,
    );
    assert!(storage > 0);
    let invocations = refused(
        |limits| {
            limits.max_compute_invocations_per_workgroup = 32;
            32
        },
        "max_compute_invocations_per_workgroup",
        |plan| plan.workgroup_size,
    );
    assert!(invocations > 0);

    let mut context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
    context.limits.max_compute_workgroups_per_dimension = 4;
    // Sixteen workgroups fit when folded, seventeen do not.
    let rows = |rows| norm_problem(rows, norm::Kind::Rms, false, Storage::F32).plan(&context, Tuning::Auto);
    assert_eq!(rows(16).unwrap().grid, [4, 4, 1]);
    assert!(matches!(rows(17), Err(Error::Limit { needed: 17, allowed: 16, .. })));
    let heads = |n_head| decode_problem(SPLIT, n_head, Storage::F32).plan(&context, Tuning::Auto);
    let tiles = |plan: Plan| (plan.grid, plan.tiles);
    assert_eq!(tiles(heads(4).unwrap()), ([1, 4, 1], [1, 4, 1]));
    assert_eq!(tiles(heads(5).unwrap()), ([3, 2, 1], [1, 5, 1]));
    assert_eq!(tiles(heads(16).unwrap()), ([4, 4, 1], [1, 16, 1]));
    assert!(matches!(heads(17), Err(Error::Limit { needed: 17, allowed: 16, .. })));
}

#[test]
fn plan_refuses_what_the_shaders_cannot_do() {
    fn problem_of<P: Problem>(problem: P) -> String {
        let context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
        match problem.plan(&context, Tuning::Auto) {
            Err(Error::Problem { kernel, problem }) => {
                assert_eq!(kernel, P::SPEC.name);
                problem
            }
            other => panic!("{}: {other:?}", P::SPEC.name),
        }
    }
    let f32 = Storage::F32;
    let absorbed = absorbed_problem(1, 1, f32);
    assert_eq!(problem_of(attention_absorbed::Problem { n_head: 0, ..absorbed }), "n_head is 0");
    assert_eq!(problem_of(attention_absorbed::Problem { d_latent: 0, ..absorbed }), "d_latent is 0");
    assert_eq!(problem_of(attention_absorbed::Problem { n_sequence: 0, ..absorbed }), "n_sequence is 0");
    let decode = decode_problem(SPLIT, 1, f32);
    assert_eq!(problem_of(attention_decode::Problem { n_head: 0, ..decode }), "n_head is 0");
    assert_eq!(problem_of(attention_decode::Problem { d_value: 0, ..decode }), "d_value is 0");
    assert_eq!(problem_of(attention_decode::Problem { n_sequence: 0, ..decode }), "n_sequence is 0");
    for rows in [1, SPLIT - 1, SPLIT + 1] {
        let expected = format!("kv_rows is {rows}, not a multiple of {SPLIT}");
        assert_eq!(problem_of(attention_decode::Problem { kv_rows: rows, ..decode }), expected);
        let expected = format!("kv_first is {rows}, not a multiple of {SPLIT}");
        assert_eq!(problem_of(attention_decode::Problem { kv_first: rows, ..decode }), expected);
    }
    let trips = roofline_cooperative::Problem { groups: 1, trips: 65_535 };
    assert_eq!(problem_of(trips), "trips is 65535, must be at most 65534: a loop over it is too long");
    // Halves are for layers of halves alone.
    let full = prefill_problem(1, 1, 4);
    let full = attention_prefill::Problem { d_nope: 4, d_rope: 4, storage: f32, ..full };
    assert_eq!(problem_of(attention_prefill_cooperative::Problem(full)), "the cache must be stored in f16");
    assert_eq!(problem_of(attention_prefill_cooperative_8::Problem(full)), "the cache must be stored in f16");
    let full = matmul::Problem::linear(32, 8, 8, false, f32);
    assert_eq!(problem_of(matmul_cooperative::Problem(full)), "weights must be stored in f16");
    assert_eq!(problem_of(matmul_cooperative_8::Problem(full)), "weights must be stored in f16");
    let prefill = prefill_problem(1, 1, 1);
    assert_eq!(problem_of(attention_prefill::Problem { n_head: 0, ..prefill }), "n_head is 0");
    assert_eq!(problem_of(attention_prefill::Problem { d_value: 0, ..prefill }), "d_value is 0");
    assert_eq!(problem_of(attention_prefill::Problem { n_sequence: 0, ..prefill }), "n_sequence is 0");
    let empty = attention_prefill::Problem { d_nope: 0, d_rope: 0, ..prefill };
    assert_eq!(problem_of(empty), "d_nope and d_rope are both 0");
    assert_eq!(problem_of(attention_prefill_rows::Problem(empty)), "d_nope and d_rope are both 0");
    // Widths beyond what eight invocations hold are another kernel's, and so are tilings of fewer groups.
    let whole = Widths { d_latent: 64, d_nope: 72, d_rope: 64, d_value: 128 };
    let tiled = grouped_in_registers(1, 1, whole, GateNorm::None);
    assert!(tiled.plan(&PlanContext::webgpu_defaults(AdapterClass::Software), Tuning::Auto).is_ok());
    for widths in [
        Widths { d_latent: 65, ..whole },
        Widths { d_nope: 68, ..whole },
        Widths { d_rope: 66, ..whole },
        Widths { d_value: 136, ..whole },
        Widths { d_value: 100, ..whole },
    ] {
        let problem = attention_grouped_subgroup::Problem(attention_grouped::Problem { widths, ..tiled.0 });
        assert!(problem_of(problem).contains("latents and rotary keys go up to 64"));
        let other = grouped_in_registers(1, 1, widths, GateNorm::None).0.tiling;
        assert!(other.groups < 8, "{widths:?}");
        let problem = attention_grouped_subgroup::Problem(attention_grouped::Problem { tiling: other, ..tiled.0 });
        assert!(problem_of(problem).contains("tiles of"));
    }
    let odd = prefill_problem(1, 1, 4);
    for odd in [
        attention_prefill::Problem { d_nope: 6, ..odd },
        attention_prefill::Problem { d_rope: 6, ..odd },
        attention_prefill::Problem { d_value: 6, ..odd },
    ] {
        assert!(problem_of(odd).contains("must be multiples of 4"));
    }
    let merge = attention_merge::Problem { tokens: 1, n_head: 1, width: 1, splits: 1 };
    assert_eq!(problem_of(attention_merge::Problem { n_head: 0, ..merge }), "n_head is 0");
    assert_eq!(problem_of(attention_merge::Problem { width: 0, ..merge }), "width is 0");
    let append = append_problem(1, 0, f32);
    assert_eq!(problem_of(cache_append::Problem { d_latent: 0, ..append }), "d_latent is 0");
    let tile = read_problem(1, None, f32);
    assert_eq!(problem_of(cache_read::Problem { d_latent: 0, ..tile }), "d_latent is 0");
    assert_eq!(problem_of(cache_read::Problem { n_sequence: 0, ..tile }), "n_sequence is 0");
    let gated = gate_problem(1, Activation::Identity, GateNorm::None, 0);
    assert_eq!(problem_of(gate::Problem { width: 0, ..gated }), "width is 0");
    let normed = norm_problem(1, norm::Kind::Rms, false, f32);
    assert_eq!(problem_of(norm::Problem { width: 0, ..normed }), "width is 0");
    assert_eq!(problem_of(whole_norm_problem(normed, 0, 0)), "width is 0");
    for odd in [
        norm::Problem { width: 6, ..normed },
        norm::Problem { width: 8, second: 6, x_row: 16, ..normed },
        norm::Problem { width: 8, x_row: 10, ..normed },
        norm::Problem { width: 8, x_row: 8, x_offset: 2, ..normed },
        norm::Problem { width: 12, x_row: 12, storage: Storage::F16, ..normed },
    ] {
        assert!(problem_of(norm_vec4::Problem(odd)).contains("16-byte"));
    }
    assert_eq!(problem_of(whole_gate_problem(gated, 0)), "width is 0");
    for odd in [
        gate::Problem { width: 6, ..gated },
        gate::Problem { width: 8, x_row: 10, ..gated },
        gate::Problem { width: 8, x_row: 8, x_offset: 1, ..gated },
        gate::Problem { width: 12, x_row: 12, storage: Storage::F16, ..gated },
    ] {
        assert!(problem_of(gate_vec4::Problem(odd)).contains("16-byte"));
    }
    let cache_append_vec4::Problem(append) = whole_append_problem(1, 3, Storage::F16);
    let halves = cache_append::Problem { interleave: Some(false), ..append };
    for odd in [
        cache_append::Problem { d_latent: 20, ..append },
        cache_append::Problem { latent_row: 42, ..append },
        cache_append::Problem { rope_offset: 25, ..append },
        cache_append::Problem { d_rope: 8, ..halves },
        cache_append::Problem { rope_byte: append.rope_byte + 4, ..append },
        cache_append::Problem { queries: cache_append::Queries { head: 22, ..append.queries }, ..append },
    ] {
        assert!(problem_of(cache_append_vec4::Problem(odd)).contains("16-byte"));
    }
    let table = gather::Problem { rows: 1, width: 1, table_row: 1, vocab_size: 1, storage: f32 };
    assert_eq!(problem_of(gather::Problem { width: 0, ..table }), "width is 0");
    assert_eq!(problem_of(gather::Problem { vocab_size: 0, ..table }), "vocab_size is 0");
    assert_eq!(problem_of(rope_problem(1, 3, true)), "d_rope is 3, must be even");
    assert_eq!(problem_of(roofline_copy::Problem { words: 6 }), "6 words, not a multiple of 4");

    let overlapping = [(5, 0, 4), (5, 4, 0), (1, 7, 7)];
    for (words, from_word, to_word) in overlapping {
        let problem = problem_of(cache_copy::Problem { words, from_word, to_word });
        assert_eq!(problem, format!("{words} words from {from_word} to {to_word} overlap"));
    }
    let strided = |x, y| matmul::Problem {
        x: Layout { inner: x, ..Layout::dense(8) },
        y: Layout { inner: y, ..Layout::dense(8) },
        ..matmul::Problem::linear(8, 8, 8, false, f32)
    };
    for (x, y) in [(2, 1), (1, 2), (0, 1)] {
        assert!(problem_of(strided(x, y)).contains("contiguous"));
        assert!(problem_of(matvec::Problem(strided(x, y))).contains("contiguous"));
    }
    // Elements are indexed with 32 bits.
    let huge = gather::Problem { rows: u32::MAX, width: u32::MAX, table_row: u32::MAX, vocab_size: 1, storage: f32 };
    assert!(problem_of(huge).contains("2^31"));
}

/// An older software driver ends a loop after 65 535 trips without a word. Loops over what a parameter tells are bound by plans:
/// the first extent that is too long for a kernel is refused, the last that is not is taken.
#[test]
fn loops_over_parameters_end_where_every_driver_ends_them() {
    const MOST: u32 = 65_534;
    let mut bound = BTreeSet::new();
    fn check<P: Problem>(bound: &mut BTreeSet<&'static str>, each: impl Fn(&Plan) -> u64, problem: impl Fn(u32) -> P) {
        let kernel = P::SPEC.name;
        for (class, tuning) in CLASSES.into_iter().flat_map(|class| tunings(P::SPEC).map(move |tuning| (class, tuning)))
        {
            let context = PlanContext { subgroup_min_size: 8, ..PlanContext::webgpu_defaults(class) };
            // A wide one, since `Auto` may take more invocations for it; where heads cannot be so wide, a narrow one.
            let plan =
                [131_072, 8192, 64].into_iter().find_map(|width| problem(width).plan(&context, tuning).ok()).unwrap();
            let most = u64::from(MOST) * each(&plan);
            // Whole 16-byte loads of halves, where a kernel wants them.
            let (fits, over) = (most / 8 * 8, (most + 1).next_multiple_of(8));
            let fits = problem(fits as u32).plan(&context, tuning);
            // Widths may have other bounds that come first, as registers and workgroup memory.
            let other = |error: &Error| !error.to_string().contains("a loop over it");
            assert!(fits.as_ref().err().is_none_or(other), "{kernel} {tuning:?}: {fits:?}");
            match problem(over as u32).plan(&context, tuning) {
                Err(Error::Problem { problem, .. }) => {
                    assert!(problem.ends_with(": a loop over it is too long"), "{kernel} {tuning:?}: {problem}");
                }
                plan => panic!("{kernel} {tuning:?} walks {over}: {plan:?}"),
            }
        }
        bound.insert(kernel);
    }
    let of = |name: &'static str, each: u64| move |plan: &Plan| each * value(plan, name);
    let one = |_: &Plan| 1;
    let (f16, f32) = (Storage::F16, Storage::F32);
    let bound = &mut bound;
    check(bound, one, |width| attention_absorbed::Problem { d_latent: width, ..absorbed_problem(1, 1, f32) });
    let aligned = move |width| attention_absorbed::Problem {
        d_latent: 8,
        d_nope: width,
        d_rope: 8,
        ..absorbed_problem(1, 1, f16)
    };
    check(bound, one, |width| attention_absorbed_subgroup::Problem(aligned(width)));
    check(bound, one, |width| attention_decode::Problem { d_value: width, ..decode_problem(SPLIT, 1, f32) });
    check(bound, one, |width| {
        let problem = decode_problem(SPLIT, 1, f16);
        attention_decode_vec4::Problem(attention_decode::Problem { d_nope: 8, d_rope: 8, d_value: width, ..problem })
    });
    let widths = |d_nope| Widths { d_latent: 16, d_nope, d_rope: 16, d_value: 16 };
    check(bound, one, |width| {
        let mut problem = grouped_in_registers(1, 1, widths(width.min(64)), GateNorm::LayerNorm);
        problem.0.widths = widths(width);
        problem
    });
    check(bound, one, |width| {
        let problem = grouped_problem(1, 1, widths(width.min(64)), GateNorm::LayerNorm);
        attention_grouped::Problem { widths: widths(width), ..problem }
    });
    check(bound, of("WORKGROUP", 1), |width| attention_merge::Problem { tokens: 1, n_head: 1, width, splits: 1 });
    let prefill = |kv_rows| attention_prefill::Problem { kv_rows, ..prefill_problem(1, 1, 8) };
    let sixteen = |_: &Plan| 16;
    check(bound, sixteen, prefill);
    check(bound, sixteen, |rows| attention_prefill_rows::Problem(prefill(rows)));
    check(bound, sixteen, |rows| attention_prefill_subgroup::Problem(prefill(rows)));
    let halves = |rows| attention_prefill::Problem { storage: f16, ..prefill(rows) };
    check(bound, sixteen, |rows| attention_prefill_cooperative::Problem(halves(rows)));
    check(bound, sixteen, |rows| attention_prefill_cooperative_8::Problem(halves(rows)));
    check(bound, one, |width| {
        let whole = whole_append_problem(1, 1, f32).0;
        let rope_byte = u64::from(width) * 4;
        cache_append_vec4::Problem(cache_append::Problem { d_latent: width, latent_row: width, rope_byte, ..whole })
    });
    let gated =
        |width| gate::Problem { width, x_row: width, ..gate_problem(1, Activation::OnePlus, GateNorm::LayerNorm, 0) };
    check(bound, of("WORKGROUP", 1), gated);
    check(bound, of("LANES", 4), |width| gate_vec4::Problem(gated(width)));
    check(bound, of("LANES", 1), |width| {
        let problem = statistics_problem(1, Activation::OnePlus, GateNorm::LayerNorm, (f32, f32));
        gate_statistics::Problem { width, ..problem }
    });
    check(bound, |_| 4, |d_gate| gate_rows::Problem { d_gate, ..gate_rows_problem(1, 8, false, f32, f32) });
    let product = |storage| move |inner| matmul::Problem::linear(32, inner, 32, false, storage);
    check(bound, of("TILE_K", 1), product(f32));
    check(bound, sixteen, |inner| matmul_vec4::Problem(product(f32)(inner)));
    check(bound, |_| 4, |inner| matmul_subgroup::Problem(product(f32)(inner)));
    // What is staged, halves of two operands: 2 · 2 · tile · (tile_k + 8) bytes, and sums beside them.
    let tile_k = |side: u64| {
        move |plan: &Plan| {
            let tile = 2 * side * value(plan, "FRAGMENTS");
            (u64::from(plan.workgroup_bytes) - 16 * side * side) / (4 * tile) - 8
        }
    };
    check(bound, tile_k(16), |inner| matmul_cooperative::Problem(product(f16)(inner)));
    check(bound, tile_k(8), |inner| matmul_cooperative_8::Problem(product(f16)(inner)));
    check(bound, of("LANES", 1), |inner| matvec::Problem(product(f32)(inner)));
    check(bound, of("LANES", 4), |inner| matvec_vec4::Problem(product(f32)(inner)));
    check(bound, of("WORKGROUP", 4), |inner| matvec_subgroup::Problem(product(f32)(inner)));
    let normed = |width| norm::Problem { width, x_row: width, ..norm_problem(1, norm::Kind::Rms, false, f32) };
    check(bound, |_| 64, normed);
    check(bound, |plan| (4 * value(plan, "LANES")).min(64), |width| norm_vec4::Problem(normed(width)));
    check(bound, one, |trips| roofline_fma::Problem { elements: 1, trips, a: 0.5, b: 0.5 });
    check(bound, one, |trips| roofline_cooperative::Problem { groups: 1, trips });
    check(bound, one, |trips| roofline_cooperative_8::Problem(roofline_cooperative::Problem { groups: 1, trips }));
    // Every shader with such a loop is among them.
    for spec in REGISTRY {
        let loops = |line: &&str| line.contains("for (") && line.contains("params.");
        if let Some(line) = spec.source.lines().find(loops) {
            assert!(bound.contains(spec.name), "{}: nothing bounds `{}`", spec.name, line.trim());
        }
    }
}

#[test]
fn cooperative_matrices_are_square_halves_with_sums_in_f32() {
    let shape = |m_size, n_size, k_size, ab_type, cr_type| CooperativeMatrixProperties {
        m_size,
        n_size,
        k_size,
        ab_type,
        cr_type,
        saturating_accumulation: false,
    };
    let (half, float) = (CooperativeScalarType::F16, CooperativeScalarType::F32);
    let (by_16, by_8) = (shape(16, 16, 16, half, float), shape(8, 8, 8, half, float));
    assert_eq!(Cooperative::of(&[by_16]), Cooperative::BY_16);
    assert_eq!(Cooperative::of(&[by_8]), Cooperative::BY_8);
    assert_eq!(Cooperative::of(&[by_8, by_16]), Cooperative { by_16: true, by_8: true });
    let others = [
        shape(16, 8, 16, half, float),
        shape(16, 16, 8, half, float),
        shape(8, 16, 16, half, float),
        shape(16, 16, 16, half, half),
        shape(8, 8, 8, float, float),
        CooperativeMatrixProperties { saturating_accumulation: true, ..by_16 },
    ];
    assert_eq!(Cooperative::of(&others), Cooperative::NONE);
    // A kernel says which it lacks, beside features.
    let mut context = PlanContext { features: COOPERATIVE_FEATURES, ..PlanContext::webgpu_defaults(CLASSES[0]) };
    let lacks = |context: &PlanContext| matmul_cooperative::SPEC.missing(context);
    assert_eq!(lacks(&context).as_deref(), Some("cooperative matrices of 16×16×16 f16"));
    context.cooperative = Cooperative::BY_8;
    assert!(lacks(&context).is_some() && matmul_cooperative_8::SPEC.missing(&context).is_none());
    context.cooperative = Cooperative::BY_16;
    assert_eq!(lacks(&context), None);
    context.features.remove(Features::SHADER_F16);
    assert_eq!(lacks(&context).as_deref(), Some("shader_f16"));
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
    for spec in REGISTRY {
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
    for spec in REGISTRY {
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

/// For the kernels that no adapter here runs, this is all that is known of their translation.
#[test]
fn every_shader_becomes_spirv() {
    for spec in REGISTRY {
        let (module, info) = parse(spec);
        let (module, info) =
            naga::back::pipeline_constants::process_overrides(&module, &info, None, &Default::default()).unwrap();
        let options = naga::back::spv::Options { lang_version: (1, 3), ..Default::default() };
        let words = naga::back::spv::write_vec(&module, &info, &options, None)
            .unwrap_or_else(|error| panic!("{}: {error}", spec.name));
        assert_eq!(words[0], 0x0723_0203, "{}", spec.name);
    }
}

#[test]
fn tint_accepts_every_shader() {
    let tint =
        |arguments: &[&str]| Command::new("tint").args(arguments).current_dir(path("")).stdin(Stdio::null()).output();
    if tint(&["--help"]).is_err() {
        println!("tint: not run (not installed)");
        return;
    }
    for spec in REGISTRY {
        if spec.features.contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
            println!("tint: {} not run (an extension of wgpu's)", spec.name);
            continue;
        }
        let mut file = format!("shaders/{}.wgsl", spec.name);
        // What tint wants to see before subgroup operations, naga does not read.
        let folder = tempfile::tempdir().unwrap();
        if spec.features.contains(Features::SUBGROUP) {
            let enabled = folder.path().join(spec.name).with_extension("wgsl");
            std::fs::write(&enabled, format!("enable subgroups;\n{}", spec.source)).unwrap();
            file = enabled.to_str().unwrap().to_owned();
        }
        let output = tint(&["--format", "wgsl", &file]).unwrap();
        assert!(output.status.success(), "{file}: {}", String::from_utf8_lossy(&output.stderr));
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
    let outside = [path("src/bin"), path("src/check")];
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

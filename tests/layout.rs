//! Shaders, host modules and plans held against each other, without a GPU: naga reads what wgpu will run.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod translation;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use egmla::Error;
use egmla::adapter::{AdapterClass, COOPERATIVE_FEATURES, Cooperative, PlanContext, Tuning};
use egmla::kernels::attention_decode::SPLIT;
use egmla::kernels::attention_grouped::Widths;
use egmla::kernels::cache_append::Queries;
use egmla::kernels::matmul::Layout;
use egmla::kernels::{
    AttentionAbsorbed, AttentionCombine, AttentionDecode, AttentionGrouped, AttentionPrefill, CacheAppend, CacheCopy,
    CacheRead, Gate, Gather, Matmul, Norm, REGISTRY, RooflineCooperative, RooflineCopy, Rope, attention_grouped,
    attention_prefill, cache_read, shaders,
};
use egmla::op::{Access, Op, Spec, Variant};
use egmla::plan::{Grid, Plan};
use egmla::sample::{Sample, Sampled};
use egmla::storage::Storage;
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

fn parse(spec: &Spec) -> (naga::Module, ModuleInfo) {
    let module = naga::front::wgsl::parse_str(spec.source)
        .unwrap_or_else(|error| panic!("{}: {}", spec.name, error.emit_to_string(spec.source)));
    let info = validate(spec.name, &module);
    (module, info)
}

/// With no capability beyond those of every WebGPU device (packing and unpacking halves is the one that we use) and those
/// of the features that the kernel asks for. `kernel` begins with its name.
fn validate(kernel: &str, module: &naga::Module) -> ModuleInfo {
    let spec = shaders().find(|spec| kernel.split(' ').next() == Some(spec.name)).unwrap();
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

/// A plan that a shader can choose.
struct Case<'a> {
    sample: &'a dyn Sample,
    index: usize,
    spec: &'static Spec,
    context: &'a PlanContext,
    tuning: Tuning,
    plan: Plan,
}

impl Case<'_> {
    /// What it is, for the message of an assertion.
    fn what(&self) -> String {
        let subgroups = [self.context.subgroup_min_size, self.context.subgroup_max_size];
        format!("{} {:?} {subgroups:?} {:?} {:?}", self.spec.name, self.context.class, self.tuning, self.sample)
    }
}

fn tunings(spec: &Spec) -> impl Iterator<Item = Tuning> + use<> {
    std::iter::once(Tuning::Auto).chain((0..spec.tunings).map(Tuning::Forced))
}

/// Smallest and largest subgroups of the devices that a kernel tells apart.
fn subgroups(spec: &Spec) -> &'static [(u32, u32)] {
    match spec {
        // Whole subgroups, whatever the smallest.
        _ if spec.cooperative != Cooperative::NONE => &[(4, 4), (4, 8), (4, 16), (4, 32), (4, 64)],
        _ if spec.features.contains(Features::SUBGROUP) => {
            &[(4, 64), (8, 64), (16, 64), (32, 64), (64, 64), (128, 128)]
        }
        _ => &[(4, 64)],
    }
}

/// Every plan of every sample: each class of adapter, each size of its subgroups where they matter, each tuning, WebGPU's default
/// limits. Where a device offers more, plans are the same: see `larger_limits_change_no_plan`. A shader may refuse samples that
/// another takes; it may not refuse all, and none for a limit.
fn each_case(mut visit: impl FnMut(Case<'_>)) {
    for operation in REGISTRY {
        let samples = operation.samples();
        for (index, spec) in operation.shaders().into_iter().enumerate() {
            let mut planned = 0;
            for (class, &(subgroup_min_size, subgroup_max_size)) in
                CLASSES.into_iter().flat_map(|class| subgroups(spec).iter().map(move |sizes| (class, sizes)))
            {
                let context =
                    &PlanContext { subgroup_min_size, subgroup_max_size, ..PlanContext::webgpu_defaults(class) };
                for (sample, tuning) in
                    samples.iter().flat_map(|sample| tunings(spec).map(move |tuning| (sample, tuning)))
                {
                    match sample.plan(index, context, tuning) {
                        Ok(plan) => {
                            planned += 1;
                            visit(Case { sample: &**sample, index, spec, context, tuning, plan });
                        }
                        Err(Error::Problem { .. }) => {}
                        Err(error) => panic!("{} {class:?} {tuning:?} {sample:?}: {error}", spec.name),
                    }
                }
            }
            assert!(planned > 0, "{}: no sample", spec.name);
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
    let modules: BTreeMap<_, _> = shaders().map(|spec| (spec.name, parse(spec))).collect();
    let mut done: BTreeMap<&'static str, BTreeMap<Vec<u64>, (u32, u32)>> = BTreeMap::new();
    each_case(|case| {
        let (spec, plan) = (case.spec, &case.plan);
        let key = plan.overrides.iter().map(|(_, value)| value.to_bits()).collect();
        let planned = (plan.workgroup_size, plan.workgroup_bytes);
        let done = done.entry(spec.name).or_default();
        if let Some(before) = done.get(&key) {
            // The same shader, whatever the sizes.
            assert_eq!(*before, planned, "{}", case.what());
            return;
        }
        let what = case.what();
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
    });
    // Every tuning of every kernel was among them.
    for spec in shaders() {
        let settings = done[spec.name].len();
        assert!(settings >= spec.tunings, "{}: {settings} settings of {} tunings", spec.name, spec.tunings);
    }
    let settings: usize = done.values().map(BTreeMap::len).sum();
    println!("{settings} settings of {} shaders", done.len());
}

#[test]
fn defaults_of_the_shaders_fit_webgpus_limits() {
    for spec in shaders() {
        let (invocations, _, counted) = specialise(spec.name, &parse(spec), &[]);
        assert!(invocations <= 256 && counted <= 16384, "{}: {invocations} invocations, {counted} bytes", spec.name);
    }
}

#[test]
fn every_grid_covers_its_problem_and_no_more() {
    each_case(|case| {
        let plan = &case.plan;
        let grid = plan.grid.map(u64::from);
        assert!(grid.iter().all(|&groups| groups <= 65535), "{}: {grid:?}", case.what());
        match plan.covers {
            Grid::Folded { items, each } => {
                let needed = items.div_ceil(each.into());
                let groups = grid[0] * grid[1];
                assert!(groups >= needed, "{}: {grid:?} does not hold {needed}", case.what());
                assert!(groups - needed < grid[1], "{}: {grid:?} for {needed}", case.what());
                assert_eq!(grid[2], 1, "{}", case.what());
                // Elements, rows of LANES invocations, or a workgroup a row: a multiple of what an invocation has.
                let whole = u64::from(each)
                    <= u64::from(plan.workgroup_size) * plan.value("EACH").max(plan.value("ROWS")).max(1);
                assert!(whole, "{}: {each} for {} invocations", case.what(), plan.workgroup_size);
            }
            Grid::Tiled { size, tile } => {
                for axis in 0..3 {
                    assert_eq!(plan.grid[axis], size[axis].div_ceil(tile[axis]), "{}: axis {axis}", case.what());
                }
                assert_eq!(plan.tiles, plan.grid, "{}", case.what());
            }
            Grid::Columns { x, rows } => {
                assert_eq!(plan.grid[0], x, "{}", case.what());
                assert!(grid[1] * grid[2] >= rows.into() && plan.tiles == [0; 3], "{}", case.what());
            }
        }
    });
}

#[test]
fn plans_keep_what_their_shaders_assume() {
    each_case(|case| {
        let kept = case.sample.assumes(case.index, case.context, &case.plan);
        kept.unwrap_or_else(|assumption| panic!("{}: {assumption}: {:?}", case.what(), case.plan));
        if case.plan.overrides.iter().any(|(name, _)| *name == "SPLIT") {
            assert_eq!(case.plan.value("SPLIT"), u64::from(SPLIT), "{}", case.what());
        }
    });
}

/// The one answer to which shader runs: where all is offered and where nothing is, on every class of adapter.
#[test]
fn every_sample_has_a_shader_on_every_device() {
    let mut chosen = BTreeSet::new();
    for (class, size) in CLASSES.into_iter().flat_map(|class| [4, 8, 32].map(|size| (class, size))) {
        let bare = PlanContext { subgroup_min_size: size, ..PlanContext::webgpu_defaults(class) };
        let by = |cooperative| PlanContext { features: COOPERATIVE_FEATURES, cooperative, ..bare.clone() };
        for context in [bare.clone(), by(Cooperative::NONE), by(Cooperative::BY_16), by(Cooperative::BY_8)] {
            for operation in REGISTRY {
                for sample in operation.samples() {
                    match sample.chosen(&context) {
                        Ok((spec, plan)) => {
                            chosen.insert(spec.name);
                            let index = operation.shaders().iter().position(|other| other.name == spec.name).unwrap();
                            assert_eq!(sample.plan(index, &context, Tuning::Auto).unwrap(), plan, "{sample:?}");
                        }
                        // Tables that are made for registers, and matrices that only some devices have.
                        Err(Error::Problem { problem, .. }) => {
                            assert_eq!(problem, "no shader of it runs on this device", "{sample:?}");
                            assert!(
                                ["attention_grouped", "roofline_cooperative"].contains(&operation.name()),
                                "{sample:?}"
                            );
                        }
                        Err(error) => panic!("{sample:?}: {error}"),
                    }
                }
            }
        }
    }
    let all: BTreeSet<_> = shaders().map(|spec| spec.name).collect();
    assert_eq!(chosen, all, "a shader is preferred nowhere");
}

#[test]
fn plan_refuses_a_tuning_that_does_not_exist() {
    let context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
    for operation in REGISTRY {
        let sample = &operation.samples()[0];
        for (shader, spec) in operation.shaders().into_iter().enumerate() {
            for index in [spec.tunings, usize::MAX] {
                match sample.plan(shader, &context, Tuning::Forced(index)) {
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
}

/// Plans every kernel under smaller limits: what does not fit is refused with `needed` of the plan, the rest is unchanged.
fn refused(shrink: impl Fn(&mut Limits) -> u32, limit: &str, needed: impl Fn(&Plan) -> u32) -> usize {
    let mut refusals = 0;
    each_case(|case| {
        let mut small = case.context.clone();
        let allowed = shrink(&mut small.limits);
        let needed = needed(&case.plan);
        match case.sample.plan(case.index, &small, case.tuning) {
            Ok(same) => {
                assert!(needed <= allowed, "{}: {needed} was not refused", case.what());
                assert_eq!(same, case.plan, "{}", case.what());
            }
            Err(Error::Limit { what, needed: said, allowed: found, limit: name }) => {
                assert_eq!((said, found, name), (u64::from(needed), u64::from(allowed), limit), "{what}");
                assert!(needed > allowed, "{what}");
                assert!(what.starts_with(case.spec.name), "{what}");
                refusals += 1;
            }
            Err(other) => panic!("{}: {other}", case.what()),
        }
    });
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
    each_case(|case| {
        let large = PlanContext { limits: large_limits(), ..case.context.clone() };
        assert_eq!(case.sample.plan(case.index, &large, case.tuning).unwrap(), case.plan, "{}", case.what());
    });
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
}

/// The shader of a name.
fn shader<O: Op>(name: &str) -> &'static Variant<O> {
    O::VARIANTS.iter().find(|variant| variant.spec.name == name).unwrap_or_else(|| panic!("no shader {name}"))
}

/// Why a shader, or the operation itself, refuses a problem.
fn refusal<O: Op>(name: &str, op: O) -> String {
    let context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
    match shader(name).plan(&op, &context, Tuning::Auto) {
        Err(Error::Problem { kernel, problem }) => {
            assert!(kernel == name || kernel == O::NAME, "{kernel} for {name}");
            problem
        }
        other => panic!("{name}: {other:?}"),
    }
}

/// The sample of an operation that `like` picks.
fn sample<O: Sampled>(like: impl Fn(&O) -> bool) -> O {
    O::samples().into_iter().find(like).expect("a sample")
}

#[test]
fn plan_refuses_what_the_shaders_cannot_do() {
    let (f32, f16) = (Storage::F32, Storage::F16);
    let absorbed = sample(|op: &AttentionAbsorbed| op.d_latent == 7 && op.splits == 1);
    for (empty, expected) in [
        (AttentionAbsorbed { n_head: 0, ..absorbed }, "n_head is 0"),
        (AttentionAbsorbed { d_latent: 0, ..absorbed }, "d_latent is 0"),
        (AttentionAbsorbed { n_sequence: 0, ..absorbed }, "n_sequence is 0"),
    ] {
        assert_eq!(refusal("attention_absorbed", empty), expected);
    }
    for name in ["attention_absorbed_stream", "attention_absorbed_subgroup"] {
        assert!(refusal(name, absorbed).contains("must be multiples of 4"));
    }
    let decode = sample(|op: &AttentionDecode| op.d_nope == 3 && op.kv_rows == SPLIT);
    for (empty, expected) in [
        (AttentionDecode { n_head: 0, ..decode }, "n_head is 0"),
        (AttentionDecode { d_value: 0, ..decode }, "d_value is 0"),
        (AttentionDecode { n_sequence: 0, ..decode }, "n_sequence is 0"),
    ] {
        assert_eq!(refusal("attention_decode", empty), expected);
    }
    for rows in [1, SPLIT - 1, SPLIT + 1] {
        let expected = format!("kv_rows is {rows}, not a multiple of {SPLIT}");
        assert_eq!(refusal("attention_decode", AttentionDecode { kv_rows: rows, ..decode }), expected);
        let expected = format!("kv_first is {rows}, not a multiple of {SPLIT}");
        assert_eq!(refusal("attention_decode", AttentionDecode { kv_first: rows, ..decode }), expected);
    }
    assert!(refusal("attention_decode_vec4", decode).contains("must be whole 16-byte loads"));
    for (name, side) in [("roofline_cooperative", 16), ("roofline_cooperative_8", 8)] {
        let endless = RooflineCooperative { groups: 1, iterations: 65_535, side };
        let expected = "iterations is 65535, must be at most 65534: a loop over it is too long";
        assert_eq!(refusal(name, endless), expected);
        let other = RooflineCooperative { iterations: 1, side: 24 - side, ..endless };
        assert_eq!(refusal(name, other), format!("matrices of {0} × {0}, not of {1} × {1}", side, 24 - side));
    }
    // Halves are for layers of halves alone.
    let prefill = sample(|op: &AttentionPrefill| op.d_value == 4 && op.query_tiles == 1 && op.storage == Storage::F32);
    for name in ["attention_prefill_cooperative", "attention_prefill_cooperative_8"] {
        assert_eq!(refusal(name, prefill), "the cache must be stored in f16");
    }
    for name in ["matmul_cooperative", "matmul_cooperative_8"] {
        assert_eq!(refusal(name, Matmul::linear(32, 8, 8, false, f32)), "weights must be stored in f16");
    }
    for (empty, expected) in [
        (AttentionPrefill { n_head: 0, ..prefill }, "n_head is 0"),
        (AttentionPrefill { d_value: 0, ..prefill }, "d_value is 0"),
        (AttentionPrefill { n_sequence: 0, ..prefill }, "n_sequence is 0"),
        (AttentionPrefill { d_nope: 0, d_rope: 0, ..prefill }, "d_nope and d_rope are both 0"),
        (AttentionPrefill { tile_q: 33, ..prefill }, "tile_q is 33, must be one of [32, 64, 16]"),
    ] {
        for name in ["attention_prefill", "attention_prefill_rows"] {
            assert_eq!(refusal(name, empty), expected);
        }
    }
    for odd in [
        AttentionPrefill { d_nope: 6, ..prefill },
        AttentionPrefill { d_rope: 6, ..prefill },
        AttentionPrefill { d_value: 6, ..prefill },
    ] {
        assert!(refusal("attention_prefill", odd).contains("must be multiples of 4"));
    }
    // Widths beyond what eight invocations hold are another kernel's, and so are tilings of fewer groups.
    let whole = Widths { d_latent: 64, d_nope: 72, d_rope: 64, d_value: 128 };
    let tiled = AttentionGrouped { widths: whole, ..sample(|op: &AttentionGrouped| op.tiling.groups == 8) };
    let in_registers = shader::<AttentionGrouped>("attention_grouped_subgroup");
    in_registers.plan(&tiled, &PlanContext::webgpu_defaults(AdapterClass::Software), Tuning::Auto).unwrap();
    for widths in [
        Widths { d_latent: 65, ..whole },
        Widths { d_nope: 68, ..whole },
        Widths { d_rope: 66, ..whole },
        Widths { d_value: 136, ..whole },
        Widths { d_value: 100, ..whole },
    ] {
        let problem = refusal("attention_grouped_subgroup", AttentionGrouped { widths, ..tiled });
        assert!(problem.contains("latents and rotary keys go up to 64"), "{problem}");
        let mut context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
        (context.features, context.subgroup_min_size) = (in_registers.spec.features, in_registers.spec.subgroup);
        let other = attention_grouped::tiling(&context, widths).unwrap();
        assert!(other.groups < 8, "{widths:?}");
        let problem = refusal("attention_grouped_subgroup", AttentionGrouped { tiling: other, ..tiled });
        assert!(problem.contains("tiles of"), "{problem}");
    }
    let combine = AttentionCombine { tokens: 1, n_head: 1, width: 1, splits: 1 };
    assert_eq!(refusal("attention_combine", AttentionCombine { n_head: 0, ..combine }), "n_head is 0");
    assert_eq!(refusal("attention_combine", AttentionCombine { width: 0, ..combine }), "width is 0");
    let tile = sample(|op: &CacheRead| op.rows == 1);
    assert_eq!(refusal("cache_read", CacheRead { d_latent: 0, ..tile }), "d_latent is 0");
    assert_eq!(refusal("cache_read", CacheRead { n_sequence: 0, ..tile }), "n_sequence is 0");
    let normed = sample(|op: &Norm| op.rows == 1 && op.width == 3 && op.storage == Storage::F32);
    for name in ["norm", "norm_vec4"] {
        assert_eq!(refusal(name, Norm { width: 0, ..normed }), "width is 0");
    }
    for odd in [
        Norm { width: 6, ..normed },
        Norm { width: 8, second: 6, x_row: 16, ..normed },
        Norm { width: 8, x_row: 10, ..normed },
        Norm { width: 8, x_row: 8, x_offset: 2, ..normed },
        Norm { width: 12, x_row: 12, storage: f16, ..normed },
    ] {
        assert!(refusal("norm_vec4", odd).contains("16-byte"));
    }
    let gated = sample(|op: &Gate| op.rows == 1 && op.width == 3 && op.storage == Storage::F32);
    for name in ["gate", "gate_vec4"] {
        assert_eq!(refusal(name, Gate { width: 0, ..gated }), "width is 0");
    }
    for odd in [
        Gate { width: 6, ..gated },
        Gate { width: 8, x_row: 10, ..gated },
        Gate { width: 8, x_row: 8, x_offset: 1, ..gated },
        Gate { width: 12, x_row: 12, storage: f16, ..gated },
    ] {
        assert!(refusal("gate_vec4", odd).contains("16-byte"));
    }
    let append = sample(|op: &CacheAppend| op.tokens == 1 && op.d_latent == 24 && op.storage == Storage::F16);
    for name in ["cache_append", "cache_append_vec4"] {
        assert_eq!(refusal(name, CacheAppend { d_latent: 0, ..append }), "d_latent is 0");
    }
    let halves = CacheAppend { interleave: Some(false), ..append };
    for odd in [
        CacheAppend { d_latent: 20, ..append },
        CacheAppend { latent_row: 42, ..append },
        CacheAppend { rope_offset: 25, ..append },
        CacheAppend { d_rope: 8, ..halves },
        CacheAppend { rope_byte: append.rope_byte + 4, ..append },
        CacheAppend { queries: Queries { head: 22, ..append.queries }, ..append },
    ] {
        assert!(refusal("cache_append_vec4", odd).contains("16-byte"));
    }
    let table = Gather { rows: 1, width: 1, table_row: 1, vocab_size: 1, storage: f32 };
    assert_eq!(refusal("gather", Gather { width: 0, ..table }), "width is 0");
    assert_eq!(refusal("gather", Gather { vocab_size: 0, ..table }), "vocab_size is 0");
    let rope = sample(|op: &Rope| op.tokens == 1);
    assert_eq!(refusal("rope", Rope { d_rope: 3, ..rope }), "d_rope is 3, must be even");
    assert_eq!(refusal("roofline_copy", RooflineCopy { words: 6 }), "6 words, not a multiple of 4");
    for (words, from_word, to_word) in [(5, 0, 4), (5, 4, 0), (1, 7, 7)] {
        let expected = format!("{words} words from {from_word} to {to_word} overlap");
        assert_eq!(refusal("cache_copy", CacheCopy { words, from_word, to_word }), expected);
    }
    for (x, y) in [(2, 1), (1, 2), (0, 1)] {
        let strided = Matmul {
            x: Layout { inner: x, ..Layout::dense(8) },
            y: Layout { inner: y, ..Layout::dense(8) },
            ..Matmul::linear(8, 8, 8, false, f32)
        };
        for name in ["matmul", "matmul_gemv"] {
            assert!(refusal(name, strided).contains("contiguous"));
        }
    }
    // Elements are indexed with 32 bits.
    let huge = Gather { rows: u32::MAX, width: u32::MAX, table_row: u32::MAX, vocab_size: 1, storage: f32 };
    assert!(refusal("gather", huge).contains("2^31"));
}

/// An older software driver ends a loop after 65 535 iterations without a word. Loops over what a parameter tells are bound by
/// plans: each such loop of a shader walks what its plans bound.
#[test]
fn loops_over_parameters_are_those_that_plans_bound() {
    let mut bound: BTreeMap<&'static str, BTreeSet<&'static str>> = BTreeMap::new();
    each_case(|case| {
        let names = bound.entry(case.spec.name).or_default();
        names.extend(case.plan.loops.iter().map(|walked| walked.name));
        names.extend(case.sample.widths().map(|(name, _)| name));
        // Steps are what the overrides say.
        for walked in &case.plan.loops {
            let named = ["TILE_K", "LANES", "WORKGROUP"].map(|name| case.plan.value(name)).into_iter();
            let steps = named.flat_map(|step| [step, 4 * step]).chain([1, 4, 16, 64]);
            let of_matrices = case.spec.cooperative != Cooperative::NONE;
            assert!(
                of_matrices || steps.into_iter().any(|step| step == u64::from(walked.step)),
                "{}: {walked:?}",
                case.what()
            );
        }
    });
    let mut loops = 0;
    for spec in shaders() {
        for line in spec.source.lines().filter(|line| line.trim_start().starts_with("for (")) {
            for walked in line.split("params.").skip(1) {
                let end = walked.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(walked.len());
                // 16-byte loads and pitches of a row follow from its width.
                let name = walked[..end].trim_end_matches("_loads").trim_end_matches("_pitch");
                let names = &bound[spec.name];
                let known = names.contains(name) || names.contains(format!("d_{name}").as_str());
                assert!(known, "{}: nothing bounds `{}`: {names:?}", spec.name, line.trim());
                loops += 1;
            }
        }
    }
    assert!(loops > 20, "{loops} loops");
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
    let lacks = |context: &PlanContext| shader::<Matmul>("matmul_cooperative").spec.missing(context);
    assert_eq!(lacks(&context).as_deref(), Some("cooperative matrices of 16×16×16 f16"));
    context.cooperative = Cooperative::BY_8;
    assert!(lacks(&context).is_some() && shader::<Matmul>("matmul_cooperative_8").spec.missing(&context).is_none());
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
    for spec in shaders() {
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
    for spec in shaders() {
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

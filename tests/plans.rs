//! Every plan of every sample held against its shader and against WebGPU's limits, and what plans refuse, without a GPU.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod shaders;

use std::collections::{BTreeMap, BTreeSet};

use egmla::error::KernelError;
use egmla::low_level::kernels::attention_decode::{SPLIT, SPLITS, most_partials, split_length};
use egmla::low_level::kernels::attention_grouped::Widths;
use egmla::low_level::kernels::cache_append::Queries;
use egmla::low_level::kernels::matmul::Layout;
use egmla::low_level::kernels::{
    AttentionAbsorbed, AttentionCombine, AttentionDecode, AttentionGrouped, AttentionPrefill, CacheAppend, CacheCopy,
    CacheRead, Gate, Gather, Matmul, Norm, REGISTRY, RooflineCooperative, RooflineCopy, Rope, attention_absorbed,
    attention_decode, attention_grouped, shaders,
};
use egmla::low_level::{
    AdapterClass, COOPERATIVE_FEATURES, Cooperative, Grid, Op, Plan, PlanContext, Segments, Tuning, choose,
};
use egmla::wgpu::{CooperativeMatrixProperties, CooperativeScalarType, Features, Limits};
use egmla::{Error, Storage};
use naga::proc::Layouter;
use naga::valid::ModuleInfo;
use shaders::{CLASSES, each_case, large_limits, limits_for, parse, sample, shader, validate};

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
fn every_plan_specialises_its_shader_within_the_limits_it_is_made_for() {
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
        let limits = limits_for(spec);
        assert!(counted <= limits.max_compute_workgroup_storage_size, "{what}: {counted} bytes");
        assert!(invocations <= limits.max_compute_invocations_per_workgroup, "{what}");
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
        // One takes more at its narrowest, of a matrix for each of eight subgroups: 8 KiB of sums, 6 KiB of each factor.
        let allowed = if spec.name == "attention_grouped_cooperative" { 24 << 10 } else { 16 << 10 };
        assert!(invocations <= 256 && counted <= allowed, "{}: {invocations} invocations, {counted} bytes", spec.name);
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
            assert!(SPLITS.map(u64::from).contains(&case.plan.value("SPLIT")), "{}", case.what());
        }
    });
}

/// Rows that 16 heads meet in a step, and the split length on each class: batch 1 leaves a GPU empty, batch 32 does not.
#[test]
fn splits_follow_what_a_device_needs_to_be_full() {
    let bare = PlanContext::webgpu_defaults;
    let with = |class| PlanContext { features: Features::SUBGROUP, ..bare(class) };
    let lengths = |batch: u64, cached: u64| CLASSES.map(|class| split_length(&with(class), batch * cached, 4));
    // A workgroup without subgroups has too few invocations for a short split.
    assert_eq!(CLASSES.map(|class| split_length(&bare(class), 4096, 4)), [256; 4]);
    assert_eq!(CLASSES.map(|class| most_partials(&bare(class), 4, 1, 16, 64)), [16; 4]);
    assert_eq!(CLASSES.map(AdapterClass::full), [1, 64, 512, 256]);
    // 4 096 rows in 16, 32 or 64 splits of four groups of heads.
    assert_eq!(lengths(1, 4096), [256, 256, 64, 64]);
    assert_eq!(lengths(1, 1024), [256, 64, 64, 64]);
    assert_eq!(lengths(1, 32_768), [256; 4]);
    assert_eq!(lengths(32, 8192), [256; 4]);
    for class in CLASSES {
        for (met, n_head) in
            [0, 1, 63, 256, 4000, 70_000, 1 << 20].into_iter().flat_map(|met| [1, 3, 16, 63, 128].map(|n| (met, n)))
        {
            let split = split_length(&with(class), met, attention_absorbed::workgroups(n_head));
            let teams = |split: u32| met.div_ceil(split.into()) * u64::from(n_head.div_ceil(4));
            // No longer than a full device allows, and no shorter than it needs.
            assert!(split == 64 || teams(split) >= class.full().into(), "{class:?} {met} {n_head}: {split}");
            assert!(split == 256 || teams(2 * split) < class.full().into(), "{class:?} {met} {n_head}: {split}");
            let [longest, shortest] = [256, 64].map(|split| met.div_ceil(split));
            let most = most_partials(&with(class), attention_absorbed::workgroups(n_head), 1, longest, shortest);
            assert!(met.div_ceil(split.into()) <= most, "{class:?} {met} {n_head}: {most} partial results");
        }
    }
}

/// Query heads that share keys and values share workgroups, as many as the plan has: splits are counted with those.
#[test]
fn splits_follow_the_workgroups_of_groups_of_heads() {
    let with = |class| PlanContext { features: Features::SUBGROUP, ..PlanContext::webgpu_defaults(class) };
    let decode = sample(|op: &AttentionDecode| op.kv_rows == SPLIT && op.kv_storage == Storage::F16);
    for (n_head, n_kv_head, counts) in [
        // Up to 4 heads share a workgroup in software, up to 8 on a GPU if a group has more than 4.
        (1, 1, [1; 4]),
        (12, 12, [12; 4]),
        (9, 3, [3; 4]),
        (32, 8, [8; 4]),
        (63, 9, [18, 9, 9, 9]),
        (128, 8, [32, 16, 16, 16]),
        (9, 1, [3, 2, 2, 2]),
    ] {
        let counted = CLASSES.map(|class| attention_decode::workgroups(&with(class), n_head, n_kv_head));
        assert_eq!(counted, counts, "{n_head} over {n_kv_head}");
        let kv_pitch = n_kv_head * (decode.d_nope + decode.d_value);
        let op = AttentionDecode { n_head, n_kv_head, kv_pitch, ..decode };
        for (class, count) in CLASSES.into_iter().zip(counts) {
            let plan = choose(&op, &with(class)).unwrap().1;
            assert_eq!(plan.grid, [SPLIT / op.split, count, 1], "{n_head} over {n_kv_head} on {class:?}");
        }
    }
    // Four times the heads over the same keys and values are no more work to spread.
    let length = |n_head, n_kv_head| {
        CLASSES.map(|class| {
            let context = with(class);
            split_length(&context, 8192, attention_decode::workgroups(&context, n_head, n_kv_head))
        })
    };
    assert_eq!(length(32, 32), [256; 4]);
    assert_eq!(length(32, 8), [256, 256, 128, 256]);
    assert_eq!(length(9, 3), [256, 256, 64, 64]);
}

/// The one answer to which shader runs: where all is offered and where nothing is, on every class of adapter.
#[test]
fn every_sample_has_a_shader_on_every_device() {
    let mut chosen = BTreeSet::new();
    for (class, size) in CLASSES.into_iter().flat_map(|class| [4, 8, 32].map(|size| (class, size))) {
        let bare = PlanContext { subgroup_min_size: size, ..PlanContext::webgpu_defaults(class) };
        let by = |cooperative| PlanContext { features: COOPERATIVE_FEATURES, cooperative, ..bare.clone() };
        // Devices with matrices offer more workgroup memory, too.
        let all = |cooperative| PlanContext { limits: large_limits(), ..by(cooperative) };
        for context in [bare.clone(), by(Cooperative::NONE), all(Cooperative::BY_16), all(Cooperative::BY_8)] {
            for operation in REGISTRY {
                for sample in operation.samples() {
                    match sample.chosen(&context) {
                        Ok((spec, plan)) => {
                            chosen.insert(spec.name);
                            let index = operation.shaders().iter().position(|other| other.name == spec.name).unwrap();
                            assert_eq!(sample.plan(index, &context, Tuning::Auto).unwrap(), plan, "{sample:?}");
                        }
                        // Tables that are made for registers, and matrices that only some devices have.
                        Err(Error::Kernel(KernelError::Problem { problem, .. })) => {
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
                    Err(Error::Kernel(KernelError::Problem { kernel, problem })) => {
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

/// Why a shader, or the operation itself, refuses a problem.
fn refusal<O: Op>(name: &str, op: O) -> String {
    let context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
    match shader(name).plan(&op, &context, Tuning::Auto) {
        Err(Error::Kernel(KernelError::Problem { kernel, problem })) => {
            assert!(kernel == name || kernel == O::NAME, "{kernel} for {name}");
            problem
        }
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn plan_refuses_what_the_shaders_cannot_do() {
    let f32 = Storage::F32;
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
    let decode = sample(|op: &AttentionDecode| op.d_rope == 0 && op.kv_rows == SPLIT && op.kv_storage == Storage::F16);
    for (empty, expected) in [
        (AttentionDecode { n_head: 0, ..decode }, "n_head is 0"),
        (AttentionDecode { d_value: 0, ..decode }, "d_value is 0"),
        (AttentionDecode { n_sequence: 0, ..decode }, "n_sequence is 0"),
        (AttentionDecode { n_kv_head: 0, ..decode }, "n_head is 1, must be a multiple of n_kv_head, which is 0"),
        (
            AttentionDecode { n_head: 9, n_kv_head: 2, ..decode },
            "n_head is 9, must be a multiple of n_kv_head, which is 2",
        ),
        (AttentionDecode { kv_pitch: 8, ..decode }, "kv_pitch is 8, rows have 16 elements"),
        (AttentionDecode { kv_pitch: 20, ..decode }, "kv_pitch is 20, must be a multiple of 8"),
    ] {
        assert_eq!(refusal("attention_decode", empty), expected);
    }
    for split in [0, 1, 96, 512] {
        let expected = format!("split is {split}, must be one of [256, 128, 64]");
        let wrong = AttentionDecode { split, ..decode };
        assert_eq!(refusal("attention_decode", wrong), expected);
        // Counted all the same, by whoever asks.
        assert!(wrong.cost().flops > 0);
    }
    for rows in [1, SPLIT - 1, SPLIT + 1] {
        let expected = format!("kv_rows is {rows}, not a multiple of {SPLIT}");
        assert_eq!(refusal("attention_decode", AttentionDecode { kv_rows: rows, ..decode }), expected);
        let expected = format!("kv_first is {rows}, not a multiple of {SPLIT}");
        assert_eq!(refusal("attention_decode", AttentionDecode { kv_first: rows, ..decode }), expected);
    }
    assert_eq!(
        refusal("attention_decode", AttentionDecode { d_nope: 12, ..decode }),
        "d_nope is 12, must be a multiple of 8"
    );
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
    // Results in halves.
    let halves = Matmul { y_storage: Storage::F16, ..Matmul::linear(8, 8, 8, false, f32) };
    for name in ["matmul", "matmul_subgroup", "matmul_gemv", "matmul_gemv_vec4", "matmul_gemv_subgroup"] {
        for op in [halves, Matmul { x_storage: Storage::F16, y_storage: f32, ..halves }] {
            assert_eq!(refusal(name, op), "x and y must be stored in f32");
        }
    }
    for odd in [
        Matmul { cols: 7, ..halves },
        Matmul { y: Layout { offset: 1, ..halves.y }, ..halves },
        Matmul { y: Layout { row: 9, ..halves.y }, ..halves },
        Matmul { y: Layout { batch: 3, ..halves.y }, ..halves },
    ] {
        assert_eq!(refusal("matmul_vec4", odd), "rows of y in f16 must be whole words");
    }
    for x in [Layout { row: 9, ..halves.x }, Layout { offset: 4, ..halves.x }] {
        let odd = Matmul { x, x_storage: Storage::F16, ..halves };
        assert!(refusal("matmul_vec4", odd).starts_with("rows of x and w must be whole 16-byte loads"));
    }
    for name in ["matmul_cooperative", "matmul_cooperative_8"] {
        assert_eq!(refusal(name, Matmul::linear(32, 8, 8, false, f32)), "weights must be stored in f16");
    }
    for (empty, expected) in [
        (AttentionPrefill { n_head: 0, ..prefill }, "n_head is 0"),
        (AttentionPrefill { d_value: 0, ..prefill }, "d_value is 0"),
        (AttentionPrefill { n_sequence: 0, ..prefill }, "n_sequence is 0"),
        (AttentionPrefill { n_kv_head: 3, ..prefill }, "n_head is 1, must be a multiple of n_kv_head, which is 3"),
        (AttentionPrefill { d_nope: 0, d_rope: 0, ..prefill }, "d_nope and d_rope are both 0"),
        (AttentionPrefill { tile_q: 33, ..prefill }, "tile_q is 33, must be one of [32, 64, 16]"),
    ] {
        assert_eq!(refusal("attention_prefill", empty), expected);
    }
    for odd in [
        AttentionPrefill { d_nope: 6, ..prefill },
        AttentionPrefill { d_rope: 6, ..prefill },
        AttentionPrefill { d_value: 6, ..prefill },
    ] {
        assert!(refusal("attention_prefill", odd).contains("is 6, must be a multiple of 4"));
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
    let combine = AttentionCombine { tokens: 1, n_head: 1, width: 4, splits: 1 };
    assert_eq!(refusal("attention_combine", AttentionCombine { n_head: 0, ..combine }), "n_head is 0");
    assert_eq!(refusal("attention_combine", AttentionCombine { width: 0, ..combine }), "width is 0");
    let odd = AttentionCombine { width: 6, ..combine };
    assert_eq!(refusal("attention_combine", odd), "width is 6, must be a multiple of 4");
    let tile = sample(|op: &CacheRead| op.rows == 1);
    assert_eq!(refusal("cache_read", CacheRead { d_latent: 0, ..tile }), "d_latent is 0");
    assert_eq!(refusal("cache_read", CacheRead { n_sequence: 0, ..tile }), "n_sequence is 0");
    let normed = sample(|op: &Norm| op.rows == 1 && op.width == 3 && op.storage == Storage::F32);
    assert_eq!(refusal("norm", Norm { width: 0, ..normed }), "width is 0");
    assert_eq!(refusal("norm", Norm { x_row: 10, ..normed }), "x_row is 10, must be a multiple of 4");
    assert_eq!(refusal("norm", Norm { x_offset: 2, ..normed }), "x_offset is 2, must be a multiple of 4");
    let gated = sample(|op: &Gate| op.rows == 1 && op.segments == Segments::one(3) && op.storage == Storage::F32);
    assert_eq!(refusal("gate", Gate { segments: Segments::one(0), ..gated }), "width is 0");
    assert_eq!(refusal("gate", Gate { segments: Segments::default(), ..gated }), "count is 0");
    assert_eq!(refusal("gate", Gate { x_row: 10, ..gated }), "x_row is 10, must be a multiple of 4");
    assert_eq!(refusal("gate", Gate { x_offset: 1, ..gated }), "x_offset is 1, must be a multiple of 4");
    let append = sample(|op: &CacheAppend| op.tokens == 1 && op.d_latent == 24 && op.storage == Storage::F16);
    assert_eq!(refusal("cache_append", CacheAppend { d_latent: 0, ..append }), "d_latent is 0");
    for (odd, number) in [
        (CacheAppend { d_latent: 20, ..append }, "d_latent is 20"),
        (CacheAppend { d_rope: 12, ..append }, "d_rope is 12"),
        (CacheAppend { row: 42, ..append }, "row is 42"),
        (CacheAppend { rope_offset: 25, ..append }, "rope_offset is 25"),
        (CacheAppend { queries: Queries { d_nope: 22, ..append.queries }, ..append }, "d_nope is 22"),
    ] {
        assert!(refusal("cache_append", odd).starts_with(&format!("{number}, must be a multiple of")));
    }
    let behind = CacheAppend { rope_byte: append.rope_byte + 4, ..append };
    assert!(refusal("cache_append", behind).starts_with("rotary keys begin at byte"));
    let table = Gather { rows: 1, width: 1, table_row: 1, first_id: 0, vocab_size: 1, storage: f32 };
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
    let huge = Gather { rows: u32::MAX, width: u32::MAX, table_row: u32::MAX, ..table };
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
            let named = ["TILE_K", "LANES", "COLUMN_LANES", "WORKGROUP"].map(|name| case.plan.value(name)).into_iter();
            let steps = named.flat_map(|step| [step, 4 * step]).chain([1, 4, 16, 64]);
            let of_matrices = case.spec.cooperative != Cooperative::NONE;
            assert!(
                of_matrices || steps.into_iter().any(|step| step == u64::from(walked.step)),
                "{}: {walked:?}",
                case.what()
            );
        }
    });
    let (mut loops, mut searches) = (0, 0);
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
        // Whatever else turns ends by itself: what is left of a table halves.
        let begins = |word: &str| spec.source.lines().filter(|line| line.trim_start().starts_with(word)).count();
        let halves = "while (high - low > 1u) {\n        let middle = (low + high) / 2u;\n";
        let halving = spec.source.matches(halves).count();
        assert_eq!((begins("while"), begins("loop")), (halving, 0), "{}: a loop that nothing bounds", spec.name);
        searches += halving;
    }
    assert!(loops > 20 && searches > 5, "{loops} loops, {searches} searches");
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

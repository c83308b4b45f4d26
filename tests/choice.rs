//! Which shader runs: the one answer site, on every class of adapter.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use egmla::attention::cost::{DecodeWork, decode_time, faster_path};
use egmla::bench::paper_120m;
use egmla::low_level::kernels::attention_grouped::{Tiling, Widths};
use egmla::low_level::kernels::attention_prefill::{QUERY_TILES, tile_q};
use egmla::low_level::kernels::matmul::Layout;
use egmla::low_level::kernels::{
    AttentionAbsorbed, AttentionDecode, AttentionGrouped, AttentionPrefill, Matmul, RooflineCooperative, shaders,
};
use egmla::low_level::{
    AdapterClass, COOPERATIVE_FEATURES, Cooperative, Op, PlanContext, Sampled, Tuning, Tunings, choose,
};
use egmla::{DecodePath, Storage, wgpu};

const NONE: wgpu::Features = wgpu::Features::empty();
const SUBGROUP: wgpu::Features = wgpu::Features::SUBGROUP;

fn context(class: AdapterClass, features: wgpu::Features, subgroup_min_size: u32) -> PlanContext {
    PlanContext { features, subgroup_min_size, ..PlanContext::webgpu_defaults(class) }
}

/// Name of the shader that runs.
fn chosen<O: Op>(op: &O, context: &PlanContext) -> &'static str {
    choose(op, context).unwrap_or_else(|error| panic!("{op:?}: {error}")).0.spec.name
}

#[test]
fn products_go_by_rows_loads_and_device() {
    let product = |class, features, rows, inner, storage| {
        let context = PlanContext { features, ..PlanContext::webgpu_defaults(class) };
        chosen(&Matmul::linear(rows, inner, 64, false, storage), &context)
    };
    for class in AdapterClass::ALL {
        // 12 halves are no whole number of 16-byte loads.
        for (inner, storage) in [(0, Storage::F32), (6, Storage::F32), (12, Storage::F16)] {
            assert_eq!(product(class, SUBGROUP, 8, inner, storage), "matmul_gemv");
            assert_eq!(product(class, SUBGROUP, 9, inner, storage), "matmul");
        }
        assert_eq!(product(class, NONE, 1, 12, Storage::F32), "matmul_gemv_vec4");
        assert_eq!(product(class, NONE, 8, 16, Storage::F16), "matmul_gemv_vec4");
        assert_eq!(product(class, NONE, 9, 16, Storage::F16), "matmul_vec4");
    }
    let software = |rows| product(AdapterClass::Software, SUBGROUP, rows, 16, Storage::F32);
    assert_eq!([software(1), software(2)], ["matmul_gemv_vec4", "matmul_subgroup"]);
    let discrete = |rows| product(AdapterClass::Discrete, SUBGROUP, rows, 16, Storage::F32);
    assert_eq!([discrete(1), discrete(9)], ["matmul_gemv_subgroup", "matmul_vec4"]);
}

#[test]
fn cooperative_matrices_multiply_halves_where_they_are_offered() {
    let product = |class, cooperative, features, rows, storage| {
        let context = PlanContext { features, cooperative, ..PlanContext::webgpu_defaults(class) };
        chosen(&Matmul::linear(rows, 16, 64, false, storage), &context)
    };
    let both = Cooperative { by_16: true, by_8: true };
    for class in [AdapterClass::Integrated, AdapterClass::Discrete, AdapterClass::Apple] {
        for (cooperative, kernel) in [
            (Cooperative::NONE, "matmul_vec4"),
            (Cooperative::BY_8, "matmul_cooperative_8"),
            (Cooperative::BY_16, "matmul_cooperative"),
            (both, "matmul_cooperative"),
        ] {
            assert_eq!(product(class, cooperative, COOPERATIVE_FEATURES, 32, Storage::F16), kernel);
            // Never for f32 weights, few rows, or a device that was opened without the features.
            assert_eq!(product(class, cooperative, COOPERATIVE_FEATURES, 32, Storage::F32), "matmul_vec4");
            assert_eq!(product(class, cooperative, COOPERATIVE_FEATURES, 31, Storage::F16), "matmul_vec4");
            assert_eq!(product(class, cooperative, wgpu::Features::SHADER_F16, 32, Storage::F16), "matmul_vec4");
        }
    }
    // A software adapter gains nothing by them.
    assert_eq!(product(AdapterClass::Software, both, COOPERATIVE_FEATURES, 32, Storage::F16), "matmul_subgroup");
    // Four subgroups of 128 do not fit WebGPU's workgroups of 256.
    let wide = PlanContext {
        features: COOPERATIVE_FEATURES,
        cooperative: both,
        subgroup_max_size: 128,
        ..PlanContext::webgpu_defaults(AdapterClass::Discrete)
    };
    assert_eq!(chosen(&Matmul::linear(32, 16, 64, false, Storage::F16), &wide), "matmul_vec4");
}

/// As large as workgroup memory and the number of workgroups allow.
#[test]
fn tiles_of_matrices_follow_the_shape_and_the_workgroup_memory() {
    let tile = |class, workgroup_bytes: u32, [rows, cols]: [u32; 2], cooperative| {
        let mut context =
            PlanContext { features: COOPERATIVE_FEATURES, cooperative, ..PlanContext::webgpu_defaults(class) };
        context.limits.max_compute_workgroup_storage_size = workgroup_bytes << 10;
        (context.subgroup_min_size, context.subgroup_max_size) = (32, 32);
        let plan = choose(&Matmul::linear(rows, 64, cols, false, Storage::F16), &context).unwrap().1;
        assert!(
            plan.workgroup_bytes <= workgroup_bytes << 10
                && plan.workgroup_size == 32 * 2 * plan.value("ACROSS") as u32
        );
        let [cols, rows, _] = plan.tile();
        ([rows, cols], plan.value("STAGES"))
    };
    let discrete =
        |workgroup_bytes, extents| tile(AdapterClass::Discrete, workgroup_bytes, extents, Cooperative::BY_16);
    let (large, middle, small) = ([4096, 4096], [1024, 2048], [64, 768]);
    assert_eq!([large, middle, small].map(|of| discrete(48, of)), [([128, 256], 2), ([128, 128], 2), ([64, 64], 2)]);
    assert_eq!([large, middle, small].map(|of| discrete(32, of)), [([128, 128], 2), ([128, 128], 2), ([64, 64], 2)]);
    // WebGPU's default.
    assert_eq!([large, middle, small].map(|of| discrete(16, of)), [([128, 128], 1), ([128, 128], 1), ([64, 64], 2)]);
    // Fewer workgroups fill a smaller GPU.
    let integrated = |extents| tile(AdapterClass::Integrated, 48, extents, Cooperative::BY_16);
    assert_eq!([middle, small].map(integrated), [([128, 256], 2), ([64, 64], 2)]);
    let apple = |extents| tile(AdapterClass::Apple, 32, extents, Cooperative::BY_8);
    assert_eq!([large, [256, 1024], small].map(apple), [([64, 128], 2), ([64, 64], 2), ([32, 32], 2)]);
}

/// 1 024³ of f32 is too small for the largest tiles of a discrete GPU: smaller ones, each summed in parts.
#[test]
fn products_of_f32_fill_the_device() {
    let tile = |class, size| {
        let plan = choose(&Matmul::linear(size, 64, size, false, Storage::F32), &context(class, NONE, 4)).unwrap().1;
        (plan.tile()[0], plan.value("PARTS"), plan.workgroup_size)
    };
    assert_eq!([1024, 2048].map(|size| tile(AdapterClass::Discrete, size)), [(64, 4, 256), (128, 1, 256)]);
    assert_eq!(tile(AdapterClass::Software, 1024), (128, 1, 256));
    assert_eq!([AdapterClass::Integrated, AdapterClass::Apple].map(|class| tile(class, 1024)), [(64, 1, 64); 2]);
}

#[test]
fn products_in_halves_have_a_shader_on_every_device() {
    for class in AdapterClass::ALL {
        for (rows, storage) in [1, 8, 40].into_iter().flat_map(|rows| Storage::ALL.map(|storage| (rows, storage))) {
            let op = Matmul::linear(rows, 16, 64, false, storage);
            for op in [Matmul { x_storage: Storage::F16, ..op }, Matmul { y_storage: Storage::F16, ..op }] {
                assert_eq!(chosen(&op, &context(class, SUBGROUP, 8)), "matmul_vec4");
            }
        }
    }
}

#[test]
fn operands_suit_16_byte_loads_only_where_every_step_does() {
    let dense = Matmul::linear(2, 16, 8, false, Storage::F16);
    assert!(dense.in_vec4());
    let x = |x| Matmul { x, ..dense };
    let w = |w| Matmul { w, ..dense };
    let step = Layout::dense(16);
    assert!(x(Layout { offset: 4, row: 20, batch: 12, ..step }).in_vec4());
    assert!(!x(Layout { offset: 2, ..step }).in_vec4());
    assert!(!x(Layout { row: 18, ..step }).in_vec4());
    assert!(!x(Layout { batch: 1, ..step }).in_vec4());
    assert!(!w(Layout { offset: 4, ..step }).in_vec4());
    assert!(!w(Layout { row: 20, ..step }).in_vec4());
    assert!(!w(Layout { batch: 4, ..step }).in_vec4());
    assert!(!w(Layout { inner: 8, row: 1, ..step }).in_vec4());
    assert!(w(Layout { offset: 8, row: 24, batch: 8, ..step }).in_vec4());
}

fn prefill_of(tokens: u32, query_tiles: u32, n_head: u32, [d_nope, d_rope, d_value]: [u32; 3]) -> AttentionPrefill {
    AttentionPrefill {
        tokens,
        query_tiles,
        tile_q: QUERY_TILES[0],
        n_sequence: 1,
        n_head,
        n_kv_head: n_head,
        d_nope,
        d_rope,
        d_value,
        kv_first: 0,
        kv_rows: 9,
        cache_rows: 9,
        first: true,
        last: true,
        scale: 1.0,
        weights: Storage::F32,
        storage: Storage::F16,
        kv: Storage::F32,
    }
}

fn absorbed_of(d_latent: u32) -> AttentionAbsorbed {
    AttentionAbsorbed {
        split: 256,
        tokens: 1,
        most_tokens: 1,
        n_sequence: 1,
        splits: 1,
        partials: 1,
        n_head: 1,
        d_latent,
        d_nope: 8,
        d_rope: 8,
        cache_rows: 256,
        scale: 1.0,
        weights: Storage::F32,
        storage: Storage::F16,
    }
}

#[test]
fn cooperative_matrices_decode_halves_of_many_heads_where_workgroup_memory_holds_them() {
    let of = |class, cooperative, workgroup_bytes, op: AttentionAbsorbed| {
        let mut context =
            PlanContext { features: COOPERATIVE_FEATURES, cooperative, ..PlanContext::webgpu_defaults(class) };
        context.limits.max_compute_workgroup_storage_size = workgroup_bytes;
        (context.subgroup_min_size, context.subgroup_max_size) = (32, 32);
        let (variant, plan) = choose(&op, &context).unwrap();
        (variant.spec.name, plan.value("TILE"))
    };
    let halves = AttentionAbsorbed { n_head: 16, d_rope: 64, weights: Storage::F16, ..absorbed_of(512) };
    // Sixteen heads in a workgroup of as many subgroups, where memory and invocations allow.
    let apple = |n_head, kibibytes: u32, invocations| {
        let mut context = PlanContext {
            features: COOPERATIVE_FEATURES,
            cooperative: Cooperative::BY_8,
            ..PlanContext::webgpu_defaults(AdapterClass::Apple)
        };
        context.limits.max_compute_workgroup_storage_size = kibibytes << 10;
        context.limits.max_compute_invocations_per_workgroup = invocations;
        context.limits.max_compute_workgroup_size_x = invocations;
        (context.subgroup_min_size, context.subgroup_max_size) = (32, 32);
        let plan = choose(&AttentionAbsorbed { n_head, ..halves }, &context).unwrap().1;
        [plan.value("HEADS"), plan.value("WORKGROUP"), plan.workgroup_bytes.into()]
    };
    for n_head in [9, 16, 128] {
        assert_eq!(apple(n_head, 32, 1024), [16, 512, 29_792]);
        assert_eq!([apple(n_head, 28, 1024), apple(n_head, 32, 511)].map(|[heads, ..]| heads), [8, 8]);
    }
    assert_eq!(apple(8, 32, 1024)[0], 8);
    let both = Cooperative { by_16: true, by_8: true };
    for class in [AdapterClass::Integrated, AdapterClass::Discrete, AdapterClass::Apple] {
        // A device opened with what its adapter has; with WebGPU's 16 KiB.
        assert_eq!(of(class, both, 32 << 10, halves), ("attention_absorbed_cooperative", 16));
        assert_eq!(of(class, Cooperative::BY_16, 16 << 10, halves).0, "attention_absorbed_stream");
        assert_eq!(of(class, both, 16 << 10, halves), ("attention_absorbed_cooperative_8", 8));
        assert_eq!(of(class, Cooperative::BY_8, 32 << 10, halves), ("attention_absorbed_cooperative_8", 8));
        // Narrow rows fit 16 KiB.
        let narrow = AttentionAbsorbed { d_latent: 128, d_rope: 32, ..halves };
        assert_eq!(of(class, both, 48 << 10, narrow), ("attention_absorbed_cooperative", 32));
        assert_eq!(of(class, both, 16 << 10, narrow).0, "attention_absorbed_cooperative");
        for other in [
            AttentionAbsorbed { n_head: 4, ..halves },
            AttentionAbsorbed { weights: Storage::F32, ..halves },
            AttentionAbsorbed { weights: Storage::F32, storage: Storage::F32, ..halves },
        ] {
            assert_eq!(of(class, both, 48 << 10, other).0, "attention_absorbed_stream", "{other:?}");
        }
        // More than registers hold, of matrices and of lanes.
        let wide = AttentionAbsorbed { d_latent: 640, ..halves };
        assert_eq!(of(class, both, 48 << 10, wide).0, "attention_absorbed");
        assert_eq!(of(class, Cooperative::NONE, 48 << 10, halves).0, "attention_absorbed_stream");
    }
    assert_eq!(of(AdapterClass::Software, both, 48 << 10, halves).0, "attention_absorbed_subgroup");
}

#[test]
fn cooperative_matrices_decode_halves_by_groups_where_workgroup_memory_holds_them() {
    let paper = Widths { d_latent: 64, d_nope: 64, d_rope: 64, d_value: 64 };
    let halves = AttentionGrouped {
        n_head: 12,
        widths: paper,
        tiling: Tiling { groups: 8, span: 1 },
        storage: Storage::F16,
        cache_storage: Storage::F16,
        ..AttentionGrouped::samples()[0]
    };
    let of = |class, cooperative, workgroup_bytes, op: AttentionGrouped| {
        let mut context =
            PlanContext { features: COOPERATIVE_FEATURES, cooperative, ..PlanContext::webgpu_defaults(class) };
        context.limits.max_compute_workgroup_storage_size = workgroup_bytes;
        (context.subgroup_min_size, context.subgroup_max_size) = (32, 32);
        chosen(&op, &context)
    };
    let both = Cooperative { by_16: true, by_8: true };
    for class in [AdapterClass::Integrated, AdapterClass::Discrete, AdapterClass::Apple] {
        assert_eq!(of(class, both, 48 << 10, halves), "attention_grouped_cooperative");
        assert_eq!(of(class, both, 32 << 10, halves), "attention_grouped_cooperative_8");
        assert_eq!(of(class, Cooperative::BY_8, 32 << 10, halves), "attention_grouped_cooperative_8");
        assert_eq!(of(class, Cooperative::BY_16, 32 << 10, halves), "attention_grouped_subgroup");
        // Heads of 24 are three matrices of 8 × 8, and none of 16 × 16.
        let odd = AttentionGrouped { widths: Widths { d_value: 24, ..paper }, ..halves };
        assert_eq!(of(class, both, 48 << 10, odd), "attention_grouped_cooperative_8");
        let wide = AttentionGrouped { widths: Widths { d_nope: 128, ..paper }, ..halves };
        assert_eq!(of(class, both, 48 << 10, wide), "attention_grouped_cooperative_8");
        for other in [
            AttentionGrouped { storage: Storage::F32, ..halves },
            AttentionGrouped { cache_storage: Storage::F32, ..halves },
            AttentionGrouped { tiling: Tiling { groups: 8, span: 2 }, ..halves },
        ] {
            assert_eq!(of(class, both, 48 << 10, other), "attention_grouped_subgroup", "{other:?}");
        }
        assert_eq!(of(class, Cooperative::NONE, 48 << 10, halves), "attention_grouped_subgroup");
        assert_eq!(of(class, both, 16 << 10, halves), "attention_grouped_subgroup");
    }
    assert_eq!(of(AdapterClass::Software, both, 48 << 10, halves), "attention_grouped_subgroup");
}

#[test]
fn cooperative_matrices_attend_in_smaller_tiles_where_workgroup_memory_is_less() {
    let of = |cooperative, workgroup_bytes, op: AttentionPrefill| {
        let class = AdapterClass::Discrete;
        let mut context =
            PlanContext { features: COOPERATIVE_FEATURES, cooperative, ..PlanContext::webgpu_defaults(class) };
        context.limits.max_compute_workgroup_storage_size = workgroup_bytes;
        (context.subgroup_min_size, context.subgroup_max_size) = (32, 32);
        let (variant, plan) = choose(&op, &context).unwrap();
        (variant.spec.name, plan.value("QUERIES"), plan.value("TILE"))
    };
    let op = AttentionPrefill { tile_q: 64, weights: Storage::F16, ..prefill_of(64, 1, 3, [128, 0, 128]) };
    let with_rope = AttentionPrefill { d_rope: 64, ..op };
    let both = Cooperative { by_16: true, by_8: true };
    for kv in Storage::ALL {
        let (op, with_rope) = (AttentionPrefill { kv, ..op }, AttentionPrefill { kv, ..with_rope });
        assert_eq!(of(both, 48 << 10, with_rope), ("attention_prefill_cooperative", 64, 32));
        assert_eq!(of(both, 32 << 10, with_rope), ("attention_prefill_cooperative", 64, 16));
        assert_eq!(of(both, 32 << 10, op), ("attention_prefill_cooperative", 64, 32));
        // WebGPU's 16 KiB.
        assert_eq!(of(both, 16 << 10, op), ("attention_prefill_cooperative", 32, 16));
        assert_eq!(of(Cooperative::BY_8, 32 << 10, op), ("attention_prefill_cooperative_8", 32, 32));
        assert_eq!(of(Cooperative::BY_8, 16 << 10, op), ("attention_prefill_cooperative_8", 16, 16));
        let other = if kv == Storage::F16 { "attention_prefill" } else { "attention_prefill_subgroup" };
        assert_eq!(of(both, 16 << 10, with_rope).0, other);
    }
}

#[test]
fn decode_takes_whole_loads() {
    let of = |[d_nope, d_rope, d_value]: [u32; 3], storage, kv_storage, context: &PlanContext| {
        let op = AttentionDecode {
            split: 256,
            tokens: 1,
            most_tokens: 1,
            partials: 1,
            n_sequence: 1,
            n_head: 1,
            n_kv_head: 1,
            d_nope,
            d_rope,
            d_value,
            kv_first: 0,
            kv_rows: 256,
            kv_pitch: d_nope + d_value,
            cache_rows: 256,
            scale: 1.0,
            storage,
            kv_storage,
        };
        choose(&op, context).map(|(_, plan)| plan)
    };
    let (f32, f16) = (Storage::F32, Storage::F16);
    for class in AdapterClass::ALL {
        let context = context(class, NONE, 4);
        of([12, 4, 4], f32, f32, &context).unwrap();
        of([12, 8, 4], f16, f32, &context).unwrap();
        of([8, 0, 16], f32, f16, &context).unwrap();
        for (widths, storage, kv_storage) in [
            ([12, 4, 4], f16, f32),
            ([12, 8, 8], f32, f16),
            ([8, 8, 12], f32, f16),
            ([6, 4, 4], f32, f32),
            ([4, 4, 6], f32, f32),
        ] {
            let error = of(widths, storage, kv_storage, &context).unwrap_err().to_string();
            assert!(error.contains("must be a multiple of"), "{error}");
        }
    }
    // A setting that the device does not hold makes room for one that it does.
    let mut small = context(AdapterClass::Discrete, NONE, 4);
    assert_eq!(of([8, 8, 8], f16, f16, &small).unwrap().workgroup_size, 128);
    small.limits.max_compute_invocations_per_workgroup = 64;
    assert_eq!(of([8, 8, 8], f16, f16, &small).unwrap().workgroup_size, 64);
}

#[test]
fn subgroups_share_the_work_where_they_are_offered_and_wide_enough() {
    let prefill = |context: &PlanContext, query_tiles, d_rope| {
        let op = prefill_of(9, query_tiles, 1, [8, d_rope, 8]);
        chosen(&AttentionPrefill { tile_q: tile_q(context), ..op }, context)
    };
    let absorbed = |context: &PlanContext, d_latent| chosen(&absorbed_of(d_latent), context);
    for (class, size) in AdapterClass::ALL.into_iter().flat_map(|class| [4, 8, 32].map(|size| (class, size))) {
        let without = context(class, NONE, size);
        assert_eq!((prefill(&without, 1, 4), absorbed(&without, 64)), ("attention_prefill", "attention_absorbed"));
        let with = context(class, SUBGROUP, size);
        let narrow = class == AdapterClass::Software && size < 8;
        let expected = if narrow { "attention_prefill" } else { "attention_prefill_subgroup" };
        assert_eq!(prefill(&with, 1, 4), expected, "{class:?} {size}");
        // No whole number of 16-byte loads.
        assert_eq!(absorbed(&with, 30), "attention_absorbed");
    }
    let software = context(AdapterClass::Software, SUBGROUP, 8);
    // It cuts a tile into four workgroups there: more of them than one dimension holds fold.
    assert_eq!(prefill(&software, 16_384, 4), "attention_prefill_subgroup");
    // More than a workgroup index holds.
    assert_eq!(prefill(&software, 1 << 30, 4), "attention_prefill");
    let mut small = context(AdapterClass::Discrete, SUBGROUP, 32);
    small.limits.max_compute_invocations_per_workgroup = 64;
    // Workgroups of eight teams do not fit, of one team they do.
    assert_eq!(prefill(&small, 1, 4), "attention_prefill_subgroup");
    small.features = NONE;
    assert_eq!((tile_q(&small), prefill(&small, 1, 4)), (QUERY_TILES[0], "attention_prefill"));
    assert_eq!(absorbed(&software, 64), "attention_absorbed_subgroup");
    assert_eq!(absorbed(&context(AdapterClass::Software, SUBGROUP, 4), 64), "attention_absorbed");
    let discrete = |size, d_latent| absorbed(&context(AdapterClass::Discrete, SUBGROUP, size), d_latent);
    assert_eq!([discrete(32, 512), discrete(8, 64), discrete(4, 128)], ["attention_absorbed_stream"; 3]);
    assert_eq!([discrete(8, 512), discrete(4, 136)], ["attention_absorbed"; 2]);
}

#[test]
fn cooperative_matrices_attend_to_halves_where_they_are_offered() {
    let halves = AttentionPrefill { weights: Storage::F16, ..prefill_of(64, 4, 3, [16, 8, 16]) };
    let context = |class, cooperative| PlanContext {
        features: COOPERATIVE_FEATURES,
        cooperative,
        ..PlanContext::webgpu_defaults(class)
    };
    let both = Cooperative { by_16: true, by_8: true };
    for class in [AdapterClass::Integrated, AdapterClass::Discrete, AdapterClass::Apple] {
        for (cooperative, kernel) in [
            (Cooperative::NONE, "attention_prefill_subgroup"),
            (Cooperative::BY_8, "attention_prefill_cooperative_8"),
            (Cooperative::BY_16, "attention_prefill_cooperative"),
            (both, "attention_prefill_cooperative"),
        ] {
            let context = context(class, cooperative);
            assert_eq!(chosen(&halves, &context), kernel);
            // Never where weights or cache are f32, nor on a device opened without the features.
            let f32 = Storage::F32;
            assert_eq!(chosen(&AttentionPrefill { weights: f32, ..halves }, &context), "attention_prefill_subgroup");
            assert_eq!(chosen(&AttentionPrefill { storage: f32, ..halves }, &context), "attention_prefill_subgroup");
            let plain = PlanContext { features: wgpu::Features::SHADER_F16, ..context.clone() };
            assert_eq!(chosen(&halves, &plain), "attention_prefill");
            // Nor for tiles of few queries.
            let few = AttentionPrefill { query_tiles: 5, ..halves };
            assert_eq!(chosen(&few, &context), "attention_prefill_subgroup");
        }
    }
    assert_eq!(chosen(&halves, &context(AdapterClass::Software, both)), "attention_prefill");
}

#[test]
fn a_measured_setting_that_does_not_exist_is_an_error() {
    let mut context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
    context.tunings = Tunings(shaders().map(|spec| (spec.name.to_owned(), 9)).collect::<BTreeMap<_, _>>());
    let op = Matmul::linear(8, 8, 8, false, Storage::F32);
    for variant in Matmul::VARIANTS {
        let words = format!("tuning 9 does not exist, there are {}", variant.spec.tunings);
        for tuning in [Tuning::Auto, Tuning::Forced(9)] {
            let error = variant.plan(&op, &context, tuning).unwrap_err().to_string();
            assert!(error.ends_with(&words), "{error}");
        }
    }
    assert!(choose(&op, &context).is_err());
}

#[test]
fn subgroups_that_no_device_has_do_not_overflow() {
    for size in [0, 1, u32::MAX] {
        let mut context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
        (context.subgroup_min_size, context.subgroup_max_size) = (size, size);
        context.limits.max_compute_invocations_per_workgroup = 1024;
        context.limits.max_compute_workgroup_size_x = 1024;
        context.limits.max_compute_workgroup_storage_size = 1 << 16;
        let op = RooflineCooperative { groups: 1, iterations: 1, side: 16 };
        let plan = RooflineCooperative::VARIANTS[0].plan(&op, &context, Tuning::Auto).unwrap();
        assert!((4..=128).contains(&plan.workgroup_size), "{plan:?}");
        AttentionPrefill::VARIANTS[0].plan(&prefill_of(16, 1, 1, [8; 3]), &context, Tuning::Auto).unwrap();
    }
}

/// A device of the class as it usually is.
fn usual(class: AdapterClass) -> PlanContext {
    let size = if class == AdapterClass::Software { 8 } else { 32 };
    let features = if class == AdapterClass::Discrete { COOPERATIVE_FEATURES } else { SUBGROUP };
    PlanContext { subgroup_max_size: size, cooperative: Cooperative::BY_16, ..context(class, features, size) }
}

/// Distinct ids among `cached` tokens of the bench's text: 384 of 1 024, 1 592 of 8 192, 4 016 of 32 768.
fn distinct(cached: u32) -> u32 {
    let ids = 384.0 * (f64::from(cached) / 1024.0).powf(0.68);
    cached.min(ids.round() as u32)
}

/// One new token of each of `batch` sequences, in f16.
fn step(batch: u32, cached: u32, gated: bool, projected: bool) -> DecodeWork {
    let groups = if gated { distinct(cached) } else { 0 };
    let projected = if projected { batch * groups } else { 0 };
    DecodeWork { tokens: batch, ..DecodeWork::one(batch * cached, batch * groups, projected, Storage::F16) }
}

/// The shortest caches are rebuilt, longer ones are attended to as they are: a length on either side for every class, MLA and EG-MLA
/// (all gate rows projected), batch 1 and 32.
#[test]
fn the_faster_path_changes_with_the_length() {
    use AdapterClass::{Apple, Discrete, Integrated, Software};
    for (class, gated, batch, [short, long]) in [
        (Software, false, 1, [1, 64]),
        (Software, false, 32, [1, 16]),
        (Software, true, 1, [4, 64]),
        (Software, true, 32, [4, 64]),
        (Integrated, false, 1, [1, 256]),
        (Integrated, false, 32, [1, 64]),
        (Integrated, true, 1, [256, 4096]),
        (Integrated, true, 32, [256, 4096]),
        (Discrete, false, 1, [64, 1024]),
        (Discrete, false, 32, [1, 256]),
        // Measured on an H200: 75 µs against 166 at 1 024 tokens, 422 against 212 at 8 192.
        (Discrete, true, 1, [1024, 8192]),
        (Discrete, true, 32, [64, 2048]),
        (Apple, false, 1, [1, 256]),
        (Apple, false, 32, [1, 64]),
        (Apple, true, 1, [1024, 8192]),
        (Apple, true, 32, [64, 4096]),
    ] {
        let config = paper_120m(if gated { 64 } else { 256 }, gated);
        let path = |cached| {
            let work = step(batch, cached, gated, gated);
            faster_path(&usual(class), &config, &work, 1024, Storage::F16)
        };
        let found = [path(short), path(long)];
        assert_eq!(found, [DecodePath::Expanded, DecodePath::Absorbed], "{class:?}, gated: {gated}, batch {batch}");
    }
}

/// A figure of a row in committed results, in microseconds.
fn committed(file: &str, id: &str, figure: &str) -> f64 {
    let path = format!("{}/benches/results/{file}", env!("CARGO_MANIFEST_DIR"));
    let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let row = report["rows"].as_array().unwrap().iter().find(|row| row["id"] == id);
    row.and_then(|row| row[figure].as_f64()).unwrap_or_else(|| panic!("no {figure} of {id}"))
}

/// The rows that the rates are fitted to come out within a factor of two.
#[test]
fn times_are_about_those_of_the_rows() {
    let mla = (false, false, DecodePath::Absorbed, "decode/mla_120m_r256");
    let expanded = (true, false, DecodePath::Expanded, "decode/egmla_120m_r64/expanded");
    let recompute = (true, true, DecodePath::Absorbed, "decode/egmla_120m_r64/absorbed_recompute");
    let table = (true, false, DecodePath::Absorbed, "decode/egmla_120m_r64/absorbed_table");
    let predicted = |class, (gated, projected, path, _), cached| {
        let (config, work) = (paper_120m(if gated { 64 } else { 256 }, gated), step(1, cached, gated, projected));
        decode_time(&usual(class), &config, &work, path, 1024, Storage::F16).us
    };
    let about = |predicted: f64, measured: f64, what: &str| {
        let ratio = predicted / measured;
        assert!((0.5..=2.0).contains(&ratio), "{what}: {predicted:.0} µs, measured {measured:.0}");
    };
    for (row, cached) in
        [mla, expanded, recompute, table].into_iter().flat_map(|row| [1024, 8192, 32_768].map(|c| (row, c)))
    {
        let id = format!("{}/t{cached}", row.3);
        let measured = committed("llvmpipe-llvm-15-0-6-256-bits-vulkan.json", &id, "median_us");
        about(predicted(AdapterClass::Software, row, cached), measured, &id);
    }
    // An H200 at commit 10d32d5; without wgpu's shader checks where that was measured.
    for (row, cached, figure) in [
        (expanded, 1024, "us"),
        (expanded, 8192, "unchecked_us"),
        (expanded, 32_768, "us"),
        (table, 1024, "us"),
        (table, 8192, "unchecked_us"),
        (table, 32_768, "us"),
    ] {
        let id = format!("{}/t{cached}", row.3);
        about(predicted(AdapterClass::Discrete, row, cached), committed("gpu/h200-10d32d5.json", &id, figure), &id);
    }
}

/// A device whose workgroup memory holds no head of the grouped attention rebuilds.
#[test]
fn a_path_that_cannot_run_takes_forever() {
    let mut small = usual(AdapterClass::Integrated);
    (small.features, small.limits.max_compute_workgroup_storage_size) = (NONE, 4096);
    let (config, work) = (paper_120m(64, true), step(1, 32_768, true, false));
    let time = |path| decode_time(&small, &config, &work, path, 1024, Storage::F16).us;
    assert_eq!(time(DecodePath::Absorbed), f64::INFINITY);
    assert_eq!(faster_path(&small, &config, &work, 1024, Storage::F16), DecodePath::Expanded);
}

//! WebGPU's limits: what does not fit is refused before anything is allocated, grids fold, loops end where every driver ends them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Gpu, gpu, gpu_with, stored};
use std::collections::BTreeMap;

use egmla::attention::{Attention, AttentionOptions, CacheOptions, GateRows, LatentCache};
use egmla::check::capture::{Action, Blob, Blobs};
use egmla::check::cases;
use egmla::config::{Activation, AttentionConfig, GateConfig, GateNorm, GateSite};
use egmla::decoder::{Decoder, ModelFolder};
use egmla::error::DeviceError;
use egmla::low_level::kernels::{attention_combine, attention_decode, residual_add, shaders};
use egmla::low_level::{AdapterClass, Op, Plan, PlanContext, Spec, Tuning, choose};
use egmla::random::attention_weights;
use egmla::readback;
use egmla::{Error, Recording, Region, Storage, wgpu};

/// The table of limits in the WebGPU standard, where a compute shader meets one.
#[test]
fn wgpus_defaults_are_webgpus() {
    let limits = wgpu::Limits::default();
    let standard = [
        (u64::from(limits.max_storage_buffers_per_shader_stage), 8),
        (limits.max_storage_buffer_binding_size, 134_217_728),
        (limits.max_buffer_size, 268_435_456),
        (limits.max_uniform_buffer_binding_size, 65_536),
        (limits.max_uniform_buffers_per_shader_stage.into(), 12),
        (limits.max_compute_workgroup_storage_size.into(), 16_384),
        (limits.max_compute_invocations_per_workgroup.into(), 256),
        (limits.max_compute_workgroup_size_x.into(), 256),
        (limits.max_compute_workgroup_size_y.into(), 256),
        (limits.max_compute_workgroup_size_z.into(), 64),
        (limits.max_compute_workgroups_per_dimension.into(), 65_535),
        (limits.min_uniform_buffer_offset_alignment.into(), 256),
        (limits.min_storage_buffer_offset_alignment.into(), 256),
        (limits.max_bind_groups.into(), 4),
        (limits.max_bindings_per_bind_group.into(), 1000),
    ];
    for (index, (found, expected)) in standard.into_iter().enumerate() {
        assert_eq!(found, expected, "limit {index}");
    }
}

/// Without `EGMLA_LIMITS` the tests' devices have these limits; with `default` no feature either.
#[test]
fn the_tests_devices_are_opened_with_what_was_asked_for() {
    let gpu = gpu();
    let (limits, features) = (gpu.kernels.device().limits(), gpu.kernels.device().features());
    match std::env::var("EGMLA_LIMITS").as_deref() {
        Ok("adapter") => assert_ne!(limits, wgpu::Limits::default()),
        offer => {
            assert_eq!(limits, wgpu::Limits::default());
            assert!(offer != Ok("default") || features.is_empty(), "{features:?}");
        }
    }
}

const BINDING: u64 = 32 << 10;

/// Devices on which little fits: into a binding, of which a buffer holds several, and into a buffer.
fn small() -> [Gpu; 2] {
    [(BINDING, 4 * BINDING), (4 * BINDING, BINDING)].map(|(binding, buffer)| {
        gpu_with(wgpu::Limits {
            max_storage_buffer_binding_size: binding,
            max_buffer_size: buffer,
            ..wgpu::Limits::default()
        })
    })
}

/// Loses the device: what allocates before it refuses fails for that, and not with [`Error::Limit`].
fn lose(gpu: &Gpu) {
    gpu.kernels.device().destroy();
    let error = gpu.kernels.allocate("anything", 16).unwrap_err();
    assert!(matches!(error, Error::Device(DeviceError::Lost { .. })), "{error}");
}

/// Allocations on the device; `None` where the backend does not count them.
fn allocations(gpu: &Gpu) -> Option<usize> {
    // What was dropped goes with the next poll.
    gpu.kernels.device().poll(wgpu::PollType::wait_indefinitely()).unwrap();
    let report = gpu.kernels.device().generate_allocator_report();
    if report.is_none() {
        println!("{:?} does not count allocations", gpu.kernels.device().adapter_info().backend);
    }
    report.map(|report| report.allocations.len())
}

/// `make` is refused for `what` with both numbers, the one larger than the other, and allocates nothing on the way.
#[track_caller]
fn refused<T>(gpu: &Gpu, what: &str, make: impl FnOnce() -> egmla::Result<T>) -> (u64, u64) {
    let before = allocations(gpu);
    let Err(error) = make() else { panic!("{what}: not refused") };
    let after = allocations(gpu);
    let Error::Limit { needed, allowed, .. } = error else { panic!("{what}: {error}") };
    assert!(needed > allowed, "{what}: {error}");
    let text = error.to_string();
    assert!(text.contains(what), "{what}: {text}");
    assert!(text.contains(&needed.to_string()) && text.contains(&allowed.to_string()), "{text}");
    assert_eq!(before, after, "{what}: {text}");
    (needed, allowed)
}

fn config(vocab_size: u32, d_gate: u32) -> AttentionConfig {
    AttentionConfig {
        hidden_size: 24,
        n_head: 3,
        d_latent: 12,
        d_nope: 8,
        d_rope: 4,
        d_value: 10,
        gate: Some(GateConfig {
            vocab_size,
            d_gate,
            tied: false,
            site: GateSite::UpProjected,
            activation: Activation::OnePlus,
            norm: GateNorm::LayerNorm,
            norm_eps: 1e-5,
        }),
        ..AttentionConfig::default()
    }
}

#[test]
fn an_allocation_is_counted() {
    for gpu in small() {
        let before = allocations(&gpu);
        let kept = gpu.kernels.allocate("one", 4096).unwrap();
        assert_eq!(allocations(&gpu), before.map(|count| count + 1));
        drop(kept);
    }
}

#[test]
fn weights_over_a_binding_are_refused_before_any_is_uploaded() {
    // The gate's embedding comes last: 5 floats a row, padded to 8.
    let wide = config(1025, 5);
    let wide_weights = attention_weights(&wide, true, 1).unwrap();
    // A token embedding of 24 floats a row.
    let tied = |vocab_size| {
        let mut tied = config(vocab_size, 24);
        tied.gate.iter_mut().for_each(|gate| gate.tied = true);
        let weights = attention_weights(&tied, true, 1).unwrap();
        (tied, weights)
    };
    let (long, fitting) = (tied(342), tied(341));
    // Keys and values of three heads, 16 floats a row: one kernel takes them whole.
    let tall = AttentionConfig { d_value: 200, ..config(4, 1) };
    let tall_weights = attention_weights(&tall, true, 1).unwrap();
    for gpu in small() {
        let refusals = || {
            let found =
                refused(&gpu, "embedding", || Attention::new(&gpu.kernels, &wide, &wide_weights, stored(Storage::F32)));
            assert_eq!(found, (1025 * 32, BINDING));
            let found = refused(&gpu, "tensor `model.embed_tokens.weight`", || {
                Attention::new(&gpu.kernels, &long.0, &long.1, stored(Storage::F32))
            });
            assert_eq!(found, (342 * 96, BINDING));
            let found =
                refused(&gpu, "kv_b_proj", || Attention::new(&gpu.kernels, &tall, &tall_weights, stored(Storage::F32)));
            assert_eq!(found, (3 * 208 * 64, BINDING));
        };
        refusals();
        Attention::new(&gpu.kernels, &wide, &wide_weights, stored(Storage::F16)).unwrap();
        Attention::new(&gpu.kernels, &fitting.0, &fitting.1, stored(Storage::F32)).unwrap();
        lose(&gpu);
        refusals();
    }
}

#[test]
fn caches_pools_and_lists_over_a_binding_are_refused_before_anything_is_allocated() {
    let config = config(50, 5);
    // Without a gate a cache is cut, but no split of it: rows of 72 words.
    let plain = AttentionConfig { gate: None, d_latent: 60, ..config.clone() };
    let of_plain = CacheOptions { n_layer: 3, capacity: 1000, ..CacheOptions::default() };
    // Of two sequences' lists the cache is the smaller part.
    let narrow = AttentionConfig { d_latent: 4, d_rope: 0, ..config.clone() };
    let of_narrow = CacheOptions { batch: 2, capacity: 600, storage: Storage::F16, ..CacheOptions::default() };
    for gpu in small() {
        let layer = |config: &AttentionConfig, gate_rows| {
            let weights = attention_weights(config, true, 1).unwrap();
            Attention::new(&gpu.kernels, config, &weights, AttentionOptions { gate_rows, ..stored(Storage::F32) })
                .unwrap()
        };
        let (plain, narrow) = (layer(&plain, GateRows::Recompute), layer(&narrow, GateRows::Recompute));
        let (gated, pool) = (layer(&config, GateRows::Recompute), layer(&config, GateRows::Pool { rows: 200 }));
        let some = layer(&config, GateRows::Pool { rows: 100 });
        let cache = |layer: &Attention, capacity| {
            let options =
                CacheOptions { n_layer: 3, capacity, max_tokens: 64, tile_rows: 64, ..CacheOptions::default() };
            LatentCache::new(layer, options)
        };
        let refusals = || {
            let of_split =
                refused(&gpu, "latents and rotary keys of 256 cache rows", || LatentCache::new(&plain, of_plain));
            assert_eq!(of_split, (256 * 72 * 4, BINDING));
            // Latents alone would fit; with rotary keys and statistics they do not.
            refused(&gpu, "latent cache with rotary keys and statistics", || cache(&gated, 500));
            refused(&gpu, "a pool of 200 gate rows", || cache(&pool, 64));
            refused(&gpu, "group lists", || LatentCache::new(&narrow, of_narrow));
        };
        refusals();
        refused(&gpu, "workspace", || cache(&some, 64));
        lose(&gpu);
        refusals();
    }
}

#[test]
fn intermediate_results_over_a_binding_are_refused_before_anything_is_allocated() {
    let config = config(50, 5);
    let weights = attention_weights(&config, true, 1).unwrap();
    let options = CacheOptions { capacity: 300, storage: Storage::F16, max_tokens: 4, ..CacheOptions::default() };
    for gpu in small() {
        let attention = Attention::new(&gpu.kernels, &config, &weights, stored(Storage::F32)).unwrap();
        // 512 rows of 72 floats.
        let refusal = || refused(&gpu, "workspace", || LatentCache::new(&attention, options));
        refusal();
        lose(&gpu);
        refusal();
    }
}

#[test]
fn a_gate_table_is_refused_where_two_bindings_do_not_hold_its_rows() {
    // Rows of 54 floats, padded to 72: 113 to a binding, with 224 bytes to spare.
    for (vocab, fits) in [(113, true), (114, true), (226, true), (227, false), (1000, false)] {
        let config = config(vocab, 1);
        let weights = attention_weights(&config, true, 1).unwrap();
        for gpu in small() {
            let options = AttentionOptions { gate_rows: GateRows::Table, ..stored(Storage::F32) };
            let layer = || Attention::new(&gpu.kernels, &config, &weights, options);
            if fits {
                assert_eq!(layer().unwrap().gate_table_bytes(), u64::from(vocab) * 288);
                continue;
            }
            let refusal = || {
                let found = refused(&gpu, "half of a gate table", layer);
                let limits = &gpu.kernels.context().limits;
                let allowed = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
                assert_eq!(found, (u64::from(vocab.div_ceil(2)) * 288, allowed));
            };
            refusal();
            lose(&gpu);
            refusal();
        }
    }
}

#[test]
fn a_language_models_tensors_and_buffers_are_refused_before_anything_is_allocated() {
    let folder =
        ModelFolder::open(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/shakespeare")).unwrap();
    let (config, weights) = (folder.config(), folder.weights().unwrap());
    let with = |binding: u64, buffer: u64| {
        gpu_with(wgpu::Limits {
            max_storage_buffer_binding_size: binding,
            max_buffer_size: buffer,
            ..wgpu::Limits::default()
        })
    };
    for (binding, buffer) in [(64 << 10, 4 << 20), (4 << 20, 64 << 10)] {
        let gpu = with(binding, buffer);
        let refusal = || {
            let decoder = || Decoder::new(&gpu.kernels, config, &weights, stored(Storage::F32));
            let (largest, allowed) = refused(&gpu, "in f32", decoder);
            assert!(largest > 64 << 10 && allowed == 64 << 10, "{largest} of {allowed}");
        };
        refusal();
        lose(&gpu);
        refusal();
    }
    // What holds the weights does not hold every token's logits.
    for (binding, buffer) in [(9 << 20, 64 << 20), (64 << 20, 9 << 20)] {
        let gpu = with(binding, buffer);
        let decoder = Decoder::new(&gpu.kernels, config, &weights, stored(Storage::F32)).unwrap();
        let options = CacheOptions { batch: 64, capacity: 64, max_tokens: 4096, ..CacheOptions::default() };
        let cache = decoder.cache(options).unwrap();
        let refusal = || refused(&gpu, "decoder's", || decoder.state(&cache, true));
        refusal();
        lose(&gpu);
        refusal();
    }
}

/// More workgroups than one dimension holds, on the device: every element once, none past the end.
#[test]
fn grids_that_fold_cover_every_element() {
    let gpu = gpu();
    // Workgroups of 64: one more than two full rows of the grid would need.
    let elements = 65_535 * 64 + 63;
    let problem = residual_add::ResidualAdd { elements, factor: 1.0 };
    let variant = choose(&problem, gpu.kernels.context()).unwrap().0;
    let plan = variant.plan(&problem, gpu.kernels.context(), Tuning::Forced(1)).unwrap();
    assert!(plan.grid[1] == 2 && plan.grid[0] < 65_536 && plan.workgroup_size == 64, "{plan:?}");
    let delta: Vec<f32> = (0..elements).map(|index| (index % 1021) as f32).collect();
    let mut stream: Vec<f32> = (0..elements).map(|index| (index % 8191) as f32).collect();
    // Words behind the end, in the same buffer: not the kernel's.
    stream.extend([-1.0; 256]);
    let delta_region = Region::from(&gpu.kernels.upload("delta", bytemuck::cast_slice(&delta)).unwrap());
    let stream_region = Region::from(&gpu.kernels.upload("stream", bytemuck::cast_slice(&stream)).unwrap());
    let mut recording = Recording::new(&gpu.kernels);
    let args = residual_add::Args { delta: &delta_region, stream: &stream_region };
    recording.add_variant(variant, &problem, args, Tuning::Forced(1)).unwrap();
    readback::submit(&mut recording).unwrap();
    let got = readback::wait(readback::read_f32(&gpu.kernels, &[&stream_region])).unwrap().remove(0);
    let wrong = (0..stream.len()).find(|&index| got[index] != stream[index] + delta.get(index).copied().unwrap_or(0.0));
    assert_eq!(wrong, None, "of {}", got.len());
    gpu.assert_no_errors();
}

/// Every kernel, on devices whose grids hold so few workgroups a dimension that they fold: the same results.
#[test]
fn every_kernel_is_right_where_its_grid_folds() {
    const EACH: usize = 3;
    let whole = gpu();
    let mut folded: BTreeMap<&str, usize> = BTreeMap::new();
    let offered = |spec: &&'static Spec| spec.missing(whole.kernels.context()).is_none();
    for case in cases().iter().filter(|case| shaders().filter(offered).any(|spec| spec.name == case.kernel())) {
        if folded.get(case.kernel()).is_some_and(|&cases| cases >= EACH) {
            continue;
        }
        // What would be launched where all fits.
        let (data, _) = case.export(&whole.kernels, whole.kernels.context().clone()).unwrap();
        let grids = || data.actions.iter().filter_map(of_kernel(case.kernel()));
        // From the least side of a square that holds every grid on; a dimension of a kernel's own may want more.
        let side = |grid: [u32; 3]| f64::from(grid.iter().product::<u32>()).sqrt().ceil() as u32;
        let least = grids().map(side).max().unwrap_or(0);
        let longest = grids().flatten().max().unwrap_or(0);
        let Some(gpu) = (least..longest).find_map(|most| {
            let gpu = gpu_with(wgpu::Limits { max_compute_workgroups_per_dimension: most, ..Default::default() });
            match case.export(&gpu.kernels, gpu.kernels.context().clone()) {
                Err(Error::Limit { limit: "max_compute_workgroups_per_dimension", .. }) => None,
                planned => {
                    let (data, blobs) = planned.unwrap();
                    data.actions.iter().any(|action| is_folded(action, &blobs)).then_some(gpu)
                }
            }
        }) else {
            continue;
        };
        for outcome in case.run(&gpu.kernels).unwrap() {
            assert!(outcome.verdict.is_ok(), "{} [{}]: {outcome:?}", case.id(), outcome.tuning);
        }
        gpu.assert_no_errors();
        *folded.entry(case.kernel()).or_default() += 1;
    }
    println!("cases with a folded grid: {folded:?}");
    for spec in shaders().filter(offered) {
        assert!(folded.contains_key(spec.name), "no grid of {} folded", spec.name);
    }
}

/// The grid of a kernel's dispatch.
fn of_kernel(name: &str) -> impl Fn(&Action) -> Option<[u32; 3]> {
    move |action| match action {
        Action::Dispatch { kernel, grid, .. } if *kernel == name => Some(*grid),
        _ => None,
    }
}

/// Whether a dispatch's grid is folded: the last words of a kernel of tiles' parameters are its tiles.
fn is_folded(action: &Action, blobs: &Blobs) -> bool {
    let Action::Dispatch { kernel, grid, params: Blob::At { at, bytes }, .. } = action else { return false };
    let spec = shaders().find(|spec| spec.name == *kernel).unwrap();
    let words: Vec<u32> = bytemuck::pod_collect_to_vec(&blobs.bytes()[*at..at + bytes]);
    match spec.source.contains("tiles_x: u32,") {
        true => words[words.len() - 3..] != *grid,
        false => grid[1..].iter().any(|&groups| groups > 1),
    }
}

/// A grid that would not fit even folded is refused with the number.
#[test]
fn grids_over_the_limit_are_refused() {
    let context = PlanContext::webgpu_defaults(AdapterClass::Discrete);
    fn plan<O: Op>(op: &O, context: &PlanContext) -> egmla::Result<Plan> {
        choose(op, context).map(|(_, plan)| plan)
    }
    let over = |plan: egmla::Result<Plan>| match plan {
        Err(Error::Limit { needed, allowed, limit: "max_compute_workgroups_per_dimension", .. }) => {
            assert!(needed > allowed);
        }
        other => panic!("{other:?}"),
    };
    let combine = attention_combine::AttentionCombine { tokens: u32::MAX, n_head: 2, width: 4, splits: 1 };
    let error = plan(&combine, &context).unwrap_err().to_string();
    assert_eq!(error, "attention_combine: 8589934590 elements, must be below 2^31");
    let decode = attention_decode::AttentionDecode { kv_rows: 65_536 * attention_decode::SPLIT, ..decode_problem() };
    let folded = plan(&decode, &context).unwrap();
    assert_eq!((folded.grid, folded.tiles), ([32_768, 2, 1], [65_536, 1, 1]));
    let heads = attention_decode::AttentionDecode { n_head: 65_535, n_kv_head: 65_535, ..decode };
    let error = plan(&heads, &context).unwrap_err().to_string();
    assert_eq!(error, "attention_decode: 4294901760 workgroups, must be below 2^31");
    let mut small = context;
    small.limits.max_compute_workgroups_per_dimension = 255;
    over(plan(&attention_combine::AttentionCombine { tokens: 65_026, n_head: 1, ..combine }, &small));
    over(plan(&decode, &small));
}

fn decode_problem() -> attention_decode::AttentionDecode {
    attention_decode::AttentionDecode {
        tokens: 1,
        most_tokens: 1,
        partials: 1,
        split: attention_decode::SPLIT,
        n_sequence: 1,
        n_head: 1,
        n_kv_head: 1,
        d_nope: 8,
        d_rope: 8,
        d_value: 8,
        kv_first: 0,
        kv_rows: attention_decode::SPLIT,
        kv_pitch: 16 * 65_535,
        cache_rows: attention_decode::SPLIT,
        kv_storage: Storage::F32,
        scale: 1.0,
        storage: Storage::F32,
    }
}

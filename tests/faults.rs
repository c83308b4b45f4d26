//! Lost devices, no memory left, what wgpu refuses, hangs, objects of two devices, threads: each is an error value, and what the
//! host knows stays true.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::{HIDDEN, VOCAB, adapter, config, gpu};
use egmla::attention::{
    Attention, AttentionOptions, CacheOptions, DecodePath, GateRows, LatentCache, Mode, Step, StepTokens,
};
use egmla::config::{AttentionConfig, GateSite};
use egmla::error::{ArgumentError, DeviceError};
use egmla::fault::Faults;
use egmla::low_level::kernels::roofline_fma;
use egmla::random::{Random, attention_weights};
use egmla::readback;
use egmla::{Error, Kernels, Recording, Region, Storage, wgpu};

/// A layer and its cache, on one device.
struct Rig {
    attention: Attention,
    cache: LatentCache,
    recording: Recording,
}

const OPTIONS: CacheOptions = CacheOptions {
    n_layer: 1,
    batch: 2,
    capacity: 32,
    storage: Storage::F32,
    max_tokens: 64,
    decode_tokens: 4,
    tile_rows: 1024,
    decode_path: DecodePath::Absorbed,
};

const POOL: GateRows = GateRows::Pool { rows: 6 };

impl Rig {
    fn new(kernels: &Kernels, config: &AttentionConfig, gate_rows: GateRows) -> egmla::Result<Self> {
        Self::with(kernels, config, gate_rows, OPTIONS)
    }

    fn with(
        kernels: &Kernels,
        config: &AttentionConfig,
        gate_rows: GateRows,
        options: CacheOptions,
    ) -> egmla::Result<Self> {
        let weights = attention_weights(config, true, 1).unwrap();
        let attention =
            Attention::new(kernels, config, &weights, AttentionOptions { storage: options.storage, gate_rows })?;
        let cache = LatentCache::new(&attention, options)?;
        Ok(Rig { attention, cache, recording: Recording::new(kernels) })
    }

    /// One step, recorded, submitted, committed and read back; committed only where it was submitted.
    fn step(&mut self, input: Input<'_>, hidden: &[f32]) -> egmla::Result<Vec<f32>> {
        let kernels = self.cache.kernels().clone();
        let x = Region::from(&kernels.upload("hidden", bytemuck::cast_slice(hidden))?);
        let y = Region::from(&kernels.allocate("out", 4 * hidden.len() as u64)?);
        let step = self.cache.prepare(input.0, input.1)?;
        self.recording.clear();
        self.attention.forward(&mut self.recording, &self.cache, &step, 0, &x, &y)?;
        readback::submit(&mut self.recording)?;
        self.cache.commit(step)?;
        Ok(readback::wait(readback::read_f32(&kernels, &[&y]))?.remove(0)[..hidden.len()].to_vec())
    }

    fn record(&self, step: &Step, x: &Region, y: &Region) -> egmla::Result<Recording> {
        let mut recording = Recording::new(self.cache.kernels());
        self.attention.forward(&mut recording, &self.cache, step, 0, x, y)?;
        Ok(recording)
    }
}

/// What a step is prepared from.
type Input<'a> = (Mode, StepTokens<'a>);

fn input<'a>(mode: Mode, counts: &'a [u32], ids: Option<&'a [u32]>) -> Input<'a> {
    (mode, StepTokens { counts, ids })
}

/// Two sequences' prompts, then two tokens of each from the cache; everything that a run puts out.
fn run(kernels: &Kernels, config: &AttentionConfig, seed: u64) -> egmla::Result<Vec<f32>> {
    let mut rig = Rig::new(kernels, config, POOL)?;
    let mut random = Random::new(seed);
    let mut all = Vec::new();
    for (mode, counts) in
        [(Mode::Prefill, [7, 5]), (Mode::Decode, [1, 2]), (Mode::Decode, [1, 0]), (Mode::Decode, [2, 1])]
    {
        let tokens = counts.iter().sum::<u32>() as usize;
        let (hidden, ids) = (random.values(tokens * HIDDEN, 1.0), random.ids(tokens, VOCAB));
        let ids = config.gate.is_some().then_some(&ids[..]);
        all.extend(rig.step(input(mode, &counts, ids), &hidden)?);
    }
    Ok(all)
}

fn lost(result: egmla::Result<impl Sized>, what: &str) {
    match result.err().unwrap_or_else(|| panic!("{what}: succeeded on a lost device")) {
        error @ Error::Device(DeviceError::Lost { .. }) => {
            assert!(error.to_string().contains("open a new one"), "{what}: {error}")
        }
        other => panic!("{what}: {other:?}"),
    }
}

/// A device without any handler: an error outside of all scopes panics.
fn bare() -> (wgpu::Device, wgpu::Queue) {
    let adapter = adapter(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default())).unwrap()
}

/// What allocates, compiles, records and reads on a lost device says so, and the host's state is as it was. A step of a shape
/// that was recorded before asks the device nothing: there reading back tells.
#[test]
fn a_lost_device_is_an_error_of_every_call_and_the_cache_keeps_what_it_knows() {
    for site in [None, Some(GateSite::UpProjected), Some(GateSite::Latent)] {
        let (device, queue) = bare();
        let kernels = Kernels::new(&device, &queue).unwrap();
        let config = config(site);
        let mut rig = Rig::new(&kernels, &config, POOL).unwrap();
        let mut random = Random::new(3);
        let (hidden, ids) = (random.values(9 * HIDDEN, 1.0), random.ids(9, VOCAB));
        let ids = site.map(|_| &ids[..]);
        let prompt = input(Mode::Prefill, &[5, 4], ids);
        rig.step(prompt, &hidden).unwrap();
        let (lengths, distinct) = (rig.cache.lengths().to_vec(), rig.cache.distinct_ids());
        let next = input(Mode::Decode, &[1, 1], ids.map(|ids| &ids[..2]));
        let x = Region::from(&kernels.upload("x", bytemuck::cast_slice(&hidden)).unwrap());
        let y = Region::from(&kernels.allocate("y", 4 * hidden.len() as u64).unwrap());
        let step = rig.cache.prepare(next.0, next.1).unwrap();
        let mut fresh = rig.record(&step, &x, &y).unwrap();
        let mut warm = rig.record(&step, &x, &y).unwrap();
        readback::submit(&mut warm).unwrap();
        readback::finish_within(&kernels, Duration::from_secs(300)).unwrap();

        device.destroy();
        lost(kernels.allocate("a", 64), "allocate");
        lost(kernels.upload("a", &[1; 64]), "upload");
        lost(Kernels::new(&device, &queue), "Kernels::new");
        let weights = attention_weights(&config, true, 1).unwrap();
        lost(Attention::new(&kernels, &config, &weights, AttentionOptions::default()), "weights");
        lost(LatentCache::new(&rig.attention, OPTIONS), "cache");
        lost(rig.record(&step, &x, &y), "record");
        // Twice: what was made on a lost device is not taken for good.
        for _ in 0..2 {
            lost(readback::submit(&mut fresh), "submit");
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            lost(fresh.encode(&mut encoder), "encode");
        }
        lost(rig.record(&step, &x, &y).and_then(|mut recording| recording.compile()), "compile");
        warm.clear();
        rig.attention.forward(&mut warm, &rig.cache, &step, 0, &x, &y).unwrap();
        readback::submit(&mut warm).unwrap();
        lost(readback::wait(readback::read(&kernels, &[&x])), "read");
        lost(readback::finish_within(&kernels, Duration::from_secs(1)), "finish_within");
        assert_eq!((rig.cache.lengths(), rig.cache.distinct_ids()), (&lengths[..], distinct));

        // All that the host kept is fed to a new device.
        let (device, queue) = bare();
        let mut again = Rig::new(&Kernels::new(&device, &queue).unwrap(), &config, POOL).unwrap();
        again.step(prompt, &hidden).unwrap();
        assert_eq!(again.cache.lengths(), lengths);
        let got = again.step(next, &hidden[..2 * HIDDEN]).unwrap();
        assert!(got.iter().all(|value| value.is_finite()));
        assert_eq!(again.cache.lengths(), [6, 5]);
    }
}

#[test]
fn a_device_that_is_lost_while_it_computes_returns_no_numbers() {
    let (device, queue) = bare();
    let kernels = Kernels::new(&device, &queue).unwrap();
    let faults = Faults::watch(&kernels);
    let mut work = Work::new(&kernels, 2);
    assert!(faults.check().is_ok() && !faults.is_lost());
    readback::submit(&mut work.recording).unwrap();
    device.destroy();
    lost(readback::wait(readback::read(&kernels, &[&work.out])), "read");
    // The callback comes with a poll, and the answer stays.
    device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    assert!(faults.is_lost());
    lost(faults.check(), "the first time");
    lost(faults.check(), "ever after");
}

/// The loss is known with the first call that says it, whichever that is: wgpu's callback waits for the work and for a poll.
#[test]
fn a_call_that_says_lost_makes_the_loss_known() {
    type Call = fn(&Kernels, &mut Work) -> egmla::Result<()>;
    let calls: [(&str, Call); 7] = [
        ("allocate", |kernels, _| kernels.allocate("a", 64).map(drop)),
        ("upload", |kernels, _| kernels.upload("a", &[1; 64]).map(drop)),
        ("kernels with other settings", |kernels, _| kernels.with_shader_checks(true).allocate("a", 64).map(drop)),
        ("compile", |kernels, work| {
            let mut recording = Recording::new(&kernels.uncompiled());
            recording.add(&Work::PROBLEM, roofline_fma::Args { x: &work.input, y: &work.out })?;
            recording.compile()
        }),
        ("submit", |kernels, work| {
            let mut recording = Recording::new(kernels);
            recording.add(&Work::PROBLEM, roofline_fma::Args { x: &work.input, y: &work.out })?;
            readback::submit(&mut recording)
        }),
        ("finish_within", |kernels, _| readback::finish_within(kernels, Duration::from_secs(300))),
        ("read", |kernels, work| readback::wait(readback::read(kernels, &[&work.out])).map(drop)),
    ];
    for (what, call) in calls {
        let (device, queue) = bare();
        let kernels = Kernels::new(&device, &queue).unwrap();
        let faults = Faults::watch(&kernels);
        let mut work = Work::new(&kernels, 4);
        readback::submit(&mut work.recording).unwrap();
        device.destroy();
        lost(call(&kernels, &mut work), what);
        assert!(faults.is_lost(), "{what}");
        lost(faults.check(), what);
    }
}

/// Devices of an instance with this memory budget, in per cent of what the driver reports (`VK_EXT_memory_budget`); `None` where
/// the adapter reports none, and wgpu would not know.
fn with_budget(set: impl FnOnce(&mut wgpu::MemoryBudgetThresholds)) -> Option<(wgpu::Device, wgpu::Queue)> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    set(&mut descriptor.memory_budget_thresholds);
    let adapter = adapter(descriptor);
    let info = adapter.get_info();
    // SwiftShader lacks the extension; on GL wgpu asks for nothing.
    if info.backend != wgpu::Backend::Vulkan || info.name.contains("SwiftShader") {
        println!("not run: {} on {:?} has no memory budget", info.name, info.backend);
        return None;
    }
    Some(pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default())).unwrap())
}

/// wgpu takes the device away at the next poll, as it does after a driver's fault: the reason is kept.
#[test]
fn a_device_that_wgpu_gives_up_is_lost_with_its_reason() {
    let Some((device, queue)) = with_budget(|budget| budget.for_device_loss = Some(0)) else { return };
    let kernels = Kernels::new(&device, &queue).unwrap();
    let faults = Faults::watch(&kernels);
    let buffer = Region::from(&kernels.upload("a", &[1; 64]).unwrap());
    lost(readback::wait(readback::read(&kernels, &[&buffer])), "read");
    lost(kernels.allocate("b", 64), "allocate");
    match faults.check() {
        Err(Error::Device(DeviceError::Lost { message, .. })) => assert_eq!(message, "Out of memory"),
        other => panic!("{other:?}"),
    }
}

/// Dispatches that take a while, and where they write.
struct Work {
    recording: Recording,
    x: Vec<f32>,
    input: Region,
    out: Region,
}

impl Work {
    const PROBLEM: roofline_fma::RooflineFma =
        roofline_fma::RooflineFma { elements: 1 << 14, iterations: 4096, a: 0.5, b: 0.25 };

    fn new(kernels: &Kernels, dispatches: usize) -> Self {
        let x = vec![0.5f32; Self::PROBLEM.elements as usize];
        let input = Region::from(&kernels.upload("x", bytemuck::cast_slice(&x)).unwrap());
        let out = Region::from(&kernels.allocate("out", 4 * u64::from(Self::PROBLEM.elements)).unwrap());
        let mut recording = Recording::new(kernels);
        for _ in 0..dispatches {
            let args = roofline_fma::Args { x: &input, y: &out };
            recording.add(&Self::PROBLEM, args).unwrap();
        }
        Work { recording, x, input, out }
    }
}

#[test]
fn what_is_not_done_in_time_is_an_error_and_can_be_read_later() {
    let gpu = gpu();
    if gpu.kernels.device().adapter_info().backend == wgpu::Backend::Gl {
        println!("not run: Mesa's GL is done when it has submitted");
        return;
    }
    let mut work = Work::new(&gpu.kernels, 1);
    work.recording.compile().unwrap();
    readback::submit(&mut work.recording).unwrap();
    match readback::finish_within(&gpu.kernels, Duration::from_millis(1)) {
        Err(error @ Error::Device(DeviceError::Timeout { seconds: 0.001, .. })) => {
            assert_eq!(
                error.to_string(),
                "GPU: waiting for the device: not done within 0.001 s; wait longer, submit less at once, or open a new device"
            );
        }
        other => panic!("{other:?}"),
    }
    readback::finish_within(&gpu.kernels, Duration::from_secs(300)).unwrap();
    let bytes = readback::wait(readback::read(&gpu.kernels, &[&work.out])).unwrap();
    // Each of the twelve chains has long come to b / (1 − a).
    let values: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes[0]);
    assert_eq!(values.len(), work.x.len());
    assert!(values.iter().all(|&value| value == 6.0), "{:?}", &values[..4]);
    gpu.assert_no_errors();
}

fn out_of_memory(result: egmla::Result<impl Sized>, what: &str) {
    match result.err().unwrap_or_else(|| panic!("{what}: succeeded without memory")) {
        error @ Error::Device(DeviceError::OutOfMemory { .. }) => {
            assert!(error.to_string().contains("ask for less") && error.is_of_device(), "{what}: {error}");
        }
        other => panic!("{what}: {other:?}"),
    }
}

/// A buffer that there is no memory for: by the driver's own word on SwiftShader, by wgpu's reading of the driver's budget
/// elsewhere. The device goes on, and so do the layer and the cache.
#[test]
fn no_memory_left_is_an_error_that_the_device_the_layer_and_the_cache_survive() {
    let open = |percent: Option<u8>| {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
        descriptor.memory_budget_thresholds.for_resource_creation = percent;
        let adapter = adapter(descriptor);
        let required_limits = wgpu::Limits { max_buffer_size: adapter.limits().max_buffer_size, ..Default::default() };
        let descriptor = wgpu::DeviceDescriptor { required_limits, ..Default::default() };
        (adapter.get_info(), pollster::block_on(adapter.request_device(&descriptor)))
    };
    let (info, plain) = open(None);
    let (device, queue) = if info.name.contains("SwiftShader") {
        plain.unwrap()
    } else if info.backend == wgpu::Backend::Vulkan {
        // The least share of the budget that holds a device, and a little more: nothing of it is touched.
        let least = (1..=95).find(|&percent| open(Some(percent)).1.is_ok()).expect("a budget that holds a device");
        open(Some(least + 2)).1.unwrap()
    } else {
        println!("not run: {:?} gives what it is asked for, and the machine pays", info.backend);
        return;
    };
    let kernels = Kernels::new(&device, &queue).unwrap();
    let config = config(Some(GateSite::UpProjected));
    let mut rig = Rig::new(&kernels, &config, POOL).unwrap();
    let mut random = Random::new(5);
    let (hidden, ids) = (random.values(9 * HIDDEN, 1.0), random.ids(9, VOCAB));
    let prompt = input(Mode::Prefill, &[5, 4], Some(&ids));
    let next = input(Mode::Decode, &[1, 1], Some(&ids[..2]));
    rig.step(prompt, &hidden).unwrap();

    let (lengths, distinct) = (rig.cache.lengths().to_vec(), rig.cache.distinct_ids());
    let size = kernels.context().limits.max_buffer_size & !15;
    for _ in 0..2 {
        out_of_memory(kernels.allocate("all of it", size), "allocate");
    }
    assert_eq!((rig.cache.lengths(), rig.cache.distinct_ids()), (&lengths[..], distinct));

    let got = rig.step(next, &hidden[..2 * HIDDEN]).unwrap();
    assert_eq!(rig.cache.lengths(), [6, 5]);
    let (device, queue) = open(None).1.unwrap();
    let kernels = Kernels::new(&device, &queue).unwrap();
    let mut good = Rig::new(&kernels, &config, POOL).unwrap();
    good.step(prompt, &hidden).unwrap();
    assert_eq!(got, good.step(next, &hidden[..2 * HIDDEN]).unwrap(), "as on a device that never was full");
}

/// A step that does not come to be leaves lengths, groups and pool as they were, and the next one is right.
#[test]
fn a_step_that_fails_is_as_if_it_had_not_been() {
    let limits =
        wgpu::Limits { max_buffer_size: 64 << 10, max_storage_buffer_binding_size: 64 << 10, ..Default::default() };
    let gpu = common::gpu_with(limits);
    for gate_rows in [GateRows::Recompute, GateRows::Pool { rows: 6 }] {
        // Rotations are 8 bytes for two of the rotary key's elements: with a long prompt's the tables do not fit a buffer, its
        // activations do.
        let config = AttentionConfig {
            n_head: 1,
            d_latent: 8,
            d_q_latent: Some(8),
            d_rope: 64,
            d_value: 8,
            ..config(Some(GateSite::UpProjected))
        };
        let options =
            CacheOptions { batch: 1, capacity: 300, storage: Storage::F16, max_tokens: 200, tile_rows: 256, ..OPTIONS };
        let rig = || Rig::with(&gpu.kernels, &config, gate_rows, options).unwrap();
        let mut random = Random::new(6);
        let (hidden, ids) = (random.values(9 * HIDDEN, 1.0), random.ids(9, VOCAB));
        let (long, many) = (random.values(200 * HIDDEN, 1.0), random.ids(200, VOCAB));
        let run = |rig: &mut Rig, fail: bool| {
            let mut all = Vec::new();
            for (mode, first, tokens) in [(Mode::Prefill, 0, 6), (Mode::Decode, 6, 1), (Mode::Decode, 7, 2)] {
                if fail {
                    let before = (rig.cache.lengths().to_vec(), rig.cache.distinct_ids());
                    let refused = rig.step(input(Mode::Prefill, &[200], Some(&many)), &long);
                    assert!(matches!(refused, Err(Error::Limit { limit: "max_buffer_size", .. })), "{refused:?}");
                    assert_eq!((rig.cache.lengths().to_vec(), rig.cache.distinct_ids()), before);
                    // Prepared, and then given up.
                    let tokens = StepTokens { counts: &[3], ids: Some(&many[..3]) };
                    rig.cache.prepare(Mode::Decode, tokens).unwrap();
                    assert_eq!((rig.cache.lengths().to_vec(), rig.cache.distinct_ids()), before);
                }
                let counts = [tokens as u32];
                let new = input(mode, &counts, Some(&ids[first..first + tokens]));
                all.extend(rig.step(new, &hidden[first * HIDDEN..(first + tokens) * HIDDEN]).unwrap());
            }
            all
        };
        assert_eq!(run(&mut rig(), true), run(&mut rig(), false), "{gate_rows:?}");
    }
    gpu.assert_no_errors();
}

fn other_device(result: egmla::Result<impl Sized>, what: &'static str) {
    match result.err().unwrap_or_else(|| panic!("{what} of another device was taken")) {
        error @ Error::Argument(ArgumentError::OtherDevice { what: found, .. }) => {
            assert_eq!(found, what, "{error}");
            assert!(error.to_string().ends_with("make both with the kernels of one device"), "{error}");
        }
        other => panic!("{what}: {other:?}"),
    }
}

/// Devices without handlers: whatever came to wgpu would panic.
#[test]
fn objects_of_another_device_are_refused_and_nothing_is_recorded() {
    // wgpu counts devices in each instance anew, and by that number it compares them.
    let (of_one, of_another) = (bare(), bare());
    assert!(of_one.0 == of_another.0, "wgpu tells devices of two instances apart: `one_device` is not needed any more");
    refuses_objects_of(of_one, of_another, false);
    let adapter = adapter(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let open = || pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default())).unwrap();
    refuses_objects_of(open(), open(), true);
}

/// Of two instances wgpu confuses the buffers, too, and nobody can tell: `regions` only of one.
fn refuses_objects_of(
    (device, queue): (wgpu::Device, wgpu::Queue),
    (other, other_queue): (wgpu::Device, wgpu::Queue),
    regions: bool,
) {
    let (kernels, others) = (Kernels::new(&device, &queue).unwrap(), Kernels::new(&other, &other_queue).unwrap());
    let config = config(Some(GateSite::UpProjected));
    let mut here = Rig::new(&kernels, &config, GateRows::Table).unwrap();
    let mut there = Rig::new(&others, &config, GateRows::Table).unwrap();
    let mut random = Random::new(7);
    let (hidden, ids) = (random.values(2 * HIDDEN, 1.0), random.ids(2, VOCAB));
    let x = Region::from(&kernels.upload("x", bytemuck::cast_slice(&hidden)).unwrap());
    let y = Region::from(&kernels.allocate("y", 4 * hidden.len() as u64).unwrap());
    let new = StepTokens { counts: &[1, 1], ids: Some(&ids) };
    let step = here.cache.prepare(Mode::Prefill, new).unwrap();
    let other_step = there.cache.prepare(Mode::Prefill, new).unwrap();
    let mut recording = Recording::new(&kernels);

    other_device(there.attention.forward(&mut recording, &here.cache, &step, 0, &x, &y), "the layer");
    other_device(here.attention.forward(&mut recording, &there.cache, &other_step, 0, &x, &y), "the cache");
    other_device(there.cache.copy_sequence(&mut recording, 0, 1), "the cache");
    assert_eq!(recording.dispatches(), 0);
    // Kernels of one device are the same to it, however they were made.
    let again = Kernels::new(&device, &queue).unwrap().uncompiled();
    let mut recording = Recording::new(&again);
    here.attention.forward(&mut recording, &here.cache, &step, 0, &x, &y).unwrap();

    if !regions {
        return;
    }
    // A buffer does not tell its device: wgpu refuses a region of another one where it is bound, and the pass stays as it was.
    let foreign = Region::from(&others.allocate("foreign", 4 * hidden.len() as u64).unwrap());
    let mut recording = Recording::new(&kernels);
    here.attention.forward(&mut recording, &here.cache, &step, 0, &x, &foreign).unwrap();
    let refused = |result: egmla::Result<()>| match result {
        Err(error @ Error::Device(DeviceError::Validation { .. })) => {
            assert!(error.to_string().contains("device"), "{error}")
        }
        other => panic!("{other:?}"),
    };
    refused(readback::submit(&mut recording));
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    refused(recording.encode(&mut encoder));
    queue.submit([encoder.finish()]);
    refused(readback::wait(readback::read(&kernels, &[&foreign])).map(drop));
    // The step is still good.
    let mut recording = here.record(&step, &x, &y).unwrap();
    readback::submit(&mut recording).unwrap();
    here.cache.commit(step).unwrap();
    assert_eq!(here.cache.lengths(), [1, 1]);
    let out = readback::wait(readback::read_f32(&kernels, &[&y])).unwrap();
    assert!(out[0].iter().all(|value| value.is_finite()) && out[0].iter().any(|&value| value != 0.0));
}

/// What is not caught by a scope comes to [`Faults`], once, and does not panic.
#[test]
fn errors_outside_of_any_scope_come_to_the_owner() {
    let adapter = adapter(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let open = || pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default())).unwrap();
    let (device, queue) = open();
    let kernels = Kernels::new(&device, &queue).unwrap();
    let faults = Faults::watch(&kernels);
    let buffer = kernels.allocate("a", 64).unwrap();
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(&buffer, 0, &buffer, 64, 64);
    queue.submit([encoder.finish()]);
    match faults.check() {
        Err(error @ Error::Device(DeviceError::Validation { .. })) => {
            assert!(!error.to_string().contains('\n'), "{error}")
        }
        other => panic!("{other:?}"),
    }
    while faults.check().is_err() {}
    assert!(!faults.is_lost());
    // Errors that scopes catch do not come here.
    let (other, other_queue) = open();
    let foreign = Region::from(&Kernels::new(&other, &other_queue).unwrap().allocate("b", 64).unwrap());
    readback::wait(readback::read(&kernels, &[&foreign])).unwrap_err();
    faults.check().unwrap();
}

#[test]
fn what_is_shared_between_threads_may_be() {
    fn shared<T: Send + Sync>() {}
    shared::<Kernels>();
    shared::<Recording>();
    shared::<Region>();
    shared::<Attention>();
    shared::<LatentCache>();
    shared::<Step>();
    shared::<Faults>();
    shared::<Error>();
    shared::<egmla::check::Case>();
    shared::<egmla::decoder::Decoder>();
    shared::<egmla::decoder::DecoderState>();
}

/// Eight threads, each with a layer and a cache of its own, on one device, its pipelines and its queue.
#[test]
fn eight_threads_on_one_device_give_the_bits_of_one() {
    let gpu = gpu();
    let sites = [None, Some(GateSite::UpProjected), Some(GateSite::Latent)];
    let one = |kernels: &Kernels, thread: usize| {
        run(kernels, &config(sites[thread % sites.len()]), 10 + thread as u64).unwrap()
    };
    let alone: Vec<_> = (0..8).map(|thread| one(&gpu.kernels, thread)).collect();
    assert!(alone.iter().flatten().all(|value| value.is_finite()) && alone[0] != alone[3]);
    // Nothing is compiled yet: the threads do that at once, too.
    let kernels = gpu.kernels.uncompiled();
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|thread| {
                scope.spawn({
                    let kernels = &kernels;
                    move || one(kernels, thread)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let bits = |all: &[Vec<f32>]| -> Vec<Vec<u32>> {
        all.iter().map(|values| values.iter().map(|value| value.to_bits()).collect()).collect()
    };
    assert_eq!(bits(&together), bits(&alone));
    gpu.assert_no_errors();
}

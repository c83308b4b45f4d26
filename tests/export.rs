//! What is exported for hosts without Rust: whole, true to the case table, and refused where it could not be true.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeSet;

use common::gpu;
use egmla::check::capture::{Action, Blob, Blobs, Capture};
use egmla::check::compare::{Tolerance, compare};
use egmla::check::export::{CaseData, verdicts, webgpu};
use egmla::check::guarded::{GUARD_WORDS, Guarded, POISON};
use egmla::low_level::kernels::{REGISTRY, residual_add, shaders, swiglu};
use egmla::low_level::{Access, AdapterClass, AnyOp, PlanContext};
use egmla::{Kernels, Recording, Region};

fn words(blobs: &Blobs, blob: Blob, count: usize) -> Vec<u32> {
    match blob {
        Blob::Fill { fill } => vec![fill; count],
        Blob::At { at, bytes } => bytemuck::pod_collect_to_vec(&blobs.bytes()[at..at + bytes]),
    }
}

/// Every dispatch can be bound as the kernel declares it, every reading and comparison lies in what is read, outputs begin
/// as NaN, and guard words stand around what is read.
fn assert_whole(data: &CaseData, blobs: &Blobs) {
    let id = &data.id;
    let mut readings = Vec::new();
    let mut written = BTreeSet::new();
    for action in &data.actions {
        match action {
            Action::Dispatch { kernel, subgroups, overrides, grid, params, bindings } => {
                let of = |operation: &&&dyn AnyOp| operation.shaders().iter().any(|spec| spec.name == *kernel);
                let operation = REGISTRY.iter().find(of).expect(id);
                let spec = shaders().find(|spec| spec.name == *kernel).expect(id);
                assert_eq!(*subgroups, spec.features.contains(egmla::wgpu::Features::SUBGROUP), "{id}");
                for (name, _) in overrides {
                    assert!(spec.source.contains(&format!("override {name}:")), "{id}: {kernel} has no {name}");
                }
                assert!(grid.iter().all(|&groups| (1..=65_535).contains(&groups)), "{id}: {grid:?}");
                assert!(matches!(params, Blob::At { bytes, .. } if *bytes == 4 * operation.params().len()), "{id}");
                assert_eq!(bindings.len(), operation.bindings().len(), "{id}");
                for (bound, (number, declared)) in bindings.iter().zip((1..).zip(operation.bindings())) {
                    assert_eq!((bound.binding, bound.write), (number, declared.access == Access::Write), "{id}");
                    assert!(bound.offset % 256 == 0 && bound.size % 4 == 0 && bound.size > 0, "{id}: {bound:?}");
                    assert!(bound.offset + bound.size <= data.buffers[bound.buffer].bytes, "{id}: {bound:?}");
                    if bound.write {
                        written.insert(bound.buffer);
                    }
                }
            }
            Action::Read { buffer, guard, words: count } => {
                let first = words(blobs, data.buffers[*buffer].first, data.buffers[*buffer].bytes as usize / 4);
                assert_eq!(*guard, GUARD_WORDS, "{id}");
                let (before, rest) = first.split_at(*guard);
                assert!(before.iter().chain(&rest[*count..]).all(|&word| word == POISON), "{id}: no guard words");
                readings.push((*buffer, *count));
            }
        }
    }
    for variant in &data.variants {
        assert_eq!(variant.comparisons.is_empty(), variant.skipped.is_some(), "{id} {}", variant.tuning);
        for comparison in &variant.comparisons {
            assert!(comparison.tolerance.relative < 1e-2, "{id}");
            for (reading, view) in &comparison.parts {
                let (buffer, count) = readings[*reading];
                // What no kernel wrote to proves nothing, but where a kernel has nothing to write.
                assert!(written.contains(&buffer) || written.is_empty(), "{id}: what is compared is an input");
                let shown = view.apply(&vec![0; count]);
                assert!(!shown.iter().any(|value| value.is_nan()) || count == 0, "{id}: {view:?} of {count} words");
            }
        }
    }
}

#[test]
fn the_smallest_case_of_every_kernel_is_whole() {
    let gpu = gpu();
    let mut seen = BTreeSet::new();
    let mut skipped = BTreeSet::new();
    for case in egmla::check::cases() {
        if case.kernel() != "layer" && seen.insert(case.kernel()) {
            let (data, blobs) = case.export(&gpu.kernels, webgpu(Some((8, 8)))).unwrap();
            assert_eq!((data.id.as_str(), data.kernel), (case.id(), case.kernel()));
            assert_whole(&data, &blobs);
            if data.variants.iter().any(|variant| variant.skipped.is_some()) {
                skipped.insert(case.kernel());
            }
        }
    }
    assert_eq!(seen.len(), shaders().count());
    // What a page cannot have, whatever this device has.
    let cooperative = shaders().filter(|spec| spec.name.contains("cooperative")).map(|spec| spec.name);
    assert_eq!(skipped, cooperative.collect());
    gpu.assert_no_errors();
}

#[test]
fn layers_of_both_kinds_are_whole() {
    let gpu = gpu();
    for id in ["layer/mla_odd_widths/f16", "layer/up_projected_tanh_layernorm/f32"] {
        let cases = egmla::check::cases();
        let case = cases.iter().find(|case| case.id() == id).expect(id);
        let (data, blobs) = case.export(&gpu.kernels, webgpu(None)).unwrap();
        assert_whole(&data, &blobs);
        let dispatches = data.actions.iter().filter(|action| matches!(action, Action::Dispatch { .. })).count();
        assert!(dispatches > 100 && data.variants.len() >= 7, "{dispatches} dispatches, {} ways", data.variants.len());
    }
    gpu.assert_no_errors();
}

#[test]
fn an_export_is_the_same_bytes_every_time() {
    let gpu = gpu();
    let cases = egmla::check::cases();
    let case = cases.iter().find(|case| case.id() == "layer/up_projected_tanh_rmsnorm/f16").unwrap();
    let once = || {
        let (data, blobs) = case.export(&gpu.kernels, webgpu(None)).unwrap();
        (serde_json::to_string(&data).unwrap(), blobs.bytes().to_vec())
    };
    let first = once();
    assert!((0..3).all(|_| once() == first));
}

fn swiglu(kernels: &Kernels, recording: &mut Recording, elements: u32, y: &Region) -> egmla::Result<()> {
    let x = Region::from(&kernels.upload("x", bytemuck::cast_slice(&vec![1f32; elements as usize]))?);
    let args = swiglu::Args { gate: &x, up: &x, y };
    recording.add(&swiglu::Swiglu { elements }, args)
}

#[test]
fn a_buffer_that_the_host_wrote_to_between_kernels_is_refused() {
    let gpu = gpu();
    let capture = Capture::new(&gpu.kernels, PlanContext::webgpu_defaults(AdapterClass::Discrete));
    let kernels = capture.kernels();
    let y = kernels.allocate("y", 64).unwrap();
    let step = || {
        let mut recording = Recording::new(kernels);
        swiglu(kernels, &mut recording, 16, &Region::from(&y)).unwrap();
        capture.submit(&mut recording)
    };
    step().unwrap();
    step().unwrap();
    gpu.kernels.queue().write_buffer(&y, 8, &[1, 2, 3, 4]);
    let problem = step().unwrap_err().to_string();
    assert!(problem.contains("the host wrote to a buffer"), "{problem}");
}

#[test]
fn only_words_may_differ_between_recordings_of_one_shape() {
    let gpu = gpu();
    let record = |elements: u32, delta: &[f32]| {
        let capture = Capture::new(&gpu.kernels, webgpu(None));
        let delta = Guarded::filled(&gpu.kernels, "delta", bytemuck::cast_slice(delta)).unwrap();
        let stream = Guarded::filled(&gpu.kernels, "stream", &[0; 8]).unwrap();
        let mut recording = Recording::new(capture.kernels());
        let args = residual_add::Args { delta: &delta.region, stream: &stream.region };
        recording.add(&residual_add::ResidualAdd { elements, factor: 1.0 }, args).unwrap();
        capture.submit(&mut recording).unwrap();
        capture.read(&stream).unwrap();
        let actions = capture.take_actions();
        (capture, actions)
    };
    let (own, actions) = record(8, &[1.0; 8]);
    let (same, same_actions) = record(8, &[1.0; 8]);
    assert_eq!(own.differences(&actions, &same, &same_actions).unwrap(), []);
    let (other, other_actions) = record(8, &[1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    let found = own.differences(&actions, &other, &other_actions).unwrap();
    let words: Vec<_> =
        found.iter().map(|one| (one.word, f32::from_bits(one.here), f32::from_bits(one.there))).collect();
    assert_eq!(words, [(GUARD_WORDS + 2, 1.0, 2.0)]);
    let (shorter, shorter_actions) = record(7, &[1.0; 8]);
    assert!(own.differences(&actions, &shorter, &shorter_actions).is_err());
    assert!(own.differences(&actions, &same, &same_actions[..1]).is_err());
}

#[test]
fn the_verdicts_are_those_of_the_comparator_and_hold_many_lies() {
    let (data, blobs) = verdicts();
    assert!(data.views.len() >= 8);
    let mut lies = 0;
    for result in &data.results {
        let (Blob::At { at, bytes }, Blob::At { at: expected_at, bytes: expected_bytes }) =
            (result.got, result.expected)
        else {
            panic!("{}: not written down", result.what);
        };
        let got: Vec<f32> = bytemuck::pod_collect_to_vec(&blobs.bytes()[at..at + bytes]);
        let expected: Vec<f64> =
            bytemuck::pod_collect_to_vec(&blobs.bytes()[expected_at..expected_at + expected_bytes]);
        let comparison = compare(&got, &expected, Tolerance { relative: result.tolerance.relative });
        assert_eq!(comparison.verdict.is_ok(), result.right, "{}", result.what);
        assert_eq!(comparison.relative_error.is_finite().then_some(comparison.relative_error), result.error);
        lies += usize::from(!result.right);
    }
    assert!(lies >= 12 && lies < data.results.len(), "{lies} lies of {}", data.results.len());
}

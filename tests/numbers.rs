//! Long contexts and equal bits run after run, each beside a control that must fail.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::gpu;
use egmla::Storage;
use egmla::attention::{DecodePath, GateRows};
use egmla::check::compare::{Tolerance, compare};
use egmla::check::long::{LENGTHS, LIMIT, SPREADS, Way, measure};
use egmla::check::property::{Event, Ids, LayerCase, Prepared, Rope, Shape};
use egmla::config::{Activation, GateConfig, GateNorm, GateSite};

/// Every configuration and way over an f16 cache, up to 65 536 tokens.
#[test]
fn errors_stay_low_and_do_not_grow_with_the_cache() {
    let gpu = gpu();
    let curves = measure(&gpu.kernels, &LENGTHS, |what| {
        println!("{what}");
        true
    })
    .unwrap();
    gpu.assert_no_errors();
    let mut problems = Vec::new();
    for curve in &curves {
        println!("{:?}", curve);
        assert_eq!(curve.errors.iter().map(|(tokens, _)| *tokens).collect::<Vec<_>>(), LENGTHS);
        if curve.way != Way::HalfSums {
            problems.extend(curve.problem());
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    let of = |way| curves.iter().filter(move |curve| curve.way == way).count();
    for way in Way::DEVICE {
        assert_eq!(of(way), 3 * SPREADS.len(), "{way:?}");
    }
    // The control: sums in f16, where no key takes all the weight, are found out at every length that matters.
    let control = curves.iter().find(|curve| curve.way == Way::HalfSums && curve.spread == SPREADS[0]).unwrap();
    assert!(control.problem().is_some());
    assert!(control.errors.iter().all(|&(tokens, error)| tokens < 4096 || error > 2.0 * LIMIT), "{control:?}");
}

fn shape(gate: Option<(GateSite, Activation, GateNorm)>, storage: Storage) -> Shape {
    Shape {
        hidden_size: 24,
        n_head: 3,
        d_latent: 16,
        d_q_latent: None,
        d_nope: 8,
        d_rope: 8,
        d_value: 8,
        attention_bias: false,
        kv_a_norm: true,
        rope: Rope::Neighbours,
        gate: gate.map(|(site, activation, norm)| GateConfig {
            vocab_size: 17,
            d_gate: 5,
            tied: false,
            site,
            activation,
            norm,
            norm_eps: 1e-5,
        }),
        storage,
        seed: 1,
    }
}

fn every_site() -> [Option<(GateSite, Activation, GateNorm)>; 3] {
    [
        None,
        Some((GateSite::Latent, Activation::Sigmoid, GateNorm::RmsNorm)),
        Some((GateSite::UpProjected, Activation::OnePlus, GateNorm::LayerNorm)),
    ]
}

/// A ragged prefill in two chunks, then decode steps by every path with one to sixteen tokens.
fn history(shape: Shape, gate_rows: GateRows) -> LayerCase {
    let decode = |counts: [u32; 3], path, seed| Event::Decode { counts: counts.to_vec(), path, seed };
    LayerCase {
        shape,
        batch: 3,
        capacity: 330,
        tile_rows: 256,
        gate_rows,
        ids: Ids::Skewed,
        events: vec![
            Event::Prefill { counts: vec![270, 0, 33], seed: 1 },
            Event::Prefill { counts: vec![9, 1, 0], seed: 2 },
            decode([1, 1, 1], DecodePath::Absorbed, 3),
            decode([1, 0, 1], DecodePath::Expanded, 4),
            decode([16, 3, 1], DecodePath::Absorbed, 5),
            decode([16, 3, 1], DecodePath::Expanded, 6),
        ],
    }
}

/// Same input, same adapter: the same bits, on a fresh device as on one that ran other things before.
#[test]
fn equal_input_gives_equal_bits_run_after_run() {
    let devices = [gpu(), gpu()];
    let mut told_apart = 0;
    for storage in Storage::ALL {
        for gate in every_site() {
            for gate_rows in [GateRows::Recompute, GateRows::Pool { rows: 6 }, GateRows::Table] {
                let case = history(shape(gate, storage), gate_rows);
                let bits = |gpu: &common::Gpu, case: &LayerCase| -> Vec<u32> {
                    let layer = Prepared::new(&case.shape).unwrap();
                    let outputs = case.outputs(&gpu.kernels, &layer).unwrap();
                    outputs.into_iter().map(f32::to_bits).collect()
                };
                let first = bits(&devices[0], &case);
                assert_eq!(first, bits(&devices[0], &case), "{gate:?} {gate_rows:?} {storage:?}: again on one device");
                assert_eq!(first, bits(&devices[1], &case), "{gate:?} {gate_rows:?} {storage:?}: on another device");
                // Other hidden states give other bits: what is compared is not a constant.
                let mut other = case.clone();
                other.events[2] = Event::Decode { counts: vec![1, 1, 1], path: DecodePath::Absorbed, seed: 9 };
                told_apart += u32::from(first != bits(&devices[0], &other));
                if gate.is_none_or(|(site, ..)| site == GateSite::Latent) {
                    break;
                }
            }
        }
    }
    assert_eq!(told_apart, 2 * (1 + 1 + 3));
    devices.iter().for_each(common::Gpu::assert_no_errors);
}

/// Whoever stands beside a sequence: to a few roundings, since products of many rows may be another kernel's than those of few. On
/// lavapipe to the bit.
#[test]
fn a_sequence_decodes_alone_as_in_a_batch() {
    let gpu = gpu();
    for gate in every_site() {
        for path in [DecodePath::Absorbed, DecodePath::Expanded] {
            let of = |others: u32| {
                let counts = |own: u32| vec![own, others * own, others * own.div_ceil(2)];
                let case = LayerCase {
                    events: vec![
                        Event::Prefill { counts: counts(40), seed: 1 },
                        Event::Decode { counts: counts(2), path, seed: 2 },
                    ],
                    ids: Ids::Distinct,
                    ..history(shape(gate, Storage::F32), GateRows::Recompute)
                };
                let layer = Prepared::new(&case.shape).unwrap();
                let outputs = case.outputs(&gpu.kernels, &layer).unwrap();
                // The first sequence's part of either step; hidden states are drawn sequence after sequence.
                let prefilled = 40 * 24;
                let decoded = (40 * (1 + others) + 20 * others) as usize * 24;
                [&outputs[..prefilled], &outputs[decoded..decoded + 2 * 24]].concat()
            };
            let (alone, together) = (of(0), of(1));
            let wide: Vec<f64> = alone.iter().map(|&value| value.into()).collect();
            compare(&together, &wide, Tolerance { relative: 1e-6 }).verdict.unwrap();
            println!(
                "{gate:?} {path:?}: {} of {} differ in a bit",
                alone.iter().zip(&together).filter(|(a, b)| a != b).count(),
                alone.len()
            );
        }
    }
    gpu.assert_no_errors();
}

//! Random layer cases against the reference, and the identities of EG-MLA, each beside a control that must fail.
//!
//! A failing case is printed as a line of JSON, shrunk. It runs again by
//! `EGMLA_PROPERTY_CASE='{…}' cargo test --test property replay -- --nocapture`; another seed and other numbers of cases by
//! `EGMLA_PROPERTY_SEED` and `EGMLA_PROPERTY_CASES`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Gpu, gpu};
use egmla::Storage;
use egmla::attention::{DecodePath, GateRows};
use egmla::check::compare::{F32_LIMIT, Tolerance, compare};
use egmla::check::property::{Event, Failure, Ids, LayerCase, Prepared, Rope, Search, Shape, family, search, shrink};
use egmla::config::{Activation, AttentionConfig, GateConfig, GateNorm, GateSite};
use egmla::random::{Random, attention_weights};
use egmla::weights::{AttentionWeights, HostTensor, QueryWeights};

/// Cases of a run, over all parts; `EGMLA_PROPERTY_CASES` asks for another number.
const CASES: usize = 2000;

/// Configurations of a part.
const CONFIGURATIONS: usize = 12;

const PARTS: usize = 4;

fn from_env(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}={value}: no number")))
}

/// One part of the cases on a device of its own: the test runner has as many at work as the machine has cores.
fn part(index: usize) {
    let (seed, cases) = (from_env("EGMLA_PROPERTY_SEED", 1), from_env("EGMLA_PROPERTY_CASES", CASES));
    let gpu = gpu();
    let cases = (index + 1) * cases / PARTS - index * cases / PARTS;
    let seed = (seed * PARTS + index) as u64;
    let start = std::time::Instant::now();
    let report = search(&gpu.kernels, Search { seed, configurations: CONFIGURATIONS, cases }, |_| true).unwrap();
    gpu.assert_no_errors();
    if let Some(failure) = report.failure {
        panic!(
            "case {} of seed {seed}: {}\nshrunk: EGMLA_PROPERTY_CASE='{}' cargo test --test property replay\ndrawn: {}",
            report.compared,
            failure.problem,
            failure.case.to_json(),
            failure.drawn.to_json()
        );
    }
    assert_eq!(report.compared, cases);
    let (worst, case) = report.worst.unwrap();
    println!("seed {seed}: {cases} cases, {} tokens, {:.0} s", report.tokens, start.elapsed().as_secs_f64());
    println!("worst: {:.0} % of its tolerance: {}", worst * 100.0, case.to_json());
}

#[test]
fn random_layer_cases_0() {
    part(0);
}

#[test]
fn random_layer_cases_1() {
    part(1);
}

#[test]
fn random_layer_cases_2() {
    part(2);
}

#[test]
fn random_layer_cases_3() {
    part(3);
}

/// Runs the case of `EGMLA_PROPERTY_CASE`; without it, one that was shrunk once and fixed since.
#[test]
fn replay() {
    let case = std::env::var("EGMLA_PROPERTY_CASE").unwrap_or_else(|_| FIXED.to_owned());
    let case = LayerCase::from_json(&case).unwrap();
    let gpu = gpu();
    let comparison = case.run(&gpu.kernels).unwrap();
    gpu.assert_no_errors();
    comparison.verdict.unwrap_or_else(|problem| panic!("{problem}\n{}", case.to_json()));
    println!("relative error {:.1e}", comparison.relative_error);
}

const FIXED: &str = r#"{"shape":{"hidden_size":17,"n_head":3,"d_latent":13,"d_q_latent":6,"d_nope":7,"d_rope":6,"d_value":7,
"attention_bias":true,"kv_a_norm":true,"rope":"yarn","gate":{"vocab_size":5,"embed_dim":3,"site":"up_projected",
"activation":"silu","norm":"layer_norm","norm_eps":1e-5},"storage":"f32","seed":3},"batch":2,"capacity":30,"tile_rows":1,
"gate_rows":{"pool":{"rows":2}},"ids":"skewed","events":[{"prefill":{"counts":[9,0],"seed":5}},{"copy":{"from":0,"to":1}},
{"take_back":{"sequence":0,"tokens":4}},{"decode":{"counts":[3,2],"path":"absorbed","seed":6}}]}"#;

/// Layers of a seed with a gate of this kind, in f32, each with some histories of its cache.
fn histories(seed: u64, gate: Option<(GateSite, Activation, GateNorm)>) -> Vec<LayerCase> {
    let mut random = Random::new(seed);
    let mut all = Vec::new();
    for shape in family(seed, 3) {
        let gate = gate.map(|(site, activation, norm)| GateConfig {
            vocab_size: 23,
            d_gate: 5,
            tied: false,
            site,
            activation,
            norm,
            norm_eps: 1e-5,
        });
        // Values enough that none of the norms divides by next to nothing.
        let shape = Shape { gate, storage: Storage::F32, n_head: shape.n_head.max(2), ..shape };
        while all.len() % 4 < 3 {
            let case = LayerCase::draw(shape.clone(), &mut random);
            if case.events.iter().any(|event| matches!(event, Event::Decode { .. })) {
                all.push(case);
            }
        }
        all.push(LayerCase { ids: Ids::Distinct, ..chunked(shape, &[40]) });
    }
    all
}

/// One sequence, prefilled in these pieces of one stream of tokens.
fn chunked(shape: Shape, pieces: &[u32]) -> LayerCase {
    let events = pieces.iter().map(|&count| Event::Prefill { counts: vec![count], seed: 1 }).collect();
    let (gate_rows, ids) = (GateRows::Recompute, Ids::Skewed);
    LayerCase { shape, batch: 1, capacity: 64, tile_rows: 256, gate_rows, ids, events }
}

/// Outputs of a case by a layer whose configuration and weights were changed.
fn outputs(gpu: &Gpu, case: &LayerCase, change: impl FnOnce(&mut AttentionConfig, &mut AttentionWeights)) -> Vec<f32> {
    let mut config = case.shape.config();
    let mut weights = attention_weights(&config, case.shape.kv_a_norm, case.shape.seed).unwrap();
    change(&mut config, &mut weights);
    let layer = Prepared::of(config, weights).unwrap();
    let outputs = case.outputs(&gpu.kernels, &layer).unwrap();
    gpu.assert_no_errors();
    outputs
}

fn unchanged(_: &mut AttentionConfig, _: &mut AttentionWeights) {}

fn without_gate(config: &mut AttentionConfig, weights: &mut AttentionWeights) {
    config.gate = None;
    weights.gate = None;
}

/// g = 1, whatever the id.
fn with_gate_of_one(_: &mut AttentionConfig, weights: &mut AttentionWeights) {
    weights.gate.as_mut().unwrap().b_proj.data.fill(0.0);
}

fn error(a: &[f32], b: &[f32]) -> f64 {
    let wide: Vec<f64> = b.iter().map(|&value| value.into()).collect();
    compare(a, &wide, Tolerance { relative: f64::MAX }).relative_error
}

#[track_caller]
fn assert_same(a: &[f32], b: &[f32], case: &LayerCase) {
    // Each is within the limit of what is right.
    assert!(error(a, b) <= 2.0 * F32_LIMIT, "{:.1e}: {}", error(a, b), case.to_json());
}

#[track_caller]
fn assert_other(a: &[f32], b: &[f32], case: &LayerCase) {
    assert!(error(a, b) > 1e-2, "the control passes ({:.1e}): {}", error(a, b), case.to_json());
}

/// With every decode step by one path.
fn by(path: DecodePath, case: &LayerCase) -> LayerCase {
    let mut case = case.clone();
    for event in &mut case.events {
        if let Event::Decode { path: own, .. } | Event::GiveUp { path: own, .. } = event {
            *own = path;
        }
    }
    case
}

#[test]
fn a_gate_of_one_without_a_norm_is_plain_mla() {
    let gpu = gpu();
    for site in [GateSite::UpProjected, GateSite::Latent] {
        for case in histories(11, Some((site, Activation::OnePlus, GateNorm::None))) {
            let mla = outputs(&gpu, &case, without_gate);
            assert_same(&outputs(&gpu, &case, with_gate_of_one), &mla, &case);
            // Control: a gate that is not 1.
            assert_other(&outputs(&gpu, &case, unchanged), &mla, &case);
        }
        // Control: a norm behind a gate of 1.
        for case in histories(12, Some((site, Activation::OnePlus, GateNorm::LayerNorm))) {
            assert_other(&outputs(&gpu, &case, with_gate_of_one), &outputs(&gpu, &case, without_gate), &case);
        }
    }
}

#[test]
fn both_decode_paths_agree_and_ungated_absorption_does_not() {
    let gpu = gpu();
    let up = |norm| Some((GateSite::UpProjected, Activation::OnePlus, norm));
    let latent = Some((GateSite::Latent, Activation::Silu, GateNorm::RmsNorm));
    for gate in [None, latent, up(GateNorm::LayerNorm), up(GateNorm::RmsNorm), up(GateNorm::None)] {
        for case in histories(13, gate) {
            let expanded = outputs(&gpu, &by(DecodePath::Expanded, &case), unchanged);
            let absorbed = by(DecodePath::Absorbed, &case);
            assert_same(&outputs(&gpu, &absorbed, unchanged), &expanded, &case);
            if gate.is_some() {
                assert_other(&outputs(&gpu, &absorbed, without_gate), &expanded, &case);
            }
        }
    }
}

#[test]
fn any_way_to_cut_a_sequence_is_one_prefill() {
    let gpu = gpu();
    let mut random = Random::new(3);
    for gate in [None, Some((GateSite::UpProjected, Activation::Tanh, GateNorm::LayerNorm))] {
        for shape in histories(14, gate).into_iter().map(|case| case.shape).step_by(4) {
            let whole = chunked(shape.clone(), &[40]);
            let expected = outputs(&gpu, &whole, unchanged);
            for path in [DecodePath::Absorbed, DecodePath::Expanded, DecodePath::Auto] {
                let first = 1 + random.ids(1, 30)[0];
                let second = 1 + random.ids(1, 39 - first)[0];
                let mut cut = chunked(shape.clone(), &[first, second]);
                let mut left = 40 - first - second;
                while left > 0 {
                    let count = (1 + random.ids(1, 5)[0]).min(left);
                    cut.events.push(Event::Decode { counts: vec![count], path, seed: 1 });
                    left -= count;
                }
                assert_same(&outputs(&gpu, &cut, unchanged), &expected, &cut);
                // Control: one piece of another stream of tokens.
                cut.events[1] = Event::Prefill { counts: vec![second], seed: 2 };
                assert_other(&outputs(&gpu, &cut, unchanged), &expected, &cut);
            }
        }
    }
}

#[test]
fn an_id_changes_its_token_and_those_that_see_it() {
    let gpu = gpu();
    let gate = Some((GateSite::UpProjected, Activation::OnePlus, GateNorm::LayerNorm));
    for shape in histories(15, gate).into_iter().map(|case| case.shape).step_by(4) {
        // Fewer tokens than ids: each has its own row of the table.
        let mut case = LayerCase { ids: Ids::Distinct, ..chunked(shape, &[15]) };
        case.events.push(Event::Decode { counts: vec![4], path: DecodePath::Absorbed, seed: 1 });
        let width = case.shape.hidden_size as usize;
        let before = outputs(&gpu, &case, unchanged);
        for token in [0, 9, 17] {
            let after = outputs(&gpu, &case, |_, weights| {
                weights.gate.as_mut().unwrap().embedding.as_mut().unwrap().data[token * 5..][..5]
                    .copy_from_slice(&[3.0, -2.0, 1.0, 2.0, -3.0]);
            });
            assert_eq!(before[..token * width], after[..token * width], "{}", case.to_json());
            assert_other(&after[token * width..][..width], &before[token * width..][..width], &case);
        }
        // An id that no token has changes nothing.
        let other = outputs(&gpu, &case, |_, weights| {
            weights.gate.as_mut().unwrap().embedding.as_mut().unwrap().data[22 * 5..].fill(7.0);
        });
        assert_eq!(before, other);
    }
}

#[test]
fn ids_and_the_rows_of_their_table_may_change_places() {
    let gpu = gpu();
    for site in [GateSite::UpProjected, GateSite::Latent] {
        for case in histories(16, Some((site, Activation::OnePlus, GateNorm::RmsNorm))) {
            let case = LayerCase { ids: Ids::Distinct, ..case };
            let turned = |_: &mut AttentionConfig, weights: &mut AttentionWeights| {
                let table = &mut weights.gate.as_mut().unwrap().embedding.as_mut().unwrap().data;
                *table = table.chunks(5).rev().flatten().copied().collect();
            };
            let expected = outputs(&gpu, &case, unchanged);
            assert_same(&outputs(&gpu, &LayerCase { ids: Ids::Reversed, ..case.clone() }, turned), &expected, &case);
            // Control: the table alone. Of 23 rows the middle one stays: a case of that id alone cannot tell.
            let tokens = case
                .events
                .iter()
                .any(|event| matches!(event, Event::Prefill { counts, .. } if counts.iter().any(|&n| n > 1)));
            if tokens {
                assert_other(&outputs(&gpu, &case, turned), &expected, &case);
            }
        }
    }
}

/// Blocks of `width` rows, the last first.
fn turn_blocks(tensor: &mut HostTensor, blocks: usize) {
    let size = tensor.data.len() / blocks;
    tensor.data = tensor.data.chunks(size).rev().flatten().copied().collect();
}

#[test]
fn the_order_of_heads_is_invisible() {
    let gpu = gpu();
    for gate in [None, Some((GateSite::UpProjected, Activation::Sigmoid, GateNorm::LayerNorm))] {
        for case in histories(17, gate) {
            let heads = case.shape.n_head as usize;
            let turn = |weights: &mut AttentionWeights, output: bool| {
                match &mut weights.query {
                    QueryWeights::Full { proj, .. } | QueryWeights::LowRank { b_proj: proj, .. } => {
                        turn_blocks(proj, heads)
                    }
                }
                turn_blocks(&mut weights.kv_b_proj, heads);
                if let Some(gate) = &mut weights.gate {
                    let norm = gate.norm_weight.iter_mut().chain(&mut gate.norm_bias);
                    norm.chain([&mut gate.b_proj]).for_each(|tensor| turn_blocks(tensor, heads));
                }
                if output {
                    let (width, columns) = (case.shape.d_value as usize, heads * case.shape.d_value as usize);
                    let turned = weights.o_proj.data.chunks(columns).flat_map(|row| row.chunks(width).rev().flatten());
                    weights.o_proj.data = turned.copied().collect();
                }
            };
            let expected = outputs(&gpu, &case, unchanged);
            assert_same(&outputs(&gpu, &case, |_, weights| turn(weights, true)), &expected, &case);
            assert_other(&outputs(&gpu, &case, |_, weights| turn(weights, false)), &expected, &case);
        }
    }
}

#[test]
fn a_norm_behind_the_gate_takes_its_scale() {
    let gpu = gpu();
    let scaled = |config: &mut AttentionConfig, weights: &mut AttentionWeights| {
        config.gate.as_mut().unwrap().norm_eps = 1e-12;
        weights.gate.as_mut().unwrap().b_proj.data.iter_mut().for_each(|value| *value *= 3.0);
    };
    let plain = |config: &mut AttentionConfig, _: &mut AttentionWeights| config.gate.as_mut().unwrap().norm_eps = 1e-12;
    for site in [GateSite::UpProjected, GateSite::Latent] {
        for norm in GateNorm::ALL {
            for case in histories(18, Some((site, Activation::Identity, norm))) {
                let (expected, got) = (outputs(&gpu, &case, plain), outputs(&gpu, &case, scaled));
                match norm {
                    GateNorm::None => assert_other(&got, &expected, &case),
                    GateNorm::LayerNorm | GateNorm::RmsNorm => assert_same(&got, &expected, &case),
                }
            }
        }
    }
}

#[test]
fn the_layout_of_rotary_pairs_shows_past_position_0_and_nowhere_else() {
    let gpu = gpu();
    for gate in [None, Some((GateSite::UpProjected, Activation::Sigmoid, GateNorm::LayerNorm))] {
        for case in histories(19, gate).into_iter().filter(|case| case.shape.d_rope > 2).step_by(3) {
            let of = |rope| outputs(&gpu, &chunked(Shape { rope, ..case.shape.clone() }, &[40]), unchanged);
            let (pairs, width) = (of(Rope::Neighbours), case.shape.hidden_size as usize);
            for other in [Rope::Halves, Rope::Linear] {
                let other = of(other);
                assert_same(&other[..width], &pairs[..width], &case);
                let apart = error(&other[width..], &pairs[width..]);
                assert!(apart > 1e-3, "{apart:.1e}: {}", case.to_json());
            }
        }
    }
}

/// A search finds what is wrong with one layer of a family, and shrinks it: here, every case with two tokens of a sequence in a
/// decode step by the absorbed path.
#[test]
fn what_fails_is_shrunk_to_little_more_than_its_cause() {
    let wrong = |case: &LayerCase| {
        let two = |event: &Event| matches!(event, Event::Decode { counts, path: DecodePath::Absorbed, .. } if counts.iter().any(|&count| count > 1));
        Ok(case.events.iter().any(two).then(|| "two".to_owned()))
    };
    let mut random = Random::new(5);
    let mut shrunk = 0;
    for shape in family(3, 8) {
        let drawn = LayerCase::draw(shape, &mut random);
        let Some(problem) = wrong(&drawn).unwrap() else { continue };
        let (case, problem) = shrink(drawn.clone(), problem, wrong).unwrap();
        let failure = Failure { case, problem, drawn };
        assert_eq!(LayerCase::from_json(&failure.case.to_json()).unwrap(), failure.case);
        let LayerCase { batch, ref events, ref shape, .. } = failure.case;
        assert_eq!(
            (batch, events.len(), shape.gate.is_none(), shape.n_head),
            (1, 1, true, 1),
            "{}",
            failure.case.to_json()
        );
        assert!(matches!(&events[0], Event::Decode { counts, .. } if counts == &[2]), "{}", failure.case.to_json());
        shrunk += 1;
    }
    assert!(shrunk > 1, "{shrunk} cases to shrink");
}

#[test]
fn a_case_that_cannot_be_is_refused() {
    let case = LayerCase::from_json(FIXED).unwrap();
    assert_eq!(LayerCase::from_json(&case.to_json()).unwrap(), case);
    for change in [
        |case: &mut LayerCase| case.events.clear(),
        |case: &mut LayerCase| case.capacity = 8,
        |case: &mut LayerCase| case.events.insert(0, Event::TakeBack { sequence: 0, tokens: 1 }),
        |case: &mut LayerCase| case.events.push(Event::Copy { from: 0, to: 2 }),
        |case: &mut LayerCase| case.events.push(Event::Decode { counts: vec![17, 0], path: DecodePath::Auto, seed: 0 }),
        |case: &mut LayerCase| case.shape.d_rope = 3,
        |case: &mut LayerCase| case.shape.n_head = 0,
    ] {
        let mut wrong = case.clone();
        change(&mut wrong);
        LayerCase::from_json(&wrong.to_json()).unwrap_err();
    }
    LayerCase::from_json("{}").unwrap_err();
}

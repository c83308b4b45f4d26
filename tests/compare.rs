//! The comparator on lies: each must be caught, and the truth must pass.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use egmla::check::compare::{F16_LIMIT, F32_LIMIT, Tolerance, UNIT_ROUNDOFF, compare};
use egmla::random::Random;
use egmla::reference::{Heads, attention_prefill};

const ROWS: usize = 12;
const WIDTH: usize = 16;
const TOLERANCE: Tolerance = Tolerance { relative: F32_LIMIT };

/// A result as a kernel would give it: the reference, rounded to f32 and off by an ulp or so.
fn truth() -> (Vec<f32>, Vec<f64>) {
    let mut random = Random::new(3);
    let expected: Vec<f64> = random.values(ROWS * WIDTH, 1.0).iter().map(|&value| value.into()).collect();
    let noise = random.values(ROWS * WIDTH, 1.0);
    let got = expected.iter().zip(noise).map(|(e, n)| (e * (1.0 + UNIT_ROUNDOFF * f64::from(n))) as f32).collect();
    (got, expected)
}

fn must_fail(what: &str, got: &[f32], expected: &[f64], tolerance: Tolerance) -> String {
    let comparison = compare(got, expected, tolerance);
    comparison.verdict.expect_err(what)
}

#[test]
fn the_truth_passes() {
    let (got, expected) = truth();
    let comparison = compare(&got, &expected, TOLERANCE);
    assert_eq!(comparison.verdict, Ok(()));
    assert!(comparison.relative_error > 0.0 && comparison.relative_error < 1e-6);
}

#[test]
fn one_nan_is_found_and_named() {
    let (mut got, expected) = truth();
    got[37] = f32::NAN;
    let problem = must_fail("NaN", &got, &expected, TOLERANCE);
    assert!(problem.contains("element 37 is NaN"), "{problem}");
}

#[test]
fn an_infinity_where_a_number_belongs_and_a_number_where_an_infinity_belongs() {
    let (mut got, mut expected) = truth();
    got[5] = f32::INFINITY;
    must_fail("infinity", &got, &expected, TOLERANCE);
    got[5] = 1.0;
    expected[5] = f64::NEG_INFINITY;
    must_fail("a number in the place of an infinity", &got, &expected, TOLERANCE);
    // Each kind of non-finite value is its own.
    for (lie, truth) in [
        (f32::NAN, f64::NEG_INFINITY),
        (f32::INFINITY, f64::NEG_INFINITY),
        (f32::NEG_INFINITY, f64::INFINITY),
        (f32::INFINITY, f64::NAN),
    ] {
        got[5] = lie;
        expected[5] = truth;
        must_fail("another kind", &got, &expected, TOLERANCE);
        expected[5] = lie.into();
        assert!(compare(&got, &expected, TOLERANCE).verdict.is_ok());
    }
}

#[test]
fn all_nan_and_all_zero() {
    let (got, expected) = truth();
    must_fail("all NaN", &vec![f32::NAN; got.len()], &expected, TOLERANCE);
    must_fail("zeros", &vec![0.0; got.len()], &expected, TOLERANCE);
    // Zeros against zeros are right; anything against zeros is wrong.
    assert!(compare(&[0.0; 4], &[0.0; 4], TOLERANCE).verdict.is_ok());
    must_fail("noise on zeros", &[1e-6, 0.0], &[0.0, 0.0], TOLERANCE);
}

#[test]
fn stale_output_of_another_input() {
    let (got, expected) = truth();
    let mut stale = got.clone();
    stale.rotate_left(WIDTH);
    must_fail("stale", &stale, &expected, TOLERANCE);
}

#[test]
fn two_rows_swapped() {
    let (mut got, expected) = truth();
    for column in 0..WIDTH {
        got.swap(2 * WIDTH + column, 3 * WIDTH + column);
    }
    must_fail("swapped rows", &got, &expected, TOLERANCE);
    must_fail("swapped rows, f16", &got, &expected, Tolerance { relative: F16_LIMIT });
}

#[test]
fn one_per_cent_of_scale() {
    let (got, expected) = truth();
    let scaled: Vec<f32> = got.iter().map(|value| value * 1.01).collect();
    must_fail("scale", &scaled, &expected, TOLERANCE);
    must_fail("scale, f16", &scaled, &expected, Tolerance { relative: F16_LIMIT });
}

#[test]
fn one_wrong_element_among_a_million() {
    // The whole tensor's norm alone would let it through.
    let mut got = vec![1.0f32; 1 << 20];
    let expected = vec![1.0f64; 1 << 20];
    got[123_456] = 1.01;
    let problem = must_fail("one element", &got, &expected, TOLERANCE);
    assert!(problem.contains("element 123456"), "{problem}");
    let norm = compare(&got, &expected, TOLERANCE).relative_error;
    assert!(norm < F32_LIMIT, "{norm}");
}

#[test]
fn attention_that_sees_one_key_too_many_or_too_few() {
    let heads = Heads { n_head: 2, n_kv_head: 2, d_nope: 8, d_rope: 4, d_value: 8 };
    let (tokens, mut random) = (40, Random::new(5));
    let mut values = |n| random.values(n, 1.0).iter().map(|&value| f64::from(value)).collect::<Vec<_>>();
    let (q, kv, k_rope) = (values(tokens * 24), values((tokens + 1) * 32), values((tokens + 1) * 4));
    let scale = (12f64).sqrt().recip();
    let run = |extra: i64| {
        let visible: Vec<_> = (0..tokens).map(|t| 0..(t as i64 + 1 + extra).max(0) as usize).collect();
        attention_prefill(&q, &kv, &k_rope, &visible, heads, scale).values
    };
    let single = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect::<Vec<_>>();
    let expected = run(0);
    assert!(compare(&single(run(0)), &expected, TOLERANCE).verdict.is_ok());
    for extra in [1, -1] {
        must_fail("one key off", &single(run(extra)), &expected, Tolerance { relative: F16_LIMIT });
    }
}

#[test]
fn a_wrong_length() {
    let (got, expected) = truth();
    let problem = must_fail("short", &got[1..], &expected, TOLERANCE);
    assert!(problem.contains("191 elements, expected 192"), "{problem}");
    must_fail("long", &got, &expected[1..], TOLERANCE);
}

#[test]
fn exact_means_exact() {
    let mut next = 1.0f32;
    next = f32::from_bits(next.to_bits() + 1);
    assert!(compare(&[1.0], &[1.0], Tolerance::EXACT).verdict.is_ok());
    must_fail("an ulp", &[next], &[1.0], Tolerance::EXACT);
}

#[test]
fn derived_tolerances_grow_with_the_sums_and_stay_under_the_limit() {
    let short = Tolerance::sums(&[1]).relative;
    let long = Tolerance::sums(&[4096]).relative;
    assert!(short < long && long <= F32_LIMIT);
    assert_eq!(Tolerance::sums(&[1 << 40]).relative, F32_LIMIT);
}

#[test]
fn numbers_below_the_smallest_normal_one_may_be_flushed_but_not_wrong() {
    let tiny = f64::from(f32::MIN_POSITIVE / 4.0);
    let expected = [tiny, -tiny, 2.0 * tiny];
    assert_eq!(compare(&[0.0, 0.0, 0.0], &expected, TOLERANCE).verdict, Ok(()));
    assert_eq!(compare(&expected.map(|e| e as f32), &expected, TOLERANCE).verdict, Ok(()));
    must_fail("the sign", &[0.0, tiny as f32, 0.0], &expected, TOLERANCE);
    must_fail("twice as much", &[(2.0 * tiny) as f32, 0.0, 0.0], &expected, TOLERANCE);
    let normal = f64::from(f32::MIN_POSITIVE);
    must_fail("the smallest normal number", &[0.0], &[normal], TOLERANCE);
}

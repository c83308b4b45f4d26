//! Every case of the table, every tuning, on the adapter of this machine (`WGPU_BACKEND`, `VK_DRIVER_FILES` choose).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use egmla::check::cases;
use egmla::low_level::kernels::shaders;

/// Runs the cases of one kernel (or of the layer) and fails with a line for each that is wrong.
fn run(kernel: &str) {
    let gpu = common::gpu();
    let spec = shaders().find(|spec| spec.name == kernel);
    let mut wrong = Vec::new();
    let mut compared = 0;
    let mut skipped = 0;
    let mut wide = 0;
    let mut worst = 0.0f64;
    for case in cases().iter().filter(|case| case.kernel() == kernel) {
        match case.run(&gpu.kernels) {
            Err(error) => wrong.push(format!("{}: {error}", case.id())),
            Ok(outcomes) => {
                assert!(!outcomes.is_empty(), "{} ran nothing", case.id());
                for outcome in outcomes {
                    if outcome.skipped {
                        let reason = outcome.verdict.unwrap_err();
                        println!("{}: {reason}", case.id());
                        // What the subgroups of this adapter do not hold and wider ones do: the plan's refusal, in its words.
                        let counts_lanes = spec.is_some_and(|spec| spec.subgroup > 0);
                        let too_wide = counts_lanes && reason.starts_with(&format!("skipped: {kernel}: "));
                        if too_wide {
                            wide += 1
                        } else {
                            skipped += 1
                        }
                        continue;
                    }
                    compared += 1;
                    worst = worst.max(outcome.error / outcome.tolerance.max(f64::MIN_POSITIVE));
                    if let Err(problem) = outcome.verdict {
                        wrong.push(format!("{} [{}]: {problem}", case.id(), outcome.tuning));
                    }
                }
            }
        }
    }
    gpu.assert_no_errors();
    println!(
        "{kernel}: {compared} comparisons, {} skipped, worst {:.0} % of its tolerance",
        skipped + wide,
        worst * 100.0
    );
    assert!(wrong.is_empty(), "{} of {compared} are wrong:\n{}", wrong.len(), wrong.join("\n"));
    // Only a variant whose feature this adapter lacks compares nothing, and says so above.
    let absent = spec.is_some_and(|spec| spec.missing(gpu.kernels.context()).is_some());
    assert!(if absent { compared == 0 && skipped > 0 } else { compared > 0 && skipped == 0 }, "no case of {kernel}");
}

macro_rules! tests {
    ($($stem:ident: $op:ident),* $(,)?) => {
        $(
            #[test]
            fn $stem() {
                for variant in <egmla::low_level::kernels::$op as egmla::low_level::Op>::VARIANTS {
                    run(variant.spec.name);
                }
            }
        )*
    };
}
egmla::for_each_operation!(tests);

#[test]
fn layer() {
    run("layer");
}

/// The kernels that need optional features run once more with every check of loops and indices; those that need none do so where
/// `EGMLA_LIMITS` is `default`.
#[test]
fn optional_kernels_with_every_check_of_shaders() {
    let gpu = common::gpu();
    let kernels = gpu.kernels.with_shader_checks(true);
    assert!(kernels.shader_checks());
    for spec in shaders().filter(|spec| !spec.features.is_empty() && spec.missing(kernels.context()).is_none()) {
        let mut compared = 0;
        // A few of each: every setting that they meet is compiled once more.
        for case in cases().iter().filter(|case| case.kernel() == spec.name).step_by(12) {
            let outcomes = case.run(&kernels).unwrap_or_else(|error| panic!("{}: {error}", case.id()));
            for outcome in outcomes.into_iter().filter(|outcome| !outcome.skipped) {
                outcome.verdict.unwrap_or_else(|problem| panic!("{} [{}]: {problem}", case.id(), outcome.tuning));
                compared += 1;
            }
        }
        assert!(compared > 0, "{}", spec.name);
        println!("{}: {compared} comparisons", spec.name);
    }
    gpu.assert_no_errors();
}

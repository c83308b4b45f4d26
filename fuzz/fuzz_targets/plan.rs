#![no_main]
//! Every kernel's plan, cost and bindings for any sizes on any limits: an error, or a dispatch within the limits. The build
//! checks arithmetic, so an overflow is a finding.

use std::collections::BTreeMap;

use arbitrary::{Result, Unstructured};
use egmla::attention::cost;
use egmla::config::{AttentionConfig, GateConfig, GateSite};
use egmla::low_level::kernels::{self, REGISTRY, attention_grouped};
use egmla::low_level::{COOPERATIVE_FEATURES, Cooperative, PlanContext, Tuning, Tunings};
use egmla::{DecodePath, Recording, Storage};
use egmla_fuzz::{DEVICES, activation, class, norm, number, storage, wide};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});

/// Any operation, every number of it drawn from the input, by each of its shaders and by the one that is chosen.
fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let context = context(u)?;
    if u.ratio(1, 8)? {
        return layer(u, &context);
    }
    let tuning = if u.arbitrary()? { Tuning::Auto } else { Tuning::Forced(u.int_in_range(0..=6)?) };
    let kernels = u.choose(&DEVICES)?;
    let operation = u.choose(REGISTRY)?;
    // Sizes that are small, beside a limit, or any; at the end of the input all are 0.
    let Some(sample) = operation.drawn(&mut || number(u).unwrap_or(0)) else { return Ok(()) };
    // Bound everywhere: too small for most, so that the sizes are counted and refused.
    let region = kernels.absent();
    let mut recording = Recording::new(kernels);
    for shader in 0..operation.shaders().len() {
        if let Ok(plan) = sample.plan(shader, &context, tuning) {
            let limits = &context.limits;
            let most = limits.max_compute_workgroups_per_dimension;
            assert!(plan.grid.iter().all(|&groups| groups <= most), "{plan:?}");
            assert!(plan.workgroup_bytes <= limits.max_compute_workgroup_storage_size, "{plan:?}");
            let invocations = limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x);
            assert!(plan.workgroup_size > 0 && plan.workgroup_size <= invocations, "{plan:?}");
            assert!(plan.overrides.iter().all(|(_, value)| value.is_finite() && *value >= 0.0), "{plan:?}");
            sample.assumes(shader, &context, &plan).unwrap_or_else(|broken| panic!("{sample:?}: {broken}: {plan:?}"));
        }
        let _ = sample.record(shader, &mut recording, &region, tuning);
    }
    let _ = sample.chosen(&context);
    let _ = sample.cost();
    Ok(())
}

fn context(u: &mut Unstructured<'_>) -> Result<PlanContext> {
    let mut context = PlanContext::webgpu_defaults(class(u)?);
    if u.arbitrary()? {
        let limits = &mut context.limits;
        for limit in [
            &mut limits.max_compute_workgroup_storage_size,
            &mut limits.max_compute_invocations_per_workgroup,
            &mut limits.max_compute_workgroup_size_x,
            &mut limits.max_compute_workgroups_per_dimension,
        ] {
            *limit = number(u)?;
        }
        limits.max_storage_buffer_binding_size = wide(u)?;
        limits.max_buffer_size = wide(u)?;
    }
    if u.arbitrary()? {
        context.features = kernels::optional_features() | COOPERATIVE_FEATURES;
        context.cooperative = Cooperative { by_16: u.arbitrary()?, by_8: u.arbitrary()? };
    }
    // wgpu promises powers of two of 4 and more; a caller may write anything.
    context.subgroup_min_size = if u.arbitrary()? { 1 << u.int_in_range(0..=7)? } else { number(u)? };
    context.subgroup_max_size = if u.arbitrary()? { 1 << u.int_in_range(0..=7)? } else { number(u)? };
    if u.arbitrary()? {
        let setting = u.int_in_range(0..=6)?;
        let all = kernels::shaders().map(|spec| (spec.name.to_owned(), setting));
        context.tunings = Tunings(all.collect::<BTreeMap<_, _>>());
    }
    Ok(context)
}

/// The costs of a whole layer, for every configuration that is valid.
fn layer(u: &mut Unstructured<'_>, context: &PlanContext) -> Result<()> {
    let gate = GateConfig {
        vocab_size: number(u)?,
        d_gate: number(u)?,
        tied: u.arbitrary()?,
        site: if u.arbitrary()? { GateSite::UpProjected } else { GateSite::Latent },
        activation: activation(u)?,
        norm: norm(u)?,
        norm_eps: 1e-5,
    };
    let mut config = AttentionConfig {
        hidden_size: number(u)?,
        n_head: number(u)?,
        d_latent: number(u)?,
        d_q_latent: if u.arbitrary()? { Some(number(u)?) } else { None },
        d_nope: number(u)?,
        d_rope: number(u)?,
        d_value: number(u)?,
        attention_bias: u.arbitrary()?,
        gate: u.arbitrary::<bool>()?.then_some(gate),
        ..AttentionConfig::default()
    };
    // Any other width is refused.
    let tied = config.gate.iter_mut().filter(|gate| gate.tied);
    tied.for_each(|gate| gate.d_gate = config.hidden_size);
    let _ = cost::cache_table(number(u)?, number(u)?, number(u)?, number(u)?, &[number(u)?]);
    if config.validate().is_err() {
        return Ok(());
    }
    let storage: Storage = storage(u)?;
    let (cached, groups, projected) = (number(u)?, number(u)?, number(u)?);
    let _ = cost::prefill(&config, cached, storage);
    let _ = cost::decode_expanded(&config, cached, storage);
    let _ = cost::decode_absorbed(&config, cached, groups, projected, storage);
    let work = cost::DecodeWork {
        tokens: number(u)?,
        rows: cached,
        positions: wide(u)?,
        groups: wide(u)?,
        projected,
        parts: number(u)?,
        cache_storage: storage,
    };
    let _ = cost::attend_expanded(&config, &work, storage);
    let _ = cost::attend_absorbed(&config, &work, storage);
    let time = cost::decode_time(context, &config, &work, DecodePath::Auto, number(u)?, storage);
    assert!(time.us >= 0.0, "{time:?}");
    let AttentionConfig { d_latent, d_nope, d_rope, d_value, .. } = config;
    let _ = attention_grouped::tiling(context, attention_grouped::Widths { d_latent, d_nope, d_rope, d_value });
    Ok(())
}

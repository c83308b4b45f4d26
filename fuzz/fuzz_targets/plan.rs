#![no_main]
//! Every kernel's plan, cost and bindings for any sizes on any limits: an error, or a dispatch within the limits. The build
//! checks arithmetic, so an overflow is a finding.

use std::collections::BTreeMap;

use arbitrary::{Result, Unstructured};
use egmla::config::{AttentionConfig, GateConfig, GateSite, RopeConfig};
use egmla::cost::{self, Costed};
use egmla::kernel::{Recording, Region};
use egmla::kernels::{self, *};
use egmla::plan::{Cooperative, PlanContext, Storage, Tuning, Tunings};
use egmla_fuzz::{DEVICES, activation, class, norm, number, storage, wide};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});

/// Every size that a problem has is drawn from the input.
fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let context = context(u)?;
    let tuning = if u.arbitrary()? { Tuning::Auto } else { Tuning::Forced(u.int_in_range(0..=6)?) };
    let kernels = u.choose(&DEVICES)?;
    let region = kernels.sink();
    let mut probe = Probe { context, tuning, region, recording: Recording::new(kernels) };
    if u.ratio(1, 8)? {
        return layer(u, &probe.context);
    }
    probe.any(u)
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
        context.features = kernels::optional_features() | kernels::COOPERATIVE_FEATURES;
        context.cooperative = Cooperative { by_16: u.arbitrary()?, by_8: u.arbitrary()? };
    }
    // wgpu promises powers of two of 4 and more; a caller may write anything.
    context.subgroup_min_size = if u.arbitrary()? { 1 << u.int_in_range(0..=7)? } else { number(u)? };
    context.subgroup_max_size = if u.arbitrary()? { 1 << u.int_in_range(0..=7)? } else { number(u)? };
    if u.arbitrary()? {
        let setting = u.int_in_range(0..=6)?;
        let all = kernels::REGISTRY.iter().map(|spec| (spec.name.to_owned(), setting));
        context.tunings = Tunings(all.collect::<BTreeMap<_, _>>());
    }
    Ok(context)
}

struct Probe {
    context: PlanContext,
    tuning: Tuning,
    /// Bound everywhere: too small for most, so that the sizes are counted and refused.
    region: Region,
    recording: Recording,
}

impl Probe {
    fn plan<P: Problem + Costed + Copy>(&self, problem: P) -> P {
        if let Ok(plan) = problem.plan(&self.context, self.tuning) {
            let limits = &self.context.limits;
            let most = limits.max_compute_workgroups_per_dimension;
            assert!(plan.grid.iter().all(|&groups| groups <= most), "{plan:?}");
            assert!(plan.workgroup_bytes <= limits.max_compute_workgroup_storage_size, "{plan:?}");
            let invocations = limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x);
            assert!(plan.workgroup_size > 0 && plan.workgroup_size <= invocations, "{plan:?}");
            assert!(plan.overrides.iter().all(|(_, value)| value.is_finite() && *value >= 0.0), "{plan:?}");
        }
        let _ = problem.cost();
        problem
    }
}

/// Plans a problem, counts its cost, and records it with the one region bound to every name.
macro_rules! encode {
    ($probe:ident, $module:ident, $problem:expr, $args:ident { $($binding:ident),* }) => {{
        let problem = $probe.plan($problem);
        let region = $probe.region.clone();
        let args = $args::Args { $($binding: &region),* };
        let _ = $module::encode(&mut $probe.recording, &problem, args, $probe.tuning);
    }};
}

impl Probe {
    fn any(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let mut n = || number(u);
        let probe = self;
        match n()? % 22 {
            0 => {
                let (elements, words) = (n()?, n()?);
                encode!(probe, residual_add, residual_add::Problem { elements }, residual_add { delta, stream });
                encode!(probe, swiglu, swiglu::Problem { elements }, swiglu { gate, up, y });
                encode!(probe, roofline_copy, roofline_copy::Problem { words }, roofline_copy { x, y });
                let scatter = word_scatter::Problem { count: elements, words };
                encode!(probe, word_scatter, scatter, word_scatter { patches, words });
            }
            1 => {
                let problem = cache_copy::Problem { words: n()?, from_word: n()?, to_word: n()? };
                let problem = probe.plan(problem);
                let region = probe.region.clone();
                let _ = cache_copy::encode(&mut probe.recording, &problem, &region, probe.tuning);
            }
            2 => {
                let fma = roofline_fma::Problem { elements: n()?, trips: n()?, a: 1.0, b: 1.0 };
                encode!(probe, roofline_fma, fma, roofline_fma { x, y });
                let problem = roofline_cooperative::Problem { groups: n()?, trips: n()? };
                encode!(probe, roofline_cooperative, problem, roofline_cooperative { x, y });
                let problem = roofline_cooperative_8::Problem(problem);
                encode!(probe, roofline_cooperative_8, problem, roofline_cooperative { x, y });
            }
            3 => {
                let (tokens, n_head, d_rope, offset) = (n()?, n()?, n()?, n()?);
                let (token_stride, head_stride) = (n()?, n()?);
                let interleave = u.arbitrary()?;
                let problem = rope::Problem { tokens, n_head, d_rope, offset, token_stride, head_stride, interleave };
                encode!(probe, rope, problem, rope { rotations, values });
            }
            4 => {
                let (rows, width, table_row, vocab_size) = (n()?, n()?, n()?, n()?);
                let problem = gather::Problem { rows, width, table_row, vocab_size, storage: storage(u)? };
                encode!(probe, gather, problem, gather { table, ids, y });
            }
            5 | 6 => {
                let problem = norm::Problem {
                    rows: n()?,
                    width: n()?,
                    second: n()?,
                    x_offset: n()?,
                    x_row: n()?,
                    eps: 1e-6,
                    kind: if u.arbitrary()? { norm::Kind::Rms } else { norm::Kind::Layer },
                    bias: u.arbitrary()?,
                    storage: storage(u)?,
                };
                encode!(probe, norm, problem, norm { x, weight, bias, y });
                encode!(probe, norm_vec4, norm_vec4::Problem(problem), norm { x, weight, bias, y });
            }
            7 | 8 => {
                let problem = gate::Problem {
                    rows: n()?,
                    width: n()?,
                    x_offset: n()?,
                    x_row: n()?,
                    statistics_rows: n()?,
                    eps: 1e-6,
                    activation: activation(u)?,
                    norm: norm(u)?,
                    storage: storage(u)?,
                };
                encode!(probe, gate, problem, gate { x, g, weight, bias, slots, y, statistics });
                encode!(
                    probe,
                    gate_vec4,
                    gate_vec4::Problem(problem),
                    gate { x, g, weight, bias, slots, y, statistics }
                );
            }
            9 => {
                let problem = gate_rows::Problem {
                    rows: n()?,
                    width: n()?,
                    d_gate: n()?,
                    vocab_size: n()?,
                    first_id: n()?,
                    y_rows: n()?,
                    ids: u.arbitrary()?,
                    targets: u.arbitrary()?,
                    storage: storage(u)?,
                    y_storage: storage(u)?,
                };
                encode!(probe, gate_rows, problem, gate_rows { gate_embedding, gate_b_proj, ids, targets, y });
            }
            10 => {
                let problem = gate_statistics::Problem {
                    tokens: n()?,
                    width: n()?,
                    resident: n()?,
                    more: n()?,
                    more_first: n()?,
                    cache_rows: n()?,
                    eps: 1e-6,
                    activation: activation(u)?,
                    norm: norm(u)?,
                    storage: storage(u)?,
                    more_storage: storage(u)?,
                };
                encode!(
                    probe,
                    gate_statistics,
                    problem,
                    gate_statistics { kv, gates, gates_more, rows, slots, statistics }
                );
            }
            11 => {
                let (tokens, first_row, rows) = (n()?, n()?, n()?);
                let (n_sequence, table, list_words) = (n()?, n()?, n()?);
                let problem = group_ids::Problem { tokens, first_row, rows, n_sequence, table, list_words };
                encode!(probe, group_ids, problem, group_ids { token_ids, token_rows, lists, ids });
            }
            12 => {
                let (first_row, rows, cache_rows, d_latent, n_sequence) = (n()?, n()?, n()?, n()?, n()?);
                let (d_gate, vocab_size) = (n()?, n()?);
                let table = cache_read::Table { d_gate, vocab_size, storage: storage(u)? };
                let table = u.arbitrary::<bool>()?.then_some(table);
                let storage = storage(u)?;
                let problem = cache_read::Problem { first_row, rows, cache_rows, d_latent, n_sequence, table, storage };
                encode!(
                    probe,
                    cache_read,
                    problem,
                    cache_read { latent_cache, id_cache, sequences, gate_embedding, latent, embedding, slots }
                );
            }
            13 | 14 => {
                let problem = cache_append::Problem {
                    tokens: n()?,
                    cache_rows: n()?,
                    d_latent: n()?,
                    latent_offset: n()?,
                    latent_row: n()?,
                    d_rope: n()?,
                    rope_offset: n()?,
                    rope_row: n()?,
                    queries: cache_append::Queries { n_head: n()?, offset: n()?, row: n()?, head: n()? },
                    interleave: u.arbitrary()?,
                    rope_byte: wide(u)?,
                    storage: storage(u)?,
                };
                encode!(probe, cache_append, problem, cache_append { latent, rope_key, rotations, slots, cache, q });
                let problem = cache_append_vec4::Problem(problem);
                encode!(
                    probe,
                    cache_append_vec4,
                    problem,
                    cache_append { latent, rope_key, rotations, slots, cache, q }
                );
            }
            15 => {
                let problem = attention_merge::Problem { tokens: n()?, n_head: n()?, width: n()?, splits: n()? };
                encode!(
                    probe,
                    attention_merge,
                    problem,
                    attention_merge { partial_values, partial_softmax, ranges, values, lse }
                );
            }
            16 => probe.decode(u)?,
            17 => probe.absorbed(u)?,
            18 => probe.prefill(u)?,
            19 => probe.grouped(u)?,
            _ => probe.product(u)?,
        }
        Ok(())
    }

    fn decode(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        // Most tiles are whole; some must not be.
        let tile = |rows: u32, whole: bool| if whole { rows & !255 } else { rows };
        let problem = attention_decode::Problem {
            tokens: number(u)?,
            most_tokens: number(u)?,
            partials: number(u)?,
            n_sequence: number(u)?,
            n_head: number(u)?,
            d_nope: number(u)?,
            d_rope: number(u)?,
            d_value: number(u)?,
            kv_first: tile(number(u)?, u.ratio(7, 8)?),
            kv_rows: tile(number(u)?, u.ratio(7, 8)?),
            cache_rows: number(u)?,
            scale: 1.0,
            storage: storage(u)?,
            kv_storage: storage(u)?,
        };
        let probe = self;
        encode!(
            probe,
            attention_decode,
            problem,
            attention_decode { q, kv, rope_cache, sequences, partial_values, partial_softmax }
        );
        encode!(
            probe,
            attention_decode_vec4,
            attention_decode_vec4::Problem(problem),
            attention_decode { q, kv, rope_cache, sequences, partial_values, partial_softmax }
        );
        Ok(())
    }

    fn absorbed(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let problem = attention_absorbed::Problem {
            tokens: number(u)?,
            n_sequence: number(u)?,
            most_tokens: number(u)?,
            splits: number(u)?,
            partials: number(u)?,
            n_head: number(u)?,
            d_latent: number(u)?,
            d_nope: number(u)?,
            d_rope: number(u)?,
            cache_rows: number(u)?,
            scale: 1.0,
            storage: storage(u)?,
        };
        let probe = self;
        encode!(
            probe,
            attention_absorbed,
            problem,
            attention_absorbed { absorbed, q, latent_cache, rope_cache, sequences, partial_values, partial_softmax }
        );
        encode!(
            probe,
            attention_absorbed_stream,
            attention_absorbed_stream::Problem(problem),
            attention_absorbed { absorbed, q, latent_cache, rope_cache, sequences, partial_values, partial_softmax }
        );
        encode!(
            probe,
            attention_absorbed_subgroup,
            attention_absorbed_subgroup::Problem(problem),
            attention_absorbed { absorbed, q, latent_cache, rope_cache, sequences, partial_values, partial_softmax }
        );
        Ok(())
    }

    fn prefill(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let problem = attention_prefill::Problem {
            tokens: number(u)?,
            query_tiles: number(u)?,
            n_sequence: number(u)?,
            n_head: number(u)?,
            d_nope: number(u)?,
            d_rope: number(u)?,
            d_value: number(u)?,
            kv_first: number(u)?,
            kv_rows: number(u)?,
            cache_rows: number(u)?,
            first: u.arbitrary()?,
            last: u.arbitrary()?,
            scale: 1.0,
            storage: storage(u)?,
        };
        let _ = cost::causal(&problem);
        let _ = attention_prefill::slices(&self.context, self.tuning, problem.d_value);
        let _ = attention_prefill::tile_q(&self.context, self.tuning);
        let probe = self;
        macro_rules! variants {
            ($($module:ident: $problem:expr),*) => {
                $(encode!(probe, $module, $problem, attention_prefill {
                    q, kv, rope_cache, queries, sequences, values, softmax
                });)*
            };
        }
        variants!(
            attention_prefill: problem,
            attention_prefill_rows: attention_prefill_rows::Problem(problem),
            attention_prefill_subgroup: attention_prefill_subgroup::Problem(problem),
            attention_prefill_cooperative: attention_prefill_cooperative::Problem(problem),
            attention_prefill_cooperative_8: attention_prefill_cooperative_8::Problem(problem)
        );
        Ok(())
    }

    fn grouped(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let widths = attention_grouped::Widths {
            d_latent: number(u)?,
            d_nope: number(u)?,
            d_rope: number(u)?,
            d_value: number(u)?,
        };
        let tiling = match u.int_in_range(0..=2u8)? {
            0 => attention_grouped::tiling(&self.context, widths).ok(),
            1 => attention_grouped::tiling_in_workgroup(&self.context, widths).ok(),
            _ => None,
        };
        let tiling = match tiling {
            Some(tiling) => tiling,
            None => attention_grouped::Tiling { groups: number(u)?, run: number(u)? },
        };
        let problem = attention_grouped::Problem {
            tokens: number(u)?,
            most_tokens: number(u)?,
            n_sequence: number(u)?,
            items: number(u)?,
            partials: number(u)?,
            n_head: number(u)?,
            widths,
            tiling,
            table: number(u)?,
            list_words: number(u)?,
            cache_rows: number(u)?,
            rope_byte: wide(u)?,
            statistics_byte: wide(u)?,
            resident: number(u)?,
            gates_storage: storage(u)?,
            more: number(u)?,
            more_storage: storage(u)?,
            first_row: number(u)?,
            rows: number(u)?,
            pass_index: number(u)?,
            passes: number(u)?,
            activation: activation(u)?,
            norm: norm(u)?,
            scale: 1.0,
            met_groups: wide(u)?,
            met_positions: wide(u)?,
            cache_storage: storage(u)?,
            storage: storage(u)?,
        };
        let probe = self;
        encode!(
            probe,
            attention_grouped,
            problem,
            attention_grouped { q, kv_b_proj, affine, gates, gates_more, cache, lists, partial }
        );
        encode!(
            probe,
            attention_grouped_subgroup,
            attention_grouped_subgroup::Problem(problem),
            attention_grouped { q, kv_b_proj, affine, gates, gates_more, cache, lists, partial }
        );
        Ok(())
    }

    fn product(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let (rows, inner, cols) = (number(u)?, number(u)?, number(u)?);
        let (bias, weights) = (u.arbitrary()?, storage(u)?);
        let layout = |u: &mut Unstructured<'_>, inner| -> Result<matmul::Layout> {
            Ok(matmul::Layout { offset: number(u)?, row: number(u)?, inner, batch: number(u)? })
        };
        let problem = if u.arbitrary()? {
            matmul::Problem::linear(rows, inner, cols, bias, weights)
        } else {
            let batch = number(u)?;
            let w = if u.arbitrary()? { 1 } else { number(u)? };
            let (x, w, y) = (layout(u, 1)?, layout(u, w)?, layout(u, 1)?);
            matmul::Problem { rows, inner, cols, batch, x, w, y, bias, storage: weights }
        };
        let probe = self;
        macro_rules! variants {
            ($($module:ident: $problem:expr),*) => {
                $(encode!(probe, $module, $problem, matmul { x, w, bias, y });)*
            };
        }
        variants!(
            matmul: problem,
            matmul_vec4: matmul_vec4::Problem(problem),
            matmul_subgroup: matmul_subgroup::Problem(problem),
            matmul_cooperative: matmul_cooperative::Problem(problem),
            matmul_cooperative_8: matmul_cooperative_8::Problem(problem),
            matvec: matvec::Problem(problem),
            matvec_vec4: matvec_vec4::Problem(problem),
            matvec_subgroup: matvec_subgroup::Problem(problem)
        );
        Ok(())
    }
}

/// The costs of a whole layer, for every configuration that is valid.
fn layer(u: &mut Unstructured<'_>, context: &PlanContext) -> Result<()> {
    let gate = GateConfig {
        vocab_size: number(u)?,
        d_gate: number(u)?,
        site: if u.arbitrary()? { GateSite::UpProjected } else { GateSite::Latent },
        activation: activation(u)?,
        norm: norm(u)?,
        norm_eps: 1e-5,
    };
    let config = AttentionConfig {
        hidden_size: number(u)?,
        n_head: number(u)?,
        d_latent: number(u)?,
        d_q_latent: if u.arbitrary()? { Some(number(u)?) } else { None },
        d_nope: number(u)?,
        d_rope: number(u)?,
        d_value: number(u)?,
        attention_bias: u.arbitrary()?,
        gate: u.arbitrary::<bool>()?.then_some(gate),
        rope: RopeConfig::default(),
    };
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
        cache_storage: storage,
    };
    let _ = cost::attend_expanded(&config, &work, storage);
    let _ = cost::attend_absorbed(&config, &work, storage);
    let AttentionConfig { d_latent, d_nope, d_rope, d_value, .. } = config;
    let _ = attention_grouped::tiling(context, attention_grouped::Widths { d_latent, d_nope, d_rope, d_value });
    Ok(())
}

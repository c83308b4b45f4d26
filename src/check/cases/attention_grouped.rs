//! Cases of `attention_grouped`: groups from one to as many as tokens, rows of either table, several passes, and the extremes.

use super::batch::{HOSTILE_PADDING, compare_softmax};
use super::extreme::{Extreme, attention_tolerance};
use super::grouped_batch::{GroupedBatch, Ids, Sources};
use super::{Launch, SEED, each_able, rounds_to_halves, widen, widest};
use crate::adapter::{AdapterClass, PlanContext};
use crate::check::compare::{Comparison, HALF_ROUNDOFF, Tolerance};
use crate::check::view::{Reading, View};
use crate::check::{Case, Lab, name_of, outcome, pack};
use crate::config::{Activation, GateNorm};
use crate::error::Result;
use crate::kernels::attention_grouped::Tiling;
use crate::kernels::{AttentionGrouped, attention_grouped};
use crate::op::Spec;
use crate::random::Random;
use crate::reference;
use crate::storage::Storage;

/// One case of the grouped attention.
#[derive(Debug, Clone, Copy)]
struct GroupedSizes {
    sequences: &'static [(u32, Ids)],
    queries: u32,
    n_head: u32,
    widths: attention_grouped::Widths,
    activation: Activation,
    norm: GateNorm,
    storage: Storage,
    cache_storage: Storage,
    extreme: Extreme,
    /// Passes over the gate rows, each with the rows of its own groups.
    passes: u32,
    sources: Sources,
}

/// Heads on both sides of what a workgroup or a matrix has, and many.
const HEADS: [u32; 5] = [12, 16, 20, 63, 128];

impl GroupedSizes {
    /// Every number of heads.
    fn heads(self) -> impl Iterator<Item = (String, GroupedSizes)> {
        let sequences = &[(70, Ids::Skewed), (9, Ids::Distinct)];
        HEADS.into_iter().map(move |n_head| (format!("heads_{n_head}"), GroupedSizes { sequences, n_head, ..self }))
    }

    /// The extreme cases of attention: chunks, tiles, a sequence of one token.
    fn extremes(self) -> Vec<(String, GroupedSizes)> {
        let sequences = &[(330, Ids::Skewed), (1, Ids::Equal), (340, Ids::Equal)];
        Extreme::ALL
            .into_iter()
            .flat_map(|extreme| {
                Storage::ALL.map(|cache_storage| {
                    let name = format!("{}_{}_cache", extreme.name(), cache_storage.name());
                    (name, GroupedSizes { sequences, cache_storage, extreme, ..self })
                })
            })
            .collect()
    }
}

pub(super) fn cases(cases: &mut Vec<Case>) {
    let widths = |d_latent, d_nope, d_rope, d_value| attention_grouped::Widths { d_latent, d_nope, d_rope, d_value };
    let plain = GroupedSizes {
        sequences: &[(90, Ids::Skewed)],
        queries: 1,
        n_head: 3,
        widths: widths(20, 12, 8, 10),
        activation: Activation::Tanh,
        norm: GateNorm::LayerNorm,
        storage: Storage::F32,
        cache_storage: Storage::F32,
        extreme: Extreme::Plain,
        passes: 1,
        sources: Sources::Both,
    };
    let mixed = |storage, cache_storage| GroupedSizes { storage, cache_storage, ..plain };
    // Groups of several passes, chunks that belong to both, a sequence that the second pass alone has.
    let twice: &[(u32, Ids)] = &[(1000, Ids::Skewed), (400, Ids::Equal), (99, Ids::Distinct)];
    let all = [
        ("t1", GroupedSizes { sequences: &[(1, Ids::Distinct)], ..plain }),
        ("equal", GroupedSizes { sequences: &[(700, Ids::Equal)], ..plain }),
        ("equal_64", GroupedSizes { sequences: &[(64, Ids::Equal), (65, Ids::Equal), (320, Ids::Equal)], ..plain }),
        ("distinct", GroupedSizes { sequences: &[(99, Ids::Distinct)], ..plain }),
        ("ragged", GroupedSizes { sequences: &[(1000, Ids::Skewed), (1, Ids::Equal), (17, Ids::Distinct)], ..plain }),
        (
            "q5",
            GroupedSizes { sequences: &[(70, Ids::Equal), (9, Ids::Distinct), (3, Ids::Skewed)], queries: 5, ..plain },
        ),
        ("f16", mixed(Storage::F16, Storage::F16)),
        ("f16_cache", mixed(Storage::F32, Storage::F16)),
        ("h1_no_rope", GroupedSizes { n_head: 1, widths: widths(16, 8, 0, 8), ..plain }),
        ("h9_odd", GroupedSizes { n_head: 9, widths: widths(13, 7, 2, 11), norm: GateNorm::RmsNorm, ..plain }),
        ("h5_no_nope", GroupedSizes { n_head: 5, widths: widths(8, 0, 4, 3), activation: Activation::Silu, ..plain }),
        ("no_norm", GroupedSizes { norm: GateNorm::None, activation: Activation::OnePlus, ..plain }),
        ("t32768", GroupedSizes { sequences: &[(32_768, Ids::Text)], ..mixed(Storage::F32, Storage::F16) }),
        ("paper", GroupedSizes { n_head: 4, widths: widths(64, 64, 64, 64), ..mixed(Storage::F16, Storage::F16) }),
        ("wide", GroupedSizes { n_head: 2, widths: widths(512, 128, 64, 128), ..mixed(Storage::F16, Storage::F16) }),
        ("resident", GroupedSizes { sources: Sources::Resident, ..mixed(Storage::F16, Storage::F16) }),
        ("projected", GroupedSizes { sources: Sources::Further, sequences: twice, passes: 2, ..plain }),
        ("two_passes", GroupedSizes { sequences: twice, queries: 3, passes: 2, ..plain }),
        ("five_passes", GroupedSizes { sequences: twice, queries: 2, passes: 5, ..mixed(Storage::F16, Storage::F16) }),
    ];
    let in_workgroup: TilingOf = |device, widths| attention_grouped::tiling_in_workgroup(device, widths).map(Some);
    let further = plain.heads().chain(plain.extremes());
    for (name, sizes) in all.map(|(name, sizes)| (name.to_owned(), sizes)).into_iter().chain(further) {
        attend(cases, name, sizes, in_workgroup, |_| true);
    }

    // Slots are filled, half filled and overfull; latents and rotary keys end within a block of 8 and within the eighth.
    let plain = GroupedSizes { widths: widths(20, 16, 8, 24), ..plain };
    let mixed = |storage, cache_storage| GroupedSizes { storage, cache_storage, ..plain };
    let in_registers = [
        ("t1", GroupedSizes { sequences: &[(1, Ids::Distinct)], ..plain }),
        ("equal", GroupedSizes { sequences: &[(1700, Ids::Equal)], ..plain }),
        ("equal_64", GroupedSizes { sequences: &[(64, Ids::Equal), (65, Ids::Equal), (320, Ids::Equal)], ..plain }),
        (
            "distinct",
            GroupedSizes { sequences: &[(7, Ids::Distinct), (8, Ids::Distinct), (99, Ids::Distinct)], ..plain },
        ),
        ("ragged", GroupedSizes { sequences: &[(1000, Ids::Skewed), (1, Ids::Equal), (17, Ids::Distinct)], ..plain }),
        (
            "q5",
            GroupedSizes { sequences: &[(70, Ids::Equal), (9, Ids::Distinct), (3, Ids::Skewed)], queries: 5, ..plain },
        ),
        ("q16", GroupedSizes { sequences: &[(330, Ids::Equal), (40, Ids::Skewed)], queries: 16, ..plain }),
        ("f16", mixed(Storage::F16, Storage::F16)),
        ("f16_cache", mixed(Storage::F32, Storage::F16)),
        ("f16_weights", mixed(Storage::F16, Storage::F32)),
        ("h1_no_rope", GroupedSizes { n_head: 1, widths: widths(16, 8, 0, 8), ..plain }),
        ("h9_odd", GroupedSizes { n_head: 9, widths: widths(13, 8, 2, 8), norm: GateNorm::RmsNorm, ..plain }),
        ("h5_no_nope", GroupedSizes { n_head: 5, widths: widths(8, 0, 4, 8), activation: Activation::Silu, ..plain }),
        ("no_norm", GroupedSizes { norm: GateNorm::None, activation: Activation::OnePlus, ..plain }),
        ("t32768", GroupedSizes { sequences: &[(32_768, Ids::Text)], ..mixed(Storage::F32, Storage::F16) }),
        ("paper", GroupedSizes { n_head: 4, widths: widths(64, 64, 64, 64), ..mixed(Storage::F16, Storage::F16) }),
        ("r57", GroupedSizes { n_head: 2, widths: widths(57, 72, 62, 80), ..mixed(Storage::F16, Storage::F16) }),
        ("heads_of_128", GroupedSizes { widths: widths(64, 128, 64, 128), ..mixed(Storage::F32, Storage::F32) }),
        ("resident", GroupedSizes { sources: Sources::Resident, ..mixed(Storage::F16, Storage::F16) }),
        ("projected", GroupedSizes { sources: Sources::Further, sequences: twice, passes: 2, ..plain }),
        ("two_passes", GroupedSizes { sequences: twice, queries: 3, passes: 2, ..plain }),
        ("five_passes", GroupedSizes { sequences: twice, queries: 2, passes: 5, ..mixed(Storage::F16, Storage::F16) }),
    ];
    // No tiling, no outcome: a case that another kernel would pass in its place fails.
    let tiling: TilingOf = |device, widths| Ok(attention_grouped::tiling_in_registers(device, widths));
    let further = plain.heads().chain(plain.extremes());
    for (name, sizes) in in_registers.map(|(name, sizes)| (name.to_owned(), sizes)).into_iter().chain(further) {
        attend(cases, name, sizes, tiling, |spec| !rounds_to_halves(spec));
    }

    // By matrices: latents that end within a load and on a matrix, heads on both sides of one, groups around a turn's positions.
    let plain =
        GroupedSizes { widths: widths(27, 16, 8, 48), storage: Storage::F16, cache_storage: Storage::F16, ..plain };
    let mixed = |norm, activation| GroupedSizes { norm, activation, ..plain };
    let by_matrices = [
        ("t1", GroupedSizes { sequences: &[(1, Ids::Distinct)], ..plain }),
        ("equal", GroupedSizes { sequences: &[(1700, Ids::Equal)], ..plain }),
        (
            "equal_64",
            GroupedSizes {
                sequences: &[(8, Ids::Equal), (17, Ids::Equal), (64, Ids::Equal), (65, Ids::Equal), (320, Ids::Equal)],
                ..plain
            },
        ),
        (
            "distinct",
            GroupedSizes { sequences: &[(7, Ids::Distinct), (8, Ids::Distinct), (99, Ids::Distinct)], ..plain },
        ),
        ("ragged", GroupedSizes { sequences: &[(1000, Ids::Skewed), (1, Ids::Equal), (17, Ids::Distinct)], ..plain }),
        (
            "q5",
            GroupedSizes { sequences: &[(70, Ids::Equal), (9, Ids::Distinct), (3, Ids::Skewed)], queries: 5, ..plain },
        ),
        ("q16", GroupedSizes { sequences: &[(330, Ids::Equal), (40, Ids::Skewed)], queries: 16, ..plain }),
        ("h1_no_rope", GroupedSizes { n_head: 1, widths: widths(16, 16, 0, 16), ..plain }),
        ("h9_odd", GroupedSizes { n_head: 9, widths: widths(13, 16, 2, 16), norm: GateNorm::RmsNorm, ..plain }),
        (
            "h17_no_nope",
            GroupedSizes { n_head: 17, widths: widths(30, 0, 4, 16), ..mixed(GateNorm::LayerNorm, Activation::Silu) },
        ),
        ("no_norm", mixed(GateNorm::None, Activation::OnePlus)),
        ("sigmoid", mixed(GateNorm::RmsNorm, Activation::Sigmoid)),
        ("identity", mixed(GateNorm::LayerNorm, Activation::Identity)),
        ("t32768", GroupedSizes { sequences: &[(32_768, Ids::Text)], ..plain }),
        ("paper", GroupedSizes { n_head: 12, widths: widths(64, 64, 64, 64), ..plain }),
        ("r57", GroupedSizes { n_head: 2, widths: widths(57, 48, 62, 80), ..plain }),
        ("heads_of_128", GroupedSizes { widths: widths(64, 128, 64, 128), ..plain }),
        ("resident", GroupedSizes { sources: Sources::Resident, ..plain }),
        ("projected", GroupedSizes { sources: Sources::Further, sequences: twice, passes: 2, ..plain }),
        ("two_passes", GroupedSizes { sequences: twice, queries: 3, passes: 2, ..plain }),
        ("five_passes", GroupedSizes { sequences: twice, queries: 2, passes: 5, ..plain }),
    ];
    // Tables of a GPU, whatever the device.
    let tiling: TilingOf = |device, widths| {
        let device = PlanContext { class: AdapterClass::Discrete, ..device.clone() };
        Ok(attention_grouped::tiling_in_registers(&device, widths))
    };
    let extremes = plain.extremes().into_iter().filter(|(_, sizes)| sizes.cache_storage == Storage::F16);
    let further = plain.heads().chain(extremes);
    for (name, sizes) in by_matrices.map(|(name, sizes)| (name.to_owned(), sizes)).into_iter().chain(further) {
        attend(cases, name, sizes, tiling, rounds_to_halves);
    }
}

/// The tiling of a device, where it has one for these widths. With it goes which variants take the step's tables.
type TilingOf = fn(&PlanContext, attention_grouped::Widths) -> Result<Option<Tiling>>;

fn attend(cases: &mut Vec<Case>, id: String, sizes: GroupedSizes, tiling: TilingOf, checked: fn(&Spec) -> bool) {
    let GroupedSizes { sequences, queries, n_head, widths, activation, norm, storage, cache_storage, .. } = sizes;
    let attention_grouped::Widths { d_latent, d_nope, d_rope, d_value } = widths;
    let d_kv = n_head * (d_nope + d_value);
    let longest = sequences.iter().map(|(length, _)| *length as usize).max().unwrap_or(0);
    let plain = Tolerance::sums(&[d_nope as usize, d_latent as usize, d_kv as usize, longest]);
    // Scores of size s carry absolute errors of s · u · √d: those are relative errors of their exponentials.
    let spread = sizes.extreme.spread();
    let of_scores = attention_tolerance((d_nope + d_rope + d_latent) as usize, longest, spread);
    let tolerance = if spread > 1.0 { of_scores } else { plain };
    // What follows from the lists is filled in when they are made.
    let op = AttentionGrouped {
        tokens: 1,
        most_tokens: queries,
        n_sequence: sequences.len() as u32,
        entries: 1,
        partials: 1,
        most_partials: 1,
        n_head,
        widths,
        // None is refused by every variant.
        tiling: tiling(&widest(AdapterClass::Discrete), widths).ok().flatten().unwrap_or(Tiling { groups: 0, span: 0 }),
        table: 0,
        list_words: 0,
        cache_rows: 1,
        rope_byte: 0,
        statistics_byte: 0,
        resident: 0,
        gates_storage: cache_storage,
        more: 0,
        more_storage: Storage::F32,
        first_group: 0,
        groups: 0,
        pass_index: 0,
        passes: sizes.passes,
        activation,
        norm,
        scale: ((d_nope + d_rope) as f32).sqrt().recip(),
        expected_groups: 0,
        expected_positions: 0,
        cache_storage,
        storage,
    };
    each_able(cases, id, op, checked, move |lab, variant| {
        let tolerances = if rounds_to_halves(&variant.spec) { of_halves(tolerance, spread) } else { [tolerance; 2] };
        let of = |tuning| {
            let compared = match tiling(lab.kernels.context(), widths)? {
                Some(tiling) => {
                    let launch = Launch { op: AttentionGrouped { tiling, ..op }, variant, tuning };
                    attend_groups(lab, launch, sizes, tolerances)?
                }
                None => Vec::new(),
            };
            Ok(outcome(name_of(tuning), compared))
        };
        lab.settings(variant.spec.tunings).map(of).collect()
    });
}

/// Tolerances of values and of scores where factors are rounded to halves, out of those of f32.
///
/// The reference rounds queries as the kernel does. But where f32 is off by 8 u before such a rounding, one number of 1024 becomes
/// the next half, 2⁻¹⁰ away: a root mean square of 2⁻¹⁵ of a score's terms, for each of two roundings one after another. The
/// weights of the softmax and the sums of latents are each off by at most 2⁻¹¹ of themselves.
fn of_halves(of: Tolerance, spread: f64) -> [Tolerance; 2] {
    let of_scores = of.relative + 2.0 * HALF_ROUNDOFF / 16.0 * spread;
    [of_scores + 2.0 * HALF_ROUNDOFF, of_scores].map(|relative| Tolerance { relative })
}

fn attend_groups(
    lab: &Lab<'_>,
    launch: Launch<AttentionGrouped>,
    sizes: GroupedSizes,
    [tolerance, of_scores]: [Tolerance; 2],
) -> Result<Vec<Comparison>> {
    let GroupedSizes { sequences, queries, n_head, widths, activation, norm, storage, cache_storage, .. } = sizes;
    let (extreme, passes, tiling) = (sizes.extreme, sizes.passes, launch.op.tiling);
    let attention_grouped::Widths { d_latent, d_nope, d_rope, d_value } = widths;
    let d_kv = n_head * (d_nope + d_value);
    let mut random = Random::new(SEED);
    // Resident rows come from `gates`, at their id, and the others from `gates_more`, at their group.
    let Some(batch) = GroupedBatch::new(sequences, (queries, passes), tiling, sizes.sources) else {
        return Ok(Vec::new());
    };
    let rows = batch.cache_rows as usize;
    let resident = match sizes.sources {
        Sources::Further => 0,
        Sources::Both | Sources::Resident => batch.ids.iter().flatten().max().map_or(1, |id| id + 1),
    };
    let mut q_values = random.values((batch.tokens * n_head * (d_nope + d_rope)) as usize, 1.0);
    let w_values = random.values((d_kv * d_latent) as usize, 1.0);
    let affine_values = [random.values(d_kv as usize, 1.0), random.values(d_kv as usize, 1.0)];
    let gate_values = random.values((resident * d_kv) as usize, 1.0);
    let more_values = random.values((batch.groups * d_kv) as usize, 1.0);
    let mut latent_values = random.values(rows * d_latent as usize, 1.0);
    let mut rope_values = random.values(rows * d_rope as usize, 1.0);
    extreme.of_queries(&mut q_values);
    extreme.of_keys(&mut latent_values, d_latent as usize, cache_storage);
    extreme.of_keys(&mut rope_values, d_rope as usize, cache_storage);
    let statistics: Vec<f32> = random.values(2 * rows, 1.0).iter().map(|value| value.abs() + 0.1).collect();
    // The padding of weights and gate rows is zero, that of the cache is hostile.
    let rows_of = |values: &[f32], width: u32, storage: Storage, padding: f32| -> Vec<u32> {
        let pitch = storage.row_pitch(width) as usize;
        let row = |row: &[f32]| [row, &vec![padding; pitch - row.len()]].concat();
        let rows: Vec<f32> = values.chunks(width.max(1) as usize).flat_map(row).collect();
        pack(&rows, storage).0
    };
    let padded = |values: &[f32], width: u32, storage: Storage| rows_of(values, width, storage, 0.0);
    let kept = |values: &[f32], storage: Storage| pack(values, storage).1;

    // Latents, rotary keys and statistics one after another, 16 bytes between them.
    let mut cache_words = rows_of(&latent_values, d_latent, cache_storage, HOSTILE_PADDING);
    cache_words.extend([0; 4]);
    let rope_byte = 4 * cache_words.len() as u64;
    cache_words.extend(rows_of(&rope_values, d_rope, cache_storage, HOSTILE_PADDING));
    cache_words.extend([0; 4]);
    let statistics_byte = 4 * cache_words.len() as u64;
    cache_words.extend(statistics.iter().map(|value| value.to_bits()));
    cache_words.resize(cache_words.len().next_multiple_of(4), 0);
    let beta = attention_grouped::beta_element(d_kv) as usize;
    let mut affine = affine_values[0].clone();
    affine.resize(beta, 0.0);
    affine.extend(&affine_values[1]);

    let (q, cache, lists) = (lab.floats(&q_values)?, lab.words(&cache_words)?, lab.words(&batch.words)?);
    let w = lab.words(&padded(&w_values, d_latent, storage))?;
    let affine = lab.words(&pack(&affine, storage).0)?;
    let gates = lab.words(&padded(&gate_values, d_kv, cache_storage))?;
    // Whole entries a pass, as the plan of a step divides them.
    let entry_groups = tiling.groups * tiling.span;
    let pass_groups = batch.groups.div_ceil(passes).next_multiple_of(entry_groups);
    let more = (0..passes)
        .map(|pass| {
            let rows = [pass, pass + 1].map(|pass| (pass * pass_groups).min(batch.groups) as usize * d_kv as usize);
            lab.words(&padded(&more_values[rows[0]..rows[1]], d_kv, Storage::F32))
        })
        .collect::<Result<Vec<_>>>()?;
    // The buffer has room for more partial results than there are.
    let most_partials = batch.partials + 3;
    let softmax_word = attention_grouped::softmax_word(most_partials, n_head, d_value) as usize;
    let partials = (most_partials * n_head) as usize;
    let partial = lab.output(softmax_word + 2 * partials)?;
    let op = AttentionGrouped {
        tokens: batch.tokens,
        entries: batch.entries,
        partials: batch.partials,
        most_partials,
        table: batch.table,
        list_words: batch.words.len() as u32,
        cache_rows: batch.cache_rows,
        rope_byte,
        statistics_byte,
        resident,
        ..launch.op
    };
    let absent = lab.kernels.absent();
    lab.launch(|recording| {
        for (pass_index, more) in (0..).zip(&more) {
            let first_group = pass_index * pass_groups;
            // Of more passes than there are entries the last have nothing to do.
            let groups = pass_groups.min(batch.groups.saturating_sub(first_group));
            let further = if sizes.sources == Sources::Resident { 0 } else { groups };
            let op = AttentionGrouped { first_group, groups, more: further, pass_index, ..op };
            let args = attention_grouped::Args {
                q: &q.region,
                kv_b_proj: &w.region,
                affine: &affine.region,
                gates: if resident == 0 { &absent } else { &gates.region },
                gates_more: if further == 0 { &absent } else { &more.region },
                cache: &cache.region,
                lists: &lists.region,
                partial: &partial.region,
            };
            launch.of(op).add(recording, args)?;
        }
        Ok(())
    })?;

    let (gates_kept, more_kept) = (kept(&gate_values, cache_storage), widen(&more_values));
    let gate_row = |(row, id): (usize, &Option<u32>)| match id {
        Some(id) if sizes.sources.resident(*id) => gates_kept[(id * d_kv) as usize..][..d_kv as usize].to_vec(),
        _ => more_kept[row * d_kv as usize..][..d_kv as usize].to_vec(),
    };
    let before: Vec<f64> = batch.ids.iter().enumerate().flat_map(gate_row).collect();
    let affine_kept = affine_values.each_ref().map(|values| kept(values, storage));
    let statistics: Vec<[f64; 2]> = statistics
        .chunks(2)
        .map(|pair| match norm {
            GateNorm::None => [0.0, 1.0],
            GateNorm::RmsNorm => [0.0, pair[1].into()],
            GateNorm::LayerNorm => [pair[0].into(), pair[1].into()],
        })
        .collect();
    let input = reference::Grouped {
        q: &widen(&q_values),
        kv_b_proj: &kept(&w_values, storage),
        gamma: &if norm == GateNorm::None { vec![1.0; d_kv as usize] } else { affine_kept[0].clone() },
        beta: &if norm == GateNorm::LayerNorm { affine_kept[1].clone() } else { vec![0.0; d_kv as usize] },
        gates: &before.iter().map(|&g| reference::activate(activation, g)).collect::<Vec<_>>(),
        latent: &kept(&latent_values, cache_storage),
        k_rope: &kept(&rope_values, cache_storage),
        statistics: &statistics,
    };
    let heads = reference::Heads {
        n_head: n_head as usize,
        n_kv_head: n_head as usize,
        d_nope: d_nope as usize,
        d_rope: d_rope as usize,
        d_value: d_value as usize,
    };
    let attend = match launch.of_halves() {
        true => reference::attention_grouped_of_halves,
        false => reference::attention_grouped,
    };
    let expected = attend(&input, &batch.expected, heads, d_latent as usize, op.scale.into());
    extreme.check_scores(launch.variant.spec.name, &expected.max)?;
    let got = lab.read(&partial)?;
    let values = View::all(Reading::F32, expected.values.len());
    Ok(std::iter::once(lab.compare_views(&[(&got, values)], &expected.values, tolerance))
        .chain(compare_softmax(lab, (&got, softmax_word), &expected, of_scores))
        .collect())
}

//! Cases of the single kernels: tails of every tile, odd head counts, both storages.
//!
//! One file per operation, named like it; `batch`, `grouped_batch` and `extreme` hold shared parts.
//! A case is a problem of an operation: [`each_variant`] makes one for every variant in its list that computes the problem, so a
//! shader is checked as soon as it is listed.

mod batch;
mod extreme;
mod grouped_batch;

use std::fmt::Display;

use super::compare::Comparison;
use super::{Case, Lab, Outcome, name_of, not_run, outcome, settings};
use crate::adapter::{AdapterClass, Cooperative, PlanContext, Tuning};
use crate::device::Region;
use crate::error::{Error, KernelError, Result};
use crate::op::{Op, Spec, Variant};
use crate::recording::Recording;
use crate::storage::padded_width;
use crate::vouched::Caller;

/// Seed of every case's inputs: cases differ by their sizes.
const SEED: u64 = 20;

macro_rules! declare {
    ($($stem:ident: $op:ident),* $(,)?) => {
        $(mod $stem;)*

        pub(super) fn cases() -> Vec<Case> {
            let mut cases = Vec::new();
            $($stem::cases(&mut cases);)*
            cases
        }
    };
}
crate::for_each_operation!(declare);

/// What a case dispatches: its problem, with one of the shaders at one of its settings.
#[derive(Clone, Copy)]
struct Launch<O: Op> {
    op: O,
    variant: &'static Variant<O>,
    tuning: Tuning,
}

impl<O: Op> Launch<O> {
    /// The same for a problem that is known only now, or for another part of it.
    fn of(self, op: O) -> Self {
        Launch { op, ..self }
    }

    fn add(self, recording: &mut Recording, args: O::Args<&Region>) -> Result<()> {
        recording.add_forced(self.variant, &self.op, args, self.tuning, Caller::Library)
    }

    /// Runs it alone.
    fn run(self, lab: &Lab<'_>, args: O::Args<&Region>) -> Result<()> {
        lab.launch(|recording| self.add(recording, args))
    }

    /// Whether factors are rounded to halves.
    fn of_halves(self) -> bool {
        rounds_to_halves(&self.variant.spec)
    }
}

/// Whether a shader rounds its factors to halves.
fn rounds_to_halves(spec: &Spec) -> bool {
    spec.cooperative != Cooperative::NONE
}

/// Adds a case of every variant that computes the problem; it runs every setting.
fn each_variant<O: Op>(
    cases: &mut Vec<Case>,
    id: impl Display,
    op: O,
    run: impl Fn(&Lab<'_>, Launch<O>) -> Result<Vec<Comparison>> + Clone + Send + Sync + 'static,
) {
    each_able(
        cases,
        id,
        op,
        |_| true,
        move |lab, variant| {
            let of = |tuning| Ok(outcome(name_of(tuning), run(lab, Launch { op, variant, tuning })?));
            lab.settings(variant.spec.tunings).map(of).collect()
        },
    );
}

/// Adds a case of every variant that computes the problem and that `checked` takes; `run` chooses what it runs.
fn each_able<O: Op>(
    cases: &mut Vec<Case>,
    id: impl Display,
    op: O,
    checked: impl Fn(&Spec) -> bool,
    run: impl Fn(&Lab<'_>, &'static Variant<O>) -> Result<Vec<Outcome>> + Clone + Send + Sync + 'static,
) {
    let devices = AdapterClass::ALL.map(widest);
    let able = |variant: &Variant<O>| devices.iter().any(|device| refusal(variant, &op, device).is_none());
    let before = cases.len();
    for variant in O::VARIANTS.iter().filter(|variant| able(variant) && checked(&variant.spec)) {
        let run = run.clone();
        cases.push(Case::new(variant.spec.name, &id, move |lab| {
            let device = lab.kernels.context();
            let left_out = device.left_out.0.get(variant.spec.name).map(|why| format!("left out: {why}"));
            let missing = variant.spec.missing(device).map(|missing| format!("{missing} not offered")).or(left_out);
            // What this device's subgroups do not hold: said, and not passed over.
            match missing.or_else(|| refusal(variant, &op, device)) {
                Some(reason) => Ok(vec![not_run(reason)]),
                None => run(lab, variant),
            }
        }));
    }
    // A problem that is checked nowhere fails.
    if cases.len() == before {
        cases.push(Case::new(O::NAME, id, |_| Err(Error::problem(O::NAME, "no variant computes this case"))));
    }
}

/// A device that lacks nothing, within WebGPU's limits.
fn widest(class: AdapterClass) -> PlanContext {
    PlanContext {
        features: wgpu::Features::all(),
        subgroup_min_size: wgpu::MAXIMUM_SUBGROUP_MAX_SIZE,
        subgroup_max_size: wgpu::MAXIMUM_SUBGROUP_MAX_SIZE,
        cooperative: Cooperative { by_16: true, by_8: true },
        ..PlanContext::webgpu_defaults(class)
    }
}

/// Why a variant does not compute a problem on a device, whatever its setting. Limits are another matter.
fn refusal<O: Op>(variant: &Variant<O>, op: &O, device: &PlanContext) -> Option<String> {
    let refusals = settings(variant.spec.tunings).map(|tuning| refusal_of(variant, op, device, tuning));
    refusals.collect::<Option<Vec<_>>>()?.into_iter().next()
}

/// Why one of its settings does not.
fn refusal_of<O: Op>(variant: &Variant<O>, op: &O, device: &PlanContext, tuning: Tuning) -> Option<String> {
    match variant.plan(op, device, tuning) {
        Err(error @ Error::Kernel(KernelError::Problem { .. })) => Some(error.to_string()),
        _ => None,
    }
}

/// The setting that a variant takes by itself: `Auto`, or where the device's limits do not hold that the first that they hold, as
/// [`choose`](crate::op::choose) has it.
fn held<O: Op>(variant: &Variant<O>, op: &O, device: &PlanContext) -> Tuning {
    settings(variant.spec.tunings).find(|&tuning| fits(variant, op, device, tuning)).unwrap_or_default()
}

/// Whether the device's limits hold a setting.
fn fits<O: Op>(variant: &Variant<O>, op: &O, device: &PlanContext, tuning: Tuning) -> bool {
    !matches!(variant.plan(op, device, tuning), Err(Error::Limit { .. }))
}

/// Rows of parts, one after another, with every part padded to whole loads; `filling` gives the padding.
fn spread<T: Copy>(rows: &[T], parts: &[u32], mut filling: impl FnMut() -> T) -> Vec<T> {
    let mut rest = rows;
    let mut spread = Vec::new();
    for &part in parts.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (own, behind) = rest.split_at(part as usize);
        rest = behind;
        spread.extend_from_slice(own);
        spread.extend((part..padded_width(part)).map(|_| filling()));
    }
    spread
}

/// Gives all elements of a row the value of its first.
///
/// A layer norm of such a row is ill-conditioned: eps is all that it divides by, so that a spread of rounding errors shows. The
/// kernels measure from the first element on, which makes the spread of equal elements 0; where an element is a product, a
/// compiler may round it or not, so that each is off by u of itself, and by u² the variance: u² · x² / eps is nothing for x
/// below a thousand.
fn equal_rows(values: &mut [f32], width: usize) {
    for row in values.chunks_mut(width.max(1)) {
        row.fill(row[0]);
    }
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

#[cfg(test)]
mod tests {
    /// The table would be worthless if two cases shared a name or a kernel had none.
    #[test]
    fn ids_are_unique_and_every_kernel_has_cases() {
        let cases = crate::check::cases();
        let mut ids: Vec<_> = cases.iter().map(|case| case.id().to_owned()).collect();
        ids.sort();
        let before = ids.len();
        ids.dedup();
        assert_eq!(ids.len(), before);
        for spec in crate::kernels::shaders() {
            assert!(cases.iter().any(|case| case.kernel() == spec.name), "{} has no case", spec.name);
        }
    }
}

//! Many cases, and the smallest that fails.

use super::{Event, Ids, LayerCase, Prepared, Rope, Shape, family};
use crate::attention::GateRows;
use crate::check::compare::Comparison;
use crate::config::{Activation, GateConfig, GateNorm};
use crate::device::Kernels;
use crate::error::Result;
use crate::random::Random;
use crate::storage::Storage;

impl LayerCase {
    /// Cases that are a little smaller, the boldest steps first.
    fn smaller(&self) -> Vec<LayerCase> {
        let mut all = Vec::new();
        // Without its later half, without one event.
        for keep in [self.events.len() / 2, self.events.len().saturating_sub(1)] {
            all.push(LayerCase { events: self.events[..keep].to_vec(), ..self.clone() });
        }
        for index in 0..self.events.len() {
            let mut case = self.clone();
            case.events.remove(index);
            all.push(case);
        }
        // Without a sequence.
        for gone in (0..self.batch as usize).filter(|_| self.batch > 1) {
            let events = self.events.iter().filter_map(|event| event.without(gone)).collect();
            all.push(LayerCase { batch: self.batch - 1, events, ..self.clone() });
        }
        // With fewer tokens.
        for index in 0..self.events.len() {
            for event in self.events[index].with_fewer() {
                let mut case = self.clone();
                case.events[index] = event;
                all.push(case);
            }
        }
        // With a smaller cache, plainer options and narrower rows.
        for capacity in [self.capacity / 2, self.capacity - 1] {
            all.push(LayerCase { capacity, ..self.clone() });
        }
        all.push(LayerCase { gate_rows: GateRows::Recompute, ..self.clone() });
        all.push(LayerCase { ids: Ids::Equal, ..self.clone() });
        all.push(LayerCase { tile_rows: 1, ..self.clone() });
        all.extend(self.shape.simpler().into_iter().map(|shape| LayerCase { shape, ..self.clone() }));
        all.retain(|case| case != self && case.possible());
        all
    }
}

impl Shape {
    fn simpler(&self) -> Vec<Shape> {
        let with = |change: &dyn Fn(&mut Shape)| {
            let mut shape = self.clone();
            change(&mut shape);
            shape
        };
        let mut all = vec![
            with(&|shape| shape.gate = None),
            with(&|shape| shape.storage = Storage::F32),
            with(&|shape| shape.d_q_latent = None),
            with(&|shape| shape.attention_bias = false),
            with(&|shape| shape.kv_a_norm = false),
            with(&|shape| shape.rope = Rope::Neighbours),
        ];
        let gated = |change: &dyn Fn(&mut GateConfig)| with(&|shape| shape.gate.iter_mut().for_each(change));
        all.push(gated(&|gate| gate.activation = Activation::Identity));
        all.push(gated(&|gate| gate.norm = GateNorm::None));
        all.push(gated(&|gate| gate.tied = false));
        // From 1 up to a half: a width that matters is met whatever it is.
        let less = |value: u32| [1, value / 2, value.saturating_sub(1)].into_iter().filter(move |&less| less < value);
        all.extend(less(self.n_head).map(|n| with(&|shape| shape.n_head = n)));
        all.extend(less(self.hidden_size).map(|n| {
            with(&|shape| {
                shape.hidden_size = n;
                // The width of a tied gate is that of the model.
                shape.gate.iter_mut().filter(|gate| gate.tied).for_each(|gate| gate.d_gate = n);
            })
        }));
        all.extend(less(self.d_latent).map(|n| with(&|shape| shape.d_latent = n)));
        all.extend(less(self.d_nope).map(|n| with(&|shape| shape.d_nope = n)));
        all.extend([0, self.d_rope / 4 * 2].map(|n| with(&|shape| shape.d_rope = n)));
        all.extend(less(self.d_value).map(|n| with(&|shape| shape.d_value = n)));
        for n in [1, 2, 4] {
            all.push(gated(&|gate| gate.vocab_size = gate.vocab_size.min(n)));
            all.push(gated(&|gate| gate.d_gate = if gate.tied { gate.d_gate } else { gate.d_gate.min(n) }));
        }
        all
    }
}

impl Event {
    /// The same where a sequence is not there; `None` where nothing is left of it.
    fn without(&self, gone: usize) -> Option<Event> {
        let at = |sequence: usize| if sequence > gone { sequence - 1 } else { sequence };
        let mut event = self.clone();
        match &mut event {
            Event::Prefill { counts, .. } | Event::Decode { counts, .. } | Event::GiveUp { counts, .. } => {
                counts.remove(gone);
                return (event.tokens() > 0).then_some(event);
            }
            Event::TakeBack { sequence, .. } if *sequence == gone => return None,
            Event::TakeBack { sequence, .. } => *sequence = at(*sequence),
            Event::Copy { from, to } if *from == gone || *to == gone => return None,
            Event::Copy { from, to } => (*from, *to) = (at(*from), at(*to)),
            Event::Reset => {}
        }
        Some(event)
    }

    fn with_fewer(&self) -> Vec<Event> {
        let mut all = Vec::new();
        let places = self.counts().map_or(0, |(_, counts)| counts.len());
        for place in 0..places {
            for less in [|_: u32| 0, |count: u32| count / 2, |count: u32| count.saturating_sub(1)] {
                let mut event = self.clone();
                if let Event::Prefill { counts, .. } | Event::Decode { counts, .. } | Event::GiveUp { counts, .. } =
                    &mut event
                {
                    counts[place] = less(counts[place]);
                }
                all.push(event);
            }
        }
        if let Event::TakeBack { sequence, tokens } = *self {
            all.extend([tokens / 2, tokens - 1].map(|tokens| Event::TakeBack { sequence, tokens }));
        }
        all.retain(|event| event != self);
        all
    }
}

/// Extent of a search.
#[derive(Debug, Clone, Copy)]
pub struct Search {
    /// Of the configurations and histories: equal seeds, equal cases.
    pub seed: u64,
    /// Configurations of the family.
    pub configurations: usize,
    /// Cases, spread evenly over the configurations.
    pub cases: usize,
}

/// The result of a search.
#[derive(Debug, Default)]
pub struct SearchReport {
    /// Cases that were run and compared.
    pub compared: usize,
    /// New tokens in them.
    pub tokens: u64,
    /// The largest error over its tolerance, and its case.
    pub worst: Option<(f64, LayerCase)>,
    /// The first case that failed, shrunk. The search ends with it.
    pub failure: Option<Failure>,
}

/// A case that is wrong.
#[derive(Debug, Clone)]
pub struct Failure {
    /// As small as it became.
    pub case: LayerCase,
    /// Its defect, in words.
    pub problem: String,
    /// As it was drawn.
    pub drawn: LayerCase,
}

/// Draws cases, runs them, and shrinks the first that fails. `go_on` is asked before each run, with the number of cases that were
/// compared; where it returns false, the report is that of the cases so far, and a failure stays as small as it has become.
///
/// # Errors
/// A lost device. A case that the library refuses is a [`Failure`].
pub fn search(kernels: &Kernels, search: Search, mut go_on: impl FnMut(usize) -> bool) -> Result<SearchReport> {
    let mut report = SearchReport::default();
    let configurations = search.configurations.max(1);
    for (index, shape) in family(search.seed, configurations).enumerate() {
        let layer = Prepared::new(&shape)?;
        let mut random = Random::new(search.seed.wrapping_mul(1_000_003).wrapping_add(index as u64));
        // The first configurations take what does not divide.
        let cases = search.cases / configurations + usize::from(index < search.cases % configurations);
        for _ in 0..cases {
            if !go_on(report.compared) {
                return Ok(report);
            }
            let case = loop {
                let case = LayerCase::draw(shape.clone(), &mut random);
                if case.possible() {
                    break case;
                }
            };
            match judged(case.run_on(kernels, &layer))? {
                Err(problem) => {
                    let again = |case: &LayerCase| match go_on(report.compared) {
                        true => Ok(judged(case.run(kernels))?.err()),
                        false => Ok(None),
                    };
                    let (small, problem) = shrink(case.clone(), problem, again)?;
                    report.failure = Some(Failure { case: small, problem, drawn: case });
                    return Ok(report);
                }
                Ok(comparison) => {
                    let part = comparison.relative_error / shape.tolerance().relative;
                    report.compared += 1;
                    report.tokens += case.events.iter().map(|event| u64::from(event.tokens())).sum::<u64>();
                    if report.worst.as_ref().is_none_or(|(worst, _)| part > *worst) {
                        report.worst = Some((part, case));
                    }
                }
            }
        }
    }
    Ok(report)
}

/// What came of a case: a comparison that holds, or what is wrong. What the device is at fault for is nobody's case.
fn judged(result: Result<Comparison>) -> Result<Result<Comparison, String>> {
    match result {
        Ok(comparison) => Ok(match comparison.verdict.clone() {
            Ok(()) => Ok(comparison),
            Err(problem) => Err(problem),
        }),
        Err(error) if error.is_of_device() => Err(error),
        Err(error) => Ok(Err(error.to_string())),
    }
}

/// Most runs that shrinking takes: widths that nothing has compiled for cost seconds each.
const SHRINKING_RUNS: usize = 400;

/// The smallest case that still fails, by greedy steps; `problem` says what is wrong with a case.
///
/// # Errors
/// Those of `problem`.
pub fn shrink(
    mut case: LayerCase,
    mut found: String,
    mut problem: impl FnMut(&LayerCase) -> Result<Option<String>>,
) -> Result<(LayerCase, String)> {
    let mut runs = 0;
    'smaller: loop {
        for candidate in case.smaller() {
            if runs == SHRINKING_RUNS {
                return Ok((case, found));
            }
            runs += 1;
            if let Some(problem) = problem(&candidate)? {
                (case, found) = (candidate, problem);
                continue 'smaller;
            }
        }
        return Ok((case, found));
    }
}

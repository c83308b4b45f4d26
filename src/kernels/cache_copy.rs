//! Copies the rows of one sequence of a cache to another's, within one buffer.

use bytemuck::{Pod, Zeroable};

use super::{Problem as _, words};
use crate::error::{Error, Result};
use crate::kernel::{Binding, KernelSpec, Recording, Region};
use crate::plan::{Cooperative, LINEAR_WORKGROUPS, Plan, PlanContext, Tuning, linear_plan};

/// Registry line.
pub const SPEC: KernelSpec = KernelSpec {
    name: "cache_copy",
    source: include_str!("../../shaders/cache_copy.wgsl"),
    bindings: &[Binding::PARAMS, Binding::write("cache")],
    params_size: size_of::<Params>(),
    tunings: LINEAR_WORKGROUPS.len(),
    features: wgpu::Features::empty(),
    subgroup: 0,
    cooperative: Cooperative::NONE,
};

/// Uniform parameters, as in the shader.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Params {
    words: u32,
    from_word: u32,
    to_word: u32,
}

/// Words to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// 32-bit words.
    pub words: u32,
    /// First word that is read.
    pub from_word: u32,
    /// First word that is written.
    pub to_word: u32,
}

impl super::Problem for Problem {
    const SPEC: &'static KernelSpec = &SPEC;

    fn plan(&self, context: &PlanContext, tuning: Tuning) -> Result<Plan> {
        if self.words > self.from_word.abs_diff(self.to_word) {
            let problem = format!("{} words from {} to {} overlap", self.words, self.from_word, self.to_word);
            return Err(Error::problem(SPEC.name, problem));
        }
        linear_plan(SPEC.name, self.words.into(), Vec::new(), context, tuning)
    }
}

/// Adds one copy within `cache` to a recording.
///
/// # Errors
/// Ranges that overlap, or a region that is too small.
pub fn encode(recording: &mut Recording, problem: &Problem, cache: &Region, tuning: Tuning) -> Result<()> {
    let plan = problem.plan(recording.kernels().context(), tuning)?;
    let Problem { words: count, from_word, to_word } = *problem;
    let end = u64::from(from_word.max(to_word)) + u64::from(count);
    recording.push(&SPEC, &plan, &Params { words: count, from_word, to_word }, &[words(cache, end)])
}

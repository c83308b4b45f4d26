//! The operations: one module each, and one line each in [`for_each_operation`](crate::for_each_operation).
//!
//! A module holds the sizes of its operation, its buffers, its cost and its shaders, best first. The shader of the same name
//! documents the formula and every binding's shape; `reference` holds the definition in f64. Activations are f32 in memory;
//! `storage` is the type of weights and caches.

use crate::adapter::Tunings;
use crate::error::{Error, Result};
use crate::op::Spec;
use crate::registry::{AnyOp, Of};

/// The one list of operations: hands `stem: Type` of each to a macro.
#[doc(hidden)]
#[macro_export]
macro_rules! for_each_operation {
    ($then:ident) => {
        $then! {
            attention_absorbed: AttentionAbsorbed,
            attention_combine: AttentionCombine,
            attention_decode: AttentionDecode,
            attention_grouped: AttentionGrouped,
            attention_prefill: AttentionPrefill,
            cache_append: CacheAppend,
            cache_copy: CacheCopy,
            cache_move: CacheMove,
            cache_read: CacheRead,
            gate: Gate,
            gate_project: GateProject,
            gate_statistics: GateStatistics,
            gather: Gather,
            group_ids: GroupIds,
            heads_append: HeadsAppend,
            matmul: Matmul,
            norm: Norm,
            output_project: OutputProject,
            residual_add: ResidualAdd,
            roofline_cooperative: RooflineCooperative,
            roofline_copy: RooflineCopy,
            roofline_fma: RooflineFma,
            rope: Rope,
            swiglu: Swiglu,
            value_project: ValueProject,
            word_scatter: WordScatter,
        }
    };
}

macro_rules! register {
    ($($stem:ident: $op:ident),* $(,)?) => {
        $(pub mod $stem;)*
        $(pub use $stem::$op;)*

        /// Every operation.
        pub const REGISTRY: &[&dyn AnyOp] = &[$(&Of::<$op>::NEW),*];
    };
}
for_each_operation!(register);

/// Every shader.
pub fn shaders() -> impl Iterator<Item = &'static Spec> {
    REGISTRY.iter().flat_map(|op| op.shaders())
}

/// Every feature that some shader uses, experimental ones excepted: request those that the adapter has. A device without them
/// runs the other shaders.
pub fn optional_features() -> wgpu::Features {
    let experimental = wgpu::Features::all_experimental_mask();
    let needed = shaders().map(|spec| spec.features).filter(|features| !features.intersects(experimental));
    needed.fold(wgpu::Features::empty(), wgpu::Features::union)
}

impl Tunings {
    /// Refuses kernels and settings that this version does not have.
    ///
    /// # Errors
    /// [`Error::Config`] for the first of them.
    pub fn check(&self) -> Result<()> {
        for (kernel, &choice) in &self.0 {
            let spec = shaders().find(|spec| spec.name == kernel);
            let spec = spec.ok_or_else(|| Error::config(kernel, "there is no such kernel to tune"))?;
            if choice >= spec.tunings {
                let problem = format!("tuning {choice} does not exist, there are {}", spec.tunings);
                return Err(Error::config(kernel, problem));
            }
        }
        Ok(())
    }
}

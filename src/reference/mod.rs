//! The definition of every kernel in plain f64: to read, and to compare with in every test.
//!
//! One file per operation, named like it; plain passes, no tiling, no online softmax. Conventions:
//!
//! - Every tensor is a row-major slice; the documentation of each argument gives its shape, as `[tokens, width]`.
//! - Weights have the checkpoint layout `[out, in]`: `y[m, n] = Σ_k x[m, k] · w[n, k]`.
//! - A query head is `[q_C (d_nope) ; q_R (d_rope)]`; a head of `kv` is `[k_C (d_nope) ; v (d_value)]`; the rotary key
//!   `k_R` (d_rope) is one per token, shared by all heads.
//! - The caller always gives `scale`; `lse` is the natural logarithm of `Σ exp(score)`; a query without any key gives zeros.
//! - Sizes that do not fit each other panic: callers check them first.
//!
//! [`layer`] puts the kernels together into one attention layer, expanded and absorbed; [`gqa`] into one with keys and values per
//! head.

macro_rules! declare {
    ($($stem:ident: $op:ident),* $(,)?) => {
        $(pub mod $stem;)*
        $(pub use $stem::*;)*
    };
}
crate::for_each_operation!(declare);

pub mod gqa;
pub mod layer;

pub use gqa::GqaLayer;
pub use layer::{History, Latents, Layer};

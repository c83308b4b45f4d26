//! What the kernels mean, in plain f64: a definition to read, and the judge in every test.
//!
//! One file a kernel, named like its shader; plain passes, no tiling, no online softmax. Conventions:
//!
//! - Every tensor is a row-major slice; a shape `[rows, width]` stands in the documentation of each argument.
//! - Weights have the checkpoint layout `[out, in]`: `y[m, n] = Σ_k x[m, k] · w[n, k]`.
//! - A query head is `[q_C (d_nope) ; q_R (d_rope)]`; a head of `kv` is `[k_C (d_nope) ; v (d_value)]`; the rotary key
//!   `k_R` (d_rope) is one row a token, shared by all heads.
//! - `scale` is always given by the caller, `lse` is the natural logarithm of `Σ exp(score)`, and a query that sees
//!   nothing gives zeros.
//! - Sizes that do not fit each other panic: callers check them before.
//!
//! [`layer`] puts the kernels together into one attention layer, expanded and absorbed.

pub mod attention_absorbed;
pub mod attention_absorbed_stream;
pub mod attention_absorbed_subgroup;
pub mod attention_decode;
pub mod attention_decode_vec4;
pub mod attention_grouped;
pub mod attention_grouped_subgroup;
pub mod attention_merge;
pub mod attention_prefill;
pub mod attention_prefill_cooperative;
pub mod attention_prefill_cooperative_8;
pub mod attention_prefill_rows;
pub mod attention_prefill_subgroup;
pub mod cache_append;
pub mod cache_append_vec4;
pub mod cache_copy;
pub mod cache_read;
pub mod gate;
pub mod gate_rows;
pub mod gate_statistics;
pub mod gate_vec4;
pub mod gather;
pub mod group_ids;
pub mod layer;
pub mod matmul;
pub mod matmul_cooperative;
pub mod matmul_cooperative_8;
pub mod matmul_subgroup;
pub mod matmul_vec4;
pub mod matvec;
pub mod matvec_subgroup;
pub mod matvec_vec4;
pub mod norm;
pub mod norm_vec4;
pub mod residual_add;
pub mod roofline_cooperative;
pub mod roofline_cooperative_8;
pub mod roofline_copy;
pub mod roofline_fma;
pub mod rope;
pub mod swiglu;
pub mod word_scatter;

pub use attention_absorbed::attention_absorbed;
pub use attention_absorbed_stream::attention_absorbed_stream;
pub use attention_absorbed_subgroup::attention_absorbed_subgroup;
pub use attention_decode::{Partial, attention_decode};
pub use attention_decode_vec4::attention_decode_vec4;
pub use attention_grouped::{Grouped, GroupedItem, attention_grouped};
pub use attention_grouped_subgroup::attention_grouped_subgroup;
pub use attention_merge::attention_merge;
pub use attention_prefill::{Attended, Heads, attention_prefill};
pub use attention_prefill_cooperative::attention_prefill_cooperative;
pub use attention_prefill_cooperative_8::attention_prefill_cooperative_8;
pub use attention_prefill_rows::attention_prefill_rows;
pub use attention_prefill_subgroup::attention_prefill_subgroup;
pub use cache_append::cache_append;
pub use cache_append_vec4::cache_append_vec4;
pub use cache_copy::cache_copy;
pub use cache_read::cache_read;
pub use gate::{Gated, activate, gate};
pub use gate_rows::gate_rows;
pub use gate_statistics::gate_statistics;
pub use gate_vec4::gate_vec4;
pub use gather::gather;
pub use group_ids::group_ids;
pub use layer::{History, Latents, Layer};
pub use matmul::matmul;
pub use matmul_cooperative::matmul_cooperative;
pub use matmul_cooperative_8::matmul_cooperative_8;
pub use matmul_subgroup::matmul_subgroup;
pub use matmul_vec4::matmul_vec4;
pub use matvec::matvec;
pub use matvec_subgroup::matvec_subgroup;
pub use matvec_vec4::matvec_vec4;
pub use norm::{layer_norm, rms_norm};
pub use norm_vec4::norm_vec4;
pub use residual_add::residual_add;
pub use roofline_cooperative::roofline_cooperative;
pub use roofline_cooperative_8::roofline_cooperative_8;
pub use roofline_copy::roofline_copy;
pub use roofline_fma::roofline_fma;
pub use rope::{rope, rotations};
pub use swiglu::swiglu;
pub use word_scatter::word_scatter;

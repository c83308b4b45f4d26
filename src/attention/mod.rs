//! The attention layer, MLA and EG-MLA, built from the kernels.
//!
//! ```text
//! hidden ─ q_proj | q_a_proj ─ norm ─ q_b_proj ─ rope ───────────────────────────────┐
//!    │                                                                               ▼
//!    └─ kv_a_proj ─ norm ─ [gate at the latent] ─ rope ─▶ LatentCache ─ expanded ─▶ attention ─ o_proj ─ out
//!                                                            │   (kv_b_proj, gate, tile by tile) ▲
//!                                                            └──────────── absorbed ─────────────┘
//! ```
//!
//! [`GqaAttention`] is the layer with keys and values per head (MHA, GQA, MQA), [`KvCache`] its cache; all that follows holds for
//! them, too.
//!
//! A [`LatentCache`] serves every layer of a model. [`LatentCache::prepare`] checks new tokens and makes the tables that all
//! layers share; [`Attention::forward`] records one layer of that [`Step`]; [`LatentCache::commit`] makes the tokens part of
//! the cache. [`Attention::prefill`] and [`Attention::decode`] do all three for a cache of one layer.

mod absorbed;
mod batch;
mod cache;
pub mod cost;
mod expanded;
mod frame;
mod gqa;
mod grouped;
pub(crate) mod groups;
mod kv_cache;
mod layer;
mod layout;
mod limits;
mod lists;
mod parts;
mod project;
mod step;
mod table;
mod transfer;
mod weights;
mod widths;
mod workspace;

pub use cache::{CacheOptions, LatentCache};
pub use gqa::GqaAttention;
pub use kv_cache::KvCache;
pub use layer::{Attention, AttentionOptions, DecodePath, Tokens};
pub use layout::MemoryReport;
pub use lists::GateRows;
pub use step::{MOST_DECODED, Mode, Step, StepTokens};
pub use weights::TiedEmbedding;

#[cfg(feature = "decoder")]
pub(crate) use gqa::check_gqa_weights;
#[cfg(feature = "decoder")]
pub(crate) use project::Hidden;
#[cfg(feature = "decoder")]
pub(crate) use weights::{Axis, Shard, Upload, check_weights};

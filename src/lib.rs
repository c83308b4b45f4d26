//! Portable GPU kernels for Multi-head Latent Attention (MLA) and Embedding-Gated MLA (EG-MLA, arXiv 2509.16686), in WGSL
//! on wgpu.
//!
//! The caller brings a [`wgpu::Device`]; kernels are recorded into the caller's encoder or pass; outside of [`readback`],
//! [`check`] and [`mod@bench`] nothing here submits, polls or maps for reading.
//!
//! ```text
//! config ─ what a model is           plan ── what is dispatched, from problem and limits    reference ─ what a kernel means, f64
//! weights ─ a checkpoint's tensors   kernel ─ pipelines, and a recording of dispatches      cost ────── what it moves and computes
//! attention ─ cache and layer        kernels ─ one module each                              check ───── is it right on my adapter?
//! error ── what went wrong           fault ─── what a device reports between calls          bench ───── how fast is it there?
//! ```
//!
//! Start with [`attention`]; the README's example embeds a layer in an application's frame.
//!
//! Features: `decoder` is the small language model around the layer, `program` the command-line program; both are on by
//! default, and `default-features = false` is the library alone.

#![forbid(unsafe_code)]

pub mod adapter;
pub mod attention;
#[cfg(feature = "check")]
pub mod bench;
#[cfg(feature = "check")]
pub mod check;
pub mod config;
pub mod cost;
#[cfg(feature = "decoder")]
pub mod decoder;
pub mod device;
pub mod error;
pub mod fault;
pub mod files;
mod json;
pub mod kernels;
pub mod op;
pub mod plan;
pub mod random;
pub mod readback;
pub mod recording;
#[cfg(any(feature = "check", feature = "decoder"))]
pub mod reference;
pub mod registry;
#[cfg(feature = "check")]
pub mod sample;
pub mod sequences;
pub mod storage;
pub mod weights;

pub use attention::{
    Attention, AttentionOptions, CacheOptions, DecodePath, GateRows, LatentCache, Mode, Step, StepTokens, Tokens,
};
pub use config::AttentionConfig;
pub use device::{Kernels, Region};
pub use error::{Error, Result};
pub use recording::Recording;
pub use storage::Storage;
pub use weights::{AttentionWeights, Checkpoint};
pub use wgpu;

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;

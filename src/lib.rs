//! Portable GPU kernels for Multi-head Latent Attention (MLA) and Embedding-Gated MLA (EG-MLA, arXiv 2509.16686), in WGSL
//! on wgpu.
//!
//! The caller brings a [`wgpu::Device`]; kernels are recorded into the caller's encoder or pass. Only [`readback`], `check` and
//! `bench` submit, poll or map for reading.
//!
//! Start with [`Attention`] and [`LatentCache`]; the README's example puts a layer into an application's frame, and
//! `examples/` goes on from there.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`], [`weights`] | a model's configuration, and a checkpoint's tensors |
//! | [`gguf`] | a model in one GGUF file, read as a checkpoint and its configuration |
//! | [`attention`] | cache and layer, and their costs |
//! | [`error`], [`fault`] | errors, and faults that a device reports between calls |
//! | [`readback`] | submits, waits and reads, for programs without a frame of their own |
//! | [`low_level`] | single kernels, plans, and operations of your own in the same recording |
//!
//! # Features
//!
//! None is on by default.
//!
//! | feature | what it adds |
//! |---|---|
//! | `wgpu_default` | wgpu's default features, so all of its backends; without it they are the application's choice |
//! | `check` | `reference`, the definitions in plain f64; `check`, which compares an adapter with them; `bench`, which times it |
//! | `decoder` | `decoder`, language models around the layer, with their tokenizers; `reference` |

#![deny(unsafe_code)]

mod adapter;
pub mod attention;
#[cfg(feature = "check")]
pub mod bench;
#[cfg(feature = "check")]
pub mod check;
mod checkpoint;
pub mod config;
#[cfg(feature = "convert")]
pub mod convert;
mod cost;
#[cfg(feature = "decoder")]
pub mod decoder;
mod device;
pub mod error;
pub mod fault;
pub mod files;
pub mod gguf;
mod json;
mod kernels;
mod op;
mod plan;
pub mod random;
mod rates;
pub mod readback;
mod recording;
#[cfg(any(feature = "check", feature = "decoder"))]
pub mod reference;
mod registry;
#[cfg(feature = "check")]
mod sample;
pub mod sequences;
mod storage;
mod vouched;
pub mod weights;

pub use attention::{
    Attention, AttentionOptions, CacheOptions, DecodePath, GateRows, GqaAttention, KvCache, LatentCache, Mode, Step,
    StepTokens, Tokens,
};
pub use config::{AttentionConfig, GqaConfig};
pub use device::{Kernels, Region};
pub use error::{Error, Result};
pub use recording::Recording;
pub use storage::Storage;
pub use weights::{AttentionWeights, Checkpoint, GqaWeights};
pub use wgpu;

/// Single kernels: to run them, to plan and count them, or to add operations of your own to a [`Recording`].
///
/// Names and fields here follow the kernels: a minor version may change them.
pub mod low_level {
    pub use crate::adapter::*;
    pub use crate::cost::*;
    pub use crate::op::*;
    pub use crate::plan::*;
    pub use crate::rates::*;
    pub use crate::recording::Mark;
    pub use crate::registry::*;
    #[cfg(feature = "check")]
    pub use crate::sample::*;
    pub use crate::storage::{Segments, UNIT, padded_width};

    /// One module per operation, and the list of them.
    pub mod kernels {
        pub use crate::kernels::*;
    }
}

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;

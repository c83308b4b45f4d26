//! Portable GPU kernels for Multi-head Latent Attention (MLA) and Embedding-Gated MLA (EG-MLA), in WGSL on wgpu.

pub mod attention;
pub mod check;
pub mod config;
pub mod error;
pub mod kernel;
pub mod kernels;
pub mod plan;
pub mod reference;
pub mod weights;

pub use error::{Error, Result};
pub use wgpu;

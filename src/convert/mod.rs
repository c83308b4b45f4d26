//! Makes a model with keys and values per head (GQA) into one of latents: MLA by the method of TransMLA (arXiv 2502.07864), or
//! EG-MLA, its gates in closed form. `docs/convert.md` has the mathematics and what it costs in perplexity.

mod folder;
mod gates;
mod layer;
mod matrix;
mod source;

pub use folder::{Conversion, Made, Progress};
pub use gates::{GateKind, Gates};
pub use layer::{
    Activations, LatentLayer, LayerError, LayerOptions, Mixing, convert_layer, convert_layer_with, latent_config,
};
pub use matrix::{Matrix, View, eigen, product};
pub use source::{Calibration, SourceLayer, heads};

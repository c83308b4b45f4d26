//! A decoder-only language model around the attention layer: RMSNorm, MLA, EG-MLA or grouped-query attention, RMSNorm, SwiGLU.
//!
//! ```text
//! token ids ─ embed_tokens ─┬─ input_layernorm ─ attention ─┬─(+)─ post_attention_layernorm ─ SwiGLU ─(+)─▶ … ─ norm ─ logits
//!                           └───────────────────────────────┘
//! ```
//!
//! [`ModelFolder`] reads a model in Hugging Face layout, with its [`TextRules`], [`Decoder`] records it into the caller's commands,
//! [`NativeDecoder`] runs it on the CPU, [`CpuDecoder`] is the same model in f64 from [`crate::reference`]. [`Sampler`] picks tokens, [`TextStream`] turns them
//! into text as they come, [`Windows`] and [`Score`] measure the model on a text.

mod attention;
mod cpu;
mod evaluate;
mod folder;
mod model;
mod native;
mod plan;
mod rules;
mod sampling;
mod tokenizer;

pub use attention::DecoderCache;
pub use cpu::{CpuDecoder, CpuState};
pub use evaluate::{Score, Window, Windows, scored_characters};
pub use folder::{DecoderAttentionWeights, DecoderLayerWeights, DecoderWeights, ModelFolder};
pub use model::{Decoder, DecoderState, DecoderStep, Logits};
pub use native::{NativeDecoder, NativeGqaLayer, NativeHistory, NativeLayer, NativeState};
pub use rules::TextRules;
pub use sampling::{Sampler, SamplingOptions, argmax};
pub use tokenizer::{TextStream, TextTokenizer, panics_are_caught};

//! Random layer cases: a configuration and a history of prefills, decode steps, roll backs, copies and abandoned steps, against
//! the f64 reference. A case is one line of JSON that runs again anywhere, and shrinks to a smaller one that still fails.
//!
//! Pipelines are keyed by override constants, and compiling one takes far longer than running a case. So configurations come as a
//! [`family`], with many histories each; shrinking may leave the family.
//!
//! ```no_run
//! # fn run(device: &egmla::wgpu::Device, queue: &egmla::wgpu::Queue) -> egmla::Result<()> {
//! use egmla::check::property;
//! let kernels = egmla::Kernels::new(device, queue)?;
//! let report = property::search(&kernels, property::Search { seed: 1, configurations: 8, cases: 100 }, |_| true)?;
//! if let Some(failure) = report.failure {
//!     println!("{}\n{}", failure.problem, failure.case.to_json());
//! }
//! # Ok(()) }
//! ```

mod draw;
mod run;
mod search;

use serde::{Deserialize, Serialize};

use super::compare::{F16_LIMIT, F32_LIMIT, Tolerance};
use crate::attention::{DecodePath, GateRows, MOST_DECODED, Mode};
use crate::config::{AttentionConfig, GateConfig, QueryScaling, RopeConfig, RopeScaling};
use crate::error::{ArgumentError, Error, Result};
use crate::storage::Storage;

pub use draw::family;
pub use run::Prepared;
pub use search::{Failure, Search, SearchReport, search, shrink};

/// How positions rotate queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rope {
    /// Pairs (2i, 2i+1).
    Neighbours,
    /// Pairs (i, i + d_rope/2).
    Halves,
    /// Neighbours, frequencies divided by 4.
    Linear,
    /// Neighbours, YaRN past 24 positions.
    Yarn,
    /// Neighbours, queries times a factor from 7 positions on.
    ScaledQueries,
}

/// A layer: the fields of [`AttentionConfig`] and of its gate, and the seed of its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the names of AttentionConfig, documented there")]
pub struct Shape {
    pub hidden_size: u32,
    pub n_head: u32,
    pub d_latent: u32,
    pub d_q_latent: Option<u32>,
    pub d_nope: u32,
    pub d_rope: u32,
    pub d_value: u32,
    pub attention_bias: bool,
    /// Whether there is a `kv_a_layernorm`.
    pub kv_a_norm: bool,
    pub rope: Rope,
    pub gate: Option<GateConfig>,
    /// Of weights and cache.
    pub storage: Storage,
    /// Of the weights.
    pub seed: u64,
}

/// An event of the cache's history.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// New tokens of each sequence, any number.
    Prefill {
        /// Tokens of each sequence.
        counts: Vec<u32>,
        /// Seed of their hidden states and ids.
        seed: u64,
    },
    /// New tokens of each sequence, up to [`MOST_DECODED`].
    Decode {
        /// Tokens of each sequence.
        counts: Vec<u32>,
        /// By which kernels.
        path: DecodePath,
        /// Seed of their hidden states and ids.
        seed: u64,
    },
    /// A decode step that runs and is never committed: the device has its tokens, the cache does not.
    GiveUp {
        /// Tokens of each sequence.
        counts: Vec<u32>,
        /// By which kernels.
        path: DecodePath,
        /// Seed of their hidden states and ids.
        seed: u64,
    },
    /// A sequence loses its last tokens.
    TakeBack {
        /// The sequence.
        sequence: usize,
        /// Number of tokens.
        tokens: u32,
    },
    /// One sequence becomes a copy of another.
    Copy {
        /// The one that is copied.
        from: usize,
        /// The one that it replaces.
        to: usize,
    },
    /// Every sequence loses every token.
    Reset,
}

/// Token ids of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ids {
    /// Any of the vocabulary.
    Any,
    /// One id is every token.
    Equal,
    /// One id is a third of the tokens.
    Skewed,
    /// As many ids as the vocabulary has.
    Distinct,
    /// The same, the last id first.
    Reversed,
}

/// Most elements of a tensor of a case that is read; what is drawn stays far below.
const MOST_ELEMENTS: u64 = 1 << 24;

/// A layer and what happens to its cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerCase {
    /// The layer.
    pub shape: Shape,
    /// Sequences of the cache.
    pub batch: u32,
    /// Tokens of each sequence.
    pub capacity: u32,
    /// Cache rows whose keys and values are rebuilt at once.
    pub tile_rows: u32,
    /// Source of gate rows.
    pub gate_rows: GateRows,
    /// The law of the token ids.
    pub ids: Ids,
    /// In this order.
    pub events: Vec<Event>,
}

impl Shape {
    /// As the layer takes it.
    pub fn config(&self) -> AttentionConfig {
        let scaling = match self.rope {
            Rope::Neighbours | Rope::Halves | Rope::ScaledQueries => RopeScaling::None,
            Rope::Linear => RopeScaling::Linear { factor: 4.0 },
            Rope::Yarn => RopeScaling::Yarn {
                factor: 8.0,
                original_max_position_embeddings: 24.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                mscale: Some(1.0),
                mscale_all_dim: Some(0.7),
                attention_factor: None,
                truncate: true,
            },
        };
        AttentionConfig {
            hidden_size: self.hidden_size,
            n_head: self.n_head,
            d_latent: self.d_latent,
            d_q_latent: self.d_q_latent,
            d_nope: self.d_nope,
            d_rope: self.d_rope,
            d_value: self.d_value,
            attention_bias: self.attention_bias,
            gate: self.gate.clone(),
            rope: RopeConfig {
                interleave: self.rope != Rope::Halves,
                scaling,
                query_scaling: (self.rope == Rope::ScaledQueries)
                    .then_some(QueryScaling { beta: 0.7, original_max_position_embeddings: 7.0 }),
                ..RopeConfig::default()
            },
            ..AttentionConfig::default()
        }
    }

    /// Refuses cases that would take too much memory.
    fn check_size(&self, batch: u32, capacity: u32) -> Result<()> {
        let Shape { hidden_size, n_head, d_latent, d_q_latent, d_nope, d_rope, d_value, .. } = *self;
        let product = |extents: &[u32]| extents.iter().fold(1, |all: u64, &extent| all.saturating_mul(extent.into()));
        let heads = n_head.saturating_mul(d_nope.saturating_add(d_rope.max(d_value)));
        let low = d_latent.saturating_add(d_rope).saturating_add(d_q_latent.unwrap_or(0));
        let (vocab, d_gate) = self.gate.as_ref().map_or((0, 1), |gate| (gate.vocab_size, gate.d_gate));
        let row = hidden_size.max(heads).max(low);
        for (what, found) in [
            ("shape: elements of its largest weight", product(&[row, hidden_size.max(low).max(d_gate)])),
            ("shape: elements of its gate table", product(&[vocab, d_gate.max(heads)])),
            ("batch × capacity × the widest row", product(&[batch, capacity, row])),
        ] {
            if found > MOST_ELEMENTS {
                return Err(Error::Argument(ArgumentError::OutOfRange { what, found, limit: MOST_ELEMENTS }));
            }
        }
        Ok(())
    }

    /// Relative error that its results may show.
    pub fn tolerance(&self) -> Tolerance {
        let relative = match self.storage {
            Storage::F32 => F32_LIMIT,
            Storage::F16 => F16_LIMIT,
        };
        Tolerance { relative }
    }

    fn vocab(&self) -> u32 {
        self.gate.as_ref().map_or(1, |gate| gate.vocab_size)
    }
}

impl LayerCase {
    /// One line that [`LayerCase::from_json`] reads.
    pub fn to_json(&self) -> String {
        // Plain structs of numbers and names: serialising cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads a case.
    ///
    /// # Errors
    /// `DataError::Json` for another text, [`Error::Config`] for an impossible case, `ArgumentError::OutOfRange` for one that is
    /// too large.
    pub fn from_json(text: &str) -> Result<LayerCase> {
        let case: LayerCase = serde_json::from_str(text)?;
        case.shape.config().validate()?;
        case.shape.check_size(case.batch, case.capacity)?;
        if !case.possible() {
            return Err(Error::config("events", "do not fit the cache, or hold no new token"));
        }
        Ok(case)
    }

    /// Whether every event fits the cache, and one at least has tokens to compare.
    fn possible(&self) -> bool {
        let mut lengths = vec![0; self.batch as usize];
        for event in &self.events {
            match event.applied(&lengths, self.capacity) {
                Some(after) => lengths = after,
                None => return false,
            }
        }
        self.shape.config().validate().is_ok() && self.events.iter().any(|event| event.tokens() > 0)
    }
}

impl Event {
    fn counts(&self) -> Option<(Mode, &Vec<u32>)> {
        match self {
            Event::Prefill { counts, .. } => Some((Mode::Prefill, counts)),
            Event::Decode { counts, .. } | Event::GiveUp { counts, .. } => Some((Mode::Decode, counts)),
            _ => None,
        }
    }

    fn tokens(&self) -> u32 {
        self.counts().map_or(0, |(_, counts)| counts.iter().fold(0, |all, &count| all.saturating_add(count)))
    }

    /// Lengths after it, `None` where it cannot happen or says nothing.
    fn applied(&self, lengths: &[u32], capacity: u32) -> Option<Vec<u32>> {
        let mut after = lengths.to_vec();
        match self {
            Event::TakeBack { sequence, tokens } => {
                let length = after.get_mut(*sequence)?;
                *length = length.checked_sub(*tokens).filter(|_| *tokens > 0)?;
            }
            Event::Copy { from, to } => *after.get_mut(*to)? = *lengths.get(*from).filter(|_| from != to)?,
            Event::Reset => after.fill(0),
            _ => {
                let (mode, counts) = self.counts()?;
                let most = if mode == Mode::Decode { MOST_DECODED } else { capacity };
                if counts.len() != lengths.len() || self.tokens() == 0 || counts.iter().any(|&count| count > most) {
                    return None;
                }
                for (length, count) in after.iter_mut().zip(counts) {
                    *length = length.checked_add(*count).filter(|&length| length <= capacity)?;
                }
                if matches!(self, Event::GiveUp { .. }) {
                    return Some(lengths.to_vec());
                }
            }
        }
        Some(after)
    }
}

//! Widths as shaders see them: each width of a configuration, padded with zeros to [`UNIT`](crate::storage::UNIT) elements.

use crate::config::{AttentionConfig, GateConfig, GateSite};
use crate::error::{Error, Result};
use crate::kernels::attention_grouped;
use crate::storage::{Segments, padded_width, product};

/// Padded widths of a layer, by the names of [`AttentionConfig`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Widths {
    pub n_head: u32,
    pub hidden: u32,
    /// Of the query latent; 0 with a full-rank query.
    pub rank: u32,
    pub d_latent: u32,
    pub d_nope: u32,
    pub d_rope: u32,
    pub d_value: u32,
    /// 0 without a gate.
    pub d_gate: u32,
}

impl Widths {
    /// The widths of a configuration that has been validated.
    ///
    /// # Errors
    /// Padded widths that 32 bits do not index.
    pub fn of(config: &AttentionConfig) -> Result<Self> {
        let widths = Widths {
            n_head: config.n_head,
            hidden: padded_width(config.hidden_size),
            rank: padded_width(config.d_q_latent.unwrap_or(0)),
            d_latent: padded_width(config.d_latent),
            d_nope: padded_width(config.d_nope),
            d_rope: padded_width(config.d_rope),
            d_value: padded_width(config.d_value),
            d_gate: padded_width(config.gate.as_ref().map_or(0, |gate| gate.d_gate)),
        };
        let Widths { n_head, rank, d_latent, d_nope, d_rope, d_value, .. } = widths;
        let parts = u64::from(d_nope) + u64::from(d_rope.max(d_value));
        let down = u64::from(rank) + u64::from(d_latent) + u64::from(d_rope);
        // Their sum then fits 32 bits.
        if product(&[n_head]).saturating_mul(parts).max(down) >= 1 << 31 {
            return Err(Error::config("num_attention_heads", "the padded heads of a token are 2^31 elements or more"));
        }
        Ok(widths)
    }

    /// Width of a query head.
    pub fn d_query(&self) -> u32 {
        self.d_nope + self.d_rope
    }

    /// Width of the queries of a token.
    pub fn queries(&self) -> u32 {
        self.n_head * self.d_query()
    }

    /// Element of `q` behind the queries of tokens, at a binding's alignment: where something of their latents is kept.
    pub fn kept(&self, tokens: u32) -> u32 {
        // Within a binding, so 32 bits count them.
        product(&[tokens, self.queries()]).next_multiple_of(64) as u32
    }

    /// Width of the keys and values of a token.
    pub fn d_kv(&self) -> u32 {
        self.n_head * (self.d_nope + self.d_value)
    }

    /// Width of the values of a token.
    pub fn values(&self) -> u32 {
        self.n_head * self.d_value
    }

    /// Width of what a token's hidden state is projected to for its queries: these, or their latent.
    pub fn query_down(&self) -> u32 {
        if self.rank == 0 { self.queries() } else { self.rank }
    }

    /// Width of queries or their latent, latent and rotary key: the outputs of the down projections per token.
    pub fn down(&self) -> u32 {
        self.query_down() + self.d_latent + self.d_rope
    }

    /// As the grouped attention takes them.
    pub fn grouped(&self) -> attention_grouped::Widths {
        let Widths { d_latent, d_nope, d_rope, d_value, .. } = *self;
        attention_grouped::Widths { d_latent, d_nope, d_rope, d_value }
    }
}

/// The configuration that a device computes: the same with padded widths.
///
/// # Errors
/// As [`Widths::of`].
pub(crate) fn padded(config: &AttentionConfig) -> Result<AttentionConfig> {
    let Widths { hidden, d_latent, d_nope, d_rope, d_value, d_gate, .. } = Widths::of(config)?;
    Ok(AttentionConfig {
        hidden_size: hidden,
        d_latent,
        d_q_latent: config.d_q_latent.map(padded_width),
        d_nope,
        d_rope,
        d_value,
        gate: config.gate.as_ref().map(|gate| GateConfig { d_gate, ..gate.clone() }),
        ..config.clone()
    })
}

/// Width of a gate and its norm: keys and values of every head, or the latent.
pub(crate) fn gated_segments(config: &AttentionConfig, gate: &GateConfig) -> Segments {
    match gate.site {
        GateSite::UpProjected => Segments { count: config.n_head, parts: [config.d_nope, config.d_value] },
        GateSite::Latent => Segments::one(config.d_latent),
    }
}

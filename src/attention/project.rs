//! From hidden states to queries and to new cache rows, and from values to the output.

use super::frame::{Frame, Latents};
use super::step::Table;
use super::weights::DownProjection;
use crate::config::LOW_RANK_NORM_EPS;
use crate::device::Region;
use crate::error::Result;
use crate::kernels::matmul::{Layout, Matmul};
use crate::kernels::{cache_append, norm};

/// Hidden states of the caller: elements per token, and elements from one token to the next.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hidden<'a> {
    pub region: &'a Region,
    pub width: u32,
}

impl<'a> Frame<'a> {
    /// Projects `q [tokens, n_head, d_nope + d_rope]`, not yet rotated, and the normed latents and rotary keys of the new tokens.
    /// Returns the latents.
    pub fn project(&mut self, hidden: Hidden<'_>) -> Result<Latents<'a>> {
        let (layer, workspace, tokens) = (self.layer, self.workspace, self.step.tokens);
        let (widths, config, weights) = (&layer.widths, &layer.config, &layer.weights);
        let of_hidden = |cols: u32| Matmul {
            w: Layout::dense(widths.hidden),
            ..Matmul::linear(tokens, hidden.width, cols, false, layer.storage)
        };
        for DownProjection { first, columns, proj, bias } in &weights.down {
            let y = Layout { offset: *first, row: widths.down(), ..Layout::dense(*columns) };
            let op = Matmul { y, ..of_hidden(*columns) };
            self.product(&op, hidden.region, proj, bias.as_ref(), &workspace.down)?;
        }
        // Normed segments, in order from the first element.
        let rank = config.d_q_latent.unwrap_or(0);
        let latent = if weights.has_kv_a_norm { config.d_latent } else { 0 };
        if let Some(weight) = &weights.down_norm {
            let (width, second) = if rank == 0 { (latent, 0) } else { (rank, latent) };
            let op = norm::Norm {
                rows: tokens,
                width,
                second,
                x_offset: 0,
                x_row: widths.down(),
                eps: LOW_RANK_NORM_EPS as f32,
                kind: norm::Kind::Rms,
                bias: false,
                storage: layer.storage,
            };
            let args = norm::Args { x: &workspace.down, weight, bias: &self.absent, y: &workspace.normed };
            self.recording.add_own(&op, args)?;
        }
        let normed_row = widths.rank + if latent == 0 { 0 } else { widths.d_latent };
        if rank == 0 {
            self.product(&of_hidden(widths.queries()), hidden.region, &weights.query, None, &workspace.q)?;
        } else {
            let x = Layout { row: normed_row, ..Layout::dense(widths.rank) };
            let op = Matmul { x, ..self.linear(tokens, widths.rank, widths.queries()) };
            self.product(&op, &workspace.normed, &weights.query, None, &workspace.q)?;
        }
        Ok(match latent {
            0 => Latents { region: &workspace.down, offset: widths.rank, row: widths.down() },
            _ => Latents { region: &workspace.normed, offset: widths.rank, row: normed_row },
        })
    }

    /// Gates the latents if the configuration says so, appends latents and rotary keys to the cache, and rotates the queries.
    /// Returns the latents before an f16 cache rounds them; [`Frame::as_cached`] returns them after.
    pub fn append(&mut self, mut latents: Latents<'a>) -> Result<Latents<'a>> {
        let (layer, workspace, step) = (self.layer, self.workspace, self.step);
        let widths = &layer.widths;
        if let Some(gate) = layer.config.latent_gate() {
            self.look_up(gate, step.tokens, &self.ids(), &workspace.gate_rows)?;
            let y = &workspace.latent_gated;
            self.gate(gate, step.tokens, latents, None, y)?;
            latents = Latents { region: y, offset: 0, row: widths.d_latent };
        }
        let op = cache_append::CacheAppend {
            tokens: step.tokens,
            cache_rows: self.cache.rows(),
            d_latent: widths.d_latent,
            latent_offset: latents.offset,
            latent_row: latents.row,
            d_rope: widths.d_rope,
            rope_offset: widths.rank + widths.d_latent,
            rope_row: widths.down(),
            rotate: true,
            queries: cache_append::Queries {
                n_head: widths.n_head,
                offset: widths.d_nope,
                row: widths.queries(),
                head: widths.d_query(),
            },
            rope_byte: self.cached.rope_key.offset,
            storage: self.cache.options().storage,
        };
        let args = cache_append::Args {
            latent: latents.region,
            rope_key: &workspace.down,
            rotations: &self.table(Table::Rotations),
            slots: &self.table(Table::Slots),
            cache: &self.cached.whole,
            q: &workspace.q,
        };
        self.recording.add_own(&op, args)?;
        Ok(latents)
    }

    /// `out = o_proj · values`
    pub fn project_out(&mut self, out: Hidden<'_>) -> Result<()> {
        let (layer, workspace) = (self.layer, self.workspace);
        let op = self.linear(self.step.tokens, layer.widths.values(), out.width);
        self.product(&op, &workspace.values, &layer.weights.o_proj, layer.weights.o_bias.as_ref(), out.region)
    }
}

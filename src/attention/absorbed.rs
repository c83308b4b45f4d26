//! Attention over the latents themselves: the absorbed path of MLA and of the gate at `latent`.

use super::frame::Frame;
use super::project::Hidden;
use super::step::{PartTable, Table};
use crate::error::Result;
use crate::kernels::matmul::{Layout, Matmul};
use crate::kernels::{attention_absorbed, value_project};

impl Frame<'_> {
    pub fn attend_absorbed(&mut self, out: Hidden<'_>) -> Result<()> {
        let (layer, step, workspace) = (self.layer, self.step, self.workspace);
        let widths = &layer.widths;
        let (n_head, d_latent, d_nope, d_value) = (widths.n_head, widths.d_latent, widths.d_nope, widths.d_value);
        // Weight rows of kv_b_proj per head.
        let head_weights = (d_nope + d_value) * d_latent;
        let latents = Layout { offset: 0, row: n_head * d_latent, inner: 1, batch: d_latent };
        let kv_b_proj = &layer.weights.kv_b_proj;

        // a[h] = W_K[h]ᵀ q_C[h]
        let absorb = Matmul {
            batch: n_head,
            x: Layout { offset: 0, row: widths.queries(), inner: 1, batch: widths.d_query() },
            w: Layout { offset: 0, row: 1, inner: d_latent, batch: head_weights },
            y: latents,
            ..self.linear(step.tokens, d_nope, d_latent)
        };
        self.product(&absorb, &workspace.q, kv_b_proj, None, &workspace.absorbed)?;

        for part in &step.parts {
            let cached = self.part(part);
            let op = attention_absorbed::AttentionAbsorbed {
                tokens: step.tokens,
                most_tokens: step.most_tokens,
                partials: step.partials,
                n_sequence: part.n_sequence,
                split: step.split,
                splits: (part.rows.end - part.rows.start) / step.split,
                n_head,
                d_latent,
                d_nope,
                d_rope: widths.d_rope,
                cache_rows: cached.rows,
                scale: layer.config.scale() as f32,
                weights: layer.storage,
                storage: self.cache.options().storage,
            };
            let args = attention_absorbed::Args {
                absorbed: &workspace.absorbed,
                q: &workspace.q,
                latent_cache: &cached.latent,
                rope_cache: &cached.rope_key,
                sequences: &self.table_of(part, PartTable::Decoding),
                partial_values: &workspace.partial_values,
                partial_softmax: &workspace.partial_softmax,
            };
            self.recording.add_own(&op, args)?;
        }

        // o[h] = W_V[h] S[h]
        if value_project::pays(step.tokens, step.partials, d_latent) {
            let op = value_project::ValueProject {
                tokens: step.tokens,
                n_head,
                d_latent,
                d_value,
                splits: step.partials,
                w_offset: d_nope * d_latent,
                w_head: head_weights,
                storage: layer.storage,
            };
            let args = value_project::Args {
                partial_values: &workspace.partial_values,
                partial_softmax: &workspace.partial_softmax,
                ranges: &self.table(Table::Ranges),
                w: kv_b_proj,
                values: &workspace.values,
            };
            self.recording.add_own(&op, args)?;
            return self.project_out(out);
        }
        self.combine(&self.row_partials(), d_latent, &workspace.combined)?;
        let values = Matmul {
            batch: n_head,
            x: latents,
            w: Layout { offset: d_nope * d_latent, row: d_latent, inner: 1, batch: head_weights },
            y: Layout { offset: 0, row: widths.values(), inner: 1, batch: d_value },
            ..self.linear(step.tokens, d_latent, d_value)
        };
        self.product(&values, &workspace.combined, kv_b_proj, None, &workspace.values)?;
        self.project_out(out)
    }
}

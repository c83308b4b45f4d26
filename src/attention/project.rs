//! From hidden states to queries and to new cache rows, and from values to the output.

use super::frame::{Frame, Partials};
use super::step::{PartTable, Table};
use super::weights::{LowRank, Shard};
use crate::config::GateConfig;
use crate::device::{Kernels, Region};
use crate::error::{BufferError, Error, Result};
use crate::kernels::matmul::{FEW_ROWS, Layout, Matmul};
use crate::kernels::{attention_combine, cache_append, norm, output_project, rope};
use crate::recording::Recording;
use crate::storage::{Storage, product, words};

/// Hidden states of the caller: elements per token, and elements from one token to the next.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hidden<'a> {
    pub region: &'a Region,
    pub width: u32,
}

impl<'a> Hidden<'a> {
    /// A layer's input and output as the caller has them: `[tokens, width]` f32 each, in different buffers.
    ///
    /// # Errors
    /// [`Error::Buffer`] for a region that does not fit, or for one buffer for both.
    pub fn of_caller(kernels: &Kernels, tokens: u32, width: u32, [hidden, out]: [&'a Region; 2]) -> Result<[Self; 2]> {
        let needed = words(product(&[tokens, width]));
        for (name, region) in [("hidden", hidden), ("out", out)] {
            region.check("attention", name, needed, &kernels.context().limits)?;
        }
        // No dispatch binds both, but one buffer for both would lose the input.
        if hidden.buffer == out.buffer {
            return Err(Error::Buffer(BufferError::Aliased { kernel: "attention", first: "hidden", second: "out" }));
        }
        Ok([hidden, out].map(|region| Hidden { region, width }))
    }
}

impl<'a> Frame<'a> {
    /// Projects what the hidden states say of queries, latents and rotary keys, neither normed nor rotated.
    pub fn project(&mut self, hidden: Hidden<'_>) -> Result<()> {
        let (layer, workspace, tokens) = (self.layer, self.workspace, self.step.tokens);
        let widths = &layer.widths;
        let op = Matmul {
            w: Layout::dense(widths.hidden),
            ..Matmul::linear(tokens, hidden.width, widths.down(), false, layer.storage)
        };
        Shard::product(&layer.weights.down, self.recording, &op, hidden.region, &workspace.down)
    }

    /// Appends latents and rotary keys to the cache, and makes `q [tokens, n_head, d_nope + d_rope]` of the queries. Latents are
    /// kept as the cache has them, behind the queries, where the norm of a gate is to be measured: they, or their keys and values.
    pub fn append(&mut self) -> Result<()> {
        let (layer, workspace, step) = (self.layer, self.workspace, self.step);
        let (widths, config, weights) = (&layer.widths, &layer.config, &layer.weights);
        let gate = config.latent_gate();
        if let Some(gate) = gate {
            self.project_latent_gates(gate)?;
        }
        let low_rank = weights.query.as_ref().map(|query| cache_append::LowRank {
            rank: widths.rank,
            used: config.d_q_latent.unwrap_or(0),
            weight: query.norm,
            eps: layer.config.low_rank_norm_eps as f32,
        });
        let keeps_values = cache_append::keeps_values(step.tokens, widths.d_latent);
        // Many are a product of their own, and those of more weights than one binding holds.
        let whole = weights.query.as_ref().and_then(|query| Shard::sole(&query.proj));
        let apart = low_rank.is_some() && (step.tokens > FEW_ROWS || whole.is_none());
        let n_head = if apart { 0 } else { widths.n_head };
        let queries = cache_append::Queries { n_head, offset: 0, d_nope: widths.d_nope, low_rank };
        let mut op = cache_append::CacheAppend {
            tokens: step.tokens,
            cache_rows: 0,
            row: widths.down(),
            latent_offset: widths.query_down(),
            d_latent: widths.d_latent,
            latent_used: config.d_latent,
            rope_offset: widths.query_down() + widths.d_latent,
            d_rope: widths.d_rope,
            rotate: true,
            queries: if apart { cache_append::Queries::default() } else { queries },
            norm: weights.has_kv_a_norm.then_some(layer.config.low_rank_norm_eps as f32),
            gate: gate.map(|gate| cache_append::LatentGate {
                activation: gate.activation,
                norm: gate.norm,
                eps: gate.norm_eps as f32,
            }),
            kept: self.measures().then(|| cache_append::Kept {
                first: widths.kept(step.tokens),
                columns: if keeps_values { widths.d_kv() } else { 0 },
            }),
            rope_byte: 0,
            weights: layer.storage,
            storage: self.cache.options().storage,
        };
        for part in step.parts.iter().filter(|part| part.appended) {
            let cached = self.part(part);
            (op.cache_rows, op.rope_byte) = (cached.rows, cached.rope_key.offset);
            let args = cache_append::Args {
                x: &workspace.down,
                weight: weights.norms.as_ref().unwrap_or(&self.absent),
                g: if keeps_values && gate.is_none() { &weights.kv_b_proj } else { &workspace.gate },
                rotations: &self.table(Table::Rotations),
                slots: &self.table_of(part, PartTable::Slots),
                cache: &cached.whole,
                q: &workspace.q,
                w: whole.map_or(&self.absent, |whole| &whole.proj),
            };
            self.recording.add_own(&op, args)?;
            // Once is enough for what is not of the cache.
            (op.queries, op.kept) = (cache_append::Queries::default(), None);
        }
        if apart {
            self.project_queries()?;
        }
        step.scale_queries(self.recording, &self.tables, &workspace.q, widths.queries())
    }

    /// The gates of the new tokens' latents, before their activation.
    fn project_latent_gates(&mut self, gate: &GateConfig) -> Result<()> {
        let (workspace, tokens) = (self.workspace, self.step.tokens);
        let width = self.layer.widths.d_latent;
        if tokens <= FEW_ROWS {
            let op = self.gate_project(gate, tokens, width, Storage::F32);
            return self.project_gates(&op, &self.ids(), &self.absent.clone(), &workspace.gate);
        }
        self.look_up(gate, tokens, &self.ids(), &workspace.gate_rows)?;
        let op = self.linear(tokens, self.layer.widths.d_gate, width);
        self.product(&op, &workspace.gate_rows, &self.gate_weights()?.b_proj, None, &workspace.gate)
    }

    /// Many queries of a low rank: norm, product, rotation.
    fn project_queries(&mut self) -> Result<()> {
        let (layer, workspace, tokens) = (self.layer, self.workspace, self.step.tokens);
        let (widths, weights) = (&layer.widths, &layer.weights);
        let (Some(LowRank { norm: first, proj }), Some(norms)) = (&weights.query, &weights.norms) else {
            return Ok(());
        };
        let at = layer.storage.sized((*first).into());
        let weight = &Region::new(&norms.buffer, at, norms.size.saturating_sub(at));
        let (rank_used, eps) = (layer.config.d_q_latent.unwrap_or(0), layer.config.low_rank_norm_eps as f32);
        let rotations = &self.table(Table::Rotations);
        let op = norm::Norm {
            rows: tokens,
            width: rank_used,
            x_offset: 0,
            x_row: widths.down(),
            eps,
            kind: norm::Kind::Rms,
            bias: false,
            storage: layer.storage,
        };
        let args = norm::Args { x: &workspace.down, weight, bias: &self.absent, y: &workspace.normed };
        self.recording.add_own(&op, args)?;
        let op = self.linear(tokens, widths.rank, widths.queries());
        Shard::product(proj, self.recording, &op, &workspace.normed, &workspace.q)?;
        let op = rope::Rope {
            tokens,
            n_head: widths.n_head,
            d_rope: widths.d_rope,
            offset: widths.d_nope,
            token_stride: widths.queries(),
            head_stride: widths.d_query(),
            interleave: true,
        };
        if op.d_rope == 0 {
            return Ok(());
        }
        self.recording.add_own(&op, rope::Args { rotations, values: &workspace.q })
    }

    /// `out = o_proj · values` of the values that partial results combine to.
    pub fn project_partials(&mut self, partials: &Partials, out: Hidden<'_>) -> Result<()> {
        self.output().project_partials(self.recording, partials, out)
    }

    /// `out = o_proj · values`
    pub fn project_out(&mut self, out: Hidden<'_>) -> Result<()> {
        self.output().project(self.recording, out)
    }

    fn output(&self) -> Output<'a> {
        let (layer, workspace) = (self.layer, self.workspace);
        Output {
            tokens: self.step.tokens,
            n_head: layer.widths.n_head,
            d_value: layer.widths.d_value,
            storage: layer.storage,
            o_proj: &layer.weights.o_proj,
            values: &workspace.values,
            lse: &workspace.lse,
            absent: self.absent.clone(),
        }
    }
}

/// From the values of the heads to a layer's output.
pub(super) struct Output<'a> {
    pub tokens: u32,
    pub n_head: u32,
    pub d_value: u32,
    /// Of the weights.
    pub storage: Storage,
    pub o_proj: &'a [Shard<Region>],
    /// `[tokens, n_head, d_value]`
    pub values: &'a Region,
    /// `[tokens, n_head]`
    pub lse: &'a Region,
    /// Bound in place of absent buffers.
    pub absent: Region,
}

impl Output<'_> {
    /// `out = o_proj · values` of the values that partial results combine to.
    pub fn project_partials(&self, recording: &mut Recording, partials: &Partials, out: Hidden<'_>) -> Result<()> {
        let op = output_project::OutputProject {
            tokens: self.tokens,
            n_head: self.n_head,
            d_value: self.d_value,
            columns: out.width,
            splits: partials.count,
            bias: self.o_proj.iter().any(|shard| shard.bias.is_some()),
            storage: self.storage,
        };
        let (Some(whole), true) = (Shard::sole(self.o_proj), op.pays()) else {
            combine(recording, (self.tokens, self.n_head, self.d_value), partials, self.values, self.lse)?;
            return self.project(recording, out);
        };
        let args = output_project::Args {
            partial_values: &partials.values,
            partial_softmax: &partials.softmax,
            ranges: &partials.ranges,
            w: &whole.proj,
            bias: whole.bias.as_ref().unwrap_or(&self.absent),
            y: out.region,
        };
        recording.add_own(&op, args)
    }

    /// `out = o_proj · values`
    pub fn project(&self, recording: &mut Recording, out: Hidden<'_>) -> Result<()> {
        let op = Matmul::linear(self.tokens, self.n_head * self.d_value, out.width, false, self.storage);
        Shard::product(self.o_proj, recording, &op, self.values, out.region)
    }
}

/// `values [tokens, n_head, width]` of partial results.
pub(super) fn combine(
    recording: &mut Recording,
    (tokens, n_head, width): (u32, u32, u32),
    partials: &Partials,
    values: &Region,
    lse: &Region,
) -> Result<()> {
    let Partials { values: partial_values, softmax: partial_softmax, ranges, count: splits } = partials;
    let op = attention_combine::AttentionCombine { tokens, n_head, width, splits: *splits };
    recording.add_own(&op, attention_combine::Args { partial_values, partial_softmax, ranges, values, lse })
}

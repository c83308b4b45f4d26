//! The tensors of a GGUF file as a checkpoint in Hugging Face layout has them.
//!
//! | file | checkpoint |
//! |---|---|
//! | `token_embd`, `output_norm`, `output` | `model.embed_tokens`, `model.norm`, `lm_head` |
//! | `blk.N.attn_q`, `attn_k`, `attn_v`, `attn_output` | `model.layers.N.self_attn.q_proj`, `k_proj`, `v_proj`, `o_proj` |
//! | `blk.N.attn_q_norm`, `attn_k_norm` | `….self_attn.q_norm`, `k_norm` |
//! | `blk.N.attn_q_a`, `attn_q_a_norm`, `attn_q_b` | `….self_attn.q_a_proj`, `q_a_layernorm`, `q_b_proj` |
//! | `blk.N.attn_kv_a_mqa`, `attn_kv_a_norm`, `attn_kv_b` | `….self_attn.kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj` |
//! | `blk.N.attn_norm`, `ffn_norm` | `….input_layernorm`, `post_attention_layernorm` |
//! | `blk.N.ffn_gate`, `ffn_up`, `ffn_down` | `….mlp.gate_proj`, `up_proj`, `down_proj` |
//!
//! Two are laid out otherwise:
//!
//! - **`llama`, rows of `attn_q` and `attn_k`.** Hugging Face turns pairs (i, i + d/2) of a head, the file pairs (2i, 2i + 1): its
//!   row 2i + s of a head is row s · d/2 + i of the checkpoint, for s of 0 and 1. That is undone here. No row of other
//!   architectures is moved: in `qwen2` and `qwen3` both turn (i, i + d/2), in `deepseek2` both (2i, 2i + 1).
//! - **`deepseek2`, `attn_k_b` `[n_head, d_latent, d_nope]` and `attn_v_b` `[n_head, d_value, d_latent]`** of newer files: the key
//!   rows of `kv_b_proj` transposed per head, and its value rows. Here they are one matrix again. Where a file has `attn_kv_b`,
//!   too, that is taken and they are its copies.
//!
//! `rope_freqs` is read by the configuration. Any other name stays what it is, so that a reader of a whole model refuses it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::config::{Architecture, ROPE_FACTORS};
use super::container::Gguf;
use crate::checkpoint::{Source, TensorInfo};
use crate::error::{DataError, Error, Result, TensorError};

/// Parts of names within a layer.
const LAYER: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Parts of names beside the layers.
const OTHER: &[(&str, &str)] =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// What of the file a tensor is made of.
#[derive(Debug)]
enum Origin {
    /// A tensor as it is.
    Whole(String),
    /// A tensor whose rows are moved within each of so many heads.
    Unturned(String, usize),
    /// `attn_k_b` and `attn_v_b`, and the shape of the first: heads, d_latent, d_nope.
    Joined(String, String, [usize; 3]),
}

/// A file's tensors under the names of a checkpoint.
pub(super) struct Names {
    gguf: Gguf,
    path: Option<PathBuf>,
    tensors: BTreeMap<String, TensorInfo>,
    origins: BTreeMap<String, Origin>,
}

/// The checkpoint's name for one of the file, and the layer's part of the file's.
fn checkpoint_name(name: &str) -> Option<String> {
    let (stem, ending) = name.rsplit_once('.').filter(|(_, ending)| matches!(*ending, "weight" | "bias"))?;
    if let Some((_, other)) = OTHER.iter().find(|(part, _)| *part == stem) {
        return Some(format!("{other}.{ending}"));
    }
    let (number, part) = stem.strip_prefix("blk.")?.split_once('.')?;
    // As a number is written, so that no two names become one.
    let number: u32 = number.parse().ok().filter(|it: &u32| it.to_string() == number)?;
    let (_, layer) = LAYER.iter().find(|(known, _)| *known == part)?;
    Some(format!("model.layers.{number}.{layer}.{ending}"))
}

impl Names {
    /// # Errors
    /// An architecture that is not read, a part of a split file, or shapes that do not fit the layouts above.
    pub(super) fn new(gguf: Gguf, path: Option<PathBuf>) -> Result<Self> {
        let architecture = Architecture::of(&gguf)?;
        let mut names = Names { path, tensors: BTreeMap::new(), origins: BTreeMap::new(), gguf };
        let file = names.gguf.tensors().clone();
        for (name, info) in &file {
            if name == ROPE_FACTORS {
                continue;
            }
            let part = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map(|(_, part)| part);
            let beside =
                |other: &str| part.map(|part| name.replace(part, other)).filter(|other| file.contains_key(other));
            let origin = match (architecture, part) {
                (Architecture::Llama, Some("attn_q.weight" | "attn_q.bias")) => {
                    Origin::Unturned(name.clone(), names.heads("attention.head_count", name, info)?)
                }
                (Architecture::Llama, Some("attn_k.weight" | "attn_k.bias")) => {
                    let key = match names.gguf.metadata().contains_key("llama.attention.head_count_kv") {
                        true => "attention.head_count_kv",
                        false => "attention.head_count",
                    };
                    Origin::Unturned(name.clone(), names.heads(key, name, info)?)
                }
                (Architecture::Deepseek2, Some("attn_k_b.weight" | "attn_v_b.weight"))
                    if beside("attn_kv_b.weight").is_some() =>
                {
                    continue;
                }
                (Architecture::Deepseek2, Some("attn_k_b.weight")) => {
                    let Some(values) = beside("attn_v_b.weight") else {
                        let missing = name.replace("attn_k_b", "attn_v_b");
                        return Err(TensorError::Missing { name: missing, expected: Vec::new() }.into());
                    };
                    let (shape, of_keys) = joined_shape(name, &info.shape, &file[&values].shape)?;
                    let dtype = format!("{}, {}", info.dtype, file[&values].dtype);
                    let joined = checkpoint_name(&name.replace("attn_k_b", "attn_kv_b")).unwrap_or_default();
                    names.add(joined, TensorInfo { shape, dtype }, Origin::Joined(name.clone(), values, of_keys))?;
                    continue;
                }
                (Architecture::Deepseek2, Some("attn_v_b.weight")) if beside("attn_k_b.weight").is_some() => continue,
                _ => Origin::Whole(name.clone()),
            };
            names.add(checkpoint_name(name).unwrap_or_else(|| name.clone()), info.clone(), origin)?;
        }
        Ok(names)
    }

    fn add(&mut self, name: String, info: TensorInfo, origin: Origin) -> Result<()> {
        if self.tensors.insert(name.clone(), info).is_some() {
            return Err(Error::Data(DataError::Gguf(format!("two tensors are `{name}`"))));
        }
        self.origins.insert(name, origin);
        Ok(())
    }

    /// The number of heads of a tensor whose rows are moved within each.
    fn heads(&self, key: &str, name: &str, info: &TensorInfo) -> Result<usize> {
        let heads = super::config::integer(&self.gguf, &format!("llama.{key}"))?.unwrap_or(0) as usize;
        // Of each head's rows, pairs are made.
        match heads.checked_mul(2) {
            Some(pairs) if pairs > 0 && info.shape[0].is_multiple_of(pairs) => Ok(heads),
            _ => Err(Error::config(
                &format!("llama.{key}"),
                format!("is {heads}, but tensor `{name}` has shape {:?}: no even number of rows per head", info.shape),
            )),
        }
    }
}

/// The shape of `kv_b_proj`, from those of its parts; and that of the keys.
fn joined_shape(name: &str, keys: &[usize], values: &[usize]) -> Result<(Vec<usize>, [usize; 3])> {
    match (keys, values) {
        (&[heads, latent, nope], &[heads_of_values, value, latent_of_values])
            if heads == heads_of_values && latent == latent_of_values =>
        {
            // Sums and products of what the file holds.
            Ok((vec![heads * (nope + value), latent], [heads, latent, nope]))
        }
        _ => Err(Error::Data(DataError::Gguf(format!(
            "tensor `{name}` has shape {keys:?} and its `attn_v_b` {values:?}: they are not [heads, d_latent, d_nope] and \
             [heads, d_value, d_latent]"
        )))),
    }
}

impl Source for Names {
    fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn read(&self, name: &str) -> Result<Vec<f32>> {
        match self.origins.get(name) {
            None => Err(TensorError::Missing { name: name.to_owned(), expected: Vec::new() }.into()),
            Some(Origin::Whole(own)) => self.gguf.read(own),
            Some(Origin::Unturned(own, heads)) => {
                let values = self.gguf.read(own)?;
                let rows = self.gguf.tensors()[own].shape[0];
                let (half, width) = (rows / heads / 2, values.len() / rows);
                let row = |head: usize, i: usize, side: usize| ((head * half + i) * 2 + side) * width;
                let mut out = Vec::with_capacity(values.len());
                for (head, side) in (0..*heads).flat_map(|head| [(head, 0), (head, 1)]) {
                    (0..half).for_each(|i| out.extend_from_slice(&values[row(head, i, side)..][..width]));
                }
                Ok(out)
            }
            Some(&Origin::Joined(ref keys, ref rest, [heads, latent, nope])) => {
                let (keys, rest) = (self.gguf.read(keys)?, self.gguf.read(rest)?);
                let mut out = Vec::with_capacity(keys.len() + rest.len());
                for (keys, rest) in keys.chunks_exact(latent * nope).zip(rest.chunks_exact(rest.len() / heads)) {
                    (0..nope).for_each(|i| out.extend(keys.iter().skip(i).step_by(nope)));
                    out.extend_from_slice(rest);
                }
                Ok(out)
            }
        }
    }

    fn file(&self, _: &str) -> Option<&Path> {
        self.path.as_deref()
    }
}

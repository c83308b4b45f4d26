//! Sequences of hidden states in one file: the input of `egmla attend`.

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::config::AttentionConfig;
use crate::error::{ArgumentError, DataError, Error, Result};
use crate::files;

/// The tokens of all sequences, one sequence after another.
#[derive(Debug, PartialEq)]
pub struct Sequences {
    /// `[tokens, width]`
    pub hidden: Vec<f32>,
    /// The layer's `hidden_size`.
    pub width: usize,
    /// `[tokens]`, when the layer has a gate.
    pub token_ids: Option<Vec<u32>>,
    /// Tokens of each sequence; their sum is `tokens`.
    pub lengths: Vec<u32>,
}

impl Sequences {
    /// Takes the tensors `hidden_states`, `token_ids` and `sequence_lengths` from a safetensors file and checks them against the
    /// layer: hidden states in f32, f16 or bf16, integers in u32, i32 or i64, with a leading extent of 1 or without. NaN and
    /// infinities are kept, with a warning.
    ///
    /// # Errors
    /// `DataError::Safetensors` when the bytes are no safetensors file; `DataError::Input` or `ArgumentError::TokenId` for a
    /// tensor that is missing, not expected, or of another shape, type or range.
    pub fn from_safetensors(bytes: &[u8], config: &AttentionConfig) -> Result<Self> {
        let tensors = files::tensors(bytes)?;
        let mut names = tensors.names();
        names.sort();
        for name in names {
            if !["hidden_states", "token_ids", "sequence_lengths"].contains(&name) {
                return refused(format!(
                    "tensor `{name}` is not expected; the input holds hidden_states, token_ids and sequence_lengths"
                ));
            }
        }
        let width = config.hidden_size as usize;
        let hidden = tensors.tensor("hidden_states").map_err(|_| {
            Error::Data(DataError::Input(format!(
                "tensor `hidden_states` is missing (expected shape [tokens, {width}])"
            )))
        })?;
        let Some([tokens, found]) = without_batch(hidden.shape()) else {
            return refused(format!(
                "tensor `hidden_states` has shape {:?}, expected [tokens, {width}]",
                hidden.shape()
            ));
        };
        if found != width {
            return refused(format!(
                "tensor `hidden_states` has shape {:?}, expected [tokens, {width}]",
                hidden.shape()
            ));
        }
        if tokens == 0 {
            return refused("tensor `hidden_states` is empty: it holds 0 tokens".to_owned());
        }
        if tokens > i32::MAX as usize {
            return refused(format!("tensor `hidden_states` holds {tokens} tokens, at most {} can be run", i32::MAX));
        }
        let hidden = floats("hidden_states", &hidden)?;
        let non_finite = hidden.iter().filter(|value| !value.is_finite()).count();
        if non_finite > 0 {
            tracing::warn!("tensor `hidden_states` holds {non_finite} NaN or infinite values of {}", hidden.len());
        }
        Ok(Sequences {
            hidden,
            width,
            token_ids: token_ids(&tensors, config, tokens)?,
            lengths: sequence_lengths(&tensors, tokens)?,
        })
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.hidden.len() / self.width
    }
}

fn refused<T>(problem: String) -> Result<T> {
    Err(Error::Data(DataError::Input(problem)))
}

/// The ids, checked; `None` without a gate, their only user.
fn token_ids(tensors: &SafeTensors<'_>, config: &AttentionConfig, tokens: usize) -> Result<Option<Vec<u32>>> {
    let view = match (tensors.tensor("token_ids"), &config.gate) {
        (Err(_), None) => return Ok(None),
        (Err(_), Some(_)) => {
            return refused(format!("tensor `token_ids` is missing (expected shape [{tokens}]); the gate needs it"));
        }
        (Ok(view), _) => view,
    };
    if without_batch(view.shape()) != Some([tokens]) {
        return refused(format!("tensor `token_ids` has shape {:?}, expected [{tokens}]", view.shape()));
    }
    let ids = integers("token_ids", &view)?;
    let vocab_size = config.gate.as_ref().map(|gate| gate.vocab_size);
    let mut checked = Vec::with_capacity(ids.len());
    for (index, &id) in ids.iter().enumerate() {
        let within = u32::try_from(id).ok().filter(|&id| vocab_size.is_none_or(|size| id < size));
        match (within, vocab_size) {
            (Some(id), _) => checked.push(id),
            (None, Some(size)) if id >= 0 => {
                return Err(Error::Argument(ArgumentError::TokenId { index, id: id.unsigned_abs(), vocab_size: size }));
            }
            (None, size) => {
                let most = size.unwrap_or(u32::MAX) - u32::from(size.is_some());
                return refused(format!("token id {id} at position {index} is not between 0 and {most}"));
            }
        }
    }
    Ok(config.gate.is_some().then_some(checked))
}

fn sequence_lengths(tensors: &SafeTensors<'_>, tokens: usize) -> Result<Vec<u32>> {
    let Ok(view) = tensors.tensor("sequence_lengths") else { return Ok(vec![tokens as u32]) };
    if view.shape().len() != 1 {
        return refused(format!("tensor `sequence_lengths` has shape {:?}, expected [batch]", view.shape()));
    }
    let lengths = integers("sequence_lengths", &view)?;
    let mut sum = 0u64;
    let mut checked = Vec::with_capacity(lengths.len());
    for (index, &length) in lengths.iter().enumerate() {
        let length = u32::try_from(length).map_err(|_| {
            Error::Data(DataError::Input(format!(
                "`sequence_lengths` [{index}] is {length}, must be between 0 and {}",
                u32::MAX
            )))
        })?;
        sum += u64::from(length);
        checked.push(length);
    }
    if sum != tokens as u64 {
        return refused(format!("`sequence_lengths` add up to {sum}, but `hidden_states` holds {tokens} tokens"));
    }
    Ok(checked)
}

/// A shape of some extents, which may have the leading 1 of a batch of one, as torch writes it.
fn without_batch<const N: usize>(shape: &[usize]) -> Option<[usize; N]> {
    match shape {
        [1, rest @ ..] if rest.len() == N => rest.try_into().ok(),
        _ => shape.try_into().ok(),
    }
}

/// Elements of an f32, f16 or bf16 tensor.
fn floats(name: &str, view: &TensorView<'_>) -> Result<Vec<f32>> {
    let data = view.data();
    match view.dtype() {
        Dtype::F32 => Ok(data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
        Dtype::F16 => Ok(data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
        Dtype::BF16 => Ok(data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
        other => refused(format!("tensor `{name}` has element type {other:?}, expected F32, F16 or BF16")),
    }
}

/// Elements of a u32, i32 or i64 tensor.
fn integers(name: &str, view: &TensorView<'_>) -> Result<Vec<i64>> {
    let data = view.data();
    match view.dtype() {
        Dtype::U32 => Ok(data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()).collect()),
        Dtype::I32 => Ok(data.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]).into()).collect()),
        Dtype::I64 => Ok(data
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
            .collect()),
        other => refused(format!("tensor `{name}` has element type {other:?}, expected U32, I32 or I64")),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::{AttentionConfig, Sequences};

    fn config(gate: &str) -> AttentionConfig {
        let text = format!(
            r#"{{"hidden_size":2,"num_attention_heads":1,"kv_lora_rank":1,"qk_nope_head_dim":1,"qk_rope_head_dim":0,
                "v_head_dim":1,"embedding_gate":{gate}}}"#
        );
        AttentionConfig::from_json(&text).unwrap()
    }

    fn gated() -> AttentionConfig {
        config(r#"{"vocab_size":4,"embed_dim":1}"#)
    }

    fn bytes<const N: usize, T: Copy>(values: &[T], to: impl Fn(T) -> [u8; N]) -> Vec<u8> {
        values.iter().flat_map(|&value| to(value)).collect()
    }

    /// A file of the named tensors.
    fn file(tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> Vec<u8> {
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, data)| (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
        safetensors::serialize(views, None).unwrap()
    }

    fn hidden(tokens: usize) -> (&'static str, Dtype, Vec<usize>, Vec<u8>) {
        ("hidden_states", Dtype::F32, vec![tokens, 2], bytes(&vec![0.5f32; tokens * 2], f32::to_le_bytes))
    }

    fn read(bytes: &[u8], config: &AttentionConfig) -> Result<Sequences, String> {
        Sequences::from_safetensors(bytes, config).map_err(|error| error.to_string())
    }

    fn parse(
        config: &AttentionConfig,
        tokens: usize,
        more: &[(&str, Dtype, &[usize], Vec<u8>)],
    ) -> Result<Sequences, String> {
        let (name, dtype, shape, data) = hidden(tokens);
        let mut tensors = vec![(name, dtype, shape.as_slice(), data)];
        tensors.extend(more.iter().cloned());
        read(&file(&tensors), config)
    }

    fn i64s(values: &[i64]) -> Vec<u8> {
        bytes(values, i64::to_le_bytes)
    }

    fn u32s(values: &[u32]) -> Vec<u8> {
        bytes(values, u32::to_le_bytes)
    }

    #[test]
    fn ids_and_lengths_are_read_as_u32_or_i64() {
        let expected =
            Sequences { hidden: vec![0.5; 6], width: 2, token_ids: Some(vec![3, 0, 1]), lengths: vec![2, 0, 1] };
        let wide = parse(
            &gated(),
            3,
            &[
                ("token_ids", Dtype::I64, &[3], i64s(&[3, 0, 1])),
                ("sequence_lengths", Dtype::I64, &[3], i64s(&[2, 0, 1])),
            ],
        );
        assert_eq!(wide.as_ref(), Ok(&expected));
        let narrow = parse(
            &gated(),
            3,
            &[
                ("token_ids", Dtype::U32, &[3], u32s(&[3, 0, 1])),
                ("sequence_lengths", Dtype::U32, &[3], u32s(&[2, 0, 1])),
            ],
        );
        assert_eq!(narrow.as_ref(), Ok(&expected));
        assert_eq!(expected.tokens(), 3);
    }

    #[test]
    fn what_torch_writes_is_read() {
        let expected = Sequences { hidden: vec![0.5; 4], width: 2, token_ids: Some(vec![3, 1]), lengths: vec![2] };
        let ids = || bytes(&[3i32, 1], i32::to_le_bytes);
        let half = |to: fn(f32) -> [u8; 2]| bytes(&[0.5f32; 4], to);
        let f16 = half(|value| half::f16::from_f32(value).to_le_bytes());
        let bf16 = half(|value| half::bf16::from_f32(value).to_le_bytes());
        for (dtype, data) in [(Dtype::F16, f16), (Dtype::BF16, bf16)] {
            let whole = file(&[("hidden_states", dtype, &[1, 2, 2], data), ("token_ids", Dtype::I32, &[1, 2], ids())]);
            assert_eq!(read(&whole, &gated()).as_ref(), Ok(&expected), "{dtype:?}");
        }
        // One token is no batch, and a batch of two is none of one.
        assert_eq!(parse(&config("null"), 1, &[]).unwrap().tokens(), 1);
        let of = |shape: &[usize], count| {
            let data = bytes(&vec![0f32; count], f32::to_le_bytes);
            read(&file(&[("hidden_states", Dtype::F32, shape, data)]), &config("null"))
        };
        assert!(of(&[2, 1, 2], 4).unwrap_err().contains("has shape [2, 1, 2], expected [tokens, 2]"));
        assert!(of(&[1, 1, 1, 2], 2).unwrap_err().contains("expected [tokens, 2]"));
    }

    #[test]
    fn without_a_gate_ids_are_not_needed_and_not_kept() {
        let plain = config("null");
        assert_eq!(parse(&plain, 2, &[]).unwrap().token_ids, None);
        let given = parse(&plain, 2, &[("token_ids", Dtype::U32, &[2], u32s(&[7, 9]))]);
        assert_eq!(given.unwrap().token_ids, None);
    }

    #[test]
    fn what_does_not_fit_is_named_with_its_numbers() {
        let ids = |values: &[i64]| vec![("token_ids", Dtype::I64, [values.len()], i64s(values))];
        let refused = |values: &[i64]| {
            let tensors = ids(values);
            let (name, dtype, shape, data) = &tensors[0];
            parse(&gated(), 2, &[(*name, *dtype, shape, data.clone())]).unwrap_err()
        };
        assert_eq!(refused(&[1, 4]), "token id 4 at position 1 is outside of the vocabulary of 4");
        assert_eq!(refused(&[1, 1 << 40]), "token id 1099511627776 at position 1 is outside of the vocabulary of 4");
        assert_eq!(refused(&[-3, 0]), "token id -3 at position 0 is not between 0 and 3");
        assert_eq!(refused(&[0, 1, 2]), "tensor `token_ids` has shape [3], expected [2]");
        assert!(parse(&gated(), 2, &[]).unwrap_err().starts_with("tensor `token_ids` is missing (expected shape [2])"));
        let float = ("token_ids", Dtype::F32, &[2][..], bytes(&[0f32; 2], f32::to_le_bytes));
        assert!(parse(&gated(), 2, &[float]).unwrap_err().contains("has element type F32, expected U32, I32 or I64"));

        let plain = config("null");
        let lengths = |values: &[i64]| {
            let shape = [values.len()];
            parse(&plain, 2, &[("sequence_lengths", Dtype::I64, &shape, i64s(values))]).unwrap_err()
        };
        assert_eq!(lengths(&[1, 2]), "`sequence_lengths` add up to 3, but `hidden_states` holds 2 tokens");
        assert_eq!(lengths(&[]), "`sequence_lengths` add up to 0, but `hidden_states` holds 2 tokens");
        assert!(lengths(&[3, -1]).starts_with("`sequence_lengths` [1] is -1, must be"), "{}", lengths(&[3, -1]));
        let square = ("sequence_lengths", Dtype::U32, &[1, 1][..], u32s(&[2]));
        assert!(parse(&plain, 2, &[square]).unwrap_err().contains("has shape [1, 1], expected [batch]"));

        assert!(parse(&plain, 0, &[]).unwrap_err().contains("holds 0 tokens"));
        let extra = ("attention_mask", Dtype::U32, &[1][..], u32s(&[1]));
        assert!(parse(&plain, 2, &[extra]).unwrap_err().starts_with("tensor `attention_mask` is not expected"));
        let of = |dtype, shape: &[usize], data| read(&file(&[("hidden_states", dtype, shape, data)]), &plain);
        assert_eq!(
            of(Dtype::F32, &[1, 3], bytes(&[0f32; 3], f32::to_le_bytes)).unwrap_err(),
            "tensor `hidden_states` has shape [1, 3], expected [tokens, 2]"
        );
        assert_eq!(
            of(Dtype::F32, &[2], bytes(&[0f32; 2], f32::to_le_bytes)).unwrap_err(),
            "tensor `hidden_states` has shape [2], expected [tokens, 2]"
        );
        assert_eq!(
            of(Dtype::F64, &[1, 2], bytes(&[0f64; 2], f64::to_le_bytes)).unwrap_err(),
            "tensor `hidden_states` has element type F64, expected F32, F16 or BF16"
        );
        let missing = read(&file(&[]), &plain).unwrap_err();
        assert_eq!(missing, "tensor `hidden_states` is missing (expected shape [tokens, 2])");
        let (name, dtype, shape, data) = hidden(2);
        let whole = file(&[(name, dtype, &shape, data)]);
        assert!(read(&whole[..whole.len() - 1], &plain).unwrap_err().starts_with("not a valid safetensors"));
    }
}

//! The metadata of a GGUF file as the text of a `config.json`, for the one reader of configurations.

use serde_json::{Map, Number, Value as Json, json};

use super::container::{Gguf, List, Value};
use crate::error::{DataError, Error, Result};

/// The tensor that holds a divisor of each pair's frequency, as `llama3` scaling gives them.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Models whose tensors and configuration are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
    Deepseek2,
}

impl Architecture {
    /// # Errors
    /// [`Error::Config`] for another one, [`Error::Unsupported`] for a part of a split file.
    pub(super) fn of(gguf: &Gguf) -> Result<Self> {
        if let Some(count @ 2..) = integer(gguf, "split.count")? {
            let number = integer(gguf, "split.no")?.unwrap_or(0);
            return Err(Error::Unsupported {
                what: format!("a part of a file, number {} of {count},", u64::from(number) + 1),
                instead: "join the parts first, with `llama-gguf-split --merge`",
            });
        }
        match text(gguf, "general.architecture")? {
            Some("llama") => Ok(Architecture::Llama),
            Some("qwen2") => Ok(Architecture::Qwen2),
            Some("qwen3") => Ok(Architecture::Qwen3),
            Some("deepseek2") => Ok(Architecture::Deepseek2),
            Some(other) => {
                let problem = format!("`{other}` is not read, only llama, qwen2, qwen3 and deepseek2");
                Err(Error::config("general.architecture", problem))
            }
            None => Err(Error::config("general.architecture", "is missing")),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Deepseek2 => "deepseek2",
        }
    }
}

fn wrong(key: &str, expected: &str, value: &Value) -> Error {
    let shown = match value {
        Value::List(_) => "a list".to_owned(),
        Value::Text(text) => format!("the text `{}`", text.chars().take(80).collect::<String>()),
        Value::Unsigned(value) => value.to_string(),
        Value::Signed(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::Bool(value) => value.to_string(),
    };
    Error::config(key, format!("is {shown}, not {expected}"))
}

/// A whole number, or a list of the same one for every layer.
pub(super) fn integer(gguf: &Gguf, key: &str) -> Result<Option<u32>> {
    let Some(value) = gguf.metadata().get(key) else { return Ok(None) };
    let whole = match value {
        Value::Unsigned(value) => Some(*value),
        Value::Signed(value) => u64::try_from(*value).ok(),
        Value::List(List::Unsigned(list)) if list.iter().all(|it| *it == list[0]) => list.first().copied(),
        Value::List(List::Signed(list)) if list.iter().all(|it| *it == list[0]) => {
            list.first().and_then(|&it| u64::try_from(it).ok())
        }
        Value::List(List::Unsigned(_) | List::Signed(_)) => {
            return Err(Error::config(key, "differs from layer to layer, which is not computed"));
        }
        _ => None,
    };
    let whole = whole.and_then(|value| u32::try_from(value).ok());
    whole.map(Some).ok_or_else(|| wrong(key, "a whole number below 2^32", value))
}

pub(super) fn number(gguf: &Gguf, key: &str) -> Result<Option<f64>> {
    match gguf.metadata().get(key) {
        None => Ok(None),
        Some(Value::Number(value)) if value.is_finite() => Ok(Some(*value)),
        Some(Value::Unsigned(value)) => Ok(Some(*value as f64)),
        Some(Value::Signed(value)) => Ok(Some(*value as f64)),
        Some(value) => Err(wrong(key, "a finite number", value)),
    }
}

#[cfg(feature = "decoder")]
pub(super) fn boolean(gguf: &Gguf, key: &str) -> Result<Option<bool>> {
    match gguf.metadata().get(key) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(value) => Err(wrong(key, "true or false", value)),
    }
}

pub(super) fn text<'a>(gguf: &'a Gguf, key: &str) -> Result<Option<&'a str>> {
    match gguf.metadata().get(key) {
        None => Ok(None),
        Some(Value::Text(value)) => Ok(Some(value)),
        Some(value) => Err(wrong(key, "a text", value)),
    }
}

/// Keys under the architecture's name, read one by one.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'static str,
    /// Those that were asked for.
    known: Vec<&'static str>,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn integer(&mut self, key: &'static str) -> Result<Option<u32>> {
        self.known.push(key);
        integer(self.gguf, &self.full(key))
    }

    fn required(&mut self, key: &'static str) -> Result<u32> {
        self.integer(key)?.ok_or_else(|| Error::config(&self.full(key), "is missing"))
    }

    fn number(&mut self, key: &'static str) -> Result<Option<f64>> {
        self.known.push(key);
        number(self.gguf, &self.full(key))
    }
}

/// The text of a `config.json`. A key of the architecture's that has no place in one stands there under its own name, where the
/// reader passes over it or refuses it.
///
/// # Errors
/// [`Error::Config`] with the file's key for a value that is missing or of another type; as [`Architecture::of`].
pub(super) fn config_json(gguf: &Gguf) -> Result<String> {
    let architecture = Architecture::of(gguf)?;
    let mut keys = Keys { gguf, architecture: architecture.name(), known: vec!["rope.scaling.finetuned"] };
    let keys = &mut keys;
    let mut config = Map::new();
    let mut set = |key: &str, value: Json| config.insert(key.to_owned(), value);

    let hidden = keys.required("embedding_length")?;
    let heads = keys.required("attention.head_count")?;
    let mut layers = keys.required("block_count")?;
    // Layers that predict tokens beyond the next one are counted in the file, not in a checkpoint.
    if let Some(beyond) = keys.integer("nextn_predict_layers")?.filter(|&beyond| beyond > 0) {
        layers = layers.checked_sub(beyond).ok_or_else(|| {
            Error::config(&keys.full("nextn_predict_layers"), format!("is {beyond}, but block_count is {layers}"))
        })?;
        set("num_nextn_predict_layers", beyond.into());
    }
    set("hidden_size", hidden.into());
    set("num_attention_heads", heads.into());
    set("num_hidden_layers", layers.into());
    set("hidden_act", "silu".into());
    for (key, name) in [("feed_forward_length", "intermediate_size"), ("context_length", "max_position_embeddings")] {
        if let Some(value) = keys.integer(key)? {
            set(name, value.into());
        }
    }
    let tokens = match gguf.metadata().get("tokenizer.ggml.tokens") {
        Some(Value::List(List::Texts(tokens))) => u32::try_from(tokens.len()).ok(),
        _ => None,
    };
    if let Some(vocab) = keys.integer("vocab_size")?.or(tokens) {
        set("vocab_size", vocab.into());
    }
    let eps = keys.number("attention.layer_norm_rms_epsilon")?;
    let missing = || Error::config(&keys.full("attention.layer_norm_rms_epsilon"), "is missing");
    set("rms_norm_eps", eps.ok_or_else(missing)?.into());
    set("tie_word_embeddings", (!gguf.tensors().contains_key("output.weight")).into());
    let biased = |part: &str| {
        gguf.tensors()
            .keys()
            .any(|name| name.strip_prefix("blk.").is_some_and(|it| it.contains(part) && it.ends_with(".bias")))
    };
    // The biases of qwen2 need no key.
    if architecture != Architecture::Qwen2 {
        set("attention_bias", biased(".attn_").into());
    }
    set("mlp_bias", biased(".ffn_").into());

    let key_length = keys.integer("attention.key_length")?;
    let value_length = keys.integer("attention.value_length")?;
    let turned = keys.integer("rope.dimension_count")?;
    let kv_heads = keys.integer("attention.head_count_kv")?;
    let d_rope = match architecture {
        Architecture::Llama | Architecture::Qwen2 | Architecture::Qwen3 => {
            let width = match key_length {
                Some(width) => width,
                None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
                None => {
                    let problem = format!("is {heads}, no divisor of embedding_length, {hidden}");
                    return Err(Error::config(&keys.full("attention.head_count"), problem));
                }
            };
            set("model_type", architecture.name().into());
            set("head_dim", width.into());
            set("num_key_value_heads", kv_heads.unwrap_or(heads).into());
            if let Some(other) = value_length.filter(|&other| other != width) {
                let problem = format!("is {other}, but the width of a head's queries is {width}");
                return Err(Error::config(&keys.full("attention.value_length"), problem));
            }
            if let Some(turned) = turned.filter(|&turned| turned != width) {
                set("partial_rotary_factor", (f64::from(turned) / f64::from(width)).into());
            }
            width
        }
        Architecture::Deepseek2 => {
            // In newer files `key_length` is the width of what is cached.
            let width = match keys.integer("attention.key_length_mla")?.or(key_length) {
                Some(width) => width,
                None => return Err(Error::config("deepseek2.attention.key_length_mla", "is missing")),
            };
            let d_rope = keys.required("rope.dimension_count")?;
            let Some(d_nope) = width.checked_sub(d_rope) else {
                let problem = format!("is {width}, below the rotary part of {d_rope}");
                return Err(Error::config("deepseek2.attention.key_length_mla", problem));
            };
            // What is computed is the same; the routers differ.
            let sigmoid = keys.integer("expert_gating_func")? == Some(2);
            set("model_type", if sigmoid { "deepseek_v3" } else { "deepseek_v2" }.into());
            set("kv_lora_rank", keys.required("attention.kv_lora_rank")?.into());
            set("q_lora_rank", keys.integer("attention.q_lora_rank")?.filter(|&rank| rank > 0).into());
            set("qk_nope_head_dim", d_nope.into());
            set("qk_rope_head_dim", d_rope.into());
            if let Some(width) = keys.integer("attention.value_length_mla")?.or(value_length) {
                set("v_head_dim", width.into());
            }
            d_rope
        }
    };
    if let Some(experts) = keys.integer("expert_count")?.filter(|&experts| experts > 0) {
        let latents = architecture == Architecture::Deepseek2;
        set(if latents { "n_routed_experts" } else { "num_local_experts" }, experts.into());
    }
    if let Some(dense) = keys.integer("leading_dense_block_count")? {
        set("first_k_dense_replace", dense.into());
    }
    if let Some(window) = keys.integer("attention.sliding_window")? {
        set("sliding_window", window.into());
    }
    if let Some(theta) = keys.number("rope.freq_base")? {
        set("rope_theta", theta.into());
    }
    if let Some(scaling) = scaling(keys, architecture, d_rope)? {
        set("rope_scaling", scaling);
    }

    // What remains. Attention that is causal and the origin of the file's weights change nothing.
    let prefix = format!("{}.", architecture.name());
    for (key, value) in gguf.metadata() {
        let Some(own) = key.strip_prefix(&prefix) else { continue };
        let harmless = matches!((own, value), ("attention.causal", Value::Bool(true)) | ("tensor_data_layout", _));
        if !harmless && !keys.known.contains(&own) {
            config.insert(key.clone(), plain(value));
        }
    }
    Ok(Json::Object(config).to_string())
}

/// The `rope_scaling` of a checkpoint.
fn scaling(keys: &mut Keys<'_>, architecture: Architecture, d_rope: u32) -> Result<Option<Json>> {
    let key = keys.full("rope.scaling.type");
    keys.known.push("rope.scaling.type");
    let kind = text(keys.gguf, &key)?;
    // Files write 0 or 1 for none.
    let some = |factor: Option<f64>| factor.filter(|&factor| factor != 0.0 && factor != 1.0);
    let factor = some(keys.number("rope.scaling.factor")?).or(some(keys.number("rope.scale_linear")?));
    // Read where scaling is yarn; with another the reader is to refuse them.
    let of_yarn = keys.known.len();
    let original = keys.integer("rope.scaling.original_context_length")?;
    let fast = keys.number("rope.scaling.yarn_beta_fast")?;
    let slow = keys.number("rope.scaling.yarn_beta_slow")?;
    let attention = keys.number("rope.scaling.yarn_attn_factor")?;
    let log = keys.number("rope.scaling.yarn_log_multiplier")?;
    if let Some(extrapolation) = keys.number("rope.scaling.yarn_ext_factor")?.filter(|&it| it != 1.0) {
        let problem = format!("is {extrapolation}, only 1 is computed");
        return Err(Error::config(&keys.full("rope.scaling.yarn_ext_factor"), problem));
    }
    if let Some(other) = some(keys.number("rope.scaling.attn_factor")?) {
        return Err(Error::config(&keys.full("rope.scaling.attn_factor"), format!("is {other}, only 1 is computed")));
    }
    if keys.gguf.tensors().contains_key(ROPE_FACTORS) {
        let factors = keys.gguf.read(ROPE_FACTORS)?;
        if factors.len() as u64 != u64::from(d_rope) / 2 {
            let problem = format!("tensor `{ROPE_FACTORS}` has {} elements, must have {}", factors.len(), d_rope / 2);
            return Err(Error::Data(DataError::Gguf(problem)));
        }
        if kind.is_some_and(|kind| kind != "none") || factor.is_some() {
            return Err(Error::config(&key, format!("is there beside tensor `{ROPE_FACTORS}`, which scales, too")));
        }
        // The scaling that divides each frequency by a number of its own, whatever the length of a context.
        return Ok(Some(json!({
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0, "factor": 1.0,
            "original_max_position_embeddings": keys.integer("context_length")?,
        })));
    }
    match (kind, factor) {
        (None | Some("none" | "linear"), None) => {}
        (Some("none"), Some(factor)) => {
            let problem = format!("is {factor}, but rope.scaling.type is none");
            return Err(Error::config(&keys.full("rope.scaling.factor"), problem));
        }
        (None | Some("linear"), Some(factor)) => return Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
        (Some("yarn"), factor) => {
            let mut yarn = Map::new();
            yarn.insert("rope_type".to_owned(), "yarn".into());
            yarn.insert("factor".to_owned(), factor.unwrap_or(1.0).into());
            yarn.insert("original_max_position_embeddings".to_owned(), original.into());
            // A deepseek2 file holds a tenth of `mscale_all_dim`, and its `mscale` is the same.
            let mscale = log.filter(|_| architecture == Architecture::Deepseek2).map(|log| log * 10.0);
            for (name, value) in [
                ("beta_fast", fast),
                ("beta_slow", slow),
                ("attention_factor", attention),
                ("mscale", mscale),
                ("mscale_all_dim", mscale),
            ] {
                if let Some(value) = value {
                    yarn.insert(name.to_owned(), value.into());
                }
            }
            if architecture != Architecture::Deepseek2 {
                keys.known.retain(|&key| key != "rope.scaling.yarn_log_multiplier");
            }
            return Ok(Some(Json::Object(yarn)));
        }
        (Some(other), _) => {
            return Err(Error::config(&key, format!("`{other}` is not read, only none, linear and yarn")));
        }
    }
    // Without scaling the length that was trained at says nothing; the other keys do.
    let unread: Vec<_> = keys.known.drain(of_yarn..).collect();
    keys.known.extend(unread.into_iter().filter(|key| !key.contains("yarn_")));
    Ok(None)
}

/// A value as JSON has it; of a list that it is there.
fn plain(value: &Value) -> Json {
    match value {
        Value::Unsigned(value) => (*value).into(),
        Value::Signed(value) => (*value).into(),
        Value::Number(value) => Number::from_f64(*value).map_or_else(|| value.to_string().into(), Json::Number),
        Value::Bool(value) => (*value).into(),
        Value::Text(value) => value.as_str().into(),
        Value::List(_) => "a list".into(),
    }
}

//! Where the layers of a checkpoint are: the names that its tensors have before those of a layer.

use std::collections::{BTreeMap, BTreeSet};

use super::Checkpoint;
use crate::error::{DataError, Error, Result};

/// The tensor that every layer of latent attention has, and no other.
const MARK: &str = "kv_a_proj_with_mqa.";

/// One attention of a checkpoint: `3`, or `3.1` for the second of the two that a layer of LongCat-Flash has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerNumber {
    /// The layer.
    pub layer: u32,
    /// Which attention of the layer, where it has several.
    pub part: Option<u32>,
}

impl std::str::FromStr for LayerNumber {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
        let (layer, part) = text.split_once('.').map_or((text, None), |(layer, part)| (layer, Some(part)));
        match (number(layer), part.map(number)) {
            (Some(layer), None) => Ok(LayerNumber { layer, part: None }),
            (Some(layer), Some(Some(part))) => Ok(LayerNumber { layer, part: Some(part) }),
            _ => {
                Err("expected a layer's number, as 3, or 3.1 for the second attention of a layer that has two"
                    .to_owned())
            }
        }
    }
}

/// `…layers.`, the number of the layer, and what follows.
fn split(name: &str) -> Option<(&str, u32, &str)> {
    name.match_indices("layers.").find_map(|(at, found)| {
        let (stem, rest) = name.split_at(at + found.len());
        let whole = at == 0 || name[..at].ends_with('.');
        let (number, rest) = rest.split_once('.')?;
        (whole && number.bytes().all(|b| b.is_ascii_digit())).then_some((stem, number.parse().ok()?, rest))
    })
}

impl Checkpoint<'_> {
    /// Names up to the tensors of each latent attention, `model.layers.0.self_attn.` for instance.
    fn attentions(&self) -> BTreeSet<&str> {
        self.tensors().keys().filter_map(|name| Some(&name[..name.rfind(MARK)?])).collect()
    }

    /// The prefix of one layer's attention.
    ///
    /// # Errors
    /// `DataError::Layer`: there is no such layer, it has another attention, or several.
    pub fn attention_prefix(&self, number: LayerNumber) -> Result<String> {
        let LayerNumber { layer, part } = number;
        // By layer, the prefixes of its attentions.
        let mut layers: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
        for name in self.tensors().keys() {
            if let Some((_, layer, _)) = split(name) {
                layers.entry(layer).or_default();
            }
        }
        for prefix in self.attentions() {
            if let Some((_, layer, _)) = split(prefix) {
                layers.entry(layer).or_default().push(prefix);
            }
        }
        let Some(found) = layers.get(&layer) else {
            return self.no_layer(match layers.last_key_value() {
                None => "there are no layers: no tensor is named layers.N".to_owned(),
                Some((last, _)) if layers.len() as u64 == u64::from(*last) + 1 => {
                    format!("there is no layer {layer}: there are {}, from 0 to {last}", layers.len())
                }
                Some((last, _)) => format!("there is no layer {layer}: there are {}, the last {last}", layers.len()),
            });
        };
        let parts: Vec<_> = found
            .iter()
            .copied()
            .filter(|prefix| part.is_none_or(|part| prefix.ends_with(&format!(".{part}."))))
            .collect();
        match (&parts[..], &found[..]) {
            ([prefix], _) => Ok((*prefix).to_owned()),
            (_, []) => {
                let with: Vec<_> = layers.iter().filter(|(_, found)| !found.is_empty()).map(|(n, _)| n).collect();
                let stem = self.tensors().keys().find(|name| split(name).is_some_and(|(_, n, _)| n == layer));
                let stem = stem.map_or("", String::as_str);
                self.no_layer(match &with[..] {
                    [] => format!("no layer has multi-head latent attention: none has {MARK}weight"),
                    [first, ..] => format!(
                        "layer {layer} has no multi-head latent attention (no {MARK}weight beside `{stem}`); {} of {} layers \
                         have it, the first of them layer {first}",
                        with.len(),
                        layers.len()
                    ),
                })
            }
            ([], _) => {
                self.no_layer(format!("layer {layer} has no attention {}: it has {}", part.unwrap_or(0), quoted(found)))
            }
            _ => self.no_layer(format!(
                "layer {layer} has {} attentions, {}: name one, as {layer}.0",
                parts.len(),
                quoted(&parts)
            )),
        }
    }

    /// The prefix of the only latent attention; empty where tensors have none, or there is none at all.
    ///
    /// # Errors
    /// `DataError::Layer` where there are several.
    pub fn only_attention_prefix(&self) -> Result<String> {
        let found: Vec<_> = self.attentions().into_iter().collect();
        match &found[..] {
            [] => Ok(String::new()),
            [prefix] => Ok((*prefix).to_owned()),
            [first, .., last] => self.no_layer(format!(
                "there are {} layers of attention, from `{first}` to `{last}`: name one, by its folder (--model) and number \
                 (--layer)",
                found.len()
            )),
        }
    }

    /// The name of the token embedding of a model, by the prefix of one of its attentions: `model.embed_tokens.weight` for
    /// `model.layers.0.self_attn.`. Where the prefix has no layer's number, the only one.
    ///
    /// # Errors
    /// `DataError::Layer`: there is none, or there are several.
    pub(crate) fn token_embedding(&self, prefix: &str) -> Result<String> {
        const NAME: &str = "embed_tokens.weight";
        if let Some((stem, ..)) = split(prefix) {
            let stem = stem.strip_suffix("layers.").unwrap_or(stem);
            let name = format!("{stem}{NAME}");
            if self.contains(&name) {
                return Ok(name);
            }
            return self.no_layer(format!("the gate is tied to the token embedding, and `{name}` is not there"));
        }
        let whole = |name: &&String| name.strip_suffix(NAME).is_some_and(|stem| stem.is_empty() || stem.ends_with('.'));
        let found: Vec<_> = self.tensors().keys().filter(whole).collect();
        match &found[..] {
            [name] => Ok((*name).clone()),
            [] => self.no_layer(format!(
                "the gate is tied to the token embedding, and no tensor is named {NAME}: name the model's folder (--model) and \
                 a layer (--layer), or put the embedding beside the layer's weights"
            )),
            [first, .., last] => self.no_layer(format!(
                "the gate is tied to the token embedding, and there are {}, from `{first}` to `{last}`",
                found.len()
            )),
        }
    }

    /// Layers from `n_layer` on that predict further tokens: they join the embedding of the next token to the stream by
    /// `eh_proj`, which no other layer has.
    #[cfg(feature = "decoder")]
    pub(crate) fn prediction_layers(&self, n_layer: u32) -> BTreeSet<u32> {
        let layers = self.tensors().keys().filter_map(|name| split(name));
        layers.filter(|(_, layer, rest)| *layer >= n_layer && rest.starts_with("eh_proj.")).map(|it| it.1).collect()
    }

    fn no_layer<T>(&self, problem: String) -> Result<T> {
        Err(self.in_file("", Error::Data(DataError::Layer(problem))))
    }
}

/// The layer that a tensor belongs to.
#[cfg(feature = "decoder")]
pub(crate) fn layer_of(name: &str) -> Option<u32> {
    split(name).map(|(_, layer, _)| layer)
}

fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests {
    use super::{LayerNumber, split};

    #[test]
    fn numbers_are_found_in_names() {
        assert_eq!(split("model.layers.12.mlp.x"), Some(("model.layers.", 12, "mlp.x")));
        assert_eq!(split("layers.0.a"), Some(("layers.", 0, "a")));
        assert_eq!(
            split("language_model.model.layers.3.self_attn.1."),
            Some(("language_model.model.layers.", 3, "self_attn.1."))
        );
        for name in
            ["model.norm.weight", "model.layers.x.a", "players.3.a", "layers.4294967296.a", "layers.3", "layers..a"]
        {
            assert_eq!(split(name), None, "{name}");
        }
        assert_eq!("3".parse(), Ok(LayerNumber { layer: 3, part: None }));
        assert_eq!("3.1".parse(), Ok(LayerNumber { layer: 3, part: Some(1) }));
        for text in ["", "x", "-1", "+1", "3.", ".1", "3.1.2", "4294967296", "1e1"] {
            assert!(text.parse::<LayerNumber>().is_err(), "{text}");
        }
    }
}

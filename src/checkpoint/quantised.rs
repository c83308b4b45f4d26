//! Quantised weights that are not read, told by the tensors that they come with.

use std::collections::BTreeMap;

use super::TensorInfo;
use crate::error::TensorError;

/// What stands for a tensor, where that is a form that is not read.
pub(super) fn problem(tensors: &BTreeMap<String, TensorInfo>, name: &str) -> Option<TensorError> {
    let module = name.strip_suffix(".weight")?;
    let has = |end: &str| Some(format!("{module}.{end}")).filter(|name| tensors.contains_key(name));
    // bitsandbytes puts its own behind the weight's name, too: `.weight.quant_state.bitsandbytes__nf4`.
    let behind = format!("{name}.");
    let below = || tensors.range(behind.clone()..).next().filter(|(found, _)| found.starts_with(&behind));
    let bits = || has("SCB").or_else(|| below().map(|(found, _)| found.clone()));
    let (found, method) = if let Some(found) = has("g_idx") {
        (found, "GPTQ")
    } else if let Some(found) = has("qweight") {
        // GPTQ without an order of activations has the same names, and packs rows in place of columns.
        (found, "AWQ, or GPTQ without g_idx")
    } else if let Some(found) = has("weight_packed").or_else(|| has("weight_scale")) {
        (found, "compressed-tensors or a program like it")
    } else {
        (bits()?, "bitsandbytes")
    };
    Some(TensorError::Quantised { name: name.to_owned(), found, method })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::{TensorInfo, problem};

    #[test]
    fn forms_are_named_by_their_tensors() {
        let found = |names: &[&str]| {
            let info = TensorInfo { shape: vec![1], dtype: "I32".to_owned() };
            let tensors = names.iter().map(|name| (format!("a.proj.{name}"), info.clone())).collect();
            problem(&tensors, "a.proj.weight").map(|problem| problem.to_string())
        };
        for (names, parts) in [
            (&["qweight", "qzeros", "scales"][..], ["`a.proj.qweight`", "AWQ"]),
            (&["g_idx", "qweight", "qzeros", "scales"], ["`a.proj.g_idx`", "GPTQ"]),
            (&["weight_packed", "weight_scale", "weight_shape"], ["`a.proj.weight_packed`", "compressed-tensors"]),
            (&["weight", "weight_scale"], ["`a.proj.weight_scale`", "compressed-tensors"]),
            (&["weight", "weight.absmax", "weight.quant_map"], ["`a.proj.weight.absmax`", "bitsandbytes"]),
            (&["weight", "SCB"], ["`a.proj.SCB`", "bitsandbytes"]),
        ] {
            let message = found(names).unwrap();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
        for names in [&["weight"][..], &["weight", "bias"], &["weight", "weight_scale_inv"], &["weights.x"], &[]] {
            assert_eq!(found(names), None, "{names:?}");
        }
    }
}

//! `quantization_config`: how a checkpoint's weights are written.

use serde_json::{Map, Value};

use super::keys::{Keys, parse_object};
use super::of_text;
use crate::error::{Error, Result};

const KEY: &str = "quantization_config";

/// Rows and columns that share a factor of fp8 weights, from `quantization_config.weight_block_size` of a `config.json`; `None`
/// where it gives none. For [`crate::Checkpoint::with_block_size`].
///
/// # Errors
/// `DataError::Json`, or [`Error::Config`] for a block that is not two whole numbers from 1 on.
pub fn weight_block_size(text: &str) -> Result<Option<[u32; 2]>> {
    let whole = parse_object(text)?;
    match read(of_text(&whole))? {
        None => Ok(read(&whole)?.flatten()),
        Some(block) => Ok(block),
    }
}

/// Refuses what is not read of a whole model's weights. A layer's tell by themselves: other methods leave attention as it is.
pub(super) fn check(map: &Map<String, Value>) -> Result<()> {
    let Some(object) = Keys::new(map, "").object(KEY)?.filter(|object| !object.is_empty()) else { return Ok(()) };
    let keys = Keys::new(object, "quantization_config.");
    match keys.text("quant_method")? {
        Some("fp8") => {}
        Some(other) => {
            return Err(keys.error("quant_method", format!("is `{other}`: of quantised weights only fp8 is read")));
        }
        None => return Err(keys.error("quant_method", "is missing: of quantised weights only fp8 is read")),
    }
    match keys.text("fmt")? {
        None | Some("e4m3") => read(map).map(drop),
        Some(other) => Err(keys.error("fmt", format!("is `{other}`: of fp8 weights only e4m3 is read"))),
    }
}

/// The block, in an object that may give none.
fn read(map: &Map<String, Value>) -> Result<Option<Option<[u32; 2]>>> {
    let Some(object) = Keys::new(map, "").object(KEY)? else { return Ok(None) };
    let keys = Keys::new(object, "quantization_config.");
    let Some(value) = keys.get("weight_block_size") else { return Ok(Some(None)) };
    let extent = |value: &Value| u32::try_from(value.as_u64()?).ok().filter(|&extent| extent > 0);
    match value.as_array().map(|list| list.iter().map(extent).collect::<Vec<_>>()).as_deref() {
        Some(&[Some(rows), Some(columns)]) => Ok(Some(Some([rows, columns]))),
        _ => Err(Error::config(
            "quantization_config.weight_block_size",
            format!("{value} is not two whole numbers from 1 on, as [128, 128]"),
        )),
    }
}

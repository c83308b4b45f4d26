#![no_main]
//! The weights of a layer from a safetensors file: refused, or every tensor whole and of the shape that the layer has.

use egmla::weights::{AttentionWeights, Checkpoint};
use egmla_fuzz::{LAYERS, bounded, tensors_file};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((layer, data)) = data.split_first() else { return };
    let file = tensors_file(data);
    let config = &LAYERS[usize::from(*layer) % LAYERS.len()];
    let read = || Checkpoint::new(&file).and_then(|checkpoint| AttentionWeights::load(&checkpoint, "", config));
    if let Ok(weights) = bounded(file.len(), read) {
        weights.check(config).expect("what was read fits");
    }
});

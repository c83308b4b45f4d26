#![no_main]
//! The input file of `egmla attend`: refused, or tokens, ids and lengths that agree with each other.

use egmla::sequences::Sequences;
use egmla_fuzz::{LAYERS, bounded, tensors_file};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((layer, data)) = data.split_first() else { return };
    let file = tensors_file(data);
    let config = &LAYERS[usize::from(*layer) % LAYERS.len()];
    let Ok(input) = bounded(file.len(), || Sequences::from_safetensors(&file, config)) else { return };
    assert!(input.tokens() > 0);
    assert_eq!(input.hidden.len(), input.tokens() * config.hidden_size as usize);
    assert_eq!(input.lengths.iter().map(|&length| u64::from(length)).sum::<u64>(), input.tokens() as u64);
    match (&config.gate, &input.token_ids) {
        (None, None) => {}
        (Some(gate), Some(ids)) => {
            assert_eq!(ids.len(), input.tokens());
            assert!(ids.iter().all(|&id| id < gate.vocab_size));
        }
        (gate, ids) => panic!("{gate:?} with {ids:?}"),
    }
});

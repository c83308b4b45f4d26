#![no_main]
//! A folder of shards and their index, opened as the program opens it: refused, or every tensor that it lists whole.

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use egmla::weights::Checkpoint;
use egmla_fuzz::{bounded, tensors_file};
use libfuzzer_sys::fuzz_target;

/// With two shards, `a` and `b`.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("egmla-fuzz-index-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder for the shards");
    folder
});

// Two lengths of two bytes each: of the index and of `a`; what is left is `b`.
fuzz_target!(|data: &[u8]| {
    let Some(([a, b, c, d], rest)) = data.split_first_chunk() else { return };
    let (index, rest) = rest.split_at(usize::from(u16::from_le_bytes([*a, *b])).min(rest.len()));
    let (first, second) = rest.split_at(usize::from(u16::from_le_bytes([*c, *d])).min(rest.len()));
    let (first, second) = (tensors_file(first), tensors_file(second));
    for (name, bytes) in [("model.safetensors.index.json", index), ("a", &first), ("b", &second)] {
        fs::write(FOLDER.join(name), bytes).expect("a file of the folder");
    }
    let Ok(checkpoint) = bounded(data.len(), || Checkpoint::open(&FOLDER)) else { return };
    let listed = std::str::from_utf8(index).expect("an index that was read is text");
    for (name, info) in checkpoint.tensors() {
        if let Ok(tensor) = bounded(data.len(), || checkpoint.take(name, &info.shape)) {
            assert_eq!(tensor.data.len(), info.shape.iter().product::<usize>());
        }
    }
    assert!(listed.contains("weight_map") && checkpoint.files().iter().all(|file| file.parent() == Some(&FOLDER)));
    let _ = checkpoint.only_attention_prefix();
    let _ = checkpoint.attention_prefix("0".parse().expect("a layer's number"));
});

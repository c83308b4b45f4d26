//! What loading a model takes of the host's memory beside the device's: alone in its process, whose peak it measures.
#![cfg(all(feature = "decoder", target_os = "linux"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::fs::File;
use std::io::Write;

use egmla::config::DecoderConfig;
use egmla::decoder::Decoder;
use egmla::readback;
use egmla::weights::Checkpoint;
use egmla::{Region, Storage, wgpu};
use serde_json::json;

const VOCAB: u64 = 16_384;
const HIDDEN: u64 = 1024;
const INNER: u64 = 4096;
const LAYERS: u64 = 8;

/// Names and shapes of a Llama.
fn tensors() -> Vec<(String, Vec<u64>)> {
    let mut all = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("lm_head.weight".to_owned(), vec![VOCAB, HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let of_layer = [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.v_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
        ];
        all.extend(of_layer.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)));
    }
    all
}

/// A line of this process's status, in bytes.
fn status(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("the line");
    1024 * line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().unwrap()
}

/// Beside what the device keeps, which is of the host on a software adapter: the largest tensor twice, as f32, whatever the model's
/// size. wgpu keeps the bytes of an upload until their copy was submitted and is done.
#[test]
fn loading_a_model_takes_its_largest_tensor_twice_at_most() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors() {
        let bytes = 2 * shape.iter().product::<u64>();
        header.insert(name, json!({"dtype": "F16", "shape": shape, "data_offsets": [end, end + bytes]}));
        end += bytes;
    }
    let header = serde_json::Value::from(header).to_string();
    let mut file = File::create(&path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    // A hole: it takes no room, and reads as zeros.
    file.set_len(8 + header.len() as u64 + end).unwrap();

    let config = json!({"model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5});
    let config = DecoderConfig::from_json(&config.to_string()).unwrap();
    let gpu = common::gpu();
    let before = status("VmHWM");
    let checkpoint = Checkpoint::open(&path).unwrap();
    let decoder = Decoder::load(&gpu.kernels, &config, &checkpoint, common::stored(Storage::F16)).unwrap();
    // The next submission makes whatever copies are left.
    let submit = || {
        let region = Region::from(&gpu.kernels.allocate("any", 16).unwrap());
        readback::wait(readback::read(&gpu.kernels, &[&region])).unwrap();
    };
    submit();
    let taken = || status("VmHWM").saturating_sub(before);
    let largest = 4 * VOCAB * HIDDEN;
    // Blocks that wgpu's allocator keeps for the next buffers.
    let most = end + 2 * largest + (64 << 20);
    println!("{} MiB taken, of them {} the weights; the largest tensor is {}", taken() >> 20, end >> 20, largest >> 20);
    assert!(taken() < most, "{} of {end} and twice {largest}", taken());
    drop(decoder);
    // Control: uploads whose copies nobody waits for are in memory twice.
    if gpu.kernels.device().adapter_info().device_type == wgpu::DeviceType::Cpu {
        let part = vec![1; end as usize / 10];
        let kept: Vec<_> = (0..10).map(|_| gpu.kernels.upload("a part", &part).unwrap()).collect();
        submit();
        println!("{} MiB taken without waiting", taken() >> 20);
        assert!(taken() > most, "{} of {} parts", taken(), kept.len());
    }
    gpu.assert_no_errors();
}

//! Sizes whose bytes fit no number: refused with the largest number there is, never rounded up to a small one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code, reason = "nothing is submitted here")]
mod common;

use egmla::attention::{CacheOptions, GateRows};
use egmla::config::AttentionConfig;
use egmla::error::{BufferError, KernelError};
use egmla::low_level::kernels::{attention_decode, attention_grouped, cache_append, gate_project};
use egmla::{Error, Recording, Region, Storage};

#[test]
fn buffers_that_no_number_counts_are_refused() {
    let gpu = common::gpu();
    for bytes in [u64::MAX, u64::MAX - 1, 1 << 63] {
        let error = gpu.kernels.allocate("huge", bytes).unwrap_err();
        assert!(matches!(error, Error::Limit { needed, .. } if needed >= bytes), "{error}");
    }
    gpu.assert_no_errors();
}

#[test]
fn caches_that_no_number_counts_are_refused() {
    let gpu = common::gpu();
    let config = |latent: u32, rope: u32| {
        let text = format!(
            r#"{{"hidden_size":1,"num_attention_heads":1,"kv_lora_rank":{latent},"qk_nope_head_dim":0,
                "qk_rope_head_dim":{rope},"v_head_dim":1}}"#
        );
        AttentionConfig::from_json(&text).unwrap()
    };
    let (batch, capacity) = (1, (1 << 31) - 1);
    for (latent, rope) in [((1 << 31) - 16, 2), (1, (1 << 31) - 24), (1 << 30, 1 << 29)] {
        for storage in Storage::ALL {
            let options = CacheOptions { batch, capacity, storage, ..CacheOptions::default() };
            let refused = options.memory(gpu.kernels.context(), &config(latent, rope), GateRows::Recompute);
            let error = refused.unwrap_err();
            assert!(
                matches!(error, Error::Limit { needed, .. } if needed > 1 << 33),
                "{latent} {rope} {storage:?}: {error}"
            );
        }
    }
    gpu.assert_no_errors();
}

/// One small buffer for every name: what it is asked to hold is the point.
#[test]
fn bindings_that_no_number_counts_are_refused() {
    let gpu = common::gpu();
    let small = Region::from(&gpu.kernels.allocate("small", 256).unwrap());
    let small = &small;
    let mut recording = Recording::new(&gpu.kernels);
    let refused = |result: egmla::Result<()>| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Buffer(BufferError::Size { needed: u64::MAX, found: 256, .. })), "{error}");
    };
    let most = u32::MAX;
    // Without a query only keys and values are large.
    let decode = attention_decode::AttentionDecode {
        tokens: 0,
        most_tokens: 1,
        partials: 1,
        split: attention_decode::SPLIT,
        n_sequence: 1,
        n_head: 65535,
        n_kv_head: 65535,
        d_nope: 1 << 29,
        d_rope: 0,
        d_value: 8,
        kv_first: 0,
        kv_rows: 65535 << 8,
        kv_pitch: u32::MAX - 7,
        cache_rows: 1,
        scale: 1.0,
        storage: Storage::F16,
        kv_storage: Storage::F16,
    };
    let args = attention_decode::Args {
        q: small,
        kv: small,
        rope_cache: small,
        sequences: small,
        partial_values: small,
        partial_softmax: small,
    };
    // Loops of a shader bound widths before their bytes can be too many to count.
    let error = recording.add(&decode, args).unwrap_err();
    assert!(matches!(error, Error::Kernel(KernelError::Problem { kernel: "attention_decode", .. })), "{error}");
    let decode = attention_decode::AttentionDecode { d_nope: 65_528, ..decode };
    let error = recording.add(&decode, args).unwrap_err();
    assert!(matches!(error, Error::Buffer(BufferError::Size { needed, .. }) if needed > 1 << 56), "{error}");
    let append = cache_append::CacheAppend {
        tokens: 1,
        cache_rows: most,
        row: 8,
        latent_offset: 0,
        d_latent: 8,
        latent_used: 8,
        rope_offset: 0,
        d_rope: 8,
        rotate: false,
        queries: cache_append::Queries::default(),
        norm: None,
        gate: None,
        kept: None,
        rope_byte: u64::MAX - 15,
        weights: Storage::F32,
        storage: Storage::F32,
    };
    let args = cache_append::Args {
        x: small,
        weight: small,
        g: small,
        rotations: small,
        slots: small,
        cache: small,
        q: small,
        w: small,
    };
    refused(recording.add(&append, args));
    let rows = gate_project::GateProject {
        rows: 1,
        width: 1,
        d_gate: 262_136,
        vocab_size: most,
        first_id: 0,
        ids: false,
        targets: false,
        y_rows: 1,
        storage: Storage::F32,
        y_storage: Storage::F32,
    };
    let args = gate_project::Args { gate_embedding: small, gate_b_proj: small, ids: small, targets: small, y: small };
    let error = recording.add(&rows, args).unwrap_err();
    assert!(matches!(error, Error::Buffer(BufferError::Size { needed, .. }) if needed > 1 << 51), "{error}");
    assert_eq!(attention_grouped::softmax_word(most, most, most), u64::MAX);
    assert_eq!(recording.dispatches(), 0);
    gpu.assert_no_errors();
}

#![no_main]
//! `config.json` of a layer and of a decoder: refused, or numbers that the shaders can take.

use egmla::config::{AttentionConfig, DecoderAttention, DecoderConfig, GqaConfig, RopeConfig};
use egmla_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

/// Widest rotary part whose frequencies are looked at: there are half as many, whatever the size of the file.
const WIDEST: u32 = 4096;

fuzz_target!(|text: &str| {
    if let Ok(config) = bounded(text.len(), || DecoderConfig::from_json(text)) {
        assert!((config.rms_norm_eps as f32) > 0.0);
        match &config.attention {
            DecoderAttention::Latent(config) => layer(config),
            DecoderAttention::Heads(config) => heads(config),
        }
        config.validate().expect("what was read is valid");
    }
    if let Ok(config) = bounded(text.len(), || AttentionConfig::from_json(text)) {
        layer(&config);
        config.validate().expect("what was read is valid");
    }
});

fn layer(config: &AttentionConfig) {
    let (scale, amplitude) = (config.scale() as f32, config.rope.amplitude() as f32);
    assert!(scale.is_finite() && scale > 0.0, "scale {scale}: {config:?}");
    assert!(amplitude.is_finite(), "amplitude {amplitude}: {config:?}");
    assert!(config.gated_width() < 1 << 31 && config.d_kv() < 1 << 31 && config.cache_elements() < 1 << 31);
    angles(&config.rope, config.d_rope);
}

fn heads(config: &GqaConfig) {
    assert!(config.rope.amplitude().is_finite() && config.scale() > 0.0, "{config:?}");
    assert!(config.cache_elements() < 1 << 31 && config.mha_cache_elements() < 1 << 31);
    angles(&config.rope, config.head_dim);
}

fn angles(rope: &RopeConfig, width: u32) {
    if width <= WIDEST {
        let frequencies = rope.frequencies(width);
        assert_eq!(frequencies.len(), width as usize / 2);
        // The angle of the last position that a cache can hold.
        let last = f64::from(i32::MAX);
        assert!(frequencies.iter().all(|frequency| (frequency * last).is_finite()), "{frequencies:?}: {rope:?}");
    }
}

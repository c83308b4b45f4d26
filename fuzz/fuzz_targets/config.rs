#![no_main]
//! `config.json` of a layer and of a decoder: refused, or numbers that the shaders can take.

use egmla::config::{AttentionConfig, DecoderConfig};
use egmla_fuzz::bounded;
use libfuzzer_sys::fuzz_target;

/// Widest rotary part whose frequencies are looked at: there are half as many, whatever the size of the file.
const WIDEST: u32 = 4096;

fuzz_target!(|text: &str| {
    if let Ok(config) = bounded(text.len(), || DecoderConfig::from_json(text)) {
        assert!((config.rms_norm_eps as f32) > 0.0);
        layer(&config.attention);
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
    if config.d_rope <= WIDEST {
        let frequencies = config.rope.frequencies(config.d_rope);
        assert_eq!(frequencies.len(), config.d_rope as usize / 2);
        // The angle of the last position that a cache can hold.
        let last = f64::from(i32::MAX);
        assert!(frequencies.iter().all(|frequency| (frequency * last).is_finite()), "{frequencies:?}: {config:?}");
    }
}

#![no_main]
//! Caches and layers on a device that computes nothing: extents that no device holds are refused before anything
//! is allocated, and steps that do not fit leave the cache as it was.

use arbitrary::{Result, Unstructured};
use egmla::attention::{
    Attention, AttentionOptions, CacheOptions, DecodePath, GateRows, LatentCache, Mode, StepTokens,
};
use egmla::config::{AttentionConfig, GateConfig, GateSite, RopeConfig};
use egmla::random;
use egmla::{Kernels, Recording, Region};
use egmla_fuzz::{DEVICES, activation, bounded_beside, norm, number, storage};
use libfuzzer_sys::fuzz_target;

/// Most bytes that extents may take: the devices hold a layer in a mebibyte, and the host keeps the lists of it.
const MOST: usize = 256 << 20;

fuzz_target!(|data: &[u8]| {
    let _ = bounded_beside(MOST, 0, || run(&mut Unstructured::new(data)));
});

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    let kernels = u.choose(&DEVICES)?;
    let small = u.ratio(3, 4)?;
    let config = config(u, small)?;
    if config.validate().is_err() {
        return Ok(());
    }
    let extent = |u: &mut Unstructured<'_>, most| if small { u.int_in_range(0..=most) } else { number(u) };
    let options = CacheOptions {
        // A layer is a buffer of its own, so that their number is the caller's to bound.
        n_layer: u.int_in_range(0..=3)?,
        batch: extent(u, 4)?,
        capacity: extent(u, 600)?,
        storage: storage(u)?,
        max_tokens: extent(u, 40)?,
        tile_rows: extent(u, 600)?,
        decode_tokens: extent(u, 17)?,
        decode_path: DecodePath::Auto,
    };
    let gate_rows = match u.int_in_range(0..=2u8)? {
        0 => GateRows::Recompute,
        1 => GateRows::Table,
        _ => GateRows::Pool { rows: extent(u, 8)? },
    };
    let Ok(memory) = options.memory(kernels.context(), &config, gate_rows) else { return Ok(()) };
    assert_eq!(memory.total(), memory.lines().iter().map(|(_, bytes)| bytes).sum::<u64>());
    if !small {
        return Ok(());
    }
    let Ok(weights) = random::attention_weights(&config, u.arbitrary()?, 0) else { return Ok(()) };
    let of_layer = AttentionOptions { storage: storage(u)?, gate_rows };
    let Ok(attention) = Attention::new(kernels, &config, &weights, of_layer) else { return Ok(()) };
    let Ok(mut cache) = LatentCache::new(&attention, options) else { return Ok(()) };
    assert_eq!(cache.memory(), memory);
    let mut recording = Recording::new(kernels);
    while !u.is_empty() {
        step(u, kernels, &attention, &mut cache, &mut recording)?;
        if u.ratio(1, 4)? {
            recording.clear();
        }
    }
    Ok(())
}

fn config(u: &mut Unstructured<'_>, small: bool) -> Result<AttentionConfig> {
    let mut width = |most: u32| if small { u.int_in_range(0..=most) } else { number(u) };
    let (hidden_size, n_head, d_latent) = (width(16)?, width(5)?, width(20)?);
    let (d_nope, d_rope, d_value) = (width(12)?, width(6)?, width(12)?);
    let (rank, vocab_size, d_gate) = (width(8)?, width(20)?, width(8)?);
    let tied = u.arbitrary()?;
    let gate = GateConfig {
        vocab_size,
        d_gate: if tied { hidden_size } else { d_gate },
        tied,
        site: if u.arbitrary()? { GateSite::UpProjected } else { GateSite::Latent },
        activation: activation(u)?,
        norm: norm(u)?,
        norm_eps: 1e-5,
    };
    Ok(AttentionConfig {
        hidden_size,
        n_head,
        d_latent,
        d_q_latent: u.arbitrary::<bool>()?.then_some(rank),
        d_nope,
        d_rope: d_rope & !1,
        d_value,
        attention_bias: u.arbitrary()?,
        gate: u.ratio(3, 4)?.then_some(gate),
        rope: RopeConfig { interleave: u.arbitrary()?, rotate: u.ratio(3, 4)?, ..RopeConfig::default() },
        ..AttentionConfig::default()
    })
}

/// One change of the cache, right or wrong.
fn step(
    u: &mut Unstructured<'_>,
    kernels: &Kernels,
    attention: &Attention,
    cache: &mut LatentCache,
    recording: &mut Recording,
) -> Result<()> {
    let before = cache.lengths().to_vec();
    let sequence = |u: &mut Unstructured<'_>| -> Result<usize> { u.int_in_range(0..=before.len()) };
    match u.int_in_range(0..=7u8)? {
        0 => {
            let (at, length) = (sequence(u)?, u.int_in_range(0..=620)?);
            let fits = at < before.len() && length <= before[at];
            assert_eq!(cache.truncate(at, length).is_ok(), fits);
            return Ok(());
        }
        1 => {
            let (from, to) = (sequence(u)?, sequence(u)?);
            match cache.copy_sequence(recording, from, to) {
                Ok(()) => assert_eq!(cache.lengths()[to], before[from]),
                Err(_) => assert_eq!(cache.lengths(), before),
            }
            return Ok(());
        }
        2 => cache.reset(),
        _ => {}
    }
    let before = cache.lengths().to_vec();
    let mode = if u.arbitrary()? { Mode::Prefill } else { Mode::Decode };
    let most = if mode == Mode::Prefill { 40 } else { 17 };
    let sequences = if u.ratio(1, 16)? { u.int_in_range(0..=5)? } else { before.len() };
    let counts: Vec<u32> = (0..sequences).map(|_| u.int_in_range(0..=most)).collect::<Result<_>>()?;
    let tokens: u32 = counts.iter().sum();
    let vocab = attention.config().gate.as_ref().map_or(8, |gate| gate.vocab_size);
    let past = u32::from(u.ratio(1, 32)?);
    let ids: Vec<u32> = (0..tokens).map(|_| u.int_in_range(0..=vocab.max(1) - 1 + past)).collect::<Result<_>>()?;
    let ids = if u.ratio(1, 16)? { None } else { Some(&ids[..]) };
    cache.set_decode_path(*u.choose(&[DecodePath::Auto, DecodePath::Expanded, DecodePath::Absorbed])?);
    let Ok(step) = cache.prepare(mode, StepTokens { counts: &counts, ids }) else {
        assert_eq!(cache.lengths(), before, "a step that is refused changes nothing");
        return Ok(());
    };
    assert_eq!(step.tokens(), tokens);
    let bytes = u64::from(tokens) * u64::from(attention.config().hidden_size) * 4;
    let bytes = if u.ratio(1, 16)? { 16 } else { bytes };
    let buffer = |label| kernels.allocate(label, bytes).map(|buffer| Region::from(&buffer));
    let (Ok(hidden), Ok(out)) = (buffer("hidden"), buffer("out")) else { return Ok(()) };
    let (layer, dispatches) = (u.int_in_range(0..=3)?, recording.dispatches());
    match attention.forward(recording, cache, &step, layer, &hidden, &out) {
        Ok(()) => assert!(recording.dispatches() > dispatches),
        Err(_) => assert_eq!(recording.dispatches(), dispatches, "what is refused records nothing"),
    }
    assert_eq!(cache.lengths(), before);
    if u.ratio(7, 8)? {
        let after = step.lengths_after().to_vec();
        cache.commit(step).expect("prepared for this state");
        assert_eq!(cache.lengths(), after);
    }
    Ok(())
}

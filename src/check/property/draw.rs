//! Configurations and histories at random.

use super::{Event, Ids, LayerCase, Rope, Shape};
use crate::attention::{DecodePath, GateRows, MOST_DECODED};
use crate::config::{Activation, GateConfig, GateNorm, GateSite};
use crate::random::Random;
use crate::storage::Storage;

/// Configurations of a seed, each drawn when it is asked for.
pub fn family(seed: u64, configurations: usize) -> impl Iterator<Item = Shape> {
    let mut random = Random::new(seed);
    (0..configurations).map(move |index| Shape::draw(&mut random, index))
}

impl Shape {
    pub(super) fn draw(random: &mut Random, index: usize) -> Shape {
        // Every third configuration has whole 16-byte loads in every row, which is what many kernels ask for.
        let aligned = index.is_multiple_of(3);
        let mut one_of = |of: &[u32]| of[random.ids(1, of.len() as u32)[0] as usize];
        let width = |of: [&'static [u32]; 2]| of[usize::from(aligned)];
        let (hidden_size, n_head) = (one_of(&[17, 24, 37, 40]), one_of(&[1, 2, 3, 5, 9]));
        let d_latent = one_of(width([&[7, 13, 20, 33], &[8, 24, 32, 64]]));
        let d_nope = one_of(width([&[0, 5, 7, 12], &[8, 16, 24]]));
        let d_rope = one_of(width([&[0, 2, 6, 8], &[0, 8, 16]]));
        // Queries of some width.
        let d_rope = if d_nope == 0 { d_rope.max(4) } else { d_rope };
        let d_value = one_of(width([&[3, 7, 10, 33], &[8, 16, 24]]));
        let d_q_latent = Some(one_of(&[0, 6, 14])).filter(|&rank| rank > 0);
        // A third each: plain MLA, the gate at the keys and values (half of all), the gate at the latent.
        let mut gate = match one_of(&[0, 1, 2, 2]) {
            0 => None,
            site => Some(GateConfig {
                vocab_size: one_of(&[1, 5, 23, 97]),
                d_gate: one_of(&[1, 3, 6, 16]),
                tied: false,
                site: if site == 1 { GateSite::Latent } else { GateSite::UpProjected },
                activation: Activation::ALL[one_of(&[0, 1, 2, 3, 4]) as usize],
                norm: GateNorm::ALL[one_of(&[0, 1, 2]) as usize],
                norm_eps: 1e-5,
            }),
        };
        let rope = [Rope::Neighbours, Rope::Halves, Rope::Linear, Rope::Yarn][one_of(&[0, 1, 2, 3]) as usize];
        // In turns: with every other option in the end, in either storage, with whole loads and without.
        if let (Some(gate), 1) = (&mut gate, index / 2 % 3) {
            (gate.tied, gate.d_gate) = (true, hidden_size);
        }
        let rope = if index % 5 == 4 { Rope::ScaledQueries } else { rope };
        let [attention_bias, kv_a_norm] = [one_of(&[0, 1]) == 1, one_of(&[0, 1, 1]) == 1];
        Shape {
            hidden_size,
            n_head,
            d_latent,
            d_q_latent,
            d_nope,
            d_rope,
            d_value,
            attention_bias,
            kv_a_norm,
            rope,
            gate,
            // In turns, not by chance: few configurations have both, and both with and without whole loads.
            storage: if index % 2 == 1 { Storage::F16 } else { Storage::F32 },
            seed: index as u64,
        }
    }
}

impl LayerCase {
    /// A history for a layer: ragged and chunked, with roll backs, copies and abandoned steps.
    pub fn draw(shape: Shape, random: &mut Random) -> LayerCase {
        let mut below = |limit: u32| random.ids(1, limit.max(1))[0];
        let batch = 1 + below(4);
        // Mostly shorter than a split of 256 cache rows, now and then two or three splits.
        let capacity = if below(12) == 0 { 250 + below(400) } else { 1 + below(48) };
        let gate_rows = match below(4) {
            0 => GateRows::Table,
            1 => GateRows::Pool { rows: 1 + below(shape.vocab() + 2) },
            _ => GateRows::Recompute,
        };
        let ids = [Ids::Any, Ids::Any, Ids::Equal, Ids::Skewed, Ids::Distinct][below(5) as usize];
        let tile_rows = [1, 256, 512][below(3) as usize];
        let mut lengths = vec![0u32; batch as usize];
        let mut events = Vec::new();
        for _ in 0..1 + below(7) {
            let event = match below(12) {
                0 => Event::TakeBack { sequence: below(batch) as usize, tokens: below(capacity) },
                1 => Event::Copy { from: below(batch) as usize, to: below(batch) as usize },
                2 if below(4) == 0 => Event::Reset,
                kind => {
                    let decode = kind > 6;
                    let most = if decode { MOST_DECODED } else { capacity };
                    let count = |&length: &u32| {
                        let room = (capacity - length).min(most);
                        match below(4) {
                            0 => 0,
                            1 => room.min(1),
                            // One token or all that fit as often as any number between.
                            2 => room,
                            _ => below(room + 1),
                        }
                    };
                    let counts: Vec<u32> = lengths.iter().map(count).collect();
                    let path = [DecodePath::Auto, DecodePath::Expanded, DecodePath::Absorbed, DecodePath::Absorbed]
                        [below(4) as usize];
                    let seed = below(1 << 20).into();
                    match (decode, below(8)) {
                        (false, _) => Event::Prefill { counts, seed },
                        (true, 0) => Event::GiveUp { counts, path, seed },
                        (true, _) => Event::Decode { counts, path, seed },
                    }
                }
            };
            // Events without effect, as a step without tokens, are left out.
            if let Some(after) = event.applied(&lengths, capacity) {
                lengths = after;
                events.push(event);
            }
        }
        LayerCase { shape, batch, capacity, tile_rows, gate_rows, ids, events }
    }
}

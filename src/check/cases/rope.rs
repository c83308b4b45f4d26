//! Cases of `rope`: both layouts of pairs, every scaling, positions past the original length.

use super::{SEED, each_variant, widen};
use crate::check::Case;
use crate::check::compare::Tolerance;
use crate::config::{RopeConfig, RopeScaling};
use crate::kernels::{Rope, rope};
use crate::random::Random;
use crate::reference;

pub(super) fn cases(cases: &mut Vec<Case>) {
    let yarn = RopeScaling::Yarn {
        factor: 40.0,
        original_max_position_embeddings: 64.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: Some(1.0),
        mscale_all_dim: Some(0.7),
        attention_factor: None,
        truncate: true,
    };
    // cos and sin are given; the kernel's own error is that of two products and a sum.
    let tolerance = Tolerance::sums(&[2]);
    // Position 0 hides a wrong pair layout; 70 and on are past the original length.
    let positions = [0, 1, 7, 63, 64, 70, 4095];
    let tokens = positions.len();
    let scalings = [("none", RopeScaling::None), ("linear", RopeScaling::Linear { factor: 4.0 }), ("yarn", yarn)];
    for (name, scaling) in scalings {
        for interleave in [true, false] {
            for (n_head, d_nope, d_rope) in [(1, 5, 2), (3, 0, 6), (9, 16, 64), (63, 1, 4)] {
                let id = format!("{name}_{}_h{n_head}_{d_nope}+{d_rope}", if interleave { "pairs" } else { "halves" });
                let d_head = d_nope + d_rope;
                let op = Rope {
                    tokens: tokens as u32,
                    n_head: n_head as u32,
                    d_rope: d_rope as u32,
                    offset: d_nope as u32,
                    token_stride: (n_head * d_head) as u32,
                    head_stride: d_head as u32,
                    interleave,
                };
                let config = RopeConfig { interleave, scaling: scaling.clone(), ..RopeConfig::default() };
                each_variant(cases, id, op, move |lab, launch| {
                    let mut random = Random::new(SEED);
                    let values = random.values(tokens * n_head * d_head, 1.0);
                    let turns = reference::rotations(&config, d_rope, &positions);
                    let single: Vec<f32> = turns.iter().flatten().map(|&value| value as f32).collect();
                    let rotations = lab.floats(&single)?;
                    let out = lab.floats(&values)?;
                    launch.run(lab, rope::Args { rotations: &rotations.region, values: &out.region })?;
                    let mut expected = widen(&values);
                    reference::rope(&mut expected, &turns, n_head, d_head, d_rope, interleave);
                    Ok(vec![lab.compare(&out, &expected, tolerance)?])
                });
            }
        }
    }
}

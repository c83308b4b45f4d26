//! Microseconds of a dispatch by class of adapter: what a choice between ways to compute the same goes by.

use std::ops::Add;

use crate::adapter::AdapterClass;
use crate::cost::Cost;
use crate::plan::Plan;

/// What a class of adapter does in a microsecond. A dispatch takes
///
/// ```text
/// launch_us + max(bytes / bytes_per_us, FLOPs / rate) / fill,   fill = min(1, subgroups / AdapterClass::full)
/// ```
///
/// with the bytes and FLOPs of its [`Cost`], the subgroups of its plan's grid, and the rate that the library's kernels of its kind
/// reach where the device is full. Latency within a dispatch is not modelled, so a short one takes up to three times as long; the
/// model is for choices between paths whose times differ by more.
///
/// Where the numbers are from:
///
/// - **Software** is from `benches/results/llvmpipe-*.json` (llvmpipe of Mesa 25.0.7, two cores): the dispatch of its ceilings, the
///   bytes of its norm, gate and append, the FLOPs of its products and of absorbed and grouped attention. A test predicts its
///   decode rows within a factor of two.
/// - **Discrete** is fitted to one GPU, an NVIDIA H200 (Vulkan, driver 580.159.04), on 2026-11-26 at commit `10d32d5`
///   (`benches/results/gpu/h200-10d32d5.json`). Measured as such: copies at 4 257 GB/s, f32 multiply-adds at 49.9 TFLOP/s,
///   a dispatch behind others 2.0 µs when empty and 3 to 4 µs when it depends on them. Rates by kind are fitted to these
///   kernels without wgpu's shader checks, which later commits run without: the absorbed attention of 16 heads × (512 + 64)
///   took 462 µs for 32 sequences of 8 192 tokens, 19.8 TFLOP/s; the grouped attention 156 µs at 8 192 tokens of the 120M
///   shape, 2.3 TFLOP/s. Of whole steps of that layer, expanded and absorbed took 75 and 166 µs at 1 024 tokens, 458 and
///   392 at 8 192, 1 786 and 669 at 32 768, with shader checks; at 8 192 without them 422 and 212. Kernels have changed
///   since, and no later commit was measured.
/// - **Integrated** and **Apple** are assumed, not measured: bandwidth and FLOPs that such GPUs usually have, the shares by kind of
///   the discrete one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Microseconds of a dispatch that waits for the one before it, whatever it computes.
    pub launch_us: f64,
    /// Bytes of memory traffic per microsecond.
    pub bytes_per_us: f64,
    /// FLOPs per microsecond of products, and of everything that is not attention.
    pub product: f64,
    /// FLOPs per microsecond of attention over cache rows.
    pub attention: f64,
    /// FLOPs per microsecond of `attention_grouped`.
    pub grouped: f64,
}

/// A GPU of `gb_s` GB/s and `tflop_s` TFLOP/s.
const fn gpu(launch_us: f64, gb_s: f64, tflop_s: f64) -> Rates {
    let product = 1e6 * tflop_s;
    Rates { launch_us, bytes_per_us: 1e3 * gb_s, product, attention: 0.4 * product, grouped: 0.05 * product }
}

impl AdapterClass {
    /// What the class does in a microsecond.
    pub fn rates(self) -> Rates {
        match self {
            AdapterClass::Software => {
                Rates { launch_us: 36.0, bytes_per_us: 3.5e3, product: 16e3, attention: 13e3, grouped: 11e3 }
            }
            AdapterClass::Integrated => gpu(5.0, 80.0, 2.0),
            AdapterClass::Discrete => gpu(3.5, 4257.0, 49.9),
            AdapterClass::Apple => gpu(5.0, 150.0, 4.0),
        }
    }

    /// Invocations of a subgroup, as [`AdapterClass::full`] counts them.
    fn subgroup(self) -> f64 {
        match self {
            AdapterClass::Software => 1.0,
            AdapterClass::Integrated | AdapterClass::Discrete | AdapterClass::Apple => 32.0,
        }
    }

    /// The share of the device that a plan occupies, up to 1.
    fn fill(self, plan: &Plan) -> f64 {
        let workgroups: f64 = plan.grid.into_iter().map(f64::from).product();
        let subgroups = workgroups * (f64::from(plan.workgroup_size) / self.subgroup()).ceil();
        (subgroups / f64::from(self.full())).min(1.0)
    }

    /// Time of a dispatch of the operation `name`; none if it is empty.
    pub fn time(self, name: &str, cost: Cost, plan: &Plan) -> Time {
        if plan.grid.contains(&0) {
            return Time::default();
        }
        let rates = self.rates();
        let rate = match name {
            "attention_grouped" => rates.grouped,
            "attention_absorbed" | "attention_decode" => rates.attention,
            _ => rates.product,
        };
        let full = (cost.bytes as f64 / rates.bytes_per_us).max(cost.flops as f64 / rate);
        Time { us: rates.launch_us + full / self.fill(plan), dispatches: 1 }
    }
}

/// Time of dispatches one after another.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Time {
    /// Microseconds.
    pub us: f64,
    /// How many they are.
    pub dispatches: u32,
}

impl Time {
    /// Of what no shader of a device can run.
    pub const NEVER: Time = Time { us: f64::INFINITY, dispatches: 0 };
}

impl Add for Time {
    type Output = Time;

    fn add(self, other: Time) -> Time {
        Time { us: self.us + other.us, dispatches: self.dispatches.saturating_add(other.dispatches) }
    }
}

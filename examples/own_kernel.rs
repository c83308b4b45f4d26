//! A kernel of your own in the same recording: an operation with its sizes, buffers, parameters and shader, added behind a
//! layer's dispatches and run in one pass with them.

use egmla::low_level::{Cost, Draft, Op, Plan, Variant, anything};
use egmla::random::{Random, attention_weights};
use egmla::{
    Attention, AttentionConfig, CacheOptions, Kernels, LatentCache, Recording, Region, Tokens, readback, wgpu,
};

egmla::params! {
    /// As in the shader.
    pub struct Params { elements: u32, limit: f32 }
}

egmla::args! {
    /// The buffers, in the order of their bindings from 1 on.
    pub struct Args {
        /// `[elements]` f32, read and written.
        values: Write,
    }
}

/// `values = limit · tanh(values / limit)`, as Gemma caps its scores.
#[derive(Debug, Clone, Copy, PartialEq)]
struct SoftCap {
    elements: u32,
    limit: f32,
}

const SHADER: &str = "
override WORKGROUP: u32 = 64u;

struct Params { elements: u32, limit: f32 }

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> values: array<f32>;

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Grids over 65 535 workgroups are folded into x and y.
    let i = (group.y * groups.x + group.x) * WORKGROUP + lane;
    if (i < params.elements) {
        values[i] = params.limit * tanh(values[i] / params.limit);
    }
}";

impl Op for SoftCap {
    type Args<T: Copy> = Args<T>;
    type Params = Params;
    const NAME: &'static str = "soft_cap";
    /// The shaders that compute it, best first; one here, with one setting.
    const VARIANTS: &'static [Variant<Self>] = &[Variant::<Self>::new(
        ("soft_cap", SHADER),
        1,
        |op, _, _| Ok(Draft::elements(64, op.elements.into())),
        anything,
    )];

    fn params(&self, _: &Plan) -> Params {
        Params { elements: self.elements, limit: self.limit }
    }

    /// What each buffer must hold: a smaller region is an error, before anything is recorded.
    fn bytes(&self) -> Args<u64> {
        Args { values: 4 * u64::from(self.elements) }
    }

    fn cost(&self) -> Cost {
        Cost { flops: 3 * u64::from(self.elements), bytes: 8 * u64::from(self.elements) }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?;
    let kernels = Kernels::new(&device, &queue)?;
    let config = AttentionConfig::from_json(
        r#"{"hidden_size": 64, "num_attention_heads": 4, "q_lora_rank": null, "kv_lora_rank": 16,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}"#,
    )?;
    let attention = Attention::new(&kernels, &config, &attention_weights(&config, true, 0)?, Default::default())?;
    let mut cache = LatentCache::new(&attention, CacheOptions::default())?;
    let hidden = Region::from(&kernels.upload("hidden", bytemuck::cast_slice(&Random::new(1).values(3 * 64, 1.0)))?);
    let out = Region::from(&kernels.allocate("out", 3 * 64 * 4)?);
    let mut recording = Recording::new(&kernels);
    attention.prefill(&mut recording, &mut cache, Tokens { counts: &[3], ids: None, hidden, out: out.clone() })?;
    recording.add(&SoftCap { elements: 3 * 64, limit: 0.5 }, Args { values: &out })?;
    readback::submit(&mut recording)?;
    let values = readback::wait(readback::read_f32(&kernels, &[&out]))?.remove(0);
    println!("{}", recording.kernel_names().collect::<Vec<_>>().join(", "));
    println!("{:.3?} …, none beyond ±0.5: {}", &values[..4], values.iter().all(|value| value.abs() <= 0.5));
    Ok(())
}

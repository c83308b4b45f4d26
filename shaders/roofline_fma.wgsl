// Multiply-adds in registers: the f32 rate of the adapter, against which benches set every other kernel.
//
//   y[i] = Σ_k z_k,  k = 0 … 11:  z_k begins as x[i] + k, then 4 · iterations times z_k ← a · z_k + b
//
// Twelve independent chains, in three vectors: more would spill the registers of a software adapter, fewer would leave a GPU
// waiting.
// grid: one invocation per element, folded into x and y.

override WORKGROUP: u32 = 64u;

struct Params {
    elements: u32,
    iterations: u32,
    a: f32,
    b: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;           // [elements]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;     // [elements]

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP + lane;
    if (i >= params.elements) {
        return;
    }
    let a = vec4<f32>(params.a);
    let b = vec4<f32>(params.b);
    var z0 = vec4<f32>(x[i]) + vec4<f32>(0.0, 1.0, 2.0, 3.0);
    var z1 = z0 + vec4<f32>(4.0);
    var z2 = z0 + vec4<f32>(8.0);
    for (var iteration = 0u; iteration < params.iterations; iteration += 1u) {
        z0 = fma(a, z0, b);
        z1 = fma(a, z1, b);
        z2 = fma(a, z2, b);
        z0 = fma(a, z0, b);
        z1 = fma(a, z1, b);
        z2 = fma(a, z2, b);
        z0 = fma(a, z0, b);
        z1 = fma(a, z1, b);
        z2 = fma(a, z2, b);
        z0 = fma(a, z0, b);
        z1 = fma(a, z1, b);
        z2 = fma(a, z2, b);
    }
    y[i] = dot(z0 + z1 + z2, vec4<f32>(1.0));
}

// Residual connection, in place, in 16-byte loads: stream += factor · delta. For elements that are a multiple of 4.
//
// Floor: 12 bytes per element over the copy rate; for a token the dispatch.
// grid: one invocation per four elements, folded into x and y.
//
// Results, medians of interleaved runs on lavapipe (2 cores), 4M elements, against `residual_add`: 2.6 to 2.7 times as fast.
// Not run on a GPU yet.
// Static (RDNA3, Mesa 25), at most: 12 registers, no workgroup memory, nothing spilled.

override WORKGROUP: u32 = 64u;

struct Params {
    elements: u32,
    factor: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> delta: array<vec4<f32>>;            // [elements / 4]
@group(0) @binding(2) var<storage, read_write> stream: array<vec4<f32>>;     // [elements / 4]

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP + lane;
    if (i < params.elements / 4u) {
        stream[i] += params.factor * delta[i];
    }
}

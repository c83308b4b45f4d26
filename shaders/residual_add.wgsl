// Residual connection, in place: stream += factor · delta.
//
// Floor: 12 bytes per element over the copy rate; for a token the dispatch.
// grid: one invocation per element, folded into x and y.
// Static (RDNA3, Mesa 25), at most: 12 registers, no workgroup memory, nothing spilled.
// Not measured on a GPU.

override WORKGROUP: u32 = 64u;

struct Params {
    elements: u32,
    factor: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> delta: array<f32>;            // [elements]
@group(0) @binding(2) var<storage, read_write> stream: array<f32>;     // [elements]

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP + lane;
    if (i < params.elements) {
        stream[i] += params.factor * delta[i];
    }
}

// Copies a buffer: the memory rate of the adapter, against which benches set every other kernel.
//
//   y = x
//
// grid: one workgroup per WORKGROUP · EACH vectors of four words, folded into x and y.

override WORKGROUP: u32 = 64u;
override EACH: u32 = 1u;         // vectors per invocation, WORKGROUP apart

struct Params {
    vectors: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;         // [vectors]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<u32>>;   // [vectors]

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let first = (group.y * groups.x + group.x) * WORKGROUP * EACH + lane;
    for (var k = 0u; k < EACH; k += 1u) {
        let i = first + k * WORKGROUP;
        if (i < params.vectors) {
            y[i] = x[i];
        }
    }
}

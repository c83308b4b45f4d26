// Writes single words: what one step changes in the group lists of a cache.
//
//   words[patches[i].x] = patches[i].y,  i < count          patches of one word have one value
//
// Floor: 16 bytes per patch; the dispatch.
// grid: one invocation per patch, folded into x and y.
// Static (RDNA3, Mesa 25), at most: 12 registers, no workgroup memory, nothing spilled.
// On an H200 at commit 10d32d5: a step's words, some 1 µs. Not measured since.

override WORKGROUP: u32 = 64u;

struct Params {
    count: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> patches: array<vec2<u32>>;   // [count] (word, value)
@group(0) @binding(2) var<storage, read_write> words: array<u32>;     // [words of the buffer]

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP + lane;
    if (i < params.count) {
        words[patches[i].x] = patches[i].y;
    }
}

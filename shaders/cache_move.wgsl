// Copies words from one buffer to another: the rows of a sequence into another cache.
//
//   sink[to + i] = source[from + i],  i < words
//
// Floor: 8 bytes per word over the copy rate.
// grid: one invocation per word, folded into x and y.
// Static (RDNA3, Mesa 25), at most: 12 registers, no workgroup memory, nothing spilled.
// Not measured on a GPU.

override WORKGROUP: u32 = 64u;

struct Params {
    words: u32,
    from_word: u32,
    to_word: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> source: array<u32>;         // [words of the buffer]
@group(0) @binding(2) var<storage, read_write> sink: array<u32>;     // [words of the buffer]

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP + lane;
    if (i < params.words) {
        sink[params.to_word + i] = source[params.from_word + i];
    }
}

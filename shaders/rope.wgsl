// Rotary position embedding, in place, of d_rope consecutive elements of every head.
//
//   (a, b) ← (a·cos − b·sin, a·sin + b·cos)    pairs (2i, 2i+1) or (i, i + d_rope/2)
//
// cos and sin come from the host in f64 precision, YaRN's amplitude included: WGSL promises nothing of sin beyond ±π.
// The layer rotates as it appends (cache_append); this kernel is for many queries of a low rank, and for callers that rotate outside
// of a cache.
// Floor: 8 bytes per element over the copy rate.
// grid: one invocation per (token, head, pair), folded into x and y.
// Static (RDNA3, Mesa 25), at most: 24 registers, no workgroup memory, nothing spilled.
// On an H200 at commit 10d32d5: one token, some 2 µs. Not measured since.

override INTERLEAVE: u32 = 1u;
override WORKGROUP: u32 = 64u;

struct Params {
    tokens: u32,
    n_head: u32,
    d_rope: u32,
    offset: u32,        // first rotated element
    token_stride: u32,
    head_stride: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> rotations: array<vec2<f32>>;   // [tokens, d_rope / 2] (cos, sin)
@group(0) @binding(2) var<storage, read_write> values: array<f32>;      // offset + token·token_stride + head·head_stride + i

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.y * groups.x + group.x) * WORKGROUP + lane;
    let pairs = params.d_rope / 2u;
    let pair = index % pairs;
    let head = index / pairs % params.n_head;
    let token = index / pairs / params.n_head;
    if (token >= params.tokens) {
        return;
    }
    let base = params.offset + token * params.token_stride + head * params.head_stride;
    let first = base + select(pair, 2u * pair, INTERLEAVE == 1u);
    let second = select(first + pairs, first + 1u, INTERLEAVE == 1u);
    let turn = rotations[token * pairs + pair];
    let a = values[first];
    let b = values[second];
    values[first] = a * turn.x - b * turn.y;
    values[second] = a * turn.y + b * turn.x;
}

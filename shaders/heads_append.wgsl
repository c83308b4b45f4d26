// Writes keys and values of new tokens to their cache rows, keys rotated, in 16-byte stores; rotates the queries that stand beside
// them. Eight elements of a head per invocation.
//
//   q[t, h] = RoPE_t(N(x_q[t, h]))    cache[slots[t] − first_slot, g] = (RoPE_t(N(x_k[t, g])), x_v[t, g])
//   N(x) = x / √(mean(x²) + eps) · weight, with one weight for queries and one for keys, where NORM is 1; else N(x) = x
//
// RoPE rotates the pairs (2i, 2i+1): a layer whose pairs are half a head apart brings them together when it uploads its weights.
// Its padding is turned by (1, 0), and zeros stay zeros.
// f16 storage saturates: finite values beyond ±65504 become ±65504. NaN stays NaN, so that a broken model shows.
// Rows of the cache that are not bound are left out: a cache over one binding takes a dispatch per part that new tokens touch.
// Every invocation of a head sums its squares by itself, in the same order: head_dim / 8 times the loads, of a line that its
// neighbours read, and no barrier. Padding is 0 and is not counted.
// grid: one invocation per eight elements of x, folded into x and y.
//
// Floor: the bytes: x once, q once, keys and values once in their storage, over the copy rate. Nothing else limits it but, in
// software, the rounding to halves; decode steps are so small that the launch does.
// Not run on a GPU yet.
// Static (RDNA3, Mesa 25), at most: 36 registers, no workgroup memory, nothing spilled.

override CACHE_F16: u32 = 0u;
override NORM: u32 = 0u;         // 1: heads of queries and keys are normed
override INTEGERS: u32 = 0u;     // 1: integer arithmetic rounds halves
override WORKGROUP: u32 = 64u;

struct Params {
    tokens: u32,
    n_head: u32,
    n_kv_head: u32,
    head_dim: u32,      // a multiple of 8
    first_slot: u32,    // cache row that `cache` begins with
    cache_rows: u32,    // rows of `cache`
    used: u32,          // elements of a head without its padding
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;             // [tokens, n_head + 2 · n_kv_head, head_dim] / 4
@group(0) @binding(2) var<storage, read> rotations: array<vec4<f32>>;     // [tokens, head_dim / 4] (cos, sin) of two pairs
@group(0) @binding(3) var<storage, read> slots: array<u32>;               // [tokens] cache rows
@group(0) @binding(4) var<storage, read> norms: array<vec4<f32>>;         // [queries, keys], head_dim / 4 each
@group(0) @binding(5) var<storage, read_write> q: array<vec4<f32>>;       // [tokens, n_head, head_dim] / 4
@group(0) @binding(6) var<storage, read_write> cache: array<vec4<u32>>;   // [cache rows, n_kv_head, key, value], head_dim / 4 each, f16: / 8

// Two halves in a word; finite values beyond f16 become its largest. NaN and infinities stay what they are. Bits tell them apart,
// since compilers take `v != v` for false, and bits are written, since WGSL leaves pack2x16float of them open: one driver takes
// infinities for NaN and lets a NaN reach the other half.
fn pack(a: f32, b: f32) -> u32 {
    let v = vec2<f32>(a, b);
    let bits = bitcast<vec2<u32>>(v);
    let size = bits & vec2<u32>(0x7fffffffu);
    let finite = size < vec2<u32>(0x7f800000u);
    let packed = pack2x16float(select(vec2<f32>(0.0), clamp(v, vec2<f32>(-65504.0), vec2<f32>(65504.0)), finite));
    let sign = (bits >> vec2<u32>(16u)) & vec2<u32>(0x8000u);
    let odd = select(sign | vec2<u32>(0x7c00u) | min(size - vec2<u32>(0x7f800000u), vec2<u32>(0x200u)), vec2<u32>(0u), finite);
    return packed | odd.x | (odd.y << 16u);
}

// Four halves in the low bits of words, by integer arithmetic: what `pack` gives where the driver rounds as IEEE 754 says, to
// nearest and ties to even. Faster where the device has no instruction for it.
fn halves_of(v: vec4<f32>) -> vec4<u32> {
    let bits = bitcast<vec4<u32>>(v);
    let size = bits & vec4<u32>(0x7fffffffu);
    // The largest exponent: infinity or NaN.
    let odd = vec4<u32>(0x7c00u) | min(size - vec4<u32>(0x7f800000u), vec4<u32>(0x200u));
    // Below 2^-14: the last place of 0.5 in f32 is that of the smallest half, so the addition rounds to even.
    let small = bitcast<vec4<u32>>(bitcast<vec4<f32>>(size) + vec4<f32>(0.5)) - vec4<u32>(0x3f000000u);
    // Half a last place, less the smallest step where the last place is even: ties go to even.
    let up = vec4<u32>(0xfffu) + ((size >> vec4<u32>(13u)) & vec4<u32>(1u));
    let normal = min((size - vec4<u32>(0x38000000u) + up) >> vec4<u32>(13u), vec4<u32>(0x7bffu));
    let finite = select(normal, small, size < vec4<u32>(0x38800000u));
    return select(finite, odd, size >= vec4<u32>(0x7f800000u)) | ((bits >> vec4<u32>(16u)) & vec4<u32>(0x8000u));
}

// 16 bytes of a cache row; `more` is their second half in f16 storage.
fn stored(v: vec4<f32>, more: vec4<f32>) -> vec4<u32> {
    if (CACHE_F16 == 1u) {
        if (INTEGERS == 1u) {
            let low = halves_of(v);
            let high = halves_of(more);
            return vec4<u32>(low.xz | (low.yw << vec2<u32>(16u)), high.xz | (high.yw << vec2<u32>(16u)));
        }
        return vec4<u32>(pack(v.x, v.y), pack(v.z, v.w), pack(more.x, more.y), pack(more.z, more.w));
    }
    return bitcast<vec4<u32>>(v);
}

// Pairs (x, y) and (z, w), rotated by (cos, sin, cos, sin).
fn rotated(v: vec4<f32>, by: vec4<f32>) -> vec4<f32> {
    return v.xxzz * by + v.yyww * by.yxwz * vec4<f32>(-1.0, 1.0, -1.0, 1.0);
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP + lane;
    let units = params.head_dim / 8u;
    let row = (params.n_head + 2u * params.n_kv_head) * units;
    let token = i / row;
    if (token >= params.tokens) {
        return;
    }
    let head = i % row / units;
    let part = i % units;
    var first = x[2u * i];
    var second = x[2u * i + 1u];
    // Values are not turned.
    if (head < params.n_head + params.n_kv_head) {
        if (NORM == 1u) {
            let head_at = 2u * (i - part);
            var squares = 0.0;
            for (var k = 0u; k < 2u * units; k++) {
                let v = x[head_at + k];
                squares += dot(v, v);
            }
            let scale = inverseSqrt(squares / f32(params.used) + params.eps);
            let weight = 2u * (part + select(0u, units, head >= params.n_head));
            first *= scale * norms[weight];
            second *= scale * norms[weight + 1u];
        }
        let turn = (token * units + part) * 2u;
        first = rotated(first, rotations[turn]);
        second = rotated(second, rotations[turn + 1u]);
    }
    if (head < params.n_head) {
        let to = ((token * params.n_head + head) * units + part) * 2u;
        q[to] = first;
        q[to + 1u] = second;
        return;
    }
    // Wraps for rows before the first, so that they are beyond the last.
    let slot = slots[token] - params.first_slot;
    if (slot >= params.cache_rows) {
        return;
    }
    let of_kv = head - params.n_head;
    let is_value = of_kv / params.n_kv_head;
    let kv_head = of_kv % params.n_kv_head;
    let to = ((slot * params.n_kv_head + kv_head) * 2u + is_value) * units + part;
    if (CACHE_F16 == 1u) {
        cache[to] = stored(first, second);
    } else {
        cache[2u * to] = stored(first, first);
        cache[2u * to + 1u] = stored(second, second);
    }
}

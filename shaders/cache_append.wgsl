// Writes latents and rotary keys of new tokens to their cache rows. Rotates the keys on the way and the queries in place, in
// 16-byte loads and stores.
//
//   latents[slots[t], :] = latent[t, :]    rotary keys[slots[t], :] = RoPE_t(k_R[t, :])    q_R[t, h] ← RoPE_t(q_R[t, h])
//
// RoPE rotates the pairs (2i, 2i+1): a layer whose pairs are half a head apart brings them together when it uploads its weights.
// f16 storage saturates: finite values beyond ±65504 become ±65504. NaN stays NaN, so that a broken model shows.
// grid: one workgroup per WORKGROUP / LANES items, folded into x and y; items are the tokens, then the heads of all tokens.
//
// Results, interleaved runs on lavapipe (2 cores), 16 384 tokens of 64 + 64, per cent of the copy kernel: in f16
// 8 invocations with an item each 76, with rotation 72; with pack2x16float in place of integers 55, before halves of
// infinities and NaN were written as bits. f32 84. 8 invocations that share an item: 23 in f16, 73 in f32. Not run on a GPU yet.

override STORAGE_F16: u32 = 0u;
override ROTATE: u32 = 0u;       // 1: keys and queries are rotated
override WORKGROUP: u32 = 64u;
override LANES: u32 = 16u;       // invocations that share an item; a power of two
override INTEGERS: u32 = 0u;     // 1: integer arithmetic rounds halves
// 16-byte loads for one store.
override LOADS: u32 = 1u + STORAGE_F16;

struct Params {
    tokens: u32,
    d_latent: u32,
    latent_offset: u32,
    latent_row: u32,     // elements from one token to the next; rope_row and q_row likewise
    latent_words: u32,   // words of a latent cache row
    d_rope: u32,
    rope_offset: u32,
    rope_row: u32,
    rope_words: u32,     // words of a rope cache row
    rope_cache: u32,     // first word of the rotary keys in `cache`
    q_heads: u32,        // heads to rotate; 0 for none
    q_offset: u32,
    q_row: u32,
    q_head: u32,         // elements from one head to the next
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> latent: array<vec4<f32>>;        // (latent_offset + t·latent_row + i) / 4
@group(0) @binding(2) var<storage, read> rope_key: array<vec4<f32>>;      // (rope_offset + t·rope_row + i) / 4
@group(0) @binding(3) var<storage, read> rotations: array<vec4<f32>>;     // [tokens, d_rope / 4] (cos, sin) of two pairs
@group(0) @binding(4) var<storage, read> slots: array<u32>;               // [tokens] cache rows
@group(0) @binding(5) var<storage, read_write> cache: array<vec4<u32>>;   // [cache rows, latent_words] / 4, [cache rows, rope_words] / 4
@group(0) @binding(6) var<storage, read_write> q: array<vec4<f32>>;       // (q_offset + t·q_row + h·q_head + i) / 4

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
    if (STORAGE_F16 == 1u) {
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

// Vector i of a token's key, rotated.
fn key(token: u32, i: u32) -> vec4<f32> {
    let v = rope_key[(params.rope_offset + token * params.rope_row) / 4u + i];
    if (ROTATE == 0u) {
        return v;
    }
    return rotated(v, rotations[token * (params.d_rope / 4u) + i]);
}

// Latent and rotary key of a token.
fn append(token: u32, part: u32) {
    let slot = slots[token];
    let source = (params.latent_offset + token * params.latent_row) / 4u;
    let latents = params.latent_words / 4u;
    for (var i = part; i < latents; i += LANES) {
        let first = latent[source + i * LOADS];
        var second = first;
        if (STORAGE_F16 == 1u) {
            second = latent[source + i * LOADS + 1u];
        }
        cache[slot * latents + i] = stored(first, second);
    }
    let keys = params.rope_words / 4u;
    let keys_at = params.rope_cache / 4u + slot * keys;
    for (var i = part; i < keys; i += LANES) {
        let first = key(token, i * LOADS);
        var second = first;
        if (STORAGE_F16 == 1u) {
            second = key(token, i * LOADS + 1u);
        }
        cache[keys_at + i] = stored(first, second);
    }
}

// Rotary part of one head, in place.
fn rotate_head(token: u32, head: u32, part: u32) {
    let base = (params.q_offset + token * params.q_row + head * params.q_head) / 4u;
    let rotation = token * (params.d_rope / 4u);
    for (var i = part; i < params.d_rope / 4u; i += LANES) {
        q[base + i] = rotated(q[base + i], rotations[rotation + i]);
    }
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let item = (group.y * groups.x + group.x) * (WORKGROUP / LANES) + lane / LANES;
    let part = lane % LANES;
    if (item < params.tokens) {
        append(item, part);
        return;
    }
    let head = item - params.tokens;
    if (head < params.tokens * params.q_heads) {
        rotate_head(head / params.q_heads, head % params.q_heads, part);
    }
}

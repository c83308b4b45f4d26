// Writes the latents and rotary keys of new tokens to their rows of the cache, rotates the keys on the way and the queries
// in place.
//
//   latents[slots[t], :] = latent[t, :]    rotary keys[slots[t], :] = RoPE_t(k_R[t, :])    q_R[t, h] ← RoPE_t(q_R[t, h])
//
// Rows of the cache are padded with zeros to 16 bytes, so that an invocation always owns whole words. In f16 storage
// finite values beyond ±65504 are stored as ±65504; NaN stays NaN, so that a broken model shows.
// grid: one invocation a word (latent words and rope words of every token), then one a pair of every head of every token,
// folded into x and y.

override STORAGE_F16: u32 = 0u;
override ROTATE: u32 = 0u;       // 0 not at all, 1 pairs (2i, 2i+1), 2 pairs (i, i + d_rope/2)
override WORKGROUP: u32 = 64u;

struct Params {
    tokens: u32,
    d_latent: u32,
    latent_offset: u32,
    latent_row: u32,
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
@group(0) @binding(1) var<storage, read> latent: array<f32>;              // latent_offset + t·latent_row + i
@group(0) @binding(2) var<storage, read> rope_key: array<f32>;            // rope_offset + t·rope_row + i
@group(0) @binding(3) var<storage, read> rotations: array<vec2<f32>>;     // [tokens, d_rope / 2] (cos, sin)
@group(0) @binding(4) var<storage, read> slots: array<u32>;               // [tokens] rows of the cache
@group(0) @binding(5) var<storage, read_write> cache: array<u32>;         // [cache rows, latent_words], [cache rows, rope_words]
@group(0) @binding(6) var<storage, read_write> q: array<f32>;             // q_offset + t·q_row + h·q_head + i

fn latent_at(token: u32, i: u32) -> f32 {
    if (i >= params.d_latent) {
        return 0.0;
    }
    return latent[params.latent_offset + token * params.latent_row + i];
}

fn rope_at(token: u32, i: u32) -> f32 {
    if (i >= params.d_rope) {
        return 0.0;
    }
    let base = params.rope_offset + token * params.rope_row;
    if (ROTATE == 0u) {
        return rope_key[base + i];
    }
    let pairs = params.d_rope / 2u;
    var pair = i / 2u;
    var first = base + 2u * pair;
    var step = 1u;
    if (ROTATE == 2u) {
        pair = i % pairs;
        first = base + pair;
        step = pairs;
    }
    let turn = rotations[token * pairs + pair];
    let a = rope_key[first];
    let b = rope_key[first + step];
    return select(a * turn.y + b * turn.x, a * turn.x - b * turn.y, base + i == first);
}

// Two halves in a word. Beyond f16: its largest value. NaN and infinities stay what they are; they are told by their bits, since
// compilers take `v != v` for false, and written as bits, since WGSL leaves open what pack2x16float makes of them: one driver
// takes infinities for NaN and lets a NaN reach the other half.
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

// Rotates one pair of a head in place.
fn rotate(index: u32) {
    let pairs = params.d_rope / 2u;
    let pair = index % pairs;
    let head = index / pairs % params.q_heads;
    let token = index / pairs / params.q_heads;
    if (token >= params.tokens) {
        return;
    }
    let base = params.q_offset + token * params.q_row + head * params.q_head;
    let first = base + select(pair, 2u * pair, ROTATE == 1u);
    let second = select(first + pairs, first + 1u, ROTATE == 1u);
    let turn = rotations[token * pairs + pair];
    let a = q[first];
    let b = q[second];
    q[first] = a * turn.x - b * turn.y;
    q[second] = a * turn.y + b * turn.x;
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.y * groups.x + group.x) * WORKGROUP + lane;
    let words = params.latent_words + params.rope_words;
    let token = index / words;
    if (token >= params.tokens) {
        if (params.q_heads > 0u && params.d_rope > 0u) {
            rotate(index - params.tokens * words);
        }
        return;
    }
    let slot = slots[token];
    var word = index % words;
    if (word < params.latent_words) {
        let to = slot * params.latent_words + word;
        if (STORAGE_F16 == 1u) {
            cache[to] = pack(latent_at(token, 2u * word), latent_at(token, 2u * word + 1u));
        } else {
            cache[to] = bitcast<u32>(latent_at(token, word));
        }
        return;
    }
    word -= params.latent_words;
    let to = params.rope_cache + slot * params.rope_words + word;
    if (STORAGE_F16 == 1u) {
        cache[to] = pack(rope_at(token, 2u * word), rope_at(token, 2u * word + 1u));
    } else {
        cache[to] = bitcast<u32>(rope_at(token, word));
    }
}

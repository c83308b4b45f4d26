// Attention of one query per sequence straight over the cached latents (weight absorption of DeepSeek-V2, §2.1.2): the
// query is already multiplied by the key projection, and the weighted latents are multiplied by the value projection after.
//
//   s_j = scale · (a[h] · c_j + q_R[h] · k_R_j)    m = max_j s_j    l = Σ_j e^(s_j−m)    values[h] = Σ_j e^(s_j−m) c_j
//
// Four heads share a workgroup, so that a row of the cache is read once for four heads. Splits as in attention_decode.
// grid: (splits, ⌈n_head / 4⌉, 1)

override STORAGE_F16: u32 = 0u;
override WORKGROUP: u32 = 64u;
override SPLIT: u32 = 256u;      // at most 4 · WORKGROUP: an invocation owns up to 4 rows
override CHUNK: u32 = 128u;      // query elements staged at once

const LOWEST: f32 = -3.4028234e38;

struct Params {
    n_head: u32,
    d_latent: u32,
    d_nope: u32,
    d_rope: u32,
    n_sequence: u32,
    latent_pitch: u32,  // elements of a latent cache row
    rope_pitch: u32,    // elements of a rope cache row
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> absorbed: array<f32>;                     // [tokens, n_head, d_latent]
@group(0) @binding(2) var<storage, read> q: array<f32>;                            // [tokens, n_head, d_nope + d_rope], rotated
@group(0) @binding(3) var<storage, read> latent_cache: array<u32>;                 // [cache rows, latent_pitch]
@group(0) @binding(4) var<storage, read> rope_cache: array<u32>;                   // [cache rows, rope_pitch]
@group(0) @binding(5) var<storage, read> sequences: array<vec4<u32>>;              // [n_sequence] (first row, first cache row, length, token)
@group(0) @binding(6) var<storage, read_write> partial_values: array<f32>;         // [splits, n_head, d_latent]
@group(0) @binding(7) var<storage, read_write> partial_softmax: array<vec2<f32>>;  // [splits, n_head] (m, l)

var<workgroup> sh_query: array<vec4<f32>, CHUNK>;        // four heads of one query element
var<workgroup> sh_score: array<vec4<f32>, SPLIT>;
var<workgroup> sh_reduce: array<vec4<f32>, WORKGROUP>;

// Word that holds element i of a tensor in f32 or f16 storage.
fn word_of(i: u32) -> u32 {
    return select(i, i >> 1u, STORAGE_F16 == 1u);
}

// Element i, given the word that holds it.
fn decode(word: u32, i: u32) -> f32 {
    if (STORAGE_F16 == 1u) {
        let pair = unpack2x16float(word);
        return select(pair.x, pair.y, (i & 1u) == 1u);
    }
    return bitcast<f32>(word);
}

// Index of the last sequence that begins at or before `row`.
fn sequence_of(row: u32, n_sequence: u32) -> u32 {
    var low = 0u;
    var high = n_sequence;
    while (high - low > 1u) {
        let middle = (low + high) / 2u;
        if (sequences[middle].x <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// Element d of the absorbed query, then of its rotary part; heads past the end repeat the last one and are not stored.
fn query_element(token: u32, head: u32, d: u32) -> f32 {
    let row = token * params.n_head + min(head, params.n_head - 1u);
    if (d < params.d_latent) {
        return params.scale * absorbed[row * params.d_latent + d];
    }
    return params.scale * q[row * (params.d_nope + params.d_rope) + params.d_nope + d - params.d_latent];
}

fn key_element(slot: u32, d: u32) -> f32 {
    if (d < params.d_latent) {
        let i = slot * params.latent_pitch + d;
        return decode(latent_cache[word_of(i)], i);
    }
    let i = slot * params.rope_pitch + d - params.d_latent;
    return decode(rope_cache[word_of(i)], i);
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row0 = group.x * SPLIT;
    let sequence = sequences[sequence_of(row0, params.n_sequence)];
    let head0 = group.y * 4u;
    let d_key = params.d_latent + params.d_rope;
    let position0 = row0 - sequence.x;
    let count = min(max(sequence.z, position0) - position0, SPLIT);
    let slot0 = sequence.y + position0;
    let token = sequence.w;

    var dots: array<vec4<f32>, 4>;
    for (var r = 0u; r < 4u; r++) {
        dots[r] = vec4<f32>(0.0);
    }
    for (var d0 = 0u; d0 < d_key; d0 += CHUNK) {
        let width = min(CHUNK, d_key - d0);
        for (var d = lane; d < width; d += WORKGROUP) {
            sh_query[d] = vec4<f32>(
                query_element(token, head0, d0 + d),
                query_element(token, head0 + 1u, d0 + d),
                query_element(token, head0 + 2u, d0 + d),
                query_element(token, head0 + 3u, d0 + d),
            );
        }
        workgroupBarrier();
        for (var r = 0u; r < 4u; r++) {
            let row = lane + r * WORKGROUP;
            if (row < count) {
                for (var d = 0u; d < width; d++) {
                    dots[r] += key_element(slot0 + row, d0 + d) * sh_query[d];
                }
            }
        }
        workgroupBarrier();
    }

    var best = vec4<f32>(LOWEST);
    for (var r = 0u; r < 4u; r++) {
        let row = lane + r * WORKGROUP;
        if (row < count) {
            sh_score[row] = dots[r];
            best = max(best, dots[r]);
        }
    }
    sh_reduce[lane] = best;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            sh_reduce[lane] = max(sh_reduce[lane], sh_reduce[lane + half]);
        }
        workgroupBarrier();
    }
    best = sh_reduce[0];
    workgroupBarrier();

    var sum = vec4<f32>(0.0);
    for (var row = lane; row < count; row += WORKGROUP) {
        let p = exp(sh_score[row] - best);
        sh_score[row] = p;
        sum += p;
    }
    sh_reduce[lane] = sum;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            sh_reduce[lane] += sh_reduce[lane + half];
        }
        workgroupBarrier();
    }

    let heads = min(params.n_head - head0, 4u);
    let split = group.x * params.n_head + head0;
    for (var column = lane; column < params.d_latent; column += WORKGROUP) {
        var value = vec4<f32>(0.0);
        for (var row = 0u; row < count; row++) {
            value += sh_score[row] * key_element(slot0 + row, column);
        }
        for (var h = 0u; h < heads; h++) {
            partial_values[(split + h) * params.d_latent + column] = value[h];
        }
    }
    if (lane < heads) {
        partial_softmax[split + lane] = vec2<f32>(best[lane], sh_reduce[0][lane]);
    }
}

// Causal attention of a tile of queries over a tile of rebuilt keys and values, with a running softmax in f32.
//
//   s_j = scale · (q_C · k_C_j + q_R · k_R_j)   for keys at or before the query
//   m' = max(m, max_j s_j)   l' = l·e^(m−m') + Σ_j e^(s_j−m')   values' = values·e^(m−m') + Σ_j e^(s_j−m') v_j
//
// The key tile holds rows [kv_first, kv_first + kv_rows) of the step's row numbering (see cache_read). Tiles follow one
// another: the first starts from the empty state (m = lowest f32, l = 0), the last divides by l; a query without any key
// gives 0. lse = m + ln l, natural logarithm.
// grid: (query tiles, n_head, ⌈d_value / SLICE⌉); LANES invocations share a query.

override STORAGE_F16: u32 = 0u;
override FIRST: u32 = 1u;                        // start from the empty state
override LAST: u32 = 1u;                         // normalise
override WORKGROUP: u32 = 64u;
override LANES: u32 = 4u;
override CHUNK: u32 = 16u;                       // key elements staged at once
override TILE_Q: u32 = WORKGROUP / LANES;
override TILE_KV: u32 = LANES * 8u;              // 8 keys a lane
override SLICE: u32 = LANES * 16u;               // 16 value columns a lane
override CHUNK_PITCH: u32 = CHUNK + 1u;
override SCORE_PITCH: u32 = TILE_KV + 1u;

const LOWEST: f32 = -3.4028234e38;

struct Params {
    n_head: u32,
    d_nope: u32,
    d_rope: u32,
    d_value: u32,
    kv_first: u32,
    kv_rows: u32,
    rope_pitch: u32,   // elements of a rope cache row
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<f32>;                     // [tokens, n_head, d_nope + d_rope], rotated
@group(0) @binding(2) var<storage, read> kv: array<f32>;                    // [kv_rows, n_head, d_nope + d_value]
@group(0) @binding(3) var<storage, read> rope_cache: array<u32>;            // [cache rows, rope_pitch]
@group(0) @binding(4) var<storage, read> queries: array<vec4<u32>>;         // [query tiles] (first token, count, its position, sequence)
@group(0) @binding(5) var<storage, read> sequences: array<vec4<u32>>;       // [n_sequence] (first row, first cache row, length, token)
@group(0) @binding(6) var<storage, read_write> values: array<f32>;          // [tokens, n_head, d_value]
@group(0) @binding(7) var<storage, read_write> softmax: array<vec2<f32>>;   // [tokens, n_head, slices] (m, l)

var<workgroup> sh_q: array<f32, TILE_Q * CHUNK_PITCH>;
var<workgroup> sh_k: array<f32, TILE_KV * CHUNK_PITCH>;
var<workgroup> sh_score: array<f32, TILE_Q * SCORE_PITCH>;
var<workgroup> sh_v: array<f32, TILE_KV * SLICE>;

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

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let tile = queries[group.x];
    let sequence = sequences[tile.w];
    let head = group.y;
    let d_query = params.d_nope + params.d_rope;
    let d_head = params.d_nope + params.d_value;
    let kv_row = params.n_head * d_head;

    let own = lane / LANES;            // the query of this invocation, within the tile
    let part = lane % LANES;
    let live = own < tile.y;
    let position = tile.z + own;
    let token = tile.x + min(own, tile.y - 1u);
    let column0 = group.z * SLICE;

    // Keys of this tile that belong to the sequence and that the last query of the tile may see.
    let tile_end = params.kv_first + params.kv_rows;
    let begin = max(params.kv_first, sequence.x) - sequence.x;
    var end = 0u;
    if (tile_end > sequence.x) {
        end = min(min(tile_end - sequence.x, sequence.z), tile.z + tile.y);
    }

    let state = (token * params.n_head + head) * groups.z + group.z;
    let out = (token * params.n_head + head) * params.d_value;
    var best = LOWEST;
    var sum = 0.0;
    var acc: array<f32, 16>;
    for (var c = 0u; c < 16u; c++) {
        acc[c] = 0.0;
    }
    if (FIRST == 0u) {
        best = softmax[state].x;
        sum = softmax[state].y;
        for (var c = 0u; c < 16u; c++) {
            let column = column0 + part + c * LANES;
            if (column < params.d_value) {
                acc[c] = values[out + column];
            }
        }
    }

    for (var key0 = begin; key0 < end; key0 += TILE_KV) {
        let kv_base = (sequence.x + key0 - params.kv_first) * kv_row + head * d_head;
        var score: array<f32, 8>;
        for (var j = 0u; j < 8u; j++) {
            score[j] = 0.0;
        }
        for (var d0 = 0u; d0 < d_query; d0 += CHUNK) {
            for (var e = lane; e < TILE_Q * CHUNK; e += WORKGROUP) {
                let d = d0 + e % CHUNK;
                let row = e / CHUNK;
                var value = 0.0;
                if (d < d_query && row < tile.y) {
                    value = params.scale * q[((tile.x + row) * params.n_head + head) * d_query + d];
                }
                sh_q[row * CHUNK_PITCH + e % CHUNK] = value;
            }
            for (var e = lane; e < TILE_KV * CHUNK; e += WORKGROUP) {
                let d = d0 + e % CHUNK;
                let row = e / CHUNK;
                var value = 0.0;
                if (d < d_query && key0 + row < end) {
                    if (d < params.d_nope) {
                        value = kv[kv_base + row * kv_row + d];
                    } else {
                        let i = (sequence.y + key0 + row) * params.rope_pitch + d - params.d_nope;
                        value = decode(rope_cache[word_of(i)], i);
                    }
                }
                sh_k[row * CHUNK_PITCH + e % CHUNK] = value;
            }
            workgroupBarrier();
            for (var d = 0u; d < CHUNK; d++) {
                let qd = sh_q[own * CHUNK_PITCH + d];
                for (var j = 0u; j < 8u; j++) {
                    score[j] += qd * sh_k[(part + j * LANES) * CHUNK_PITCH + d];
                }
            }
            workgroupBarrier();
        }
        for (var j = 0u; j < 8u; j++) {
            sh_score[own * SCORE_PITCH + part + j * LANES] = score[j];
        }
        for (var e = lane; e < TILE_KV * SLICE; e += WORKGROUP) {
            let row = e / SLICE;
            let column = column0 + e % SLICE;
            var value = 0.0;
            if (column < params.d_value && key0 + row < end) {
                value = kv[kv_base + row * kv_row + params.d_nope + column];
            }
            sh_v[e] = value;
        }
        workgroupBarrier();

        // Keys of this block that the own query sees: none for a query before the block.
        let seen = min(max(position + 1u, key0) - key0, min(end - key0, TILE_KV));
        var block_best = LOWEST;
        for (var k = 0u; k < seen; k++) {
            block_best = max(block_best, sh_score[own * SCORE_PITCH + k]);
        }
        let next = max(best, block_best);
        let shrink = exp(best - next);
        sum *= shrink;
        for (var c = 0u; c < 16u; c++) {
            acc[c] *= shrink;
        }
        for (var k = 0u; k < seen; k++) {
            let p = exp(sh_score[own * SCORE_PITCH + k] - next);
            sum += p;
            for (var c = 0u; c < 16u; c++) {
                acc[c] += p * sh_v[k * SLICE + part + c * LANES];
            }
        }
        best = next;
        workgroupBarrier();
    }

    if (live) {
        var factor = 1.0;
        if (LAST == 1u) {
            factor = select(0.0, 1.0 / sum, sum > 0.0);
        }
        for (var c = 0u; c < 16u; c++) {
            let column = column0 + part + c * LANES;
            if (column < params.d_value) {
                values[out + column] = acc[c] * factor;
            }
        }
        if (part == 0u) {
            softmax[state] = vec2<f32>(best, sum);
        }
    }
}

// attention_prefill without workgroup memory and for any widths: the same inputs, the same state, the same results.
//
//   s_j = scale · (q_C · k_C_j + q_R · k_R_j)   for keys at or before the query
//   m' = max(m, max_j s_j)   l' = l·e^(m−m') + Σ_j e^(s_j−m')   values' = values·e^(m−m') + Σ_j e^(s_j−m') v_j
//
// An invocation owns 8 queries and walks the keys in blocks of 16, whose scores stay in registers; the running sums stay in
// `values`. No invocation waits for another.
// grid: (query tiles, n_head, ⌈d_value / SLICE⌉)
//
// Results, on lavapipe (Mesa 25, 2 cores shared with other work), medians in turns:
//   for attention_prefill of one float a load, at 5 heads of 37 + 6, 75: 3.5×
//   KEYS 16 → 8: 0.9×. Queries or running sums in private arrays: the shader compiles for 15 s and more

override STORAGE_F16: u32 = 0u;
override WORKGROUP: u32 = 8u;
override SLICE: u32 = 128u;

const LOWEST: f32 = -3.4028234e38;
const KEYS: u32 = 16u;

struct Params {
    n_head: u32,
    d_nope: u32,
    d_rope: u32,
    d_value: u32,
    kv_first: u32,
    kv_rows: u32,
    rope_pitch: u32,   // elements of a rope cache row
    scale: f32,
    first: u32,        // 1: start from the empty state
    last: u32,         // 1: normalise
    tiles_x: u32,
    tiles_y: u32,
    tiles_z: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<f32>;                     // [tokens, n_head, d_nope + d_rope], rotated
@group(0) @binding(2) var<storage, read> kv: array<f32>;                    // [kv_rows, n_head, d_nope + d_value]
@group(0) @binding(3) var<storage, read> rope_cache: array<u32>;            // [cache rows, rope_pitch]
@group(0) @binding(4) var<storage, read> queries: array<vec4<u32>>;         // [query tiles] (first token, count, its position, sequence)
@group(0) @binding(5) var<storage, read> sequences: array<vec4<u32>>;       // [n_sequence] (first row, first cache row, length, token)
@group(0) @binding(6) var<storage, read_write> values: array<f32>;          // [tokens, n_head, d_value]
@group(0) @binding(7) var<storage, read_write> softmax: array<vec2<f32>>;   // [tokens, n_head, slices] (m, l)

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

// An element of four queries, scaled.
fn query_four(i: vec4<u32>) -> vec4<f32> {
    return params.scale * vec4<f32>(q[i.x], q[i.y], q[i.z], q[i.w]);
}

// A running sum of four queries.
fn value_four(i: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(values[i.x], values[i.y], values[i.z], values[i.w]);
}

// The tile of a workgroup: a grid over 65 535 comes folded into x and y.
fn unfold(group: vec3<u32>, groups: vec3<u32>) -> vec3<u32> {
    let tiles = vec3<u32>(params.tiles_x, params.tiles_y, params.tiles_z);
    if (all(groups == tiles)) {
        return group;
    }
    let i = group.y * groups.x + group.x;
    return vec3<u32>(i % tiles.x, i / tiles.x % tiles.y, i / (tiles.x * tiles.y));
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let work = unfold(group, groups);
    if (work.z >= params.tiles_z) {
        return;
    }
    let tile = queries[work.x];
    let own = lane * 8u;                   // queries own to own + 7 of the tile: a and b, four each
    if (own >= tile.y) {
        return;
    }
    let sequence = sequences[tile.w];
    let head = work.y;
    let d_query = params.d_nope + params.d_rope;
    let d_head = params.d_nope + params.d_value;
    let kv_row = params.n_head * d_head;
    let column0 = work.z * SLICE;
    let columns = min(column0 + SLICE, params.d_value);

    // Past the tile an invocation repeats the last query, and stores nothing.
    let fours = vec4<u32>(0u, 1u, 2u, 3u);
    let last = vec4<u32>(tile.y - 1u);
    let mine_a = min(own + fours, last);
    let mine_b = min(own + 4u + fours, last);
    let row_a = (tile.x + mine_a) * params.n_head + head;
    let row_b = (tile.x + mine_b) * params.n_head + head;
    let state_a = row_a * params.tiles_z + work.z;
    let state_b = row_b * params.tiles_z + work.z;
    let out_a = row_a * params.d_value;
    let out_b = row_b * params.d_value;

    // Keys of this tile that belong to the sequence and that the last of the queries may see.
    let tile_end = params.kv_first + params.kv_rows;
    let begin = max(params.kv_first, sequence.x) - sequence.x;
    var end = 0u;
    if (tile_end > sequence.x) {
        end = min(min(tile_end - sequence.x, sequence.z), tile.z + min(tile.y, own + 8u));
    }
    let end_a = min(tile.z + mine_a + 1u, vec4<u32>(end));
    let end_b = min(tile.z + mine_b + 1u, vec4<u32>(end));

    var best_a = vec4<f32>(LOWEST);
    var best_b = vec4<f32>(LOWEST);
    var sum_a = vec4<f32>(0.0);
    var sum_b = vec4<f32>(0.0);
    var fresh = params.first == 1u;
    if (!fresh) {
        best_a = vec4<f32>(softmax[state_a.x].x, softmax[state_a.y].x, softmax[state_a.z].x, softmax[state_a.w].x);
        best_b = vec4<f32>(softmax[state_b.x].x, softmax[state_b.y].x, softmax[state_b.z].x, softmax[state_b.w].x);
        sum_a = vec4<f32>(softmax[state_a.x].y, softmax[state_a.y].y, softmax[state_a.z].y, softmax[state_a.w].y);
        sum_b = vec4<f32>(softmax[state_b.x].y, softmax[state_b.y].y, softmax[state_b.z].y, softmax[state_b.w].y);
    }

    for (var key0 = begin; key0 < end; key0 += KEYS) {
        var score_a: array<vec4<f32>, KEYS>;
        var score_b: array<vec4<f32>, KEYS>;
        for (var j = 0u; j < KEYS; j++) {
            score_a[j] = vec4<f32>(0.0);
            score_b[j] = vec4<f32>(0.0);
        }
        // Past the last key a block repeats it, and masks it.
        let row0 = sequence.x + key0 - params.kv_first;
        let most = end - 1u - key0;
        for (var d = 0u; d < params.d_nope; d++) {
            let q_a = query_four(row_a * d_query + d);
            let q_b = query_four(row_b * d_query + d);
            for (var j = 0u; j < KEYS; j++) {
                let k = kv[(row0 + min(j, most)) * kv_row + head * d_head + d];
                score_a[j] += q_a * k;
                score_b[j] += q_b * k;
            }
        }
        for (var d = 0u; d < params.d_rope; d++) {
            let q_a = query_four(row_a * d_query + params.d_nope + d);
            let q_b = query_four(row_b * d_query + params.d_nope + d);
            for (var j = 0u; j < KEYS; j++) {
                let i = (sequence.y + key0 + min(j, most)) * params.rope_pitch + d;
                let k = decode(rope_cache[word_of(i)], i);
                score_a[j] += q_a * k;
                score_b[j] += q_b * k;
            }
        }

        var next_a = best_a;
        var next_b = best_b;
        for (var j = 0u; j < KEYS; j++) {
            next_a = select(next_a, max(next_a, score_a[j]), vec4<u32>(key0 + j) < end_a);
            next_b = select(next_b, max(next_b, score_b[j]), vec4<u32>(key0 + j) < end_b);
        }
        let shrink_a = exp(best_a - next_a);
        let shrink_b = exp(best_b - next_b);
        sum_a *= shrink_a;
        sum_b *= shrink_b;
        best_a = next_a;
        best_b = next_b;
        let zero = vec4<f32>(0.0);
        for (var j = 0u; j < KEYS; j++) {
            score_a[j] = select(zero, exp(score_a[j] - next_a), vec4<u32>(key0 + j) < end_a);
            score_b[j] = select(zero, exp(score_b[j] - next_b), vec4<u32>(key0 + j) < end_b);
            sum_a += score_a[j];
            sum_b += score_b[j];
        }
        for (var c = column0; c < columns; c++) {
            var total_a = select(shrink_a * value_four(out_a + c), zero, fresh);
            var total_b = select(shrink_b * value_four(out_b + c), zero, fresh);
            // Added only where the key is seen: a value that is not a number must not reach a query before it, and 0 · NaN would.
            for (var j = 0u; j < KEYS; j++) {
                let v = kv[(row0 + min(j, most)) * kv_row + head * d_head + params.d_nope + c];
                total_a += select(zero, score_a[j] * v, vec4<u32>(key0 + j) < end_a);
                total_b += select(zero, score_b[j] * v, vec4<u32>(key0 + j) < end_b);
            }
            for (var i = 0u; i < 4u; i++) {
                if (own + i <= last.x) {
                    values[out_a[i] + c] = total_a[i];
                }
                if (own + 4u + i <= last.x) {
                    values[out_b[i] + c] = total_b[i];
                }
            }
        }
        fresh = false;
    }

    for (var i = 0u; i < 8u; i++) {
        if (own + i <= last.x) {
            let sum = select(sum_a, sum_b, i >= 4u)[i % 4u];
            let best = select(best_a, best_b, i >= 4u)[i % 4u];
            let out = select(out_a, out_b, i >= 4u)[i % 4u];
            var factor = 1.0;
            if (params.last == 1u) {
                factor = select(0.0, 1.0 / sum, sum > 0.0);
            }
            for (var c = column0; c < columns; c++) {
                values[out + c] = select(factor * values[out + c], 0.0, fresh);
            }
            softmax[select(state_a, state_b, i >= 4u)[i % 4u]] = vec2<f32>(best, sum);
        }
    }
}

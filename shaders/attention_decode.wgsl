// Attention of few queries per sequence over rebuilt keys and values, one split of the cache per workgroup.
//
//   s_j = scale · (q_C · k_C_j + q_R · k_R_j)    m = max_j s_j    l = Σ_j e^(s_j−m)    values = Σ_j e^(s_j−m) v_j
//
// Splits of SPLIT rows follow the step's row numbering (see cache_read) and never straddle two sequences;
// attention_combine joins them. A split without a visible row gives m = lowest f32, l = 0, values = 0.
// Query token i of n sees all of its sequence but the last n − 1 − i tokens.
// grid: (splits of this key tile, n_head, most query tokens of a sequence)

override STORAGE_F16: u32 = 0u;  // of the rope cache
override KV_F16: u32 = 0u;
override WORKGROUP: u32 = 64u;
override SPLIT: u32 = 256u;      // a multiple of WORKGROUP

const LOWEST: f32 = -3.4028234e38;

struct Params {
    n_head: u32,
    d_nope: u32,
    d_rope: u32,
    d_value: u32,
    kv_first: u32,      // a multiple of SPLIT
    n_sequence: u32,
    rope_pitch: u32,    // elements of a rope cache row
    scale: f32,
    tiles_x: u32,
    tiles_y: u32,
    tiles_z: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<f32>;                            // [tokens, n_head, d_nope + d_rope], rotated
@group(0) @binding(2) var<storage, read> kv: array<u32>;                           // [kv rows, n_head, d_nope + d_value]
@group(0) @binding(3) var<storage, read> rope_cache: array<u32>;                   // [cache rows, rope_pitch]
@group(0) @binding(4) var<storage, read> sequences: array<vec4<u32>>;              // [n_sequence, 2] (first row, first cache row, length, token), (tokens, first partial, splits, 0)
@group(0) @binding(5) var<storage, read_write> partial_values: array<f32>;         // [partials, n_head, d_value]
@group(0) @binding(6) var<storage, read_write> partial_softmax: array<vec2<f32>>;  // [splits, n_head] (m, l)

var<workgroup> sh_score: array<f32, SPLIT>;
var<workgroup> sh_reduce: array<f32, WORKGROUP>;

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

// Element i of the keys and values.
fn kv_at(i: u32) -> f32 {
    if (KV_F16 == 1u) {
        let pair = unpack2x16float(kv[i >> 1u]);
        return select(pair.x, pair.y, (i & 1u) == 1u);
    }
    return bitcast<f32>(kv[i]);
}

// Line of the last sequence that begins at or before `row`.
fn line_of(row: u32, n_sequence: u32) -> u32 {
    var low = 0u;
    var high = n_sequence;
    while (high - low > 1u) {
        let middle = (low + high) / 2u;
        if (sequences[2u * middle].x <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return 2u * low;
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
    let row0 = params.kv_first + work.x * SPLIT;
    let line = line_of(row0, params.n_sequence);
    let sequence = sequences[line];
    let queries = sequences[line + 1u];
    let head = work.y;
    let query = work.z;
    let d_query = params.d_nope + params.d_rope;
    let d_head = params.d_nope + params.d_value;
    let kv_row = params.n_head * d_head;
    let position0 = row0 - sequence.x;
    // The padding behind the last sequence is no split of it.
    if (query >= queries.x || position0 / SPLIT >= queries.z) {
        return;
    }
    let length = sequence.z + 1u + query - queries.x;
    let count = min(max(length, position0) - position0, SPLIT);
    let q_base = ((sequence.w + query) * params.n_head + head) * d_query;
    let kv_base = work.x * SPLIT * kv_row + head * d_head;
    let slot0 = sequence.y + position0;

    var best = LOWEST;
    for (var row = lane; row < count; row += WORKGROUP) {
        var dot = 0.0;
        let k = kv_base + row * kv_row;
        for (var d = 0u; d < params.d_nope; d++) {
            dot += params.scale * q[q_base + d] * kv_at(k + d);
        }
        let rope = (slot0 + row) * params.rope_pitch;
        for (var d = 0u; d < params.d_rope; d++) {
            let i = rope + d;
            dot += params.scale * q[q_base + params.d_nope + d] * decode(rope_cache[word_of(i)], i);
        }
        sh_score[row] = dot;
        best = max(best, dot);
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

    var sum = 0.0;
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

    let split = (queries.y + query * queries.z + position0 / SPLIT) * params.n_head + head;
    for (var column = lane; column < params.d_value; column += WORKGROUP) {
        var value = 0.0;
        for (var row = 0u; row < count; row++) {
            value += sh_score[row] * kv_at(kv_base + row * kv_row + params.d_nope + column);
        }
        partial_values[split * params.d_value + column] = value;
    }
    if (lane == 0u) {
        partial_softmax[split] = vec2<f32>(best, sh_reduce[0]);
    }
}

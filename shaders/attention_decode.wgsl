// Attention of a few queries per sequence over rebuilt or cached keys and values, one split of the cache per workgroup, in
// 16-byte loads.
//
//   s_j = scale · (q_C · k_C_j + q_R · k_R_j)    m = max_j s_j    l = Σ_j e^(s_j−m)    values = Σ_j e^(s_j−m) v_j
//
// Groups of n_head / n_kv_head query heads share the keys and values of one head. A workgroup serves HEADS heads of a group, and
// reads each row of keys and values once for all of them; heads past the end of the group repeat its last and are not stored.
// Splits of SPLIT rows follow the step's row numbering (see cache_read) and never straddle two sequences; attention_combine
// combines them. A split without a visible row gives m = lowest f32, l = 0, values = 0.
// Scores: LANES invocations share four rows, so that they read neighbouring bytes; workgroup memory adds their parts. Values: a
// team of COLUMNS invocations shares four rows, each owns 16 bytes of columns. Each e^(s−m) is taken once, in place of the score;
// the end adds the teams.
// Query token i of n sees all of its sequence except the last n − 1 − i tokens. Rows past the end are never read.
// grid: (splits of this key tile, n_kv_head · ⌈n_head / n_kv_head / HEADS⌉, most query tokens of a sequence)
//
// Floor: the bytes of keys and values, ⌈n_head / n_kv_head / HEADS⌉ times. Each f16 of them serves HEADS multiply-adds, HEADS
// FLOP per byte: the copy rate limits it on a GPU, the multiply-adds and the unpacking in software.
// Read once in the assembly of AMD's compiler (RDNA3, Mesa 25; f16, one head): 2 048 bytes of keys take a subgroup of 32 some 83
// instructions, 32 of them multiply-adds, values 75: 0.04 per byte.
// Static (RDNA3, Mesa 25), at most: 132 registers, 12 800 bytes of workgroup memory, nothing spilled.
// On an H200 at commit 10d32d5: 8192 tokens of 12 heads of 64 in f16, some 8 µs without wgpu's shader checks, 10 with
// them. Not measured since.

override STORAGE_F16: u32 = 0u;      // of the rope cache
override KV_F16: u32 = 0u;
override HEADS: u32 = 4u;            // query heads per workgroup: 1, 2, 4 or 8
override WORKGROUP: u32 = 128u;      // a power of two, at least SPLIT / 4
override COLUMNS: u32 = 16u;         // a power of two, at least HEADS; divides WORKGROUP
override SPLIT: u32 = 256u;
override QUADS: u32 = SPLIT / 4u;
override LANES: u32 = WORKGROUP / QUADS;
override TEAMS: u32 = WORKGROUP / COLUMNS;
override VECTORS: u32 = 1u + KV_F16;              // vectors of four elements in 16 bytes
override ROUND: u32 = min(HEADS * VECTORS, 4u);   // vectors per invocation that pass through workgroup memory at once

const LOWEST: f32 = -3.4028234e38;

struct Params {
    n_head: u32,
    n_kv_head: u32,     // divides n_head
    d_nope: u32,
    d_rope: u32,
    d_value: u32,
    kv_first: u32,      // a multiple of SPLIT
    kv_pitch: u32,      // elements from one row of kv to the next
    n_sequence: u32,
    rope_pitch: u32,    // elements of a rope cache row
    scale: f32,
    tiles_x: u32,
    tiles_y: u32,
    tiles_z: u32,
}

// A line of the sequence table.
struct DecodeSequence {
    first_row: u32,    // in the step's numbering of cache rows, a multiple of SPLIT
    first_slot: u32,   // cache row of position 0
    length: u32,       // tokens, those of this step included
    token: u32,        // first query token
    tokens: u32,       // query tokens: each sees those before it
    partial: u32,      // first partial result: split s of query token i is number partial + i · splits + s
    splits: u32,
    unused: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;                      // [tokens, n_head, d_nope + d_rope] / 4, rotated
@group(0) @binding(2) var<storage, read> kv: array<vec4<u32>>;                     // [kv rows, n_kv_head, d_nope + d_value], kv_pitch apart
@group(0) @binding(3) var<storage, read> rope_cache: array<vec4<u32>>;             // [cache rows, rope_pitch] / 4, f16: / 8
@group(0) @binding(4) var<storage, read> sequences: array<DecodeSequence>;         // [n_sequence]
@group(0) @binding(5) var<storage, read_write> partial_values: array<vec4<f32>>;   // [partials, n_head, d_value] / 4
@group(0) @binding(6) var<storage, read_write> partial_softmax: array<vec2<f32>>;  // [partials, n_head] (m, l)

var<workgroup> sh_part: array<vec4<f32>, WORKGROUP * ROUND>;    // parts of scores, lanes side by side; then sums of the teams
var<workgroup> sh_score: array<vec4<f32>, QUADS * HEADS>;       // [head, quad] scores of four rows; then e^(s − m)
var<workgroup> sh_state: array<f32, TEAMS * HEADS>;             // [team, head] maximum, then sum

// Index of the last sequence that begins at or before `row`.
fn sequence_of(row: u32, n_sequence: u32) -> u32 {
    var low = 0u;
    var high = n_sequence;
    while (high - low > 1u) {
        let middle = (low + high) / 2u;
        if (sequences[middle].first_row <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// The first four elements of 16 bytes of f32 or f16.
fn first_four(load: vec4<u32>, f16: u32) -> vec4<f32> {
    if (f16 == 1u) {
        return vec4<f32>(unpack2x16float(load.x), unpack2x16float(load.y));
    }
    return bitcast<vec4<f32>>(load);
}

// The other four of a load of f16.
fn second_of(load: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(load.z), unpack2x16float(load.w));
}

// Which of a quad's four rows are below `count`.
fn seen_of(quad: u32, count: u32) -> vec4<bool> {
    return vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(count);
}

// The four rows of a quad; those past the end repeat the last one.
fn rows_of(quad: u32, count: u32) -> vec4<u32> {
    return min(vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(count - 1u));
}

// Four query elements of up to four heads, one column per head.
fn queries(at: vec4<u32>) -> mat4x4<f32> {
    var elements = mat4x4<f32>();
    elements[0] = params.scale * q[at.x];
    if (HEADS >= 2u) {
        elements[1] = params.scale * q[at.y];
    }
    if (HEADS >= 4u) {
        elements[2] = params.scale * q[at.z];
        elements[3] = params.scale * q[at.w];
    }
    return elements;
}

// e^(s − m) of a quad for up to four heads, one column per head.
fn weights_of(at: u32) -> mat4x4<f32> {
    var weights = mat4x4<f32>();
    weights[0] = sh_score[at];
    if (HEADS >= 2u) {
        weights[1] = sh_score[at + QUADS];
    }
    if (HEADS >= 4u) {
        weights[2] = sh_score[at + 2u * QUADS];
        weights[3] = sh_score[at + 3u * QUADS];
    }
    return weights;
}

// Tile of the workgroup: a grid over 65 535 is folded into x and y.
fn unfold(group: vec3<u32>, groups: vec3<u32>) -> vec3<u32> {
    let tiles = vec3<u32>(params.tiles_x, params.tiles_y, params.tiles_z);
    if (all(groups == tiles)) {
        return group;
    }
    let i = group.y * groups.x + group.x;
    return vec3<u32>(i % tiles.x, i / tiles.x % tiles.y, i / (tiles.x * tiles.y));
}

// Adds the lanes' parts of the scores of up to four heads, from `head0` on. Rows past the end get the lowest score.
fn keep_scores(head0: u32, parts: mat4x4<f32>, local: u32, count: u32) {
    sh_part[local] = parts[0];
    if (HEADS >= 2u) {
        sh_part[WORKGROUP + local] = parts[1];
    }
    if (HEADS >= 4u) {
        sh_part[2u * WORKGROUP + local] = parts[2];
        sh_part[3u * WORKGROUP + local] = parts[3];
    }
    workgroupBarrier();
    for (var i = local; i < QUADS * min(HEADS, 4u); i += WORKGROUP) {
        let quad = i % QUADS;
        var sum = vec4<f32>(0.0);
        for (var part = 0u; part < LANES; part++) {
            // Neighbours begin at different parts: the first parts of all quads are in one bank.
            sum += sh_part[i * LANES + (part + quad) % LANES];
        }
        sh_score[head0 * QUADS + i] = select(vec4<f32>(LOWEST), sum, seen_of(quad, count));
    }
    workgroupBarrier();
}

// Adds up to four vectors of all teams, from number `vector0` on, and stores them: head h has vectors h · VECTORS on. `split` is
// the partial result of the first head, `block` the first load of these value columns.
fn join(vector0: u32, vectors: mat4x4<f32>, local: u32, heads: u32, split: u32, block: u32) {
    sh_part[local] = vectors[0];
    if (ROUND >= 2u) {
        sh_part[WORKGROUP + local] = vectors[1];
    }
    if (ROUND == 4u) {
        sh_part[2u * WORKGROUP + local] = vectors[2];
        sh_part[3u * WORKGROUP + local] = vectors[3];
    }
    workgroupBarrier();
    let value_loads = params.d_value / (4u * VECTORS);
    for (var i = local; i < COLUMNS * ROUND; i += WORKGROUP) {
        let vector = vector0 + i / COLUMNS;
        let head = vector / VECTORS;
        let load = block + i % COLUMNS;
        if (head < heads && load < value_loads) {
            var values = vec4<f32>(0.0);
            for (var t = 0u; t < TEAMS; t++) {
                values += sh_part[i / COLUMNS * WORKGROUP + t * COLUMNS + i % COLUMNS];
            }
            partial_values[((split + head) * value_loads + load) * VECTORS + vector % VECTORS] = values;
        }
    }
    workgroupBarrier();
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let work = unfold(group, groups);
    if (work.z >= params.tiles_z) {
        return;
    }
    let row0 = params.kv_first + work.x * SPLIT;
    let sequence = sequences[sequence_of(row0, params.n_sequence)];
    let query = work.z;
    let position0 = row0 - sequence.first_row;
    // Behind the last sequence the step's row numbering is padding.
    if (query >= sequence.tokens || position0 / SPLIT >= sequence.splits) {
        return;
    }
    let length = sequence.length + 1u + query - sequence.tokens;
    let count = min(max(length, position0) - position0, SPLIT);
    let slot0 = sequence.first_slot + position0;

    // Heads of this workgroup, in a group of those that share keys and values.
    let group_heads = params.n_head / params.n_kv_head;
    let parts = (group_heads + HEADS - 1u) / HEADS;
    let kv_head = work.y / parts;
    let part0 = work.y % parts * HEADS;
    let heads = min(group_heads - part0, HEADS);
    let head0 = kv_head * group_heads + part0;

    // Widths in loads; of queries, in vectors of four.
    let kv_width = 4u * VECTORS;
    let rope_vectors = 1u + STORAGE_F16;
    let nope_loads = params.d_nope / kv_width;
    let value_loads = params.d_value / kv_width;
    let rope_loads = params.d_rope / (4u * rope_vectors);
    let rope_row = params.rope_pitch / (4u * rope_vectors);
    let kv_row = params.kv_pitch / kv_width;
    let key = work.x * SPLIT * kv_row + kv_head * (nope_loads + value_loads);
    let q_row = (params.d_nope + params.d_rope) / 4u;
    let q_head0 = (sequence.token + query) * params.n_head + head0;
    let q_low = (q_head0 + min(vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(heads - 1u))) * q_row;
    let q_high = (q_head0 + min(vec4<u32>(4u, 5u, 6u, 7u), vec4<u32>(heads - 1u))) * q_row;

    // One column per head, one component per row.
    var low = mat4x4<f32>();
    var high = mat4x4<f32>();
    let own = local / LANES;
    let lane = local % LANES;
    if (4u * own < count) {
        let rows = rows_of(own, count);
        for (var i = lane; i < nope_loads; i += LANES) {
            let k = vec4<u32>(key + i) + rows * kv_row;
            let k0 = kv[k.x];
            let k1 = kv[k.y];
            let k2 = kv[k.z];
            let k3 = kv[k.w];
            let first = transpose(mat4x4<f32>(
                first_four(k0, KV_F16),
                first_four(k1, KV_F16),
                first_four(k2, KV_F16),
                first_four(k3, KV_F16),
            ));
            let at = i * VECTORS;
            low += first * queries(q_low + at);
            if (HEADS == 8u) {
                high += first * queries(q_high + at);
            }
            if (KV_F16 == 1u) {
                let second = transpose(mat4x4<f32>(second_of(k0), second_of(k1), second_of(k2), second_of(k3)));
                low += second * queries(q_low + at + 1u);
                if (HEADS == 8u) {
                    high += second * queries(q_high + at + 1u);
                }
            }
        }
        for (var i = lane; i < rope_loads; i += LANES) {
            let k = vec4<u32>(i) + (slot0 + rows) * rope_row;
            let k0 = rope_cache[k.x];
            let k1 = rope_cache[k.y];
            let k2 = rope_cache[k.z];
            let k3 = rope_cache[k.w];
            let first = transpose(mat4x4<f32>(
                first_four(k0, STORAGE_F16),
                first_four(k1, STORAGE_F16),
                first_four(k2, STORAGE_F16),
                first_four(k3, STORAGE_F16),
            ));
            let at = params.d_nope / 4u + i * rope_vectors;
            low += first * queries(q_low + at);
            if (HEADS == 8u) {
                high += first * queries(q_high + at);
            }
            if (STORAGE_F16 == 1u) {
                let second = transpose(mat4x4<f32>(second_of(k0), second_of(k1), second_of(k2), second_of(k3)));
                low += second * queries(q_low + at + 1u);
                if (HEADS == 8u) {
                    high += second * queries(q_high + at + 1u);
                }
            }
        }
    }
    keep_scores(0u, low, local, count);
    if (HEADS == 8u) {
        keep_scores(4u, high, local, count);
    }

    // The maximum of each head, by teams, then its weights: invocations of a team that have the same head share its quads.
    let team = local / COLUMNS;
    let column = local % COLUMNS;
    let head = column % HEADS;
    var of_rows = vec4<f32>(LOWEST);
    for (var quad = team; 4u * quad < count; quad += TEAMS) {
        of_rows = max(of_rows, sh_score[head * QUADS + quad]);
    }
    if (column < HEADS) {
        sh_state[team * HEADS + head] = max(max(of_rows.x, of_rows.y), max(of_rows.z, of_rows.w));
    }
    workgroupBarrier();
    var best = LOWEST;
    for (var t = 0u; t < TEAMS; t++) {
        best = max(best, sh_state[t * HEADS + head]);
    }
    for (var quad = team + column / HEADS * TEAMS; 4u * quad < count; quad += COLUMNS / HEADS * TEAMS) {
        let weights = exp(sh_score[head * QUADS + quad] - best);
        sh_score[head * QUADS + quad] = select(vec4<f32>(0.0), weights, seen_of(quad, count));
    }
    workgroupBarrier();

    let split = (sequence.partial + query * sequence.splits + position0 / SPLIT) * params.n_head + head0;
    for (var block = 0u; block < value_loads; block += COLUMNS) {
        // One column per head, one component per value column.
        var first_low = mat4x4<f32>();
        var first_high = mat4x4<f32>();
        var second_low = mat4x4<f32>();
        var second_high = mat4x4<f32>();
        var sum = vec4<f32>(0.0);
        // Columns past the end repeat the last ones; they are not stored.
        let value = key + nope_loads + min(block + column, value_loads - 1u);
        for (var quad = team; 4u * quad < count; quad += TEAMS) {
            let v = vec4<u32>(value) + rows_of(quad, count) * kv_row;
            let v0 = kv[v.x];
            let v1 = kv[v.y];
            let v2 = kv[v.z];
            let v3 = kv[v.w];
            let of_low = weights_of(quad);
            let first =
                mat4x4<f32>(first_four(v0, KV_F16), first_four(v1, KV_F16), first_four(v2, KV_F16), first_four(v3, KV_F16));
            let second = mat4x4<f32>(second_of(v0), second_of(v1), second_of(v2), second_of(v3));
            sum += sh_score[head * QUADS + quad];
            first_low += first * of_low;
            if (KV_F16 == 1u) {
                second_low += second * of_low;
            }
            if (HEADS == 8u) {
                let of_high = weights_of(4u * QUADS + quad);
                first_high += first * of_high;
                if (KV_F16 == 1u) {
                    second_high += second * of_high;
                }
            }
        }
        if (column < HEADS) {
            sh_state[team * HEADS + head] = dot(sum, vec4<f32>(1.0));
        }
        if (KV_F16 == 1u) {
            join(0u, mat4x4<f32>(first_low[0], second_low[0], first_low[1], second_low[1]), local, heads, split, block);
            if (HEADS >= 4u) {
                join(4u, mat4x4<f32>(first_low[2], second_low[2], first_low[3], second_low[3]), local, heads, split, block);
            }
            if (HEADS == 8u) {
                join(8u, mat4x4<f32>(first_high[0], second_high[0], first_high[1], second_high[1]), local, heads, split, block);
                join(12u, mat4x4<f32>(first_high[2], second_high[2], first_high[3], second_high[3]), local, heads, split, block);
            }
        } else {
            join(0u, first_low, local, heads, split, block);
            if (HEADS == 8u) {
                join(4u, first_high, local, heads, split, block);
            }
        }
    }
    if (local < heads) {
        var sum = 0.0;
        for (var t = 0u; t < TEAMS; t++) {
            sum += sh_state[t * HEADS + local];
        }
        partial_softmax[split + local] = vec2<f32>(best, sum);
    }
}

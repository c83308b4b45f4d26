// Attention of a few queries per sequence over rebuilt keys and values, one split of the cache per workgroup, in 16-byte loads.
//
//   s_j = scale · (q_C · k_C_j + q_R · k_R_j)    m = max_j s_j    l = Σ_j e^(s_j−m)    values = Σ_j e^(s_j−m) v_j
//
// Splits of SPLIT rows follow the step's row numbering (see cache_read) and never straddle two sequences; attention_combine
// combines them. A split without a visible row gives m = lowest f32, l = 0, values = 0.
// Scores: LANES invocations share four rows at a time, so that they read whole cache lines. They keep the query elements of
// their loads over all of these rows, and add the parts of a score in workgroup memory. Values: a team of COLUMNS invocations
// shares four rows; each invocation owns 16 bytes of columns. Each team has its own maximum and sum; the end combines the teams.
// Query token i of n sees all of its sequence except the last n − 1 − i tokens. Rows past the end are never read.
// grid: (splits of this key tile, n_head, most query tokens of a sequence)

override STORAGE_F16: u32 = 0u;      // of the rope cache
override KV_F16: u32 = 0u;
override WORKGROUP: u32 = 128u;
override LANES: u32 = 8u;            // a power of two, like COLUMNS: both divide WORKGROUP
override COLUMNS: u32 = 8u;
override EACH: u32 = 4u;             // ⌈rows of a split / 4 / (WORKGROUP / LANES)⌉, at most 4
override SPLIT: u32 = 256u;
override QUADS: u32 = SPLIT / 4u;
override TEAMS: u32 = WORKGROUP / COLUMNS;
override PARTS: u32 = QUADS * LANES;
override JOINED: u32 = WORKGROUP * (1u + KV_F16);
override SHARED: u32 = select(PARTS, JOINED, JOINED > PARTS);

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
@group(0) @binding(2) var<storage, read> kv: array<vec4<u32>>;                     // [kv rows, n_head, d_nope + d_value] / 4, f16: / 8
@group(0) @binding(3) var<storage, read> rope_cache: array<vec4<u32>>;             // [cache rows, rope_pitch] / 4, f16: / 8
@group(0) @binding(4) var<storage, read> sequences: array<DecodeSequence>;         // [n_sequence]
@group(0) @binding(5) var<storage, read_write> partial_values: array<vec4<f32>>;   // [partials, n_head, d_value] / 4
@group(0) @binding(6) var<storage, read_write> partial_softmax: array<vec2<f32>>;  // [partials, n_head] (m, l)

var<workgroup> sh_part: array<vec4<f32>, SHARED>;    // parts of the scores of four rows, lanes side by side; then sums of the teams
var<workgroup> sh_score: array<vec4<f32>, QUADS>;    // four rows
var<workgroup> sh_state: array<vec2<f32>, TEAMS>;    // (m, l) of a team

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

// Product of one load of a row with its query elements; `second` is for f16 alone.
fn product_with(first: vec4<f32>, second: vec4<f32>, load: vec4<u32>, f16: u32) -> f32 {
    let product = dot(first, first_four(load, f16));
    if (f16 == 1u) {
        return product + dot(second, second_of(load));
    }
    return product;
}

// Which of a quad's four rows are below `count`.
fn seen_of(quad: u32, count: u32) -> vec4<bool> {
    return vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(count);
}

// The four rows of a quad; those past the end repeat the last one.
fn rows_of(quad: u32, count: u32) -> vec4<u32> {
    return min(vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(count - 1u));
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
    let head = work.y;
    let query = work.z;
    let position0 = row0 - sequence.first_row;
    // Behind the last sequence the step's row numbering is padding.
    if (query >= sequence.tokens || position0 / SPLIT >= sequence.splits) {
        return;
    }
    let length = sequence.length + 1u + query - sequence.tokens;
    let count = min(max(length, position0) - position0, SPLIT);
    let slot0 = sequence.first_slot + position0;

    // Widths in loads; of queries, in vectors of four.
    let kv_width = 4u + 4u * KV_F16;
    let rope_width = 4u + 4u * STORAGE_F16;
    let nope_loads = params.d_nope / kv_width;
    let value_loads = params.d_value / kv_width;
    let rope_loads = params.d_rope / rope_width;
    let rope_row = params.rope_pitch / rope_width;
    let kv_row = params.n_head * (nope_loads + value_loads);
    let key = work.x * SPLIT * kv_row + head * (nope_loads + value_loads);
    let q_nope = ((sequence.token + query) * params.n_head + head) * ((params.d_nope + params.d_rope) / 4u);
    let q_rope = q_nope + params.d_nope / 4u;

    let lane = local % LANES;
    var score: array<vec4<f32>, 4>;
    for (var e = 0u; e < EACH; e++) {
        score[e] = vec4<f32>(0.0);
    }
    for (var i = lane; i < nope_loads; i += LANES) {
        let at = q_nope + i * (1u + KV_F16);
        let first = params.scale * q[at];
        var second = vec4<f32>(0.0);
        if (KV_F16 == 1u) {
            second = params.scale * q[at + 1u];
        }
        for (var e = 0u; e < EACH; e++) {
            let quad = local / LANES + e * (WORKGROUP / LANES);
            if (4u * quad < count) {
                let k = vec4<u32>(key + i) + rows_of(quad, count) * kv_row;
                let loads = array<vec4<u32>, 4>(kv[k.x], kv[k.y], kv[k.z], kv[k.w]);
                score[e] += vec4<f32>(
                    product_with(first, second, loads[0], KV_F16),
                    product_with(first, second, loads[1], KV_F16),
                    product_with(first, second, loads[2], KV_F16),
                    product_with(first, second, loads[3], KV_F16),
                );
            }
        }
    }
    for (var i = lane; i < rope_loads; i += LANES) {
        let at = q_rope + i * (1u + STORAGE_F16);
        let first = params.scale * q[at];
        var second = vec4<f32>(0.0);
        if (STORAGE_F16 == 1u) {
            second = params.scale * q[at + 1u];
        }
        for (var e = 0u; e < EACH; e++) {
            let quad = local / LANES + e * (WORKGROUP / LANES);
            if (4u * quad < count) {
                let k = vec4<u32>(i) + (slot0 + rows_of(quad, count)) * rope_row;
                let loads = array<vec4<u32>, 4>(rope_cache[k.x], rope_cache[k.y], rope_cache[k.z], rope_cache[k.w]);
                score[e] += vec4<f32>(
                    product_with(first, second, loads[0], STORAGE_F16),
                    product_with(first, second, loads[1], STORAGE_F16),
                    product_with(first, second, loads[2], STORAGE_F16),
                    product_with(first, second, loads[3], STORAGE_F16),
                );
            }
        }
    }
    for (var e = 0u; e < EACH; e++) {
        let quad = local / LANES + e * (WORKGROUP / LANES);
        if (quad < QUADS) {
            sh_part[quad * LANES + lane] = score[e];
        }
    }
    workgroupBarrier();

    for (var quad = local; quad < QUADS; quad += WORKGROUP) {
        var sum = vec4<f32>(0.0);
        for (var part = 0u; part < LANES; part++) {
            // Neighbours begin at different parts: the first parts of all quads are in one bank.
            sum += sh_part[quad * LANES + (part + quad) % LANES];
        }
        sh_score[quad] = select(vec4<f32>(LOWEST), sum, seen_of(quad, count));
    }
    workgroupBarrier();

    let team = local / COLUMNS;
    let column = local % COLUMNS;
    let split = (sequence.partial + query * sequence.splits + position0 / SPLIT) * params.n_head + head;
    var of_rows = vec4<f32>(LOWEST);
    for (var quad = team; 4u * quad < count; quad += TEAMS) {
        of_rows = max(of_rows, sh_score[quad]);
    }
    let best = max(max(of_rows.x, of_rows.y), max(of_rows.z, of_rows.w));
    for (var block = 0u; block < value_loads; block += COLUMNS) {
        var first = vec4<f32>(0.0);
        var second = vec4<f32>(0.0);
        var sum = vec4<f32>(0.0);
        // Columns past the end repeat the last ones; they are not stored.
        let value = key + nope_loads + min(block + column, value_loads - 1u);
        for (var quad = team; 4u * quad < count; quad += TEAMS) {
            let p = select(vec4<f32>(0.0), exp(sh_score[quad] - best), seen_of(quad, count));
            let v = vec4<u32>(value) + rows_of(quad, count) * kv_row;
            let loads = array<vec4<u32>, 4>(kv[v.x], kv[v.y], kv[v.z], kv[v.w]);
            sum += p;
            first += p.x * first_four(loads[0], KV_F16) + p.y * first_four(loads[1], KV_F16);
            first += p.z * first_four(loads[2], KV_F16) + p.w * first_four(loads[3], KV_F16);
            if (KV_F16 == 1u) {
                second += p.x * second_of(loads[0]) + p.y * second_of(loads[1]);
                second += p.z * second_of(loads[2]) + p.w * second_of(loads[3]);
            }
        }
        sh_part[local] = first;
        if (KV_F16 == 1u) {
            sh_part[WORKGROUP + local] = second;
        }
        if (column == 0u) {
            sh_state[team] = vec2<f32>(best, dot(sum, vec4<f32>(1.0)));
        }
        workgroupBarrier();

        for (var i = local; i < COLUMNS * (1u + KV_F16); i += WORKGROUP) {
            var most = LOWEST;
            for (var t = 0u; t < TEAMS; t++) {
                most = max(most, sh_state[t].x);
            }
            let half = i / COLUMNS;
            var total = 0.0;
            var values = vec4<f32>(0.0);
            for (var t = 0u; t < TEAMS; t++) {
                let weight = exp(sh_state[t].x - most);
                total += weight * sh_state[t].y;
                values += weight * sh_part[half * WORKGROUP + t * COLUMNS + i % COLUMNS];
            }
            let load = block + i % COLUMNS;
            if (load < value_loads) {
                partial_values[(split * value_loads + load) * (1u + KV_F16) + half] = values;
            }
            if (block + i == 0u) {
                partial_softmax[split] = vec2<f32>(most, total);
            }
        }
        workgroupBarrier();
    }
}

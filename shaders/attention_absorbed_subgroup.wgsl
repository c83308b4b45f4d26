// Attention of a few queries per sequence straight over the cached latents, in workgroups of one subgroup without barriers.
// Meaning, splits and partial results are those of attention_absorbed. Widths are multiples of 4.
//
//   s_j = scale · (a[h] · c_j + q_R[h] · k_R_j)    m = max_j s_j    l = Σ_j e^(s_j−m)    values[h] = Σ_j e^(s_j−m) c_j
//
// LANES invocations own 8 heads. Scores: each lane owns 4 rows of a block of 4·LANES and reads 16 bytes of each, and of one
// query, which the others take by shuffles: 6 loads for 256 multiply-adds in f16, 5 for 128 in f32. Values: each lane owns 16
// bytes of the columns and takes the weights of a row from the lane that owns it.
// Padding: cache rows end with finite values (0, as cache_append writes them). The query is 0 there, and the columns of the
// padding are not stored.
// Floor: as attention_absorbed, the multiply-adds; in software they are all that counts.
// grid: (splits of the step, ⌈n_head / 8⌉, most query tokens of a sequence)
//
// For adapters without fast workgroup memory: on a GPU, neighbouring lanes would read rows that are far apart.
//
// Results, on lavapipe (Mesa 25, 2 cores shared with other work), CPU time of the process, in turns, 4096 rows of 512 + 64,
// 16 heads:
//   against attention_absorbed with 8 heads: 1.8 to 2.1 times as fast in f16, 1.7 to 2.0 in f32; first use in 0.2 to 0.3
//   separate loops for latents and rotary keys, 8 and 16 stores written out: 2.3 of the time to compile, no faster
//   scores as two matrices of four queries in place of eight vectors: 0.92 of the rate, six runs in turns
//   the eight as an array without an initial value: as fast, but wrong in Chromium 156 on SwiftShader
//   both halves of a load of f16 written out instead of in a loop: 1.15 of the time to compile, 1.05 of the time
// Static (RDNA3, Mesa 25), at most: 96 registers, 8 192 bytes of workgroup memory, nothing spilled.

override STORAGE_F16: u32 = 0u;
override LANES: u32 = 4u;                        // a power of two from 4 to 16
override SPLIT: u32 = 256u;
// Queries that one load of a team brings.
override SPREAD: u32 = min(LANES, 8u);
override FOURS: u32 = 1u + STORAGE_F16;          // vec4s of 16 bytes

const LOWEST: f32 = -3.4028234e38;

struct Params {
    n_head: u32,
    d_latent: u32,
    d_nope: u32,
    d_rope: u32,
    n_sequence: u32,
    latent_loads: u32,  // 16-byte loads of a latent cache row
    rope_loads: u32,    // 16-byte loads of a rope cache row
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

// One vector per query: of the first four of eight, and of the others.
struct Octet {
    low: mat4x4<f32>,
    high: mat4x4<f32>,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> absorbed: array<vec4<f32>>;               // [tokens, n_head, d_latent / 4]
@group(0) @binding(2) var<storage, read> q: array<vec4<f32>>;                      // [tokens, n_head, (d_nope + d_rope) / 4], rotated
@group(0) @binding(3) var<storage, read> latent_cache: array<vec4<u32>>;           // [cache rows, latent_loads]
@group(0) @binding(4) var<storage, read> rope_cache: array<vec4<u32>>;             // [cache rows, rope_loads]
@group(0) @binding(5) var<storage, read> sequences: array<DecodeSequence>;         // [n_sequence]
@group(0) @binding(6) var<storage, read_write> partial_values: array<vec4<f32>>;   // [partials, n_head, d_latent / 4]
@group(0) @binding(7) var<storage, read_write> partial_softmax: array<vec2<f32>>;  // [partials, n_head] (m, l)

// [row, 2] scores of 8 heads, then their exponentials. Only the lane that wrote one reads it: no barrier is needed.
var<workgroup> sh_score: array<vec4<f32>, SPLIT * 2u>;

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

// The first four elements of a load.
fn first_of(load: vec4<u32>) -> vec4<f32> {
    if (STORAGE_F16 == 1u) {
        return vec4<f32>(unpack2x16float(load.x), unpack2x16float(load.y));
    }
    return bitcast<vec4<f32>>(load);
}

// The other four of a load of f16.
fn second_of(load: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(load.z), unpack2x16float(load.w));
}

// Column i of a matrix, without an index into registers.
fn column_of(m: mat4x4<f32>, i: u32) -> vec4<f32> {
    return select(select(m[0], m[1], i == 1u), select(m[2], m[3], i == 3u), i >= 2u);
}

fn nth(vectors: Octet, i: u32) -> vec4<f32> {
    return select(column_of(vectors.low, i), column_of(vectors.high, i - 4u), i >= 4u);
}

// Each component of a times b, one column each.
fn outer(a: vec4<f32>, b: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(a.x * b, a.y * b, a.z * b, a.w * b);
}

// Elements 4i … 4i + 3 of a query: its latent part, then its rotary part, each padded to whole loads.
fn query_part(head: u32, i: u32) -> vec4<f32> {
    let latents = params.latent_loads * FOURS;
    if (i >= latents) {
        if (4u * (i - latents) < params.d_rope) {
            return params.scale * q[(head * (params.d_nope + params.d_rope) + params.d_nope) / 4u + i - latents];
        }
    } else if (4u * i < params.d_latent) {
        return params.scale * absorbed[head * params.d_latent / 4u + i];
    }
    return vec4<f32>(0.0);
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

@compute @workgroup_size(LANES, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let work = unfold(group, groups);
    if (work.z >= params.tiles_z) {
        return;
    }
    let row0 = work.x * SPLIT;
    let sequence = sequences[sequence_of(row0, params.n_sequence)];
    let query = work.z;
    let head0 = work.y * 8u;
    let position0 = row0 - sequence.first_row;
    // Behind the last sequence the step's row numbering is padding.
    if (query >= sequence.tokens || position0 / SPLIT >= sequence.splits) {
        return;
    }
    let length = sequence.length + 1u + query - sequence.tokens;
    let count = min(max(length, position0) - position0, SPLIT);
    let slot0 = sequence.first_slot + position0;
    let token = sequence.token + query;
    let fours = params.d_latent / 4u;

    let own = head0 + lane % SPREAD;
    let head = token * params.n_head + min(vec2<u32>(own, own + 4u), vec2<u32>(params.n_head - 1u));

    var best0 = vec4<f32>(LOWEST);
    var best1 = vec4<f32>(LOWEST);
    for (var first = 0u; first < count; first += 4u * LANES) {
        let row = first + lane + vec4<u32>(0u, 1u, 2u, 3u) * LANES;
        let slot = slot0 + min(row, vec4<u32>(count - 1u));
        // Products of 8 queries with 4 keys of this lane, one component per key.
        var s0 = vec4<f32>(0.0);
        var s1 = vec4<f32>(0.0);
        var s2 = vec4<f32>(0.0);
        var s3 = vec4<f32>(0.0);
        var s4 = vec4<f32>(0.0);
        var s5 = vec4<f32>(0.0);
        var s6 = vec4<f32>(0.0);
        var s7 = vec4<f32>(0.0);
        let l_at = slot * params.latent_loads;
        let r_at = slot * params.rope_loads;
        for (var step = 0u; step < params.latent_loads + params.rope_loads; step++) {
            let rotary = step >= params.latent_loads;
            var w = array<vec4<u32>, 4>();
            if (rotary) {
                let at = r_at + step - params.latent_loads;
                w = array<vec4<u32>, 4>(rope_cache[at.x], rope_cache[at.y], rope_cache[at.z], rope_cache[at.w]);
            } else {
                let at = l_at + step;
                w = array<vec4<u32>, 4>(latent_cache[at.x], latent_cache[at.y], latent_cache[at.z], latent_cache[at.w]);
            }
            // The last load of a latent or of a rotary key may hold 4 elements only.
            let step_end = min((step + 1u) * FOURS, select(fours, params.latent_loads * FOURS + params.d_rope / 4u, rotary));
            for (var i = step * FOURS; i < step_end; i++) {
                let keys = mat4x4<f32>(first_of(w[0]), first_of(w[1]), first_of(w[2]), first_of(w[3]));
                w = array<vec4<u32>, 4>(w[0].zwzw, w[1].zwzw, w[2].zwzw, w[3].zwzw);
                let a = query_part(head.x, i);
                var b = a;
                if (SPREAD == 4u) {
                    b = query_part(head.y, i);
                }
                // Lane i holds 4 elements of query i in a and, where a team has 4 lanes, of query 4 + i in b.
                s0 += subgroupShuffle(a, 0u) * keys;
                s1 += subgroupShuffle(a, 1u) * keys;
                s2 += subgroupShuffle(a, 2u) * keys;
                s3 += subgroupShuffle(a, 3u) * keys;
                s4 += subgroupShuffle(b, 4u % SPREAD) * keys;
                s5 += subgroupShuffle(b, 5u % SPREAD) * keys;
                s6 += subgroupShuffle(b, 6u % SPREAD) * keys;
                s7 += subgroupShuffle(b, 7u % SPREAD) * keys;
            }
        }
        for (var j = 0u; first + lane + j * LANES < count && j < 4u; j++) {
            let low = column_of(transpose(mat4x4<f32>(s0, s1, s2, s3)), j);
            let high = column_of(transpose(mat4x4<f32>(s4, s5, s6, s7)), j);
            let at = 2u * (first + lane + j * LANES);
            sh_score[at] = low;
            sh_score[at + 1u] = high;
            best0 = max(best0, low);
            best1 = max(best1, high);
        }
    }
    for (var step = 1u; step < LANES; step *= 2u) {
        best0 = max(best0, subgroupShuffleXor(best0, step));
        best1 = max(best1, subgroupShuffleXor(best1, step));
    }
    var sum0 = vec4<f32>(0.0);
    var sum1 = vec4<f32>(0.0);
    for (var row = lane; row < count; row += LANES) {
        let low = exp(sh_score[2u * row] - best0);
        let high = exp(sh_score[2u * row + 1u] - best1);
        sh_score[2u * row] = low;
        sh_score[2u * row + 1u] = high;
        sum0 += low;
        sum1 += high;
    }
    for (var step = 1u; step < LANES; step *= 2u) {
        sum0 += subgroupShuffleXor(sum0, step);
        sum1 += subgroupShuffleXor(sum1, step);
    }

    let heads = min(params.n_head - head0, 8u);
    let split = (sequence.partial + query * sequence.splits + position0 / SPLIT) * params.n_head + head0;
    for (var load0 = 0u; load0 < params.latent_loads; load0 += LANES) {
        let load = min(load0 + lane, params.latent_loads - 1u);
        // Sums of the first four columns of a load, and of the others.
        var front = Octet();
        var back = Octet();
        for (var first = 0u; first < count; first += LANES) {
            var p0 = vec4<f32>(0.0);
            var p1 = vec4<f32>(0.0);
            if (first + lane < count) {
                p0 = sh_score[2u * (first + lane)];
                p1 = sh_score[2u * (first + lane) + 1u];
            }
            let members = min(count - first, LANES);
            for (var l = 0u; l < members; l++) {
                let c = latent_cache[(slot0 + first + l) * params.latent_loads + load];
                let w0 = subgroupShuffle(p0, l);
                let w1 = subgroupShuffle(p1, l);
                front.low += outer(w0, first_of(c));
                front.high += outer(w1, first_of(c));
                if (STORAGE_F16 == 1u) {
                    back.low += outer(w0, second_of(c));
                    back.high += outer(w1, second_of(c));
                }
            }
        }
        let at = (load0 + lane) * FOURS;
        for (var i = 0u; i < heads; i++) {
            if (at < fours) {
                partial_values[(split + i) * fours + at] = nth(front, i);
            }
            if (STORAGE_F16 == 1u && at + 1u < fours) {
                partial_values[(split + i) * fours + at + 1u] = nth(back, i);
            }
        }
    }
    for (var i = lane; i < heads; i += LANES) {
        let high = i >= 4u;
        partial_softmax[split + i] = vec2<f32>(select(best0, best1, high)[i % 4u], select(sum0, sum1, high)[i % 4u]);
    }
}

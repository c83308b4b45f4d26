// Causal attention of a tile of queries over a tile of rebuilt keys and values, with a running softmax in f32, shared by
// subgroups. Meaning, query tiles and state are those of attention_prefill. Widths are multiples of 4.
//
//   s_j = scale · (q_C · k_C_j + q_R · k_R_j)   for keys at or before the query
//   m' = max(m, max_j s_j)   l' = l·e^(m−m') + Σ_j e^(s_j−m')   values' = values·e^(m−m') + Σ_j e^(s_j−m') v_j
//
// A team is LANES invocations of one subgroup. It owns 8 queries. Scores: each lane owns 4 keys of a block of 4·LANES, LANES
// apart, for all 8 queries. Values: each lane owns COLUMNS vectors of 4 columns, and takes the weight of a key from the lane
// that owns it. Maxima and sums are butterflies of shuffles.
// Floor: as attention_prefill, 22 µs of 16 heads of 128 + 128 and 512 tokens on an H200. On an H200 at commit 10d32d5 that took 349 µs
// without wgpu's shader checks, 1 011 with them. Not measured since.
// grid: (query tiles · PARTS, n_head, ⌈d_value / 128⌉), each workgroup takes TEAMS · 8 queries of a tile
//
// STAGED 0, for software: no workgroup memory and no barrier. Each lane reads its keys from storage, and one query, which the
// others take by shuffles: 5 loads of 16 bytes serve 128 multiply-adds. Right for every subgroup size from LANES up.
// STAGED 1, for GPUs: queries and keys go through workgroup memory, CHUNK elements at a time, for all teams; all lanes of a team
// read the same query element, which costs no more than one lane's read. Values come from storage: neighbouring lanes read
// neighbouring 16 bytes, once for all teams where a cache holds 16 kB. With 16 lanes and d_value 128 that is 12 reads of
// workgroup memory for 128 multiply-adds of the scores, and 1 load and 8 shuffles for 32 of the values.
//
// Results, on lavapipe (Mesa 25, 2 cores shared with other work), CPU time of the process, in turns:
//   STAGED 0, 512 tokens, 16 heads × 128, against attention_prefill: 2.3 to 2.9× as fast, first use in 0.4 of its time
//   all vectors of columns of a key at once: 1.08 of the time, 1.13 of the time to compile
//   a separate loop without selects for the keys that all queries see: the same time, 1.2 of the time to compile
//   the 8 · COLUMNS stores at the end written out instead of in loops: 2.1 of the time to compile
// Static (RDNA3, Mesa 25), at most: 192 registers, 10 240 bytes of workgroup memory, nothing spilled.

override STORAGE_F16: u32 = 0u;
override LANES: u32 = 4u;                        // a power of two, at least 4
override TEAMS: u32 = 1u;
override PARTS: u32 = 4u;                        // workgroups that share a query tile
override COLUMNS: u32 = 4u;                      // ⌈min(d_value, 128) / (4·LANES)⌉
override STAGED: u32 = 0u;
override CHUNK: u32 = 4u;                        // elements of queries and keys staged at once, in fours
override WORKGROUP: u32 = LANES * TEAMS;
override KEYS: u32 = 4u * LANES;
// Queries that one load of a team brings.
override SPREAD: u32 = min(LANES, 8u);
// One vector of padding: lanes that read one element each, a pitch apart, would hit the same banks.
override PITCH: u32 = CHUNK + 1u;
override STAGE: u32 = max(STAGED * (8u * TEAMS + KEYS) * PITCH, 1u);

const LOWEST: f32 = -3.4028234e38;
const SLICE: u32 = 32u;                          // value columns per workgroup, in fours

struct Params {
    n_head: u32,
    n_kv_head: u32,    // divides n_head
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

// A line of the query table: consecutive queries of one sequence.
struct QueryTile {
    first_token: u32,
    count: u32,
    position: u32,     // of the first query
    sequence: u32,     // line of the sequence table
}

// A line of the sequence table.
struct SequenceRow {
    first_row: u32,    // in the step's numbering of cache rows
    first_slot: u32,   // cache row of position 0
    length: u32,       // tokens, those of this step included
    token: u32,        // first new token
}

// One vector per query: of the first four of eight, and of the others.
struct Octet {
    low: mat4x4<f32>,
    high: mat4x4<f32>,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;               // [tokens, n_head, (d_nope + d_rope) / 4], rotated
@group(0) @binding(2) var<storage, read> kv: array<vec4<f32>>;              // [kv_rows, n_kv_head, (d_nope + d_value) / 4]
@group(0) @binding(3) var<storage, read> rope_cache: array<vec4<u32>>;      // [cache rows, rope_pitch], 16 bytes per element
@group(0) @binding(4) var<storage, read> queries: array<QueryTile>;         // [query tiles]
@group(0) @binding(5) var<storage, read> sequences: array<SequenceRow>;     // [n_sequence]
@group(0) @binding(6) var<storage, read_write> values: array<vec4<f32>>;    // [tokens, n_head, d_value / 4]
@group(0) @binding(7) var<storage, read_write> softmax: array<vec2<f32>>;   // [tokens, n_head, slices] (m, l)

// Queries of all teams, then keys, of a chunk.
var<workgroup> sh_stage: array<vec4<f32>, STAGE>;

// Elements i to i + 3 of the rope cache; i is a multiple of 4.
fn rope_four(i: u32) -> vec4<f32> {
    if (STORAGE_F16 == 1u) {
        let eight = rope_cache[i >> 3u];
        let four = select(eight.xy, eight.zw, (i & 4u) == 4u);
        return vec4<f32>(unpack2x16float(four.x), unpack2x16float(four.y));
    }
    return bitcast<vec4<f32>>(rope_cache[i >> 2u]);
}

// Adds the products of 8 queries with 4 keys of this lane, one component per key. Lane base + i of the subgroup holds 4
// elements of query i in a and, where a team has 4 lanes, of query 4 + i in b.
fn meet(sums: ptr<function, Octet>, a: vec4<f32>, b: vec4<f32>, keys: mat4x4<f32>, base: u32) {
    (*sums).low += mat4x4<f32>(
        subgroupShuffle(a, base) * keys,
        subgroupShuffle(a, base + 1u) * keys,
        subgroupShuffle(a, base + 2u) * keys,
        subgroupShuffle(a, base + 3u) * keys,
    );
    (*sums).high += mat4x4<f32>(
        subgroupShuffle(b, base + 4u % SPREAD) * keys,
        subgroupShuffle(b, base + 5u % SPREAD) * keys,
        subgroupShuffle(b, base + 6u % SPREAD) * keys,
        subgroupShuffle(b, base + 7u % SPREAD) * keys,
    );
}

// Of the four components of each column.
fn largest(m: mat4x4<f32>) -> vec4<f32> {
    let t = transpose(m);
    return max(max(t[0], t[1]), max(t[2], t[3]));
}

fn total(m: mat4x4<f32>) -> vec4<f32> {
    let t = transpose(m);
    return (t[0] + t[1]) + (t[2] + t[3]);
}

// e^(m − best), one column per query.
fn exponentials(m: mat4x4<f32>, best: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(exp(m[0] - best.x), exp(m[1] - best.y), exp(m[2] - best.z), exp(m[3] - best.w));
}

// What the queries, one column each, see of the keys, one component each: `seen` of them from the first.
fn masked(m: mat4x4<f32>, key: vec4<u32>, seen: vec4<u32>, unseen: f32) -> mat4x4<f32> {
    let none = vec4<f32>(unseen);
    return mat4x4<f32>(
        select(none, m[0], key < vec4<u32>(seen.x)),
        select(none, m[1], key < vec4<u32>(seen.y)),
        select(none, m[2], key < vec4<u32>(seen.z)),
        select(none, m[3], key < vec4<u32>(seen.w)),
    );
}

// Products of four staged queries with four keys, one column per query.
fn staged(at: u32, keys: mat4x4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(
        sh_stage[at] * keys,
        sh_stage[at + PITCH] * keys,
        sh_stage[at + 2u * PITCH] * keys,
        sh_stage[at + 3u * PITCH] * keys,
    );
}

// Each component of a times b, one column each.
fn outer(a: vec4<f32>, b: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(a.x * b, a.y * b, a.z * b, a.w * b);
}

// A matrix, each column times its factor.
fn by_column(m: mat4x4<f32>, factors: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(factors.x * m[0], factors.y * m[1], factors.z * m[2], factors.w * m[3]);
}

// Column i of a matrix, without an index into registers.
fn column_of(m: mat4x4<f32>, i: u32) -> vec4<f32> {
    return select(select(m[0], m[1], i == 1u), select(m[2], m[3], i == 3u), i >= 2u);
}

fn nth(vectors: Octet, i: u32) -> vec4<f32> {
    return select(column_of(vectors.low, i), column_of(vectors.high, i - 4u), i >= 4u);
}

// Takes the first vector of columns out and puts `back` behind the last: COLUMNS calls bring all back to their places. That
// keeps the loops over columns from being unrolled, which compiles faster, with 8 vectors at a time.
fn rotate_columns(sums: ptr<function, array<Octet, 8>>, back: Octet) {
    (*sums)[0] = (*sums)[1];
    (*sums)[1] = (*sums)[2];
    (*sums)[2] = (*sums)[3];
    (*sums)[3] = (*sums)[4];
    (*sums)[4] = (*sums)[5];
    (*sums)[5] = (*sums)[6];
    (*sums)[6] = (*sums)[7];
    (*sums)[COLUMNS - 1u] = back;
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
    @builtin(subgroup_invocation_id) member: u32,
) {
    let work = unfold(group, groups);
    if (work.z >= params.tiles_z) {
        return;
    }
    let tile = queries[work.x / PARTS];
    let sequence = sequences[tile.sequence];
    let head = work.y;
    // Queries of this workgroup: from own0 on, those of the tile that are left.
    let own0 = work.x % PARTS * TEAMS * 8u;
    if (own0 >= tile.count) {
        return;
    }
    let own_count = min(tile.count - own0, TEAMS * 8u);
    // Widths and pitches in fours.
    let nope = params.d_nope / 4u;
    let width = (params.d_nope + params.d_rope) / 4u;
    let value_width = params.d_value / 4u;
    let kv_row = params.n_kv_head * (nope + value_width);
    let kv_head = head / (params.n_head / params.n_kv_head);
    let column0 = work.z * SLICE;
    let columns = (min(value_width, SLICE) + LANES - 1u) / LANES;   // COLUMNS, unknown to the compiler

    // Neighbours in a workgroup of one dimension are neighbours in a subgroup: LANES of them are a team.
    let lane = member % LANES;
    let base = member - lane;
    let own = own0 + local / LANES * 8u;   // first query of the team
    let team_count = min(max(tile.count, own) - own, 8u);
    let last = tile.count - 1u;
    let position0 = vec4<u32>(tile.position + own) + vec4<u32>(0u, 1u, 2u, 3u);
    let position1 = position0 + 4u;
    let q_token = tile.first_token + min(vec2<u32>(own, own + 4u) + lane % SPREAD, vec2<u32>(last));
    let q_at = (q_token * params.n_head + head) * width;
    let state0 = ((tile.first_token + own) * params.n_head + head) * params.tiles_z + work.z;
    let state_pitch = params.n_head * params.tiles_z;
    let out0 = ((tile.first_token + own) * params.n_head + head) * value_width + column0;
    let out_pitch = params.n_head * value_width;

    // Keys of this tile: those of the sequence, up to the last that a query of the workgroup may see.
    let tile_end = params.kv_first + params.kv_rows;
    let begin = max(params.kv_first, sequence.first_row) - sequence.first_row;
    var end = 0u;
    if (tile_end > sequence.first_row) {
        end = min(min(tile_end - sequence.first_row, sequence.length), tile.position + own0 + own_count);
    }

    // Of queries 0 to 3 and 4 to 7 of the team; the sums over the keys of this lane.
    var best0 = vec4<f32>(LOWEST);
    var best1 = vec4<f32>(LOWEST);
    var sum0 = vec4<f32>(0.0);
    var sum1 = vec4<f32>(0.0);
    var acc = array<Octet, 8>();
    for (var key0 = begin; key0 < end; key0 += KEYS) {
        let count = min(end - key0, KEYS);
        let kv_base = (sequence.first_row + key0 - params.kv_first) * kv_row + kv_head * (nope + value_width);
        let rope_base = (sequence.first_slot + key0) * params.rope_pitch;
        let key = vec4<u32>(lane) + vec4<u32>(0u, 1u, 2u, 3u) * LANES;
        // One component per key of this lane.
        var s = Octet();
        if (STAGED == 1u) {
            for (var d0 = 0u; d0 < width; d0 += CHUNK) {
                for (var e = local; e < 8u * TEAMS * CHUNK; e += WORKGROUP) {
                    let d = d0 + e % CHUNK;
                    let r = e / CHUNK;
                    var four = vec4<f32>(0.0);
                    if (d < width && r < own_count) {
                        four = params.scale * q[((tile.first_token + own0 + r) * params.n_head + head) * width + d];
                    }
                    sh_stage[r * PITCH + e % CHUNK] = four;
                }
                for (var e = local; e < KEYS * CHUNK; e += WORKGROUP) {
                    let d = d0 + e % CHUNK;
                    let r = e / CHUNK;
                    var four = vec4<f32>(0.0);
                    if (d < width && r < count) {
                        if (d < nope) {
                            four = kv[kv_base + r * kv_row + d];
                        } else {
                            four = rope_four(rope_base + r * params.rope_pitch + 4u * (d - nope));
                        }
                    }
                    sh_stage[(8u * TEAMS + r) * PITCH + e % CHUNK] = four;
                }
                workgroupBarrier();
                for (var d = 0u; d < CHUNK; d++) {
                    let k = (8u * TEAMS + key) * PITCH + d;
                    let keys = mat4x4<f32>(sh_stage[k.x], sh_stage[k.y], sh_stage[k.z], sh_stage[k.w]);
                    s.low += staged((own - own0) * PITCH + d, keys);
                    s.high += staged((own - own0 + 4u) * PITCH + d, keys);
                }
                workgroupBarrier();
            }
        } else {
            // Keys past the end repeat the last one; their weight is 0.
            let k_row = min(key, vec4<u32>(count - 1u));
            let k = kv_base + k_row * kv_row;
            let rotary = rope_base + k_row * params.rope_pitch;
            for (var d = 0u; d < width; d++) {
                let a = params.scale * q[q_at.x + d];
                var b = a;
                if (SPREAD == 4u) {
                    b = params.scale * q[q_at.y + d];
                }
                var keys = mat4x4<f32>();
                if (d < nope) {
                    keys = mat4x4<f32>(kv[k.x + d], kv[k.y + d], kv[k.z + d], kv[k.w + d]);
                } else {
                    let r = rotary + 4u * (d - nope);
                    keys = mat4x4<f32>(rope_four(r.x), rope_four(r.y), rope_four(r.z), rope_four(r.w));
                }
                meet(&s, a, b, keys, base);
            }
        }

        // How many keys of this block each query sees, from the first: none for a query before the block.
        let seen0 = min(max(position0 + 1u, vec4<u32>(key0)) - key0, vec4<u32>(count));
        let seen1 = min(max(position1 + 1u, vec4<u32>(key0)) - key0, vec4<u32>(count));
        s.low = masked(s.low, key, seen0, LOWEST);
        s.high = masked(s.high, key, seen1, LOWEST);
        var next0 = largest(s.low);
        var next1 = largest(s.high);
        for (var step = 1u; step < LANES; step *= 2u) {
            next0 = max(next0, subgroupShuffleXor(next0, step));
            next1 = max(next1, subgroupShuffleXor(next1, step));
        }
        next0 = max(next0, best0);
        next1 = max(next1, best1);
        let shrink0 = exp(best0 - next0);
        let shrink1 = exp(best1 - next1);
        best0 = next0;
        best1 = next1;
        // A masked key has weight 0, not e^0: before its first key, the maximum of a query is the score of a masked key.
        s.low = masked(exponentials(s.low, next0), key, seen0, 0.0);
        s.high = masked(exponentials(s.high, next1), key, seen1, 0.0);
        sum0 = sum0 * shrink0 + total(s.low);
        sum1 = sum1 * shrink1 + total(s.high);

        // Keys that all queries see. The others are added by query: a NaN among the values must not reach a query before it,
        // and 0 · NaN would.
        let full = STAGED * min(max(tile.position + own0 + 1u, key0) - key0, count);
        for (var c = 0u; c < columns; c++) {
            var sums = Octet(by_column(acc[0].low, shrink0), by_column(acc[0].high, shrink1));
            let v = kv_base + nope + min(column0 + lane + c * LANES, value_width - 1u);
            for (var part = 0u; part * LANES < count; part++) {
                let p0 = column_of(transpose(s.low), part);
                let p1 = column_of(transpose(s.high), part);
                let part_end = min((part + 1u) * LANES, count);
                let part_full = clamp(full, part * LANES, part_end);
                for (var k = part * LANES; k < part_full; k++) {
                    let value = kv[v + k * kv_row];
                    let w0 = subgroupShuffle(p0, base + k % LANES);
                    let w1 = subgroupShuffle(p1, base + k % LANES);
                    sums.low += outer(w0, value);
                    sums.high += outer(w1, value);
                }
                for (var k = part_full; k < part_end; k++) {
                    let value = kv[v + k * kv_row];
                    let w0 = subgroupShuffle(p0, base + k % LANES);
                    let w1 = subgroupShuffle(p1, base + k % LANES);
                    sums.low += masked(outer(w0, value), vec4<u32>(k), seen0, 0.0);
                    sums.high += masked(outer(w1, value), vec4<u32>(k), seen1, 0.0);
                }
            }
            rotate_columns(&acc, sums);
        }
    }

    for (var step = 1u; step < LANES; step *= 2u) {
        sum0 += subgroupShuffleXor(sum0, step);
        sum1 += subgroupShuffleXor(sum1, step);
    }
    // The state before this tile; only one lane reads and writes that of a query.
    var before = vec4<f32>(LOWEST, 0.0, LOWEST, 0.0);
    if (params.first == 0u) {
        if (lane < team_count) {
            let state = softmax[state0 + lane * state_pitch];
            before = vec4<f32>(state, before.zw);
        }
        if (SPREAD == 4u && lane + 4u < team_count) {
            before = vec4<f32>(before.xy, softmax[state0 + (lane + 4u) * state_pitch]);
        }
    }
    for (var r = 0u; r < min(own_count, 8u); r++) {
        let states = subgroupShuffle(before, base + r % SPREAD);
        let state = select(states.xy, states.zw, r >= SPREAD);
        let best = select(best0, best1, r >= 4u)[r % 4u];
        let next = max(state.x, best);
        let shrink = vec2<f32>(exp(state.x - next), exp(best - next));
        let sum = dot(shrink, vec2<f32>(state.y, select(sum0, sum1, r >= 4u)[r % 4u]));
        var factor = shrink;
        if (params.last == 1u) {
            factor *= select(0.0, 1.0 / sum, sum > 0.0);
        }
        for (var c = 0u; c < columns; c++) {
            let column = lane + c * LANES;
            if (r < team_count && column0 + column < value_width) {
                let at = out0 + r * out_pitch + column;
                var value = factor.y * nth(acc[0], r);
                if (params.first == 0u) {
                    value += factor.x * values[at];
                }
                values[at] = value;
            }
            rotate_columns(&acc, acc[0]);
        }
        if (r < team_count && lane == r % SPREAD) {
            softmax[state0 + r * state_pitch] = vec2<f32>(next, sum);
        }
    }
}

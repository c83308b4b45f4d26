// Causal attention of a tile of queries over a tile of rebuilt keys and values, with a running softmax in f32.
//
//   s_j = scale · (q_C · k_C_j + q_R · k_R_j)   for keys at or before the query
//   m' = max(m, max_j s_j)   l' = l·e^(m−m') + Σ_j e^(s_j−m')   values' = values·e^(m−m') + Σ_j e^(s_j−m') v_j
//
// The key tile holds rows [kv_first, kv_first + kv_rows) of the step's row numbering (see cache_read). Tiles come one after
// another: the first starts from the empty state (m = lowest f32, l = 0), the last divides by l; a query without any key
// gives 0. lse = m + ln l, natural logarithm. Widths are multiples of 4.
// Floor: n_head · (d_nope + d_rope + d_value) multiply-adds for every query and key that it sees: 16 heads of 128 + 128 and 512
// tokens are 1.1 GFLOP, 22 µs of an H200 in f32. Workgroup memory is the limit before that: 8 reads of 16 bytes for 64 multiply-
// adds, up to twice their cycles on a processor that reads 128 bytes per cycle.
// grid: (query tiles, n_head, ⌈d_value / 128⌉); 8 lanes share 4 queries: each lane owns 4 keys of a block of 32 and 4·COLUMNS
// value columns, so that 8 loads of 16 bytes serve 64 multiply-adds of the scores, and 1 + COLUMNS serve 16·COLUMNS of the values.
//
// Results, on lavapipe (Mesa 25, 2 cores shared with other work), medians in turns:
//   4 × 4 scores per lane and 16-byte vectors, for 2 × 8 and single floats: 8× at 256 tokens, 16 heads × 128
//   ROWS 8 → 16: 0.6 to 0.8×, a causal tile of 64 wastes more; 8 → 4: 0.7 to 1.1×, shape by shape
//   without workgroup memory, 8 × 16 scores per lane, all written out: 1.1 to 1.3×, not worth it
//   loads at an index that is the same in all lanes: 1.2× per load, the driver gathers lane by lane all the same
// Static (RDNA3, Mesa 25), at most: 168 registers, 16 384 bytes of workgroup memory, nothing spilled.

override STORAGE_F16: u32 = 0u;                  // of the rope cache
override KV_F16: u32 = 0u;                       // of keys and values
override ROWS: u32 = 8u;                         // groups of 4 queries
override CHUNK: u32 = 8u;                        // elements of queries and keys staged at once, in fours
override VALUE_ROWS: u32 = 16u;                  // values staged at once; divides TILE_KV, and fits into the memory of the chunk
override COLUMNS: u32 = 4u;                      // value columns per lane, in fours; at most 4
override WORKGROUP: u32 = ROWS * 8u;
override TILE_Q: u32 = ROWS * 4u;
// One vector of padding: 8 lanes that read or write one element each, a pitch apart, would hit the same banks.
override CHUNK_PITCH: u32 = CHUNK + 1u;
override ROWS_PITCH: u32 = ROWS + 1u;

const LOWEST: f32 = -3.4028234e38;
const LANES: u32 = 8u;
const TILE_KV: u32 = 32u;

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

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;               // [tokens, n_head, (d_nope + d_rope) / 4], rotated
@group(0) @binding(2) var<storage, read> kv: array<vec4<u32>>;              // [kv_rows, n_kv_head, d_nope + d_value], 16 bytes each
@group(0) @binding(3) var<storage, read> rope_cache: array<vec4<u32>>;      // [cache rows, rope_pitch], 16 bytes per element
@group(0) @binding(4) var<storage, read> queries: array<QueryTile>;         // [query tiles]
@group(0) @binding(5) var<storage, read> sequences: array<SequenceRow>;     // [n_sequence]
@group(0) @binding(6) var<storage, read_write> values: array<vec4<f32>>;    // [tokens, n_head, d_value / 4]
@group(0) @binding(7) var<storage, read_write> softmax: array<vec2<f32>>;   // [tokens, n_head, slices] (m, l)

// Queries, then keys, of a chunk; later a block of values.
var<workgroup> sh_stage: array<vec4<f32>, (TILE_Q + TILE_KV) * CHUNK_PITCH>;
// [key] e^(s − m) of 4 queries; before that [lane] maxima, and at the end [lane] sums.
var<workgroup> sh_p: array<vec4<f32>, TILE_KV * ROWS_PITCH>;

// Elements i to i + 3 of the rope cache; i is a multiple of 4.
fn rope_four(i: u32) -> vec4<f32> {
    if (STORAGE_F16 == 1u) {
        let eight = rope_cache[i >> 3u];
        let four = select(eight.xy, eight.zw, (i & 4u) == 4u);
        return vec4<f32>(unpack2x16float(four.x), unpack2x16float(four.y));
    }
    return bitcast<vec4<f32>>(rope_cache[i >> 2u]);
}

// The i-th four elements of keys and values.
fn kv_four(i: u32) -> vec4<f32> {
    if (KV_F16 == 1u) {
        let eight = kv[i >> 1u];
        let four = select(eight.xy, eight.zw, (i & 1u) == 1u);
        return vec4<f32>(unpack2x16float(four.x), unpack2x16float(four.y));
    }
    return bitcast<vec4<f32>>(kv[i]);
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

// Each component of a times b, one column each.
fn outer(a: vec4<f32>, b: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(a.x * b, a.y * b, a.z * b, a.w * b);
}

// A matrix, each column times its factor.
fn by_column(m: mat4x4<f32>, factors: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(factors.x * m[0], factors.y * m[1], factors.z * m[2], factors.w * m[3]);
}

// Columns c of the values of four queries so far, one column per query; 0 outside the `left` that remain.
fn values_at(at: vec4<u32>, c: u32, left: u32) -> mat4x4<f32> {
    if (c >= COLUMNS || c * LANES >= left) {
        return mat4x4<f32>();
    }
    let i = at + c * LANES;
    return mat4x4<f32>(values[i.x], values[i.y], values[i.z], values[i.w]);
}

fn store_values(at: vec4<u32>, c: u32, left: u32, queries: u32, sums: mat4x4<f32>) {
    if (c >= COLUMNS || c * LANES >= left) {
        return;
    }
    let i = at + c * LANES;
    if (queries > 0u) {
        values[i.x] = sums[0];
    }
    if (queries > 1u) {
        values[i.y] = sums[1];
    }
    if (queries > 2u) {
        values[i.z] = sums[2];
    }
    if (queries > 3u) {
        values[i.w] = sums[3];
    }
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
    let tile = queries[work.x];
    let sequence = sequences[tile.sequence];
    let head = work.y;
    // Widths and pitches in fours.
    let nope = params.d_nope / 4u;
    let width = (params.d_nope + params.d_rope) / 4u;
    let value_width = params.d_value / 4u;
    let kv_row = params.n_kv_head * (nope + value_width);
    let kv_head = head / (params.n_head / params.n_kv_head);
    let columns = COLUMNS * LANES;
    let column0 = work.z * columns;

    let lane = local % LANES;
    let four = local / LANES;              // queries 4·four to 4·four + 3 of the tile
    let own = four * 4u;
    let position = vec4<u32>(tile.position + own) + vec4<u32>(0u, 1u, 2u, 3u);
    let last = tile.count - 1u;
    let token = vec4<u32>(tile.first_token) + min(vec4<u32>(own, own + 1u, own + 2u, own + 3u), vec4<u32>(last));
    let state = (token * params.n_head + head) * params.tiles_z + work.z;
    let out = (token * params.n_head + head) * value_width + column0 + lane;
    let left = max(value_width, column0 + lane) - column0 - lane;

    // Keys of this tile: those of the sequence, up to the last that a query of the tile may see.
    let tile_end = params.kv_first + params.kv_rows;
    let begin = max(params.kv_first, sequence.first_row) - sequence.first_row;
    var end = 0u;
    if (tile_end > sequence.first_row) {
        end = min(min(tile_end - sequence.first_row, sequence.length), tile.position + tile.count);
    }

    var best = vec4<f32>(LOWEST);
    var sum = vec4<f32>(0.0);              // over the keys of this lane
    // One matrix per four columns of values, one column of it per query.
    var acc = array<mat4x4<f32>, 4>();
    if (params.first == 0u) {
        let states = array<vec2<f32>, 4>(softmax[state.x], softmax[state.y], softmax[state.z], softmax[state.w]);
        best = vec4<f32>(states[0].x, states[1].x, states[2].x, states[3].x);
        if (lane == 0u) {
            sum = vec4<f32>(states[0].y, states[1].y, states[2].y, states[3].y);
        }
        acc[0] = values_at(out, 0u, left);
        acc[1] = values_at(out, 1u, left);
        acc[2] = values_at(out, 2u, left);
        acc[3] = values_at(out, 3u, left);
    }

    for (var key0 = begin; key0 < end; key0 += TILE_KV) {
        let kv_base = (sequence.first_row + key0 - params.kv_first) * kv_row + kv_head * (nope + value_width);
        // Scores of the 4 queries, one column each, with the keys lane, lane + 8, lane + 16 and lane + 24.
        var s = mat4x4<f32>();
        for (var d0 = 0u; d0 < width; d0 += CHUNK) {
            for (var e = local; e < TILE_Q * CHUNK; e += WORKGROUP) {
                let d = d0 + e % CHUNK;
                let r = e / CHUNK;
                var loaded = vec4<f32>(0.0);
                if (d < width && r < tile.count) {
                    loaded = params.scale * q[((tile.first_token + r) * params.n_head + head) * width + d];
                }
                sh_stage[r * CHUNK_PITCH + e % CHUNK] = loaded;
            }
            for (var e = local; e < TILE_KV * CHUNK; e += WORKGROUP) {
                let d = d0 + e % CHUNK;
                let r = e / CHUNK;
                var loaded = vec4<f32>(0.0);
                if (d < width && key0 + r < end) {
                    if (d < nope) {
                        loaded = kv_four(kv_base + r * kv_row + d);
                    } else {
                        loaded = rope_four((sequence.first_slot + key0 + r) * params.rope_pitch + 4u * (d - nope));
                    }
                }
                sh_stage[(TILE_Q + r) * CHUNK_PITCH + e % CHUNK] = loaded;
            }
            workgroupBarrier();
            for (var d = 0u; d < CHUNK; d++) {
                let qi = own * CHUNK_PITCH + d;
                let ki = (TILE_Q + lane) * CHUNK_PITCH + d;
                let keys = mat4x4<f32>(
                    sh_stage[ki],
                    sh_stage[ki + LANES * CHUNK_PITCH],
                    sh_stage[ki + 2u * LANES * CHUNK_PITCH],
                    sh_stage[ki + 3u * LANES * CHUNK_PITCH],
                );
                s += mat4x4<f32>(
                    sh_stage[qi] * keys,
                    sh_stage[qi + CHUNK_PITCH] * keys,
                    sh_stage[qi + 2u * CHUNK_PITCH] * keys,
                    sh_stage[qi + 3u * CHUNK_PITCH] * keys,
                );
            }
            workgroupBarrier();
        }

        // How many keys of this block each query sees, from the first: none for a query before the block.
        let seen = min(max(position + 1u, vec4<u32>(key0)) - key0, vec4<u32>(min(end - key0, TILE_KV)));
        let key = vec4<u32>(lane) + vec4<u32>(0u, 1u, 2u, 3u) * LANES;
        s = masked(s, key, seen, LOWEST);
        sh_p[lane * ROWS_PITCH + four] = largest(s);
        workgroupBarrier();
        var next = best;
        for (var l = 0u; l < LANES; l++) {
            next = max(next, sh_p[l * ROWS_PITCH + four]);
        }
        workgroupBarrier();
        // A masked key has weight 0, not e^0: before its first key, the maximum of a query is the score of a masked key.
        let weights = masked(exponentials(s, next), key, seen, 0.0);
        let shrink = exp(best - next);
        best = next;
        sum = sum * shrink + total(weights);
        let of_key = transpose(weights);
        sh_p[key.x * ROWS_PITCH + four] = of_key[0];
        sh_p[key.y * ROWS_PITCH + four] = of_key[1];
        sh_p[key.z * ROWS_PITCH + four] = of_key[2];
        sh_p[key.w * ROWS_PITCH + four] = of_key[3];
        acc[0] = by_column(acc[0], shrink);
        acc[1] = by_column(acc[1], shrink);
        acc[2] = by_column(acc[2], shrink);
        acc[3] = by_column(acc[3], shrink);

        for (var k0 = 0u; k0 < TILE_KV; k0 += VALUE_ROWS) {
            for (var e = local; e < VALUE_ROWS * columns; e += WORKGROUP) {
                let r = k0 + e / columns;
                let column = column0 + e % columns;
                var loaded = vec4<f32>(0.0);
                if (column < value_width && key0 + r < end) {
                    loaded = kv_four(kv_base + r * kv_row + nope + column);
                }
                sh_stage[e] = loaded;
            }
            workgroupBarrier();
            // The first of the queries sees the fewest keys. Keys past those are added by query: a NaN among the values must
            // not reach a query before it, and 0 · NaN would.
            for (var k = k0; k < min(seen.x, k0 + VALUE_ROWS); k++) {
                let p = sh_p[k * ROWS_PITCH + four];
                let v = (k - k0) * columns + lane;
                acc[0] += outer(p, sh_stage[v]);
                if (COLUMNS > 1u) {
                    acc[1] += outer(p, sh_stage[v + LANES]);
                }
                if (COLUMNS > 2u) {
                    acc[2] += outer(p, sh_stage[v + 2u * LANES]);
                }
                if (COLUMNS > 3u) {
                    acc[3] += outer(p, sh_stage[v + 3u * LANES]);
                }
            }
            for (var k = max(seen.x, k0); k < min(seen.w, k0 + VALUE_ROWS); k++) {
                let p = sh_p[k * ROWS_PITCH + four];
                let v = (k - k0) * columns + lane;
                acc[0] += masked(outer(p, sh_stage[v]), vec4<u32>(k), seen, 0.0);
                if (COLUMNS > 1u) {
                    acc[1] += masked(outer(p, sh_stage[v + LANES]), vec4<u32>(k), seen, 0.0);
                }
                if (COLUMNS > 2u) {
                    acc[2] += masked(outer(p, sh_stage[v + 2u * LANES]), vec4<u32>(k), seen, 0.0);
                }
                if (COLUMNS > 3u) {
                    acc[3] += masked(outer(p, sh_stage[v + 3u * LANES]), vec4<u32>(k), seen, 0.0);
                }
            }
            workgroupBarrier();
        }
    }

    sh_p[lane * ROWS_PITCH + four] = sum;
    workgroupBarrier();
    sum = vec4<f32>(0.0);
    for (var l = 0u; l < LANES; l++) {
        sum += sh_p[l * ROWS_PITCH + four];
    }
    var factor = vec4<f32>(1.0);
    if (params.last == 1u) {
        factor = select(vec4<f32>(0.0), 1.0 / sum, sum > vec4<f32>(0.0));
    }
    let stored = max(tile.count, own) - own;
    store_values(out, 0u, left, stored, by_column(acc[0], factor));
    store_values(out, 1u, left, stored, by_column(acc[1], factor));
    store_values(out, 2u, left, stored, by_column(acc[2], factor));
    store_values(out, 3u, left, stored, by_column(acc[3], factor));
    // The maximum is the same in every lane.
    let maxima = best;
    let sums = sum;
    if (lane < 4u && own + lane <= last) {
        softmax[state[lane]] = vec2<f32>(maxima[lane], sums[lane]);
    }
}

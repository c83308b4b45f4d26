// Causal attention of a tile of queries over a tile of rebuilt keys and values by cooperative matrices of 8 × 8: f16 factors,
// sums and softmax in f32. Meaning, tables and running state are those of attention_prefill:
//
//   s_j = f16(scale · q) · f16(k_j)   p_j = e^(s_j−m)   l = Σ_j p_j   values = Σ_j f16(p_j) f16(v_j)
//
// The key tile holds rows [kv_first, kv_first + kv_rows) of the step's row numbering (see cache_read). m may lie below the
// largest score, by RESERVE at most: scaling the queries of a matrix apart takes a detour through workgroup memory, and the
// reserve makes that seldom. f16 holds far more than e^RESERVE; (m, l) mean the same whatever m is, and lse = m + ln l.
// The product of 0 and a value that is not finite is not 0. Where some query of the tile does not see some key of the block,
// such a value is staged as 0 and its weight as NaN, which reaches only the queries that see it.
// grid: (query tiles · PARTS, n_head, ⌈d_value / 128⌉); each workgroup takes 32 queries of a tile, 32 keys at a time; each of
// four subgroups owns 16 × 16 of the scores and 32 × COLUMNS of the values. Further subgroups repeat one, and store the same.
// Widths are multiples of 4.
//
// On lavapipe (Mesa 26, 2 cores): 0.5 to 0.8 of the rate of attention_prefill, and a minute to compile. Not run on a GPU yet.
// Halves are staged one by one, since Metal's loads of matrices, as naga writes them, take no pointer to a vector.

enable f16;
enable wgpu_cooperative_matrix;

override WORKGROUP: u32 = 128u;                  // four subgroups or more, 32 to 256 invocations
override PARTS: u32 = 1u;                        // workgroups of a query tile
override COLUMNS: u32 = 32u;                     // value columns of a subgroup: 32 or 16
override LANES: u32 = WORKGROUP / 32u;           // per query
override VALUE_ROWS: u32 = 512u / COLUMNS;       // values staged at once
override VALUE_PITCH: u32 = COLUMNS * 4u + 8u;   // of a staged value; padded as the chunk is

const LOWEST: f32 = -3.4028234e38;
const RESERVE: f32 = 4.0;
const SIDE: u32 = 8u;
const MATRIX: u32 = SIDE * SIDE;
const TILE_Q: u32 = 32u;
const TILE_KV: u32 = 32u;
const QUADS: u32 = 16u;                          // fours of a chunk of queries and keys, staged at once
const SCORE_PITCH: u32 = TILE_KV + 4u;
const CHUNK_PITCH: u32 = QUADS * 4u + 8u;        // pitches 16 bytes beyond a multiple of 128 spread over the banks
const WEIGHT_PITCH: u32 = TILE_KV + 8u;
const VALUES: u32 = TILE_Q * WEIGHT_PITCH;       // where staged values begin, behind the weights

// Matrices of factors, and of sums.
alias Left = coop_mat8x8<f16, A>;
alias Right = coop_mat8x8<f16, B>;
alias Sums = coop_mat8x8<f32, C>;

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
@group(0) @binding(2) var<storage, read> kv: array<vec4<f32>>;              // [kv_rows, n_kv_head, (d_nope + d_value) / 4]
@group(0) @binding(3) var<storage, read> rope_cache: array<vec4<f16>>;      // [cache rows, rope_pitch / 4]
@group(0) @binding(4) var<storage, read> queries: array<QueryTile>;         // [query tiles]
@group(0) @binding(5) var<storage, read> sequences: array<SequenceRow>;     // [n_sequence]
@group(0) @binding(6) var<storage, read_write> values: array<f32>;          // [tokens, n_head, d_value]
@group(0) @binding(7) var<storage, read_write> softmax: array<vec2<f32>>;   // [tokens, n_head, slices] (m, l)

// A chunk of queries, then of keys; later weights [query, key], then values [key, column].
var<workgroup> sh_stage: array<f16, (TILE_Q + TILE_KV) * CHUNK_PITCH>;
// [query, key] scores; one matrix per subgroup on its way from or to storage.
var<workgroup> sh_scores: array<f32, TILE_Q * SCORE_PITCH>;
var<workgroup> sh_part: array<f32, WORKGROUP>;   // [query, lane] maxima, at the end sums
var<workgroup> sh_factor: array<f32, TILE_Q>;    // factor on the values of a query
var<workgroup> sh_poison: array<u32, TILE_KV>;   // 1: the value of this key is not finite
// x = 1: some factor is not 1. 16 bytes: matrices need the arrays around it to begin on multiples of 16.
var<workgroup> sh_scaled: vec4<u32>;

// Stages four halves.
fn stage_each(at: u32, four: vec4<f32>) {
    let halves = vec4<f16>(four);
    sh_stage[at] = halves.x;
    sh_stage[at + 1u] = halves.y;
    sh_stage[at + 2u] = halves.z;
    sh_stage[at + 3u] = halves.w;
}

// Which of four numbers round to halves that are not finite. Bits tell: compilers may assume that there is no NaN.
fn overflows(four: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(four) & vec4<u32>(0x7fffffffu)) >= vec4<u32>(0x477ff000u);
}

// Fills matrix (i, j) of each subgroup with the running values; `column0` is the slice's first. Queries past `count` are 0.
fn begin_values(i: u32, j: u32, out: u32, count: u32, column0: u32, local: u32) {
    workgroupBarrier();
    for (var e = local; e < 4u * MATRIX; e += WORKGROUP) {
        let query = i * SIDE + e % MATRIX / SIDE;
        let column = column0 + e / MATRIX * COLUMNS + j * SIDE + e % SIDE;
        var value = 0.0;
        if (params.first == 0u && query < count && column < params.d_value) {
            value = values[out + query * params.n_head * params.d_value + column];
        }
        sh_scores[e] = value;
    }
    workgroupBarrier();
}

// Multiplies the queries of matrix (i, …) of each subgroup by their factors.
fn scaled(sums: Sums, i: u32, local: u32, own: u32) -> Sums {
    coopStoreT(sums, &sh_scores[MATRIX * own], SIDE);
    workgroupBarrier();
    for (var e = local; e < 4u * MATRIX; e += WORKGROUP) {
        sh_scores[e] *= sh_factor[i * SIDE + e % MATRIX / SIDE];
    }
    workgroupBarrier();
    let result = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    workgroupBarrier();
    return result;
}

// Writes matrix (i, j) of each subgroup, its queries multiplied by their factors.
fn end_values(sums: Sums, i: u32, j: u32, out: u32, count: u32, column0: u32, local: u32, own: u32) {
    coopStoreT(sums, &sh_scores[MATRIX * own], SIDE);
    workgroupBarrier();
    for (var e = local; e < 4u * MATRIX; e += WORKGROUP) {
        let query = i * SIDE + e % MATRIX / SIDE;
        let column = column0 + e / MATRIX * COLUMNS + j * SIDE + e % SIDE;
        if (query < count && column < params.d_value) {
            values[out + query * params.n_head * params.d_value + column] = sh_scores[e] * sh_factor[query];
        }
    }
    workgroupBarrier();
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
    // Tile of the workgroup: a grid over 65 535 is folded into x and y. Values, not variables or a function: naga
    // must see that control flow is uniform, since matrices belong to whole subgroups.
    let tiles = vec3<u32>(params.tiles_x, params.tiles_y, params.tiles_z);
    let i = group.y * groups.x + group.x;
    let unfolded = vec3<u32>(i % tiles.x, i / tiles.x % tiles.y, i / (tiles.x * tiles.y));
    let work = select(unfolded, group, all(groups == tiles));
    if (work.z >= params.tiles_z) {
        return;
    }
    let tile = queries[work.x / PARTS];
    let sequence = sequences[tile.sequence];
    let head = work.y;
    // Widths and pitches in fours.
    let nope = params.d_nope / 4u;
    let width = (params.d_nope + params.d_rope) / 4u;
    let value_width = params.d_value / 4u;
    let kv_row = params.n_kv_head * (nope + value_width);
    let kv_head = head / (params.n_head / params.n_kv_head);
    let column0 = work.z * 128u;

    // This workgroup's queries, of the tile's.
    let skipped = work.x % PARTS * TILE_Q;
    let count = min(max(tile.count, skipped) - skipped, TILE_Q);
    let token0 = tile.first_token + skipped;
    let position0 = tile.position + skipped;
    let out = (token0 * params.n_head + head) * params.d_value;
    let own = subgroup % 4u;

    // Query of the workgroup whose scores this lane shares.
    let query = local / LANES;
    let lane = local % LANES;
    let state = ((token0 + query) * params.n_head + head) * params.tiles_z + work.z;

    // Keys of this tile: those of the sequence, up to the last that a query may see.
    let tile_end = params.kv_first + params.kv_rows;
    let begin = max(params.kv_first, sequence.first_row) - sequence.first_row;
    var end = 0u;
    if (tile_end > sequence.first_row && count > 0u) {
        end = min(min(tile_end - sequence.first_row, sequence.length), position0 + count);
    }

    var best = LOWEST;
    var sum = 0.0;                         // over the keys of this lane
    if (params.first == 0u && query < count) {
        let before = softmax[state];
        best = before.x;
        if (lane == 0u) {
            sum = before.y;
        }
    }
    // valueIJ: queries from I · SIDE, columns from J · SIDE of the subgroup's.
    begin_values(0u, 0u, out, count, column0, local);
    var value00 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(0u, 1u, out, count, column0, local);
    var value01 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(0u, 2u, out, count, column0, local);
    var value02 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(0u, 3u, out, count, column0, local);
    var value03 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(1u, 0u, out, count, column0, local);
    var value10 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(1u, 1u, out, count, column0, local);
    var value11 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(1u, 2u, out, count, column0, local);
    var value12 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(1u, 3u, out, count, column0, local);
    var value13 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(2u, 0u, out, count, column0, local);
    var value20 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(2u, 1u, out, count, column0, local);
    var value21 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(2u, 2u, out, count, column0, local);
    var value22 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(2u, 3u, out, count, column0, local);
    var value23 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(3u, 0u, out, count, column0, local);
    var value30 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(3u, 1u, out, count, column0, local);
    var value31 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(3u, 2u, out, count, column0, local);
    var value32 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    begin_values(3u, 3u, out, count, column0, local);
    var value33 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    workgroupBarrier();
    for (var e = local; e < 4u * MATRIX; e += WORKGROUP) {
        sh_scores[e] = 0.0;
    }
    workgroupBarrier();
    let zero = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    let score_at = own / 2u * 16u * SCORE_PITCH + own % 2u * 16u;

    for (var key0 = begin; key0 < end; key0 += TILE_KV) {
        let kv_base = (sequence.first_row + key0 - params.kv_first) * kv_row + kv_head * (nope + value_width);
        let rope_base = (sequence.first_slot + key0) * params.rope_pitch / 4u;
        // Some query does not see some key.
        let ragged = key0 + TILE_KV > position0 + 1u;
        if (local < TILE_KV) {
            sh_poison[local] = 0u;
        }
        if (local == 0u) {
            sh_scaled.x = 0u;
        }
        var score00 = zero;
        var score01 = zero;
        var score10 = zero;
        var score11 = zero;
        for (var d0 = 0u; d0 < width; d0 += QUADS) {
            workgroupBarrier();
            for (var e = local; e < TILE_Q * QUADS; e += WORKGROUP) {
                let d = d0 + e % QUADS;
                let r = e / QUADS;
                var four = vec4<f32>(0.0);
                if (d < width && r < count) {
                    four = params.scale * q[((token0 + r) * params.n_head + head) * width + d];
                }
                stage_each(r * CHUNK_PITCH + 4u * (e % QUADS), four);
            }
            for (var e = local; e < TILE_KV * QUADS; e += WORKGROUP) {
                let d = d0 + e % QUADS;
                let r = e / QUADS;
                var four = vec4<f32>(0.0);
                if (d < width && key0 + r < end) {
                    if (d < nope) {
                        four = kv[kv_base + r * kv_row + d];
                    } else {
                        four = vec4<f32>(rope_cache[rope_base + r * params.rope_pitch / 4u + d - nope]);
                    }
                }
                stage_each((TILE_Q + r) * CHUNK_PITCH + 4u * (e % QUADS), four);
            }
            workgroupBarrier();
            let q_at = own / 2u * 16u * CHUNK_PITCH;
            let k_at = (TILE_Q + own % 2u * 16u) * CHUNK_PITCH;
            for (var d = 0u; d < 4u * QUADS; d += SIDE) {
                let a0 = coopLoadT<Left>(&sh_stage[q_at + d], CHUNK_PITCH);
                let a1 = coopLoadT<Left>(&sh_stage[q_at + SIDE * CHUNK_PITCH + d], CHUNK_PITCH);
                let b0 = coopLoad<Right>(&sh_stage[k_at + d], CHUNK_PITCH);
                let b1 = coopLoad<Right>(&sh_stage[k_at + SIDE * CHUNK_PITCH + d], CHUNK_PITCH);
                score00 = coopMultiplyAdd(a0, b0, score00);
                score01 = coopMultiplyAdd(a0, b1, score01);
                score10 = coopMultiplyAdd(a1, b0, score10);
                score11 = coopMultiplyAdd(a1, b1, score11);
            }
        }
        coopStoreT(score00, &sh_scores[score_at], SCORE_PITCH);
        coopStoreT(score01, &sh_scores[score_at + SIDE], SCORE_PITCH);
        coopStoreT(score10, &sh_scores[score_at + SIDE * SCORE_PITCH], SCORE_PITCH);
        coopStoreT(score11, &sh_scores[score_at + SIDE * SCORE_PITCH + SIDE], SCORE_PITCH);
        if (ragged) {
            for (var e = local; e < TILE_KV * COLUMNS; e += WORKGROUP) {
                let r = e / COLUMNS;
                let column = column0 / 4u + e % COLUMNS;
                if (column < value_width && key0 + r < end) {
                    if (any(overflows(kv[kv_base + r * kv_row + nope + column]))) {
                        sh_poison[r] = 1u;
                    }
                }
            }
        }
        workgroupBarrier();

        // How many keys of this block the query sees, from the first: none for a query before the block.
        let seen = min(max(position0 + query + 1u, key0) - key0, min(end - key0, TILE_KV));
        var next = LOWEST;
        for (var key = 4u * lane; key < seen; key += 4u * LANES) {
            for (var k = key; k < min(key + 4u, seen); k++) {
                next = max(next, sh_scores[query * SCORE_PITCH + k]);
            }
        }
        sh_part[local] = next;
        workgroupBarrier();
        for (var l = 0u; l < LANES; l++) {
            next = max(next, sh_part[query * LANES + l]);
        }
        var shrink = 1.0;
        if (next > best + RESERVE) {
            // An empty state has nothing to shrink.
            shrink = select(exp(best - next), 1.0, best == LOWEST);
            best = next;
        }
        if (shrink != 1.0) {
            sh_scaled.x = 1u;
        }
        if (lane == 0u) {
            sh_factor[query] = shrink;
        }
        sum *= shrink;
        // WGSL allows no constant that is NaN.
        let nan = bitcast<f32>(0x7fc00000u | params.first);
        for (var key = 4u * lane; key < TILE_KV; key += 4u * LANES) {
            let at = query * SCORE_PITCH + key;
            let keys = vec4<u32>(key) + vec4<u32>(0u, 1u, 2u, 3u);
            let poison = vec4<u32>(sh_poison[key], sh_poison[key + 1u], sh_poison[key + 2u], sh_poison[key + 3u]);
            let scores = vec4<f32>(sh_scores[at], sh_scores[at + 1u], sh_scores[at + 2u], sh_scores[at + 3u]);
            // A masked key has weight 0, not e^0.
            let unseen = keys >= vec4<u32>(seen);
            let zeros = vec4<f32>(0.0);
            let p = select(exp(scores - best), zeros, unseen);
            sum += p.x + p.y + p.z + p.w;
            let poisoned = select(p, vec4<f32>(nan), poison == vec4<u32>(1u));
            stage_each(query * WEIGHT_PITCH + key, select(poisoned, zeros, unseen));
        }
        if (workgroupUniformLoad(&sh_scaled).x == 1u) {
            value00 = scaled(value00, 0u, local, own);
            value01 = scaled(value01, 0u, local, own);
            value10 = scaled(value10, 1u, local, own);
            value11 = scaled(value11, 1u, local, own);
            value20 = scaled(value20, 2u, local, own);
            value21 = scaled(value21, 2u, local, own);
            value30 = scaled(value30, 3u, local, own);
            value31 = scaled(value31, 3u, local, own);
            if (COLUMNS == 32u) {
                value02 = scaled(value02, 0u, local, own);
                value03 = scaled(value03, 0u, local, own);
                value12 = scaled(value12, 1u, local, own);
                value13 = scaled(value13, 1u, local, own);
                value22 = scaled(value22, 2u, local, own);
                value23 = scaled(value23, 2u, local, own);
                value32 = scaled(value32, 3u, local, own);
                value33 = scaled(value33, 3u, local, own);
            }
        }

        for (var k0 = 0u; k0 < TILE_KV; k0 += VALUE_ROWS) {
            workgroupBarrier();
            for (var e = local; e < VALUE_ROWS * COLUMNS; e += WORKGROUP) {
                let r = k0 + e / COLUMNS;
                let column = column0 / 4u + e % COLUMNS;
                var four = vec4<f32>(0.0);
                if (column < value_width && key0 + r < end) {
                    four = kv[kv_base + r * kv_row + nope + column];
                    if (ragged) {
                        four = select(four, vec4<f32>(0.0), overflows(four));
                    }
                }
                stage_each(VALUES + e / COLUMNS * VALUE_PITCH + 4u * (e % COLUMNS), four);
            }
            workgroupBarrier();
            let v_at = VALUES + own * COLUMNS;
            for (var k = 0u; k < VALUE_ROWS; k += SIDE) {
                let a0 = coopLoadT<Left>(&sh_stage[k0 + k], WEIGHT_PITCH);
                let a1 = coopLoadT<Left>(&sh_stage[k0 + k + SIDE * WEIGHT_PITCH], WEIGHT_PITCH);
                let a2 = coopLoadT<Left>(&sh_stage[k0 + k + 2u * SIDE * WEIGHT_PITCH], WEIGHT_PITCH);
                let a3 = coopLoadT<Left>(&sh_stage[k0 + k + 3u * SIDE * WEIGHT_PITCH], WEIGHT_PITCH);
                let b0 = coopLoadT<Right>(&sh_stage[v_at + k * VALUE_PITCH], VALUE_PITCH);
                let b1 = coopLoadT<Right>(&sh_stage[v_at + k * VALUE_PITCH + SIDE], VALUE_PITCH);
                value00 = coopMultiplyAdd(a0, b0, value00);
                value01 = coopMultiplyAdd(a0, b1, value01);
                value10 = coopMultiplyAdd(a1, b0, value10);
                value11 = coopMultiplyAdd(a1, b1, value11);
                value20 = coopMultiplyAdd(a2, b0, value20);
                value21 = coopMultiplyAdd(a2, b1, value21);
                value30 = coopMultiplyAdd(a3, b0, value30);
                value31 = coopMultiplyAdd(a3, b1, value31);
                if (COLUMNS == 32u) {
                    let b2 = coopLoadT<Right>(&sh_stage[v_at + k * VALUE_PITCH + 2u * SIDE], VALUE_PITCH);
                    let b3 = coopLoadT<Right>(&sh_stage[v_at + k * VALUE_PITCH + 3u * SIDE], VALUE_PITCH);
                    value02 = coopMultiplyAdd(a0, b2, value02);
                    value03 = coopMultiplyAdd(a0, b3, value03);
                    value12 = coopMultiplyAdd(a1, b2, value12);
                    value13 = coopMultiplyAdd(a1, b3, value13);
                    value22 = coopMultiplyAdd(a2, b2, value22);
                    value23 = coopMultiplyAdd(a2, b3, value23);
                    value32 = coopMultiplyAdd(a3, b2, value32);
                    value33 = coopMultiplyAdd(a3, b3, value33);
                }
            }
        }
    }

    workgroupBarrier();
    sh_part[local] = sum;
    workgroupBarrier();
    sum = 0.0;
    for (var l = 0u; l < LANES; l++) {
        sum += sh_part[query * LANES + l];
    }
    if (lane == 0u) {
        var factor = 1.0;
        if (params.last == 1u) {
            factor = select(0.0, 1.0 / sum, sum > 0.0);
        }
        sh_factor[query] = factor;
        if (query < count) {
            softmax[state] = vec2<f32>(best, sum);
        }
    }
    workgroupBarrier();
    end_values(value00, 0u, 0u, out, count, column0, local, own);
    end_values(value01, 0u, 1u, out, count, column0, local, own);
    end_values(value10, 1u, 0u, out, count, column0, local, own);
    end_values(value11, 1u, 1u, out, count, column0, local, own);
    end_values(value20, 2u, 0u, out, count, column0, local, own);
    end_values(value21, 2u, 1u, out, count, column0, local, own);
    end_values(value30, 3u, 0u, out, count, column0, local, own);
    end_values(value31, 3u, 1u, out, count, column0, local, own);
    if (COLUMNS == 32u) {
        end_values(value02, 0u, 2u, out, count, column0, local, own);
        end_values(value03, 0u, 3u, out, count, column0, local, own);
        end_values(value12, 1u, 2u, out, count, column0, local, own);
        end_values(value13, 1u, 3u, out, count, column0, local, own);
        end_values(value22, 2u, 2u, out, count, column0, local, own);
        end_values(value23, 2u, 3u, out, count, column0, local, own);
        end_values(value32, 3u, 2u, out, count, column0, local, own);
        end_values(value33, 3u, 3u, out, count, column0, local, own);
    }
}

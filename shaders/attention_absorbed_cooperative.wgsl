// Attention of a few queries per sequence straight over the cached latents by cooperative matrices of 16 × 16: f16 factors,
// sums and softmax in f32. Meaning, splits and partial results are those of attention_absorbed:
//
//   s_j = scale · u[h] · (f16(a[h] / u[h]) · c_j + f16(q_R[h] / u[h]) · k_R_j)
//   m = max_j s_j    l = Σ_j e^(s_j−m)    values[h] = Σ_j f16(e^(s_j−m')) c_j · e^(m'−m)
//
// u[h] is the power of two below the largest element of the query, so that every query has the digits of a half, whatever its
// size. m' may lie below m, by RESERVE at most: scaling a head's values takes a detour through workgroup memory, and the reserve
// makes that seldom.
// A workgroup takes 16 heads and a split, TILE cache rows at a time. Each row is read once, into workgroup memory, while the rows
// before it are multiplied. TEAMS subgroups share the work: of the scores each owns 16 rows and a share of the width, whose
// queries stay in registers; of the values each owns COLUMNS matrices of columns. Further subgroups repeat one, and store the
// same. LANES invocations share the softmax of a head.
// Heads past the last have queries of 0 and are not stored; rows past the end repeat the last and have no weight.
// grid: (splits of the step, ⌈n_head / 16⌉, most query tokens of a sequence)
//
// Floor: a cache row is read from memory once per 16 heads, and brings 2 (d_latent + d_rope) bytes for 32 (2 d_latent + d_rope)
// FLOPs, 30 per byte: memory is the limit wherever matrices reach 30 FLOPs for a byte of bandwidth. Each row crosses workgroup
// memory three times (written, read for scores, read for values), with five barriers per tile.
// Of 512 + 64, TILE is 16: a workgroup has 32 KiB where 32 rows would take 48, so that half as many again run beside each other,
// and five matrices of queries stay in registers.
// AMD's compiler (RDNA3, Mesa 25), 8 subgroups of 32: 192 registers, no spills; with nine matrices kept it spilled 100. Read once
// in assembly: a tile of 18 432 bytes takes each subgroup some 400 instructions, 0.17 per byte in all, without the 140 that scale
// values, seldom. 5 load rows and 30 reckon places for them, 64 read values by columns, 16 bits each, since this GPU's matrices
// want columns; 5 + 4 multiply. Before, it took 770: a branch per load between latents, rotary keys and the end; places counted in
// elements; loops of one turn. Its estimate for the whole went from 6202 to 2896.
// On a GPU: not measured. A sketch of this design, for 512 + 64 and 32 rows alone, took 150 µs on an H200 for 32 sequences of
// 8192 rows, where the floor is 71.
// Static (RDNA3, Mesa 25), at most: 216 registers, 32 256 bytes of workgroup memory, nothing spilled.

enable f16;
enable wgpu_cooperative_matrix;

override WORKGROUP: u32 = 256u;                 // TEAMS whole subgroups or more
override HEADS: u32 = SIDE;                     // of a workgroup, whole matrices; divides TILE
override TEAMS: u32 = 8u;                       // a power of two, like the next two
override TILE: u32 = 16u;                       // cache rows at a time, whole matrices
override LANES: u32 = 8u;                       // at most a subgroup, a tile, and WORKGROUP / HEADS
override LATENT: u32 = 64u;                     // d_latent and d_rope, in whole matrices
override ROPE: u32 = 16u;
override KEPT: u32 = 1u;                        // matrices of queries of a subgroup: 1 to 5
override COLUMNS: u32 = 1u;                     // matrices of value columns of a subgroup: 1 to 8
override SPLIT: u32 = 256u;
override SHARES: u32 = TEAMS * SIDE / TILE;      // subgroups that share the scores of the same rows and heads
override OWNERS: u32 = TEAMS * SIDE / HEADS;     // subgroups with the same heads
override BLOCKS: u32 = TILE / HEADS;             // matrices of rows that subgroups with the same heads score at once
override LATENTS: u32 = LATENT / 8u;               // 16-byte loads of a tile's row, of latents and of rotary keys
override ROPES: u32 = max(ROPE / 8u, 1u);
override FETCHES: u32 = (TILE * LATENTS + WORKGROUP - 1u) / WORKGROUP;  // of an invocation for a tile's latents
override LAST: u32 = LATENT / SIDE - 1u;          // matrix of value columns
override WIDTH: u32 = SHARES * KEPT * SIDE;       // of a staged row: both parts, and zeros
// In fours; pitches 16 bytes beyond a multiple of 128 meet different banks.
override STRIDE: u32 = WIDTH + 8u;                // elements of a staged row
override PITCH: u32 = STRIDE / 4u;
override WEIGHT_PITCH: u32 = TILE + 8u;
override SCORE_PITCH: u32 = TILE + 4u;

const LOWEST: f32 = -3.4028234e38;
const RESERVE: f32 = 4.0;
const SIDE: u32 = 16u;
const MATRIX: u32 = SIDE * SIDE;
const STEP: u32 = SIDE / 4u;                       // places of a matrix row in staged rows

// Matrices of factors, and of sums.
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

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

// 16 bytes of a row.
struct Halves {
    low: vec4<f16>,
    high: vec4<f16>,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> absorbed: array<vec4<f32>>;               // [tokens, n_head, d_latent / 4]
@group(0) @binding(2) var<storage, read> q: array<vec4<f32>>;                      // [tokens, n_head, (d_nope + d_rope) / 4], rotated
@group(0) @binding(3) var<storage, read> latent_cache: array<vec4<f16>>;           // [cache rows, 2 · latent_loads]
@group(0) @binding(4) var<storage, read> rope_cache: array<vec4<f16>>;             // [cache rows, 2 · rope_loads]
@group(0) @binding(5) var<storage, read> sequences: array<DecodeSequence>;         // [n_sequence]
@group(0) @binding(6) var<storage, read_write> partial_values: array<f32>;         // [partials, n_head, d_latent]
@group(0) @binding(7) var<storage, read_write> partial_softmax: array<vec2<f32>>;  // [partials, n_head] (m, l)

// Queries [head, d_latent + d_rope], later cache rows [row, d_latent + d_rope]; 0 behind both parts.
var<workgroup> sh_tile: array<vec4<f16>, TILE * PITCH>;
// [share, head, row] scores; one matrix per subgroup on its way from or to storage.
var<workgroup> sh_scores: array<f32, SHARES * HEADS * SCORE_PITCH>;
var<workgroup> sh_weights: array<f16, HEADS * WEIGHT_PITCH>;  // [head, row]
var<workgroup> sh_factor: array<f32, HEADS>;     // 1 / u[h], then factors on the values of a head
// (line of the sequence, whether there is nothing to do), and the last tile, counted from 1, that gave some head a factor other
// than 1. 16 bytes each: matrices need the arrays around them to begin on multiples of 16.
var<workgroup> sh_line: vec4<u32>;
var<workgroup> sh_scaled: vec4<u32>;

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

// Load e of a tile's latents: 16 bytes of row `row0 + e / LATENTS`; 0 past the width. Rows past the last repeat it, their weight
// is 0.
fn latent_load(e: u32, row0: u32, last: u32, slot0: u32) -> Halves {
    let place = select(min(e, TILE * LATENTS - 1u), e, TILE * LATENTS % WORKGROUP == 0u);
    let load = min(place % LATENTS, params.latent_loads - 1u);
    // Places of two rows, not a row, are compared: all but one sum is the same in every turn.
    let at = 2u * min((slot0 + place / LATENTS) * params.latent_loads + load + row0 * params.latent_loads, (slot0 + last) * params.latent_loads + load);
    let used = place % LATENTS < params.latent_loads;
    return Halves(select(vec4<f16>(), latent_cache[at], used), select(vec4<f16>(), latent_cache[at + 1u], used));
}

// The same of the rotary keys.
fn rope_load(e: u32, row0: u32, last: u32, slot0: u32) -> Halves {
    let place = select(min(e, TILE * ROPES - 1u), e, TILE * ROPES % WORKGROUP == 0u);
    let load = min(place % ROPES, max(params.rope_loads, 1u) - 1u);
    // Places of two rows, not a row, are compared: all but one sum is the same in every turn.
    let at = 2u * min((slot0 + place / ROPES) * params.rope_loads + load + row0 * params.rope_loads, (slot0 + last) * params.rope_loads + load);
    let used = place % ROPES < params.rope_loads;
    return Halves(select(vec4<f16>(), rope_cache[at], used), select(vec4<f16>(), rope_cache[at + 1u], used));
}

// Stages load e of those of a tile, `loads` per row, behind `column`.
fn put_together(e: u32, loads: u32, column: u32, halves: Halves) {
    // The first is known when the shader is compiled.
    if (TILE * loads % WORKGROUP == 0u || e < TILE * loads) {
        let at = e / loads * PITCH + column / 4u + e % loads * 2u;
        sh_tile[at] = halves.low;
        sh_tile[at + 1u] = halves.high;
    }
}

// A query's vector i of its two parts, which begin at `latent` and `rope`; 0 past them.
fn query_vector(i: u32, latent: u32, rope: u32) -> vec4<f32> {
    if (i < params.d_latent / 4u) {
        return absorbed[latent + i];
    }
    if (i >= LATENT / 4u && i - LATENT / 4u < params.d_rope / 4u) {
        return q[rope + i - LATENT / 4u];
    }
    return vec4<f32>(0.0);
}

// Head, of those of the workgroup, of element e of all subgroups' matrices of values.
fn head_of(e: u32) -> u32 {
    return e / MATRIX / OWNERS * SIDE + e % MATRIX / SIDE;
}

// Multiplies each subgroup's matrix by the factors of its heads.
fn scaled_heads(sums: Sums, local: u32, own: u32) -> Sums {
    coopStoreT(sums, &sh_scores[MATRIX * own], SIDE);
    workgroupBarrier();
    for (var e = local; e < TEAMS * MATRIX; e += WORKGROUP) {
        sh_scores[e] *= sh_factor[head_of(e)];
    }
    workgroupBarrier();
    let result = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    workgroupBarrier();
    return result;
}

// Writes column matrix j of each subgroup, the heads multiplied by their factors; `out` is the first head's partial result.
fn end_heads(sums: Sums, j: u32, out: u32, heads: u32, local: u32, own: u32) {
    coopStoreT(sums, &sh_scores[MATRIX * own], SIDE);
    workgroupBarrier();
    for (var e = local; e < TEAMS * MATRIX; e += WORKGROUP) {
        let head = head_of(e);
        let column = (e / MATRIX % OWNERS * COLUMNS + j) * SIDE + e % SIDE;
        if (head < heads && column < params.d_latent) {
            partial_values[(out + head) * params.d_latent + column] = sh_scores[e] * sh_factor[head];
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
    @builtin(subgroup_invocation_id) member: u32,
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
    let row0 = work.x * SPLIT;
    let token = work.z;
    if (local == 0u) {
        let line = sequence_of(row0, params.n_sequence);
        let split = (row0 - sequences[line].first_row) / SPLIT;
        // Behind the last sequence the step's row numbering is padding.
        let idle = token >= sequences[line].tokens || split >= sequences[line].splits;
        sh_line = vec4<u32>(line, u32(idle), 0u, 0u);
        sh_scaled = vec4<u32>(0u);
    }
    let line = workgroupUniformLoad(&sh_line);
    if (line.y == 1u) {
        return;
    }
    let sequence = sequences[line.x];
    let position0 = row0 - sequence.first_row;
    let length = sequence.length + 1u + token - sequence.tokens;
    let count = min(max(length, position0) - position0, SPLIT);
    let slot0 = sequence.first_slot + position0;
    let head0 = work.y * HEADS;
    let heads = min(params.n_head - head0, HEADS);
    let first = (sequence.token + token) * params.n_head + head0;
    let latent = first * (params.d_latent / 4u);
    let query_width = (params.d_nope + params.d_rope) / 4u;
    let rope = first * query_width + params.d_nope / 4u;

    let own = subgroup % TEAMS;
    let owner = own % OWNERS;
    let block = owner % BLOCKS;
    let share = owner / BLOCKS;
    let own_head = own / OWNERS * SIDE;              // first of the subgroup's
    // Neighbours in a workgroup of one dimension are neighbours in a subgroup: LANES of them share a head.
    let head = local / LANES;
    let lane = member % LANES;
    let working = head < HEADS;

    for (var e = local; e < TILE * PITCH; e += WORKGROUP) {
        sh_tile[e] = vec4<f16>();
    }
    for (var e = local; e < SHARES * HEADS * SCORE_PITCH; e += WORKGROUP) {
        sh_scores[e] = 0.0;
    }
    var most = 0u;
    if (head < heads) {
        for (var i = lane; i < (LATENT + ROPE) / 4u; i += LANES) {
            let four = query_vector(i, latent + head * (params.d_latent / 4u), rope + head * query_width);
            let bits = bitcast<vec4<u32>>(four) & vec4<u32>(0x7f800000u);
            most = max(max(most, max(bits.x, bits.y)), max(bits.z, bits.w));
        }
    }
    for (var apart = 1u; apart < LANES; apart *= 2u) {
        most = max(most, subgroupShuffleXor(most, apart));
    }
    // Exponents from 1 to 253: the reciprocal is a normal number, too.
    let unit = clamp(most, 0x00800000u, 0x7e800000u);
    let of_scores = params.scale * bitcast<f32>(unit);
    if (working && lane == 0u) {
        sh_factor[head] = bitcast<f32>(0x7f000000u - unit);
    }
    workgroupBarrier();

    for (var e = local; e < heads * ((LATENT + ROPE) / 4u); e += WORKGROUP) {
        let of_head = e / ((LATENT + ROPE) / 4u);
        let i = e % ((LATENT + ROPE) / 4u);
        let four = query_vector(i, latent + of_head * (params.d_latent / 4u), rope + of_head * query_width);
        sh_tile[of_head * PITCH + i] = vec4<f16>(sh_factor[of_head] * four);
    }
    workgroupBarrier();
    let share_at = share * KEPT * STEP;
    let q_at = own_head * PITCH + share_at;
    let q0 = coopLoadT<Left>(&sh_tile[q_at], PITCH);
    let q1 = coopLoadT<Left>(&sh_tile[q_at + min(1u, KEPT - 1u) * STEP], PITCH);
    let q2 = coopLoadT<Left>(&sh_tile[q_at + min(2u, KEPT - 1u) * STEP], PITCH);
    let q3 = coopLoadT<Left>(&sh_tile[q_at + min(3u, KEPT - 1u) * STEP], PITCH);
    let q4 = coopLoadT<Left>(&sh_tile[q_at + min(4u, KEPT - 1u) * STEP], PITCH);
    let zero = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    var value0 = zero;
    var value1 = zero;
    var value2 = zero;
    var value3 = zero;
    var value4 = zero;
    var value5 = zero;
    var value6 = zero;
    var value7 = zero;

    var best = LOWEST;
    var top = LOWEST;
    var sum = 0.0;                         // over the rows of this lane
    let last = max(count, 1u) - 1u;
    var load0 = latent_load(local, 0u, last, slot0);
    var load1 = Halves();
    if (FETCHES > 1u) {
        load1 = latent_load(local + 1u * WORKGROUP, 0u, last, slot0);
    }
    var load2 = Halves();
    if (FETCHES > 2u) {
        load2 = latent_load(local + 2u * WORKGROUP, 0u, last, slot0);
    }
    var load3 = Halves();
    if (FETCHES > 3u) {
        load3 = latent_load(local + 3u * WORKGROUP, 0u, last, slot0);
    }
    var load4 = Halves();
    if (FETCHES > 4u) {
        load4 = latent_load(local + 4u * WORKGROUP, 0u, last, slot0);
    }
    var turned = Halves();
    if (ROPE > 0u) {
        turned = rope_load(local, 0u, last, slot0);
    }
    for (var t = 0u; t < count; t += TILE) {
        workgroupBarrier();
        put_together(local, LATENTS, 0u, load0);
        if (FETCHES > 1u) {
            put_together(local + 1u * WORKGROUP, LATENTS, 0u, load1);
        }
        if (FETCHES > 2u) {
            put_together(local + 2u * WORKGROUP, LATENTS, 0u, load2);
        }
        if (FETCHES > 3u) {
            put_together(local + 3u * WORKGROUP, LATENTS, 0u, load3);
        }
        if (FETCHES > 4u) {
            put_together(local + 4u * WORKGROUP, LATENTS, 0u, load4);
        }
        if (ROPE > 0u) {
            put_together(local, ROPES, LATENT, turned);
        }
        // For small workgroups.
        if (FETCHES > 5u) {
            for (var e = local + 5u * WORKGROUP; e < TILE * LATENTS; e += WORKGROUP) {
                put_together(e, LATENTS, 0u, latent_load(e, t, last, slot0));
            }
        }
        if (ROPE > 0u && TILE * ROPES > WORKGROUP) {
            for (var e = local + WORKGROUP; e < TILE * ROPES; e += WORKGROUP) {
                put_together(e, ROPES, LATENT, rope_load(e, t, last, slot0));
            }
        }
        workgroupBarrier();
        // These loads are in flight while this tile is multiplied.
        load0 = latent_load(local, t + TILE, last, slot0);
        if (FETCHES > 1u) {
            load1 = latent_load(local + 1u * WORKGROUP, t + TILE, last, slot0);
        }
        if (FETCHES > 2u) {
            load2 = latent_load(local + 2u * WORKGROUP, t + TILE, last, slot0);
        }
        if (FETCHES > 3u) {
            load3 = latent_load(local + 3u * WORKGROUP, t + TILE, last, slot0);
        }
        if (FETCHES > 4u) {
            load4 = latent_load(local + 4u * WORKGROUP, t + TILE, last, slot0);
        }
        if (ROPE > 0u) {
            turned = rope_load(local, t + TILE, last, slot0);
        }

        for (var turn = 0u; turn < HEADS / SIDE; turn++) {
            let row = (turn * BLOCKS + block) * SIDE;
            let k_at = row * PITCH + share_at;
            var score = coopMultiplyAdd(q0, coopLoad<Right>(&sh_tile[k_at], PITCH), zero);
            if (KEPT > 1u) {
                score = coopMultiplyAdd(q1, coopLoad<Right>(&sh_tile[k_at + 1u * STEP], PITCH), score);
            }
            if (KEPT > 2u) {
                score = coopMultiplyAdd(q2, coopLoad<Right>(&sh_tile[k_at + 2u * STEP], PITCH), score);
            }
            if (KEPT > 3u) {
                score = coopMultiplyAdd(q3, coopLoad<Right>(&sh_tile[k_at + 3u * STEP], PITCH), score);
            }
            if (KEPT > 4u) {
                score = coopMultiplyAdd(q4, coopLoad<Right>(&sh_tile[k_at + 4u * STEP], PITCH), score);
            }
            coopStoreT(score, &sh_scores[(share * HEADS + own_head) * SCORE_PITCH + row], SCORE_PITCH);
        }
        workgroupBarrier();

        var next = LOWEST;
        if (working) {
            for (var turn = 0u; turn < TILE / LANES; turn++) {
                let row = lane + turn * LANES;
                var total = 0.0;
                for (var part = 0u; part < SHARES; part++) {
                    total += sh_scores[(part * HEADS + head) * SCORE_PITCH + row];
                }
                total *= of_scores;
                // Read again below, by this lane alone.
                sh_scores[head * SCORE_PITCH + row] = total;
                if (t + row < count) {
                    next = max(next, total);
                }
            }
        }
        for (var apart = 1u; apart < LANES; apart *= 2u) {
            next = max(next, subgroupShuffleXor(next, apart));
        }
        top = max(top, next);
        var shrink = 1.0;
        if (next > best + RESERVE) {
            // An empty state has nothing to shrink.
            shrink = select(exp(best - next), 1.0, best == LOWEST);
            best = next;
        }
        sum *= shrink;
        if (working) {
            if (shrink != 1.0) {
                sh_scaled.x = t + 1u;
            }
            if (lane == 0u) {
                sh_factor[head] = shrink;
            }
            for (var turn = 0u; turn < TILE / LANES; turn++) {
                let row = lane + turn * LANES;
                // A row past the end has weight 0, not e^0.
                let p = select(0.0, exp(sh_scores[head * SCORE_PITCH + row] - best), t + row < count);
                sum += p;
                sh_weights[head * WEIGHT_PITCH + row] = f16(p);
            }
        }
        // Every tile has a mark of its own, so that nobody needs to take the last one back.
        if (workgroupUniformLoad(&sh_scaled).x == t + 1u) {
            value0 = scaled_heads(value0, local, own);
            if (COLUMNS > 1u) {
                value1 = scaled_heads(value1, local, own);
            }
            if (COLUMNS > 2u) {
                value2 = scaled_heads(value2, local, own);
            }
            if (COLUMNS > 3u) {
                value3 = scaled_heads(value3, local, own);
            }
            if (COLUMNS > 4u) {
                value4 = scaled_heads(value4, local, own);
            }
            if (COLUMNS > 5u) {
                value5 = scaled_heads(value5, local, own);
            }
            if (COLUMNS > 6u) {
                value6 = scaled_heads(value6, local, own);
            }
            if (COLUMNS > 7u) {
                value7 = scaled_heads(value7, local, own);
            }
        }
        for (var k = 0u; k < TILE / SIDE; k++) {
            let weights = coopLoadT<Left>(&sh_weights[own_head * WEIGHT_PITCH + k * SIDE], WEIGHT_PITCH);
            let v_at = k * SIDE * PITCH;
            // Columns past the last repeat it; they are not stored.
            let c_at = owner * COLUMNS;
            value0 = coopMultiplyAdd(weights, coopLoadT<Right>(&sh_tile[v_at + min(c_at, LAST) * STEP], PITCH), value0);
            if (COLUMNS > 1u) {
                value1 = coopMultiplyAdd(weights, coopLoadT<Right>(&sh_tile[v_at + min(c_at + 1u, LAST) * STEP], PITCH), value1);
            }
            if (COLUMNS > 2u) {
                value2 = coopMultiplyAdd(weights, coopLoadT<Right>(&sh_tile[v_at + min(c_at + 2u, LAST) * STEP], PITCH), value2);
            }
            if (COLUMNS > 3u) {
                value3 = coopMultiplyAdd(weights, coopLoadT<Right>(&sh_tile[v_at + min(c_at + 3u, LAST) * STEP], PITCH), value3);
            }
            if (COLUMNS > 4u) {
                value4 = coopMultiplyAdd(weights, coopLoadT<Right>(&sh_tile[v_at + min(c_at + 4u, LAST) * STEP], PITCH), value4);
            }
            if (COLUMNS > 5u) {
                value5 = coopMultiplyAdd(weights, coopLoadT<Right>(&sh_tile[v_at + min(c_at + 5u, LAST) * STEP], PITCH), value5);
            }
            if (COLUMNS > 6u) {
                value6 = coopMultiplyAdd(weights, coopLoadT<Right>(&sh_tile[v_at + min(c_at + 6u, LAST) * STEP], PITCH), value6);
            }
            if (COLUMNS > 7u) {
                value7 = coopMultiplyAdd(weights, coopLoadT<Right>(&sh_tile[v_at + min(c_at + 7u, LAST) * STEP], PITCH), value7);
            }
        }
    }

    for (var apart = 1u; apart < LANES; apart *= 2u) {
        sum += subgroupShuffleXor(sum, apart);
    }
    let out = (sequence.partial + token * sequence.splits + position0 / SPLIT) * params.n_head + head0;
    workgroupBarrier();
    if (working && lane == 0u) {
        let factor = exp(best - top);
        sh_factor[head] = factor;
        if (head < heads) {
            partial_softmax[out + head] = vec2<f32>(top, factor * sum);
        }
    }
    workgroupBarrier();
    end_heads(value0, 0u, out, heads, local, own);
    if (COLUMNS > 1u) {
        end_heads(value1, 1u, out, heads, local, own);
    }
    if (COLUMNS > 2u) {
        end_heads(value2, 2u, out, heads, local, own);
    }
    if (COLUMNS > 3u) {
        end_heads(value3, 3u, out, heads, local, own);
    }
    if (COLUMNS > 4u) {
        end_heads(value4, 4u, out, heads, local, own);
    }
    if (COLUMNS > 5u) {
        end_heads(value5, 5u, out, heads, local, own);
    }
    if (COLUMNS > 6u) {
        end_heads(value6, 6u, out, heads, local, own);
    }
    if (COLUMNS > 7u) {
        end_heads(value7, 7u, out, heads, local, own);
    }
}

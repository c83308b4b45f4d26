// Attention of a few queries per sequence straight over the cached latents, for GPUs with subgroups. Meaning, splits and partial
// results are those of attention_absorbed. A cache row is read once into registers, for scores and values alike, and there are
// no barriers. Widths are multiples of 4.
//
//   s_j = scale · (a[h] · c_j + q_R[h] · k_R_j)    m = max_j s_j    l = Σ_j e^(s_j−m)    values[h] = Σ_j e^(s_j−m) c_j
//
// A team is LANES invocations of one subgroup. It owns 4 heads and goes through the rows of a split, 4 at a time, with a running
// softmax. Each lane owns LOADS times 16 bytes of a latent, LANES apart, so that a team reads whole cache lines. It keeps these
// elements of 4 queries and the sums of these columns for 4 heads in registers: 2 · 64 of them with 32 lanes and 512 columns,
// about 200 in all, which leaves room for 8 to 10 subgroups of 32 per core. It owns ROPE words of the rotary key, too.
// Shuffles add partial scores: they halve the rows, then add the lanes, 12 floats per row for 4 heads, against 136 multiply-adds.
// The TEAMS of a workgroup take other heads over the same rows side by side: the first team fetches a cache line from memory,
// the others find it in the core's cache.
// Padding: cache rows end with finite values (0, as cache_append writes them). The query is 0 there, and the columns of the
// padding are not stored.
// grid: (splits of the step, ⌈n_head / (4·TEAMS)⌉, most query tokens of a sequence)
//
// Floor: a row of d_latent + d_rope elements is read once for n_head · (2·d_latent + d_rope) multiply-adds: 30 FLOP per byte
// for 16 heads over 512 + 64 in f16, 15 in f32. A device with a higher ratio of FLOP/s to bytes/s can reach its copy rate; on
// any other the multiply-adds are the floor. On lavapipe attention_absorbed_subgroup is faster.
// Loads and words are written out, folded by LOADS and ROPE. With every check of loops and indices, Mesa's AMD compiler makes
// 1 768 instructions for RDNA3 (32 lanes, 256 columns of f16), where loops over arrays made 2 493; without checks 1 509 and 1 490.
// Read once in its assembly (32 lanes, 512 + 64 in f16): four rows, 4 608 bytes, take 823 instructions, 0.18 per byte, 548 of them
// multiply-adds (544 are the least), 12 loads, 32 shuffles.
// Static (RDNA3, Mesa 25), at most: 240 registers, no workgroup memory, nothing spilled.
// On an H200 at commit 10d32d5, 16 heads of 512 + 64 in f16, without wgpu's shader checks and with them: 462 and 4 705 µs of 32
// sequences of 8192 rows, 69 and 402 of one of 4096. Not measured since.

override STORAGE_F16: u32 = 0u;
override LANES: u32 = 4u;                        // a power of two, at least 4
override TEAMS: u32 = 4u;
override LOADS: u32 = 4u;                        // 16-byte loads of a latent per lane; at most 4
override ROPE: u32 = 16u;                        // words of a rotary key per lane; at most 16
override SPLIT: u32 = 256u;
override WORKGROUP: u32 = LANES * TEAMS;
override FOURS: u32 = 1u + STORAGE_F16;          // vectors of 4 elements in 16 bytes

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

// Matrices for the first half of a load or a word, and for the second, which f16 alone has.
struct Pair {
    first: mat4x4<f32>,
    second: mat4x4<f32>,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> absorbed: array<vec4<f32>>;               // [tokens, n_head, d_latent / 4]
@group(0) @binding(2) var<storage, read> q: array<f32>;                            // [tokens, n_head, d_nope + d_rope], rotated
@group(0) @binding(3) var<storage, read> latent_cache: array<vec4<u32>>;           // [cache rows, latent_loads]
@group(0) @binding(4) var<storage, read> rope_cache: array<vec4<u32>>;             // [cache rows, rope_loads]
@group(0) @binding(5) var<storage, read> sequences: array<DecodeSequence>;         // [n_sequence]
@group(0) @binding(6) var<storage, read_write> partial_values: array<vec4<f32>>;   // [partials, n_head, d_latent / 4]
@group(0) @binding(7) var<storage, read_write> partial_softmax: array<vec2<f32>>;  // [partials, n_head] (m, l)

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

// Vector i of the absorbed queries of four heads, one column per head; 0 past the end.
fn query_four(head: vec4<u32>, i: u32) -> mat4x4<f32> {
    if (4u * i >= params.d_latent) {
        return mat4x4<f32>();
    }
    let at = head * (params.d_latent / 4u) + i;
    return params.scale * mat4x4<f32>(absorbed[at.x], absorbed[at.y], absorbed[at.z], absorbed[at.w]);
}

fn query_pair(head: vec4<u32>, load: u32) -> Pair {
    return Pair(query_four(head, load * FOURS), query_four(head, load * FOURS + 1u));
}

// Element i of the rotary queries of four heads, one component per head; 0 past the end.
fn rotary_element(head: vec4<u32>, i: u32) -> vec4<f32> {
    if (i >= params.d_rope) {
        return vec4<f32>(0.0);
    }
    let at = head * (params.d_nope + params.d_rope) + params.d_nope + i;
    return params.scale * vec4<f32>(q[at.x], q[at.y], q[at.z], q[at.w]);
}

fn rotary_four(head: vec4<u32>, i: vec4<u32>) -> mat4x4<f32> {
    let x = rotary_element(head, i.x);
    let y = rotary_element(head, i.y);
    let z = rotary_element(head, i.z);
    let w = rotary_element(head, i.w);
    return mat4x4<f32>(x, y, z, w);
}

// What meets a word of a rotary key and the next three of the lane, one column per word.
fn rotary_pair(head: vec4<u32>, word: u32) -> Pair {
    let i = (word + vec4<u32>(0u, 1u, 2u, 3u) * LANES) * FOURS;
    return Pair(rotary_four(head, i), rotary_four(head, i + 1u));
}

// The loads of a latent that a lane owns. Those past the last repeat it; the query is 0 there.
fn latent_of(slot: u32, lane: u32) -> array<vec4<u32>, 4> {
    let i = min(lane + vec4<u32>(0u, 1u, 2u, 3u) * LANES, vec4<u32>(params.latent_loads - 1u)) + slot * params.latent_loads;
    return array<vec4<u32>, 4>(latent_cache[i.x], latent_cache[i.y], latent_cache[i.z], latent_cache[i.w]);
}

// Scores and what word i of a lane adds, one component per head.
fn with_word(s: vec4<f32>, slot: u32, lane: u32, i: u32, first: vec4<f32>, second: vec4<f32>) -> vec4<f32> {
    if (i >= ROPE) {
        return s;
    }
    let at = slot * params.rope_loads * 4u + min(lane + i * LANES, params.rope_loads * 4u - 1u);
    let word = rope_cache[at >> 2u][at & 3u];
    if (STORAGE_F16 == 1u) {
        let pair = unpack2x16float(word);
        return s + (pair.x * first + pair.y * second);
    }
    return s + bitcast<f32>(word) * first;
}

fn with_words(s: vec4<f32>, slot: u32, lane: u32, i: u32, rotary: Pair) -> vec4<f32> {
    var sums = with_word(s, slot, lane, i, rotary.first[0], rotary.second[0]);
    sums = with_word(sums, slot, lane, i + 1u, rotary.first[1], rotary.second[1]);
    sums = with_word(sums, slot, lane, i + 2u, rotary.first[2], rotary.second[2]);
    return with_word(sums, slot, lane, i + 3u, rotary.first[3], rotary.second[3]);
}

// Scores and what load i of a lane adds.
fn with_load(s: vec4<f32>, i: u32, load: vec4<u32>, query: Pair) -> vec4<f32> {
    if (i >= LOADS) {
        return s;
    }
    if (STORAGE_F16 == 1u) {
        return s + first_of(load) * query.first + second_of(load) * query.second;
    }
    return s + first_of(load) * query.first;
}

// This lane's part of the scores of a row.
fn score_of(slot: u32, lane: u32, latent: array<vec4<u32>, 4>, query: array<Pair, 4>, rotary: array<Pair, 4>) -> vec4<f32> {
    var s = with_words(vec4<f32>(0.0), slot, lane, 0u, rotary[0]);
    s = with_words(s, slot, lane, 4u, rotary[1]);
    s = with_words(s, slot, lane, 8u, rotary[2]);
    s = with_words(s, slot, lane, 12u, rotary[3]);
    s = with_load(s, 0u, latent[0], query[0]);
    s = with_load(s, 1u, latent[1], query[1]);
    s = with_load(s, 2u, latent[2], query[2]);
    return with_load(s, 3u, latent[3], query[3]);
}

// Sums of the columns of load i, one column per head, and what a row adds.
fn with_columns(sums: Pair, i: u32, weights: vec4<f32>, load: vec4<u32>) -> Pair {
    if (i >= LOADS) {
        return sums;
    }
    if (STORAGE_F16 == 1u) {
        return Pair(sums.first + outer(weights, first_of(load)), sums.second + outer(weights, second_of(load)));
    }
    return Pair(sums.first + outer(weights, first_of(load)), sums.second);
}

fn with_row(sums: array<Pair, 4>, weights: vec4<f32>, latent: array<vec4<u32>, 4>) -> array<Pair, 4> {
    return array<Pair, 4>(
        with_columns(sums[0], 0u, weights, latent[0]),
        with_columns(sums[1], 1u, weights, latent[1]),
        with_columns(sums[2], 2u, weights, latent[2]),
        with_columns(sums[3], 3u, weights, latent[3]),
    );
}

fn pair_by_column(sums: Pair, factors: vec4<f32>) -> Pair {
    return Pair(by_column(sums.first, factors), by_column(sums.second, factors));
}

// Stores the sums of the columns of load i for head h.
fn store_load(to: u32, lane: u32, i: u32, sums: Pair, h: u32) {
    let fours = params.d_latent / 4u;
    let at = (lane + i * LANES) * FOURS;
    if (i < LOADS && at < fours) {
        partial_values[to * fours + at] = column_of(sums.first, h);
    }
    if (i < LOADS && STORAGE_F16 == 1u && at + 1u < fours) {
        partial_values[to * fours + at + 1u] = column_of(sums.second, h);
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
    @builtin(subgroup_invocation_id) member: u32,
) {
    let work = unfold(group, groups);
    if (work.z >= params.tiles_z) {
        return;
    }
    let row0 = work.x * SPLIT;
    let sequence = sequences[sequence_of(row0, params.n_sequence)];
    let token = work.z;
    let position0 = row0 - sequence.first_row;
    // Behind the last sequence the step's row numbering is padding.
    if (token >= sequence.tokens || position0 / SPLIT >= sequence.splits) {
        return;
    }
    let length = sequence.length + 1u + token - sequence.tokens;
    let count = min(max(length, position0) - position0, SPLIT);
    let slot0 = sequence.first_slot + position0;
    // Neighbours in a workgroup of one dimension are neighbours in a subgroup: LANES of them are a team.
    let lane = member % LANES;
    let base = member - lane;
    // After the exchange a lane has the scores of row 2·(bit 0) + (bit 1) of the four.
    let odd = (lane & 1u) == 1u;
    let upper = (lane & 2u) == 2u;
    let own = 2u * (lane & 1u) + ((lane >> 1u) & 1u);

    // Heads past the last repeat it; they are not stored. Loads past the last repeat it; the query is 0 there.
    let head0 = (work.y * TEAMS + local / LANES) * 4u;
    let heads = min(max(params.n_head, head0) - head0, 4u);
    let head = (sequence.token + token) * params.n_head + min(head0 + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(params.n_head - 1u));
    let query = array<Pair, 4>(
        query_pair(head, lane),
        query_pair(head, lane + LANES),
        query_pair(head, lane + 2u * LANES),
        query_pair(head, lane + 3u * LANES),
    );
    let rotary = array<Pair, 4>(
        rotary_pair(head, lane),
        rotary_pair(head, lane + 4u * LANES),
        rotary_pair(head, lane + 8u * LANES),
        rotary_pair(head, lane + 12u * LANES),
    );
    var acc = array<Pair, 4>();

    // One component per head. The sum is over the rows that this lane has after the exchange.
    var best = vec4<f32>(LOWEST);
    var sum = vec4<f32>(0.0);
    for (var first = 0u; first < count; first += 4u) {
        // Four rows. Those past the end repeat the last one; their weight is 0.
        let slot = slot0 + min(first + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(count - 1u));
        let c0 = latent_of(slot.x, lane);
        let c1 = latent_of(slot.y, lane);
        let c2 = latent_of(slot.z, lane);
        let c3 = latent_of(slot.w, lane);
        let s0 = score_of(slot.x, lane, c0, query, rotary);
        let s1 = score_of(slot.y, lane, c1, query, rotary);
        let s2 = score_of(slot.z, lane, c2, query, rotary);
        let s3 = score_of(slot.w, lane, c3, query, rotary);

        // Even lanes keep rows 0 and 1, odd lanes 2 and 3; then each keeps one of its two.
        let low = select(s0, s2, odd) + subgroupShuffleXor(select(s2, s0, odd), 1u);
        let high = select(s1, s3, odd) + subgroupShuffleXor(select(s3, s1, odd), 1u);
        var score = select(low, high, upper) + subgroupShuffleXor(select(high, low, upper), 2u);
        for (var step = 4u; step < LANES; step *= 2u) {
            score += subgroupShuffleXor(score, step);
        }
        let seen = first + own < count;
        score = select(vec4<f32>(LOWEST), score, seen);
        var next = max(score, subgroupShuffleXor(score, 1u));
        next = max(best, max(next, subgroupShuffleXor(next, 2u)));
        let weights = select(vec4<f32>(0.0), exp(score - next), seen);
        let shrink = exp(best - next);
        sum = sum * shrink + weights;
        // All lanes of a team agree. Few blocks of a long split bring a new maximum.
        if (any(next != best)) {
            acc[0] = pair_by_column(acc[0], shrink);
            acc[1] = pair_by_column(acc[1], shrink);
            acc[2] = pair_by_column(acc[2], shrink);
            acc[3] = pair_by_column(acc[3], shrink);
        }
        best = next;
        acc = with_row(acc, subgroupShuffle(weights, base), c0);
        acc = with_row(acc, subgroupShuffle(weights, base + 2u), c1);
        acc = with_row(acc, subgroupShuffle(weights, base + 1u), c2);
        acc = with_row(acc, subgroupShuffle(weights, base + 3u), c3);
    }

    sum += subgroupShuffleXor(sum, 1u);
    sum += subgroupShuffleXor(sum, 2u);
    let split = (sequence.partial + token * sequence.splits + position0 / SPLIT) * params.n_head + head0;
    for (var h = 0u; h < heads; h++) {
        store_load(split + h, lane, 0u, acc[0], h);
        store_load(split + h, lane, 1u, acc[1], h);
        store_load(split + h, lane, 2u, acc[2], h);
        store_load(split + h, lane, 3u, acc[3], h);
    }
    let maxima = best;
    let sums = sum;
    if (lane < heads) {
        partial_softmax[split + lane] = vec2<f32>(maxima[lane], sums[lane]);
    }
}

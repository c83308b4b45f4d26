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
// any other the multiply-adds are the floor. Run on lavapipe alone so far, for correctness: attention_absorbed_subgroup is
// faster there.

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

// What four elements of a row add to the sums of four heads, one column per head.
fn of_heads(weights: vec4<f32>, four: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(weights.x * four, weights.y * four, weights.z * four, weights.w * four);
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
    let fours = params.d_latent / 4u;
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
    var query: array<mat4x4<f32>, 8>;
    var acc: array<mat4x4<f32>, 8>;
    for (var c = 0u; c < LOADS; c++) {
        for (var half = 0u; half < FOURS; half++) {
            let i = c * FOURS + half;
            let at = (lane + c * LANES) * FOURS + half;
            query[i] = mat4x4<f32>();
            acc[i] = mat4x4<f32>();
            if (at < fours) {
                let a = head * fours + at;
                query[i] = params.scale * mat4x4<f32>(absorbed[a.x], absorbed[a.y], absorbed[a.z], absorbed[a.w]);
            }
        }
    }
    // A word holds one element in f32, two in f16: one vector per element, one component per head.
    var rotary: array<vec4<f32>, 32>;
    for (var c = 0u; c < ROPE; c++) {
        for (var half = 0u; half < FOURS; half++) {
            let at = (lane + c * LANES) * FOURS + half;
            rotary[c * FOURS + half] = vec4<f32>(0.0);
            if (at < params.d_rope) {
                let r = head * (params.d_nope + params.d_rope) + params.d_nope + at;
                rotary[c * FOURS + half] = params.scale * vec4<f32>(q[r.x], q[r.y], q[r.z], q[r.w]);
            }
        }
    }

    // One component per head. The sum is over the rows that this lane has after the exchange.
    var best = vec4<f32>(LOWEST);
    var sum = vec4<f32>(0.0);
    for (var first = 0u; first < count; first += 4u) {
        // Loads of four rows. Rows past the end repeat the last one; their weight is 0.
        var loads: array<array<vec4<u32>, 4>, 4>;
        var s: array<vec4<f32>, 4>;
        for (var r = 0u; r < 4u; r++) {
            let slot = slot0 + min(first + r, count - 1u);
            for (var c = 0u; c < LOADS; c++) {
                loads[r][c] = latent_cache[slot * params.latent_loads + min(lane + c * LANES, params.latent_loads - 1u)];
            }
            s[r] = vec4<f32>(0.0);
            for (var c = 0u; c < ROPE; c++) {
                let at = slot * params.rope_loads * 4u + min(lane + c * LANES, params.rope_loads * 4u - 1u);
                let word = rope_cache[at >> 2u][at & 3u];
                if (STORAGE_F16 == 1u) {
                    let pair = unpack2x16float(word);
                    s[r] += pair.x * rotary[2u * c] + pair.y * rotary[2u * c + 1u];
                } else {
                    s[r] += bitcast<f32>(word) * rotary[c];
                }
            }
        }
        for (var r = 0u; r < 4u; r++) {
            for (var c = 0u; c < LOADS; c++) {
                s[r] += first_of(loads[r][c]) * query[c * FOURS];
                if (STORAGE_F16 == 1u) {
                    s[r] += second_of(loads[r][c]) * query[c * FOURS + 1u];
                }
            }
        }

        // Even lanes keep rows 0 and 1, odd lanes 2 and 3; then each keeps one of its two.
        let low = select(s[0], s[2], odd) + subgroupShuffleXor(select(s[2], s[0], odd), 1u);
        let high = select(s[1], s[3], odd) + subgroupShuffleXor(select(s[3], s[1], odd), 1u);
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
            for (var i = 0u; i < LOADS * FOURS; i++) {
                acc[i] = mat4x4<f32>(
                    shrink.x * acc[i][0],
                    shrink.y * acc[i][1],
                    shrink.z * acc[i][2],
                    shrink.w * acc[i][3],
                );
            }
        }
        best = next;
        for (var r = 0u; r < 4u; r++) {
            let p = subgroupShuffle(weights, base + (r >> 1u) + 2u * (r & 1u));
            for (var c = 0u; c < LOADS; c++) {
                acc[c * FOURS] += of_heads(p, first_of(loads[r][c]));
                if (STORAGE_F16 == 1u) {
                    acc[c * FOURS + 1u] += of_heads(p, second_of(loads[r][c]));
                }
            }
        }
    }

    sum += subgroupShuffleXor(sum, 1u);
    sum += subgroupShuffleXor(sum, 2u);
    let split = (sequence.partial + token * sequence.splits + position0 / SPLIT) * params.n_head + head0;
    for (var c = 0u; c < LOADS; c++) {
        for (var half = 0u; half < FOURS; half++) {
            let at = (lane + c * LANES) * FOURS + half;
            for (var h = 0u; h < 4u; h++) {
                if (at < fours && h < heads) {
                    partial_values[(split + h) * fours + at] = acc[c * FOURS + half][h];
                }
            }
        }
    }
    if (lane < heads) {
        partial_softmax[split + lane] = vec2<f32>(best[lane], sum[lane]);
    }
}

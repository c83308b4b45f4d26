// Attention of a few queries per sequence straight over the cached latents (weight absorption of DeepSeek-V2, §2.1.2): the
// queries come multiplied by the key projection; the value projection multiplies the weighted latents afterwards.
//
//   s_j = scale · (a[h] · c_j + q_R[h] · k_R_j)    m = max_j s_j    l = Σ_j e^(s_j−m)    values[h] = Σ_j e^(s_j−m) c_j
//
// HEADS heads share a workgroup, so that each cache row is read once for all of them. Scores: each invocation owns four rows
// and multiplies every 16 bytes of a row with all heads. Values: each invocation owns four columns. Splits are those of
// attention_decode.
// Padding: cache rows end with finite values (0, as cache_append writes them). The query is 0 there, and the columns of the
// padding are not stored.
// Floor: each row of the cache once per HEADS heads, for n_head · (2·d_latent + d_rope) multiply-adds. 16 heads of 512 + 64 in
// f16 are 30 FLOP per byte where an H200 has 12 by our rooflines, so that multiply-adds are the limit: 183 µs of 32 sequences of
// 8192 rows, against 71 for their bytes. Eight heads are what 16 KiB of workgroup memory hold; with matrices or subgroups the
// other variants are preferred. A block of 8 halves of four rows is 4 loads and 16 reads of workgroup memory, the same for all
// lanes, for 256 multiply-adds.
// grid: (splits of the step, ⌈n_head / HEADS⌉, most query tokens of a sequence)
// Static (RDNA3, Mesa 25), at most: 120 registers, 12 288 bytes of workgroup memory, nothing spilled.
// Not measured on a GPU.

override STORAGE_F16: u32 = 0u;
override HEADS: u32 = 4u;        // 4 or 8
override CHUNK: u32 = 8u;        // query elements staged at once, in 16-byte loads of a key
override SPLIT: u32 = 256u;
override WORKGROUP: u32 = SPLIT / 4u;

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
@group(0) @binding(1) var<storage, read> absorbed: array<f32>;                     // [tokens, n_head, d_latent]
@group(0) @binding(2) var<storage, read> q: array<f32>;                            // [tokens, n_head, d_nope + d_rope], rotated
@group(0) @binding(3) var<storage, read> latent_cache: array<vec4<u32>>;           // [cache rows, latent_loads]
@group(0) @binding(4) var<storage, read> rope_cache: array<vec4<u32>>;             // [cache rows, rope_loads]
@group(0) @binding(5) var<storage, read> sequences: array<DecodeSequence>;         // [n_sequence]
@group(0) @binding(6) var<storage, read_write> partial_values: array<f32>;         // [partials, n_head, d_latent]
@group(0) @binding(7) var<storage, read_write> partial_softmax: array<vec2<f32>>;  // [partials, n_head] (m, l)

var<workgroup> sh_query: array<vec4<f32>, CHUNK * 2u * HEADS>;      // four elements of a head, heads side by side
var<workgroup> sh_score: array<vec4<f32>, SPLIT * HEADS / 4u>;      // four heads of a row
var<workgroup> sh_reduce: array<vec4<f32>, WORKGROUP * HEADS / 4u>;

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

// Element i of the absorbed query, or of its rotary part; 0 past the end. Heads past the last repeat it; they are not stored.
fn query_element(token: u32, head: u32, rotary: bool, i: u32) -> f32 {
    let query = token * params.n_head + min(head, params.n_head - 1u);
    if (rotary) {
        if (i >= params.d_rope) {
            return 0.0;
        }
        return params.scale * q[query * (params.d_nope + params.d_rope) + params.d_nope + i];
    }
    if (i >= params.d_latent) {
        return 0.0;
    }
    return params.scale * absorbed[query * params.d_latent + i];
}

// 16 bytes of a key.
fn key_words(slot: u32, rotary: bool, i: u32) -> vec4<u32> {
    if (rotary) {
        return rope_cache[slot * params.rope_loads + i];
    }
    return latent_cache[slot * params.latent_loads + i];
}

// Columns 4i … 4i + 3 of a cached latent.
fn latent4(slot: u32, i: u32) -> vec4<f32> {
    let row = slot * params.latent_loads;
    if (STORAGE_F16 == 1u) {
        let load = latent_cache[row + (i >> 1u)];
        return select(first_of(load), second_of(load), (i & 1u) == 1u);
    }
    return bitcast<vec4<f32>>(latent_cache[row + i]);
}

// Products of four staged queries with four keys, one column per query.
fn against(at: u32, keys: mat4x4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(
        sh_query[at] * keys,
        sh_query[at + 1u] * keys,
        sh_query[at + 2u] * keys,
        sh_query[at + 3u] * keys,
    );
}

// Each component of a times b, one column each.
fn outer(a: vec4<f32>, b: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(a.x * b, a.y * b, a.z * b, a.w * b);
}

// Column i of a matrix, without an index into registers.
fn column_of(m: mat4x4<f32>, i: u32) -> vec4<f32> {
    return select(select(m[0], m[1], i == 1u), select(m[2], m[3], i == 3u), i >= 2u);
}

fn nth(vectors: Octet, i: u32) -> vec4<f32> {
    return select(column_of(vectors.low, i), column_of(vectors.high, i - 4u), i >= 4u);
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
    @builtin(local_invocation_index) lane: u32,
) {
    let work = unfold(group, groups);
    if (work.z >= params.tiles_z) {
        return;
    }
    let row0 = work.x * SPLIT;
    let sequence = sequences[sequence_of(row0, params.n_sequence)];
    let query = work.z;
    let head0 = work.y * HEADS;
    let position0 = row0 - sequence.first_row;
    // Behind the last sequence the step's row numbering is padding.
    if (query >= sequence.tokens || position0 / SPLIT >= sequence.splits) {
        return;
    }
    let length = sequence.length + 1u + query - sequence.tokens;
    let count = min(max(length, position0) - position0, SPLIT);
    let slot0 = sequence.first_slot + position0;
    let token = sequence.token + query;

    // Rows past the end repeat the last one; they get no score.
    let last = max(count, 1u) - 1u;
    let slots = slot0 + min(vec4<u32>(lane) + vec4<u32>(0u, 1u, 2u, 3u) * WORKGROUP, vec4<u32>(last));
    // One vector per head, one component per row.
    var s = Octet();
    let vectors = select(1u, 2u, STORAGE_F16 == 1u);   // vec4s of 16 bytes
    for (var step = 0u; step < params.latent_loads + params.rope_loads; ) {
        let rotary = step >= params.latent_loads;
        let first = select(step, step - params.latent_loads, rotary);
        let width = min(CHUNK, select(params.latent_loads, params.rope_loads, rotary) - first);
        for (var i = lane; i < width * vectors * HEADS * 4u; i += WORKGROUP) {
            let element = i / 4u / HEADS * 4u + i % 4u;
            let value = query_element(token, head0 + i / 4u % HEADS, rotary, first * vectors * 4u + element);
            sh_query[i / 4u][i % 4u] = value;
        }
        workgroupBarrier();
        if (count > 0u) {
            for (var i = 0u; i < width; i++) {
                let w0 = key_words(slots.x, rotary, first + i);
                let w1 = key_words(slots.y, rotary, first + i);
                let w2 = key_words(slots.z, rotary, first + i);
                let w3 = key_words(slots.w, rotary, first + i);
                for (var part = 0u; part < vectors; part++) {
                    var keys = mat4x4<f32>(first_of(w0), first_of(w1), first_of(w2), first_of(w3));
                    if (part == 1u) {
                        keys = mat4x4<f32>(second_of(w0), second_of(w1), second_of(w2), second_of(w3));
                    }
                    let at = (i * vectors + part) * HEADS;
                    s.low += against(at, keys);
                    if (HEADS == 8u) {
                        s.high += against(at + 4u, keys);
                    }
                }
            }
        }
        workgroupBarrier();
        step += width;
    }

    var low = vec4<f32>(LOWEST);
    var high = vec4<f32>(LOWEST);
    for (var r = 0u; r < 4u; r++) {
        let row = lane + r * WORKGROUP;
        if (row < count) {
            let of_low = column_of(transpose(s.low), r);
            sh_score[row] = of_low;
            low = max(low, of_low);
            if (HEADS == 8u) {
                let of_high = column_of(transpose(s.high), r);
                sh_score[SPLIT + row] = of_high;
                high = max(high, of_high);
            }
        }
    }
    for (var half = 0u; half < HEADS / 4u; half++) {
        sh_reduce[half * WORKGROUP + lane] = select(low, high, half == 1u);
    }
    workgroupBarrier();
    for (var step = WORKGROUP / 2u; step > 0u; step /= 2u) {
        if (lane < step) {
            for (var half = 0u; half < HEADS / 4u; half++) {
                let at = half * WORKGROUP + lane;
                sh_reduce[at] = max(sh_reduce[at], sh_reduce[at + step]);
            }
        }
        workgroupBarrier();
    }
    low = sh_reduce[0];
    high = sh_reduce[(HEADS / 4u - 1u) * WORKGROUP];
    workgroupBarrier();

    for (var half = 0u; half < HEADS / 4u; half++) {
        let best = select(low, high, half == 1u);
        var sum = vec4<f32>(0.0);
        for (var row = lane; row < count; row += WORKGROUP) {
            let p = exp(sh_score[half * SPLIT + row] - best);
            sh_score[half * SPLIT + row] = p;
            sum += p;
        }
        sh_reduce[half * WORKGROUP + lane] = sum;
    }
    workgroupBarrier();
    for (var step = WORKGROUP / 2u; step > 0u; step /= 2u) {
        if (lane < step) {
            for (var half = 0u; half < HEADS / 4u; half++) {
                let at = half * WORKGROUP + lane;
                sh_reduce[at] += sh_reduce[at + step];
            }
        }
        workgroupBarrier();
    }

    let heads = min(params.n_head - head0, HEADS);
    let split = (sequence.partial + query * sequence.splits + position0 / SPLIT) * params.n_head + head0;
    for (var column = lane; 4u * column < params.d_latent; column += WORKGROUP) {
        var sums = Octet();
        for (var row = 0u; row < count; row++) {
            let c = latent4(slot0 + row, column);
            sums.low += outer(sh_score[row], c);
            if (HEADS == 8u) {
                sums.high += outer(sh_score[SPLIT + row], c);
            }
        }
        for (var h = 0u; h < heads; h++) {
            let four = nth(sums, h);
            for (var k = 0u; k < 4u && 4u * column + k < params.d_latent; k++) {
                partial_values[(split + h) * params.d_latent + 4u * column + k] = four[k];
            }
        }
    }
    let maxima = select(low, high, lane >= 4u);
    if (lane < heads) {
        partial_softmax[split + lane] = vec2<f32>(maxima[lane % 4u], sh_reduce[lane / 4u * WORKGROUP][lane % 4u]);
    }
}

// Attention straight over the cached latents where a gate by token id is between latent and key (EG-MLA, gate site
// `up_projected`): the query is absorbed once per distinct token id of the sequence. The positions of one id are a group, and
// u(j) is the group of position j:
//
//   a[u,h] = scale · W_K[h]ᵀ (q_C[h] ⊙ γ_K ⊙ g_K[u,h])
//   s_j    = ρ_j (a[u(j),h] · c_j − μ_j · scale · Σ(q_C ⊙ γ_K)) + scale · q_R · k_R_j      (+ q_C · β_K, the same for every j)
//   m = max_j s_j    l = Σ_j e^(s_j−m)    w_j = e^(s_j−m) ρ_j    S[u,h] = Σ_{j in u} w_j c_j
//   values[h] = γ_V ⊙ ( Σ_u g_V[u,h] ⊙ (W_V[h] S[u,h]) − Σ_j w_j μ_j ) + l · β_V
//
// A tile is the first 64 positions of up to GROUPS groups; a chunk is 256 further positions of one group. Absorbed queries and
// sums of a tile stay in workgroup memory. An entry is SPAN tiles or SPAN chunks with one running softmax; attention_combine
// combines the entries. A pass covers the groups whose gate rows are at hand: all of them, unless they are projected in parts.
// Each invocation owns eight latent columns (then four value columns) of one head, so that each weight is read once for GROUPS
// groups. Eight columns, not four: then 16-byte loads of halves are used in full, which is faster on lavapipe.
// Padding: cache rows end with finite values (0, as cache_append writes them), outputs of kv_b_proj with 0, so that the products
// vanish.
// Floor: the gate rows of every id once per head, 2·(d_nope + d_value) bytes in f16, and a cache row once per HEADS heads;
// 2·d_latent·(d_nope + d_value) multiply-adds per id and head, 2·d_latent + d_rope per position and head. 12 heads of 64 + 64
// with 5 positions per id at 8192 tokens: 5 and 2 MB, 0.3 GFLOP, some 6 µs of an H200 in f32. Behind it the weights limit, which
// every tile reads anew from the L2: 192 KiB for GROUPS groups. AMD's compiler (RDNA3, Mesa 25) has two subgroups beside each
// other at the largest setting, whose 16 KiB it fills; the other variants hold more.
// grid: (⌈n_head / HEADS⌉ · query tokens of a sequence, entries folded into y and z)
// Static (RDNA3, Mesa 25), at most: 120 registers, 16 384 bytes of workgroup memory, nothing spilled.
// Not measured on a GPU.

override CACHE_F16: u32 = 0u;
override STORAGE_F16: u32 = 0u;  // kv_b_proj, affine
override GATES_F16: u32 = 0u;    // gates
override MORE_F16: u32 = 0u;     // gates_more
override SOURCES: u32 = 0u;      // of gate rows: 0 gates and gates_more, 1 gates only, 2 gates_more only
override ACTIVATION: u32 = 0u;   // 0 identity, 1 sigmoid, 2 tanh, 3 silu, 4 one_plus
override NORM: u32 = 0u;         // 0 layer_norm, 1 rms_norm, 2 none
override HEADS: u32 = 2u;        // heads per workgroup
override LANES: u32 = 8u;        // invocations per head
override GROUPS: u32 = 4u;       // groups of a tile, at most 4
override SPAN: u32 = 4u;          // tiles per entry
override D_NOPE: u32 = 64u;
override D_VALUE: u32 = 64u;
override LATENT4: u32 = 16u;     // latent columns / 4, rounded up to an even number
override ROPE4: u32 = 16u;       // rotary columns / 4, rounded up to an even number
override VALUE4: u32 = 16u;      // value columns / 4, rounded up
override ROOM: u32 = 64u;        // the larger of D_NOPE and D_VALUE rounded up to 4
override WORKGROUP: u32 = HEADS * LANES;

const LOWEST: f32 = -3.4028234e38;
const NO_ROW: u32 = 0xffffffffu;
// Words of `lists`: a group's header.
const HEADER_WORDS: u32 = 8u;
const HEADER_COUNT: u32 = 1u;
const HEADER_GATE_ROW: u32 = 2u;
const HEADER_TIER_1: u32 = 3u;
const HEADER_TIER_2: u32 = 4u;
const HEADER_POSITIONS: u32 = 5u;
// A chunk of a group's positions.
const CHUNK_WORDS: u32 = 260u;
const CHUNK_GROUP: u32 = 0u;
const CHUNK_FIRST: u32 = 1u;
const CHUNK_POSITIONS: u32 = 4u;
// A line of the sequence table.
const SEQUENCE_WORDS: u32 = 16u;
const SEQUENCE_FIRST_ENTRY: u32 = 0u;
const SEQUENCE_TILES: u32 = 1u;
const SEQUENCE_GROUPS: u32 = 2u;
const SEQUENCE_BASE: u32 = 3u;
const SEQUENCE_FIRST_SLOT: u32 = 4u;
const SEQUENCE_POSITION: u32 = 5u;
const SEQUENCE_TOKEN: u32 = 6u;
const SEQUENCE_TOKENS: u32 = 7u;
const SEQUENCE_PARTIAL: u32 = 8u;
const SEQUENCE_TILE_ENTRIES: u32 = 9u;
const SEQUENCE_FIRST_GROUP: u32 = 10u;
const SEQUENCE_CHUNKS: u32 = 11u;
const SEQUENCE_CHUNK_WORD: u32 = 12u;
const SEQUENCE_CHUNK_ENTRIES: u32 = 13u;
// Positions of a group: in its header, in its first tier, in a tile, in a chunk.
const INLINE_LENGTH: u32 = 3u;
const TIER_1_LENGTH: u32 = 13u;
const TILE_LENGTH: u32 = 64u;
const CHUNK_LENGTH: u32 = 256u;   // GROUPS · TILE_LENGTH is not more

struct Params {
    n_head: u32,
    d_latent: u32,
    d_nope: u32,
    d_rope: u32,
    d_value: u32,
    n_sequence: u32,
    entries: u32,
    table: u32,            // first word of the sequence table in `lists`
    latent: u32,           // first vec4 of the latents in `cache`; rope and statistics likewise
    latent_pitch: u32,     // vec4s of a cache row; rope_pitch likewise
    rope: u32,
    rope_pitch: u32,
    statistics: u32,
    weight_pitch: u32,     // vec4s of an output of kv_b_proj
    gate_pitch: u32,       // elements of a gate row in `gates`
    more_pitch: u32,       // elements of a gate row in `gates_more`
    resident: u32,         // gate rows in `gates`; those from here on are in `gates_more`
    first_group: u32,      // of the pass: first_group … first_group + groups, in the step's numbering
    groups: u32,
    pass_index: u32,
    passes: u32,
    beta: u32,             // first element of β in `affine`
    softmax: u32,          // first word of (m, l) in `partial`
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<f32>;                  // [tokens, n_head, D_NOPE + d_rope], rotated
@group(0) @binding(2) var<storage, read> kv_b_proj: array<vec4<u32>>;    // [n_head, D_NOPE + D_VALUE, weight_pitch]
@group(0) @binding(3) var<storage, read> affine: array<u32>;             // γ [n_head, D_NOPE + D_VALUE], then β
@group(0) @binding(4) var<storage, read> gates: array<u32>;              // [resident, gate_pitch], before the activation
@group(0) @binding(5) var<storage, read> gates_more: array<u32>;         // [more gate rows, more_pitch]
@group(0) @binding(6) var<storage, read> cache: array<vec4<u32>>;        // latents, rotary keys, (μ, ρ)
@group(0) @binding(7) var<storage, read> lists: array<u32>;              // group lists and sequence table: see attention/groups.rs
@group(0) @binding(8) var<storage, read_write> partial: array<f32>;      // [partials, n_head, D_VALUE], then [partials, n_head, 2]

var<workgroup> sh_query: array<f32, HEADS * D_NOPE + 1u>;                // scale · q_C ⊙ γ_K
var<workgroup> sh_rope: array<vec4<f32>, HEADS * ROPE4>;                 // scale · q_R
var<workgroup> sh_gate: array<vec4<f32>, HEADS * ROOM>;                  // gated query, then g_V: one component per group
var<workgroup> sh_latent: array<vec4<f32>, GROUPS * HEADS * LATENT4>;    // a[u,h], then S[u,h]
var<workgroup> sh_value: array<vec4<f32>, HEADS * VALUE4>;               // values so far
var<workgroup> sh_score: array<f32, HEADS * CHUNK_LENGTH>;
var<workgroup> sh_slot: array<u32, CHUNK_LENGTH>;                        // u32 max: the query does not see it
var<workgroup> sh_statistics: array<vec2<f32>, CHUNK_LENGTH>;            // (μ, ρ)

// Index of the word that holds element i, or of the load that holds vector i, in f32 or f16 storage.
fn index_of(i: u32) -> u32 {
    return select(i, i >> 1u, STORAGE_F16 == 1u);
}

// Element i, given the word that holds it.
fn decode(word: u32, i: u32) -> f32 {
    if (STORAGE_F16 == 1u) {
        let pair = unpack2x16float(word);
        return select(pair.x, pair.y, (i & 1u) == 1u);
    }
    return bitcast<f32>(word);
}

fn halves(low: u32, high: u32) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(low), unpack2x16float(high));
}

// Eight numbers.
struct Eight {
    low: vec4<f32>,
    high: vec4<f32>,
}

// Columns 8i … 8i + 7 of an output of kv_b_proj; 0 past its end.
fn weight8(output: u32, i: u32) -> Eight {
    let first = output * params.weight_pitch;
    if (STORAGE_F16 == 1u) {
        let words = kv_b_proj[first + i];
        return Eight(halves(words.x, words.y), halves(words.z, words.w));
    }
    var high = vec4<f32>(0.0);
    if (2u * i + 1u < params.weight_pitch) {
        high = bitcast<vec4<f32>>(kv_b_proj[first + 2u * i + 1u]);
    }
    return Eight(bitcast<vec4<f32>>(kv_b_proj[first + 2u * i]), high);
}

// Columns 8i … 8i + 7 of a cached latent; 0 past its end.
fn latent8(slot: u32, i: u32) -> Eight {
    let first = params.latent + slot * params.latent_pitch;
    if (CACHE_F16 == 1u) {
        let words = cache[first + i];
        return Eight(halves(words.x, words.y), halves(words.z, words.w));
    }
    var high = vec4<f32>(0.0);
    if (2u * i + 1u < params.latent_pitch) {
        high = bitcast<vec4<f32>>(cache[first + 2u * i + 1u]);
    }
    return Eight(bitcast<vec4<f32>>(cache[first + 2u * i]), high);
}

// (μ, ρ) of a cached token.
fn statistics_of(slot: u32) -> vec2<f32> {
    let pair = cache[params.statistics + (slot >> 1u)];
    return bitcast<vec2<f32>>(select(pair.xy, pair.zw, (slot & 1u) == 1u));
}

fn sigmoid(v: f32) -> f32 {
    return 1.0 / (1.0 + exp(-v));
}

fn activate(v: f32) -> f32 {
    switch (ACTIVATION) {
        case 1u: {
            return sigmoid(v);
        }
        case 2u: {
            // Some drivers' tanh overflows for large arguments; ±1 is exact in f32 from 10 on. A clamp would hide NaN.
            return select(tanh(clamp(v, -10.0, 10.0)), v, (bitcast<u32>(v) & 0x7fffffffu) > 0x7f800000u);
        }
        case 3u: {
            return v * sigmoid(v);
        }
        case 4u: {
            return 1.0 + v;
        }
        default: {
            return v;
        }
    }
}

// Element i of `gates`.
fn gate_at(i: u32) -> f32 {
    if (GATES_F16 == 1u) {
        let pair = unpack2x16float(gates[i >> 1u]);
        return select(pair.x, pair.y, (i & 1u) == 1u);
    }
    return bitcast<f32>(gates[i]);
}

// Element i of `gates_more`.
fn more_at(i: u32) -> f32 {
    if (MORE_F16 == 1u) {
        let pair = unpack2x16float(gates_more[i >> 1u]);
        return select(pair.x, pair.y, (i & 1u) == 1u);
    }
    return bitcast<f32>(gates_more[i]);
}

// Element i of a gate row, activated.
fn gate_of(gate_row: u32, i: u32) -> f32 {
    if (SOURCES == 1u || (SOURCES == 0u && gate_row < params.resident)) {
        return activate(gate_at(gate_row * params.gate_pitch + i));
    }
    return activate(more_at((gate_row - params.resident) * params.more_pitch + i));
}

// Element i of a gate row, activated; 0 where there is no group.
fn gate_or_zero(gate_row: u32, i: u32) -> f32 {
    if (gate_row == NO_ROW) {
        return 0.0;
    }
    return gate_of(gate_row, i);
}

// Gate row of a group, of the sequence whose lists begin at `base`; `number` is the group's in the step.
fn gate_row_of(base: u32, group: u32, number: u32) -> u32 {
    let gate_row = lists[base + group * HEADER_WORDS + HEADER_GATE_ROW];
    return select(gate_row, params.resident + number - params.first_group, gate_row == NO_ROW);
}

// Position i of a group, for i below TILE_LENGTH.
fn position_of(base: u32, group: u32, i: u32) -> u32 {
    let header = base + group * HEADER_WORDS;
    if (i < INLINE_LENGTH) {
        return lists[header + HEADER_POSITIONS + i];
    }
    if (i < INLINE_LENGTH + TIER_1_LENGTH) {
        return lists[base + lists[header + HEADER_TIER_1] + i - INLINE_LENGTH];
    }
    return lists[base + lists[header + HEADER_TIER_2] + i - INLINE_LENGTH - TIER_1_LENGTH];
}

// First word of the last line of the sequence table whose word `field` is at most `value`.
fn line_of(field: u32, value: u32) -> u32 {
    var low = 0u;
    var high = params.n_sequence;
    while (high - low > 1u) {
        let middle = (low + high) / 2u;
        if (lists[params.table + middle * SEQUENCE_WORDS + field] <= value) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return params.table + low * SEQUENCE_WORDS;
}

// Products of eight columns of four outputs with those of a group's weighted latents.
fn products8(at: u32, w0: Eight, w1: Eight, w2: Eight, w3: Eight) -> vec4<f32> {
    let low = sh_latent[at];
    let high = sh_latent[at + 1u];
    return vec4<f32>(
        dot(w0.low, low) + dot(w0.high, high),
        dot(w1.low, low) + dot(w1.high, high),
        dot(w2.low, low) + dot(w2.high, high),
        dot(w3.low, low) + dot(w3.high, high),
    );
}

// e^(s_j − m) of position e of the tile; 0 for one that the query does not see.
fn weight_of(local_head: u32, e: u32, best: f32) -> f32 {
    return select(0.0, exp(sh_score[local_head * CHUNK_LENGTH + e] - best), sh_slot[e] != NO_ROW);
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let entry = workgroup.z * workgroups.y + workgroup.y;
    let blocks = (params.n_head + HEADS - 1u) / HEADS;
    let query = workgroup.x / blocks;
    if (entry >= params.entries) {
        return;
    }
    let line = line_of(SEQUENCE_FIRST_ENTRY, entry);
    let tiles = lists[line + SEQUENCE_TILES];
    let groups = lists[line + SEQUENCE_GROUPS];
    let base = lists[line + SEQUENCE_BASE];
    let first_slot = lists[line + SEQUENCE_FIRST_SLOT];
    // A query token sees itself and the tokens before it.
    let last = lists[line + SEQUENCE_POSITION] + query;
    let token = lists[line + SEQUENCE_TOKEN] + query;
    if (query >= lists[line + SEQUENCE_TOKENS]) {
        return;
    }
    let tile_entries = lists[line + SEQUENCE_TILE_ENTRIES];
    let first_group = lists[line + SEQUENCE_FIRST_GROUP];
    let chunks = lists[line + SEQUENCE_CHUNKS];
    let first_chunk = base + lists[line + SEQUENCE_CHUNK_WORD];
    let chunk_entries = lists[line + SEQUENCE_CHUNK_ENTRIES];
    let own_entry = entry - lists[line + SEQUENCE_FIRST_ENTRY];
    // Tiles belong to one pass, which writes their partial result. The chunks of an entry may belong to several passes, each of
    // which writes a partial result of its own.
    let of_chunks = own_entry >= tile_entries;
    var index = lists[line + SEQUENCE_PARTIAL] + query * (tile_entries + params.passes * chunk_entries) + own_entry;
    var tile0 = own_entry * SPAN;
    var tile1 = min(tile0 + SPAN, tiles);
    if (of_chunks) {
        index += params.pass_index * chunk_entries;
        tile0 = (own_entry - tile_entries) * SPAN;
        tile1 = min(tile0 + SPAN, chunks);
    } else {
        let number = first_group + tile0 * GROUPS;
        if (number < params.first_group || number - params.first_group >= params.groups) {
            return;
        }
    }

    // With one head per workgroup this folds to the constant 0: compilers then see what is uniform.
    let local_head = select(lane / LANES, 0u, HEADS == 1u);
    let own = lane - local_head * LANES;
    let head_index = (workgroup.x % blocks) * HEADS + local_head;
    // Heads past the last repeat it; they are not stored.
    let head = min(head_index, params.n_head - 1u);
    let head_output = head * (D_NOPE + D_VALUE);
    let query_at = (token * params.n_head + head) * (D_NOPE + params.d_rope);

    for (var i = own; i < 4u * ROPE4; i += LANES) {
        var element = 0.0;
        if (i < params.d_rope) {
            element = params.scale * q[query_at + D_NOPE + i];
        }
        sh_rope[local_head * ROPE4 + i / 4u][i % 4u] = element;
    }
    for (var d = own; d < D_NOPE; d += LANES) {
        let i = head_output + d;
        var x = params.scale * q[query_at + d];
        if (NORM != 2u) {
            x *= decode(affine[index_of(i)], i);
        }
        sh_query[local_head * D_NOPE + d] = x;
    }
    for (var i = own; i < VALUE4; i += LANES) {
        sh_value[local_head * VALUE4 + i] = vec4<f32>(0.0);
    }
    workgroupBarrier();
    // scale · Σ(q_C ⊙ γ_K)
    var query_gamma = 0.0;
    if (NORM == 0u) {
        for (var d = 0u; d < D_NOPE; d++) {
            query_gamma += sh_query[local_head * D_NOPE + d];
        }
    }

    var best = LOWEST;   // m so far
    var sum = 0.0;       // l so far
    var shift = 0.0;     // Σ w_j μ_j so far
    for (var tile = tile0; tile < tile1; tile++) {
        // Groups of this tile, and where the positions of each end.
        var group = tile * GROUPS;
        var end = vec4<u32>(0u);
        var skipped = 0u;
        var chunk = 0u;
        if (!of_chunks) {
            var total = 0u;
            for (var g = 0u; g < 4u; g++) {
                if (g < GROUPS && group + g < groups) {
                    total += min(lists[base + (group + g) * HEADER_WORDS + HEADER_COUNT], TILE_LENGTH);
                }
                end = select(end, vec4<u32>(total), vec4<u32>(g) <= vec4<u32>(0u, 1u, 2u, 3u));
            }
        } else {
            chunk = first_chunk + tile * CHUNK_WORDS;
            group = lists[chunk + CHUNK_GROUP];
            skipped = lists[chunk + CHUNK_FIRST];
            end = vec4<u32>(min(lists[base + group * HEADER_WORDS + HEADER_COUNT] - skipped, CHUNK_LENGTH));
        }
        let number = first_group + group;
        if (number < params.first_group || number - params.first_group >= params.groups) {
            continue;
        }
        let ends = end;
        let count = ends.w;
        for (var e = lane; e < count; e += WORKGROUP) {
            var position = 0u;
            if (!of_chunks) {
                let g = u32(e >= ends.x) + u32(e >= ends.y) + u32(e >= ends.z);
                let before = select(0u, ends[max(g, 1u) - 1u], g > 0u);
                position = position_of(base, group + g, e - before);
            } else {
                position = lists[chunk + CHUNK_POSITIONS + e];
            }
            sh_slot[e] = select(NO_ROW, first_slot + position, position <= last);
            if (NORM != 2u) {
                sh_statistics[e] = statistics_of(first_slot + position);
            }
        }
        var own_rows = vec4<u32>(NO_ROW);
        own_rows.x = gate_row_of(base, group, number);
        if (!of_chunks) {
            for (var g = 1u; g < GROUPS; g++) {
                if (group + g < groups) {
                    let row = gate_row_of(base, group + g, number + g);
                    own_rows = select(own_rows, vec4<u32>(row), vec4<u32>(g) == vec4<u32>(0u, 1u, 2u, 3u));
                }
            }
        }
        let gate_rows = own_rows;
        for (var i = own; i < 4u * D_NOPE; i += LANES) {
            let d = i / 4u;
            let gate = gate_or_zero(gate_rows[i % 4u], head_output + d);
            sh_gate[local_head * ROOM + d][i % 4u] = sh_query[local_head * D_NOPE + d] * gate;
        }
        workgroupBarrier();

        // Absorb W_K: each weight is multiplied with the four groups.
        for (var i = own; 2u * i < LATENT4; i += LANES) {
            var a0 = Eight();
            var a1 = Eight();
            var a2 = Eight();
            var a3 = Eight();
            for (var d = 0u; d < D_NOPE; d++) {
                let w = weight8(head_output + d, i);
                let x = sh_gate[local_head * ROOM + d];
                a0.low += x.x * w.low;
                a0.high += x.x * w.high;
                if (GROUPS > 1u) {
                    a1.low += x.y * w.low;
                    a1.high += x.y * w.high;
                }
                if (GROUPS > 2u) {
                    a2.low += x.z * w.low;
                    a2.high += x.z * w.high;
                    a3.low += x.w * w.low;
                    a3.high += x.w * w.high;
                }
            }
            let to = local_head * LATENT4 + 2u * i;
            sh_latent[to] = a0.low;
            sh_latent[to + 1u] = a0.high;
            if (GROUPS > 1u) {
                sh_latent[to + HEADS * LATENT4] = a1.low;
                sh_latent[to + HEADS * LATENT4 + 1u] = a1.high;
            }
            if (GROUPS > 2u) {
                sh_latent[to + 2u * HEADS * LATENT4] = a2.low;
                sh_latent[to + 2u * HEADS * LATENT4 + 1u] = a2.high;
                sh_latent[to + 3u * HEADS * LATENT4] = a3.low;
                sh_latent[to + 3u * HEADS * LATENT4 + 1u] = a3.high;
            }
        }
        workgroupBarrier();

        // Scores.
        for (var e = own; e < count; e += LANES) {
            // An unseen position reads the sequence's first row; its score gives it no weight.
            let visible = sh_slot[e] != NO_ROW;
            let slot = select(first_slot, sh_slot[e], visible);
            let g = u32(e >= ends.x) + u32(e >= ends.y) + u32(e >= ends.z);
            // A chunk has one group, and end says so: g is 0 there.
            let a = (g * HEADS + local_head) * LATENT4;
            var content = 0.0;
            var rotary = 0.0;
            let latent_row = params.latent + slot * params.latent_pitch;
            let rope_row = params.rope + slot * params.rope_pitch;
            if (CACHE_F16 == 1u) {
                for (var i = 0u; i < params.latent_pitch; i++) {
                    let words = cache[latent_row + i];
                    content += dot(sh_latent[a + 2u * i], halves(words.x, words.y));
                    content += dot(sh_latent[a + 2u * i + 1u], halves(words.z, words.w));
                }
                for (var i = 0u; i < params.rope_pitch; i++) {
                    let words = cache[rope_row + i];
                    rotary += dot(sh_rope[local_head * ROPE4 + 2u * i], halves(words.x, words.y));
                    rotary += dot(sh_rope[local_head * ROPE4 + 2u * i + 1u], halves(words.z, words.w));
                }
            } else {
                for (var i = 0u; i < params.latent_pitch; i++) {
                    content += dot(sh_latent[a + i], bitcast<vec4<f32>>(cache[latent_row + i]));
                }
                for (var i = 0u; i < params.rope_pitch; i++) {
                    rotary += dot(sh_rope[local_head * ROPE4 + i], bitcast<vec4<f32>>(cache[rope_row + i]));
                }
            }
            if (NORM != 2u) {
                content = sh_statistics[e].y * (content - sh_statistics[e].x * query_gamma);
            }
            let score = select(LOWEST, content + rotary, visible);
            sh_score[local_head * CHUNK_LENGTH + e] = score;
        }
        workgroupBarrier();

        // Every invocation goes over all scores of its head: the barriers of a reduction cost more.
        let before = best;
        for (var e = 0u; e < count; e++) {
            best = max(best, sh_score[local_head * CHUNK_LENGTH + e]);
        }
        let kept = exp(before - best);
        sum *= kept;
        shift *= kept;
        for (var e = 0u; e < count; e++) {
            let p = weight_of(local_head, e, best);
            sum += p;
            if (NORM == 0u) {
                shift += p * sh_statistics[e].y * sh_statistics[e].x;
            }
        }

        // Weighted latents of each group replace the absorbed queries, and g_V replaces the gated query.
        for (var i = own; i < 4u * D_VALUE; i += LANES) {
            let n = i / 4u;
            sh_gate[local_head * ROOM + n][i % 4u] = gate_or_zero(gate_rows[i % 4u], head_output + D_NOPE + n);
        }
        for (var i = own; 2u * i < LATENT4; i += LANES) {
            var e = 0u;
            for (var g = 0u; g < GROUPS; g++) {
                var total = Eight();
                for (; e < ends[g]; e++) {
                    let slot = sh_slot[e];
                    if (slot != NO_ROW) {
                        var w = weight_of(local_head, e, best);
                        if (NORM != 2u) {
                            w *= sh_statistics[e].y;
                        }
                        let c = latent8(slot, i);
                        total.low += w * c.low;
                        total.high += w * c.high;
                    }
                }
                let to = (g * HEADS + local_head) * LATENT4 + 2u * i;
                sh_latent[to] = total.low;
                sh_latent[to + 1u] = total.high;
            }
        }
        workgroupBarrier();

        // Absorb W_V: the value projection, then the gate of each group.
        for (var i = own; i < VALUE4; i += LANES) {
            var v0 = vec4<f32>(0.0);
            var v1 = vec4<f32>(0.0);
            var v2 = vec4<f32>(0.0);
            var v3 = vec4<f32>(0.0);
            let value_output = head_output + D_NOPE;
            let n0 = value_output + 4u * i;
            // Columns past the last value repeat it; they are not stored.
            let n1 = value_output + min(4u * i + 1u, D_VALUE - 1u);
            let n2 = value_output + min(4u * i + 2u, D_VALUE - 1u);
            let n3 = value_output + min(4u * i + 3u, D_VALUE - 1u);
            for (var k = 0u; 2u * k < LATENT4; k++) {
                let w0 = weight8(n0, k);
                let w1 = weight8(n1, k);
                let w2 = weight8(n2, k);
                let w3 = weight8(n3, k);
                let at = local_head * LATENT4 + 2u * k;
                v0 += products8(at, w0, w1, w2, w3);
                if (GROUPS > 1u) {
                    v1 += products8(at + HEADS * LATENT4, w0, w1, w2, w3);
                }
                if (GROUPS > 2u) {
                    v2 += products8(at + 2u * HEADS * LATENT4, w0, w1, w2, w3);
                    v3 += products8(at + 3u * HEADS * LATENT4, w0, w1, w2, w3);
                }
            }
            var value = sh_value[local_head * VALUE4 + i] * kept;
            let g = local_head * ROOM + 4u * i;
            value += vec4<f32>(
                dot(sh_gate[g], vec4<f32>(v0.x, v1.x, v2.x, v3.x)),
                dot(sh_gate[g + 1u], vec4<f32>(v0.y, v1.y, v2.y, v3.y)),
                dot(sh_gate[g + 2u], vec4<f32>(v0.z, v1.z, v2.z, v3.z)),
                dot(sh_gate[g + 3u], vec4<f32>(v0.w, v1.w, v2.w, v3.w)),
            );
            sh_value[local_head * VALUE4 + i] = value;
        }
        workgroupBarrier();
    }

    if (head_index >= params.n_head) {
        return;
    }
    let to = index * params.n_head + head;
    for (var v = own; v < D_VALUE; v += LANES) {
        let n = head_output + D_NOPE + v;
        var out = sh_value[local_head * VALUE4 + v / 4u][v % 4u];
        if (NORM != 2u) {
            out = (out - shift) * decode(affine[index_of(n)], n);
        }
        if (NORM == 0u) {
            let b = params.beta + n;
            out += sum * decode(affine[index_of(b)], b);
        }
        partial[to * D_VALUE + v] = out;
    }
    if (own == 0u) {
        partial[params.softmax + 2u * to] = best;
        partial[params.softmax + 2u * to + 1u] = sum;
    }
}

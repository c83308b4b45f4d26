// attention_grouped in registers and shuffles, for latents and rotary keys of up to 64 columns and heads of whole blocks of 8:
//
//   a[u,h] = scale · W_K[h]ᵀ (q_C[h] ⊙ γ_K ⊙ g_K[u,h])
//   s_j    = ρ_j (a[u(j),h] · c_j − μ_j · scale · Σ(q_C ⊙ γ_K)) + scale · q_R · k_R_j      (+ q_C · β_K, the same for every j)
//   m = max_j s_j    l = Σ_j e^(s_j−m)    w_j = e^(s_j−m) ρ_j    S[u,h] = Σ_{j in u} w_j c_j
//   values[h] = γ_V ⊙ ( Σ_u g_V[u,h] ⊙ (W_V[h] S[u,h]) − Σ_j w_j μ_j ) + l · β_V
//
// Groups, tiles, chunks, entries, passes and partial results are those of attention_grouped. A round has 8 places: the groups of
// a tile, or the chunks of an entry. Eight invocations share a head. Each owns 8 columns of everything that is as wide as a
// latent, so that they read a cache row or an output's weights side by side, once for the 8 places. Each also owns the gate of
// one place, which the others take by shuffles. Positions come one after another, with a running maximum. There are no barriers.
// Floor, in 16-byte loads per invocation: a tile of 8 groups of d_nope = d_value = 64 reads 128 loads of weights and 16 of gates,
// a position 2; each load of weights serves 64 multiply-adds.
//
// Results, on lavapipe (Mesa 25, 2 cores shared with other work), one layer of 12 heads, r 64, a table, 8192 cached tokens:
// - against attention_grouped: 24 to 30 ms for 76 to 96, and half the time to compile.
// - sums and queries in workgroup memory instead of rotating registers: 1.4 times the time, twice the time to compile.
// - sizes as overrides instead of parameters: loops are unrolled, and compile for seconds.
// - an absent block set to 0 where it is loaded, not where it is needed: 1.2 times the estimate of Mesa's AMD compiler, which
//   waits for each row.
//
// On an H200 at commit 10d32d5: 156 µs of that layer without wgpu's shader checks, 263 with them. Not measured since.
// Padding: cache rows end with finite values (0, as cache_append writes them), outputs of kv_b_proj with 0, so that the products
// vanish.
// grid: (⌈n_head / HEADS⌉ · query tokens of a sequence, entries folded into y and z)
// Static (RDNA3, Mesa 25), at most: 168 registers, no workgroup memory, nothing spilled.

override CACHE_F16: u32 = 0u;
override STORAGE_F16: u32 = 0u;  // kv_b_proj, affine
override GATES_F16: u32 = 0u;    // gates
override MORE_F16: u32 = 0u;     // gates_more
override SOURCES: u32 = 0u;      // of gate rows: 0 gates and gates_more, 1 gates only, 2 gates_more only
override ACTIVATION: u32 = 0u;   // 0 identity, 1 sigmoid, 2 tanh, 3 silu, 4 one_plus
override NORM: u32 = 0u;         // 0 layer_norm, 1 rms_norm, 2 none
override HEADS: u32 = 2u;        // heads per workgroup
override SPAN: u32 = 2u;          // tiles per entry; chunks per entry, at most 8
override AHEAD: u32 = 2u;        // positions whose rows are loaded at once, at most 4
override WORKGROUP: u32 = HEADS * 8u;

const LOWEST: f32 = -3.4028234e38;
const GROUPS: u32 = 8u;          // places of a round, and invocations of a head
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
const CHUNK_LENGTH: u32 = 256u;

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
@group(0) @binding(1) var<storage, read> q: array<f32>;                  // [tokens, n_head, d_nope + d_rope], rotated
@group(0) @binding(2) var<storage, read> kv_b_proj: array<vec4<u32>>;    // [n_head, d_nope + d_value, weight_pitch]
@group(0) @binding(3) var<storage, read> affine: array<u32>;             // γ [n_head, d_nope + d_value], then β
@group(0) @binding(4) var<storage, read> gates: array<vec4<u32>>;        // [resident, gate_pitch], before the activation
@group(0) @binding(5) var<storage, read> gates_more: array<vec4<u32>>;   // [more gate rows, more_pitch]
@group(0) @binding(6) var<storage, read> cache: array<vec4<u32>>;        // latents, rotary keys, (μ, ρ)
@group(0) @binding(7) var<storage, read> lists: array<u32>;              // group lists and sequence table: see attention/groups.rs
@group(0) @binding(8) var<storage, read_write> partial: array<f32>;      // [partials, n_head, d_value], then [partials, n_head, 2]

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

// Columns 8i … 8i + 7 of a cached rotary key; 0 past its end.
fn rope8(slot: u32, i: u32) -> Eight {
    let first = params.rope + slot * params.rope_pitch;
    if (CACHE_F16 == 1u) {
        let words = cache[first + i];
        return Eight(halves(words.x, words.y), halves(words.z, words.w));
    }
    var high = vec4<f32>(0.0);
    if (2u * i + 1u < params.rope_pitch) {
        high = bitcast<vec4<f32>>(cache[first + 2u * i + 1u]);
    }
    return Eight(bitcast<vec4<f32>>(cache[first + 2u * i]), high);
}

fn activate4(x: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(activate(x.x), activate(x.y), activate(x.z), activate(x.w));
}

// Elements 8i … 8i + 7 of a gate row, activated; 0 for an empty place.
fn gate8(gate_row: u32, i: u32) -> Eight {
    var gate = Eight();
    if (gate_row == NO_ROW) {
        return gate;
    }
    if (SOURCES == 1u || (SOURCES == 0u && gate_row < params.resident)) {
        let first = gate_row * params.gate_pitch / select(4u, 8u, GATES_F16 == 1u);
        if (GATES_F16 == 1u) {
            let words = gates[first + i];
            gate = Eight(halves(words.x, words.y), halves(words.z, words.w));
        } else {
            let at = first + 2u * i;
            gate = Eight(bitcast<vec4<f32>>(gates[at]), bitcast<vec4<f32>>(gates[at + 1u]));
        }
    } else {
        let first = (gate_row - params.resident) * params.more_pitch / select(4u, 8u, MORE_F16 == 1u);
        if (MORE_F16 == 1u) {
            let words = gates_more[first + i];
            gate = Eight(halves(words.x, words.y), halves(words.z, words.w));
        } else {
            let at = first + 2u * i;
            gate = Eight(bitcast<vec4<f32>>(gates_more[at]), bitcast<vec4<f32>>(gates_more[at + 1u]));
        }
    }
    return Eight(activate4(gate.low), activate4(gate.high));
}

// The elements of `x` moved down by one: the second becomes the first.
fn next(x: Eight) -> Eight {
    return Eight(vec4<f32>(x.low.yzw, x.high.x), vec4<f32>(x.high.yzw, 0.0));
}

fn dot8(a: Eight, b: Eight) -> f32 {
    return dot(a.low, b.low) + dot(a.high, b.high);
}

// Sum over the eight invocations of a head; all get the same bits.
fn sum8(value: f32) -> f32 {
    var sum = value + subgroupShuffleXor(value, 1u);
    sum += subgroupShuffleXor(sum, 2u);
    return sum + subgroupShuffleXor(sum, 4u);
}

// `value` in the component of block `block`, of blocks first … first + 3.
fn placed(value: f32, block: u32, first: u32) -> vec4<f32> {
    let here = vec4<u32>(first) + vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(block);
    return select(vec4<f32>(0.0), vec4<f32>(value), here);
}

// The sums so far plus the product of one factor with eight columns.
fn plus(sums: Eight, x: f32, w: Eight) -> Eight {
    return Eight(sums.low + x * w.low, sums.high + x * w.high);
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

// The running softmax, and the weighted latents of a place.
struct Running {
    best: f32,       // m so far
    sum: f32,        // l so far
    shift: f32,      // Σ w_j μ_j so far
    latents: Eight,
}

// What an invocation owns of every row.
struct Part {
    column: u32,          // block of the latent
    absent: bool,         // past its end
    rotary_column: u32,   // block of the rotary key
    rotary: Eight,        // of the query, for that block
}

// A position as an invocation sees it: its columns of the latent, its part of the rotary score.
struct Position {
    latent: Eight,
    rotary: f32,
    mu: f32,
    rho: f32,
    visible: bool,
}

// The position that invocation `holder` of the subgroup holds; an unseen one is read from `instead`.
fn position_at(row: u32, pair: vec2<f32>, holder: u32, instead: u32, part: Part) -> Position {
    let found = subgroupShuffle(row, holder);
    let at = select(instead, found, found != NO_ROW);
    let latent = latent8(at, part.column);
    var score = 0.0;
    if (params.d_rope > 0u) {
        score = dot8(part.rotary, rope8(at, part.rotary_column));
    }
    return Position(latent, score, subgroupShuffle(pair.x, holder), subgroupShuffle(pair.y, holder), found != NO_ROW);
}

// Takes one position in, for the absorbed query a; an absent block of a latent counts as 0.
fn with_position(before: Running, position: Position, a: Eight, absent: bool, query_gamma: f32) -> Running {
    // Not before: nothing waits for a row until it is needed.
    var c = position.latent;
    if (absent) {
        c = Eight();
    }
    var score = sum8(position.rho * dot8(a, c) + position.rotary);
    if (NORM == 0u) {
        score -= position.rho * position.mu * query_gamma;
    }
    score = select(LOWEST, score, position.visible);
    // One of the two factors is 1: one exponential is enough.
    let other = exp(-abs(score - before.best));
    let higher = score > before.best;
    let shrink = select(1.0, other, higher);
    let p = select(0.0, select(other, 1.0, higher), position.visible);
    let w = p * position.rho;
    var after = before;
    after.best = select(before.best, score, higher);
    after.sum = before.sum * shrink + p;
    if (NORM == 0u) {
        after.shift = before.shift * shrink + w * position.mu;
    }
    after.latents.low = before.latents.low * shrink + w * c.low;
    after.latents.high = before.latents.high * shrink + w * c.high;
    return after;
}

// What a place holds: a group's first positions, or a chunk of its further ones.
struct Place {
    group: u32,
    count: u32,      // positions; 0: nothing of this pass
    word: u32,       // of a group's header, or of a chunk
}

// Place of group `index` of the tiles, or of chunk `index`; empty from `end` on.
fn place_of(line: u32, of_chunks: bool, index: u32, end: u32) -> Place {
    var place = Place(0u, 0u, 0u);
    if (index >= end) {
        return place;
    }
    let base = lists[line + SEQUENCE_BASE];
    if (of_chunks) {
        let chunk = base + lists[line + SEQUENCE_CHUNK_WORD] + index * CHUNK_WORDS;
        place.word = chunk;
        place.group = lists[chunk + CHUNK_GROUP];
        let count = lists[base + place.group * HEADER_WORDS + HEADER_COUNT];
        place.count = min(count - lists[chunk + CHUNK_FIRST], CHUNK_LENGTH);
    } else {
        place.group = index;
        place.word = base + index * HEADER_WORDS;
        place.count = min(lists[place.word + HEADER_COUNT], TILE_LENGTH);
    }
    let number = lists[line + SEQUENCE_FIRST_GROUP] + place.group;
    if (number < params.first_group || number - params.first_group >= params.groups) {
        place.count = 0u;
    }
    return place;
}

// Position i of a place.
fn position_in(base: u32, of_chunks: bool, place: Place, i: u32) -> u32 {
    if (of_chunks) {
        return lists[place.word + CHUNK_POSITIONS + i];
    }
    return position_of(base, place.group, i);
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_invocation_id) member: u32,
) {
    let entry = workgroup.z * workgroups.y + workgroup.y;
    let blocks = (params.n_head + HEADS - 1u) / HEADS;
    let query = workgroup.x / blocks;
    if (entry >= params.entries) {
        return;
    }
    let line = line_of(SEQUENCE_FIRST_ENTRY, entry);
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
    let chunk_entries = lists[line + SEQUENCE_CHUNK_ENTRIES];
    let own_entry = entry - lists[line + SEQUENCE_FIRST_ENTRY];
    // Tiles belong to one pass, which writes their partial result. The chunks of an entry may belong to several passes, each of
    // which writes a partial result of its own.
    let of_chunks = own_entry >= tile_entries;
    var index = lists[line + SEQUENCE_PARTIAL] + query * (tile_entries + params.passes * chunk_entries) + own_entry;
    var begin = own_entry * SPAN * GROUPS;
    var end = min(begin + SPAN * GROUPS, groups);
    if (of_chunks) {
        index += params.pass_index * chunk_entries;
        begin = (own_entry - tile_entries) * SPAN;
        end = min(begin + SPAN, chunks);
    } else {
        let number = first_group + begin;
        if (number < params.first_group || number - params.first_group >= params.groups) {
            return;
        }
    }

    // This is invocation `own` of a head, whose invocations are `first` to first + 7 of their subgroup: subgroups take the
    // invocations of a workgroup in order. Heads are not counted by subgroups, since a driver may half fill them.
    let own = member % GROUPS;
    let first = member - own;
    let head_index = (workgroup.x % blocks) * HEADS + lane / GROUPS;
    // Heads past the last repeat it; they are not stored.
    let head = min(head_index, params.n_head - 1u);
    let head_output = head * (params.d_nope + params.d_value);
    let value_output = head_output + params.d_nope;
    let query_at = (token * params.n_head + head) * (params.d_nope + params.d_rope);
    // Columns past the last block repeat its weights.
    let column = min(own, (params.d_latent - 1u) / 8u);
    // scale · q_R, own columns, and their block of the rotary keys.
    let rotary_column = min(own, (max(params.d_rope, 1u) - 1u) / 8u);
    var rotary = Eight();
    for (var k = 0u; k < 8u && 8u * own + k < params.d_rope; k++) {
        let x = params.scale * q[query_at + params.d_nope + 8u * own + k];
        let here = vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(k % 4u);
        if (k < 4u) {
            rotary.low = select(rotary.low, vec4<f32>(x), here);
        } else {
            rotary.high = select(rotary.high, vec4<f32>(x), here);
        }
    }

    let part = Part(column, 8u * own >= params.d_latent, rotary_column, rotary);
    var all = Running(LOWEST, 0.0, 0.0, Eight());
    // Values so far: column 8b + own is component b % 4 of valueB, B = b / 4.
    var value0 = vec4<f32>(0.0);
    var value1 = vec4<f32>(0.0);
    var value2 = vec4<f32>(0.0);
    var value3 = vec4<f32>(0.0);
    for (var round_first = begin; round_first < end; round_first += GROUPS) {
        let own_place = place_of(line, of_chunks, round_first + own, end);
        var gate_row = NO_ROW;
        if (own_place.count > 0u) {
            gate_row = gate_row_of(base, own_place.group, first_group + own_place.group);
        }

        // Absorb W_K: each weight is multiplied with the eight places.
        var a0 = Eight();
        var a1 = Eight();
        var a2 = Eight();
        var a3 = Eight();
        var a4 = Eight();
        var a5 = Eight();
        var a6 = Eight();
        var a7 = Eight();
        var query_gamma = 0.0;   // scale · Σ(q_C ⊙ γ_K)
        for (var d0 = 0u; d0 < params.d_nope; d0 += 8u) {
            // scale · q_C ⊙ γ_K, one element per invocation.
            var query_own = params.scale * q[query_at + d0 + own];
            if (NORM != 2u) {
                let i = head_output + d0 + own;
                query_own *= decode(affine[index_of(i)], i);
            }
            query_gamma += query_own;
            var gate = gate8(gate_row, (head_output + d0) / 8u);
            for (var k = 0u; k < min(params.d_nope - d0, 8u); k++) {
                let w = weight8(head_output + d0 + k, column);
                let x = gate.low.x * subgroupShuffle(query_own, first + k);
                a0 = plus(a0, subgroupShuffle(x, first), w);
                a1 = plus(a1, subgroupShuffle(x, first + 1u), w);
                a2 = plus(a2, subgroupShuffle(x, first + 2u), w);
                a3 = plus(a3, subgroupShuffle(x, first + 3u), w);
                a4 = plus(a4, subgroupShuffle(x, first + 4u), w);
                a5 = plus(a5, subgroupShuffle(x, first + 5u), w);
                a6 = plus(a6, subgroupShuffle(x, first + 6u), w);
                a7 = plus(a7, subgroupShuffle(x, first + 7u), w);
                gate = next(gate);
            }
        }
        query_gamma = sum8(query_gamma);

        // Scores and weighted latents, place by place. Each takes the first absorbed query and puts its sums behind the last, so
        // that after eight the sums have replaced the queries.
        let best_before = all.best;   // m of the values so far
        var best_then = LOWEST;        // m when the sums of the own place were made
        for (var g = 0u; g < GROUPS; g++) {
            let place = place_of(line, of_chunks, round_first + g, end);
            let a = a0;
            all.latents = Eight();
            for (var e0 = 0u; e0 < place.count; e0 += 8u) {
                // One position per invocation. An unseen one reads the sequence's first row; its weight is 0.
                let count = min(place.count - e0, 8u);
                var row = NO_ROW;
                if (own < count) {
                    let position = position_in(base, of_chunks, place, e0 + own);
                    row = select(NO_ROW, first_slot + position, position <= last);
                }
                var pair = vec2<f32>(0.0, 1.0);
                if (NORM != 2u) {
                    pair = statistics_of(select(row, first_slot, row == NO_ROW));
                }
                for (var i = 0u; i < count; i += AHEAD) {
                    // All rows are asked for before the first is needed. Past the last position none is seen.
                    let holder = first + i;
                    let p0 = position_at(row, pair, holder, first_slot, part);
                    var p1 = Position();
                    var p2 = Position();
                    var p3 = Position();
                    if (AHEAD > 1u) {
                        p1 = position_at(row, pair, holder + 1u, first_slot, part);
                    }
                    if (AHEAD > 2u) {
                        p2 = position_at(row, pair, holder + 2u, first_slot, part);
                        p3 = position_at(row, pair, holder + 3u, first_slot, part);
                    }
                    all = with_position(all, p0, a, part.absent, query_gamma);
                    if (AHEAD > 1u) {
                        all = with_position(all, p1, a, part.absent, query_gamma);
                    }
                    if (AHEAD > 2u) {
                        all = with_position(all, p2, a, part.absent, query_gamma);
                        all = with_position(all, p3, a, part.absent, query_gamma);
                    }
                }
            }
            a0 = a1;
            a1 = a2;
            a2 = a3;
            a3 = a4;
            a4 = a5;
            a5 = a6;
            a6 = a7;
            a7 = all.latents;
            best_then = select(best_then, all.best, own == g);
        }

        // Absorb W_V: the value projection, then the gate of each place. Each weight is multiplied with the eight places.
        let shrink = exp(best_before - all.best);
        value0 *= shrink;
        value1 *= shrink;
        value2 *= shrink;
        value3 *= shrink;
        let since = exp(best_then - all.best);
        for (var n0 = 0u; n0 < params.d_value; n0 += 8u) {
            var gate = gate8(gate_row, (value_output + n0) / 8u);
            gate.low *= since;
            gate.high *= since;
            var total = 0.0;
            for (var k = 0u; k < min(params.d_value - n0, 8u); k++) {
                let w = weight8(value_output + n0 + k, column);
                let g = gate.low.x;
                var part = subgroupShuffle(g, first) * dot8(w, a0);
                part += subgroupShuffle(g, first + 1u) * dot8(w, a1);
                part += subgroupShuffle(g, first + 2u) * dot8(w, a2);
                part += subgroupShuffle(g, first + 3u) * dot8(w, a3);
                part += subgroupShuffle(g, first + 4u) * dot8(w, a4);
                part += subgroupShuffle(g, first + 5u) * dot8(w, a5);
                part += subgroupShuffle(g, first + 6u) * dot8(w, a6);
                part += subgroupShuffle(g, first + 7u) * dot8(w, a7);
                total = select(total, sum8(part), own == k);
                gate = next(gate);
            }
            value0 += placed(total, n0 / 8u, 0u);
            value1 += placed(total, n0 / 8u, 4u);
            value2 += placed(total, n0 / 8u, 8u);
            value3 += placed(total, n0 / 8u, 12u);
        }
    }

    if (head_index >= params.n_head) {
        return;
    }
    let to = index * params.n_head + head;
    for (var n0 = 0u; n0 < params.d_value; n0 += 8u) {
        let low = select(value0, value1, n0 >= 32u);
        let high = select(value2, value3, n0 >= 96u);
        let n = value_output + n0 + own;
        var out = select(low, high, n0 >= 64u)[n0 / 8u % 4u];
        if (NORM != 2u) {
            out = (out - all.shift) * decode(affine[index_of(n)], n);
        }
        if (NORM == 0u) {
            let b = params.beta + n;
            out += all.sum * decode(affine[index_of(b)], b);
        }
        partial[to * params.d_value + n0 + own] = out;
    }
    if (own == 0u) {
        partial[params.softmax + 2u * to] = all.best;
        partial[params.softmax + 2u * to + 1u] = all.sum;
    }
}

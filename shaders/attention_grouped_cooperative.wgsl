// attention_grouped by cooperative matrices of 16 × 16, for weights and caches of halves: f16 factors, sums and softmax in f32.
// Meaning, groups, tiles, chunks, entries, passes and partial results are those of attention_grouped:
//
//   x[u,h] = scale · q_C[h] ⊙ γ_K ⊙ g_K[u,h]                       a[u,h] = f16(x)·W_K[h], rounded to f16
//   s_j    = ρ_j (a[u(j),h] · c_j − μ_j · scale · Σ(q_C ⊙ γ_K)) + scale · f16(q_R) · k_R_j
//   w_j    = f16(e^(s_j + ln ρ_j − M[u,h]))    S[u,h] = Σ_{j in u} w_j c_j, rounded to f16
//   values[h] = γ_V ⊙ ( Σ_u e^(M[u,h] − m) g_V[u,h] ⊙ (W_V[h] S[u,h]) − Σ_j w_j μ_j ) + l · β_V
//
// Each row that is rounded (x, a, q_R, S) is in units of the power of two below its largest element, so that it has the digits of
// a half, whatever its size. M is the largest s + ln ρ of the group so far, or lies below it, by RESERVE at most: scaling sums
// takes a detour through workgroup memory, and the reserve makes that seldom.
// A workgroup takes a tile and up to 16 heads. It has 8 places, one per subgroup: a group of the tile, or an eighth of a chunk,
// all of whose places have the same group. Further subgroups repeat one, and store the same.
// - x W_K: places are the rows. SHARE subgroups share a head, whose weights are staged while those before are multiplied.
// - s and S: heads are the rows, positions of the place the columns, 16 a turn; a subgroup takes its place. A row of the cache is
//   read once for all heads.
// - S W_Vᵀ: places are the rows again, a subgroup takes 16 values of a head; then gates and the sum over places.
// Rows of matrices behind the last place or head are not used, whatever they hold.
// grid: (⌈n_head / 16⌉ · query tokens of a sequence, entries folded into y and z)
//
// Floor, per tile of 8 groups of 12 heads, d_nope = d_rope = d_value = d_latent = 64: 24 KiB of gates and 256 bytes a position from
// memory, 192 KiB of weights from the L2, which all tiles share; 480 products of matrices, half of whose rows are empty where
// places are the rows. With 5 positions a group that is 7 ns of an H200's memory, some 40 of its L2 and 9 of its matrices. What
// remains is the time of one workgroup: 75 barriers with one turn of positions, 9 more with each other, so that several workgroups
// have to run beside each other on a multiprocessor. They take 48 KiB each.
// Weights loaded from storage as matrices took 16 times the loads: rows of W_K are 16-bit elements of a column there.
//
// AMD's compiler (RDNA3, Mesa 25): 192 registers, 48 KiB of workgroup memory, no spills; inverse throughput 13 700 to 16 000 by its
// estimate for each of 8 subgroups and 16 heads, where attention_grouped_subgroup has 12 700 to 12 900 for one subgroup and 4 heads.
// The estimate guesses how often loops turn, and there are more of them, one in another, in the latter.
//
// Not run on a GPU yet.
// Padding: outputs of kv_b_proj end with 0; cache rows with anything.
// Static (RDNA3, Mesa 25), at most: 192 registers, 49 152 bytes of workgroup memory, nothing spilled.

enable f16;
enable wgpu_cooperative_matrix;

override STORAGE_F16: u32 = 1u;  // kv_b_proj, affine: halves
override GATES_F16: u32 = 0u;    // gates
override MORE_F16: u32 = 0u;     // gates_more
override SOURCES: u32 = 0u;      // of gate rows: 0 gates and gates_more, 1 gates only, 2 gates_more only
override ACTIVATION: u32 = 0u;   // 0 identity, 1 sigmoid, 2 tanh, 3 silu, 4 one_plus
override NORM: u32 = 0u;         // 0 layer_norm, 1 rms_norm, 2 none
override WORKGROUP: u32 = 256u;  // 8 whole subgroups or more, 8 columns of a matrix row per place and head
override LANES: u32 = 4u;        // that share a gated query; at most a subgroup and WORKGROUP / 64
override NOPE: u32 = 0u;         // d_nope: blocks of 8, at most four per lane
override COLUMNS: u32 = 1u;      // matrices of a latent: 1 to 4
override SHARE: u32 = 1u;        // subgroups of a head's absorbed queries: a power of two, COLUMNS or more
override ROTARY: u32 = 1u;       // of a rotary key: 0 to 4
override WIDTH: u32 = 16u;       // of staged rows: latents or rotary keys, whole matrices
override SIDE: u32 = 16u;
override RESERVE: f32 = 4.0;
override MATRIX: u32 = SIDE * SIDE;
override LOADS: u32 = COLUMNS * SIDE / 8u;        // 16-byte loads of a latent, and of an output's weights
override PARTS: u32 = SHARE * SIDE / 8u;          // invocations of an absorbed query
override SHARED: u32 = SIDE / 8u;                 // invocations of a matrix row
// In fours; pitches 16 bytes beyond a multiple of 128 meet different banks.
override STRIDE: u32 = WIDTH + 8u;                // elements of a staged row
override PITCH: u32 = STRIDE / 4u;
override STEP: u32 = SIDE / 4u;                   // places of a matrix row in staged rows
override KEPT_STRIDE: u32 = max(COLUMNS * SIDE, NOPE) + 8u;  // elements of a kept row
override KEPT_PITCH: u32 = KEPT_STRIDE / 4u;

const LOWEST: f32 = -3.4028234e38;
const GROUPS: u32 = 8u;          // places
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

// Matrices of factors, and of sums.
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

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
@group(0) @binding(2) var<storage, read> kv_b_proj: array<vec4<f16>>;    // [n_head, d_nope + d_value, 2 · weight_pitch]
@group(0) @binding(3) var<storage, read> affine: array<u32>;             // γ [n_head, d_nope + d_value], then β
@group(0) @binding(4) var<storage, read> gates: array<vec4<u32>>;        // [resident, gate_pitch], before the activation
@group(0) @binding(5) var<storage, read> gates_more: array<vec4<u32>>;   // [more gate rows, more_pitch]
@group(0) @binding(6) var<storage, read> cache: array<vec4<u32>>;        // latents, rotary keys, (μ, ρ)
@group(0) @binding(7) var<storage, read> lists: array<u32>;              // group lists and sequence table: see attention/groups.rs
@group(0) @binding(8) var<storage, read_write> partial: array<f32>;      // [partials, n_head, d_value], then [partials, n_head, 2]

// [subgroup, matrix row, column]: weights of keys, rotary queries, rotary keys and latents in turn, weights of values.
var<workgroup> sh_tile: array<vec4<f16>, GROUPS * SIDE * PITCH>;
// [head, place, column]: gated queries, absorbed queries, then weights of positions, then sums of latents. Matrices of places end
// behind the last head.
var<workgroup> sh_kept: array<vec4<f16>, (SIDE + SHARED - 1u) * GROUPS * KEPT_PITCH>;
var<workgroup> sh_scores: array<f32, GROUPS * MATRIX>;   // one matrix per subgroup on its way from or to storage
// [place, position]: (μ, ρ, ln ρ) as bits, cache row or NO_ROW; at the end [place, head]: m as bits, l, Σ w μ.
var<workgroup> sh_positions: array<vec4<u32>, GROUPS * SIDE>;
// [place, head]: units of absorbed queries, then factors on sums, then those on values.
var<workgroup> sh_factor: array<f32, GROUPS * SIDE>;
var<workgroup> sh_queries: array<vec2<f32>, SIDE>;       // [head]: scale · unit of q_R, scale · Σ(q_C ⊙ γ_K)
var<workgroup> sh_places: array<vec4<u32>, GROUPS>;      // gate row, group, word of the header or chunk, positions
// (line of the sequence table, entry of its sequence, whether there is nothing to do, later most positions of a place, partial
// result), and the last turn, counted from 1, that gave some sum a factor other than 1. 16 bytes each: matrices need the arrays
// around them to begin on multiples of 16.
var<workgroup> sh_line: vec4<u32>;
var<workgroup> sh_scaled: vec4<u32>;

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

// Stages four halves of element `at` and on.
fn stage_together(at: u32, four: vec4<f16>) {
    sh_tile[at / 4u] = four;
}

// Keeps four halves of element `at` and on.
fn keep_together(at: u32, four: vec4<f16>) {
    sh_kept[at / 4u] = four;
}

// Elements 8b … 8b + 7 of scale · q_C ⊙ γ_K of a head; `query` and `output` are its first elements in q and kv_b_proj.
fn query8(query: u32, output: u32, b: u32) -> Eight {
    let i = query + 8u * b;
    var low = params.scale * vec4<f32>(q[i], q[i + 1u], q[i + 2u], q[i + 3u]);
    var high = params.scale * vec4<f32>(q[i + 4u], q[i + 5u], q[i + 6u], q[i + 7u]);
    if (NORM != 2u) {
        let k = index_of(output + 8u * b);
        low *= halves(affine[k], affine[k + 1u]);
        high *= halves(affine[k + 2u], affine[k + 3u]);
    }
    return Eight(low, high);
}

// Element i of γ or β.
fn affine_at(i: u32) -> f32 {
    return decode(affine[index_of(i)], i);
}

// Four elements of a head's rotary query from column i on, which begins at `query`; 0 past its end.
fn rotary4(query: u32, i: u32) -> vec4<f32> {
    var four = vec4<f32>(0.0);
    if (i < params.d_rope) {
        four.x = q[query + i];
    }
    if (i + 1u < params.d_rope) {
        four.y = q[query + i + 1u];
    }
    if (i + 2u < params.d_rope) {
        four.z = q[query + i + 2u];
    }
    if (i + 3u < params.d_rope) {
        four.w = q[query + i + 3u];
    }
    return four;
}

// The bits of the largest exponent of eight numbers.
fn exponent8(x: Eight) -> u32 {
    let bits = max(bitcast<vec4<u32>>(abs(x.low)), bitcast<vec4<u32>>(abs(x.high))) & vec4<u32>(0x7f800000u);
    return max(max(bits.x, bits.y), max(bits.z, bits.w));
}

// Exponents from 1 to 253: the reciprocal is a normal number, too.
fn unit_of(exponent: u32) -> u32 {
    return clamp(exponent, 0x00800000u, 0x7e800000u);
}

fn reciprocal_of(unit: u32) -> f32 {
    return bitcast<f32>(0x7f000000u - unit);
}

// Eight numbers of a matrix on its way from or to storage.
fn read8(at: u32) -> Eight {
    return Eight(
        vec4<f32>(sh_scores[at], sh_scores[at + 1u], sh_scores[at + 2u], sh_scores[at + 3u]),
        vec4<f32>(sh_scores[at + 4u], sh_scores[at + 5u], sh_scores[at + 6u], sh_scores[at + 7u]),
    );
}

// Of each subgroup's matrix the eight numbers from `at` on.
fn exchanged(sums: Sums, own: u32, at: u32) -> Eight {
    coopStoreT(sums, &sh_scores[MATRIX * own], SIDE);
    workgroupBarrier();
    let result = read8(at);
    workgroupBarrier();
    return result;
}

// Multiplies each subgroup's matrix by the factors of its heads.
fn scaled_places(sums: Sums, local: u32, own: u32) -> Sums {
    coopStoreT(sums, &sh_scores[MATRIX * own], SIDE);
    workgroupBarrier();
    for (var e = local; e < GROUPS * MATRIX; e += WORKGROUP) {
        sh_scores[e] *= sh_factor[e / SIDE];
    }
    workgroupBarrier();
    let result = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    workgroupBarrier();
    return result;
}

// Keeps eight numbers as halves, in units.
fn keep8_together(at: u32, x: Eight, reciprocal: f32) {
    keep_together(at, vec4<f16>(reciprocal * x.low));
    keep_together(at + 4u, vec4<f16>(reciprocal * x.high));
}

fn times(a: Eight, b: Eight) -> Eight {
    return Eight(a.low * b.low, a.high * b.high);
}

// The largest of the bits that the invocations of a matrix row have.
fn most_of_row(bits: u32) -> u32 {
    if (SHARED > 1u) {
        return max(bits, subgroupShuffleXor(bits, 1u));
    }
    return bits;
}

// 16 bytes of a row.
struct Halves {
    low: vec4<f16>,
    high: vec4<f16>,
}

// Load e of staged weights, of an output of kv_b_proj; 0 past its end.
fn load_weights(e: u32, output: u32) -> Halves {
    if (e < GROUPS * SIDE * LOADS && e % LOADS < params.weight_pitch) {
        let at = (output * params.weight_pitch + e % LOADS) * 2u;
        return Halves(kv_b_proj[at], kv_b_proj[at + 1u]);
    }
    return Halves(vec4<f16>(), vec4<f16>());
}

// Its output among the contents of keys: SHARE · SIDE from k0 on of each head from h0 on; `head` is the workgroup's first.
fn key_of(e: u32, h0: u32, k0: u32, head: u32, heads: u32) -> u32 {
    let row = e / LOADS;
    let of_head = head + min(h0 + row / (SHARE * SIDE), heads - 1u);
    return of_head * (params.d_nope + params.d_value) + min(k0 + row % (SHARE * SIDE), max(NOPE, 1u) - 1u);
}

// Its output among values: SIDE of each matrix from `first` on; matrices are counted head by head, block by block.
fn value_of(e: u32, first: u32, head: u32, heads: u32) -> u32 {
    let matrix = min(first + e / LOADS / SIDE, heads * (params.d_value / SIDE) - 1u);
    let n = matrix / heads * SIDE + e / LOADS % SIDE;
    return (head + matrix % heads) * (params.d_nope + params.d_value) + params.d_nope + n;
}

// Stages load e of weights.
fn stage_weights_together(e: u32, loaded: Halves) {
    if (e < GROUPS * SIDE * LOADS) {
        let at = e / LOADS * STRIDE + e % LOADS * 8u;
        stage_together(at, loaded.low);
        stage_together(at + 4u, loaded.high);
    }
}

// Load e of the rows of all places, each of `loads` loads, `first` and `pitch` say where they are in the cache; elements past
// `width` are 0, and those of no row.
fn fetched(e: u32, loads: u32, first: u32, pitch: u32, width: u32) -> vec4<u32> {
    var words = vec4<u32>(0u);
    if (e < GROUPS * SIDE * loads) {
        let row = sh_positions[e / loads].w;
        let column = e % loads * 8u;
        if (row != NO_ROW && column < width) {
            words = cache[first + row * pitch + column / 8u];
            if (column + 8u > width) {
                let even = vec4<u32>(column) + vec4<u32>(0u, 2u, 4u, 6u);
                let low = select(vec4<u32>(0u), vec4<u32>(0xffffu), even < vec4<u32>(width));
                let high = select(vec4<u32>(0u), vec4<u32>(0xffff0000u), even + vec4<u32>(1u) < vec4<u32>(width));
                words &= low | high;
            }
        }
    }
    return words;
}

// Stages load e.
fn stage_load_together(e: u32, loads: u32, words: vec4<u32>) {
    if (e < GROUPS * SIDE * loads) {
        let at = e / loads * STRIDE + e % loads * 8u;
        stage_together(at, vec4<f16>(halves(words.x, words.y)));
        stage_together(at + 4u, vec4<f16>(halves(words.z, words.w)));
    }
}

// Four positions of a place and head.
struct Scored {
    score: vec4<f32>,
    log_rho: vec4<f32>,
    rho: vec4<f32>,
    mu: vec4<f32>,
    visible: vec4<bool>,
}

// Scores of the four positions from `at` on, out of their products with the absorbed query, in its units, and with the rotary one.
fn scored4(at: u32, content: vec4<f32>, rotary: vec4<f32>, unit: f32, query: vec2<f32>) -> Scored {
    let p0 = sh_positions[at];
    let p1 = sh_positions[at + 1u];
    let p2 = sh_positions[at + 2u];
    let p3 = sh_positions[at + 3u];
    let mu = bitcast<vec4<f32>>(vec4<u32>(p0.x, p1.x, p2.x, p3.x));
    let rho = bitcast<vec4<f32>>(vec4<u32>(p0.y, p1.y, p2.y, p3.y));
    let log_rho = bitcast<vec4<f32>>(vec4<u32>(p0.z, p1.z, p2.z, p3.z));
    var score = rho * (unit * content) + query.x * rotary;
    if (NORM == 0u) {
        score -= rho * mu * query.y;
    }
    return Scored(score, log_rho, rho, mu, vec4<u32>(p0.w, p1.w, p2.w, p3.w) != vec4<u32>(NO_ROW));
}

fn largest4(x: vec4<f32>) -> f32 {
    return max(max(x.x, x.y), max(x.z, x.w));
}

fn total4(x: vec4<f32>) -> f32 {
    return x.x + x.y + (x.z + x.w);
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
    let entry = workgroup.z * workgroups.y + workgroup.y;
    let blocks = (params.n_head + SIDE - 1u) / SIDE;
    let query = workgroup.x / blocks;
    if (entry >= params.entries) {
        return;
    }
    // Read by one and broadcast: naga must see that control flow is uniform, since matrices belong to whole subgroups.
    if (local == 0u) {
        let line = line_of(SEQUENCE_FIRST_ENTRY, entry);
        let own_entry = entry - lists[line + SEQUENCE_FIRST_ENTRY];
        let tile_entries = lists[line + SEQUENCE_TILE_ENTRIES];
        let chunk_entries = lists[line + SEQUENCE_CHUNK_ENTRIES];
        let of_chunk = own_entry >= tile_entries;
        let of_token = tile_entries + params.passes * chunk_entries;
        // Tiles belong to one pass, which writes their partial result. A chunk belongs to one pass, too, but every pass writes a
        // partial result of it.
        let before = select(0u, params.pass_index * chunk_entries, of_chunk);
        let index = lists[line + SEQUENCE_PARTIAL] + query * of_token + own_entry + before;
        let number = lists[line + SEQUENCE_FIRST_GROUP] + own_entry * GROUPS;
        let of_pass = of_chunk || (number >= params.first_group && number - params.first_group < params.groups);
        let idle = query >= lists[line + SEQUENCE_TOKENS] || !of_pass;
        sh_line = vec4<u32>(line, own_entry, u32(idle), index);
        sh_scaled = vec4<u32>(0u);
    }
    let begin = workgroupUniformLoad(&sh_line);
    if (begin.z == 1u) {
        return;
    }
    let line = begin.x;
    let base = lists[line + SEQUENCE_BASE];
    let first_group = lists[line + SEQUENCE_FIRST_GROUP];
    let first_slot = lists[line + SEQUENCE_FIRST_SLOT];
    // A query token sees itself and the tokens before it.
    let last = lists[line + SEQUENCE_POSITION] + query;
    let token = lists[line + SEQUENCE_TOKEN] + query;
    let tile_entries = lists[line + SEQUENCE_TILE_ENTRIES];
    let of_chunk = begin.y >= tile_entries;
    let head0 = workgroup.x % blocks * SIDE;
    let heads = min(params.n_head - head0, SIDE);
    let own = subgroup % GROUPS;
    let d_query = params.d_nope + params.d_rope;
    let d_head = params.d_nope + params.d_value;
    let first_query = (token * params.n_head + head0) * d_query;

    if (local < GROUPS) {
        var place = Place(0u, 0u, 0u);
        if (of_chunk) {
            // The places share the positions of the chunk.
            let share = CHUNK_LENGTH / GROUPS;
            let chunk = begin.y - tile_entries;
            place = place_of(line, true, chunk, lists[line + SEQUENCE_CHUNKS]);
            place.count = min(max(place.count, local * share) - local * share, share);
            place.word += local * share;
        } else {
            place = place_of(line, false, begin.y * GROUPS + local, lists[line + SEQUENCE_GROUPS]);
        }
        var gate_row = NO_ROW;
        if (place.count > 0u) {
            gate_row = gate_row_of(base, place.group, first_group + place.group);
        }
        sh_places[local] = vec4<u32>(gate_row, place.group, place.word, place.count);
    }
    for (var e = local; e < GROUPS * MATRIX; e += WORKGROUP) {
        sh_scores[e] = 0.0;
    }
    workgroupBarrier();
    if (local == 0u) {
        var most = 0u;
        for (var p = 0u; p < GROUPS; p++) {
            most = max(most, sh_places[p].w);
        }
        sh_line.z = most;
    }
    let zero = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    let most_positions = workgroupUniformLoad(&sh_line).z;

    // The first weights are on their way while queries are gated.
    var w0 = load_weights(local, key_of(local, 0u, 0u, head0, heads));
    var w1 = load_weights(local + 1u * WORKGROUP, key_of(local + 1u * WORKGROUP, 0u, 0u, head0, heads));
    var w2 = load_weights(local + 2u * WORKGROUP, key_of(local + 2u * WORKGROUP, 0u, 0u, head0, heads));
    var w3 = load_weights(local + 3u * WORKGROUP, key_of(local + 3u * WORKGROUP, 0u, 0u, head0, heads));
    // Gated queries, eight heads a turn. Heads past the last repeat it.
    for (var h0 = 0u; h0 < heads; h0 += GROUPS) {
        // LANES invocations share the gated query of a place.
        let of_query = local / LANES;
        let lane = local % LANES;
        let place = of_query % GROUPS;
        let head = min(h0 + of_query / GROUPS, heads - 1u);
        let output = (head0 + head) * d_head;
        let gate_row = sh_places[place].x;
        var most = 0u;
        var gamma = 0.0;
        var x0 = Eight();
        var x1 = Eight();
        var x2 = Eight();
        var x3 = Eight();
        let own0 = lane < NOPE / 8u && of_query < GROUPS * GROUPS;
        let own1 = 1u * LANES < NOPE / 8u && lane + 1u * LANES < NOPE / 8u && of_query < GROUPS * GROUPS;
        let own2 = 2u * LANES < NOPE / 8u && lane + 2u * LANES < NOPE / 8u && of_query < GROUPS * GROUPS;
        let own3 = 3u * LANES < NOPE / 8u && lane + 3u * LANES < NOPE / 8u && of_query < GROUPS * GROUPS;
        if (own0) {
            x0 = query8(first_query + head * d_query, output, lane);
            gamma += total4(x0.low + x0.high);
            x0 = times(x0, gate8(gate_row, output / 8u + lane));
            most = max(most, exponent8(x0));
        }
        if (own1) {
            x1 = query8(first_query + head * d_query, output, lane + 1u * LANES);
            gamma += total4(x1.low + x1.high);
            x1 = times(x1, gate8(gate_row, output / 8u + lane + 1u * LANES));
            most = max(most, exponent8(x1));
        }
        if (own2) {
            x2 = query8(first_query + head * d_query, output, lane + 2u * LANES);
            gamma += total4(x2.low + x2.high);
            x2 = times(x2, gate8(gate_row, output / 8u + lane + 2u * LANES));
            most = max(most, exponent8(x2));
        }
        if (own3) {
            x3 = query8(first_query + head * d_query, output, lane + 3u * LANES);
            gamma += total4(x3.low + x3.high);
            x3 = times(x3, gate8(gate_row, output / 8u + lane + 3u * LANES));
            most = max(most, exponent8(x3));
        }
        for (var apart = 1u; apart < LANES; apart *= 2u) {
            most = max(most, subgroupShuffleXor(most, apart));
            gamma += subgroupShuffleXor(gamma, apart);
        }
        let unit = unit_of(most);
        let query_at = (head * GROUPS + place) * KEPT_STRIDE + 8u * lane;
        if (own0) {
            keep8_together(query_at, x0, reciprocal_of(unit));
        }
        if (own1) {
            keep8_together(query_at + 1u * 8u * LANES, x1, reciprocal_of(unit));
        }
        if (own2) {
            keep8_together(query_at + 2u * 8u * LANES, x2, reciprocal_of(unit));
        }
        if (own3) {
            keep8_together(query_at + 3u * 8u * LANES, x3, reciprocal_of(unit));
        }
        if (of_query < GROUPS * GROUPS) {
            if (lane == 0u) {
                sh_factor[place * SIDE + head] = bitcast<f32>(unit);
                if (place == 0u) {
                    sh_queries[head].y = gamma;
                }
            }
        }
    }
    // Absorbed queries in their place, of a few heads a turn: SHARE subgroups share a head, each has a matrix of columns; those
    // past the last repeat it.
    for (var h0 = 0u; h0 < heads; h0 += GROUPS / SHARE) {
        let x_at = min(h0 + own / SHARE, heads - 1u) * GROUPS * KEPT_PITCH;
        let w_at = own / SHARE * SHARE * SIDE * PITCH + min(own % SHARE, COLUMNS - 1u) * STEP;
        var product = zero;
        for (var k0 = 0u; k0 < NOPE; k0 += SHARE * SIDE) {
            workgroupBarrier();
            stage_weights_together(local, w0);
            stage_weights_together(local + 1u * WORKGROUP, w1);
            stage_weights_together(local + 2u * WORKGROUP, w2);
            stage_weights_together(local + 3u * WORKGROUP, w3);
            // These loads are in flight while these weights are multiplied; those behind the last are not needed.
            let ends = k0 + SHARE * SIDE >= NOPE;
            let h1 = h0 + select(0u, GROUPS / SHARE, ends);
            let k1 = select(k0 + SHARE * SIDE, 0u, ends);
            w0 = load_weights(local, key_of(local, h1, k1, head0, heads));
            w1 = load_weights(local + 1u * WORKGROUP, key_of(local + 1u * WORKGROUP, h1, k1, head0, heads));
            w2 = load_weights(local + 2u * WORKGROUP, key_of(local + 2u * WORKGROUP, h1, k1, head0, heads));
            w3 = load_weights(local + 3u * WORKGROUP, key_of(local + 3u * WORKGROUP, h1, k1, head0, heads));
            workgroupBarrier();
            for (var k = 0u; k < min(SHARE, (NOPE - k0) / SIDE); k++) {
                let x = coopLoadT<Left>(&sh_kept[x_at + (k0 / SIDE + k) * STEP], KEPT_PITCH);
                product = coopMultiplyAdd(x, coopLoadT<Right>(&sh_tile[w_at + k * SIDE * PITCH], PITCH), product);
            }
        }
        // PARTS invocations share the absorbed query of a place.
        let row = local / PARTS;
        let column = local % PARTS * 8u;
        let row_head = h0 + row / GROUPS;
        let row_own = min(row / GROUPS * SHARE + column / SIDE, GROUPS - 1u);
        let absorbed = exchanged(product, own, row_own * MATRIX + row % GROUPS * SIDE + column % SIDE);
        let mine = local < GROUPS * SIDE && row_head < heads && column < COLUMNS * SIDE;
        var exponent = select(0u, exponent8(absorbed), mine);
        for (var apart = 1u; apart < PARTS; apart *= 2u) {
            exponent = max(exponent, subgroupShuffleXor(exponent, apart));
        }
        if (mine) {
            let absorbed_unit = unit_of(exponent);
            keep8_together((row_head * GROUPS + row % GROUPS) * KEPT_STRIDE + column, absorbed, reciprocal_of(absorbed_unit));
            if (column == 0u) {
                sh_factor[row % GROUPS * SIDE + row_head] *= bitcast<f32>(absorbed_unit);
            }
        }
    }
    workgroupBarrier();

    // Rotary queries, for all places.
    let rotary_head = local / LANES;
    let rotary_lane = local % LANES;
    var most_rotary = 0u;
    let rotary_query = first_query + rotary_head * d_query + params.d_nope;
    if (rotary_head < heads) {
        for (var i = 4u * rotary_lane; i < ROTARY * SIDE; i += 4u * LANES) {
            most_rotary = max(most_rotary, exponent8(Eight(rotary4(rotary_query, i), vec4<f32>(0.0))));
        }
    }
    for (var apart = 1u; apart < LANES; apart *= 2u) {
        most_rotary = max(most_rotary, subgroupShuffleXor(most_rotary, apart));
    }
    let rotary_unit = unit_of(most_rotary);
    if (rotary_head < heads) {
        for (var i = 4u * rotary_lane; i < ROTARY * SIDE; i += 4u * LANES) {
            stage_together(rotary_head * STRIDE + i, vec4<f16>(reciprocal_of(rotary_unit) * rotary4(rotary_query, i)));
        }
        if (rotary_lane == 0u) {
            sh_queries[rotary_head].x = params.scale * bitcast<f32>(rotary_unit);
        }
    }
    workgroupBarrier();
    let r0 = coopLoadT<Left>(&sh_tile[min(0u, max(ROTARY, 1u) - 1u) * STEP], PITCH);
    let r1 = coopLoadT<Left>(&sh_tile[min(1u, max(ROTARY, 1u) - 1u) * STEP], PITCH);
    let r2 = coopLoadT<Left>(&sh_tile[min(2u, max(ROTARY, 1u) - 1u) * STEP], PITCH);
    let r3 = coopLoadT<Left>(&sh_tile[min(3u, max(ROTARY, 1u) - 1u) * STEP], PITCH);
    let kept_at = own * KEPT_PITCH;
    let a0 = coopLoadT<Left>(&sh_kept[kept_at + min(0u, COLUMNS - 1u) * STEP], GROUPS * KEPT_PITCH);
    let a1 = coopLoadT<Left>(&sh_kept[kept_at + min(1u, COLUMNS - 1u) * STEP], GROUPS * KEPT_PITCH);
    let a2 = coopLoadT<Left>(&sh_kept[kept_at + min(2u, COLUMNS - 1u) * STEP], GROUPS * KEPT_PITCH);
    let a3 = coopLoadT<Left>(&sh_kept[kept_at + min(3u, COLUMNS - 1u) * STEP], GROUPS * KEPT_PITCH);
    var value0 = zero;
    var value1 = zero;
    var value2 = zero;
    var value3 = zero;

    // SHARED invocations share a place and head, eight positions each.
    let state = min(local / SHARED, GROUPS * SIDE - 1u);
    let working = local < GROUPS * SIDE * SHARED;
    let state_place = state / SIDE;
    let state_head = state % SIDE;
    let eighth = local % SHARED * 8u;
    let at = state * SIDE + eighth;
    let of_position = state_place * SIDE + eighth;
    let kept = (state_head * GROUPS + state_place) * KEPT_STRIDE + eighth;
    let unit = sh_factor[state];
    let of_query = sh_queries[state_head];
    var best = LOWEST;                         // M
    var top = LOWEST;                          // the largest score
    var sum = 0.0;                             // over the positions of this invocation, like the next
    var shift = 0.0;
    for (var t = 0u; t < most_positions; t += SIDE) {
        if (local < GROUPS * SIDE) {
            let place = sh_places[local / SIDE];
            let i = t + local % SIDE;
            var row = NO_ROW;
            if (i < place.w) {
                let position = position_in(base, of_chunk, Place(place.y, place.w, place.z), i);
                row = select(NO_ROW, first_slot + position, position <= last);
            }
            var pair = vec2<f32>(0.0, 1.0);
            if (NORM != 2u && row != NO_ROW) {
                pair = statistics_of(row);
            }
            if (NORM != 0u) {
                pair.x = 0.0;
            }
            sh_positions[local] = vec4<u32>(bitcast<vec3<u32>>(vec3<f32>(pair, log(pair.y))), row);
        }
        workgroupBarrier();
        // All loads are asked for before the first is needed.
        let rotary_loads = ROTARY * SIDE / 8u;
        let k0 = fetched(local, rotary_loads, params.rope, params.rope_pitch, params.d_rope);
        let k1 = fetched(local + 1u * WORKGROUP, rotary_loads, params.rope, params.rope_pitch, params.d_rope);
        let k2 = fetched(local + 2u * WORKGROUP, rotary_loads, params.rope, params.rope_pitch, params.d_rope);
        let k3 = fetched(local + 3u * WORKGROUP, rotary_loads, params.rope, params.rope_pitch, params.d_rope);
        let c0 = fetched(local, LOADS, params.latent, params.latent_pitch, params.d_latent);
        let c1 = fetched(local + 1u * WORKGROUP, LOADS, params.latent, params.latent_pitch, params.d_latent);
        let c2 = fetched(local + 2u * WORKGROUP, LOADS, params.latent, params.latent_pitch, params.d_latent);
        let c3 = fetched(local + 3u * WORKGROUP, LOADS, params.latent, params.latent_pitch, params.d_latent);
        var rotary = Eight();
        if (ROTARY > 0u) {
            stage_load_together(local, rotary_loads, k0);
            stage_load_together(local + 1u * WORKGROUP, rotary_loads, k1);
            stage_load_together(local + 2u * WORKGROUP, rotary_loads, k2);
            stage_load_together(local + 3u * WORKGROUP, rotary_loads, k3);
            workgroupBarrier();
            let k_at = own * SIDE * PITCH;
            var product = coopMultiplyAdd(r0, coopLoad<Right>(&sh_tile[k_at], PITCH), zero);
            if (ROTARY > 1u) {
                product = coopMultiplyAdd(r1, coopLoad<Right>(&sh_tile[k_at + 1u * STEP], PITCH), product);
            }
            if (ROTARY > 2u) {
                product = coopMultiplyAdd(r2, coopLoad<Right>(&sh_tile[k_at + 2u * STEP], PITCH), product);
            }
            if (ROTARY > 3u) {
                product = coopMultiplyAdd(r3, coopLoad<Right>(&sh_tile[k_at + 3u * STEP], PITCH), product);
            }
            rotary = exchanged(product, own, at);
        }
        stage_load_together(local, LOADS, c0);
        stage_load_together(local + 1u * WORKGROUP, LOADS, c1);
        stage_load_together(local + 2u * WORKGROUP, LOADS, c2);
        stage_load_together(local + 3u * WORKGROUP, LOADS, c3);
        workgroupBarrier();
        let c_at = own * SIDE * PITCH;
        var product = coopMultiplyAdd(a0, coopLoad<Right>(&sh_tile[c_at], PITCH), zero);
        if (COLUMNS > 1u) {
            product = coopMultiplyAdd(a1, coopLoad<Right>(&sh_tile[c_at + 1u * STEP], PITCH), product);
        }
        if (COLUMNS > 2u) {
            product = coopMultiplyAdd(a2, coopLoad<Right>(&sh_tile[c_at + 2u * STEP], PITCH), product);
        }
        if (COLUMNS > 3u) {
            product = coopMultiplyAdd(a3, coopLoad<Right>(&sh_tile[c_at + 3u * STEP], PITCH), product);
        }
        let content = exchanged(product, own, at);

        let low = scored4(of_position, content.low, rotary.low, unit, of_query);
        let high = scored4(of_position + 4u, content.high, rotary.high, unit, of_query);
        let lowest = vec4<f32>(LOWEST);
        var next = largest4(max(select(lowest, low.score, low.visible), select(lowest, high.score, high.visible)));
        var key = largest4(max(
            select(lowest, low.score + low.log_rho, low.visible),
            select(lowest, high.score + high.log_rho, high.visible),
        ));
        if (SHARED > 1u) {
            next = max(next, subgroupShuffleXor(next, 1u));
            key = max(key, subgroupShuffleXor(key, 1u));
        }
        top = max(top, next);
        var shrink = 1.0;
        if (key > best + RESERVE) {
            // An empty state has nothing to shrink.
            shrink = select(exp(best - key), 1.0, best == LOWEST);
            best = key;
        }
        let p_low = select(vec4<f32>(0.0), exp(low.score - best), low.visible);
        let p_high = select(vec4<f32>(0.0), exp(high.score - best), high.visible);
        let w_low = p_low * low.rho;
        let w_high = p_high * high.rho;
        sum = sum * shrink + total4(p_low + p_high);
        shift = shift * shrink + total4(w_low * low.mu + w_high * high.mu);
        if (working && state_head < heads) {
            if (shrink != 1.0) {
                sh_scaled.x = t + 1u;
            }
            sh_factor[state] = shrink;
            keep8_together(kept, Eight(w_low, w_high), 1.0);
        }
        // Every turn has a mark of its own, so that nobody needs to take the last one back.
        if (workgroupUniformLoad(&sh_scaled).x == t + 1u) {
            value0 = scaled_places(value0, local, own);
            if (COLUMNS > 1u) {
                value1 = scaled_places(value1, local, own);
            }
            if (COLUMNS > 2u) {
                value2 = scaled_places(value2, local, own);
            }
            if (COLUMNS > 3u) {
                value3 = scaled_places(value3, local, own);
            }
        }
        let weights = coopLoadT<Left>(&sh_kept[kept_at], GROUPS * KEPT_PITCH);
        value0 = coopMultiplyAdd(weights, coopLoadT<Right>(&sh_tile[c_at], PITCH), value0);
        if (COLUMNS > 1u) {
            value1 = coopMultiplyAdd(weights, coopLoadT<Right>(&sh_tile[c_at + 1u * STEP], PITCH), value1);
        }
        if (COLUMNS > 2u) {
            value2 = coopMultiplyAdd(weights, coopLoadT<Right>(&sh_tile[c_at + 2u * STEP], PITCH), value2);
        }
        if (COLUMNS > 3u) {
            value3 = coopMultiplyAdd(weights, coopLoadT<Right>(&sh_tile[c_at + 3u * STEP], PITCH), value3);
        }
    }

    // Sums of latents as halves; then what relates the places to each other.
    var s0 = Eight();
    var s1 = Eight();
    var s2 = Eight();
    var s3 = Eight();
    s0 = exchanged(value0, own, at);
    if (COLUMNS > 1u) {
        s1 = exchanged(value1, own, at);
    }
    if (COLUMNS > 2u) {
        s2 = exchanged(value2, own, at);
    }
    if (COLUMNS > 3u) {
        s3 = exchanged(value3, own, at);
    }
    var exponent = exponent8(s0);
    if (COLUMNS > 1u) {
        exponent = max(exponent, exponent8(s1));
    }
    if (COLUMNS > 2u) {
        exponent = max(exponent, exponent8(s2));
    }
    if (COLUMNS > 3u) {
        exponent = max(exponent, exponent8(s3));
    }
    exponent = most_of_row(exponent);
    let sum_unit = unit_of(exponent);
    if (SHARED > 1u) {
        sum += subgroupShuffleXor(sum, 1u);
        shift += subgroupShuffleXor(shift, 1u);
    }
    if (working && state_head < heads) {
        let reciprocal = reciprocal_of(sum_unit);
        keep8_together(kept, s0, reciprocal);
        if (COLUMNS > 1u) {
            keep8_together(kept + 1u * SIDE, s1, reciprocal);
        }
        if (COLUMNS > 2u) {
            keep8_together(kept + 2u * SIDE, s2, reciprocal);
        }
        if (COLUMNS > 3u) {
            keep8_together(kept + 3u * SIDE, s3, reciprocal);
        }
        if (eighth == 0u) {
            sh_positions[state].x = bitcast<u32>(top);
        }
    }
    workgroupBarrier();
    if (working && eighth == 0u && state_head < heads) {
        var all = LOWEST;
        for (var p = 0u; p < GROUPS; p++) {
            all = max(all, bitcast<f32>(sh_positions[p * SIDE + state_head].x));
        }
        // An empty place adds nothing.
        let factor = select(exp(best - all), 0.0, best == LOWEST);
        sh_factor[state] = factor * bitcast<f32>(sum_unit);
        sh_positions[state].y = bitcast<u32>(factor * sum);
        sh_positions[state].z = bitcast<u32>(factor * shift);
    }
    workgroupBarrier();

    // Values, a matrix of columns of a head per subgroup and turn; those past the last repeat it.
    let matrices = heads * (params.d_value / SIDE);
    w0 = load_weights(local, value_of(local, 0u, head0, heads));
    w1 = load_weights(local + 1u * WORKGROUP, value_of(local + 1u * WORKGROUP, 0u, head0, heads));
    w2 = load_weights(local + 2u * WORKGROUP, value_of(local + 2u * WORKGROUP, 0u, head0, heads));
    w3 = load_weights(local + 3u * WORKGROUP, value_of(local + 3u * WORKGROUP, 0u, head0, heads));
    for (var first = 0u; first < matrices; first += GROUPS) {
        let matrix = min(first + own, matrices - 1u);
        let head = matrix % heads;
        let w_at = own * SIDE * PITCH;
        let s_at = head * GROUPS * KEPT_PITCH;
        stage_weights_together(local, w0);
        stage_weights_together(local + 1u * WORKGROUP, w1);
        stage_weights_together(local + 2u * WORKGROUP, w2);
        stage_weights_together(local + 3u * WORKGROUP, w3);
        w0 = load_weights(local, value_of(local, first + GROUPS, head0, heads));
        w1 = load_weights(local + 1u * WORKGROUP, value_of(local + 1u * WORKGROUP, first + GROUPS, head0, heads));
        w2 = load_weights(local + 2u * WORKGROUP, value_of(local + 2u * WORKGROUP, first + GROUPS, head0, heads));
        w3 = load_weights(local + 3u * WORKGROUP, value_of(local + 3u * WORKGROUP, first + GROUPS, head0, heads));
        workgroupBarrier();
        var product = zero;
        product = coopMultiplyAdd(
            coopLoadT<Left>(&sh_kept[s_at], KEPT_PITCH),
            coopLoad<Right>(&sh_tile[w_at], PITCH),
            product,
        );
        if (COLUMNS > 1u) {
            product = coopMultiplyAdd(
                coopLoadT<Left>(&sh_kept[s_at + 1u * STEP], KEPT_PITCH),
                coopLoad<Right>(&sh_tile[w_at + 1u * STEP], PITCH),
                product,
            );
        }
        if (COLUMNS > 2u) {
            product = coopMultiplyAdd(
                coopLoadT<Left>(&sh_kept[s_at + 2u * STEP], KEPT_PITCH),
                coopLoad<Right>(&sh_tile[w_at + 2u * STEP], PITCH),
                product,
            );
        }
        if (COLUMNS > 3u) {
            product = coopMultiplyAdd(
                coopLoadT<Left>(&sh_kept[s_at + 3u * STEP], KEPT_PITCH),
                coopLoad<Right>(&sh_tile[w_at + 3u * STEP], PITCH),
                product,
            );
        }
        coopStoreT(product, &sh_scores[MATRIX * own], SIDE);
        workgroupBarrier();
        if (local < GROUPS * GROUPS * SHARED) {
            let of_row = local / SHARED;
            let place = of_row % GROUPS;
            let other = min(first + of_row / GROUPS, matrices - 1u);
            let column = local % SHARED * 8u;
            let output = (head0 + other % heads) * d_head + params.d_nope + other / heads * SIDE + column;
            let factor = sh_factor[place * SIDE + other % heads];
            let gate = gate8(sh_places[place].x, output / 8u);
            let to = of_row / GROUPS * MATRIX + place * SIDE + column;
            let x = read8(to);
            let low = factor * gate.low * x.low;
            let high = factor * gate.high * x.high;
            sh_scores[to] = low.x;
            sh_scores[to + 1u] = low.y;
            sh_scores[to + 2u] = low.z;
            sh_scores[to + 3u] = low.w;
            sh_scores[to + 4u] = high.x;
            sh_scores[to + 5u] = high.y;
            sh_scores[to + 6u] = high.z;
            sh_scores[to + 7u] = high.w;
        }
        workgroupBarrier();
        let other = first + local / SIDE;
        if (local < GROUPS * SIDE && other < matrices) {
            let of_head = other % heads;
            let n = other / heads * SIDE + local % SIDE;
            var out = 0.0;
            var all_sum = 0.0;
            var all_shift = 0.0;
            for (var p = 0u; p < GROUPS; p++) {
                out += sh_scores[local / SIDE * MATRIX + p * SIDE + local % SIDE];
                all_sum += bitcast<f32>(sh_positions[p * SIDE + of_head].y);
                all_shift += bitcast<f32>(sh_positions[p * SIDE + of_head].z);
            }
            let output = (head0 + of_head) * d_head + params.d_nope + n;
            if (NORM != 2u) {
                out = (out - all_shift) * affine_at(output);
            }
            if (NORM == 0u) {
                out += all_sum * affine_at(params.beta + output);
            }
            partial[(begin.w * params.n_head + head0 + of_head) * params.d_value + n] = out;
        }
        workgroupBarrier();
    }
    if (local < heads) {
        var all = LOWEST;
        var all_sum = 0.0;
        for (var p = 0u; p < GROUPS; p++) {
            all = max(all, bitcast<f32>(sh_positions[p * SIDE + local].x));
            all_sum += bitcast<f32>(sh_positions[p * SIDE + local].y);
        }
        let to = params.softmax + 2u * (begin.w * params.n_head + head0 + local);
        partial[to] = all;
        partial[to + 1u] = all_sum;
    }
}

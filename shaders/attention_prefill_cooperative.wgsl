// Causal attention of a tile of queries over a tile of rebuilt keys and values by cooperative matrices of 16 × 16: f16 factors,
// sums and softmax in f32. Meaning, tables and running state are those of attention_prefill:
//
//   s_j = f16(scale · q) · f16(k_j)   p_j = e^(s_j−m)   l = Σ_j p_j   values = Σ_j f16(p_j) f16(v_j)
//
// The key tile holds rows [kv_first, kv_first + kv_rows) of the step's row numbering (see cache_read). m may lie below the
// largest score, by RESERVE at most: scaling the queries of a matrix apart takes a detour through workgroup memory, and the
// reserve makes that seldom. f16 holds far more than e^RESERVE; (m, l) mean the same whatever m is, and lse = m + ln l.
// The product of 0 and a value that is not finite is not 0. Where some query of the workgroup does not see some key of the block,
// such a value is staged as 0 and its weight as NaN, which reaches only the queries that see it.
// A workgroup takes QUERIES queries of a tile and TILE keys at a time. Of the scores a subgroup owns 16 queries, which are made
// halves once and stay in registers, KEPT matrices of them and the rest in workgroup memory; SHARES subgroups share their keys.
// Of the values it owns 32 queries, so that what it loads of a value serves two matrices; SPREAD subgroups share their columns.
// Further subgroups repeat one, and store the same. LANES invocations share the softmax of a query.
// Each key and value is read from memory once per workgroup, into registers while the block before it is multiplied, and becomes
// a half on the way to workgroup memory. Keys are staged a block ahead of values, so that the next keys and these values are
// written while scores become weights: a block needs two meetings, after its scores and after its weights.
// grid: (query tiles · PARTS, n_head, ⌈d_value / 128⌉); the last queries, which see most keys, come first. Workgroups of a head
// are neighbours, then heads of the same keys. Widths are multiples of 4, d_nope and d_value of 8 where keys and values are f16.
//
// Floor, 16 heads of 128 + 128: 1.1 and 17 GFLOP for 512 and 2048 tokens, 17 and 67 MB with f32 keys and values; on an H200 by our
// rooflines 4 and 39 µs. Behind the matrices workgroup memory is the limit: a block of 64 queries and 32 keys, a MFLOP, moves 110
// KiB there, 860 cycles of 128 bytes; a third is scores and weights, which matrices let nobody touch elsewhere.
// By AMD's compiler (RDNA3, Mesa 25), 128 + 128, f32 keys: 192 registers, nothing spilled, 32 KiB; 32 keys wait 4 971 cycles. The
// kernel before, which staged its queries again for every block within 16 KiB, waited 14 116. The inverse throughput of a subgroup,
// for the whole shader, is 8 721 where it was 11 155, but that of a block alone 3 884 where it was 2 211: more registers leave fewer
// subgroups beside each other. On the way: loads that a condition guards are waited for where they stand (40 400 cycles in all for
// 17 400); with 16 queries of values per subgroup each value is loaded twice as often. With d_rope 64: 204 registers, 45 KiB.
// On a GPU: not run yet.
// Static (RDNA3, Mesa 25), at most: 216 registers, 45 568 bytes of workgroup memory, nothing spilled.

enable f16;
enable wgpu_cooperative_matrix;

override WORKGROUP: u32 = 128u;                  // TEAMS whole subgroups or more
override PARTS: u32 = 1u;                        // workgroups of a query tile
override QUERIES: u32 = 32u;                     // whole pairs of matrices
override TILE: u32 = 32u;                        // keys at a time: whole matrices for every share
override SHARES: u32 = 2u;                       // subgroups of the scores of a matrix of queries
override LANES: u32 = 4u;                        // at most a subgroup, TILE / 4, and WORKGROUP / QUERIES
override KV_F16: u32 = 0u;                       // 1: keys and values are halves in memory
override NOPE: u32 = 8u;                         // d_nope, in eights
override WIDTH: u32 = 16u;                       // and d_rope behind it, in whole matrices
override KEPT: u32 = 1u;                         // matrices of queries that a subgroup keeps: 1 to 8
override COLUMNS: u32 = 1u;                      // matrices of value columns of a subgroup: 1 to 4
override TEAMS: u32 = QUERIES / SIDE * SHARES;
override REST: u32 = WIDTH / SIDE - KEPT;        // matrices of queries that stay in workgroup memory
override SPREAD: u32 = 2u * SHARES;              // subgroups of the values of a pair of matrices of queries
override SLICE: u32 = SPREAD * COLUMNS * SIDE;   // value columns that are staged
// Eights of a row: of a key without its rotary part and of the value behind it, and of the rotary part.
override KV_UNITS: u32 = (NOPE + SLICE) / 8u;
override ROPE_UNITS: u32 = (WIDTH - NOPE) / 8u;
// Of an invocation for a block.
override KV_FETCHES: u32 = (TILE * KV_UNITS + WORKGROUP - 1u) / WORKGROUP;
override ROPE_FETCHES: u32 = (TILE * ROPE_UNITS + WORKGROUP - 1u) / WORKGROUP;
override SCORE_PITCH: u32 = TILE + 4u;
// In places of sh_stage; pitches 16 bytes beyond a multiple of 32 meet different banks.
override KEY_PITCH: u32 = (WIDTH + 8u) / PLACE;
override VALUE_PITCH: u32 = (SLICE + 8u) / PLACE;
override WEIGHT_PITCH: u32 = (TILE + 8u) / PLACE;
override REST_PITCH: u32 = (REST * SIDE + 8u) / PLACE;
override VALUES: u32 = TILE * KEY_PITCH;         // where staged values begin, then weights, then queries that are not kept
override WEIGHTS: u32 = VALUES + TILE * VALUE_PITCH;
override RESTS: u32 = max(WEIGHTS + QUERIES * WEIGHT_PITCH, QUERIES * CHUNK_PITCH);

const LOWEST: f32 = -3.4028234e38;
const RESERVE: f32 = 4.0;
const SIDE: u32 = 16u;
const MATRIX: u32 = SIDE * SIDE;
const PLACE: u32 = 4u;                           // halves of a place of sh_stage
const STEP: u32 = SIDE / PLACE;
const CHUNK: u32 = 4u * SIDE;                    // elements of every query that are staged at once, to be kept
const CHUNK_PITCH: u32 = (CHUNK + 8u) / PLACE;

// Matrices of factors, and of sums.
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

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

// Where a workgroup's keys and values lie; in units of 16 bytes but for `count` and `column`.
struct Keys {
    count: u32,        // keys that some query may see
    column: u32,       // first value column
    kv: u32,           // the first key
    pitch: u32,        // from one key to the next
    rope: u32,         // the first key's rotary part
    rope_pitch: u32,
}

// Eight elements of a block on their way to workgroup memory.
struct Unit {
    row: u32,
    unit: u32,         // of the row
    of_value: bool,
    key: u32,
    d: u32,            // the first element, of those of a head
    left: u32,         // elements from there to the part's end; 0 past it, and past the last key
}

// Eight elements as memory has them: halves are all in `low`.
struct Loaded {
    low: vec4<u32>,
    high: vec4<u32>,
}

// Eight numbers.
struct Eight {
    low: vec4<f32>,
    high: vec4<f32>,
}

// What an invocation has in flight.
struct Flight {
    kv0: Loaded,
    kv1: Loaded,
    kv2: Loaded,
    kv3: Loaded,
    rope: vec4<u32>,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;               // [tokens, n_head, (d_nope + d_rope) / 4], rotated
@group(0) @binding(2) var<storage, read> kv: array<vec4<u32>>;              // [kv_rows, n_kv_head, d_nope + d_value], 16 bytes each
@group(0) @binding(3) var<storage, read> rope_cache: array<vec4<u32>>;      // [cache rows, rope_pitch / 8]
@group(0) @binding(4) var<storage, read> queries: array<QueryTile>;         // [query tiles]
@group(0) @binding(5) var<storage, read> sequences: array<SequenceRow>;     // [n_sequence]
@group(0) @binding(6) var<storage, read_write> values: array<f32>;          // [tokens, n_head, d_value]
@group(0) @binding(7) var<storage, read_write> softmax: array<vec2<f32>>;   // [tokens, n_head, slices] (m, l)

// Keys [key, WIDTH], values [key, column], weights [query, key], queries that are not kept [query, element]. First of all, chunks
// of queries.
var<workgroup> sh_stage: array<vec4<f16>, RESTS + QUERIES * REST_PITCH * min(REST, 1u)>;
// [query, key] scores; one matrix per subgroup on its way from or to storage.
var<workgroup> sh_scores: array<f32, QUERIES * SCORE_PITCH>;
var<workgroup> sh_factor: array<f32, QUERIES>;   // factor on the values of a query
var<workgroup> sh_poison: array<u32, TILE>;      // the last block, counted from 1, whose value is not finite
// x: the last block, counted from 1, that gave some query a factor other than 1. 16 bytes: matrices need the arrays around it to
// begin on multiples of 16.
var<workgroup> sh_scaled: vec4<u32>;

// Stages four halves, at a place.
fn stage_four(at: u32, four: vec4<f32>) {
    sh_stage[at] = vec4<f16>(four);
}

// The first four elements of 16 bytes of f32 or f16.
fn first_four(load: vec4<u32>, f16: u32) -> vec4<f32> {
    if (f16 == 1u) {
        return vec4<f32>(unpack2x16float(load.x), unpack2x16float(load.y));
    }
    return bitcast<vec4<f32>>(load);
}

// The other four of a load of f16.
fn second_of(load: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(load.z), unpack2x16float(load.w));
}

// Which of four numbers round to halves that are not finite. Bits tell: compilers may assume that there is no NaN.
fn overflows(four: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(four) & vec4<u32>(0x7fffffffu)) >= vec4<u32>(0x477ff000u);
}

// Unit e of the keys of block t + TILE and of the values of block t.
fn kv_unit(e: u32, t: u32, keys: Keys) -> Unit {
    let row = e / KV_UNITS;
    let unit = e % KV_UNITS;
    let of_value = unit >= NOPE / 8u;
    let key = row + select(t + TILE, t, of_value);
    let d = unit * 8u + select(0u, params.d_nope + keys.column - NOPE, of_value);
    let end = select(params.d_nope, params.d_nope + params.d_value, of_value);
    return Unit(row, unit, of_value, key, d, select(0u, max(end, d) - d, key < keys.count));
}

// Unit e of the rotary parts of the keys of block t + TILE.
fn rope_unit(e: u32, t: u32, keys: Keys) -> Unit {
    let row = e / max(ROPE_UNITS, 1u);
    let d = e % max(ROPE_UNITS, 1u) * 8u;
    let key = row + t + TILE;
    return Unit(row, NOPE / 8u + d / 8u, false, key, d, select(0u, max(params.d_rope, d) - d, key < keys.count));
}

// Loads are unconditional: a load within a branch is waited for there. Where nothing is left they repeat another, and zeros take
// its place when it is staged.
fn fetch_kv(e: u32, t: u32, keys: Keys) -> Loaded {
    let place = kv_unit(e, t, keys);
    let row = keys.kv + min(place.key, max(keys.count, 1u) - 1u) * keys.pitch;
    let d = select(0u, place.d, place.left > 0u);
    if (KV_F16 == 1u) {
        return Loaded(kv[row + d / 8u], vec4<u32>(0u));
    }
    let at = row + d / 4u;
    return Loaded(kv[at], kv[at + select(0u, 1u, place.left > 4u)]);
}

fn fetch_rope(e: u32, t: u32, keys: Keys) -> vec4<u32> {
    let place = rope_unit(e, t, keys);
    let d = select(0u, place.d, place.left > 0u);
    return rope_cache[keys.rope + min(place.key, max(keys.count, 1u) - 1u) * keys.rope_pitch + d / 8u];
}

// What is left of a unit, as numbers; 0 behind it.
fn numbers(place: Unit, eight: Loaded, f16: u32) -> Eight {
    let low = first_four(eight.low, f16);
    var high = bitcast<vec4<f32>>(eight.high);
    if (f16 == 1u) {
        high = second_of(eight.low);
    }
    return Eight(select(vec4<f32>(0.0), low, place.left > 0u), select(vec4<f32>(0.0), high, place.left > 4u));
}

// Stages unit e; of a value that is not finite 0 where `finite` says so.
fn stage_kv_fours(e: u32, eight: Loaded, t: u32, keys: Keys, finite: bool) {
    let place = kv_unit(e, t, keys);
    if (place.row >= TILE) {
        return;
    }
    var eights = numbers(place, eight, KV_F16);
    if (finite && place.of_value) {
        eights.low = select(eights.low, vec4<f32>(0.0), overflows(eights.low));
        eights.high = select(eights.high, vec4<f32>(0.0), overflows(eights.high));
    }
    let of_key = place.row * KEY_PITCH + place.unit * (8u / PLACE);
    let at = select(of_key, VALUES + place.row * VALUE_PITCH + (place.unit - NOPE / 8u) * (8u / PLACE), place.of_value);
    stage_four(at, eights.low);
    stage_four(at + 4u / PLACE, eights.high);
}

fn stage_rope_fours(e: u32, load: vec4<u32>, t: u32, keys: Keys) {
    let place = rope_unit(e, t, keys);
    if (place.row < TILE) {
        let eights = numbers(place, Loaded(load, load), 1u);
        let at = place.row * KEY_PITCH + place.unit * (8u / PLACE);
        stage_four(at, eights.low);
        stage_four(at + 4u / PLACE, eights.high);
    }
}

// Marks the key of unit e, if that is of a value that is not finite.
fn mark(e: u32, eight: Loaded, t: u32, keys: Keys) {
    let place = kv_unit(e, t, keys);
    if (place.row < TILE && place.of_value) {
        let eights = numbers(place, eight, KV_F16);
        if (any(overflows(eights.low)) || any(overflows(eights.high))) {
            sh_poison[place.row] = t + 1u;
        }
    }
}

// The invocation's units of the keys of block t + TILE and of the values of block t, or the first of them.
fn fetch_all(local: u32, t: u32, keys: Keys) -> Flight {
    var flight = Flight();
    flight.kv0 = fetch_kv(local, t, keys);
    if (KV_FETCHES > 1u) {
        flight.kv1 = fetch_kv(local + 1u * WORKGROUP, t, keys);
    }
    if (KV_FETCHES > 2u) {
        flight.kv2 = fetch_kv(local + 2u * WORKGROUP, t, keys);
    }
    if (KV_FETCHES > 3u) {
        flight.kv3 = fetch_kv(local + 3u * WORKGROUP, t, keys);
    }
    if (ROPE_FETCHES > 0u) {
        flight.rope = fetch_rope(local, t, keys);
    }
    return flight;
}

// Stages them.
fn stage_all_fours(local: u32, flight: Flight, t: u32, keys: Keys, finite: bool) {
    stage_kv_fours(local, flight.kv0, t, keys, finite);
    if (KV_FETCHES > 1u) {
        stage_kv_fours(local + 1u * WORKGROUP, flight.kv1, t, keys, finite);
    }
    if (KV_FETCHES > 2u) {
        stage_kv_fours(local + 2u * WORKGROUP, flight.kv2, t, keys, finite);
    }
    if (KV_FETCHES > 3u) {
        stage_kv_fours(local + 3u * WORKGROUP, flight.kv3, t, keys, finite);
    }
    if (ROPE_FETCHES > 0u) {
        stage_rope_fours(local, flight.rope, t, keys);
    }
    // For small workgroups.
    if (KV_FETCHES > 4u) {
        for (var e = local + 4u * WORKGROUP; e < TILE * KV_UNITS; e += WORKGROUP) {
            stage_kv_fours(e, fetch_kv(e, t, keys), t, keys, finite);
        }
    }
    if (ROPE_FETCHES > 1u) {
        for (var e = local + WORKGROUP; e < TILE * ROPE_UNITS; e += WORKGROUP) {
            stage_rope_fours(e, fetch_rope(e, t, keys), t, keys);
        }
    }
}

// Marks keys whose value is not finite.
fn mark_all(local: u32, flight: Flight, t: u32, keys: Keys) {
    mark(local, flight.kv0, t, keys);
    if (KV_FETCHES > 1u) {
        mark(local + 1u * WORKGROUP, flight.kv1, t, keys);
    }
    if (KV_FETCHES > 2u) {
        mark(local + 2u * WORKGROUP, flight.kv2, t, keys);
    }
    if (KV_FETCHES > 3u) {
        mark(local + 3u * WORKGROUP, flight.kv3, t, keys);
    }
    if (KV_FETCHES > 4u) {
        for (var e = local + 4u * WORKGROUP; e < TILE * KV_UNITS; e += WORKGROUP) {
            mark(e, fetch_kv(e, t, keys), t, keys);
        }
    }
}

// Stages `width` elements of every query from d0 on, rows `pitch` apart; `first` is the first query's, in fours. Queries past
// `count` are 0.
fn stage_queries_in_fours(at: u32, pitch: u32, d0: u32, width: u32, first: u32, count: u32, local: u32) {
    let row = (params.d_nope + params.d_rope) / 4u;
    for (var e = local; e < QUERIES * (width / 4u); e += WORKGROUP) {
        let query = e / (width / 4u);
        let four = e % (width / 4u);
        let d = d0 + 4u * four;
        // The rotary part begins at NOPE.
        let of_nope = d < params.d_nope;
        var staged = vec4<f32>(0.0);
        if (query < count && (of_nope || (d >= NOPE && d - NOPE < params.d_rope))) {
            let i = select(d - NOPE + params.d_nope, d, of_nope) / 4u;
            staged = params.scale * q[first + query * params.n_head * row + i];
        }
        stage_four(at + query * pitch + four * (4u / PLACE), staged);
    }
}

// Four keys' scores.
fn four_scores(at: u32) -> vec4<f32> {
    return vec4<f32>(sh_scores[at], sh_scores[at + 1u], sh_scores[at + 2u], sh_scores[at + 3u]);
}

// Query of the workgroup, and column of the slice, of element e of all subgroups' matrices (i, j).
fn query_of(e: u32, i: u32) -> u32 {
    return (e / MATRIX / SPREAD * 2u + i) * SIDE + e % MATRIX / SIDE;
}

fn value_column(e: u32, j: u32) -> u32 {
    return (j * SPREAD + e / MATRIX % SPREAD) * SIDE + e % SIDE;
}

// Fills matrix (i, j) of each subgroup with the running values; `column0` is the slice's first. Queries past `count` are 0.
fn begin_values(i: u32, j: u32, out: u32, count: u32, column0: u32, local: u32) {
    workgroupBarrier();
    for (var e = local; e < TEAMS * MATRIX; e += WORKGROUP) {
        let query = query_of(e, i);
        let column = column0 + value_column(e, j);
        var value = 0.0;
        if (query < count && column < params.d_value) {
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
    for (var e = local; e < TEAMS * MATRIX; e += WORKGROUP) {
        sh_scores[e] *= sh_factor[query_of(e, i)];
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
    for (var e = local; e < TEAMS * MATRIX; e += WORKGROUP) {
        let query = query_of(e, i);
        let column = column0 + value_column(e, j);
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
    let part = params.tiles_x - 1u - work.x;
    let tile = queries[part / PARTS];
    let sequence = sequences[tile.sequence];
    let head = work.y;
    let kv_width = params.d_nope + params.d_value;
    let kv_head = head / (params.n_head / params.n_kv_head);
    let column0 = work.z * 128u;

    // This workgroup's queries, of the tile's.
    let skipped = part % PARTS * QUERIES;
    let count = min(max(tile.count, skipped) - skipped, QUERIES);
    let token0 = tile.first_token + skipped;
    let position0 = tile.position + skipped;
    let out = (token0 * params.n_head + head) * params.d_value;
    let first_query = (token0 * params.n_head + head) * ((params.d_nope + params.d_rope) / 4u);
    let own = subgroup % TEAMS;
    let share = own % SHARES;
    let row0 = own / SHARES * SIDE;
    // Of the values: the first matrix of queries, and the share of the columns.
    let pair0 = own / SPREAD * 2u * SIDE;
    let column_share = own % SPREAD;

    // Query of the workgroup whose softmax this lane shares: neighbours in a workgroup of one dimension are neighbours in a
    // subgroup.
    let query = local / LANES;
    let lane = member % LANES;
    let working = query < QUERIES;
    let state = ((token0 + query) * params.n_head + head) * params.tiles_z + work.z;

    // Keys of this tile: those of the sequence, up to the last that a query may see. `begin` is the first one's position.
    let tile_end = params.kv_first + params.kv_rows;
    let begin = max(params.kv_first, sequence.first_row) - sequence.first_row;
    let seen_end = min(min(max(tile_end, sequence.first_row) - sequence.first_row, sequence.length), position0 + count);
    let end = select(0u, max(seen_end, begin) - begin, count > 0u);
    // Without a key nothing is read but the first 16 bytes.
    let of_load = select(4u, 8u, KV_F16 == 1u);
    let kv_first = ((sequence.first_row + begin - params.kv_first) * params.n_kv_head + kv_head) * kv_width;
    let keys = Keys(
        end,
        column0,
        select(0u, kv_first / of_load, end > 0u),
        params.n_kv_head * kv_width / of_load,
        select(0u, (sequence.first_slot + begin) * (params.rope_pitch / 8u), end > 0u),
        params.rope_pitch / 8u,
    );

    // In flight: the keys of the first block. No value comes before them.
    let first_flight = fetch_all(local, 0u - TILE, keys);

    var best = LOWEST;
    var sum = 0.0;                         // over the keys of this lane
    if (params.first == 0u && query < count) {
        let before = softmax[state];
        best = before.x;
        if (lane == 0u) {
            sum = before.y;
        }
    }
    for (var e = local; e < QUERIES * SCORE_PITCH; e += WORKGROUP) {
        sh_scores[e] = 0.0;
    }
    for (var e = local; e < TILE; e += WORKGROUP) {
        sh_poison[e] = 0u;
    }
    if (local == 0u) {
        sh_scaled.x = 0u;
    }
    if (REST > 0u) {
        stage_queries_in_fours(RESTS, REST_PITCH, KEPT * SIDE, REST * SIDE, first_query, count, local);
    }
    stage_queries_in_fours(0u, CHUNK_PITCH, 0u, CHUNK, first_query, count, local);
    workgroupBarrier();
    let q_at = row0 * CHUNK_PITCH;
    let q0 = coopLoadT<Left>(&sh_stage[q_at], CHUNK_PITCH);
    let q1 = coopLoadT<Left>(&sh_stage[q_at + 1u * STEP], CHUNK_PITCH);
    let q2 = coopLoadT<Left>(&sh_stage[q_at + 2u * STEP], CHUNK_PITCH);
    let q3 = coopLoadT<Left>(&sh_stage[q_at + 3u * STEP], CHUNK_PITCH);
    let zero = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
    workgroupBarrier();
    var q4 = q0;
    var q5 = q0;
    var q6 = q0;
    var q7 = q0;
    if (KEPT > 4u) {
        stage_queries_in_fours(0u, CHUNK_PITCH, CHUNK, CHUNK, first_query, count, local);
        workgroupBarrier();
        q4 = coopLoadT<Left>(&sh_stage[q_at], CHUNK_PITCH);
        q5 = coopLoadT<Left>(&sh_stage[q_at + 1u * STEP], CHUNK_PITCH);
        q6 = coopLoadT<Left>(&sh_stage[q_at + 2u * STEP], CHUNK_PITCH);
        q7 = coopLoadT<Left>(&sh_stage[q_at + 3u * STEP], CHUNK_PITCH);
        workgroupBarrier();
    }
    // valueIJ: queries from I · SIDE of the pair's, columns from (J · SPREAD + column_share) · SIDE of the slice.
    var value00 = zero;
    var value01 = zero;
    var value02 = zero;
    var value03 = zero;
    var value10 = zero;
    var value11 = zero;
    var value12 = zero;
    var value13 = zero;
    if (params.first == 0u) {
        begin_values(0u, 0u, out, count, column0, local);
        value00 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
        begin_values(1u, 0u, out, count, column0, local);
        value10 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
        if (COLUMNS > 1u) {
            begin_values(0u, 1u, out, count, column0, local);
            value01 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
            begin_values(1u, 1u, out, count, column0, local);
            value11 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
        }
        if (COLUMNS > 2u) {
            begin_values(0u, 2u, out, count, column0, local);
            value02 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
            begin_values(1u, 2u, out, count, column0, local);
            value12 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
        }
        if (COLUMNS > 3u) {
            begin_values(0u, 3u, out, count, column0, local);
            value03 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
            begin_values(1u, 3u, out, count, column0, local);
            value13 = coopLoadT<Sums>(&sh_scores[MATRIX * own], SIDE);
        }
        workgroupBarrier();
    }
    stage_all_fours(local, first_flight, 0u - TILE, keys, false);
    for (var e = local; e < QUERIES * (TILE / 4u); e += WORKGROUP) {
        stage_four(WEIGHTS + e / (TILE / 4u) * WEIGHT_PITCH + e % (TILE / 4u) * (4u / PLACE), vec4<f32>(0.0));
    }
    workgroupBarrier();

    // The last turn has but the values of the last block; the first one multiplies zeros.
    for (var t = 0u; t < keys.count + TILE; t += TILE) {
        // These loads are in flight while the values of the block before and the scores of this one are multiplied.
        let flight = fetch_all(local, t, keys);
        for (var k = 0u; k < TILE / SIDE; k++) {
            let w_at = WEIGHTS + pair0 * WEIGHT_PITCH + k * STEP;
            let v_at = VALUES + k * SIDE * VALUE_PITCH + column_share * STEP;
            let w0 = coopLoadT<Left>(&sh_stage[w_at], WEIGHT_PITCH);
            let w1 = coopLoadT<Left>(&sh_stage[w_at + SIDE * WEIGHT_PITCH], WEIGHT_PITCH);
            let v0 = coopLoadT<Right>(&sh_stage[v_at], VALUE_PITCH);
            value00 = coopMultiplyAdd(w0, v0, value00);
            value10 = coopMultiplyAdd(w1, v0, value10);
            if (COLUMNS > 1u) {
                let v1 = coopLoadT<Right>(&sh_stage[v_at + 1u * SPREAD * STEP], VALUE_PITCH);
                value01 = coopMultiplyAdd(w0, v1, value01);
                value11 = coopMultiplyAdd(w1, v1, value11);
            }
            if (COLUMNS > 2u) {
                let v2 = coopLoadT<Right>(&sh_stage[v_at + 2u * SPREAD * STEP], VALUE_PITCH);
                value02 = coopMultiplyAdd(w0, v2, value02);
                value12 = coopMultiplyAdd(w1, v2, value12);
            }
            if (COLUMNS > 3u) {
                let v3 = coopLoadT<Right>(&sh_stage[v_at + 3u * SPREAD * STEP], VALUE_PITCH);
                value03 = coopMultiplyAdd(w0, v3, value03);
                value13 = coopMultiplyAdd(w1, v3, value13);
            }
        }
        if (t >= keys.count) {
            break;
        }
        for (var b = 0u; b < TILE; b += SHARES * SIDE) {
            let key = b + share * SIDE;
            let k_at = key * KEY_PITCH;
            var score = coopMultiplyAdd(q0, coopLoad<Right>(&sh_stage[k_at], KEY_PITCH), zero);
            if (KEPT > 1u) {
                score = coopMultiplyAdd(q1, coopLoad<Right>(&sh_stage[k_at + 1u * STEP], KEY_PITCH), score);
            }
            if (KEPT > 2u) {
                score = coopMultiplyAdd(q2, coopLoad<Right>(&sh_stage[k_at + 2u * STEP], KEY_PITCH), score);
            }
            if (KEPT > 3u) {
                score = coopMultiplyAdd(q3, coopLoad<Right>(&sh_stage[k_at + 3u * STEP], KEY_PITCH), score);
            }
            if (KEPT > 4u) {
                score = coopMultiplyAdd(q4, coopLoad<Right>(&sh_stage[k_at + 4u * STEP], KEY_PITCH), score);
            }
            if (KEPT > 5u) {
                score = coopMultiplyAdd(q5, coopLoad<Right>(&sh_stage[k_at + 5u * STEP], KEY_PITCH), score);
            }
            if (KEPT > 6u) {
                score = coopMultiplyAdd(q6, coopLoad<Right>(&sh_stage[k_at + 6u * STEP], KEY_PITCH), score);
            }
            if (KEPT > 7u) {
                score = coopMultiplyAdd(q7, coopLoad<Right>(&sh_stage[k_at + 7u * STEP], KEY_PITCH), score);
            }
            for (var k = 0u; k < REST; k++) {
                let left = coopLoadT<Left>(&sh_stage[RESTS + row0 * REST_PITCH + k * STEP], REST_PITCH);
                score = coopMultiplyAdd(left, coopLoad<Right>(&sh_stage[k_at + (KEPT + k) * STEP], KEY_PITCH), score);
            }
            coopStoreT(score, &sh_scores[row0 * SCORE_PITCH + key], SCORE_PITCH);
        }
        // Some query does not see some key.
        let ragged = begin + t + TILE > position0 + 1u;
        if (ragged) {
            mark_all(local, flight, t, keys);
        }
        workgroupBarrier();

        stage_all_fours(local, flight, t, keys, ragged);
        // How many keys of this block the query sees, from the first: none for a query before the block.
        let seen = min(max(position0 + query + 1u, begin + t) - (begin + t), min(keys.count - t, TILE));
        var next = LOWEST;
        if (working) {
            for (var k = 0u; k < TILE; k += 4u * LANES) {
                let key = k + 4u * lane;
                let nth = vec4<u32>(key) + vec4<u32>(0u, 1u, 2u, 3u);
                let scores = four_scores(query * SCORE_PITCH + key);
                let four = select(vec4<f32>(LOWEST), scores, nth < vec4<u32>(seen));
                next = max(next, max(max(four.x, four.y), max(four.z, four.w)));
            }
        }
        for (var apart = 1u; apart < LANES; apart *= 2u) {
            next = max(next, subgroupShuffleXor(next, apart));
        }
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
                sh_factor[query] = shrink;
            }
            // WGSL allows no constant that is NaN.
            let nan = vec4<f32>(bitcast<f32>(0x7fc00000u | params.first));
            let zeros = vec4<f32>(0.0);
            for (var k = 0u; k < TILE; k += 4u * LANES) {
                let key = k + 4u * lane;
                let nth = vec4<u32>(key) + vec4<u32>(0u, 1u, 2u, 3u);
                let scores = four_scores(query * SCORE_PITCH + key);
                // A masked key has weight 0, not e^0.
                let unseen = nth >= vec4<u32>(seen);
                let p = select(exp(scores - best), zeros, unseen);
                sum += p.x + p.y + p.z + p.w;
                var weights = p;
                if (ragged) {
                    let marks = vec4<u32>(sh_poison[key], sh_poison[key + 1u], sh_poison[key + 2u], sh_poison[key + 3u]);
                    weights = select(select(p, nan, marks == vec4<u32>(t + 1u)), zeros, unseen);
                }
                stage_four(WEIGHTS + query * WEIGHT_PITCH + key / PLACE, weights);
            }
        }
        // Every block has a mark of its own, so that nobody needs to take the last one back.
        if (workgroupUniformLoad(&sh_scaled).x == t + 1u) {
            value00 = scaled(value00, 0u, local, own);
            value10 = scaled(value10, 1u, local, own);
            if (COLUMNS > 1u) {
                value01 = scaled(value01, 0u, local, own);
                value11 = scaled(value11, 1u, local, own);
            }
            if (COLUMNS > 2u) {
                value02 = scaled(value02, 0u, local, own);
                value12 = scaled(value12, 1u, local, own);
            }
            if (COLUMNS > 3u) {
                value03 = scaled(value03, 0u, local, own);
                value13 = scaled(value13, 1u, local, own);
            }
        }
    }

    for (var apart = 1u; apart < LANES; apart *= 2u) {
        sum += subgroupShuffleXor(sum, apart);
    }
    workgroupBarrier();
    if (working && lane == 0u) {
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
    end_values(value10, 1u, 0u, out, count, column0, local, own);
    if (COLUMNS > 1u) {
        end_values(value01, 0u, 1u, out, count, column0, local, own);
        end_values(value11, 1u, 1u, out, count, column0, local, own);
    }
    if (COLUMNS > 2u) {
        end_values(value02, 0u, 2u, out, count, column0, local, own);
        end_values(value12, 1u, 2u, out, count, column0, local, own);
    }
    if (COLUMNS > 3u) {
        end_values(value03, 0u, 3u, out, count, column0, local, own);
        end_values(value13, 1u, 3u, out, count, column0, local, own);
    }
}

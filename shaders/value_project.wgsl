// Combines the partial results of a query over the latents, and takes them through the value projection of its head.
//
//   m = max_s m_s    l = Σ_s l_s e^(m_s−m)    S = Σ_s e^(m_s−m) S_s / l    o[t, h] = W_V[h] S[t, h]
//
// Every workgroup combines anew: first, as in `attention_combine`, teams of lanes with four columns of S each and every TEAMS-th
// split; then LANES invocations share a column of o. More columns a workgroup read the partial results less often, fewer fill
// a device better. A query without any key gives 0. Floor: the partial results and W_V once each; for one query of 16 heads of 512
// in 64 splits 2 MB read 4 times from a cache, in place of a dispatch.
// grid: (⌈d_value / COLS⌉, n_head, tokens)
//
// Not run on a GPU yet.
// Static (RDNA3, Mesa 25), at most: 24 registers, 15 360 bytes of workgroup memory, nothing spilled.

override STORAGE_F16: u32 = 0u;
override FOURS: u32 = 16u;                                  // d_latent / 4
override TEAM: u32 = 16u;
override TEAMS: u32 = 4u;                                   // a power of two
override LANES: u32 = 8u;                                   // a power of two
override WORKGROUP: u32 = TEAM * TEAMS;
override COLS: u32 = WORKGROUP / LANES;
override JOINED: u32 = select(WORKGROUP, 1u, TEAMS == 1u);
override SUMS: u32 = select(WORKGROUP, 1u, LANES == 1u);
// Vectors of S for a 16-byte load of W_V.
override X_LOADS: u32 = 1u + STORAGE_F16;

const LOWEST: f32 = -3.4028234e38;

struct Params {
    tokens: u32,
    n_head: u32,
    d_value: u32,
    w_offset: u32,   // elements before W_V of the first head
    w_head: u32,     // from one head to the next
    tiles_x: u32,
    tiles_y: u32,
    tiles_z: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> partial_values: array<vec4<f32>>;   // [splits, n_head, d_latent / 4]
@group(0) @binding(2) var<storage, read> partial_softmax: array<vec2<f32>>;  // [splits, n_head] (m_s, l_s)
@group(0) @binding(3) var<storage, read> ranges: array<vec2<u32>>;           // [tokens] (first split, splits)
@group(0) @binding(4) var<storage, read> w: array<vec4<u32>>;                // (w_offset + h·w_head + n·d_latent + k) / 4, f16: / 8
@group(0) @binding(5) var<storage, read_write> values: array<f32>;           // [tokens, n_head, d_value]

// S of the query.
var<workgroup> sh_latent: array<vec4<f32>, FOURS>;
// What a lane has after its splits.
var<workgroup> sh_values: array<vec4<f32>, JOINED>;
var<workgroup> sh_state: array<vec2<f32>, JOINED>;   // (m, l)
var<workgroup> sh_sums: array<f32, SUMS>;

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

// Tile of the workgroup: a grid over 65 535 is folded into x and y.
fn unfold(group: vec3<u32>, groups: vec3<u32>) -> vec3<u32> {
    let tiles = vec3<u32>(params.tiles_x, params.tiles_y, params.tiles_z);
    if (all(groups == tiles)) {
        return group;
    }
    let i = group.y * groups.x + group.x;
    return vec3<u32>(i % tiles.x, i / tiles.x % tiles.y, i / (tiles.x * tiles.y));
}

// Columns of S from one on: a lane's four of them, once the teams have joined.
fn combine(local: u32, range: vec2<u32>, head: u32, first: u32) {
    let column = first + local % TEAM;
    var best = LOWEST;
    var sum = 0.0;
    var value = vec4<f32>(0.0);
    for (var split = local / TEAM; split < range.y; split += TEAMS) {
        let i = (range.x + split) * params.n_head + head;
        let state = partial_softmax[i];
        let next = max(best, state.x);
        let kept = exp(best - next);
        let weight = exp(state.x - next);
        best = next;
        sum = sum * kept + state.y * weight;
        if (column < FOURS) {
            value = value * kept + weight * partial_values[i * FOURS + column];
        }
    }
    if (TEAMS > 1u) {
        sh_values[local % JOINED] = value;
        sh_state[local % JOINED] = vec2<f32>(best, sum);
        for (var step = WORKGROUP / 2u; step >= TEAM; step /= 2u) {
            workgroupBarrier();
            if (local < step) {
                let state = sh_state[(local + step) % JOINED];
                let next = max(best, state.x);
                let kept = exp(best - next);
                let weight = exp(state.x - next);
                best = next;
                sum = sum * kept + state.y * weight;
                value = value * kept + weight * sh_values[(local + step) % JOINED];
                sh_values[local % JOINED] = value;
                sh_state[local % JOINED] = vec2<f32>(best, sum);
            }
        }
        workgroupBarrier();
    }
    if (local < TEAM && column < FOURS) {
        sh_latent[column] = value * select(0.0, 1.0 / sum, sum > 0.0);
    }
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
    let range = ranges[work.z];
    for (var first = 0u; first < FOURS; first += TEAM) {
        combine(local, range, work.y, first);
    }
    workgroupBarrier();
    let part = local % LANES;
    let n = work.x * COLS + local / LANES;
    // Columns past the last repeat it; their sums are not stored.
    let row = params.w_offset + work.y * params.w_head + min(n, params.d_value - 1u) * FOURS * 4u;
    let base = row / (4u * X_LOADS);
    var sum = 0.0;
    for (var k = part; k < FOURS / X_LOADS; k += LANES) {
        let load = w[base + k];
        sum += dot(first_of(load), sh_latent[k * X_LOADS]);
        if (STORAGE_F16 == 1u) {
            sum += dot(second_of(load), sh_latent[k * X_LOADS + X_LOADS - 1u]);
        }
    }
    if (LANES > 1u) {
        sh_sums[local % SUMS] = sum;
        for (var step = LANES / 2u; step > 0u; step /= 2u) {
            workgroupBarrier();
            if (part < step) {
                sum += sh_sums[(local + step) % SUMS];
                sh_sums[local % SUMS] = sum;
            }
        }
    }
    if (part == 0u && n < params.d_value) {
        values[(work.z * params.n_head + work.y) * params.d_value + n] = sum;
    }
}

// Combines the partial results of a query, and takes its values through the output projection of the layer.
//
//   m = max_s m_s    l = Σ_s l_s e^(m_s−m)    S[t, h] = Σ_s e^(m_s−m) S_s / l    y[t, n] = Σ_k w[n, k] S[t, k] + bias[n]
//
// Every workgroup combines all heads anew, each invocation four columns at a time with a running maximum, as in `attention_combine`;
// then LANES invocations share a column of y. A query without any key gives the bias. Floor: the partial results and w once each; for
// 12 heads of 64 in 32 splits each of 48 workgroups reads 98 kB of partial results from a cache, in place of a dispatch.
// grid: (⌈columns / COLS⌉, tokens, 1)
//
// Not run on a GPU yet.
// Static (RDNA3, Mesa 25), at most: 24 registers, 9 216 bytes of workgroup memory, nothing spilled.

override STORAGE_F16: u32 = 0u;
override HAS_BIAS: u32 = 0u;
override FOURS: u32 = 16u;       // n_head · d_value / 4
override WORKGROUP: u32 = 256u;
override LANES: u32 = 16u;       // invocations that share a column; a power of two
override COLS: u32 = WORKGROUP / LANES;
override SUMS: u32 = select(WORKGROUP, 1u, LANES == 1u);
// Vectors of S for a 16-byte load of w.
override X_LOADS: u32 = 1u + STORAGE_F16;

const LOWEST: f32 = -3.4028234e38;

struct Params {
    tokens: u32,
    n_head: u32,
    columns: u32,
    tiles_x: u32,
    tiles_y: u32,
    tiles_z: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> partial_values: array<vec4<f32>>;   // [splits, n_head · d_value / 4]
@group(0) @binding(2) var<storage, read> partial_softmax: array<vec2<f32>>;  // [splits, n_head] (m_s, l_s)
@group(0) @binding(3) var<storage, read> ranges: array<vec2<u32>>;           // [tokens] (first split, splits)
@group(0) @binding(4) var<storage, read> w: array<vec4<u32>>;                // [columns, n_head · d_value] / 4, f16: / 8
@group(0) @binding(5) var<storage, read> bias: array<u32>;                   // [columns], f16: / 2
@group(0) @binding(6) var<storage, read_write> y: array<f32>;                // [tokens, columns]

// S of all heads.
var<workgroup> sh_values: array<vec4<f32>, FOURS>;
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

// Four columns of S.
fn combined(column: u32, range: vec2<u32>) -> vec4<f32> {
    let head = column / (FOURS / params.n_head);
    var best = LOWEST;
    var sum = 0.0;
    var value = vec4<f32>(0.0);
    for (var split = range.x; split < range.x + range.y; split++) {
        let state = partial_softmax[split * params.n_head + head];
        let next = max(best, state.x);
        let kept = exp(best - next);
        let weight = exp(state.x - next);
        best = next;
        sum = sum * kept + state.y * weight;
        value = value * kept + weight * partial_values[split * FOURS + column];
    }
    return value * select(0.0, 1.0 / sum, sum > 0.0);
}

// Element n of the bias.
fn bias_at(n: u32) -> f32 {
    if (STORAGE_F16 == 1u) {
        let pair = unpack2x16float(bias[n >> 1u]);
        return select(pair.x, pair.y, (n & 1u) == 1u);
    }
    return bitcast<f32>(bias[n]);
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
    let token = work.y;
    let range = ranges[token];
    for (var column = local; column < FOURS; column += WORKGROUP) {
        sh_values[column] = combined(column, range);
    }
    workgroupBarrier();
    let part = local % LANES;
    let n = work.x * COLS + local / LANES;
    // Columns past the last repeat it; their sums are not stored.
    let base = min(n, params.columns - 1u) * (FOURS / X_LOADS);
    var sum = 0.0;
    for (var k = part; k < FOURS / X_LOADS; k += LANES) {
        let load = w[base + k];
        sum += dot(first_of(load), sh_values[k * X_LOADS]);
        if (STORAGE_F16 == 1u) {
            sum += dot(second_of(load), sh_values[k * X_LOADS + X_LOADS - 1u]);
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
    if (part == 0u && n < params.columns) {
        if (HAS_BIAS == 1u) {
            sum += bias_at(n);
        }
        y[token * params.columns + n] = sum;
    }
}

// Queries of a low rank for few tokens: norm of the latent, product, rotation.
//
//   q[t, n] = ρ_t Σ_k w[n, k] · weight[k] · x[t, k]        ρ_t = 1/√(mean(x[t]²) + eps)        then the pairs of q_R[t, h] rotated
//
// The norm's factor leaves the sum, so that the squares are summed along with the products and x is read once.
// grid: (⌈columns / COLS⌉, ⌈tokens / 4⌉, 1)
// LANES invocations share 4 columns of q, each summing every LANES-th load; a workgroup has COLS = 4 · WORKGROUP / LANES columns. Floor:
// the weights, read once per 4 tokens. Not run on a GPU yet.

override STORAGE_F16: u32 = 0u;
override SINGLE: u32 = 0u;      // 1: there is one token, and no code for more
override WORKGROUP: u32 = 64u;
override LANES: u32 = 16u;      // a power of two
override GROUPS: u32 = WORKGROUP / LANES;
// 16-byte loads of x for one of w.
override X_LOADS: u32 = 1u + STORAGE_F16;
override TOKENS: u32 = select(4u, 1u, SINGLE == 1u);
// One invocation per column has nothing to add up.
override SUMS: u32 = select(WORKGROUP * (TOKENS + 1u), 1u, LANES == 1u);

struct Params {
    tokens: u32,
    rank: u32,        // padding included
    used: u32,        // elements of a latent without its padding
    x_row: u32,       // elements of x from one token to the next
    columns: u32,     // of all heads
    d_nope: u32,      // elements of a head before its rotary part
    d_rope: u32,
    eps: f32,
    tiles_x: u32,
    tiles_y: u32,
    tiles_z: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;            // (t·x_row + k) / 4
@group(0) @binding(2) var<storage, read> weight: array<vec4<u32>>;       // [rank] / 4, f16: / 8
@group(0) @binding(3) var<storage, read> w: array<vec4<u32>>;            // [columns, rank] / 4, f16: / 8
@group(0) @binding(4) var<storage, read> rotations: array<vec4<f32>>;    // [tokens, d_rope / 4] (cos, sin) of two pairs
@group(0) @binding(5) var<storage, read_write> q: array<vec4<f32>>;      // [tokens, columns] / 4

// sh_sums[j·WORKGROUP + lane]: four columns of token j; behind them the squares, one component per token.
var<workgroup> sh_sums: array<vec4<f32>, SUMS>;

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

// Pairs (x, y) and (z, w), rotated by (cos, sin, cos, sin).
fn rotated(v: vec4<f32>, by: vec4<f32>) -> vec4<f32> {
    return v.xxzz * by + v.yyww * by.yxwz * vec4<f32>(-1.0, 1.0, -1.0, 1.0);
}

// Products of four columns with 4 elements of a latent.
fn column_products(w0: vec4<f32>, w1: vec4<f32>, w2: vec4<f32>, w3: vec4<f32>, v: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(dot(w0, v), dot(w1, v), dot(w2, v), dot(w3, v));
}

// Four columns of a token: scaled, rotated, stored.
fn finish_columns(token: u32, column: u32, sum: vec4<f32>, squares: f32) {
    var v = sum * inverseSqrt(squares / f32(params.used) + params.eps);
    let at = column % (params.d_nope + params.d_rope);
    if (at >= params.d_nope) {
        v = rotated(v, rotations[(token * params.d_rope + at - params.d_nope) / 4u]);
    }
    q[(token * params.columns + column) / 4u] = v;
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
    let part = lane % LANES;
    let t0 = work.y * 4u;
    let count = select(min(params.tokens - t0, 4u), 1u, SINGLE == 1u);
    let column = (work.x * GROUPS + lane / LANES) * 4u;
    let loads = params.rank / (4u * X_LOADS);

    // Columns past the last repeat it; they are not stored.
    let w0 = min(column, params.columns - 4u) * loads;
    let w1 = w0 + loads;
    let w2 = w1 + loads;
    let w3 = w2 + loads;
    // Tokens past the last repeat it.
    let pitch = params.x_row / 4u;
    let x0 = t0 * pitch;
    let x1 = x0 + min(1u, count - 1u) * pitch;
    let x2 = x0 + min(2u, count - 1u) * pitch;
    let x3 = x0 + min(3u, count - 1u) * pitch;

    var acc0 = vec4<f32>(0.0);
    var acc1 = vec4<f32>(0.0);
    var acc2 = vec4<f32>(0.0);
    var acc3 = vec4<f32>(0.0);
    var squares = vec4<f32>(0.0);
    for (var k = part; k < loads; k += LANES) {
        let scale = weight[k];
        let l0 = w[w0 + k];
        let l1 = w[w1 + k];
        let l2 = w[w2 + k];
        let l3 = w[w3 + k];
        for (var half = 0u; half < X_LOADS; half++) {
            var s = first_of(scale);
            var a = first_of(l0);
            var b = first_of(l1);
            var c = first_of(l2);
            var d = first_of(l3);
            if (half == 1u) {
                s = second_of(scale);
                a = second_of(l0);
                b = second_of(l1);
                c = second_of(l2);
                d = second_of(l3);
            }
            let i = k * X_LOADS + half;
            let v0 = x[x0 + i];
            squares.x += dot(v0, v0);
            acc0 += column_products(a, b, c, d, v0 * s);
            if (SINGLE == 0u) {
                let v1 = x[x1 + i];
                let v2 = x[x2 + i];
                let v3 = x[x3 + i];
                squares += vec4<f32>(0.0, dot(v1, v1), dot(v2, v2), dot(v3, v3));
                acc1 += column_products(a, b, c, d, v1 * s);
                acc2 += column_products(a, b, c, d, v2 * s);
                acc3 += column_products(a, b, c, d, v3 * s);
            }
        }
    }
    if (LANES > 1u) {
        sh_sums[lane] = acc0;
        sh_sums[TOKENS * WORKGROUP + lane] = squares;
        if (SINGLE == 0u) {
            sh_sums[WORKGROUP + lane] = acc1;
            sh_sums[2u * WORKGROUP + lane] = acc2;
            sh_sums[3u * WORKGROUP + lane] = acc3;
        }
        for (var step = LANES / 2u; step > 0u; step /= 2u) {
            workgroupBarrier();
            if (part < step) {
                for (var j = 0u; j <= TOKENS; j++) {
                    sh_sums[j * WORKGROUP + lane] += sh_sums[j * WORKGROUP + lane + step];
                }
            }
        }
        if (part == 0u) {
            acc0 = sh_sums[lane];
            squares = sh_sums[TOKENS * WORKGROUP + lane];
            if (SINGLE == 0u) {
                acc1 = sh_sums[WORKGROUP + lane];
                acc2 = sh_sums[2u * WORKGROUP + lane];
                acc3 = sh_sums[3u * WORKGROUP + lane];
            }
        }
    }
    if (part > 0u || column >= params.columns) {
        return;
    }
    finish_columns(t0, column, acc0, squares.x);
    if (SINGLE == 0u && count > 1u) {
        finish_columns(t0 + 1u, column, acc1, squares.y);
    }
    if (SINGLE == 0u && count > 2u) {
        finish_columns(t0 + 2u, column, acc2, squares.z);
    }
    if (SINGLE == 0u && count > 3u) {
        finish_columns(t0 + 3u, column, acc3, squares.w);
    }
}

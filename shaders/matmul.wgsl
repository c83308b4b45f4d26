// Matrix product with a tile of y per workgroup, for many matrix rows.
//
//   y[b, m, n] = Σ_k x[b, m, k] · w[b, n, k] + bias[n]
//
// Any strides: w is [cols, inner] as checkpoints store it (w_col = inner, w_inner = 1), or transposed (w_col = 1).
// Floor: rows · cols · inner multiply-adds, 43 µs of 1024³ on an H200. This variant is for strides that matmul_vec4 does not
// take: 8 reads of 4 bytes from workgroup memory serve 16 multiply-adds, twice their cycles where lanes share no address.
// grid: (⌈cols / TILE_N⌉, ⌈rows / TILE_M⌉, batch); each invocation owns 4 × 4 elements of y, WG_Y and WG_X apart.
// Static (RDNA3, Mesa 25), at most: 60 registers, 8 704 bytes of workgroup memory, nothing spilled.
// Not measured on a GPU.

override STORAGE_F16: u32 = 0u;
override HAS_BIAS: u32 = 0u;
override WG_X: u32 = 16u;
override WG_Y: u32 = 16u;
override TILE_K: u32 = 16u;
override TILE_M: u32 = WG_Y * 4u;
override TILE_N: u32 = WG_X * 4u;
// One element of padding per k: the transposing store would hit one bank otherwise.
override PITCH_M: u32 = TILE_M + 1u;
override PITCH_N: u32 = TILE_N + 1u;

struct Params {
    rows: u32,       // matrix rows: m is below it
    inner: u32,      // k is below it
    cols: u32,       // n is below it
    x_offset: u32,
    x_row: u32,
    x_batch: u32,
    w_offset: u32,
    w_col: u32,
    w_inner: u32,
    w_batch: u32,
    y_offset: u32,
    y_row: u32,
    y_batch: u32,
    tiles_x: u32,
    tiles_y: u32,
    tiles_z: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;           // x_offset + b·x_batch + m·x_row + k
@group(0) @binding(2) var<storage, read> w: array<u32>;           // w_offset + b·w_batch + n·w_col + k·w_inner
@group(0) @binding(3) var<storage, read> bias: array<u32>;        // [cols]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;     // y_offset + b·y_batch + m·y_row + n

var<workgroup> sh_x: array<f32, TILE_K * PITCH_M>;
var<workgroup> sh_w: array<f32, TILE_K * PITCH_N>;

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

// Each component of a times b, one column each.
fn outer(a: vec4<f32>, b: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(a.x * b, a.y * b, a.z * b, a.w * b);
}

// Column i of a matrix, without an index into registers.
fn column_of(m: mat4x4<f32>, i: u32) -> vec4<f32> {
    return select(select(m[0], m[1], i == 1u), select(m[2], m[3], i == 3u), i >= 2u);
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

@compute @workgroup_size(WG_X, WG_Y, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let work = unfold(group, groups);
    if (work.z >= params.tiles_z) {
        return;
    }
    let lane = local.y * WG_X + local.x;
    let lanes = WG_X * WG_Y;
    let m0 = work.y * TILE_M;
    let n0 = work.x * TILE_N;
    let x_base = params.x_offset + work.z * params.x_batch;
    let w_base = params.w_offset + work.z * params.w_batch;

    // acc[i][j] is y[m0 + local.y + i·WG_Y, n0 + local.x + j·WG_X].
    var acc = mat4x4<f32>();
    for (var k0 = 0u; k0 < params.inner; k0 += TILE_K) {
        for (var e = lane; e < TILE_K * TILE_M; e += lanes) {
            let k = e % TILE_K;
            let m = e / TILE_K;
            var value = 0.0;
            if (k0 + k < params.inner && m0 + m < params.rows) {
                value = x[x_base + (m0 + m) * params.x_row + k0 + k];
            }
            sh_x[k * PITCH_M + m] = value;
        }
        for (var e = lane; e < TILE_K * TILE_N; e += lanes) {
            let k = e % TILE_K;
            let n = e / TILE_K;
            var value = 0.0;
            if (k0 + k < params.inner && n0 + n < params.cols) {
                let i = w_base + (n0 + n) * params.w_col + (k0 + k) * params.w_inner;
                value = decode(w[index_of(i)], i);
            }
            sh_w[k * PITCH_N + n] = value;
        }
        workgroupBarrier();
        for (var k = 0u; k < TILE_K; k++) {
            let n = k * PITCH_N + local.x;
            let wv = vec4<f32>(sh_w[n], sh_w[n + WG_X], sh_w[n + 2u * WG_X], sh_w[n + 3u * WG_X]);
            let m = k * PITCH_M + local.y;
            let xv = vec4<f32>(sh_x[m], sh_x[m + WG_Y], sh_x[m + 2u * WG_Y], sh_x[m + 3u * WG_Y]);
            acc += outer(xv, wv);
        }
        workgroupBarrier();
    }

    for (var i = 0u; i < 4u; i++) {
        let m = m0 + local.y + i * WG_Y;
        let sums = column_of(acc, i);
        for (var j = 0u; j < 4u; j++) {
            let n = n0 + local.x + j * WG_X;
            if (m < params.rows && n < params.cols) {
                var value = sums[j];
                if (HAS_BIAS == 1u) {
                    value += decode(bias[index_of(n)], n);
                }
                y[params.y_offset + work.z * params.y_batch + m * params.y_row + n] = value;
            }
        }
    }
}

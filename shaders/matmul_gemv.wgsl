// Matrix product for few matrix rows: each weight is read once for up to 4 of them.
//
//   y[b, m, n] = Σ_k x[b, m, k] · w[b, n, k] + bias[n]
//
// Floor: the bytes of w, once per 4 matrix rows, over the copy rate: 1 µs of 1024 × 1024 in f32 on an H200, so that the dispatch
// is what counts. This variant is for strides that matmul_gemv_vec4 does not take.
// grid: (⌈cols / COLS⌉, ⌈rows / 4⌉, batch)
// LANES invocations share a column of y, each summing every LANES-th k; a workgroup has COLS = WORKGROUP / LANES columns.
// Static (RDNA3, Mesa 25), at most: 48 registers, 2 048 bytes of workgroup memory, nothing spilled.
// On an H200 at commit 10d32d5: 12 transposed products of 64 × 256 in f16, some 14 µs. Not measured since.

override STORAGE_F16: u32 = 0u;
override HAS_BIAS: u32 = 0u;
override WORKGROUP: u32 = 64u;
override LANES: u32 = 8u;
override COLS: u32 = WORKGROUP / LANES;

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

var<workgroup> sh_acc: array<vec4<f32>, WORKGROUP>;

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
    let part = lane % LANES;
    let n = work.x * COLS + lane / LANES;
    let m0 = work.y * 4u;
    let count = min(params.rows - m0, 4u);
    var acc = vec4<f32>(0.0);
    if (n < params.cols) {
        let w_base = params.w_offset + work.z * params.w_batch + n * params.w_col;
        let x_base = params.x_offset + work.z * params.x_batch + m0 * params.x_row;
        if (count == 1u) {
            for (var k = part; k < params.inner; k += LANES) {
                let i = w_base + k * params.w_inner;
                acc.x += decode(w[index_of(i)], i) * x[x_base + k];
            }
        } else {
            // Matrix rows past the last repeat it; their sums are not stored.
            let x1 = x_base + min(1u, count - 1u) * params.x_row;
            let x2 = x_base + min(2u, count - 1u) * params.x_row;
            let x3 = x_base + min(3u, count - 1u) * params.x_row;
            for (var k = part; k < params.inner; k += LANES) {
                let i = w_base + k * params.w_inner;
                acc += decode(w[index_of(i)], i) * vec4<f32>(x[x_base + k], x[x1 + k], x[x2 + k], x[x3 + k]);
            }
        }
    }
    sh_acc[lane] = acc;
    workgroupBarrier();
    if (part == 0u && n < params.cols) {
        for (var p = 1u; p < LANES; p++) {
            acc += sh_acc[lane + p];
        }
        if (HAS_BIAS == 1u) {
            acc += vec4<f32>(decode(bias[index_of(n)], n));
        }
        let y_base = params.y_offset + work.z * params.y_batch + m0 * params.y_row + n;
        let sums = acc;
        for (var m = 0u; m < count; m++) {
            y[y_base + m * params.y_row] = sums[m];
        }
    }
}

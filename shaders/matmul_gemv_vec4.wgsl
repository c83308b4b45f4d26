// Matrix product for few matrix rows, where those of x and w begin on 16-byte boundaries: each weight is read once for up to 4
// matrix rows of x, in 16-byte loads.
//
//   y[b, m, n] = Σ_k x[b, m, k] · w[b, n, k] + bias[n]
//
// Floor: as matmul_gemv, the bytes of w: each 16 of them serve 4 or 8 multiply-adds per matrix row.
// grid: (⌈cols / COLS⌉, ⌈rows / 4⌉, batch)
// LANES invocations share 4 columns of y, each summing every LANES-th load; a workgroup has COLS = 4 · WORKGROUP / LANES columns.
//
// Results, medians of interleaved runs on lavapipe (2 cores), against `matmul_gemv`, one matrix row: 8 invocations with 4
// columns each, none shared, 2.6 to 3.2 times as fast in f32, 3.6 in f16; 64 of them 2.4 to 2.5; 8 that share their columns 2.1
// to 2.5 in f32, 3.7 in f16. Four and eight matrix rows: 3.1. Not run on a GPU yet.
// Static (RDNA3, Mesa 25), at most: 72 registers, 8 192 bytes of workgroup memory, nothing spilled.

override STORAGE_F16: u32 = 0u;
override HAS_BIAS: u32 = 0u;
override SINGLE: u32 = 0u;   // 1: there is one matrix row, and no code for more
override WORKGROUP: u32 = 64u;
override LANES: u32 = 16u;
override GROUPS: u32 = WORKGROUP / LANES;
override COLS: u32 = GROUPS * 4u;
// 16-byte loads of x for one of w.
override X_LOADS: u32 = 1u + STORAGE_F16;
// One invocation per column has nothing to add up.
override SUMS: u32 = select(WORKGROUP * 4u, 1u, LANES == 1u);

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
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;     // (x_offset + b·x_batch + m·x_row + k) / 4
@group(0) @binding(2) var<storage, read> w: array<vec4<u32>>;     // (w_offset + b·w_batch + n·w_col + k) / 4, f16: / 8
@group(0) @binding(3) var<storage, read> bias: array<u32>;        // [cols]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;     // y_offset + b·y_batch + m·y_row + n

var<workgroup> sh_acc: array<vec4<f32>, SUMS>;

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
    let own = lane / LANES;
    let m0 = work.y * 4u;
    let count = select(min(params.rows - m0, 4u), 1u, SINGLE == 1u);
    let n0 = work.x * COLS + own;
    let loads = params.inner / (4u * X_LOADS);

    // Columns past the last repeat it; their sums are not stored.
    let last = params.cols - 1u;
    let ns = min(vec4<u32>(n0, n0 + GROUPS, n0 + 2u * GROUPS, n0 + 3u * GROUPS), vec4<u32>(last));
    let at = (vec4<u32>(params.w_offset + work.z * params.w_batch) + ns * params.w_col) / (4u * X_LOADS);
    let x0 = (params.x_offset + work.z * params.x_batch + m0 * params.x_row) / 4u;

    // accJ[m] is y[m0 + m, n0 + J·GROUPS].
    var acc0 = vec4<f32>(0.0);
    var acc1 = vec4<f32>(0.0);
    var acc2 = vec4<f32>(0.0);
    var acc3 = vec4<f32>(0.0);
    if (SINGLE == 1u || count == 1u) {
        for (var k = part; k < loads; k += LANES) {
            let w0 = w[at.x + k];
            let w1 = w[at.y + k];
            let w2 = w[at.z + k];
            let w3 = w[at.w + k];
            let a = x[x0 + k * X_LOADS];
            acc0.x += dot(first_of(w0), a);
            acc1.x += dot(first_of(w1), a);
            acc2.x += dot(first_of(w2), a);
            acc3.x += dot(first_of(w3), a);
            if (STORAGE_F16 == 1u) {
                let b = x[x0 + k * X_LOADS + 1u];
                acc0.x += dot(second_of(w0), b);
                acc1.x += dot(second_of(w1), b);
                acc2.x += dot(second_of(w2), b);
                acc3.x += dot(second_of(w3), b);
            }
        }
    } else {
        // Matrix rows past the last repeat it; their sums are not stored.
        let pitch = params.x_row / 4u;
        let x1 = x0 + min(1u, count - 1u) * pitch;
        let x2 = x0 + min(2u, count - 1u) * pitch;
        let x3 = x0 + min(3u, count - 1u) * pitch;
        for (var k = part; k < loads; k += LANES) {
            let w0 = w[at.x + k];
            let w1 = w[at.y + k];
            let w2 = w[at.z + k];
            let w3 = w[at.w + k];
            for (var half = 0u; half < X_LOADS; half++) {
                let i = k * X_LOADS + half;
                // A column of a is one k of the four matrix rows.
                let a = transpose(mat4x4<f32>(x[x0 + i], x[x1 + i], x[x2 + i], x[x3 + i]));
                if (half == 0u) {
                    acc0 += a * first_of(w0);
                    acc1 += a * first_of(w1);
                    acc2 += a * first_of(w2);
                    acc3 += a * first_of(w3);
                } else {
                    acc0 += a * second_of(w0);
                    acc1 += a * second_of(w1);
                    acc2 += a * second_of(w2);
                    acc3 += a * second_of(w3);
                }
            }
        }
    }

    let y_base = params.y_offset + work.z * params.y_batch + m0 * params.y_row;
    if (LANES == 1u) {
        for (var j = 0u; j < 4u; j++) {
            let n = n0 + j * GROUPS;
            if (n < params.cols) {
                var sums = select(select(acc2, acc3, j == 3u), select(acc0, acc1, j == 1u), j < 2u);
                if (HAS_BIAS == 1u) {
                    sums += vec4<f32>(decode(bias[index_of(n)], n));
                }
                let stored = sums;
                for (var m = 0u; m < count; m++) {
                    y[y_base + m * params.y_row + n] = stored[m];
                }
            }
        }
    } else {
        // sh_acc[(j·GROUPS + own)·LANES + part]: the parts of a column side by side.
        sh_acc[own * LANES + part] = acc0;
        sh_acc[(GROUPS + own) * LANES + part] = acc1;
        sh_acc[(2u * GROUPS + own) * LANES + part] = acc2;
        sh_acc[(3u * GROUPS + own) * LANES + part] = acc3;
        workgroupBarrier();
        for (var e = lane; e < COLS * count; e += WORKGROUP) {
            let m = e / COLS;
            let n = work.x * COLS + e % COLS;
            if (n < params.cols) {
                var sum = 0.0;
                for (var p = 0u; p < LANES; p++) {
                    sum += sh_acc[(e % COLS) * LANES + p][m];
                }
                if (HAS_BIAS == 1u) {
                    sum += decode(bias[index_of(n)], n);
                }
                y[y_base + m * params.y_row + n] = sum;
            }
        }
    }
}

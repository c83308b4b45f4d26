// Matrix product with a large tile of y per workgroup, for many matrix rows, where those of x and w begin on
// 16-byte boundaries.
//
//   y[b, m, n] = Σ_k x[b, m, k] · w[b, n, k] + bias[n]
//
// grid: (⌈cols / TILE_N⌉, ⌈rows / TILE_M⌉, batch); each invocation owns 8 × 8 elements of y, in four blocks of 4 × 4.
// 16 k at a time go through workgroup memory: each invocation reads 16 bytes of four matrix rows, transposes the 4 × 4 block and
// stores it in 16-byte pieces. One k of a tile then costs it four 16-byte reads for 64 multiply-adds.
//
// Results, medians of interleaved runs on lavapipe (2 cores), against the staged 4 × 4 tile of `matmul`: 2.8 to 3.8 times as
// fast, f32 and f16, the 16 × 16 workgroup up to 1.2 times the 8 × 8. Not run on a GPU yet.

override STORAGE_F16: u32 = 0u;
override HAS_BIAS: u32 = 0u;
override WG_X: u32 = 8u;
override WG_Y: u32 = 8u;
override TILE_M: u32 = WG_Y * 8u;
override TILE_N: u32 = WG_X * 8u;
// Four matrix rows, or four columns, are a quad: 16 bytes of one k.
override QUADS_M: u32 = WG_Y * 2u;
override QUADS_N: u32 = WG_X * 2u;
// 16-byte loads of w that make 16 k: four of f32, two of f16.
override W_LOADS: u32 = 4u - 2u * STORAGE_F16;
override X_BLOCKS: u32 = QUADS_M * 4u;
override W_BLOCKS: u32 = QUADS_N * W_LOADS;

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

var<workgroup> sh_x: array<vec4<f32>, 16u * QUADS_M>;
var<workgroup> sh_w: array<vec4<f32>, 16u * QUADS_N>;

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

// Place of a quad among those of one k: without it, the four lanes that store neighbouring k of a quad would hit one bank.
fn place(quad: u32, k: u32) -> u32 {
    return quad ^ ((k >> 2u) << 1u);
}

// Stores four matrix rows of four k as four k of four matrix rows, from k of the tile on.
fn store_x(k: u32, quad: u32, block: mat4x4<f32>) {
    let transposed = transpose(block);
    let at = k * QUADS_M + place(quad, k);
    sh_x[at] = transposed[0];
    sh_x[at + QUADS_M] = transposed[1];
    sh_x[at + 2u * QUADS_M] = transposed[2];
    sh_x[at + 3u * QUADS_M] = transposed[3];
}

fn store_w(k: u32, quad: u32, block: mat4x4<f32>) {
    let transposed = transpose(block);
    let at = k * QUADS_N + place(quad, k);
    sh_w[at] = transposed[0];
    sh_w[at + QUADS_N] = transposed[1];
    sh_w[at + 2u * QUADS_N] = transposed[2];
    sh_w[at + 3u * QUADS_N] = transposed[3];
}

// Each component of a times b, one column each.
fn outer(a: vec4<f32>, b: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(a.x * b, a.y * b, a.z * b, a.w * b);
}

// Column i of a matrix, without an index into registers.
fn column_of(m: mat4x4<f32>, i: u32) -> vec4<f32> {
    return select(select(m[0], m[1], i == 1u), select(m[2], m[3], i == 3u), i >= 2u);
}

fn store_y(base: u32, m0: u32, n0: u32, block: mat4x4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        let sums = column_of(block, i);
        for (var j = 0u; j < 4u; j++) {
            let m = m0 + i;
            let n = n0 + j;
            if (m < params.rows && n < params.cols) {
                var value = sums[j];
                if (HAS_BIAS == 1u) {
                    value += decode(bias[index_of(n)], n);
                }
                y[base + m * params.y_row + n] = value;
            }
        }
    }
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
    let m0 = work.y * TILE_M;
    let n0 = work.x * TILE_N;
    let x_base = params.x_offset + work.z * params.x_batch;
    let w_base = params.w_offset + work.z * params.w_batch;
    // Matrix rows and columns past the last repeat it; their sums are not stored.
    let last_m = vec4<u32>(params.rows - 1u);
    let last_n = vec4<u32>(params.cols - 1u);
    let each = vec4<u32>(0u, 1u, 2u, 3u);

    // accIJ is y[m0 + 4·(local.y + I·WG_Y) + 0..4, n0 + 4·(local.x + J·WG_X) + 0..4].
    var acc00 = mat4x4<f32>();
    var acc01 = mat4x4<f32>();
    var acc10 = mat4x4<f32>();
    var acc11 = mat4x4<f32>();
    for (var k0 = 0u; k0 < params.inner; k0 += 16u) {
        for (var e = lane; e < X_BLOCKS + W_BLOCKS; e += WG_X * WG_Y) {
            // Four neighbouring lanes read 64 bytes of a matrix row, or two lanes 32 bytes.
            if (e < X_BLOCKS) {
                let k = (e % 4u) * 4u;
                let quad = e / 4u;
                var block = mat4x4<f32>();
                if (k0 + k < params.inner) {
                    let m = min(vec4<u32>(m0 + 4u * quad) + each, last_m);
                    let i = (vec4<u32>(x_base + k0 + k) + m * params.x_row) / 4u;
                    block = mat4x4<f32>(x[i.x], x[i.y], x[i.z], x[i.w]);
                }
                store_x(k, quad, block);
            } else {
                let k = ((e - X_BLOCKS) % W_LOADS) * (16u / W_LOADS);
                let quad = (e - X_BLOCKS) / W_LOADS;
                var loads = array<vec4<u32>, 4>();
                if (k0 + k < params.inner) {
                    let n = min(vec4<u32>(n0 + 4u * quad) + each, last_n);
                    let i = (vec4<u32>(w_base + k0 + k) + n * params.w_col) / (16u / W_LOADS);
                    loads = array<vec4<u32>, 4>(w[i.x], w[i.y], w[i.z], w[i.w]);
                }
                let first = mat4x4<f32>(first_of(loads[0]), first_of(loads[1]), first_of(loads[2]), first_of(loads[3]));
                store_w(k, quad, first);
                if (STORAGE_F16 == 1u) {
                    let second =
                        mat4x4<f32>(second_of(loads[0]), second_of(loads[1]), second_of(loads[2]), second_of(loads[3]));
                    store_w(k + 4u, quad, second);
                }
            }
        }
        workgroupBarrier();
        for (var k = 0u; k < 16u; k++) {
            let a0 = sh_x[k * QUADS_M + place(local.y, k)];
            let a1 = sh_x[k * QUADS_M + place(local.y + WG_Y, k)];
            let b0 = sh_w[k * QUADS_N + place(local.x, k)];
            let b1 = sh_w[k * QUADS_N + place(local.x + WG_X, k)];
            acc00 += outer(a0, b0);
            acc01 += outer(a0, b1);
            acc10 += outer(a1, b0);
            acc11 += outer(a1, b1);
        }
        workgroupBarrier();
    }

    let y_base = params.y_offset + work.z * params.y_batch;
    let m = m0 + 4u * local.y;
    let n = n0 + 4u * local.x;
    store_y(y_base, m, n, acc00);
    store_y(y_base, m, n + 4u * WG_X, acc01);
    store_y(y_base, m + 4u * WG_Y, n, acc10);
    store_y(y_base, m + 4u * WG_Y, n + 4u * WG_X, acc11);
}

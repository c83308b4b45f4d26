// Matrix product by cooperative matrices of 8 × 8: f16 weights, x rounded to f16, sums in f32.
//
//   y[b, m, n] = Σ_k f16(x[b, m, k]) · w[b, n, k] + bias[n]
//
// grid: (⌈cols / TILE⌉, ⌈rows / TILE⌉, batch); four subgroups own a quarter of a tile each, FRAGMENTS × FRAGMENTS matrices of y.
// Further subgroups repeat a quarter, and store the same: matrices need control flow that is uniform in the workgroup.
// A tile is 64 × 64 with 32 k staged at once, or 32 × 32 with 64.
// Matrix rows of x and w begin on 16-byte boundaries and are whole numbers of 8 elements.
//
// On lavapipe (Mesa 26, 2 cores): a quarter of the rate of matmul_subgroup, and seconds to compile. Not run on a GPU yet.
// With 64 × 64, 8 matrices loaded from workgroup memory serve 16 multiply-adds; sums take 32 registers per lane of 32. Staged
// matrix rows are 80 or 144 bytes apart: 16 bytes of 8 of them use each of 32 banks once. Halves are staged one by one, since Metal's
// loads of matrices, as naga writes them, take no pointer to a vector.

enable f16;
enable wgpu_cooperative_matrix;

override HAS_BIAS: u32 = 0u;
override WORKGROUP: u32 = 128u;                  // four subgroups or more
override FRAGMENTS: u32 = 4u;                    // matrices along each side of a subgroup's tile: 4 or 2
override TILE: u32 = FRAGMENTS * 16u;
override TILE_K: u32 = 128u / FRAGMENTS;
override QUADS: u32 = TILE_K / 4u;               // k staged at once, in fours; a tile has 512
override PITCH: u32 = TILE_K + 8u;

const SIDE: u32 = 8u;
const MATRIX: u32 = SIDE * SIDE;

// Matrices of factors, and of sums.
alias Left = coop_mat8x8<f16, A>;
alias Right = coop_mat8x8<f16, B>;
alias Sums = coop_mat8x8<f32, C>;

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
@group(0) @binding(2) var<storage, read> w: array<vec4<f16>>;     // (w_offset + b·w_batch + n·w_col + k) / 4
@group(0) @binding(3) var<storage, read> bias: array<f16>;        // [cols]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;     // y_offset + b·y_batch + m·y_row + n

var<workgroup> sh_x: array<f16, TILE * PITCH>;  // [m, k]
var<workgroup> sh_w: array<f16, TILE * PITCH>;  // [n, k]
var<workgroup> sh_y: array<f32, 4u * MATRIX>;    // one matrix per subgroup

// Four elements of x for quad e of the tile; 0 past the last k. Matrix rows past the last repeat it.
fn x_quad(e: u32, m0: u32, k0: u32, base: u32) -> vec4<f32> {
    let k = k0 + e % QUADS * 4u;
    if (e < TILE * QUADS && k < params.inner) {
        return x[(base + min(m0 + e / QUADS, params.rows - 1u) * params.x_row + k) / 4u];
    }
    return vec4<f32>(0.0);
}

// Of w, likewise.
fn w_quad(e: u32, n0: u32, k0: u32, base: u32) -> vec4<f16> {
    let k = k0 + e % QUADS * 4u;
    if (e < TILE * QUADS && k < params.inner) {
        return w[(base + min(n0 + e / QUADS, params.cols - 1u) * params.w_col + k) / 4u];
    }
    return vec4<f16>();
}

// Stages quad e of both, half by half.
fn stage_halves(e: u32, x_four: vec4<f32>, w_four: vec4<f16>) {
    if (e < TILE * QUADS) {
        let at = e / QUADS * PITCH + e % QUADS * 4u;
        let halves = vec4<f16>(x_four);
        sh_x[at] = halves.x;
        sh_x[at + 1u] = halves.y;
        sh_x[at + 2u] = halves.z;
        sh_x[at + 3u] = halves.w;
        sh_w[at] = w_four.x;
        sh_w[at + 1u] = w_four.y;
        sh_w[at + 2u] = w_four.z;
        sh_w[at + 3u] = w_four.w;
    }
}

// Starts matrices (…, j) of each subgroup: every matrix row is the bias, or 0.
fn begin_column(j: u32, n0: u32, local: u32) {
    workgroupBarrier();
    for (var e = local; e < 4u * MATRIX; e += WORKGROUP) {
        var value = 0.0;
        if (HAS_BIAS == 1u) {
            let n = n0 + (e / MATRIX % 2u * FRAGMENTS + j) * SIDE + e % SIDE;
            value = f32(bias[min(n, params.cols - 1u)]);
        }
        sh_y[e] = value;
    }
    workgroupBarrier();
}

// Writes matrix (i, j) of each subgroup.
fn put(sums: Sums, i: u32, j: u32, m0: u32, n0: u32, base: u32, local: u32, own: u32) {
    coopStoreT(sums, &sh_y[MATRIX * own], SIDE);
    workgroupBarrier();
    for (var e = local; e < 4u * MATRIX; e += WORKGROUP) {
        let m = m0 + (e / (2u * MATRIX) * FRAGMENTS + i) * SIDE + e % MATRIX / SIDE;
        let n = n0 + (e / MATRIX % 2u * FRAGMENTS + j) * SIDE + e % SIDE;
        if (m < params.rows && n < params.cols) {
            y[base + m * params.y_row + n] = sh_y[e];
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
    let m0 = work.y * TILE;
    let n0 = work.x * TILE;
    let x_base = params.x_offset + work.z * params.x_batch;
    let w_base = params.w_offset + work.z * params.w_batch;
    let y_base = params.y_offset + work.z * params.y_batch;
    // Where the matrix rows and columns of a subgroup's quarter are staged.
    let own = subgroup % 4u;
    let own_x = own / 2u * FRAGMENTS * SIDE * PITCH;
    let own_w = own % 2u * FRAGMENTS * SIDE * PITCH;
    let next = SIDE * PITCH;

    // sumIJ: matrix rows from I · SIDE, columns from J · SIDE of the quarter.
    begin_column(0u, n0, local);
    var sum00 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    var sum10 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    var sum20 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    var sum30 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    begin_column(1u, n0, local);
    var sum01 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    var sum11 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    var sum21 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    var sum31 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    begin_column(2u, n0, local);
    var sum02 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    var sum12 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    var sum22 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    var sum32 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    begin_column(3u, n0, local);
    var sum03 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    var sum13 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    var sum23 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);
    var sum33 = coopLoadT<Sums>(&sh_y[MATRIX * own], SIDE);

    let e0 = local;
    let e1 = local + WORKGROUP;
    let e2 = local + 2u * WORKGROUP;
    let e3 = local + 3u * WORKGROUP;
    var x0 = x_quad(e0, m0, 0u, x_base);
    var x1 = x_quad(e1, m0, 0u, x_base);
    var x2 = x_quad(e2, m0, 0u, x_base);
    var x3 = x_quad(e3, m0, 0u, x_base);
    var w0 = w_quad(e0, n0, 0u, w_base);
    var w1 = w_quad(e1, n0, 0u, w_base);
    var w2 = w_quad(e2, n0, 0u, w_base);
    var w3 = w_quad(e3, n0, 0u, w_base);
    for (var k0 = 0u; k0 < params.inner; k0 += TILE_K) {
        workgroupBarrier();
        stage_halves(e0, x0, w0);
        stage_halves(e1, x1, w1);
        stage_halves(e2, x2, w2);
        stage_halves(e3, x3, w3);
        // For small workgroups, as those of subgroups of 8.
        for (var e = local + 4u * WORKGROUP; e < TILE * QUADS; e += WORKGROUP) {
            stage_halves(e, x_quad(e, m0, k0, x_base), w_quad(e, n0, k0, w_base));
        }
        workgroupBarrier();
        // These loads are in flight while this step multiplies.
        x0 = x_quad(e0, m0, k0 + TILE_K, x_base);
        x1 = x_quad(e1, m0, k0 + TILE_K, x_base);
        x2 = x_quad(e2, m0, k0 + TILE_K, x_base);
        x3 = x_quad(e3, m0, k0 + TILE_K, x_base);
        w0 = w_quad(e0, n0, k0 + TILE_K, w_base);
        w1 = w_quad(e1, n0, k0 + TILE_K, w_base);
        w2 = w_quad(e2, n0, k0 + TILE_K, w_base);
        w3 = w_quad(e3, n0, k0 + TILE_K, w_base);
        for (var k = 0u; k < TILE_K; k += SIDE) {
            let a0 = coopLoadT<Left>(&sh_x[own_x + k], PITCH);
            let a1 = coopLoadT<Left>(&sh_x[own_x + next + k], PITCH);
            let b0 = coopLoad<Right>(&sh_w[own_w + k], PITCH);
            let b1 = coopLoad<Right>(&sh_w[own_w + next + k], PITCH);
            sum00 = coopMultiplyAdd(a0, b0, sum00);
            sum01 = coopMultiplyAdd(a0, b1, sum01);
            sum10 = coopMultiplyAdd(a1, b0, sum10);
            sum11 = coopMultiplyAdd(a1, b1, sum11);
            if (FRAGMENTS == 4u) {
                let a2 = coopLoadT<Left>(&sh_x[own_x + 2u * next + k], PITCH);
                let a3 = coopLoadT<Left>(&sh_x[own_x + 3u * next + k], PITCH);
                let b2 = coopLoad<Right>(&sh_w[own_w + 2u * next + k], PITCH);
                let b3 = coopLoad<Right>(&sh_w[own_w + 3u * next + k], PITCH);
                sum02 = coopMultiplyAdd(a0, b2, sum02);
                sum03 = coopMultiplyAdd(a0, b3, sum03);
                sum12 = coopMultiplyAdd(a1, b2, sum12);
                sum13 = coopMultiplyAdd(a1, b3, sum13);
                sum20 = coopMultiplyAdd(a2, b0, sum20);
                sum21 = coopMultiplyAdd(a2, b1, sum21);
                sum22 = coopMultiplyAdd(a2, b2, sum22);
                sum23 = coopMultiplyAdd(a2, b3, sum23);
                sum30 = coopMultiplyAdd(a3, b0, sum30);
                sum31 = coopMultiplyAdd(a3, b1, sum31);
                sum32 = coopMultiplyAdd(a3, b2, sum32);
                sum33 = coopMultiplyAdd(a3, b3, sum33);
            }
        }
    }
    workgroupBarrier();

    put(sum00, 0u, 0u, m0, n0, y_base, local, own);
    put(sum01, 0u, 1u, m0, n0, y_base, local, own);
    put(sum10, 1u, 0u, m0, n0, y_base, local, own);
    put(sum11, 1u, 1u, m0, n0, y_base, local, own);
    if (FRAGMENTS == 4u) {
        put(sum02, 0u, 2u, m0, n0, y_base, local, own);
        put(sum03, 0u, 3u, m0, n0, y_base, local, own);
        put(sum12, 1u, 2u, m0, n0, y_base, local, own);
        put(sum13, 1u, 3u, m0, n0, y_base, local, own);
        put(sum20, 2u, 0u, m0, n0, y_base, local, own);
        put(sum21, 2u, 1u, m0, n0, y_base, local, own);
        put(sum22, 2u, 2u, m0, n0, y_base, local, own);
        put(sum23, 2u, 3u, m0, n0, y_base, local, own);
        put(sum30, 3u, 0u, m0, n0, y_base, local, own);
        put(sum31, 3u, 1u, m0, n0, y_base, local, own);
        put(sum32, 3u, 2u, m0, n0, y_base, local, own);
        put(sum33, 3u, 3u, m0, n0, y_base, local, own);
    }
}

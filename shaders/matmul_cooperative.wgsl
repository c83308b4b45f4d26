// Matrix product by cooperative matrices of 16 × 16: f16 weights, x rounded to f16 unless it is, sums in f32.
//
//   y[b, m, n] = Σ_k f16(x[b, m, k]) · w[b, n, k] + bias[n]
//
// grid: (⌈cols / TILE_N⌉, ⌈rows / TILE_M⌉, batch); 2 × ACROSS subgroups own FRAGMENTS × FRAGMENTS matrices of y each.
// Further subgroups repeat a part, and store the same: matrices need control flow that is uniform in the workgroup.
// A tile is 128 × 256, 128 × 128 or 64 × 64; TILE_K k of it are staged at once, the next ones beside them where STAGES is 2.
// Matrix rows of x and w begin on 16-byte boundaries and are whole numbers of 8 elements. In f16, matrix rows of y are whole words;
// finite sums beyond f16 become its largest value.
//
// Floor on an H200, whose units do 960 multiply-adds per cycle and processor by roofline_cooperative (446 TFLOP/s): 4 096³ takes
// 308 µs there. A step of 16 k of a 128 × 256 tile, 524 288 of them, takes 546 cycles, and besides
// - 8 matrices loaded from workgroup memory serve 16 products of matrices: 32 KiB per step, 256 cycles at 128 bytes per cycle.
//   With half the matrices per subgroup, twice that. Staging stores 12 KiB, 96 cycles.
// - a step reads 16 KiB of storage, 8 of x, which is f32, and 8 of w: 30 bytes per cycle, where the L2 gives a processor some 25:
//   2.1 GB of 4 096³, 400 µs; of x in f16 1.6 GB, 300 µs. A tile of 128 × 128 reads 3.2 GB. That is the reason for the wide tile, and for its long side along
//   w, which has half the bytes.
// - the next step's loads are in flight while this one multiplies, in 16 registers beside 128 of sums and 32 of factors: a
//   processor holds one workgroup of 256 or two of 128. With two stages a step has one barrier: nobody waits for those that
//   still read the stage before.
// - staged matrix rows are 48 or 80 bytes apart: 16 bytes of 8 of them use each of 32 banks once.
// One stage halves the memory, for devices that offer 16 KiB.
//
// Results: the design before this, 128 × 128 in one stage with two barriers a step, took 916 µs of 4 096³ on an H200. Of this one AMD's
// compiler for RDNA3 estimates 0.83 of the cycles per multiply-add of that one, 168 registers a lane, no spills. Not run on a GPU yet.
// Static (RDNA3, Mesa 25), at most: 168 registers, 45 056 bytes of workgroup memory, nothing spilled.

enable f16;
enable wgpu_cooperative_matrix;

override HAS_BIAS: u32 = 0u;
override X_F16: u32 = 0u;
override Y_F16: u32 = 0u;
override WORKGROUP: u32 = 128u;                  // 2 × ACROSS subgroups or more
override FRAGMENTS: u32 = 4u;                    // matrices along each side of a subgroup's part: 4 or 2
override ACROSS: u32 = 2u;                       // subgroups side by side along the columns
override TILE_K: u32 = 16u;
override STAGES: u32 = 1u;
override TEAMS: u32 = 2u * ACROSS;
override TILE_M: u32 = 2u * FRAGMENTS * SIDE;
override TILE_N: u32 = ACROSS * FRAGMENTS * SIDE;
// 16-byte loads that make a step of x, and of w.
override X_ROW: u32 = (TILE_K / 4u) >> X_F16;
override W_ROW: u32 = TILE_K / 8u;
override X_LOADS: u32 = TILE_M * X_ROW;
override W_LOADS: u32 = TILE_N * W_ROW;
// Halves from one staged matrix row to the next, and of a stage.
override PITCH: u32 = TILE_K + 8u;
override X_STAGE: u32 = TILE_M * PITCH;
override W_STAGE: u32 = TILE_N * PITCH;

const SIDE: u32 = 16u;
const MATRIX: u32 = SIDE * SIDE;

// Matrices of factors, and of sums.
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

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

// 16 bytes of a row.
struct Halves {
    low: vec4<f16>,
    high: vec4<f16>,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;     // (x_offset + b·x_batch + m·x_row + k) / 4, f16: / 8
@group(0) @binding(2) var<storage, read> w: array<vec4<f16>>;     // (w_offset + b·w_batch + n·w_col + k) / 4
@group(0) @binding(3) var<storage, read> bias: array<f16>;        // [cols]
@group(0) @binding(4) var<storage, read_write> y: array<u32>;     // y_offset + b·y_batch + m·y_row + n, f16: / 2

var<workgroup> sh_x: array<vec4<f16>, STAGES * X_STAGE / 4u>;  // [stage, m, k]
var<workgroup> sh_w: array<vec4<f16>, STAGES * W_STAGE / 4u>;  // [stage, n, k]
var<workgroup> sh_y: array<f32, TEAMS * MATRIX>;         // one matrix per subgroup

// Two halves in a word; finite values beyond f16 become its largest. NaN and infinities stay what they are. Bits tell them apart,
// since compilers take `v != v` for false, and bits are written, since WGSL leaves pack2x16float of them open: one driver takes
// infinities for NaN and lets a NaN reach the other half.
fn pack(a: f32, b: f32) -> u32 {
    let v = vec2<f32>(a, b);
    let bits = bitcast<vec2<u32>>(v);
    let size = bits & vec2<u32>(0x7fffffffu);
    let finite = size < vec2<u32>(0x7f800000u);
    let packed = pack2x16float(select(vec2<f32>(0.0), clamp(v, vec2<f32>(-65504.0), vec2<f32>(65504.0)), finite));
    let sign = (bits >> vec2<u32>(16u)) & vec2<u32>(0x8000u);
    let odd = select(sign | vec2<u32>(0x7c00u) | min(size - vec2<u32>(0x7f800000u), vec2<u32>(0x200u)), vec2<u32>(0u), finite);
    return packed | odd.x | (odd.y << 16u);
}

// Load e of a step of x, which begins at k0; 0 past the last k. Matrix rows past the last repeat it.
fn x_load(e: u32, m0: u32, k0: u32, base: u32) -> vec4<u32> {
    let k = k0 + e % X_ROW * (TILE_K / X_ROW);
    if (e < X_LOADS && k < params.inner) {
        return x[(base + min(m0 + e / X_ROW, params.rows - 1u) * params.x_row + k) / (TILE_K / X_ROW)];
    }
    return vec4<u32>();
}

// Of w, likewise.
fn w_load(e: u32, n0: u32, k0: u32, base: u32) -> Halves {
    let k = k0 + e % W_ROW * 8u;
    if (e < W_LOADS && k < params.inner) {
        let at = (base + min(n0 + e / W_ROW, params.cols - 1u) * params.w_col + k) / 8u * 2u;
        return Halves(w[at], w[at + 1u]);
    }
    return Halves(vec4<f16>(), vec4<f16>());
}

// Stages load e of both.
fn stage_x(e: u32, stage: u32, load: vec4<u32>) {
    if (e < X_LOADS) {
        let at = (stage * X_STAGE + e / X_ROW * PITCH) / 4u + e % X_ROW * (1u + X_F16);
        if (X_F16 == 1u) {
            sh_x[at] = vec4<f16>(vec4<f32>(unpack2x16float(load.x), unpack2x16float(load.y)));
            sh_x[at + 1u] = vec4<f16>(vec4<f32>(unpack2x16float(load.z), unpack2x16float(load.w)));
        } else {
            sh_x[at] = vec4<f16>(bitcast<vec4<f32>>(load));
        }
    }
}

fn stage_w(e: u32, stage: u32, load: Halves) {
    if (e < W_LOADS) {
        let at = (stage * W_STAGE + e / W_ROW * PITCH) / 4u + e % W_ROW * 2u;
        sh_w[at] = load.low;
        sh_w[at + 1u] = load.high;
    }
}

// What is added to the sums of column n.
fn bias_of(n: u32) -> f32 {
    if (HAS_BIAS == 1u) {
        return f32(bias[n]);
    }
    return 0.0;
}

// Writes matrix (i, j) of each subgroup.
fn put(sums: Sums, i: u32, j: u32, m0: u32, n0: u32, base: u32, local: u32, own: u32) {
    coopStoreT(sums, &sh_y[MATRIX * own], SIDE);
    workgroupBarrier();
    // Elements of a word.
    let each = 1u + Y_F16;
    for (var e = each * local; e < TEAMS * MATRIX; e += each * WORKGROUP) {
        let team = e / MATRIX;
        let m = m0 + (team / ACROSS * FRAGMENTS + i) * SIDE + e % MATRIX / SIDE;
        let n = n0 + (team % ACROSS * FRAGMENTS + j) * SIDE + e % SIDE;
        if (m < params.rows && n < params.cols) {
            let at = base + m * params.y_row + n;
            if (Y_F16 == 1u) {
                y[at / 2u] = pack(sh_y[e] + bias_of(n), sh_y[e + 1u] + bias_of(n + 1u));
            } else {
                y[at] = bitcast<u32>(sh_y[e] + bias_of(n));
            }
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
    let m0 = work.y * TILE_M;
    let n0 = work.x * TILE_N;
    let x_base = params.x_offset + work.z * params.x_batch;
    let w_base = params.w_offset + work.z * params.w_batch;
    let y_base = params.y_offset + work.z * params.y_batch;
    // Where the matrix rows and columns of a subgroup's part are staged.
    let own = subgroup % TEAMS;
    let own_x = own / ACROSS * FRAGMENTS * SIDE * PITCH;
    let own_w = own % ACROSS * FRAGMENTS * SIDE * PITCH;
    let next = SIDE * PITCH;

    for (var e = local; e < MATRIX; e += WORKGROUP) {
        sh_y[e] = 0.0;
    }
    workgroupBarrier();
    // sumIJ: matrix rows from I · SIDE, columns from J · SIDE of the part.
    let zero = coopLoadT<Sums>(&sh_y[0], SIDE);
    var sum00 = zero;
    var sum01 = zero;
    var sum02 = zero;
    var sum03 = zero;
    var sum10 = zero;
    var sum11 = zero;
    var sum12 = zero;
    var sum13 = zero;
    var sum20 = zero;
    var sum21 = zero;
    var sum22 = zero;
    var sum23 = zero;
    var sum30 = zero;
    var sum31 = zero;
    var sum32 = zero;
    var sum33 = zero;

    // Loads on their way: all of a step where the workgroup has 128 invocations or more.
    let e1 = local + WORKGROUP;
    let e2 = local + 2u * WORKGROUP;
    let e3 = local + 3u * WORKGROUP;
    var x0 = x_load(local, m0, 0u, x_base);
    var x1 = x_load(e1, m0, 0u, x_base);
    var x2 = x_load(e2, m0, 0u, x_base);
    var x3 = x_load(e3, m0, 0u, x_base);
    var w0 = w_load(local, n0, 0u, w_base);
    var w1 = w_load(e1, n0, 0u, w_base);
    var stage = 0u;
    for (var k0 = 0u; k0 < params.inner; k0 += TILE_K) {
        stage_x(local, stage, x0);
        stage_x(e1, stage, x1);
        stage_w(local, stage, w0);
        if (X_LOADS > 2u * WORKGROUP) {
            stage_x(e2, stage, x2);
            stage_x(e3, stage, x3);
        }
        if (W_LOADS > WORKGROUP) {
            stage_w(e1, stage, w1);
        }
        // For small workgroups, as those of subgroups of 8.
        for (var e = local + 4u * WORKGROUP; e < X_LOADS; e += WORKGROUP) {
            stage_x(e, stage, x_load(e, m0, k0, x_base));
        }
        for (var e = local + 2u * WORKGROUP; e < W_LOADS; e += WORKGROUP) {
            stage_w(e, stage, w_load(e, n0, k0, w_base));
        }
        workgroupBarrier();
        // These loads are in flight while this step multiplies.
        x0 = x_load(local, m0, k0 + TILE_K, x_base);
        x1 = x_load(e1, m0, k0 + TILE_K, x_base);
        w0 = w_load(local, n0, k0 + TILE_K, w_base);
        if (X_LOADS > 2u * WORKGROUP) {
            x2 = x_load(e2, m0, k0 + TILE_K, x_base);
            x3 = x_load(e3, m0, k0 + TILE_K, x_base);
        }
        if (W_LOADS > WORKGROUP) {
            w1 = w_load(e1, n0, k0 + TILE_K, w_base);
        }
        let x_at = stage * X_STAGE + own_x;
        let w_at = stage * W_STAGE + own_w;
        for (var k = 0u; k < TILE_K; k += SIDE) {
            let a0 = coopLoadT<Left>(&sh_x[(x_at + k) / 4u], PITCH / 4u);
            let a1 = coopLoadT<Left>(&sh_x[(x_at + next + k) / 4u], PITCH / 4u);
            let b0 = coopLoad<Right>(&sh_w[(w_at + k) / 4u], PITCH / 4u);
            let b1 = coopLoad<Right>(&sh_w[(w_at + next + k) / 4u], PITCH / 4u);
            sum00 = coopMultiplyAdd(a0, b0, sum00);
            sum01 = coopMultiplyAdd(a0, b1, sum01);
            sum10 = coopMultiplyAdd(a1, b0, sum10);
            sum11 = coopMultiplyAdd(a1, b1, sum11);
            if (FRAGMENTS == 4u) {
                let a2 = coopLoadT<Left>(&sh_x[(x_at + 2u * next + k) / 4u], PITCH / 4u);
                let a3 = coopLoadT<Left>(&sh_x[(x_at + 3u * next + k) / 4u], PITCH / 4u);
                let b2 = coopLoad<Right>(&sh_w[(w_at + 2u * next + k) / 4u], PITCH / 4u);
                let b3 = coopLoad<Right>(&sh_w[(w_at + 3u * next + k) / 4u], PITCH / 4u);
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
        // Two stages take turns. One is free again when all have read it.
        stage = STAGES - 1u - stage;
        if (STAGES == 1u) {
            workgroupBarrier();
        }
    }

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

// Matrix product with a large tile of y per workgroup, for many matrix rows, where those of x and w begin on
// 16-byte boundaries.
//
//   y[b, m, n] = Σ_k x[b, m, k] · w[b, n, k] + bias[n]
//
// grid: (⌈cols / TILE_N⌉, ⌈rows / TILE_M⌉, batch); each invocation sums 8 × 8 elements of y, in four blocks of 4 × 4, over its part
// of each step; the first of PARTS adds them up. In f16, matrix rows of y are whole words; finite sums beyond f16 become its largest.
//
// TILE_K k at a time go through workgroup memory: each invocation reads 16 bytes of four matrix rows, transposes the 4 × 4 block and
// stores it in 16-byte pieces; what it reads is in flight while the step before is multiplied. One k of a tile then costs it four
// 16-byte reads for 64 multiply-adds: 16 cycles of a processor of 128 lanes, the reads 4 to 16 by how many lanes share an address.
//
// Floor on an H200, 49.9 TFLOP/s by roofline_fma: 43 µs of 1 024³. Its 64 tiles of 128 × 128 are half of its 132 processors, and 256
// of 64 × 64 are two each: 128 lanes in four subgroups if an invocation sums all k, one per scheduler, which hides no latency
// (125 µs). In PARTS of four, each a quarter of a step of 32 k, they are sixteen, with the same reads per multiply-add; 8 × 4 or
// 4 × 4 elements would read 1.5 times or twice as much. Adding up is three exchanges of 16 KiB, once.
//
// Results, medians of interleaved runs on lavapipe (2 cores), against the staged 4 × 4 tile of `matmul`: 2.8 to 3.8 times as
// fast, f32 and f16, the 16 × 16 workgroup up to 1.2 times the 8 × 8. Loads in flight: 0.95 to 1 of the time there; AMD's compiler for
// RDNA3 estimates 0.57 to 0.64 of the cycles per multiply-add. Not run on a GPU yet.
// Static (RDNA3, Mesa 25), at most: 120 registers, 16 384 bytes of workgroup memory, nothing spilled.

override STORAGE_F16: u32 = 0u;
override HAS_BIAS: u32 = 0u;
override X_F16: u32 = 0u;
override Y_F16: u32 = 0u;
override WG_X: u32 = 8u;
override WG_Y: u32 = 8u;
override PARTS: u32 = 1u;
override TILE_K: u32 = 16u;
override TILE_M: u32 = WG_Y * 8u;
override TILE_N: u32 = WG_X * 8u;
// Four matrix rows, or four columns, are a quad: 16 bytes of one k.
override QUADS_M: u32 = WG_Y * 2u;
override QUADS_N: u32 = WG_X * 2u;
// 16-byte loads that make a step of x, and of w: those of f16 hold 8 k.
override X_LOADS: u32 = (TILE_K / 4u) >> X_F16;
override W_LOADS: u32 = (TILE_K / 4u) >> STORAGE_F16;
override X_BLOCKS: u32 = QUADS_M * X_LOADS;
override BLOCKS: u32 = X_BLOCKS + QUADS_N * W_LOADS;
override LANES: u32 = WG_X * WG_Y * PARTS;

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

// 16 bytes of each of four matrix rows.
struct Loads {
    first: vec4<u32>,
    second: vec4<u32>,
    third: vec4<u32>,
    fourth: vec4<u32>,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;     // (x_offset + b·x_batch + m·x_row + k) / 4, f16: / 8
@group(0) @binding(2) var<storage, read> w: array<vec4<u32>>;     // (w_offset + b·w_batch + n·w_col + k) / 4, f16: / 8
@group(0) @binding(3) var<storage, read> bias: array<u32>;        // [cols]
@group(0) @binding(4) var<storage, read_write> y: array<u32>;     // y_offset + b·y_batch + m·y_row + n, f16: / 2

var<workgroup> sh_x: array<vec4<f32>, TILE_K * QUADS_M>;
var<workgroup> sh_w: array<vec4<f32>, TILE_K * QUADS_N>;

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

// Loads of block e of the step at k0, x first and then w; 0 past the last k. Matrix rows and columns past the last repeat it;
// their sums are not stored.
fn block_loads(e: u32, m0: u32, n0: u32, k0: u32, x_base: u32, w_base: u32) -> Loads {
    let each = vec4<u32>(0u, 1u, 2u, 3u);
    if (e < X_BLOCKS) {
        // Four neighbouring lanes read 64 bytes of a matrix row, or two lanes 32 bytes.
        let k = k0 + e % X_LOADS * (TILE_K / X_LOADS);
        if (k < params.inner) {
            let m = min(vec4<u32>(m0 + e / X_LOADS * 4u) + each, vec4<u32>(params.rows - 1u));
            let i = (vec4<u32>(x_base + k) + m * params.x_row) / (TILE_K / X_LOADS);
            return Loads(x[i.x], x[i.y], x[i.z], x[i.w]);
        }
    } else if (e < BLOCKS) {
        let k = k0 + (e - X_BLOCKS) % W_LOADS * (TILE_K / W_LOADS);
        if (k < params.inner) {
            let n = min(vec4<u32>(n0 + (e - X_BLOCKS) / W_LOADS * 4u) + each, vec4<u32>(params.cols - 1u));
            let i = (vec4<u32>(w_base + k) + n * params.w_col) / (TILE_K / W_LOADS);
            return Loads(w[i.x], w[i.y], w[i.z], w[i.w]);
        }
    }
    return Loads();
}

// Four halves of each of four matrix rows.
fn four_halves(a: vec2<u32>, b: vec2<u32>, c: vec2<u32>, d: vec2<u32>) -> mat4x4<f32> {
    return mat4x4<f32>(
        vec4<f32>(unpack2x16float(a.x), unpack2x16float(a.y)),
        vec4<f32>(unpack2x16float(b.x), unpack2x16float(b.y)),
        vec4<f32>(unpack2x16float(c.x), unpack2x16float(c.y)),
        vec4<f32>(unpack2x16float(d.x), unpack2x16float(d.y)),
    );
}

// Stages block e.
fn stage_block(e: u32, block: Loads) {
    if (e < X_BLOCKS) {
        let k = e % X_LOADS * (TILE_K / X_LOADS);
        let quad = e / X_LOADS;
        if (X_F16 == 1u) {
            store_x(k, quad, four_halves(block.first.xy, block.second.xy, block.third.xy, block.fourth.xy));
            store_x(k + 4u, quad, four_halves(block.first.zw, block.second.zw, block.third.zw, block.fourth.zw));
        } else {
            let first = bitcast<vec4<f32>>(block.first);
            let second = bitcast<vec4<f32>>(block.second);
            let third = bitcast<vec4<f32>>(block.third);
            let fourth = bitcast<vec4<f32>>(block.fourth);
            store_x(k, quad, mat4x4<f32>(first, second, third, fourth));
        }
    } else if (e < BLOCKS) {
        let k = (e - X_BLOCKS) % W_LOADS * (TILE_K / W_LOADS);
        let quad = (e - X_BLOCKS) / W_LOADS;
        store_w(k, quad, mat4x4<f32>(first_of(block.first), first_of(block.second), first_of(block.third), first_of(block.fourth)));
        if (STORAGE_F16 == 1u) {
            let second = mat4x4<f32>(second_of(block.first), second_of(block.second), second_of(block.third), second_of(block.fourth));
            store_w(k + 4u, quad, second);
        }
    }
}

// Leaves a block of sums where x or w was staged, the columns of all invocations one after another.
fn exchange_x(at: u32, block: mat4x4<f32>) {
    sh_x[at] = block[0];
    sh_x[at + WG_X * WG_Y] = block[1];
    sh_x[at + 2u * WG_X * WG_Y] = block[2];
    sh_x[at + 3u * WG_X * WG_Y] = block[3];
}

fn exchanged_x(at: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        sh_x[at],
        sh_x[at + WG_X * WG_Y],
        sh_x[at + 2u * WG_X * WG_Y],
        sh_x[at + 3u * WG_X * WG_Y],
    );
}

fn exchange_w(at: u32, block: mat4x4<f32>) {
    sh_w[at] = block[0];
    sh_w[at + WG_X * WG_Y] = block[1];
    sh_w[at + 2u * WG_X * WG_Y] = block[2];
    sh_w[at + 3u * WG_X * WG_Y] = block[3];
}

fn exchanged_w(at: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        sh_w[at],
        sh_w[at + WG_X * WG_Y],
        sh_w[at + 2u * WG_X * WG_Y],
        sh_w[at + 3u * WG_X * WG_Y],
    );
}

// A sum of column n, with its bias.
fn biased(sum: f32, n: u32) -> f32 {
    if (HAS_BIAS == 1u) {
        return sum + decode(bias[index_of(n)], n);
    }
    return sum;
}

fn store_y(base: u32, m0: u32, n0: u32, block: mat4x4<f32>) {
    // Elements of a word.
    let each = 1u + Y_F16;
    for (var i = 0u; i < 4u; i++) {
        let sums = column_of(block, i);
        for (var j = 0u; j < 4u; j += each) {
            let m = m0 + i;
            let n = n0 + j;
            if (m < params.rows && n < params.cols) {
                let at = base + m * params.y_row + n;
                if (Y_F16 == 1u) {
                    y[at / 2u] = pack(biased(sums[j], n), biased(sums[j + 1u], n + 1u));
                } else {
                    y[at] = bitcast<u32>(biased(sums[j], n));
                }
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

@compute @workgroup_size(WG_X, WG_Y, PARTS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let work = unfold(group, groups);
    if (work.z >= params.tiles_z) {
        return;
    }
    // Within its part, and within the workgroup.
    let own = local.y * WG_X + local.x;
    let lane = local.z * WG_X * WG_Y + own;
    let m0 = work.y * TILE_M;
    let n0 = work.x * TILE_N;
    let x_base = params.x_offset + work.z * params.x_batch;
    let w_base = params.w_offset + work.z * params.w_batch;
    // The k of a step that this part sums.
    let first = local.z * (TILE_K / PARTS);

    // accIJ is y[m0 + 4·(local.y + I·WG_Y) + 0..4, n0 + 4·(local.x + J·WG_X) + 0..4].
    var acc00 = mat4x4<f32>();
    var acc01 = mat4x4<f32>();
    var acc10 = mat4x4<f32>();
    var acc11 = mat4x4<f32>();
    // Loads on their way: a step has one or two blocks per invocation.
    var loads0 = block_loads(lane, m0, n0, 0u, x_base, w_base);
    var loads1 = block_loads(lane + LANES, m0, n0, 0u, x_base, w_base);
    for (var k0 = 0u; k0 < params.inner; k0 += TILE_K) {
        stage_block(lane, loads0);
        if (BLOCKS > LANES) {
            stage_block(lane + LANES, loads1);
        }
        workgroupBarrier();
        loads0 = block_loads(lane, m0, n0, k0 + TILE_K, x_base, w_base);
        if (BLOCKS > LANES) {
            loads1 = block_loads(lane + LANES, m0, n0, k0 + TILE_K, x_base, w_base);
        }
        for (var k = first; k < first + TILE_K / PARTS; k++) {
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
    for (var part = 1u; part < PARTS; part++) {
        if (local.z == part) {
            exchange_x(own, acc00);
            exchange_x(own + 4u * WG_X * WG_Y, acc01);
            exchange_w(own, acc10);
            exchange_w(own + 4u * WG_X * WG_Y, acc11);
        }
        workgroupBarrier();
        if (local.z == 0u) {
            acc00 += exchanged_x(own);
            acc01 += exchanged_x(own + 4u * WG_X * WG_Y);
            acc10 += exchanged_w(own);
            acc11 += exchanged_w(own + 4u * WG_X * WG_Y);
        }
        workgroupBarrier();
    }
    if (local.z > 0u) {
        return;
    }

    let y_base = params.y_offset + work.z * params.y_batch;
    let m = m0 + 4u * local.y;
    let n = n0 + 4u * local.x;
    store_y(y_base, m, n, acc00);
    store_y(y_base, m, n + 4u * WG_X, acc01);
    store_y(y_base, m + 4u * WG_Y, n, acc10);
    store_y(y_base, m + 4u * WG_Y, n + 4u * WG_X, acc11);
}

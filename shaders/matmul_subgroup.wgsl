// Matrix product in registers alone, for adapters without fast workgroup memory: subgroup shuffles share x. Matrix rows
// of x and w begin on 16-byte boundaries.
//
//   y[b, m, n] = Σ_k x[b, m, k] · w[b, n, k] + bias[n]
//
// Floor: the multiply-adds; in software a load costs as much as 70 of them, and one of x and four of w serve 32 per lane.
// grid: (⌈rows / 8⌉, ⌈cols / 32⌉, batch); eight invocations own 8 matrix rows of 4 columns each, 8 apart.
// Each invocation reads one matrix row of x (two, where subgroups are smaller than 8), and shuffles bring it to the others.
// Right for every subgroup size from 4 up.
//
// Results, medians of interleaved runs on lavapipe (2 cores shared with other work, CPU time), against the staged tile of
// `matmul`, f32 and f16, 256 × 256 × 768 to 1024³:
// - every load there is a bounds-checked loop over the lanes, equal addresses or not: by the runs' differences it costs as
//   much as 70 multiply-adds per lane, a shuffle next to nothing. 8 × 4 elements of y: 5.3 to 8.3 times as fast.
// - 16 × 2, 16 × 3, 16 × 4: 0.9 to 1.2 of it, for 1 to 2 times its compile time; 24 × 2 and 32 × 2: no clear order.
// - matrix rows or columns along the grid's x: within 5 % of each other.
// - two k at a time: 0.5 of it. `fma` for `dot`, broadcast for shuffle: the same. SPREAD 4 (16 × 4): 0.7 to 0.8 of SPREAD 8.
// - without subgroups each matrix row of x is a load: 8 × 4 gains 1.6, 16 × 8 gains 2.4 and compiles for seconds, and `matmul_vec4`
//   gains more than either.
// Static (RDNA3, Mesa 25), at most: 72 registers, no workgroup memory, nothing spilled.

override STORAGE_F16: u32 = 0u;
override HAS_BIAS: u32 = 0u;
// Matrix rows of x that one load of a subgroup brings: 8, or 4 where subgroups may be smaller than 8.
override SPREAD: u32 = 4u;
// 16-byte loads of x for one of w.
override X_LOADS: u32 = 1u + STORAGE_F16;

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

fn store_sums(m: u32, n0: u32, base: u32, sums: vec4<f32>) {
    if (m < params.rows) {
        for (var j = 0u; j < 4u; j++) {
            let n = n0 + 8u * j;
            if (n < params.cols) {
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

@compute @workgroup_size(8, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_invocation_id) member: u32,
) {
    let work = unfold(group, groups);
    if (work.z >= params.tiles_z) {
        return;
    }
    let m0 = work.x * 8u;
    let n0 = work.y * 32u + lane;
    let loads = params.inner / (4u * X_LOADS);

    // Matrix rows and columns past the last repeat it; their sums are not stored.
    let ns = min(vec4<u32>(n0, n0 + 8u, n0 + 16u, n0 + 24u), vec4<u32>(params.cols - 1u));
    let w_at = (vec4<u32>(params.w_offset + work.z * params.w_batch) + ns * params.w_col) / (4u * X_LOADS);
    let own = m0 + member % SPREAD;
    let ms = min(vec2<u32>(own, own + 4u), vec2<u32>(params.rows - 1u));
    let x_at = (vec2<u32>(params.x_offset + work.z * params.x_batch) + ms * params.x_row) / 4u;

    // accM[j] is y[m0 + M, n0 + 8·j].
    var acc0 = vec4<f32>(0.0);
    var acc1 = vec4<f32>(0.0);
    var acc2 = vec4<f32>(0.0);
    var acc3 = vec4<f32>(0.0);
    var acc4 = vec4<f32>(0.0);
    var acc5 = vec4<f32>(0.0);
    var acc6 = vec4<f32>(0.0);
    var acc7 = vec4<f32>(0.0);
    for (var k = 0u; k < loads; k++) {
        let w0 = w[w_at.x + k];
        let w1 = w[w_at.y + k];
        let w2 = w[w_at.z + k];
        let w3 = w[w_at.w + k];
        for (var half = 0u; half < X_LOADS; half++) {
            let i = k * X_LOADS + half;
            var weights = mat4x4<f32>(first_of(w0), first_of(w1), first_of(w2), first_of(w3));
            if (half == 1u) {
                weights = mat4x4<f32>(second_of(w0), second_of(w1), second_of(w2), second_of(w3));
            }
            let a = x[x_at.x + i];
            var b = a;
            if (SPREAD == 4u) {
                b = x[x_at.y + i];
            }
            acc0 += subgroupShuffle(a, 0u) * weights;
            acc1 += subgroupShuffle(a, 1u) * weights;
            acc2 += subgroupShuffle(a, 2u) * weights;
            acc3 += subgroupShuffle(a, 3u) * weights;
            acc4 += subgroupShuffle(b, 4u % SPREAD) * weights;
            acc5 += subgroupShuffle(b, 5u % SPREAD) * weights;
            acc6 += subgroupShuffle(b, 6u % SPREAD) * weights;
            acc7 += subgroupShuffle(b, 7u % SPREAD) * weights;
        }
    }

    let base = params.y_offset + work.z * params.y_batch;
    store_sums(m0, n0, base, acc0);
    store_sums(m0 + 1u, n0, base, acc1);
    store_sums(m0 + 2u, n0, base, acc2);
    store_sums(m0 + 3u, n0, base, acc3);
    store_sums(m0 + 4u, n0, base, acc4);
    store_sums(m0 + 5u, n0, base, acc5);
    store_sums(m0 + 6u, n0, base, acc6);
    store_sums(m0 + 7u, n0, base, acc7);
}

// The embedding gate of EG-MLA, in 16-byte loads and stores.
//
//   z = x ⊙ act(g)        g = gate_b_proj · gate_embedding[id], before its activation
//   y = (z − μ) · ρ · weight + bias
//   layer_norm: μ = mean(z), ρ = 1/√(var(z) + eps)   rms_norm: μ = 0, ρ = 1/√(mean(z²) + eps)   none: y = z, μ = 0, ρ = 1
//
// A row is blocks of two parts, say keys and values of a head. Padding at the end of a part is 0 in x, weight and bias; the norm
// does not count it. One pass updates mean and spread vector by vector, then joins them across lanes: E[z²] − mean² would cancel.
// grid: one workgroup per WORKGROUP / LANES · ROWS rows, folded into x and y.
//
// y is f32, or f16 for attention by matrices, which would round it for every tile of queries. x stays f32: as halves it would be
// rounded twice, the first time before a norm that may enlarge the error. A turn of the second pass makes two vectors of halves,
// one store, and computes z again, since z in y would be rounded, too. Finite values beyond ±65504 become ±65504; NaN stays NaN.
//
// Floor: x and g once, 8 bytes per element, and 4 or 2 of y, over the bandwidth, against 6 to 20 FLOPs: memory is the limit where
// the second pass finds x and g in a cache, else 8 bytes more. Halves save 2 bytes here and 2 for each reading by attention.
// The estimate of AMD's compiler (RDNA3, Mesa 25) is 2 400 with y in f32, 4 180 in f16, where a turn makes twice as much.
// Results, interleaved runs on lavapipe (2 cores), 1024 × 1536 in f32, sigmoid and layer_norm, per cent of the copy kernel:
// 8 invocations with 4 rows each 73, with z computed again 53; with one row each 63. z in a private array is slower than z
// computed again. On an H200 at commit 10d32d5: 4096 × 1536 in f32, 33.2 µs, 53 % of the copy rate. Not measured since.
// Static (RDNA3, Mesa 25), at most: 48 registers, 4 096 bytes of workgroup memory, nothing spilled.

override STORAGE_F16: u32 = 0u;
override Y_F16: u32 = 0u;
override ACTIVATION: u32 = 0u;         // 0 identity, 1 sigmoid, 2 tanh, 3 silu, 4 one_plus
override NORM: u32 = 0u;               // 0 layer_norm, 1 rms_norm, 2 none
override WRITE_STATISTICS: u32 = 0u;
override PADDED: u32 = 0u;             // 1: parts end with padding
override WORKGROUP: u32 = 64u;
override LANES: u32 = 64u;             // invocations that share a row; a power of two
override ROWS: u32 = 1u;               // rows per invocation, which share loads of weight and bias: 1 or 4
override STASH: u32 = 0u;              // 1: the second pass finds z in y, in f32; 0: it computes z again
override SHARED: u32 = select(WORKGROUP, 1u, LANES == 1u);

struct Params {
    rows: u32,
    width: u32,          // padding included
    used: u32,           // elements of a row without padding
    first: u32,          // elements of a block's first part, padding included
    block: u32,          // of both parts
    first_used: u32,     // elements of a block's first part without padding
    second_used: u32,
    x_offset: u32,
    x_row: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;                  // (x_offset + row·x_row + i) / 4
@group(0) @binding(2) var<storage, read> g: array<vec4<f32>>;                  // [rows, width] / 4
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>;             // [width] / 4, f16: / 8
@group(0) @binding(4) var<storage, read> bias: array<vec4<u32>>;               // [width] / 4, f16: / 8
@group(0) @binding(5) var<storage, read> slots: array<u32>;                    // [rows] where in statistics; u32 max: nowhere
@group(0) @binding(6) var<storage, read_write> y: array<vec4<u32>>;            // [rows, width] / 4, f16: / 8
@group(0) @binding(7) var<storage, read_write> statistics: array<vec2<f32>>;   // [slots] (μ, ρ)

// (elements, mean, squared distances from it) per invocation.
var<workgroup> sh_moments: array<vec4<f32>, SHARED>;

// Vector i of a tensor in f32 or f16 storage, given the load that holds it.
fn four_of(load: vec4<u32>, i: u32) -> vec4<f32> {
    if (STORAGE_F16 == 1u) {
        let words = select(load.xy, load.zw, (i & 1u) == 1u);
        return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
    }
    return bitcast<vec4<f32>>(load);
}

// Index of the word that holds element i, or of the load that holds vector i, in f32 or f16 storage.
fn index_of(i: u32) -> u32 {
    return select(i, i >> 1u, STORAGE_F16 == 1u);
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

// (elements, mean, squared distances) of the union of two sets.
fn joined(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    // Divisions are rounded: an empty set must not move the mean of the other.
    if (a.x == 0.0 || b.x == 0.0) {
        return select(a, b, a.x == 0.0);
    }
    let part = b.x / (a.x + b.x);
    let apart = b.y - a.y;
    return vec4<f32>(a.x + b.x, a.y + apart * part, a.z + b.z + apart * apart * a.x * part, 0.0);
}

// Those of the LANES invocations that share a row or a token, together.
fn joined_lanes(lane: u32, own: vec4<f32>) -> vec4<f32> {
    if (LANES == 1u) {
        return own;
    }
    let part = lane % LANES;
    sh_moments[lane % SHARED] = own;
    workgroupBarrier();
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        if (part < half) {
            sh_moments[lane % SHARED] = joined(sh_moments[lane % SHARED], sh_moments[(lane + half) % SHARED]);
        }
        workgroupBarrier();
    }
    let all = sh_moments[(lane - part) % SHARED];
    workgroupBarrier();
    return all;
}

fn activate_four(v: vec4<f32>) -> vec4<f32> {
    switch (ACTIVATION) {
        case 1u: {
            return 1.0 / (1.0 + exp(-v));
        }
        case 2u: {
            // Some drivers' tanh overflows for large arguments; ±1 is exact in f32 from 10 on. A clamp would hide NaN.
            let nan = (bitcast<vec4<u32>>(v) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
            return select(tanh(clamp(v, vec4<f32>(-10.0), vec4<f32>(10.0))), v, nan);
        }
        case 3u: {
            return v / (1.0 + exp(-v));
        }
        case 4u: {
            return 1.0 + v;
        }
        default: {
            return v;
        }
    }
}

// Vector i of z; the row begins at `x_base` in x and at `base` in g.
fn gated(x_base: u32, base: u32, i: u32) -> vec4<f32> {
    return x[x_base + i] * activate_four(g[base + i]);
}

// How many elements of vector i are no padding.
fn used_of(i: u32) -> u32 {
    let at = 4u * i % params.block;
    let is_second = at >= params.first;
    let before = select(at, at - params.first, is_second);
    let used = select(params.first_used, params.second_used, is_second);
    return min(max(used, before) - before, 4u);
}

// (elements, mean, squared distances) of one element; of its square alone without `centred`.
fn moments_of(v: f32, centred: bool) -> vec4<f32> {
    return select(vec4<f32>(1.0, 0.0, v * v, 0.0), vec4<f32>(1.0, v, 0.0, 0.0), centred);
}

// Those of the first `count` elements of a vector, at most 3.
fn moments_of_cut(v: vec4<f32>, count: u32, centred: bool) -> vec4<f32> {
    var all = vec4<f32>(0.0);
    if (count > 0u) {
        all = moments_of(v.x, centred);
    }
    if (count > 1u) {
        all = joined(all, moments_of(v.y, centred));
    }
    if (count > 2u) {
        all = joined(all, moments_of(v.z, centred));
    }
    return all;
}

// First pass over a row: μ and ρ.
fn measured(lane: u32, row: u32) -> vec2<f32> {
    let part = lane % LANES;
    // Past the last row, and without a norm, there is nothing to measure, but the barriers need every invocation.
    let vectors = select(0u, params.width / 4u, row < params.rows && NORM != 2u);
    let x_base = (params.x_offset + row * params.x_row) / 4u;
    let base = row * (params.width / 4u);
    // One component per fourth element.
    var count = 0.0;
    var mean = vec4<f32>(0.0);
    var squares = vec4<f32>(0.0);
    var cut = vec4<f32>(0.0);
    for (var i = part; i < vectors; i += LANES) {
        let z = gated(x_base, base, i);
        if (STASH == 1u) {
            y[base + i] = bitcast<vec4<u32>>(z);
        }
        if (PADDED == 1u) {
            let used = used_of(i);
            if (used < 4u) {
                cut = joined(cut, moments_of_cut(z, used, NORM == 0u));
                continue;
            }
        }
        count += 1.0;
        if (NORM == 0u && count == 1.0) {
            // Exact, so that equal elements have no spread at all.
            mean = z;
            continue;
        }
        let apart = z - mean;
        if (NORM == 0u) {
            mean += apart * (1.0 / count);
        }
        squares += apart * (z - mean);
    }
    let middle = mean.x + dot(mean - mean.x, vec4<f32>(0.25));
    let off = mean - middle;
    var own = vec4<f32>(4.0 * count, middle, dot(squares, vec4<f32>(1.0)) + count * dot(off, off), 0.0);
    if (PADDED == 1u) {
        own = joined(own, cut);
    }
    let all = joined_lanes(lane, own);
    let scale = inverseSqrt(all.z / f32(params.used) + params.eps);
    let moments = vec2<f32>(select(0.0, all.y, NORM == 0u), select(scale, 1.0, NORM == 2u));
    if (WRITE_STATISTICS == 1u && part == 0u && row < params.rows) {
        let slot = slots[row];
        if (slot != 0xffffffffu) {
            statistics[slot] = moments;
        }
    }
    return moments;
}

// Vector i of the result for a row, after the second pass.
fn normed(row: u32, i: u32, moments: vec2<f32>, w: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    let base = row * (params.width / 4u);
    var z = vec4<f32>(0.0);
    if (STASH == 1u && NORM != 2u) {
        z = bitcast<vec4<f32>>(y[base + i]);
    } else {
        z = gated((params.x_offset + row * params.x_row) / 4u, base, i);
    }
    return (z - moments.x) * moments.y * w + b;
}

// Second pass, one store of a row: vector i, in f16 those at 2 i, whose weight and bias come first, and 2 i + 1.
fn finish(row: u32, i: u32, moments: vec2<f32>, w: vec4<f32>, b: vec4<f32>, w1: vec4<f32>, b1: vec4<f32>) {
    if (row >= params.rows) {
        return;
    }
    if (Y_F16 == 1u) {
        let low = normed(row, 2u * i, moments, w, b);
        let high = normed(row, 2u * i + 1u, moments, w1, b1);
        let words = vec4<u32>(pack(low.x, low.y), pack(low.z, low.w), pack(high.x, high.y), pack(high.z, high.w));
        y[row * (params.width / 8u) + i] = words;
    } else {
        y[row * (params.width / 4u) + i] = bitcast<vec4<u32>>(normed(row, i, moments, w, b));
    }
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let apart = WORKGROUP / LANES;
    let row = (group.y * groups.x + group.x) * apart * ROWS + lane / LANES;
    let stores = params.width / select(4u, 8u, Y_F16 == 1u);
    let m0 = measured(lane, row);
    var m1 = vec2<f32>(0.0);
    var m2 = vec2<f32>(0.0);
    var m3 = vec2<f32>(0.0);
    if (ROWS == 4u) {
        m1 = measured(lane, row + apart);
        m2 = measured(lane, row + 2u * apart);
        m3 = measured(lane, row + 3u * apart);
    }
    for (var i = lane % LANES; i < stores; i += LANES) {
        let vector = select(i, 2u * i, Y_F16 == 1u);
        var w = vec4<f32>(1.0);
        var b = vec4<f32>(0.0);
        var w1 = w;
        var b1 = b;
        if (NORM != 2u) {
            w = four_of(weight[index_of(vector)], vector);
        }
        if (NORM == 0u) {
            b = four_of(bias[index_of(vector)], vector);
        }
        if (Y_F16 == 1u && NORM != 2u) {
            w1 = four_of(weight[index_of(vector + 1u)], vector + 1u);
        }
        if (Y_F16 == 1u && NORM == 0u) {
            b1 = four_of(bias[index_of(vector + 1u)], vector + 1u);
        }
        finish(row, i, m0, w, b, w1, b1);
        if (ROWS == 4u) {
            finish(row + apart, i, m1, w, b, w1, b1);
            finish(row + 2u * apart, i, m2, w, b, w1, b1);
            finish(row + 3u * apart, i, m3, w, b, w1, b1);
        }
    }
}

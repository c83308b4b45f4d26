// RMSNorm and LayerNorm of rows.
//
//   RMSNorm:   y = x / √(mean(x²) + eps) · weight
//   LayerNorm: y = (x − mean(x)) / √(mean((x − mean(x))²) + eps) · weight + bias
//
// A row may hold a second segment behind the first, with a norm of its own.
// grid: one workgroup a segment, all first ones before all second ones, folded into x and y.

override STORAGE_F16: u32 = 0u;
override CENTER: u32 = 0u;       // 1: LayerNorm
override HAS_BIAS: u32 = 0u;
override WORKGROUP: u32 = 64u;

struct Params {
    rows: u32,
    width: u32,
    second: u32,     // width of the second segment; 0 for none
    x_offset: u32,
    x_row: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;           // x_offset + row·x_row + i
@group(0) @binding(2) var<storage, read> weight: array<u32>;      // [width + second]
@group(0) @binding(3) var<storage, read> bias: array<u32>;        // [width + second]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;     // [rows, width + second]

var<workgroup> sh_sum: array<f32, WORKGROUP>;

// Word that holds element i of a tensor in f32 or f16 storage.
fn word_of(i: u32) -> u32 {
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

// Sum of `value` over the workgroup, the same bits in every invocation. WORKGROUP is a power of two.
fn workgroup_sum(lane: u32, value: f32) -> f32 {
    sh_sum[lane] = value;
    workgroupBarrier();
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        if (lane < half) {
            sh_sum[lane] += sh_sum[lane + half];
        }
        workgroupBarrier();
    }
    let total = sh_sum[0];
    workgroupBarrier();
    return total;
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.y * groups.x + group.x;
    let is_second = index >= params.rows;
    let row = select(index, index - params.rows, is_second);
    if (row >= params.rows) {
        return;
    }
    let first = select(0u, params.width, is_second);
    let width = select(params.width, params.second, is_second);
    let base = params.x_offset + row * params.x_row + first;
    let y_base = row * (params.width + params.second) + first;
    var mean = 0.0;
    if (CENTER == 1u) {
        var sum = 0.0;
        for (var i = lane; i < width; i += WORKGROUP) {
            sum += x[base + i];
        }
        mean = workgroup_sum(lane, sum) / f32(width);
    }
    // A second pass over the centred values: E[x²] − mean² would cancel.
    var squares = 0.0;
    for (var i = lane; i < width; i += WORKGROUP) {
        let centred = x[base + i] - mean;
        squares += centred * centred;
    }
    let scale = inverseSqrt(workgroup_sum(lane, squares) / f32(width) + params.eps);
    for (var i = lane; i < width; i += WORKGROUP) {
        let at = first + i;
        var value = (x[base + i] - mean) * scale * decode(weight[word_of(at)], at);
        if (HAS_BIAS == 1u) {
            value += decode(bias[word_of(at)], at);
        }
        y[y_base + i] = value;
    }
}

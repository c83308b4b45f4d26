// The embedding gate of EG-MLA: activation, modulation, norm over the whole width, and the norm's statistics.
//
//   z = x ⊙ act(g)        g = gate_b_proj · gate_embedding[id], before its activation
//   y = (z − μ) · ρ · weight + bias
//   layer_norm: μ = mean(z), ρ = 1/√(var(z) + eps)   rms_norm: μ = 0, ρ = 1/√(mean(z²) + eps)   none: y = z, μ = 0, ρ = 1
//
// grid: one workgroup a row, folded into x and y.

override STORAGE_F16: u32 = 0u;
override ACTIVATION: u32 = 0u;         // 0 identity, 1 sigmoid, 2 tanh, 3 silu, 4 one_plus
override NORM: u32 = 0u;               // 0 layer_norm, 1 rms_norm, 2 none
override WRITE_STATISTICS: u32 = 0u;
override WORKGROUP: u32 = 64u;

struct Params {
    rows: u32,
    width: u32,
    x_offset: u32,
    x_row: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;                        // x_offset + row·x_row + i
@group(0) @binding(2) var<storage, read> g: array<f32>;                        // [rows, width]
@group(0) @binding(3) var<storage, read> weight: array<u32>;                   // [width]
@group(0) @binding(4) var<storage, read> bias: array<u32>;                     // [width]
@group(0) @binding(5) var<storage, read> slots: array<u32>;                    // [rows] row of statistics; u32 max: none
@group(0) @binding(6) var<storage, read_write> y: array<f32>;                  // [rows, width]
@group(0) @binding(7) var<storage, read_write> statistics: array<vec2<f32>>;   // [slots] (μ, ρ)

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

fn sigmoid(v: f32) -> f32 {
    return 1.0 / (1.0 + exp(-v));
}

fn activate(v: f32) -> f32 {
    switch (ACTIVATION) {
        case 1u: {
            return sigmoid(v);
        }
        case 2u: {
            // Some drivers' tanh overflows for large arguments; ±1 is exact in f32 from 10 on. A clamp would hide NaN.
            return select(tanh(clamp(v, -10.0, 10.0)), v, (bitcast<u32>(v) & 0x7fffffffu) > 0x7f800000u);
        }
        case 3u: {
            return v * sigmoid(v);
        }
        case 4u: {
            return 1.0 + v;
        }
        default: {
            return v;
        }
    }
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.y * groups.x + group.x;
    if (row >= params.rows) {
        return;
    }
    let x_base = params.x_offset + row * params.x_row;
    let base = row * params.width;
    let width = f32(params.width);
    var mean = 0.0;
    if (NORM == 0u) {
        var sum = 0.0;
        for (var i = lane; i < params.width; i += WORKGROUP) {
            sum += x[x_base + i] * activate(g[base + i]);
        }
        mean = workgroup_sum(lane, sum) / width;
    }
    var scale = 1.0;
    if (NORM != 2u) {
        var squares = 0.0;
        for (var i = lane; i < params.width; i += WORKGROUP) {
            let centred = x[x_base + i] * activate(g[base + i]) - mean;
            squares += centred * centred;
        }
        scale = inverseSqrt(workgroup_sum(lane, squares) / width + params.eps);
    }
    for (var i = lane; i < params.width; i += WORKGROUP) {
        var value = (x[x_base + i] * activate(g[base + i]) - mean) * scale;
        if (NORM != 2u) {
            value *= decode(weight[word_of(i)], i);
        }
        if (NORM == 0u) {
            value += decode(bias[word_of(i)], i);
        }
        y[base + i] = value;
    }
    if (WRITE_STATISTICS == 1u && lane == 0u) {
        let slot = slots[row];
        if (slot != 0xffffffffu) {
            statistics[slot] = vec2<f32>(mean, scale);
        }
    }
}

// Statistics of the gate's norm for new tokens, from their keys and values and their gate rows.
//
//   z = kv ⊙ act(g)    layer_norm: μ = mean(z), ρ = 1/√(var(z) + eps)    rms_norm: μ = 0, ρ = 1/√(mean(z²) + eps)
//
// The keys and values of a token are blocks of two parts, keys and values of a head. The norm does not count the padding at the
// end of a part. One pass updates mean and spread element by element, then joins them across lanes, as in norm.
// Floor: keys, values and gate rows of the tokens once over the copy rate; for a token the dispatch.
// grid: one workgroup per WORKGROUP / LANES tokens, folded into x and y.
// Static (RDNA3, Mesa 25), at most: 24 registers, 1 024 bytes of workgroup memory, nothing spilled.
// On an H200 at commit 10d32d5: one token of 12 heads of 64 + 64, some 5 µs without wgpu's shader checks, 8 with them. Not measured since.

override GATES_F16: u32 = 0u;     // gates
override MORE_F16: u32 = 0u;      // gates_more
override SOURCES: u32 = 0u;       // of gate rows: 0 gates and gates_more, 1 gates only, 2 gates_more only
override ACTIVATION: u32 = 0u;    // 0 identity, 1 sigmoid, 2 tanh, 3 silu, 4 one_plus
override NORM: u32 = 0u;          // 0 layer_norm, 1 rms_norm
override PADDED: u32 = 0u;        // 1: parts end with padding
override WORKGROUP: u32 = 64u;
override LANES: u32 = 64u;        // invocations that share a token; a power of two
override SHARED: u32 = select(WORKGROUP, 1u, LANES == 1u);

const NO_ROW: u32 = 0xffffffffu;

struct Params {
    tokens: u32,
    width: u32,         // padding included
    used: u32,          // elements of a token without padding
    first: u32,         // elements of a block's first part, padding included
    block: u32,         // of both parts
    first_used: u32,    // elements of a block's first part without padding
    second_used: u32,
    gate_pitch: u32,    // elements of a gate row in `gates`
    more_pitch: u32,    // elements of a gate row in `gates_more`
    resident: u32,      // gate rows in `gates`; those from here on are in `gates_more`
    more_first: u32,    // gate row in `gates_more` of token 0; token t without a resident one has more_first + t
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> kv: array<f32>;                       // [tokens, width]
@group(0) @binding(2) var<storage, read> gates: array<u32>;                    // [resident, gate_pitch], before the activation
@group(0) @binding(3) var<storage, read> gates_more: array<u32>;               // [more gate rows, more_pitch]
@group(0) @binding(4) var<storage, read> rows: array<u32>;                     // [tokens] resident gate row; u32 max: none
@group(0) @binding(5) var<storage, read> slots: array<u32>;                    // [tokens] cache rows
@group(0) @binding(6) var<storage, read_write> statistics: array<vec2<f32>>;   // [cache rows] (μ, ρ)

// (elements, mean, squared distances from it) per invocation.
var<workgroup> sh_moments: array<vec4<f32>, SHARED>;

// Element i of `gates`.
fn gate_at(i: u32) -> f32 {
    if (GATES_F16 == 1u) {
        let pair = unpack2x16float(gates[i >> 1u]);
        return select(pair.x, pair.y, (i & 1u) == 1u);
    }
    return bitcast<f32>(gates[i]);
}

// Element i of `gates_more`.
fn more_at(i: u32) -> f32 {
    if (MORE_F16 == 1u) {
        let pair = unpack2x16float(gates_more[i >> 1u]);
        return select(pair.x, pair.y, (i & 1u) == 1u);
    }
    return bitcast<f32>(gates_more[i]);
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

// Element i of a gate row, activated.
fn gate_of(gate_row: u32, i: u32) -> f32 {
    if (SOURCES == 1u || (SOURCES == 0u && gate_row < params.resident)) {
        return activate(gate_at(gate_row * params.gate_pitch + i));
    }
    return activate(more_at((gate_row - params.resident) * params.more_pitch + i));
}

fn is_padding(i: u32) -> bool {
    let at = i % params.block;
    if (at < params.first) {
        return at >= params.first_used;
    }
    return at - params.first >= params.second_used;
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let part = lane % LANES;
    let token = (group.y * groups.x + group.x) * (WORKGROUP / LANES) + lane / LANES;
    // Past the last token there is nothing to do, but the barriers need every invocation.
    let known = token < params.tokens;
    let width = select(0u, params.width, known);
    let base = token * params.width;
    var gate_row = 0u;
    if (known) {
        gate_row = select(rows[token], params.resident + params.more_first + token, rows[token] == NO_ROW);
    }
    var own = vec4<f32>(0.0);
    for (var i = part; i < width; i += LANES) {
        if (PADDED == 1u && is_padding(i)) {
            continue;
        }
        let z = kv[base + i] * gate_of(gate_row, i);
        own.x += 1.0;
        if (NORM == 0u && own.x == 1.0) {
            // Exact, so that equal elements have no spread at all.
            own.y = z;
            continue;
        }
        let apart = z - own.y;
        if (NORM == 0u) {
            own.y += apart / own.x;
        }
        own.z += apart * (z - own.y);
    }
    let moments = joined_lanes(lane, own);
    if (known && part == 0u) {
        let mean = select(0.0, moments.y, NORM == 0u);
        statistics[slots[token]] = vec2<f32>(mean, inverseSqrt(moments.z / f32(params.used) + params.eps));
    }
}

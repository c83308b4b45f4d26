// Combines the partial results of a query: the softmax over all splits, from the maximum and the sum of each.
//
//   m = max_s m_s    l = Σ_s l_s e^(m_s−m)    values = Σ_s e^(m_s−m) values_s / l    lse = m + ln l (natural)
//
// A query without any key gives values 0 and lse = lowest f32.
// grid: one workgroup per (token, head), folded into x and y.

override WORKGROUP: u32 = 64u;

const LOWEST: f32 = -3.4028234e38;

struct Params {
    tokens: u32,
    n_head: u32,
    width: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> partial_values: array<f32>;         // [splits, n_head, width]
@group(0) @binding(2) var<storage, read> partial_softmax: array<vec2<f32>>;  // [splits, n_head] (m_s, l_s)
@group(0) @binding(3) var<storage, read> ranges: array<vec2<u32>>;           // [tokens] (first split, splits)
@group(0) @binding(4) var<storage, read_write> values: array<f32>;           // [tokens, n_head, width]
@group(0) @binding(5) var<storage, read_write> lse: array<f32>;              // [tokens, n_head]

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.y * groups.x + group.x;
    let token = index / params.n_head;
    let head = index % params.n_head;
    if (token >= params.tokens) {
        return;
    }
    let first = ranges[token].x;
    let end = first + ranges[token].y;
    var best = LOWEST;
    for (var split = first; split < end; split++) {
        best = max(best, partial_softmax[split * params.n_head + head].x);
    }
    var sum = 0.0;
    for (var split = first; split < end; split++) {
        let state = partial_softmax[split * params.n_head + head];
        sum += state.y * exp(state.x - best);
    }
    let factor = select(0.0, 1.0 / sum, sum > 0.0);
    for (var column = lane; column < params.width; column += WORKGROUP) {
        var value = 0.0;
        for (var split = first; split < end; split++) {
            let i = split * params.n_head + head;
            value += exp(partial_softmax[i].x - best) * partial_values[i * params.width + column];
        }
        values[index * params.width + column] = value * factor;
    }
    if (lane == 0u) {
        lse[index] = select(LOWEST, best + log(sum), sum > 0.0);
    }
}

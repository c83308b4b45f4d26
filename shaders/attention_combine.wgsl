// Combines the partial results of a query: the softmax over all splits, from the maximum and the sum of each.
//
//   m = max_s m_s    l = Σ_s l_s e^(m_s−m)    values = Σ_s e^(m_s−m) values_s / l    lse = m + ln l (natural)
//
// Each lane of a team owns four columns. The team takes every TEAMS-th split, with a running maximum, so that each partial result
// is read once; then the teams of a workgroup join in pairs. A query without any key gives values 0 and lse = lowest f32.
// Floor: the partial results are read once, 2 MB for 16 heads of 512 in 64 splits, under a microsecond on a GPU of 4 TB/s; the rest
// is the dispatch. Splits and columns in parallel: 128 workgroups of 256 for one query of 16 heads of 512.
// grid: one workgroup per ⌈width / 4·LANES⌉ tiles of every (token, head), folded into x and y.
//
// Not measured on a GPU. The form before, which walked all splits in one workgroup a head, took 25 to 285 µs there.
// Static (RDNA3, Mesa 25), at most: 24 registers, 6 144 bytes of workgroup memory, nothing spilled.

override LANES: u32 = 16u;
override TEAMS: u32 = 16u;                                  // a power of two
override WORKGROUP: u32 = LANES * TEAMS;
override SHARED: u32 = select(WORKGROUP, 1u, TEAMS == 1u);

const LOWEST: f32 = -3.4028234e38;

struct Params {
    tokens: u32,
    n_head: u32,
    width: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> partial_values: array<vec4<f32>>;   // [splits, n_head, width / 4]
@group(0) @binding(2) var<storage, read> partial_softmax: array<vec2<f32>>;  // [splits, n_head] (m_s, l_s)
@group(0) @binding(3) var<storage, read> ranges: array<vec2<u32>>;           // [tokens] (first split, splits)
@group(0) @binding(4) var<storage, read_write> values: array<vec4<f32>>;     // [tokens, n_head, width / 4]
@group(0) @binding(5) var<storage, read_write> lse: array<f32>;              // [tokens, n_head]

// What a lane has after its splits.
var<workgroup> sh_values: array<vec4<f32>, SHARED>;
var<workgroup> sh_state: array<vec2<f32>, SHARED>;   // (m, l)

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let fours = params.width / 4u;
    let tiles = (fours + LANES - 1u) / LANES;
    let tile = group.y * groups.x + group.x;
    let index = tile / tiles;
    let head = index % params.n_head;
    // Past the last query there is nothing to read, but the barriers need every invocation.
    let known = index < params.tokens * params.n_head;
    let column = tile % tiles * LANES + local % LANES;
    var range = vec2<u32>(0u);
    if (known) {
        range = ranges[index / params.n_head];
    }
    var best = LOWEST;
    var sum = 0.0;
    var value = vec4<f32>(0.0);
    for (var split = local / LANES; split < range.y; split += TEAMS) {
        let i = (range.x + split) * params.n_head + head;
        let state = partial_softmax[i];
        let next = max(best, state.x);
        let kept = exp(best - next);
        let weight = exp(state.x - next);
        best = next;
        sum = sum * kept + state.y * weight;
        if (column < fours) {
            value = value * kept + weight * partial_values[i * fours + column];
        }
    }
    if (TEAMS > 1u) {
        sh_values[local % SHARED] = value;
        sh_state[local % SHARED] = vec2<f32>(best, sum);
        for (var step = WORKGROUP / 2u; step >= LANES; step /= 2u) {
            workgroupBarrier();
            if (local < step) {
                let state = sh_state[(local + step) % SHARED];
                let next = max(best, state.x);
                let kept = exp(best - next);
                let weight = exp(state.x - next);
                best = next;
                sum = sum * kept + state.y * weight;
                value = value * kept + weight * sh_values[(local + step) % SHARED];
                sh_values[local % SHARED] = value;
                sh_state[local % SHARED] = vec2<f32>(best, sum);
            }
        }
    }
    if (known && local < LANES && column < fours) {
        values[index * fours + column] = value * select(0.0, 1.0 / sum, sum > 0.0);
        if (column == 0u) {
            lse[index] = select(LOWEST, best + log(sum), sum > 0.0);
        }
    }
}

// Matrix product by cooperative matrices of 16 × 16: f16 weights, x rounded to f16, sums in f32.
//
//   y[b, m, n] = Σ_k f16(x[b, m, k]) · w[b, n, k] + bias[n]
//
// grid: (⌈cols / 64⌉, ⌈rows / 16⌉, batch); a subgroup owns 16 × 16 elements of y at a time, a workgroup four such tiles.
// inner and cols are multiples of 16. Not run on any adapter: naga validates it and translates it to SPIR-V, no more. wgpu
// opens devices with this feature through an unsafe token only, and a device does not tell which shapes it has: nothing in
// this crate chooses the kernel, callers who know their adapter (`Adapter::cooperative_matrix_properties`) may.

enable f16;
enable wgpu_cooperative_matrix;

override HAS_BIAS: u32 = 0u;

struct Params {
    rows: u32,
    inner: u32,
    cols: u32,
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
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;           // x_offset + b·x_batch + m·x_row + k
@group(0) @binding(2) var<storage, read> w: array<f16>;           // w_offset + b·w_batch + n·w_col + k
@group(0) @binding(3) var<storage, read> bias: array<f16>;        // [cols]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;     // y_offset + b·y_batch + m·y_row + n

var<workgroup> sh_x: array<f16, 256>;
var<workgroup> sh_y: array<f32, 1024>;

@compute @workgroup_size(64, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    let row0 = group.y * 16u;
    let col0 = group.x * 64u;
    let x_base = params.x_offset + group.z * params.x_batch;
    let w_base = params.w_offset + group.z * params.w_batch;
    let y_base = params.y_offset + group.z * params.y_batch;
    // Every subgroup makes every turn, so that all meet at the barriers.
    for (var turn = 0u; turn < 4u; turn += subgroups) {
        let tile = turn + subgroup;
        // A tile past the end repeats the last one; its sums are not stored.
        let col = min(col0 + 16u * tile, params.cols - 16u);
        var acc = coop_mat16x16<f32, C>();
        for (var k0 = 0u; k0 < params.inner; k0 += 16u) {
            for (var e = lane; e < 256u; e += 64u) {
                let row = min(row0 + e / 16u, params.rows - 1u);
                sh_x[e] = f16(x[x_base + row * params.x_row + k0 + e % 16u]);
            }
            workgroupBarrier();
            // Rows of 16 k; columns of 16 k, w_col apart.
            let a = coopLoadT<coop_mat16x16<f16, A>>(&sh_x[0], 16u);
            let b = coopLoad<coop_mat16x16<f16, B>>(&w[w_base + col * params.w_col + k0], params.w_col);
            acc = coopMultiplyAdd(a, b, acc);
            workgroupBarrier();
        }
        if (tile < 4u) {
            coopStoreT(acc, &sh_y[256u * tile], 16u);
        }
        workgroupBarrier();
    }
    for (var e = lane; e < 1024u; e += 64u) {
        let row = row0 + e % 256u / 16u;
        let n = col0 + e / 256u * 16u + e % 16u;
        if (row < params.rows && n < params.cols) {
            var value = sh_y[e];
            if (HAS_BIAS == 1u) {
                value += f32(bias[n]);
            }
            y[y_base + row * params.y_row + n] = value;
        }
    }
}

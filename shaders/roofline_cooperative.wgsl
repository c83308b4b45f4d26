// Products of cooperative matrices of 16 × 16 in registers: the rate of the adapter for f16 factors and f32 sums.
//
//   y[g, 4·i + j] = iterations · f16(x[i]) · f16(x[2 + j]),  i = 0, 1, j = 0 … 3:  added up in iterations steps
//
// Eight independent sums keep the units busy.
// grid: one workgroup of one subgroup per g, folded into x and y. Further subgroups repeat it, and store the same.

enable f16;
enable wgpu_cooperative_matrix;

override WORKGROUP: u32 = 32u;

const SIDE: u32 = 16u;
const MATRIX: u32 = SIDE * SIDE;

// Matrices of factors, and of sums.
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

struct Params {
    groups: u32,
    iterations: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;           // [6, SIDE, SIDE]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;     // [groups, 8, SIDE, SIDE]

var<workgroup> sh_x: array<f16, 6u * MATRIX>;
var<workgroup> sh_y: array<f32, 8u * MATRIX>;

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let g = group.y * groups.x + group.x;
    if (g >= params.groups) {
        return;
    }
    for (var e = local; e < 6u * MATRIX; e += WORKGROUP) {
        sh_x[e] = f16(x[e]);
    }
    for (var e = local; e < MATRIX; e += WORKGROUP) {
        sh_y[e] = 0.0;
    }
    workgroupBarrier();
    let a0 = coopLoadT<Left>(&sh_x[0], SIDE);
    let a1 = coopLoadT<Left>(&sh_x[MATRIX], SIDE);
    let b0 = coopLoadT<Right>(&sh_x[2u * MATRIX], SIDE);
    let b1 = coopLoadT<Right>(&sh_x[3u * MATRIX], SIDE);
    let b2 = coopLoadT<Right>(&sh_x[4u * MATRIX], SIDE);
    let b3 = coopLoadT<Right>(&sh_x[5u * MATRIX], SIDE);
    var sum00 = coopLoadT<Sums>(&sh_y[0], SIDE);
    var sum01 = coopLoadT<Sums>(&sh_y[0], SIDE);
    var sum02 = coopLoadT<Sums>(&sh_y[0], SIDE);
    var sum03 = coopLoadT<Sums>(&sh_y[0], SIDE);
    var sum10 = coopLoadT<Sums>(&sh_y[0], SIDE);
    var sum11 = coopLoadT<Sums>(&sh_y[0], SIDE);
    var sum12 = coopLoadT<Sums>(&sh_y[0], SIDE);
    var sum13 = coopLoadT<Sums>(&sh_y[0], SIDE);
    for (var iteration = 0u; iteration < params.iterations; iteration += 1u) {
        sum00 = coopMultiplyAdd(a0, b0, sum00);
        sum01 = coopMultiplyAdd(a0, b1, sum01);
        sum02 = coopMultiplyAdd(a0, b2, sum02);
        sum03 = coopMultiplyAdd(a0, b3, sum03);
        sum10 = coopMultiplyAdd(a1, b0, sum10);
        sum11 = coopMultiplyAdd(a1, b1, sum11);
        sum12 = coopMultiplyAdd(a1, b2, sum12);
        sum13 = coopMultiplyAdd(a1, b3, sum13);
    }
    workgroupBarrier();
    coopStoreT(sum00, &sh_y[0], SIDE);
    coopStoreT(sum01, &sh_y[MATRIX], SIDE);
    coopStoreT(sum02, &sh_y[2u * MATRIX], SIDE);
    coopStoreT(sum03, &sh_y[3u * MATRIX], SIDE);
    coopStoreT(sum10, &sh_y[4u * MATRIX], SIDE);
    coopStoreT(sum11, &sh_y[5u * MATRIX], SIDE);
    coopStoreT(sum12, &sh_y[6u * MATRIX], SIDE);
    coopStoreT(sum13, &sh_y[7u * MATRIX], SIDE);
    workgroupBarrier();
    for (var e = local; e < 8u * MATRIX; e += WORKGROUP) {
        y[g * 8u * MATRIX + e] = sh_y[e];
    }
}

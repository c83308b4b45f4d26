// Embeddings by token id.
//
//   y[r, :] = table[ids[r] - first_id, :]        an id of u32 max gives zeros
//
// Rows of ids that the table does not hold stay as they are: another shard of it writes them.
// Floor: the rows read in their storage and written in f32, over the copy rate; for a token the dispatch.
// grid: one invocation per element of y, folded into x and y.
// Static (RDNA3, Mesa 25), at most: 12 registers, no workgroup memory, nothing spilled.
// On an H200 at commit 10d32d5: one token, some 2 µs. Not measured since.

override STORAGE_F16: u32 = 0u;
override WORKGROUP: u32 = 64u;

struct Params {
    rows: u32,
    width: u32,
    table_row: u32,    // elements from one embedding to the next
    first_id: u32,     // of the table
    vocab_size: u32,   // embeddings of the table
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> table: array<u32>;       // [vocab, table_row]
@group(0) @binding(2) var<storage, read> ids: array<u32>;         // [rows]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;     // [rows, width]

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

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.y * groups.x + group.x) * WORKGROUP + lane;
    let entry = index / params.width;
    if (entry >= params.rows) {
        return;
    }
    let id = ids[entry];
    if (id == 0xffffffffu) {
        y[index] = 0.0;
        return;
    }
    let row = id - params.first_id;
    if (id < params.first_id || row >= params.vocab_size) {
        return;
    }
    let i = row * params.table_row + index % params.width;
    y[index] = decode(table[index_of(i)], i);
}

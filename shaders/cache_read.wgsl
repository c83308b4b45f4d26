// Reads a tile of cached latents, their cache rows, and the gate embeddings of their token ids, for the kernels that rebuild keys
// and values.
//
// The step's row numbering counts the cache rows of its sequences, one sequence after another. Each begins at its first_row, a
// multiple of the split length, so there are numbers past a sequence's end: these read as latent 0, embedding 0, slot u32 max.
//
//   latent[r, :] = latent_cache[slot(first_row + r), :]    embedding[r, :] = gate_embedding[id_cache[slot(first_row + r)], :]
//
// Floor: latents and embeddings read in their storage and written in f32, over the copy rate.
// grid: one invocation per element of latent and of embedding, folded into x and y.
// Static (RDNA3, Mesa 25), at most: 12 registers, no workgroup memory, nothing spilled.
// On an H200 at commit 10d32d5: 1024 rows, some 4 µs. Not measured since.

override STORAGE_F16: u32 = 0u;
override TABLE_F16: u32 = 0u;
override WORKGROUP: u32 = 64u;

struct Params {
    first_row: u32,
    rows: u32,
    d_latent: u32,
    latent_pitch: u32,    // elements of a latent cache row
    n_sequence: u32,
    d_gate: u32,          // 0: no embeddings
    table_row: u32,       // elements from one embedding to the next
}

// A line of the sequence table.
struct SequenceRow {
    first_row: u32,    // in the step's numbering of cache rows
    first_slot: u32,   // cache row of position 0
    length: u32,       // tokens, those of this step included
    token: u32,        // first new token
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> latent_cache: array<u32>;        // [cache rows, latent_pitch]
@group(0) @binding(2) var<storage, read> id_cache: array<u32>;            // [cache rows]
@group(0) @binding(3) var<storage, read> sequences: array<SequenceRow>;    // [n_sequence]
@group(0) @binding(4) var<storage, read> gate_embedding: array<u32>;      // [vocab, table_row]
@group(0) @binding(5) var<storage, read_write> latent: array<f32>;        // [rows, d_latent]
@group(0) @binding(6) var<storage, read_write> embedding: array<f32>;     // [rows, d_gate]
@group(0) @binding(7) var<storage, read_write> slots: array<u32>;         // [rows]

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

// Element i of `gate_embedding`.
fn embedding_at(i: u32) -> f32 {
    if (TABLE_F16 == 1u) {
        let pair = unpack2x16float(gate_embedding[i >> 1u]);
        return select(pair.x, pair.y, (i & 1u) == 1u);
    }
    return bitcast<f32>(gate_embedding[i]);
}

// Index of the last sequence that begins at or before `row`.
fn sequence_of(row: u32, n_sequence: u32) -> u32 {
    var low = 0u;
    var high = n_sequence;
    while (high - low > 1u) {
        let middle = (low + high) / 2u;
        if (sequences[middle].first_row <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.y * groups.x + group.x) * WORKGROUP + lane;
    let columns = params.d_latent + params.d_gate;
    let row = index / columns;
    let column = index % columns;
    if (row >= params.rows) {
        return;
    }
    let at = params.first_row + row;
    let sequence = sequences[sequence_of(at, params.n_sequence)];
    let position = at - sequence.first_row;
    let valid = position < sequence.length;
    let slot = sequence.first_slot + position;
    var value = 0.0;
    if (column >= params.d_latent) {
        let i = column - params.d_latent;
        if (valid) {
            value = embedding_at(id_cache[slot] * params.table_row + i);
        }
        embedding[row * params.d_gate + i] = value;
        return;
    }
    if (valid) {
        let i = slot * params.latent_pitch + column;
        value = decode(latent_cache[index_of(i)], i);
    }
    latent[row * params.d_latent + column] = value;
    if (column == 0u) {
        slots[row] = select(0xffffffffu, slot, valid);
    }
}

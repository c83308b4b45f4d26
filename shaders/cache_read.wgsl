// Reads a tile of cached latents, with their token ids and cache rows, for the kernels that rebuild keys and values.
//
// The sequences of a step stand one after another in one row numbering; each begins at `sequences[s].x`, a multiple of
// the split length, so rows past a sequence's end exist: they read as latent 0, id 0 and slot u32 max.
//
//   latent[r, :] = latent_cache[slot(first_row + r), :]
//
// grid: one invocation an element of latent, folded into x and y.

override STORAGE_F16: u32 = 0u;
override WITH_IDS: u32 = 0u;
override WORKGROUP: u32 = 64u;

struct Params {
    first_row: u32,
    rows: u32,
    d_latent: u32,
    latent_pitch: u32,    // elements of a latent cache row
    n_sequence: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> latent_cache: array<u32>;        // [cache rows, latent_pitch]
@group(0) @binding(2) var<storage, read> id_cache: array<u32>;            // [cache rows]
@group(0) @binding(3) var<storage, read> sequences: array<vec4<u32>>;     // [n_sequence] (first row, first cache row, length, token)
@group(0) @binding(4) var<storage, read_write> latent: array<f32>;        // [rows, d_latent]
@group(0) @binding(5) var<storage, read_write> ids: array<u32>;           // [rows]
@group(0) @binding(6) var<storage, read_write> slots: array<u32>;         // [rows]

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

// Index of the last sequence that begins at or before `row`.
fn sequence_of(row: u32, n_sequence: u32) -> u32 {
    var low = 0u;
    var high = n_sequence;
    while (high - low > 1u) {
        let middle = (low + high) / 2u;
        if (sequences[middle].x <= row) {
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
    let row = index / params.d_latent;
    let column = index % params.d_latent;
    if (row >= params.rows) {
        return;
    }
    let at = params.first_row + row;
    let sequence = sequences[sequence_of(at, params.n_sequence)];
    let position = at - sequence.x;
    let valid = position < sequence.z;
    let slot = sequence.y + position;
    var value = 0.0;
    if (valid) {
        let i = slot * params.latent_pitch + column;
        value = decode(latent_cache[word_of(i)], i);
    }
    latent[index] = value;
    if (column == 0u) {
        slots[row] = select(0xffffffffu, slot, valid);
        if (WITH_IDS == 1u) {
            var id = 0u;
            if (valid) {
                id = id_cache[slot];
            }
            ids[row] = id;
        }
    }
}

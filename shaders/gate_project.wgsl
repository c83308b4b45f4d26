// Gate rows by token id, before their activation, to be kept: in a pool, or for the whole vocabulary.
//
//   y[targets[r], n] = Σ_k gate_b_proj[n, k] · gate_embedding[ids[r], k]
//
// Without ids, entry r is id first_id + r; without targets it goes to gate row r. An id of u32 max leaves an entry out. Gate rows
// are padded with zeros to 16 bytes. f16 storage saturates: finite values beyond ±65504 become ±65504. NaN stays NaN.
// Floor: gate_b_proj once per four entries from the L2, and y once, over the copy rate.
// grid: (⌈width / (4 · WORKGROUP)⌉, ⌈rows / 4⌉ folded into y and z); each invocation owns four columns of four entries.
// Static (RDNA3, Mesa 25), at most: 48 registers, no workgroup memory, nothing spilled.
// Not measured on a GPU.

override STORAGE_F16: u32 = 0u;   // table and projection
override Y_F16: u32 = 0u;
override HAS_IDS: u32 = 0u;
override HAS_TARGETS: u32 = 0u;
override WORKGROUP: u32 = 64u;

const NO_ROW: u32 = 0xffffffffu;

struct Params {
    rows: u32,         // entries
    width: u32,
    gate_pitch: u32,   // vec4s of an embedding, and of an output of gate_b_proj
    y_words: u32,      // words of a gate row
    first_id: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> gate_embedding: array<vec4<u32>>;   // [vocab, gate_pitch]
@group(0) @binding(2) var<storage, read> gate_b_proj: array<vec4<u32>>;      // [width, gate_pitch]
@group(0) @binding(3) var<storage, read> ids: array<u32>;                    // [rows]
@group(0) @binding(4) var<storage, read> targets: array<u32>;                // [rows]
@group(0) @binding(5) var<storage, read_write> y: array<u32>;                // [gate rows, y_words]

fn halves(low: u32, high: u32) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(low), unpack2x16float(high));
}

// Products of 16 bytes of an output with those of four embeddings.
fn products(w: vec4<u32>, e0: vec4<u32>, e1: vec4<u32>, e2: vec4<u32>, e3: vec4<u32>) -> vec4<f32> {
    if (STORAGE_F16 == 1u) {
        let low = halves(w.x, w.y);
        let high = halves(w.z, w.w);
        return vec4<f32>(
            dot(low, halves(e0.x, e0.y)) + dot(high, halves(e0.z, e0.w)),
            dot(low, halves(e1.x, e1.y)) + dot(high, halves(e1.z, e1.w)),
            dot(low, halves(e2.x, e2.y)) + dot(high, halves(e2.z, e2.w)),
            dot(low, halves(e3.x, e3.y)) + dot(high, halves(e3.z, e3.w)),
        );
    }
    let v = bitcast<vec4<f32>>(w);
    return vec4<f32>(
        dot(v, bitcast<vec4<f32>>(e0)),
        dot(v, bitcast<vec4<f32>>(e1)),
        dot(v, bitcast<vec4<f32>>(e2)),
        dot(v, bitcast<vec4<f32>>(e3)),
    );
}

// Two halves in a word; finite values beyond f16 become its largest. NaN and infinities stay what they are. Bits tell them apart,
// since compilers take `v != v` for false, and bits are written, since WGSL leaves pack2x16float of them open: one driver takes
// infinities for NaN and lets a NaN reach the other half.
fn pack(a: f32, b: f32) -> u32 {
    let v = vec2<f32>(a, b);
    let bits = bitcast<vec2<u32>>(v);
    let size = bits & vec2<u32>(0x7fffffffu);
    let finite = size < vec2<u32>(0x7f800000u);
    let packed = pack2x16float(select(vec2<f32>(0.0), clamp(v, vec2<f32>(-65504.0), vec2<f32>(65504.0)), finite));
    let sign = (bits >> vec2<u32>(16u)) & vec2<u32>(0x8000u);
    let odd = select(sign | vec2<u32>(0x7c00u) | min(size - vec2<u32>(0x7f800000u), vec2<u32>(0x200u)), vec2<u32>(0u), finite);
    return packed | odd.x | (odd.y << 16u);
}

// Id of an entry; u32 max for one that is left out.
fn id_of(entry: u32) -> u32 {
    if (entry >= params.rows) {
        return NO_ROW;
    }
    if (HAS_IDS == 1u) {
        return ids[entry];
    }
    return params.first_id + entry;
}

// Where the embedding of an id begins; any will do for an entry that is left out.
fn embedding_of(id: u32) -> u32 {
    return select(id * params.gate_pitch, 0u, id == NO_ROW);
}

fn store(entry: u32, id: u32, column: u32, value: vec4<f32>) {
    if (id == NO_ROW) {
        return;
    }
    var to = entry;
    if (HAS_TARGETS == 1u) {
        to = targets[entry];
    }
    // Columns past the end are padding.
    let inside = vec4<u32>(column) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(params.width);
    let v = select(vec4<f32>(0.0), value, inside);
    if (Y_F16 == 1u) {
        let word = to * params.y_words + column / 2u;
        y[word] = pack(v.x, v.y);
        y[word + 1u] = pack(v.z, v.w);
    } else {
        let word = to * params.y_words + column;
        y[word] = bitcast<u32>(v.x);
        y[word + 1u] = bitcast<u32>(v.y);
        y[word + 2u] = bitcast<u32>(v.z);
        y[word + 3u] = bitcast<u32>(v.w);
    }
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let entry = (group.z * groups.y + group.y) * 4u;
    let column = (group.x * WORKGROUP + lane) * 4u;
    let columns = params.y_words * select(1u, 2u, Y_F16 == 1u);
    let id0 = id_of(entry);
    let id1 = id_of(entry + 1u);
    let id2 = id_of(entry + 2u);
    let id3 = id_of(entry + 3u);
    if (column >= columns || (id0 & id1 & id2 & id3) == NO_ROW) {
        return;
    }
    // Columns past the last one repeat it.
    let last = params.width - 1u;
    let w0 = min(column, last) * params.gate_pitch;
    let w1 = min(column + 1u, last) * params.gate_pitch;
    let w2 = min(column + 2u, last) * params.gate_pitch;
    let w3 = min(column + 3u, last) * params.gate_pitch;
    let t0 = embedding_of(id0);
    let t1 = embedding_of(id1);
    let t2 = embedding_of(id2);
    let t3 = embedding_of(id3);
    // One component per entry.
    var a0 = vec4<f32>(0.0);
    var a1 = vec4<f32>(0.0);
    var a2 = vec4<f32>(0.0);
    var a3 = vec4<f32>(0.0);
    for (var k = 0u; k < params.gate_pitch; k++) {
        let e0 = gate_embedding[t0 + k];
        let e1 = gate_embedding[t1 + k];
        let e2 = gate_embedding[t2 + k];
        let e3 = gate_embedding[t3 + k];
        a0 += products(gate_b_proj[w0 + k], e0, e1, e2, e3);
        a1 += products(gate_b_proj[w1 + k], e0, e1, e2, e3);
        a2 += products(gate_b_proj[w2 + k], e0, e1, e2, e3);
        a3 += products(gate_b_proj[w3 + k], e0, e1, e2, e3);
    }
    store(entry, id0, column, vec4<f32>(a0.x, a1.x, a2.x, a3.x));
    store(entry + 1u, id1, column, vec4<f32>(a0.y, a1.y, a2.y, a3.y));
    store(entry + 2u, id2, column, vec4<f32>(a0.z, a1.z, a2.z, a3.z));
    store(entry + 3u, id3, column, vec4<f32>(a0.w, a1.w, a2.w, a3.w));
}

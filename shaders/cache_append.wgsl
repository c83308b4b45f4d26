// Writes latents and rotary keys of new tokens to their cache rows, in 16-byte loads and stores: latents normed and gated, keys
// rotated on the way. Copies the queries that stand beside them, rotated; those of a low rank are products with their normed latents. Keys
// and values of the new latents, whose statistics a gate's norm needs, are products of the same form.
//
//   c = RMSNorm(x[t, latent]) · weight           with a gate: c ← Norm(c ⊙ act(g[t])), layer_norm, rms_norm or none as in `gate`
//   latents[slots[t], :] = c    rotary keys[slots[t], :] = RoPE_t(k_R[t, :])    q[t, h] = (q_C[t, h], RoPE_t(q_R[t, h]))
//   of a low rank:  (q_C, q_R)[t, n] = ρ_t Σ_k w[n, k] · γ[k] · x[t, k]        ρ_t = 1/√(mean(x[t]²) + eps)
//   keys and values:  kv[t, n] = Σ_k kv_b_proj[n, k] · c[t, k]        c as the cache has it, so rounded where it is f16
//
// RoPE rotates the pairs (2i, 2i+1): a layer whose pairs are half a head apart brings them together when it uploads its weights.
// f16 storage saturates: finite values beyond ±65504 become ±65504. NaN stays NaN, so that a broken model shows.
// Norms are those of `norm` and `gate`: one pass updates mean and spread vector by vector, then joins them across lanes.
// None of these waits for another, so one dispatch has them all. The norm's factor ρ leaves the sum of a query, so that the squares of
// its latent are summed along with the products, and x is read once; a workgroup of keys and values norms and rounds the latents of
// its tokens first.
// grid: one workgroup per WORKGROUP / LANES items, folded into x and y; items are the tokens, then the heads of all tokens, unless
// queries are of a low rank. Behind them come ⌈columns / COLUMNS⌉ workgroups of products for every 4 tokens, those of queries first,
// where COLUMN_LANES invocations share 4 columns, each summing every COLUMN_LANES-th load. Floor there: the weights, once per 4 tokens.
//
// Results, interleaved runs on lavapipe (2 cores), 16 384 tokens of 64 + 64 without a norm, per cent of the copy kernel: in f16
// 8 invocations with an item each 76, with rotation 72; with pack2x16float in place of integers 55, before halves of
// infinities and NaN were written as bits. f32 84. 8 invocations that share an item: 23 in f16, 73 in f32.
// On an H200 at commit 10d32d5: 65 536 tokens of 64 + 64 in f16, 19.8 µs, 60 % of the copy rate. Not measured since.
// Static (RDNA3, Mesa 25), at most: 72 registers, 6 656 bytes of workgroup memory, nothing spilled.

override STORAGE_F16: u32 = 0u;  // weights of the norms
override CACHE_F16: u32 = 0u;
override RMS: u32 = 0u;          // 1: the latent is normed
override GATED: u32 = 0u;        // 1: and gated
override ACTIVATION: u32 = 0u;   // 0 identity, 1 sigmoid, 2 tanh, 3 silu, 4 one_plus
override NORM: u32 = 2u;         // of the gate: 0 layer_norm, 1 rms_norm, 2 none
override PADDED: u32 = 0u;       // 1: latents end with padding
override ROTATE: u32 = 0u;       // 1: keys and queries are rotated
override KEPT: u32 = 0u;         // 1: latents are kept as the cache has them; 2: their keys and values
override LOW_RANK: u32 = 0u;     // 1: queries are of a low rank
override SINGLE: u32 = 0u;       // 1: there is one token, and no code for products of more
override WORKGROUP: u32 = 64u;
override LANES: u32 = 16u;       // invocations that share an item; a power of two
override SHARED: u32 = select(WORKGROUP, 1u, LANES == 1u);
override COLUMN_LANES: u32 = 16u;    // invocations that share four columns of a product; a power of two
override COLUMNS: u32 = 4u * WORKGROUP / COLUMN_LANES;
override TOKENS: u32 = select(4u, 1u, SINGLE == 1u);
// One invocation per column has nothing to add up.
override SUMS: u32 = select(select(WORKGROUP * (TOKENS + 1u), 1u, COLUMN_LANES == 1u), 1u, LOW_RANK == 0u && KEPT != 2u);
override STAGED: u32 = 1u;           // vectors of the latents of TOKENS tokens, if keys and values are made of them
override INTEGERS: u32 = 0u;     // 1: integer arithmetic rounds halves
// 16-byte loads for one store.
override LOADS: u32 = 1u + CACHE_F16;
// Vectors of x for a 16-byte load of weights.
override X_LOADS: u32 = 1u + STORAGE_F16;

struct Params {
    tokens: u32,
    row: u32,            // elements of x from one token to the next
    d_latent: u32,
    latent_used: u32,    // elements of a latent without its padding
    latent_offset: u32,
    d_rope: u32,
    rope_offset: u32,
    rope_cache: u32,     // first 16 bytes of the rotary keys in `cache`
    q_heads: u32,        // 0 for none
    q_offset: u32,
    d_nope: u32,         // elements of a head before its rotary part
    gamma: u32,          // elements of `weight` before γ and β of the gate's norm
    beta: u32,
    kept: u32,           // elements of q before what is kept
    kv_columns: u32,     // of keys and values
    eps: f32,
    gate_eps: f32,
    rank: u32,           // of the queries, padding included
    rank_used: u32,      // without it
    q_gamma: u32,        // elements of `weight` before γ of the queries
    q_eps: f32,
    row_groups: u32,     // workgroups before those of queries
    kv_groups: u32,      // before those of keys and values
    column_tiles: u32,   // workgroups of 4 queries
    kv_tiles: u32,       // of the keys and values of 4 tokens
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;             // [tokens, row] / 4
@group(0) @binding(2) var<storage, read> weight: array<vec4<u32>>;        // [d_latent] each: norm, γ, β; at q_gamma [rank]; / 4, f16: / 8
// [tokens, d_latent] f32 / 4 gate before its activation; or kv_b_proj [kv_columns, d_latent] / 4, f16: / 8
@group(0) @binding(3) var<storage, read> g: array<vec4<u32>>;             // [tokens, d_latent] or [kv_columns, d_latent]
@group(0) @binding(4) var<storage, read> rotations: array<vec4<f32>>;     // [tokens, d_rope / 4] (cos, sin) of two pairs
@group(0) @binding(5) var<storage, read> slots: array<u32>;               // [tokens] cache rows, u32 max for none
@group(0) @binding(6) var<storage, read> w: array<vec4<u32>>;             // [q_heads · (d_nope + d_rope), rank] / 4, f16: / 8
@group(0) @binding(7) var<storage, read_write> cache: array<vec4<u32>>;   // [cache rows, d_latent], [cache rows, d_rope]; / 4, f16: / 8
@group(0) @binding(8) var<storage, read_write> q: array<vec4<f32>>;       // [tokens, q_heads, d_nope + d_rope], at kept [tokens, d_latent or kv_columns]; / 4

// (elements, mean, squared distances from it) per invocation.
var<workgroup> sh_moments: array<vec4<f32>, SHARED>;
// sh_sums[j·WORKGROUP + lane]: four columns of token j; behind them the squares, one component per token.
var<workgroup> sh_sums: array<vec4<f32>, SUMS>;
// Latents as the cache has them.
var<workgroup> sh_latents: array<vec4<f32>, STAGED>;

// Vector i of a tensor in f32 or f16 storage, given the load that holds it.
fn four_of(load: vec4<u32>, i: u32) -> vec4<f32> {
    if (STORAGE_F16 == 1u) {
        let words = select(load.xy, load.zw, (i & 1u) == 1u);
        return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
    }
    return bitcast<vec4<f32>>(load);
}

// Index of the word that holds element i, or of the load that holds vector i, in f32 or f16 storage.
fn index_of(i: u32) -> u32 {
    return select(i, i >> 1u, STORAGE_F16 == 1u);
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

fn activate_four(v: vec4<f32>) -> vec4<f32> {
    switch (ACTIVATION) {
        case 1u: {
            return 1.0 / (1.0 + exp(-v));
        }
        case 2u: {
            // Some drivers' tanh overflows for large arguments; ±1 is exact in f32 from 10 on. A clamp would hide NaN.
            let nan = (bitcast<vec4<u32>>(v) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
            return select(tanh(clamp(v, vec4<f32>(-10.0), vec4<f32>(10.0))), v, nan);
        }
        case 3u: {
            return v / (1.0 + exp(-v));
        }
        case 4u: {
            return 1.0 + v;
        }
        default: {
            return v;
        }
    }
}

// (elements, mean, squared distances) of one element; of its square alone without `centred`.
fn moments_of(v: f32, centred: bool) -> vec4<f32> {
    return select(vec4<f32>(1.0, 0.0, v * v, 0.0), vec4<f32>(1.0, v, 0.0, 0.0), centred);
}

// Those of the first `count` elements of a vector, at most 3.
fn moments_of_cut(v: vec4<f32>, count: u32, centred: bool) -> vec4<f32> {
    var all = vec4<f32>(0.0);
    if (count > 0u) {
        all = moments_of(v.x, centred);
    }
    if (count > 1u) {
        all = joined(all, moments_of(v.y, centred));
    }
    if (count > 2u) {
        all = joined(all, moments_of(v.z, centred));
    }
    return all;
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

// Four halves in the low bits of words, by integer arithmetic: what `pack` gives where the driver rounds as IEEE 754 says, to
// nearest and ties to even. Faster where the device has no instruction for it.
fn halves_of(v: vec4<f32>) -> vec4<u32> {
    let bits = bitcast<vec4<u32>>(v);
    let size = bits & vec4<u32>(0x7fffffffu);
    // The largest exponent: infinity or NaN.
    let odd = vec4<u32>(0x7c00u) | min(size - vec4<u32>(0x7f800000u), vec4<u32>(0x200u));
    // Below 2^-14: the last place of 0.5 in f32 is that of the smallest half, so the addition rounds to even.
    let small = bitcast<vec4<u32>>(bitcast<vec4<f32>>(size) + vec4<f32>(0.5)) - vec4<u32>(0x3f000000u);
    // Half a last place, less the smallest step where the last place is even: ties go to even.
    let up = vec4<u32>(0xfffu) + ((size >> vec4<u32>(13u)) & vec4<u32>(1u));
    let normal = min((size - vec4<u32>(0x38000000u) + up) >> vec4<u32>(13u), vec4<u32>(0x7bffu));
    let finite = select(normal, small, size < vec4<u32>(0x38800000u));
    return select(finite, odd, size >= vec4<u32>(0x7f800000u)) | ((bits >> vec4<u32>(16u)) & vec4<u32>(0x8000u));
}

// 16 bytes of a cache row; `more` is their second half in f16 storage.
fn stored(v: vec4<f32>, more: vec4<f32>) -> vec4<u32> {
    if (CACHE_F16 == 1u) {
        if (INTEGERS == 1u) {
            let low = halves_of(v);
            let high = halves_of(more);
            return vec4<u32>(low.xz | (low.yw << vec2<u32>(16u)), high.xz | (high.yw << vec2<u32>(16u)));
        }
        return vec4<u32>(pack(v.x, v.y), pack(v.z, v.w), pack(more.x, more.y), pack(more.z, more.w));
    }
    return bitcast<vec4<u32>>(v);
}

// Pairs (x, y) and (z, w), rotated by (cos, sin, cos, sin).
fn rotated(v: vec4<f32>, by: vec4<f32>) -> vec4<f32> {
    return v.xxzz * by + v.yyww * by.yxwz * vec4<f32>(-1.0, 1.0, -1.0, 1.0);
}

// Vector i of a token's key, rotated.
fn key(token: u32, i: u32) -> vec4<f32> {
    let v = x[(params.rope_offset + token * params.row) / 4u + i];
    if (ROTATE == 0u) {
        return v;
    }
    return rotated(v, rotations[token * (params.d_rope / 4u) + i]);
}

// Vector i of a token's latent, scaled and gated.
fn unnormed(token: u32, i: u32, scale: f32) -> vec4<f32> {
    var v = x[(params.latent_offset + token * params.row) / 4u + i];
    if (RMS == 1u) {
        v = v * scale * four_of(weight[index_of(i)], i);
    }
    if (GATED == 1u) {
        v = v * activate_four(bitcast<vec4<f32>>(g[token * (params.d_latent / 4u) + i]));
    }
    return v;
}

// μ and ρ of the gate's norm, or ρ alone of the norm before it.
fn moments_over(lane: u32, token: u32, of_gate: bool, scale: f32) -> vec2<f32> {
    // Heads have nothing to measure, but the barriers need every invocation.
    let vectors = select(0u, params.d_latent / 4u, token < params.tokens);
    let source = (params.latent_offset + token * params.row) / 4u;
    let used = params.latent_used;
    let centred = of_gate && NORM == 0u;
    // One component per fourth element.
    var count = 0.0;
    var mean = vec4<f32>(0.0);
    var squares = vec4<f32>(0.0);
    var cut = vec4<f32>(0.0);
    for (var i = lane % LANES; i < vectors; i += LANES) {
        var v = vec4<f32>(0.0);
        if (of_gate) {
            v = unnormed(token, i, scale);
        } else {
            v = x[source + i];
        }
        if (PADDED == 1u && 4u * i + 4u > used) {
            cut = joined(cut, moments_of_cut(v, max(used, 4u * i) - 4u * i, centred));
            continue;
        }
        count += 1.0;
        if (centred && count == 1.0) {
            // Exact, so that equal elements have no spread at all.
            mean = v;
            continue;
        }
        let apart = v - mean;
        if (centred) {
            mean += apart * (1.0 / count);
        }
        squares += apart * (v - mean);
    }
    let middle = mean.x + dot(mean - mean.x, vec4<f32>(0.25));
    let off = mean - middle;
    var own = vec4<f32>(4.0 * count, middle, dot(squares, vec4<f32>(1.0)) + count * dot(off, off), 0.0);
    if (PADDED == 1u) {
        own = joined(own, cut);
    }
    let all = joined_lanes(lane, own);
    let eps = select(params.eps, params.gate_eps, of_gate);
    return vec2<f32>(select(0.0, all.y, centred), inverseSqrt(all.z / f32(used) + eps));
}

// Vector i of a token's latent, as it is appended.
fn latent(token: u32, i: u32, scale: f32, moments: vec2<f32>) -> vec4<f32> {
    var v = unnormed(token, i, scale);
    if (GATED == 1u && NORM != 2u) {
        let gamma = params.gamma / 4u + i;
        v = (v - moments.x) * moments.y * four_of(weight[index_of(gamma)], gamma);
        if (NORM == 0u) {
            let beta = params.beta / 4u + i;
            v += four_of(weight[index_of(beta)], beta);
        }
    }
    return v;
}

// The first vector of a load of the cache.
fn kept_first(load: vec4<u32>, value: vec4<f32>) -> vec4<f32> {
    if (CACHE_F16 == 1u) {
        return vec4<f32>(unpack2x16float(load.x), unpack2x16float(load.y));
    }
    return value;
}

// Latents of the tokens from t0 on, as the cache has them, for a workgroup of their keys and values. Those past the last repeat it.
fn stage_latents(lane: u32, t0: u32) {
    let loads = params.d_latent / (4u * LOADS);
    for (var j = 0u; j < TOKENS; j++) {
        let token = min(t0 + j, params.tokens - 1u);
        var scale = 1.0;
        if (RMS == 1u) {
            // Every LANES invocations measure the same latent.
            scale = moments_over(lane, token, false, 1.0).y;
        }
        for (var i = lane; i < loads; i += WORKGROUP) {
            let first = unnormed(token, i * LOADS, scale);
            var second = first;
            if (CACHE_F16 == 1u) {
                second = unnormed(token, i * LOADS + 1u, scale);
            }
            let load = stored(first, second);
            let to = (j * loads + i) * LOADS;
            sh_latents[to % STAGED] = kept_first(load, first);
            if (CACHE_F16 == 1u) {
                sh_latents[(to + 1u) % STAGED] = second_of(load);
            }
        }
    }
}

// Latent and rotary key of a token.
fn append(token: u32, part: u32, scale: f32, moments: vec2<f32>) {
    let slot = slots[token];
    let latents = params.d_latent / (4u * LOADS);
    for (var i = part; i < latents; i += LANES) {
        let first = latent(token, i * LOADS, scale, moments);
        var second = first;
        if (CACHE_F16 == 1u) {
            second = latent(token, i * LOADS + 1u, scale, moments);
        }
        let load = stored(first, second);
        if (slot != 0xffffffffu) {
            cache[slot * latents + i] = load;
        }
        if (KEPT == 1u) {
            let target_at = params.kept / 4u + (token * latents + i) * LOADS;
            q[target_at] = kept_first(load, first);
            if (CACHE_F16 == 1u) {
                q[target_at + 1u] = second_of(load);
            }
        }
    }
    if (slot == 0xffffffffu) {
        return;
    }
    let keys = params.d_rope / (4u * LOADS);
    for (var i = part; i < keys; i += LANES) {
        let first = key(token, i * LOADS);
        var second = first;
        if (CACHE_F16 == 1u) {
            second = key(token, i * LOADS + 1u);
        }
        cache[params.rope_cache + slot * keys + i] = stored(first, second);
    }
}

// One head of the queries.
fn copy_head(token: u32, head: u32, part: u32) {
    let content = params.d_nope / 4u;
    let turns = params.d_rope / 4u;
    let vectors = content + turns;
    let source = (params.q_offset + token * params.row) / 4u + head * vectors;
    let target_at = (token * params.q_heads + head) * vectors;
    for (var i = part; i < vectors; i += LANES) {
        var v = x[source + i];
        if (ROTATE == 1u && i >= content) {
            v = rotated(v, rotations[token * turns + i - content]);
        }
        q[target_at + i] = v;
    }
}

// The first four elements of a load.
fn first_of(load: vec4<u32>) -> vec4<f32> {
    if (STORAGE_F16 == 1u) {
        return vec4<f32>(unpack2x16float(load.x), unpack2x16float(load.y));
    }
    return bitcast<vec4<f32>>(load);
}

// The other four of a load of f16.
fn second_of(load: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(load.z), unpack2x16float(load.w));
}

// Products of four columns with 4 elements of a latent.
fn column_products(w0: vec4<f32>, w1: vec4<f32>, w2: vec4<f32>, w3: vec4<f32>, v: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(dot(w0, v), dot(w1, v), dot(w2, v), dot(w3, v));
}

// Four columns of a token: scaled, rotated, stored.
fn finish_columns(of_kv: bool, token: u32, column: u32, sum: vec4<f32>, squares: f32) {
    if (of_kv) {
        q[(params.kept + token * params.kv_columns + column) / 4u] = sum;
        return;
    }
    let head = params.d_nope + params.d_rope;
    var v = sum * inverseSqrt(squares / f32(params.rank_used) + params.q_eps);
    let at = column % head;
    if (ROTATE == 1u && at >= params.d_nope) {
        v = rotated(v, rotations[(token * params.d_rope + at - params.d_nope) / 4u]);
    }
    q[(token * params.q_heads * head + column) / 4u] = v;
}

// A load of the weights of queries, or of keys and values.
fn weights_at(of_kv: bool, i: u32) -> vec4<u32> {
    if (KEPT == 2u && (LOW_RANK == 0u || of_kv)) {
        return g[i];
    }
    return w[i];
}

// A vector of what they are multiplied with.
fn factor_at(of_kv: bool, i: u32) -> vec4<f32> {
    if (KEPT == 2u && (LOW_RANK == 0u || of_kv)) {
        return sh_latents[i % STAGED];
    }
    return x[i];
}

// A tile of columns of up to four tokens from t0 on: of queries of a low rank, or of keys and values.
fn project_tile(of_kv: bool, t0: u32, tile: u32, lane: u32) {
    let part = lane % COLUMN_LANES;
    let count = select(min(params.tokens - t0, 4u), 1u, SINGLE == 1u);
    let columns = select(params.q_heads * (params.d_nope + params.d_rope), params.kv_columns, of_kv);
    let column = tile * COLUMNS + lane / COLUMN_LANES * 4u;
    let loads = select(params.rank, params.d_latent, of_kv) / (4u * X_LOADS);

    // Columns past the last repeat it; they are not stored.
    let w0 = min(column, columns - 4u) * loads;
    let w1 = w0 + loads;
    let w2 = w1 + loads;
    let w3 = w2 + loads;
    // Tokens past the last repeat it.
    let pitch = select(params.row, params.d_latent, of_kv) / 4u;
    let x0 = select(params.q_offset / 4u + t0 * pitch, 0u, of_kv);
    let x1 = x0 + min(1u, count - 1u) * pitch;
    let x2 = x0 + min(2u, count - 1u) * pitch;
    let x3 = x0 + min(3u, count - 1u) * pitch;

    var acc0 = vec4<f32>(0.0);
    var acc1 = vec4<f32>(0.0);
    var acc2 = vec4<f32>(0.0);
    var acc3 = vec4<f32>(0.0);
    var squares = vec4<f32>(0.0);
    for (var k = part; k < loads; k += COLUMN_LANES) {
        var scale = vec4<u32>(0u);
        if (LOW_RANK == 1u && !of_kv) {
            scale = weight[params.q_gamma / (4u * X_LOADS) + k];
        }
        let l0 = weights_at(of_kv, w0 + k);
        let l1 = weights_at(of_kv, w1 + k);
        let l2 = weights_at(of_kv, w2 + k);
        let l3 = weights_at(of_kv, w3 + k);
        for (var half = 0u; half < X_LOADS; half++) {
            var s = first_of(scale);
            var a = first_of(l0);
            var b = first_of(l1);
            var c = first_of(l2);
            var d = first_of(l3);
            if (half == 1u) {
                s = second_of(scale);
                a = second_of(l0);
                b = second_of(l1);
                c = second_of(l2);
                d = second_of(l3);
            }
            if (of_kv) {
                s = vec4<f32>(1.0);
            }
            let i = k * X_LOADS + half;
            let v0 = factor_at(of_kv, x0 + i);
            squares.x += dot(v0, v0);
            acc0 += column_products(a, b, c, d, v0 * s);
            if (SINGLE == 0u) {
                let v1 = factor_at(of_kv, x1 + i);
                let v2 = factor_at(of_kv, x2 + i);
                let v3 = factor_at(of_kv, x3 + i);
                squares += vec4<f32>(0.0, dot(v1, v1), dot(v2, v2), dot(v3, v3));
                acc1 += column_products(a, b, c, d, v1 * s);
                acc2 += column_products(a, b, c, d, v2 * s);
                acc3 += column_products(a, b, c, d, v3 * s);
            }
        }
    }
    if (COLUMN_LANES > 1u) {
        sh_sums[lane] = acc0;
        sh_sums[TOKENS * WORKGROUP + lane] = squares;
        if (SINGLE == 0u) {
            sh_sums[WORKGROUP + lane] = acc1;
            sh_sums[2u * WORKGROUP + lane] = acc2;
            sh_sums[3u * WORKGROUP + lane] = acc3;
        }
        for (var step = COLUMN_LANES / 2u; step > 0u; step /= 2u) {
            workgroupBarrier();
            if (part < step) {
                for (var j = 0u; j <= TOKENS; j++) {
                    sh_sums[j * WORKGROUP + lane] += sh_sums[j * WORKGROUP + lane + step];
                }
            }
        }
        if (part == 0u) {
            acc0 = sh_sums[lane];
            squares = sh_sums[TOKENS * WORKGROUP + lane];
            if (SINGLE == 0u) {
                acc1 = sh_sums[WORKGROUP + lane];
                acc2 = sh_sums[2u * WORKGROUP + lane];
                acc3 = sh_sums[3u * WORKGROUP + lane];
            }
        }
    }
    if (part > 0u || column >= columns) {
        return;
    }
    finish_columns(of_kv, t0, column, acc0, squares.x);
    if (SINGLE == 0u && count > 1u) {
        finish_columns(of_kv, t0 + 1u, column, acc1, squares.y);
    }
    if (SINGLE == 0u && count > 2u) {
        finish_columns(of_kv, t0 + 2u, column, acc2, squares.z);
    }
    if (SINGLE == 0u && count > 3u) {
        finish_columns(of_kv, t0 + 3u, column, acc3, squares.w);
    }
}

@compute @workgroup_size(WORKGROUP, 1, 1)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.y * groups.x + group.x;
    // Every workgroup is of one kind. A folded grid has a few more at its end.
    if (KEPT == 2u && index >= params.kv_groups) {
        let tile = index - params.kv_groups;
        let t0 = tile / params.kv_tiles * 4u;
        if (t0 >= params.tokens) {
            return;
        }
        stage_latents(lane, t0);
        workgroupBarrier();
        project_tile(true, t0, tile % params.kv_tiles, lane);
        return;
    }
    if (LOW_RANK == 1u && index >= params.row_groups) {
        let tile = index - params.row_groups;
        let t0 = tile / params.column_tiles * 4u;
        if (t0 >= params.tokens) {
            return;
        }
        project_tile(false, t0, tile % params.column_tiles, lane);
        return;
    }
    let item = index * (WORKGROUP / LANES) + lane / LANES;
    let part = lane % LANES;
    var scale = 1.0;
    var moments = vec2<f32>(0.0, 1.0);
    if (RMS == 1u) {
        scale = moments_over(lane, item, false, 1.0).y;
    }
    if (GATED == 1u && NORM != 2u) {
        moments = moments_over(lane, item, true, scale);
    }
    if (item < params.tokens) {
        append(item, part, scale, moments);
        return;
    }
    let head = item - params.tokens;
    if (LOW_RANK == 0u && head < params.tokens * params.q_heads) {
        copy_head(head / params.q_heads, head % params.q_heads, part);
    }
}

// A model's first layer in f64, from the checkpoint itself: what the kernels' results are compared with. It is written from
// the definition (the README's formulas), and `layer.json` holds logits of the library's own reference to hold it to.

import { half } from "./compare.js";

/** The tensors of a .safetensors file, by name: `{shape, data}` in f64, decoded when they are first asked for. */
export function tensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const take = (name) => {
    const entry = header[name];
    if (entry?.dtype !== "F16") throw new Error(`${name}: not there, or not of type F16`);
    const [first, end] = entry.data_offsets;
    const bits = new DataView(buffer, 8 + length + first, end - first);
    return Float64Array.from({ length: (end - first) / 2 }, (_, i) => half(bits.getUint16(2 * i, true)));
  };
  const known = new Map();
  return (name) => {
    if (!known.has(name)) known.set(name, take(name));
    return known.get(name);
  };
}

/** `y [rows, cols] = x [rows, inner] · wᵀ`, with w `[cols, inner]`. */
function linear(x, w, inner) {
  const [rows, cols] = [x.length / inner, w.length / inner];
  const y = new Float64Array(rows * cols);
  for (let row = 0; row < rows; row++) {
    for (let col = 0; col < cols; col++) {
      let sum = 0;
      for (let k = 0; k < inner; k++) sum += x[row * inner + k] * w[col * inner + k];
      y[row * cols + col] = sum;
    }
  }
  return y;
}

/** Rows of a table. */
const gather = (table, width, ids) => Float64Array.from(ids.flatMap((id) => [...table.subarray(id * width, (id + 1) * width)]));

const map = (x, f) => Float64Array.from(x, f);

function rmsNorm(x, weight, eps) {
  const width = weight.length;
  const y = new Float64Array(x.length);
  for (let first = 0; first < x.length; first += width) {
    let square = 0;
    for (let i = 0; i < width; i++) square += x[first + i] ** 2;
    const rho = 1 / Math.sqrt(square / width + eps);
    for (let i = 0; i < width; i++) y[first + i] = x[first + i] * rho * weight[i];
  }
  return y;
}

function layerNorm(x, weight, bias, eps) {
  const width = weight.length;
  const y = new Float64Array(x.length);
  for (let first = 0; first < x.length; first += width) {
    const row = x.subarray(first, first + width);
    const mean = row.reduce((sum, value) => sum + value, 0) / width;
    const variance = row.reduce((sum, value) => sum + (value - mean) ** 2, 0) / width;
    const rho = 1 / Math.sqrt(variance + eps);
    for (let i = 0; i < width; i++) y[first + i] = (row[i] - mean) * rho * weight[i] + bias[i];
  }
  return y;
}

/** Turns the last `rope` elements of each of a token's heads, neighbours in pairs, by the token's position. */
function rotate(x, heads, width, rope, theta) {
  const y = x.slice();
  for (let row = 0; row < x.length / width; row++) {
    const position = Math.floor(row / heads);
    for (let i = 0; i < rope / 2; i++) {
      const at = row * width + width - rope + 2 * i;
      const angle = position * theta ** ((-2 * i) / rope);
      const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
      y[at] = x[at] * cos - x[at + 1] * sin;
      y[at + 1] = x[at] * sin + x[at + 1] * cos;
    }
  }
  return y;
}

/** The checkpoint's low-rank norms have this epsilon, whatever its configuration says of the others. */
const LOW_RANK_EPS = 1e-6;

export class Reference {
  /** `config` is a config.json, `tensor` what `tensors` returns; throws where the model needs more than this file knows. */
  constructor(config, tensor) {
    const gate = config.embedding_gate;
    const isKnown =
      config.q_lora_rank === null &&
      config.rope_scaling === null &&
      config.rope_interleave &&
      !config.attention_bias &&
      !config.q_proj_bias &&
      config.tie_word_embeddings &&
      config.hidden_act === "silu" &&
      gate?.site === "up_projected" &&
      !gate.tied &&
      gate.activation === "identity" &&
      gate.norm === "layer_norm";
    if (!isKnown) throw new Error("this page's reference knows the layer of models/shakespeare only");
    this.config = config;
    this.tensor = tensor;
  }

  /** The stream behind the first layer, `[tokens, hidden]`. */
  stream(ids) {
    const { config, tensor } = this;
    const weight = (name) => tensor(`model.layers.0.${name}`);
    const own = (name) => weight(`self_attn.${name}`);
    const { hidden_size: hidden, num_attention_heads: heads, kv_lora_rank: rank, rope_theta: theta } = config;
    const { qk_nope_head_dim: nope, qk_rope_head_dim: rope, v_head_dim: value, rms_norm_eps: eps } = config;
    const gate = config.embedding_gate;

    const before = gather(tensor("model.embed_tokens.weight"), hidden, ids);
    const normed = rmsNorm(before, weight("input_layernorm.weight"), eps);
    const q = rotate(linear(normed, own("q_proj.weight"), hidden), heads, nope + rope, rope, theta);
    const compressed = linear(normed, own("kv_a_proj_with_mqa.weight"), hidden);
    const [latent, keys] = [[], []];
    for (let first = 0; first < compressed.length; first += rank + rope) {
      latent.push(...compressed.subarray(first, first + rank));
      keys.push(...compressed.subarray(first + rank, first + rank + rope));
    }
    const c = rmsNorm(Float64Array.from(latent), own("kv_a_layernorm.weight"), LOW_RANK_EPS);
    const kR = rotate(Float64Array.from(keys), 1, rope, rope, theta);
    const g = linear(gather(own("gate_embedding.weight"), gate.embed_dim, ids), own("gate_b_proj.weight"), gate.embed_dim);
    const up = linear(c, own("kv_b_proj.weight"), rank);
    const gated = map(up, (x, i) => x * g[i]);
    const kv = layerNorm(gated, own("gate_norm.weight"), own("gate_norm.bias"), gate.norm_eps);
    const attended = this.attend(q, kv, kR, ids.length, { heads, nope, rope, value });
    const added = linear(attended, own("o_proj.weight"), heads * value);
    const middle = map(before, (x, i) => x + added[i]);

    const again = rmsNorm(middle, weight("post_attention_layernorm.weight"), eps);
    const switched = linear(again, weight("mlp.gate_proj.weight"), hidden);
    const raised = linear(again, weight("mlp.up_proj.weight"), hidden);
    const inner = map(raised, (x, i) => (x * switched[i]) / (1 + Math.exp(-switched[i])));
    const down = linear(inner, weight("mlp.down_proj.weight"), config.intermediate_size);
    return map(middle, (x, i) => x + down[i]);
  }

  /** Causal attention, every head by itself; keys and values side by side in a row of `kv`. */
  attend(q, kv, kR, tokens, { heads, nope, rope, value }) {
    const [query, pair] = [nope + rope, nope + value];
    const scale = 1 / Math.sqrt(query);
    const out = new Float64Array(tokens * heads * value);
    for (let t = 0; t < tokens; t++) {
      for (let head = 0; head < heads; head++) {
        const [own, to] = [(t * heads + head) * query, (t * heads + head) * value];
        const scores = Array.from({ length: t + 1 }, (_, j) => {
          let sum = 0;
          for (let i = 0; i < nope; i++) sum += q[own + i] * kv[(j * heads + head) * pair + i];
          for (let i = 0; i < rope; i++) sum += q[own + nope + i] * kR[j * rope + i];
          return scale * sum;
        });
        const most = Math.max(...scores);
        const weights = scores.map((score) => Math.exp(score - most));
        const total = weights.reduce((sum, weight) => sum + weight, 0);
        for (let j = 0; j <= t; j++) {
          for (let i = 0; i < value; i++) out[to + i] += (weights[j] / total) * kv[(j * heads + head) * pair + nope + i];
        }
      }
    }
    return out;
  }

  /** Logits of a model that has no other layer, `[tokens, vocab]`. */
  logits(ids) {
    const normed = rmsNorm(this.stream(ids), this.tensor("model.norm.weight"), this.config.rms_norm_eps);
    return linear(normed, this.tensor("model.embed_tokens.weight"), this.config.hidden_size);
  }
}

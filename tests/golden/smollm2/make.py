"""Writes reference.json: what SmolLM2-135M-Instruct (Apache-2.0, Q4_1) says, by a forward pass of its own in float64.

    pip install numpy gguf
    python make.py SmolLM2-135M-Instruct.Q4_1.gguf

Nothing here is shared with the library: the package `gguf` takes the file apart and dequantises it, the tokenizer is a plain
byte-pair encoder, and queries and keys stay in the order of the file, whose rotary pairs are neighbours.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in 1984, there was a",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the boiling point of water?<|im_end|>\n<|im_start|>assistant\n",
]
NEW_TOKENS = 64

reader = GGUFReader(sys.argv[1])
field = {name: f.contents() for name, f in reader.fields.items()}
tensors = {t.name: dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}

heads, kv_heads = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
width, layers = field["llama.embedding_length"], field["llama.block_count"]
head = field["llama.rope.dimension_count"]
eps, theta = field["llama.attention.layer_norm_rms_epsilon"], field["llama.rope.freq_base"]


# The tokenizer: byte-level BPE, every digit a token of its own.
def byte_characters():
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


TO_CHARACTER = byte_characters()
IDS = {token: i for i, token in enumerate(field["tokenizer.ggml.tokens"])}
RANKS = {tuple(merge.split(" ")): i for i, merge in enumerate(field["tokenizer.ggml.merges"])}
SPECIAL = [t for t, kind in zip(field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]) if kind == 3]


def kind(c):
    return "letter" if c.isalpha() else "digit" if c.isnumeric() else "space" if c.isspace() else "other"


def words(text):
    """GPT-2's split, for texts without contractions, with single digits."""
    i = 0
    while i < len(text):
        start = i
        if kind(text[i]) == "digit":
            i += 1
        elif kind(text[i]) == "space":
            while i < len(text) and kind(text[i]) == "space":
                i += 1
            follows = i < len(text) and text[i - 1] == " " and kind(text[i]) in ("letter", "other")
            if i < len(text) and i - start > 1:
                i -= 1
            elif follows:
                first = kind(text[i])
                while i < len(text) and kind(text[i]) == first:
                    i += 1
        else:
            first = kind(text[i])
            while i < len(text) and kind(text[i]) == first:
                i += 1
        yield text[start:i]


def merged(word):
    parts = [TO_CHARACTER[b] for b in word.encode()]
    while len(parts) > 1:
        ranks = [RANKS.get(pair, math.inf) for pair in zip(parts, parts[1:])]
        best = min(range(len(ranks)), key=ranks.__getitem__)
        if ranks[best] == math.inf:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return [IDS[part] for part in parts]


def encode(text):
    for token in SPECIAL:
        if token in text:
            before, after = text.split(token, 1)
            return encode(before) + [IDS[token]] + encode(after)
    return [i for word in words(text) for i in merged(word)]


# The model.
def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def turned(x, positions):
    """Rotary pairs (2i, 2i + 1) of `[tokens, heads, head]`."""
    angle = positions[:, None, None] * theta ** (-np.arange(0, head, 2) / head)
    even, odd = x[..., 0::2], x[..., 1::2]
    y = np.empty_like(x)
    y[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
    y[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
    return y


class Model:
    def __init__(self):
        self.keys = [np.zeros((0, kv_heads, head)) for _ in range(layers)]
        self.values = [np.zeros((0, kv_heads, head)) for _ in range(layers)]

    def feed(self, ids):
        """Log-probabilities of what follows the last of these tokens."""
        first = len(self.keys[0])
        positions = np.arange(first, first + len(ids), dtype=np.float64)
        x = tensors["token_embd.weight"][ids]
        for n in range(layers):
            w = lambda name: tensors[f"blk.{n}.{name}.weight"]
            h = norm(x, w("attn_norm"))
            q = turned((h @ w("attn_q").T).reshape(-1, heads, head), positions)
            k = turned((h @ w("attn_k").T).reshape(-1, kv_heads, head), positions)
            self.keys[n] = np.concatenate([self.keys[n], k])
            self.values[n] = np.concatenate([self.values[n], (h @ w("attn_v").T).reshape(-1, kv_heads, head)])
            out = np.empty_like(q)
            hidden = np.arange(len(self.keys[n]))[None, :] > positions[:, None]
            for i in range(heads):
                group = i * kv_heads // heads
                scores = q[:, i] @ self.keys[n][:, group].T / math.sqrt(head)
                scores[hidden] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[:, i] = weights / weights.sum(-1, keepdims=True) @ self.values[n][:, group]
            x = x + out.reshape(len(ids), -1) @ w("attn_output").T
            h = norm(x, w("ffn_norm"))
            gate = h @ w("ffn_gate").T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w("ffn_up").T)) @ w("ffn_down").T
        logits = norm(x[-1], tensors["output_norm.weight"]) @ tensors.get("output.weight", tensors["token_embd.weight"]).T
        top = logits.max()
        return logits - (top + np.log(np.exp(logits - top).sum()))


cases = []
for prompt in PROMPTS:
    model, fed, chosen = Model(), encode(prompt), []
    case = {"prompt": prompt, "prompt_ids": fed}
    for _ in range(NEW_TOKENS):
        logs = model.feed(fed)
        best, second = np.argsort(logs)[[-1, -2]]
        chosen.append((int(best), float(logs[best]), float(logs[best] - logs[second])))
        fed = [int(best)]
    case["token_ids"] = [c[0] for c in chosen]
    case["log_probabilities"] = [round(c[1], 9) for c in chosen]
    case["least_margin"] = round(min(c[2] for c in chosen), 6)
    cases.append(case)

one = lambda value: json.dumps(value, ensure_ascii=False)
texts = ["  {\n" + ",\n".join(f"    {one(key)}: {one(value)}" for key, value in case.items()) + "\n  }" for case in cases]
(Path(__file__).parent / "reference.json").write_text("[\n" + ",\n".join(texts) + "\n]\n")

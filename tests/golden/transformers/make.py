"""Writes the folders beside it: what Hugging Face transformers 5.23 computes of small random models, and of what `egmla convert`
makes of them, in float64.

    pip install torch transformers==5.23.*
    python make.py path/to/egmla

A converted folder is loaded by the program in docs/convert.md, as it stands there.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

HERE = Path(__file__).resolve().parent
VOCAB, RANK = 32, 12

# Every frequency is a power of two, so that float32, in which transformers computes them, holds it.
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2,
    rope_parameters={"rope_type": "default", "rope_theta": 65536.0},
)
KINDS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
CONVERTED = ["llama", "qwen2"]

docs = (HERE.parents[2] / "docs" / "convert.md").read_text()
exec(re.search(r"```python\n(.*?)```", docs, re.DOTALL)[1])  # load(folder, dtype)


def random_model(kind):
    model = AutoModelForCausalLM.from_config(KINDS[kind](**SIZES))
    for name, weight in model.named_parameters():
        values = torch.randn_like(weight)
        if weight.ndim == 2:
            values *= 1.5 / weight.shape[1] ** 0.5
        else:
            values = 0.5 * values if name.endswith("bias") else 1 + 0.1 * values
        weight.data = values
    return model.to(torch.bfloat16)


def in_float64(model):
    """Norms and rotation, which transformers computes in float32 in a model of any type."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):

            def norm(x, module=module):
                return module.weight * x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()

            module.forward = norm
        elif type(module).__name__.endswith("RotaryEmbedding"):

            def turns(x, position_ids, module=module):
                angles = position_ids[..., None].double() * module.inv_freq.double()
                angles = torch.cat([angles, angles], -1)
                return angles.cos(), angles.sin()

            module.forward = turns
    return model


def logits(what, model, ids):
    with torch.no_grad():
        found = model(ids[None]).logits[0]
        exact = in_float64(model)(ids[None]).logits[0]
    print(f"{what}: logits up to {exact.abs().max():.2f}, norms and rotation in float32 off by {(found - exact).abs().max():.1e}")
    return exact


torch.manual_seed(1)
characters = [chr(ord("A") + token) for token in range(VOCAB)]
tokenizer = {"version": "1.0", "added_tokens": [], "model": {
    "type": "BPE", "vocab": {c: i for i, c in enumerate(characters)}, "merges": [], "unk_token": "A"}}
for kind in KINDS:
    folder = HERE / kind
    random_model(kind).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    ids, text = torch.randint(VOCAB, [24]), torch.randint(VOCAB, [200])
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    expected = {"token_ids": ids.int(), "calibration": text.int(), "logits": logits(kind, source, ids)}
    if kind in CONVERTED:
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            for name in ["config.json", "model.safetensors"]:
                (work / name).write_bytes((folder / name).read_bytes())
            (work / "tokenizer.json").write_text(json.dumps(tokenizer))
            (work / "text").write_text("".join(characters[token] for token in text))
            command = [sys.argv[1], "convert", "--model", work, "--to", "mla", "--rank", str(RANK), "--text", work / "text"]
            subprocess.run([*command, "--output", work / "mla"], check=True)
            expected["converted"] = logits(f"{kind}, converted", load(work / "mla", torch.float64), ids)
    save_file(expected, folder / "expected.safetensors")

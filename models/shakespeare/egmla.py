"""Multi-head latent attention (MLA), embedding-gated MLA (EG-MLA) and a small decoder around them, in PyTorch.

A model is described by a plain dict in the layout of its `config.json`, and its parameters carry the names of the
checkpoint, so that `export` writes a folder the Rust program reads and `load` reads it back.

    python egmla.py --verify GOLDEN     # run the attention in float64 on every case folder under GOLDEN

Shapes in the docstrings: B sequences, T tokens, H heads, and the names of the config for widths.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# The norms of the low-rank projections use this eps whatever `rms_norm_eps` says: that key is for the decoder's norms.
LOW_RANK_NORM_EPS = 1e-6

GATE_DEFAULTS = {"site": "up_projected", "activation": "identity", "norm": "layer_norm", "norm_eps": 1e-5}

GATE_ACTIVATIONS = {
    "identity": lambda x: x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "one_plus": lambda x: 1 + x,
}

GATE_NORMS = {
    "layer_norm": nn.LayerNorm,
    "rms_norm": nn.RMSNorm,
    "none": lambda width, eps: nn.Identity(),
}


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


class Rope:
    """Rotary position embedding of `qk_rope_head_dim` channels, without scaling or with linear or YaRN scaling."""

    def __init__(self, config: dict):
        width = config["qk_rope_head_dim"]
        scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
        theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        factor = scaling.get("factor", 1.0)

        self.interleave = config.get("rope_interleave", True)
        self.amplitude = 1.0  # multiplies cos and sin
        self.score_factor = 1.0  # multiplies the softmax scale
        self.frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / max(width, 1))
        if kind == "linear":
            self.frequencies = self.frequencies / factor
        elif kind == "yarn":
            ramp = self._yarn_ramp(scaling, width, theta)
            self.frequencies = self.frequencies * (1 - ramp) + self.frequencies / factor * ramp
            mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
            if mscale and mscale_all_dim:
                self.amplitude = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
            elif scaling.get("attention_factor") is not None:
                self.amplitude = scaling["attention_factor"]
            else:
                self.amplitude = yarn_mscale(factor, 1.0)
            if mscale_all_dim:
                self.score_factor = yarn_mscale(factor, mscale_all_dim) ** 2
        elif kind != "default":
            raise ValueError(f"rope scaling {kind!r} is not supported: default, linear or yarn")

    @staticmethod
    def _yarn_ramp(scaling: dict, width: int, theta: float) -> Tensor:
        """0 where a frequency is kept, 1 where it is divided by the factor: [width / 2]."""

        def channel(rotations: float) -> float:
            length = scaling["original_max_position_embeddings"]
            return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(channel(scaling.get("beta_fast", 32))), 0)
        high = min(math.ceil(channel(scaling.get("beta_slow", 1))), width - 1)
        span = high - low if high != low else 0.001
        return ((torch.arange(width // 2, dtype=torch.float64) - low) / span).clamp(0, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates x [B, H, T, width], whose token t stands at position t of its sequence."""
        positions = torch.arange(x.shape[-2], dtype=torch.float64)
        # Angles in float64 whatever x is: at long positions a float32 angle has lost its fraction.
        angles = positions[:, None] * self.frequencies
        cos = (angles.cos() * self.amplitude).to(x)
        sin = (angles.sin() * self.amplitude).to(x)
        if self.interleave:
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class EgMlaAttention(nn.Module):
    """Causal MLA, or EG-MLA where `config["embedding_gate"]` is set.

    `kv_a_layernorm=False` leaves out the norm of the latent; everything else is told by the config.
    """

    def __init__(self, config: dict, kv_a_layernorm: bool = True):
        super().__init__()
        hidden = config["hidden_size"]
        bias = config.get("attention_bias", False)
        self.n_head = config["num_attention_heads"]
        self.d_latent = config["kv_lora_rank"]
        self.d_nope = config["qk_nope_head_dim"]
        self.d_rope = config["qk_rope_head_dim"]
        self.d_value = config["v_head_dim"]
        self.rope = Rope(config)
        self.scale = (self.d_nope + self.d_rope) ** -0.5 * self.rope.score_factor

        q_rows = self.n_head * (self.d_nope + self.d_rope)
        kv_rows = self.n_head * (self.d_nope + self.d_value)
        self.q_rank = config.get("q_lora_rank")
        if self.q_rank is None:
            self.q_proj = nn.Linear(hidden, q_rows, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, self.q_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(self.q_rank, eps=LOW_RANK_NORM_EPS)
            self.q_b_proj = nn.Linear(self.q_rank, q_rows, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.d_latent + self.d_rope, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(self.d_latent, eps=LOW_RANK_NORM_EPS) if kv_a_layernorm else nn.Identity()
        self.kv_b_proj = nn.Linear(self.d_latent, kv_rows, bias=False)
        self.o_proj = nn.Linear(self.n_head * self.d_value, hidden, bias=bias)

        self.gate_site = None
        if config.get("embedding_gate"):
            gate = GATE_DEFAULTS | config["embedding_gate"]
            if gate["site"] not in ("up_projected", "latent"):
                raise ValueError(f"gate site {gate['site']!r} is not supported: up_projected or latent")
            if gate.get("tied"):
                raise ValueError("a tied gate is not supported: this model has a table in each layer")
            self.gate_site = gate["site"]
            self.gate_activation = GATE_ACTIVATIONS[gate["activation"]]
            width = kv_rows if self.gate_site == "up_projected" else self.d_latent
            self.gate_embedding = nn.Embedding(gate["vocab_size"], gate["embed_dim"])
            self.gate_b_proj = nn.Linear(gate["embed_dim"], width, bias=False)
            self.gate_norm = GATE_NORMS[gate["norm"]](width, eps=gate["norm_eps"])
            self.init_gate(gate["activation"])

    def init_gate(self, activation: str):
        """Starts the gate near a constant, so that training begins near plain MLA and learns to tell tokens apart.

        `one_plus` is near one by itself; for the others the pre-activation has mean one: a gate of mean zero would
        flip the sign of the keys and values at random from token to token.
        """
        mean = 0.0 if activation == "one_plus" else 1.0
        nn.init.normal_(self.gate_embedding.weight, mean=mean, std=1.0)
        nn.init.normal_(self.gate_b_proj.weight, mean=mean / self.gate_embedding.embedding_dim, std=0.02)

    def gated(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """Norm(x ⊙ g) for x [B, T, width] and the gate g of token_ids [B, T]."""
        g = self.gate_activation(self.gate_b_proj(self.gate_embedding(token_ids)))
        return self.gate_norm(x * g)

    def forward(self, hidden_states: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """hidden_states [B, T, hidden_size], token_ids [B, T] (read by the gate only) -> [B, T, hidden_size]."""
        if self.q_rank is None:
            q = self.q_proj(hidden_states)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        q_nope, q_rope = self.heads(q).split((self.d_nope, self.d_rope), dim=-1)

        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split((self.d_latent, self.d_rope), dim=-1)
        latent = self.kv_a_layernorm(latent)
        if self.gate_site == "latent":
            latent = self.gated(latent, token_ids)
        kv = self.kv_b_proj(latent)
        if self.gate_site == "up_projected":
            kv = self.gated(kv, token_ids)
        k_nope, v = self.heads(kv).split((self.d_nope, self.d_value), dim=-1)

        # One rotary key for all heads.
        k_rope = self.rope(k_rope.unsqueeze(1)).expand(-1, self.n_head, -1, -1)
        q = torch.cat((q_nope, self.rope(q_rope)), dim=-1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, H * width] -> [B, H, T, width]."""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)


class SwiGlu(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        hidden, width = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, hidden_size] -> [B, T, hidden_size]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: dict, dropout: float):
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.self_attn = EgMlaAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.mlp = SwiGlu(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """[B, T, hidden_size], [B, T] -> [B, T, hidden_size]."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), token_ids))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class DecoderStack(nn.Module):
    """Everything below the output projection: the `model.` part of the checkpoint's names."""

    def __init__(self, config: dict, dropout: float):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(DecoderLayer(config, dropout) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], eps=config["rms_norm_eps"])

    def forward(self, token_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, hidden_size]."""
        x = self.dropout(self.embed_tokens(token_ids))
        for layer in self.layers:
            x = layer(x, token_ids)
        return self.norm(x)


class Decoder(nn.Module):
    """A language model; the output projection is the token embedding (`tie_word_embeddings`), so it is not stored."""

    def __init__(self, config: dict, dropout: float = 0.0):
        super().__init__()
        self.model = DecoderStack(config, dropout)
        # Projections that end on the residual stream start smaller, so that its variance does not grow with depth.
        residual_std = 0.02 / math.sqrt(2 * config["num_hidden_layers"])
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(weight, std=residual_std)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [B, T] -> logits [B, T, vocab_size]."""
        return F.linear(self.model(token_ids), self.model.embed_tokens.weight)


def export(model: Decoder, config: dict, folder: Path | str):
    """Writes config.json and model.safetensors (float16) into `folder`."""
    tensors = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that float16 cannot hold")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> tuple[Decoder, dict]:
    """Reads a folder written by `export`: the model, in `dtype` and ready for inference, and its config."""
    config = json.loads((Path(folder) / "config.json").read_text())
    model = Decoder(config).to(dtype)
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.eval(), config


@torch.no_grad()
def verify(case: Path) -> float:
    """Runs the attention in float64 on one golden case; returns ‖got − expected‖ / ‖expected‖."""
    weights = load_file(case / "weights.safetensors")
    inputs = load_file(case / "input.safetensors")
    expected = load_file(case / "expected.safetensors")["hidden_states"]
    hidden = inputs["hidden_states"].double()

    attention = EgMlaAttention(
        json.loads((case / "config.json").read_text()), kv_a_layernorm="kv_a_layernorm.weight" in weights
    )
    attention.double().load_state_dict(weights)

    lengths = inputs["sequence_lengths"].tolist() if "sequence_lengths" in inputs else [len(hidden)]
    ids = inputs["token_ids"].long() if "token_ids" in inputs else torch.zeros(len(hidden), dtype=torch.long)
    got = torch.cat([attention(h[None], i[None])[0] for h, i in zip(hidden.split(lengths), ids.split(lengths))])
    return ((got - expected).norm() / expected.norm()).item()


def main():
    parser = argparse.ArgumentParser(description="Checks the attention of this module against golden cases.")
    parser.add_argument("--verify", type=Path, required=True, metavar="DIR", help="folder of golden case folders")
    cases = sorted(path.parent for path in parser.parse_args().verify.glob("*/expected.safetensors"))
    if not cases:
        raise SystemExit("no golden case found")
    errors = {case.name: verify(case) for case in cases}
    for name, error in errors.items():
        print(f"{name:24} relative error {error:.2e}")
    # Written so that NaN fails.
    if not all(error < 1e-9 for error in errors.values()):
        raise SystemExit("above 1e-9")


if __name__ == "__main__":
    main()

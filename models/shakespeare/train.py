r"""Trains a small EG-MLA (or plain MLA) language model on one text file, evaluates it, and writes golden logits.

The model of this folder, its MLA twin, their evaluation and the golden file:

    pip install torch tokenizers safetensors numpy
    python train.py --text tinyshakespeare.txt --attention egmla --steps 1800 --threads 1 --out .
    python train.py --text tinyshakespeare.txt --attention mla --steps 1800 --threads 1 --out mla
    python train.py --evaluate . --text tinyshakespeare.txt --held-out
    python train.py --golden . --prompt $'JULIET:\nO Romeo, Romeo! wherefore'

The first 90 % of the file's bytes are trained on (the tokenizer too), the last 10 % are held out. The weights exported
are those of the last step: no step is chosen by its held-out figure.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from egmla import Decoder, export, load

EVALUATION_BATCH = 16
GREEDY_TOKENS = 64
# Below this, float32 arithmetic in another order could choose the other token and be right too.
MIN_GREEDY_MARGIN = 1e-4


def make_config(attention: str, vocab_size: int, context: int) -> dict:
    """The content of config.json."""
    gate = {
        "vocab_size": vocab_size,
        "embed_dim": 64,
        "site": "up_projected",
        "activation": "identity",
        "norm": "layer_norm",
        "norm_eps": 1e-5,
    }
    return {
        "architectures": ["EgMlaForCausalLM"],
        "model_type": "egmla",
        "torch_dtype": "float16",
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "intermediate_size": 768,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_interleave": True,
        "rope_scaling": None,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "embedding_gate": gate if attention == "egmla" else None,
    }


def split_text(path: Path) -> tuple[str, str]:
    """The first 90 % of the bytes, and the rest."""
    data = path.read_bytes()
    cut = int(len(data) * 0.9)
    # A character of several bytes stays whole.
    while cut < len(data) and data[cut] & 0xC0 == 0x80:
        cut += 1
    return data[:cut].decode(), data[cut:].decode()


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE; every byte has a token, so that no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(f"the text gives only {tokenizer.get_vocab_size()} tokens; lower --vocab-size")
    return tokenizer


def scoring_windows(n_tokens: int, window: int) -> list[tuple[int, int, int]]:
    """(start, end, skip) of every evaluation window: it is fed the tokens [start, end) and predicts those of
    [start + 1, end + 1), of which the first `skip` were scored by an earlier window."""
    windows, scored_to = [], 1
    for start in range(0, n_tokens, window // 2):
        if scored_to == n_tokens:
            break
        end = min(start + window, n_tokens - 1)
        windows.append((start, end, scored_to - start - 1))
        scored_to = end + 1
    return windows


@torch.no_grad()
def evaluate(model: Decoder, tokenizer: Tokenizer, text: str, window: int) -> dict:
    """Loss (nats per token) and bits per character of `text`, in overlapping windows with a stride of half a window.

    The text is tokenised once and its first token is context only. All but the first window score the half that the
    window before did not reach, so that they see at least half a window of context.
    """
    was_training = model.training
    model.eval()
    encoding = tokenizer.encode(text)
    ids = torch.tensor(encoding.ids)
    windows = scoring_windows(len(ids), window)
    # The windows of one length go through the model together; the last may be shorter.
    batches = []
    for item in windows:
        fits = batches and len(batches[-1]) < EVALUATION_BATCH
        if fits and item[1] - item[0] == batches[-1][0][1] - batches[-1][0][0]:
            batches[-1].append(item)
        else:
            batches.append([item])

    nats, scored = 0.0, 0
    for batch in batches:
        logits = model(torch.stack([ids[start:end] for start, end, _ in batch]))
        targets = torch.stack([ids[start + 1 : end + 1] for start, end, _ in batch])
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        for row, (_, _, skip) in zip(losses, batch):
            nats += row[skip:].double().sum().item()
            scored += len(row) - skip
    characters = len(text) - len(tokenizer.decode(encoding.ids[:1]))
    model.train(was_training)
    return {
        "loss": nats / scored,
        "bits_per_character": nats / math.log(2) / characters,
        "tokens": scored,
        "characters": characters,
    }


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: Decoder, weight_decay: float) -> torch.optim.AdamW:
    """Decays the projections only: decay would pull the table rows of rare tokens to zero between their few updates."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (decayed if name.endswith("_proj.weight") or name.endswith("_mqa.weight") else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def random_crops(ids: Tensor, batch: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both [batch, context]."""
    starts = torch.randint(len(ids) - context, (batch, 1), generator=generator)
    crops = ids[starts + torch.arange(context + 1)]
    return crops[:, :-1], crops[:, 1:]


def count_parameters(model: Decoder) -> dict:
    tables = sum(p.numel() for name, p in model.named_parameters() if name.endswith("gate_embedding.weight"))
    return {"gate_tables": tables, "other_parameters": sum(p.numel() for p in model.parameters()) - tables}


def train(args: argparse.Namespace):
    train_text, held_out = split_text(args.text)
    tokenizer = train_tokenizer(train_text, args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(train_text).ids)

    torch.manual_seed(args.seed)
    config = make_config(args.attention, args.vocab_size, args.context)
    model = Decoder(config, dropout=args.dropout)
    optimizer = make_optimizer(model, args.weight_decay)
    # The crops have a generator of their own: models that draw differently for weights and dropout see the same text.
    generator = torch.Generator().manual_seed(args.seed)
    log = args.log.open("w") if args.log else None

    def record(entry: dict):
        line = json.dumps(entry)
        print(line, flush=True)
        if log:
            print(line, file=log, flush=True)

    record({"attention": args.attention, "train_tokens": len(ids), **count_parameters(model)})
    model.train()
    losses, seconds = [], 0.0
    for step in range(args.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate, args.warmup)
        inputs, targets = random_crops(ids, args.batch, args.context, generator)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds += time.perf_counter() - began
        if (step + 1) % args.evaluate_every == 0 or step + 1 == args.steps:
            figures = evaluate(model, tokenizer, held_out, args.context)
            record(
                {
                    "step": step + 1,
                    "train_loss": round(sum(losses) / len(losses), 4),
                    "held_out_loss": round(figures["loss"], 4),
                    "held_out_bits_per_character": round(figures["bits_per_character"], 4),
                    "tokens_per_second": round(len(losses) * args.batch * args.context / seconds),
                }
            )
            losses, seconds = [], 0.0
    export(model, config, args.out)
    if log:
        log.close()


def evaluate_folder(args: argparse.Namespace):
    """Evaluates exported weights (float16 on disk, float32 in arithmetic)."""
    model, config = load(args.evaluate)
    tokenizer = Tokenizer.from_file(str(args.evaluate / "tokenizer.json"))
    text = split_text(args.text)[1] if args.held_out else args.text.read_bytes().decode()
    figures = evaluate(model, tokenizer, text, config["max_position_embeddings"])
    print(json.dumps(figures | count_parameters(model)))


@torch.no_grad()
def write_golden(args: argparse.Namespace):
    """Writes golden.safetensors, computed in float64 from the exported weights: `token_ids` [n] of the prompt, its
    `logits` [n, vocab_size] and `greedy_ids` [64], the continuation of highest logits."""
    model, config = load(args.golden, torch.float64)
    tokenizer = Tokenizer.from_file(str(args.golden / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(args.prompt).ids])
    n = ids.shape[1]
    if n + GREEDY_TOKENS > config["max_position_embeddings"]:
        raise SystemExit(f"a prompt of {n} tokens leaves no room for {GREEDY_TOKENS} more")
    logits = model(ids)[0]

    margins = []
    for _ in range(GREEDY_TOKENS):
        top = model(ids)[0, -1].topk(2)
        margins.append((top.values[0] - top.values[1]).item())
        ids = torch.cat((ids, top.indices[None, :1]), dim=1)
    if min(margins) <= MIN_GREEDY_MARGIN:
        raise SystemExit(f"smallest margin {min(margins):.1e}: the continuation is a coin toss, choose another prompt")

    tensors = {"token_ids": ids[0, :n], "logits": logits, "greedy_ids": ids[0, n:]}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, args.golden / "golden.safetensors", metadata={"prompt": args.prompt})
    print(f"{n} prompt tokens, smallest margin {min(margins):.4f}")
    print(tokenizer.decode(ids[0].tolist()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--out", type=Path, metavar="DIR", help="train, and export into DIR")
    mode.add_argument("--evaluate", type=Path, metavar="DIR", help="evaluate the weights in DIR")
    mode.add_argument("--golden", type=Path, metavar="DIR", help="write DIR/golden.safetensors from the weights in DIR")
    parser.add_argument("--text", type=Path, help="UTF-8 text file (training and evaluation)")
    parser.add_argument("--held-out", action="store_true", help="evaluate the last 10 %% of the file only")
    parser.add_argument("--prompt", help="text to continue (golden)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")

    training = parser.add_argument_group("training")
    training.add_argument("--attention", choices=("egmla", "mla"), default="egmla")
    training.add_argument("--steps", type=int, default=1800)
    training.add_argument("--batch", type=int, default=4, help="sequences a step")
    training.add_argument("--context", type=int, default=256, help="tokens a sequence")
    training.add_argument("--vocab-size", type=int, default=1024)
    training.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak")
    training.add_argument("--warmup", type=int, default=100, help="steps")
    training.add_argument("--weight-decay", type=float, default=0.1)
    training.add_argument("--dropout", type=float, default=0.1, help="of the embedding and of both residual branches")
    training.add_argument("--seed", type=int, default=1)
    training.add_argument("--evaluate-every", type=int, default=300, metavar="STEPS")
    training.add_argument("--log", type=Path, metavar="FILE", help="also write the curve here, as JSON lines")
    args = parser.parse_args()
    if args.golden is None and args.text is None:
        parser.error("--text is needed")
    if args.golden is not None and args.prompt is None:
        parser.error("--golden needs --prompt")
    return args


def main():
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.out:
        train(args)
    elif args.evaluate:
        evaluate_folder(args)
    else:
        write_golden(args)


if __name__ == "__main__":
    main()

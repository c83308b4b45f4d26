"""Writes case.json: one small layer with offset gates, by a table and tied, fitted in float64 by numpy from docs/convert.md, with
nothing of this crate.

Each step is the plain one: regressions are fitted anew without each id, and rows anew without each token, where the crate has a
closed form.
"""

import json
import pathlib

import numpy as np

HIDDEN, HEADS, GROUPS, WIDTH, VOCAB, RANK, EMBED, SINK, OFFSET = 12, 4, 2, 4, 24, 5, 6, 10.0, 8.0
RIDGES = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
SEQUENCES, LENGTH, FIRST = 4, 20, 23


def given():
    """Inputs with three decimals: the text holds them exactly."""
    random = np.random.default_rng(5)

    def values(*shape):
        return np.round(random.standard_normal(shape), 3)

    # Ids 0 to 15, the low ones often; the rest is never met, but for the first of every sequence.
    ids = np.minimum(random.geometric(0.2, SEQUENCES * LENGTH) - 1, 15)
    ids[::LENGTH] = FIRST
    # So small that the eps of their norm counts, and of a common part that differs in size: a mean gate that is not 1.
    embedding = np.round(0.05 * (values(VOCAB, HIDDEN) + 2 * abs(values(VOCAB, 1))), 3)
    hidden = np.round(20 * embedding[ids] + 0.7 * values(len(ids), HIDDEN), 3)
    hidden[::LENGTH] = 4 * values(HIDDEN)
    weights = {
        "q_proj": values(HEADS * WIDTH, HIDDEN),
        "k_proj": values(GROUPS * WIDTH, HIDDEN),
        "v_proj": values(GROUPS * WIDTH, HIDDEN),
        "o_proj": values(HIDDEN, HEADS * WIDTH),
    }
    return ids, embedding, hidden, weights


def leading(matrix, count):
    values, vectors = np.linalg.eigh(matrix)
    return vectors[:, np.argsort(-values)[:count]]


def mix(keys):
    """Keys of the heads to slices, [tokens, slice, channel]; and the axes U[channel][head, slice]."""
    k = keys.reshape(-1, GROUPS, WIDTH)
    axes = [None] * WIDTH
    for pair in range(WIDTH // 2):
        both = [pair, pair + WIDTH // 2]
        covariance = sum(k[:, :, c].T @ k[:, :, c] for c in both)
        for c in both:
            axes[c] = leading(covariance, GROUPS)
    return np.stack([k[:, :, c] @ axes[c] for c in range(WIDTH)], axis=-1), axes


def ridge(features, targets, weights, penalty):
    """Map and constant of a function of features, by weighted least squares with a free constant."""
    total = weights.sum()
    middle, centre = weights @ features / total, weights @ targets / total
    f, t = features - middle, targets - centre
    map_ = np.linalg.solve(f.T @ (weights[:, None] * f) + penalty * np.eye(HIDDEN), f.T @ (weights[:, None] * t))
    return map_, centre - middle @ map_


def main():
    ids, embedding, hidden, weights = given()
    tokens, starts = len(ids), np.arange(0, len(ids), LENGTH)
    slices, axes = mix(hidden @ weights["k_proj"].T)
    keys, values = slices[:, 1:].reshape(tokens, -1), hidden @ weights["v_proj"].T
    balance = np.sqrt((values**2).sum() / (keys**2).sum())
    y = np.hstack([balance * keys, values])
    behind = np.ones(tokens, bool)
    behind[starts] = False

    features = embedding / np.sqrt((embedding**2).mean(1, keepdims=True) + 1e-6)
    met = sorted(set(ids[behind]))
    tokens_of = {i: [t for t in range(tokens) if behind[t] and ids[t] == i] for i in met}
    n = np.array([len(tokens_of[i]) for i in met], float)
    mean = np.array([y[tokens_of[i]].mean(0) for i in met])
    w, f = n / (n + 1), features[met]
    centre = w @ mean / w.sum()
    centred = f - w @ f / w.sum()
    scale = np.trace(centred.T @ (w[:, None] * centred)) / HIDDEN

    def without_each(strength):
        rest = [np.arange(len(met)) != at for at in range(len(met))]
        fits = [ridge(f[r], mean[r], w[r], strength * scale) for r in rest]
        return np.array([mean[a] - f[a] @ map_ - constant for a, (map_, constant) in enumerate(fits)])

    strength = min(RIDGES, key=lambda s: (w[:, None] * without_each(s) ** 2).sum())
    left, (map_, constant) = without_each(strength), ridge(f, mean, w, strength * scale)
    regressed = features @ map_ + constant

    within = sum(((y[tokens_of[i]] - mean[a]) ** 2).sum() for a, i in enumerate(met)) / (n - 1).sum()
    between = (w * ((left**2).sum(1) - within / n)).sum() / w.sum()
    kappa = within / max(between, within / 100)

    rows = regressed - centre
    for a, i in enumerate(met):
        rows[i] += n[a] / (n[a] + kappa) * (mean[a] - regressed[i])
    for i in set(ids[starts]) - set(met):
        rows[i] = 0

    residual = y - centre - rows[ids]
    for a, i in enumerate(met):
        others_of = mean[a] - left[a]
        for t in tokens_of[i]:
            others = [y[s] for s in tokens_of[i] if s != t]
            share = len(others) / (len(others) + kappa)
            residual[t] = y[t] - others_of - share * ((np.mean(others, 0) if others else others_of) - others_of)
    weight = np.ones(tokens)
    weight[starts] += SINK * tokens / len(starts)

    def latents(residual):
        """Axes, what is beside them, and what is lost of tokens behind first positions and of those."""
        p = leading(residual.T @ (weight[:, None] * residual), RANK - 1)
        rest = np.eye(y.shape[1]) - p @ p.T
        return p, rest, [((residual[part] @ rest) ** 2).sum() / (y[part] ** 2).sum() for part in (behind, starts)]

    p, rest, lost = latents(residual)

    count = np.full(VOCAB, (n == 1).sum() / (VOCAB - len(met)))
    count[met] = n
    table = rows @ rest
    directions = leading(table.T @ (count[:, None] * table), EMBED)
    table = table @ directions @ directions.T

    # Rows of keys and values of one query head: from y to them.
    expand = np.zeros((HEADS, 2 * WIDTH, y.shape[1]))
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        for c in range(WIDTH):
            for s in range(1, GROUPS):
                expand[head, c, (s - 1) * WIDTH + c] = axes[c][group, s] / balance
            expand[head, WIDTH + c, (GROUPS - 1) * WIDTH + group * WIDTH + c] = 1
    expand = expand.reshape(-1, y.shape[1])
    size = np.sqrt((((y @ expand.T)) ** 2).mean(0))
    m = OFFSET * size
    a = expand @ rest @ centre

    chosen = [(t, ids[t]) for t in (0, 7, 33)] + [(12, 18)]
    found = []
    for t, i in chosen:
        held = expand @ p @ p.T @ y[t]
        found.append((held + a + m) * (1 + expand @ table[i] / (a + m)) - m)

    # Tied: no row but the regression's, in P without the token's id, and of first positions as the gate has it.
    residual = y - regressed[ids]
    for a_, i in enumerate(met):
        residual[tokens_of[i]] = y[tokens_of[i]] - (mean[a_] - left[a_])
    p, rest, lost_tied = latents(residual)
    # What token embeddings have in common counts in the size of m: the constant of the latent is without it.
    common = expand @ rest @ (map_.T @ (w @ f / w.sum()))
    m_tied = OFFSET * np.maximum(size, np.abs(common))
    a = expand @ rest @ centre
    found_tied = []
    for t, i in chosen:
        held = expand @ p @ p.T @ y[t]
        found_tied.append((held + a + m_tied) * (1 + expand @ rest @ (regressed[i] - centre) / (a + m_tied)) - m_tied)

    case = {
        "ids": ids.tolist(),
        "starts": starts.tolist(),
        "embedding": embedding.tolist(),
        "hidden": hidden.tolist(),
        **{name: w.tolist() for name, w in weights.items()},
        "rank": [RANK],
        "embed_dim": [EMBED],
        "sink_weight": [SINK],
        "lost": lost,
        "offset": m.tolist(),
        "chosen": [[int(t), int(i)] for t, i in chosen],
        "keys_and_values": [v.tolist() for v in found],
        "lost_tied": lost_tied,
        "offset_tied": m_tied.tolist(),
        "keys_and_values_tied": [v.tolist() for v in found_tied],
    }
    print("ridge", strength, "kappa", kappa, "lost", lost, lost_tied, "met", len(met), "once", (n == 1).sum())
    lines = ",\n".join(f'"{name}": {json.dumps(value, separators=(",", ":"))}' for name, value in case.items())
    pathlib.Path(__file__).with_name("case.json").write_text("{\n" + lines + "\n}\n")


main()

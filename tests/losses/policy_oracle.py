"""The policy losses once more, from their equations, in float64 NumPy and loops; nothing of the package is used.

A stop-gradient is a second set of log-probabilities, `frozen`: what stands under it is computed from those. So a finite
difference of `loss` in its first argument is the gradient that is asked for.
"""

from __future__ import annotations

import math

import numpy as np

DEFAULTS = dict(
    surrogate="clip", clip_low=0.2, clip_high=0.28, dual_clip=0.0, ratio_cap=5.0, tv=0.2, penalty=0.0,
    tau_pos=1.0, tau_neg=1.05, opsm=0.0,
    aggregation="seq-mean-token-mean", max_length=0, kl=("k3", 0.0), distil=0.0, weight="none", outside="clamp",
    low=0.0, high=2.0, normalise=False, veto=0.0, reject="none", over="token", limit=0.1,
)  # fmt: skip


def held(x, low, high):
    return min(max(x, low), high)


def loss(new, data, answers, frozen=None, **changes):
    """data: arrays [B, T] old, advantage and weight, and where they are known proximal, reference and teacher.
    answers: lists of (row, position), one an answer, in which only positions with a weight count."""
    s = DEFAULTS | changes
    frozen = new if frozen is None else frozen
    per_token = {}
    factor = factors(s, frozen, data, answers)
    for answer in answers:
        drawn = [i for i in answer if data["weight"][i] > 0]
        for i in drawn:
            kept = not (s["opsm"] and advantage(s, frozen, data, i) < 0 and behind(frozen, data, drawn) > s["opsm"])
            per_token[i] = kept * factor[i] * surrogate(s, new, frozen, data, drawn, i)
            per_token[i] += s["kl"][1] * kl(s, new, frozen, data, i)
    return aggregate(s, per_token, data["weight"], answers)


def gap(new, data, i):
    """log(pi / pi_old)."""
    old = data["proximal"] if "proximal" in data else data["old"]
    return held(new[i] - old[i], -20, 20)


def behind(frozen, data, drawn):
    """Mean log(pi_old / pi) of an answer."""
    return -sum(gap(frozen, data, j) for j in drawn) / len(drawn)


def advantage(s, frozen, data, i):
    a = data["advantage"][i]
    return a + s["distil"] * held(data["teacher"][i] - frozen[i], -20, 20) if s["distil"] else a


def surrogate(s, new, frozen, data, drawn, i):
    a = advantage(s, frozen, data, i)
    r, mu = math.exp(gap(new, data, i)), data["old"][i]
    if s["surrogate"] == "clip":
        return clipped(s, r, a)
    if s["surrogate"] == "gspo":
        # The value of a whole answer's ratio; of its log's gradient token i has a share of 1.
        mean = sum(gap(frozen, data, j) for j in drawn) / len(drawn)
        return clipped(s, math.exp(min(mean + new[i] - frozen[i], 10)), a)
    if s["surrogate"] == "cispo":
        return -min(math.exp(gap(frozen, data, i)), s["ratio_cap"]) * a * new[i]
    if s["surrogate"] == "double_sided":
        f = math.exp(held(frozen[i] - mu, -20, 20))
        return -(f if 1 - s["clip_low"] < f < 1 + s["clip_high"] else 0.0) * a * new[i]
    if s["surrogate"] == "gmpo":
        logs = [gap(new, data, j) for j in drawn]
        logs = [min(x, s["clip_high"]) if a > 0 else max(x, -s["clip_low"]) for x in logs]
        return -a * math.prod(math.exp(x) for x in logs) ** (1 / len(logs))
    if s["surrogate"] == "sapo":
        tau = s["tau_pos"] if a > 0 else s["tau_neg"]
        return -a * 4 / tau / (1 + math.exp(-tau * (r - 1)))
    assert s["surrogate"] in ("binary_tv", "ipo")
    moved = math.exp(frozen[i]) - math.exp(mu)
    dropped = (a > 0 and moved > s["tv"]) or (a < 0 and moved < -s["tv"])
    if s["surrogate"] == "ipo":
        dropped = abs(moved) > s["tv"]
    q = held(new[i] - mu, -20, 20)
    return (0.0 if dropped else -a * math.exp(q)) + s["penalty"] * q * q


def clipped(s, r, a):
    value = max(-a * r, -a * held(r, 1 - s["clip_low"], 1 + s["clip_high"]))
    return min(value, -s["dual_clip"] * a) if s["dual_clip"] and a < 0 else value


def kl(s, new, frozen, data, i):
    if "reference" not in data:
        return 0.0
    d, d0 = (held(x[i] - data["reference"][i], -20, 20) for x in (new, frozen))
    k3 = lambda d: math.exp(-d) + d - 1  # noqa: E731
    return {"k1": d, "k2": d * d / 2, "k3": k3(d), "k3+": d * d / 2 + k3(d0) - d0 * d0 / 2}[s["kl"][0]]


def log_rho(frozen, data, i):
    ahead = data["proximal"] if "proximal" in data else frozen
    return held(ahead[i] - data["old"][i], -20, 20)


def factors(s, frozen, data, answers):
    found = {}
    for answer in answers:
        drawn = [i for i in answer if data["weight"][i] > 0]
        if not drawn:
            continue
        g = {i: log_rho(frozen, data, i) for i in drawn}
        whole = sum(g.values())
        dropped = s["veto"] and any(math.exp(x) < s["veto"] for x in g.values())
        for i in drawn:
            level = {"none": 0.0, "token": g[i], "sequence": whole, "geometric": whole / len(drawn)}[s["weight"]]
            rho = math.exp(held(level, -20, 20))
            if s["weight"] != "none":
                inside = s["low"] <= rho <= s["high"]
                rho = held(rho, s["low"], s["high"]) if s["outside"] == "clamp" else rho * inside
            found[i] = 0.0 if dropped or rejected(s, g, i) else rho
    if s["normalise"]:
        w = data["weight"]
        mean = sum(f * w[i] for i, f in found.items()) / sum(w[i] for i in found)
        found = {i: f / mean for i, f in found.items()}
    return found


def rejected(s, g, i):
    if s["reject"] == "none":
        return False
    estimate = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(x) - 1 - x}[s["reject"]]
    k = {j: estimate(x) for j, x in g.items()}
    value = {"token": k[i], "mean": np.mean(list(k.values())), "sum": sum(k.values()),
             "max": max(abs(x) for x in k.values())}[s["over"]]  # fmt: skip
    return abs(value) > s["limit"]


def aggregate(s, per_token, weight, answers):
    how = s["aggregation"]
    if how in ("token-mean", "token-sum"):
        total = sum(weight[i] * x for i, x in per_token.items())
        return total / (sum(weight[i] for i in per_token) if how == "token-mean" else 1.0)
    of_answers = []
    for answer in answers:
        drawn = [i for i in answer if weight[i] > 0]
        if drawn:
            total = sum(weight[i] * per_token[i] for i in drawn)
            by = {"seq-mean-token-mean": sum(weight[i] for i in drawn), "seq-mean-token-sum": 1.0,
                  "seq-mean-token-sum-norm": s["max_length"]}[how]  # fmt: skip
            of_answers.append(total / by)
    return sum(of_answers) / len(of_answers)


def gradient(new, data, answers, h=1e-6, **changes):
    """Of `loss` by central differences, [B, T]."""
    found = np.zeros_like(new)
    for i in zip(*np.nonzero(data["weight"]), strict=True):
        sides = []
        for step in (h, -h):
            moved = new.copy()
            moved[i] += step
            sides.append(loss(moved, data, answers, frozen=new, **changes))
        found[i] = (sides[0] - sides[1]) / (2 * h)
    return found


def advantages(reward, kind, weights=None):
    """reward: [N][G], for gdpo [N][G][C]. By loops over groups."""
    reward = np.asarray(reward, np.float64)
    if kind == "gdpo":
        out = sum(w * advantages(reward[..., c], "grpo") for c, w in enumerate(weights))
        return (out - out.mean()) / (np.sqrt(((out - out.mean()) ** 2).sum() / (out.size - 1)) + 1e-6)
    out = np.zeros_like(reward)
    for n, group in enumerate(reward):
        mean = sum(group) / len(group)
        std = math.sqrt(sum((x - mean) ** 2 for x in group) / (len(group) - 1))
        for g, x in enumerate(group):
            if kind == "rloo":  # against the mean of the others
                out[n, g] = x - (sum(group) - x) / (len(group) - 1)
            elif kind == "max_rl":
                out[n, g] = (x - mean) / mean if mean > 0 else 0.0
            else:
                out[n, g] = (x - mean) / (std + 1e-6) if kind == "grpo" else x - mean
    if kind == "batch_std":
        return out / (reward.std(ddof=1) + 1e-6)
    if kind == "reinforce++":
        return (out - out.mean()) / (out.std(ddof=1) + 1e-6)
    return out

"""What a step of rollouts says about each data source."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from glmv_jax.rl.rollout import Rollout


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that at least one of k answers drawn from n (of which `correct` are right) is right.

    1 - C(n - c, k) / C(n, k): unbiased for every k <= n (Chen et al. 2021, arXiv 2107.03374, section 2.1).
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def by_source(records: Sequence[Rollout]) -> dict[str, float]:
    """Means of a step, named "<metric>/<source>", and "<metric>/mean": the mean of the sources' values.

    reward, accuracy; pass@k with k the group size; same: share of groups whose rewards are all equal (they teach
    nothing); length in tokens; truncated; format: share of well-formed answers; error: share of failed graders;
    logprob: of the sampled tokens, per token (its negative estimates the entropy).
    """
    metrics: dict[str, float] = {}
    names = sorted({record.source for record in records})
    for name in names:
        for key, value in _one([r for r in records if r.source == name]).items():
            metrics[f"{key}/{name}"] = value
    for key in dict.fromkeys(name.split("/")[0] for name in metrics):
        known = [metrics[f"{key}/{name}"] for name in names if f"{key}/{name}" in metrics]
        metrics[f"{key}/mean"] = float(np.mean(known))
    return metrics


def _one(records: Sequence[Rollout]) -> dict[str, float]:
    groups: dict[int, list[Rollout]] = {}
    for record in records:
        groups.setdefault(record.row, []).append(record)
    k = min(map(len, groups.values()))
    rewards = [[r.grade.reward for r in group] for group in groups.values()]
    mean = lambda values: float(np.mean(list(values)))  # noqa: E731
    return {
        "reward": mean(r.grade.reward for r in records),
        "accuracy": mean(r.grade.correct for r in records),
        f"pass@{k}": mean(pass_at_k(len(g), sum(r.grade.correct for r in g), k) for g in groups.values()),
        "same": mean(max(group) == min(group) for group in rewards),
        "length": mean(len(r.said) for r in records),
        "truncated": mean(r.truncated for r in records),
        "format": mean(r.grade.components.get("format", 0.0) for r in records),
        "error": mean(r.grade.failed for r in records),
        "logprob": mean(x for r in records for x in r.said) if any(len(r.answer) for r in records) else 0.0,
    }

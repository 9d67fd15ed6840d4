"""What a step of rollouts says about each data source."""

from __future__ import annotations

import collections
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from glmv_jax.rl.rollout import Rollout

Row: TypeAlias = Mapping[str, Any]

# What may befall an answer, beside being trained on: counted by source.
EVENTS = ("aborted", "failed", "dropped", "given_up", "filtered")


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that at least one of k answers drawn from n (of which `correct` are right) is right.

    1 - C(n - c, k) / C(n, k): unbiased for every k <= n (Chen et al. 2021, arXiv 2107.03374, section 2.1).
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def mismatch_kl(logprobs: ArrayLike, trained: ArrayLike) -> np.ndarray:
    """rho - log rho - 1 of each token, rho = trainer / engine: an estimate, never below 0, of KL(engine || trainer).

    Args: logprobs: of the engine that drew the tokens; trained: of the trainer that is about to learn from them.
    """
    gap = np.asarray(trained, np.float64) - np.asarray(logprobs, np.float64)
    return np.expm1(gap) - gap


def by_source(records: Sequence[Rollout]) -> dict[str, float]:
    """`summary` of rollouts that are groups by their row."""
    return summary(
        {
            "kind": "sample", "uid": r.row, "source": r.source, "reward": r.grade.reward, "correct": r.grade.correct,
            "components": r.grade.components, "flags": r.grade.flags, "length": len(r.said),
            "truncated": r.truncated, "logprobs": r.said,
        }
        for r in records
    )  # fmt: skip


def summary(rows: Iterable[Row], *, passes: Sequence[int] = (), threshold: float | None = None) -> dict[str, float]:
    """Numbers of a step, named "<metric>/<source>", and "<metric>/mean": the mean of the sources' values.

    reward, accuracy; pass@k for the k of `passes` that the smallest group allows, and for its size; same: share of
    groups whose rewards are all equal (they teach nothing); length in tokens; truncated; format: share of well-formed
    answers; component/<name>: mean over the answers that have it; error, timeout: shares of failed graders; logprob: of
    the drawn tokens, per token (its negative estimates the entropy).
    Where the rows tell: mismatch: KL between engine and trainer, per token; staleness: updates between a token's
    policy and the one trained on it, mean, and staleness_max.
    Where there are such rows: the events of EVENTS, each a count.

    Args:
      rows: of kind "sample" (or without a kind), an answer each: uid (its group), source, reward, correct, components,
        flags, length, truncated, logprobs, and if known trained_logprobs, versions and trained_at; and of the kinds of
        EVENTS: source.
      threshold: the reward from which an answer counts as right in pass@k, for rewards that are not 0 or 1; None: what
        the grader says.
    """
    samples: dict[str, list[Row]] = collections.defaultdict(list)
    events: collections.Counter[tuple[str, str]] = collections.Counter()
    for row in rows:
        if row.get("kind", "sample") == "sample":
            samples[row["source"]].append(row)
        else:
            events[row["kind"], row["source"]] += 1
    found: dict[str, dict[str, float]] = collections.defaultdict(dict)  # metric -> source -> value
    for name in sorted({*samples, *(source for _, source in events)}):
        values = _one(samples[name], passes, threshold) if name in samples else {}
        for key, value in (values | {kind: float(events[kind, name]) for kind in EVENTS if events}).items():
            found[key][name] = value
    metrics = {f"{key}/{name}": value for key, values in found.items() for name, value in values.items()}
    return metrics | {f"{key}/mean": float(np.mean(list(values.values()))) for key, values in found.items()}


def _one(rows: Sequence[Row], passes: Sequence[int], threshold: float | None) -> dict[str, float]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["uid"], []).append(row)
    smallest = min(map(len, groups.values()))
    rewards = [[r["reward"] for r in group] for group in groups.values()]
    right = lambda r: r["correct"] if threshold is None else r["reward"] >= threshold  # noqa: E731
    share = lambda k: _mean(pass_at_k(len(g), sum(map(right, g)), k) for g in groups.values())  # noqa: E731
    found = {
        "reward": _mean(r["reward"] for r in rows),
        "accuracy": _mean(r["correct"] for r in rows),
        **{f"pass@{k}": share(k) for k in sorted({*passes, smallest}) if k <= smallest},
        "same": _mean(max(group) == min(group) for group in rewards),
        "length": _mean(r["length"] for r in rows),
        "truncated": _mean(r["truncated"] for r in rows),
        "format": _mean(r["components"].get("format", 0.0) for r in rows),
        "error": _mean(any(f in r["flags"] for f in ("error", "timeout", "nan")) for r in rows),
        "timeout": _mean("timeout" in r["flags"] for r in rows),
        "logprob": _per_token(rows, _said) if any(len(_said(r)) for r in rows) else 0.0,
    }
    for name in sorted({name for r in rows for name in r["components"]} - {"format"}):
        found[f"component/{name}"] = _mean(r["components"][name] for r in rows if name in r["components"])
    if compared := [r for r in rows if r.get("trained_logprobs") is not None and r["length"]]:
        found["mismatch"] = _per_token(compared, lambda r: mismatch_kl(_said(r), _said(r, "trained_logprobs")))
    ages = [r["trained_at"] - v for r in rows if r.get("trained_at") is not None for v in r["versions"] if v >= 0]
    if ages:
        found |= {"staleness": _mean(ages), "staleness_max": float(max(ages))}
    return found


def _said(row: Row, name: str = "logprobs") -> Sequence[float]:
    """Log-probabilities of what was drawn: of an episode not those of its environment's words."""
    return [x for x, version in zip(row[name], row.get("versions") or [0] * len(row[name])) if version >= 0]


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _per_token(rows: Sequence[Row], of: Callable[[Row], Iterable[float]]) -> float:
    return _mean(itertools.chain.from_iterable(map(of, rows)))

"""Packing of reinforcement learning's samples by tokens, ViT patches and images at once: how few rows, how even?

    python benchmarks/rl_packing.py [--sets 1000] [--out FILE]

The packer is the one of stage 5 and of the loader (data/balancing.py). Sets are random mixtures of 1 to 1,024 samples:
text alone, one image, several images, and long episodes with a picture a turn, in shares that differ from set to set,
so that now tokens and now patches are what there is too much of. A row has 8,192 tokens, patches for 1.05 of what comes
with a full row of the set's tokens, and 64 images. Numbers, and what they should be:

    over          rows over any bound                                           none
    doubled       samples that are in no row or in two                          none
    rows          over the lower bound max(ceil(tokens / T), ceil(patches / V))    at most 1.15
    ranks         512 samples, 8 ranks: the most expensive rank over the mean, in forward FLOPs of encoder and decoder
                  (an experiment's size=l with GLM-OCR's decoder, attention included)    at most 1.05
    peak          patches of the fullest row against packing by tokens alone    at least 30 % fewer
    milliseconds  for 4,096 samples, from sizes to rows that are shared out to 8 ranks, on one core    under 200

Below 7 rows one row more is over 1.15, so sets of fewer are counted apart: "one more" says of how many the rows are one
above the bound, "more" of how many they are above by more. Packing by tokens alone is either first fit with the largest
first, in as few rows ("few"), or as many rows as ours with their tokens evened out ("even", what anchors do for ranks).
Milliseconds are of processor time, the median of nine. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from contest import emit, environment, significant

from glmv_jax import presets
from glmv_jax.data import balancing
from glmv_jax.models import build

TOKENS, IMAGES, ROOM = 8192, 64, 1.05
EVEN = 2  # tokens and patches


def samples(count: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens, patches and images of each sample, [N, 3]: four patches a visual token."""
    kind = rng.choice(4, count, p=rng.dirichlet((2, 4, 1, 1)))
    images = np.select([kind == 0, kind == 1, kind == 2], [0, 1, rng.integers(2, 9, count)], rng.integers(2, 17, count))
    side = np.clip(rng.lognormal(6.4, 0.9, count), 16, 4096)
    each = np.where(kind < 2, side, np.minimum(side, 512)).astype(int) // 4 * 4
    said = np.clip(rng.lognormal(np.where(kind == 3, 7.0, 5.5), 0.9), 8, 4000).astype(int)
    patches = np.minimum(images * each, 16_000) // 4 * 4
    return np.stack([np.minimum(said + patches // 4, TOKENS), patches, images], 1)


def limits_of(loads_ND: np.ndarray) -> np.ndarray:
    """Of a row: its patches follow from the set's, and no sample is larger."""
    patches = ROOM * TOKENS * loads_ND[:, 1].sum() / loads_ND[:, 0].sum()
    return np.array([TOKENS, max(int(patches), loads_ND[:, 1].max()), IMAGES])


def bound(loads_ND: np.ndarray, limits_D: np.ndarray) -> int:
    """Rows that tokens and patches need at least."""
    return max(1, int(np.ceil((loads_ND.sum(0) / limits_D)[:2].max() - 1e-9)))


def by_tokens(tokens_N: np.ndarray) -> np.ndarray:
    """First fit with the largest first, patches are not looked at: the row of each sample."""
    free, row_N = [], np.empty(len(tokens_N), int)
    for n in np.argsort(-tokens_N, kind="stable"):
        row = next((r for r, left in enumerate(free) if left >= tokens_N[n]), len(free))
        free += [TOKENS] * (row == len(free))
        free[row] -= tokens_N[n]
        row_N[n] = row
    return row_N


def even_tokens(tokens_N: np.ndarray, rows: int) -> np.ndarray:
    """As many rows, even in tokens: the largest first to the emptiest row."""
    filled, row_N = np.zeros(rows), np.empty(len(tokens_N), int)
    for n in np.argsort(-tokens_N, kind="stable"):
        row_N[n] = filled.argmin()
        filled[row_N[n]] += tokens_N[n]
    return row_N


def random_sets(count: int) -> dict:
    ratios, small, peaks, over, doubled = [], [], {"few": [], "even": []}, 0, 0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        loads = samples(int(rng.integers(1, 1025)), rng)
        limits = limits_of(loads)
        row_N = balancing.bins(loads, limits, even=EVEN)
        filled = np.stack([np.bincount(row_N, x) for x in loads.T], 1)  # counted here again
        over += int((filled > limits).any())
        doubled += int(row_N.min() < 0 or len(row_N) != len(loads) or not np.array_equal(filled.sum(0), loads.sum(0)))
        least, rows = bound(loads, limits), len(filled)
        small.append(rows - least) if least < 7 else ratios.append(rows / least)
        if least >= 7 and loads[:, 1].any():
            for name, other in (("few", by_tokens(loads[:, 0])), ("even", even_tokens(loads[:, 0], rows))):
                peaks[name].append(1 - filled[:, 1].max() / np.bincount(other, loads[:, 1]).max())
    return {
        "sets": count, "over": over, "doubled": doubled,
        "rows / bound": {"sets": len(ratios), "max": significant(max(ratios)), "mean": significant(np.mean(ratios))},
        "fewer than 7 rows": {"sets": len(small), "one more": small.count(1), "more": sum(x > 1 for x in small)},
        "fewer patches at the peak": {
            name: {"mean": significant(np.mean(x), 3), "p5": significant(np.percentile(x, 5), 3),
                   "30 % or more": significant(np.mean(np.array(x) >= 0.3), 3)} for name, x in peaks.items()},
    }  # fmt: skip


def ranks(sets: int = 50, count: int = 512, ranks_: int = 8) -> dict:
    """Rows whose number divides over the ranks, as cfg.rollout.rows are, and what each rank has to compute."""
    cfg = build.vlm(presets.vlm("l"))
    worst = []
    for seed in range(sets):
        loads = samples(count, np.random.default_rng(10_000 + seed))
        limits = limits_of(loads)
        row_N, rows = balancing.of_counts(loads, limits, range(ranks_, 100 * ranks_, ranks_), even=EVEN)
        rank_R = balancing.assign(balancing.totals(row_N, loads, rows)[:, :EVEN], ranks_)
        seen = lambda p: cfg.vision.flops(p) + cfg.merger.flops(p) if p else 0.0  # noqa: E731
        cost_N = np.array(
            [cfg.decoder.flops(t, (t + 1) / 2) + n * seen(p / max(n, 1)) for t, p, n in loads.tolist()]
        )
        cost_K = np.bincount(rank_R[row_N], cost_N, ranks_)
        worst.append(cost_K.max() / cost_K.mean())
    return {"sets": sets, "max/mean": significant(np.mean(worst)), "worst set": significant(max(worst)),
            "sets over 1.05": int((np.array(worst) > 1.05).sum())}  # fmt: skip


def milliseconds(count: int = 4096, ranks_: int = 8) -> float:
    loads = samples(count, np.random.default_rng(1))
    limits, took = limits_of(loads), []
    for _ in range(9):
        began = time.process_time()
        row_N, rows = balancing.of_counts(loads, limits, range(ranks_, 1000 * ranks_, ranks_), even=EVEN)
        balancing.assign(balancing.totals(row_N, loads, rows)[:, :EVEN], ranks_)
        took.append(time.process_time() - began)
    return significant(1e3 * float(np.median(took)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--out", help="also write the JSON line there")
    args = parser.parse_args()
    emit({"benchmark": "rl_packing", "tokens a row": TOKENS, **random_sets(args.sets),
          "512 samples on 8 ranks": ranks(), "milliseconds for 4096": milliseconds(), **environment()},
         args.out)  # fmt: skip


if __name__ == "__main__":
    main()

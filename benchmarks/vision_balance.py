"""How even are 64 ranks in tokens and in patches, and what is it worth against packing by tokens alone?

    python benchmarks/vision_balance.py [--documents 60000] [--seeds 0 1 2] [--out FILE]

A trace of documents with log-normal lengths: all have text, three in five have an image. Each step, a rank gets one row
of 8,192 tokens (an experiment's size=l). Sides:

    balanced            ours, `data.fit=balanced`: by tokens and patches, out of a window (data/balancing.py)
    balanced, 8 hosts apart   the same by eight hosts for eight ranks each, none of which knows what the others have; a
                        row has room for the patches that come with its tokens and no more, so that full rows are alike
    balanced by FLOPs   the same, but even in FLOPs of encoder and decoder, attention included (of the first model)
    best fit            `data.fit=best`, with the same limits and as many documents held back: by both, but not even
    first fit, tokens   a document goes to the first row with room for its tokens; patches are not looked at
    order               as torch's DistributedSampler deals them: document i of a shuffled epoch to rank i mod 64, so
                        many to a rank that tokens are as many a step as in the other sides; rows are as long as needed

Numbers: max/mean over ranks of tokens and of patches (mean over steps, and the 95th percentile); the patches that a row
must have room for (ours and best fit are given that; the others take what they take); filled tokens; documents placed a
second of processor time; and the makespan relative to ours. A step takes as long as its slowest rank by forward FLOPs
of the models, attention included: "apart" waits for the slowest encoder and then for the slowest language model, as
ranks do that gather weights layer by layer, "together" for the slowest sum. Model times, not measured ones. Prints one
JSON line.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
from contest import emit, environment, significant

from glmv_jax import presets
from glmv_jax.data import balancing
from glmv_jax.models import build

RANKS, HOSTS, TOKENS = 64, 8, 8192
ROOM = 1.05
SIDES = ("balanced", "balanced, 8 hosts apart", "balanced by FLOPs", "best fit", "first fit, tokens", "order")
MODELS = {"CogViT with GLM-OCR's decoder": presets.vlm, "CogViT with GLM-5's decoder": presets.glm5v}


def trace(count: int, seed: int) -> np.ndarray:
    """Tokens and patches of each document, [N, 2]. An image has four patches a token, and 4,096 at most."""
    rng = np.random.default_rng(seed)
    text = np.clip(rng.lognormal(5.8, 1.0, count), 8, 4096).astype(int)
    seen = np.clip(rng.lognormal(6.4, 0.9, count), 16, 4096).astype(int) // 4 * 4 * (rng.random(count) < 0.6)
    return np.stack([text + seen // 4, seen], 1)


# --- sides: batches of [rows of documents, by number] -----------------------------------------------------------------

Batch = list[list[int]]


def balanced(loads: np.ndarray, limits: np.ndarray, ahead: int, rows: int = RANKS) -> Iterator[Batch]:
    window, waiting = balancing.Window(limits, rows, ahead, even=2), []
    for n, load in enumerate(loads.tolist()):
        window.add(tuple(load))
        waiting.append(n)
        if window.full():
            row_N = window.place()
            yield [[n for n, row in zip(waiting, row_N) if row == r] for r in range(rows)]
            waiting = [n for n, row in zip(waiting, row_N) if row < 0]


def apart(loads: np.ndarray, limits: np.ndarray, ahead: int) -> Iterator[Batch]:
    own = [balanced(loads[h::HOSTS], limits, ahead, RANKS // HOSTS) for h in range(HOSTS)]
    for batches in zip(*own):
        yield [[HOSTS * n + h for n in row] for h, batch in enumerate(batches) for row in batch]


def fitted(loads: np.ndarray, limits: np.ndarray, ahead: int, best: bool) -> Iterator[Batch]:
    """First or best fit as `packing` has them: a batch is done when more than `ahead` documents found no room."""
    held: list[int] = []

    def put(n: int) -> bool:
        fits = (free >= loads[n]).all(1)
        if not fits.any():
            return False
        r = int(np.where(fits, (free / limits).sum(1), np.inf).argmin()) if best else int(fits.argmax())
        rows[r].append(n)
        free[r] -= loads[n]
        return True

    rows, free = [[] for _ in range(RANKS)], np.tile(limits.astype(float), (RANKS, 1))
    for n in range(len(loads)):
        if not put(n):
            held.append(n)
        if len(held) > ahead:
            yield rows
            rows, free = [[] for _ in range(RANKS)], np.tile(limits.astype(float), (RANKS, 1))
            held = [n for n in held if not put(n)]


def order(loads: np.ndarray, each: int) -> Iterator[Batch]:
    """`each` documents to a rank and step, as DistributedSampler(shuffle=True) and a batch size of `each` give them."""
    shuffled = np.random.default_rng(0).permutation(len(loads))
    for step in range(len(loads) // (RANKS * each)):
        batch = shuffled[step * RANKS * each : (step + 1) * RANKS * each]
        yield [batch[r::RANKS].tolist() for r in range(RANKS)]


# --- numbers ----------------------------------------------------------------------------------------------------------


def flops(cfg, loads: np.ndarray) -> np.ndarray:
    """Forward FLOPs of each document, [N, 2]: in the encoder and its merger, and in the decoder."""
    vision = lambda p: cfg.vision.flops(p) + cfg.merger.flops(p) if p else 0.0  # noqa: E731
    return np.array([(vision(p), cfg.decoder.flops(t, (t + 1) / 2)) for t, p in loads.tolist()])


def measure(side: str, loads: np.ndarray, limits: np.ndarray, ahead: int, costs: dict[str, np.ndarray]) -> dict:
    """What came of one side on one trace. The makespan is a step's, over the documents' share of all work."""
    each = max(1, round(0.98 * TOKENS / loads[:, 0].mean()))
    with_costs = np.concatenate([next(iter(costs.values())), loads], 1)
    run = {
        "balanced": lambda: balanced(loads, limits, ahead),
        "balanced, 8 hosts apart": lambda: apart(loads, np.array([TOKENS, limits[1] / ROOM]), ahead),
        "balanced by FLOPs": lambda: balanced(with_costs, np.array([np.inf, np.inf, *limits]), ahead),
        "best fit": lambda: fitted(loads, limits, ahead, best=True),
        "first fit, tokens": lambda: fitted(loads, np.array([TOKENS, np.inf]), ahead, best=False),
        "order": lambda: order(loads, each),
    }[side]
    began = time.process_time()
    batches = list(run())
    seconds = time.process_time() - began
    placed = [n for batch in batches for row in batch for n in row]
    assert len(set(placed)) == len(placed), "a document was doubled"
    assert len(placed) >= len(loads) - 4 * RANKS * each - HOSTS * ahead, "documents were lost"
    row_of = lambda values: np.array([[values[row].sum(0) for row in batch] for batch in batches])  # noqa: E731
    filled_SRD = row_of(loads)
    over_SD = filled_SRD.max(1) / filled_SRD.mean(1)
    result = {
        "steps": len(batches),
        "max/mean": {k: significant(x) for k, x in zip(("tokens", "patches"), over_SD.mean(0))},
        "max/mean, p95": {k: significant(x) for k, x in zip(("tokens", "patches"), np.percentile(over_SD, 95, 0))},
        "patches of the fullest row": int(filled_SRD[..., 1].max()),
        "filled": significant(filled_SRD[..., 0].mean() / TOKENS),
    }
    if side != "order":  # which places nothing
        result["documents/s"] = significant(len(placed) / seconds, 3)
    for name, cost in costs.items():
        work_SRD = row_of(cost)
        ideal = work_SRD.sum() / RANKS
        result[name] = {"apart": significant(work_SRD.max(1).sum() / ideal),
                        "together": significant(work_SRD.sum(2).max(1).sum() / ideal)}  # fmt: skip
    return result


def mean(rows: list) -> dict | float:
    """Of numbers in equal dicts."""
    if isinstance(rows[0], dict):
        return {key: mean([row[key] for row in rows]) for key in rows[0]}
    return significant(float(np.mean(rows)), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ahead", type=int, default=128, help="documents that wait beyond those that are due")
    parser.add_argument("--out", help="also write the JSON line there")
    args = parser.parse_args()
    models = {name: build.vlm(preset("l")) for name, preset in MODELS.items()}
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for seed in args.seeds:
        loads = trace(args.documents, seed)
        # Room for the patches that come with a full row of tokens, and some more.
        limits = np.array([TOKENS, int(ROOM * TOKENS * loads[:, 1].sum() / loads[:, 0].sum()) // 4 * 4])
        costs = {name: flops(cfg, loads) for name, cfg in models.items()}
        for side in SIDES:
            found[side].append(measure(side, loads, limits, args.ahead, costs))
    sides = {side: mean(rows) for side, rows in found.items()}
    ours = sides["balanced"]
    shorter = {side: {name: {wait: significant(row[name][wait] / ours[name][wait], 3) for wait in ours[name]}
                      for name in models} for side, row in sides.items() if side != "balanced"}  # fmt: skip
    emit({"benchmark": "vision_balance", "ranks": RANKS, "tokens a row": TOKENS, "documents": args.documents,
          "seeds": args.seeds, "ahead": args.ahead, "sides": sides, "makespan / ours": shorter, **environment()},
         args.out)  # fmt: skip


if __name__ == "__main__":
    main()

"""What does the asynchronous pipeline gain, where every duration is known?

    python benchmarks/rl_pipeline.py [--seeds 3] [--out FILE]

The scheduler and the driver that runs use, over simulated parts on a clock that jumps (tests/rl/simulated.py): an
engine of 32 slots and a token a millisecond, 8 groups of 4 answers a batch, answers of 50 tokens give or take half, one
in 25 of 600. Seconds are those of the workload: a minute of computing, whatever the machine.

Prints one JSON line. "early": of 31 short answers beside one of 2 s, those graded within 0.5 s. "overlap" and
"step_over_longest": of stages of 1, 0.3, 0.3, 0.2 and 0.8 s, the share of the time in which two or more work (and,
"overlap_without_train", of those beside the update alone), and the time of a step over the longest stage.
"async_over_sync": time for 60 updates on batches of the same size, over that of the synchronous run, by what is done
about slow groups. "p99": 99th percentile of the time of a step, with a time limit over without, answers of up to 1,000
tokens. "overrun": how long after its time limit a step ends, at most. "used": of the groups drawn, those trained on or
kept to go on with. "schedules": of 10,000 random ones (answers, failures, aborts, weights and restarts in any order,
every way of being late, k from 0 to 3), how many trained a token of more than k updates before, lost a prompt or
trained one twice; and whether without staleness every token and weight is that of the synchronous run, by what is done
about slow groups. Targets: early 31, both overlaps >= .6, step_over_longest <= 1.15, async_over_sync <= .6, p99 <= .6,
overrun <= .1, used >= .99, no bad schedule, all equal.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import sys

import numpy as np
from contest import emit, spread

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


def world(settings, length, *, slots: int = 10**9, **seconds):
    from glmv_jax.rl.pipeline import Scheduler
    from tests.rl.simulated import Engine, Numbers, World

    return World(Scheduler(Numbers(), settings), Engine(length, slots=slots), **seconds)


def heavy_tail(seed: int, longest: int = 600):
    def length(request) -> int:
        rng = random.Random(f"{seed}/{request.prompt.uid}/{request.member}")
        return longest if rng.random() < 0.04 else int(50 * rng.uniform(0.5, 1.5))

    return length


def early() -> int:
    from glmv_jax.rl.pipeline import Settings
    from tests.rl import simulated

    w = world(Settings(32, 1, staleness=0), lambda r: 2000 if r.prompt.uid == 0 else 50, reward=0.1)
    simulated.run(w.train(1))
    return sum(at <= 0.5 for at, _ in w.graded)


def stages() -> dict[str, float]:
    from glmv_jax.rl.pipeline import Settings
    from tests.rl import simulated

    w = world(Settings(8, 4, staleness=3), lambda r: 500, slots=16, reward=0.3, batch=0.3, push=0.2, update=0.8)
    pipeline = simulated.run(w.train(60))
    each = float(np.diff(w.times)[5:].mean())
    of = pipeline.trace.overlap
    return {"overlap": round(of(), 3), "overlap_without_train": round(of(("rollout", "reward", "batch", "weights")), 3),
            "step_over_longest": round(each / 1.0, 3)}  # fmt: skip


def against_sync(seed: int) -> dict[str, float]:
    from glmv_jax.rl.pipeline import Settings
    from tests.rl import simulated

    def seconds(**changes) -> float:
        w = world(Settings(8, 4, **changes), heavy_tail(seed), slots=32, reward=0.02, update=0.1)
        simulated.run(w.train(60))
        assert sum(len(taken.groups) for taken in w.trained) == 480
        return w.times[-1]

    plain = seconds(staleness=0)
    return {late: seconds(staleness=4, late=late, in_flight=12) / plain for late in ("wait", "drop", "abort")}


def limited(seed: int) -> dict[str, float]:
    from glmv_jax.rl.pipeline import Settings
    from tests.rl import simulated

    def steps(**changes):
        w = world(Settings(8, 2, staleness=16, late="abort", **changes), heavy_tail(seed, 1000), update=0.02)
        pipeline = simulated.run(w.train(200))
        s = w.scheduler
        kept = {*s.open, *s.ready, *(g.prompt.uid for g in (*s.cache, *(g for b in s.picked.values() for g in b)))}
        batches = [span.begin for span in pipeline.trace.spans if span.stage == "batch"]
        return np.diff([0.0, *w.times]), np.diff([0.0, *batches]), len({*w.uids, *kept}) / s.prompts.drawn

    slow, *_ = steps()
    quick, ends, used = steps(seconds=0.15, in_flight=24)
    p99 = float(np.quantile(quick, 0.99) / np.quantile(slow, 0.99))
    return {"p99": p99, "overrun": max(0.0, float(ends.max()) - 0.15), "used": used}


def schedules(count: int = 10_000) -> dict[str, int]:
    from tests.rl.schedules import Schedule

    found = {"tried": count, "batches": 0, "too_old": 0, "lost_or_twice": 0}
    for seed in range(count):
        one = Schedule(seed)
        for _ in range(45):
            one.step()
        found["batches"] += one.trained_batches
        found["too_old"] += int(one.oldest > one.settings.staleness)
        found["lost_or_twice"] += int(not one.all_there)
    return found


def equal_to_synchronous() -> dict[str, bool]:
    from glmv_jax.rl.pipeline import Settings
    from tests.rl import simulated
    from tests.rl.schedules import synchronous

    weights, _ = synchronous(60, 8, 4, heavy_tail(0))
    found = {}
    for late in ("wait", "drop", "abort"):
        w = world(Settings(8, 4, staleness=0, late=late), heavy_tail(0), reward=0.02, update=0.1)
        simulated.run(w.train(60))
        found[late] = bool(w.weights[60] == weights)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    ratios = [against_sync(seed) for seed in range(options.seeds)]
    limits = [limited(seed) for seed in range(options.seeds)]
    emit(
        {
            "benchmark": "rl_pipeline", "seeds": options.seeds, "early": early(), **stages(),
            "async_over_sync": {late: spread([r[late] for r in ratios], 3) for late in ratios[0]},
            "schedules": schedules(), "equal_to_synchronous": equal_to_synchronous(),
            **{name: spread([x[name] for x in limits], 3) for name in limits[0]},
        },
        options.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()

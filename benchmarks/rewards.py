"""What grading costs: a judge's rounds, an answer that hangs its grader, and a rule in a process of its own.

    python -m benchmarks.rewards [--rounds 5] [--out FILE]        (from the top of the repository)

Prints one JSON line:

    judged      seconds for 64 answers, a judge over HTTP on this machine that takes 0.2 s, 16 connections (four rounds,
                0.8 s, is the least; the target is less than 1.3 s)
    hanging     the same 64 answers graded by rules, of which one holds the expression of Math-Verify's issue 65 and one
                an endless loop: seconds until the other 62 have their grades, and until the two are cut; limit 2 s
    rule        answers a second of the rule "number" in this process, in one worker and in two, and ms to start a
                worker (with "number", and with "maths", which imports SymPy)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time

from benchmarks.contest import emit, environment, spread
from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards import rules
from glmv_jax.rl.rewards.grade import Answered
from glmv_jax.rl.rewards.pool import Pool
from glmv_jax.rl.rewards.system import RewardSystem
from glmv_jax.rl.task import box
from tests.rl.rewards.fake_judge import running
from tests.rl.rewards.test_system import TOWER


def sample(source: str, answer: str, number: int) -> Sample:
    return Sample(f"{source}/{number}", source, (), "?", answer)


def finished(rewards: RewardSystem, answered: list[Answered]) -> list[float]:
    """Seconds until each grade is there."""

    async def one(item: Answered, begin: float) -> float:
        await rewards.grade(item)
        return time.perf_counter() - begin

    async def run() -> list[float]:
        begin = time.perf_counter()
        return await asyncio.gather(*(one(item, begin) for item in answered))

    return asyncio.run(run())


def judged(rounds: int) -> dict:
    source = {"free": {"parts": {"judge": {"kind": "judge", "judge": "main", "box": False}}}}
    answered = [Answered(sample("free", "", n), "an essay") for n in range(64)]
    with running(lambda body, n: 0.2) as judge:
        judges = {"main": {"url": judge.url, "model": "m", "connections": 16}}
        with RewardSystem({"sources": source, "judges": judges}) as rewards:
            return spread([max(finished(rewards, answered)) for _ in range(rounds)])


def hanging(rounds: int) -> dict:
    own = {"kind": "rule", "rule": "tests.rl.rewards.hostile:verdict"}
    sources = {"maths": {"parts": {"rule": {"kind": "rule", "rule": "maths"}}}, "own": {"parts": {"rule": own}}}
    answered = [Answered(sample("maths", "\\frac{1}{2}", n), box("0.5")) for n in range(31)]
    answered += [Answered(sample("own", "1", n), "1") for n in range(31)]
    endless = [Answered(sample("maths", "\\frac{x - 5}{16}", 99), box(TOWER)), Answered(sample("own", "1", 99), "loop")]
    others, cut = [], []
    for _ in range(rounds):
        with RewardSystem({"sources": sources, "workers": 3, "limit": 2.0}) as rewards:
            finished(rewards, answered)  # the workers are up
            seconds = finished(rewards, endless + answered)
            others.append(max(seconds[2:]))
            cut.append(max(seconds[:2]))
            assert [rewards.counters()[name].get("timeout") for name in sources] == [1, 1]
    return {"the others": spread(others), "cut": spread(cut)}


def rule(rounds: int) -> dict:
    answers, number = 2_000, sample("number", "40", 0)
    number_spec, maths_spec = rules.spec("number"), rules.spec("maths")
    verify = rules.verifier("number")
    found: dict[str, list[float]] = {"this process": [], "1 worker": [], "2 workers": []}
    starts: dict[str, list[float]] = {"number": [], "maths": []}
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(answers):
            verify(box("40"), number)
        found["this process"].append(answers / (time.perf_counter() - begin))
        for workers in (1, 2):
            with Pool([number_spec], workers=workers) as pool:
                for call in [pool.submit(number_spec, box("40"), number, limit=9) for _ in range(100)]:
                    call.result()
                begin = time.perf_counter()
                for call in [pool.submit(number_spec, box("40"), number, limit=9) for _ in range(answers)]:
                    call.result()
                found[f"{workers} worker{'s' * (workers > 1)}"].append(answers / (time.perf_counter() - begin))
        for name, spec in (("number", number_spec), ("maths", maths_spec)):
            begin = time.perf_counter()
            with Pool([spec], workers=1) as pool:
                pool.submit(spec, box("40"), number, limit=60).result()
                starts[name].append(1e3 * (time.perf_counter() - begin))
    rates = {name: spread(values) for name, values in found.items()}
    return {"answers/s": rates, "ms to start": {name: spread(values) for name, values in starts.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="also write the JSON line there")
    args = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"
    record = {"benchmark": "rewards", "judged": judged(args.rounds), "hanging": hanging(args.rounds)}
    emit({**record, "rule": rule(args.rounds), **environment()}, args.out)


if __name__ == "__main__":
    main()

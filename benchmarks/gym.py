"""Does one loop play them all? Every data set of reasoning-gym and the tasks of MiniWoB++, by `rl.play.play`.

    python benchmarks/gym.py reasoning [--seeds 4]    each data set's own answer, spoken as a model would; hostile ones
    python benchmarks/gym.py browser [--tasks 48]     resets, screenshots to the byte and two clicks in so many tasks;
                                                       a script's reward in click-test, click-button, enter-text

Prints one JSON line. A seed's first observation is made twice, by two environments (or resets of one browser), and
compared byte for byte.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import platform
import statistics
import sys
import time

from glmv_jax.data.chat import boxed
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.rl import envs
from glmv_jax.rl.envs import browser, oracles, reasoning
from glmv_jax.rl.gym import Action, Environment, Observation
from glmv_jax.rl.play import Episode, Limits, play
from glmv_jax.rl.players import scripted
from glmv_jax.rl.transcript import Form

FORM = Form(Tokenizer(), Patcher(max_patches=64))
LIMITS = Limits(turns=8, tokens=1 << 20, seconds=120)
HOSTILE = ("zzz", "1/0", "[", "None", "{}", "nan", "9**9**9", "[exit()]", "-1", "\u00b2", "x" * 10_000, "[[1, 2], 3]")
SOLVED = ("click-test", "click-button", "enter-text")


def played(env: Environment, choose: oracles.Choose, seed: int, limits: Limits = LIMITS) -> Episode:
    return asyncio.run(play(env, scripted(choose), seed, FORM, limits))


def the_same(one: Observation, other: Observation) -> bool:
    pixels = [[image.tobytes() for image in each.images] for each in (one, other)]
    return (one.messages, one.tools) == (other.messages, other.tools) and pixels[0] == pixels[1]


def of_reasoning(seeds: int) -> dict[str, object]:
    """The data sets by what their own answer gets, and how their graders take hostile answers."""
    rewards, differing, raised, failed, late = {}, [], {}, [], []
    for name in reasoning.names():
        env = envs.make(f"reasoning_gym/{name}")
        episodes = [played(env, oracles.of_reasoning(env), seed) for seed in range(seeds)]
        rewards[name] = statistics.mean(episode.reward or 0.0 for episode in episodes)
        again = envs.make(f"reasoning_gym/{name}")
        if not all(the_same(env.reset(seed), again.reset(seed)) for seed in range(seeds)):
            differing.append(name)
        for answer in HOSTILE:
            episode = played(env, lambda answer=answer: Action(boxed(answer)), 0)
            error = str(episode.info.get("error", ""))
            raised.setdefault(name, []).extend([error.partition(":")[0]] if error else [])
            failed += [name] if episode.failed else []
            late += [name] if "TimeoutError" in error else []
    return {
        "data_sets": len(rewards), "seeds": seeds, "mean": statistics.mean(rewards.values()),
        "below_one": {name: reward for name, reward in rewards.items() if reward < 1.0}, "differing": differing,
        "hostile": {"answers": len(HOSTILE), "graders_that_raised": sum(map(bool, raised.values())),
                    "cut_at_their_time": sorted(set(late)), "failed_episodes": failed},
        "reasoning_gym": importlib.metadata.version("reasoning_gym"),
    }  # fmt: skip


def of_browser(count: int) -> dict[str, object]:
    """Tasks, evenly spread over those there are, by what became of two clicks; and the three that a script wins."""
    names = browser.names()
    chosen = [names[n * len(names) // count] for n in range(count)]
    ended, differing, seconds = {}, [], []
    for name in chosen:
        env = envs.make(f"miniwob/{name}")
        try:
            one, other = env.reset(3), env.reset(3)
            differing += [] if the_same(one, other) else [name]
            start = time.perf_counter()
            episode = played(env, lambda: oracles.call("click", x=500, y=600), 4, Limits(turns=2, seconds=60))
            seconds.append(time.perf_counter() - start)
            ended.setdefault(episode.ended, []).append(name + (f" ({episode.reason})" if episode.failed else ""))
        finally:
            env.close()
    rewards = {}
    for name in SOLVED:
        env = envs.make(f"miniwob/{name}")
        try:
            rewards[name] = [played(env, oracles.of_browser(env), seed).reward for seed in range(10)]
        finally:
            env.close()
    return {
        "tasks": len(chosen), "of": len(names), "failed": ended.get("failed", []),
        "ended": {how: len(which) for how, which in ended.items()}, "differing": differing,
        "episode_seconds_median": round(statistics.median(seconds), 2), "rewards": rewards,
        "processes_left": len(browser._drivers()), "miniwob": importlib.metadata.version("miniwob"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("reasoning", "browser"))
    parser.add_argument("--seeds", type=int, default=4, help="of each data set")
    parser.add_argument("--tasks", type=int, default=48, help="of the browser")
    args = parser.parse_args()
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # some data sets print while they draw a question
        answer = of_reasoning(args.seeds) if args.what == "reasoning" else of_browser(args.tasks)
    answer |= {"seconds": round(time.perf_counter() - start, 1), "python": platform.python_version()}
    print(json.dumps({"what": args.what} | answer))


if __name__ == "__main__":
    main()

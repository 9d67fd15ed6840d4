"""Does stage 5 train on environments in its asynchronous form? A few updates by `glmv train`'s own loop.

    python benchmarks/episodes.py miniwob        click-test in a real Chromium, clicks at pixel coordinates
    python benchmarks/episodes.py gymnasium      FrozenLake-v1 without slipping: six moves to the goal

A fresh model hardly ever writes a call, and then all rewards are 0: it is first shown episodes of a script that wins
(--shown of them, --copy steps), as supervised training would. Prints one JSON line: rewards, turns, calls that could
not be read and how far the trainer is from what drew (mismatch_kl), update by update; how often environments were made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glmv_jax import config
from glmv_jax.rl import Grade, envs
from glmv_jax.rl.envs import browser, oracles
from glmv_jax.rl.episodes import record, to_rows
from glmv_jax.rl.integrity import checked
from glmv_jax.rl.play import play
from glmv_jax.rl.players import scripted
from glmv_jax.train import loop, main

MOVES = ("left", "down", "right", "up")
PATH = (1, 1, 2, 2, 1, 2)  # over FrozenLake's own map
ICE = {"is_slippery": False, "instructions": "Reach the goal.", "actions": MOVES}
KINDS = {
    "miniwob": ("miniwob/click-test", {"tools": ("click",)}, oracles.of_browser, 2, 28),
    "gymnasium": (
        "gymnasium/FrozenLake-v1", ICE,
        lambda env: oracles.one_after_another(lambda: [oracles.call("act", action=MOVES[n]) for n in PATH]), 8, 16,
    ),
}  # fmt: skip
QUESTIONS = ("count", "name", "attribute", "spatial", "point", "chart")
TOLD = ("reward", "turns", "malformed", "limited", "failed", "mismatch_kl", "staleness_max", "thrown_away")


def settings(kind: str, args: argparse.Namespace) -> Any:
    name, options, _, turns, longest = KINDS[kind]
    cfg = config.load("experiments/rl_grpo.py:size=nano")
    return config.override(cfg, [
        *(f"data.weights.{question}=0.0" for question in QUESTIONS), "rollout.pipeline=async", "rollout.slots=8",
        f"rollout.environments={((name, 1.0, options),)!r}", f"rollout.episodes.turns={turns}",
        f"rollout.prompts={args.prompts}", f"rollout.group={args.group}", f"rollout.max_new_tokens={longest}",
        f"rollout.episodes.rows={args.prompts * args.group}", f"rollout.episodes.parallel={args.parallel}",
        f"rollout.staleness={args.staleness}", "data.tokens=640", "data.patches=192", "data.targets=128",
        f"steps={args.updates}", "log_every=1",
    ])  # fmt: skip


def shown(stage: Any, kind: str, count: int) -> list[dict[str, np.ndarray]]:
    """Rows of so many won episodes, whose seeds no run draws."""
    name, options, oracle, *_ = KINDS[kind]
    environment, form, records = envs.make(name, **options), stage.episodes._form, []
    for seed in range(count):
        policy = scripted(oracle(environment))
        episode = asyncio.run(play(environment, policy, (1 << 31) + seed, form, stage.episodes.limits))
        assert episode.reward == 1.0, episode
        records.append(record(episode, Grade(1.0, True, {}), seed))
    environment.close()
    d, size = stage.cfg.data, 8
    return [
        checked(to_rows(
            records[n : n + size], np.ones(size), rows=(size,), tokens=d.tokens, patches=d.patches,
            channels=stage.asker.patcher.channels, image=stage.tokenizer.image, names=stage.names, targets=d.targets,
            per="token",
        )[0])
        for n in range(0, count - size + 1, size)
    ]  # fmt: skip


def copied(stage: Any, batches: list[dict[str, np.ndarray]], steps: int) -> tuple[Any, list[float]]:
    """Parameters that say what was said in these rows, and the loss of each step."""
    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            targets, hidden, weight, _ = stage.learnt(params, batch)
            logprob, _ = stage.of_targets(params, targets, hidden)
            return -jnp.sum(weight * logprob) / jnp.sum(weight)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params = stage.init_params(jax.random.key(0))
    state, losses = optimizer.init(params), []
    for n in range(steps):
        params, state, value = step(params, state, batches[n % len(batches)])
        losses.append(float(value))
    return jax.device_get(params), losses


def trained(stage: Any, params: Any, folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl of a run that begins from these parameters."""
    stage.init_params = lambda key: jax.tree.map(jnp.asarray, params)
    stage.cfg.faults = str(folder / "faults.jsonl")
    stage.evaluate = lambda params, extra, *, full: {}  # held-out questions, of which nothing here is learnt
    stage.write_samples, stage.notes = (lambda *args: None), dict
    loop.train(stage, folder, None)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main_() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    for name, default in (("shown", 48), ("copy", 60), ("updates", 6), ("prompts", 3), ("group", 4), ("parallel", 4),
                          ("staleness", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.kind == "miniwob" and (reason := browser.missing()):
        parser.error(reason)
    stage = main.stage_class("rl")(settings(args.kind, args))
    begin = time.perf_counter()
    params, losses = copied(stage, shown(stage, args.kind, args.shown), args.copy)
    copying = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        rows = trained(stage, params, Path(folder))
        seconds = time.perf_counter() - begin
    source = KINDS[args.kind][0]
    by_update = {
        what: [round(row[key], 15) for row in rows if (key := f"{what}/{source}") in row and row[key] is not None]
        for what in TOLD
    }
    print(json.dumps({
        "environment": source, **vars(args), "copied_loss": [round(losses[0], 3), round(losses[-1], 3)],
        "by_update": by_update, "environments": {"made": dict(stage.episodes.arena.made),
                                                 "given_up": dict(stage.episodes.arena.gone)},
        "seconds": {"copying": round(copying, 1), "training": round(seconds, 1)},
        "machine": platform.machine(), "jax": jax.__version__, "device": jax.devices()[0].device_kind,
    }))  # fmt: skip


if __name__ == "__main__":
    main_()

"""Do the roles of reinforcement learning work in processes of their own, and survive the death of any of them?

    python benchmarks/rl_ray.py [--steps 10] [--kills 0.1] [--out FILE]

The roles alone (`rl_ray_train.py` trains). A local Ray cluster: rollout, reward and environment workers, each an actor
in its own process, under the pipeline that a run on one machine uses. Answers are simulated (a token a tick of real
time), everything else is as it is: requests, aborts, weights and verdicts travel between processes, and a share of the
requests, a reward worker and an environment worker kill the process they are in with SIGKILL. Half of the prompts are
episodes of three steps in an environment worker, each of which shows a picture; some pictures are changed on their way
here. A minute on two cores, most of it processes that start.

Prints one JSON line: prompts trained on and how many of them twice or never (the answer must be none), processes that
died, work done again, the oldest token against the bound, pictures that were spoilt, how often that was told, and how
many were graded all the same (none), overlap, and seconds. Exits with 1 when something was lost or not noticed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import random
import signal
import sys
import time

import numpy as np
from contest import emit, environment, log
from PIL import Image

TICK = 0.002  # seconds a token
STALENESS, GROUPS, SIZE = 2, 4, 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Writer:
    """A rollout worker: answers whose tokens are the weights' number; some requests are the death of it, once."""

    def __init__(self, kills: float, graves: str) -> None:
        self.kills, self.graves = kills, graves
        self.value, self.version = 0, 0
        self.stopped: set[int] = set()

    def set_params(self, params: np.ndarray, version: int) -> None:
        self.value, self.version = int(params[0]), version

    def abort(self, id: int) -> None:
        self.stopped.add(id)

    async def complete(self, request, moment=None):
        from glmv_jax.rl.pipeline import Completion, Drawn

        rng = random.Random(f"{request.prompt.uid}/{request.member}")
        length = rng.choice((20, 30, 40, 400))
        tokens, versions = [], []
        if request.prefix is not None:
            tokens, versions = request.prefix.tokens.tolist(), request.prefix.versions.tolist()
        marked = random.Random(f"death of {request.id}").random() < self.kills
        while len(tokens) < length and request.id not in self.stopped:
            await asyncio.sleep(TICK)
            tokens.append(self.value)
            versions.append(self.version)
            if marked and len(tokens) >= 10 and first(self.graves, f"request-{request.id}"):
                die()
        drawn = Drawn(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), np.array(versions, np.int32))
        return Completion(drawn, "stop" if len(tokens) >= length else "aborted")


class Judge:
    """A reward worker; its third verdict of all is the death of it."""

    def __init__(self, graves: str) -> None:
        self.graves, self.count = graves, 0

    async def grade(self, request, completion):
        from glmv_jax.rl.rewards import Grade

        self.count += 1
        if self.count == 3 and first(self.graves, "judge"):
            die()
        await asyncio.sleep(5 * TICK)
        return Grade(float(request.member), bool(request.member), {"score": float(request.member)}), {}


def picture(seed: int, at: int) -> Image.Image:
    """What an episode shows at a time."""
    rng = np.random.default_rng((seed, at))
    return Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))


class Counting:
    """An environment of three steps; once, after the fifth episode began, the process dies half-way through one."""

    source, episodes = "counting", 0

    def __init__(self, graves: str) -> None:
        self.graves = graves

    def reset(self, seed: int):
        Counting.episodes += 1
        self.seed, self.at = seed, 0
        return self._shows()

    async def step(self, action):
        from glmv_jax.rl.gym import Step

        self.at += 1
        if Counting.episodes >= 5 and self.at == 2 and first(self.graves, "environment"):
            die()
        return Step(self._shows(), self.at == 3, 1.0)

    def _shows(self):
        from glmv_jax.rl.gym import asked

        return asked(f"Picture {self.at}.", [picture(self.seed, self.at)])

    def close(self) -> None:
        self.at = -1


def worlds(graves: str):
    """An environment worker, whose pictures of some episodes are other ones when they arrive, once each."""
    from glmv_jax.rl.pipeline.remote_environment import Environments

    class Spoiling(Environments):
        async def step(self, name: str, action):
            step, world = await super().step(name, action), self._open[name]
            if world.seed % 6 == 0 and world.at == 1 and first(graves, f"spoilt-{world.seed}"):
                other = dataclasses.replace(step.observation, images=(picture(world.seed, 99),))
                return dataclasses.replace(step, observation=other)
            return step

    return Spoiling(lambda source: Counting(graves))


def first(folder: str, name: str) -> bool:
    """Whether nobody has been here before, in whatever process."""
    try:
        os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


class Numbers:
    def __init__(self) -> None:
        self.drawn = 0

    def draw(self):
        from glmv_jax.rl.pipeline import Prompt

        self.drawn += 1
        return Prompt(self.drawn - 1, self.drawn - 1, ("question", "counting")[self.drawn % 2])

    def learn(self, groups) -> None: ...
    def get_state(self) -> int:
        return self.drawn

    def set_state(self, state: int) -> None:
        self.drawn = state


async def work(steps: int, kills: float, graves: str) -> dict:
    from glmv_jax.data.hashes import image_hash
    from glmv_jax.data.naflex import Patcher
    from glmv_jax.data.tokenizer import Tokenizer
    from glmv_jax.rl.arena import Arena
    from glmv_jax.rl.gym import Action
    from glmv_jax.rl.pipeline import Pipeline, Scheduler, Settings, train
    from glmv_jax.rl.pipeline.remote_environment import RemoteEnvironment
    from glmv_jax.rl.pipeline.remote_reward import RemoteGrader
    from glmv_jax.rl.pipeline.remote_rollout import RemoteEngine
    from glmv_jax.rl.pipeline.workers import Workers
    from glmv_jax.rl.play import Limits
    from glmv_jax.rl.players import scripted
    from glmv_jax.rl.transcript import Form

    writers = Workers(lambda: Writer(kills, graves), 2, needs={"num_cpus": 0.5})
    judges = Workers(lambda: Judge(graves), 1, needs={"num_cpus": 0.5})
    places = Workers(lambda: worlds(graves), 1, needs={"num_cpus": 0.5})
    loop, form, wrong = asyncio.get_running_loop(), Form(Tokenizer(), Patcher(max_patches=16)), []
    arena = Arena(lambda name: RemoteEnvironment(places, name, loop), 4)
    engine, judged = RemoteEngine(writers), RemoteGrader(judges)
    notes: list[dict] = []
    settings = Settings(GROUPS, SIZE, staleness=STALENESS, late="abort", in_flight=6, seconds=2.0, patience=120.0)
    scheduler = Scheduler(Numbers(), settings, notes.append)
    taken: list = []

    async def grade(request, completion):
        if (source := request.prompt.source) == "counting":  # the verdict needs an episode; a lost one is graded anew
            seed, say = request.prompt.uid, scripted(lambda: Action("on"))
            episode = await arena.play(source, say, seed, form, Limits(turns=3, tokens=2000))
            if episode.failed:
                raise RuntimeError(episode.reason)
            shown = [form.patcher(picture(seed, at)) for at in range(3)]
            wrong.extend(h for h, image in zip(episode.transcript.hashes, shown) if h != image_hash(*image))
        return await judged(request, completion)

    async def build(step, groups):
        return [group.prompt.uid for group in groups]

    async def push(version: int) -> None:
        await engine.set_params(np.full(100_000, version), version)

    async def update(batch) -> None:
        await asyncio.sleep(20 * TICK)
        taken.append(batch)

    await asyncio.gather(*(w.tell("set_params", np.zeros(1), 0) for w in (writers,)))  # all processes are up
    pipeline = Pipeline(scheduler, engine, grade, build, push)
    began = time.monotonic()
    await train(pipeline, update, steps)
    seconds = time.monotonic() - began
    overlap = pipeline.trace.overlap()
    await pipeline.close()
    uids = [g.prompt.uid for batch in taken for g in batch.groups]
    left = {*scheduler.open, *scheduler.ready, *(g.prompt.uid for g in scheduler.cache)}
    left |= {g.prompt.uid for groups in scheduler.picked.values() for g in groups}
    answers = [(batch.step, m.answer.drawn) for batch in taken for g in batch.groups for m in g.members]
    kinds = [note["kind"] for note in notes]
    found = {
        "steps": len(taken), "prompts": len(uids), "twice": len(uids) - len(set(uids)),
        "never": len(set(range(scheduler.prompts.drawn)) - set(uids) - left),
        "requests": scheduler.state()["requests"],
        "processes_died": {"rollout": writers.lost, "reward": judges.lost, "environment": places.lost},
        "done_again": {"rollout": writers.again, "reward": judges.again},
        "failed": kinds.count("failed"), "aborted": kinds.count("aborted"), "dropped": kinds.count("dropped"),
        "oldest_token": max(int(step - drawn.versions.min()) for step, drawn in answers), "bound": STALENESS,
        "wrong_weights": sum(bool((drawn.tokens != drawn.versions).any()) for _, drawn in answers),
        "spoilt": sum(name.startswith("spoilt") for name in os.listdir(graves)),
        "spoilt_told": sum("its images came as" in note.get("error", "") for note in notes),
        "spoilt_graded": len(wrong), "overlap": round(overlap, 3), "seconds": round(seconds, 1),
    }  # fmt: skip
    for workers in (writers, judges, places):
        workers.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kills", type=float, default=0.1, help="share of requests that kill their process")
    parser.add_argument("--out")
    options = parser.parse_args()
    import tempfile

    import ray

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([root, os.path.dirname(os.path.abspath(__file__))])
    ray.init("local", num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}})  # fmt: skip
    log("the cluster is up")
    with tempfile.TemporaryDirectory() as graves:
        found = asyncio.run(work(options.steps, options.kills, graves))
    ray.shutdown()
    emit({"benchmark": "rl_ray", **found, "environment": environment()}, options.out)
    whole = found["spoilt"] >= found["spoilt_told"] > 0 == found["spoilt_graded"]
    whole &= found["twice"] == found["never"] == found["wrong_weights"] == 0 and found["oldest_token"] <= STALENESS
    return 0 if whole and found["steps"] == options.steps and all(found["processes_died"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

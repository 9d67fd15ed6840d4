"""Environments in other processes: the same episodes as here, and images that are changed on the way are noticed; and
processes that take the place of others.

What passes between processes passes through pickle, in one process. Not covered: processes, and Ray (benchmarks/
rl_ray.py, tests/train/test_rl_ray.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import threading

import numpy as np
import pytest
from PIL import Image, ImageOps

from glmv_jax.rl import integrity
from glmv_jax.rl.arena import Arena
from glmv_jax.rl.gym import Observation, asked
from glmv_jax.rl.pipeline import Completion, Drawn, Prompt, Request, Settings
from glmv_jax.rl.pipeline.episodes import EpisodeEngine
from glmv_jax.rl.pipeline.remote_environment import Environments, RemoteEnvironment
from glmv_jax.rl.pipeline.remote_rollout import RemoteEngine
from glmv_jax.rl.pipeline.workers import Workers
from tests.rl import ray_stand_in
from tests.rl import test_pipeline_episodes as local
from tests.rl.test_pipeline_episodes import FORM, GROUP, LIMITS, LONGEST, Run, Talk, alone


def carried(x):
    return pickle.loads(pickle.dumps(x))


class Wire:
    """Of `Workers` what environments need, with one worker.   spoil: what is done to an observation on the way."""

    def __init__(self, role: Environments) -> None:
        self.role, self.spoil = role, lambda observation: observation

    def least_busy(self) -> int:
        return 0

    async def call_once(self, at: int, method: str, *args):
        assert at == 0
        function = getattr(self.role, method)
        got = function(*carried(args)) if method != "step" else await function(*carried(args))
        got = carried(got)
        if method == "reset":
            return got[0], self.spoil(got[1])
        return got if got is None else dataclasses.replace(got, observation=self.spoil(got.observation))


class World(local.World):
    """That of the episodes here, with its environments behind a wire."""

    def __init__(self):
        super().__init__()
        self.wire = Wire(Environments(lambda source: Talk(self)))
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        self.loop = loop
        self.arena = Arena(lambda name: RemoteEnvironment(self.wire, "talk", loop), 8)
        self.engine = EpisodeEngine(self.arena, self.ask, FORM, LIMITS, LONGEST)

    def close(self):
        super().close()
        asyncio.run_coroutine_threadsafe(self._closed(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def _closed(self):
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})


def trained(world: World, steps: int):
    run = Run(world, Settings(2, GROUP, staleness=1))
    try:
        return [record for taken in run.steps(*range(steps)) for record in taken.batch], run
    finally:
        run.data.close()


def test_episodes_elsewhere_are_those_of_here():
    world = World()
    records, run = trained(world, 3)
    assert len(records) == 3 * 2 * GROUP and not run.events("failed")
    for group in (records[i : i + GROUP] for i in range(0, len(records), GROUP)):
        seed = int(group[0].id.rpartition("/")[2])
        wanted = alone(Prompt(seed, {"environment": "talk", "seed": seed}, "talk"))
        assert [(r.answer.tolist(), r.image_hash) for r in group] == wanted
    assert world.resets > len(world.wire.role._open) and not world.arena.gone, "one environment plays many episodes"


def lighter(observation: Observation) -> Observation:
    """One pixel of the last image is another."""
    image = observation.images[-1].copy()
    image.putpixel((3, 5), tuple(255 - x for x in image.getpixel((3, 5))))
    return dataclasses.replace(observation, images=(*observation.images[:-1], image))


def mirrored(observation: Observation) -> Observation:
    return dataclasses.replace(observation, images=tuple(map(ImageOps.mirror, observation.images)))


@pytest.mark.parametrize("fault", [lighter, mirrored])
def test_an_image_that_is_spoilt_on_the_way_is_told_and_not_trained_on(fault):
    world, spoilt = World(), []

    def spoil(observation: Observation) -> Observation:
        if observation.images and len(spoilt) < 3:
            spoilt.append(observation)
            return fault(observation)
        return observation

    world.wire.spoil = spoil
    records, run = trained(world, 3)
    told = [row["error"] for row in run.events("failed")]
    assert len(told) == len(spoilt) == 3 and world.arena.gone["talk"] == 3
    assert all("its images came as" in error and "see to what carries them" in error for error in told)
    assert len(records) == 3 * 2 * GROUP, "others were played in their place"
    for record in records:
        seed = int(record.id.rpartition("/")[2])
        wanted = alone(Prompt(seed, {"environment": "talk", "seed": seed}, "talk"))
        assert (record.answer.tolist(), record.image_hash) in wanted


def test_a_seal_is_of_pixels_order_and_number():
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    sealed = carried(integrity.sealed(asked("Look.", pictures)))
    integrity.check_sealed(sealed)
    integrity.check_sealed(asked("Look.", pictures))  # was made here
    changes = [
        (pictures[1], pictures[0]),
        (pictures[0],),
        (),
        (*pictures, pictures[0]),
        (pictures[0].resize((4, 16)), pictures[1]),
    ]
    for images in changes:
        spoilt = dataclasses.replace(sealed, images=images)
        with pytest.raises(ValueError, match="its images came as"):
            integrity.check_sealed(spoilt)


def test_what_a_process_held_is_gone_with_it():
    """Another process does not take the one's episodes for its own."""
    first, second = (Environments(lambda source: Talk(local.World())) for _ in range(2))
    name, _ = first.reset("talk", 0)
    other, _ = second.reset("talk", 1)
    with pytest.raises(LookupError, match="is gone"):
        asyncio.run(second.step(name, None))
    second.close(name)
    assert list(second._open) == [other] and second.reset("talk", 2, other)[0] == other


class Told:
    """A role that knows what it was told; from the third on it takes it in only when the gate is open."""

    made, gate = 0, threading.Event()

    def __init__(self):
        Told.made += 1
        self.number, self.values = Told.made, []

    def tell(self, value):
        if self.number > 2:
            assert Told.gate.wait(30)
        if value == "no":
            raise ValueError("not that")
        self.values.append(value)

    async def say(self):
        return self.number, list(self.values)


@pytest.fixture
def told(monkeypatch):
    Told.made, Told.gate = 0, threading.Event()
    world = ray_stand_in.installed(monkeypatch)
    return world, Workers(Told, 2, name="Told")


def test_nobody_waits_for_a_process_that_takes_the_place_of_another(told):
    world, workers = told

    async def work():
        await workers.tell("tell", 1)
        world.deaths = {("Told", "say"): [1]}
        assert await workers.call("say") == (2, [1]), "by the one that is left"
        assert (workers.lost, workers.again) == (1, 1) and not workers.ready(0)
        while world.calls["Told", "tell"] < 3:  # it is being told what was so
            await asyncio.sleep(0.01)
        await workers.tell("tell", 2)
        assert [await workers.call("say") for _ in range(3)] == [(2, [1, 2])] * 3
        waits = asyncio.ensure_future(workers.call_once(0, "say"))
        await asyncio.sleep(0.1)
        assert not waits.done()
        Told.gate.set()
        number, values = await waits
        assert number == 3 and values[-1] == 2 and workers.ready(0)

    asyncio.run(work())
    workers.close()


def test_what_a_new_process_cannot_be_told_is_heard(told):
    world, workers = told
    Told.gate.set()

    async def work():
        await workers.tell("tell", 1)
        workers._told["tell"] = ("no",)
        world.deaths = {("Told", "say"): [1]}
        assert (await workers.call("say"))[0] == 2
        with pytest.raises(ValueError, match="not that"):
            await workers.call_once(0, "say")
        with pytest.raises(ValueError, match="not that"):
            await workers.tell("tell", 3)

    asyncio.run(work())
    workers.close()


def test_a_request_that_waits_for_a_new_process_is_stopped_at_once(told):
    world, workers = told
    prefix = Drawn(np.arange(3, dtype=np.int32), np.zeros(3, np.float32), np.zeros(3, np.int32))
    done: list[Completion] = []

    async def work():
        engine = RemoteEngine(workers)
        world.deaths = {("Told", "tell"): [1, 2]}
        await workers.tell("tell", 1)
        engine.submit(Request(7, Prompt(0, 0, "any"), 0, prefix=prefix), done.append)
        await asyncio.sleep(0.1)
        assert not done and not workers.ready(0) and not workers.ready(1)
        engine.abort(7)
        await asyncio.sleep(0.1)
        assert [completion.reason for completion in done] == ["aborted"] and done[0].drawn is prefix
        Told.gate.set()

    asyncio.run(work())
    workers.close()

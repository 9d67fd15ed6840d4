"""Stage 5 whose roles are in processes of their own, as Ray actors on any number of machines (cfg.rollout.workers).

A process makes its role from the run's config, by the classes that do the work in the run's own process where a role
has none: engines draw, reward systems grade and environments are played as they are there. What is asked for, what is
old and what makes a batch is known here alone, so it is saved and goes on as it does without processes.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict

from glmv_jax.rl.pipeline.remote_environment import Environments, RemoteEnvironment
from glmv_jax.rl.pipeline.remote_reward import Graders, RemoteGrader
from glmv_jax.rl.pipeline.remote_rollout import Engines, RemoteEngine, RemoteTurns
from glmv_jax.rl.pipeline.workers import Workers, imported
from glmv_jax.train.stages import rl_episodes
from glmv_jax.typing import Params, UserError

if TYPE_CHECKING:
    from glmv_jax.rl.gym import Environment
    from glmv_jax.train.stages.rl import RL

log = logging.getLogger(__name__)

ROLES = ("rollout", "reward", "environment")


class Roles:
    """Of one stage. counts: processes by role, 0: it is done here.   loop: that they are used in; set it.
    UserError for settings that do not go together."""

    def __init__(self, stage: RL) -> None:
        self._stage, self._settings = stage, stage.cfg.rollout.get("workers", {})
        self.counts = {role: self._settings.get(role, 0) for role in ROLES}
        self.loop: asyncio.AbstractEventLoop | None = None
        self.workers: dict[str, Workers] = {}
        self._started = False  # a cluster for this run alone
        self._parts: list[RemoteEngine | RemoteTurns] = []
        if any(self.counts.values()):
            self._check()

    def _check(self) -> None:
        r, counts = self._stage.cfg.rollout, self.counts
        if min(counts.values()) < 0:
            raise UserError(f"rollout.workers of {counts}: numbers of processes, 0 for a role that is done here")
        if r.get("pipeline", "sync") != "async":
            raise UserError("rollout.workers are of rollout.pipeline=async; set that, or rollout.workers.rollout, "
                            ".reward and .environment to 0")  # fmt: skip
        if counts["rollout"] and r.get("engine", ""):
            raise UserError("rollout.engine and rollout.workers.rollout both draw the answers; leave one of them out")
        if counts["environment"] and not r.get("environments", ()):
            raise UserError("rollout.workers.environment: the run has no rollout.environments; set it to 0")
        if jax.process_count() > 1:
            raise UserError("rollout.workers are of runs that train in one process; set them to 0")
        imported()  # said before the step is compiled

    # --- their processes ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Starts them, where there are to be any. UserError where there is no Ray, or none that has what they need."""
        if not any(self.counts.values()):
            return
        roles = [role for role, count in self.counts.items() if count]
        needs = {role: options(self._settings.needs[role], role == "rollout") for role in roles}
        self._join(needs)
        try:
            for role, need in needs.items():
                self.workers[role] = Workers(self._maker(role), self.counts[role], needs=need, name=role.title())
            for role, workers in self.workers.items():
                log.info("%s workers are up: processes %s", role, workers.wait())
        except BaseException:
            self.close()
            raise

    def _join(self, needs: Mapping[str, Mapping[str, Any]]) -> None:
        ray, address = imported(), self._settings.ray
        total = _total((self.counts[role], need) for role, need in needs.items())
        if not ray.is_initialized():
            quiet = {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, math.ceil(total["CPU"]))}
            if not address:
                _check_devices(needs)
            try:
                with warnings.catch_warnings():  # JAX warns of a fork, which Ray only starts programs by
                    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
                    ray.init(address or "local", **({} if address else quiet))
            except ConnectionError as error:
                raise UserError(f"rollout.workers.ray={address!r}: there is no cluster ({error}); start one by "
                                "`ray start --head`, or leave it empty for one of this run") from error  # fmt: skip
            self._started = not address
        there = ray.cluster_resources()
        if lacking := {name: count for name, count in total.items() if count > there.get(name, 0.0)}:
            text = ", ".join(f"{name} {there.get(name, 0.0):g} of {count:g}" for name, count in lacking.items())
            if not address:
                self.close()
                raise UserError(f"rollout.workers need more than there is here: {text}; lower rollout.workers.needs, "
                                "or join a cluster by rollout.workers.ray")  # fmt: skip
            log.warning("rollout.workers need more than the cluster has now: %s; waiting for it", text)

    def _maker(self, role: str) -> Callable[[], Any]:
        config = self._stage.cfg.to_dict()
        if role == "environment":
            return functools.partial(_environments, config["rollout"]["environments"], self._stage.data_seed)
        return functools.partial({"rollout": _engines, "reward": _graders}[role], config, self.counts[role])

    def metrics(self) -> dict[str, float]:
        """Since they were started: processes that died, and work that was done again."""
        return {
            f"workers/{what}/{role}": float(count)
            for role, workers in self.workers.items()
            for what, count in (("lost", workers.lost), ("again", workers.again))
        }

    def close(self) -> None:
        """Ends the processes, and the cluster if it was started for them."""
        for part in self._parts:
            part.close()
        self._parts.clear()
        for workers in self.workers.values():
            workers.close()
        self.workers.clear()
        if self._started:
            self._started = False
            imported().shutdown()

    # --- what the pipeline has of them --------------------------------------------------------------------------------

    def engines(self) -> tuple[RemoteEngine | None, RemoteTurns | None]:
        """What draws answers and turns of episodes; None: it is done here."""
        if "rollout" not in self.workers:
            return None, None
        found = RemoteEngine(self.workers["rollout"]), RemoteTurns(self.workers["rollout"])
        self._parts += found
        return found

    def grader(self) -> RemoteGrader | None:
        """What grades; None: it is done here."""
        if "reward" not in self.workers:
            return None
        return RemoteGrader(self.workers["reward"], self._stage.grading.together, self._stage.cfg.rollout.group)

    def environment(self, name: str, source: str) -> Environment | None:
        """One of that name; None: it is made here."""
        if "environment" not in self.workers:
            return None
        assert self.loop is not None
        return RemoteEnvironment(self.workers["environment"], source, self.loop, name)


def options(needs: Mapping[str, Any], computes: bool) -> dict[str, Any]:
    """Of an actor, of one entry of cfg.rollout.workers.needs. JAX finds no device where it reserves none.
    computes: whether it is to find any at all."""
    given = {"num_cpus": needs["num_cpus"], "num_gpus": needs["num_gpus"], "resources": dict(needs["resources"])}
    if not computes or not given["num_gpus"] and not given["resources"]:
        given["runtime_env"] = {"env_vars": {"JAX_PLATFORMS": "cpu"}}
    return given


def _total(of: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, float]:
    """By resource, of (count, options of one)."""
    total = {"CPU": 0.0, "GPU": 0.0}
    for count, one in of:
        for name, each in {"CPU": one["num_cpus"], "GPU": one["num_gpus"], **one["resources"]}.items():
            total[name] = total.get(name, 0.0) + count * each
    return total


def _check_devices(needs: Mapping[str, Mapping[str, Any]]) -> None:
    """UserError where a cluster of this machine would give away devices that the trainer has."""
    here = jax.default_backend()
    if here != "cpu" and any(one["num_gpus"] or one["resources"].get("TPU") for one in needs.values()):
        raise UserError(
            f"rollout.workers.ray='' starts Ray on this machine, whose {here} devices the trainer has all; start it "
            "over others and join it: CUDA_VISIBLE_DEVICES=2,3 ray start --head, then CUDA_VISIBLE_DEVICES=0,1 "
            "glmv train ... --config.rollout.workers.ray=auto"
        )


# --- in those processes -----------------------------------------------------------------------------------------------


def _stage(config: Mapping[str, Any]) -> RL:
    """The run's, without what it writes and trains."""
    main, rl = (importlib.import_module(f"glmv_jax.train.{name}") for name in ("main", "stages.rl"))
    cfg = ConfigDict(config)
    cfg.faults, cfg.rollout.workers = "", {}
    main.keep_compiled_programs(cfg.get("compilation_cache", ""))
    return rl.RL(cfg)


def _engines(config: Mapping[str, Any], count: int) -> Engines:
    stage = _stage(config)
    rows, (mesh, rules) = stage.beside.rows(), stage.place()
    shapes = jax.eval_shape(stage.init_params, jax.random.key(0))
    shardings = rules.shardings(mesh, stage.logical_axes(), shapes)
    place: Callable[[Params], Params] = lambda params: jax.device_put(params, shardings)  # noqa: E731
    if stage.episodes:
        return Engines(stage.episodes.questioned(rows), place, stage.episodes.players.ask)
    return Engines(stage.beside.engine(rows, count), place)


def _graders(config: Mapping[str, Any], count: int) -> Graders:
    del count
    stage = _stage(config)
    rows, grading = stage.beside.rows(), stage.grading
    grading.open()
    return Graders(grading.alone(rows), grading.of_group(rows), grading.counters, grading.close)


def _environments(environments: Sequence[Sequence[Any]], seed: int) -> Environments:
    return Environments(rl_episodes.maker(environments, seed))

"""Stage 5 whose answers a server draws: cfg.rollout.engine is its URL, cfg.rollout.weights where it finds the weights.

The server and the run see the folder under one path. A model of our own is served by `glmv serve` alone; one that began
from a public checkpoint by any of `rl.pipeline.dialects`.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from glmv_jax.train import handover
from glmv_jax.typing import UserError

if TYPE_CHECKING:
    from glmv_jax.rl.pipeline.local import Rows
    from glmv_jax.rl.pipeline.served import ServedEngine
    from glmv_jax.train.stages.rl import RL

KEY = "GLMV_API_KEY"


def check(cfg: Any) -> None:
    """Raises UserError for settings that do not go with a server."""
    r = cfg.rollout
    if not r.get("engine", ""):
        return
    if r.get("pipeline", "sync") != "async":
        raise UserError("rollout.engine is of rollout.pipeline=async; set that, or leave rollout.engine empty")
    if r.get("environments", ()):
        raise UserError("rollout.engine answers questions, not episodes; leave rollout.environments or it empty")
    if jax.process_count() > 1:
        raise UserError("rollout.engine is of runs of one process, which can write all weights; leave it empty")


def engine(stage: RL, rows: Rows | Any) -> ServedEngine:
    """The server as rollout engine. UserError where there is no folder for weights."""
    from glmv_jax.rl.pipeline.served import ServedEngine
    from glmv_jax.rl.pipeline.wire import Wire

    cfg, r = stage.cfg, stage.cfg.rollout
    if not r.get("weights", "") and stage.samples.run is None:
        raise UserError("rollout.weights is not given, and this run has no folder; name one that the server sees")
    wire = Wire(r.engine, os.environ.get(KEY, ""), connections=r.get("slots", 0) or 256)
    return ServedEngine(
        wire, rows, stage.sampler.sampling, stage.asker.max_tokens + r.max_new_tokens, cfg.seed, stage.tokenizer,
        write=functools.partial(handover.write, checkpoint=cfg.model.get("checkpoint", "")),
        folder=Path(r.get("weights", "") or stage.samples.run / "weights"), patch=stage.asker.patcher.patch,
    )  # fmt: skip

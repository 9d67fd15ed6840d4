"""Whether and how a stage's images are encoded in rows of the encoder's own (`data.encoding`, `parallel.dispatch`).

`data.dispatch` of the config: rows, the encoder's rows of a batch over all processes, as cfg.batch counts those of text
(0: images stay in the rows of their text); patches, of one of them. rows x patches is what the devices have room for,
the share of each the same: what a batch needs on average and a little more, where `data.patches` has to be what a row
needs at most. Documents whose images find no room wait for the next batch.

It is off unless asked for, as rows depend on the batch and the mesh. On the trace of benchmarks/vision_balance.py
(size=l, 64 rows of 8,192 tokens and up to 16,384 patches, data.fit=balanced) 104 rows of 4,096 patches hold what comes
with .989 of the tokens, and are .95 full. By `model.flops` the encoder then computes a fifth of what it does in rows of
16,384, and .80 of what it would in rows that are just long enough (6,816); patches take .41 of the memory, and .98.
"""

from __future__ import annotations

import jax
import numpy as np
from ml_collections import ConfigDict

from glmv_jax.data.encoding import Encoder
from glmv_jax.data.partition import GROUP
from glmv_jax.parallel import dispatch, mesh
from glmv_jax.train.stages.base import Stage
from glmv_jax.typing import UserError


def size(cfg: ConfigDict) -> tuple[int, int]:
    """(rows, patches) of the encoder in this process; (0, 0) where images stay with their text.

    Raises: UserError for what does not go with it.
    """
    wanted = cfg.data.get("dispatch", {})
    if not wanted.get("rows", 0):
        return 0, 0
    for key, value, allowed in (
        ("accumulate", cfg.get("accumulate", 1), 1), ("data.slices", cfg.data.get("slices", 1), 1),
        ("pipeline.ends", cfg.get("pipeline", {}).get("ends", "rows"), "rows"),
        ("model.patches_at_once", cfg.get("model", {}).get("patches_at_once", 0), 0),
    ):  # fmt: skip
        if value != allowed:
            raise UserError(f"data.dispatch.rows={wanted.rows} does not go with {key}={value}; set {key}={allowed}, or "
                            "data.dispatch.rows=0")  # fmt: skip
    largest = max(cfg.data.image_patches, cfg.data.film_patches if cfg.data.get("video", False) else 0)
    if largest > wanted.patches:
        raise UserError(f"data.dispatch.patches={wanted.patches}, but an image may have {largest}; raise it to that")
    n = jax.process_count()
    if wanted.rows % n:
        raise UserError(f"data.dispatch.rows={wanted.rows} does not divide over {n} processes; try "
                        f"{-(-wanted.rows // n) * n}")  # fmt: skip
    return Encoder(wanted.rows // n, wanted.patches).rows, wanted.patches


def encoder(stage: Stage, patches: int) -> Encoder | None:
    """What the loader of this process has to know; patches: of a row of text at most. UserError as `size`."""
    rows, length = size(stage.cfg)
    if not rows:
        return None
    where, _ = stage.place()
    n = jax.process_count()
    ranks = mesh.data_shards(where)
    if ranks % n or where.size % n:
        raise UserError(f"data.dispatch: {ranks} shards of rows do not divide over {n} processes; use another mesh, or "
                        "data.dispatch.rows=0")  # fmt: skip
    mesh.check_batch(stage.cfg.batch, where)
    places = dispatch.places(where, stage.cfg.batch, patches // GROUP)
    return Encoder(rows, length, where.size // n, ranks // n, places)


def shapes(cfg: ConfigDict, channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Of the arrays of a batch that are about images, where they are in rows of the encoder's own; else none."""
    rows, length = size(cfg)
    made = {
        "patches": ((length, channels), np.uint8), "yx": ((length, 2), np.int32), "frame": ((length,), np.int32),
        "sent": ((length // GROUP,), np.int32),
    }  # fmt: skip
    return {name: jax.ShapeDtypeStruct((rows, *rest), dtype) for name, (rest, dtype) in made.items() if rows}

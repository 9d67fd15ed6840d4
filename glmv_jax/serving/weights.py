"""New weights for a server that answers: from a folder in which a trainer writes them, while answers go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glmv_jax.inference.front import Front
from glmv_jax.serving import fields
from glmv_jax.serving.limits import Refused
from glmv_jax.typing import Params


class Weights:
    """folder: weights are taken from folders in it, and from nowhere else.   load: the parameters in one; UserError for
    what is none of this model."""

    def __init__(self, folder: str | Path, load: Callable[[Path], Params]) -> None:
        self._folder, self._load = Path(folder).resolve(), load
        self._one = asyncio.Lock()  # at a time

    async def take(self, front: Front, body: Mapping[str, Any]) -> dict[str, Any]:
        """A body with `folder` and `version` (the number that tokens drawn from then on say): has the engine take them.
        Rows that run go on. Raises Refused."""
        version = fields.need(body, "version", int)
        if not 0 <= version < 1 << 31:
            raise Refused(f"version={version} is out of range; count updates from 0", field="version")
        folder = Path(fields.need(body, "folder", str))
        try:
            found = (self._folder / folder).resolve(strict=True)
        except (OSError, ValueError):
            found = None
        if found is None or self._folder not in found.parents or not found.is_dir():
            raise Refused(f"folder={str(folder)!r:.200} is no folder in {self._folder}; write weights there, or serve "
                          "with another --weights", 403, field="folder")  # fmt: skip
        async with self._one:
            params = await asyncio.to_thread(self._load, found)
            await asyncio.wrap_future(front.set_params(params, version))
        return {"version": version}

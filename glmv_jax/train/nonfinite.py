"""Steps whose loss or gradient was not finite: their batches, kept to be looked at."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glmv_jax.train.disk import disk_errors
from glmv_jax.trees import flatten

KEPT = 8  # batches of a run: the first ones tell most, and a run that goes on like that must not fill the disk
NAMED = 5


class Suspects:
    """Batches of the steps under way, and in `folder` those of steps that were skipped, as <step>.npz.

    A step is known to have been skipped when the next one has been started, hence two are held. Of several processes
    each keeps its own rows. say: gets a line for each batch that is kept.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        self._held: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def started(self, step: int, batch: Any) -> None:
        """Step `step` is under way with this batch, arrays of this process."""
        self._held[step] = batch
        while len(self._held) > 2:
            self._held.popitem(last=False)

    def keep(self, step: int) -> None:
        """Step `step` was skipped."""
        path = self.folder / (f"{step}.npz" if jax.process_count() == 1 else f"{step}-{jax.process_index()}.npz")
        kept = "its batch is not kept, there are enough"
        with disk_errors(path):
            self.folder.mkdir(exist_ok=True)
            if len(list(self.folder.glob("*.npz"))) < KEPT * jax.process_count():
                arrays: dict[str, Any] = {name: np.asarray(x) for name, x in flatten(self._held[step]).items()}
                np.savez(path, **arrays)
                kept = f"its batch is in {path}"
        self._say(f"step {step}: the loss or the gradient is not finite, the update is left out; {kept}")


def words(names: list[str]) -> str:
    """The first of the names that `TrainStep.nonfinite` finds."""
    if not names:
        return "everything is finite when it is computed again"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"first not finite: {', '.join(names[:NAMED])}{more}"

"""Features of any number of images or texts from a model that is split over devices and hosts.

Every call of the compiled function has the same shapes: the last batch is filled up and the surplus left out, so a
data set of any size compiles once. Each host makes the rows of its own share; the features come back to all of them.
A picture that cannot be read is data: counted, logged with its id, and left out of the result.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glmv_jax.data.faults import BUGS, FaultLog
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.typing import Batch, Params, UserError

Features = dict[str, np.ndarray]
_SAY_AFTER = 10.0  # seconds between lines of progress


@dataclasses.dataclass(frozen=True)
class Embedded:
    """features: [N, E] float32 by name, of the N items that could be read.   kept: [N] their numbers, in order.
    faults: how many could not.   seconds: how long it took."""

    features: Features
    kept: np.ndarray
    faults: int
    seconds: float


class Embedder:
    """`embedder(params, items)`: features of items 0, 1, 2, ..., on every host.

    Args:
      apply: (params, batch of rows) -> features [B, E] by name; compiled once.
      row: item -> one row, as a dict of arrays that always have the same shapes.
      blank: a row to fill batches up with.
      batch: rows at a time over all hosts; rounded up to what divides over the data axes and the hosts.
      threads: that make rows while the devices work (decoding and resizing let Python go on); 0: one a core.
    """

    def __init__(
        self, apply: Callable[[Params, Batch], dict[str, jax.Array]], row: Callable[[Any], Batch], blank: Batch,
        mesh: Mesh, rules: rules_lib.Rules, batch: int = 256, threads: int = 0,
    ) -> None:  # fmt: skip
        self.row, self.blank, self.mesh, self.rules = row, blank, mesh, rules
        self.threads = threads or os.cpu_count() or 1
        self.hosts = len({d.process_index for d in mesh.devices.flat})
        unit = int(np.lcm(mesh_lib.data_shards(mesh), self.hosts))
        self.batch = -(-max(1, batch) // unit) * unit
        self.traces = 0

        def step(params: Params, rows: Batch) -> Batch:
            self.traces += 1
            return apply(params, rows["items"]) | {"number": rows["number"]}

        self._step = jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._sharding = rules_lib.batch_sharding(mesh)

    def __call__(
        self, params: Params, items: Sequence[Any], name: str = "items", ids: Sequence[str] | None = None,
        log: FaultLog | None = None,
    ) -> Embedded:  # fmt: skip
        """Features of all items that `row` can read; faults go to `log` under `name`, with their ids.

        Raises: UserError when there are no items, none of them can be read, or a feature is not finite.
        """
        if not len(items):
            raise UserError(f"{name}: nothing to embed")
        began = said = time.monotonic()
        features: Features = {}
        seen = np.zeros(len(items), bool)
        pending: Any = None
        read = functools.partial(self._read, items, name, ids, log or FaultLog())
        for done, rows in enumerate(self._batches(len(items), read)):
            with rules_lib.use(self.mesh, self.rules):
                out = self._step(params, rows)
            if pending is not None:  # fetched one behind, so that the devices always have work
                _put(features, seen, pending)
            pending = out
            if time.monotonic() - said > _SAY_AFTER:
                said = _say(name, done * self.batch, len(items), began)
        _put(features, seen, pending)
        kept = np.flatnonzero(seen)
        if not len(kept):
            raise UserError(f"{name}: none of {len(items)} items can be read; look at the reasons above")
        found = {key: value[kept] for key, value in features.items()}
        if not all(np.isfinite(value).all() for value in found.values()):  # nan would win every comparison of ranks
            raise UserError(f"{name}: features are not finite; the weights are broken, take an earlier checkpoint")
        return Embedded(found, kept, len(items) - len(kept), time.monotonic() - began)

    def _batches(self, count: int, read: Callable[[int], Batch | None]) -> Iterator[Batch]:
        """Placed batches, as many on every host; a row that is no item of its share has the number -1."""
        share = self.batch // self.hosts
        mine = range(jax.process_index() if self.hosts > 1 else 0, count, self.hosts)
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:

            def ask(n: int) -> list[tuple[int, concurrent.futures.Future]]:
                return [(i, pool.submit(read, i)) for i in mine[n * share : (n + 1) * share]]

            waiting = ask(0)
            for n in range(-(-count // self.batch)):
                now, waiting = waiting, ask(n + 1)
                rows = [(i, future.result()) for i, future in now]
                yield self._placed([(i, row) for i, row in rows if row is not None], share)

    def _read(self, items: Sequence[Any], name: str, ids: Sequence[str] | None, log: FaultLog, i: int) -> Batch | None:
        try:
            return self.row(items[i])
        except BUGS:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a broken picture raises, and it is logged
            log.add(name, ids[i] if ids is not None else f"{name}/{i}", f"{type(error).__name__}: {error}", i)
            return None

    def _placed(self, read: list[tuple[int, Batch]], share: int) -> Batch:
        rows = [row for _, row in read] + [self.blank] * (share - len(read))
        number = np.full(share, -1, np.int32)
        number[: len(read)] = [i for i, _ in read]
        batch = {"items": jax.tree.map(lambda *x: np.stack(x), *rows), "number": number}
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._sharding, x), batch)


def _put(features: Features, seen: np.ndarray, out: Batch) -> None:
    """Writes a batch's features at their items' places."""
    out = {key: np.asarray(value) for key, value in out.items()}
    number = out.pop("number")
    for key, value in out.items():
        if key not in features:
            features[key] = np.zeros((len(seen), *value.shape[1:]), np.float32)
        features[key][number[number >= 0]] = value[number >= 0]
    seen[number[number >= 0]] = True


def _say(name: str, done: int, total: int, began: float) -> float:
    """A line of progress with the time that is left, on standard error; returns the time."""
    spent = time.monotonic() - began
    if not jax.process_index():
        left = spent / max(1, done) * (total - done)
        rate = f"{done / spent:.1f}/s"
        print(f"{name}: {done}/{total}  {rate}  eta {left:.0f} s", file=sys.stderr, flush=True)
    return time.monotonic()

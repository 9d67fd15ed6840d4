"""Policies beside the one that is trained, in the host's memory: a reference for a divergence, teachers by data source.

Each is parked: its weights lie in `pinned_host` memory, split over the devices' hosts as the trained ones are over the
devices. They are brought to the devices for one forward pass over the batches of a step and deleted there after it, so
that between passes a device holds nothing of them. The copies are started before they are needed (`prefetch`, which
does not wait), while rewards are still being computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from glmv_jax.config import nearest
from glmv_jax.parallel.remat import HOST
from glmv_jax.train import checkpoint, weights
from glmv_jax.trees import flatten, put_like, replaced
from glmv_jax.typing import Params, UserError

INITIAL = "init_from"
EVERY = "*"


class Parked:
    """Weights in the host's memory that come to the devices when asked."""

    def __init__(self, params: Params) -> None:
        """params: in `pinned_host` memory (`on_host`)."""
        self._parked = params
        self._where = jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), params)
        self._here: Params | Any = None  # None while they are parked

    @classmethod
    def of_run(cls, run: str | Path, shapes: Params, shardings: Any) -> Parked:
        """Of a finished run's evaluated weights, an array at a time. UserError when they are of another model."""
        _check_memory(shardings)
        arrays, like = weights.opened(run), on_host(shapes, shardings)
        checkpoint.taken(run, dict(arrays), (), like)
        here = flatten(like)
        return cls(replaced(like, {path: put_like(array[()], here[path]) for path, array in arrays.items()}))

    @property
    def is_here(self) -> bool:
        """Whether the devices hold the weights, or copies to them are under way."""
        return self._here is not None

    def prefetch(self) -> None:
        """Starts the copies to the devices, and returns at once; nothing where that has been done."""
        if self._here is None:
            self._here = jax.device_put(self._parked, self._where)

    @contextlib.contextmanager
    def here(self) -> Iterator[Params]:
        """The weights on the devices, which are deleted there at the end: what was computed with them has to be waited
        for inside, or be under way."""
        self.prefetch()
        try:
            yield self._here
        finally:
            for x in jax.tree.leaves(self._here):
                x.delete()
            self._here = None


def on_host(shapes: Params, shardings: Any) -> Params:
    """jax.ShapeDtypeStruct of parameters as they are parked."""
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s.with_memory_kind(HOST))  # noqa: E731
    return jax.tree.map(put, shapes, shardings)


def _check_memory(shardings: Any) -> None:
    """UserError where devices have no way to such memory."""
    device = next(iter(jax.tree.leaves(shardings)[0].device_set))
    if HOST not in (kinds := [memory.kind for memory in device.addressable_memories()]):
        raise UserError(
            f"reference: {device.device_kind} has no memory of the kind {HOST} ({', '.join(kinds)}) to park a policy "
            "in; train without reference.policy and reference.teachers"
        )


@dataclasses.dataclass(frozen=True)
class Role:
    """What a policy is asked for: kl: as the reference; sources: as the teacher of these, by their place in the list of
    source names."""

    kl: bool
    sources: tuple[int, ...]


def roles(cfg: ConfigDict, names: Sequence[str]) -> dict[str, Role]:
    """The runs that cfg.reference names, {} for none.

    policy: a run's folder, or "init_from" for the weights that this run begins with; "" for none. teachers: pairs
    (source, folder), the source "*" for all that no other pair names.

    Raises: UserError for a source that is not there, and one without a teacher where others have one.
    """
    group = cfg.get("reference", {})
    policy = _folder(cfg, group.get("policy", ""))
    teacher_of = _teachers(cfg, dict(group.get("teachers", ())), names)
    runs = dict.fromkeys([*([policy] if policy else []), *teacher_of.values()])
    chosen = lambda run: tuple(i for i, name in enumerate(names) if teacher_of.get(name) == run)  # noqa: E731
    return {run: Role(run == policy, chosen(run)) for run in runs}


def _teachers(cfg: ConfigDict, given: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    for name in given:
        if name not in (EVERY, *names):
            raise UserError(f"reference.teachers: no source {name!r} is trained on{nearest(name, names)}")
    found = {name: _folder(cfg, given.get(name, given.get(EVERY, ""))) for name in names}
    if given and (without := [name for name, run in found.items() if not run]):
        raise UserError(f"reference.teachers: {without[0]} has no teacher; name one, or one for '{EVERY}'")
    return found if given else {}


def _folder(cfg: ConfigDict, run: str) -> str:
    if run != INITIAL:
        return run
    if not cfg.get("init_from", ""):
        raise UserError(f"reference: {INITIAL} means the run that this one begins from, and init_from is not set")
    return cfg.init_from

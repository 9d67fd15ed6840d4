"""One declarative table a model family: our parameter paths, Hugging Face's tensor names, and the transform between.

`to_params` and `to_tensors` read the same table, so the two directions cannot drift apart. A layer number is written
"{i}" in their name, an expert's "{e}"; ours are stacked on leading dimensions, layers before experts. Every tensor must
be accounted for, both ways.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glmv_jax.typing import Params, UserError

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """load: their tensor -> our arrays; save: our arrays -> their tensor."""

    load: Callable[[np.ndarray], Arrays]
    save: Callable[[Arrays], np.ndarray]


same = Transform(lambda t: (t,), lambda a: a[0])
matrix = Transform(lambda t: (t.T,), lambda a: a[0].T)  # torch Linear [O, I] <-> kernel [I, O]


def fused(parts: int, inner: Transform = matrix) -> Transform:
    """`parts` equal blocks of rows of one tensor are as many arrays of ours (qkv, gate_up)."""

    def load(tensor: np.ndarray) -> Arrays:
        return tuple(inner.load(block)[0] for block in np.split(tensor, parts))

    return Transform(load, lambda arrays: np.concatenate([inner.save((a,)) for a in arrays]))


def convolution(order: Sequence[int], kernel: Sequence[int]) -> Transform:
    """A strided convolution [O, C, *kernel] as a matrix over flattened inputs.

    order: permutation of (C, *kernel) that gives the order in which our input vector holds them; `kernel` their sizes.
    """
    axes = [1 + o for o in order] + [0]

    def save(arrays: Arrays) -> np.ndarray:
        matrix_IO = arrays[0]
        channels = matrix_IO.shape[0] // int(np.prod(kernel))
        sizes = (channels, *kernel)
        shaped = matrix_IO.reshape(*(sizes[o] for o in order), -1)
        return shaped.transpose(np.argsort(axes))

    return Transform(lambda t: (t.transpose(axes).reshape(-1, t.shape[0]),), save)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of theirs, or one a layer and expert, and the arrays of ours that it becomes.

    theirs: tensor name, "{i}" for the layer, "{e}" for the expert. ours: slash paths.
    layers: the numbers that "{i}" takes, in the order of our stack (n: range(n)), as range(3, 78) where the first
        layers are of another kind; None when there is no "{i}".
    experts: how many numbers "{e}" takes; None when there is no "{e}".
    """

    theirs: str
    ours: tuple[str, ...]
    transform: Transform
    layers: Sequence[int] | int | None = None
    experts: int | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading dimensions of our arrays that count layers and experts."""
        return tuple(len(numbers) for numbers in self._numbers())

    def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(place in our stack, their name) of every tensor."""
        keys = [key for key, given in (("i", self.layers), ("e", self.experts)) if given is not None]
        for chosen in itertools.product(*(enumerate(numbers) for numbers in self._numbers())):
            place = tuple(at for at, _ in chosen)
            yield place, self.theirs.format(**{key: number for key, (_, number) in zip(keys, chosen)})

    def _numbers(self) -> list[Sequence[int]]:
        given = [n for n in (self.layers, self.experts) if n is not None]
        return [range(n) if isinstance(n, int) else n for n in given]


def linear(theirs: str, ours: str, layers: Sequence[int] | int | None = None) -> list[Entry]:
    """A torch Linear with a bias."""
    return [
        Entry(theirs + ".weight", (ours + "/kernel",), matrix, layers),
        Entry(theirs + ".bias", (ours + "/bias",), same, layers),
    ]


def norm(theirs: str, ours: str, layers: Sequence[int] | int | None = None) -> list[Entry]:
    """A LayerNorm."""
    return [
        Entry(theirs + ".weight", (ours + "/scale",), same, layers),
        Entry(theirs + ".bias", (ours + "/bias",), same, layers),
    ]


def to_params(table: Sequence[Entry], tensors: Mapping[str, np.ndarray], ignore: Sequence[str] = ()) -> Params:
    """Our nested dict from their tensors.

    Raises UserError for a tensor that is missing, or that no entry and no name in `ignore` accounts for.
    """
    params: Params = {}
    used = set(ignore)
    for entry in table:
        names = [name for _, name in entry.names()]
        missing = [n for n in names if n not in tensors]
        if missing:
            raise UserError(f"checkpoint: tensor {missing[0]} is missing (and {len(missing) - 1} like it)")
        used.update(names)
        loaded = [entry.transform.load(np.asarray(tensors[n])) for n in names]
        for position, path in enumerate(entry.ours):
            arrays = [one[position] for one in loaded]
            whole = np.stack(arrays).reshape(*entry.stack, *arrays[0].shape) if entry.stack else arrays[0]
            _set(params, path, np.asarray(whole, order="C"))
    unknown = sorted(set(tensors) - used)
    if unknown:
        raise UserError(f"checkpoint: {len(unknown)} tensors have no place in this family, the first is {unknown[0]}")
    return params


def check_shapes(params: Params, like: Params) -> Params:
    """`params`; UserError when one has another shape than in `like` (arrays or their shapes), as when config.json is of
    another checkpoint."""
    want = flatten(like)
    for path, x in flatten(params).items():
        if tuple(x.shape) != tuple(want[path].shape):
            raise UserError(f"checkpoint: {path} has shape {tuple(x.shape)}, but its config says {want[path].shape}; "
                            "config and weights are of different models")
    return params


def to_tensors(table: Sequence[Entry], params: Params) -> dict[str, np.ndarray]:
    """Their tensors from our nested dict; UserError when a parameter of ours is in no entry."""
    flat = flatten(params)
    tensors: dict[str, np.ndarray] = {}
    for entry in table:
        arrays = tuple(np.asarray(flat.pop(path)) for path in entry.ours)
        for place, name in entry.names():
            tensors[name] = np.ascontiguousarray(entry.transform.save(tuple(a[place] for a in arrays)))
    if flat:
        raise UserError(f"export: parameter {sorted(flat)[0]} has no Hugging Face name in this family")
    return tensors


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, path + "/") if isinstance(value, dict) else {path: value})
    return flat


def _set(params: Params, path: str, value: np.ndarray) -> None:
    *folders, leaf = path.split("/")
    for folder in folders:
        params = params.setdefault(folder, {})
    params[leaf] = value

"""One declarative table a model family: our parameter paths, Hugging Face's tensor names, and the transform between.

`leaves` and `saved` read the same table, so the two directions cannot drift apart; both only say what there is, and
read a tensor when it is asked for (`to_params`, `to_tensors`: all). A layer number is written "{i}" in their name,
an expert's "{e}"; ours are stacked on leading dimensions, layers before experts. Every tensor must be accounted for,
both ways.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glmv_jax.trees import flatten, nest
from glmv_jax.typing import Params, UserError

Arrays = tuple[np.ndarray, ...]
FLOATS = ("bfloat16", "float32", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Transform:
    """load: their tensor -> our arrays; save: our arrays -> their tensor."""

    load: Callable[[np.ndarray], Arrays]
    save: Callable[[Arrays], np.ndarray]


same = Transform(lambda t: (t,), lambda a: a[0])
matrix = Transform(lambda t: (t.T,), lambda a: a[0].T)  # torch Linear [O, I] <-> kernel [I, O]
scalar = Transform(lambda t: (np.asarray(t).reshape(()),), lambda a: np.asarray(a[0]).reshape(1))  # [1] <-> []
vector = Transform(lambda t: (np.asarray(t).reshape(-1),), lambda a: np.asarray(a[0])[None, None])  # [1, 1, D] <-> [D]


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


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our arrays, not yet read.

    theirs: a tensor that it is made of, for messages.   stack, part: its shape is both together.
    dtype: as stored.   load: place in the stack -> what the tensor there gives, [*part], a view where that can be.
    """

    theirs: str
    stack: tuple[int, ...]
    part: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[tuple[int, ...]], np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack + self.part

    def read(self, index: Sequence[slice] = (), dtype: Any = None) -> np.ndarray:
        """A copy of a block, by default of all, as `dtype`; touches no tensor outside of it.

        index: slices of the leading dimensions; the others are taken whole.
        """
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        ranges = [range(*s.indices(n)) for s, n in zip(index, self.shape)]
        block = np.empty([len(r) for r in ranges], dtype or self.dtype)
        depth = len(self.stack)
        for chosen in itertools.product(*(enumerate(r) for r in ranges[:depth])):
            block[tuple(i for i, _ in chosen)] = self.load(tuple(place for _, place in chosen))[index[depth:]]
        return block


def leaves(table: Sequence[Entry], tensors: Mapping[str, np.ndarray], ignore: Iterable[str] = ()) -> dict[str, Leaf]:
    """Our arrays by slash path, none of them read yet.

    Raises UserError for a tensor that is missing, of another shape than its like, no floating-point number, or that no
    entry and no name in `ignore` accounts for.
    """
    found: dict[str, Leaf] = {}
    used = set(ignore)
    for entry in table:
        names = dict(entry.names())
        if missing := [name for name in names.values() if name not in tensors]:
            raise UserError(f"{_source(tensors)}: tensor {missing[0]} is missing (and {len(missing) - 1} like it); "
                            "download the checkpoint again")
        used.update(names.values())
        first = next(iter(names.values()))
        for name in names.values():
            _check(tensors, name, tensors[first])
        for position, (path, part) in enumerate(zip(entry.ours, _loaded(entry, tensors, first), strict=True)):
            load = functools.partial(_part, entry, tensors, names, position)
            found[path] = Leaf(first, entry.stack, part.shape, part.dtype, load)
    if unknown := sorted(set(tensors) - used):
        raise UserError(f"{_source(tensors)}: {len(unknown)} tensors have no place in this family, the first is "
                        f"{unknown[0]}; is config.json of another model?")
    return found


def _part(entry: Entry, tensors: Mapping[str, np.ndarray], names: Mapping, position: int, place: tuple) -> np.ndarray:
    return entry.transform.load(tensors[names[place]])[position]


def _check(tensors: Mapping[str, np.ndarray], name: str, like: np.ndarray) -> None:
    tensor = tensors[name]
    if tensor.dtype.name not in FLOATS:
        raise UserError(f"{_source(tensors, name)}: tensor {name} is {tensor.dtype.name}; quantised checkpoints cannot "
                        f"be read, take the one in {FLOATS[0]}")
    if tensor.shape != like.shape:
        raise UserError(f"{_source(tensors, name)}: tensor {name} has shape {tensor.shape}, others like it "
                        f"{like.shape}; download the checkpoint again")


def _loaded(entry: Entry, tensors: Mapping[str, np.ndarray], name: str) -> Arrays:
    try:
        return entry.transform.load(tensors[name])
    except (ValueError, IndexError):
        raise UserError(f"{_source(tensors, name)}: tensor {name} of shape {tensors[name].shape} is not what this "
                        "family has there; is config.json of another model?") from None


def _source(tensors: Any, name: str | None = None) -> str:
    """The folder, or the file of a tensor, where they are known, as `folder.Tensors` does."""
    if not hasattr(tensors, "folder"):
        return "checkpoint"
    return str(tensors.file_of(name) if name else tensors.folder)


def to_params(table: Sequence[Entry], tensors: Mapping[str, np.ndarray], ignore: Iterable[str] = ()) -> Params:
    """Our nested dict from their tensors, all in memory. Raises UserError as `leaves`."""
    return nest({path: leaf.read() for path, leaf in leaves(table, tensors, ignore).items()})


def check_shapes(params: Params, like: Params) -> Params:
    """`params` (of arrays or leaves, nested or by path); UserError when one is missing or has another shape than in
    `like` (arrays or their shapes), as when config.json is of another checkpoint."""
    want, have = flatten(like), flatten(params)
    if missing := sorted(want.keys() ^ have.keys()):
        raise UserError(f"checkpoint: {missing[0]} is only in the {'config' if missing[0] in want else 'weights'}; "
                        "config and weights are of different models")
    for path, x in have.items():
        if tuple(x.shape) != tuple(want[path].shape):
            given = f"{path} ({x.theirs})" if isinstance(x, Leaf) else path
            raise UserError(f"checkpoint: {given} has shape {tuple(x.shape)}, but its config says {want[path].shape}; "
                            "config and weights are of different models")
    return params


@dataclasses.dataclass(frozen=True)
class Saved:
    """One of their tensors, not yet made: name, shape, dtype, and `read()` -> [*shape], contiguous."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    entry: Entry
    read: Callable[[], np.ndarray]


def saved(table: Sequence[Entry], arrays: Mapping[str, Any]) -> list[Saved]:
    """Their tensors in the order of the table, none of them made yet.

    arrays: by slash path, each with shape, dtype, and [place in the stack]. UserError when one is in no entry.
    """
    found: list[Saved] = []
    for entry in table:
        if absent := [path for path in entry.ours if path not in arrays]:
            raise UserError(f"export: parameter {absent[0]} is missing; these weights are of another model")
        ours = [arrays[path] for path in entry.ours]
        depth = len(entry.stack)
        zeros = tuple(np.broadcast_to(np.zeros((), np.int8), a.shape[depth:]) for a in ours)  # takes no memory
        shape, dtype = entry.transform.save(zeros).shape, np.dtype(ours[0].dtype)
        for place, name in entry.names():
            found.append(Saved(name, shape, dtype, entry, functools.partial(_made, entry, ours, place)))
    if left := sorted(arrays.keys() - {path for entry in table for path in entry.ours}):
        raise UserError(f"export: parameter {left[0]} has no Hugging Face name in this family")
    return found


def _made(entry: Entry, ours: Sequence[Any], place: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray(entry.transform.save(tuple(np.asarray(a[place]) for a in ours)))


def to_tensors(table: Sequence[Entry], params: Params) -> dict[str, np.ndarray]:
    """Their tensors from our nested dict, all in memory; UserError when a parameter of ours is in no entry."""
    return {one.name: one.read() for one in saved(table, flatten(params))}

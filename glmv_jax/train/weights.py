"""The weights that a run stands for: its parameters, or their average, with adapters merged into what they adapt.

Whoever takes a model from a run (a next stage, the sampler, an export) takes it through `load`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from glmv_jax.interop.arrays import StoredArrays
from glmv_jax.optim.lora import apply_adapters
from glmv_jax.train import checkpoint
from glmv_jax.trees import flatten, nest, put_like, replaced
from glmv_jax.typing import Params, UserError


def load(
    run_dir: str | Path, subtrees: Sequence[str] = (), like: Params | None = None, *, finished: bool = True
) -> Params:
    """As `checkpoint.load_params`, of the run's evaluated weights: where its config has evaluate="ema" the average of
    its parameters, where it has adapters (lora.rank) those of its base with them merged in.

    A `like` that is a tree of adapters gets adapters. Raises: UserError as there.
    """
    average, adapters = made(run_dir)
    merged = adapters and (like is None or "lora" not in like)
    if not average and not merged:
        return checkpoint.load_params(run_dir, subtrees, like, finished=finished)
    arrays = opened(run_dir, merged=merged, finished=finished)
    chosen = checkpoint.taken(run_dir, dict(arrays), subtrees, like)
    if like is None:
        return nest({path: array[()] for path, array in chosen.items()})
    here = flatten(like)
    return replaced(like, {path: put_like(array[()], here[path]) for path, array in chosen.items()})


def opened(run_dir: str | Path, *, merged: bool = True, finished: bool = True) -> Mapping[str, Any]:
    """The run's evaluated weights as arrays by slash path, each with shape, dtype and [place in its stack], which reads
    it: the whole need not fit into memory.

    merged: false for adapters as they are. Raises: UserError as `checkpoint.newest`, and for a run that keeps no
    average.
    """
    average, adapters = made(run_dir)
    if not average and not adapters:
        return StoredArrays(checkpoint.newest(run_dir, finished=finished) / "params")
    params = checkpoint.load_params(run_dir, finished=finished)
    if average:
        params = _averaged(run_dir, params, finished)
    if not adapters or not merged:
        return flatten(params)
    lora = checkpoint.load_config(run_dir).lora
    named = flatten(params["lora"])
    base = opened(lora.base)
    pairs = {path: (named[f"{path}/a"], named[f"{path}/b"]) for path in base if f"{path}/a" in named}
    return {path: Merged(lora, array, pairs.get(path)) for path, array in base.items()}


class Merged:
    """An array of the base with its adapters, if it has any: shape, dtype, and `array[place]`, a part of it that is
    merged when it is asked for: the numbers that the run computed with, in float32.

    dtype: what the base is stored as, and an export is by default.
    """

    def __init__(self, lora: Any, base: Any, pair: tuple[np.ndarray, np.ndarray] | None) -> None:
        self.shape, self.dtype = tuple(base.shape), np.dtype(base.dtype)
        self._lora, self._base, self._pair = lora, base, pair

    def __getitem__(self, place: tuple[int, ...]) -> np.ndarray:
        part = np.asarray(self._base[place]).astype(kept_as(self._lora, self.dtype), copy=False)
        if self._pair is not None:
            a, b = self._pair
            part = apply_adapters(self._lora, {"w": part}, {"lora": {"w": {"a": a[place], "b": b[place]}}})["w"]
        return np.asarray(part, np.float32)


def kept_as(lora: Any, stored: np.dtype) -> np.dtype:
    """What a run with adapters keeps an array of its base in: lora.dtype, or with "stored" what it is stored as."""
    return stored if lora.dtype == "stored" else np.dtype(lora.dtype)


def made(run_dir: str | Path) -> tuple[bool, bool]:
    """Whether the weights of a run are others than the parameters it saved: an average, adapters."""
    cfg = checkpoint.load_config(run_dir) if (Path(run_dir) / "config.json").exists() else {}
    return cfg.get("evaluate", "params") == "ema", bool(cfg.get("lora", {}).get("rank", 0))


def _averaged(run_dir: str | Path, params: Params, finished: bool) -> Params:
    """`params` with those replaced that the optimiser keeps an average of."""
    item = checkpoint.newest(run_dir, finished=finished) / "training"
    average = re.compile(r"opt_state/(?:.*/)?average/(.*)")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(item).item_metadata.tree
        of = {path: found.group(1) for path in flatten(saved) if (found := average.fullmatch(path))}
        if not of:
            raise UserError(f"{run_dir} keeps no average of its parameters; set evaluate=params in its config.json")
        shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in flatten(saved).items() if path in of}
        target = replaced(jax.tree.map(lambda _: ocp.PLACEHOLDER, saved), shapes)
        numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        args = jax.tree.map(lambda _: numpy, target)
        got = flatten(reader.restore(item, args=ocp.args.PyTreeRestore(item=target, restore_args=args)))
    here = flatten(params)
    return replaced(params, {name: np.asarray(got[path], here[name].dtype) for path, name in of.items()})

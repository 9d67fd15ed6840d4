"""The weights that a run stands for: its parameters, or their average, with adapters merged into what they adapt.

Whoever takes a model from a run (a next stage, the sampler, an export) takes it through `load`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

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
    cfg = checkpoint.load_config(run_dir) if (Path(run_dir) / "config.json").exists() else {}
    average = cfg.get("evaluate", "params") == "ema"
    adapters = bool(cfg.get("lora", {}).get("rank", 0)) and not (like is not None and "lora" in like)
    if not average and not adapters:
        return checkpoint.load_params(run_dir, subtrees, like, finished=finished)
    params = checkpoint.load_params(run_dir, finished=finished)
    if average:
        params = _averaged(run_dir, params, finished)
    if adapters:
        merge = jax.jit(lambda base, adapters: apply_adapters(cfg.lora, base, adapters))
        base = jax.tree.map(lambda x: x.astype(cfg.lora.dtype), load(cfg.lora.base))  # as the run had it
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), merge(base, params))
    return _placed(run_dir, params, subtrees, like)


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


def _placed(run_dir: str | Path, params: Params, subtrees: Sequence[str], like: Params | None) -> Params:
    """What `checkpoint.load_params` would have made of `params`."""
    chosen = checkpoint.taken(run_dir, flatten(params), subtrees, like)
    if like is None:
        return nest(chosen)
    here = flatten(like)
    return replaced(like, {name: put_like(x, here[name]) for name, x in chosen.items()})

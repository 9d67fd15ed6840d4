"""The weights that a run stands for: its parameters, or their average, with adapters merged into what they adapt.

Whoever takes a model from a run (a next stage, the sampler, an export) takes it through `load`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from glmv_jax.optim import slash_path
from glmv_jax.optim.lora import apply_adapters
from glmv_jax.train import checkpoint
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
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(item).item_metadata.tree
        inside = re.compile(r"opt_state/(?:.*/)?average/(.*)")
        wanted = lambda path: inside.fullmatch(slash_path(path))  # noqa: E731

        def leaf(path, x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype) if wanted(path) else ocp.PLACEHOLDER

        target = jax.tree_util.tree_map_with_path(leaf, saved)
        numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        args = jax.tree.map(lambda _: numpy, target)
        got = reader.restore(item, args=ocp.args.PyTreeRestore(item=target, restore_args=args))
    average = {wanted(p).group(1): x for p, x in jax.tree_util.tree_leaves_with_path(got) if wanted(p)}
    if not average:
        raise UserError(f"{run_dir} keeps no average of its parameters; set evaluate=params in its config.json")
    return jax.tree_util.tree_map_with_path(lambda p, x: np.asarray(average.get(slash_path(p), x), x.dtype), params)


def _placed(run_dir: str | Path, params: Params, subtrees: Sequence[str], like: Params | None) -> Params:
    """What `checkpoint.load_params` would have made of `params`."""
    roots = tuple(f"{subtree.strip('/')}/" for subtree in subtrees)
    named = {slash_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    chosen = {name: x for name, x in named.items() if not roots or f"{name}/".startswith(roots)}
    for root in roots:
        if not any(f"{name}/".startswith(root) for name in chosen):
            raise UserError(f"{run_dir} has no subtree {root[:-1]!r}; it has {', '.join(sorted(params))}")
    if like is None:
        tree: Params = {}
        for name, x in chosen.items():
            *parents, last = name.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = x
        return tree
    here = {slash_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(like)}
    wanted = {name for name in here if not roots or f"{name}/".startswith(roots)}
    odd = sorted(n for n in chosen.keys() | wanted if n not in chosen or n not in here
                 or here[n].shape != chosen[n].shape)  # fmt: skip
    if odd:
        raise UserError(f"{run_dir} does not fit this model: {odd[0]} differs; use the size it was trained with")

    def leaf(path: Any, x: Any) -> Any:
        new = chosen.get(slash_path(path))
        if new is None:
            return x
        new, sharding = np.asarray(new, x.dtype), getattr(x, "sharding", None)
        return new if sharding is None else jax.device_put(new, sharding)

    return jax.tree_util.tree_map_with_path(leaf, like)

"""Weights of a run that goes on, for the server that answers for it: a folder in Hugging Face's layout a version.

    model-00001-of-00002.safetensors, config.json, ...   of a run that began from a public checkpoint: `export_hf`'s
    model.safetensors, config.json                       of a model of our own: its arrays by path, "." for "/"

The first is what any server loads that knows the checkpoint; the second only ours, as no other has the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from glmv_jax.interop import families, folder
from glmv_jax.interop.table import Entry, check_shapes, same, saved, to_params
from glmv_jax.train import exchange
from glmv_jax.trees import flatten
from glmv_jax.typing import Params

OWN = "glmv_jax"  # model_type


def write(params: Params, target: Path, checkpoint: str = "") -> None:
    """The folder, which is there when it is whole. The host holds the parameters once.

    checkpoint: what `glmv import-hf` wrote and the run began from; "" for a model of our own. A public one is written
    in the dtype that it computes in. Raises UserError for a disk that cannot be written.
    """
    arrays = flatten(jax.device_get(params))
    if checkpoint:
        exchange.give(arrays, checkpoint, target, exchange.computes_in(checkpoint))
        return
    with exchange.whole(target) as part:
        (part / "config.json").write_text(json.dumps({"model_type": OWN}) + "\n", encoding="utf-8")
        folder.write_tensors(part, saved(_table(arrays), arrays))


def reader(first: Params) -> Callable[[Path], Params]:
    """What reads such folders for a server. first: the parameters that it began with, or their shapes; others get their
    dtypes, and a public model's their places. The reader raises UserError for weights of another model."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda x: getattr(x, "sharding", None) or device, first)

    def read(path: Path) -> Params:
        if folder.read_config(path).get("model_type") == OWN:
            params = to_params(_table(flatten(like)), folder.Tensors(path))
        else:
            checkpoint = families.open_checkpoint(path)
            check_shapes(checkpoint.arrays, like)
            params = families.load(checkpoint, places)
        return jax.tree.map(lambda x, to: jnp.asarray(x, to.dtype), check_shapes(params, like), like)

    return read


def _table(paths: Iterable[str]) -> list[Entry]:
    return [Entry(path.replace("/", "."), (path,), same) for path in paths]

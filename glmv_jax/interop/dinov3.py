"""DINOv3 ViT: Hugging Face folders (`dinov3_vit`), in both layouts of names that exist.

Names: transformers 5 `dinov3_vit/modeling_dinov3_vit.py` (`model.layer.{i}.`); folders on the Hub may hold the earlier
`layer.{i}.`, without the prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glmv_jax.interop.folder import Tensors, read_config
from glmv_jax.interop.table import Entry, Transform, check_shapes, convolution, linear, norm, same, to_params
from glmv_jax.models.api import abstract_params
from glmv_jax.models.dinov3 import DINOv3Config
from glmv_jax.typing import Params, UserError

_PROJECTIONS = {"q": "query_bias", "k": "key_bias", "v": "value_bias", "o": "proj_bias"}


def load(path: str | Path, *, dtype: str = "float32") -> tuple[DINOv3Config, Params]:
    """A checkpoint folder. Raises: UserError as `interop.siglip.load`."""
    cfg = config(read_config(path), dtype=dtype)
    params = to_params(table(cfg), Tensors(path, _rename), ["embeddings.mask_token"])
    return cfg, check_shapes(params, abstract_params(cfg))


def config(hf: Mapping[str, Any], *, dtype: str = "float32") -> DINOv3Config:
    """DINOv3Config from the contents of config.json; UserError for another model_type or activation."""
    if hf.get("model_type") != "dinov3_vit":
        raise UserError(f"config.json: model_type {hf.get('model_type')!r} is not dinov3_vit")
    # Saved configs leave out what equals the default of their class.
    c: dict[str, Any] = dict(
        patch_size=16, hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6,
        hidden_act="gelu", layer_norm_eps=1e-5, rope_theta=100.0, num_channels=3, query_bias=True, key_bias=False,
        value_bias=True, proj_bias=True, mlp_bias=True, use_gated_mlp=False, num_register_tokens=0,
    )  # fmt: skip
    c |= hf
    activation = "swiglu" if c["use_gated_mlp"] and c["hidden_act"] == "silu" else c["hidden_act"]
    known = activation == ("swiglu" if c["use_gated_mlp"] else "gelu")
    if not known or not c["mlp_bias"]:
        raise UserError(f"config.json: an MLP with use_gated_mlp={c['use_gated_mlp']}, hidden_act={c['hidden_act']!r} "
                        f"and mlp_bias={c['mlp_bias']} is not supported; released ones have gelu, or gated silu")
    return DINOv3Config(
        depth=c["num_hidden_layers"], width=c["hidden_size"], heads=c["num_attention_heads"],
        mlp=c["intermediate_size"], patch=c["patch_size"], registers=c["num_register_tokens"],
        channels=c["num_channels"], biases="".join(p for p, key in _PROJECTIONS.items() if c[key]),
        activation=activation, rope_theta=c["rope_theta"], norm_eps=c["layer_norm_eps"], dtype=dtype,
    )  # fmt: skip


def table(cfg: DINOv3Config) -> list[Entry]:
    """Every tensor of the family for a model of this config."""
    hf, n = "model.layer.{i}.", cfg.depth
    entries = [
        Entry("embeddings.cls_token", ("class_token",), _vector),
        Entry("embeddings.patch_embeddings.weight", ("patch_embed/kernel",),
              convolution((1, 2, 0), (cfg.patch, cfg.patch))),
        Entry("embeddings.patch_embeddings.bias", ("patch_embed/bias",), same),
        *norm("norm", "norm"),
    ]  # fmt: skip
    if cfg.registers:
        entries.append(Entry("embeddings.register_tokens", ("registers",), _rows))
    for number in (1, 2):
        entries += norm(f"{hf}norm{number}", f"blocks/norm{number}", n)
        entries.append(Entry(f"{hf}layer_scale{number}.lambda1", (f"blocks/scale{number}",), same, n))
    for name in "qkvo":
        entry = linear(f"{hf}attention.{name}_proj", f"blocks/attention/{name}", n)
        entries += entry if name in cfg.biases else entry[:1]
    for name in ("gate", "up", "down") if cfg.activation == "swiglu" else ("up", "down"):
        entries += linear(f"{hf}mlp.{name}_proj", f"blocks/mlp/{name}", n)
    return entries


_vector = Transform(lambda t: (np.asarray(t)[0, 0],), lambda a: np.asarray(a[0])[None, None])
_rows = Transform(lambda t: (np.asarray(t)[0],), lambda a: np.asarray(a[0])[None])


def _rename(name: str) -> str:
    return re.sub(r"^layer\.", "model.layer.", name)

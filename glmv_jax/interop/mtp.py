"""The MTP layers of a checkpoint, which follow its last layer: one for every depth of prediction (GLM), or K, one a
depth (DeepSeek-V3: layer N + k - 1 is that of depth k = 1..K, and config.json has num_nextn_predict_layers = K).

Names: as vLLM and SGLang read them. transformers drops these layers, so a checkpoint that it wrote has none, whatever
its config.json says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from glmv_jax.interop.table import Entry, matrix, same
from glmv_jax.models.mtp import MTPConfig
from glmv_jax.typing import UserError

COUNT = "num_nextn_predict_layers"


def layers_in(hf: Mapping[str, Any], names: Iterable[str]) -> int:
    """How many there are among the tensors of a checkpoint. UserError when config.json says another number."""
    text, names = text_part(hf), list(names)
    found, last = 0, text.get("num_hidden_layers")
    while last is not None and any(f".layers.{last + found}." in name for name in names):
        found += 1
    if found and text.get(COUNT) and text[COUNT] != found:
        raise UserError(f"config.json: {COUNT} is {text[COUNT]}, but there are {found} layers behind layer {last - 1}; "
                        "download the checkpoint again")
    return found


def text_part(hf: Mapping[str, Any]) -> Any:
    """The part of config.json that speaks of the language model."""
    return hf.get("text_config", hf)


def config(decoder: Any, layers: int) -> MTPConfig | None:
    """Of a model with so many of these layers."""
    if layers == 0:
        return None
    return MTPConfig(decoder) if layers == 1 else MTPConfig(decoder, layers, weights="per_depth")


def count(cfg: MTPConfig | None) -> int:
    """How many of these layers a model has."""
    return 0 if cfg is None else cfg.depth if cfg.weights == "per_depth" else 1


def table(
    cfg: MTPConfig | None, depth: int, stem: str, block: Callable[[str, str, Sequence[int] | None], list[Entry]]
) -> list[Entry]:
    """Entries of a model's MTP layers.

    depth: of the decoder. stem: what stands before a layer's number. block: (prefix, ours, numbers) -> the entries of
    the block in the layers of these numbers, None for one without a "{i}" in its prefix.
    """
    if cfg is None:
        return []
    numbers = range(depth, depth + count(cfg)) if cfg.weights == "per_depth" else None
    hf = f"{stem}{'{i}' if numbers else depth}."
    return block(hf, "mtp/block/", numbers) + [
        Entry(hf + "enorm.weight", ("mtp/enorm/scale",), same, numbers),
        Entry(hf + "hnorm.weight", ("mtp/hnorm/scale",), same, numbers),
        Entry(hf + "eh_proj.weight", ("mtp/eh_proj/kernel",), matrix, numbers),
        Entry(hf + "shared_head.norm.weight", ("mtp/norm/scale",), same, numbers),
    ]


def duplicates(cfg: Any, stem: str) -> list[str]:
    """Tensors of a model's MTP layers, and of a tied head, that repeat others; they may be present and are not read."""
    layers = (f"{stem}{cfg.decoder.depth + k}." for k in range(max(1, count(cfg.mtp))))
    names = [layer + name for layer in layers for name in ("embed_tokens.weight", "shared_head.head.weight")]
    return names + (["lm_head.weight"] if cfg.decoder.tied else [])

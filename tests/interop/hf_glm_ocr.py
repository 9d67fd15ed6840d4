"""GLM-OCR with random weights as a folder, written by transformers itself; with the MTP layer, which it leaves out."""

from __future__ import annotations

import json

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.interop.test_glm_ocr import hf_config, randomise


def model(seed: int = 0, **text) -> transformers.GlmOcrForConditionalGeneration:
    torch.manual_seed(seed)
    made = transformers.GlmOcrForConditionalGeneration(hf_config(**text)).eval()
    randomise(made)
    return made


def write(folder, *, dtype=None, shard: str = "5GB", mtp: int = 0, repeated: bool = False):
    """Saves a tiny model and returns it. mtp: with so many layers behind the last; repeated: and their copies of
    the table and of the head."""
    made = model() if dtype is None else model().to(dtype)
    made.save_pretrained(folder, max_shard_size=shard)
    add_mtp(folder, mtp, repeated)
    return made


def add_mtp(folder, layers: int, repeated: bool = False) -> None:
    """As `write` has them, into a folder that was saved."""
    if layers:
        tensors = load_file(folder / "model.safetensors")
        for number in range(2, 2 + layers):
            tensors |= mtp_layer(tensors, number, repeated)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def mtp_layer(tensors: dict, number: int, repeated: bool = False) -> dict:
    """Tensors of a layer behind the last, of other values than any other's."""
    prefix, rng = f"model.language_model.layers.{number}.", np.random.default_rng(3 + number)
    draw = lambda *shape: torch.tensor(rng.normal(size=shape), dtype=tensors["lm_head.weight"].dtype)  # noqa: E731
    layer = {
        name.replace(".layers.0.", f".layers.{number}."): draw(*t.shape) for name, t in tensors.items()
        if "language_model.layers.0." in name
    }  # fmt: skip
    layer |= {prefix + f"{name}.weight": draw(32) for name in ("enorm", "hnorm", "shared_head.norm")}
    layer[prefix + "eh_proj.weight"] = draw(32, 64)
    if repeated:
        layer[prefix + "embed_tokens.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
        layer[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return layer


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

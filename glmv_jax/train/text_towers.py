"""The text side of stage 2, from its entries in the config: ours, or the one of a SigLIP checkpoint.

    model.text.kind   "own": our tower, of the sizes that stand beside it. "siglip": tower, head and vocabulary of
                      `path`; images then project to the width of its head. Its weights are where the run starts, and
                      an optimiser group of kind "frozen" for text/.* and text_head/.* leaves them so (locked text)
    model.text.path   folder of a SigLIP or SigLIP 2 checkpoint, or an .npz of big_vision
    model.text.scale  whether the run also starts from its temperature and bias
    data.vocabulary   a sentencepiece .model or a tokenizer.json. "": the shipped one, or that of the folder
    data.split_chinese  for our tower: Chinese one character at a time (`text_rows.SharedRows`)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from glmv_jax.data import vocabulary
from glmv_jax.data.text_rows import PaddedRows, SharedRows, TextRows
from glmv_jax.data.tokenizer import SHIPPED
from glmv_jax.interop import siglip
from glmv_jax.models import build
from glmv_jax.models.siglip import SiglipConfig
from glmv_jax.models.two_tower import TwoTowerConfig
from glmv_jax.typing import Params, UserError

KINDS = ("own", "siglip")
# Rows of the embedding tables of SigLIP (c4_en, and mC4 of the multilingual one); SigLIP 2 has Gemma's 256,000.
FIRST_SIGLIP = (32_000, 250_000)
PADDED_TO = 512  # tables are often rounded up: a larger gap than this is a mistake


def model(cfg: ConfigDict) -> TwoTowerConfig:
    """Both towers. Of a checkpoint only the sizes are read."""
    return build.two_tower(cfg.model, _sizes(cfg.model.text) if is_public(cfg) else None)


def rows(cfg: ConfigDict, text: Any) -> TextRows:
    """How texts become rows for the tower of config `text`.

    Raises: UserError for a vocabulary that cannot be read, or has another size than the tower's table.
    """
    if not is_public(cfg):
        words = vocabulary.load(cfg.data.vocabulary or SHIPPED)
        _check(words.vocab_size, text.vocab, f"model.text.vocab={text.vocab}",
               f"--config.model.text.vocab={words.vocab_size}, or another --config.data.vocabulary")  # fmt: skip
        return SharedRows(words, cfg.data.get("split_chinese", True))
    path = Path(cfg.model.text.path)
    if not cfg.data.vocabulary and not path.is_dir():
        raise UserError(f"{path} has no vocabulary; set data.vocabulary to the one it was trained with (SigLIP 2: the "
                        "sentencepiece model of Gemma)")  # fmt: skip
    words = vocabulary.load(cfg.data.vocabulary or path)
    _check(words.vocab_size, text.vocab, f"the text tower of {path} has {text.vocab}",
           "the vocabulary it was trained with as data.vocabulary")  # fmt: skip
    return PaddedRows(words, first=text.vocab in FIRST_SIGLIP)


def params(cfg: ConfigDict) -> Params:
    """The subtrees that a fresh run starts from; none with our own tower."""
    if not is_public(cfg):
        return {}
    _, found = siglip.load(cfg.model.text.path, vision=False)
    return {name: found[name] for name in ("text", "text_head", *(("scale",) if cfg.model.text.scale else ()))}


def is_public(cfg: ConfigDict) -> bool:
    """Whether the text side is that of a checkpoint; UserError for another kind, or none to read."""
    kind = cfg.model.text.get("kind", "own")
    if kind not in KINDS:
        raise UserError(f"model.text.kind={kind!r} is not known; choose from {', '.join(KINDS)}")
    if kind == "siglip" and not cfg.model.text.path:
        raise UserError("model.text.path is empty: give the folder of a SigLIP or SigLIP 2 checkpoint, or an .npz")
    return kind == "siglip"


def _sizes(text: ConfigDict) -> SiglipConfig:
    return siglip.sizes(text.path, vision=False, dtype=text.get("dtype", "float32"))


def _check(pieces: int, table: int, where: str, remedy: str) -> None:
    if not 0 <= table - pieces < PADDED_TO:
        raise UserError(f"the vocabulary has {pieces} pieces, but {where}; give {remedy}")

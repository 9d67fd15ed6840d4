"""The embedded corpus: everything is shipped in this folder, nothing is downloaded or installed at run time.

    emoji-0.webp ...  atlas sheets, 256 pictures each, in the order of emoji.tsv (16 a row, square cells)
    emoji.tsv         id, width, height, concept, English name and keywords, Chinese name and keywords
    *.ttf, *.otf      subset fonts; fonts.json says which split and language each serves
    vocab.model       the sentencepiece vocabulary
    licenses/         the licences of all of the above, README.md says which file is under which

Rebuilt by `python -m glmv_jax.data.corpus.build`.
"""

from __future__ import annotations

import pathlib

from glmv_jax.typing import UserError

FOLDER = pathlib.Path(__file__).resolve().parent
VOCABULARY = FOLDER / "vocab.model"

CELL = 72  # longest side of an emoji in the atlas, pixels
COLUMNS = 16
PER_SHEET = 256


def path(name: str) -> pathlib.Path:
    """The shipped file `name`. Raises UserError when the installation lacks it."""
    file = FOLDER / name
    if not file.exists():
        raise UserError(f"corpus file {name} is missing; reinstall glmv_jax")
    return file

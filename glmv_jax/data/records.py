"""The records that data sources yield, before tokens and patches exist. Host side, no jax."""

from __future__ import annotations

import dataclasses
from typing import Any

from PIL import Image


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question about zero or more images, with an exact answer.

    id:      stable and unique, e.g. "count/train/12345".
    source:  the data-source tag that per-source metrics are grouped by, e.g. "count".
    images:  PIL images in RGB.
    prompt:  user text without special tokens; "" for a bare caption or plain text.
    answer:  gold text without box tokens (the chat template adds them when `boxed`).
    more:    further questions about the same images with their answers, for training in several turns.
    boxed:   the answer is wrapped in <|begin_of_box|>...<|end_of_box|>.
    meta:    JSON-able facts that a verifier needs (gold boxes, tolerance, aliases, choices...).
    """

    id: str
    source: str
    images: tuple[Image.Image, ...]
    prompt: str
    answer: str
    boxed: bool = True
    more: tuple[tuple[str, str], ...] = ()
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and its texts by language ("en", "zh").

    image: RGB; encoded bytes from sources on disk, to be decoded when the size it is needed at is known.
    texts: of the shipped corpus the name, then keywords; of sources on disk captions of equal rank.
    """

    id: str
    image: Image.Image | bytes
    texts: dict[str, list[str]]
    source: str = "emoji"

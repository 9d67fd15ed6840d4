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
    times:   seconds of each image when they are the frames of a film, () otherwise; each is written after its picture.
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
    times: tuple[float, ...] = ()

    def parts(self) -> list[dict[str, Any]]:
        """What the user says, as the parts of a message: the images, each frame of a film with its time, the prompt."""
        shown: list[dict[str, Any]] = []
        for n in range(len(self.images)):
            shown.append({"type": "image"})
            if self.times:
                shown.append({"type": "text", "text": f"{self.times[n]:.1f} seconds"})
        return [*shown, {"type": "text", "text": self.prompt}]


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and its texts by language ("en", "zh").

    image: RGB; encoded bytes from sources on disk, to be decoded when the size it is needed at is known.
    texts: of the shipped corpus the name, then keywords; of sources on disk captions of equal rank.
    """

    id: str
    image: Any
    texts: dict[str, list[str]]
    source: str = "emoji"

"""A question with tools at hand: `crop` enlarges a part of a picture, `search` finds texts in a local index, `answer`
ends the episode. Graded by the reward system, as the question without tools is.

Any task can be asked at a desk. `Lookup` is a question that needs both tools: small letters in a large picture, which
stand for something only in the index.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import coordinates, drawing, fonts
from glmv_jax.data.chat import boxed
from glmv_jax.data.questions import read
from glmv_jax.data.records import Sample
from glmv_jax.data.seeds import ENDLESS, generator
from glmv_jax.rl.envs.calls import Acting, Refused, Reply, inside, tool
from glmv_jax.rl.envs.search import Index
from glmv_jax.rl.envs.single import Samples
from glmv_jax.rl.gym import Action, Observation, Step, asked
from glmv_jax.rl.rewards import boxed as boxed_rule
from glmv_jax.rl.rewards import text as text_rules
from glmv_jax.rl.rewards.grade import Verifier

CROP = tool(
    "crop", "Enlarges a part of a picture. Coordinates are 0..999 from its top left corner; pictures count from 1, in "
    "the order in which they were shown.", {"picture": "integer"}, x1="integer", y1="integer", x2="integer",
    y2="integer",
)  # fmt: skip
SEARCH = tool("search", "The texts of the index that match best.", query="string")
ANSWER = tool("answer", "Gives the final answer.", text="string")
LARGEST = 8  # times that a part is enlarged at most
THINNEST = 8  # times that a part may be as long as it is wide


class Desk(Acting):
    """samples: as `Single` takes them; `meta["documents"]`, where a sample has them, are the texts of its index.

    sample, search: the question of the episode and its index, for a script.
    """

    judges = False

    def __init__(self, samples: Samples, source: str) -> None:
        self.source = source
        self._samples = samples

    def reset(self, seed: int) -> Observation:
        self.sample = self._samples[seed % ENDLESS]
        self.pictures = list(self.sample.images)
        documents = self.sample.meta.get("documents", ())
        self.search = Index(documents)
        self.tools = [CROP] * bool(self.pictures) + [SEARCH] * bool(documents) + [ANSWER]
        return asked(self.sample.prompt, self.sample.images, self.tools)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Reply:
        carry_out: dict[str, Callable[..., Reply]] = {
            "crop": self._crop, "search": self._search, "answer": self._answer,
        }  # fmt: skip
        return carry_out[name](**arguments)

    def said(self, action: Action) -> Step:
        """What is said without a call is the answer."""
        return Step(Observation(), True, info={"sample": self.sample})

    def _crop(self, x1: int, y1: int, x2: int, y2: int, picture: int = 1) -> Reply:
        inside(x1, y1, x2, y2)
        if not 1 <= picture <= len(self.pictures):
            raise Refused(f"there is no picture {str(picture)[:20]}; there are {len(self.pictures)}")
        whole = self.pictures[picture - 1]
        left, top, right, bottom = coordinates.decode_box((x1, y1, x2, y2), *whole.size)
        box = round(left), round(top), round(right), round(bottom)
        width, height = box[2] - box[0], box[3] - box[1]
        if width < 1 or height < 1:
            raise Refused("x1 must lie left of x2, and y1 above y2")
        if max(width, height) > THINNEST * min(width, height):
            raise Refused(f"the part is more than {THINNEST} times as long as it is wide")
        scale = max(1.0, min(whole.width / width, whole.height / height, LARGEST))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        part = whole.crop(box).resize(size, Image.Resampling.BICUBIC)
        self.pictures.append(part)
        return Reply(f"picture {len(self.pictures)}", (part,))

    def _search(self, query: str) -> Reply:
        return Reply("\n".join(self.search(query)) or "nothing was found")

    def _answer(self, text: str) -> Reply:
        # Between real box tokens, in which spelled ones do not count (`inference.text`).
        return Reply(done=True, info={"sample": self.sample, "answer": boxed(text.replace("<|", "< |"))})


class Lookup:
    """Questions that need the picture and the index: what costs the thing whose code stands in the picture?

    Random access; item i depends on (seed, split, i) alone. Pictures are SIZE, their letters LETTERS pixels high: too
    small to be read where the picture is shown with few patches, legible when enlarged.
    """

    SIZE, LETTERS, CODES = (192, 144), 12, 24
    PROMPT = "Small letters in the picture are the code of a thing. The index knows what it costs. What does it cost?"

    def __init__(self, split: str = "train", seed: int = 0):
        self._split, self._seed = split, seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Sample:
        rng = generator(self._seed, self._split, "lookup", i)
        codes = ["".join(row) for row in rng.choice(list(read.ALPHABET), (4 * self.CODES, 3))]
        codes = list(dict.fromkeys(codes))[: self.CODES]
        prices = rng.integers(10, 1000, len(codes)).tolist()
        documents = [f"The thing {code} costs {price}." for code, price in zip(codes, prices)]
        wanted = int(rng.integers(len(codes)))
        picture, box = self._drawn(rng, codes[wanted])
        meta = {"check": "exact", "lang": "en", "documents": documents, "code": codes[wanted],
                "box": coordinates.encode_box(box, *self.SIZE)}  # fmt: skip
        answer = str(prices[wanted])
        return Sample(f"lookup/{self._split}/{i}", "lookup", (picture,), self.PROMPT, answer, meta=meta)

    def _drawn(self, rng: np.random.Generator, code: str) -> tuple[Image.Image, tuple[int, int, int, int]]:
        picture = Image.new("RGB", self.SIZE, drawing.background(self._split, rng))
        pen, font = ImageDraw.Draw(picture), fonts.face(self._split, "en", rng, self.LETTERS)
        left, top, right, bottom = map(int, font.getbbox(code))
        x, y = (int(rng.integers(4, side - 4 - length)) for side, length in zip(self.SIZE, (right, bottom)))
        pen.text((x, y), code, font=font, fill=drawing.COLOURS["black"].shade(self._split, rng))
        return picture, (x + left, y + top, x + right, y + bottom)


@functools.cache
def lookup_verifier() -> Verifier:
    """Of `Lookup`'s answers: the number alone."""
    return boxed_rule(text_rules.number())

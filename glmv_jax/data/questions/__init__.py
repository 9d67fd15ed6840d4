"""Questions about pictures, with exact answers, drawn from seeds.

    kind        asks for                                          check
    read        the string in the picture                         text
    count       how many objects of a kind, 1 to 5                numeric
    name        the name of an emoji, in English or Chinese       exact
    attribute   the colour of a shape, the shape of a colour      exact
    spatial     left, right, above, below                         exact
    ground      the box of an object, 0..999                      box
    point       the centre of an object, 0..999                   point
    chart       the value of a bar, the tallest or shortest bar   numeric or exact
    caption     (no question) what is in the picture              text, not boxed
    describe    all objects, from left to right, with centres     text, not boxed
    table       the values of all bars                            text, not boxed

The last three are DESCRIPTIONS, for pretraining: a picture told in full teaches more than the answer to one question.

`meta` of a sample: "check" (the kind of comparison), "lang", and where they apply "aliases" (other right answers),
"choices", "boxes" (gold boxes in 0..999). Training and held-out samples differ in seeds, fonts, strings, shades of
colour, backgrounds and positions; they share the kinds, the prompts, the nouns and the names of the colours.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence

import numpy as np

from glmv_jax.data.questions import (
    attribute,
    caption,
    chart,
    count,
    describe,
    ground,
    name,
    point,
    read,
    spatial,
    table,
)  # fmt: skip
from glmv_jax.data.records import Sample
from glmv_jax.data.seeds import ENDLESS, generator
from glmv_jax.typing import UserError

KINDS: dict[str, Callable[[np.random.Generator, str], Sample]] = {
    "read": read.generate,
    "count": count.generate,
    "name": name.generate,
    "attribute": attribute.generate,
    "spatial": spatial.generate,
    "ground": ground.generate,
    "point": point.generate,
    "chart": chart.generate,
    "caption": caption.generate,
    "describe": describe.generate,
    "table": table.generate,
}
DESCRIPTIONS = ("caption", "describe", "table")
SPLITS = ("train", "heldout")


class Questions:
    """Random access to the samples of some kinds, taken in turn: index i is of kind i mod n.

    Args:
      kinds: names from KINDS.
      split: "train" or "heldout".
      seed: another seed gives other samples.
    Raises:
      UserError: an unknown kind or split.
    """

    def __init__(self, kinds: Sequence[str], split: str, seed: int = 0):
        for kind in kinds:
            if kind not in KINDS:
                near = difflib.get_close_matches(kind, KINDS, 1, 0.0)[0]
                raise UserError(f"question kind {kind!r} does not exist; did you mean {near!r}?")
        if split not in SPLITS:
            raise UserError(f"question split {split!r} does not exist; use one of {', '.join(SPLITS)}")
        if not kinds:
            raise UserError(f"no question kinds were given; use some of {', '.join(KINDS)}")
        self.kinds, self.split, self.seed = tuple(kinds), split, seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Sample:
        kind = self.kinds[i % len(self.kinds)]
        drawn = KINDS[kind](generator(self.seed, self.split, kind, i), self.split)
        return dataclasses.replace(drawn, id=f"{kind}/{self.split}/{i}")

"""Image-text pairs of the simplest things: one shape or one written symbol, with its name. For stage 2, beside emoji.

Emoji are told apart by colour, and so is nearly everything else: without these pairs the encoder never learns what a
shape is, and no later stage makes up for it, since there the signal is faint. The texts name the shape and not its
colour, so that nothing else can tell the pairs of a batch apart.
"""

from __future__ import annotations

from glmv_jax.data import drawing, emoji
from glmv_jax.data.questions import read, scene
from glmv_jax.data.records import Pair
from glmv_jax.data.seeds import ENDLESS, generator

SYMBOLS = read.ALPHABET + read.CHARACTERS
NAMES = (*drawing.SHAPES, *SYMBOLS)
SHAPE_SHARE = 0.4  # the others are symbols


class Basics:
    """Endless random access; training pictures only (colours, backgrounds and faces of that split)."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Pair:
        rng = generator(self.seed, "basics", i)
        if rng.random() < SHAPE_SHARE:
            name = scene.choose(rng, tuple(drawing.SHAPES))
            canvas = scene.choose(rng, scene.CANVASES)
            kind = (name, scene.choose(rng, tuple(drawing.COLOURS)))
            picture = scene.paint(canvas, scene.scatter(rng, "train", canvas, [kind], (12, 28)), "train", rng)
            texts = {lang: [drawing.SHAPES[name][lang]] for lang in emoji.LANGUAGES}
        else:
            name = scene.choose(rng, SYMBOLS)
            picture = read.write(read.ALONE, name, "en" if name.isascii() else "zh", "train", rng)
            texts = {lang: [name] for lang in emoji.LANGUAGES}
        return Pair(id=name, image=picture, texts=texts, source="basics")


def number(name: str) -> int:
    """Which of NAMES it is."""
    return NAMES.index(name)

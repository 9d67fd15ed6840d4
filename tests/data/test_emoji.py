"""The emoji corpus against facts that do not come from its build: counts, name patterns, colours that the names state.

Not covered: that every picture is the right one (some forty are, by colour), or that a translation is good.
"""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest

from glmv_jax.data import corpus, emoji
from glmv_jax.data.corpus.build import LIMIT_BYTES, shipped_bytes
from glmv_jax.typing import UserError


def test_counts_and_unique_names():
    records = emoji.load()
    assert len(records) == 1849
    for lang in emoji.LANGUAGES:
        assert len({e.name(lang) for e in records}) == 1849
        assert all(word == word.strip() != "" for e in records for word in e.texts[lang])
    points = [[int(part, 16) for part in e.id.split("-")] for e in records]
    assert sum(len(p) == 2 and all(0x1F1E6 <= c <= 0x1F1FF for c in p) for p in points) == 258  # flags of countries
    assert not any(0x1F3FB <= c <= 0x1F3FF for p in points for c in p)  # no skin tones
    assert all(any("\u4e00" <= c <= "\u9fff" for c in e.name("zh")) for e in records if not e.name("zh").isascii())


def test_split_is_by_concept():
    train, held = ([emoji.load()[i] for i in emoji.split(name)] for name in ("train", "heldout"))
    assert len(held) == len({e.concept for e in held}) == 180
    assert not {e.concept for e in train} & {e.concept for e in held}
    # Nothing is lost but the variants of held-out concepts.
    rest = {e.index for e in emoji.load()} - {e.index for e in train + held}
    assert all(emoji.load()[i].concept in {e.concept for e in held} for i in rest) and len(rest) < 60
    assert all(len(e.id) <= min(len(o.id) for o in emoji.load() if o.concept == e.concept) for e in held)
    pictures = {emoji.image(e.index).tobytes() for e in train}
    assert not any(emoji.image(e.index).tobytes() in pictures for e in held)


def test_gendered_names_share_a_concept():
    """The groups were made from code points; here they are checked by the English names."""
    concepts = {e.name("en"): e.concept for e in emoji.load()}
    pairs = [(n, re.sub(r"^woman", "man", n)) for n in concepts if n.startswith("woman ")]
    pairs = [(a, b) for a, b in pairs if b in concepts and a != b]
    assert len(pairs) > 50
    assert [(a, b) for a, b in pairs if concepts[a] != concepts[b]] == []
    assert concepts["flag: Norway"] == concepts["flag: Svalbard & Jan Mayen"]
    assert len({concepts[name] for name in ("old man", "old woman", "older person")}) == 1
    assert concepts["cat"] != concepts["dog"]
    assert max(collections.Counter(concepts.values()).values()) <= 12


# Chromatic order of the mean colour of the opaque pixels, from the colour that the name states.
RULES = {
    "red": lambda r, g, b: r > g + 60 and r > b + 60,
    "blue": lambda r, g, b: b > r + 60 and b > g + 20,
    "green": lambda r, g, b: g > r + 30 and g > b + 30,
    "yellow": lambda r, g, b: min(r, g) > b + 60 and abs(r - g) < 90,
    "orange": lambda r, g, b: r > g + 40 > b + 60,
    "purple": lambda r, g, b: min(r, b) > g + 30,
    "brown": lambda r, g, b: 200 > r > g > b,
    "black": lambda r, g, b: max(r, g, b) < 110,
}


@pytest.mark.parametrize("noun", ["circle", "square", "heart", "book"])
def test_pictures_have_the_colour_of_their_name(noun):
    names = {e.name("en"): e.index for e in emoji.load()}
    found = [(colour, names[f"{colour} {noun}"]) for colour in RULES if f"{colour} {noun}" in names]
    assert len(found) >= 3
    for colour, index in found:
        pixels = np.asarray(emoji.image(index), np.float64)
        mean = pixels[..., :3][pixels[..., 3] > 200].mean(0)
        assert RULES[colour](*mean), (colour, noun, mean)


def test_flags_by_their_stripes():
    """Left, middle and right third of three tricolours, as everyone knows them."""
    tricolours = {"France": "blue white red", "Italy": "green white red", "Belgium": "black yellow red"}
    for name, stripes in tricolours.items():
        picture = np.asarray(emoji.image(emoji.find(f"flag: {name}")).convert("RGB"), np.float64)
        for part, colour in zip((0.17, 0.5, 0.83), stripes.split()):
            x, y = int(part * picture.shape[1]), picture.shape[0] // 2
            mean = picture[y - 8 : y + 8, x - 4 : x + 4].mean((0, 1))
            assert mean.min() > 200 if colour == "white" else RULES[colour](*mean), (name, colour, mean)


def test_pictures_are_tight_and_keep_their_aspect():
    ratios = {}
    for e in emoji.load():
        picture = emoji.image(e.index)
        assert picture.size == e.size and max(picture.size) == corpus.CELL and picture.mode == "RGBA"
        left, top, right, bottom = picture.getchannel("A").getbbox()
        assert left <= 1 and top <= 1 and right >= picture.width - 1 and bottom >= picture.height - 1
        ratios[e.name("en")] = picture.width / picture.height
    flags = sorted((name for name in ratios if name.startswith("flag: ")), key=ratios.get)
    assert set(flags[:3]) == {"flag: Nepal", "flag: Switzerland", "flag: Vatican City"}  # as everywhere in the world
    assert ratios[flags[3]] > 1.1 and np.median([ratios[name] for name in flags]) > 1.3
    assert ratios["thermometer"] < 0.7


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pairs_are_deterministic_and_in_budget(split):
    first, second = emoji.Pairs(split, seed=3), emoji.Pairs(split, seed=3)
    pictures = [first[i].image for i in range(100)]
    assert [p.tobytes() for p in pictures] == [second[i].image.tobytes() for i in range(100)]
    assert all(p.width * p.height <= 64 * 64 and min(p.size) >= 16 and p.mode == "RGB" for p in pictures)
    assert len({p.size for p in pictures}) > 10
    assert first[5].texts["en"][0] == emoji.load()[emoji.split(split)[5]].name("en")


def test_only_training_pairs_are_augmented():
    train, held = emoji.Pairs("train"), emoji.Pairs("heldout")
    n = len(emoji.split("train"))
    assert train[7].id == train[7 + n].id and train[7].image.tobytes() != train[7 + n].image.tobytes()
    assert emoji.Pairs("train", seed=1)[7].image.tobytes() != train[7].image.tobytes()
    assert len(held) == 180 and emoji.Pairs("heldout", seed=1)[7].image.tobytes() == held[7].image.tobytes()
    for i in range(180):
        pixels = np.asarray(held[i].image)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == 255).all()


def test_unknown_split():
    with pytest.raises(UserError, match="use train or heldout"):
        emoji.Pairs("test")


def test_size_and_licences():
    assert shipped_bytes() <= LIMIT_BYTES
    table = (corpus.FOLDER / "licenses" / "README.md").read_text(encoding="utf-8")
    for file in corpus.FOLDER.iterdir():
        if file.suffix in (".webp", ".ttf", ".otf", ".tsv", ".model"):
            name = re.sub(r"emoji-\d+\.webp", "emoji-*.webp", file.name)
            row = next((line for line in table.splitlines() if name in line), "")
            notice = row.rstrip(" |").rsplit("| ", 1)[-1]
            assert (corpus.FOLDER / "licenses" / notice).stat().st_size > 500, f"no licence for {file.name}"
    read = {name: (corpus.FOLDER / "licenses" / f"{name}.txt").read_text(encoding="utf-8") for name in
            ("unicode-cldr-core", "fonts-noto-color-emoji", "fonts-noto-cjk", "Apache-2.0")}  # fmt: skip
    assert "COPYRIGHT AND PERMISSION NOTICE" in read["unicode-cldr-core"]
    assert all("SIL OPEN FONT LICENSE" in read[name] for name in ("fonts-noto-color-emoji", "fonts-noto-cjk"))
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in read["Apache-2.0"]

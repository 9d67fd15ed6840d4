"""Renders Noto Color Emoji into WebP sheets and joins them with the names and keywords of Unicode CLDR.

Kept: fully-qualified emoji without a skin tone that the font draws as one glyph and that CLDR names in English and in
Chinese: 1,849 (258 of them flags of countries). Newer emoji than the font fall apart into several glyphs or are blank.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import Any

from PIL import Image, ImageDraw, ImageFont, features

from glmv_jax.data import corpus
from glmv_jax.data.corpus.build import require, ship_licence
from glmv_jax.typing import UserError

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CLDR = "/usr/share/unicode/cldr/common"
BITMAP_SIZE = 109  # the one size at which the font holds bitmaps
ONE_GLYPH = 140  # a single glyph advances 136 px at that size

TONES = range(0x1F3FB, 0x1F400)
VARIATION, JOINER = 0xFE0F, 0x200D
PERSON, CHILD = 0x1F9D1, 0x1F9D2
NEUTRAL = {0x1F468: PERSON, 0x1F469: PERSON, 0x1F466: CHILD, 0x1F467: CHILD}
# The same for those whose genders have code points of their own: dancers, old people, royals, Clauses, the pregnant.
NEUTRAL |= {0x1F57A: 0x1F483, 0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3, 0x1F478: 0x1F934, 0x1FAC5: 0x1F934, 0x1F936: 0x1F385}
NEUTRAL |= {0x1F930: 0x1FAC4, 0x1FAC3: 0x1FAC4}
MODIFIERS = {0x2640, 0x2642, 0x27A1}  # female, male, facing right


def read_annotations(lang: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Names and keywords of CLDR by emoji (without variation selectors)."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for folder in ("annotations", "annotationsDerived"):
        file = require(f"{CLDR}/{folder}/{lang}.xml", "unicode-cldr-core")
        for node in ElementTree.parse(file).iter("annotation"):
            emoji = node.attrib["cp"].replace(chr(VARIATION), "")
            text: Any = node.text  # each has one
            if node.get("type") == "tts":
                names[emoji] = text.strip()
            else:
                keywords[emoji] = [word.strip() for word in text.split("|")]
    return names, keywords


def concept_of(emoji: str) -> str:
    """Emoji that differ only in gender or direction share a concept: "woman cook" and "cook", families of four."""
    points = [NEUTRAL.get(ord(c), ord(c)) for c in emoji if ord(c) != VARIATION]
    kept: list[int] = []
    while points:
        if points[0] == JOINER and len(points) > 1 and points[1] in MODIFIERS:
            points = points[2:]
        else:
            kept.append(points.pop(0))
    return "-".join(f"{p:x}" for p in kept)


def render(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The emoji cropped to its ink and scaled to the cell, or None when it is blank or not one glyph."""
    if font.getlength(emoji) > ONE_GLYPH:
        return None
    canvas = Image.new("RGBA", (2 * ONE_GLYPH, 160))
    ImageDraw.Draw(canvas).text((0, 0), emoji, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    ink = canvas.crop(box)
    scale = corpus.CELL / max(ink.size)
    return ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.LANCZOS)


def merge_twins(rows: list[tuple[str, Image.Image]]) -> dict[str, str]:
    """Emoji -> concept, where emoji with the very same picture (Norway and Svalbard) share one too."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    seen: dict[bytes, str] = {}
    for emoji, picture in rows:
        twin = seen.setdefault(picture.tobytes(), concept_of(emoji))
        one, other = sorted((find(twin), find(concept_of(emoji))))
        parent[other] = one
    return {emoji: find(concept_of(emoji)) for emoji, _ in rows}


def write_sheets(pictures: list[Image.Image]) -> None:
    side = corpus.COLUMNS * corpus.CELL
    for start in range(0, len(pictures), corpus.PER_SHEET):
        sheet = Image.new("RGBA", (side, side))
        for i, picture in enumerate(pictures[start : start + corpus.PER_SHEET]):
            sheet.paste(picture, (i % corpus.COLUMNS * corpus.CELL, i // corpus.COLUMNS * corpus.CELL))
        file = corpus.FOLDER / f"emoji-{start // corpus.PER_SHEET}.webp"
        sheet.save(file, "WEBP", quality=85, alpha_quality=90, method=6)


def build() -> str:
    """Writes emoji-*.webp and emoji.tsv; returns a line of counts."""
    try:
        import emoji as emoji_package
    except ImportError as error:
        raise UserError("the emoji package is missing; pip install emoji") from error
    if not features.check("raqm"):
        raise UserError("Pillow was built without Raqm, which joins emoji sequences; pip install a Pillow wheel")

    font = ImageFont.truetype(str(require(FONT, "fonts-noto-color-emoji")), BITMAP_SIZE)
    annotations = {lang: read_annotations(lang) for lang in ("en", "zh")}
    qualified = emoji_package.STATUS["fully_qualified"]
    rows: list[tuple[str, Image.Image]] = []
    for emoji, facts in emoji_package.EMOJI_DATA.items():
        plain = emoji.replace(chr(VARIATION), "")
        named = all(plain in names for names, _ in annotations.values())
        if facts["status"] == qualified and named and not any(ord(c) in TONES for c in emoji):
            picture = render(emoji, font)
            if picture is not None:
                rows.append((emoji, picture))
    rows.sort(key=lambda row: [ord(c) for c in row[0]])

    concepts = merge_twins(rows)
    lines = ["id\twidth\theight\tconcept\ten\ten_keywords\tzh\tzh_keywords"]
    for emoji, picture in rows:
        fields = ["-".join(f"{ord(c):x}" for c in emoji), str(picture.width), str(picture.height), concepts[emoji]]
        for names, keywords in annotations.values():
            plain = emoji.replace(chr(VARIATION), "")
            others = [word for word in keywords.get(plain, []) if word != names[plain]]
            fields += [names[plain], "|".join(others)]
        lines.append("\t".join(fields))
    (corpus.FOLDER / "emoji.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_sheets([picture for _, picture in rows])
    for package in ("fonts-noto-color-emoji", "unicode-cldr-core"):
        ship_licence(package)
    sizes = Counter(concepts.values())
    return f"{len(rows)} emoji, {len(sizes)} concepts, {sum(n > 1 for n in sizes.values())} with variants"

"""Cuts the fonts down: Latin faces to printable ASCII, Chinese faces to the characters that the sources draw.

Subsets carry a family name of their own (the licences reserve the original names for unmodified fonts), no hinting and
no layout features; copyright and licence notices stay in the file.
"""

from __future__ import annotations

import json

from glmv_jax.data import corpus, documents, emoji
from glmv_jax.data.corpus.build import require, ship_licence
from glmv_jax.data.questions import read
from glmv_jax.typing import UserError

TRUETYPE, OPENTYPE = "/usr/share/fonts/truetype", "/usr/share/fonts/opentype"
ROBOTO = f"{TRUETYPE}/roboto/unhinted/RobotoTTF"
# (shipped name, split, language, file, index in a collection, Debian package)
FACES = (
    ("latin-1.ttf", "train", "en", f"{TRUETYPE}/dejavu/DejaVuSans-Bold.ttf", 0, "fonts-dejavu-core"),
    ("latin-2.ttf", "train", "en", f"{TRUETYPE}/dejavu/DejaVuSerif.ttf", 0, "fonts-dejavu-core"),
    ("latin-3.ttf", "train", "en", f"{TRUETYPE}/lato/Lato-Bold.ttf", 0, "fonts-lato"),
    ("latin-4.ttf", "train", "en", f"{ROBOTO}/Roboto-Medium.ttf", 0, "fonts-roboto-unhinted"),
    ("latin-5.ttf", "train", "en", f"{TRUETYPE}/liberation2/LiberationMono-Bold.ttf", 0, "fonts-liberation2"),
    ("latin-6.ttf", "heldout", "en", f"{TRUETYPE}/open-sans/OpenSans-Semibold.ttf", 0, "fonts-open-sans"),
    ("latin-7.ttf", "heldout", "en", f"{TRUETYPE}/liberation2/LiberationSerif-Bold.ttf", 0, "fonts-liberation2"),
    ("chinese-1.otf", "train", "zh", f"{OPENTYPE}/noto/NotoSansCJK-Regular.ttc", 2, "fonts-noto-cjk"),
    ("chinese-2.otf", "heldout", "zh", f"{OPENTYPE}/noto/NotoSerifCJK-Bold.ttc", 2, "fonts-noto-cjk"),
)
KEPT_NAMES = {0, 13, 14}  # copyright, licence, licence address
UNUSED_TABLES = ["BASE", "DSIG", "FFTM", "GDEF", "GPOS", "GSUB", "LTSH", "STAT", "VDMX", "VORG", "hdmx", "vhea", "vmtx"]


def characters(lang: str) -> str:
    """What a face of `lang` must draw. Chinese: the short emoji names and every word that a source draws."""
    latin = "".join(map(chr, range(0x20, 0x7F)))
    if lang == "en":
        return latin
    names = [e.name("zh") for e in emoji.load() if len(e.name("zh")) <= documents.LONGEST_NAME]
    return "".join(sorted(set(latin + "，。、：？！".join([*names, *documents.WORDS["zh"], read.CHARACTERS]))))


def subset(name: str, lang: str, file: str, number: int) -> int:
    """Writes one subset font; returns its bytes."""
    from fontTools import subset as cutter  # fonttools is a need of this command only

    options = cutter.Options(
        layout_features=[], hinting=False, name_IDs=["*"], notdef_outline=True, font_number=number
    )
    options.drop_tables += UNUSED_TABLES
    font = cutter.load_font(file, options)
    cut = cutter.Subsetter(options)
    cut.populate(text=characters(lang))
    cut.subset(font)

    family = "GLMV " + name.split(".")[0].replace("-", " ").title()
    font["name"].names = [record for record in font["name"].names if record.nameID in KEPT_NAMES]
    for name_id, text in ((1, family), (2, "Regular"), (3, family), (4, family), (6, family.replace(" ", ""))):
        font["name"].setName(text, name_id, 3, 1, 0x409)
    if "CFF " in font:
        cff = font["CFF "].cff
        cff.fontNames = [family.replace(" ", "")]
        for field in ("FullName", "FamilyName", "Weight"):
            if field in cff.topDictIndex[0].rawDict:
                cff.topDictIndex[0].rawDict[field] = family
    target = corpus.FOLDER / name
    cutter.save_font(font, str(target), options)
    return target.stat().st_size


def build() -> str:
    """Writes the subset fonts and fonts.json; returns a line of counts."""
    try:
        import fontTools.subset  # noqa: F401
    except ImportError as error:
        raise UserError("fonttools is missing; pip install fonttools") from error
    total = 0
    for name, _, lang, file, number, package in FACES:
        total += subset(name, lang, str(require(file, package)), number)
    for package in {face[-1] for face in FACES}:
        ship_licence(package)
    table = [{"file": name, "split": split, "lang": lang, "source": file.rsplit("/", 1)[1]}
             for name, split, lang, file, _, _ in FACES]  # fmt: skip
    (corpus.FOLDER / "fonts.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return f"{len(FACES)} faces, {len(characters('zh'))} characters in the Chinese ones, {total / 1e3:.0f} kB"

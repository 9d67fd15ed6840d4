"""Sentences that class names are put into, and class names from files. `{c}` stands for the name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from glmv_jax.config import nearest
from glmv_jax.typing import UserError

# The 80 templates that OpenAI's CLIP used on ImageNet (github.com/openai/CLIP, notebooks/Prompt_Engineering_for_
# ImageNet.ipynb; also `imagenet1k` in CLIP benchmark's en_zeroshot_classification_templates.json). Their mean is what
# counts, so their order does not: those that came with "a" and with "the" stand together.
_A_AND_THE = """
    a bad photo of {a} {c}.|a sculpture of {a} {c}.|a low resolution photo of {a} {c}.|a rendering of {a} {c}.
    graffiti of {a} {c}.|a cropped photo of {a} {c}.|a tattoo of {a} {c}.|{a} embroidered {c}.
    a photo of {a} hard to see {c}.|a bright photo of {a} {c}.|a photo of {a} clean {c}.|a photo of {a} dirty {c}.
    a dark photo of {a} {c}.|a drawing of {a} {c}.|{a} plastic {c}.|a photo of {a} cool {c}.
    a close-up photo of {a} {c}.|a black and white photo of {a} {c}.|a painting of {a} {c}.
    a pixelated photo of {a} {c}.|a jpeg corrupted photo of {a} {c}.|a blurry photo of {a} {c}.|a photo of {a} {c}.
    a good photo of {a} {c}.|{a} {c} in a video game.|a doodle of {a} {c}.|{a} origami {c}.|a sketch of {a} {c}.
    {a} toy {c}.|a rendition of {a} {c}.|a photo of {a} large {c}.|a photo of {a} nice {c}.|a photo of {a} weird {c}.
    {a} cartoon {c}.|art of {a} {c}.|itap of {a} {c}.|{a} plushie {c}.|a photo of {a} small {c}."""
_ALONE = ("a photo of many {c}.", "a photo of my {c}.", "a photo of one {c}.", "itap of my {c}.")
CLIP_80 = tuple(
    template.strip().replace("{a}", article)
    for article in ("a", "the")
    for template in _A_AND_THE.replace("\n", "|").split("|")
    if template.strip()
) + _ALONE

# Written for this project in the manner of the English ones, in Chinese that has no articles to vary. They are not
# Chinese-CLIP's (github.com/OFA-Sys/Chinese-CLIP, cn_clip/eval/cvinw_zeroshot_templates.py): to compare with its
# numbers give those as a file.
ZH = (
    "{c}", "{c}的照片", "一张{c}的照片", "一张{c}的图片", "这是{c}", "图中有{c}", "很多{c}", "一个{c}", "小小的{c}",
    "大大的{c}", "{c}的特写", "{c}的黑白照片", "一张明亮的{c}照片", "一张昏暗的{c}照片", "一张模糊的{c}照片",
    "一张清晰的{c}照片", "一张低分辨率的{c}照片", "{c}的素描", "{c}的油画", "{c}的卡通画", "{c}的涂鸦", "{c}的雕塑",
    "{c}玩具", "{c}的折纸", "游戏里的{c}", "我拍的{c}",
)  # fmt: skip

PLAIN = ("{c}",)

SETS = {"clip_80": CLIP_80, "zh": ZH, "plain": PLAIN}


def filled(template: str, name: str) -> str:
    """The sentence with the name in it."""
    return template.replace("{c}", name)


def templates(which: str, dataset: str = "") -> tuple[str, ...]:
    """A set by name, or those of a file: one a line, a JSON list, or a JSON object with a list for each data set.

    Raises: UserError for no such set or file, or a template without {c}.
    """
    check(which)
    if which in SETS:
        return SETS[which]
    found = _strings(Path(which), dataset)
    found = [template.replace("{}", "{c}") for template in found]  # as big_vision writes them
    if without := [template for template in found if "{c}" not in template]:
        raise UserError(f"{which}: the template {without[0]!r} has no {{c}} where the class name goes")
    return tuple(found)


def check(which: str) -> None:
    """UserError when there is neither a set of templates of that name nor a file."""
    if which not in SETS and not Path(which).is_file():
        raise UserError(f"prompts {which!r} are no set and no file{nearest(which, [*SETS, 'own'])}")


def class_names(path: str | Path, dataset: str = "") -> list[str]:
    """Class names in the order of their numbers: one a line, a JSON list, or a JSON object as CLIP benchmark has it
    ({data set: [names]}).

    Raises: UserError for a file that is missing or has no names for the data set.
    """
    return _strings(Path(path), dataset)


def _strings(path: Path, dataset: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a text file, one a line, or JSON") from None
    if path.suffix == ".json":
        found = list(_of_json(path, text, dataset))
    else:
        found = [line.strip() for line in text.rstrip().split("\n")]
    if not found or not all(isinstance(item, str) and item for item in found):
        raise UserError(f"{path}: an empty line or an entry that is no text; names are counted from the first line on")
    return found


def _of_json(path: Path, text: str, dataset: str) -> Sequence[str]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if isinstance(found, dict):
        short = dataset.rpartition("/")[2]
        if short not in found:
            raise UserError(f"{path} has nothing for data set {short!r}{nearest(short, found)}")
        found = found[short]
    if not isinstance(found, list):
        raise UserError(f"{path}: a list of texts, or an object with one for each data set, was expected")
    return found

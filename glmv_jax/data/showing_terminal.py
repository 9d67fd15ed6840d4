"""A batch for a terminal: text coloured by its loss weight, pictures as a line, what is used of each row."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.rule import Rule
from rich.text import Text

from glmv_jax.data.showing import Picture, Shown

SEGMENTS = ("cyan", "magenta", "yellow", "blue", "red")
LEVELS = ("grey62", "dark_sea_green4", "green4", "green3", "bright_green")  # no loss, then more and more of it
# What would move the cursor or change colours is shown, not sent.
_CONTROL = {n: f"\\x{n:02x}" for n in (*range(10), *range(11, 32), *range(127, 160))}


def show(documents: Sequence[Shown], rows: Sequence[dict[str, tuple[int, int]]], title: str, console: Console) -> None:
    """Prints a batch as `showing.read` and `showing.budgets` give it."""
    heaviest = max((run.weight for each in documents for run in each.runs), default=0.0)
    console.print(Text.assemble((title, "bold"), "  loss weight: ", *legend(heaviest)))
    for b, used in enumerate(rows):
        own = [each for each in documents if each.row == b]
        said = ", ".join(f"{n} of {of} {name}" for name, (n, of) in used.items())
        learnt = sum(each.learnt for each in own)
        console.print(Rule(f"row {b}: {len(own)} documents, {said}, {learnt} learnt", align="left", style="dim"))
        for each in own:
            console.print(Group(_head(each), body(each, heaviest)), soft_wrap=True)


def body(document: Shown, heaviest: float) -> Text:
    """The text of a document, and a line for each picture, where it stands."""
    text = Text()
    for run in document.runs:
        if run.picture < 0:
            text.append(plain(run.text), style=LEVELS[level(run.weight, heaviest)])
        else:
            text.append(_line(run.picture, document.pictures[run.picture]), style="bold " + _colour(document))
    return text


def plain(text: str) -> str:
    """Without what would move the cursor or change colours, which is shown instead; line breaks stay."""
    return text.translate(_CONTROL)


def level(weight: float, heaviest: float) -> int:
    """0 for no loss, else 1 to 4 by the share of the batch's largest weight."""
    return 0 if weight <= 0 else min(4, 1 + int(3.999 * weight / heaviest))


def _line(number: int, picture: Picture) -> str:
    height, width, _ = picture.frames[0].shape
    frames = f", {len(picture.frames)} frames" if len(picture.frames) > 1 else ""
    return f"\n[image {number + 1}: {width}x{height} pixels{frames}, {picture.tokens} {picture.unit}]\n"


def _head(document: Shown) -> Text:
    said = f"{document.source}: {document.tokens} tokens, {document.learnt} learnt"
    return Text(f"▌ segment {document.segment}, {said}", style=_colour(document))


def _colour(document: Shown) -> str:
    return SEGMENTS[(document.segment - 1) % len(SEGMENTS)]


def legend(heaviest: float) -> list[tuple[str, str]]:
    bounds = [f" to {heaviest * n / 4:.3g} " for n in range(1, 5)]
    return [(" 0 ", LEVELS[0]), *((bound, style) for bound, style in zip(bounds, LEVELS[1:]))]

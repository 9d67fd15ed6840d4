"""Tasks as a person looks at them: samples with their pictures, what the gold answer earns and what cheating earns.

In a terminal (pictures in half blocks, where it has colours), or as one page of HTML that loads nothing from anywhere.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glmv_jax.data.records import Sample
from glmv_jax.data.showing_page import framed, png
from glmv_jax.rl.rewards.grade import Grade
from glmv_jax.rl.task import LOW, Task, box, hedged, malformed
from glmv_jax.typing import UserError

LONGEST = 90  # characters of a wrong answer that are shown
Wrong = tuple[str, Grade]


class Example(NamedTuple):
    """A sample, the grade of its gold answer (None where a model grades), and the task's own wrong answers and theirs.

    most: the highest reward of all wrong answers, those that every task is tried with among them.
    """

    sample: Sample
    gold: Grade | None
    wrong: tuple[Wrong, ...]
    most: float

    @property
    def sound(self) -> bool:
        """Whether the gold answer is paid in full and no wrong one more than LOW."""
        return self.gold is None or (self.gold.reward == 1.0 and self.gold.correct and self.most <= LOW)


def examples(task: Task, count: int, split: str = "train", seed: int = 0) -> list[Example]:
    """The first samples of a task. UserError for an unknown split, and where this machine lacks what the task needs."""
    if reason := task.missing():
        raise UserError(reason)
    source = task.source(split, seed)
    return [_example(task, source[i]) for i in range(count)]


def _example(task: Task, sample: Sample) -> Example:
    if task.rubric:
        return Example(sample, None, (), 0.0)
    grade = lambda text: task.verifier(text, sample)  # noqa: E731
    own = tuple((content, grade(box(content))) for content in dict.fromkeys(task.hacks(sample)))
    general = [grade(text) for text in (*malformed(sample.answer), *hedged(sample.answer))]
    most = max(g.reward for g in (*general, *(g for _, g in own)))
    return Example(sample, grade(box(sample.answer)), own, most)


# --- in a terminal ----------------------------------------------------------------------------------------------------


def overview(tasks: Sequence[Task], console: Console, split: str, seed: int) -> bool:
    """A line for each task, of its first sample. Returns whether all are sound; one that cannot be drawn says why."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", "pictures", "prompt", "gold answer", "earns", "wrong earn"):
        table.add_column(name, justify="right" if name.endswith("s") and name != "task" else "left", overflow="fold")
    sound = True
    for task in tasks:
        try:
            (example,) = examples(task, 1, split, seed)
        except UserError as error:
            table.add_row(task.name, "", Text(str(error), style="yellow"), "", "", "")
            continue
        sound &= example.sound
        table.add_row(task.name, sizes(example.sample), _plain(example.sample.prompt), _plain(example.sample.answer),
                      *_earned(example))  # fmt: skip
    console.print(table)
    return sound


def detailed(task: Task, found: Sequence[Example], console: Console) -> None:
    """Samples of one task: pictures, prompt, answers and what they earn."""
    if task.rubric:
        console.print(Text(f"graded by a model: {task.rubric}", style="dim"))
    for example in found:
        sample = example.sample
        console.print(Text(f"\n{sample.id}  {sizes(sample)}", style="bold"))
        for picture in sample.images if console.color_system else ():
            console.print(half_blocks(picture, console.width))
        console.print(Text(f"asked   {_plain(sample.prompt)}"))
        earned, most = _earned(example)
        console.print(
            Text(f"gold    {_plain(sample.answer)}  earns {earned}", style="green" if example.sound else "red")
        )
        for content, grade in example.wrong:
            console.print(Text(f"{grade.reward:7.2f} {_short(content)}", style="dim" if grade.reward <= LOW else "red"))
        if example.gold:
            console.print(Text(f"most that a wrong answer earns: {most}"))


def half_blocks(picture: Image.Image, width: int) -> Text:
    """A picture as text of at most `width` columns: an upper half block is two pixels, one over the other."""
    if picture.width > width:
        picture = picture.resize((width, max(2, picture.height * width // picture.width)), Image.Resampling.BOX)
    text = Text(no_wrap=True)
    pixels: Any = picture.load()
    for y in range(0, picture.height - 1, 2):
        for x in range(picture.width):
            upper, lower = pixels[x, y], pixels[x, y + 1]
            text.append("▀", style=f"rgb({','.join(map(str, upper))}) on rgb({','.join(map(str, lower))})")
        text.append("\n")
    return text


def sizes(sample: Sample) -> str:
    """Of its pictures: 64x48, 2 x 48x48, none."""
    found = list(dict.fromkeys(f"{p.width}x{p.height}" for p in sample.images))
    count = f"{len(sample.images)} x " if len(sample.images) > 1 else ""
    return count + " ".join(found) if found else "none"


def _earned(example: Example) -> tuple[str, str]:
    return ("by a judge", "") if example.gold is None else (f"{example.gold.reward:.2f}", f"{example.most:.2f}")


def _plain(text: str) -> str:
    """One line without control characters and lone surrogates, which a terminal or a page would take amiss."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)


def _short(text: str) -> str:
    text = _plain(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)"


# --- as a page --------------------------------------------------------------------------------------------------------

_STYLE = """
h2 { margin-bottom: .3em }
section { display: inline-block; vertical-align: top; width: 17em; margin: .5em 1em .8em 0 }
img { image-rendering: pixelated; border: 1px solid var(--line); margin: 0 .3em .3em 0; max-width: 100% }
p { margin: .2em 0; overflow-wrap: anywhere } .gold { color: var(--good) } small, li { color: var(--quiet) }
ul { margin: .2em 0; padding-left: 1.2em; font: 12px/1.4 ui-monospace, monospace; overflow-wrap: anywhere }
nav a { margin-right: .8em }
"""


def page(found: Sequence[tuple[Task, Sequence[Example] | str]], title: str) -> str:
    """All samples on a page; a text in place of samples says why there are none. Texts are escaped."""
    e = html.escape
    parts = ["<nav>"]
    parts += [f'<a href="#{e(task.name)}">{e(task.name)}</a> ' for task, _ in found]
    parts.append("</nav>")
    for task, samples in found:
        parts.append(f'<h2 id="{e(task.name)}">{e(task.name)}</h2>')
        if task.rubric:
            parts.append(f"<p><small>graded by a model: {e(task.rubric)}</small></p>")
        parts += [f'<p class="bad">{e(samples)}</p>'] if isinstance(samples, str) else map(_section, samples)
    return framed(title, "".join(parts), _STYLE)


def _section(example: Example) -> str:
    e, sample = html.escape, example.sample
    encoded = ((png(np.asarray(p.convert("RGB"))), 2 * p.width) for p in sample.images)
    pictures = "".join(f'<img src="{src}" width="{wide}" alt="{e(sizes(sample))}">' for src, wide in encoded)
    earned, most = _earned(example)
    wrong = "".join(f'<li{" class=bad" * (grade.reward > LOW)}>{grade.reward:.2f} {e(_short(content))}</li>'
                    for content, grade in example.wrong)  # fmt: skip
    shape = "gold" if example.sound else "bad"
    return (f"<section>{pictures}<p><small>{e(sample.id)}, {e(sizes(sample))}</small></p>"
            f"<p>{e(_plain(sample.prompt))}</p>"
            f'<p class="{shape}">{e(_plain(sample.answer))} <small>earns {earned}</small></p>'
            + (f"<details><summary><small>wrong answers earn {most} at most</small></summary><ul>{wrong}</ul></details>"
               if example.gold else "") + "</section>")  # fmt: skip

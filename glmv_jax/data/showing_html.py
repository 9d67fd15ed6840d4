"""A batch as one self-contained page: as in the terminal, with the pictures and the boxes that the text speaks of."""

from __future__ import annotations

import html
from collections.abc import Sequence

from glmv_jax.data.coordinates import SCALE
from glmv_jax.data.showing import Picture, Shown
from glmv_jax.data.showing_page import framed, png
from glmv_jax.data.showing_terminal import level

STYLE = """
h3 { font-size: .9em; font-weight: 600; margin: 1em 0 .3em; padding-left: .5em; border-left: 4px solid }
.w0 { color: var(--quiet) } .w1 { background: var(--w1) } .w2 { background: var(--w2) } .w3 { background: var(--w3) }
.w4 { background: var(--w4) }
.s0 { border-color: var(--s0) } .s1 { border-color: var(--s1) } .s2 { border-color: var(--s2) }
.s3 { border-color: var(--s3) } .s4 { border-color: var(--s4) }
.frame { position: relative; display: inline-block; max-width: 100% }
.frame img { image-rendering: pixelated; min-height: 96px; max-width: 100%; display: block;
  border: 1px solid var(--line) }
.frame svg { position: absolute; inset: 0; width: 100%; height: 100% }
.frame :is(rect, circle) { fill: none; stroke: var(--mark); stroke-width: 2px; vector-effect: non-scaling-stroke }
.bar { display: inline-block; width: 8em; height: .7em; background: var(--line); vertical-align: middle }
.bar i { display: block; height: 100%; background: var(--bar) }
"""


def page(documents: Sequence[Shown], rows: Sequence[dict[str, tuple[int, int]]], title: str) -> str:
    """The page. Texts are escaped."""
    heaviest = max((run.weight for each in documents for run in each.runs), default=0.0)
    parts = [f"<p>loss weight: {legend(heaviest)}</p>"]
    for b, used in enumerate(rows):
        own = [each for each in documents if each.row == b]
        parts.append(f"<h2>row {b}: {len(own)} documents{''.join(_bar(n, *of) for n, of in used.items())}</h2>")
        parts += [_document(each, heaviest) for each in own]
    return framed(title, "".join(parts), STYLE)


def _document(document: Shown, heaviest: float) -> str:
    said = f"segment {document.segment}, {document.source}: {document.tokens} tokens, {document.learnt} learnt"
    return f'<h3 class="s{(document.segment - 1) % 5}">{html.escape(said)}</h3>{body(document, heaviest)}'


def body(document: Shown, heaviest: float) -> str:
    """The text of a document, coloured by its loss weight, and its pictures where they stand."""
    parts = ["<pre>"]
    for run in document.runs:
        if run.picture < 0:
            style, weight = f"w{level(run.weight, heaviest)}", f"weight {run.weight:.4g}, {run.tokens} tokens"
            parts.append(f'<span class="{style}" title="{weight}">{_escaped(run.text)}</span>')
        else:
            parts.append(_figure(run.picture, document.pictures[run.picture]))
    return "".join([*parts, "</pre>"])


def _escaped(text: str) -> str:
    return html.escape(text).replace("\r", "&#13;")  # a parser takes a bare one for a line feed


def _figure(number: int, picture: Picture) -> str:
    height, width, _ = picture.frames[0].shape
    marks = [f'<rect x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}"/>' for x1, y1, x2, y2 in picture.boxes]
    marks += [f'<circle cx="{x}" cy="{y}" r="12"/>' for x, y in picture.points]
    drawn = f'<svg viewBox="0 0 {SCALE} {SCALE}" preserveAspectRatio="none">{"".join(marks)}</svg>' if marks else ""
    frames = (f'<span class="frame"><img src="{png(frame)}" alt="image {number + 1}">{drawn}</span>'
              for frame in picture.frames)
    caption = f"image {number + 1}: {width}x{height} pixels, {picture.tokens} {picture.unit}"
    return f"<figure>{' '.join(frames)}<figcaption>{caption}</figcaption></figure>"


def _bar(name: str, used: int, of: int) -> str:
    return f', {used} of {of} {name} <span class="bar"><i style="width:{100 * used / of:.1f}%"></i></span>'


def legend(heaviest: float) -> str:
    bounds = ["0", *(f"to {heaviest * n / 4:.3g}" for n in range(1, 5))]
    return " ".join(f'<span class="w{n}">&nbsp;{bound}&nbsp;</span>' for n, bound in enumerate(bounds))

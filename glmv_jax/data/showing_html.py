"""A batch as one self-contained page: as in the terminal, with the pictures and the boxes that the text speaks of."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from glmv_jax.data.coordinates import SCALE
from glmv_jax.data.showing import Picture, Shown
from glmv_jax.data.showing_terminal import level

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
h2 { font-size: 1em; border-top: 1px solid #ccc; padding-top: 1em; margin-top: 2em }
h3 { font-size: .9em; font-weight: 600; margin: 1em 0 .3em; padding-left: .5em; border-left: 4px solid }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.5 ui-monospace, monospace }
.w0 { color: #777 } .w1 { background: #e8f5e9 } .w2 { background: #b9e4bd } .w3 { background: #84cf8c }
.w4 { background: #4caf50 }
.s0 { border-color: #0097a7 } .s1 { border-color: #8e24aa } .s2 { border-color: #f9a825 } .s3 { border-color: #1e63d6 }
.s4 { border-color: #c62828 }
figure { display: inline-block; margin: .4em .6em .4em 0; vertical-align: top }
figcaption { font-size: .8em; color: #555 }
.frame { position: relative; display: inline-block }
.frame img { image-rendering: pixelated; min-height: 96px; max-width: 100%; display: block; border: 1px solid #bbb }
.frame svg { position: absolute; inset: 0; width: 100%; height: 100% }
rect, circle { fill: none; stroke: #e53935; stroke-width: 2px; vector-effect: non-scaling-stroke }
.bar { display: inline-block; width: 8em; height: .7em; background: #eee; vertical-align: middle }
.bar i { display: block; height: 100%; background: #1e63d6 }
"""


def page(documents: Sequence[Shown], rows: Sequence[dict[str, tuple[int, int]]], title: str) -> str:
    """The page. Texts are escaped; nothing is loaded from anywhere."""
    heaviest = max((run.weight for each in documents for run in each.runs), default=0.0)
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>loss weight: {_legend(heaviest)}</p>"]
    for b, used in enumerate(rows):
        own = [each for each in documents if each.row == b]
        parts.append(f"<h2>row {b}: {len(own)} documents{''.join(_bar(n, *of) for n, of in used.items())}</h2>")
        parts += [_document(each, heaviest) for each in own]
    return (
        f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _document(document: Shown, heaviest: float) -> str:
    said = f"segment {document.segment}, {document.source}: {document.tokens} tokens, {document.learnt} learnt"
    parts = [f'<h3 class="s{(document.segment - 1) % 5}">{html.escape(said)}</h3><pre>']
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
    frames = (f'<span class="frame"><img src="{_png(frame)}" alt="image {number + 1}">{drawn}</span>'
              for frame in picture.frames)
    caption = f"image {number + 1}: {width}x{height} pixels, {picture.tokens} tokens"
    return f"<figure>{' '.join(frames)}<figcaption>{caption}</figcaption></figure>"


def _png(pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _bar(name: str, used: int, of: int) -> str:
    return f', {used} of {of} {name} <span class="bar"><i style="width:{100 * used / of:.1f}%"></i></span>'


def _legend(heaviest: float) -> str:
    bounds = ["0", *(f"to {heaviest * n / 4:.3g}" for n in range(1, 5))]
    return " ".join(f'<span class="w{n}">&nbsp;{bound}&nbsp;</span>' for n, bound in enumerate(bounds))

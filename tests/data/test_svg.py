"""The rasteriser of SVG against areas known in closed form, against itself, and against Chromium where there is one."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from glmv_jax.agents import browser
from glmv_jax.data import svg
from glmv_jax.typing import UserError

SIZE = (60, 40)
HEAD = '<svg viewBox="0 0 60 40">'


def picture(inner: str, head: str = HEAD, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.asarray(svg.rasterise(f"{head}{inner}</svg>", size), float)


def ink(inner: str) -> float:
    """Area in pixels of what is painted black on white."""
    return float((255 - picture(inner)).sum() / 255 / 3)


@pytest.mark.parametrize(("inner", "area"), [
    ('<rect x="3" y="4" width="20" height="10"/>', 200),
    ('<rect x="3.5" y="4.25" width="20" height="10"/>', 200),
    ('<rect x="3" y="4" width="20" height="10" rx="4"/>', 200 - (4 - math.pi) * 16),
    ('<circle cx="30" cy="20" r="15"/>', math.pi * 225),
    ('<ellipse cx="30" cy="20" rx="25" ry="10"/>', math.pi * 250),
    ('<polygon points="0,0 40,0 0,40"/>', 800),
    ('<line x1="5" y1="20" x2="45" y2="20" stroke="black" stroke-width="6"/>', 240),
    ('<line x1="5" y1="5" x2="44" y2="31" stroke="black" stroke-width="4"/>', 4 * math.hypot(39, 26)),
    ('<path d="M10 10h20v15h-20z"/>', 300),
    ('<path d="M10,10 L30,10 L30,25 L10,25 Z M12 12H28V20H12z"/>', 300),  # both turn the same way: nonzero
    ('<path d="M10,10 L30,10 L30,25 L10,25 Z M12 12V20H28V12z"/>', 300 - 128),  # a hole
    ('<path d="M0 20Q20 0 40 20Z"/>', 2 / 3 * 40 * 10),  # a parabola's segment: two thirds of its box
    ('<path d="M10 20q10-20 20 0t20 0"/>', 2 * 2 / 3 * 20 * 10),
    ('<rect width="20" height="10" fill="none" stroke="black" stroke-width="2" x="10" y="10"/>',
     22 * 12 - 18 * 8 - (4 - math.pi)),
    ('<g transform="translate(30 20) rotate(30)"><rect x="-8" y="-5" width="16" height="10"/></g>', 160),
    ('<g transform="scale(2)"><circle r="5" cx="10" cy="10"/></g>', math.pi * 100),
    ('<rect width="9" height="9" style="fill:none"/>', 0),
    ('<g fill="none"><rect width="9" height="9" fill="black"/></g>', 81),
    ('<text x="9" y="9">no</text><image href="a.png" width="9" height="9"/>', 0),
])  # fmt: skip
def test_areas(inner, area):
    assert ink(inner) == pytest.approx(area, rel=0.012, abs=1e-9)


def test_order_colours_and_edges():
    pixels = picture('<rect width="60" height="40" fill="#00f"/><rect x="10" y="10" width="4" height="4" fill="red"/>')
    assert (pixels[10:14, 10:14] == (255, 0, 0)).all() and (pixels[9, :] == (0, 0, 255)).all()
    half = picture('<rect x="10.5" y="10" width="4" height="4"/>')
    assert half[11, 10, 0] == pytest.approx(127.5, abs=1) and half[11, 11, 0] == 0


@pytest.mark.parametrize(("one", "other"), [
    ('<rect x="5" y="6" width="20" height="12"/>', '<path d="m5 6h20v12h-20z"/>'),
    ('<polygon points="5,5 30,9 12,33"/>', '<path d="M5 5L30 9 12 33Z"/>'),
    ('<polyline points="5,5 30,9 12,33" fill="none" stroke="black"/>',
     '<path d="M5 5l25 4-18 24" fill="none" stroke="black"/>'),
    ('<path d="M5 20C5 5 30 5 30 20S55 35 55 20"/>', '<path d="M5 20C5 5 30 5 30 20C30 35 55 35 55 20"/>'),
    ('<rect x="10" y="4" width="6" height="8" transform="translate(3,2) scale(2)"/>',
     '<rect x="23" y="10" width="12" height="16"/>'),
    ('<rect x="10" y="4" width="6" height="8" transform="rotate(90 30 20)"/>',
     '<rect x="38" y="0" width="8" height="6"/>'),
    ('<circle cx="20" cy="20" r="9"/>', '<ellipse cx="20" cy="20" rx="9" ry="9"/>'),
])  # fmt: skip
def test_two_ways_to_write_one_picture(one, other):
    np.testing.assert_allclose(picture(one), picture(other), atol=1)


def test_the_view_box_is_fitted_and_centred():
    box = '<rect width="10" height="10"/>'
    seen = 255 - picture(box, '<svg viewBox="0 0 10 10">')[..., 0]  # 40 pixels high in the middle of 60
    assert (seen[:, 10:50] == 255).all() and seen[:, :10].sum() == seen[:, 50:].sum() == 0
    np.testing.assert_array_equal(picture(box, '<svg width="60" height="40">'), picture(box))


DRAWN = (
    '<rect x="4" y="5" width="20" height="14" rx="3" fill="#c80a19"/><circle cx="40" cy="22" r="11" fill="orange"/>',
    '<path d="M6 34Q20 2 30 20T54 12" fill="none" stroke="green" stroke-width="3"/>',
    '<g transform="rotate(20 30 20)"><ellipse cx="30" cy="20" rx="22" ry="8" fill="rgb(20,70,220)"/></g>',
    '<polygon points="30,2 36,36 6,14 54,14 24,36" fill="purple"/>',  # a star that crosses itself
    '<path d="M5 5C60 5 0 35 55 35V5z" fill="#130" stroke="pink" stroke-width="2"/>',
)


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")
def test_chromium_draws_the_same():
    for inner in DRAWN:
        html = f'<body style="margin:0"><svg width="60" height="40" style="display:block">{inner}</svg>'
        theirs = np.asarray(browser.render(html, SIZE).picture, float)
        ours = picture(inner)
        covered = (np.abs(theirs - 255).sum(-1) > 0).sum()
        # Only at the edges, where the two smooth differently.
        assert np.abs(ours - theirs).mean(-1).sum() / 255 < 0.04 * covered
        assert (np.abs(ours - theirs).max(-1) > 60).sum() < 0.04 * covered


@pytest.mark.parametrize("code", [
    "", "<svg", "<p/>", "<svg><rect></svg>", '<!DOCTYPE svg [<!ENTITY a "b">]><svg/>', "<svg><![CDATA[x]]></svg>",
    '<svg viewBox="0 0 0 0"/>', '<svg viewBox="0 0 9 -9"/>', '<svg><path d="M1 1A5 5 0 0 0 9 9"/></svg>',
    '<svg><path d="L1 1"/></svg>', '<svg><path d="M1"/></svg>', '<svg><rect width="100%" height="9"/></svg>',
    '<svg><rect width="9" height="9" fill="url(#a)"/></svg>', '<svg><g transform="skewX(3)"/></svg>',
    "<svg>" + "<g>" * 70 + "</g>" * 70 + "</svg>", '<svg><path d="M0 0' + "q1 1 2 2" * 120 + '"/></svg>',
    '<svg><g transform="scale(1e9)"><g transform="scale(1e9)">' * 20 + "</g></g>" * 20 + "</svg>", "\ud800", "\0",
])  # fmt: skip
def test_what_is_not_read_is_refused(code):
    with pytest.raises(UserError):
        svg.rasterise(code, SIZE)


def test_nothing_else_is_ever_raised():
    """Gold-like drawings with characters lost, doubled and exchanged."""
    rng = random.Random(0)
    drawn = 0
    for n in range(400):
        text = list(f"{HEAD}{DRAWN[n % len(DRAWN)]}</svg>")
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at] = rng.choice(("", text[at] * 3, rng.choice('0123456789.-e"<>/ MCZz#%()')))
        try:
            svg.rasterise("".join(text), SIZE)
            drawn += 1
        except UserError:
            continue
    assert 40 < drawn < 400

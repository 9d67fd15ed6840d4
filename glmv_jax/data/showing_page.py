"""The frame of a self-contained page, readable in light and dark, and pictures within it."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #16181d; --quiet: #626a76; --line: #d5dae0; --card: #f4f5f7;
  --bad: #b3261e; --good: #1b7f3a; --mark: #e53935; --bar: #1e63d6;
  --w1: #e4f4e6; --w2: #bfe6c3; --w3: #8fd497; --w4: #55b560;
  --s0: #0097a7; --s1: #8e24aa; --s2: #f9a825; --s3: #1e63d6; --s4: #c62828 }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --fg: #e7e9ee; --quiet: #9aa3b0; --line: #333842;
  --card: #1d2026; --bad: #ff8a80; --good: #6fcf7c; --mark: #ff6659; --bar: #5aaef0;
  --w1: #17301b; --w2: #1d4824; --w3: #21562a; --w4: #266e37;
  --s0: #4dd0e1; --s1: #ce93d8; --s2: #ffca28; --s3: #5aaef0; --s4: #ff8a80 } }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em;
  background: var(--bg); color: var(--fg) }
h1 { font-size: 1.5em } a { color: var(--bar) }
h2 { font-size: 1em; border-top: 1px solid var(--line); padding-top: 1em; margin-top: 2em }
.bad { color: var(--bad) } .quiet { color: var(--quiet) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.5 ui-monospace, monospace }
figure { display: inline-block; margin: .4em .6em .4em 0; vertical-align: top; max-width: 100% }
figcaption { font-size: .8em; color: var(--quiet) }
"""


def framed(title: str, body: str, style: str = "") -> str:
    """The page of a body that is escaped already. Nothing is loaded from anywhere."""
    said = html.escape(title)
    return (
        '<!DOCTYPE html><html><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{said}</title><style>{_STYLE}{style}</style></head><body><h1>{said}</h1>{body}</body></html>\n"
    )


def png(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] as a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

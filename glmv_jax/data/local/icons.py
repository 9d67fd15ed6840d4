"""Pictures of icons with the SVG that draws them, from the icon themes installed on a machine: read, never copied.

A theme draws many of its icons twice, scalable and as PNG at some sizes:

    Adwaita/scalable/status/alarm-symbolic.svg      Adwaita/96x96/status/alarm-symbolic.symbolic.png

(GTK marks the PNG of an icon that takes the text's colour with ".symbolic".) So no rasteriser is needed: a document is
the largest PNG that shares theme, context and name, then the code of the SVG.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from glmv_jax.data.local.readers import Documents
from glmv_jax.typing import UserError

LONGEST = 2000  # bytes of an SVG; longer ones are drawings rather than icons
_NOT_DRAWN = re.compile(rb"<\?xml.*?\?>|<!--.*?-->|<!DOCTYPE.*?>|<metadata.*?</metadata>", re.DOTALL)


class Icons(Documents):
    """The pairs below one folder, such as /usr/share/icons; `files` is [its path]. UserError: there is none."""

    kind = "icons"

    def _counts(self) -> list[int]:
        self._root = os.path.expanduser(self.files[0])
        self._pairs = pairs(self._root)
        if not self._pairs:
            raise UserError(
                f"source {self.name!r}: below {self.files[0]} no SVG of up to {LONGEST} bytes has a PNG of its name in "
                "the same theme; install an icon theme (Debian: adwaita-icon-theme, breeze-icon-theme), or take the "
                "source out"
            )
        return [len(self._pairs)]

    def _read(self, file: int, row: int, picture: bool) -> dict[str, Any]:
        svg, png = self._pairs[row]
        if not picture:
            return {"category": "coding"}
        code = drawing((Path(self._root) / svg).read_bytes())
        return {"category": "coding", "image": (Path(self._root) / png).read_bytes(), "text": code}

    def id(self, i: int) -> str:
        return self._pairs[i][0]

    def per_file(self, what: str, of_file: Callable[[int], np.ndarray]) -> np.ndarray:
        return of_file(0)  # a folder's own time says nothing of its files': not kept


def pairs(root: str) -> list[tuple[str, str]]:
    """(SVG, the largest PNG of its theme, context and name), paths below the root, in order; links are left out."""
    svgs: dict[tuple[str, str, str], str] = {}
    pngs: dict[tuple[str, str, str], tuple[int, str]] = {}
    for folder, _, names in os.walk(root):
        inside = os.path.relpath(folder, root).split(os.sep)
        theme, context = inside[0], inside[-1]
        for name in names:
            path = os.path.join(folder, name)
            stem, extension = os.path.splitext(name)
            if extension not in (".svg", ".png") or os.path.islink(path):
                continue
            key, below = (theme, context, stem.removesuffix(".symbolic")), os.path.join(*inside, name)
            if extension == ".png":
                pngs[key] = max(pngs.get(key, (0, "")), (os.path.getsize(path), below))
            elif os.path.getsize(path) <= LONGEST:
                svgs[key] = min(svgs.get(key, below), below)
    return sorted((svg, pngs[key][1]) for key, svg in svgs.items() if key in pngs)


def drawing(svg: bytes) -> str:
    """The code of an SVG without what draws nothing (prolog, comments, metadata) and without line breaks."""
    return " ".join(_NOT_DRAWN.sub(b"", svg).decode().split())

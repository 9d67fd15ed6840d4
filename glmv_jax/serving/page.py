"""The page at /: one file that asks this server alone, and loads nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re

from starlette.responses import HTMLResponse, Response


def response() -> Response:
    """The page. Of scripts a browser runs its one and no other, whatever an answer spells."""
    text = importlib.resources.files("glmv_jax.serving").joinpath("page.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
        "media-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": rules, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff",
               "Referrer-Policy": "no-referrer"}  # fmt: skip
    return HTMLResponse(text, headers=headers)

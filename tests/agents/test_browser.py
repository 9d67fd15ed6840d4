"""Pages in a real headless Chromium: what is drawn where, nothing run, nothing loaded, and no browser left behind."""

from __future__ import annotations

import contextlib
import http.server
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest

from glmv_jax.agents import browser
from glmv_jax.typing import UserError

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "-")

PAGE = (
    '<body style="margin:0;background:#fff"><div style="height:10px;background:#1446dc"></div>'
    '<p style="margin:5px 8px;color:#c80a19">a &lt; b</p>'
    '<div style="width:20px;height:9px;border:1px solid #000"></div><i style="display:none">no</i>'
)


def test_blocks_are_where_the_pixels_are():
    page = browser.render(PAGE, (64, 70))
    pixels = np.asarray(page.picture)
    assert page.picture.size == (64, 70) and (pixels[:10] == (20, 70, 220)).all() and (pixels[60:] == 255).all()
    body, bar, text, field = page.blocks
    assert bar == browser.Block("", (0, 0, 64, 10), (20, 70, 220)) and body.colour == (255, 255, 255)
    assert text.text == "a < b" and text.colour == (200, 10, 25) and text.box[:2] == (8, 15)
    assert field.colour == (0, 0, 0) and field.box[2:] == (22, field.box[1] + 11)
    again = browser.render(PAGE, (64, 70))
    assert again.blocks == page.blocks and again.picture.tobytes() == page.picture.tobytes()


def test_nothing_runs_and_nothing_is_loaded(tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

        def log_message(self, *_):
            return

    (tmp_path / "a.css").write_text("body{background:red}")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        page = browser.render(
            f'<body><script>document.body.style.background="red"</script><img src="{here}/i"><iframe src="{here}/f">'
            f'</iframe><link rel="stylesheet" href="{here}/s"><link rel="stylesheet" href="file://{tmp_path}/a.css">'
            f'<div style="background:url({here}/u)">x</div><img src=x onerror="document.body.style.background=\'red\'">'
            f'<style>@import "{here}/m";</style><meta http-equiv="refresh" content="0;url={here}/r">', (40, 40),
        )  # fmt: skip
        server.shutdown()
    assert asked == []
    assert page is None or (255, 0, 0) not in {tuple(p) for p in np.asarray(page.picture).reshape(-1, 3).tolist()}


def running(profile: str) -> bool:
    """Whether a process was started with a profile's folder; those that have ended have no command line any more."""
    found = False
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found |= profile.encode() in path.read_bytes()
    return found


def test_a_browser_that_does_not_answer_is_replaced(monkeypatch):
    browser.render("<p>a", (16, 16))
    profile = browser._browser(os.getpid())._profile.name
    assert running(profile)
    with monkeypatch.context() as patch:
        patch.setattr(browser, "PAGE", 0.0)
        assert browser.render("<p>a", (16, 16)) is None
    deadline = time.monotonic() + 30
    while running(profile) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(profile) and not os.path.exists(profile)
    assert browser.render("\ud800<p>b", (16, 16)).blocks[-1].text == "b"


def test_what_killed_processes_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"{ended.pid}-a", f"{os.getpid()}-b", "x-c"):
        (tmp_path / f"glmv-chromium-{name}" / "Default").mkdir(parents=True)
    browser._sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"glmv-chromium-{os.getpid()}-b", "glmv-chromium-x-c"]


def test_no_browser_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="rendered by Chromium, and none of chromium.*Debian: chromium"):
        browser.Browser()

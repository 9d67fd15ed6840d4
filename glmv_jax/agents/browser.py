"""Pages as a headless Chromium shows them: their picture, and what is drawn where. No script runs, nothing is loaded.

Chromium is driven over its DevTools pipe, so that it needs no driver and ends when we do. One browser serves a process;
a page that does not come in time costs its browser, and the next page starts another one.
"""

from __future__ import annotations

import atexit
import base64
import functools
import io
import json
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, NamedTuple

from PIL import Image

from glmv_jax.typing import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START, PAGE = 60.0, 10.0  # seconds that a browser may take to start, and a page to come
_RULES = "default-src 'none'; style-src 'unsafe-inline'"
_HEAD = f'<!DOCTYPE html><meta http-equiv="Content-Security-Policy" content="{_RULES}">'
_PREFIX = "glmv-chromium-"
_STYLES = ("color", "background-color", "border-top-width", "border-top-color")
# The pipe's ends have to be descriptors 3 and 4 of the browser.
_START_ON_PIPE = (
    "import fcntl, os, sys\n"
    "ends = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]\n"
    "os.dup2(ends[0], 3), os.dup2(ends[1], 4)\n"
    "os.execv(sys.argv[3], sys.argv[3:])"
)


class Block(NamedTuple):
    """Something that is drawn. text: "" for an area. box: left, top, right, bottom in pixels. colour: of the letters or
    of the area."""

    text: str
    box: tuple[float, float, float, float]
    colour: tuple[int, int, int]


class Page(NamedTuple):
    """A page in a window of some size: RGB, and its blocks in the order of the document."""

    picture: Image.Image
    blocks: tuple[Block, ...]


def missing() -> str:
    """Why pages cannot be rendered here, "" when they can."""
    if any(map(shutil.which, NAMES)):
        return ""
    return (
        f"pages are rendered by Chromium, and none of {', '.join(NAMES)} is on the PATH; install one "
        "(Debian: chromium), or leave the task out"
    )


def render(html: str, size: tuple[int, int]) -> Page | None:
    """A page in a window of `size` (width, height) pixels, None when it does not come within PAGE seconds.

    Raises UserError where there is no browser, or it does not start.
    """
    with _lock:
        browser = _browser(os.getpid())
        try:
            return browser.render(html, size)
        except (TimeoutError, ConnectionError, _PageError):
            browser.close()
            _browser.cache_clear()
            return None


_lock = threading.Lock()


class _PageError(Exception):
    """The browser refuses a command."""


@functools.lru_cache(maxsize=1)
def _browser(process: int) -> Browser:
    """The browser of a process: one that has been forked away from it takes its own."""
    browser = Browser()
    atexit.register(browser.close)
    return browser


class Browser:
    """One Chromium and the pipe to it."""

    def __init__(self) -> None:
        if reason := missing():
            raise UserError(reason)
        self._owner, self._number, self._buffer = os.getpid(), 0, b""
        _sweep()
        self._profile = tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        program = next(filter(None, map(shutil.which, NAMES)))
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START_ON_PIPE, str(theirs_in), str(theirs_out), program,
             *_flags(self._profile.name)],
            pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            self._call("Browser.getVersion", deadline=time.monotonic() + START)
        except (TimeoutError, ConnectionError) as error:
            self.close()
            raise UserError(
                f"{program} does not start ({error}); try it with --headless --dump-dom about:blank"
            ) from None

    def render(self, html: str, size: tuple[int, int]) -> Page:
        """See `render`. TimeoutError, ConnectionError: the browser is lost."""
        call = functools.partial(self._call, deadline=time.monotonic() + PAGE)
        target = call("Target.createTarget", url="about:blank")["targetId"]
        session = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        call = functools.partial(call, session=session)
        call("Emulation.setScriptExecutionDisabled", value=True)
        call("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)
        frame = call("Page.getFrameTree")["frameTree"]["frame"]["id"]
        call("Page.setDocumentContent", frameId=frame, html=_HEAD + html.encode("utf-8", "replace").decode())
        shot = call("Page.captureScreenshot", format="png")["data"]
        told = call("DOMSnapshot.captureSnapshot", computedStyles=list(_STYLES))
        self._call("Target.closeTarget", targetId=target, deadline=time.monotonic() + PAGE)
        return Page(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB"), tuple(_blocks(told)))

    def close(self) -> None:
        """Ends the browser and all its processes; a second time, or in a forked process, nothing happens."""
        if self._process is None or os.getpid() != self._owner:
            return
        for end in (self._in, self._out):
            os.close(end)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._process = None
        self._profile.cleanup()

    def _call(self, method: str, *, deadline: float, session: str = "", **parameters: Any) -> dict[str, Any]:
        self._number += 1
        said = {"id": self._number, "method": method, "params": parameters}
        if session:
            said["sessionId"] = session
        data = json.dumps(said).encode() + b"\0"
        while data:
            self._wait(self._out, select.POLLOUT, deadline, method)
            data = data[os.write(self._out, data) :]
        while True:
            head, end, rest = self._buffer.partition(b"\0")
            if not end:
                self._wait(self._in, select.POLLIN, deadline, method)
                chunk = os.read(self._in, 1 << 16)
                if not chunk:
                    raise ConnectionError("the browser is gone")
                self._buffer += chunk
                continue
            self._buffer = rest
            answer = json.loads(head)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise _PageError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]

    @staticmethod
    def _wait(end: int, event: int, deadline: float, method: str) -> None:
        ready = select.poll()
        ready.register(end, event)
        if not ready.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
            raise TimeoutError(f"no answer to {method} in time")


def _sweep() -> None:
    """Removes what processes that were killed have left: a profile is a few megabytes."""
    for folder in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):  # not ours, or another user's
            continue


def _flags(profile: str) -> list[str]:
    flags = [
        "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-gpu", "--no-first-run",
        "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio", "--force-device-scale-factor=1",
        "--disable-lcd-text", "--font-render-hinting=none", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--proxy-server=127.0.0.1:9", "--proxy-bypass-list=<-loopback>",
    ]  # fmt: skip
    # Chromium refuses its own sandbox to a superuser.
    return [*flags, *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank"]


def _blocks(told: dict[str, Any]) -> list[Block]:
    """What a DOM snapshot says is drawn: text, and areas that have a colour or a frame of their own."""
    strings, document = told["strings"], told["documents"][0]
    names, layout = document["nodes"]["nodeName"], document["layout"]
    blocks = []
    for node, styles, bounds, text in zip(*(layout[k] for k in ("nodeIndex", "styles", "bounds", "text"))):
        x, y, width, height = bounds
        if width <= 0 or height <= 0:
            continue
        box = (x, y, x + width, y + height)
        said = " ".join(strings[text].split()) if text >= 0 else ""
        style = dict(zip(_STYLES, (strings[n] for n in styles)))
        if strings[names[node]] == "#text":
            blocks += [Block(said, box, _rgb(style["color"]) or (0, 0, 0))] if said else []
        elif style:
            framed = style["border-top-width"] not in ("0px", "")
            colour = _rgb(style["background-color"]) or (_rgb(style["border-top-color"]) if framed else None)
            blocks += [Block("", box, colour)] if colour else []
    return blocks


def _rgb(text: str) -> tuple[int, int, int] | None:
    """A computed colour; None for one that cannot be seen."""
    numbers = [float(n) for n in re.findall(r"[0-9.]+", text)] if text.startswith("rgb") else []
    if len(numbers) < 3 or (len(numbers) > 3 and numbers[3] == 0):
        return None
    red, green, blue = (int(n) for n in numbers[:3])
    return red, green, blue

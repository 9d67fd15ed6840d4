"""MiniWoB++ (Farama-Foundation/miniwob-plusplus, MIT) in a headless Chromium: tasks on small web pages, seen as
screenshots and acted on by mouse and keyboard. Reward is `raw_reward`, which does not fall with time.

A page is loaded anew for every episode, with no button held and the pointer beside it, so that the first screenshot of
a seed is always the same. Pages give up by themselves after ten seconds; a model needs longer: `play.Limits` decide.
Some pages tell the date or the time and are not the same every day; MiniWoB++ marks them (`nondeterministic`).

The browser starts with the first episode and lives until `close`, or until it dies: the episode in which it does has
failed, the next begins with another. Needs the programs chromium and chromedriver, looked for where programs are.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data import coordinates
from glmv_jax.rl.envs.calls import Acting, Refused, Reply, inside, tool
from glmv_jax.rl.gym import Observation, asked
from glmv_jax.typing import UserError

POINT: dict[str, Any] = {"x": "integer", "y": "integer"}
KEYS = "<Enter>, <Tab>, <Backspace>, <Delete>, <Space>, <ArrowUp>, <ArrowDown>, <ArrowLeft>, <ArrowRight>"
TOOLS = (
    tool("click", "Clicks. Coordinates are 0..999 from the top left corner of the screenshot.", **POINT),
    tool("double_click", "Clicks twice.", **POINT),
    tool("move", "Moves the pointer.", **POINT),
    tool("drag", "Moves the pointer from a point to another with the button held.", x1="integer", y1="integer",
         x2="integer", y2="integer"),
    tool("scroll", "Turns the wheel.", direction={"type": "string", "enum": ["up", "down"]}, **POINT),
    tool("type", "Types letters where the focus is.", text="string"),
    tool("press", f"Presses a key: a letter, one of {KEYS}, or with control, as C-a.", key="string"),
    tool("wait", "Does nothing for a moment."),
)  # fmt: skip
LONGEST = 200  # letters typed at once

_OPENING = threading.Lock()
_LATER = """
clearTimeout(core.EP_TIMER);
core.EP_TIMER = setTimeout(function() { core.endEpisode(-1, false, 'timed out'); }, 1e9);
"""


def names() -> list[str]:
    """The tasks there are, without the versions of their ids: "click-test", ..."""
    found = [id_.removeprefix("miniwob/") for id_ in _package().registry if id_.startswith("miniwob/")]
    return sorted({name.rpartition("-v")[0] for name in found})


def missing() -> str:
    """Why there can be no browser here, "" if there can."""
    if lacking := [name for name in ("gymnasium", "miniwob") if not importlib.util.find_spec(name)]:
        return f'{" and ".join(lacking)} not installed; run pip install "glmv_jax[rl]"'
    if lacking := [name for name in ("chromium", "chromedriver") if not _program(name)]:
        return f"no {' and no '.join(lacking)} here; install the system's packages chromium and chromium-driver"
    return ""


class Browser(Acting):
    """task: one of `names()`.   pause: seconds between an action and the screenshot after it.   tools: names of those
    of TOOLS that are announced and may be called; () for all.

    utterance: what the page asks for. size: (width, height) of screenshots.
    dom: the page as MiniWoB++ describes it (`miniwob.dom.DOMElement`), for a script.
    """

    def __init__(self, task: str, pause: float = 0.05, tools: Sequence[str] = ()):
        if task not in names():
            raise UserError(f"miniwob has no task {task!r}; `envs.browser.names()` lists them")
        if unknown := [name for name in tools if name not in _ACTIONS]:
            raise UserError(f"a browser has no tool {unknown[0]!r}; it has {', '.join(_ACTIONS)}")
        self.tools = [each for each in TOOLS if not tools or each["function"]["name"] in tools]
        self.source = f"miniwob/{task}"
        self._task, self._pause = task, pause
        self._env: Any = None
        self._opening: object = None
        self._end: Callable[[], None] = lambda: None
        self.dom: Any = None

    def reset(self, seed: int) -> Observation:
        env = self._env or self._open()
        _still(env.instance)
        seen, info = env.reset(seed=seed)
        env.instance.driver.execute_script(_LATER)
        self.dom = info["root_dom"]
        picture = Image.fromarray(seen["screenshot"])
        self.size, self.utterance = picture.size, seen["utterance"]
        return asked(self.utterance, [picture], self.tools)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Reply:
        from selenium.common import exceptions

        try:
            for action in _ACTIONS[name](self, **arguments):
                seen, _, done, _, info = self._env.step(action)
                if done:
                    return Reply(done=True, reward=float(info["raw_reward"]), info={"reason": info["reason"]})
        except (exceptions.InvalidArgumentException, exceptions.MoveTargetOutOfBoundsException) as error:
            raise Refused(f"the browser refuses ({(error.msg or '').splitlines()[0][:100]})") from None
        self.dom = info["root_dom"]
        return Reply(images=(Image.fromarray(seen["screenshot"]),))

    def close(self) -> None:
        self._env = self._opening = self.dom = None
        self._end()

    # ------------------------------------------------------------------------------------------------------- actions
    def _action(self, kind: str, point: tuple[int, int] | None = None, **more: Any) -> dict[str, Any]:
        action = {"action_type": self._env.action_space_config.action_types.index(kind)} | more
        if point is not None:
            inside(*point)
            action["coords"] = np.array(coordinates.decode_point(point, *self.size), np.float32)
        return action

    def _type(self, text: str) -> list[dict[str, Any]]:
        if len(text) > LONGEST or not text.isprintable() or any(ord(letter) > 0xFFFF for letter in text):
            raise Refused(f"only up to {LONGEST} letters of one line can be typed, and of the basic plane")
        return [self._action("TYPE_TEXT", text=text)]

    def _press(self, key: str) -> list[dict[str, Any]]:
        allowed = self._env.action_space_config.allowed_keys
        if key not in allowed:
            raise Refused(f"there is no key {key[:20]!r}; press a letter, {KEYS}, or C-a, C-c, C-v, C-x")
        return [self._action("PRESS_KEY", key=allowed.index(key))]

    # ------------------------------------------------------------------------------------------------------- process
    def _open(self) -> Any:
        """Starts a browser. One at a time, so that one whose start fails is told from those of others."""
        self._opening = mine = object()
        if reason := missing():
            raise UserError(reason)
        gymnasium = _package()
        os.environ.setdefault("SE_OFFLINE", "true")  # nothing is looked for or fetched elsewhere
        os.environ.setdefault("MINIWOB_CHROME_BINARY", _program("chromium"))
        os.environ.setdefault("MINIWOB_CHROMEDRIVER", _program("chromedriver"))
        with _OPENING:
            before = _drivers()
            try:
                made = gymnasium.make(f"miniwob/{self._task}-v1", disable_env_checker=True, wait_ms=1000 * self._pause,
                                      refresh_freq=1)  # fmt: skip
            except Exception:
                _kill(_drivers() - before)
                raise
            started = _drivers() - before
        driver = made.unwrapped.instance.driver
        # Also when this object is forgotten, and when the program ends.
        end = weakref.finalize(self, _quit, driver, started, _folders(driver))
        if self._opening is not mine:
            end()
            raise RuntimeError("it was closed while its browser started")
        self._env, self._end = made.unwrapped, end
        return self._env


_ACTIONS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "click": lambda self, x, y: [self._action("CLICK_COORDS", (x, y))],
    "double_click": lambda self, x, y: [self._action("DBLCLICK_COORDS", (x, y))],
    "move": lambda self, x, y: [self._action("MOVE_COORDS", (x, y))],
    "drag": lambda self, x1, y1, x2, y2: [
        self._action("MOUSEDOWN_COORDS", (x1, y1)), self._action("MOVE_COORDS", (x2, y2)),
        self._action("MOUSEUP_COORDS", (x2, y2))],
    "scroll": lambda self, x, y, direction: [self._action(f"SCROLL_{direction.upper()}_COORDS", (x, y))],
    "type": Browser._type,
    "press": Browser._press,
    "wait": lambda self: [self._action("NONE")],
}  # fmt: skip


def _still(instance: Any) -> None:
    """No button or key is held, and the pointer is where no page is."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    ActionBuilder(instance.driver).clear_actions()
    pointer = ActionBuilder(instance.driver, duration=0)
    pointer.pointer_action.move_to_location(instance.inner_width - 2, instance.inner_height - 2)
    pointer.perform()


def _package() -> Any:
    try:
        import gymnasium
        import miniwob
    except ImportError as error:
        raise UserError(f'{error.name} is not installed; run pip install "glmv_jax[rl]"') from None
    gymnasium.register_envs(miniwob)
    return gymnasium


def _program(name: str) -> str:
    return shutil.which(name) or (shutil.which("google-chrome") or "" if name == "chromium" else "")


def _folders(driver: Any) -> list[pathlib.Path]:
    """What a browser keeps on disk and leaves there: its profile, and the folder of the socket in it."""
    profile = pathlib.Path(driver.capabilities["chrome"]["userDataDir"])
    socket = profile / "SingletonSocket"
    return [profile, socket.readlink().parent] if socket.is_symlink() else [profile]


def _quit(driver: Any, started: Iterable[int], folders: Iterable[pathlib.Path]) -> None:
    """Ends a browser politely where it still listens, and in any case."""
    polite = threading.Thread(target=_politely, args=(driver,), daemon=True)
    polite.start()
    polite.join(5.0)
    _kill(started)
    driver.service.process.wait(5.0)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _politely(driver: Any) -> None:
    from selenium.common.exceptions import WebDriverException
    from urllib3.exceptions import HTTPError

    try:
        driver.quit()
    except (WebDriverException, HTTPError, OSError):
        return  # it is dead; what is left of it is killed


def _drivers() -> set[int]:
    """Process ids of the chromedrivers that this process has started."""
    return {pid for pid, (name, parent) in _processes().items() if name == "chromedriver" and parent == os.getpid()}


def _kill(drivers: Iterable[int]) -> None:
    """Kills drivers of this process and all that they have started; returns when they have ended."""
    processes = _processes()
    doomed = {pid for pid in drivers if processes.get(pid, ("", 0))[0] == "chromedriver"}
    while more := {pid for pid, (_, parent) in processes.items() if parent in doomed} - doomed:
        doomed |= more
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    end = time.monotonic() + 5.0
    while doomed & _processes().keys() and time.monotonic() < end:
        time.sleep(0.01)


def _processes() -> dict[int, tuple[str, int]]:
    """(name, parent) of every process that has not ended, by its id."""
    found = {}
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                head, _, rest = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
            except OSError:  # it has ended meanwhile
                continue
            state, parent = rest.split()[:2]
            if state != "Z":
                found[int(folder.name)] = head.partition("(")[2], int(parent)
    return found

"""What the comparisons share: contenders in processes of their own that run in turns, and what they were measured on.

torch and JAX fight over memory and threads inside one process, so each contender is a process that a script starts of
itself (`--contender`, a JSON spec) and that does nothing between its turns. A request is a line of JSON that names a
method, an answer another line; an error is an answer too, so that one contender which fails costs its own row only.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow",
            "torch", "torchvision", "transformers", "timm", "open_clip_torch")  # fmt: skip


class Failed(Exception):
    """A contender gave an error, ended, or did not answer in time; the message is one line."""


class Contender:
    """The process. `tell` starts a method in it, `answer` waits for what it returns, `ask` does both.

    Args:
      spec: JSON that the script gets as `--contender`. Its "name" names the process in messages; "cores", if there are
        any, are those it may use.
      env: environment variables on top of ours.
    """

    def __init__(self, script: str, spec: dict[str, Any], env: Mapping[str, str] = {}) -> None:
        self.name = spec["name"]
        self._process = subprocess.Popen(
            [sys.executable, script, "--contender", json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env},
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def tell(self, method: str, **arguments: Any) -> None:
        if self._process.stdin.closed:
            raise Failed(f"{self.name}: it was ended before")
        try:
            self._process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"{self.name}: its process has ended") from None

    def answer(self, timeout: float | None = None) -> Any:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise Failed(f"{self.name}: no answer within {timeout:.0f} s") from None
        if line is None:
            raise Failed(f"{self.name}: its process has ended with {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(f"{self.name}: {reply['error']}")
        return reply["result"]

    def ask(self, method: str, timeout: float | None = None, **arguments: Any) -> Any:
        self.tell(method, **arguments)
        return self.answer(timeout)

    def close(self) -> None:
        """Ends the process, with what it started."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already, with a request unread
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(build: Callable[[dict[str, Any]], Any], spec: dict[str, Any]) -> None:
    """In the process: builds the object that has the methods, then answers until standard input ends.

    What libraries print goes to standard error. The object is built at once, before the first request.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if "cores" in spec:
        os.sched_setaffinity(0, spec["cores"])  # before any library counts them
    target, failure = None, None
    try:
        target = build(spec)
    except Exception as error:
        failure = _one_line(error)
    for line in sys.stdin:
        request = json.loads(line)
        if failure:
            reply = {"error": failure}
        else:
            try:
                reply = {"result": getattr(target, request["method"])(**request["arguments"])}
            except Exception as error:
                reply = {"error": _one_line(error)}
        print(json.dumps(reply), file=answers, flush=True)
    os._exit(0)  # a library's threads or exit hooks shall not keep the process


def _one_line(error: Exception) -> str:
    traceback.print_exc()
    lines = str(error).strip().splitlines() or ["no message"]
    # A worker process of torch hands over its traceback: there the last line is the error.
    return f"{type(error).__name__}: {lines[-1 if lines[0].startswith('Caught ') else 0][:300]}"


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[Any]]:
    """Each run once a round, the order reversed every other round, so that what drifts favours nobody.

    Stops after `seconds` when each has had a turn.
    """
    results: dict[str, list[Any]] = {name: [] for name in runs}
    end = time.monotonic() + seconds
    for n in range(rounds):
        for name in list(runs) if n % 2 == 0 else list(runs)[::-1]:
            results[name].append(runs[name]())
        if time.monotonic() > end:
            break
    return results


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least and most, to some significant digits."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: significant(value, digits) for name, value in numbers.items()} | {"n": len(values)}


def device(wanted: str | None) -> str:
    """ "cuda" where an NVIDIA device is, which is asked without starting CUDA, else "cpu"; or what is wanted."""
    return wanted or ("cuda" if glob.glob("/dev/nvidia[0-9]*") else "cpu")


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def log(*words: Any) -> None:
    print(*words, file=sys.stderr, flush=True)


def environment() -> dict[str, Any]:
    """Processor, cores we may use, and the versions of what is installed of PACKAGES."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    flags = {name: os.environ[name] for name in ("XLA_FLAGS", "GLIBC_TUNABLES") if os.environ.get(name)}
    return {"cpu": processor(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()} | {
        "versions": versions} | flags  # fmt: skip


def processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def save(record: dict[str, Any], out: str | None) -> None:
    """Writes the record as one JSON line to the file `out`, if one is given."""
    if out:
        with open(out, "w", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def emit(record: dict[str, Any], out: str | None) -> None:
    """Prints the record as one JSON line, and saves it."""
    print(json.dumps(record), flush=True)
    save(record, out)

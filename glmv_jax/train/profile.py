"""`glmv train --profile FIRST:LAST`: a trace of some steps for xprof and TensorBoard, and what it says by our scopes.

The trace is JAX's own, `<workdir>/profile/plugins/profile/<time>/`, of every process that trains. The table tells the
time that devices were busy with each part of the model (`parallel.scopes`), forward and backward: on a TPU and a GPU
that of operations and kernels, on a CPU that of all threads together.
"""

from __future__ import annotations

import collections
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from glmv_jax.parallel import multihost
from glmv_jax.parallel.scopes import part
from glmv_jax.train.disk import disk_errors, write_json
from glmv_jax.typing import UserError

SHOWN = 15  # parts in the log; all are in parts.json
OTHERS = "other programs"
_OPERATION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
_MODULE = re.compile(r"^HloModule ([\w.\-]+)", re.MULTILINE)


class Profile:
    """The steps to be traced, if any.

    Args: span: "FIRST:LAST", both included, or None. step: done so far, of which there is nothing left to trace; total:
      of the run.
    Raises: UserError for what is no such span, or not of steps of this run.
    """

    def __init__(self, span: str | None, folder: Path, step: int, total: int) -> None:
        self.folder, self.first, self.last, self._running = folder, 0, 0, False
        if span is None:
            return
        first, colon, last = span.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal()):
            raise UserError(f"--profile {span} is no FIRST:LAST; give two steps, as 10:14")
        if not 1 <= int(first) <= int(last) <= total:
            raise UserError(f"--profile {span}: the steps of this run are 1 to {total}; give the first and the last")
        if step < int(last):  # else a resumed run has them behind it
            self.first, self.last = max(step + 1, int(first)), int(last)

    def begins(self, step: int) -> bool:
        """Whether the trace starts before this step."""
        return step == self.first

    def start(self) -> str:
        """Call it when nothing runs; what to tell people."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python makes traces that no page can show
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        jax.profiler.start_trace(str(self.folder), profiler_options=options)
        self._running = True
        return f"profiling steps {self.first} to {self.last}"

    def ends(self, step: int) -> bool:
        """Whether the trace stops after this step."""
        return self._running and step == self.last

    def stop(self, programs: Iterable[str]) -> list[str]:
        """Writes the trace; lines for people. programs: texts of the compiled steps. Call it when nothing runs."""
        self.close()
        lines = [f"profile: {self.folder}", f"to open it: pip install xprof && xprof --logdir {self.folder}",
                 f"or, with tensorboard and xprof installed: tensorboard --logdir {self.folder}"]  # fmt: skip
        if not multihost.is_first():
            return lines
        found = by_part(events(self.folder), list(programs), self.last - self.first + 1)
        write_json(self.folder / "parts.json", found)
        return [*lines, *table(found)]

    def close(self) -> None:
        """Ends a trace that still runs."""
        if self._running:
            self._running = False
            with disk_errors(self.folder):
                jax.profiler.stop_trace()


# --- reading it -------------------------------------------------------------------------------------------------------


def events(folder: Path) -> list[dict[str, Any]]:
    """{"op", "module", "scope", "ms"} of everything that devices ran in the newest trace of this host, each without
    what it is made of: of a loop its own time alone."""
    file = max(folder.glob("plugins/profile/*/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(file, "rt", encoding="utf-8") as text:
        raw = json.load(text)["traceEvents"]
    lines = {(e["pid"], e.get("tid")): e["args"]["name"] for e in raw if e.get("name") == "thread_name"}
    # A TPU's operations, and a GPU's kernels, stand in lines of their own and again in others that sum them up.
    own = {line for line, name in lines.items() if name.startswith(("XLA Ops", "Stream"))}
    rows = collections.defaultdict(list)
    for event in raw:
        line = event.get("pid"), event.get("tid")
        if event.get("ph") == "X" and (line in own if own else "hlo_op" in event.get("args", {})):
            rows[line].append(event)
    return [made for row in rows.values() for made in _apart(row)]


def _apart(row: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of events of one thread, that contain each other or do not meet, each with the time that is its own."""
    open_: list[tuple[float, dict[str, Any]]] = []
    for event in sorted(row, key=lambda e: (e["ts"], -e["dur"])):
        args = event.get("args", {})
        one = {"op": args.get("hlo_op", event["name"]), "module": args.get("hlo_module")}
        one |= {"scope": args.get("tf_op", ""), "ms": event["dur"] / 1e3}
        while open_ and open_[-1][0] <= event["ts"]:
            open_.pop()
        if open_:
            open_[-1][1]["ms"] -= one["ms"]
        open_.append((event["ts"] + event["dur"], one))
        yield one


def by_part(ran: Iterable[dict[str, Any]], programs: list[str], steps: int) -> dict[str, float]:
    """{"CogViT/attention/core backward": milliseconds a step, ...}, the largest first.

    programs: texts of compiled programs, which say what their operations are of where the trace does not; what others
    ran is `OTHERS`.
    """
    scopes = {name: scope for text in reversed(programs) for name, scope in _OPERATION.findall(text)}
    modules = {found[1] for text in programs if (found := _MODULE.search(text))}
    total: collections.Counter[str] = collections.Counter()
    for one in list(ran):
        known = one["module"] is None or one["module"] in modules
        name = " ".join(part(one["scope"] or scopes.get(one["op"], ""))).strip() if known else OTHERS
        total[name] += one["ms"] / steps
    return {name: round(ms, 4) for name, ms in total.most_common()}


def table(found: dict[str, float], shown: int = SHOWN) -> list[str]:
    """Lines: share, milliseconds a step, part."""
    whole = sum(found.values()) or 1.0
    lines = [f"  {ms / whole:5.1%} {ms:10.3f} ms  {name}" for name, ms in list(found.items())[:shown]]
    rest = sum(list(found.values())[shown:])
    return lines + ([f"  {rest / whole:5.1%} {rest:10.3f} ms  {len(found) - shown} more"] if rest else [])

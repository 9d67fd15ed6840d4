"""What a compiled step spends its time on, by part of the model: products of matrices and the rest.

From JAX's own profiler: each event names the operation of the compiled program that it ran, and the program's text says
which line of the model that operation came from (a fusion: its root's).
"""

from __future__ import annotations

import collections
import glob
import gzip
import json
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
OP_NAME = re.compile(r'op_name="([^"]*)"')
PRODUCT = re.compile(r" dot\(| convolution\(|__cublas|__triton_gemm|__cudnn\$|dot_general|gemm|nvjet|cutlass|xmma")
CONTAINER = re.compile(r"^(while|conditional|call|tuple|wrapped_while|body|cond)")
PARTS = ("attention", "mlp", "patch_embed", "norm")


def profile(compiled: Any, run: Callable[[], None], steps: int) -> dict[str, Any]:
    """Runs `steps` steps under the profiler.

    Returns {"ms a step": {part: ms}, "largest": [[operation, ms], ...]}, the parts by share; on a GPU ms of kernels, on
    a CPU of threads, all together. A scan's body is counted, the loop around it is not.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                run()
        events = _events(folder)
    sources = instructions(compiled.as_text())
    parts: collections.Counter[str] = collections.Counter()
    single: collections.Counter[str] = collections.Counter()
    for name, milliseconds in events:
        if CONTAINER.match(name):
            continue
        parts[part(sources.get(name, name))] += milliseconds / steps
        single[name] += milliseconds / steps
    largest = [[f"{name}: {_short(sources.get(name, ''))}", round(ms, 3)] for name, ms in single.most_common(12)]
    return {"ms a step": {name: round(ms, 3) for name, ms in parts.most_common()}, "largest": largest}


def instructions(text: str) -> dict[str, str]:
    """Of a compiled program: each instruction's name and its line, for a fusion with the lines it is made of."""
    found: dict[str, str] = {}
    bodies: dict[str, list[str]] = collections.defaultdict(list)
    inside = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            inside = re.sub(r"^(ENTRY )?%?", "", line).split(" ")[0]
        elif match := INSTRUCTION.match(line):
            found[match[1]] = match[2]
            bodies[inside].append(match[2])
    for name, line in found.items():
        if called := re.search(r"calls=%?([\w.\-]+)", line):
            found[name] = line + "".join(bodies[called[1]])
    return found


def part(line: str) -> str:
    """Where an operation belongs: a part of the model, forward or backward, a product or the rest."""
    source = OP_NAME.search(line)
    path = source[1] if source else ""
    where = next((name for name in PARTS if f"/{name}" in path), "")
    kind = "products" if PRODUCT.search(line) else "the rest"
    if "CogViT" not in path and not where:
        return f"the update, and what has no name, {kind}"
    way = "backward" if "transpose(" in path else "forward"
    return f"{where or 'between'}, {way}, {kind}"


def _events(folder: str) -> list[tuple[str, float]]:
    """(operation, milliseconds) of everything that ran."""
    (file,) = glob.glob(os.path.join(folder, "plugins/profile/*/*.trace.json.gz"))
    with gzip.open(file, "rt", encoding="utf-8") as trace:
        events = json.load(trace)["traceEvents"]
    # A GPU's kernels stand once under their stream, and again in lines that sum them up.
    lines = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    streams = {line for line, name in lines.items() if name.startswith("Stream")}
    found = []
    for event in events:
        operation = event.get("args", {}).get("hlo_op")
        on_stream = (event.get("pid"), event.get("tid")) in streams
        if event.get("ph") == "X" and (on_stream if streams else operation):
            found.append((operation or event["name"], event["dur"] / 1e3))
    return found


def _short(line: str) -> str:
    source = OP_NAME.search(line)
    return source[1][-90:] if source else ""

"""Does any picture, film or page stop the data of a run?

    python benchmarks/fuzz_data.py [--files 10000] [--seed 0] [--limit 30] [--memory 1024] [--out FILE]

10,000 files (`fuzz_files.py`): every kind of whole JPEG, PNG, WebP, GIF, TIFF, BMP, MP4 and Matroska, some of whose
colours are held against what they have to look like; those truncated, bit-flipped, spliced, zeroed, prolonged, with
headers that lie; and bombs. Each is a record that a worker process of training (`data.stream`) reads by the very
path of stages 3 and 4 (`data.local`, guarded as there) and, a picture, by that of stage 2 as well. PDF, SVG, PostScript
and playlists are none of what the pipeline takes: that it refuses them is tried.

A file is lost when it ends the worker or the run, takes more than --limit seconds or --memory MB, or is decoded to
something else than it is. Prints a table by kind and reason, and one JSON line; exits with 1 when one was lost.
A minute for 10,000 on an idle core.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import re
import signal
import struct
import sys
import tempfile
import threading
import time
from typing import Any

import fuzz_files
import numpy as np

AWAY = 40  # levels that a colour may be from the truth: JPEG and a resize lie between
LOST = ("wrong", "ended the run", "hung", "ended the worker", "took too much memory")
NOW = struct.Struct("qqd")  # what a worker is at: its process, the file, since when


@dataclasses.dataclass
class Fuzzed:
    """The files as items of a stream: item i is {"kind", "verdict", "reason", "seconds", "megabytes"}.

    folder: of the log, and of the file `now`.   left: numbers that are not tried.   memory: MB for a file.
    """

    seed: int
    count: int
    folder: pathlib.Path
    left: frozenset[int] = frozenset()
    memory: float = 1024.0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i in self.left:
            return {}
        file = fuzz_files.file(self.seed, i)
        door = self._door()
        _reset_peak()
        before = _megabytes("VmRSS")
        self._say(i)
        began = time.monotonic()
        verdict, reason = door(file)
        seconds = time.monotonic() - began
        self._say(-1)
        megabytes = max(0.0, _megabytes("VmHWM") - before)
        if megabytes > self.memory and verdict not in LOST:
            verdict, reason = "took too much memory", f"it took {megabytes:.0f} MB"
        return {"kind": file.kind, "verdict": verdict, "reason": reason, "seconds": seconds, "megabytes": megabytes}

    def _say(self, i: int) -> None:
        with open(self.folder / "now", "r+b") as file:
            os.pwrite(file.fileno(), NOW.pack(os.getpid(), i, time.monotonic()), 0)

    def _door(self) -> Door:
        if not hasattr(self, "_opened"):
            self._opened = Door(self.folder / "faults.jsonl")
        return self._opened

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_opened"}


class Door:
    """The way of a file into a batch. Calling it gives (verdict, reason)."""

    def __init__(self, log: pathlib.Path) -> None:
        from glmv_jax.data import naflex
        from glmv_jax.data.building import DocumentBuilder
        from glmv_jax.data.faults import FaultLog
        from glmv_jax.data.local.assembling import Assembler
        from glmv_jax.data.tokenizer import Tokenizer

        self.log = FaultLog(log)
        self.patcher = naflex.Patcher(patch=8, merge=2, max_patches=64, frames=2)
        builder = DocumentBuilder(Tokenizer(), self.patcher, max_tokens=512, max_patches=1024)
        self.assembler = Assembler(builder, film_patches=16, film_frames=16, name="fuzzed", log=self.log)

    def __call__(self, file: fuzz_files.File) -> tuple[str, str]:
        from glmv_jax.data.faults import Guarded

        self.log.path.unlink(missing_ok=True)
        good = fuzz_files.whole()["png"]
        source = Guarded([("fuzzed", file), ("good", good)], self._made, name="fuzzed", seed=0, log=self.log)
        try:
            who, images = source[0]
        except Exception as error:  # noqa: BLE001 - what ends a run is what is looked for
            return "ended the run", f"{type(error).__name__}: {error}"[:200]
        if who == "good":
            fault = json.loads(self.log.path.read_text(encoding="utf-8").splitlines()[0])
            return "skipped", fault["reason"]
        return next((("wrong", what) for image in images if (what := self._wrong(file, *image))), ("decoded", ""))

    def _made(self, record: tuple[str, fuzz_files.File], rng: np.random.Generator) -> tuple[str, list]:
        from glmv_jax.data.local import pipeline, schema
        from glmv_jax.data.pairs import picture

        who, file = record
        segments = (schema.Text("What is this?"), schema.Media(file.media, file.content))
        references = pipeline.References([schema.Record(who, segments=segments)])
        images = [image for document in self.assembler(references[0], rng) for image in document.images]
        if file.media == "image":
            images.append(self.patcher(picture.sized(file.content, self.patcher)))
        return who, images

    def _wrong(self, file: fuzz_files.File, patches: np.ndarray, yx: np.ndarray) -> str:
        """What is wrong with a decoded image; "" for nothing."""
        from glmv_jax.data import naflex

        if patches.dtype != np.uint8 or patches.shape[1] != self.patcher.channels or patches.shape[0] % 4 or not (
                0 < len(patches) <= self.patcher.max_patches) or len(yx) != len(patches):  # fmt: skip
            return f"patches are {patches.dtype} {list(patches.shape)}"
        pixels = naflex.unpatchify(naflex.apart(patches, self.patcher.patch)[0], yx, self.patcher.patch)
        if file.truth is None:
            return ""
        height, width = (side // 2 for side in pixels.shape[:2])
        seen = [pixels[y + 4 : y + height - 4, x + 4 : x + width - 4].reshape(-1, 3).mean(0)
                for y in (0, height) for x in (0, width)]  # fmt: skip
        far = np.abs(np.array(seen) - np.array(file.truth)).max()
        portrait = pixels.shape[0] > pixels.shape[1]
        return f"its colours are {far:.0f} levels off" if far > AWAY or portrait else ""


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _megabytes(field: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def fuzz(seed: int, count: int, limit: float, folder: pathlib.Path, memory: float = 1024.0) -> list[dict[str, Any]]:
    """What became of each file."""
    from glmv_jax.data.stream import Stream
    from glmv_jax.typing import UserError

    now = folder / "now"
    now.write_bytes(NOW.pack(0, -1, 0.0))
    found: dict[int, dict[str, Any]] = {}
    while len(found) < count:
        items = Fuzzed(seed, count, folder, frozenset(found), memory)
        stream, over = iter(Stream(items, workers=1, chunk=16)), threading.Event()
        killed: list[int] = []
        threading.Thread(target=_watch, args=(now, limit, over, killed), daemon=True).start()
        try:
            for i, one in enumerate(stream):
                if one:
                    found[i] = one
        except UserError as error:
            _, i, since = NOW.unpack(now.read_bytes())
            if i < 0:
                raise SystemExit(f"fuzz_data: the worker ended between two files: {error}") from error
            verdict, kind = "hung" if killed else "ended the worker", fuzz_files.file(seed, i).kind
            found[i] = {"kind": kind, "verdict": verdict, "reason": str(error), "megabytes": 0.0,
                        "seconds": time.monotonic() - since}  # fmt: skip
            now.write_bytes(NOW.pack(0, -1, 0.0))
        finally:
            over.set()
            stream.close()
    return [found[i] | {"file": i} for i in range(count)]


def _watch(now: pathlib.Path, limit: float, over: threading.Event, killed: list[int]) -> None:
    """Ends a worker that is at one file for longer than `limit` seconds."""
    while not over.wait(0.2):
        process, i, since = NOW.unpack(now.read_bytes())
        if i >= 0 and time.monotonic() - since > limit and i not in killed:
            killed.append(i)
            os.kill(process, signal.SIGKILL)


def short(reason: str) -> str:
    """A reason without what differs from file to file."""
    reason = re.sub(r"b'.*?'|0x[0-9a-f]+|[\d,.]*\d", "N", reason.removeprefix("UserError: "))
    return reason.split(";")[0].replace("the image bytes", "image")[:78]


def table(found: list[dict[str, Any]]) -> str:
    kinds: dict[str, list[dict]] = collections.defaultdict(list)
    for one in found:
        kinds[one["kind"]].append(one)
    lines = [f"{'kind':<28}{'files':>6}{'decoded':>8}{'skipped':>8}{'lost':>5}{'slowest s':>10}{'peak MB':>8}"]
    for kind, ones in sorted(kinds.items()):
        count = collections.Counter(one["verdict"] for one in ones)
        lost = sum(count[name] for name in LOST)
        lines.append(f"{kind:<28}{len(ones):>6}{count['decoded']:>8}{count['skipped']:>8}{lost:>5}"
                     f"{max(one['seconds'] for one in ones):>10.2f}{max(one['megabytes'] for one in ones):>8.0f}")
    for verdict in ("skipped", *LOST):
        reasons = collections.Counter(short(one["reason"]) for one in found if one["verdict"] == verdict)
        lines += [f"{n:>7} {verdict}: {reason}" for reason, n in reasons.most_common(40)]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for a file")
    parser.add_argument("--memory", type=float, default=1024.0, help="MB for a file")
    parser.add_argument("--out")
    options = parser.parse_args()
    from contest import emit, environment

    os.environ["PYTHONWARNINGS"] = "ignore"  # Pillow's, of each odd file
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(options.seed, options.files, options.limit, pathlib.Path(folder), options.memory)
    took = time.monotonic() - began
    print(table(found), file=sys.stderr)
    count = collections.Counter(one["verdict"] for one in found)
    reasons = collections.Counter(short(one["reason"]) for one in found if one["verdict"] == "skipped")
    worst = sorted(found, key=lambda one: one["seconds"])[-5:] + sorted(found, key=lambda one: one["megabytes"])[-5:]
    lost = [one for one in found if one["verdict"] in LOST]
    emit({"benchmark": "fuzz_data", "seed": options.seed, "files": len(found), "seconds": round(took, 1),
          "files_per_second": round(len(found) / took, 1), **count, "lost": lost, "skipped_by_reason": dict(reasons),
          "worst": worst, "environment": environment()}, options.out)  # fmt: skip
    return 1 if lost else 0


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    sys.exit(main())

"""What a run tells: metrics.jsonl and TensorBoard for machines, a panel or progress lines for people."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text

from glmv_jax.train import panel
from glmv_jax.train.disk import disk_errors
from glmv_jax.train.panel import View
from glmv_jax.train.spikes import Spikes

# tensorboardX imports torch where there is one, half of the time that a run takes to start; of use to its graphs alone.
_torch = sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # what is None cannot be imported
from tensorboardX.event_file_writer import EventsWriter  # noqa: E402
from tensorboardX.proto import event_pb2, summary_pb2  # noqa: E402

if _torch is None:
    del sys.modules["torch"]

WINDOW = 50  # steps that rates and ETA are averaged over
PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal
LIVE_EVERY = 0.25
MEMORY_EVERY = 1.0


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a line cut off by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


class MetricsLog:
    """Appends rows {"step", "wall", "kind", name: float, ...} to metrics.jsonl, and the same to TensorBoard.

    Args:
      workdir: of the run.
      step: the step the run resumes from; later rows are of a future that will happen again, and are removed. -1
        removes all.
      final_step: evaluations at this step are removed too: the last evaluation is repeated when it did not end.
      writes: False in a process whose rows another one writes: it reads and touches nothing.

    Attributes: wall: seconds the run had taken by the last row there was, removed ones included.
    """

    def __init__(self, workdir: Path, step: int, final_step: int, *, writes: bool = True) -> None:
        self.path, self._writes = workdir / "metrics.jsonl", writes
        rows = read_jsonl(self.path)
        self.wall = max((float(row.get("wall") or 0.0) for row in rows), default=0.0)
        if not writes:
            return
        kept = [r for r in rows if r["step"] <= step and not (r["step"] == final_step and r.get("kind") == "eval")]
        with disk_errors(self.path):
            part = self.path.with_name("metrics.jsonl.part")
            part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(part, self.path)
            self._file = open(self.path, "a", encoding="utf-8")
            self._board = TensorBoard(workdir / "tb", step + 1)

    def write(self, step: int, wall: float, kind: str, values: dict[str, float]) -> None:
        """One row, on disk when this returns. JSON has no nan: a number that is not finite becomes null."""
        if not self._writes:
            return
        row = {"step": step, "wall": round(wall, 3), "kind": kind}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        with disk_errors(self.path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self._board.write(step, {f"{kind}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        if not self._writes:
            return
        with disk_errors(self.path), contextlib.closing(self._file), contextlib.closing(self._board):
            pass


class TensorBoard:
    """Scalars in an event file. tensorboardX' own writer has a thread: when that dies of a full disk, the run hangs.

    Args: first_step: what earlier files say of it and of later steps is no longer shown.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        self._flushed = time.monotonic()
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=restart))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers of one step; on disk within ten seconds."""
        scalars = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = summary_pb2.Summary(value=scalars)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() > self._flushed + 10.0:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


class StepRecorder:
    """The metrics of training steps, written one step late.

    Reading a step's numbers waits for it; reading them when the next step has been started leaves no device idle.
    In a step that was not skipped nan is the mean of nothing, as of a source that is not in the batch: it is left out.

    Args: clock: seconds the run has taken. skipped: updates left out in earlier attempts. peak: as for `Meter`.
      on_skip: gets the number of a step whose update was left out, as soon as that is known. spikes: what watches the
      loss; a step that it tells is a row of kind "spike" with the samples of its batch by source.
    Attributes: meter: rates of the steps that are done. skipped, skipped_in_a_row: updates left out because the
      gradient was not finite.
    """

    def __init__(
        self, log: MetricsLog, progress: Progress, clock: Callable[[], float], log_every: int, skipped: int,
        peak: float = 0.0, on_skip: Callable[[int], None] = lambda step: None, spikes: Spikes | None = None,
    ) -> None:  # fmt: skip
        self._log, self._progress, self._clock, self._every = log, progress, clock, log_every
        self._on_skip, self.spikes, self._in_spike = on_skip, spikes or Spikes(0.0), False
        self.meter = Meter(peak)
        self.skipped, self.skipped_in_a_row = skipped, 0
        self._pending: (
            tuple[int, dict[str, Any], tuple[float, dict[str, int], float], float, Mapping[str, dict[str, int]]] | None
        ) = None

    def started(
        self, step: int, values: dict[str, Any], waited: float, counts: dict[str, int], flops: float,
        called: float = 0.0, sources: Mapping[str, dict[str, int]] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Step `step` is under way and will give `values` (device scalars or numbers); writes the one before.

        waited: seconds that its batch took to come. counts, flops, sources: of the batch. called: seconds of its call,
        where that may compute it, as on a CPU; elsewhere it only starts it, 0.0.
        """
        self.flush()
        self._pending = (step, values, (waited, counts, flops), called, sources)

    @property
    def computing(self) -> bool:
        """Whether devices still work on the step that was started last. Waits for nothing."""
        return self._pending is not None and not all(
            x.is_ready()  # type: ignore[attr-defined]  # jax's stub leaves it out
            for x in self._pending[1].values()
            if isinstance(x, jax.Array)
        )

    def flush(self) -> None:
        """Waits for the step under way, if there is one, and writes it."""
        if self._pending is None:
            return
        (step, values, work, called, sources), self._pending = self._pending, None
        asked = time.monotonic()
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        # Only now is the step done: one that has merely been started took no time yet.
        self.meter.step(*work, called + time.monotonic() - asked)
        rates = self.meter.rates()
        self.skipped += int(values["skipped"])
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if values["skipped"] else 0
        last = step == self._progress.total
        if step % self._every == 0 or step == 1 or last:
            said = {name: x for name, x in values.items() if values["skipped"] or not math.isnan(x)}
            self._log.write(step, self._clock(), "train", said | rates)
        self._progress.update(step, values, rates, last=last)
        if values["skipped"]:
            self._on_skip(step)
        self._watch(step, values, sources)

    def _watch(self, step: int, values: dict[str, float], sources: Mapping[str, dict[str, int]]) -> None:
        """Notes a loss that stands out; of several in a row the first one is said."""
        metric = self.spikes.metric
        spike = self.spikes.next(values.get(metric, math.nan))
        if spike is not None:
            row = {metric: spike.value, "median": spike.median, "deviations": spike.deviations}
            row |= {f"samples/{name}": float(counts["samples"]) for name, counts in sources.items()}
            self._log.write(step, self._clock(), "spike", row)
            if not self._in_spike:
                above = f"{metric} {spike.value:.4g} is {spike.deviations:.0f} deviations above {spike.median:.4g}"
                self._progress.say(f"step {step}: {above}; in its batch: {', '.join(sources) or 'no named sources'}")
        self._in_spike = spike is not None


class Meter:
    """Rates over the last WINDOW steps, measured by the host's clock.

    Args: peak: FLOPs a second of all devices together, 0.0 where that is not known.
    """

    def __init__(self, peak: float = 0.0) -> None:
        self._peak = peak
        self.reset()

    def reset(self) -> None:
        """Forgets: called after a compilation, an evaluation or a save, which are not the speed of training."""
        self._steps: collections.deque[tuple[float, float, int, int, float, float]]
        self._steps = collections.deque(maxlen=WINDOW + 1)
        self._steps.append((time.monotonic(), 0.0, 0, 0, 0.0, 0.0))

    def step(self, waited: float, counts: dict[str, int], flops: float, computed: float = 0.0) -> None:
        """A step is done; its batch took `waited` seconds to come, and the host waited `computed` for the devices."""
        self._steps.append((time.monotonic(), waited, counts["samples"], counts["tokens"], flops, computed))

    def rates(self) -> dict[str, float]:
        """Steps, samples, tokens and flops per second, what part of the peak these are ("flop_utilisation", where it is
        known), and what the host did all the time: "data_wait" for batches, "time/compute" for devices to end a step,
        and "time/host" the rest: starting steps, logging. Devices may be busy during all three; while compute is there
        they never wait for the host. {} before the first step."""
        rows = list(self._steps)
        if len(rows) < 2:
            return {}
        seconds = max(rows[-1][0] - rows[0][0], 1e-9)
        waited, samples, tokens, flops, computed = (sum(column) for column in list(zip(*rows[1:], strict=True))[1:])
        rates = {
            "steps_per_second": (len(rows) - 1) / seconds,
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "flops_per_second": flops / seconds,
            "data_wait": min(1.0, waited / seconds),
            "time/compute": min(1.0, computed / seconds),
            "time/host": max(0.0, 1.0 - (waited + computed) / seconds),
        }
        return rates | ({"flop_utilisation": rates["flops_per_second"] / self._peak} if self._peak else {})


class Progress:
    """Where a stage is: one panel on a terminal (`train.panel`), a line now and then elsewhere. Messages go above it.

    stage: its name, for the panel. headline: the metric that is shown. wait: what the time is called that batches take
    to come. quiet: says nothing. view: what is known, of which seconds_left is set by a run with a time budget.
    """

    def __init__(
        self, name: str, total: int, file: Any = None, *, stage: str = "", headline: str = "loss",
        wait: str = "data wait", quiet: bool = False,
    ) -> None:  # fmt: skip
        self.view = View(name, stage, total, headline, wait)
        self._console = Console(file=file or sys.stdout, highlight=False, soft_wrap=True, quiet=quiet)
        self._live: Live | None = None
        self._next = self._next_memory = 0.0
        self._memory: list[str] = []

    @property
    def total(self) -> int:
        return self.view.total

    def say(self, message: str) -> None:
        """A line that stays."""
        self._console.print(Text(f"{self.view.name}: {message}"), soft_wrap=True)

    def update(self, step: int, values: dict[str, float], rates: dict[str, float], *, last: bool = False) -> None:
        """Shows where the run is, if it is time to. values: metrics of the step, the headline among them."""
        view, now = self.view, time.monotonic()
        view.update(step, values, rates)
        if now < self._next and not last:
            return
        if not self._console.is_terminal:
            shown = f"{view.headline.removesuffix('/mean')} {values[view.headline]:.4g}"
            line = progress_line(view.name, step, view.total, shown, rates, view.seconds_left, view.wait)
            self._console.print(Text(line), soft_wrap=True)
            self._next = now + PLAIN_EVERY
            return
        if now >= self._next_memory:
            self._memory, self._next_memory = panel.memory(), now + MEMORY_EVERY
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(panel.draw(view, self._memory), refresh=True)
        self._next = now + LIVE_EVERY

    def close(self) -> None:
        """Leaves the panel as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def progress_line(
    name: str, step: int, total: int, shown: str, rates: dict[str, float], seconds_left: float = math.inf,
    wait: str = "data wait",
) -> str:  # fmt: skip
    """e.g. `mim  120/800  15%  eta 3:20  loss 1.23  412 samples/s  26.4k tokens/s  48.1 TFLOP/s (10% of peak)
    data wait 3%  host 2%`."""
    parts = [f"{name:<8} {step}/{total}", f"{100 * step // max(1, total)}%"]
    if rates:
        parts.append(f"eta {panel.eta(step, total, rates, seconds_left)}")
    parts.append(shown)
    if rates:
        parts += [*panel.speed(rates), f"{wait} {rates['data_wait']:.0%}", f"host {rates['time/host']:.0%}"]
    return "  ".join(parts)

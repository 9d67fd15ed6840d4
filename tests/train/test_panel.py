"""The panel on a terminal: what a person sees on the screen after everything that was written to it.

The screen is a pseudo-terminal read by a small emulator of what rich writes. Not covered: other terminals' own ways.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
import time
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from glmv_jax.train import metrics, panel
from glmv_jax.train.panel import View

WIDTH, HEIGHT = 100, 30
RATES = {
    "steps_per_second": 2.0, "samples_per_second": 412.4, "tokens_per_second": 26_400.0, "flops_per_second": 4.81e10,
    "flop_utilisation": 0.414, "data_wait": 0.034, "time/compute": 0.95, "time/host": 0.02,
}  # fmt: skip


def screen(written: str) -> list[str]:
    """The lines on a tall screen after it was written: text, line ends, and rich's moves up and erased lines."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part.startswith("\x1b["):
            count, what = part[2:-1], part[-1]
            if what == "A":
                row = max(0, row - int(count or 1))
            elif what == "K":
                assert count == "2"
                lines[row] = ""
            else:
                assert what in "mhl", part
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch):
    """(a file that is a terminal, a function that closes it and gives the screen)."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("LINES", str(HEIGHT))
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = os.openpty()
    read: list[bytes] = []

    def drain():
        while True:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # the other end has been closed
                return
            read.append(data)

    reader = threading.Thread(target=drain)
    reader.start()
    file = os.fdopen(theirs, "w", encoding="utf-8")

    def seen():
        file.close()
        reader.join(10)
        return screen(b"".join(read).decode("utf-8"))

    yield file, seen
    if not file.closed:
        file.close()
    reader.join(10)
    os.close(ours)


def values(step):
    """Two sources, of which a batch holds one."""
    return {"loss": 4.0 / step, "grad_norm": 0.5, "lr": 1e-3, f"ce/{'read' if step % 2 else 'count'}": float(step),
            f"ce/{'count' if step % 2 else 'read'}": math.nan}  # fmt: skip


def test_one_panel_is_redrawn_in_place_and_messages_stay_above_it(terminal, monkeypatch):
    file, seen = terminal
    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    progress = metrics.Progress("run7", 40, file, stage="sft")
    progress.say("compiling the step")
    for step in range(1, 41):
        now[0] += 0.2
        progress.update(step, values(step), RATES, last=step == 40)
        if step == 20:
            progress.say("loss spike at step 20")
    progress.close()
    progress.say("evaluating after training")
    lines = seen()
    assert [line for line in lines if line.startswith("run7: ")] == [
        "run7: compiling the step", "run7: loss spike at step 20", "run7: evaluating after training"]  # fmt: skip
    top, bottom = (next(i for i, line in enumerate(lines) if line.startswith(corner)) for corner in "╭╰")
    text = "\n".join(lines)
    assert text.count("╭") == text.count("╰") == 1 and lines.index("run7: loss spike at step 20") < top
    assert bottom < lines.index("run7: evaluating after training")
    drawn = " ".join(" ".join(lines[top:bottom]).replace("│", " ").split())
    for words in ("run7 · sft", "step 40 of 40", "100%", "eta 0:00", "loss 0.1", "grad_norm 0.5", "count 40", "read 39",
                  "412 samples/s", "26.4k tokens/s", "48.1 GFLOP/s (41% of peak)", "compute 95%", "data wait 3%",
                  "host 2%", "memory host "):  # fmt: skip
        assert words in drawn, (words, drawn)
    assert re.search(r"memory host \d+\.\d of \d+ GiB", drawn)


@pytest.mark.parametrize("width", [100, 80, 60, 40])
def test_no_number_is_broken_at_any_width(width):
    view = View("sft_more", "sft", 100_000)
    sources = {f"ce/{name}": 0.1234 for name in ("attribute", "chart", "a_source_with_a_long_name")}
    view.update(12_345, {"loss": 1.2345, "grad_norm": 0.123, "lr": 3e-4, "accuracy": 0.33, **sources}, RATES)
    console = Console(file=io.StringIO(), width=width)
    console.print(panel.draw(view, ["host 3.1 of 8 GiB", "device 70.1 of 80 GiB"]))
    lines = console.file.getvalue().splitlines()
    assert {len(line) for line in lines} == {width}
    for words in ("step 12,345 of 100,000", "12%", "eta 12:10:28", "loss 1.234", "grad_norm 0.123", "lr 0.0003",
                  "accuracy 0.33", "attribute 0.123", "a_source_with_a_long_name 0.123", "412 samples/s",
                  "48.1 GFLOP/s (41% of peak)", "data wait 3%", "memory host 3.1 of 8 GiB",
                  "device 70.1 of 80 GiB"):  # fmt: skip
        assert any(words in line for line in lines), words
    assert any("━" in line for line in lines)


def test_it_is_drawn_at_most_four_times_a_second(monkeypatch, terminal):
    file, seen = terminal
    now, asked = [0.0], []
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    monkeypatch.setattr(panel, "memory", lambda: asked.append(now[0]) or ["host 1.0 GiB"])
    drawn = []
    monkeypatch.setattr(panel, "draw", lambda view, memory: drawn.append(now[0]) or str(view.step))
    progress = metrics.Progress("run7", 400, file)
    for step in range(1, 401):
        now[0] += 1 / 128
        progress.update(step, values(step), RATES)
    progress.close()
    assert drawn == [1 / 128 + n / 4 for n in range(13)] and seen()
    assert len(asked) == 4  # memory once a second


def test_numbers_come_from_the_host_alone(terminal, tmp_path, monkeypatch):
    """A device array among a step's values is fetched once, as without a terminal."""
    file, seen = terminal
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(metrics.jax, "device_get", lambda tree: fetched.append(1) or get(tree))
    log = metrics.MetricsLog(tmp_path, 0, final_step=9)
    recorder = metrics.StepRecorder(log, metrics.Progress("toy", 9, file), lambda: 5.0, 1, 0)
    for step in range(1, 4):
        value = jax.numpy.float32(step)
        recorder.started(step, {"loss": value, "skipped": 0.0}, 0.0, {"samples": 1, "tokens": 1}, 1.0)
        assert len(fetched) == step - 1
    recorder.flush()
    log.close()
    assert len(fetched) == 3 and any("loss 1" in line for line in seen())


def test_a_panel_fits_a_narrow_terminal_and_many_sources():
    view = View("rl", "rl", 50, "reward/mean", "rollouts", seconds_left=61.0)
    view.update(3, {"reward/mean": 0.25, **{f"reward/task{i}": i / 100 for i in range(50)}}, RATES)
    for width in (24, 48, 120):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(panel.draw(view))
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        said = " ".join(" ".join(lines).replace("│", " ").split())
        assert "reward 0.25" in said and "task35 0.35" in said and "task36" not in said and "and 14 more" in said
    assert "rollouts 3%" in said and "eta 0:24" in said and "rl · rl" not in said
    view.update(4, {"reward/mean": 0.5}, {})
    console.print(panel.draw(view))
    assert "eta ?" in console.export_text()


def test_the_fullest_device_is_told(monkeypatch):
    class Device:
        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return self.used and {"bytes_in_use": self.used << 30, "bytes_limit": 80 << 30}

    monkeypatch.setattr(panel.jax, "local_devices", lambda: [Device(3), Device(7), Device(None)])
    assert panel.memory()[1] == "device 7.0 of 80 GiB"
    monkeypatch.setattr(panel.jax, "local_devices", lambda: [Device(None)])
    (host,) = panel.memory()
    assert re.fullmatch(r"host \d+\.\d of \d+ GiB", host)

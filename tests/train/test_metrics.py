"""What a run writes and shows. Not covered: how TensorBoard draws it."""

from __future__ import annotations

import collections
import io
import json
import math
import time
from types import SimpleNamespace

import pytest

from glmv_jax.parallel import chips
from glmv_jax.train import metrics


def write_rows(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def row(step, kind="train", **values):
    return {"step": step, "wall": 10.0 * step, "kind": kind, **values}


def test_rows_after_the_restored_step_and_a_cut_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    old = [row(0, "eval", a=1.0), row(1), row(2), row(2, "eval"), row(3), row(4)]
    write_rows(path, old, '{"step": 5, "wall": 99, "ki')
    log = metrics.MetricsLog(tmp_path, 2, final_step=10)
    assert log.wall == 40.0  # the time of the removed rows has been spent
    log.write(3, 41.0, "train", {"loss": 0.5})
    log.close()
    assert metrics.read_jsonl(path) == [*old[:4], {"step": 3, "wall": 41.0, "kind": "train", "loss": 0.5}]


def test_the_last_evaluation_is_written_again(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [row(0, "eval"), row(8), row(8, "eval")])
    metrics.MetricsLog(tmp_path, 8, final_step=8).close()
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == [row(0, "eval"), row(8)]


def test_minus_one_starts_anew(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [row(0, "eval"), row(1)])
    log = metrics.MetricsLog(tmp_path, -1, final_step=8)
    assert log.wall == 10.0 and metrics.read_jsonl(tmp_path / "metrics.jsonl") == []
    log.close()


def test_binary_rubbish_in_the_file_is_survived(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(row(1)).encode() + b"\n\x00\xff\x00\n[1]\n3\n" + json.dumps(row(2)).encode() + b"\n")
    assert metrics.read_jsonl(path) == [row(1), row(2)]
    assert metrics.read_jsonl(tmp_path / "none") == []


def test_a_number_that_is_not_finite_is_null(tmp_path):
    log = metrics.MetricsLog(tmp_path, 0, final_step=1)
    log.write(1, 1.0, "train", {"loss": float("nan"), "norm": float("inf"), "x": 1.0})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == row(1, loss=None, norm=None, x=1.0) | {"wall": 1.0}


def test_a_step_is_written_when_the_next_has_started(tmp_path):
    log = metrics.MetricsLog(tmp_path, 0, final_step=9)
    progress = metrics.Progress("toy", 9, io.StringIO())
    recorder = metrics.StepRecorder(log, progress, lambda: 5.0, log_every=2, skipped=3)
    work = (0.0, {"samples": 1, "tokens": 1}, 1.0)
    steps = lambda: [r["step"] for r in metrics.read_jsonl(tmp_path / "metrics.jsonl")]  # noqa: E731
    for step in range(1, 6):
        recorder.started(step, {"loss": 1.0, "skipped": float(step in (2, 3))}, *work)
        assert steps() == [s for s in (1, 2, 4) if s < step]
        assert recorder.skipped_in_a_row == {3: 1, 4: 2}.get(step, 0)
    recorder.flush()
    recorder.flush()
    recorder.started(9, {"loss": 1.0, "skipped": 0.0}, *work)
    recorder.flush()
    assert steps() == [1, 2, 4, 9]  # the last step always
    assert recorder.skipped == 5
    log.close()


def test_a_mean_of_nothing_is_left_out_and_a_step_that_failed_says_so(tmp_path):
    log = metrics.MetricsLog(tmp_path, 0, final_step=9)
    recorder = metrics.StepRecorder(log, metrics.Progress("toy", 9, io.StringIO()), lambda: 5.0, 1, 0)
    for step, loss in ((1, 0.5), (2, math.nan)):
        values = {"loss": loss, "ce/absent": math.nan, "skipped": float(math.isnan(loss))}
        recorder.started(step, values, 0.0, {"samples": 1, "tokens": 1}, 1.0)
    recorder.flush()
    log.close()
    one, two = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    assert "ce/absent" not in one and one["loss"] == 0.5
    assert two["ce/absent"] is None and two["loss"] is None


def test_rates_come_from_a_window(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    meter = metrics.Meter()
    assert meter.rates() == {}
    for _ in range(200):
        now[0] += 0.5
        meter.step(0.1, {"samples": 4, "tokens": 10}, 1e6, 0.3)
    rates = meter.rates()
    shares = [rates.pop(name) for name in ("data_wait", "time/compute", "time/host")]
    assert shares == pytest.approx([0.2, 0.6, 0.2])
    assert rates == {
        "steps_per_second": 2, "samples_per_second": 8, "tokens_per_second": 20, "flops_per_second": 2e6
    }  # fmt: skip
    now[0] += 1000
    meter.reset()
    now[0] += 2.0
    meter.step(0.0, {"samples": 4, "tokens": 10}, 1e6)
    assert meter.rates()["steps_per_second"] == 0.5


def test_use_of_the_peak_is_told_where_there_is_one():
    meter = metrics.Meter(peak=1e20)
    meter.step(0.0, {"samples": 1, "tokens": 1}, 1e6)
    assert meter.rates()["flop_utilisation"] == pytest.approx(meter.rates()["flops_per_second"] / 1e20)
    Device = collections.namedtuple("Device", "device_kind")
    peaks = {"TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "NVIDIA H100 80GB": 989e12, "cpu": 0.0}
    for kind, peak in peaks.items():
        assert chips.peak([Device(kind)] * 4) == 4 * peak
    assert chips.peak([Device("TPU v5"), Device("cpu")]) == 0.0


def test_rates_count_steps_that_are_done_not_started(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    log = metrics.MetricsLog(tmp_path, 0, final_step=9)
    recorder = metrics.StepRecorder(log, metrics.Progress("toy", 9, io.StringIO()), lambda: 0.0, 1, 0)
    for step in (1, 2):  # each is started at once and then takes two seconds
        recorder.started(step, {"loss": 1.0, "skipped": 0.0}, 0.0, {"samples": 4, "tokens": 8}, 1.0, 0.5)
        now[0] += 2.0
    recorder.flush()
    rows = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["samples_per_second"] for row in rows] == [2.0, 2.0]
    assert [(row["time/compute"], row["time/host"]) for row in rows] == [(0.25, 0.75)] * 2
    log.close()


def test_progress_line():
    rates = {
        "steps_per_second": 2.0, "samples_per_second": 412.4, "tokens_per_second": 26_400.0,
        "flops_per_second": 4.81e10, "data_wait": 0.034, "time/host": 0.02,
    }  # fmt: skip
    assert metrics.progress_line("mim", 120, 800, "loss 1.235", rates) == (
        "mim      120/800  15%  eta 5:40  loss 1.235  412 samples/s  26.4k tokens/s  48.1 GFLOP/s  data wait 3%  "
        "host 2%"
    )
    used = metrics.progress_line("mim", 1, 2, "loss 1", rates | {"flop_utilisation": 0.414})
    assert "48.1 GFLOP/s (41% of peak)  data wait" in used
    assert "eta 0:07" in metrics.progress_line("mim", 120, 800, "loss 1.2", rates, seconds_left=7.2)
    assert "eta 1:01:01" in metrics.progress_line("mim", 0, 7322, "loss 1.2", rates)
    assert metrics.progress_line("rl", 0, 0, "loss nan", {}) == "rl       0/0  0%  loss nan"
    assert metrics.progress_line("rl", 1, 2, "reward 0.5", rates, wait="rollouts").endswith("rollouts 3%  host 2%")


def test_a_process_that_does_not_write_touches_nothing(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [row(1), row(2)])
    log = metrics.MetricsLog(tmp_path, 1, final_step=9, writes=False)
    log.write(2, 1.0, "train", {"loss": 1.0})
    log.close()
    assert log.wall == 20.0 and metrics.read_jsonl(tmp_path / "metrics.jsonl") == [row(1), row(2)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_a_terminal_a_line_comes_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    out = io.StringIO()
    progress = metrics.Progress("toy", 100, out, headline="reward/mean")
    for step in range(1, 101):
        now[0] += 0.5
        progress.update(step, {"reward/mean": step / 100}, {}, last=step == 100)
    progress.say("a " + "very " * 60 + "long line [stays] whole")
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/100", "21/100", "41/100", "61/100", "81/100", "100/100"]
    assert lines[1].endswith("21%  reward 0.21")
    assert lines[-1].endswith("long line [stays] whole")

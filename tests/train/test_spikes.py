"""Losses that stand out: against NumPy on a made series, and how they are told. How well N is chosen is not covered."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest

from glmv_jax.train import metrics
from glmv_jax.train.spikes import ENOUGH, FLOOR, WINDOW, Spikes

SPIKES = {90: 3.0, 91: 2.5, 200: 9.0, 333: 1.5, 640: 40.0}
NOT_FINITE = {120: math.nan, 121: math.inf, 122: -math.inf}


def series():
    """A falling loss with noise, spikes, drops, a level that jumps and stays, a stretch without noise."""
    rng, n = np.random.default_rng(0), 800
    loss = 2 * np.exp(-np.arange(n) / 150) + 1 + 0.05 * rng.normal(size=n)
    for at, height in SPIKES.items():
        loss[at] += height
    loss[[50, 210, 400]] -= 0.9
    loss[450:] += 1.0
    loss[700:] = 0.5
    loss[760] += 0.5 * FLOOR * 7.9
    loss[780] += 0.5 * FLOOR * 8.1
    for at, value in NOT_FINITE.items():
        loss[at] = value
    return loss


def reference(loss, deviations):
    """{index: (value, median, deviations)}, each window looked at by itself."""
    index = np.flatnonzero(np.isfinite(loss))
    kept, found = loss[index], {}
    for i in range(ENOUGH, len(kept)):
        before = kept[max(0, i - WINDOW) : i]
        median = np.median(before)
        sigma = max(1.4826 * np.median(np.abs(before - median)), FLOOR * abs(median))
        if kept[i] > median + deviations * sigma:
            found[int(index[i])] = (kept[i], median, (kept[i] - median) / sigma)
    return found


@pytest.mark.parametrize("deviations", [4.0, 8.0])
def test_spikes_are_those_of_numpy(deviations):
    loss = series()
    watch = Spikes(deviations)
    found = {i: spike for i, x in enumerate(loss.tolist()) if (spike := watch.next(x)) is not None}
    want = reference(loss, deviations)
    assert list(found) == list(want)
    for i, row in want.items():
        np.testing.assert_allclose(found[i], row, rtol=1e-12)
    if deviations == 8.0:  # the spikes, the jump until it is the new level, and one step out of the calm; no drop
        jump = [i for i in found if 450 <= i < 450 + WINDOW]
        assert set(SPIKES) | {780} == set(found) - set(jump) and jump == list(range(450, 450 + len(jump)))
        assert 0 < len(jump) < WINDOW / 2  # when half of the window is there, so is the median


def test_noise_is_none_and_it_can_be_switched_off():
    rng = np.random.default_rng(1)
    watch, off = Spikes(8.0), Spikes(0.0)
    assert not any(watch.next(x) for x in rng.normal(3, 0.5, 5000).tolist())
    assert watch.next(30.0) and not off.next(30.0) and off.losses == []
    assert not any(off.next(x) for x in series().tolist())


def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_been():
    loss = series().tolist()
    whole = Spikes(8.0)
    want = [whole.next(x) for x in loss]
    for cut in (10, 85, 333, 460):
        first = Spikes(8.0)
        found = [first.next(x) for x in loss[:cut]]
        second = Spikes(8.0, first.losses)
        assert len(first.losses) <= WINDOW and found + [second.next(x) for x in loss[cut:]] == want


def test_a_spike_is_a_row_with_the_sources_of_its_own_batch(tmp_path):
    log, out = metrics.MetricsLog(tmp_path, 0, final_step=99), io.StringIO()
    recorder = metrics.StepRecorder(log, metrics.Progress("toy", 99, out), lambda: 5.0, 10, 0, spikes=Spikes(8.0))
    losses = [2.0 + 0.01 * (step % 7) for step in range(60)]
    losses[50] = losses[51] = losses[55] = 4.0
    losses[53] = math.nan
    for step, loss in enumerate(losses):
        sources = {f"source{step}": {"samples": step, "tokens": 9}}
        recorder.started(step, {"loss": loss, "skipped": float(math.isnan(loss))}, 0.0, {"samples": 1, "tokens": 1},
                         1.0, sources=sources)  # fmt: skip
    recorder.flush()
    log.close()
    rows = [row for row in metrics.read_jsonl(tmp_path / "metrics.jsonl") if row["kind"] == "spike"]
    assert [row["step"] for row in rows] == [50, 51, 55]
    for row in rows:
        assert row[f"samples/source{row['step']}"] == row["step"] and row["loss"] == 4.0
        assert sum(name.startswith("samples/") for name in row) == 1 and row["deviations"] > 8
        assert row["median"] == pytest.approx(2.03, abs=0.011)
    said = [line for line in out.getvalue().splitlines() if "deviations" in line]
    assert [line.partition(":")[2].split()[1] for line in said] == ["50:", "55:"]  # of several in a row the first
    assert said[0].startswith("toy: step 50: loss 4 is ") and said[0].endswith("in its batch: source50")


def test_another_metric_may_be_watched(tmp_path):
    log = metrics.MetricsLog(tmp_path, 0, final_step=99)
    spikes = Spikes(8.0, [1.0, 1.1] * 20, "grad_norm")
    recorder = metrics.StepRecorder(log, metrics.Progress("toy", 99, io.StringIO()), lambda: 5.0, 1, 0, spikes=spikes)
    recorder.started(1, {"loss": 99.0, "grad_norm": 7.0, "skipped": 0.0}, 0.0, {"samples": 1, "tokens": 1}, 1.0)
    recorder.flush()
    log.close()
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl")[1]["grad_norm"] == 7.0

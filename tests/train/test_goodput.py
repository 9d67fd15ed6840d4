"""Where the time of a run went: what a restart undid is lost, what the devices did not miss is not.

Not covered: seconds between the last row and a kill, which nobody writes down.
"""

from __future__ import annotations

import random
import signal
import time
from types import SimpleNamespace

import pytest

from glmv_jax.eval import report_tables
from glmv_jax.train import goodput, main, metrics
from tests.train.test_loop import run_as_program
from tests.train.toy import config


def row(attempt, step, **seconds):
    return {"attempt": attempt, "step": step, "seconds": {name.replace("_", " "): x for name, x in seconds.items()}}


def test_what_stands_behind_the_step_a_restart_begins_from_is_lost():
    rows = [
        row(1, 0, **{"start-up": 2.0}, compile=3.0), row(1, 0, evaluation=1.0), row(1, 4, steps=4.0, checkpoint=0.5),
        row(1, 6, steps=2.0, data_wait=1.0, compile=0.25), row(2, 4, **{"start-up": 1.0}), row(2, 8, steps=4.0),
    ]  # fmt: skip
    found = goodput.summary(rows)
    assert found == {
        "goodput": 8 / 18.75, "attempts": 2,
        "seconds": {"steps": 8.0, "start-up": 3.0, "compile": 3.25, "checkpoint": 0.5, "evaluation": 1.0, "lost": 3.0},
    }  # fmt: skip
    assert goodput.line(found) == (
        "goodput 43% of 19 s: steps 43%, compile 17%, start-up 16%, lost 16%, evaluation 5%, checkpoint 3%; 2 attempts"
    )
    # A third attempt whose newest checkpoints cannot be read: all is lost but what gave the first one.
    again = goodput.summary([*rows, row(3, 0, **{"start-up": 1.0}), row(3, 9, steps=9.0)])
    assert again["seconds"]["lost"] == pytest.approx(4.5 + 3.0 + 4.0) and again["seconds"]["steps"] == 9.0
    assert goodput.summary([]) == {"goodput": None, "seconds": {}, "attempts": 0}


def test_useful_is_the_last_time_that_each_step_was_done():
    """Any number of kills and restarts, a row a step, against a table of who did a step last."""
    rng = random.Random(0)
    for _ in range(50):
        rows, last, step, spent = [], {}, 0, 0.0
        for attempt in range(1, rng.randint(2, 6)):
            step = rng.randint(0, step)
            rows.append(row(attempt, step, **{"start-up": 0.5}))
            last = {n: seconds for n, seconds in last.items() if n <= step}
            for step in range(step + 1, step + rng.randint(1, 9)):  # noqa: B020 - it goes on from where it is
                last[step] = rng.random()
                spent += last[step]
                rows.append(row(attempt, step, steps=last[step]))
        found = goodput.summary(rows)
        assert found["seconds"].get("steps", 0.0) == pytest.approx(sum(last.values()), abs=1e-3)
        assert found["seconds"].get("lost", 0.0) == pytest.approx(spent - sum(last.values()), abs=1e-3)
        assert found["goodput"] == pytest.approx(sum(last.values()) / (spent + 0.5 * found["attempts"]))


def test_time_is_of_the_part_that_it_was_spent_on(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(goodput, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    path = tmp_path / "goodput.jsonl"
    path.write_text('{"attempt": 4, "step": 2, "seconds": {"steps": 1.0}}\n{"attempt": 4, "st')  # cut off by a kill

    def account(writes=True):
        made = goodput.Goodput(path, writes=writes)
        now[0] += 2.0
        with made.spent_on("compile"):
            now[0] += 3.0
        now[0] += 1.0
        made.row(2)
        made.turn("steps")
        with pytest.raises(KeyError), made.spent_on("data wait"):
            now[0] += 4.0
            raise KeyError
        made.move(1.5, "data wait", "steps")
        now[0] += 0.9
        made.row(3, due=False)  # 4.9 s after the one before
        now[0] += 0.1
        made.row(4, due=False)
        made.row(5, due=False)
        return made

    rows = [row(5, 2, **{"start-up": 3.0}, compile=3.0), row(5, 4, steps=2.5, data_wait=2.5)]
    summary = account().summary()
    assert goodput.read(path)[1:] == rows and summary == goodput.summary(goodput.read(path))
    before = path.read_bytes()
    account(writes=False)
    assert path.read_bytes() == before


def test_killed_and_resumed_the_account_is_right(tmp_path, capsys):
    changes = dict(pause=0.05, save_every=4)
    killed = run_as_program(tmp_path, **changes, signal=(8, int(signal.SIGKILL)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = goodput.read(tmp_path / "goodput.jsonl")
    assert before[-1]["step"] == 7 and {r["attempt"] for r in before} == {1}
    found = main.run(config(**changes), tmp_path)["goodput"]
    said = capsys.readouterr().out
    step = int(said.split("resuming from step ")[1].split(" of 12")[0]) if "resuming" in said else 0
    undone = [r["seconds"] for r in before if r["step"] > step]
    lost = sum(x for seconds in undone for part, x in seconds.items() if part not in ("start-up", "compile"))
    assert found["attempts"] == 2 and found["seconds"]["lost"] == pytest.approx(lost, abs=1e-3)
    assert lost > (7 - step) * 0.05  # a batch takes as long
    once = found["seconds"]["data wait"] + found["seconds"]["steps"]
    assert 12 * 0.05 <= once < 12 * 0.05 + 2.0 and found["seconds"]["compile"] > 0
    assert f"goodput {found['goodput']:.0%} of " in said and "; 2 attempts" in said
    rows = goodput.read(tmp_path / "goodput.jsonl")
    assert rows[: len(before)] == before  # nothing that was written down goes away
    assert found["goodput"] == pytest.approx(found["seconds"]["steps"] / sum(found["seconds"].values()), abs=1e-3)


def test_waiting_for_data_while_devices_work_is_no_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.StepRecorder, "computing", property(lambda self: True))
    seconds = main.run(config(pause=0.02), tmp_path)["goodput"]["seconds"]
    assert seconds["steps"] > 12 * 0.02 and seconds.get("data wait", 0.0) < 0.01


def test_the_report_has_it():
    from glmv_jax.eval.report_run import StageRun

    account = {"goodput": 0.8, "seconds": {"steps": 8.0, "start-up": 1.5, "lost": 0.5}, "attempts": 2}
    run = StageRun("sft", None, results={"flops": 1e9, "seconds": 10.0, "goodput": account})
    table = report_tables.share_table({"sft": run, "rl": StageRun("rl", None)})
    at = table.header.index("goodput")
    assert [cells[at].text for cells in table.rows] == ["80%", "–", ""]
    assert table.note.endswith("the rest: start-up 15%, lost 5%.")



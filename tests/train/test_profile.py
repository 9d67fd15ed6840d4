"""A trace of some steps, and the table of it. Not covered: what xprof shows, traces of TPUs and GPUs."""

from __future__ import annotations

import gzip
import json

import pytest

from glmv_jax.train import main, profile
from glmv_jax.typing import UserError
from tests.train.toy import config


def test_steps_are_traced_and_told_by_scopes(tmp_path, capsys):
    main.run(config(steps=6), tmp_path, "3:4")
    said = capsys.readouterr().out
    assert "profiling steps 3 to 4" in said and f"xprof --logdir {tmp_path / 'profile'}" in said
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.trace.json.gz")
    found = json.loads((tmp_path / "profile" / "parts.json").read_text())
    assert any(name.startswith("update/adamw") for name in found) and all(ms >= 0 for ms in found.values())
    assert {"forward", "backward"} <= {name.split()[-1] for name in found}
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "train"}
    assert steps == {"3", "4"} and any(e.get("name") == "data wait" for e in events)
    told = [line.rpartition(" ms  ")[2] for line in said.splitlines() if " ms  " in line]
    assert told[: profile.SHOWN] == list(found)[: profile.SHOWN] and told[0]


@pytest.mark.parametrize("span", ["3", "a:b", ":", "0:3", "5:4", "5:13", "-1:3", "1:2:3"])
def test_spans_that_are_none_are_refused(span, tmp_path):
    with pytest.raises(UserError, match=f"--profile {span}"):
        profile.Profile(span, tmp_path, 0, 12)


def test_a_resumed_run_traces_what_is_left():
    def begins(span, step):
        made = profile.Profile(span, None, step, 12)
        return [n for n in range(step + 1, 13) if made.begins(n)]

    assert begins("5:12", 0) == [5] and begins("5:12", 7) == [8] and begins("5:7", 7) == [] and begins(None, 0) == []


PROGRAM = """HloModule jit_step, is_scheduled=true
  %while.1 = f32[4] while(%t), metadata={op_name="jit(step)/jvp(Decoder)/while"}
  ROOT %dot.1 = f32[4] dot(%a, %b), metadata={op_name="jit(step)/jvp(Decoder)/while/body/blocks/mlp/up/dot_general"}
  dot.2 = f32[4] dot(a, b), metadata={op_name="jit(step)/transpose(jvp(Decoder))/while/body/blocks/mlp/up/dot_general"}
"""


def event(name, ts, dur, tid=1, module="jit_step"):
    return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": ts, "dur": dur,
            "args": {"hlo_op": name, "hlo_module": module}}  # fmt: skip


def test_a_loop_has_its_own_time_alone(tmp_path):
    raw = [
        event("while.1", 0.0, 10_000.0), event("dot.1", 1_000.0, 4_000.0), event("dot.2", 5_000.0, 3_000.0),
        event("dot.1", 0.0, 2_000.0, tid=2), event("dot.1", 10_000.0, 6_000.0, module="jit_other"),
        {"ph": "X", "pid": 1, "tid": 3, "name": "a function of Python", "ts": 0.0, "dur": 1e6},
    ]  # fmt: skip
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    with gzip.open(folder / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": raw}, file)
    found = profile.by_part(profile.events(tmp_path), [PROGRAM], steps=2)
    assert found == {
        "Decoder/mlp/up forward": 3.0, profile.OTHERS: 3.0, "Decoder forward": 1.5, "Decoder/mlp/up backward": 1.5,
    }  # fmt: skip
    assert profile.table(found, shown=2) == [
        "  33.3%      3.000 ms  Decoder/mlp/up forward", "  33.3%      3.000 ms  other programs",
        "  33.3%      3.000 ms  2 more",
    ]  # fmt: skip

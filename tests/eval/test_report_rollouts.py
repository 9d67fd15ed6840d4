"""The report's section on rollouts, of a run directory written by hand: sources, answers with pictures, the pipeline.

Read back with the standard library's HTML parser. How the page looks is not covered.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from glmv_jax.eval import report, report_rollouts, report_run
from tests.eval.pages import Reader

SOURCES = [f"task{i:02}" for i in range(31)] + ["point/<it>"]
STEPS = 40


def reward(n: int, step: int) -> float:
    return min(1.0, 0.01 * n + step / 100)


@pytest.fixture
def run(tmp_path):
    """A run of 32 sources: the last asks for places, one of its pictures is gone, and the last line is torn."""
    folder = tmp_path / "rl"
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for step in range(1, STEPS + 1):
        row = {"step": step, "wall": float(step), "kind": "train", "loss": 0.5, "reward/mean": 0.5}
        for n, source in enumerate(SOURCES):
            row |= {f"reward/{source}": reward(n, step), f"length/{source}": 10.0, f"pass@8/{source}": 0.9,
                    f"truncated/{source}": 0.5 - step / 100, f"timeout/{source}": 0.25 if n == 3 else 0.0,
                    f"aborted/{source}": float(n == 4), f"staleness/{source}": 1.0, f"mismatch_kl/{source}": 1e-3,
                    f"component/score/{source}": 0.3}  # fmt: skip
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("aa", "bb"):
        Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(folder / "pictures" / f"{name}.png")
    lines = []
    for step in range(STEPS):
        for n, source in enumerate(SOURCES):
            uid, last = f"{step}/{n}", n == len(SOURCES) - 1
            lines.append({"kind": "prompt", "step": step, "uid": uid, "id": uid, "source": source, "places": last,
                          "prompt": f"Where, <{step}>?", "gold": "[[100,200,300,400]]" if last else "yes"})  # fmt: skip
            for member, (said, earned) in enumerate((("no", 0.0), (f"<b>yes {step}</b>", 1.0), ("no", 0.0))):
                if last and earned:
                    said = "<|begin_of_box|>[[500,500]]<|end_of_box|>"
                lines.append({"kind": "sample", "step": step, "uid": uid, "source": source, "member": member,
                              "reward": earned, "flags": ["timeout"] * (not earned), "text": said,
                              "images": ["aa", "bb"] if last and step else ["gone"] if last else []})  # fmt: skip
    lines.append({"kind": "aborted", "source": "task04", "uid": "0/4", "step": 1})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples.jsonl").write_text(text + '{"kind": "sam')
    spans = [("rollout", 0, 3), ("rollout", 2, 5), ("train", 4, 6), ("rollout", 7, 9), ("train", 8, 10)]
    events = [{"ph": "X", "name": f"{stage} {i}", "cat": stage, "ts": 1e6 * begin, "dur": 1e6 * (end - begin)}
              for i, (stage, begin, end) in enumerate(spans)]  # fmt: skip
    numbers = {"overlap": 0.25, "rollout_seconds": 7.0, "train_seconds": 4.0}
    (folder / "trace.json").write_text(json.dumps({"traceEvents": events, "otherData": numbers}))
    return tmp_path


def test_the_table_has_the_first_and_the_last_tenth_of_each_source(run):
    found = report_rollouts.curves(report_run.read_stage("rl", run / "rl"))
    table = report_rollouts.table(found)
    assert [row[0].text for row in table.rows] == sorted(SOURCES)
    column = {name: i for i, name in enumerate(table.header)}
    for row in table.rows:
        n = SOURCES.index(row[0].text)
        first, last = (np.mean([reward(n, step) for step in steps]) for steps in (range(1, 5), range(37, 41)))
        assert [cell.text for cell in row[1:4]] == ["40", f"{first:.3f} → {last:.3f}", f"{last - first:+.3f}"]
        assert row[2].tone == row[3].tone == "good"
        of = lambda name, row=row: row[column[name]]  # noqa: E731
        assert of("truncated") == (f"{0.5 - 0.025:.3f} → {0.5 - 0.385:.3f}", "good", "")
        assert of("pass@k").text == "0.900 → 0.900" and of("mismatch KL").text == "0.001 → 0.001"
        assert of("aborted").text == ("40" if n == 4 else "0") and of("timeouts").text == ("25%" if n == 3 else "–")


def test_early_and_late_groups_are_shown_with_their_pictures_and_every_different_answer(run, monkeypatch):
    monkeypatch.setattr(report_rollouts, "READ", 40_000)  # of far more: both ends are read, each with a torn line
    assert (run / "rl" / "samples.jsonl").stat().st_size > 500_000
    groups = report_rollouts.groups(run / "rl")
    assert list(groups) == sorted(SOURCES)
    for source, (early, late) in groups.items():
        assert early.prompt["step"] <= 1 and late.prompt["step"] >= STEPS - 4 and early.prompt["source"] == source
        assert [row["reward"] for row in early.answers] == [1.0, 0.0, 0.0]
    page = Reader(report.write(run).read_text(encoding="utf-8"))
    assert "<b>yes 0</b>" in page.text and "Where, <1>?" in page.text and page.text.count("× 2") == 2 * len(SOURCES)
    outside = [address for address in page.addresses if not address.startswith(("#", "data:image/png;base64,"))]
    assert not outside
    # Two groups of the one source with pictures, two of each; on the first the gold box and the model's point.
    drawn = [(tag, attrs.get("class")) for tag, attrs in page.tags if tag in ("image", "rect", "circle")]
    marked = [(tag, kind) for tag, kind in drawn if kind in ("gold", "model")]
    assert [tag for tag, _ in drawn].count("image") == 4
    assert marked == [("rect", "gold"), ("circle", "model")] * 2
    assert "gone.png" not in page.text, "a group whose picture is there is preferred"


def test_what_is_not_there_is_said_or_left_out(run):
    (run / "rl" / "trace.json").write_text("{")
    for picture in (run / "rl" / "pictures").iterdir():
        picture.unlink()
    text = Reader(report.write(run).read_text(encoding="utf-8")).text
    assert "aa.png cannot be shown" in text and "The pipeline" not in text
    (run / "rl" / "samples.jsonl").unlink()
    text = Reader(report.write(run).read_text(encoding="utf-8")).text
    assert "Rollouts" not in text and "By data source" in text


def test_lanes_are_where_the_stages_worked(run):
    found = report_rollouts.pipeline(run / "rl")
    assert found.busy == {"rollout": [(0.0, 1.0), (3.0, 5.0)], "train": [(0.0, 2.0), (4.0, 6.0)]}
    assert found.seconds == 6.0 and [begin for _, begin in found.steps] == [0.0, 4.0]
    page = Reader(report.write(run).read_text(encoding="utf-8"))
    trace = json.loads((run / "rl" / "trace.json").read_text())
    (run / "rl" / "trace.json").write_text(json.dumps(trace | {"otherData": {"overlap": 0.0}}))
    assert "worked at once in 0% of the time" in Reader(report.write(run).read_text(encoding="utf-8")).text
    assert "worked at once in 25% of the time" in page.text and "rollout 7 s, train 4 s" in page.text
    bars = [(float(a["x"]), float(a["width"])) for tag, a in page.tags if tag == "rect" and "fill" in a]
    scale = (720 - 70 - 8) / 6.0
    wanted = [(0, 1), (3, 5), (0, 2), (4, 6)]
    np.testing.assert_allclose(bars, [(70 + scale * a, scale * (b - a)) for a, b in wanted], atol=0.06)


def test_every_source_has_its_curves_and_none_twice(run):
    """32 sources in charts of six and fewer; what is 0 throughout, or told elsewhere, takes no room."""
    page = Reader(report.write(run).read_text(encoding="utf-8"))
    titles = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("class") == "chart"]
    by_source = 8 * 6  # reward, pass@k, length, truncated, mismatch, staleness, timeout, aborted; six charts each
    assert len(titles) == by_source + 6 + 2 + 1, "and of the part of the reward; loss and mean reward; the lanes"

"""Runs beside each other, written by hand: curves, differences, data, time, faults, and what is damaged.

Read back with the standard library's parsers. How the page looks is not covered.
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from glmv_jax import cli
from glmv_jax.eval import report, report_run, report_runs, report_runs_tables
from tests.eval.pages import Reader

SOURCES = {"count": 300, "read": 100}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(folder, *, stage="sft", lr=1e-3, steps=60, loss=2.0, finished=True, **config):
    """A run whose loss falls from `loss` to half of it, straight."""
    (folder / "samples").mkdir(parents=True)
    config = {"stage": stage, "seed": 0, "optim.lr": lr, "faults": f"{folder}/faults.jsonl"} | config
    (folder / "config.json").write_text(json.dumps(config))
    meta = {"stage": stage, "jax": "0.10.2", "devices": ["cpu:cpu"] * 2, "host": {"cores": 2, "memory": 2**34},
            "versions": {"numpy": "2.0"}, "commit": f"abc{stage}", "params": 1_000_000}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    rows = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "wall": 2.0 * step, "kind": "train", "loss": loss * (1 - step / steps / 2),
                     "ce/count": 1.0 + 0.01 * step, "seen/count": 3 * step, "seen/read": step, "data_wait": 0.25,
                     "tokens_per_second": 1000.0 + step, "skipped": float(step in (5, 6))})  # fmt: skip
        if step % 20 == 0:
            rows.append({"step": step, "wall": 2.0 * step, "kind": "eval", "heldout loss": loss + 1 / step})
    (folder / "metrics.jsonl").write_text(lines(rows))
    time = [{"attempt": 1, "step": steps, "seconds": {"steps": 90.0, "compile": 30.0}}]
    (folder / "goodput.jsonl").write_text(lines(time))
    if finished:
        sources = {name: {"samples": count, "tokens": 9 * count} for name, count in SOURCES.items()}
        metrics = {
            "heldout loss": {"untrained": 9.0, "trained": loss, "chance": 9.5},
            "accuracy/mean": {"trained": loss / 10},
        }
        results = {"metrics": metrics, "seconds": 130.0, "skipped": 2, "sources": sources, "tokens": 3600}
        (folder / "results.json").write_text(json.dumps(results))
    Image.fromarray(np.full((24, 32, 3), 90, np.uint8)).save(folder / "samples" / "a.png")
    box = {"box": [10, 10, 500, 500], "role": "gold"}
    samples = [{"source": "ground", "id": "7", "image": "a.png", "prompt": "Where?", "gold": "[[10,10,500,500]]",
                "answer": f"<b>{loss}</b>", "correct": loss < 2, "boxes": [box, box | {"role": "answer"}]}]  # fmt: skip
    (folder / "samples" / "samples.jsonl").write_text(lines(samples))
    return folder


def table(content):
    """{first cell: [the others]}"""
    return {row[0].text: [cell.text for cell in row[1:]] for row in content.rows}


@pytest.fixture
def two(tmp_path):
    return write_run(tmp_path / "a<b>" / "sft"), write_run(tmp_path / "c" / "sft", lr=3e-3, loss=1.0, extra=[1])


# --- the page ---------------------------------------------------------------------------------------------------------


def test_two_runs_are_one_self_contained_page(two, tmp_path):
    path = report.write(two, tmp_path / "both.html")
    text = path.read_text(encoding="utf-8")
    page = Reader(text)
    outside = [address for address in page.addresses if not address.startswith(("#", "data:image/png;base64,"))]
    assert not outside and not any(tag in ("script", "link", "iframe") for tag, _ in page.tags) and "url(" not in text
    assert "a<b>/sft · c/sft" in page.text and "2 of 2 finished" in page.text
    anchors = {attrs.get("id") for _, attrs in page.tags}
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= anchors
    boxes = [attrs for tag, attrs in page.tags if tag == "input"]
    assert [box["id"] for box in boxes] == ["r0", "r1"] and all(f"#{b['id']}:not(:checked)" in text for b in boxes)
    # One picture for both answers: the gold box once, each run's own in its colour.
    drawn = [(attrs["class"], attrs.get("style", "")) for tag, attrs in page.tags if tag == "rect"][:3]
    assert drawn == [("gold", ""), ("model", "stroke:var(--c0)"), ("model", "stroke:var(--c1)")]
    assert "<b>2.0</b> ✗ wrong" in page.text and "<b>1.0</b> ✓ right" in page.text


def test_curves_are_laid_over_each_other_a_colour_a_run(two, tmp_path):
    text = report.write(two, tmp_path / "both.html").read_text(encoding="utf-8")
    title, chart = re.search(r"<b>(loss, train)</b></figcaption>(<svg.*?</svg>)", text).groups()
    groups = {g.get("class"): g for g in ElementTree.fromstring(chart).iter("g")}
    assert list(groups) == ["r0", "r1"]
    for i, group in enumerate(groups.values()):
        (bold,) = [path for path in group if path.get("class") == "bold"]
        assert bold.get("stroke") == f"var(--c{i})" and bold[0].text == ("a<b>/sft", "c/sft")[i]
    # Both fall by half; on common axes the second begins where the first ends.
    ends = [[float(pair.split()[1]) for pair in re.findall(r"[\d.]+ [\d.]+", g[-1].get("d"))] for g in groups.values()]
    assert ends[0][-1] == pytest.approx(ends[1][0], abs=2.0) and ends[0][0] < ends[0][-1] < ends[1][-1]
    legend = re.search(r"loss, train</b>.*?</svg><figcaption>(.*?)</figcaption>", text).group(1)
    assert re.findall(r"<small>([\d.]+)</small>", legend) == ["1.017", "0.508"]  # the mean of the last twentieth


def test_more_runs_than_colours_are_told_apart_by_broken_lines(tmp_path):
    runs = [write_run(tmp_path / f"run{i}", loss=1.0 + i / 10) for i in range(8)]
    text = report.write(runs, tmp_path / "all.html").read_text(encoding="utf-8")
    chart = ElementTree.fromstring(re.search(r"loss, train</b></figcaption>(<svg.*?</svg>)", text).group(1))
    looks = {(g.get("class").partition(" ")[2], g[-1].get("stroke")) for g in chart.iter("g")}
    assert len(looks) == 8 and ("dash1", "var(--c1)") in looks
    assert not any(path.get("class") == "pale" for path in chart.iter("path"))  # a thicket of single steps


def test_one_run_and_runs_of_different_stages(two, tmp_path):
    page = Reader(report.write(two[0]).read_text(encoding="utf-8"))
    assert (two[0] / "report.html").exists() and "What the configs differ in" not in page.text
    assert not any(tag == "input" for tag, _ in page.tags) and "optim.lr = 0.001" in page.text
    other = write_run(tmp_path / "rl", stage="rl")
    page = Reader(report.write([*two, other], tmp_path / "x.html").read_text(encoding="utf-8"))
    assert "These runs are of different stages (sft, rl)" in page.text
    assert "One run: nothing to compare it with." in page.text
    console = Console(width=160, record=True, file=io.StringIO())
    report.show([*two, other], console)
    shown = console.export_text()
    assert re.search(r"What the configs differ in: sft\s.*key +a<b>/sft +c/sft", shown, re.S)
    assert "What the configs differ in: rl" not in shown and re.search(r"optim.lr +0.001 +0.003", shown)


def test_a_folder_stands_for_the_runs_in_it(two, tmp_path):
    names = lambda *paths: [run.name for run in report_runs.find(paths)]  # noqa: E731
    assert names(tmp_path / "c", two[0]) == ["c/sft", "a<b>/sft"]
    assert names(tmp_path) == ["a<b>/sft", "c/sft"]  # two levels down, as of a sweep
    assert names(two[0], tmp_path / "a<b>" / ".." / "a<b>" / "sft") == ["sft"]
    write_run(tmp_path / "c" / "mim", stage="mim")
    assert names(tmp_path / "c") == ["mim", "sft"]  # in the order of the recipe


# --- what they differ in ----------------------------------------------------------------------------------------------


def test_only_keys_that_differ_are_named_in_full():
    """Against a nested comparison of any two trees of values."""
    rng = random.Random(0)
    values = [0, 1, 1.0, True, None, "1", "", [1], [1.0], [], {}]

    def tree(depth):
        return {key: tree(depth - 1) if depth and rng.random() < 0.6 else rng.choice(values)
                for key in "abc" if rng.random() < 0.8}  # fmt: skip

    def leaves(node, path=()):
        if isinstance(node, dict) and node:
            return {end: x for key, inner in node.items() for end, x in leaves(inner, (*path, key)).items()}
        return {".".join(path): json.dumps(node)} if path else {}

    for _ in range(200):
        flat = [leaves(tree(2)) for _ in range(3)]
        want = {key for one in flat for key in one if len({other.get(key) for other in flat}) > 1}
        found = report_runs.differences([{key: json.loads(x) for key, x in one.items()} for one in flat])
        assert set(found) == want
        for key, row in found.items():
            assert ["" if x is report_runs.MISSING else json.dumps(x) for x in row] == [f.get(key, "") for f in flat]


def test_tables_of_two_runs(two):
    runs = report_runs.find(two)
    config = report_runs_tables.config_table(runs)
    assert table(config) == {"extra": ["not set", "[1]"], "optim.lr": ["0.001", "0.003"]}  # not where faults are logged
    results = report_runs_tables.results_table(runs)
    assert results.header[-1] == "chance"
    assert table(results) == {"heldout loss": ["2.000", "1.000", "−1.000", "9.500"],
                              "accuracy/mean": ["0.200", "0.100", "−0.100", "–"]}  # fmt: skip
    assert [[cell.tone for cell in row[1:4]] for row in results.rows] == [["", "good", "good"], ["good", "", "bad"]]
    assert table(report_runs_tables.sources_table(runs)) == {
        "count": ["300 (75%)", "300 (75%)"], "read": ["100 (25%)", "100 (25%)"], "all": ["400", "400"]}  # fmt: skip
    said = table(report_runs_tables.throughput_table(runs))
    assert said["waiting for data"] == ["25.0%"] * 2 and said["tokens/s"] == ["1.03k"] * 2
    time = table(report_runs_tables.time_table(runs))
    assert time["goodput"] == ["75%"] * 2 and time["compile"] == ["30 s (25%)"] * 2
    same = report_runs_tables.config_table([runs[0], runs[0]])
    assert not same.rows and same.note == "The configs are the same, to the last value."


def test_a_run_under_way_shows_how_far_it_is(tmp_path):
    half = report_runs.find([write_run(tmp_path / "half", finished=False, steps=45)])
    assert table(report_runs_tables.results_table(half))["heldout loss"] == ["2.025", "–"]
    assert table(report_runs_tables.sources_table(half))["count"] == ["135 (75%)"]
    assert table(report_runs_tables.throughput_table(half))["state"] == ["stopped at step 45"]
    old = write_run(tmp_path / "old", **{"data.weights.a": 3.0, "data.weights.b": 1.0, "data.weights.c": 0.0})
    text = re.sub(r'"seen/\w+": \d+, ', "", (old / "metrics.jsonl").read_text())
    (old / "metrics.jsonl").write_text(text)
    (old / "results.json").unlink()
    assert table(report_runs_tables.sources_table(report_runs.find([old]))) == {"a": ["≈ 75%"], "b": ["≈ 25%"]}


def test_environments_are_compared(two, tmp_path):
    other = write_run(tmp_path / "rl", stage="rl")
    content = report_runs_tables.environment_table(report_runs.find([two[0], other]))
    assert [row[0].text for row in content.rows if row[0].tone] == ["commit"]
    assert content.rows[0][0].text == "commit" and table(content)["devices"] == ["2 x cpu:cpu"] * 2
    assert table(content)["numpy"] == ["2.0", "2.0"] and table(content)["memory"] == ["16.0 GiB"] * 2


def test_faults_are_counted_by_their_reason(two):
    folder = two[0]
    torn = [{"source": "web", "index": i % 3, "id": f"f/{i % 3}.png", "reason": f"OSError: '{i}.png' broke at 0x{i}f"}
            for i in range(6)]  # fmt: skip
    other = [{"source": "web", "index": 9, "id": "x", "reason": "ValueError: 17 pixels"}]
    (folder / "faults.jsonl").write_text(lines(torn + other))
    attempts = [{"attempt": n, "step": 9 * n, "seconds": {"steps": 1.0}} for n in (1, 2, 3, 4)]
    attempts[1]["signal"], attempts[2]["signal"] = 15, 0
    (folder / "goodput.jsonl").write_text(lines(attempts))
    spikes = [{"step": 30 + i, "wall": 1.0, "kind": "spike", "loss": 9.0, "median": 2.0, "deviations": 8.5 + i,
               "samples/count": 3, "samples/<read>": 5} for i in range(2)]  # fmt: skip
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(lines(spikes))
    runs = report_runs.find(two)
    assert report_runs.faults(runs[0]) == {
        "record left out: OSError: … broke at …": 3, "record left out: ValueError: … pixels": 1,
        "update left out: not finite": 2, "loss spike": 2, "stopped by SIGTERM": 1,
        "stopped by a signal to another process": 1, "restart": 3, "restart after a kill or an error": 1,
    }  # fmt: skip
    assert report_runs.faults(runs[1]) == {"update left out: not finite": 2}
    assert table(report_runs_tables.throughput_table(runs))["last step"] == ["60", "60"]
    rows = report_runs_tables.spikes_table(runs).rows
    assert [cell.text for cell in rows[0]] == ["a<b>/sft", "31", "loss", "9.000", "2.000", "9.5", "<read> 5, count 3"]
    assert report_runs_tables.spikes_table(runs[1:]) is None
    assert ("deviations", "spike") not in runs[0].curves()  # no curve of its own
    text = report.write(two[0]).read_text(encoding="utf-8")
    Reader(text)
    chart = ElementTree.fromstring(re.search(r"loss, train</b></figcaption>(<svg.*?</svg>)", text).group(1))
    rings = [ring[0].text for ring in chart.iter("circle") if ring.get("class") == "ring"]
    assert rings == ["sft, spike, step 30: 9", "sft, spike, step 31: 9"]


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_a_run_without_a_metric_is_named(two, tmp_path):
    empty = write_run(tmp_path / "new", finished=False)
    (empty / "metrics.jsonl").unlink()
    page = Reader(report.write([empty, *two], tmp_path / "x.html").read_text(encoding="utf-8"))
    assert "new: no metrics yet" in page.text and "not run yet" in page.text
    (two[0] / "metrics.jsonl").write_text("")
    with (two[1] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "wall": 26')
    page = Reader(report.write(two, tmp_path / "x.html").read_text(encoding="utf-8"))
    assert "c/sft: 1 unreadable line of metrics.jsonl passed over" in page.text
    assert "a<b>/sft: no metrics yet" in page.text


def test_whatever_is_in_the_files_a_report_is_made(tmp_path, capsys):
    """Values of every file exchanged for others, and bytes of it: a page or one line, never a traceback."""
    rng = random.Random(1)
    odd = [None, True, -1, 1e308, math.inf, math.nan, "x", "", [], {}, [None], [[1, 2]], {"a": 1}, {"a": {}}]
    odd.append({"seconds": {"steps": "x"}})

    def spoilt(value):
        if rng.random() < 0.04:
            return rng.choice(odd)
        if isinstance(value, dict):
            return {key: spoilt(x) for key, x in value.items() if rng.random() > 0.02}
        return [spoilt(x) for x in value] if isinstance(value, list) else value

    good, bad = write_run(tmp_path / "good", steps=12), write_run(tmp_path / "bad", steps=12)
    row = {"source": "web", "index": 1, "id": "x", "reason": "gone"}
    (bad / "faults.jsonl").write_text(lines([row]))
    files = {path: path.read_text() for path in bad.rglob("*.json*")}
    assert len(files) == 7
    for turn in range(60):
        for path, text in files.items():
            if path.suffix == ".jsonl":
                text = "".join(json.dumps(spoilt(json.loads(line))) + "\n" for line in text.splitlines())
            else:
                text = json.dumps(spoilt(json.loads(text)))
            if rng.random() < 0.1:
                at = rng.randrange(len(text))
                text = text[:at] + rng.choice("\0{]\n\ud7ff") + text[at + 1 :]
            path.write_text(text)
        Reader(report.write([good, bad], tmp_path / "x.html").read_text(encoding="utf-8"))
        if turn % 10 == 0:
            assert cli.main(["report", str(bad)]) == 0
    capsys.readouterr()
    (bad / "metrics.jsonl").unlink()
    (bad / "metrics.jsonl").mkdir()
    assert "metrics.jsonl cannot be read (Is a directory)" in Reader(report.write(bad).read_text()).text


def test_the_command(two, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *map(str, two)]) == 0
    assert (tmp_path / "report.html").exists() and "report: report.html" in capsys.readouterr().out
    assert cli.main(["report", "--run", str(two[0]), "--out", "mine.html"]) == 0 and (tmp_path / "mine.html").exists()
    for argv, said in [
        ([str(two[0]), "gone"], "no run directory gone"),
        ([str(two[0]), str(two[0] / "samples")], "samples is no run, nor a folder of runs"),
        ([str(two[0]), "--out", "no/such.html"], "cannot be written (No such file or directory); give another file"),
    ]:
        assert cli.main(["report", *argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("glmv report: ") and said in error and error.count("\n") == 1


def test_a_number_is_finite():
    assert [report_run.is_number(x) for x in (1, 0.5, True, "1", None, math.inf, math.nan)] == [
        True,
        True,
        *[False] * 5,
    ]

"""The report of a run directory written by hand: whole, half done, and damaged.

Read back with the standard library's HTML and XML parsers. How the page looks is not covered.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from glmv_jax.eval import report, report_run, report_svg, report_tables
from glmv_jax.typing import UserError
from tests.eval.pages import Reader

TASKS = ("count", "read", "ground")


def write_stage(root, name, *, seconds, flops, metrics, tasks=(), loss=3.0):
    folder = root / name
    (folder / "samples").mkdir(parents=True)
    config = {"stage": name, "seed": 0, "optim.lr": 1e-3, "note": "<b>not bold</b>"}
    (folder / "config.json").write_text(json.dumps(config))
    meta = {"stage": name, "jax": "0.10.2", "devices": ["cpu:cpu"] * 8, "host": {"cores": 2}, "params": 1_234_567}
    (folder / "meta.json").write_text(json.dumps(meta))
    rows, random = [], np.random.default_rng(0)
    for step in range(1, 601):
        value = loss * math.exp(-step / 200) + 0.5 + random.normal() * 0.1
        row = {"step": step, "wall": seconds * step / 600, "kind": "train", "loss": value, "samples_per_s": 100.0}
        row |= {f"reward/{task}": min(1.0, step / 600 + random.normal() * 0.05) for task in tasks}
        rows.append(row)
        if step % 100 == 0:
            held_out = {"heldout/loss": value + 0.1, "nan": math.nan}
            rows.append({"step": step, "wall": seconds * step / 600, "kind": "eval"} | held_out)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {"metrics": metrics, "seconds": seconds, "flops": flops, "samples": 1e5, "tokens": 2.5e6}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def picture(path, shade, size=(64, 48)):
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[8:30, 10:40] = shade
    Image.fromarray(pixels).save(path)


def pair(untrained, trained, chance=None, note=""):
    return {"untrained": untrained, "trained": trained, "chance": chance, "note": note}


def accuracies(untrained, trained):
    return {f"accuracy/{task}": pair(untrained, trained + i / 10, 0.1) for i, task in enumerate(TASKS)}


@pytest.fixture
def run(tmp_path):
    """A recipe with everything finished but sft_more; names with HTML in them, odd answers, a broken picture."""
    root = tmp_path / "quick<start>"
    root.mkdir()
    write_stage(root, "teacher", seconds=60, flops=1e12, metrics={"r1": pair(0.01, 0.1, 0.006)})
    mim = {"loss": pair(1.9, 0.8), "knn": pair(0.1, 0.05, 0.05, "k = 20")}
    write_stage(root, "mim", seconds=120, flops=3e12, metrics=mim)
    siglip = write_stage(root, "siglip", seconds=120, flops=2e12, metrics={"en_to_image/r1": pair(0.006, 0.2, 0.006)})
    write_stage(root, "pretrain", seconds=200, flops=4e12, metrics={"loss": pair(8.3, 2.5), "draft": pair(None, 0.6)})
    sft = write_stage(root, "sft", seconds=150, flops=2e12, metrics=accuracies(0.0, 0.3))
    shuffled = {f"accuracy_shuffled/{task}": pair(None, 0.15) for task in TASKS}
    rl = write_stage(root, "rl", seconds=250, flops=5e12, metrics=accuracies(0.3, 0.5) | shuffled, tasks=TASKS)

    for i in range(6):
        picture(siglip / "samples" / f"{i}.png", (40 * i, 90, 200))
    queries = [
        {"kind": "retrieval", "query": "red apple", "lang": "en", "images": ["0.png", "1.png", "2.png"], "gold": 1},
        {"kind": "retrieval", "query": "红苹果", "lang": "zh", "images": ["3.png", "4.png"], "gold": None},
    ]
    (siglip / "samples" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))

    picture(sft / "samples" / "a.png", (250, 60, 60))
    (sft / "samples" / "broken.png").write_bytes(b"no picture at all")
    base = {"source": "ground", "image": "a.png", "prompt": "Where is <it>?", "gold": "[[156,167,625,625]]"}
    rows = [
        base | {"id": "1", "answer": "[[100,100,500,500]]", "correct": False, "boxes": [
            {"box": [156, 167, 625, 625], "role": "gold"}, {"box": [100, 100, 500, 500], "role": "answer"}]},
        base | {"id": "2", "answer": "[[1]]", "correct": True, "boxes": [
            {"point": [500, 500], "role": "answer"}, {"box": [1, 2], "role": "answer"}, {"box": "x"}, 3]},
        base | {"id": "3", "answer": "\x00\ud800<script>alert(1)</script>", "reward": 0.25},
        base | {"id": "4", "image": "broken.png", "answer": ""},
        base | {"id": "5", "image": "gone.png", "source": "count"},
        {"id": "6", "source": "text", "prompt": "2+2", "answer": "4", "gold": "4", "correct": True},
    ]  # fmt: skip
    (sft / "samples" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rl.exists()
    return root


def test_page_is_whole_and_self_contained(run):
    path = report.write(run)
    assert path == run / "report.html" and not list(run.glob("*.partial"))
    page = Reader(path.read_text(encoding="utf-8"))

    outside = [address for address in page.addresses if not address.startswith(("#", "data:image/png;base64,"))]
    assert not outside and not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    assert "url(" not in path.read_text(encoding="utf-8")

    for name in ("teacher", "mim", "siglip", "pretrain", "sft", "rl", "sft_more"):
        assert name in page.text
    assert "6 of 7 stages finished, 15 min 00 s of training" in page.text
    assert "not run yet" in page.text
    assert "quick<start>" in page.text and "Where is <it>?" in page.text and "<script>alert(1)</script>" in page.text
    assert "k = 20" in page.text
    assert "red apple" in page.text and "红苹果" in page.text and "中文" in page.text
    assert "found at place 2" in page.text and "not among the first 2" in page.text
    assert "broken.png cannot be shown" in page.text and "gone.png cannot be shown" in page.text
    assert "✓ right" in page.text and "✗ wrong" in page.text and "reward 0.25" in page.text
    assert "optim.lr = 0.001" in page.text and "8 x cpu:cpu" in page.text


def test_page_begins_with_a_line_a_stage_and_an_answer_of_each_source(run):
    begins = Reader(report.write(run).read_text(encoding="utf-8")).text.partition("all held-out results")[0]
    assert re.search(r" mim loss stage 1: [^.]* 1.900 0.800 – 2 min 00 s siglip", begins), begins
    assert re.search(r" sft_more not run yet control: [^.]* – – – –", begins)
    assert "What it answers after sft Dashed:" in begins, "rl has given no answers here"
    assert begins.count("Where is <it>?") == 1 and "[[100,100,500,500]]" in begins, "the first of its source"
    results = json.loads((run / "sft" / "results.json").read_text())
    results["metrics"]["accuracy/mean"] = {"untrained": 0.1, "trained": 0.05, "chance": 0.2}
    (run / "sft" / "results.json").write_text(json.dumps(results))
    assert re.search(r"sft accuracy/\s?mean .* 0.100 0.050 0.200", Reader(report.write(run).read_text()).text)


def test_what_went_wrong_in_a_recipe_is_told(run):
    assert "Faults" not in Reader(report.write(run).read_text(encoding="utf-8")).text
    fault = {"source": "web", "index": 1, "id": "a.png", "reason": "OSError: truncated"}
    (run / "pretrain" / "faults.jsonl").write_text(json.dumps(fault) + "\n")
    (run / "sft" / "goodput.jsonl").write_text('{"attempt": 2, "step": 9, "seconds": {"steps": 1.0}}\n')
    console = Console(width=160, record=True, file=io.StringIO())
    report.show(run, console)
    shown = console.export_text()
    assert re.search(r"record left out: OSError: truncated +– +– +– +1 +– +–", shown), shown
    assert re.search(r"restart +– +– +– +– +1 +–", shown)
    assert "Faults" in Reader(report.write(run).read_text(encoding="utf-8")).text


def test_held_out_curve_lies_beside_the_training_curve_of_its_name(run):
    page = report.write(run).read_text(encoding="utf-8")
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="chart".*?</svg>', page)]
    titles = [[title.text for title in chart.iter("title")] for chart in charts]
    assert sum("loss, train" in found and "loss, held-out, step 600: " in " ".join(found) for found in titles) == 6
    # Of each of the six stages its loss, and its throughput folded away; of rl also the rewards, three in one chart.
    assert len(charts) == 6 * 2 + 1
    assert page.count("<details><summary>more curves") == 6


def test_boxes_and_points_are_drawn_where_they_are(run):
    page = Reader(report.write(run).read_text(encoding="utf-8"))
    boxes = [attrs for tag, attrs in page.tags if tag == "rect"]
    assert [box["class"] for box in boxes] == ["gold", "model"] * 2, "the page begins with one of the answers below"
    assert boxes[:2] == boxes[2:]
    # The gold box of the picture: 0..999 over 64 x 48 pixels gives back the lit rectangle, to a pixel.
    corner = [float(boxes[0][name]) for name in ("x", "y", "width", "height")]
    np.testing.assert_allclose(corner, [10, 8, 30, 22], atol=0.1)
    circles = [attrs for tag, attrs in page.tags if tag == "circle" and "class" in attrs]
    assert [(float(c["cx"]), float(c["cy"])) for c in circles] == [(32, 24)]
    image = next(attrs for tag, attrs in page.tags if tag == "image" and attrs["width"] == "64")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["href"].partition(",")[2]))))
    assert pixels.shape == (48, 64, 3)


def test_terminal_tables_hold_the_numbers(run):
    console = Console(width=160, record=True, file=io.StringIO())
    report.show(run, console)
    shown = console.export_text()
    assert re.search(r"accuracy/count +0\.300 +0\.500 +0\.100", shown)
    assert re.search(r"count +0\.300 +0\.500 +\+0\.200 +– +0\.150 +– +0\.100", shown), shown
    assert re.search(r"mean +0\.400 +0\.600 +\+0\.200", shown)
    assert re.search(r"rl +4 min 10 s +28% +5T +29% +20G", shown), shown
    assert re.search(r"knn +0\.100 +0\.050", shown)


def test_the_mean_of_reinforcement_learning_is_over_the_tasks_it_trained(run):
    """Tasks that were only evaluated stand below it; drawn answers have a table of their own."""
    first, *others = sorted(TASKS)
    config = json.loads((run / "rl" / "config.json").read_text()) | {f"data.weights.{first}": 1.0}
    (run / "rl" / "config.json").write_text(json.dumps(config))
    results = json.loads((run / "rl" / "results.json").read_text())
    results["metrics"] |= {f"accuracy_sampled/{task}": pair(0.2, 0.4) for task in TASKS}
    (run / "rl" / "results.json").write_text(json.dumps(results))
    greedy, drawn = report_tables.rl_tables(report_run.read(run))
    assert [row[0].text for row in greedy.rows][:3] == [first, "mean", f"{others[0]} †"]
    assert [cell.text for cell in greedy.rows[0][1:]] == [cell.text for cell in greedy.rows[1][1:]]
    assert [cell.text for cell in drawn.rows[1]] == ["mean", "0.200", "0.400", "+0.200", "–"]


def test_a_result_that_is_no_number_has_no_gain(run):
    results = json.loads((run / "rl" / "results.json").read_text())
    results["metrics"]["accuracy/read"]["trained"] = None
    (run / "rl" / "results.json").write_text(json.dumps(results))
    (greedy,) = report_tables.rl_tables(report_run.read(run))
    assert {row[0].text: [cell.text for cell in row[1:4]] for row in greedy.rows}["read"] == ["0.400", "–", ""]


def test_direction_of_improvement():
    better = report_tables.improved
    assert better("loss", 2.0, 1.0) is True and better("held_out_loss", 1.0, 2.0) is False
    assert better("accuracy/read", 0.1, 0.2) is True and better("knn", 0.2, 0.2) is False
    assert better("accuracy_shuffled/read", 0.1, 0.2) is None and better("r1", None, 0.2) is None
    assert better("loss", 1.0, math.nan) is None
    assert better("heldout mtp behind images", 2.0, 1.0) is True and better("heldout mtp_accuracy", 0.2, 0.1) is False


def test_half_done_and_damaged_runs_are_shown_as_far_as_they_got(run):
    (run / "rl" / "results.json").unlink()
    (run / "mim" / "results.json").write_text('{"metrics": {"lo')
    (run / "mim" / "config.json").write_text("[1]")
    with (run / "rl" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 601, "wall": 26')
    (run / "sft" / "metrics.jsonl").unlink()
    (run / "extra").mkdir()
    (run / "extra" / "metrics.jsonl").write_text('{"step": 1, "wall": 1, "kind": "train", "loss": 1.0}\n[]\n')
    page = Reader(report.write(run).read_text(encoding="utf-8"))
    assert "stopped at step 600" in page.text
    assert "1 unreadable line of metrics.jsonl passed over" in page.text
    assert "results.json cannot be read" in page.text and "config.json cannot be read" in page.text
    assert "Before and after" not in page.text
    assert any(attrs.get("id") == "extra" for _, attrs in page.tags)
    report.show(run, Console(file=io.StringIO()))


def test_an_empty_folder_is_a_report_too(tmp_path):
    page = Reader(report.write(tmp_path).read_text(encoding="utf-8"))
    assert page.text.count("not run yet") >= 7 and "0 of 7 stages finished" in page.text


def test_wrong_folders_are_named(run, tmp_path):
    with pytest.raises(UserError, match=r"no run directory .*nowhere; give work directories"):
        report.write(tmp_path / "nowhere")
    (tmp_path / "notes" / "more").mkdir(parents=True)
    with pytest.raises(UserError, match=r"notes is no run, nor a folder of runs: nothing there has metrics.jsonl"):
        report.write([run / "mim", tmp_path / "notes"])
    with pytest.raises(UserError, match=r"notes is no run"):
        report.show(tmp_path / "notes")


def test_resumed_run_keeps_the_last_value_of_a_step(tmp_path):
    (tmp_path / "mim").mkdir()
    rows = [(1, 1.0), (2, 2.0), (3, 9.0), (2, 0.5), (3, 0.25)]  # killed after step 3, resumed from step 1
    text = "".join(json.dumps({"step": step, "wall": 1, "kind": "train", "loss": loss}) + "\n" for step, loss in rows)
    (tmp_path / "mim" / "metrics.jsonl").write_text(text)
    assert report_run.read(tmp_path)["mim"].curves() == {("loss", "train"): [(1, 1.0), (2, 0.5), (3, 0.25)]}


# --- drawing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (2.5, 2.5), (0, 0), (1e-6, 3e-6), (1, 123456), (-5, -1)])
def test_ticks_enclose_the_range_with_round_numbers(low, high):
    ticks = report_svg.ticks(low, high, 4)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - good) for good in (1, 2, 5, 10)) < 1e-6


def test_chart_is_xml_and_draws_values_to_scale():
    points = [(0.0, 0.0), (5.0, 0.5), (10.0, 1.0)]
    chart = ElementTree.fromstring(report_svg.line_chart([report_svg.Series("<a&b>", points, "eval")]))
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in chart.iter("circle")]
    left, right = report_svg.LEFT, report_svg.WIDTH - report_svg.RIGHT
    top, bottom = report_svg.TOP, report_svg.HEIGHT - report_svg.BOTTOM
    np.testing.assert_allclose(dots, [(left, bottom), ((left + right) / 2, (top + bottom) / 2), (right, top)], atol=0.1)
    assert "<a&b>, step 5: 0.5" in [title.text for title in chart.iter("title")]


def test_one_point_and_a_long_noisy_curve_can_be_drawn():
    ElementTree.fromstring(report_svg.line_chart([report_svg.Series("one", [(3.0, 2.0)], "train")]))
    points = [(float(i), math.sin(i)) for i in range(20_000)]
    chart = report_svg.line_chart([report_svg.Series("long", points)])
    ElementTree.fromstring(chart)
    assert len(chart) < 20_000
    assert report_svg.thin(points)[-1] == points[-1]
    constant = report_svg.running_mean([(float(i), 3.0) for i in range(50)])
    np.testing.assert_allclose([y for _, y in constant], 3.0)

"""The report of a sweep that was written by hand: numbers against NumPy and SciPy, pictures read back to scale.

The page is read back with the standard library's parsers. How it looks is not covered.
"""

from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from glmv_jax.eval import report, report_svg, report_sweep
from glmv_jax.typing import UserError
from tests.eval.pages import Reader

ARMS, SEEDS, STEPS = ("embeddings", "masked", "image_token"), 4, 240
OFFSET = {"embeddings": 0.06, "masked": 0.03, "image_token": 0.0}
HEADS = ("heldout loss", "heldout mtp_accuracy", "heldout mtp_agreement")


def write_run(root, name, arm, seed, *, accept=None, steps=STEPS):
    """A run whose noise is mostly its seed's, as its batches are; returns its rows and held-out numbers."""
    common, own = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2, ARMS.index(arm)])
    shift = common.normal() * 0.05
    rows = []
    for step in range(1, steps + 1):
        noise = 0.1 * common.normal() + 0.01 * own.normal()
        ce = 6 * math.exp(-step / 40) + 2 + shift + noise
        mtp = ce + 1 + OFFSET[arm] + 0.03 * own.normal()
        rows.append({"step": step, "wall": step / 2, "kind": "train", "loss": ce + 0.3 * mtp, "ce": ce, "mtp": mtp,
                     "accuracy": ce / 9, "ce/caption": ce, "steps_per_second": 2.0, "lr": 1e-3})  # fmt: skip
    held_out = dict(zip(HEADS, (2.0 + shift, 0.5, 0.6 - OFFSET[arm] + 0.01 * own.normal())))
    held_out |= {f"accept length {kind}": length for kind, length in (accept or {}).items()}
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {"metrics": {key: {"untrained": 9.0, "trained": x} for key, x in held_out.items()}, "step": steps,
               "seconds": 130.0, "train_seconds": 120.0, "tokens": 240_000, "step_memory": 3 << 20}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "meta.json").write_text(json.dumps({"jax": "0.10.2", "params": 3_100_000, "host": {"cores": 2}}))
    return {name: np.array([row[name] for row in rows]) for name in ("loss", "ce", "mtp")} | held_out


def write_file(root, values, **more):
    runs = [{"name": name, "values": v, "status": "finished", "seconds": 130.0, "peak_rss": 3 << 29, "error": ""} | more
            for name, v in values.items()]  # fmt: skip
    (root / "sweep.json").write_text(json.dumps({"config": "x.py:a<b>", "base": {"lr": 1e-3}, "runs": runs}))


@pytest.fixture
def sweep(tmp_path):
    """(folder, {arm: [what each seed's run holds]})."""
    root, values, made = tmp_path / "sweep", {}, {arm: [] for arm in ARMS}
    for seed in range(SEEDS):
        for arm in ARMS:
            name = f"option={arm},seed={seed}"
            values[name] = {"seed": seed, "model.mtp.option": arm}
            made[arm].append(write_run(root, name, arm, seed))
    write_file(root, values)
    return root, made


def of(made, arm, name):
    return np.array([run[name] for run in made[arm]])


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_summary_is_scipys(sweep):
    root, made = sweep
    found = report_sweep.summary(report_sweep.read(root))
    assert list(found["arms"]) == list(ARMS)
    last = lambda arm: of(made, arm, "mtp")[:, -STEPS // 10 :].mean(1)  # noqa: E731
    for name, values in {"heldout mtp_agreement": lambda arm: of(made, arm, HEADS[2]), "train mtp": last}.items():
        for arm in ARMS:
            x, row = values(arm), found["arms"][arm][name]
            low, high = stats.t.interval(0.95, SEEDS - 1, loc=x.mean(), scale=stats.sem(x))
            want = {"n": SEEDS, "mean": x.mean(), "sd": x.std(ddof=1), "low": low, "high": high}
            np.testing.assert_allclose([row[key] for key in want], list(want.values()), rtol=1e-9)
            assert row["by_seed"] == {seed: pytest.approx(float(value)) for seed, value in enumerate(x)}
        for a, b in (("embeddings", "masked"), ("embeddings", "image_token"), ("masked", "image_token")):
            row, test = found["differences"][f"{a} - {b}"][name], stats.ttest_rel(values(a), values(b))
            np.testing.assert_allclose([row["low"], row["high"]], test.confidence_interval(0.95), rtol=1e-6)
    assert json.loads(json.dumps(found))["arms"].keys() == set(ARMS)
    # What the seeds share hides the difference of the arms when they are compared unpaired.
    pair, arms = found["differences"]["embeddings - image_token"]["train mtp"], found["arms"]
    assert pair["low"] > 0.04 and pair["high"] < 0.1
    assert arms["embeddings"]["train mtp"]["low"] < arms["image_token"]["train mtp"]["high"]


def test_steadiness_between_seeds(sweep):
    root, made = sweep
    arm = report_sweep.read(root).arms[0]
    ce = of(made, "embeddings", "ce")
    third = np.arange(1, STEPS + 1) >= 1 + 2 / 3 * (STEPS - 1)
    np.testing.assert_allclose(
        report_sweep.seed_spread(arm, "ce"), np.sqrt(ce[:, third].var(axis=0, ddof=1).mean()), rtol=1e-9
    )
    reach, strays = STEPS // 40, []
    for run in ce:  # the running mean by convolution, away from the ends the same
        smooth = np.convolve(run, np.ones(2 * reach + 1) / (2 * reach + 1), "same")
        strays.append(np.sqrt(np.mean((run - smooth)[third][:-reach] ** 2)))
    found = [member.numbers["strays of ce"] for member in arm.members]
    np.testing.assert_allclose(found, strays, rtol=0.1)


# --- the terminal -----------------------------------------------------------------------------------------------------


def shown(root):
    console = Console(width=140, record=True, file=io.StringIO())
    report.show(root, console)
    return console.export_text()


def notes(text):
    """Without the terminal's line breaks."""
    return " ".join(text.split())


def test_terminal_tables_hold_the_numbers(sweep):
    root, made = sweep
    text = shown(root)
    x = of(made, "masked", "heldout mtp_agreement")
    assert re.search(rf"masked +{x.mean():.3f} +{x.std(ddof=1):.3f} +0\.\d+ to 0\.\d+ +4", text)
    assert re.search(r"train mtp +embeddings − masked +\+0\.0\d+ +\+0\.0\d+ to \+0\.0\d+ +4", text)
    assert re.search(r"embeddings +500 ms +2k +1\.50 GiB +3 MiB +2 min 10 s +3\.1M", text), text
    assert "not measured in these runs" in notes(text) and "metrics are in report.html" not in notes(text)
    assert re.search(r"masked +0, 1, 2, 3 +4 finished", text)


def test_accept_lengths_are_shown_where_a_run_has_them(tmp_path):
    values = {}
    for seed in range(2):
        name = f"seed={seed}"
        write_run(tmp_path, name, "masked", seed, accept={"text": 1.5 + 0.1 * seed, "image": 1.25})
        values[name] = {"seed": seed}
    write_file(tmp_path, values)
    text = shown(tmp_path)
    assert re.search(r"all +0\.\d+ \(0\.\d+\) +0\.500 \(0\.000\) +1\.550 \(0\.071\) +1\.250 \(0\.000\)", text), text
    assert "not measured" not in notes(text) and "Paired differences" not in text


def test_runs_that_did_not_finish_are_named_and_not_counted(sweep):
    root, made = sweep
    (root / "option=masked,seed=3" / "results.json").unlink()
    file = json.loads((root / "sweep.json").read_text())
    for run in file["runs"]:
        if run["name"] == "option=masked,seed=3":
            run |= {"status": "failed", "error": "exit code 2: the <data> ended"}
    (root / "sweep.json").write_text(json.dumps(file))
    text = shown(root)
    assert re.search(r"masked +0, 1, 2, 3 +3 finished, 1 failed", text) and "exit code 2: the <data> ended" in text
    found = report_sweep.summary(report_sweep.read(root))
    assert found["arms"]["masked"]["train mtp"]["n"] == 3 and found["arms"]["embeddings"]["train mtp"]["n"] == 4
    assert found["differences"]["embeddings - masked"]["train mtp"]["n"] == 3
    assert "exit code 2: the <data> ended" in Reader(report.write(root).read_text(encoding="utf-8")).text


def test_nothing_finished_is_a_report_too_and_damage_is_named(tmp_path):
    write_file(tmp_path, {"seed=0": {"seed": 0}}, status="waiting")
    assert "1 waiting" in shown(tmp_path)
    page = Reader(report.write(tmp_path).read_text(encoding="utf-8"))
    assert "0 of 1 runs finished" in page.text and not any(tag == "svg" for tag, _ in page.tags)
    for text in ("{", "{}", '{"runs": [{"name": 3}]}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(UserError, match=r"sweep.json cannot be read .*; give a folder of glmv sweep"):
            report.write(tmp_path)


# --- the page ---------------------------------------------------------------------------------------------------------


def figures(page: str) -> dict[str, tuple[ElementTree.Element, str]]:
    """Title -> (its drawing, its legend)."""
    found = {}
    for text in re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL):
        title = re.search(r"<b>(.*?)</b>", text)[1]
        svg = re.search(r"<svg.*?</svg>", text, re.DOTALL)[0]
        found[title] = ElementTree.fromstring(svg), text.partition("</svg>")[2]
    return found


def path_points(element) -> np.ndarray:
    return np.array([pair.split() for pair in element.get("d").strip("MZ").split("L")], float)


def scale(chart):
    """y in the drawing -> value, from the tick labels alone."""
    marks = [(float(t.get("y")) - 3, float(t.text)) for t in chart.iter("text")
             if t.get("x") == str(report_svg.LEFT - 5) and t.text != "step"]  # fmt: skip
    slope, start = np.polyfit(*np.array(marks).T, 1)
    return lambda y: slope * y + start


def test_page_is_whole_and_self_contained(sweep):
    root, _ = sweep
    path = report.write(root)
    text = path.read_text(encoding="utf-8")
    page = Reader(text)
    assert path == root / "report.html" and not list(root.glob("*.partial"))
    assert not any(tag in ("script", "link", "iframe", "img") for tag, _ in page.tags) and "url(" not in text
    assert not page.addresses and 'name="viewport"' in text
    assert "x.py:a<b>" in page.text and "3 arms, 12 of 12 runs finished" in page.text and "lr = 0.001" in page.text
    for title in ("Seed by seed", "Final values", "Paired differences", "Steadiness", "Time and memory"):
        assert f"<h2>{title}</h2>" in text
    # In sight: loss, its parts, each whole, its second half, and as a difference; rates are nowhere, details folded.
    titles = list(figures(text))
    assert titles[:3] == ["loss, train", "loss, train, second half", "loss, difference to embeddings"]
    assert [t for t in titles if t.startswith("mtp,")] == [
        "mtp, train", "mtp, train, second half", "mtp, difference to embeddings",
    ]  # fmt: skip
    folded = text[text.index("<details><summary>more curves") :]
    assert "<b>ce/caption, train</b>" in folded and "steps_per_second" not in text


def test_curves_lie_inside_the_axes_go_right_and_have_a_legend(sweep):
    for title, (chart, legend) in figures(report.write(sweep[0]).read_text(encoding="utf-8")).items():
        lines = [e for e in chart.iter("path") if e.get("class") == "bold"]
        bands = [e for e in chart.iter("path") if e.get("class") == "band"]
        if not lines:
            continue  # dots
        arms = ARMS[1:] if "difference" in title else ARMS
        assert len(lines) == len(bands) == len(arms), title
        assert [line.find("title").text.split(" − ")[0] for line in lines] == list(arms)
        assert all(f"</i>{arm}" in legend for arm in arms) and legend.count(f"{SEEDS} seeds") == len(arms)
        assert len({line.get("stroke") for line in lines}) == len(arms)
        for shape in [*lines, *bands]:
            x, y = path_points(shape).T
            assert x.min() >= report_svg.LEFT and x.max() <= report_svg.WIDTH - report_svg.RIGHT
            assert y.min() >= report_svg.TOP and y.max() <= report_svg.HEIGHT - report_svg.BOTTOM
        for line, band in zip(lines, bands):
            x, y = path_points(line).T
            assert (np.diff(x) > 0).all() and len(x) > 50
            around = path_points(band)
            assert len(around) == 2 * len(x)
            upper, lower = around[: len(x)], around[len(x) :][::-1]
            assert (upper[:, 0] == x).all() and (lower[:, 0] == x).all()
            assert (upper[:, 1] <= y + 0.11).all() and (lower[:, 1] >= y - 0.11).all()  # drawn to a tenth


def smoothed(rows):
    reach = STEPS // 40
    kernel = np.ones(2 * reach + 1) / (2 * reach + 1)
    return np.array([np.convolve(row, kernel, "valid") for row in rows])  # steps 1 + reach ... STEPS - reach


def test_curve_band_and_difference_are_to_scale(sweep):
    root, made = sweep
    drawn = figures(report.write(root).read_text(encoding="utf-8"))
    chart, _ = drawn["mtp, train, second half"]
    line, band = (next(e for e in chart.iter("path") if e.get("class") == c) for c in ("bold", "band"))
    value, inner = scale(chart), smoothed(of(made, "embeddings", "mtp"))
    y = value(path_points(line)[:, 1])
    want = inner[:, -len(y) :]
    np.testing.assert_allclose(y, want.mean(0), atol=0.01)
    around = value(path_points(band)[:, 1])
    half = (around[: len(y)] - around[len(y) :][::-1]) / 2
    np.testing.assert_allclose(half, want.std(0, ddof=1), atol=0.01)

    chart, _ = drawn["mtp, difference to embeddings"]
    lines = [e for e in chart.iter("path") if e.get("class") == "bold"]
    bands = [e for e in chart.iter("path") if e.get("class") == "band"]
    differences = smoothed(of(made, "image_token", "mtp") - of(made, "embeddings", "mtp"))
    value, y = scale(chart), path_points(lines[1])[:, 1]
    want = differences[:, -len(y) :]
    np.testing.assert_allclose(value(y), want.mean(0), atol=0.002)
    around = value(path_points(bands[1])[:, 1])
    half = (around[: len(y)] - around[len(y) :][::-1]) / 2
    np.testing.assert_allclose(half, stats.t.ppf(0.975, SEEDS - 1) * stats.sem(want, axis=0), atol=0.002)
    assert any(e.get("class") == "grid zero" for e in chart.iter("path"))  # 0 stands out where it lies within


def test_dots_are_to_scale_with_mean_and_interval(sweep):
    root, made = sweep
    chart, _ = figures(report.write(root).read_text(encoding="utf-8"))["heldout mtp_agreement"]
    marks = [(float(t.get("y")) - 3, float(t.text)) for t in chart.iter("text") if t.get("text-anchor") == "end"]
    slope, start = np.polyfit(*np.array(marks).T, 1)
    dots = [(float(e.get("cx")), slope * float(e.get("cy")) + start) for e in chart.iter("circle")]
    spans = [e.get("d")[1:].replace("V", " ").split() for e in chart.iter("path") if e.get("class") == "span"]
    names = [(float(t.get("x")), t.text) for t in chart.iter("text") if t.get("text-anchor") == "middle"]
    for i, arm in enumerate(ARMS):
        x = of(made, arm, "heldout mtp_agreement")
        column = dots[i * SEEDS : (i + 1) * SEEDS]
        np.testing.assert_allclose([y for _, y in column], x, atol=1e-3)
        assert {round(at, 1) for at, _ in column} == {round(names[i][0], 1)} and names[i][1] == arm
        low, high = stats.t.interval(0.95, SEEDS - 1, loc=x.mean(), scale=stats.sem(x))
        np.testing.assert_allclose([slope * float(y) + start for y in spans[i][1:]], [low, high], atol=1e-3)
        assert all(report_svg.TOP <= float(y) <= report_svg.HEIGHT - report_svg.BOTTOM for y in spans[i][1:])


def test_long_labels_become_numbers_and_a_single_seed_has_no_band(tmp_path):
    values = {}
    for i, arm in enumerate(ARMS):
        write_run(tmp_path, f"run{i}", arm, 0)
        values[f"run{i}"] = {"model.mtp.option": arm, "optim.lr": 1e-3 * (i + 1)}
    write_file(tmp_path, values)
    text = report.write(tmp_path).read_text(encoding="utf-8")
    drawn = figures(text)
    assert "1: option embeddings, lr 0.001" in Reader(text).text
    chart, legend = drawn["mtp, train"]
    assert not any(e.get("class") == "band" for e in chart.iter("path")) and "1 seed<" in legend
    names = [t.text for t in drawn["heldout loss"][0].iter("text") if t.get("text-anchor") == "middle"]
    assert names == ["1", "2", "3"]
    assert re.search(r"option masked, lr 0.002 +0\.\d+ +0\.500 +–", shown(tmp_path))

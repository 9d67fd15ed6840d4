"""`glmv tasks`: what is shown is what is graded, nothing in a page is loaded or run, wrong names meet the nearest."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from glmv_jax import cli
from glmv_jax.data.records import Sample
from glmv_jax.rl import showing, tasks
from glmv_jax.rl.rewards import boxed
from glmv_jax.rl.rewards.grade import RIGHT, WRONG
from glmv_jax.rl.task import Task


def generous(content, sample):
    return RIGHT if sample.answer in content else WRONG


def nasty(rng, split):
    picture = Image.new("RGB", (16, 16), (int(rng.integers(256)), 0, 0))
    return Sample("", "nasty", (picture,), "<script>alert(1)</script>\x1b[2J", "a&b\ud800", meta={})


NASTY = Task("nasty", boxed(generous), lambda sample: ["<b>a&b\ud800</b>", "x" * 300], make=nasty)


def test_list_of_all_tasks(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["tasks"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if not line.startswith(" ")] == ["task", *tasks.TASKS]
    (line,) = [line for line in shown.splitlines() if line.startswith("count ")]
    sample = tasks.source("count", "train")[0]
    assert sample.prompt in line and re.search(rf" {sample.answer} +1\.00 +0\.10", line)


def test_samples_of_a_task(capsys):
    assert cli.main(["tasks", "--task", "count", "--count", "2", "--seed", "7", "--split", "heldout"]) == 0
    shown = capsys.readouterr().out
    for i in range(2):
        sample = tasks.source("count", "heldout", 7)[i]
        assert f"{sample.id}  {showing.sizes(sample)}" in shown and f"gold    {sample.answer}  earns 1.00" in shown
    assert "count/heldout/2" not in shown and "0.10 -" in shown


def test_a_task_that_this_machine_cannot_grade_says_why(capsys, monkeypatch, tmp_path):
    lame = dataclasses.replace(tasks.get("count"), missing=lambda: "it needs a loom; buy one")
    monkeypatch.setitem(tasks.TASKS, "count", lame)
    assert cli.main(["tasks", "--task", "count"]) == 2 and "it needs a loom" in capsys.readouterr().err
    console = Console(file=io.StringIO(), width=120)
    assert showing.overview([lame, tasks.get("name")], console, "train", 0)
    assert "it needs a loom; buy one" in console.file.getvalue()
    monkeypatch.setattr(tasks, "TASKS", {"count": lame, "name": tasks.get("name")})
    assert cli.main(["tasks", "--html", str(tmp_path / "page.html"), "--count", "1"]) == 0
    assert "it needs a loom; buy one" in (tmp_path / "page.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_page(tmp_path, capsys):
    path = tmp_path / "tasks.html"
    assert cli.main(["tasks", "--html", str(path), "--count", "1", "--task", "difference", "--task", "captioning"]) == 0
    assert str(path) in capsys.readouterr().out
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    pictures = [Image.open(io.BytesIO(base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,"))))
                for tag, attrs in reader.tags if tag == "img"]  # fmt: skip
    drawn = [p for name in ("difference", "captioning") for p in tasks.source(name, "train")[0].images]
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in drawn]
    assert "earns by a judge" in reader.text and tasks.get("captioning").rubric in reader.text


def test_what_is_hostile_is_shown_and_marked(tmp_path):
    """A text of a sample can neither run in the page nor move the cursor; a grader that pays for cheating is seen."""
    (example,) = showing.examples(NASTY, 1)
    assert not example.sound and example.most == 1.0
    reader = Reader()
    reader.feed(showing.page([(NASTY, [example])], "t"))
    assert "script" not in {tag for tag, _ in reader.tags} and "<script>alert(1)</script>·[2J" in reader.text
    assert ("li", {"class": "bad"}) in reader.tags and "… (300 characters)" in reader.text
    (tmp_path / "page").write_text(showing.page([(NASTY, [example])], "t"), encoding="utf-8")  # no lone surrogates
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    showing.detailed(NASTY, [example], console)
    shown = console.file.getvalue()
    assert "\x1b[2J" not in shown and shown.count("▀") == 16 * 8
    red = example.sample.images[0].getpixel((0, 0))[0]
    assert f"38;2;{red};0;0" in shown
    assert not showing.overview([NASTY], Console(file=io.StringIO()), "train", 0)


@pytest.mark.parametrize(("argv", "message"), [
    (["--task", "cuont"], "task 'cuont' does not exist; nearest: count"),
    (["--taks", "count"], "unknown option '--taks'"),
    (["--task", "line", "--split", "test"], "split 'test' of task line does not exist; use one of train, heldout"),
    (["--count", "0"], "--count 0 shows nothing"),
])  # fmt: skip
def test_wrong_input(capsys, argv, message):
    assert cli.main(["tasks", *argv]) == 2
    assert message in capsys.readouterr().err

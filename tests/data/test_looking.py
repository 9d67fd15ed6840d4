"""What is told of sources: counted here by hand, record by record, with broken ones at known places.

Not covered: how a browser lays the page out.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from glmv_jax.data import looking, looking_html, looking_terminal
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.faults import TRIES, FaultLog, Guarded, LeftOut
from glmv_jax.data.mixture import Mixture
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.records import Sample
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.typing import UserError
from tests.data.test_showing import Page

TOKENIZER, PATCHER = Tokenizer(), Patcher(max_patches=64)
BUILDER = DocumentBuilder(TOKENIZER, PATCHER, 60, 64)


class Samples:
    """Record i is a picture of 16 + i pixels a side and i + 1 words. bad: number -> what it raises."""

    def __init__(self, name: str, length: int, bad: dict[int, Exception] | None = None):
        self.name, self.length, self.bad = name, length, bad or {}

    def __len__(self):
        return self.length

    def __getitem__(self, i: int) -> Sample:
        if i in self.bad:
            raise self.bad[i]
        noise = np.random.default_rng(i).integers(0, 256, (16 + i, 16 + i, 3), np.uint8)
        picture = Image.fromarray(noise)
        return Sample(f"{self.name}-{i}", self.name, (picture,), "", " ".join(["word"] * (i + 1)))


def guarded(source: Samples, log: FaultLog | None = None, **options) -> Guarded:
    made = lambda sample, rng: BUILDER.pretrain(sample)  # noqa: E731
    return Guarded(source, made, name=source.name, seed=0, log=log or FaultLog(), **options)


def look(mixture: Mixture, draws: int, each: int = 1) -> dict[str, looking.Tally]:
    return {tally.name: tally for tally in looking.Looking(TOKENIZER, 8).look(mixture, draws, each)}


def test_records_are_counted_and_measured():
    mixture = Mixture({"a": guarded(Samples("a", 10), records=10), "b": guarded(Samples("b", 4))}, {"a": 3.0, "b": 1.0})
    told = look(mixture, 40, each=2)
    assert (told["a"].wanted, told["a"].records, told["a"].turns, told["a"].drawn) == (0.75, 10, 30, 30)
    assert (told["b"].wanted, told["b"].records, told["b"].turns, told["b"].drawn) == (0.25, None, 10, 10)
    documents = [BUILDER.pretrain(Samples("a", 10)[i]) for i in range(10)] * 3
    assert told["a"].sizes["tokens"] == [len(d.tokens) for d in documents]
    assert told["a"].sizes["patches"] == [d.patches for d in documents]
    assert told["a"].stored == [(16 + i, 16 + i) for i in range(10)] * 3
    assert told["a"].seen == [PATCHER.size(16 + i, 16 + i)[::-1] for i in range(10)] * 3
    shown = told["b"].examples[1].shown
    assert [e.id for e in told["b"].examples] == ["b-0", "b-1"]
    assert "".join(run.text for run in shown.runs).endswith("word word<|endoftext|>")
    np.testing.assert_array_equal(shown.pictures[0].frames[0], PATCHER.resize(Samples("b", 4)[1].images[0]))
    spread = next(one for one in looking.spreads(told["a"]) if one.measure == "pixels stored")
    assert spread.values == ("16x16", "16x16", "20x20", "25x25", "25x25") and sum(spread.bins) == 30
    share = looking.tokens_share(list(told.values()))
    tokens = {name: sum(tally.sizes["tokens"]) for name, tally in told.items()}
    assert share["a"] == pytest.approx(tokens["a"] / (tokens["a"] + tokens["b"]))


def test_what_is_skipped_is_told_with_its_reason_and_ends_nothing(tmp_path):
    bad = {2: OSError("image file is truncated (3 bytes)"), 5: OSError("image file is truncated (71 bytes)"),
           3: LeftOut("its picture is held out"), 7: UserError("no picture")}  # fmt: skip
    log = FaultLog(tmp_path / "faults.jsonl")
    gone = guarded(Samples("gone", 5, {i: ValueError("nothing here") for i in range(5)}), log)
    told = look(Mixture({"a": guarded(Samples("a", 10, bad), log), "gone": gone}, {"a": 1.0, "gone": 1.0}), 100)
    a = told["a"]
    assert (a.turns, a.drawn, a.counts(False), a.counts(True)) == (50, 30, 15, 5) and not a.gave_up
    assert sorted(n for _, n in a.skipped.values()) == [5, 5, 10]  # the two lengths of truncated ones are one reason
    assert a.skipped["OSError: image file is truncated (3 bytes)", False][0] == ["a/2", "a/5", "a/2"]
    assert (told["gone"].turns, told["gone"].drawn, told["gone"].counts(False)) == (50, 0, TRIES)
    assert told["gone"].gave_up == "ValueError: nothing here" and not told["gone"].examples
    assert not log.path.exists()  # a look leaves nothing behind
    said = [line for line, _ in looking_terminal.reasons(told["gone"])]
    share = looking_terminal.reasons(a)[-1][0]
    assert share == "a: 33% of what was read is broken; training ends when more than 5% of 1,000 records are"
    assert said[0].startswith("gone: 20 broken, ValueError: nothing here (gone/0, ") and "training would end" in said[1]


def test_a_bug_is_no_broken_record():
    with pytest.raises(AttributeError, match="of ours"):
        look(Mixture({"a": guarded(Samples("a", 3, {1: AttributeError("of ours")}))}, {"a": 1.0}), 5)


def test_a_rare_source_has_its_examples_all_the_same():
    sources = {name: guarded(Samples(name, 5)) for name in ("often", "rare")}
    told = look(Mixture(sources, {"often": 1000.0, "rare": 1.0}), 10, each=2)
    assert told["rare"].turns == told["rare"].drawn == 0 and not told["rare"].sizes
    assert [example.id for example in told["rare"].examples] == ["rare-0", "rare-1"]


def test_mixtures_of_mixtures_add_up():
    pairs = Mixture({"x": Samples("x", 5), "y": Samples("y", 5)}, {"x": 1.0, "y": 3.0})
    inner = Mixture({"x": guarded(Samples("x", 5), records=5), "z": guarded(Samples("z", 5))}, {"x": 1.0, "z": 1.0})
    below = Guarded(pairs, lambda sample, rng: BUILDER.pretrain(sample), name="pairs", seed=0, log=FaultLog())
    told = look(Mixture({"en": inner, "zh": below}, {"en": 1.0, "zh": 1.0}), 80)
    assert {name: tally.wanted for name, tally in told.items()} == {"x": 0.375, "z": 0.25, "y": 0.375}
    assert {name: tally.turns for name, tally in told.items()} == {"x": 30, "z": 20, "y": 30}


def test_the_page_and_the_terminal_hold_the_same():
    odd = Samples("<odd>\x1b[2J", 6, {2: OSError("a <b>\x1b[31mred")})
    told = list(look(Mixture({odd.name: guarded(odd)}, {odd.name: 1.0}), 6).values())
    page = looking_html.page(told, "a <title>", ["a <note>"])
    read = Page(page)
    assert len(read.images) == 1 and read.texts == ["[gMASK]<sop><|begin_of_image|><|end_of_image|>word<|endoftext|>"]
    assert "<b>" not in page and "&lt;b&gt;" in page and "a &lt;note&gt;" in page and "prefers-color-scheme" in page
    assert "http://" not in page and "https://" not in page
    console = Console(file=io.StringIO(), record=True, width=80)
    looking_terminal.show(told, "title", ["a <note>"], console, draw=None)
    shown = console.export_text(styles=False)
    assert "\x1b" not in shown and "1 broken, OSError: a <b>" in shown and "word<|endoftext|>" in shown

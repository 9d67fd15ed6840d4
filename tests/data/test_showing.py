"""What is shown of a batch: its text is the tokens' decode to the letter, its pictures are those that went in.

The page is read back with the standard library's parser. Not covered: how a browser lays it out.
"""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from glmv_jax.data import chat, packing, showing, showing_html, showing_terminal
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.local.assembling import Assembler
from glmv_jax.data.local.schema import parse
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.models import cogvit
from glmv_jax.typing import UserError
from tests.data.local import examples

TOKENIZER, PATCHER = Tokenizer(), Patcher(max_patches=64)
NAMES = ["docs", "chats"]
BUILDER = DocumentBuilder(TOKENIZER, PATCHER, 400, 256)


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


PICTURES = [noise(0, (48, 32)), noise(1, (16, 64)), noise(2, (64, 64))]


def part(number: int) -> dict:
    return {"type": "image", "image": examples.png(PICTURES[number])}


def batch(builder: DocumentBuilder = BUILDER) -> dict[str, np.ndarray]:
    """Two rows: a document with two pictures and odd characters beside one of text, and a conversation with a box."""
    odd = "a\ttab, <b>&amp;\r\n𠮷 猫\n\n  spaces \u00e9\u0301 " + "".join(chat.BOX)
    document = {"segments": [{"type": "text", "text": odd}, part(0), {"type": "text", "text": "half", "loss": 0.5},
                             {"type": "text", "text": "𠮷𠮷", "loss": 0.25}, part(1)]}  # fmt: skip
    words = {"text": "only words"}
    conversation = {"messages": [
        {"role": "user", "content": [part(2), {"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": "[[100,200,300,400],[1, 2, 3, 4]] not 5, 6, 7, 8"}]}  # fmt: skip
    made = []
    for fields, source in ((document, "docs"), (words, "docs"), (conversation, "chats")):
        (one,) = Assembler(builder).documents(parse(fields, "x", lambda name: b""))
        made.append(dataclasses.replace(one, source=source))
    rows = [made[:2], made[2:]]
    return packing.stack([packing.pack(row, 400, 256, builder.patcher.channels, NAMES) for row in rows])


def expected_texts(of: dict) -> list[str]:
    """What each document's tokens decode to, without its visual tokens."""
    found = []
    for tokens, segments in zip(of["tokens"], of["segments"]):
        for n in range(1, segments.max() + 1):
            spelled = TOKENIZER.decode(tokens[segments == n], keep_special=True)
            found.append(spelled.replace("<|image|>", ""))
    return found


class Page(html.parser.HTMLParser):
    """Texts of the documents, pictures and boxes of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.texts, self.images, self.boxes, self.titles, self._in = [], [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        if tag == "pre":
            self.texts.append("")
        if tag == "span" and "title" in about:
            self._in = "text"
            self.titles.append((about["class"], about["title"]))
        if tag == "img":
            content = base64.b64decode(about["src"].removeprefix("data:image/png;base64,"))
            self.images.append(np.asarray(Image.open(io.BytesIO(content))))
        if tag == "rect":
            self.boxes.append(tuple(float(about[k]) for k in ("x", "y", "width", "height")))

    def handle_endtag(self, tag):
        self._in = "" if tag == "span" else self._in

    def handle_data(self, data):
        if self._in == "text":
            self.texts[-1] += data


def test_runs_are_the_decode_of_the_tokens_with_their_weights():
    made = batch()
    documents = showing.read(made, TOKENIZER, NAMES, 8)
    assert [(d.row, d.segment, d.source) for d in documents] == [(0, 1, "docs"), (0, 2, "docs"), (1, 1, "chats")]
    assert ["".join(run.text for run in d.runs) for d in documents] == expected_texts(made)
    for document in documents:
        where = made["segments"][document.row] == document.segment
        weights = made["loss_weight"][document.row][where]
        assert sum(run.tokens for run in document.runs) == document.tokens == len(weights)
        assert document.learnt == (weights > 0).sum()
        np.testing.assert_array_equal(np.repeat([r.weight for r in document.runs], [r.tokens for r in document.runs]),
                                      weights)  # fmt: skip
        assert [run.picture for run in document.runs if run.picture >= 0] == list(range(len(document.pictures)))
    assert {run.text: run.weight for run in documents[0].runs}["half"] == 0.5
    used = showing.budgets(made)
    assert used[1]["tokens"] == (documents[2].tokens, 400) and used[0]["patches"] == ((made["frame"][0] > 0).sum(), 256)


def test_pictures_are_those_that_went_in():
    documents = showing.read(batch(), TOKENIZER, NAMES, 8)
    seen = [picture for document in documents for picture in document.pictures]
    for picture, given in zip(seen, PICTURES, strict=True):
        (frame,) = picture.frames
        np.testing.assert_array_equal(frame, np.asarray(PATCHER.resize(given)))
        assert picture.tokens == frame.shape[0] * frame.shape[1] // 256


def test_normalised_pictures_come_back_within_rounding():
    made = batch()
    made["patches"] = np.asarray(cogvit.normalised(made["patches"], 3, 2, 8))
    documents = showing.read(made, TOKENIZER, NAMES, 8)
    seen = [frame for document in documents for picture in document.pictures for frame in picture.frames]
    for n, frame in enumerate(seen):  # a still is two equal frames
        np.testing.assert_array_equal(frame, np.asarray(PATCHER.resize(PICTURES[n // 2])))


def test_both_frames_of_a_film_are_shown():
    patcher = dataclasses.replace(PATCHER, frames=2)
    patches, yx = patcher.moving([PICTURES[0], PICTURES[0].rotate(180)])
    for frame, given in zip(showing.pixels(patches, yx, 8), (PICTURES[0], PICTURES[0].rotate(180)), strict=True):
        np.testing.assert_array_equal(frame, np.asarray(patcher.resize(given)))


def test_the_page_holds_the_same_text_pictures_and_boxes():
    made = batch()
    documents = showing.read(made, TOKENIZER, NAMES, 8)
    page = Page(showing_html.page(documents, showing.budgets(made), "a <title>"))
    assert page.texts == expected_texts(made)
    for image, given in zip(page.images, PICTURES, strict=True):
        np.testing.assert_array_equal(image, np.asarray(PATCHER.resize(given)))
    assert page.boxes == [(100, 200, 200, 200), (1, 2, 2, 2)]
    for weight, style in (("0", "w0"), ("0.25", "w1"), ("0.5", "w2"), ("1", "w4")):
        assert {found for found, title in page.titles if title.startswith(f"weight {weight},")} == {style}


def test_the_terminal_shows_the_same_and_no_control_character():
    made = batch()
    documents = showing.read(made, TOKENIZER, NAMES, 8)
    console = Console(file=io.StringIO(), record=True, width=100, force_terminal=True)
    showing_terminal.show(documents, showing.budgets(made), "title", console)
    shown = console.export_text(styles=False)
    text = expected_texts(made)[0].replace("\t", "\\x09").replace("\r", "\\x0d")
    before, rest = text.split("<|begin_of_image|><|end_of_image|>", 1)
    height, width, _ = documents[0].pictures[0].frames[0].shape
    assert before + f"<|begin_of_image|>\n[image 1: {width}x{height} pixels, {height * width // 256} tokens]" in shown
    assert rest.split("<|begin_of_image|>")[0] in shown and expected_texts(made)[1] in shown
    assert f"row 1: 1 documents, {documents[2].tokens} of 400 tokens" in shown
    attack = dataclasses.replace(documents[1], runs=(showing.Run("\x1b[2J\x9b31m\x07", 1.0, 1),))
    assert showing_terminal.body(attack, 1.0).plain == "\\x1b[2J\\x9b31m\\x07"


def test_other_batches_are_refused():
    pairs = {name: batch()[name] for name in ("tokens", "segments", "patches", "loss_weight")}
    with pytest.raises(UserError, match="a batch without image_row is none of stages 3 to 5"):
        showing.read(pairs, TOKENIZER, [], 8)


def test_a_character_of_several_tokens_is_shown_whole():
    parts = [TOKENIZER.encode(text) for text in ("a", "𠮷", "b")]
    assert len(parts[1]) > 2  # bytes
    tokens = np.concatenate(parts)
    weights = np.linspace(0.1, 1, len(tokens)).astype(np.float32)
    runs = list(showing._text_runs(tokens, weights, TOKENIZER))
    assert [(run.text, run.tokens) for run in runs] == [(t, len(p)) for t, p in zip("a𠮷b", parts)]
    assert [run.weight for run in runs] == [weights[0], weights[len(parts[0])], weights[-1]]

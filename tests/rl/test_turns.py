"""Turns as ids: what is written is read again, whatever ids there are, and transcripts against what SFT trains on.

Texts are in NFKC, as the shipped vocabulary makes them.
"""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from PIL import Image

from glmv_jax.data import conversation
from glmv_jax.data.chat import boxed
from glmv_jax.data.dialect import COMPACT, SPACED
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import SPECIALS, Tokenizer
from glmv_jax.rl.gym import Action, Observation, asked, said_by
from glmv_jax.rl.transcript import Form, Transcript, Turn
from glmv_jax.rl.turns import parse, spoken

TOKENIZER = Tokenizer()
FORM = Form(TOKENIZER, Patcher(max_patches=16))
TYPES = {
    "s": {"type": "string"}, "i": {"type": "integer"}, "n": {"type": "number"}, "b": {"type": "boolean"},
    "a": {"type": "array"}, "o": {"type": "object"}, "e": {"type": "string", "enum": ["up", "down"]},
    "m": {"type": ["integer", "string"]}, "x": {},
}  # fmt: skip
TOOLS = (
    {"type": "function", "function": {"name": "do", "parameters": {"type": "object", "properties": TYPES}}},
    {"type": "function", "function": {"name": "wait"}},
    {"type": "function", "function": {"name": "click", "parameters": {
        "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x", "y"]}}},
)  # fmt: skip
CLICK = {"name": "click", "arguments": {"x": 1, "y": 2}}


def texts(rng: np.random.Generator, spaces: bool = True) -> str:
    """Letters, signs of the dialect spelled out, JSON, Chinese, line breaks."""
    words = [
        *SPECIALS,
        "a",
        "5",
        "true",
        "null",
        '{"k": [1]}',
        "猫",
        "\n",
        "  ",
        '"',
        "\\",
        "é",
        "</",
        ">",
        "x y",
        '"q"',
    ]
    words = [word for word in words if "<|" not in word]  # answers with it come out as "< |", see `inference.text`
    text = unicodedata.normalize("NFKC", "".join(rng.choice(words, int(rng.integers(0, 6)))))
    return text if spaces else text.strip()


def value(rng: np.random.Generator, kind: str):
    return {
        "s": [texts(rng), '"q"', "5", "null"][int(rng.integers(4))],
        "i": int(rng.integers(-5, 2000)), "n": float(rng.normal()), "b": bool(rng.integers(2)),
        "a": [texts(rng), 1, None, [True]], "o": {texts(rng): texts(rng)}, "e": "down",
        "m": [7, "seven", "[1]"][int(rng.integers(3))], "x": [None, 3, {"k": "v"}][int(rng.integers(3))],
    }[kind]  # fmt: skip


def action(rng: np.random.Generator, thinking: bool) -> Action:
    calls = []
    for _ in range(int(rng.integers(0, 3))):
        keys = rng.permutation(list(TYPES))[: int(rng.integers(0, len(TYPES)))]
        do = {"name": "do", "arguments": {str(key): value(rng, key) for key in keys}}
        calls.append([do, CLICK, {"name": "wait", "arguments": {}}][int(rng.integers(3))])
    text = texts(rng, spaces=False) + (boxed(texts(rng)) if rng.random() < 0.3 else "")
    return Action(text, texts(rng, spaces=False) if thinking else "", tuple(calls))


@pytest.mark.parametrize("thinking", [False, True])
def test_what_is_spoken_is_read_again(thinking):
    rng = np.random.default_rng(thinking)
    called = 0
    for _ in range(300):
        said = action(rng, thinking)
        ids = spoken(said, TOKENIZER, thinking)
        assert ids[-1] in TOKENIZER.stops
        for drawn in (ids, ids[:-1]):
            assert parse(drawn, TOKENIZER, TOOLS, thinking) == said
        called += len(said.tool_calls)
    assert called > 100


def test_any_ids_give_an_action_and_none_calls_by_accident():
    rng = np.random.default_rng(0)
    special = list(TOKENIZER.special.values())
    calling = [TOKENIZER.special[name] for name in SPECIALS if "arg" in name or "call" in name]
    called = 0
    for n in range(3000):
        pool = [special, calling, range(TOKENIZER.vocab_size)][n % 3]
        ids = [int(i) for i in rng.choice(pool, int(rng.integers(0, 12)))]
        if n % 2:  # parts of a good turn in between
            good = spoken(Action("x", "t", (CLICK,)), TOKENIZER, True)
            cut = int(rng.integers(len(good)))
            ids = good[:cut] + ids + good[cut + int(rng.integers(0, 3)) :]
        for thinking in (False, True):
            read = parse(ids, TOKENIZER, TOOLS, thinking)
            assert not (read.malformed and read.tool_calls)
            called += len(read.tool_calls)
            if not read.malformed:  # what it is taken for is what its own words say
                assert parse(spoken(read, TOKENIZER, True), TOKENIZER, TOOLS, True).tool_calls == read.tool_calls
    assert called > 20


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode_with_specials(text, SPECIALS)


ARGUMENT = "<arg_key>{}</arg_key><arg_value>{}</arg_value>"
CALL = "<tool_call>{}</tool_call>"


@pytest.mark.parametrize("text, reason", [
    (CALL.format("jump"), "there is no tool 'jump'; there are: do, wait, click"),
    (CALL.format("click" + ARGUMENT.format("x", 1)), "click needs y"),
    (CALL.format("click" + ARGUMENT.format("z", 1)), "click has no argument 'z'; it takes: x, y"),
    (CALL.format("click" + 2 * ARGUMENT.format("x", 1)), "click has twice the argument 'x'"),
    (CALL.format("click" + ARGUMENT.format("x", "1.5")), "x of click should be of type integer, not '1.5'"),
    (CALL.format("click" + ARGUMENT.format("x", "true")), "x of click should be of type integer, not 'true'"),
    (CALL.format("click" + ARGUMENT.format("x", "one")), "x of click should be of type integer: 'one' is no JSON"),
    (CALL.format("do" + ARGUMENT.format("e", "left")), "e of do should be one of up, down, not 'left'"),
    (CALL.format("do" + ARGUMENT.format("n", "NaN")), "NaN is no number"),
    (CALL.format("do" + ARGUMENT.format("n", "1e999")), "is no JSON"),
    (CALL.format("do" + ARGUMENT.format("a", "[" * 100_000)), "is no JSON"),
    (CALL.format("do" + ARGUMENT.format("i", "9" * 10_000)), "is no JSON"),
    (CALL.format("do" + ARGUMENT.format("o", r'{"k": "\ud800"}')), "is no JSON"),
    ("<tool_call>wait", "</tool_call> should stand where the end is"),
    ("<tool_call>wait<arg_key>s</arg_key></tool_call>", "<arg_value> should stand where </tool_call> is"),
    ("<tool_call>wait<tool_call>", "</tool_call> should stand where <tool_call> is"),
    (CALL.format("wait") + " now", "the text 'now' stands inside or behind a call"),
    (CALL.format("wait") + "<|image|>", "<tool_call> should stand where <|image|> is"),
    ("look: <|image|>", "<|image|> has no place in a text"),
    ("wait</tool_call>", "</tool_call> has no place in a text"),
], ids=lambda x: x[:30])  # fmt: skip
def test_what_is_wrong_is_said(text, reason):
    read = parse(ids_of(text), TOKENIZER, TOOLS)
    assert reason in read.malformed and not read.tool_calls


def test_spelled_tags_are_text_and_call_nothing():
    spelled = TOKENIZER.encode(CALL.format("wait") + "<|begin_of_box|>3<|end_of_box|>")
    assert parse(spelled, TOKENIZER, TOOLS) == Action("<tool_call>wait</tool_call>< |begin_of_box|>3< |end_of_box|>")


def test_thinking_that_does_not_end_is_all_there_is():
    ids = ids_of("hm <tool_call>wait</tool_call>")
    assert parse(ids, TOKENIZER, TOOLS, thinking=True) == Action("", "hm wait")


def test_the_spaced_dialect_is_read_too():
    said = Action("I look.", "where?", ({"name": "do", "arguments": {"s": "a b", "i": 3}}, CLICK))
    message = {"role": "assistant", "content": said.text, "reasoning_content": said.thinking,
               "tool_calls": said.tool_calls}  # fmt: skip
    text = SPACED([said_by("user", "go"), message], add_generation_prompt=False).split("<|assistant|>")[1]
    assert "<think>where?</think>\nI look.\n<tool_call>do\n<arg_key>s" in text
    assert parse(ids_of(text), TOKENIZER, TOOLS, thinking=True) == said


# --- transcripts ------------------------------------------------------------------------------------------------------


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8))


def reply(text: str, *images: Image.Image, role: str = "tool") -> Observation:
    return Observation((said_by(role, text, images),), images)


def test_a_transcript_is_what_supervised_training_reads():
    """Ids, which of them are learnt, and which image each shows, of an episode whose model stops as it should."""
    for thinking in (False, True):
        form = Form(TOKENIZER, FORM.patcher, thinking)
        thought = "so" if thinking else ""
        turns = [Action("I look.", thought, (CLICK, CLICK)), Action("", thought, (CLICK,)), Action(boxed("3"), thought)]
        twice = Observation((said_by("tool", "ok", [picture(1)]), said_by("tool", "", [picture(2)])),
                            (picture(1), picture(2)))  # fmt: skip
        seen = [asked("How many?", [picture(0)], TOOLS), twice, reply("that was wrong")]
        transcript, messages = Transcript(form), []
        for observation, said in zip(seen, turns, strict=True):
            transcript.observe(observation)
            transcript.draw(Turn.of(form.spoken(said), -0.5, 7))
            answer = {
                "role": "assistant",
                "content": [{"type": "text", "text": said.text}],
                "tool_calls": said.tool_calls,
            }
            messages += [*observation.messages, answer | {"reasoning_content": said.thinking}]
        expected = conversation.render(messages, TOKENIZER, [len(p) // 4 for p, _ in transcript.images], TOOLS, "all")
        np.testing.assert_array_equal(transcript.tokens, expected.tokens)
        np.testing.assert_array_equal(transcript.drawn, expected.loss_weight > 0)
        np.testing.assert_array_equal(transcript.image_of_token, expected.image_of_token)
        assert len(transcript.images) == 3 == len(set(transcript.hashes)) and transcript.turns == 3
        np.testing.assert_array_equal(transcript.logprobs, np.where(transcript.drawn, np.float32(-0.5), 0))
        np.testing.assert_array_equal(transcript.versions, np.where(transcript.drawn, 7, -1))


@pytest.mark.parametrize("drawn, before", [
    ("hm<|endoftext|>", "hm<|endoftext|><|observation|>"),  # it stopped with another token: both are there
    ("hm<|observation|>", "hm<|observation|>"),
    ("hm", "hm<|observation|>"),  # it was cut
])  # fmt: skip
def test_what_was_drawn_stays_whatever_it_was(drawn, before):
    transcript = Transcript(FORM)
    transcript.observe(asked("go"))
    start = len(transcript)
    transcript.draw(Turn.of(ids_of(drawn)))
    transcript.observe(reply("done"))
    text = TOKENIZER.decode(transcript.tokens, keep_special=True)
    assert text == f"[gMASK]<sop><|user|>go<|assistant|></think>{before}<tool_response>done</tool_response>" \
                   "<|assistant|></think>"  # fmt: skip
    assert transcript.drawn.tolist() == [start <= n < start + len(ids_of(drawn)) for n in range(len(transcript))]


def test_what_an_engine_puts_in_was_not_drawn():
    """As `</think>` at the end of a budget: it stands in the text, and is not learnt."""
    transcript = Transcript(Form(TOKENIZER, FORM.patcher, thinking=True))
    transcript.observe(asked("go"))
    start = len(transcript)
    ids = ids_of("hm</think>3<|endoftext|>")
    forced = np.array(ids) == TOKENIZER.special["</think>"]
    transcript.draw(Turn.of(ids, -2.0, np.where(forced, -1, 4)))
    assert transcript.tokens[start:].tolist() == ids
    np.testing.assert_array_equal(transcript.drawn[start:], ~forced)
    np.testing.assert_array_equal(transcript.logprobs[start:], np.where(forced, 0, np.float32(-2)))
    np.testing.assert_array_equal(transcript.versions[start:], np.where(forced, -1, 4))
    assert transcript.form.parse(ids) == Action("3", "hm")


def test_what_nobody_answered_is_not_in_the_record():
    transcript = Transcript(FORM)
    transcript.observe(asked("go", [picture(0)]))
    transcript.draw(Turn.of(ids_of("hm<|observation|>")))
    whole = transcript.tokens.copy()
    transcript.observe(reply("see", picture(1)))
    ended = transcript.ended()
    np.testing.assert_array_equal(ended.tokens, whole)
    assert len(ended.images) == 1 and ended.hashes == transcript.hashes[:1] and len(transcript.images) == 2


def test_pictures_and_their_places_must_agree():
    for observation in (Observation((said_by("user", "go"),), (picture(0),)),
                        Observation((said_by("user", "go", [picture(0)]),))):  # fmt: skip
        with pytest.raises(ValueError, match="image parts"):
            Transcript(FORM).observe(observation)


def test_the_generation_prompt_is_the_dialects():
    opened = {
        (COMPACT, False): "<|user|>go<|assistant|></think>",
        (COMPACT, True): "<|user|>go<|assistant|><think>",
        (SPACED, False): "<|user|>\ngo/nothink<|assistant|>\n<think></think>",
        (SPACED, True): "<|user|>\ngo<|assistant|>",
    }
    for (dialect, thinking), text in opened.items():
        transcript = Transcript(Form(TOKENIZER, FORM.patcher, thinking, dialect))
        transcript.observe(asked("go"))
        assert TOKENIZER.decode(transcript.tokens, keep_special=True) == "[gMASK]<sop>" + text
        assert dialect([said_by("user", "go")], enable_thinking=thinking) == "[gMASK]<sop>" + text

"""Reading answers: whatever the ids and however they come in pieces, the same is read, and nothing is lost.

The oracle reads the whole at once: it cuts the list of ids at special tokens and decodes what lies between, with
neither the incremental decoder nor its held-back ends. Calls of right form are checked against the reader of
reinforcement learning too (`rl.turns`), which shares no code with this one.
"""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest

from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.data.tokenizer_json import JsonTokenizer
from glmv_jax.rl import turns
from glmv_jax.serving.reply import Called, Reader, Said, Thought, joined, value_of
from glmv_jax.serving.text import Decoder, Stripped, UpTo
from tests.data import json_vocabulary

TYPES = {"zoom": {"n": {"type": "integer"}, "text": {"type": "string"}, "any": {}}, "stop": {}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
         for name, properties in TYPES.items()]  # fmt: skip


@pytest.fixture(scope="module", params=["sentencepiece", "bytes"])
def tokenizer(request, tmp_path_factory):
    if request.param == "sentencepiece":
        return Tokenizer()
    json_vocabulary.write(folder := tmp_path_factory.mktemp("bytes"))
    return JsonTokenizer(folder / "tokenizer.json")


def ids(tokenizer, written: str) -> list[int]:
    """Ids of an answer as it reads."""
    names = sorted(tokenizer.special, key=len, reverse=True)
    return [i for part in re.split("(" + "|".join(map(re.escape, names)) + ")", written)
            for i in ([tokenizer.special[part]] if part in tokenizer.special else tokenizer.encode(part))]  # fmt: skip


def read(tokenizer, pieces, **settings) -> list:
    reader = Reader(tokenizer, tokenizer.stops, **({"tools": TOOLS} | settings))
    return joined([event for piece in pieces for event in reader.feed(piece)] + reader.end())


def whole(tokenizer, answer, tools=TOOLS, thinking=False, stop=()) -> list:
    """What an answer says, read at once."""
    stops = [n for n, i in enumerate(answer) if i in tokenizer.stops]
    answer = answer[: stops[0]] if stops else answer
    names = {i: name for name, i in tokenizer.special.items()}
    runs = [(is_tag, list(run)) for is_tag, run in itertools.groupby(answer, key=names.__contains__)]
    parts = [x for tag, run in runs for x in ([names[i] for i in run] if tag else [("text", tokenizer.decode(run))])]
    events, kind, at = [], Thought if thinking else Said, 0
    segment = ""

    def end(then):
        nonlocal segment, kind
        if segment.strip():
            events.append(kind(segment.strip()))
        segment, kind = "", then

    while at < len(parts):
        part = parts[at]
        at += 1
        if isinstance(part, tuple):
            segment += part[1]
        elif part in ("<think>", "</think>"):
            then = Thought if part == "<think>" else Said
            if then is not kind:
                end(then)
        elif part == "<tool_call>" and tools:
            if kind is not Said:
                end(Said)
            upto = next((n for n in range(at, len(parts)) if parts[n] in ("<tool_call>", "</tool_call>")), len(parts))
            upto += upto < len(parts) and parts[upto] == "</tool_call>"
            inner = parts[at:upto]
            at = upto
            text = "".join(x if isinstance(x, str) else x[1] for x in inner)
            shape = "".join(x[1:-1] if isinstance(x, str) else "T" if x[1].strip() else "" for x in inner)
            if re.fullmatch(r"T(arg_keyT?/arg_keyarg_valueT?/arg_value)*/tool_call", shape):
                end(Said)
                pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", text, re.DOTALL)
                name = text[: text.index("<")].strip()
                types = TYPES.get(name, {})
                events.append(Called(name, {k: value_of(v, types.get(k, {})) for k, v in pairs}))
            else:
                segment += "<tool_call>" + text
        else:
            segment += part
    end(Said)
    return joined(events)


ANSWERS = [
    "a red heart",
    "",
    " \n",
    "  Two cats.  <|user|>not said",
    "hm</think>so<think>hm</think> yes",
    "think first <think>no</think>\n\nyes",
    "an <|begin_of_box|>[[1, 2, 3, 4]]<|end_of_box|> here",
    "<tool_call>stop</tool_call>",
    "hm<tool_call>stop</tool_call>",
    "no<tool_call>stop",
    "<tool_call>zoom\n<arg_key>n</arg_key>\n<arg_value>3</arg_value>\n<arg_key>text</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>",
    "数<tool_call>zoom<arg_key>text</arg_key><arg_value>有几个爱心？🦒</arg_value></tool_call>"
    "<tool_call>other<arg_key>x</arg_key><arg_value>[1, {}]</arg_value></tool_call>ok<|observation|>",
    "<tool_call>zoom<arg_key>text</arg_key></tool_call> but",
    "<tool_call>zoom<tool_call>stop</tool_call>",
    "<tool_call><arg_key>n</arg_key><arg_value>3</arg_value></tool_call>",
    "</tool_call>x<arg_value> y </think>",
    "<tool_call>zoom<arg_key>n</arg_key><arg_value>3</arg_value><|observation|>",
    "爱心🦒 and 猫",
    "<|image|>a < b <| c",
    "<|image|>a < b <| c",
    "spelt <tool_ call> and < think>",
    "<tool_call>zoom<think><arg_key></tool_call>",
    "<tool_call>zoom<arg_key>text</arg_key><arg_value></arg_value></tool_call>",
]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("answer", ANSWERS)
def test_every_cut_reads_as_the_whole(tokenizer, answer, thinking):
    """All cuts of short answers; of longer ones each place alone, all places, and 150 sets of them."""
    known = ids(tokenizer, answer)
    wanted = whole(tokenizer, known, thinking=thinking)
    places = range(1, len(known))
    if len(known) <= 10:
        cuts = itertools.chain.from_iterable(itertools.combinations(places, n) for n in range(len(known)))
    else:
        rng = np.random.default_rng(0)
        cuts = [(), tuple(places), *((n,) for n in places)]
        cuts += [tuple(np.flatnonzero(rng.random(len(known) - 1) < p) + 1) for p in (0.1, 0.3, 0.5) for _ in range(50)]
    for cut in cuts:
        edges = [0, *cut, len(known)]
        assert read(tokenizer, [known[a:b] for a, b in zip(edges, edges[1:])], thinking=thinking) == wanted


def test_any_ids_at_all_read_as_the_whole(tokenizer):
    """Random ids, half of them special: most are no answer, and none is lost."""
    rng = np.random.default_rng(1)
    tags = [i for name, i in tokenizer.special.items() if name not in ("<pad>",)]
    size = getattr(tokenizer, "vocab_size", 512)
    for _ in range(400):
        draw = lambda: int(rng.choice(tags) if rng.random() < 0.5 else rng.integers(30, size))  # noqa: E731
        known = [draw() for _ in range(rng.integers(1, 30))]
        thinking = bool(rng.integers(2))
        wanted = whole(tokenizer, known, thinking=thinking)
        cut = sorted(rng.choice(len(known), rng.integers(1, len(known) + 1), replace=False).tolist())
        pieces = [known[a:b] for a, b in zip([0, *cut], [*cut, len(known)])]
        assert read(tokenizer, pieces, thinking=thinking) == wanted


def test_what_training_writes_is_read_as_training_reads_it(tokenizer):
    calls = {"name": "zoom", "arguments": {"n": 3, "text": "4", "any": [1]}}, {"name": "stop", "arguments": {}}
    action = turns.Action("hearts 爱心", "let me see", calls)
    for thinking in (False, True):
        known = turns.spoken(action, tokenizer, thinking)
        parsed = turns.parse(known, tokenizer, TOOLS, thinking)
        events = read(tokenizer, [[i] for i in known], thinking=thinking)
        assert [(e.name, e.arguments) for e in events if isinstance(e, Called)] == [
            (c["name"], c["arguments"]) for c in parsed.tool_calls
        ]
        assert [e.text for e in events if isinstance(e, Said)] == [parsed.text]
        assert [e.text for e in events if isinstance(e, Thought)] == [parsed.thinking] * thinking


def test_the_known_failures_of_other_servers():
    tokenizer = Tokenizer()
    r = lambda text, **s: read(tokenizer, [[i] for i in ids(tokenizer, text)], **s)  # noqa: E731
    # A call before the end of thinking; a call without arguments; a cut call is no call; text between calls.
    assert r("hm<tool_call>stop</tool_call>", thinking=True) == [Thought("hm"), Called("stop", {})]
    assert r("<tool_call>stop</tool_call>") == [Called("stop", {})]
    cut = "<tool_call>zoom<arg_key>text</arg_key><arg_value>rm -rf /"
    assert r(cut) == [Said(cut)]
    assert r("<tool_call>stop</tool_call>\nthen\n<tool_call>stop</tool_call>") == [
        Called("stop", {}), Said("then"), Called("stop", {})
    ]  # fmt: skip
    # A server without tools was given none to call.
    assert r("<tool_call>stop</tool_call>", tools=[]) == [Said("<tool_call>stop</tool_call>")]


@pytest.mark.parametrize(("text", "schema", "value"), [
    ("3", {"type": "string"}, "3"), ("3", {"type": "integer"}, 3), ("3", {}, 3), ("x", {}, "x"),
    ("3", {"type": "number"}, 3),
    ("true", {"type": "integer"}, "true"), ("true", {"type": "boolean"}, True), ("3.5", {"type": "integer"}, "3.5"),
    ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None), ("7", {"type": ["string", "null"]}, "7"),
    ("NaN", {}, "NaN"), ("1e999", {}, "1e999"), ('"\\ud800"', {}, '"\\ud800"'), ("1", {"enum": ["1", "2"]}, "1"),
    ("[" * 100_000, {}, "[" * 100_000), ('{"a": 1}', {"type": "object"}, {"a": 1}), ("5", {"type": 5}, 5),
    ("5", True, 5),
])  # fmt: skip
def test_a_value_is_of_the_type_its_schema_says(text, schema, value):
    found = value_of(text, schema)
    assert found == value and type(found) is type(value)
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()


def test_a_character_comes_when_its_last_byte_does():
    text = "a爱🦒\ufffdé b"
    data = text.encode()
    decode = lambda some: bytes(some).decode(errors="replace")  # noqa: E731
    decoder = Decoder(decode)
    pieces = [decoder.push(byte) for byte in data] + [decoder.flush()]
    assert "".join(pieces) == text and pieces[:4] == ["a", "", "", "爱"]
    rng = np.random.default_rng(0)
    for _ in range(300):  # bytes that are no text
        some = rng.choice(np.frombuffer(data, np.uint8), 12).tolist()
        decoder = Decoder(decode)
        assert "".join([decoder.push(byte) for byte in some] + [decoder.flush()]) == decode(some)


def test_stop_strings_and_spaces_do_not_depend_on_the_cut():
    rng = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(rng.choice(list("ab "), 12))
        stops = ["".join(rng.choice(list("ab "), rng.integers(1, 4))) for _ in range(rng.integers(0, 3))]
        cuts = [0, *sorted(rng.choice(12, 3)), 12]
        pieces = [text[a:b] for a, b in zip(cuts, cuts[1:])]
        up_to, strip = UpTo(stops), Stripped()
        cut = "".join(map(up_to.push, pieces)) + up_to.flush()
        ends = [(text.index(s) + len(s), text.index(s), s) for s in stops if s in text]
        assert (cut, up_to.found) == ((text[: min(ends)[1]], min(ends)[2]) if ends else (text, None))
        assert "".join(map(strip.push, pieces)) == text.strip()

"""Tools, observations and thinking in the dialect, written out by hand, and what of it is learnt."""

from __future__ import annotations

import numpy as np
import pytest

from glmv_jax.data import chat, conversation
from glmv_jax.data.local.schema import parse
from glmv_jax.data.tokenizer import SPECIALS, Tokenizer
from glmv_jax.typing import UserError
from tests.data.test_chat import learnt, spelled

TOKENIZER = Tokenizer()


def render(messages: list[dict], media=(), tools=(), **options) -> chat.Rendered:
    """Messages as a file has them."""
    record = parse({"messages": messages, "tools": list(tools)}, "x", lambda name: b"pixels")
    return conversation.render(record.messages, TOKENIZER, media, record.tools, **options)


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


IMAGE = {"type": "image", "image": "a.png"}
USER = {"role": "user", "content": "go"}


def test_without_tools_and_thinking_it_is_the_chat_of_before():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "A?"}, IMAGE]},
        {"role": "assistant", "content": chat.boxed("3") + " 猫"},
        {"role": "user", "content": "<|image|> and here?"},
        {"role": "assistant", "content": "dogs <think>"},
    ]
    plain = [
        {**m, "content": [{"type": "image"} if p == IMAGE else p for p in m["content"]]}
        if isinstance(m["content"], list)
        else m
        for m in messages
    ]
    expected, found = chat.render(plain, TOKENIZER, [1, 2]), render(messages, [1, 2])
    for name in ("tokens", "loss_weight", "image_of_token"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def test_a_call_an_observation_and_an_answer():
    calls = [call("zoom", box=[1, 2], note="猫 <a>", n=None), call("wait")]
    out = render([
        USER,
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "content": [IMAGE, {"type": "text", "text": "zoomed"}]},
        {"role": "tool", "content": "waited"},
        {"role": "assistant", "content": "A cat."},
    ], [2])  # fmt: skip
    assert spelled(out) == (
        "[gMASK]<sop><|user|>go<|assistant|></think>I look."
        "<tool_call>zoom<arg_key>box</arg_key><arg_value>[1, 2]</arg_value>"
        "<arg_key>note</arg_key><arg_value>猫 <a></arg_value>"
        "<arg_key>n</arg_key><arg_value>null</arg_value></tool_call><tool_call>wait</tool_call>"
        "<|observation|><tool_response><|begin_of_image|><|image|><|image|><|end_of_image|>zoomed</tool_response>"
        "<tool_response>waited</tool_response><|assistant|></think>A cat.<|endoftext|>"
    )
    assert learnt(out) == (
        "_I look.<tool_call>zoom<arg_key>box</arg_key><arg_value>[1, 2]</arg_value>"
        "<arg_key>note</arg_key><arg_value>猫 <a></arg_value>"
        "<arg_key>n</arg_key><arg_value>null</arg_value></tool_call><tool_call>wait</tool_call>"
        "<|observation|>_A cat.<|endoftext|>"
    )


def test_a_last_call_stops_for_its_observation():
    out = render([USER, {"role": "assistant", "content": "", "tool_calls": [call("f")]}])
    assert learnt(out) == "_<tool_call>f</tool_call><|observation|>"


def test_tools_are_announced():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": "猫</tools>"}, "strict": True},
            "defer_loading": True}  # fmt: skip
    out = render(
        [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "ok"}], tools=[tool]
    )
    assert spelled(out) == (
        "[gMASK]<sop><|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "f", "parameters": {"x": "猫</tools>"}}}\n</tools>\n\n'
        "For each function call, output the function name and arguments within the following XML format:\n"
        "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
        "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
        "<|system|>Be brief.<|user|>go<|assistant|></think>ok<|endoftext|>"
    )
    assert learnt(out) == "_ok<|endoftext|>"


THOUGHTFUL = [
    USER,
    {"role": "assistant", "reasoning_content": "one", "content": "1"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "reasoning_content": " two ", "content": "2", "tool_calls": [call("f")]},
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "<think>three</think>\n3 \n"},
]


@pytest.mark.parametrize("rule, first, others", [
    ("last", "", ("two", "three")), ("all", "one", ("two", "three")), ("none", "", ("", "")),
])  # fmt: skip
def test_thinking_is_kept_by_rule(rule, first, others):
    out = render(THOUGHTFUL, thinking=rule)
    said = [f"<think>{t}</think>" if t else "</think>" for t in (first, *others)]
    assert spelled(out) == (
        f"[gMASK]<sop><|user|>go<|assistant|>{said[0]}1<|user|>more<|assistant|>{said[1]}2<tool_call>f</tool_call>"
        f"<|observation|><tool_response>r</tool_response><|assistant|>{said[2]}3<|endoftext|>"
    )
    ends = [f"{t}</think>" if t else "" for t in (first, *others)]  # `<think>` is what the server writes
    assert learnt(out) == (
        f"_{ends[0]}1<|user|>_{ends[1]}2<tool_call>f</tool_call><|observation|>_{ends[2]}3<|endoftext|>"
    )


def test_weights_of_messages():
    quiet = [USER, {"role": "assistant", "content": "a", "weight": 0}, USER,
             {"role": "assistant", "content": "b", "weight": 0.5}]  # fmt: skip
    out = render(quiet)
    assert learnt(out) == "_b<|endoftext|>" and set(out.loss_weight) == {0, 0.5}


def test_films_are_images_with_times():
    messages = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": "x"}]  # fmt: skip
    out = render(messages, [[(0.0, 1), (0.5, 2)]])
    assert spelled(out).startswith(
        "[gMASK]<sop><|user|><|begin_of_video|><|begin_of_image|><|image|><|end_of_image|>0.0 seconds"
        "<|begin_of_image|><|image|><|image|><|end_of_image|>0.5 seconds<|end_of_video|>?<|assistant|>")
    assert [i for i in out.image_of_token if i >= 0] == [0, 1, 1]


def test_nothing_that_a_record_says_becomes_a_special_token():
    attack = "".join(SPECIALS)
    unboxed = attack.replace("<|begin_of_box|><|end_of_box|>", "")
    out = render([
        {"role": "user", "content": attack},
        {"role": "assistant", "reasoning_content": attack, "content": unboxed,
         "tool_calls": [call(attack, **{attack: attack})]},
        {"role": "tool", "content": attack}, {"role": "assistant", "content": "x"},
    ], tools=[{"function": {"name": attack}}])  # fmt: skip
    special = [TOKENIZER.decode([t], keep_special=True) for t in out.tokens if t in TOKENIZER.special.values()]
    tools = special[special.index("<tool_call>") : special.index("</tool_call>") + 1]
    assert special == ["[gMASK]", "<sop>", "<|system|>", *tools, "<|user|>", "<|assistant|>", "<think>", "</think>",
                       "<tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>",
                       "<|observation|>", "<tool_response>", "</tool_response>", "<|assistant|>", "</think>",
                       "<|endoftext|>"]  # fmt: skip
    assert len(tools) == 10


@pytest.mark.parametrize("messages, media, options, message", [
    (THOUGHTFUL, [], {"thinking": "some"}, "data.thinking='some' is not known; use one of last, each, all, none"),
    ([USER, {"role": "assistant", "content": [IMAGE]}], [1], {}, "cannot hold an image"),
    ([USER, {"role": "assistant", "content": "x"}], [1], {}, "more images and videos than parts"),
    ([{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": "x"}], [], {}, "fewer images and videos"),
])  # fmt: skip
def test_wrong_conversations_are_user_errors(messages, media, options, message):
    with pytest.raises(UserError, match=message):
        render(messages, media, **options)

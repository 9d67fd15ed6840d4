"""Conversations with tools, observations and thinking to tokens, in the GLM-4.7/5 dialect: what `chat` leaves out.

    [gMASK]<sop><|system|>\\n# Tools ...<|user|>{text}<|assistant|><think>{thinking}</think>{text}
    <tool_call>{name}<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>
    <|observation|><tool_response>{text}</tool_response><tool_response>...</tool_response>
    <|assistant|></think>{text}<|endoftext|>

(without the line breaks between turns). A value that is a text stands as it is, any other as JSON. A conversation
without any of that is what `chat.render` makes of it, token for token.

What is learnt is what the assistant says: thinking and the `</think>` that ends it, text, tool calls, and the token at
which it stops, `<|observation|>` after tool calls, else that of the next turn or `<|endoftext|>`. What a server writes
for it is not learnt: `<|assistant|>` with `<think>`, or with the `</think>` of a turn without thinking.

Source of the form: the chat templates of the public GLM-4.7 and GLM-5 checkpoints; the instructions about tools are
part of the form, as a model knows them word for word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glmv_jax.data.chat import Rendered, Writer
from glmv_jax.data.tokenizer import BOX, Tokenizer
from glmv_jax.typing import UserError

THINKING = ("last", "each", "all", "none")
Film = Sequence[tuple[float, int]]  # (seconds, visual tokens) of each pair of frames

_TOOLS = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_CALLS = (
    "</tools>\n\n"
    "For each function call, output the function name and arguments within the following XML format:\n"
)
_EXAMPLE = (
    "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
    "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
)
_TOKENS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_SERVERS_OWN = ("defer_loading", "strict")  # fields of a tool that are not shown to a model


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    media: Sequence[int | Film] = (),
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: str = "last",
) -> Rendered:
    """Messages -> tokens.

    messages: as `local.schema.Record` has them. `weight` of an assistant's message is the loss weight of what it says.
    media: of each {"type": "image"} part, in reading order, its visual tokens; of each {"type": "video"} a `Film`.
    tools: JSON schemas as OpenAI's API takes them.
    thinking: which `reasoning_content` is kept: "last", of what follows the last user message, as the templates do for
        a conversation that goes on; "each": as "last" here, and `turns` makes of each user's turn a last one; "all";
        "none". What is not kept leaves a turn without thinking.
    Raises: UserError for an unknown rule, a picture in an assistant's message, and parts and media that differ in
        number.
    """
    check_rule(thinking)
    recent = thinking in ("last", "each")
    writer, waiting = Writer(tokenizer), iter(media)
    writer.special("[gMASK]", "<sop>")
    if tools:
        _write_tools(writer, tokenizer, tools)
    last_user = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
    before, stops, stop_weight = "", "<|endoftext|>", 0.0
    for n, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            if before != "tool":
                writer.special("<|observation|>", weight=stop_weight)
            writer.special("<tool_response>")
            _write_parts(writer, tokenizer, message, waiting)
            writer.special("</tool_response>")
        else:
            # The token that opens the user's turn is what ended the assistant's: it is learnt there.
            writer.special(f"<|{role}|>", weight=stop_weight if role == "user" else 0.0)
        stop_weight = 0.0
        if role == "assistant":
            stop_weight = float(message.get("weight", 1.0))
            kept = thinking == "all" or (recent and n > last_user)
            _write_assistant(writer, tokenizer, message, kept, stop_weight)
            stops = "<|observation|>" if message.get("tool_calls") else "<|endoftext|>"
        elif role != "tool":
            _write_parts(writer, tokenizer, message, waiting)
        before = role
    if before == "assistant":
        writer.special(stops, weight=stop_weight)
    if next(waiting, None) is not None:
        raise UserError("there are more images and videos than parts of the messages for them")
    return writer.done()


def check_rule(thinking: str) -> None:
    """UserError when there is no such rule for thinking."""
    if thinking not in THINKING:
        raise UserError(f"data.thinking={thinking!r} is not known; use one of {', '.join(THINKING)}")


def turns(messages: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The conversation up to the end of each user's turn, what was said before that turn without weight.

    So each answer is learnt once, after its own thinking and without that of earlier turns, as when it is given.
    Without thinking in any earlier turn that is the conversation itself.
    """
    users = [n for n, message in enumerate(messages) if message["role"] == "user"]
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if len(users) < 2 or not any(said(messages[n])[0] for n in answers if n < users[-1]):
        return [list(messages)]
    parts = []
    for start, end in zip(users, [*users[1:], len(messages)]):
        if any(start < n < end for n in answers):
            quiet = [{**m, "weight": 0.0} if m["role"] == "assistant" else m for m in messages[:start]]
            parts.append([*quiet, *messages[start:end]])
    return parts


def write_film(writer: Writer, tokenizer: Tokenizer, film: Film) -> None:
    """A film as GLM-4.6V and GLM-OCR have it: each pair of frames an image, its time in seconds after it."""
    writer.special("<|begin_of_video|>")
    for seconds, merged in film:
        writer.image(merged)
        writer.ids(tokenizer.encode(f"{seconds:.1f} seconds"))
    writer.special("<|end_of_video|>")


def said(message: Mapping[str, Any]) -> tuple[str, str]:
    """(thinking, the rest) of an assistant's message, stripped; thinking may also stand at the head of its text, before
    a `</think>`."""
    text = "".join(part["text"] for part in message["content"])
    thought = message.get("reasoning_content", "")
    if "reasoning_content" not in message and "</think>" in text:
        thought, _, text = text.partition("</think>")
        thought = thought.rpartition("<think>")[2]
    return thought.strip(), text.strip()


def _write_assistant(writer: Writer, tokenizer: Tokenizer, message: Mapping[str, Any], kept: bool, weight: float
                     ) -> None:
    if any(part["type"] != "text" for part in message["content"]):
        raise UserError("an assistant message cannot hold an image or a video; move it to a user or tool message")
    thought, text = said(message)
    if thought and kept:
        writer.special("<think>")
        writer.ids(tokenizer.encode(thought), weight)
        writer.special("</think>", weight=weight)
    else:
        writer.special("</think>")
    writer.ids(tokenizer.encode_with_specials(text, BOX), weight)
    for call in message.get("tool_calls", ()):
        writer.special("<tool_call>", weight=weight)
        writer.ids(tokenizer.encode(call["name"]), weight)
        for key, value in call["arguments"].items():
            written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, inside in (("arg_key", key), ("arg_value", written)):
                writer.special(f"<{name}>", weight=weight)
                writer.ids(tokenizer.encode(inside), weight)
                writer.special(f"</{name}>", weight=weight)
        writer.special("</tool_call>", weight=weight)


def _write_parts(writer: Writer, tokenizer: Tokenizer, message: Mapping[str, Any], waiting: Iterator[int | Film]
                 ) -> None:
    for part in message["content"]:
        if part["type"] == "text":
            writer.ids(tokenizer.encode(part["text"]))
            continue
        given = next(waiting, None)
        if given is None:
            raise UserError("there are fewer images and videos than parts of the messages for them")
        if isinstance(given, int):
            writer.image(given)
        else:
            write_film(writer, tokenizer, given)


def _write_tools(writer: Writer, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]) -> None:
    lines = (json.dumps(_shown(tool), ensure_ascii=False) + "\n" for tool in tools)
    writer.special("<|system|>")
    writer.ids(tokenizer.encode(_TOOLS + "".join(lines) + _CALLS))
    writer.ids(tokenizer.encode_with_specials(_EXAMPLE, _TOKENS))


def _shown(tool: Mapping[str, Any]) -> dict[str, Any]:
    shown = {key: value for key, value in tool.items() if key not in _SERVERS_OWN}
    if isinstance(shown.get("function"), Mapping):
        shown["function"] = {k: v for k, v in shown["function"].items() if k not in _SERVERS_OWN}
    return shown

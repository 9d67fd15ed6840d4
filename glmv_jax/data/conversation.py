"""Conversations with tools, observations and thinking to tokens: what `chat` leaves out. In the GLM-4.7/5 dialect

    [gMASK]<sop><|system|>\\n# Tools ...<|user|>{text}<|assistant|><think>{thinking}</think>{text}
    <tool_call>{name}<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>
    <|observation|><tool_response>{text}</tool_response><tool_response>...</tool_response>
    <|assistant|></think>{text}<|endoftext|>

(without the line breaks between turns), or in that of older models (`dialect`). A value that is a text stands as it is,
any other as JSON. A conversation without any of that is what `chat.render` makes of it, token for token.

What is learnt is what the assistant says: thinking and the `</think>` that ends it, text, tool calls, and the token at
which it stops, `<|observation|>` after tool calls, else that of the next turn or `<|endoftext|>`. What a server writes
for it is not learnt: `<|assistant|>` with `<think>`, or with the `</think>` of a turn without thinking.

Source of the form: the chat templates of the public GLM-4.7 and GLM-5 checkpoints; the instructions about tools are
part of the form, as a model knows them word for word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glmv_jax.data.chat import Rendered, Writer
from glmv_jax.data.dialect import COMPACT, Dialect, last_of_user, said
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.typing import UserError

THINKING = ("last", "each", "all", "none")
Film = Sequence[tuple[float, int]]  # (seconds, visual tokens) of each pair of frames


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    media: Sequence[int | Film] = (),
    tools: Sequence[Mapping[str, Any]] = (),
    thinking: str = "last",
    dialect: Dialect = COMPACT,
) -> Rendered:
    """Messages -> tokens.

    messages: as `local.schema.Record` has them. `weight` of an assistant's message is the loss weight of what it says.
    media: of each {"type": "image"} part, in reading order, its visual tokens; of each {"type": "video"} a `Film`.
    tools: JSON schemas as OpenAI's API takes them.
    thinking: which `reasoning_content` is kept: "last", of what follows the last user message, as the templates do for
        a conversation that goes on; "each": as "last" here, and `turns` makes of each user's turn a last one; "all";
        "none". What is not kept leaves a turn without thinking.
    dialect: that of the model.
    Raises: UserError for an unknown rule, a picture in an assistant's message, and parts and media that differ in
        number.
    """
    check_rule(thinking)
    if any(part["type"] != "text" for m in messages if m["role"] == "assistant" for part in m["content"]):
        raise UserError("an assistant message cannot hold an image or a video; move it to a user or tool message")
    last_user = last_of_user(messages)
    keeps = {"all": lambda n: True, "none": lambda n: False}.get(thinking, lambda n: n > last_user)
    weights = [float(message.get("weight", 1.0)) for message in messages]
    writer, waiting = Writer(tokenizer), iter(media)
    pieces = dialect.pieces(messages, tools, keeps)
    writer.pieces(pieces, weights, lambda: write_media(writer, tokenizer, waiting))
    if messages[-1]["role"] == "assistant":
        stop = "<|observation|>" if messages[-1].get("tool_calls") else "<|endoftext|>"
        writer.special(stop, weight=weights[-1])
    if next(waiting, None) is not None:
        raise UserError("there are more images and videos than parts of the messages for them")
    return writer.done()


def check_rule(thinking: str) -> None:
    """UserError when there is no such rule for thinking."""
    if thinking not in THINKING:
        raise UserError(f"data.thinking={thinking!r} is not known; use one of {', '.join(THINKING)}")


def turns(messages: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
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


def write_media(writer: Writer, tokenizer: Tokenizer, waiting: Iterator[int | Film]) -> None:
    """The next image or film, as `render` takes them. UserError when there is none."""
    given = next(waiting, None)
    if given is None:
        raise UserError("there are fewer images and videos than parts of the messages for them")
    if isinstance(given, int):
        writer.image(given)
    else:
        write_film(writer, tokenizer, given)

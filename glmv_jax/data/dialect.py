"""A conversation in the two dialects of GLM's chat, piece by piece.

    COMPACT, GLM-4.7 and GLM-5     [gMASK]<sop><|user|>{text}<|assistant|></think>{text}
    SPACED, GLM-4.5 to GLM-4.6V    [gMASK]<sop><|user|>\\n{text}<|assistant|>\\n<think></think>\\n{text}

In both an image is `<|begin_of_image|><|image|><|end_of_image|>` and a film the same with `video`, thinking stands in
`<think>...</think>` (that of earlier turns is dropped), a call is `<tool_call>{name}<arg_key>{key}</arg_key><arg_value>
{value}</arg_value></tool_call>` with a value that is text as it is and any other as JSON, and the results of one turn's
calls share an `<|observation|>`. Source of the form, and of the words about tools, which models know: the public
templates.

Joined, the pieces are the prompt of a checkpoint that brings no template of its own; `conversation` makes of them the
tokens that training reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from glmv_jax.typing import UserError

Message = Mapping[str, Any]

SHOWN = {  # a part that is no text
    "image": "<|begin_of_image|><|image|><|end_of_image|>",
    "video": "<|begin_of_video|><|video|><|end_of_video|>",
}
ROLES = ("system", "user", "assistant", "tool")
_SERVERS_OWN = ("defer_loading", "strict")  # fields of a tool that are not shown to a model
_TOOLS = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}</tools>\n\n"
    "For each function call, output the function name and arguments within the following XML format:\n"
)
_EXAMPLE = {f"{{arg-key-{n}}}": f"{{arg-value-{n}}}" for n in (1, 2)}  # arguments of the call that shows the form


class Piece(NamedTuple):
    """kind: "tag", a special token; "text", which holds none; "answer", in which box tokens count; else that of a part
    that is no text, as "image".
    by: the number of the assistant's message that says it, or -1: another role or the server writes it.
    """

    kind: str
    text: str
    by: int = -1


@dataclasses.dataclass(frozen=True)
class Dialect:
    """line: what stands behind a turn's first token, and between the tags of tools. no_thinking: tags of an answer
    without thinking. thinking: how one that is to think begins. suffix: what a user adds who wants no thinking."""

    line: str
    no_thinking: tuple[str, ...]
    thinking: str
    suffix: str = ""

    def __call__(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True, enable_thinking: bool = True,
    ) -> str:  # fmt: skip
        """The text of a conversation. Raises UserError for a role or a part that the dialect does not have."""
        last_user = last_of_user(messages)
        pieces = list(self.pieces(messages, tools, lambda n: n > last_user, "" if enable_thinking else self.suffix))
        if add_generation_prompt:
            pieces += self.opening(enable_thinking)
        return "".join(piece.text for piece in pieces)

    def opening(self, thinking: bool) -> Iterator[Piece]:
        """The generation prompt: what a server writes before a turn that is to be said, with thinking or without."""
        yield from _tags("<|assistant|>")
        if thinking:
            yield from _tags(*filter(None, [self.thinking]))
        else:
            yield from (Piece("text", self.line), *_tags(*self.no_thinking))

    def pieces(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], keeps: Callable[[int], bool],
        suffix: str = "",
    ) -> Iterator[Piece]:  # fmt: skip
        """The conversation up to the end of its last message; some pieces are empty.

        keeps: whether the thinking of message n stays. suffix: what every user's turn ends with.
        Raises UserError for a role or a part that there is not.
        """
        line = Piece("text", self.line)
        yield from _tags("[gMASK]", "<sop>")
        if tools:
            yield from _tags("<|system|>")
            yield Piece("text", _TOOLS.replace("{tools}", self._tools(tools)))
            yield from self._call("{function-name}", _EXAMPLE, f"...{self.line}")
        before = ""
        for n, message in enumerate(messages):
            role = message["role"]
            # The token that opens another's turn is the one at which the assistant stopped.
            stopped = n - 1 if before == "assistant" and role in ("user", "tool") else -1
            if role == "assistant":
                yield from _tags("<|assistant|>")
                yield from self._assistant(n, message, keeps(n))
            elif role == "tool":
                if before != "tool":
                    yield Piece("tag", "<|observation|>", stopped)
                yield from (line, *_tags("<tool_response>"), line, *_parts(message), line, *_tags("</tool_response>"))
            elif role in ROLES:
                yield from (Piece("tag", f"<|{role}|>", stopped), line, *_parts(message))
                if role == "user" and not _visible(message).endswith(suffix):
                    yield Piece("text", suffix)
            else:
                raise UserError(f"unknown role {role!r}; use {', '.join(ROLES[:-1])} or {ROLES[-1]}")
            before = role

    def _assistant(self, n: int, message: Message, keeps: bool) -> Iterator[Piece]:
        line = Piece("text", self.line)
        thought, answer = said(message)
        yield line
        if thought and keeps:
            yield from (*_tags("<think>"), Piece("text", thought, n), Piece("tag", "</think>", n))
        else:
            yield from _tags(*self.no_thinking)
        if answer:
            yield from (line, Piece("answer", answer, n))
        for call in message.get("tool_calls", ()):
            call = call.get("function", call)
            yield line
            yield from self._call(call["name"], call["arguments"], "", n)

    def _call(self, name: str, arguments: Mapping[str, Any], more: str, by: int = -1) -> Iterator[Piece]:
        """A call; more: what stands behind its arguments."""
        yield from (Piece("tag", "<tool_call>", by), Piece("text", name + self.line, by))
        for key, value in arguments.items():
            value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for tag, text in (("arg_key", key), ("arg_value", value)):
                yield from (Piece("tag", f"<{tag}>", by), Piece("text", text, by), Piece("tag", f"</{tag}>", by))
                yield Piece("text", self.line, by)
        yield from (Piece("text", more, by), Piece("tag", "</tool_call>", by))

    def _tools(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return "".join(json.dumps(self._shown(tool), ensure_ascii=False) + "\n" for tool in tools)

    def _shown(self, tool: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.line:
            return tool
        shown = {key: value for key, value in tool.items() if key not in _SERVERS_OWN}
        if isinstance(shown.get("function"), Mapping):
            shown["function"] = {k: v for k, v in shown["function"].items() if k not in _SERVERS_OWN}
        return shown


COMPACT = Dialect("", ("</think>",), "<think>")
SPACED = Dialect("\n", ("<think>", "</think>"), "", "/nothink")
# By model_type; what is not here speaks COMPACT.
OF_FAMILY = dict.fromkeys(("glm_ocr", "glm4v", "glm4v_moe", "glm46v", "glm4_moe"), SPACED)


def last_of_user(messages: Sequence[Message]) -> int:
    """The number of the last message of a user, -1 without one."""
    return max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)


def said(message: Message) -> tuple[str, str]:
    """(thinking, the rest) of an assistant's message, stripped; thinking may also stand at the head of its text, before
    a `</think>`."""
    text, thought = _visible(message), message.get("reasoning_content")
    if not isinstance(thought, str):
        head, end, tail = text.partition("</think>")
        thought, text = (head.rpartition("<think>")[2], tail) if end else ("", text)
    return thought.strip(), text.strip()


def _tags(*names: str) -> Iterator[Piece]:
    return (Piece("tag", name) for name in names)


def _parts(message: Message) -> Iterator[Piece]:
    """The content of a message, images and films as their tokens."""
    content = message.get("content", "")
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type")
        if kind != "text" and kind not in SHOWN:
            raise UserError(f"unknown part {kind!r} in a {message['role']} message; use text, image or video")
        yield Piece(kind, part["text"] if kind == "text" else SHOWN[kind])


def _visible(message: Message) -> str:
    return "".join(piece.text for piece in _parts(message))

"""A conversation as text in the two dialects of GLM's chat, for checkpoints that bring no template of their own.

    COMPACT, GLM-4.7 and GLM-5     [gMASK]<sop><|user|>{text}<|assistant|></think>{text}
    SPACED, GLM-4.5 to GLM-4.6V    [gMASK]<sop><|user|>\\n{text}<|assistant|>\\n<think></think>\\n{text}

In both an image is `<|begin_of_image|><|image|><|end_of_image|>`, thinking stands in `<think>...</think>` (that of
earlier turns is dropped), a call is `<tool_call>{name}<arg_key>{key}</arg_key><arg_value>{value}</arg_value>
</tool_call>` with a value that is text as it is and any other as JSON, and the results of one turn's calls share an
`<|observation|>`. Source of the form, and of the words about tools, which models know: the public templates.

Training renders conversations with `chat` and `conversation`, which know what is learnt; this is for prompts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from glmv_jax.typing import UserError

IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
_SERVERS_OWN = ("defer_loading", "strict")  # fields of a tool that are not shown to a model
_TOOLS = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}</tools>\n\n"
    "For each function call, output the function name and arguments within the following XML format:\n{form}"
)


@dataclasses.dataclass(frozen=True)
class Dialect:
    """line: what stands behind a turn's first token, and between the tags of tools. no_thinking: how an answer without
    thinking begins. thinking: how one that is to think begins. suffix: what a user adds who wants no thinking."""

    line: str
    no_thinking: str
    thinking: str
    suffix: str = ""

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True, enable_thinking: bool = True,
    ) -> str:  # fmt: skip
        """The text of a conversation. Raises UserError for a role or a part that the dialect does not have."""
        text = ["[gMASK]<sop>"]
        if tools:
            text.append("<|system|>" + _TOOLS.format(tools=self._tools(tools), form=self._form()))
        last_user = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
        before = None
        for n, message in enumerate(messages):
            role = message["role"]
            if role == "assistant":
                text.append(self._assistant(message, n > last_user))
            elif role == "tool":
                text.append("" if before == "tool" else "<|observation|>")
                text.append(self.line.join(["", "<tool_response>", _visible(message), "</tool_response>"]))
            elif role in ("system", "user"):
                said = _visible(message)
                quiet = role == "user" and not enable_thinking and not said.endswith(self.suffix)
                text.append(f"<|{role}|>{self.line}{said}{self.suffix if quiet else ''}")
            else:
                raise UserError(f"unknown role {role!r}; use system, user, assistant or tool")
            before = role
        if add_generation_prompt:
            text.append("<|assistant|>" + (self.thinking if enable_thinking else self.no_thinking))
        return "".join(text)

    def _assistant(self, message: Mapping[str, Any], recent: bool) -> str:
        said, thought = _visible(message), message.get("reasoning_content", "")
        if not thought and "</think>" in said:
            thought, _, said = said.partition("</think>")
            thought = thought.rpartition("<think>")[2]
        shown = f"{self.line}<think>{thought.strip()}</think>" if recent and thought.strip() else self.no_thinking
        text = ["<|assistant|>", shown, self.line + said.strip() if said.strip() else ""]
        for call in message.get("tool_calls", ()):
            call = call.get("function", call)
            text.append(f"{self.line}<tool_call>{call['name']}{self.line}")
            for key, value in call["arguments"].items():
                value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                text.append(self.line.join([f"<arg_key>{key}</arg_key>", f"<arg_value>{value}</arg_value>", ""]))
            text.append("</tool_call>")
        return "".join(text)

    def _tools(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return "".join(json.dumps(self._shown(tool), ensure_ascii=False) + "\n" for tool in tools)

    def _shown(self, tool: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.line:
            return tool
        shown = {key: value for key, value in tool.items() if key not in _SERVERS_OWN}
        if isinstance(shown.get("function"), Mapping):
            shown["function"] = {k: v for k, v in shown["function"].items() if k not in _SERVERS_OWN}
        return shown

    def _form(self) -> str:
        pairs = [f"<arg_{kind}>{{arg-{kind}-{n}}}</arg_{kind}>" for n in (1, 2) for kind in ("key", "value")]
        return self.line.join(["<tool_call>{function-name}", *pairs, "...", "</tool_call>"])


COMPACT = Dialect("", "</think>", "<think>")
SPACED = Dialect("\n", "\n<think></think>", "", "/nothink")
# By model_type; what is not here speaks COMPACT.
OF_FAMILY = dict.fromkeys(("glm_ocr", "glm4v", "glm4v_moe", "glm46v", "glm4_moe"), SPACED)


def _visible(message: Mapping[str, Any]) -> str:
    """The content of a message as text, images as their tokens."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    text = []
    for part in content:
        if part.get("type") not in ("text", "image"):
            raise UserError(f"unknown part {part.get('type')!r} in a {message['role']} message; use text or image")
        text.append(part["text"] if part["type"] == "text" else IMAGE)
    return "".join(text)

"""OpenAI's chat completions: a body to what is asked, an answer to a body or to chunks.

Beyond OpenAI's own: `reasoning_content` of assistants, both ways; images in messages of tools; films as `video_url`;
`top_k` and the like are refused where they would change the answer; `chat_template_kwargs.enable_thinking`; and, as
vLLM has it, `return_token_ids`: `prompt_token_ids` of the whole and `token_ids` of each choice.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from glmv_jax.data import chat_template
from glmv_jax.serving import fields
from glmv_jax.serving.answers import Asked, Ended, Part, Prepared, told
from glmv_jax.serving.limits import Limits, Refused
from glmv_jax.serving.media import Gallery
from glmv_jax.serving.reply import Called, Said, Thought
from glmv_jax.serving.turns import in_call_order
from glmv_jax.typing import UserError

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MOST_LIKELY = 20  # tokens beside each that is drawn, as OpenAI's API has it
UNSERVED = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},),
    "top_k": (-1, 0), "min_p": (0,), "response_format": ({"type": "text"},), "functions": ([],),
    "modalities": (["text"],), "echo": (False,), "best_of": (1,), "use_beam_search": (False,),
}  # fmt: skip


def asked(body: Mapping[str, Any], limits: Limits) -> Asked:
    """What a body asks. Raises Refused for what is wrong or not served."""
    fields.without(body, UNSERVED)
    gallery = Gallery(limits)
    messages = [_message(fields.of(dict, m, f"messages[{n}]"), f"messages[{n}]", gallery)
                for n, m in enumerate(fields.need(body, "messages", list))]  # fmt: skip
    try:
        messages = chat_template.checked(in_call_order(messages))
    except UserError as error:
        raise Refused(str(error), field="messages") from None
    tools, call = _tools(body)
    tokens = [fields.within(body, name, int, 1, 1 << 30) for name in ("max_completion_tokens", "max_tokens")]
    template = fields.get(body, "chat_template_kwargs", dict, {})
    likely = fields.within(body, "top_logprobs", int, 0, MOST_LIKELY) or 0
    if likely and not fields.get(body, "logprobs", bool, False):
        raise Refused("top_logprobs are told beside logprobs; set logprobs=true too", field="top_logprobs")
    return Asked(
        messages, gallery.decoded(), tools, call, films=gallery.films,
        one_call=not fields.get(body, "parallel_tool_calls", bool, True),
        thinking=fields.get(template, "enable_thinking", bool, where="chat_template_kwargs."),
        tokens=next((n for n in tokens if n is not None), None),
        temperature=fields.within(body, "temperature", float, 0, 100),
        top_p=fields.probability(body, "top_p"), seed=fields.get(body, "seed", int),
        stop=fields.texts(body, "stop", 16), choices=fields.within(body, "n", int, 1, limits.choices) or 1,
        likely=likely,
    )  # fmt: skip


def _message(message: Mapping[str, Any], where: str, gallery: Gallery) -> dict[str, Any]:
    role = fields.need(message, "role", str, f"{where}.")
    if role not in _ROLES:
        raise Refused(f"{where}.role={role!r:.40} is not known; use one of {', '.join(_ROLES)}", field=f"{where}.role")
    content = message.get("content")
    found: dict[str, Any] = {"role": _ROLES[role]}
    if isinstance(content, str):
        found["content"] = content
    elif content is not None:
        parts = enumerate(fields.of(list, content, f"{where}.content"))
        found["content"] = [_part(part, f"{where}.content[{n}]", role, gallery) for n, part in parts]
    elif role != "assistant":
        raise Refused(f"{where}.content is missing; give a text or a list of parts", field=f"{where}.content")
    if role == "tool":
        found["tool_call_id"] = fields.get(message, "tool_call_id", str, where=f"{where}.")
    if role == "assistant":
        for name in ("reasoning_content", "reasoning"):
            if thought := fields.get(message, name, str, where=f"{where}."):
                found["reasoning_content"] = thought
        if calls := fields.get(message, "tool_calls", list, where=f"{where}."):
            found["tool_calls"] = calls
    return found


def _part(part: Any, where: str, role: str, gallery: Gallery) -> dict[str, Any]:
    kind = fields.need(fields.of(dict, part, where), "type", str, f"{where}.")
    if kind == "text":
        return {"type": "text", "text": fields.need(part, "text", str, f"{where}.")}
    if kind == "refusal":
        return {"type": "text", "text": fields.need(part, "refusal", str, f"{where}.")}
    if kind not in ("image_url", "video_url") or role in ("assistant", "system", "developer"):
        raise Refused(f"{where} is of type {kind!r:.40}, which a {role} message cannot hold here; use text, or "
                      "image_url or video_url in a message of the user or of a tool", field=where)  # fmt: skip
    add = gallery.add_url if kind == "image_url" else gallery.add_film_url
    file = part.get(kind)
    add(file.get("url") if isinstance(file, Mapping) else file, f"{where}.{kind}")
    return {"type": kind.removesuffix("_url")}


def _tools(body: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool | str]:
    """The tools, and whether one has to be called, or which."""
    tools = fields.get(body, "tools", list, [])
    names = []
    for n, tool in enumerate(tools):
        where = f"tools[{n}]."
        function = fields.need(fields.of(dict, tool, where[:-1]), "function", dict, where)
        names.append(fields.need(function, "name", str, f"{where}function."))
        fields.get(function, "description", str, where=f"{where}function.")
        fields.get(function, "parameters", dict, where=f"{where}function.")
    choice = "auto" if body.get("tool_choice") is None else body["tool_choice"]
    if isinstance(choice, Mapping):
        function = fields.get(choice, "function", dict, choice, "tool_choice.")
        name = fields.get(function, "name", str, where="tool_choice.")
        if name not in names:
            raise Refused(f"tool_choice names {name!r:.60}, which is not among the tools", field="tool_choice")
        return tools, name
    if choice not in ("auto", "none", "required") or (choice == "required" and not tools):
        raise Refused("tool_choice has to be auto, none, required or one of the tools", field="tool_choice")
    return ([], False) if choice == "none" else (tools, choice == "required")


# --- answers ----------------------------------------------------------------------------------------------------------

_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}


class Reply:
    """Makes the bodies of one reply.

    name: of the model.   body: of the request, for what it wants to know.
    """

    def __init__(self, name: str, body: Mapping[str, Any], prepared: Prepared, tokenizer: Any) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        self._logprobs = fields.get(body, "logprobs", bool, False)
        self._ids = fields.get(body, "return_token_ids", bool, False)
        self._usage = fields.get(fields.get(body, "stream_options", dict, {}), "include_usage", bool, False)
        self._prepared, self._tokenizer = prepared, tokenizer
        self._calls = [0] * prepared.asked.choices
        self._tokens = 0

    def whole(self, choices: list[list[Part | Ended]]) -> dict[str, Any]:
        """The body of an answer that is whole."""
        found = [self._choice(n, parts) for n, parts in enumerate(choices)]
        for parts in choices:
            self._tokens += told(parts)[1].tokens
        head = self._head | {"object": "chat.completion", "choices": found, "usage": self._used()}
        return head | ({"prompt_token_ids": self._prepared.prompt.tokens.tolist()} if self._ids else {})

    def _choice(self, n: int, answer: list[Part | Ended]) -> dict[str, Any]:
        parts, ended = told(answer)
        events = [event for part in parts for event in part.events]
        text = "".join(event.text for event in events if isinstance(event, Said))
        thought = "".join(event.text for event in events if isinstance(event, Thought))
        message: dict[str, Any] = {"role": "assistant", "content": text or None, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls := [self._call(event) for event in events if isinstance(event, Called)]:
            message["tool_calls"] = calls
        elif not text:
            message["content"] = ""
        found = {"index": n, "message": message, "finish_reason": _REASONS[ended.reason], "logprobs": None}
        if self._logprobs:
            found["logprobs"] = {"content": [x for part in parts for x in self._likely(part)], "refusal": None}
        if self._ids:
            found["token_ids"] = self._prepared.opened + [i for part in parts for i in part.tokens.tolist()]
        return found

    def first(self) -> list[dict[str, Any]]:
        """Chunks with which a stream begins."""
        chunks = [self._chunk(n, {"role": "assistant", "content": ""}) for n in range(self._prepared.asked.choices)]
        if self._ids:
            chunks[0]["prompt_token_ids"] = self._prepared.prompt.tokens.tolist()
            for chunk in chunks:
                chunk["choices"][0]["token_ids"] = list(self._prepared.opened)
        return chunks

    def part(self, n: int, part: Part | Ended) -> list[dict[str, Any]]:
        """Chunks of some more of choice n."""
        if isinstance(part, Ended):
            self._tokens += part.tokens
            return [self._chunk(n, {}, _REASONS[part.reason])]
        chunks = [self._chunk(n, self._delta(n, event)) for event in part.events]
        if not chunks and len(part.tokens) and (self._logprobs or self._ids):
            chunks = [self._chunk(n, {})]
        if chunks and self._logprobs:
            chunks[0]["choices"][0]["logprobs"] = {"content": self._likely(part), "refusal": None}
        if chunks and self._ids:
            chunks[0]["choices"][0]["token_ids"] = part.tokens.tolist()
        return chunks

    def last(self) -> list[dict[str, Any]]:
        """Chunks with which a stream ends."""
        if not self._usage:
            return []
        return [self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._used()}]

    def _chunk(self, n: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": n, "delta": delta, "finish_reason": reason, "logprobs": None}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}

    def _delta(self, n: int, event: Thought | Said | Called) -> dict[str, Any]:
        if isinstance(event, Thought):
            return {"reasoning_content": event.text}
        if isinstance(event, Said):
            return {"content": event.text}
        self._calls[n] += 1
        return {"tool_calls": [{"index": self._calls[n] - 1} | self._call(event)]}

    def _call(self, event: Called) -> dict[str, Any]:
        arguments = json.dumps(event.arguments, ensure_ascii=False)
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function",
                "function": {"name": event.name, "arguments": arguments}}  # fmt: skip

    def _likely(self, part: Part) -> list[dict[str, Any]]:
        """Log-probabilities of the tokens that were drawn, and of the likeliest beside them."""
        pairs = zip(part.tokens.tolist(), part.logprobs.tolist())
        found = [self._token(*pair) | {"top_logprobs": []} for pair in pairs]
        if part.likely is not None:
            for token, *pairs in zip(found, part.likely.tokens.tolist(), part.likely.logprobs.tolist()):
                token["top_logprobs"] = [self._token(*pair) for pair in zip(*pairs)][: self._prepared.asked.likely]
        return found

    def _token(self, i: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([i], keep_special=True)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _used(self) -> dict[str, int]:
        prompt = len(self._prepared.prompt.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": self._tokens, "total_tokens": prompt + self._tokens}


def error(refused: Exception, status: int) -> dict[str, Any]:
    """The body of an error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    field, code = getattr(refused, "field", None), getattr(refused, "code", None)
    return {"error": {"message": str(refused), "type": kind, "param": field, "code": code}}

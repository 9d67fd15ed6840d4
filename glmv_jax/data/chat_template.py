"""A conversation to token ids as a public checkpoint wants it: by its own chat template (jinja), or by our dialects.

A template comes from a checkpoint, so it runs in jinja's sandbox, with what transformers gives it (trim_blocks,
lstrip_blocks, loop controls, `tojson` without escapes, `raise_exception`, `strftime_now`, `generation` blocks). Special
tokens that a message spells are marked before it is rendered, so that what the template writes counts and what a person
writes does not.
"""

from __future__ import annotations

import base64
import datetime
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from glmv_jax.data import dialect
from glmv_jax.data.tokenizer import BOX
from glmv_jax.typing import UserError

Render = Callable[..., str]
KINDS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}  # of parts
_TRUSTED = (*BOX, "<think>", "</think>")  # in what an assistant said


def of_checkpoint(folder: pathlib.Path, model_type: str) -> Render:
    """How a checkpoint renders conversations: chat_template.jinja, else what older folders have in JSON, else our own.

    Returns a function (messages, tools, add_generation_prompt, **settings) -> text. UserError for a broken template.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return jinja(path.read_text(encoding="utf-8"), path)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error}); download it again") from None
        if isinstance(found, list):  # several by name
            found = next((one["template"] for one in found if one["name"] == "default"), None)
        if found:
            return jinja(found, path)
    return dialect.OF_FAMILY.get(model_type, dialect.COMPACT)


def jinja(source: str, name: str | pathlib.Path = "the chat template") -> Render:
    """A template as a function. UserError when jinja2 is not installed, or the template is broken or complains."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError('rendering a chat template takes jinja2; pip install "glmv_jax[hf]"') from None

    class Generation(Extension):
        """`{% generation %}` marks what is learnt; a prompt has no use for it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def complain(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **settings)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = complain
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

    def told(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (jinja2.exceptions.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"{name}: {reason}; change the messages, or the template") from None

    template = told(lambda: environment.from_string(source))

    def render(
        messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True, **settings: Any,
    ) -> str:  # fmt: skip
        given = dict(messages=messages, tools=list(tools) or None, add_generation_prompt=add_generation_prompt)
        return told(lambda: template.render(**given, documents=None, **settings))

    return render


def prompt_ids(
    render: Render, tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (),
    **settings: Any,
) -> list[int]:  # fmt: skip
    """Ids of a conversation that an assistant is to go on with; an image is one `<|image|>`, a film one `<|video|>`.

    tokenizer: a `JsonTokenizer`. settings: for the template, as `enable_thinking`.
    """
    written = json.dumps([messages, tools], ensure_ascii=False)
    mark = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in written)  # of those that mean nothing
    names = sorted(tokenizer.special, key=len, reverse=True)
    spelt = re.compile("|".join(map(re.escape, names)))
    marked = lambda text: spelt.sub(lambda m: m[0][0] + mark + m[0][1:], text)  # noqa: E731
    trusting = lambda text: spelt.sub(  # noqa: E731
        lambda m: m[0] if m[0] in _TRUSTED else m[0][0] + mark + m[0][1:], text
    )
    safe = [_each_text(m, trusting if m["role"] == "assistant" else marked) for m in messages]
    text = render(safe, tools=_each_text(list(tools), marked), add_generation_prompt=True, **settings)
    return [i for piece in text.split(mark) for i in tokenizer.encode_with_specials(piece, names)]


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _each_text(inner, change) for key, inner in value.items()}
    return [_each_text(inner, change) for inner in value] if isinstance(value, (list, tuple)) else value


def checked(messages: Any) -> list[dict[str, Any]]:
    """Messages as templates expect them, from what the OpenAI API takes: no empty fields, arguments as objects,
    pictures as {"type": "image"}, films as {"type": "video"} (see `media`). Raises UserError for what is none, naming
    the message."""
    if not isinstance(messages, list) or not messages:
        raise UserError("the messages are no list of messages; write [{\"role\": \"user\", \"content\": ...}]")
    found = []
    for n, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"message {n} has no role; write {{\"role\": \"user\", \"content\": ...}}")
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content", "")
        if isinstance(content, list):
            message["content"] = [_part(part, n) for part in content]
        elif not isinstance(content, str):
            raise UserError(f"the content of message {n} is no text and no list of parts; give one of them")
        if "tool_calls" in message:
            message["tool_calls"] = [_call(call, n) for call in message["tool_calls"]]
        found.append(message)
    return found


class Media(NamedTuple):
    """What the placeholders of a conversation show, of each kind in reading order: files, or their bytes."""

    images: list[Any]
    films: list[Any]


def media(messages: Sequence[Mapping[str, Any]], images: Sequence[Any], films: Sequence[Any] = ()) -> Media:
    """The file or bytes that each image or video part names; one that names none takes the next of `images`, `films`.

    A part names one as {"type": "image", "image": FILE} or {"type": "image_url", "image_url": {"url": FILE}}, a film as
    {"type": "video", "video": FILE} or "video_url"; a data: URL holds the bytes. Raises UserError for other addresses,
    a film that there is not, and when image placeholders and images differ in number.
    """
    found, waiting, films = Media([], []), list(images), list(films)
    parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
    for part, kind in ((p, KINDS[p["type"]]) for p in parts if p.get("type") in KINDS):
        named = part.get(f"{kind}_url", part.get(kind, part.get("path", part.get("url"))))
        named = named.get("url") if isinstance(named, Mapping) else named
        if kind == "video":
            if named is None and not films:
                raise UserError('a video part of the messages names no file; write {"type": "video", "video": FILE}')
            found.films.append(films.pop(0) if named is None else _source(kind, named))
            continue
        if named is None and not waiting:
            raise UserError(f"the messages have more image placeholders than the {len(images)} images that were given; "
                            "give one --image for each")
        found.images.append(waiting.pop(0) if named is None else _source(kind, named))
    if waiting:
        raise UserError(f"the messages have {len(found.images)} image placeholders and {len(waiting)} images too many "
                        'were given; write one {"type": "image"} part for each image')
    return found


def _source(kind: str, named: Any) -> str | bytes:
    if not isinstance(named, str):
        raise UserError(f"the messages name no file for a part of type {kind!r}, but {named!r:.40}; give its path")
    if named.startswith("data:"):
        try:
            return base64.b64decode(named.partition(",")[2], validate=True)
        except ValueError:
            raise UserError(f"a data: URL in the messages is no base64; encode the {kind} again") from None
    if re.match(r"https?://", named):
        raise UserError(f"{named[:80]} in the messages is on the network; download the {kind} and give its path")
    return named.removeprefix("file://")


def _part(part: Any, n: int) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part
    if isinstance(kind, str) and kind in KINDS:
        return {"type": KINDS[kind]}
    raise UserError(f"message {n} has a part of type {kind!r}; use text, image or video")


def _call(call: Any, n: int) -> dict[str, Any]:
    """A tool call with its arguments as an object, under "function" as OpenAI has it."""
    inner = call.get("function", call) if isinstance(call, dict) else {}
    inner = inner if isinstance(inner, dict) else {}
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
            json.dumps(arguments, ensure_ascii=False).encode()  # halves of characters
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(inner.get("name"), str) or not isinstance(arguments, dict):
        raise UserError(f"a tool call of message {n} has no name, or arguments that are no JSON object; write both")
    changed = {**inner, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed

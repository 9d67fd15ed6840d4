"""What the routes take and give, as OpenAPI 3.2, at /openapi.json: for people, for generators, and for tests, which
send what it allows and what it forbids and hold every reply against it.

Kept by hand beside the parsers (`openai`, `anthropic`, `completions`), whose tables it reads where they have some.
Objects may hold more than they say here, as the parsers leave alone what they do not know. null is as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glmv_jax.serving import anthropic, completions, openai
from glmv_jax.serving.limits import Limits

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NULL: Schema = {"type": "null"}
# Of one pixel, so that what is made from this description shows pictures too.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


def obj(required: str = "", /, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties} | ({"required": required.split()} if required else {})


def array(items: Schema, **more: int) -> Schema:
    return {"type": "array", "items": items} | more


def integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def one_of(values: Iterable[Any]) -> Schema:
    return {"enum": list(values)}


def either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def maybe(schema: Schema) -> Schema:
    return either(schema, NULL)


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def optional(properties: Mapping[str, Schema]) -> dict[str, Schema]:
    """The same, or null."""
    return {name: maybe(schema) for name, schema in properties.items()}


def unserved(table: Mapping[str, Sequence[Any]]) -> dict[str, Schema]:
    """Fields that are served at these values alone."""
    return {name: one_of([*harmless, None]) for name, harmless in table.items()}


# --- what is taken ----------------------------------------------------------------------------------------------------

DRAWN = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 100},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
}
LENGTH = integer(1, 1 << 30)
DATA_URL: Schema = {"type": "string", "examples": [f"data:image/png;base64,{PIXEL}"]}


def texts(most: int) -> Schema:
    one = {"type": "string", "minLength": 1}
    return either(one, array(one, maxItems=most))


def _said(role: str | Sequence[str], content: Schema, required: str = "role content", **more: Schema) -> Schema:
    roles = one_of([role] if isinstance(role, str) else role)
    return obj(required, role=roles, content=content, **more)


def _chat(limits: Limits) -> Schema:
    text = obj("type text", type=one_of(["text"]), text=TEXT)
    url = either(DATA_URL, obj("url", url=DATA_URL))
    image = obj("type image_url", type=one_of(["image_url"]), image_url=url)
    shown = [image, obj("type video_url", type=one_of(["video_url"]), video_url=url)] if limits.films else [image]
    refusal = obj("type refusal", type=one_of(["refusal"]), refusal=TEXT)
    said = lambda *parts: either(TEXT, array(either(*parts)))  # noqa: E731
    call = obj("function", id=maybe(TEXT), function=obj("name", name=TEXT, arguments=either(TEXT, obj())))
    messages = either(
        _said(["system", "developer"], said(text, refusal)),
        _said(["user", "tool"], said(text, refusal, *shown), tool_call_id=maybe(TEXT)),
        _said("assistant", maybe(said(text, refusal)), "role", **optional({
            "reasoning_content": TEXT, "reasoning": TEXT, "tool_calls": array(call)})),
    )  # fmt: skip
    tool = obj("function", function=obj("name", name=TEXT, **optional({"parameters": obj(), "description": TEXT})))
    named = obj("function", function=obj("name", name=TEXT))
    return obj(
        "model messages", model=ref("Name"), messages=array(messages, minItems=1), **optional({
            "stream": FLAG, "stream_options": obj(include_usage=maybe(FLAG)), "n": integer(1, limits.choices),
            "max_tokens": LENGTH, "max_completion_tokens": LENGTH, "seed": {"type": "integer"}, **DRAWN,
            "stop": texts(16), "tools": array(tool), "tool_choice": either(one_of(["auto", "none", "required"]), named),
            "parallel_tool_calls": FLAG, "logprobs": FLAG, "return_token_ids": FLAG,
            "top_logprobs": integer(0, openai.MOST_LIKELY),
            "chat_template_kwargs": obj(enable_thinking=maybe(FLAG)),
        }), **unserved(openai.UNSERVED),
    )  # fmt: skip


def _completions() -> Schema:
    return obj(
        "model prompt", model=ref("Name"), prompt=array(COUNT, minItems=1), **optional({
            "stream": FLAG, "stream_options": obj(include_usage=maybe(FLAG)), "max_tokens": LENGTH,
            "seed": {"type": "integer"}, **DRAWN, "stop_token_ids": array({"type": "integer"}),
            "logit_bias": {"type": "object", "additionalProperties": one_of([completions.BANNED])},
            "return_token_ids": FLAG, "images": array(DATA_URL), "begun": COUNT, "draw": integer(0, 1 << 30),
        }), **unserved(completions.UNSERVED),
    )  # fmt: skip


def _messages(limits: Limits, *, counted: bool = False) -> Schema:
    text = obj("type text", type=one_of(["text"]), text=TEXT)
    base64 = obj("type data", type=one_of(["base64"]), data={"type": "string", "examples": [PIXEL]})
    source = either(base64, obj("type url", type=one_of(["url"]), url=DATA_URL))
    image = obj("type source", type=one_of(["image"]), source=source)
    plain = obj("type data", type=one_of(["text"]), data=TEXT)
    document = obj("type source", type=one_of(["document"]), source=plain)
    film = obj("type source", type=one_of(["video"]), source=source)
    parts = (text, image, document, *[film] * (limits.films > 0))
    result = obj("type", type=one_of(["tool_result"]), tool_use_id=maybe(TEXT),
                 content=maybe(either(TEXT, array(either(*parts)))))  # fmt: skip
    spoken = (
        text, obj("type thinking", type=one_of(["thinking"]), thinking=TEXT),
        obj("type", type=one_of(["redacted_thinking"])),
        obj("type name", type=one_of(["tool_use"]), id=maybe(TEXT), name=TEXT, input=maybe(obj())),
    )  # fmt: skip
    said = lambda *blocks: either(TEXT, array(either(*blocks)))  # noqa: E731
    turns = either(_said("user", said(*parts, result)), _said("assistant", said(*spoken)), _said("system", said(text)))
    tool = obj("name", name=TEXT, **optional({"type": one_of(["custom"]), "description": TEXT, "input_schema": obj()}))
    one_call = optional({"disable_parallel_tool_use": FLAG})
    choice = either(obj(type=maybe(one_of(["auto", "any", "none"])), **one_call),
                    obj("type name", type=one_of(["tool"]), name=TEXT, **one_call))  # fmt: skip
    thinking = obj(type=maybe(one_of(["enabled", "adaptive", "disabled"])))
    return obj(
        "model messages" if counted else "model messages max_tokens", model=ref("Name"),
        messages=array(turns, minItems=1), max_tokens=maybe(LENGTH) if counted else LENGTH, **optional({
            "system": said(text), "tools": array(tool), "tool_choice": choice, "thinking": thinking,
            "stop_sequences": texts(16), "stream": FLAG, "output_config": obj(format=NULL), **DRAWN,
        }), **unserved(anthropic.UNSERVED),
    )  # fmt: skip


# --- what is given ----------------------------------------------------------------------------------------------------

USED = obj("prompt_tokens completion_tokens total_tokens", prompt_tokens=COUNT, completion_tokens=COUNT,
           total_tokens=COUNT)  # fmt: skip
IDS = array(COUNT)


def _given() -> dict[str, Schema]:
    """Bodies of replies, by name."""
    likely = obj("token logprob", token=TEXT, logprob={"type": "number", "maximum": 0}, bytes=maybe(IDS))
    token = likely | {"required": ["token", "logprob", "top_logprobs"]}
    token["properties"] = token["properties"] | {"top_logprobs": array(likely)}
    called = obj("name arguments", name=TEXT, arguments=TEXT)
    call = obj("id type function", id=TEXT, type=one_of(["function"]), function=called)
    message = obj("role content", role=one_of(["assistant"]), content=maybe(TEXT), reasoning_content=TEXT,
                  tool_calls=array(call, minItems=1))  # fmt: skip
    reason = one_of(["stop", "length", "tool_calls"])
    choice = obj("index message finish_reason logprobs", index=COUNT, message=message, finish_reason=reason,
                 logprobs=maybe(obj("content", content=array(token))), token_ids=IDS)  # fmt: skip
    head = dict(id=TEXT, created=COUNT, model=ref("Name"))
    written = obj("index text finish_reason logprobs", index=COUNT, text=TEXT, finish_reason=one_of(["stop", "length"]),
                  logprobs=maybe(obj("tokens token_logprobs")), token_ids=IDS, versions=IDS, prompt_token_ids=IDS,
                  image_hashes=array(TEXT))  # fmt: skip
    block = either(obj("type text", type=one_of(["text"]), text=TEXT),
                   obj("type thinking signature", type=one_of(["thinking"]), thinking=TEXT, signature=TEXT),
                   obj("type id name input", type=one_of(["tool_use"]), id=TEXT, name=TEXT, input=obj()))  # fmt: skip
    used = obj("input_tokens output_tokens", input_tokens=COUNT, output_tokens=COUNT)
    delta = obj(
        role=one_of(["assistant"]),
        content=TEXT,
        reasoning_content=TEXT,
        tool_calls=array(
            call | {"required": ["index", *call["required"]], "properties": call["properties"] | {"index": COUNT}}
        ),
    )
    changed = obj("index delta finish_reason logprobs", **choice["properties"] | {
        "delta": delta, "finish_reason": maybe(reason)})  # fmt: skip
    more = written["properties"] | {"finish_reason": maybe(written["properties"]["finish_reason"])}
    about = obj("id object created owned_by max_model_len input_modalities", id=ref("Name"), object=one_of(["model"]),
                created=COUNT, owned_by=TEXT, max_model_len=COUNT,
                input_modalities=array(one_of(["text", "image", "video"]), minItems=1))  # fmt: skip
    wrong = obj("message type", message=TEXT, type=TEXT)
    return {
        "Completion": obj("id object created model choices usage", **head, object=one_of(["chat.completion"]),
                          choices=array(choice, minItems=1), usage=USED, prompt_token_ids=IDS),
        "TextCompletion": obj("id object created model choices usage", **head, object=one_of(["text_completion"]),
                              choices=array(written, minItems=1, maxItems=1), usage=USED),
        "Chunk": obj("id object created model choices", **head, object=one_of(["chat.completion.chunk"]),
                     choices=array(changed), usage=USED, prompt_token_ids=IDS),
        "TextChunk": obj("id object created model choices", **head, object=one_of(["text_completion"]),
                         choices=array(written | {"properties": more}), usage=USED),
        "Event": either(
            obj("type message", type=one_of(["message_start"]), message=obj("id type role model content usage")),
            obj("type index content_block", type=one_of(["content_block_start"]), index=COUNT, content_block=block),
            obj("type index delta", type=one_of(["content_block_delta"]), index=COUNT, delta=obj(
                "type", type=one_of(["text_delta", "thinking_delta", "input_json_delta"]))),
            obj("type index", type=one_of(["content_block_stop"]), index=COUNT),
            obj("type delta usage", type=one_of(["message_delta"]), delta=obj("stop_reason stop_sequence"),
                usage=obj("output_tokens", output_tokens=COUNT)),
            obj("type", type=one_of(["message_stop", "ping"])),
        ),
        "Message": obj("id type role model content stop_reason stop_sequence usage", id=TEXT, type=one_of(["message"]),
                       role=one_of(["assistant"]), model=ref("Name"), content=array(block), usage=used,
                       stop_reason=one_of(["end_turn", "max_tokens", "stop_sequence", "tool_use"]),
                       stop_sequence=maybe(TEXT)),
        "Counted": obj("input_tokens", input_tokens=COUNT),
        "Model": about, "Models": obj("object data", object=one_of(["list"]), data=array(ref("Model"), minItems=1)),
        "Taken": obj("version", version=COUNT),
        "Health": obj("status", status=one_of(["ok", "ending"])),
        "Error": obj("error", error=obj("message type param code", message=TEXT, type=TEXT, param=maybe(TEXT),
                                        code=maybe(one_of(["context_length_exceeded"])))),
        "AnthropicError": obj("type error", type=one_of(["error"]), error=wrong),
    }  # fmt: skip


# --- all together -----------------------------------------------------------------------------------------------------

RETRY = {"Retry-After": {"required": True, "schema": integer(1, 60)}}
STATUSES = {
    400: "what is wrong, and which field", 401: "no API key, or another", 403: "not taken by this server",
    404: "there is no such model", 408: "the body came too slowly", 413: "too large",
    429: "too many answers are running", 503: "the server is ending",
}  # fmt: skip


def _reply(about: str, schema: Schema = TEXT, kind: str = "application/json") -> Schema:
    return {"description": about, "content": {kind: {"schema": schema}}}


def _operation(
    id_: str, about: str, gives: str, taken: Schema | None = None, refuses: Sequence[int] = (), error: str = "Error",
    stream: str = "",
) -> Schema:  # fmt: skip
    """An operation of JSON. refuses: statuses; stream: of an event of its stream, which may also be an error."""
    answer = _reply("the answer", ref(gives))
    if stream:
        data = {"type": "string", "contentMediaType": "application/json",
                "contentSchema": either(ref(stream), ref(error))}  # fmt: skip
        item = obj("data", data=either({"const": "[DONE]"}, data)) if error == "Error" else obj("event data", data=data)
        answer["content"]["text/event-stream"] = {"itemSchema": item}
    refusals = {str(n): _reply(STATUSES[n], ref(error)) | ({"headers": RETRY} if n in (429, 503) else {})
                for n in (*refuses, 401)}  # fmt: skip
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": taken}}}} if taken else {}
    return {"operationId": id_, "summary": about, **body, "responses": {"200": answer} | refusals}


def description(names: Sequence[str], limits: Limits, *, key: bool) -> dict[str, Any]:
    """The document. names: of the model.   key: whether one is asked for."""
    asks = (400, 404, 408, 413, 429, 503)
    paths = {
        "/v1/chat/completions": {"post": _operation(
            "chat", "OpenAI's chat completions", "Completion", _chat(limits), asks, stream="Chunk")},
        "/v1/completions": {"post": _operation(
            "complete", "A prompt of token ids", "TextCompletion", _completions(), asks, stream="TextChunk")},
        "/v1/messages": {"post": _operation(
            "message", "Anthropic's messages", "Message", _messages(limits), asks, "AnthropicError", "Event")},
        "/v1/messages/count_tokens": {"post": _operation(
            "count", "How many tokens a message has", "Counted", _messages(limits, counted=True), (400, 404, 408, 413),
            "AnthropicError")},
        "/v1/models": {"get": _operation("models", "The model's names", "Models")},
        "/v1/models/{name}": {"get": _operation("model", "One of them", "Model", None, (404,)) | {"parameters": [
            {"name": "name", "in": "path", "required": True, "schema": ref("Name")}]}},
        "/v1/weights": {"post": _operation(
            "weights", "New weights, from a trainer", "Taken",
            obj("folder version", folder=TEXT, version=integer(0, (1 << 31) - 1)), (400, 403, 408, 413))},
        "/health": {"get": {"operationId": "health", "summary": "Whether it takes questions", "security": [],
                            "responses": {"200": _reply("yes", ref("Health")), "503": _reply("no", ref("Health"))}}},
        "/metrics": {"get": {"operationId": "metrics", "summary": "Counts, for Prometheus", "security": [],
                             "responses": {"200": _reply("text of version 0.0.4", kind="text/plain")}}},
        "/": {"get": {"operationId": "page", "summary": "A page to talk to the model", "security": [],
                      "responses": {"200": _reply("the page", kind="text/html")}}},
    }  # fmt: skip
    schemes = {"bearer": {"type": "http", "scheme": "bearer"},
               "header": {"type": "apiKey", "in": "header", "name": "x-api-key"}}  # fmt: skip
    return {
        "openapi": "3.2.0",
        "info": {"title": "glmv serve", "version": "1", "description": "A vision-language model over HTTP."},
        "paths": paths, "security": [{name: []} for name in schemes] if key else [],
        "components": {"schemas": {"Name": one_of(names)} | _given(), "securitySchemes": schemes},
    }  # fmt: skip

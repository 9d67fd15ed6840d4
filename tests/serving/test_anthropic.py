"""Anthropic's own client against a server of ours whose model says what it is told to (`parrot`), and what Claude Code
sends beyond what the client writes.

Not covered: Claude Code itself.
"""

from __future__ import annotations

import anthropic
import httpx
import pytest

from tests.serving import parrot
from tests.serving.test_openai import data_uri

TOOL = {"name": "zoom", "description": "A part of the picture.",
        "input_schema": {"type": "object", "properties": {"where": {"type": "string"}}}}  # fmt: skip
ASK = [{"role": "user", "content": "What is it?"}]


def image(seed: int = 0) -> dict:
    data = data_uri(seed=seed).partition(",")[2]
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


@pytest.fixture(scope="module")
def client(bird):
    with anthropic.Anthropic(base_url=bird.url, api_key=parrot.KEY, max_retries=0) as client:
        yield client


def ask(client, messages=ASK, **settings):
    return client.messages.create(**dict(model=parrot.NAME, messages=messages, max_tokens=40) | settings)


def test_an_answer_in_one_body(bird, client):
    said = bird.say("a red heart")
    answer = ask(client, system="Be brief.")
    assert [(block.type, block.text) for block in answer.content] == [("text", "a red heart")]
    assert (answer.stop_reason, answer.usage.output_tokens, answer.role) == ("end_turn", len(said), "assistant")
    counted = client.messages.count_tokens(model=parrot.NAME, messages=ASK, system="Be brief.")
    assert counted.input_tokens == answer.usage.input_tokens > ask(client).usage.input_tokens


def test_a_stream_is_the_body_in_blocks(bird, client):
    """Thinking, text and a call, each a block; the client puts them together again and checks their order."""
    bird.say("look", "</think>", "a heart ", *parrot.call("zoom", where="top left"), "<|observation|>",
             after=["<think>"])  # fmt: skip
    settings = dict(tools=[TOOL], thinking={"type": "enabled", "budget_tokens": 1024})
    whole = ask(client, **settings)
    kinds = []
    with client.messages.stream(model=parrot.NAME, messages=ASK, max_tokens=40, **settings) as stream:
        for event in stream:
            kinds.append(event.type)
        streamed = stream.get_final_message()
    plain = lambda m: [b.model_dump(exclude={"id", "citations", "caller"}) for b in m.content]  # noqa: E731
    assert plain(streamed) == plain(whole)
    thought, text, call = whole.content
    assert (thought.thinking, text.text, call.name, call.input) == ("look", "a heart", "zoom", {"where": "top left"})
    assert streamed.stop_reason == whole.stop_reason == "tool_use" and streamed.usage == whole.usage
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3


def test_a_loop_with_a_tool_that_shows_a_picture(bird, client):
    """Results are text or lists with images, stand beside text, and system messages come in between."""
    bird.say(*parrot.call("zoom", where="left"), "<|observation|>")
    call = next(b for b in ask(client, tools=[TOOL]).content if b.type == "tool_use")
    bird.say("two hearts")
    encoded = bird.engine.counts.encoded
    result = {"type": "tool_result", "tool_use_id": call.id}
    shown = result | {"content": [{"type": "text", "text": "here"}, image()]}
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    messages = [
        *ASK, {"role": "assistant", "content": [thought, call.model_dump()]},
        {"role": "system", "content": [{"type": "text", "text": "The user is in a hurry."}]},
        {"role": "user", "content": [shown, {"type": "text", "text": "So?"}]},
    ]  # fmt: skip
    answer = ask(client, messages, tools=[TOOL])
    assert answer.content[0].text == "two hearts" and bird.engine.counts.encoded == encoded + 1
    count = lambda m: client.messages.count_tokens(model=parrot.NAME, messages=m, tools=[TOOL]).input_tokens  # noqa: E731
    assert count(messages) == answer.usage.input_tokens
    without = [*messages[:3], {"role": "user", "content": [result | {"content": "here"}, messages[3]["content"][1]]}]
    assert 2 < answer.usage.input_tokens - count(without) <= 18
    assert count(messages) > client.messages.count_tokens(model=parrot.NAME, messages=messages).input_tokens


def test_the_prompt_is_the_dialects(bird, client):
    """The same conversation by the other API gives the same tokens; results of one turn share an observation."""
    bird.say("x")
    calls = [{"type": "tool_use", "id": str(n), "name": "zoom", "input": {"where": w}} for n, w in enumerate("ab")]
    results = [{"type": "tool_result", "tool_use_id": str(n), "content": w} for n, w in enumerate("ab")]
    theirs = [
        *ASK,
        {"role": "assistant", "content": calls},
        {"role": "user", "content": [*results, {"type": "text", "text": "so"}]},
    ]
    n = client.messages.count_tokens(model=parrot.NAME, messages=theirs, tools=[TOOL]).input_tokens
    calls = [{"type": "function", "function": {"name": "zoom", "arguments": f'{{"where": "{w}"}}'}} for w in "ab"]
    ours = [*ASK, {"role": "assistant", "tool_calls": calls}, *({"role": "tool", "content": w} for w in "ab"),
            {"role": "user", "content": "so"}]  # fmt: skip
    function = {"name": "zoom", "description": TOOL["description"], "parameters": TOOL["input_schema"]}
    body = {"model": parrot.NAME, "messages": ours, "tools": [{"type": "function", "function": function}],
            "max_tokens": 1, "return_token_ids": True}  # fmt: skip
    reply = httpx.post(f"{bird.url}/v1/chat/completions", json=body, headers={"x-api-key": parrot.KEY}).json()
    assert reply["usage"]["prompt_tokens"] == n
    text = parrot.TOKENIZER.decode(reply["prompt_token_ids"], keep_special=True)
    assert text.endswith("</tool_call><|observation|><tool_response>a</tool_response><tool_response>b</tool_response>"
                         "<|user|>so<|assistant|></think>")  # fmt: skip


def test_calls_demanded_forbidden_and_alone_and_stops(bird, client):
    bird.say(*parrot.ids("zoom", "</tool_call>"), after=["<tool_call>"])
    answer = ask(client, tools=[TOOL], tool_choice={"type": "any"}, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.type for block in answer.content] == ["tool_use"] and answer.stop_reason == "tool_use"
    bird.say(*parrot.ids("<tool_call>", "zoom", "</tool_call>", "and more"))
    one = ask(client, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in one.content] == ["tool_use"] and one.stop_reason == "tool_use"
    assert [block.type for block in ask(client, tools=[TOOL]).content] == ["tool_use", "text"]
    assert ask(client, tools=[TOOL], tool_choice={"type": "none"}).content[0].text.startswith("<tool_call>zoom")

    bird.say("one two three")
    answer = ask(client, stop_sequences=["three"])
    assert (answer.stop_reason, answer.stop_sequence, answer.content[0].text) == ("stop_sequence", "three", "one two ")
    assert ask(client, max_tokens=1).stop_reason == "max_tokens"


def test_what_claude_code_sends_is_taken(bird):
    """Fields and headers as seen on the wire from it, none of which the client above writes by itself."""
    bird.say("yes")
    kept = {"cache_control": {"type": "ephemeral"}}
    body = {
        "model": parrot.NAME, "max_tokens": 32000, "stream": True, "metadata": {"user_id": "u"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"}, "thinking": {"type": "adaptive"},  # of a model that does not think
        "system": [{"type": "text", "text": t} | kept for t in ("a", "b", "c")],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"} | kept]},
                     {"role": "system", "content": "now"}, {"role": "user", "content": "so?"}],
        "tools": [TOOL | {"type": "custom"} | kept],
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {parrot.KEY}", "anthropic-beta": "mid-conversation-system-2026-04-07"}
    reply = httpx.post(f"{bird.url}/v1/messages?beta=true", json=body, headers=headers)
    lines = reply.text.splitlines()
    assert reply.status_code == 200 and lines[0] == "event: message_start" and '"text": "yes"' in reply.text
    assert reply.headers["content-type"].startswith("text/event-stream") and "[DONE]" not in reply.text


@pytest.mark.parametrize(("change", "said"), [
    ({"max_tokens": 0}, "max_tokens=0"), ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role"),
    ({"messages": [*ASK, {"role": "assistant", "content": "The"}]}, "last message is the assistant's"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"tools\[0\].type"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}, "base64"),
    ({"tool_choice": {"type": "tool", "name": "other"}, "tools": [TOOL]}, "'other'"),
    ({"extra_body": {"top_k": 5}}, "top_k=5"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_their_form(client, change, said):
    with pytest.raises(anthropic.BadRequestError, match=said) as raised:
        ask(client, **change)
    assert raised.value.body["error"]["type"] == "invalid_request_error"


def test_wrong_keys_and_names(client):
    with pytest.raises(anthropic.AuthenticationError):
        ask(client.with_options(api_key="wrong"))
    with pytest.raises(anthropic.NotFoundError, match="there is parrot"):
        ask(client, model="claude")

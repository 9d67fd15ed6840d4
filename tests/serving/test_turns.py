"""Results of tools that were called at once, as clients send them: what was done first comes first."""

from __future__ import annotations

from glmv_jax.serving import anthropic, openai
from glmv_jax.serving.limits import Limits

ASK = {"role": "user", "content": "both?"}
DONE = ["c", "other", "a", "b"]  # the calls were a, b, c
WANTED = ["a", "b", "c", "other"]


def told(asked) -> list[str]:
    texts = [m["content"] for m in asked.messages if m["role"] == "tool"]
    assert all("tool_call_id" not in message for message in asked.messages)
    return [text if isinstance(text, str) else text[0]["text"] for text in texts]


def test_openais():
    calls = [{"id": i, "type": "function", "function": {"name": "look", "arguments": "{}"}} for i in "abc"]
    results = [{"role": "tool", "tool_call_id": i, "content": i} for i in DONE]
    messages = [ASK, {"role": "assistant", "tool_calls": calls}, *results]
    assert told(openai.asked({"messages": messages}, Limits())) == WANTED
    # A turn's ids may be an earlier one's again; results without ids stay as they are.
    again = [{"role": "assistant", "tool_calls": calls[::-1]}, *results]
    assert told(openai.asked({"messages": [*messages, *again]}, Limits())) == [*WANTED, "c", "b", "a", "other"]
    bare = [{"role": "tool", "content": i} for i in DONE]
    assert told(openai.asked({"messages": [*messages[:2], *bare]}, Limits())) == DONE


def test_anthropics():
    calls = [{"type": "tool_use", "id": i, "name": "look", "input": {}} for i in "abc"]
    results = [{"type": "tool_result", "tool_use_id": i, "content": i} for i in DONE]
    note = {"type": "text", "text": "so?"}
    messages = [ASK, {"role": "assistant", "content": calls}, {"role": "user", "content": [*results, note]}]
    asked = anthropic.asked({"messages": messages, "max_tokens": 1}, Limits())
    assert told(asked) == WANTED and asked.messages[-1]["content"] == [note]

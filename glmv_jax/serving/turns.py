"""What tools found, in the order in which they were called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def in_call_order(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same messages as OpenAI's API has them, each run of results sorted as the calls of the turn before it.

    A prompt has no ids of calls, so that a model takes the first result for that of its first call, while clients that
    call tools at once send what is done first. Results that name no call of that turn come behind, as they are.
    """
    found: list[dict[str, Any]] = []
    start, calls = 0, []  # of a run of results
    for message in map(dict, messages):
        if message["role"] == "assistant":
            calls = [call.get("id") for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
        if message["role"] != "tool":
            start = len(found) + 1
        found.append(message)
        place = {id_: n for n, id_ in enumerate(calls) if isinstance(id_, str)}
        found[start:] = sorted(found[start:], key=lambda m: place.get(str(m.get("tool_call_id")), len(calls)))
    return [{key: value for key, value in message.items() if key != "tool_call_id"} for message in found]

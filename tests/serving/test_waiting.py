"""Those who wait: signs of life in their streams, an error in them, and what an ending server leaves them.

Not covered: proxies.
"""

from __future__ import annotations

import asyncio
import json
import socket

import anthropic
import httpx
import openai
import pytest

from glmv_jax.serving import app
from glmv_jax.serving.answers import Answers, Asked, Ended
from glmv_jax.serving.limits import Limits, Refused
from glmv_jax.serving.metrics import Metrics
from tests.serving import parrot
from tests.serving.test_limits import WORDS, limit, slow, soon  # noqa: F401

ASK = {"model": parrot.NAME, "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}


def blocks(bird, path: str) -> list[str]:
    """The events of a stream."""
    body, headers = ASK | {"stream": True}, {"x-api-key": parrot.KEY}
    with httpx.stream("POST", bird.url + path, json=body, headers=headers, timeout=30) as reply:
        assert reply.status_code == 200
        return "".join(reply.iter_text()).split("\n\n")[:-1]


def test_a_stream_that_waits_gives_signs_of_life_and_clients_take_no_notice(bird, limit):  # noqa: F811
    bird.say("one two")
    limit(ping=0.05)
    with slow(bird):
        chunks = blocks(bird, "/v1/chat/completions")
        events = [block.split("\n")[0].removeprefix("event: ") for block in blocks(bird, "/v1/messages")]
        with openai.OpenAI(base_url=f"{bird.url}/v1", api_key=parrot.KEY, max_retries=0) as client:
            said = [
                chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ASK, stream=True)
            ]
        with anthropic.Anthropic(base_url=bird.url, api_key=parrot.KEY, max_retries=0) as client:
            with client.messages.stream(**ASK) as stream:
                assert "".join(said) == "".join(stream.text_stream) == "one two"
    assert '"role": "assistant"' in chunks[0] and chunks[-1] == "data: [DONE]" and chunks[1].startswith(":")
    assert [chunk[:6] == "data: " for chunk in chunks].count(False) == [c[0] == ":" for c in chunks].count(True) >= 3
    assert events[:2] == ["message_start", "ping"] and events.count("ping") >= 3 and events[-1] == "message_stop"


def test_no_signs_of_life_where_an_answer_goes_on(bird):
    bird.say("one two three")
    assert not any(chunk.startswith(":") for chunk in blocks(bird, "/v1/chat/completions"))


def test_who_waited_in_vain_is_told_in_the_stream(bird, limit):  # noqa: F811
    bird.say("one")
    limit(ping=0.05, seconds=0.15)
    with slow(bird):
        with openai.OpenAI(base_url=f"{bird.url}/v1", api_key=parrot.KEY, max_retries=0) as client:
            with pytest.raises(openai.APIError, match="had not begun when 0.15 s are over"):
                list(client.chat.completions.create(**ASK, stream=True))
        kind, data = blocks(bird, "/v1/messages")[-1].split("\n")
        assert kind == "event: error" and json.loads(data[6:])["error"]["type"] == "overloaded_error"


def test_who_does_not_read_holds_no_room(bird, limit, monkeypatch):  # noqa: F811
    """The answer is of more bytes than fit between the server and a client that takes none of them."""
    monkeypatch.setattr(app, "WRITING", 0.2)
    listening = bird.listener.servers[0].sockets[0]
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    bird.say_forever(WORDS)
    limit(seconds=0.8)
    body = ASK | {"stream": True, "max_tokens": 400, "logprobs": True, "top_logprobs": 5, "n": 2}
    data = json.dumps(body).encode()
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {parrot.KEY}\r\n"
            f"Content-Length: {len(data)}\r\n\r\n")  # fmt: skip
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(listening.getsockname())
        client.sendall(head.encode() + data)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        assert soon(lambda: bird.answers.running == 2) and soon(lambda: bird.answers.running == 0)
        read = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert read.startswith(b"HTTP/1.1 200") and b"[DONE]" not in read


def test_an_ending_server_gives_everybody_an_end(bird):
    """Those who run keep what they have, those who wait are refused, and both soon."""
    bird.say_forever(WORDS)
    rows = parrot.SETTINGS.slots
    found: list[list] = [[] for _ in range(rows + 2)]

    async def answer(answers: Answers, prepared, parts: list) -> None:
        try:
            async for part in answers.answer(prepared):
                parts.append(part)
        except Refused as error:
            parts.append(error)

    async def asked() -> None:
        answers = Answers(bird.front, bird.answers.model, Limits(tokens=400, drain=0.3), Metrics())
        prepared = await answers.prepare(Asked([{"role": "user", "content": "hi"}]))
        tasks = [asyncio.create_task(answer(answers, prepared, parts)) for parts in found]
        while not all(found[:rows]):
            await asyncio.sleep(0.02)
        answers.drain()
        assert answers.draining
        await asyncio.wait_for(asyncio.gather(*tasks), 10)

    with slow(bird):
        asyncio.run(asked())
    for *_, ended in found[:rows]:
        assert isinstance(ended, Ended) and ended.reason == "length" and 0 < ended.tokens < 400
    for (error,) in found[rows:]:
        assert error.status == 503 and error.after and "ending" in str(error)
    assert soon(lambda: bird.engine.running == 0 and bird.engine.waiting == 0)

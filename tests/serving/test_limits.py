"""What a server refuses, how it says so, and that nothing goes on for those who have left.

Not covered: pictures from real public addresses, and https.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import http.server
import io
import re
import struct
import threading
import time
import zlib

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from glmv_jax.serving import fetching
from glmv_jax.serving.limits import Limits, Refused
from glmv_jax.typing import UserError
from tests.serving import parrot
from tests.serving.test_openai import data_uri

WORDS = "one two three"


@pytest.fixture(scope="module")
def http_client(bird):
    with httpx.Client(base_url=bird.url, headers={"Authorization": f"Bearer {parrot.KEY}"}, timeout=30) as client:
        yield client


@pytest.fixture
def post(http_client):
    """Posts a chat completion."""
    return lambda content="hi", **more: http_client.post(
        "/v1/chat/completions",
        json={"model": parrot.NAME, "messages": [{"role": "user", "content": content}]} | more,
    )


@pytest.fixture
def limit(bird, monkeypatch):
    """Sets limits for a test."""
    return lambda **these: monkeypatch.setattr(
        bird.answers, "limits", dataclasses.replace(bird.answers.limits, **these)
    )


@contextlib.contextmanager
def talking(bird, **more):
    """An answer that goes on and on, as long as the block."""
    bird.say_forever(WORDS)
    body = {"model": parrot.NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "stream": True}
    headers = {"Authorization": f"Bearer {parrot.KEY}"}
    with httpx.stream("POST", f"{bird.url}/v1/chat/completions", json=body | more, headers=headers) as reply:
        lines = reply.iter_lines()
        next(lines)
        yield lines


def soon(what, seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until:
        time.sleep(0.02)
    return what()


def bomb(width: int = 60_000, height: int = 60_000) -> str:
    """A PNG whose head says how large it is; the pixels are not there, as nobody should look for them."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"x")).decode()


def test_bodies_have_a_size(bird, post, limit, http_client):
    bird.say("x")
    limit(body=2000)
    assert post("a" * 10).status_code == 200
    refused = post("a" * 2000)
    assert refused.status_code == 413 and "2000" in refused.json()["error"]["message"]
    pieces = iter([b"a" * 1500] * 2)  # of unknown length
    refused = http_client.post("/v1/messages", content=pieces)
    assert refused.status_code == 413 and refused.json()["error"]["type"] == "request_too_large"


def test_pictures_have_a_size_and_a_number_and_are_pictures(bird, post, limit):
    bird.say("x")
    shown = lambda *uris: post([{"type": "image_url", "image_url": {"url": uri}} for uri in uris])  # noqa: E731
    assert shown(data_uri()).status_code == 200
    assert "more than 33,554,432 pixels" in shown(bomb()).json()["error"]["message"]
    limit(pixels=24 * 16 - 1, images=2)
    assert "more than 383 pixels" in shown(data_uri()).json()["error"]["message"]
    limit(pixels=24 * 16)
    assert shown(data_uri(), data_uri()).status_code == 200
    assert "more than 2 images" in shown(*[data_uri()] * 3).json()["error"]["message"]
    for wrong in ("data:image/png;base64,AAAA", "data:image/png;base64,#", "data:image/png,AAAA", "/etc/passwd",
                  "file:///etc/passwd", "http://127.0.0.1/a.png", "data:,", ""):  # fmt: skip
        assert shown(wrong).status_code == 400


def test_a_prompt_that_is_too_long_is_told_in_words_that_clients_know(bird, post, http_client):
    """Claude Code and OpenClaw shorten a conversation when they read these, and by the numbers; counting goes on."""
    refused = post("a" * 2000)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["code"] == "context_length_exceeded"
    tokens, most = map(int, re.match(r"prompt is too long: (\d+) tokens > (\d+) maximum", error["message"]).groups())
    assert most == 511 < tokens and post("a").json()["usage"]["prompt_tokens"] <= most
    body = {"model": parrot.NAME, "messages": [{"role": "user", "content": "a" * 2000}], "max_tokens": 8}
    theirs = http_client.post("/v1/messages", json=body).json()["error"]
    assert (theirs["type"], theirs["message"]) == ("invalid_request_error", error["message"])
    assert http_client.post("/v1/messages/count_tokens", json=body).json() == {"input_tokens": tokens}


def test_who_comes_when_all_rooms_are_taken_is_told_when_to_come_back(bird, post, limit):
    limit(requests=1)
    with talking(bird):
        refused = post()
        assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error"
    assert soon(lambda: bird.answers.running == 0)
    bird.say("x")
    assert post().status_code == 200 and post(n=2).status_code == 429


def test_an_ending_server_takes_nobody_in_and_says_so(bird, post, monkeypatch, http_client):
    assert http_client.get("/health").json() == {"status": "ok"}
    monkeypatch.setattr(bird.answers, "draining", True)
    refused = post()
    assert refused.status_code == 503 and refused.headers["Retry-After"]
    assert http_client.get("/health").status_code == 503


def test_an_answer_takes_no_longer_than_it_may(bird, post, limit):
    """What there is by then is the answer."""
    bird.say_forever(WORDS)
    post(max_tokens=1)
    limit(seconds=1.0)
    with slow(bird):
        chosen = post(max_tokens=400).json()["choices"][0]
    assert chosen["finish_reason"] == "length" and chosen["message"]["content"].startswith("one")
    assert soon(lambda: bird.engine.running == 0)


@contextlib.contextmanager
def slow(bird):
    """An engine each of whose steps takes a quarter of a second more."""
    step = bird.engine.step
    bird.engine.step = lambda: (time.sleep(0.25), step())[1]
    try:
        yield
    finally:
        del bird.engine.step


def test_nothing_is_drawn_for_those_who_have_left(bird):
    ended = bird.answers.metrics.ended
    left, before = ended["left"], bird.engine.counts.drawn
    with slow(bird):
        with talking(bird) as lines:
            next(lines)
            assert bird.engine.running == 1 and bird.answers.running == 1
        assert soon(lambda: bird.engine.running == 0 and bird.answers.running == 0)
        drawn = bird.engine.counts.drawn
        assert drawn - before < 400
        with pytest.raises(httpx.ReadTimeout):  # of one that is not streamed, and of several
            body = {"model": parrot.NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "n": 2}
            httpx.post(f"{bird.url}/v1/chat/completions", json=body, headers={"x-api-key": parrot.KEY}, timeout=1.5)
        assert soon(lambda: bird.engine.running == 0 and bird.answers.running == 0)
    assert ended["left"] == left + 3


def test_metrics_are_prometheus_and_count(bird, post, http_client):
    bird.say("one two")
    read = lambda: {(s.name, *s.labels.values()): s.value  # noqa: E731
                    for family in text_string_to_metric_families(http_client.get("/metrics").text)
                    for s in family.samples}  # fmt: skip
    before, reply = read(), post().json()
    after = read()
    more = lambda *key: after[key] - before.get(key, 0)  # noqa: E731
    assert more("glmv_drawn_tokens_total") == reply["usage"]["completion_tokens"]
    assert more("glmv_prompt_tokens_total") == reply["usage"]["prompt_tokens"]
    assert more("glmv_http_replies_total", "/v1/chat/completions", "200") == 1
    assert more("glmv_answers_total", "stop") == more("glmv_answer_seconds_count") == 1
    assert more("glmv_answer_seconds_bucket", "+Inf") == 1 and after["glmv_answers_running",] == 0


def test_many_at_once_all_get_their_own(bird, post):
    """Rows are four; nobody gets what another one asked for."""
    bird.say(WORDS)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        bodies = [reply.json() for reply in pool.map(lambda n: post(f"{n}", max_tokens=1 + n % 3), range(24))]
    assert [body["usage"]["completion_tokens"] for body in bodies] == [1 + n % 3 for n in range(24)]
    assert len({body["id"] for body in bodies}) == 24 and bird.answers.running == 0


def test_bodies_that_are_none(http_client):
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model": "\\ud800"}', b'{"model": 1}', b"null", b"NaN"):
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"):
            assert http_client.post(path, content=body).status_code == 400
    assert http_client.get("/nothing").status_code == 404
    assert http_client.get("/v1/messages").status_code == 405


@pytest.mark.parametrize("wrong", [{"body": 0}, {"seconds": -1.0}, {"requests": 0}])
def test_limits_that_let_nothing_through_are_refused(wrong):
    with pytest.raises(UserError, match="lets nothing through"):
        Limits(**wrong)


# --- pictures by URL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [
    "127.0.0.1", "localhost", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "[::1]",
    "[fe80::1]", "[fd00::1]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "2130706433", "0x7f.1", "100.64.0.1",
    "224.0.0.1", "[2002:7f00:1::]", "[64:ff9b::7f00:1]",
])  # fmt: skip
def test_nothing_is_fetched_from_addresses_that_are_not_public(host):
    with pytest.raises(Refused, match="no public address"):
        fetching.fetch(f"http://{host}/a.png", 1000)


def test_public_addresses_are():
    public = "93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808"
    assert all(map(fetching.is_public, public))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/a", "http:///a", "http://u:p@example.org/"])
def test_other_kinds_of_addresses_are_refused(url):
    with pytest.raises(Refused, match="no plain http"):
        fetching.fetch(url, 1000)


def test_what_is_fetched_and_what_not(bird, post, limit, monkeypatch):
    """A server of this machine stands for a public one, the same by another address for a private one."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            target = {"/inside": f"http://127.0.0.2:{port}/a.png", "/round": "/round", "/on": "/a.png"}.get(self.path)
            self.send_response(302 if target else 404 if self.path == "/none" else 200)
            if target:
                self.send_header("Location", target)
            self.end_headers()
            if self.path == "/slow":
                with contextlib.suppress(OSError):
                    for _ in range(40):
                        self.wfile.write(b"x")
                        time.sleep(0.1)
            self.wfile.write(b"x" * 5000 if self.path == "/long" else file.getvalue())

        def log_message(self, *_):
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
        monkeypatch.setattr(fetching, "SECONDS", 1.0)
        url = f"http://127.0.0.1:{port}"
        assert fetching.fetch(f"{url}/a.png", 1000) == fetching.fetch(f"{url}/on", 1000) == file.getvalue()
        for path, said in {"/long": "more than 1000 bytes", "/inside": "no public address", "/none": "status 404",
                           "/round": "from one address to the next", "/slow": "TimeoutError"}.items():  # fmt: skip
            with pytest.raises(Refused, match=said):
                fetching.fetch(url + path, 1000)
        bird.say("x")
        shown = lambda: post([{"type": "image_url", "image_url": {"url": f"{url}/a.png"}}])  # noqa: E731
        assert "fetches none" in shown().json()["error"]["message"]
        limit(fetch=True)
        assert shown().status_code == 200
        server.shutdown()

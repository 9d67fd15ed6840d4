"""Those who send slowly, without end, too much at once or nothing at all, by raw sockets; and that nobody else is hurt.

A second listener with small limits stands before the same model. Not covered: many thousands of connections.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time

import httpx
import pytest

from glmv_jax.serving.app import Server
from glmv_jax.serving.limits import Limits
from glmv_jax.serving.main import listener
from glmv_jax.typing import UserError
from tests.serving import parrot
from tests.serving.test_limits import WORDS, slow, soon

READING = 1.0
ASK = {"model": parrot.NAME, "messages": [{"role": "user", "content": "hi"}]}
HEADERS = {"Authorization": f"Bearer {parrot.KEY}"}


@pytest.fixture
def listening(bird, monkeypatch):
    """Starts a listener with these limits; returns its port and uvicorn's state."""
    running = []

    def start(**limits):
        changed = dataclasses.replace(bird.answers.limits, **{"reading": READING, **limits})
        monkeypatch.setattr(bird.answers, "limits", changed)
        server = listener(Server(bird.answers, [parrot.NAME], parrot.KEY), "127.0.0.1", 0)
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        assert soon(lambda: server.started)
        return server.servers[0].sockets[0].getsockname()[1], server.server_state

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(20)


@contextlib.contextmanager
def connected(port: int):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        yield sock


def all_of(sock: socket.socket) -> bytes:
    """What comes until the other end closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            found += piece
    return found


def whole(sock: socket.socket) -> bool:
    """Reads the reply of /health to its end; whether it was good."""
    found = b""
    while not found.endswith(b'{"status":"ok"}'):
        assert (piece := sock.recv(65536)), found
        found += piece
    return found.startswith(b"HTTP/1.1 200 ")


def trickle(sock: socket.socket, data: bytes, seconds: float = 0.05) -> threading.Thread:
    """Sends a byte at a time, from another thread, until there is none or nobody takes it."""

    def send():
        with contextlib.suppress(OSError):
            for n in range(len(data)):
                sock.sendall(data[n : n + 1])
                time.sleep(seconds)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def head(length: int, path: str = "/v1/messages", key: str = parrot.KEY) -> bytes:
    return (f"POST {path} HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\nContent-Length: {length}\r\n\r\n").encode()


def body_of(reply: bytes) -> dict:
    return json.loads(reply.partition(b"\r\n\r\n")[2])


def test_a_head_that_trickles_in_is_408(listening):
    port, state = listening()
    with connected(port) as sock:
        sender = trickle(sock, b"GET /health HTTP/1.1\r\n" + b"X-Padding: a\r\n" * 1000)
        reply = all_of(sock)
        sender.join(20)
    assert reply.startswith(b"HTTP/1.1 408 ") and b"connection: close" in reply.lower()
    assert "the head of the request did not come within 1 s" in body_of(reply)["error"]["message"]
    assert soon(lambda: not state.connections)


@pytest.mark.parametrize("path, kind", [("/v1/messages", "invalid_request_error"),
                                        ("/v1/chat/completions", "invalid_request_error")])  # fmt: skip
def test_a_body_that_trickles_in_is_408_in_its_own_format(bird, listening, path, kind):
    port, state = listening()
    before = bird.answers.metrics.replies[path, 408]
    with connected(port) as sock:
        sock.sendall(head(1000, path))
        trickle(sock, b'{"model": ' + b" " * 990)
        reply = all_of(sock)
    assert reply.startswith(b"HTTP/1.1 408 ") and b"connection: close" in reply.lower()
    error = body_of(reply)
    assert error["error"]["type"] == kind and "of the body came in 1 s" in error["error"]["message"]
    assert ("type" in error) == (path == "/v1/messages")
    assert bird.answers.metrics.replies[path, 408] == before + 1 and soon(lambda: not state.connections)


def test_a_body_that_comes_fast_enough_may_take_long(bird, listening):
    """More than twice the time that a short one has, at four times the rate that is asked for."""
    bird.say("x")
    port, _ = listening()
    body = json.dumps(ASK).encode().ljust(40_000)
    with connected(port) as sock:
        sock.sendall(head(len(body), "/v1/chat/completions"))
        began = time.monotonic()
        for n in range(0, len(body), 1600):
            sock.sendall(body[n : n + 1600])
            time.sleep(0.1)
        assert time.monotonic() - began > 2 * READING
        reply = sock.recv(65536)
    assert reply.startswith(b"HTTP/1.1 200 ")


def test_who_says_nothing_is_hung_up_on(listening):
    port, state = listening()
    with connected(port) as sock:
        assert soon(lambda: len(state.connections) == 1)
        assert all_of(sock) == b""
    assert soon(lambda: not state.connections)


@pytest.mark.parametrize("path, status", [("/nothing", 404), ("/v1/messages", 401)])
def test_a_body_that_nobody_reads_is_not_taken_for_ever(listening, path, status):
    """The answer comes before the body has; what is left of it has the time of a head."""
    port, state = listening()
    with connected(port) as sock:
        sock.sendall(head(10**9, path, key="another"))
        sender = trickle(sock, b"x" * 10_000, 0.02)
        reply = all_of(sock)
        sender.join(20)
    assert reply.startswith(f"HTTP/1.1 {status} ".encode()) and soon(lambda: not state.connections)


def test_heads_have_a_size(listening):
    port, _ = listening(head=2000)
    with connected(port) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 5000)
        reply = all_of(sock)
    assert reply.startswith(b"HTTP/1.1 431 ") and "more than 2000 bytes" in body_of(reply)["error"]["message"]
    with connected(port) as sock:
        sock.sendall(b"no HTTP at all\r\n\r\n")
        assert all_of(sock).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"http://127.0.0.1:{port}/health", headers={"X-A": "a" * 1000}).status_code == 200


def test_an_idle_connection_is_kept_for_a_while(listening):
    port, state = listening(keep_alive=4.0, reading=0.5)
    ask = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(port) as sock:
        sock.sendall(ask)
        assert whole(sock)
        time.sleep(1.0)  # longer than a head may take, which is none of an idle one
        sock.sendall(ask)
        assert whole(sock)
        sock.sendall(ask[:-2])  # and a next head that never ends is cut off as a first one is
        assert all_of(sock).startswith(b"HTTP/1.1 408 ")
    with connected(port) as sock:
        sock.sendall(ask)
        assert whole(sock) and all_of(sock) == b"" and soon(lambda: not state.connections)


def test_connections_have_a_number(listening):
    port, state = listening(connections=2, reading=20.0)
    url = f"http://127.0.0.1:{port}/health"
    with connected(port), connected(port):
        assert soon(lambda: len(state.connections) == 2)
        assert httpx.get(url).status_code == 503
    assert soon(lambda: not state.connections)
    with connected(port):
        assert httpx.get(url).status_code == 200


def test_a_long_stream_and_a_long_answer_are_not_cut(bird, listening):
    """Both last several times as long as a request or an idle connection may."""
    bird.say_forever(WORDS)
    port, _ = listening(reading=0.3, keep_alive=0.3)
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with slow(bird), httpx.Client(headers=HEADERS, timeout=60) as client:
        began = time.monotonic()
        with client.stream("POST", url, json=ASK | {"max_tokens": 24, "stream": True}) as reply:
            lines = list(reply.iter_lines())
        assert time.monotonic() - began > 1.2 and lines[-2] == "data: [DONE]"
        assert client.post(url, json=ASK | {"max_tokens": 24}).json()["usage"]["completion_tokens"] == 24


def test_who_leaves_amid_a_body_is_no_bug(bird, listening, caplog):
    port, _ = listening()
    before = bird.answers.metrics.replies["/v1/messages", 499]
    with connected(port) as sock:
        sock.sendall(head(1000) + b"{")
        time.sleep(0.2)
    assert soon(lambda: bird.answers.metrics.replies["/v1/messages", 499] == before + 1)
    assert not caplog.records


@pytest.mark.parametrize("wrong", [{"reading": 0.0}, {"connections": 0}, {"head": -1}, {"keep_alive": 0.0}])
def test_limits_that_let_nothing_through_are_refused(wrong):
    with pytest.raises(UserError, match="lets nothing through"):
        Limits(**wrong)

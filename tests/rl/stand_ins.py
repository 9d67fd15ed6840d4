"""Small servers that reply as vLLM's and SGLang's documentation says theirs do; what they draw a test decides.

vLLM (docs.vllm.ai v0.32.0, its tests of return_token_ids, its entrypoints/serve/dev/rlhf/api_router.py): a stream has
`prompt_token_ids` in its first chunk and `token_ids` in each, those of completions in the choice; /pause ends what
runs, with what there is of it and the reason "abort", and what is asked while it lasts waits for /resume.
SGLang (docs.sglang.io, basic_usage/sampling_params and advanced_features/sglang_for_rl): one body with `meta_info`.
They are written from that, not copied, and are no evidence of what a real server does.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class StandIn:
    """draw: (ids read, how many so far, version) -> (id, log-probability).   stop: ids that end an answer.
    refuse: (path, body) -> (status, headers, body bytes), or None to serve it.
    hold: tokens of a request after which it waits until it is ended or this is None; at: how far the last one is.
    bodies: (path, body) of every request.   version: updates seen, or the name that was given."""

    owner = "vllm"

    def __init__(self, draw: Callable[[list[int], int, Any], tuple[int, float]], stop: int) -> None:
        self.draw, self.stop = draw, stop
        self.hold: int | None = None
        self.at = 0
        self.refuse: Callable[[str, Any], tuple | None] = lambda path, body: None
        self.bodies: list[tuple[str, Any]] = []
        self.version: Any = 0
        self.generation = 0  # pauses so far
        self.paused = threading.Condition()
        self.is_paused, self.running, self.aborted, self.url = False, 0, set(), ""

    def reply(self, method: str, path: str, body: Any) -> dict | Iterator[dict] | tuple[int, dict, bytes]:
        self.bodies.append((path, body))
        if (refused := self.refuse(path, body)) is not None:
            return refused
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": "it", "object": "model", "owned_by": self.owner,
                                                "max_model_len": 4096}]}  # fmt: skip
        return self.served(path, body)

    def tokens(self, ids: list[int], most: int, ended: Callable[[], bool]) -> Iterator[tuple[int, float, str | None]]:
        """(id, log-probability, reason) one after the other; (-1, 0, "abort") for none more."""
        for n in range(most):
            self.at = n
            while self.hold is not None and n >= self.hold and not ended():
                time.sleep(0.002)
            if ended():
                yield -1, 0.0, "abort"
                return
            i, logprob = self.draw(ids, n, self.version)
            yield i, logprob, "stop" if i == self.stop else "length" if n == most - 1 else None
            if i == self.stop:
                return


class VLLM(StandIn):
    def served(self, path, body):
        if path == "/is_paused":
            return {"is_paused": self.is_paused}
        if path.startswith("/pause?mode="):
            with self.paused:
                self.is_paused = True
                if path.endswith("=wait"):
                    self.hold = None
                    self.paused.wait_for(lambda: not self.running)
                else:
                    self.generation += 1
            return {"status": "paused"}
        if path == "/collective_rpc":
            assert self.is_paused and body["method"] == "reload_weights"
            self.version += 1
            return {"results": [None]}
        if path == "/resume":
            with self.paused:
                self.is_paused = False
                self.paused.notify_all()
            return {"status": "resumed"}
        assert path in ("/v1/completions", "/v1/chat/completions") and body["return_token_ids"] and body["stream"]
        return self.chunks(path, body)

    def chunks(self, path, body):
        chat = "chat" in path
        ids = self.read(body["messages"]) if chat else body["prompt"]
        with self.paused:
            self.paused.wait_for(lambda: not self.is_paused)
            generation, self.running = self.generation, self.running + 1
        try:
            yield from self.events(chat, ids, body, lambda: generation != self.generation)
        finally:
            with self.paused:
                self.running -= 1
                self.paused.notify_all()

    def events(self, chat, ids, body, ended):
        first = {"prompt_token_ids": ids}
        if chat:
            yield first | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                                        "finish_reason": None}]}  # fmt: skip
            first = {}
        for i, logprob, reason in self.tokens(ids, body["max_tokens"], ended):
            new, said = ([i], [logprob]) if reason != "abort" else ([], [])
            names = [f"<{i}>" for i in new]
            if chat:
                shown = {
                    "delta": {"content": "".join(names)},
                    "logprobs": {
                        "content": [
                            {"token": name, "logprob": x, "bytes": None, "top_logprobs": []}
                            for name, x in zip(names, said)
                        ]
                    },
                }
            else:
                shown = {"text": "".join(names), "logprobs": {"tokens": names, "token_logprobs": said,
                                                              "top_logprobs": [{}], "text_offset": [0]}}  # fmt: skip
            yield {"choices": [{"index": 0, **shown, **first, "token_ids": new, "finish_reason": reason}]}
            first = {}
        yield {"choices": [], "usage": {"prompt_tokens": len(ids)}}

    read: Callable[[list], list[int]] = staticmethod(lambda messages: [])  # ids of a conversation


class SGLang(StandIn):
    owner = "sglang"

    def served(self, path, body):
        if path == "/update_weights_from_disk":
            self.generation += 1
            self.version = body["weight_version"]
            return {"success": True, "message": "Succeeded to update model weights."}
        if path == "/abort_request":
            self.aborted.add(body["rid"])
            return (200, {}, b"")
        assert path == "/generate" and body["return_logprob"]
        generation, ids = self.generation, body["input_ids"]
        ended = lambda: generation != self.generation or body["rid"] in self.aborted  # noqa: E731
        version, drawn = self.version, []
        for i, logprob, why in self.tokens(ids, body["sampling_params"]["max_new_tokens"], ended):
            drawn += [[logprob, i, None]] if i >= 0 else []
            reason = {"type": why}
        about = {"id": body["rid"], "finish_reason": reason, "prompt_tokens": len(ids), "weight_version": version,
                 "completion_tokens": len(drawn), "output_token_logprobs": drawn}  # fmt: skip
        return {"text": "", "output_ids": [i for _, i, _ in drawn], "meta_info": about}


@contextlib.contextmanager
def running(server: StandIn) -> Iterator[StandIn]:
    """Serves it on a port of this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            data = self.rfile.read(int(self.headers.get("content-length", 0)))
            found = server.reply(self.command, self.path, json.loads(data) if data else None)
            if isinstance(found, dict):
                found = 200, {}, json.dumps(found).encode()
            if isinstance(found, tuple):
                status, headers, content = found
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
                return
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for event in found:
                    self.wfile.write(event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

        do_GET = do_POST

        def log_message(self, *args):
            """Nothing."""

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{listening.server_address[1]}"
    try:
        yield server
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()

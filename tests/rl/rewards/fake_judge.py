"""A judge for tests: a real HTTP server on a port of this machine, with a reply of the test's making.

It speaks HTTP/1.1 with connections that are kept, reads JSON bodies, and counts what it sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator

HANG, GARBAGE = object(), object()


def word(body: dict) -> str:
    """The word that marks the data in a request."""
    return re.search(r"VERDICT (\w+) N", body["messages"][0]["content"])[1]


def user_text(body: dict) -> str:
    return body["messages"][1]["content"][-1]["text"]


def between(body: dict, name: str) -> str:
    """One of the texts that a request holds."""
    mark = word(body)
    return user_text(body).partition(f"{mark} {name}\n")[2].partition(f"\n{mark} END {name}")[0]


class FakeJudge:
    """reply: (request body, number of the request) -> the text of the reply; an int for a status, (status, headers);
    HANG, GARBAGE (bytes that are no JSON); or a float, seconds until the text "VERDICT word 10", or (seconds, text).

    bodies: of all requests.   most: requests that were in hand at the same time.
    """

    def __init__(self, reply: Callable):
        self.reply, self.bodies, self.headers, self.most, self._now = reply, [], [], 0, 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(re.search(rb"content-length: (\d+)", head.lower())[1])
                body = json.loads(await reader.readexactly(length))
                self.bodies.append(body)
                self.headers.append(head.decode())
                self._now += 1
                self.most = max(self.most, self._now)
                try:
                    status, headers, content = await self._content(body, len(self.bodies) - 1)
                finally:
                    self._now -= 1
                lines = [f"HTTP/1.1 {status} X", f"content-length: {len(content)}", *headers]
                writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
                await writer.drain()

    async def _content(self, body: dict, number: int) -> tuple[int, list[str], bytes]:
        reply = self.reply(body, number)
        if reply is HANG:
            await asyncio.sleep(60)
        if reply is GARBAGE:
            return 200, [], b"<html>\xff</html>"
        if isinstance(reply, float):
            reply = reply, f"Right.\nVERDICT {word(body)} 10"
        if isinstance(reply, tuple) and isinstance(reply[0], float):
            seconds, reply = reply
            await asyncio.sleep(seconds)
        if isinstance(reply, tuple):
            return reply[0], [f"{name}: {value}" for name, value in reply[1].items()], b"later"
        if isinstance(reply, int):
            return reply, [], b"no"
        return 200, [], json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()


@contextlib.contextmanager
def running(reply: Callable) -> Iterator[FakeJudge]:
    """A judge that serves in a thread of its own."""
    judge, loop, up, down = FakeJudge(reply), asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def main() -> None:
        async with await asyncio.start_server(judge.serve, "127.0.0.1", 0) as server:
            judge.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            up.set()
            await down.wait()
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    up.wait()
    try:
        yield judge
    finally:
        loop.call_soon_threadsafe(down.set)
        thread.join()
        loop.close()

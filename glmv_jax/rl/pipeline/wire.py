"""A server of answers over HTTP: one reply or a stream of events, tried again while what is wrong may pass."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from glmv_jax.typing import UserError

T = TypeVar("T")
log = logging.getLogger(__name__)

PASSING = {408, 425, 429, 500, 502, 503, 504}  # overloaded, starting, restarted
LONGEST_PAUSE = 30.0
TELLS = 60.0  # seconds between two words of what is tried again
REMEDIES = {
    401: "set GLMV_API_KEY to the server's key", 403: "set GLMV_API_KEY to the server's key, and see what it says",
    404: "is it the URL of a server of answers, up to its port?",
}  # fmt: skip


class Unserved(UserError):
    """What was asked of a server cannot be had there."""


class Passing(Unserved):
    """Another try may go better. after: seconds that the server asks to wait."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class Wire:
    """url: of the server, with or without /v1.   key: sent as a Bearer token, "" for none.
    connections: requests at a time.   silence: seconds without a byte after which a try has failed.
    patience: seconds of failing tries, each later than the one before, after which it is given up.

    All calls belong to one event loop.
    """

    def __init__(
        self, url: str, key: str = "", *, connections: int = 256, silence: float = 600.0, patience: float = 300.0
    ) -> None:
        try:
            import httpx
        except ImportError:
            raise UserError('rollouts by URL need httpx: pip install "glmv_jax[rl]"') from None
        if not url.startswith(("http://", "https://")):
            raise UserError(f"rollout.engine={url!r} is no URL; give http://HOST:PORT, or leave it empty")
        self.url, self._patience, self._errors = url.rstrip("/").removesuffix("/v1"), patience, httpx.RequestError
        self._told = -TELLS
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            verify=url.startswith("https"),  # reading the certificates takes 50 ms
            timeout=httpx.Timeout(silence, connect=min(10.0, silence), pool=None),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of one reply, None where it has none. Raises Passing, Unserved."""
        try:
            reply = await self._http.request(method, self.url + path, json=body)
        except self._errors as error:
            raise self._away(error) from None
        if reply.status_code != 200:
            raise self._refused(reply, reply.content, path)
        try:
            return json.loads(reply.content) if reply.content.strip() else None
        except ValueError:
            raise Unserved(f"{self.url}{path} replied with no JSON ({reply.content[:80]!r}); is it a server of answers?"
                           ) from None  # fmt: skip

    async def events(self, path: str, body: Any) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of a stream of server-sent events; left early, the connection is closed. Raises as `ask`."""
        try:
            async with self._http.stream("POST", self.url + path, json=body) as reply:
                if reply.status_code != 200:
                    raise self._refused(reply, await reply.aread(), path)
                async for line in reply.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    if (data := line[5:].strip()) == "[DONE]":
                        return
                    try:
                        event = json.loads(data)
                    except ValueError:
                        raise Passing(f"{self.url}{path} sent an event that is no JSON ({data[:80]!r})") from None
                    if not isinstance(event, dict) or event.get("error"):
                        raise Passing(f"{self.url}{path} broke off: {data[:300]}")
                    yield event
        except self._errors as error:
            raise self._away(error) from None

    async def patiently(self, once: Callable[[], Awaitable[T]], progress: Callable[[], int] = lambda: 0) -> T:
        """What `once` returns, called again as long as it raises Passing and patience lasts, which begins anew whenever
        `progress` has risen. Raises Unserved."""
        loop = asyncio.get_running_loop()
        since, seen, failures = loop.time(), progress(), 0
        while True:
            try:
                return await once()
            except Passing as error:
                if progress() != seen:
                    since, seen, failures = loop.time(), progress(), 0
                pause = max(error.after, min(LONGEST_PAUSE, 0.25 * 2**failures))
                pause *= random.uniform(1.0, 1.5)  # so that those who failed together do not come back together
                failures += 1
                if loop.time() + pause > since + self._patience:
                    raise Unserved(f"{error}; given up after {failures} tries in {self._patience:g} s") from None
                if loop.time() > self._told + TELLS:
                    self._told = loop.time()
                    log.warning("%s; it is tried again for up to %g s", error, self._patience)
                await asyncio.sleep(pause)

    async def close(self) -> None:
        await self._http.aclose()

    def _away(self, error: Exception) -> Passing:
        return Passing(f"{self.url} gives no answer ({type(error).__name__}: {error}); start the server there, or "
                       "correct rollout.engine")  # fmt: skip

    def _refused(self, reply: Any, data: bytes, path: str) -> Unserved:
        status = reply.status_code
        said = f"{self.url}{path} replied with status {status}: {data[:300].decode(errors='replace')}"
        if status in PASSING:
            wait = reply.headers.get("retry-after", "")
            return Passing(said, min(300.0, float(wait)) if wait.isdecimal() else 0.0)
        return Unserved(f"{said} ({REMEDIES[status]})" if status in REMEDIES else said)

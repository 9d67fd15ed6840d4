"""Model judges over HTTP, in the wire format of OpenAI's chat completions, which vLLM and SGLang serve too."""

from __future__ import annotations

import asyncio
import base64
import collections
import dataclasses
import datetime
import email.utils
import io
import json
import logging
import os
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards import rubric
from glmv_jax.rl.rewards.grade import MIN_REWARD, Grade, extract_box
from glmv_jax.rl.rewards.style import has_box
from glmv_jax.typing import UserError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_REPLY = 2**20  # bytes; a reply that goes on is cut off, not collected
# Too many requests, and what servers say when they are starting, overloaded or restarted.
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class JudgeError(Exception):
    """No verdict could be had."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A server and how much of it may be used.

    url: up to and without "/chat/completions".   key: the environment variable that holds the key; "" for none.
    connections: requests at a time.   rate: requests that may start in a second; 0 for no limit.
    timeout: seconds a request may take.   total: seconds from an answer's first request to its verdict.
    retries: after the first try.   backoff: seconds before the first retry, doubled each time, up to 30.
    """

    url: str
    model: str
    key: str = ""
    connections: int = 16
    rate: float = 0.0
    timeout: float = 60.0
    total: float = 180.0
    retries: int = 4
    backoff: float = 0.5
    max_tokens: int = 512
    temperature: float = 0.0


class Client:
    """Asks one endpoint. All calls belong to one event loop.

    counts: requests, retries, throttled (replies with 429), garbled (replies without a verdict).
    """

    def __init__(self, endpoint: Endpoint):
        try:
            import httpx
        except ImportError:
            raise UserError('model judges need httpx: pip install "glmv_jax[rl]"') from None
        if endpoint.connections < 1 or endpoint.retries < 0:
            raise UserError(f"a judge needs connections >= 1 and retries >= 0, not {endpoint}")
        self.endpoint = endpoint
        self.counts: collections.Counter[str] = collections.Counter()
        self._error = httpx.TransportError
        key = os.environ.get(endpoint.key, "") if endpoint.key else ""
        if endpoint.key and not key:
            raise UserError(
                f"the judge {endpoint.model} takes its key from the environment variable {endpoint.key}, "
                "which is not set"
            )
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            verify=endpoint.url.startswith("https"),  # reading the certificates takes 50 ms
            timeout=None,  # asyncio's, which a server that sends a byte now and then does not escape
            limits=httpx.Limits(max_connections=endpoint.connections, max_keepalive_connections=endpoint.connections),
        )
        self._connections = asyncio.Semaphore(endpoint.connections)
        self._next_start = 0.0  # of the loop's clock: no request starts before

    async def ask(self, messages: list[dict[str, Any]], read: Callable[[str], T]) -> T:
        """What `read` makes of the reply. A reply that it finds `rubric.Garbled` is asked for again.

        Raises TimeoutError after `total` seconds or when the last try took too long, JudgeError when the server refuses
        or all tries fail.
        """
        e, loop = self.endpoint, asyncio.get_running_loop()
        body = {"model": e.model, "messages": messages, "max_tokens": e.max_tokens, "temperature": e.temperature}
        failure: Exception = JudgeError("not asked")
        async with asyncio.timeout(None) as clock:
            for attempt in range(e.retries + 1):
                if attempt:
                    self.counts["retries"] += 1
                    # Half of it at random, so that those who failed together do not come back together.
                    await asyncio.sleep(min(30.0, e.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))
                async with self._connections:
                    if not attempt:
                        clock.reschedule(loop.time() + e.total)
                    await self._turn()
                    try:
                        async with asyncio.timeout(e.timeout):
                            return read(await self._post(body))
                    except (JudgeError, rubric.Garbled, self._error) as error:
                        if isinstance(error, _Refused):
                            raise
                        self.counts["garbled"] += isinstance(error, rubric.Garbled)
                        failure = JudgeError(f"{e.model}: {type(error).__name__}: {error}"[:300])
                    except TimeoutError:
                        failure = TimeoutError(f"{e.model}: {e.timeout} s are over")
        raise failure

    async def _turn(self) -> None:
        """Waits for the right to start a request: `rate`, and what the server has asked for."""
        loop = asyncio.get_running_loop()
        while (wait := self._next_start - loop.time()) > 0:
            await asyncio.sleep(wait)
        if self.endpoint.rate > 0:
            self._next_start = loop.time() + 1.0 / self.endpoint.rate

    async def _post(self, body: dict[str, Any]) -> str:
        """The text of the first choice."""
        self.counts["requests"] += 1
        async with self._http.stream("POST", f"{self.endpoint.url}/chat/completions", json=body) as reply:
            data = bytearray()
            async for piece in reply.aiter_bytes():
                data += piece
                if len(data) > MAX_REPLY:
                    raise JudgeError(f"a reply of more than {MAX_REPLY} bytes")
        if reply.status_code in _PASSING:
            if (wait := _retry_after(reply)) > 0:  # it holds for all who ask this server
                self._next_start = max(self._next_start, asyncio.get_running_loop().time() + wait)
            self.counts["throttled"] += reply.status_code == 429
            raise JudgeError(f"status {reply.status_code}")
        if reply.status_code != 200:
            raise _Refused(f"{self.endpoint.url} refuses with status {reply.status_code}: {bytes(data[:200])!r}")
        try:
            content = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeError(f"no chat completion: {type(error).__name__}") from None
        if not isinstance(content, str):
            raise rubric.Garbled("a reply without text")
        return content

    async def close(self) -> None:
        await self._http.aclose()


class _Refused(JudgeError):
    """A status that no retry will change."""


def _retry_after(reply: httpx.Response) -> float:
    """Seconds that a reply asks to wait; it says them as a number or as a date. 0 when it does not say."""
    text = reply.headers.get("retry-after", "")
    try:
        return min(300.0, max(0.0, float(text)))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    now = datetime.datetime.now(until.tzinfo)
    return min(300.0, max(0.0, (until - now).total_seconds()))


# --- what it is asked -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judging:
    """How answers are put before a judge.

    rubric: what is right here, in words.   scale: the highest grade.   passes: from which share of it an answer counts
    as correct.   box: the answer is the content of its one box (True), or the whole text, which may then hold no box:
    one in data without a verifiable answer gets the lowest reward.   images: whether the judge sees the pictures.
    longest: characters; a longer answer gets the lowest reward unread.
    """

    rubric: str = "The reference is right; wording is free."
    scale: int = 10
    passes: float = 0.7
    box: bool = True
    images: bool = True
    longest: int = 20_000


async def grade(client: Client, judging: Judging, sample: Sample, answer: str) -> Grade:
    """The judge's grade of an answer; its form is looked at first, and costs no request when it is wrong."""
    content, flag = extract_box(answer) if judging.box else (answer, "unexpected_box" if has_box(answer) else "")
    if not flag and len(content) > judging.longest:
        flag = "long_answer"
    if not flag and not rubric.committed(content, sample.answer if judging.box else ""):
        flag = "uncommitted"
    if flag:
        return Grade(MIN_REWARD, False, {"format": 0.0, "score": 0.0}, (flag,))
    word = rubric.new_word()
    images = await asyncio.to_thread(data_uris, sample.images) if judging.images else []
    messages = rubric.grading(sample, content, judging.rubric, judging.scale, word, images)
    (value,) = await client.ask(messages, lambda reply: rubric.verdict(reply, word, judging.scale))
    return Grade(value, value >= judging.passes, {"format": 1.0, "score": value})


def data_uris(images: Sequence[Image.Image]) -> list[str]:
    """Pictures as PNG in data URIs."""
    uris = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        uris.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return uris

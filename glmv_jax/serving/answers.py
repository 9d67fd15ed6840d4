"""What is asked of the model, whatever the wire format, and its answer as it comes.

asked = Asked(messages, images, ...)                    openai.asked(body), anthropic.asked(body)
prompt = await answers.prepare(asked)                   tokens and patches, in a thread; what is wrong is said here
async for part in answers.answer(prompt, choice):       Part, Part, ..., Ended
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from glmv_jax.inference.front import Front, Piece
from glmv_jax.inference.requests import Busy, Completion, Likely, Prompt, Request
from glmv_jax.serving.limits import Limits, Refused
from glmv_jax.serving.metrics import Metrics
from glmv_jax.serving.reply import Called, Event, Reader


class Model(Protocol):
    """How a model's conversations are written and read.

    tokenizer: `data.tokenizer.Tokenizer` or one of its kind.   stops: ids that end an answer.
    """

    tokenizer: Any
    stops: Sequence[int]

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image], tools: Sequence[Mapping[str, Any]],
        thinking: bool | None, films: Sequence[bytes] = (),
    ) -> Prompt:  # fmt: skip
        """A conversation up to the model's turn. thinking: None for what the model is made for. Raises UserError."""

    def of_ids(self, ids: Sequence[int], images: Sequence[Image.Image]) -> Prompt:
        """A prompt of ids, with a placeholder for each visual token of its images, which have the sizes that they have
        in it. Raises UserError."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """messages: as `data.chat_template.checked` gives them, images as {"type": "image"}; images: of those, upright RGB;
    films: of those of type "video", their files.
    tools: as OpenAI's API has them.   call: whether the model has to call one, or which one;
    one_call: whether the first call ends the answer.
    tokens: of the answer at most, None for `Limits.tokens`.   others: as `inference.requests.Request`.
    stop: texts that end an answer.   choices: how many answers.

    ids: of a prompt that is written already, placeholders of images included, in place of messages; the last `begun` of
    them are the answer's own beginning.   draw: as `inference.requests.Request`.   likely: how many of the likeliest
    tokens are told beside each that is drawn.
    """

    messages: Sequence[Mapping[str, Any]]
    images: Sequence[Image.Image] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    call: bool | str = False
    one_call: bool = False
    thinking: bool | None = None
    tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    choices: int = 1
    ids: Sequence[int] = ()
    begun: int = 0
    draw: int = 0
    likely: int = 0
    films: Sequence[bytes] = ()


class Prepared(NamedTuple):
    """asked, as tokens; opened: ids that the answer begins with, as it has to call or was begun; thinking: whether it
    thinks."""

    asked: Asked
    prompt: Prompt
    opened: list[int]
    thinking: bool
    limit: int
    seed: int


class Part(NamedTuple):
    """Some more of an answer: what its tokens say (often nothing yet), the tokens, their log-probabilities, the
    version of the parameters that drew them, and the likeliest tokens where they were asked for."""

    events: list[Event]
    tokens: np.ndarray
    logprobs: np.ndarray
    version: int
    likely: Likely | None = None


class Ended(NamedTuple):
    """reason: why; stop: the stop string. tokens: how many were drawn."""

    reason: Literal["stop", "length", "tool_calls"]
    stop: str | None
    tokens: int


def told(answer: Sequence[Part | Ended]) -> tuple[list[Part], Ended]:
    """The parts of an answer that is whole, and how it ended, which comes last."""
    *_, ended = answer
    assert isinstance(ended, Ended)
    return [part for part in answer if isinstance(part, Part)], ended


class Answers:
    """Answers what is asked, with one engine. All calls belong to one event loop."""

    def __init__(self, front: Front, model: Model, limits: Limits, metrics: Metrics) -> None:
        self.front, self.model, self.limits, self.metrics = front, model, limits, metrics
        self.running = 0  # answers that were let in and are not done
        self.draining = False
        self._end = math.inf  # of the event loop's time: no answer takes longer
        self._clocks: set[asyncio.Timeout] = set()  # of the answers that wait for more of themselves

    def drain(self) -> None:
        """From now on nobody is let in, and what runs has `Limits.drain` seconds left; then what there is of an answer
        is the answer, and none at all is refused, as it is when an answer's time is over."""
        self.draining, self._end = True, asyncio.get_running_loop().time() + self.limits.drain
        for clock in self._clocks:
            if not clock.expired():
                clock.reschedule(min(self._end, clock.when() or self._end))

    async def prepare(self, asked: Asked) -> Prepared:
        """Raises UserError for what cannot be answered."""
        return await asyncio.to_thread(self._prepare, asked)

    async def count(self, asked: Asked) -> int:
        """Tokens of a prompt of messages, also of one that is too long to be answered. Raises UserError."""
        return len((await asyncio.to_thread(self._prompt, asked)).tokens)

    def _prompt(self, asked: Asked) -> Prompt:
        thinking = False if asked.call else asked.thinking
        return self.model.prompt(asked.messages, asked.images, asked.tools, thinking, asked.films)

    def _prepare(self, asked: Asked) -> Prepared:
        tokenizer, settings = self.model.tokenizer, self.front.engine.settings
        room = settings.length
        if asked.likely > settings.likely:
            raise Refused(f"{asked.likely} of the likeliest tokens are asked for; {settings.likely} at most are told "
                          "here", field="top_logprobs")  # fmt: skip
        if asked.ids:
            told = len(asked.ids) - asked.begun
            prompt, opened = self.model.of_ids(asked.ids[:told], asked.images), list(asked.ids[told:])
        else:
            prompt, opened = self._prompt(asked), self._opened(asked)
        if (left := room - len(prompt.tokens) - len(opened)) < 1:
            # Clients know by these words that they have to shorten a conversation; OpenAI's by the code.
            raise Refused(f"prompt is too long: {len(prompt.tokens)} tokens > {room - len(opened) - 1} maximum, as "
                          f"prompt and answer together may have {room}; shorten it, or serve with a greater --length",
                          field="messages", code="context_length_exceeded")  # fmt: skip
        limit = min(asked.tokens or self.limits.tokens, left) + len(opened)
        seed = secrets.randbits(63) if asked.seed is None else asked.seed % (1 << 64)
        return Prepared(asked, prompt, opened, not asked.ids and _thinks(prompt, tokenizer), limit, seed)

    def _opened(self, asked: Asked) -> list[int]:
        """The beginning of a call, where there has to be one: as much as is certain."""
        if not asked.call:
            return []
        special, encode = self.model.tokenizer.special, self.model.tokenizer.encode
        if asked.call is True:
            return [special["<tool_call>"]]
        schema = next(t["function"] for t in asked.tools if t["function"]["name"] == asked.call).get("parameters") or {}
        name = [special["<tool_call>"], *encode(asked.call)]
        return [*name, special["<arg_key>"]] if schema.get("required") else name

    @contextlib.contextmanager
    def room(self, choices: int) -> Iterator[None]:
        """Holds room for so many answers. Raises Refused when there is none: 503 when the server ends, else 429."""
        if self.draining:
            raise Refused("the server is ending; ask another one", 503, after=5)
        if self.running + choices > self.limits.requests:
            raise Refused(f"{self.running} answers are running or waiting, of {self.limits.requests} that may; come "
                          "back later", 429, after=self._wait())  # fmt: skip
        self.running += choices
        try:
            yield
        finally:
            self.running -= choices

    def _wait(self) -> int:
        """Seconds until about an eighth of the answers here are done, as fast as the last ones were."""
        rows = max(self.front.engine.settings.slots, 1)
        return min(60, max(1, math.ceil(self.metrics.seconds_an_answer() * self.running / rows / 8)))

    async def answer(self, prepared: Prepared, choice: int = 0) -> AsyncGenerator[Part | Ended, None]:
        """One answer. Left early, the engine stops drawing it. Raises UserError for what the engine refuses."""
        begun = Completion.forced(prepared.opened) if prepared.opened else None
        request = Request(
            prepared.prompt, prepared.seed, prepared.asked.draw + choice, prepared.limit, prepared.asked.temperature,
            prepared.asked.top_p, begun, prepared.asked.likely > 0,
        )  # fmt: skip
        watch = self.metrics.began(len(prepared.prompt.tokens) if not choice else 0)
        try:
            async for part in self._drawn(prepared, request):
                watch.part(part)
                yield part
        finally:
            watch.done()

    @contextlib.asynccontextmanager
    async def _clock(self, until: float) -> AsyncGenerator[None, None]:
        """As `asyncio.timeout_at`, or sooner where the server ends."""
        async with asyncio.timeout_at(min(self._end, until)) as clock:
            self._clocks.add(clock)
            try:
                yield
            finally:
                self._clocks.discard(clock)

    async def _drawn(self, prepared: Prepared, request: Request) -> AsyncGenerator[Part | Ended, None]:
        asked, none = prepared.asked, np.zeros(0)
        reader = Reader(self.model.tokenizer, self.model.stops, asked.tools, prepared.thinking, asked.stop)
        reason, called, count = "length", False, 0
        if prepared.opened:
            reader.feed(prepared.opened)
        pieces = self.front.stream(request, wait=False)
        until = asyncio.get_running_loop().time() + self.limits.seconds
        try:
            while True:
                async with self._clock(until):
                    piece = await anext(pieces)
                if not isinstance(piece, Piece):
                    reason = piece.reason
                    break
                events = reader.feed(piece.tokens)
                calls = [n for n, event in enumerate(events) if isinstance(event, Called)]
                called |= bool(calls)
                if asked.one_call and calls:
                    yield Part(events[: calls[0] + 1], *piece)
                    yield Ended("tool_calls", None, count + len(piece.tokens))
                    return
                count += len(piece.tokens)
                yield Part(events, *piece)
                if reader.stopped is not None:
                    reason = "stop"
                    break
        except TimeoutError:
            if not count:
                reason = "the server is ending" if self.draining else f"{self.limits.seconds:g} s are over"
                raise Refused(f"the answer had not begun when {reason}; come back later", 503,
                              after=self._wait()) from None  # fmt: skip
        except Busy as error:
            raise Refused(str(error), 429, after=self._wait()) from None
        finally:
            await pieces.aclose()
        events = reader.end()
        called |= any(isinstance(event, Called) for event in events)
        if events:
            yield Part(events, none, none, self.front.engine.version)
        whole = reason == "stop" and called and reader.stopped is None
        yield Ended("tool_calls" if whole else "stop" if reason == "stop" else "length", reader.stopped, count)


def _thinks(prompt: Prompt, tokenizer: Any) -> bool:
    """Whether the prompt ends in an open `<think>`."""
    special = tokenizer.special
    begin, end, turn = (special.get(name, -1) for name in ("<think>", "</think>", "<|assistant|>"))
    last = next((i for i in prompt.tokens[::-1].tolist() if i in (begin, end, turn)), turn)
    return last == begin and begin != -1

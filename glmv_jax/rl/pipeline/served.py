"""Answers from a server by URL: ours, vLLM or SGLang, see `dialects`.

An answer is asked for in ids, in as many requests as it takes: a stream that breaks off, weights that change under a
server that ends what runs, and an answer that was aborted go on from the ids that there are. Every token has the
version of the weights that drew it: as the server says, or, where it does not, no request outlasts one version.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import io
import logging
import math
import re
import shutil
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data.hashes import image_hash
from glmv_jax.data.naflex import unpatchify
from glmv_jax.inference.requests import Picture
from glmv_jax.inference.requests import Prompt as Asked
from glmv_jax.inference.sampler import Sampling
from glmv_jax.rl.integrity import handed
from glmv_jax.rl.pipeline.dialects import Ask, Ours, Piece, met
from glmv_jax.rl.pipeline.local import Rows, nothing
from glmv_jax.rl.pipeline.protocols import Completion, Drawn, OnDone, Request
from glmv_jax.rl.pipeline.slots import seed_of
from glmv_jax.rl.pipeline.wire import Passing, Unserved, Wire
from glmv_jax.rl.rollout import heard
from glmv_jax.typing import Params, UserError

log = logging.getLogger(__name__)

LONGEST = 3600.0  # seconds of one request
LEAVING = 5.0  # seconds that a server has to hand over what it has of an answer that it was told to end


@dataclasses.dataclass(eq=False)
class Job:
    """An answer that is being written. drawing: the request under way, or the wait for it.   sent: what the server was
    asked, None while it is not."""

    request: Request
    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    ask: Ask | Any = None
    drawing: asyncio.Future | Any = None
    sent: Ask | None = None
    stopped: bool = False

    def add(self, tokens: list[int], logprobs: list[float], versions: list[int]) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        self.versions += versions

    def drawn(self) -> Drawn:
        return Drawn(
            np.array(self.tokens, np.int32), np.array(self.logprobs, np.float32), np.array(self.versions, np.int32)
        )


class ServedEngine:
    """An `Engine` over a server.

    wire: of nobody else.   rows: where prompts are found.   sampling: how all answers are drawn.
    length: of the longest prompt with its answer.   seed: of all random numbers, where the server takes one; ours then
    gives the answers of `SlotEngine`.
    write: (params, folder) -> the folder with the weights, in Hugging Face's layout.   folder: where those folders are,
    for the server too; the newest stays.   patch: side of a patch in pixels.
    """

    def __init__(
        self, wire: Wire, rows: Rows | Any, sampling: Sampling, length: int, seed: int, tokenizer: Any, *,
        write: Callable[[Params, Path], None], folder: Path, patch: int,
    ) -> None:  # fmt: skip
        self._rows, self._sampling, self._seed, self._tokenizer = rows, sampling, seed, tokenizer
        self._length, self._write, self._folder, self._patch = length, write, folder.absolute(), patch
        self._jobs: dict[int, Job] = {}
        self._dialect: Ours | Any = None  # None before the first weights
        self._version, self._open = -1, asyncio.Event()  # when requests may be sent
        self._asked = functools.lru_cache(maxsize=1024)(self._begin_to_make)  # once for all answers of a group
        self._wire = wire
        self._tasks: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="served", daemon=True)
        self._thread.start()

    # --- from any thread ----------------------------------------------------------------------------------------------

    def set_params(self, params: Params, version: int) -> Future:
        """Of all tokens drawn from then on. The future is done when the server has them; UserError when it cannot."""
        return asyncio.run_coroutine_threadsafe(self._update(params, version), self._loop)

    def submit(self, request: Request, on_done: OnDone) -> None:
        begun = request.prefix or nothing()
        job = Job(request, begun.tokens.tolist(), begun.logprobs.tolist(), begun.versions.tolist())
        self._loop.call_soon_threadsafe(self._begin, job, on_done)

    def abort(self, id: int) -> None:
        self._loop.call_soon_threadsafe(self._stop, id)

    def close(self) -> None:
        """Ends everything; nobody is told of what was not done."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- weights ------------------------------------------------------------------------------------------------------

    async def _update(self, params: Params, version: int) -> None:
        own: Any = asyncio.current_task()
        self._keep(own)
        self._dialect = self._dialect or await met(self._wire, self._sampling, self._length)
        target = self._folder / f"{version:08d}"
        await asyncio.to_thread(self._write_anew, params, target)
        if not self._dialect.keeps:
            self._open.clear()
        wait = any(job.sent and not self._dialect.goes_on(job.sent) for job in self._jobs.values())
        await self._wire.patiently(lambda: self._dialect.load(str(target), version, self._all_ended, wait))
        if self._version < 0:
            await self._probe()
        self._version = version
        self._open.set()
        for old in self._folder.iterdir():
            if re.fullmatch(r"\d{8}", old.name) and old != target:
                shutil.rmtree(old, ignore_errors=True)

    def _write_anew(self, params: Params, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)  # of a run that was ended here
        self._write(params, target)

    async def _probe(self) -> None:
        """Raises Unserved where answers do not come with ids and log-probabilities."""
        ask = Ask(self._tokenizer.encode("a b c"), [], 1, name="probe")
        async with contextlib.aclosing(self._dialect.draw(ask)) as pieces:
            found = [piece async for piece in pieces]
        if sum(len(self._checked(piece, 0)) for piece in found) != 1:
            raise Unserved(f"{self._wire.url} gave no token with its log-probability when asked for one: {found}")

    async def _all_ended(self) -> None:
        """No request is under way that was sent before."""
        sent = [job.drawing for job in self._jobs.values() if job.sent]
        if sent:
            await asyncio.wait(sent, timeout=LEAVING)
        for drawing in sent:
            drawing.cancel()
        await asyncio.gather(*sent, return_exceptions=True)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _begin(self, job: Job, on_done: OnDone) -> None:
        self._jobs[job.request.id] = job
        self._spawn(self._answer(job, on_done))

    async def _answer(self, job: Job, on_done: OnDone) -> None:
        request = job.request
        try:
            asked, facts = await asyncio.shield(self._asked(request.prompt.key))
            job.ask = asked._replace(seed=seed_of(self._seed, request), draw=request.member)
            reason = await self._written(job)
            text = heard(self._sampling, np.array(job.tokens, np.int32), self._tokenizer)
            done = Completion(job.drawn(), reason, {**facts, "text": text})
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("an answer by %s failed", self._wire.url)
            done = Completion(nothing(), "failed", {"error": f"{type(error).__name__}: {error}"})
        finally:
            del self._jobs[request.id]
        on_done(done)

    async def _written(self, job: Job) -> str:
        """Writes the answer, by as many requests as it takes; why it ended."""
        s = self._sampling
        while True:
            count = len(job.tokens)
            if count and job.tokens[-1] in s.stop:
                return "stop"
            if count >= s.max_new_tokens:
                return "length"
            if job.stopped:
                return "aborted"
            if s.think and count == s.think and s.close not in job.tokens:
                job.add([s.close], [0.0], [-1])
                continue
            limit = s.think if count < s.think else s.max_new_tokens
            read = functools.partial(self._read, job, limit)
            job.drawing = asyncio.ensure_future(self._wire.patiently(read, lambda: len(job.tokens)))
            try:
                reason = await job.drawing
            except asyncio.CancelledError:
                own: Any = asyncio.current_task()
                if own.cancelling():
                    raise
                reason = "abort"
            if reason == "length" and len(job.tokens) < limit:
                return "length"  # the server's own limit
            if reason == "stop" and not (job.tokens and job.tokens[-1] in s.stop):
                raise Unserved(f"{self._wire.url} ended an answer at {job.tokens[-1:]}, which ends none here; serve "
                               "the trainer's model, and its stop tokens (vLLM: --generation-config vllm)")  # fmt: skip

    async def _read(self, job: Job, limit: int) -> str:
        """One request; why it ended. What comes is the job's at once."""
        await self._open.wait()
        version, dialect = self._version, self._dialect
        if job.tokens and not dialect.goes_on(job.ask):
            job.tokens, job.logprobs, job.versions = [], [], []
        name = f"{job.request.id}-{len(job.tokens)}-{version}"
        ask = job.ask._replace(begun=list(job.tokens), more=limit - len(job.tokens), name=name)
        job.sent = ask
        try:
            async with asyncio.timeout(LONGEST), contextlib.aclosing(dialect.draw(ask)) as pieces:
                async for piece in pieces:
                    job.add(piece.tokens, piece.logprobs, self._checked(piece, version))
                    if len(job.tokens) > limit:
                        raise Unserved(f"{self._wire.url} drew more than the {ask.more} tokens that were asked")
                    if piece.reason is not None:
                        return piece.reason
        except TimeoutError:
            raise Passing(f"{self._wire.url}: {LONGEST:g} s are over") from None
        finally:
            job.sent = None
        raise Passing(f"{self._wire.url}: a stream ended before its answer")

    def _checked(self, piece: Piece, version: int) -> list[int]:
        """The versions of a piece. Unserved for what cannot be trained on."""
        if not all(map(math.isfinite, piece.logprobs)):
            raise Unserved(f"{self._wire.url} gave a log-probability that is no number; its weights may be broken")
        versions = [version] * len(piece.tokens) if piece.versions is None else piece.versions
        if len(versions) != len(piece.tokens):
            raise Unserved(f"{self._wire.url} says {len(versions)} versions of {len(piece.tokens)} tokens")
        return versions

    def _begin_to_make(self, key: Any) -> asyncio.Future[tuple[Ask, dict[str, str]]]:
        return asyncio.ensure_future(asyncio.to_thread(self._make, key))

    def _make(self, key: Any) -> tuple[Ask, dict[str, str]]:
        """What is asked about a prompt, and what is said of it (`rl.integrity.handed`)."""
        row = self._rows.row(key)
        prompt, sample = Asked.of_row(row, 0), row["samples"][0]
        hashes = [image_hash(picture.patches, picture.yx) for picture in prompt.pictures]
        images = [self._data_url(picture) for picture in prompt.pictures]
        facts = {"id": sample.id, **handed(prompt.tokens, ",".join(hashes))}
        return Ask(prompt.tokens.tolist(), [], 0, images, sample.prompt, hashes), facts

    def _data_url(self, picture: Picture) -> str:
        """A picture at its size, as PNG. Unserved for two frames of a film."""
        if picture.patches.shape[1] != 3 * self._patch**2:
            raise Unserved("films cannot be sent to a server; leave out their tasks, or rollout.engine empty")
        file = io.BytesIO()
        Image.fromarray(unpatchify(picture.patches, picture.yx, self._patch)).save(file, "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    def _stop(self, id: int) -> None:
        if (job := self._jobs.get(id)) is None or job.stopped:
            return
        job.stopped = True
        if job.drawing is not None:
            self._spawn(self._stop_drawing(job, job.drawing))

    async def _stop_drawing(self, job: Job, drawing: asyncio.Future) -> None:
        if job.sent and self._dialect.in_one_piece:
            with contextlib.suppress(Unserved):  # then what there is of it is lost, and no more
                await self._dialect.stop(job.sent)
                await asyncio.wait([drawing], timeout=LEAVING)
        drawing.cancel()

    def _spawn(self, work: Coroutine) -> None:
        self._keep(self._loop.create_task(work))

    def _keep(self, task: asyncio.Task) -> None:
        """Until it is done, for `_end`."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._wire.close()

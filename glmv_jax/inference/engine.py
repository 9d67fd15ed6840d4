"""The engine: one set of rows that decode together, whoever asks, for answers, rollouts, evaluation and serving.

    engine = Engine(cfg, params, Sampling.chat(tokenizer, 256), Settings(slots=32, length=1024))
    engine.warm()
    for request in group(Prompt.of_document(document), 8, seed=0):
        engine.submit(request, on_done=print)
    engine.run()

A request waits for a row, its prompt is read into it in chunks, and it decodes with the others from then on; a row that
is done is taken by the next request before the next call. What is read once is not read again (`slots`), pictures
neither (`pictures`). All shapes are fixed: after `warm` nothing compiles. Between calls requests come and go and
parameters change, and rows that run do not notice. What a row draws depends on its request alone.
Not thread-safe: `front.Front` gives it a thread and `await`.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from glmv_jax.inference import slots as slots_lib
from glmv_jax.inference.drafting_programs import DraftingPrograms
from glmv_jax.inference.pictures import PictureTable
from glmv_jax.inference.programs import Chunk, Programs, Running
from glmv_jax.inference.requests import Busy, Completion, Request
from glmv_jax.inference.sampler import Sampling
from glmv_jax.inference.settings import Counts, Settings
from glmv_jax.inference.slots import Slot, Work
from glmv_jax.models import vlm
from glmv_jax.models.glm5_next import GLM5NextConfig
from glmv_jax.parallel.mesh import check_batch, data_shards
from glmv_jax.parallel.rules import Rules
from glmv_jax.typing import Params, UserError, VisionInput


class Engine:
    """See the file's head. `traces` counts compilations, `counts` work.

    sampling: how answers are drawn where a request does not say; stop and suppressed tokens are of all.
    mesh, rules: where parameters live (a copy on every device, unless rules say otherwise); rows of the cache are split
        over its data axes.
    Raises UserError for slots that do not divide over the mesh, and for linear attention.
    """

    def __init__(
        self, cfg: vlm.VLMConfig, params: Params, sampling: Sampling, settings: Settings = Settings(), *,  # noqa: B008
        version: int = 0, mesh: Mesh | None = None, rules: Rules | None = None,
    ) -> None:  # fmt: skip
        if isinstance(cfg.decoder, GLM5NextConfig):
            raise UserError("linear attention keeps one state a row, which is of no use to a row that shares only its "
                            "first tokens; sample with Sampler")  # fmt: skip
        if mesh is not None:
            check_batch(settings.slots, mesh)
        self.cfg, self.sampling, self.settings = cfg, sampling, settings
        s = settings
        shards = data_shards(mesh)
        self._table = PictureTable(s.pictures, s.patches, shards)
        sizes = dict(steps=s.steps, pictures=self._table.size, mesh=mesh, rules=rules)
        if s.drafts:  # which are written behind a row's last entry
            self._programs = DraftingPrograms(cfg, sampling, s.slots, s.length + s.drafts, s.drafts, **sizes)
        else:
            self._programs = Programs(cfg, sampling, s.slots, s.length, **sizes)
        each = s.slots // shards
        self._slots = [Slot(n, n // each, n % each, s.length) for n in range(s.slots)]
        self._chunks = sorted({min(n, s.length) for n in s.chunks})
        self._waiting: collections.deque[Work] = collections.deque()
        self._ids, self._clock = itertools.count(), itertools.count(1)
        self.counts = Counts()
        self.set_params(params, version)
        self._cache, self._visual = self._programs.empty()

    # --- what callers ask ---------------------------------------------------------------------------------------------

    def submit(
        self, request: Request, on_done: Callable[[Completion], None] | None = None,
        on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> int:  # fmt: skip
        """Queues a request; returns its id.

        on_done: called once, the moment it ends, however it does. on_tokens: called with the tokens and
        log-probabilities of each call that drew some.
        Raises Busy when the queue is full, UserError for what does not fit.
        """
        work = self._work(request, on_done, on_tokens)
        if len(self._waiting) >= self.settings.queue:
            raise Busy(f"{len(self._waiting)} requests are waiting, as many as Settings.queue lets; come back later")
        self._waiting.append(work)
        return work.id

    def step(self) -> bool:
        """Fills free rows, reads prompts, and decodes once; whether there is more to do."""
        for reads in itertools.count():
            self._admit()
            reading = [slot for slot in self._slots if slot.missing]
            if not reading or (reads >= self.settings.reads and len(reading) < len(self._working())):
                break
            self._read(reading)
        if any(not slot.missing for slot in self._working()):
            self._decode()
        return bool(self._waiting or self._working())

    def run(self) -> None:
        """Steps until all requests are done."""
        while self.step():
            pass

    def abort(self, id_: int) -> Completion | None:
        """Ends a request; what it has so far, with which `Request.begun` goes on. None if it is over already."""
        for work in self._waiting:
            if work.id == id_:
                self._waiting.remove(work)
                return _finished(work, "aborted")
        for slot in self._working():
            if slot.work.id == id_:
                return self._end(slot, "aborted")
        return None

    def set_params(self, params: Params, version: int) -> None:
        """Parameters of all tokens drawn from now on. They are copied.

        Rows that run go on, with the entries they have; prompts that are being read are read again; what has been read
        and encoded before is forgotten.
        """
        self._weights = self._programs.weights(params)
        self.version = version
        self._table.clear()
        for slot in self._slots:
            if slot.missing or slot.free:
                slot.held = 0
            else:
                slot.stale = True

    def warm(self) -> None:
        """Compiles every program. Only while nothing runs."""
        if self._working():
            raise ValueError("warm() writes to rows of the cache; call it before anything is submitted")
        for slot in self._slots:
            slot.held = 0
        if self._visual is not None:
            for length in self._table.rows:
                channels, dtype = self._pixels()
                shape = (self._table.shards, length)
                rows = VisionInput(np.zeros((*shape, channels), dtype), np.zeros((*shape, 2), np.int32),
                                   np.zeros(shape, np.int32))  # fmt: skip
                self._encode(rows, np.full((shape[0], length // 4), self._table.size, np.int32))
        for length in self._chunks:
            self._cache = self._programs.prefill(self._weights.prefill, self._visual, self._cache, self._chunk(length))
        self._copy(self._slots[0], self._slots[0])
        self._cache, _ = self._programs.decode(self._weights.decode, self._cache, self._running())
        jax.block_until_ready(self._cache)

    @property
    def traces(self) -> int:
        return self._programs.traces

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with one."""
        return len(self._working())

    # --- requests -----------------------------------------------------------------------------------------------------

    def _work(self, request: Request, on_done, on_tokens) -> Work:
        default = lambda name: getattr(self.sampling if getattr(request, name) is None else request, name)  # noqa: E731
        settings = {name: default(name) for name in ("temperature", "top_p")}
        limit = default("max_new_tokens")
        prompt, begun = request.prompt, request.begun
        if (length := len(prompt.tokens) + limit) > self.settings.length:
            raise UserError(f"a prompt of {len(prompt.tokens)} tokens and up to {limit} after it are {length}, but "
                            f"rows hold {self.settings.length}; shorten it, lower max_new_tokens or raise "
                            "Settings.length")  # fmt: skip
        if self.settings.drafts and len(prompt.tokens) < 2:
            raise UserError("with drafts a prompt has at least 2 tokens; begin it as the model's texts begin")
        if begun is not None and (
            len(begun.tokens) >= limit or len(begun.tokens) and begun.tokens[-1] in self.sampling.stop
        ):
            raise UserError(f"the answer begun is over after {len(begun.tokens)} of {limit} tokens; "
                            "there is nothing to go on with")  # fmt: skip
        if prompt.pictures:
            self._check_pictures(request)
        return Work(next(self._ids), request, limit, **settings, on_done=on_done, on_tokens=on_tokens)

    def _check_pictures(self, request: Request) -> None:
        if self._visual is None:
            raise UserError("this model reads text alone, but images were given; leave them out or take a vision model")
        self._table.check(request.prompt)
        channels, dtype = self._pixels()
        for picture in request.prompt.pictures:
            if (picture.patches.shape[1], picture.patches.dtype) != (channels, np.dtype(dtype)):
                raise UserError(f"patches of {picture.patches.shape[1]} x {picture.patches.dtype}, but the engine was "
                                f"made for {channels} x {dtype}; set Settings.pixels")  # fmt: skip

    def _pixels(self) -> tuple[int, str]:
        still = self.cfg.vision.channels * self.cfg.vision.patch**2, "uint8"
        return self.settings.pixels or still

    def _end(self, slot: Slot, reason: str) -> Completion:
        work, slot.used = slot.work, next(self._clock)
        slot.end()
        return _finished(work, reason)

    # --- one step -----------------------------------------------------------------------------------------------------

    def _working(self) -> list[Slot]:
        return [slot for slot in self._slots if not slot.free]

    def _admit(self) -> None:
        """Gives free rows to waiting requests, in their order."""
        again = bool(self.settings.drafts)  # of the tokens in common the last, for what the head makes of it
        while self._waiting and (found := slots_lib.place(self._slots, self._waiting[0], again)):
            slot, source, common = found
            if common and source is not slot:
                self._copy(source, slot)
            slot.begin(self._waiting.popleft(), common, next(self._clock))
            self.counts.reused += common

    def _copy(self, source: Slot, target: Slot) -> None:
        """Of the other shards a row over itself."""
        rows = np.zeros((2, self._table.shards), np.int32)
        rows[:, source.shard] = source.row, target.row
        self._cache = self._programs.copy(self._cache, *rows)

    def _read(self, reading: list[Slot]) -> None:
        """The next chunk of these rows, of which no two are in one shard."""
        most = max(slot.missing for slot in reading)
        length = next((n for n in self._chunks if n >= most), self._chunks[-1])
        chunk, shown = self._chunk(length), []
        for slot in reading:
            # A chunk that would not fit behind what the row holds reads some of it again.
            start = min(slot.held, self.settings.length - length)
            stop = min(start + length, slot.held + slot.missing)
            n, at = stop - start, slot.shard
            chunk.row[at], chunk.start[at], chunk.valid[at, :n] = slot.row, start, True
            chunk.tokens[at, : n + 1], chunk.positions[at, : n + 1] = slot.work.cut(start, stop + 1)
            if (slot.work.prompt.image_row[start : stop + 1] >= 0).any():
                shown.append((slot, start, stop + 1))
            self.counts.read += stop - slot.held
            slot.held = stop
        for rows, place in self._table.missing([p for slot, *_ in shown for p in slot.work.prompt.pictures]):
            self._encode(rows, place)
            self.counts.encoded += int(rows.frame.max())
        for slot, start, stop in shown:
            places = self._table.places(slot.work.prompt)[start:stop]
            chunk.picture[slot.shard, : len(places)] = places
        self._cache = self._programs.prefill(self._weights.prefill, self._visual, self._cache, chunk)

    def _chunk(self, length: int) -> Chunk:
        D, C = self._table.shards, length
        return Chunk(
            np.zeros(D, np.int32), np.zeros(D, np.int32), np.zeros((D, C + 1), np.int32),
            np.zeros((D, C + 1, 3), np.int32), np.full((D, C + 1), -1, np.int32), np.zeros((D, C), bool),
        )  # fmt: skip

    def _encode(self, rows: VisionInput, place: np.ndarray) -> None:
        self._visual = self._programs.encode(self._weights.prefill, self._visual, rows, place)

    def _running(self) -> Running:
        N = self.settings.slots
        int_N = lambda: np.zeros(N, np.int32)  # noqa: E731
        rows = Running(np.zeros(N, bool), *(int_N() for _ in range(5)), np.zeros((N, 2), np.uint32), int_N(),
                       np.zeros(N, np.float32), np.ones(N, np.float32))  # fmt: skip
        for slot in self._slots:
            at, work = slot.number, slot.work
            rows.length[at] = slot.held  # what idle rows write lands behind what they hold
            if slot.free or slot.missing:
                continue
            rows.running[at], rows.limit[at], rows.drawn[at] = True, work.limit, len(work.tokens)
            rows.token[at], rows.position[at] = work.last()
            rows.key[at] = divmod(work.request.seed, 1 << 32)
            rows.draw[at], rows.temperature[at], rows.top_p[at] = work.request.draw, work.temperature, work.top_p
        return rows

    def _decode(self) -> None:
        rows = self._running()
        self._cache, drawn = self._programs.decode(self._weights.decode, self._cache, rows)
        drawn = jax.device_get(drawn)
        self.counts.calls += 1
        self.counts.places += int(drawn.new.any(axis=(0, 2)).sum()) * len(self._slots)
        self.counts.drawn += int(drawn.new.sum())
        ran = []
        for slot in self._slots:
            if rows.running[at := slot.number]:
                new = drawn.new[at]
                ran.append((slot, slot.work, drawn.tokens[at][new], drawn.logprobs[at][new]))
        for slot, work, tokens, logprobs in ran:
            work.add(tokens, logprobs, self.version)
            slot.drew(tokens)
        for slot, work, tokens, logprobs in ran:  # only now, as callbacks may submit and abort
            if work.on_tokens is not None:
                work.on_tokens(tokens, logprobs)
            if not drawn.running[slot.number] and slot.work is work:
                self._end(slot, "stop" if work.tokens[-1] in self.sampling.stop else "length")


def _finished(work: Work, reason: str) -> Completion:
    completion = work.completion(reason)
    if work.on_done is not None:
        work.on_done(completion)
    return completion

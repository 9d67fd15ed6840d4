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
import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from glmv_jax.inference import slots as slots_lib
from glmv_jax.inference.drafting_programs import DraftingPrograms
from glmv_jax.inference.pictures import PictureTable
from glmv_jax.inference.programs import Chunk, Drawn, Programs, Running, Until, Weights, recurrent
from glmv_jax.inference.requests import Busy, Completion, Likely, Reason, Request
from glmv_jax.inference.sampler import Sampling
from glmv_jax.inference.settings import Counts, Settings
from glmv_jax.inference.slots import Place, Slot, Slots, Work
from glmv_jax.models import vlm
from glmv_jax.parallel.mesh import check_batch, data_shards
from glmv_jax.parallel.rules import Rules
from glmv_jax.typing import Params, UserError, VisionInput


class Engine:
    """See the file's head. `traces` counts compilations, `counts` work.

    params: None for those that `set_params` is to give.
    sampling: how answers are drawn where a request does not say; stop and suppressed tokens are of all.
    mesh, rules: where parameters live (default: the rules "serve"); rows of the cache are split over its data axes,
        their heads where the rules have them.
    placed: parameters stay on the mesh as they lie, and the compiler sees to the rest.
    Raises UserError for slots that do not divide over the mesh.
    """

    def __init__(
        self, cfg: vlm.VLMConfig, params: Params | None, sampling: Sampling, settings: Settings = Settings(),  # noqa: B008
        *, version: int = 0, mesh: Mesh | None = None, rules: Rules | None = None, placed: bool = False,
    ) -> None:  # fmt: skip
        if mesh is not None:
            check_batch(settings.slots, mesh)
        self.cfg, self.sampling, self.settings = cfg, sampling, settings
        s = settings
        shards = data_shards(mesh)
        self._lanes = min(s.lanes, s.slots // shards)
        self._table = PictureTable(s.pictures, s.patches, shards, self._lanes)
        sizes: Any = dict(steps=max(s.steps, s.alone), pictures=self._table.size, mesh=mesh, rules=rules, placed=placed,
                     likely=s.likely)  # fmt: skip
        self._chunks = sorted({min(n, s.length) for n in s.chunks})
        # Entries that chunks fit into; a state that cannot go back reads nothing twice, and has the room behind it.
        self._room = s.length + (self._chunks[-1] if recurrent(cfg) else 0)
        if s.drafts:  # which are written behind a row's last entry
            self._programs: Programs = DraftingPrograms(cfg, sampling, s.slots, s.length + s.drafts, s.drafts, **sizes)
        else:
            self._programs = Programs(cfg, sampling, s.slots, self._room, **sizes)
        self._no_slots = functools.partial(Slots, s.slots, shards, s.length, exact=recurrent(cfg))
        self._slots = self._no_slots()
        self._waiting: collections.deque[Work] = collections.deque()
        self._ids, self._clock = itertools.count(), itertools.count(1)
        self.counts = Counts(reached=np.zeros(s.drafts, np.int64), accepted=np.zeros(s.drafts, np.int64))
        self.version, self._cache = version, None
        if params is not None:
            self.set_params(params, version)

    # --- what callers ask ---------------------------------------------------------------------------------------------

    def submit(
        self, request: Request, on_done: Callable[[Completion], None] | None = None,
        on_tokens: Callable[[np.ndarray, np.ndarray, Likely | None], None] | None = None,
    ) -> int:  # fmt: skip
        """Queues a request; returns its id.

        on_done: called once, the moment it ends, however it does. on_tokens: called with the tokens and
        log-probabilities of each call that drew some, and the likeliest at their places where the request asks.
        Raises Busy when the queue is full, UserError for what does not fit.
        """
        work = self._work(request, on_done, on_tokens)
        if len(self._waiting) >= self.settings.queue:
            raise Busy(f"{len(self._waiting)} requests are waiting, as many as Settings.queue lets; come back later")
        self._waiting.append(work)
        return work.id

    def step(self) -> bool:
        """Fills free rows, reads prompts, and decodes once; whether there is more to do."""
        return self._step(self.settings.reads, self.settings.steps)

    def run(self) -> None:
        """Steps until all requests are done, with as few calls as there may be: what comes from another thread waits
        longer than for `step`."""
        while self._step(None, self.settings.alone):
            pass

    def _step(self, most_reads: int | None, most_steps: int) -> bool:
        for reads in itertools.count():
            self._admit()
            reading = self._slots.where(self._slots.reading)
            if not reading or (most_reads is not None and reads >= most_reads and len(reading) < self.running):
                break
            self._read(reading)
        if (self._slots.reading | self._slots.free).sum() < len(self._slots.all):
            self._decode(most_steps)
        return bool(self._waiting or self.running)

    def abort(self, id_: int) -> Completion | None:
        """Ends a request; what it has so far, with which `Request.begun` goes on. None if it is over already."""
        for work in self._waiting:
            if work.id == id_:
                self._waiting.remove(work)
                return _finished(work, "aborted")
        for slot in self._slots.where(~self._slots.free):
            if slot.work.id == id_:
                return self._end(slot, "aborted")
        return None

    def set_params(self, params: Params, version: int, *, copy: bool = True) -> None:
        """Parameters of all tokens drawn from now on. copy: they are; else they must not be given away (donated) until
        others are set or `release` was called.

        Rows that run go on, with the entries they have; prompts that are being read are read again; what has been read
        and encoded before is forgotten.
        """
        self._weights: Weights | Any = self._programs.weights(params, copy)
        self.version = version
        if self._cache is None:
            self._cache, self._visual = self._programs.empty()
        self._table.clear()
        self._slots.forget()

    def release(self) -> None:
        """Lets go of the parameters and of all memory, while nothing runs; `set_params` begins anew, as a new engine
        would: what comes then is in the rows that it would have there."""
        self._slots = self._no_slots()
        self._weights = self._cache = self._visual = None

    def warm(self) -> None:
        """Compiles every program. Only while nothing runs."""
        if self.running:
            raise ValueError("warm() writes to rows of the cache; call it before anything is submitted")
        self._slots.held[:] = 0
        if self.cfg.vision is not None:
            for rows, length in itertools.product(self._table.at_once, self._table.rows):
                self._encode(*self._table.empty(rows, length, *self._pixels()))
        for lanes, length in itertools.product(sorted({1, self._lanes}), self._chunks):
            chunk = self._chunk(lanes, length)
            self._cache = self._programs.prefill(self._weights.prefill, self._visual, self._cache, chunk)
        self._copy([])
        self._cache, _ = self._programs.decode(self._weights.decode, self._cache, self._running(), Until(1, 0))
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
        return int((~self._slots.free).sum())

    # --- requests -----------------------------------------------------------------------------------------------------

    def _work(self, request: Request, on_done: Callable | None, on_tokens: Callable | None) -> Work:
        default = lambda name: getattr(self.sampling if getattr(request, name) is None else request, name)  # noqa: E731
        settings = {name: default(name) for name in ("temperature", "top_p")}
        limit = default("max_new_tokens")
        prompt, begun = request.prompt, request.begun
        if (length := len(prompt.tokens) + limit) > self.settings.length:
            raise UserError(f"a prompt of {len(prompt.tokens)} tokens and up to {limit} after it are {length}, but "
                            f"rows hold {self.settings.length}; shorten it, lower max_new_tokens or raise "
                            "Settings.length")  # fmt: skip
        if (self.settings.drafts or recurrent(self.cfg)) and len(prompt.tokens) < 2:
            raise UserError("with drafts, or linear attention, a prompt has at least 2 tokens; begin it as the model's "
                            "texts begin")  # fmt: skip
        if begun is not None and (
            len(begun.tokens) >= limit or len(begun.tokens) and begun.tokens[-1] in self.sampling.stop
        ):
            raise UserError(f"the answer begun is over after {len(begun.tokens)} of {limit} tokens; "
                            "there is nothing to go on with")  # fmt: skip
        if request.likely and not self.settings.likely:
            raise UserError("this engine tells no likeliest tokens; set Settings.likely")
        if prompt.pictures:
            self._check_pictures(request)
        return Work(next(self._ids), request, limit, **settings, on_done=on_done, on_tokens=on_tokens)

    def _check_pictures(self, request: Request) -> None:
        if self.cfg.vision is None:
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

    def _end(self, slot: Slot, reason: Reason) -> Completion:
        work = slot.work
        slot.end(next(self._clock))
        return _finished(work, reason)

    # --- one step -----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Gives free rows to waiting requests, in their order but for those that had better wait until what others are
        reading is there."""
        again = bool(self.settings.drafts)  # of the tokens in common the last, for what the head makes of it
        passed: list[Work] = []
        copies: list[tuple[Slot, Slot]] = []
        soon: set[int] = set()  # of prompts: those that are being read
        sources: dict[int, Slot] = {}  # and where others are
        while self._waiting and self._slots.free.any():
            work = self._waiting[0]
            same = work.request.begun is None and id(work.prompt)  # of a group: what holds for one holds for the next
            found: Place | Literal["soon"] | None = "soon" if same in soon else None
            if found is None and same in sources and not again and (group := self._beside(same, sources[same])):
                copies += [(sources[same], slot) for slot in group if slot is not sources[same]]
                continue
            found = found or slots_lib.place(self._slots, work, self._lanes, again)
            if found is None:
                break
            self._waiting.popleft()
            if found == "soon":
                passed.append(work)
                soon |= {same} - {False}
                continue
            slot, source, common = found
            if source is not slot and common < min(self._chunks[0], work.known - 1 - again):
                common = 0  # so few are read with the others, sooner than a row is copied
            if same and common:
                sources[same] = source
            if common and source is not slot:
                copies.append((source, slot))
            self._begin([slot], [work], common)
        self._waiting.extendleft(reversed(passed))
        if copies:
            self._copy(copies)

    def _beside(self, same: int, source: Slot) -> list[Slot]:
        """The requests of a prompt that wait in front of all others take rows in the shard of `source`, if that has
        read it: those rows, as far as there are any."""
        group = itertools.takewhile(lambda work: work.request.begun is None and id(work.prompt) == same, self._waiting)
        works = list(itertools.islice(group, len(self._slots.all)))
        slots, common = slots_lib.beside(self._slots, works[0], source, len(works))
        if slots:
            self._begin(slots, [self._waiting.popleft() for _ in slots], common)
        return slots

    def _begin(self, slots: list[Slot], works: list[Work], common: int) -> None:
        """Of works that know the same tokens."""
        now = list(itertools.islice(self._clock, len(slots)))
        self._slots.begin([slot.number for slot in slots], works, common, now)
        self.counts.reused += common * len(slots)

    def _copy(self, pairs: list[tuple[Slot, Slot]]) -> None:
        """Rows over others of their shard, in this order."""
        D, P = self._slots.shards, len(self._slots.all) // self._slots.shards
        rows, filled = np.zeros((2, D, P), np.int32), np.zeros(D, np.int32)
        for source, target in pairs:
            rows[:, source.shard, filled[source.shard]] = source.row, target.row
            filled[source.shard] += 1
        self._cache = self._programs.copy(self._cache, *rows, filled.max())

    def _read(self, reading: list[Slot]) -> None:
        """The next chunk of these rows, of which no more are in one shard than it has lanes; where they are few, of one
        a shard."""
        lanes = self._lanes if 2 * np.bincount([slot.shard for slot in reading]).max() > self._lanes else 1
        if lanes == 1:
            reading = list({slot.shard: slot for slot in reading}.values())
        most = max(slot.missing for slot in reading)
        length = next((n for n in self._chunks if n >= most), self._chunks[-1])
        chunk, shown, filled = self._chunk(lanes, length), [], np.zeros(self._slots.shards, int)
        for slot in reading:
            # A chunk that would not fit behind what the row holds reads some of it again.
            start = min(slot.held, self._room - length)
            stop = min(start + length, slot.held + slot.missing)
            n, at = stop - start, (slot.shard, filled[slot.shard])
            filled[slot.shard] += 1
            chunk.row[at], chunk.start[at], chunk.valid[at][:n] = slot.row, start, True
            chunk.tokens[at][: n + 1], chunk.positions[at][: n + 1] = slot.work.cut(start, stop + 1)
            if (slot.work.prompt.image_row[start : stop + 1] >= 0).any():
                shown.append((slot.work.prompt, at, start, stop + 1))
            self.counts.read += stop - slot.held
            slot.read(stop)
        for rows, place in self._table.missing([picture for prompt, *_ in shown for picture in prompt.pictures]):
            self._encode(rows, place)
            self.counts.encoded += int(rows.frame.max())
        for prompt, at, start, stop in shown:
            places = self._table.places(prompt)[start:stop]
            chunk.picture[at][: len(places)] = places
        self._cache = self._programs.prefill(self._weights.prefill, self._visual, self._cache, chunk)

    def _chunk(self, lanes: int, length: int) -> Chunk:
        shape, C = (self._slots.shards, lanes), length
        return Chunk(
            np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros((*shape, C + 1), np.int32),
            np.zeros((*shape, C + 1, 3), np.int32), np.full((*shape, C + 1), -1, np.int32),
            np.zeros((*shape, C), bool),
        )  # fmt: skip

    def _encode(self, rows: VisionInput, place: np.ndarray) -> None:
        self._visual = self._programs.encode(self._weights.prefill, self._visual, rows, place)

    def _running(self) -> Running:
        s = self._slots
        running_N = ~s.free & ~s.reading
        of_running = lambda x, other=0: np.where(running_N, x, np.asarray(other, x.dtype))  # noqa: E731
        token, position, drawn, limit, draw = map(of_running, (s.token, s.position, s.drawn, s.limit, s.draw))
        key = np.where(running_N[:, None], s.key, np.uint32(0))
        # What idle rows write lands behind what they hold.
        return Running(running_N, token, position, s.held.astype(np.int32), drawn, limit, key, draw,
                       of_running(s.temperature), of_running(s.top_p, 1), of_running(s.likely))  # fmt: skip

    def _decode(self, most_steps: int) -> None:
        rows = self._running()
        # While others wait, a call ends when an eighth of the rows that it began with is done.
        running = int(rows.running.sum())
        until = Until(most_steps, running - max(1, running // 8) if self._waiting else 0)
        self._cache, drawn = self._programs.decode(self._weights.decode, self._cache, rows, until)
        likely: Any = jax.device_get(drawn[2:4]) if rows.likely.any() else None
        drawn = jax.device_get(drawn._replace(likely=None, likely_logprobs=None))
        self._count(drawn)
        at = np.flatnonzero(rows.running)
        new = drawn.new[at]
        counts, tokens, logprobs = new.sum(axis=(1, 2)), drawn.tokens[at][new], drawn.logprobs[at][new]
        self._slots.drew(at, counts, tokens)
        ends = np.cumsum(counts).tolist()
        parts = [slice(start, end) for start, end in zip([0, *ends], ends)]
        told = [Likely(*(x[n][drawn.new[n]] for x in likely)) if rows.likely[n] else None for n in at]
        ran = [(slot, slot.work, tokens[part], logprobs[part], of)
               for slot, part, of in zip(self._slots.where(rows.running), parts, told, strict=True)]  # fmt: skip
        for _, work, tokens, logprobs, _ in ran:
            work.add(tokens, logprobs, self.version)
        for slot, work, tokens, logprobs, told in ran:  # only now, as callbacks may submit and abort
            if work.on_tokens is not None:
                work.on_tokens(tokens, logprobs, told)
            if not drawn.running[slot.number] and slot.work is work:
                self._end(slot, "stop" if work.tokens[-1] in self.sampling.stop else "length")

    def _count(self, drawn: Drawn) -> None:
        counts, K = self.counts, self.settings.drafts
        counts.calls += 1
        counts.places += int(drawn.new.any(axis=(0, 2)).sum()) * len(self._slots.all)
        counts.drawn += int(drawn.new.sum())
        counts.passes += int(drawn.new.any(axis=2).sum())
        judged_NIK = drawn.new[..., :K]
        counts.reached += judged_NIK.sum(axis=(0, 1))
        counts.accepted += (judged_NIK & (np.arange(K) < drawn.kept[..., None])).sum(axis=(0, 1))


def _finished(work: Work, reason: Reason) -> Completion:
    completion = work.completion(reason)
    if work.on_done is not None:
        work.on_done(completion)
    return completion

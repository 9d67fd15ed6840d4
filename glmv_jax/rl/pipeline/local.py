"""The parts of the pipeline on one machine: prompts of the recipe, `inference.Sampler` as engine, rules as graders.

The sampler answers some prompts at a time, each with its whole group, and cannot be stopped: what is aborted before it
began is given back as it was, what runs comes when it is done. New weights count from the next call on.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from glmv_jax.inference.sampler import Prompts as Asked
from glmv_jax.inference.sampler import Sampler
from glmv_jax.rl.integrity import check_handed, check_prompt, handed, seen
from glmv_jax.rl.pipeline.group import Group
from glmv_jax.rl.pipeline.protocols import Completion, Drawn, GradeAnswer, OnDone, Prompt, Request
from glmv_jax.rl.pipeline.together import Together
from glmv_jax.rl.rewards.grade import Grade
from glmv_jax.rl.rollout import Rollout, heard, versions
from glmv_jax.typing import Batch, Params

if TYPE_CHECKING:
    from glmv_jax.rl.rewards import Answered

log = logging.getLogger(__name__)


class Rows:
    """`Prompts` from random access to prompt batches of one row each (`rl.prompts.prompt_rows`), in their order.

    kept: rows that are held; others are made again when they are asked for.
    """

    def __init__(self, rows: Sequence[Batch], kept: int = 1024) -> None:
        self._drawn = 0
        self.row: Callable[[int], Batch] = functools.lru_cache(maxsize=kept)(rows.__getitem__)

    def draw(self) -> Prompt:
        uid, self._drawn = self._drawn, self._drawn + 1
        return Prompt(uid, uid, self.row(uid)["samples"][0].source)

    def learn(self, groups: Sequence[Group]) -> None:
        """Nothing: the order is fixed."""

    def get_state(self) -> int:
        return self._drawn

    def set_state(self, state: int) -> None:
        self._drawn = state

    def batch(self, keys: Sequence[int], size: int | None = None) -> Batch:
        """One prompt batch of these rows; with `size`, of so many, the last of them without a prompt."""
        rows = [self.row(key) for key in keys]
        lists = ("samples", "hashes")
        arrays = [name for name in rows[0] if name not in lists]
        empty = {name: np.zeros_like(rows[0][name]) for name in arrays}
        padded = rows + [empty] * ((size or len(rows)) - len(rows))
        batch = {name: np.concatenate([row[name] for row in padded]) for name in arrays}
        return batch | {name: [row[name][0] for row in rows] for name in lists}


class SamplerEngine:
    """An `Engine` that runs a sampler in a thread of its own.

    prompts: at a time, at most; each with `sampler.group` answers.   key: of all random numbers. The first call
    at version v draws with fold_in(key, v), as a synchronous step does, the j-th after it with that folded with j.
    one_of_many: others draw with this key too; then it is folded with what is asked as well.
    """

    def __init__(
        self, sampler: Sampler, rows: Rows | Any, prompts: int, key: jax.Array, tokenizer: Any,
        one_of_many: bool = False,
    ) -> None:  # fmt: skip
        self._sampler, self._rows, self._prompts, self._key, self._tokenizer = sampler, rows, prompts, key, tokenizer
        self._one_of_many = one_of_many
        self._params: Params | Any = None  # None before the first
        self._version = self._calls = 0
        self._new: list[tuple[Request, OnDone]] = []
        self._waiting: list[tuple[Request, OnDone]] = []
        self._ring, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._serve, name="sampler", daemon=True)
        self._thread.start()

    def set_params(self, params: Params, version: int) -> None:
        """Weights of the calls to come; they are kept, so they must not be given away to a training step."""
        with self._ring:
            self._params, self._version, self._calls = params, version, 0

    def submit(self, request: Request, on_done: OnDone) -> None:
        if not self._new:  # what is asked for at one moment goes into one call
            asyncio.get_running_loop().call_soon(self._hand_over)
        self._new.append((request, on_done))

    def abort(self, id: int) -> None:
        with self._ring:
            found = [entry for entry in (*self._new, *self._waiting) if entry[0].id == id]
            for entries in (self._new, self._waiting):
                entries[:] = [entry for entry in entries if entry[0].id != id]
        for request, on_done in found:
            on_done(Completion(request.prefix or nothing(), "aborted"))

    def close(self) -> None:
        """Ends the thread when its call is over."""
        with self._ring:
            self._closed = True
            self._ring.notify()
        self._thread.join()

    def _hand_over(self) -> None:
        with self._ring:
            self._waiting += self._new
            self._new.clear()
            self._ring.notify()

    def _serve(self) -> None:
        while True:
            with self._ring:
                self._ring.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                uids = list(dict.fromkeys(request.prompt.uid for request, _ in self._waiting))[: self._prompts]
                asked = [entry for entry in self._waiting if entry[0].prompt.uid in uids]
                self._waiting = [entry for entry in self._waiting if entry[0].prompt.uid not in uids]
                params, version, call = self._params, self._version, self._calls
                self._calls += 1
            try:
                done = self._sample([request for request, _ in asked], params, version, call)
            except Exception as error:
                log.exception("sampling of %d answers failed", len(asked))
                done = [Completion(nothing(), "failed", {"error": f"{type(error).__name__}: {error}"})] * len(asked)
            for (_, on_done), completion in zip(asked, done):
                on_done(completion)

    def _sample(self, requests: Sequence[Request], params: Params, version: int, call: int) -> list[Completion]:
        keys = list(dict.fromkeys(request.prompt.key for request in requests))
        batch = self._rows.batch(keys, self._prompts)
        key = jax.random.fold_in(self._key, version)
        if self._one_of_many:
            asked = ",".join(f"{request.prompt.uid}/{request.attempt}" for request in requests)
            key = jax.random.fold_in(key, zlib.crc32(asked.encode()))
        out = jax.device_get(self._sampler(params, Asked.of(batch), jax.random.fold_in(key, call) if call else key))
        done, told = [], [_handed(batch, row) for row in range(len(keys))]
        for request in requests:
            row = keys.index(request.prompt.key)
            n = row * self._sampler.group + request.member
            ids = out.tokens[n, : out.lengths[n]]
            sampling = self._sampler.sampling
            drawn = Drawn(ids, out.logprobs[n, : len(ids)], versions(sampling, ids, version))
            text = heard(sampling, ids, self._tokenizer)
            facts = {"id": batch["samples"][row].id, "text": text, **told[row]}
            done.append(Completion(drawn, "stop" if out.finished[n] else "length", facts))
        return done


def _handed(batch: Batch, row: int) -> dict[str, str]:
    length = batch["length"][row]
    vision = {name: batch[name][row] for name in ("patches", "yx", "frame")}
    return handed(batch["tokens"][row][:length], seen(batch["image_row"][row][:length], vision))


def nothing() -> Drawn:
    """No token."""
    return Drawn(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32))


def rule_grader(rows: Rows | Any, verifiers: Mapping[str, Any]) -> GradeAnswer:
    """Grades the text of an answer by the verifier of its source, in a thread."""
    from glmv_jax.rl.rewards import score

    async def grade(request: Request, completion: Completion) -> Grade:
        sample = rows.row(request.prompt.key)["samples"][0]
        return (await asyncio.to_thread(score, [sample], [completion.facts["text"]], verifiers))[0]

    return grade


def system_grader(rows: Rows | Any, system: Any, size: int) -> GradeAnswer:
    """Grades by a `rewards.system.RewardSystem`; where it compares answers, all `size` of a group together."""
    together = Together(lambda answers: system.grade_group([answered(rows, *answer) for answer in answers]), size)

    async def grade(request: Request, completion: Completion) -> Grade:
        if system.needs_group(request.prompt.source):
            return await together(request, completion)
        return await system.grade(answered(rows, request, completion))

    return grade


def answered(rows: Rows | Any, request: Request, completion: Completion) -> Answered:
    """The answer to a question as a reward system takes it."""
    from glmv_jax.rl.rewards import Answered

    return Answered(rows.row(request.prompt.key)["samples"][0], completion.facts["text"])


def rollouts(groups: Sequence[Group], rows: Rows | Any) -> tuple[list[Rollout], Batch]:
    """The records of complete groups, group by group, and the prompt batch that their rows count in.

    ValueError: an answer was drawn from another prompt than the batch has, or from other images.
    """
    batch = rows.batch([group.prompt.key for group in groups])
    records = []
    for row, group in enumerate(groups):
        sample, asked = batch["samples"][row], np.array(batch["tokens"][row][: batch["length"][row]])
        wanted = handed(asked, check_prompt(batch, row))
        for member in group.members:
            answer = member.answer
            check_handed(sample.id, answer.facts, wanted)
            records.append(
                Rollout(
                    id=sample.id, source=sample.source, row=row,
                    prompt=asked, answer=answer.drawn.tokens,
                    logprobs=answer.drawn.logprobs, text=answer.facts["text"], grade=member.grade,
                    truncated=answer.reason != "stop", image_hash=wanted["images"],
                    versions=answer.drawn.versions, sample=sample,
                )
            )  # fmt: skip
    return records, batch

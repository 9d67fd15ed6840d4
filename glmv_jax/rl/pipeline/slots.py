"""The inference engine as the pipeline's: answers come and go one by one, aborted ones go on from what they had."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np

from glmv_jax.data.hashes import image_hash
from glmv_jax.inference import requests, thinking
from glmv_jax.inference.front import Front, Ticket
from glmv_jax.rl.integrity import handed
from glmv_jax.rl.pipeline.local import Rows, nothing
from glmv_jax.rl.pipeline.protocols import Completion, Drawn, OnDone, Request
from glmv_jax.rl.rollout import heard
from glmv_jax.typing import Params


class SlotEngine:
    """An `Engine` over `inference.front.Front`.

    make: (params, version) -> the front; called with the first weights.   rows: where prompts are found.   seed: of all
    random numbers: an answer depends on (seed, uid, attempt, member), and on the weights that draw it.
    limits: tokens of an answer by source, where they are not the engine's.
    """

    def __init__(
        self, make: Callable[[Params, int], Front], rows: Rows | Any, seed: int, tokenizer: Any,
        limits: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self._make, self._rows, self._seed, self._tokenizer, self._limits = make, rows, seed, tokenizer, limits or {}
        self._front: Front | Any = None  # None before the first weights
        self._tickets: dict[int, Ticket] = {}

    def set_params(self, params: Params, version: int) -> Future | None:
        """Of all tokens drawn from then on; rows that run go on. The future is done when the engine has its copy."""
        if self._front is not None:
            return self._front.set_params(params, version)
        self._front = self._make(params, version)
        return None

    def submit(self, request: Request, on_done: OnDone) -> None:
        prefix, begun = request.prefix, None
        if prefix is not None and len(prefix):
            begun = requests.Completion(prefix.tokens, prefix.logprobs, prefix.versions, "aborted")
        row = self._rows.row(request.prompt.key)
        prompt = requests.Prompt.of_row(row, 0)
        images = ",".join(image_hash(picture.patches, picture.yx) for picture in prompt.pictures)
        facts = {"id": row["samples"][0].id, **handed(prompt.tokens, images)}
        whole = requests.Request(
            prompt, seed=seed_of(self._seed, request), draw=request.member, begun=begun,
            max_new_tokens=self._limits.get(row["samples"][0].source),
        )  # fmt: skip
        self._ask(request, whole, thinking.first(whole, self._front.engine.sampling), facts, on_done)

    def _ask(
        self, request: Request, whole: requests.Request, asked: requests.Request, facts: dict[str, str],
        on_done: OnDone,
    ) -> None:  # fmt: skip
        self._tickets[request.id] = ticket = self._front.submit(asked)
        ticket.done.add_done_callback(lambda done: self._ended(request, whole, done, facts, on_done))

    def abort(self, id: int) -> None:
        if (ticket := self._tickets.get(id)) is not None:
            ticket.abort()

    def close(self) -> None:
        if self._front is not None:
            self._front.close()

    def _ended(
        self, request: Request, whole: requests.Request, done: Future, facts: dict[str, str], on_done: OnDone
    ) -> None:
        self._tickets.pop(request.id, None)
        if (error := done.exception()) is not None:
            on_done(Completion(nothing(), "failed", {"error": f"{type(error).__name__}: {error}"}))
            return
        got, sampling = done.result(), self._front.engine.sampling
        if (more := thinking.then(whole, got, sampling)) is not None:
            self._ask(request, more, more, facts, on_done)
            return
        text = heard(sampling, got.tokens, self._tokenizer)
        drawn = Drawn(np.asarray(got.tokens), np.asarray(got.logprobs), np.asarray(got.versions))
        on_done(Completion(drawn, got.reason, {**facts, "text": text}))


def seed_of(seed: int, request: Request) -> int:
    """31 bits from the run's seed, the prompt and the attempt."""
    facts = f"{seed}/{request.prompt.uid}/{request.attempt}".encode()
    return int.from_bytes(hashlib.blake2b(facts, digest_size=4).digest(), "big") >> 1

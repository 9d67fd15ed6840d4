"""Policies for `play.play`: one that says what it is told to, one that draws from a model turn by turn, one that has
an engine draw."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import jax

from glmv_jax.data.building import Document
from glmv_jax.data.packing import collate
from glmv_jax.inference.sampler import Prompts, Sampler
from glmv_jax.rl.gym import Action
from glmv_jax.rl.play import Policy
from glmv_jax.rl.transcript import Transcript, Turn
from glmv_jax.typing import Params


def scripted(choose: Callable[[], Action]) -> Policy:
    """Says what `choose` gives, one action a turn, as the ids a model would have drawn for it."""

    async def policy(transcript: Transcript, room: int) -> Turn:
        return Turn.of(transcript.form.spoken(choose()))

    return policy


def sampled(sampler: Sampler, params: Params, key: jax.Array, *, tokens: int, patches: int) -> Policy:
    """Draws each turn of one episode with `sampler` (of group 1) from the whole conversation so far.

    Every turn reads all of the conversation again: right for tests and small models, an engine with slots does better.
    tokens, patches: of the row a conversation is padded to; `Limits` should have the same.
    """

    async def policy(transcript: Transcript, room: int) -> Turn:
        rows = collate([transcript.document()], tokens, patches, transcript.form.patcher.channels, [""])
        turn_key = jax.random.fold_in(key, transcript.turns)
        out = jax.device_get(sampler(params, Prompts.of(rows), turn_key))
        length = int(out.lengths[0])
        return Turn.of(out.tokens[0, :length], out.logprobs[0, :length])

    return policy


def served(complete: Callable[[Document, int, int], Awaitable[Any]]) -> Policy:
    """Has an engine draw: `complete` of (the conversation so far, tokens that there is room for, number of the turn)
    gives what has `tokens`, `logprobs` and `versions`, as a completion of `inference.engine` does."""

    async def policy(transcript: Transcript, room: int) -> Turn:
        answer = await complete(transcript.document(), room, transcript.turns)
        return Turn.of(answer.tokens, answer.logprobs, answer.versions)

    return policy

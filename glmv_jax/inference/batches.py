"""Many answers at once of an engine that nobody else asks; and the same as a `Sampler`: the same call, the same
answers."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from glmv_jax.inference import thinking
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.requests import Completion, Prompt, Request
from glmv_jax.inference.sampler import Generated, Prompts, Sampling
from glmv_jax.typing import Params


def complete(
    engine: Engine, params: Params, requests: Iterable[Request], sampling: Sampling | None = None
) -> list[Completion]:
    """All of these answers, in their order. Nobody else may use the engine meanwhile; it keeps no parameters, and
    `params` must not be given away before this returns.

    sampling: whose `think` counts; None: the engine's. Raises UserError as `Engine.submit`.
    """
    engine.set_params(params, engine.version + 1, copy=False)
    sampling, done = sampling or engine.sampling, {}
    rest: collections.deque[tuple[int, Request]] = collections.deque()

    def ended(n: int, request: Request, got: Completion) -> None:
        if (more := thinking.then(request, got, sampling)) is None:
            done[n] = got
        else:  # not at once, as the queue may be full
            rest.append((n, more))

    def submit(n: int, request: Request, asked: Request) -> None:
        while engine.waiting == engine.settings.queue:
            engine.step()
        engine.submit(asked, functools.partial(ended, n, request))

    for n, request in enumerate(requests):
        submit(n, request, thinking.first(request, sampling))
    engine.run()
    while rest:
        while rest:
            n, request = rest.popleft()
            submit(n, request, request)
        engine.run()
    engine.release()
    return [done[n] for n in range(len(done))]


class EngineSampler:
    """Wherever a `Sampler` is called (rollouts): its rows need not fit the engine's slots, rows that are done do not
    wait for the longest, and some may be longer than others.

    sampling: how answers are drawn in place of the engine's own way, whose tokens that stop or are suppressed it has.
    """

    def __init__(self, engine: Engine, group: int = 1, sampling: Sampling | None = None) -> None:
        self.engine, self.sampling, self.group = engine, sampling or engine.sampling, group

    @property
    def traces(self) -> int:
        return self.engine.traces

    def __call__(
        self, params: Params, prompts: Prompts, key: jax.Array, limits: Sequence[int] | None = None
    ) -> Generated:
        """As `Sampler`, in NumPy. key: of JAX's default kind. limits: tokens of an answer to each prompt, in place of
        those of `sampling`. Raises UserError as `Engine.submit`."""
        s, G, B = self.sampling, self.group, len(prompts.length)
        limits = [s.max_new_tokens] * B if limits is None else [*limits, *[1] * (B - len(limits))]
        seed = int.from_bytes(np.asarray(jax.random.key_data(key), ">u4").tobytes(), "big")
        N, T = B * G, max(limits)
        own: Any = dict(temperature=s.temperature, top_p=s.top_p)
        asked = {row * G + g: Request(prompt, seed, row * G + g, max_new_tokens=limits[row], **own)
                 for row, prompt in enumerate(_rows(prompts)) if prompt is not None for g in range(G)}  # fmt: skip
        out = Generated(np.full((N, T), s.pad, np.int32), np.zeros((N, T), np.float32), np.zeros(N, np.int32),
                        np.zeros(N, bool))  # fmt: skip
        for n, completion in zip(asked, complete(self.engine, params, asked.values(), s)):
            length = len(completion.tokens)
            out.tokens[n, :length], out.logprobs[n, :length] = completion.tokens, completion.logprobs
            out.lengths[n], out.finished[n] = length, completion.reason == "stop"
        return out


def _rows(prompts: Prompts) -> list[Prompt | None]:
    """The prompts of a batch; None for a row that only fills it."""
    host = jax.device_get(prompts)
    text = {name: getattr(host, name) for name in ("tokens", "positions", "image_row", "length")}
    none = np.zeros((len(host.length), 0), np.int32)
    vision = {"patches": none, "yx": none, "frame": none} if host.vision is None else host.vision._asdict()
    return [Prompt.of_row(text | vision, row) if n else None for row, n in enumerate(host.length)]

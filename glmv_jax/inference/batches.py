"""An engine in place of a `Sampler`: the same call, the same answers, for batches of prompts."""

from __future__ import annotations

import functools

import jax
import numpy as np

from glmv_jax.inference.engine import Engine
from glmv_jax.inference.requests import Completion, Prompt, Request
from glmv_jax.inference.sampler import Generated, Prompts
from glmv_jax.typing import Params


class EngineSampler:
    """Wherever a `Sampler` is called (rollouts, evaluation): its rows need not fit the engine's slots, and rows that
    are done do not wait for the longest. Nobody else may use the engine meanwhile."""

    def __init__(self, engine: Engine, group: int = 1) -> None:
        self.engine, self.sampling, self.group = engine, engine.sampling, group

    @property
    def traces(self) -> int:
        return self.engine.traces

    def __call__(self, params: Params, prompts: Prompts, key: jax.Array) -> Generated:
        """As `Sampler`, in NumPy. key: of JAX's default kind. Raises UserError as `Engine.submit`."""
        engine, pad = self.engine, self.sampling.pad
        engine.set_params(params, engine.version + 1)
        seed = int.from_bytes(np.asarray(jax.random.key_data(key), ">u4").tobytes(), "big")
        N, T = len(prompts.length) * self.group, self.sampling.max_new_tokens
        out = Generated(np.full((N, T), pad, np.int32), np.zeros((N, T), np.float32), np.zeros(N, np.int32),
                        np.zeros(N, bool))  # fmt: skip
        for row, prompt in enumerate(_rows(prompts)):
            for n in range(row * self.group, (row + 1) * self.group) if prompt is not None else ():
                while engine.waiting == engine.settings.queue:
                    engine.step()
                engine.submit(Request(prompt, seed, n), functools.partial(_put, out, n))
        engine.run()
        return out


def _rows(prompts: Prompts) -> list[Prompt | None]:
    """The prompts of a batch; None for a row that only fills it."""
    host = jax.device_get(prompts)
    text = {name: getattr(host, name) for name in ("tokens", "positions", "image_row", "length")}
    none = np.zeros((len(host.length), 0), np.int32)
    vision = {"patches": none, "yx": none, "frame": none} if host.vision is None else host.vision._asdict()
    return [Prompt.of_row(text | vision, row) if n else None for row, n in enumerate(host.length)]


def _put(out: Generated, n: int, completion: Completion) -> None:
    length = len(completion.tokens)
    out.tokens[n, :length], out.logprobs[n, :length] = completion.tokens, completion.logprobs
    out.lengths[n], out.finished[n] = length, completion.reason == "stop"

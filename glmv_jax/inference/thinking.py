"""Answers that think no longer than they may (`Sampling.think`), as requests to the engine: their thinking first, then
the answer behind it, whose end of thinking is put there where none was drawn (force answering)."""

from __future__ import annotations

import dataclasses

from glmv_jax.inference.requests import Completion, Request
from glmv_jax.inference.sampler import Sampling


def first(request: Request, sampling: Sampling) -> Request:
    """What is asked of the engine for this: its thinking alone, unless there is no limit to that or it is over."""
    begun = 0 if request.begun is None else len(request.begun.tokens)
    return dataclasses.replace(request, max_new_tokens=sampling.think) if begun < sampling.think else request


def then(request: Request, got: Completion, sampling: Sampling) -> Request | None:
    """What is asked next of the request that `first` was given; None where `got` is the answer, or an aborted one."""
    if not sampling.think or got.reason != "length" or len(got.tokens) != sampling.think:
        return None
    ended = () if sampling.close in got.tokens else (sampling.close,)
    return dataclasses.replace(request, begun=Completion.forced(ended, after=got))

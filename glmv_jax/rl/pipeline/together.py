"""Rewards that compare the answers of a group (RVPO): each answer's verdict waits for the last one to come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from glmv_jax.rl.pipeline.protocols import Completion, Request

if TYPE_CHECKING:
    from glmv_jax.rl.rewards.grade import Grade

Answer: TypeAlias = tuple[Request, Completion]


class Together:
    """A `GradeAnswer` made of a function of whole groups.

    compare: the answers of a group by member -> as many grades. size: answers of a group. An answer that comes twice
    (it was drawn again) counts as it came last.
    """

    def __init__(self, compare: Callable[[Sequence[Answer]], Awaitable[Sequence[Grade]]], size: int) -> None:
        self._compare, self._size = compare, size
        self._groups: dict[int, tuple[dict[int, Answer], asyncio.Future[Sequence[Grade]]]] = {}

    async def __call__(self, request: Request, completion: Completion) -> Grade:
        uid = request.prompt.uid
        answers, verdict = self._groups.setdefault(uid, ({}, asyncio.get_running_loop().create_future()))
        answers[request.member] = request, completion
        if len(answers) == self._size:
            del self._groups[uid]  # what comes from now on belongs to another round
            try:
                grades = await self._compare([answers[i] for i in range(self._size)])
                verdict.set_result(grades)
            except BaseException as error:
                verdict.cancel() if isinstance(error, asyncio.CancelledError) else verdict.set_exception(error)
        return (await asyncio.shield(verdict))[request.member]

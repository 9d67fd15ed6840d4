"""Rewards by comparison inside a group (UI2Code^N, arXiv 2511.08195, section 2.3, Algorithm 1: RVPO).

Pictures that were rendered from code are told apart better than graded: a judge who gives most of them 0.8 teaches
nothing, one who says which of two is closer teaches all of it. With the scores (S_i, S_j) that a comparator gives i and
j in one call, for i in the pool of N answers to one task:

    R_i = -1                                                       it could not be rendered
    R_i = 0                                                        polishing made it worse than it was before
    R_i = 1 + sum over the others j in the pool of ([S_i > S_j] + [S_i = S_j] / 2)      all others: the pool

The report's equation 9 has neither the 1 nor the ties, and its appendix A rewards drafts by their score in [0, 1] and
polishing by whether it is better than before, without a pool: `form` chooses. Advantages are those of GRPO on R.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from glmv_jax.config import nearest
from glmv_jax.typing import UserError

FORMS = ("algorithm1", "equation9", "drafting", "polishing")
BEFORE = -1  # the version that is polished, as one of the two that are compared

# The scores of two answers of a group by number (or BEFORE), or None where there was no verdict.
Compare: TypeAlias = Callable[[int, int], Awaitable[tuple[float, float] | None]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Rewards by answer, and by answer whether a comparison that it was in failed."""

    rewards: list[float]
    unsure: list[bool]


def lowest(form: str) -> float:
    """What an answer is worth that could not be rendered."""
    return -1.0 if form in ("algorithm1", "equation9") else 0.0


async def rvpo(
    rendered: Sequence[bool], compare: Compare, *, form: str = "algorithm1", polish: bool = False
) -> Outcome:
    """The rewards of a group; all comparisons run at the same time.

    rendered: by answer, whether there is anything to compare.
    compare:  a comparison of every pair once, the sides taking turns so that a comparator that prefers one favours no
              answer; in "drafting" each answer with itself, of which the first score counts.
    polish:   every answer is first compared with the version BEFORE it (always so in "polishing").

    A comparison without a verdict gives neither side anything: an answer that breaks the comparator gains nothing by
    it, and costs all others the same.
    """
    if form not in FORMS:
        raise UserError(f"no form {form!r} of RVPO{nearest(form, FORMS)}")
    unsure = [False] * len(rendered)

    async def scores(i: int, j: int) -> tuple[float, float] | None:
        found = await (compare(j, i) if (i + j) % 2 else compare(i, j))
        if found is None:
            for k in (i, j):
                if k != BEFORE:
                    unsure[k] = True
            return None
        return found[::-1] if (i + j) % 2 else found

    alive = [i for i, whole in enumerate(rendered) if whole]
    rewards = [lowest(form)] * len(rendered)
    if form == "drafting":
        for i, found in zip(alive, await asyncio.gather(*(scores(i, i) for i in alive))):
            rewards[i] = found[0] if found else 0.0
        return Outcome(rewards, unsure)

    pool = alive
    if polish or form == "polishing":
        before = await asyncio.gather(*(scores(i, BEFORE) for i in alive))
        for i, found in zip(alive, before):
            rewards[i] = float(form == "polishing" and found is not None and found[0] > found[1])
        pool = [i for i, found in zip(alive, before) if found is not None and found[0] >= found[1]]
    if form == "polishing":
        return Outcome(rewards, unsure)

    pairs = list(itertools.combinations(pool, 2))
    for i in pool:
        rewards[i] = 1.0 if form == "algorithm1" else 0.0
    for (i, j), found in zip(pairs, await asyncio.gather(*(scores(i, j) for i, j in pairs))):
        if found is not None:
            tie = 0.5 if form == "algorithm1" else 0.0
            rewards[i] += 1.0 if found[0] > found[1] else tie * (found[0] == found[1])
            rewards[j] += 1.0 if found[1] > found[0] else tie * (found[0] == found[1])
    return Outcome(rewards, unsure)

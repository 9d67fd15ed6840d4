"""From the verdicts of several verifiers on one answer to one grade: which are asked, and how they add up."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeAlias

from glmv_jax.config import nearest
from glmv_jax.rl.rewards.grade import MIN_REWARD, Gradable, Grade
from glmv_jax.typing import UserError

Part: TypeAlias = Callable[[Gradable], Awaitable[Grade]]
HOW = ("sum", "min", "first")


@dataclasses.dataclass(frozen=True)
class Combination:
    """How the parts of a source's reward make one grade.

    gate:    parts that must call the answer correct before any other is asked; else it gets `lowest`. In order.
    how:     of the parts that are no gates: "sum", weighted; "min", the smallest; "first", in `order`, the first that
             calls the answer correct, or else the last. "first" does not ask the parts behind: a judge is asked only
             where a rule found nothing.
    weights: of "sum", adding up to 1; () for equal ones.
    manner:  parts that say nothing about whether the answer is right (style): accuracy leaves them out.
    """

    how: str = "sum"
    gate: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    weights: tuple[tuple[str, float], ...] = ()
    lowest: float = MIN_REWARD
    manner: frozenset[str] = frozenset()

    def check(self, source: str, parts: Sequence[str]) -> None:
        """UserError when names do not fit the parts."""
        if self.how not in HOW:
            raise UserError(f"rewards of {source}: no way {self.how!r} to combine{nearest(self.how, HOW)}")
        weights = dict(self.weights)
        for name in (*self.gate, *self.order, *weights):
            if name not in parts:
                raise UserError(f"rewards of {source}: no part {name!r}{nearest(name, parts)}")
        rest = [name for name in parts if name not in self.gate]
        if parts and not rest:
            raise UserError(f"rewards of {source}: every part is a gate; one has to give the reward")
        if self.how == "first" and sorted(self.order) != sorted(rest):
            raise UserError(f"rewards of {source}: the order of 'first' has to name each of {', '.join(sorted(rest))}")
        if weights and (
            self.how != "sum"
            or set(weights) != set(rest)
            or abs(sum(weights.values()) - 1.0) > 1e-6
            or min(weights.values()) < 0
        ):
            raise UserError(
                f"rewards of {source}: weights {weights} have to be of how='sum', for each of "
                f"{', '.join(sorted(rest))}, not negative, and add up to 1"
            )

    async def grade(self, parts: Mapping[str, Part], answered: Gradable) -> Grade:
        """The grade of an answer. A part that fails makes the whole fail: what is left is not what was asked for."""
        found: dict[str, Grade] = {}
        for name in self.gate:
            found[name] = await parts[name](answered)
            if found[name].failed or not found[name].correct:
                return self._refused(found)
        rest = [name for name in parts if name not in self.gate]
        if self.how == "first":
            for name in self.order:
                found[name] = await parts[name](answered)
                if found[name].failed or found[name].correct:
                    break
            rest = [name]
        else:
            found.update(zip(rest, await asyncio.gather(*(parts[name](answered) for name in rest))))
        if any(grade.failed for grade in found.values()):
            return self._refused(found)
        if len(found) == 1 and len(parts) == 1:
            return next(iter(found.values()))
        rewards = {name: found[name].reward for name in rest}
        weights = dict(self.weights) or dict.fromkeys(rest, 1.0 / len(rest))
        reward = min(rewards.values()) if self.how != "sum" else sum(weights[name] * rewards[name] for name in rest)
        judged = [name for name in rest if name not in self.manner] or rest
        correct = all(found[name].correct for name in judged)
        return Grade(reward, correct, components(found), flags(found))

    def _refused(self, found: Mapping[str, Grade]) -> Grade:
        return Grade(self.lowest, False, components(found), flags(found))


def components(found: Mapping[str, Grade]) -> dict[str, float]:
    """The rewards of parts by name, and what each consists of as "part/component"; parts that failed said nothing.

    "format" stands by itself too, the smallest of the parts that know it: metrics count well-formed answers by it.
    """
    found = {name: grade for name, grade in found.items() if not grade.failed}
    named = {name: grade.reward for name, grade in found.items()}
    for name, grade in found.items():
        named |= {f"{name}/{inner}": value for inner, value in grade.components.items() if inner != name}
    forms = [grade.components["format"] for grade in found.values() if "format" in grade.components]
    return named | ({"format": min(forms)} if forms and "format" not in named else {})


def flags(found: Mapping[str, Grade]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(flag for grade in found.values() for flag in grade.flags))

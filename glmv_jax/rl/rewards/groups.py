"""Group-level rewards: the answers to one task are rendered and compared with one another, by a judge or by a rule."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from PIL import Image

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards import rubric
from glmv_jax.rl.rewards.grade import Gradable, Grade
from glmv_jax.rl.rewards.judge import Client, JudgeError, Judging, data_uris
from glmv_jax.rl.rewards.pool import RuleError
from glmv_jax.rl.rewards.rvpo import BEFORE, rvpo


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An answer as a comparator sees it: its text, the picture it was rendered to where there is a renderer, and the
    verdict of the environment it was given in, where there is one."""

    text: str
    picture: Image.Image | None = None
    reward: float | None = None


# (text, sample) -> the picture, or None when the text is nothing that can be rendered
Render: TypeAlias = Callable[[str, Sample], Awaitable[Image.Image | None]]
# (sample, A, B) -> their scores, higher is better; TimeoutError, RuleError or JudgeError when there are none. The
# sample is None where an environment has none, whose answers only a rule compares (`stages.rl_grading` sees to it).
Comparator: TypeAlias = Callable[[Any, Candidate, Candidate], Awaitable[tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """RVPO for one data source, see `rvpo`.

    render: None where texts themselves are compared.   polish: the version before is the sample's meta["previous"].
    """

    compare: Comparator
    render: Render | None = None
    form: str = "algorithm1"
    polish: bool = False

    async def grades(self, answered: Sequence[Gradable], grades: Sequence[Grade]) -> list[Grade]:
        """The grades of a group, with their rewards replaced by those of the comparison.

        An answer that cannot be rendered, or whose grade failed, is not compared and never correct. Adds the component
        "render" (1 or 0) and the flags "no_render", and "no_comparison" where one that the answer was in failed.
        """
        sample = answered[0].sample
        candidates: dict[int, Candidate | None] = dict(
            enumerate(await asyncio.gather(*(self._candidate(a.text, sample, a.reward) for a in answered)))
        )
        if self.polish or self.form == "polishing":
            if sample is None:
                raise ValueError(f"answers of {answered[0].source!r} have no sample whose version before is polished")
            candidates[BEFORE] = await self._candidate(str(sample.meta["previous"]), sample)
            if candidates[BEFORE] is None:
                raise ValueError(f"sample {sample.id}: the version to be polished cannot be rendered")
        rendered = [candidates[i] is not None and not grade.failed for i, grade in enumerate(grades)]

        async def compare(i: int, j: int) -> tuple[float, float] | None:
            one, other = candidates[i], candidates[j]
            assert one is not None and other is not None  # only rendered ones meet
            try:
                return await self.compare(sample, one, other)
            except (TimeoutError, RuleError, JudgeError):
                return None

        outcome = await rvpo(rendered, compare, form=self.form, polish=self.polish)
        return [
            Grade(
                reward, grade.correct and whole, {**grade.components, "render": float(whole)},
                (*grade.flags, *["no_render"] * (not whole), *["no_comparison"] * unsure),
            )
            for grade, reward, whole, unsure in zip(grades, outcome.rewards, rendered, outcome.unsure)
        ]  # fmt: skip

    async def _candidate(self, text: str, sample: Sample | None, reward: float | None = None) -> Candidate | None:
        if self.render is None:
            return Candidate(text, reward=reward)
        if sample is None:
            raise ValueError("an answer without a sample cannot be rendered")
        try:
            picture = await self.render(text, sample)
        except (TimeoutError, RuleError):
            return None
        return None if picture is None else Candidate(text, picture, reward)


async def judged(client: Client, judging: Judging, sample: Sample, a: Candidate, b: Candidate) -> tuple[float, float]:
    """A `Comparator` that asks a model. It sees the pictures of the task, then A's and B's, or else their texts."""
    word = rubric.new_word()
    shown = [*sample.images] if judging.images else []
    texts = (a.text, b.text)
    if a.picture is not None and b.picture is not None:
        shown += [a.picture, b.picture]
        texts = ("(the last picture but one)", "(the last picture)")
    images = await asyncio.to_thread(data_uris, shown)
    messages = rubric.comparing(sample, texts, judging.rubric, judging.scale, word, images)
    of_a, of_b = await client.ask(messages, lambda reply: rubric.verdict(reply, word, judging.scale, 2))
    return of_a, of_b


async def by_rule(
    call: Callable[..., Awaitable[Any]], sample: Sample | None, a: Candidate, b: Candidate
) -> tuple[float, float]:
    """A `Comparator` by a function `(sample, A, B) -> (score, score)` that `call` runs in a worker."""
    found = await call(sample, a, b)
    try:
        first, second = (float(score) for score in found)
    except (TypeError, ValueError):
        raise RuleError(f"a comparator returned {type(found).__name__}, not two scores") from None
    if not math.isfinite(first + second):
        raise RuleError(f"a comparator returned {first} and {second}")
    return first, second

"""A prompt on its way: its answers, each asked for, drawn in part or in whole, and graded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from glmv_jax.rl.pipeline.protocols import Completion, Drawn, Prompt

if TYPE_CHECKING:
    from glmv_jax.rl.rewards.grade import Grade


@dataclasses.dataclass(eq=False)
class Member:
    """One answer of a group.

    request: id of the request that is running, and since: the engine's version when it began.
    prefix: of an aborted attempt.   answer: what came in the end, complete; grade: its verdict, None until it is there.
    attempt: times it was begun anew.   aborts, failures, dropped: how often each happened to it.
    """

    request: int | None = None
    since: int = 0
    prefix: Drawn | None = None
    answer: Completion | Any = None
    grade: Grade | Any = None
    attempt: int = 0
    aborts: int = 0
    failures: int = 0
    dropped: int = 0

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing came: it has to be asked for."""
        return self.request is None and self.answer is None

    @property
    def oldest(self) -> int | None:
        """The lowest version a token of it has or may get; None when it has not begun."""
        drawn = self.answer.drawn if self.answer is not None else self.prefix
        if drawn is not None and drawn.oldest is not None:
            return drawn.oldest
        return self.since if self.request is not None or self.answer is not None else None

    def begin_anew(self) -> None:
        """Forgets all that was drawn."""
        self.request = self.prefix = self.answer = self.grade = None
        self.attempt += 1

    def to_json(self) -> dict[str, Any]:
        """Without the request: after a restart it has to be asked for again, from its prefix. So has an episode, which
        is then played again by the tokens it has."""
        answer = self.answer if self.grade is not None else None  # one that waits for its verdict is drawn again
        prefix = self.prefix
        if self.answer is not None and self.answer.episode is not None:
            answer, prefix = None, self.answer.drawn
        return {
            "since": self.since, "attempt": self.attempt, "aborts": self.aborts, "failures": self.failures,
            "dropped": self.dropped, "prefix": None if prefix is None else prefix.to_json(),
            "answer": answer and {"drawn": answer.drawn.to_json(), "reason": answer.reason,
                                  "facts": dict(answer.facts)},
            "grade": answer and dataclasses.asdict(self.grade),
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Member:
        from glmv_jax.rl.rewards.grade import Grade

        prefix, answer, grade = value["prefix"], value["answer"], value["grade"]
        return cls(**{
            **value,
            "prefix": prefix and Drawn.from_json(prefix),
            "answer": answer and Completion(Drawn.from_json(answer["drawn"]), answer["reason"], answer["facts"]),
            "grade": grade and Grade(**{**grade, "flags": tuple(grade["flags"])}),
        })  # fmt: skip


@dataclasses.dataclass(eq=False)
class Group:
    """The answers to one prompt, which are trained on together.   trained_at: version of the policy that trains on it,
    once it is known."""

    prompt: Prompt
    members: list[Member]
    trained_at: int | None = None

    @classmethod
    def fresh(cls, prompt: Prompt, size: int) -> Group:
        return cls(prompt, [Member() for _ in range(size)])

    @property
    def complete(self) -> bool:
        return all(member.grade is not None for member in self.members)

    @property
    def oldest(self) -> int | Any:
        """The lowest version of its tokens; None when none has begun."""
        known = [v for v in (member.oldest for member in self.members) if v is not None]
        return min(known, default=None)

    @property
    def rewards(self) -> np.ndarray:
        """Of a complete group, [G] float."""
        return np.array([member.grade.reward for member in self.members])

    def prune(self, oldest: int) -> list[int]:
        """Members with a token of a version below `oldest` begin anew: which."""
        stale = [i for i, m in enumerate(self.members) if m.oldest is not None and m.oldest < oldest]
        for i in stale:
            self.members[i].begin_anew()
            self.members[i].dropped += 1
        return stale

    def to_json(self) -> dict[str, Any]:
        return {"prompt": dataclasses.asdict(self.prompt), "members": [m.to_json() for m in self.members]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Group:
        return cls(Prompt(**value["prompt"]), [Member.from_json(m) for m in value["members"]])

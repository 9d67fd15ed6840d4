"""A reinforcement-learning task: questions from a seed, a pure verifier, and proof that the verifier can be trusted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from glmv_jax.data.questions import Questions
from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards.grade import BEGIN_BOX, END_BOX, Verifier

# What no wrong answer may reach: the reward of form, and half of what a graded rule can give.
LOW = 0.5


def box(content: str) -> str:
    """Content between box tokens."""
    return BEGIN_BOX + content + END_BOX


def malformed(gold: str) -> list[str]:
    """Answers whose form is wrong, even where they hold the gold text. Their reward must be 0."""
    return [
        "",
        gold,
        box(""),
        box("  \n"),
        BEGIN_BOX + gold,
        gold + END_BOX,
        END_BOX + gold + BEGIN_BOX,
        box(gold) + box(gold),
        box(box(gold)),
        BEGIN_BOX + box(gold),
        box(gold) + END_BOX,
        box(gold + " " * 10 + "x" * 10_000),
    ]


def hedged(gold: str) -> list[str]:
    """Well-formed answers that mention the gold text or everything at once. Their reward must be low."""
    return [
        box(text)
        for text in (
            f"{gold} or not {gold}, {gold} perhaps",
            "a number between 0 and 10",
            " ".join(map(str, range(11))),
            "the correct answer",
            "nan",
            "inf",
            "1e999",
            "[[", "]]", "[[0,0,0,0]]", "[[1e999,0,nan,5]]", "[[[[[[1,1,1,1]]]]]] or " + "[[1,1]]" * 40,
        )
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of question and how its answers are graded.

    name:     the data-source tag, and the kind of question in `data.questions`.
    verifier: (answer text, sample) -> Grade.
    hacks:    contents that are wrong for a sample although a careless grader would pay for them.
    """

    name: str
    verifier: Verifier
    hacks: Callable[[Sample], Sequence[str]] = lambda sample: ()

    def source(self, split: str, seed: int) -> Questions:
        """Endless random access to the task's samples."""
        return Questions([self.name], split, seed)

    def validate(self, *, count: int = 20, split: str = "train", seed: int = 0) -> None:
        """Checks the verifier on `count` samples; raises ValueError naming the sample and the answer.

        The gold answer must get reward 1 and be correct, malformed answers 0, hedged ones and hacks at most LOW and
        never be correct; and the same answer must be graded the same twice.
        """
        source = self.source(split, seed)
        for sample in (source[i] for i in range(count)):
            gold = self.verifier(box(sample.answer), sample)
            if gold.reward != 1.0 or not gold.correct:
                raise ValueError(f"{sample.id}: the gold answer {sample.answer!r} is graded {gold}")
            bounds = [(text, 0.0) for text in malformed(sample.answer)]
            bounds += [(text, LOW) for text in hedged(sample.answer)]
            bounds += [(box(text), LOW) for text in self.hacks(sample)]
            for text, bound in bounds:
                grade = self.verifier(text, sample)
                if grade.correct or not 0.0 <= grade.reward <= bound:
                    raise ValueError(f"{sample.id}: the wrong answer {text[:80]!r} is graded {grade}")
                if grade != self.verifier(text, sample):
                    raise ValueError(f"{sample.id}: the answer {text[:80]!r} is graded differently the second time")

"""A reinforcement-learning task: questions from a seed, a pure verifier, and proof that the verifier can be trusted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from glmv_jax.data.questions import SPLITS, Questions
from glmv_jax.data.records import Sample
from glmv_jax.data.seeds import ENDLESS, generator
from glmv_jax.rl.levels import ONE, Levels, OfLevel
from glmv_jax.rl.rewards.grade import BEGIN_BOX, END_BOX, Grade, Verifier
from glmv_jax.typing import UserError

Make: TypeAlias = Callable[[np.random.Generator, str], Sample]

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


def unjudged(answer_text: str, sample: Sample) -> Grade:
    """The verifier of a task that a model grades, where none is asked: it raises."""
    raise UserError(f"{sample.source} is graded by a model and no judge is set; give the reward system one")


@dataclasses.dataclass(frozen=True)
class Made:
    """Endless random access to the samples of one generator: index i depends on (seed, split, name, i) alone.

    make: (generator, "train" or "heldout") -> sample; a function of a module, so that worker processes can take it.
    """

    name: str
    make: Make
    split: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UserError(f"split {self.split!r} of task {self.name} does not exist; use one of {', '.join(SPLITS)}")

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Sample:
        drawn = self.make(generator(self.seed, self.split, self.name, i), self.split)
        return dataclasses.replace(drawn, id=f"{self.name}/{self.split}/{i}", source=self.name)


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of question and how its answers are graded.

    name:     the data-source tag, and without `make` the kind of question in `data.questions`.
    verifier: (answer text, sample) -> Grade.
    hacks:    contents that are wrong for a sample although a careless grader would pay for them.
    make:     (generator, split) -> sample, of a task whose questions are its own; `Made` sets their id and source.
    rubric:   of a task that a model grades by the gold answer as reference: what is right, in words; "" for all others.
              Its verifier is `unjudged`, its answers are not boxed.
    missing:  why its answers cannot be graded on this machine, "" when they can.
    seconds:  that a grade may take where it starts a process, None for what is computed at once.
    levels:   how hard a sample is, for a curriculum.
    """

    name: str
    verifier: Verifier
    hacks: Callable[[Sample], Sequence[str]] = lambda sample: ()
    make: Make | None = None
    rubric: str = ""
    missing: Callable[[], str] = str
    seconds: float | None = None
    levels: Levels = ONE

    def source(self, split: str, seed: int, level: int | None = None) -> Questions | Made | OfLevel:
        """Endless random access to the task's samples, all or those of one level."""
        made = Made(self.name, self.make, split, seed) if self.make else Questions([self.name], split, seed)
        return made if level is None or self.levels.count == 1 else OfLevel(made, self.levels, level)

    def validate(self, *, count: int = 20, split: str = "train", seed: int = 0) -> None:
        """Checks the verifier on `count` samples; raises ValueError naming the sample and the answer.

        The gold answer must get reward 1 and be correct, malformed answers 0, hedged ones and hacks at most LOW and
        never be correct; and the same answer must be graded the same twice. A task that a model grades has no verifier
        to check: its samples must have a reference and no box.
        """
        source = self.source(split, seed)
        for sample in (source[i] for i in range(count)):
            if self.rubric:
                if sample.boxed or not sample.answer or BEGIN_BOX in sample.answer:
                    raise ValueError(f"{sample.id}: the reference {sample.answer!r} is empty or boxed")
                continue
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

"""What a grader returns, and the frame every rule grader stands in: one answer box, then correctness inside it.

A rule is a pure function `(content, sample) -> Score` that sees only the text between the box tokens; a verifier is
`(answer_text, sample) -> Grade`. Neither may raise on any string: a model under reinforcement learning will, sooner
or later, write every one of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias

from glmv_jax.data.records import Sample

BEGIN_BOX = "<|begin_of_box|>"
END_BOX = "<|end_of_box|>"
MIN_REWARD = 0.0
# No gold answer of words, numbers or boxes comes near this. A longer box is not an answer, and refusing it bounds the
# work of every rule. Tasks whose answers are programs or pages say a bound of their own.
MAX_CONTENT = 512
# What a grader that failed leaves behind: it took too long, raised or broke, or its reward was not a number.
FAILURES = ("timeout", "error", "nan")
MAX_PARTS, MAX_NAME = 64, 80  # components of a grade, characters of a name or a flag


class Score(NamedTuple):
    """value: how right the content is, in [0, 1]; correct: whether it counts as right in accuracy."""

    value: float
    correct: bool


WRONG = Score(0.0, False)
RIGHT = Score(1.0, True)


@dataclasses.dataclass(frozen=True)
class Grade:
    """The verdict on one answer.

    reward:     what the policy is trained on, in [0, 1]; rewards given to a group at once may lie outside.
    correct:    what accuracy and pass@k count; never true for a badly formed answer.
    components: the parts of the reward by name ("format", "score"), each in [0, 1].
    flags:      why something was refused: "no_box", "many_boxes", "empty_box", "long_box", what a part of the reward
                found, or one of FAILURES, after which the reward is the lowest.
    """

    reward: float
    correct: bool
    components: dict[str, float]
    flags: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the grader failed, whatever the answer was worth."""
        return any(flag in FAILURES for flag in self.flags)


Rule: TypeAlias = Callable[[str, Sample], Score]
Verifier: TypeAlias = Callable[[str, Sample], Grade]


def extract_box(text: str, most: int = MAX_CONTENT) -> tuple[str, str]:
    """The content of the one answer box of `text`, of up to `most` characters.

    Returns (content, flag). flag is "" when there is exactly one begin token followed by exactly one end token with
    something between them; otherwise content is "" and flag says what is wrong. Text around the box is allowed
    (reasoning may stand there); a second box is not, so an answer cannot be hedged.
    """
    begins, ends = text.count(BEGIN_BOX), text.count(END_BOX)
    if begins > 1 or ends > 1:
        return "", "many_boxes"
    start, stop = text.find(BEGIN_BOX) + len(BEGIN_BOX), text.find(END_BOX)
    if begins == 0 or ends == 0 or stop < start:
        return "", "no_box"
    content = text[start:stop].strip()
    if not content:
        return "", "empty_box"
    if len(content) > most:
        return "", "long_box"
    return content, ""


def boxed(rule: Rule, *, format_weight: float = 0.1, most: int = MAX_CONTENT) -> Verifier:
    """A verifier from a rule: reward = format * (format_weight + (1 - format_weight) * score).

    The small reward for form alone gives an untrained policy a first slope; it is the most a wrong answer can get.
    most: the longest content that the rule is shown, in characters; a longer one is badly formed.
    """
    if not 0.0 <= format_weight < 1.0:
        raise ValueError(f"format_weight={format_weight} must lie in [0, 1)")

    def verify(answer_text: str, sample: Sample) -> Grade:
        content, flag = extract_box(answer_text, most)
        if flag:
            return Grade(MIN_REWARD, False, {"format": 0.0, "score": 0.0}, (flag,))
        score = rule(content, sample)
        reward = format_weight + (1.0 - format_weight) * score.value
        return Grade(reward, score.correct, {"format": 1.0, "score": score.value})

    return verify


class Gradable(Protocol):
    """What is graded: an answer to a sample, such as `Answered` or an episode.

    sample: what was asked; None in an environment that grades for itself.
    text:   the final answer, box tokens and all.
    reward: the verdict of the environment it was given in; None where there is none.
    source: the data-source tag.
    """

    @property
    def sample(self) -> Sample | None: ...
    @property
    def text(self) -> str: ...
    @property
    def reward(self) -> float | None: ...
    @property
    def source(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Answered:
    """An answer outside of an episode, see `Gradable`. source: "" is that of the sample."""

    sample: Sample | None
    text: str
    reward: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not self.source:
            if self.sample is None:
                raise ValueError("an answer without a sample has to be given its source")
            object.__setattr__(self, "source", self.sample.source)


class BadGrade(ValueError):
    """A verifier returned what is no grade; `flag` is "nan" or "error"."""

    def __init__(self, flag: str, message: str):
        super().__init__(message)
        self.flag = flag


def failure(flag: str, lowest: float = MIN_REWARD) -> Grade:
    """The grade of an answer whose grader failed; flag: of FAILURES."""
    return Grade(lowest, False, {}, (flag,))


def _share(what: str, value: object) -> float:
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise BadGrade("error", f"{what} is {type(value).__name__}, not a number")
    number = float(value)
    if not math.isfinite(number):
        raise BadGrade("nan", f"{what} is {number}")
    if not 0.0 <= number <= 1.0:
        raise BadGrade("error", f"{what} {number} is outside [0, 1]")
    return number


def checked(result: object) -> Grade:
    """What a verifier returned, as a Grade of plain numbers and short names; BadGrade when it is none.

    It bounds what a verifier can hand on: no more than 64 components and flags, names of at most 80 characters.
    """
    if not isinstance(result, Grade):
        raise BadGrade("error", f"a verifier returned {type(result).__name__}, not a Grade")
    reward = _share("reward", result.reward)
    if not isinstance(result.components, Mapping) or not isinstance(result.flags, tuple):
        raise BadGrade("error", "components are a mapping and flags a tuple")
    if len(result.components) > MAX_PARTS or len(result.flags) > MAX_PARTS:
        raise BadGrade("error", f"more than {MAX_PARTS} components or flags")
    if not all(isinstance(name, str) and len(name) <= MAX_NAME for name in (*result.components, *result.flags)):
        raise BadGrade("error", f"names of components and flags are strings of at most {MAX_NAME} characters")
    components = {name: _share(f"component {name}", value) for name, value in result.components.items()}
    return Grade(reward, bool(result.correct), components, result.flags)

"""What a grader returns, and the frame every rule grader stands in: one answer box, then correctness inside it.

A rule is a pure function `(content, sample) -> Score` that sees only the text between the box tokens; a verifier is
`(answer_text, sample) -> Grade`. Neither may raise on any string: a model under reinforcement learning will, sooner
or later, write every one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from glmv_jax.data.records import Sample

BEGIN_BOX = "<|begin_of_box|>"
END_BOX = "<|end_of_box|>"
MIN_REWARD = 0.0
# No gold answer of words, numbers or boxes comes near this. A longer box is not an answer, and refusing it bounds the
# work of every rule. Tasks whose answers are programs or pages say a bound of their own.
MAX_CONTENT = 512


class Score(NamedTuple):
    """value: how right the content is, in [0, 1]; correct: whether it counts as right in accuracy."""

    value: float
    correct: bool


WRONG = Score(0.0, False)
RIGHT = Score(1.0, True)


@dataclasses.dataclass(frozen=True)
class Grade:
    """The verdict on one answer.

    reward:     what the policy is trained on, in [0, 1].
    correct:    what accuracy and pass@k count; never true for a badly formed answer.
    components: the parts of the reward by name ("format", "score"), each in [0, 1].
    flags:      why something was refused: "no_box", "many_boxes", "empty_box", "long_box", "error".
    """

    reward: float
    correct: bool
    components: dict[str, float]
    flags: tuple[str, ...] = ()


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

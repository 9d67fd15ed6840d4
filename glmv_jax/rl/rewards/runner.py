"""Runs verifiers over a batch of answers. A grader that fails is data: the lowest reward, a flag, a line in the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards.grade import BadGrade, Grade, Verifier, checked, failure
from glmv_jax.typing import UserError

log = logging.getLogger(__name__)


def score(samples: Sequence[Sample], answers: Sequence[str], verifiers: Mapping[str, Verifier]) -> list[Grade]:
    """One grade an answer, by the verifier of its sample's source, in this process.

    A verifier that raises, or returns a reward outside [0, 1], gives Grade(0, False, {}, ("error",)), one that returns
    no number the flag "nan", and a warning with the sample's id; the rest of the batch is not touched. The rules of
    this package are bounded in time (see MAX_CONTENT); others run in processes, see `system.RewardSystem`.
    Raises UserError for a source without a verifier, which no retry can mend.
    """
    if len(samples) != len(answers):
        raise ValueError(f"{len(samples)} samples but {len(answers)} answers")
    missing = sorted({s.source for s in samples} - set(verifiers))
    if missing:
        raise UserError(f"no verifier for data source {missing[0]!r}; known: {', '.join(sorted(verifiers))}")
    return [_one(sample, answer, verifiers[sample.source]) for sample, answer in zip(samples, answers)]


def _one(sample: Sample, answer: str, verify: Verifier) -> Grade:
    try:
        return checked(verify(answer, sample))
    except Exception as error:  # whatever a grader does wrong, the other answers of the step must be trained on
        log.warning("grader of %s failed on sample %s: %s: %s", sample.source, sample.id, type(error).__name__, error)
        return failure(error.flag if isinstance(error, BadGrade) else "error")

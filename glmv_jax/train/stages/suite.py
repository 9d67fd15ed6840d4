"""Data sets on disk as a part of a stage's evaluation: what `glmv eval --suite` measures, while training."""

from __future__ import annotations

import functools

from glmv_jax.data.faults import FaultLog
from glmv_jax.eval import datasets
from glmv_jax.train.stages.base import Stage
from glmv_jax.typing import Params, UserError


class SuiteLook:
    """Numbers of the data sets of `cfg.eval.suite`; none without a root (or the keys, which older runs lack).

    root: a folder of data sets.   datasets: only these, by name; (): all.
    short: pictures of a split in the short look, spread evenly over it; 0: none is taken then.

    Which data sets there are and that they are whole is found out by the evaluation before the first step.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage, self.config = stage, stage.cfg.eval.get("suite", {})

    @functools.cached_property
    def evaluation(self) -> datasets.Evaluation:
        """Compiled once a run."""
        towers = self.stage.as_towers()
        settings = datasets.Settings(measures=datasets.default_measures(towers))
        return datasets.Evaluation(towers, settings, FaultLog(self.stage.cfg.faults or None))

    def __call__(self, params: Params, full: bool) -> dict[str, float]:
        """zeroshot/<data set>/acc1, retrieval/<data set>/..., in stage 1 knn/<data set>: the same names each time.

        Raises: UserError when a data set cannot be evaluated.
        """
        c = self.config
        if not c.get("root", "") or not (full or c.short):
            return {}
        report = self.evaluation.folder(params, c.root, c.datasets, limit=0 if full else c.short)
        for name, reason in (report["failed"] | report["skipped"]).items():
            raise UserError(f"eval.suite: {name} cannot be evaluated: {reason}")
        return datasets.flat(report["datasets"])

"""Optimisers: parameters chosen by regex on their path, Muon or AdamW or frozen, a schedule each.

`build(plan(cfg), params, total_steps)` is what training calls; `learning_rates` and `trainable` answer the two
questions the loop has about it, and `averaged` finds the running average of the parameters in its state. `muon` and
`schedule` are there for those who compose their own.
"""

from glmv_jax.optim.ema import averaged
from glmv_jax.optim.groups import build, learning_rates, plan, trainable
from glmv_jax.optim.muon import muon, orthogonalise, scale_by_muon
from glmv_jax.optim.schedules import schedule

__all__ = [
    "averaged",
    "build",
    "learning_rates",
    "muon",
    "orthogonalise",
    "plan",
    "scale_by_muon",
    "schedule",
    "trainable",
]

"""Optimisers: parameters chosen by regex on their path, Muon or AdamW or frozen, a schedule each.

`build(cfg, params, total_steps)` is what training calls; `learning_rates` and `trainable` answer the two questions the
loop has about it. `muon` and `schedule` are there for those who compose their own.
"""

from glmv_jax.optim.groups import build, learning_rates, slash_path, slash_paths, trainable
from glmv_jax.optim.muon import muon, orthogonalise, scale_by_muon
from glmv_jax.optim.schedules import schedule

__all__ = [
    "build",
    "learning_rates",
    "muon",
    "orthogonalise",
    "scale_by_muon",
    "schedule",
    "slash_path",
    "slash_paths",
    "trainable",
]

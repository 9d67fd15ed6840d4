"""Rewards: pure graders of answers, and the runner that survives them."""

from glmv_jax.rl.rewards.grade import BEGIN_BOX, END_BOX, Grade, Score, boxed, extract_box
from glmv_jax.rl.rewards.runner import score

__all__ = ["BEGIN_BOX", "END_BOX", "Grade", "Score", "boxed", "extract_box", "score"]

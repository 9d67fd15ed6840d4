"""Rewards: verifiers of answers, the processes and judges behind them, and the system that makes one grade of it all.

`score` grades with functions of this process; `system.RewardSystem` with all that `config` describes.
"""

from glmv_jax.rl.rewards.grade import BEGIN_BOX, END_BOX, Answered, Grade, Score, boxed, extract_box
from glmv_jax.rl.rewards.runner import score

__all__ = ["BEGIN_BOX", "END_BOX", "Answered", "Grade", "Score", "boxed", "extract_box", "score"]

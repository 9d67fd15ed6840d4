"""The five stages. Each is one class that says what differs; `glmv_jax.train.loop` drives them all."""

from glmv_jax.train.stages.base import Stage

__all__ = ["Stage"]

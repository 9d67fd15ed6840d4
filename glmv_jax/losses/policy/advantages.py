"""How much better an answer is than the others to the same prompt, from their rewards."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from glmv_jax.losses.policy.basics import choice, floating

ADVANTAGES = ("grpo", "dr_grpo", "batch_std", "rloo", "reinforce++", "max_rl", "gdpo", "none")
EPS = 1e-6


def group_advantages(reward_NG: jax.Array | np.ndarray, kind: str = "grpo", eps: float = EPS) -> jax.Array:
    """Advantages of G answers to each of N prompts, relative to their group, as the package's page has them.

    A group whose rewards are all equal gets exactly 0 (a rounded mean divided by eps would not). gdpo takes components
    of rewards: `gdpo_advantages`. max_rl is for rewards that are never negative; a group with a mean of 0 gets 0.

    Args: reward_NG: [N, G] float.
    Returns: [N, G] float32 (float64 where the rewards are).
    Raises: ValueError when G < 2: an answer alone has nothing to be compared with ("none" takes it). UserError for an
      unknown kind.
    """
    choice("rollout.advantage", kind, ADVANTAGES)
    if kind == "none":
        return jnp.zeros_like(floating(reward_NG))
    if kind == "gdpo":
        raise ValueError("gdpo is an advantage of components of rewards; call gdpo_advantages")
    reward_NG = _checked(reward_NG)
    G = reward_NG.shape[1]
    mean_N1 = reward_NG.mean(1, keepdims=True)
    centred_NG = reward_NG - mean_N1
    if kind == "grpo":
        centred_NG = centred_NG / (reward_NG.std(1, ddof=1, keepdims=True) + eps)
    elif kind == "batch_std":
        centred_NG = centred_NG / (reward_NG.std(ddof=1) + eps)
    elif kind == "rloo":
        centred_NG = centred_NG * (G / (G - 1))
    elif kind == "reinforce++":
        centred_NG = _whitened(centred_NG, eps)
    elif kind == "max_rl":
        centred_NG = jnp.where(mean_N1 > 0, centred_NG / jnp.where(mean_N1 > 0, mean_N1, 1.0), 0.0)
    return jnp.where(_equal(reward_NG), 0.0, centred_NG)


def gdpo_advantages(reward_NGC: jax.Array | np.ndarray, weight_C: Sequence[float], eps: float = EPS) -> jax.Array:
    """Each of C components of the reward normalised in its group (as grpo), weighted, summed, and whitened over the
    batch, so that one component with large steps does not drown another. [N, G]; a group in which every component is
    equal gets exactly 0.
    """
    parts = [group_advantages(floating(reward_NGC)[..., c], "grpo", eps) * weight for c, weight in enumerate(weight_C)]
    same = jnp.stack([_equal(_checked(reward_NGC[..., c])) for c in range(len(parts))]).all(0)
    return jnp.where(same, 0.0, _whitened(functools.reduce(operator.add, parts), eps))


def overlong(length: jax.Array | np.ndarray, limit: int, buffer: int, penalty: float = 1.0) -> jax.Array:
    """What is added to the reward of an answer of `length` tokens: 0 up to limit - buffer, then falling to -penalty at
    `limit` (DAPO's soft punishment). Tokens, not characters."""
    over = floating(length) - (limit - buffer)
    return jnp.minimum(-over / buffer * penalty, 0.0)


def informative(reward_NG: jax.Array | np.ndarray, least: float = 1e-6) -> jax.Array:
    """[N] bool: groups whose raw rewards differ by more than `least` (dynamic sampling, DAPO 3.2).

    The raw ones: a penalty of length tells apart answers that are all equally wrong.
    """
    reward_NG = floating(reward_NG)
    return reward_NG.max(1) - reward_NG.min(1) > least


def _checked(reward_NG: jax.Array | np.ndarray) -> jax.Array:
    reward_NG = floating(reward_NG)
    if reward_NG.ndim != 2 or reward_NG.shape[1] < 2:
        raise ValueError(f"rewards {reward_NG.shape} are not [N, G >= 2]: raise the group size")
    return reward_NG


def _equal(reward_NG: jax.Array) -> jax.Array:
    return reward_NG.max(1, keepdims=True) == reward_NG.min(1, keepdims=True)


def _whitened(x_NG: jax.Array, eps: float) -> jax.Array:
    return (x_NG - x_NG.mean()) / (x_NG.std(ddof=1) + eps)

"""How far a policy is from another one: estimates from the drawn token, and distances over tokens of the vocabulary."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from glmv_jax.losses.policy.basics import choice, floating, log_ratio

KINDS = ("k1", "k2", "k3", "k3+")
DISTIL = ("none", "sampled", "top_k")
_TINY = 1e-7  # probability of all other tokens, where there are none


@dataclasses.dataclass(frozen=True)
class KL:
    """factor: of the divergence from the reference policy in the loss; 0: it is only measured, if there is one."""

    kind: str = "k3"
    factor: float = 0.0

    def __post_init__(self) -> None:
        choice("loss.kl.kind", self.kind, KINDS)


@dataclasses.dataclass(frozen=True)
class Distil:
    """On-policy distillation. kind: none, sampled (the drawn token alone) or top_k (of the teacher's k likeliest)."""

    kind: str = "none"
    factor: float = 1.0
    top_k: int = 32

    def __post_init__(self) -> None:
        choice("loss.distil.kind", self.kind, DISTIL)


def kl(logprob_BT: jax.Array, reference_BT: jax.Array, kind: str = "k3") -> jax.Array:
    """An estimate of KL(pi || reference) per token; the reference gets no gradient. k3 is unbiased and never < 0."""
    choice("loss.kl.kind", kind, KINDS)
    d_BT = log_ratio(logprob_BT, reference_BT)
    if kind == "k1":
        return d_BT
    k2_BT = jnp.square(d_BT) / 2
    if kind == "k2":
        return k2_BT
    k3_BT = jnp.expm1(-d_BT) + d_BT
    return k3_BT if kind == "k3" else k2_BT + jax.lax.stop_gradient(k3_BT - k2_BT)


def sampled_advantage(logprob_BT: jax.Array, teacher_BT: jax.Array) -> jax.Array:
    """sg(log pi_teacher - log pi): what the drawn token is worth to the teacher, without a gradient."""
    return jax.lax.stop_gradient(-log_ratio(logprob_BT, teacher_BT))


def reverse_kl_top(logprob_K: jax.Array, teacher_K: jax.Array) -> jax.Array:
    """KL(pi || teacher) over K tokens and one more outcome, "any other": [..., K] log-probabilities -> [...].

    The outcome for the rest makes both sides distributions. So it is never negative, never more than the divergence
    over the whole vocabulary, and exact when K is all of it; a plain sum over K tokens is none of these.
    """
    logprob_K, teacher_K = floating(logprob_K), jax.lax.stop_gradient(floating(teacher_K))
    p_K = jnp.exp(logprob_K)
    rest, teacher_rest = _rest(p_K), _rest(jnp.exp(teacher_K))
    return (p_K * (logprob_K - teacher_K)).sum(-1) + rest * (jnp.log(rest) - jnp.log(teacher_rest))


def reverse_kl(logits_V: jax.Array, teacher_logits_V: jax.Array) -> jax.Array:
    """KL(pi || teacher) over the whole vocabulary, [..., V] -> [...]; the teacher gets no gradient."""
    logp_V = jax.nn.log_softmax(floating(logits_V), axis=-1)
    teacher_V = jax.lax.stop_gradient(jax.nn.log_softmax(floating(teacher_logits_V), axis=-1))
    return (jnp.exp(logp_V) * (logp_V - teacher_V)).sum(-1)


def _rest(p_K: jax.Array) -> jax.Array:
    return jnp.maximum(1.0 - p_K.sum(-1), _TINY)

"""From values per token to one number: which tokens are one answer's, and what sums are divided by."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.losses.cross_entropy import divide
from glmv_jax.losses.policy.basics import choice, floating

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum")


class Answers(NamedTuple):
    """Which answer of its row each token is of. id_BT: [B, T] int in [0, ids); ids: a Python int."""

    id_BT: jax.Array
    ids: int

    @classmethod
    def of(cls, segments_BT: jax.Array, branches_BT: jax.Array | None = None) -> Answers:
        """Of packed rows, whose texts lie one after the other: a new one where the segment or the branch changes."""
        new_BT = jnp.zeros(segments_BT.shape, bool)
        for x_BT in (segments_BT, branches_BT):
            if x_BT is not None:
                new_BT |= x_BT != jnp.pad(x_BT, ((0, 0), (1, 0)), mode="edge")[:, :-1]
        return cls(jnp.cumsum(new_BT, axis=1), segments_BT.shape[1])

    @classmethod
    def rows(cls, shape: tuple[int, ...]) -> Answers:
        """One answer a row."""
        return cls(jnp.zeros(shape, jnp.int32), 1)

    def at(self, at_BJ: jax.Array) -> Answers:
        """The same for chosen positions of each row, in any order."""
        return self._replace(id_BT=jnp.take_along_axis(self.id_BT, at_BJ, axis=1))

    def sum(self, value_BT: jax.Array) -> jax.Array:
        """[B, count]: the sum over each answer."""
        add = lambda x_T, id_T: jax.ops.segment_sum(x_T, id_T, self.ids)  # noqa: E731
        return jax.vmap(add)(value_BT, self.id_BT)

    def max(self, value_BT: jax.Array) -> jax.Array:
        """[B, count]: the largest of each answer."""
        return jax.vmap(lambda x_T, id_T: jax.ops.segment_max(x_T, id_T, self.ids))(value_BT, self.id_BT)

    def mean(self, value_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
        """[B, count]: the weighted mean over each answer, 0 where nothing has weight."""
        return divide(self.sum(value_BT * weight_BT), self.sum(weight_BT))

    def spread(self, value_BS: jax.Array) -> jax.Array:
        """[B, T]: an answer's number at each of its tokens."""
        return jnp.take_along_axis(value_BS, self.id_BT, axis=1)


def denominators(weight_BT: jax.Array, how: str, answers: Answers | None = None) -> jax.Array:
    """What `aggregate` divides by: the sum of weights ("token-mean"), 1 ("token-sum"), or answers with a token.

    Take it over the whole step and hand it to every micro-batch; then their losses sum to that of the step.
    """
    choice("loss.aggregation", how, AGGREGATIONS)
    weight_BT = floating(weight_BT)
    if how == "token-sum":
        return jnp.ones((), weight_BT.dtype)
    if how == "token-mean":
        return weight_BT.sum()
    answers = answers or Answers.rows(weight_BT.shape)
    return (answers.sum(weight_BT) > 0).sum().astype(weight_BT.dtype)


def aggregate(
    value_BT: jax.Array,
    weight_BT: jax.Array,
    how: str = "seq-mean-token-mean",
    *,
    answers: Answers | None = None,
    denominator: jax.Array | None = None,
    max_length: int | None = None,
) -> jax.Array:
    """A scalar from values per token, as the package's page has it. Answers without a token count nowhere.

    Args:
      weight_BT: 1 on tokens that count and 0 on others, or weights.
      answers: of packed rows; by default each row is one.
      denominator: of `denominators`, by default this batch's; max_length: for "seq-mean-token-sum-norm" only.
    """
    choice("loss.aggregation", how, AGGREGATIONS)
    weight_BT = floating(weight_BT)
    denominator = denominators(weight_BT, how, answers) if denominator is None else denominator
    weighted_BT = jnp.where(weight_BT > 0, value_BT * weight_BT, 0.0)
    if how in ("token-mean", "token-sum"):
        return divide(weighted_BT.sum(), denominator)
    answers = answers or Answers.rows(weight_BT.shape)
    sum_BS = answers.sum(weighted_BT)
    if how == "seq-mean-token-mean":
        sum_BS = divide(sum_BS, answers.sum(weight_BT))
    elif how == "seq-mean-token-sum-norm":
        if not max_length:
            raise ValueError("seq-mean-token-sum-norm needs max_length, the constant the sums are divided by")
        sum_BS = sum_BS / max_length
    return divide(sum_BS.sum(), denominator)

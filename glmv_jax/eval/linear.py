"""Linear probe: multinomial logistic regression on frozen features, by L-BFGS on the devices.

As CLIP does it (arXiv 2103.00020, appendix A.3): full batch, at most 1,000 steps, L2 strength by a search on a
validation part of the training rows, and then a fit on all of them. What is minimised is scikit-learn's objective,

    sum over rows of cross entropy + strength / 2 * |W|^2      (C = 1 / strength; the bias is free)

divided by the number of rows. Features are standardised by the mean and deviation of each channel over the training
rows (CLIP takes them as they are): towers differ in scale, and so one range of strengths fits all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from glmv_jax.eval import shards
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.typing import Params, UserError

STRENGTHS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # powers of ten that the search starts with
FINEST = 0.125  # of a power of ten, where it ends: 8 steps a decade
MAX_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted probe.

    weight [E, C], bias [C]: of standardised features; mean, deviation [E].
    classes [C]: the labels as they were given.   strength: of L2.   loss: the objective at the end, by row.
    steps: how many L-BFGS took.   validation: accuracy there by strength, empty when there was nothing to choose.
    """

    weight: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    classes: np.ndarray
    strength: float
    loss: float
    steps: int
    validation: dict[float, float]

    def scores(self, x_NE: np.ndarray) -> np.ndarray:
        """[N, C] logits."""
        x = (np.asarray(x_NE, np.float32) - self.mean) / self.deviation
        return x @ self.weight + self.bias


class LogisticRegression:
    """Fits on the same rows with different strengths; compiled once.

    Args:
      x_NE, labels_N: features and integer labels, the same on every host; rows are split over the data axes of `mesh`.
      block: rows whose logits a device makes at a time (their gradient is recomputed, not kept).
    """

    def __init__(
        self, x_NE: np.ndarray, labels_N: np.ndarray, *, mesh: Mesh | None = None, standardise: bool = True,
        block: int = 4096,
    ) -> None:  # fmt: skip
        self.mesh = shards.one_device() if mesh is None else mesh
        x = np.asarray(x_NE, np.float32)
        self.count = len(x)
        self.classes, index_N = np.unique(labels_N, return_inverse=True)
        if len(self.classes) < 2:
            raise UserError(f"a linear probe needs two classes, these {len(x)} rows have {len(self.classes)}")
        ones = np.ones(x.shape[1], np.float32)
        self.mean = x.mean(0, dtype=np.float64).astype(np.float32) if standardise else 0 * ones
        self.deviation = np.maximum(x.std(0, dtype=np.float64), 1e-6).astype(np.float32) if standardise else ones
        self._x, self._y, self._block = shards.split_rows(
            self.mesh, block, (x - self.mean) / self.deviation, index_N.astype(np.int32)
        )

    def fit(self, strength: float, used_N: np.ndarray | None = None, max_steps: int = MAX_STEPS) -> Probe:
        """The minimum for one strength, over the rows where `used_N` (default: all)."""
        used = self._weights(np.ones(self.count, bool) if used_N is None else used_N)
        params, loss, steps = _fit(
            self._x, self._y, used, jnp.float32(strength), mesh=self.mesh, block=self._block,
            classes=len(self.classes), max_steps=max_steps,
        )  # fmt: skip
        weight, bias = np.asarray(params["weight"]), np.asarray(params["bias"])
        return Probe(weight, bias, self.mean, self.deviation, self.classes, strength, float(loss), int(steps), {})

    def accuracy(self, probe: Probe, used_N: np.ndarray) -> float:
        """Share of right answers among these rows."""
        params = {"weight": shards.whole(self.mesh, probe.weight), "bias": shards.whole(self.mesh, probe.bias)}
        return float(_right(self._x, self._y, self._weights(used_N), params)) / int(used_N.sum())

    def _weights(self, used_N: np.ndarray) -> jax.Array:
        return shards.split_rows(self.mesh, self._block, np.asarray(used_N, np.float32))[0]


def linear_probe(
    x_NE: np.ndarray, labels_N: np.ndarray, *, mesh: Mesh | None = None, validation: float = 0.2, seed: int = 0,
    strength: float | None = None, standardise: bool = True,
) -> Probe:  # fmt: skip
    """The probe of all rows, with the strength that is best on a random `validation` part of them, or the one given.

    The search is CLIP's: seven strengths from 1e-6 to 1e6, then around the best of them by ever smaller steps.
    """
    regression = LogisticRegression(x_NE, labels_N, mesh=mesh, standardise=standardise)
    if strength is not None:
        return regression.fit(strength)
    held = np.zeros(regression.count, bool)
    held[np.random.default_rng(seed).permutation(regression.count)[: max(1, round(validation * regression.count))]] = 1

    tried: dict[float, float] = {}

    def best_of(powers: list[float]) -> float:
        """The power of ten that is best on the held rows; the strongest of those equally good."""
        for power in powers:
            if power not in tried:
                tried[power] = regression.accuracy(regression.fit(10.0**power, ~held), held)
        return max(powers, key=lambda power: (tried[power], power))

    best, step = best_of(list(STRENGTHS)), (STRENGTHS[1] - STRENGTHS[0]) / 2
    while step >= FINEST:
        best = best_of([p for p in (best - step, best, best + step) if STRENGTHS[0] <= p <= STRENGTHS[-1]])
        step /= 2
    found = regression.fit(10.0**best)
    return dataclasses.replace(found, validation={10.0**p: tried[p] for p in sorted(tried)})


@functools.partial(jax.jit, static_argnames=("mesh", "block", "classes", "max_steps"))
def _fit(
    x: jax.Array, y: jax.Array, used: jax.Array, strength: float, *, mesh: Mesh, block: int, classes: int,
    max_steps: int,
) -> tuple:  # fmt: skip
    rows, everywhere, axes = shards.rows_spec(mesh), PartitionSpec(), mesh_lib.data_axes(mesh)

    def entropy(params: Params, x_RE: jax.Array, y_R: jax.Array, used_R: jax.Array) -> jax.Array:
        """[1]: summed over a device's rows, a block at a time."""

        @jax.checkpoint
        def one(so_far: jax.Array, block: tuple) -> tuple[Any, Any]:
            x_bE, y_b, used_b = block
            logits_bC = jnp.matmul(x_bE, params["weight"], precision=jax.lax.Precision.HIGHEST) + params["bias"]
            losses_b = optax.softmax_cross_entropy_with_integer_labels(logits_bC, y_b)
            return so_far + (losses_b * used_b).sum(), None

        blocks = jax.tree.map(lambda a: a.reshape(-1, block, *a.shape[1:]), (x_RE, y_R, used_R))
        return jax.lax.scan(one, jnp.float32(0), blocks)[0][None]

    parts = jax.shard_map(
        entropy, mesh=mesh, in_specs=(everywhere, rows, rows, rows),
        out_specs=PartitionSpec(axes) if axes else everywhere, check_vma=False,
    )  # fmt: skip
    total = used.sum()

    def objective(params: Params) -> jax.Array:
        penalty = strength / 2 * jnp.square(params["weight"]).sum()
        return (parts(params, x, y, used).sum() + penalty) / total

    return minimise(objective, {"weight": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}, max_steps)


def minimise(
    objective: Callable, params: Params, max_steps: int, tolerance: float = 1e-5
) -> tuple[Params, jax.Array, jax.Array]:
    """(parameters, value, steps) of L-BFGS, until no part of the gradient is above `tolerance` or it does not descend.

    In float32 a value near the minimum is all rounding, and no step can be told to be better: after three that were
    not the search has ended.
    """
    solver = optax.lbfgs(memory_size=20, linesearch=optax.scale_by_zoom_linesearch(30, initial_guess_strategy="one"))
    value_and_grad = optax.value_and_grad_from_state(objective)

    def going(carry: tuple) -> jax.Array:
        _, _, step, gradient, stuck, _ = carry
        return (step < max_steps) & (gradient > tolerance) & (stuck < 3)

    def advance(carry: tuple) -> tuple:
        params, state, step, _, stuck, least = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=objective)
        after = optax.apply_updates(params, updates)
        value = optax.tree.get(state, "value")
        stuck = jnp.where(value < least, 0, stuck + 1)
        largest = jnp.max(jnp.array([jnp.abs(g).max() for g in jax.tree.leaves(optax.tree.get(state, "grad"))]))
        return after, state, step + 1, largest, stuck, jnp.minimum(value, least)

    start = (params, solver.init(params), jnp.int32(0), jnp.float32(jnp.inf), jnp.int32(0), jnp.float32(jnp.inf))
    params, _, steps, *_ = jax.lax.while_loop(going, advance, start)
    return params, objective(params), steps


@jax.jit
def _right(x: jax.Array, y: jax.Array, used: jax.Array, params: Params) -> jax.Array:
    logits = jnp.matmul(x, params["weight"], precision=jax.lax.Precision.HIGHEST) + params["bias"]
    return ((logits.argmax(-1) == y) * used).sum()

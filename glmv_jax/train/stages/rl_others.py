"""What other policies say of the tokens that a step of stage 5 has drawn: the trainer before the update, the reference
of a divergence, and teachers by data source (cfg.rollout.proximal, cfg.reference). It becomes arrays of the batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from glmv_jax.losses.chunked import head_map
from glmv_jax.losses.select import Targets
from glmv_jax.models import vlm
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.rl.pipeline.trace import HELD, Trace
from glmv_jax.train import reference
from glmv_jax.train.state import Placement
from glmv_jax.typing import Batch, Params

if TYPE_CHECKING:
    from glmv_jax.train.stages.rl import RL


class Others:
    """The policies beside the trained one. They have its architecture, and wait in the host's memory.

    trace: of the asynchronous form; it is told when they were on the devices.
    """

    trace: Trace | None = None

    def __init__(self, stage: RL) -> None:
        self.stage, self.exact = stage, stage.objective.distil.kind == "top_k"
        self.roles = reference.roles(stage.cfg, stage.names)
        self.parked: dict[str, reference.Parked] = {}
        self._placement: Placement | None = None
        self._since: dict[str, float] = {}  # when copies to the devices were started, by the trace's clock

    def begin(self, placement: Placement) -> None:
        """Where the trained policy lives, and they too when it is their turn."""
        self._placement = placement

    def read(self) -> None:
        """Reads the weights that have not been read, before a run asks for its data; an evaluation needs none."""
        place, missing = self._placement, self.roles.keys() - self.parked.keys()
        if place and missing:
            shapes = jax.eval_shape(self.stage.init_params, jax.random.key(0))
            where = place.rules.shardings(place.mesh, self.stage.logical_axes(), shapes)
            self.parked = {run: reference.Parked.of_run(run, shapes, where) for run in self.roles}

    def shapes(self, rows: int, tokens: int) -> Batch:
        """Of the arrays [B, T, ...] that they make, 0 but at learnt tokens: log-probabilities "proximal", "reference"
        and "teacher" of the token that was drawn, or "teacher_ids" and "teacher_top" [B, T, K]: the teacher's likeliest
        tokens and their log-probabilities."""
        number = jax.ShapeDtypeStruct((rows, tokens), np.float32)
        some = lambda dtype: jax.ShapeDtypeStruct((rows, tokens, self.stage.objective.distil.top_k), dtype)  # noqa: E731
        found = {"proximal": number} if self.stage.cfg.rollout.proximal else {}
        found |= {"reference": number} if any(role.kl for role in self.roles.values()) else {}
        if any(role.sources for role in self.roles.values()):
            exact = {"teacher_ids": some(np.int32), "teacher_top": some(np.float32)}
            found |= exact if self.exact else {"teacher": number}
        return found

    def prefetch(self) -> None:
        """Called when answers are drawn and their rewards are not known yet: the caches of the sampler are gone, and
        the first policy is on its way while the host is busy. In the asynchronous form, when an update has ended and
        its memory is free: before the batch that is asked about is there."""
        for run in list(self.parked)[:1]:
            self._fetch(run)

    def said_of(self, batches: list[Batch], params: Params) -> list[Batch]:
        """For each batch the arrays of `shapes`. params: the trained ones.

        Each policy is on the devices for its turn; the next one is fetched meanwhile, so there may be two.
        """
        said: list[Batch] = [{} for _ in batches]
        if not self.shapes(1, 1):
            return said
        place = self._placement
        with rules_lib.use(place.mesh, place.rules) if place else contextlib.nullcontext():
            arrays = [{name: x for name, x in rows.items() if name != "shown"} for rows in batches]
            placed = [place.batch(rows) if place else rows for rows in arrays]
            if self.stage.cfg.rollout.proximal:
                for found, rows in zip(said, placed):
                    found["proximal"] = self.logprobs(params, rows)
            runs = list(self.parked)
            for run, following in zip(runs, [*runs[1:], None]):
                self._fetch(run)
                with self.parked[run].here() as theirs:
                    if following:
                        self._fetch(following)
                    for found, rows in zip(said, placed):
                        self._ask(self.roles[run], theirs, rows, found)
                    jax.block_until_ready(said)
                if self.trace is not None:
                    self.trace.add(HELD, run, self._since[run])
        return said

    def _fetch(self, run: str) -> None:
        """Starts the copies of one, unless that has been done."""
        if self.trace is not None and not self.parked[run].is_here:
            self._since[run] = self.trace.clock()
        self.parked[run].prefetch()

    def _ask(self, role: reference.Role, params: Params, rows: Batch, found: Batch) -> None:
        """Adds to `found` what a policy is asked for; a teacher's word counts on its sources."""
        drawn: Any = self.logprobs(params, rows) if role.kl or not self.exact else None
        if role.kl:
            found["reference"] = drawn
        if role.sources:
            taught_BT = jnp.isin(rows["source"], jnp.array(role.sources))
            for name, x in (self.likeliest(params, rows) if self.exact else {"teacher": drawn}).items():
                mine = taught_BT.reshape(*taught_BT.shape, *[1] * (x.ndim - 2))
                found[name] = jnp.where(mine, x, found.get(name, 0))

    @functools.cached_property
    def logprobs(self) -> Callable:
        """(params, batch) -> [B, T]: of learnt tokens, 0 elsewhere; compiled."""

        def logprobs(params: Params, batch: Batch) -> jax.Array:
            targets, hidden_BJD, _, _ = self.stage.learnt(params, batch)
            logprob_BJ, _ = self.stage.of_targets(params, targets, hidden_BJD)
            return _put_back(logprob_BJ, targets, batch["tokens"].shape[1])

        return self._jitted(logprobs)

    @functools.cached_property
    def likeliest(self) -> Callable:
        """(params, batch) -> {"teacher_ids", "teacher_top"}; compiled."""

        def likeliest(params: Params, batch: Batch) -> dict[str, jax.Array]:
            targets, hidden_BJD, _, _ = self.stage.learnt(params, batch)
            top = lambda logp_SCV: jax.lax.top_k(logp_SCV, self.stage.objective.distil.top_k)  # noqa: E731
            head = vlm.head(self.stage.model, params)
            top_BJK, ids_BJK = head_map(top, hidden_BJD, head, **self.stage.head_settings)
            T = batch["tokens"].shape[1]
            return {"teacher_ids": _put_back(ids_BJK, targets, T), "teacher_top": _put_back(top_BJK, targets, T)}

        return self._jitted(likeliest)

    def _jitted(self, fn: Callable) -> Callable:
        if self._placement is None:
            return jax.jit(fn)
        return jax.jit(fn, out_shardings=rules_lib.batch_sharding(self._placement.mesh))


def _put_back(x_BJ: jax.Array, targets: Targets, T: int) -> jax.Array:
    """[B, T, ...]: what is known of the targets, where they are; 0 elsewhere."""
    learnt_BJ = (targets.weight_BJ > 0).reshape(*targets.at_BJ.shape, *[1] * (x_BJ.ndim - 2))
    put = lambda x_J, at_J: jnp.zeros((T, *x_J.shape[1:]), x_J.dtype).at[at_J].set(x_J)  # noqa: E731
    return jax.vmap(put)(jnp.where(learnt_BJ, x_BJ, 0), targets.at_BJ)

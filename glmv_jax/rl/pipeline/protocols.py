"""What the pipeline asks of the parts it joins: prompts, an engine that writes answers, graders, a trainer.

Small on purpose: the tests put simulated parts here, a run on one machine threads, a run on many Ray actors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from glmv_jax.rl.pipeline.group import Group
    from glmv_jax.rl.rewards.grade import Grade

REASONS = ("stop", "length", "aborted", "failed")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """uid: the how-manieth prompt of the run.   key: what its source finds it by again, JSON-able.
    source: the data source that metrics are grouped by."""

    uid: int
    key: Any
    source: str


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """An answer or its beginning: tokens int32 [n], logprobs float32 [n] under the policy that drew each, versions
    int32 [n]: how many updates that policy had seen; they never fall along an answer, and are -1 where a token was not
    drawn but put there (of an environment, of a budget)."""

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def oldest(self) -> int | None:
        """The lowest version, which is the first; None when nothing was drawn."""
        drawn = self.versions[self.versions >= 0]
        return int(drawn[0]) if len(drawn) else None

    def to_json(self) -> dict[str, list]:
        return {name: np.asarray(getattr(self, name)).tolist() for name in ("tokens", "logprobs", "versions")}

    @classmethod
    def from_json(cls, value: Mapping[str, list]) -> Drawn:
        kinds = {"tokens": np.int32, "logprobs": np.float32, "versions": np.int32}
        return cls(**{name: np.array(value[name], kind) for name, kind in kinds.items()})


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One answer that is asked for.

    id: unique in a run.   member: which answer of its group.   attempt: how often it was begun anew: with the uid and
    the member what the random numbers depend on.   prefix: what had been drawn when it was aborted, to go on from.
    """

    id: int
    prompt: Prompt
    member: int
    attempt: int = 0
    prefix: Drawn | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """What became of a request: the answer, its prefix included, and why it ended, one of REASONS.

    facts: what else is to be known of it, JSON-able: of a failed one, "error".
    episode: of an answer that is a whole `play.Episode`, with its pixels; it is not saved, see `Member.to_json`.
    """

    drawn: Drawn
    reason: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    episode: Any = None


OnDone: TypeAlias = Callable[[Completion], None]


class Engine(Protocol):
    """Writes answers. Every request is answered by one call of `on_done`, from any thread, unless its worker is lost
    (then the pipeline's patience ends)."""

    def submit(self, request: Request, on_done: OnDone) -> None:
        """Begins as soon as there is room."""

    def abort(self, id: int) -> None:
        """Asks for the end of a request: its `on_done` is called soon, with the reason "aborted" and what was drawn, or
        with the whole answer if that came first. An unknown id is left alone."""


class Prompts(Protocol):
    """Prompts without end. What `draw` gives depends on the state alone."""

    def draw(self) -> Prompt: ...
    def learn(self, groups: Sequence[Group]) -> None:
        """Told of each batch that goes to the trainer, and of groups that are filtered out, for a curriculum."""

    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class GradeAnswer(Protocol):
    """What an answer earns."""

    def __call__(self, request: Request, completion: Completion, /) -> Awaitable[Grade]: ...


class Build(Protocol):
    """What the trainer takes of the groups of a step."""

    def __call__(self, step: int, groups: Sequence[Group], /) -> Awaitable[Any]: ...


Push: TypeAlias = Callable[[int], Awaitable[None]]  # hands the weights of a version to the engine, as it runs

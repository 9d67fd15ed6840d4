"""What is asked for, what is complete, what makes the next batch: every decision of the pipeline, and no clock, no
thread, no device. `driver.Pipeline` tells it what happened and does what it says.

A prompt is drawn once. From then on its group is in exactly one of

    cache     put aside, to be asked for before any new prompt
    open      written and graded
    ready     complete
    picked    in a batch that the trainer has not taken yet
    training  in a batch that it has taken

or it was filtered out (`keep`) or given up (its answers kept failing), which is counted and told. Updates and saved
states count what was taken as trained: `state` is for the moment between two steps of the trainer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from glmv_jax.rl.pipeline import staleness
from glmv_jax.rl.pipeline.cache import AbortCache
from glmv_jax.rl.pipeline.group import Group
from glmv_jax.rl.pipeline.protocols import Completion, Prompt, Prompts, Request
from glmv_jax.rl.pipeline.quotas import Quotas
from glmv_jax.rl.pipeline.staleness import Settings
from glmv_jax.typing import UserError

if TYPE_CHECKING:
    from glmv_jax.rl.rewards.grade import Grade

FILTERED = 1000  # groups in a row that nobody wants to train on: the run would go on for ever and learn nothing
GIVEN_UP = 50  # prompts in a row whose answers keep failing: what makes them is broken, and the run should say so


class Scheduler:
    """The state of a run's rollouts.

    prompts: where new ones come from.   note: gets a row of facts for everything that befalls an answer ("kind" is
    "aborted", "failed", "dropped", "given_up" or "filtered").   keep: whether a complete group is worth training on.
    kind: what a prompt counts as; then every batch holds as many groups of each kind as were drawn for it (`Quotas`).

    step: number of the batch that is picked next.   version: of the weights that the engine has.
    in_flight: groups written at a time; may be changed from step to step.
    """

    def __init__(
        self,
        prompts: Prompts,
        settings: Settings,
        note: Callable[[dict[str, Any]], None] = lambda row: None,
        keep: Callable[[Group], bool] | None = None,
        kind: Callable[[Prompt], str] | None = None,
    ) -> None:
        if kind is not None and settings.seconds is not None:
            raise UserError(f"seconds={settings.seconds} ends a step with what is there then, and quotas say what has "
                            "to be there; leave one of them out")  # fmt: skip
        self.prompts, self.settings, self._note, self._keep = prompts, settings, note, keep
        self.step = self.version = 0
        self.in_flight = settings.most_in_flight
        self.expired = False  # the step's time is up
        self.cache = AbortCache()
        self._quotas = Quotas(kind) if kind is not None else None
        self.open: dict[int, Group] = {}
        self.ready: dict[int, Group] = {}
        self.picked: dict[int, list[Group]] = {}
        self.training: dict[int, list[Group]] = {}
        self._running: dict[int, tuple[Group, int]] = {}  # request -> group and member
        self._judged: dict[int, tuple[Group, int, Completion]] = {}  # the same, of answers that wait for their verdict
        self._idle: list[tuple[Group, int]] = []  # to be asked for
        self._stops: list[int] = []  # requests that the engine has to end
        self._closing, self._begun = False, 0  # "abort": the step is over; groups it has
        self._requests = self._given_up = self._filtered = 0

    # --- what to do now -----------------------------------------------------------------------------------------------

    def begin(self) -> list[Request]:
        """Requests for the engine: as many groups as there is room for, those put aside first, and answers anew."""
        if self._closing or self.step - self.version > self.settings.staleness:
            return []  # the step is ending, or what the engine would draw now is too old for the next batch
        while self._has_room():
            self._open_next()
        idle, self._idle = self._idle, []
        return [self._ask(group, i) for group, i in idle if group.prompt.uid in self.open and group.members[i].idle]

    def stops(self) -> list[int]:
        """Requests that the engine has to end; each is told once."""
        stops, self._stops = self._stops, []
        return stops

    def pick(self) -> tuple[int, list[Group]] | None:
        """The next batch as (step, groups by uid), or None as long as there is none."""
        self._drop_stale()
        ready = list(self.ready.values())
        groups = self._chosen(ready)
        if groups is None and self.expired and ready:
            groups = ready[: self.settings.groups]
        if groups is None:
            return None
        if self._quotas is not None:
            self._quotas.picked(groups)
        step, self.step, self.expired = self.step, self.step + 1, False
        for group in groups:
            del self.ready[group.prompt.uid]
            group.trained_at = step
        self.picked[step] = sorted(groups, key=lambda group: group.prompt.uid)
        if self.settings.late == "abort":
            self._close()
        self._drop_stale()
        return step, self.picked[step]

    # --- what happened ------------------------------------------------------------------------------------------------

    def ended(self, id: int, completion: Completion) -> bool:
        """A request has ended. True: its answer is complete and has to be graded, see `graded`."""
        if id not in self._running:
            return False  # its member began anew meanwhile
        group, i = self._running.pop(id)
        member = group.members[i]
        member.request = None
        if completion.reason == "failed":
            self._failed(group, i, str(completion.facts.get("error", "")))
        elif completion.reason == "aborted":
            member.aborts += 1
            member.prefix = completion.drawn
            self._tell("aborted", group, i, tokens=len(completion.drawn))
            self._idle.append((group, i))
        else:
            member.answer = completion
            self._judged[id] = group, i, completion
        self._settle(group)
        return id in self._judged

    def graded(self, id: int, grade: Grade) -> None:
        """The verdict on the answer to a request."""
        group, i, answer = self._judged.pop(id)
        if group.members[i].answer is answer:  # it has not become too old meanwhile
            group.members[i].grade = grade
            self._settle(group)

    def lost(self, id: int, error: str) -> None:
        """A request gave no sign for too long, or its answer could not be graded: it has failed."""
        if id in self._running:
            group, i = self._running.pop(id)
            self._stops.append(id)
        elif id in self._judged:
            group, i, answer = self._judged.pop(id)
            if group.members[i].answer is not answer:
                return
        else:
            return
        self._failed(group, i, error)
        self._settle(group)

    def taken(self, step: int) -> list[Group]:
        """The trainer takes the batch: its groups."""
        groups = self.training[step] = self.picked.pop(step)
        self.prompts.learn(groups)
        return groups

    @property
    def trained(self) -> int:
        """Batches that the trainer has taken."""
        return min(self.picked, default=self.step)

    def published(self, version: int) -> None:
        """The engine draws with the weights of this version from now on."""
        self.version = version
        for step in [step for step in self.training if step < version]:
            del self.training[step]

    # --- to save and to go on -----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All of it as JSON. What runs is asked for again; what was taken counts as trained."""
        picked = [group for step in sorted(self.picked) for group in self.picked[step]]
        waiting = [*picked, *self.ready.values(), *self.cache, *self.open.values()]
        return {
            "step": self.trained, "requests": self._requests, "in_flight": self.in_flight,
            "groups": [group.to_json() for group in waiting], "prompts": self.prompts.get_state(),
            "claims": self._quotas and self._quotas.get_state(self.picked[step] for step in sorted(self.picked)),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; for a new scheduler only. The engine must have the weights of version state["step"]."""
        self.step = self.version = state["step"]
        self._requests, self.in_flight = state["requests"], state["in_flight"]
        self.cache = AbortCache(map(Group.from_json, state["groups"]))
        if self._quotas is not None:
            self._quotas.set_state(state, self.cache)
        self.prompts.set_state(state["prompts"])

    # --- parts --------------------------------------------------------------------------------------------------------

    def _chosen(self, ready: list[Group]) -> list[Group] | None:
        """The next batch, of complete groups in order of completion."""
        if (quotas := self._quotas) is None:
            return staleness.pick(ready, self.open.values(), self.step, self.settings)
        found: list[Group] = []
        for kind, counts in quotas.batches(self.settings.groups, self.settings.staleness + 1).items():
            own, out = ([g for g in groups if quotas.of(g) == kind] for groups in (ready, self.open.values()))
            if (some := staleness.pick(own, out, self.step, self.settings, counts)) is None:
                return None
            found += some
        return found if len(found) == self.settings.groups else None

    def _has_room(self) -> bool:
        if len(self.open) >= self.in_flight:
            return False
        if self.settings.late == "abort":
            # What quotas wait for may be in the cache behind what was begun.
            return self._begun < self.in_flight or self._quotas is not None and not self.open and len(self.cache) > 0
        out = len(self.open) + len(self.ready)
        out += sum(map(len, itertools.chain(self.picked.values(), self.training.values())))
        return out < self.settings.most_out(self.in_flight)

    def _open_next(self) -> None:
        if len(self.cache):
            group, stale = self.cache.take(self.step - self.settings.staleness)
            for i in stale:
                self._tell("dropped", group, i)
        else:
            group = Group.fresh(self.prompts.draw(), self.settings.answers)
            if self._quotas is not None:
                self._quotas.drawn(group)
        self.open[group.prompt.uid] = group
        self._begun += 1
        self._idle += [(group, i) for i in range(len(group.members))]
        self._settle(group)

    def _ask(self, group: Group, i: int) -> Request:
        member, id = group.members[i], self._requests
        self._requests += 1
        member.request, member.since = id, self.version
        self._running[id] = group, i
        return Request(id, group.prompt, i, member.attempt, member.prefix)

    def _settle(self, group: Group) -> None:
        """Moves a group on if it is open and can: complete, or stopped with the step."""
        uid = group.prompt.uid
        if uid not in self.open:
            pass
        elif group.complete:
            del self.open[uid]
            self._given_up = 0
            if self._keep is None or self._keep(group):
                self.ready[uid], self._filtered = group, 0
            else:
                self._filter_out(group)
        elif self._closing and all(member.request is None for member in group.members):
            del self.open[uid]
            self.cache.put(group)
        self._reopen()

    def _filter_out(self, group: Group) -> None:
        """Another prompt takes its place."""
        self._leaves(group)
        self._filtered += 1
        self.prompts.learn([group])
        self._tell("filtered", group)
        if self._filtered >= FILTERED:
            raise UserError(
                f"{FILTERED} groups in a row taught nothing (the last of {group.prompt.source!r}, rewards "
                f"{sorted(set(group.rewards.tolist()))[:4]}); choose easier or harder prompts, or train on all groups"
            )

    def _close(self) -> None:
        """Ends the step for everything that is written."""
        self._closing = True
        self._stops += self._running
        for group in list(self.open.values()):
            self._settle(group)
        self._reopen()

    def _reopen(self) -> None:
        """The next step may begin when everything of this one is in."""
        if self._closing and not self.open:
            self._closing, self._begun = False, len(self.ready)  # what was complete beyond the batch begins the next

    def _drop_stale(self) -> None:
        """What could no longer be trained on in the next batch is drawn again."""
        oldest, ends = self.step - self.settings.staleness, self.settings.late == "abort"
        # Where steps end for all, what is written has ended with this one: it is looked at when it goes on.
        for group in [*self.ready.values(), *([] if ends else self.open.values())]:
            if group.oldest is None or group.oldest >= oldest:
                continue
            uid = group.prompt.uid
            running = [member.request for member in group.members]
            for i in group.prune(oldest):
                if (request := running[i]) is not None:
                    del self._running[request]
                    self._stops.append(request)
                self._tell("dropped", group, i)
                self._idle.append((group, i))
            if self.ready.pop(uid, None) is not None:
                self.cache.put(group) if ends else self.open.update({uid: group})

    def _failed(self, group: Group, i: int, error: str) -> None:
        member = group.members[i]
        member.failures += 1
        member.begin_anew()
        self._tell("failed", group, i, error=error)
        self._idle.append((group, i))
        if member.failures >= self.settings.attempts and group.prompt.uid in self.open:
            self._give_up(group, error)

    def _give_up(self, group: Group, error: str) -> None:
        """Another prompt takes its place."""
        for member in group.members:
            if member.request is not None:
                del self._running[member.request]
                self._stops.append(member.request)
        del self.open[group.prompt.uid]
        self._leaves(group)
        self._given_up += 1
        self._tell("given_up", group, error=error)
        if self._given_up >= GIVEN_UP:
            raise UserError(
                f"the answers to {GIVEN_UP} prompts in a row failed, the last with {error!r}; mend what fails"
            )

    def _leaves(self, group: Group) -> None:
        """It will be in no batch."""
        self._begun -= 1
        if self._quotas is not None:
            self._quotas.gone(group, [*self.open.values(), *self.ready.values(), *self.cache])

    def _tell(self, kind: str, group: Group, member: int | None = None, **facts: Any) -> None:
        prompt = group.prompt
        self._note(
            {"kind": kind, "step": self.step, "uid": prompt.uid, "source": prompt.source, "member": member, **facts}
        )

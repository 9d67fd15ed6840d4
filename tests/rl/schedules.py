"""What the pipeline has to equal, and what may befall a scheduler: for tests of staleness and their benchmark."""

from __future__ import annotations

import json
import random

import numpy as np

from glmv_jax.rl import Grade
from glmv_jax.rl.pipeline import Completion, Drawn, Request, Scheduler, Settings
from tests.rl import simulated
from tests.rl.simulated import Numbers


def synchronous(steps: int, groups: int, size: int, length) -> tuple[str, list]:
    """Reinforcement learning as it is written in a book."""
    prompts, weights, batches = Numbers(), "start", []
    for _ in range(steps):
        batch = []
        for prompt in [prompts.draw() for _ in range(groups)]:
            answers = []
            for member in range(size):
                request = Request(0, prompt, member)
                ids = simulated.tokens(weights, request, 0, length(request)).tolist()
                answers.append((ids, simulated.reward_of(ids)))
            batch.append((prompt.uid, answers))
        batches.append(batch)
        weights = simulated.hashlib.blake2b(repr((weights, batch)).encode(), digest_size=8).hexdigest()
    return weights, batches


class Schedule:
    """A scheduler among parts that do whatever they please whenever they please."""

    def __init__(self, seed: int, kind=None) -> None:
        self.kind = kind
        self.rng = rng = random.Random(seed)
        late, n, k = rng.choice(("wait", "drop", "abort")), rng.randint(1, 3), rng.randint(0, 3)
        in_flight = rng.choice((0, n + rng.randint(0, 4)))
        self.settings = Settings(n, rng.randint(1, 3), staleness=k, late=late, in_flight=in_flight, attempts=99)
        self.notes: list = []
        self.scheduler = Scheduler(Numbers(), self.settings, self.notes.append, kind=self.kind)
        self.version = self.trained_batches = 0
        self.running: dict = {}  # id -> request, versions so far
        self.leaving: list = []
        self.ungraded: list = []
        self.trained: set[int] = set()
        self.doubled = False
        self.oldest = 0

    def step(self) -> None:
        rng, s = self.rng, self.scheduler
        for request in s.begin():
            prefix = [] if request.prefix is None else request.prefix.versions.tolist()
            self.running[request.id] = request, prefix
        self.leaving += [id for id in s.stops() if id in self.running]
        deed = rng.random()
        if deed < 0.45 and self.running:
            id = rng.choice(list(self.running))
            self.running[id][1].extend([self.version] * rng.randint(0, 2))
            if rng.random() < 0.7:
                self.end(id, "failed" if rng.random() < 0.1 else "stop")
        elif deed < 0.55 and self.leaving:
            id = self.leaving.pop(rng.randrange(len(self.leaving)))
            if id in self.running:
                self.end(id, "aborted")
        elif deed < 0.75 and self.ungraded:
            s.graded(self.ungraded.pop(rng.randrange(len(self.ungraded))), Grade(1.0, True, {}))
        elif deed < 0.9:
            if rng.random() < 0.2 and self.settings.late == "abort" and self.kind is None:
                s.expired = True
            s.pick()
        elif deed < 0.95:
            if s.picked:
                self.take(min(s.picked))
        elif deed < 0.98:
            if self.version < self.trained_batches:
                self.version = rng.randint(self.version + 1, self.trained_batches)
                s.published(self.version)
        elif rng.random() < 0.2:
            self.restart()

    def end(self, id: int, reason: str) -> None:
        _, versions = self.running.pop(id)
        array = np.array(versions, np.int32)
        if self.scheduler.ended(id, Completion(Drawn(array, array, array), reason)):
            self.ungraded.append(id)

    def take(self, step: int) -> None:
        assert step == self.trained_batches
        for group in self.scheduler.taken(step):
            self.doubled |= group.prompt.uid in self.trained
            self.trained.add(group.prompt.uid)
            for member in group.members:
                self.oldest = max([self.oldest, *(step - member.answer.drawn.versions)])
        self.trained_batches += 1

    def restart(self) -> None:
        """Everything but a saved state and the trainer's weights is gone."""
        state = json.loads(json.dumps(self.scheduler.state()))
        self.scheduler = Scheduler(Numbers(), self.settings, self.notes.append, kind=self.kind)
        self.scheduler.restore(state)
        self.running, self.leaving, self.ungraded, self.version = {}, [], [], self.trained_batches

    def left(self) -> set[int]:
        s = self.scheduler
        groups = [*s.cache, *(g for b in s.picked.values() for g in b)]
        return {*s.open, *s.ready, *(g.prompt.uid for g in groups)}

    @property
    def all_there(self) -> bool:
        """Every prompt was trained on once or is still there, and none is both."""
        left = self.left()
        return not (self.doubled or self.trained & left) and self.trained | left == set(
            range(self.scheduler.prompts.drawn)
        )

"""Who draws the turns of stage 5's episodes: the sampler, one after another, each from the whole conversation; with
cfg.rollout.slots the inference engine, which gets the weights of each step, in the asynchronous form as it runs."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import jax

from glmv_jax.data.building import Document
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.front import Front, Ticket
from glmv_jax.inference.requests import Completion, Prompt, Request
from glmv_jax.inference.sampler import Sampler, Sampling
from glmv_jax.inference.settings import Settings
from glmv_jax.parallel import multihost
from glmv_jax.rl.pipeline import protocols
from glmv_jax.rl.play import Limits, Policy
from glmv_jax.rl.players import sampled, served
from glmv_jax.rl.turns import DRAWN
from glmv_jax.train.stages import rl_questions
from glmv_jax.typing import Params

if TYPE_CHECKING:
    from glmv_jax.train.stages.rl import RL

KEY = 1 << 30  # of a step's random key: what its questions fold into it are numbers of answers


class Players:
    """Of one stage. limits: of its episodes."""

    def __init__(self, stage: RL, limits: Limits) -> None:
        r = stage.cfg.rollout
        self._stage, self._limits, self._seed = stage, limits, rl_questions.own_seed(stage)
        self._sampling = Sampling.chat(
            stage.tokenizer, r.max_new_tokens, allow=DRAWN, temperature=r.temperature, top_p=r.top_p
        )
        self._sampler = Sampler(stage.model, self._sampling)
        self._front: Front | Any = None  # with slots
        self._key: jax.Array | Any = None
        self._params: Params | Any = None  # without slots, while turns are drawn

    def begin(self, params: Params, step: int) -> None:
        """The weights that turns are drawn with from now on, after `step` updates."""
        params = multihost.own_copy(params)
        if not self._stage.cfg.rollout.get("slots", 0):
            self._params = params
            self._key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._seed), step), KEY)
        elif self._front is None:
            self.start(params, step)
        else:
            self._front.set_params(params, step).result()

    def end(self) -> None:
        """Lets go of the weights: the step that follows takes their memory (an engine has its copy)."""
        self._params = None

    def __call__(self, seed: int, member: int) -> Policy:
        """The policy of one episode."""
        if self._front is None:
            own = jax.random.fold_in(jax.random.fold_in(self._key, seed), member)
            return sampled(self._sampler, self._params, own, tokens=self._limits.tokens, patches=self._limits.patches)

        async def complete(document: Document, room: int, turn: int) -> Completion:
            return await self._drawn(document, room, f"{seed}/{member}/{turn}").answer()

        return served(complete)

    def ask(
        self,
        request: protocols.Request,
        document: Document,
        room: int,
        turn: int,
        begun: Completion | None,
    ) -> Ticket:
        """See `pipeline.episodes.Ask`. What is drawn depends on what it does in the synchronous form, and on how often
        the episode was begun anew."""
        again = f"/{request.attempt}" if request.attempt else ""
        return self._drawn(document, room, f"{request.prompt.key['seed']}/{request.member}/{turn}{again}", begun)

    def _drawn(self, document: Document, room: int, facts: str, begun: Completion | None = None) -> Ticket:
        """A turn of the engine. facts: what its random numbers depend on, beside the seed and the weights."""
        own = number(f"{self._seed}/{self._front.engine.version}/{facts}")
        most = min(room, self._stage.cfg.rollout.max_new_tokens)
        return self._front.submit(Request(Prompt.of_document(document), own, max_new_tokens=most, begun=begun))

    def start(self, params: Params, version: int) -> Front:
        """The engine, in a thread of its own, with room for a whole conversation in each slot, and for a question with
        its answer, which the asynchronous form has it draw as well."""
        r, limits, asker = self._stage.cfg.rollout, self._limits, self._stage.asker
        length = max(limits.tokens, asker.max_tokens + self._stage.longest)
        chunks = tuple(sorted({min(n, length) for n in (64, 512)}))
        sizes = Settings(
            slots=r.slots, length=length, chunks=chunks, patches=(asker.max_patches,),
            pictures=r.slots * limits.patches // 4, queue=4 * r.slots, drafts=rl_questions.drafts(self._stage),
        )  # fmt: skip
        engine = Engine(self._stage.model, params, self._sampling, sizes, version=version)
        engine.warm()
        self._front = Front(engine)
        return self._front

    def close(self) -> None:
        """Ends the engine."""
        front, self._front = self._front, None
        if front is not None:
            front.close()


def number(facts: str) -> int:
    """31 bits that look random and depend on `facts` alone."""
    return int.from_bytes(hashlib.blake2b(facts.encode(), digest_size=4).digest(), "big") >> 1

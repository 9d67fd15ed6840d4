"""What environments have in common that are acted on by tool calls: the calls of a turn are carried out one after
another, each is answered with a message, and what cannot be carried out is answered with the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from glmv_jax.data.coordinates import SCALE
from glmv_jax.rl.gym import Action, Observation, Step, said_by


class Refused(Exception):
    """A call that cannot be carried out: the text tells the model why."""


class Reply(NamedTuple):
    """What a call led to; see `gym.Step`."""

    text: str = ""
    images: Sequence[Image.Image] = ()
    done: bool = False
    reward: float = 0.0
    info: Mapping[str, Any] = {}


def tool(name: str, description: str, optional: Mapping[str, Any] | None = None, **needed: Any) -> dict[str, Any]:
    """A tool as OpenAI's API describes it. Arguments by name: a JSON type, or a schema."""
    full = lambda given: {k: {"type": s} if isinstance(s, str) else s for k, s in given.items()}  # noqa: E731
    parameters = {"type": "object", "properties": full({**needed, **(optional or {})}), "required": list(needed)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def names(tools: Sequence[Mapping[str, Any]]) -> str:
    """Of tools, for a sentence."""
    return ", ".join(each["function"]["name"] for each in tools)


def inside(*coordinates: int) -> None:
    """Refused unless all are in the convention of `data.coordinates`."""
    outside = [c for c in coordinates if not 0 <= c <= SCALE]
    if outside:
        raise Refused(f"the coordinate {str(outside[0])[:20]} is not in 0..{SCALE - 1}")


class Acting:
    """An environment without its rules: a subclass has `source`, `reset`, `call` and perhaps `said` and `close`.

    tools: those of the episode that is played, announced with its first observation.
    judges: whether it has a verdict of its own; then a step that earns nothing is worth 0.
    """

    source: str
    tools: Sequence[Mapping[str, Any]] = ()
    judges = True

    def call(self, name: str, arguments: Mapping[str, Any]) -> Reply:
        """Carries out one call of a tool there is, with arguments of its schema. May block. Raises Refused."""
        raise NotImplementedError

    def said(self, action: Action) -> Step:
        """The answer to a turn without a call."""
        return self._nothing("user", f"Nothing was done. Call a tool: {names(self.tools)}.")

    async def step(self, action: Action) -> Step:
        if action.malformed:
            return self._nothing("tool", f"Nothing was done: {action.malformed}.")
        if not action.tool_calls:
            return self.said(action)
        return await asyncio.to_thread(self._carry_out, action)

    def close(self) -> None:
        """Nothing to let go of."""

    def _carry_out(self, action: Action) -> Step:
        messages: list[Mapping[str, Any]] = []
        images: list[Image.Image] = []
        rewards: list[float] = []
        info: dict[str, Any] = {}
        for call in action.tool_calls:
            try:
                reply = self.call(call["name"], call["arguments"])
            except Refused as reason:
                reply = Reply(f"Not done: {reason}.")
            messages.append(said_by("tool", reply.text, reply.images))
            images += reply.images
            rewards.append(reply.reward)
            info.update(reply.info)
            if reply.done:
                break
        reward = sum(rewards) if self.judges else None
        return Step(Observation(tuple(messages), tuple(images)), reply.done, reward, info)

    def _nothing(self, role: str, why: str) -> Step:
        return Step(Observation((said_by(role, why),)), False, 0.0 if self.judges else None)

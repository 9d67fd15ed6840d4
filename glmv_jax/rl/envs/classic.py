"""Environments of Gymnasium's interface: what they show as text and pictures, what they take as calls of one tool.

Observations of any of Gymnasium's spaces are told: `Box` of uint8 [H, W, 3] as a picture, `Text` as it is, others as
JSON, `Dict` by name. Actions are those of `Discrete` (by number or, with `actions`, by name) and `Text`; an environment
that takes others needs an adapter that knows what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.rl.envs.calls import Acting, Refused, Reply, tool
from glmv_jax.rl.gym import Observation, asked
from glmv_jax.typing import UserError


class Classic(Acting):
    """make: makes the environment, anew after `close`.   source: its tag.

    instructions: what the model is told of it.   actions: the names of a `Discrete` space's actions, in order.
    """

    def __init__(
        self, make: Callable[[], Any], source: str, instructions: str = "", actions: Sequence[str] = ()
    ):  # fmt: skip
        self.source = source
        self._make, self._instructions, self._names = make, instructions, tuple(actions)
        self._env = make()
        self.tools = [self._tool()]

    def reset(self, seed: int) -> Observation:
        self._env = self._env or self._make()
        seen, _ = self._env.reset(seed=seed)
        text, images = self._shown(seen)
        return asked("\n".join(filter(None, (self._instructions, text))), images, self.tools)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Reply:
        seen, reward, terminated, truncated, info = self._env.step(self._action(arguments["action"]))
        text, images = self._shown(seen)
        done = bool(terminated or truncated)
        return Reply(text, images, done, float(reward), {"truncated": bool(truncated)} if done else {})

    def close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def _tool(self) -> dict[str, Any]:
        kind, space = type(self._env.action_space).__name__, self._env.action_space
        if kind == "Text" and not self._names:
            return tool("act", f"Says a text of {space.min_length} to {space.max_length} letters.", action="string")
        if kind != "Discrete" or len(self._names) not in (0, space.n):
            named = f" and {len(self._names)} names" if self._names else ""
            raise UserError(f"{self.source}: actions of {space}{named} have no description; wrap the environment so "
                            "that they are Discrete, with a name for each or for none, or Text")  # fmt: skip
        if self._names:
            return tool("act", "Acts.", action={"type": "string", "enum": list(self._names)})
        last = int(space.start + space.n - 1)
        return tool("act", f"Acts; an action is a number from {space.start} to {last}.", action="integer")

    def _action(self, given: Any) -> Any:
        space = self._env.action_space
        action = int(space.start) + self._names.index(given) if self._names else given
        if isinstance(action, int) and not space.start <= action < space.start + space.n:
            raise Refused(f"there is no action {str(action)[:20]}")
        if isinstance(action, str) and not space.contains(action):
            raise Refused(f"a text of {space.min_length} to {space.max_length} of the letters it may have is needed")
        return action

    def _shown(self, seen: Any) -> tuple[str, list[Image.Image]]:
        text, images = _told(seen)
        if getattr(self._env, "render_mode", None) == "rgb_array":
            images = [*images, Image.fromarray(np.asarray(self._env.render(), np.uint8))]
        return text, images


def _told(seen: Any) -> tuple[str, list[Image.Image]]:
    """An observation in words and pictures."""
    if isinstance(seen, str):
        return seen, []
    if isinstance(seen, Mapping):
        parts = {name: _told(each) for name, each in seen.items()}
        text = "\n".join(f"{name}: {words}" for name, (words, _) in parts.items() if words)
        return text, [image for _, images in parts.values() for image in images]
    if isinstance(seen, tuple):
        parts = [_told(each) for each in seen]
        return ", ".join(words for words, _ in parts if words), [image for _, images in parts for image in images]
    array = np.asarray(seen)
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3:
        return "", [Image.fromarray(array)]
    return json.dumps(array.round(4).tolist() if array.dtype.kind == "f" else array.tolist()), []

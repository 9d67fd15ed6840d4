"""One protocol for everything that a policy acts in, whether an episode has one step or many.

    observation = environment.reset(seed)         what the model sees first, and the tools it may call
    step = await environment.step(action)         what is new since its action, and whether that was the end

A question with a verifier is an environment whose first step is the last (`envs.single`); a browser, a window, a data
set of puzzles and a set of tools are others. `play.play` plays them all by the same lines.

Messages are those of `data.chat` and `data.conversation`: a role, and a list of {"type": "text", "text": ..} and
{"type": "image"} parts; pictures travel beside them, in reading order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Observation:
    """What is new since the last action.

    messages: of the roles system, user and tool (in a first one also earlier turns of the assistant).
    images: RGB, one for each {"type": "image"} part, in reading order.
    tools: what may be called, as OpenAI's API describes it; with the first observation only.
    hashes: of the images where they were made, if that was another process (`integrity.sealed`); None: it was this one.
    """

    messages: tuple[Message, ...] = ()
    images: tuple[Image.Image, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    hashes: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Action:
    """A turn of the model.

    text: what it says to all, box tokens by name.   thinking: what it says to itself.
    tool_calls: {"name", "arguments"} each, arguments as the tool's schema has them.
    malformed: what is wrong with the calls it tried to write, "" if nothing is; then `tool_calls` is empty.
    """

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    malformed: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """What an action led to.

    done: the episode is over; nobody reads this observation.
    reward: the environment's own verdict on this step, None where only the reward system grades.
    info: facts for whoever grades. Of the last step: "sample", the `records.Sample` that was asked; "answer", the text
        to be graded, where that is not what the model said last.
    """

    observation: Observation
    done: bool
    reward: float | None = None
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Environment(Protocol):
    """What a policy acts in, one episode at a time.

    source: the data-source tag of its episodes.

    What goes wrong because of the model is an observation that says so. What goes wrong otherwise (a browser that
    died) raises: then the episode has failed, whoever plays closes the environment, and a later `reset` begins anew.
    UserError is for what no other episode can mend, as a package that is not installed.
    """

    source: str

    def reset(self, seed: int) -> Observation:
        """A new episode; of the same seed always the same, to the byte. May block; may be called after `close`."""

    async def step(self, action: Action) -> Step:
        """The answer to an action. Does not block the event loop."""

    def close(self) -> None:
        """Lets go of processes and files; may be called twice, and while a step hangs in another thread."""


def said_by(role: str, text: str = "", images: Sequence[Image.Image] = ()) -> Message:
    """A message: its pictures, then its text."""
    words = [{"type": "text", "text": text}] if text else []
    return {"role": role, "content": [{"type": "image"} for _ in images] + words}


def asked(text: str, images: Sequence[Image.Image] = (), tools: Sequence[Mapping[str, Any]] = ()) -> Observation:
    """A first observation: what a user asks about pictures."""
    return Observation((said_by("user", text, images),), tuple(images), tuple(tools))

"""The sizes of an engine, and what it counts."""

from __future__ import annotations

import dataclasses

import numpy as np

from glmv_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes, each of which is part of a compiled program.

    slots:    rows that decode together.               length: tokens of a prompt and its answer, at most.
    steps:    tokens that a call decodes at most, after which the host is asked; less where a row is done that another
              request waits for.      alone: of a call of `Engine.run`, during which nobody asks for anything.
    chunks:   lengths of the pieces that prompts are read in; a piece takes the smallest that holds it.
    lanes:    prompts that a data shard of the mesh reads at once, if so many wait.
    reads:    times that it reads between two calls of decode while rows wait for it, at most (`Engine.run`: no limit).
    patches:  lengths of the rows that pictures are encoded in.       pictures: visual tokens that are kept.
    pixels:   numbers of a patch and their type, as the data gives them: bytes of a still picture, unless given.
    queue:    requests that may wait for a row; more are refused (`requests.Busy`).
    drafts:   tokens that the MTP head drafts a step of decoding; 0 for none.
    likely:   of the likeliest tokens, so many can be told beside each that is drawn (`requests.Request.likely`).
    """

    slots: int = 8
    length: int = 1024
    steps: int = 8
    alone: int = 64
    chunks: tuple[int, ...] = (16, 64, 256)
    lanes: int = 1
    reads: int = 4
    patches: tuple[int, ...] = (256, 1024)
    pictures: int = 4096
    pixels: tuple[int, str] | None = None
    queue: int = 1024
    drafts: int = 0
    likely: int = 0

    def __post_init__(self) -> None:
        counts = (self.slots, self.steps, self.alone, self.lanes, self.reads, self.pictures, self.queue)
        sizes = (*counts, *self.chunks, *self.patches)
        if not self.chunks or not self.patches or min(sizes) < 1 or self.length < 2:
            raise UserError(f"{self}: sizes are at least 1, and a row holds 2 tokens or more")
        if self.drafts < 0 or self.likely < 0:
            raise UserError(f"drafts={self.drafts}, likely={self.likely}: numbers of tokens; 0 for none")
        if any(n % 4 for n in self.patches):
            raise UserError(f"patches={self.patches}: rows of the encoder hold whole blocks of 4 patches")


@dataclasses.dataclass
class Counts:
    """What the engine has done, in tokens: read (of prompts), reused (not read again), drawn, and `places`, rows times
    steps of decoding, of which those without a running row stood idle; and calls of decode, and pictures encoded.

    passes: steps of running rows. Of the k-th draft of each, reached[k]: times it was judged, all before it being kept
    and the answer not over; accepted[k]: times it was kept.
    """

    read: int = 0
    reused: int = 0
    drawn: int = 0
    places: int = 0
    calls: int = 0
    encoded: int = 0
    passes: int = 0
    reached: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    accepted: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    def copy(self) -> Counts:
        return dataclasses.replace(self, reached=self.reached.copy(), accepted=self.accepted.copy())

    def since(self, before: Counts) -> Counts:
        """What was done after `before`, a copy."""
        return Counts(*(getattr(self, x.name) - getattr(before, x.name) for x in dataclasses.fields(self)))

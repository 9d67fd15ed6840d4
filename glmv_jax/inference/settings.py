"""The sizes of an engine, and what it counts."""

from __future__ import annotations

import dataclasses

from glmv_jax.typing import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes, each of which is part of a compiled program.

    slots:    rows that decode together.               length: tokens of a prompt and its answer, at most.
    steps:    tokens that a call decodes, after which the host is asked.
    chunks:   lengths of the pieces that prompts are read in; a piece takes the smallest that holds it.
    reads:    pieces that are read between two calls of decode while rows wait for it, at most.
    patches:  lengths of the rows that pictures are encoded in.       pictures: visual tokens that are kept.
    pixels:   numbers of a patch and their type, as the data gives them: bytes of a still picture, unless given.
    queue:    requests that may wait for a row; more are refused (`requests.Busy`).
    drafts:   tokens that the MTP head drafts a step of decoding; 0 for none.
    """

    slots: int = 8
    length: int = 1024
    steps: int = 8
    chunks: tuple[int, ...] = (16, 64, 256)
    reads: int = 4
    patches: tuple[int, ...] = (256, 1024)
    pictures: int = 4096
    pixels: tuple[int, str] | None = None
    queue: int = 1024
    drafts: int = 0

    def __post_init__(self) -> None:
        sizes = (self.slots, self.steps, self.reads, self.pictures, self.queue, *self.chunks, *self.patches)
        if not self.chunks or not self.patches or min(sizes) < 1 or self.length < 2:
            raise UserError(f"{self}: sizes are at least 1, and a row holds 2 tokens or more")
        if self.drafts < 0:
            raise UserError(f"drafts={self.drafts}: a number of drafts; 0 for none")
        if any(n % 4 for n in self.patches):
            raise UserError(f"patches={self.patches}: rows of the encoder hold whole blocks of 4 patches")


@dataclasses.dataclass
class Counts:
    """What the engine has done, in tokens: read (of prompts), reused (not read again), drawn, and `places`, rows times
    steps of decoding, of which those without a running row stood idle; and calls of decode, and pictures encoded."""

    read: int = 0
    reused: int = 0
    drawn: int = 0
    places: int = 0
    calls: int = 0
    encoded: int = 0

"""A row's patches in slices, one for each rank of a context or tensor group, cut where the row is made.

A rank that takes its slice out of the whole row in the forward pass has held the whole row. Here the cuts are known
from the images' sizes, before there is a row, so a process makes the slices of its own ranks and nothing else (paper,
section 2.4). Slices are of one static size, a share of the row's budget, and each has its padding at its own end: no
rank gets the images while another gets the padding.

A cut falls between merge groups (four consecutive patches, one visual token), so the merger needs no patch of another
rank. It falls between frames where the slices' size leaves the choice, and then attention, which never leaves a frame,
needs none either. The slices side by side are again a legal row; `Cut.rows` says where its visual tokens went.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from glmv_jax.typing import UserError

GROUP = 4  # patches of a merge group


@dataclasses.dataclass(frozen=True)
class Slices:
    """Into how many slices rows are cut, and which of them this process makes (None: all)."""

    ranks: int = 1
    own: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if wrong := [r for r in self.made if not 0 <= r < self.ranks]:
            raise UserError(f"slice {wrong[0]} of {self.ranks} does not exist; they count from 0")

    @property
    def made(self) -> tuple[int, ...]:
        """The slices that this process makes."""
        return tuple(range(self.ranks)) if self.own is None else self.own


WHOLE = Slices()


@dataclasses.dataclass(frozen=True)
class Cut:
    """Rank r holds patches starts[r] to starts[r + 1] of the row's images, in a slice of `size`.

    starts: [N + 1] multiples of GROUP, from 0 to the number of patches, not falling; slices may be empty.
    """

    starts: tuple[int, ...]
    size: int

    @property
    def ranks(self) -> int:
        return len(self.starts) - 1

    def places(self) -> np.ndarray:
        """[P] int: where each patch of the images stands in the slices side by side."""
        patch_P = np.arange(self.starts[-1])
        rank_P = np.searchsorted(self.starts, patch_P, "right") - 1  # of empty slices that start there, the last
        return rank_P * self.size + patch_P - np.asarray(self.starts)[rank_P]

    def rows(self, image_row: np.ndarray) -> np.ndarray:
        """`TokenInput.image_row` of the uncut row (any shape, -1 for text) -> that of the slices side by side."""
        if self.ranks == 1:
            return image_row
        moved_M = np.append(self.places()[::GROUP] // GROUP, -1).astype(image_row.dtype)  # -1 finds the last
        return moved_M[image_row]

    def take(self, pieces: Iterable[np.ndarray], out: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
        """Copies into `out` what the slices of `ranks` hold of `pieces`, and returns it.

        pieces: arrays [p, ...] that make up the row, image after image. out: [len(ranks) * size, ...], its padding is
        left as it is.
        """
        first = 0
        for piece in pieces:
            for number, rank in enumerate(ranks):
                low, high = max(first, self.starts[rank]), min(first + len(piece), self.starts[rank + 1])
                if low < high:
                    at = number * self.size + low - self.starts[rank]
                    out[at:at + high - low] = piece[low - first:high - first]
            first += len(piece)
        return out

    def joined(self, slices: np.ndarray) -> np.ndarray:
        """What all slices side by side, [N * size, ...], hold, in the images' order and without padding: [P, ...]."""
        return slices[self.places()]

    def crossings(self, frames: Sequence[int]) -> int:
        """Frames that a cut goes through: those whose attention needs other ranks."""
        ends = np.cumsum(frames)
        inside = [s for s in set(self.starts[1:-1]) if s not in {0, *ends.tolist()}]
        return len(set(np.searchsorted(ends, inside, "right").tolist()))


def cut(frames: Sequence[int], ranks: int, budget: int) -> Cut:
    """Where to cut a row of images for `ranks` ranks.

    Args:
      frames: patches of each frame (a still image, or a pair of frames of a film), in the row's order.
      budget: patches of the row, padding counted. A slice has budget / ranks.

    Cuts are even, and each is moved to the nearest end of a frame that leaves no slice too full.
    Raises: UserError when the budget does not come in `ranks` slices of whole merge groups, when a frame does not
      consist of such groups, or when the row does not fit.
    """
    if ranks == 1:
        return Cut((0, sum(frames)), budget)
    if ranks < 1 or budget % (GROUP * ranks):
        unit = GROUP * max(ranks, 1)
        raise UserError(f"a row of {budget} patches does not come in {ranks} slices of whole merge groups ({GROUP} "
                        f"patches); try data.patches={max(-(-budget // unit), 1) * unit}")
    if wrong := [n for n in frames if n % GROUP]:
        raise UserError(f"a frame of {wrong[0]} patches has no whole merge groups of {GROUP}; size images in blocks")
    size, ends = budget // ranks, np.cumsum([0, *frames])
    total = int(ends[-1])
    if total > budget:
        raise UserError(f"{total} patches do not fit a row of {budget}; enlarge it")
    starts = [0]
    for left in range(ranks, 1, -1):  # ranks that the rest is for
        start = starts[-1]
        even = start + GROUP * -(-(total - start) // (GROUP * left))
        low, high = max(start, total - size * (left - 1)), min(start + size, total)
        possible = ends[(ends >= low) & (ends <= high)]
        starts.append(int(possible[np.abs(possible - even).argmin()]) if len(possible) else even)
    return Cut((*starts, total), size)

"""Images to rows of the encoder's own, on all devices of this process, whichever rows of text they belong to.

A batch's rows are as long in patches as the fullest of them needs, and an encoder that is fed these computes what the
others lack as padding. Here the images of a process' rows (of films the frames, which attention never leaves) go to
rows that the encoder has for itself: each whole, to the emptiest row when its document is placed, and at the end moved
until rows are even. All devices encode, those of the mesh's axes `context` and `tensor` too, and each is given its own
rows and no others, so no patch crosses a link (paper, section 2.4). Visual tokens do, to the devices that have their
text: `models.home`, by what is decided here on the host,

    sent [V, M] int32   for each visual token of the encoder's rows: device * places + place, which of this process'
                        devices it goes to, and where among the `places` visual tokens that this one gets; -1 for none

The devices that share a row of text get as many of its visual tokens each; what comes to one lies in the order of the
devices that sent it. `image_row` counts in the places of all of these devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from glmv_jax.data import balancing
from glmv_jax.data.partition import GROUP
from glmv_jax.typing import UserError

Image = tuple[np.ndarray, np.ndarray]  # patches [P, C], yx [P, 2]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """rows, patches: rows of the encoder that this process makes of a batch, and patches of one.

    devices, ranks: of the process; devices / ranks of them share rows of text. places: visual tokens a device gets.
    Raises: UserError when rows do not divide over devices, or patches into visual tokens.
    """

    rows: int
    patches: int
    devices: int = 1
    ranks: int = 1
    places: int = 1 << 30

    def __post_init__(self) -> None:
        if self.patches < GROUP or self.patches % GROUP:
            fits = max(1, -(-self.patches // GROUP)) * GROUP
            raise UserError(f"data.dispatch.patches={self.patches} is no number of merge groups; try {fits}")
        if self.rows < 1 or self.rows % self.devices:
            fits = max(1, -(-self.rows // self.devices)) * self.devices
            raise UserError(f"data.dispatch.rows: {self.rows} of a process do not divide over its {self.devices} "
                            f"devices; try {fits}")  # fmt: skip


class Filling:
    """The encoder's rows of one batch, while documents are placed. row: that of each image so far."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._sizes: list[int] = []
        self.row: list[int] = []

    def add(self, images: Sequence[Image]) -> list[int] | None:
        """The images' numbers in `row`; None when they do not all have room, and then none is taken.

        They go to the emptiest rows, the largest first; where that fails all images of the batch are placed anew.
        """
        sizes = [*self._sizes, *(len(patches) for patches, _ in images)]
        row = self._placed(sizes, self.row) or self._placed(sizes, [])
        if row is None:
            return None
        numbers = list(range(len(self._sizes), len(sizes)))
        self._sizes, self.row = sizes, row
        return numbers

    def evened(self) -> np.ndarray:
        """`row` after moves between rows until they are even."""
        size_N1, limit = np.array(self._sizes, np.int64)[:, None], np.array([self._encoder.patches])
        return balancing.evened(np.array(self.row, np.int64), size_N1, limit, self._encoder.rows)

    def _placed(self, sizes: list[int], given: list[int]) -> list[int] | None:
        filled_V = np.bincount(given, sizes[: len(given)], minlength=self._encoder.rows)
        if sum(sizes) > self._encoder.patches * self._encoder.rows:
            return None
        row = given + [0] * (len(sizes) - len(given))
        for n in sorted(range(len(given), len(sizes)), key=lambda n: -sizes[n]):
            row[n] = int(filled_V.argmin())
            filled_V[row[n]] += sizes[n]
            if filled_V[row[n]] > self._encoder.patches:
                return None
        return row


def arrays(
    encoder: Encoder, row_N: np.ndarray, images: Sequence[Sequence[Image]], image_row_BT: np.ndarray, channels: int
) -> dict[str, np.ndarray]:
    """patches, yx, frame, sent of the encoder's rows, and the batch's `image_row`.

    images: of each row of text, in order; equal runs of rows of text are those of a rank. row_N: the encoder's row of
    each, row of text after row of text. image_row_BT: as `TokenInput` has it, counting in the visual tokens of a row.
    """
    all_ = [image for own in images for image in own]
    home_N = np.repeat(np.arange(len(images)), [len(own) for own in images])
    size_N = np.array([len(patches) for patches, _ in all_], np.int64)

    V, Q = encoder.rows, encoder.patches
    made: dict[str, np.ndarray] = {"patches": np.zeros((V, Q, channels), np.uint8), "yx": np.zeros((V, Q, 2), np.int32),
            "frame": np.zeros((V, Q), np.int32)}  # fmt: skip
    start_N, filled_V, number_V = np.zeros(len(all_), np.int64), np.zeros(V, np.int64), np.zeros(V, np.int32)
    for n, ((patches, yx), row) in enumerate(zip(all_, row_N)):
        start_N[n], filled_V[row] = filled_V[row], filled_V[row] + size_N[n]
        number_V[row] += 1
        here = slice(start_N[n], filled_V[row])
        made["patches"][row, here], made["yx"][row, here], made["frame"][row, here] = patches, yx, number_V[row]

    # From here on everything is about visual tokens, in the order of rows of text and of their images.
    merged_N = size_N // GROUP
    home_M = np.repeat(home_N, merged_N)
    slot_M = _counted((row_N * Q + start_N) // GROUP, merged_N)
    rank_M = home_M // max(1, len(images) // encoder.ranks)
    share_M = _numbered(rank_M, encoder.ranks) // encoder.places  # which of the devices that share its row
    device_M = rank_M * (encoder.devices // encoder.ranks) + share_M
    place_M = np.zeros_like(slot_M)
    order_M = np.lexsort((slot_M, device_M))
    place_M[order_M] = _numbered(device_M[order_M], encoder.devices)
    sent = np.full(V * Q // GROUP, -1, np.int32)
    sent[slot_M] = device_M * encoder.places + place_M
    first_B = np.searchsorted(home_M, np.arange(len(images)))
    at_M = np.append(share_M * encoder.places + place_M, -1)
    moved_BT = at_M[np.where(image_row_BT >= 0, first_B[:, None] + image_row_BT, -1)]
    return made | {"sent": sent.reshape(V, -1), "image_row": moved_BT.astype(image_row_BT.dtype)}


def _counted(first_N: np.ndarray, count_N: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... (count[0] of them), first[1], ..."""
    return np.repeat(first_N - np.cumsum(count_N) + count_N, count_N) + np.arange(count_N.sum())


def _numbered(group_M: np.ndarray, groups: int) -> np.ndarray:
    """0, 1, ... in each run of equal numbers below `groups`, which do not fall."""
    counts = np.bincount(group_M, minlength=groups)
    return np.arange(len(group_M)) - (np.cumsum(counts) - counts)[group_M]

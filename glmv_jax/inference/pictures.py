"""The table of visual tokens, seen from the host: which picture's are where, and rows of pictures yet to be encoded.

A picture that is in the table is not encoded again, whoever shows it. The least recently used ones make room.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

import numpy as np

from glmv_jax.inference.requests import MERGE, Picture, Prompt
from glmv_jax.typing import UserError, VisionInput


class PictureTable:
    """Places of visual tokens on the device: `each` for every prompt that is read at once, `lanes` in each of `shards`
    shards.

    rows: lengths in patches of the encoder's rows, rising, of which `shards` are encoded at once, or `lanes` times as
    many if so many are wanted (`at_once`).
    """

    def __init__(self, each: int, rows: Sequence[int], shards: int, lanes: int = 1) -> None:
        self.each, self.size, self.rows = each, each * shards * lanes, tuple(sorted(rows))
        self.at_once = tuple(sorted({shards, shards * lanes}))
        self.clear()

    def clear(self) -> None:
        """Forgets all pictures: the encoder has changed."""
        self._free = list(range(self.size))
        self._places: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()

    def check(self, prompt: Prompt) -> None:
        """UserError for a prompt whose pictures have no room."""
        longest = max((len(picture.patches) for picture in prompt.pictures), default=0)
        if longest > self.rows[-1]:
            raise UserError(f"an image of {longest} patches does not fit the encoder's rows of {self.rows[-1]}; shrink "
                            "the image or raise Settings.patches")  # fmt: skip
        tokens = sum(picture.merged for picture in {p.digest: p for p in prompt.pictures}.values())
        if tokens > self.each:
            raise UserError(f"the prompt's images are {tokens} visual tokens and the engine holds {self.each}; show "
                            "fewer or raise Settings.pictures")  # fmt: skip

    def missing(self, pictures: Sequence[Picture]) -> Iterator[tuple[VisionInput, np.ndarray]]:
        """Gives places to those pictures that have none, and yields what is to be encoded for it: rows of patches
        [R, P], and the place of each of their visual tokens [R, P / 4], out of bounds for padding; R is of `at_once`.

        pictures: of at most `lanes` prompts a shard. Afterwards all are in the table until others are asked for.
        """
        wanted = {picture.digest: picture for picture in pictures}
        for digest in wanted:
            if digest in self._places:
                self._places.move_to_end(digest)
        new = [picture for digest, picture in wanted.items() if digest not in self._places]
        for picture in new:
            while len(self._free) < picture.merged:  # those wanted are the most recent; `check` says that they fit
                self._free += self._places.popitem(last=False)[1].tolist()
            self._places[picture.digest] = np.array([self._free.pop() for _ in range(picture.merged)], np.int32)
        waiting = collections.deque(sorted(new, key=lambda picture: -len(picture.patches)))
        while waiting:
            length = next(n for n in self.rows if n >= len(waiting[0].patches))
            yield self._rows(waiting, length)

    def _rows(self, waiting: collections.deque[Picture], length: int) -> tuple[VisionInput, np.ndarray]:
        """As many of them as these rows hold, each a frame of its own."""
        most = sum(len(picture.patches) for picture in waiting)
        R = self.at_once[-1 if 2 * most > self.at_once[-1] * length else 0]
        rows, place = self.empty(R, length, waiting[0].patches.shape[1], waiting[0].patches.dtype)
        filled, frames = np.zeros(R, int), 0
        while waiting and filled.min() + len(waiting[0].patches) <= length:
            picture, row = waiting.popleft(), int(filled.argmin())
            start, count, frames = filled[row], len(picture.patches), frames + 1
            here = slice(start, start + count)
            rows.patches[row, here], rows.yx[row, here], rows.frame[row, here] = picture.patches, picture.yx, frames
            place[row, start // MERGE : (start + count) // MERGE] = self._places[picture.digest]
            filled[row] += count
        return rows, place

    def empty(self, rows: int, length: int, channels: int, dtype: str | np.dtype) -> tuple[VisionInput, np.ndarray]:
        """Rows without a picture, as `missing` yields them."""
        shape = (rows, length)
        vision = VisionInput(np.zeros((*shape, channels), dtype), np.zeros((*shape, 2), np.int32),
                             np.zeros(shape, np.int32))  # fmt: skip
        return vision, np.full((rows, length // MERGE), self.size, np.int32)

    def places(self, prompt: Prompt) -> np.ndarray:
        """int32 [T]: the place of each image token's visual token, -1 for text. All pictures have to be there."""
        found = np.full(len(prompt.tokens), -1, np.int32)
        if prompt.pictures:
            at = np.flatnonzero(prompt.image_row >= 0)
            all_of_them = np.concatenate([self._places[picture.digest] for picture in prompt.pictures])
            found[at] = all_of_them[prompt.image_row[at]]
        return found

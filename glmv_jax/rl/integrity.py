"""Nothing is trained on but the very ids that were drawn and the very pixels they were drawn from.

Training on an answer with another image, or none, runs without a sign of trouble, so it must not start. An image gets
its hash where its pixels are made: a question's in the loader beside its patches (`data.pipeline`), an observation's as
it is written into the conversation (`transcript`). Where that is not the process that made it, it has another one from
there (`sealed`), which is looked at before it gets its own (`check_sealed`). The hash goes with the record, and is
looked at

    where a prompt is handed to the engine       `check_prompt`
    where an update is handed to the devices     `checked`, which takes "shown" off

and what is looked at are the arrays that go there: pixels by `image_row`, as the model finds them. Packing says in
"shown" what is where, and is not looked at by itself: whatever goes wrong up to the devices, the last look sees it. All
of it is done on the host; the step's is a hash of its pixels, 1 ms a megabyte, and some 10 us an answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from glmv_jax.data.hashes import image_hash, picture_hash
from glmv_jax.rl.gym import Observation
from glmv_jax.typing import Batch

if TYPE_CHECKING:
    from glmv_jax.rl.rollout import Rollout

MERGE = 4  # patches of a merged visual token


class Shown(NamedTuple):
    """Where a rollout stands in a row: tokens it shares with others, with their images, and its own behind them."""

    rollout: Rollout
    shared: slice
    own: slice


def sealed(observation: Observation) -> Observation:
    """The same with the hashes of its images, for a way between processes."""
    return dataclasses.replace(observation, hashes=tuple(map(picture_hash, observation.images)))


def check_sealed(observation: Observation) -> None:
    """ValueError for images that are not those that were `sealed`, or for their order or number."""
    born = observation.hashes
    if born is not None and (found := tuple(map(picture_hash, observation.images))) != born:
        raise ValueError(f"its images came as {', '.join(found) or 'none'} but were made, in another process, as "
                         f"{', '.join(born) or 'none'}; see to what carries them")  # fmt: skip


def column(rows: Sequence[Sequence[Shown]]) -> np.ndarray:
    """The array "shown", object [B], of the tuples of `Shown` of each row."""
    shown = np.empty(len(rows), object)
    shown[:] = [tuple(row) for row in rows]
    return shown


def seen(image_row: np.ndarray, vision: Mapping[str, np.ndarray]) -> str:
    """The hashes of the images at these tokens, in their order, with commas between them; "" for none.

    image_row: int [T], of one row or a part of it. vision: that row's patches, yx and frame.
    """
    merged = image_row[image_row >= 0]
    if not len(merged):
        return ""
    patches = (merged[:, None] * MERGE + np.arange(MERGE)).reshape(-1)
    frames = vision["frame"][patches]
    images = np.split(patches, np.flatnonzero(np.diff(frames)) + 1)
    return ",".join(image_hash(vision["patches"][at], vision["yx"][at]) for at in images)


def ids_hash(ids: np.ndarray) -> str:
    """Of token ids."""
    return hashlib.blake2b(np.ascontiguousarray(ids, np.int32).data, digest_size=8).hexdigest()


def check_prompt(batch: Batch, row: int) -> str:
    """The hashes of the images of a prompt, of a batch with "samples" and "hashes"; ValueError where the row's arrays
    would show others."""
    born, vision = ",".join(batch["hashes"][row]), {name: batch[name][row] for name in ("patches", "yx", "frame")}
    found = seen(batch["image_row"][row][: batch["length"][row]], vision)
    if found != born:
        raise ValueError(
            f"prompt {batch['samples'][row].id}: its row shows image {found or 'none'} but it was made with image "
            f"{born or 'none'}; keep rows and samples of a prompt batch together"
        )
    return born


def handed(prompt: np.ndarray, images: str) -> dict[str, str]:
    """What an engine says of a prompt that it was handed, for `check_handed`. images: see `seen`."""
    return {"prompt": ids_hash(prompt), "images": images}


def check_handed(id: str, said: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """ValueError unless an engine was `handed` the prompt that would be trained on. id: of the prompt."""
    if wrong := [name for name, value in wanted.items() if said[name] != value]:
        name = wrong[0]
        raise ValueError(
            f"prompt {id}: the engine was handed {name} {said[name] or 'none'} but {wanted[name] or 'none'} would be "
            "trained on; the engine's rows and the trainer's have to be the same"
        )


def check_row(row: Mapping[str, np.ndarray], shown: Sequence[Shown]) -> None:
    """ValueError, with the id of the rollout, unless a row of an update shows exactly these: ids that were drawn or
    asked, learnt where they were drawn, and every image that they were drawn from, in order and whole."""
    wanted, learnt, there = (np.zeros(len(row["tokens"]), dtype) for dtype in (np.int64, bool, bool))
    pixels: dict[tuple[int, int], str] = {}  # what shared tokens show
    for rollout, shared, own in shown:
        said, asked = own.stop - len(rollout.answer), shared.stop - shared.start
        if not np.array_equal(row["tokens"][shared], rollout.prompt[:asked]):  # now, as others have their own there
            raise ValueError(_OTHER_TOKENS.format(id=rollout.id))
        wanted[shared] = rollout.prompt[:asked]
        wanted[own] = np.concatenate([rollout.prompt[asked:], rollout.answer])
        learnt[said : own.stop] = rollout.own
        there[shared] = there[own] = True
        if (place := (shared.start, shared.stop)) not in pixels:
            pixels[place] = seen(row["image_row"][shared], row)
        found = ",".join(filter(None, (pixels[place], seen(row["image_row"][own], row))))
        if found != rollout.image_hash:
            raise ValueError(
                f"rollout {rollout.id}: the training row shows image {found or 'none'} but the answer was drawn from "
                f"image {rollout.image_hash or 'none'}; pass the prompt batch that the rollouts were made from, and "
                "keep a record's images with it"
            )
    if (wrong := there & (row["tokens"] != wanted)).any():
        raise ValueError(_OTHER_TOKENS.format(id=_whose(wrong, shown)))
    if (wrong := there & ((row["loss_weight"] > 0) != learnt)).any():
        raise ValueError(f"rollout {_whose(wrong, shown)}: what is learnt of it is not what was drawn; change no "
                         "loss_weight behind the packing")  # fmt: skip
    _check_rest(row, there, [rollout.id for rollout, _, _ in shown])


_OTHER_TOKENS = (
    "rollout {id}: the training row holds other tokens than were asked and drawn; pass the prompt batch that the "
    "rollouts were made from, and change nothing behind the packing"
)


def _whose(wrong_T: np.ndarray, shown: Sequence[Shown]) -> str:
    """The id of the rollout that the first of these places belongs to."""
    return next(one.rollout.id for one in shown if wrong_T[one.shared].any() or wrong_T[one.own].any())


def _check_rest(row: Mapping[str, np.ndarray], there: np.ndarray, ids: Sequence[str]) -> None:
    """ValueError for learnt tokens and pixels of nobody, and for two images that would see each other."""
    own = row["image_row"][there]
    if (row["loss_weight"][~there] != 0).any() or (own >= 0).sum() * MERGE != (row["frame"] > 0).sum():
        raise ValueError(f"a training row has tokens or pixels of none of its rollouts ({', '.join(ids) or 'none'})")
    merged = own[own >= 0]
    frames = row["frame"][merged * MERGE]
    starts = np.flatnonzero(np.diff(frames, prepend=0))
    if len(np.unique(frames[starts])) != len(starts):
        raise ValueError(f"two images of a training row have one frame number; its rollouts are {', '.join(ids)}")


def checked(batch: Batch) -> dict[str, Any]:
    """The arrays of an update for the devices, without "shown", after `check_row` of each row: ValueError."""
    arrays = {name: x for name, x in batch.items() if name != "shown"}
    for b, shown in enumerate(batch["shown"]):
        check_row({name: x[b] for name, x in arrays.items()}, shown)
    return arrays

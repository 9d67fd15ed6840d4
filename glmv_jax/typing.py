"""Shared types and the legend of shape letters.

Arrays carry their shape as a suffix of capital letters (`q_BTHK`). One legend for the whole package:

    B  batch rows            T  tokens of a text row       S  keys a query can attend to
    P  image patches         M  merged visual tokens (P / 4)
    D  model width           F  MLP hidden width           V  vocabulary
    H  query heads           G  key/value heads            K  width of one head
    L  stacked layers        C  channels of a feature      E  embedding width (stage 2)
    N  images or rollouts    I  input width of a matrix    O  output width of a matrix

`Params` is a plain nested dict of arrays; `Axes` is the same tree with a tuple of logical axis names a leaf
(the closed vocabulary is in `glmv_jax.parallel.axes`).

`X | Any` is an X where who reads it knows that it is there, and None elsewhere: what an X has is checked, whether it is
there is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

Params: TypeAlias = dict[str, Any]
Axes: TypeAlias = dict[str, Any]
Batch: TypeAlias = dict[str, Any]


class UserError(Exception):
    """Something the person at the keyboard can mend: the message is one line, names the boundary and the remedy.

    The command line prints it without a traceback and exits with 2; every other exception is a bug and is shown whole.
    """


# Of pixels in [0, 1], by channel: what CogViT was trained with (OpenAI's CLIP preprocessing).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionInput(NamedTuple):
    """Rows of image patches. Four consecutive patches are one 2x2 merge block, so any cut at a multiple of 4 is legal.

    patches: [B, P, 3*p*p] uint8, the pixels of still images, layout (channel, y, x) inside a patch; the tower
             normalises them and repeats a still frame as often as its patches have frames. Or [B, P, 3*t*p*p] uint8,
             where some are of films, layout (channel, frame, y, x); or such as the public processors give, float and
             normalised with CLIP_MEAN and CLIP_STD.
    yx:      [B, P, 2] int, patch coordinates inside its frame (row, column).
    frame:   [B, P] int, 0 = padding; one id a frame (a still image is one frame): attention never crosses it.
    """

    patches: Any
    yx: Any
    frame: Any


class Dispatched(NamedTuple):
    """Images in V rows of the encoder's own, and where their visual tokens go, see `models.home`.

    sent:   [V, M] int, device * places + place for each of the M = P / 4 visual tokens of a row, -1 for padding.
    places: an int, how many visual tokens a device gets.
    """

    rows: VisionInput
    sent: Any
    places: int


class TokenInput(NamedTuple):
    """Rows of packed text.

    tokens:      [B, T] int token ids.
    positions:   [B, T, 3] int rotary positions (time, height, width); text has three equal numbers.
    segments:    [B, T] int, 0 = padding; attention never crosses a segment.
    image_row:   [B, T] int: for an `<|image|>` position the index, within the same batch row, of the merged visual
                 token it takes; else -1. Where images are `Dispatched`, among all that the
                 devices get which share the row.
    loss_weight: [B, T] float, the weight of predicting the token AT this position (0 for prompts, images, padding),
                 or None where no loss is taken.
    branches:    [B, T] int or None: answers that share a prompt. In a segment, what has branch 0 (the prompt) is seen
                 by all that follows, any other branch (an answer) only by itself. None: every segment is one text.
    """

    tokens: Any
    positions: Any
    segments: Any
    image_row: Any
    loss_weight: Any = None
    branches: Any = None

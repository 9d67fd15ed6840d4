"""Films as pairs of frames with their times, sampled as GLM-4.6V and GLM-OCR do.

A patch of the tower has two frames (`temporal_patch`), so frames are taken in pairs; each pair is an image of its own
for the language model, with its time written after it, and no attention of the tower leaves it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from glmv_jax.typing import UserError

# Up to so many seconds a film has so many pairs of frames a second (transformers 5
# `models/glm46v/video_processing_glm46v.py`).
RATES = ((30.0, 3.0), (300.0, 1.0), (2400.0, 0.5))
MOST_FRAMES = 640


def sampled(frames: int, rate: float, seconds: float, most: int = MOST_FRAMES) -> list[int]:
    """Numbers of the frames that are shown, rising, of an even count: the last may come twice.

    frames: of the film. rate: its frames a second. seconds: its length. most: shown at most; the processor's own is
    MOST_FRAMES. With that it is `sample_frames` of GLM-4.6V's video processor, which gives nothing below a third of a
    second.
    """
    pairs_a_second = next((r for longest, r in RATES if seconds <= longest), RATES[-1][1])
    wanted = max(2, min(int(min(seconds, RATES[-1][0]) * pairs_a_second * 2), most))
    step = 1 / (pairs_a_second * 2)
    shown: list[int] = []
    if frames >= wanted:
        due = 0.0
        for number in range(frames):
            if number * (1 / rate) >= due:  # in their rounding
                due += step
                shown.append(number)
                if due >= int(seconds):
                    break
    if len(shown) != wanted:  # too few frames, or rounding gave some more or less: evenly over what there is
        first, last = (shown[0], shown[-1]) if 0 < len(shown) < wanted else (0, max(frames - 1, 0))
        shown = np.linspace(first, last, wanted, dtype=int).tolist()
    shown = sorted(set(shown))
    return shown + shown[-1:] if len(shown) % 2 else shown


def frame_pairs(content: bytes, most: int = MOST_FRAMES) -> Iterator[tuple[float, Image.Image, Image.Image]]:
    """(time of the first in seconds, first frame, second frame) of a film's bytes, in order.

    most: frames at most. UserError: no film, a broken one, or PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise UserError("reading films needs PyAV; pip install 'glmv_jax[data]'") from None
    try:
        with av.open(io.BytesIO(content)) as file:
            if not file.streams.video:
                raise UserError("the film has no pictures")
            stream = file.streams.video[0]
            rate = float(stream.average_rate or 0) or 24.0
            count = stream.frames or sum(1 for _ in file.decode(stream))
        shown = sampled(count, rate, count / rate, most)
        with av.open(io.BytesIO(content)) as file:
            wanted, pictures = set(shown), {}
            for number, frame in enumerate(file.decode(file.streams.video[0])):
                if number in wanted:
                    pictures[number] = frame.to_image()
                if number == shown[-1]:
                    break
    except av.error.FFmpegError as error:
        raise UserError(f"the film is broken or cut short ({error.strerror}); copy or convert it again") from None
    if missing := wanted - pictures.keys():
        raise UserError(f"the film is cut short: {len(missing)} of its {count} frames are missing")
    for first, second in zip(shown[::2], shown[1::2]):
        yield first / rate, pictures[first].convert("RGB"), pictures[second].convert("RGB")

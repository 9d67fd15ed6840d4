"""Films as groups of frames with their times, sampled as the public processors do.

A patch of the tower has `temporal_patch` frames, two in every public model, so frames are taken in groups of so many;
each group is an image of its own for the language model, with its time written after it, and no attention of the tower
leaves it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Self

import numpy as np
from PIL import Image

from glmv_jax.data.naflex import MAX_PIXELS
from glmv_jax.typing import UserError

# Up to so many seconds a film has so many groups of frames a second (transformers 5
# `models/glm46v/video_processing_glm46v.py`).
RATES = ((30.0, 3.0), (300.0, 1.0), (2400.0, 0.5))
MOST_FRAMES = 640
# FFmpeg would also take playlists, which name other files and addresses, and descriptions of streams on the network.
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif"
MAX_DECODED = 1 << 39  # pixels of all frames: three hours in 1920x1080, which take a processor half an hour
MAX_FRAMES = 1 << 20  # twelve hours; what says that it has more lies
Sample = Callable[[int, float, float], Sequence[int]]  # (frames, frames a second, seconds) -> numbers of those shown


def sampled(frames: int, rate: float, seconds: float, most: int = MOST_FRAMES, group: int = 2) -> list[int]:
    """Numbers of the frames that are shown, rising, in whole groups: the last may come several times.

    frames: of the film. rate: its frames a second. seconds: its length. most: shown at most; the processor's own is
    MOST_FRAMES. With that it is `sample_frames` of GLM-4.6V's video processor, which gives nothing below a third of a
    second.
    """
    groups_a_second = next((r for longest, r in RATES if seconds <= longest), RATES[-1][1])
    wanted = max(group, min(int(min(seconds, RATES[-1][0]) * groups_a_second * group), most))
    step = 1 / (groups_a_second * group)
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
    return _grouped(shown, group)


def sampled_at(
    frames: int, rate: float, seconds: float, a_second: float = 2.0, longest: float = 300.0, group: int = 2
) -> list[int]:
    """As `sampled`, at an even rate: `sample_frames` of GLM-4.1V's video processor.

    a_second: frames that are shown of a second; of a film of more than `longest` seconds as many as of one so long.
    """
    if seconds <= longest:
        shown = [math.ceil(i * rate / a_second) for i in range(max(1, math.floor(seconds * a_second)))]
    elif (wanted := int(longest * a_second)) >= frames:
        shown = list(range(frames))
    else:
        shown = [math.ceil(at * rate) for at in np.linspace(0, seconds, wanted)]
    return _grouped([min(number, frames - 1) for number in shown], group)


def _grouped(shown: Sequence[int], group: int) -> list[int]:
    shown = sorted(set(shown))
    return shown + shown[-1:] * (-len(shown) % group)


def frame_groups(
    content: bytes, sample: Sample = sampled, group: int = 2
) -> Iterator[tuple[float, list[Image.Image]]]:
    """(time of the first in seconds, its `group` RGB frames) of the groups of frames of a film's bytes, in order, each
    as soon as it is decoded.

    UserError: no film, a broken one, or PyAV is not installed.
    """
    with _opened(content) as (file, stream):
        rate = stream.average_rate or Fraction(24)
        count = stream.frames or sum(1 for _ in _frames(file, stream))
        most = min(MAX_FRAMES, MAX_DECODED // max(1, stream.width * stream.height))
    if not 0 < count <= most:
        said = f"{count:,} frames, more than the {most:,} that are read; cut it" if count else "no pictures"
        raise UserError(f"the film has {said}")
    shown, frames, at = list(sample(count, float(rate), float(count / rate))), [], 0
    with _opened(content) as (file, stream):
        for number, frame in enumerate(_frames(file, stream)):
            if number != shown[at]:
                continue
            picture = frame.to_image()
            while at < len(shown) and shown[at] == number:  # the last may come several times
                frames.append(picture)
                at += 1
            if at == len(shown):
                break
            if len(frames) == group:
                yield shown[at - group] / float(rate), frames
                frames = []
    if at < len(shown):
        raise UserError(f"the film is cut short: the last {len(shown) - at} of its frames that are shown are missing")
    yield shown[-group] / float(rate), frames


def check(content: bytes, pixels: int, frames: int) -> None:
    """UserError for a film of more pixels a frame or of more frames, as its head says, and as `frame_groups`.

    A frame of several megapixels counts as so many, as it takes as much longer to decode.
    """
    with _opened(content) as (file, stream):
        if stream.width * stream.height > pixels:
            raise UserError(f"the film has frames of more than {pixels:,} pixels; make it smaller")
        most = int(frames / max(1.0, stream.width * stream.height / 2**20))
        if (stream.frames or sum(1 for _ in itertools.islice(_frames(file, stream), most + 1))) > most:
            raise UserError(f"the film has more than {most:,} frames; cut it, or make it smaller")


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[tuple[Any, Any]]:
    """A film's file and the stream of its pictures. UserError for what is wrong with it, also when it is decoded."""
    try:
        import av
    except ImportError:
        raise UserError("reading films needs PyAV; pip install 'glmv_jax[data]'") from None
    try:
        with _container(av, content) as file:
            stream = next(iter(file.streams.video), None)
            if stream is None:
                raise UserError("the film has no pictures")
            if stream.codec_context is None:
                raise UserError("the film has no pictures that can be decoded; make it an MP4")
            if stream.width * stream.height > MAX_PIXELS:
                raise UserError(f"the film has frames of {stream.width}x{stream.height} pixels; make them smaller")
            yield file, stream
    except av.error.FFmpegError as error:
        raise UserError(f"the film is broken or cut short ({error.strerror}); copy or convert it again") from None


def _container(av: Any, content: bytes) -> Any:
    try:
        return av.open(io.BytesIO(content), options={"format_whitelist": FORMATS})
    except av.error.ArgumentError:  # what FFmpeg says of a form that is not in the list
        raise UserError(f"the film is in none of the forms that are read ({FORMATS}); make it an MP4") from None


def _frames(file: Any, stream: Any) -> Iterator[Any]:
    """The frames of a film, as many as are read, none of which is larger than it says."""
    pixels = 0
    for number, frame in enumerate(file.decode(stream)):
        pixels += frame.width * frame.height
        if frame.width * frame.height > MAX_PIXELS or pixels > MAX_DECODED or number >= MAX_FRAMES:
            raise UserError("the film has more pixels or frames than are read; cut it, or make it smaller")
        yield frame


@dataclasses.dataclass(frozen=True)
class Films:
    """How a public processor shows films.

    patcher: a `PixelPatcher` with the budget of a film.   sample: which frames are shown.
    time: what is written after a group of frames, from its seconds.
    """

    patcher: Any
    sample: Sample
    time: Callable[[float], str]

    @classmethod
    def of(cls, patcher: Any, said: dict[str, Any], model_type: str) -> Self:
        """From the settings of a video processor and the model_type. UserError for one that is not known."""
        older = "Glm4vVideoProcessor" if model_type in ("glm4v", "glm4v_moe") else "Glm46VVideoProcessor"
        kind = said.get("video_processor_type", older)
        if kind == "Glm4vVideoProcessor":
            rate, longest = said.get("fps", 2), said.get("max_duration", 300)
            sample = functools.partial(sampled_at, a_second=rate, longest=longest, group=patcher.temporal)
            return cls(patcher, sample, lambda seconds: str(int(seconds)))
        if kind == "Glm46VVideoProcessor":
            sample = functools.partial(sampled, group=patcher.temporal)
            return cls(patcher, sample, lambda seconds: f"{seconds:.1f} seconds")
        raise UserError(f"video_processor_type {kind!r} is not known; only those of GLM-4.1V and GLM-4.6V are")

    def __call__(self, film: str | pathlib.Path | bytes) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
        """(its time, its patches as one image) of each group of frames of a file, or of its bytes. UserError as
        `frame_groups`, and for a file that cannot be read."""
        name, group = "the film" if isinstance(film, bytes) else f"film {str(film)!r}", self.patcher.temporal
        shown: list[int] = []

        def sample(*about: Any) -> list[int]:
            shown[:] = self.sample(*about)
            return shown

        try:
            content = film if isinstance(film, bytes) else pathlib.Path(film).read_bytes()
            for seconds, frames in frame_groups(content, sample, group):
                patcher = dataclasses.replace(self.patcher, frames=group, shown=len(shown))
                yield self.time(seconds), patcher.moving(frames)
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror}); check the path") from None
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

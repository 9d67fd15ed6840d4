"""Images to rows of patches: loading, sizing, normalising, patch order, and back to a picture.

Two sizing policies. `smart_resize` is GLM-OCR's (transformers 5 `models/glm46v/image_processing_pil_glm46v.py`):
sides rounded to the merge factor, area inside a budget. `naflex_size` is SigLIP2's NaFlex (big_vision
`pp/proj/image_text/ops_naflex.py`): the largest size of the native aspect ratio within a number of patches. Ours
rounds sides to patch * merge, not to patch, so that whole 2x2 merge blocks exist.

Patch rows come in merge-block order (H/2, W/2, 2, 2); a patch is the vector (C, ph, pw) of its pixels as they are,
uint8. Normalising them, and showing a still frame twice, is the tower's part: on the way there they are an eighth.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import math
import pathlib
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from glmv_jax.typing import UserError

MAX_ASPECT = 200
MAX_PIXELS = 1 << 26  # 67 million: an 8k page scan passes, a decompression bomb does not
# Of a JPEG, pixels times scans. Each scan of a progressive one, which may be 70 bytes, goes over all pixels again; ten
# scans are usual.
MAX_SCANNED = 1 << 30
# What Pillow is let try. Not PostScript, for which it runs a program, and none that nobody keeps pictures in.
_NEW = ("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()  # from Pillow 11.3 on
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM", *_NEW)
_STRIP = 1 << 22  # pixels that are converted at a time, where that takes much memory


# ---------------------------------------------------------------------------------------------------------- loading


def load_image(source: str | pathlib.Path | bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Any picture file, its bytes, or a PIL image -> PIL RGB, upright (EXIF), transparency on white.

    Raises UserError (one line) when the file is missing, is no image, is cut short or broken, or has more than
    `max_pixels` pixels.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    with opened(source, max_pixels) as image:
        image.load()
        return to_rgb(image)


@contextlib.contextmanager
def opened(source: str | pathlib.Path | bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The picture of a file or of its bytes as Pillow opens it, its pixels not yet decoded; UserError as `load_image`,
    also for what is raised while it is in use."""
    name = "the image bytes" if isinstance(source, bytes) else f"image {str(source)!r}"
    content = b""
    try:
        content = source if isinstance(source, bytes) else pathlib.Path(source).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
            file = Image.open(io.BytesIO(content), formats=FORMATS)
        with file as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise Image.DecompressionBombError
            if image.format in ("JPEG", "MPO") and pixels * (scans := content.count(b"\xff\xda")) > MAX_SCANNED:
                raise UserError(f"{name} has {scans} scans, which take minutes to decode; save it anew")
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name} does not exist; check the path") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); give a readable picture file") from None
    except UnidentifiedImageError:
        if b"%PDF-" in content[:1024]:
            raise UserError(f"{name} is a PDF; draw its pages as PNG first") from None
        raise UserError(f"{name} is not a picture that Pillow can read; convert it to PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} has more than {max_pixels:,} pixels; make it smaller first") from None
    except (NameError, ImportError, MemoryError):  # no file's fault
        raise
    except Exception as error:  # noqa: BLE001 - of broken bytes Pillow's readers raise whatever comes up
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} is broken or cut short ({reason}); copy or convert it again") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB: EXIF rotation applied, transparency composed on white, 16-bit scaled to 8."""
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    image = ImageOps.exif_transpose(image) if turned else image
    if image.mode == "RGB":
        return image if turned else image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, int]]:
    """(first row, row behind the last) of parts of a picture."""
    rows = max(1, _STRIP // max(1, image.width))
    return ((top, min(top + rows, image.height)) for top in range(0, image.height, rows))


def _on_white(image: Image.Image) -> Image.Image:
    rgb = Image.new("RGB", image.size)
    for top, bottom in _strips(image):
        part = image.crop((0, top, image.width, bottom)).convert("RGBA")
        rgb.paste(Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB"), (0, top))
    return rgb


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey. Only 16-bit files say what white is; the others are fitted to 1, 255 or 65535."""
    values = np.asarray(image)
    whites = [65535] if image.mode.startswith("I;16") else [255, 65535] if image.mode == "I" else [1, 255, 65535]
    most = values.max(where=np.isfinite(values), initial=0)
    white = next((w for w in whites if most <= w), whites[-1])
    grey = np.empty(values.shape, np.uint8)
    for top, bottom in _strips(image):
        part = np.nan_to_num(values[top:bottom].astype(np.float64))
        grey[top:bottom] = np.clip(np.rint(part / white * 255), 0, 255)
    return Image.fromarray(grey).convert("RGB")


# ----------------------------------------------------------------------------------------------------------- sizing


def smart_resize(
    height: int, width: int, *, factor: int = 28, frames: int = 2, temporal: int = 2,
    min_pixels: int = 112 * 112, max_pixels: int = 14 * 14 * 2 * 2 * 2 * 6144,
) -> tuple[int, int]:
    """GLM-OCR's size: (height, width) in multiples of `factor`, temporal * height * width within the pixel budget.

    A still image counts as two frames, so budgets count its pixels twice. Raises UserError beyond 200:1.
    """
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect(height, width)
    new_h, new_w = round(height / factor) * factor, round(width / factor) * factor
    new_t = round(frames / temporal) * temporal
    if new_t * new_h * new_w > max_pixels:
        beta = math.sqrt(frames * height * width / max_pixels)
        new_h = max(factor, math.floor(height / beta / factor) * factor)
        new_w = max(factor, math.floor(width / beta / factor) * factor)
    elif new_t * new_h * new_w < min_pixels:
        beta = math.sqrt(min_pixels / (frames * height * width))
        new_h, new_w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return new_h, new_w


@functools.lru_cache(maxsize=4096)
def naflex_size(height: int, width: int, unit: int, max_units: int, eps: float = 1e-5) -> tuple[int, int]:
    """The largest (height, width) in multiples of `unit` with at most `max_units` squares, aspect kept if it can be.

    SigLIP2's binary search over the scale. With unit = patch it is SigLIP2's own size; ours is called with
    unit = patch * merge and max_units = budget / merge**2.
    """

    def side(scale: float, size: int) -> int:
        return max(unit, math.ceil(size * scale / unit) * unit)

    low, high = eps / 10, 100.0
    while high - low >= eps:
        scale = (low + high) / 2
        if (side(scale, height) // unit) * (side(scale, width) // unit) <= max_units:
            low = scale
        else:
            high = scale
    return side(low, height), side(low, width)


def _check_aspect(height: int, width: int) -> None:
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"an image of {width}x{height} pixels is more than {MAX_ASPECT} times as long as it is wide; crop it"
        )


# ---------------------------------------------------------------------------------------------------------- patches


@functools.lru_cache(maxsize=4096)
def grid_coordinates(rows: int, columns: int, merge: int = 2) -> np.ndarray:
    """(row, column) of each patch in merge-block order. Returns a read-only int32 [rows * columns, 2]."""
    y, x = np.mgrid[:rows, :columns]
    yx_HW2 = np.stack([y, x], -1).reshape(rows // merge, merge, columns // merge, merge, 2)
    yx_P2 = np.ascontiguousarray(yx_HW2.swapaxes(1, 2).reshape(-1, 2), np.int32)
    yx_P2.flags.writeable = False
    return yx_P2


def patchify(pixels_HW3: np.ndarray, patch: int, merge: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [H, W, 3], sides multiples of patch * merge -> (patches uint8 [P, 3*patch**2], yx int32 [P, 2])."""
    height, width, _ = pixels_HW3.shape
    if height % (patch * merge) or width % (patch * merge):
        raise UserError(f"image size {width}x{height} is no multiple of {patch * merge} (patch * merge); resize it")
    rows, columns = height // patch, width // patch
    blocks = pixels_HW3.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1), grid_coordinates(rows, columns, merge)


def unpatchify(patches_PC: np.ndarray, yx_P2: np.ndarray, patch: int) -> np.ndarray:
    """The picture of one image's patches (padding removed): uint8 [H, W, 3]."""
    rows, columns = yx_P2.max(0) + 1
    canvas = np.zeros((rows, columns, patch, patch, 3), np.uint8)
    canvas[yx_P2[:, 0], yx_P2[:, 1]] = patches_PC.reshape(-1, 3, patch, patch).transpose(0, 2, 3, 1)
    return canvas.swapaxes(1, 2).reshape(rows * patch, columns * patch, 3)


@dataclasses.dataclass(frozen=True)
class Patcher:
    """Image -> patches under one sizing policy.

    patch, merge, temporal: the tower's patch side, merge block side and frames a patch (which `smart` budgets count).
    max_patches:  the budget of one image (a multiple of merge**2).
    min_patches:  only for `smart`: smaller images are enlarged to it.
    policy:       "naflex" (fills the budget, native aspect ratio) or "smart" (GLM-OCR: keeps the size if it can).
    resample:     "bicubic" (GLM) or "bilinear" (SigLIP2); both antialiased by Pillow.
    frames:       that a patch vector holds: 1, and the tower repeats it; or `temporal`, for rows that also show films.
    """

    patch: int = 8
    merge: int = 2
    temporal: int = 2
    max_patches: int = 64
    min_patches: int = 4
    policy: str = "naflex"
    resample: str = "bicubic"
    frames: int = 1

    def __post_init__(self) -> None:
        if self.frames not in (1, self.temporal):
            raise UserError(f"patches of {self.frames} frames for a tower whose patches have {self.temporal}")
        if self.policy not in ("naflex", "smart"):
            raise UserError(f"unknown image sizing policy {self.policy!r}; choose naflex or smart")
        if self.max_patches < self.merge**2:
            raise UserError(f"an image budget of {self.max_patches} patches is under one merge block; raise it")

    @property
    def channels(self) -> int:
        """Length of a patch vector."""
        return 3 * self.frames * self.patch**2

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that an image of this size is resized to."""
        unit = self.patch * self.merge
        if self.policy == "naflex":
            _check_aspect(height, width)
            return naflex_size(height, width, unit, self.max_patches // self.merge**2)
        area = self.temporal * self.patch**2
        new_h, new_w = smart_resize(height, width, factor=unit, frames=self.temporal, temporal=self.temporal,
                                    min_pixels=self.min_patches * area, max_pixels=self.max_patches * area)
        if new_h * new_w > self.max_patches * self.patch**2:  # a long thin image keeps one block of width
            raise UserError(f"an image of {width}x{height} pixels is too thin for {self.max_patches} patches; crop it")
        return new_h, new_w

    def resize(self, image: Image.Image) -> Image.Image:
        """The RGB image at its size under the policy."""
        height, width = self.size(image.height, image.width)
        if (width, height) == image.size:
            return image
        return image.resize((width, height), getattr(Image.Resampling, self.resample.upper()))

    def __call__(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """PIL image -> (patches uint8 [P, channels], yx int32 [P, 2]), P at most `max_patches`."""
        return self.cut(self.resize(image if image.mode == "RGB" else to_rgb(image)))

    def cut(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """The same of an RGB image that has its size already."""
        patches, yx = patchify(np.asarray(image), self.patch, self.merge)
        return (patches if self.frames == 1 else _together([patches] * self.frames)), yx

    def moving(self, images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        """Consecutive frames of a film, `frames` RGB images of one size, as the patches of one image.

        A vector is (C, frame, ph, pw), as the public processors order it. UserError for another number or sizes.
        """
        if len(images) != self.frames:
            raise UserError(f"{len(images)} frames do not make a patch of {self.frames}; set data.video=True")
        if len({image.size for image in images}) > 1:
            raise UserError("its frames are of several sizes; convert it to one")
        made = [patchify(np.asarray(self.resize(image)), self.patch, self.merge) for image in images]
        return _together([patches for patches, _ in made]), made[0][1]


def _together(frames: list[np.ndarray]) -> np.ndarray:
    """Patches [P, 3*p*p] of several frames -> [P, 3*t*p*p]."""
    stacked = np.stack([patches.reshape(len(patches), 3, -1) for patches in frames], axis=2)
    return stacked.reshape(len(stacked), -1)


def apart(patches_PC: np.ndarray, patch: int) -> list[np.ndarray]:
    """The patches [P, 3*p*p] of each frame that the vectors hold, for `unpatchify`."""
    frames_P3tK = patches_PC.reshape(len(patches_PC), 3, -1, patch**2)
    return [frames_P3tK[:, :, t].reshape(len(patches_PC), -1) for t in range(frames_P3tK.shape[2])]

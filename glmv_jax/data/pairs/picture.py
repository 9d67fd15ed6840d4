"""A picture decoded for the size it is needed at, and a number that tells pictures apart."""

from __future__ import annotations

import hashlib

from PIL import Image

from glmv_jax.data.naflex import Patcher, opened, to_rgb

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF: these orientations swap width and height


def sized(content: bytes, patcher: Patcher) -> Image.Image:
    """An encoded picture as RGB of the very size that `patcher` gives one of its dimensions.

    A JPEG that is at least twice as large in both directions is decoded at half, a quarter or an eighth of its size,
    which its format makes cheap: half the time for 640x480 to 252x196, at 45 dB from the picture decoded in full.
    UserError: no picture, a broken one, or one too long for the patcher.
    """
    with opened(content) as image:
        turned = image.getexif().get(_ORIENTATION) in _TURNED
        height, width = patcher.size(*(image.size if turned else image.size[::-1]))
        stored = (height, width) if turned else (width, height)
        resample = getattr(Image.Resampling, patcher.resample.upper())
        if image.format == "JPEG":
            drafted = image.draft(None, stored)  # where its corners come to lie: not always on whole pixels
            image.load()
            if image.size != stored:
                return to_rgb(image.resize(stored, resample, box=drafted[1] if drafted else None))
        image.load()
        rgb = to_rgb(image)
    return rgb if rgb.size == (width, height) else rgb.resize((width, height), resample)


def label(content: bytes | str) -> int:
    """A hash of 31 bits, the same everywhere: equal for equal content.

    Two unlike pictures have the same one by chance once in 2^31 pairs of them: in a batch of 65,536, with its 2.1e9
    pairs, one on average, whose two negatives of 4.3e9 are then left out of the loss.
    """
    content = content.encode() if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "big") >> 1


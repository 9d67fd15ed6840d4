"""What the pixels of an image are known by, from where they are made to the training step that learns from them."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image


def image_hash(patches_PC: np.ndarray, yx_P2: np.ndarray) -> str:
    """Hash of an image's patches and their coordinates, padding left out; "" when there are none."""
    if not len(patches_PC):
        return ""
    digest = hashlib.blake2b(np.ascontiguousarray(patches_PC).data, digest_size=8)
    digest.update(np.ascontiguousarray(yx_P2, np.int32).data)
    return digest.hexdigest()


def picture_hash(image: Image.Image) -> str:
    """Hash of an image before it is made to patches: of its size, mode and pixels."""
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=8)
    digest.update(image.tobytes())
    return digest.hexdigest()

"""Teachers with random weights as folders, written by transformers itself."""

from __future__ import annotations

import transformers

from tests.interop.test_public_towers import OTHER, SMALL, TEXT, randomise


def siglip(folder, side=16, patch=4):
    """SigLIP 2 of one size of image: 2 layers of 32 channels."""
    vision = dict(image_size=side, patch_size=patch, **SMALL)
    config = transformers.SiglipConfig(text_config=TEXT | SMALL | {"projection_size": 32}, vision_config=vision)
    randomise(transformers.SiglipModel(config)).save_pretrained(folder)
    return folder


def dinov3(folder, side=32, patch=8):
    """DINOv3: 3 layers of 24 channels, four registers."""
    config = transformers.DINOv3ViTConfig(patch_size=patch, image_size=side, num_register_tokens=4, **OTHER)
    randomise(transformers.DINOv3ViTModel(config)).save_pretrained(folder)
    return folder

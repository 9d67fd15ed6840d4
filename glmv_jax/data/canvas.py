"""Images as GLM-5.3-Flash sizes them: on a black canvas of whole merge blocks, shrunk where that has too many, enlarged
where it has too few, never stretched. Source: transformers `glm5_next/image_processing_pil_glm5_next.py`.
"""

from __future__ import annotations

import math

from PIL import Image

from glmv_jax.data.naflex import Patcher


class CanvasPatcher(Patcher):
    """A `Patcher` under this policy; its budgets, of patches, are multiples of merge**2."""

    @property
    def unit(self) -> int:
        """The side of a merge block in pixels."""
        return self.patch * self.merge

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of the canvas of an image of this size."""
        least, most = self.min_patches // self.merge**2, self.max_patches // self.merge**2
        blocks = self._blocks(height, width)
        if math.prod(blocks) < least:
            scale = math.sqrt(least * self.unit**2 / (height * width))
            blocks = self._blocks(math.ceil(height * scale), math.ceil(width * scale))
        if math.prod(blocks) > most:
            shrunk = lambda h: self._blocks(h, max(1, width * h // height))  # noqa: E731
            low, high = 0, height  # the picture's height on the largest canvas there is room for
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if math.prod(shrunk(middle)) <= most else (low, middle - 1)
            blocks = shrunk(low) if low else (1, 1)
        return blocks[0] * self.unit, blocks[1] * self.unit

    def resize(self, image: Image.Image) -> Image.Image:
        """The RGB image in the upper left corner of its canvas."""
        width, height = image.size
        rows, columns = self.size(height, width)
        scale = min(rows / height, columns / width)
        if height * width >= self.unit**2 * (self.min_patches // self.merge**2):
            scale = min(1.0, scale)
        shown = max(1, min(columns, math.floor(width * scale))), max(1, min(rows, math.floor(height * scale)))
        if shown != image.size:
            image = image.resize(shown, getattr(Image.Resampling, self.resample.upper()))
        canvas = Image.new("RGB", (columns, rows))
        canvas.paste(image)
        return canvas

    def _blocks(self, height: int, width: int) -> tuple[int, int]:
        return max(1, -(-height // self.unit)), max(1, -(-width // self.unit))

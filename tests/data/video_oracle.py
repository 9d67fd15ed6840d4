"""The video processors of GLM-4.1V and GLM-4.6V, out of transformers' files: importing them would need torchvision.

Their functions are theirs, word for word; the resizing between them, which is torchvision's, is done by torch.
"""

from __future__ import annotations

import ast
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from glmv_jax.typing import CLIP_MEAN, CLIP_STD

NAMES = ("smart_resize", "sample_frames", "patchify")


def functions(family: str) -> dict[str, Any]:
    """Those of NAMES in the video processor of a family."""
    spec = pytest.importorskip("transformers").__spec__
    path = pathlib.Path(spec.origin).parent / "models" / family / f"video_processing_{family}.py"
    found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name in NAMES]
    for function in found:
        function.returns, function.decorator_list = None, []
        for argument in function.args.args:
            argument.annotation = None
    space: dict[str, Any] = {"np": np, "math": math, "torch": pytest.importorskip("torch")}
    exec(compile(ast.Module(found, []), str(path), "exec"), space)
    return space


def pixels(family: str, frames_TCHW: Any, size: dict[str, int], patch: int, temporal: int = 2, merge: int = 2):
    """(patches [P, C*t*p*p], (t, h, w)) of a film's sampled frames, uint8, as the processor gives them."""
    import torch

    f = functions(family)
    T, _, H, W = frames_TCHW.shape
    height, width = f["smart_resize"](
        num_frames=T, height=H, width=W, temporal_factor=temporal, factor=patch * merge,
        min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"],
    )  # fmt: skip
    x = torch.as_tensor(frames_TCHW)
    if (height, width) != (H, W):
        x = torch.nn.functional.interpolate(x, (height, width), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    x = (x.float() - mean * 255) / (std * 255)
    patches, *grid = f["patchify"](None, x[None], patch, merge, temporal)
    return patches[0], tuple(grid)

"""Every parameter of every preset with shape, logical axes and placement, against a file: what a review cannot see.

A change that is meant: GLMV_WRITE_GOLDEN=1 bash launch/test.sh tests/models/test_golden.py, and look at the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest

from glmv_jax import models, presets
from glmv_jax.models import build
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.trees import flatten

GOLDEN = Path(__file__).parent.parent / "golden"
BUILDERS = {
    "vision": (presets.vision, build.vision),
    "two_tower": (presets.two_tower, build.two_tower),
    "vlm": (presets.vlm, build.vlm),
    "glm5v": (presets.glm5v, build.vlm),
}


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")
@pytest.mark.parametrize("size", ["nano", "l"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_parameters(kind, size):
    preset, builder = BUILDERS[kind]
    cfg = builder(preset(size))
    mesh, rules = mesh_lib.make_mesh({"fsdp": 4, "tensor": 2}), rules_lib.preset("fsdp_tensor")
    shapes = flatten(models.abstract_params(cfg))
    names = flatten(models.logical_axes(cfg), is_leaf=lambda x: isinstance(x, tuple))
    lines = [f"{p}  {tuple(shapes[p].shape)}  {names[p]}  {tuple(rules.spec(names[p], mesh))}" for p in sorted(shapes)]
    text = "\n".join(lines) + "\n"
    path = GOLDEN / f"params_{kind}_{size}.txt"
    if os.environ.get("GLMV_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text

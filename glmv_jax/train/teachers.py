"""The teachers of stage 1, from their entries in the config."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from glmv_jax.interop import dinov3, siglip
from glmv_jax.models import api, build, cogvit, teachers
from glmv_jax.models import dinov3 as dinov3_lib
from glmv_jax.models import siglip as siglip_lib
from glmv_jax.train import checkpoint, weights
from glmv_jax.trees import flatten
from glmv_jax.typing import Params, UserError

KINDS = ("siglip", "dinov3", "tower", "hog")


def make(name: str, cfg: ConfigDict, student: cogvit.CogViTConfig, crop: int) -> teachers.Teacher:
    """One teacher.

    Args:
      cfg: kind, and for the kind
          siglip, dinov3   path of a checkpoint folder (SigLIP also an .npz of big_vision); size in pixels of what it
                           sees, 0 for the student's grid; dtype of its parameters and products
          tower            path of the run directory of a stage-2 run
          hog              bins
      crop: side in pixels of the student's image.
    """
    grid = crop // student.patch
    if cfg.kind == "hog":
        return teachers.hog(name, student.patch, cfg.bins)
    if cfg.kind not in KINDS:
        raise UserError(f"teachers.{name}.kind={cfg.kind!r} is not known; choose from {', '.join(KINDS)}")
    if not cfg.path:
        hint = {
            "siglip": "give the folder of a SigLIP or SigLIP 2 checkpoint",
            "dinov3": "give the folder of a DINOv3 checkpoint",
            "tower": "train one with experiments/cogvit_siglip.py:role=teacher and give its run directory",
        }
        raise UserError(f"teachers.{name}.path is empty: {hint[cfg.kind]}")
    if cfg.kind == "tower":
        return _tower(name, cfg.path, student, grid)
    dtype = cfg.get("dtype", "float32")
    where = {"size": cfg.get("size", 0), "grid": grid}
    if cfg.kind == "siglip":
        both, params = siglip.load(cfg.path, text=False, dtype=dtype)
        c: Any = both.vision
        about = f"SigLIP {c.depth}x{c.width}/{c.patch} of {cfg.path}"
        return teachers.siglip(name, c, _cast(params["vision"], dtype), about, **where)
    c, params = dinov3.load(cfg.path, dtype=dtype)
    about = f"DINOv3 {c.depth}x{c.width}/{c.patch} of {cfg.path}"
    return teachers.dinov3(name, c, _cast(params, dtype), about, **where)


def abstract(name: str, cfg: ConfigDict, student: cogvit.CogViTConfig, crop: int) -> teachers.Teacher:
    """As `make`, but a public teacher has shapes for parameters and needs no file: SigLIP So400m/14, DINOv3 ViT-L/16.

    For compiling the step of a run whose weights are elsewhere.
    """
    if cfg.kind not in ("siglip", "dinov3"):
        return make(name, cfg, student, crop)
    config = siglip_lib.SiglipVisionConfig if cfg.kind == "siglip" else dinov3_lib.DINOv3Config
    teacher, dtype = getattr(teachers, cfg.kind), cfg.get("dtype", "float32")
    c = config(dtype=dtype)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), api.abstract_params(c))
    about = f"{cfg.kind} {c.depth}x{c.width}/{c.patch}, shapes alone"
    return teacher(name, c, params, about, size=cfg.get("size", 0), grid=crop // student.patch)


def stored(name: str, about: Mapping[str, Any], folder: str) -> teachers.Teacher:
    """One whose features are read from a cache, at no cost; about: its entry in `FeatureCache.teachers`."""

    def apply(params: Params, images: jax.Array) -> NoReturn:
        raise ValueError(f"teacher {name} is read from {folder}, and this batch has no features")

    return teachers.Teacher(name, f"{about['about']}, stored", about["channels"], {}, {}, 0.0, apply)


def facts(name: str, cfg: ConfigDict, weights: str | None) -> dict[str, Any]:
    """What a teacher's features depend on; weights: `digest` of its parameters, None where they are not at hand."""
    entry = {"kind": cfg.kind}
    if cfg.kind in ("siglip", "dinov3"):
        entry |= {"size": cfg.get("size", 0), "dtype": cfg.get("dtype", "float32")}
    if cfg.kind == "hog":
        entry["bins"] = cfg.bins
    if weights is not None:
        entry["weights"] = weights
    return {f"teachers.{name}.{key}": value for key, value in entry.items()}


def digest(params: Any) -> str:
    """A hash of parameters, the same for the same numbers in whatever files they came."""
    result = hashlib.sha256()
    for path, x in flatten(params).items():
        x = np.ascontiguousarray(jax.device_get(x))
        result.update(f"{path} {x.dtype} {x.shape}".encode())
        result.update(x.view(np.uint8).data if x.ndim else x.tobytes())
    return result.hexdigest()[:32]


def _tower(name: str, path: str, student: cogvit.CogViTConfig, grid: int) -> teachers.Teacher:
    run = checkpoint.load_config(path)
    vision = build.vision(run.model)
    if vision.patch != student.patch:
        raise UserError(f"teachers.{name}: its patch {vision.patch} is not the student's {student.patch}")
    params = weights.load(path, subtrees=["vision"])["vision"]
    about = f"image tower of {path}: CogViT {vision.depth}x{vision.width}, SigLIP on the corpus"
    return teachers.tower(name, vision, params, about, grid=grid)


def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)

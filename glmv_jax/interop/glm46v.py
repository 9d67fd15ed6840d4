"""GLM-4.6V-Flash (transformers `glm46v`): GLM-4.1V's towers and tensors under another name.

What differs is outside the weights: which tokens enclose a video, how frames are chosen, how their times are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmv_jax.interop import glm4v
from glmv_jax.interop.glm4v import duplicates, table
from glmv_jax.models.vlm import VLMConfig
from glmv_jax.typing import UserError

__all__ = ["config", "duplicates", "table"]


def config(hf: Mapping[str, Any], *, mtp_layers: int = 0, dtype: str = "float32") -> VLMConfig:
    """VLMConfig from the contents of config.json. UserError as `glm4v.config`, and for a part of another family."""
    for part, kind in zip(glm4v.parts(hf, "glm46v"), ("glm4v_vision", "glm4v_text")):
        if part.get("model_type", kind) != kind:
            raise UserError(f"config.json: a part of model_type {part['model_type']!r} is not {kind}")
    return glm4v.config(hf, model_type="glm46v", mtp_layers=mtp_layers, dtype=dtype)

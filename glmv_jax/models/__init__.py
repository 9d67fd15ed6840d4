"""Models as plain functions over plain nested dicts; the only folder that knows Flax."""

from glmv_jax.models import cogvit, decoder, glm5, glm5_next, mtp, two_tower, vlm
from glmv_jax.models.api import abstract_params, count, init_params, logical_axes
from glmv_jax.models.cogvit import CogViTConfig, MergerConfig
from glmv_jax.models.decoder import DecoderConfig
from glmv_jax.models.glm5 import GLM5Config
from glmv_jax.models.glm5_next import GLM5NextConfig
from glmv_jax.models.mtp import MTPConfig
from glmv_jax.models.two_tower import MeanConfig, PoolConfig, TextConfig, TwoTowerConfig
from glmv_jax.models.vlm import VLMConfig

__all__ = [
    "CogViTConfig",
    "DecoderConfig",
    "GLM5Config",
    "GLM5NextConfig",
    "MTPConfig",
    "MeanConfig",
    "MergerConfig",
    "PoolConfig",
    "TextConfig",
    "TwoTowerConfig",
    "VLMConfig",
    "abstract_params",
    "cogvit",
    "count",
    "decoder",
    "glm5",
    "glm5_next",
    "init_params",
    "logical_axes",
    "mtp",
    "two_tower",
    "vlm",
]

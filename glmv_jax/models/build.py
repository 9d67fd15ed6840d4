"""From the `model` section of an experiment (see `glmv_jax.presets`) to model configs."""

from __future__ import annotations

from ml_collections import ConfigDict

from glmv_jax.models.cogvit import CogViTConfig, MergerConfig
from glmv_jax.models.decoder import DecoderConfig
from glmv_jax.models.mtp import MTPConfig
from glmv_jax.models.two_tower import MeanConfig, PoolConfig, TextConfig, TwoTowerConfig
from glmv_jax.models.vlm import VLMConfig


def vision(cfg: ConfigDict) -> CogViTConfig:
    """The trunk of stage 1."""
    return CogViTConfig(**cfg.vision)


def two_tower(cfg: ConfigDict) -> TwoTowerConfig:
    """The two towers of stage 2; each pool has the width of its tower."""
    image, text = CogViTConfig(**cfg.vision), TextConfig(**cfg.text)
    probe = PoolConfig(image.width, image.heads, image.mlp, cfg.embedding, image.norm_eps, image.dtype)
    return TwoTowerConfig(image, text, probe, MeanConfig(text.width, cfg.embedding, text.dtype))


def vlm(cfg: ConfigDict) -> VLMConfig:
    """The model of stages 3 to 5; the merger's MLP is three times its width, as in the public checkpoint."""
    trunk, decoder = CogViTConfig(**cfg.vision), DecoderConfig(**cfg.decoder)
    merger = MergerConfig(trunk.width, decoder.width, 3 * decoder.width, dtype=decoder.dtype)
    return VLMConfig(trunk, merger, decoder, MTPConfig(decoder, **cfg.mtp))

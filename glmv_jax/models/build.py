"""From the `model` section of an experiment (see `glmv_jax.presets`) to model configs."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from glmv_jax.models.cogvit import CogViTConfig, MergerConfig
from glmv_jax.models.decoder import DecoderConfig
from glmv_jax.models.glm5 import GLM5Config
from glmv_jax.models.glm5_next import GLM5NextConfig
from glmv_jax.models.mtp import MTPConfig
from glmv_jax.models.siglip import SiglipConfig
from glmv_jax.models.two_tower import MeanConfig, PoolConfig, TextConfig, TwoTowerConfig
from glmv_jax.models.vlm import VLMConfig
from glmv_jax.typing import UserError

_WHERE_FROM = ("kind", "path", "scale")  # of `model.text`: see `train.text_towers`
DECODERS = {"dense": DecoderConfig, "glm5": GLM5Config, "glm5_next": GLM5NextConfig}


def vision(cfg: ConfigDict) -> CogViTConfig:
    """The trunk of stage 1."""
    return CogViTConfig(**cfg.vision)


def two_tower(cfg: ConfigDict, public: SiglipConfig | None = None) -> TwoTowerConfig:
    """The two towers of stage 2; each pool has the width of its tower.

    public: a model whose text side is there in place of ours; images then project to the width of its head.
    """
    image = CogViTConfig(**cfg.vision)
    if public is None:
        sizes = {name: value for name, value in cfg.text.items() if name not in _WHERE_FROM}
        text: Any = TextConfig(**sizes)
        head: Any = MeanConfig(text.width, cfg.embedding, text.dtype)
    else:
        parts = public.parts()
        text = dataclasses.replace(parts["text"], remat=cfg.text.get("remat", "none"))
        head = parts["text_head"]
    probe = PoolConfig(image.width, image.heads, image.mlp, head.out, image.norm_eps, image.dtype)
    return TwoTowerConfig(image, text, probe, head)


def vlm(cfg: ConfigDict) -> VLMConfig:
    """The model of stages 3 to 5; the merger's MLP is three times its width, as in the public checkpoint."""
    trunk, sizes = CogViTConfig(**cfg.vision), dict(cfg.decoder)
    kind = sizes.pop("kind", "dense")
    if kind not in DECODERS:
        raise UserError(f"model.decoder.kind={kind!r} is not known; choose one of {', '.join(DECODERS)}")
    decoder = DECODERS[kind](**sizes)
    merger = MergerConfig(trunk.width, decoder.width, 3 * decoder.width, dtype=decoder.dtype, **cfg.get("merger", {}))
    return VLMConfig(trunk, merger, decoder, MTPConfig(decoder, **cfg.mtp), cfg.get("patches_at_once", 0))

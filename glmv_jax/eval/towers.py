"""Trained towers as the evaluators see them: pictures and texts in, features out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from glmv_jax.data.naflex import Patcher
from glmv_jax.data.pipeline import vision_row
from glmv_jax.data.text_rows import TextRows
from glmv_jax.eval.embed import Embedder
from glmv_jax.models import cogvit, two_tower
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.typing import Batch, Params, UserError, VisionInput


@dataclasses.dataclass(frozen=True)
class Towers:
    """What evaluators need of a model; the weights are given anew with every call.

    image:    name of a feature -> (params, VisionInput) -> [B, E]: "trunk", the mean of CogViT's patch features, and
              for a model with texts "embedding", in the space of the texts.
    text:     (params, rows of `tokenize`) -> [B, E] in that space; None for a model without texts.
    tokenize: text -> int32 [T], always of one length.
    mesh, rules: where the weights live.   batch: rows at a time, over all devices.
    """

    image: dict[str, Callable[[Params, VisionInput], jax.Array]]
    patcher: Patcher
    mesh: Mesh
    rules: rules_lib.Rules
    batch: int = 256
    text: Callable[[Params, jax.Array], jax.Array] | None = None
    tokenize: Callable[[str], np.ndarray] | None = None

    def images(self, features: Sequence[str]) -> Embedder:
        """The embedder of PIL pictures, for these features."""

        def apply(params: Params, rows: Batch) -> dict[str, jax.Array]:
            vision = VisionInput(rows["patches"], rows["yx"], rows["frame"])
            return {name: self.image[name](params, vision) for name in features}

        def row(picture: Any) -> Batch:
            return vision_row(*self.patcher(picture), self.patcher.max_patches)

        return Embedder(apply, row, row(Image.new("RGB", (64, 64))), self.mesh, self.rules, self.batch)

    def texts(self) -> Embedder:
        """The embedder of strings, for "embedding". UserError for a model without texts."""
        if self.text is None or self.tokenize is None:
            raise UserError("this model reads no texts; zero-shot and retrieval need a run of stage siglip")
        text, tokenize = self.text, self.tokenize

        def row(string: str) -> Batch:
            return {"tokens": tokenize(string)}

        def apply(params: Params, rows: Batch) -> dict[str, jax.Array]:
            return {"embedding": text(params, rows["tokens"])}

        return Embedder(apply, row, row("a"), self.mesh, self.rules, self.batch)


def of_trunk(vision: cogvit.CogViTConfig, patcher: Patcher, mesh: Mesh, rules: rules_lib.Rules, batch: int) -> Towers:
    """Stage 1: the trunk alone, of params with a subtree "vision"."""
    return Towers({"trunk": lambda p, v: pooled(cogvit.apply(vision, p["vision"], v), v.frame)}, patcher, mesh, rules,
                  batch)  # fmt: skip


def of_two_tower(
    model: two_tower.TwoTowerConfig, tokenizer: TextRows, patcher: Patcher, mesh: Mesh, rules: rules_lib.Rules,
    batch: int,
) -> Towers:  # fmt: skip
    """Stage 2. Texts are made into tokens as in training: one a row, cut to the tower's length."""
    trunk = of_trunk(model.vision, patcher, mesh, rules, batch)
    image = trunk.image | {"embedding": lambda p, v: two_tower.embed_image(model, p, v)}
    return dataclasses.replace(
        trunk, image=image, text=lambda p, tokens: two_tower.embed_text(model, p, tokens),
        tokenize=lambda text: tokenizer.fixed(text, model.text.length),
    )  # fmt: skip


def pooled(x_BPD: jax.Array, frame_BP: jax.Array) -> jax.Array:
    """[B, D] the mean over the patches that are none of the padding."""
    weight = (frame_BP > 0).astype(jnp.float32)[..., None]
    return (x_BPD * weight).sum(1) / weight.sum(1)

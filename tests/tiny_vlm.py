"""A VLM of a few thousand parameters with random weights, and random prompts for it. Shared by several test folders."""

from __future__ import annotations

import functools

import jax
import numpy as np

from glmv_jax.models import cogvit, decoder, vlm
from glmv_jax.typing import TokenInput, VisionInput
from tests.random_params import random_params

VOCAB, IMAGE, WIDTH = 64, 9, 32


def config(vocab: int = VOCAB, patch: int = 2) -> vlm.VLMConfig:
    return vlm.VLMConfig(
        vision=cogvit.CogViTConfig(depth=2, width=WIDTH, heads=2, mlp=48, patch=patch),
        merger=cogvit.MergerConfig(in_width=WIDTH, width=WIDTH, hidden=48),
        decoder=decoder.DecoderConfig(
            vocab=vocab, depth=2, width=WIDTH, heads=4, kv_heads=2, head_dim=16, mlp=48, rope_split=(2, 3, 3)
        ),
    )


def params(cfg: vlm.VLMConfig, seed: int = 0) -> dict:
    """Random parameters, the output head and the table enlarged so that different contexts give different answers."""
    tree = random_params(cfg, seed)
    tree["decoder"]["head"] = 3.0 * tree["decoder"]["head"]
    tree["decoder"]["embed"]["embedding"] = 20.0 * tree["decoder"]["embed"]["embedding"]
    return tree


def prompt(rng: np.random.Generator, text: int, grid: tuple[int, int] | None, patch_dim: int = 24) -> dict:
    """Arrays of one prompt: `text` random words around an image of grid = (h, w) visual tokens (None: no image)."""
    words = lambda n: rng.integers(16, VOCAB, n)  # noqa: E731
    before = words(text // 2)
    position = np.repeat(np.arange(len(before))[:, None], 3, 1)
    tokens, rows, positions, start = [before], [np.full(len(before), -1)], [position], len(before)
    patches, yx, frame = np.zeros((0, patch_dim)), np.zeros((0, 2), int), np.zeros(0, int)
    if grid:
        h, w = grid
        y, x = np.mgrid[:h, :w].reshape(2, -1)
        tokens.append(np.full(h * w, IMAGE))
        rows.append(np.arange(h * w))
        positions.append(np.stack([np.full(h * w, start), start + y, start + x], -1))
        start += max(h, w)
        blocks = np.stack([y, x], -1)[:, None] * 2 + np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        yx, patches, frame = blocks.reshape(-1, 2), rng.normal(size=(4 * h * w, patch_dim)), np.ones(4 * h * w, int)
    after = words(text - text // 2)
    tokens.append(after)
    rows.append(np.full(len(after), -1))
    positions.append(np.repeat(start + np.arange(len(after))[:, None], 3, 1))
    arrays = {"tokens": tokens, "image_row": rows, "positions": positions}
    return {k: np.concatenate(v) for k, v in arrays.items()} | {"patches": patches, "yx": yx, "frame": frame}


def pad(array: np.ndarray, length: int, value=0) -> np.ndarray:
    return np.pad(array, [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1), constant_values=value)


def extended(p: dict, answer: np.ndarray) -> dict:
    """The prompt with an answer behind it, positions counted on from the prompt's largest."""
    n = len(answer)
    position = p["positions"].max() + 1 + np.arange(n)
    return p | {
        "tokens": np.concatenate([p["tokens"], answer]),
        "image_row": np.concatenate([p["image_row"], np.full(n, -1)]),
        "positions": np.concatenate([p["positions"], np.repeat(position[:, None], 3, 1)]),
    }


def prompt_batch(rows: list[dict], T: int, P: int) -> dict[str, np.ndarray]:
    """One prompt a row, as `data.pipeline.prompt_batches` gives them."""
    stack = lambda key, n, dtype, value=0: np.stack([pad(r[key], n, value) for r in rows]).astype(dtype)  # noqa: E731
    lengths = np.array([len(r["tokens"]) for r in rows], np.int32)
    return {
        "patches": stack("patches", P, "f"), "yx": stack("yx", P, "i"), "frame": stack("frame", P, "i"),
        "tokens": stack("tokens", T, "i"), "positions": stack("positions", T, "i"),
        "image_row": stack("image_row", T, "i", -1), "segments": (np.arange(T) < lengths[:, None]).astype("i"),
        "length": lengths, "next_position": np.array([r["positions"].max() + 1 for r in rows], np.int32),
    }  # fmt: skip


def forward(cfg, tree, rows: list[dict], T: int = 40, P: int = 16) -> np.ndarray:
    """Logits [B, T, V] of padded rows, no cache: the reference for every cached result."""
    return batch_logits(cfg, tree, prompt_batch(rows, T, P))


def batch_logits(cfg, tree, batch: dict) -> np.ndarray:
    """Logits [B, T, V] of a vlm batch."""
    vision = VisionInput(*(batch[k] for k in ("patches", "yx", "frame")))
    tokens = TokenInput(*(batch.get(k) for k in ("tokens", "positions", "segments", "image_row", "", "branches")))
    return np.asarray(_logits(cfg, tree, vision, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg, tree, vision, tokens):
    return vlm.logits(cfg, tree, vlm.apply(cfg, tree, vision, tokens).hidden)

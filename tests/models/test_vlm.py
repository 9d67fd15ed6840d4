"""Invariances of the language model: packed = alone, cached = parallel, scan = unrolled, and the MMTP rules.

Parity with transformers is in tests/interop. Not covered here: long rows, bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax import models
from glmv_jax.kernels.span import Span
from glmv_jax.models import block, decoder, vlm
from glmv_jax.typing import TokenInput, UserError, VisionInput
from tests.random_params import random_params

VISION = models.CogViTConfig(depth=2, width=32, heads=4, mlp=64, patch=4)
DECODER = models.DecoderConfig(
    vocab=64, depth=3, width=32, heads=4, kv_heads=2, head_dim=8, mlp=64, rope_split=(1, 1, 2)
)


def config(option: str = "image_token", depth: int = 2) -> models.VLMConfig:
    return models.VLMConfig(VISION, models.MergerConfig(32, 32, 96), DECODER, models.MTPConfig(DECODER, depth, option))


apply = jax.jit(vlm.apply, static_argnums=0)


def weighted_sum(hidden_BTD) -> jax.Array:
    """A scalar of normed hidden states (their sum of squares would be a constant)."""
    return jnp.sum(hidden_BTD * jnp.sin(jnp.arange(hidden_BTD[0].size).reshape(hidden_BTD.shape[1:])))


def text_rows(rng, batch: int, length: int) -> TokenInput:
    tokens = jnp.array(rng.integers(1, 60, (batch, length)))
    positions = jnp.broadcast_to(jnp.arange(length)[None, :, None], (batch, length, 3))
    return TokenInput(tokens, positions, jnp.ones_like(tokens), -jnp.ones_like(tokens))


def image_rows(rng, length: int = 12) -> tuple[VisionInput, TokenInput]:
    """One row: 3 text tokens, 4 visual tokens (a 4x4-patch image), text."""
    y, x = np.mgrid[0:4, 0:4]
    order = np.stack([y, x], -1).reshape(2, 2, 2, 2, 2).transpose(0, 2, 1, 3, 4).reshape(16, 2)
    patches = jnp.array(rng.normal(size=(1, 16, VISION.patch_dim)), jnp.float32)
    vision = VisionInput(patches, jnp.array(order)[None], jnp.ones((1, 16), jnp.int32))
    tokens = text_rows(rng, 1, length)
    image_row = tokens.image_row.at[0, 3:7].set(jnp.arange(4))
    return vision, tokens._replace(tokens=jnp.where(image_row >= 0, 63, tokens.tokens), image_row=image_row)


def test_packed_documents_do_not_see_each_other():
    cfg, rng = config(), np.random.default_rng(0)
    params = random_params(cfg)
    tokens = text_rows(rng, 1, 12)
    start = jnp.array([0] * 5 + [5] * 7)
    packed = tokens._replace(
        segments=jnp.array([[1] * 5 + [2] * 7]), positions=tokens.positions - start[None, :, None]
    )
    together = apply(cfg, params, None, packed).hidden
    for piece in (slice(0, 5), slice(5, 12)):
        one = TokenInput(*(None if a is None else a[:, piece] for a in packed))
        alone = apply(cfg, params, None, one._replace(segments=jnp.ones_like(one.segments))).hidden
        np.testing.assert_allclose(together[:, piece], alone, atol=1e-5)


def pick(x, at_B):
    """Row b's entry at position at_B[b], as [B, 1, ...]."""
    return jnp.take_along_axis(x, at_B.reshape(-1, *[1] * (x.ndim - 1)), axis=1)


def test_cached_decoding_equals_one_parallel_pass():
    """Right-padded prompts of unlike length, an image in one of them, then one token at a time."""
    cfg, rng = config(), np.random.default_rng(1)
    params = random_params(cfg)
    vision, row = image_rows(rng, 12)
    vision = jax.tree.map(lambda a: jnp.concatenate([a, jnp.zeros_like(a)]), vision)
    tokens = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), row, text_rows(rng, 1, 12))
    whole = apply(cfg, params, vision, tokens).hidden
    prompt, lengths = 9, jnp.array([9, 6])
    cut = lambda a, b: TokenInput(*(None if x is None else x[:, a:b] for x in tokens))  # noqa: E731
    out = apply(cfg, params, vision, cut(0, prompt), vlm.init_cache(cfg, 2, 16))
    cache = out.cache | {"length": lengths}
    for step in range(3):
        at = lengths + step
        next_token = TokenInput(*(None if x is None else pick(x, at) for x in tokens))
        out = apply(cfg, params, None, next_token._replace(image_row=jnp.full((2, 1), -1)), cache)
        cache = out.cache
        np.testing.assert_allclose(out.hidden, pick(whole, at), atol=1e-5)
    np.testing.assert_array_equal(cache["length"], lengths + 3)


@pytest.mark.parametrize("large", [1, block.LARGE])
def test_shared_prompts_equal_repeated_ones(monkeypatch, large):
    """Three continuations of each of two prompts of unlike length: with the prompt's cache in common and copied, and
    the first also with layers apart, their matrices by rows or as they are."""
    monkeypatch.setattr(block, "LARGE", large)
    monkeypatch.setattr(vlm, "LARGE", large)
    cfg, rng = config(), np.random.default_rng(4)
    params = random_params(cfg)
    apply, logits = (jax.jit(functools.partial(f, cfg)) for f in (vlm.apply, vlm.logits))  # of this LARGE
    group, lengths = 3, jnp.array([7, 4])
    rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), text_rows(rng, 1, 7), text_rows(rng, 1, 7))
    cache = apply(params, None, rows, vlm.init_cache(cfg, 2, 7)).cache | {"length": lengths}
    copied = apply(params, None, rows, vlm.init_cache(cfg, 2, 7 + 3)).cache | {"length": lengths}
    rows_apart = lambda x: x.reshape(len(x), 2, -1, *x.shape[2:])  # noqa: E731
    repeated = lambda x: jnp.repeat(rows_apart(x), group, axis=1).reshape(len(x), -1, *x.shape[2:])  # noqa: E731
    copied["layers"] = {name: repeated(x) for name, x in copied["layers"].items()}
    copied["length"] = jnp.repeat(copied["length"], group)
    shared = vlm.share_prompts(cfg, cache, group, 3)
    apart_params, apart_cache = vlm.layers_apart(cfg, params, shared, 2 * group)
    assert ("head_VD" in apart_params["decoder"]) == (large == 1)
    assert ("kernel_OI" in apart_params["decoder"]["blocks_0"]["attention"]["q"]) == (large == 1)
    one_row, _ = vlm.layers_apart(cfg, params, shared, 1)
    assert "head_VD" not in one_row["decoder"] and "kernel" in one_row["decoder"]["blocks_0"]["attention"]["q"]
    assert shared["layers"]["k"].shape[1:3] == (2 * group * cfg.decoder.kv_heads, 3)
    for step in range(3):
        tokens = jnp.array(rng.integers(1, 60, (2 * group, 1)), jnp.int32)
        at = jnp.repeat(lengths, group)[:, None] + step
        said = TokenInput(tokens, jnp.repeat(at[..., None], 3, axis=2), jnp.ones_like(at), -jnp.ones_like(at))
        one, other = (apply(params, None, said, cache) for cache in (shared, copied))
        np.testing.assert_allclose(one.hidden, other.hidden, atol=1e-5)
        apart = apply(apart_params, None, said, apart_cache)
        np.testing.assert_allclose(one.hidden, apart.hidden, atol=1e-5)
        np.testing.assert_allclose(logits(params, one.hidden), logits(apart_params, apart.hidden), atol=1e-5)
        shared, copied, apart_cache = one.cache, other.cache, apart.cache


def test_scan_equals_unrolled():
    cfg, rng = config(), np.random.default_rng(2)
    params = random_params(cfg)["decoder"]
    x = jnp.array(rng.normal(size=(2, 7, 32)), jnp.float32)
    span = Span(jnp.ones((2, 7), jnp.int32), jnp.broadcast_to(jnp.arange(7), (2, 7)))
    positions = jnp.broadcast_to(jnp.arange(7)[None, :, None], (2, 7, 3))
    scanned = jax.jit(decoder.apply, static_argnums=0)(DECODER, params, x, positions, span, span).prenorm
    one = jax.jit(lambda weights, x: block.Block(DECODER.block).apply(
        {"params": weights}, x, None, DECODER.rope(positions), span, span)[0])  # fmt: skip
    for layer in range(DECODER.depth):
        x = one(jax.tree.map(lambda a, i=layer: a[i], params["blocks"]), x)
    np.testing.assert_allclose(scanned, x, atol=1e-5)


def test_remat_changes_memory_not_gradients():
    rng = np.random.default_rng(3)
    params = random_params(config())
    tokens = text_rows(rng, 2, 8)

    def grads(remat: str):
        changed = dataclasses.replace(config(), decoder=dataclasses.replace(DECODER, remat=remat))
        loss = lambda p: weighted_sum(vlm.apply(changed, p, None, tokens).hidden)  # noqa: E731
        lowered = jax.jit(jax.grad(loss)).lower(params)
        return lowered.compile()(params), lowered.as_text()

    plain, plain_text = grads("none")
    for name in ("full", "dots"):
        again, text = grads(name)
        assert text != plain_text
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), plain, again)


@functools.partial(jax.jit, static_argnums=0)
def mtp_hidden(cfg, params, vision, tokens):
    out = vlm.apply(cfg, params, vision, tokens)
    return vlm.mtp_hidden(cfg, params, out, tokens)[0]


def test_mmtp_options_agree_without_images():
    rng = np.random.default_rng(4)
    params = random_params(config())
    tokens = text_rows(rng, 2, 9)
    text_only = mtp_hidden(config("masked"), params, None, tokens)
    for option in ("embeddings", "image_token"):
        for a, b in zip(mtp_hidden(config(option), params, None, tokens), text_only):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "option,reaches",
    [("embeddings", True), ("embeddings_stopped", False), ("masked", False), ("image_token", False)],
)
def test_pixels_reach_the_mtp_input_only_in_option_1(option, reaches):
    """The backbone's hidden states are cut off, so that only the MTP input is left as a way to the pixels."""
    cfg, rng = config(option), np.random.default_rng(5)
    params = random_params(cfg)
    vision, tokens = image_rows(rng)

    def loss(patches):
        out = vlm.apply(cfg, params, vision._replace(patches=patches), tokens)
        out = out._replace(hidden=jax.lax.stop_gradient(out.hidden), prenorm=jax.lax.stop_gradient(out.prenorm))
        return sum(weighted_sum(h[:, :8]) for h in vlm.mtp_hidden(cfg, params, out, tokens)[0])

    assert bool(jnp.any(jax.jit(jax.grad(loss))(vision.patches) != 0)) is reaches


def test_shared_image_row_learns_only_through_option_3():
    """The backbone never reads the placeholder's row of the table; the MTP head of option 3 does."""
    rng = np.random.default_rng(6)
    params = random_params(config())
    vision, tokens = image_rows(rng)

    def row_gradient(option: str, with_mtp: bool):
        cfg = config(option)

        def loss(p):
            out = vlm.apply(cfg, p, vision, tokens)
            extra = vlm.mtp_hidden(cfg, p, out, tokens)[0] if with_mtp else []
            return sum(weighted_sum(h[:, :8]) for h in [out.hidden, *extra])

        return jax.jit(jax.grad(loss))(params)["decoder"]["embed"]["embedding"][63]

    assert not jnp.any(row_gradient("image_token", False))
    assert jnp.any(row_gradient("image_token", True))
    assert not jnp.any(row_gradient("embeddings", True))


def test_mtp_depth_2_reads_the_token_two_ahead():
    """Depth k at position i embeds t_{i+k}: changing t_j moves depth k only at positions >= j - k."""
    cfg, rng = config(), np.random.default_rng(7)
    params = random_params(cfg)
    tokens = text_rows(rng, 1, 10)
    out = apply(cfg, params, None, tokens)
    changed = tokens._replace(tokens=tokens.tokens.at[0, 6].add(1))
    drafts = jax.jit(lambda t: vlm.mtp_hidden(cfg, params, out, t)[0])
    before, after = drafts(tokens), drafts(changed)
    for k, (a, b) in enumerate(zip(before, after), start=1):
        moved = np.flatnonzero(np.abs(np.asarray(a - b)[0, : 10 - k]).max(-1) > 0)
        assert moved[0] == 6 - k


def test_unknown_option_is_named():
    with pytest.raises(UserError, match="image_tokens"):
        models.MTPConfig(DECODER, option="image_tokens")


def test_vision_without_a_merger_is_refused():
    for half in ((VISION, None), (None, models.MergerConfig(32, 32, 96))):
        with pytest.raises(ValueError, match="vision and merger go together"):
            models.VLMConfig(*half, DECODER)

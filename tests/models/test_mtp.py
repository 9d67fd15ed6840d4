"""The MTP head: against a rewrite in float64 NumPy, position by position; its sets of weights; what it sees of images.

What it costs and how often drafts are right: benchmarks. Rules for targets: tests/losses/test_cross_entropy.py.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax import models
from glmv_jax.models import mtp, vlm
from glmv_jax.typing import TokenInput, UserError
from tests.models.test_vlm import DECODER, apply, config, image_rows, text_rows, weighted_sum
from tests.random_params import random_params


def with_mtp(**changes) -> models.VLMConfig:
    cfg = config()
    return dataclasses.replace(cfg, mtp=dataclasses.replace(cfg.mtp, **changes))


mtp_hidden = jax.jit(vlm.mtp_hidden, static_argnums=0)


# --- against NumPy ----------------------------------------------------------------------------------------------------


class ByHand:
    """One MTP layer on single positions of a row: no shifts, no masks, no batches, float64."""

    def __init__(self, params: dict) -> None:
        self.p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(self, name: str, x):
        return functools.reduce(lambda node, key: node[key], name.split("/"), self.p)["scale"] * (
            x / np.sqrt((x**2).mean() + DECODER.norm_eps)
        )

    def rotated(self, x_K, triple):
        """Pairs (2i, 2i + 1) as complex numbers; frequency i belongs to time, height or width."""
        K = DECODER.head_dim
        owner = np.repeat([0, 1, 2], DECODER.rope_split)
        angle = np.asarray(triple, float)[owner] * DECODER.rope_theta ** (-2.0 * np.arange(K // 2) / K)
        z = (x_K[0::2] + 1j * x_K[1::2]) * np.exp(1j * angle)
        return np.stack([z.real, z.imag], 1).reshape(K)

    def __call__(self, seen: list[tuple], at: int):
        """seen: (embedding, h_prev, position triple, is a key) of positions of one segment; of the one at `at`:
        (h, norm(h))."""
        block, K, groups = self.p["block"], DECODER.head_dim, DECODER.heads // DECODER.kv_heads
        x = [np.concatenate([self.norm("enorm", e), self.norm("hnorm", h)]) @ self.p["eh_proj"]["kernel"]
             for e, h, _, _ in seen]  # fmt: skip
        normed = [self.norm("block/norm1", v) for v in x]
        w = {name: block["attention"][name]["kernel"] for name in "qkvo"}
        out = []
        for head in range(DECODER.heads):
            cut = lambda v, name, h: (v @ w[name])[h * K : (h + 1) * K]  # noqa: E731
            q = self.rotated(cut(normed[at], "q", head), seen[at][2])
            keys = [j for j in range(at + 1) if seen[j][3]]
            scores = [q @ self.rotated(cut(normed[j], "k", head // groups), seen[j][2]) / K**0.5 for j in keys]
            p = np.exp(np.array(scores) - max(scores))
            values = np.array([cut(normed[j], "v", head // groups) for j in keys])
            out.append(p @ values / p.sum())
        y = x[at] + self.norm("block/post_norm1", np.concatenate(out) @ w["o"])
        z = self.norm("block/norm2", y)
        gate, up, down = (block["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
        g = z @ gate
        h = y + self.norm("block/post_norm2", (g / (1 + np.exp(-g)) * (z @ up)) @ down)
        return h, self.norm("norm", h)


def packed_rows(rng):
    """A document with an image, where positions jump, and a second one that starts anew."""
    vision, tokens = image_rows(rng, 16)
    positions = np.array(tokens.positions)
    for r in range(4):  # a 2 x 2 image at 3 .. 6; what follows goes on from its largest coordinate
        positions[0, 3 + r] = 3, 3 + r // 2, 3 + r % 2
    positions[0, 7:10] = np.arange(5, 8)[:, None]
    positions[0, 10:] = np.arange(6)[:, None]
    segments = jnp.array([[1] * 10 + [2] * 6])
    return vision, tokens._replace(positions=jnp.array(positions), segments=segments)


@pytest.mark.parametrize(
    "option, h_prev, weights",
    [
        ("embeddings", "post_norm", "per_depth"),
        ("masked", "pre_norm", "shared"),
        ("image_token", "post_norm", "shared"),
        ("image_token", "pre_norm", "per_depth"),
    ],
)
def test_every_position_equals_a_rewrite_in_numpy(option, h_prev, weights):
    cfg = with_mtp(depth=3, option=option, h_prev=h_prev, weights=weights)
    params = random_params(cfg)
    vision, tokens = packed_rows(np.random.default_rng(0))
    out = apply(cfg, params, vision, tokens)
    got, said = mtp_hidden(cfg, params, out, tokens)
    assert len(got) == len(said) == 3

    table, merged = (np.asarray(x, np.float64) for x in (params["decoder"]["embed"]["embedding"], out.merged[0]))
    h = list(np.asarray((out.hidden if h_prev == "post_norm" else out.prenorm)[0], np.float64))
    ids, is_image, segments = (np.asarray(x[0]) for x in (tokens.tokens, tokens.image_row >= 0, tokens.segments))
    checked = 0
    for k in range(1, 4):
        layer = ByHand(params["mtp"] if weights == "shared" else jax.tree.map(lambda x, k=k: x[k - 1], params["mtp"]))
        h_next = list(h)
        for segment in (1, 2):
            where = [i for i in range(16 - k) if segments[i] == segments[i + k] == segment]
            seen = []
            for i in where:
                j = i + k  # the token embedded
                e = table[ids[j]]
                if is_image[j] and option == "embeddings":
                    e = merged[j]
                if is_image[j] and option == "masked":
                    e = np.zeros_like(e)
                key = not (option == "masked" and is_image[j])
                seen.append((e, h[i], np.asarray(tokens.positions[0, j]), key))
            for n, i in enumerate(where):
                if not any(key for *_, key in seen[: n + 1]):
                    continue  # a query without any key: what it finds is nothing anybody defines
                pre, post = layer(seen, n)
                np.testing.assert_allclose(got[k - 1][0, i], post, atol=2e-5)
                h_next[i] = post if h_prev == "post_norm" else pre
                checked += 1
        h = h_next
    without_key = 4 if option == "masked" else 0  # at depth 3 the first four positions have seen patches only
    assert checked == sum(10 - k + 6 - k for k in (1, 2, 3)) - without_key


# --- one set of weights, or one a depth -------------------------------------------------------------------------------


def test_separate_weights_are_three_times_as_many_and_equal_the_shared_ones_when_they_are_the_same():
    shared, separate = with_mtp(depth=3), with_mtp(depth=3, weights="per_depth")
    assert models.count(separate.mtp) == 3 * models.count(shared.mtp)
    assert models.count(shared.mtp) == models.count(with_mtp(depth=1).mtp)
    names = jax.tree.leaves(models.logical_axes(separate.mtp), is_leaf=lambda x: isinstance(x, tuple))
    assert all(axes[0] == "layers" for axes in names)

    tokens = text_rows(np.random.default_rng(1), 1, 12)
    one = random_params(shared)
    many = one | {"mtp": jax.tree.map(lambda x: jnp.stack([x] * 3), one["mtp"])}

    def loss(params, cfg):
        out = apply(cfg, params, None, tokens)
        return sum(weighted_sum(h[:, :8]) for h in vlm.mtp_hidden(cfg, params, out, tokens)[0])

    (a, a_grads), (b, b_grads) = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(p, c) for p, c in ((one, shared), (many, separate))
    )
    np.testing.assert_allclose(a, b, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda x, y: close(x, y.sum(0)), a_grads["mtp"], b_grads["mtp"])
    jax.tree.map(close, a_grads["decoder"], b_grads["decoder"])


def test_each_depth_has_its_own_set_and_its_own_draw():
    cfg = with_mtp(depth=3, weights="per_depth")
    params = random_params(cfg)
    kernel = params["mtp"]["eh_proj"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    tokens = text_rows(np.random.default_rng(2), 1, 8)
    changed = params | {"mtp": jax.tree.map(lambda x: x.at[1].multiply(1.5), params["mtp"])}
    before, after = (mtp_hidden(cfg, p, apply(cfg, p, None, tokens), tokens)[0] for p in (params, changed))
    assert [bool(jnp.any(a != b)) for a, b in zip(before, after)] == [False, True, True]


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, sees", [("embeddings", True), ("embeddings_stopped", True), ("masked", False), ("image_token", False)]
)
def test_other_pixels_change_the_drafts_only_in_option_1_or_through_h_prev(option, sees):
    cfg = config(option)
    params = random_params(cfg)
    vision, tokens = image_rows(np.random.default_rng(3))
    one, other = (apply(cfg, params, vision._replace(patches=s * vision.patches), tokens) for s in (1.0, -2.0))
    drafts = lambda out: mtp_hidden(cfg, params, out, tokens)[0]  # noqa: E731
    kept = other._replace(hidden=one.hidden, prenorm=one.prenorm)
    same = [bool(jnp.all(a[:, :8] == b[:, :8])) for a, b in zip(drafts(one), drafts(kept))]
    assert same == [not sees] * 2
    assert all(bool(jnp.any(a[:, :8] != b[:, :8])) for a, b in zip(drafts(one), drafts(other)))


def test_option_1_stopped_is_option_1_without_the_encoders_gradient():
    params = random_params(config())
    vision, tokens = image_rows(np.random.default_rng(4))

    def value_and_grads(option):
        cfg = config(option)

        def loss(p):
            out = apply(cfg, p, vision, tokens)
            cut = out._replace(hidden=jax.lax.stop_gradient(out.hidden))
            return sum(weighted_sum(h[:, :8]) for h in vlm.mtp_hidden(cfg, p, cut, tokens)[0])

        return jax.jit(jax.value_and_grad(loss))(params)

    (a, full), (b, stopped) = value_and_grads("embeddings"), value_and_grads("embeddings_stopped")
    assert float(a) == float(b)
    jax.tree.map(np.testing.assert_array_equal, full["mtp"], stopped["mtp"])
    np.testing.assert_array_equal(full["decoder"]["embed"]["embedding"], stopped["decoder"]["embed"]["embedding"])
    largest = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))  # noqa: E731
    assert largest(full["vision"]) > 0 and largest(stopped["vision"]) == largest(stopped["merger"]) == 0


# --- what the block says ----------------------------------------------------------------------------------------------


class TalkingBlock(models.block.Block):
    """A block that says how large its output is."""

    def __call__(self, *args):
        x_BTD, (cache, _) = super().__call__(*args)
        return x_BTD, (cache, {"size": jnp.mean(jnp.square(x_BTD))})


@dataclasses.dataclass(frozen=True)
class TalkingConfig(models.block.BlockConfig):
    @property
    def layer(self):
        return TalkingBlock


@dataclasses.dataclass(frozen=True)
class TalkingDecoder(models.DecoderConfig):
    @property
    def block(self):
        plain = super().block
        return TalkingConfig(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)})


def test_what_the_block_says_at_each_depth_comes_back():
    fields = {f.name: getattr(DECODER, f.name) for f in dataclasses.fields(DECODER)}
    talking = TalkingDecoder(**fields)
    cfg = dataclasses.replace(config(), decoder=talking, mtp=models.MTPConfig(talking, 2, h_prev="pre_norm"))
    params, tokens = random_params(cfg), text_rows(np.random.default_rng(5), 2, 7)
    out = apply(cfg, params, None, tokens)
    hidden, said = mtp_hidden(cfg, params, out, tokens)
    assert out.aux["size"].shape == (3,)
    plain, nothing = mtp_hidden(config(), params, out._replace(hidden=out.prenorm), tokens)
    assert nothing == [{}, {}] and [list(s) for s in said] == [["size"], ["size"]]
    layer = mtp.MTPLayer(talking.block)
    slots = jnp.broadcast_to(jnp.arange(7), (2, 7))
    span = models.mtp.Span(tokens.segments, slots)
    e = jnp.roll(params["decoder"]["embed"]["embedding"][tokens.tokens], -1, axis=1)
    rope = talking.rope(jnp.roll(tokens.positions, -1, axis=1))
    pre, post, _, _ = layer.apply({"params": params["mtp"]}, e, out.prenorm, rope, span, span)
    np.testing.assert_allclose(said[0]["size"], jnp.mean(jnp.square(pre)), rtol=1e-5)
    np.testing.assert_allclose(hidden[0], post, atol=1e-5)
    np.testing.assert_allclose(plain[0], hidden[0], atol=1e-5)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"weights": "both"}, "choose shared or per_depth"),
        ({"depth": 0}, "depth=0: the first"),
        ({"h_prev": "no"}, "choose post"),
    ],
)
def test_what_is_not_known_is_named(wrong, message):
    with pytest.raises(UserError, match=message):
        models.MTPConfig(DECODER, **wrong)


def test_branches_are_refused():
    tokens = text_rows(np.random.default_rng(6), 1, 4)
    tokens = TokenInput(*tokens[:-1], branches=jnp.zeros_like(tokens.tokens))
    cfg = config()
    params = random_params(cfg)
    with pytest.raises(ValueError, match="takes no rows with branches"):
        vlm.mtp_hidden(cfg, params, vlm.apply(cfg, params, None, tokens), tokens)

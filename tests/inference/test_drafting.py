"""The engine with drafts against the plain sampler, exact distributions, and a loop without any cache.

The head is built, not trained: it repeats the backbone's reading of the last token alone, so that some drafts are
right. Not covered: several devices, bfloat16 (where a pass over K + 1 tokens may round unlike K + 1 passes).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.inference import acceptance
from glmv_jax.inference.batches import EngineSampler
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.sampler import Prompts, Sampler, Sampling
from glmv_jax.inference.settings import Settings
from glmv_jax.kernels.span import Span
from glmv_jax.models import MTPConfig, decoder, vlm
from glmv_jax.models.glm5 import GLM5Config
from glmv_jax.typing import TokenInput, UserError, VisionInput
from tests import tiny_vlm

K = 3
GREEDY = Sampling(12, temperature=0.0, suppress=(3, tiny_vlm.IMAGE, 40))
SAMPLED = Sampling(12, temperature=0.7, top_p=0.9, suppress=(tiny_vlm.IMAGE,))


def config(vocab: int = tiny_vlm.VOCAB, option: str = "image_token", h_prev: str = "post_norm") -> vlm.VLMConfig:
    cfg = tiny_vlm.config(vocab)
    return dataclasses.replace(cfg, mtp=MTPConfig(cfg.decoder, option=option, h_prev=h_prev))


def half_right(cfg: vlm.VLMConfig, context: float, seed: int = 0) -> dict:
    """Parameters whose next token depends mostly on the last one (context: the weight of the rest), which the head,
    that embeds it, can tell as well."""
    return made_half_right(tiny_vlm.params(cfg, seed), cfg.decoder.width, context, seed)


def made_half_right(params: dict, width: int, context: float, seed: int = 0) -> dict:
    """`half_right`, of these parameters, which it changes."""

    def weaker(path, x):
        return context * x if "post_norm" in jax.tree_util.keystr(path) else x

    params["decoder"] = jax.tree_util.tree_map_with_path(weaker, params["decoder"])
    params["mtp"] = jax.tree_util.tree_map_with_path(weaker, params["mtp"])
    noise = 0.1 * np.random.default_rng(seed).normal(size=(width, width)) / width**0.5
    params["mtp"]["eh_proj"]["kernel"] = jnp.asarray(np.concatenate([0.4 * np.eye(width), noise]), jnp.float32)
    return params


CFG = config()


@pytest.fixture(scope="module")
def params():
    return half_right(CFG, 0.08)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return [tiny_vlm.prompt(rng, n, grid) for n, grid in [(5, (1, 3)), (9, None), (3, (2, 2)), (12, (3, 1))]]


def batch(rows) -> Prompts:
    return Prompts.of(tiny_vlm.prompt_batch(rows, 20, 16))


def drafting(cfg: vlm.VLMConfig, sampling: Sampling, drafts: int, group: int = 1, **sizes) -> EngineSampler:
    """An engine as small as may be: one shape of each program."""
    settings = Settings(**dict(
        slots=4, length=32, alone=sampling.max_new_tokens, chunks=(20,), lanes=1, patches=(16,), pictures=16,
        pixels=(24, "float32"), drafts=drafts,
    ) | sizes)  # fmt: skip
    return EngineSampler(Engine(cfg, None, sampling, settings), group)


@pytest.fixture(scope="module")
def half():
    """With K drafts, of CFG."""
    return drafting(CFG, GREEDY, K)


def run(sampler, params, prompts, seed=0):
    return jax.device_get(sampler(params, prompts, jax.random.key(seed)))


def counted_run(sampler: EngineSampler, params, prompts):
    """(answers, what the engine counted)."""
    before = sampler.engine.counts.copy()
    out = run(sampler, params, prompts)
    return out, sampler.engine.counts.since(before)


@functools.partial(jax.jit, static_argnums=0)
def backbone(cfg, params, vision, tokens):
    out = vlm.apply(cfg, params, vision, tokens)
    return out.hidden if cfg.mtp.h_prev == "post_norm" else out.prenorm, out.merged


@functools.partial(jax.jit, static_argnums=0)
def head(cfg, params, e_TD, h_TD, positions_T3, is_key_T):
    """The head's hidden states before and after its norm and its logits, of a row of entries, without a cache."""
    slots = jnp.arange(len(e_TD))[None]
    query, key = Span(jnp.ones_like(slots), slots), Span(is_key_T[None], slots)
    layer, rope = cfg.mtp.module(), cfg.decoder.rope(positions_T3[None])
    pre, post = layer.apply({"params": params["mtp"]}, e_TD[None], h_TD[None], rope, query, key)[:2]
    return pre[0], post[0], decoder.logits(cfg.decoder, params["decoder"], post)[0]


def runs_by_hand(cfg, params, row, answer, drafts: int, suppress) -> list[list[int]]:
    """The drafts of every pass of a greedy answer, from one pass over prompt and answer and the head without a cache:
    entries of the tokens said so far, with the backbone's hidden states, and of the drafts, with its own."""
    whole = tiny_vlm.prompt_batch([tiny_vlm.extended(row, np.concatenate([answer, np.zeros(drafts, int)]))], 40, 16)
    vision = VisionInput(*(whole[name] for name in ("patches", "yx", "frame")))
    tokens = TokenInput(*(whole[name] for name in ("tokens", "positions", "segments", "image_row")))
    h_BTD, merged_BTD = backbone(cfg, params, vision, tokens)
    table_VD = np.asarray(params["decoder"]["embed"]["embedding"])
    table_TD, is_image_T = table_VD[whole["tokens"][0]], whole["image_row"][0] >= 0
    embedded = {
        "embeddings": merged_BTD[0], "image_token": table_TD, "masked": np.where(is_image_T[:, None], 0.0, table_TD),
    }  # fmt: skip
    is_key_T = ~is_image_T[1:] if cfg.mtp.option == "masked" else np.ones(39, bool)
    passes, n, start = [], 0, len(row["tokens"])
    while n < len(answer):
        e_TD, h_TD, said = np.array(embedded[cfg.mtp.option][1:]), np.array(h_BTD[0, :39]), []
        for k in range(drafts):
            entry = start + n - 2 + k
            pre, post, logits = head(cfg, params, e_TD, h_TD, whole["positions"][0, 1:], is_key_T.astype(int))
            logits_V = np.array(logits[entry])
            logits_V[list(suppress)] = -np.inf
            said.append(int(logits_V.argmax()))
            e_TD[entry + 1] = table_VD[said[-1]]
            h_TD[entry + 1] = (post if cfg.mtp.h_prev == "post_norm" else pre)[entry]
        passes.append(said)
        n += kept(said, answer[n:]) + 1
    return passes


def kept(said, answer) -> int:
    """How many drafts the answer agrees with, up to the first that it does not."""
    right = [a == b for a, b in zip(said, answer)]
    return int(np.cumprod(right).sum())


def counted(passes, answer):
    """reached and accepted of each draft, as `Counts` defines them, from the drafts of each pass."""
    reached, accepted, n = np.zeros(len(passes[0]), int), np.zeros(len(passes[0]), int), 0
    for said in passes:
        right = min(kept(said, answer[n:]), len(answer) - n)
        reached[: min(right + 1, len(answer) - n)] += 1
        accepted[:right] += 1
        n += right + 1
    return reached, accepted


def check_counts(counts, cfg, params, rows, answers, drafts: int) -> None:
    """Over all rows those of the loop without a cache; some drafts are kept, and some are not."""
    passes = [runs_by_hand(cfg, params, row, x, drafts, GREEDY.suppress) for row, x in zip(rows, answers)]
    assert counts.passes == sum(map(len, passes))
    wanted = np.sum([counted(*of_row) for of_row in zip(passes, answers)], axis=0)
    np.testing.assert_array_equal((counts.reached, counts.accepted), wanted)
    assert counts.accepted.any() and (counts.accepted < counts.reached).any()


def test_greedy_answers_are_the_plain_ones_and_the_drafts_those_of_a_loop_without_a_cache(half, params, rows):
    out, counts = counted_run(half, params, batch(rows))
    wanted = run(Sampler(CFG, GREEDY), params, batch(rows))
    np.testing.assert_array_equal(out.tokens, wanted.tokens)
    np.testing.assert_allclose(out.logprobs, wanted.logprobs, atol=1e-4)
    check_counts(counts, CFG, params, rows, out.tokens, K)
    assert counts.accepted[K - 1] and (counts.reached < counts.passes).any()


@pytest.mark.parametrize(("option", "h_prev"), [("embeddings", "pre_norm"), ("masked", "post_norm")])
def test_other_heads_draft_as_without_a_cache(rows, option, h_prev):
    cfg = config(option=option, h_prev=h_prev)
    params = half_right(cfg, 0.08)
    params["mtp"]["eh_proj"]["kernel"] *= 2.0  # so that what the head is fed beside the token counts for more
    out, counts = counted_run(drafting(cfg, GREEDY, 2, chunks=(8,)), params, batch(rows))
    check_counts(counts, cfg, params, rows, out.tokens, 2)


def test_a_stop_inside_a_run_of_kept_drafts_ends_the_answer(half, rows):
    params = half_right(CFG, 0.04, seed=2)  # answers that repeat less, and so have runs of words not said before
    free = run(half, params, batch(rows))
    inside = set()  # kept drafts that are not the last of their pass, and that not every row says
    for row, answer in zip(rows, free.tokens):
        n = 0
        for said in runs_by_hand(CFG, params, row, answer, K, GREEDY.suppress):
            right = kept(said, answer[n:])
            inside |= {
                a for a in said[: max(right - 1, 0)] if a not in answer[:n] and not (free.tokens == a).any(1).all()
            }
            n += right + 1
    assert inside, "the test needs a run of two that says something new"
    stop = min(inside)
    out, counts = counted_run(drafting(CFG, dataclasses.replace(GREEDY, stop=(stop,), pad=1), K), params, batch(rows))
    for answer, logprobs, length, finished, whole, their in zip(*out, free.tokens, free.logprobs):
        n = int(np.argmax(whole == stop)) + 1 if stop in whole else len(whole)
        assert (length, finished) == (n, stop in whole)
        np.testing.assert_array_equal(answer, [*whole[:n], *[1] * (len(whole) - n)])
        np.testing.assert_allclose(logprobs[:n], their[:n], atol=1e-4)
    assert out.finished.any() and not out.finished.all()
    assert counts.accepted.sum() + counts.passes >= out.lengths.sum()


def nucleus_of(p: np.ndarray, top_p: float) -> np.ndarray:
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-6)) + 1]
    cut = np.zeros_like(p)
    cut[kept] = p[kept]
    return cut / cut.sum()


def test_drawn_answers_have_the_distribution_of_the_model(top_p=0.8):
    """Every answer of 4 tokens out of 4, a fifth one being suppressed: counts of many draws against exact chances."""
    vocab, length, many = 5, 4, 6000
    cfg = config(vocab)
    params = half_right(cfg, 0.3, seed=1)
    params["decoder"]["head"] = 0.5 * params["decoder"]["head"]
    tokens = np.array([1, 3, 2])
    row = tiny_vlm.prompt(np.random.default_rng(0), 3, None) | {"tokens": tokens}
    sampling = Sampling(length, temperature=0.9, top_p=top_p, suppress=(4,))
    sampler = drafting(cfg, sampling, 2, many, slots=1000, length=8, chunks=(4,), patches=(4,), queue=many)
    out, counts = counted_run(sampler, params, Prompts.of(tiny_vlm.prompt_batch([row], 4, 4)))

    answers = np.array(list(itertools.product(range(4), repeat=length)))
    logits = tiny_vlm.forward(cfg, params, [tiny_vlm.extended(row, a) for a in answers], T=8, P=4)[:, 2:-2]
    p = np.exp(logits.astype(np.float64) / 0.9) * (np.arange(vocab) != 4)
    p = np.apply_along_axis(nucleus_of, -1, p / p.sum(-1, keepdims=True), top_p)
    exact = np.take_along_axis(p[:, :length], answers[..., None], -1)[..., 0].prod(-1)
    np.testing.assert_allclose(exact.sum(), 1.0, atol=1e-6)

    seen = np.bincount((out.tokens @ 4 ** np.arange(length)[::-1]), minlength=4**length)
    assert not seen[exact == 0].any()
    often = exact * many >= 5
    cells = lambda x: np.append(x[often], x[~often].sum())  # noqa: E731
    want, got = cells(exact * many), cells(seen)
    chi2, freedom = ((got - want) ** 2 / np.maximum(want, 1e-9)).sum(), len(want) - 1
    assert abs(chi2 - freedom) < 4.5 * np.sqrt(2 * freedom), (chi2, freedom)
    rates = acceptance.rates(counts)
    assert all(0.2 < rate < 0.95 for rate in rates), rates
    assert counts.passes < many * length * 0.9, "passes say more than one token"


GLM5 = GLM5Config(
    vocab=tiny_vlm.VOCAB, depth=3, width=tiny_vlm.WIDTH, heads=4, mlp=48, dense=1, expert_mlp=16, experts=4, chosen=2,
    rope_split=(2, 3, 3), q_rank=24, kv_rank=16, nope_dim=8, rope_dim=16, v_dim=8, index_heads=4, index_dim=16, top_k=6,
)  # fmt: skip


def test_experts_and_latent_attention(rows):
    """Drafts change no greedy answer, in groups too, and some drafts are kept."""
    cfg = dataclasses.replace(CFG, decoder=GLM5, mtp=MTPConfig(GLM5))
    params = tiny_vlm.params(cfg)
    # As `half_right`, for blocks without a norm behind their branches.
    last = re.compile(r"'(o|down)'")
    weaker = lambda path, x: 0.08 * x if last.search(jax.tree_util.keystr(path)) else x  # noqa: E731
    params["decoder"], params["mtp"] = (
        jax.tree_util.tree_map_with_path(weaker, params[part]) for part in ("decoder", "mtp")
    )
    width = cfg.decoder.width
    noise = 0.1 * np.random.default_rng(0).normal(size=(width, width)) / width**0.5
    params["mtp"]["eh_proj"]["kernel"] = jnp.asarray(np.concatenate([0.4 * np.eye(width), noise]), jnp.float32)
    wanted = run(Sampler(cfg, GREEDY, 2), params, batch(rows))
    out, counts = counted_run(drafting(cfg, GREEDY, 2, 2), params, batch(rows))
    np.testing.assert_array_equal(out.tokens, wanted.tokens)
    np.testing.assert_allclose(out.logprobs, wanted.logprobs, atol=1e-4)
    assert counts.accepted.any() and (counts.accepted < counts.reached).any() and counts.reused


def test_what_cannot_draft_is_refused():
    with pytest.raises(UserError, match="no MTP head"):
        drafting(tiny_vlm.config(), GREEDY, 1)
    with pytest.raises(UserError, match="leaves gaps in the head's cache"):
        drafting(dataclasses.replace(CFG, decoder=GLM5, mtp=MTPConfig(GLM5, option="masked")), GREEDY, 1)

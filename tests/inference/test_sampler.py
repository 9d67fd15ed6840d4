"""The cached sampler against full forward passes of the same model, row by row, and its distribution against NumPy.

Not covered: that the loop stops early (only that what it returns is right), and sampling over several devices.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.inference.sampler import Prompts, Sampler, Sampling, choose, draw_index, nucleus
from tests import tiny_vlm

CFG = tiny_vlm.config()


@pytest.fixture(scope="module")
def params():
    return tiny_vlm.params(CFG)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return [tiny_vlm.prompt(rng, n, grid) for n, grid in [(5, (1, 3)), (9, None), (3, (2, 2)), (12, (3, 1))]]


def batch(rows, T: int = 20, P: int = 16) -> Prompts:
    return Prompts.of(tiny_vlm.prompt_batch(rows, T, P))


# Few settings and shapes, because each is a compilation.
GREEDY = Sampling(8, temperature=0.0, suppress=(3, tiny_vlm.IMAGE, 40))
SAMPLED = Sampling(8, temperature=0.7, top_p=0.9, suppress=(tiny_vlm.IMAGE,))


@functools.cache
def sampler(sampling: Sampling, group: int) -> Sampler:
    return Sampler(CFG, sampling, group)


def run(params, prompts, sampling, group=1, seed=0):
    return jax.device_get(sampler(sampling, group)(params, prompts, jax.random.key(seed)))


def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def test_greedy_equals_the_full_forward_token_by_token(params, rows):
    out = run(params, batch(rows), GREEDY)
    # Causal: position t of one pass over prompt and answer sees what a pass cut after t would see.
    logits = tiny_vlm.forward(CFG, params, [tiny_vlm.extended(r, a) for r, a in zip(rows, out.tokens)])
    logits = np.where(np.isin(np.arange(tiny_vlm.VOCAB), GREEDY.suppress), -np.inf, logits)
    for row, answer, wanted in zip(rows, out.tokens, logits.argmax(-1)):
        start = len(row["tokens"]) - 1
        np.testing.assert_array_equal(answer, wanted[start : start + len(answer)])
    assert len({tuple(a) for a in out.tokens}) == len(rows), "the test needs rows with different answers"


def test_logprobs_are_those_of_a_training_forward(params, rows):
    out = run(params, batch(rows), SAMPLED, group=3)
    extended = [tiny_vlm.extended(rows[i // 3], answer) for i, answer in enumerate(out.tokens)]
    full = log_softmax(tiny_vlm.forward(CFG, params, extended) / SAMPLED.temperature)
    for i, (answer, logprobs) in enumerate(zip(out.tokens, out.logprobs)):
        at = len(rows[i // 3]["tokens"]) - 1 + np.arange(len(answer))
        np.testing.assert_allclose(logprobs, full[i, at, answer], atol=1e-4)


def test_groups_neighbours_padding_and_buckets_change_nothing(params, rows):
    grouped = run(params, batch(rows), SAMPLED, group=3)
    single = Sampler(CFG, SAMPLED)
    key = jax.random.key(0)
    repeated = jax.device_get(single(params, batch([r for r in rows for _ in range(3)], T=31, P=40), key))
    np.testing.assert_array_equal(grouped.tokens, repeated.tokens)
    assert len({tuple(a) for a in grouped.tokens[:3]}) > 1, "answers of one group must be drawn independently"
    alone = jax.device_get(single(params, batch(rows[:1], T=8, P=12), key))
    np.testing.assert_array_equal(alone.tokens[0], grouped.tokens[0])
    np.testing.assert_allclose(alone.logprobs[0], grouped.logprobs[0], atol=1e-5)
    single(params, batch(rows[:1], T=8, P=12), jax.random.key(1))
    assert single.traces == 2, "one compilation a shape"


def test_stop_tokens_end_a_row_and_only_that_row(params, rows):
    free = run(params, batch(rows), GREEDY)
    stop = int(free.tokens[0, 2])
    out = run(params, batch(rows), dataclasses.replace(GREEDY, stop=(stop,), pad=1))
    for answer, row in zip(free.tokens, range(len(rows))):
        where = np.flatnonzero(answer == stop)
        n = where[0] + 1 if len(where) else len(answer)
        np.testing.assert_array_equal(out.tokens[row, :n], answer[:n])
        assert (out.tokens[row, n:] == 1).all() and (out.logprobs[row, n:] == 0).all()
        assert out.lengths[row] == n and out.finished[row] == bool(len(where))
    assert out.finished[0] and not out.finished.all()


def test_thinking_that_does_not_end_is_ended(params, rows):
    """The close is put behind so many tokens, unless it was drawn among them; what follows has it in sight."""
    free = run(params, batch(rows), GREEDY)
    close = int(free.tokens[0, 1])
    thinking = dataclasses.replace(GREEDY, think=3, close=close)
    out = run(params, batch(rows), thinking)
    logits = tiny_vlm.forward(CFG, params, [tiny_vlm.extended(r, a) for r, a in zip(rows, out.tokens)])
    logits = np.where(np.isin(np.arange(tiny_vlm.VOCAB), GREEDY.suppress), -np.inf, logits)
    forced = 0
    for n, (answer, logprobs, unhindered) in enumerate(zip(out.tokens, out.logprobs, free.tokens)):
        row, wanted = rows[n], logits[n].argmax(-1)
        place, at = thinking.put_at(answer), len(row["tokens"]) - 1 + np.arange(8)
        assert place == (None if close in answer[:3] else 3)
        np.testing.assert_array_equal(answer[:3], unhindered[:3])
        if place is None:
            np.testing.assert_array_equal(answer, unhindered)
        else:
            forced += 1
            assert answer[3] == close and logprobs[3] == 0.0 and (logprobs[[0, 1, 2, 4, 5, 6, 7]] < 0).all()
            np.testing.assert_array_equal(np.delete(answer, 3), np.delete(wanted[at], 3))
    assert 0 < forced < len(rows) and thinking.put_at(out.tokens[1, :3]) is None


def test_rows_that_fill_the_batch_stay_empty(params, rows):
    prompts = batch(rows)
    prompts = prompts._replace(length=np.array([len(rows[0]["tokens"]), 0, 0, 0], np.int32))
    out = run(params, prompts, GREEDY)
    assert out.lengths.tolist() == [8, 0, 0, 0] and not out.tokens[1:].any() and not out.finished.any()
    np.testing.assert_array_equal(out.tokens[0], run(params, batch(rows), GREEDY).tokens[0])


@pytest.mark.parametrize("vocab", [1, 2, 12, 13, 100])
def test_draws_follow_the_distribution_without_the_suppressed(vocab):
    logits = np.random.default_rng(vocab).normal(0, 2, vocab)
    suppress = (2, 5) if vocab > 5 else ()
    sampling = Sampling(1, temperature=0.8, suppress=suppress)
    n = 20_000
    many = jnp.broadcast_to(logits, (n, vocab))
    tokens, logprobs = choose(many, jax.random.split(jax.random.key(0), n), sampling)
    full = log_softmax(logits / 0.8)
    wanted = np.exp(full) * ~np.isin(np.arange(vocab), suppress)
    wanted /= wanted.sum()
    seen = np.bincount(tokens, minlength=vocab) / n
    assert len(seen) == vocab and not seen[list(suppress)].any()
    assert (np.abs(seen - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / n) + 1e-9).all()
    np.testing.assert_allclose(logprobs, full[np.asarray(tokens)], atol=1e-5)  # the whole vocabulary's, by definition


def test_what_has_no_probability_is_never_drawn():
    rng = np.random.default_rng(0)
    keys = jax.random.split(jax.random.key(0), 64)
    for shift in range(8):
        logits = np.where(rng.random((64, 1000)) < 0.02, rng.normal(size=(64, 1000)), -1e38)
        logits[:, shift] = 0.0  # something to draw in each row
        tokens = np.asarray(draw_index(keys, jax.nn.softmax(jnp.asarray(logits, jnp.float32))))
        assert (logits[np.arange(64), tokens] > -1e30).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_nucleus_keeps_the_smallest_sufficient_set(top_p):
    logits = np.random.default_rng(2).normal(0, 2, (20, 30)).astype("f")
    kept = np.asarray(nucleus(jnp.asarray(logits), top_p)) > -1e30
    for row, keep in zip(logits, kept):
        probability = np.sort(np.exp(log_softmax(row)))[::-1]
        wanted = int(np.searchsorted(np.cumsum(probability), top_p - 1e-6)) + 1
        assert keep.sum() == min(wanted, 30)
        assert row[keep].min() >= row[~keep].max(initial=-np.inf)


def test_bad_settings_are_refused():
    for bad in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"think": 3, "max_new_tokens": 9},
                {"think": 3, "close": 1, "max_new_tokens": 4}):  # fmt: skip
        with pytest.raises(ValueError):
            Sampling(**{"max_new_tokens": 1} | bad)

"""The engine against the group sampler, row by row, whatever comes and goes beside a row; and its asyncio front.

Not covered: several processes, bfloat16, and parameters that change under a row's own entries (only that the row goes
on and says which version drew what).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.inference.batches import EngineSampler
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.front import Front, Piece
from glmv_jax.inference.programs import Until
from glmv_jax.inference.requests import Busy, Completion, Prompt, Request, group
from glmv_jax.inference.sampler import Prompts, Sampler, Sampling, choose
from glmv_jax.inference.settings import Settings
from glmv_jax.models import MTPConfig, VLMConfig, abstract_params, vlm
from glmv_jax.models.glm5 import GLM5Config
from glmv_jax.models.glm5_next import GLM5NextConfig
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.typing import TokenInput, UserError
from tests import tiny_vlm
from tests.inference.test_drafting import made_half_right
from tests.parallel.collectives import collectives

CFG = tiny_vlm.config()
NEXT = GLM5NextConfig(
    vocab=64, depth=2, kinds="KF", dense=2, width=32, heads=4, q_rank=16, kv_rank=16, nope_dim=8, v_dim=8,
    index_heads=4, index_dim=8, top_k=8, linear_heads=4, linear_dim=8, mlp=48, expert_mlp=16, experts=4, chosen=2,
)  # fmt: skip
GROUP = 3
# Stops that end some answers early, some at once and some not at all.
SAMPLING = Sampling(9, temperature=0.9, top_p=0.95, stop=(20, 21, 33, 34), suppress=(tiny_vlm.IMAGE,))
SETTINGS = Settings(
    slots=4, length=26, steps=2, chunks=(4, 16), lanes=2, reads=2, patches=(16,), pictures=12, pixels=(24, "float32"),
    queue=64,
)  # fmt: skip
SHAPES = [(5, (1, 3)), (9, None), (3, (2, 2)), (12, (3, 1))]


def rows() -> list[dict]:
    rng = np.random.default_rng(0)
    return [tiny_vlm.prompt(rng, n, grid) for n, grid in SHAPES]


def batch() -> dict[str, np.ndarray]:
    return tiny_vlm.prompt_batch(rows(), 20, 16)


@functools.cache
def sampler() -> Sampler:
    return Sampler(CFG, SAMPLING, GROUP)


def sampled(params):
    """What the sampler draws: (tokens, logprobs, whether a stop came) of 4 * GROUP answers."""
    out = jax.device_get(sampler()(params, Prompts.of(batch()), jax.random.key(7)))
    return [(out.tokens[i, :n], out.logprobs[i, :n], out.finished[i]) for i, n in enumerate(out.lengths)]


@functools.partial(jax.jit, static_argnums=2)
def draws(logits_NV, drawn_N, sampling: Sampling):
    """What the sampler makes of these logits at place `drawn` of row n, whose key is that of seed 7 and n."""
    key = lambda n, t: jax.random.fold_in(jax.random.fold_in(jax.random.key(7), n), t)  # noqa: E731
    return choose(logits_NV, jax.vmap(key)(jnp.arange(len(drawn_N)), drawn_N), sampling)


def check_by_forward(cfg, params, done: list[Completion], sampling: Sampling, drawn: bool = True) -> None:
    """Answers to `requests()` are, token by token, those that one pass without any cache gives: their log-probabilities
    and, if `drawn`, the draws."""
    whole = [tiny_vlm.extended(rows()[n // GROUP], x.tokens) for n, x in enumerate(done)]
    params = {part: x for part, x in params.items() if part != "mtp"}
    logits = tiny_vlm.forward(dataclasses.replace(cfg, mtp=None), params, whole)
    starts = np.array([len(rows()[n // GROUP]["tokens"]) - 1 for n in range(len(done))])
    for t in range(max(len(x.tokens) for x in done)):
        at = [(n, x) for n, x in enumerate(done) if t < len(x.tokens)]
        here = logits[np.arange(len(done)), np.minimum(starts + t, logits.shape[1] - 1)]
        tokens, _ = jax.device_get(draws(here, np.full(len(done), t), sampling))
        scaled = here.astype(np.float64) / (sampling.temperature or 1.0)
        full = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
        for n, x in at:
            assert not drawn or x.tokens[t] == tokens[n]
            assert abs(x.logprobs[t] - full[n, x.tokens[t]]) < 1e-4


def requests(**settings) -> list[Request]:
    """The same answers asked of the engine."""
    prompts = [Prompt.of_row(batch(), b) for b in range(len(SHAPES))]
    return [Request(prompts[n // GROUP], seed=7, draw=n, **settings) for n in range(len(SHAPES) * GROUP)]


def check(done: Completion, wanted, atol: float = 1e-5) -> None:
    tokens, logprobs, finished = wanted
    np.testing.assert_array_equal(done.tokens, tokens)
    np.testing.assert_allclose(done.logprobs, logprobs, atol=atol)
    assert done.reason == ("stop" if finished else "length")


def answers(engine: Engine, asked: list[Request]) -> list[Completion]:
    done: dict[int, Completion] = {}
    for n, request in enumerate(asked):
        engine.submit(request, lambda completion, n=n: done.setdefault(n, completion))
    engine.run()
    return [done[n] for n in range(len(asked))]


def numbers(cfg, seed: int = 0) -> dict:
    """Parameters without a program that makes them: of matrices normal by what they read, of norms 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        name = path[-1].key
        if name in ("scale", "bias"):
            return np.full(x.shape, float(name == "scale"), np.float32)
        size = 20 if name == "embedding" else 3 if name == "head" else 1
        return (size * rng.normal(size=x.shape) * x.shape[-2 if x.ndim > 1 else 0] ** -0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(cfg))


@pytest.fixture(scope="module")
def params():
    return numbers(CFG)


@pytest.fixture(scope="module")
def warm(params):
    engine = Engine(CFG, params, SAMPLING, SETTINGS)
    engine.warm()
    return engine


@pytest.fixture
def engine(warm, params):
    """Idle, and with nothing that earlier tests read."""
    warm.set_params(params, 0)
    yield warm
    assert not warm.running and not warm.waiting


@pytest.fixture(scope="module")
def wanted(params):
    return sampled(params)


def test_answers_are_the_samplers_and_logprobs_the_trainers(engine, params, wanted):
    done = answers(engine, requests())
    for completion, answer in zip(done, wanted):
        check(completion, answer)
    assert {x.reason for x in done} == {"stop", "length"} and len({len(x.tokens) for x in done}) > 3
    check_by_forward(CFG, params, done, SAMPLING)


def test_each_request_has_its_own_temperature(engine, params, wanted):
    """Greedy rows beside drawn ones."""
    kinds = [{}, {"temperature": 0.0}, {"temperature": 0.6, "top_p": 1.0}]
    asked = [request for kind in kinds for request in requests(**kind)]
    order = np.random.default_rng(0).permutation(len(asked))
    mixed = answers(engine, [asked[i] for i in order])
    done = [mixed[i] for i in np.argsort(order)]
    for n, kind in enumerate(kinds):
        of_kind = done[n * len(wanted) : (n + 1) * len(wanted)]
        check_by_forward(CFG, params, of_kind, dataclasses.replace(SAMPLING, **kind))
    for completion, answer in zip(done, wanted):
        check(completion, answer)
    assert len({tuple(x.tokens) for x in done}) > 16


def test_neighbours_rows_order_and_interruptions_change_nothing_and_nothing_compiles(engine, wanted, compilations):
    """Requests that come in any order at any time, and are aborted and taken up again. 12 schedules."""
    traces, aborted, calls = engine.traces, 0, compilations.count
    for seed in range(12):
        rng = np.random.default_rng(seed)
        asked, ids, done = requests(), {}, {}
        waiting = list(rng.permutation(len(asked)))
        while len(done) < len(asked):
            for _ in range(min(len(waiting), rng.integers(0, 5))):
                n = waiting.pop()
                keep = lambda x, n=n, done=done: x.reason == "aborted" or done.setdefault(n, x)  # noqa: E731
                ids[n] = engine.submit(asked[n], keep)
            engine.step()
            live = [n for n in ids if n not in done and n not in waiting]
            if live and rng.random() < 0.3:
                n = live[rng.integers(len(live))]
                partial = engine.abort(ids[n])
                np.testing.assert_array_equal(partial.tokens, wanted[n][0][: len(partial.tokens)])
                aborted += len(partial.tokens) > 0
                asked[n] = dataclasses.replace(asked[n], begun=partial)
                waiting.insert(0, n)
        for n, completion in done.items():
            check(completion, wanted[n])
    assert aborted > 5, "the test needs answers that were cut in the middle"
    assert engine.traces == traces and compilations.count == calls


class Compilations:
    count = 0

    def __call__(self, event: str, duration: float, **_) -> None:
        self.count += "backend_compile" in event


@pytest.fixture(scope="module")
def compilations():
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter)
    jax.jit(lambda x: x + 1)(np.float32(3))
    assert counter.count, "the counter sees no compilation"
    return counter


def test_an_engine_in_place_of_a_sampler(engine, params, wanted, monkeypatch):
    """A batch as it is, with a row that only fills it; one prompt a time may wait."""
    monkeypatch.setattr(engine, "settings", dataclasses.replace(SETTINGS, queue=1))
    prompts = Prompts.of(batch())
    out = EngineSampler(engine, GROUP)(params, prompts, jax.random.key(7))
    same = jax.device_get(sampler()(params, prompts, jax.random.key(7)))
    for got, want in zip(out, same):
        np.testing.assert_allclose(got, want, atol=1e-5)
    gap = prompts._replace(length=prompts.length * (np.arange(4) != 1))
    out = EngineSampler(engine, GROUP)(params, gap, jax.random.key(7))
    there = np.repeat(np.arange(4) != 1, GROUP)
    np.testing.assert_array_equal(out.tokens, np.where(there[:, None], same.tokens, SAMPLING.pad))
    assert not out.lengths[~there].any() and (out.lengths[there] > 0).all()


def test_a_prompt_and_its_picture_are_read_once(engine, params):
    prompt = Prompt.of_row(batch(), 2)
    read, encoded, reused = engine.counts.read, engine.counts.encoded, engine.counts.reused
    done = answers(engine, group(prompt, 6, seed=1))
    T = len(prompt.tokens)
    assert len({tuple(x.tokens) for x in done}) > 1
    assert engine.counts.read - read == T - 1 and engine.counts.reused - reused == 5 * (T - 1)
    # The next turn reads what is new, and another question about the same picture does not encode it again.
    more = np.concatenate([prompt.tokens, done[-1].tokens, [50, 51]])
    positions = np.concatenate([prompt.positions, prompt.positions[-1:] + 1 + np.arange(len(more) - T)[:, None]])
    image_row = np.concatenate([prompt.image_row, np.full(len(more) - T, -1)])
    read = engine.counts.read
    (turn,) = answers(engine, [Request(Prompt(more, positions, image_row, prompt.pictures), max_new_tokens=3)])
    assert engine.counts.read - read == 2, "the last token drawn, and the next but one"
    other = Prompt(np.concatenate([[60], prompt.tokens]), np.concatenate([[[0] * 3], prompt.positions + 1]),
                   np.concatenate([[-1], prompt.image_row]), prompt.pictures)  # fmt: skip
    answers(engine, [Request(other, max_new_tokens=1)])
    assert engine.counts.encoded - encoded == 1
    # Without what was kept the turn is the same.
    engine.set_params(params, 1)
    (again,) = answers(engine, [Request(Prompt(more, positions, image_row, prompt.pictures), max_new_tokens=3)])
    np.testing.assert_array_equal(turn.tokens, again.tokens)
    np.testing.assert_allclose(turn.logprobs, again.logprobs, atol=1e-5)


def test_another_picture_in_the_same_place_is_another_prompt(engine, wanted):
    """The same tokens: what was read of the one must not serve the other."""
    asked = requests()[0]
    shown = asked.prompt.pictures[0]
    other = dataclasses.replace(asked.prompt, pictures=(type(shown).of(shown.patches[::-1], shown.yx),))
    first, second, third = answers(engine, [asked, dataclasses.replace(asked, prompt=other), asked])
    check(first, wanted[0])
    check(third, wanted[0])
    assert len(second.tokens) != len(first.tokens) or np.abs(second.logprobs - first.logprobs).max() > 1e-3


def test_parameters_change_between_calls_and_rows_go_on(engine, params, wanted):
    newer = numbers(CFG, seed=1)
    done: dict[int, Completion] = {}
    asked = requests()
    for n in sorted(range(len(asked)), key=lambda n: n % GROUP):  # those that run first show all pictures
        engine.submit(asked[n], lambda x, n=n: done.setdefault(n, x))
    engine.step()
    engine.step()
    engine.set_params(newer, 5)
    engine.run()
    mixed = [x for x in done.values() if len(set(x.versions.tolist())) == 2]
    assert mixed, "the test needs rows that ran at the time"
    for n, x in done.items():
        assert (np.diff(x.versions) >= 0).all() and set(x.versions.tolist()) <= {0, 5}
        old = int((x.versions == 0).sum())
        np.testing.assert_array_equal(x.tokens[:old], wanted[n][0][:old])
    new = sampled(newer)
    fresh = [n for n, x in done.items() if (x.versions == 5).all()]
    assert len(fresh) > 4
    for n in fresh:  # nothing of what the old parameters read or encoded is left
        check(done[n], new[n])


def test_an_aborted_request_gives_what_it_has_and_comes_back(engine, wanted):
    n = int(np.argmax([len(tokens) for tokens, *_ in wanted]))
    done = []
    asked = requests()[n]
    id_ = engine.submit(asked, done.append)
    engine.step()
    engine.step()
    partial = engine.abort(id_)
    assert done == [partial] and partial.reason == "aborted" and 2 <= len(partial.tokens) < 9
    assert engine.abort(id_) is None
    read = engine.counts.read
    (whole,) = answers(engine, [dataclasses.replace(asked, begun=partial)])
    assert engine.counts.read == read, "its entries were still there"
    check(whole, wanted[n])
    # What was put into its mouth counts as said, drawn by nobody.
    forced = Completion.forced([50, 51], after=partial)
    (led,) = answers(engine, [dataclasses.replace(asked, begun=forced)])
    k = len(partial.tokens)
    assert led.tokens[k : k + 2].tolist() == [50, 51] and led.versions[k : k + 2].tolist() == [-1, -1]
    assert (led.versions[:k] == 0).all() and (led.versions[k + 2 :] == 0).all() and len(led.tokens) > k + 2


def test_what_cannot_be_asked_is_said(engine, params):
    text = Prompt.of_ids(range(16, 30))
    for wrong, match in (
        (dict(prompt=text, max_new_tokens=30), "rows hold 26"),
        (dict(prompt=text, max_new_tokens=2, begun=Completion.forced([40, 41])), "is over after 2 of 2"),
        (dict(prompt=text, begun=Completion.forced([20])), "is over after 1 of 9"),
    ):
        with pytest.raises(UserError, match=match):
            engine.submit(Request(**wrong))
    wide = tiny_vlm.prompt_batch([tiny_vlm.prompt(np.random.default_rng(0), 4, (4, 2))], 20, 40)
    with pytest.raises(UserError, match="32 patches does not fit the encoder's rows of 16"):
        engine.submit(Request(Prompt.of_row(wide, 0)))
    bytes_ = dict(batch(), patches=batch()["patches"].astype(np.uint8))
    with pytest.raises(UserError, match="24 x uint8"):
        engine.submit(Request(Prompt.of_row(bytes_, 0)))
    with pytest.raises(UserError, match="ends inside an image"):
        Prompt(text.tokens, text.positions, np.where(np.arange(14) == 13, 0, -1))
    with pytest.raises(UserError, match="1 image tokens but its pictures are 0"):
        Prompt(text.tokens, text.positions, np.where(np.arange(14) == 3, 0, -1))
    for _ in range(SETTINGS.queue):
        engine.submit(Request(text, max_new_tokens=1))
    with pytest.raises(Busy, match="64 requests are waiting"):
        engine.submit(Request(text))
    engine.run()


# --- other models, other devices --------------------------------------------------------------------------------------


def test_drafts_of_the_mtp_head(params):
    """Greedy answers are the plain ones, drawn ones depend on nothing beside them, and some drafts are kept."""
    cfg = dataclasses.replace(CFG, mtp=MTPConfig(CFG.decoder))
    params = made_half_right(numbers(cfg), tiny_vlm.WIDTH, 0.08)
    engine = Engine(cfg, params, SAMPLING, dataclasses.replace(SETTINGS, drafts=2, chunks=(4,)))
    asked = [*requests(temperature=0.0), *requests()]
    done, sizes = answers(engine, asked), {n: [] for n in range(24)}
    check_by_forward(cfg, params, done[:12], dataclasses.replace(SAMPLING, temperature=0.0))
    check_by_forward(cfg, params, done[12:], SAMPLING, drawn=False)
    traces, found = engine.traces, {}
    keep = lambda n: lambda x: x.reason == "aborted" or found.__setitem__(n, x)  # noqa: E731
    order = np.random.default_rng(2).permutation(24)
    ids = {n: engine.submit(asked[n], keep(n), lambda *new, n=n: sizes[n].append(len(new[0]))) for n in order}
    engine.step()
    begun = {n: engine.abort(ids[n]) for n in order[:8]}
    for n, partial in begun.items():
        if partial is not None:
            engine.submit(dataclasses.replace(asked[n], begun=partial), keep(n))
    while engine.step():
        pass
    assert len(found) == 24 and any(partial and len(partial.tokens) for partial in begun.values())
    for n, x in found.items():
        np.testing.assert_array_equal(x.tokens, done[n].tokens)
        np.testing.assert_allclose(x.logprobs, done[n].logprobs, atol=1e-5)
        assert sum(sizes[n]) == len(x.tokens) or n in order[:8]
    assert len({tuple(x.tokens) for x in done[12:]}) > 6 and engine.traces == traces
    assert max(n for of_one in sizes.values() for n in of_one) > SETTINGS.steps, "no draft was kept"
    with pytest.raises(UserError, match="at least 2 tokens"):
        engine.submit(Request(Prompt.of_ids([20])))


def test_linear_attention():
    """The sampler's answers, in rows that others had: a state is of use with all that it has read, and only so."""
    cfg = VLMConfig(None, None, NEXT)
    params = numbers(cfg)
    engine = Engine(cfg, params, SAMPLING, dataclasses.replace(SETTINGS, chunks=(4,), lanes=1))
    texts = [rows()[n]["tokens"] for n in (1, 3)]
    blank = {"patches": np.zeros((0, 24)), "yx": np.zeros((0, 2), int), "frame": np.zeros(0, int)}
    shown = [blank | {"tokens": x, "image_row": 0 * x - 1, "positions": np.arange(len(x))[:, None].repeat(3, 1)}
             for x in texts]  # fmt: skip
    prompts = Prompts.of(tiny_vlm.prompt_batch(shown, 16, 4))._replace(vision=None)
    out = jax.device_get(Sampler(cfg, SAMPLING, 6)(params, prompts, jax.random.key(7)))
    asked = [Request(Prompt.of_ids(texts[n // 6]), seed=7, draw=n) for n in range(12)]
    engine.submit(asked[0])
    engine.step()
    begun = engine.abort(0)
    assert 0 < len(begun.tokens) < out.lengths[0]
    read, reused = engine.counts.read, engine.counts.reused
    done = answers(engine, [dataclasses.replace(asked[0], begun=begun), *asked[1:]])
    for n, completion in enumerate(done):
        k = out.lengths[n]
        check(completion, (out.tokens[n, :k], out.logprobs[n, :k], out.finished[n]), atol=1e-4)
    assert len({tuple(x.tokens) for x in done}) > 6
    held = len(texts[0]) - 1 + len(begun.tokens)
    assert engine.counts.reused - reused > held and engine.counts.read > read
    with pytest.raises(UserError, match="at least 2 tokens"):
        engine.submit(Request(Prompt.of_ids([20])))


def test_latent_caches():
    """GLM-5 of text, with more keys than its indexer keeps."""
    decoder = GLM5Config(
        vocab=tiny_vlm.VOCAB, depth=2, width=tiny_vlm.WIDTH, heads=4, mlp=48, dense=1, expert_mlp=16, experts=4,
        chosen=2, rope_split=(2, 3, 3), q_rank=24, kv_rank=16, nope_dim=8, rope_dim=16, v_dim=8, index_heads=4,
        index_dim=16, top_k=6,
    )  # fmt: skip
    cfg = VLMConfig(None, None, decoder)
    params = numbers(cfg)
    engine = Engine(cfg, params, SAMPLING, dataclasses.replace(SETTINGS, chunks=(4,)))
    prompt = Prompt.of_ids(rows()[1]["tokens"])
    done = answers(engine, [*group(prompt, 11, seed=7), Request(prompt, temperature=0.0)])
    assert engine.counts.reused == 11 * 8 and len({tuple(x.tokens) for x in done}) > 3
    whole = np.full((len(done), 20), 16, np.int32)
    for n, x in enumerate(done):
        whole[n, : len(prompt.tokens) + len(x.tokens)] = [*prompt.tokens, *x.tokens]
    positions = np.broadcast_to(np.arange(20)[:, None], (*whole.shape, 3))
    tokens = TokenInput(whole, positions, np.ones_like(whole), np.full_like(whole, -1))
    logits = jax.jit(lambda p, t: vlm.logits(cfg, p, vlm.apply(cfg, p, None, t).hidden))(params, tokens)
    logits = np.asarray(logits)
    for t in range(max(len(x.tokens) for x in done)):
        given = logits[:, len(prompt.tokens) - 1 + t], np.full(len(done), t)
        drawn, greedy = (jax.device_get(draws(*given, sampling))
                         for sampling in (SAMPLING, dataclasses.replace(SAMPLING, temperature=0.0)))  # fmt: skip
        for n, x in enumerate(done):
            token, logprob = drawn if n < 11 else greedy
            if t < len(x.tokens):
                assert x.tokens[t] == token[n] and abs(x.logprobs[t] - logprob[n]) < 1e-4


def on_mesh(params, wanted, compilations, mesh, **where) -> Engine:
    """An engine on these devices, that has given the wanted answers and compiled nothing after it was warm."""
    engine = Engine(CFG, params, SAMPLING, dataclasses.replace(SETTINGS, slots=8), mesh=mesh, **where)
    engine.warm()
    traces, compiled = engine.traces, compilations.count
    order = np.random.default_rng(1).permutation(len(wanted))
    asked = requests()
    for n, completion in zip(order, answers(engine, [asked[n] for n in order])):
        check(completion, wanted[n])
    assert (engine.traces, compilations.count) == (traces, compiled)
    leaves = jax.tree.leaves(engine._cache)
    assert all(len(x.sharding.device_set) == mesh.size and not x.is_fully_replicated for x in leaves)
    return engine


@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 (emulated) devices")
def test_two_devices_are_as_one(params, wanted, compilations, monkeypatch):
    """With layers stacked, as an accelerator has them. Reading prompts passes nothing between devices."""
    monkeypatch.setattr(vlm, "layers_apart", lambda cfg, params, cache, rows: (params, cache))
    monkeypatch.setattr(vlm, "for_rows", lambda cfg, params, rows: params)
    engine = on_mesh(params, wanted, compilations, make_mesh({"data": 2}, jax.devices()[:2]))
    chunk = engine._chunk(SETTINGS.lanes, SETTINGS.chunks[0])
    prefill = engine._programs.prefill.lower(engine._weights.prefill, engine._visual, engine._cache, chunk).compile()
    assert collectives(prefill) == []


def parts_of(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A matrix and what half of it is, whichever way; its sides in order of their length."""
    sides = tuple(sorted(n for n in shape if n > 1))
    return [sides, *(tuple(sorted((*sides[:i], n // 2, *sides[i + 1 :]))) for i, n in enumerate(sides))]


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")
def test_parameters_over_eight_devices(params, wanted, compilations):
    """By the rules "serve": rows over four, and over two heads, their caches and widths. A step of decoding gathers no
    parameter: what passes is as wide as the model and as many as the rows that decode."""
    engine = on_mesh(params, wanted, compilations, make_mesh({"data": 2, "expert": 2, "tensor": 2}))
    split = [x for x in jax.tree.leaves(engine._weights) if len(x.addressable_shards) > 1 and not x.is_fully_replicated]
    assert len(split) > 10, "nothing is split"
    for name, x in engine._cache["own"]["layers"][0].items():
        assert {part.data.shape[0] for part in x.addressable_shards} == {8 // 4 * CFG.decoder.kv_heads // 2}, name
    args = engine._weights.decode, engine._cache, engine._running(), Until(1, 0)
    found = collectives(engine._programs.decode.lower(*args).compile())
    assert found and max(c.size for c in found) <= 8 * CFG.decoder.vocab, found
    matrices = [x.shape for x in jax.tree.leaves(engine._weights.decode["decoder"]) if x.ndim > 1]
    assert min(map(np.prod, matrices)) > 8 * CFG.decoder.width
    halves = {part for shape in matrices for part in parts_of(shape)}
    gathered = [c.shape for c in found if c.kind == "all-gather" and c.dtype == "f32"]
    assert gathered and not halves.intersection(parts_of(shape)[0] for shape in gathered), gathered


# --- asyncio ----------------------------------------------------------------------------------------------------------


def test_the_front_completes_streams_cancels_and_waits_for_room(engine, wanted, monkeypatch):
    monkeypatch.setattr(engine, "settings", dataclasses.replace(SETTINGS, queue=2))
    aborted, abort = [], engine.abort
    monkeypatch.setattr(engine, "abort", lambda id_: aborted.append(id_) or abort(id_))
    asked = requests()
    first = int(np.argmax([len(tokens) for tokens, *_ in wanted]))

    async def everything():
        with Front(engine) as front:
            asleep, wake = threading.Event(), threading.Event()
            done = await asyncio.gather(*(front.complete(request) for request in asked))  # 12, though 2 may wait
            pieces = [piece async for piece in front.stream(asked[first])]
            # While the thread is held up: one is cancelled, one aborted, and one stream left, of which 2 are not yet in
            # the engine's queue.
            front.ask(lambda: (asleep.set(), wake.wait(60)))
            asleep.wait(60)
            cancelled = asyncio.create_task(front.complete(asked[first]))
            tickets = [front.submit(request) for request in requests(temperature=0.0)]
            await asyncio.sleep(0)
            cancelled.cancel()
            tickets[-1].abort()
            wake.set()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            none = await asyncio.wrap_future(tickets[-1].done)
            assert (none.reason, len(none.tokens), aborted) == ("aborted", 0, [])
            async for _ in front.stream(asked[first]):
                break
            for ticket in tickets[:-1]:
                assert (await asyncio.wrap_future(ticket.done)).reason != "aborted"
            with pytest.raises(UserError, match="rows hold 26"):
                await front.complete(dataclasses.replace(asked[1], max_new_tokens=30))
            await asyncio.wrap_future(front.ask(lambda: None))  # behind all that the thread was asked before
            assert len(aborted) == 1
            flood = await asyncio.wrap_future(front.ask(lambda: [front.submit(x, wait=False).done for x in asked]))
            flood = await asyncio.gather(*map(asyncio.wrap_future, flood), return_exceptions=True)
            assert sum(isinstance(x, Busy) for x in flood) == len(asked) - 2
        with pytest.raises(UserError, match="was closed"):
            await front.complete(asked[0])
        return done, pieces

    done, pieces = asyncio.run(everything())
    for completion, answer in zip(done, wanted):
        check(completion, answer)
    check(pieces[-1], wanted[first])
    assert len(pieces) > 4 and all(isinstance(piece, Piece) for piece in pieces[:-1])
    np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces[:-1]]), wanted[first][0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ends_the_engine_is_heard_by_all_who_wait(engine, monkeypatch):
    def broken() -> bool:
        raise RuntimeError("the device is gone")

    async def ask():
        front = Front(engine)
        monkeypatch.setattr(engine, "step", broken)
        found = await asyncio.gather(*(front.complete(x) for x in requests()), return_exceptions=True)
        front.close()
        return found

    assert {str(x) for x in asyncio.run(ask())} == {"the device is gone"}
    monkeypatch.undo()
    engine.run()

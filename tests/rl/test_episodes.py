"""Episodes of several turns from the sampler to a training row: the same ids, pixels and log-probabilities."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from glmv_jax import rl
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.front import Front
from glmv_jax.inference.requests import Prompt, Request
from glmv_jax.inference.sampler import Sampler, Sampling
from glmv_jax.inference.settings import Settings
from glmv_jax.rl import Grade, episodes, integrity
from glmv_jax.rl.gym import Observation, Step, asked, said_by
from glmv_jax.rl.play import Limits, play
from glmv_jax.rl.players import sampled, served
from glmv_jax.rl.transcript import Form, Turn
from glmv_jax.typing import UserError
from tests import tiny_vlm

TOKENIZER = Tokenizer()
FORM = Form(TOKENIZER, Patcher(max_patches=16))
CFG = tiny_vlm.config(vocab=TOKENIZER.vocab_size, patch=8)
TOKENS, PATCHES = 160, 48
SIZES = {"rows": (1, 2, 3), "tokens": 2 * TOKENS, "patches": 2 * PATCHES, "channels": 192, "image": TOKENIZER.image,
         "names": ["talk"]}  # fmt: skip


class Talk:
    """Three turns; pictures come with the answers to the first and the second."""

    source = "talk"

    def reset(self, seed):
        self.rng, self.turn = np.random.default_rng(seed), 0
        return asked(f"Begin {seed}.")

    async def step(self, action):
        self.turn += 1
        images = [Image.fromarray(self.rng.integers(0, 256, (24 + 8 * self.turn, 40, 3), np.uint8))] * self.turn
        return Step(Observation((said_by("user", "Look.", images),), tuple(images)), self.turn == 3, float(self.turn))

    def close(self):
        pass


@pytest.fixture(scope="module")
def params():
    tree = tiny_vlm.params(CFG)
    # A random policy would hardly ever stop: here it does in some contexts and not in others.
    stops = [TOKENIZER.eos, TOKENIZER.special["<|user|>"]]
    tree["decoder"]["head"] = tree["decoder"]["head"].at[:, np.array(stops)].multiply(4.0)
    return tree


def talked(policy, seed: int):
    return asyncio.run(play(Talk(), policy, seed, FORM, Limits(turns=3, tokens=TOKENS, patches=PATCHES)))


def recorded(talks) -> list[rl.Rollout]:
    return [episodes.record(episode, episodes.verdict(episode), row) for row, episode in enumerate(talks)]


@pytest.fixture(scope="module")
def talks():
    """Two episodes of random words."""

    async def policy(transcript, room):
        rng = np.random.default_rng(len(transcript))
        words = rng.integers(len(TOKENIZER.special), TOKENIZER.vocab_size, int(rng.integers(2, 7)))
        return Turn.of([*words, TOKENIZER.special["<|user|>"]], rng.normal(size=len(words) + 1))

    return [talked(policy, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def records(talks):
    return recorded(talks)


def drawn_by_sampler(params, sampling) -> list:
    sampler = Sampler(CFG, sampling)
    policy = lambda seed: sampled(sampler, params, jax.random.key(seed), tokens=TOKENS, patches=PATCHES)  # noqa: E731
    return [talked(policy(seed), seed) for seed in (1, 2)]


def drawn_by_engine(params, sampling) -> list:
    """Two at a time, so that a slot reads on where it was, and where another was."""
    sizes = Settings(slots=2, length=TOKENS, steps=4, chunks=(16, 64), patches=(16,), pictures=64)
    limits = Limits(turns=3, tokens=TOKENS, patches=PATCHES)
    with Front(Engine(CFG, params, sampling, sizes)) as front:

        def policy(seed):
            async def complete(document, room, turn):
                most = min(room, sampling.max_new_tokens)
                return await front.complete(Request(Prompt.of_document(document), 9 * seed + turn, max_new_tokens=most))

            return served(complete)

        async def both():
            return await asyncio.gather(*(play(Talk(), policy(seed), seed, FORM, limits) for seed in (1, 2)))

        return asyncio.run(both())


@pytest.mark.parametrize("drawn_by", [drawn_by_sampler, drawn_by_engine])
def test_trained_log_probabilities_are_the_sampled_ones(params, drawn_by):
    """To 1e-4 in float32: through prefills of three lengths, pictures that arrive later, packing, other positions.

    Image tokens may be drawn here, as they are without suppression.
    """
    records = recorded(drawn_by(params, Sampling(8, stop=tuple(TOKENIZER.stops))))
    rows, left_out = episodes.to_rows(records, np.array([1.0, -2.0]), **(SIZES | {"rows": (1,)}))
    logits = tiny_vlm.batch_logits(CFG, params, rows).astype(np.float64)
    logprob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert not left_out and len(rows["tokens"]) == 1
    start = 0
    for record, advantage in zip(records, (1.0, -2.0)):
        ids = np.concatenate([record.prompt, record.answer])
        here, start = np.arange(start, start + len(ids)), start + len(ids)
        np.testing.assert_array_equal(rows["tokens"][0, here], ids)
        at = here[len(record.prompt) :][record.drawn]
        recomputed = logprob[0, at - 1, rows["tokens"][0, at]]
        np.testing.assert_allclose(recomputed, record.logprobs[record.drawn], atol=1e-4)
        np.testing.assert_array_equal(rows["old_logprob"][0, at], record.logprobs[record.drawn])
        assert (rows["advantage"][0, at] == advantage).all() and np.isclose(rows["loss_weight"][0, at].sum(), 1)
        quiet = np.setdiff1d(here, at)
        assert not rows["loss_weight"][0, quiet].any() and not rows["advantage"][0, quiet].any()
        assert record.drawn.sum() == sum(len(ids) for ids in drawn_ids(record)) and len(drawn_ids(record)) == 3
    assert not rows["segments"][0, start:].any()
    assert all(len(record.images) == 3 and record.truncated is not None for record in records)
    assert {len(ids) for record in records for ids in drawn_ids(record)} & set(range(1, 8)), "some turns should stop"


def drawn_ids(record) -> list[np.ndarray]:
    """The runs of drawn ids of a record."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], record.drawn, [False]]).astype(int)))
    return [record.answer[a:b] for a, b in zip(edges[::2], edges[1::2])]


def test_the_prompt_is_the_first_observation_and_the_record_is_told(records, talks):
    for record, episode in zip(records, talks):
        text = TOKENIZER.decode(record.prompt, keep_special=True)
        assert text == f"[gMASK]<sop><|user|>Begin {episode.seed}.<|assistant|></think>"
        assert record.id == f"talk/{episode.seed}" and record.image_hash.count(",") == 2
        assert record.grade.reward == 1.0 and episode.reward == 6.0 and record.text == episode.actions[-1].text
        assert json.loads(json.dumps(record.to_json()))["images"] == 3


def test_an_image_token_that_the_model_draws_shows_nothing():
    """It is there, learnt as any other, and takes no pixels from the image that is written behind it."""

    async def policy(transcript, room):
        return Turn.of([TOKENIZER.image, TOKENIZER.image, TOKENIZER.special["<|user|>"]], -1.0)

    episode = asyncio.run(play(Talk(), policy, 0, FORM, Limits(turns=2)))
    record = episodes.record(episode, Grade(0.0, False, {}), 0)
    rows, _ = episodes.to_rows([record], np.ones(1), **SIZES)
    image = rows["tokens"][0] == TOKENIZER.image
    assert (image & (rows["loss_weight"][0] > 0)).sum() == 4
    assert (rows["image_row"][0] >= 0).sum() == sum(len(p) // 4 for p, _ in record.images) == image.sum() - 4
    np.testing.assert_array_equal(rows["image_row"][0] >= 0, image & (rows["loss_weight"][0] == 0))


def test_a_limit_inside_an_image_leaves_the_whole_image_out():
    """Wherever it falls, and where there is no room for an image's patches: what nobody answered is not there, and the
    image tokens that are left are as many as the visual tokens of the images that are left."""

    async def policy(transcript, room):
        return Turn.of(([2600, 2601, 2602] + [TOKENIZER.special["<|user|>"]])[:room], -1.0)

    whole = asyncio.run(play(Talk(), policy, 0, FORM, Limits(turns=3)))
    image = TOKENIZER.image
    block = np.flatnonzero(whole.transcript.image_of_token == 1)  # the first picture of the second answer
    assert len(block) > 3 and whole.ended == "done"
    places = [Limits(turns=3, tokens=int(n)) for n in (block[0], block[0] + 1, block[-1], block[-1] + 1)]
    for limits in [*places, Limits(turns=3, patches=whole.transcript.patches - 4)]:
        episode = asyncio.run(play(Talk(), policy, 0, FORM, limits))
        script = episode.transcript
        assert episode.ended == "tokens" and len(script.images) == len(script.hashes) == 1 and script.drawn[-1]
        assert len(script) < block[0] and (script.tokens == image).sum() == len(script.images[0][0]) // 4
        np.testing.assert_array_equal(script.tokens, whole.transcript.tokens[: len(script)])
        record = episodes.record(episode, Grade(0.0, False, {}), 0)
        rows, _ = episodes.to_rows([record], np.ones(1), **SIZES)
        assert (rows["image_row"][0] >= 0).sum() == (rows["tokens"][0] == image).sum() > 0


def test_pixels_that_are_not_those_it_was_drawn_from_raise(records):
    record = records[0]
    other = record.images[0][0].copy()
    other[0, 0] ^= 1
    (a, b, c) = record.images
    shows, whole = "the training row shows image", "drop it whole"
    for images, message in (((b, a, c), shows), ((a, b), whole), (((other, a[1]), b, c), shows), ((), whole)):
        with pytest.raises(ValueError, match=message):
            integrity.checked(episodes.to_rows([dataclasses.replace(record, images=images)], np.ones(1), **SIZES)[0])
    cut = dataclasses.replace(record, answer=record.answer[:-60], drawn=record.drawn[:-60])
    with pytest.raises(ValueError, match="drop it whole"):
        episodes.to_rows([cut], np.ones(1), **SIZES)


def test_pixels_that_change_behind_the_packing_raise(records):
    """An image that is deleted, swapped for another of the conversation, or cut; and two that would see each other."""

    def changed(name, change):
        rows, _ = episodes.to_rows(records, np.ones(2), **(SIZES | {"rows": (2,)}))
        shown = rows["frame"][0, rows["image_row"][0][rows["image_row"][0] >= 0] * 4]
        change(rows[name][0], *(np.flatnonzero(rows["frame"][0] == n) for n in np.unique(shown)[:2]))
        return rows

    def swap(patches, a, b):
        patches[a], patches[b] = patches[b].copy(), patches[a].copy()

    integrity.checked(changed("patches", lambda *_: None))
    shows = "rollout talk/.: the training row shows image"
    for name, change, message in (
        ("patches", swap, shows),
        ("patches", lambda x, a, b: x.__setitem__(a, 0), shows),
        ("image_row", lambda x, a, b: x.__setitem__(np.isin(x, a // 4), -1), shows),
        ("image_row", lambda x, a, b: x.__setitem__(x == a[-1] // 4, -1), shows),
        ("frame", lambda x, a, b: x.__setitem__(b, x[a[0]]), shows),
        ("frame", lambda x, a, b: x.__setitem__(x > x[b[0]], x[a[0]]), "have one frame number"),
    ):
        with pytest.raises(ValueError, match=message):
            integrity.checked(changed(name, change))


def test_rows_are_those_of_answers_of_one_turn(records):
    """In names, types and sizes, so that one compiled step takes both."""
    rows, _ = episodes.to_rows(records, np.ones(2), **(SIZES | {"rows": (2,)}))
    sizes = {name: SIZES[name] for name in ("tokens", "patches", "names")}
    pixels = {"patches": np.zeros((1, 1, SIZES["channels"]), np.uint8)}
    single, _ = rl.to_batch((), pixels, np.zeros(0), rows=(2,), **sizes)
    told = lambda batch: {name: (x.shape, x.dtype) for name, x in batch.items()}  # noqa: E731
    assert told(rows) == told(single)


def test_rows_have_their_limits(records):
    rows, left_out = episodes.to_rows(records, np.ones(2), **(SIZES | {"patches": PATCHES}))
    assert len(rows["tokens"]) == 2 and not left_out
    rows, left_out = episodes.to_rows(records, np.ones(2), **(SIZES | {"patches": PATCHES, "rows": (1,)}))
    assert len(rows["tokens"]) == 1 and left_out == 1
    with pytest.raises(ValueError, match="packed by rl.episodes"):
        rl.to_batch(records, {}, np.ones(2), rows=(1,), tokens=1, patches=1, names=["talk"])
    with pytest.raises(UserError, match="do not fit a row"):
        episodes.to_rows(records, np.ones(2), **(SIZES | {"patches": 4}))


def test_an_episode_without_an_answer_is_no_record(talks):
    nothing = dataclasses.replace(talks[0], transcript=type(talks[0].transcript)(FORM), ended="failed")
    with pytest.raises(UserError, match="has no answer"):
        episodes.record(nothing, Grade(0.0, False, {}), 0)
    assert episodes.verdict(dataclasses.replace(talks[0], reward=None)).flags == ("no_reward",)
    assert episodes.verdict(dataclasses.replace(talks[0], reward=-1.0, ended="turns")) == Grade(
        0.0, False, {"environment": 0.0}, ("turns",)
    )

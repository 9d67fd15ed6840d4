"""Prompts to rollouts to training rows with a tiny random model: same tokens, same pixels, same log-probabilities.

Not covered: that training on the rows improves a policy (the recipe's own numbers say that), and several hosts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest

from glmv_jax import rl
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.inference.sampler import Sampler, Sampling
from glmv_jax.rl.batch import for_ranks
from glmv_jax.rl.integrity import checked
from glmv_jax.rl.prompts import namespaced, prompts
from glmv_jax.rl.rollout import rollout
from glmv_jax.typing import UserError
from tests import tiny_vlm

GROUP = 3
NAMES = ["count", "ground", "read"]
TOKENIZER = Tokenizer()
BUILDER = DocumentBuilder(TOKENIZER, Patcher(max_patches=16), max_tokens=40, max_patches=16)
CFG = tiny_vlm.config(vocab=TOKENIZER.vocab_size, patch=8)
SIZES = {"rows": (4, 6, 8), "tokens": 96, "patches": 32, "names": NAMES}


@pytest.fixture(scope="module")
def batch():
    return next(prompts(dict.fromkeys(NAMES, 1.0), BUILDER, batch=4, seed=0))


@pytest.fixture(scope="module")
def params():
    tree = tiny_vlm.params(CFG)
    # A random policy would hardly ever stop: here it does in some contexts and not in others.
    tree["decoder"]["head"] = tree["decoder"]["head"].at[:, TOKENIZER.eos].multiply(4.0)
    return tree


@pytest.fixture(scope="module")
def records(batch, params):
    sampler = Sampler(CFG, Sampling.chat(TOKENIZER, 6), GROUP)
    score = functools.partial(rl.score, verifiers=rl.verifiers())
    return rollout(sampler, params, batch, jax.random.key(0), TOKENIZER, score)


def packed(records, batch, **changes):
    rows, left_out = rl.to_batch(records, batch, np.arange(len(records)) + 1.0, **(SIZES | changes))
    assert not left_out
    return rows


def pieces(rows):
    """(row, positions of the prompt, of its last token again, of the answer) of each branch, in packing order."""
    found = []
    for b, s in itertools.product(range(len(rows["segments"])), range(1, 20)):
        (inside,) = np.nonzero(rows["segments"][b] == s)
        branches = rows["branches"][b, inside]
        for branch in range(1, branches.max(initial=0) + 1):
            head, *answer = inside[branches == branch]
            found.append((b, inside[branches == 0], head, np.array(answer)))
    return found


def test_records_say_what_was_asked_and_sampled(records, batch):
    assert len(records) == 4 * GROUP and [r.row for r in records] == [i for i in range(4) for _ in range(GROUP)]
    assert {r.truncated for r in records} == {True, False}, "the test needs both kinds"
    for r in records:
        assert r.id == batch["samples"][r.row].id and r.source == batch["samples"][r.row].source
        text = TOKENIZER.decode(r.prompt, keep_special=True)
        assert text.startswith("[gMASK]<sop><|user|><|begin_of_image|><|image|>")
        assert text.endswith(TOKENIZER.decode(TOKENIZER.encode(batch["samples"][r.row].prompt))
                             + "<|assistant|></think>")  # fmt: skip
        assert TOKENIZER.image not in r.answer and len(r.answer) == len(r.logprobs) <= 6
        assert (len(r.answer) == 6 or not r.truncated) and (r.logprobs < 0).all()
        assert json.loads(json.dumps(r.to_json()))["answer"] == r.answer.tolist()


def test_trained_ids_logprobs_and_advantages_are_the_sampled_ones(records, batch, params):
    rows = packed(records, batch)
    order = [r for r in records if len(r.answer)]
    logits = tiny_vlm.batch_logits(CFG, params, rows).astype(np.float64)
    logprob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    seen = set()
    for b, asked, head, at in pieces(rows):
        advantage = rows["advantage"][b, at]
        record = order[int(advantage[0]) - 1]
        seen.add(int(advantage[0]))
        assert (advantage == advantage[0]).all() and NAMES[rows["source"][b, at[0]]] == record.source
        np.testing.assert_array_equal(rows["tokens"][b, at], record.answer)
        np.testing.assert_array_equal(rows["tokens"][b, [*asked, head]], record.prompt)
        assert not rows["loss_weight"][b, [*asked, head]].any() and at[0] == head + 1
        np.testing.assert_array_equal(rows["old_logprob"][b, at], record.logprobs)
        recomputed = logprob[b, at - 1, record.answer]  # through packing, shared prompts and fresh positions
        np.testing.assert_allclose(recomputed, record.logprobs, atol=1e-4)
    assert seen == set(range(1, len(records) + 1))


def test_rollouts_of_a_prompt_share_it_and_its_image(records, batch):
    rows = packed(records, batch, tokens=72)
    assert (rows["frame"] > 0).sum() == (batch["frame"] > 0).sum(), "every image once, for 3 answers each"
    answers = sum(1 + len(r.answer) for r in records)
    assert (rows["segments"] > 0).sum() == (batch["length"] - 1).sum() + answers, "every prompt once"
    # A group too large for a row goes on in the next, where its prompt stands again.
    alone = packed(records, batch, targets=6, rows=(12,))
    assert (alone["frame"] > 0).sum() > (batch["frame"] > 0).sum()


def test_a_frame_is_unique_in_its_row(records, batch):
    rows = packed(records, batch, tokens=300, patches=96, rows=(2,))
    for b in range(2):
        shown = rows["frame"][b][rows["frame"][b] > 0]
        for frame in np.unique(shown):
            yx = rows["yx"][b][rows["frame"][b] == frame]
            assert len(np.unique(yx, axis=0)) == len(yx), "two images in one frame would attend to each other"


def test_the_mean_over_rollouts_does_not_depend_on_packing(records, batch):
    lengths = [len(r.answer) for r in records]
    loss = lambda rows: (rows["advantage"] * rows["loss_weight"]).sum() / rows["loss_weight"].sum()  # noqa: E731
    values = np.arange(len(records)) + 1.0
    for changes in ({}, {"tokens": 60, "rows": (12,)}):
        assert loss(packed(records, batch, **changes)) == pytest.approx(values.mean())
        by_token = loss(packed(records, batch, per="token", **changes))
        assert by_token == pytest.approx(np.average(values, weights=lengths))


def test_another_picture_or_none_raises(records, batch):
    swapped = {**batch, "patches": batch["patches"][::-1]}
    with pytest.raises(ValueError, match="the training row shows image"):
        checked(packed(records, swapped))
    pixel = batch["patches"].copy()
    pixel[0, 0, 0] ^= 1
    with pytest.raises(ValueError, match="the training row shows image"):
        checked(packed(records, {**batch, "patches": pixel}))
    with pytest.raises(ValueError, match="shows image none"):
        checked(packed(records, {**batch, "image_row": np.full_like(batch["image_row"], -1)}))
    with pytest.raises(ValueError, match="other tokens than were asked and drawn"):
        checked(packed(records, {**batch, "tokens": batch["tokens"][::-1]}))


def test_row_counts_come_from_the_list(records, batch):
    counts = [len(packed(records[:n], batch)["tokens"]) for n in (1, len(records))]
    assert counts[0] == 4 and counts[1] in (4, 6, 8)
    with pytest.raises(UserError, match="do not fit a row of 15, 32"):
        packed(records, batch, tokens=15)


def test_a_bound_on_images_holds(records, batch):
    sizes = {"tokens": 400, "patches": 96, "rows": (2, 4)}
    free, bound = packed(records, batch, **sizes), packed(records, batch, images=1, **sizes)
    assert free["frame"].max() > 1 == bound["frame"].max() and len(bound["frame"]) == 4
    with pytest.raises(UserError, match="1 images do not fit a row of 96, 32, 96, 0"):
        packed(records, batch, images=0)


def test_rows_are_dealt_out_to_ranks_evenly_and_whole(records, batch):
    rows = packed(records, batch, rows=(8,))
    dealt = for_ranks(rows, 2)
    assert for_ranks(rows, 3) is rows, "eight rows do not divide by three"
    checked(dealt)
    order = [next(i for i in range(8) if (dealt["tokens"][b] == rows["tokens"][i]).all()
                  and (dealt["advantage"][b] == rows["advantage"][i]).all()) for b in range(8)]  # fmt: skip
    for name, x in dealt.items():
        np.testing.assert_array_equal(x, rows[name][order], err_msg=name)
    used = (dealt["segments"] > 0).sum(1).reshape(2, 4).sum(1)
    every = [sum(c) for c in itertools.combinations((rows["segments"] > 0).sum(1), 4)]
    assert max(used) <= min(max(n, sum(used) - n) for n in every) * 1.1


def test_prompts_that_find_no_room_are_left_out_last_first(records, batch):
    """The first prompt is there; the prompts left out have no rollout in the rows."""
    numbers = np.arange(len(records)) + 1.0
    few, left_out = rl.to_batch(records, batch, numbers, **(SIZES | {"rows": (1,)}))
    there = np.unique(few["advantage"][few["advantage"] > 0]).astype(int) - 1
    with_answer = [n for n, record in enumerate(records) if len(record.answer)]
    assert 0 < len(there) < len(with_answer) and there[0] == with_answer[0]
    assert left_out == len(with_answer) - len(there)
    assert not {records[n].row for n in there} & {records[n].row for n in with_answer if n not in there}


def test_prompts_resume_and_do_not_meet_other_namespaces():
    make = lambda **k: prompts({"count": 0.5, "read": 0.5}, BUILDER, batch=2, **k)  # noqa: E731
    stream = make(seed=1)
    next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    wanted = [next(stream) for _ in range(2)]
    again = make(seed=1)
    again.set_state(state)
    for old, new in zip(wanted, [next(again) for _ in range(2)]):
        np.testing.assert_array_equal(old["patches"], new["patches"])
        assert [s.id for s in old["samples"]] == [s.id for s in new["samples"]]
    assert {s.source for s in wanted[0]["samples"]} == {"count", "read"}
    first = next(make(seed=1))
    for other in (make(seed=2), make(seed=1, namespace="sft")):
        assert not np.array_equal(first["patches"], next(other)["patches"])
    assert namespaced("rl", 0) >= 1 << 32 and namespaced("rl", 0) != namespaced("rl", 1) != namespaced("sft", 1)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1):
            if c <= n:
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert rl.pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))
    with pytest.raises(ValueError):
        rl.pass_at_k(3, 1, 4)


def test_metrics_by_source(records):
    grades = [rl.Grade(r, r == 1.0, {"format": float(r > 0), "score": r}) for r in (0.0, 1.0, 1.0, 0.1, 0.1, 0.1)]
    grades += [rl.Grade(0.0, False, {}, ("error",))] * 3 + [rl.Grade(1.0, True, {"format": 1.0, "score": 1.0})] * 3
    graded = [dataclasses.replace(r, source=s, grade=g) for r, g, s in zip(records, grades, "a" * 6 + "b" * 6)]
    m = rl.by_source(graded)
    assert m["reward/a"] == pytest.approx(2.3 / 6) and m["accuracy/a"] == pytest.approx(2 / 6)
    assert m["pass@3/a"] == 0.5 and m["pass@3/b"] == 0.5 and m["same/a"] == 0.5 and m["same/b"] == 1.0
    assert m["format/a"] == pytest.approx(5 / 6) and m["error/b"] == 0.5 and m["error/a"] == 0.0
    assert m["reward/mean"] == pytest.approx((2.3 / 6 + 0.5) / 2)
    assert m["length/a"] == np.mean([len(r.answer) for r in records[:6]])
    assert m["truncated/b"] == np.mean([r.truncated for r in records[6:]])
    assert m["logprob/a"] == pytest.approx(np.concatenate([r.logprobs for r in records[:6]]).mean(), rel=1e-5)

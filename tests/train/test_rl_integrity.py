"""Pixels and ids from the task to the arrays that the step takes: what is lost, swapped or cut on the way is said.

A policy that draws ids at random stands in for the model, so nothing is compiled; what an image is known by is computed
again here, from the task's own picture. Not covered: the devices' side, and workers on other machines.
"""

from __future__ import annotations

import types
import zlib

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.data.hashes import image_hash
from glmv_jax.inference.sampler import Generated
from glmv_jax.rl import Grade, integrity, tasks
from glmv_jax.rl.pipeline.local import Rows
from glmv_jax.rl.prompts import namespaced
from glmv_jax.train import main
from glmv_jax.train.stages import rl as stage_lib
from glmv_jax.train.stages import rl_questions

SMALL = ["rollout.prompts=4", "rollout.group=2", "rollout.minibatches=1", "rollout.max_new_tokens=6", "data.ahead=0",
         "rollout.rows=(2,4)", "rollout.staleness=0"]  # fmt: skip
FORMS = {"sync": (), "async": ("rollout.pipeline=async",)}
STATE = types.SimpleNamespace(params={}, step=0)


class Random:
    """Draws letters."""

    def __init__(self, stage):
        self.group, self.sampling = stage.cfg.rollout.group, stage.sampler.sampling
        self._letters = [stage.tokenizer.encode(letter)[-1] for letter in "abcdefgh"]

    def __call__(self, params, asked, key):
        rng, shape = np.random.default_rng(jax.random.key_data(key).tolist()), (len(asked.tokens) * self.group, 6)
        tokens = rng.choice(self._letters, shape).astype(np.int32)
        lengths = rng.integers(3, 7, shape[0])
        return Generated(tokens, -rng.random(shape).astype(np.float32), lengths, lengths < 6)


SHOWS_ANOTHER = r"rollout \w+/train/\d+: the training row shows image .* but the answer was drawn from image"


def build(folder, form: str, *more: str):
    cfg = config.override(config.load("experiments/rl_grpo.py:size=nano"), [*SMALL, *FORMS[form], *more])
    cfg.faults = str(folder / "faults.jsonl")
    made = main.stage_class("rl")(cfg)
    made.sampler = Random(made)
    made.verifiers = dict.fromkeys(made.names, lambda text, sample: Grade(zlib.crc32(text.encode()) / 2**32, False, {}))
    return made


@pytest.fixture(scope="module", params=FORMS)
def stage(request, tmp_path_factory):
    made = build(tmp_path_factory.mktemp(request.param), request.param)
    made.form_name = request.param
    return made


def one(stage):
    data = stage.train_data()
    try:
        return stage.next_batch(data, STATE)[0]
    finally:
        data.close()


def places(batch, b: int) -> np.ndarray:
    """Patches of the first image of a row."""
    return np.flatnonzero(batch["frame"][b] == 1)


def delete(batch):
    """Its tokens show nothing any more."""
    (shown,) = np.nonzero(batch["image_row"][0] >= 0)
    batch["image_row"][0, shown] = -1


def swap(batch):
    """The first images of two rows, or of one row."""
    first = places(batch, 0)
    b, second = (1, places(batch, 1)) if len(batch["frame"]) > 1 else (0, np.flatnonzero(batch["frame"][0] == 2))
    n = min(len(first), len(second))
    kept = batch["patches"][0, first[:n]].copy()
    batch["patches"][0, first[:n]] = batch["patches"][b, second[:n]]
    batch["patches"][b, second[:n]] = kept


def cut(batch):
    """Its last visual token."""
    (shown,) = np.nonzero(batch["image_row"][0] == places(batch, 0)[-1] // 4)
    batch["image_row"][0, shown] = -1


def reorder(batch):
    """Its visual tokens the other way round."""
    (shown,) = np.nonzero(np.isin(batch["image_row"][0], places(batch, 0) // 4))
    batch["image_row"][0, shown] = batch["image_row"][0, shown][::-1]


FAULTS = [delete, swap, cut, reorder]


def test_what_is_trained_on_are_the_pictures_of_the_tasks(stage, monkeypatch):
    found = []
    checked = integrity.checked
    monkeypatch.setattr(stage_lib, "checked", lambda batch: found.append(batch) or checked(batch))
    batch = one(stage)
    assert "shown" not in batch and {x.dtype for x in batch.values()} <= {np.dtype(k) for k in ("i4", "f4", "u1")}
    shown = [(b, one) for b, row in enumerate(found[0]["shown"]) for one in row]
    assert len(shown) >= 4
    for b, (rollout, shared, own) in shown:
        number = int(rollout.id.rpartition("/")[2])
        sample = tasks.get(rollout.source).source("train", namespaced("rl", stage.data_seed))[number]
        (picture,) = sample.images
        patches, yx = stage.asker.patcher(picture)
        assert rollout.image_hash == image_hash(patches, yx)
        rows = batch["image_row"][b, shared]
        np.testing.assert_array_equal(batch["patches"][b, rows[rows >= 0][0] * 4 :][: len(patches)], patches)
        ids = [*batch["tokens"][b, shared], *batch["tokens"][b, own]]
        assert ids == [*rollout.prompt, *rollout.answer]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_before_the_engine_is_said(stage, fault, monkeypatch):
    def spoilt(rows):
        return lambda key: _spoilt(rows(key))

    def _spoilt(batch):
        batch = {name: x.copy() for name, x in batch.items()}
        if len(batch["tokens"]) == 1:  # a lone prompt has no other image: what it swaps with are its own halves
            doubled = {name: np.concatenate([x, x]) if isinstance(x, np.ndarray) else x for name, x in batch.items()}
            doubled["patches"][1] = 255 - doubled["patches"][1]
            fault(doubled)
            return {name: x[:1] for name, x in doubled.items()}
        fault(batch)
        return batch

    if stage.form_name == "sync":
        name, make = "prompts", stage_lib.prompts
        monkeypatch.setattr(stage_lib, name, lambda *a, **k: _Each(make(*a, **k), _spoilt))
    else:
        make = rl_questions.prompt_rows
        monkeypatch.setattr(rl_questions, "prompt_rows", lambda *a, **k: _Each(make(*a, **k), _spoilt))
    with pytest.raises(ValueError, match=r"prompt \w+/train/\d+: its row shows image .* but it was made with image"):
        one(stage)


class _Each:
    """An iterator or a sequence of batches, each changed."""

    def __init__(self, of, change):
        self._of, self._change = of, change

    def __next__(self):
        return self._change(next(self._of))

    def __getitem__(self, i):
        return self._change(self._of[i])

    def close(self):
        self._of.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_front_of_the_packing_is_said(stage, fault, monkeypatch):
    packed = stage.packed

    def spoilt(records, batch):
        batch = {name: x.copy() for name, x in batch.items()}
        fault(batch)
        return packed(records, batch)

    monkeypatch.setattr(stage, "packed", spoilt)
    with pytest.raises(ValueError, match=SHOWS_ANOTHER):
        one(stage)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_behind_the_packing_is_said(stage, fault, monkeypatch):
    packed = stage.packed

    def spoilt(records, batch):
        for rows, left_out in packed(records, batch):
            fault(rows)
            yield rows, left_out

    monkeypatch.setattr(stage, "packed", spoilt)
    with pytest.raises(ValueError, match=SHOWS_ANOTHER):
        one(stage)


def test_what_else_is_changed_behind_the_packing_is_said(stage, monkeypatch):
    packed = stage.packed
    for change, message in (
        (lambda rows: rows["tokens"].__setitem__((0, 3), 999), "rollout .* other tokens than were asked and drawn"),
        (lambda rows: rows["loss_weight"].__imul__(0), "rollout .* what is learnt of it is not what was drawn"),
        (lambda rows: rows["frame"].__setitem__((0, -1), 99), "pixels of none of its rollouts"),
        (lambda rows: rows.__setitem__("shown", rows["shown"][::-1]), "rollout"),
    ):

        def spoilt(records, batch, change=change):
            for rows, left_out in packed(records, batch):
                change(rows)
                yield rows, left_out

        monkeypatch.setattr(stage, "packed", spoilt)
        with pytest.raises(ValueError, match=message):
            one(stage)


@pytest.mark.parametrize("stage", ["async"], indirect=True)
def test_an_engine_that_was_handed_another_prompt_is_found_out(stage, monkeypatch):
    """Its rows are made apart from the trainer's."""
    right, calls = Rows.batch, []

    def batch(self, keys, size=None):
        made = right(self, keys, size)
        if size is not None:  # the engine's
            made["patches"][0] ^= 1
            calls.append(keys)
        return made

    monkeypatch.setattr(Rows, "batch", batch)
    with pytest.raises(ValueError, match=r"prompt \w+/train/\d+: the engine was handed images"):
        one(stage)
    assert calls

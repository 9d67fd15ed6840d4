"""Packed rows: rotary positions against Hugging Face, packed = unpacked, budgets, resuming."""

from __future__ import annotations

import json

import numpy as np
import pytest

from glmv_jax.data import naflex, packing
from glmv_jax.data.building import Document
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.stream import Stream
from glmv_jax.typing import UserError

IMAGE, NAMES = 9, ["a", "b"]
CHANNELS = 6


def document(rng: np.random.Generator, grids: list[tuple[int, int]], texts: list[int], id_: str = "x") -> Document:
    """Random text stretches (`texts` lengths) around images of the given patch grids."""
    tokens, image_of, images = [], [], []
    for number, length in enumerate(texts):
        tokens += rng.integers(30, 100, length).tolist()
        image_of += [-1] * length
        if number < len(grids):
            rows, columns = grids[number]
            merged = rows * columns // 4
            tokens += [IMAGE] * merged
            image_of += [number] * merged
            images.append((rng.integers(0, 256, (rows * columns, CHANNELS), np.uint8),
                           naflex.grid_coordinates(rows, columns)))
    weights = rng.random(len(tokens)).astype(np.float32)
    return Document(np.array(tokens, np.int32), weights, np.array(image_of, np.int32), tuple(images),
                    NAMES[int(rng.integers(2))], id_)


def documents(count: int, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        grids = [(2 * int(h), 2 * int(w)) for h, w in rng.integers(1, 4, (int(rng.integers(0, 3)), 2))]
        texts = [int(n) for n in rng.integers(1, 8, len(grids) + 1)]
        made.append(document(rng, grids, texts, f"d/{i}"))
    return made


def batches(docs: list[Document], **options):
    settings = {"tokens": 48, "patches": 80, "channels": CHANNELS, "rows": 3, "names": NAMES, "log": FaultLog()}
    return packing.PackIterDataset(Stream(docs), **(settings | options))


def test_positions_are_those_of_glm_ocr():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.glm_ocr.modeling_glm_ocr")
    from transformers.models.glm_ocr.configuration_glm_ocr import GlmOcrConfig

    model = modeling.GlmOcrModel.__new__(modeling.GlmOcrModel)  # get_rope_index reads the config only
    torch.nn.Module.__init__(model)
    model.config = GlmOcrConfig(vision_config={"spatial_merge_size": 2})
    rng = np.random.default_rng(0)
    cases = [[(4, 6)], [(2, 2), (8, 2)], [], [(2, 12), (6, 6), (4, 4)]]
    for grids in cases:
        doc = document(rng, grids, [int(n) for n in rng.integers(1, 6, len(grids) + 1)])
        ids = torch.tensor(doc.tokens[None].astype(np.int64))
        grid_thw = torch.tensor([[1, *g] for g in grids]) if grids else None
        expected, delta = model.get_rope_index(ids, (ids == IMAGE).int(), grid_thw)
        positions, following = packing.rope_positions(doc.image_of_token, [(h // 2, w // 2) for h, w in grids])
        np.testing.assert_array_equal(positions, expected[:, 0].T.numpy())
        assert following == len(doc.tokens) + int(delta)


def test_packed_rows_hold_the_unpacked_documents():
    docs = documents(3, seed=1)
    tokens, patches = sum(len(d.tokens) for d in docs) + 5, sum(d.patches for d in docs) + 8
    row = packing.pack(docs, tokens, patches, CHANNELS, NAMES)
    alone = packing.collate(docs, tokens, patches, CHANNELS, NAMES)
    at = patch_at = frame_at = 0
    for b, doc in enumerate(docs):
        n, p = len(doc.tokens), doc.patches
        assert alone["length"][b] == n and alone["next_position"][b] == alone["positions"][b, :n].max() + 1
        here, there = slice(at, at + n), slice(patch_at, patch_at + p)
        for name in ("tokens", "positions", "loss_weight", "source"):
            np.testing.assert_array_equal(row[name][here], alone[name][b, :n], err_msg=name)
        for name in ("patches", "yx"):
            np.testing.assert_array_equal(row[name][there], alone[name][b, :p], err_msg=name)
        np.testing.assert_array_equal(row["frame"][there], alone["frame"][b, :p] + frame_at)
        assert set(row["segments"][here]) == {b + 1} and set(row["source"][here]) == {NAMES.index(doc.source)}
        is_image = doc.image_of_token >= 0
        np.testing.assert_array_equal(row["image_row"][here] >= 0, is_image)
        np.testing.assert_array_equal(row["image_row"][here][is_image], alone["image_row"][b, :n][is_image]
                                      + patch_at // 4)
        at, patch_at, frame_at = at + n, patch_at + p, frame_at + len(doc.images)
    assert not row["segments"][at:].any() and (row["source"][at:] == -1).all() and (row["image_row"][at:] == -1).all()
    assert not row["frame"][patch_at:].any() and not row["patches"][patch_at:].any()
    assert not row["loss_weight"][at:].any()


def test_image_rows_lead_to_the_right_patches():
    """Averaging each merge block of the row and gathering by image_row gives each document's own images back."""
    docs = documents(6, seed=2)
    row = packing.pack(docs, 400, 400, CHANNELS, NAMES)
    merged = row["patches"].reshape(-1, 4, CHANNELS).mean(1)
    for b, doc in enumerate(docs):
        mine = row["image_row"][(row["segments"] == b + 1) & (row["image_row"] >= 0)]
        expected = [patches.reshape(-1, 4, CHANNELS).mean(1) for patches, _ in doc.images]
        np.testing.assert_array_equal(merged[mine], np.concatenate(expected) if expected else np.zeros((0, CHANNELS)))


def test_nothing_is_lost_repeated_or_over_budget():
    docs = documents(200, seed=3)
    seen = []
    for batch in batches(docs):
        assert batch["tokens"].shape == (3, 48) and batch["patches"].shape == (3, 80, CHANNELS)
        for b in range(3):
            segments, frames = batch["segments"][b], batch["frame"][b]
            filled = segments[segments > 0]
            assert (np.diff(filled) >= 0).all() and (segments[len(filled):] == 0).all()
            assert set(filled) == set(range(1, filled.max(initial=0) + 1))
            assert set(frames) - {0} == set(range(1, frames.max() + 1))
            seen += [tuple(batch["tokens"][b][segments == s]) for s in set(filled)]
    assert sorted(seen) == sorted(tuple(d.tokens) for d in docs)


@pytest.mark.parametrize("fit", packing.FITS)
def test_a_bound_on_images_holds(fit, tmp_path):
    """Of a row; documents with more are counted and dropped, nothing else is."""
    docs, log = documents(60, 3), FaultLog(tmp_path / "faults.jsonl")
    made = list(batches(docs, images=1, fit=fit, ahead=4, log=log))
    assert max(int(batch["frame"].max()) for batch in made) == 1 < max(int(b["frame"].max()) for b in batches(docs))
    placed = sum(len(np.unique(row[row > 0])) for batch in made for row in batch["segments"])
    assert placed == sum(len(d.images) < 2 for d in docs) and sum(log.counts().values()) == len(docs) - placed > 0


def test_rows_are_mostly_full():
    filled = [packing.efficiency(b) for b in batches(documents(600, seed=4), rows=8, patches=200, tokens=128)]
    assert np.mean([f["tokens"] for f in filled[:-1]]) > 0.85
    batch = packing.stack([packing.pack(documents(1), 10**3, 10**3, CHANNELS, NAMES)])
    assert packing.efficiency(batch)["tokens"] == len(documents(1)[0].tokens) / 1000


def test_state_is_small_and_resumes_at_the_very_next_batch():
    docs = documents(150, seed=5)
    whole = list(batches(docs))
    for k in range(len(whole)):
        first = iter(batches(docs))
        for _ in range(k):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        assert len(json.dumps(state)) < 100
        second = iter(batches(docs))
        next(second)  # a used iterator must forget what it holds
        second.set_state(state)
        np.testing.assert_equal(next(second), whole[k])


def test_too_long_documents_are_counted_and_dropped(tmp_path):
    rng = np.random.default_rng(0)
    docs = [document(rng, [], [10], "short/1"), document(rng, [], [49], "long/1"), document(rng, [(10, 10)], [1, 1],
            "long/2"), document(rng, [], [12], "short/2")]
    log = FaultLog(tmp_path / "faults.jsonl")
    (batch,) = list(batches(docs, log=log))
    assert (batch["segments"] > 0).sum() == 22
    assert sum(log.counts().values()) == 2
    with pytest.raises(UserError, match="long/1: no room in a row of 48 tokens"):
        packing.pack(docs[1:2], 48, 80, CHANNELS, NAMES)
    with pytest.raises(UserError, match="long/2: .* 100 patches do not fit"):
        packing.collate(docs[2:3], 48, 80, CHANNELS, NAMES)

"""Features on disk: what is written comes back beside the same crops, and whatever does not fit is refused.

The teacher is a fixed random projection of the pixels. Not covered: disks slower than the training.
"""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from glmv_jax.data import crops, features
from glmv_jax.data.crops import Stored
from glmv_jax.data.features import FeatureCache
from glmv_jax.data.files import ImageFiles
from glmv_jax.data.pipeline import Reading
from glmv_jax.typing import UserError

SIZE, ROWS, ITEMS = 16, 4, 12
FACTS = {"seed": 3, "data.weights": {"own": 1.0}}


def teacher(images):
    """[B, 4, 5] bfloat16 of [B, 16, 16, 3] uint8."""
    weights = np.random.default_rng(0).normal(size=(SIZE**2 * 3, 20)) / 1e3
    return (images.reshape(len(images), -1) @ weights).reshape(-1, 4, 5).astype(ml_dtypes.bfloat16)


def batches(folder, batch, **options):
    reading = Reading(**{"seed": 3, "ahead": 0} | {k: options.pop(k) for k in ("workers", "ahead") if k in options})
    return crops.mim_batches({"own": ImageFiles(folder)}, {"own": 1.0}, batch=batch, size=SIZE, patch=8,
                             crop_scale=(0.3, 1.0), reading=reading, **options)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(7):
        noise = np.random.default_rng(i).integers(0, 256, (6, 8, 3)).astype(np.uint8)
        Image.fromarray(noise).resize((40, 30)).save(folder / f"bild ä{i}.png")
    return folder


@pytest.fixture(scope="module")
def written(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache")
    (out / "train-0000").mkdir()
    data = batches(pictures, ROWS, keys=True)
    for n in range(ITEMS // ROWS):
        batch = next(data)
        ids = [id_.decode() for id_ in batch["id"]]
        path = out / "train-0000" / features.file_name(n)
        features.write_file(path, {"a": teacher(batch["image"]), "b": teacher(255 - batch["image"])}, batch["key"], ids)
    record = {"facts": FACTS, "items": {"train": ITEMS}, "rows": ROWS, "teachers": {}}
    (out / "cache.json").write_text(json.dumps(record))
    return out


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def stored(path, *names):
    return Stored(FeatureCache(path), names or ("a",))


def test_features_come_beside_the_crops_they_are_of(pictures, written):
    live, cached = batches(pictures, 5), batches(pictures, 5, stored=stored(written, "a", "b"))
    for _ in range(2):  # 10 crops, over two borders of files
        want, got = next(live), next(cached)
        assert set(got) == set(want) - {"image"} | {"features"}
        for name in set(got) & set(want):
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        np.testing.assert_array_equal(got["features"]["a"], teacher(want["image"]))
        np.testing.assert_array_equal(got["features"]["b"], teacher(255 - want["image"]))
        assert got["features"]["a"].dtype == ml_dtypes.bfloat16


def test_after_the_last_crop_the_first_comes_again_with_another_mask(pictures, written):
    cached = batches(pictures, ITEMS, stored=stored(written), mask_kind="random", mask_ratio=0.5)
    first, second, third = (next(cached) for _ in range(3))
    np.testing.assert_array_equal(second["patches"], first["patches"])
    np.testing.assert_array_equal(second["features"]["a"], first["features"]["a"])
    assert (second["mask"] != first["mask"]).any() and (third["mask"] != second["mask"]).any()
    np.testing.assert_array_equal(second["mask"].sum(1), first["mask"].sum(1))
    whole, parts = batches(pictures, 5, stored=stored(written)), [first, second]
    seen = np.concatenate([next(whole)["features"]["a"] for _ in range(4)])  # a batch that crosses the seam
    np.testing.assert_array_equal(seen, np.concatenate([p["features"]["a"] for p in parts])[:20])


def test_workers_and_a_resume_change_nothing(pictures, written):
    plain = batches(pictures, 5, stored=stored(written))
    want = [next(plain) for _ in range(4)]
    with_workers = batches(pictures, 5, stored=stored(written), workers=1, ahead=2)
    got = [next(with_workers) for _ in range(2)]
    state = json.loads(json.dumps(with_workers.get_state()))
    with_workers.close()
    resumed = batches(pictures, 5, stored=stored(written), ahead=2)
    resumed.set_state(state)
    got += [next(resumed) for _ in range(2)]
    resumed.close()
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a["features"]["a"], b["features"]["a"])
        np.testing.assert_array_equal(a["mask"], b["mask"])


def test_files_are_safetensors(written):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = safetensors.load_file(written / "train-0000" / features.file_name(0))
    assert tensors["a"].shape == (ROWS, 4, 5) and str(tensors["a"].dtype) == "torch.bfloat16"
    ids = json.loads(bytes(tensors["ids"].tolist()))
    assert len(ids) == ROWS and all(id_.startswith("bild ä") for id_ in ids)
    assert not list(written.rglob("*.part"))


def test_an_unfinished_cache_is_refused(pictures, copied):
    (copied / "train-0000" / features.file_name(1)).rename(copied / "train-0000" / "000001.safetensors.77.part")
    with pytest.raises(UserError, match="not finished: 1 of 3 files of train-0000 are missing; run its glmv cache-tea"):
        batches(pictures, 5, stored=stored(copied))
    with pytest.raises(UserError, match="no cache.json here; write the cache with glmv cache-teachers"):
        FeatureCache(copied / "train-0000")


def test_a_file_that_was_cut_is_refused(pictures, copied):
    path = copied / "train-0000" / features.file_name(0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="000000.safetensors cannot be read .wrong size.; delete it and run"):
        next(batches(pictures, 5, stored=stored(copied)))


def test_another_run_is_refused_by_the_fact_that_differs(written):
    FeatureCache(written).check(FACTS | {"data.weights": {"own": 1.0}})
    with pytest.raises(UserError, match="of another run: seed is 3 there and 4 here; write one"):
        FeatureCache(written).check(FACTS | {"seed": 4})
    with pytest.raises(UserError, match="data.size is None there and 224 here"):
        FeatureCache(written).check(FACTS | {"data.size": 224})


def test_other_crops_and_changed_pictures_are_refused(pictures, written, tmp_path):
    other_seed = crops.mim_batches({"own": ImageFiles(pictures)}, {"own": 1.0}, batch=5, size=SIZE, patch=8,
                                   crop_scale=(0.3, 1.0), reading=Reading(seed=4), stored=stored(written))
    with pytest.raises(UserError, match="is stale: crop 0 of train-0000 is .*; write it anew"):
        next(other_seed)
    other_seed.close()
    changed = shutil.copytree(pictures, tmp_path / "changed")
    for path in changed.iterdir():  # as another decoder might see it: a few levels are nothing
        Image.fromarray(np.clip(np.asarray(Image.open(path)).astype(int) + 3, 0, 255).astype(np.uint8)).save(path)
    next(batches(changed, 5, stored=stored(written)))
    for path in changed.iterdir():
        Image.open(path).rotate(180).save(path)
    with pytest.raises(UserError, match="crop 0 of train-0000 is bild ä..png, and that picture has changed since"):
        next(batches(changed, 5, stored=stored(written)))


def test_files_have_a_size_that_a_kill_may_cost():
    assert features.rows_per_file(2 * 256 * (1152 + 1024) + features.KEY) == 128  # SigLIP 2 So400m and DINOv3 L
    assert features.rows_per_file(10_000) == 256 and features.rows_per_file(2**30) == 16

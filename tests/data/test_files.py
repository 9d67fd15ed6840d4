"""Pictures in folders and tars: real files, WebDataset's layout, broken ones. Not covered: tars of many gigabytes."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import tarfile

import numpy as np
import pytest
from PIL import Image

from glmv_jax.data import crops, images, pipeline
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.files import ImageFiles, random_crop
from glmv_jax.data.tars import Tars, expand
from glmv_jax.typing import UserError


def jpeg(shade, size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path, samples, mode="w"):
    """samples: key -> {extension: bytes}."""
    with tarfile.open(path, mode) as tar:
        for key, files in samples.items():
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def shard(path, first, n=5):
    samples = {f"{i:04d}": {"jpg": jpeg(10 * i), "txt": f"picture {i}".encode()} for i in range(first, first + n)}
    return write_tar(path, samples)


@pytest.fixture(autouse=True)
def no_cache_of_ours(monkeypatch, tmp_path):
    monkeypatch.setattr("glmv_jax.data.cache.FOLDER", str(tmp_path / "cache"))


def test_samples_by_number(tmp_path):
    for n in range(3):
        shard(tmp_path / f"{n:03d}.tar", 5 * n)
    tars = Tars(str(tmp_path / "{000..002}.tar"), cache=str(tmp_path / "cache"))
    assert len(tars) == 15
    for i in (14, 0, 7, 5):
        id_, files = tars[i]
        assert id_ == f"{i // 5:03d}.tar/{i:04d}" and files["txt"] == f"picture {i}".encode()
        assert Image.open(io.BytesIO(files["jpg"])).size == (40, 30)
    again = pickle.loads(pickle.dumps(tars))
    assert again[9] == tars[9]
    assert list((tmp_path / "cache").iterdir()) and Tars(tmp_path, cache=str(tmp_path / "cache"))[7] == tars[7]
    with pytest.raises(IndexError):
        tars[15]


def test_names_folders_and_long_paths(tmp_path):
    long = "a" * 90 + "/" + "b" * 90  # longer than the old header has room for
    samples = {f"./{long}/1": {"JPG": b"1", "seg.png": b"2"}, "2": {"cls": b"7"}, "._2": {"jpg": b""}}
    tars = Tars(write_tar(tmp_path / "x.tar", samples), cache="")
    assert [tars[i] for i in range(len(tars))] == [
        (f"x.tar/{long}/1", {"jpg": b"1", "seg.png": b"2"}), ("x.tar/2", {"cls": b"7"})]


def test_a_tar_that_is_cut_short_gives_what_it_has(tmp_path, capsys):
    path = shard(tmp_path / "a.tar", 0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    log = FaultLog(tmp_path / "faults.jsonl")
    tars = Tars(path, log, cache=str(tmp_path / "cache"))
    assert 0 < len(tars) < 5 and tars[0][1]["txt"] == b"picture 0"
    assert log.counts() == {"tars": 1} and "samples before that are used" in log.path.read_text()
    shard(path, 0)  # mended, under the same name
    assert len(Tars(path, log, cache=str(tmp_path / "cache"))) == 5


def test_wrong_paths(tmp_path):
    for path in (tmp_path / "absent.tar", tmp_path / "a-*.tar", tmp_path):
        with pytest.raises(UserError, match="no tar file here"):
            expand(path)
    write_tar(tmp_path / "z.tar", {"1": {"jpg": jpeg(1)}}, "w:gz")
    with pytest.raises(UserError, match="z.tar is compressed.*decompress it first"):
        Tars(tmp_path / "z.tar", cache="")
    write_tar(tmp_path / "empty.tar", {})
    with pytest.raises(UserError, match="no sample in 1 tar files"):
        Tars(tmp_path / "empty.tar", cache="")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match="no picture .*and no .tar"):
        ImageFiles(tmp_path / "pictures")
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    with pytest.raises(UserError, match="1 pictures and tar files in one folder; put them in two"):
        ImageFiles(tmp_path)


def test_more_tars_than_files_may_be_open(tmp_path):
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for n in range(60):
        write_tar(tmp_path / f"{n:03d}.tar", {"a": {"txt": str(n).encode()}})
    tars = Tars(tmp_path, cache="")
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        assert [int(tars[n][1]["txt"]) for n in range(60)] == list(range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_stage_1_reads_a_folder_and_skips_what_is_broken(tmp_path, form):
    good = {f"{i:02d}": {"jpg": jpeg(10 * i, (60, 40))} for i in range(24)}
    samples = good | {"bad": {"jpg": jpeg(0)[:80]}, "text": {"txt" if form == "tar" else "jpg": b"no picture"}}
    if form == "tar":
        write_tar(tmp_path / "a.tar", samples)
    else:
        for key, files in samples.items():
            folder = tmp_path / key[0]
            folder.mkdir(exist_ok=True)
            (folder / f"{key}.jpg").write_bytes(files["jpg"])
    log = tmp_path / "faults.jsonl"
    sources = {"natural": ImageFiles(tmp_path), "scientific": images.Images("scientific", "train")}
    data = crops.mim_batches(
        sources, {"natural": 0.75, "scientific": 0.25}, batch=32, size=32, crop_scale=(0.2, 1.0),
        reading=pipeline.Reading(ahead=0, faults=log),
    )  # fmt: skip
    first, second = next(data), next(data)
    assert first["image"].shape == (32, 32, 32, 3)
    shades = first["image"][first["source"] == 0].mean((1, 2, 3))
    assert len(shades) == 24 and np.abs(shades / 10 - np.rint(shades / 10)).max() < 0.2
    reasons = [json.loads(line)["reason"] for line in log.read_text().splitlines()]
    assert {next(key for key in samples if f"/{key}" in reason) for reason in reasons} == {"bad", "text"}
    assert not np.array_equal(first["image"], second["image"])


def test_crops_are_parts_of_the_picture():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    picture = Image.fromarray(np.ascontiguousarray(ramp))
    rng = np.random.default_rng(0)
    widths = []
    for _ in range(200):
        crop = np.asarray(random_crop(picture, rng, 32, (0.2, 1.0)), np.float32)[:, :, 0]
        assert np.ptp(crop, axis=0).max() <= 1 and (np.diff(crop.mean(0)) > 0).all()
        widths.append(np.ptp(crop))
    assert min(widths) < 70 and max(widths) > 110
    whole = np.asarray(random_crop(picture, rng, 32, (1.0, 1.0)))
    np.testing.assert_array_equal(whole, np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)))
    long = Image.new("RGB", (4000, 10))
    assert random_crop(long, rng, 32, (0.2, 1.0)).size == (32, 32)


def test_held_out_pictures_stay_held_out_as_others_come(tmp_path):
    for i in range(60):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{i}.png")
    train, held = ImageFiles(tmp_path).split(0.3)
    assert not set(train.ids()) & set(held.ids()) and len(train) + len(held) == 60 and 8 < len(held) < 30
    assert [held[i][0] for i in range(len(held))] == held.ids() and [id_ for id_, _ in train] == train.ids()
    for i in range(60, 80):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    more_train, more_held = ImageFiles(tmp_path).split(0.3)
    assert set(train.ids()) <= set(more_train.ids()) and set(held.ids()) <= set(more_held.ids())
    assert len(ImageFiles(tmp_path).split(1e-9)[1]) == 8  # a few at least


def test_few_pictures_and_tars_are_split_too(tmp_path):
    shard(tmp_path / "a.tar", 0)
    train, held = pickle.loads(pickle.dumps(ImageFiles(tmp_path).split(0.01)))
    assert (len(train), len(held)) == (4, 1) and held[0][0] == held.ids()[0] and train[3][1].size == (40, 30)
    write_tar(tmp_path / "a.tar", {"1": {"jpg": jpeg(1)}})
    with pytest.raises(UserError, match="1 pictures are too few to hold some out; give at least 4, or set data.h"):
        ImageFiles(tmp_path).split(0.01)

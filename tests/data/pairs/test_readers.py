"""Each format from a small file that its own library wrote: what is read, by number, in another process too.

Not covered: remote file systems, files of many gigabytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import sys

import numpy as np
import pytest

from glmv_jax.data import cache
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.pairs import Source, example
from glmv_jax.typing import UserError
from tests.data.pairs import made

CAPTIONS = [["a cat", "一只猫"], ["a dog"], ["红色的汽车"], ["a tree", "the tree in a park"]] * 3
BY_LANGUAGE = [{"en": ["a cat"], "zh": ["一只猫"]}, {"en": ["a dog"]}, {"zh": ["红色的汽车"]},
               {"en": ["a tree", "the tree in a park"]}] * 3


@pytest.fixture(autouse=True)
def no_cache_of_ours(monkeypatch, tmp_path):
    monkeypatch.setattr("glmv_jax.data.cache.FOLDER", str(tmp_path / "cache"))


def folder_beside(path):
    for i, texts in enumerate(CAPTIONS):
        (path / f"{i // 6}").mkdir(parents=True, exist_ok=True)
        (path / f"{i // 6}" / f"{i:03d}.png").write_bytes(made.jpeg(i, format="PNG"))
        (path / f"{i // 6}" / f"{i:03d}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def folder_tsv(path):
    path.mkdir()
    lines = ["file\ten\tzh"]
    for i, texts in enumerate(BY_LANGUAGE):
        (path / f"{i:03d}.png").write_bytes(made.jpeg(i, format="PNG"))
        lines.append("\t".join([f"{i:03d}.png", "|".join(texts.get("en", ())), "|".join(texts.get("zh", ()))]))
    (path / "captions.tsv").write_text("\n".join(lines), encoding="utf-8")
    return path


def folder_jsonl(path):
    path.mkdir()
    rows = []
    for i, texts in enumerate(CAPTIONS):
        (path / f"{i:03d}.png").write_bytes(made.jpeg(i, format="PNG"))
        rows.append(json.dumps({"file_name": f"{i:03d}.png", "captions": texts}, ensure_ascii=False))
    (path / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return path


def tars(path):
    path.mkdir()
    for n in range(3):
        samples = {}
        for i in range(4 * n, 4 * n + 4):
            texts = {"txt": "\n".join(CAPTIONS[i]).encode()}
            if i % 4 == 0:
                texts = {"json": json.dumps({"caption_zh": "一只猫", "en": "a cat", "image": "x.png"}).encode()}
            samples[f"{i:03d}"] = {"png": made.jpeg(i, format="PNG"), **texts}
        made.tar(path / f"{n:03d}.tar", samples)
    return path


def parquets(path):
    path.mkdir()
    for n in range(2):
        at = range(6 * n, 6 * n + 6)
        images = made.hugging_face([made.jpeg(i, format="PNG") for i in at])
        columns = {"image": images, "caption": [CAPTIONS[i] for i in at], "width": [40] * 6}
        made.parquet(path / f"train-{n:05d}-of-00002.parquet", columns)
    return path


def array_records(path):
    path.mkdir()
    for n in range(2):
        records = [made.example(image=[made.jpeg(i, format="PNG")], captions__text=[t.encode() for t in CAPTIONS[i]],
                                image__id=[i]) for i in range(6 * n, 6 * n + 6)]
        made.array_record(path / f"x.array_record-{n:05d}-of-00002", records)
    return path


def prepared(path):
    return made.tfds(path, CAPTIONS, shards=3)


FORMATS = {"folder": folder_beside, "tsv": folder_tsv, "jsonl": folder_jsonl, "tar": tars, "parquet": parquets,
           "array_record": array_records, "tfds": prepared}


def read(path, **options):
    source = Source.of("x", {"path": str(path), **options})
    return source.open(source.files(), "x")


@pytest.mark.parametrize("form", FORMATS)
def test_every_record_by_number(form, tmp_path):
    path = FORMATS[form](tmp_path / "data")
    reader = read(path)
    assert len(reader) == 12
    shades = []
    for i in (11, 0, 5, 4, 7, 1, 2, 3, 6, 8, 9, 10):
        pair = reader[i]
        shade = made.shade(pair.image)
        shades.append(shade)
        expected = BY_LANGUAGE[shade]
        if form == "tsv":
            expected = {lang: ["|".join(texts)] for lang, texts in expected.items()}
        assert pair.texts == expected == reader.texts(i)
        assert pair.id == reader.id(i) and pair.source == "x"
    assert sorted(shades) == list(range(12)) and len({reader.id(i) for i in range(12)}) == 12
    assert form == "tfds" or shades[:3] == [11, 0, 5], "in the order of the files; TFDS shuffles"
    with pytest.raises(IndexError):
        reader[12]
    again = pickle.loads(pickle.dumps(reader))
    assert again[9] == reader[9]
    assert os.listdir(tmp_path / "cache") if form in ("tar", "parquet", "array_record") else True
    assert read(path)[3] == reader[3], "with what the cache has"


def _third(reader):
    return reader[3]


def test_in_worker_processes(tmp_path):
    readers = [read(FORMATS[form](tmp_path / form)) for form in ("parquet", "array_record", "tfds")]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_third, readers) == [reader[3] for reader in readers]


def test_tfds_and_array_record_read_the_same_files(tmp_path):
    path = prepared(tmp_path / "data")
    one, two = read(path), read(path, format="array_record")
    assert [one[i] for i in range(12)] == [two[i] for i in range(12)]
    with pytest.raises(UserError, match="no split 'val'; it has train"):
        read(path, split="val")


def test_declared_languages_and_fields(tmp_path):
    samples = {"0": {"jpg": made.jpeg(1), "png": made.jpeg(2), "txt": b"a cat", "zh.txt": "猫\n小猫".encode()}}
    path = made.tar(tmp_path / "a.tar", samples)
    assert read(path).texts(0) == {"en": ["a cat"], "zh": ["猫", "小猫"]}
    assert read(path, lang="zh").texts(0) == {"zh": ["猫", "小猫"]}
    assert read(path, lang="en")[0].texts == {"en": ["a cat"]}
    assert read(path, text="txt", lang="zh").texts(0) == {"zh": ["a cat"]}
    assert read(path, image="png")[0].image == samples["0"]["png"] != read(path)[0].image


def test_parquet_reads_a_row_group_and_pictures_beside_it(tmp_path):
    (tmp_path / "p.png").write_bytes(made.jpeg(7, format="PNG"))
    image = made.hugging_face([made.jpeg(i) for i in range(9)] + [None], [None] * 9 + ["p.png"])
    reader = read(made.parquet(tmp_path / "a.parquet", {"image": image, "text": ["t"] * 10}, 4))
    assert made.shade(reader[9].image) == 7
    assert reader.blocks().tolist() == [0, 4, 8]
    assert {key[1] for key in reader._kept} == {2}, "of three row groups one was read"
    columns = {"jpg": [made.jpeg(3)], "text": ["t"], "embedding": [[0.5] * 99]}
    reader = read(made.parquet(tmp_path / "b.parquet", columns))
    assert reader[0].image == made.jpeg(3), "a column of plain bytes"
    reader.texts(0)
    assert [table.column_names for table in reader._kept.values()] == [["jpg", "text"], ["text"]]


@pytest.mark.parametrize("form", ["parquet", "array_record", "tar", "tfds"])
def test_few_files_are_open(form, tmp_path):
    n = 60
    if form == "tfds":
        path = made.tfds(tmp_path / "data", [["t"]] * n, shards=n)
    else:
        path = tmp_path / "data"
        path.mkdir()
    for i in range(n):
        image = made.jpeg(i, format="PNG")
        if form == "parquet":
            made.parquet(path / f"{i:03d}.parquet", {"image": [image], "text": ["t"]})
        if form == "array_record":
            made.array_record(path / f"{i:03d}.array_record", [made.example(image=[image], text=[b"t"])])
        if form == "tar":
            made.tar(path / f"{i:03d}.tar", {"a": {"png": image, "txt": b"t"}})
    reader = read(path)
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        assert len({reader[i].image for i in range(n)}) == n
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


# ----------------------------------------------------------------------------------------------------- what is broken


def test_files_that_are_cut_short(tmp_path):
    log = FaultLog(tmp_path / "faults.jsonl")
    for form, make in (("parquet", parquets), ("array_record", array_records), ("tar", tars)):
        path = make(tmp_path / form)
        first = sorted(path.iterdir())[0]
        first.write_bytes(first.read_bytes()[: first.stat().st_size // 3])
        source = Source.of(form, {"path": str(path)})
        reader = source.open(source.files(), form, log)
        whole = {"tar": 8}.get(form, 6)
        assert whole <= len(reader) < 12
        assert reader[len(reader) - 1].texts == BY_LANGUAGE[11]
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["source"] for line in lines] == ["parquet", "array_record", "tars"]
    assert all(str(tmp_path) in line["id"] for line in lines)


def test_no_file_that_can_be_read(tmp_path, capsys):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match="source 'x': no record in 1 files"):
        read(tmp_path / "a.parquet")
    assert "a.parquet" in capsys.readouterr().err


def test_records_that_are_broken(tmp_path):
    """Each says what is wrong with it; none raises what the pipeline takes for a bug of ours."""
    image = made.jpeg(1)
    import pyarrow as pa

    columns = {
        "image": made.hugging_face([image, image, image, None]),
        "caption": pa.array([None, " ", "fine", "no picture"]),
    }
    reader = read(made.parquet(tmp_path / "a.parquet", columns))
    for i, reason in ((0, "no text"), (1, "its text 'caption' is empty"), (3, "not the bytes of a picture")):
        with pytest.raises(UserError, match=reason):
            reader[i]
    assert reader[2].texts == {"en": ["fine"]}
    with pytest.raises(UserError, match="its text 'caption' is int, not text"):
        read(made.parquet(tmp_path / "b.parquet", {"image": [image], "caption": [7]}))[0]
    with pytest.raises(UserError, match="its picture 'image' is list, not the bytes"):
        read(made.parquet(tmp_path / "c.parquet", {"image": [[1, 2, 3]], "caption": ["t"]}))[0]

    records = [made.example(image=[image], text=[b"t"]), b"\xff\xff no example", made.example(image=[3], text=[b"t"]),
               made.example(text=[b"\xff\xfe"], image=[image]), made.example(image=[image])]
    reader = read(made.array_record(tmp_path / "a.array_record", records))
    assert reader[0].texts == {"en": ["t"]}
    for i, reason in ((1, "no tf.train.Example"), (2, "its picture 'image' is int"), (4, "no text; it has image")):
        with pytest.raises(UserError, match=reason):
            reader[i]
    with pytest.raises(UnicodeDecodeError):  # a ValueError, logged and skipped like the others
        reader[3]

    samples = {"a": {"jpg": image}, "b": {"jpg": image, "json": b"{"}, "c": {"jpg": image, "json": b"[1]"},
               "d": {"txt": b"t"}, "e": {"jpg": b"", "txt": b"t"}}
    reader = read(made.tar(tmp_path / "a.tar", samples))
    reasons = ("no text; it has jpg", "its json is broken", "its json is list", "no picture", "'jpg' is empty")
    for i, reason in enumerate(reasons):
        with pytest.raises(UserError, match=reason):
            reader[i]


def test_an_array_record_that_is_broken_in_its_middle(tmp_path):
    rng = np.random.default_rng(0)
    records = [made.example(image=[rng.bytes(9000)], text=[b"t"]) for _ in range(6)]
    path = made.array_record(tmp_path / "a.array_record", records)
    content = bytearray(path.read_bytes())
    content[10_000:10_600] = rng.bytes(600)
    path.write_bytes(content)
    reader = read(path)
    with pytest.raises(UserError, match="record 1 cannot be read"):
        reader[1]
    assert [reader.texts(i) for i in (0, 2, 5)] == [{"en": ["t"]}] * 3


def test_a_parquet_whose_pages_are_broken(tmp_path):
    rng = np.random.default_rng(0)
    path = made.parquet(tmp_path / "a.parquet", {"image": [rng.bytes(5000)] * 8, "text": ["t"] * 8})
    content = bytearray(path.read_bytes())
    content[4:4000] = rng.bytes(3996)
    path.write_bytes(content)
    reader = read(path)
    with pytest.raises(UserError, match="row group 0 cannot be read"):
        reader[0]


# ------------------------------------------------------------------------------------------------ paths and examples


def test_formats_are_told_from_paths(tmp_path):
    for form, expected in (("folder", "folder"), ("tar", "tar"), ("parquet", "parquet"), ("tfds", "tfds"),
                           ("array_record", "array_record")):
        assert Source.of("x", {"path": str(FORMATS[form](tmp_path / form))}).format == expected
    for path, expected in (("a-{000..127}.tar", "tar"), ("s/*.parquet", "parquet"),
                           ("x.array_record-00000-of-00010", "array_record")):
        assert Source.of("x", {"path": path}).format == expected


@pytest.mark.parametrize("entry, error", [
    ({"path": ""}, r"data\.sources\.web\.path is empty"),
    ({"path": "a.tar", "langs": "en"}, r"data\.sources\.web has no key 'langs'; nearest: lang"),
    ({"path": "a.tar", "lang": "fr"}, r"web\.lang='fr' is not known; choose auto, en, zh"),
    ({"path": "a.tar", "format": "zip"}, r"web\.format='zip' is not known; choose folder, tar"),
    ({"path": "a.tar", "weight": 0.0}, r"web\.weight=0.0 must be above 0"),
    ({"path": "data.bin"}, r"data.bin says no format.*; set data\.sources\.web\.format"),
])  # fmt: skip
def test_wrong_configs(entry, error):
    with pytest.raises(UserError, match=error) as caught:
        Source.of("web", entry)
    assert "\n" not in str(caught.value)


def test_a_package_that_is_missing_is_named_and_no_file_is_called_broken_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"sources\.web: parquet is read by pyarrow; pip install 'glmv_jax\[data\]'"):
        Source.of("web", {"path": "s/*.parquet"})
    assert Source.of("web", {"path": "a.tar"}).format == "tar"


def test_paths_that_are_not_there(tmp_path):
    for path in ("absent.tar", "a-*.parquet", "x.array_record", "x.array_record-*"):
        with pytest.raises(UserError, match="no .* file here"):
            Source.of("web", {"path": str(tmp_path / path)}).files()
    with pytest.raises(UserError, match="no such folder"):
        Source.of("web", {"path": str(tmp_path / "absent"), "format": "folder"}).files()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty says no format, and is no folder of pictures; set"):
        Source.of("web", {"path": str(tmp_path / "empty")})
    made.tar(tmp_path / "a.tar", {"a": {"txt": b"t"}})
    made.parquet(tmp_path / "a.parquet", {"text": ["t"]})
    with pytest.raises(UserError, match="holds parquet and tar; set"):
        Source.told("web", str(tmp_path))


def test_examples_are_read_as_protobuf_reads_them():
    features = dict(a=[b"x", b""], b=[1, -5, 2**62], c=[0.5, -1.0], d=[], e__text=["é猫".encode()], long=[b"z" * 70000])
    parsed = example.parse(made.example(**features))
    assert parsed == {name.replace("__", "/"): values for name, values in features.items()}
    # a feature "a" of one int64 that is not packed, written by hand
    assert example.parse(bytes.fromhex("0a0b" "0a09" "0a0161" "1204" "1a02" "0805")) == {"a": [5]}
    content = made.example(**features)
    for cut in (1, 5, 17, len(content) // 2, len(content) - 1):
        with pytest.raises(UserError, match="no tf.train.Example"):
            example.parse(content[:cut])


def test_the_cache_is_of_no_consequence(tmp_path):
    calls = []

    def build():
        calls.append(1)
        return {"x": np.arange(3)}, True

    path = tmp_path / "a"
    path.write_bytes(b"1")
    folder = tmp_path / "kept"
    for _ in range(2):
        np.testing.assert_array_equal(cache.cached(str(path), "k", build, folder)["x"], np.arange(3))
    assert len(calls) == 1
    next(folder.iterdir()).write_bytes(b"broken")
    cache.cached(str(path), "k", build, folder)
    cache.cached(str(path), "other", build, folder)
    path.write_bytes(b"12")
    cache.cached(str(path), "k", build, folder)
    assert len(calls) == 4
    (tmp_path / "file").write_bytes(b"")
    cache.cached(str(path), "k", build, tmp_path / "file" / "x")  # cannot be written
    assert len(calls) == 5


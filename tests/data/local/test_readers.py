"""A person's own files: each category's example through each reader, pictures in every form, broken records.

Not covered: files of many gigabytes.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import pickle

import numpy as np
import pytest

from glmv_jax.data import local
from glmv_jax.data.faults import FaultLog, Guarded
from glmv_jax.data.local import icons
from glmv_jax.data.local.schema import CATEGORIES, Media, Record, Text, parse
from glmv_jax.typing import UserError
from tests.data.local import examples


@pytest.fixture(autouse=True)
def no_cache_of_ours(monkeypatch, tmp_path):
    monkeypatch.setattr("glmv_jax.data.cache.FOLDER", str(tmp_path / "cache"))


def opened(path, name: str = "own", **entry) -> local.readers.Documents:
    source = local.Source.of(name, {"path": str(path), **entry})
    return source.open(source.files(), name)


def read(path, **entry) -> list[Record]:
    reader = opened(path, **entry)
    return [reader[i] for i in range(len(reader))]


# ------------------------------------------------------------------------------------------------------- each reader


def test_every_category_reads_alike_from_jsonl_parquet_and_tar(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    records = examples.records(tmp_path)
    assert len(set(records) & set(CATEGORIES)) >= len(CATEGORIES) - 1  # film: where PyAV is installed
    lines = read(examples.jsonl(tmp_path / "all.jsonl", list(records.values())))
    assert [r.category for r in lines] == list(records) and [r.id for r in lines] == [f"{n}/1" for n in records]

    columns = ("id", "category", "segments", "messages", "tools")
    table = {
        name: [json.dumps(r[name]) if isinstance(r.get(name), list) else r.get(name) for r in records.values()]
        for name in columns
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "all.parquet", row_group_size=3)
    assert read(tmp_path / "all.parquet") == lines

    files = {}
    for name, record in records.items():
        text = json.dumps(record)
        for picture in (tmp_path / "pictures").iterdir():
            if picture.name in text:
                files[f"{name}.{picture.name}"] = picture.read_bytes()
                text = text.replace(f"pictures/{picture.name}", picture.name)
        files[f"{name}.json"] = text.encode()
    assert read(examples.tar(tmp_path / "all.tar", files)) == lines


def test_nested_columns_of_parquet(tmp_path):
    """As Hugging Face's vision data sets have it: a list of pictures, and messages with places for them."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    red, blue = (examples.png(examples.Image.new("RGB", (8, 8), c)) for c in ("red", "blue"))
    parts = [
        {"type": "image", "text": None},
        {"type": "text", "text": "Which is red?"},
        {"type": "image", "text": None},
    ]
    answer = [{"type": "text", "text": "the first"}]
    row = {
        "images": [{"bytes": red, "path": None}, {"bytes": blue, "path": "x.png"}],
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}],
    }
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "a.parquet")
    (record, _) = read(tmp_path / "a.parquet")
    assert record.media == (Media("image", red), Media("image", blue)) and record.id == "a.parquet/0"
    assert [p["type"] for p in record.messages[0]["content"]] == ["image", "text", "image"]
    assert record.messages[1] == {"role": "assistant", "content": answer, "weight": 1.0, "tool_calls": []}


def test_a_tar_of_pictures_with_texts_needs_no_json(tmp_path):
    content = examples.png(examples.Image.new("RGB", (8, 8), "red"))
    path = examples.tar(tmp_path / "a.tar", {"x/1.png": content, "x/1.txt": b"a red square"})
    (record,) = read(path)
    assert record == Record("a.tar/x/1", segments=(Media("image", content), Text("a red square")))


def test_a_folder_of_pictures_with_texts_beside_them(tmp_path):
    content = {n: examples.png(examples.Image.new("RGB", (8, 8), n)) for n in ("red", "blue", "green", "white")}
    (tmp_path / "deep").mkdir()
    for name, place in (("red", "a"), ("blue", "deep/b"), ("green", "c"), ("white", "d")):
        (tmp_path / f"{place}.png").write_bytes(content[name])
    (tmp_path / "a.txt").write_text("a red square\n")
    (tmp_path / "deep/b.json").write_text(json.dumps({"text": "a blue one", "category": "ocr"}))
    said = {"role": "user", "content": [{"type": "image", "image": "c.png"}, {"type": "text", "text": "Which colour?"}]}
    (tmp_path / "c.json").write_text(json.dumps({"messages": [said, {"role": "assistant", "content": "green"}]}))
    reader = opened(tmp_path)
    assert reader[0] == Record("a.png", segments=(Media("image", content["red"]), Text("a red square\n")))
    with pytest.raises(UserError, match="no text belongs to it"):
        reader[2]  # d.png
    source = local.Source.of("own", {"path": str(tmp_path), "prompt": "Read:"})
    asking = source.open(source.files(), "own")
    assert source.reader == "folder" and pickle.loads(pickle.dumps(asking))[0] == asking[0]
    for i, (name, text) in enumerate([("red", "a red square"), ("green", "green"), (None, ""), ("blue", "a blue one")]):
        if name:
            assert asking[i].media == (Media("image", content[name]),) and not asking[i].segments
            prompt = "Which colour?" if name == "green" else "Read:"
            assert asking[i].messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": prompt}]
            assert asking[i].messages[1]["content"] == [{"type": "text", "text": text}]
    assert asking[3].category == "ocr"


def test_the_table_of_an_image_folder_names_its_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    reader = opened(examples.jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "a"}]))
    assert reader[0].segments == (Media("image", b"png"), Text("a"))


def test_pictures_may_lie_in_a_tar_beside_a_jsonl(tmp_path):
    content = examples.png(examples.Image.new("RGB", (8, 8), "red"))
    examples.tar(tmp_path / "a.tar", {"cats/1.v2.png": content})
    (tmp_path / "here.png").write_bytes(b"on disk")
    path = examples.jsonl(tmp_path / "a.jsonl", [{"images": ["cats/1.v2.png", "here.png"]}, {"image": "cats/2.png"}])
    reader = opened(tmp_path)  # of a folder that holds both, the tar is the pictures'
    assert [m.content for m in reader[0].segments] == [content, b"on disk"]
    with pytest.raises(UserError, match="cats/2.png' cannot be read .No such file"):
        reader[1]
    assert pickle.loads(pickle.dumps(reader))[0] == reader[0]
    assert opened(path)[0] == reader[0]


def test_icons_pair_each_svg_with_the_largest_png_of_its_name(tmp_path):
    small, large = (examples.png(examples.Image.new("RGB", (n, n), "blue")) for n in (8, 32))
    for name, content in {
        "T/scalable/status/alarm-symbolic.svg": b'<?xml version="1.0"?>\n<svg>\n  <!-- x -->\n <path d="M 0"/></svg>',
        "T/16x16/status/alarm-symbolic.symbolic.png": small, "T/96x96/status/alarm-symbolic.symbolic.png": large,
        "T/96x96/actions/alarm-symbolic.png": small + b"not of its context", "U/96x96/status/alarm-symbolic.png": large,
        "T/scalable/status/alone.svg": b"<svg/>", "T/scalable/status/big.svg": b" " * 9999,
        "T/16x16/status/big.png": small,
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (record,) = read(tmp_path, reader="icons")
    assert record.segments == (Media("image", large), Text('<svg> <path d="M 0"/></svg>'))
    assert record.id == "T/scalable/status/alarm-symbolic.svg" and record.category == "coding"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="source 'own': below .*empty no SVG .*install an icon theme"):
        opened(empty, reader="icons")


def test_icons_of_this_machine():
    found = icons.pairs("/usr/share/icons")
    if not found:
        pytest.skip("no icon theme with SVG and PNG is installed")
    reader = opened("/usr/share/icons", reader="icons")
    for i in range(0, len(reader), max(1, len(reader) // 20)):
        picture, code = reader[i].segments
        assert picture.content.startswith(b"\x89PNG") and code.text.startswith("<svg") and "\n" not in code.text


# -------------------------------------------------------------------------------------------------------- the schema


def nothing(name: str) -> bytes:
    raise UserError(f"no {name}")


PICTURE = base64.b64encode(b"pixels").decode()


@pytest.mark.parametrize("given", [
    {"image": f"data:image/png;base64,{PICTURE}"}, {"image": {"bytes": PICTURE}}, {"image": {"bytes": b"pixels"}},
    {"image_url": {"url": f"data:image/jpeg;base64,{PICTURE}"}}, {"image": b"pixels"}, {"image": "a.png"},
    {"image": {"path": "a.png"}}, {"image": {"bytes": None, "path": "a.png"}}, {"image": "file://a.png"},
])  # fmt: skip
def test_a_picture_may_be_given_in_many_ways(given):
    kind = "image_url" if "image_url" in given else "image"
    record = parse({"segments": [{"type": kind, **given}]}, "x", {"a.png": b"pixels"}.__getitem__)
    assert record.segments == (Media("image", b"pixels"),)


def test_tool_calls_may_be_json_and_fields_null():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "é"]}'}}
    user = {"role": "user", "content": "hi", "tool_calls": None, "reasoning_content": None}
    record = parse({"messages": [user, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": None,
                    "id": 7, "weight": 2}, "x", nothing)  # fmt: skip
    assert record.messages[1]["tool_calls"] == [{"name": "f", "arguments": {"a": [1, "é"]}}]
    assert record.messages[1]["content"] == [{"type": "text", "text": ""}] or not record.messages[1]["content"]
    assert (record.id, record.weight, record.tools) == ("7", 2.0, ())


def test_conversations_of_llava():
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>\nA?\n<image>B?"},
             {"from": "gpt", "value": "no"}]  # fmt: skip
    files = {"a.png": b"first", "b.png": b"second"}
    record = parse({"image": ["a.png", "b.png"], "conversations": turns, "id": 3}, "x", files.__getitem__)
    image = {"type": "image"}
    assert [m["role"] for m in record.messages] == ["system", "user", "assistant"] and record.id == "3"
    assert record.messages[1]["content"] == [
        image, {"type": "text", "text": "A?"}, image, {"type": "text", "text": "B?"}]  # fmt: skip
    assert [media.content for media in record.media] == [b"first", b"second"]
    one = parse({"image": "a.png", "conversations": turns[1:]} | {"conversations": [
        {"from": "human", "value": "<image>\nA?"}, turns[2]]}, "x", files.__getitem__)  # fmt: skip
    assert one.media == (Media("image", b"first"),)
    with pytest.raises(UserError, match="a turn is from 'bot'"):
        parse({"conversations": [{"from": "bot", "value": ""}]}, "x", nothing)


@pytest.mark.parametrize("fields, message", [
    ({}, "neither segments nor messages nor text, only nothing"),
    ({"segments": []}, "it has no segments"),
    ({"segments": "[1"}, "segments: broken JSON"),
    ({"segments": [{"type": "audio"}]}, "type 'audio'; use text, image or video"),
    ({"segments": ["text"]}, "type None"),
    ({"segments": [{"type": "text", "text": 3}]}, "a text is int"),
    ({"segments": [{"type": "image"}]}, "says nowhere where its image is"),
    ({"segments": [{"type": "image", "image": "a.png"}]}, "no a.png"),
    ({"segments": [{"type": "image", "image": 3}]}, "given as int"),
    ({"segments": [{"type": "image", "image": "https://x.org/a.png"}]}, "on the network"),
    ({"segments": [{"type": "image", "image": "data:image/png;base64,%%"}]}, "base64 is broken"),
    ({"segments": [{"type": "image", "image": "data:image/png,abc"}]}, "not base64"),
    ({"segments": [{"type": "text", "text": "a"}], "images": ["a.png"]}, "1 of its images or videos belong to no part"),
    ({"text": "a", "weight": -1}, "its weight is -1, not a number from 0"),
    ({"text": "a", "weight": True}, "its weight is True"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no message of it is an assistant's"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "role is 'robot'"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, r"role is \['user'\]"),
    ({"messages": [{"role": "user", "content": 3}]}, "its content are int"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
     "broken JSON"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}]}, "needs a name"),
])  # fmt: skip
def test_wrong_records_say_what_is_wrong(fields, message):
    with pytest.raises(UserError, match=message) as error:
        parse(fields, "x", nothing)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ broken files


def test_broken_records_are_counted_with_their_line_and_skipped(tmp_path):
    good = [{"text": f"text {n}"} for n in range(40)]
    path = examples.jsonl(tmp_path / "a.jsonl", [*good[:5], '{"text": "cut', "", *good[5:], '{"segments": []}'])
    reader = opened(path)
    assert len(reader) == 42 and reader.id(5) == "a.jsonl:6" and reader.id(6) == "a.jsonl:8"
    assert reader[3].id == "a.jsonl:4"
    log = FaultLog(tmp_path / "faults.jsonl")
    refs = [local.balance.Ref(reader.id(i), reader, i) for i in range(42)]
    guarded = Guarded(refs, lambda ref, rng: ref.reader[ref.index], name="own", seed=0, log=log)
    texts = [guarded[i].segments[0].text for i in range(42)]
    assert set(texts) == {f"text {n}" for n in range(40)} and texts[5] == "text 5" and texts[41] == "text 0"
    faults = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(f["id"], f["source"]) for f in faults] == [("a.jsonl:6", "own"), ("a.jsonl:43", "own")]
    assert "json is broken" in faults[0]["reason"] and "no segments" in faults[1]["reason"]


def test_a_file_that_has_grown_is_read_anew(tmp_path):
    path = examples.jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    assert len(opened(path)) == 1
    assert len(opened(examples.jsonl(path, [{"text": "longer"}, {"text": "b"}]))) == 2


def test_wrong_sources_are_user_errors(tmp_path):
    examples.jsonl(tmp_path / "a.jsonl", [{"text": "a", "category": "ocr"}, {"text": "b"}])
    of = local.Source.of
    for entry, message in [
        ({"path": ""}, "own.path is empty"), ({"path": "x", "redaer": 1}, "no key 'redaer'; nearest: reader"),
        ({"path": "x.jsonl", "weight": 0.0}, "weight=0.0 must be above 0"),
        ({"path": "x.jsonl", "long": "trim"}, "long='trim' is not known; choose split, cut, drop"),
        ({"path": str(tmp_path), "reader": "csv"}, "reader='csv' is not known; choose jsonl, parquet, tar, icons"),
        ({"path": "x.txt"}, "says no reader"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            of("own", entry)
    with pytest.raises(UserError, match="no jsonl file here"):
        of("own", {"path": str(tmp_path / "b.jsonl")}).files()
    source, reader = of("own", {"path": str(tmp_path), "category": "ocr"}), opened(tmp_path)
    assert source.rows(reader).tolist() == [0]
    with pytest.raises(UserError, match="none of 2 records has the category 'gui'"):
        dataclasses.replace(source, category="gui").rows(reader)
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match="is compressed"):
        opened(tmp_path / "a.jsonl.gz", reader="jsonl")


def test_hosts_share_out_the_records(tmp_path):
    examples.jsonl(tmp_path / "a.jsonl", [{"text": str(n)} for n in range(50)])
    sources = {"own": local.Source.of("own", {"path": str(tmp_path)})}
    seen = [local.opened(sources, shard, 3, FaultLog())["own"][1] for shard in range(3)]
    assert sorted(np.concatenate(seen).tolist()) == list(range(50))

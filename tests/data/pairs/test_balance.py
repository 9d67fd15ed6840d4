"""Languages in exact shares, hosts that share nothing, held-out records, batches of pairs, and what is broken."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest
from PIL import Image

from glmv_jax.data import heldout, image_text, naflex
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.pairs import Source, balance, fields, picture
from glmv_jax.data.pipeline import Reading
from glmv_jax.data.text_rows import SharedRows
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.typing import UserError
from tests.data.pairs import made

TOKENIZER, PATCHER = Tokenizer(), Patcher(max_patches=16)
ROWS = SharedRows(TOKENIZER)
EN, ZH = "a text", "中文"


@pytest.fixture(autouse=True)
def no_cache_of_ours(monkeypatch, tmp_path):
    monkeypatch.setattr("glmv_jax.data.cache.FOLDER", str(tmp_path / "cache"))


def sources(**entries):
    return {name: Source.of(name, {k: str(v) if k == "path" else v for k, v in entry.items()})
            for name, entry in entries.items()}


def batches(found, batch=20, **options):
    of_reading = options.keys() & {"seed", "shard", "shards", "workers", "faults"}
    reading = {"ahead": 0} | {k: options.pop(k) for k in of_reading}
    return image_text.pair_batches(found, ROWS, PATCHER, batch=batch, reading=Reading(**reading), **options)


def refs(found, n, chinese=0.5, heldout=0.0, shard=0, shards=1, seed=0):
    """(id, languages, source) of the first n rows."""
    parts = balance.opened(found, shard, shards, FaultLog(None))
    mixed = balance.Balanced(parts, chinese, heldout).mixed(seed, lambda order, langs, name: _Named(order, langs, name))
    return [mixed[i] for i in range(n)]


class _Named:
    def __init__(self, order, langs, name):
        self.order, self.langs, self.name = order, langs, name

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        return self.order[i].id, self.langs, self.name


def shades(batch):
    """What the pictures of a batch were drawn in."""
    found = []
    for patches, yx, frame in zip(batch["patches"], batch["yx"], batch["frame"]):
        red, green, _ = naflex.unpatchify(patches[frame > 0], yx[frame > 0], PATCHER.patch)[0, 0].tolist()
        found.append(red + 256 * green)
    return found


# ---------------------------------------------------------------------------------------------------------- languages


@pytest.mark.parametrize("chinese", [0.5, 0.3, 0.0, 1.0])
def test_the_share_of_chinese_is_exact_whatever_the_sources(chinese, tmp_path):
    found = sources(
        mostly_en={"path": made.texts_tar(tmp_path / "a.tar", [EN] * 37 + [ZH] * 3), "weight": 5.0},
        zh={"path": made.texts_tar(tmp_path / "b.tar", ["Latin only"] * 11, 100), "lang": "zh"},
        both={"path": made.texts_tar(tmp_path / "c.tar", [f"{EN}\n{ZH}"] * 8, 200)},
    )
    drawn = refs(found, 400, chinese)
    is_chinese = np.cumsum([langs == ("zh",) for _, langs, _ in drawn])
    assert np.abs(is_chinese - chinese * np.arange(1, 401)).max() < 1
    counts = collections.Counter((name, langs[0]) for _, langs, name in drawn)
    assert ("zh", "en") not in counts
    if chinese == 0.5:  # within a language by weight * share of the source's records that have it
        weights = {("mostly_en", "zh"): 5 * 3 / 40, ("zh", "zh"): 1, ("both", "zh"): 1,
                   ("mostly_en", "en"): 5 * 37 / 40, ("both", "en"): 1}
        for (name, lang), weight in weights.items():
            total = sum(w for (_, other), w in weights.items() if other == lang)
            assert abs(counts[name, lang] - 200 * weight / total) < 3


def test_rows_have_the_language_they_say(tmp_path):
    texts = [f"{EN} {i}" if i % 3 else f"{ZH}{i}" for i in range(30)]
    found = sources(web={"path": made.texts_tar(tmp_path / "a.tar", texts)})
    data = batches(found, 20)
    for _ in range(3):
        batch = next(data)
        assert batch["lang"].shape == (20, 1) and batch["lang"].sum() == 10
        for shade, tokens, lang in zip(shades(batch), batch["tokens"], batch["lang"][:, 0]):
            assert TOKENIZER.decode(tokens).replace(" ", "") == texts[shade].replace(" ", "")
            assert lang == (shade % 3 == 0)


def test_a_record_with_both_languages_does_not_come_in_both_at_once(tmp_path):
    """In step, half of a batch would be pictures that it holds already."""
    found = sources(web={"path": made.texts_tar(tmp_path / "a.tar", [f"{EN}\n{ZH}"] * 200)})
    drawn = refs(found, 100)
    assert collections.Counter(langs for _, langs, _ in drawn) == {("en",): 50, ("zh",): 50}
    assert len({id_ for id_, _, _ in drawn}) > 75  # 87.5 are to be expected


def test_both_languages_take_the_records_that_have_both(tmp_path):
    texts = [EN, ZH, f"{EN}\n{ZH}", f"{ZH}\n{EN}", EN]
    found = sources(web={"path": made.texts_tar(tmp_path / "a.tar", texts)})
    batch = next(batches(found, 8, chinese=None))
    assert batch["lang"].tolist() == [[0, 1]] * 8 and set(shades(batch)) == {2, 3}
    for row, segments in zip(batch["tokens"], batch["segments"]):
        assert TOKENIZER.decode(row[segments == 1]) == EN and TOKENIZER.decode(row[segments == 2]) == ZH
    found = sources(web={"path": made.texts_tar(tmp_path / "b.tar", [EN, ZH])})
    with pytest.raises(UserError, match="both_languages: no record with texts in both in this host's part of web"):
        batches(found, chinese=None)


def test_a_language_that_is_missing(tmp_path):
    found = sources(web={"path": made.texts_tar(tmp_path / "a.tar", [EN] * 9)})
    with pytest.raises(UserError, match=r"data\.chinese=0\.5: no Chinese text in .* web; .*set data\.chinese to 0"):
        batches(found)
    assert next(batches(found, chinese=0.0))["lang"].sum() == 0
    with pytest.raises(UserError, match=r"data\.chinese=1\.5 is no share"):
        batches(found, chinese=1.5)


def test_a_source_of_hardly_any_weight_is_left_out(tmp_path):
    a, b = (made.texts_tar(tmp_path / f"{n}.tar", [EN, ZH]) for n in "ab")
    drawn = refs(sources(a={"path": a}, b={"path": b, "weight": 1e-9}), 50)
    assert {name for _, _, name in drawn} == {"a"}


def test_languages_are_read_once(tmp_path, capsys):
    path = made.texts_tar(tmp_path / "a.tar", [EN, ZH, EN, ZH])
    for _ in range(2):
        batches(sources(web={"path": path}))
    assert capsys.readouterr().err.count("reading all 4 texts once") == 1
    batches(sources(web={"path": path, "lang": "zh"}), chinese=1.0)
    assert "reading" not in capsys.readouterr().err


@pytest.mark.parametrize("text, lang", [
    ("a cat", "en"), ("一只猫", "zh"), ("iPhone 手机壳", "zh"), ("Beijing (北京) is the capital", "en"),
    ("2024 🎉", "en"), ("これは猫です", "en"), ("", "en"), ("𠮷野家", "zh"),
])  # fmt: skip
def test_detection(text, lang):
    """Anything that is not Chinese counts as English, Japanese too."""
    assert fields.language(text) == lang


# -------------------------------------------------------------------------------------------------------------- hosts


@pytest.mark.parametrize("files", [1, 36])
def test_hosts_read_disjoint_parts_and_lengths_alike(files, tmp_path):
    """36 files: each host opens its own; 1 file: each has half of the records. Languages take turns."""
    per = 72 // files
    for n in range(files):
        texts = [EN if (i if files == 1 else n) % 2 else ZH for i in range(per)]
        made.texts_tar(tmp_path / f"{n}.tar", texts, n * per)
    found = sources(web={"path": tmp_path})
    lengths = {8: 0.5, 16: 0.5}
    hosts = [batches(found, 4, lengths=lengths, shard=s, shards=2) for s in range(2)]
    parts = [balance.opened(found, s, 2, FaultLog(None))["web"][1].files for s in range(2)]
    assert [len(part) for part in parts] == ([18, 18] if files > 1 else [1, 1])
    seen, drawn = [set(), set()], []
    for _ in range(16):
        both = [next(host) for host in hosts]
        assert len({batch["patches"].shape for batch in both}) == 1
        drawn.append(both[0]["patches"].shape[1])
        for ids, batch in zip(seen, both):
            ids |= set(shades(batch))
            assert batch["lang"].sum() == 2
    assert not seen[0] & seen[1] and min(map(len, seen)) > 10 and set(drawn) == {8, 16}


def test_an_epoch_has_every_record_once_and_the_next_another_order(tmp_path):
    n, group = 3500, 350
    columns = {"image": made.hugging_face([b"x"] * n), "text": [EN] * n}
    found = sources(web={"path": made.parquet(tmp_path / "a.parquet", columns, group)})
    rows = [id_ for id_, _, _ in refs(found, 2 * n, chinese=0.0)]
    assert sorted(rows[:n]) == sorted(rows[n:]) == sorted(set(rows))
    assert rows[:n] != rows[n:] and rows[:n] != [id_ for id_, _, _ in refs(found, n, chinese=0.0, seed=1)]
    numbers = np.array([int(id_.rpartition("/")[2]) for id_ in rows[:n]])
    windows = [numbers[i : i + 3 * group] // group for i in (0, 3 * group)]
    assert [len(set(window)) for window in windows] == [3, 3], "a few row groups at a time"
    assert np.mean(np.diff(windows[0]) != 0) > 0.5, "and mixed within them"
    found = sources(web={"path": made.texts_tar(tmp_path / "a.tar", [EN] * 50)})
    rows = [id_ for id_, _, _ in refs(found, 100, chinese=0.0)]
    assert sorted(rows[:50]) == sorted(rows[50:]) and rows[:50] != rows[50:] and rows[:50] != sorted(rows[:50])


def test_resumed_in_workers_and_without(tmp_path):
    texts = [EN if i % 2 else ZH for i in range(40)]
    found = sources(web={"path": made.texts_tar(tmp_path / "a.tar", texts)})
    data = batches(found, 6, lengths={8: 1, 16: 1}, heldout=0.1)
    for _ in range(3):
        next(data)
    state = json.loads(json.dumps(data.get_state()))
    expected = [next(data) for _ in range(2)]
    for workers in (0, 2):
        again = batches(found, 6, lengths={8: 1, 16: 1}, heldout=0.1, workers=workers)
        again.set_state(state)
        for batch in expected:
            np.testing.assert_equal(next(again), batch)
        again.close()


# ----------------------------------------------------------------------------------------------------------- concepts


def test_one_picture_is_one_concept_on_every_host(tmp_path):
    same = made.jpeg(5, format="PNG")
    other = made.jpeg(6)
    a = {"0": {"png": same, "txt": b"one"}, "1": {"png": same, "txt": b"two"}, "2": {"png": other, "txt": b"one"}}
    paths = made.tar(tmp_path / "a.tar", a), made.parquet(tmp_path / "b.parquet", {"image": [same], "text": ["three"]})
    found = sources(a={"path": paths[0]}, b={"path": paths[1]})
    batch = next(batches(found, 40, chinese=0.0))
    by = collections.defaultdict(set)
    for tokens, concept in zip(batch["tokens"], batch["concept"].tolist()):
        by[TOKENIZER.decode(tokens)].add(concept)
    assert by["two"] == by["three"] and len(by["two"]) == 1
    assert len(by["one"]) == 2, "the text alone does not make them alike"
    assert batch["concept"].dtype == np.int32 and (batch["concept"] >= 0).all()
    alike = sources(a={"path": paths[0], "alike": "text"})
    batch = next(batches(alike, 40, chinese=0.0))
    assert len(set(batch["concept"].tolist())) == 2
    assert by["two"] == {picture.label(same)}


def test_labels_collide_as_often_as_chance_has_it():
    """Among 2^16 labels one is expected, among 2^18 (2^35 pairs) 16, give or take 4."""
    labels = [picture.label(f"{i}") for i in range(1 << 18)]
    assert max(labels) < 1 << 31
    counts = collections.Counter(labels).values()
    assert abs(sum(n * (n - 1) // 2 for n in counts) - 16) < 16


def test_a_batch_may_be_larger_than_the_source(tmp_path):
    found = sources(web={"path": made.texts_tar(tmp_path / "a.tar", [EN, ZH, EN])})
    assert next(batches(found, 100))["lang"].sum() == 50


# ----------------------------------------------------------------------------------------------------------- held out


def test_held_out_pairs_are_never_trained_on(tmp_path):
    texts = [f"{EN} {i}" if i % 2 else f"{ZH}{i}" for i in range(60)]
    for n in range(3):
        made.texts_tar(tmp_path / f"{n}.tar", texts[20 * n : 20 * n + 20], 20 * n)
    found = sources(web={"path": tmp_path})
    sets = heldout.source_pairs(found, ROWS, PATCHER, 24, share=0.3, limit=50)
    assert set(sets) == {"en", "zh"}
    ids = set(sets["en"].ids) | set(sets["zh"].ids)
    trained = {id_ for id_, _, _ in refs(found, 400, heldout=0.3)}
    assert not ids & trained and len(ids | trained) == 60 and 8 < len(ids) < 30
    data = batches(found, 40, heldout=0.3)
    shown = {shade for _ in range(5) for shade in shades(next(data))}
    assert not shown & {int(id_[-5:]) for id_ in ids}
    for lang, held in sets.items():
        n = len(held.ids)
        assert set(held.texts) == {f"{lang} name"} and held.texts[f"{lang} name"].shape == (n, 24)
        assert held.vision["patches"].shape[:2] == (n, 16) and held.concept.shape == (n,)
        for id_, image, name in zip(held.ids, held.images, held.names[lang]):
            assert name == texts[int(id_[-5:])] and isinstance(image, Image.Image)
            assert fields.language(name) == lang
    few = heldout.source_pairs(found, ROWS, PATCHER, 24, share=0.3, limit=3)
    assert {lang: len(held.ids) for lang, held in few.items()} == {"en": 3, "zh": 3}
    assert set(few["en"].ids) <= set(sets["en"].ids)
    with pytest.raises(UserError, match=r"fewer than two pairs of web are held out at data\.heldout=0\.0; raise it"):
        heldout.source_pairs(found, ROWS, PATCHER, 24, share=0.0, limit=3)
    with pytest.raises(UserError, match="all records are held out"):
        refs(found, 1, heldout=1.0)


def test_pictures_of_the_evaluation_are_not_trained_on_under_other_ids(tmp_path):
    """Data with a record a caption: a picture is in three records."""
    samples = {f"{i:03d}": {"png": made.jpeg(i // 3, format="PNG"), "txt": f"{EN} {i}".encode()} for i in range(90)}
    found = sources(web={"path": made.tar(tmp_path / "a.tar", samples), "lang": "en"})
    held = heldout.source_pairs(found, ROWS, PATCHER, 24, share=0.1, limit=50)["en"]
    evaluated = {int(id_[-3:]) // 3 for id_ in held.ids}

    def shown(**options):
        data = batches(found, 60, chinese=0.0, heldout=0.1, **options)
        return {shade for _ in range(4) for shade in shades(next(data))}

    log = tmp_path / "faults.jsonl"
    assert len(evaluated & shown()) > 3
    assert shown(unseen=held.concept.tolist(), faults=log) == set(range(30)) - evaluated
    assert not log.exists(), "to be left out is no fault"


def test_what_is_held_out_does_not_change():
    held = [i for i in range(200) if balance.held_out(f"a.tar/{i:05d}", 0.05)]
    assert held == [0, 18, 33, 55, 92, 117, 157, 194]
    assert set(held) <= {i for i in range(200) if balance.held_out(f"a.tar/{i:05d}", 0.1)}


# ------------------------------------------------------------------------------------------------- broken, and decoding


def test_broken_records_are_skipped_counted_and_named(tmp_path):
    texts = [EN.encode() if i % 2 else ZH.encode() for i in range(12)]
    samples = {f"{i:02d}": {"png": made.jpeg(i, format="PNG"), "txt": text} for i, text in enumerate(texts)}
    broken = {
        "bad": {"jpg": made.jpeg(1, (300, 200))[:700], "txt": EN.encode()},
        "no picture": {"txt": EN.encode()},
        "no text": {"jpg": made.jpeg(1)},
        "empty": {"jpg": made.jpeg(1), "txt": b" \n"},
        "number": {"jpg": made.jpeg(1), "json": b'{"caption": 3}'},
        "latin1": {"jpg": made.jpeg(1), "txt": "caf\u00e9".encode("latin-1")},
        "thin": {"png": made.jpeg(1, (500, 2), "PNG"), "txt": EN.encode()},
    }
    log = tmp_path / "faults.jsonl"
    found = sources(web={"path": made.tar(tmp_path / "a.tar", samples | broken)})
    data = batches(found, 8, faults=log)
    for _ in range(5):
        batch = next(data)
        assert batch["lang"].sum() == 4
        assert all((shade % 2 == 0) == lang for shade, lang in zip(shades(batch), batch["lang"][:, 0]))
    faults = [json.loads(line) for line in log.read_text().splitlines()]
    reasons = {fault["id"].removeprefix("a.tar/"): fault["reason"] for fault in faults}
    assert set(reasons) == set(broken) and all(fault["source"] == "web" for fault in faults)
    assert "broken or cut short" in reasons["bad"] and "is int, not text" in reasons["number"]
    assert FaultLog(log).counts() == {"web": len({(f["index"], f["id"]) for f in faults})}


def photograph(size):
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [128 + 80 * np.sin(x / 11 + c) * np.cos(y / 17 + c) for c in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_small_and_is_the_same_picture(orientation, tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph((640, 481)).save(path, quality=95, exif=exif)
    patcher = Patcher(patch=14, max_patches=80)
    found = picture.sized(path.read_bytes(), patcher)
    full = patcher.resize(naflex.load_image(path))
    assert found.size == full.size and (found.height > found.width) == (orientation == 6)
    error = np.asarray(found, np.float64) - np.asarray(full, np.float64)
    assert 10 * np.log10(255**2 / (error**2).mean()) > 38
    with naflex.opened(path.read_bytes()) as image:
        image.draft(None, (120, 90))
        assert image.size[0] < 640, "this Pillow can decode at a reduced size"


def test_a_picture_of_its_size_is_not_resized_again():
    """`sized` settles the size, of a JPEG before it is set upright; the patcher must then leave it."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = (int(np.exp(rng.uniform(np.log(8), np.log(3000)))) for _ in range(2))
        if max(height, width) < 150 * min(height, width):
            patcher = Patcher(patch=14, max_patches=int(rng.choice([128, 256, 576, 784, 1024])))
            size = patcher.size(height, width)
            assert patcher.size(*size) == size == patcher.size(width, height)[::-1]

"""The batch contract, exact resuming in a new process, sharding, workers and broken records, on the real corpus."""

from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from glmv_jax.data import basics, crops, drawing, emoji, image_text, naflex, packing, pipeline
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.images import Images
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.pipeline import Reading
from glmv_jax.data.questions import Questions
from glmv_jax.data.text_rows import SharedRows
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.typing import UserError
from tests.data import scenes

TOKENIZER, PATCHER = Tokenizer(), Patcher()
ROWS = SharedRows(TOKENIZER)
BUILDER = DocumentBuilder(TOKENIZER, PATCHER, max_tokens=160, max_patches=256)
MIM_WEIGHTS = {"natural": 0.8, "instruction": 0.1, "scientific": 0.1}
KINDS = ("count", "name", "ground", "read")


def mim(**options):
    sources = {name: Images(name, "train", 0) for name in MIM_WEIGHTS}
    return crops.mim_batches(sources, MIM_WEIGHTS, batch=10, reading=Reading(**{"ahead": 0} | options))


def siglip(batch: int = 64, chinese: float | None = None, **options):
    return image_text.siglip_batches(emoji.Pairs("train", 0), ROWS, PATCHER, batch=batch, chinese=chinese,
                                     reading=Reading(**{"ahead": 0} | options))


def vlm(form: str = "chat", **options):
    sources = {kind: Questions((kind,), "train", 0) for kind in KINDS}
    return pipeline.vlm_batches(sources, {kind: 1 for kind in KINDS}, BUILDER, form=form, batch=4,
                                reading=Reading(**{"ahead": 0} | options))


def prompts(**options):
    sources = {kind: Questions((kind,), "train", 0) for kind in KINDS}
    return pipeline.prompt_batches(sources, {kind: 1 for kind in KINDS}, BUILDER, batch=4,
                                   reading=Reading(**{"ahead": 0} | options))


STAGES = {"mim": mim, "siglip": siglip, "vlm": vlm, "prompts": prompts}


def arrays(batch: dict) -> dict:
    """A batch without its list of samples, which hold pictures."""
    return {name: value for name, value in batch.items() if name != "samples"}


def assert_same(a: dict, b: dict) -> None:
    np.testing.assert_equal(arrays(a), arrays(b))


def check_vision(batch: dict, rows: int, patches: int) -> None:
    assert batch["patches"].shape == (rows, patches, 192) and batch["patches"].dtype == np.uint8
    assert batch["yx"].shape == (rows, patches, 2) and batch["yx"].dtype == np.int32
    assert batch["frame"].shape == (rows, patches) and batch["frame"].dtype == np.int32
    assert not batch["patches"][batch["frame"] == 0].any()
    for yx, frame in zip(batch["yx"], batch["frame"]):
        for number in set(frame[frame > 0]):
            grid = yx[frame == number]
            np.testing.assert_array_equal(grid, naflex.grid_coordinates(*(grid.max(0) + 1)))


# --------------------------------------------------------------------------------------------------- batch contract


def test_mim_batch():
    batch = next(mim())
    check_vision(batch, 10, 64)
    assert batch["mask"].dtype == bool and (batch["mask"].sum(1) == 22).all()
    assert batch["image"].shape == (10, 64, 64, 3) and batch["image"].dtype == np.uint8
    assert np.bincount(batch["source"]).tolist() == [8, 1, 1]
    for patches, yx, image in zip(batch["patches"], batch["yx"], batch["image"]):
        np.testing.assert_array_equal(naflex.unpatchify(patches, yx, 8), image)


@pytest.mark.parametrize("chinese", [None, 0.5])
def test_siglip_batch(chinese):
    """None: a text in both languages an image; a share: one text, in either."""
    batch = next(siglip(batch=200, chinese=chinese))
    check_vision(batch, 200, 64)
    texts = 2 if chinese is None else 1
    assert batch["tokens"].shape == batch["segments"].shape == (200, 16) and batch["tokens"].dtype == np.int32
    assert batch["lang"].shape == (200, texts)
    np.testing.assert_array_equal(batch["tokens"] != 0, batch["segments"] != 0)
    assert len(set(batch["concept"])) == 200
    assert 60 * texts < batch["lang"].sum() < 140 * texts
    for n in range(texts):
        rows = np.where(batch["segments"] == n + 1, batch["tokens"], 0)
        assert ((rows == TOKENIZER.eos).sum(-1) == 1).all()
        is_chinese = np.array([any("一" <= c <= "鿿" for c in TOKENIZER.decode(row)) for row in rows])
        assert np.mean(is_chinese == batch["lang"][:, n]) > 0.95, "a few Chinese names are written in Latin letters"
    assert len({tuple(yx.max(0)) for yx in batch["yx"]}) > 3, "native aspect ratios"


@pytest.mark.parametrize("options, expected", [
    (dict(text_length=28, basics=0.25, texts={"name": 0.3, "name+keywords": 0.5, "keywords": 0.2}),
     ["90d9dd0f183446df", "4f15522714a905bb"]),
    (dict(lengths={16: 0.5, 48: 0.5}, chinese=0.5), ["6bdb10e0d562229f", "97fb303762904076"]),
])  # fmt: skip
def test_siglip_batches_of_the_shipped_corpus_are_what_they_were(options, expected):
    """Digests written before stage 2 could read anything else: the pictures to the last bit, and all else."""

    def digest(batch):
        seen = hashlib.sha256()
        for patches, yx, frame in zip(batch["patches"], batch["yx"], batch["frame"]):
            seen.update(naflex.unpatchify(patches[frame > 0], yx[frame > 0], 8).tobytes())
        for name in ("yx", "frame", "tokens", "segments", "concept", "lang"):
            seen.update(batch[name].tobytes())
        return seen.hexdigest()[:16]

    data = image_text.siglip_batches(emoji.Pairs("train", 0), ROWS, Patcher(max_patches=48), batch=64,
                                     reading=Reading(ahead=0), **options)
    assert [digest(next(data)) for _ in range(2)] == expected


def test_siglip_batch_with_basics():
    """A quarter of the pairs; their concepts lie beyond those of the emoji and may repeat, the emoji still may not."""

    def make():
        return image_text.siglip_batches(emoji.Pairs("train"), ROWS, PATCHER, batch=200, basics=0.25,
                                         reading=Reading(ahead=0))

    data = make()
    batches = [next(data) for _ in range(3)]
    first = len(emoji.load())  # numbers below it are concepts of emoji
    for batch in batches:
        known = batch["concept"][batch["concept"] < first]
        assert abs(len(known) - 150) <= 1 and len(set(known)) == len(known)
    shown = {}
    for batch in batches:
        for concept, tokens, segments, lang in zip(*(batch[k] for k in ("concept", "tokens", "segments", "lang"))):
            if concept >= first:
                name = basics.NAMES[concept - first]
                shown.setdefault(name, set()).add(tuple(TOKENIZER.decode(tokens[segments == n]) for n in (1, 2)))
                assert lang.tolist() == [0, 1]
    assert shown["circle"] == {("circle", "圆形")} and len(shown) > 30
    resumed = make()
    resumed.set_state(json.loads(json.dumps(data.get_state())))
    assert_same(next(resumed), next(data))


def test_basics_show_what_they_name():
    """Colour and place change, the shape is that of the name: found again from the pixels."""
    pairs = [basics.Basics(3)[i] for i in range(120)]
    shapes = [pair for pair in pairs if pair.id in drawing.SHAPES]
    assert 30 < len(shapes) < 70 and {pair.id for pair in shapes} == set(drawing.SHAPES)
    found = [scenes.find(pair.image)[0] for pair in shapes]
    assert [f.shape for f in found] == [pair.id for pair in shapes] and len({f.colour for f in found}) > 5


def test_texts_of_a_pair():
    texts, rng = ["cat", "animal", "pet", "whiskers", "tail"], np.random.default_rng(0)
    assert image_text.pair_text(texts, "name", rng) == "cat"
    assert image_text.pair_text(texts, "name+keywords") == "cat, animal, pet, whiskers, tail"
    drawn = {image_text.pair_text(texts, "keywords", rng) for _ in range(200)}
    assert {text.count(",") for text in drawn} == {0, 1, 2, 3} and not any("cat" in text for text in drawn)
    assert all(image_text.pair_text(texts, "name+keywords", rng).startswith("cat, ") for _ in range(20))
    assert image_text.pair_text(["cat"], "keywords", rng) == "cat"


@pytest.mark.parametrize("form", ["chat", "pretrain"])
def test_vlm_batch(form):
    data = vlm(form)
    batches = [next(data) for _ in range(8)]
    for batch in batches:
        check_vision(batch, 4, 256)
        for name, dtype in [("tokens", np.int32), ("segments", np.int32), ("image_row", np.int32),
                            ("source", np.int32), ("loss_weight", np.float32)]:
            assert batch[name].shape == (4, 160) and batch[name].dtype == dtype, name
        assert batch["positions"].shape == (4, 160, 3) and batch["positions"].dtype == np.int32
        np.testing.assert_array_equal(batch["image_row"] >= 0, batch["tokens"] == TOKENIZER.image)
        np.testing.assert_array_equal(batch["source"] >= 0, batch["segments"] > 0)
        assert not batch["loss_weight"][(batch["segments"] == 0) | (batch["image_row"] >= 0)].any()
        for row in range(4):
            used = np.sort(batch["image_row"][row][batch["image_row"][row] >= 0])
            np.testing.assert_array_equal(used, np.arange((batch["frame"][row] > 0).sum() // 4))
    documents = np.concatenate([[np.unique(b["source"][r][b["segments"][r] == s])[0]
                                 for s in range(1, b["segments"][r].max() + 1)] for b in batches for r in range(4)])
    counts = np.bincount(documents, minlength=4)
    assert counts.max() - counts.min() <= 4, "equal weights"
    filled = [packing.efficiency(b) for b in batches]
    assert max(np.mean([f[name] for f in filled]) for name in ("tokens", "patches")) > 0.85


def test_prompt_batch_belongs_to_its_samples():
    batch = next(prompts())
    check_vision(batch, 4, 256)
    for row, sample in enumerate(batch["samples"]):
        expected = BUILDER.prompt(sample)
        length = batch["length"][row]
        np.testing.assert_array_equal(batch["tokens"][row, :length], expected.tokens)
        np.testing.assert_array_equal(batch["patches"][row][batch["frame"][row] > 0], expected.images[0][0])
        assert KINDS[batch["source"][row, 0]] == sample.source
        assert batch["next_position"][row] == batch["positions"][row, length - 1, 0] + 1


# ------------------------------------------------------------------------------------------------- order and resuming


@pytest.mark.parametrize("stage", STAGES)
def test_seeds_and_reproducibility(stage):
    make = STAGES[stage]
    first = next(make(seed=1))
    assert_same(first, next(make(seed=1)))
    assert_same(first, next(make(seed=1, ahead=2)))
    assert not np.array_equal(first["patches"], next(make(seed=2))["patches"])


RESUME = """
    import json, sys
    sys.path[:0] = {paths}
    import numpy as np, test_pipeline
    if __name__ == "__main__":
        states, folder = json.load(sys.stdin), sys.argv[1]
        for stage, state in states.items():
            data = test_pipeline.STAGES[stage](ahead=2)
            data.set_state(state)
            np.savez(folder + "/" + stage, **test_pipeline.arrays(next(data)))
            data.close()
"""


def test_a_new_process_goes_on_with_the_very_next_batch(tmp_path):
    states, following = {}, {}
    for stage, make in STAGES.items():
        data = make(ahead=2)
        for _ in range(3):
            next(data)
        states[stage] = data.get_state()
        following[stage] = next(data)
        data.close()
    assert len(json.dumps(states)) < 500
    here = pathlib.Path(__file__).parent
    script = "\n".join(line[4:] for line in RESUME.format(paths=[str(here), str(here.parents[1])]).splitlines())
    (tmp_path / "resume.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "resume.py", tmp_path], input=json.dumps(states), text=True, check=True)
    for stage, expected in following.items():
        with np.load(tmp_path / f"{stage}.npz") as got:
            assert_same(dict(got), expected)


def test_workers_change_nothing_and_states_are_theirs_too():
    alone, working = vlm(), vlm(workers=2)
    batches = [next(alone) for _ in range(4)]
    for expected in batches[:2]:
        assert_same(next(working), expected)
    alone.set_state(working.get_state())
    working.close()
    assert_same(next(alone), batches[2])


def test_siglip_shows_every_concept_once_an_epoch_and_never_twice_in_a_batch():
    data, n = siglip(batch=300), len(emoji.split("train"))
    seen = []
    for _ in range(n // 300 + 3):  # into the second epoch
        batch = next(data)
        assert len(set(batch["concept"])) == 300
        seen += batch["concept"].tolist()
    concepts = {image_text.concept_number(emoji.load()[i].id) for i in emoji.split("train")}
    assert set(seen) == concepts
    held_out = {image_text.concept_number(emoji.load()[i].id) for i in emoji.split("heldout")}
    assert not held_out & set(seen)


def test_shards_read_different_records():
    parts = [next(siglip(batch=100, shard=s, shards=3)) for s in range(3)]
    concepts = [set(part["concept"].tolist()) for part in parts]
    assert len(set.union(*concepts)) == 300
    rows = [next(mim(shard=s, shards=2))["patches"] for s in range(2)]
    assert not any(np.array_equal(a, b) for a in rows[0] for b in rows[1])


# -------------------------------------------------------------------------------------------------------- wrong input


class Holes:
    """Plain pictures; those whose number is in `broken` are no pictures at all."""

    def __init__(self, broken):
        self.broken = set(broken)

    def __len__(self):
        return 50

    def __getitem__(self, i: int):
        picture = naflex.load_image(b"no picture") if i in self.broken else Image.new("RGB", (20, 30), (5 * i, 0, 0))
        return f"photo/{i}", picture


def test_broken_pictures_are_skipped_and_logged_and_the_run_goes_on(tmp_path):
    def make(broken, name):
        reading = Reading(ahead=0, faults=tmp_path / name)
        return crops.mim_batches({"p": Holes(broken)}, {"p": 1}, batch=10, reading=reading)

    whole, holed = make((), "none"), make((7, 20), "some")
    for _ in range(10):  # two epochs
        reds, left = (np.sort(next(data)["image"][:, 0, 0, 0]) for data in (whole, holed))
        assert len(left) == 10 and not {35, 100} & set(left)
        assert set(reds) - set(left) <= {35, 100}, "only the broken ones were replaced"
    assert not (tmp_path / "none").exists()
    log = [json.loads(line) for line in (tmp_path / "some").read_text().splitlines()]
    assert len(log) == 4 and all("is not a picture" in fault["reason"] for fault in log)
    with pytest.raises(UserError, match="20 records of source 'p' in a row failed"):
        next(make(range(50), "all"))


def test_wrong_arguments_are_user_errors():
    for call, message in [
        (lambda: siglip(batch=5000), "5000 needs as many concepts"),
        (lambda: vlm("chatt"), "choose pretrain or chat"),
        (lambda: Reading(shard=2, shards=2), "shard 2 of 2"),
        (lambda: crops.mim_batches({}, {}, batch=1, mask_kind="x"), "choose blockwise or random"),
        (lambda: image_text.siglip_batches(emoji.Pairs("train"), ROWS, PATCHER, batch=2, texts={"nam": 1}), "'nam'"),
        (lambda: crops.mim_batches({"a": [1, 2]}, {"a": 1}, batch=1, reading=Reading(shards=4)), "use fewer"),
    ]:
        with pytest.raises(UserError, match=message):
            call()


def test_an_image_over_the_budget_is_a_user_error():
    with pytest.raises(UserError, match="64 patches does not fit a row of 32"):
        pipeline.vision_row(*PATCHER(Image.new("RGB", (64, 64))), 32)

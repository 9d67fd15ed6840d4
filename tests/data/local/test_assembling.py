"""Records to rows: the examples of every category, long ones split or cut, packed = alone, mixtures that resume.

Not covered: sizes beyond a few hundred tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.data import conversation, local, naflex, packing, video
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.chat import Rendered, Writer
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.local import pipeline, schema
from glmv_jax.data.local.assembling import Assembler
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.pipeline import Reading
from glmv_jax.data.questions import Questions
from glmv_jax.data.stream import Stream
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.models import cogvit
from glmv_jax.typing import UserError
from tests import tiny_vlm
from tests.data import video_oracle
from tests.data.local import examples

TOKENIZER = Tokenizer()
PATCHER = Patcher(max_patches=48)
BUILDER = DocumentBuilder(TOKENIZER, PATCHER, max_tokens=700, max_patches=512)
ASSEMBLER = Assembler(BUILDER)


@pytest.fixture(autouse=True)
def no_cache_of_ours(monkeypatch, tmp_path):
    monkeypatch.setattr("glmv_jax.data.cache.FOLDER", str(tmp_path / "cache"))


def spelled(document, learnt: bool = False) -> str:
    tokens = document.tokens[document.loss_weight > 0] if learnt else document.tokens
    return TOKENIZER.decode(tokens, keep_special=True)


def picture(colour: str, size: tuple[int, int] = (48, 32)) -> dict:
    return {"type": "image", "image": examples.png(examples.Image.new("RGB", size, colour))}


def record(*segments, id_: str = "r", **fields) -> schema.Record:
    parts = [{"type": "text", "text": s} if isinstance(s, str) else s for s in segments]
    return schema.parse({"segments": parts, **fields}, id_, lambda name: b"")


def small(tokens: int, patches: int = 512, targets: int | None = None, **options) -> Assembler:
    return Assembler(DocumentBuilder(TOKENIZER, PATCHER, tokens, patches, max_targets=targets), **options)


# ----------------------------------------------------------------------------------------------------- one document


def test_pictures_stand_where_they_are_told():
    (document,) = ASSEMBLER.documents(record("a ", picture("red"), "b", picture("blue", (32, 48)), picture("green")))
    assert spelled(document).replace("<|image|>", "") == (
        "[gMASK]<sop>a <|begin_of_image|><|end_of_image|>b<|begin_of_image|><|end_of_image|>"
        "<|begin_of_image|><|end_of_image|><|endoftext|>")  # fmt: skip
    assert spelled(document, learnt=True) == "a b<|endoftext|>"
    for number, colour in enumerate([(255, 0, 0), (0, 0, 255), (0, 128, 0)]):
        patches, yx = document.images[number]
        assert (document.image_of_token == number).sum() == len(patches) / 4
        assert (naflex.unpatchify(patches, yx, 8) == colour).all()


def test_every_category_becomes_rows(tmp_path):
    records = examples.records(tmp_path)
    source = local.Source.of("own", {"path": str(examples.jsonl(tmp_path / "a.jsonl", list(records.values())))})
    reader = source.open(source.files(), "own")
    assembler = dataclasses.replace(
        ASSEMBLER, builder=dataclasses.replace(BUILDER, patcher=dataclasses.replace(PATCHER, frames=2)), film_patches=16
    )
    for i, name in enumerate(records):
        documents = assembler.documents(reader[i])
        text = "".join(map(spelled, documents))
        assert documents[0].id.startswith(f"{name}/1") and all(document.targets for document in documents)
        if "messages" in records[name]:
            assert records[name]["messages"][-1]["content"] in spelled(documents[-1], learnt=True)
        else:
            said = [part["text"] for part in records[name]["segments"] if part["type"] == "text"]
            assert all(TOKENIZER.decode(TOKENIZER.encode(words))[:20] in text for words in said)


def test_weights_of_segments_and_records():
    (document,) = ASSEMBLER.documents(record({"type": "text", "text": "ab", "loss": 0.25}, {"type": "text", "text": "c",
                                             "loss": 0}, weight=2))  # fmt: skip
    context = len(TOKENIZER.encode("ab"))
    assert document.loss_weight.tolist() == [0, 0] + [0.5] * context + [0] * len(TOKENIZER.encode("c")) + [2]
    assert ASSEMBLER.documents(record("a", weight=0)) == []  # nothing of it would be learnt
    per = Assembler(dataclasses.replace(BUILDER, per="sqrt"))
    (shared,) = per.documents(record("one two three", weight=2))
    assert shared.loss_weight.sum() == pytest.approx(2 * shared.targets**0.5)
    chat = {"weight": 0.5, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (document,) = ASSEMBLER.documents(schema.parse(chat, "x", lambda name: b""))
    assert set(document.loss_weight) == {0, 0.5}


# -------------------------------------------------------------------------------------------------------------- films


def test_a_film_is_pairs_of_frames_with_times():
    pytest.importorskip("av")
    film = examples.film(seconds=2.0, rate=12)
    moving = dataclasses.replace(PATCHER, frames=2)
    assembler = Assembler(dataclasses.replace(BUILDER, patcher=moving), film_patches=12, film_frames=8)
    part = {"type": "video", "video": film}
    (document,) = assembler.documents(record("see: ", part, picture("red")))
    shown = list(video.frame_groups(film, functools.partial(video.sampled, most=8)))
    assert len(shown) == 4 and len(document.images) == 5
    frames = "".join(
        f"<|begin_of_image|><|end_of_image|>{at:.1f} seconds" for at, *_ in shown
    )
    assert spelled(document).replace("<|image|>", "") == (
        f"[gMASK]<sop>see: <|begin_of_video|>{frames}<|end_of_video|><|begin_of_image|><|end_of_image|><|endoftext|>")
    assert spelled(document, learnt=True) == "see: <|endoftext|>"
    levels = []
    for (_, pair), (patches, yx) in zip(shown, document.images):
        assert len(patches) <= 12 and patches.shape[1] == 3 * 2 * 64
        for frame, patch in zip(pair, naflex.apart(patches, 8)):
            pixels = naflex.unpatchify(patch, yx, 8)
            np.testing.assert_array_equal(pixels, np.asarray(dataclasses.replace(moving, max_patches=12).resize(frame)))
            levels.append(float(pixels.mean()))
    assert levels == sorted(levels) and levels[0] < 60 and levels[-1] > 150  # it becomes lighter
    still = naflex.apart(document.images[-1][0], 8)
    np.testing.assert_array_equal(*still)
    with pytest.raises(UserError, match="set data.video=True"):
        ASSEMBLER.documents(record(part))
    with pytest.raises(UserError, match="film is broken or cut short"):
        assembler.documents(record({"type": "video", "video": film[: len(film) // 2]}))


def test_positions_of_a_film_are_those_of_glm_ocr():
    """Its `get_rope_index` for a document with a film of three pairs of frames and a picture."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.glm_ocr.modeling_glm_ocr")
    from transformers.models.glm_ocr.configuration_glm_ocr import GlmOcrConfig

    model = modeling.GlmOcrModel.__new__(modeling.GlmOcrModel)  # get_rope_index reads the config only
    torch.nn.Module.__init__(model)
    model.config = GlmOcrConfig(vision_config={"spatial_merge_size": 2})
    writer = Writer(TOKENIZER)
    writer.special("[gMASK]", "<sop>")
    conversation.write_film(writer, TOKENIZER, [(at, 6) for at in (0.0, 0.5, 1.0)])
    writer.ids(TOKENIZER.encode("and "))
    writer.image(2)
    rendered = writer.done()
    kind = np.select([rendered.image_of_token >= 3, rendered.image_of_token >= 0], [1, 2], 0)[None]
    expected, _ = model.get_rope_index(
        torch.tensor(rendered.tokens[None].astype(np.int64)), torch.tensor(kind), torch.tensor([[1, 2, 4]]),
        torch.tensor([[3, 4, 6]]),
    )  # fmt: skip
    positions, _ = packing.rope_positions(rendered.image_of_token, [(2, 3)] * 3 + [(1, 2)])
    np.testing.assert_array_equal(positions, expected[:, 0].T.numpy())


@pytest.mark.parametrize("name", ["glm46v", "glm4v"])
@pytest.mark.parametrize("frames, rate", [(24, 12.0), (15, 30.0), (300, 25.0), (901, 30.0), (1500, 10.0), (9000, 24.0),
                                          (7, 1.0), (100_000, 25.0), (90, 29.97), (400, 1.0)])  # fmt: skip
def test_frames_are_those_of_glm(name, frames, rate):
    about = types.SimpleNamespace(total_num_frames=frames, fps=rate, duration=frames / rate)
    processor = types.SimpleNamespace(temporal_patch_size=2, fps=2, max_duration=300)
    theirs = video_oracle.functions(name)["sample_frames"](processor, about)
    ours = {"glm46v": video.sampled, "glm4v": video.sampled_at}[name]
    assert ours(frames, rate, frames / rate) == theirs.tolist()


@pytest.mark.parametrize("group", [1, 4])
def test_frames_come_in_whole_groups(group):
    """A tower of so many frames a patch: its films, and its stills beside them."""
    pytest.importorskip("av")
    sample = functools.partial(video.sampled, most=5 * group, group=group)
    shown = list(video.frame_groups(examples.film(seconds=3.0), sample, group))
    assert 4 <= len(shown) <= 5 and all(len(frames) == group for _, frames in shown)
    patcher = dataclasses.replace(PATCHER, temporal=group, frames=group, max_patches=8)
    still, _ = dataclasses.replace(patcher, frames=1)(shown[0][1][0])
    for frames in (shown[0][1], [shown[0][1][0]] * group):
        patches, _ = patcher.moving(frames)
        seen = np.asarray(cogvit.normalised(jnp.asarray(patches), 3, group, 8)).reshape(len(patches), 3, group, -1)
        for t, frame in enumerate(frames):
            alone = cogvit.normalised(jnp.asarray(patcher_of_one(patcher)(frame)[0]), 3, 1, 8)
            np.testing.assert_array_equal(seen[:, :, t].reshape(len(patches), -1), alone)
    np.testing.assert_array_equal(cogvit.normalised(jnp.asarray(still), 3, group, 8), seen.reshape(len(patches), -1))
    with pytest.raises(UserError, match="make them with its patch size"):
        cogvit.normalised(jnp.asarray(still), 3, group, 7)


def patcher_of_one(patcher: Patcher) -> Patcher:
    return dataclasses.replace(patcher, temporal=1, frames=1)


def test_a_tower_reads_films_as_the_public_processors_give_them():
    """uint8 patches of two frames, normalised by us, against the float form (C, frame, y, x) worked out by hand."""
    rng = np.random.default_rng(0)
    frames = [examples.Image.fromarray(rng.integers(0, 256, (16, 32, 3), np.uint8)) for _ in range(2)]
    patches, yx = Patcher(patch=8, max_patches=8, policy="smart", frames=2).moving(frames)
    mean, std = (np.array(v, np.float64)[:, None, None] for v in (cogvit.CLIP_MEAN, cogvit.CLIP_STD))
    shown = cogvit.normalised(jnp.asarray(patches), 3, 2, 8)
    for vector, (y, x) in zip(np.asarray(shown), yx):
        for t, frame in enumerate(frames):
            pixels = np.asarray(frame)[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].transpose(2, 0, 1) / 255
            np.testing.assert_allclose(vector.reshape(3, 2, 8, 8)[:, t], (pixels - mean) / std, atol=1e-5)
    one, _ = Patcher(patch=8, max_patches=8, policy="smart")(frames[0])
    twice, _ = Patcher(patch=8, max_patches=8, policy="smart", frames=2)(frames[0])
    np.testing.assert_array_equal(*(cogvit.normalised(jnp.asarray(p), 3, 2, 8) for p in (one, twice)))


# --------------------------------------------------------------------------------------------------- long documents


def long_record(**fields) -> schema.Record:
    words = " ".join(str(n) for n in range(60))
    return record(words, picture("red"), words, picture("blue"), picture("green"), "end", **fields)


@pytest.mark.parametrize("targets", [None, 40])
def test_a_split_document_is_all_there_in_order(targets):
    assembler = small(90, 64, targets)
    (whole,) = ASSEMBLER.documents(long_record())
    parts = assembler.documents(long_record())
    assert [part.trimmed for part in parts] == ["split"] + [""] * (len(parts) - 1) and len(parts) > 3
    assert [part.id for part in parts] == [f"r#{n}" for n in range(len(parts))]
    assert all(not assembler.builder.too_long(part) for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.tokens[2:] for part in parts]), whole.tokens[2:])
    np.testing.assert_array_equal(np.concatenate([part.loss_weight[2:] for part in parts]), whole.loss_weight[2:])
    images = [image for part in parts for image, _ in part.images]
    np.testing.assert_array_equal(np.concatenate(images), np.concatenate([image for image, _ in whole.images]))
    for part in parts:
        assert spelled(part).startswith("[gMASK]<sop>")
        assert spelled(part).count("<|begin_of_image|>") == spelled(part).count("<|end_of_image|>") == len(part.images)
        for number, (patches, _) in enumerate(part.images):
            assert (part.image_of_token == number).sum() * 4 == len(patches)
    filled = [len(part.tokens) for part in parts[:-1]]
    assert targets or max(filled) == 90  # as long as a row allows


def test_cuts_are_those_of_a_walk_from_token_to_token():
    rng = np.random.default_rng(0)
    for _ in range(60):
        tokens, patches, targets = (int(n) for n in rng.integers((12, 8, 3), (40, 30, 20)))
        of, images, units = [-1, -1], [], []  # a unit: tokens, patches, learnt tokens
        for _ in range(int(rng.integers(1, 30))):
            if rng.random() < 0.4:
                merged = int(rng.integers(1, 3))
                units.append((merged + 2, 4 * merged, 0))
                of += [-1, *[len(images)] * merged, -1]
                images.append((np.zeros((4 * merged, 3), np.uint8), None))
            else:
                units.append((1, 0, int(rng.random() < 0.6)))
                of.append(-1)
        weights = [0.0, 0.0] + [float(learnt) for n, _, learnt in units for _ in range(n)]
        rendered = Rendered(np.zeros(len(of), np.int32), np.array(weights), np.array(of, np.int32))
        expected, start, at, used = [], 2, 2, np.zeros(3, int)
        for unit in map(np.array, units):
            if (used + unit > (tokens - 2, patches, targets)).any():
                expected.append((start, at))
                start, used = at, np.zeros(3, int)
            used, at = used + unit, at + int(unit[0])
        assert list(small(tokens, patches, targets)._cuts(rendered, images)) == [*expected, (start, at)]


def test_long_documents_may_be_cut_or_dropped(tmp_path):
    parts = small(90, 64).documents(long_record())
    (cut,) = small(90, 64, long="cut").documents(long_record())
    np.testing.assert_array_equal(cut.tokens, parts[0].tokens)
    assert cut.trimmed == "cut"
    assert small(90, 64, long="drop").documents(long_record()) == []
    with pytest.raises(UserError, match="an image of 48 patches and 14 tokens does not fit a row"):
        small(90, 32).documents(long_record())


def test_a_conversation_is_cut_after_a_whole_answer():
    turns = []
    for n in range(6):
        turns += [{"role": "user", "content": [picture("red"), {"type": "text", "text": f"q{n}"}]},
                  {"role": "assistant", "content": f"answer {n}"}]  # fmt: skip
    conversation = schema.parse({"messages": turns}, "c", lambda name: b"")
    (whole,) = ASSEMBLER.documents(conversation)
    assert whole.trimmed == "" and len(whole.images) == 6
    assembler = small(len(whole.tokens) - 1)
    (cut,) = assembler.documents(conversation)
    assert cut.trimmed == "cut" and len(cut.images) == 5
    assert spelled(cut).endswith("answer 4<|endoftext|>") and "q5" not in spelled(cut)
    assert small(len(whole.tokens) - 1, long="drop").documents(conversation) == []
    assert small(12).documents(conversation) == []  # not even its first answer fits
    (fits,) = small(len(whole.tokens)).documents(
        schema.parse({"messages": [*turns, {"role": "user", "content": "unanswered " * 50}]}, "c", lambda name: b""))
    np.testing.assert_array_equal(fits.tokens, whole.tokens)


def test_each_turn_may_be_a_last_one():
    """Every answer is learnt once, after its own thinking and no other's; pictures go with the turns that show them."""
    turns = []
    for n in range(3):
        turns += [{"role": "user", "content": [picture("red"), {"type": "text", "text": f"q{n}"}]},
                  {"role": "assistant", "reasoning_content": f"t{n}", "content": f"a{n}"}]  # fmt: skip
    record = schema.parse({"messages": turns}, "c", lambda name: b"")
    documents = dataclasses.replace(ASSEMBLER, thinking="each").documents(record)
    assert [d.id for d in documents] == ["c@0", "c@1", "c@2"] and [len(d.images) for d in documents] == [1, 2, 3]
    for n, document in enumerate(documents):
        assert spelled(document, learnt=True) == f"t{n}</think>a{n}<|endoftext|>"
        earlier = "".join(f"<|assistant|></think>a{k}<|user|>" for k in range(n))
        spoken = re.sub(r"<\|begin_of_image\|>.*?q\d", "", spelled(document))
        assert spoken == f"[gMASK]<sop><|user|>{earlier}<|assistant|><think>t{n}</think>a{n}<|endoftext|>"
    plain = schema.parse({"messages": [{k: v for k, v in m.items() if k != "reasoning_content"} for m in turns]}, "c",
                         lambda name: b"")  # fmt: skip
    each = small(len(documents[1].tokens), thinking="each").documents(record)
    # Of a third without its answer nothing would be learnt, and that is counted.
    assert [(d.id, d.trimmed) for d in each] == [("c@0", "cut"), ("c@1", "")]
    (whole,) = dataclasses.replace(ASSEMBLER, thinking="each").documents(plain)
    np.testing.assert_array_equal(whole.tokens, ASSEMBLER.documents(plain)[0].tokens)


# --------------------------------------------------------------------------------------------------- through the model


def test_packed_documents_see_what_they_see_alone():
    """Interleaved documents of several pictures in one row, against each in a row of its own: logits of every token."""
    assembler = Assembler(DocumentBuilder(TOKENIZER, Patcher(patch=8, max_patches=16), 64, 128))
    rng = np.random.default_rng(0)
    noise = lambda: {"type": "image", "image": examples.png(  # noqa: E731
        examples.Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)))}
    made = [record("a ", noise(), "b ", noise(), "c"), record("only words"), record(noise(), "猫", noise())]
    documents = [dataclasses.replace(d, source="x") for r in made for d in assembler.documents(r)]
    cfg = tiny_vlm.config(vocab=TOKENIZER.vocab_size, patch=8)
    tree = tiny_vlm.params(cfg)
    channels = assembler.builder.patcher.channels
    logits = lambda docs: tiny_vlm.batch_logits(  # noqa: E731
        cfg, tree, packing.stack([packing.pack(docs, 96, 128, channels, ["x"])]))[0]
    together, at = logits(documents), 0
    for document in documents:
        n = len(document.tokens)
        np.testing.assert_allclose(together[at : at + n], logits([document])[:n], atol=2e-4)
        at += n
    assert np.abs(together).max() > 1  # they say something


# ------------------------------------------------------------------------------------------------------------ mixtures


def sources(folder, **more) -> dict[str, local.Source]:
    """Two files, one with documents of which one in three is long, one with broken lines."""
    folder.mkdir(exist_ok=True)
    red = examples.png(examples.Image.new("RGB", (48, 32), "red"))
    (folder / "red.png").write_bytes(red)
    a = [{"segments": [{"type": "text", "text": f"a{n} " * (60 if n % 3 == 0 else 6)},
                       {"type": "image", "image": "red.png"}], "id": f"a/{n}"} for n in range(30)]  # fmt: skip
    b = [{"text": f"b{n} " * 9, "id": f"b/{n}"} for n in range(50)]
    examples.jsonl(folder / "a.jsonl", a)
    examples.jsonl(folder / "b.jsonl", [*b[:20], "{broken", *b[20:]])
    entry = {"a": {"weight": 1.0}, "b": {"weight": 3.0}}
    return {n: local.Source.of(n, {"path": str(folder / f"{n}.jsonl"), **entry[n], **more}) for n in entry}


def batches(folder, *, generators=(), log: str | None = None, workers=0, **options):
    questions = {name: Questions((name,), "train", 0) for name in generators}
    return pipeline.batches(
        sources(folder), questions, dict.fromkeys(questions, 1.0), small(96, 128), form="pretrain", batch=3,
        reading=Reading(ahead=0, faults=log, workers=workers), **options
    )  # fmt: skip


def names(batch) -> list[str]:
    """Which record each document of a batch is of, by what it says; not of parts that say nothing."""
    rows = zip(batch["tokens"], batch["segments"])
    said = (TOKENIZER.decode(t[s == n]) for t, s in rows for n in range(1, s.max() + 1))
    found = (collections.Counter(re.findall(r"[ab]\d+", text)).most_common(1) for text in said)
    return [each[0][0] for each in found if each]


PACKINGS = [pipeline.Packing("first", 0), pipeline.Packing("first", 5), pipeline.Packing("best", 5)]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_batches_resume_exactly_in_the_middle_of_an_epoch(tmp_path, packing):
    make = lambda: batches(tmp_path / "data", generators=("count",), log=str(tmp_path / "log"), packing=packing)  # noqa: E731
    data = make()
    seen, states = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(data.get_state())))
        seen.append(next(data))
    assert any("held" in state for state in states) == bool(packing.ahead)
    for k in (0, 1, 3, 5, 8):
        again = make()
        next(again)  # a used iterator forgets what it holds
        again.set_state(states[k])
        for batch in seen[k : k + 4]:
            np.testing.assert_equal(next(again), batch)


def test_parts_of_a_record_resume_in_their_middle():
    make = lambda: iter(pipeline.Parts(Stream([["a", "b", "c"], "d", ["e"], ["f", "g"]])))  # noqa: E731
    data, states = make(), []
    for _ in range(7):
        states.append(json.loads(json.dumps(data.get_state())))
        next(data)
    for k, state in enumerate(states):
        again = make()
        next(again)
        again.set_state(state)
        assert list(again) == list("abcdefg")[k:]


def test_workers_change_nothing(tmp_path):
    alone = batches(tmp_path / "data", log=str(tmp_path / "log"))
    working = batches(tmp_path / "data", log=str(tmp_path / "log"), workers=1)
    for _ in range(3):
        np.testing.assert_equal(next(working), next(alone))
    working.close()


def test_each_record_comes_once_an_epoch_in_the_proportion_asked_for(tmp_path):
    log = FaultLog(tmp_path / "log")
    data = batches(tmp_path / "data", log=str(log.path))
    counts, split = collections.Counter(), 0
    for _ in range(30):
        batch = next(data)
        split += batch["split"].sum()
        assert batch["cut"].sum() == 0
        counts.update(names(batch))
        assert set(batch["source"][batch["segments"] > 0].tolist()) <= {0, 1}
    a = {name: n for name, n in counts.items() if name.startswith("a")}
    b = {name: n for name, n in counts.items() if name.startswith("b")}
    assert len(b) == 50 and max(b.values()) - min(b.values()) <= 2
    firsts = sum(a.values()) - sum(n for name, n in a.items() if int(name[1:]) % 3 == 0) + split
    assert sum(b.values()) / firsts == pytest.approx(3, abs=0.25)
    assert split and log.counts() == {"b": log.counts()["b"]} and log.counts()["b"] >= 1


def test_shares_are_by_weight_and_size(tmp_path):
    files = sources(tmp_path / "data")
    sizes = {"a": 100, "b": 10_000}
    assert pipeline.shares(files, sizes, {}, 0.0) == {"a": 0.25, "b": 0.75}
    assert pipeline.shares(files, sizes, {"count": 4.0}, 0.0) == {"count": 0.5, "a": 0.125, "b": 0.375}
    rooted = pipeline.shares(files, sizes, {}, 0.5)
    assert rooted["b"] / rooted["a"] == pytest.approx(30)
    with pytest.raises(UserError, match="data.power=0.5 counts the records of files, and count is a generator"):
        pipeline.shares(files, sizes, {"count": 1.0}, 0.5)


def test_held_out_records_are_never_trained_on(tmp_path):
    files, share = sources(tmp_path / "data"), 0.2
    data = batches(tmp_path / "data", log=str(tmp_path / "log"), heldout=share)
    trained = {name for _ in range(30) for name in names(next(data))}
    for name, source in files.items():
        held = pipeline.heldout_documents(name, source, small(96, 128), share, 100, FaultLog(tmp_path / "log2"))
        batch = packing.stack([packing.pack(held, 10**4, 10**4, 192, [name])])
        assert names(batch) and not set(names(batch)) & trained and {d.source for d in held} == {name}
    with pytest.raises(UserError, match="no document is held out at data.heldout=0.0 of 30 records"):
        pipeline.heldout_documents("a", files["a"], small(96, 128), 0.0, 5, FaultLog())


def test_a_share_that_holds_nothing_out_names_one_that_does(tmp_path):
    source, log = sources(tmp_path / "data")["a"], FaultLog()
    with pytest.raises(UserError, match=r"heldout=0 trains on all and reports on none") as caught:
        pipeline.heldout_documents("a", source, small(96, 128), 1e-9, 5, log)
    enough = float(re.search(r"data.heldout=(\S+) holds out one", str(caught.value))[1])
    assert pipeline.heldout_documents("a", source, small(96, 128), enough, 5, log)
    with pytest.raises(UserError, match="no document is held out"):
        pipeline.heldout_documents("a", source, small(96, 128), enough - 0.01, 5, log)


def test_dropped_documents_are_named(tmp_path):
    files = sources(tmp_path / "data", long="drop")
    log = FaultLog(tmp_path / "log")
    data = pipeline.batches(files, {}, {}, small(96, 128), form="pretrain", batch=3,
                            reading=Reading(ahead=0, faults=log.path))  # fmt: skip
    seen = {name for _ in range(20) for name in names(next(data))}
    assert not any(name.startswith("a") and int(name[1:]) % 3 == 0 for name in seen) and len(seen) > 60
    named = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert {f["id"] for f in named if f["source"] == "a"} == {f"a.jsonl:{n + 1}" for n in range(0, 30, 3)}


def test_holding_documents_back_fills_rows():
    """Lognormal lengths, as of documents, with an image each: the share of the scarcer budget that is filled."""
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(4.5, 0.9, (1500, 2)), 8, 380).astype(int) // 8 * 8
    made = []
    for n, (text, patches) in enumerate(sizes.tolist()):
        of = np.r_[np.zeros(patches // 4, np.int32), np.full(text, -1, np.int32)].astype(np.int32)
        image = np.zeros((patches, 3), np.uint8), naflex.grid_coordinates(2, patches // 2)
        ones = np.ones(len(of), np.int32)
        made.append(packing.Document(ones, ones.astype(np.float32), of, (image,), "x", str(n)))

    def filled(fit: str, ahead: int) -> float:
        data = packing.PackIterDataset(Stream(made), tokens=512, patches=512, channels=3, rows=8, names=["x"],
                                       log=FaultLog(), fit=fit, ahead=ahead)  # fmt: skip
        return float(np.mean([max(packing.efficiency(batch).values()) for batch in data][:-3]))

    found = {(fit, ahead): filled(fit, ahead) for fit in ("first", "best") for ahead in (0, 16)}
    assert found["best", 16] > found["first", 0] + 0.05 and found["best", 16] > 0.9, found
    assert found["best", 16] > found["first", 16], found

"""Stages 3 and 4 on a person's own files: batches, losses by source, held-out numbers; and without files as before.

Not covered: whether they learn.
"""

from __future__ import annotations

import hashlib
import types

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.data import packing
from glmv_jax.train import main
from glmv_jax.typing import UserError
from tests.data.local import examples
from tests.random_params import switched_on


@pytest.fixture(autouse=True)
def no_cache_of_ours(monkeypatch, tmp_path):
    monkeypatch.setattr("glmv_jax.data.cache.FOLDER", str(tmp_path / "cache"))


def build(name: str, arg: str, *more: str):
    cfg = config.load(f"experiments/vlm_{name}.py:size=nano{arg}")
    small = ["model.vision.depth=1", "model.decoder.depth=1", "batch=2"]
    return main.stage_class(name)(config.override(cfg, [*small, *more]))


@pytest.mark.parametrize("name, expected, state", [
    ("pretrain", ["ca09fc9b8572e51b", "955a7fa5b06d528a", "eb1e8794fd10f262"], {"next_index": 142}),
    ("sft", ["28ab24016eb6f904", "14ddb232acc9e54c", "7b5e2e69027d7a56"], {"next_index": 120}),
])  # fmt: skip
def test_without_files_batches_are_what_they_were(name, expected, state):
    """Digests written before these stages could read files: every array of the first batches, to the last bit."""
    data = main.stage_class(name)(config.load(f"experiments/vlm_{name}.py:size=nano")).train_data()

    def digest(batch):
        seen = hashlib.sha256()
        for key in sorted(batch):
            about = key.encode() + str(batch[key].dtype).encode() + str(batch[key].shape).encode()
            seen.update(about + batch[key].tobytes())
        return seen.hexdigest()[:16]

    assert [digest(next(data)) for _ in expected] == expected
    assert data.get_state() == state
    data.close()


def written(tmp_path) -> list[str]:
    """Overrides for a source of documents and one of conversations, twelve records each."""
    records = examples.records(tmp_path)
    records.pop("video", None)
    documents = [r for r in records.values() if "segments" in r]
    chats = [r for r in records.values() if "messages" in r]
    for kind, some in (("docs", documents), ("chats", chats)):
        lines = [{**r, "id": f"{r['id']}/{n}"} for n in range(6) for r in some]
        examples.jsonl(tmp_path / f"{kind}.jsonl", lines)
    paths = [f"data.sources.{kind}.path={tmp_path / kind}.jsonl" for kind in ("docs", "chats")]
    return [*paths, "data.heldout=0.3", "data.tokens=512", "data.patches=256", "data.targets=256", "data.fit=best",
            "eval.documents=4", f"faults={tmp_path / 'faults.jsonl'}"]  # fmt: skip


def test_balanced_rows_in_slices_have_the_same_loss(tmp_path):
    """`data.fit=balanced` in a stage; and its rows cut for four ranks of a context group are the same to the model."""
    more = ("data.sources.docs.weight=20", "data.fit=balanced", "data.ahead=4")
    found = {}
    for slices in (1, 4):
        stage = build("sft", ",sources=docs+chats", *written(tmp_path), *more, f"data.slices={slices}")
        data = stage.train_data()
        next(data)
        state = data.get_state()
        batch = next(data)
        data.set_state(state)
        np.testing.assert_equal(next(data), batch)
        data.close()
        found[slices] = {name: x for name, x in batch.items() if name not in packing.TRIMMED}
    np.testing.assert_array_equal(found[1]["tokens"], found[4]["tokens"])
    assert (found[1]["frame"] != found[4]["frame"]).any() and found[1]["frame"].max() > 1
    params, loss = switched_on(stage.init_params(jax.random.key(0))), jax.jit(stage.loss)
    losses = [float(loss(params, {}, {}, batch, jax.random.key(0))[0]) for batch in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(UserError, match="256 patches does not come in 3 slices .* try data.patches=264"):
        build("sft", ",sources=docs+chats", *written(tmp_path), "data.slices=3").train_data()


def test_stage_3_learns_from_files_and_generators_in_one_mixture(tmp_path):
    more = ("data.sources.docs.weight=20", "data.tokens=160", "data.video=True")
    stage = build("pretrain", ",sources=docs+chats", *written(tmp_path), *more)
    assert stage.names[-2:] == ["chats", "docs"] and "caption" in stage.names
    data = stage.train_data()
    next(data), next(data)  # before the mixture comes to the files
    state = data.get_state()
    params = switched_on(stage.init_params(jax.random.key(0)))
    batch, about = stage.next_batch(data, types.SimpleNamespace(params=params, step=0))
    assert batch["patches"].shape == (2, 256, 3 * 2 * 64) and set(about) == {
        "documents/split", "documents/cut", "filled/tokens", "filled/patches"}
    assert "split" not in batch and 0 < about["filled/tokens"] <= 1
    _, (metrics, _) = jax.jit(stage.loss)(params, {}, {}, batch, jax.random.key(0))
    assert np.isfinite(metrics["ce/docs"]) and metrics["ce/docs"] > 1
    counts = np.bincount(batch["source"][batch["source"] >= 0], minlength=len(stage.names))
    assert counts[stage.names.index("docs")] == counts.max()
    data.set_state(state)
    again, _ = stage.next_batch(data, types.SimpleNamespace(params=params, step=0))
    np.testing.assert_equal(again, batch)
    split = [stage.next_batch(data, types.SimpleNamespace(params=params))[1]["documents/split"] for _ in range(8)]
    assert 0 < sum(split) < 16  # the licence
    data.close()
    held = stage.heldout_loss(params)
    for source in ("docs", "chats"):
        alone, blind = held[f"heldout loss/{source}"], held[f"heldout loss/{source} without image"]
        assert 1 < alone < 20 and alone != blind
    assert "heldout loss" in held


def test_stage_4_on_files_alone(tmp_path):
    stage = build("sft", ",sources=chats,corpus=false", *[o for o in written(tmp_path) if "docs" not in o])
    assert stage.names == ["chats"]
    data = stage.train_data()
    seen = [next(data) for _ in range(4)]
    text = "".join(stage.tokenizer.decode(b["tokens"][b["loss_weight"] > 0], keep_special=True) for b in seen)
    assert "<tool_call>click<arg_key>x</arg_key>" in text and "<tool_call>add" in text and "42.<|endoftext|>" in text
    data.close()
    params = stage.init_params(jax.random.key(0))
    assert set(stage.evaluate(params, {}, full=True)) == {"heldout loss/chats", "heldout loss/chats without image"}
    assert stage.notes() == {}


def test_wrong_configs_are_user_errors(tmp_path):
    paths = written(tmp_path)
    with pytest.raises(UserError, match="data.sources.own.path is empty"):
        build("pretrain", ",sources=own")
    with pytest.raises(UserError, match="no jsonl file here"):
        build("pretrain", ",sources=own", f"data.sources.own.path={tmp_path}/none.jsonl")
    with pytest.raises(UserError, match="data.sources.caption has the name of a generator"):
        build("pretrain", ",sources=caption", f"data.sources.caption.path={tmp_path}/docs.jsonl")
    with pytest.raises(UserError, match="neither data.sources nor data.weights"):
        build("sft", ",corpus=false")
    with pytest.raises(UserError, match="data.thinking='some' is not known"):
        next(build("sft", ",sources=docs+chats", *paths, "data.thinking=some").train_data())
    with pytest.raises(UserError, match="data.fit='worst' is not known"):
        build("sft", ",sources=docs+chats", *paths, "data.fit=worst").train_data()


def test_pictures_may_keep_their_size(tmp_path):
    filled, kept = (build("sft", ",sources=docs+chats", *written(tmp_path), f"data.sizing={sizing}")
                    for sizing in ("naflex", "smart"))  # fmt: skip
    for builder in (kept.builder, kept.asker):
        assert builder.patcher.size(32, 48) == (32, 48)
    assert filled.builder.patcher.size(32, 48) > (32, 48)
    with pytest.raises(UserError, match="unknown image sizing policy 'large'"):
        build("sft", "", "data.sizing=large")


def test_windows_are_one_more_source():
    """Records about drawn windows beside the generators: their names, their share, their held-out loss."""
    stage = build("sft", "", "data.gui.ground=4", "data.gui.trajectory=4", "data.tokens=700", "data.patches=512",
                  "data.targets=400", "eval.kinds=()", "eval.documents=2")  # fmt: skip
    assert stage.names[-2:] == ["gui_ground", "gui_trajectory"]
    data = stage.train_data()
    seen = [next(data) for _ in range(3)]
    data.close()
    found = {stage.names[n] for batch in seen for n in set(batch["source"][batch["source"] >= 0].tolist())}
    assert {"gui_ground", "gui_trajectory", "read"} <= found
    held = stage.evaluate(stage.init_params(jax.random.key(0)), {}, full=False)
    assert {f"heldout loss/gui_{kind}" for kind in ("ground", "trajectory")} <= set(held)
    with pytest.raises(UserError, match="no key 'data.gui.look'"):
        build("sft", "", "data.gui.look=1")

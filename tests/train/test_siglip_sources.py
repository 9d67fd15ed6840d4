"""Stage 2 on pairs from disk, from the config to batches, held-out numbers and samples. Not covered: learning."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.train import main
from glmv_jax.train.stages import siglip
from glmv_jax.typing import UserError
from tests.data.pairs import made

SMALL = ["model.vision.depth=1", "model.text.depth=1", "batch=12", "data.heldout=0.3", "eval.pairs=9"]


@pytest.fixture(autouse=True)
def no_cache_of_ours(monkeypatch, tmp_path):
    monkeypatch.setattr("glmv_jax.data.cache.FOLDER", str(tmp_path / "cache"))


@pytest.fixture
def paths(tmp_path):
    english = made.texts_tar(tmp_path / "en.tar", [f"picture number {i}" for i in range(60)])
    images = [made.jpeg(i, (30 + i, 40), "PNG") for i in range(60)]
    chinese = made.parquet(tmp_path / "zh.parquet", {"image": images, "text": [f"第{i}张" for i in range(60)]})
    return [f"data.sources.web.path={english}", f"data.sources.zh.path={chinese}", "data.sources.zh.lang=zh"]


def build(*overrides, arg="size=nano,sources=web+zh"):
    cfg = config.load(f"experiments/cogvit_siglip.py:{arg}")
    return main.stage_class("siglip")(config.override(cfg, [*SMALL, *overrides]))


def test_batches_are_those_that_are_compiled_for(paths):
    stage = build(*paths, "data.chinese=0.25")
    (shapes,) = stage.batch_shapes()
    data = stage.train_data()
    for _ in range(3):
        batch = next(data)
        of = lambda arrays: {k: (v.shape, v.dtype) for k, v in arrays.items() if k not in stage.host_only}  # noqa: E731
        assert of(batch) == of(shapes)
        assert batch["lang"].sum() == 3
        found = {name: row["samples"] for name, row in stage.counts_by_source(batch).items()}
        assert found == {"web": stage.cfg.batch - 3, "zh": 3}, "Chinese rows are those of the Chinese source"
    again = main.stage_class("siglip")(config.unflat(json.loads(json.dumps(config.flat(stage.cfg)))))
    np.testing.assert_equal(next(again.train_data()), next(build(*paths, "data.chinese=0.25").train_data()))


def test_held_out_pairs_of_the_sources_are_evaluated(paths, tmp_path, monkeypatch):
    stage = build(*paths)
    params = stage.init_params(jax.random.key(0))
    metrics = stage.evaluate(params, {}, full=False)
    assert {name.rpartition(" ")[0] for name in metrics} == {
        "en name -> image", "image -> en name", "zh name -> image", "image -> zh name"}
    assert set(stage.notes()) == {"knn", *metrics}
    english, chinese = stage.heldout_sets
    assert len(english.ids) == len(chinese.ids) <= 9 and english.names["en"][0].startswith("picture number")
    at_once = [images for _, images, _ in stage._embed(params)]
    monkeypatch.setattr(siglip, "EVAL_ROWS", 4)
    for expected, (held, images, texts) in zip(at_once, stage._embed(params), strict=True):
        np.testing.assert_allclose(images, expected, atol=1e-5)
        assert len(held.ids) == len(images) == len(next(iter(texts.values())))
    stage.write_samples(params, {}, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["lang"] for line in lines} == {"en", "zh"}
    assert all((tmp_path / name).exists() for line in lines for name in line["images"])


def test_the_shipped_corpus_is_read_where_no_source_is_named():
    stage = build(arg="size=nano")
    assert not stage.sources and len(stage.heldout_sets) == 1 and len(stage.heldout_sets[0].ids) == 180
    assert next(stage.train_data())["lang"].shape == (12, 2)


@pytest.mark.parametrize("overrides, error", [
    ((), r"data\.sources\.web\.path is empty"),
    (("data.basics=0.1",), r"with data\.sources set data\.basics=0"),
    (("data.sources.web.path=absent.tar",), "absent.tar: no tar file here"),
    (("data.heldout=0.0",), r"held out at data\.heldout=0\.0; raise it"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(overrides, error, paths):
    use = [] if not overrides else paths
    with pytest.raises(UserError, match=error) as caught:
        build(*use, *overrides).notes()
    assert "\n" not in str(caught.value)

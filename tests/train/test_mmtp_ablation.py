"""The ablation of MMTP: its sizes, what its arms share, and that the 0.5B one lowers and shards; nothing is allocated.

Lowered for eight emulated CPU devices. Not covered: TPU compilers, and whether a chip's memory is enough.
"""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.train import loop, main
from glmv_jax.train.step import make_train_step

needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")
FILE = "experiments/mmtp_ablation.py"
OPTIONS = ("embeddings", "masked", "image_token")


def stage(arg, *overrides):
    return main.stage_class("pretrain")(config.override(config.load(f"{FILE}:{arg}"), overrides))


def shapes(stage, rows):
    d, channels = stage.cfg.data, 3 * stage.model.vision.patch**2
    T, P = (rows, d.tokens), (rows, d.patches)
    table = {"tokens": (T, "i4"), "positions": ((*T, 3), "i4"), "segments": (T, "i4"), "image_row": (T, "i4"),
             "loss_weight": (T, "f4"), "source": (T, "i4"), "patches": ((*P, channels), "u1"), "yx": ((*P, 2), "i4"),
             "frame": (P, "i4")}  # fmt: skip
    return {name: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for name, (shape, dtype) in table.items()}


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def test_the_half_billion_is_the_decoder_with_both_of_its_tables():
    made = stage("size=0p5b")
    params = jax.eval_shape(made.init_params, jax.random.key(0))
    table = 59_392 * 1024
    assert count(params["decoder"]) == 499_221_504 == count(params["decoder"]["blocks"]) + 2 * table + 1024
    assert count(params["mtp"]) < 20e6 and count(params["vision"]) == 404_231_168
    assert made.cfg.eval_every and made.cfg.mesh.fsdp == -1 and made.cfg.mesh.data == 1


@needs_8
@pytest.mark.parametrize("option", OPTIONS)
def test_half_a_billion_lowers_and_is_an_eighth_on_each_of_eight(option):
    made = stage(f"size=0p5b,option={option}")
    placement, optimizer, trainable = loop.prepare(made)
    for name in ("decoder", "vision", "mtp"):
        params = jax.tree.leaves(placement.abstract.params[name])
        here = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in params)
        assert 0.125 <= here / count(params) < 0.13
    step = make_train_step(made, optimizer, placement, trainable=trainable)
    batch = placement.batch_shapes(shapes(made, made.cfg.batch))
    assert batch["patches"].sharding.shard_shape(batch["patches"].shape)[0] == made.cfg.batch // 8
    lowered = step._jitted.lower(placement.abstract, {}, batch)
    assert "num_partitions = 8" in lowered.as_text()[:2000]


def test_arms_differ_in_the_option_alone_and_see_the_same():
    flat = [config.flat(config.load(f"{FILE}:size=nano,option={option}")) for option in OPTIONS]
    for arm, option in zip(flat, OPTIONS):
        assert {k: v for k, v in arm.items() if flat[0][k] != v} in ({}, {"model.mtp.option": option})
    assert [arm["model.mtp.option"] for arm in flat] == list(OPTIONS)
    over = config.flat(config.override(config.load(f"{FILE}:size=nano"), ["model.mtp.option=masked"]))
    assert over == flat[1]  # what a sweep sets and what the file's own argument sets
    batches, params = [], []
    for option in OPTIONS:
        made = stage(f"size=nano,option={option}", "batch=2", "model.vision.depth=1", "model.decoder.depth=1")
        data = made.train_data()
        batches.append(next(data))
        data.close()
        params.append(made.init_params(jax.random.key(3)))
    for other in (1, 2):
        jax.tree.map(np.testing.assert_array_equal, batches[0], batches[other])
        jax.tree.map(np.testing.assert_array_equal, params[0], params[other])


def test_the_mixture_is_rich_in_images_and_keeps_text_alone():
    made = stage("size=nano", "batch=16")
    data = made.train_data()
    rows = [next(data) for _ in range(3)]
    data.close()
    documents = with_image = 0
    for batch in rows:
        for segments, image in zip(batch["segments"], batch["image_row"] >= 0):
            every = set(segments[segments > 0].tolist())
            documents += len(every)
            with_image += len(set(segments[image].tolist()))
    visual = sum((b["image_row"] >= 0).sum() for b in rows) / sum((b["segments"] > 0).sum() for b in rows)
    assert visual > 0.3 and 0.9 < with_image / documents < 1.0
    for batch in rows:  # what the head is given last before a learnt token is never an image, at any depth
        assert not ((batch["image_row"] >= 0)[:, :-1] & (batch["loss_weight"] > 0)[:, 1:]).any()

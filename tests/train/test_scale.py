"""The published size: stages 1 and 2 of 403M parameters lower, shard and compile, and nothing is allocated.

Compiled for eight emulated CPU devices. Not covered: TPU compilers and their kernels.
"""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.train import loop, main, teachers
from glmv_jax.train.step import make_train_step

needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")


def compiled(stage, batch):
    """The step for such a batch, from shapes alone."""
    placement, optimizer, trainable = loop.prepare(stage)
    step = make_train_step(stage, optimizer, placement, trainable=trainable)
    constants = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), stage.constants(), placement.constants)
    step.compile(placement.abstract, constants, placement.batch_shapes(batch))
    (program,) = step._compiled.values()
    return program


@needs_8
def test_stage_1_with_two_public_teachers():
    """SigLIP 2 So400m/14 at 224 px and DINOv3 ViT-L/16 at 256 px as shapes; a global batch of 4,096."""
    cfg = config.load("experiments/cogvit_mim.py:size=l")
    stage = main.stage_class("mim")(cfg, make=teachers.abstract)
    assert [t.channels for t in stage.teachers] == [1152, 1024]
    B, P, side = cfg.batch, 256, cfg.data.size
    shapes = {"patches": ((B, P, 3 * stage.model.vision.patch**2), np.uint8), "yx": ((B, P, 2), np.int32),
              "frame": ((B, P), np.int32), "mask": ((B, P), np.bool_), "source": ((B,), np.int32),
              "image": ((B, side, side, 3), np.uint8)}  # fmt: skip
    program = compiled(stage, {name: jax.ShapeDtypeStruct(*s) for name, s in shapes.items()})
    placement = loop.prepare(stage)[0]
    for name, tower in stage.constants().items():
        where = placement.constants[name]
        total = sum(x.size for x in jax.tree.leaves(tower))
        here = sum(math.prod(s.shard_shape(x.shape)) for x, s in zip(jax.tree.leaves(tower), jax.tree.leaves(where)))
        assert total > 3e8 and here < 0.13 * total  # an eighth, and the few that stay whole
    # 512 images a device. The student's residual stream is 6.4 GB; the rest are scores and hidden layers of a block.
    assert program.memory_analysis().temp_size_in_bytes < 50e9


@needs_8
def test_stage_2_with_a_global_batch_of_64k():
    cfg = config.load("experiments/cogvit_siglip.py:size=l")
    assert cfg.batch == 65_536 and cfg.data.lengths == (128, 256, 576, 784, 1024) and cfg.loss.impl == "ring_bidir"
    stage = main.stage_class("siglip")(cfg)
    shapes = list(stage.batch_shapes())[1]
    program = compiled(stage, shapes)
    text = program.as_text()
    # Patches of a device: 8,192 rows of 256; the towers see 64 rows of them at a time.
    rows = cfg.loss.positions // 256
    assert f"[{rows},256,1024]" in text.replace("bf16", "").replace("f32", "") and "collective-permute" in text
    patches = 65_536 // mesh_lib.data_shards(loop.prepare(stage)[0].mesh) * 256 * stage.patcher.channels
    # Beside the pixels (dealt anew into pieces, in and out of the scan) there is room for the parameters and for one
    # piece, whose products take 11 GB; those of all rows would take 1,400.
    assert program.memory_analysis().temp_size_in_bytes < 2 * patches + 32e9

"""The published size: stages 1 and 2 of 403M parameters lower, shard and compile, and nothing is allocated.

Compiled for eight emulated CPU devices. Not covered: TPU compilers and their kernels.
"""

from __future__ import annotations

import jax
import pytest

from glmv_jax import config
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.train import loop, main
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

"""Three axes of a mesh at once, and so their pairs: stages of a pipeline, parts of rows, experts; against one device.
The layers do not divide over the stages, so one of them is skipped.

Each axis alone is in a file of its own, where pairs with fsdp and tensor are too. Not covered: long rows, bfloat16,
several hosts, and of latent attention all three at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax import models
from glmv_jax.models import block, glm4_moe
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import pipeline
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.typing import UserError
from tests.parallel.test_context_models import batch, loss_of, placed
from tests.random_params import random_params

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")


# Without vision and MTP, which compile long and lie outside of the layers.
SIZES = dict(vocab=64, width=32, heads=4, kv_heads=2, head_dim=8, mlp=64)
EXPERTS = models.VLMConfig(None, None, glm4_moe.GLM4MoEConfig(
    **SIZES, depth=3, dense=0, expert_mlp=16, experts=8, chosen=2, rope_split=(1, 0, 1)
))  # fmt: skip
DENSE = models.VLMConfig(None, None, models.DecoderConfig(**SIZES, depth=3, rope_split=(1, 1, 2)))


def rows_of():
    """Eight rows; see `test_context_models.batch`."""
    return jax.tree.map(lambda x: x[np.arange(8) % len(x)], batch(images=False))


def test_stages_with_parts_of_rows_and_with_experts_equal_one_device():
    params, rows = random_params(EXPERTS), rows_of()
    (want, want_aux), want_grads = loss_of(EXPERTS, ())(params, *rows)
    mesh, rules, args = placed(EXPERTS, params, {"stage": 2, "expert": 2, "context": 2}, rows, "expert_context")
    with rules_lib.use(mesh, rules):
        (got, got_aux), got_grads = loss_of(EXPERTS, ())(*args)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got_aux, want_aux)
    largest = max(float(jnp.linalg.norm(g)) for g in jax.tree.leaves(want_grads))

    def close(path, a, b):
        error, norm = float(jnp.linalg.norm(a - b)), float(jnp.linalg.norm(b))
        assert error <= 1e-4 * norm + 1e-7 * largest, (jax.tree_util.keystr(path), error, norm)

    jax.tree_util.tree_map_with_path(close, got_grads, want_grads)


def test_layers_that_do_not_divide_are_stored_by_widths_over_the_stages():
    """Of every matrix a stage keeps its share, and too few layers are named."""
    shapes = models.abstract_params(DENSE)
    mesh = jax.sharding.AbstractMesh((2, 4), ("stage", "fsdp"))
    where = rules_lib.preset("fsdp").shardings(mesh, models.logical_axes(DENSE), shapes)
    blocks, spec = shapes["decoder"]["blocks"], where["decoder"]["blocks"]
    wide = [(x, s) for x, s in zip(jax.tree.leaves(blocks), jax.tree.leaves(spec)) if x.ndim == 3]
    assert len(wide) == 7 and all(np.prod(s.shard_shape(x.shape)) == x.size / 8 for x, s in wide)
    assert pipeline.padding(75, 16) == 5 and pipeline.padding(75, 5, 3) == 0
    mesh = mesh_lib.make_mesh({"stage": 4}, jax.devices()[:4])
    with rules_lib.use(mesh, rules_lib.preset("data")):
        with pytest.raises(UserError, match="3 layers are too few for stage=4"):
            jax.eval_shape(loss_of(DENSE, ()), shapes, *rows_of())


def test_what_layers_say_of_tokens_is_the_mean_over_the_batchs_tokens():
    """Two microbatches of one and of three tokens."""
    said = {"load": jnp.array([1.0, 3.0]), "index_loss": jnp.array([5.0, 1.0]), "balance": jnp.array([1.0, 2.0])}
    got = block._of_batch((said, jnp.array([1.0, 3.0])))
    assert jax.tree.map(float, got) == {"load": 4.0, "index_loss": 2.0, "balance": 1.5}

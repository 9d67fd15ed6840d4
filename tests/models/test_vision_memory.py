"""Policies of the vision side: the gradient of plain encoding, and the memory that a further image costs.

Memory is the compiler's own count, of programs that are not run. Not covered: whether transfers to the host are hidden
behind work, which takes a device that has them.
"""

from __future__ import annotations

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glmv_jax import models
from glmv_jax.models import vlm
from glmv_jax.parallel import remat
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.typing import TokenInput, UserError, VisionInput

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'glmv_jax[tpu]'"
)
POLICIES = {  # of the encoder, of the merger, and patches that pass both at a time
    "offload": (dict(remat="offload", chunk=16), dict(remat="offload", chunk=16), 0),
    "encoder": (dict(remat="offload"), {}, 0),
    "at once": (dict(remat="dots"), dict(remat="full"), 32),
    "all": (dict(remat="offload", chunk=8), dict(chunk=8), 32),
}
P, PATCH = 32, 4


def model(policy: str = "", depth: int = 2, width: int = 32, dtype: str = "float32") -> models.VLMConfig:
    vision, merger, at_once = POLICIES.get(policy, ({}, {}, 0))
    tower = models.CogViTConfig(depth=depth, width=width, heads=2, mlp=3 * width, patch=PATCH, dtype=dtype, **vision)
    into = models.MergerConfig(width, width, 3 * width, dtype=dtype, **merger)
    return models.VLMConfig(tower, into, models.DecoderConfig(width=width), None, at_once)


def packed_rows(rng: np.random.Generator, rows: int = 4) -> tuple[VisionInput, TokenInput]:
    """Rows of two documents, one with an image of 4 x 4 patches and one with images of 2 x 4 and 2 x 2, and padding
    behind them; the second row has no image at all."""
    frame = np.tile(np.repeat([1, 2, 3, 0], [16, 8, 4, 4]), (rows, 1))
    image_row = np.tile(np.repeat([-1, 0, -1, 4, -1, 6, -1], [2, 4, 4, 2, 2, 1, 5]), (rows, 1))
    image_row[:, 2:6], image_row[:, 10:12] = np.arange(4), (4, 5)
    frame[1], image_row[1] = 0, -1
    patches = rng.integers(0, 256, (rows, P, 3 * PATCH**2), dtype=np.uint8)
    vision = VisionInput(*map(jnp.asarray, (patches, rng.integers(0, 4, (rows, P, 2)), frame)))
    tokens = jnp.asarray(rng.integers(1, 60, (rows, 20)))
    return vision, TokenInput(tokens, None, None, jnp.asarray(image_row))


def loss(cfg, params, vision, tokens):
    """Of what enters the backbone: text and, in the places of their documents, visual tokens."""
    merged_BTD = vlm.embed(cfg, params, vlm.encode_images(cfg, params, vision), tokens)
    return (jnp.sin(jnp.arange(merged_BTD.size).reshape(merged_BTD.shape)) * merged_BTD).mean()


@functools.cache
def plain():
    """Parameters, a batch, and what plain encoding makes of it on one device."""
    rng, cfg = np.random.default_rng(0), model()
    shapes = {name: models.abstract_params(part) for name, part in seeing(cfg).items()}
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * x.shape[-1] ** -0.5, x.dtype), shapes)
    params["decoder"] = {"embed": {"embedding": jnp.asarray(rng.normal(size=(64, cfg.decoder.width)), jnp.float32)}}
    rows = packed_rows(rng)
    return params, rows, jax.jit(jax.value_and_grad(loss, 1), static_argnums=0)(cfg, params, *rows)


def seeing(cfg: models.VLMConfig) -> dict:
    return {"vision": cfg.vision, "merger": cfg.merger}


def agree(found, want):
    """To the rounding of float32, in which sums are taken in another order."""
    assert float(jnp.abs(want[1]["vision"]["patch_embed"]["kernel"]).max()) > 1e-5
    assert float(found[0]) == pytest.approx(float(want[0]), rel=3e-6)
    off, size = (sum(float((x**2).sum()) for x in jax.tree.leaves(tree)) ** 0.5
                 for tree in (jax.tree.map(jnp.subtract, found[1], want[1]), want[1]))  # fmt: skip
    assert off < 2e-6 * size
    for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=min(1e-6, 1e-5 * max(1e-3, float(jnp.abs(b).max()))))


@pytest.mark.parametrize("name", ["offload", "at once"])
def test_loss_and_gradient_are_those_of_plain_encoding(name):
    params, rows, want = plain()
    agree(jax.jit(jax.value_and_grad(loss, 1), static_argnums=0)(model(name), params, *rows), want)


def test_the_same_where_rows_and_positions_are_split():
    params, rows, want = plain()
    mesh = make_mesh({"data": 2, "context": 2}, jax.devices()[:4])
    with rules_lib.use(mesh, rules_lib.preset("context")):
        agree(jax.jit(jax.value_and_grad(loss, 1), static_argnums=0)(model("all"), params, *rows), want)


# --- memory -----------------------------------------------------------------------------------------------------------


def compiled(cfg, rows: int, patches: int, mesh=None):
    """The gradient of encoding, for rows of one image; on a mesh rows are split over all of it."""
    whole = split = None
    if mesh is not None:
        whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    shape = lambda *s, dtype=jnp.int32: jax.ShapeDtypeStruct((rows, patches, *s), dtype, sharding=split)  # noqa: E731
    vision = VisionInput(shape(3 * PATCH**2, dtype=jnp.uint8), shape(2), shape())
    params = {name: models.abstract_params(part) for name, part in seeing(cfg).items()}
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)

    def squared(params, vision):
        return jnp.square(vlm.encode_images(cfg, params, vision)).mean()

    return jax.jit(jax.grad(squared), out_shardings=whole).lower(params, vision).compile()


def test_a_further_image_costs_its_bytes_and_its_tokens():
    """Of encoding a few at a time; plain costs each block's numbers too."""

    def slope(cfg) -> float:
        few, many = (compiled(cfg, rows, 64).memory_analysis().temp_size_in_bytes for rows in (8, 40))
        return (many - few) / 32

    of_plain, at_once = slope(model(depth=6)), slope(model("at once", depth=6))
    assert at_once < 0.1 * of_plain
    # Normalised pixels alone would be more.
    assert at_once < 64 * 3 * PATCH**2 * 2 * 4


@pytest.mark.parametrize(("policy", "least", "most"), [("", 6.0, 9.0), ("at once", 1.0, 2.0), ("all", 1.0, 2.0)])
def test_from_two_images_to_sixteen(policy, least, most):
    """Eight times as many take as good as eight times the memory, and with a policy less than twice as much."""
    few, many = (
        compiled(model(policy, depth=6), rows, 64).memory_analysis().temp_size_in_bytes for rows in (2, 16)
    )
    assert least <= many / few <= most


@needs_libtpu
def test_what_layers_begin_with_waits_in_the_hosts_memory():
    """On a described TPU: of each block, and nothing else."""
    from glmv_jax.aot import topology

    mesh = make_mesh({"data": 4}, topology.parse("v5p:2x2x1").devices)
    with rules_lib.use(mesh, rules_lib.preset("data")):
        program = compiled(model("encoder", depth=6, width=128, dtype="bfloat16"), 4, 512, mesh)
    assert program.memory_analysis().host_temp_size_in_bytes == 6 * 512 * 128 * 2


def test_without_a_host_of_its_own_offload_is_full():
    assert remat.policy("offload") is remat.policy("full") and remat.policy("none") is None
    with pytest.raises(UserError, match="choose none, full, attention, dots, offload"):
        remat.policy("offlaod")

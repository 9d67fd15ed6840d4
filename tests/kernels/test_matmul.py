"""The forms of x W against float64 NumPy."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from glmv_jax.kernels import matmul
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.parallel.rules import preset, use


@pytest.mark.parametrize("lead", [(), (1,), (3, 2), (2, 1, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_is_the_product(lead, dtype):
    rng = np.random.default_rng(len(lead))
    x, w_IO = (jnp.array(rng.normal(size=shape), dtype) for shape in ((*lead, 8), (8, 6)))
    expected = np.asarray(x, np.float64) @ np.asarray(w_IO, np.float64)
    forms = [jax.jit(form)(x, w_IO) for form in (matmul.matmul, matmul.flattened, matmul.plain)]
    forms.append(jax.jit(matmul.by_rows)(x, w_IO.T).astype(dtype))
    for found in forms:
        assert found.shape == (*lead, 6) and found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1e-5 if dtype == "float32" else 2e-2,
                                   atol=1e-5 if dtype == "float32" else 2e-2)  # fmt: skip


@pytest.mark.parametrize("axes", [{"fsdp": 2, "expert": 2}, {"data": 2, "expert": 2, "context": 2}])
def test_gradients_are_scattered_axis_by_axis(axes):
    """The product and both gradients are those of one device; a device is sent no whole gradient."""
    rng = np.random.default_rng(0)
    x, w, given = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 8, 16), (16, 6), (4, 8, 6)))
    want, pull = jax.vjp(lambda x, w: x @ w, x, w)
    mesh = make_mesh(axes, jax.devices()[: math.prod(axes.values())])
    rules = preset("fsdp_expert" if "fsdp" in axes else "expert_context")
    with use(mesh, rules):
        names = ("embed", "heads")
        over = matmul.split_over(x, w, names)
        assert set(over) == set(axes) - {"data"}
        assert not matmul.split_over(x, w, ("norm", "heads")) and not matmul.split_over(x[:, :, 0], w, names)
        home = NamedSharding(mesh, rules.spec(names, mesh))

        @functools.partial(jax.jit, in_shardings=(None, home, None), out_shardings=(None, None, home))
        def run(x, w, given):
            out, pull = jax.vjp(lambda x, w: matmul.matmul(x, w, names), x, w)
            return out, *pull(given)

        compiled = run.lower(x, w, given).compile()
    for got, right in zip(compiled(x, w, given), (want, *pull(given)), strict=True):
        np.testing.assert_allclose(got, right, atol=1e-5)
    kinds = re.findall(r"\b(all-reduce|reduce-scatter)(?:-start)?\(", compiled.as_text())
    assert kinds.count("reduce-scatter") == len(over) and kinds.count("all-reduce") == len(set(axes) - set(over))

"""The forms of x W against float64 NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.kernels import matmul


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

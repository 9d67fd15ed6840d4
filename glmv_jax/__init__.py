"""GLM-5V-Turbo in JAX: one recipe, five stages (mim, siglip, pretrain, sft, rl), one loop.

The public names are imported when first used, so `import glmv_jax` costs nothing and touches no device.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module it lives in; a name equal to the last part of its module is the module itself
_PUBLIC = {
    "UserError": "glmv_jax.typing",
    "VisionInput": "glmv_jax.typing",
    "TokenInput": "glmv_jax.typing",
    "config": "glmv_jax.config",
    "data": "glmv_jax.data",
    "eval": "glmv_jax.eval",
    "inference": "glmv_jax.inference",
    "interop": "glmv_jax.interop",
    "losses": "glmv_jax.losses",
    "models": "glmv_jax.models",
    "optim": "glmv_jax.optim",
    "parallel": "glmv_jax.parallel",
    "rl": "glmv_jax.rl",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'glmv_jax' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if _PUBLIC[name].endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Parameters in the type that a model computes with, where nothing learns.

Training keeps them in float32, and a matrix is rounded to the model's type wherever it is used: for each token anew,
from twice the bytes. Rounded once beforehand it gives the same numbers. Which parameters are used in no other way is
read off the traced model, so that norms, routers and tables that count in float32 stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from glmv_jax.models import decoder
from glmv_jax.models.api import abstract_params
from glmv_jax.models.vlm import VLMConfig
from glmv_jax.typing import Params

# What leaves numbers as they are, of its first input.
_MOVES = {
    "reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "dynamic_slice", "gather", "copy",
    "sharding_constraint",
}  # fmt: skip
_CALLS = {"jit", "pjit", "closed_call", "checkpoint", "custom_jvp_call", "custom_vjp_call"}


def rounded(cfg: VLMConfig, params: Params) -> Params:
    """float32 parameters in the narrower type that they are used in, if they are used in one alone; others as they are.
    Call it inside a compiled function."""
    if all(part.dtype == "float32" for part in (cfg.vision, cfg.merger, cfg.decoder) if part is not None):
        return params
    return jax.tree.map(
        lambda x, dtype: x.astype(dtype) if x.dtype == jnp.float32 and dtype.itemsize < 4 else x, params, used(cfg)
    )


def used(cfg: VLMConfig) -> Any:
    """The type that each parameter is first rounded to, a leaf each; its own where that is not one for all uses."""
    params = abstract_params(cfg)
    leaves, tree = jax.tree.flatten(params)
    traced = jax.make_jaxpr(lambda params: _outputs(cfg, params))(params).jaxpr
    found = [{x.dtype if isinstance(use, int) else use for use in _uses(traced, variable)}
             for x, variable in zip(leaves, traced.invars)]  # fmt: skip
    return jax.tree.unflatten(tree, [types.pop() if len(types) == 1 else x.dtype for x, types in zip(leaves, found)])


def _outputs(cfg: VLMConfig, params: Params) -> list:
    """Of every part by itself, and of what the decoder's module declares and others read."""
    parts = [part.module().apply({"params": params[name]}, *part.example()) for name, part in cfg.parts().items()]
    inputs = decoder.embed(params["decoder"], jnp.zeros((1, 2), jnp.int32))
    return [*parts, inputs, decoder.logits(cfg.decoder, params["decoder"], inputs.astype(cfg.decoder.dtype))]


def _uses(jaxpr: core.Jaxpr, variable: core.Var) -> Iterator[jnp.dtype | int]:
    """The types that a variable is rounded to, or its own for what else is done with it; and the number of an output
    that it is."""
    own: Any = variable.aval
    own = own.dtype
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        for n, given in enumerate(equation.invars):
            if given is not variable:
                continue
            if name == "convert_element_type":
                yield jnp.dtype(equation.params["new_dtype"])
            elif name in _MOVES and n == 0:
                yield from _uses(jaxpr, equation.outvars[0])
            elif inside := _inside(equation, n):
                for part, its in inside:
                    for use in _uses(part, its):
                        if not isinstance(use, int):
                            yield use
                        elif name in _CALLS:
                            yield from _uses(jaxpr, equation.outvars[use])
                        else:
                            yield own
            else:
                yield own
    yield from (n for n, out in enumerate(jaxpr.outvars) if out is variable)


def _inside(equation: core.JaxprEqn, n: int) -> list[tuple[core.Jaxpr, core.Var]]:
    """Where an equation that is made of others has its input n; nowhere if it is not, or changes it from turn to
    turn."""
    known, name = equation.params, equation.primitive.name
    if name == "while":
        test, body = known["cond_nconsts"], known["body_nconsts"]
        if n < test:
            return [(known["cond_jaxpr"].jaxpr, known["cond_jaxpr"].jaxpr.invars[n])]
        return [(known["body_jaxpr"].jaxpr, known["body_jaxpr"].jaxpr.invars[n - test])] if n < test + body else []
    if name == "cond":
        return [(branch.jaxpr, branch.jaxpr.invars[n - 1]) for branch in known["branches"]] if n else []
    if name == "scan" and 0 <= n - known["num_consts"] < known["num_carry"]:
        return []
    parts = [getattr(part, "jaxpr", part) for part in known.values()]
    whole = [part for part in parts if isinstance(part, core.Jaxpr) and len(part.invars) == len(equation.invars)]
    return [(part, part.invars[n]) for part in whole[:1]]

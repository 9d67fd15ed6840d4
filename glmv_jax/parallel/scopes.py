"""Names of the parts of a step: what compiled programs, profiles and reports say an operation came from.

`jax.named_scope(NAME)` puts one of NAMES on what is traced within it, and Flax each module's class or name (CogViT,
Merger, Decoder, MTPLayer, ...). JAX writes both into the metadata of every operation, forward and backward, from where
`part` reads them. Other names than these do not pass the tests, so that tables keep their rows.
"""

from __future__ import annotations

import re

NAMES = {
    "embed": "tokens to rows of a table, and visual tokens into their places",
    "patch_embed": "pixels to patches' embeddings",
    "projector": "visual tokens, in the width of the language model",
    "attention": "norm, attention and residual sum of a layer",
    "qkv": "its queries, keys and values: projections, norms, rotations",
    "core": "its products of queries, keys and values",
    "out": "its last projection",
    "mlp": "norm, MLP or experts, and residual sum of a layer",
    "router": "which experts each token takes",
    "experts": "all that experts do",
    "dispatch": "tokens to their experts: sorted, sent, gathered matrices",
    "products": "of experts with their tokens",
    "seldom": "what even loads of experts do not need",
    "combine": "what experts made of each token, sent home and summed",
    "mtp": "multi-token prediction",
    "head": "the output head with its softmax and cross-entropy",
    "teacher": "what teachers of stage 1 see",
    "loss": "from predictions to a number, and metrics",
    "sigmoid": "the sigmoid loss of stage 2",
    "ring": "images and texts of other devices come by for it",
    "policy": "the policy loss of stage 5",
    "accumulate": "gradients of a batch's pieces, added up",
    "update": "the optimiser",
    "clip": "its norm of gradients, and their clipping",
    "muon": "orthogonalised momentum",
    "adamw": "AdamW",
    "ema": "the running average of the parameters",
    "frozen": "updates of exactly zero",
    "guard": "norms, and the choice of the old state where a gradient is not finite",
}

_WRAPPED = re.compile(r"^(?:transpose|jvp|vmap|remat|checkpoint|custom_jvp|custom_vjp)\((.*)\)$")
_JIT = re.compile(r"^p?jit\(.*\)$")
# Of JAX, of the stack of layers and of a method: they say how a part is run, not which it is.
_HOW = re.compile(
    "while|body|cond|branch_.*|closed_call|checkpoint|rematted_computation|remat|pjit|custom_vjp_call|core_call|"
    "custom_vjp_call_jaxpr|custom_jvp_call|shard_map|scan|layers|embedded|(blocks?|layer)[0-9_]*"
)
DEPTH = 4  # names of a part's path


def part(scope: str) -> tuple[str, str]:
    """(path of names, "forward", "recomputed", "backward" or "") of an op_name; ("no name", "") without one."""
    if not scope:
        return "no name", ""
    names: list[str] = []
    way = ""
    # Of several merged ones, "a/x;b/y" or "a/(b/x:c/y)", the first. The last name is the operation.
    outer, merged, inner = scope.partition(";")[0].partition("/(")
    *path, _ = f"{outer}/{inner.partition(':')[0]}".split("/") if merged else outer.split("/")
    for name in path:
        if name.startswith("transpose("):
            way = "backward"
        elif name.startswith("jvp(") and not way:
            way = "forward"
        elif name == "rematted_computation":
            way = "recomputed"
        while found := _WRAPPED.match(name):
            name = found[1]
        name = name.rpartition(".")[2]  # of a method of a module its name alone
        if not name or "->" in name or _JIT.match(name) or _HOW.fullmatch(name) or names[-1:] == [name]:
            continue
        if names[-1:] == ["mlp"] and name == "moe":  # the module whose branch it is
            names.pop()
        names.append(name)
    return "/".join(names[:DEPTH]) or "no name", way

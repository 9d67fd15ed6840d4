"""The closed vocabulary of logical axis names: what a dimension of a parameter or activation IS, never where it lives.

`rules.Rules` says where each name lives on a mesh. Using a name that is not listed here raises, because Flax would
silently replicate it.
"""

from __future__ import annotations

AXES: dict[str, str] = {
    # parameters
    "layers": "stacked layers of one tower (added by scan)",
    "pipeline": "stacked layers of the decoder that a pipeline may share out",
    "embed": "model width where a matrix reads the residual stream",
    "heads": "query heads x head width",
    "from_heads": "the same where a matrix reads them",
    "kv_heads": "key/value heads x head width",
    "head_dim": "width of one head (norm gains)",
    "mlp": "hidden width of an MLP",
    "from_mlp": "the same where a matrix reads it",
    "vocab": "vocabulary rows",
    "expert": "experts of a mixture",
    "expert_embed": "model width where a matrix of an expert reads the residual stream",
    "expert_mlp": "hidden width where a matrix of an expert reads it",
    "router": "scores of a router, one an expert",
    "latent": "compressed queries, or keys and values, of latent attention",
    "from_latent": "the same where a matrix reads them",
    "index": "heads of the indexer x their width",
    "patch": "flattened pixels of one patch",
    "position": "rows of a learned position table",
    "merge": "four neighbouring patches laid side by side",
    "projection": "output width of a projection out of a tower",
    "norm": "gain or bias of a norm, or bias added to the residual stream",
    "feature": "channels of a teacher's feature",
    "scalar": "a single number",
    # activations
    "batch": "rows of a batch",
    "length": "positions of a row",
    "activation": "width of an activation",
}


def check(names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Returns `names` unchanged; ValueError when one is outside the vocabulary."""
    for name in names:
        if name is not None and name not in AXES:
            raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(AXES)}")
    return names

"""Whose work it is: nearly all FLOPs of a step carry a name of `parallel.scopes`, forward and backward.

Read from steps compiled for a CPU, by the accounting of `glmv compile`.
"""

from __future__ import annotations

import ast
import collections
import pathlib

import jax
import jax.numpy as jnp
import pytest

import glmv_jax
from glmv_jax import config, optim
from glmv_jax.aot import costs, hlo
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel import scopes
from glmv_jax.train import loop, main

# Little is optimised, so that compiling is quick.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

BLOCK = {"attention/qkv", "attention/core", "attention/out", "mlp/up"}
STEPS = {
    "experiments/cogvit_siglip.py:size=nano":
        {"CogViT/patch_embed", "Pool/attention", "Pool/mlp", *(f"{tower}/{part}" for tower in ("CogViT", "TextTower")
                                                               for part in BLOCK)},
    "experiments/vlm_pretrain.py:size=nano":
        {"CogViT/patch_embed", "projector/Merger", "mtp/MTPLayer/attention", "mtp/MTPLayer/mlp",
         *(f"{tower}/{part}" for tower in ("CogViT", "Decoder") for part in BLOCK)},
}  # fmt: skip
LOSS = {"experiments/cogvit_siglip.py:size=nano": "sigmoid", "experiments/vlm_pretrain.py:size=nano": "head"}


def gradient(experiment: str) -> str:
    """The text of a step's forward and backward pass, on one device."""
    cfg = config.load(experiment)
    stage = main.stage_class(cfg.stage)(cfg)
    placement, _, _ = loop.prepare(stage, mesh_lib.make_mesh({"data": 1}, jax.devices()[:1]))
    batch = placement.batch_shapes(next(iter(stage.batch_shapes())))

    def step(params, extra, batch):
        return jax.grad(stage.loss, has_aux=True)(params, {}, extra, batch, jax.random.key(0))

    with rules_lib.use(placement.mesh, placement.rules):
        lowered = jax.jit(step).lower(placement.abstract.params, placement.abstract.extra, batch)
    return lowered.compile(compiler_options=QUICK).as_text()


def flops(text: str) -> dict[str, collections.Counter[str]]:
    """way -> part -> FLOPs."""
    found, table = costs.schedule(hlo.parse(text)), collections.defaultdict(collections.Counter)
    for step in found.steps:
        for where, op in [(step.computation, step.op), *found.module.fused(step.op)]:
            if count := step.times * costs.flops(where, op):
                name, way = scopes.part(op.scope)
                table[way][name] += count
    return table


@pytest.mark.parametrize("experiment", STEPS)
def test_flops_have_names(experiment):
    table = flops(gradient(experiment))
    total = sum(sum(names.values()) for names in table.values())
    for way in ("forward", "backward"):
        names = table[way]
        known = {name: n for name, n in names.items() if set(name.split("/")) & scopes.NAMES.keys()}
        assert sum(names.values()) > 0.2 * total
        assert sum(known.values()) >= 0.95 * sum(names.values()), names.most_common(20)
        missing = [part for part in STEPS[experiment] if not any(name.startswith(part) for name in names)]
        assert not missing, (way, missing, sorted(names))
    assert any(name.startswith(LOSS[experiment]) for name in table["forward"])  # the gradient is taken on the way


def test_the_optimiser_has_names():
    params = {name: jnp.ones((8, 8)) for name in "abc"}
    groups = [("a", {"kind": "muon"}), ("b", {"kind": "adamw"}), ("c", {"kind": "frozen"})]
    update = optim.build({"lr": 1e-3, "clip": 1.0, "ema": 0.9, "groups": groups}, params, 10)
    text = jax.jit(update.update).lower(params, update.init(params), params).compile(compiler_options=QUICK).as_text()
    module = hlo.parse(text)
    ops = [op for computation in module.computations.values() for op in computation.ops]
    assert {"clip", "muon", "adamw", "ema"} <= {scopes.part(op.scope)[0].partition("/")[0] for op in ops}
    assert {scopes.part(op.scope)[0] for op in ops if op.opcode == "dot"} == {"muon"}


def test_every_scope_is_in_the_list_and_the_other_way_round():
    used = {"muon", "adamw", "frozen", "clip", "ema"}  # `optim.groups` names its parts by their kinds
    for path in pathlib.Path(glmv_jax.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "named_scope":
                used |= {word.value for word in node.args if isinstance(word, ast.Constant)}
    assert used == scopes.NAMES.keys()

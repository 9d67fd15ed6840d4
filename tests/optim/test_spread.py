"""Muon with its matrices spread over a mesh against the replicated one, and what the compiled update sends.

Not covered: time on real interconnects.
"""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import pytest

from glmv_jax import config, models, optim
from glmv_jax.models import build
from glmv_jax.models.cogvit import CogViTConfig
from glmv_jax.models.experts import AXES as EXPERT_AXES
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel.mesh import make_mesh

DEPTH = 3
SHAPES = {"q": (DEPTH, 16, 16), "k": (DEPTH, 16, 16), "o": (DEPTH, 16, 16), "gate": (DEPTH, 16, 48),
          "down": (DEPTH, 48, 16), "projection": (16, 24)}  # fmt: skip
AXES = {"q": ("layers", "embed", "heads"), "k": ("layers", "embed", "heads"), "o": ("layers", "heads", "embed"),
        "gate": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed"),
        "projection": ("embed", "projection")}  # fmt: skip


@functools.cache
def gradients():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def placed(rules, **sizes):
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    return rules_lib.preset(rules).shardings(mesh, AXES, gradients())


def update(shardings, **options):
    """(the compiled first update, what it gives); without shardings on one device."""
    tx = optim.scale_by_muon(shardings=shardings, **options)
    grads = gradients() if shardings is None else jax.device_put(gradients(), shardings)
    step = jax.jit(lambda g: tx.update(g, tx.init(g))[0], out_shardings=shardings).lower(grads).compile()
    return step, jax.device_get(step(grads))


@pytest.mark.parametrize("rules, sizes", [
    ("data", {"data": 8}), ("fsdp", {"fsdp": 8}), ("fsdp", {"data": 2, "fsdp": 4}), ("fsdp", {"fsdp": 2}),
    ("fsdp_tensor", {"data": 2, "fsdp": 2, "tensor": 2}),
])  # fmt: skip
@pytest.mark.parametrize("heads", [1, 2])
def test_equals_replicated(rules, sizes, heads):
    _, want = update(None, heads=heads)
    _, got = update(placed(rules, **sizes), heads=heads)
    for name in SHAPES:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=name)


def test_heads_are_orthogonalised_one_by_one():
    _, got = update(None, heads=4, scaling="spectral")
    for layer in range(DEPTH):
        for head in range(4):
            one = optim.orthogonalise(0.0975 * gradients()["q"][layer, :, 4 * head : 4 * head + 4])
            np.testing.assert_allclose(got["q"][layer, :, 4 * head : 4 * head + 4], one, atol=1e-5)


def test_two_all_to_alls_a_stack_and_no_chatter():
    """q, k, o are one stack, gate and down another, the projection a third, whatever the depth."""
    text = update(placed("fsdp", fsdp=8))[0].as_text()
    count = lambda kind: len(re.findall(rf" {kind}(?:-start)?\(", text))  # noqa: E731
    assert count("all-to-all") == 6
    assert count("all-gather") == count("all-reduce") == count("collective-permute") == 0


def test_no_device_does_more_than_its_share():
    """9 matrices of 16 x 16, 6 of 16 x 48 and one of 16 x 24 over 3 devices: 3, 2 and 1 (of 3 with padding) each."""
    flops = lambda shardings: update(shardings)[0].cost_analysis()["flops"]  # noqa: E731
    assert flops(placed("data", data=3)) < 0.42 * flops(None)


def test_bfloat16_travels():
    """As it is asked for: the CPU's compiler would make float32 of it."""
    shardings = placed("fsdp", fsdp=8)
    tx = optim.scale_by_muon(shardings=shardings, dtype="bfloat16")
    text = jax.jit(lambda g: tx.update(g, tx.init(g))[0]).lower(gradients()).as_text()
    sent = re.findall(r"stablehlo.all_to_all.*-> tensor<(.*)>", text)
    assert len(sent) == 6 and all(kind.endswith("xbf16") for kind in sent)


def test_the_optimiser_of_a_run_spreads_its_matrices():
    cfg = CogViTConfig(depth=2, width=16, heads=2, mlp=48, patch=4)
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    params = models.init_params(cfg, jax.random.key(0))
    shardings = rules_lib.preset("fsdp").shardings(mesh, models.logical_axes(cfg), params)
    groups = [(r"blocks/.*/kernel", {"kind": "muon"}), (r".*", {"kind": "adamw"})]
    tx = optim.build({"lr": 0.1, "groups": groups}, params, 10, shardings)
    params = jax.device_put(params, shardings)
    text = jax.jit(lambda g, s: tx.update(g, s, g)[0]).lower(params, tx.init(params)).compile().as_text()
    assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == 6  # q, k, v, o; gate, up; down


def test_cogvit_l_is_three_stacks_and_six_all_to_alls_whatever_else_its_optimiser_does():
    """The published size under its experiment's rules and groups on 8 devices, compiled and not run: q, k, v, o of all
    layers are one stack, gate and up another, down, split along its longer side, a third. No parameter, gradient or
    momentum is gathered or summed."""
    cfg = config.load("experiments/cogvit_mim.py:size=l")
    model = build.vision(cfg.model)
    params, axes = {"vision": models.abstract_params(model)}, {"vision": models.logical_axes(model)}
    shardings = rules_lib.preset(cfg.rules).shardings(make_mesh({"fsdp": 8}), axes, params)
    tx = optim.build(cfg.optim, params, cfg.steps, shardings)
    shapes = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params, shardings)
    update = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0], out_shardings=shardings)
    program = update.lower(shapes, shapes).compile()
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    sent = re.findall(rf" = (.*) ({kinds})(?:-start)?\(", program.as_text())
    arrays = [kind for result, kind in sent if re.search(r"\[\d", result)]  # the rest sum the gradient's norm
    assert arrays == ["all-to-all"] * 6
    matrices = 4 * 15 * 2 * 24 * 1024**3 + 3 * 5 * 2 * 24 * (2 * 4 + 1) * 1024**3
    assert program.cost_analysis()["flops"] < 1.02 * matrices / 8


EXPERTS = {"gate": (DEPTH, 4, 16, 48), "down": (DEPTH, 4, 48, 16), "q": (DEPTH, 16, 16)}


@pytest.mark.parametrize("rules, sizes", [
    ("expert", {"expert": 4}), ("fsdp_expert", {"fsdp": 2, "expert": 4}), ("expert", {"data": 2, "expert": 2}),
    ("fsdp_expert_tensor", {"fsdp": 2, "expert": 2, "tensor": 2}),
])  # fmt: skip
def test_what_splits_a_stack_of_experts_keeps_doing_so(rules, sizes):
    """Equal to one device, and no expert's matrix is gathered: a device turns those of its own experts."""
    rng = np.random.default_rng(1)
    grads = {name: rng.normal(size=shape).astype(np.float32) for name, shape in EXPERTS.items()}
    axes = {"gate": ("layers", *EXPERT_AXES.gate), "down": ("layers", *EXPERT_AXES.down), "q": AXES["q"]}
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    shardings = rules_lib.preset(rules).shardings(mesh, axes, grads)
    alone, many = optim.scale_by_muon(), optim.scale_by_muon(shardings=shardings)
    want = alone.update(grads, alone.init(grads))[0]
    step = jax.jit(lambda g: many.update(g, many.init(g))[0], out_shardings=shardings)
    program = step.lower(jax.device_put(grads, shardings)).compile()
    got = jax.device_get(program(jax.device_put(grads, shardings)))
    for name in EXPERTS:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=name)
    if "data" not in sizes:  # replicas share the work out, and gather what comes of it
        assert not re.search(r" all-gather(-start)?\(", program.as_text())

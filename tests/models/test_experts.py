"""Experts over a mesh against one device: outputs, loads, losses and gradients, whatever tokens choose; what travels.

On emulated CPU devices, so rows travel in padded blocks. Not covered: `ragged_all_to_all` on TPUs, which gets the very
arguments that the padded form is tested with here.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta
from jax.sharding import PartitionSpec as P

from glmv_jax.kernels import exchange, grouped_matmul
from glmv_jax.models import experts, moe
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.parallel.rules import Rules

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")

CFG = moe.MoEConfig(width=16, hidden=24, experts=16, chosen=4, shared=1, scale=2.5)
B, T = 8, 32
LAYER = moe.MoE(CFG)


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    x, weight = (jnp.array(rng.normal(size=(B, T, CFG.width)), jnp.float32) for _ in range(2))
    valid = rng.random((B, T)) < 0.8
    valid[3] = False  # a row that is padding alone: on eight devices one of them has no token
    boxed = LAYER.init(jax.random.key(0), x, valid)["params"]
    axes = jax.tree.map(tuple, nn.get_partition_spec(boxed), is_leaf=lambda s: isinstance(s, P))
    return meta.unbox(boxed), axes, x, jnp.array(valid), weight


ROUTINGS = {"mixed": np.zeros(16), "skewed": np.where(np.arange(16) < 4, 3.0, 0.0), "one": 3.0 * (np.arange(16) == 13)}


def biased(params, routing):
    """Experts 0 to 3, which share a device or two, get all tokens; or number 13 a row of every one."""
    return params | {"router_bias": jnp.array(ROUTINGS[routing], jnp.float32)}


def results(layer=LAYER):
    """A new function each time, for it is traced under the mesh in force: (loss, output, aux), gradients."""

    def loss(params, x, valid, weight):
        out, aux = layer.apply({"params": params}, x, valid)
        return (out * weight).mean() + aux["balance"], (out, aux)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@functools.cache
def alone(routing):
    assert rules_lib.active() is None  # else it would be compared with itself
    params, _, x, valid, weight = inputs()
    return jax.device_get(results()(biased(params, routing), x, valid, weight))


def placed(sizes, rules):
    """(mesh, parameters where they live, x, valid, weight split by rows)."""
    params, axes, *rows = inputs()
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    params = jax.device_put(params, rules.shardings(mesh, axes, params))
    return mesh, params, *jax.device_put(rows, rules_lib.batch_sharding(mesh))


def close(got, want, relative):
    assert np.abs(got - want).max() <= relative * np.abs(want).max(), np.abs(got - want).max()


MESHES = [
    ("expert", {"expert": 2}), ("expert", {"expert": 4}), ("expert", {"expert": 8}), ("fsdp", {"fsdp": 8}),
    ("fsdp_expert", {"fsdp": 2, "expert": 4}), ("expert_tensor", {"expert": 4, "tensor": 2}),
    ("fsdp_expert_tensor", {"fsdp": 2, "expert": 2, "tensor": 2}), ("fsdp_expert", {"data": 2, "fsdp": 2, "expert": 2}),
    ("data", {"data": 2, "expert": 4}), ("fsdp_tensor", {"fsdp": 2, "tensor": 4}),
]  # fmt: skip


def equals_one_device(preset, sizes):
    rules = rules_lib.preset(preset)
    mesh, params, *rows = placed(sizes, rules)
    wanted = {routing: alone(routing) for routing in ROUTINGS}
    with rules_lib.use(mesh, rules):
        many = results()
        for routing, ((want_loss, (want_out, want_aux)), want_grads) in wanted.items():
            (loss, (out, aux)), grads = many(biased(params, routing), *rows)
            np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
            np.testing.assert_array_equal(aux["load"], want_aux["load"])
            np.testing.assert_allclose(aux["balance"], want_aux["balance"], rtol=1e-6)
            close(jax.device_get(out), want_out, 1e-5)
            for got, want in zip(jax.tree.leaves(jax.device_get(grads)), jax.tree.leaves(want_grads)):
                close(got, want, 1e-4)


@pytest.mark.parametrize("preset, sizes", MESHES, ids=str)
def test_equals_one_device(preset, sizes):
    equals_one_device(preset, sizes)


def test_what_fills_slices_up():
    """Copies by expert, in order of their tokens, then the rest of a unit; copies of no expert at the end."""
    rng = np.random.default_rng(2)
    E, C = 5, 64
    expert = rng.integers(0, E + 1, C)
    expert[expert == 3] = 4  # nobody's
    sizes = np.bincount(expert, minlength=E + 1)[:-1]
    filled, order, back = experts._sorted(jnp.array(expert), jnp.array(sizes, jnp.int32), 8)
    np.testing.assert_array_equal(filled, -(-sizes // 8) * 8)
    assert len(order) % 8 == 0 and sorted(order.tolist()) == list(range(len(order)))
    np.testing.assert_array_equal(order[back], np.arange(C))
    begin = 0
    for e in range(E):
        mine = np.asarray(order[begin : begin + int(filled[e])])
        np.testing.assert_array_equal(mine[: sizes[e]], np.flatnonzero(expert == e))
        assert (mine[sizes[e] :] >= C).all()
        begin += int(filled[e])
    nobodys = order[begin:]
    np.testing.assert_array_equal(nobodys[nobodys < C], np.flatnonzero(expert == E))


def test_rows_that_nobody_sent_may_be_anything(monkeypatch):
    """As on TPUs, where they are what memory held, in the gradient too; here of a form that writes NaN there. Slices go
    in whole tiles, as long ones do: what fills them up is felt by nothing."""
    monkeypatch.setattr(experts, "LONG", 0)

    def ragged(x, there, back, axis, rows, home):
        got = exchange.padded(x, there, axis, rows, len(x))
        known = jnp.expand_dims(exchange.put(back, rows), [*range(1, x.ndim)])
        return jnp.where(known, got, 0 if home else jnp.nan)

    monkeypatch.setattr(exchange, "supported", lambda: True)
    monkeypatch.setattr(exchange, "ragged", ragged)
    equals_one_device("fsdp_expert", {"fsdp": 2, "expert": 4})


def test_positions_may_be_split_too():
    rules = rules_lib.preset("expert")
    rules = Rules(rules.table | {"length": "context"})
    mesh, params, *rows = placed({"expert": 4, "context": 2}, rules)
    with rules_lib.use(mesh, rules):
        (_, (out, aux)), grads = results()(biased(params, "skewed"), *rows)
    (_, (want_out, want_aux)), want_grads = alone("skewed")
    np.testing.assert_array_equal(aux["load"], want_aux["load"])
    close(jax.device_get(out), want_out, 1e-5)
    close(jax.device_get(grads[0]["down"]), want_grads[0]["down"], 1e-4)


def test_skewed_tokens_come_in_windows():
    """What the equality above is worth: with these sizes one window is not enough where all want the same device."""
    load = alone("skewed")[0][1][1]["load"]
    for devices in (4, 8):
        chosen = experts.Chosen(*(np.empty((B // devices, T, *n)) for n in ((4,), (4,), ())))
        local = experts.Experts(*[np.empty((16 // devices, 1, 1))] * 3)
        split = experts._split("expert", devices, chosen, local, {"expert"})
        assert load.reshape(devices, -1).sum(1).max() > split.window and split.windows > 1


def test_every_row_arrives_once():
    """`ways` against loops, for random numbers of rows a device and an expert: in the windows together every row is
    sent once, to its expert's device, those of an expert stand together there, and the way back is the same way."""
    rng = np.random.default_rng(1)
    S, E, window = 4, 12, 40
    sizes_SE = rng.integers(0, 9, (S, E)) * (rng.random((S, E)) < 0.7)
    starts = np.cumsum(sizes_SE, 1) - sizes_SE
    seen = set()
    for n in range(-(-sizes_SE.reshape(S, S, -1).sum((0, 2)).max() // window)):
        all_ways = [jax.device_get(experts.ways(jnp.array(sizes_SE), S, window, n, me)) for me in range(S)]
        at = np.full((S, window), -1)  # which expert's row lies there
        for me, (there, _, _) in enumerate(all_ways):
            for e in range(E):
                device = e // (E // S)
                rows = there.start[e] + np.arange(there.size[e])
                assert not len(rows) or (rows[0] >= starts[me, e] and rows[-1] < starts[me, e] + sizes_SE[me, e])
                assert not {(me, r) for r in rows} & seen
                seen |= {(me, r) for r in rows}
                spots = there.put[e] + np.arange(there.size[e])
                assert np.all(at[device, spots] == -1)
                at[device, spots] = e
                slot = me * (E // S) + e % (E // S)
                assert all_ways[device][0].got[slot] == there.size[e] == all_ways[device][1].size[slot]
                if there.size[e]:
                    assert all_ways[device][1].start[slot] == there.put[e]
                    assert all_ways[device][1].put[slot] == there.start[e]
                assert all_ways[me][1].got[e] == there.size[e]
        for device, (_, _, mine) in enumerate(all_ways):
            order = at[device, : mine.sum()]
            assert np.all(np.diff(order) >= 0) and np.all(at[device, mine.sum() :] == -1)
            np.testing.assert_array_equal(np.bincount(order - device * (E // S), minlength=E // S), mine)
    assert len(seen) == sizes_SE.sum()


def sent(text, kind):
    """Sizes of the arrays that collectives of a kind give, in a compiled program."""
    found = re.findall(rf" = (.*?) {kind}(?:-start)?\(", text)
    return [int(np.prod([int(n) for n in dims.split(",")])) for f in found for dims in re.findall(r"\[([\d,]+)\]", f)]


def test_gradients_of_experts_are_scattered_and_nothing_of_them_is_summed_whole():
    """fsdp x expert: a matrix travels along fsdp alone, gathered, and its gradient reduce-scattered."""
    rules = rules_lib.preset("fsdp_expert")
    mesh, params, *rows = placed({"fsdp": 2, "expert": 4}, rules)
    with rules_lib.use(mesh, rules):
        text = results().lower(params, *rows).compile().as_text()
    own = 16 // 4 * 16 * 24  # numbers of one of the three stacks of matrices on a device, whole
    assert sent(text, "reduce-scatter").count(own // 2) == 3
    assert sent(text, "all-gather").count(own) >= 3
    assert max(sent(text, "all-reduce")) < own // 2
    assert len(sent(text, "all-to-all")) > 0


def test_no_exchange_where_experts_are_everywhere():
    rules = rules_lib.preset("fsdp")
    mesh, params, *rows = placed({"fsdp": 8}, rules)
    with rules_lib.use(mesh, rules):
        text = results().lower(params, *rows).compile().as_text()
    assert not sent(text, "all-to-all")


@pytest.mark.parametrize("tokens, devices", [(2048, 32), (512, 8)])
def test_a_device_does_at_most_a_tenth_more_than_its_share(tokens, devices):
    """256 experts, 8 a token, balanced as a random choice is: tiles of a device times their rows, in all windows."""
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((devices, tokens, 256)), axis=-1)[..., :8]
    sizes_SE = np.stack([np.bincount(c.ravel(), minlength=256) for c in chosen]).astype(np.int32)
    split = experts._split("expert", devices, experts.Chosen(chosen[0], chosen[0], chosen[0, :, 0]),
                           experts.Experts(*[np.empty((256 // devices, 1, 1))] * 3), set())  # fmt: skip
    tile = grouped_matmul.tile_rows(tokens * 8, 256 // devices)
    done = np.zeros(devices)
    for n in range(split.windows):
        for me in range(devices):
            _, _, mine = experts.ways(jnp.array(sizes_SE), devices, split.window, n, me)
            done[me] += int(grouped_matmul._tiles(mine, tile)[0]) * tile
        if n == 0:
            assert sizes_SE.reshape(devices, devices, -1).sum((0, 2)).max() <= split.window  # the first holds all
    assert done.sum() <= 1.1 * sizes_SE.sum()


def test_rules_that_split_the_hidden_width_two_ways_are_a_bug():
    rules = Rules(rules_lib.preset("expert_tensor").table | {"expert_mlp": "expert", "expert": None})
    mesh, params, *rows = placed({"expert": 4, "tensor": 2}, rules)
    with rules_lib.use(mesh, rules), pytest.raises(ValueError, match="the second begins as the first"):
        results()(params, *rows)


def test_half_precision_travels_so():
    layer = moe.MoE(dataclasses.replace(CFG, dtype="bfloat16"))
    rules = rules_lib.preset("fsdp_expert")
    mesh, params, *rows = placed({"fsdp": 2, "expert": 4}, rules)
    with rules_lib.use(mesh, rules):
        text = results(layer).lower(params, *rows).as_text()
    moved = re.findall(r'stablehlo\.(all_gather|all_to_all|reduce_scatter)".*?-> tensor<([\dx]*)x(\w+)>', text, re.S)
    wide = [(kind, dims, of) for kind, dims, of in moved if of == "f32"]
    kinds = {kind for kind, _, of in moved if of == "bf16"}
    assert not wide and kinds == {"all_gather", "all_to_all", "reduce_scatter"}

"""What does Muon cost in a step of CogViT-L: shared out among the devices, left to the partitioner, as optax has it?

    python benchmarks/muon.py compiled [--topologies v5e:2x4 v5e:8x8]   any Linux machine with `glmv_jax[tpu]`
    python benchmarks/muon.py emulated                                  8 emulated CPU devices, a narrow CogViT
    python benchmarks/muon.py run [--batch 64]                          one accelerator, CogViT-L itself

compiled  The update alone, for TPU topologies, not run: FLOPs of a device, its collectives and the bytes they give it,
          and the compiler's own estimate of the time of what is not a collective.
emulated  Seconds of an update.
run       Seconds of an update and of a whole step (masked images of 256 patches, squared error against given features).

Parameters and groups are those of experiments/cogvit_mim.py:size=l without teachers and heads. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

from contest import emit

from glmv_jax.aot import topology as topology_lib

MODE = next((a for a in sys.argv[1:] if a in ("compiled", "emulated", "run")), "")
if MODE == "compiled":  # before jax
    topology_lib.described_only()
if MODE == "emulated":
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=8")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from glmv_jax import config, models, optim  # noqa: E402
from glmv_jax.aot import costs, hlo  # noqa: E402
from glmv_jax.models import build, cogvit  # noqa: E402
from glmv_jax.parallel import rules as rules_lib  # noqa: E402
from glmv_jax.parallel.mesh import make_mesh  # noqa: E402
from glmv_jax.trees import flatten, slash_path  # noqa: E402
from glmv_jax.typing import VisionInput  # noqa: E402

PATCHES = 256
STEP = "ours, bfloat16"  # run: the optimiser of the whole step that is timed; the others' shares follow from it
MATRIX = re.compile(r"vision/blocks/.*/kernel")


# --- the optimisers that are compared ---------------------------------------------------------------------------------


def groups(dtype: str) -> dict:
    """The experiment's optimiser, with Newton-Schulz in `dtype`; no clipping, which is the same for all."""
    cfg = config.load("experiments/cogvit_mim.py:size=l").optim.to_dict()
    muon = lambda settings: settings | ({"dtype": dtype} if settings["kind"] == "muon" else {})  # noqa: E731
    return cfg | {"clip": 0.0, "groups": tuple((regex, muon(settings)) for regex, settings in cfg["groups"])}


def from_optax(params, told: bool) -> optax.GradientTransformation:
    """optax.contrib.muon, told which leaves are (stacks of) matrices, or left to its rule: all leaves of two axes."""
    axes = lambda leaf: optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)  # noqa: E731
    which = {slash: axes(leaf) if MATRIX.fullmatch(slash) else None
             for slash, leaf in flatten(params).items()}  # fmt: skip
    numbers = jax.tree.unflatten(jax.tree.structure(params), list(which.values())) if told else None
    return optax.contrib.muon(1e-3, weight_decay=0.05, consistent_rms=0.2, adam_weight_decay=0.05,
                              muon_weight_dimension_numbers=numbers)  # fmt: skip


def variants(params, shardings) -> dict[str, optax.GradientTransformation]:
    """name -> optimiser; `shardings` None: on one device."""
    ours = lambda dtype, where: optim.build(groups(dtype), params, 100_000, where)  # noqa: E731
    alone = {"ours, float32": ours("float32", None), "ours, bfloat16": ours("bfloat16", None)}
    shared = {"ours, shared out": ours("float32", shardings), "ours, shared out, bfloat16": ours("bfloat16", shardings),
              "ours, left to the partitioner": ours("float32", None)}  # fmt: skip
    theirs = {"optax, told the matrices": from_optax(params, True), "optax, by its rule": from_optax(params, False)}
    return (shared if shardings else alone) | theirs


# --- the update alone -------------------------------------------------------------------------------------------------


def placed(model, mesh, rules: str):
    """({"vision": shapes of the trunk}, where they live, everywhere)."""
    params = {"vision": models.abstract_params(model)}
    shardings = rules_lib.preset(rules).shardings(mesh, {"vision": models.logical_axes(model)}, params)
    return params, shardings, NamedSharding(mesh, PartitionSpec())


def laid(shapes, shardings):
    """`shapes` with where they live."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


def state_shardings(tx, params, shardings, everywhere):
    """A moment lives where its parameter does, counters everywhere."""
    places = flatten(shardings)

    def find(path, leaf):
        slash = slash_path(path)
        return next((at for known, at in places.items() if slash.endswith("/" + known) and leaf.ndim), everywhere)

    return jax.tree_util.tree_map_with_path(find, jax.eval_shape(tx.init, params))


def update_step(tx, shardings, state) -> Callable:
    """The jitted (grads, state, params) -> (params, state); `state`: where the optimiser's state lives."""

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, out_shardings=(shardings, state), donate_argnums=(1, 2))


def seconds_of(step: Callable, first, repeats: int) -> float:
    """The median of `repeats` calls of carry -> carry, after two that are not counted."""
    carry, took = first, []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        carry = jax.block_until_ready(step(carry))
        took.append(time.perf_counter() - began)
    return statistics.median(took[2:])


def seconds_of_update(tx, params, shardings, everywhere, repeats: int) -> float:
    where = state_shardings(tx, params, shardings, everywhere)
    fill = jax.jit(lambda: jax.tree.map(lambda x: 0.02 * jax.random.normal(jax.random.key(0), x.shape), params),
                   out_shardings=shardings)  # fmt: skip
    grads, step = fill(), update_step(tx, shardings, where)
    state = jax.jit(tx.init, out_shardings=where)(grads)
    return seconds_of(lambda carry: step(grads, carry[1], carry[0]), (fill(), state), repeats)


# --- reading compiled programs ----------------------------------------------------------------------------------------


def collectives(found: costs.Schedule) -> dict[str, dict[str, float]]:
    """kind -> how many, and MB of their results on a device; sums of a few scalars are left out."""
    rows: dict[str, dict[str, float]] = {}
    for t in costs.transfers(found, {}):
        grows = {"all-gather": t.members, "reduce-scatter": 1 / t.members}.get(t.kind, 1)
        if t.operand > 1000:
            entry = rows.setdefault(t.kind, {"count": 0, "MB": 0.0})
            entry["count"] += t.step.times
            entry["MB"] += t.step.times * t.operand * grows / 1e6
    return {kind: {"count": e["count"], "MB": round(e["MB"], 1)} for kind, e in rows.items()}


# --- the three modes --------------------------------------------------------------------------------------------------


def cogvit_l():
    return build.vision(config.load("experiments/cogvit_mim.py:size=l").model)


def compiled(args) -> list[dict]:
    model, rows = cogvit_l(), []
    for topology in args.topologies:
        described = topology_lib.parse(topology)
        devices, chip = described.devices, described.chip
        params, shardings, everywhere = placed(model, make_mesh({"fsdp": -1}, devices), "fsdp")
        for name, tx in variants(params, shardings).items():
            if args.variants and name not in args.variants:
                continue
            began, where = time.monotonic(), state_shardings(tx, params, shardings, everywhere)
            shapes, state = laid(params, shardings), laid(jax.eval_shape(tx.init, params), where)
            program = update_step(tx, shardings, where).lower(shapes, state, shapes).compile()
            found, flops = costs.schedule(hlo.parse(program.as_text())), program.cost_analysis()["flops"]
            estimate = sum(step.times * (costs.cycles(step.op) or 0) for step in found.steps) / chip.clock
            # Of the model's FLOPs alone, at half of peak.
            steps = {b: 3 * b * model.flops(PATCHES) / len(devices) / (0.5 * chip.flops) for b in args.batches}
            rows.append({
                "topology": topology, "variant": name, "TFLOP a device": round(flops / 1e12, 3),
                "estimated ms": round(estimate * 1e3, 2),
                "share of a step": {batch: round(estimate / (estimate + step), 5) for batch, step in steps.items()},
                "collectives": collectives(found),
                "temporary MB": round(program.memory_analysis().temp_size_in_bytes / 1e6, 1),
                "compile s": round(time.monotonic() - began, 1),
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def emulated(args) -> list[dict]:
    model, rows = cogvit.CogViTConfig(depth=16, width=128, heads=2, mlp=512, patch=14), []
    for rules in ("fsdp", "data"):
        params, shardings, everywhere = placed(model, make_mesh({"fsdp": 8}), rules)
        for name, tx in variants(params, shardings).items():
            took = seconds_of_update(tx, params, shardings, everywhere, args.repeats)
            rows.append({"rules": rules, "variant": name, "update s": round(took, 4)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def run(args) -> list[dict]:
    model, mesh = cogvit_l(), make_mesh({"data": 1}, jax.devices()[:1])
    params, shardings, everywhere = placed(model, mesh, "data")
    rows = []
    for name, tx in variants(params, None).items():
        if args.variants and name not in (*args.variants, STEP):
            continue
        took = seconds_of_update(tx, params, shardings, everywhere, args.repeats)
        rows.append({"variant": name, "update ms": round(took * 1e3, 2)})
        print(rows[-1], file=sys.stderr, flush=True)
    step = seconds_of_step(model, optim.build(groups("bfloat16"), params, 100_000), args.batch, args.repeats)
    rest = step - next(r["update ms"] for r in rows if r["variant"] == STEP) / 1e3
    print(f"a step with {STEP}: {step * 1e3:.1f} ms", file=sys.stderr, flush=True)
    share = lambda row: row["update ms"] / (row["update ms"] + rest * 1e3)  # noqa: E731
    return [row | {"batch": args.batch, "rest of the step ms": round(rest * 1e3, 1), "share": round(share(row), 4)}
            for row in rows]  # fmt: skip


def seconds_of_step(model, tx, batch: int, repeats: int) -> float:
    """A whole step on one device: forward, backward and update, on images at 224 px."""
    side = int(PATCHES**0.5)
    yx = jnp.stack(jnp.meshgrid(jnp.arange(side), jnp.arange(side), indexing="ij"), -1).reshape(PATCHES, 2)
    keys = jax.random.split(jax.random.key(0), 2)
    images = VisionInput(jax.random.normal(keys[0], (batch, PATCHES, model.patch_dim)),
                         jnp.tile(yx, (batch, 1, 1)), jnp.ones((batch, PATCHES), jnp.int32))  # fmt: skip
    target = jax.random.normal(keys[1], (batch, PATCHES, model.width))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry):
        params, state = carry
        loss = lambda p: jnp.square(cogvit.apply(model, p["vision"], images) - target).mean()  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = {"vision": models.init_params(model, jax.random.key(1))}
    return seconds_of(step, (params, jax.jit(tx.init)(params)), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("compiled", "emulated", "run"))
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x4", "v5e:8x8"])
    parser.add_argument("--variants", nargs="+", help="compiled, run: only these")
    parser.add_argument("--batches", type=int, nargs="+", default=[4096, 65_536], help="compiled: of the step")
    parser.add_argument("--batch", type=int, default=64, help="run: of the step")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", help="also write the JSON line there")
    args = parser.parse_args()
    rows = {"compiled": compiled, "emulated": emulated, "run": run}[args.mode](args)
    on = jax.devices()[0].device_kind if args.mode == "run" else f"{args.mode}, {platform.processor() or 'cpu'}"
    libraries = ("jax", "optax", *(["libtpu"] if args.mode == "compiled" else []))
    record = {"benchmark": "muon", "mode": args.mode, "on": on, "rows": rows} | {n: version(n) for n in libraries}
    emit(record, args.out)


if __name__ == "__main__":
    main()

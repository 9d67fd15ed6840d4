"""The real programs of a run, lowered for devices that are described: shapes only, nothing is allocated or read.

step       one training step of any stage, as `train.loop` compiles it
reference  another policy, brought from the host's memory, on the drawn tokens of a step       (stage 5)
prefill    one pass over a batch of prompts with their pictures, which fills the cache     (stages 3 to 5)
generate   that, and the loop that draws `max_new_tokens` tokens                           (stages 3 to 5)
decode     one turn of that loop, over caches of `prompt_tokens` + `max_new_tokens` slots  (stages 3 to 5)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glmv_jax.aot.topology import Topology
from glmv_jax.data import packing
from glmv_jax.inference import sampler
from glmv_jax.models import rounding, vlm
from glmv_jax.parallel import caches
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train import loop, lora, main, reference, teachers
from glmv_jax.train.stages.base import Stage
from glmv_jax.train.stages.rl import RL
from glmv_jax.train.stages.vlm import VLMStage
from glmv_jax.train.state import Placement
from glmv_jax.train.step import make_train_step
from glmv_jax.typing import Batch, Params, TokenInput, UserError

PROGRAMS = ("step", "reference", "prefill", "generate", "decode")


@dataclasses.dataclass(frozen=True)
class Program:
    """lower: makes it. params: jax.ShapeDtypeStruct with shardings, the state's. batch: shapes of the whole batch.

    flops: what the model needs for one call on all devices, recomputation not counted.
    """

    name: str
    stage: str
    lower: Callable[[], jax.stages.Lowered]
    mesh: Mesh
    rules: str
    params: Params
    batch: Batch
    flops: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """executable: None when the compiler refused, `error` says why."""

    program: Program
    executable: Any
    error: str
    lower_seconds: float
    compile_seconds: float


def of(cfg: Any, topology: Topology, name: str = "step") -> Program:
    """A program of this config on this topology. UserError when the config does not fit its devices."""
    if name not in PROGRAMS:
        raise UserError(f"--program {name}: choose one of {', '.join(PROGRAMS)}")
    stage = _stage(cfg)
    placement, optimizer, trainable = loop.prepare(stage, _mesh(cfg, topology))
    made = functools.partial(Program, name, stage.name, mesh=placement.mesh, rules=cfg.get("rules", "data"),
                             params=placement.abstract.params)  # fmt: skip
    if name not in ("step", "reference"):
        return _inference(stage, placement, made, name)
    batch = placement.batch_shapes(_largest_batch(stage))
    if name == "reference":
        return _reference(stage, placement, made, batch)
    put = lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s)  # noqa: E731
    constants = jax.tree.map(put, stage.constants(), placement.constants)
    step = make_train_step(stage, optimizer, placement, trainable=trainable, seed=cfg.seed)
    lower = functools.partial(step.lower, placement.abstract, constants, batch)
    return made(lower, batch=batch, flops=stage.flops(batch))


def _stage(cfg: Any) -> Stage:
    """The stage; public teachers of stage 1 whose path is not given have shapes for weights."""
    cls: Any = main.stage_class(cfg.stage)
    if cfg.stage == "mim":
        known = lambda name, entry, *rest: (teachers.make if entry.path else teachers.abstract)(name, entry, *rest)  # noqa: E731
        return cls(cfg, make=known)
    return lora.adapted(cls(cfg))


def _mesh(cfg: Any, topology: Topology) -> Mesh:
    """The config's on the topology's devices; several slices are copies of each other unless it says else."""
    sizes = dict(cfg.get("mesh", {"data": -1}))
    outer = dict(sizes.get("dcn", {}))
    if topology.slices > 1 and all(n == 1 for n in outer.values()):
        sizes["dcn"] = outer | {"data": topology.slices}
    return mesh_lib.make_mesh(sizes, topology.devices)


def _largest_batch(stage: Stage) -> Batch:
    """Of the shapes of batches the largest, which needs most memory."""
    shapes = list(stage.batch_shapes())
    if not shapes:
        raise UserError(
            f"stage {stage.name} does not know the shapes of its batches before it has read one; "
            "compile it without data.teacher_cache"
        )
    return max(shapes, key=lambda batch: sum(math.prod(x.shape) for x in batch.values()))


def _reference(stage: Stage, placement: Placement, made: Callable[..., Program], batch: Batch) -> Program:
    """Log-probabilities of a parked policy. The copies to the devices, which a run starts beforehand, are in it."""
    if not isinstance(stage, RL):
        raise UserError(f"stage {stage.name} asks no other policy what it says; --program reference is of stage 5")
    params = placement.abstract.params
    host = reference.on_host(params, jax.tree.map(lambda x: x.sharding, params))

    def run(parked: Params, batch: Batch) -> jax.Array:
        return stage.others.logprobs(jax.device_put(parked, jax.memory.Space.Device), batch)

    def lower() -> jax.stages.Lowered:
        with rules_lib.use(placement.mesh, placement.rules):
            return jax.jit(run, out_shardings=rules_lib.batch_sharding(placement.mesh)).lower(host, batch)

    return made(lower, batch=batch, flops=stage.flops(batch) / 3)


def _inference(stage: Stage, placement: Placement, made: Callable[..., Program], name: str) -> Program:
    if not isinstance(stage, VLMStage):
        raise UserError(f"stage {stage.name} does not answer prompts; {', '.join(PROGRAMS[1:])} are of stages 3 to 5")
    cfg, asker = stage.cfg, stage.asker
    rows = cfg.get("rollout", {}).get("prompts") or cfg.eval.get("batch", cfg.batch)
    row = packing.Row(asker.max_tokens, asker.max_patches, asker.patcher.channels).arrays()
    shape = lambda x: jax.ShapeDtypeStruct((rows, *np.shape(x)), x.dtype)  # noqa: E731
    scalar = np.zeros((), np.int32)
    row |= {"length": scalar, "next_position": scalar}
    batch = placement.batch_shapes({name: shape(x) for name, x in row.items()})
    prompts, params = sampler.Prompts.of(batch), _as_served(stage, placement.abstract.params)
    T, P = batch["tokens"].shape[1], batch["frame"].shape[1]
    drawing, group = _drawing(stage)
    model = dataclasses.replace(stage.model, mtp=None)
    prefill = model.flops(rows * T, T / 2, rows, P)
    step = model.flops(rows * group, T + drawing.max_new_tokens / 2, 0, 0)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=placement.replicated)
    more: dict[str, Any] = {}
    run: Callable = functools.partial(sampler.prefill, stage.model)
    args: tuple = (params, prompts)
    flops = prefill
    if name == "generate":
        run, args = functools.partial(sampler.sample, stage.model, drawing, group), (params, prompts, key)
        flops = prefill + step * drawing.max_new_tokens
    elif name == "decode":
        cache = _cache_shapes(stage.model, rows * group, T + drawing.max_new_tokens, placement)
        number = jax.ShapeDtypeStruct((rows * group,), np.int32)
        last = placement.batch_shapes({"token": number, "position": number})
        run, args, flops = functools.partial(_next_token, stage.model, drawing), (params, cache, last, key), step
        more = {"donate_argnums": 1, "out_shardings": (jax.tree.map(lambda x: x.sharding, cache), None, None)}

    def lower() -> jax.stages.Lowered:
        with rules_lib.use(placement.mesh, placement.rules):
            return jax.jit(run, **more).lower(*args)

    return made(lower, batch=batch, flops=flops)


def _as_served(stage: VLMStage, params: Params) -> Params:
    """In the types that the engine has them in; a policy that learns answers with its own."""
    if isinstance(stage, RL):
        return params
    put = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)  # noqa: E731
    return jax.tree.map(put, params, rounding.used(stage.model))


def _next_token(
    model: vlm.VLMConfig, drawing: sampler.Sampling, params: Params, cache: Params, last: Batch, key: jax.Array
) -> tuple:
    """(cache, token, its log-probability): a turn of `sampler.sample`'s loop for rows that hold their own prompts."""
    N = len(last["token"])
    positions_N13 = jnp.broadcast_to(last["position"][:, None, None], (N, 1, 3))
    ones_N1 = jnp.ones((N, 1), jnp.int32)
    out = vlm.apply(model, params, None, TokenInput(last["token"][:, None], positions_N13, ones_N1, -ones_N1), cache)
    logits_NV = vlm.logits(model, params, out.hidden)[:, 0]
    return out.cache, *sampler.choose(logits_NV, jax.random.split(key, N), drawing)


def _cache_shapes(model: vlm.VLMConfig, rows: int, slots: int, placement: Placement) -> Params:
    """With rows where those of a batch are, axis 1 behind the layers'; or, of a dense decoder, rows and heads."""

    def put(x: Any) -> jax.ShapeDtypeStruct:
        kept = caches.spec(placement.mesh, placement.rules, heads=x.ndim > 1 and x.shape[1] > rows)
        where = NamedSharding(placement.mesh, PartitionSpec(None, *kept)) if x.ndim > 2 else placement.replicated
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(put, jax.eval_shape(lambda: vlm.init_cache(model, rows, slots)))


def _drawing(stage: VLMStage) -> tuple[sampler.Sampling, int]:
    """How the stage samples, and how many answers to a prompt."""
    own = getattr(stage, "sampler", None)  # stage 5's
    if own is not None:
        return own.sampling, own.group
    length = stage.cfg.eval.get("max_new_tokens", 64)
    return sampler.Sampling.chat(stage.tokenizer, length), 1


def compiled(program: Program, options: Mapping[str, str] | None = None) -> Compiled:
    """Compiles it. options: XLA's, by name. A program that does not fit its devices' memory is a result, no error."""
    began = time.monotonic()
    lowered = program.lower()
    between = time.monotonic()
    try:
        executable, error = lowered.compile(compiler_options=dict(options or {})), ""
    except jax.errors.JaxRuntimeError as refused:
        if "RESOURCE_EXHAUSTED" not in str(refused):
            raise
        executable, error = None, str(refused)
    return Compiled(program, executable, error, between - began, time.monotonic() - between)

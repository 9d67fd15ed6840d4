"""Runs one stage from its config: the folder, the records of how it was made, and then the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from glmv_jax.config import flat, nearest
from glmv_jax.eval import datasets
from glmv_jax.parallel.host import prepare_memory
from glmv_jax.train import checkpoint, loop, lora, weights
from glmv_jax.train import state as state_lib
from glmv_jax.train.checkpoint import quiet_orbax
from glmv_jax.train.disk import disk_errors, write_json
from glmv_jax.train.stages.base import Stage
from glmv_jax.typing import UserError

# Imported when used: a stage brings its data, its models and whatever those need.
STAGES = {
    "mim": "glmv_jax.train.stages.mim:MIM",
    "siglip": "glmv_jax.train.stages.siglip:SigLIP",
    "pretrain": "glmv_jax.train.stages.pretrain:Pretrain",
    "sft": "glmv_jax.train.stages.sft:SFT",
    "rl": "glmv_jax.train.stages.rl:RL",
}

# Packages whose versions meta.json has, beside glmv_jax and jax.
RECORDED = ("flax", "grain", "jaxlib", "numpy", "optax", "orbax-checkpoint")


def run(cfg: Any, workdir: str | Path, profile: str | None = None) -> dict[str, Any]:
    """Trains `cfg.stage` in `workdir` (made when missing; resumed when begun) and returns what results.json holds.

    With `cfg.match_wall`, the workdir of a finished run, max_seconds is what the steps of that run took.
    Compiled programs are kept in `cfg.compilation_cache` ("" for nowhere), so a resumed run does not compile again.
    profile: steps to trace, see `train.profile`.

    Raises: UserError, and loop's Interrupted.
    """
    quiet_orbax()
    prepare_memory()
    workdir = Path(workdir).expanduser().absolute()
    keep_compiled_programs(cfg.get("compilation_cache", ""))
    if cfg.get("match_wall", ""):
        cfg.max_seconds = _train_seconds(cfg.match_wall)
    if "faults" in cfg and not cfg.faults:
        cfg.faults = str(workdir / "faults.jsonl")
    stage = lora.adapted(stage_class(cfg.stage)(cfg))
    with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    _write_records(stage, workdir)
    return loop.train(stage, workdir, profile)


def _train_seconds(run_dir: str) -> float:
    """How long the steps of a finished run took."""
    path = Path(run_dir) / "results.json"
    if not path.is_file():
        raise UserError(f"match_wall={run_dir}: that run has not finished (no results.json); train it first")
    return json.loads(path.read_text(encoding="utf-8"))["train_seconds"]


def stage_class(name: str) -> type[Stage]:
    """The class of a stage; UserError names the nearest one."""
    if name not in STAGES:
        raise UserError(f"stage={name!r} is not known{nearest(name, STAGES)}")
    module, _, cls = STAGES[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def evaluate(workdir: str | Path) -> dict[str, float]:
    """Evaluates the run in `workdir` again, in full, from its newest checkpoint.

    Raises: UserError when there is no such run or nothing in it can be read.
    """
    workdir = Path(workdir).expanduser().absolute()
    with _config_of(workdir) as cfg:
        if cfg.get("match_wall", ""):
            cfg.max_seconds = _train_seconds(cfg.match_wall)
        stage = lora.adapted(stage_class(cfg.stage)(cfg))
        placement, _, _ = loop.prepare(stage)
        checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", cfg.get("keep", 2))
        restored = checkpoints.restore(placement.abstract)
        checkpoints.close()
        if restored is None:
            raise UserError(f"{workdir} has no checkpoint yet; train it first")
        state, _ = restored
        constants = jax.device_put(stage.constants(), placement.constants)
        extra = stage.begin(placement, constants, state.extra, fresh=False)
        return stage.evaluate(state_lib.evaluated(cfg, state), extra, full=True)


def evaluate_data(
    workdir: str | Path, root: str | Path, names: Sequence[str] = (), settings: Mapping[str, Any] | None = None, *,
    limit: int = 0, patches: int = 0, batch: int = 256, say: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The report on a stage-1 or stage-2 run and the data sets in `root` (all, or those named), as JSON can hold it.

    settings: fields of `datasets.Settings`. Measures that are not given are those that need no fitting.
    limit, say: as `datasets.Evaluation.folder` has them; patches, batch: as `Stage.as_towers`.
    Raises: UserError when there is no such run, it is of another stage, or there are no such data.
    """
    workdir = Path(workdir).expanduser().absolute()
    with _config_of(workdir) as cfg:
        stage = stage_class(cfg.stage)(cfg)
        towers = stage.as_towers(patches=patches, batch=batch)
        settings = datasets.Settings(**{"measures": datasets.default_measures(towers), **(settings or {})})
        evaluation = datasets.Evaluation(towers, settings)
        datasets.chosen(root, names)  # before the weights are read, which may take long
        shapes = jax.eval_shape(stage.init_params, jax.random.key(0))
        shardings = towers.rules.shardings(towers.mesh, stage.logical_axes(), shapes)
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        saved = checkpoint.newest(workdir, finished=False)
        params = weights.load(workdir, like=like, finished=False)
        report = evaluation.folder(params, root, names, limit=limit, say=say)
        about = {
            "run": str(workdir), "stage": stage.name, "step": int(saved.name), "root": str(root), **_versions(),
            "date": _now(), "patches": towers.patcher.max_patches, "batch": batch, "limit": limit,
            "settings": dataclasses.asdict(settings),
        }  # fmt: skip
        wanted = cfg.get("eval", {})
        targets = {"targets": dict(wanted.get("targets", {})), "targets_from": wanted.get("targets_from", "")}
        return about | report | targets


@contextlib.contextmanager
def _config_of(workdir: Path) -> Iterator[Any]:
    """The config of a run that is to be evaluated; a key that it lacks is said in one line."""
    quiet_orbax()
    cfg = checkpoint.load_config(workdir)
    try:
        yield cfg
    except (AttributeError, KeyError) as error:
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        key = str(error).strip("\"'").split("\n")[0]
        raise UserError(
            f"{workdir / 'config.json'} lacks {key}: it is of another version of glmv_jax; evaluate it with that "
            "version, or add the key with the value that its experiment file has today"
        ) from error


def keep_compiled_programs(folder: str) -> None:
    """In that folder, for every process that compiles them again; "" for nowhere."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        compilation_cache.reset_cache()  # jax decides once whether there is a cache, at its first compilation


def _write_records(stage: Stage, workdir: Path) -> None:
    """config.json and meta.json: what it takes to repeat the run. Says which values an earlier attempt had other."""
    if jax.process_index():
        return
    path = workdir / "config.json"
    config = json.loads(json.dumps(flat(stage.cfg)))
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = config
    changed = [k for k in sorted(config.keys() | before.keys()) if config.get(k) != before.get(k)]
    if changed:
        shown = ", ".join(f"{k}: {before.get(k)} -> {config.get(k)}" for k in changed[:5])
        print(f"{stage.name}: the config has changed since this run began: {shown}{' ...' if len(changed) > 5 else ''}")
    write_json(path, config)

    shapes = jax.eval_shape(stage.init_params, jax.random.key(0))
    meta = {
        "stage": stage.name,
        **_versions(),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in RECORDED},
        "processes": jax.process_count(),
        "host": {
            "cores": os.cpu_count(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
        },
        "started": _now(),
        "params": sum(x.size for x in jax.tree.leaves(shapes)),
    }
    write_json(workdir / "meta.json", meta)


def _versions() -> dict[str, Any]:
    devices = [f"{d.platform}:{d.device_kind}" for d in jax.devices()]
    return {"glmv_jax": _version("glmv_jax"), "jax": jax.__version__, "devices": devices}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "source"


def commit(folder: Path | None = None) -> str | None:
    """The commit of the source tree that a package (by default this one) is run from, "+ changes" behind it where files
    that git knows differ from it. None for a package that was installed, or where there is no git."""
    folder = folder or Path(__file__).resolve().parents[1]

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # say, an environment inside of some other repository
        return None
    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return f"{head} + changes" if head and changes else head

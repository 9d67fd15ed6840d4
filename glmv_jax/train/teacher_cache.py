"""`glmv cache-teachers`: the teachers of stage 1 see once what training will read, and their features are kept.

The crops are those of the training itself (an item is a function of the seed, the host and its index), so a cache is
written for a number of hosts, and read by position. What is on disk, and how it is read: `data.features`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmv_jax.data import features
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train import teachers
from glmv_jax.train.disk import disk_errors, size_text, write_json
from glmv_jax.train.metrics import Meter, Progress
from glmv_jax.train.stages import mim
from glmv_jax.typing import Params, UserError

_DEAD = 3600  # seconds after which a file that is being written is taken for one of a writer that was killed

File = tuple[str, int, int]  # split, host, number


@dataclasses.dataclass(frozen=True)
class Plan:
    """items: split -> crops of each host, in whole files of `rows`. patches: of a crop. crop_bytes: of its features."""

    hosts: int
    items: dict[str, int]
    rows: int
    patches: int
    crop_bytes: int

    def part(self, p: int, n: int) -> range:
        """Which files the p-th of n writers writes, of all files in a row."""
        files = self.hosts * sum(self.items.values()) // self.rows
        return range(files * (p - 1) // n, files * p // n)

    def file(self, i: int) -> File:
        """The i-th of all files."""
        for split, items in self.items.items():
            each = items // self.rows
            if i < self.hosts * each:
                return split, i // each, i % each
            i -= self.hosts * each
        raise IndexError(i)


def write(cfg: Any, out: str | Path, *, items: int = 0, hosts: int = 1, part: tuple[int, int] = (1, 1)) -> None:
    """Writes the features that a run of `cfg` on `hosts` hosts needs, or goes on with it.

    Args:
      items: crops of the training, of all hosts together; 0: all that its steps read. Rounded up to whole files.
        A run that reads more sees the same crops again, with other masks. Asked for more than there are, the cache
        grows; for fewer, the rest stays unused.
      part: (p, n): only the p-th of n parts, for n machines that write at the same time.
    Raises:
      UserError: another stage, a folder with another cache, too little room on the disk.
    """
    if cfg.stage != "mim":
        raise UserError(f"only stage mim has teachers, this config is of stage {cfg.stage!r}; give cogvit_mim.py")
    if hosts < 1 or items < 0 or not 1 <= part[0] <= part[1]:
        raise UserError(f"items={items}, hosts={hosts}, part={part[0]}/{part[1]}: hosts and parts count from 1")
    out = Path(out).expanduser().absolute()
    cfg.data.teacher_cache, cfg.faults = "", cfg.faults or str(out / "faults.jsonl")
    stage = mim.MIM(cfg)
    plan = _plan(stage, items or cfg.steps * cfg.batch, hosts)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        share, there = plan.part(*part), sum(1 for _ in out.rglob("*.safetensors"))
        needed, free = (len(share) - there) * plan.rows * plan.crop_bytes, shutil.disk_usage(out).free
        if needed > free:  # before anything is listed: a slip in --items may ask for more files than memory holds
            raise UserError(f"{out}: {size_text(needed)} of features are to be written and {size_text(free)} are free; "
                            "choose fewer --items or another --out")
        _record(stage, plan, out)
        for part_file in out.rglob("*.part"):
            if time.time() - part_file.stat().st_mtime > _DEAD:
                part_file.unlink()
        todo = [file for file in map(plan.file, share) if not _path(out, file).exists()]
        progress = Progress("teachers", len(todo), headline="MB")
        progress.say(f"{len(todo) * plan.rows:,} crops in {len(todo)} files, {plan.crop_bytes:,} bytes a crop, "
                     f"{size_text(len(todo) * plan.rows * plan.crop_bytes)} in all")
        with contextlib.closing(progress):
            _write(stage, plan, todo, out, progress)
    progress.say(f"written; train with --config.data.teacher_cache={out}")


def _plan(stage: mim.MIM, items: int, hosts: int) -> Plan:
    c = stage.cfg
    patches = (c.data.size // stage.model.vision.patch) ** 2
    crop_bytes = 2 * patches * sum(t.channels for t in stage.teachers) + features.KEY
    rows = features.rows_per_file(crop_bytes)
    each = lambda n: -(-n // (hosts * rows)) * rows  # crops of a host, for n of all hosts  # noqa: E731
    return Plan(hosts, {"heldout": each(c.eval.batches * c.batch), "train": each(items)}, rows, patches, crop_bytes)


def _record(stage: mim.MIM, plan: Plan, out: Path) -> None:
    """cache.json; UserError when the folder holds another cache. Its items may change: they are how many are used."""
    facts = stage.facts(plan.hosts)
    for t in stage.teachers:
        facts |= teachers.facts(t.name, stage.cfg.teachers[t.name], teachers.digest(t.params))
    about = {t.name: {"channels": t.channels, "about": t.about} for t in stage.teachers}
    if (out / "cache.json").exists():
        old = features.FeatureCache(out)
        old.check(facts)
        if set(old.teachers) != set(about):
            raise UserError(f"{out} is a cache of the teachers {', '.join(sorted(old.teachers))}; give another --out")
    write_json(out / "cache.json", {"facts": facts, "items": plan.items, "rows": plan.rows, "teachers": about})


def _path(out: Path, file: File) -> Path:
    split, host, number = file
    return out / features.folder(split, host) / features.file_name(number)


# --- the work ---------------------------------------------------------------------------------------------------------


def _write(stage: mim.MIM, plan: Plan, todo: list[File], out: Path, progress: Progress) -> None:
    """Each file in turn; while one is written the teachers see the crops of the next."""
    see, flops = _seeing(stage), sum(t.flops for t in stage.teachers)
    meter, waiting = Meter(), []

    def finish(done: int, file: File, batch: Any, made: Any, waited: float) -> None:
        path = _path(out, file)
        path.parent.mkdir(exist_ok=True)
        ids = (id_.decode(errors="surrogateescape") for id_ in batch["id"])
        features.write_file(path, jax.device_get(made), batch["key"], ids)
        meter.step(waited, {"samples": plan.rows, "tokens": plan.rows * plan.patches}, plan.rows * flops)
        size = done * plan.rows * plan.crop_bytes / 1e6
        progress.update(done, {"MB": size}, meter.rates(), last=done == len(todo))

    for done, (file, batch, waited) in enumerate(_crops(stage, plan, todo), 1):
        waiting.append((done, file, batch, see(batch["image"]), waited))
        if len(waiting) > 1:
            finish(*waiting.pop(0))
    for last in waiting:
        finish(*last)


def _seeing(stage: mim.MIM) -> Callable:
    """images [rows, S, S, 3] -> name -> [rows, P, C] bfloat16, with rows and parameters where the config wants them."""
    mesh, rules = stage.place()
    rows = rules_lib.batch_sharding(mesh)
    axes: Any = stage.constant_axes()
    constants = jax.device_put(stage.constants(), rules.shardings(mesh, axes, stage.constants()))

    @jax.jit
    def see(constants: Params, images: jax.Array) -> dict[str, jax.Array]:
        return {t.name: t.apply(constants[t.name], images).astype(jnp.bfloat16) for t in stage.teachers}

    def placed(images: np.ndarray) -> Any:
        mesh_lib.check_batch(len(images), mesh)
        with rules_lib.use(mesh, rules):
            return see(constants, jax.device_put(images, rows))

    return placed


def _crops(stage: mim.MIM, plan: Plan, todo: list[File]) -> Iterator[tuple[File, Any, float]]:
    """Each file with its crops and the seconds that they took to come."""
    data: Any = None
    stream, expected = None, 0
    with contextlib.ExitStack() as open_streams:
        for split, host, number in todo:
            if stream != (split, host):
                open_streams.close()
                reading = mim.reading(stage.cfg, split, host, plan.hosts)
                data = stage.batches(split, reading, plan.rows, keys=True)
                open_streams.callback(data.close)
                stream, expected = (split, host), 0
            if number != expected:  # files before this one are there already
                data.set_state({"next_index": number})
            began = time.monotonic()
            yield (split, host, number), next(data), time.monotonic() - began
            expected = number + 1

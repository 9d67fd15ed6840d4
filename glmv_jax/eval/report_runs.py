"""Several runs beside each other: which folders are meant, what the runs are called, and what they have in common."""

from __future__ import annotations

import collections
import pathlib
import re
import signal
from collections.abc import Iterable, Sequence
from typing import Any

from glmv_jax.eval.report_run import STAGES, StageRun, is_number, is_run, read_stage
from glmv_jax.eval.report_tables import quantity
from glmv_jax.typing import UserError

DEEP = ("*", "*/*")  # where a folder of runs may have them: stages of a recipe, runs of a sweep
REASONS = 12  # kinds of faults that are told apart
# Keys of a config that say where a run keeps its own records, and nothing about the run.
LOCAL = ("faults",)


def find(paths: Sequence[pathlib.Path]) -> list[StageRun]:
    """The runs that are meant: work directories as they are given, and those in a folder of them, each once. Their
    names are the shortest ends of their paths that tell them apart.

    Raises:
        UserError: no such folder, or no run in it.
    """
    folders: dict[pathlib.Path, pathlib.Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"no run directory {path}; give work directories of glmv train, or folders of them")
        inside = [path] if is_run(path) else _inside(path)
        if not inside:
            raise UserError(f"{path} is no run, nor a folder of runs: nothing there has metrics.jsonl or meta.json; "
                            "give the --workdir of a glmv train")  # fmt: skip
        folders |= {folder.resolve(): folder for folder in inside if folder.resolve() not in folders}
    return [read_stage(name, folder) for name, folder in zip(names(list(folders)), folders.values())]


def _inside(path: pathlib.Path) -> list[pathlib.Path]:
    order = {name: i for i, name in enumerate(STAGES)}
    for pattern in DEEP:
        found = [folder for folder in path.glob(pattern) if folder.is_dir() and is_run(folder)]
        if found:
            return sorted(found, key=lambda folder: (order.get(folder.name, len(order)), folder))
    return []


def names(folders: Sequence[pathlib.Path]) -> list[str]:
    """runs/a/sft, runs/b/sft, runs/a/rl -> a/sft, b/sft, rl."""
    found = []
    for folder in folders:
        parts = folder.parts
        ends = ("/".join(parts[-n:]) for n in range(1, len(parts) + 1))
        others = [other.parts for other in folders if other != folder]
        found.append(next(e for n, e in enumerate(ends, 1) if all(other[-n:] != parts[-n:] for other in others)))
    return found


def by_stage(runs: Iterable[StageRun]) -> dict[str, list[StageRun]]:
    """In the order of the recipe; "" for runs that do not say it."""
    groups: dict[str, list[StageRun]] = {}
    for run in runs:
        groups.setdefault(run.stage, []).append(run)
    order = {name: i for i, name in enumerate(STAGES)}
    return dict(sorted(groups.items(), key=lambda item: order.get(item[0], len(order))))


# --- what they differ in ----------------------------------------------------------------------------------------------

MISSING = object()  # a key that a config does not have


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Full name of a key -> its value in each config, MISSING where there is none, for the keys that differ."""
    keys = sorted(set().union(*configs) - set(LOCAL))
    table = {key: [config.get(key, MISSING) for config in configs] for key in keys}
    return {key: values for key, values in table.items() if any(not _same(values[0], x) for x in values[1:])}


def _same(a: Any, b: Any) -> bool:
    """As JSON writes them: 1 is not True; nor is 1 the float 1.0 that a key holds which was float before."""
    return type(a) is type(b) and a == b and repr(a) == repr(b)


def environment(run: StageRun) -> dict[str, str]:
    """What the run was made with, a line a fact."""
    meta, host = run.meta, run.meta.get("host", {})
    devices = [meta["devices"]] if isinstance(meta.get("devices"), str) else meta.get("devices") or []
    counted = collections.Counter(map(str, devices)) if isinstance(devices, list) else {str(devices): 1}
    facts = {
        "glmv_jax": meta.get("glmv_jax"),
        "commit": meta.get("commit"),
        "jax": meta.get("jax"),
        **dict(sorted(meta.get("versions", {}).items())),
        "devices": ", ".join(f"{count} x {name}" for name, count in counted.items()),
        "processes": meta.get("processes"),
        "system": host.get("system"),
        "cores": host.get("cores"),
        "memory": f"{host['memory'] / 2**30:.1f} GiB" if is_number(host.get("memory")) else "",
        "parameters": quantity(meta.get("params")) if meta.get("params") else "",
        "started": meta.get("started"),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


# --- what went wrong --------------------------------------------------------------------------------------------------


def faults(run: StageRun) -> dict[str, int]:
    """What befell a run -> how often; what never happened is left out."""
    found: collections.Counter[str] = collections.Counter()
    reasons = collections.Counter(_kind(row) for row in _each_once(run.faults))
    for reason, count in reasons.most_common(REASONS):
        found[f"record left out: {reason}"] = count
    found["record left out: other reasons"] = sum(reasons.values()) - sum(found.values())
    logged = sum(bool(row.get("skipped")) for row in run.rows("train"))
    found["update left out: not finite"] = int(max(run.results.get("skipped", 0), logged, len(run.skipped)))
    found["loss spike"] = len(run.rows("spike"))
    signals = [row["signal"] for row in run.attempts if is_number(row.get("signal"))]
    for number in signals:
        found[f"stopped by {_signal(number)}"] += 1
    restarts = max(0, run.time.get("attempts", 1) - 1)
    found["restart"] = restarts
    found["restart after a kill or an error"] = max(0, restarts - len(signals))
    return {name: count for name, count in found.items() if count}


def _each_once(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record that was read again after a resume, or in a later epoch, counts once."""
    return list({tuple(str(row.get(name)) for name in ("source", "index", "id")): row for row in rows}.values())


def _kind(row: dict[str, Any]) -> str:
    """The reason without what is of one record alone: names, numbers and addresses become "…"."""
    reason = " ".join(str(row.get("reason", "no reason given")).split())
    return re.sub(r"'[^']*'|\"[^\"]*\"|<[^>]*>|\S*/\S+|\b0x[0-9a-f]+\b|\d+(\.\d+)?", "…", reason)[:100]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a signal to another process"


def spiked(row: dict[str, Any]) -> str:
    """The metric that a row of kind "spike" is about."""
    return next((name for name in ("loss", "grad_norm") if name in row), "?")


def seen(run: StageRun) -> dict[str, dict[str, float]]:
    """source -> {"samples", "tokens"} that were trained on; of a run under way the samples alone, by its last row; {}
    of one that did not count them."""
    if sources := run.results.get("sources"):
        return {name: {key: x for key, x in row.items() if is_number(x)} for name, row in sources.items()}
    last = run.rows("train")[-1] if run.rows("train") else {}
    return {name.removeprefix("seen/"): {"samples": x} for name, x in last.items()
            if name.startswith("seen/") and is_number(x)}  # fmt: skip


def planned(run: StageRun) -> dict[str, float]:
    """source -> its share by the weights of the config; {} where there is more to it."""
    weights = {key.removeprefix("data.weights."): x for key, x in run.config.items()
               if key.startswith("data.weights.") and is_number(x) and x > 0}  # fmt: skip
    files = any(key.startswith("data.sources.") and value for key, value in run.config.items())
    total = sum(weights.values())
    return {} if files or not total else {name: x / total for name, x in weights.items()}

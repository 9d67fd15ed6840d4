"""A compiled program as a report: a dict that JSON holds. Every time in it is a compiler's estimate, none was measured.

Keys: `fits`, `peak_hbm_bytes`, `hbm_limit_bytes` of a device and `host_bytes` of a host; `flops` of a device, those of
products with loops counted, and `model_flops`, what the model needs; `estimated_compute_seconds`, the cycles that the
compiler gives the TensorCore and, as custom kernels have none, what these take at peak; `fraction_of_peak`, the model's
FLOPs at peak over that: an upper bound, as no transfer counts in it. `collectives` by kind and mesh axes, with the
share that is started early and waited for later. `roofline`: seconds of the FLOPs at the chip's peak, of memory at its
full speed, and of transfers over the links of one torus axis or of all.
"""

from __future__ import annotations

import collections
import datetime
import importlib.metadata
import math
import re
import resource
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from glmv_jax.aot import costs, hazards, hlo
from glmv_jax.aot.program import Compiled, Program
from glmv_jax.aot.topology import Topology
from glmv_jax.parallel.scopes import part

NOTE = "compiler estimates, nothing was run; they compare variants, and a difference under a quarter means little"
SHOWN = 12  # of the largest tensors, copies and parts
_REFUSED = re.compile(r"([\d.]+)([KMG])[^\d]{1,40}?([\d.]+)([KMG])")


def build(compiled: Compiled, topology: Topology, about: Mapping[str, Any]) -> dict[str, Any]:
    """The report. about: what the caller says of the run, its config above all."""
    program, used = compiled.program, resource.getrusage(resource.RUSAGE_SELF)
    report = dict(about) | {
        "note": NOTE, "program": program.name, "stage": program.stage, "topology": topology.name,
        "slices": topology.slices, "devices": len(topology.devices), "mesh": dict(program.mesh.shape),
        "rules": program.rules, "batch": {name: list(x.shape) for name, x in program.batch.items()},
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(program.params)),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model_flops": program.flops / len(topology.devices),
        "lower_seconds": round(compiled.lower_seconds, 1), "compile_seconds": round(compiled.compile_seconds, 1),
        "compile_memory_bytes": used.ru_maxrss << 10, "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "hbm_limit_bytes": topology.chip.hbm,
    }  # fmt: skip
    if compiled.executable is None:
        return report | _refused(compiled.error)
    report |= memory(compiled.executable.memory_analysis(), topology)
    slices = [getattr(d, "slice_index", 0) for d in program.mesh.devices.flat] if topology.slices > 1 else ()
    return report | of_text(compiled.executable.as_text(), topology, program, slices)


def _refused(error: str) -> dict[str, Any]:
    """Of a program that the compiler gives no memory for: how much it asks for, and what takes it."""
    first = next((line for line in error.splitlines() if "RESOURCE_EXHAUSTED" in line), error[:300])
    found = _REFUSED.search(error)
    peak = float(found[1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[found[2]] if found else None
    return {
        "fits": False, "error": error[:4000], "peak_hbm_bytes": peak, "host_bytes": None, "flops": None,
        "estimated_compute_seconds": None, "fraction_of_peak": None, "collectives": [], "async_wire_fraction": None,
        "warnings": [f"the compiler refuses it: {first[:300]}"],
    }  # fmt: skip


def memory(stats: Any, topology: Topology) -> dict[str, Any]:
    """Of a device, and what its host holds for all of its own."""
    host = stats.host_argument_size_in_bytes + stats.host_output_size_in_bytes + stats.host_temp_size_in_bytes
    host -= stats.host_alias_size_in_bytes
    return {
        "fits": stats.peak_memory_in_bytes <= topology.chip.hbm,
        "peak_hbm_bytes": stats.peak_memory_in_bytes,
        "hbm": {
            "arguments": stats.argument_size_in_bytes, "results": stats.output_size_in_bytes,
            "of these in place": stats.alias_size_in_bytes, "temporaries": stats.temp_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
        },
        "host_bytes": host * topology.devices_per_host,
    }  # fmt: skip


def of_text(
    text: str, topology: Topology, program: Program | None = None, slices: Iterable[int] = ()
) -> dict[str, Any]:
    """What the program's text tells; `program` gives the mesh's names and what hazards are looked for with."""
    chip = topology.chip
    found = costs.schedule(hlo.parse(text))
    mesh = dict(program.mesh.shape) if program else {"device": found.module.partitions}
    moved = costs.transfers(found, mesh, tuple(slices))
    counted = _count(found, chip)
    compute = sum(counted["estimated_seconds"].values())
    known = _known(program) if program else hazards.Known({})
    report = counted | {
        "estimated_compute_seconds": compute, **_wire(moved), "loops": found.loops,
        "loops_of_unknown_length": len(found.unknown), "warnings": hazards.warnings(found, moved, known),
        "largest_tensors": largest_tensors(found), "program_bytes": len(text),
    }  # fmt: skip
    ideal = (program.flops / program.mesh.size if program else counted["flops"]) / chip.flops
    within = sum(t.total for t in moved if not t.slices)
    roof = {"compute": counted["flops"] / chip.flops, "memory": counted["memory_bytes"] / chip.hbm_speed}
    if chip.ici is not None and chip.ici_axis is not None:
        roof |= {"transfers, links of one axis": within / chip.ici_axis, "transfers, all links": within / chip.ici}
    return report | {"fraction_of_peak": ideal / compute if compute else None, "ideal_seconds": ideal, "roofline": roof}


def _known(program: Program) -> hazards.Known:
    sharded: dict[tuple[int, ...], tuple[str, ...]] = {}
    for x in jax.tree.leaves(program.params):
        axes = tuple(a for entry in x.sharding.spec if entry for a in ((entry,) if isinstance(entry, str) else entry))
        if axes and len(x.shape) > 1:
            sharded[x.shape] = axes
            if len(x.shape) > 2:
                sharded[x.shape[1:]] = axes
    patches = program.batch.get("patches")
    if patches is None:
        return hazards.Known(sharded)
    positions, width = patches.shape[1:]
    return hazards.Known(sharded, positions, frozenset({width, 2 * width}))


# --- parts ------------------------------------------------------------------------------------------------------------


def _count(found: costs.Schedule, chip: Any) -> dict[str, Any]:
    """FLOPs, seconds and memory traffic of all steps: by category, by part of the model, the largest copies."""
    seconds = dict.fromkeys(costs.CATEGORIES, 0.0)
    parts: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    copies: collections.Counter[tuple[str, str]] = collections.Counter()
    silent: collections.Counter[str] = collections.Counter()
    beside: collections.Counter[str] = collections.Counter()
    flops = traffic = kernels = 0.0
    for step in found.steps:
        kind, count = costs.category(found.module, step.op), step.times * costs.flops_of(found.module, step)
        estimate = costs.cycles(step.op)
        took = step.times * (estimate or 0) / chip.clock
        if kind == "custom kernel" and estimate is None:
            kernels += count / chip.flops
            took = count / chip.flops
        flops += count
        traffic += step.times * costs.traffic(found.module, step)
        if estimate is None and step.op.opcode not in _FREE and not step.op.opcode.endswith("-done"):
            silent[step.op.attribute(r'custom_call_target="(\w+)"') or step.op.opcode] += step.times
        if step.thread:
            beside[step.thread] += took
            continue
        seconds[kind] += took
        name = part(step.op.scope)
        parts[name][0] += count
        parts[name][1] += took
        if kind == "copies and layout" and took:
            shape = str(step.op.arrays[0]) if step.op.arrays else ""
            copies[" ".join(name).strip(), f"{step.op.opcode} {shape}"] += took
    ordered = sorted(parts.items(), key=lambda item: -item[1][1])
    return {
        "flops": flops, "memory_bytes": traffic, "estimated_seconds": seconds, "seconds_on_other_cores": dict(beside),
        "kernel_seconds_at_peak": kernels, "without_estimate": dict(silent.most_common()),
        "parts": [{"part": n, "pass": way, "flops": f, "seconds": s} for (n, way), (f, s) in ordered],
        "largest_copies": [{"part": n, "operation": o, "seconds": s} for (n, o), s in copies.most_common(SHOWN)],
    }  # fmt: skip


_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "call-start",
         "async-start", "after-all", "partition-id", "replica-id")  # fmt: skip


def _wire(moved: list[costs.Transfer]) -> dict[str, Any]:
    """Bytes that a device sends, by kind and axes."""
    rows: dict[tuple[str, str, bool], dict[str, float]] = {}
    for t in moved:
        key = (t.kind, "+".join(t.axes) or "-", t.slices)
        row = rows.setdefault(key, {"count": 0, "devices": t.members, "bytes": 0.0, "asynchronous": 0.0, "hidden": 0.0})
        row["count"] += t.step.times
        row["bytes"] += t.total
        row["asynchronous"] += t.total * t.asynchronous
        row["hidden"] += t.total * t.hidden
    total = sum(row["bytes"] for row in rows.values())
    names = ("kind", "axes", "between_slices")
    collectives = [dict(zip(names, key)) | row for key, row in rows.items()]
    share = lambda name: sum(row[name] for row in rows.values()) / total if total else None  # noqa: E731
    return {
        "collectives": sorted(collectives, key=lambda row: -row["bytes"]), "wire_bytes": total,
        "async_wire_fraction": share("asynchronous"), "hidden_wire_fraction": share("hidden"),
    }  # fmt: skip


_PASSED_ON = ("tuple", "get-tuple-element", "while", "bitcast", "call", "conditional", "optimization-barrier")


def largest_tensors(found: costs.Schedule, count: int = SHOWN) -> list[dict[str, Any]]:
    """Results in main memory, as they lie there; of equal shape and origin one."""
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for step in found.steps:
        if step.op.opcode in _PASSED_ON:
            continue
        name, way = part(step.op.scope)
        for array in step.op.arrays:
            if array.space == 0:
                key = str(array), name
                entry = {"shape": str(array), "bytes": array.padded_bytes, "padding": array.padded_bytes - array.bytes,
                         "operation": step.op.opcode, "part": f"{name} {way}".strip()}  # fmt: skip
                if key not in seen or entry["bytes"] > seen[key]["bytes"]:
                    seen[key] = entry
    return sorted(seen.values(), key=lambda entry: -entry["bytes"])[:count]

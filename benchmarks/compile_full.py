"""Do the stages at their published sizes fit TPU pods, and what bounds them, by the compiler?

    python benchmarks/compile_full.py                             compiles what has no report yet, and prints the table
    python benchmarks/compile_full.py --only 'glm5v*v5p*' --again  these anew
    python benchmarks/compile_full.py --table                     only prints it, from the reports that are kept
    python benchmarks/compile_full.py --plot results/weak_scaling.svg   and draws weak scaling from them

Each is `glmv compile` in a process of its own on any x86 Linux machine with `glmv_jax[tpu]`; nothing is run on a TPU.
One that takes longer than --seconds or more than --gb of memory is ended, and its report says so. A report is up to
date when config, topology, program and flags are as they were (its digest); code may have changed: --again. All of it
takes hours on two cores; it can be stopped and goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from contest import log

from glmv_jax import config
from glmv_jax.aot import main as aot
from glmv_jax.aot import topology as topology_lib
from glmv_jax.eval import report_svg

HERE = pathlib.Path(__file__).resolve().parent
KEPT = HERE / "results" / "compile"
Report = dict[str, Any]


# --- what is compiled -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """overrides: as --config.KEY=VALUE has them. rows: of the batch, a device, where the experiment's batch is for
    another number of devices; 0: the experiment's own batch. key: of the batch in the config. doubled: overrides on
    1,024 devices, of what is laid out for 512."""

    title: str
    config: str
    overrides: tuple[str, ...] = ()
    program: str = "step"
    rows: float = 0
    key: str = "batch"
    doubled: tuple[str, ...] = ()


_GLM5V = "experiments/glm5v_pretrain.py:size=l"
_SPLIT = ("mesh.data=-1", "mesh.fsdp=64")
_PROMPTS = ("data.prompt_tokens=8192", "mesh.tensor=2")  # nothing learns there, and heads may be apart
_TOKENS = ("data.prompt_tokens=8192", "mesh.fsdp=1", "mesh.expert=64", "mesh.tensor=8", "rules=serve")
# With a divergence from the policy that the run begins with, which waits in the host's memory.
_RL = (*_SPLIT, "rules=fsdp", "loss.kl.factor=0.01", "reference.policy=init_from", "init_from=runs/sft")
_ROWS_OF_128K = ("data.tokens=131072", "data.patches=65536", "data.image_patches=4096", "data.targets=32768")

PROGRAMS = {
    "cogvit_mim_l": Program("stage 1, CogViT", "experiments/cogvit_mim.py:size=l", _SPLIT),
    "cogvit_siglip_l": Program("stage 2, 128 pairs a device", "experiments/cogvit_siglip.py:size=l", _SPLIT, rows=128),
    "vlm_pretrain_l": Program("stage 3, GLM-OCR's decoder", "experiments/vlm_pretrain.py:size=l", _SPLIT, rows=1),
    "glm5v_pretrain_l": Program(
        "stage 3, GLM-5V", _GLM5V, doubled=("mesh.data=-1", "mesh.fsdp=16", "batch=1024"),
    ),
    "vlm_sft_l_128k": Program(
        "stage 4, 128K tokens, GLM-OCR's decoder", "experiments/vlm_sft.py:size=l",
        ("mesh.fsdp=-1", "mesh.context=16", "rules=fsdp_context", *_ROWS_OF_128K), rows=1 / 16,
        doubled=("mesh.data=-1", "mesh.fsdp=32"),
    ),
    "glm5v_sft_l_128k": Program(
        "128K tokens, GLM-5V", _GLM5V,
        ("mesh.expert=16", "mesh.context=32", "rules=fsdp_expert_context", *_ROWS_OF_128K),
        rows=1 / 32, doubled=("mesh.data=-1", "mesh.fsdp=1"),
    ),
    "rl_grpo_l": Program("stage 5, the update", "experiments/rl_grpo.py:size=l", _RL, rows=1, key="rollout.rows"),
    "rl_reference_l": Program(
        "stage 5, its reference on the host", "experiments/rl_grpo.py:size=l", _RL, "reference", 1, "rollout.rows",
    ),
    "llama2_70b": Program("Llama-2-70B, to compare", "benchmarks/llama2_70b.py"),
    "glm5v_prefill_l": Program("prefill of 8K tokens, GLM-5V", _GLM5V, _PROMPTS, "prefill"),
    "glm5v_decode_l": Program("a token behind 8K, GLM-5V", _GLM5V, _TOKENS, "decode"),
}  # fmt: skip

# Not everywhere: GLM-5V's parameters and momentum alone are 23.6 GB a chip of v6e:16x16, of 34.4.
POD, SCALING = "v5p:8x8x8", ("v5p:4x4x4", "v5p:8x8x8", "v5p:16x16x16")
SCALED = ("vlm_pretrain_l", "cogvit_siglip_l")
TRAINED = [name for name, p in PROGRAMS.items() if p.program in ("step", "reference") and name != "llama2_70b"]
RUNS = [(name, POD, 1) for name in PROGRAMS]
RUNS += [(name, where, n) for where, n in (("tpu7x:8x8x8", 1), (POD, 2)) for name in TRAINED]
RUNS += [(name, "v6e:16x16", 1) for name in TRAINED if not name.startswith("glm5v")]
RUNS += [(name, where, 1) for name in SCALED for where in SCALING if where != POD]


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    topology: topology_lib.Topology
    flags: tuple[str, ...] = ()  # as --xla has them

    @property
    def label(self) -> str:
        """Of its file."""
        slices = f"_x{self.topology.slices}" if self.topology.slices > 1 else ""
        flags = "".join(f"_{flag}" for flag in self.flags)
        return f"{self.name}_{self.topology.name.replace(':', '-')}{slices}{flags}"

    @property
    def file(self) -> pathlib.Path:
        return KEPT / f"{self.label}.json"

    @property
    def program(self) -> Program:
        return PROGRAMS[self.name]

    @property
    def overrides(self) -> list[str]:
        p, chips = self.program, self.topology
        devices = chips.chip.per_chip * chips.slices * math.prod(chips.sizes)
        given = [*p.overrides, *(p.doubled if devices == 1024 else ())]
        rows = round(p.rows * devices)
        return given if not p.rows else [*given, f"{p.key}={(rows,) if p.key.endswith('rows') else rows}"]

    def digest(self) -> str:
        cfg = config.override(config.load(self.program.config), self.overrides)
        return aot.digest(cfg, self.topology, self.program.program, aot.xla_flags(cfg, self.flags))


def kept(run: Run) -> Report | None:
    return json.loads(run.file.read_text(encoding="utf-8")) if run.file.exists() else None


# --- compiling --------------------------------------------------------------------------------------------------------


def compile_one(run: Run, seconds: float, memory: float) -> None:
    """In a process of its own, whose report is kept; or one that says why there is none, unless an older one is."""
    p, t = run.program, run.topology
    with tempfile.TemporaryDirectory() as folder:
        made = pathlib.Path(folder) / "report.json"
        argv = [sys.executable, "-m", "glmv_jax.cli", "compile", "--config", p.config, "--topology", t.name]
        argv += ["--slices", str(t.slices), "--program", p.program, "--json", str(made)]
        argv += [f"--config.{assignment}" for assignment in run.overrides] + [f"--xla={flag}" for flag in run.flags]
        process = subprocess.Popen(argv, cwd=HERE.parent, stdout=subprocess.DEVNULL)
        stopped = _watched(process, seconds, memory)
        if made.exists():
            KEPT.mkdir(parents=True, exist_ok=True)
            run.file.write_text(made.read_text(encoding="utf-8"), encoding="utf-8")
        elif not run.file.exists():
            why = stopped or f"the command failed with {process.returncode}"
            said = {"digest": run.digest(), "config": p.config, "overrides": run.overrides}
            run.file.write_text(json.dumps(said | {"stopped": why}, indent=1) + "\n", encoding="utf-8")


def _watched(process: subprocess.Popen, seconds: float, memory: float) -> str:
    """Waits for it, and ends it when it takes too much; says why, or nothing."""
    end = time.monotonic() + seconds
    try:
        while process.poll() is None:
            if time.monotonic() > end:
                return f"ended after {seconds:.0f} s"
            if _resident(process.pid) > memory:
                return f"ended at {memory / 1e9:.0f} GB of this machine's memory"
            time.sleep(1)
        return ""
    finally:
        process.kill()
        process.wait()


def _resident(pid: int) -> int:
    """Bytes; 0 of a process that has ended."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(sizes[0]) << 10 if sizes else 0


# --- what they say ----------------------------------------------------------------------------------------------------

HEADER = ("step", "on", "fits", "memory a device", "a host", "estimated compute", "of peak", "sent a device",
          "asynchronous", "bound by", "compiled in")  # fmt: skip


def table(found: list[tuple[Run, Report]]) -> str:
    """Markdown, a row a report; one with a star is of a config that has changed."""
    rows = [HEADER, ("---",) * len(HEADER), *(_row(run, report) for run, report in found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(run: Run, r: Report) -> tuple[str, ...]:
    first = run.program.title + (" *" if r.get("digest") != run.digest() else ""), str(run.topology)
    if "stopped" in r:
        return *first, r["stopped"], *[""] * 8
    took = f"{r.get('cpu_seconds', r['compile_seconds']):.0f} s, {r['compile_memory_bytes'] / 1e9:.1f} GB"
    peak = r["peak_hbm_bytes"]
    used = "" if peak is None else f"{peak / 1e9:.1f} GB, {peak / r['hbm_limit_bytes']:.0%}"
    if r["flops"] is None:
        return *first, "no", used, *[""] * 6, took
    share = lambda x: "" if x is None else f"{x:.1%}" if x < 0.1 else f"{x:.0%}"  # noqa: E731
    return (
        *first, "yes" if r["fits"] else "no", used, f"{r['host_bytes'] / 1e9:.1f} GB",
        _seconds(r["estimated_compute_seconds"]), share(r["fraction_of_peak"]), f"{r['wire_bytes'] / 1e9:.3g} GB",
        share(r["async_wire_fraction"]), bound(r), took,
    )  # fmt: skip


def _seconds(count: float) -> str:
    return f"{count:.2f} s" if count >= 1 else f"{count * 1e3:.3g} ms"


# --- weak scaling -----------------------------------------------------------------------------------------------------

BARS = {"estimated compute": "#3b6fb6", "transfers, all links": "#d08a2e", "transfers, links of one axis": "#8a8a8a"}


def times(report: Report) -> dict[str, float]:
    """Seconds of a step by what may bound it; of transfers only where the links' speed is published."""
    found = {"estimated compute": report["estimated_compute_seconds"], **report["roofline"]}
    return {name: found[name] for name in BARS if name in found}


def bound(report: Report) -> str:
    """What a step takes longest for: transfers where even all links at once need more time than the compiler thinks
    that work does, compute where the links of one axis need less; and of compute the largest part."""
    work, *wire = times(report).values()
    kinds = report["estimated_seconds"]
    most = max(kinds, key=kinds.get)
    inside = f"{most} {kinds[most] / work:.0%}"
    if wire and wire[0] > work:
        return "transfers"
    return f"compute ({inside})" if not wire or wire[1] < work else f"compute ({inside}) or transfers"


def plot(found: dict[str, list[tuple[Run, Report]]]) -> str:
    """A panel a program, three bars a topology. One SVG that needs nothing else."""
    wide, high, top, bottom, left = 330, 220, 26, 46, 40
    parts = ["<style>text{font:10px sans-serif;fill:#444}.title{font-size:11px;font-weight:bold}.grid{stroke:#ddd}"
             "@media(prefers-color-scheme:dark){text{fill:#ccc}.grid{stroke:#444}}</style>"]  # fmt: skip
    for n, (name, reports) in enumerate(found.items()):
        x0 = n * wide
        marks = report_svg.ticks(0, max(s for _, r in reports for s in times(r).values()), 4)
        y_of = lambda v, marks=marks: high - bottom - (high - top - bottom) * v / marks[-1]  # noqa: E731
        parts.append(f'<text class="title" x="{x0 + left}" y="14">{PROGRAMS[name].title}: seconds a step</text>')
        for mark in marks:
            parts.append(f'<path class="grid" d="M{x0 + left} {y_of(mark):.1f}H{x0 + wide - 8}"/>')
            parts.append(f'<text x="{x0 + left - 5}" y="{y_of(mark) + 3:.1f}" text-anchor="end">{mark:g}</text>')
        each = (wide - left - 8) / len(reports)
        for i, (_, report) in enumerate(reports):
            x = x0 + left + i * each
            for j, (bar, seconds) in enumerate(times(report).items()):
                y = y_of(seconds)
                parts.append(f'<rect x="{x + (j + 0.5) * each / 4:.1f}" y="{y:.1f}" width="{each / 5:.1f}" '
                             f'height="{high - bottom - y:.1f}" fill="{BARS[bar]}"/>')  # fmt: skip
            middle = f'x="{x + each / 2:.1f}" text-anchor="middle"'
            parts.append(f'<text {middle} y="{high - bottom + 14}">{report["devices"]} chips</text>')
            parts.append(f'<text {middle} y="{high - bottom + 27}">{report["fraction_of_peak"]:.0%} of peak</text>')
    for j, (bar, colour) in enumerate(BARS.items()):
        parts.append(f'<rect x="{left + j * 170}" y="{high - 12}" width="9" height="9" fill="{colour}"/>'
                     f'<text x="{left + 13 + j * 170}" y="{high - 4}">{bar}</text>')  # fmt: skip
    size = f"0 0 {wide * len(found)} {high}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}">{"".join(parts)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="of the reports' names")
    parser.add_argument("--again", action="store_true", help="also those that are up to date")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    parser.add_argument("--seconds", type=float, default=3600, help="that one may take")
    parser.add_argument("--gb", type=float, default=8.0, help="that one may take of this machine's memory")
    parser.add_argument("--xla", action="append", default=[], help="as of glmv compile")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.svg", help="weak scaling")
    args = parser.parse_args()
    runs = [Run(name, topology_lib.parse(where, slices), tuple(args.xla)) for name, where, slices in RUNS]
    runs = [run for run in runs if any(fnmatch.fnmatch(run.label, pattern) for pattern in args.only)]
    for run in [] if args.table else runs:
        if args.again or (kept(run) or {}).get("digest") != run.digest():
            log(f"{run.label}: {run.program.config} on {run.topology}")
            compile_one(run, args.seconds, args.gb * 1e9)
    print(table([(run, report) for run in runs if (report := kept(run))]))
    if args.plot:
        scaled = {name: [] for name in SCALED}
        for name, reports in scaled.items():
            of = [Run(name, topology_lib.parse(where)) for where in SCALING]
            reports += [(run, report) for run in of if (report := kept(run)) and "roofline" in report]
        args.plot.write_text(plot({name: reports for name, reports in scaled.items() if reports}), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The command `glmv compile`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glmv_jax.parallel import compiler
from glmv_jax.typing import UserError

# Keys that no program reads: of the loop, and of which answers are drawn and by whom.
_OF_THE_LOOP = ("log_every", "eval_every", "save_every", "keep", "spikes", "max_skipped", "max_seconds", "faults",
                "match_wall", "compilation_cache")  # fmt: skip
_OF_ROLLOUTS = ("slots", "limits", "samples", "engine", "weights", "staleness", "late", "quotas", "in_flight",
                "seconds", "dynamic", "expansion", "curriculum", "environments", "drafts", "workers")  # fmt: skip
_UNREAD = {*_OF_THE_LOOP, *(f"rollout.{name}" for name in _OF_ROLLOUTS)}


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--config", metavar="FILE.py[:ARG=VALUE,FLAG]", help="the experiment")
    parser.add_argument("--topology", metavar="NAME", help="such as v5p:8x8x8, v5e:16x16, v6e:16x16, tpu7x:8x8x8")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices of that kind, over DCN (default 1)")
    parser.add_argument("--program", default="step", help="step (default), reference, prefill, decode or generate")
    parser.add_argument("--xla", action="append", metavar="FLAG=VALUE", help="an option of XLA, or auto, async, none")
    parser.add_argument("--json", metavar="FILE", help="also write the report there")
    parser.add_argument("--html", metavar="FILE", help="and as a page there")
    parser.add_argument("--hlo", metavar="FILE", help="and the compiled program's text there")
    parser.add_argument("--compare", nargs=2, metavar="FILE.json", help="two such reports, nothing is compiled")
    parser.epilog = "--config.KEY=VALUE, any number of times, changes one value of the config."


def run(args: argparse.Namespace) -> int:
    """Exit code 1 when the program does not fit."""
    from glmv_jax.aot import show
    from glmv_jax.aot import topology as topology_lib

    if args.compare:
        print(show.compare(*map(_read, args.compare)))
        return 0
    for name in ("config", "topology"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is required; see glmv compile --help")
    topology = topology_lib.parse(args.topology, args.slices)
    topology_lib.described_only()  # before JAX starts
    from glmv_jax import config
    from glmv_jax.aot import program, report

    cfg = config.override(config.load(args.config), args.overrides)
    flags = xla_flags(cfg, args.xla)
    print(f"compiling for {topology}; nothing is run", file=sys.stderr, flush=True)
    compiled = program.compiled(program.of(cfg, topology, args.program), flags)
    if args.hlo and compiled.executable is not None:
        Path(args.hlo).write_text(compiled.executable.as_text(), encoding="utf-8")
    about = {"config": args.config, "overrides": args.overrides, "xla": flags}
    about["digest"] = digest(cfg, topology, args.program, flags)
    made = report.build(compiled, topology, about)
    if args.json:
        Path(args.json).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if args.html:
        Path(args.html).write_text(show.page(made), encoding="utf-8")
    print(show.text(made))
    return 0 if made["fits"] else 1


def xla_flags(cfg: Any, given: Sequence[str] | None) -> dict[str, str]:
    """XLA's options: those that --xla gives, else those that training with this config passes."""
    return compiler.options(given or (cfg.get("xla", "auto"),), where="--xla ")


def digest(cfg: Any, topology: Any, program: str, flags: dict[str, str]) -> str:
    """What a report is of, in 16 letters: every value of the config but what only the loop around a step reads, the
    devices, the program and XLA's options."""
    from glmv_jax import config

    read = {k: v for k, v in config.flat(cfg).items() if ".".join(k.split(".")[:2]) not in _UNREAD}
    said = [read, str(topology), program, flags]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--compare {path} cannot be read ({error}); give what --json wrote") from None
    if "peak_hbm_bytes" not in found:
        raise UserError(f"--compare {path} is no report; give what --json wrote")
    return found

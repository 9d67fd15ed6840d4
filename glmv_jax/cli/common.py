"""What several subcommands of `glmv` share: the config they are given, and JSON to a file or the terminal."""

from __future__ import annotations

import argparse
import json
import math
import os
from typing import TYPE_CHECKING

from glmv_jax.typing import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

# What splits a model that learns nothing, see `parallel.rules`.
_AXES = ("data", "expert", "tensor")


def config_options(sub: argparse.ArgumentParser) -> None:
    """--config, and a word on what changes it."""
    sub.add_argument("--config", required=True, metavar="FILE.py[:ARG=VALUE,FLAG]", help="the experiment")
    sub.epilog = "--config.KEY=VALUE, any number of times, changes one value of the config."


def read_config(args: argparse.Namespace) -> ConfigDict:
    """The ConfigDict of --config after every --config.KEY=VALUE."""
    from glmv_jax import config

    return config.override(config.load(args.config), args.overrides)


def write_json(target: str | None, content: dict) -> None:
    """Into a file, or "-": standard output; nothing without a target."""
    if target is None:
        return
    text = json.dumps(content, indent=1, ensure_ascii=False)
    if target == "-":
        print(text)
        return
    with open(target, "w", encoding="utf-8") as file:
        file.write(text + "\n")


def keep_compiled_programs() -> None:
    """Where training keeps its own, so that the next start of what answers compiles nothing. Before jax is imported;
    jax's own variables of the environment, where they are set, stay as they are."""
    from glmv_jax.presets import COMPILED

    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser(COMPILED))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def mesh_options(sub: argparse.ArgumentParser) -> None:
    """--mesh, of commands in which nothing learns."""
    about = "devices that share the work: data (rows), expert (rows and experts), tensor (heads and widths)"
    sub.add_argument("--mesh", nargs="+", metavar="AXIS=N", help=f"{about}, as in data=2 tensor=4 (default: one)")


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """The mesh that --mesh names; None for one device. UserError for what is no size of such an axis."""
    if args.mesh is None:
        return None
    sizes = {}
    for word in args.mesh:
        axis, _, size = word.partition("=")
        if axis not in _AXES or not size.removeprefix("-").isdecimal():
            raise UserError(f"--mesh {word}: give AXIS=N for {', '.join(_AXES)}, as in tensor=4; -1 takes what is left")
        sizes[axis] = int(size)
    import jax

    from glmv_jax.parallel.mesh import make_mesh

    devices = jax.devices()
    return make_mesh(sizes, devices if -1 in sizes.values() else devices[: math.prod(sizes.values())])

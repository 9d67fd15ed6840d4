"""What several subcommands of `glmv` share: the config they are given, and JSON to a file or the terminal."""

from __future__ import annotations

import argparse
import json


def config_options(sub: argparse.ArgumentParser) -> None:
    """--config, and a word on what changes it."""
    sub.add_argument("--config", required=True, metavar="FILE.py[:ARG=VALUE,FLAG]", help="the experiment")
    sub.epilog = "--config.KEY=VALUE, any number of times, changes one value of the config."


def read_config(args: argparse.Namespace):
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

"""The `glmv` command: thin, a module for each kind of subcommand, heavy modules imported only where they are used.

What a person can mend (`UserError`, a full disk, a folder that may not be written) is one line on stderr and exit code
2; Ctrl-C is 130; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple, NoReturn

from glmv_jax import __version__
from glmv_jax.aot import main as aot
from glmv_jax.cli import checkpoints, common, evaluation, inspection, serving, training
from glmv_jax.typing import UserError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


class _Command(NamedTuple):
    """run: arguments to exit code; its docstring is the help. options: gives a parser what the command takes."""

    run: Callable[[argparse.Namespace], int]
    options: Callable[[argparse.ArgumentParser], None] | None


_COMMANDS = {
    "train": _Command(training.train, training.train_options),
    "sweep": _Command(training.sweep, training.sweep_options),
    "cache-teachers": _Command(training.cache_teachers, training.cache_teachers_options),
    "import-hf": _Command(checkpoints.import_hf, checkpoints.import_options),
    "export-hf": _Command(checkpoints.export_hf, checkpoints.export_options),
    "generate": _Command(checkpoints.generate, checkpoints.generate_options),
    "serve": _Command(serving.serve, serving.serve_options),
    "eval": _Command(evaluation.evaluate, evaluation.evaluate_options),
    "train-vocabulary": _Command(training.train_vocabulary, training.train_vocabulary_options),
    "report": _Command(evaluation.report, evaluation.report_options),
    "compile": _Command(inspection.compile_for, aot.options),
    "doctor": _Command(inspection.doctor, None),
    "show-config": _Command(inspection.show_config, inspection.show_config_options),
    "show-data": _Command(inspection.show_data, inspection.show_data_options),
    "show-batch": _Command(inspection.show_batch, inspection.show_batch_options),
    "shapes": _Command(inspection.shapes, inspection.shapes_options),
    "tasks": _Command(inspection.tasks, inspection.tasks_options),
}

_DESCRIPTION = """GLM-5V-Turbo in JAX: mim -> siglip -> pretrain -> sft -> rl, one recipe.

  glmv doctor                                          what this machine has and lacks
  glmv train --config experiments/vlm_sft.py:size=nano --workdir runs/sft
  glmv import-hf GLM-OCR/ checkpoints/glm-ocr          a public checkpoint, to train on or to answer
  glmv serve --checkpoint runs/quickstart              to talk to it, in a browser or by any client
  glmv report runs/quickstart                          tables and one page, of one run or several
  glmv COMMAND --help                                  each command, with examples
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error of the command."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code (0 good, 1 a check failed, 2 wrong input, 130 Ctrl-C). One of several
    processes ends with 3 when another one has."""
    if argv is None and sys.argv[1:2] in (["serve"], ["generate"]):
        common.keep_compiled_programs()
    if argv is None and sys.argv[1:2] == ["train"]:
        from glmv_jax.parallel.host import start_with_huge_pages

        start_with_huge_pages()
    argv = list(sys.argv[1:] if argv is None else argv)
    name = f"glmv {argv[0]}" if argv and argv[0] in _COMMANDS else "glmv"
    try:
        code = _run(argv)
        sys.stdout.flush()  # or it fails where nobody can catch it
        return code
    except UserError as error:
        return _complain(name, " ".join(str(error).split()))
    except BrokenPipeError:  # `glmv doctor | head`: the reader has gone, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        return _complain(name, f"{error.strerror}: {error.filename or 'disk'}; free space or choose another folder")
    except KeyboardInterrupt:
        print(f"\n{name}: stopped by Ctrl-C", file=sys.stderr)
        return 130


def _complain(name: str, message: str) -> int:
    with contextlib.suppress(OSError):  # what was said before comes before
        sys.stdout.flush()
    print(f"{name}: {_installable(message)}", file=sys.stderr)
    return 2


def _installable(message: str) -> str:
    """With the command that installs an extra here, where a message names one: from a checkout it is another."""
    if "glmv_jax[" not in message:
        return message
    from glmv_jax.doctor import install_command

    return re.sub(r"""pip install (["'])glmv_jax\[(\w+)\]\1""", lambda found: install_command(found[2]), message)


def _run(argv: list[str]) -> int:
    parser, options = _parser()
    if not argv:
        parser.print_help()
        return 0
    command, rest = argv[0], argv[1:]
    if command not in (*_COMMANDS, "-h", "--help", "--version"):
        raise UserError(f"no command {command!r}{_nearest(command, _COMMANDS)}")

    overrides = [arg.removeprefix("--config.") for arg in rest if arg.startswith("--config.")]
    rest = [arg for arg in rest if not arg.startswith("--config.")]
    known = options.get(command, ["--help", "--version"])
    for arg in rest:  # before argparse, which would rather complain of what a misspelt option leaves missing
        option = arg.partition("=")[0]
        if option.startswith("--") and option not in known:
            raise UserError(f"unknown option {option!r}{_nearest(option, known)}")
    if overrides and "--config" not in known:
        raise UserError(f"this command takes no config, so no --config.{overrides[0]}")
    args = parser.parse_args([command, *rest])
    args.overrides = overrides
    if "coordinator" not in args:
        return args.function(args)
    from glmv_jax.parallel import multihost, peers

    multihost.start(args.coordinator, args.processes, args.process, args.join_seconds)
    with peers.watched():
        return args.function(args)


def _nearest(word: str, known: Iterable[str]) -> str:
    from glmv_jax.config import nearest

    return nearest(word, known)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, list[str]]]:
    """The parser, and the options that each command knows."""
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="glmv", description=_DESCRIPTION, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"glmv_jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    subs = {}
    for name, command in _COMMANDS.items():
        first, _, rest = (command.run.__doc__ or "").partition("\n")
        rest = "\n".join(line.removeprefix("    ") for line in rest.splitlines()).rstrip()
        subs[name] = commands.add_parser(
            name, help=first, description=f"{first}\n{rest}", formatter_class=form, allow_abbrev=False
        )
        subs[name].set_defaults(function=command.run)
        if command.options is not None:
            command.options(subs[name])
    options = {name: list(sub._option_string_actions) for name, sub in subs.items()}
    return parser, options

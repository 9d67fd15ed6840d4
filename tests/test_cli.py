"""The `glmv` command as a person meets it: right input, and above all wrong input.

The subcommands that need a trained model are covered by their own parts' tests; here they are only reached.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from glmv_jax import __version__, cli

GOOD = """
from ml_collections import ConfigDict
from glmv_jax.config import parse_arg

def get_config(arg=None):
    arg = parse_arg(arg, size="nano")
    return ConfigDict(dict(stage="sft", seed=0, size=arg.size, optim=dict(lr=1e-3)))
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(GOOD)
    return str(path)


def complaint(capsys, *argv) -> str:
    """Runs the command, which must refuse with one line on stderr and exit code 2; returns that line."""
    assert cli.main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err.strip()


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_but_the_command_itself():
    """Which is what makes it fast; a wall time would tell of the machine's load as well."""
    code = """
import sys
before = set(sys.modules)
from glmv_jax import cli
try:
    cli.main(["--help"])
finally:
    print(*(set(sys.modules) - before), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    names = set(done.stderr.split())
    assert "usage: glmv" in done.stdout and "argparse" in names
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "glmv_jax"}
    parts = ("checkpoints", "common", "evaluation", "inspection", "serving", "training")
    own = {"glmv_jax", "glmv_jax.typing", "glmv_jax.aot", "glmv_jax.aot.main", "glmv_jax.cli", "glmv_jax.parallel",
           "glmv_jax.parallel.compiler", "glmv_jax.parallel.multihost",
           *(f"glmv_jax.cli.{part}" for part in parts)}  # fmt: skip
    assert {name for name in names if name.startswith("glmv_jax")} == own
    assert not {"asyncio", "http", "multiprocessing", "unittest", "xml", "logging", "email"} & names


@pytest.mark.parametrize("command", ["train", "cache-teachers", "train-vocabulary", "import-hf", "export-hf", "compile",
                                     "generate", "serve", "eval", "report", "doctor", "show-config", "shapes",
                                     "tasks", "show-data", "show-batch"])  # fmt: skip
def test_every_help_teaches_by_example(capsys, command):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    assert done.value.code == 0 and shown.count(f"glmv {command} ") >= (1 if command == "doctor" else 2)
    assert f"  glmv {command}" in shown


def test_bare_command_and_version(capsys):
    assert cli.main([]) == 0
    assert "glmv train --config" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert __version__ in capsys.readouterr().out


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "glmv: no command 'trian'; nearest: train"),
        (["--hepl"], "glmv: no command '--hepl'"),
        (["train"], r"glmv train: .*required: --config, --workdir; see glmv train --help"),
        (["train", "--workdri", "x"], "glmv train: unknown option '--workdri'; nearest: --workdir"),
        (["train", "--work", "x"], "glmv train: unknown option '--work'; nearest: --workdir"),
        (["train", "--confg.seed=3"], "glmv train: unknown option '--confg.seed'; nearest: --config"),
        (["train", "stray", "--config", "x", "--workdir", "y"], "glmv train: unrecognized arguments: stray"),
        (["train", "--config", "none.py", "--workdir", "y"], "glmv train: no experiment file none.py"),
        (["doctor", "--config.seed=1"], "glmv doctor: this command takes no config"),
        (["generate", "--run", "r"], "glmv generate: .*required: --prompt"),
        (["generate", "--run", "r", "--prompt", "p", "--seed", "x"], "glmv generate: .*--seed: invalid int value: 'x'"),
        (["eval", "--run", "nowhere"], "glmv eval: nowhere is no work directory of a stage"),
        (["report", "--run", "nowhere"], "glmv report: no run directory nowhere"),
        (["show-config", "--config", "a.txt"], "glmv show-config: no experiment file a.txt"),
    ],
)
def test_wrong_input_is_one_line(capsys, argv, message):
    assert re.match(message, complaint(capsys, *argv))


def test_misspelt_argument_and_key_name_the_nearest(capsys, experiment):
    assert "nearest: size" in complaint(capsys, "show-config", "--config", f"{experiment}:sise=nano")
    line = complaint(capsys, "show-config", "--config", experiment, "--config.optim.Ir=1")
    assert line == "glmv show-config: the config has no key 'optim.Ir'; nearest: optim.lr"
    assert "optim.lr is float, but 'x' is str" in complaint(
        capsys, "show-config", "--config", experiment, "--config.optim.lr=x"
    )


def test_show_config_after_overrides(capsys, experiment):
    assert cli.main(["show-config", "--config", f"{experiment}:size=base", "--config.optim.lr=3e-4"]) == 0
    assert capsys.readouterr().out == "optim.lr = 0.0003\nseed = 0\nsize = 'base'\nstage = 'sft'\n"


def test_workdir_that_is_a_file_of_another_stage_or_not_writable(capsys, experiment, tmp_path):
    line = complaint(capsys, "train", "--config", experiment, "--workdir", experiment)
    assert line.endswith("tiny.py is a file; give a folder")
    for folder, reason in ((f"{experiment}/sub", "Not a directory"), ("/proc/sub", "No such file or directory")):
        line = complaint(capsys, "train", "--config", experiment, "--workdir", folder)
        assert f"--workdir {folder} cannot be made ({reason}); give another folder" in line

    (tmp_path / "config.json").write_text(json.dumps({"stage": "mim"}))
    line = complaint(capsys, "train", "--config", experiment, "--workdir", str(tmp_path))
    assert "holds a run of stage 'mim', but the config is of stage 'sft'; give another --workdir" in line
    (tmp_path / "config.json").write_text('{"stage": "s')
    assert "cannot be read" in complaint(capsys, "train", "--config", experiment, "--workdir", str(tmp_path))


def test_full_disk_is_one_line_and_other_os_errors_are_bugs(capsys, tmp_path):
    path = tmp_path / "full.py"
    path.write_text("def get_config(arg=None): open('/dev/full', 'w').write('x' * 99999)")  # a device always full
    assert "No space left on device" in complaint(capsys, "show-config", "--config", str(path))
    path.write_text("def get_config(arg=None): raise OSError(5, 'the disk is on fire')")
    with pytest.raises(OSError, match="on fire"):
        cli.main(["show-config", "--config", str(path)])


def test_an_extra_that_is_missing_is_named_with_the_command_that_installs_it_here(capsys, tmp_path):
    path, checkout = tmp_path / "lacking.py", pathlib.Path(cli.__file__).parents[2]
    head = "from glmv_jax.typing import UserError\ndef get_config(arg=None):\n    raise UserError"
    for quote in "\"'":
        said = f"this takes starlette; pip install {quote}glmv_jax[serve]{quote}, or leave it"
        path.write_text(f"{head}({said!r})\n")
        command = f"{sys.executable} -m pip install -e '{checkout}[serve]'"
        assert complaint(capsys, "show-config", "--config", str(path)).endswith(f"starlette; {command}, or leave it")


# --- processes --------------------------------------------------------------------------------------------------------


def start(tmp_path, body):
    """A python process in which the show-config command runs `body`."""
    path = tmp_path / "slow.py"
    path.write_text(f"import sys, time\ndef get_config(arg=None):\n    print('ready', flush=True)\n    {body}\n")
    argv = [sys.executable, "-m", "glmv_jax.cli", "show-config", "--config", str(path)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_is_130_without_traceback(tmp_path):
    with start(tmp_path, "time.sleep(30)") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=10)
    assert process.returncode == 130 and shown.strip() == "glmv show-config: stopped by Ctrl-C"


def test_bugs_keep_their_traceback(tmp_path):
    with start(tmp_path, "return 1 / 0") as process:
        _, shown = process.communicate(timeout=10)
    assert process.returncode == 1 and "ZeroDivisionError" in shown and "slow.py" in shown


def test_reader_that_goes_away_is_no_error(experiment):
    command = f"'{sys.executable}' -m glmv_jax.cli show-config --config '{experiment}' | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.strip() in ("0", "141")


def test_two_processes_do_not_train_in_one_workdir(tmp_path):
    code = """
import sys, time
from glmv_jax.train.workdir import alone_in
with alone_in(sys.argv[1]):
    print("in", flush=True)
    time.sleep(float(sys.argv[2]))
"""

    def enter(seconds):
        argv = [sys.executable, "-c", code, str(tmp_path), str(seconds)]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)

    with enter(60) as first:
        assert first.stdout.readline() == "in\n"
        with enter(0) as second:
            assert second.stdout.readline().startswith(f"waiting: process {first.pid} is training in")
            first.kill()  # kill -9 frees the lock
            assert second.stdout.readline() == "in\n"
            assert second.wait(10) == 0
    with open(tmp_path / ".lock", "a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert os.listdir(tmp_path) == [".lock"]


# --- devices ----------------------------------------------------------------------------------------------------------


def test_devices_of_what_serves(capsys):
    import jax

    from glmv_jax.cli.common import mesh_of

    of = lambda *words: mesh_of(argparse.Namespace(mesh=list(words) or None))  # noqa: E731
    assert of() is None and of("tensor=-1").size == jax.device_count()
    mesh = of("data=2", "tensor=2")
    assert dict(mesh.shape) == {"data": 2, "tensor": 2} and set(mesh.devices.flat) == set(jax.devices()[:4])
    for wrong in ("fsdp=2", "tensor", "tensor=x", "tensor=--1"):
        said = complaint(capsys, "generate", "--run", "runs/x", "--prompt", "x", "--mesh", "data=2", wrong)
        assert f"--mesh {wrong}: give AXIS=N for data, expert, tensor" in said

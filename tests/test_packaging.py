"""What is shipped: the wheel holds every module and every corpus file, and the launch scripts are sound.

The scripts' installation itself is exercised by running the tests through launch/test.sh, not here.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import glmv_jax
from glmv_jax import config
from glmv_jax.typing import UserError

REPO = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
SCRIPTS = ["launch/quickstart.sh", "launch/check_wheel.sh", "launch/test.sh", "launch/install.sh", ".ci/run"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel built from a copy of the tree, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("glmv_jax", "experiments"):
        shutil.copytree(REPO / name, folder / "tree" / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder / "tree")
    argv = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        folder,
        folder / "tree",
    ]
    subprocess.run(argv, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_holds_every_file_of_the_package(wheel):
    shipped = {name for name in wheel.namelist() if name.startswith("glmv_jax/")}
    files = {str(path.relative_to(REPO)) for path in (REPO / "glmv_jax").rglob("*") if path.is_file()}
    assert shipped == {name for name in files if "__pycache__" not in name}
    assert any(name.endswith("vocab.model") for name in shipped) and any(name.endswith(".webp") for name in shipped)


def test_wheel_brings_the_experiments_and_they_are_found_by_the_names_in_the_readme(wheel, tmp_path, monkeypatch):
    wheel.extractall(tmp_path)
    data = next(tmp_path.glob("*.data/data"))
    named = {f"experiments/{path.name}" for path in (REPO / "experiments").glob("*.py")}
    installed = [path.relative_to(tmp_path) for path in data.rglob("*.py")]
    info = next(tmp_path.glob("*.dist-info"))
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in installed))
    there = importlib.metadata.PathDistribution(info).files
    monkeypatch.setattr(importlib.metadata, "files", {"glmv_jax": there}.get)
    monkeypatch.chdir(tmp_path)
    assert named == set(config.installed())
    assert config.load("experiments/vlm_sft.py:size=nano").stage == "sft"
    with pytest.raises(UserError, match="no experiment file experiments/vlm_sft2.py.*vlm_sft.py"):
        config.load("experiments/vlm_sft2.py")


def test_wheel_is_small_and_carries_the_licence(wheel):
    assert sum(info.compress_size for info in wheel.infolist()) < 8e6
    licences = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    assert "Apache License" in wheel.read(licences[0]).decode()
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert "License-Expression: Apache-2.0" in wheel.read(metadata).decode()


def test_version_and_entry_point():
    assert PROJECT["version"] == glmv_jax.__version__
    assert PROJECT["scripts"] == {"glmv": "glmv_jax.cli:main"}
    assert set(PROJECT["optional-dependencies"]) == {"cuda", "tpu", "hf", "data", "rl", "serve", "dev"}
    assert not any(re.match(r"(torch|transformers|tensorflow)\b", line) for line in PROJECT["dependencies"])


def test_each_package_of_an_extra_is_imported_somewhere():
    """Those of the accelerators are jax's own plugins, those of dev are for the tests."""
    extras = {name: lines for name, lines in PROJECT["optional-dependencies"].items()
              if name not in ("cuda", "tpu", "dev")}  # fmt: skip
    asked = {re.match(r"[\w.-]+", line).group().replace("-", "_") for lines in extras.values() for line in lines}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (REPO / "glmv_jax").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    assert asked <= {name.partition(".")[0] for name in found}


# --- scripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_pass_shellcheck(script):
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([shellcheck, "-x", script], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def bash(script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    argv = ["bash", script, *args]
    return subprocess.run(argv, cwd=REPO, capture_output=True, text=True, env={**os.environ, **env}, check=False)


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh", "launch/check_wheel.sh"])
def test_scripts_help(script):
    done = bash(script, "--help")
    assert done.returncode == 0 and f"bash {script}" in done.stdout and "set -e" not in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--fast"], "unknown option --fast; see bash launch/quickstart.sh --help"),
        (["runs/x", "one"], "the seed is a whole number, not 'one'"),
        (["runs/x", "1", "2"], "at most two arguments"),
    ],
)
def test_quickstart_refuses_wrong_arguments(args, message):
    done = bash("launch/quickstart.sh", *args)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_install_refuses_a_foreign_folder_and_a_missing_python(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    done = bash("launch/test.sh", GLMV_VENV=str(tmp_path / "mine"))
    assert done.returncode == 2 and "is no virtual environment" in done.stderr
    assert (tmp_path / "mine" / "thesis.txt").exists()
    done = bash("launch/test.sh", GLMV_VENV=str(tmp_path / "new"), GLMV_PYTHON="/bin/false")
    assert done.returncode == 2 and "no working Python 3.11 or 3.12" in done.stderr and done.stderr.count("\n") == 1


def test_every_stage_of_the_quickstart_starts_from_the_one_before():
    text = (REPO / "launch" / "quickstart.sh").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("glmv train")]
    stages = [re.search(r'--workdir "\$RUN/(\w+)"', line).group(1) for line in lines]
    assert stages == ["teacher", "mim", "siglip", "pretrain", "sft", "rl", "sft_more"]
    origins = [re.search(r'config\.init_from="\$RUN/(\w+)"', line) for line in lines]
    assert [found and found.group(1) for found in origins] == [None, None, "mim", "siglip", "pretrain", "sft", "sft"]
    assert all('--config.seed="$SEED"' in line and ":size=nano" in line for line in lines)

"""Types of the whole package, by mypy as pyproject.toml sets it: every function says what it takes and gives.

About 40 s the first time, then one."""

from __future__ import annotations

import pathlib
import subprocess
import sys

REPO = pathlib.Path(__file__).resolve().parent.parent


def test_types_are_right():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=REPO, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(" in ")[1].split()[0]) > 400  # files: the package was found

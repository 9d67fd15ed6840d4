"""Two real processes that train together: programs of a test, each on two emulated devices of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def alone() -> str:
    """XLA_FLAGS of a process that has no emulated devices but those that it asks for."""
    return " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)


def finished(commands: list[list[str]]) -> list[str]:
    """What programs that run together print; all end well."""
    env = {**os.environ, "XLA_FLAGS": alone(), "JAX_PLATFORMS": "cpu"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    started = [subprocess.Popen(command, **pipes) for command in commands]
    shown = [process.communicate(timeout=240) for process in started]
    for process, (_, errors) in zip(started, shown):
        assert process.returncode == 0, errors[-3000:]
    return [said for said, _ in shown]


def together(program: str, folder: object) -> None:
    """Runs the function `module.function(host, port, folder)` for hosts 0 and 1. AssertionError with the end of what
    the first of them that failed had to say."""
    port, (module, _, function) = free_port(), program.rpartition(".")
    code = f"from {module} import {function}; {function}({{}}, {port}, {str(folder)!r})"
    finished([[sys.executable, "-c", code.format(host)] for host in range(2)])

"""Two real processes that train together: programs of a test, each on two emulated devices of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def together(program: str, folder: object) -> None:
    """Runs the function `module.function(host, port, folder)` for hosts 0 and 1. AssertionError with the end of what
    the first of them that failed had to say."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    module, _, function = program.rpartition(".")
    code = f"from {module} import {function}; {function}({{}}, {port}, {str(folder)!r})"
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    argv = [[sys.executable, "-c", code.format(host)] for host in range(2)]
    started = [subprocess.Popen(one, stderr=subprocess.PIPE, text=True, env=env) for one in argv]
    for process in started:
        _, shown = process.communicate(timeout=240)
        assert process.returncode == 0, shown[-3000:]

"""When one of several real processes ends, the others say which and end too.

Not covered: machines that are gone without closing their connections (TCP's probes), and runs that train
(`benchmarks/faults.py train --only first_of_two,second_of_two`).
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from glmv_jax.parallel import multihost, peers
from glmv_jax.typing import UserError
from tests.hosts import alone, free_port

WAITS = 240.0  # seconds; nobody does when all is well


def killed(process: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failed(process: int) -> None:
    raise UserError("the disk is full")


def broken_off(process: int) -> None:
    """What JAX waited for fails, as when Gloo's connection to the other one ends."""
    raise RuntimeError("Connection closed by peer\nand a page of addresses")


def waiting(process: int) -> None:
    time.sleep(WAITS)


def at_their_ends(process: int) -> None:
    time.sleep(0.5 * process)


# name -> what each of the processes does when all are there
SCENES = {
    "the third": (waiting, waiting, killed),
    "the first": (killed, waiting, waiting),
    "one that fails": (waiting, failed),
    "while JAX waits": (broken_off, killed),
    "nobody": (at_their_ends, at_their_ends),
}


def member(name: str, process: int, port: int, folder: pathlib.Path) -> None:
    """A process of a scene."""
    os.dup2(os.open(folder / f"{process}.log", os.O_WRONLY | os.O_CREAT), 2)
    acts = SCENES[name]
    multihost.start(f"localhost:{port}", len(acts), process)
    with peers.watched():
        (folder / f"{process}.there").touch()
        while len(list(folder.glob("*.there"))) < len(acts):
            time.sleep(0.01)
        acts[process](process)


def play(root: str) -> None:
    """The program: all scenes at a time. Prints the exit codes by scene."""
    pids = {}
    for name, acts in SCENES.items():
        folder, port = pathlib.Path(root, name), free_port()
        folder.mkdir()
        for process in range(len(acts)):
            if not (pid := os.fork()):
                return member(name, process, port, folder)
            pids[pid] = name, process
    codes = {name: [0] * len(acts) for name, acts in SCENES.items()}
    while pids:
        pid, status = os.wait()
        name, process = pids.pop(pid)
        codes[name][process] = os.waitstatus_to_exitcode(status)
    print(json.dumps(codes))


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """(exit codes by scene, what the processes of a scene say)."""
    root = tmp_path_factory.mktemp("scenes")
    env = {**os.environ, "XLA_FLAGS": alone(), "JAX_PLATFORMS": "cpu"}
    code = f"from tests.parallel.test_peers import play; play({str(root)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=WAITS)
    assert done.returncode == 0, done.stderr[-2000:]
    said = {name: [(root / name / f"{n}.log").read_text() for n in range(len(acts))] for name, acts in SCENES.items()}
    return json.loads(done.stdout.splitlines()[-1]), said


@pytest.mark.parametrize("name, gone, code, others", [
    # Once process 0 has ended JAX may end the others before they do so themselves, but who it was is said.
    ("the third", 2, -signal.SIGKILL, {peers.EXIT, -signal.SIGABRT}),
    ("the first", 0, -signal.SIGKILL, {peers.EXIT, -signal.SIGABRT}),
    ("while JAX waits", 1, -signal.SIGKILL, {peers.EXIT}),
    ("one that fails", 1, 2, {peers.EXIT}),
])  # fmt: skip
def test_who_has_ended_is_said_and_all_end(played, name, gone, code, others):
    codes, said = played[0][name], played[1][name]
    assert codes.pop(gone) == code and "has ended" not in said.pop(gone)
    assert set(codes) <= others, said
    for words in said:
        assert words.count("has ended before") == 1
        first, *more = [line for line in words.splitlines() if line.startswith("glmv: ")]
        assert re.match(rf"glmv: process {gone} of {len(SCENES[name])} \(.+\) has ended before the run did; ", first)
        assert "start all of them again with the same command" in first
        broken = ["glmv: so this was broken off here: RuntimeError: Connection closed by peer"]
        assert more == (broken if name == "while JAX waits" else [])


def test_processes_that_reach_the_end_say_nothing(played):
    assert played[0]["nobody"] == [0, 0]
    assert not any("glmv" in words or "Traceback" in words for words in played[1]["nobody"])


def test_one_process_watches_nobody(monkeypatch):
    started = []
    monkeypatch.setattr(peers, "_Watch", lambda *given: started.append(given))
    with peers.watched():
        assert not started

"""How a process learns of others: what is given, what a launcher has set, what nobody should wait for.

Not covered: TPU slices, SLURM and Open MPI themselves; that JAX finds processes by what they set is JAX's.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import jax
import pytest

from glmv_jax.parallel import multihost
from glmv_jax.typing import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "TPU_WORKER_HOSTNAMES", "SLURM_PROCID",
             "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES", "OMPI_MCA_orte_hnp_uri", "SLURM_STEP_NODELIST",
             "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """What JAX is asked to join, in an environment that says nothing of others."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    return calls


def test_one_process_asks_nobody(asked):
    assert multihost.start() == 1 and multihost.start(processes=1) == 1 and multihost.start(None, 1, 0) == 1
    assert not asked and multihost.launcher() == "" and multihost.is_first()
    assert multihost.agreed(True) is True and multihost.agreed(False) is False


def test_options_come_before_the_environment(asked, monkeypatch):
    for name, value in zip(VARIABLES, ("there:1", "4", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(multihost, "_reach", lambda *_: None)
    multihost.start(seconds=7)
    multihost.start("here:2", process=0)
    kwargs = {"initialization_timeout": 67, "heartbeat_timeout_seconds": 30, "cluster_detection_method": "deactivate"}
    assert asked == [(("there:1", 4, 3), kwargs), (("here:2", 4, 0), kwargs | {"initialization_timeout": 360})]


@pytest.mark.parametrize("given, message", [
    (dict(coordinator="a:1"), "--coordinator .* is given, but not --processes .*JAX_NUM_PROCESSES.*--process "),
    (dict(processes=2, process=0), "--processes .* is given, but not --coordinator .*give all three"),
    (dict(coordinator="a:1", processes=2, process=2), "--process 2: they are numbered from 0 to 1"),
    (dict(process=-1), "--process -1: they are numbered from 0"),
    (dict(processes=0), "--processes 0: there is at least one"),
    (dict(coordinator="a", processes=2, process=0), "--coordinator a is no HOST:PORT"),
])  # fmt: skip
def test_what_makes_no_sense_is_said(asked, given, message):
    with pytest.raises(UserError, match=message):
        multihost.start(**given)
    assert not asked


def test_a_variable_that_is_no_number_is_named(asked, monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(UserError, match="JAX_PROCESS_ID=first is no number"):
        multihost.start()


SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize("env, name", [
    (SLURM, "SLURM"),
    (SLURM | {"SLURM_NTASKS": "1"}, ""),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, ""),  # a shell in a job
    (MPI, "Open MPI"),
    (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, ""),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "GKE"),
    ({"TPU_WORKER_HOSTNAMES": "a"}, ""),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "GKE"),
    ({}, "the TPU slice"),
])  # fmt: skip
def test_launchers_are_known_by_what_they_set(asked, monkeypatch, env, name):
    monkeypatch.setattr(multihost.importlib.util, "find_spec", lambda _: True)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)  # as where there is a TPU
    if env.keys() & {"SLURM_PROCID", "OMPI_COMM_WORLD_SIZE"}:
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    platforms = jax.config.jax_platforms
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    try:
        jax.config.update("jax_platforms", None)
        assert multihost.launcher() == name
        jax.config.update("jax_platforms", "cpu")
        assert multihost.launcher() == (name if name in ("SLURM", "Open MPI") else "")
    finally:
        jax.config.update("jax_platforms", platforms)
    if name == "SLURM":
        multihost.start()
        assert asked[0][0] == (None, None, None) and asked[0][1]["cluster_detection_method"] is None


def joining(address: str, process: int, seconds: int = 60) -> subprocess.Popen:
    """`glmv eval` as one of two processes: it joins before it looks for its run."""
    argv = [sys.executable, "-m", "glmv_jax.cli", "eval", "--run", "/nowhere", "--coordinator", address,
            "--processes", "2", "--process", str(process), "--join-seconds", str(seconds)]  # fmt: skip
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.parametrize("process", [0, 1])
def test_others_that_do_not_come_are_waited_for_no_longer_than_said(process):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    began = time.monotonic()
    started = joining(address, process, seconds=1)
    _, shown = started.communicate(timeout=60)
    assert started.returncode == 2 and shown.startswith("glmv") and shown.count("\n") == 1, shown
    assert f"not found each other at {address} within 1 s; see that all of them run" in shown
    assert time.monotonic() - began < 50

"""Several processes as one run: who they are, how they find each other, and what they have to agree on.

One process is the default, and nobody is asked for others. There are some where they are named, by options of `glmv` or
by environment variables, all three of

    --coordinator HOST:PORT   JAX_COORDINATOR_ADDRESS   where process 0 listens
    --processes N             JAX_NUM_PROCESSES
    --process I               JAX_PROCESS_ID            which one this is, from 0

and where something has started them that says so in a way JAX knows: SLURM, Open MPI, GKE with TPUs, and the machines
of a TPU slice, whose metadata server is then asked. For two on a laptop:

    glmv train ... --coordinator localhost:1234 --processes 2 --process 0 &
    glmv train ... --coordinator localhost:1234 --processes 2 --process 1
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from glmv_jax.typing import UserError

SECONDS = 300  # that processes wait for each other at the start
SILENCE = 30  # seconds without a sign of one, after which the others end: they would wait for it for ever
_NAMES = {  # attribute: (option, environment variable)
    "coordinator": ("--coordinator", "JAX_COORDINATOR_ADDRESS"),
    "processes": ("--processes", "JAX_NUM_PROCESSES"),
    "process": ("--process", "JAX_PROCESS_ID"),
}
_TPU_SLICE = "the TPU slice"


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options above to a command."""
    group = parser.add_argument_group("several processes (default: as SLURM, GKE or a TPU slice says, else one)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument("--join-seconds", type=int, default=SECONDS, metavar="S", help=f"wait for others ({SECONDS})")


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, seconds: int = SECONDS
) -> int:
    """Joins the other processes of this run, if there are any, and returns how many there are.

    Call it before anything asks JAX for devices. What is None is taken from the environment.
    Raises: UserError when only a part is given, what is given makes no sense, or not all are there after `seconds`.
    """
    import jax

    asked = {"coordinator": coordinator, "processes": processes, "process": process}
    given: dict[str, Any] = {
        name: value for name in asked if (value := _or_environment(name, asked[name])) is not None
    }
    by = launcher()
    _check(given, by)
    if jax.distributed.is_initialized() or given.get("processes") == 1 or not (given or by):
        return jax.process_count() if jax.distributed.is_initialized() else 1
    address = given.get("coordinator", f"the address that {by} names")
    if len(given) == len(_NAMES) and given["process"]:
        _reach(address, seconds)
    # JAX ends the process with an abort when its patience is at an end; ours ends first.
    waiting = threading.Timer(seconds, _give_up, [address, seconds])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            given.get("coordinator"), given.get("processes"), given.get("process"), initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=SILENCE,
            cluster_detection_method="deactivate" if len(given) == len(_NAMES) else None,
        )  # fmt: skip
    except ValueError as error:
        if not given and by == _TPU_SLICE and "should be defined" in str(error):
            return 1  # TPUs without a metadata server: a machine by itself
        raise UserError(f"{by} has started several processes, but JAX cannot tell which ({error}); name them with "
                        "--coordinator, --processes and --process") from None  # fmt: skip
    except RuntimeError as error:
        if "must be called before" in str(error):  # a bug of ours
            raise
        raise UserError(_not_there(address, seconds) + f" ({' '.join(str(error).split())[:200]})") from None
    finally:
        waiting.cancel()
    return jax.process_count()


def _reach(address: str, seconds: float) -> None:
    """Waits until something listens there; UserError when nothing does after `seconds`."""
    end, (host, _, port) = time.monotonic() + seconds, address.rpartition(":")
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            if time.monotonic() > end:
                raise UserError(_not_there(address, seconds)) from None
            time.sleep(0.2)


def _give_up(address: str, seconds: float) -> None:
    """Ends the process, from a thread: JAX waits where no exception reaches it."""
    print(f"glmv: {_not_there(address, seconds)}", file=sys.stderr, flush=True)
    os._exit(2)


def _not_there(address: str, seconds: float) -> str:
    return (
        f"the processes of this run have not found each other at {address} within {seconds} s; see that all of them "
        "run, that this is the address of process 0, and that its port is free and open"
    )


def _or_environment(name: str, value: str | int | None) -> str | int | None:
    option, variable = _NAMES[name]
    if value is not None or not os.environ.get(variable):
        return value
    text = os.environ[variable]
    if name == "coordinator":
        return text
    if not text.isdecimal():
        raise UserError(f"{variable}={text} is no number; set it, or {option}, to one")
    return int(text)


def _check(given: dict[str, Any], by: str) -> None:
    """UserError for what cannot be meant."""
    spelt = lambda names: ", ".join(f"{_NAMES[n][0]} (or {_NAMES[n][1]})" for n in names)  # noqa: E731
    n, i, address = (given.get(name) for name in ("processes", "process", "coordinator"))
    if n is not None and n < 1:
        raise UserError(f"--processes {n}: there is at least one")
    if i is not None and not 0 <= i < (n or i + 1):
        raise UserError(f"--process {i}: they are numbered from 0{f' to {n - 1}' if n else ''}")
    missing = [name for name in _NAMES if name not in given]
    if given and missing and not by and n != 1:
        raise UserError(
            f"of several processes {spelt(given)} is given, but not {spelt(missing)}; give all three, or none for one "
            "process"
        )
    if address is not None and not str(address).rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator {address} is no HOST:PORT; give for example localhost:1234")


def launcher() -> str:
    """What has started this process as one of several, by what it has set; "" for nothing. Asks no network."""
    import jax  # it sets TPU_SKIP_MDS_QUERY where there is no TPU

    env = os.environ
    count = lambda *names: next((int(env[n]) for n in names if env.get(n, "").isdecimal()), 1)  # noqa: E731
    # In a shell of a job (salloc) the job has tasks, but this step has one.
    if "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env and count("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") > 1:
        return "SLURM"
    if "OMPI_MCA_orte_hnp_uri" in env and count("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    platforms = jax.config.jax_platforms or "tpu"  # type: ignore[attr-defined]  # set while jax is imported
    if "tpu" not in platforms or "TPU_SKIP_MDS_QUERY" in env or importlib.util.find_spec("libtpu") is None:
        return ""
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "GKE" if "," in hosts or count("MEGASCALE_NUM_SLICES") > 1 else ""
    return _TPU_SLICE


# --- of a run ---------------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def agreed(value: bool) -> bool:
    """Whether it is true in any process. All have to ask; with several that waits for the devices."""
    import jax

    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(value))))


def own_copy(arrays: Any) -> Any:
    """Arrays of the run, whole, on this process' first device: for work in which the others take no part, such as to
    draw answers. All have to ask, with the same; with one process they are handed back as they are."""
    import jax

    if jax.process_count() == 1:
        return arrays
    gathered = _gathered(jax.tree.leaves(arrays)[0].sharding.mesh)(arrays)
    return jax.tree.map(lambda x: x.addressable_data(0), gathered)


@functools.cache
def _gathered(mesh: Any) -> Callable[[Any], Any]:
    """Compiled: the same arrays, on every device of the mesh."""
    import jax

    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(lambda arrays: arrays, out_shardings=everywhere)


def own_rows(x: Any) -> Any:
    """NumPy: of an array of the run that is split by rows those that this process gave; all of any other."""
    import jax
    import numpy as np

    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[at]) for at in sorted(parts)])

"""Where the arms of a sweep run, as `glmv sweep --launcher` names it: `local` here, the others in `elsewhere`."""

from __future__ import annotations

import getpass
import re
import socket
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glmv_jax.train.sweep import devices
from glmv_jax.train.sweep.child import train_command
from glmv_jax.train.sweep.elsewhere import Kubernetes, TpuVms
from glmv_jax.train.sweep.plan import Run, Shared
from glmv_jax.train.sweep.remote import REPO, shown
from glmv_jax.typing import UserError


class Local:
    """Processes of this machine, each with its share of the accelerators."""

    name, remote, identity = "local", False, None

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.jobs = 1 if shared.jobs is None else shared.jobs

    def check(self) -> None:
        """Raises UserError for more runs at a time than the machine can hold apart."""
        devices.check(self.jobs)

    def prepare(self, say: Callable[[str], None]) -> None:
        """Nothing: all is here."""

    def command(self, run: Run) -> list[str]:
        return train_command(self.shared.experiment, self.shared.folder(run), self.shared.of(run))

    def environment(self, slot: int) -> dict[str, str]:
        """What the process in one of `jobs` places sees beside this one's environment."""
        return devices.environments(self.jobs)[slot]

    def would_prepare(self) -> list[str]:
        return []

    def would(self, run: Run) -> list[str]:
        return [shown(["glmv", *self.command(run)[3:]])]

    def left(self, run: Run) -> str:
        return ""


Launcher = Local | TpuVms | Kubernetes


def make(kind: str, shared: Shared, remembered: str | None, options: Mapping[str, Any]) -> Local | TpuVms | Kubernetes:
    """The launcher of that name.

    remembered: what the sweep's machines and folders have been called so far, None for a new sweep. options: of the
    command line, None where not given. Raises UserError for one that this launcher has no use for.
    """
    of_kind: dict[str, dict[str, Any]] = {
        "local": {},
        "tpu_vm": {"type": "", "slices": 1},
        "gke": {"jobset": str(REPO / "launch/gke_jobset.yaml")},
    }
    known = of_kind[kind] | ({} if kind == "local" else {"results": "", "every": 30.0})
    given = {name: value for name, value in options.items() if value is not None}
    if wrong := [name for name in given if name not in known]:
        raise UserError(f"--{wrong[0]} means nothing to --launcher {kind}; leave it out")
    settings = known | given
    if kind == "local":
        return Local(shared)
    if not (REPO / "launch").is_dir():
        raise UserError(f"--launcher {kind} takes a clone of the repository: its commit is what other machines get")
    if settings["every"] <= 0:
        raise UserError(f"--every {settings['every']:g} is no time; give seconds")
    identity = remembered or identity_of(shared.workdir)
    return {"tpu_vm": TpuVms, "gke": Kubernetes}[kind](shared, identity, **settings)


def identity_of(workdir: Path) -> str:
    """What a sweep's machines and folders elsewhere are called: after its folder, and unlike those of another one."""
    word = re.sub(r"[^a-z0-9]+", "-", workdir.name.lower()).strip("-")[:20].strip("-")
    whole = f"{getpass.getuser()}@{socket.gethostname()}:{workdir}"
    return f"{word if word[:1].isalpha() else f'sweep-{word}'[:20].strip('-')}-{zlib.crc32(whole.encode()):08x}"

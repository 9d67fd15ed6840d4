"""Where the arms of a sweep run when not here: on Cloud TPU machines, or on Kubernetes.

Both get the commit that is checked out, and write into a bucket. A launcher says which process of this machine an arm
is, `follow`, which looks after it, and which commands that comes to.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmv_jax.train.sweep import jobset as manifests
from glmv_jax.train.sweep.plan import Run, Shared
from glmv_jax.train.sweep.remote import REPO, JobSet, RemoteError, Results, TpuVm, call, shown
from glmv_jax.typing import UserError

ALL = 10**6  # arms at a time: other machines are as many as the quota gives


class _Remote(abc.ABC):
    """What both kinds of other machines share: the code that runs there, the names, and where results come from."""

    remote = True
    name = tool = ""

    def __init__(self, shared: Shared, identity: str, results: str, every: float) -> None:
        self.shared, self.identity, self.every = shared, identity, every
        self.jobs = ALL if shared.jobs is None else shared.jobs
        self._results = results.rstrip("/")
        self.experiment = _committed(shared.experiment)

    @abc.abstractmethod
    def arm(self, run: Run) -> TpuVm | JobSet:
        """What runs an arm there."""

    def machine(self, run: Run) -> str:
        """The name of an arm's machines: small letters, digits and -, at most 38."""
        return f"{self.identity}-{zlib.crc32(run.name.encode()):08x}"

    def path(self, run: Run) -> str:
        """Of an arm's folder among the runs in the bucket."""
        return f"{self.identity}/{run.name}"

    def results(self, run: Run) -> Results:
        return Results(f"{self._results}/{self.path(run)}", self.shared.folder(run))

    def check(self) -> None:
        """Raises UserError for what cannot be run."""
        if self.jobs < 1:
            raise UserError(f"--jobs {self.jobs} runs nothing; give a number from 1 on")

    def prepare(self, say: Callable[[str], None]) -> None:
        """Once, before the first arm. UserError when a tool is not there."""
        for tool in (self.tool, *(["gcloud"] if self._results.startswith("gs://") else [])):
            if shutil.which(tool) is None:
                raise UserError(f"--launcher {self.name} takes {tool}, which is not on PATH; install it")
        changed = call(["git", "-C", str(REPO), "status", "--porcelain", "--untracked-files=no"]).splitlines()
        if changed:
            say(f"the machines get this commit; {len(changed)} changed files are not in it ({changed[0][3:]} ...)")

    def environment(self, slot: int) -> dict[str, str]:
        return {}

    def command(self, run: Run) -> list[str]:
        given = {
            "kind": type(self.arm(run)).__name__, "arm": dataclasses.asdict(self.arm(run)),
            "source": self.results(run).source, "here": str(self.shared.folder(run)), "every": self.every,
        }  # fmt: skip
        return [sys.executable, "-m", "glmv_jax.train.sweep.follow", json.dumps(given)]

    def would_prepare(self) -> list[str]:
        """The commands before the first arm."""
        return []

    def would(self, run: Run) -> list[str]:
        """The commands of an arm that all goes well with, in their order."""
        commands = {name: shown(command) for name, command in self.arm(run).commands().items()}
        commands["state"] += f"  # every {self.every:g} s, until it has ended"
        commands["log"] += "  # only if it failed"
        results = self.results(run)
        copies = (results.DONE, *results.OTHERS)
        if results.source.startswith("gs://"):
            fetch = [shown(results.command(*copy)) for copy in copies]
        else:
            fetch = [shown(["cp", f"{results.source}/{name}", str(results.here / target)]) for name, target in copies]
        order = [name for name in ("create", "install", "run", "state", "log") if name in commands]
        return [*(commands[name] for name in order), *fetch, commands["delete"]]

    def left(self, run: Run) -> str:
        return f"it goes on as {self.machine(run)}; to end it: {shown(self.arm(run).commands()['delete'])}"


class TpuVms(_Remote):
    """Queued resources of Cloud TPU machines, by launch/tpu_vm.sh; it reads GLMV_ZONE, GLMV_BUCKET and GLMV_TIER."""

    name, tool = "tpu_vm", "gcloud"

    def __init__(self, shared: Shared, identity: str, results: str, every: float, type: str, slices: int) -> None:
        if not type:
            raise UserError("--launcher tpu_vm takes --type, the accelerator type of an arm, for example v5p-8")
        missing = [name for name in ("GLMV_ZONE", "GLMV_BUCKET") if not os.environ.get(name)]
        if missing:
            raise UserError(f"--launcher tpu_vm reads {missing[0]}, which is not set; see bash launch/tpu_vm.sh --help")
        super().__init__(shared, identity, results or f"gs://{os.environ['GLMV_BUCKET']}", every)
        self.type, self.slices = type, slices

    def arm(self, run: Run) -> TpuVm:
        overrides = tuple(self.shared.of(run))
        return TpuVm(self.machine(run), self.type, self.slices, self.path(run), self.experiment, overrides)

    def check(self) -> None:
        super().check()
        run = Run("any", {}, [], 0)  # the script's own complaints, once and before anything is asked for
        done = subprocess.run([*self.arm(run).script("create")[:2], "--dry-run", *self.arm(run).script("create")[2:]],
                              capture_output=True, text=True, check=False)  # fmt: skip
        if done.returncode:
            raise UserError(done.stderr.strip())


class Kubernetes(_Remote):
    """JobSets rendered from a file such as launch/gke_jobset.yaml, which says cluster, slices and bucket."""

    name, tool = "gke", "kubectl"

    def __init__(self, shared: Shared, identity: str, results: str, every: float, jobset: str) -> None:
        self.template = manifests.read(jobset)
        self.bucket = manifests.bucket(self.template, os.environ.get("GLMV_BUCKET", ""))
        super().__init__(shared, identity, results or f"gs://{self.bucket}/runs", every)
        commit = call(["git", "-C", str(REPO), "rev-parse", "--short=12", "HEAD"]).strip()
        self.code = f"glmv_jax-{commit}.tar.gz"

    def manifest(self, run: Run) -> dict:
        return manifests.render(
            self.template, name=self.machine(run), experiment=self.experiment, run=self.path(run), code=self.code,
            bucket=self.bucket, words=[f"--config.{text}" for text in self.shared.of(run)],
        )  # fmt: skip

    def arm(self, run: Run) -> JobSet:
        manifest = str(self.shared.folder(run) / "jobset.yaml")
        return JobSet(self.machine(run), manifest, self.template["metadata"].get("namespace", ""))

    def command(self, run: Run) -> list[str]:
        self.shared.folder(run).mkdir(parents=True, exist_ok=True)
        Path(self.arm(run).manifest).write_text(manifests.text(self.manifest(run)), encoding="utf-8")
        return super().command(run)

    def would(self, run: Run) -> list[str]:
        """As YAML: the commands as comments, then the JobSet, so that kubectl can be asked what it thinks of it."""
        return [*(f"# {line}" for line in super().would(run)), "---", manifests.text(self.manifest(run)).rstrip()]

    def upload(self) -> list[list[str]]:
        """What brings this commit into the bucket."""
        file = str(self.shared.workdir / self.code)
        return [["git", "-C", str(REPO), "archive", "--format=tar.gz", f"--output={file}", "HEAD"],
                ["gcloud", "storage", "cp", file, f"gs://{self.bucket}/code/{self.code}"]]  # fmt: skip

    def prepare(self, say: Callable[[str], None]) -> None:
        super().prepare(say)
        for command in self.upload():
            call(command)
        (self.shared.workdir / self.code).unlink()

    def would_prepare(self) -> list[str]:
        return [f"# {shown(command)}" for command in self.upload()]


def _committed(experiment: str) -> str:
    """The experiment as other machines find it, who get this commit. UserError when it is not in it."""
    found: Any = re.fullmatch(r"(.*?\.py)(?:(:)(.*))?", experiment, re.DOTALL)  # config.load has taken it
    file, colon, arg = found.groups("")
    path = Path(file).resolve()
    name = path.relative_to(REPO).as_posix() if path.is_relative_to(REPO) else ""
    try:
        call(["git", "-C", str(REPO), "cat-file", "-e", f"HEAD:{name or file}"])
    except RemoteError:
        raise UserError(f"{file} is not in the commit that other machines get; add it to {REPO} and commit") from None
    return f"{name}{colon}{arg}"

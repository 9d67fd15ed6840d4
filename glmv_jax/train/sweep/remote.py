"""Arms on other machines, by the tools a person would use: launch/tpu_vm.sh, kubectl, gcloud storage.

An arm is looked at, asked for, begun and given back; what that means is the business of its kind. Nothing is kept here:
where an arm stands, its machines say.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[3]
TPU_VM = REPO / "launch" / "tpu_vm.sh"

ABSENT, WAITING, IDLE, RUNNING, ENDED = "absent", "waiting", "idle", "running", "ended"
LOST = "lost"  # the machines were taken away: the run goes on from its last checkpoint on others
REFUSED = "refused"  # there will be no machines


class RemoteError(Exception):
    """A tool has failed: what it said, in a line. output: all of it."""

    def __init__(self, text: str, output: str = "") -> None:
        super().__init__(text)
        self.output = output


class Look(NamedTuple):
    """state: one of the words above. said: the same in the words of those who know, for people."""

    state: str
    said: str


def call(argv: Sequence[str]) -> str:
    """What a command prints. Raises RemoteError when it fails."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        output = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        why = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise RemoteError(f"{shown(argv[:4])} ...: {why}", output)
    return done.stdout


def shown(argv: Sequence[str]) -> str:
    """A command as it is typed from the repository's root."""
    return shlex.join(word.removeprefix(f"{REPO}/") for word in argv)


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """A queued resource of Cloud TPU machines with one run on it.

    name: of the resource. type, slices: what it is, as v5p-8. run: its folder in the bucket.
    """

    name: str
    type: str
    slices: int
    run: str
    experiment: str
    overrides: tuple[str, ...] = ()

    # Both words of Google's for a spot slice that is taken away come only after it was there.
    _STATES = {"ABSENT": ABSENT, "FAILED": REFUSED, "SUSPENDING": WAITING, "SUSPENDED": LOST}

    def script(self, command: str, *more: str) -> list[str]:
        """launch/tpu_vm.sh with these words."""
        which = [self.name] if command == "delete" else [self.name, self.type, str(self.slices)]
        return ["bash", str(TPU_VM), command, *which, *more]

    def commands(self) -> dict[str, list[str]]:
        """All that is done to an arm, by when."""
        start = self.script("run", self.run, self.experiment, *(f"--config.{text}" for text in self.overrides))
        return {
            "create": self.script("create"), "state": self.script("state"), "install": self.script("install"),
            "run": start, "log": self.script("log", "200"), "delete": self.script("delete"),
        }  # fmt: skip

    def look(self) -> Look:
        said = call(self.commands()["state"]).strip()
        google, _, ours = said.partition(" ")
        return Look(ours if google == "ACTIVE" else self._STATES.get(google, WAITING), said)

    def submit(self) -> bool:
        """Asks for the machines. Returns whether the run begins by itself as soon as they are there."""
        call(self.commands()["create"])
        return False

    def begin(self) -> None:
        """Starts the run, or goes on with it, on machines that are there."""
        call(self.commands()["install"])
        call(self.commands()["run"])

    def log(self) -> str:
        """The last of what the run said."""
        return call(self.commands()["log"])

    def delete(self) -> None:
        """Gives the machines back."""
        call(self.commands()["delete"])


@dataclasses.dataclass(frozen=True)
class JobSet:
    """A JobSet of Kubernetes, which restarts it when a slice goes.

    manifest: the file that says all of it. namespace: "" is kubectl's own.
    """

    name: str
    manifest: str
    namespace: str = ""

    def commands(self) -> dict[str, list[str]]:
        pods = f"jobset.sigs.k8s.io/jobset-name={self.name},batch.kubernetes.io/job-completion-index=0"
        commands = {
            "create": ["apply", "-f", self.manifest],
            "state": ["get", "jobset", self.name, "--ignore-not-found", "-o", "json"],
            "log": ["logs", "-l", pods, "--tail=200"],
            "delete": ["delete", "jobset", self.name, "--ignore-not-found"],
        }
        where = [f"--namespace={self.namespace}"] if self.namespace else []
        return {when: ["kubectl", *words, *where] for when, words in commands.items()}

    def look(self) -> Look:
        text = call(self.commands()["state"])
        if not text.strip():
            return Look(ABSENT, "absent")
        status = json.loads(text).get("status", {})
        for condition in status.get("conditions", ()):
            if condition["type"] in ("Completed", "Failed") and condition["status"] == "True":
                return Look(ENDED, f"{condition['type']}: {condition.get('message') or condition.get('reason')}")
        restarts = f", restarted {n} times" if (n := status.get("restarts", 0)) else ""
        ready = sum(job.get("ready", 0) for job in status.get("replicatedJobsStatus", ()))
        return Look(RUNNING, f"running{restarts}") if ready else Look(WAITING, f"waiting for machines{restarts}")

    def submit(self) -> bool:
        call(self.commands()["create"])
        return True

    def begin(self) -> None:
        """Once more from its last checkpoint: a JobSet that has ended does not begin again by itself."""
        self.delete()
        self.submit()

    def log(self) -> str:
        return call(self.commands()["log"])

    def delete(self) -> None:
        call(self.commands()["delete"])


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run leaves where it ran, brought here. source: gs://BUCKET/FOLDER, or a folder that is mounted here."""

    source: str
    here: Path

    # What a sweep's report reads: (name there, name here).
    DONE = ("results.json", "results.json.part")
    OTHERS = (("config.json", "config.json"), ("meta.json", "meta.json"), ("metrics.jsonl", "metrics.jsonl"))

    def progress(self) -> None:
        """The metrics so far, when there are any."""
        self._copy("metrics.jsonl", "metrics.jsonl")

    def fetch(self) -> bool:
        """Everything, if the run is finished. results.json says so here too, and has its name last."""
        if not self._copy(*self.DONE):
            return False
        for name, target in self.OTHERS:
            self._copy(name, target)
        os.replace(self.here / "results.json.part", self.here / "results.json")
        return True

    def command(self, name: str, target: str) -> list[str]:
        return ["gcloud", "storage", "cp", f"{self.source}/{name}", str(self.here / target)]

    def _copy(self, name: str, target: str) -> bool:
        """Whether there was such a file. RemoteError when that cannot be known."""
        if not self.source.startswith("gs://"):
            if not (path := Path(self.source) / name).is_file():
                return False
            shutil.copy(path, self.here / f"{target}.copy")
            os.replace(self.here / f"{target}.copy", self.here / target)
            return True
        try:
            call(self.command(name, target))
        except RemoteError as error:
            if "matched no objects" in error.output:
                return False
            raise
        return True

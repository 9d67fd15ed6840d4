"""A gcloud and a kubectl over a folder, $FAKE: Google's side of a sweep, as far as the launchers see it.

calls            what was asked of it, a JSON list of words a line
plays.json       {a part of a run's path: how it goes}, else it succeeds:
                 succeeds | fails | preempted (once, then it succeeds) | refused | endless | unreachable
machines/NAME/   what is there: a queued resource or a JobSet, with the run on it
bucket/          gs://
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import sys

FAKE = pathlib.Path(os.environ["FAKE"])


def main(words: list[str]) -> int:
    with open(FAKE / "calls", "a", encoding="utf-8") as file:
        file.write(json.dumps([pathlib.Path(sys.argv[0]).name, *words]) + "\n")
    if words[:2] == ["storage", "cp"]:
        return copy(*words[2:])
    return kubectl(words) if words[0] in ("apply", "get", "logs", "delete") else gcloud(words)


def complain(text: str) -> int:
    print(text, file=sys.stderr)
    return 1


def copy(source: str, target: str) -> int:
    there, here = (pathlib.Path(re.sub("^gs://", f"{FAKE}/bucket/", name)) for name in (source, target))
    if not there.is_file():
        return complain(f"ERROR: (gcloud.storage.cp) The following URLs matched no objects or files:\n-{source}")
    here.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(there, here)
    return 0


class Machines:
    """A queued resource or a JobSet; what it remembers lies in files of its folder."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, FAKE / "machines" / name

    def get(self, key: str, default=0):
        path = self.folder / key
        return json.loads(path.read_text()) if path.exists() else default

    def set(self, key: str, value) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / key).write_text(json.dumps(value))

    def count(self, key: str) -> int:
        self.set(key, self.get(key) + 1)
        return self.get(key)

    def play(self) -> str:
        plays = json.loads((FAKE / "plays.json").read_text())
        return next(
            (play for part, play in plays.items() if part in self.name or part in self.get("run", "")), "succeeds"
        )

    def before(self) -> int:
        """How often the run was begun on machines that have gone."""
        gone = FAKE / "gone" / self.name
        return int(gone.read_text()) if gone.exists() else 0

    def delete(self) -> None:
        (FAKE / "gone").mkdir(exist_ok=True)
        (FAKE / "gone" / self.name).write_text(str(self.before() + 1))
        shutil.rmtree(self.folder)

    def train(self, root: str) -> None:
        """A step: a line of metrics; what the run's words are decides the loss."""
        folder = FAKE / "bucket" / root / self.get("run", "")
        folder.mkdir(parents=True, exist_ok=True)
        loss = float(re.search(r"optim\.lr=(\S+)", " ".join(self.get("words", [])))[1])
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.count("step"), "wall": 1.0, "kind": "train", "loss": loss}) + "\n")

    def finish(self, root: str) -> None:
        folder = FAKE / "bucket" / root / self.get("run", "")
        loss = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
        results = {"metrics": {"error": {"trained": 10 * loss}}, "seconds": 60.0, "tokens": 10, "samples": 1}
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "config.json").write_text("{}")


# --- Cloud TPU --------------------------------------------------------------------------------------------------------


def gcloud(words: list[str]) -> int:
    verb, name = words[3:5]
    machines = Machines(re.sub("-[01]$", "", name.partition(":")[0]) if verb != "scp" else words[5].partition(":")[0])
    if verb == "create":
        machines.set("looks", 0)
        return 0
    if machines.play() == "unreachable":
        return complain("ERROR: (gcloud.compute.tpus) There was a problem refreshing your credentials")
    if not machines.folder.is_dir():
        return complain("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found.")
    if verb == "delete":
        machines.delete()
    elif verb == "describe":
        print(google_says(machines))
    elif verb == "ssh":
        return ssh(machines, next(w.partition("=")[2] for w in words if w.startswith("--command=")))
    return 0


def google_says(machines: Machines) -> str:
    if machines.count("looks") == 1:
        return "PROVISIONING"
    if machines.play() == "refused":
        return "FAILED"
    taken = machines.play() == "preempted" and machines.before() == 0 and machines.get("ended") > 1
    return "SUSPENDED" if taken else "ACTIVE"


def ssh(machines: Machines, command: str) -> int:
    if "gcsfuse" in command:
        machines.set("installed", True)
    elif "nohup" in command:
        words = command.partition(" train --config ")[2].partition(">")[0].split()
        machines.set("words", words)
        machines.set("run", words[words.index("--workdir") + 1].replace("\\", "").removeprefix("../runs/"))
        assert machines.get("installed"), "a run on machines without the package"
    elif command.startswith("tail"):
        print("step 1\nValueError: the loss is a pineapple")
    else:
        print(training(machines))
    return 0


def training(machines: Machines) -> str:
    """idle, running for two looks, ended: with results when all goes well."""
    if not machines.get("run"):
        return "idle"
    root, play = os.environ["GLMV_BUCKET"], machines.play()
    if machines.get("step") < 2 or play == "endless":
        machines.train(root)
        return "running"
    if play == "succeeds" or play == "preempted" and machines.before():
        machines.finish(root)
    machines.count("ended")
    return "ended"


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def kubectl(words: list[str]) -> int:
    if words[0] == "apply":
        import yaml

        made = yaml.safe_load(pathlib.Path(words[2]).read_text())
        machines = Machines(made["metadata"]["name"])
        (container,) = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        env = {entry["name"]: entry["value"] for entry in container["env"]}
        code = FAKE / "bucket" / os.environ["GLMV_BUCKET"] / "code" / env["CODE"]
        if not code.is_file():
            return complain(f"no {code}")
        machines.set("run", env["RUN"])
        machines.set("words", container["args"][2:])
    elif words[0] == "logs":
        print("step 1\nValueError: the loss is a pineapple")
    elif (machines := Machines(words[2])).folder.is_dir():
        if words[0] == "delete":
            machines.delete()
        else:
            print(json.dumps({"kind": "JobSet", "status": status(machines)}))
    return 0


def status(machines: Machines) -> dict:
    """Pending for a look, ready for two, over; `preempted` restarts in between."""
    look, play = machines.count("looks"), machines.play()
    restarts = int(play == "preempted" and look > 3)
    ready = 0 if look in (1, 4) else 2
    said = {"restarts": restarts, "replicatedJobsStatus": [{"name": "slice", "ready": ready, "active": 2}]}
    if play == "endless" or look <= 3 or restarts and look <= 6:
        if ready:
            machines.train(f"{os.environ['GLMV_BUCKET']}/runs")
        return said
    if play != "fails":
        machines.finish(f"{os.environ['GLMV_BUCKET']}/runs")
    kind = "Failed" if play == "fails" else "Completed"
    condition = {"type": kind, "status": "True", "reason": "FailedJobs", "message": "jobset ended"}
    return said | {"conditions": [{"type": "Suspended", "status": "False"}, condition]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

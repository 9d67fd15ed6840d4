"""The launch files for pods: what a dry run prints, the real thing against a gcloud of our own, fields of the YAML.

Not covered: Google's side. That these commands and fields are the right ones is read in its documents, not tried.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from glmv_jax import config
from tests.kubernetes import JOBSET, RAY_CLUSTER, complaints

REPO = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = "launch/tpu_vm.sh"
ENV = {"GLMV_ZONE": "us-east5-a", "GLMV_BUCKET": "my-bucket"}


def tpu_vm(*args: str, **env: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GLMV_")}
    return subprocess.run(
        ["bash", SCRIPT, *args], cwd=REPO, capture_output=True, text=True, env={**kept, **ENV, **env}, check=False,
        timeout=60,
    )  # fmt: skip


def test_it_passes_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([shellcheck, "-x", SCRIPT], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


TPUS = "gcloud compute tpus"
CREATE = "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5"
DRY = {
    "create vlm v5p-128":
        [f"{TPUS} queued-resources create vlm --node-id=vlm {CREATE} --spot --zone=us-east5-a"],
    "create vlm v5p-128 2":
        [f"{TPUS} queued-resources create vlm --node-count=2 --node-prefix=vlm {CREATE} --spot --zone=us-east5-a"],
    "wait vlm":
        ["# every 30 s until it says ACTIVE; FAILED or SUSPENDED ends it",
         f"{TPUS} queued-resources describe vlm '--format=value(state.state)' --zone=us-east5-a"],
    "stop vlm v5p-128 2":
        [f"{TPUS} tpu-vm ssh vlm-{n} --zone=us-east5-a --worker=all '--command=kill -TERM \"$(cat train.pid)\"'"
         for n in (0, 1)],
    "run vlm v5p-128 1 pretrain e.py:size=l --config.batch=512":
        [f"{TPUS} tpu-vm ssh vlm --zone=us-east5-a --worker=all '--command=(cd glmv_jax && exec nohup .venv/bin/glmv "
         "train --config e.py:size=l --workdir ../runs/pretrain --config.batch=512 > ../train.log 2>&1 < /dev/null) & "
         "echo $! > train.pid'"],
    "state vlm v5p-128":
        [f"{TPUS} queued-resources describe vlm '--format=value(state.state)' --zone=us-east5-a",
         f"{TPUS} tpu-vm ssh vlm --zone=us-east5-a --worker=0 '--command=if [ ! -e train.pid ]; then echo idle",
         'elif kill -0 "$(cat train.pid)" 2>/dev/null; then echo running', "else echo ended; fi'"],
    "log vlm v5p-128 1 20":
        [f"{TPUS} tpu-vm ssh vlm --zone=us-east5-a --worker=0 '--command=tail -n 20 train.log'"],
    "log vlm v5p-128 2":
        [f"{TPUS} tpu-vm ssh vlm-0 --zone=us-east5-a --worker=0 '--command=tail -n 40 -F train.log'"],
    "delete vlm":
        [f"{TPUS} queued-resources delete vlm --force --quiet --zone=us-east5-a"],
}  # fmt: skip


@pytest.mark.parametrize("words", DRY)
def test_a_dry_run_prints_the_commands(words):
    done = tpu_vm("--dry-run", *words.split())
    assert done.returncode == 0 and done.stdout.splitlines() == DRY[words], done.stdout + done.stderr


def test_tiers_and_versions():
    made = lambda kind, **env: tpu_vm("--dry-run", "create", "a", kind, **env).stdout  # noqa: E731
    assert "--reserved" in made("v6e-16", GLMV_TIER="reserved") and "v2-alpha-tpuv6e" in made("v6e-16")
    assert "--spot" not in made("v6e-16", GLMV_TIER="on-demand")
    assert "--runtime-version=other --spot" in made("v9-8", GLMV_RUNTIME="other")


@pytest.mark.parametrize("args, message", [
    (["fly", "vlm"], "no command 'fly'"),
    (["--fast"], "unknown option --fast"),
    (["create", "Vlm", "v5p-8"], "small letters, digits and -, not 'Vlm'"),
    (["create", "vlm"], "the accelerator type is like v5p-128, not ''"),
    (["create", "vlm", "v5p-8", "two"], "a whole number, not 'two'"),
    (["create", "vlm", "tpu7x-8"], "use launch/gke_jobset.yaml"),
    (["create", "vlm", "v9-8"], "no software version known for v9-8"),
    (["create", "vlm", "v5p-8", "GLMV_TIER=free"], "use spot, on-demand or reserved"),
    (["delete", "vlm", "GLMV_ZONE="], "export GLMV_ZONE="),
    (["install", "vlm", "v5p-8", "GLMV_BUCKET="], "export GLMV_BUCKET="),
    (["run", "vlm", "v5p-8", "1", "r"], "run needs RUN and EXPERIMENT"),
    (["log", "vlm", "v5p-8", "1", "all"], "LINES is a whole number, not 'all'"),
])  # fmt: skip
def test_wrong_calls_say_what_to_do(args, message):
    env = dict(a.split("=", 1) for a in args if a.startswith("GLMV_"))
    words = [a for a in args if not a.startswith("GLMV_")]
    done = tpu_vm(*(words if words[0] == "--fast" else ["--dry-run", *words]), **env)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


# --- against a gcloud that runs what it is told on this machine -------------------------------------------------------

GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$FAKE/calls"
[[ ! -e "$FAKE/error" ]] || { cat "$FAKE/error" >&2; exit 1; }
for word in "$@"; do
  case "$word" in
    describe) [[ -e "$FAKE/asked" ]] && echo ACTIVE || { touch "$FAKE/asked"; echo PROVISIONING; } ;;
    --command=*) cd "$FAKE/home" && exec bash -c "${word#--command=}" ;;
  esac
done
"""
GLMV = """#!/usr/bin/env bash
trap 'echo done > ../stopped; exit' TERM
printf '%s\\n' "$@" > ../args
echo step 1
/bin/sleep 60 &
wait
"""


@pytest.fixture
def fake(tmp_path):
    """A folder with bin/gcloud, and a machine in home."""
    for path, text in (("bin/gcloud", GCLOUD), ("bin/sleep", "#!/bin/sh\nexec /bin/sleep 0.1\n"),
                       ("home/glmv_jax/.venv/bin/glmv", GLMV)):  # fmt: skip
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    return tmp_path


def called(fake, *args: str) -> subprocess.CompletedProcess:
    return tpu_vm(*args, FAKE=str(fake), PATH=f"{fake / 'bin'}:{os.environ['PATH']}")


def appears(path: pathlib.Path) -> str:
    for _ in range(100):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} does not appear")


def test_a_run_is_started_with_its_very_words_and_stopped(fake):
    done = called(fake, "run", "vlm", "v5p-8", "1", "pre train", "e.py:size=l", "--config.a=it's $HOME", "--config.b=")
    assert done.returncode == 0, done.stderr
    args = appears(fake / "home" / "args")
    assert args.splitlines() == ["train", "--config", "e.py:size=l", "--workdir", "../runs/pre train",
                                 "--config.a=it's $HOME", "--config.b="]  # fmt: skip
    assert appears(fake / "home" / "train.log") == "step 1\n"
    pid = int(appears(fake / "home" / "train.pid"))
    try:
        assert called(fake, "stop", "vlm", "v5p-8").returncode == 0
        assert appears(fake / "home" / "stopped") == "done\n"
    finally:
        if not (fake / "home" / "stopped").exists():
            os.kill(pid, signal.SIGKILL)


def test_what_a_schema_does_not_know_is_a_complaint():
    jobset = yaml.safe_load((REPO / "launch" / "gke_jobset.yaml").read_text(encoding="utf-8"))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["paralelism"], job["completions"] = job.pop("parallelism"), "32"
    del job["template"]["spec"]["containers"][0]["name"]
    at = ".spec.replicatedJobs[0].template.spec"
    assert complaints(jobset, JOBSET) == [
        f"{at}.paralelism: unknown field", f"{at}.completions: '32' is no int",
        f"{at}.template.spec.containers[0]: lacks name",
    ]  # fmt: skip


def test_waiting_ends_when_the_machines_are_there(fake):
    done = called(fake, "wait", "vlm")
    assert done.returncode == 0 and done.stdout == "vlm: PROVISIONING\n"
    assert len((fake / "calls").read_text().splitlines()) == 2


def test_the_state_is_googles_word_and_the_runs(fake):
    state = lambda: called(fake, "state", "vlm", "v5p-8").stdout.strip()  # noqa: E731
    assert (state(), state()) == ("PROVISIONING", "ACTIVE idle")
    (fake / "home" / "train.pid").write_text(str(os.getpid()))
    assert state() == "ACTIVE running"
    with subprocess.Popen(["true"]) as gone:
        (fake / "home" / "train.pid").write_text(str(gone.pid))
    assert state() == "ACTIVE ended"
    (fake / "error").write_text("ERROR: NOT_FOUND: vlm")
    assert state() == "ABSENT" and "there is no vlm; create it" in called(fake, "wait", "vlm").stderr
    (fake / "error").write_text("ERROR: PERMISSION_DENIED")
    for command in ("state", "wait"):
        done = called(fake, command, "vlm", "v5p-8")
        assert done.returncode and not done.stdout and done.stderr == "ERROR: PERMISSION_DENIED"


def test_a_command_that_fails_on_one_node_fails(fake):
    done = called(fake, "stop", "vlm", "v5p-8", "2")  # no train.pid
    assert done.returncode == 2 and "failed on a machine of vlm" in done.stderr


def test_resume_does_everything_in_order():
    done = tpu_vm("--dry-run", "resume", "vlm", "v5p-8", "1", "pretrain", "e.py")
    commands = [line for line in done.stdout.splitlines() if line.startswith(("gcloud", "git"))]
    verbs = ("delete", "create", "describe", "archive", "scp", "ssh", "ssh")
    assert [next(v for v in line.split() if v in verbs) for line in commands] == list(verbs)
    assert "--workdir ../runs/pretrain" in commands[-1] and "gcsfuse --implicit-dirs" in done.stdout


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def test_the_jobset_hangs_together():
    jobset = yaml.safe_load((REPO / "launch" / "gke_jobset.yaml").read_text(encoding="utf-8"))
    assert complaints(jobset, JOBSET) == []
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (slice_,) = jobset["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert slice_["replicas"] == 2 and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    (volume,) = pod["volumes"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/bucket"}]
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert config.load(str(REPO / env["EXPERIMENT"])).stage == "pretrain"
    text, zero = container["args"]
    assert container["command"] == ["bash", "-euc"] and "exec glmv train" in text and zero == "glmv"
    assert text.rstrip().endswith("--config \"$EXPERIMENT\" --workdir \"/bucket/runs/$RUN\" \"$@\"")
    assert "--on-term 143" in text  # a pod that was stopped has not succeeded: it has to come again
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_the_ray_cluster_has_a_group_and_a_resource_for_each_role():
    text = (REPO / "launch" / "ray_cluster.yaml").read_text(encoding="utf-8")
    cluster = yaml.safe_load(text)
    assert complaints(cluster, RAY_CLUSTER) == []
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    assert list(groups) == ["trainer", "rollout", "reward", "environment", "judge"]
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    for name, group in groups.items():
        # KubeRay puts the value on a shell's command line as it is: JSON in quotes of its own.
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {name: 1}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == head["image"] and cluster["spec"]["rayVersion"] in head["image"]
        chips = container["resources"]["limits"].get("google.com/tpu")
        topology = pod.get("nodeSelector", {}).get("cloud.google.com/gke-tpu-topology", "0")
        assert math.prod(map(int, topology.split("x"))) == (chips or 0) * group["numOfHosts"]
        mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounts == {volume["name"] for volume in pod.get("volumes", ())}
        if mounts:
            assert group["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    asked = re.search(r"--entrypoint-resources '(.*?)'", text)[1]
    assert json.loads(asked) == {"trainer": 1} and groups["trainer"]["replicas"] == 1
    experiment, workdir = re.search(r"--config (\S+) --workdir (\S+)", text).groups()
    cfg = config.load(str(REPO / experiment))
    assert cfg.stage == "rl" and workdir.startswith("/runs/")
    given = [a or b for a, b in re.findall(r'"--config\.(\S+=.+?)"|--config\.(\S+=\S+)', text)]
    workers = config.override(cfg, given).rollout.workers
    for role, needs in workers.needs.items():
        assert role in groups
        if needs.resources:
            assert workers[role] * dict(needs.resources)[role] <= groups[role]["maxReplicas"]
    assert workers.ray == "auto" and {role for role, needs in workers.needs.items() if needs.resources} == {
        role for role in workers.needs if workers[role]
    }

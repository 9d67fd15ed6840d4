"""`glmv sweep` on other machines, against a gcloud and a kubectl of our own that play how runs go (fake_cloud.py).

What the real ones answer is read in their documents, not tried.
"""

from __future__ import annotations

import collections
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from glmv_jax import cli
from glmv_jax.train.sweep import devices, jobset
from glmv_jax.train.sweep import main as sweep_main
from glmv_jax.train.sweep.follow import BLIND, Follower
from glmv_jax.train.sweep.remote import REPO, Results, TpuVm
from glmv_jax.typing import UserError
from tests.kubernetes import JOBSET, complaints

EXPERIMENT = str(REPO / "experiments" / "vlm_sft.py:size=nano")


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A folder that is Google's side, with its tools on PATH; `plays`: see fake_cloud.py."""
    folder = tmp_path / "cloud"
    (folder / "bin").mkdir(parents=True)
    program = Path(__file__).with_name("fake_cloud.py").read_text()
    for tool in ("gcloud", "kubectl"):
        flags = " -SE" if tool == "gcloud" else ""  # it takes no package and is asked often
        (folder / "bin" / tool).write_text(f"#!{sys.executable}{flags}\n{program}")
        (folder / "bin" / tool).chmod(0o755)
    for name, value in {"FAKE": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "GLMV_ZONE": "z",
                        "GLMV_BUCKET": "my-bucket-of-mine", "PYTHONPATH": str(REPO)}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    plays(folder)
    return folder


def plays(cloud, **each: str) -> None:
    (cloud / "plays.json").write_text(json.dumps({name.replace("_", "="): play for name, play in each.items()}))


def calls(cloud) -> list[list[str]]:
    path = cloud / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def machines(cloud) -> list[str]:
    return sorted(path.name for path in (cloud / "machines").glob("*"))


def sweep(tmp_path, launcher: str, *more: str, rates: str = "1.0,2.0,3.0") -> int:
    which = ["--type", "v5p-8"] if launcher == "tpu_vm" else []
    return cli.main(["sweep", "--config", EXPERIMENT, "--workdir", str(tmp_path / "rates"), "--launcher", launcher,
                     *which, "--every", "0.01", "--set", f"optim.lr={rates}", *more])  # fmt: skip


def states(tmp_path) -> dict[str, str]:
    return {run["name"]: run["status"] for run in json.loads((tmp_path / "rates" / "sweep.json").read_text())["runs"]}


def errors(tmp_path) -> dict[str, float]:
    arms = json.loads((tmp_path / "rates" / "sweep.json").read_text())["results"]["arms"]
    return {label: found["error"]["mean"] for label, found in arms.items() if found}


# --- whole sweeps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["tpu_vm", "gke"])
def test_one_arm_succeeds_one_fails_one_is_preempted(launcher, cloud, tmp_path, capfd):
    plays(cloud, lr_2="fails", lr_3="preempted")
    assert sweep(tmp_path, launcher) == 1
    said = capfd.readouterr().out
    assert states(tmp_path) == {"lr=1.0": "finished", "lr=2.0": "failed", "lr=3.0": "finished"}
    assert errors(tmp_path) == {"1.0": 10.0, "3.0": 30.0}
    assert "lr=2.0 failed: exit code 1: ValueError: the loss is a pineapple" in said and "  | step 1\n" in said
    assert "1 of 3 runs did not finish; the same command tries them again" in said and "1 failed" in said
    assert machines(cloud) == []  # all are given back, those of the run that failed too
    verb = "create" if launcher == "tpu_vm" else "apply"
    asked = [call for call in calls(cloud) if verb in call]
    assert len(asked) == (4 if launcher == "tpu_vm" else 3)  # Kubernetes restarts a JobSet by itself
    log = (tmp_path / "rates" / "lr=3.0" / "train.log").read_text()
    assert ("SUSPENDED" if launcher == "tpu_vm" else "restarted 1 times") in log
    steps = [row["step"] for row in map(json.loads, (tmp_path / "rates/lr=3.0/metrics.jsonl").read_text().splitlines())]
    assert len(steps) == 4  # those before it was taken away and those after it are of one run

    plays(cloud)
    before = len(calls(cloud))
    assert sweep(tmp_path, launcher) == 0
    assert "2 of 3 runs are already finished" in capfd.readouterr().out
    again = [call for call in calls(cloud)[before:] if verb in call]
    assert len(again) == 1 and errors(tmp_path) == {"1.0": 10.0, "2.0": 20.0, "3.0": 30.0}
    asked = len(calls(cloud))
    assert sweep(tmp_path, launcher) == 0 and len(calls(cloud)) == asked  # nothing left to do, nobody to ask


@pytest.mark.parametrize("launcher", ["tpu_vm", "gke"])
def test_a_dry_run_prints_what_a_run_then_does(launcher, cloud, tmp_path, capsys):
    assert sweep(tmp_path, launcher, "--dry-run", rates="1.0") == 0
    printed = capsys.readouterr().out
    assert calls(cloud) == [] and not (tmp_path / "rates").exists()
    assert sweep(tmp_path, launcher, rates="1.0") == 0
    done = collections.Counter(map(shlex.join, calls(cloud)))
    told = collections.Counter()
    for line in printed.splitlines():
        words = shlex.split(line.removeprefix("# "), comments=True) if _is_command(line) else []
        if words[:2] == ["bash", "launch/tpu_vm.sh"]:  # which has a dry run of its own
            dry = subprocess.run(
                [*words[:2], "--dry-run", *words[2:]], cwd=REPO, capture_output=True, text=True, check=True
            )
            told.update(_gcloud(dry.stdout))
        elif words and words[0] in ("gcloud", "kubectl"):
            told[shlex.join(words)] += 1
    asks = ("describe", "kubectl get", "tail -n", "logs", "train.pid ]", "storage cp gs:")  # as often as it takes
    once = lambda counted: {line: n for line, n in counted.items() if not any(ask in line for ask in asks)}  # noqa: E731
    assert once(told) == once(done) and sum(once(done).values()) >= 3
    assert {line for line in told if "tail -n" not in line and "logs" not in line} <= set(done)


def _is_command(line: str) -> bool:
    return line.removeprefix("# ").startswith(("bash launch/", "gcloud ", "kubectl "))


def _gcloud(text: str) -> list[str]:
    """The gcloud calls of a dry run of tpu_vm.sh, whose words may go over several lines."""
    return [shlex.join(["gcloud", *shlex.split(piece)]) for piece in ("\n" + text).split("\ngcloud ")[1:]]


def test_ctrl_c_leaves_the_arms_at_work_and_the_same_command_finds_them(cloud, tmp_path, capfd):
    plays(cloud, lr="endless")
    argv = [sys.executable, "-m", "glmv_jax.cli", "sweep", "--config", EXPERIMENT, "--workdir", str(tmp_path / "rates"),
            "--launcher", "tpu_vm", "--type", "v5p-8", "--every", "0.01", "--set", "optim.lr=1.0"]  # fmt: skip
    log = tmp_path / "rates" / "lr=1.0" / "train.log"
    with subprocess.Popen(argv, cwd=REPO, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not (log.exists() and "ACTIVE running" in log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[0]
    (machine,) = machines(cloud)
    assert process.returncode == 130 and states(tmp_path) == {"lr=1.0": "interrupted"}
    assert f"lr=1.0: it goes on as {machine}; to end it: bash launch/tpu_vm.sh delete {machine}" in said
    assert f"no longer looked at: {machine} goes on by itself" in log.read_text()
    plays(cloud)
    assert sweep(tmp_path, "tpu_vm", rates="1.0") == 0 and errors(tmp_path) == {"1.0": 10.0}
    assert sum("create" in call for call in calls(cloud)) == 1 and machines(cloud) == []


@pytest.mark.parametrize(("play", "said", "left"), [
    ("refused", "there will be no machines: FAILED; see quota and zone, or give another --type", []),
    ("unreachable", f"nothing could be learnt of it {BLIND} times in a row; it may go on by itself", ["arm"]),
])  # fmt: skip
def test_an_arm_that_gets_nowhere_says_why(play, said, left, cloud, tmp_path):
    (cloud / "machines" / "arm").mkdir(parents=True)  # which an earlier call had asked for
    plays(cloud, arm=play)
    lines: list[str] = []
    arm = TpuVm("arm", "v5p-8", 1, "id/arm", "e.py")
    assert Follower(arm, Results("gs://my-bucket-of-mine/id/arm", tmp_path), 0.0, lines.append).run() == 1
    assert lines[-1] == said and machines(cloud) == left
    assert sum("create" in call for call in calls(cloud)) == (1 if play == "refused" else 0)


def test_results_from_a_shared_folder(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir(), here.mkdir()
    results = Results(str(there), here)
    (there / "metrics.jsonl").write_text("1\n")
    assert not results.fetch() and os.listdir(here) == []
    results.progress()
    assert os.listdir(here) == ["metrics.jsonl"]
    (there / "results.json").write_text("{}")
    (there / "metrics.jsonl").write_text("1\n2\n")
    assert results.fetch() and sorted(os.listdir(here)) == ["metrics.jsonl", "results.json"]
    assert (here / "metrics.jsonl").read_text() == "1\n2\n"


# --- JobSets ----------------------------------------------------------------------------------------------------------


def test_a_rendered_jobset_is_the_shipped_one_with_an_arms_values(cloud, tmp_path, capsys):
    assert sweep(tmp_path, "gke", "--config.data.seed=3", "--dry-run") == 0
    first, *_ = made = [one for one in yaml.safe_load_all(capsys.readouterr().out) if one]
    assert len({one["metadata"]["name"] for one in made}) == 3 and all(complaints(one, JOBSET) == [] for one in made)
    shipped = jobset.read(str(REPO / "launch" / "gke_jobset.yaml"))
    (pod,) = (one["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"] for one in [first])
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket-of-mine"
    env = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert env["EXPERIMENT"] == "experiments/vlm_sft.py:size=nano" and env["RUN"].endswith("/lr=1.0")
    script, *words = pod["containers"][0]["args"]
    assert words == ["glmv", "--config.data.seed=3", "--config.optim.lr=1.0"]
    assert first["spec"]["failurePolicy"]["maxRestarts"] == jobset.RESTARTS
    same = jobset.render(shipped, name="glmv", experiment="experiments/vlm_pretrain.py:size=l", run="pretrain",
                         code="glmv_jax.tar.gz", bucket="my-bucket", words=[])  # fmt: skip
    same["spec"]["failurePolicy"]["maxRestarts"] = 100
    assert same == shipped and yaml.safe_load(jobset.text(same)) == shipped


def test_a_jobset_that_cannot_be_filled_in_is_refused(tmp_path):
    path = tmp_path / "own.yaml"
    text = (REPO / "launch" / "gke_jobset.yaml").read_text()
    for wrong, message in [
        (text.replace("name: RUN", "name: RAN"), "lacks the variable RUN"),
        (text.replace("kind: JobSet", "kind: Job"), "lacks kind: JobSet"),
        ("a: [", "is no JobSet with one container"),
        ("a: 1", "is no JobSet with one container"),
    ]:
        path.write_text(wrong)
        with pytest.raises(UserError, match=message):
            jobset.read(str(path))
    with pytest.raises(UserError, match="bucketName is still my-bucket; change it, or export GLMV_BUCKET"):
        jobset.bucket(jobset.read(str(REPO / "launch" / "gke_jobset.yaml")), "")


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_wrong_input_is_one_line(cloud, tmp_path, capsys, monkeypatch):
    def complaint(*more: str) -> str:
        argv = ["sweep", "--config", EXPERIMENT, "--workdir", str(tmp_path / "rates"), "--set", "optim.lr=1.0", *more]
        assert cli.main(argv) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err.strip()

    assert "takes --type, the accelerator type of an arm" in complaint("--launcher", "tpu_vm")
    assert "--type means nothing to --launcher local" in complaint("--type", "v5p-8")
    assert "--slices means nothing to --launcher gke" in complaint("--launcher", "gke", "--slices", "2")
    tpu = ("--launcher", "tpu_vm", "--type")
    assert "the accelerator type is like v5p-128, not 'big'" in complaint(*tpu, "big")
    assert "--every 0 is no time" in complaint(*tpu, "v5p-8", "--every", "0")
    assert "--jobs 0 runs nothing" in complaint(*tpu, "v5p-8", "--jobs", "0")
    own = tmp_path / "own.py"
    own.write_text((REPO / "experiments" / "vlm_sft.py").read_text())
    assert "own.py is not in the commit that other machines get" in complaint(*tpu, "v5p-8", "--config", str(own))
    monkeypatch.delenv("GLMV_ZONE")
    assert "reads GLMV_ZONE, which is not set" in complaint(*tpu, "v5p-8")
    (tmp_path / "rates").mkdir()
    (tmp_path / "rates" / "sweep.json").write_text(json.dumps({"launcher": "gke", "runs": [], "identity": "a-1"}))
    assert "holds a sweep of --launcher gke" in complaint()
    assert sweep_main.identity(tmp_path / "rates") == "a-1"
    assert calls(cloud) == []


# --- this machine's accelerators --------------------------------------------------------------------------------------


def test_gpus_are_shared_out_evenly(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.gpus(tmp_path) == [] and devices.environments(3, tmp_path) == [{}] * 3
    for name in ("nvidia10", "nvidia2", "nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    seen = lambda jobs: [e["CUDA_VISIBLE_DEVICES"] for e in devices.environments(jobs, tmp_path)]  # noqa: E731
    assert seen(2) == ["0,1", "2,10"] and seen(4) == ["0", "1", "2", "10"]
    assert seen(8) == ["0", "1", "2", "10", "0", "1", "2", "10"] and devices.environments(1, tmp_path) == [{}]
    with pytest.raises(UserError, match="--jobs 3 does not share 4 GPUs out evenly; give 1, 2, 4"):
        devices.check(3, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a, MIG-b")
    assert seen(2) == ["MIG-a", "MIG-b"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert devices.gpus(tmp_path) == []

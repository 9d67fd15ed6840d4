"""`glmv sweep`: what it plans, and whole sweeps of a toy stage in processes of their own.

Not covered: TPU hosts (only how they are recognised), several hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from glmv_jax import cli
from glmv_jax.train import main
from glmv_jax.train.metrics import read_jsonl
from glmv_jax.train.sweep import devices
from glmv_jax.train.sweep import main as sweep_main
from glmv_jax.train.sweep.board import eta
from glmv_jax.train.sweep.launchers import Local
from glmv_jax.train.sweep.plan import Run, Shared, parse_seeds, plan, split
from glmv_jax.typing import UserError
from tests.train.toy import config

ROOT = Path(__file__).parents[2]
TOY = "from tests.train.toy import config\n\n\ndef get_config(arg=None):\n    return config(save_every=2, steps=6)\n"


def local(workdir: Path, jobs: int | None = None) -> Local:
    return Local(Shared("e.py", (), workdir, jobs))


def small() -> ConfigDict:
    optim = dict(lr=1e-3, wd=0.1)
    return ConfigDict(dict(stage="toy", seed=7, steps=5, optim=optim, model=dict(option="a", wd=2, parts=("x",))))


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_plan_is_the_product_with_whole_seeds_first():
    runs = plan(small(), ["model.option=a,b", "optim.lr=1e-3,3e-3"], "0..1")
    assert [run.name for run in runs] == [
        f"option={o},lr={lr},seed={s}" for s in (0, 1) for o in ("a", "b") for lr in (0.001, 0.003)
    ]
    assert runs[5].values == {"seed": 1, "model.option": "a", "optim.lr": 0.003}
    assert runs[5].overrides == ["seed=1", "model.option=a", "optim.lr=3e-3"]
    assert {run.steps for run in runs} == {5} and {run.status for run in runs} == {"waiting"}
    assert [run.steps for run in plan(small(), ["steps=3,9"])] == [3, 9]
    assert plan(small(), ["model.option=a,b", "seed=0..1"]) == plan(small(), ["model.option=a,b"], "0..1")


def test_names_are_short_unlike_and_good_for_a_folder():
    (run,) = plan(small(), ["optim.wd=0.2", "model.wd=3"])
    assert run.name == "optim.wd=0.2,model.wd=3"
    names = [run.name for run in plan(small(), ["model.option=runs/a,runs-a,../b"])]
    assert len(set(names)) == 3 and not any("/" in name or " " in name for name in names)
    assert plan(small(), ["model.parts=('x','y'),('y',)"])[0].values == {"model.parts": ["x", "y"]}


def test_values_split_at_commas_outside_brackets_and_quotes():
    assert split("1, 2") == ["1", "2"]
    assert split("(1,2),[3,(4,5)],'a,b',{'c': 1, 'd': 2}") == ["(1,2)", "[3,(4,5)]", "'a,b'", "{'c': 1, 'd': 2}"]
    assert parse_seeds("0..4") == [0, 1, 2, 3, 4] and parse_seeds("3") == [3] and parse_seeds("0..1, 7") == [0, 1, 7]


@pytest.mark.parametrize(
    ("sets", "seeds", "message"),
    [
        (["model.optoin=a,b"], None, "no key 'model.optoin'; nearest: model.option"),
        (["optim.lr=1e-3,fast"], None, "optim.lr is float, but 'fast' is str"),
        (["model=a"], None, "'model' is a group, set a value inside it: model.option"),
        (["optim.lr"], None, "--set optim.lr has no values"),
        (["optim.lr="], None, "--set optim.lr= has no values"),
        (["optim.lr=1e-3,0.001"], None, "--set optim.lr has 0.001 twice"),
        (["optim.lr=1", "optim.lr=2"], None, "--set optim.lr is given twice"),
        (["seed=1,2"], "0..4", "--seeds and --set seed say the same"),
        (["seed=4..0"], None, "--set seed=4..0 are no seeds; write 0..4"),
        (["seed=1", "seed=2"], None, "--set seed is given twice"),
        ([], "4..0", "--seeds 4..0 are no seeds; write 0..4"),
        ([], "0..2,1", "--seeds 0..2,1 names a seed twice"),
        ([], "-1", "--seeds -1 are no seeds"),
        ([], None, "nothing to sweep over; give --set KEY=VALUE,VALUE or --seeds"),
    ],
)
def test_a_wrong_plan_is_named(sets, seeds, message):
    with pytest.raises(UserError) as error:
        plan(small(), sets, seeds)
    assert message in str(error.value)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    cfg = small()
    with pytest.raises(UserError, match="--jobs 0 runs nothing"):
        sweep_main.check(tmp_path, cfg, local(tmp_path, 0))
    file = {"base": {"optim.lr": 1.0, "optim.wd": 0.1, "model.option": "a", "model.wd": 2, "model.parts": ["x"],
                     "seed": 7, "stage": "toy", "steps": 5}}  # fmt: skip
    (tmp_path / "sweep.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match=r"holds a sweep of another config \(optim.lr: 1.0 -> 0.001\); give another"):
        sweep_main.check(tmp_path, cfg, local(tmp_path, 1))
    cfg.optim.lr, cfg.keep = 1.0, 3  # how many checkpoints are kept changes no number
    sweep_main.check(tmp_path, cfg, local(tmp_path, 1))
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match="sweep.json cannot be read"):
        sweep_main.check(tmp_path, cfg, local(tmp_path, 1))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is the work directory of a single run"):
        sweep_main.check(tmp_path, cfg, local(tmp_path, 1))


def test_one_process_at_a_time_where_there_are_tpus(tmp_path, monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not devices.has_tpu(tmp_path)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()
    assert not devices.has_tpu(tmp_path)  # the control device is there without any chip
    (tmp_path / "vfio" / "0").touch()
    assert devices.has_tpu(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not devices.has_tpu(tmp_path)
    monkeypatch.setattr(devices, "has_tpu", lambda dev: True)
    sweep_main.check(tmp_path, small(), local(tmp_path, 1))
    with pytest.raises(UserError, match="can hold this machine's TPU chips; give --jobs 1"):
        sweep_main.check(tmp_path, small(), local(tmp_path, 2))


def test_time_left_counts_steps_of_all_runs():
    a, b, c = (Run(name, {}, [], 100) for name in "abc")
    assert eta([(a, 0), (b, 0)], {}, 1) is None  # nothing is known before a step was made
    spent = {"a": (60.0, 20), "x": (40.0, 30)}  # 100 s for 50 steps
    assert eta([(a, 20), (b, 0)], spent, 1) == 360.0
    assert eta([(a, 20), (b, 0)], spent, 2) == eta([(a, 20), (b, 0)], spent, 8) == 180.0
    assert eta([(c, 150)], spent, 1) == 0.0 and eta([], spent, 1) is None
    assert eta([(Run("d", {}, [], 100, max_seconds=30.0), 0), (b, 0)], spent, 1) == 230.0


def test_planning_and_running_leave_the_accelerators_alone():
    code = "import sys; from glmv_jax.train.sweep import main, plan; assert 'jax' not in sys.modules, 'jax'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- whole sweeps -----------------------------------------------------------------------------------------------------


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "toy_sweep.py"
    path.write_text(TOY)
    return path


def command(experiment, workdir, *more):
    argv = ["sweep", "--config", str(experiment), "--workdir", str(workdir), *more]
    return [sys.executable, "-m", "glmv_jax.cli", *argv]


def call(experiment, workdir, *more):
    return subprocess.run(command(experiment, workdir, *more), cwd=ROOT, capture_output=True, text=True, timeout=900)


def states(workdir):
    return {run["name"]: run["status"] for run in json.loads((workdir / "sweep.json").read_text())["runs"]}


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_jsonl(workdir / "metrics.jsonl") if row["kind"] == "train"}


def test_a_sweep_with_a_failing_arm_is_resumed_and_finished_runs_are_skipped(experiment, tmp_path):
    """Three arms: one that a signal which is none ends at step 3 fails, one that SIGINT stops there is resumed."""
    runs = tmp_path / "runs"
    sets = ["--set", "signal=(0,0),(3,-1),(3,2)", "--set", "end=1000", "--config.optim.lr=0.05"]
    dry = call(experiment, runs, *sets, "--dry-run")
    assert dry.returncode == 0 and dry.stdout.count("(new): glmv train --config") == 3 and not runs.exists()
    assert dry.stdout.count("--config.optim.lr=0.05 ") == dry.stdout.count("--config.end=1000\n") == 3

    first = call(experiment, runs, *sets)
    assert first.returncode == 1 and first.stderr == "", first.stderr
    good, broken, stopped = states(runs)  # in the order of the product
    assert states(runs) == {good: "finished", broken: "failed", stopped: "interrupted"}
    assert f"{broken} failed: exit code 1: OSError: [Errno 22] Invalid argument" in first.stdout
    assert "2 of 3 runs did not finish; the same command tries them again" in first.stdout
    assert (runs / "report.html").exists()

    before = (runs / good / "metrics.jsonl").read_bytes()
    second = call(experiment, runs, *sets)
    assert second.returncode == 1
    assert states(runs) == {good: "finished", broken: "failed", stopped: "finished"}
    assert "1 of 3 runs are already finished" in second.stdout and f"{good} begins" not in second.stdout
    assert (runs / good / "metrics.jsonl").read_bytes() == before
    assert "resuming from step 3 of 6" in (runs / stopped / "train.log").read_text()
    assert losses(runs / stopped) == losses(runs / good)
    file = json.loads((runs / "sweep.json").read_text())
    arms = file["results"]["arms"]
    assert [name for name in arms if arms[name]] == [f"signal {v}, end 1000" for v in ([0, 0], [3, 2])]
    assert all(run["seconds"] > 0.5 and run["peak_rss"] > 1e8 for run in file["runs"])


def test_runs_differ_in_what_was_set_and_are_those_of_the_loop(experiment, tmp_path):
    runs = tmp_path / "runs"
    done = call(experiment, runs, "--set", "optim.lr=0.1,0.05", "--seeds", "3", "--jobs", "2", "--config.steps=4")
    assert done.returncode == 0, done.stdout + done.stderr
    cfg = config(save_every=2, steps=4, seed=3)
    cfg.optim.lr = 0.05
    main.run(cfg, tmp_path / "alone")
    assert losses(runs / "lr=0.05,seed=3") == losses(tmp_path / "alone") != losses(runs / "lr=0.1,seed=3")
    results = json.loads((runs / "sweep.json").read_text())["results"]
    error = json.loads((tmp_path / "alone" / "results.json").read_text())["metrics"]["error"]["trained"]
    assert results["arms"]["0.05"]["error"] == {
        "n": 1, "mean": error, "sd": None, "low": None, "high": None, "by_seed": {"3": error},
    }  # fmt: skip
    assert list(results["differences"]) == ["0.1 - 0.05"]

    shutil.copytree(runs / "lr=0.05,seed=3", runs / "lr=0.05,seed=4")  # a further seed, as if it had been run
    more = call(experiment, runs, "--set", "optim.lr=0.05", "--seeds", "4", "--config.steps=4")
    assert more.returncode == 0 and "1 of 1 runs are already finished" in more.stdout, more.stdout + more.stderr
    arms = json.loads((runs / "sweep.json").read_text())["results"]["arms"]
    assert list(arms["0.05"]["error"]["by_seed"]) == ["3", "4"] and list(arms["0.1"]["error"]["by_seed"]) == ["3"]
    assert call(experiment, runs, "--seeds", "4", "--config.steps=5").returncode == 2  # of another config: refused


def test_runs_side_by_side_see_gpus_of_their_own_and_failures_end_with_their_last_lines(tmp_path, monkeypatch, capfd):
    """The runs end where they would begin: what they see of the GPUs is all they say."""
    path = tmp_path / "seen.py"
    path.write_text(
        "import os\nfrom glmv_jax.typing import UserError\nfrom tests.train.toy import config\n\n\n"
        "def get_config(arg=None):\n    seen = os.environ['CUDA_VISIBLE_DEVICES']\n    if seen != '0,1,2,3':\n"
        "        print('looked')\n        raise UserError(f'{seen} it is')\n    return config()\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    argv = ["sweep", "--config", str(path), "--workdir", str(tmp_path / "runs"), "--set", "seed=0..1", "--jobs", "2"]
    assert cli.main(argv) == 1
    said = capfd.readouterr().out
    for n, own in enumerate(("0,1", "2,3")):
        assert f"seed={n} failed: exit code 2: glmv train: {own} it is" in said
        assert f"sweep:   | looked\nsweep:   | glmv train: {own} it is\n" in said


def test_ctrl_c_lets_every_run_save_once_and_says_how_to_go_on(experiment, tmp_path):
    """A Ctrl-C of a terminal: SIGINT for the whole process group of the sweep."""
    runs = tmp_path / "runs"
    more = ["--seeds", "0..2", "--jobs", "2", "--config.steps=1000000", "--config.log_every=1"]
    process = subprocess.Popen(command(experiment, runs, *more), cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 600
        while not all(losses(runs / f"seed={n}") for n in (0, 1)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        for n in (0, 1):  # the terminal's signal does not reach them by itself: they would get two, and not save
            child = int((runs / f"seed={n}" / ".lock").read_text())
            assert os.getpgid(child) == child != process.pid
        os.killpg(process.pid, signal.SIGINT)
        said, complaint = process.communicate(timeout=600)
    finally:
        if process.poll() is None:  # the test has failed: its runs would train for ever
            for pid in [process.pid, *(int(lock.read_text()) for lock in runs.glob("seed=*/.lock"))]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert process.returncode == 130 and complaint == ""
    assert "SIGINT: waiting for the runs to save" in said
    assert "stopped; 0 of 3 runs are finished, the same command goes on from here" in said
    assert states(runs) == {"seed=0": "interrupted", "seed=1": "interrupted", "seed=2": "waiting"}
    for n in (0, 1):
        log = (runs / f"seed={n}" / "train.log").read_text()
        assert "saved; run the same command to go on" in log and "Traceback" not in log
        step = max(int(path.name) for path in (runs / f"seed={n}" / "checkpoints").iterdir() if path.name.isdecimal())
        assert f"stopped at step {step} of 1000000" in log


def test_help_teaches_by_example_and_wrong_input_is_one_line(capsys, experiment, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--help"])
    assert capsys.readouterr().out.count("glmv sweep --config") == 3
    argv = ["sweep", "--config", str(experiment), "--workdir", str(tmp_path / "runs")]
    for more, message in [
        (["--set", "widht=1,2"], "glmv sweep: the config has no key 'widht'; nearest: width"),
        (["--sets", "width=1,2"], "glmv sweep: unknown option '--sets'; nearest: --set"),
        (["--seeds", "0", "--jobs", "x"], "glmv sweep: argument --jobs: invalid int value: 'x'; see glmv sweep --help"),
    ]:
        assert cli.main([*argv, *more]) == 2
        assert capsys.readouterr().err.strip() == message
    assert not (tmp_path / "runs").exists()

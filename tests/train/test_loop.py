"""The loop, driven by a toy stage: a whole run, interruptions of every kind, and what a resumed run must equal.

Not covered: several processes, a full disk in the middle of a run (test_checkpoint fills one).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from glmv_jax.train import goodput, loop, main
from glmv_jax.train.checkpoint import load_params
from glmv_jax.train.metrics import read_jsonl
from glmv_jax.train.spikes import Spikes
from glmv_jax.train.step import RecompileError
from glmv_jax.typing import UserError
from tests.train.toy import Data, Toy, config

ROOT = Path(__file__).parents[2]


def run_as_program(workdir, **changes):
    command = [sys.executable, "-m", "tests.train.toy", str(workdir), json.dumps(changes)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ)


def losses(workdir):
    rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})  # in order, none twice
    return {row["step"]: row["loss"] for row in rows}


def same_params(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, load_params(a), load_params(b))))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, main.run(config(), workdir)


def test_a_run_learns_and_leaves_what_it_promises(whole):
    workdir, results = whole
    assert json.loads((workdir / "results.json").read_text()) == results
    error = results["metrics"]["error"]
    assert error["trained"] < 0.5 * error["untrained"]
    assert error["chance"] == 1.0 and error["note"] == "mean squared error"
    assert results["step"] == 12 and results["samples"] == 12 * 16 and results["tokens"] == 12 * 64
    assert results["flops"] == 12 * 100.0 * 16 * 4 * 6
    assert results["skipped"] == 0 and 0 < results["train_seconds"] < results["seconds"]
    assert results["metrics"]["seen"]["trained"] == 12 * 16  # extra is carried
    data = Data(config())
    ups = sum(next(data)["y"].sum() > 0 for _ in range(12))
    assert results["sources"] == {"up": {"samples": 16 * ups, "tokens": 64 * ups},
                                  "down": {"samples": 16 * (12 - ups), "tokens": 64 * (12 - ups)}}  # fmt: skip

    rows = read_jsonl(workdir / "metrics.jsonl")
    trained = [(step, "train") for step in range(1, 13)]
    assert [(row["step"], row["kind"]) for row in rows] == [(0, "eval"), *trained, (12, "eval")]
    walls = [row["wall"] for row in rows]
    assert walls == sorted(walls) and results["seconds"] >= walls[-1] - 1e-3
    assert set(rows[5]) >= {"loss", "grad_norm", "param_norm", "skipped", "noise", "host", "lr", "samples_per_second"}
    assert rows[12]["seen/up"] == 16 * ups and rows[5].get("seen/up", 0) + rows[5].get("seen/down", 0) == 5 * 16
    assert rows[5]["host"] == 5.0 and rows[2]["lr"] == pytest.approx(0.1 * 2 / 3)
    assert json.loads((workdir / "config.json").read_text())["optim.lr"] == 0.1
    meta = json.loads((workdir / "meta.json").read_text())
    assert meta["versions"]["numpy"] == np.__version__ and meta["processes"] == 1 and meta["host"]["system"]
    assert meta["stage"] == "toy" and meta["params"] == 6 * 8 + 8 + 8 + 1 and meta["host"]["cores"] > 0
    assert (workdir / "samples" / "samples.jsonl").exists() and list((workdir / "tb").iterdir())
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["12", "8"]


def test_a_finished_run_is_left_alone(whole, capsys):
    workdir, results = whole
    before, evaluations = (workdir / "metrics.jsonl").read_bytes(), Toy.evaluations
    assert main.run(config(), workdir) == results
    assert "already finished (12 steps)" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before and Toy.evaluations == evaluations


def test_the_same_config_gives_the_same_run_again(whole, tmp_path):
    main.run(config(), tmp_path)
    assert losses(tmp_path) == losses(whole[0]) and same_params(tmp_path, whole[0])


def test_compiled_programs_are_kept_where_the_config_says(tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        main.run(config(steps=4, compilation_cache=str(tmp_path / "programs")), tmp_path / "run")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the toy's take no time
        jax.jit(lambda x: jnp.sin(x) @ x)(jnp.eye(3)).block_until_ready()
        assert list((tmp_path / "programs").iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_killed_in_the_middle_it_goes_on_and_ends_bitwise_equal(whole, tmp_path, capsys):
    killed = run_as_program(tmp_path, save_every=2, signal=(9, int(signal.SIGKILL)))
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "results.json").exists()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "wall": 3.0, "ki')  # the kill came in the middle of a line
    evaluations = Toy.evaluations
    results = main.run(config(save_every=2), tmp_path)
    said = capsys.readouterr().out
    step = int(said.split("resuming from step ")[1].split(" of 12")[0])
    assert step in (2, 4, 6, 8)
    assert losses(tmp_path) == losses(whole[0]) and same_params(tmp_path, whole[0])
    assert Toy.evaluations == evaluations + 1  # the untrained evaluation was not repeated
    for name in ("samples", "tokens", "flops", "step", "metrics", "sources"):
        assert results[name] == whole[1][name]
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["wall"] for row in rows] == sorted(row["wall"] for row in rows)  # time goes on where it stopped


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_asked_to_stop_it_saves_and_leaves(whole, tmp_path, number, code, capsys, monkeypatch):
    with pytest.raises(SystemExit) as error:
        main.run(config(signal=(6, int(number)), save_every=100), tmp_path)
    assert error.value.code == code
    said = capsys.readouterr().out
    ended = [row["signal"] for row in goodput.read(tmp_path / "goodput.jsonl") if "signal" in row]
    assert ended == [number]
    assert "stopping after this step" in said and "stopped at step 6 of 12, saved" in said
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["6"]
    watched = []
    monkeypatch.setattr(loop, "Spikes", lambda *given: watched.append(given) or Spikes(*given))
    main.run(config(spikes=5.0), tmp_path)
    assert "resuming from step 6 of 12" in capsys.readouterr().out
    assert losses(tmp_path) == losses(whole[0]) and same_params(tmp_path, whole[0])
    assert watched == [(5.0, list(losses(tmp_path).values())[:6], "loss")]  # it goes on watching where it was


def test_stopped_in_the_final_evaluation_it_only_evaluates_again(tmp_path, monkeypatch):
    def stopped(self, params, extra, *, full):
        if float(extra["seen"]):
            os.kill(os.getpid(), signal.SIGINT)
        return {"error": 1.0}

    with monkeypatch.context() as patch:
        patch.setattr(Toy, "evaluate", stopped)
        with pytest.raises(SystemExit):
            main.run(config(), tmp_path)
    before = losses(tmp_path)
    main.run(config(), tmp_path)
    assert losses(tmp_path) == before and len(before) == 12
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl") if row["kind"] == "eval"] == [0, 12]


def test_stopped_in_an_evaluation_along_the_way_it_saves_that_step(whole, tmp_path, monkeypatch, capsys):
    def stopped(self, params, extra, *, full):
        if not full:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"error": 1.0}

    with monkeypatch.context() as patch:
        patch.setattr(Toy, "evaluate", stopped)
        with pytest.raises(SystemExit):
            main.run(config(eval_every=6, save_every=100), tmp_path)
    assert "stopped at step 6 of 12, saved" in capsys.readouterr().out
    main.run(config(), tmp_path)
    assert "resuming from step 6 of 12" in capsys.readouterr().out
    assert losses(tmp_path) == losses(whole[0]) and same_params(tmp_path, whole[0])


def test_more_steps_than_it_had_are_trained(tmp_path, capsys):
    main.run(config(steps=4), tmp_path)
    assert main.run(config(steps=8), tmp_path)["step"] == 8
    said = capsys.readouterr().out
    assert "the config has changed since this run began: steps: 4 -> 8" in said and "resuming from step 4 of 8" in said


def test_evaluations_along_the_way(tmp_path):
    main.run(config(eval_every=4), tmp_path)
    rows = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["kind"] == "eval"]
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert rows[1]["seen"] == 4 * 16  # of the state at that step


def test_a_time_budget_stops_early_and_counts_as_finished(tmp_path, capsys):
    workdir, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_text('{"train_seconds": 0.4}')
    results = main.run(config(steps=10**6, match_wall=str(other), log_every=1000, save_every=1000), workdir)
    assert 0.4 <= results["train_seconds"] and results["step"] < 10**6
    assert main.run(config(steps=10**6, max_seconds=0.4), workdir) == results
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="has not finished"):
        main.run(config(match_wall=str(tmp_path / "none")), tmp_path / "c")


def test_parameters_from_another_run(whole, tmp_path):
    source = load_params(whole[0])
    main.run(config(init_from=str(whole[0]), init_subtrees=("body",), steps=2, optim=frozen()), tmp_path)
    got = load_params(tmp_path)
    np.testing.assert_array_equal(got["body"]["kernel"], source["body"]["kernel"])
    assert not np.array_equal(got["head"]["kernel"], source["head"]["kernel"])
    with pytest.raises(UserError, match=r"body/bias is \(8,\) there and \(16,\) here"):
        main.run(config(init_from=str(whole[0]), width=16), tmp_path / "wide")


def frozen():
    return dict(lr=0.0, schedule=dict(decay="constant"), groups=((".*", dict(kind="frozen")),))


def test_a_second_batch_shape_stops_the_run_and_is_named(tmp_path):
    with pytest.raises(RecompileError, match=r"x was float32 \(16, 4, 6\), is float32 \(16, 5, 6\)"):
        main.run(config(lengths=(4, 5)), tmp_path)


def test_declared_shapes_are_compiled_once_each(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Toy, "shape_buckets", 2)
    assert main.run(config(lengths=(4, 5)), tmp_path)["step"] == 12
    assert capsys.readouterr().out.count("compiling the step") == 2


def test_a_step_without_a_finite_gradient_is_left_out_and_counted(tmp_path, capsys):
    assert main.run(config(poison=(3,)), tmp_path)["skipped"] == 1
    rows = {row["step"]: row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["kind"] == "train"}
    assert rows[4]["skipped"] == 1.0 and rows[4]["loss"] is None and rows[5]["loss"] > 0
    assert rows[4]["param_norm"] == rows[3]["param_norm"] != rows[5]["param_norm"]
    (kept,) = (tmp_path / "nonfinite").iterdir()
    assert kept.name == "4.npz" and np.isnan(np.load(kept)["x"][0, 0, 0]) and "y" in np.load(kept)
    assert f"step 4: the loss or the gradient is not finite, the update is left out; its batch is in {kept}" in "".join(
        capsys.readouterr().out.splitlines()
    )


def test_a_run_without_finite_gradients_stops_names_what_is_not_finite_and_keeps_some_batches(tmp_path, capsys):
    said = "no finite gradient for 10 steps .now at 14.; first not finite: batch/x, batch/y, loss, .*lower optim.lr"
    poison = (0, 1, *range(3, 60))  # two and a good one: it is the steps in a row that count
    with pytest.raises(UserError, match=said):
        main.run(config(steps=60, poison=poison, max_skipped=10), tmp_path)
    assert sorted(int(p.stem) for p in (tmp_path / "nonfinite").iterdir()) == [1, 2, *range(4, 10)]
    assert "step 10: the loss or the gradient is not finite, the update is left out; its batch is not kept" in (
        capsys.readouterr().out
    )


def test_no_number_of_steps_without_finite_gradients_ends_a_run_that_is_told_to_go_on(tmp_path):
    assert main.run(config(steps=6, poison=tuple(range(6)), max_skipped=0), tmp_path)["skipped"] == 6


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(end=3), "toy: the training data ended"),
        (dict(batch=12), "batch=12 does not divide over 8 data shards; try 16"),
        (dict(mesh={"dta": -1}), "mesh axis 'dta' is not known"),
        (dict(rules="dat"), "rules preset 'dat' is not known"),
        (dict(stage="toi"), "stage='toi' is not known; nearest: toy"),
        (dict(init_from="/nowhere/at/all"), "is no run: it has no checkpoints folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        main.run(config(**changes), tmp_path)
    assert "\n" not in str(error.value)


def test_a_recipe_to_begin_from_names_its_stages(tmp_path):
    (tmp_path / "quickstart" / "sft" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="is no run: .*; give one of those in it: .*quickstart/sft$"):
        main.run(config(init_from=str(tmp_path / "quickstart")), tmp_path / "run")


def test_the_folder_of_a_run_cannot_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/glmv")):
        with pytest.raises(UserError, match="choose another workdir"):
            main.run(config(), workdir)


def test_evaluating_a_finished_run_again_gives_its_numbers(whole):
    workdir, results = whole
    assert main.evaluate(workdir) == {name: row["trained"] for name, row in results["metrics"].items()}
    with pytest.raises(UserError, match="is no run"):
        main.evaluate(workdir / "nothing")


def test_batch_counts_the_rows_of_all_processes(monkeypatch):
    stage = Toy(config(batch=6))
    assert stage.own_rows == 6
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    assert stage.own_rows == 2
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="batch=6 does not divide over 4 processes; try 8"):
        stage.own_rows  # noqa: B018


def test_the_commit_of_a_source_tree_is_told(tmp_path):
    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert main.commit(package) is None  # no repository
    git("init", "-q")
    assert main.commit(package) is None  # one that knows nothing of the package, as when it is installed in there
    git("add", ".")
    git("commit", "-qm", "first")
    (package / "scratch.txt").write_text("")
    assert main.commit(package) == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("x = 1")
    assert main.commit(package) == git("rev-parse", "HEAD") + " + changes"

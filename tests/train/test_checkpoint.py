"""Checkpoints: what comes back is what was saved, wherever; damage is noticed; disks fail in one line.

Not covered: power loss (nothing is synced by us), object stores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.train import checkpoint, disk
from glmv_jax.train.checkpoint import Checkpoints, load_config, load_params
from glmv_jax.train.state import TrainState
from glmv_jax.typing import UserError


def sharded(spec=(), devices=8):
    mesh = jax.make_mesh((devices,), ("d",), devices=jax.devices()[:devices])
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def make_state(step=1, width=16, devices=8, spec=("d",)):
    rows, whole = sharded(spec, devices), sharded((), devices)

    def put(seed, *shape):
        return jax.device_put(np.random.default_rng([step, seed]).normal(size=shape), rows)

    return TrainState(
        step=jax.device_put(jnp.int32(step), whole),
        params={"vision": {"a": put(0, width, 99), "b": put(1, width)}, "text": {"c": put(2, 8, 2)}},
        opt_state=({"mu": {"vision": {"a": put(3, width, 3)}}}, (jax.device_put(jnp.int32(7), whole),)),
        extra={},
    )


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def saved(folder, steps=(1, 2, 3), **kwargs):
    lines = []
    checkpoints = Checkpoints(folder / "checkpoints", report=lines.append, **kwargs)
    for step in steps:
        checkpoints.save(step, make_state(step), {"data": {"index": step}})
    checkpoints.wait()
    return checkpoints, lines


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype, a, b)))


def test_what_was_saved_comes_back_and_only_the_newest_are_kept(tmp_path):
    checkpoints, lines = saved(tmp_path, steps=(1, 2, 3, 5))
    assert checkpoints.steps() == [3, 5]
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints", report=lines.append)
    state, host = again.restore(abstract(make_state()))
    assert equal(state, make_state(5)) and host == {"data": {"index": 5}} and not lines
    again.close()


def test_a_folder_without_checkpoints_gives_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.restore(abstract(make_state())) is None
    checkpoints.close()


@pytest.mark.parametrize("devices, spec", [(1, ()), (2, ("d",)), (8, ())])
def test_it_is_restored_on_other_devices(tmp_path, devices, spec):
    checkpoints, _ = saved(tmp_path)
    there = make_state(3, devices=devices, spec=spec)
    state, _ = checkpoints.restore(abstract(there))
    assert equal(state, there)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(there), strict=True):
        assert a.sharding == b.sharding
    checkpoints.close()


def test_a_save_is_of_the_moment_although_the_next_step_takes_the_memory(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
    rows = sharded(("d",))
    state = TrainState(jnp.int32(0), {"w": jax.device_put(np.ones((512, 512)), rows)}, {}, {})
    state = jax.device_put(state, jax.tree.map(lambda x: rows if x.ndim else sharded(), state))
    want = jax.tree.map(np.array, state)
    checkpoints.save(1, state, {})
    for _ in range(10):
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored, _ = checkpoints.restore(abstract(state))
    assert equal(restored, want)
    checkpoints.close()


def biggest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


# Without checksums nobody can tell a flipped byte, and Orbax leaves a coroutine behind when it meets the damage itself.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "harm, sealed", [(truncate, True), (flip, True), (Path.unlink, True), (truncate, False), (Path.unlink, False)]
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, harm, sealed):
    checkpoints, lines = saved(tmp_path)
    folder = tmp_path / "checkpoints" / "3"
    if not sealed:
        (folder / "checksums.json").unlink()
    harm(biggest(folder / "params") if sealed else folder / "params" / "manifest.ocdbt")
    state, host = checkpoints.restore(abstract(make_state()))
    assert equal(state, make_state(2)) and host["data"]["index"] == 2
    assert len(lines) == 1 and f"{folder} cannot be read" in lines[0] and "\n" not in lines[0]
    assert (tmp_path / "unreadable" / "3").is_dir()
    checkpoints.save(3, make_state(3), {"data": {"index": 3}})  # the step can be saved again
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]
    checkpoints.close()


def test_damage_to_the_list_of_checksums_itself(tmp_path):
    checkpoints, lines = saved(tmp_path)
    truncate(tmp_path / "checkpoints" / "3" / "checksums.json")
    assert checkpoints.restore(abstract(make_state()))[1]["data"]["index"] == 2
    checkpoints.close()


def test_when_nothing_can_be_read_it_says_so_once_and_then_starts_anew(tmp_path):
    checkpoints, lines = saved(tmp_path)
    for step in (2, 3):
        truncate(biggest(tmp_path / "checkpoints" / str(step)))
    with pytest.raises(UserError, match="none of 2 checkpoints can be read.*run again to start this stage anew"):
        checkpoints.restore(abstract(make_state()))
    assert len(lines) == 2
    assert checkpoints.restore(abstract(make_state())) is None
    checkpoints.close()


def test_a_checkpoint_of_another_model_is_not_damage(tmp_path):
    checkpoints, lines = saved(tmp_path)
    with pytest.raises(UserError, match=r"another model or optimiser: .*params/vision/a is \(16, 99\) there"):
        checkpoints.restore(abstract(make_state(width=24)))
    state = make_state()
    with pytest.raises(UserError, match="opt_state/0/mu/vision/a is only there"):
        checkpoints.restore(abstract(state._replace(opt_state=({"mu": {}}, state.opt_state[1]))))
    assert not lines and checkpoints.steps() == [2, 3]
    checkpoints.close()


def test_a_killed_save_leaves_no_checkpoint(tmp_path):
    saved(tmp_path)[0].close()
    torn = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "3", torn)
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.steps() == [2, 3]
    again.save(9, make_state(9), {})
    again.wait()
    assert again.steps() == [3, 9] and not torn.exists()
    again.close()


def test_a_path_that_is_a_file_or_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "checkpoints", Path("/proc/glmv/checkpoints")):
        with pytest.raises(UserError, match=f"cannot write {folder}.*choose another workdir"):
            Checkpoints(folder)


def test_a_disk_that_will_be_too_small_is_noticed_before_training(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    checkpoints.check_space(make_state())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match="checkpoints will take .* and the disk has 0.0 MB left; make room"):
        checkpoints.check_space(make_state())
    checkpoints.close()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_loses_nothing_that_was_there(small_disk):
    lines = []
    checkpoints = Checkpoints(small_disk / "checkpoints", report=lines.append)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    big = make_state(2)._replace(extra={"x": jax.random.normal(jax.random.key(0), (1024, 1024))})
    with pytest.raises(UserError, match="cannot write .*checkpoints: the disk is full: make room"):
        checkpoints.save(2, big, {})
        checkpoints.wait()
    checkpoints.close()
    again = Checkpoints(small_disk / "checkpoints", report=lines.append)
    assert equal(again.restore(abstract(make_state()))[0], make_state(1))
    again.close()


def test_a_disk_that_becomes_read_only_is_told_and_keeps_no_process_waiting(small_disk):
    folder = str(small_disk / "checkpoints")
    checkpoints = Checkpoints(small_disk / "checkpoints", report=print)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    before = set(threading.enumerate())
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder, folder], check=True)
        with pytest.raises(UserError, match="cannot write .*checkpoints: the disk is read-only: choose another"):
            checkpoints.save(2, make_state(2), {})
            checkpoints.wait()
        checkpoints.close()
        waiting = [thread for thread in set(threading.enumerate()) - before if not thread.daemon]
        for thread in waiting:
            thread.join(5)
        assert not any(thread.is_alive() for thread in waiting), waiting
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    again = Checkpoints(small_disk / "checkpoints", report=print)
    assert again.steps() == [1]
    again.close()


def test_a_slow_disk_is_told_and_its_checkpoints_are_whole(tmp_path, monkeypatch):
    pace, seal = [0.3, 0.0], checkpoint.seal

    def slowly(folder, leave_out):
        time.sleep(pace.pop(0))
        seal(folder, leave_out)

    monkeypatch.setattr(checkpoint, "SLOW", 0.2)
    monkeypatch.setattr(checkpoint, "seal", slowly)
    checkpoints, lines = saved(tmp_path, steps=(1, 2))
    assert len(lines) == 1 and "a slow disk: training waited" in lines[0] and "(save_every)" in lines[0]
    assert float(lines[0].split("waited ")[1].split(" s")[0]) >= 0.3
    assert equal(checkpoints.restore(abstract(make_state()))[0], make_state(2)) and not pace
    checkpoints.close()


# --- parameters for the next stage ------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    saved(tmp_path)[0].close()
    (tmp_path / "results.json").write_text("{}")
    return tmp_path


def test_all_parameters_or_some_subtrees(finished):
    want = jax.device_get(make_state(3).params)
    assert equal(load_params(finished), want)
    vision = load_params(str(finished), ["vision"])
    assert equal(vision, {"vision": want["vision"]}) and isinstance(vision["vision"]["a"], np.ndarray)
    two = load_params(finished, ("vision/b", "text/"))
    assert equal(two, {"vision": {"b": want["vision"]["b"]}, "text": want["text"]})


def test_into_a_model_that_has_more_placed_as_the_model_is(finished):
    like = make_state(9, devices=2).params | {"new": {"d": jnp.ones(3)}}
    got = load_params(finished, ["vision"], like=like)
    want = make_state(3).params
    assert equal(got["vision"], want["vision"]) and equal(got["text"], like["text"]) and equal(got["new"], like["new"])
    assert got["vision"]["a"].sharding == like["vision"]["a"].sharding


def test_parameters_that_do_not_fit(finished):
    with pytest.raises(UserError, match=r"vision/a is \(16, 99\) there and \(24, 99\) here, vision/b is"):
        load_params(finished, ["vision"], like=make_state(width=24).params)
    with pytest.raises(UserError, match="has no subtree 'vison'; it has text, vision"):
        load_params(finished, ["vison"])
    with pytest.raises(UserError, match="has no subtree 'vis'"):
        load_params(finished, ["vis"])
    with pytest.raises(UserError, match="new/d is only here"):
        load_params(finished, like=make_state().params | {"new": {"d": jnp.ones(3)}})


def test_a_damaged_newest_checkpoint_of_the_other_run(finished):
    truncate(biggest(finished / "checkpoints" / "3"))
    assert equal(load_params(finished), jax.device_get(make_state(2).params))
    truncate(biggest(finished / "checkpoints" / "2"))
    with pytest.raises(UserError, match="its parameters cannot be read"):
        load_params(finished)
    assert (finished / "checkpoints" / "3").exists()  # reading moves nothing


def test_a_run_that_is_not_there_or_not_finished(finished):
    (finished / "results.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        load_params(finished)
    assert load_params(finished, finished=False)
    for bad in (finished / "none", finished / "checkpoints"):
        with pytest.raises(UserError, match="is no run"):
            load_params(bad)
        with pytest.raises(UserError, match="is no run"):
            load_config(bad)


def test_the_config_of_another_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a.b": [1, [2, "x"]], "c": None}))
    cfg = load_config(tmp_path)
    assert cfg.a.b == (1, (2, "x")) and cfg.c is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_config(tmp_path)


def test_json_is_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "a.json"
    disk.write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        disk.write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": 1}

"""Stage 2 on two real processes of two devices each: a batch is of both, its length the same for both, and the steps
are those of one process that has all rows. And stage 3's images there, each encoded on any device of its process.

Not covered: evaluations of our stages on several processes, and networks slower than this machine.
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import optax
import pytest

from glmv_jax import cli, config
from glmv_jax.parallel import dispatch, multihost
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.train import loop, main
from glmv_jax.train import state as state_lib
from glmv_jax.train.metrics import read_jsonl
from glmv_jax.train.step import make_train_step
from tests.hosts import finished, free_port, together
from tests.train import toy

STEPS = 3
SETTINGS = ["batch=16", "model.vision.depth=1", "data.lengths=(16, 32)", "data.length_shares=(1.0, 1.0)",
            "data.both_languages=False", "mesh.data=2", "rules=fsdp", "loss.impl=ring_bidir", "loss.chunk=4",
            "optim.clip=0.0"]  # fmt: skip


def trained(next_batch) -> list[float]:
    """Losses of the steps on these batches of own rows, from the same start."""
    cfg = config.override(config.load("experiments/cogvit_siglip.py:size=nano"), SETTINGS)
    with cfg.unlocked():
        cfg.mesh.fsdp = 2
    stage = main.stage_class("siglip")(cfg)
    data, losses = stage.train_data(), []
    placement, optimizer, trainable = loop.prepare(stage)
    step = make_train_step(stage, optimizer, placement, trainable=trainable)
    state = state_lib.init_state(stage, optimizer, placement, cfg.seed)
    for n in range(STEPS):
        state, metrics = step(state, {}, placement.batch(next_batch(data, n)))
        losses.append(float(metrics["loss"]))
    data.close()
    return losses


def of_images(run, batch, over_mesh: bool = True) -> dict[str, float]:
    """What enters the language model of stage 3 for these own rows: how far it is from random numbers, and the norms of
    the gradient of that by parts of the model."""
    from tests.train.test_dispatching import embedded

    seen = lambda x: {"vision": x["vision"], "merger": x["merger"], "decoder": {"embed": x["decoder"]["embed"]}}  # noqa: E731
    rng, shapes = np.random.default_rng(0), seen(jax.eval_shape(run.init_params, jax.random.key(0)))
    params = jax.tree.map(lambda x: rng.normal(0, x.shape[-min(2, x.ndim)] ** -0.5, x.shape).astype(np.float32), shapes)
    norms = jax.jit(lambda grads: {part: optax.tree.norm(x) for part, x in grads.items()})
    if not over_mesh:
        far, grads = embedded(run)(params, batch)
    else:
        mesh, rules = run.place()
        where = state_lib.place(run, optax.sgd(1.0), mesh, rules)
        put = lambda x, at: jax.make_array_from_callback(x.shape, at, lambda part: x[part])  # noqa: E731
        with rules_lib.use(mesh, rules):
            far, grads = embedded(run)(jax.tree.map(put, params, seen(where.state.params)), where.batch(batch))
    return {name: float(x) for name, x in {"far": far, **norms(grads)}.items()}


def dispatched(host: int, folder: str) -> dict[str, float]:
    """Stage 3 of rows whose images all devices of this process encode; the rows are kept, with their images in them."""
    from tests.train.test_dispatching import OWN, next_batch, stage

    mesh = dict(sizes=(("data", 2), ("fsdp", 2)), rules="fsdp")
    run, kept = stage(*OWN, **mesh), next_batch(stage(**mesh))
    batch = next_batch(run)
    np.testing.assert_array_equal(batch["tokens"], kept["tokens"])
    assert len(batch["tokens"]) == 4 and batch["patches"].shape[:2] == (8, 96) and (batch["sent"] >= 0).sum() > 40
    assert dispatch.of_processes(run.place()[0]) == ((0, 1), (2, 3))
    np.savez(f"{folder}/images-{host}.npz", **kept)
    return of_images(run, batch)


def one_host(host: int, port: int, folder: str) -> None:
    """The program of a process."""
    jax.config.update("jax_num_cpu_devices", 2)
    multihost.start(f"localhost:{port}", 2, host)

    def read(data, n):
        batch = next(data)
        np.savez(f"{folder}/{host}-{n}.npz", **batch)
        return batch

    with open(f"{folder}/{host}.json", "w", encoding="utf-8") as file:
        json.dump([trained(read), dispatched(host, folder)], file)


def test_two_hosts_train_as_one(tmp_path):
    together("tests.train.test_two_hosts.one_host", tmp_path)

    parts = [[dict(np.load(tmp_path / f"{host}-{n}.npz")) for host in range(2)] for n in range(STEPS)]
    for first, second in parts:
        assert len(first["tokens"]) == len(second["tokens"]) == 8
        assert first["frame"].shape == second["frame"].shape
        assert not set(first["concept"][first["concept"] < 1653]) & set(second["concept"][second["concept"] < 1653])
    both = [json.loads((tmp_path / f"{host}.json").read_text()) for host in range(2)]
    assert both[0] == both[1]
    losses, found = both[0]
    four = jax.devices()[:4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: four)
        alone = trained(lambda _, n: {name: np.concatenate([part[name] for part in parts[n]]) for name in parts[n][0]})
    np.testing.assert_allclose(losses, alone, rtol=1e-5)

    from tests.train.test_dispatching import stage

    hosts = [np.load(tmp_path / f"images-{host}.npz") for host in range(2)]
    assert not np.array_equal(hosts[0]["tokens"], hosts[1]["tokens"])
    rows = {name: np.concatenate([host[name] for host in hosts]) for name in hosts[0].files}
    want = of_images(stage(), rows, over_mesh=False)
    np.testing.assert_allclose(found.pop("far"), want.pop("far"), rtol=1e-5)
    for part in ("vision", "merger", "decoder"):
        assert want[part] > 0
        np.testing.assert_allclose(found[part], want[part], rtol=1e-4, err_msg=part)


EXPERIMENT = """from tests.train.toy import config


def get_config(arg=None):
    return config()
"""


def test_a_whole_run_of_two_processes(tmp_path, monkeypatch, capsys):
    """`glmv train` on both: they train, evaluate and save as one; then a process alone goes on from what was saved. And
    of several that evaluate it the first alone speaks and writes."""
    (tmp_path / "toy.py").write_text(EXPERIMENT)
    address, workdir = f"localhost:{free_port()}", tmp_path / "run"
    command = [sys.executable, "-m", "glmv_jax.cli", "train", "--config", str(tmp_path / "toy.py"), "--workdir",
               str(workdir), "--coordinator", address, "--processes", "2", "--process"]  # fmt: skip
    said = finished([[*command, str(host)] for host in range(2)])
    assert "goodput" in said[0] and "12/12" in said[0] and "run" not in said[1]  # what Gloo says is not ours
    results = json.loads((workdir / "results.json").read_text())
    assert results["step"] == 12 and results["samples"] == 2 * 12 * 16 and results["goodput"]["attempts"] == 1
    rows = read_jsonl(workdir / "metrics.jsonl")
    assert [(row["step"], row["kind"]) for row in rows] == [(0, "eval"), *((n, "train") for n in range(1, 13)),
                                                           (12, "eval")]  # fmt: skip
    again = main.run(toy.config(steps=14), workdir)
    assert again["step"] == 14 and again["goodput"]["attempts"] == 2
    assert again["metrics"]["error"]["untrained"] == results["metrics"]["error"]["untrained"]
    assert again["metrics"]["seen"]["trained"] == (2 * 12 + 2) * 16  # the state went on, not from the beginning
    for first in (False, True):
        monkeypatch.setattr(multihost, "is_first", lambda first=first: first)
        capsys.readouterr()
        assert cli.main(["eval", "--run", str(workdir), "--json", str(tmp_path / "eval.json")]) == 0
        assert (tmp_path / "eval.json").is_file() is first and ("error" in capsys.readouterr().out) is first

"""The embedder: static shapes, the last batch, broken items, and two hosts that each make a part of the rows."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from glmv_jax.data.faults import FaultLog
from glmv_jax.eval import retrieval
from glmv_jax.eval.embed import Embedder
from glmv_jax.eval.knn import knn
from glmv_jax.parallel import rules
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.typing import UserError
from tests.eval.test_knn_and_retrieval import MESHES, mesh_of
from tests.hosts import together


def row(item: int) -> dict[str, np.ndarray]:
    if item % 7 == 3:
        raise ValueError(f"item {item} is broken")
    return {"x": np.array([item, item**2], np.float32)}


def embedder(mesh, batch):
    apply = lambda params, rows: {"feature": rows["x"] * params, "sum": rows["x"].sum(1, keepdims=True)}  # noqa: E731
    return Embedder(apply, row, {"x": np.zeros(2, np.float32)}, mesh, rules.preset("data"), batch)


@pytest.mark.parametrize("sizes", MESHES)
def test_all_items_in_order_but_the_broken_ones(sizes, tmp_path):
    embed, log = embedder(mesh_of(sizes), 6), FaultLog(tmp_path / "faults.jsonl")
    for count in (1, 16, 45):
        found = embed(np.float32(2), range(count), "things", [f"id-{n}" for n in range(count)], log)
        kept = [n for n in range(count) if n % 7 != 3]
        np.testing.assert_array_equal(found.kept, kept)
        np.testing.assert_array_equal(found.features["feature"], [[2 * n, 2 * n**2] for n in kept])
        np.testing.assert_array_equal(found.features["sum"], [[n + n**2] for n in kept])
        assert found.faults == count - len(kept)
    assert embed.traces == 1
    assert "id-38" in log.path.read_text() and log.counts() == {"things": 6}
    with pytest.raises(UserError, match="things: none of 1 items can be read"):
        embed(np.float32(2), [3], "things", log=log)
    with pytest.raises(UserError, match="things: features are not finite; the weights are broken"):
        embed(np.float32(np.nan), [1, 2], "things")
    with pytest.raises(UserError, match="things: nothing to embed"):
        embed(np.float32(2), [], "things")


def one_host(host: int, port: int, folder: str) -> None:
    """The program of a process."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, host)
    mesh, read = make_mesh({"data": 2, "fsdp": 2}), []
    embed = embedder(mesh, 8)
    plain = embed.row
    embed.row = lambda item: (read.append(item), plain(item))[1]
    found = embed(np.float32(3), range(21))
    x = found.features["feature"]
    near = knn(x, np.arange(len(x)), x, 1, mesh=mesh)
    ranks = retrieval.ranks(x, x, np.arange(len(x)), np.arange(len(x)), mesh=mesh)
    result = {"kept": found.kept.tolist(), "x": x.tolist(), "read": sorted(read), "near": near.tolist(),
              "ranks": ranks.tolist()}  # fmt: skip
    with open(f"{folder}/{host}.json", "w", encoding="utf-8") as file:
        json.dump(result, file)


def test_two_hosts_get_the_features_of_all(tmp_path):
    """Two processes of two devices each; each reads its own half of the items and has the features of all."""
    together("tests.eval.test_embed.one_host", tmp_path)
    first, second = (json.loads((tmp_path / f"{host}.json").read_text()) for host in range(2))
    assert first["read"] == [*range(0, 21, 2)] and second["read"] == [*range(1, 21, 2)]
    for got in (first, second):
        assert got["kept"] == [n for n in range(21) if n % 7 != 3]
        assert got["x"] == [[3 * n, 3 * n**2] for n in got["kept"]]
        assert got["near"][1:] == [*range(1, 18)] and max(got["ranks"][1:]) == 0

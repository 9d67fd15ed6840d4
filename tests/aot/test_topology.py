"""Names of slices: what they mean, and what is said of those that do not exist. No libtpu."""

from __future__ import annotations

import pytest

from glmv_jax.aot import topology
from glmv_jax.parallel import compiler
from glmv_jax.typing import UserError


def test_chips():
    """Clocks are whole numbers that Google gives or implies; a half of a tpu7x chip is a device."""
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in topology.CHIPS.items()}
    assert clocks == {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}
    assert topology.CHIPS["v5p"].ici_axis == 200e9  # 1,200 GB/s of six links, both ways
    assert topology.CHIPS["tpu7x"].per_chip == 2


def test_names():
    assert topology.parse("v5p:8x8x8").sizes == (8, 8, 8)
    assert str(topology.parse("v6e:16x16", 2)) == "2 x v6e:16x16"
    assert topology.parse("v5p:4x4x8").wrap == (True, True, True)
    assert topology.parse("v5p:2x4x4").wrap == (False, False, False)  # no whole cubes
    assert topology.parse("v5e:8x16").wrap == (False, True)


@pytest.mark.parametrize(
    ("name", "slices", "complaint"),
    [
        ("v5ep:2x2", 1, "known: v5e, v5p, v6e, tpu7x"),
        ("tpu7:2x2x2", 1, "nearest: tpu7x"),
        ("v5p:8x8", 1, "3 dimensions; write for example v5p:4x4x4"),
        ("v5e:4x0", 1, "2 dimensions"),
        ("v5e:32x32", 1, r"largest pod is v5e:16x16 \(256 chips\)"),
        ("v6e:2x128", 1, "largest pod is v6e:16x16"),
        ("v5p:16x24x24", 1, r"largest pod is v5p:16x20x28 \(8960 chips\)"),
        ("v5e:2x2", 0, "at least one"),
    ],
)
def test_what_there_is_not(name, slices, complaint):
    with pytest.raises(UserError, match=complaint):
        topology.parse(name, slices)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'glmv_jax\[tpu\]'"):
        _ = topology.parse("v5e:2x2").devices


def test_xla_options():
    assert compiler.options(["auto"]) == compiler.SETS["async"] and not compiler.options(["auto"], "cpu")
    assert not compiler.options(["none"])
    assert compiler.options(["--xla_a=1", "xla_b=x=y"]) == {"xla_a": "1", "xla_b": "x=y"}
    found = compiler.options(["async", "xla_enable_async_all_gather=false"])
    assert found == compiler.SETS["async"] | {"xla_enable_async_all_gather": "false"} != compiler.SETS["async"]
    with pytest.raises(UserError, match=r"--xla asink: .*\(auto, none, async, wide, sparse\)"):
        compiler.options(["asink"], where="--xla ")

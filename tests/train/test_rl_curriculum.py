"""Stage 5 with a curriculum and with groups asked beyond a batch, in both forms, over a policy whose pass rates are
known: of each task level 0 is always solved, the last never, and those between by chance.

Not covered: that a policy learns more by it (benchmarks/rl_curriculum.py).
"""

from __future__ import annotations

import json
import types

import jax
import numpy as np
import pytest

from glmv_jax import config
from glmv_jax.rl import Grade, tasks
from glmv_jax.train import main
from glmv_jax.typing import UserError

SMALL = ["model.vision.depth=1", "model.decoder.depth=1", "rollout.prompts=8", "rollout.group=4", "rollout.rows=(8,)",
         "rollout.max_new_tokens=6", "data.ahead=0"]  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    """One stage for all: what data it makes is asked of its config when they are made."""
    cfg = config.load("experiments/rl_grpo.py:size=nano")
    cfg.data.weights = {"count": 1.0, "puzzle": 1.0}
    stage = main.stage_class("rl")(config.override(cfg, SMALL))
    stage.verifiers = dict.fromkeys(stage.names, graded)
    stage.fresh = jax.jit(stage.init_params)(jax.random.key(0))
    return stage


@pytest.fixture
def stage(compiled):
    """As experiments have it: neither of them."""
    before = compiled.cfg.copy_and_resolve_references()
    yield compiled
    compiled.cfg = before


def data_of(stage, *, curriculum: bool = False, dynamic: bool = False, **more):
    r = stage.cfg.rollout
    r.curriculum.on, r.dynamic, r.expansion = curriculum, dynamic, {"decay": 0.5, "most": 2.0}
    r.update(more)
    return stage.train_data()


def graded(text, sample):
    """By chance: the texts of an untrained policy are as good as coins."""
    level, last = (levels := tasks.get(sample.source).levels).of(sample), levels.count - 1
    value = float(level == 0 or (level < last and len(text) % 2))
    return Grade(value, value == 1.0, {"format": 1.0, "score": value})


def steps(stage, data, first: int, count: int):
    """What is made for each step, and what is said of it; the weights stay."""
    return [stage.next_batch(data, types.SimpleNamespace(params=stage.fresh, step=first + n)) for n in range(count)]


def test_more_groups_have_a_gradient(stage):
    """At least 1.5 times those of drawing all alike (a third), once pass rates are known."""
    shares, stage.cfg.rollout.curriculum.decay = {}, 0.4
    for on in (False, True):
        data = data_of(stage, curriculum=on)
        made = steps(stage, data, 0, 12)
        data.close()
        shares[on] = np.mean([1.0 - metrics["same/mean"] for _, metrics in made[4:]])
        samples = sum(stage.counts(batch)["samples"] for batch, _ in made[4:])
        assert samples == pytest.approx(shares[on] * 256, rel=0.3), "what is useful is what is trained on"
    assert shares[True] >= 1.5 * shares[False] > 0.2, shares
    said = made[-1][1]
    assert said["passes/count/0"] > 0.9 and said["passes/puzzle/2"] < 0.1 and 0.2 < said["passes/count/1"] < 0.8
    asked = {key for _, metrics in made for key in metrics if key.startswith("asked/")}
    assert asked == {f"asked/{name}/{level}" for name in ("count", "puzzle") for level in range(3)}


def test_as_many_more_are_asked_as_teach_nothing_and_the_most_balanced_are_kept(stage):
    made = steps(stage, data_of(stage, dynamic=True), 0, 4)
    asked = [metrics["asked"] for _, metrics in made]
    assert asked[0] == 8 < asked[1] and 14 <= asked[-1] <= 16, "a third is useful, and at most twice as many are asked"
    for (batch, metrics), now in zip(made, asked):
        useful = round(metrics["useful"] * now)
        assert stage.counts(batch)["samples"] == 4 * min(8, useful)
        assert (batch["advantage"][batch["loss_weight"] > 0] != 0).any() == (useful > 0)
    assert 1.5 < made[-1][1]["expansion"] <= 2.0


def test_a_restart_draws_what_would_have_been_drawn(stage):
    """Bitwise, with pass rates and the expansion as they were."""
    data = data_of(stage, curriculum=True, dynamic=True)
    steps(stage, data, 0, 2)
    saved = json.dumps(data.get_state())
    wanted = steps(stage, data, 2, 2)
    again = stage.train_data()
    again.set_state(json.loads(saved))
    finite = lambda metrics: {name: x for name, x in metrics.items() if np.isfinite(x)}  # noqa: E731
    for (batch, metrics), (there, said) in zip(wanted, steps(stage, again, 2, 2), strict=True):
        np.testing.assert_equal(there, batch)
        assert finite(said) == finite(metrics)
    assert wanted[-1][1]["asked"] > 8
    stage.cfg.data.weights = {"count": 1.0}
    with pytest.raises(UserError, match="has 6 items and this one 3"):
        stage.train_data().set_state(json.loads(saved))


def test_the_asynchronous_form_learns_of_what_it_leaves_out(stage, tmp_path):
    stage.cfg.faults = str(tmp_path / "faults.jsonl")
    data = data_of(stage, curriculum=True, dynamic=True, pipeline="async", staleness=1, late="abort")
    try:
        made = steps(stage, data, 0, 4)
        state = json.loads(json.dumps(data.get_state()))["scheduler"]
    finally:
        data.close()
    assert all(metrics["same/mean"] == 0.0 for _, metrics in made), "groups without a gradient are replaced"
    said = made[-1][1]
    assert said["passes/count/0"] > 0.6 and said["passes/puzzle/2"] < 0.4, "known from groups that were filtered out"
    assert said["expansion"] > 1.1 and state["in_flight"] > 8
    assert state["prompts"]["passes"] != [0.5] * 6 and sum(state["prompts"]["times"]) == state["prompts"]["drawn"]

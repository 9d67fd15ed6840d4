"""What of two runs must be the same, and what of one must add up, for `faults.py`."""

from __future__ import annotations

import json
import re
from typing import Any

from real_runs import Run

# Seconds and what is made of them: of a row of metrics.jsonl, the only numbers that two equal runs may differ in.
TIMED = re.compile(r"wall|.*_per_second|data_wait|time/.*|flop_utilisation|.*seconds.*")


def differences(a: Run, b: Run, samples: bool = True) -> list[str]:
    """What differs between two finished runs that should be one: weights and state of the optimiser, bit by bit; rows
    of metrics but for times; sampled answers."""
    from glmv_jax.train.checkpoint import quiet_orbax

    wrong = []
    quiet_orbax()
    x, y = (_arrays(run) for run in (a, b))
    wrong += [f"checkpoint: {name}" for name in sorted(x.keys() | y.keys()) if x.get(name) != y.get(name)][:3]
    rows = [[{k: v for k, v in row.items() if not TIMED.fullmatch(k)} for row in run.rows] for run in (a, b)]
    if len(rows[0]) != len(rows[1]):
        wrong.append(f"metrics.jsonl: {len(rows[0])} and {len(rows[1])} rows")
    for one, other in zip(*rows):
        names = [k for k in one.keys() | other.keys() if one.get(k) != other.get(k)]
        wrong += [f"metrics.jsonl, step {one['step']}: {name}" for name in sorted(names)[:2]]
    if samples:
        written = [{p.name: p.read_bytes() for p in (run.folder / "samples").iterdir()} for run in (a, b)]
        wrong += [f"samples: {k}" for k in sorted(written[0].keys() | written[1].keys())
                  if written[0].get(k) != written[1].get(k)]  # fmt: skip
    return wrong[:6]


def _arrays(run: Run) -> dict[str, tuple]:
    """Of the last checkpoint: (dtype, shape, bytes) by path."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from glmv_jax.trees import flatten

    folder, found = run.folder / "checkpoints" / str(run.checkpoints()[-1]), {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        for item in ("params", "training"):
            tree = reader.metadata(folder / item).item_metadata.tree
            as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype), tree)
            got = reader.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
            found |= {f"{item}/{name}": (str(x.dtype), x.shape, x.tobytes()) for name, x in flatten(got).items()}
    return found


def accounts(run: Run, groups: int, answers: int, staleness: int) -> list[str]:
    """What is wrong with the books of a finished asynchronous run: every prompt that was drawn has to be trained on
    once, with all its answers in one step, or to wait; no token is older than `staleness`."""
    lines = (run.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "sample"]
    trained: dict[int, list[dict]] = {}
    for row in rows:
        trained.setdefault(row["uid"], []).append(row)
    state = host(run)["data"]["scheduler"]
    waiting = [group["prompt"]["uid"] for group in state["groups"]]
    left_out = [row["uid"] for row in map(json.loads, lines) if row["kind"] in ("filtered", "given_up")]
    wrong = [f"prompt {uid} is trained on {len(found) / answers:g} times" for uid, found in trained.items()
             if sorted(row["member"] for row in found) != list(range(answers))]  # fmt: skip
    wrong += [f"prompt {uid}: in steps {steps}" for uid, found in trained.items()
              if len(steps := {row["step"] for row in found}) > 1]  # fmt: skip
    by_step = sorted(row["step"] for row in rows)
    if by_step != [step for step in range(run.step) for _ in range(groups * answers)]:
        wrong.append(f"{len(rows)} answers in {run.step} steps of {groups * answers}")
    prompts = state["prompts"]["drawn"] if isinstance(state["prompts"], dict) else state["prompts"]  # with episodes
    if sorted([*trained, *waiting, *left_out]) != list(range(prompts)):
        lost = sorted(set(range(prompts)) - {*trained, *waiting, *left_out})
        wrong.append(f"of {prompts} prompts {len(lost)} are lost: {lost[:5]}, or some are twice")
    oldest = max(row["trained_at"] - version for row in rows for version in row["versions"] if version >= 0)
    return wrong[:6] + ([f"a token is {oldest} updates old"] if oldest > staleness else [])


def host(run: Run) -> dict[str, Any]:
    """The JSON of the last checkpoint."""
    path = run.folder / "checkpoints" / str(run.checkpoints()[-1]) / "host" / "metadata"
    return json.loads(path.read_text(encoding="utf-8"))

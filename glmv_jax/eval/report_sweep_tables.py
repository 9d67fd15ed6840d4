"""The tables of a sweep, for the terminal and for its page: what its arms differ in, how steadily, and at what cost."""

from __future__ import annotations

import statistics as plain

from glmv_jax.eval.report_sweep import STRAYS, Sweep, metrics, pairs, seed_spread, stray
from glmv_jax.eval.report_tables import Cell, Table, duration, number, quantity
from glmv_jax.eval.statistics import Spread, paired, spread

SHOWN = 10  # metrics of the terminal's tables; the page has all


def tables(sweep: Sweep, shown: int | None = None) -> list[Table]:
    """shown: how many metrics, None: all."""
    names = metrics(sweep)
    values = [name for name in names if not name.startswith(STRAYS)]  # those have a table of their own
    parts = [runs_table(sweep)]
    if names:
        parts += [final_table(sweep, values[:shown], len(values)), *difference_table(sweep, names[:shown])]
        parts += [steadiness_table(sweep), *head_table(sweep), cost_table(sweep)]
    return parts


def runs_table(sweep: Sweep) -> Table:
    """Arms by how many of their runs are over, and what went wrong."""
    rows = []
    for arm in sweep.arms:
        states = [m.record.get("status", "?") if not m.finished else "finished" for m in arm.members]
        counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        seeds = ", ".join(str(member.seed) for member in arm.members)
        rows.append([Cell(arm.label, "head"), Cell(seeds), Cell(counted, "" if set(states) == {"finished"} else "bad")])
        rows += [
            [Cell(""), Cell(str(m.seed), "quiet"), Cell(m.record["error"][:160], "quiet")]
            for m in arm.members if m.record.get("error") and not m.finished
        ]  # fmt: skip
    return Table("Runs", ["arm", "seeds", "runs"], rows)


def final_table(sweep: Sweep, names: list[str], of: int) -> Table:
    rows = []
    for name in names:
        for i, arm in enumerate(arm for arm in sweep.arms if arm.by_seed(name)):
            found = spread(list(arm.by_seed(name).values()))
            rows.append([
                Cell("" if i else name, "" if i else "head"), Cell(arm.label), Cell(number(found.mean)),
                Cell(number(found.sd)), Cell(_interval(found)), Cell(str(found.n), "quiet"),
            ])  # fmt: skip
    note = (
        "Of finished runs. Held-out numbers after training; train X: the mean of the training metric over the last "
        "tenth of the steps logged. sd: over seeds. Interval: of the mean, 95 %, Student's t."
    )
    rest = f" {of - len(names)} more metrics are in report.html." if of > len(names) else ""
    return Table("Final values", ["metric", "arm", "mean", "sd", "interval", "seeds"], rows, note + rest, "results")


def difference_table(sweep: Sweep, names: list[str]) -> list[Table]:
    """One, or none where there is nothing to compare."""
    rows = []
    for name in names:
        found = [(a, b, d) for a, b in pairs(sweep) if (d := paired(a.by_seed(name), b.by_seed(name))) is not None]
        for i, (a, b, d) in enumerate(found):
            tone = {True: "head", False: "quiet", None: "quiet"}[d.differs]
            rows.append([
                Cell("" if i else name, "" if i else "head"), Cell(f"{a.label} − {b.label}"),
                Cell(_signed(d.mean), tone), Cell(_interval(d, signed=True), tone), Cell(str(d.n), "quiet"),
            ])  # fmt: skip
    note = (
        "Runs of the same seed are subtracted, then averaged: the batches and the first parameters cancel. Bold: the "
        "95 % interval leaves 0 out, which by chance alone one in twenty does. Strays: see Steadiness."
    )
    header = ["metric", "arms", "difference", "interval", "seeds"]
    return [Table("Paired differences", header, rows, note, "results")] if rows else []


def steadiness_table(sweep: Sweep) -> Table:
    rows = []
    for name in dict.fromkeys(name for member in sweep.members for name in member.learnt):
        for i, arm in enumerate(arm for arm in sweep.arms if arm.finished):
            strays = [stray(m.learnt[name]) for m in arm.finished if name in m.learnt]
            found = [(one.sd, one.jump) for one in strays if one.sd is not None and one.jump is not None]
            if found:
                rows.append([
                    Cell("" if i else name, "" if i else "head"), Cell(arm.label),
                    Cell(number(plain.fmean(sd for sd, _ in found))), Cell(number(max(jump for _, jump in found))),
                    Cell(number(seed_spread(arm, name))),
                ])  # fmt: skip
    note = (
        "Over the last third of the steps. Strays: root mean square of the training metric minus its running mean "
        "(over about a twentieth of the run), mean over seeds. Largest rise: above that mean, of any seed. Between "
        "seeds: standard deviation at the same step, root mean square over the steps."
    )
    return Table("Steadiness", ["metric", "arm", "strays", "largest rise", "between seeds"], rows, note, "results")


def head_table(sweep: Sweep) -> list[Table]:
    """How good the drafts of the MTP head are; none for stages without one."""
    rows, measured = [], False
    for arm in sweep.arms:
        agree, right = (arm.by_seed(f"heldout mtp_{name}") for name in ("agreement", "accuracy"))
        found = [list(arm.by_seed(f"accept length {kind}").values()) for kind in ("text", "image")]
        measured = measured or any(found)
        if agree or any(found):
            columns = [list(agree.values()), list(right.values()), *found]
            rows.append([Cell(arm.label, "head"), *(_mean_sd(column) for column in columns)])
    note = (
        "Mean (sd over seeds), held-out. Agreement: how often the first draft is the token that the main head would "
        "say, which is when greedy decoding takes it. Accept length: tokens a step of speculative decoding, after a "
        "prompt of text alone and after one with images" + ("." if measured else "; not measured in these runs.")
    )
    header = ["arm", "agreement", "right", "accept length, text", "accept length, image"]
    return [Table("Drafts of the MTP head", header, rows, note)] if rows else []


def cost_table(sweep: Sweep) -> Table:
    rows = []
    for arm in sweep.arms:
        done = arm.finished
        steps = [seconds for m in done if (seconds := m.step_seconds)]
        tokens = [m.stage.results["tokens"] / s for m in done if (s := m.stage.results.get("train_seconds"))]
        memory = [m.record["peak_rss"] for m in done if m.record.get("peak_rss")]
        needed = [m.stage.results["step_memory"] for m in done if m.stage.results.get("step_memory")]
        rows.append([
            Cell(arm.label, "head"), Cell(f"{1e3 * plain.fmean(steps):.4g} ms" if steps else "–"),
            Cell(quantity(plain.fmean(tokens) if tokens else None)),
            Cell(f"{max(memory) / 2**30:.2f} GiB" if memory else "–"),
            Cell(f"{max(needed) / 2**20:,.0f} MiB" if needed else "–"),
            Cell(duration(plain.fmean(m.stage.seconds for m in done)) if done else "–"),
            Cell(quantity(done[0].stage.meta.get("params")) if done else "–"),
        ])  # fmt: skip
    note = (
        "A step: median over a run, mean over seeds. Host memory: the most that a run's process held, of any seed. "
        "Step memory: what the compiled step needs of a device, by the compiler. A run: everything, evaluations and "
        "compilation too."
    )
    header = ["arm", "a step", "tokens/s", "host memory", "step memory", "a run", "params"]
    return Table("Time and memory", header, rows, note)


def _interval(found: Spread, *, signed: bool = False) -> str:
    if found.low is None or found.high is None:
        return "–"
    text = _signed if signed else number
    return f"{text(found.low)} to {text(found.high)}"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{_fine(value)}".replace("-", "−")


def _fine(value: float) -> str:
    """Differences need a place more than what they are between."""
    return f"{value:.4f}" if 5e-4 <= abs(value) < 10 else number(value)


def _mean_sd(values: list[float]) -> Cell:
    if not values:
        return Cell("–", "quiet")
    found = spread(values)
    return Cell(number(found.mean) + (f" ({number(found.sd)})" if found.sd is not None else ""))

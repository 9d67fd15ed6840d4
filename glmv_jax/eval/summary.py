"""The report on data sets as lines of text: one a number, targets beside results, and what is missing."""

from __future__ import annotations

from typing import Any

from glmv_jax.eval import suite


def lines(report: dict[str, Any]) -> list[str]:
    """What `glmv eval --suite` prints. Targets are marked as such: they are the report's, no results of ours."""
    targets = report.get("targets", {})
    shown = [f"step {report['step']} of {report['run']}, {report['patches']} patches a picture"]
    shown.append(f"{'data set':<36} {'measure':<35} {'value':>7} {'target':>7} {'pictures':>9} {'broken':>7}  prompts")
    for name, result in report["datasets"].items():
        for metric, value in result["metrics"].items():
            target = _target(targets, result["task"]) if metric == result["main"] else None
            row = f"{name:<36} {metric:<35} {value:>7.4g} {_number(target):>7}"
            if metric == result["main"]:
                using = result.get("prompts")
                row += f" {result['images']:>9} {result['faults']:>7}  "
                row += f"{using['set']}, {using['templates']}" if using else ""
            shown.append(row.rstrip())
        shown += [f"{name}: {note}" for note in result["notes"]]
    shown += [f"{name}: NOT EVALUATED: {reason}" for name, reason in report["failed"].items()]
    shown += [f"{name}: skipped: {reason}" for name, reason in report["skipped"].items()]
    shown += _suite(report["suite"], targets) if "suite" in report else []
    for name, why in suite.UNDEFINED.items():
        if name in targets:
            shown.append(f"{name}: target {targets[name]:.3f}, undefined: {why}")
    if targets and report.get("targets_from"):
        shown.append(f"targets: {report['targets_from']}")
    return shown


def _suite(found: dict[str, Any], targets: dict[str, float]) -> list[str]:
    name = f"average of the {found['tasks']} tasks"
    target = targets.get(suite.AVERAGE)
    beside = f" (target {target:.3f})" if target else ""
    if found["average"] is not None:
        return [f"{name}: {found['average']:.4f}{beside}"]
    reasons: dict[str, list[str]] = {}
    for title, why in found["missing"].items():
        reasons.setdefault(why, []).append(title)
    head = f"{name}: none{beside}; it is taken over all of them, and {found['whole']} are here and whole. Missing:"
    return [head, *(f"  {', '.join(titles)}: {why}" for why, titles in reasons.items())]


def _target(targets: dict[str, float], task: str | None) -> float | None:
    """A task's target by its key or the last part of that."""
    return None if task is None else targets.get(task, targets.get(task.rpartition("/")[2]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

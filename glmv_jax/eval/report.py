"""What runs have come to: tables on the terminal and one self-contained page that works by itself anywhere: no script,
no network, light and dark, on a phone.

    write(["runs/quickstart"])         a recipe, stage by stage -> runs/quickstart/report.html
    write(["runs/rates"])              a sweep, arm by arm      -> runs/rates/report.html
    write(["runs/a", "runs/b"])        runs beside each other   -> report.html here, or `out`
    write(["runs/a"])                  one run                  -> runs/a/report.html
    show(...)                          the same tables on the terminal
"""

from __future__ import annotations

import collections
import importlib.resources
import os
import pathlib
from collections.abc import Sequence

from rich.console import Console

from glmv_jax import __version__
from glmv_jax.eval import report_html as page
from glmv_jax.eval import (
    report_rollouts,
    report_rollouts_html,
    report_run,
    report_runs,
    report_runs_html,
    report_runs_tables,
    report_sweep,
    report_sweep_html,
    report_sweep_tables,
    report_terminal,
)
from glmv_jax.eval.report_run import STAGES, StageRun, read
from glmv_jax.eval.report_tables import Table, duration, final_table, quantity, rl_tables, share_table, short_table
from glmv_jax.typing import UserError

Paths = str | os.PathLike | Sequence[str | os.PathLike]


def write(paths: Paths, out: str | os.PathLike | None = None) -> pathlib.Path:
    """Writes the page (whole or not at all) and returns its path. out: the file, by default report.html in the folder
    of a recipe, sweep or run, or here for several.

    Raises:
        UserError: no such run directory, or nowhere to write.
    """
    roots = _roots(paths)
    if _are_runs(roots):
        found = report_runs.find(roots)
        title, body = found[0].name if len(found) == 1 else f"{len(found)} runs", report_runs_html.body(found)
    elif report_sweep.is_sweep(roots[0]):
        title, body = roots[0].resolve().name, report_sweep_html.body(report_sweep.read(roots[0]))
    else:
        title = roots[0].resolve().name
        body = _body(title, read(roots[0]))
    path = pathlib.Path(out) if out else (roots[0] if len(roots) == 1 else pathlib.Path()) / "report.html"
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(_document(title, body), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another file with --out") from None
    return path


def show(paths: Paths, console: Console | None = None) -> None:
    """Prints the tables: held-out results, before and after RL, time and arithmetic; of a sweep its arms; of runs what
    they differ in.

    Raises:
        UserError: no such run directory.
    """
    console = console or Console()
    roots = _roots(paths)
    if _are_runs(roots):
        tables = report_runs_tables.shown(report_runs.find(roots))
    elif report_sweep.is_sweep(roots[0]):
        tables = report_sweep_tables.tables(report_sweep.read(roots[0]), report_sweep_tables.SHOWN)
    else:
        tables = _tables(read(roots[0]))
    for content in tables:
        report_terminal.show(content, console)


def _roots(paths: Paths) -> list[pathlib.Path]:
    """The folders, each once."""
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    return list({pathlib.Path(path).resolve(): pathlib.Path(path) for path in given}.values())


def _are_runs(roots: list[pathlib.Path]) -> bool:
    """Whether these are runs to lay beside each other; not so a recipe (also one that has just begun) or a sweep."""
    root = roots[0]
    if len(roots) > 1 or not root.is_dir() or report_run.is_run(root):
        return True
    inside = {path.name for path in root.iterdir()} - {"report.html"}
    return not (report_sweep.is_sweep(root) or not inside or inside & set(STAGES))


def _tables(stages: dict[str, StageRun]) -> list[Table]:
    ran = [run for run in stages.values() if run.metrics]
    wrong = (report_runs_tables.faults_table(ran), report_runs_tables.spikes_table(ran))
    told = [table for table in wrong if table and table.rows]
    return [final_table(stages), *rl_tables(stages), share_table(stages), *told]


# --- the page ---------------------------------------------------------------------------------------------------------


def _document(name: str, body: str) -> str:
    style = importlib.resources.files("glmv_jax.eval").joinpath("report.css").read_text(encoding="utf-8")
    end = f"<footer class=quiet>glmv_jax {__version__}. Held-out data throughout, unless a curve says train.</footer>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{page.text(name)}: glmv_jax report</title><style>{style}</style></head>"
        f"<body>{body}{end}</body></html>\n"
    )


def _body(name: str, stages: dict[str, StageRun]) -> str:
    started = {key: run for key, run in stages.items() if run.metrics or run.results}
    links = "".join(f'<a href="#{page.text(key)}">{page.text(key)}</a>' for key in started)
    all_results, *tables = _tables(stages)
    return "".join([
        f"<h1>{page.text(name)}</h1>{_summary(stages)}<nav>{links}</nav>",
        page.table(short_table(stages)), page.answers(stages), page.folded("all held-out results", all_results),
        "".join(page.table(content) for content in tables),
        "".join(_stage(run) for run in stages.values()),
    ])  # fmt: skip


def _summary(stages: dict[str, StageRun]) -> str:
    done = sum(1 for name in STAGES if stages[name].results)
    seconds = sum(run.seconds for run in stages.values())
    meta = next((run.meta for run in reversed(stages.values()) if run.meta), {})
    host = meta.get("host") or {}
    facts = [
        f"{done} of {len(STAGES)} stages finished, {duration(seconds)} of training",
        _devices(meta.get("devices")),
        f"{host['cores']} cores" if host.get("cores") else "",
        f"jax {meta['jax']}" if meta.get("jax") else "",
        f"started {meta['started']}" if meta.get("started") else "",
    ]
    return f"<p class=quiet>{page.text(' · '.join(fact for fact in facts if fact))}</p>"


def _devices(devices: list[str] | str | None) -> str:
    """["cpu:cpu", "cpu:cpu"] -> 2 x cpu:cpu."""
    names = [devices] if isinstance(devices, str) else devices or []
    return ", ".join(f"{count} x {name}" for name, count in collections.Counter(names).items())


def _stage(run: StageRun) -> str:
    head = f'<section id="{page.text(run.name)}"><h2>{page.text(run.name)}</h2>'
    head += f"<p class=quiet>{page.text(STAGES.get(run.name, ''))}</p>"
    if not (run.metrics or run.results):
        return f"{head}<p><b>not run yet</b></p></section>"
    last = run.last_step if run.metrics else "?"
    facts = [run.status, duration(run.seconds), f"last step {last}", f"{quantity(run.meta.get('params'))} parameters"]
    problems = "".join(f"<p class=bad>{page.text(problem)}</p>" for problem in run.problems)
    config = "\n".join(f"{key} = {value!r}" for key, value in run.config.items())
    folded = f"<details><summary>config</summary><pre>{page.text(config)}</pre></details>" if config else ""
    by_source = report_rollouts.curves(run)
    sources = {source for by in by_source.values() for source in by}
    return (
        f"{head}<p>{page.text(' · '.join(facts))}</p>{problems}{page.curves(run, sources)}"
        f"{report_rollouts_html.section(run, by_source)}{page.samples(run)}{folded}</section>"
    )

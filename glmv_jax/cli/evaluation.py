"""`glmv eval`, `report`: what a run has come to."""

from __future__ import annotations

import argparse
import os
import sys

from glmv_jax.cli.common import write_json
from glmv_jax.parallel import multihost
from glmv_jax.typing import UserError


def evaluate(args: argparse.Namespace) -> int:
    """Evaluates a trained stage: on its own held-out data, or a vision encoder on data sets in a folder.

    Without --suite: the numbers that training printed last, one a line. Example:

      glmv eval --run runs/quickstart/sft

    With --suite, for a run of stage mim or siglip: ROOT holds data sets as CLIP benchmark and DataComp write them
    (DATASET/test/0.tar ..., classnames.txt, zeroshot_classification_templates.txt, dataset_type.txt). Each is
    evaluated as what it is; without a choice of measures those that need no fitting (stage siglip: --zeroshot
    --retrieval, stage mim: --knn). The average over the 38 tasks of DataComp is printed only when all are there.

      glmv eval --run runs/siglip --suite /data/clip --json results.json
      glmv eval --run runs/siglip --suite /data/clip --datasets imagenet1k --templates zh --classnames cn.json
      glmv eval --run runs/mim --suite /data/clip --datasets imagenet1k cars --knn --linear-probe

    Exit code 1 when a data set that is there could not be evaluated.
    """
    if not os.path.isfile(os.path.join(args.run, "config.json")):
        raise UserError(f"{args.run} is no work directory of a stage (it has no config.json); give one, as RUN/sft")
    run = os.path.abspath(args.run)
    if args.suite is None:
        if given := [name for name in _SUITE_OPTIONS if getattr(args, name) not in (None, False, [])]:
            raise UserError(f"--{given[0].replace('_', '-')} is about data sets; name their folder with --suite ROOT")
        from glmv_jax.train import main as train_main

        numbers = train_main.evaluate(run)
        if not multihost.is_first():  # which has the same to say
            return 0
        write_json(args.json, numbers)
        for name, value in sorted(numbers.items()):
            print(f"{name:<40} {value:.4f}", file=sys.stderr if args.json == "-" else sys.stdout)
        return 0
    return _evaluate_suite(run, args)


# Of `glmv eval`, by the names of their attributes: what means nothing without --suite.
_MEASURES = ("zeroshot", "retrieval", "knn", "linear_probe")
_SUITE_OPTIONS = (*_MEASURES, "datasets", "templates", "classnames", "k", "limit", "patches", "batch", "seed")


def _evaluate_suite(run: str, args: argparse.Namespace) -> int:
    from glmv_jax.eval import summary
    from glmv_jax.train import main as train_main

    chosen = {
        "measures": tuple(name.replace("_", "-") for name in _MEASURES if getattr(args, name)),
        "templates": args.templates, "classnames": args.classnames, "k": args.k, "seed": args.seed,
    }  # fmt: skip
    settings = {name: value for name, value in chosen.items() if value not in (None, ())}
    sizes = {n: getattr(args, n) for n in ("limit", "patches", "batch") if getattr(args, n) is not None}
    if wrong := [name for name, value in (settings | sizes).items() if isinstance(value, int) and value < 0]:
        raise UserError(f"--{wrong[0]} is negative; give a number from 0 on")

    def say(name: str, result: dict) -> None:
        found = result.get("failed") or f"{result['main']} {result['score']:.4f} in {result['seconds']} s"
        print(f"{name}: {found}", file=sys.stderr, flush=True)

    first = multihost.is_first()
    told = say if first else None
    report = train_main.evaluate_data(run, args.suite, args.datasets or (), settings, say=told, **sizes)
    if first:
        write_json(args.json, report)
        print("\n".join(summary.lines(report)), file=sys.stderr if args.json == "-" else sys.stdout)
    return 1 if report["failed"] else 0


def evaluate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--run", required=True, metavar="DIR", help="a stage's work directory")
    sub.add_argument("--suite", metavar="ROOT", help="a folder of data sets")
    sub.add_argument("--datasets", nargs="+", metavar="NAME", help="only these of them (default: all that are there)")
    measures = sub.add_argument_group("measures (default: those that need no fitting)")
    measures.add_argument("--zeroshot", action="store_true", help="class names as sentences: accuracy, or mAP")
    measures.add_argument("--retrieval", action="store_true", help="R@1, 5, 10, from texts to images and back")
    measures.add_argument("--knn", action="store_true", help="nearest neighbours of the trunk in the split train")
    measures.add_argument("--linear-probe", action="store_true", help="logistic regression on the trunk, L2 searched")
    how = sub.add_argument_group("how")
    how.add_argument("--templates", metavar="SET", help="own (default: each data set's), clip_80, zh, plain or a file")
    how.add_argument("--classnames", metavar="FILE", help="class names, one a line or JSON (default: each data set's)")
    how.add_argument("--k", type=int, metavar="N", help="neighbours (default 20)")
    how.add_argument("--seed", type=int, metavar="N", help="of the linear probe's validation rows (default 0)")
    how.add_argument("--limit", type=int, metavar="N", help="N samples of a split, spread over it: for a quick look")
    how.add_argument("--patches", type=int, metavar="N", help="of a picture at most (default: as in the run's config)")
    how.add_argument("--batch", type=int, metavar="N", help="rows at a time over all devices (default 256)")
    sub.add_argument("--json", nargs="?", const="-", metavar="FILE", help="the report as JSON: to a file, or printed")
    multihost.options(sub)


def report(args: argparse.Namespace) -> int:
    """Shows what runs have come to: tables here, and all of it as one self-contained page.

      glmv report runs/quickstart          a recipe, stage by stage: report.html in its folder
      glmv report runs/sft                 one run
      glmv report runs/a runs/b runs/c     several beside each other: what they differ in, a colour a run
      glmv report runs/rates               a sweep, arm by arm, with means and intervals over seeds

    A run is a --workdir of glmv train; folders of runs stand for those in them. Several runs are written to report.html
    here, or to --out. What has not run or finished is named as such, so a report may be made at any time.
    """
    from glmv_jax.eval import report as eval_report

    runs = [*args.runs, *args.run] or [DEFAULT]
    path = eval_report.write(runs, args.out)
    eval_report.show(runs)
    print(f"report: {path}")
    return 0


DEFAULT = "runs/quickstart"  # of `glmv report`


def report_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("runs", nargs="*", metavar="RUN", help=f"a run, or a folder of runs (default: {DEFAULT})")
    sub.add_argument("--run", action="append", default=[], metavar="RUN", help="the same")
    sub.add_argument("--out", metavar="FILE", help="the page (default: report.html in the folder; of several, here)")

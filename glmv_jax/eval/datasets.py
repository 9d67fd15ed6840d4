"""One data set, or a folder of them, put to a model: what is measured of which kind of data, and the report of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glmv_jax.config import nearest
from glmv_jax.data.faults import FaultLog
from glmv_jax.eval import folders, knn, linear, prompts, retrieval, suite, winogavil, zeroshot
from glmv_jax.eval.embed import Embedded, Embedder
from glmv_jax.eval.folders import DataSet, Split
from glmv_jax.eval.towers import Towers
from glmv_jax.typing import Params, UserError

ZEROSHOT, RETRIEVAL, KNN, LINEAR = MEASURES = ("zeroshot", "retrieval", "knn", "linear-probe")
# Fewer of a task's samples than this, and its number is not the suite's.
_NEARLY_ALL = 0.99


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is evaluated and how; all of it is in the report.

    measures: of MEASURES.
    templates: "own" (those in a data set's folder), a set of `prompts.SETS`, or a file.
    classnames: a file, or "" for those in the folder.
    k: neighbours of the kNN probe.   seed: of the linear probe's validation rows.
    """

    measures: tuple[str, ...] = (ZEROSHOT, RETRIEVAL)
    templates: str = "own"
    classnames: str = ""
    k: int = 20
    seed: int = 0


Result = dict[str, Any]


class NothingToMeasure(UserError):
    """None of the measures that were asked for is one of this kind of data."""


class Evaluation:
    """Evaluators of one model, compiled once for all data sets and all weights.

    Raises: UserError when the measures need texts and the model reads none, or a file of the settings is not there.
    """

    def __init__(self, towers: Towers, settings: Settings = Settings(), log: FaultLog | None = None) -> None:
        self.towers, self.settings, self.log = towers, settings, log or FaultLog()
        if settings.templates != "own":
            prompts.check(settings.templates)
        if settings.classnames and not Path(settings.classnames).is_file():
            raise UserError(f"there is no file of class names {settings.classnames!r}; check the path")
        spoken = {ZEROSHOT, RETRIEVAL} & set(settings.measures)
        self._texts = towers.texts() if spoken else None
        # Probes look at the trunk, which both stages have; sentences are compared in the space of the two towers.
        features = (["embedding"] if spoken else []) + (["trunk"] if set(settings.measures) - spoken else [])
        self.images = towers.images(features)

    @property
    def texts(self) -> Embedder:
        """Of the text tower, which only measures with texts look at."""
        assert self._texts is not None, self.settings.measures
        return self._texts

    def folder(
        self, params: Params, root: str | Path, names: Sequence[str] = (), *, limit: int = 0,
        say: Callable[[str, Result], None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """{"datasets": name -> result, "failed": name -> why, "skipped": name -> why, "suite": ...} of `root`.

        names: only these.   limit: samples of a split, spread evenly over it; 0 for all.
        say: told each result when it is there.
        A data set that is broken has failed, one of which nothing is to be measured is skipped; both count as missing.
        Raises: UserError when `root` has no data set, or a name is not there.
        """
        results: dict[str, Result] = {}
        failed: dict[str, str] = {}
        skipped: dict[str, str] = {}
        sentences: dict[tuple, np.ndarray] = {}
        for data in chosen(root, names):
            try:
                results[data.name] = self.dataset(params, data, limit, sentences)
            except NothingToMeasure as error:
                skipped[data.name] = str(error)
            except UserError as error:
                failed[data.name] = str(error)
            if say and data.name not in skipped:
                say(data.name, results.get(data.name) or {"failed": failed[data.name]})
        report = {"datasets": results, "failed": failed, "skipped": skipped}
        if ZEROSHOT in self.settings.measures and RETRIEVAL in self.settings.measures:
            report["suite"] = average(results, failed | skipped)
        return report

    def dataset(
        self, params: Params, data: DataSet, limit: int = 0, sentences: dict[tuple, np.ndarray] | None = None
    ) -> Result:
        """All that is to be measured of one data set, or of `limit` samples of each split.

        sentences: class embeddings of these weights that were made already; data sets may share them.
        Raises: NothingToMeasure, and UserError when the folder is not whole.
        """
        began, s = time.monotonic(), self.settings
        kind, notes = data.kind, list[str]()
        metrics: dict[str, float] = {}
        facts: dict[str, Any] = {}
        wanted = [m for m in s.measures if (m == RETRIEVAL) == (kind == "retrieval")]
        if kind in ("multilabel", "winogavil"):
            wanted = [m for m in wanted if m == ZEROSHOT]
        if probes := [m for m in wanted if m in (KNN, LINEAR) and not data.has("train")]:
            notes.append(f"no {' and no '.join(probes)}: there is no split train")
            wanted = [m for m in wanted if m not in probes]
        if not wanted:
            raise NothingToMeasure("; ".join(notes) or f"of {kind} data none of {', '.join(s.measures)} is measured")

        split = data.split("test", self.log, limit)
        images = self._pictures(params, data, "test", split)
        if kind == "winogavil":
            metrics, facts = self._winogavil(params, data, split, images)
        elif ZEROSHOT in wanted:
            found, facts = self._zeroshot(params, data, split, images, {} if sentences is None else sentences)
            metrics |= found
        if RETRIEVAL in wanted:
            found, facts = self._retrieval(params, data, split, images)
            metrics |= found
        if KNN in wanted or LINEAR in wanted:
            metrics |= self._probes(params, data, split, images, wanted, limit)

        task = suite.task_of(data.name)
        main = task.metric if task and task.metric in metrics else next(iter(metrics))
        return {
            "kind": kind, "images": len(images.kept), "faults": split.faults + images.faults,
            "samples": len(images.kept), **facts,
            "metrics": metrics, "main": main, "score": metrics[main], "task": task.key if task else None,
            "notes": notes, "seconds": round(time.monotonic() - began, 2),
        }  # fmt: skip

    def _pictures(self, params: Params, data: DataSet, name: str, split: Split) -> Embedded:
        return self.images(params, split.pictures, f"{data.name}/{name}", split.ids, self.log)

    def _zeroshot(
        self, params: Params, data: DataSet, split: Split, images: Embedded, sentences: dict[tuple, np.ndarray]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        s = self.settings
        short = _short(data.name)
        names = prompts.class_names(s.classnames, short) if s.classnames else data.classes()
        own = data.templates() if s.templates == "own" else None
        using = "own" if own else "plain" if s.templates == "own" else s.templates
        templates = own or prompts.templates(using, short)
        key = (tuple(names), tuple(templates))
        if key not in sentences:
            sentences[key] = zeroshot.class_embeddings(self.texts, params, names, templates)
        classes, labels, mesh = sentences[key], split.labels[images.kept], self.towers.mesh
        facts = {"classes": len(names), "prompts": {"set": using, "templates": len(templates)}}
        if data.kind == "multilabel":
            if labels.shape[1] != len(names):
                raise UserError(f"labels (npy) are of {labels.shape[1]} classes, but there are {len(names)} names")
            precisions = zeroshot.average_precisions(images.features["embedding"], classes, labels, mesh=mesh)
            return {"mean_average_precision": float(np.nanmean(precisions))}, facts
        _check_labels(labels, len(names))
        top = zeroshot.nearest_classes(images.features["embedding"], classes, mesh=mesh)
        metrics = zeroshot.accuracies(top, labels)
        return metrics | _of_task(data.name, top, labels, split.facts, images.kept), facts

    def _retrieval(
        self, params: Params, data: DataSet, split: Split, images: Embedded
    ) -> tuple[dict[str, float], dict[str, Any]]:
        captions = [split.labels[i] for i in images.kept]  # those of a picture that cannot be read are no queries
        texts = [caption for some in captions for caption in some]
        image_of_text = np.repeat(np.arange(len(captions)), [len(some) for some in captions])
        embedded = self.texts(params, texts, f"{data.name}/captions", None, self.log)
        if embedded.faults:
            raise UserError(f"{embedded.faults} captions cannot be read; look at the reasons above")
        image, text = images.features["embedding"], embedded.features["embedding"]
        for what, features in (("pictures", image), ("captions", text)):
            if len(features) > 1 and np.ptp(features, axis=0).max() < 1e-6:  # all would be first of equals
                raise UserError(f"all {what} have the same embedding; the model has collapsed, and R@k means nothing")
        found = retrieval.both_ways(image, text, image_of_text, mesh=self.towers.mesh)
        return found, {"captions": len(texts)}

    def _winogavil(
        self, params: Params, data: DataSet, split: Split, images: Embedded
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Instances of which a picture cannot be read are left out."""
        place = np.full(len(split.pictures), -1)
        place[images.kept] = np.arange(len(images.kept))
        ends = np.cumsum([len(instance.chosen) for instance in split.labels])
        own = [place[end - len(instance.chosen) : end] for instance, end in zip(split.labels, ends)]
        whole = [instance for instance, places in zip(split.labels, own) if (places >= 0).all()]
        if not whole:
            raise UserError("no instance has all of its pictures")
        pictures = np.concatenate([places for places in own if (places >= 0).all()])
        cues = self.texts(params, [instance.prompt for instance in whole], f"{data.name}/cues", None, self.log)
        found = winogavil.jaccard(whole, images.features["embedding"][pictures], cues.features["embedding"])
        return found, {"samples": len(whole), "faults": split.faults + len(split.labels) - len(whole)}

    def _probes(
        self, params: Params, data: DataSet, split: Split, images: Embedded, wanted: Sequence[str], limit: int
    ) -> dict[str, float]:
        s, mesh = self.settings, self.towers.mesh
        gallery = data.split("train", self.log, limit)
        seen = self._pictures(params, data, "train", gallery)
        x, y = seen.features["trunk"], gallery.labels[seen.kept]
        asked, labels = images.features["trunk"], split.labels[images.kept]
        metrics = {}
        if KNN in wanted:
            if s.k > len(x):
                raise UserError(f"k={s.k} neighbours, but the split train has {len(x)} pictures; give a smaller --k")
            metrics["knn"] = float((knn.knn(x, y, asked, s.k, mesh=mesh) == labels).mean())
        if LINEAR in wanted:
            probe = linear.linear_probe(x, y, mesh=mesh, seed=s.seed)
            top = probe.classes[np.argsort(-probe.scores(asked), axis=1, kind="stable")[:, :5]]
            found = zeroshot.accuracies(top, labels)
            metrics |= {f"linear-probe {name}": value for name, value in found.items()}
            metrics["linear-probe strength"] = probe.strength
        return metrics


def default_measures(towers: Towers) -> tuple[str, ...]:
    """What a model can do as it is: zero-shot and retrieval with texts, else nearest neighbours."""
    return (ZEROSHOT, RETRIEVAL) if towers.text else (KNN,)


# --- parts of the above -----------------------------------------------------------------------------------------------


def chosen(root: str | Path, names: Sequence[str] = ()) -> list[DataSet]:
    """The data sets of a folder, or those that are named: by their folders, or as the public tools call them."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give one with data sets in CLIP benchmark's layout")
    if not names:
        found = folders.everything(root)
        if not found:
            raise UserError(f"{root} has no data set; each is a folder with test/0.tar (see glmv_jax/eval/folders.py)")
        return [DataSet(path, str(path.relative_to(root))) for path in found]
    data = []
    for name in names:
        task = suite.task_of(name)
        path = folders.find(root, (name, *(task.names if task else ())))
        if path is None:
            there = [str(p.relative_to(root)) for p in folders.everything(root)]
            raise UserError(f"{root} has no data set {name!r}{nearest(name, there, all_label='it has')}")
        data.append(DataSet(path, name))
    return data


def average(results: dict[str, Result], without: dict[str, str]) -> dict[str, Any]:
    """The suite's average, or None with what is in its way: it is only taken over all of its tasks, whole.

    without: data sets that have no result, and why."""
    by_task = {r["task"]: r for r in results.values() if r["task"]}
    reasons = {task.key: why for name, why in without.items() if (task := suite.task_of(name))}
    missing = {t.title: reasons.get(t.key, "not there") for t in suite.SUITE if t.key not in by_task}
    for task in suite.SUITE:
        result = by_task.get(task.key)
        if result and task.metric not in result["metrics"]:
            missing[task.title] = f"{task.metric} was not measured"
        elif result and result["samples"] < _NEARLY_ALL * task.size:
            missing[task.title] = f"{result['samples']} of {task.size} samples"
    scores = [by_task[t.key]["metrics"][t.metric] for t in suite.SUITE if t.title not in missing]
    return {
        "tasks": len(suite.SUITE), "whole": len(scores), "missing": missing,
        "average": float(np.mean(scores)) if not missing else None,
    }  # fmt: skip


def flat(results: dict[str, Result]) -> dict[str, float]:
    """The few numbers for a training log: zeroshot/<data set>/acc1, retrieval/<data set>/text -> image R@1, ...,
    knn/<data set>."""
    metrics = {}
    for name, result in results.items():
        if KNN in result["metrics"]:
            metrics[f"{KNN}/{name}"] = result["metrics"][KNN]
            continue
        head = RETRIEVAL if result["kind"] == "retrieval" else ZEROSHOT
        names = ("acc1", result["main"], "text -> image R@1", "image -> text R@1")
        metrics |= {f"{head}/{name}/{m}": result["metrics"][m] for m in names if m in result["metrics"]}
    return metrics


def _short(name: str) -> str:
    """What files with entries for several data sets call one: cars for vtab/cars or wds_vtab-cars_test."""
    task = suite.task_of(name)
    return (task.key if task else name).rpartition("/")[2]


def _check_labels(labels_N: np.ndarray, classes: int) -> None:
    if labels_N.min() < 0 or labels_N.max() >= classes:
        wrong = labels_N.max() if labels_N.max() >= classes else labels_N.min()
        raise UserError(f"a label is {wrong}, and there are {classes} class names, counted from 0")


def _of_task(
    name: str, top_Nk: np.ndarray, labels_N: np.ndarray, facts: np.ndarray | None, kept: np.ndarray
) -> dict[str, float]:
    """The measures that single tasks of the suite are known for."""
    task = suite.task_of(name)
    if task is None:
        return {}
    if task.metric == "macro_f1":
        return {"macro_f1": zeroshot.macro_f1(top_Nk[:, 0], labels_N)}
    found = {}
    for measure, (column, within, left_out) in suite.GROUPS.get(task.key, {}).items():
        if facts is None or facts.shape[1] <= column:
            raise UserError(f"{measure} needs the samples' facts (npy, column {column}), and they have none")
        groups = facts[kept, column]
        counted = ~np.isin(groups, left_out)
        hit = (top_Nk[:, :within] == labels_N[:, None]).any(1)
        found[measure] = zeroshot.worst_group(hit[counted], groups[counted])
    return found

"""Data sets in CLIP benchmark's layout through `glmv eval`, with small random towers; the numbers against brute force.

Not covered: several hosts (one process here), and whether a model is any good.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score as oracle

from glmv_jax import cli, config
from glmv_jax.config import flat
from glmv_jax.data import cache
from glmv_jax.data.pipeline import vision_row
from glmv_jax.eval import datasets, linear, probes, shards, suite, summary
from glmv_jax.eval.folders import DataSet
from glmv_jax.train import checkpoint, main
from glmv_jax.train.state import TrainState
from glmv_jax.typing import UserError, VisionInput
from tests.eval import small_suite

SMALL = {
    "siglip": ["model.vision.depth=1", "model.text.depth=1", "batch=8", "eval.patches=16"],
    "mim": ["model.vision.depth=1", "batch=8", "teachers.semantic.kind=hog", "teachers.semantic.path="],
}
FILES = {"siglip": "experiments/cogvit_siglip.py:size=nano", "mim": "experiments/cogvit_mim.py:size=nano"}


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "FOLDER", str(tmp_path_factory.mktemp("cache")))
        yield


def run_of(folder, name, **more):
    """The work directory of an untrained run (without its optimiser), its stage, and its parameters as numpy arrays."""
    stage = stage_of(name, **more)
    params = jax.jit(stage.init_params)(jax.random.key(0))
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    checkpoints.save(7, TrainState(jax.numpy.int32(7), params, {}, {}), {})
    checkpoints.wait()
    checkpoints.close()
    (folder / "config.json").write_text(json.dumps(flat(stage.cfg)))
    return folder, stage, jax.device_get(params)


def stage_of(name, *more, mesh=None):
    cfg = config.override(config.load(FILES[name]), [*SMALL[name], *more])
    if mesh:
        cfg.mesh, cfg.rules = mesh, "fsdp"
    return main.stage_class(name)(cfg)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A run whose weights are split over all devices."""
    folder, stage, params = run_of(tmp_path_factory.mktemp("siglip"), "siglip", mesh={"fsdp": -1})
    towers = stage.as_towers()
    stage.plain = {name: jax.jit(function) for name, function in (*towers.image.items(), ("text", towers.text))}
    return folder, stage, params


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return small_suite.suite(tmp_path_factory.mktemp("suite"))


def embedded(stage, params, split, feature="embedding"):
    """Features of a split's pictures by one call, on one device."""
    rows = [vision_row(*stage.patcher(picture), stage.patcher.max_patches) for picture in split.pictures]
    short = -len(rows) % 60  # so that it compiles once
    columns = [np.stack([row[key] for row in rows + rows[:1] * short]) for key in ("patches", "yx", "frame")]
    return np.asarray(stage.plain[feature](params, VisionInput(*columns)))[: len(rows)]


def texts_of(stage, params, texts):
    tokens = np.stack([stage.as_towers().tokenize(text) for text in texts])
    return np.asarray(stage.plain["text"](params, np.pad(tokens, ((0, 40 - len(tokens)), (0, 0)))))[: len(texts)]


def test_the_command_on_a_folder_of_three(siglip, root, tmp_path, capsys):
    folder, stage, params = siglip
    out = tmp_path / "results.json"
    assert cli.main(["eval", "--run", str(folder), "--suite", str(root), "--json", str(out), "--batch", "10"]) == 0
    report, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert (report["step"], report["stage"], report["jax"]) == (7, "siglip", jax.__version__)
    assert report["settings"]["seed"] == 0 and report["settings"]["templates"] == "own"
    cars, voc, flickr = (report["datasets"][name] for name in ("wds_cars_test", "voc2007_multilabel", "flickr30k"))
    assert (cars["images"], cars["classes"], cars["prompts"]) == (24, 6, {"set": "own", "templates": 2})
    assert voc["prompts"] == {"set": "plain", "templates": 1} and flickr["captions"] == 6 * (1 + 2 + 3)

    split = DataSet(root / "wds_cars_test", "cars").split()
    image = embedded(stage, params, split)
    names = small_suite.names(6)
    sentences = texts_of(stage, params, [t.replace("{c}", n) for n in names for t in ("a photo of a {c}.", "my {c}!")])
    classes = probes.unit(sentences.reshape(6, 2, -1).mean(1))
    answers = (image @ classes.T).argmax(1)
    assert cars["metrics"]["acc1"] == pytest.approx((answers == split.labels).mean())
    assert sorted(split.labels) == sorted([*range(6)] * 4)

    split = DataSet(root / "flickr30k", "flickr30k").split()
    image = embedded(stage, params, split)
    text = texts_of(stage, params, [caption for captions in split.labels for caption in captions])
    group = np.repeat(np.arange(18), [len(captions) for captions in split.labels])
    found = probes.recall(probes.ranks(text, image, group, np.arange(18)), (1, 5, 10))
    back = probes.recall(probes.ranks(image, text, np.arange(18), group), (1, 5, 10))
    for k in ("R@1", "R@5", "R@10"):
        assert flickr["metrics"][f"text -> image {k}"] == pytest.approx(found[k])
        assert flickr["metrics"][f"image -> text {k}"] == pytest.approx(back[k])

    split = DataSet(root / "voc2007_multilabel", "voc").split()
    image = embedded(stage, params, split)
    score = image @ texts_of(stage, params, small_suite.names(3)).T
    expected = np.mean([oracle(split.labels[:, c], score[:, c]) for c in range(3)])
    assert voc["metrics"]["mean_average_precision"] == pytest.approx(expected, abs=1e-5)

    assert report["suite"]["average"] is None and report["suite"]["whole"] == 0
    assert report["suite"]["missing"]["Stanford Cars"] == "24 of 8041 samples"
    assert report["suite"]["missing"]["ImageNet 1k"] == "not there"
    assert "average of the 38 tasks: none; it is taken over all of them, and 0 are here and whole" in shown
    assert "wds_cars_test                        acc1" in shown and "own, 2" in shown


def test_probes_of_stage_1_and_of_stage_2_agree_with_brute_force(siglip, root, tmp_path, capsys):
    folder, stage, params = siglip
    argv = ["eval", "--run", str(folder), "--suite", str(root), "--datasets", "cars", "--knn", "--k", "3", "--json"]
    assert cli.main(argv) == 0
    result = json.loads(capsys.readouterr().out)["datasets"]["cars"]
    data = DataSet(root / "wds_cars_test", "cars")
    gallery, asked = (embedded(stage, params, data.split(split), "trunk") for split in ("train", "test"))
    train, test = (data.split(split).labels for split in ("train", "test"))
    assert result["metrics"]["knn"] == pytest.approx((probes.knn(gallery, train, asked, 3) == test).mean())

    alone = dataclasses.replace(stage.as_towers(), mesh=shards.one_device())
    evaluation = datasets.Evaluation(alone, datasets.Settings(("linear-probe",), seed=3))
    found = evaluation.dataset(params, data)["metrics"]
    probe = linear.linear_probe(gallery, train, seed=3)
    assert found["linear-probe acc1"] == pytest.approx((probe.scores(asked).argmax(1) == test).mean(), abs=0.05)
    assert found["linear-probe strength"] == probe.strength

    mim, *_ = run_of(tmp_path, "mim")
    report = main.evaluate_data(mim, root, settings={"k": 3})
    assert report["datasets"]["wds_cars_test"]["metrics"].keys() == {"knn"} and report["patches"] == 36
    assert report["skipped"].keys() == {"flickr30k", "voc2007_multilabel"} and not report["failed"]
    assert cli.main(["eval", "--run", str(mim), "--suite", str(root), "--zeroshot"]) == 2
    assert "this model reads no texts; zero-shot and retrieval need a run of stage siglip" in capsys.readouterr().err


def test_broken_samples_are_counted_and_left_out(siglip, tmp_path, capsys):
    _, stage, params = siglip
    good = [small_suite.picture(n) | {"txt": f"a {n}\nb {n}".encode()} for n in range(12)]
    small_suite.write(tmp_path, "whole", good[:9], dataset_type="retrieval")
    good[9] = {"jpg": good[9]["jpg"][:40], "txt": good[9]["txt"]}  # cut short
    good[10] = {"txt": good[10]["txt"]}  # no picture
    good[11] = {"jpg": good[11]["jpg"], "txt": b"\n"}  # no caption
    small_suite.write(tmp_path, "broken", good, dataset_type="retrieval")
    evaluation = datasets.Evaluation(stage.as_towers(batch=4))
    report = evaluation.folder(params, tmp_path)
    whole, broken = report["datasets"]["whole"], report["datasets"]["broken"]
    assert broken["metrics"] == whole["metrics"]
    assert (broken["images"], broken["faults"], whole["faults"]) == (9, 3, 0)
    reasons = capsys.readouterr().err
    for reason in ("1.tar/s0000009", "the sample has no picture", "no caption"):
        assert reason in reasons
    # Nothing is a retrieval of its own when all embeddings are alike.
    same = params | {"text": jax.tree.map(np.zeros_like, params["text"])}
    failed = evaluation.folder(same, tmp_path, ("whole",))["failed"]
    assert "all captions have the same embedding; the model has collapsed" in failed["whole"]
    # One program for pictures and one for texts, whatever the number of data sets and rows.
    assert evaluation.images.traces == evaluation.texts.traces == 1


def test_measures_of_single_tasks(siglip, tmp_path):
    """FMoW's worst region, GeoDE's, Dollar Street's worst income and iWildCam's F1, from the samples' facts."""
    _, stage, params = siglip
    rng = np.random.default_rng(0)
    region = rng.integers(0, 6, 60)
    facts = {"fmow": lambda n: [region[n], 2, 0], "geode": lambda n: [n % 3, 0], "dollar_street": lambda n: [n % 4, 1]}
    for name, fact in facts.items():
        small_suite.classification(tmp_path, name, 12 if name == "dollar_street" else 6, 5, fact)
    small_suite.classification(tmp_path, "iwildcam", 4, 5)
    report = datasets.Evaluation(stage.as_towers()).folder(params, tmp_path)
    assert not report["failed"]
    for name, result in report["datasets"].items():
        data = DataSet(tmp_path / name, name)
        split = data.split()
        score = embedded(stage, params, split) @ texts_of(stage, params, data.classes()).T
        order = np.argsort(-score, axis=1)
        hit = [(order[:, :k] == split.labels[:, None]).any(1) for k in (1, 5)]
        worst = lambda hit, groups: min(hit[groups == g].mean() for g in set(groups.tolist()))  # noqa: E731
        found = result["metrics"]
        if name == "dollar_street":
            assert found["acc5_worst_income"] == pytest.approx(worst(hit[1], split.facts[:, 0]))
        elif name in ("geode", "fmow"):
            assert found["acc_worst_region"] == pytest.approx(worst(hit[0], split.facts[:, 0]))
        else:
            assert result["main"] == "macro_f1"
        assert result["main"] == suite.task_of(name).metric
        if name == "fmow":
            named = split.facts[:, 0] != 5
            assert found["acc_worst_named_region"] == pytest.approx(worst(hit[0][named], split.facts[named, 0]))


def test_groups_that_are_left_out():
    """By hand: in region 0 half is right, in "Other" (5) nothing, in 4 all."""
    top, labels = np.array([[1, 0], [1, 0], [1, 0], [1, 0]]), np.array([1, 0, 0, 1])
    facts = np.array([[0, 9], [0, 9], [7, 9], [5, 9], [4, 9]])
    found = datasets._of_task("wds_wilds-fmow_test", top, labels, facts, np.array([0, 1, 3, 4]))
    assert found == {"acc_worst_region": 0.0, "acc_worst_named_region": 0.5}
    assert datasets._of_task("dollar_street", top, labels, facts, np.array([0, 1, 3, 4])) == {"acc5_worst_income": 1.0}


def test_winogavil(siglip, tmp_path):
    """Cues and the pictures nearest to them; an instance that lacks a picture is left out."""
    _, stage, params = siglip
    rng, samples, chosen = np.random.default_rng(0), [], []
    for n, size in enumerate((5, 6, 10, 12, 10, 5)):
        names = [f"candidate {i}" for i in range(size)]
        chosen.append(np.arange(size) < 2 + n % 2)
        order = rng.permutation(size)
        chosen[-1] = chosen[-1][order]
        record = {"cue": ("Animal", "Stone")[n % 2], "candidates": names, "associations": []}
        record["associations"] = [name for name, yes in zip(names, chosen[-1]) if yes]
        pictures = {f"{i}.jpg": small_suite.picture(n * 12 + i)["jpg"] for i in range(size)}
        samples.append({"json": json.dumps(record).encode(), **pictures})
    samples[4]["3.jpg"] = b"no picture"
    del samples[5]["4.jpg"]
    data = DataSet(small_suite.write(tmp_path, "winogavil", samples, shards=1, dataset_type="winogavil"), "winogavil")
    result = datasets.Evaluation(stage.as_towers()).dataset(params, data)
    assert (result["samples"], result["faults"], result["main"]) == (4, 2, "jaccard_10-12")
    split, scores = data.split(), []
    split.pictures.chosen = split.pictures.chosen[:33]  # of the first four
    images = embedded(stage, params, split)
    cues = texts_of(stage, params, ["An animal", "A stone"])
    for n, first in enumerate((0, 5, 11, 21)):
        score = [float(cues[n % 2] @ image) for image in images[first : first + len(chosen[n])]]
        said = set(sorted(range(len(score)), key=lambda i: -score[i])[: sum(chosen[n])])
        right = set(np.flatnonzero(chosen[n]).tolist())
        scores.append(len(said & right) / len(said | right))
    assert result["metrics"]["jaccard_10-12"] == pytest.approx(np.mean(scores[2:]))
    assert result["metrics"]["jaccard_5-6"] == pytest.approx(np.mean(scores[:2]))
    assert result["metrics"]["jaccard"] == pytest.approx(np.mean(scores))


def test_what_cannot_be_evaluated_is_named(siglip, root, tmp_path, capsys):
    folder, stage, params = siglip
    small_suite.classification(tmp_path, "mnist", 3, 2)
    (tmp_path / "mnist" / "classnames.txt").write_text("zero\none\n")
    small_suite.classification(tmp_path, "gtsrb", 3, 2)
    (tmp_path / "gtsrb" / "test" / "nshards.txt").write_text("3")
    small_suite.classification(tmp_path, "fmow", 3, 2)
    small_suite.write(tmp_path, "untyped", [small_suite.picture(0) | {"txt": b"a"}] * 30)
    assert cli.main(["eval", "--run", str(folder), "--suite", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "mnist: NOT EVALUATED: a label is 2, and there are 2 class names, counted from 0" in shown
    assert "untyped: NOT EVALUATED" in shown and "no sample has a label that can be read as classification" in shown
    assert "1 of 3 tar files are missing, the first is 2.tar" in shown
    assert "fmow: NOT EVALUATED: acc_worst_region needs the samples' facts" in shown
    for argv, message in [
        (["--suite", str(root), "--datasets", "car"], "has no data set 'car'"),
        (["--suite", str(tmp_path / "no")], "is no folder; give one with data sets"),
        (["--suite", str(folder)], "has no data set; each is a folder with test/0.tar"),
        (["--suite", str(root), "--templates", "clip80"], "no set and no file; nearest: clip_80"),
        (["--suite", str(root), "--classnames", "no.txt"], "there is no file of class names 'no.txt'"),
        (["--knn"], "--knn is about data sets; name their folder with --suite ROOT"),
    ]:
        assert cli.main(["eval", "--run", str(folder), *argv]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == "" and captured.err.count("\n") == 1


def test_average_is_of_all_38_or_none():
    results = {
        t.key: {"task": t.key, "metrics": {t.metric: n / 38}, "samples": t.size} for n, t in enumerate(suite.SUITE)
    }
    found = datasets.average(results, {})
    assert found["average"] == pytest.approx(np.mean(np.arange(38) / 38)) and not found["missing"]
    results["mnist"]["samples"] = 9_000
    assert datasets.average(results, {})["average"] is None
    assert datasets.average(results, {})["missing"] == {"MNIST": "9000 of 10000 samples"}
    assert suite.task_of("wds_vtab-cifar100_test").title == "CIFAR-100" and suite.task_of("cifar") is None


def test_targets_stand_beside_results_and_are_called_targets():
    cfg = config.load("experiments/cogvit_siglip.py:size=l")
    result = {"metrics": {"acc1": 0.8, "acc5": 0.95}, "main": "acc1", "images": 50_000, "faults": 2, "notes": []}
    report = {
        "step": 9, "run": "runs/siglip", "patches": 256, "failed": {}, "skipped": {},
        "targets": dict(cfg.eval.targets), "targets_from": cfg.eval.targets_from,
        "datasets": {"wds_imagenet1k_test": result | {"task": "imagenet1k", "prompts": {"set": "own", "templates": 80}},
                     "wds_mnist_test": result | {"task": "mnist"}},
        "suite": {"tasks": 38, "whole": 1, "missing": {"MNIST": "not there", "GTSRB": "not there"}, "average": None},
    }  # fmt: skip
    shown = summary.lines(report)
    row = next(line for line in shown if line.startswith("wds_imagenet1k_test"))
    assert row.split() == ["wds_imagenet1k_test", "acc1", "0.8", "0.835", "50000", "2", "own,", "80"]
    assert sum("0.835" in line for line in shown) == 1
    assert any("none (target 0.704)" in line for line in shown) and "  MNIST, GTSRB: not there" in shown
    assert any("general_object_14: target 0.451, undefined: the report does not say which" in line for line in shown)
    assert shown[-1] == "targets: Figure 1 of the GLM-5V-Turbo report, CogViT-L (403M), zero-shot"
    report["suite"] |= {"average": 0.5, "missing": {}}
    assert "average of the 38 tasks: 0.5000 (target 0.704)" in summary.lines(report)
    assert "targets" not in config.load("experiments/cogvit_siglip.py:size=nano").eval


def test_in_training(siglip, root):
    """The data sets of the config are part of every evaluation, the short ones with a few pictures."""
    over = [f"eval.suite.root={root}", "eval.suite.datasets=('cars','flickr30k')", "eval.suite.short=8"]
    stage, params = stage_of("siglip", *over), siglip[2]
    full, short = (stage.suite(params, full) for full in (True, False))
    names = {"zeroshot/cars/acc1", "retrieval/flickr30k/text -> image R@1", "retrieval/flickr30k/image -> text R@1"}
    assert names <= full.keys() == short.keys()
    assert stage.suite.evaluation.images.traces == 1
    data = DataSet(root / "wds_cars_test", "cars")
    whole = stage.suite.evaluation.dataset(params, data)
    assert full["zeroshot/cars/acc1"] == whole["metrics"]["acc1"] and whole["images"] == 24
    split = data.split(limit=8)
    assert len(split.labels) == 8 and split.ids == [data.split().ids[3 * n] for n in range(8)]
    assert stage_of("siglip").suite(params, True) == stage_of("siglip", *over[:2]).suite(params, False) == {}
    mim = stage_of("mim", *over[:1], "eval.suite.datasets=('cars',)")
    assert set(mim.suite({"vision": params["vision"]}, True)) == {"knn/cars"}
    mim.suite.config.datasets = ("flickr30k",)
    with pytest.raises(UserError, match="eval.suite: flickr30k cannot be evaluated: of retrieval data none of knn"):
        mim.suite({"vision": params["vision"]}, True)


def test_config_of_another_version_is_one_line(siglip, tmp_path, capsys):
    folder, *_ = siglip
    saved = json.loads((folder / "config.json").read_text())
    for key in [key for key in saved if key.startswith("eval.")]:
        saved.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    for argv in ([], ["--suite", str(folder)]):
        assert cli.main(["eval", "--run", str(tmp_path), *argv]) == 2
        line = capsys.readouterr().err
        assert "config.json lacks" in line and "eval" in line and line.count("\n") == 1


"""Stage 1 from end to end: a folder of JPEG files, a SigLIP and a DINOv3 folder of transformers; live, split over eight
devices, from a cache, with PHI-S.

Not covered: released weights, a teacher that does not fit one device (only that its parameters are split), hosts that
write or read at the same time.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import safetensors.numpy as safetensors  # noqa: E402
from PIL import Image  # noqa: E402

from glmv_jax import cli, config  # noqa: E402
from glmv_jax.data import features  # noqa: E402
from glmv_jax.data.faults import FaultLog  # noqa: E402
from glmv_jax.data.features import FeatureCache  # noqa: E402
from glmv_jax.losses import phi_s  # noqa: E402
from glmv_jax.parallel import mesh as mesh_lib  # noqa: E402
from glmv_jax.parallel import rules as rules_lib  # noqa: E402
from glmv_jax.train import checkpoint, loop, main, teacher_cache  # noqa: E402
from glmv_jax.train.metrics import read_jsonl  # noqa: E402
from glmv_jax.train.stages import mim  # noqa: E402
from glmv_jax.typing import UserError  # noqa: E402
from tests.train import hf_folders  # noqa: E402
from tests.train.test_stages import update  # noqa: E402

SHORT = 2**16  # 32 crops of these small teachers
ROOT = Path(__file__).parents[2]
needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Thirty JPEGs in folders, one of them broken; a teacher of patch 8 and one of patch 16."""
    root = tmp_path_factory.mktemp("world")
    for i in range(30):
        rng = np.random.default_rng(i)
        folder = root / "pictures" / f"{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8))
        noise.resize(rng.integers(30, 90, 2).tolist(), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.jpg")
    broken = root / "pictures" / "0" / "015.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    shutil.copytree(hf_folders.siglip(root / "siglip", 32, 8), root / "other")
    weights = safetensors.load_file(root / "other" / "model.safetensors")
    weights["vision_model.post_layernorm.bias"][0] += 1e-3
    safetensors.save_file(weights, root / "other" / "model.safetensors", {"format": "pt"})
    hf_folders.dinov3(root / "dinov3", 64, 16)
    return root


@pytest.fixture(autouse=True, scope="module")
def short_files():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "FILE_BYTES", SHORT)
        yield


def experiment(world, *more: str, live=True, kind=("siglip", "dinov3")):
    """The smallest run of stage 1 on that folder, teachers in bfloat16."""
    cfg = config.load("experiments/cogvit_mim.py:size=nano")
    cfg.data.weights, cfg.data.sources = {"natural": 1.0}, {"natural": str(world / "pictures")}
    for name, folder in zip(("semantic", "texture"), kind):
        cfg.teachers[name].kind, cfg.teachers[name].dtype = folder, "bfloat16"
        cfg.teachers[name].path = str(world / folder) if live and folder != "hog" else ""
    small = ["model.vision.depth=1", "model.vision.width=32", "model.vision.mlp=32", "loss.head_hidden=32",
             "data.size=32", "data.crop_scale=(0.3, 1.0)", "batch=8", "steps=6", "eval.batches=1", "log_every=1",
             "compilation_cache="]  # fmt: skip
    return config.override(cfg, [*small, *more])


@pytest.fixture(scope="module")
def live(world):
    return main.run(experiment(world), world / "live"), world / "live"


@pytest.fixture(scope="module")
def cache(world):
    teacher_cache.write(experiment(world), world / "cache", items=60)
    return world / "cache"


def rows(workdir, kind="train"):
    return [row for row in read_jsonl(Path(workdir) / "metrics.jsonl") if row["kind"] == kind]


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def test_a_broken_picture_is_counted_and_held_out_ones_are_not_trained_on(world, live):
    results, workdir = live
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6]
    assert not any(row["skipped"] for row in rows(workdir))
    log = FaultLog(workdir / "faults.jsonl")
    assert set(log.counts()) == {"natural"} and '/0/015.jpg' in log.path.read_text()
    stage = main.stage_class("mim")(experiment(world))
    train, held = (set(stage.sources[split]["natural"].ids()) for split in ("train", "heldout"))
    assert not train & held and len(train | held) == 30 and len(held) == 7 and "0/015.jpg" in train
    note = results["metrics"]["heldout/semantic/loss"]["note"]
    assert "SigLIP 2x32/8 of" in note and note.endswith("at 32 px; held-out pictures: 7 of natural")


def test_held_out_crops_are_the_same_whether_kept_or_read_again(world, monkeypatch):
    kept, again = (mim.MIM(experiment(world, "eval.batches=2", kind=("hog", "hog"))) for _ in range(2))
    want = [list(kept._heldout_batches()) for _ in range(2)]
    monkeypatch.setattr(mim, "KEPT", 0)
    got = [list(again._heldout_batches()) for _ in range(2)]
    assert kept._kept and not again._kept
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_from_the_cache_losses_are_those_of_live_teachers(world, live, cache):
    """No path to any teacher is given; only the rounding of stored features differs: millionths in the first step,
    whose parameters are the same, and then more and more (Muon makes much of small gradients)."""
    stage = main.stage_class("mim")(experiment(world, f"data.teacher_cache={cache}", live=False))
    assert not jax.tree.leaves(stage.constants())
    results = main.run(stage.cfg, world / "cached")
    first = True
    for mine, other in zip(rows(world / "cached"), rows(live[1]), strict=True):
        for name in ("loss", "semantic/cos", "texture/smooth_l1", *(["grad_norm"] if first else [])):
            near = dict(rel=1e-4) if first else dict(rel=5e-3, abs=1e-3)
            assert mine[name] == pytest.approx(other[name], **near), (mine["step"], name)
        first = False
    for name, row in live[0]["metrics"].items():
        if name != "knn":
            got = results["metrics"][name]
            assert got["untrained"] == pytest.approx(row["untrained"], rel=5e-3, abs=1e-3), name
            assert got["trained"] == pytest.approx(row["trained"], rel=5e-3, abs=1e-3), name
    assert "stored" in results["metrics"]["heldout/texture/loss"]["note"]


def test_a_foreign_cache_is_refused(world, cache):
    def build(*more, **options):
        main.stage_class("mim")(experiment(world, f"data.teacher_cache={cache}", *more, **options))

    build()  # with the weights at hand they are compared, and are the same
    cfg = experiment(world, f"data.teacher_cache={cache}")
    cfg.teachers.semantic.path = str(world / "other")
    with pytest.raises(UserError, match="of another run: teachers.semantic.weights is [0-9a-f]{32} there and"):
        main.stage_class("mim")(cfg)
    with pytest.raises(UserError, match="data.crop_scale is .0.3, 1.0. there and .0.2, 1.0. here"):
        build("data.crop_scale=(0.2, 1.0)", live=False)
    with pytest.raises(UserError, match="train pictures of natural is 23 pictures .* there and 1. pictures"):
        build("data.heldout=0.5", live=False)
    with pytest.raises(UserError, match="teachers.texture.dtype is bfloat16 there and float32 here"):
        build("teachers.texture.dtype=float32", live=False)
    with pytest.raises(UserError, match=f"{cache} is of another run: seed is 0 there and 1 here"):
        teacher_cache.write(experiment(world, "seed=1"), cache)


def test_a_killed_writer_goes_on_and_parts_make_a_whole(world, cache, tmp_path):
    want = files(cache)
    assert list(want) == [f"{name}.safetensors" for name in ("heldout-0000/000000", "train-0000/000000",
                                                             "train-0000/000001")]  # fmt: skip
    for part in ((1, 3), (2, 3), (3, 3)):
        teacher_cache.write(experiment(world), tmp_path / "parts", items=60, part=part)
    assert files(tmp_path / "parts") == want

    write = f"teacher_cache.write(experiment(Path({str(world)!r})), {str(tmp_path / 'killed')!r}, items=160)"
    code = f"from tests.train.test_real_teachers import *\nfeatures.FILE_BYTES = SHORT\n{write}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed/train-0000/000000.safetensors").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = files(tmp_path / "killed")
    assert 2 <= len(begun) < 6  # dead long before the five of training were there
    half = tmp_path / "killed/train-0000/000004.safetensors.1.part"
    half.write_bytes(b"half")
    os.utime(half, (0, 0))
    teacher_cache.write(experiment(world), tmp_path / "killed", items=160)
    again = files(tmp_path / "killed")
    assert len(again) == 6 and not half.exists() and all(again[name] == content for name, content in begun.items())
    seen, keys = FeatureCache(tmp_path / "killed").read("train", 0, np.arange(64), ["semantic"])
    first, first_keys = FeatureCache(cache).read("train", 0, np.arange(64), ["semantic"])
    np.testing.assert_array_equal(keys, first_keys)
    np.testing.assert_allclose(seen["semantic"].astype(np.float32), first["semantic"].astype(np.float32), atol=0.05)


def test_each_host_reads_its_own_crops(world, tmp_path):
    """Written for two hosts; what the second one reads is what it would have seen."""
    cfg = experiment(world, kind=("hog", "hog"))
    teacher_cache.write(cfg, tmp_path, items=20, hosts=2)
    live = mim.MIM(experiment(world, kind=("hog", "hog")))
    with pytest.raises(UserError, match="hosts is 2 there and 1 here"):
        mim.MIM(experiment(world, f"data.teacher_cache={tmp_path}", kind=("hog", "hog")))
    reading = mim.reading(live.cfg, "train", 1, 2)
    images = live.batches("train", reading, 4)
    want = next(images)
    live.cache = FeatureCache(tmp_path)
    stored = live.batches("train", reading, 4)
    got = next(stored)
    for data in (images, stored):
        data.close()
    np.testing.assert_array_equal(got["patches"], want["patches"])
    seen = live.teachers[0].apply({}, jnp.asarray(want["image"])).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got["features"]["semantic"], np.asarray(seen))


def test_wrong_arguments_are_one_line(tmp_path, capsys):
    for experiment_file, part, words in [
        ("mim", "3", "--part 3 is not P/N; give for example 1/4"),
        ("mim", "5/4", "part=5/4: hosts and parts count from 1"),
        ("siglip", "1/1", "only stage mim has teachers, this config is of stage 'siglip'; give cogvit_mim.py"),
    ]:
        file = str(ROOT / f"experiments/cogvit_{experiment_file}.py")
        assert cli.main(["cache-teachers", "--config", file, "--out", str(tmp_path / "x"), "--part", part]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_disk_that_is_too_small_is_told_before(world, tmp_path):
    with pytest.raises(UserError, match="of features are to be written and .* are free; choose fewer --items"):
        teacher_cache.write(experiment(world), tmp_path, items=10**12)


# --- PHI-S ------------------------------------------------------------------------------------------------------------


def turned(world, *more, **options):
    phi = ("teachers.semantic.normalise=phi_s", "teachers.texture.normalise=phi_s", "loss.calibration=2")
    cfg = experiment(world, *phi, *more, kind=("hog", "dinov3"), **options)
    cfg.teachers.semantic.bins = 4  # 48 channels
    return cfg


def test_phi_s_is_fitted_before_the_first_step_and_kept(world):
    """Also by a run that goes on after its third step, on features of which the first batches are no part."""
    main.run(turned(world, "steps=3"), world / "phi")
    half = extra_of(world / "phi")
    main.run(turned(world), world / "phi")
    jax.tree.map(np.testing.assert_array_equal, extra_of(world / "phi"), half)
    assert not any(row["skipped"] for row in rows(world / "phi")) and len(rows(world / "phi")) == 6
    stage = main.stage_class("mim")(turned(world))
    data = stage.train_data()
    for teacher in stage.teachers:
        seen = [teacher.apply(teacher.params, jnp.asarray(next(data)["image"])) for _ in range(2)]
        data.set_state({"next_index": 0})
        y = phi_s.apply(jnp.stack(seen), half["stats"][teacher.name]).reshape(-1, teacher.channels)
        np.testing.assert_allclose(y.mean(0), 0, atol=0.02)
        np.testing.assert_allclose(y.std(0), 1, rtol=0.02)
    data.close()


def extra_of(workdir):
    """What the newest checkpoint holds beside parameters."""
    placement, _, _ = loop.prepare(main.stage_class("mim")(checkpoint.load_config(workdir)))
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", 2)
    state, _ = checkpoints.restore(placement.abstract)
    checkpoints.close()
    return jax.device_get(state.extra)


# --- split over devices -----------------------------------------------------------------------------------------------


@needs_8
def test_teachers_split_over_eight_devices_teach_the_same(world):
    sizes, rules = {"data": 2, "fsdp": 2, "tensor": 2}, "fsdp_tensor"
    stage = main.stage_class("mim")(experiment(world, "teachers.semantic.dtype=float32", "optim.lr=1e-4",
                                               "teachers.texture.dtype=float32"))
    with_data = stage.train_data()
    batch = next(with_data)
    with_data.close()
    alone, metrics = update(stage, batch, {"data": 1}, "data")
    many, many_metrics = update(stage, batch, sizes, rules)
    for key in metrics:
        np.testing.assert_allclose(many_metrics[key], metrics[key], rtol=1e-4, atol=1e-5, err_msg=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone, many)

    mesh, preset = mesh_lib.make_mesh(sizes), rules_lib.preset(rules)
    placed = jax.device_put(stage.constants(), preset.shardings(mesh, stage.constant_axes(), stage.constants()))
    for tower in placed.values():
        total = sum(x.nbytes for x in jax.tree.leaves(tower))
        here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tower))
        assert here < 0.45 * total

"""Public teachers inside stage 1: transformers' own folders, transformers' own answers.

Whole runs with them are in test_real_teachers. Not covered: released weights.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from glmv_jax.models.cogvit import CogViTConfig  # noqa: E402
from glmv_jax.train import teachers  # noqa: E402
from glmv_jax.typing import UserError  # noqa: E402
from tests.train import hf_folders  # noqa: E402

STUDENT = CogViTConfig(depth=1, width=16, heads=2, mlp=16, patch=4)
CROP = 16  # a grid of 4 x 4
MERGE = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]  # row by row -> merge blocks


def images(n=2):
    return np.random.default_rng(0).integers(0, 256, (n, CROP, CROP, 3)).astype(np.uint8)


def entry(**values):
    return ConfigDict({"path": "", "size": 0, "dtype": "float32", "weight": 1.0} | values)


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    return hf_folders.siglip(tmp_path_factory.mktemp("siglip"), CROP, 4)


@pytest.fixture(scope="module")
def dinov3_folder(tmp_path_factory):
    return hf_folders.dinov3(tmp_path_factory.mktemp("dinov3"), 32, 8)


def test_siglip_sees_what_its_own_processor_gives(siglip_folder):
    model = transformers.SiglipModel.from_pretrained(siglip_folder).eval()
    pixels = torch.tensor(images()).permute(0, 3, 1, 2) / 255.0 * 2.0 - 1.0
    with torch.no_grad():
        want = model.vision_model(pixels).last_hidden_state.numpy()[:, MERGE]
    teacher = teachers.make("semantic", entry(kind="siglip", path=str(siglip_folder)), STUDENT, CROP)
    np.testing.assert_allclose(teacher.apply(teacher.params, jnp.asarray(images())), want, atol=1e-4)
    assert teacher.channels == 32 and "at 16 px" in teacher.about


@pytest.mark.parametrize("size", [0, 64])
def test_dinov3_sees_a_larger_image_and_its_map_fits_the_students(dinov3_folder, size):
    """Patch 8 beside patch 4: the crop of 16 px is shown at 32; at 64 its 8 x 8 features are brought to 4 x 4."""
    model = transformers.DINOv3ViTModel.from_pretrained(dinov3_folder).eval()
    resize = lambda x, side: torch.nn.functional.interpolate(x, (side, side), mode="bilinear", antialias=True)  # noqa: E731
    pixels = resize(torch.tensor(images()).permute(0, 3, 1, 2) / 255.0, size or 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        found = model((pixels - mean[:, None, None]) / std[:, None, None]).last_hidden_state[:, 5:]
    side = (size or 32) // 8
    want = resize(found.transpose(1, 2).reshape(2, -1, side, side), 4).flatten(2).transpose(1, 2).numpy()[:, MERGE]
    teacher = teachers.make("texture", entry(kind="dinov3", path=str(dinov3_folder), size=size), STUDENT, CROP)
    np.testing.assert_allclose(teacher.apply(teacher.params, jnp.asarray(images())), want, atol=1e-4)


def test_bfloat16_halves_a_teacher(siglip_folder):
    teacher = teachers.make("t", entry(kind="siglip", path=str(siglip_folder), dtype="bfloat16"), STUDENT, CROP)
    full = teachers.make("t", entry(kind="siglip", path=str(siglip_folder)), STUDENT, CROP)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(teacher.params))
    got, want = (t.apply(t.params, jnp.asarray(images())) for t in (teacher, full))
    assert got.dtype == jnp.float32
    assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)


def test_wrong_entries(siglip_folder, tmp_path):
    with pytest.raises(UserError, match="teachers.a.kind='sigclip' is not known; choose from siglip"):
        teachers.make("a", entry(kind="sigclip"), STUDENT, CROP)
    for kind, words in (("siglip", "folder of a SigLIP"), ("dinov3", "folder of a DINOv3"), ("tower", "role=teacher")):
        with pytest.raises(UserError, match=f"teachers.a.path is empty: .*{words}"):
            teachers.make("a", entry(kind=kind), STUDENT, CROP)
    with pytest.raises(UserError, match="size=18 is no multiple of its patch 4; try 20"):
        teachers.make("a", entry(kind="siglip", path=str(siglip_folder), size=18), STUDENT, CROP)
    with pytest.raises(UserError, match="model_type 'siglip' is not dinov3_vit"):
        teachers.make("a", entry(kind="dinov3", path=str(siglip_folder)), STUDENT, CROP)

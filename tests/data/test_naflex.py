"""Image sizing and patch order against the Hugging Face processors, and bad pictures."""

from __future__ import annotations

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from glmv_jax.data import naflex
from glmv_jax.data.canvas import CanvasPatcher
from glmv_jax.models import cogvit
from glmv_jax.typing import CLIP_MEAN, CLIP_STD, UserError

SIZES = [(1, 1), (10, 10), (28, 28), (120, 200), (200, 120), (333, 517), (1080, 1920), (5000, 4000), (27, 3000),
         (64, 64), (48, 64), (17, 900), (14, 2800)]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


# ----------------------------------------------------------------------------------------------------------- sizing


@pytest.mark.parametrize("limits", [{}, {"max_pixels": 28 * 28 * 15000}, {"min_pixels": 50000, "max_pixels": 90000},
                                    {"factor": 16, "min_pixels": 512, "max_pixels": 8192}])
def test_smart_resize_is_glm_ocrs(limits):
    hf = pytest.importorskip("transformers.models.glm46v.image_processing_pil_glm46v")
    rng = np.random.default_rng(0)
    for height, width in SIZES + [tuple(s) for s in rng.integers(1, 3000, (300, 2)).tolist()]:
        try:
            expected = hf.smart_resize(2, height, width, **limits)
        except ValueError:
            with pytest.raises(UserError, match="200 times"):
                naflex.smart_resize(height, width, **limits)
            continue
        assert naflex.smart_resize(height, width, **limits) == expected, (height, width)


def test_smart_resize_known_sizes():
    assert naflex.smart_resize(120, 200) == (112, 196)
    assert naflex.smart_resize(1080, 1920) == (1092, 1932)
    assert naflex.smart_resize(5000, 4000) == (2436, 1960)
    assert naflex.smart_resize(10, 10) == (84, 84)


@pytest.mark.parametrize("unit,budget", [(16, 256), (14, 256), (16, 16), (28, 1024), (16, 1)])
def test_naflex_size_is_siglip2s(unit, budget):
    hf = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    rng = np.random.default_rng(1)
    for height, width in SIZES + [tuple(s) for s in rng.integers(1, 2000, (200, 2)).tolist()]:
        expected = hf.get_image_size_for_max_num_patches(height, width, unit, budget)
        assert naflex.naflex_size(height, width, unit, budget) == expected, (height, width)


@pytest.mark.parametrize("policy", ["naflex", "smart"])
def test_patcher_never_exceeds_its_budget_and_keeps_whole_merge_blocks(policy):
    patcher = naflex.Patcher(policy=policy)
    rng = np.random.default_rng(2)
    for height, width in rng.integers(1, 700, (300, 2)).tolist():
        try:
            new_h, new_w = patcher.size(height, width)
        except UserError:
            assert policy == "smart" or max(height, width) > 200 * min(height, width)
            continue
        assert new_h % 16 == 0 and new_w % 16 == 0
        assert 4 <= new_h * new_w // 64 <= 64


def test_naflex_fills_most_of_the_budget_at_the_native_aspect_ratio():
    assert naflex.Patcher().size(64, 64) == (64, 64)
    assert naflex.Patcher().size(480, 480) == (64, 64)
    assert naflex.Patcher().size(32, 128) == (32, 128)
    assert naflex.Patcher().size(10, 2000) == (16, 256)


# ---------------------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize("size", [(120, 200), (333, 517), (61, 64), (40, 30), (1, 1), (28, 900)])
def test_patches_are_those_of_the_glm_processor(size):
    hf = pytest.importorskip("transformers.models.glm46v.image_processing_pil_glm46v")
    processor = hf.Glm46VImageProcessorPil(size={"shortest_edge": 112 * 112, "longest_edge": 2 * 14 * 14 * 400})
    image = picture(*size)
    expected = processor(image, return_tensors="np")
    patches, yx = naflex.Patcher(patch=14, policy="smart", min_patches=32, max_patches=400)(image)
    np.testing.assert_array_equal(yx.max(0) + 1, expected["image_grid_thw"][0, 1:])
    shown = cogvit.normalised(jnp.asarray(patches), 3, 2, 14)
    np.testing.assert_allclose(shown, expected["pixel_values"], atol=2e-6)


@pytest.mark.parametrize("size", [(120, 200), (333, 517), (61, 64), (40, 30), (1, 1), (28, 900), (700, 20), (280, 280)])
def test_patches_are_those_of_the_canvas_processor(size):
    hf = pytest.importorskip("transformers.models.glm5_next.image_processing_pil_glm5_next")
    processor = hf.Glm5NextImageProcessorPil(min_image_tokens=8, max_image_tokens=60)
    image = picture(*size)
    expected = processor(image, return_tensors="np")
    patches, yx = CanvasPatcher(patch=14, policy="smart", min_patches=32, max_patches=240)(image)
    np.testing.assert_array_equal(yx.max(0) + 1, expected["image_grid_thw"][0, 1:])
    shown = cogvit.normalised(jnp.asarray(patches), 3, 2, 14)
    np.testing.assert_allclose(shown, expected["pixel_values"], atol=2e-6)


def test_coordinates_are_those_of_the_glm_tower():
    functions = pytest.importorskip("transformers.vision_utils")
    torch = pytest.importorskip("torch")
    for rows, columns in [(2, 2), (4, 6), (8, 8), (2, 14)]:
        expected = functions.get_vision_position_ids(torch.tensor([[1, rows, columns]]), 2)
        np.testing.assert_array_equal(naflex.grid_coordinates(rows, columns), np.asarray(expected)[:, -2:])


def test_patch_vector_layout_is_channel_y_x_and_the_tower_sees_channel_frame_y_x():
    pixels = np.arange(16 * 32 * 3, dtype=np.uint8).reshape(16, 32, 3)
    patches, yx = naflex.patchify(pixels, 8)
    vectors = np.asarray(cogvit.normalised(jnp.asarray(patches), 3, 2, 8)).reshape(8, 3, 2, 8, 8)
    for vector, (row, column) in zip(vectors, yx):
        for y, x, channel in [(0, 0, 0), (3, 5, 1), (7, 7, 2)]:
            pixel = pixels[row * 8 + y, column * 8 + x, channel]
            value = (np.float64(pixel) / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
            np.testing.assert_allclose(vector[channel, :, y, x], value, atol=1e-6)


@pytest.mark.parametrize("size,patch,merge", [((32, 48), 8, 2), ((16, 16), 8, 2), ((24, 40), 8, 1), ((28, 84), 14, 2)])
def test_unpatchify_gives_the_pixels_back(size, patch, merge):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    patches, yx = naflex.patchify(pixels, patch, merge)
    np.testing.assert_array_equal(naflex.unpatchify(patches, yx, patch), pixels)


def test_wrong_sizes_are_refused():
    with pytest.raises(UserError, match="no multiple of 16"):
        naflex.patchify(np.zeros((24, 32, 3), np.uint8), 8)
    with pytest.raises(UserError, match="naflex or smart"):
        naflex.Patcher(policy="smrt")
    with pytest.raises(UserError, match="merge block"):
        naflex.Patcher(max_patches=3)


# ---------------------------------------------------------------------------------------------------------- loading


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_every_mode_becomes_rgb_that_looks_the_same():
    grey = Image.linear_gradient("L").resize((32, 32))
    expected = np.asarray(grey, np.int32)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    for image in (grey, grey.convert("RGBA"), grey.convert("P"), deep, grey.convert("CMYK"), grey.convert("F"),
                  Image.fromarray(expected), Image.fromarray(np.asarray(grey, np.float32) / 255), grey.convert("LA")):
        result = naflex.load_image(image)
        assert result.mode == "RGB"
        np.testing.assert_allclose(np.asarray(result)[..., 1], expected, atol=1, err_msg=image.mode)
    assert naflex.load_image(saved(deep)).getpixel((31, 31)) == naflex.load_image(grey).getpixel((31, 31))


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert naflex.load_image(saved(clear)).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert naflex.load_image(saved(half)).getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (4, 4), 0)
    assert naflex.load_image(saved(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (20, 10), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    assert naflex.load_image(saved(image, "JPEG", exif=exif)).size == (10, 20)


def test_one_pixel_and_very_long_images():
    patches, yx = naflex.Patcher()(Image.new("RGB", (1, 1), "red"))
    assert patches.shape == (64, 192) and np.ptp(patches.reshape(64, 3, -1), axis=2).max() == 0
    for policy in ("naflex", "smart"):
        with pytest.raises(UserError, match="200 times"):
            naflex.Patcher(policy=policy)(Image.new("RGB", (8000, 20)))
    with pytest.raises(UserError, match="too thin"):
        naflex.Patcher(policy="smart")(Image.new("RGB", (3000, 20)))


def test_bad_files_are_one_line_user_errors(tmp_path):
    picture_bytes = saved(picture(40, 40), "JPEG")
    png = saved(picture(40, 40))
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(picture_bytes[: len(picture_bytes) // 2])
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    (tmp_path / "broken.png").write_bytes(png[:60] + b"\0" * 40 + png[100:])
    cases = {"missing.png": "does not exist", "text.png": "not a picture", "empty.png": "not a picture",
             "cut.jpg": "cut short", "cut.png": "cut short", "broken.png": "broken", ".": "cannot be read"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            naflex.load_image(tmp_path / name)
        assert "\n" not in str(error.value) and (name == "." or name in str(error.value))
    with pytest.raises(UserError, match="the image bytes is not a picture"):
        naflex.load_image(b"nothing")


@pytest.mark.filterwarnings("error")
def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    for size in [(20000, 10000), (12000, 9000)]:  # where Pillow raises, and where it only warns
        Image.new("1", size).save(tmp_path / "bomb.png")
        with pytest.raises(UserError, match="more than 67,108,864 pixels"):
            naflex.load_image(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="more than 100 pixels"):
        naflex.load_image(saved(picture(20, 20)), max_pixels=100)

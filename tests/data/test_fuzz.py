"""Odd, broken and hostile files at the door of the data: whole ones are decoded to what they show, the others are so or
are skipped with a reason, and nothing of them ends a run.

Not covered here but by `benchmarks/fuzz_data.py`, ten thousand files with a watch: what takes long, much memory, or
ends a worker process.
"""

from __future__ import annotations

import collections
import functools
import io
import pathlib
import zlib

import numpy as np
import pytest
from PIL import Image

from glmv_jax.data import naflex, video
from glmv_jax.typing import UserError

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fuzz_data
    import fuzz_files

    return fuzz_data, fuzz_files


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow's, of files that are nearly whole
def test_a_sample_of_all_kinds(fuzz, tmp_path):
    fuzz_data, files = fuzz
    pytest.importorskip("av")
    door = fuzz_data.Door(tmp_path / "faults.jsonl")
    for name, whole in files.whole().items():
        assert door(whole) == ("decoded", ""), name
    slow = ("67e6", "scans", "300 MB")
    hostile = {name: door(files.File(name, media, files.hostile(name)))
               for name, (media, _) in files.HOSTILE.items() if not any(word in name for word in slow)}  # fmt: skip
    decoded = {name for name, (verdict, _) in hostile.items() if verdict == "decoded"}
    assert decoded == {"bomb: film of 8191x8191"}  # whose frames say that they are small, which is true
    for name, words in {
        "bomb: png of 3.6e9 pixels": "more than 67,108,864 pixels", "bomb: film of 2e9 ticks": "2,147,483,647 frames",
        "pdf": "is a PDF; draw its pages", "postscript": "is not a picture", "playlist to a file": "none of the forms",
        "session on the network": "none of the forms", "zero-length": "is not a picture", "svg": "is not a picture",
    }.items():  # fmt: skip
        assert hostile[name][0] == "skipped" and words in hostile[name][1], hostile[name]
    seen = collections.Counter()
    for i in range(2, 120):
        if i % files.HOSTILE_EVERY:
            verdict, reason = door(files.file(0, i))
            assert verdict in ("decoded", "skipped") and (verdict == "decoded") == (not reason), (i, verdict, reason)
            seen[verdict] += 1
    assert min(seen["decoded"], seen["skipped"]) > 20


def test_the_door_tells_a_picture_that_is_decoded_wrongly(fuzz, tmp_path):
    fuzz_data, files = fuzz
    door, other = fuzz_data.Door(tmp_path / "faults.jsonl"), files.COLOURS[::-1]
    verdict, reason = door(files.File("png", "image", files.whole()["png"].content, other))
    assert verdict == "wrong" and "levels off" in reason


def test_file_i_of_a_seed_is_always_the_same(fuzz):
    _, files = fuzz
    assert files.file(3, 77) == files.file(3, 77) != files.file(4, 77)
    assert zlib.decompress(files.zeros((3 << 20) + 17)) == bytes((3 << 20) + 17)


# --- what was found by it ---------------------------------------------------------------------------------------------


def encoded(image: Image.Image, form: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def test_each_format_is_known_to_pillow_under_its_name(tmp_path):
    for form in naflex.FORMATS:
        with pytest.raises(Image.UnidentifiedImageError):
            Image.open(io.BytesIO(b"nothing of that"), formats=[form])


def test_a_format_of_which_pillow_reads_a_part_only_is_no_bug_of_ours():
    strange = bytearray(encoded(Image.new("RGB", (8, 8)), "DDS"))
    strange[80:84] = (1 << 20).to_bytes(4, "little")  # pixels of a kind that Pillow raises NotImplementedError for
    with pytest.raises(UserError, match="not a picture"):
        naflex.load_image(bytes(strange))


def test_a_jpeg_that_goes_over_its_pixels_again_and_again(fuzz, monkeypatch):
    content = fuzz[1].scans(64, 50)
    assert naflex.load_image(content).size == (64, 64)
    monkeypatch.setattr(naflex, "MAX_SCANNED", 64 * 64 * 50)
    with pytest.raises(UserError, match="has 5[0-9] scans, which take minutes to decode"):
        naflex.load_image(content)
    naflex.load_image(encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True))


def test_a_conversion_in_strips_is_that_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(37, 20, 4), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(pixels[..., :2].copy(), "LA"),
              Image.fromarray(rng.integers(65536, size=(37, 20), dtype=np.uint16)),
              Image.fromarray(rng.random((37, 20), np.float32))]  # fmt: skip
    whole = [np.asarray(naflex.to_rgb(image)) for image in images]
    alpha = pixels[..., 3:] / 255
    np.testing.assert_allclose(whole[0], pixels[..., :3] * alpha + 255 * (1 - alpha), atol=1)
    monkeypatch.setattr(naflex, "_STRIP", 60)
    for image, want in zip(images, whole):
        np.testing.assert_array_equal(np.asarray(naflex.to_rgb(image)), want)
    few = Image.fromarray(pixels[..., :3].copy()).quantize(8)
    few.info["transparency"] = few.getpixel((3, 30))
    assert naflex.to_rgb(few).getpixel((3, 30)) == (255, 255, 255)


def test_numbers_that_are_none_do_not_colour_a_picture():
    values = np.full((4, 4), 0.5, np.float32)
    values[0, 0] = np.nan
    assert naflex.to_rgb(Image.fromarray(values)).getpixel((2, 2)) == (128, 128, 128)


def test_a_list_of_other_files_is_no_film(fuzz, tmp_path, monkeypatch):
    pytest.importorskip("av")
    (tmp_path / "a.mp4").write_bytes(fuzz[1].film())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="none of the forms that are read"):
        list(video.frame_groups(b"ffconcat version 1.0\nfile a.mp4\n"))


def test_a_film_whose_codec_nobody_knows(fuzz):
    pytest.importorskip("av")
    with pytest.raises(UserError, match="no pictures that can be decoded"):
        list(video.frame_groups(fuzz[1].film().replace(b"mp4v", b"zzzz").replace(b"esds", b"zzzz")))


def test_a_film_is_no_larger_and_no_longer_than_is_read(fuzz, monkeypatch):
    pytest.importorskip("av")
    content, sample = fuzz[1].film(), functools.partial(video.sampled, most=4)
    assert len(list(video.frame_groups(content, sample))) == 2
    monkeypatch.setattr(video, "MAX_FRAMES", 23)
    with pytest.raises(UserError, match="24 frames, more than the 23"):
        list(video.frame_groups(content, sample))
    with pytest.raises(UserError, match="more pixels or frames"):  # it does not say how many it has
        list(video.frame_groups(fuzz[1].film("matroska"), sample))
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 47)
    with pytest.raises(UserError, match="frames of 64x48 pixels; make them smaller"):
        list(video.frame_groups(content, sample))

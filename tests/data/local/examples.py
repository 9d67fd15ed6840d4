"""One small real record of each category of the report, and the files they come in. Shared by several tests.

Pictures are photographs that scikit-image bundles, emoji and charts of the shipped corpus, and what is drawn here;
texts are the repository's licence and facts told in our words.
"""

from __future__ import annotations

import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import charts, coordinates, emoji, fonts, photos
from glmv_jax.data.local.schema import CATEGORIES
from glmv_jax.data.questions import Questions

LICENCE = pathlib.Path(__file__).resolve().parents[3] / "LICENSE"
CIRCLE = '<svg viewBox="0 0 48 48"><circle cx="24" cy="24" r="16" fill="#1446dc"/></svg>'
CLICK = {"type": "function", "function": {
    "name": "click", "description": "Clicks at a point, 0 to 999.",
    "parameters": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}}}}  # fmt: skip


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def page(lines: list[str], size: tuple[int, int] = (320, 160)) -> Image.Image:
    sheet = Image.new("RGB", size, "white")
    for n, line in enumerate(lines):
        ImageDraw.Draw(sheet).text(
            (6, 6 + 16 * n), line, fill="black", font=fonts.load(fonts.files("train", "en")[0], 12)
        )
    return sheet


def window() -> tuple[Image.Image, tuple[int, int, int, int]]:
    """A window with one button and the button's box in pixels."""
    picture, box = Image.new("RGB", (96, 64), "#e6e6ea"), (56, 44, 88, 58)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, 96, 10), fill="#1446dc")
    pen.rounded_rectangle(box, 3, fill="#149632")
    pen.text((72, 51), "OK", fill="white", anchor="mm", font=fonts.load(fonts.files("train", "en")[0], 9))
    return picture, box


def film(
    seconds: float = 2.0, rate: int = 12, size: tuple[int, int] = (64, 48), texture: int = 0, codec: str = "mpeg4"
) -> bytes:
    """An MP4 in which a grey square becomes lighter, frame by frame; texture: how far its 4x4 blocks differ from it."""
    import av

    file, (width, height), rng = io.BytesIO(), size, np.random.default_rng(0)
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 4_000_000
        count = round(seconds * rate)
        for n in range(count):
            blocks = rng.integers(-texture, texture + 1, (height // 4, width // 4, 3)).repeat(4, 0).repeat(4, 1)
            frame = np.clip(30 + 200 * n // count + blocks, 0, 255).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def _stamp(name: str) -> Image.Image:
    """The emoji of that English name on white."""
    number = next(n for n, e in enumerate(emoji.load()) if e.name("en") == name)
    picture = Image.new("RGB", (48, 48), "white")
    emoji.paste(picture, emoji.stamp(number, 48), 0, 0)
    return picture


def records(folder: pathlib.Path) -> dict[str, dict]:
    """Category -> record, with their pictures written below the folder. Video: not where PyAV is not installed."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)

    def saved(name: str, image: Image.Image) -> dict:
        (pictures / f"{name}.png").write_bytes(png(image))
        return {"type": "image", "image": f"pictures/{name}.png"}

    def text(words: str, **more) -> dict:
        return {"type": "text", "text": words, **more}

    lines = [line.strip() for line in LICENCE.read_text().splitlines() if line.strip()][:8]
    button, box = window()
    x, y = coordinates.encode_point(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), *button.size)
    spatial, ground = (Questions((kind,), "train", 5)[0] for kind in ("spatial", "ground"))
    chart, kind, data = charts.draw(np.random.default_rng(0), "train", (96, 96))

    def asked(sample) -> dict:
        question = [saved(sample.source, sample.images[0]), text(sample.prompt)]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": sample.answer}]}

    made = {
        "world_knowledge": {"segments": [saved("cat", photos.load("chelsea.png")), text(
            "Chelsea the cat, a test photograph of scikit-image. Cats are kept for company and for catching mice.")]},
        "interleaved": {"segments": [
            text("A cat says miaow: "), saved("a", _stamp("cat")), text(" and a dog barks: "),
            saved("b", _stamp("dog")), text(" They seldom agree.")]},
        "ocr": {"segments": [saved("licence", page(lines)), text("\n".join(lines))]},
        "coding": {"segments": [saved("circle", _circle()), text(CIRCLE)]},
        "gui": {"tools": [CLICK], "messages": [
            {"role": "user", "content": [saved("window", button), text("Press OK.")]},
            {"role": "assistant", "reasoning_content": "The green button.", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "click", "arguments": json.dumps({"x": x, "y": y})}}]},
            {"role": "tool", "content": [saved("after", Image.new("RGB", (96, 64), "#e6e6ea")), text("ok")]},
            {"role": "assistant", "content": "Pressed."}]},
        "tool_use": {"tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}], "messages": [
            {"role": "user", "content": "What is 17 + 25?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"values": [17, 25]}}}]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
            {"role": "assistant", "content": "17 + 25 = 42."}]},
        "spatial": asked(spatial),
        "grounding": asked(ground),
        "academic": {"segments": [saved("chart", chart), text(f"Figure 1. {kind}: {data}. E = mc^2.", loss=0.5)]},
    }  # fmt: skip
    (pictures / "film.mp4").write_bytes(film())
    made["video"] = {"segments": [text("It becomes lighter: "), {"type": "video", "video": "pictures/film.mp4"}]}
    assert set(made) == set(CATEGORIES)
    return {name: {"id": f"{name}/1", "category": name, **record} for name, record in made.items()}


def _circle() -> Image.Image:
    picture = Image.new("RGB", (48, 48), "white")
    ImageDraw.Draw(picture).ellipse((8, 8, 40, 40), fill="#1446dc")
    return picture


def jsonl(path: pathlib.Path, lines: list) -> pathlib.Path:
    """Records, or lines as they are, as a file of one a line."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def tar(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    with tarfile.open(path, "w") as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path

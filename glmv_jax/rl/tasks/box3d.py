"""The box in space of a block on a floor, from a picture and its camera: nine numbers, metres and radians.

Meant for 64 x 48 pixels (48 patches of 8). The camera looks level from a known height, so the pixel where a block meets
the floor gives its distance, and the rest follows: the answer can be worked out from the picture with a ruler. Two
blocks of different colours at most; the answer is "[[x,y,z,sx,sy,sz,roll,pitch,yaw]]", see `rewards.solids`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from glmv_jax.data import drawing
from glmv_jax.data.questions import scene
from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, solids
from glmv_jax.rl.task import Task

CANVAS, OVERSAMPLE = (64, 48), 4
FOCAL, HEIGHT = 60, 1.6  # pixels; metres of the camera above the floor
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
PROMPTS = {
    "en": ("Camera: f {}, {} m high. 3D box of the {} block.", "3D box of the {2} block; camera f {0}, {1} m high."),
    "zh": ("相机：f {}，高{}米。{}方块的3D框。", "{2}方块的3D框；相机f {0}，高{1}米。"),
}
LEAST_TOP = 1.5  # pixels of height that the upper face is seen with: how deep a block is shows there
YAWS = {"train": 0.0, "heldout": 0.05}  # held-out blocks are turned by other angles: in steps of 0.1 from here
Box = tuple[float, ...]


def project(points_N3: np.ndarray) -> np.ndarray:
    """Camera coordinates -> pixels [N, 2], (0, 0) the upper left corner of the picture."""
    return FOCAL * points_N3[:, :2] / points_N3[:, 2:] + np.array(CANVAS) / 2


def block(rng: np.random.Generator, split: str) -> Box:
    """A block that stands on the floor, wholly in view and below the eye, numbers of at most two decimals."""
    while True:
        sx, sy, sz = (round(float(v), 1) for v in rng.uniform((0.6, 0.5, 0.6), (2.0, 1.2, 2.0)))
        x, z = round(float(rng.uniform(-2.5, 2.5)), 1), round(float(rng.uniform(3.2, 6.5)), 1)
        yaw = round(YAWS[split] + 0.1 * int(rng.integers(-7, 8)), 2)
        box = (x, round(HEIGHT - sy / 2, 2), z, sx, sy, sz, 0.0, 0.0, yaw)
        pixels_82 = project(solids.corners(box))
        inside = (pixels_82 >= 2).all() and (pixels_82 <= np.array(CANVAS) - 2).all()
        top_4 = pixels_82[[i for i in range(8) if not i & 2], 1]
        if inside and np.ptp(pixels_82, axis=0).min() >= 10 and np.ptp(top_4) >= LEAST_TOP:
            return box


def apart(a: Box, b: Box) -> bool:
    """Whether two blocks' pictures do not touch."""
    (low_a, high_a), (low_b, high_b) = ((p.min(0), p.max(0)) for p in (project(solids.corners(x)) for x in (a, b)))
    return bool((low_a > high_b + 1).any() or (low_b > high_a + 1).any())


def draw(blocks: list[tuple[Box, drawing.RGB]], split: str, rng: np.random.Generator) -> Image.Image:
    """Wall, floor with lines a metre apart, and the blocks, their faces shaded by where they look."""
    width, height = (side * OVERSAMPLE for side in CANVAS)
    wall = drawing.background(split, rng)
    picture = Image.new("RGB", (width, height), wall)
    pen = ImageDraw.Draw(picture)
    floor = tuple(int(0.86 * v) for v in wall)
    pen.rectangle((0, height // 2, width, height), fill=floor)
    scaled = lambda points_N3: [tuple(p) for p in (project(points_N3) * OVERSAMPLE).tolist()]  # noqa: E731
    for z in range(3, 11):
        line = np.array([[-9.0, HEIGHT, z], [9.0, HEIGHT, z]])
        pen.line(scaled(line), fill=tuple(int(0.93 * v) for v in floor), width=2)
    light = np.array([0.35, -0.8, -0.5])
    for box, rgb in sorted(blocks, key=lambda each: -each[0][2]):
        points = solids.corners(box)
        middle = points.mean(0)
        for face in solids.FACES:
            corners = points[list(face)]
            outward = corners.mean(0) - middle
            if outward @ corners.mean(0) < 0:  # it looks at the camera
                shade = 0.72 + 0.28 * float(outward @ light) / (np.linalg.norm(outward) * np.linalg.norm(light))
                ink = tuple(int(v * shade) for v in rgb)
                pen.polygon(scaled(corners), fill=ink, outline=tuple(int(0.6 * v) for v in ink))
    return picture.resize(CANVAS, Image.Resampling.BOX)


def written(box: Box) -> str:
    """The box as an answer: [[0.5,1.1,5,1,1,2,0,0,0.3]]."""
    return f"[[{','.join(f'{v:g}' for v in box)}]]"


def generate(rng: np.random.Generator, split: str) -> Sample:
    lang = scene.language(rng)
    boxes = [block(rng, split)]
    if rng.random() < 0.4:
        for other in (block(rng, split) for _ in range(20)):
            if apart(boxes[0], other):
                boxes.append(other)
                break
    colours = scene.distinct(rng, COLOURS, len(boxes))
    blocks = [(box, drawing.COLOURS[colour].shade(split, rng)) for box, colour in zip(boxes, colours)]
    picture = draw(blocks, split, rng)
    asked = drawing.COLOURS[colours[0]].names[lang]
    prompt = scene.choose(rng, PROMPTS[lang]).format(FOCAL, HEIGHT, asked)
    facts = {"camera": {"focal": FOCAL, "height": HEIGHT, "size": list(CANVAS)}, "others": [list(b) for b in boxes[1:]]}
    return scene.sample("box3d", picture, prompt, written(boxes[0]), lang, "box3d", **facts)


def misplaced(sample: Sample) -> list[str]:
    """The gold box among others, thrice, without angles, further off, too large, all of space, and other blocks."""
    golds: Any = solids.parse(sample.answer)
    (gold,) = golds
    inner = sample.answer[1:-1]
    far = (gold[0], gold[1], gold[2] + 1.5 * math.hypot(gold[3], gold[5]), *gold[3:])
    large = (*gold[:3], *(2 * v for v in gold[3:6]), *gold[6:])
    flat = (*gold[:3], 0.0, *gold[4:])
    several = ",".join(written((x, *gold[1:2], z, *gold[3:]))[1:-1] for x in (-2, 0, 2) for z in (4, 6, 8))
    return [f"[{inner},{several}]", f"[{inner},{inner},{inner}]", written(gold[:6]), written(gold[:6]) + "[0,0,0]",
            written(far), written(large), written(flat), "[[0,0,5,99,99,99,0,0,0]]", inner.strip("[]"),
            *(written(tuple(box)) for box in sample.meta["others"])]  # fmt: skip


TASKS = (Task("box3d", boxed(solids.boxes()), misplaced, make=generate, levels=levels.by_number("others", 1)),)

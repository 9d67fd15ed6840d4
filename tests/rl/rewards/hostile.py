"""Verifiers, renderers and comparators for the tests of the reward system; workers import them by name."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

from PIL import Image

from glmv_jax.rl.rewards.grade import Grade


def verdict(answer, sample):
    """Does what the answer says: a number is the reward, a word an accident."""
    if answer in ACCIDENTS:
        return ACCIDENTS[answer]()
    return Grade(float(answer), float(answer) == 1.0, {"score": float(answer)})


def loop():
    while True:
        pass


def tells_at_length():
    raise ValueError("x" * 10_000_000)


class Untellable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def untellable():
    raise Untellable


ACCIDENTS = {
    "raise": lambda: 1 / 0,
    "loop": loop,
    "sleep": lambda: time.sleep(60),
    "power": lambda: 7 ** (7 ** (7**7)),  # in C, holding the GIL
    "exit": lambda: sys.exit(0),
    "die": lambda: os._exit(3),
    "nan": lambda: Grade(math.nan, False, {}),
    "inf": lambda: Grade(math.inf, True, {}),
    "inner nan": lambda: Grade(0.5, False, {"score": math.nan}),
    "above": lambda: Grade(7.0, True, {}),
    "string": lambda: "1" * 100_000_000,
    "name": lambda: Grade(1.0, True, {"x" * 10_000_000: 1.0}),
    "flags": lambda: Grade(1.0, True, {}, ("f",) * 10_000_000),
    "none": lambda: None,
    "tell": tells_at_length,
    "untellable": untellable,
    "memory": lambda: len(bytes(3 * 2**30)),
    "closure": lambda: Grade(1.0, True, {}, (lambda: 0,)),
}


def imported(answer, sample):
    """1 when this process has imported a library that only trainers need, or was given pictures."""
    heavy = {"jax", "jaxlib", "flax", "grain", "httpx", "pytest", "math_verify"} & set(sys.modules)
    return Grade(float(bool(heavy)), not sample.images, {name: 1.0 for name in heavy})


def fixed(value):
    """Options -> a verifier."""
    return lambda answer, sample: Grade(value, value == 1.0, {"score": value})


def pid(*_):
    return os.getpid()


def child():
    return subprocess.Popen(["sleep", "60"]).pid


def nap(seconds):
    time.sleep(seconds)
    return seconds


def fails_to_build():
    raise ImportError("no such library")


def grey(text, sample):
    """Renders a number as a picture of that grey; "bad" is nothing that can be rendered, "raise" raises."""
    if text == "raise":
        raise ValueError("bad markup")
    return None if text == "bad" else Image.new("RGB", (4, 4), (int(text),) * 3)


def nearer(sample, a, b):
    """Scores pictures by how near their grey is to the gold answer's."""
    if "breaks" in (a.text, b.text):
        raise ValueError("comparator")
    near = lambda c: -abs(c.picture.getpixel((0, 0))[0] - int(sample.answer)) if c.picture else -abs(int(c.text))  # noqa: E731
    return near(a), near(b)


def parity(answer, sample):
    """Pays for texts of odd length, as no model does on purpose: some answers of a random one differ in it."""
    value = float(len(answer) % 2)
    return Grade(value, value == 1.0, {"format": 1.0, "score": value})


def loops(answer, sample):
    loop()


def longer(sample, a, b):
    return len(a.text), len(b.text)


def earns_and_says(sample, a, b):
    """A comparator of episodes: by what the environment gave, then by how much was said."""
    assert sample is None
    return tuple(100 * candidate.reward + len(candidate.text) for candidate in (a, b))


def says_more(sample, a, b):
    assert sample.source
    return len(a.text), len(b.text)

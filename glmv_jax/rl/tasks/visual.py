"""The eight visual tasks with exact answers: which rule grades each, and how a policy would try to cheat it."""

from __future__ import annotations

from glmv_jax.data.records import Sample
from glmv_jax.rl import levels
from glmv_jax.rl.rewards import boxed, geometry, text
from glmv_jax.rl.task import Task


def other_numbers(sample: Sample) -> list[str]:
    """Near misses, and a list that holds the number."""
    if text.parse_number(sample.answer) is None:
        return choices(sample)
    gold = float(sample.answer)
    return [f"{gold + 1:g}", f"{gold - 1:g}", f"{gold + 0.4:g}", f"{gold:g} {gold + 1:g}", f"-{gold:g}", f"{gold:g}e0"]


def choices(sample: Sample) -> list[str]:
    """All the choices at once, each separator, and every wrong one alone."""
    options = sample.meta.get("choices", [sample.answer, "x"])
    right = {text.normalise(t) for t in (sample.answer, *sample.meta.get("aliases", ()))}
    return [sep.join(options) for sep in (" ", ", ", "/")] + [o for o in options if text.normalise(o) not in right]


def misread(sample: Sample) -> list[str]:
    """The text many times over, backwards, and far too long."""
    return [sample.answer * 40, f"{sample.answer} " * 9, "x" * 400] + (
        [sample.answer[::-1]] if len(set(sample.answer)) == 2 and len(sample.answer) == 2 else []
    )


def showers(sample: Sample) -> list[str]:
    """The whole image, the gold box among many, the gold point, and an empty box on the gold centre."""
    x1, y1, x2, y2 = sample.meta["boxes"][0]
    grid = [f"[{x},{y},{x + 250},{y + 250}]" for x in range(0, 1000, 250) for y in range(0, 1000, 250)]
    point = f"{(x1 + x2) // 2},{(y1 + y2) // 2}"
    gold = sample.answer.strip("[]")
    return ["[[0,0,999,999]]", f"[{','.join(grid)}]", f"[[{gold}],{','.join(grid)}]", f"[[{point}]]",
            f"[[{point},{point}]]"]  # fmt: skip


def scattered(sample: Sample) -> list[str]:
    """The gold point among others, twice, as a box, and points outside the image."""
    gold = sample.answer.strip("[]")
    far = "0,0" if sample.meta["boxes"][0][0] > 500 else "999,999"
    return [f"[[{gold}],[{far}]]", f"[[{gold}],[{gold}]]", f"[[{gold},{gold}]]", "[[-1,-1]]", "[[1001,1001]]"]


TASKS = (
    Task("read", boxed(text.reading), misread, levels=levels.by_length(2)),
    Task("count", boxed(text.number()), other_numbers, levels=levels.by(lambda s: int(s.answer), 3, 5)),
    Task("name", boxed(text.exact), choices, levels=levels.by_kind("lang", "zh", "en")),
    Task("attribute", boxed(text.exact), choices),
    Task("spatial", boxed(text.exact), choices),
    Task("ground", boxed(geometry.boxes(threshold=0.5, graded=0.5)), showers, levels=levels.by_size(0.19, 0.12)),
    Task("point", boxed(geometry.point(reach=300.0, graded=0.3)), scattered, levels=levels.by_size(0.19, 0.12)),
    Task("chart", boxed(text.number()), other_numbers, levels=levels.by_number("values", 3)),
)

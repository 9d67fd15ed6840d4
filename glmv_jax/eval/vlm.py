"""Held-out accuracy by task with greedy answers, and the controls that say whether the image was looked at.

`shuffled`: every question gets the image of another question of its task, of the same size. `blind`: a grey image of
that size in its place (no image at all is a prompt that training never shows, and is answered with nonsense). A model
that reads images falls to the same low number under both. `sampled`: the answers are drawn at temperature 1, as
reinforcement learning draws them, one a question.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data import coordinates
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.chat import boxed, parse_answer
from glmv_jax.data.records import Sample
from glmv_jax.inference.batches import complete
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.requests import Prompt, Request
from glmv_jax.inference.text import answer_text
from glmv_jax.typing import Params

# (samples, answer texts) -> grades with `correct` and `reward`, e.g. rl.score with its verifiers bound.
Score = Callable[[Sequence[Sample], Sequence[str]], Sequence[Any]]


def answers(
    engine: Engine, params: Params, samples: Sequence[Sample], builder: DocumentBuilder, seed: int = 0, **settings: Any
) -> list[str]:
    """One answer text a sample, special tokens by name.

    settings: those of `inference.Request`, as max_new_tokens. seed counts only when the temperature is not 0.
    """
    prompts = (Prompt.of_document(builder.prompt(sample)) for sample in samples)
    done = complete(engine, params, (Request(prompt, seed, n, **settings) for n, prompt in enumerate(prompts)))
    return [answer_text(builder.tokenizer, x.tokens, engine.sampling.stop) for x in done]


def accuracy(samples: Sequence[Sample], texts: Sequence[str], score: Score, name: str = "accuracy") -> dict[str, float]:
    """Share of right answers by source, named "<name>/<source>", and "<name>/mean", the mean of the sources."""
    right: dict[str, list[bool]] = {}
    for sample, grade in zip(samples, score(samples, texts)):
        right.setdefault(sample.source, []).append(bool(grade.correct))
    shares = {f"{name}/{source}": float(np.mean(values)) for source, values in right.items()}
    return shares | {f"{name}/mean": float(np.mean(list(shares.values())))}


def best_constant(samples: Sequence[Sample], score: Score) -> dict[str, float]:
    """Accuracy, named as `accuracy` names it, of the best constant answer to each task and language: what a model may
    get that knows the task by heart and does not see. Chosen among the gold answers of these very samples, so it is
    rather too high."""
    groups: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        groups.setdefault(sample.source, {}).setdefault(sample.meta.get("lang", ""), []).append(sample)
    shares = {}
    for source, languages in groups.items():
        right = 0
        for group in languages.values():
            answers = {boxed(sample.answer) for sample in group}
            right += max(sum(grade.correct for grade in score(group, [text] * len(group))) for text in answers)
        shares[f"accuracy/{source}"] = right / sum(map(len, languages.values()))
    return shares | {"accuracy/mean": float(np.mean(list(shares.values())))}


def with_shuffled_images(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """The samples with their images exchanged among those of the same source and the same image sizes.

    No sample keeps its images. One that is alone in its group has no partner and is left out.
    """
    rng = np.random.default_rng(seed)
    groups: dict[tuple, list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.source, tuple(image.size for image in sample.images)), []).append(sample)
    shuffled = []
    for group in groups.values():
        if len(group) > 1 and group[0].images:
            order = [group[i] for i in rng.permutation(len(group))]
            # A step around a random circle: every image moves, and any partner is as likely as another.
            shuffled += [dataclasses.replace(a, images=b.images) for a, b in zip(order, order[1:] + order[:1])]
    return shuffled


def with_grey_images(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with images of one grey, each of the size of its own."""
    grey = lambda image: Image.new("RGB", image.size, (128, 128, 128))  # noqa: E731
    return [dataclasses.replace(sample, images=tuple(map(grey, sample.images))) for sample in samples]


def evaluate(
    engine: Engine,
    params: Params,
    samples: Sequence[Sample],
    builder: DocumentBuilder,
    score: Score,
    *,
    controls: bool = False,
    drawn: bool = False,
    **settings: Any,
) -> dict[str, float]:
    """accuracy/<source> and accuracy/mean of greedy answers; with `controls` also accuracy_shuffled/... and
    accuracy_blind/..., with `drawn` accuracy_sampled/.... settings: as of `answers`."""
    conditions = {"accuracy": (0.0, list(samples))}
    if drawn:
        conditions["accuracy_sampled"] = (1.0, list(samples))
    if controls:
        conditions["accuracy_shuffled"] = (0.0, with_shuffled_images(samples))
        conditions["accuracy_blind"] = (0.0, with_grey_images(samples))
    metrics: dict[str, float] = {}
    for name, (temperature, asked) in conditions.items():
        if asked:
            texts = answers(engine, params, asked, builder, temperature=temperature, **settings)
            metrics |= accuracy(asked, texts, score, name)
    return metrics


def write_samples(folder: pathlib.Path, samples: Sequence[Sample], texts: Sequence[str], score: Score) -> None:
    """samples.jsonl and a PNG each in `folder` (made if missing): question, answer, gold, verdict, boxes to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for sample, text, grade in zip(samples, texts, score(samples, texts)):
        line: dict[str, Any] = {
            "id": sample.id, "source": sample.source, "prompt": sample.prompt, "answer": parse_answer(text),
            "gold": sample.answer, "reward": float(grade.reward), "correct": bool(grade.correct),
            "boxes": _marks(sample, "gold", sample.answer) + _marks(sample, "model", parse_answer(text)),
        }  # fmt: skip
        if sample.images:
            line["image"] = sample.id.replace("/", "-") + ".png"
            sample.images[0].save(folder / line["image"])
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8", errors="replace")


def _marks(sample: Sample, role: str, text: str) -> list[dict[str, Any]]:
    """What to draw for an answer to a question that asks for a place."""
    if not sample.meta.get("boxes"):
        return []
    found = [{"role": role, "box": list(box)} for box in coordinates.parse_boxes(text)]
    return found + [{"role": role, "point": list(point)} for point in coordinates.parse_points(text)]

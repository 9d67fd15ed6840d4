"""The prompts of reinforcement learning: a seeded, resumable mixture of tasks that supervised training never saw."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import grain

from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.pipeline import Reading, prompt_batches, prompt_items


def namespaced(namespace: str, seed: int) -> int:
    """A seed of questions for (namespace, seed) that no plain seed below 2**32 equals."""
    return (1 << 32) + zlib.crc32(f"{namespace}/{seed}".encode())


def prompts(
    weights: Mapping[str, float],
    builder: DocumentBuilder,
    *,
    batch: int,
    seed: int = 0,
    namespace: str = "rl",
    split: str = "train",
    workers: int = 0,
    ahead: int = 0,
    faults: str | None = None,
) -> grain.DatasetIterator:
    """Batches of `data.pipeline.prompt_batches`, with get_state, set_state and close.

    weights: task name -> share of the mixture. faults: file that broken records are logged to (default: stderr).
    Stages that use other seeds or namespaces draw other questions; with
    the same ones they draw the same. Raises UserError for an unknown task.
    """
    reading = Reading(seed=seed, workers=workers, ahead=ahead, faults=faults)
    return prompt_batches(_sources(weights, split, namespace, seed), weights, builder, batch=batch, reading=reading)


def prompt_rows(
    weights: Mapping[str, float],
    builder: DocumentBuilder,
    *,
    seed: int = 0,
    namespace: str = "rl",
    split: str = "train",
    faults: str | None = None,
) -> grain.MapDataset:
    """Random access to the prompts of `prompts`, in the same order: a batch of one row each."""
    reading = Reading(seed=seed, faults=faults)
    return prompt_items(_sources(weights, split, namespace, seed), weights, builder, batch=1, reading=reading)


def level_rows(
    name: str,
    level: int,
    builder: DocumentBuilder,
    *,
    seed: int = 0,
    namespace: str = "rl",
    split: str = "train",
    faults: str | None = None,
) -> grain.MapDataset:
    """Random access to prompts of one level of a task (`rl.levels`): a batch of one row each."""
    from glmv_jax.rl import tasks

    source = {name: tasks.get(name).source(split, namespaced(namespace, seed), level)}
    return prompt_items(source, {name: 1.0}, builder, batch=1, reading=Reading(seed=seed, faults=faults))


def _sources(names: Iterable[str], split: str, namespace: str, seed: int) -> dict[str, Any]:
    from glmv_jax.rl import tasks  # with their graders, which the trainer does not import

    return {name: tasks.get(name).source(split, namespaced(namespace, seed)) for name in names}

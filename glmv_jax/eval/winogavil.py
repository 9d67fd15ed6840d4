"""WinoGAViL (arXiv 2207.12576): which of 5 to 12 pictures does a cue bring to mind? Each with as many as people chose.

The public data are no tars but a Hugging Face data set (nlphuji/winogavil, split test). Written to the layout of
`eval.folders`, with winogavil in dataset_type.txt, a sample is one instance:

    s0000000.json            {"cue": "...", "candidates": ["bison", ...], "associations": ["bison", ...]}
    s0000000.0.jpg, .1.jpg   pictures of the candidates, in their order

Scored as DataComp does (eval_utils/wino_eval.py): the pictures nearest to "A <cue>" or "An <cue>", Jaccard index with
those that people chose, mean over the instances of 10 and 12 candidates.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Instance:
    """cue: a word.   chosen: [candidates] bool, what people chose.   pictures: their files' extensions, in order."""

    cue: str
    chosen: np.ndarray
    pictures: tuple[str, ...]

    @property
    def prompt(self) -> str:
        cue = self.cue.lower()
        return f"An {cue}" if cue[0] in "aeiou" else f"A {cue}"


def instance(text: bytes, extensions: Sequence[str], images: Sequence[str]) -> Instance:
    """What the JSON of a sample and the extensions of its other files say. ValueError when they do not fit."""
    record = json.loads(text)
    candidates, associations = record["candidates"], record["associations"]
    chosen = np.isin(candidates, associations)
    found = [[f"{n}.{image}" for image in images if f"{n}.{image}" in extensions] for n in range(len(candidates))]
    if not all(found) or not chosen.any() or not record["cue"]:
        raise ValueError(f"{len(candidates)} candidates, {sum(map(bool, found))} pictures, {chosen.sum()} chosen")
    return Instance(record["cue"], chosen, tuple(files[0] for files in found))


def jaccard(instances: Sequence[Instance], picture_NE: np.ndarray, cue_NE: np.ndarray) -> dict[str, float]:
    """Mean Jaccard indices, over the instances of at most 6 and of at least 10 candidates and over all.

    picture_NE: unit embeddings of the pictures of all instances, one after the other; cue_NE: of the cues.
    """
    first, sizes, scores = 0, [], []
    for cue_E, asked in zip(cue_NE, instances):
        score = picture_NE[first : first + len(asked.chosen)] @ cue_E
        first += len(score)
        said = np.zeros(len(score), bool)
        said[np.argsort(score)[-asked.chosen.sum() :]] = True
        scores.append((said & asked.chosen).sum() / (said | asked.chosen).sum())
        sizes.append(len(score))
    parts = {"jaccard_10-12": np.array(sizes) >= 10, "jaccard_5-6": np.array(sizes) <= 6}
    parts = {name: float(np.array(scores)[part].mean()) for name, part in parts.items() if part.any()}
    return parts | {"jaccard": float(np.mean(scores))}

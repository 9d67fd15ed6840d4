"""Data sets on disk as CLIP benchmark writes them, made of the shipped emoji: real JPEG, PNG and WebP in real tars."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from glmv_jax.data import emoji

Files = dict[str, bytes]


def picture(index: int, ext: str = "jpg", seed: int = 0) -> Files:
    """A view of an emoji of the held-out part."""
    place = emoji.split("heldout")[index % len(emoji.split("heldout"))]
    image = emoji.augmented(place, np.random.default_rng([seed, index])).convert("RGB")
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[ext])
    return {ext: file.getvalue()}


def npy(values: Sequence[int]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


def write(root: Path, name: str, samples: Sequence[Files], split: str = "test", shards: int = 2, **texts: str) -> Path:
    """A data set of these samples, in `shards` tars, and its text files (their names without .txt)."""
    folder = root / name / split
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for n in range(shard, len(samples), shards):
                for ext, data in samples[n].items():
                    info = tarfile.TarInfo(f"s{n:07d}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "nshards.txt").write_text(f"{shards}\n")
    for file, text in texts.items():
        (root / name / f"{file}.txt").write_text(text)
    return root / name


def classification(
    root: Path, name: str, classes: int, each: int, facts: Callable[[int], Sequence[int]] | None = None, **more: str
) -> Path:
    """`each` views of `classes` emoji under their English names, in both splits."""
    for split, seed in (("train", 1), ("test", 2)):
        samples = []
        for n in range(classes * each):
            label = n % classes
            image = picture(label, ("jpg", "png", "webp")[n % 3], seed * 1000 + n)
            samples.append(image | {"cls": str(label).encode()} | ({"npy": npy(facts(n))} if facts else {}))
        write(root, name, samples, split)
    for file, text in {"classnames": "\n".join(names(classes)) + "\n", **more}.items():
        (root / name / f"{file}.txt").write_text(text)
    return root / name


def names(classes: int) -> list[str]:
    """English names of the emoji that `picture` shows."""
    pairs = emoji.Pairs("heldout")
    return [pairs[i].texts["en"][0] for i in range(classes)]


def suite(root: Path) -> Path:
    """A classification of two splits, a multilabel one, and retrieval with one to three captions an image."""
    classification(root, "wds_cars_test", 6, 4, zeroshot_classification_templates="a photo of a {c}.\nmy {c}!\n")
    many = [picture(n) | {"npy": npy([n % 3 == 0, n % 2 == 0, n % 5 == 0])} for n in range(20)]
    write(root, "voc2007_multilabel", many, dataset_type="multilabel\n", classnames="\n".join(names(3)))
    captions = ["\n".join(f"{name}, view {v}" for v in range(1 + n % 3)) for n, name in enumerate(names(18))]
    pairs = [picture(n, "webp") | {"txt": text.encode()} for n, text in enumerate(captions)]
    write(root, "flickr30k", pairs, dataset_type="retrieval")
    return root


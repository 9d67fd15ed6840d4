"""What does a plain two-tower model reach on stage 2's held-out concepts? The floor that the recipe has to beat.

A pre-norm ViT of 0.8M parameters on 64 px squares and a text transformer, learned positions, AdamW, batch 128, 800
steps from nothing, sigmoid loss; in PyTorch, written apart from the package. It reads the same corpus, the same
training concepts and the same held-out ones as experiments/cogvit_siglip.py, and prints one JSON line.

    python benchmarks/two_tower_floor.py [--steps 800] [--seeds 0 1 2] [--out benchmarks/results/two_tower_floor.json]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from contest import emit
from torch import nn

from glmv_jax.data import emoji, heldout, image_text
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.text_rows import SharedRows
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.eval import probes

WIDTH, DEPTH, HEADS, SIDE, PATCH, LENGTH = 128, 4, 4, 64, 8, 28
QUERIES = ("en name", "zh name", "zh name+keywords")


def transformer(depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(WIDTH), enable_nested_tensor=False)


class TwoTower(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.image_position = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.image = transformer(DEPTH)
        self.word = nn.Embedding(vocabulary, WIDTH)
        self.text_position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.text = transformer(2)
        self.project = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)])
        self.scale = nn.Parameter(torch.tensor(np.log(10.0), dtype=torch.float32))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def embed_image(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.image(self.patch(pixels).flatten(2).transpose(1, 2) + self.image_position)
        return F.normalize(self.project[0](x.mean(1)), dim=-1)

    def embed_text(self, tokens: torch.Tensor) -> torch.Tensor:
        pad = tokens == 0
        x = self.text(self.word(tokens) + self.text_position, src_key_padding_mask=pad)
        mean = (x * ~pad[..., None]).sum(1) / (~pad).sum(1, keepdim=True)
        return F.normalize(self.project[1](mean), dim=-1)


def pixels(picture) -> np.ndarray:
    square = np.asarray(picture.resize((SIDE, SIDE)), np.float32) / 127.5 - 1.0
    return square.transpose(2, 0, 1)


def batches(rows: SharedRows, batch: int, seed: int):
    """Images squeezed to squares; for each, one text in one of the languages, of the same kinds as stage 2's."""
    pairs, rng = emoji.Pairs("train", seed), np.random.default_rng(seed)
    concepts = len(pairs.indices)
    epoch = 0
    while True:
        order = rng.permutation(concepts)
        for start in range(0, concepts - batch + 1, batch):
            rows = [pairs[epoch * concepts + int(i)] for i in order[start : start + batch]]
            texts = []
            for pair in rows:
                lang = image_text.LANGUAGES[rng.integers(2)]
                kind = rng.choice(["name", "name+keywords", "keywords"], p=[0.3, 0.5, 0.2])
                texts.append(rows.fixed(image_text.pair_text(pair.texts[lang], str(kind), rng), LENGTH))
            yield np.stack([pixels(pair.image) for pair in rows]), np.stack(texts)
        epoch += 1


def run(steps: int, batch: int, seed: int) -> dict[str, Any]:
    """Trains one model and measures what it finds among the held-out concepts."""
    torch.manual_seed(seed)
    rows = SharedRows(Tokenizer())
    model = TwoTower(rows.vocabulary.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    began = time.monotonic()
    for step, (images, texts) in zip(range(steps), batches(rows, batch, seed)):
        image, text = model.embed_image(torch.tensor(images)), model.embed_text(torch.tensor(texts).long())
        logits = model.scale.exp() * image @ text.T + model.bias
        loss = (F.softplus(logits).sum() - logits.diagonal().sum()) / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"seed {seed} step {step} loss {loss.item():.3f} {time.monotonic() - began:.0f} s", flush=True)
    seconds = time.monotonic() - began

    model.eval()
    pairs = heldout.heldout_pairs(rows, Patcher(), LENGTH)
    with torch.no_grad():
        image = model.embed_image(torch.tensor(np.stack([pixels(p) for p in pairs.images]))).numpy()
        texts = {q: model.embed_text(torch.tensor(pairs.texts[q]).long()).numpy() for q in QUERIES}
    return {
        "seed": seed, "seconds": round(seconds, 1), "chance": probes.chance(pairs.concept),
        "recall": {q: probes.recall(probes.ranks(texts[q], image, pairs.concept)) for q in QUERIES},
        "vit_parameters": sum(p.numel() for m in (model.patch, model.image) for p in m.parameters()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", help="also write the JSON line there")
    args = parser.parse_args()
    record = {
        "benchmark": "two_tower_floor", "runs": [run(args.steps, args.batch, seed) for seed in args.seeds],
        "steps": args.steps, "batch": args.batch, "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)), "machine": platform.machine(),
    }  # fmt: skip
    emit(record, args.out)


if __name__ == "__main__":
    main()

"""A stage small enough to see through: a two-layer network learns a fixed random map. Run as a program it trains, and
can be told to send itself a signal at a step: `python -m tests.train.toy WORKDIR '{"steps": 12, "signal": [7, 9]}'`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from glmv_jax.train import main
from glmv_jax.train.stages.base import Stage

main.STAGES["toy"] = "tests.train.toy:Toy"


def config(**changes) -> ConfigDict:
    cfg = ConfigDict(
        dict(
            stage="toy", seed=0, steps=12, batch=16, width=8, init_from="", init_subtrees=(), mesh={"data": -1},
            rules="data", log_every=1, eval_every=0, save_every=4, keep=2, max_seconds=0.0, match_wall="",
            compilation_cache="", signal=(0, 0), lengths=(4,), end=10**9, poison=(),
            spikes=8.0, max_skipped=50, pause=0.0,  # seconds that a batch takes
            optim=dict(
                lr=0.1, clip=1.0, schedule=dict(warmup=2, decay="cosine", final=0.1),
                groups=((".*/bias", dict(kind="adamw", lr_mult=0.5)), (".*", dict(kind="adamw", wd=0.01))),
            ),
        )
    )  # fmt: skip
    with cfg.ignore_type():
        cfg.update(changes)
    return cfg


class Data:
    """Batch i is a function of (seed, i)."""

    def __init__(self, cfg):
        self.cfg, self.index, self.closed = cfg, 0, False

    def __next__(self):
        if self.index >= self.cfg.end:
            raise StopIteration
        rng = np.random.default_rng([self.cfg.seed, self.index])
        length = self.cfg.lengths[self.index % len(self.cfg.lengths)]
        x = rng.normal(size=(self.cfg.batch, length, 6)).astype(np.float32)
        if self.index in self.cfg.poison:
            x[0, 0, 0] = np.nan
        self.index += 1
        return {"x": x, "y": np.tanh(x.sum(-1, keepdims=True))}

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]

    def close(self):
        self.closed = True


class Toy(Stage):
    name = "toy"
    evaluations = 0  # over all instances of a test process

    def init_params(self, key):
        k1, k2 = jax.random.split(key)
        w = self.cfg.width
        return {
            "body": {"kernel": jax.random.normal(k1, (6, w)) * 0.3, "bias": jnp.zeros(w)},
            "head": {"kernel": jax.random.normal(k2, (w, 1)) * 0.3, "bias": jnp.zeros(1)},
        }

    def logical_axes(self):
        return {
            "body": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
            "head": {"kernel": ("mlp", "feature"), "bias": ("feature",)},
        }

    def constants(self):
        return {"one": jnp.ones(())}

    def init_extra(self):
        return {"seen": jnp.zeros(())}

    def loss(self, params, constants, extra, batch, key):
        noise = 0.01 * jax.random.normal(key, batch["y"].shape)
        with jax.named_scope("loss"):
            loss = jnp.mean(jnp.square(self.predict(params, batch["x"]) - batch["y"] + noise)) * constants["one"]
        return loss, ({"noise": noise.mean()}, {"seen": extra["seen"] + batch["x"].shape[0]})

    def predict(self, params, x):
        hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"])
        return hidden @ params["head"]["kernel"] + params["head"]["bias"]

    def train_data(self):
        self.data = Data(self.cfg)
        return self.data

    def next_batch(self, data, state):
        time.sleep(self.cfg.pause)
        batch = next(data)
        at, number = self.cfg.signal
        if data.index == at:
            os.kill(os.getpid(), number)
        return batch, {"host": float(data.index)}

    def counts(self, batch):
        return {"samples": len(batch["x"]), "tokens": batch["x"].shape[0] * batch["x"].shape[1]}

    def counts_by_source(self, batch):
        return {"up" if batch["y"].sum() > 0 else "down": self.counts(batch)}

    def flops(self, batch):
        return 100.0 * batch["x"].size

    def evaluate(self, params, extra, *, full):
        type(self).evaluations += 1
        x = np.random.default_rng(99).normal(size=(64, 4, 6)).astype(np.float32)
        error = self.predict(params, x) - np.tanh(x.sum(-1, keepdims=True))
        return {"error": float(jnp.mean(jnp.square(error))), "seen": float(extra["seen"])}

    def notes(self):
        return {"error": {"chance": 1.0, "note": "mean squared error"}}

    def write_samples(self, params, extra, folder: Path):
        (folder / "samples.jsonl").write_text('{"id": "toy"}\n')


if __name__ == "__main__":
    main.run(config(**json.loads(sys.argv[2])), sys.argv[1])

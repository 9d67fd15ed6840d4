"""A model that says what it is told to: real parameters of a real decoder, under which each token has one successor.

All layers add nothing, and the head looks for the embedding of the token that the successor belongs to. So the engine,
the tokenizer and the server are as they are, and the answer is known; no token of it may stand in it twice.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from glmv_jax.data.naflex import Patcher
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.front import Front
from glmv_jax.inference.settings import Settings
from glmv_jax.models import abstract_params
from glmv_jax.serving.answers import Answers
from glmv_jax.serving.app import Server
from glmv_jax.serving.limits import Limits
from glmv_jax.serving.main import Listener, listener
from glmv_jax.serving.metrics import Metrics
from glmv_jax.serving.model import Own
from tests import tiny_vlm

TOKENIZER = Tokenizer()
CFG = tiny_vlm.config(TOKENIZER.vocab_size)
NAME, KEY = "parrot", "open sesame"
SETTINGS = Settings(slots=4, length=512, steps=4, chunks=(64,), patches=(64,), pictures=64, queue=64,
                    likely=5, pixels=(24, "uint8"))  # fmt: skip
LIMITS = Limits(tokens=64, films=1)
TAGS = {name: i for name, i in TOKENIZER.special.items()}


def ids(*pieces: str | int) -> list[int]:
    """Token ids of an answer written down: special tokens by name, ids as they are, anything else as plain text."""
    return [i for p in pieces for i in ([p] if isinstance(p, int) else [TAGS[p]] if p in TAGS else TOKENIZER.encode(p))]


def call(name: str, **arguments: str) -> list[int]:
    """A tool call; of no more than one argument, as no token may come twice."""
    pairs = (("<arg_key>", k, "</arg_key>", "<arg_value>", v, "</arg_value>") for k, v in arguments.items())
    return ids("<tool_call>", name, *(x for pair in pairs for x in pair), "</tool_call>")


@functools.cache
def _table() -> np.ndarray:
    """Embeddings [V, W] of length one."""
    table = np.random.default_rng(0).normal(size=(CFG.decoder.vocab, CFG.decoder.width))
    return (table / np.linalg.norm(table, axis=1, keepdims=True)).astype(np.float32)


def params(said: Sequence[int], after: Sequence[int] = (TAGS["</think>"],)) -> dict:
    """Parameters that say this after one of the tokens `after`."""
    chain = [(before, said[0]) for before in after] + list(zip(said, said[1:]))
    assert len({before for before, _ in chain}) == len(chain), "a token of the answer comes twice"

    def leaf(path, x):
        full = np.zeros(x.shape, x.dtype)
        if path[-1].key == "scale":
            full += 1
        elif path[-1].key == "embedding":
            full += _table()
        elif path[-1].key == "head":
            for before, then in chain:
                full[:, then] += 10 * _table()[before]
        return full

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(CFG))


class Parrot:
    """The server of such a model, in threads of this process."""

    def __init__(self, limits: Limits, settings: Settings = SETTINGS, key: str = KEY) -> None:
        patcher = Patcher(patch=CFG.vision.patch, max_patches=64, frames=2)
        model = Own(TOKENIZER, patcher, film_frames=8, film_patches=16)
        engine = Engine(CFG, params(ids("<|endoftext|>")), model.sampling(limits.tokens), settings)
        engine.warm()
        self.engine, self.front = engine, Front(engine)
        self.answers = Answers(self.front, model, limits, Metrics())
        self.listener: Listener = listener(Server(self.answers, [NAME], key), "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.listener.run, name="listener")
        self.thread.start()
        while not self.listener.started:
            self.thread.join(0.01)
        port = self.listener.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def say(self, *pieces: str | int, after: Sequence[str] = ("</think>",)) -> list[int]:
        """From now on it says this, then stops unless the last token is one that stops. Returns the ids."""
        said = ids(*pieces)
        if said[-1] not in TOKENIZER.stops:
            said.append(TAGS["<|user|>"])
        self.front.set_params(params(said, [TAGS[name] for name in after]), self.engine.version + 1).result()
        return said

    def say_forever(self, text: str) -> None:
        """From now on it says these words over and over."""
        said = ids(text)
        tree = params([*said, said[0]])
        self.front.set_params(tree, self.engine.version + 1).result()

    def close(self) -> None:
        self.listener.should_exit = True
        self.thread.join()
        self.front.close()


@contextlib.contextmanager
def running(limits: Limits = LIMITS, **settings) -> Iterator[Parrot]:
    """A parrot, and nothing left of it."""
    parrot = Parrot(limits, **settings)
    try:
        yield parrot
    finally:
        parrot.close()

"""What do memory and time of a cross-entropy through the output head become when its logits are made in chunks?

Loss and gradients of hidden states and head, all logits at once against `losses.chunked` with several chunk sizes, in
one process, turn and turn about. Loss and gradients are compared before anything is timed. Prints one JSON line.

    python benchmarks/head_loss.py [--tokens 2048] [--width 128] [--vocab 4096] [--chunks 256 1024] [--dtype float32]

The defaults are a nano step of stage 3: 16 rows of 64 learnt tokens, for the main head and one draft. temporary MB is
what the compiler allocates beside arguments and results; --no-run compiles for the memory alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from contest import emit

from glmv_jax.losses.chunked import head_loss
from glmv_jax.losses.cross_entropy import cross_entropy
from glmv_jax.parallel.host import prepare_memory


def at_once(hidden, head, targets, weight):
    logits = jnp.einsum("btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return cross_entropy(logits, targets, weight, denominator=1.0).loss, jnp.argmax(logits, -1)


def in_chunks(chunk: int):
    def loss(hidden, head, targets, weight):
        out = head_loss(hidden, head, targets, weight, chunk=chunk)
        return out.total, out.said_BT

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtype", default="float32", help="of hidden states and products")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--out", help="also write the JSON line there")
    args = parser.parse_args()
    prepare_memory()

    rng = np.random.default_rng(0)
    T, D, V = args.tokens, args.width, args.vocab
    arrays = (
        jnp.asarray(rng.normal(size=(1, T, D)), args.dtype),
        jnp.asarray(rng.normal(size=(D, V)) * D**-0.5, jnp.float32),
        jnp.asarray(rng.integers(0, V, (1, T))),
        jnp.full((1, T), 1 / T, jnp.float32),
    )
    forms = {"at once": at_once, **{f"chunks of {c}": in_chunks(c) for c in args.chunks}}
    compiled = {
        name: jax.jit(jax.value_and_grad(form, argnums=(0, 1), has_aux=True)).lower(*arrays).compile()
        for name, form in forms.items()
    }
    rows = {name: {"temporary MB": round(c.memory_analysis().temp_size_in_bytes / 1e6, 1)}
            for name, c in compiled.items()}  # fmt: skip
    if not args.no_run:
        want = compiled["at once"](*arrays)
        rough = 1e-5 if args.dtype == "float32" else 2e-2
        for call in compiled.values():
            for a, b in zip(jax.tree.leaves(call(*arrays)), jax.tree.leaves(want), strict=True):
                a, b = (np.asarray(x, np.float64) for x in (a, b))
                assert np.linalg.norm(a - b) <= rough * np.linalg.norm(b)
        times: dict[str, list[float]] = {name: [] for name in compiled}
        for turn in range(args.repeats):
            for name in list(compiled)[:: 1 if turn % 2 else -1]:
                began = time.perf_counter()
                jax.block_until_ready(compiled[name](*arrays))
                times[name].append(1e3 * (time.perf_counter() - began))
        for name, taken in times.items():
            low, middle, high = statistics.quantiles(taken, n=4)
            rows[name] |= {"ms": round(middle, 1), "quartiles ms": [round(low, 1), round(high, 1)]}
    record = {"benchmark": "head_loss", "rows": rows, "tokens": T, "width": D, "vocab": V, "dtype": args.dtype,
              "repeats": 0 if args.no_run else args.repeats, "jax": jax.__version__,
              "device": jax.devices()[0].device_kind, "cores": os.cpu_count()}  # fmt: skip
    emit(record, args.out)


if __name__ == "__main__":
    main()

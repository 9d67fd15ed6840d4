"""What does the sigmoid loss of 8,192 to 65,536 pairs need on 8 to 256 TPU chips, and does the ring hide its transfers?

Compiled for TPU topologies on any x86 Linux machine with `pip install 'glmv_jax[tpu]'`; nothing is run. For each batch,
number of chips and implementation, loss and gradient: memory of a chip, and how many of its transfers are started and
only later waited for, with products in between. The n x B logits of a chip, which a dense form keeps, stand beside it.
Prints one JSON line.

    python benchmarks/sigmoid_loss.py [--family v5p] [--batches 8192 65536] [--chips 8 64 256] [--impls ring_bidir]

temporary MB is main memory (HBM); peak MB is everything, arguments, results and what lies in vector memory included.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.metadata import version

from contest import emit

from glmv_jax.aot import topology as topology_lib

topology_lib.described_only()  # before jax

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from glmv_jax.aot import costs, hlo  # noqa: E402
from glmv_jax.losses.negatives import IMPLEMENTATIONS  # noqa: E402
from glmv_jax.losses.sigmoid import sigmoid_loss  # noqa: E402
from glmv_jax.parallel.mesh import make_mesh  # noqa: E402

TOPOLOGIES = {
    "v5e": {8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v5p": {8: "2x2x2", 16: "4x2x2", 64: "4x4x4", 256: "8x8x4"},
}


def overlaps(text: str) -> dict[str, int]:
    """Of a scheduled program: transfers of arrays, those that are asynchronous, those with work before they are waited
    for; in a loop once."""
    moved = costs.transfers(costs.schedule(hlo.parse(text)), {})
    moved = [t for t in moved if t.operand > 1000]  # the sums of a few scalars don't count
    return {"transfers": len(moved), "asynchronous": sum(t.asynchronous for t in moved),
            "with work between": sum(t.hidden for t in moved)}  # fmt: skip


def row(topology: str, batch: int, chips: int, impl: str, width: int, chunk: int) -> dict:
    devices = topology_lib.parse(topology).devices
    mesh = make_mesh({"data": chips}, devices)
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    args = [jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=rows)] * 2 + [scalar, scalar]

    def loss(*a):
        return sigmoid_loss(*a, impl=impl, mesh=mesh, chunk=chunk)[0]

    began = time.monotonic()
    out = (everywhere, (rows, rows, everywhere, everywhere))
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), out_shardings=out)
    result = {"topology": topology, "batch": batch, "chips": chips, "impl": impl,
              "logits MB": batch // chips * batch * 4 / 1e6}  # fmt: skip
    try:
        compiled = step.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        return result | {"error": str(error).splitlines()[0][:200]}
    memory = compiled.memory_analysis()
    return result | {
        "temporary MB": round(memory.temp_size_in_bytes / 1e6, 1),
        "peak MB": round(memory.peak_memory_in_bytes / 1e6, 1), **overlaps(compiled.as_text()),
        "compile s": round(time.monotonic() - began, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8192, 16_384, 32_768, 65_536])
    parser.add_argument("--chips", type=int, nargs="+", default=[8, 64, 256], choices=TOPOLOGIES["v5e"])
    parser.add_argument("--impls", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    parser.add_argument("--family", default="v5e", choices=TOPOLOGIES)
    parser.add_argument("--width", type=int, default=1024, help="of the shared embedding")
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--out", help="also write the JSON line there")
    args = parser.parse_args()
    rows = []
    for batch in args.batches:
        for chips in args.chips:
            for impl in args.impls:
                topology = f"{args.family}:{TOPOLOGIES[args.family][chips]}"
                rows.append(row(topology, batch, chips, impl, args.width, args.chunk))
                print(rows[-1], file=sys.stderr, flush=True)
    record = {"benchmark": "sigmoid_loss", "kind": "compiled, not run", "rows": rows, "width": args.width,
              "chunk": args.chunk, "jax": jax.__version__, "libtpu": version("libtpu")}  # fmt: skip
    emit(record, args.out)


if __name__ == "__main__":
    main()

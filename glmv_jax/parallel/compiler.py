"""Options of XLA's compiler, by name: what training passes it, and `glmv compile` to be told the same program.

async: collectives begin early and are waited for late, where libtpu 0.0.42 by itself makes most work wait. Stage 1 of
the published size on v5p:8x8x8 has 72 % of its bytes moved so, and none without (benchmarks/results/compile).

wide: that, and a matrix that hundreds of devices split is gathered. By itself libtpu 0.0.42 sums zeros with one part in
them over all, which is twice the bytes, waits, and copies: three layers of 148 M parameters, read along 512 devices of
v5p:8x8x8, send 3.5 GB so and 5.3 else, half of it asynchronous and none else. Not in it, as the compiler aborts over
kernels that are split over the cores of a v5p: xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call.

sparse: wide, and collectives are moved by a chip's SparseCores, whose calls the compiler begins early whatever stands
around them: gathers in front of kernels, scattered and summed gradients. They are there on v5p, v6e and tpu7x, not on
v5e; on tpu7x the compiler does so by itself. A layer of 32 experts on v5p:2x2x2 has all of its bytes asynchronous.
"""

from __future__ import annotations

from collections.abc import Iterable

from glmv_jax.typing import UserError

_ASYNC = ("xla_tpu_enable_async_collective_fusion", "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
          "xla_tpu_enable_async_collective_fusion_multiple_steps", "xla_tpu_overlap_compute_collective_tc",
          "xla_enable_async_all_gather", "xla_tpu_enable_async_all_to_all",
          "xla_tpu_enable_async_ragged_all_to_all")  # fmt: skip
_WIDE = ("xla_tpu_prefer_async_allgather_to_allreduce",)
_SPARSE = tuple(f"xla_tpu_enable_sparse_core_collective_offload_{kind}"
                for kind in ("all_gather", "reduce_scatter", "all_reduce"))  # fmt: skip
SETS: dict[str, dict[str, str]] = {
    "none": {}, "async": dict.fromkeys(_ASYNC, "true"), "wide": dict.fromkeys((*_ASYNC, *_WIDE), "true"),
}  # fmt: skip
SETS["sparse"] = SETS["wide"] | dict.fromkeys(_SPARSE, "true")
SETS["sparse"]["xla_tpu_enable_async_collective_fusion_fuse_all_gather"] = "false"
BY_PLATFORM = {"tpu": ("async",)}  # what a config's xla="auto" is


def options(words: Iterable[str], platform: str = "tpu", where: str = "xla=") -> dict[str, str]:
    """{name: value} of words that are NAME=VALUE, the name of a set, or auto. UserError for others, said of `where`."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if name == "auto":
            found |= options(BY_PLATFORM.get(platform, ()), platform)
        elif not equals and name not in SETS:
            raise UserError(f"{where}{word}: write FLAG=VALUE, or the name of a set (auto, {', '.join(SETS)})")
        else:
            found |= {name: value} if equals else SETS[name]
    return found

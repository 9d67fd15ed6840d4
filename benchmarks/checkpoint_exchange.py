"""What do import and export of a public checkpoint hold in memory?

    python benchmarks/checkpoint_exchange.py [--size l] [--folder DIR]

size=l: GLM-OCR itself, bfloat16, random numbers, 2.2 GB; DIR takes three times as much for the time that it runs.
size=small: 24 layers, float32, 157 MB, with blocks of 1 MB instead of 64.
For each way the growth of the resident set at its peak, as Linux counts it (mapped files included), and seconds;
beside it the bytes of the largest tensor, of the largest group (one kind of tensor of all layers) and of the whole.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from glmv_jax.interop import arrays, families, folder
from glmv_jax.models import api
from glmv_jax.train import checkpoint, exchange
from glmv_jax.trees import flatten

# The contents of config.json. GLM-OCR's numbers are those of the released config; "small" is no released model.
TEXT = dict(num_hidden_layers=16, hidden_size=1536, intermediate_size=4608, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, vocab_size=59392, rms_norm_eps=1e-5,
            rope_parameters=dict(rope_theta=1e4, mrope_section=[16, 24, 24]))  # fmt: skip
VISION = dict(depth=24, hidden_size=1024, num_heads=16, intermediate_size=4096, patch_size=14, temporal_patch_size=2,
              in_channels=3, rms_norm_eps=1e-5, out_hidden_size=1536, spatial_merge_size=2)  # fmt: skip
SIZES = {
    "l": ("bfloat16", 1 << 26, TEXT, VISION),
    "small": (
        "float32", 1 << 20,
        TEXT | dict(num_hidden_layers=24, hidden_size=128, intermediate_size=4096, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=32, vocab_size=128,
                    rope_parameters=dict(rope_theta=1e4, mrope_section=[4, 6, 6])),
        VISION | dict(depth=2, hidden_size=32, num_heads=4, intermediate_size=64, patch_size=4, out_hidden_size=128),
    ),
}  # fmt: skip


class Random:
    """An array of random numbers that is made where it is asked for."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> None:
        self.shape, self.dtype, self._rng = shape, dtype, rng

    def __getitem__(self, place: tuple[int, ...]) -> np.ndarray:
        return self._rng.random(self.shape[len(place):], np.float32).astype(self.dtype)


def write(root: Path, hf: dict, dtype: str) -> dict[str, int]:
    """A checkpoint folder of random numbers; bytes of its largest tensor, of its largest group, and of all."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    cfg = families.model_config(hf, mtp_layers=1, dtype=dtype)
    rng, kept = np.random.default_rng(0), families.np_dtype(dtype)
    shapes = flatten(api.abstract_params(cfg))
    tensors = families.tensors_of(hf, cfg, {path: Random(x.shape, kept, rng) for path, x in shapes.items()})
    folder.write_tensors(root, tensors, shard_bytes=1 << 30 if dtype == "bfloat16" else 40_000_000)
    groups: dict[str, int] = {}
    sizes = [math.prod(one.shape) * kept.itemsize for one in tensors]
    for one, size in zip(tensors, sizes):
        groups[one.entry.theirs] = groups.get(one.entry.theirs, 0) + size
    return {"tensor": max(sizes), "group": max(groups.values()), "total": sum(sizes)}


def status(key: str) -> int:
    """Bytes of a line of this process' status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def measured(work: Callable[[], object]) -> dict[str, float]:
    """How far the resident set grew at its peak, and seconds."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before, start = status("VmRSS"), time.perf_counter()
    work()
    return {"peak": status("VmHWM") - before, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="l")
    parser.add_argument("--folder", help="where to work (default: the system's place for temporary files)")
    args = parser.parse_args()
    dtype, arrays.BLOCK_BYTES, text, vision = SIZES[args.size]
    hf = {"model_type": "glm_ocr", "text_config": text, "vision_config": vision}
    checkpoint.quiet_orbax()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        # What is loaded and set up once is not the question.
        _, _, text, vision = SIZES["small"]
        write(root / "warm", hf | {"text_config": text | {"num_hidden_layers": 1}, "vision_config": vision}, "float32")
        exchange.import_hf(root / "warm", root / "warm.ours")
        exchange.export_hf(root / "warm.ours", root / "warm.out")
        answer: dict[str, object] = {"size": args.size, **write(root / "in", hf, dtype)}
        answer["import"] = measured(lambda: exchange.import_hf(root / "in", root / "ours"))
        answer["export"] = measured(lambda: exchange.export_hf(root / "ours", root / "out"))
    print(json.dumps(answer | {"jax": jax.__version__, "python": platform.python_version()}))


if __name__ == "__main__":
    main()

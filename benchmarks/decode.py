"""How many tokens a second does our sampler write against transformers' `generate`?

GLM-OCR's text model with the same random weights on both sides, text prompts, greedy: the ids have to be equal first.
float32 on a CPU, bfloat16 on a GPU. Prints one JSON line: tokens/s of the steps after the first (a call for N tokens
less a call for one, so without the prompt, each the quickest of its turns), the same per second of processor time, of
whole calls, the ratios, and the share of a plain read of memory that the weights' bytes a second are.

    python benchmarks/decode.py [--size small] [--batch 1 8] [--new 64] [--prompt 32] [--out FILE]

small is the language model of size=nano (1.6M parameters, of the tables half; a step is all overhead), l GLM-OCR's true
text shapes (0.67B; a step is all reading of weights). Each side is a process of its own; they run in turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from typing import Any

import numpy as np
from contest import Contender, device, emit, environment, in_turns, log, serve, significant, spread

SIZES: dict[str, dict[str, Any]] = {
    "small": dict(
        vocab=4096, depth=4, width=128, heads=2, kv_heads=1, head_dim=64, mlp=352, rope_split=(8, 12, 12)
    ),
    "l": dict(vocab=59392, depth=16, width=1536, heads=16, kv_heads=8, head_dim=128, mlp=4608, rope_split=(16, 24, 24)),
}  # fmt: skip
PATIENCE = 600.0

Spec = dict[str, Any]


def prompts(spec: Spec, batch: int) -> np.ndarray:
    return np.random.default_rng(2).integers(1, SIZES[spec["size"]]["vocab"], (batch, spec["prompt"])).astype(np.int32)


def model(spec: Spec):
    """Our config; its vision part is as small as can be, as no image is shown."""
    from glmv_jax.models import CogViTConfig, DecoderConfig, MergerConfig, VLMConfig

    text = DecoderConfig(**SIZES[spec["size"]], dtype=spec["dtype"])
    return VLMConfig(CogViTConfig(depth=1, width=32, heads=2, mlp=48, patch=2), MergerConfig(32, text.width, 48), text)


def entries(cfg: Any) -> list:
    from glmv_jax.interop import glm_ocr

    return [entry for entry in glm_ocr.table(cfg) if entry.ours[0].startswith("decoder/")]


def write_weights(spec: Spec, file: str) -> dict[str, float]:
    """Random parameters under transformers' names; returns how many there are, and how many a step reads."""
    from safetensors.numpy import save_file

    from glmv_jax.interop.table import to_tensors
    from glmv_jax.models import abstract_params
    from glmv_jax.trees import flatten, nest

    cfg, rng = model(spec), np.random.default_rng(1)
    params: dict[str, Any] = {}
    shapes = flatten(abstract_params(cfg.decoder))
    for path, like in shapes.items():
        leaf = path.rpartition("/")[2]
        x = rng.standard_normal(like.shape, np.float32)
        x = 1 + 0.1 * x if leaf == "scale" else x * like.shape[-2] ** -0.5 if leaf != "embedding" else x
        params[f"decoder/{path}"] = x
    save_file(to_tensors(entries(cfg), nest(params)), file)
    total = sum(like.size for like in shapes.values())
    return {"parameters": total, "read": total - cfg.decoder.vocab * cfg.decoder.width}


class Clock:
    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def seconds(self) -> tuple[float, float]:
        return time.perf_counter() - self._began[0], time.process_time() - self._began[1]


class Ours:
    def __init__(self, spec: Spec) -> None:
        import jax
        from safetensors.numpy import load_file

        from glmv_jax.interop.table import to_params
        from glmv_jax.parallel.host import prepare_memory

        prepare_memory()  # as `glmv train` does before anything else
        self.jax, self.spec, self.cfg = jax, spec, model(spec)
        self._params = jax.device_put(to_params(entries(self.cfg), load_file(spec["weights"])))
        self._samplers: dict[int, Any] = {}

    def device(self) -> str:
        return self.jax.devices()[0].device_kind

    def generate(self, batch: int, new: int) -> tuple[float, float, list]:
        """Seconds of a call, on the clock and of processors (of all threads together), and the ids [B, new]."""
        import jax.numpy as jnp

        from glmv_jax.inference import Prompts, Sampler, Sampling

        if new not in self._samplers:
            self._samplers[new] = Sampler(self.cfg, Sampling(new, temperature=0.0))
        tokens, T = prompts(self.spec, batch), self.spec["prompt"]
        positions = jnp.broadcast_to(jnp.arange(T)[None, :, None], (batch, T, 3))
        full = jnp.full(batch, T, jnp.int32)
        rows = Prompts(None, jnp.asarray(tokens), positions, -jnp.ones_like(tokens), full, full)
        clock = Clock()
        ids = np.asarray(self._samplers[new](self._params, rows, self.jax.random.key(0)).tokens)
        return *clock.seconds(), ids.tolist()

    def reading(self, megabytes: int, seconds: float) -> float:
        """Bytes/s of a sum over an array, the best of its repetitions."""
        x = self.jax.numpy.ones(megabytes * 250_000, "float32")
        total = self.jax.jit(lambda x: x.reshape(2, -1).sum(axis=1))
        total(x).block_until_ready()
        best, end = 0.0, time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.perf_counter()
            total(x).block_until_ready()
            best = max(best, x.nbytes / (time.perf_counter() - began))
        return best


class HF:
    def __init__(self, spec: Spec) -> None:
        import torch
        from safetensors.torch import load_file
        from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

        torch.set_num_threads(spec["threads"])
        self.torch, self.spec = torch, spec
        self.place = torch.device(spec["device"])
        size = SIZES[spec["size"]]
        rope = dict(
            rope_type="default", rope_theta=1e4, mrope_section=list(size["rope_split"]), partial_rotary_factor=1.0
        )
        config = GlmOcrConfig(
            text_config=dict(
                vocab_size=size["vocab"], hidden_size=size["width"], intermediate_size=size["mlp"],
                num_hidden_layers=size["depth"], num_attention_heads=size["heads"], head_dim=size["head_dim"],
                num_key_value_heads=size["kv_heads"], rope_parameters=rope, pad_token_id=0, eos_token_id=None,
            ),
            vision_config=dict(
                depth=1, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=size["width"],
                patch_size=4, image_size=32,
            ),
        )  # fmt: skip
        self.model = GlmOcrForConditionalGeneration(config).eval()
        missing, foreign = self.model.load_state_dict(load_file(spec["weights"]), strict=False)
        if foreign or [name for name in missing if "visual" not in name]:
            raise ValueError(f"weights do not meet the model: {foreign} {missing}")
        self.model.to(self.place, getattr(torch, spec["dtype"]))
        self.model.generation_config.eos_token_id = None

    def generate(self, batch: int, new: int) -> tuple[float, float, list]:
        torch = self.torch
        ids = torch.tensor(prompts(self.spec, batch), dtype=torch.long, device=self.place)
        mask = torch.ones_like(ids)
        clock = Clock()
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new
            )
        said = out[:, ids.shape[1] :].cpu().numpy()
        return *clock.seconds(), said.tolist()


def contender(spec: Spec, on_gpu: bool) -> Contender:
    env = {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if spec["name"] == "ours":
        env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": "cuda" if on_gpu else "cpu"}
    cores = sorted(os.sched_getaffinity(0))
    return Contender(__file__, spec | {"cores": cores if on_gpu else cores[: spec["threads"]]}, env)


def compare(sides: dict[str, Contender], batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Ids first, then turns: each a call for one token and a call for all."""
    ids = {name: side.ask("generate", PATIENCE, batch=batch, new=args.new)[-1] for name, side in sides.items()}
    same = np.array(ids["ours"]) == np.array(ids["hf"])
    row: dict[str, Any] = {"batch": batch, "ids equal": bool(same.all()), "equal ids": float(same.mean())}
    if not same.all() and args.device == "cpu":
        raise SystemExit(f"decode.py: the sides differ ({same.mean():.3f} of the ids agree); nothing was timed")

    def turn(side: Contender) -> list[list[float]]:
        """Wall and processor seconds of a call for one token, and of one for all."""
        return [side.ask("generate", PATIENCE, batch=batch, new=new)[:2] for new in (1, args.new)]

    for side in sides.values():
        turn(side)  # the program for one token is compiled here
    runs = {name: functools.partial(turn, side) for name, side in sides.items()}
    times = {name: np.array(turns) for name, turns in in_turns(runs, args.rounds, args.seconds).items()}  # [n, 2, 2]
    for clock, what in enumerate(("second", "processor second")):
        quickest = {name: x[..., clock].min(axis=0) for name, x in times.items()}
        steps = {name: batch * (args.new - 1) / (whole - one) for name, (one, whole) in quickest.items()}
        row[f"steps: tokens a {what}"] = {name: significant(rate) for name, rate in steps.items()}
        row[f"steps: ours / hf, a {what}"] = significant(steps["ours"] / steps["hf"], 3)
    calls = {name: batch * args.new / x[:, 1, 0] for name, x in times.items()}
    row["calls: tokens a second"] = {name: spread(rates) for name, rates in calls.items()}
    row["calls: ours / hf"] = significant(np.median(calls["ours"]) / np.median(calls["hf"]), 3)
    return row


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--seconds", type=float, default=120.0, help="a batch's turns end after this")
    parser.add_argument("--threads", type=int, default=cores, help="of each side, on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--out", help="also write the JSON line there")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        spec = json.loads(args.contender)
        serve(Ours if spec["name"] == "ours" else HF, spec)
    args.device = device(args.device)
    on_gpu = args.device == "cuda"
    base = dict(
        size=args.size, prompt=args.prompt, threads=args.threads, device=args.device,
        dtype="bfloat16" if on_gpu else "float32",
    )  # fmt: skip
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this process, which makes the weights
    with tempfile.TemporaryDirectory() as folder:
        base["weights"] = os.path.join(folder, "weights.safetensors")
        count = write_weights(base, base["weights"])
        sides = {name: contender(base | {"name": name}, on_gpu) for name in ("ours", "hf")}
        rows = []
        for batch in args.batch:
            rows.append(compare(sides, batch, args))
            log(rows[-1])
        reading = sides["ours"].ask("reading", PATIENCE, megabytes=1000, seconds=3.0)
        kind = sides["ours"].ask("device", PATIENCE)
        for side in sides.values():
            side.close()
    bytes_a_step = count["read"] * (2 if on_gpu else 4)
    for row in rows:
        best = row["steps: tokens a second"]["ours"] / row["batch"]
        row["weights read, share of a plain read of memory"] = significant(best * bytes_a_step / reading, 3)
    record = {
        "benchmark": "decode",
        "new": args.new,
        **{k: base[k] for k in base if k != "weights"},
        "device kind": kind,
    }
    emit(record | count | {"memory GB/s": significant(reading / 1e9, 3), "rows": rows, **environment()}, args.out)


if __name__ == "__main__":
    main()

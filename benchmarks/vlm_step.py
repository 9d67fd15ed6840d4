"""How fast is a training step of GLM-OCR, encoder and decoder, against transformers' own, and in what memory?

Rows of one picture and text after it. Forward, backward and AdamW on all parameters, the loss being the cross entropy
of the text's next tokens: float32 on a CPU, bfloat16 with float32 parameters on a GPU (torch: autocast). The weights
are the same, written by transformers and read through our tables; losses of the first steps have to agree. Prints one
JSON line: tokens/s (those of pictures counted), the most memory there was, model TFLOP/s, for us and each peer, and the
ratios (tokens/s above 1: ours is faster; memory below 1: ours needs less).

    python benchmarks/vlm_step.py [--size l] [--batch 4] [--length 2048] [--side 32] [--peers hf hf-compiled]

l has GLM-OCR's true shapes (1.1 B); s the same with a few narrow layers, for a try on a CPU. --side: of a picture, in
patches. Peers: hf is transformers with scaled-dot-product attention as shipped, hf-recompute with its activations
recomputed (`gradient_checkpointing_enable`), hf-compiled under torch.compile. Ours recomputes what --remat says and
takes the loss through the head in chunks, as training does. Each side is a process of its own; they run in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from contest import Contender, Failed, device, emit, environment, in_turns, log, save, serve, significant, spread
from steps import TOLERANCE, OnJax, OnTorch, Spec

IMAGE = 4  # a token that no text has
ADAM = dict(lr=1e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01)
TEXT = dict(
    l=dict(vocab_size=59392, hidden_size=1536, intermediate_size=4608, num_hidden_layers=16, num_attention_heads=16,
           num_key_value_heads=8, head_dim=128),
    s=dict(vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=2, head_dim=32),
)  # fmt: skip
VISION = dict(
    l=dict(depth=24, hidden_size=1024, num_heads=16, intermediate_size=4096, out_hidden_size=1536),
    s=dict(depth=2, hidden_size=64, num_heads=2, intermediate_size=128, out_hidden_size=128),
)
PATIENCE = 900.0


def hf_config(size: str) -> Any:
    from transformers import GlmOcrConfig

    section = [4, 6, 6] if size == "s" else [16, 24, 24]
    rope = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0, mrope_section=section)
    text = TEXT[size] | dict(max_position_embeddings=8192, pad_token_id=0, rope_parameters=rope)
    vision = VISION[size] | dict(patch_size=14, temporal_patch_size=2, spatial_merge_size=2, image_size=336)
    return GlmOcrConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=5)


def rows(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """tokens [B, T], a picture's first, and patches [B, P, C]."""
    rng, merged = np.random.default_rng(0), spec["side"] ** 2 // 4
    tokens = rng.integers(8, TEXT[spec["size"]]["vocab_size"], (spec["batch"], spec["length"]))
    tokens[:, :merged] = IMAGE
    return tokens, rng.standard_normal((spec["batch"], spec["side"] ** 2, 3 * 2 * 14**2), np.float32)


class Ours(OnJax):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        import jax
        import jax.numpy as jnp

        from glmv_jax.data.naflex import grid_coordinates
        from glmv_jax.data.packing import rope_positions
        from glmv_jax.interop import folder, glm_ocr
        from glmv_jax.interop.table import to_params
        from glmv_jax.losses.chunked import head_loss
        from glmv_jax.models import vlm
        from glmv_jax.typing import TokenInput, VisionInput

        where = Path(spec["weights"])
        cfg = self.policies(glm_ocr.config(folder.read_config(where)))
        params = jax.device_put(to_params(glm_ocr.table(cfg), dict(folder.Tensors(where).items())))
        tokens, patches = rows(spec)
        (B, T), side, merged = tokens.shape, spec["side"], spec["side"] ** 2 // 4
        picture = np.where(np.arange(T) < merged, 0, -1)
        positions, _ = rope_positions(picture, [(side // 2, side // 2)])
        each = lambda x: jnp.broadcast_to(jnp.asarray(x), (B, *x.shape))  # noqa: E731
        vision = VisionInput(
            jnp.asarray(patches), each(grid_coordinates(side, side)), jnp.ones((B, side**2), jnp.int32)
        )
        row = each(np.where(picture < 0, -1, np.arange(T)).astype(np.int32))
        ids = jnp.asarray(tokens, jnp.int32)
        text = TokenInput(ids, each(positions.astype(np.int32)), jnp.ones((B, T), jnp.int32), row)
        weight_BT = each((np.arange(1, T) >= merged) / (B * (T - merged)))

        def loss_fn(params):
            hidden = vlm.apply(cfg, params, vision, text).hidden[:, :-1]
            return head_loss(hidden, vlm.head(cfg, params), ids[:, 1:], weight_BT).total

        self.learn(loss_fn, params, ADAM)
        self._flops = 3 * cfg.flops(B * T, T / 2, B, side**2)

    def policies(self, whole: Any) -> Any:
        """Without the MTP layer, which transformers drops, in the dtype and with the policies asked for."""
        spec = self.spec
        dtype = dict(dtype=spec["dtype"])
        return dataclasses.replace(
            whole, mtp=None,
            vision=dataclasses.replace(whole.vision, remat=spec["remat"], **dtype),
            merger=dataclasses.replace(whole.merger, **dtype),
            decoder=dataclasses.replace(
                whole.decoder, remat=spec["remat"], unroll=spec["unroll"] or whole.decoder.depth, **dtype
            ),
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        """The device, the FLOPs of a step, and GB: the most there was on a GPU, temporary memory on a CPU."""
        peak = self.memory() or self._step.memory_analysis().temp_size_in_bytes / 1e9
        return {"device": self.jax.devices()[0].device_kind, "flops": self._flops, "memory": peak}


class Theirs(OnTorch):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        import torch
        from transformers import GlmOcrForConditionalGeneration

        self.model = GlmOcrForConditionalGeneration.from_pretrained(
            spec["weights"], attn_implementation="sdpa", dtype=torch.float32
        )
        self.model = self.model.to(self.place).train()
        if spec["name"].endswith("-recompute"):
            self.model.gradient_checkpointing_enable()
        tokens, patches = (torch.tensor(x, device=self.place) for x in rows(spec))
        side = spec["side"]
        self.given = dict(
            input_ids=tokens, labels=torch.where(tokens == IMAGE, -100, tokens), use_cache=False,
            pixel_values=patches.flatten(0, 1), mm_token_type_ids=(tokens == IMAGE).int(),
            image_grid_thw=torch.tensor([[1, side, side]] * len(tokens), device=self.place),
        )  # fmt: skip
        self.run = torch.compile(self.model) if spec["name"].endswith("-compiled") else self.model
        self.learn(ADAM)

    def loss(self):
        with self.half():
            return self.run(**self.given).loss

    def about(self) -> dict[str, Any]:
        return {"memory": self.memory()}


def contender(spec: Spec) -> Contender:
    env = {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
    if spec["name"] == "ours":
        env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": spec["device"]}
    return Contender(__file__, spec, env)


def contest(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    from transformers import GlmOcrForConditionalGeneration

    GlmOcrForConditionalGeneration(hf_config(args.size)).save_pretrained(folder)
    names = ("size", "batch", "length", "side", "remat", "unroll", "checked", "threads")
    base = {name: getattr(args, name) for name in names} | {
        "device": args.device, "weights": folder, "dtype": "bfloat16" if args.device == "cuda" else "float32"
    }  # fmt: skip
    ours = contender(base | {"name": "ours"})
    own = ours.ask("prepare", PATIENCE)
    record = {"benchmark": "vlm_step", **base, "ours": own | ours.ask("about", PATIENCE), "peers": {}, "failed": {}}
    record.pop("weights")
    log("ours", record["ours"])
    for name in args.peers:
        try:
            record["peers"][name] = against(args, ours, contender(base | {"name": name}), record["ours"])
            log(name, record["peers"][name])
        except Failed as failure:
            record["failed"][name] = str(failure)
            log("failed", failure)
        save(record, args.out)  # what is known, should anything end us
    ours.close()
    return record | environment()


def against(args: argparse.Namespace, ours: Contender, peer: Contender, own: dict[str, Any]) -> dict[str, Any]:
    try:
        theirs = peer.ask("prepare", PATIENCE)
        dtype = "bfloat16" if args.device == "cuda" else "float32"
        if not np.allclose(theirs["losses"], own["losses"], rtol=TOLERANCE[dtype], atol=0):
            raise Failed(f"{peer.name}: other losses, {theirs['losses']}, than ours, {own['losses']}")
        turn = dict(steps=args.steps, warm=args.warm)
        runs = {side.name: functools.partial(side.ask, "turn", PATIENCE, **turn) for side in (ours, peer)}
        turns = in_turns(runs, args.rounds, args.seconds)
        seconds = {name: [clock for clock, _ in found] for name, found in turns.items()}
        rate = {name: [args.batch * args.length / s for s in found] for name, found in seconds.items()}
        memory = peer.ask("about", PATIENCE)["memory"]
        ratio = statistics.median(rate["ours"]) / statistics.median(rate[peer.name])
        tera = own["flops"] / statistics.median(seconds["ours"]) / 1e12
        return {
            "losses": theirs["losses"], "ours tokens/s": spread(rate["ours"]), "tokens/s": spread(rate[peer.name]),
            "ours / peer": significant(ratio, 3), "ours model TFLOP/s": significant(tera, 3), "memory GB": memory,
            "memory, ours / peer": significant(own["memory"] / memory, 3) if memory else None,
        }  # fmt: skip
    finally:
        peer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=TEXT, default="l")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row, the picture's among them")
    parser.add_argument("--side", type=int, default=32, help="of a picture, in patches")
    parser.add_argument("--peers", nargs="+", default=["hf", "hf-compiled"],
                        choices=("hf", "hf-recompute", "hf-compiled"))  # fmt: skip
    parser.add_argument("--remat", default="none", help="ours, of encoder and decoder: a policy of parallel.remat")
    parser.add_argument("--unroll", type=int, default=0, help="ours: layers a turn of the loop over them, 0: all")
    parser.add_argument("--checked", type=int, default=3, help="first steps whose losses are compared")
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120.0, help="of turns with one peer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--out", help="also write the JSON line there")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        spec = json.loads(args.contender)
        serve(Ours if spec["name"] == "ours" else Theirs, spec)
    args.device = device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        emit(contest(args, folder), args.out)


if __name__ == "__main__":
    main()

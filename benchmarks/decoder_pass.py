"""How fast are a forward pass and its gradient of the language models against transformers' own?

Text through the decoder to logits, float32, the same weights (written by transformers' save_pretrained, read through
our tables) and tokens. The loss is the cross entropy of the next token, ours as in training (losses/chunked.py), theirs
over all logits. Prints one JSON line: seconds of the forward pass and of loss and gradient for us and each peer, and
ours / peer (below 1: ours is faster).

    python benchmarks/decoder_pass.py [--model glm_moe_dsa_small] [--peers hf hf-grouped] [--out FILE]

Models: glm_ocr (the text model at its true shapes, 0.66 B), glm_ocr_small, glm_moe_dsa_small. Peers: hf is transformers
with scaled-dot-product attention as shipped; hf-grouped and hf-batched the same with the experts_implementation of that
name. Each side is a process of its own; they run in turns. Logits have to agree to 2e-4 and losses to 1e-5 before
anything is timed. With an indexer nine tenths of the positions have to, and losses to 1e-4: where two keys score alike
to rounding, the two sides choose different ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from contest import Contender, Failed, emit, environment, in_turns, log, serve, significant, spread

ROPE = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0)
TEXT = dict(
    glm_ocr=dict(
        vocab_size=59392, hidden_size=1536, intermediate_size=4608, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, pad_token_id=0,
        rope_parameters=ROPE | dict(mrope_section=[16, 24, 24]),
    ),
    glm_ocr_small=dict(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=4096, pad_token_id=0,
        rope_parameters=ROPE | dict(mrope_section=[4, 6, 6]),
    ),
    glm_moe_dsa_small=dict(
        vocab_size=4096, hidden_size=256, intermediate_size=768, moe_intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8, n_routed_experts=16, num_experts_per_tok=4, kv_lora_rank=64,
        q_lora_rank=128, qk_rope_head_dim=16, v_head_dim=32, qk_nope_head_dim=32, index_topk=128, index_head_dim=32,
        index_n_heads=16, first_k_dense_replace=1, max_position_embeddings=4096,
    ),
)  # fmt: skip
SHAPES = {"glm_ocr": (1, 256), "glm_ocr_small": (4, 512), "glm_moe_dsa_small": (4, 512)}
PEERS = ("hf", "hf-grouped", "hf-batched")
PATIENCE = 900.0


def tokens(spec: dict[str, Any]) -> np.ndarray:
    """[B, T] int."""
    return np.random.default_rng(0).integers(1, TEXT[spec["model"]]["vocab_size"], SHAPES[spec["model"]])


class Side:
    """A subclass has forward() -> logits and gradient() -> loss, both waited for."""

    def prepare(self) -> dict[str, Any]:
        """Runs both once; what they say is compared."""
        began = time.monotonic()
        logits, loss = np.asarray(self.forward()), float(self.gradient())
        np.save(Path(self.spec["folder"]) / f"{self.spec['name']}.npy", logits[..., ::5])
        return {"loss": loss, "seconds": time.monotonic() - began}

    def turn(self, what: str, times: int) -> float:
        """Seconds of one run, the mean of `times`."""
        run = getattr(self, what)
        began = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - began) / times


class Theirs(Side):
    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(spec["threads"])
        torch.manual_seed(0)
        self.torch, self.spec, sizes = torch, spec, TEXT[spec["model"]]
        more: dict[str, Any] = {"attn_implementation": "sdpa"}
        if "-" in spec["name"]:
            more["experts_implementation"] = spec["name"].partition("-")[2] + "_mm"
        if spec["model"].startswith("glm_ocr"):
            tower = dict(
                depth=1, hidden_size=64, num_heads=2, intermediate_size=64, out_hidden_size=sizes["hidden_size"]
            )
            config = transformers.GlmOcrConfig(text_config=sizes, vision_config=tower, image_token_id=1)
            kind = transformers.GlmOcrForConditionalGeneration
        else:
            config, kind = transformers.GlmMoeDsaConfig(**sizes), transformers.GlmMoeDsaForCausalLM
        folder = Path(spec["folder"]) / "model"
        if not folder.exists():
            kind(config).save_pretrained(folder)
        self.model = kind.from_pretrained(folder, **more).train()
        self.ids = torch.tensor(tokens(spec))

    def forward(self):
        with self.torch.no_grad():
            return self.model(input_ids=self.ids, use_cache=False).logits.numpy()

    def gradient(self) -> float:
        self.model.zero_grad(set_to_none=True)
        logits = self.model(input_ids=self.ids, use_cache=False).logits
        loss = self.torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())
        loss.backward()
        return loss.item()


class Ours(Side):
    def __init__(self, spec: dict[str, Any]) -> None:
        from glmv_jax.parallel.host import prepare_memory

        prepare_memory()  # as `glmv train` does before anything else
        import jax
        import jax.numpy as jnp

        from glmv_jax.interop import folder, glm_moe_dsa, glm_ocr
        from glmv_jax.interop.table import to_params
        from glmv_jax.losses.chunked import head_loss
        from glmv_jax.models import vlm
        from glmv_jax.typing import TokenInput

        self.spec, self.jax = spec, jax
        where = Path(spec["folder"]) / "model"
        family = glm_ocr if spec["model"].startswith("glm_ocr") else glm_moe_dsa
        whole = family.config(folder.read_config(where))
        decoder = dataclasses.replace(whole.decoder, unroll=spec["unroll"] or whole.decoder.depth)
        cfg = vlm.VLMConfig(None, None, decoder)
        entries = [entry for entry in family.table(whole) if entry.ours[0].startswith("decoder/")]
        tensors = {name: x for name, x in folder.Tensors(where).items() if "visual" not in name}
        self.params = jax.device_put(to_params(entries, tensors))
        ids = jnp.asarray(tokens(spec), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None, :, None], (*ids.shape, 3))
        rows = TokenInput(ids, positions, jnp.ones_like(ids), -jnp.ones_like(ids))

        weight = jnp.full(ids[:, 1:].shape, 1 / ids[:, 1:].size)

        def hidden(params):
            return vlm.apply(cfg, params, None, rows).hidden

        def logits(params):
            return vlm.logits(cfg, params, hidden(params))

        def loss(params):
            return head_loss(hidden(params)[:, :-1], vlm.head(cfg, params), ids[:, 1:], weight).total

        self._forward, self._gradient = jax.jit(logits), jax.jit(jax.value_and_grad(loss))

    def forward(self):
        return np.asarray(self._forward(self.params))

    def gradient(self) -> float:
        loss, grads = self._gradient(self.params)
        self.jax.block_until_ready(grads)
        return float(loss)


def contest(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    base = dict(model=args.model, folder=folder, threads=args.threads, cores=cores, unroll=args.unroll)
    env = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    peers = [Contender(__file__, base | {"name": args.peers[0]}, env)]
    peers[0].ask("turn", PATIENCE, what="forward", times=1)  # has written the weights by now
    ours = Contender(__file__, base | {"name": "ours"}, env)
    own = ours.ask("prepare", PATIENCE)
    log("ours", own)
    rows, failed = {}, {}
    for name in args.peers:
        peer = peers.pop() if peers else Contender(__file__, base | {"name": name}, env)
        try:
            theirs = peer.ask("prepare", PATIENCE)
            logits = [np.load(Path(folder) / f"{side}.npy") for side in ("ours", name)]
            error_BT = np.abs(logits[0] - logits[1]).max(-1)
            share, apart = float((error_BT <= 2e-4).mean()), abs(theirs["loss"] / own["loss"] - 1)
            row: dict[str, Any] = {
                "largest difference of logits": significant(float(error_BT.max()), 2),
                "positions that agree": significant(share, 4), "losses": [own["loss"], theirs["loss"]],
            }  # fmt: skip
            if (share < 0.9 or apart > 1e-4) if "dsa" in args.model else (share < 1 or apart > 1e-5):
                raise Failed(f"{name}: does not compute the same: {row}")
            for what in ("forward", "gradient"):
                runs = {
                    side.name: functools.partial(side.ask, "turn", PATIENCE, what=what, times=args.times)
                    for side in (ours, peer)
                }
                times = in_turns(runs, args.rounds, args.seconds)
                ratio = statistics.median(times["ours"]) / statistics.median(times[name])
                row[what] = {
                    "ours s": spread(times["ours"]),
                    "s": spread(times[name]),
                    "ours / peer": significant(ratio, 3),
                }
            rows[name] = row
            log(name, row)
        except Failed as failure:
            failed[name] = str(failure)
            log("failed", failure)
        peer.close()
    ours.close()
    shape = dict(zip(("batch", "length"), SHAPES[args.model]))
    return {"benchmark": "decoder_pass", "model": args.model, **shape, "dtype": "float32", "threads": args.threads,
            "unroll": args.unroll, "peers": rows, "failed": failed, **environment()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TEXT, default="glm_moe_dsa_small")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["hf"])
    parser.add_argument("--unroll", type=int, default=0, help="ours: layers a turn of the loop over them, 0: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--times", type=int, default=2, help="runs of a turn")
    parser.add_argument("--seconds", type=float, default=240.0, help="of turns; each side has at least one")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", help="also write the JSON line there")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        spec = json.loads(args.contender)
        serve(Ours if spec["name"] == "ours" else Theirs, spec)
    with tempfile.TemporaryDirectory() as folder:
        emit(contest(args, folder), args.out)


if __name__ == "__main__":
    main()

"""How fast is a training step of CogViT against the same tower in PyTorch?

Forward, backward and AdamW on images of 224 px (256 patches), the loss being the mean square distance of the tower's
features from fixed random ones: float32 on a CPU, bfloat16 with float32 parameters on a GPU (torch: autocast). Prints
one JSON line: images/s, model TFLOP/s (three times the forward pass) and its share of what a large matrix product
reaches on the same device, for us and each peer, and the ratio.

    python benchmarks/cogvit_step.py [--size s] [--batch 8] [--peers hf hf-batched hf-compiled timm] [--out FILE]

Peers (`pip install torch transformers timm`; those that cannot run are listed under "failed"):

    hf             transformers' GlmOcrVisionModel up to the merger, scaled-dot-product attention, as shipped
    hf-batched     the same, attention of all images in one call instead of one an image, and the patch embedding as a
                   matrix product instead of a 3-D convolution: the most we could make of it without a compiler
    hf-compiled    hf-batched, under torch.compile
    timm           timm's NaFlexVit of the same depth, width, heads and MLP: axial rotary positions, QK-norm, SwiGLU
    timm-compiled  the same under torch.compile

Ours and hf* have the same parameters and inputs, and the losses of the first steps have to agree; timm's tower is
another function of the same cost (QK-norm is a LayerNorm). Each peer runs in turns with ours, each in its own process.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from typing import Any

import numpy as np
from contest import Contender, Failed, device, emit, environment, in_turns, log, save, serve, significant, spread
from steps import TOLERANCE, OnJax, OnTorch, Spec

SIDE = 16  # patches
SIZES = {"s": dict(depth=12, width=384, heads=6, mlp=1536), "l": dict(depth=24, width=1024, heads=16, mlp=4096)}
PEERS = ("hf", "hf-batched", "hf-compiled", "timm", "timm-compiled")
ADAM = dict(lr=3e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)

PATIENCE = 600.0  # seconds until a side that is silent has failed


def inputs(spec: Spec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """patches [B, P, C] float32, their coordinates [P, 2] in merge-block order, and the features to come near to."""
    from glmv_jax.data.naflex import grid_coordinates

    rng = np.random.default_rng(0)
    patches = rng.standard_normal((spec["batch"], SIDE**2, 3 * 2 * 14**2), np.float32)
    target = rng.standard_normal((spec["batch"], SIDE**2, SIZES[spec["size"]]["width"]), np.float32)
    return patches, grid_coordinates(SIDE, SIDE), target


class Measured:
    """What both sides have besides. product(a side): a product of two matrices of that side, to be called."""

    def ceiling(self, side: int, seconds: float) -> float:
        """FLOP/s of a product of two random square matrices in the dtype of the tower, the best of its repetitions."""
        multiply = self.product(side)
        multiply()
        best, end = 0.0, time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.perf_counter()
            multiply()
            best = max(best, 2 * side**3 / (time.perf_counter() - began))
        return best


# --- ours -------------------------------------------------------------------------------------------------------------


def entries(cfg: Any) -> list:
    """The trunk's part of the table between our parameters and transformers' names."""
    from glmv_jax.interop import glm_ocr
    from glmv_jax.models import DecoderConfig, MergerConfig, VLMConfig

    whole = VLMConfig(cfg, MergerConfig(in_width=cfg.width), DecoderConfig(depth=1))
    return [entry for entry in glm_ocr.table(whole) if entry.ours[0].startswith("vision/")]


def write_weights(size: str, file: str) -> float:
    """Random parameters under transformers' names; returns the tower's forward FLOPs of an image."""
    from safetensors.numpy import save_file

    from glmv_jax.interop.table import to_tensors
    from glmv_jax.models import CogViTConfig, abstract_params
    from glmv_jax.trees import flatten, nest

    cfg, rng = CogViTConfig(**SIZES[size]), np.random.default_rng(1)
    params: dict[str, Any] = {}
    for path, like in flatten(abstract_params(cfg)).items():
        x = rng.standard_normal(like.shape, np.float32)
        leaf = path.rpartition("/")[2]
        params[f"vision/{path}"] = x * like.shape[-2] ** -0.5 if leaf == "kernel" else 0.1 * x + (leaf == "scale")
    save_file(to_tensors(entries(cfg), nest(params)), file)
    return cfg.flops(SIDE**2)


class Ours(OnJax, Measured):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        import jax
        import jax.numpy as jnp
        from safetensors.numpy import load_file

        from glmv_jax.interop.table import to_params
        from glmv_jax.models import CogViTConfig, cogvit
        from glmv_jax.typing import VisionInput

        cfg = CogViTConfig(**SIZES[spec["size"]], dtype=spec["dtype"], remat=spec["remat"], unroll=spec["unroll"])
        params = jax.device_put(to_params(entries(cfg), load_file(spec["weights"]))["vision"])
        patches, yx, target = jax.device_put(inputs(spec))
        B, P, _ = patches.shape
        vision = VisionInput(patches, jnp.broadcast_to(yx, (B, P, 2)), jnp.ones((B, P), jnp.int32))

        def loss_fn(params, vision, target):
            features = cogvit.apply(cfg, params, vision).astype(jnp.float32)
            return jnp.mean(jnp.square(features - target))

        self.learn(loss_fn, params, ADAM, vision, target)

    def device(self) -> str:
        return self.jax.devices()[0].device_kind

    def product(self, side: int):
        keys = self.jax.random.split(self.jax.random.key(0))
        a, b = (self.jax.random.normal(key, (side, side), self.spec["dtype"]) for key in keys)
        multiply = self.jax.jit(lambda a, b: a @ b)
        return lambda: multiply(a, b).block_until_ready()

    def profile(self, steps: int) -> dict[str, Any]:
        from step_profile import profile

        return profile(self._step, lambda: self.wait(self.step()), steps)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


class Torch(OnTorch, Measured):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        torch = self.torch
        patches, yx, target = (torch.tensor(x, device=self.place) for x in inputs(spec))
        build = self.hf if spec["name"].startswith("hf") else self.timm
        self.model, self.features = build(patches, yx.long())
        self.model.to(self.place).train()
        if spec["name"].endswith("-compiled"):
            self.features = torch.compile(self.features)
        self.target = target
        self.learn(ADAM)

    def hf(self, patches, yx):
        """The trunk of GlmOcrVisionModel: its forward up to the merger."""
        from safetensors.torch import load_file
        from transformers.models.glm_ocr.configuration_glm_ocr import GlmOcrVisionConfig
        from transformers.models.glm_ocr.modeling_glm_ocr import GlmOcrVisionModel

        torch, size, batched = self.torch, SIZES[self.spec["size"]], self.spec["name"] != "hf"
        config = GlmOcrVisionConfig(
            depth=size["depth"], hidden_size=size["width"], num_heads=size["heads"], intermediate_size=size["mlp"],
            out_hidden_size=8, attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device("meta"):
            model = GlmOcrVisionModel(config)
        del model.merger, model.downsample
        if batched:
            config._attn_implementation = one_call(torch)  # not at construction, where "flash" means a package
        model.rotary_pos_emb = type(model.rotary_pos_emb)(config)  # its frequencies are no parameters
        tensors = load_file(self.spec["weights"], device=str(self.place))
        model.load_state_dict({k.removeprefix("model.visual."): v for k, v in tensors.items()}, assign=True)
        B, P, C = patches.shape
        rows, coordinates = patches.reshape(B * P, C), yx.repeat(B, 1)
        ends = torch.arange(0, B * P + 1, P, dtype=torch.int32, device=self.place)

        def features():
            if batched:
                weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
                x = torch.nn.functional.linear(rows, weight.flatten(1), bias)
            else:
                x = model.patch_embed(rows)
            positions = model.rotary_pos_emb(x, coordinates)
            for block in model.blocks:
                x = block(x, cu_seqlens=ends, max_seqlen=P, position_embeddings=positions)
            return model.post_layernorm(x).reshape(B, P, -1)

        return model, features

    def timm(self, patches, yx):
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

        size = SIZES[self.spec["size"]]
        cfg = NaFlexVitCfg(
            patch_size=14, embed_dim=size["width"], depth=size["depth"], num_heads=size["heads"],
            mlp_ratio=size["mlp"] / size["width"], qk_norm=True, swiglu_mlp=True, attn_type="rope", rope_type="axial",
            pos_embed="none", class_token=False, reg_tokens=0, global_pool="",
        )  # fmt: skip
        self.torch.manual_seed(0)
        # Six channels: a patch of ours is a frame twice.
        model = NaFlexVit(cfg, in_chans=6, num_classes=0)
        coordinates = yx[(yx[:, 0] * SIDE + yx[:, 1]).argsort()].repeat(len(patches), 1, 1)

        def features():
            return model.forward_features(patches, coordinates)["patches"]

        return model, features

    def loss(self):
        with self.half():
            features = self.features()
        return (features.float() - self.target).square().mean()

    def product(self, side: int):
        torch = self.torch
        a, b = (torch.randn(side, side, device=self.place).to(getattr(torch, self.spec["dtype"])) for _ in range(2))
        return lambda: self.wait((a @ b)[0, 0])

    def forward_flops(self) -> float:
        """Of an image, as torch counts them while it runs one forward pass (with plain attention: not all others are
        counted)."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        features = getattr(self.features, "_torchdynamo_orig_callable", self.features)
        with FlopCounterMode(display=False) as counter, self.torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            features()
        return counter.get_total_flops() / self.spec["batch"]


def one_call(torch) -> str:
    """The name under which transformers finds an attention that takes all images, of one length, in one call.

    "flash" in the name makes the module hand over all rows at once; otherwise it makes a call an image.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module, query, key, value, attention_mask, max_length_q, **_):
        def images(x):  # [1, H, B * P, K] -> [B, H, P, K]
            return x[0].unflatten(1, (-1, max_length_q)).transpose(0, 1)

        out = torch.nn.functional.scaled_dot_product_attention(images(query), images(key), images(value))
        return out.transpose(1, 2).flatten(0, 1)[None], None

    ALL_ATTENTION_FUNCTIONS.register("flash_one_call", attention)
    return "flash_one_call"


# --- the contest ------------------------------------------------------------------------------------------------------


def contender(spec: Spec, on_gpu: bool) -> Contender:
    """Its process, which starts to import and build at once."""
    ours = spec["name"] == "ours"
    env = {"OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if ours:
        env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": "cuda" if on_gpu else "cpu"}
    cores = sorted(os.sched_getaffinity(0))
    return Contender(__file__, spec | {"cores": cores if on_gpu else cores[: spec["threads"]]}, env)


class Contest:
    """Ours, one peer after the other against it, and what was found."""

    def __init__(self, args: argparse.Namespace, weights: str) -> None:
        self.args, self.on_gpu = args, args.device == "cuda"
        self.base = dict(
            size=args.size, batch=args.batch, checked=args.checked, weights=weights,
            remat=args.remat, unroll=args.unroll,
            threads=args.threads, dtype="bfloat16" if self.on_gpu else "float32", device=args.device,
        )  # fmt: skip
        self.rows: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.ceilings: dict[str, float] = {}
        self.end = time.monotonic() + args.seconds

    def run(self) -> dict[str, Any]:
        self.flops = write_weights(self.args.size, self.base["weights"])
        ours = contender(self.base | {"name": "ours"}, self.on_gpu)
        # On a GPU machine, with many cores, all import and build at once and then wait; on a small one, one by one.
        ready = {name: self.start(name) for name in self.args.peers} if self.on_gpu else {}
        self.own = ours.ask("prepare")
        self.own["memory"] = ours.ask("memory")
        log("ours", self.own)
        self.device = ours.ask("device")
        self.ceiling(ours)
        for name in self.args.peers:
            peer = ready.get(name)
            try:
                if time.monotonic() > self.end:
                    raise Failed(f"{name}: no time left of {self.args.seconds:.0f} s")
                peer = peer or self.start(name)
                self.rows[name] = self.against(ours, peer)
                log(name, self.rows[name])
            except Failed as failure:
                self.failed[name] = str(failure)
                log("failed", failure)
            if peer:
                peer.close()
            save(self.record(), self.args.out)  # what is known, should anything end us
        record = self.record()
        if self.args.profile:
            try:
                record["profile"] = ours.ask("profile", PATIENCE, steps=self.args.steps)
            except Failed as failure:
                self.failed["profile"] = str(failure)
        ours.close()
        return record

    def start(self, name: str) -> Contender:
        return contender(self.base | {"name": name}, self.on_gpu)

    def ceiling(self, side: Contender) -> None:
        """Measured on both sides; the higher one counts."""
        self.ceilings[side.name] = side.ask(
            "ceiling", PATIENCE, side=self.args.ceiling, seconds=self.args.ceiling_seconds
        )

    def against(self, ours: Contender, peer: Contender) -> dict[str, Any]:
        left = self.end - time.monotonic()
        prepared = peer.ask("prepare", max(60.0, left))
        flops = peer.ask("forward_flops", PATIENCE)
        if len(self.ceilings) == 1:
            self.ceiling(peer)
        turn = dict(steps=self.args.steps, warm=self.args.warm)
        runs = {side.name: functools.partial(side.ask, "turn", PATIENCE, **turn) for side in (ours, peer)}
        times = in_turns(runs, self.args.rounds, left)
        ours_s, peer_s = ([self.args.batch / wall for wall, _ in times[side.name]] for side in (ours, peer))
        row = {
            "ours images/s": spread(ours_s), "images/s": spread(peer_s),
            "ours / peer": significant(statistics.median(ours_s) / statistics.median(peer_s), 3),
            "processor s a step": {name: spread([cpu for _, cpu in found]) for name, found in times.items()},
            "losses": prepared["losses"], "forward FLOPs, peer / ours": significant(flops / self.flops),
            "first steps s": significant(prepared["seconds"], 3), "memory GB": rounded(peer.ask("memory")),
        }  # fmt: skip
        if peer.name.startswith("hf"):
            row["losses agree"] = bool(
                np.allclose(prepared["losses"], self.own["losses"], rtol=TOLERANCE[self.base["dtype"]], atol=0)
            )
        return row

    def record(self) -> dict[str, Any]:
        best = max(self.ceilings.values())
        for row in self.rows.values():
            for side in ("ours ", ""):
                flops = 3 * self.flops * row[f"{side}images/s"]["median"]
                row[f"{side}TFLOP/s"] = significant(flops / 1e12)
                row[f"{side}share of the ceiling"] = significant(flops / best, 3)
        setting = ("size", "batch", "dtype", "threads", "remat", "unroll")
        return {
            "benchmark": "cogvit_step", **{k: self.base[k] for k in setting},
            "device": self.device, "optimizer": "adamw", "forward GFLOP an image": significant(self.flops / 1e9),
            "ceiling TFLOP/s": {name: significant(flops / 1e12) for name, flops in self.ceilings.items()},
            "ceiling matrix": self.args.ceiling, "ours": {
                "losses": self.own["losses"], "first steps s": significant(self.own["seconds"], 3),
                "memory GB": rounded(self.own["memory"])},
            "peers": self.rows, "failed": self.failed, **environment(),
        }  # fmt: skip


def rounded(gigabytes: float | None) -> float | None:
    return None if gigabytes is None else significant(gigabytes, 3)


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="s")
    parser.add_argument("--batch", type=int, default=0, help="default: on a GPU 32 (l) or 128 (s), else 1 or 8")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--remat", default="none", help="ours: none, dots or full (the peers keep everything)")
    parser.add_argument("--unroll", type=int, default=1, help="ours: layers a turn of the loop over them")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=0, help="of a turn; default: 10 on a GPU, else 2 (s) or 1 (l)")
    parser.add_argument("--checked", type=int, default=3, help="first steps, whose losses are compared")
    parser.add_argument("--seconds", type=float, default=600.0, help="after this no peer is started")
    parser.add_argument("--threads", type=int, default=cores, help="of each side, on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--profile", action="store_true", help="also say what a step of ours spends its time on")
    parser.add_argument("--out", help="also write the JSON line there")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        spec = json.loads(args.contender)
        serve(Ours if spec["name"] == "ours" else Torch, spec)
    args.device = device(args.device)
    on_gpu, large = args.device == "cuda", args.size == "l"
    args.batch = args.batch or ((32 if large else 128) if on_gpu else (1 if large else 8))
    args.steps = args.steps or (10 if on_gpu else 1 if large else 2)
    args.warm = 2 if on_gpu else 0 if large else 1
    args.ceiling, args.ceiling_seconds = (8192, 1.0) if on_gpu else (3072, 4.0)
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this process, which makes the weights
    with tempfile.TemporaryDirectory() as folder:
        emit(Contest(args, os.path.join(folder, "weights.safetensors")).run(), args.out)


if __name__ == "__main__":
    main()

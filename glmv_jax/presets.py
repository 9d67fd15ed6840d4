"""Model sizes by name, as ConfigDicts that an experiment can override key by key; `models.build` makes models of them.

`nano` trains on two CPU cores in minutes; `l` is the public 403M CogViT with GLM-OCR's language model. `glm5v` has
GLM-5's decoder in its place, 743 B at `l`, and at nano one of the same kind.
"""

from __future__ import annotations

import os
from typing import Any

from ml_collections import ConfigDict

from glmv_jax.typing import UserError

COMPILED = "~/.cache/glmv_jax/xla"  # where compiled programs are kept, of training and of answering
VISION: dict[str, dict[str, Any]] = {
    "nano": dict(depth=4, width=128, heads=2, mlp=352, patch=8, remat="none", chunk=0),
    "l": dict(depth=24, width=1024, heads=16, mlp=4096, patch=14, dtype="bfloat16", remat="full", chunk=0),
}
TEXT: dict[str, dict[str, Any]] = {
    "nano": dict(vocab=4096, length=28, depth=1, width=128, heads=2, mlp=352),
    # As many pieces as `glmv train-vocabulary` makes of a corpus: SigLIP's 32,000 for one language, for two. Rows of
    # 128 tokens: a paragraph in one language, or short captions in both side by side; SigLIP 2 has 64 for one text.
    "l": dict(vocab=64_000, length=128, depth=24, width=1024, heads=16, mlp=4096, dtype="bfloat16", remat="full"),
}
DECODER: dict[str, dict[str, Any]] = {
    "nano": dict(
        # Images here are a few patches wide: with the usual base of 10,000 neighbouring columns differ by angles below
        # 0.01 and no position is ever learnt. Half of each head is left unrotated for what does not depend on it.
        vocab=4096, depth=4, width=128, heads=2, kv_heads=1, head_dim=64, mlp=352, rope_theta=2.0,
        rotary_fraction=0.5, rope_split=(4, 6, 6),
    ),
    "l": dict(
        vocab=59392, depth=16, width=1536, heads=16, kv_heads=8, head_dim=128, mlp=4608, rope_split=(16, 24, 24),
        dtype="bfloat16", remat="full",
    ),
}  # fmt: skip
# Latent attention with an indexer, mixtures of experts. At nano size an indexer that keeps 48 keys of at most 112.
GLM5: dict[str, dict[str, Any]] = {
    "nano": dict(
        vocab=4096, depth=4, width=128, heads=4, q_rank=96, kv_rank=48, nope_dim=24, rope_dim=16, v_dim=32,
        index_heads=4, index_dim=32, top_k=48, index_loss=True, mlp=352, dense=1, expert_mlp=96, experts=8, chosen=2,
        route_scale=1.0, rope_theta=2.0, rope_split=(2, 3, 3),
    ),
    "l": dict(index_loss=True, dtype="bfloat16", remat="attention"),
}  # fmt: skip
# Of the merger in stages 3 to 5; `parallel.remat` says what the policies are.
MERGER: dict[str, dict[str, Any]] = {"nano": dict(remat="none", chunk=0), "l": dict(remat="full", chunk=0)}
EMBEDDING = {"nano": 128, "l": 1024}
# What a row of packed documents holds of tokens, patches and learnt tokens; an image's patches, a prompt's tokens.
DOCUMENTS: dict[str, dict[str, Any]] = {
    "nano": dict(tokens=112, patches=128, targets=64, image_patches=48, prompt_tokens=48, workers=0, per="sqrt"),
    "l": dict(tokens=8192, patches=16_384, targets=4096, image_patches=4096, prompt_tokens=2048, workers=8, per="sqrt"),
}

# Adapters of rank 0: none. base: the run whose parameters they change; dtype: what those are kept in, or "stored".
LORA: dict[str, Any] = dict(
    rank=0, alpha=16.0, base="", dtype="float32", targets=(r"decoder/.*/(q|k|v|o|gate|up|down)/kernel",),
    groups=((r".*", {"kind": "adamw"}),),
)  # fmt: skip


def _pick(table: dict[str, dict[str, Any]], size: str) -> ConfigDict:
    if size not in table:
        raise UserError(f"size={size!r} is not known; choose one of {', '.join(table)}")
    return ConfigDict(table[size])


def vision(size: str) -> ConfigDict:
    """The trunk alone (stage 1)."""
    return ConfigDict({"vision": _pick(VISION, size)})


def two_tower(size: str) -> ConfigDict:
    """Stage 2: vision, text, and the width they meet in."""
    # kind, path, scale: whose text tower it is, see `train.text_towers`.
    text = ConfigDict({"kind": "own", "path": "", "scale": False, **_pick(TEXT, size)})
    return ConfigDict({"vision": _pick(VISION, size), "text": text, "embedding": EMBEDDING[size]})


def vlm(size: str) -> ConfigDict:
    """Stages 3 to 5."""
    mtp = dict(depth=1, option="image_token", h_prev="post_norm", weights="shared")
    return _vlm(size, _pick(DECODER, size), mtp)


def glm5v(size: str) -> ConfigDict:
    """Stages 3 to 5 with GLM-5's decoder. Three tokens ahead with one set of weights, as GLM-5 was trained."""
    mtp = dict(depth=3, option="image_token", h_prev="post_norm")
    decoder = {"kind": "glm5", **_pick(GLM5, size)}
    return _vlm(size, decoder, mtp)


def _vlm(size: str, decoder: Any, mtp: dict[str, Any]) -> ConfigDict:
    """patches_at_once: of a device, that pass encoder and merger at a time, in whole rows; 0: all."""
    sees = {"vision": _pick(VISION, size), "merger": _pick(MERGER, size), "patches_at_once": 0}
    return ConfigDict({**sees, "decoder": decoder, "mtp": mtp})


def public(checkpoint: str) -> ConfigDict:
    """Stages 3 to 5 with the model of a folder that `glmv import-hf` wrote. remat: of the decoder; the rest: `_vlm`."""
    sees = {"vision": {"remat": "full", "chunk": 0}, "merger": _pick(MERGER, "l"), "patches_at_once": 0}
    return ConfigDict({"checkpoint": checkpoint, "remat": "full", **sees})


def public_vocabulary(checkpoint: str) -> str:
    """The tokenizer in such a folder."""
    return os.path.join(checkpoint, "hf", "tokenizer.json")


def documents(size: str, weights: dict[str, float], seed: int, **more: Any) -> ConfigDict:
    """The `data` of stages 3 to 5: shares of the sources, and the rows they are packed into.

    sizing: of pictures, "naflex" (each fills image_patches) or "smart" (its own size where it can, as GLM-OCR).
    images: of a row at most, 0 for any number; a row's tokens and patches are its other limits.
    """
    rest = {"vocabulary": "", "sizing": "naflex", "images": 0}
    return ConfigDict({"weights": weights, "seed": seed, **rest, **_pick(DOCUMENTS, size), **more})


def files(size: str, names: str) -> ConfigDict:
    """The part of stages 3 and 4's `data` that is about a person's own files, see `train.stages.from_files`.

    names: of the sources, with a + between them.
    """
    entry = dict(path="", reader="", weight=1.0, category="", long="split", prompt="")
    sources = {name: dict(entry) for name in filter(None, names.split("+"))}
    films = dict(film_patches=16, film_frames=8) if size == "nano" else dict(film_patches=1024, film_frames=128)
    gui = dict.fromkeys(("perceive", "ground", "step", "trajectory", "critic"), 0.0)
    rest = dict(power=0.0, heldout=0.01, thinking="last", video=False, fit="best", ahead=16, slices=1)
    rest |= dict(dispatch=dict(rows=0, patches=0))
    return ConfigDict({"sources": sources, "gui": gui, **rest, **films})


def vlm_groups(vision: float) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Optimiser groups of stages 3 to 5: Muon for the blocks' matrices, AdamW for the rest.

    vision: the encoder's rate relative to the decoder's; 0 freezes it, and its gradient is not even computed.
    """
    encoder = (
        (r"vision/blocks/.*/kernel", {"kind": "muon", "wd": 0.1, "lr_mult": vision}),
        (r"vision/.*", {"kind": "adamw", "wd": 0.05, "lr_mult": 0.25 * vision}),
    )
    return (
        *(encoder if vision else ((r"vision/.*", {"kind": "frozen"}),)),
        (r"(decoder|mtp/block|merger)/.*/kernel", {"kind": "muon", "wd": 0.1}),
        (r".*", {"kind": "adamw", "wd": 0.05, "lr_mult": 0.5}),
    )


def mesh(**sizes: int) -> ConfigDict:
    """Every axis that a mesh may have (`parallel.mesh`), one device long unless given, for the command line to set; dcn
    for those that may go across slices."""
    axes = dict.fromkeys(("stage", "data", "fsdp", "expert", "context", "tensor"), 1)
    return ConfigDict({**axes, **sizes, "dcn": dict.fromkeys(("stage", "data", "fsdp"), 1)})


def run(stage: str, steps: int, batch: int, **more: Any) -> ConfigDict:
    """What every experiment has: the keys that `train.loop` reads, at their defaults. Sections are added to it."""
    cfg = ConfigDict(
        dict(
            stage=stage, seed=0, steps=steps, batch=batch,
            init_from="",  # run directory of a finished run to start from
            init_subtrees=(),  # only these parts of it, e.g. ("vision",)
            mesh=mesh(data=-1), rules="data",
            xla="auto",  # XLA's options, or none: see parallel.compiler
            pipeline=dict(microbatches=0, repeats=1, ends="rows"),  # of a mesh with stages, see parallel.pipeline
            accumulate=1,  # pieces that a batch is differentiated in, one after the other
            freeze=(),  # regular expressions of parameters that stay as they are
            ema=0.0,  # decay of a running average of the parameters, such as 0.999; 0: none
            evaluate="params",  # what is evaluated and handed on: those, or their average, "ema"
            lora=LORA,
            log_every=10, eval_every=0, save_every=100, keep=2,
            max_skipped=50,  # steps in a row without a finite gradient, after which the run stops; 0: never
            spikes=8.0,  # a loss so many robust deviations above its running median is told; 0: never
            max_seconds=0.0,  # stop when the steps have taken so long; 0: never
            faults="",  # where broken records are logged; default: faults.jsonl in the work directory
            match_wall="",  # take max_seconds from the steps of this finished run
            compilation_cache=COMPILED,  # where compiled programs are kept; "": nowhere
        )
    )  # fmt: skip
    cfg.update(more)
    return cfg

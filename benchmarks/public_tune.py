"""Does a stranger get GLM-OCR at its true size in, tuned and out again, and at what cost in seconds and memory?

    python benchmarks/public_tune.py [--folder DIR] [--steps 3] [--only make import ...] [--out FILE]

transformers makes the checkpoint: the true shapes (1.1 B with the encoder), random numbers, bfloat16, a tokenizer with
GLM's special tokens, a chat template, the image processor. Then the README's commands, each a process of its own:
import, a question about a picture, adapters on a folder of pictures with texts, the same question, export; and
transformers is asked the same of the checkpoint and of what comes out: greedy ids, and logits at every position, both
sides in float32. Rows of the tuning are short (320 tokens, 768 patches), so that a CPU does a step in seconds.

Prints one JSON line: of each process the seconds and the peak of its resident memory, as Linux counts it (files that
are read by mapping included); losses, seconds a step, and how far logits are apart. DIR takes 12 GB, 7 of them when it
is over; a part that is done is not done again in the same DIR, but those that --only names.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contest import emit, environment, log, significant

ROOT = Path(__file__).resolve().parent.parent
TEXT = dict(num_hidden_layers=16, hidden_size=1536, intermediate_size=4608, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, vocab_size=59392, max_position_embeddings=131072,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[16, 24, 24],
                                 partial_rotary_factor=1.0))  # fmt: skip
VISION = dict(depth=24, hidden_size=1024, num_heads=16, intermediate_size=4096, patch_size=14, temporal_patch_size=2,
              out_hidden_size=1536, spatial_merge_size=2, image_size=336)  # fmt: skip
TEMPLATE = """[gMASK]<sop>
{%- for m in messages -%}
    {{- '<|' + m.role + '|>\\n' -}}
    {%- for part in ([{'type': 'text', 'text': m.content}] if m.content is string else m.content) -%}
        {{- part.text if part.type == 'text' else '<|begin_of_image|><|image|><|end_of_image|>' -}}
    {%- endfor -%}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt -}}"""
SPECIALS = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|video|>", "<|end_of_video|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "<tool_response>", "</tool_response>", "<|begin_of_box|>", "<|end_of_box|>",
)  # fmt: skip
QUESTION, NEW = "Text Recognition:", 6
# Rows that a CPU can do; one row holds both pages, so every step sees the same and losses compare.
SMALL = ("batch=1", "log_every=1", "optim.lr=0.0005", "data.tokens=320", "data.patches=768", "data.image_patches=512",
         "data.targets=128", "data.heldout=0.0")  # fmt: skip


# --- what is given: a checkpoint and a folder of pages ----------------------------------------------------------------


def make(root: Path) -> dict[str, Any]:
    """The checkpoint, by transformers."""
    import torch
    import transformers
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

    transformers.logging.disable_progress_bar()
    root.mkdir(parents=True)
    write_tokenizer(root)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(root)
    image, video, *stops = tokenizer.convert_tokens_to_ids(["<|image|>", "<|video|>", "<|endoftext|>", "<|user|>"])
    config = transformers.GlmOcrConfig(
        text_config=TEXT | {"eos_token_id": stops, "pad_token_id": 0}, vision_config=VISION, image_token_id=image,
        video_token_id=video,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    model = transformers.GlmOcrForConditionalGeneration(config)
    with torch.no_grad():  # so that contexts differ in what they say
        model.lm_head.weight.mul_(3)
    model.save_pretrained(root, max_shard_size="1GB")
    Glm46VImageProcessorPil().save_pretrained(root)
    transformers.GenerationConfig(eos_token_id=stops, pad_token_id=0).save_pretrained(root)
    return {"parameters": sum(p.numel() for p in model.parameters()),
            "bytes": sum(path.stat().st_size for path in root.glob("*.safetensors"))}  # fmt: skip


def write_tokenizer(root: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator((ROOT / "LICENSE").read_text(encoding="utf-8").splitlines(), trainer)
    made.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    made.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (root / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def write_pages(folder: Path) -> None:
    """Two pages of the licence as pictures, a text beside each."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    lines = [line.strip() for line in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines() if line.strip()]
    for number in range(2):
        text = "\n".join(lines[4 * number : 4 * number + 4])
        page = Image.new("RGB", (224, 308), "white")
        ImageDraw.Draw(page).multiline_text((8, 8), text, fill="black")
        page.save(folder / f"page-{number}.png")
        (folder / f"page-{number}.txt").write_text(text, encoding="utf-8")


# --- both sides on one question ---------------------------------------------------------------------------------------


def theirs(checkpoint: Path, page: Path, out: Path) -> None:
    """transformers' greedy ids and logits [T + NEW, V], in float32."""
    import torch
    import transformers
    from PIL import Image
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

    transformers.logging.disable_progress_bar()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint)
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    shown = dict(Glm46VImageProcessorPil.from_pretrained(checkpoint)(Image.open(page), return_tensors="pt"))
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    text = text.replace("<|image|>", "<|image|>" * (int(shown["image_grid_thw"].prod()) // 4))
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    kinds = lambda ids: (ids == model.config.image_token_id).int()  # noqa: E731
    with torch.no_grad():
        whole = model.generate(ids, **shown, mm_token_type_ids=kinds(ids), max_new_tokens=NEW, do_sample=False)
        logits = model(whole, **shown, mm_token_type_ids=kinds(whole)).logits
    np.savez(out, ids=whole[0].numpy(), new=whole[0, ids.shape[1] :].numpy(), logits=logits[0].numpy())


def ours(checkpoint: Path, page: Path, asked: Path, out: Path) -> None:
    """Our logits of the ids in `asked`, which transformers wrote, in float32."""
    import jax

    from glmv_jax.data.packing import collate
    from glmv_jax.data.processor import Processor
    from glmv_jax.models import vlm
    from glmv_jax.train import checkpoint as checkpoints
    from glmv_jax.train import exchange
    from glmv_jax.typing import TokenInput, VisionInput

    checkpoints.quiet_orbax()
    cfg, params = exchange.load(checkpoint, "float32")
    document = Processor(exchange.files(checkpoint)).document(np.load(asked)["ids"], [page])
    T, P = len(document.tokens), document.patches
    batch = collate([document], T, P, document.images[0][0].shape[1], [document.source])
    vision = VisionInput(*(batch[name] for name in ("patches", "yx", "frame")))
    tokens = TokenInput(*(batch[name] for name in ("tokens", "positions", "segments", "image_row")))
    run = jax.jit(lambda params: vlm.logits(cfg, params, vlm.apply(cfg, params, vision, tokens).hidden))
    np.save(out, np.asarray(run(params)[0]))


def compared(hf: Path, mine: Path) -> dict[str, float]:
    want, got = np.load(hf)["logits"], np.load(mine)
    return {"logits apart at most": significant(float(np.abs(got - want).max()), 3),
            "logits' deviation": significant(float(want.std()), 3), "positions": len(want)}  # fmt: skip


# --- processes --------------------------------------------------------------------------------------------------------


def watched(argv: Sequence[Any]) -> tuple[dict[str, float], list[str]]:
    """({seconds, peak MB}, lines) of a process; it ends the benchmark when it fails."""
    began = time.perf_counter()
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.setdefault("JAX_PLATFORMS", "cpu")
    process = subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        log(f"{time.perf_counter() - began:7.1f} s  {lines[-1][:200]}")
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"public_tune.py: {' '.join(map(str, argv[:6]))} ... ended with {status}")
    return {"seconds": round(time.perf_counter() - began, 1), "peak MB": round(used.ru_maxrss * 1024 / 1e6)}, lines


def glmv(*argv: Any) -> tuple[dict[str, float], list[str]]:
    return watched([sys.executable, "-m", "glmv_jax.cli", *argv])


def part(*argv: Any) -> tuple[dict[str, float], list[str]]:
    return watched([sys.executable, __file__, "--part", *argv])


def told(found: tuple[dict[str, float], list[str]]) -> dict[str, Any]:
    """What a process took, with the JSON that it printed last."""
    used, lines = found
    return used | json.loads(lines[-1])


def tuned(run: Path, found: tuple[dict[str, float], list[str]]) -> dict[str, Any]:
    """What training took, from its own records."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    walls, results = [row["wall"] for row in rows], json.loads((run / "results.json").read_text(encoding="utf-8"))
    steps = [b - a for a, b in zip(walls, walls[1:])]
    return found[0] | {
        "losses": [significant(row["loss"]) for row in rows], "seconds a step": round(statistics.median(steps), 1),
        "a step by the compiler, MB": round(results["step_memory"] / 1e6),
    }  # fmt: skip


def way(root: Path, steps: int, only: Sequence[str]) -> dict[str, Any]:
    """Every part in turn, each once: what it gave is kept in root."""
    hf, imported, run, out = root / "GLM-OCR", root / "imported", root / "tuned", root / "GLM-OCR-tuned"
    pages, page, before, after = root / "mine", root / "mine/page-0.png", root / "before.npz", root / "after.npz"
    question = ("--image", page, "--prompt", QUESTION, "--max-new-tokens", NEW, "--dtype", "float32", "--json")
    config = f"experiments/public_tune.py:checkpoint={imported},sources=mine"
    data = (f"data.sources.mine.path={pages}", f"data.sources.mine.prompt={QUESTION}", f"steps={steps}")
    write_pages(pages)
    parts = {
        "make": ([hf], lambda: told(part("make", hf))),
        "import": ([imported], lambda: glmv("import-hf", hf, imported)[0]),
        "ask": ([], lambda: told(glmv("generate", "--checkpoint", imported, *question))),
        "ask theirs": ([before], lambda: part("theirs", hf, page, before)[0]),
        "tune": ([run], lambda: tuned(run, glmv("train", "--config", config, "--workdir", run,
                                                *(f"--config.{value}" for value in (*SMALL, *data))))),
        "ask tuned": ([], lambda: told(glmv("generate", "--checkpoint", run, *question))),
        "export": ([out], lambda: glmv("export-hf", run, out)[0]),
        "ask theirs tuned": ([after], lambda: part("theirs", out, page, after)[0]),
        "logits": ([root / "ours.npy"], lambda: part("ours", run, page, after, root / "ours.npy")[0]),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, (made, work) in parts.items():
        kept = root / f"{name}.json"
        if kept.exists() and name not in only:
            found[name] = json.loads(kept.read_text(encoding="utf-8"))
            continue
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
        log(name)
        found[name] = work()
        kept.write_text(json.dumps(found[name]), encoding="utf-8")
    for asked, file in (("ask", before), ("ask tuned", after)):
        found[asked]["ids equal"] = found[asked]["token_ids"] == np.load(file)["new"].tolist()
    a, b = np.load(before), np.load(after)
    prompt = len(a["ids"]) - len(a["new"])
    moved = float(np.abs(a["logits"][:prompt] - b["logits"][:prompt]).max())
    return found | {"compared": compared(after, root / "ours.npy") | {"tuning moved logits by": significant(moved, 3)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to work (default: one for the time that it runs)")
    parser.add_argument("--steps", type=int, default=3, help="of the tuning")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="do these anew")
    parser.add_argument("--out", help="also write the JSON line there")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, *paths = args.part
        told_of = {"make": make, "theirs": theirs, "ours": ours}[name](*map(Path, paths))
        if told_of:
            print(json.dumps(told_of))
        return
    with tempfile.TemporaryDirectory() as own:
        found = way(Path(args.folder or own).absolute(), args.steps, args.only)
    found["load average"] = [round(load, 1) for load in os.getloadavg()]  # who else was at work
    emit({"benchmark": "public_tune", "dtype": "bfloat16", "steps": args.steps, **found, **environment()}, args.out)


if __name__ == "__main__":
    main()

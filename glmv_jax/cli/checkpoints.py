"""`glmv import-hf`, `export-hf`, `generate`: checkpoints in and out, and answers from them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from glmv_jax.cli.common import mesh_of, mesh_options
from glmv_jax.typing import UserError

if TYPE_CHECKING:
    from glmv_jax.inference.generate import Model


def import_hf(args: argparse.Namespace) -> int:
    """Reads a public checkpoint into a folder that training can start from and `glmv generate` can read.

    SRC is a folder in Hugging Face layout (config.json, safetensors), or its name on the Hub. DST must not exist yet.

      glmv import-hf GLM-OCR/ checkpoints/glm-ocr
      glmv import-hf zai-org/GLM-OCR checkpoints/glm-ocr --dtype bfloat16
      glmv train --config experiments/vlm_sft.py:size=l --workdir runs/sft --config.init_from=checkpoints/glm-ocr

    One tensor at a time is in memory. The tokenizer, the chat template and every other small file are kept.
    """
    from glmv_jax.train import checkpoint, exchange

    checkpoint.quiet_orbax()
    print(exchange.import_hf(args.src, args.dst, args.dtype))
    return 0


def export_hf(args: argparse.Namespace) -> int:
    """Gives a checkpoint back in Hugging Face layout, complete for transformers' from_pretrained.

    SRC is a folder that `glmv import-hf` wrote, or the work directory of a run that began from one. DST must not exist.

      glmv export-hf checkpoints/glm-ocr GLM-OCR-again/
      glmv export-hf runs/sft GLM-OCR-mine/ --dtype bfloat16
    """
    from glmv_jax.train import checkpoint, exchange

    checkpoint.quiet_orbax()
    print(exchange.export_hf(args.src, args.dst, args.dtype))
    return 0


def import_options(sub: argparse.ArgumentParser) -> None:
    _exchange_options(sub, "a Hugging Face folder, or org/name on the Hub")


def export_options(sub: argparse.ArgumentParser) -> None:
    _exchange_options(sub, "ours")


def _exchange_options(sub: argparse.ArgumentParser, source: str) -> None:
    sub.add_argument("src", metavar="SRC", help=source)
    sub.add_argument("dst", metavar="DST", help="the folder to write")
    sub.add_argument("--dtype", metavar="NAME", help="bfloat16 or float32 (default: as stored)")


def generate(args: argparse.Namespace) -> int:
    """Answers a prompt, with or without images: with the last finished stage of a recipe, or a public checkpoint.

    Examples:

      glmv generate --run runs/quickstart --image cat.png --prompt "Name it in English."
      glmv generate --run runs/sft --image cats.png --prompt "有几个猫？" --temperature 0.7 --seed 3

    --checkpoint takes what `glmv import-hf` wrote, a run that began from it, or a folder in Hugging Face layout. The
    prompt is a question, a file of messages as the OpenAI API has them (which may name pictures and films), or token
    ids; an image for each placeholder that names none:

      glmv generate --checkpoint checkpoints/glm-ocr --image page.png --prompt "Text Recognition:"
      glmv generate --checkpoint checkpoints/glm-ocr --messages chat.json --image a.png b.png --json
      glmv generate --checkpoint checkpoints/glm-ocr --token-ids 5,6,7 --max-new-tokens 8 --json

    --mesh tensor=4 spreads the model over four devices.
    """
    from glmv_jax.inference.generate import generate_from_run
    from glmv_jax.train.checkpoint import quiet_orbax

    quiet_orbax()
    if (args.run is None) == (args.checkpoint is None):
        raise UserError("give either --run or --checkpoint; see glmv generate --help")
    images = [file for files in args.image or () for file in files]
    settings = dict(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed, drafts=args.speculative,
        mesh=mesh_of(args),
    )  # fmt: skip
    if args.checkpoint is not None and not _is_own(args.checkpoint):
        return _generate_from_checkpoint(args, images, settings)
    if args.prompt is None:
        raise UserError("with --run this is required: --prompt; see glmv generate --help")
    if given := [name for name in ("messages", "token_ids", "json") if getattr(args, name)]:
        raise UserError(f"--{given[0].replace('_', '-')} goes with a public --checkpoint, not with a run")
    if len(images) > 1:
        raise UserError("with --run a question is about one picture; give one --image")
    run, image = args.run or args.checkpoint, images[0] if images else None
    print(generate_from_run(run, answering_model, image, args.prompt, **settings))
    return 0


def _is_own(folder: str) -> bool:
    """Whether it is a run of the recipe's, or the work directory of one of its stages, and nothing public."""
    from glmv_jax.inference.generate import last_stage
    from glmv_jax.train import exchange

    try:
        return not exchange.is_of_public(folder) and not exchange.is_of_public(last_stage(folder))
    except UserError:
        return False


def _generate_from_checkpoint(args: argparse.Namespace, images: list[str], settings: dict) -> int:
    from glmv_jax.data.processor import Processor, question, read_messages
    from glmv_jax.inference import public
    from glmv_jax.train import exchange

    if sum(given is not None for given in (args.prompt, args.messages, args.token_ids)) != 1:
        raise UserError("with --checkpoint give one of --prompt, --messages, --token-ids")
    processor = Processor(exchange.files(args.checkpoint))  # the prompt first: weights may take long
    if args.token_ids is not None:
        try:
            ids = [int(word) for word in args.token_ids.replace(",", " ").split()]
        except ValueError:
            raise UserError(f"--token-ids {args.token_ids} are no numbers; give for example 5,6,7") from None
        prompt = processor.document(ids, images)
    else:
        asked = question(args.prompt, len(images)) if args.messages is None else read_messages(args.messages)
        prompt = processor.conversation(asked, images)
    public.check_length(processor, prompt, settings["max_new_tokens"])
    cfg, params = exchange.load(args.checkpoint, args.dtype, settings["mesh"])
    answer = public.reply(cfg, params, processor, prompt, **settings)
    print(public.as_json(answer, processor) if args.json else public.as_text(answer, processor))
    return 0


def answering_model(folder: Path) -> Model:
    """The model of a finished stage's work directory, with the tokenizer and image sizes that it was trained with."""
    from glmv_jax.data.naflex import Patcher
    from glmv_jax.data.tokenizer import open_tokenizer
    from glmv_jax.inference.generate import Model
    from glmv_jax.models import build
    from glmv_jax.train import checkpoint, weights

    cfg = checkpoint.load_config(folder)
    model = build.vlm(cfg.model)
    if (vision := model.vision) is None:
        raise UserError(f"{folder}: its model has no vision encoder, and is none of the recipe's stages 3 to 5")
    sizes = dict(max_patches=cfg.data.image_patches, policy=cfg.data.get("sizing", "naflex"))
    patcher = Patcher(patch=vision.patch, temporal=vision.temporal_patch, **sizes)
    tokenizer = open_tokenizer(cfg.data.vocabulary or None)
    return Model(model, weights.load(folder), tokenizer, patcher, chat=cfg.stage != "pretrain")


def generate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--run", metavar="DIR", help="a recipe's run directory, as runs/quickstart, or a stage's")
    sub.add_argument("--checkpoint", metavar="DIR", help="a public checkpoint, imported or as it came, or a run")
    sub.add_argument("--image", action="append", nargs="+", metavar="FILE", help="pictures, in any format of Pillow")
    sub.add_argument("--prompt", metavar="TEXT", help="the question")
    sub.add_argument("--messages", metavar="FILE.json", help="a conversation, instead of --prompt")
    sub.add_argument("--token-ids", metavar="5,6,7", help="the prompt itself, instead of --prompt")
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="stop after this many (default 64)")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling, when the temperature is not 0")
    sub.add_argument("--speculative", type=int, default=0, metavar="K", help="tokens the MTP head drafts a pass (0)")
    sub.add_argument("--dtype", metavar="NAME", help="of a checkpoint: bfloat16 or float32 (default: as stored)")
    mesh_options(sub)
    sub.add_argument("--json", action="store_true", help="of a checkpoint: token ids and log-probabilities as JSON")

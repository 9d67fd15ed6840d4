"""`glmv serve`: a checkpoint over HTTP, in the wire formats of OpenAI and Anthropic."""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from glmv_jax.cli.common import mesh_of, mesh_options
from glmv_jax.typing import UserError

KEY = "GLMV_API_KEY"


def serve(args: argparse.Namespace) -> int:
    """Serves a checkpoint over HTTP: OpenAI's chat completions, Anthropic's messages, and a page at /.

      glmv serve --checkpoint runs/quickstart
      glmv serve --checkpoint checkpoints/glm-ocr --port 8000 --slots 32 --length 16384
      glmv serve --checkpoint checkpoints/glm-4.5v --slots 32 --mesh data=2 tensor=4

    --checkpoint takes a recipe's run directory (its last finished stage answers), one stage's work directory, what
    `glmv import-hf` wrote, a run that began from it, or a folder in Hugging Face layout. Any client of either API will
    do, with the base URL that is printed; an API key is asked for when the environment variable GLMV_API_KEY is set.
    --mesh spreads the model over devices: parameters are read straight to where they lie and are never gathered.
    Where a request names no temperature, --temperature does, or else answers are drawn as the model was trained (ours)
    or as its authors draw them (public ones); 0 gives the same answer each time, as `glmv generate` does.
    SIGTERM lets the answers that run end. /health and /metrics (Prometheus) are for those who watch it.

    As the rollout engine of a stage 5 (its rollout.engine is the URL) it takes new weights while it answers, from
    folders in --weights alone and with the key that both have in GLMV_API_KEY; --allow has it draw as the stage does:

      glmv serve --checkpoint runs/sft --weights runs/rl/weights --allow "<|begin_of_box|>" "<|end_of_box|>"
    """
    import asyncio

    try:
        from glmv_jax.serving import main
        from glmv_jax.serving.openai import MOST_LIKELY
        from glmv_jax.serving.weights import Weights
    except ImportError:
        raise UserError('serving takes starlette and uvicorn; pip install "glmv_jax[serve]"') from None
    from glmv_jax.inference.engine import Engine
    from glmv_jax.inference.front import Front
    from glmv_jax.inference.generate import check_settings
    from glmv_jax.inference.sampler import Sampling
    from glmv_jax.inference.settings import Settings
    from glmv_jax.serving.limits import Limits
    from glmv_jax.train import handover
    from glmv_jax.train.checkpoint import quiet_orbax

    quiet_orbax()
    limits = Limits(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Limits)})
    key = os.environ.get(KEY, "")
    if args.weights and not key:
        raise UserError(f"--weights lets others change what answers; set {KEY} here and for the trainer")
    check_settings(limits.tokens, args.temperature or 0.0, args.speculative)
    _check_address(args.host, args.port)
    mesh = mesh_of(args)
    began = time.monotonic()
    model, longest, load = _model(args.checkpoint, args.image_patches, args.dtype, mesh, args.films > 0)
    length = min(args.length, longest)
    settings = Settings(
        slots=args.slots, length=length, steps=args.steps, chunks=tuple(args.chunks),
        patches=_rows(args.image_patches), queue=limits.requests,
        pictures=max(4096, args.image_patches), drafts=args.speculative, likely=MOST_LIKELY,
        pixels=(model.patcher.channels, "uint8") if args.films else None,
    )  # fmt: skip
    sampling = model.sampling(limits.tokens)
    if args.allow is not None:
        sampling = Sampling.chat(model.tokenizer, limits.tokens, allow=_known(model.tokenizer, args.allow))
    if args.temperature is not None:
        sampling = dataclasses.replace(sampling, temperature=args.temperature)
    cfg, params = load()
    engine = Engine(cfg, None, sampling, settings, mesh=mesh)
    engine.set_params(params, 0, copy=False)
    _tell(f"{args.checkpoint} is loaded; compiling, which the next start is spared")
    engine.warm()
    _tell(f"ready after {time.monotonic() - began:.0f} s")
    weights = Weights(args.weights, handover.reader(params)) if args.weights else None
    names = args.name or [Path(args.checkpoint).resolve().name]
    with Front(engine) as front:
        say = lambda text: print(f"glmv serve: {text}", flush=True)  # noqa: E731
        asyncio.run(main.serve(front, model, names, host=args.host, port=args.port, key=key, limits=limits,
                               weights=weights, say=say))  # fmt: skip
    return 0


def serve_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--checkpoint", required=True, metavar="DIR", help="what answers")
    sub.add_argument("--name", nargs="+", metavar="NAME", help="what it is called (default: the folder's name)")
    sub.add_argument("--host", default="127.0.0.1", help="the address to listen at (default 127.0.0.1)")
    sub.add_argument("--port", type=int, default=8000, help="default 8000; 0 for any that is free")
    sub.add_argument("--dtype", metavar="NAME", help="of a public checkpoint: bfloat16 or float32 (default: as stored)")
    mesh_options(sub)
    sub.add_argument("--temperature", type=float, metavar="T", help="of requests that name none (default: the model's)")
    sub.add_argument("--slots", type=int, default=8, metavar="N", help="answers that decode together (default 8)")
    sub.add_argument("--length", type=int, default=8192, metavar="N", help="of prompt and answer in tokens (8192)")
    sub.add_argument("--steps", type=int, default=4, metavar="N", help="tokens between two looks at the queue (4)")
    sub.add_argument("--chunks", type=int, nargs="+", default=[16, 64, 256], metavar="N", help="tokens of a prompt "
                     "that are read at once, a program each (16 64 256)")  # fmt: skip
    sub.add_argument("--image-patches", type=int, default=4096, metavar="N", help="larger images are shrunk (4096)")
    sub.add_argument("--speculative", type=int, default=0, metavar="K", help="tokens the MTP head drafts a pass (0)")
    sub.add_argument("--weights", metavar="DIR", help="folder that a trainer's new weights come in (default: none do)")
    sub.add_argument("--allow", nargs="*", metavar="NAME", help="special tokens that answers may hold beside those "
                     "that end them (default: boxes, thinking and tool calls; a public checkpoint's: all)")  # fmt: skip
    for name, kind, default, about in (
        ("tokens", int, 1024, "of an answer, where the request does not say"),
        ("requests", int, 256, "answers that run or wait; more are refused"),
        ("choices", int, 16, "answers to one request"),
        ("body", int, 32 << 20, "bytes of a request"),
        ("images", int, 64, "images of a request"),
        ("pixels", int, 1 << 25, "pixels of an image, or of a frame of a film, as it is sent"),
        ("films", int, 0, "films of a request; with any, a patch of an image is as long as one of two frames"),
        ("frames", int, 10_000, "frames of a film as it is sent, of a megapixel each"),
        ("seconds", float, 600.0, "seconds of an answer"),
        ("drain", float, 25.0, "seconds that answers have left after SIGTERM"),
        ("ping", float, 10.0, "seconds between signs of life in a stream that waits"),
        ("connections", int, 1024, "open connections; requests on more are refused"),
        ("head", int, 64 << 10, "bytes of a request's headers"),
        ("reading", float, 20.0, "seconds in which a request has to come, and one more for each 4 KiB of its body"),
        ("keep_alive", float, 75.0, "seconds that a connection stays open without a request"),
    ):
        option, told = f"--{name.replace('_', '-')}", f"{default:,}" if kind is int else f"{default:g}"
        sub.add_argument(option, type=kind, default=default, metavar="N", help=f"{about} ({told})")
    sub.add_argument("--fetch", action="store_true", help="fetch images by URL, from public addresses (default: no)")


def _known(tokenizer: Any, names: list[str]) -> list[str]:
    """Names of special tokens, if they are."""
    if unknown := [name for name in names if name not in tokenizer.special]:
        raise UserError(f"--allow {unknown[0]}: the tokenizer has no such special token; it has "
                        f"{', '.join(tokenizer.special)}")  # fmt: skip
    return names


def _tell(text: str) -> None:
    """What goes on until requests can come; apart from standard output, whose first line is the address."""
    print(f"glmv serve: {text}", file=sys.stderr, flush=True)


def _check_address(host: str, port: int) -> None:
    """UserError for an address that cannot be listened at, before anything is loaded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]
        raise UserError(f"cannot listen at {host}:{port} ({why}); choose another --port or --host") from None


def _rows(most: int) -> tuple[int, ...]:
    """Lengths of the encoder's rows: quarters of quarters of the longest."""
    rows = [-(-most // 4) * 4]
    while rows[0] > 256:
        rows.insert(0, -(-rows[0] // 16) * 4)
    return tuple(rows)


def _model(checkpoint: str, patches: int, dtype: str | None, mesh: Any, films: bool) -> tuple[Any, int, Any]:
    """(how its prompts are written, how long they may be, what loads (cfg, params)). films: whether it is to take some.
    """
    from glmv_jax.cli.checkpoints import answering_model
    from glmv_jax.data.processor import Processor
    from glmv_jax.inference.generate import last_stage
    from glmv_jax.serving.model import Own, Public
    from glmv_jax.train import exchange
    from glmv_jax.train.checkpoint import load_config

    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; give a run or a checkpoint's folder")
    if not exchange.is_of_public(folder):
        folder = last_stage(folder)
    if exchange.is_of_public(folder):
        model = Public(Processor(exchange.files(folder), patches, moving=films))
        if films and (model.processor.video is None or not model.processor.films):
            raise UserError(f"--films: {folder} has no video_token_id: this model sees no films; leave --films out")
        return model, model.processor.longest, lambda: exchange.load(folder, dtype, mesh)
    found = answering_model(folder)
    patcher = dataclasses.replace(found.patcher, max_patches=min(found.patcher.max_patches, patches))
    model = Own(found.tokenizer, patcher)
    if films:
        data = load_config(folder).data
        if not data.get("video", False):
            raise UserError(f"--films: {folder} was not trained on films (data.video); leave --films out")
        patcher = dataclasses.replace(patcher, frames=patcher.temporal)
        sizes = {"film_frames": data.film_frames, "film_patches": min(data.film_patches, patches)}
        model = Own(found.tokenizer, patcher, **sizes)
    return model, 1 << 30, lambda: (found.cfg, found.params)

"""One answer from a trained run: find its last finished stage, build the prompt, sample, return the text."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from PIL import Image

from glmv_jax.data.building import Document, DocumentBuilder
from glmv_jax.data.chat import parse_answer
from glmv_jax.data.naflex import Patcher, load_image
from glmv_jax.data.records import Sample
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.requests import Completion, Prompt, Request
from glmv_jax.inference.sampler import Sampling
from glmv_jax.inference.settings import Settings
from glmv_jax.inference.text import answer_text
from glmv_jax.models import vlm
from glmv_jax.parallel.mesh import data_shards
from glmv_jax.typing import Params, UserError

# Stages whose result can answer, best first. The control `sft_more` is no product.
STAGES = ("rl", "sft", "pretrain")
MAX_PROMPT_TOKENS = 8192
# Sizes are rounded up to multiples of these, so that a conversation does not compile anew for every question.
BUCKET, PATCH_BUCKET = 64, 256
# Longest piece that a prompt is read in.
CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Model:
    """All that answering takes. chat: whether it knows the chat dialect (a model after pretraining completes text)."""

    cfg: vlm.VLMConfig
    params: Params
    tokenizer: Tokenizer
    patcher: Patcher
    chat: bool = True


def last_stage(run: str | pathlib.Path) -> pathlib.Path:
    """Folder of a recipe's last finished stage that can answer, or `run` itself if it is such a stage's. Raises
    UserError when there is none.

    A stage is finished when its results.json is there, which training writes after the last checkpoint.
    """
    run = pathlib.Path(run)
    if not run.is_dir():
        raise UserError(f"run {str(run)!r} does not exist; train one with launch/quickstart.sh or check the path")
    if (run / "config.json").is_file():
        return _one_stage(run)
    for stage in STAGES:
        if (run / stage / "results.json").is_file():
            return run / stage
    begun = [stage for stage in STAGES if (run / stage).is_dir()]
    state = f"stage {begun[0]} is not finished" if begun else f"no stage of {', '.join(STAGES[::-1])} has begun"
    raise UserError(f"run {str(run)!r} has no model that can answer: {state}; resume it with the command that began it")


def _one_stage(run: pathlib.Path) -> pathlib.Path:
    """The work directory of one stage, if it can answer."""
    try:
        stage = json.loads((run / "config.json").read_text(encoding="utf-8")).get("stage")
    except (ValueError, AttributeError):
        raise UserError(f"{run / 'config.json'} cannot be read; copy the run anew") from None
    if stage not in STAGES:
        raise UserError(f"run {str(run)!r} is of stage {stage}, which answers no questions; give one of stage "
                        f"{', '.join(STAGES[::-1])}")  # fmt: skip
    if not (run / "results.json").is_file():
        raise UserError(f"run {str(run)!r} is not finished; resume it with the command that began it")
    return run


def question(image: str | pathlib.Path | Image.Image | None, prompt: str) -> Sample:
    """A question about a picture (a file, a PIL image, or None).

    Raises UserError for an empty prompt and for a picture that is missing, broken or too large.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty; write a question after --prompt")
    images = (load_image(image),) if image is not None else ()
    return Sample("question", "question", images, prompt, "")


def generate(
    model: Model, asked: Sample, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0, drafts: int = 0,
    mesh: Mesh | None = None,
) -> str:  # fmt: skip
    """The model's answer to a `question`, without box tokens. drafts: tokens that the MTP head drafts a step. mesh:
    devices that share the model by the rules "serve".

    Raises UserError for a prompt that is too long, an image that is too elongated, and settings out of range.
    """
    check_settings(max_new_tokens, temperature, drafts)
    document = _document(model, asked)
    sampling = Sampling.chat(model.tokenizer, max_new_tokens, temperature=temperature)
    out = complete(model.cfg, model.params, document, sampling, seed=seed, drafts=drafts, mesh=mesh)
    return parse_answer(answer_text(model.tokenizer, out.tokens, sampling.stop))


def complete(
    cfg: vlm.VLMConfig, params: Params, document: Document, sampling: Sampling, *, seed: int, drafts: int,
    mesh: Mesh | None = None,
) -> Completion:  # fmt: skip
    """One answer, of a run or a public checkpoint.

    Raises UserError for drafts of a model without a head, and images for a model of text alone.
    """
    prompt = Prompt.of_document(document)
    longest = max((len(picture.patches) for picture in prompt.pictures), default=1)
    visual = sum(picture.merged for picture in prompt.pictures) or 1
    engine = _engine(
        cfg, sampling, drafts, _up(len(prompt.tokens), BUCKET) + sampling.max_new_tokens,
        _up(longest, PATCH_BUCKET), _up(visual, PATCH_BUCKET),
        (prompt.pictures[0].patches.shape[1], str(prompt.pictures[0].patches.dtype)) if prompt.pictures else None,
        mesh,
    )  # fmt: skip
    engine.set_params(params, 0, copy=False)
    done: list[Completion] = []
    engine.submit(Request(prompt, seed), done.append)
    engine.run()
    engine.release()
    return done[0]


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


@functools.lru_cache(maxsize=8)
def _engine(
    cfg: vlm.VLMConfig, sampling: Sampling, drafts: int, length: int, patches: int, pictures: int,
    pixels: tuple[int, str] | None, mesh: Mesh | None,
) -> Engine:  # fmt: skip
    """Of one row a data shard. Kept between questions, so that the second one does not compile again."""
    settings = Settings(
        slots=data_shards(mesh), length=length, alone=min(length, 256),
        chunks=tuple(sorted({min(length, n) for n in (BUCKET, CHUNK)})), patches=(patches,),
        pictures=pictures, pixels=pixels, drafts=drafts,
    )  # fmt: skip
    return Engine(cfg, None, sampling, settings, mesh=mesh)


def check_settings(max_new_tokens: int, temperature: float, drafts: int) -> None:
    """UserError for settings of an answer that are out of range."""
    if drafts < 0:
        raise UserError(f"speculative={drafts}: a number of drafts; 0 for none")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} asks for no answer; use at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature} is out of range; use 0 for the likeliest answer, 1 for a sample")


def _document(model: Model, asked: Sample) -> Document:
    limit = MAX_PROMPT_TOKENS + model.patcher.max_patches
    if len(model.tokenizer.encode(asked.prompt)) > MAX_PROMPT_TOKENS - 16:
        raise UserError(f"the prompt is longer than {MAX_PROMPT_TOKENS - 16} tokens; shorten it")
    builder = DocumentBuilder(model.tokenizer, model.patcher, limit, model.patcher.max_patches)
    if model.chat:
        return builder.prompt(asked)
    whole = builder.pretrain(asked)
    cut = {name: getattr(whole, name)[:-1] for name in ("tokens", "loss_weight", "image_of_token")}
    return dataclasses.replace(whole, **cut)  # without the end of text, which is what the model is to write


def generate_from_run(
    run: str | pathlib.Path,
    load: Callable[[pathlib.Path], Model],
    image: str | pathlib.Path | None,
    prompt: str,
    **settings: Any,
) -> str:
    """`generate` with the model that `load` reads from the folder of the run's last finished stage.

    The question is checked before anything is loaded. `load` raises UserError for a folder it cannot read.
    """
    asked = question(image, prompt)
    return generate(load(last_stage(run)), asked, **settings)

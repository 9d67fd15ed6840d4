"""The small files beside a public checkpoint: how its images are sized, which ids end an answer, its tokenizer.

Source: transformers 5 `models/glm46v/image_processing_pil_glm46v.py` and `processing_glm46v.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from glmv_jax.data import chat_template
from glmv_jax.data.building import Document
from glmv_jax.data.canvas import CanvasPatcher
from glmv_jax.data.naflex import Patcher, load_image, smart_resize
from glmv_jax.data.tokenizer_json import JsonTokenizer
from glmv_jax.data.video import Films
from glmv_jax.typing import CLIP_MEAN, CLIP_STD, UserError

# Pixels of an image and of a film, counted once a frame: what the processor classes have where nothing is said.
MIN_PIXELS, MAX_PIXELS, MAX_FILM_PIXELS = 112 * 112, 28 * 28 * 15000, 28 * 28 * 2 * 30000
MIN_TOKENS, MAX_TOKENS = 16, 8000  # visual tokens of an image of GLM-5.3-Flash, likewise

Source = str | pathlib.Path | bytes  # a file, or what is in it


@dataclasses.dataclass(frozen=True)
class PixelPatcher(Patcher):
    """A Patcher whose budget is in pixels, as the public processors count: a still image as `temporal` frames, a film
    as `shown`."""

    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    shown: int = 0

    def size(self, height: int, width: int) -> tuple[int, int]:
        return smart_resize(height, width, factor=self.patch * self.merge, frames=self.shown or self.temporal,
                            temporal=self.temporal, min_pixels=self.min_pixels, max_pixels=self.max_pixels)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """messages, tools: as the OpenAI API has them. settings: for the chat template, as enable_thinking."""

    messages: Any
    tools: Sequence[Mapping[str, Any]] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Processor:
    """Prompts of a public checkpoint.

    folder: where its config.json and the other small files are.   patches: of an image at most, where it may have more.
    moving: whether patches of images have as many frames as those of films, as both go to one engine.
    Raises UserError for a file that is broken, and for settings that the tower cannot follow.
    """

    folder: pathlib.Path
    patches: int | None = None
    moving: bool = False

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        return read_json(self.folder / "config.json")

    @functools.cached_property
    def generation(self) -> dict[str, Any]:
        return read_json(self.folder / "generation_config.json", {})

    @functools.cached_property
    def _text(self) -> dict[str, Any]:
        return self.config.get("text_config", self.config)

    @functools.cached_property
    def image(self) -> int | None:
        """The id of the image placeholder; None for a model of text alone."""
        return self.config.get("image_token_id")

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer: those of generation_config.json, else of config.json."""
        for source in (self.generation, self._text, self.config):
            found = source.get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (found,)
        return ()

    @functools.cached_property
    def video(self) -> int | None:
        """The id of the placeholder of a film; None for a model that sees none."""
        return self.config.get("video_token_id")

    @functools.cached_property
    def longest(self) -> int:
        """How many positions the model was made for, prompt and answer together."""
        return self._text.get("max_position_embeddings", 1 << 30)

    @functools.cached_property
    def patcher(self) -> Patcher:
        """Images to patches as the checkpoint's own processor cuts them."""
        said = read_json(self.folder / "preprocessor_config.json", None)
        if said is None:
            said = read_json(self.folder / "processor_config.json", {}).get("image_processor", {})
        return self._patcher(said, MAX_PIXELS)

    @functools.cached_property
    def films(self) -> Films:
        """Films to patches as the checkpoint's own processor cuts them. UserError where that is not known."""
        if self.config.get("model_type") == "glm5_next":
            raise UserError(f"{self.folder}: films of GLM-5.3-Flash are not supported; give pictures of their frames")
        said = read_json(self.folder / "processor_config.json", {}).get("video_processor")
        for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
            said = read_json(self.folder / name, None) if said is None else said
        said = said or {}
        return Films.of(self._patcher(said, MAX_FILM_PIXELS), said, self.config.get("model_type", ""))

    def _patcher(self, said: dict[str, Any], most: int) -> Patcher:
        """Of the settings of an image or video processor; most: pixels, where they say nothing."""
        vision = self.config.get("vision_config")
        if vision is None:
            raise UserError(f"{self.folder / 'config.json'} has no vision_config: this model sees no images; leave out "
                            "--image")
        wants = {"patch_size": vision["patch_size"], "temporal_patch_size": vision["temporal_patch_size"],
                 "merge_size": vision["spatial_merge_size"]}  # fmt: skip
        wants |= {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD), "resample": 3, "rescale_factor": 1 / 255,
                  "do_resize": True, "do_rescale": True, "do_normalize": True}  # fmt: skip
        for name, want in wants.items():
            if not np.allclose(said.get(name, want), want):
                raise UserError(f"{self.folder}: the image processor has {name}={said[name]}, but only {want} is "
                                "supported")
        patch, merge, temporal = wants["patch_size"], wants["merge_size"], wants["temporal_patch_size"]
        if self.config.get("model_type") == "glm5_next":
            least, most = said.get("min_image_tokens", MIN_TOKENS), said.get("max_image_tokens", MAX_TOKENS)
            most = min(most, (self.patches or most * merge**2) // merge**2)
            return CanvasPatcher(patch=patch, merge=merge, temporal=temporal, policy="smart",
                                 max_patches=most * merge**2, min_patches=least * merge**2)
        size = said.get("size", {})
        low = size.get("shortest_edge", said.get("min_pixels", MIN_PIXELS))
        high = size.get("longest_edge", said.get("max_pixels", most))
        high = min(high, (self.patches or high) * temporal * patch**2)
        budget = max(high // (temporal * patch**2), merge**2)
        return PixelPatcher(patch=patch, merge=merge, temporal=temporal, policy="smart", max_patches=budget,
                            min_pixels=low, max_pixels=high, frames=temporal if self.moving else 1)

    @functools.cached_property
    def tokenizer(self) -> JsonTokenizer | None:
        """The checkpoint's tokenizer.json; None where there is none."""
        path = self.folder / "tokenizer.json"
        return JsonTokenizer(path) if path.is_file() else None

    def conversation(self, asked: Conversation, images: Sequence[Any] = (), films: Sequence[Source] = ()) -> Document:
        """A prompt of messages, rendered as the checkpoint wants it, ready for an answer.

        images, films: of the placeholders that name none, in reading order.
        Raises UserError for a checkpoint without a tokenizer and as `chat_template` and `document`.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.folder} has no tokenizer.json; copy it there, or give --token-ids")
        checked = chat_template.checked(asked.messages)
        images, films = chat_template.media(asked.messages, images, films)
        render = chat_template.of_checkpoint(self.folder, self.config.get("model_type", ""))
        ids = chat_template.prompt_ids(render, self.tokenizer, checked, asked.tools, **asked.settings)
        return self.document(ids, images, films)

    def document(self, ids: Sequence[int], images: Sequence[Source | Image.Image] = (), films: Sequence[Source] = ()
                 ) -> Document:
        """A prompt of token ids with images and films.

        ids: each image has one placeholder, which becomes as many as the image has visual tokens, or all of them; each
            film has one of its own kind, which becomes an image and a time for every group of its frames.
        Raises UserError for ids out of range, films that cannot be read, and when placeholders and images, or films,
            differ in number.
        """
        ids = np.asarray(ids, np.int64)
        if not ids.size:
            raise UserError("the prompt is empty; give at least one token")
        vocab = self._text["vocab_size"]
        if wrong := ids[(ids < 0) | (ids >= vocab)].tolist():
            raise UserError(f"token id {wrong[0]} is not in the vocabulary of {vocab}; give ids from 0 to {vocab - 1}")
        if films and self.video is None:
            raise UserError(f"{self.folder / 'config.json'} has no video_token_id: this model sees no films; leave "
                            "them out")
        count = int((ids == self.video).sum()) if self.video is not None else 0
        if count != len(films):
            raise UserError(f"the prompt has {count} video placeholders, but {len(films)} films were given; name one "
                            "in the messages for each")
        if films:
            ids, pictures = self._with_films(ids, images, films)
        else:
            pictures = [self.patcher(load_image(image)) for image in images]
        merged = [len(patches) // self.patcher.merge**2 for patches, _ in pictures]
        is_image = ids == self.image if self.image is not None else np.zeros(len(ids), bool)
        count = int(is_image.sum())
        if count not in (len(pictures), sum(merged)):
            raise UserError(f"the prompt has {count} image placeholders, but {len(pictures)} images were given (of "
                            f"{sum(merged)} visual tokens); give one image for each placeholder")
        repeats = np.ones(len(ids), np.int64)
        if count == len(pictures):
            repeats[is_image] = merged
        tokens = np.repeat(ids, repeats).astype(np.int32)
        image_of_token = np.full(len(tokens), -1, np.int32)
        image_of_token[np.repeat(is_image, repeats)] = np.repeat(np.arange(len(merged)), merged)
        return Document(tokens, np.zeros(len(tokens), np.float32), image_of_token, tuple(pictures), "prompt", "prompt")

    def _with_films(self, ids: np.ndarray, images: Sequence[Any], films: Sequence[Any]) -> tuple[np.ndarray, list]:
        """The ids with each film as the images of its groups of frames, a time after each, and the patches of all
        images in reading order; those of stills have as many frames."""
        if self.tokenizer is None:
            raise UserError(f"{self.folder} has no tokenizer.json, which the times in a film are written with; copy it "
                            "there")
        begin, end = (self.tokenizer.special[f"<|{name}_of_image|>"] for name in ("begin", "end"))
        if (count := int((ids == self.image).sum())) != len(images):
            raise UserError(f"the prompt has {count} image placeholders, but {len(images)} images were given; give one "
                            "image for each placeholder")
        still = dataclasses.replace(self.patcher, frames=self.patcher.temporal)
        waiting, moving = iter(images), iter(films)
        shown: list[int] = []
        pictures = []
        image: Any = self.image
        for i in ids.tolist():
            if i == self.video:
                for time, patched in self.films(next(moving)):
                    shown += [begin, image, end, *self.tokenizer.encode(time)]
                    pictures.append(patched)
                continue
            shown.append(i)
            if i == self.image:
                pictures.append(still(load_image(next(waiting))))
        return np.array(shown, np.int64), pictures


def question(text: str, images: int) -> Conversation:
    """A question about pictures. UserError when it is empty."""
    if not text.strip():
        raise UserError("the prompt is empty; write a question after --prompt")
    parts = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return Conversation([{"role": "user", "content": parts if images else text}])


def read_messages(path: str | pathlib.Path) -> Conversation:
    """From a JSON file: a list of messages, or an object as the OpenAI API takes it, with "messages" and, if there are
    any, "tools" and "chat_template_kwargs". UserError for anything else."""
    found = read_json(pathlib.Path(path))
    if isinstance(found, list):
        return Conversation(found)
    if not isinstance(found, dict) or "messages" not in found:
        raise UserError(f"{path} holds no messages; write a list of them, or an object with \"messages\"")
    tools, settings = found.get("tools") or [], found.get("chat_template_kwargs") or {}
    if not isinstance(tools, list) or not isinstance(settings, dict):
        raise UserError(f"{path}: \"tools\" has to be a list and \"chat_template_kwargs\" an object")
    return Conversation(found["messages"], tools, settings)


_MISSING = object()


def read_json(path: pathlib.Path, default: Any = _MISSING) -> Any:
    """The JSON of a file; `default` where there is no file. UserError when it is broken, or there is no default."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is not _MISSING:
            return default
        raise UserError(f"{path} is missing; give the folder of a whole checkpoint") from None
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({reason}); write or download it again") from None

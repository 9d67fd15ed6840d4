"""Films in a prompt against transformers: which frames are shown, their pixels, the text around them, and the answer.

Frames are read by transformers' own `read_video_pyav`. Not covered: its other decoders, torchvision's resizing (that of
torch stands in for it, and is met within a level), released weights.
"""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

pytest.importorskip("av")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from glmv_jax import cli  # noqa: E402
from glmv_jax.data.processor import Conversation, Processor  # noqa: E402
from glmv_jax.models.cogvit import normalised  # noqa: E402
from glmv_jax.typing import CLIP_STD, UserError  # noqa: E402
from tests.data import json_vocabulary, video_oracle  # noqa: E402
from tests.data.local import examples  # noqa: E402
from tests.inference.test_public import TEMPLATES, image_processor, picture, stops, write_talking  # noqa: E402

PIXELS = {"shortest_edge": 8 * 8 * 2, "longest_edge": 32 * 24 * 40}


def write_films(folder, family: str, **size) -> None:
    """What a checkpoint says of films."""
    said = {"video_processor_type": {"glm4v": "Glm4vVideoProcessor", "glm46v": "Glm46VVideoProcessor"}[family]}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(said | {"size": PIXELS | size}))


def read(family: str, path, **size):
    """(patches, grid, its metadata) of a film, by transformers."""
    from transformers.video_utils import read_video_pyav

    about = types.SimpleNamespace(temporal_patch_size=2, fps=2, max_duration=300)
    sample = video_oracle.functions(family)["sample_frames"]
    frames, metadata = read_video_pyav(str(path), lambda metadata, **_: sample(about, metadata))
    assert len(frames) % 2 == 0
    patches, grid = video_oracle.pixels(family, frames.transpose(0, 3, 1, 2), PIXELS | size, patch=4)
    return patches, grid, metadata


def spelt(family: str, text: str, films, images) -> str:
    """The prompt's text with its placeholders as their processor writes them. films: (grid, metadata) each; images:
    visual tokens of each."""
    if family == "glm4v":
        from transformers.models.glm4v.processing_glm4v import Glm4vProcessor as Theirs
    else:
        from transformers.models.glm46v.processing_glm46v import Glm46VProcessor as Theirs
    processor = Theirs.__new__(Theirs)
    processor.image_token, processor.video_processor = "<|image|>", types.SimpleNamespace(merge_size=2)
    for merged in images:
        text = text.replace("<|image|>", "<|IMAGE|>" * merged, 1)
    for grid, metadata in films:
        given = {"video_grid_thw": np.array([grid]), "video_metadata": [metadata]}
        text = text.replace("<|video|>", processor.replace_video_token(given, 0), 1)
    return text.replace("<|IMAGE|>", "<|image|>")


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize(("family", "model_type"), [("glm4v", "glm4v_moe"), ("glm46v", "glm_ocr")])
def test_prompts_are_those_of_their_processors(tmp_path, family, model_type, resized):
    more = {"longest_edge": 16 * 16 * 8} if resized else {}
    json_vocabulary.write(tmp_path, **{"chat_template.jinja": (TEMPLATES / "spaced.jinja").read_text()})
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    image, video = tokenizer.convert_tokens_to_ids(["<|image|>", "<|video|>"])
    vision = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    config = {"model_type": model_type, "image_token_id": image, "video_token_id": video, "vision_config": vision,
              "text_config": {"vocab_size": 512}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    image_processor().save_pretrained(tmp_path)
    write_films(tmp_path, family, **more)
    film, other = tmp_path / "a.mp4", tmp_path / "b.mp4"
    film.write_bytes(examples.film(4.0, 10, (32, 24), 60))
    other.write_bytes(examples.film(2.0, 24, (40, 32), 60))
    content = [{"type": "video_url", "video_url": {"url": str(film)}}, {"type": "text", "text": "the cat?"},
               {"type": "image"}, {"type": "video", "video": str(other)}]  # fmt: skip
    asked = Conversation([{"role": "user", "content": content}])
    got = Processor(tmp_path).conversation(asked, [picture(tmp_path / "p.png", 24, 16)])

    films = [read(family, path, **more) for path in (film, other)]
    plain = [{"type": part["type"].removesuffix("_url"), "text": part.get("text")} for part in content]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": plain}], tokenize=False, add_generation_prompt=True
    )
    text = spelt(family, text, [(grid, metadata) for _, grid, metadata in films], [24 * 16 // 64])
    assert got.tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ("seconds<" in text) == (family == "glm46v")
    first, last = got.images[: films[0][1][0]], got.images[-films[1][1][0] :]
    shown = [np.concatenate([p for p, _ in groups]) for groups in (first, last)]
    level = 1.01 / 255 / min(CLIP_STD) if resized else 2e-6
    for patches, (want, grid, _) in zip(shown, films, strict=True):
        assert len(patches) == np.prod(grid)
        np.testing.assert_allclose(normalised(patches, 3, 2, 4), want, atol=level)
    assert got.image_of_token.max() + 1 == len(got.images) == films[0][1][0] + films[1][1][0] + 1


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    folder, model, tokenizer = write_talking(tmp_path_factory.mktemp("films") / "hf")
    write_films(folder, "glm46v")
    (folder.parent / "a.mp4").write_bytes(examples.film(1.0, 12, (32, 24), 60))
    return folder, model, tokenizer


def test_answers_about_films_are_theirs(talking, capsys):
    folder, model, tokenizer = talking
    film = folder.parent / "a.mp4"
    content = [{"type": "text", "text": "What?"}, {"type": "video", "video": str(film)}]
    got = answered(capsys, folder, content)
    patches, grid, metadata = read("glm46v", film)
    text = prompt(tokenizer, content, [(grid, metadata)], [])
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(
        ids, pixel_values_videos=patches, video_grid_thw=torch.tensor([grid]), max_new_tokens=6, do_sample=False,
        mm_token_type_ids=2 * (ids == model.config.image_token_id).int(), eos_token_id=stops(tokenizer), pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    new = out.sequences[0, ids.shape[1] :].tolist()
    assert got["token_ids"] == new
    logprobs = [float(torch.log_softmax(x[0].double(), -1)[i]) for x, i in zip(out.logits, new)]
    np.testing.assert_allclose(got["logprobs"], logprobs, atol=2e-4)


def test_answers_about_a_film_and_a_picture_are_theirs(talking, capsys, tmp_path):
    """transformers takes no such prompt whole: its parts are put together here, and asked once for all tokens."""
    folder, model, tokenizer = talking
    film, still = folder.parent / "a.mp4", picture(tmp_path / "p.png", 24, 16)
    content = [{"type": "image", "image": still}, {"type": "video", "video": str(film)}, {"type": "text", "text": "?"}]
    got = answered(capsys, folder, content)
    patches, grid, metadata = read("glm46v", film)
    pixels = dict(image_processor()([examples.Image.open(still)], return_tensors="pt"))
    text = prompt(tokenizer, content, [(grid, metadata)], [6])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([ids + got["token_ids"]])
    kinds = (ids == model.config.image_token_id).int() * 2
    kinds[0, (kinds[0] > 0).nonzero()[:6]] = 1
    inner = model.model
    with torch.no_grad():
        x = inner.get_input_embeddings()(ids)
        x[kinds == 1] = torch.cat(inner.get_image_features(**pixels).pooler_output)
        x[kinds == 2] = torch.cat(inner.get_video_features(patches, torch.tensor([grid])).pooler_output)
        grids = {"image_grid_thw": pixels["image_grid_thw"], "video_grid_thw": torch.tensor([grid])}
        positions, _ = inner.get_rope_index(ids, kinds, **grids)
        logits = model(inputs_embeds=x, position_ids=positions).logits[0, -len(got["token_ids"]) - 1 : -1].double()
    assert logits.argmax(-1).tolist() == got["token_ids"]
    want = torch.log_softmax(logits, -1).gather(1, ids[0, -len(logits) :, None])[:, 0]
    np.testing.assert_allclose(got["logprobs"], want, atol=2e-4)


def answered(capsys, folder, content) -> dict:
    (folder.parent / "chat.json").write_text(json.dumps([{"role": "user", "content": content}]))
    capsys.readouterr()
    argv = ["--checkpoint", folder, "--messages", folder.parent / "chat.json", "--max-new-tokens", 6, "--json"]
    assert cli.main(["generate", *map(str, argv)]) == 0
    return json.loads(capsys.readouterr().out)


def prompt(tokenizer, content, films, images) -> str:
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return spelt("glm46v", text, films, images)


def test_wrong_films_are_one_line(talking, tmp_path):
    processor = Processor(talking[0])

    def refused(video, match: str, of: Processor = processor) -> None:
        content = [{"type": "video", **({"video": video} if video else {})}]
        with pytest.raises(UserError, match=match) as error:
            of.conversation(Conversation([{"role": "user", "content": content}]))
        assert "\n" not in str(error.value)

    film = (talking[0].parent / "a.mp4").read_bytes()
    (tmp_path / "short.mp4").write_bytes(film[: len(film) // 2])
    (tmp_path / "text.mp4").write_text("no film")
    refused(None, "names no file")
    refused(str(tmp_path / "none.mp4"), "none.mp4' cannot be read")
    refused(str(tmp_path / "short.mp4"), "short.mp4.*broken or cut short")
    refused(str(tmp_path / "text.mp4"), "text.mp4.*broken or cut short")
    refused("https://x.org/a.mp4", "download the video")
    with pytest.raises(UserError, match="1 video placeholders, but 0 films"):
        processor.document([5, talking[1].config.video_token_id])
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        (tmp_path / name).write_text((talking[0] / name).read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"video_token_id": None}))
    refused(str(talking[0].parent / "a.mp4"), "sees no films", Processor(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "video_preprocessor_config.json").write_text('{"video_processor_type": "OtherVideoProcessor"}')
    refused(str(talking[0].parent / "a.mp4"), "'OtherVideoProcessor' is not known", Processor(tmp_path))


def test_a_family_whose_films_are_unknown_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm5_next", "vision_config": {}}))
    with pytest.raises(UserError, match="films of GLM-5.3-Flash are not supported"):
        _ = Processor(tmp_path).films

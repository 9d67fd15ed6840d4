"""Films through the server: the prompt is that of training, or the library's for a public checkpoint, of the same file.

Not covered: what a model says of a film (`tests/inference/test_films.py` is about that).
"""

from __future__ import annotations

import base64
import io
import json

import httpx
import numpy as np
import pytest

pytest.importorskip("av")

from glmv_jax.data.building import DocumentBuilder  # noqa: E402
from glmv_jax.data.chat_template import checked  # noqa: E402
from glmv_jax.data.local import schema  # noqa: E402
from glmv_jax.data.local.assembling import Assembler  # noqa: E402
from glmv_jax.data.processor import Conversation, Processor  # noqa: E402
from glmv_jax.inference.requests import Prompt  # noqa: E402
from glmv_jax.serving import anthropic, openai  # noqa: E402
from glmv_jax.serving.model import Own, Public  # noqa: E402
from glmv_jax.typing import UserError  # noqa: E402
from tests.data import json_vocabulary  # noqa: E402
from tests.data.local import examples  # noqa: E402
from tests.data.test_chat_template import TEMPLATES  # noqa: E402
from tests.serving import parrot  # noqa: E402
from tests.serving.test_limits import http_client, limit  # noqa: E402, F401
from tests.serving.test_openai import data_uri  # noqa: E402

FILM = examples.film(seconds=2.0, rate=6, size=(32, 24), texture=40)


def uri(film: bytes = FILM) -> str:
    return "data:video/mp4;base64," + base64.b64encode(film).decode()


def asked(*films: str) -> list[dict]:
    """A film, words, a picture and words."""
    parts = [{"type": "video_url", "video_url": {"url": film}} for film in films]
    words = lambda text: {"type": "text", "text": text}  # noqa: E731
    return [
        {"role": "user", "content": [*parts, words("and "), {"type": "image_url", "image_url": {"url": data_uri()}},
                                     words("?")]}
    ]  # fmt: skip


def post(client, messages, **more) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": parrot.NAME, "messages": messages} | more)


def test_a_film_is_shown_as_in_training(bird, http_client):  # noqa: F811
    """The prompt is the beginning of what the data pipeline makes of the same conversation with an answer."""
    said, encoded = bird.say("lighter"), bird.engine.counts.encoded
    reply = post(http_client, asked(uri()), return_token_ids=True).json()
    assert reply["choices"][0]["token_ids"] == said
    content = [{"type": "video", "video": FILM}, *asked()[0]["content"]]
    content[2] = {"type": "image", "image": data_uri()}
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "lighter"}]
    record = schema.parse({"messages": messages}, "r", lambda name: b"")
    model = bird.answers.model
    assembler = Assembler(DocumentBuilder(parrot.TOKENIZER, model.patcher, 512, 512), film_patches=model.film_patches,
                          film_frames=model.film_frames)  # fmt: skip
    (document,) = assembler.documents(record)
    assert reply["prompt_token_ids"] == document.tokens[: len(reply["prompt_token_ids"])].tolist()
    assert len(document.images) == 4 + 1 == bird.engine.counts.encoded - encoded
    prompt = model.prompt(checked(asked(uri())), [examples.Image.open(_file(data_uri()))], (), None, [FILM])
    shown = [(picture.patches, picture.yx) for picture in prompt.pictures]
    for (patches, yx), (wanted, at) in zip(shown, document.images, strict=True):
        np.testing.assert_array_equal(patches, wanted)
        np.testing.assert_array_equal(yx, at)


def _file(url: str) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(url.partition(",")[2]))


@pytest.fixture
def public(tmp_path):
    """A folder with the small files of a checkpoint that sees films."""
    json_vocabulary.write(tmp_path, **{"chat_template.jinja": (TEMPLATES / "spaced.jinja").read_text()})
    special = Processor(tmp_path).tokenizer.special
    config = {"model_type": "glm_ocr", "image_token_id": special["<|image|>"], "video_token_id": special["<|video|>"],
              "vision_config": {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2},
              "text_config": {"vocab_size": 512}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "film.mp4").write_bytes(FILM)
    return tmp_path


def test_a_public_checkpoint_is_asked_as_by_the_library(public):
    messages = asked(uri())
    image = examples.Image.open(_file(data_uri())).convert("RGB")
    got = Public(Processor(public, 256, moving=True)).prompt(checked(messages), [image], (), None, [FILM])
    wanted = Processor(public, 256).conversation(Conversation(asked(str(public / "film.mp4"))))
    assert got.tokens.tolist() == wanted.tokens.tolist() and len(got.pictures) == 6 + 1
    assert [p.digest for p in got.pictures] == [p.digest for p in Prompt.of_document(wanted).pictures]
    still = Public(Processor(public, 256, moving=True)).prompt(checked(asked()), [image], (), None)
    (alone,), (beside,) = still.pictures, got.pictures[-1:]
    assert alone.digest == beside.digest  # also without a film, for one engine takes both


def blocks(*sources: dict) -> list[dict]:
    """`asked` as blocks of Anthropic's messages."""
    words = lambda text: {"type": "text", "text": text}  # noqa: E731
    image = {"type": "image", "source": {"type": "url", "url": data_uri()}}
    return [*({"type": "video", "source": source} for source in sources), words("and "), image, words("?")]


BASE64 = {"type": "base64", "media_type": "video/mp4", "data": uri().partition(",")[2]}


@pytest.mark.parametrize("source", [BASE64, {"type": "url", "url": uri()}], ids=["base64", "url"])
def test_a_film_in_anthropics_messages_is_the_same_prompt(bird, http_client, source):  # noqa: F811
    bird.say("lighter")
    limits = bird.answers.limits
    body = {"model": parrot.NAME, "max_tokens": 8, "messages": [{"role": "user", "content": blocks(source)}]}
    one, other = (form.asked(body | {"messages": said}, limits)
                  for form, said in ((anthropic, body["messages"]), (openai, asked(uri()))))  # fmt: skip
    assert one.messages == other.messages and one.films == other.films == [FILM]
    reply = http_client.post("/v1/messages", json=body)
    assert reply.status_code == 200 and reply.json()["content"][0]["text"] == "lighter"
    wanted = post(http_client, asked(uri()), max_tokens=8).json()["usage"]["prompt_tokens"]
    assert reply.json()["usage"]["input_tokens"] == wanted
    counted = http_client.post("/v1/messages/count_tokens", json=body).json()
    assert counted == {"input_tokens": wanted}


def test_a_film_may_be_the_result_of_a_tool(bird, http_client, limit):  # noqa: F811
    bird.say("x")
    result = {"type": "tool_result", "tool_use_id": "t", "content": blocks(BASE64)[:1]}
    use = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
    messages = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": [use]},
                {"role": "user", "content": [result]}]  # fmt: skip
    send = lambda: http_client.post("/v1/messages", json={"model": parrot.NAME, "max_tokens": 4,  # noqa: E731
                                                          "messages": messages})  # fmt: skip
    assert send().status_code == 200
    limit(films=0)
    refused = send()
    assert refused.status_code == 400 and refused.json()["error"]["type"] == "invalid_request_error"
    assert "no films are taken; leave it out, or serve with a greater --films" in refused.json()["error"]["message"]
    result["content"] = [{"type": "video_url", "video_url": {"url": uri()}}]
    assert "'video_url', which is not served; use text, image or video" in send().json()["error"]["message"]


def test_what_is_refused(bird, http_client, limit, public, monkeypatch):  # noqa: F811
    bird.say("x")
    said = lambda *films: post(http_client, asked(*films)).json()["error"]["message"]  # noqa: E731
    assert "more than 1 films in a request" in said(uri(), uri())
    for wrong in (str(public / "film.mp4"), f"file://{public / 'film.mp4'}"):
        assert "is no data: URL" in said(wrong)
    monkeypatch.chdir(public)  # a list of files is a film to FFmpeg, also of those that lie here
    for wrong in (FILM[: len(FILM) // 2], b""):
        assert "broken or cut short" in said(uri(wrong))
    assert "in none of the forms" in said(uri(b"ffconcat version 1.0\nfile film.mp4\n"))
    limit(frames=11)
    assert "more than 11 frames" in said(uri())
    large = examples.film(seconds=1.0, rate=2, size=(2048, 1024))
    limit(frames=3)
    assert "more than 1 frames" in said(uri(large))
    limit(frames=4)
    assert post(http_client, asked(uri(large))).status_code == 200
    limit(frames=12, pixels=32 * 24 - 1)
    assert "more than 767 pixels" in said(uri())
    limit(films=0)
    assert "no films are taken" in said(uri())
    with pytest.raises(UserError, match="was not trained on films"):
        Own(parrot.TOKENIZER, bird.answers.model.patcher).prompt(checked(asked(uri())), [], (), None, [FILM])

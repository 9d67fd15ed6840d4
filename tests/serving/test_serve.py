"""`glmv serve` as a process: a public checkpoint, imported, and what SIGTERM does to answers that run.

On four emulated devices, with drafts of a head that has not learnt to: neither changes an answer. Not covered: a run of
ours as a process (its prompts and its engine are those of the other tests).
"""

from __future__ import annotations

import base64
import io
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import httpx
import openai
import pytest

pytest.importorskip("av")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from glmv_jax import cli  # noqa: E402
from glmv_jax.cli import serving  # noqa: E402
from glmv_jax.data.naflex import load_image  # noqa: E402
from glmv_jax.data.processor import Conversation, Processor  # noqa: E402
from glmv_jax.inference import public  # noqa: E402
from glmv_jax.train import exchange  # noqa: E402
from tests.data.local import examples  # noqa: E402
from tests.hosts import alone  # noqa: E402
from tests.inference.test_films import write_films  # noqa: E402
from tests.inference.test_public import stops, theirs, write_talking  # noqa: E402
from tests.interop import hf_glm_ocr  # noqa: E402
from tests.serving.test_openai import data_uri, picture  # noqa: E402

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A checkpoint that transformers wrote, imported; its model and its tokenizer."""
    parent = tmp_path_factory.mktemp("served")
    _, model, tokenizer = write_talking(parent / "hf")
    hf_glm_ocr.add_mtp(parent / "hf", 1)
    write_films(parent / "hf", "glm46v")
    exchange.import_hf(parent / "hf", parent / "ours")
    return parent / "ours", model, tokenizer


def test_a_public_checkpoint_answers_as_transformers_does_and_a_running_answer_outlives_sigterm(served, tmp_path):
    folder, model, tokenizer = served
    log = (tmp_path / "log").open("w+")
    options = ["--port", "0", "--slots", "2", "--length", "640", "--image-patches", "64", "--name", "it",
               "--steps", "2", "--chunks", "64", "--mesh", "data=2", "tensor=2", "--speculative", "2",
               "--films", "1"]  # fmt: skip
    flags = f"{alone()} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(REPO), "GLMV_API_KEY": "k"}
    process = subprocess.Popen(
        [sys.executable, "-m", "glmv_jax.cli", "serve", "--checkpoint", folder, *options],
        stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert (url := re.search(r"it at (http://127\.0\.0\.1:\d+/v1)$", line.strip())), log.seek(0) or log.read()
        page = re.search(r"a page to talk to it: (http://\S+/)$", process.stdout.readline().strip())
        assert httpx.get(page[1]).headers["content-type"].startswith("text/html"), "what is told is a page's address"
        with openai.OpenAI(base_url=url[1], api_key="k", max_retries=0) as client:
            messages = [{"role": "user", "content": [picture(), {"type": "text", "text": "the cat?"}]}]
            ask = lambda **settings: client.chat.completions.create(  # noqa: E731
                model="it", messages=messages, temperature=0, **settings
            )
            answer = ask(max_tokens=8, extra_body={"return_token_ids": True})
            assert tokenizer.decode(answer.prompt_token_ids).count("<|user|>") == 1
            (tmp_path / "a.png").write_bytes(base64.b64decode(data_uri().partition(",")[2]))
            wanted, _ = theirs(model, answer.prompt_token_ids, [tmp_path / "a.png"], 8,
                               tokenizer.convert_tokens_to_ids("<|image|>"), stops(tokenizer))  # fmt: skip
            assert answer.choices[0].token_ids == wanted

            png, patcher = io.BytesIO(), Processor(exchange.files(folder), 64).patcher
            patcher.resize(load_image(tmp_path / "a.png")).save(png, "PNG")
            asked = {"prompt": answer.prompt_token_ids, "max_tokens": 8, "temperature": 0, "return_token_ids": True,
                     "images": ["data:;base64," + base64.b64encode(png.getvalue()).decode()]}  # fmt: skip
            by_ids = httpx.post(f"{url[1]}/completions", json=asked | {"model": "it"}, headers={"x-api-key": "k"})
            assert by_ids.json()["choices"][0]["token_ids"] == wanted, "ids with their image are the conversation"

            counted = httpx.get(url[1].replace("/v1", "/metrics")).text
            assert int(re.search(r"^glmv_engine_drafts_judged_total (\d+)$", counted, re.MULTILINE)[1]) > 0
            film = base64.b64encode(examples.film(1.0, 12, (32, 24), 60)).decode()
            messages = [{"role": "user", "content": [
                {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{film}"}},
                {"type": "text", "text": "What?"}]}]  # fmt: skip
            answer = ask(max_tokens=8, extra_body={"return_token_ids": True})
            processor = Processor(exchange.files(folder), 64)
            asked = processor.conversation(Conversation(messages))
            by_library = public.reply(*exchange.load(folder)[:2], processor, asked, max_new_tokens=8)
            assert answer.prompt_token_ids == asked.tokens.tolist() and len(asked.images) == 3
            assert answer.choices[0].token_ids == by_library.token_ids

            stream = ask(max_tokens=500, stream=True, stream_options={"include_usage": True})
            next(iter(stream))
            process.send_signal(signal.SIGTERM)
            chunks = list(stream)
            assert chunks[-1].usage.completion_tokens >= 1 and chunks[-2].choices[0].finish_reason in ("length", "stop")
        assert process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url[1].replace("/v1", "/health"))
    finally:
        process.kill()
        process.wait()
        log.close()


@pytest.mark.parametrize(("change", "said"), [
    (["--checkpoint", "nowhere"], "does not exist"), (["--requests", "0"], "limit requests=0"),
    (["--checkpiont", "x"], "unknown option"), (["--weights", "w"], "set GLMV_API_KEY here and for the trainer"),
    (["--allow", "<|nope|>"], "no such special token"), (["--temperature", "-1"], "temperature=-1.0 is out of range"),
    (["--allow", "<|nope|>"], "no such special token"), (["--films", "-1"], "limit films=-1"),
])  # fmt: skip
def test_wrong_options_are_one_line(served, capsys, monkeypatch, change, said):
    monkeypatch.delenv(serving.KEY, raising=False)
    given = ["serve", "--checkpoint", str(served[0]), *change]
    assert cli.main(given) == 2
    assert said in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_an_address_that_is_taken_is_said_before_anything_is_loaded(served, capsys, monkeypatch):
    monkeypatch.setattr(serving, "_model", lambda *_: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert cli.main(["serve", "--checkpoint", str(served[0]), "--port", port]) == 2
    assert f"cannot listen at 127.0.0.1:{port} (Address already in use)" in (err := capsys.readouterr().err)
    assert err.count("\n") == 1


def test_rows_of_the_encoder_reach_to_the_largest_image():
    assert serving._rows(4096) == (256, 1024, 4096) and serving._rows(64) == (64,)
    assert all(n % 4 == 0 for most in range(4, 5000, 37) for n in serving._rows(most))
    assert all(serving._rows(most)[-1] >= most for most in range(4, 5000, 37))

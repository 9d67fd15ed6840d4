"""Answers from servers of others, as far as stand-ins can tell (`stand_ins`), and everything that may go wrong.

What a stand-in draws says where in the answer it stands and by which weights, so that an answer made of several
requests can be checked token by token. Not covered: the real servers, none of which runs here.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time

import numpy as np
import pytest

from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.records import Sample
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.inference.sampler import Sampling
from glmv_jax.rl.pipeline import Request
from glmv_jax.rl.pipeline.local import Rows
from glmv_jax.rl.pipeline.served import ServedEngine
from glmv_jax.rl.pipeline.wire import Wire
from glmv_jax.rl.prompts import prompt_rows
from glmv_jax.typing import UserError
from tests.rl.stand_ins import VLLM, SGLang, running

TOKENIZER = Tokenizer()
STOP = TOKENIZER.special["<|user|>"]
SAMPLING = Sampling(40, stop=(STOP,), suppress=(TOKENIZER.image,))
TEXT = TOKENIZER.encode("How many hearts are there?")
FIRST, LENGTH = 300, 30


def draws(prompt: int):
    """What a stand-in draws after so many ids: its place in the answer, 100 higher for each version; LENGTH of them."""

    def draw(ids, n, version):
        at = len(ids) + n - prompt
        return (STOP if at == LENGTH - 1 else FIRST + 100 * int(version) + at), -0.01 * at - int(version)

    return draw


def text_row(key) -> dict:
    T = len(TEXT)
    return {
        "tokens": np.array([TEXT]), "positions": np.arange(T)[None, :, None].repeat(3, 2), "length": np.array([T]),
        "image_row": np.full((1, T), -1), "patches": np.zeros((1, 4, 192), np.uint8), "yx": np.zeros((1, 4, 2), int),
        "frame": np.zeros((1, 4), int), "samples": [Sample(str(key), "count", (), "How many?", "3")], "hashes": [()],
    }  # fmt: skip


class Texts(list):
    def __getitem__(self, key):
        return text_row(key)


BUILDER = DocumentBuilder(TOKENIZER, Patcher(max_patches=16), max_tokens=64, max_patches=16)


@contextlib.contextmanager
def engine(url, tmp_path, rows=None, sampling=SAMPLING, patience=5.0):
    rows = rows or Rows(Texts())
    write = lambda params, folder: folder.mkdir(parents=True)  # noqa: E731
    made = ServedEngine(Wire(url, "k", patience=patience, silence=5.0), rows, sampling, 200, 0, TOKENIZER, write=write,
                        folder=tmp_path / "weights", patch=8)  # fmt: skip
    try:
        yield made
    finally:
        made.close()


def ask(made, prefix=None, key=0, id=0):
    """A future of what becomes of a request."""
    found = concurrent.futures.Future()
    prompt = made._rows.draw() if key else Rows(Texts()).draw()
    made.submit(Request(id, prompt, 0, prefix=prefix), found.set_result)
    return found


def until(what) -> None:
    limit = time.monotonic() + 20
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.002)


def check(drawn, versions: set) -> None:
    """Whole, each token by the version it says."""
    assert len(drawn) == LENGTH and drawn.tokens[-1] == STOP and set(drawn.versions) == versions
    at = np.arange(LENGTH - 1)
    np.testing.assert_array_equal(drawn.tokens[:-1], FIRST + 100 * drawn.versions[:-1] + at)
    np.testing.assert_allclose(drawn.logprobs, -0.01 * np.arange(LENGTH) - drawn.versions, atol=1e-6)


KINDS = pytest.mark.parametrize("kind", [VLLM, SGLang])


@KINDS
def test_an_answer_goes_on_under_new_weights_and_each_token_says_its_own(kind, tmp_path):
    with running(kind(draws(len(TEXT)), STOP)) as server, engine(server.url, tmp_path) as made:
        made.set_params(None, 0).result(20)
        server.version = 0
        done = ask(made).result(20)
        check(done.drawn, {0})
        assert done.reason == "stop" and done.facts["id"] == "0" and done.facts["text"]
        asked = next(body for path, body in server.bodies if path in ("/v1/completions", "/generate"))
        server.hold = 10
        changed = ask(made)
        until(lambda: server.at == 10)
        made.set_params(None, 1).result(20)
        server.hold = None
        check(changed.result(20).drawn, {0, 1})
        assert [path.name for path in (tmp_path / "weights").iterdir()] == ["00000001"]
    biases = asked.get("logit_bias") or asked["sampling_params"]["logit_bias"]
    assert biases == {str(TOKENIZER.image): -100.0}


@KINDS
def test_an_aborted_answer_comes_with_what_there_is_and_goes_on(kind, tmp_path):
    with running(kind(draws(len(TEXT)), STOP)) as server, engine(server.url, tmp_path) as made:
        made.set_params(None, 0).result(20)
        server.version, server.hold = 0, 10
        aborted = ask(made)
        until(lambda: server.at == 10 and (made._jobs[0].tokens or kind is SGLang))
        made.abort(0)
        begun = aborted.result(20)
        assert begun.reason == "aborted" and 0 < len(begun.drawn) <= 10
        server.hold = None
        check(ask(made, begun.drawn).result(20).drawn, {0})


def with_images():
    return Rows(prompt_rows({"count": 1.0}, BUILDER, seed=0))


def test_images_go_to_vllm_as_messages_whose_ids_are_the_trainers(tmp_path):
    """An answer to them is not gone on with: new weights wait for it, and an aborted one begins anew."""
    rows = with_images()
    row = rows.row(0)
    ids = row["tokens"][0][: row["length"][0]].tolist()
    with running(VLLM(draws(len(ids)), STOP)) as server, engine(server.url, tmp_path, rows) as made:
        server.read = lambda messages: ids
        made.set_params(None, 0).result(20)
        server.version, server.hold = 0, 10
        changed = ask(made, key=1)
        until(lambda: server.at == 10)
        made.set_params(None, 1).result(20)
        check(changed.result(20).drawn, {0})
        assert any(path == "/pause?mode=wait" for path, _ in server.bodies)
        content = next(body for path, body in server.bodies if "chat" in path)["messages"][0]["content"]
        assert [part["type"] for part in content] == ["image_url", "text"]
        assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
        assert content[1]["text"] == row["samples"][0].prompt

        rows.set_state(0)
        begun = changed.result().drawn
        begun = type(begun)(begun.tokens[:4], begun.logprobs[:4], begun.versions[:4])
        check(ask(made, begun, key=1).result(20).drawn, {1})
        rows.set_state(0)
        server.read = lambda messages: [*ids[:-1], 3]
        assert "read other tokens than were asked" in ask(made, key=1).result(20).facts["error"]


@pytest.mark.parametrize(("times", "patience"), [(2, 20.0), (1000, 1.0)])
def test_a_busy_server_is_asked_again_until_patience_ends(times, patience, tmp_path):
    with running(VLLM(draws(len(TEXT)), STOP)) as server, engine(server.url, tmp_path, patience=patience) as made:
        made.set_params(None, 0).result(20)
        server.version, refusals = 0, []

        def refuse(path, body):
            refusals.append(path)
            return ((429, 503)[len(refusals) % 2], {"retry-after": "0"}, b"later") if len(refusals) <= times else None

        server.refuse = refuse
        done = ask(made).result(20)
        if times == 2:
            check(done.drawn, {0})
            assert len(refusals) == 3
        else:
            assert done.reason == "failed" and f"{server.url}/v1/completions" in done.facts["error"]
            assert "given up after" in done.facts["error"]


def test_a_stream_that_breaks_off_goes_on(tmp_path):
    with running(VLLM(draws(len(TEXT)), STOP)) as server, engine(server.url, tmp_path) as made:
        made.set_params(None, 0).result(20)
        server.version, chunks, cuts = 0, server.chunks, iter((3, 5, 1))

        def cut(path, body):
            most = next(cuts, None)
            for n, event in enumerate(chunks(path, body)):
                if n == most:
                    yield b'data: {"choices": [{\n\n' if most == 5 else b"data: [DONE]\n\n"
                    return
                yield event

        server.chunks = cut
        check(ask(made).result(20).drawn, {0})


def without(name: str):
    """A change of what a stand-in says."""

    def strip(events):
        for event in events:
            for choice in event.get("choices", ()):
                choice.pop(name, None)
            event.pop(name, None)
            yield event

    return strip


@pytest.mark.parametrize(("change", "said"), [
    (without("token_ids"), "gives no ids of what it drew; serve with a version that has return_token_ids"),
    (without("logprobs"), "0 log-probabilities of 1 tokens; serve with"),
    (without("prompt_token_ids"), "does not say what it read"),
    (lambda events: ({"choices": "none"} for _ in events), "sent an event of another form"),
    (lambda events: ({"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [float("nan")]}, "text": "a",
                                   "prompt_token_ids": TOKENIZER.encode("a b c"), "finish_reason": "length"}]}
                     for _ in events), "log-probability that is no number"),
])  # fmt: skip
def test_a_server_that_cannot_be_trained_on_is_refused_at_once(change, said, tmp_path):
    with running(VLLM(draws(len(TEXT)), STOP)) as server, engine(server.url, tmp_path) as made:
        chunks = server.chunks
        server.chunks = lambda path, body: change(chunks(path, body))
        with pytest.raises(UserError, match=said) as raised:
            made.set_params(None, 0).result(20)
        assert server.url in str(raised.value)


@pytest.mark.parametrize(("refuse", "said"), [
    (lambda path: (401, {}, b"no") if path == "/v1/models" else None, "set GLMV_API_KEY to the server's key"),
    (lambda path: (404, {}, b"no") if path == "/is_paused" else None, "started with VLLM_SERVER_DEV_MODE=1"),
    (lambda path: (500, {}, b"torn") if path == "/collective_rpc" else None, "500: torn; given up after"),
    (lambda path: (200, {}, b"<html>") if path == "/v1/models" else None, "replied with no JSON"),
    (lambda path: (200, {}, b'{"data": [{"id": "a", "owned_by": "openai"}]}'), "is a server of 'openai'"),
    (lambda path: (200, {}, b'{"data": [{"id": "a", "owned_by": "vllm", "max_model_len": 9}]}'), "room for 9 tokens"),
    (lambda path: (200, {}, b'{"data": []}'), "names no model"),
])  # fmt: skip
def test_what_is_wrong_with_a_server_is_said_before_the_run(refuse, said, tmp_path):
    with running(VLLM(draws(len(TEXT)), STOP)) as server, engine(server.url, tmp_path, patience=0.5) as made:
        server.refuse = lambda path, body: refuse(path)
        with pytest.raises(UserError, match=said) as raised:
            made.set_params(None, 0).result(20)
        assert server.url in str(raised.value)


def test_a_server_that_is_away_and_settings_it_cannot_follow(tmp_path):
    with running(VLLM(draws(0), STOP)) as server:
        warm = Sampling(8, stop=(STOP,), temperature=0.7)
        with engine(server.url, tmp_path, sampling=warm) as made, pytest.raises(UserError, match="=1, not 0.7"):
            made.set_params(None, 0).result(20)
    with (
        engine(server.url, tmp_path, patience=0.6) as made,
        pytest.raises(UserError, match="gives no answer .*; start the server there, or correct rollout.engine"),
    ):
        made.set_params(None, 0).result(20)
    with running(SGLang(draws(0), STOP)) as server, engine(server.url, tmp_path, with_images()) as made:
        made.set_params(None, 0).result(20)
        assert "SGLang writes the ids of prompts with images anew" in ask(made, key=1).result(20).facts["error"]


def test_answers_that_end_at_a_token_that_ends_none_fail(tmp_path):
    with running(VLLM(lambda ids, n, version: (50 + n, -1.0), 55)) as server, engine(server.url, tmp_path) as made:
        made.set_params(None, 0).result(20)
        done = ask(made).result(20)
        assert done.reason == "failed" and "ended an answer at [55], which ends none here" in done.facts["error"]

"""Stage 5 whose answers a server of ours draws, over HTTP, against the same engine in this process.

One engine serves all tests: its thread is the server's, and for the comparison `SlotEngine`'s. Stand-ins of other
servers, and what goes wrong, are in test_dialects.py. Not covered: a run to its end, which benchmarks/rl_url.py is.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import io
import itertools
import json
import threading
import types

import httpx
import jax
import numpy as np
import pytest
from PIL import Image

from glmv_jax import config
from glmv_jax.data.tokenizer import BOX
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.front import Front
from glmv_jax.inference.sampler import Sampling
from glmv_jax.inference.settings import Settings
from glmv_jax.models import abstract_params
from glmv_jax.rl import Grade
from glmv_jax.rl.pipeline import Request
from glmv_jax.rl.pipeline.slots import SlotEngine
from glmv_jax.serving.answers import Answers
from glmv_jax.serving.app import Server
from glmv_jax.serving.limits import Limits
from glmv_jax.serving.main import listener
from glmv_jax.serving.metrics import Metrics
from glmv_jax.serving.model import Own
from glmv_jax.serving.weights import Weights
from glmv_jax.train import handover, main
from glmv_jax.train.stages import rl_questions, rl_served
from glmv_jax.typing import UserError

KEY = "open sesame"
SMALL = ["model.vision.depth=1", "model.decoder.depth=1", "rollout.prompts=3", "rollout.group=2", "rollout.rows=(3,)",
         "rollout.minibatches=1", "rollout.max_new_tokens=10", "rollout.thinking=4", "data.ahead=0",
         "rollout.pipeline=async", "rollout.staleness=0", "rollout.proximal=true"]  # fmt: skip


def build(folder, *more: str):
    cfg = config.override(config.load("experiments/rl_grpo.py:size=nano"), [*SMALL, *more])
    cfg.faults = str(folder / "faults.jsonl")
    stage = main.stage_class("rl")(cfg)
    stage.verifiers = dict.fromkeys(stage.names, by_letters)
    return stage


def by_letters(text, sample):
    value = sum(map(ord, text)) % 97 / 96
    return Grade(value, value > 0.5, {"format": 1.0, "score": value})


def random_params(cfg):
    """Made by NumPy: compiling what draws fresh ones takes longer than all of this."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        if x.ndim == 1:
            return np.full(x.shape, path[-1].key == "scale", x.dtype)
        return (rng.normal(size=x.shape) * (1.5 if "embed" in str(path) else 2 * x.shape[-2] ** -0.5)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(cfg))


class World:
    """A server, the weights that it began with, and a stage that asks it."""

    def __init__(self, folder) -> None:
        stage = build(folder)
        self.folder, self.params = folder, random_params(stage.model)
        sampling = Sampling.chat(stage.tokenizer, 16, allow=(*BOX, "</think>"))
        sizes = Settings(slots=4, length=stage.asker.max_tokens + 16, steps=2, chunks=(stage.asker.max_tokens,),
                         patches=(stage.asker.max_patches,), pictures=64, queue=64)  # fmt: skip
        self.engine = Engine(stage.model, self.params, sampling, sizes)
        self.engine.warm()
        self.front = Front(self.engine)
        answers = Answers(self.front, Own(stage.tokenizer, stage.asker.patcher), Limits(), Metrics())
        self.weights = folder / "weights"
        self.weights.mkdir()
        taken = Weights(self.weights, handover.reader(self.params))
        self.listener = listener(Server(answers, ["tiny"], KEY, taken), "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.listener.run)
        self.thread.start()
        while not self.listener.started:
            self.thread.join(0.01)
        self.url = f"http://127.0.0.1:{self.listener.servers[0].sockets[0].getsockname()[1]}"
        self.stage = build(folder, f"rollout.engine={self.url}", f"rollout.weights={self.weights}")
        self.rows = rl_questions.rows(self.stage)

    def scaled(self, by: float):
        return jax.tree.map(lambda x: x * by, self.params)

    @contextlib.contextmanager
    def served(self, version: int = 0, by: float = 1.0):
        """The engine by URL, with these weights."""
        engine = rl_served.engine(self.stage, self.rows)
        try:
            engine.set_params(self.scaled(by), version).result(60)
            yield engine
        finally:
            engine.close()

    def close(self) -> None:
        self.listener.should_exit = True
        self.thread.join()
        self.front.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    before = pytest.MonkeyPatch()
    before.setenv(rl_served.KEY, KEY)
    world = World(tmp_path_factory.mktemp("served"))
    yield world
    world.close()
    before.undo()


def begin(engine, *requests):
    """Futures of what becomes of them."""
    found = [concurrent.futures.Future() for _ in requests]
    for request, future in zip(requests, found):
        engine.submit(request, future.set_result)
    return found


def asked(rows, count: int, group: int = 2) -> list[Request]:
    prompts = [rows.draw() for _ in range(count)]
    return [Request(n * group + i, prompt, i) for n, prompt in enumerate(prompts) for i in range(group)]


def same(a, b) -> None:
    """Two completions."""
    assert (a.reason, a.facts) == (b.reason, b.facts)
    np.testing.assert_array_equal(a.drawn.tokens, b.drawn.tokens)
    np.testing.assert_array_equal(a.drawn.versions, b.drawn.versions)
    np.testing.assert_allclose(a.drawn.logprobs, b.drawn.logprobs, atol=1e-5)


def test_answers_are_those_of_the_engine_in_this_process(world, monkeypatch):
    """Sampled and greedy: prompts with images, thinking that is ended by force, versions as they were pushed."""
    requests = asked(world.rows, 4)
    for temperature in (1.0, 0.0):
        sampling = Sampling.chat(world.stage.tokenizer, 10, allow=(*BOX, "</think>"), temperature=temperature, think=4,
                                 close=world.stage.tokenizer.special["</think>"])  # fmt: skip
        monkeypatch.setattr(world.stage.sampler, "sampling", sampling)
        here = SlotEngine(lambda params, version: world.front, world.rows, world.stage.cfg.seed, world.stage.tokenizer)
        here.set_params(None, 0)
        with world.served(version=3, by=1.1) as there:
            found = [future.result(60) for future in begin(there, *requests)]
            monkeypatch.setattr(world.engine, "sampling", sampling)
            wanted = [future.result(60) for future in begin(here, *requests)]
        monkeypatch.undo()
        for a, b in zip(found, wanted):
            same(a, b)
        versions = np.concatenate([completion.drawn.versions for completion in found])
        assert set(versions) == {3, -1} and all(completion.facts["images"] for completion in found)


class Steps:
    """Calls of the engine, one at a time: each waits for `go`."""

    def __init__(self, step) -> None:
        self._step, self._may, self._waits = step, threading.Semaphore(0), threading.Event()

    def __call__(self) -> bool:
        self._waits.set()
        self._may.acquire()
        return self._step()

    def go(self, until, heard=lambda: True) -> None:
        """Call after call until this is so, each when the engine waits for it and what it drew before was heard of."""
        while not until():
            if self._waits.wait(0.01) and heard():
                self._waits.clear()
                self._may.release()


def test_answers_go_on_under_new_weights_and_from_what_they_had(world, monkeypatch):
    """One call of the engine at a time: what is pushed or aborted in the middle of an answer is so."""
    (request,) = asked(world.rows, 1, group=1)
    with world.served(version=0) as engine:
        whole = begin(engine, request)[0].result(60)
        assert len(whole.drawn) >= 7, "too short an answer to be cut; take another seed"
        steps = Steps(world.engine.step)
        monkeypatch.setattr(world.engine, "step", steps)
        count, drawn = (lambda: len(engine._jobs[0].tokens) if engine._jobs else 0), world.engine.counts.drawn
        (aborted,) = begin(engine, request)
        steps.go(lambda: count() >= 2, lambda: count() >= world.engine.counts.drawn - drawn)
        engine.abort(0)
        begun = aborted.result(60)
        assert begun.reason == "aborted" and 2 <= len(begun.drawn) < len(whole.drawn)
        np.testing.assert_array_equal(begun.drawn.tokens, whole.drawn.tokens[: len(begun.drawn)])
        (ended,) = begin(engine, Request(0, request.prompt, 0, prefix=begun.drawn))
        steps.go(ended.done)
        same(ended.result(), whole)

        drawn = world.engine.counts.drawn
        (changed,) = begin(engine, request)
        steps.go(lambda: count() >= 2, lambda: count() >= world.engine.counts.drawn - drawn)
        handed, set_params = threading.Event(), world.front.set_params
        monkeypatch.setattr(world.front, "set_params", lambda *new: (set_params(*new), handed.set())[0])
        pushed = engine.set_params(world.scaled(1.2), 1)
        assert handed.wait(60)  # the weights are loaded, and wait for the call that runs
        steps.go(pushed.done)
        steps.go(changed.done)
        versions = changed.result().drawn.versions
        assert [n for n, _ in itertools.groupby(versions[versions >= 0])] == [0, 1]
        assert [path.name for path in world.weights.iterdir()] == ["00000001"]


def test_two_steps_train_on_what_the_server_drew(world):
    """The trainer's own log-probabilities are the server's, of the weights that were pushed for the step."""
    data = world.stage.train_data()
    try:
        for step in range(2):
            state = types.SimpleNamespace(params=world.scaled(1.0 + 0.3 * step), step=step)
            rows, metrics = world.stage.next_batch(data, state)
            assert (rows["loss_weight"] > 0).any() and metrics["staleness/mean"] == 0
    finally:
        data.close()
    lines = map(json.loads, (world.folder / "samples.jsonl").read_text().splitlines())
    samples = [row for row in lines if row["kind"] == "sample"]
    assert [row["step"] for row in samples] == [0] * 6 + [1] * 6
    for row in samples:
        own = np.array(row["versions"]) >= 0
        assert set(np.array(row["versions"])[own]) == {row["step"]}
        np.testing.assert_allclose(np.array(row["logprobs"])[own], np.array(row["trained_logprobs"])[own], atol=1e-4)


@pytest.mark.parametrize(("body", "status", "said"), [
    ({"folder": "../elsewhere", "version": 1}, 403, "is no folder"), ({"folder": "/etc", "version": 1}, 403, "is no"),
    ({"folder": "link", "version": 1}, 403, "is no folder in"), ({"folder": "none", "version": 1}, 403, "is no folder"),
    ({"folder": "other", "version": -1}, 400, "count updates from 0"), ({"folder": "other"}, 400, "version is missing"),
    ({"folder": "other", "version": 1}, 400, "config and weights are of different models"),
    ({"folder": "empty", "version": 1}, 400, "no config.json"),
])  # fmt: skip
def test_weights_come_from_one_folder_and_fit(world, body, status, said):
    for name in ("other", "empty", "../elsewhere"):
        (world.weights / name).mkdir(exist_ok=True)
    if not (world.weights / "link").is_symlink():
        (world.weights / "link").symlink_to(world.folder / "elsewhere")
    if not (world.weights / "other" / "config.json").exists():
        small = jax.tree.map(lambda x: np.asarray(x)[..., :1] if x.ndim else x, world.params)
        (world.weights / "other").rmdir()
        handover.write(small, world.weights / "other")
    version = world.engine.version
    reply = httpx.post(f"{world.url}/v1/weights", json=body, headers={"x-api-key": KEY})
    assert reply.status_code == status and said in reply.json()["error"]["message"]
    assert httpx.post(f"{world.url}/v1/weights", json=body).status_code == 401
    assert world.engine.version == version


def data_uri(size: tuple[int, int]) -> str:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(("change", "said"), [
    ({"prompt": []}, "one at least"), ({"prompt": [10**9]}, "ids from 0 to"), ({"prompt": ["a"]}, "a whole number"),
    ({"images": [data_uri((12, 16))]}, "no multiple of 16"), ({"images": [data_uri((16, 16))]}, "0 image tokens, but"),
    ({"begun": 3}, "out of range"), ({"logit_bias": {"5": 1.0}}, "never drawn"), ({"stop_token_ids": [5]}, "--allow"),
    ({"logit_bias": {"5": -100}}, "one list and not in the other"), ({"images": ["file:///etc/x"]}, "no data: URL"),
    ({"logprobs": 5}, "logprobs=5 is not served"), ({"max_tokens": 0}, "out of range"),
])  # fmt: skip
def test_what_is_not_served_is_said(world, change, said):
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2, **change}
    reply = httpx.post(f"{world.url}/v1/completions", json=body, headers={"x-api-key": KEY})
    assert reply.status_code == 400 and said in reply.json()["error"]["message"]


def test_a_whole_body_says_what_the_stream_says(world):
    body = {"model": "tiny", "prompt": [5, 6, 7, 8], "begun": 1, "max_tokens": 4, "seed": 3, "logprobs": 0,
            "return_token_ids": True}  # fmt: skip
    post = lambda **more: httpx.post(  # noqa: E731
        f"{world.url}/v1/completions", json=body | more, headers={"x-api-key": KEY}
    )
    (whole,) = post().json()["choices"]
    lines = [line[6:] for line in post(stream=True).text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert whole["prompt_token_ids"] == chunks[0]["prompt_token_ids"] == [5, 6, 7, 8] and lines[-1] == "[DONE]"
    assert whole["token_ids"] == sum((chunk["token_ids"] for chunk in chunks), []) and len(whole["token_ids"]) <= 4
    assert whole["text"] == "".join(chunk["text"] for chunk in chunks)
    assert whole["finish_reason"] == chunks[-1]["finish_reason"]
    likely = [x for chunk in chunks for x in chunk["logprobs"]["token_logprobs"]]
    np.testing.assert_allclose(likely, whole["logprobs"]["token_logprobs"], atol=1e-5)


@pytest.mark.parametrize(("more", "said"), [
    (["rollout.pipeline=sync"], "is of rollout.pipeline=async"), (["rollout.engine=nowhere"], "is no URL"),
    (["rollout.environments=(('windows',1.0),)"], "answers questions, not episodes"),
])  # fmt: skip
def test_settings_that_do_not_go_with_it_are_refused(world, more, said):
    with pytest.raises(UserError, match=said):
        rl_served.engine(build(world.folder, f"rollout.engine={world.url}", *more), world.rows)

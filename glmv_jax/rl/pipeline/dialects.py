"""How servers are asked for the rest of an answer in token ids, and how they are given new weights.

                  answers                                                      new weights
    ours          /v1/completions, images beside the ids                       /v1/weights, while answers go on
    vLLM          /v1/completions; with images /v1/chat/completions            /pause, /collective_rpc, /resume
    SGLang        /generate; no images                                         /update_weights_from_disk

All are asked for ids with the log-probability of each; text is never made into ids again. Ours alone was run with this;
the others are written from what their projects say, and tried against small servers that reply as it is said there:
vLLM's from docs.vllm.ai v0.32.0 (training/async_rl), its `tests/entrypoints/openai/test_return_token_ids.py` and
`entrypoints/serve/dev/rlhf/api_router.py`, pull requests 22587 (return_token_ids) and 48284 (`reload_weights` with a
`weights_path`) and issue 32718 (without one it gave old weights); SGLang's from docs.sglang.io
(basic_usage/sampling_params, advanced_features/sglang_for_rl) and `srt/managers/io_struct.py`.

What they call log-probabilities. Ours: of softmax(logits / temperature), before top-p and before anything is ruled out,
as the trainer's. vLLM: of softmax(logits), so it is used at temperature 1 (or 0) alone. SGLang: of softmax(logits /
temperature) without what is ruled out, which the policy hardly ever draws. With images vLLM writes the prompt from
messages, so that its ids are compared with the trainer's; and it cannot go on with an answer there, which begins anew.
SGLang makes ids with images into text and back, and so is not asked about any.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from glmv_jax.inference.sampler import Sampling
from glmv_jax.rl.pipeline.wire import Unserved, Wire

BANNED = -100.0  # a bias that rules a token out


class Ask(NamedTuple):
    """The rest of an answer. prompt: ids; begun: ids of the answer so far; more: how many at most.
    images: data URLs of those in the prompt; question: its words behind them; hashes: `data.hashes.image_hash` of each.
    seed, draw: as `inference.requests.Request`; name: unique."""

    prompt: list[int]
    begun: list[int]
    more: int
    images: Sequence[str] = ()
    question: str = ""
    hashes: Sequence[str] = ()
    seed: int = 0
    draw: int = 0
    name: str = ""


class Piece(NamedTuple):
    """Some more ids, their log-probabilities and the versions of the weights that drew them (None: the server does not
    say); reason: why there are no more, "stop", "length" or "abort"."""

    tokens: list[int]
    logprobs: list[float]
    versions: list[int] | None = None
    reason: str | None = None


Ended = Callable[[], Awaitable[None]]


class Ours:
    """See the file's head. keeps: whether answers go on while weights change.   in_one_piece: whether they come as a
    whole, and not while they are drawn."""

    owner, keeps, in_one_piece = "glmv_jax", True, False

    def __init__(self, wire: Wire, model: str, sampling: Sampling) -> None:
        self._wire, self._model, self._sampling = wire, model, sampling

    async def meet(self) -> None:
        """Raises Unserved where it cannot be what rollouts need."""

    def goes_on(self, ask: Ask) -> bool:
        """Whether an answer to it can begin with what there is of it."""
        return True

    async def draw(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Pieces, the last of them with a reason. Raises Passing, Unserved."""
        own = {"images": list(ask.images), "begun": len(ask.begun), "seed": ask.seed, "draw": ask.draw}
        async with contextlib.aclosing(self._stream("/v1/completions", self._by_ids(ask) | own, ask)) as pieces:
            async for piece in pieces:
                yield piece

    async def load(self, folder: str, version: int, ended: Ended, wait: bool) -> None:
        """Has all tokens from now on drawn by the weights in a folder. Where answers do not go on: ended waits for the
        end of those that run, and is called when no more of them comes by the old weights and none yet by the new;
        wait: some of them would have to begin anew. Raises Passing, Unserved."""
        await self._wire.ask("POST", "/v1/weights", {"folder": folder, "version": version})

    async def stop(self, ask: Ask) -> None:
        """Has the server hand over what there is of an answer that comes in one piece. Raises Passing, Unserved."""

    def _settings(self) -> dict[str, Any]:
        s = self._sampling
        return {
            "temperature": s.temperature, "top_p": s.top_p, "top_k": -1, "stop_token_ids": list(s.stop),
            "logit_bias": {str(i): BANNED for i in s.suppress},
        }  # fmt: skip

    def _common(self, ask: Ask) -> dict[str, Any]:
        return {"model": self._model, "max_tokens": ask.more, "stream": True, "return_token_ids": True, "min_p": 0,
                "repetition_penalty": 1, "ignore_eos": True, **self._settings()}  # fmt: skip

    def _by_ids(self, ask: Ask) -> dict[str, Any]:
        return self._common(ask) | {"prompt": [*ask.prompt, *ask.begun], "logprobs": 0}

    async def _stream(self, path: str, body: Mapping[str, Any], ask: Ask) -> AsyncGenerator[Piece, None]:
        url, prompt = self._wire.url, None
        async with contextlib.aclosing(self._wire.events(path, body)) as events:
            async for event in events:
                if not event.get("choices"):
                    continue  # counts at the end
                try:
                    choice = event["choices"][0]
                    said = choice.get("prompt_token_ids") or event.get("prompt_token_ids")
                    hashes = choice.get("image_hashes")
                    piece = _piece(choice, url)
                except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                    raise Unserved(
                        f"{url}{path} sent an event of another form ({type(error).__name__}: {error}); "
                        "serve with a version that rl/pipeline/dialects.py was written for"
                    ) from None
                if said is not None:
                    _check_prompt(url, ask, said, hashes)
                    prompt = said
                if piece.tokens and prompt is None:
                    raise Unserved(f"{url}{path} does not say what it read (no prompt_token_ids); serve with a version "
                                   "that has return_token_ids (vLLM 0.10.2 or later)")  # fmt: skip
                yield piece


class VLLM(Ours):
    owner, keeps, in_one_piece = "vllm", False, False

    async def meet(self) -> None:
        if self._sampling.temperature not in (0.0, 1.0):
            raise Unserved(f"{self._wire.url}: vLLM's log-probabilities are those at temperature 1; set "
                           f"rollout.temperature=1, not {self._sampling.temperature}")  # fmt: skip
        try:
            await self._wire.ask("GET", "/is_paused")
        except Unserved as error:
            raise Unserved(f"{error}; vLLM takes new weights when it is started with VLLM_SERVER_DEV_MODE=1") from None

    def goes_on(self, ask: Ask) -> bool:
        return not ask.images

    async def draw(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        body, path = self._by_ids(ask), "/v1/completions"
        if ask.images:
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in ask.images]
            content = [*parts, {"type": "text", "text": ask.question}]
            thinks = {"enable_thinking": bool(self._sampling.think)}
            body = self._common(ask) | {"messages": [{"role": "user", "content": content}], "logprobs": True,
                                        "chat_template_kwargs": thinks}  # fmt: skip
            path = "/v1/chat/completions"
        # A seed of its own for what an answer goes on with, and for each answer of a group.
        body["seed"] = (ask.seed * 1_000_003 + ask.draw * 8_191 + len(ask.begun)) % (1 << 31)
        async with contextlib.aclosing(self._stream(path, body, ask)) as pieces:
            async for piece in pieces:
                yield piece

    async def load(self, folder: str, version: int, ended: Ended, wait: bool) -> None:
        await self._wire.ask("POST", f"/pause?mode={'wait' if wait else 'abort'}")
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self._wire.ask("POST", "/collective_rpc", rpc)
        await ended()
        await self._wire.ask("POST", "/resume")


class SGLang(Ours):
    owner, keeps, in_one_piece = "sglang", False, True

    def __init__(self, wire: Wire, model: str, sampling: Sampling) -> None:
        super().__init__(wire, model, sampling)
        self._version = ""

    async def draw(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        if ask.images:
            raise Unserved(f"{self._wire.url}: SGLang writes the ids of prompts with images anew; take another server")
        settings = self._settings() | {"max_new_tokens": ask.more, "skip_special_tokens": False}
        body: dict[str, Any] = {"rid": ask.name, "input_ids": [*ask.prompt, *ask.begun], "sampling_params": settings,
                "return_logprob": True, "stream": False}  # fmt: skip
        version, url = self._version, f"{self._wire.url}/generate"
        reply = await self._wire.ask("POST", "/generate", body)
        try:
            about = reply["meta_info"]
            drawn = about["output_token_logprobs"]
            piece = Piece([int(i) for _, i, *_ in drawn], [float(x) for x, *_ in drawn],
                          reason=about["finish_reason"]["type"])  # fmt: skip
            read, by = about["prompt_tokens"], about.get("weight_version", version)
        except (KeyError, TypeError, ValueError) as error:
            raise Unserved(f"{url} gave no ids with log-probabilities ({type(error).__name__}: {error}); serve with a "
                           "version that has return_logprob for input_ids") from None  # fmt: skip
        if read != len(body["input_ids"]):
            raise Unserved(f"{url} read {read} tokens, not the {len(body['input_ids'])} that were sent; serve the "
                           "trainer's model")  # fmt: skip
        yield piece if str(by) == version else Piece([], [], reason="abort")  # of weights that were not asked

    async def load(self, folder: str, version: int, ended: Ended, wait: bool) -> None:
        name = str(version)
        body = {"model_path": folder, "abort_all_requests": True, "weight_version": name}
        reply = await self._wire.ask("POST", "/update_weights_from_disk", body)
        if not (isinstance(reply, dict) and reply.get("success")):
            raise Unserved(f"{self._wire.url}/update_weights_from_disk took no weights: {str(reply)[:300]}")
        await ended()
        self._version = name

    async def stop(self, ask: Ask) -> None:
        await self._wire.ask("POST", "/abort_request", {"rid": ask.name})


DIALECTS = {dialect.owner: dialect for dialect in (Ours, VLLM, SGLang)}


async def met(wire: Wire, sampling: Sampling, length: int) -> Ours:
    """How to talk to the server, by what it says of its model. length: of a prompt and its answer, that it has to have
    room for. Raises Unserved, naming the URL and the remedy."""
    listed = await wire.patiently(lambda: wire.ask("GET", "/v1/models"))
    try:
        about = listed["data"][0]
        owner, model, room = about["owned_by"], str(about["id"]), about.get("max_model_len")
    except (AttributeError, LookupError, TypeError):
        raise Unserved(f"{wire.url}/v1/models names no model; give the URL of a server of answers") from None
    if owner not in DIALECTS:
        raise Unserved(f"{wire.url} is a server of {owner!r}, which gives no ids of what it drew that could be trained "
                       "on; use glmv serve, vLLM or SGLang")  # fmt: skip
    if isinstance(room, int) and room < length:
        raise Unserved(
            f"{wire.url} has room for {room} tokens of a prompt and its answer, but they are up to {length};"
            " serve with a greater --length (vLLM: --max-model-len), or lower rollout.max_new_tokens"
        )
    dialect = DIALECTS[owner](wire, model, sampling)
    await dialect.meet()
    return dialect


def _piece(choice: Mapping[str, Any], url: str) -> Piece:
    """Of a choice of a completion or of a chat completion."""
    ids, said = choice.get("token_ids"), choice.get("logprobs") or {}
    text = choice.get("text") or (choice.get("delta") or {}).get("content")
    if "content" in said:
        logprobs = [token["logprob"] for token in said["content"] or ()]
    else:
        logprobs = said.get("token_logprobs") or []
    if ids is None and (text or logprobs):
        raise Unserved(f"{url} gives no ids of what it drew; serve with a version that has return_token_ids (vLLM "
                       "0.10.2 or later), as text made into ids again may be other ids")  # fmt: skip
    ids = ids or []
    if len(ids) != len(logprobs):
        raise Unserved(f"{url} gives {len(logprobs)} log-probabilities of {len(ids)} tokens; serve with those of drawn "
                       "tokens switched on (vLLM: --max-logprobs 1 or more)")  # fmt: skip
    versions = choice.get("versions")
    return Piece([int(i) for i in ids], [float(x) for x in logprobs], versions, choice.get("finish_reason"))


def _check_prompt(url: str, ask: Ask, said: Sequence[int], hashes: Sequence[str] | None) -> None:
    """Unserved unless the server read what was asked."""
    wanted = [*ask.prompt, *ask.begun]
    if list(said) != wanted:
        at = next((n for n, (a, b) in enumerate(zip(said, wanted)) if a != b), min(len(said), len(wanted)))
        raise Unserved(
            f"{url} read other tokens than were asked: {len(said)} and {len(wanted)}, the first other one "
            f"is number {at}; serve the model, the chat template and the sizes of images that are trained"
        )
    if hashes is not None and list(hashes) != list(ask.hashes):
        raise Unserved(f"{url} saw other pixels than were asked about; serve with the trainer's sizes of images "
                       "(data.image_patches, --image-patches)")  # fmt: skip

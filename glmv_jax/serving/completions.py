"""Token ids in, token ids out: OpenAI's older completions, as reinforcement learning asks them of a server.

As vLLM has them: `prompt` as ids, `return_token_ids`, `stop_token_ids`. Ours alone, all of them optional: `images`,
data URLs whose visual tokens stand in the prompt; `begun`, how many of the last ids are the answer's own beginning;
`draw`, the number of the answer among those of one seed. A choice says `versions`, of the weights that drew each
token, and `image_hashes` of the pixels that the model saw. `text` is for reading; ids and log-probabilities are what
was drawn.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from glmv_jax.data.hashes import image_hash
from glmv_jax.inference.sampler import Sampling
from glmv_jax.serving import fields, openai
from glmv_jax.serving.answers import Asked, Ended, Part, Prepared, told
from glmv_jax.serving.limits import Limits, Refused
from glmv_jax.serving.media import Gallery
from glmv_jax.serving.openai import error
from glmv_jax.serving.reply import Called

__all__ = ["Reply", "asked", "error"]

BANNED = -100  # the bias of a token that is never drawn, as OpenAI's API has it
UNSERVED = {name: harmless for name, harmless in openai.UNSERVED.items() if name != "logit_bias"} | {
    "logprobs": (0,), "top_logprobs": (0,), "n": (1,), "stop": ([],), "suffix": ("",),
}  # fmt: skip


def asked(body: Mapping[str, Any], limits: Limits, sampling: Sampling, vocab: int) -> Asked:
    """What a body asks. Raises Refused for what is wrong or not served.

    sampling: of the engine, which ends all answers at the same ids and draws the same ids never.   vocab: ids that
    there are.
    """
    fields.without(body, UNSERVED)
    ids = [fields.of(int, i, "prompt") for i in fields.need(body, "prompt", list)]
    if not ids or min(ids) < 0 or max(ids) >= vocab:
        raise Refused(f"prompt has to be ids from 0 to {vocab - 1}, one at least; write them with the tokenizer of the "
                      "model that is served", field="prompt")  # fmt: skip
    begun = fields.within(body, "begun", int, 0, len(ids) - 1) or 0
    for name, given, here in (("stop_token_ids", fields.get(body, "stop_token_ids", list), sampling.stop),
                              ("logit_bias", _banned(body), sampling.suppress)):  # fmt: skip
        given = given and [fields.of(int, i, name) for i in given]
        if given is not None and set(given) != set(here):
            wrong = sorted(set(given) ^ set(here), key=str)
            raise Refused(f"{name}: {wrong[:8]} are in one list and not in the other, of the request and of this "
                          "server; serve with the --allow that the request wants", field=name)  # fmt: skip
    gallery = Gallery(limits)
    for n, url in enumerate(fields.get(body, "images", list, [])):
        gallery.add_url(url, f"images[{n}]")
    draw = fields.within(body, "draw", int, 0, 1 << 30) or 0
    return Asked(
        (), gallery.decoded(), tokens=fields.within(body, "max_tokens", int, 1, 1 << 30),
        temperature=fields.within(body, "temperature", float, 0, 100), top_p=fields.probability(body, "top_p"),
        seed=fields.get(body, "seed", int), ids=ids, begun=begun, draw=draw,
    )  # fmt: skip


def _banned(body: Mapping[str, Any]) -> list[int] | None:
    """Ids that are not to be drawn; other biases are not served."""
    bias = fields.get(body, "logit_bias", dict)
    if bias is None:
        return None
    if any(value != BANNED or not name.isdecimal() for name, value in bias.items()):
        raise Refused(f"logit_bias is served for whole ids at {BANNED}, which are never drawn; leave others out",
                      field="logit_bias")  # fmt: skip
    return [int(name) for name in bias]


class Reply:
    """Makes the bodies of one reply; as `openai.Reply`."""

    def __init__(self, name: str, body: Mapping[str, Any], prepared: Prepared, tokenizer: Any) -> None:
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
                      "model": name}  # fmt: skip
        self._logprobs = fields.get(body, "logprobs", int) is not None
        self._ids = fields.get(body, "return_token_ids", bool, False)
        self._usage = fields.get(fields.get(body, "stream_options", dict, {}), "include_usage", bool, False)
        self._prepared, self._tokenizer, self._tokens = prepared, tokenizer, 0

    def whole(self, choices: list[list[Part | Ended]]) -> dict[str, Any]:
        """The body of an answer that is whole."""
        parts, ended = told(choices[0])
        self._tokens = ended.tokens
        return self._head | {"choices": [self._choice(parts, ended.reason) | self._prompt()], "usage": self._used()}

    def first(self) -> list[dict[str, Any]]:
        """Chunks with which a stream begins."""
        return [self._head | {"choices": [self._choice([]) | self._prompt()]}]

    def part(self, n: int, part: Part | Ended) -> list[dict[str, Any]]:
        """Chunks of some more."""
        del n  # there is one
        if isinstance(part, Ended):
            self._tokens = part.tokens
            return [self._head | {"choices": [self._choice([], part.reason)]}]
        return [self._head | {"choices": [self._choice([part])]}]

    def last(self) -> list[dict[str, Any]]:
        """Chunks with which a stream ends."""
        return [self._head | {"choices": [], "usage": self._used()}] if self._usage else []

    def _prompt(self) -> dict[str, Any]:
        if not self._ids:
            return {}
        pictures = self._prepared.prompt.pictures
        return {"prompt_token_ids": list(self._prepared.asked.ids),
                "image_hashes": [image_hash(picture.patches, picture.yx) for picture in pictures]}  # fmt: skip

    def _choice(self, parts: Sequence[Part], reason: str | None = None) -> dict[str, Any]:
        ids = [i for part in parts for i in part.tokens.tolist()]
        text = "".join(event.text for part in parts for event in part.events if not isinstance(event, Called))
        found = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        if self._logprobs:
            names = [self._tokenizer.decode([i], keep_special=True) for i in ids]
            found["logprobs"] = {"tokens": names, "top_logprobs": None, "text_offset": None,
                                 "token_logprobs": [x for part in parts for x in part.logprobs.tolist()]}  # fmt: skip
        if self._ids:
            found |= {"token_ids": ids, "versions": [part.version for part in parts for _ in part.tokens]}
        return found

    def _used(self) -> dict[str, int]:
        prompt = len(self._prepared.asked.ids)
        return {"prompt_tokens": prompt, "completion_tokens": self._tokens, "total_tokens": prompt + self._tokens}

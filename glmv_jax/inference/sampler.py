"""Sampling in lockstep, with a key/value cache, as one jitted program a shape: prefill, then decode in a while loop.

For whole batches of groups whose answers are about as long, as stage 5's in its synchronous form; everybody else asks
the engine, which this is an oracle for. At that stage's nano size, 64 prompts x 8 answers of up to 14 tokens on a CPU,
it takes .90 to .99 of the engine's time with 128 slots where answers have 6 tokens on average, .73 (of processor time)
where they have 10 as those of the SFT policy, .70 with 512 slots: rows of the engine read the prompt each from a cache
of its own, and requests cost the host 75 ms (benchmarks/engine.py; .86 of processor time where answers have 7).
A prompt and its images are encoded once, and its keys and values are kept once for the G answers of a group, which hold
only their own (as in Hydragen, arXiv 2402.05099).
Shapes are static (prompt length, patches, rows, new tokens): one compilation a bucket, counted in `Sampler.traces`.
A row draws from its own random key and attends to its own slots, so its answer does not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.models import vlm
from glmv_jax.typing import Batch, Params, TokenInput, VisionInput

# Finite, so that a row in which everything is suppressed still yields numbers; below any logit in float32.
NEVER = -1.0e38
BOX = ("<|begin_of_box|>", "<|end_of_box|>")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    max_new_tokens: length of the answer rows, stop token included.
    temperature:    logits are divided by it; 0 is greedy.
    top_p:          the smallest set of tokens with at least this probability; 1 keeps all (the default for
                    reinforcement learning, where any truncation biases the policy gradient).
    stop:           ids that end an answer; they are returned as its last token.
    suppress:       ids that are never drawn (image placeholders and the like).
    pad:            what stands after the end.
    think, close:   the id that ends thinking; where it is not among the first `think` tokens it is put at the place
                    behind them, and the answer goes on from there (force answering, GLM-V 5.3.2). 0: no limit.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()
    pad: int = 0
    think: int = 0
    close: int = -1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"{self}: max_new_tokens must be >= 1, temperature >= 0 and top_p in (0, 1]")
        if self.think and (self.close < 0 or not 0 < self.think < self.max_new_tokens - 1):
            raise ValueError(f"{self}: think leaves room for close and an answer, and there is a close")

    @classmethod
    def chat(cls, tokenizer: Any, max_new_tokens: int, *, allow: Iterable[str] = BOX, **settings: Any) -> Sampling:
        """Assistant turns of a `data.tokenizer.Tokenizer`: of the special tokens only stops and those of `allow`."""
        kept = set(tokenizer.stops) | {tokenizer.special[name] for name in allow}
        suppress = tuple(sorted(set(tokenizer.special.values()) - kept))
        stop = tuple(sorted(tokenizer.stops))
        return cls(max_new_tokens, stop=stop, suppress=suppress, pad=tokenizer.pad, **settings)

    def put_at(self, ids: Any) -> int | None:
        """The place of the token that ended the thinking of an answer by force; None where none did."""
        put = self.think and len(ids) > self.think and self.close not in ids[: self.think]
        return self.think if put else None


class Prompts(NamedTuple):
    """Rows of prompts, padded on the right.

    vision: VisionInput of B rows (frame 0 = padding) or None; tokens, image_row: [B, T]; positions: [B, T, 3];
    length: [B] valid tokens of each row, 0 for a row that only fills the batch; next_position: [B] the rotary
    position of the first answer token (an image of h x w visual tokens moves it by max(h, w), not by h * w).
    """

    vision: VisionInput | None
    tokens: jax.Array
    positions: jax.Array
    image_row: jax.Array
    length: jax.Array
    next_position: jax.Array

    @classmethod
    def of(cls, batch: Batch) -> Prompts:
        """From a prompt batch of `data.pipeline` (a dict of arrays with one prompt a row)."""
        rest = (batch[name] for name in cls._fields[1:])
        return cls(VisionInput(batch["patches"], batch["yx"], batch["frame"]), *rest)


class Generated(NamedTuple):
    """Answers, of jax or of NumPy; row b * group + g is the g-th answer to prompt b.

    tokens:   [N, Tn] sampled ids, the stop token included, then `pad`.
    logprobs: [N, Tn] log softmax(logits / temperature)[token] over the whole vocabulary: before suppression and
              before top-p, so it is what a training forward pass of the same parameters recomputes (greedy: at
              temperature 1). 0 after the end, and where the token was put there (`Sampling.put_at`).
    lengths:  [N] sampled ids, the stop token included.
    finished: [N] bool, a stop token was sampled; false = cut at max_new_tokens.
    """

    tokens: jax.Array | Any
    logprobs: jax.Array | Any
    lengths: jax.Array | Any
    finished: jax.Array | Any


class Sampler:
    """A jitted sampler of one model configuration and one way of drawing. `traces` counts compilations."""

    def __init__(self, cfg: vlm.VLMConfig, sampling: Sampling, group: int = 1):
        if group < 1:
            raise ValueError(f"group={group} must be at least 1")
        self.cfg, self.sampling, self.group = cfg, sampling, group
        self.traces = 0
        self._run = jax.jit(self._trace)

    def __call__(self, params: Params, prompts: Prompts, key: jax.Array) -> Generated:
        """`group` answers to each of B prompts, N = B * group rows. Same params, prompts and key: same answers."""
        return self._run(params, prompts, key)

    def _trace(self, params: Params, prompts: Prompts, key: jax.Array) -> Generated:
        self.traces += 1  # runs while tracing only
        return sample(self.cfg, self.sampling, self.group, params, prompts, key)


def sample(
    cfg: vlm.VLMConfig, sampling: Sampling, group: int, params: Params, prompts: Prompts, key: jax.Array
) -> Generated:
    """The program of `Sampler`, unjitted."""
    out = prefill(cfg, params, prompts)
    Tn = sampling.max_new_tokens
    repeat = lambda x: jnp.repeat(x, group, axis=0)  # noqa: E731
    logits_NV = repeat(vlm.logits(cfg, params, last(out.hidden, prompts))[:, 0])
    start_N = repeat(prompts.next_position)
    N = start_N.shape[0]
    keys_N = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(N))
    stop = jnp.array(sampling.stop, jnp.int32)
    cache = vlm.share_prompts(cfg, out.cache, group, Tn)
    params, cache = vlm.layers_apart(cfg, params, cache, N)
    # What is only read need not travel through the loop.
    fixed = {name: cache.pop(name) for name in ("prompt", "slots") if name in cache}

    class State(NamedTuple):
        t: jax.Array  # answer tokens drawn so far
        token: jax.Array  # [N] the last of them
        done: jax.Array  # [N]
        cache: dict
        out: Generated

    def draw(t: jax.Array, logits_NV: jax.Array, done_N: jax.Array, out: Generated) -> tuple:
        token_N, logprob_N = choose(logits_NV, jax.vmap(jax.random.fold_in, (0, None))(keys_N, t), sampling)
        if sampling.think:
            put_N = (t == sampling.think) & ~(out.tokens[:, : sampling.think] == sampling.close).any(-1)
            token_N, logprob_N = jnp.where(put_N, sampling.close, token_N), jnp.where(put_N, 0.0, logprob_N)
        token_N = jnp.where(done_N, sampling.pad, token_N)
        ends_N = (token_N[:, None] == stop).any(-1) & ~done_N
        return token_N, done_N | ends_N, Generated(
            out.tokens.at[:, t].set(token_N),
            out.logprobs.at[:, t].set(jnp.where(done_N, 0.0, logprob_N)),
            out.lengths + ~done_N,
            out.finished | ends_N,
        )

    def step(s: State) -> State:
        # Token t - 1 goes in at its position, token t comes out.
        positions_N13 = jnp.broadcast_to((start_N + s.t - 1)[:, None, None], (N, 1, 3))
        ones_N1 = jnp.ones((N, 1), jnp.int32)
        token = TokenInput(s.token[:, None], positions_N13, ones_N1, -ones_N1)
        out = vlm.apply(cfg, params, None, token, s.cache | fixed)
        token_N, done_N, generated = draw(s.t, vlm.logits(cfg, params, out.hidden)[:, 0], s.done, s.out)
        return State(s.t + 1, token_N, done_N, {name: out.cache[name] for name in cache}, generated)

    empty = Generated(
        jnp.full((N, Tn), sampling.pad, jnp.int32), jnp.zeros((N, Tn)), jnp.zeros(N, jnp.int32), jnp.zeros(N, bool)
    )
    token_N, done_N, first = draw(jnp.int32(0), logits_NV, repeat(prompts.length) == 0, empty)
    state = State(jnp.int32(1), token_N, done_N, cache, first)
    return jax.lax.while_loop(lambda s: (s.t < Tn) & ~s.done.all(), step, state).out


def choose(logits_NV: jax.Array, keys_N: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """One token a row and its log-probability as `Generated.logprobs` defines it: (int32 [N], float32 [N])."""
    if sampling.temperature == 0:
        token_N = likeliest(logits_NV, sampling)
    else:
        token_N = draw_index(keys_N, probabilities(logits_NV, sampling))
    return token_N, logprobs_of(logits_NV, token_N, sampling)


def probabilities(logits_V: jax.Array, sampling: Sampling) -> jax.Array:
    """What tokens are drawn with, [..., V] float32: temperature, suppression and top-p applied. Not for greedy ones."""
    scaled_V = without(logits_V.astype(jnp.float32) / sampling.temperature, sampling.suppress)
    return jax.nn.softmax(nucleus(scaled_V, sampling.top_p), axis=-1)


def likeliest(logits_V: jax.Array, sampling: Sampling) -> jax.Array:
    """The first largest of those not suppressed, int32 [...]: argmax, whose reduction of pairs is 10 times slower on a
    CPU."""
    logits_V, V = without(logits_V, sampling.suppress), logits_V.shape[-1]
    is_top_V = logits_V == logits_V.max(axis=-1, keepdims=True)
    return jnp.where(is_top_V, jnp.arange(V, dtype=jnp.int32), V - 1).min(axis=-1)


def logprobs_of(logits_V: jax.Array, token: jax.Array, sampling: Sampling) -> jax.Array:
    """As `Generated.logprobs` defines them, float32 of the shape of `token` [...]."""
    logprob_V = jax.nn.log_softmax(logits_V.astype(jnp.float32) / (sampling.temperature or 1.0), axis=-1)
    return jnp.take_along_axis(logprob_V, token[..., None], axis=-1)[..., 0]


def without(logits_V: jax.Array, suppress: tuple[int, ...]) -> jax.Array:
    """Logits [..., V] with these tokens' set to NEVER."""
    return logits_V.at[..., jnp.array(suppress)].set(NEVER) if suppress else logits_V


def draw_index(keys_N: jax.Array, weights_NV: jax.Array) -> jax.Array:
    """One index a row, drawn in proportion to the weights, from the row's own key: int32 [N].

    By inversion in two steps, a block of about sqrt(V) neighbours and then one of them: two random numbers a row
    instead of V (`jax.random.categorical`), 45 times faster on CPU at V = 4096. What has weight 0 is never drawn.
    """
    N, V = weights_NV.shape
    width = 1 << (math.isqrt(V - 1).bit_length())
    weights_NAW = jnp.pad(weights_NV, ((0, 0), (0, -V % width))).reshape(N, -1, width)
    uniform_N2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_N)
    block_N = _invert(weights_NAW.sum(-1), uniform_N2[:, 0])
    inner_NW = jnp.take_along_axis(weights_NAW, block_N[:, None, None], axis=1)[:, 0]
    return block_N * width + _invert(inner_NW, uniform_N2[:, 1])


def _invert(weight_NA: jax.Array, uniform_N: jax.Array) -> jax.Array:
    """The first index of weight > 0 whose running sum exceeds uniform * total. int32 [N]."""
    sum_NA = jnp.cumsum(weight_NA, axis=-1)
    # weight > 0: where a backend adds prefixes in a tree, rounding alone may make a sum grow.
    hit_NA = (sum_NA > uniform_N[:, None] * sum_NA[:, -1:]) & (weight_NA > 0)
    # Rounding may leave no hit at the far end of the unit interval: then the likeliest.
    index_N = jnp.where(hit_NA.any(-1), jnp.argmax(hit_NA, axis=-1), jnp.argmax(weight_NA, axis=-1))
    return index_N.astype(jnp.int32)


def nucleus(logits_NV: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Logits with all but the smallest set of tokens of probability >= top_p set to NEVER (arXiv 1904.09751); top_p of
    each row apart is [N, 1] and below 1."""
    if isinstance(top_p, (int, float)) and top_p >= 1:
        return logits_NV
    sorted_NV = jnp.sort(logits_NV, axis=-1, descending=True)
    probability_NV = jax.nn.softmax(sorted_NV, axis=-1)
    before_NV = jnp.cumsum(probability_NV, axis=-1) - probability_NV
    last_N1 = jnp.sum(before_NV < top_p, axis=-1, keepdims=True) - 1
    return jnp.where(logits_NV >= jnp.take_along_axis(sorted_NV, last_N1, axis=-1), logits_NV, NEVER)


def prefill(cfg: vlm.VLMConfig, params: Params, prompts: Prompts) -> vlm.VLMOutput:
    """One pass over the prompts, with their cache."""
    B, T = prompts.tokens.shape
    out = vlm.apply(cfg, params, prompts.vision, inputs(prompts), vlm.init_cache(cfg, B, T), fresh=True)
    return out._replace(cache=out.cache | {"length": prompts.length})


def inputs(prompts: Prompts) -> TokenInput:
    valid_BT = jnp.arange(prompts.tokens.shape[1]) < prompts.length[:, None]
    return TokenInput(prompts.tokens, prompts.positions, valid_BT.astype(jnp.int32), prompts.image_row)


def last(x_BTD: jax.Array, prompts: Prompts) -> jax.Array:
    """[B, 1, D]: the entry of each prompt's last token."""
    return jnp.take_along_axis(x_BTD, jnp.maximum(prompts.length - 1, 0)[:, None, None], axis=1)

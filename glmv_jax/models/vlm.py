"""The vision-language model: CogViT, merger, GLM decoder, MTP head, over packed rows of text and patches.

params: {"vision", "merger", "decoder", "mtp"}; the first two are what stages 1 and 2 trained, under the same names.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glmv_jax.kernels.span import IN_ORDER, Span
from glmv_jax.models import cogvit, decoder, mtp
from glmv_jax.models.block import LARGE, by_rows
from glmv_jax.models.home import home
from glmv_jax.parallel import context, dispatch, micro, pipeline, rules
from glmv_jax.parallel.mesh import data_shards
from glmv_jax.parallel.rules import constrain
from glmv_jax.typing import Dispatched, Params, TokenInput, UserError, VisionInput

MOST_ROWS = 32  # of a product; with more both of its forms take as long


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """vision and merger are None for a model of text alone.

    patches_at_once: of a device, that pass encoder and merger together, forward and backward, in whole rows; 0: all.
    Of the others only bytes and visual tokens are kept, for one more forward pass (`parallel.micro`).
    """

    vision: cogvit.CogViTConfig | Any  # or another of its kind
    merger: cogvit.MergerConfig | None
    decoder: Any  # decoder.DecoderConfig, or another of its kind
    mtp: mtp.MTPConfig | None = None
    patches_at_once: int = 0

    def __post_init__(self) -> None:
        if self.vision is None or self.merger is None:
            if self.vision is not self.merger:
                raise ValueError("vision and merger go together; give both, or None for a model of text alone")
            return
        if self.merger.in_width != self.vision.width or self.merger.width != self.decoder.width:
            raise ValueError(
                f"widths do not meet: vision {self.vision.width} -> merger {self.merger.in_width} -> "
                f"{self.merger.width} -> decoder {self.decoder.width}"
            )

    def parts(self) -> dict[str, Any]:
        parts = {"vision": self.vision, "merger": self.merger, "decoder": self.decoder, "mtp": self.mtp}
        return {name: part for name, part in parts.items() if part is not None}

    def flops(self, tokens: float, keys: float, rows: int, patches: int) -> float:
        """Forward FLOPs of `tokens` text positions and `rows` rows of `patches` patches."""
        total = self.decoder.flops(tokens, keys) + (self.mtp.flops(tokens, keys) if self.mtp else 0)
        return total + rows * sum(part.flops(patches) for part in (self.vision, self.merger) if part is not None)


class VLMOutput(NamedTuple):
    """hidden, prenorm: [B, T, D] after and before the final norm; merged: [B, T, D] what entered the backbone; cache,
    aux: as in `decoder.DecoderOutput`. Where rows are split over devices these are too, in the devices' order (see
    `parallel.context`; `losses.select` finds positions in it)."""

    hidden: jax.Array
    prenorm: jax.Array
    merged: jax.Array
    cache: dict | Any  # None where none was given
    aux: dict[str, jax.Array]


def encode_images(cfg: VLMConfig, params: Params, vision: VisionInput | Dispatched) -> jax.Array:
    """Visual tokens [B, M, D] of rows of patches; of images that are `Dispatched` [R, G, D], on the R devices or groups
    of devices that have the rows of text. UserError when the model reads text alone."""
    if cfg.vision is None:
        raise UserError("this model reads text alone, but images were given; leave them out or take a vision model")
    if isinstance(vision, Dispatched):
        with dispatch.encoding():
            visual_VMD = encode_images(cfg, params, vision.rows)
        return home(visual_VMD, vision.sent, vision.places)
    B, P = vision.frame.shape
    context.check(P, context.parts(), "patches", 4)

    parts = cfg.parts()

    def encode(vision: VisionInput) -> jax.Array:
        features_BPD = cogvit.apply(parts["vision"], params["vision"], vision)
        visual_BMD = cogvit.merge(parts["merger"], params["merger"], features_BPD)
        return constrain(visual_BMD, "batch", "length", "activation")

    shards = data_shards(rules.active_mesh())
    pieces = micro.pieces_for(B, shards, P / context.parts(), cfg.patches_at_once)
    return constrain(micro.in_pieces(encode, vision, pieces), "batch", "length", "activation")


@jax.named_scope("embed")
def embed(cfg: VLMConfig, params: Params, visual_BMD: jax.Array | None, tokens: TokenInput) -> jax.Array:
    """Inputs of the backbone [B, T, D]: table rows, with visual token image_row[b, t] of row b where that is >= 0.

    Each device takes those of its positions: all visual tokens of its rows are gathered. Where visual_BMD has fewer
    rows than the batch, equal runs of rows share one of them.
    """
    x_BTD = decoder.embed(params["decoder"], tokens.tokens)
    if visual_BMD is None:
        return x_BTD
    visual_BMD = constrain(visual_BMD, "batch", None, "activation")
    rows_BT = jnp.maximum(tokens.image_row, 0)
    if len(visual_BMD) == len(rows_BT):
        picked_BTD = jnp.take_along_axis(visual_BMD, rows_BT[..., None], axis=1)
    else:
        runs_RBT = rows_BT.reshape(len(visual_BMD), -1, rows_BT.shape[1])
        picked_BTD = jax.vmap(lambda x, at: jnp.take(x, at, axis=0, mode="clip"))(visual_BMD, runs_RBT)
    picked_BTD = picked_BTD.reshape(x_BTD.shape).astype(x_BTD.dtype)
    return jnp.where(tokens.image_row[..., None] >= 0, picked_BTD, x_BTD)


def apply(
    cfg: VLMConfig, params: Params, vision: VisionInput | Dispatched | jax.Array | None, tokens: TokenInput,
    cache: dict | None = None, fresh: bool = False,
) -> VLMOutput:  # fmt: skip
    """One pass over packed rows (cache None), or over the next T positions of rows being decoded.

    vision: an array is of visual tokens as `encode_images` returned them.
    cache: the decoder's, "slots" [S], their numbers, and "length", the slots each row has filled, [B], or [1] for all
    rows alike (their keys are then written at once). Position t of row b takes slot length[b] + t and sees the slots up
    to its own; the returned length has grown by T. Of segments only 0 counts then. A caller that pads prompts on the
    right gives padding segment 0 and sets "length" back to the true lengths afterwards: later tokens overwrite the
    padding's slots before anything can see them. With "prompt" (`share_prompts`) rows also see all of their prompt.
    fresh: promises that nothing is in the cache yet. Where it has no more slots than there are positions, a row then
    sees itself, as without a cache, by the kernels for that; what it leaves in the cache is the same.

    In a pipeline whose ends are stages (`parallel.pipeline`) the rows that come out are those of `pipeline.on_last`,
    and `merged` is what the first stage has.
    """
    if cache is None:
        vision, tokens = pipeline.on_first((vision, tokens))
    B, T = tokens.tokens.shape
    if cache is None:  # rows may be split: from here on in the devices' order, which the slots tell
        tokens = TokenInput(*map(context.dealt, tokens))
    visual_BMD = vision if vision is None or isinstance(vision, jax.Array) else encode_images(cfg, params, vision)
    merged_BTD = embed(cfg, params, visual_BMD, tokens)
    if cache is None:
        slots_BT = context.dealt(jnp.broadcast_to(jnp.arange(T), (B, T)))
        query = key = Span(tokens.segments, slots_BT, tokens.branches, IN_ORDER)
        own = None
    else:
        query, key = cached_spans(cache, T)
        if fresh and len(cache["slots"]) == T and context.parts() == 1:
            query = key = query._replace(in_order=IN_ORDER)
        query = query._replace(valid=tokens.segments > 0)
        own = {name: x for name, x in cache.items() if name not in ("length", "slots")}
    out = decoder.apply(cfg.decoder, params["decoder"], merged_BTD, tokens.positions, query, key, own)
    if cache is not None:
        cache = cache | out.cache | {"length": cache["length"] + T}
    return VLMOutput(out.hidden, out.prenorm, merged_BTD, cache, out.aux)


def cached_spans(cache: dict, T: int) -> tuple[Span, Span]:
    """What the next T positions of rows with this cache may see: its slots up to their own."""
    slots_BT = cache["length"][:, None] + jnp.arange(T)
    slots_1S = cache["slots"][None]
    return Span(jnp.ones_like(slots_BT), slots_BT), Span(jnp.ones_like(slots_1S), slots_1S)


def head(cfg: VLMConfig, params: Params) -> jax.Array:
    """The output head [D, V], for losses that make logits a few tokens at a time."""
    return decoder.head(cfg.decoder, params["decoder"])


def logits(cfg: VLMConfig, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """[B, T, V] float32."""
    return decoder.logits(cfg.decoder, params["decoder"], hidden_BTD)


@jax.named_scope("mtp")
def mtp_hidden(
    cfg: VLMConfig, params: Params, out: VLMOutput, tokens: TokenInput
) -> tuple[list[jax.Array], list[dict[str, jax.Array]]]:
    """Normed hidden states [B, T, D] of MTP depths 1..K, and what the block says about itself at each (as `aux` of
    `decoder.DecoderOutput`, without L). `logits` turns a hidden state into predictions of t_{i+k+1}.

    tokens: in a pipeline whose ends are stages `pipeline.on_last(tokens)`.

    Raises ValueError for rows with branches: the head reads a row's next tokens, and a prompt has several.
    """
    if tokens.branches is not None:
        raise ValueError("the MTP head takes no rows with branches; pack every answer with its own prompt")
    head: mtp.MTPConfig | Any = cfg.mtp
    table_BXD = decoder.embed(params["decoder"], context.overlapping(tokens.tokens, head.depth))
    table_BXD = constrain(table_BXD, "batch", "length", "activation")
    inputs = mtp.HeadInput(table_BXD, pipeline.to_last(out.merged), tokens.image_row >= 0)
    h_BTD = out.hidden if head.h_prev == "post_norm" else out.prenorm
    return mtp.apply(head, params["mtp"], h_BTD, inputs, tokens)


def init_cache(cfg: VLMConfig, batch: int, length: int) -> dict:
    """An empty cache of `length` slots for `batch` rows; see `apply`."""
    counts = {"slots": jnp.arange(length), "length": jnp.zeros((batch,), jnp.int32)}
    return cfg.decoder.init_cache(batch, length) | counts


def share_prompts(cfg: VLMConfig, cache: dict, group: int, length: int) -> dict:
    """From the cache of B prompts that of `group` continuations of each, with `length` slots of their own; row
    b * group + g continues prompt b."""
    own = {name: x for name, x in cache.items() if name not in ("length", "slots")}
    own, slots, filled = cfg.decoder.share_prompts(own, cache["length"], group, length)
    return own | {"slots": jnp.arange(slots), "length": filled}


def layers_apart(cfg: VLMConfig, params: Params, cache: dict, rows: int) -> tuple[Params, dict]:
    """The same parameters and cache, laid out for decoding on this device: on a CPU, where that is faster, without a
    loop over layers and, for steps of a few rows, with large matrices by rows; elsewhere as they are.

    rows: tokens of all rows of a batch that a step reads.
    """
    if rules.device().platform != "cpu":
        return params, cache
    counts = {name: cache[name] for name in ("slots", "length")}
    own = {name: x for name, x in cache.items() if name not in counts}
    decoder_params, own = cfg.decoder.layers_apart(params["decoder"], own)
    return for_rows(cfg, params | {"decoder": decoder_params}, rows), own | counts


def for_rows(cfg: VLMConfig, params: Params, rows: int) -> Params:
    """Parameters with layers apart, their large matrices by rows if that is faster for steps of so many."""
    if rules.device().platform != "cpu" or not 1 < rows <= MOST_ROWS:
        return params
    head_VD = decoder.head(cfg.decoder, params["decoder"]).T
    params = params | {name: by_rows(params[name]) for name in ("decoder", "mtp") if name in params}
    if head_VD.size >= LARGE:
        params["decoder"]["head_VD"] = head_VD
    return params

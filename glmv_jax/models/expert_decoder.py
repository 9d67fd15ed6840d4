"""What decoders have in common whose first layers are dense and whose others are mixtures of experts."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import linen as nn

from glmv_jax.models.decoder import DecoderConfig, Runs, runs_apart
from glmv_jax.models.moe import MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertDecoderConfig(abc.ABC):
    """A family adds `stacks` (what is scanned and how often, in order: see `decoder.Runs`), `block` (of the MTP head),
    rope(), share_prompts() and numbers of its own.

    dense: how many layers at the start have a plain MLP, `mlp` wide. expert_mlp to dense_experts: see `moe.MoEConfig`.
    """

    vocab: int
    depth: int
    width: int
    heads: int
    mlp: int
    dense: int
    expert_mlp: int
    experts: int
    chosen: int = 8
    shared: int = 1
    groups: int = 1
    chosen_groups: int = 1
    normalise: bool = True
    route_scale: float = 1.0
    dense_experts: bool = False
    rope_theta: float = 1e4
    rope_split: tuple[int, int, int] = (8, 12, 12)
    norm_eps: float = 1e-5
    tied: bool = False
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1  # layers a turn of the loop over them, see `block.stack`

    @property
    @abc.abstractmethod
    def stacks(self) -> Sequence[tuple[Any, int]]:
        """(block, how often), in order."""

    @property
    def moe(self) -> MoEConfig:
        return MoEConfig(
            self.width, self.expert_mlp, self.experts, self.chosen, self.shared, self.groups, self.chosen_groups,
            self.normalise, self.route_scale, self.dense_experts, self.dtype,
        )  # fmt: skip

    def flops(self, tokens: float, keys: float) -> float:
        """Forward FLOPs of `tokens` tokens, output head included, each seeing `keys` keys on average."""
        layers = sum(run.flops(keys) * times for run, times in self.stacks)
        return tokens * (layers + 2 * self.width * self.vocab)

    def init_cache(self, batch: int, length: int) -> dict:
        """Zeros for `batch` rows of `length` slots; "layers" has a part a run, with leaves [L, ...]."""
        runs = enumerate(self.stacks)
        return {"layers": {f"blocks{i}": run.empty_cache(times, batch, length) for i, (run, times) in runs}}

    def layers_apart(self, params: dict, cache: dict) -> tuple[dict, dict]:
        """See `decoder.runs_apart`."""
        return runs_apart(self.stacks, params, cache)

    def module(self) -> nn.Module:
        return Runs(self)

    example = DecoderConfig.example


class OfConfig:
    """A unit of layers that `block.stack` repeats, whose numbers are those of its decoder, `cfg`."""

    cfg: ExpertDecoderConfig

    @property
    def width(self) -> int:
        return self.cfg.width

    @property
    def norm_eps(self) -> float:
        return self.cfg.norm_eps

    @property
    def dtype(self) -> str:
        return self.cfg.dtype

"""A mixture of experts as in GLM-4.5 and GLM-5 (and DeepSeek-V3): sigmoid router with a bias that only chooses, no
capacity and no dropped tokens, experts every token shares.

    s = sigmoid(x W_r);  chosen = top-k of s + bias;  y = scale * sum_chosen s_e / sum s * E_e(x) + shared(x)

The bias is not learnt by gradient: after a step it moves up where an expert had fewer tokens than the mean and down
where it had more (loss-free balancing, arXiv 2408.15664; `optim.balance`). Beside it a small sequence-wise loss
(DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).
Source: transformers `glm_moe_dsa/modeling_glm_moe_dsa.py` (GlmMoeDsaMoE), the same as in `glm4v_moe`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels.matmul import matmul
from glmv_jax.models import experts as experts_lib
from glmv_jax.models.layers import SwiGLU, fan_in, param, zeros


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The numbers of one layer. hidden: of one expert. shared: how many experts all tokens share.

    groups, chosen_groups: the router first chooses groups of experts by the sum of their two best scores.
    dense: experts multiply every token, the reference beside the grouped products.
    limit: of every SwiGLU, as `layers.SwiGLU`.
    """

    width: int
    hidden: int
    experts: int
    chosen: int
    shared: int = 1
    groups: int = 1
    chosen_groups: int = 1
    normalise: bool = True
    scale: float = 1.0
    dense: bool = False
    dtype: str = "float32"
    limit: float | None = None

    def flops(self) -> float:
        """Multiply-adds x 2 of one token through the forward pass."""
        return 2 * self.width * (3 * self.hidden * (self.chosen + self.shared) + self.experts)


class Routing(NamedTuple):
    """expert: int32 [B, T, k] chosen; weight: [B, T, k] float32; score: [B, T, E] float32, the sigmoids."""

    expert: jax.Array
    weight: jax.Array
    score: jax.Array


def route(cfg: MoEConfig, logits_BTE: jax.Array, bias_E: jax.Array) -> Routing:
    """Chooses experts by score + bias, ties to the lower number, and weighs them by score alone."""
    score_BTE = jax.nn.sigmoid(logits_BTE)
    choice_BTE = jax.lax.stop_gradient(score_BTE + bias_E)
    if cfg.groups > 1:
        by_group = choice_BTE.reshape(*choice_BTE.shape[:2], cfg.groups, cfg.experts // cfg.groups)
        best_BTG = jax.lax.top_k(by_group, 2)[0].sum(-1)
        group_BTA = jax.lax.top_k(best_BTG, cfg.chosen_groups)[1]
        allowed_BTG = (group_BTA[..., None] == jnp.arange(cfg.groups)).any(-2)
        choice_BTE = jnp.where(allowed_BTG[..., None], by_group, -jnp.inf).reshape(choice_BTE.shape)
    expert_BTA = jax.lax.top_k(choice_BTE, cfg.chosen)[1]
    weight_BTA = jnp.take_along_axis(score_BTE, expert_BTA, axis=-1)
    if cfg.normalise:
        weight_BTA = weight_BTA / (weight_BTA.sum(-1, keepdims=True) + 1e-20)
    return Routing(expert_BTA, weight_BTA * cfg.scale, score_BTE)


class MoE(nn.Module):
    """[B, T, D] -> ([B, T, D], aux). Tokens outside `valid` get the shared experts only, and do not count.

    aux: "load" [E], how many tokens chose each expert; "balance", the sequence-wise loss, a row being a sequence.
    """

    cfg: MoEConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.cfg
        D = x_BTD.shape[-1]
        valid_BT = jnp.broadcast_to(valid_BT, x_BTD.shape[:2])  # one row may stand for all
        router_DE = param(self, "router", fan_in, (D, c.experts), ("embed", "router"))
        bias_E = param(self, "router_bias", zeros, (c.experts,), ("router",))
        where = experts_lib.AXES
        gate, up = (param(self, n, fan_in_expert, (c.experts, D, c.hidden), where.gate) for n in ("gate", "up"))
        down = param(self, "down", fan_in_expert, (c.experts, c.hidden, D), where.down)

        with jax.named_scope("router"):
            routing = route(c, matmul(x_BTD.astype(jnp.float32), router_DE), bias_E)
        with jax.named_scope("experts"):
            chosen = experts_lib.Chosen(routing.expert, routing.weight, valid_BT)
            matrices = experts_lib.Experts(gate, up, down)
            out_BTD, load_E = experts_lib.apply(x_BTD.astype(c.dtype), chosen, matrices, c.dense, c.limit)
        if c.shared:
            out_BTD = out_BTD + SwiGLU(c.shared * c.hidden, D, limit=c.limit, dtype=c.dtype, name="shared")(x_BTD)
        return out_BTD.astype(x_BTD.dtype), {"load": load_E, "balance": balance(c, routing, valid_BT)}


fan_in_expert = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=1, out_axis=2, batch_axis=0)


@jax.named_scope("router")
def balance(cfg: MoEConfig, routing: Routing, valid_BT: jax.Array) -> jax.Array:
    """Mean over rows of sum_e f_e P_e: f_e the share of tokens that chose e times E / k, P_e the mean normalised score.

    1 when all experts are alike. Multiply by the small alpha of DeepSeek-V3 (1e-4). Rows without a token count 0.
    """
    weight_BT = valid_BT.astype(jnp.float32)
    tokens_B1 = jnp.maximum(weight_BT.sum(1, keepdims=True), 1)
    chosen_BTE = (routing.expert[..., None] == jnp.arange(cfg.experts)).any(-2)
    share_BE = jnp.einsum("bte,bt->be", chosen_BTE.astype(jnp.float32), weight_BT) / tokens_B1
    score_BTE = routing.score / (routing.score.sum(-1, keepdims=True) + 1e-20)
    mean_BE = jnp.einsum("bte,bt->be", score_BTE, weight_BT) / tokens_B1
    return (share_BE * mean_BE).sum(-1).mean() * cfg.experts / cfg.chosen

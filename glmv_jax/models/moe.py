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
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from glmv_jax.kernels.grouped_matmul import grouped_matmul, plain
from glmv_jax.models.layers import SwiGLU, fan_in, param, zeros


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The numbers of one layer. hidden: of one expert. shared: how many experts all tokens share.

    groups, chosen_groups: the router first chooses groups of experts by the sum of their two best scores.
    dense: experts multiply every token, the reference beside the grouped products.
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

    def flops(self) -> float:
        """Multiply-adds x 2 of one token through the forward pass."""
        return 2 * self.width * (3 * self.hidden * (self.chosen + self.shared) + self.experts)


class Routing(NamedTuple):
    """expert: int32 [N, k] chosen; weight: [N, k] float32; score: [N, E] float32, the sigmoids."""

    expert: jax.Array
    weight: jax.Array
    score: jax.Array


def route(cfg: MoEConfig, logits_NE: jax.Array, bias_E: jax.Array) -> Routing:
    """Chooses experts by score + bias, ties to the lower number, and weighs them by score alone."""
    score_NE = jax.nn.sigmoid(logits_NE)
    choice_NE = jax.lax.stop_gradient(score_NE + bias_E)
    if cfg.groups > 1:
        by_group = choice_NE.reshape(-1, cfg.groups, cfg.experts // cfg.groups)
        best_NG = jax.lax.top_k(by_group, 2)[0].sum(-1)
        group_NA = jax.lax.top_k(best_NG, cfg.chosen_groups)[1]
        allowed_NG = (group_NA[:, :, None] == jnp.arange(cfg.groups)).any(1)
        choice_NE = jnp.where(allowed_NG[:, :, None], by_group, -jnp.inf).reshape(choice_NE.shape)
    expert_NA = jax.lax.top_k(choice_NE, cfg.chosen)[1]
    weight_NA = jnp.take_along_axis(score_NE, expert_NA, axis=1)
    if cfg.normalise:
        weight_NA = weight_NA / (weight_NA.sum(-1, keepdims=True) + 1e-20)
    return Routing(expert_NA, weight_NA * cfg.scale, score_NE)


class MoE(nn.Module):
    """[B, T, D] -> ([B, T, D], aux). Tokens outside `valid` get the shared experts only, and do not count.

    aux: "load" [E], how many tokens chose each expert; "balance", the sequence-wise loss, a row being a sequence.
    """

    cfg: MoEConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.cfg
        B, T, D = x_BTD.shape
        valid_BT = jnp.broadcast_to(valid_BT, (B, T))  # one row may stand for all
        router_DE = param(self, "router", fan_in, (D, c.experts), ("embed", "router"))
        bias_E = param(self, "router_bias", zeros, (c.experts,), ("router",))
        gate, up = (param(self, n, fan_in_expert, (c.experts, D, c.hidden), ("expert", "embed", "mlp")) for n in _IN)
        down = param(self, "down", fan_in_expert, (c.experts, c.hidden, D), ("expert", "mlp", "embed"))

        with jax.named_scope("router"):
            logits_NE = x_BTD.reshape(B * T, D).astype(jnp.float32) @ router_DE
            routing = route(c, logits_NE, bias_E)
        x_ND = x_BTD.reshape(B * T, D).astype(c.dtype)
        with jax.named_scope("experts"):
            out_ND, load_E = experts(c, routing, x_ND, valid_BT.reshape(-1), gate, up, down)
        out_BTD = out_ND.reshape(B, T, D)
        if c.shared:
            out_BTD = out_BTD + SwiGLU(c.shared * c.hidden, D, dtype=c.dtype, name="shared")(x_BTD)
        return out_BTD.astype(x_BTD.dtype), {"load": load_E, "balance": balance(c, routing, valid_BT)}


_IN = ("gate", "up")
fan_in_expert = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=1, out_axis=2, batch_axis=0)


def experts(
    cfg: MoEConfig, routing: Routing, x_ND: jax.Array, valid_N: jax.Array, gate_EDF, up_EDF, down_EFD
) -> tuple[jax.Array, jax.Array]:
    """(weighted sum of the chosen experts [N, D], tokens an expert [E] float32).

    Rows (a token and one of its experts) are sorted by expert; those of invalid tokens come last and belong to none.
    """
    N, A = routing.expert.shape
    expert_R = jnp.where(valid_N[:, None], routing.expert, cfg.experts).reshape(-1)
    order_R = jnp.argsort(expert_R, stable=True)
    back_R = jnp.argsort(order_R)
    sizes_E = jnp.bincount(expert_R, length=cfg.experts + 1)[:-1].astype(jnp.int32)
    product = plain if cfg.dense else grouped_matmul
    x_RD = _spread(x_ND, order_R, back_R, A)
    hidden_RF = jax.nn.silu(product(x_RD, gate_EDF, sizes_E)) * product(x_RD, up_EDF, sizes_E)
    y_NAD = _permute(product(hidden_RF, down_EFD, sizes_E), back_R, order_R).reshape(N, A, -1)
    out_ND = jnp.einsum("nad,na->nd", y_NAD, routing.weight.astype(y_NAD.dtype))
    return out_ND, jax.lax.stop_gradient(sizes_E.astype(jnp.float32))


# Both are gathers with gathers as their gradients: XLA's own gradient of a gather is a scatter, one row at a time.


@jax.custom_vjp
def _permute(x_RD: jax.Array, order_R: jax.Array, back_R: jax.Array) -> jax.Array:
    """x[order]; `back` is the inverse permutation."""
    return jnp.take(x_RD, order_R, axis=0)


_permute.defvjp(
    lambda x, order, back: (_permute(x, order, back), back),
    lambda back, g: (jnp.take(g, back, axis=0), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_ND: jax.Array, order_R: jax.Array, back_R: jax.Array, copies: int) -> jax.Array:
    """Row r is token order[r] // copies."""
    return jnp.take(x_ND, order_R // copies, axis=0)


def _collect(copies: int, back_R: jax.Array, g_RD: jax.Array) -> tuple[jax.Array, None, None]:
    return jnp.take(g_RD, back_R, axis=0).reshape(-1, copies, g_RD.shape[-1]).sum(1), None, None


_spread.defvjp(lambda x, order, back, copies: (_spread(x, order, back, copies), back), _collect)


def balance(cfg: MoEConfig, routing: Routing, valid_BT: jax.Array) -> jax.Array:
    """Mean over rows of sum_e f_e P_e: f_e the share of tokens that chose e times E / k, P_e the mean normalised score.

    1 when all experts are alike. Multiply by the small alpha of DeepSeek-V3 (1e-4). Rows without a token count 0.
    """
    B, T = valid_BT.shape
    weight_BT = valid_BT.astype(jnp.float32)
    tokens_B1 = jnp.maximum(weight_BT.sum(1, keepdims=True), 1)
    chosen_BTE = (routing.expert[:, :, None] == jnp.arange(cfg.experts)).any(1).reshape(B, T, -1)
    share_BE = jnp.einsum("bte,bt->be", chosen_BTE.astype(jnp.float32), weight_BT) / tokens_B1
    score_NE = routing.score / (routing.score.sum(-1, keepdims=True) + 1e-20)
    mean_BE = jnp.einsum("bte,bt->be", score_NE.reshape(B, T, -1), weight_BT) / tokens_B1
    return (share_BE * mean_BE).sum(-1).mean() * cfg.experts / cfg.chosen

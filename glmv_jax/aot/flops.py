"""Floating-point operations of products in a compiled program: dots, and the convolutions that a TPU makes of them."""

from __future__ import annotations

import functools
import math
import re

from glmv_jax.aot.hlo import Computation, Op

_KERNEL = r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)'
_ATTENTION = re.compile(r"/splash_[a-z]+_(fwd|dq|dkv)_")
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # of a block of queries with one of keys: the backward ones make scores anew


def flops(computation: Computation, op: Op) -> float:
    """Multiply-adds x 2 of one operation; of a custom kernel what its author says; 0 for what is no product."""
    if op.opcode == "dot":
        left = computation.at[op.operands[0]].arrays[0]
        summed = [int(i) for i in op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}").split(",") if i]
        return 2 * math.prod(op.arrays[0].dims) * math.prod(left.dims[i] for i in summed)
    if op.opcode == "convolution":
        left, right = (computation.at[name].arrays[0].dims for name in op.operands[:2])
        return convolution(left, right, op.arrays[0].dims, op.attributes)
    if op.opcode == "custom-call":
        found = _ATTENTION.search(op.scope)
        return attention(computation, op, _PRODUCTS[found[1]]) if found else float(op.attribute(_KERNEL) or 0)
    return 0.0


def attention(computation: Computation, op: Op, products: int) -> float:
    """Of JAX's attention kernels, whose author says nothing: of the blocks that are run.

    Operands are tables of blocks, q, k, v, two of segments, what the backward ones need, and for a causal mask, of
    whose blocks those beyond the diagonal are left out, the queries' positions.
    """
    given = [computation.at[name].arrays[0] for name in op.operands]
    wide = [i for i, array in enumerate(given) if array.dtype in ("bf16", "f16", "f32")]
    q, v = given[wide[0]], wide[2]
    keys = max(given[v + 2].dims[-2:])  # their segments, [keys, 128] or [8, keys]
    whole = 2.0 * products * math.prod(q.dims) * keys
    if sum(array.dtype == "s32" for array in given[v + 1 :]) < 3:
        return whole
    blocks = max(given[0].dims)
    return whole * (blocks + 1) / (2 * blocks)


def convolution(left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], attributes: str) -> float:
    """As XLA counts (HloCostAnalysis): where the window lies on padding or between dilated elements nothing is done.

    So that a batch of products, which a TPU writes as a convolution with a window as long as the batch, is not counted
    once for each pair of its members.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels is not understood: {attributes[:200]}")
    groups = int((re.search(r"batch_group_count=(\d+)", attributes) or [0, 1])[1])
    spatial = sorted(set(labels[1]) - set("bf"))
    total = 2.0 * out[labels[3].index("f")] * right[labels[2].index("i")] * (left[labels[1].index("b")] // groups)
    window = dict(re.findall(r"(\w+)=([^\s}]+)", (re.search(r"window=\{([^}]*)\}", attributes) or ["", ""])[1]))
    each = lambda name, default: window[name].split("x") if name in window else [default] * len(spatial)  # noqa: E731
    strides, pads = each("stride", "1"), each("pad", "0_0")
    between, apart = each("lhs_dilate", "1"), each("rhs_dilate", "1")
    for i, label in enumerate(spatial):
        sizes = left[labels[1].index(label)], right[labels[2].index(label)], out[labels[3].index(label)]
        low = int(pads[i].split("_")[0])
        total *= _places(*sizes, int(strides[i]), low, int(between[i]), int(apart[i]))
    return total


@functools.lru_cache(maxsize=4096)
def _places(left: int, window: int, out: int, stride: int, low: int, between: int, apart: int) -> int:
    """Pairs (k, o) of window and output positions for which o * stride + k * apart - low is an element of the input,
    whose elements are `between` apart."""
    last = (left - 1) * between
    common = math.gcd(stride, between)
    period = between // common
    inverse = pow(stride // common, -1, period)
    count = 0
    for k in range(window):
        shift = low - k * apart  # o * stride = shift + a multiple of `between`, from shift to shift + last
        if shift % common:
            continue
        first = shift // common * inverse % period  # the smallest o >= 0 that meets an element
        lowest, highest = max(0, -(-shift // stride)), min(out - 1, (shift + last) // stride)
        count += max(0, (highest - first) // period - -(-(lowest - first) // period) + 1)
    return count

"""Visual tokens of images that are encoded anywhere, to the devices that have their text.

Images are encoded in rows of the encoder's own, by all devices of the mesh (`parallel.dispatch`), and each visual token
is sent to the device that wants it, by an all-to-all of as many as there are (`kernels.exchange`). Devices exchange
them with those of their own process, for this is how far a process' loader sees (`data.encoding`); what it decides are
numbers, which go to the devices as arrays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from glmv_jax.kernels.exchange import Slices, Way, exchange
from glmv_jax.parallel import dispatch
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel.mesh import data_shards


def home(x_VMD: jax.Array, sent_VM: jax.Array, places: int) -> jax.Array:
    """[R, G, D]: visual tokens of the encoder's rows, on the R devices or groups of devices that have rows of text.

    G: `places` of each device of a group. sent_VM: as `data.encoding` says; what nobody is sent is zero. Gradients
    travel back. UserError when the devices of a process are no whole groups.
    """
    D = x_VMD.shape[-1]
    mesh = rules_lib.active_mesh()
    if mesh is None:
        at = jnp.where(sent_VM < 0, places, sent_VM).reshape(-1)
        return jnp.zeros((1, places, D), x_VMD.dtype).at[0, at].set(x_VMD.reshape(-1, D), mode="drop")
    way = Way(dispatch.over(mesh), dispatch.of_processes(mesh))

    def local(x_VMD: jax.Array, sent_VM: jax.Array) -> jax.Array:
        device_S = jnp.where(sent_VM < 0, way.size(), sent_VM // places).reshape(-1)
        counts_G = jnp.bincount(device_S, length=way.size() + 1)[:-1].astype(jnp.int32)
        counts_GG = jax.lax.all_gather(counts_G, way.axes, axis_index_groups=way.groups)
        x_SD = _ordered(x_VMD.reshape(-1, D), jnp.argsort(device_S, stable=True))
        # What stays, the encoder's padding, has no gradient: the way back leaves there what it finds.
        x_SD = jnp.where(jnp.arange(len(x_SD))[:, None] < counts_G.sum(), x_SD, 0)
        return exchange(x_SD, *ways(counts_GG, way.me()), way, places, min(len(x_SD), places), True)

    where = P(way.axes)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(where, where), out_specs=where, check_vma=False)
    x_RGD = mapped(x_VMD, sent_VM).reshape(data_shards(mesh), -1, D)
    return rules_lib.constrain(x_RGD, "batch", None, "activation")


def ways(counts_GG: jax.Array, me: jax.Array) -> tuple[Slices, Slices]:
    """How device `me` sends its rows, which lie in the order of their destinations, so that they arrive in the order of
    their senders; and back. counts_GG: rows from a device (row) to a device (column)."""
    lie_GG, arrive_GG = (jnp.cumsum(counts_GG, axis=axis) - counts_GG for axis in (1, 0))
    there = Slices(lie_GG[me], counts_GG[me], arrive_GG[me], counts_GG[:, me])
    back = Slices(arrive_GG[:, me], counts_GG[:, me], lie_GG[:, me], counts_GG[me])
    return there, back


@jax.custom_vjp
def _ordered(x_SD: jax.Array, order_S: jax.Array) -> jax.Array:
    """x[order], of a permutation, whose gradient is a gather too."""
    return jnp.take(x_SD, order_S, axis=0)


_ordered.defvjp(
    lambda x, order: (_ordered(x, order), order),
    lambda order, g: (jnp.take(g, jnp.argsort(order), axis=0), None),
)

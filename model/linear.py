"""Products of activations and weights, with gradients in the layout that they are wanted in."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project(
    subscripts: str, x: jax.Array, w: jax.Array, out_sharding: PartitionSpec | None = None
) -> jax.Array:
    """einsum(subscripts, x, w) in x's dtype, as `project("BTD,DF->BTF", x_BTD, w_DF)`.

    `out_sharding` is needed where a contracted dim is sharded. The gradient of w is accumulated
    and kept in w's own dtype. JAX's rule for it is a product of the output's gradient and x,
    transposed; on a CPU that costs twice the product itself (docs/performance.md).
    """
    return jnp.einsum(subscripts, x, w.astype(x.dtype), out_sharding=out_sharding)


def _forward(subscripts, x, w, out_sharding):
    # Not `project`: inside another custom rule, remat="dots" would not see the product to keep.
    return jnp.einsum(subscripts, x, w.astype(x.dtype), out_sharding=out_sharding), (x, w)


def _backward(subscripts, out_sharding, saved, dy):
    x, w = saved
    operands, y_dims = subscripts.split("->")
    x_dims, w_dims = operands.split(",")
    dx = jnp.einsum(
        f"{y_dims},{w_dims}->{x_dims}", dy, w.astype(x.dtype), out_sharding=jax.typeof(x).sharding
    )
    dw = jnp.einsum(
        f"{x_dims},{y_dims}->{w_dims}", x, dy,
        preferred_element_type=w.dtype, out_sharding=jax.typeof(w).sharding,
    )  # fmt: skip
    return dx, dw


project.defvjp(_forward, _backward)


def add(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """x plus a bias over its last dims, in x's dtype; x itself where there is none."""
    if bias is None:
        return x
    rank = (1,) * (x.ndim - bias.ndim)
    return x + bias[...].astype(x.dtype).reshape(*rank, *bias.shape)

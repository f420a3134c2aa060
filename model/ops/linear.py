"""Products of activations and weights, with gradients in the layout that they are wanted in."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from core.sharding import device_kind
from model.ops import one_row, quantised
from model.ops.quantised import Quantised


def project(
    subscripts: str,
    x: jax.Array,
    w: jax.Array | Quantised,
    out_sharding: PartitionSpec | None = None,
) -> jax.Array:
    """einsum(subscripts, x, w) in x's dtype, as `project("BTD,DF->BTF", x_BTD, w_DF)`.

    `out_sharding` is needed where a contracted dim is sharded. The gradient of w is accumulated
    and kept in w's own dtype. JAX's rule for it is a product of the output's gradient and x,
    transposed; on a CPU that costs twice the product itself (docs/performance.md).
    """
    if isinstance(w, Quantised):
        operands, y_dims = subscripts.split("->")
        inputs = sum(dim not in y_dims for dim in operands.split(",")[1])
        return quantised.product(x, w, inputs, out_sharding)
    return _project(subscripts, x, w, out_sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _project(
    subscripts: str, x: jax.Array, w: jax.Array, out_sharding: PartitionSpec | None
) -> jax.Array:
    return product(subscripts, x, w.astype(x.dtype), out_sharding=out_sharding)


def product(
    subscripts: str,
    x: jax.Array,
    y: jax.Array,
    dtype: jax.typing.DTypeLike | None = None,
    out_sharding: PartitionSpec | None = None,
) -> jax.Array:
    """einsum of two arrays whose result has the other dims of x, then those of y.

    jnp.einsum contracts dims in the order of their names, for which XLA may transpose a weight.
    On CPUs bfloat16 is multiplied in place only by a matrix and into float32; all else is done on
    copies in float32, weights and all. A single row is summed in `one_row`, or gets a second one.
    """
    dtype = x.dtype if dtype is None else dtype
    x_dims, y_dims = subscripts.partition("->")[0].split(",")
    shared = [name for name in x_dims if name in y_dims]
    dims = tuple(tuple(map(names.index, shared)) for names in (x_dims, y_dims))
    narrow = x.dtype == jnp.bfloat16 and device_kind() == "cpu"
    rows = math.prod(n for name, n in zip(x_dims, x.shape, strict=True) if name not in shared)
    is_single = narrow and rows == 1 and x_dims[0] not in shared
    if is_single and dims[1] == tuple(range(len(shared))) and one_row.fits(x.size):
        return _single(x, y, len(shared), out_sharding).astype(dtype)
    out = jax.lax.dot_general(
        jnp.concatenate([x, x]) if is_single else x, y, (dims, ((), ())),
        preferred_element_type=jnp.float32 if narrow else dtype,
        out_sharding=out_sharding,
    ).astype(dtype)  # fmt: skip
    return out[:1] if is_single else out


def _single(
    x: jax.Array, y: jax.Array, inputs: int, out_sharding: PartitionSpec | None
) -> jax.Array:
    """Float32: the one row of x times y, whose first dims are these last of x."""
    if out_sharding is None:
        x_spec, y_spec = (jax.typeof(array).sharding.spec for array in (x, y))
        out_sharding = PartitionSpec(*x_spec[:-inputs], *y_spec[inputs:])

    @functools.partial(jax.sharding.auto_axes, out_sharding=out_sharding)
    def of_all(x, y):
        out_O = one_row.by_columns(x.reshape(1, 1, -1), y.reshape(1, x.size, -1))
        return out_O.reshape(*x.shape[:-inputs], *y.shape[inputs:])

    return of_all(x, y)


def _forward(subscripts, x, w, out_sharding):
    # Not `_project`: inside another custom rule, remat="dots" would not see the product to keep.
    return product(subscripts, x, w.astype(x.dtype), out_sharding=out_sharding), (x, w)


def _backward(subscripts, out_sharding, saved, dy):
    x, w = saved
    operands, y_dims = subscripts.split("->")
    x_dims, w_dims = operands.split(",")
    to_x, to_w = f"{y_dims},{w_dims}->{x_dims}", f"{x_dims},{y_dims}->{w_dims}"
    dx = product(to_x, dy, w.astype(x.dtype), out_sharding=jax.typeof(x).sharding)
    dw = product(to_w, x, dy, w.dtype, out_sharding=jax.typeof(w).sharding)
    return dx, dw


_project.defvjp(_forward, _backward)


def add(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """x plus a bias over its last dims, in x's dtype; x itself where there is none."""
    if bias is None:
        return x
    rank = (1,) * (x.ndim - bias.ndim)
    return x + bias[...].astype(x.dtype).reshape(*rank, *bias.shape)

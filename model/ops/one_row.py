"""One row times a weight of few bits, as a CPU does it fastest: the weight is read once.

XLA's CPU backend multiplies one row by float32 alone. Of other weights it makes a float copy first;
with two rows bfloat16 is read as it is, at half of memory's speed (`python -m bench.one_row`). What
it does well is one loop over all outputs of a sum of a few terms that widen what they read: eight
inputs at a time are summed so, and a product with ones adds up the sums.
"""

import jax
import jax.numpy as jnp

TERMS = 8  # of a sum; what is used more than 15 times XLA makes first: all floats of the weight
LANES = 64  # sums of an output, where its inputs lie side by side


def fits(inputs: int) -> bool:
    """Whether the inputs are whole sums."""
    return inputs % TERMS == 0


def by_columns(x_ZPC: jax.Array, w_ZCO: jax.Array, scales_ZO: jax.Array | None = None) -> jax.Array:
    """Float32 [O]: the sum of x[z, p, c] * w[z, c, o], each group z times its scale.

    w is bfloat16 or int8; with P = 2, the `halves` of int8. 8 divides P * C (`fits`).
    """
    Z, P, C = x_ZPC.shape
    many = TERMS // P
    x_ZPC, w_ZCO, scales_ZO = _together(x_ZPC, w_ZCO, scales_ZO)
    x_ZPSM = x_ZPC.reshape(Z, P, C // many, many)
    w_PZSMO = [
        w_ZCO.astype(jnp.float32).reshape(Z, C // many, many, -1) for w_ZCO in halves(w_ZCO, P)
    ]
    sums_ZSO = sum(
        x_ZPSM[:, p, :, m, None] * w_ZSMO[:, :, m]
        for m in range(many)
        for p, w_ZSMO in enumerate(w_PZSMO)
    )
    if scales_ZO is not None:
        sums_ZSO = sums_ZSO * scales_ZO.astype(jnp.float32)[:, None]
    return jnp.ones(Z * C // many) @ sums_ZSO.reshape(Z * C // many, -1)


def by_rows(x_D: jax.Array, w_VD: jax.Array) -> jax.Array:
    """Float32 [V]: the products with all rows of a table of integers; 64 divides D."""
    x_D, w_VD = _together(x_D, w_VD)
    x_ML = x_D.reshape(-1, LANES)
    w_VML = w_VD.reshape(len(w_VD), -1, LANES)
    sums_VL = sum(x_L[None] * w_VML[:, m].astype(jnp.float32) for m, x_L in enumerate(x_ML))
    return sums_VL @ jnp.ones(LANES)


def _together(x: jax.Array, *weights: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """x in float32, and the weights as they are, all there before any of them is used.

    Else XLA makes x again for every output, and float weights before a loop over tokens begins.
    """
    return jax.lax.optimization_barrier((x.astype(jnp.float32), *weights))


def halves(w: jax.Array, parts: int) -> tuple[jax.Array, ...]:
    """Splits int8 into the 4-bit numbers of its low and of its high halves; or returns it whole."""
    return (w,) if parts == 1 else ((w << 4) >> 4, w >> 4)

"""Initial parameters: random or constant, stacked over layers, born where they live."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from core.sharding import Rules
from model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ParamInit:
    """Makes the parameters of one module; `layers` > 0 stacks that many along a first dim."""

    config: ModelConfig
    rules: Rules
    key: jax.Array
    layers: int = 0

    def normal(
        self,
        index: int,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        scale: float = 1.0,
    ) -> nnx.Param:
        """Normal with standard deviation `scale` * config.init_scale; `axes` name the dims.

        `index` tells the parameters of one key apart.
        """
        shape, axes = self._stacked(shape, axes)
        spread = scale * self.config.init_scale
        value = _normal(self.key, index, spread, shape, self.config.param_dtype, self.rules(*axes))
        return nnx.Param(value)

    def constant(self, value: float, size: int, axis: str | None = None) -> nnx.Param:
        """A vector, on every device as norms use it, or sharded over `axis`."""
        shape, axes = self._stacked((size,), (axis,))
        full = jnp.full(shape, value, self.config.param_dtype, out_sharding=self.rules(*axes))
        return nnx.Param(full)

    def zeros(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        """Zeros, as biases start."""
        shape, axes = self._stacked(shape, axes)
        zeros = jnp.zeros(shape, self.config.param_dtype, out_sharding=self.rules(*axes))
        return nnx.Param(zeros)

    def _stacked(self, shape, axes):
        return ((self.layers, *shape), ("layers", *axes)) if self.layers else (shape, axes)


# Jitted apart, and not with the whole model: equal shapes share one compilation.
@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _normal(key, index, scale, shape, dtype, sharding):
    key = jax.random.fold_in(key, index)
    value = scale * jax.random.normal(key, shape, jnp.float32, out_sharding=sharding)
    return value.astype(dtype)

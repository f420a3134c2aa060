"""The MLP of a block, gated or plain."""

import jax
import jax.numpy as jnp
from flax import nnx

from model.initializers import ParamInit
from model.ops.linear import add, project

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class MLP(nnx.Module):
    """act(x G) * (x U) D, the gated linear unit of arXiv 2002.05202, or act(x U) D."""

    def __init__(self, make: ParamInit):
        config = self.config = make.config
        self.rules = make.rules
        D, F = config.embed_dim, config.mlp_dim
        self.up_DF = make.normal(4, (D, F), ("embed", "mlp"))
        depth = (2 * config.num_layers) ** -0.5
        self.down_FD = make.normal(5, (F, D), ("mlp", "embed"), depth)
        gated = config.mlp == "gated"
        self.gate_DF = make.normal(6, (D, F), ("embed", "mlp")) if gated else None
        biased = "mlp" in config.bias
        self.up_bias_F = make.zeros((F,), ("mlp",)) if biased else None
        self.gate_bias_F = make.zeros((F,), ("mlp",)) if biased and gated else None
        self.down_bias_D = make.zeros((D,), (None,)) if biased else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        h_BTF = add(project("BTD,DF->BTF", x_BTD, self.up_DF[...]), self.up_bias_F)
        if self.gate_DF is None:
            h_BTF = activation(h_BTF)
        else:
            gate_BTF = add(project("BTD,DF->BTF", x_BTD, self.gate_DF[...]), self.gate_bias_F)
            h_BTF = activation(gate_BTF) * h_BTF
        residual = self.rules("batch", "length", "act_embed")
        return add(project("BTF,FD->BTD", h_BTF, self.down_FD[...], residual), self.down_bias_D)

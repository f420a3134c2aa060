"""The plan of weights that are rounded to int8 or int4 for decoding.

    form = rounding(config, rules, "int4", group=None)   # QuantConfig(bits=4, group=128)

The matrices of the layers are; the tables (embedding, head) are int8 in both, each row with a
scale of its own. All else, which is little, is as in the compute dtype.
"""

import math
from typing import Any, Literal

from core import tree
from core.config import UserError
from core.sharding import Rules
from model.config import ModelConfig
from model.ops.quantised import QuantConfig, Quantised, Table
from model.sizes import parts

Kind = Literal["compute", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}
TABLES = ("embedding", "head")  # parts of the model
GROUP = 128  # inputs, at most, when a user names no group for int4
AXES = {"D": "embed", "N": "heads", "F": "mlp"}  # what shards the inputs, by their first dim


def rounding(
    config: ModelConfig, rules: Rules, kind: Kind, group: int | None
) -> QuantConfig | None:
    """None for the compute dtype. With no `group` int8 has one scale an output, and int4 groups as
    large as divide the inputs of every matrix, of each device, up to GROUP.

    UserError if `group` does not divide them.
    """
    if kind == "compute":
        if group is not None:
            raise UserError(
                f"weights_group={group} with weights='compute': set weights to int8 or int4"
            )
        return None
    matrices = parts.matrices(config)
    shards = {name: rules.size(AXES[name.rpartition("_")[2][0]]) for name in matrices}
    local = {name: matrix.inputs // shards[name] for name, matrix in matrices.items()}
    common = math.gcd(*local.values())
    if group is None:
        group = 0 if kind == "int8" else math.gcd(GROUP, common)
    for name, size in local.items():
        if group and size % group:
            where = f"{matrices[name].inputs} inputs of {name}"
            where += f", {size} on a device" * (shards[name] > 1)
            raise UserError(
                f"weights_group={group} does not divide the {where}: "
                f"use {math.gcd(group, common)} or another divisor of {common}"
            )
        if kind == "int4" and not group and shards[name] > 1:
            raise UserError(
                f"weights_group=0 with weights='int4': the inputs of {name} are on "
                f"{shards[name]} devices, and no group may be on two; use {math.gcd(GROUP, common)}"
            )
        if kind == "int4" and (group or size) % 2:
            raise UserError(
                f"weights='int4' with weights_group={group}: {name} has {size} inputs, and they "
                "go in pairs; use int8"
            )
    return QuantConfig(BITS[kind], group)


def text(form: QuantConfig | None) -> str:
    """Returns the end of a line about the model: `, int4 weights in groups of 32`."""
    if form is None:
        return ""
    return f", int{form.bits} weights" + f" in groups of {form.group}" * (form.group > 0)


def is_table(name: str) -> bool:
    """Whether a parameter is looked up, or gives logits."""
    return parts.part(name) in TABLES


def leaves(model: Any) -> dict[str, Any]:
    """The weights of a model by name, of whatever form."""
    return tree.named_leaves(model, lambda x: isinstance(x, Quantised | Table))

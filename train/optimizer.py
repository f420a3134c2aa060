"""AdamW: schedule, clipping, and the groups (decay, no_decay, freeze) that cover every parameter.

It works on parameters by name (`tree.named_leaves`), so groups and state read as names do.
"""

import re
from collections.abc import Iterable

import optax

from core.config import UserError
from train.config import TrainConfig


def make(config: TrainConfig, names: Iterable[str]) -> optax.GradientTransformation:
    """The update rule for parameters of these names. Frozen ones get no update and no state."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    rate = optax.scale_by_learning_rate(schedule(config))
    decay = optax.add_decayed_weights(config.weight_decay)
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    labels = groups(config, names)
    return optax.chain(
        optax.masked(clip, trained(labels)),
        optax.partition(
            {
                "decay": optax.chain(adam, decay, rate),
                "no_decay": optax.chain(adam, rate),
                "freeze": optax.set_to_zero(),
            },
            labels,
        ),
    )


def trained(labels: dict[str, str]) -> dict[str, bool]:
    """Returns which parameters of `groups` move: the norm of the gradient is that of theirs."""
    return {name: label != "freeze" for name, label in labels.items()}


def schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate by step: linear warmup, then cosine, or stable and a linear fall."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rest = config.steps - config.warmup
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    else:
        fall = max(1, min(rest, round(config.decay_fraction * config.steps)))
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, end, fall)], [rest - fall]
        )
    # Step 0 already learns: the warmup ends at the peak after `warmup` steps.
    warmup = optax.linear_schedule(peak / (config.warmup + 1), peak, config.warmup or 1)
    return optax.join_schedules([warmup, after], [config.warmup])


def groups(config: TrainConfig, names: Iterable[str]) -> dict[str, str]:
    """The group of each parameter; UserError if one has none, or two."""
    names = list(names)
    patterns = {"decay": config.decay, "no_decay": config.no_decay}
    for pattern in config.freeze:
        if not any(_matches(pattern, name) for name in names):
            raise UserError(f"train.freeze: {pattern!r} matches none of {', '.join(names)}")
    labels = {}
    for name in names:
        found = [g for g, ps in patterns.items() if any(_matches(p, name) for p in ps)]
        if len(found) != 1:
            raise UserError(
                f"parameter {name} matches {' and '.join(found) or 'neither train.decay nor '}"
                f"{'' if found else 'train.no_decay'}: it must match exactly one of the two"
            )
        frozen = any(_matches(p, name) for p in config.freeze)
        labels[name] = "freeze" if frozen else found[0]
    return labels


def _matches(pattern: str, name: str) -> bool:
    """Returns whether `pattern` matches the end of the dotted name, from the start of a part."""
    return re.search(rf"(^|\.)({pattern})$", name) is not None

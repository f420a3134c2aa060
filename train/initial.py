"""The weights of a bundle for a fresh run: to fine-tune a model, or to extend its context.

The parameters must be those of this model, by name and shape. What the model section says beyond
that may differ (windows, RoPE and context do when a model is extended), and the log names it.
"""

import logging
from pathlib import Path

from core import tree
from core.checkpoint import Bundle
from core.config import Experiment, UserError, to_dict
from core.sharding import Rules
from data.store import TokenStore
from data.tokenizer import load as tokenizers
from model import transformer
from model.config import ModelConfig
from model.transformer import Transformer

log = logging.getLogger("cakrawala")

# Fields that change nothing in what trained weights mean.
FREE = ("init_scale", "attention_kernel", "dtype", "param_dtype")


def restore(experiment: Experiment, store: TokenStore, rules: Rules) -> Transformer:
    """The model of `train.start`, in this run's param_dtype and placed by `rules`.

    UserError if there is none, if its parameters are not those of the model section, or if its
    tokenizer is not that of the data.
    """
    path = experiment.train.start
    if Path(path).resolve() == Path(experiment.workdir).resolve():
        raise UserError(f"train.start={path} is the workdir of this run: name another workdir")
    try:
        bundle = Bundle(path)
    except UserError as error:
        raise UserError(f"train.start={path}: {error}") from None
    try:
        step = bundle.choose(experiment.train.start_step)
        check_tokenizer(bundle, store)
        abstract = transformer.abstract(experiment.model, rules)
        there = bundle.config(model=ModelConfig).model
        differ = differences(there, experiment.model)
        check_parameters(bundle, step, abstract, differ)
        model = bundle.restore(step, model=abstract)["model"]
    except UserError as error:
        raise UserError(f"train.start={path}: {error}") from None
    finally:
        bundle.close()
    log.info("starting from step %d of %s", step, path)
    for line in differ:
        log.info("its model differs in %s", line)
    return model


def check_parameters(bundle: Bundle, step: int, abstract: Transformer, differ: list[str]) -> None:
    """UserError unless the parameters there are those of the model here."""
    try:
        bundle.check(step, model=abstract)
    except UserError as error:
        raise UserError(
            f"{error}; sizes and slots must be those of its model section, which "
            f"configs/finetune.py takes from it. They differ in {'; '.join(differ) or 'nothing'}"
        ) from None


def check_tokenizer(bundle: Bundle, store: TokenStore) -> None:
    """UserError unless the data is in the tokens that the bundle speaks, where it says which."""
    if bundle.tokenizer is None:
        return
    theirs, ours = tokenizers.load(bundle.tokenizer).fingerprint, store.manifest["tokenizer"]
    if theirs != ours:
        raise UserError(
            f"its tokenizer ({theirs[:12]}) is not that of {store.directory} ({ours[:12]}): "
            f"prepare the data with it, --config.data.tokenizer={bundle.tokenizer}"
        )


def differences(there: ModelConfig, here: ModelConfig) -> list[str]:
    """Fields by name, as `model.pattern.0.rope.base: 10000.0 there, 500000.0 here`."""
    old, new = (tree.named_leaves(to_dict(config)) for config in (there, here))
    slots = len(there.pattern), len(here.pattern)
    names = [name for name in sorted(old.keys() | new.keys()) if name not in FREE]
    lines = []
    if slots[0] != slots[1]:
        lines = ["model.pattern: {} slots there, {} here".format(*slots)]
        names = [name for name in names if not name.startswith("pattern.")]
    return lines + [
        f"model.{name}: {old.get(name)!r} there, {new.get(name)!r} here"
        for name in names
        if old.get(name) != new.get(name)
    ]

"""The public families: a checkpoint's config.json and tensors, from and to ours.

    config = families.read({"model_type": "llama", ...})
    families.tensors(config)    every tensor of its checkpoint, and which of our parameters it holds
    families.write(config)      a config.json
    families.PRESETS["llama-3.1-8b"]

A family here is one module with DEFAULTS, ARCHITECTURES (of each model_type), read, write and
tensors, and PRESETS where sizes are published. It can say a config if what it writes reads back as
the same config.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from core.config import UserError
from model.config import ModelConfig
from model.families import falcon, gemma, gemma4, gpt2, llama
from model.families.attributes import named, shown
from model.families.harmless import harmless
from model.families.tensor import Tensor

# Of two that can say a config the first does: a Mistral without a window is a LLaMA.
FAMILIES = {
    model_type: module
    for module in (llama, gpt2, falcon, gemma, gemma4)
    for model_type in module.ARCHITECTURES
}
PRESETS = {**gpt2.PRESETS, **llama.PRESETS, **falcon.PRESETS, **gemma.PRESETS}
# Wrappers: the text model is one of their parts.
WRAPPERS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text"}
# What else a wrapper tells of: images, sound, and weights that are initialised.
OTHER_PARTS = re.compile(r"text_config|(vision|audio|image|video|mm)_\w+|initializer_range")
OURS = ("attention_kernel", "dtype", "param_dtype")  # fields that no config.json speaks of

# Mask buffers and frequencies that older files hold, and what is not of the text model.
DROPPED = re.compile(
    r"(.*\.)?(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)"
    r"|(model\.)?(vision_tower|audio_tower|multi_modal_projector|embed_vision|embed_audio)\..*"
)


def read(found: Mapping[str, Any]) -> ModelConfig:
    """The model of a config.json; UserError names what is not supported, as it is spelled there."""
    model_type = found.get("model_type")
    if not isinstance(model_type, str) or model_type not in (*FAMILIES, *WRAPPERS, *falcon.OLD):
        raise UserError(
            f"config.json: model_type={shown(model_type)} is not supported; "
            f"these are: {', '.join((*FAMILIES, *WRAPPERS, *falcon.OLD))}"
        )
    if model_type in WRAPPERS:
        return read(_text_model(model_type, found))
    if model_type in falcon.OLD:
        return read(falcon.renamed(dict(found)))
    try:
        return FAMILIES[model_type].read(model_type, dict(found))
    except UserError as error:
        if str(error).startswith("config.json"):
            raise
        raise UserError(f"config.json of model_type={model_type!r} is damaged: {error}") from None
    except (TypeError, AttributeError) as error:  # a value of another type than it should be
        raise UserError(f"config.json of model_type={model_type!r} is damaged: {error}") from None


def _text_model(model_type: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model in a wrapper's; UserError for what may change that."""
    inner, wanted = found.get("text_config", {}), WRAPPERS[model_type]
    if not isinstance(inner, dict) or inner.get("model_type", wanted) != wanted:
        raise UserError(
            f"config.json: text_config={shown(inner)} of model_type={model_type!r} must be an "
            f"object, of model_type={wanted!r}"
        )
    for name, value in found.items():
        tied = name == "tie_word_embeddings" and value == inner.get(name, True)
        if not (OTHER_PARTS.fullmatch(name) or tied or harmless(name, value, found)):
            raise UserError(
                f"config.json: {named(name)}={shown(value)} beside text_config in model_type="
                f"{model_type!r} is not understood here, so what it changes is not known"
            )
    return {**inner, "model_type": wanted}


def declared_dtype(found: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json wants the model to be in, in the spelling of any version."""
    inner = found.get("text_config")
    for part in (found, inner if isinstance(inner, dict) else {}):
        for name in ("dtype", "torch_dtype"):
            if isinstance(part.get(name), str):
                return part[name].removeprefix("torch.")
    return None


def write(config: ModelConfig) -> dict[str, Any]:
    """A config.json that says all of `config`; UserError if no family can."""
    model_type, found = _said(config)
    architecture = FAMILIES[model_type].ARCHITECTURES[model_type]
    return {"architectures": [architecture], "model_type": model_type, **found}


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a checkpoint of this model; UserError if no family can say it."""
    return FAMILIES[_said(config)[0]].tensors(config)


def canonical(name: str, config: ModelConfig) -> str | None:
    """The name in `tensors` of a tensor found in a file; None for what is not needed.

    Files may be of the bare decoder, or of one inside a model of images and text.
    """
    if DROPPED.fullmatch(name):
        return None
    name = name.removeprefix("model.language_model.").removeprefix("language_model.")
    root = "transformer." if _module(config) in (gpt2, falcon) else "model."
    if name.startswith((root, "lm_head.")):
        return name
    return root + name


def _module(config: ModelConfig) -> ModuleType:
    return FAMILIES[_said(config)[0]]


@functools.cache
def _said(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """(model_type, attributes) of the first family that can say `config`."""
    for model_type, module in FAMILIES.items():
        found = module.write(model_type, config)
        try:
            back = module.read(model_type, {"model_type": model_type, **found})
        except UserError:
            continue
        if dataclasses.replace(back, **{name: getattr(config, name) for name in OURS}) == config:
            return model_type, found
    raise UserError(
        f"no family of {', '.join(FAMILIES)} can say this model: its pattern, block, norm, biases "
        "or sizes are of none of them, so it has no checkpoint that others can open"
    )

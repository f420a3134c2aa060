"""Shared by LLaMA's relatives and Gemma: sizes, layer types, and the names of tensors."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from model.attention.spec import AttentionSpec, sliding
from model.config import ModelConfig
from model.families import tensor
from model.families.attributes import Attributes
from model.families.tensor import Layout, Tensor

SIZES = {  # attribute: field
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_scale",
    "tie_word_embeddings": "tied_head",
}
# Of a layer: name -> (leaves of the block, layout).
Entries = dict[str, tuple[tuple[str, ...], Layout]]
LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding"}
OLD_TYPES = {"attention": "full_attention"}


def read_sizes(a: Attributes) -> dict[str, Any]:
    """The fields of SIZES; heads as wide as they fit and as many for keys, where not said."""
    fields = {field: a[name] for name, field in SIZES.items()}
    fields["num_kv_heads"] = fields["num_kv_heads"] or fields["num_heads"]
    check_kv_heads(a, fields["num_kv_heads"], "num_key_value_heads")
    fields["head_dim"] = fields["head_dim"] or a.head_dim("hidden_size", "num_attention_heads")
    check_head_dim(a, fields["head_dim"], "head_dim" if a["head_dim"] else "hidden_size")
    fields["context"] = a["max_position_embeddings"]
    return fields


def check_kv_heads(a: Attributes, kv_heads: int, name: str) -> None:
    """UserError unless as many query heads read each of the `kv_heads` that attribute `name` says.

    The message has our names too, as overrides of `model` have them.
    """
    heads = a["num_attention_heads"]
    if heads % kv_heads:
        raise a.refused(
            "num_attention_heads",
            f"is not a multiple of {name}={kv_heads} "
            f"(in model: num_heads={heads}, num_kv_heads={kv_heads})",
        )


def check_head_dim(a: Attributes, head_dim: int, name: str) -> None:
    """UserError if heads, whose width attribute `name` says, have an odd one."""
    if head_dim % 2:
        raise a.refused(name, f"makes heads of width {head_dim}, which is odd: only even ones fit")


def write_sizes(config: ModelConfig) -> dict[str, Any]:
    """The attributes of SIZES."""
    sizes = {name: getattr(config, field) for name, field in SIZES.items()}
    return {**sizes, "max_position_embeddings": config.context}


def read_layer_types(a: Attributes, usual: list[str]) -> list[str]:
    """The type of each layer, `usual` where config.json does not say.

    UserError unless there is one for each layer, of a known type.
    """
    if a["layer_types"] is None:
        return usual
    types = [OLD_TYPES.get(kind, kind) for kind in a["layer_types"]]
    if len(types) != len(usual):
        raise a.refused(
            "layer_types", f"has {len(types)} layers, but num_hidden_layers={len(usual)}"
        )
    unknown = [kind for kind in types if kind not in LAYER_TYPES]
    if unknown:
        raise a.refused(
            "layer_types", f"has {unknown[0]!r}; supported are {', '.join(LAYER_TYPES)}"
        )
    return types


def read_pattern(types: list[str], specs: Mapping[str, AttentionSpec]) -> tuple[AttentionSpec, ...]:
    """The shortest pattern that repeats to layers of these types."""
    layers = tuple(specs[kind] for kind in types)
    return next(
        layers[:n]
        for n in range(1, len(layers) + 1)
        if all(layer == layers[i % n] for i, layer in enumerate(layers))
    )


def windowed(a: Attributes, types: list[str], **spec: Any) -> dict[str, AttentionSpec]:
    """{"sliding_attention": its slot} if a layer is of that type, else {}.

    UserError where no attribute says how wide its window is.
    """
    if "sliding_attention" not in types:
        return {}
    if a["sliding_window"] is None:
        raise a.refused("sliding_window", "with layers of sliding_attention: how wide is it?")
    return {"sliding_attention": sliding(a["sliding_window"], **spec)}


def layer_types(config: ModelConfig) -> list[str]:
    """ "full_attention" or "sliding_attention" for each layer."""
    names = {kind: name for name, kind in LAYER_TYPES.items()}
    slots = [names.get(spec.kind, spec.kind) for spec in config.pattern]
    return [slots[i % len(slots)] for i in range(config.num_layers)]


def window(config: ModelConfig) -> int | None:
    """The window of the sliding layers, None without any."""
    return next((spec.window for spec in config.pattern if spec.kind == "sliding"), None)


def places(config: ModelConfig) -> Iterator[tuple[str, int, AttentionSpec]]:
    """(the block's name among our leaves, index in its stack, its slot) of layers 0, 1, ..."""
    for stage, (slots, repeats) in enumerate(config.stages):
        for index in range(repeats):
            for slot, spec in enumerate(slots):
                yield f"stages.{stage}.{slot}", index, spec


def per_layer(
    config: ModelConfig, prefix: str, entries: Callable[[AttentionSpec], Entries]
) -> list[Tensor]:
    """Tensors `prefix`.L.name of every layer, whose entries depend on its slot."""
    return [
        Tensor(f"{prefix}.{layer}.{name}", tuple(f"{block}.{x}" for x in params), index, layout)
        for layer, (block, index, spec) in enumerate(places(config))
        for name, (params, layout) in entries(spec).items()
    ]


def tensors(config: ModelConfig, norms: Mapping[str, str]) -> list[Tensor]:
    """All tensors of LlamaForCausalLM and the like; norms: tensor -> norm of our block."""
    D, V = config.embed_dim, config.vocab_size

    def entries(spec: AttentionSpec) -> Entries:
        found = {f"{x}.weight": ((f"{y}.scale_D",), tensor.same(D)) for x, y in norms.items()}
        if config.layer_scale:
            found["layer_scalar"] = (("scale_1",), tensor.same(1))
        return {**found, **_attention(config, spec), **_mlp(config)}

    whole = [
        Tensor("model.embed_tokens.weight", ("embedding_VD",), None, tensor.same(V, D)),
        *per_layer(config, "model.layers", entries),
        Tensor("model.norm.weight", ("final_norm.scale_D",), None, tensor.same(D)),
    ]
    if not config.tied_head:
        whole.append(Tensor("lm_head.weight", ("head_VD",), None, tensor.same(V, D)))
    return whole


def _attention(config: ModelConfig, spec: AttentionSpec) -> Entries:
    D, N = config.embed_dim, config.num_heads
    K, H = config.kv_shape(spec)
    entries = {"self_attn.o_proj.weight": (("attention.o_NHD",), tensor.from_heads(N, H, D))}
    if "out" in config.bias:
        entries["self_attn.o_proj.bias"] = (("attention.o_bias_D",), tensor.same(D))
    for x, heads, count in (("q", "NH", N), ("k", "KH", K), ("v", "KH", K)):
        if x == "v" and spec.shared_kv:
            continue
        name = f"self_attn.{x}_proj"
        entries[f"{name}.weight"] = ((f"attention.{x}_D{heads}",), tensor.to_heads(D, count, H))
        if "qkv" in config.bias:
            entries[f"{name}.bias"] = ((f"attention.{x}_bias_{heads}",), tensor.heads(count, H))
        if config.qk_norm and x != "v":
            norm = f"attention.{x}_norm.scale_D"
            entries[f"self_attn.{x}_norm.weight"] = ((norm,), tensor.same(H))
    return entries


def _mlp(config: ModelConfig) -> Entries:
    D, F = config.embed_dim, config.mlp_dim
    entries = {}
    for x, rows, columns in (("gate", "D", "F"), ("up", "D", "F"), ("down", "F", "D")):
        shape = (D, F) if rows == "D" else (F, D)
        ours = f"mlp.{x}_{rows}{columns}"
        entries[f"mlp.{x}_proj.weight"] = ((ours,), tensor.transposed(*shape))
        if "mlp" in config.bias:
            bias = f"mlp.{x}_bias_{columns}"
            entries[f"mlp.{x}_proj.bias"] = ((bias,), tensor.same(shape[1]))
    return entries

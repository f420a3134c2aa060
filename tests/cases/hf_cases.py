"""Tiny LLaMA directories, written by the safetensors library, for the tests of model.convert."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

LAYERS, V, D, N, K, H, F = 3, 64, 16, 4, 2, 8, 24
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


def config_json(**changes):
    """The config.json of a model of three layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": V,
        "max_position_embeddings": 32,
        "num_hidden_layers": LAYERS,
        "hidden_size": D,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "intermediate_size": F,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **changes,
    }


def tensors(dtype=BFLOAT16, seed=0, vocab_size=V):
    """Random values by name, as transformers names them."""
    shapes = {EMBEDDING: (vocab_size, D)}
    for i in range(LAYERS):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (D,),
            f"model.layers.{i}.mlp.down_proj.weight": (D, F),
            f"model.layers.{i}.mlp.gate_proj.weight": (F, D),
            f"model.layers.{i}.mlp.up_proj.weight": (F, D),
            f"model.layers.{i}.post_attention_layernorm.weight": (D,),
            f"model.layers.{i}.self_attn.k_proj.weight": (K * H, D),
            f"model.layers.{i}.self_attn.o_proj.weight": (D, N * H),
            f"model.layers.{i}.self_attn.q_proj.weight": (N * H, D),
            f"model.layers.{i}.self_attn.v_proj.weight": (K * H, D),
        }
    shapes |= {"model.norm.weight": (D,), HEAD: (vocab_size, D)}
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(directory, values, files=1, **changes):
    """A checkpoint's directory; over `files` files with an index, if more than one."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(**changes)))
    if files == 1:
        save_file(values, directory / "model.safetensors", {"format": "pt"})
        return directory
    names = list(values)
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        held = {name: values[name] for name in names[i::files]}
        save_file(held, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return directory


def read(directory):
    """All tensors by name, as the safetensors library reads them; the index is right."""
    if not (directory / INDEX).is_file():
        return load_file(directory / "model.safetensors")
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    held = {file: load_file(directory / file) for file in set(weight_map.values())}
    assert {n: f for f, values in held.items() for n in values} == weight_map
    assert {path.name for path in directory.glob("*.safetensors")} == set(held)
    return {name: values for part in held.values() for name, values in part.items()}


def assert_same(actual, expected):
    """Names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert actual[name].dtype == values.dtype, name
        assert actual[name].shape == values.shape, name
        assert actual[name].tobytes() == values.tobytes(), name


def ours(values):
    """The parameters that these tensors are, stacked over layers: written by hand."""

    def stack(name, shape, transpose=True):
        layers = [values[f"model.layers.{i}.{name}.weight"] for i in range(LAYERS)]
        return np.stack([(x.T if transpose else x).reshape(shape) for x in layers])

    block = "stages.0.0"
    return {
        "embedding_VD": values[EMBEDDING],
        "head_VD": values[HEAD],
        "final_norm.scale_D": values["model.norm.weight"],
        f"{block}.attention_norm.scale_D": stack("input_layernorm", (D,), False),
        f"{block}.mlp_norm.scale_D": stack("post_attention_layernorm", (D,), False),
        f"{block}.attention.q_DNH": stack("self_attn.q_proj", (D, N, H)),
        f"{block}.attention.k_DKH": stack("self_attn.k_proj", (D, K, H)),
        f"{block}.attention.v_DKH": stack("self_attn.v_proj", (D, K, H)),
        f"{block}.attention.o_NHD": stack("self_attn.o_proj", (N, H, D)),
        f"{block}.mlp.gate_DF": stack("mlp.gate_proj", (D, F)),
        f"{block}.mlp.up_DF": stack("mlp.up_proj", (D, F)),
        f"{block}.mlp.down_FD": stack("mlp.down_proj", (F, D)),
    }

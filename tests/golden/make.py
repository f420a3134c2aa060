"""Makes the goldens of the families with transformers; needs the extra `golden` (torch).

    python tests/golden/make.py                 writes tests/golden/*.npz
    python tests/golden/make.py check DIR       DIR/<case> holds our exports: are they the same?

A golden holds what a tiny random checkpoint of a case is made of (config.json as transformers
writes it; names and shapes of tensors, their values being weights.values of the name), and what
transformers computes with it: greedy continuations of 2 rows, and the logits of them in float32.
"""

import json
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from weights import values

HERE = Path(__file__).parent
PROMPT, NEW = 24, 12
ROWS, VOCAB = 2, 64
# Sizes of LLaMA and its relatives; the original context is less than the length of a row.
LLAMA = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GEMMA = dict(LLAMA, head_dim=16, query_pre_attn_scalar=24, sliding_window=8)
GEMMA_1 = dict(LLAMA, head_dim=16, num_key_value_heads=1)
FALCON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
FACTORS = dict(short_factor=[1.0, 1.1, 1.3, 1.7], long_factor=[1.0, 1.8, 3.1, 4.4], factor=4.0)


def rope(kind: str, **fields) -> dict:
    """rope_parameters of a LLaMA whose frequencies were trained for 16 tokens."""
    theta = fields.pop("theta", 10_000.0)
    return dict(LLAMA, rope_parameters=dict(rope_type=kind, rope_theta=theta, **fields))


CASES = {
    "gpt2": (
        "GPT2",
        dict(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    ),
    "llama-2": ("Llama", dict(LLAMA, num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama-biases": ("Llama", dict(LLAMA, attention_bias=True, mlp_bias=True)),
    "llama-3": ("Llama", rope("default", theta=500_000.0)),
    "llama-3.1": (
        "Llama",
        rope(
            "llama3",
            theta=5000.0,
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama-3.2": ("Llama", dict(LLAMA, tie_word_embeddings=True, head_dim=16)),
    "llama-linear": ("Llama", rope("linear", factor=4.0)),
    "llama-dynamic": ("Llama", dict(rope("dynamic", factor=4.0), max_position_embeddings=16)),
    "llama-yarn": (
        "Llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=16, theta=100.0),
    ),
    "llama-yarn-mscale": (
        "Llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=8.0,
            beta_slow=0.5,
            mscale=1.0,
            mscale_all_dim=0.5,
            truncate=False,
            theta=100.0,
        ),
    ),
    "llama-longrope": (
        "Llama",
        rope("longrope", original_max_position_embeddings=16, **FACTORS),
    ),
    "llama-longrope-short": (
        "Llama",
        rope("longrope", original_max_position_embeddings=48, **FACTORS),
    ),
    "mistral": ("Mistral", dict(LLAMA, sliding_window=8)),
    "mistral-full": ("Mistral", dict(LLAMA, sliding_window=None, head_dim=16)),
    "qwen-2": ("Qwen2", LLAMA),
    "qwen-2-window": (
        "Qwen2",
        dict(
            LLAMA,
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        ),
    ),
    "qwen-3": ("Qwen3", dict(LLAMA, head_dim=16, tie_word_embeddings=True)),
    "falcon-7b": ("Falcon", FALCON),
    "falcon-40b": ("Falcon", dict(FALCON, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon-11b": (
        "Falcon",
        dict(
            FALCON,
            new_decoder_architecture=True,
            num_kv_heads=2,
            num_ln_in_parallel_attn=1,
            ffn_hidden_size=80,
        ),
    ),
    "falcon-rw": (
        "Falcon",
        dict(FALCON, alibi=True, bias=True, multi_query=False, parallel_attn=False),
    ),
    "falcon-biases": ("Falcon", dict(FALCON, bias=True)),
    "gemma-1": ("Gemma", GEMMA_1),
    "gemma-2": (
        "Gemma2",
        dict(GEMMA, num_hidden_layers=4, attn_logit_softcapping=3.0, final_logit_softcapping=15.0),
    ),
    "gemma-3": (
        "Gemma3Text",
        dict(
            GEMMA,
            num_hidden_layers=7,
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=50.0),
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1000.0),
            ),
        ),
    ),
}
CASES["gemma-4"] = (
    "Gemma4Text",
    dict(
        LLAMA,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=8,
        final_logit_softcapping=15.0,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCAB,
    ),
)
ARCHITECTURES = {
    "Gemma4Text": "Gemma4ForCausalLM",
    "GPT2": "GPT2LMHeadModel",
    "Gemma3Text": "Gemma3ForCausalLM",
}
WITH_OFFSET = "Gemma", "Gemma2", "Gemma3Text"
IN_USE = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.03)

# Tables of published models and of every kind, at the head widths that are used.
ROPES = {
    "llama-3.1": (128, 131_072, dict(
        rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0,
        high_freq_factor=4.0, original_max_position_embeddings=8192)),
    "llama-3.2": (64, 131_072, dict(
        rope_type="llama3", rope_theta=500_000.0, factor=32.0, low_freq_factor=1.0,
        high_freq_factor=4.0, original_max_position_embeddings=8192)),
    "gemma-3": (256, 131_072, dict(rope_type="linear", rope_theta=1e6, factor=8.0)),
    "qwen-yarn": (128, 131_072, dict(
        rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32_768)),
    "yarn-mscale": (64, 131_072, dict(
        rope_type="yarn", rope_theta=10_000.0, factor=40.0, mscale=0.707, mscale_all_dim=0.5,
        beta_fast=16.0, beta_slow=2.0, original_max_position_embeddings=4096)),
    "yarn-fraction": (64, 131_072, dict(
        rope_type="yarn", rope_theta=150_000.0, factor=32.0, truncate=False,
        attention_factor=1.5, original_max_position_embeddings=4096)),
    "dynamic": (128, 4096, dict(rope_type="dynamic", rope_theta=10_000.0, factor=2.0)),
    "longrope": (96, 131_072, dict(
        rope_type="longrope", rope_theta=10_000.0, original_max_position_embeddings=4096,
        short_factor=[1 + 0.01 * i for i in range(48)],
        long_factor=[1 + 0.9 * i for i in range(48)])),
}  # fmt: skip
LENGTHS = (100, 4096, 4097, 20_000, 1_000_000)


def build(name: str) -> transformers.PreTrainedModel:
    """The model of a case, its weights those of weights.values."""
    family, fields = CASES[name]
    config = getattr(transformers, f"{family}Config")(**fields, **IN_USE)
    # transformers 5.23 adds ALiBi twice in Falcon's eager attention, once in its default.
    config._attn_implementation = "sdpa" if fields.get("alibi") else "eager"
    cls = getattr(transformers, ARCHITECTURES.get(family, f"{family}ForCausalLM"))
    model = cls(config).eval()
    with torch.no_grad():
        scalars = [(k, x) for k, x in model.named_buffers() if k.endswith("layer_scalar")]
        for key, parameter in (*model.named_parameters(), *scalars):
            fresh = values(key, tuple(parameter.shape), offset=family in WITH_OFFSET)
            parameter.copy_(torch.from_numpy(fresh))
    return model


def header(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors of a safetensors file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        found = json.loads(file.read(size))
    return {name: entry["shape"] for name, entry in found.items() if name != "__metadata__"}


@torch.no_grad()
def results(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """Tokens, PROMPT random ones with their greedy continuation, and their logits."""
    rows = torch.from_numpy(np.random.RandomState(0).randint(0, VOCAB, (ROWS, PROMPT + NEW)))
    # In one forward pass of the whole length a token: what a cache must not change. (With
    # dynamic RoPE transformers' own cache mixes keys of different bases.)
    for at in range(PROMPT, PROMPT + NEW):
        rows[:, at] = model(rows).logits[:, at - 1].argmax(-1)
    if "dynamic" not in str(getattr(model.config, "rope_parameters", "")):
        prompt = rows[:, :PROMPT]
        how = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
        assert torch.equal(generated, rows)
    return dict(tokens=rows.numpy().astype(np.int32), logits=model(rows).logits.numpy())


def write() -> None:
    """All goldens."""
    for name in CASES:
        model = build(name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = json.loads(Path(folder, "config.json").read_text())
            shapes = header(Path(folder, "model.safetensors"))
        found = results(model)
        about = json.dumps(dict(config=config, shapes=shapes))
        np.savez_compressed(HERE / f"{name}.npz", about=about, **found)
        spread = np.abs(found["logits"]).max()
        print(f"{name}: {len(shapes)} tensors, largest logit {spread:.2f}")
    tables = {}
    for name, (head_dim, context, parameters) in ROPES.items():
        config = transformers.LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=context,
            rope_parameters=dict(parameters),
        )
        make = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        made = [make(config, torch.device("cpu"), seq_len=length) for length in LENGTHS]
        tables[name] = np.stack([np.asarray(frequencies) for frequencies, _ in made])
        tables[f"{name}-magnitude"] = made[0][1]
        tables[f"{name}-about"] = json.dumps(
            dict(head_dim=head_dim, context=context, parameters=parameters)
        )
    np.savez_compressed(HERE / "rope.npz", lengths=np.array(LENGTHS), **tables)


@torch.no_grad()
def check(folder: str) -> None:
    """Opens every export with transformers: the same logits to the last bit, nothing missing."""
    for name in CASES:
        golden = np.load(HERE / f"{name}.npz")
        attention = "sdpa" if CASES[name][1].get("alibi") else "eager"
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder, name), attn_implementation=attention, output_loading_info=True
        )
        wrong = {key: info[key] for key in info if info[key]}
        logits = model.eval()(torch.from_numpy(golden["tokens"]).long()).logits.numpy()
        same = np.array_equal(logits, golden["logits"])
        print(f"{name}: {'same' if same else 'DIFFERENT'} {wrong or ''}")
        assert same and not wrong, name


if __name__ == "__main__":
    check(sys.argv[2]) if sys.argv[1:2] == ["check"] else write()

"""Packaging of the distribution `cakrawala`.

pip install -e .            laptop, CPU
pip install -e .[tpu]       Cloud TPU VM
pip install -e .[gpu]       NVIDIA GPU
pip install -e .[aot]       laptop that compiles for TPUs (python -m train.aot)
"""

from setuptools import setup

# The libtpu that this jaxlib can read the programs of; it compiles for TPUs without one.
TPU_COMPILER = ["jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'"]
PACKAGES = [
    "configs",
    "core",
    "core.command",
    "core.compile",
    "core.storage",
    "core.tokenizer",
    "data",
    "data.texts",
    "data.tokenizer",
    "evals",
    "evals.report",
    "evals.report.measuring",
    "evals.report.show",
    "evals.ruler",
    "infer",
    "infer.sampling",
    "infer.speculative",
    "model",
    "model.attention",
    "model.attention.block_topk",
    "model.attention.kernels",
    "model.attention.strategies",
    "model.cache",
    "model.families",
    "model.io",
    "model.layers",
    "model.ops",
    "model.sizes",
    "train",
    "train.loop",
]

setup(
    name="cakrawala",
    version="0.1.0",
    description="Long-context language models in JAX: how far can this model see, how fast, "
    "and at what cost?",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "tensorstore>=0.1.80",
        "numpy>=2.0",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources>=6",  # tensorflow-datasets imports it without asking for it
        "grain>=0.2.18",
        "array-record>=0.8.3",
        "pyarrow>=17",
        "sentencepiece>=0.2.1",
        "protobuf>=7.36.1",  # the generated code in sentencepiece refuses older ones
        "tokenizers>=0.21",
        "ml-collections>=1.1",
        "absl-py>=2.1",
        "rich>=13",
        "matplotlib>=3.9",
        "safetensors>=0.5",
        "tensorboardX>=2.6.4",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],
        "aot": TPU_COMPILER,
        "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.130", *TPU_COMPILER],
        "dev": ["ruff>=0.14", "codespell>=2.4"],
        "golden": ["torch>=2.13", "transformers>=5.23"],  # tests/golden/make.py
    },
)

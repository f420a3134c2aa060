"""Every kind of cache under every kind of family: logits in chunks and steps against one pass."""

import family_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh

from core import sharding
from core.config import Unsupported
from model.cache.form import CacheConfig

pytestmark = pytest.mark.slow
# One of each way to say where tokens stand, what they see and how heads share keys.
NAMES = "gpt2", "llama-3.1", "llama-dynamic", "mistral", "qwen-3", "falcon-rw", "falcon-7b"
NAMES += "gemma-2", "gemma-3", "gemma-4"
LIMIT = 1e-4  # as of test_model_goldens
EXACT = {
    "host": CacheConfig(cache_host=True),
    "pages": CacheConfig(cache_pages=10, cache_page=4),  # what is asked is in 40 tokens, of 64
    "window": CacheConfig(cache_window=64),
    "sinks": CacheConfig(cache_window=64, cache_sinks=2),
}
# Logits of caches in few bits are off by no more of their own spread, root mean square.
STATED = {"int8": 0.02, "int4": 0.3}
# Learned positions and RoPE by the length of a text have an end; some have no layer without one.
REFUSED = {
    *((name, kind) for name in ("gpt2", "llama-dynamic") for kind in ("window", "sinks")),
    *(("mistral", kind) for kind in ("host", "pages")),
}


def logits(name, form, checkpoints):
    """Of the last token of the prompt and of all new ones."""
    with jax.set_mesh(make_mesh((1, 1, 1))):
        model = cases.opened(name, checkpoints, sharding.prefilling())
        return cases.through_the_cache(model, cases.golden(name).tokens, form)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", EXACT)
def test_kinds_that_keep_all_of_a_short_text_are_exact(name, kind, checkpoints):
    if (name, kind) in REFUSED:
        with pytest.raises(Unsupported, match="cache_"):
            logits(name, EXACT[kind], checkpoints)
        return
    off = logits(name, EXACT[kind], checkpoints) - cases.golden(name).logits[:, cases.PROMPT - 1 :]
    assert np.abs(off).max() < LIMIT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", STATED)
def test_kinds_of_few_bits_are_off_by_little(name, kind, checkpoints):
    expected = cases.golden(name).logits[:, cases.PROMPT - 1 :]
    off = logits(name, CacheConfig(k_cache=kind, v_cache=kind), checkpoints) - expected
    off = np.sqrt((off**2).mean()) / expected.std()
    assert STATED[kind] / 100 < off < STATED[kind]

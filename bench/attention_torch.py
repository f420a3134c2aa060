"""Worker of bench.attention: PyTorch's fused attention, and flex_attention for a window."""

import functools
from collections.abc import Callable

import torch
from torch.nn.attention import flex_attention as flex

from bench import attention as bench
from bench import turns


@functools.cache
def program(implementation: str, length: int, window: int, backward: bool) -> Callable[[], None]:
    """A call that runs one case."""
    shape = (1, bench.HEADS, length, bench.WIDTH)
    q, k, v = (torch.randn(shape, requires_grad=backward) for _ in range(3))
    dout = torch.randn(shape)
    if implementation == "flex":

        def seen(batch, head, query, key):
            return (query >= key) & (query - key < window)

        mask = flex.create_block_mask(seen, None, None, length, length, device="cpu")
        compiled = torch.compile(flex.flex_attention)
        attention = functools.partial(compiled, block_mask=mask)
    else:
        attention = functools.partial(
            torch.nn.functional.scaled_dot_product_attention, is_causal=True
        )

    def run():
        with torch.set_grad_enabled(backward):
            out = attention(q, k, v)
        if backward:
            torch.autograd.grad(out, (q, k, v), dout)

    return run


if __name__ == "__main__":
    turns.serve(lambda task: program(**task)())

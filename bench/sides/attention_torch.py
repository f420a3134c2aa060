"""Worker of bench.attention: PyTorch's fused attention, and flex_attention for a window."""

import functools
from collections.abc import Callable

import torch
from torch.nn.attention import flex_attention as flex

from bench import attention as bench
from bench.sides import turns


@functools.cache
def program(
    implementation: str, on: str, length: int, window: int, backward: bool
) -> Callable[[], None]:
    """A call that runs one case, to its end."""
    machine, device = bench.MACHINES[on], "cuda" if on == "gpu" else "cpu"
    shape = (1, bench.HEADS, length, machine.width)
    new = functools.partial(torch.randn, shape, dtype=getattr(torch, machine.dtype), device=device)
    q, k, v = (new(requires_grad=backward) for _ in range(3))
    dout = new()
    if implementation == "flex":

        def seen(batch, head, query, key):
            return (query >= key) & (query - key < window)

        mask = flex.create_block_mask(seen, None, None, length, length, device=device)
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
        if on == "gpu":
            torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    turns.serve(lambda task: program(**task)())

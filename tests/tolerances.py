"""The one table of numeric tolerances, and the one way to compare arrays.

An error counts relative to the largest magnitude that is expected, which is what a norm over the
whole array would notice. Loosening a number needs its reason in the commit.
"""

import numpy as np

RELATIVE = {
    # One attention call against float64: rounding of a float32 softmax over some 50 keys.
    ("attention", "float32"): 1e-5,
    # The same with inputs, weights p and gradients in bfloat16 (8 bits: 4e-3 each, a few of them).
    ("attention", "bfloat16"): 2e-2,
    # A whole model, forward or gradients, summed in another order: meshes, cache, remat, loops.
    ("model", "float32"): 2e-5,
    # Gradients of the loss: the slope of the logits is rounded to bfloat16 once, and they are.
    ("loss", "bfloat16"): 1e-2,
    # Moments and parameters after a few steps: squares double the error, Adam divides by a root.
    ("train", "float32"): 1e-4,
    # A directional derivative in float64 by differences, against float32 gradients.
    ("difference", "float32"): 2e-5,
}


def assert_close(
    actual,
    expected,
    purpose: str,
    dtype: str = "float32",
    what: str = "",
    at_least: float = 0.0,
) -> None:
    """Fails unless max|actual - expected| <= tolerance * max|expected|; infinities must agree.

    `at_least` stands in for a smaller max|expected|: of zeros that come from cancellation.
    """
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{what} {actual.shape} is not {expected.shape}"
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=what)
    largest = np.abs(expected[finite]).max(initial=at_least)
    error = np.abs(actual[finite] - expected[finite]).max(initial=0.0)
    limit = RELATIVE[purpose, dtype] * largest
    assert error <= limit, f"{what} error {error:.3g} of {largest:.3g} is over {limit:.3g}"

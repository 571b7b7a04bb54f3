"""Generated kernels of odd layers as programs under sanitizers."""

from __future__ import annotations

import pytest

from tests.codegen.cpu import sanitize
from tests.codegen.cpu.experts import Experts, near, sanitized
from tests.codegen.cpu.test_layer import LAYERS, skipping

SLICED = Experts("bf16", 3, 20, 3300, 2, weights="int4", activations="int8", early=True, up_bias=True)
CASES = {
    "amx": [LAYERS["tail, all experts"], LAYERS["int4, slices"]],
    "avx512": [LAYERS["int4, early"], SLICED],
    "avx2": [LAYERS["both biases"], LAYERS["int8, slices"]],
}
RUNS = ((1, 1), (33, 1), (40, 3), (150, 2))  # tokens, threads


def checked(layer: Experts, isa: str, tokens: int, threads: int, sanitizers: str) -> None:
    if why := sanitize.missing(isa, sanitizers):
        pytest.skip(why)
    values = skipping(layer, layer.drawn(tokens, seed=tokens))
    near(layer, sanitized(layer, isa, values, threads, sanitizers)[0], values)


@pytest.mark.parametrize(("isa", "number"), [(isa, i) for isa in CASES for i in range(2)])
def test_no_access_out_of_bounds_and_no_undefined_behaviour(isa: str, number: int) -> None:
    for tokens, threads in RUNS:
        checked(CASES[isa][number], isa, tokens, threads, sanitize.MEMORY)


def test_no_races_between_slices() -> None:
    for tokens, threads in ((1, 3), (150, 2)):
        checked(LAYERS["slices"], "avx2", tokens, threads, sanitize.RACES)

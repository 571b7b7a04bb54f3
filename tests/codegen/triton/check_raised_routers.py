"""Hand-written routers, raised and lowered by the passes, in Triton's interpreter against PyTorch."""

from __future__ import annotations

import pytest
import torch

from tests.codegen.triton.check_routers import check
from tests.codegen.triton.handwritten_routers import HANDWRITTEN
from tests.codegen.triton.interpret import kernel
from tests.passes.route_layers import HIDDEN, Layer, kernel_of
from tests.passes.test_route_patterns import Hash, joint, padded, read_elsewhere

NAMES = [name if i % 4 == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(HANDWRITTEN)]
"""Every fourth runs always: each takes a capture, and `tests/passes` runs them all by the ops' references."""


@pytest.mark.parametrize("name", NAMES)
def test_router(name: str) -> None:
    router = HANDWRITTEN[name]
    layer = Layer(router, router.experts, router.params)
    func, operands = kernel_of(layer, torch.randn(5, HIDDEN), bank=router.experts)
    run = kernel(func)
    for tokens in (3, 40):
        x = torch.randn(tokens, HIDDEN)
        with torch.no_grad():
            ids, weights = layer(x)
            check(run(operands(x)), (ids, weights), router.experts)


@pytest.mark.parametrize("tokens", [3, 40])
def test_further_results(tokens: int) -> None:
    """Shares of shared experts, scores that the model returns."""
    for router, experts, params in ((joint, 10, ((8,),)), (read_elsewhere, 8, ())):
        layer = Layer(router, experts, params)
        func, operands = kernel_of(layer, torch.randn(5, HIDDEN), bank=8)
        x = torch.randn(tokens, HIDDEN)
        with torch.no_grad():
            ids, weights, *others = layer(x)
            got = kernel(func)(operands(x))
        check(got[:4], (ids, weights), 8)
        for extra, wanted in zip(got[4:-1], others, strict=False):  # the tile lists come last
            if wanted.shape[0] == tokens:
                torch.testing.assert_close(extra.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-6)


def test_tokens_with_a_mask() -> None:
    layer = Layer(padded, 8)
    func, operands = kernel_of(layer, torch.randn(5, HIDDEN), torch.rand(5) > 0.5, bank=8)
    for tokens in (3, 40):
        given = torch.randn(tokens, HIDDEN), torch.rand(tokens) > 0.5
        with torch.no_grad():
            check(kernel(func)(operands(*given)), layer(*given), 8)


def test_ids_of_a_table() -> None:
    layer = Hash()
    func, operands = kernel_of(layer, torch.randn(5, HIDDEN), torch.randint(0, 50, (5,)), bank=8)
    for tokens in (3, 40):
        given = torch.randn(tokens, HIDDEN), torch.randint(0, 50, (tokens,))
        with torch.no_grad():
            check(kernel(func)(operands(*given)), layer(*given), 8)

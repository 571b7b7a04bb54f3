"""Hand-written routers, raised and lowered by the passes, in Triton's interpreter against PyTorch."""

from __future__ import annotations

import pytest
import torch

from tests.codegen.triton.check_routers import check
from tests.codegen.triton.handwritten_routers import HANDWRITTEN
from tests.codegen.triton.interpret import kernel
from tests.passes.route_layers import HIDDEN, Layer, kernel_of


@pytest.mark.parametrize("name", HANDWRITTEN)
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

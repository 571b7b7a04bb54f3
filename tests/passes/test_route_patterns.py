"""Every way to write a router becomes one `moe.route`, which computes what was written, for any number of tokens."""

from __future__ import annotations

import pytest
import torch

from sparsec import pipeline
from tests.codegen.triton.handwritten_routers import HANDWRITTEN
from tests.codegen.triton.routers import ROUTERS, Router
from tests.passes.route_layers import HIDDEN, Layer, captured, check, left

RAISE = "canonicalize,cse,dce,canonicalize-routers,dce,raise-route,canonicalize-routers,canonicalize,cse,dce"
ALL = {**ROUTERS, **HANDWRITTEN}


@pytest.mark.parametrize("name", sorted(ALL))
def test_one_route(name: str) -> None:
    router: Router = ALL[name]
    layer = Layer(router, router.experts, router.params)
    module, held = captured(layer, torch.randn(5, HIDDEN), bank=router.experts)
    result = pipeline.run_passes(module, RAISE)
    assert [remark.message for remark in result.remarks if remark.kind == "missed"] == []
    assert left(module) == ["aten.linear", "moe.route", "moe.experts"]
    for tokens in (1, 37, 300):
        check(layer, module, held, torch.randn(tokens, HIDDEN))

"""Whole layers in Triton's interpreter: every kernel of a module lowered for a GPU, against the op's own references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("lark")  # layers are texts
from sparsec import pipeline
from sparsec.dialects.kernel import Launch
from sparsec.ir.core import Module, Op, Value
from sparsec.ir.equal import clone_module
from sparsec.ir.interp import evaluate_module
from tests.codegen.layers import LAYERS, inputs
from tests.codegen.triton.interpret import kernel


def run(module: Module, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """The results of a lowered module with its kernels by Triton, the rest by reference."""
    calls = {name: kernel(func) for name, func in module.funcs.items() if name != "main"}
    values: dict[Value, Any] = dict(zip(module.main.body.args, given, strict=True))
    made = dict[Op, Any]()

    def override(value: Value, computed: Any) -> Any:
        op = value.op
        if isinstance(op, Launch):
            if op not in made:
                made[op] = calls[op.callee]([None if v is None else values[v] for v in op.inputs])
            computed = made[op][value.index]
        values[value] = computed
        return computed

    return evaluate_module(module, given, {}, override=override)


@pytest.mark.parametrize("tokens", [0, 1, 6, 21])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, tokens: int) -> None:
    module = LAYERS[name].module()
    lowered = pipeline.run(clone_module(module), target="cuda:sm_90").module
    given = inputs(module, tokens, seed=tokens)
    for got, wanted in zip(run(lowered, given), evaluate_module(module, given, {}), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

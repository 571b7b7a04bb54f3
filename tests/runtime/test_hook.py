"""The runtime's kernels behind `model.set_experts_implementation("sparsec")`, in eager mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsec.frontend import experts_op, region
from sparsec.frontend.experts_op import reference
from tests.runtime.models import activation

pytest.importorskip("transformers")


@pytest.mark.parametrize("layout", ["concat", "single"])
def test_the_operator_computes_what_its_reference_does(layout: str) -> None:
    import sparsec.hf

    text = region.encode(activation(8, torch.float32, layout))
    up = torch.randn(4, 16 if layout == "concat" else 8, 6)
    operands = (torch.randn(5, 6), torch.randint(0, 5, (5, 2)), torch.rand(5, 2), up, torch.randn(4, 6, 8))
    calls: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs.get("layout", "concat"))
        return sparsec.hf.run(*args, **kwargs)

    experts_op.set_experts_kernel(counted)
    try:
        got = torch.ops.sparsec.experts(*operands, activation=text, layout=layout)
    finally:
        experts_op.set_experts_kernel(sparsec.hf.run)
    assert calls == [layout]
    torch.testing.assert_close(got, reference(*operands, activation=text, layout=layout), rtol=1e-4, atol=1e-5)

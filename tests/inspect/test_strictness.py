"""What the interpreter is taught of a GPU: fences, poison, and an order of programs that nobody may rely on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsec.diagnostics import SparsecError
from sparsec.inspect.strictness import FENCE, fenced, poisoned


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Six elements with their fences."""
    return tensor.as_strided((2 * FENCE // 4 + 6,), (1,), 0)


@pytest.mark.parametrize("beyond", [-1, 6])
def test_a_write_into_a_fence_is_found(beyond: int) -> None:
    def writes(given: list[Any]) -> None:
        memory = whole(given[1])
        memory[FENCE // 4 + beyond] = 1.0

    with pytest.raises(SparsecError, match=r"'kernel' writes beyond its argument 1, torch.float32 \[2, 3\]"):
        fenced("kernel", writes, [7, torch.zeros(2, 3)])


def test_what_is_written_comes_back() -> None:
    x, y = torch.arange(6.0).view(2, 3), torch.zeros(2, 3)

    def run(given: list[Any]) -> None:
        assert given[0] is not x and given[3] == 5
        assert given[1].data_ptr() == given[2].data_ptr()  # one tensor that is given twice
        given[1].copy_(given[0] * 2)
        around = whole(given[0])
        assert around[FENCE // 4 - 1].isnan() and around[FENCE // 4 + 6].isnan()

    fenced("kernel", run, [x, y, y, 5])
    assert torch.equal(y, 2 * x) and torch.equal(x, torch.arange(6.0).view(2, 3))
    fenced("kernel", lambda _: None, [torch.empty(0, 4)])


def test_fresh_memory_holds_nothing_to_rely_on() -> None:
    with poisoned():
        assert torch.empty(3).isnan().all() and (torch.empty(4, dtype=torch.uint8) == 255).all()
    assert not torch.are_deterministic_algorithms_enabled()

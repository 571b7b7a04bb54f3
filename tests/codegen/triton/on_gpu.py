"""Runs kernel functions on the GPU that is here, through the runtime, each more than once and in a graph.

All `check_*.py` of this folder run on it by one command:

    python -m pytest -q -n 12 -o python_files="check_*.py" tests/codegen/triton
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sparsec.codegen.triton.emit import emit_kernel
from sparsec.ir.core import Func, Value
from sparsec.ir.types import Sym, TensorType
from sparsec.runtime import gpu_driver
from sparsec.runtime.context import Context
from sparsec.runtime.plan import Kernel, Tensor
from sparsec.runtime.triton_kernels import bind

Run = Callable[[Sequence["torch.Tensor | None"]], Sequence[torch.Tensor]]
REPLAYS = 3


def tensor(type: Any) -> Tensor:
    assert isinstance(type, TensorType)
    return Tensor(tuple(str(dim) if isinstance(dim, Sym) else dim for dim in type.shape), type.dtype.value)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def described(func: Func, target: str) -> tuple[Kernel, dict[str, bytes]]:
    """A kernel function, compiled, as a plan has it, and its files."""
    made, op = emit_kernel(func, target), func.body.ops[0]
    given = list[Value | None]()
    for argument in op.arguments:
        given += argument if isinstance(argument, tuple) else (argument,)
    params = tuple(None if value is None else tensor(value.type) for value in given)
    results = tuple(tensor(value.type) for value in op.results)
    fixed = func.attrs["tokens"]
    tokens = fixed if type(fixed) is int else "t"
    return Kernel(func.name, op.name, "triton", params, results, tokens, {}, {}, list(made.variants)), made.files


def bound(func: Func) -> Run:
    """A kernel function as the runtime calls it, from tensors on the GPU to tensors on the GPU."""
    made, files = described(func, gpu_driver.architecture(device()))
    return bind(made, range(len(made.params)), Context(device(), files, lambda slot: None))


def kernel(func: Func, **constants: int) -> Run:
    """A kernel function of operands on the CPU. Results are checked to be the same bits again and from a graph."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    if constants:
        pytest.skip("constants of compiled kernels cannot be replaced")
    run = bound(func)

    def call(operands: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor]:
        given = [None if operand is None else operand.cuda() for operand in operands]
        with poisoned():
            first = run(given)
            same_bits(run(given), first)
            if all(operand is None or operand.numel() for operand in given):
                replay, again = captured(lambda: run(given))
                for _ in range(REPLAYS):
                    replay()
                torch.cuda.synchronize()
                same_bits(again, first)
        return [result.cpu() for result in first]

    return call


def captured(run: Callable[[], Sequence[torch.Tensor]]) -> tuple[Callable[[], object], Sequence[torch.Tensor]]:
    """A graph of `run` after a call on its stream, and where its results will be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run()
    return graph.replay, results


def same_bits(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@contextmanager
def poisoned() -> Generator[None]:
    """Fresh buffers are full of NaN, or of the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

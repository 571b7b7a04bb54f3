"""Times one kernel of an artifact on the GPU here: as a CUDA graph, with the L2 emptied before each run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsec.dialects.moe import GatherGemm, GemmCombine
from sparsec.dialects.moe.references import group_reference, tiles_reference
from sparsec.ir.core import Func, Value
from sparsec.runtime import triton_kernels
from sparsec.runtime.context import Context
from sparsec.runtime.dims import compile_dim
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.plan import Kernel
from sparsec.targets import Target

RUNS = 15
"""Runs that the median is taken of."""

FLUSH = 256 << 20
"""Bytes that are read to empty the L2: more than any of today's holds. Written ones would go back to memory while the
clock runs."""


class GpuTimer:
    """Times kernels on operands made up: uniform routing, random numbers. Raises: SparsecError without that GPU."""

    def __init__(self, target: str) -> None:
        Target.parse(target).require()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.flush = torch.zeros(FLUSH // 4, device=self.device)
        self.held: tuple[Func | None, dict[Value, Tensor]] = (None, {})
        self.routed: tuple[Func | None, int, list[Tensor]] = (None, 0, [])

    def __call__(self, func: Func, kernel: Kernel, files: Mapping[str, bytes], tokens: int) -> float:
        """Microseconds of one call: the median of RUNS."""
        call = triton_kernels.bind(kernel, [None] * len(kernel.params), Context(self.device, files, lambda slot: None))
        given = self._operands(func, tokens)
        call(given)  # what is made on the first call is not part of the graph
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(given)
        times = list[float]()
        for _ in range(RUNS):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.sum()
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(1e3 * start.elapsed_time(stop))
        return statistics.median(times)

    def _operands(self, func: Func, tokens: int) -> list[Tensor | None]:
        """The op's operands, holes included; weights are made once for each function."""
        op: Any = func.body.ops[0]
        assert isinstance(op, GatherGemm | GemmCombine)
        if self.held[0] is not func:
            self.held = func, {}
            torch.cuda.empty_cache()
        order, offsets, tiles = self._routing(func, op, tokens)
        sorts = {op.order: order, op.offsets: offsets} | ({op.tiles: tiles} if op.tiles is not None else {})
        flat = list[Value | None]()
        for argument in op.arguments:
            flat += argument if isinstance(argument, tuple) else (argument,)
        given = list[Tensor | None]()
        for value in flat:
            given.append(
                None if value is None else sorts[value] if value in sorts else self._random(func, value, tokens)
            )
        return given

    def _routing(self, func: Func, op: GatherGemm | GemmCombine, tokens: int) -> list[Tensor]:
        if self.routed[:2] != (func, tokens):
            scores = torch.rand(tokens, op.num_experts)
            order, offsets = group_reference(scores.topk(op.k).indices, op.num_experts)
            sorts = [order, offsets, tiles_reference(offsets, len(order))]
            self.routed = func, tokens, [value.to(self.device) for value in sorts]
        return self.routed[2]

    def _random(self, func: Func, value: Value, tokens: int) -> Tensor:
        """A tensor as an operand says it is; one that does not grow with the tokens is kept."""
        if value in self.held[1]:
            return self.held[1][value]
        sizes = [compile_dim(dim if isinstance(dim, int) else str(dim)) for dim in value.tensor.shape]
        env = {str(func.attrs.get("tokens", "t")): tokens}
        shape = [size if isinstance(size, int) else size(env) for size in sizes]
        dtype = DTYPES[value.tensor.dtype.value]
        if dtype.is_floating_point and dtype.itemsize > 1:
            made = torch.empty(shape, dtype=dtype, device=self.device).normal_(0, 0.02)
        else:  # packed weights and their scales: bytes whose numbers are finite
            made = torch.randint(0, 64, (*shape, dtype.itemsize), dtype=torch.uint8, device=self.device).view(dtype)
            made = made.reshape(shape)
        if all(isinstance(size, int) for size in sizes):
            self.held[1][value] = made
        return made

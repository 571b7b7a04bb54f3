"""Launches and buffers: what is left of the `moe` ops after lowering.

A kernel is a function of the module whose body is one fused op and a return; its attributes say who runs it
(`{backend = "triton", tokens = t}`). Layers that are alike call the same one.
"""

from __future__ import annotations

from typing import Any

from sparsec.ir.opdef import Env, OpDef, Operands, Result, Results
from sparsec.ir.types import TensorType, Type


class Alloc(OpDef, name="kernel.alloc"):
    """An uninitialised buffer, for one launch to write.

    For example:

        %buffer = kernel.alloc() : tensor<(2*s0)x48xf32>
    """

    buffer: Result
    pure = False  # two buffers are never one

    def reference(self, env: Env, *args: Any) -> Any:
        import torch

        from sparsec.dialects.dtypes import to_torch

        type = self.buffer.tensor
        return torch.empty([env.dim(dim) for dim in type.shape], dtype=to_torch(type.dtype))


class Launch(OpDef, name="kernel.launch"):
    """Run a kernel: read the first list of operands, write the buffers of the second, which become the results.

    For example:

        %buffer = kernel.alloc() : tensor<(2*s0)x48xf32>
        %h = kernel.launch([%x, %order, %offsets, %up], [%buffer]) {callee = "gather_gemm_0"} : tensor<(2*s0)x48xf32>
    """

    operands_and_buffers: Operands
    outs: Results
    callee: str  #: name of the kernel function
    pure = False

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What the kernel reads, None for an optional operand left out."""
        first = self.arguments[0]
        return first if isinstance(first, tuple) else (first,)

    @property
    def buffers(self) -> tuple[Any, ...]:
        second = self.arguments[1]
        return second if isinstance(second, tuple) else (second,)

    def infer(self) -> tuple[Type, ...]:
        return tuple(buffer.type for buffer in self.buffers)

    def verify(self) -> Any:
        given, wanted = [b.type for b in self.buffers], [r.type for r in self.results]
        if given != wanted:
            yield f"buffers are ({', '.join(map(str, given))}), results ({', '.join(map(str, wanted))})"
        for buffer in self.buffers:
            if not isinstance(buffer.type, TensorType) or buffer.op is None or buffer.op.name != "kernel.alloc":
                yield f"buffer %{buffer.name} does not come from kernel.alloc"

    def reference(self, env: Env, *args: Any) -> Any:
        values = iter(args)
        inputs = [next(values) if given is not None else None for given in self.inputs]
        return env.call(self.callee, inputs)
